"""Per-sample gradients of all tracked modules in one batched forward and backward pass.

Every weight is frozen and autograd is asked only for the gradients of the tracked layers' outputs;
the gradients of the parameters follow from the captured inputs X and output gradients G:

    linear layer        dW = Gᵀ X            db = Σ_S G
    LoRA, scaling s     dB = s · Gᵀ (X Aᵀ)   dA = s · (G B)ᵀ X

(the chain rule for y = x Wᵀ + b and W = W₀ + s · B A, one sample at a time).

Shapes: B batch, S sequence, I/O input and output features, R rank, C classes, M modules, d entries
of one module.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.influence.errors import NonFiniteInfluence, NoTrackedModules, UnsupportedModule
from workers.influence.layers import (
    BlockStack,
    ModuleSpec,
    Part,
    find_block_stack,
    find_head,
    layer_groups,
)
from workers.influence.lora import LoraFactors, is_adapted, merge_adapter
from workers.influence.row_sparse import skip_zero_rows


@dataclass(frozen=True, slots=True)
class SampleGradients:
    """What one batch gives.

    Attributes:
        gradients: by module, float32 [B, d]; rows are flattened like the module's parameter.
        squared_norm_MB: float32 [M, B], the squared length of every gradient.
        loss_B: float32, cross-entropy of every sample on its own.
        logits_BC: float32.
    """

    gradients: tuple[Tensor, ...]
    squared_norm_MB: Tensor
    loss_B: Tensor
    logits_BC: Tensor


@dataclass(frozen=True, slots=True)
class _Tracked:
    """A linear layer whose output is hooked, and which of its tensors are wanted."""

    name: str
    linear: nn.Linear
    layer: int | None
    part: Part
    factors: LoraFactors | None = None
    with_bias: bool = False

    def modules(self) -> list[ModuleSpec]:
        tensors: dict[str, Tensor] = {}
        if self.factors is not None:
            tensors = {"lora_A": self.factors.a_RI, "lora_B": self.factors.b_OR}
        else:
            tensors = {"weight": self.linear.weight}
            if self.with_bias:
                tensors["bias"] = self.linear.bias
        return [
            ModuleSpec(
                name=f"{self.name}.{suffix}",
                layer=self.layer,
                part=self.part,
                num_parameters=tensor.numel(),
                shape=tuple(tensor.shape),
            )
            for suffix, tensor in tensors.items()
        ]


@dataclass(frozen=True, slots=True)
class _Capture:
    """Input and output of a hooked layer, with their versions to notice writes in place."""

    x: Tensor
    y: Tensor
    versions: tuple[int, int]


class GradientExtractor(AbstractContextManager["GradientExtractor"]):
    """Takes per-sample gradients of a sequence classifier in evaluation mode.

    The extractor owns the model from now on: its adapter is merged, every weight is frozen and it
    is put into evaluation mode. Hooks live only while `extract` runs. As a context manager it lets
    go of the model at the end.

    Args:
        model: a PEFT model with one active LoRA adapter (modules: every LoRA factor, and the layers
            saved beside the adapter, the head), or a plain classifier (modules: the weights of the
            linear layers named by `target_modules`, and weights and biases of the head).
        target_modules: last parts of the names of the linear layers to track in a plain
            classifier, such as `["query", "value"]`; None for a PEFT model.
        dtype: what the merged model computes in; None leaves it as it is. Merging is done before
            the cast, so load the model in float32 to keep small adapter updates. Gradients are
            contracted and returned in float32 whatever it is.

    Raises:
        UnsupportedModule: a part of the model whose gradients would not be exact.
        NoTrackedModules: nothing to take gradients of.
        ValueError: `target_modules` given for a PEFT model, or missing for a plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if is_adapted(model):
            if target_modules is not None:
                raise ValueError("target_modules must be None: the adapter names its own modules.")
            merged = merge_adapter(model)
            model, factors, head = merged.model, merged.factors, merged.saved_names
            stack = find_block_stack(model)
        else:
            if not target_modules:
                raise ValueError("target_modules must name layers of a model without an adapter.")
            stack = find_block_stack(model)
            factors, head = {}, tuple(find_head(model, stack))
        model.requires_grad_(requires_grad=False).eval().to(dtype=dtype)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            # a key/value cache would keep every layer's keys for nothing
            config.use_cache = False

        skip_zero_rows(model.get_submodule(f"{stack.name}.{stack.num_blocks - 1}"))
        self._model: nn.Module | None = model
        self.device: torch.device = next(model.parameters()).device
        names = factors or dict.fromkeys(_targets(model, stack, target_modules or ()))
        self._tracked = [
            _Tracked(name, _linear(model, name), *stack.locate(name), factors=factors.get(name))
            for name in names
        ]
        self._tracked += [
            _Tracked(name, linear, None, Part.HEAD, with_bias=linear.bias is not None)
            for name in head
            for linear in [_linear(model, name)]
        ]
        self.modules: tuple[ModuleSpec, ...] = tuple(
            spec for tracked in self._tracked for spec in tracked.modules()
        )
        self.num_parameters: int = sum(spec.num_parameters for spec in self.modules)
        self.groups: dict[str, tuple[int, ...]] = layer_groups(self.modules)

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._model = None
        self._tracked = []

    def __enter__(self) -> Self:
        return self

    def extract(self, inputs: Mapping[str, Tensor], labels_B: Tensor) -> SampleGradients:
        """Take the gradients of every sample's own loss for every module.

        Args:
            inputs: what the model's forward takes, `input_ids` and `attention_mask` [B, S] among
                it, on the model's device.
            labels_B: int64 class indices, on the model's device.

        Returns:
            The batch's gradients; a sample's row depends neither on the batch nor on its padding
            (up to the rounding of float32).

        Raises:
            NonFiniteInfluence: a loss or gradient is NaN or infinite; names the batch positions.
            UnsupportedModule: a tracked layer is used more than once in a pass, or on something
                that is not a batch of samples.
        """
        if self._model is None:
            raise ValueError("the extractor is closed.")
        with torch.enable_grad(), _captured(self._tracked) as captures:
            logits_BC = self._model(**inputs).logits.float()
            loss_B = cross_entropy(logits_BC, labels_B, reduction="none")
            output_gradients = torch.autograd.grad(
                loss_B.sum(),
                [captures[tracked.name].y for tracked in self._tracked],
                allow_unused=True,
                materialize_grads=True,
            )
        mask_BS = inputs["attention_mask"]
        gradients: list[Tensor] = []
        with torch.no_grad():
            for tracked, gradient in zip(self._tracked, output_gradients, strict=True):
                capture = captures.pop(tracked.name)
                _check_use(tracked.name, capture, mask_BS)
                gradients += _contract(tracked, capture.x.float(), gradient.float(), mask_BS)
            squared_norm_MB = torch.stack([_squared_norm(gradient) for gradient in gradients])
            _check_finite(loss_B, squared_norm_MB)
        return SampleGradients(
            gradients=tuple(gradients),
            squared_norm_MB=squared_norm_MB,
            loss_B=loss_B.detach(),
            logits_BC=logits_BC.detach(),
        )


def _targets(model: nn.Module, stack: BlockStack, targets: Sequence[str]) -> list[str]:
    names = [
        name
        for name, _ in model.named_modules()
        if name.startswith(f"{stack.name}.")
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    if not names:
        known = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.get_submodule(stack.name).named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        raise NoTrackedModules(
            f"no layer of the transformer blocks is named {' or '.join(targets)}; "
            f"the linear layers there are: {', '.join(known)}."
        )
    return names


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise UnsupportedModule(
            f"module '{name}' is a {type(module).__name__}; "
            "only linear layers with unquantised weights are audited."
        )
    return module


@contextmanager
def _captured(tracked_layers: Sequence[_Tracked]) -> Iterator[dict[str, _Capture]]:
    """Capture inputs and outputs of the tracked layers; the hooks are removed in any case."""
    captures: dict[str, _Capture] = {}

    def hook_for(name: str) -> Any:  # noqa: ANN401 - the type of a hook is torch's own business
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if name in captures:
                raise UnsupportedModule(
                    f"module '{name}' is used more than once in a forward pass; "
                    "leave it out of the target modules."
                )
            if not output.requires_grad:
                # nothing below is tracked: the graph starts here, and so ends the backward pass
                output.requires_grad_()
            x = arguments[0].detach()
            captures[name] = _Capture(x, output, _versions(x, output))

        return hook

    with ExitStack() as handles:
        for tracked in tracked_layers:
            handle = tracked.linear.register_forward_hook(hook_for(tracked.name))
            handles.callback(handle.remove)
        yield captures


def _versions(x: Tensor, y: Tensor) -> tuple[int, int]:
    # torch's own count of writes in place, which autograd relies on as well
    return x._version, y._version  # noqa: SLF001


def _check_use(name: str, capture: _Capture, mask_BS: Tensor) -> None:
    if _versions(capture.x, capture.y) != capture.versions:
        raise UnsupportedModule(
            f"the model overwrites the input or output of module '{name}' in place; "
            "leave it out of the target modules."
        )
    leading = tuple(capture.x.shape[:-1])
    if leading not in (tuple(mask_BS.shape), tuple(mask_BS.shape[:1])):
        raise UnsupportedModule(
            f"module '{name}' sees an input of shape {tuple(capture.x.shape)}, which is not "
            f"[batch {mask_BS.shape[0]}, sequence {mask_BS.shape[1]}, features] or "
            "[batch, features]; leave it out of the target modules."
        )


def _contract(
    tracked: _Tracked, x_BSI: Tensor, gradient_BSO: Tensor, mask_BS: Tensor
) -> list[Tensor]:
    """Turn a layer's input and output gradient into per-sample gradients of its tensors."""
    if x_BSI.shape[:-1] == mask_BS.shape:
        mask_BS1 = mask_BS[..., None].to(x_BSI.dtype)
    else:  # after pooling: one position, which is no padding
        x_BSI, gradient_BSO = x_BSI[:, None], gradient_BSO[:, None]
        mask_BS1 = x_BSI.new_ones(len(x_BSI), 1, 1)
    if tracked.factors is None:
        gradient_BSO = gradient_BSO * mask_BS1
        weight_BOI = gradient_BSO.transpose(1, 2) @ x_BSI
        bias_BO = [gradient_BSO.sum(dim=1)] if tracked.with_bias else []
        return [weight_BOI.flatten(1), *bias_BO]
    factors = tracked.factors
    # padding is masked on the rank side, where the tensors are small
    scaled_mask_BS1 = mask_BS1 * factors.scaling
    down_BSR = (x_BSI @ factors.a_RI.T) * scaled_mask_BS1
    up_BSR = (gradient_BSO @ factors.b_OR) * scaled_mask_BS1
    a_BRI = up_BSR.transpose(1, 2) @ x_BSI
    # a product with R rows is faster than one with R columns
    b_BRO = down_BSR.transpose(1, 2) @ gradient_BSO
    return [a_BRI.flatten(1), b_BRO.transpose(1, 2).flatten(1)]


def _squared_norm(gradient_Bd: Tensor) -> Tensor:
    squared_norm_B: Tensor = torch.linalg.vecdot(gradient_Bd, gradient_Bd)
    return squared_norm_B


def _check_finite(loss_B: Tensor, squared_norm_MB: Tensor) -> None:
    for what, value_B in (
        ("the loss", loss_B),
        ("a gradient, or its squared length,", squared_norm_MB.sum(dim=0)),
    ):
        broken_B = ~torch.isfinite(value_B)
        if bool(broken_B.any()):
            raise NonFiniteInfluence(what, positions=broken_B.nonzero().flatten().tolist())
