"""What the first stage leaves for the later ones beside the samples: the model and the labels."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from workers.pipeline.artifacts import read_json, write_json
from workers.pipeline.targets import Label
from workers.sources.libraries import Task
from workers.sources.models import ResolvedModel


@dataclass(frozen=True)
class Prepared:
    """What the later stages need to know of the model and the labels.

    Attributes:
        task: what the model does.
        model: where the resolved model lies.
        labels: the label of each class; the class of a sample indexes it. None for causal_lm.
        pad_id: the token that batches are padded with.
        checkpoint_paths: where the adapters of model.checkpoints lie.
    """

    task: Task
    model: ResolvedModel
    labels: tuple[Label, ...]
    pad_id: int
    checkpoint_paths: tuple[Path, ...] = ()

    def write(self, path: Path) -> None:
        """Keep it for the stages that follow.

        What lies in the data directory is named from there, so that the directory can be moved.
        """
        data_dir = _data_dir(path)
        model = {name: _plain(value, data_dir) for name, value in asdict(self.model).items()}
        write_json(
            path,
            {
                "task": self.task,
                "model": model,
                "labels": list(self.labels),
                "pad_id": self.pad_id,
                "checkpoint_paths": [_plain(of, data_dir) for of in self.checkpoint_paths],
            },
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it back."""
        kept: dict[str, Any] = read_json(path)
        model, data_dir = kept["model"], _data_dir(path)
        adapter, names = model["adapter_path"], model["class_names"]
        model |= {
            "path": data_dir / model["path"],  # an absolute path stays what it is
            "adapter_path": data_dir / adapter if adapter else None,
            "class_names": tuple(names) if names is not None else None,
        }
        return cls(
            task=kept["task"],
            model=ResolvedModel(**model),
            labels=tuple(kept["labels"]),
            pad_id=kept["pad_id"],
            checkpoint_paths=tuple(data_dir / folder for folder in kept["checkpoint_paths"]),
        )


def _data_dir(path: Path) -> Path:
    return path.parents[3]  # of <data_dir>/audits/<audit id>/prepared/prepared.json


def _plain(value: object, data_dir: Path) -> object:
    if not isinstance(value, Path):
        return value
    return str(value.relative_to(data_dir) if value.is_relative_to(data_dir) else value)
