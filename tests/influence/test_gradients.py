import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.influence.extraction import (
    CASES,
    OBJECTIVES,
    assert_rows_close,
    cosine,
    exact_loop,
    extract,
    norm_names,
    written_out,
)
from tests.influence.tiny_models import (
    Task,
    pad_targets,
    sample_tokens,
    samples_for,
    tiny_adapted,
    tiny_model,
)
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import ALL_LINEAR
from workers.influence.objectives import CausalLanguageModel


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize(("task", "family"), CASES)
def test_adapter_gradients_equal_the_loop(
    task: Task, family: str, batch_size: int, device: torch.device
) -> None:
    """LoRA factors and head, padded to the longest of a batch, against unpadded single samples."""
    model = tiny_adapted(family, task=task).to(device)
    token_ids, labels = samples_for(task, 12)
    expected = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(model, objective=OBJECTIVES[task])
    actual = extract(extractor, token_ids, labels, batch_size=batch_size)
    assert_rows_close(actual, expected)


@pytest.mark.parametrize(("task", "family"), CASES)
def test_dora_gradients_equal_the_loop(task: Task, family: str, device: torch.device) -> None:
    """Its magnitudes too; the length of the weights is a constant, as in PEFT."""
    model = tiny_adapted(family, task=task, use_dora=True).to(device)
    token_ids, labels = samples_for(task, 6)
    expected = exact_loop(model, token_ids, labels)
    assert any(name.endswith("lora_magnitude_vector") for name in expected)
    extractor = GradientExtractor(model, objective=OBJECTIVES[task])
    assert_rows_close(extract(extractor, token_ids, labels), expected)


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize(("task", "family"), CASES)
def test_all_parameters_equal_the_loop(
    task: Task, family: str, batch_size: int, device: torch.device
) -> None:
    """Linear layers, norms, word embeddings and the head of a fully fine-tuned model."""
    model = tiny_model(task, family).to(device)
    token_ids, labels = samples_for(task, 6)
    everything = exact_loop(model, token_ids, labels)
    targets = [ALL_LINEAR, *norm_names(model), *(["lm_head"] if task == "causal_lm" else [])]
    extractor = GradientExtractor(
        model, objective=OBJECTIVES[task], target_modules=targets, word_embeddings=True
    )
    blocks = {
        name
        for name in everything
        if any(part.isdigit() for part in name.split("."))
        and (name.endswith("weight") or any(norm in name for norm in norm_names(model)))
    }
    assert blocks == {spec.name for spec in extractor.modules if spec.layer is not None}
    expected = {name: everything[name] for name in [s.name for s in extractor.modules] + ["loss"]}
    assert_rows_close(extract(extractor, token_ids, labels, batch_size=batch_size), expected)


def test_more_padding_changes_no_gradient(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    token_ids, labels = sample_tokens(4)
    extractor = GradientExtractor(model)
    padded = extract(extractor, [*token_ids, [5] * 40], [*labels, 0])
    assert_rows_close(
        {name: rows[:4] for name, rows in padded.items()},
        extract(extractor, token_ids, labels, batch_size=1),
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_left_padding_changes_no_gradient(family: str, full: bool, device: torch.device) -> None:
    """Where positions are relative, padding may stand on the left as well."""
    if full:
        model = tiny_model("causal_lm", family).to(device)
        targets: list[str] | None = [ALL_LINEAR, *norm_names(model), "lm_head"]
    else:
        model, targets = tiny_adapted(family, task="causal_lm").to(device), None
    token_ids, labels = samples_for("causal_lm", 6)
    extractor = GradientExtractor(
        model,
        objective=CausalLanguageModel(),
        target_modules=targets,
        word_embeddings=True,
    )
    expected = extract(extractor, token_ids, labels, batch_size=1)
    right = collate(token_ids, pad_id=0, device=device)
    count_B = right["attention_mask"].sum(dim=1).tolist()
    left = {
        name: torch.stack(
            [row_S.roll(len(row_S) - count) for row_S, count in zip(value, count_B, strict=True)]
        )
        for name, value in right.items()
    }
    batch = extractor.extract(left, pad_targets(labels, device=device, left=True))
    actual = {
        spec.name: written_out(rows)
        for spec, rows in zip(extractor.modules, batch.gradients, strict=True)
    }
    assert_rows_close(actual | {"loss": batch.loss_B}, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"layer.0.attention.self.query": 2}},
        {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["classifier"]},
        {"modules_to_save": ["classifier", "LayerNorm", "attention.output.dense"]},
        {"layers_to_transform": [1]},
        {"num_layers": 1},
    ],
    ids=[
        "rslora",
        "dropout",
        "rank_pattern",
        "all_linear",
        "saved_modules",
        "some_layers",
        "one_block",
    ],
)
def test_variations_of_lora_stay_exact(options: dict[str, Any], device: torch.device) -> None:
    model = tiny_adapted("bert", **options).to(device)
    token_ids, labels = sample_tokens(5)
    expected = exact_loop(model, token_ids, labels)
    actual = extract(GradientExtractor(model), token_ids, labels)
    assert_rows_close(actual, expected)


def test_zero_factor_gives_zero_gradient_not_nan(device: torch.device) -> None:
    """A fresh adapter (B = 0) has zero gradients for A and others for B."""
    model = tiny_adapted("bert").to(device)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    extractor = GradientExtractor(model)
    gradients = extract(extractor, *sample_tokens(3))
    for spec in extractor.modules:
        is_zero = bool((gradients[spec.name] == 0).all())
        assert is_zero == spec.name.endswith("lora_A")


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.97), (torch.float16, 0.999)])
@pytest.mark.parametrize(("task", "family"), CASES)
def test_low_precision_gives_close_float32_gradients(
    task: Task, family: str, dtype: torch.dtype, least: float, device: torch.device
) -> None:
    """Merged in float32 and computed in less, gradients point the same way."""
    model = tiny_adapted(family, task=task).to(device)
    token_ids, labels = samples_for(task, 8)
    token_ids, labels = token_ids[1:], labels[1:]
    objective = OBJECTIVES[task]
    exact = extract(GradientExtractor(copy.deepcopy(model), objective=objective), token_ids, labels)
    extractor = GradientExtractor(model, objective=objective, dtype=dtype)
    rounded = extract(extractor, token_ids, labels)
    assert all(rows.dtype == torch.float32 for rows in rounded.values())
    assert cosine(rounded, exact).min() > least


def test_float16_keeps_the_gradients_of_confident_predictions(device: torch.device) -> None:
    """Losses of 1e-7 have output gradients below the smallest number of float16."""
    model = tiny_adapted("bert").to(device)
    token_ids, _ = sample_tokens(8)
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    with torch.no_grad():
        labels = [
            int(model(**collate([ids], pad_id=0, device=device)).logits.argmax())
            for ids in token_ids
        ]
        head.get_parameter("weight").mul_(24)
    exact = extract(GradientExtractor(copy.deepcopy(model)), token_ids, labels)
    assert float(exact["loss"].median()) < 1e-6
    rounded = extract(GradientExtractor(model, dtype=torch.float16), token_ids, labels)
    assert cosine(rounded, exact).min() > 0.999
