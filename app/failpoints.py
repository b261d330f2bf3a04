"""Named places where a test may kill this process or hold it up.

They do nothing unless WINNOW_FAILPOINTS names a folder; no operator sets it, so it is no setting.
In the folder a file `<point>:<action>:<anything>` is one order. The process that first comes to
the point takes the order by renaming it, so that each is carried out once. A point may be
narrowed: `<point>@<detail>:<action>:<anything>` waits for that detail alone.
"""

import os
import signal
import time
from pathlib import Path

import structlog

VARIABLE = "WINNOW_FAILPOINTS"
TAKEN = "taken"
DAWDLE_SECONDS = 20.0

_FOLDER = os.environ.get(VARIABLE)

log = structlog.get_logger()


def reach(point: str, detail: str = "") -> None:
    """Carry out an order that waits at this point, if there is one."""
    if _FOLDER is not None:
        _obey(Path(_FOLDER), point, detail)


def _obey(folder: Path, point: str, detail: str) -> None:
    for order in sorted(folder.glob(f"{point}*:*:*")):
        place, action, _ = order.name.split(":", 2)
        if place not in {point, f"{point}@{detail}"}:
            continue
        try:
            order.rename(folder / TAKEN / f"{order.name}:{os.getpid()}")
        except FileNotFoundError:
            continue  # another process was first
        log.warning("failpoint", point=point, detail=detail, action=action)
        _act(action)
        return


def _act(action: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill-parent":
            os.kill(os.getppid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "dawdle":
            time.sleep(DAWDLE_SECONDS)
        case _:
            raise ValueError(f"There is no action {action!r} at a failpoint.")
