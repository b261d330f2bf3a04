"""Which modules are recognised, and which are refused."""

import pytest
import torch
from torch import Tensor, nn

from tests.influence.tiny_models import (
    tiny_classifier,
)
from workers.influence.errors import UnsupportedModule
from workers.influence.gradients import GradientExtractor
from workers.influence.module_kinds import Embedding
from workers.influence.verification import supported_kind


class ScaledEmbedding(nn.Embedding):
    """As in Gemma."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) * 3.0


class ShiftedEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) + 1


class OffsetRMSNorm(nn.Module):
    """As in Gemma: the weight is an offset from one."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return normed * (1 + self.weight)


class CentredRMSNorm(OffsetRMSNorm):
    """By its name an RMSNorm, but it takes the mean off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=-1, keepdim=True))


class RoundedRMSNorm(OffsetRMSNorm):
    """The epsilon that it shows is not the one that it uses."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.weight


class GatedRMSNorm(OffsetRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # as in Mamba
        return super().forward(x * gate)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(2 * input)


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class RenamedLinear(nn.Linear):
    pass


def quantised_linear() -> nn.Module:
    module = nn.Linear(8, 8)
    module.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    "module",
    [nn.RMSNorm(8), nn.LayerNorm(8, bias=False), OffsetRMSNorm(), RenamedLinear(8, 8)],
    ids=lambda module: type(module).__name__,
)
def test_kinds_are_recognised_by_what_they_do(module: nn.Module) -> None:
    kind = supported_kind("block.norm", module, with_bias=True)
    assert "weight" in kind.shapes()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(8, 8, 1),
        nn.LSTM(8, 8),
        nn.BatchNorm1d(8),
        nn.Bilinear(8, 8, 8),
        nn.MultiheadAttention(8, 2),
        nn.Identity(),
        Bias(),
        CentredRMSNorm(),
        RoundedRMSNorm(),
        GatedRMSNorm(),
        ScaledLinear(8, 8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm((2, 8)),
        quantised_linear(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(
        UnsupportedModule, match=rf"'block\.0\.thing' is a {type(module).__name__};"
    ):
        supported_kind("block.0.thing", module, with_bias=True)


def test_scaled_embeddings_are_recognised() -> None:
    kind = supported_kind("embed", ScaledEmbedding(20, 8), with_bias=True)
    assert isinstance(kind, Embedding)
    assert kind.scale == pytest.approx(3.0)


@pytest.mark.parametrize(
    "embedding",
    [
        ShiftedEmbedding(20, 8),
        nn.Embedding(20, 8, max_norm=1.0),
        nn.Embedding(20, 8, scale_grad_by_freq=True),
    ],
    ids=["shifted", "max_norm", "by_frequency"],
)
def test_embeddings_that_do_more_are_refused(embedding: nn.Module) -> None:
    with pytest.raises(UnsupportedModule, match="'embed' is a"):
        supported_kind("embed", embedding, with_bias=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["attention"], "attention' is a BertAttention"),
        (["position_embeddings"], "position_embeddings' is an embedding other than"),
    ],
)
def test_targets_without_exact_gradients_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(UnsupportedModule, match=message):
        GradientExtractor(tiny_classifier("bert"), target_modules=targets)


def test_layers_that_share_a_weight_are_refused() -> None:
    model = tiny_classifier("bert")
    first, second = (
        model.get_submodule(f"bert.encoder.layer.{index}.attention.self.query") for index in (0, 1)
    )
    first.weight = second.weight
    with pytest.raises(UnsupportedModule, match="shares its weight"):
        GradientExtractor(model, target_modules=["query"])
