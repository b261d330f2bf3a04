"""What a clean folder holds: its config, and the names and shapes of its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from workers.sources.libraries import Task, check_text_config, refused
from workers.sources.models import ResolvedModel, weight_files
from workers.sources.staging import check_unchanged

ADAPTER_PREFIX = "base_model.model."


def load_config(resolved: ResolvedModel, task: Task) -> Any:  # noqa: ANN401 — transformers carries no types
    """Return the model's config, which says how large its text model is.

    Raises:
        SourceError: unsupported_model.
    """
    with refused("config.json is not valid", "unsupported_model", "model"):
        config = AutoConfig.from_pretrained(
            resolved.path, trust_remote_code=False, local_files_only=True
        )
    check_text_config(config, task)
    return config


def saved_shapes(resolved: ResolvedModel, *, adapter: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every saved weight by name; none where there is no adapter.

    Raises:
        SourceError: changed_file.
    """
    folder = resolved.adapter_path if adapter else resolved.path
    if folder is None:
        return {}
    check_unchanged(folder, field="adapter" if adapter else "model")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def num_saved(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of entries of all weights together."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
