"""Modules that are used several times, never, or on more axes than usual."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from tests.influence.extraction import assert_rows_close, exact_loop, extract, run
from tests.influence.tiny_models import (
    NUM_CLASSES,
    VOCABULARY,
    sample_tokens,
    tiny_adapted,
)
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import ALL_LINEAR


def tiny_albert() -> nn.Module:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=NUM_CLASSES,
        initializer_range=0.15,
    )
    model: nn.Module = AlbertForSequenceClassification(config)
    return model.eval()


@pytest.mark.parametrize("longest", [None, 2], ids=["dense", "factored"])
def test_uses_of_a_shared_block_add_up(longest: int | None, device: torch.device) -> None:
    """ALBERT runs the one block that it has three times."""
    model = tiny_albert().to(device)
    token_ids, labels = sample_tokens(5)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(
        model,
        target_modules=[ALL_LINEAR, "LayerNorm", "full_layer_layer_norm"],
        longest=longest,
        hidden_states=True,
    )
    forms = {spec.form for spec in extractor.modules}
    assert forms == ({"dense"} if longest is None else {"dense", "factored"})
    expected = {name: everything[name] for name in [s.name for s in extractor.modules] + ["loss"]}
    assert_rows_close(extract(extractor, token_ids, labels), expected)
    hidden_LBH = run(extractor, token_ids, labels).hidden_LBH
    assert hidden_LBH is not None
    assert hidden_LBH.shape == (1, 5, 32)


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_on_a_shared_block_adds_up(dora: bool, device: torch.device) -> None:
    model = tiny_adapted("bert", base=tiny_albert(), use_dora=dora).to(device)
    token_ids, labels = sample_tokens(5)
    expected = exact_loop(model, token_ids, labels)
    assert_rows_close(extract(GradientExtractor(model), token_ids, labels), expected)


class Mixer(nn.Module):
    """A block with modules that it uses twice, once, or only for the second of two blocks."""

    def __init__(self, *, index: int) -> None:
        super().__init__()
        self.index = index
        self.twice = nn.Linear(8, 8)
        self.heads = nn.LayerNorm(4)
        self.seldom = nn.Linear(8, 8)

    def forward(self, x_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        x_BSH = x_BSH + self.twice(torch.tanh(self.twice(x_BSH)))
        if self.index == 1:
            x_BSH = x_BSH + self.seldom(x_BSH)
        split_BhSH = x_BSH.unflatten(-1, (2, 4)).transpose(1, 2)
        x_BSH = self.heads(split_BhSH).transpose(1, 2).flatten(2)
        # every token is mixed with the mean of the others
        weight_BS1 = mask_BS[..., None].to(x_BSH.dtype)
        mean_B1H = (x_BSH * weight_BS1).sum(dim=1, keepdim=True) / weight_BS1.sum(
            dim=1, keepdim=True
        )
        return torch.tanh(x_BSH + mean_B1H)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.project = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Mixer(index=index) for index in range(2)])
        self.score = nn.Linear(8, NUM_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x_BSH = self.project(self.embed(input_ids))
        for block in self.blocks:
            x_BSH = block(x_BSH, attention_mask)
        return type("Output", (), {"logits": self.score(x_BSH[:, 0])})


@pytest.mark.parametrize("longest", [None, 1], ids=["dense", "factored"])
def test_modules_of_any_model_equal_the_loop(longest: int | None, device: torch.device) -> None:
    """Used twice, never, on [batch, heads, sequence, features], and before the blocks."""
    model = Mixture().to(device)
    token_ids, labels = sample_tokens(5)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(
        model,
        target_modules=["twice", "heads", "seldom", "project"],
        word_embeddings=True,
        longest=longest,
        kronecker=True,
    )
    names = [spec.name for spec in extractor.modules]
    expected = {name: everything[name] for name in [*names, "loss"]}
    assert not expected["blocks.0.seldom.weight"].any()
    assert_rows_close(extract(extractor, token_ids, labels), expected)
    assert [spec.part.value for spec in extractor.modules if spec.layer is None] == [
        "other",
        "other",
        "head",
        "head",
        "word_embedding",
    ]
    batch = run(extractor, token_ids, labels)
    sums = batch.kronecker[names.index("blocks.0.seldom.weight")]
    assert sums is not None
    assert (sums.num_tokens, sums.input_II.shape) == (0, (8, 8))
    assert batch.kronecker[names.index("blocks.0.heads.weight")] is None
    assert batch.kronecker[-1] is None


def test_blocks_without_the_norm_of_the_others_are_passed_over(device: torch.device) -> None:
    """ModernBERT's first block has nn.Identity in its place."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=NUM_CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    model = ModernBertForSequenceClassification(config).eval().to(device)
    token_ids, labels = sample_tokens(5)
    everything = exact_loop(model, token_ids, labels)
    extractor = GradientExtractor(model, target_modules=[ALL_LINEAR, "attn_norm", "mlp_norm"])
    names = [spec.name for spec in extractor.modules]
    assert sum("attn_norm" in name for name in names) == 1
    expected = {name: everything[name] for name in [*names, "loss"]}
    assert_rows_close(extract(extractor, token_ids, labels), expected)
