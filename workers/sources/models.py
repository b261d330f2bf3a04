"""Resolve a reference to a model, with or without an adapter, to a clean folder.

The folder holds cleaned configuration files and links to safetensors weights and tokenizer files,
picked by name: no pickle, no code, no other file of the source is ever in reach of the libraries.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from app.references import HubModelReference, ModelReference, ObjectReference
from workers.sources.configs import (
    MAX_CONFIG_BYTES,
    clean_adapter_config,
    clean_model_config,
    clean_tokenizer_config,
    read_json,
)
from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.gguf import file_digest, stage_gguf
from workers.sources.hub import Hub
from workers.sources.libraries import Task, check_architecture
from workers.sources.listing import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    CONFIG,
    SHARD,
    TOKENIZER_CONFIG,
    TOKENIZER_DATA,
    WEIGHTS,
    WEIGHTS_INDEX,
    folder_files,
    gguf_of,
    hub_files,
    object_files,
)
from workers.sources.objects import NO_STORE, ObjectStore
from workers.sources.staging import (
    LINKS,
    copy_file,
    digest,
    fingerprints,
    links,
    stage_folder,
    write_json,
)

_TOKENIZERS = ({"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"})
_MAX_TEMPLATE_BYTES = 1024**2
_MAX_TOKENIZER_BYTES = 64 * 1024**2  # the largest known is about half as large
_ADAPTER_TASKS: dict[Task, str] = {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}


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


def resolve_model(
    reference: ModelReference,
    *,
    adapter: ModelReference | None,
    task: Task = "classification",
    roots: Sequence[Path],
    hub: Hub,
    store: ObjectStore = NO_STORE,
    cache_dir: Path,
) -> ResolvedModel:
    """Fetch a model and its adapter, check them, and lay them out for `load_model`.

    A hub reference whose revision is a full commit and that was resolved before is answered
    without asking the hub. A GGUF file is converted when it is first met.

    Args:
        reference: the model's folder or repository: config.json, safetensors and a tokenizer, or
            one GGUF file.
        adapter: the LoRA adapter's, to be put on that model.
        task: what the model will be loaded for.
        hub: where hf:// references are resolved.
        store: where s3:// references are.
        roots: folders that file:// references may name.
        cache_dir: where the clean folders are kept, beside the hub's cache.

    Raises:
        SourceError: what is wrong with which reference, and what to change.
    """
    path, revision = _resolve_part(
        reference, field="model", roots=roots, hub=hub, store=store, cache_dir=cache_dir
    )
    config = read_json(path / CONFIG, field="model")
    model_type = check_architecture(config.get("model_type"), task)
    base = ResolvedModel(
        path=path,
        adapter_path=None,
        revision=revision,
        adapter_revision=None,
        model_type=model_type,
        class_names=_class_names(config),
    )
    if adapter is None:
        return base
    return resolve_adapter(
        base, adapter, task=task, roots=roots, hub=hub, store=store, cache_dir=cache_dir
    )


def resolve_adapter(
    base: ResolvedModel,
    adapter: ModelReference,
    *,
    task: Task = "classification",
    roots: Sequence[Path],
    hub: Hub,
    store: ObjectStore = NO_STORE,
    cache_dir: Path,
) -> ResolvedModel:
    """Return a resolved model with another adapter; the base is not looked at again.

    Args:
        base: what `resolve_model` answered, for the same task; its own adapter is replaced.
        adapter: the LoRA adapter to be put on it.
        task: what the model will be loaded for.
        roots: folders that file:// references may name.
        hub: where hf:// references are resolved.
        store: where s3:// references are.
        cache_dir: where the clean folders are kept, beside the hub's cache.

    Raises:
        SourceError: what is wrong with the adapter, and what to change.
    """
    path, revision = _resolve_part(
        adapter, field="adapter", roots=roots, hub=hub, store=store, cache_dir=cache_dir
    )
    _check_adapter_task(path, task)
    return replace(base, adapter_path=path, adapter_revision=revision)


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a clean folder, a model's or an adapter's."""
    return sorted(path.glob("*.safetensors"))


def _resolve_part(
    reference: ModelReference,
    *,
    field: SourceField,
    roots: Sequence[Path],
    hub: Hub,
    store: ObjectStore,
    cache_dir: Path,
) -> tuple[Path, str]:
    """Return (clean folder, revision)."""
    staged = cache_dir / "models"
    if isinstance(reference, HubModelReference):
        revision = hub.commit(reference, field=field)
        target = staged / f"hub--{reference.repo.replace('/', '--')}--{field}--{revision}"
        if not target.is_dir():
            files = hub_files(reference, commit=revision, hub=hub, field=field)
            stage_folder(files, target, fill=_filler(files, field=field))
        return target, revision
    if isinstance(reference, ObjectReference):
        folder, files = object_files(reference, store=store, cache_dir=cache_dir, field=field)
    else:
        folder, files = folder_files(reference, roots=roots, field=field)
    gguf = gguf_of(files)
    try:
        before = fingerprints(files)
        revision = digest(files) if gguf is None else file_digest(gguf)
    except OSError as error:
        raise _refusal(
            f"{reference} cannot be read: {error.strerror}", "not_permitted", field
        ) from error
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    # what is made of a GGUF file links to nothing, so where the file lies does not matter
    target = staged / (
        f"file--{where}--{field}--{revision}" if gguf is None else f"gguf--{revision}"
    )
    if not target.is_dir():
        stage_folder(files, target, fill=_filler(files, field=field))
    # The same bytes may have been written anew since they were laid out.
    write_json(target / LINKS, {name: before[name] for name in links(target)})
    return target, revision


def _filler(
    files: dict[str, Path], *, field: SourceField
) -> Callable[[dict[str, Path], Path], None]:
    if field == "adapter":
        return _stage_adapter
    return _stage_model if gguf_of(files) is None else stage_gguf


def _stage_model(files: dict[str, Path], target: Path) -> None:
    if not any(tokenizer <= files.keys() for tokenizer in _TOKENIZERS):
        raise _refusal(
            "the tokenizer is incomplete: vocab.json needs merges.txt", "missing_file", "model"
        )
    # What is small is copied, so that its owner can exchange it as little as its check; weights are
    # linked, and watched.
    for name in (CONFIG, TOKENIZER_CONFIG, WEIGHTS_INDEX, CHAT_TEMPLATE, *TOKENIZER_DATA):
        if name in files:
            limit = MAX_CONFIG_BYTES if name not in TOKENIZER_DATA else _MAX_TOKENIZER_BYTES
            limit = _MAX_TEMPLATE_BYTES if name == CHAT_TEMPLATE else limit
            copy_file(files[name], target / name, max_bytes=limit, field="model")
    write_json(target / CONFIG, clean_model_config(read_json(target / CONFIG, field="model")))
    if TOKENIZER_CONFIG in files:
        tokenizer_config = read_json(target / TOKENIZER_CONFIG, field="model")
        write_json(target / TOKENIZER_CONFIG, clean_tokenizer_config(tokenizer_config))
    if WEIGHTS in files:
        weights = [WEIGHTS]
        (target / WEIGHTS_INDEX).unlink(missing_ok=True)
    else:
        weights = _shards(read_json(target / WEIGHTS_INDEX, field="model"), files=files)
    for name in weights:
        check_safetensors(files[name], field="model")
        (target / name).symlink_to(files[name])


def _stage_adapter(files: dict[str, Path], target: Path) -> None:
    copy_file(
        files[ADAPTER_CONFIG], target / ADAPTER_CONFIG, max_bytes=MAX_CONFIG_BYTES, field="adapter"
    )
    config = clean_adapter_config(read_json(target / ADAPTER_CONFIG, field="adapter"))
    check_safetensors(files[ADAPTER_WEIGHTS], field="adapter")
    write_json(target / ADAPTER_CONFIG, config)
    (target / ADAPTER_WEIGHTS).symlink_to(files[ADAPTER_WEIGHTS])


def _check_adapter_task(path: Path, task: Task) -> None:
    found = read_json(path / ADAPTER_CONFIG, field="adapter")["task_type"]
    if found != _ADAPTER_TASKS[task]:
        raise _refusal(
            f"the adapter's task_type is {found}, but the audit's task is {task}, which takes "
            f"adapters of {_ADAPTER_TASKS[task]}",
            "unsupported_adapter",
            "adapter",
        )


def _shards(index: dict[str, Any], *, files: dict[str, Path]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refusal(f"{WEIGHTS_INDEX} has no weight_map", "unreadable_file", "model")
    shards = sorted({str(name) for name in weight_map.values()})
    for name in shards:
        if not SHARD.fullmatch(name):
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
