"""The API and the client run where no torch is installed."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "peft", "datasets", "safetensors"):
    sys.modules[name] = None
import app, winnow
count = 0
for package in (app, winnow):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""


def test_every_module_of_the_api_imports_with_torch_blocked() -> None:
    """All of app and of the client, in a process where importing torch fails."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
