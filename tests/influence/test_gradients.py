import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from tests.influence.tiny_models import (
    FAMILIES,
    NUM_CLASSES,
    VOCABULARY,
    sample_tokens,
    tiny_adapted,
    tiny_classifier,
)
from tests.oracles import loop_gradients
from workers.influence.batching import collate
from workers.influence.errors import NonFiniteInfluence, NoTrackedModules, UnsupportedModule
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import Part


def extract(
    extractor: GradientExtractor,
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    *,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Extract in batches; gradients by module name and the loss under 'loss'."""
    size = batch_size or len(labels)
    batches = [
        extractor.extract(
            collate(token_ids[start : start + size], pad_id=0, device=extractor.device),
            torch.tensor(labels[start : start + size], device=extractor.device),
        )
        for start in range(0, len(labels), size)
    ]
    result = {
        spec.name: torch.cat([batch.gradients[index] for batch in batches])
        for index, spec in enumerate(extractor.modules)
    }
    return result | {"loss": torch.cat([batch.loss_B for batch in batches])}


def assert_rows_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every sample's row agrees within 1e-5 of its length, in every module."""
    assert actual.keys() == expected.keys()
    for name, expected_Bd in expected.items():
        error_B = (actual[name] - expected_Bd).reshape(len(expected_Bd), -1).norm(dim=1)
        length_B = expected_Bd.reshape(len(expected_Bd), -1).norm(dim=1)
        assert bool((error_B <= 1e-5 * length_B).all()), (name, error_B / length_B)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_gradients_equal_the_loop(
    family: str, batch_size: int, device: torch.device
) -> None:
    """LoRA factors and head, padded to the longest of a batch, against unpadded single samples."""
    model = tiny_adapted(family).to(device)
    token_ids, labels = sample_tokens(12)
    expected, loss_B = loop_gradients(model, token_ids, labels)
    actual = extract(GradientExtractor(model), token_ids, labels, batch_size=batch_size)
    assert_rows_close(actual, expected | {"loss": loss_B})


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_gradients_equal_the_loop(family: str, device: torch.device) -> None:
    """The weights of a fully fine-tuned model's projections, and its head."""
    model = tiny_classifier(family).to(device)
    token_ids, labels = sample_tokens(6)
    everything, loss_B = loop_gradients(copy.deepcopy(model), token_ids, labels)
    extractor = GradientExtractor(model, target_modules=FAMILIES[family])
    expected = {spec.name: everything[spec.name] for spec in extractor.modules}
    assert_rows_close(extract(extractor, token_ids, labels), expected | {"loss": loss_B})
    head = {spec.name for spec in extractor.modules if spec.part is Part.HEAD}
    assert (
        head
        == {
            "bert": {"classifier.weight", "classifier.bias"},
            "roberta": {
                "classifier.dense.weight",
                "classifier.dense.bias",
                "classifier.out_proj.weight",
                "classifier.out_proj.bias",
            },
            "distilbert": {
                "pre_classifier.weight",
                "pre_classifier.bias",
                "classifier.weight",
                "classifier.bias",
            },
            "llama": {"score.weight"},
        }[family]
    )


def test_more_padding_changes_no_gradient(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    token_ids, labels = sample_tokens(4)
    extractor = GradientExtractor(model)
    padded = collate([*token_ids, [5] * 40], pad_id=0, device=device)
    label_B = torch.tensor([*labels, 0], device=device)
    batch = extractor.extract(padded, label_B)
    actual = {spec.name: batch.gradients[index][:4] for index, spec in enumerate(extractor.modules)}
    assert_rows_close(
        actual | {"loss": batch.loss_B[:4]}, extract(extractor, token_ids, labels, batch_size=1)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"layer.0.attention.self.query": 2}},
        {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["classifier"]},
        {"layers_to_transform": [1]},
        {"num_layers": 1},
    ],
    ids=["rslora", "dropout", "rank_pattern", "all_linear", "some_layers", "one_block"],
)
def test_variations_of_lora_stay_exact(options: dict[str, Any], device: torch.device) -> None:
    model = tiny_adapted("bert", **options).to(device)
    token_ids, labels = sample_tokens(5)
    expected, loss_B = loop_gradients(model, token_ids, labels)
    actual = extract(GradientExtractor(model), token_ids, labels)
    assert_rows_close(actual, expected | {"loss": loss_B})


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


def test_modules_describe_the_gradients(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extractor = GradientExtractor(model)
    token_ids, labels = sample_tokens(3)
    batch = extractor.extract(
        collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    )
    assert extractor.num_parameters == trainable
    assert batch.logits_BC.shape == (3, NUM_CLASSES)
    for spec, gradient, squared_norm_B in zip(
        extractor.modules, batch.gradients, batch.squared_norm_MB, strict=True
    ):
        assert gradient.shape == (3, spec.num_parameters)
        assert gradient.dtype == torch.float32
        assert math.prod(spec.shape) == spec.num_parameters
        torch.testing.assert_close(squared_norm_B, gradient.square().sum(dim=1))
    assert extractor.groups["CL"] == (12, 13)
    assert [spec.layer for spec in extractor.modules] == [0] * 4 + [1] * 4 + [2] * 4 + [None] * 2
    first = extractor.modules[0]
    assert (first.name, first.shape) == (
        "bert.encoder.layer.0.attention.self.query.lora_A",
        (4, 32),
    )


def test_bfloat16_model_gives_close_float32_gradients(device: torch.device) -> None:
    """Merged in float32 and computed in bfloat16, gradients point the same way."""
    model = tiny_adapted("bert").to(device)
    token_ids, labels = sample_tokens(8)
    exact = extract(GradientExtractor(copy.deepcopy(model)), token_ids, labels)
    extractor = GradientExtractor(model, dtype=torch.bfloat16)
    rounded = extract(extractor, token_ids, labels)
    for spec in extractor.modules:
        assert rounded[spec.name].dtype == torch.float32
        cosine_B = torch.cosine_similarity(rounded[spec.name], exact[spec.name], dim=1)
        assert cosine_B.min() > 0.97, spec.name


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
    extractor = GradientExtractor(model, target_modules=["query"])
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


def test_non_finite_gradient_names_the_samples(device: torch.device) -> None:
    """A NaN in one token's embedding breaks just the samples that contain it."""
    model = tiny_adapted("bert").to(device)
    embeddings = "base_model.model.bert.embeddings.word_embeddings"
    with torch.no_grad():
        model.get_parameter(f"{embeddings}.weight")[7] = math.nan
    with pytest.raises(NonFiniteInfluence) as caught:
        extract(GradientExtractor(model), [[4, 5], [6, 7], [8], [7]], [0, 1, 2, 0])
    assert caught.value.positions == (1, 3)
    assert "1, 3" in str(caught.value)


def test_unknown_target_lists_what_there_is() -> None:
    with pytest.raises(NoTrackedModules, match=r"named q_proj.*dense, key, query, value"):
        GradientExtractor(tiny_classifier("bert"), target_modules=["q_proj"])


def test_targets_belong_to_plain_models_only() -> None:
    with pytest.raises(ValueError, match="must name layers"):
        GradientExtractor(tiny_classifier("bert"))
    with pytest.raises(ValueError, match="must be None"):
        GradientExtractor(tiny_adapted("bert"), target_modules=["query"])


def test_layer_used_twice_in_a_pass_is_refused() -> None:
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
    with pytest.raises(UnsupportedModule, match=r"query_proj' is used more than once"):
        extract(extractor, *sample_tokens(3))


def test_conv1d_is_refused() -> None:
    """GPT-2 has its projections in transposed layers of another type."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=3
    )
    with pytest.raises(UnsupportedModule, match="Conv1D"):
        GradientExtractor(GPT2ForSequenceClassification(config), target_modules=["c_attn"])


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


@pytest.mark.parametrize(
    ("overwrites", "message"), [(True, "in place"), (False, r"not \[batch 3, sequence")]
)
def test_what_cannot_be_exact_is_refused(overwrites: bool, message: str) -> None:
    """Outputs written in place, and inputs that are not one row of tokens per sample."""
    extractor = GradientExtractor(TinyModel(overwrites=overwrites), target_modules=["query"])
    token_ids, labels = sample_tokens(3)
    with pytest.raises(UnsupportedModule, match=message):
        extract(extractor, token_ids, labels)
