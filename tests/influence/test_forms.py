"""The forms that gradients are kept in."""

import copy
from typing import Any

import pytest
import torch

from tests.influence.extraction import (
    OBJECTIVES,
    assert_rows_close,
    by_name,
    exact_loop,
    extract,
    norm_names,
    run,
)
from tests.influence.tiny_models import (
    Task,
    sample_tokens,
    samples_for,
    tiny_adapted,
    tiny_causal_lm,
    tiny_classifier,
    tiny_model,
)
from workers.influence.contraction import FormChoice
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import ALL_LINEAR
from workers.influence.objectives import CausalLanguageModel
from workers.influence.projection import ModuleProjection, Projection
from workers.influence.rows import DenseRows, FactoredRows, SparseRows


@pytest.mark.parametrize(
    ("task", "family"), [("classification", "bert"), ("causal_lm", "gpt2"), ("causal_lm", "llama")]
)
def test_factored_rows_have_the_dot_products_of_dense_ones(
    task: Task, family: str, device: torch.device
) -> None:
    model = tiny_model(task, family).to(device)
    token_ids, labels = [[5, 6, 7], [8, 9], [6, 6, 9]], [0, 1, 2]
    if task == "causal_lm":
        labels = [[-100, *ids[1:]] for ids in token_ids]  # type: ignore[misc]  # of tokens now
    options: dict[str, Any] = {"objective": OBJECTIVES[task], "target_modules": [ALL_LINEAR]}
    dense = GradientExtractor(copy.deepcopy(model), longest=3, needs_dense=True, **options)
    factored = GradientExtractor(model, longest=3, **options)
    assert {spec.form for spec in dense.modules} == {"dense"}
    matrices = [spec for spec in factored.modules if spec.layer is not None]
    assert {spec.form for spec in matrices} == {"factored"}
    expected, actual = run(dense, token_ids, labels), run(factored, token_ids, labels)
    torch.testing.assert_close(actual.squared_norm_MB, expected.squared_norm_MB)
    for spec, rows, other in zip(
        factored.modules, actual.gradients, expected.gradients, strict=True
    ):
        assert isinstance(rows, FactoredRows if spec.form == "factored" else DenseRows)
        torch.testing.assert_close(rows.dense(), other.dense())
        torch.testing.assert_close(rows.dot(rows), other.dot(other))


@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "bert.encoder.layer.0.output.dense"), ("gpt2", "transformer.h.0.mlp.c_proj")],
)
def test_long_samples_are_not_kept_as_factors(family: str, name: str) -> None:
    """The layer is 64 by 32: at 4 tokens, 16 · (64 + 32) products are fewer than 64 · 32."""
    for longest, form in ((4, "factored"), (5, "dense"), (None, "dense")):
        extractor = GradientExtractor(
            tiny_classifier(family, **({"n_inner": 64} if family == "gpt2" else {})),
            target_modules=[ALL_LINEAR],
            longest=longest,
        )
        forms = {spec.name: spec.form for spec in extractor.modules}
        assert forms[f"{name}.weight"] == form


def test_layers_after_pooling_are_factored_where_that_is_smaller(device: torch.device) -> None:
    """RoBERTa's head reads one position: 32 x 32 entries are kept as 32 + 32, 3 x 32 are not."""
    model = tiny_classifier("roberta").to(device)
    token_ids, labels = sample_tokens(5)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(model, target_modules=["query"])
    forms = {spec.name: spec.form for spec in extractor.modules if spec.layer is None}
    assert forms == {
        "classifier.dense.weight": "factored",
        "classifier.dense.bias": "dense",
        "classifier.out_proj.weight": "dense",
        "classifier.out_proj.bias": "dense",
    }
    rows = by_name(extractor, run(extractor, token_ids, labels))
    for name in forms:
        torch.testing.assert_close(rows[name].dense(), everything[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("longest", "is_pooled", "needs_dense", "form"),
    [
        (4, False, False, "factored"),
        (5, False, False, "projected"),
        (None, False, False, "projected"),
        (4, False, True, "projected"),
        (None, True, False, "factored"),
        (None, True, True, "projected"),
    ],
)
def test_cheap_factors_come_before_projections(
    longest: int | None, is_pooled: bool, needs_dense: bool, form: str
) -> None:
    """They are exact; 16 · (64 + 32) products are fewer than 64 · 32."""
    choice = FormChoice(Projection(dimension=8, seed=0), longest=longest, needs_dense=needs_dense)
    assert choice.form(64, 32, is_pooled=is_pooled) == form
    # too small for either
    assert choice.form(8, 8, is_pooled=False) == "dense"


@pytest.mark.parametrize(
    ("task", "family"), [("classification", "bert"), ("causal_lm", "gpt2"), ("causal_lm", "qwen3")]
)
def test_projected_rows_are_the_projected_gradients(
    task: Task, family: str, device: torch.device
) -> None:
    """Of the parameter as it is, which GPT-2 keeps transposed."""
    model = tiny_model(task, family).to(device)
    token_ids, labels = samples_for(task, 6)
    everything = exact_loop(model, token_ids, labels)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    projection = Projection(dimension=6, seed=3)
    extractor = GradientExtractor(
        model,
        objective=OBJECTIVES[task],
        target_modules=[ALL_LINEAR, *norm_names(model)],
        projection=projection,
    )
    projected = [spec for spec in extractor.modules if spec.form == "projected"]
    assert len(projected) > 10
    assert {spec.shape for spec in projected} <= {(6, 6), (3, 6)}
    assert all(spec.num_parameters == spec.shape[0] * spec.shape[1] for spec in projected)
    expected = {}
    for spec in extractor.modules:
        gradient_Bd = everything[spec.name]
        if spec.form == "projected":
            num_rows, num_columns = shapes[spec.name]
            matrices = ModuleProjection(
                projection,
                name=spec.name,
                in_features=num_columns,
                out_features=num_rows,
                device=device,
            )
            right_cK, left_rK = matrices.project_tokens(
                torch.eye(num_columns, device=device), torch.eye(num_rows, device=device)
            )
            gradient_Brc = gradient_Bd.view(-1, num_rows, num_columns)
            gradient_Bd = (left_rK.T @ gradient_Brc @ right_cK).flatten(1)
        expected[spec.name] = gradient_Bd
    actual = extract(extractor, token_ids, labels)
    del actual["loss"]
    assert_rows_close(actual, expected)


def test_exact_twin_of_a_projected_extractor(device: torch.device) -> None:
    """The same modules without projection, factored where that is smaller."""
    model = tiny_classifier("bert").to(device)
    token_ids, labels = sample_tokens(4)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(
        model,
        target_modules=[ALL_LINEAR],
        projection=Projection(dimension=4, seed=0),
        needs_dense=True,
        longest=16,
    )
    before = run(extractor, token_ids, labels)
    exact = extractor.exact()
    assert [spec.name for spec in exact.modules] == [spec.name for spec in extractor.modules]
    assert {spec.form for spec in exact.modules} == {"factored", "dense"}
    rows = by_name(exact, run(exact, token_ids, labels))
    for name, each in rows.items():
        torch.testing.assert_close(each.dense(), everything[name], rtol=1e-4, atol=1e-5)
    after = run(extractor, token_ids, labels)
    assert torch.equal(before.squared_norm_MB, after.squared_norm_MB)


def test_embedding_rows_are_the_dense_gradient(device: torch.device) -> None:
    """One row per sample and distinct token, also of a token that stands in it twice."""
    model = tiny_adapted("bert").to(device)
    token_ids, labels = [[5, 6, 5], [7, 5]], [0, 1]
    free = copy.deepcopy(model)
    name = "bert.embeddings.word_embeddings.weight"
    free.get_parameter(f"base_model.model.{name}").requires_grad_()
    expected = exact_loop(free, token_ids, labels)
    extractor = GradientExtractor(model, word_embeddings=True)
    assert_rows_close(extract(extractor, token_ids, labels), expected)
    rows = run(extractor, token_ids, labels).gradients[-1]
    assert isinstance(rows, SparseRows)
    assert list(zip(rows.sample_P.tolist(), rows.token_P.tolist(), strict=True)) == [
        (0, 5),
        (0, 6),
        (1, 5),
        (1, 7),
    ]
    assert rows.count_P.tolist() == [2, 1, 1, 1]


def test_padding_token_inside_a_text_has_no_gradient(device: torch.device) -> None:
    """Autograd leaves the row of `padding_idx` alone; BERT sets it to 0."""
    model = tiny_classifier("bert").to(device)
    token_ids, labels = [[5, 0, 6], [7, 8]], [0, 1]
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(model, target_modules=["query"], word_embeddings=True)
    actual = extract(extractor, token_ids, labels)
    name = extractor.modules[-1].name
    torch.testing.assert_close(actual[name], everything[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_embedding_and_head_take_their_own_terms(family: str, device: torch.device) -> None:
    """Together they are autograd's gradient of the tied weight."""
    model = tiny_causal_lm(family, tie_word_embeddings=True).to(device)
    token_ids, labels = samples_for("causal_lm", 5)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(
        model,
        objective=CausalLanguageModel(),
        target_modules=["lm_head"],
        word_embeddings=True,
    )
    head, embedding = (spec.name for spec in extractor.modules)
    assert embedding in everything
    actual = extract(extractor, token_ids, labels)
    torch.testing.assert_close(
        actual[head] + actual[embedding], everything[embedding], rtol=1e-4, atol=1e-5
    )
