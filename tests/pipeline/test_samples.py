"""Prepared files and tensors on disk, read back piece by piece."""

from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.pipeline.artifacts import TensorFile, atomically, write_tensors
from workers.pipeline.samples import NO_CLASS, SCHEMA, MappedRows, SampleSet, write_samples

CPU = torch.device("cpu")


def write(path: Path, sizes: list[int], *, with_pairs: bool = False) -> SampleSet:
    """Write record batches of some sizes; sample i has the tokens i, i+1, … of length i % 5 + 1."""

    def batches() -> list[pa.RecordBatch]:
        first, made = 0, []
        for size in sizes:
            rows = [
                {
                    "text": f"text {i}",
                    "text_pair": f"pair {i}" if with_pairs else None,
                    "label": i % 3,
                    "is_noisy": None,
                    "input_ids": list(range(i, i + i % 5 + 1)),
                    "token_type_ids": [1] * (i % 5 + 1) if with_pairs else None,
                    "completion_start": None,
                }
                for i in range(first, first + size)
            ]
            made.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            first += size
        return made

    write_samples(path, iter(batches()), tick=lambda _: None)
    return SampleSet(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    data=st.data(),
    with_pairs=st.booleans(),
)
def test_any_samples_in_any_order_come_back_as_they_were_written(
    tmp_path: Path, sizes: list[int], data: st.DataObject, with_pairs: bool
) -> None:
    samples = write(tmp_path / "samples.arrow", sizes, with_pairs=with_pairs)
    assert len(samples) == sum(sizes)
    indices = data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=9))
    texts = samples.texts(torch.tensor(indices))
    assert texts == [(f"text {i}", f"pair {i}" if with_pairs else None) for i in indices]
    inputs, label_B = samples.batch(torch.tensor(indices), pad_id=99, device=CPU)
    assert label_B.tolist() == [i % 3 for i in indices]
    assert ("token_type_ids" in inputs) == with_pairs
    for row, i in enumerate(indices):
        length = i % 5 + 1
        assert inputs["input_ids"][row, :length].tolist() == list(range(i, i + length))
        assert set(inputs["input_ids"][row, length:].tolist()) <= {99}
        assert int(inputs["attention_mask"][row].sum()) == length
        assert int(samples.length_T[i]) == length


def test_completions_are_the_targets_of_a_causal_language_model(tmp_path: Path) -> None:
    rows = [
        {"text": "p", "text_pair": "c", "input_ids": [5, 6, 7, 8], "completion_start": 2},
        {"text": "q", "text_pair": "d", "input_ids": [1, 2], "completion_start": 1},
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    write_samples(tmp_path / "samples.arrow", iter([batch]), tick=lambda _: None)
    samples = SampleSet(tmp_path / "samples.arrow")
    assert samples.has_completions
    assert samples.label_T.tolist() == [NO_CLASS, NO_CLASS]
    assert samples.is_noisy_T is None
    inputs, label_BS = samples.batch(torch.tensor([1, 0]), pad_id=0, device=CPU)
    assert inputs["input_ids"].tolist() == [[1, 2, 0, 0], [5, 6, 7, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert label_BS.tolist() == [[-100, 2, -100, -100], [-100, -100, 7, 8]]
    assert samples.texts(torch.tensor([1])) == [("q", "d")]


def test_reading_a_batch_does_not_copy_the_whole_set(tmp_path: Path) -> None:
    """The memory of a batch is that of its rows, however many rows there are."""
    write(tmp_path / "samples.arrow", [512] * 40)
    samples = MappedRows(tmp_path / "samples.arrow")
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for start in range(0, 20_000, 4000):
        rows = samples.take(["input_ids", "text"], torch.arange(start, start + 400, 4))
        most = max(most, pool.bytes_allocated() - before)
        del rows
    assert most < 100_000  # the column of tokens alone takes 400,000


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="no list of mapped files")
def test_what_was_read_of_a_set_does_not_stay_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "samples.arrow"
    samples = write(path, [512] * 40)
    samples.texts(torch.arange(len(samples)))
    maps = psutil.Process().memory_maps()
    assert [part.rss for part in maps if part.path == str(path)] == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_rows_of_a_tensor_file_are_those_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "first": torch.arange(7).to(dtype),
        "cube": torch.arange(2 * 5 * 3).view(2, 5, 3).to(dtype),
        "flat": torch.arange(12).view(4, 3).to(dtype),
    }
    write_tensors(tmp_path / "tensors.safetensors", tensors, metadata={"state": "{}"})
    file = TensorFile(tmp_path / "tensors.safetensors")
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        assert torch.equal(file.rows(name), tensor)
        assert torch.equal(file.rows(name, rows=slice(1, 3)), tensor[1:3])
        assert file.rows(name).dtype == dtype
    assert torch.equal(file.rows("cube", 1), tensors["cube"][1])
    assert torch.equal(file.rows("cube", 1, rows=slice(2, 5)), tensors["cube"][1, 2:5])
    assert torch.equal(file.rows("cube", 0, 4, rows=slice(1, 2)), tensors["cube"][0, 4, 1:2])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomically(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomically(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
