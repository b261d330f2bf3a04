"""A file that is written as its shard is computed is the one that would be written at the end."""

from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from workers.pipeline import tensor_writer
from workers.pipeline.artifacts import TensorFile
from workers.pipeline.tensor_writer import TensorWriter, writing_influence

CUTS = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def influence_of(num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return torch.randn(3, 4, num_samples, generator=generator)


@settings(deadline=None)  # a disk takes its time to flush
@given(
    sizes=CUTS,
    is_left_out=st.lists(st.booleans(), min_size=72, max_size=72),
    part_bytes=st.integers(1, 2000),
    redone=st.integers(0, 11),
    by_module=st.booleans(),
)
def test_influence_comes_out_the_same_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    is_left_out: list[bool],
    part_bytes: int,
    redone: int,
    *,
    by_module: bool,
) -> None:
    """Whole batches, batches with gaps, batches begun twice; by batch or by module; any part."""
    path = tmp_path_factory.mktemp("influence") / "influence.safetensors"
    influence_MVT = influence_of(sum(sizes))
    left_out_T = torch.tensor(is_left_out)[: sum(sizes)]
    batches = []
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        batch = slice(start, start + size)
        kept = (~left_out_T[batch]).nonzero().flatten() + start
        positions = batch if len(kept) == size else kept
        if len(kept):
            batches += [positions] * (2 if number == redone else 1)
    calls = [(module, batch) for batch in batches for module in range(3)]
    if by_module:
        calls.sort(key=lambda call: call[0])
    with (
        patch.object(tensor_writer, "PART_BYTES", part_bytes),
        writing_influence(path, (3, 4, sum(sizes))) as writer,
    ):
        for module, positions in calls:
            writer.put(module, positions, influence_MVT[module][:, positions])
    expected = influence_MVT.masked_fill(left_out_T, 0)
    assert torch.equal(load_file(path)["influence"], expected)
    assert torch.equal(TensorFile(path).rows("influence"), expected)


def test_tensors_of_all_kinds_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    like = {
        "is_kept": torch.tensor([True, False, True]),
        "index": torch.tensor([2, 0, 1]),
        "gradient": torch.randn(3, 5),
    }
    path = tmp_path / "tensors.safetensors"
    with closing(TensorWriter(path, like)) as file:
        for name, tensor in like.items():
            file.put_rows(name, torch.tensor([0, 2]), tensor[[0, 2]])
            file.put_rows(name, slice(1, 2), tensor[1:2])
    assert all(torch.equal(tensor, like[name]) for name, tensor in load_file(path).items())


def test_a_shard_without_samples_has_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "influence.safetensors"
    with writing_influence(path, (2, 3, 0), index=torch.zeros(0, dtype=torch.int64)):
        pass
    assert load_file(path)["influence"].shape == (2, 3, 0)


def test_a_shard_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "influence.safetensors"

    def fail() -> None:
        with writing_influence(path, (1, 1, 4)) as writer:
            writer.put(0, slice(0, 2), torch.ones(1, 2))
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_else_is_in_the_file_is_written_as_it_is_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "influence.safetensors"
    is_finite_T = torch.ones(2, dtype=torch.bool)
    with writing_influence(path, (1, 1, 2), is_finite=is_finite_T):
        is_finite_T[1] = False
    assert load_file(path)["is_finite"].tolist() == [True, False]
    assert load_file(path)["influence"].tolist() == [[[0.0, 0.0]]]
