"""How the extractor behaves: what it tracks, reports, refuses and leaves behind."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from tests.influence.extraction import (
    extract,
    written_out,
)
from tests.influence.tiny_models import (
    FAMILIES,
    NUM_CLASSES,
    VOCABULARY,
    sample_tokens,
    tiny_adapted,
    tiny_classifier,
    tiny_model,
)
from workers.influence.batching import collate
from workers.influence.errors import NoTrackedModules, UnsupportedModule
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import ALL_LINEAR, Part
from workers.influence.objectives import CausalLanguageModel
from workers.influence.rows import DenseRows


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        (
            "roberta",
            {
                "classifier.dense.weight",
                "classifier.dense.bias",
                "classifier.out_proj.weight",
                "classifier.out_proj.bias",
            },
        ),
        (
            "distilbert",
            {
                "pre_classifier.weight",
                "pre_classifier.bias",
                "classifier.weight",
                "classifier.bias",
            },
        ),
        ("gpt2", {"score.weight"}),
        ("llama", {"score.weight"}),
    ],
)
def test_classification_head_is_always_tracked(family: str, head: set[str]) -> None:
    extractor = GradientExtractor(tiny_classifier(family), target_modules=FAMILIES[family])
    assert head == {spec.name for spec in extractor.modules if spec.part is Part.HEAD}


def test_language_model_head_is_tracked_when_named() -> None:
    """And then stands in the group of the head."""
    for targets, groups in (
        (["q_proj"], ["all", "00", "01", "02"]),
        (["q_proj", "lm_head"], ["all", "00", "01", "02", "CL"]),
    ):
        extractor = GradientExtractor(
            tiny_model("causal_lm", "llama"),
            objective=CausalLanguageModel(),
            target_modules=targets,
        )
        assert list(extractor.groups) == groups


def test_modules_describe_the_gradients(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extractor = GradientExtractor(model)
    token_ids, labels = sample_tokens(3)
    batch = extractor.extract(
        collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    )
    assert extractor.num_parameters == trainable
    assert batch.outcome.logits_BC is not None
    assert batch.outcome.logits_BC.shape == (3, NUM_CLASSES)
    assert not batch.outcome.loss_B.requires_grad
    assert batch.is_finite_B.tolist() == [True] * 3
    assert batch.hidden_LBH is None
    assert batch.kronecker == (None,) * 14
    for spec, rows, squared_norm_B in zip(
        extractor.modules, batch.gradients, batch.squared_norm_MB, strict=True
    ):
        assert spec.form == "dense"
        assert isinstance(rows, DenseRows)
        assert rows.gradient_Nd.shape == (3, spec.num_parameters)
        assert rows.gradient_Nd.dtype == torch.float32
        assert math.prod(spec.shape) == spec.num_parameters
        torch.testing.assert_close(squared_norm_B, rows.gradient_Nd.square().sum(dim=1))
    assert extractor.groups["CL"] == (12, 13)
    assert extractor.num_blocks == 3
    assert [spec.layer for spec in extractor.modules] == [0] * 4 + [1] * 4 + [2] * 4 + [None] * 2
    first = extractor.modules[0]
    assert (first.name, first.shape) == (
        "bert.encoder.layer.0.attention.self.query.lora_A",
        (4, 32),
    )


def test_word_embedding_stands_last_and_in_a_group_of_its_own() -> None:
    extractor = GradientExtractor(tiny_adapted("bert"), word_embeddings=True)
    last = extractor.modules[-1]
    assert (last.form, last.part, last.shape) == ("sparse", Part.WORD_EMBEDDING, (VOCABULARY, 32))
    assert extractor.groups["WE"] == (14,)
    assert extractor.groups["all"] == tuple(range(14))
    assert extractor.num_parameters == sum(
        spec.num_parameters for spec in extractor.modules if spec is not last
    )


def test_same_batch_gives_the_same_bits(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    extractor = GradientExtractor(model)
    first, second = (extract(extractor, *sample_tokens(6)) for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])


def test_gradients_are_taken_under_no_grad_and_leave_none_behind(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    extractor = GradientExtractor(model)
    with torch.no_grad():
        gradients = extract(extractor, *sample_tokens(2))
    assert not any(gradient.requires_grad for gradient in gradients.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_even_after_an_error(device: torch.device) -> None:
    model = tiny_classifier("bert").to(device)
    extractor = GradientExtractor(model, target_modules=["query"], hidden_states=True)
    token_ids, labels = sample_tokens(3)
    extract(extractor, token_ids, labels)
    assert count_hooks(model) == 0
    with pytest.raises(IndexError):
        extract(extractor, [[VOCABULARY + 5]], [0])
    assert count_hooks(model) == 0


def test_closed_extractor_lets_go_of_the_model(device: torch.device) -> None:
    with GradientExtractor(tiny_adapted("bert").to(device)) as extractor:
        extract(extractor, *sample_tokens(2))
    with pytest.raises(ValueError, match="closed"):
        extract(extractor, *sample_tokens(2))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_broken_samples_are_named_and_leave_the_others_alone(
    full: bool, device: torch.device
) -> None:
    """A NaN in one token's embedding breaks just the samples that contain it."""
    token_ids, labels = [[4, 5], [6, 7], [8], [7], [9, 9, 3]], [0, 1, 2, 0, 1]
    model = (tiny_classifier if full else tiny_adapted)("bert").to(device)
    options: dict[str, Any] = {"word_embeddings": True, "hidden_states": True, "kronecker": True}
    if full:
        options |= {"target_modules": [ALL_LINEAR, "LayerNorm"], "longest": 2}

    def run(model: nn.Module, chosen: Sequence[int]) -> Any:
        inputs = collate([token_ids[i] for i in chosen], pad_id=0, device=device)
        targets = torch.tensor([labels[i] for i in chosen], device=device)
        return GradientExtractor(model, **options).extract(inputs, targets)

    expected = run(copy.deepcopy(model), [0, 2, 4])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("word_embeddings.weight"):
                parameter[7] = math.nan
    actual = run(model, [0, 1, 2, 3, 4])
    assert actual.is_finite_B.tolist() == [True, False, True, False, True]
    kept = torch.tensor([0, 2, 4], device=device)
    broken = torch.tensor([1, 3], device=device)
    torch.testing.assert_close(actual.hidden_LBH[:, kept], expected.hidden_LBH)
    assert not actual.hidden_LBH[:, broken].any()
    assert not actual.squared_norm_MB[:, broken].any()
    for rows, others in zip(actual.gradients, expected.gradients, strict=True):
        actual_Bd, expected_Bd = written_out(rows), written_out(others)
        torch.testing.assert_close(actual_Bd[kept], expected_Bd)
        assert not actual_Bd[broken].any()
    for sums, others in zip(actual.kronecker, expected.kronecker, strict=True):
        assert (sums is None) == (others is None)
        if sums is not None:
            torch.testing.assert_close(sums.tensors(), others.tensors())


def test_batch_of_broken_samples_alone_is_all_zero(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    nn.init.constant_(
        model.get_parameter("base_model.model.bert.embeddings.word_embeddings.weight"), math.nan
    )
    token_ids, labels = sample_tokens(3)
    batch = GradientExtractor(model, kronecker=True).extract(
        collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    )
    assert not batch.is_finite_B.any()
    assert not any(rows.dense().any() for rows in batch.gradients)
    for sums in batch.kronecker:
        if sums is not None:
            assert sums.num_tokens == 0
            assert not sums.input_II.any()


def test_unknown_target_lists_what_there_is() -> None:
    with pytest.raises(NoTrackedModules, match=r"named q_proj.*dense, key, query, value"):
        GradientExtractor(tiny_classifier("bert"), target_modules=["query", "q_proj"])


def test_targets_belong_to_plain_models_only() -> None:
    with pytest.raises(ValueError, match="must name layers"):
        GradientExtractor(tiny_classifier("bert"))
    with pytest.raises(ValueError, match="must be None"):
        GradientExtractor(tiny_adapted("bert"), target_modules=["query"])


def test_use_on_something_else_than_samples_is_refused() -> None:
    """DeBERTa projects hidden states and relative positions with the same layer."""
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        num_labels=NUM_CLASSES,
    )
    model = DebertaV2ForSequenceClassification(config)
    extractor = GradientExtractor(model, target_modules=["query_proj"])
    with pytest.raises(UnsupportedModule, match=r"query_proj' sees an input of shape"):
        extract(extractor, *sample_tokens(3))


class TransposingBlock(nn.Module):
    """A block that puts the sequence first, or overwrites its projection, as some models do."""

    def __init__(self, *, overwrites: bool) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.overwrites = overwrites

    def forward(self, x_BSI: Tensor) -> Tensor:
        if self.overwrites:
            y_BSI: Tensor = self.query(x_BSI)
            y_BSI *= 2
            return y_BSI
        transposed: Tensor = self.query(x_BSI.transpose(0, 1)).transpose(0, 1)
        return transposed


class TinyModel(nn.Module):
    def __init__(self, *, overwrites: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList([TransposingBlock(overwrites=overwrites) for _ in range(2)])
        self.score = nn.Linear(8, NUM_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x_BSI = self.embed(input_ids).requires_grad_()
        for block in self.blocks:
            x_BSI = block(x_BSI)
        return type("Output", (), {"logits": self.score(x_BSI[:, 0])})


def test_outputs_that_the_model_overwrites_are_refused() -> None:
    extractor = GradientExtractor(TinyModel(overwrites=True), target_modules=["query"])
    with pytest.raises(UnsupportedModule, match=r"blocks\.0\.query' in place"):
        extract(extractor, *sample_tokens(3))


def test_modules_that_see_the_sequence_first_are_refused() -> None:
    """Even where the batch happens to be as large as the sequence is long."""
    with pytest.raises(UnsupportedModule, match=r"blocks\.0\.query' sees .* \(8, 1, 8\) for one"):
        GradientExtractor(TinyModel(overwrites=False), target_modules=["query"])


class Expert(nn.Module):
    """A block whose layer sees the odd tokens of all samples in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSI = x_BSI.clone()
        y_BSI[:, 1::8] = self.linear(x_BSI[:, 1::8].flatten(0, 1)).view(len(x_BSI), -1, 8)
        return y_BSI


def test_rows_of_tokens_are_not_taken_for_samples() -> None:
    """The probe of eight tokens gives the expert one; three samples of ten give it six."""
    model = TinyModel(overwrites=False)
    model.blocks = nn.ModuleList([Expert()])
    extractor = GradientExtractor(model, target_modules=["linear"])
    with pytest.raises(UnsupportedModule, match=r"linear' sees an input of shape \(6, 8\)"):
        extract(extractor, [[5] * 10] * 3, [0, 1, 2])
