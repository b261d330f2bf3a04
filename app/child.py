"""Become another program that does not outlive its parent.

    python -P -m app.child PARENT_PID SIGNAL PROGRAM [ARGUMENT…]

Linux sends the signal when the parent dies, however it dies; elsewhere the program just runs. A
process of its own does this, and not a `preexec_fn`, which is unsafe beside threads.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

PR_SET_PDEATHSIG = 1


def start_child(
    command: Sequence[str],
    *,
    death_signal: signal.Signals,
    environment: Mapping[str, str] | None = None,
    keep_files: Sequence[int] = (),
    log_file: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that Ctrl-C reaches only its parent.

    Call it from a thread that lives as long as the process does: for Linux, a parent is a thread.

    Args:
        command: the program and its arguments.
        death_signal: what the program gets when this process dies.
        environment: of the program; by default this process's own.
        keep_files: descriptors that the program inherits.
        log_file: descriptor that takes what the program prints; by default it is shown.
    """
    starter = [sys.executable, "-P", "-m", "app.child", str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen(  # noqa: S603  the caller's own command
        [*starter, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log_file,
        stderr=log_file,
        pass_fds=tuple(keep_files),
        start_new_session=True,
    )


def main() -> None:
    """Bind this process to its parent and become the program."""
    parent, death_signal, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent):  # it died before it was watched
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606  the same


if __name__ == "__main__":
    main()
