"""How every kind of module turns its input and output gradient into gradients of its tensors.

The chain rule, one sample at a time, with inputs X and output gradients G over the positions S:

    linear layer        dW = Gᵀ X            db = Σ_S G      (Conv1D keeps its weight transposed)
    LoRA, scaling s     dB = s · Gᵀ (X Aᵀ)   dA = s · (G B)ᵀ X
    DoRA, gain m / n    dB, dA of LoRA with G ⊙ m / n in the place of G; dm = Σ_S G ⊙ (Y - b) / m
    norm, x̂ normed X    dw = Σ_S G ⊙ x̂       db = Σ_S G
    embedding           dW[token] = Σ of G over the token's positions

Shapes: B batch, S positions, I/O input and output features, R rank, r/c rows and columns of the
parameter's matrix.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from workers.influence.capture import Use
from workers.influence.layers import is_linear_like
from workers.influence.lora import LoraFactors

_NARROW = 8


@dataclass(frozen=True, slots=True)
class Outer:
    """The gradient of a matrix as Σ_S row ⊗ column; one of them is zero at padding.

    Attributes:
        hook_scale: what a hook on the layer would have seen in the row and we put into the column.
    """

    row_BSr: Tensor
    column_BSc: Tensor
    hook_scale: float = 1.0

    def dense(self) -> Tensor:
        """Return the gradient, float32 [B, r · c]."""
        return outer_sum(self.row_BSr, self.column_BSc)


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """The gradient of an embedding: one row for every position that is marked."""

    input_ids_BS: Tensor
    gradient_BSH: Tensor
    mask_BS: Tensor


Term = Tensor | Outer | TokenGradients
"""The gradient of one tensor by one use of its module; a plain tensor is [B, d]."""


def outer_sum(row_BSr: Tensor, column_BSc: Tensor) -> Tensor:
    """Return Σ_S row ⊗ column, [B, r · c]."""
    if column_BSc.shape[-1] * _NARROW <= row_BSr.shape[-1]:
        # a product with few rows is faster than one with few columns
        return (column_BSc.transpose(1, 2) @ row_BSr).transpose(1, 2).flatten(1)
    return (row_BSr.transpose(1, 2) @ column_BSc).flatten(1)


class Kind(ABC):
    """A kind of module: its tensors and their gradients."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by the last part of its name."""

    @abstractmethod
    def terms(self, use: Use) -> list[Term]:
        """Return the gradient of every tensor, in the order of `shapes`, by one use."""


@dataclass(frozen=True, slots=True)
class Linear(Kind):
    """nn.Linear, or Conv1D, whose weight is [I, O]."""

    module: nn.Module
    is_transposed: bool
    with_bias: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.module, *(("weight", "bias") if self.with_bias else ("weight",)))

    def terms(self, use: Use) -> list[Term]:
        gradient_BSO = use.gradient_BSO * use.mask_BS1
        pair = (use.x_BSI, gradient_BSO) if self.is_transposed else (gradient_BSO, use.x_BSI)
        return [Outer(*pair), *([gradient_BSO.sum(dim=1)] if self.with_bias else [])]


@dataclass(frozen=True, slots=True)
class Lora(Kind):
    """The factors of a LoRA or DoRA adapter on a linear layer that holds them merged."""

    module: nn.Module
    factors: LoraFactors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        factors = self.factors
        shapes = {"lora_A": tuple(factors.a_RI.shape), "lora_B": tuple(factors.b_OR.shape)}
        if factors.magnitude_O is not None:
            shapes["lora_magnitude_vector"] = tuple(factors.magnitude_O.shape)
        return shapes

    def terms(self, use: Use) -> list[Term]:
        factors = self.factors
        gradient_BSO = use.gradient_BSO
        if factors.gain_O is not None:
            gradient_BSO = gradient_BSO * factors.gain_O
        # padding is masked on the rank side, where the tensors are small
        scaled_mask_BS1 = use.mask_BS1 * factors.scaling
        device = use.x_BSI.device
        down_BSR = (use.x_BSI @ factors.a_RI.T.to(device)) * scaled_mask_BS1
        up_BSR = (gradient_BSO @ factors.b_OR.to(device)) * scaled_mask_BS1
        terms: list[Term] = [
            Outer(up_BSR, use.x_BSI),
            Outer(gradient_BSO, down_BSR, hook_scale=factors.scaling),
        ]
        if factors.magnitude_O is not None:
            y_BSO = use.y_BSO.float()
            bias: Any = getattr(self.module, "bias", None)
            if bias is not None:
                y_BSO = y_BSO - bias.float()
            product_BSO = use.gradient_BSO * use.mask_BS1 * y_BSO
            terms.append(product_BSO.sum(dim=1) / factors.magnitude_O)
        return terms


@dataclass(frozen=True, slots=True)
class Norm(Kind):
    """A norm over the last axis: LayerNorm, or RMSNorm, which takes no mean off."""

    module: nn.Module
    takes_mean: bool
    epsilon: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        with_bias = getattr(self.module, "bias", None) is not None
        return _shapes(self.module, *(("weight", "bias") if with_bias else ("weight",)))

    def terms(self, use: Use) -> list[Term]:
        gradient_BSO = use.gradient_BSO * use.mask_BS1
        x_BSI = use.x_BSI
        if self.takes_mean:
            normed_BSI = layer_norm(x_BSI, x_BSI.shape[-1:], eps=self.epsilon)
        else:
            mean_square_BS1 = x_BSI.square().mean(dim=-1, keepdim=True)
            normed_BSI = x_BSI * torch.rsqrt(mean_square_BS1 + self.epsilon)
        weight_BO = (gradient_BSO * normed_BSI).sum(dim=1)
        with_bias = getattr(self.module, "bias", None) is not None
        return [weight_BO, *([gradient_BSO.sum(dim=1)] if with_bias else [])]


@dataclass(frozen=True, slots=True)
class Embedding(Kind):
    """nn.Embedding, whose output some models scale."""

    module: nn.Embedding
    scale: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.module, "weight")

    def terms(self, use: Use) -> list[Term]:
        mask_BS = use.mask_BS1[..., 0] != 0
        if self.module.padding_idx is not None:
            # autograd leaves this row alone, wherever it stands
            mask_BS &= use.x_BSI != self.module.padding_idx
        gradient_BSO = use.gradient_BSO
        if self.scale != 1:
            gradient_BSO = gradient_BSO * self.scale
        return [TokenGradients(use.x_BSI, gradient_BSO, mask_BS)]


def kind_of(module: nn.Module, *, with_bias: bool) -> Kind | None:
    """Return the kind of a module by its type and tensors; None for one that we do not know.

    What the type does not vouch for is checked by `workers.influence.verification`.

    Args:
        module: the module.
        with_bias: whether the bias of a linear layer is wanted too.
    """
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if weight is None or not weight.is_floating_point() or set(parameters) - {"weight", "bias"}:
        return None
    kind: Kind | None = None
    if is_linear_like(module) and weight.dim() == 2:  # noqa: PLR2004 - a matrix
        kind = Linear(
            module,
            is_transposed=not isinstance(module, nn.Linear),
            with_bias=with_bias and "bias" in parameters,
        )
    elif isinstance(module, nn.Embedding):
        kind = Embedding(module, scale=1.0)
    elif isinstance(module, nn.LayerNorm) and weight.dim() == 1:
        kind = Norm(module, takes_mean=True, epsilon=module.eps)
    elif weight.dim() == 1 and "bias" not in parameters:
        kind = _rms_norm(module)
    return kind


def _rms_norm(module: nn.Module) -> Norm | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            epsilon: Any = getattr(module, name)
            if epsilon is None:  # nn.RMSNorm's own default
                epsilon = torch.finfo(torch.float32).eps
            return Norm(module, takes_mean=False, epsilon=float(epsilon))
    return None


def _shapes(module: nn.Module, *names: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(module.get_parameter(name).shape) for name in names}
