"""The API is installed without torch, so none of its modules may need it."""

import subprocess
import sys

BLOCKED = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "peft", "datasets", "numpy", "safetensors"):
    sys.modules[name] = None  # importing it fails
import app
modules = [info.name for info in pkgutil.walk_packages(app.__path__, "app.")]
for module in modules:
    if not module.endswith("__main__"):
        importlib.import_module(module)
print(len(modules))
"""


def test_every_module_of_app_imports_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
