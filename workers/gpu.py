"""How full a worker's GPU is, asked of the driver: torch in the parent would take memory itself."""

import os
import shutil
import subprocess
from typing import Literal, NamedTuple

QUERY_SECONDS = 5
MEBIBYTE = 1024**2


class GpuMemory(NamedTuple):
    """Bytes of one GPU, in use by whatever process."""

    used: int
    total: int


def gpu_memory(device: Literal["auto", "cpu", "cuda"]) -> GpuMemory | None:
    """Return the memory of the GPU that this worker computes on; None where there is none."""
    tool = shutil.which("nvidia-smi")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if device == "cpu" or tool is None or gpu in {"", "-1"}:
        return None
    query = [tool, f"--id={gpu}", "--query-gpu=memory.used,memory.total"]
    try:
        answer = subprocess.run(  # noqa: S603  the query is ours
            [*query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=True,
        )
        used, total = (int(number) * MEBIBYTE for number in answer.stdout.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # a driver that does not tell is no reason to count as dead
    return GpuMemory(used, total)
