"""Where this worker computes, and how much memory there is."""

from typing import Literal

import psutil
import torch


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device; auto is the first CUDA device where there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def device_name(device: torch.device) -> str:
    """Return the device in words, as stored with an audit."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
