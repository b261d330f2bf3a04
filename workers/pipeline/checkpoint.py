"""Fine-tuning checkpoints: one file that holds all that is needed to go on to the bit.

Adapter and head as they are and as they were best, optimizer moments, schedule position, random
state. One file that is renamed into place cannot be half written, nor hold parts of two different
steps; and safetensors runs no code when it is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from workers.pipeline.artifacts import read_tensors, write_tensors


@dataclass
class Position:
    """Where the training stands.

    Attributes:
        step: optimizer steps done, over all epochs.
        best_loss: lowest validation loss so far, None before the first.
        best: the parameters that had it, by name.
        losses: mean validation loss after each epoch.
    """

    step: int = 0
    best_loss: float | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters that are trained."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[name])


def save_checkpoint(
    path: Path,
    position: Position,
    *,
    model: nn.Module,
    optimizer: AdamW,
    schedule: LRScheduler,
    device: torch.device,
) -> None:
    """Write everything that the next step depends on."""
    tensors: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    for name, value in position.best.items():
        tensors[f"best/{name}"] = value
    for name, parameter in trainable(model).items():
        tensors[f"model/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    state = {
        "step": position.step,
        "best_loss": position.best_loss,
        "losses": list(position.losses),
        "schedule": {
            key: value
            for key, value in schedule.state_dict().items()
            if isinstance(value, int | float | list)
            and all(isinstance(item, int | float) for item in _items(value))
        },
    }
    write_tensors(path, tensors, metadata={"state": orjson.dumps(state).decode()})


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: AdamW,
    schedule: LRScheduler,
    device: torch.device,
) -> Position:
    """Put everything back and return where the training stands."""
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        state = orjson.loads(file.metadata()["state"])
    load_trainable(model, _below(tensors, "model/"))
    for name, parameter in trainable(model).items():
        prefix, suffix = "optimizer/", f"/{name}"
        moments = {
            key.removeprefix(prefix).removesuffix(suffix): value
            for key, value in tensors.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(device) for key, value in moments.items()
        }
    schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    return Position(
        step=state["step"],
        best_loss=state["best_loss"],
        best=_below(tensors, "best/"),
        losses=tuple(state["losses"]),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
