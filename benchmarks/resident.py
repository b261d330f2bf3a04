"""The highest resident memory of this process in each stage of an audit, from Linux' own count."""

from pathlib import Path

from app.work.models import Stage

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Return the highest resident memory since the count began."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def begin_anew() -> None:
    """Begin the count at what is resident now."""
    _FORGET.write_text("5")


class StagePeaks:
    """Takes the peak of every unit of work, in bytes, by stage."""

    def __init__(self) -> None:
        self.by_stage: dict[str, int] = {}
        begin_anew()

    def note(self, stage: Stage) -> None:
        """Count the unit that has ended to its stage."""
        self.by_stage[stage.value] = max(self.by_stage.get(stage.value, 0), peak_bytes())
        begin_anew()
