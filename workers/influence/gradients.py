"""Per-sample gradients of all tracked modules in one batched forward and backward pass.

Every weight is frozen and autograd is asked only for the gradients of the tracked modules' outputs;
the gradients of the parameters follow from the captured inputs and output gradients, see
`workers.influence.module_kinds`.

Shapes: B batch, S sequence, M modules, L blocks, H hidden size.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from workers.influence.capture import captured, lay_out
from workers.influence.contraction import FormChoice, TrackedModule, without
from workers.influence.frozen_linear import FrozenLayers
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ModuleSpec, device_of, find_block_stack, layer_groups
from workers.influence.narrowing import NarrowLayers
from workers.influence.objectives import Classification, Objective, Outcome
from workers.influence.projection import Projection
from workers.influence.reading import hidden_states, probe, reading_position
from workers.influence.recomputing import recompute_blocks
from workers.influence.rows import GradientRows
from workers.influence.tracking import find_sites, merge


@dataclass(frozen=True, slots=True)
class SampleGradients:
    """What one batch gives.

    Attributes:
        gradients: by module; zero for samples that are not finite.
        squared_norm_MB: float32 [M, B], the squared length of every gradient.
        loss_B: float32, every sample's own loss, whatever it is.
        outcome: what the objective says of the batch.
        is_finite_B: bool; whether the sample's loss, all its gradients and their squared lengths
            are finite.
        hidden_LBH: float32, the output of every block at the sample's reading position; None unless
            asked for.
        kronecker: by module, the sums over the batch's tokens without those of samples that are not
            finite, on the CPU; None for what is no matrix or has a side beyond `MAX_SIDE`, and
            everywhere unless asked for.
    """

    gradients: tuple[GradientRows, ...]
    squared_norm_MB: Tensor
    loss_B: Tensor
    outcome: Outcome
    is_finite_B: Tensor
    hidden_LBH: Tensor | None
    kronecker: tuple[KroneckerSums | None, ...]


class GradientExtractor(AbstractContextManager["GradientExtractor"]):
    """Takes per-sample gradients of a model in evaluation mode.

    The extractor owns the model from now on: its adapter is merged, every weight is frozen and it
    is put into evaluation mode. Hooks live only while `extract` runs. As a context manager it lets
    go of the model at the end.

    A module that a forward pass uses several times gets the sum over its uses. Where a head shares
    its weight with the word embedding, each of the two modules takes its own term of the gradient
    only: the embedding that of the looked-up rows, the head that of its matrix product.

    Args:
        model: a PEFT model with one active LoRA or DoRA adapter (modules: every factor, and the
            modules saved beside the adapter, such as the head), or a plain model (modules: what
            `target_modules` names, and weights and biases of a classifier's head).
        objective: makes the loss; None is classification.
        target_modules: for a plain model, last parts of names inside the blocks, such as
            `["query", "value"]`, `all-linear`, or names outside, such as `lm_head`; of linear
            layers inside the blocks only the weight is tracked, of everything else all tensors.
            None for a PEFT model.
        dtype: what the merged model computes in; None leaves it as it is. Merging is done before
            the cast, so load the model in float32 to keep small adapter updates. Gradients are
            contracted and returned in float32 whatever it is.
        projection: how big weight matrices are projected where factors are no cheaper; None keeps
            everything exact.
        longest: tokens of the longest sample of the audit; lets big matrices be kept as factors
            where that makes dot products cheaper.
        needs_dense: rows will be wanted written out, so that nothing is kept as factors.
        word_embeddings: track the word embedding too. Without it a word embedding is left out even
            where it was trained.
        hidden_states: give the blocks' hidden states too.
        kronecker: give the Kronecker sums of every matrix too.
        recompute: keep the inputs of the blocks alone and compute the rest again on the way back.

    Attributes:
        modules: what is tracked, in the order of `SampleGradients.gradients`; the word embedding,
            the only sparse one, is the last.
        num_blocks: L.
        num_parameters: entries of all gradient rows together, without the word embedding.
        groups: positions in `modules` by layer group.
        is_causal: whether a sample is read at its last token, or else at its first.

    Raises:
        UnsupportedModule: a part of the model whose gradients would not be exact.
        NoTrackedModules: nothing to take gradients of.
        ValueError: `target_modules` given for a PEFT model, or missing for a plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective | None = None,
        target_modules: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        projection: Projection | None = None,
        longest: int | None = None,
        needs_dense: bool = False,
        word_embeddings: bool = False,
        hidden_states: bool = False,
        kronecker: bool = False,
        recompute: bool = False,
    ) -> None:
        self._objective: Objective = Classification() if objective is None else objective
        adapted = merge(model, target_modules)
        model = adapted.model
        model.requires_grad_(requires_grad=False).eval()
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            # a key/value cache would keep every layer's keys for nothing
            config.use_cache = False
        self._stack = find_block_stack(model)
        self._sites = find_sites(
            adapted,
            self._stack,
            target_modules or (),
            with_head=isinstance(self._objective, Classification),
            with_word_embedding=word_embeddings,
        )
        self._probe = probe(
            model, block_name=self._stack.block_names[-1], names=[site.name for site in self._sites]
        )
        if adapted.is_merged:
            model.to(dtype=dtype)
        last_block = model.get_submodule(self._stack.block_names[-1])
        self._layers = FrozenLayers(model, last_block=last_block)
        self._model: nn.Module | None = model
        self.device: torch.device = device_of(model)
        self._dtype = next(model.parameters()).dtype
        self.num_blocks: int = self._stack.num_blocks
        self.is_causal: bool = self._probe.is_causal
        self._narrow: NarrowLayers | None = None
        if isinstance(self._objective, Classification) and not self.is_causal:
            self._narrow = NarrowLayers(model, last_block)
        if recompute:
            recompute_blocks(model, self._stack.block_names)
        self._track(
            FormChoice(projection=projection, longest=longest, needs_dense=needs_dense),
            hidden_states=hidden_states,
            kronecker=kronecker,
        )

    def _track(self, choice: FormChoice, *, hidden_states: bool, kronecker: bool) -> Self:
        self._choice, self._hidden_states, self._kronecker = choice, hidden_states, kronecker
        self._tracked = [
            TrackedModule.make(
                site.name,
                site.module,
                site.kind,
                layer=site.layer,
                part=site.part,
                choice=choice,
                is_pooled=site.name in self._probe.pooled_names,
                device=self.device,
            )
            for site in self._sites
        ]
        self.modules: tuple[ModuleSpec, ...] = tuple(
            spec for tracked in self._tracked for spec in tracked.specs
        )
        self.num_parameters: int = sum(
            spec.num_parameters for spec in self.modules if spec.form != "sparse"
        )
        self.groups: dict[str, tuple[int, ...]] = layer_groups(self.modules)
        return self

    def restrict(self, chosen: Collection[int]) -> None:
        """Take gradients of some modules alone from now on: the pass back ends at the lowest.

        Args:
            chosen: positions in `modules`; what belongs to the same part of the model comes along.
        """
        names = {spec.name for place, spec in enumerate(self.modules) if place in chosen}
        groups = {
            group: [self.modules[place].name for place in members]
            for group, members in self.groups.items()
        }
        self._sites = [
            site
            for site, tracked in zip(self._sites, self._tracked, strict=True)
            if any(spec.name in names for spec in tracked.specs)
        ]
        self._track(self._choice, hidden_states=self._hidden_states, kronecker=self._kronecker)
        # a group of which something is missing is none any more
        places = {spec.name: place for place, spec in enumerate(self.modules)}
        self.groups = {
            group: tuple(places[name] for name in members)
            for group, members in groups.items()
            if all(name in places for name in members)
        }

    def exact(self) -> "GradientExtractor":
        """Return an extractor for the same modules of the same model without any projection.

        It keeps big matrices as factors wherever that is smaller, and gives neither hidden states
        nor Kronecker sums.
        """
        choice = replace(self._choice, projection=None, needs_dense=False, prefers_small=True)
        return copy.copy(self)._track(choice, hidden_states=False, kronecker=False)  # noqa: SLF001 - ours

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._model = None
        self._tracked, self._sites = [], []

    def __enter__(self) -> Self:
        return self

    def extract(self, inputs: Mapping[str, Tensor], targets: Tensor) -> SampleGradients:
        """Take the gradients of every sample's own loss for every module.

        Args:
            inputs: what the model's forward takes, `input_ids` and `attention_mask` [B, S] among
                it, on the model's device.
            targets: what the objective takes, one row for every sample, on the model's device.

        Returns:
            The batch's gradients; a sample's row depends neither on the batch nor on its padding
            (up to the rounding of float32).

        Raises:
            UnsupportedModule: a tracked module is used on something that is not a batch of samples,
                or its values are overwritten.
        """
        if self._model is None:
            raise ValueError("the extractor is closed.")
        mask_BS = inputs["attention_mask"]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self._narrow is not None and not self._kronecker:
                # sums over all tokens would see what narrow layers leave out
                stack.enter_context(self._narrow.in_use())
            captures = stack.enter_context(captured({t.name: t.module for t in self._tracked}))
            states = stack.enter_context(hidden_states(self._blocks(), self._position(mask_BS)))
            outcome = self._objective.run(self._model, inputs, targets)
            outputs = [capture.y for tracked in self._tracked for capture in captures[tracked.name]]
            scale_B = self._loss_scale(outcome.loss_B.detach())
            gradients = iter(_output_gradients(outcome.loss_B, outputs, scale_B))
        rows: list[GradientRows] = []
        kronecker: list[KroneckerSums | None] = []
        with torch.no_grad():
            for tracked in self._tracked:
                uses = [
                    lay_out(
                        tracked.name,
                        capture,
                        next(gradients),
                        mask_BS,
                        is_pooled=tracked.is_pooled,
                        scale_B=scale_B,
                    )
                    for capture in captures.pop(tracked.name)
                ]
                for module_rows, sums in tracked.contract(
                    uses, batch_size=len(mask_BS), kronecker=self._kronecker
                ):
                    rows.append(module_rows)
                    kronecker.append(sums)
            squared_norm_MB = torch.stack([module_rows.squared_norm() for module_rows in rows])
        loss_B = outcome.loss_B.detach().float()
        result = SampleGradients(
            gradients=tuple(rows),
            squared_norm_MB=squared_norm_MB,
            loss_B=loss_B,
            outcome=outcome.detach(),
            is_finite_B=torch.isfinite(loss_B) & torch.isfinite(squared_norm_MB.sum(dim=0)),
            hidden_LBH=torch.stack(list(states.values())) if self._hidden_states else None,
            kronecker=tuple(kronecker),
        )
        if bool(result.is_finite_B.all()):
            return result
        return self._without_broken(result, inputs, targets)

    @torch.no_grad()
    def screen(self, inputs: Mapping[str, Tensor], targets: Tensor) -> SampleGradients:
        """Run the model forwards only, with products in bfloat16: three times as fast as `extract`.

        For telling which samples are worth their gradients. Losses are right to about 1 %.

        Args:
            inputs: what the model's forward takes, as for `extract`.
            targets: what the objective takes, likewise.

        Returns:
            What `extract` gives, without gradients and Kronecker sums; all lengths are 0.
        """
        if self._model is None:
            raise ValueError("the extractor is closed.")
        with ExitStack() as stack:
            stack.enter_context(self._layers.in_bfloat16())
            if self._narrow is not None:
                stack.enter_context(self._narrow.in_use())
            position_B = self._position(inputs["attention_mask"])
            states = stack.enter_context(hidden_states(self._blocks(), position_B))
            outcome = self._objective.run(self._model, inputs, targets).detach()
        loss_B = outcome.loss_B.float()
        return SampleGradients(
            gradients=(),
            squared_norm_MB=loss_B.new_zeros(len(self.modules), len(loss_B)),
            loss_B=loss_B,
            outcome=outcome,
            is_finite_B=torch.isfinite(loss_B),
            hidden_LBH=torch.stack(list(states.values())) if self._hidden_states else None,
            kronecker=(),
        )

    def _loss_scale(self, loss_B: Tensor) -> Tensor | None:
        """Return powers of two that keep the gradients of a float16 model from vanishing.

        The length of the gradient by the logits is near 1 - exp(-loss): it is brought to some 16.
        """
        if self._dtype is not torch.float16:
            return None
        expected_B = (-torch.expm1(-loss_B)).clamp(min=2.0**-20)
        return torch.exp2((16 / expected_B).log2().round())

    def _blocks(self) -> dict[str, nn.Module]:
        if not self._hidden_states or self._model is None:
            return {}
        return {name: self._model.get_submodule(name) for name in self._stack.block_names}

    def _position(self, mask_BS: Tensor) -> Tensor:
        return reading_position(mask_BS, is_causal=self.is_causal)

    def _without_broken(
        self, result: SampleGradients, inputs: Mapping[str, Tensor], targets: Tensor
    ) -> SampleGradients:
        """Set everything of the samples that are not finite to zero."""
        broken_B = ~result.is_finite_B
        kronecker = result.kronecker
        if self._kronecker:
            kept_B = result.is_finite_B.nonzero().flatten()
            if len(kept_B) > 0:
                kept = {name: value[kept_B] for name, value in inputs.items()}
                kronecker = self.extract(kept, targets[kept_B]).kronecker
            else:
                kronecker = tuple(
                    None
                    if sums is None
                    else KroneckerSums.zeros(len(sums.output_OO), len(sums.input_II))
                    for sums in kronecker
                )
        hidden_LBH = result.hidden_LBH
        if hidden_LBH is not None:
            hidden_LBH = hidden_LBH.masked_fill(broken_B[None, :, None], 0)
        return replace(
            result,
            gradients=tuple(without(rows, broken_B) for rows in result.gradients),
            squared_norm_MB=result.squared_norm_MB.masked_fill(broken_B, 0),
            hidden_LBH=hidden_LBH,
            kronecker=kronecker,
        )


def _output_gradients(
    loss_B: Tensor, outputs: Sequence[Tensor], scale_B: Tensor | None
) -> tuple[Tensor, ...]:
    if not outputs:
        return ()
    scale_B = torch.ones_like(loss_B) if scale_B is None else scale_B
    gradients: tuple[Tensor, ...] = torch.autograd.grad(
        loss_B, outputs, scale_B, allow_unused=True, materialize_grads=True
    )
    return gradients
