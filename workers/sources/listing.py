"""Which files of a folder or a repository make up a model or an adapter, picked by name."""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from app.references import (
    FileReference,
    HubModelReference,
    InvalidReference,
    ObjectReference,
    resolve_file,
)
from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.hub import Hub
from workers.sources.objects import ObjectStore

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GGUF_SUFFIX = ".gguf"
SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
TOKENIZER_DATA = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

_MODEL_FILES = {CONFIG, WEIGHTS, WEIGHTS_INDEX, TOKENIZER_CONFIG, CHAT_TEMPLATE, *TOKENIZER_DATA}
_ADAPTER_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def folder_files(
    reference: FileReference, *, roots: Sequence[Path], field: SourceField
) -> tuple[Path, dict[str, Path]]:
    """Return a folder and the files in it that are needed, by name.

    Raises:
        SourceError: invalid_reference, not_permitted or missing_file.
    """
    try:
        folder = resolve_file(reference.path, roots)
        if not folder.is_dir():
            raise _refusal(
                f"{reference.path} is a file; name the folder that holds it",
                "invalid_reference",
                field,
            )
        names = sorted(entry.name for entry in folder.iterdir())
        wanted = _choose(names, source=str(reference.path), field=field)
        files = {name: resolve_file(folder / name, roots) for name in wanted}
    except InvalidReference as error:
        raise _refusal(str(error), "invalid_reference", field) from error
    except OSError as error:
        raise _refusal(
            f"{reference.path} cannot be read: {error.strerror}", "not_permitted", field
        ) from error
    return folder, files


def hub_files(
    reference: HubModelReference, *, commit: str, hub: Hub, field: SourceField
) -> dict[str, Path]:
    """Download the files of a repository that are needed and return where they lie, by name.

    Raises:
        SourceError: missing_file, or as `Hub.download`.
    """
    names = [
        file.path for file in hub.files(reference, commit=commit, recursive=False, field=field)
    ]
    paths = _choose(names, source=str(reference), field=field)
    found = hub.download(reference, commit=commit, paths=paths, field=field)
    return {name: path.resolve() for name, path in found.items()}


def object_files(
    reference: ObjectReference, *, store: ObjectStore, cache_dir: Path, field: SourceField
) -> tuple[Path, dict[str, Path]]:
    """Download the objects of a folder that are needed; return where they lie, as `folder_files`.

    Raises:
        SourceError: missing_file, or as `ObjectStore.fetch`.
    """
    found = {file.name: file for file in store.files(reference, field=field)}
    chosen = [found[name] for name in _choose(sorted(found), source=str(reference), field=field)]
    listed = "\n".join(f"{file.key} {file.etag}" for file in chosen)
    key = hashlib.sha256(f"{reference.bucket}\n{listed}".encode()).hexdigest()[:32]
    folder = cache_dir / "objects" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="staging-") as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            store.download(reference, chosen, content, field=field)
            try:
                content.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    folder = folder.resolve()
    return folder, {file.name: folder / file.name for file in chosen}


def gguf_of(files: dict[str, Path]) -> Path | None:
    """Return the GGUF file, where the model is one."""
    return next((path for name, path in files.items() if name.endswith(GGUF_SUFFIX)), None)


def _choose(names: Sequence[str], *, source: str, field: SourceField) -> list[str]:
    """Pick the files that are needed; safetensors come before GGUF, which may lie beside them.

    What lacks something is refused here, before anything is downloaded or hashed.
    """
    if field == "adapter":
        _require(names, [(ADAPTER_CONFIG,), (ADAPTER_WEIGHTS,)], source=source, field=field)
        return [name for name in names if name in _ADAPTER_FILES]
    ggufs = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if ggufs and not any(name.endswith(".safetensors") for name in names):
        if len(ggufs) > 1:
            raise _refusal(
                f"{source} holds several GGUF files ({', '.join(ggufs[:5])}); put the one that is "
                "meant into a folder of its own and name that",
                "invalid_reference",
                field,
            )
        return ggufs
    if CONFIG not in names and ADAPTER_CONFIG in names:
        raise _refusal(
            f"{source} is an adapter, not a model; give its base as the model and this as the "
            "adapter",
            "missing_file",
            field,
        )
    required = [(CONFIG,), (WEIGHTS, WEIGHTS_INDEX), ("tokenizer.json", "vocab.txt", "vocab.json")]
    _require(names, required, source=source, field=field)
    return [name for name in names if name in _MODEL_FILES or SHARD.fullmatch(name)]


def _require(
    names: Sequence[str], required: Sequence[tuple[str, ...]], *, source: str, field: SourceField
) -> None:
    for alternatives in required:
        if set(alternatives).isdisjoint(names):
            pickles = [name for name in names if name.endswith(_PICKLES)]
            hint = (
                f" ({', '.join(pickles[:3])} could run code when it is loaded; save the model "
                "with save_pretrained, which writes safetensors)"
                if pickles and any(name.endswith(".safetensors") for name in alternatives)
                else ""
            )
            raise _refusal(
                f"{source} has no {' or '.join(alternatives)}{hint}", "missing_file", field
            )


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
