"""The classification head: which of its weights a checkpoint has, and its classes' labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.libraries import build_skeleton, check_size
from workers.sources.models import ResolvedModel
from workers.sources.weights import ADAPTER_PREFIX, load_config, num_saved, saved_shapes

Label = int | str


@dataclass(frozen=True, slots=True)
class Head:
    """The parameters after the encoder, by name, and the number of classes the weights have."""

    names: frozenset[str]
    num_classes: int | None
    is_in_adapter: bool

    def require_trained(self) -> int:
        """Return the number of classes.

        Raises:
            SourceError: untrained_head.
        """
        if self.num_classes is None:
            raise _refusal(
                "the model has no trained classification head "
                f"({', '.join(sorted(self.names))} are missing); ask for fine-tuning, or give an "
                "adapter that holds the head",
                "untrained_head",
                "model",
            )
        return self.num_classes


def match_labels(resolved: ResolvedModel, labels: Sequence[Label]) -> tuple[Label, ...]:
    """Return the label of each class of a trained model, in the order of its classes.

    Names in the model's config are matched as text. Without names the labels must be the integers
    from 0 to the number of classes less one: the order of text labels would be a guess.

    Args:
        resolved: a model whose head is trained.
        labels: the labels of the dataset; the model may know more.

    Raises:
        SourceError: untrained_head, or labels_mismatch.
    """
    num_classes = inspect_head(resolved).require_trained()
    names = resolved.class_names
    if names is not None and len(names) == num_classes:
        label_of_name = {str(label): label for label in labels}
        unknown = sorted(label_of_name.keys() - set(names))
        if not unknown:
            return tuple(label_of_name.get(name, name) for name in names)
    else:
        unknown = [str(label) for label in labels]
    if all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        return tuple(range(num_classes))
    known = f"the model's classes are {', '.join(names)}" if names else "the model names no classes"
    raise _refusal(
        f"the dataset has the labels {', '.join(unknown[:10])}, but {known}; use these names, or "
        f"the integers 0 to {num_classes - 1}, or set id2label in the model's config.json",
        "labels_mismatch",
        "dataset",
    )


def inspect_head(resolved: ResolvedModel) -> Head:
    """Look at the architecture, and see which of its head's weights were saved.

    Raises:
        SourceError: the config is not valid, or describes a far larger model than the weights.
    """
    skeleton: Any = build_skeleton(load_config(resolved, "classification"), "classification")
    saved = saved_shapes(resolved, adapter=False)
    check_size(skeleton, num_saved=num_saved(saved))
    prefix = f"{skeleton.base_model_prefix}."
    names = [name for name, _ in skeleton.named_parameters() if not name.startswith(prefix)]
    last = [name for name in names if name.endswith("weight")][-1]
    in_adapter = saved_shapes(resolved, adapter=True)
    if ADAPTER_PREFIX + last in in_adapter:
        num_classes = in_adapter[ADAPTER_PREFIX + last][0]
        return Head(frozenset(names), num_classes, is_in_adapter=True)
    is_saved = all(name in saved for name in names)
    return Head(frozenset(names), saved[last][0] if is_saved else None, is_in_adapter=False)


def draw_head(model: Any, *, names: frozenset[str]) -> None:  # noqa: ANN401 — transformers carries no types
    """Draw the head anew from the global generator, whatever the checkpoint had in its place."""
    spread = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
            if not own or not own <= names:
                continue
            if isinstance(module, nn.Linear):
                module.weight.normal_(mean=0.0, std=spread)
                if module.bias is not None:
                    module.bias.zero_()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
