"""What a worker says of its GPU: what the driver says, and nothing where there is no GPU."""

import shutil
from pathlib import Path

import pytest

from workers.gpu import GpuMemory, gpu_memory


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi, first on the path; it keeps what it was asked."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "1024, 81559"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tool


def test_the_first_visible_gpu_is_asked_for(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f,GPU-60")
    assert gpu_memory("auto") == GpuMemory(1024 * 1024**2, 81559 * 1024**2)
    assert "--id=GPU-5f" in driver.with_name("asked").read_text()


def test_a_worker_without_a_gpu_has_none(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_memory("cpu") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_memory("auto") is None


def test_a_driver_that_fails_is_no_trouble(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert gpu_memory("auto") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_memory("auto") is None


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver on this machine")
def test_a_real_gpu_is_not_empty() -> None:
    memory = gpu_memory("cuda")
    assert memory is not None
    assert 0 <= memory.used <= memory.total
    assert memory.total > 2**30
