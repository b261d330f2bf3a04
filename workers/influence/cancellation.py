"""Cancellation: how much of the training samples' gradients cancels out in their sum.

C = Σ_i ‖g_i‖ / ‖Σ_i g_i‖, 1 where all gradients point the same way. METHOD section 4: the older
criterion for choosing layers, to compare with.

Shapes: T training samples, M modules, d entries of a module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Both forms of a group's cancellation; None where the gradients add up to zero.

    Attributes:
        l1: of sums of absolute entries.
        l2: of lengths, a sample's over the whole group: the root of its sum of squares.
    """

    l1: float | None
    l2: float | None


class CancellationSums:
    """Adds up what the cancellation of groups is made of, over samples and modules.

    Args:
        groups: for every group the modules in it.
        num_modules: M.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]], *, num_modules: int) -> None:
        self._groups = {name: sorted(set(modules)) for name, modules in groups.items()}
        self._absolute_M = torch.zeros(num_modules, dtype=torch.float64)
        self._length = dict.fromkeys(groups, 0.0)
        self._total_l1_M = torch.zeros(num_modules, dtype=torch.float64)
        self._total_squared_M = torch.zeros(num_modules, dtype=torch.float64)

    def add_samples(self, *, absolute_sum_M: Tensor, squared_norm_MT: Tensor) -> None:
        """Add some training samples.

        Args:
            absolute_sum_M: Σ_i ‖g_i‖₁ over these samples, by module.
            squared_norm_MT: ‖g_i‖² by module.
        """
        self._absolute_M += absolute_sum_M.double()
        for name, modules in self._groups.items():
            squared_T = torch.zeros(squared_norm_MT.shape[1], dtype=torch.float64)
            for module in modules:
                squared_T += squared_norm_MT[module]
            self._length[name] += float(squared_T.sqrt().sum())

    def set_total(self, module: int, total_d: Tensor) -> None:
        """Set Σ_i g_i of a module, over ALL training samples; of any shape."""
        total_d = total_d.double()
        self._total_l1_M[module] = total_d.abs().sum()
        self._total_squared_M[module] = total_d.square().sum()

    def result(self) -> dict[str, Cancellation]:
        """Return the cancellation of every group.

        To six digits: the last bits of a sum depend on how the samples were cut into shards.
        """
        return {
            name: Cancellation(
                l1=_ratio(self._sum(self._absolute_M, name), self._sum(self._total_l1_M, name)),
                l2=_ratio(self._length[name], self._sum(self._total_squared_M, name) ** 0.5),
            )
            for name in self._groups
        }

    def _sum(self, value_M: Tensor, group: str) -> float:
        return sum(float(value_M[module]) for module in self._groups[group])


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(f"{numerator / denominator:.{_DIGITS}g}") if denominator > 0 else None
