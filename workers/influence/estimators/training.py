"""The gradients of all training samples by one module, as a stream that can be read again.

Shapes: B a block of training samples, d entries of the module.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from workers.influence.errors import InsufficientMemory
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ModuleSpec

MAX_GRAM_BYTES = 4 * 10**9

_FLOAT64 = 8
_PANEL = 512
_WIDE_ENTRIES = 2**20
_MIN_WIDE_ROWS = 64
_MAX_WIDE_ROWS = 4096


def _do_nothing() -> None:
    pass


def check_gram_size(spec: ModuleSpec, *, max_bytes: int = MAX_GRAM_BYTES) -> None:
    """Check that a [d, d] matrix of a module can be held.

    Raises:
        InsufficientMemory: it takes more than `max_bytes`; says what to change.
    """
    if _gram_bytes(spec) > max_bytes:
        raise InsufficientMemory(
            f"module '{spec.name}' has {spec.num_parameters:,} parameters, and its exact curvature "
            f"takes {_gram_bytes(spec) / 1e9:.1f} GB (at most {max_bytes / 1e9:.1f} GB). Use "
            "adapters of a lower rank, a smaller projection dimension, or the estimator datainf or "
            "ekfac."
        )


def _gram_bytes(spec: ModuleSpec) -> int:
    return _FLOAT64 * spec.num_parameters**2


@dataclass(eq=False)
class TrainingGradients:
    """One module's gradients g_k of ALL training samples, and what is known of them.

    Attributes:
        num_samples: n, how many samples count; rows of zeros beside them change nothing.
        mean_squared_norm: mean of ‖g_k‖² over them.
        spec: the module.
        kronecker: the sums that EK-FAC makes the eigenbasis of; None where there are none.
        blocks: gives a fresh iterator over the gradients, float32 [B, d], in a fixed order.
        grown_from: where these are the gradients of another set with more at the end, that set
            and what gives an iterator over the rest: its Gram matrix is taken over and added to.
        max_gram_bytes: how much one [d, d] matrix may take.
        keep_alive: called often while an estimator works, whatever the blocks do: in every step of
            an iteration, between the panels of a large product, before and after a decomposition.
            What it raises ends the work.
        silence: gives the context of a single step that takes long and cannot be interrupted: a
            decomposition, or the solution of a triangular system.
    """

    num_samples: int
    mean_squared_norm: float
    spec: ModuleSpec
    kronecker: KroneckerSums | None
    blocks: Callable[[], Iterator[Tensor]] = field(repr=False)
    max_gram_bytes: int = MAX_GRAM_BYTES
    keep_alive: Callable[[], None] = field(default=_do_nothing, repr=False, kw_only=True)
    silence: Callable[[], AbstractContextManager[None]] = field(
        default=nullcontext, repr=False, kw_only=True
    )
    grown_from: "tuple[TrainingGradients, Callable[[], Iterator[Tensor]]] | None" = field(
        default=None, repr=False, kw_only=True
    )

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Hold the context of one step within which `keep_alive` cannot be called."""
        self.keep_alive()
        with self.silence():
            yield
        self.keep_alive()

    @property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of GᵀG/n, which is mean ‖g_k‖² / d."""
        return self.mean_squared_norm / self.spec.num_parameters

    def wide_blocks(self) -> Iterator[Tensor]:
        """Iterate over the same rows in float64, in blocks that are worth a matrix product."""
        return self._widened(self.blocks())

    def _widened(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        wide_rows = max(_MIN_WIDE_ROWS, _WIDE_ENTRIES // self.spec.num_parameters)
        # their products with the validation samples are as long: a bias of two entries has no end
        wide_rows = min(_MAX_WIDE_ROWS, wide_rows)
        waiting: list[Tensor] = []
        num_waiting = 0
        for block_Bd in blocks:
            waiting.append(block_Bd.double())
            num_waiting += len(block_Bd)
            if num_waiting >= wide_rows:
                yield torch.cat(waiting)
                waiting, num_waiting = [], 0
        if waiting:
            yield torch.cat(waiting)

    @property
    def fits_gram(self) -> bool:
        """Whether `gram` is small enough to be held."""
        return _gram_bytes(self.spec) <= self.max_gram_bytes

    def gram(self) -> Tensor:
        """Return GᵀG, float64 [d, d], summed in one pass and kept.

        Raises:
            InsufficientMemory: it is larger than `max_gram_bytes`.
        """
        check_gram_size(self.spec, max_bytes=self.max_gram_bytes)
        return self._gram

    def take_gram(self) -> Tensor:
        """Return the same for the caller to change, and keep no second matrix of that size."""
        gram_dd = self.gram()
        del self._gram
        return gram_dd

    @cached_property
    def _gram(self) -> Tensor:
        d = self.spec.num_parameters
        gram_dd: Tensor | None = None
        blocks = self.blocks
        if self.grown_from is not None:
            earlier, blocks = self.grown_from
            gram_dd = earlier.take_gram()
        for block_Bd in self._widened(blocks()):
            if gram_dd is None:
                gram_dd = block_Bd.new_zeros(d, d)
            # the panels on and above the diagonal: half of a symmetric product
            for start in range(0, d, _PANEL):
                self.keep_alive()
                gram_dd[start : start + _PANEL, start:].addmm_(
                    block_Bd[:, start : start + _PANEL].T, block_Bd[:, start:]
                )
        if gram_dd is None:
            return torch.zeros(d, d, dtype=torch.float64)
        for start in range(0, d, _PANEL):
            self.keep_alive()
            stop = start + _PANEL
            gram_dd[stop:, start:stop] = gram_dd[start:stop, stop:].T
        return gram_dd
