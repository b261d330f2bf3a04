"""Do one thing with a stranger's file in a process of its own, with bounded memory and time.

A process imports what is needed once and forks for every job; the child's peak is what the job
took. It speaks JSON by lines: {"job", "arguments"} in, what the job answered out.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

MEBIBYTE = 1024**2
ADDRESS_SPACE_BYTES = 3 * 1024**3
CPU_SECONDS = 100


class Isolated:
    """A process that does jobs of one module, each in a fork of its own.

    Args:
        module: whose functions are the jobs; each takes JSON and returns JSON.
    """

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.isolated", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Return what a job answered, with its peak of memory in MiB."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _status(name: str) -> int:
    """Return an entry of this process's status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) // 1024
    raise KeyError(name)


def _child(job: Any, arguments: dict[str, Any], answer_to: int) -> None:
    virtual = _status("VmSize") * MEBIBYTE
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDRESS_SPACE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    answer = job(**arguments)
    answer |= {"peak": _status("VmHWM") - before}
    os.write(answer_to, json.dumps(answer).encode())
    os._exit(0)


def _fork(job: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _child(job, arguments, writer)
        except BaseException as error:  # noqa: BLE001  whatever it is, the parent tells it
            os.write(writer, json.dumps({"crash": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(said) if said else {"killed": os.WTERMSIG(status)}
    return answer


def main(arguments: Sequence[str]) -> None:
    """Do jobs until there are no more."""
    module = importlib.import_module(arguments[0])
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answer = _fork(getattr(module, request["job"]), request["arguments"])
        os.write(out, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
