"""The files of one audit: where they are, and how they appear whole or not at all."""

import hashlib
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.audits.folders import audit_folder
from app.audits.models import Ranking
from app.failpoints import reach
from app.shared_files import fetch, publish, remove_folder

_NUMPY_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("F16", "<f2"),
        ("F32", "<f4"),
        ("F64", "<f8"),
        ("I32", "<i4"),
        ("I64", "<i8"),
        ("BOOL", "?"),
    )
}
# Below this, reading on is faster than another system call.
_WORTH_A_SEEK = 8192
_READ_BYTES = 8 * 1024**2


class Artifacts:
    """Paths under `<data_dir>/audits/<audit id>/`; every worker of the audit sees the same."""

    def __init__(self, data_dir: Path, audit_id: str) -> None:
        self.root = audit_folder(data_dir, audit_id)
        self.train = self.root / "prepared" / "train.arrow"
        self.validation = self.root / "prepared" / "validation.arrow"
        self.test = self.root / "prepared" / "test.arrow"
        self.held_out = self.root / "prepared" / "held_out.safetensors"
        self.prepared = self.root / "prepared" / "prepared.json"
        self.checkpoint = self.root / "fine_tune" / "checkpoint.safetensors"
        self.adapter = self.root / "fine_tune" / "adapter"
        self.epochs = self.root / "fine_tune" / "epochs.json"
        self.validation_facts = self.root / "validation" / "facts.safetensors"
        self.hidden_states = self.root / "validation" / "hidden_states.safetensors"
        self.fitted = self.root / "validation" / "fitted.safetensors"
        self.modules = self.root / "validation" / "modules.json"
        self.out_of_sample = self.root / "validation" / "out_of_sample.safetensors"
        self.plan = self.root / "verify" / "plan.json"
        self.kept_sets = self.root / "verify" / "kept.safetensors"
        self.drawn_probes = self.root / "probes" / "drawn.safetensors"
        self._scratch = self.root / "scratch"
        self._audit = (data_dir, audit_id)

    @property
    def probes(self) -> "Artifacts":
        """The facts, the influence and the scratch of the probes, in a folder of their own."""
        data_dir, audit_id = self._audit
        return Artifacts(data_dir, f"{audit_id}/probes")

    def results(self, ranking_id: str) -> Path:
        """The files of one ranking."""
        return self.root / Ranking.folder_of(ranking_id)

    def epoch_adapter(self, epoch: int) -> Path:
        """The adapter as it was after an epoch, from 0, kept where several are compared."""
        return self.root / "fine_tune" / "epochs" / str(epoch)

    def validation_gradients(self, checkpoint: int | None = None) -> Path:
        """The validation samples' gradients, at the audited state or at a checkpoint."""
        name = "gradients" if checkpoint is None else f"gradients-{checkpoint}"
        return self.root / "validation" / f"{name}.safetensors"

    def facts(self, shard: int) -> Path:
        """What a shard's forward and backward pass told of each sample."""
        return self.root / "facts" / f"{shard:05d}.safetensors"

    def outcome(self, training: int) -> Path:
        """What a model of the verification says of every test sample."""
        return self.root / "verify" / "outcomes" / f"{training:05d}.safetensors"

    def training_checkpoint(self, training: int) -> Path:
        """Where a training of the verification stands."""
        return self._scratch / "verify" / f"{training:05d}.safetensors"

    @property
    def offloaded(self) -> Path:
        """Weights of a model that neither a device nor memory has room for."""
        return self._scratch / "offloaded"

    @property
    def ranks(self) -> Path:
        """A folder for the ranks of one estimator's influence while they are aggregated."""
        return self._scratch / "ranks"

    def influence(self, estimator: str, shard: int, checkpoint: int | None = None) -> Path:
        """A shard's influence [modules, columns, T_shard]; one file a checkpoint for tracin."""
        folder = self.root / "influence" / estimator
        if checkpoint is not None:
            folder /= str(checkpoint)
        return folder / f"{shard:05d}.safetensors"

    def gradients(self, shard: int) -> Path:
        """A shard's per-sample gradients, kept between passes."""
        return self._scratch / "gradients" / f"{shard:05d}.safetensors"

    def block_gradients(self, block: int, shard: int) -> Path:
        """The same of one block of modules, where those of all would take too much disk."""
        return self._scratch / "blocks" / str(block) / f"{shard:05d}.safetensors"

    def kronecker(self, shard: int) -> Path:
        """A shard's sums of inputs and output gradients."""
        return self._scratch / "kronecker" / f"{shard:05d}.safetensors"

    def queries(self, block: int) -> Path:
        """The preconditioned validation gradients of one block of modules."""
        return self._scratch / "queries" / f"{block:05d}.safetensors"

    def remove_block(self, block: int) -> None:
        """Remove the gradients of one block of modules."""
        remove_folder(self._scratch / "blocks" / str(block))

    def remove_scratch(self) -> None:
        """Remove what only the passes over the gradients needed."""
        for scratch in (self._scratch, self.probes._scratch):  # noqa: SLF001 - ours
            remove_folder(scratch)


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path`, flushed to disk and published, at the end.

    If the block raises, nothing becomes of it.

    Two workers that write the same artifact write the same bytes, so whoever is last is right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not by the process's id: containers that share a volume have the same ones
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        reach("file.written")
        temporary.replace(path)
        reach("file.renamed")
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        publish(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


class TensorFile:
    """Reads rows of the tensors in a safetensors file without mapping it into memory.

    What is read through a mapping counts as the process's memory as long as the file stays mapped;
    here only the rows do. Nothing stays open between reads: an audit may have more shards than a
    process may have open files.
    """

    def __init__(self, path: Path) -> None:
        fetch(path)
        # the format: length of the header, the header in JSON, the bytes of the tensors
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = orjson.loads(file.read(length))
        self._path = path
        self._start = 8 + length

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._header[name]["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def rows(self, name: str, *indices: int, rows: slice = slice(None)) -> Tensor:
        """Return `tensor[*indices, rows]`, a copy."""
        shape = self.shape(name)
        dtype = _NUMPY_DTYPES[self._header[name]["dtype"]]
        start, stop, _ = rows.indices(shape[len(indices)])
        first = 0
        for index, size in zip((*indices, start), shape, strict=False):
            first = first * size + index
        inner = shape[len(indices) + 1 :]
        values = np.fromfile(
            self._path,
            dtype=dtype,
            count=(stop - start) * math.prod(inner),
            offset=self._start
            + self._header[name]["data_offsets"][0]
            + first * math.prod(inner) * dtype.itemsize,
        )
        return torch.from_numpy(values).view(stop - start, *inner)

    def columns(self, name: str, columns: slice) -> Tensor:
        """Return `tensor[..., columns]`, a copy."""
        shape = self.shape(name)
        dtype = _NUMPY_DTYPES[self._header[name]["dtype"]]
        start, stop, _ = columns.indices(shape[-1])
        values = np.empty((math.prod(shape[:-1]), stop - start), dtype=dtype)
        row_bytes = shape[-1] * dtype.itemsize
        with self._path.open("rb", buffering=0) as file:
            first = file.seek(self._start + self._header[name]["data_offsets"][0])
            if row_bytes - values[:1].nbytes > _WORTH_A_SEEK:
                for row, value in enumerate(values):
                    offset = first + row * row_bytes + start * dtype.itemsize
                    if os.preadv(file.fileno(), [value], offset) != value.nbytes:
                        raise EOFError(f"{self._path} ends too early.")
            else:
                for part in np.array_split(values, -(-len(values) * row_bytes // _READ_BYTES)):
                    rows = np.fromfile(file, dtype=dtype, count=len(part) * shape[-1])
                    part[:] = rows.reshape(len(part), shape[-1])[:, start:stop]
        return torch.from_numpy(values).view(*shape[:-1], stop - start)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a file whose names begin with a prefix, by what follows it."""
    fetch(path)
    # read, not mapped: what was freed before is used again
    with safe_open(path, framework="pt", backend="pread") as file:
        return {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118  not a dict
            if name.startswith(prefix)
        }


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with atomically(path) as temporary:
        temporary.write_bytes(orjson.dumps(value))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object."""
    fetch(path)
    value: dict[str, object] = orjson.loads(path.read_bytes())
    return value


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
