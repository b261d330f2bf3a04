"""Resolve a reference to a model, with or without an adapter, to a clean folder.

The folder holds cleaned configuration files and links to safetensors weights and tokenizer files,
picked by name: no pickle, no code, no other file of the source is ever in reach of the libraries.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from app.references import FileReference, HubModelReference, InvalidReference, resolve_file
from workers.sources.configs import (
    clean_adapter_config,
    clean_model_config,
    clean_tokenizer_config,
    read_json,
)
from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.hub import Hub
from workers.sources.staging import (
    LINKS,
    digest,
    fingerprints,
    links,
    stage_folder,
    write_json,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"

_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_TOKENIZER_DATA = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"})
_MODEL_FILES = {CONFIG, WEIGHTS, WEIGHTS_INDEX, TOKENIZER_CONFIG, *_TOKENIZER_DATA}
_ADAPTER_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that lies ready, checked and pinned.

    Attributes:
        path: a clean folder for `load_model`.
        adapter_path: the same for the adapter, if there is one.
        revision: the commit (hub), or the sha256 over names and bytes of the files (folder).
        adapter_revision: the same for the adapter.
        model_type: the architecture, such as bert.
        class_names: names of the classes that the model's own config gives; None if it has none.
    """

    path: Path
    adapter_path: Path | None
    revision: str
    adapter_revision: str | None
    model_type: str
    class_names: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the files of one reference lie, by name."""

    files: dict[str, Path]
    revision: str
    key: str


def resolve_model(
    reference: FileReference | HubModelReference,
    *,
    adapter: FileReference | HubModelReference | None,
    roots: Sequence[Path],
    hub: Hub,
    cache_dir: Path,
) -> ResolvedModel:
    """Fetch a model and its adapter, check them, and lay them out for `load_model`.

    A hub reference whose revision is a full commit and that was resolved before is answered
    without asking the hub.

    Args:
        reference: the model's folder or repository.
        adapter: the LoRA adapter's, to be put on that model.
        hub: where hf:// references are resolved.
        roots: folders that file:// references may name.
        cache_dir: where the clean folders are kept, beside the hub's cache.

    Raises:
        SourceError: what is wrong with which reference, and what to change.
    """
    path, revision = _resolve_part(
        reference,
        field="model",
        wanted=_MODEL_FILES,
        stage=_stage_model,
        roots=roots,
        hub=hub,
        cache_dir=cache_dir,
    )
    adapter_path, adapter_revision = (
        (None, None)
        if adapter is None
        else _resolve_part(
            adapter,
            field="adapter",
            wanted=_ADAPTER_FILES,
            stage=_stage_adapter,
            roots=roots,
            hub=hub,
            cache_dir=cache_dir,
        )
    )
    config = read_json(path / CONFIG, field="model")
    return ResolvedModel(
        path=path,
        adapter_path=adapter_path,
        revision=revision,
        adapter_revision=adapter_revision,
        model_type=config["model_type"],
        class_names=_class_names(config),
    )


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a clean folder, a model's or an adapter's."""
    return sorted(path.glob("*.safetensors"))


def _resolve_part(
    reference: FileReference | HubModelReference,
    *,
    field: SourceField,
    wanted: set[str],
    stage: Callable[[dict[str, Path], Path], None],
    roots: Sequence[Path],
    hub: Hub,
    cache_dir: Path,
) -> tuple[Path, str]:
    """Return (clean folder, revision)."""
    staged = cache_dir / "models"
    if isinstance(reference, HubModelReference):
        revision = hub.commit(reference, field=field)
        target = staged / f"hub--{reference.repo.replace('/', '--')}--{field}--{revision}"
        if not target.is_dir():
            files = _hub_files(reference, commit=revision, wanted=wanted, hub=hub, field=field)
            stage_folder(files, target, fill=stage)
        return target, revision
    folder, files = _folder_files(reference, wanted=wanted, roots=roots, field=field)
    try:
        before = fingerprints(files)
        revision = digest(files)
    except OSError as error:
        raise _refusal(
            f"{reference.path} cannot be read: {error.strerror}", "not_permitted", field
        ) from error
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    target = staged / f"file--{where}--{field}--{revision}"
    if not target.is_dir():
        stage_folder(files, target, fill=stage)
    # The same bytes may have been written anew since they were laid out.
    write_json(target / LINKS, {name: before[name] for name in links(target)})
    return target, revision


def _folder_files(
    reference: FileReference, *, wanted: set[str], roots: Sequence[Path], field: SourceField
) -> tuple[Path, dict[str, Path]]:
    try:
        folder = resolve_file(reference.path, roots)
        if not folder.is_dir():
            raise _refusal(
                f"{reference.path} is a file; name the folder that holds it",
                "invalid_reference",
                field,
            )
        names = sorted(entry.name for entry in folder.iterdir())
        _check_names(names, source=str(reference.path), field=field)
        files = {
            name: resolve_file(folder / name, roots) for name in names if _is_wanted(name, wanted)
        }
    except InvalidReference as error:
        raise _refusal(str(error), "invalid_reference", field) from error
    except OSError as error:
        raise _refusal(
            f"{reference.path} cannot be read: {error.strerror}", "not_permitted", field
        ) from error
    return folder, files


def _hub_files(
    reference: HubModelReference, *, commit: str, wanted: set[str], hub: Hub, field: SourceField
) -> dict[str, Path]:
    names = [
        file.path for file in hub.files(reference, commit=commit, recursive=False, field=field)
    ]
    _check_names(names, source=str(reference), field=field)
    paths = [name for name in names if _is_wanted(name, wanted)]
    return hub.download(reference, commit=commit, paths=paths, field=field)


def _is_wanted(name: str, wanted: set[str]) -> bool:
    return name in wanted or (WEIGHTS in wanted and _SHARD.fullmatch(name) is not None)


def _check_names(names: Sequence[str], *, source: str, field: SourceField) -> None:
    """Refuse a folder that lacks what is needed, before anything is downloaded or hashed."""
    if field == "adapter":
        required: list[tuple[str, ...]] = [(ADAPTER_CONFIG,), (ADAPTER_WEIGHTS,)]
    else:
        if CONFIG not in names and ADAPTER_CONFIG in names:
            raise _refusal(
                f"{source} is an adapter, not a model; give its base as the model and this as the "
                "adapter",
                "missing_file",
                field,
            )
        required = [
            (CONFIG,),
            (WEIGHTS, WEIGHTS_INDEX),
            ("tokenizer.json", "vocab.txt", "vocab.json"),
        ]
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


def _stage_model(files: dict[str, Path], target: Path) -> None:
    config = clean_model_config(read_json(files[CONFIG], field="model"))
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise _refusal(
            f"model_type {model_type!r} is not an architecture with a sequence classification head "
            "that this server knows",
            "unsupported_model",
            "model",
        )
    if not any(tokenizer <= files.keys() for tokenizer in _TOKENIZERS):
        raise _refusal(
            "the tokenizer is incomplete: vocab.json needs merges.txt", "missing_file", "model"
        )
    write_json(target / CONFIG, config)
    if TOKENIZER_CONFIG in files:
        tokenizer_config = read_json(files[TOKENIZER_CONFIG], field="model")
        write_json(target / TOKENIZER_CONFIG, clean_tokenizer_config(tokenizer_config))
    if WEIGHTS in files:
        weights = [WEIGHTS]
    else:
        index = read_json(files[WEIGHTS_INDEX], field="model")
        weights = _shards(index, files=files)
        write_json(target / WEIGHTS_INDEX, index)
    for name in weights:
        check_safetensors(files[name], field="model")
    for name in (*weights, *(name for name in _TOKENIZER_DATA if name in files)):
        (target / name).symlink_to(files[name].resolve())


def _stage_adapter(files: dict[str, Path], target: Path) -> None:
    config = clean_adapter_config(read_json(files[ADAPTER_CONFIG], field="adapter"))
    check_safetensors(files[ADAPTER_WEIGHTS], field="adapter")
    write_json(target / ADAPTER_CONFIG, config)
    (target / ADAPTER_WEIGHTS).symlink_to(files[ADAPTER_WEIGHTS].resolve())


def _shards(index: dict[str, Any], *, files: dict[str, Path]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refusal(f"{WEIGHTS_INDEX} has no weight_map", "unreadable_file", "model")
    shards = sorted({str(name) for name in weight_map.values()})
    for name in shards:
        if not _SHARD.fullmatch(name):
            raise _refusal(
                f"{WEIGHTS_INDEX} names the weights {name!r}; shards are called "
                "model-00001-of-00002.safetensors and lie beside it",
                "unsafe_file",
                "model",
            )
        if name not in files:
            raise _refusal(f"the weights {name} are missing", "missing_file", "model")
    return shards


def check_safetensors(path: Path, *, field: SourceField) -> None:
    """Raise unless the file's header is that of safetensors and fits its length."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise _refusal(
            f"{path.name} is not a safetensors file: {error}", "unreadable_file", field
        ) from error


def _class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the classes' names in order, or None where they are the library's LABEL_0, LABEL_1."""
    id2label = config.get("id2label")
    if not isinstance(id2label, dict):
        return None
    try:
        names = tuple(str(id2label[str(i)]) for i in range(len(id2label)))
    except KeyError:
        return None
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
