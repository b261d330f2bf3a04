"""A GGUF file, made once into the plain folder that everything after it works with.

Transformers reads the file and dequantises it. Its reader believes what the file says of its own
sizes, so these are checked first: nothing is counted up to, allocated or looked at beyond them.
"""

import hashlib
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from app.storage import wait_if_full
from workers.sources.configs import clean_model_config, clean_tokenizer_config, read_json
from workers.sources.errors import SourceError, SourceErrorCode
from workers.sources.libraries import (
    build_skeleton,
    check_architecture,
    check_size,
    check_weights,
    quiet,
    refused,
)
from workers.sources.staging import fingerprints, write_json

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_METADATA_BYTES = 256 * 1024**2
_MAX_METADATA_ITEMS = 4_000_000
_MAX_TENSORS = 100_000
_MAX_AXES = 4
_MAX_KEY_BYTES = 2**16 - 1
# Transformers builds lists as long as these say, before anything else is looked at.
_MAX_COUNTS = {"block_count": 1_000, "expert_count": 4_096}
_MAX_SIZE = 2**31 - 1
# Keys whose numbers are no sizes of the model: versions, ids of tokens.
_WITHOUT_SIZES = ("general.", "tokenizer.", "split.", "quantize.")
_STRING, _ARRAY = 8, 9
# Bytes of the other types of a value, by their number in the format.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 10: "<u8", 11: "<i8"}
_FLOAT32_BYTES = 4
_NAME = "model.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_gguf(files: dict[str, Path], target: Path) -> None:
    """Write config.json, float32 model.safetensors and the tokenizer's files of one GGUF file.

    The embedded chat template is kept.

    Raises:
        SourceError: the file is damaged, or no causal language model that Transformers can read,
            or there is no room for its weights.
    """
    ((name, path),) = files.items()
    before = fingerprints(files)
    num_entries = check_gguf(path)
    _check_room(target.parent, num_bytes=_FLOAT32_BYTES * num_entries, name=name)
    with (
        tempfile.TemporaryDirectory(
            dir=target.parent, prefix="gguf-", suffix=".partial"
        ) as temporary,
        quiet(),
    ):
        # Nothing but the file is in reach of the library, whatever else lies beside it.
        (Path(temporary) / _NAME).symlink_to(path.resolve())
        model = _read_model(Path(temporary), name=name, num_entries=num_entries)
        config = json.loads(model.config.to_json_string(use_diff=False))
        # that of the file, which is now plain
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        write_json(target / "config.json", clean_model_config(config))
        save_file(_own_tensors(model), target / "model.safetensors", metadata={"format": "pt"})
        del model
        _write_tokenizer(Path(temporary), target, name=name)
    if fingerprints(files) != before:
        raise _refusal(f"{name} changed while it was read; submit the audit again", "changed_file")


def check_gguf(path: Path) -> int:
    """Walk over the header of a GGUF file and return how many entries its tensors have.

    Raises:
        SourceError: unreadable_file, if it is none or is cut off; unsupported_model, if it says of
            the model what would keep a reader counting.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415 — only for GGUF files

    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(file, name=path.name, size=size)
        header.check_version()
        num_tensors, num_values = header.number("<Q"), header.number("<Q")
        if num_tensors > _MAX_TENSORS:
            raise _refusal(f"{path.name} says that it has {num_tensors:,} tensors")
        for _ in range(num_values):
            header.check_value(header.key(), header.number("<I"))
        num_entries, num_bytes = 0, 0
        for _ in range(num_tensors):
            header.skip_string()
            num_axes = header.number("<I")
            if num_axes > _MAX_AXES:
                raise _refusal(f"{path.name} has a tensor with {num_axes:,} axes")
            entries = math.prod(header.number("<Q") for _ in range(num_axes))
            kind = header.number("<I")
            header.skip(8)
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError) as error:
                raise _refusal(f"{path.name} has a tensor of the unknown type {kind}") from error
            num_entries += entries
            num_bytes += entries // block * block_bytes
        # No two tensors share their bytes, so together they fit behind the header.
        if num_bytes > size - header.position:
            raise _refusal(
                f"{path.name} is cut off: its tensors have {num_bytes:,} bytes, the file "
                f"{size - header.position:,} for them; copy it again"
            )
    return num_entries


class _Header:
    """Reads forward through a header, and never beyond the file or the limits."""

    def __init__(self, file: BinaryIO, *, name: str, size: int) -> None:
        self._file = file
        self._name = name
        self._end = min(size, _MAX_METADATA_BYTES)
        self._num_items = 0
        self.position = 0

    def check_version(self) -> None:
        self._advance(4)
        if self._file.read(4) != _MAGIC:
            raise _refusal(f"{self._name} is not a GGUF file")
        version = self.number("<I")
        if version not in _VERSIONS:
            raise _refusal(f"{self._name} has version {version} of GGUF; 2 and 3 are read")

    def number(self, form: str) -> int:
        self._count(1)
        self._advance(struct.calcsize(form))
        (value,) = struct.unpack(form, self._file.read(struct.calcsize(form)))
        return int(value)

    def skip(self, num_bytes: int) -> None:
        self._advance(num_bytes)
        self._file.seek(num_bytes, 1)

    def skip_string(self) -> None:
        self.skip(self.number("<Q"))

    def key(self) -> str:
        length = self.number("<Q")
        if length > _MAX_KEY_BYTES:
            raise _refusal(f"{self._name} is cut off or damaged: it has a key of {length:,} bytes")
        self._advance(length)
        return self._file.read(length).decode(errors="replace")

    def check_value(self, key: str, kind: int) -> None:
        """Go past a value, or a list of values, and refuse it if it is an absurd size."""
        length = 1
        if kind == _ARRAY:
            kind, length = self.number("<I"), self.number("<Q")
            self._count(length)
        if kind == _STRING:
            for _ in range(length):
                self.skip_string()
        elif kind in _INTEGERS and length and not key.startswith(_WITHOUT_SIZES):
            self._advance(length * self._width(kind))
            values = np.frombuffer(self._file.read(length * self._width(kind)), _INTEGERS[kind])
            self._check_size(key, int(values.max()))
        else:
            self.skip(length * self._width(kind))

    def _check_size(self, key: str, value: int) -> None:
        limit = _MAX_COUNTS.get(key.rpartition(".")[2], _MAX_SIZE)
        if value > limit:
            raise _refusal(
                f"{self._name} has {key}={value}; at most {limit:,} is taken", "unsupported_model"
            )

    def _width(self, kind: int) -> int:
        if kind not in _VALUE_BYTES:
            raise _refusal(f"{self._name} has a value of the unknown type {kind}")
        return _VALUE_BYTES[kind]

    def _count(self, number: int) -> None:
        self._num_items += number
        if self._num_items > _MAX_METADATA_ITEMS:
            raise _refusal(f"{self._name} has more than {_MAX_METADATA_ITEMS:,} values")

    def _advance(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > self._end:
            raise _refusal(f"{self._name} is cut off or damaged: its header is not whole")


def _check_room(folder: Path, *, num_bytes: int, name: str) -> None:
    """Refuse a file whose weights would fill the disk once they are plain."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        wait_if_full(folder)
        raise SourceError(
            f"{name} takes {num_bytes:,} bytes as float32, but the disk of the worker's data "
            f"directory has {free:,} free; make room there and submit the audit again, or use a "
            "smaller model",
            code="storage_full",
            field="model",
            transient=True,
        )


def _read_model(folder: Path, *, name: str, num_entries: int) -> Any:  # noqa: ANN401 — transformers carries no types
    options = {"gguf_file": _NAME, "trust_remote_code": False, "local_files_only": True}
    with refused(f"{name} cannot be read", "unsupported_model", "model"):
        config = AutoConfig.from_pretrained(folder, **options)
        check_architecture(config.model_type, "causal_lm")
        clean_model_config(json.loads(config.to_json_string(use_diff=False)))
        check_size(build_skeleton(config, "causal_lm"), num_saved=num_entries)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    check_weights(report)
    return model


def _own_tensors(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Return the weights by name, tied ones once: that they are tied is in the config."""
    own: dict[str, torch.Tensor] = {}
    layouts: dict[int, set[tuple[torch.Size, tuple[int, ...]]]] = {}
    for name, tensor in model.state_dict().items():
        known = layouts.setdefault(tensor.data_ptr(), set())
        layout = (tensor.shape, tensor.stride())
        if layout in known and tensor.numel():
            continue
        # what begins at the same place with another shape is another weight; files share nothing
        own[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if known else tensor.contiguous()
        )
        known.add(layout)
    return own


def _write_tokenizer(folder: Path, target: Path, *, name: str) -> None:
    with refused(f"the tokenizer in {name} cannot be read", "unsupported_model", "model"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=_NAME, trust_remote_code=False, local_files_only=True
        )
        tokenizer.save_pretrained(folder / "tokenizer")
    config = read_json(folder / "tokenizer" / "tokenizer_config.json", field="model")
    write_json(target / "tokenizer_config.json", clean_tokenizer_config(config))
    for file in _TOKENIZER_FILES:
        if (folder / "tokenizer" / file).exists():
            (folder / "tokenizer" / file).rename(target / file)


def _refusal(message: str, code: SourceErrorCode = "unreadable_file") -> SourceError:
    return SourceError(message, code=code, field="model")
