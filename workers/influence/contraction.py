"""From the uses of a module in one batch to its gradient rows, in the form that is kept.

Shapes: B batch, S positions, I/O input and output features, r/c rows and columns of a matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from workers.influence.capture import Use
from workers.influence.kronecker import MAX_SIDE, KroneckerSums
from workers.influence.layers import Form, ModuleSpec, Part
from workers.influence.module_kinds import (
    Embedding,
    Kind,
    Linear,
    Outer,
    Term,
    TokenGradients,
)
from workers.influence.projection import ModuleProjection, Projection
from workers.influence.rows import (
    DenseRows,
    FactoredRows,
    GradientRows,
    SparseRows,
    sparse_rows,
)

_POOLED_LENGTH = 2
"""Factors of one position are kept where they are four times smaller than the product: one matrix
product is faster than two."""


@dataclass(frozen=True, slots=True)
class FormChoice:
    """What decides the form in which a weight matrix's gradients are kept.

    Factors come first: where they are cheap, they are exact.

    Attributes:
        projection: how far the other big matrices are projected; None keeps all gradients exact.
        longest: most tokens of a sample; None if unknown.
        needs_dense: rows will be wanted written out.
        prefers_small: factors are kept where they are smaller than the matrix, not only where
            their dot products are cheaper.
    """

    projection: Projection | None = None
    longest: int | None = None
    needs_dense: bool = False
    prefers_small: bool = False

    def form(self, num_rows: int, num_columns: int, *, is_pooled: bool) -> Form:
        """Choose for a matrix; `is_pooled` says that its layer sees one position of a sample."""
        num_entries = num_rows * num_columns
        length = _POOLED_LENGTH if is_pooled else self.longest
        power = 1 if self.prefers_small and not is_pooled else 2
        if (
            not self.needs_dense
            and length is not None
            and length**power * (num_rows + num_columns) <= num_entries
        ):
            return "factored"
        if self.projection is not None and num_entries > self.projection.dimension**2:
            return "projected"
        return "dense"


@dataclass(frozen=True, slots=True)
class TrackedModule:
    """A module whose output is hooked, and the tensors that it gives gradients of."""

    name: str
    module: nn.Module
    kind: Kind
    is_pooled: bool
    specs: tuple[ModuleSpec, ...]
    projections: tuple[ModuleProjection | None, ...]
    device: torch.device

    @classmethod
    def make(
        cls,
        name: str,
        module: nn.Module,
        kind: Kind,
        *,
        layer: int | None,
        part: Part,
        choice: FormChoice,
        is_pooled: bool,
        device: torch.device,
    ) -> "TrackedModule":
        """Choose the forms of the module's tensors."""
        specs: list[ModuleSpec] = []
        projections: list[ModuleProjection | None] = []
        for suffix, shape in kind.shapes().items():
            spec = ModuleSpec(f"{name}.{suffix}", layer, part, math.prod(shape), shape)
            projection = None
            if isinstance(kind, Embedding):
                spec = replace(spec, form="sparse")
            elif isinstance(kind, Linear) and suffix == "weight":
                num_rows, num_columns = shape
                spec = replace(spec, form=choice.form(num_rows, num_columns, is_pooled=is_pooled))
                if spec.form == "projected" and choice.projection is not None:
                    projection = ModuleProjection(
                        choice.projection,
                        name=spec.name,
                        in_features=num_columns,
                        out_features=num_rows,
                        device=device,
                    )
                    size = math.prod(projection.shape)
                    spec = replace(spec, num_parameters=size, shape=projection.shape)
            specs.append(spec)
            projections.append(projection)
        return cls(name, module, kind, is_pooled, tuple(specs), tuple(projections), device)

    def contract(
        self, uses: Sequence[Use], *, batch_size: int, kronecker: bool
    ) -> list[tuple[GradientRows, KroneckerSums | None]]:
        """Return rows, and for matrices the sums over tokens if wanted, of every tensor.

        A matrix with a side beyond `MAX_SIDE` has no sums. Several uses add up. A module that the
        pass did not use has gradient zero.
        """
        terms = [self.kind.terms(use) for use in uses]
        masks = [use.mask_BS1 for use in uses]
        result: list[tuple[GradientRows, KroneckerSums | None]] = []
        for index, (spec, projection) in enumerate(zip(self.specs, self.projections, strict=True)):
            parts = [_project(term[index], projection) for term in terms]
            rows = _rows(spec, parts) if parts else self._zero_rows(spec, batch_size)
            sums = None
            if kronecker and _has_sums(spec):
                sums = _kronecker(parts, masks) if parts else KroneckerSums.zeros(*spec.shape)
            result.append((rows, sums))
        return result

    def _zero_rows(self, spec: ModuleSpec, batch_size: int) -> GradientRows:
        zeros_B1 = torch.zeros(batch_size, 1, device=self.device)
        if spec.form == "factored":
            num_rows, num_columns = spec.shape
            return FactoredRows(
                zeros_B1[..., None].expand(-1, -1, num_columns),
                zeros_B1[..., None].expand(-1, -1, num_rows),
            )
        if spec.form == "sparse":
            vocabulary, width = spec.shape
            ids_B1 = zeros_B1.long()
            gradient_B1H = zeros_B1[..., None].expand(-1, -1, width)
            return sparse_rows(ids_B1, gradient_B1H, ids_B1, vocabulary=vocabulary)
        return DenseRows(zeros_B1.expand(-1, spec.num_parameters))


def _project(term: Term, projection: ModuleProjection | None) -> Term:
    if projection is None or not isinstance(term, Outer):
        return term
    column_BSK, row_BSK = projection.project_tokens(term.column_BSc, term.row_BSr)
    return Outer(row_BSK, column_BSK, term.hook_scale)


def _rows(spec: ModuleSpec, parts: Sequence[Term]) -> GradientRows:
    outers = [part for part in parts if isinstance(part, Outer)]
    if spec.form == "factored":
        return FactoredRows(
            torch.cat([outer.column_BSc for outer in outers], dim=1),
            torch.cat([outer.row_BSr for outer in outers], dim=1),
        )
    tokens = [part for part in parts if isinstance(part, TokenGradients)]
    if tokens:
        return sparse_rows(
            torch.cat([each.input_ids_BS for each in tokens], dim=1),
            torch.cat([each.gradient_BSH for each in tokens], dim=1),
            torch.cat([each.mask_BS for each in tokens], dim=1),
            vocabulary=spec.shape[0],
        )
    dense = [part.dense() if isinstance(part, Outer) else part for part in parts]
    plain = [each for each in dense if isinstance(each, Tensor)]
    total_Bd = plain[0]
    for gradient_Bd in plain[1:]:
        total_Bd = total_Bd + gradient_Bd
    return DenseRows(total_Bd)


def _has_sums(spec: ModuleSpec) -> bool:
    is_matrix = len(spec.shape) == 2 and spec.form != "sparse"  # noqa: PLR2004
    return is_matrix and max(spec.shape) <= MAX_SIDE


def _kronecker(parts: Sequence[Term], masks: Sequence[Tensor]) -> KroneckerSums | None:
    total: KroneckerSums | None = None
    for part, mask_BS1 in zip(parts, masks, strict=True):
        if not isinstance(part, Outer):
            return None
        column_BSc = part.column_BSc * (mask_BS1 / part.hook_scale)
        row_BSr = part.row_BSr * (mask_BS1 * part.hook_scale)
        sums = KroneckerSums.of_tokens(
            column_BSc.flatten(0, 1), row_BSr.flatten(0, 1), num_tokens=int(mask_BS1.sum())
        )
        total = sums if total is None else total.add_(sums)
    return total


def without(rows: GradientRows, broken_B: Tensor) -> GradientRows:
    """Set the rows of the samples that are marked to zero, whatever they hold."""
    if isinstance(rows, DenseRows):
        return DenseRows(rows.gradient_Nd.masked_fill(broken_B[:, None], 0))
    broken_B11 = broken_B[:, None, None]
    if isinstance(rows, FactoredRows):
        return FactoredRows(
            rows.x_NSI.masked_fill(broken_B11, 0), rows.g_NSO.masked_fill(broken_B11, 0)
        )
    assert isinstance(rows, SparseRows)  # noqa: S101 - there is no fourth kind
    value_PH = rows.value_PH.masked_fill(broken_B[rows.sample_P][:, None], 0)
    return replace(rows, value_PH=value_PH)
