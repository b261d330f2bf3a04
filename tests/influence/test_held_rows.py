"""Rows that come batch by batch are held as if they had come at once."""

import pytest
import torch

from tests.influence.row_forms import EVERY_FORM, Build, build_factored, written_out
from workers.influence.rows import GradientRows, HeldRows


@EVERY_FORM
def test_rows_that_come_batch_by_batch_are_held_in_the_order_of_the_samples(build: Build) -> None:
    held = HeldRows(7)
    batches = {(6, 2, 4): build(3, seed=1), (1,): build(1, seed=2), (0, 5, 3): build(3, seed=3)}
    for indices, part in batches.items():
        held.put(torch.tensor(indices), part)
    rows = held.rows()
    assert type(rows) is type(build(1))
    assert (len(rows), rows.num_parameters) == (7, build(1).num_parameters)
    for indices, part in batches.items():
        torch.testing.assert_close(written_out(rows)[[*indices]], written_out(part))


@pytest.mark.parametrize("lengths", [(5, 3), (3, 5)])
def test_batches_of_other_lengths_are_held_with_room_for_the_longest(
    lengths: tuple[int, int],
) -> None:
    held, parts = HeldRows(6), [build_factored(3, seed=n, num_tokens=n) for n in lengths]
    for start, part in zip((0, 3), parts, strict=True):
        held.put(torch.arange(start, start + 3), part)
    expected = GradientRows.concatenate(parts)
    assert all(map(torch.equal, held.rows().tensors().values(), expected.tensors().values()))
