"""Which columns a score is made of: a layer group, all or only some validation samples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def lower_half(loss_V: Tensor) -> Tensor:
    """Return a bool for each sample, True for the half with the lower loss, ties by index.

    What `correct_only` keeps where no prediction is right or wrong: of a causal language model. The
    median of an odd number is among them.
    """
    is_lower_V = torch.zeros(len(loss_V), dtype=torch.bool)
    is_lower_V[loss_V.argsort(stable=True)[: (len(loss_V) + 1) // 2]] = True
    return is_lower_V


class ColumnChoice:
    """The validation samples that `correct_only` keeps, and the modules of every group.

    Attributes:
        groups: for every group the modules in it, ascending.
        is_correct_V: bool over ALL validation samples, on the device of the influence.
        fell_back: whether there is no sample that `correct_only` could keep, so that all count.

    Raises:
        ValueError: a group has no modules.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        is_correct_V: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        if empty := [name for name, modules in groups.items() if not modules]:
            raise ValueError(f"groups without modules: {', '.join(empty)}.")
        self.groups = {name: tuple(sorted(set(modules))) for name, modules in groups.items()}
        self.is_correct_V = is_correct_V.to(device=device, dtype=torch.bool)
        self.fell_back: bool = not bool(self.is_correct_V.any())

    def uses_correct(self, *, correct_only: bool) -> bool:
        """Return whether fewer than all validation samples count."""
        return correct_only and not self.fell_back and not bool(self.is_correct_V.all())

    def columns(self, group: str, *, correct_only: bool) -> Tensor:
        """Return the positions of the columns, module by module; all modules have V each."""
        num_validation = len(self.is_correct_V)
        column_V = torch.arange(num_validation, device=self.is_correct_V.device)
        if self.uses_correct(correct_only=correct_only):
            column_V = column_V[self.is_correct_V]
        module_M = torch.tensor(self.groups[group], device=column_V.device)
        return (module_M[:, None] * num_validation + column_V).flatten()
