"""Room in the data directory: how much must be free, and what tells that there is none."""

import errno
import shutil
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from app.errors import StorageFull
from app.settings import Settings

LEAST_FREE_BYTES = 256 * 1024**2
WAITING = "storage"
"""What work is said to wait for that found the disk full."""

_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})
_DATABASE_FULL = "53100"
# as libraries say it that wrap the system's error in their own
_PHRASES = ("No space left on device", "Disk quota exceeded")


def has_room(folder: Path) -> bool:
    """Return whether a folder of the data directory has room for work to begin."""
    try:
        return shutil.disk_usage(folder).free >= LEAST_FREE_BYTES
    except OSError:
        return False


def wait_if_full(folder: Path) -> None:
    """Let work wait that is going to need more than there is, if the disk is full for everybody.

    Raises:
        OSError: there is no room; `is_disk_full` says so of it.
    """
    if not has_room(folder):
        raise OSError(errno.ENOSPC, _PHRASES[0], str(folder))


def require_room(settings: Settings) -> None:
    """Refuse what would have to wait for room.

    Raises:
        StorageFull: the data directory has less than work needs to begin.
    """
    if not has_room(settings.data_dir):
        raise StorageFull(
            "The server's data directory has no room for new work. Nothing was stored; delete "
            "audits or datasets that are not needed any more, or ask the operator for more room.",
            headers={"Retry-After": "60"},
        )


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it came from, says that a disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _ERRORS:
            return True
        driver_error = seen.orig if isinstance(seen, DBAPIError) else seen
        if getattr(driver_error, "sqlstate", None) == _DATABASE_FULL:
            return True
        if any(phrase in str(seen) for phrase in _PHRASES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
