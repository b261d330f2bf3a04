"""A folder where the blocks of a page are executed, one after the other, as a reader would."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.docs.pages import Block

ADDRESS = "127.0.0.1:8000"  # where the pages say that the service is
LIMIT_SECONDS = 300
_REMEMBERING = """\
[ -f .shell-state ] && . ./.shell-state
set -aeuo pipefail
{code}
{{ export -p; declare -f; printf 'cd %q\\n' "$PWD"; }} > {state}
"""


class Reader:
    """One who does what a page says.

    Variables, functions and the folder last from one shell block of a page to the next, names from
    one Python block to the next. The address of the service is replaced by the real one.

    Attributes:
        folder: where the page is read.
        address: host and port of the service.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        self._names: dict[str, Any] = {"__name__": "__page__"}
        self._state = folder / ".shell-state"

    def do(self, block: Block) -> None:
        """Write the block to its file, or execute it.

        Raises:
            AssertionError: the shell ended with another status than 0.
            Exception: what the Python code raised.
        """
        code = self.addressed(block.code)
        if "file" in block.marks:
            path = self.folder / block.marks["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
        elif block.language == "sh":
            done = self.shell(code)
            assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout}"
        else:
            source = "\n" * block.line + code  # so that a traceback has the line of the page
            compiled = compile(source, block.page, "exec")
            # a thread of its own, as a program has: the browser's tests leave an event loop in ours
            with ThreadPoolExecutor(1) as thread:
                thread.submit(exec, compiled, self._names).result()

    def addressed(self, code: str) -> str:
        """Return code that talks to the service of the tests."""
        return code.replace(ADDRESS, self.address)

    def shell(self, code: str) -> "subprocess.CompletedProcess[str]":
        """Execute shell code; what it printed is in `stdout`."""
        script = _REMEMBERING.format(code=code, state=self._state)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=environment(self.address),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_SECONDS,
            check=False,
            text=True,
        )
        sys.stdout.write(done.stdout)  # pytest shows it when a later block fails
        return done


def environment(address: str, **more: str) -> dict[str, str]:
    """Return the environment of a reader who has activated .venv and has set nothing else."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    folder = Path(sys.executable).parent
    return others | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "WINNOW_URL": f"http://{address}",
        **more,
    }
