"""Check a kind of module against autograd, where its type does not vouch for its formula.

Shapes: B batch, S positions, I/O input and output features.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workers.influence.capture import Use
from workers.influence.errors import UnsupportedModule
from workers.influence.module_kinds import Embedding, Kind, Linear, Outer, kind_of

_TOLERANCE = 1e-4
_NUM_POSITIONS = 3
_SCALES = (1.0, 0.03, 0.003)
"""Of the inputs: a wrong epsilon of a norm shows only in small ones."""


def supported_kind(name: str, module: nn.Module, *, with_bias: bool) -> Kind:
    """Return the kind of a module whose per-sample gradients are exact.

    A module that is not one of torch's own is run on random inputs, in float32, and the gradients
    of its kind are compared with autograd's.

    Raises:
        UnsupportedModule: names the module.
    """
    kind = kind_of(module, with_bias=with_bias)
    if isinstance(kind, Embedding):
        return _verify_embedding(name, kind)
    if kind is None or not (_is_vouched_for(module) or _agrees(kind, module)):
        raise UnsupportedModule(
            f"module '{name}' is a {type(module).__name__}; only linear layers and Conv1D with "
            "unquantised weights, LayerNorm, RMSNorm and word embeddings are audited, each with "
            "its usual formula."
        )
    return kind


def _is_vouched_for(module: nn.Module) -> bool:
    # Transformers' Conv1D stands here with torch's own: checking costs a gradient of each weight
    kind = type(module)
    return kind in (nn.Linear, nn.LayerNorm) or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )


def _agrees(kind: Kind, module: nn.Module) -> bool:
    shapes = kind.shapes()
    shape = shapes["weight"]
    is_transposed = isinstance(kind, Linear) and kind.is_transposed
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: parameter.detach().float().requires_grad_()
        for name, parameter in module.named_parameters()
    }
    device = parameters["weight"].device

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    scale_B11 = torch.tensor(_SCALES, device=device)[:, None, None]
    size = (len(_SCALES), _NUM_POSITIONS, shape[0] if is_transposed else shape[-1])
    x_BSI = (draw(*size) + 0.5) * scale_B11
    try:
        with torch.enable_grad():
            y_BSO = functional_call(module, parameters, (x_BSI,))
            gradient_BSO = draw(*y_BSO.shape)
            wanted = [parameters[name] for name in shapes]
            expected = [
                torch.autograd.grad(y_O, wanted, gradient_O, retain_graph=True)
                for y_O, gradient_O in zip(y_BSO, gradient_BSO, strict=True)
            ]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # it wants more than one input, or gives something else than one output
    use = Use(x_BSI, y_BSO.detach(), gradient_BSO, torch.ones_like(x_BSI[..., :1]))
    for index, term in enumerate(kind.terms(use)):
        actual = term.dense() if isinstance(term, Outer) else term
        exact = torch.stack([gradients[index].flatten() for gradients in expected])
        assert isinstance(actual, Tensor)  # noqa: S101 - embeddings are checked elsewhere
        if not _is_close(actual, exact):
            return False
    return True


def _verify_embedding(name: str, kind: Embedding) -> Embedding:
    """Return the kind with the factor by which the module scales its rows."""
    module = kind.module
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UnsupportedModule(
            f"module '{name}' is an embedding with max_norm or scale_grad_by_freq; "
            "only embeddings that look up a row are audited."
        )
    if type(module) is nn.Embedding:
        return kind
    ids_S = torch.arange(min(16, module.num_embeddings), device=module.weight.device)
    with torch.no_grad():
        row_SH, y_SH = module.weight[ids_S].float(), module(ids_S).float()
        scale = float((row_SH * y_SH).sum() / row_SH.square().sum().clamp(min=1e-30))
    rounding = torch.finfo(module.weight.dtype).eps
    if not torch.allclose(y_SH, scale * row_SH, rtol=max(_TOLERANCE, 4 * rounding), atol=1e-8):
        raise UnsupportedModule(
            f"module '{name}' is a {type(module).__name__}, which does more than look up a row; "
            "only nn.Embedding is audited."
        )
    return replace(kind, scale=scale)


def _is_close(actual_Bd: Tensor, expected_Bd: Tensor) -> bool:
    error_B = (actual_Bd - expected_Bd).norm(dim=1)
    return bool((error_B <= _TOLERANCE * expected_Bd.norm(dim=1)).all())
