"""Open files of other people's folders, whatever is done to their names meanwhile."""

import os
import stat
from io import BufferedReader
from pathlib import Path

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_resolved(path: Path) -> BufferedReader:
    """Open a file by a path that was resolved and checked, and follow no symbolic link any more.

    A folder or file on the way that was swapped for a link since the check is refused, so that what
    is opened lies where the check saw it.

    Raises:
        OSError: a part of the path is a link now, or is gone, or it is no plain file.
    """
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            below = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = below
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path.name, flags, dir_fd=folder)
    finally:
        os.close(folder)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path} is no plain file")
    return file


def path_of(file: BufferedReader, path: Path) -> Path:
    """Return a path that opens the very file that is open, for as long as it is.

    Args:
        file: an open file.
        path: its own, for systems without /proc.
    """
    own = Path(f"/proc/self/fd/{file.fileno()}")
    return own if own.exists() else path
