"""What `winnow doctor` looks at where the service is installed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from pydantic import ValidationError
from winnow.commands.findings import Finding

from app.doctor_servers import check_servers
from app.errors import NotReady
from app.health import check_storage
from app.settings import Settings
from app.shared_files import bucket_of
from app.storage import LEAST_FREE_BYTES
from app.verbs import explain
from app.work.models import SIGN_OF_LIFE_SECONDS

if TYPE_CHECKING:
    from app.bucket import Bucket

ENOUGH_FREE_BYTES = 10 * 1024**3  # a gradient cache may take twice as much, an upload a fifth
TORCH_SECONDS = 120.0
SHOWN = ("torch", "transformers", "peft", "celery", "sqlalchemy", "fastapi")

_LOOK_AT_TORCH = """
import json, torch
found = {"version": torch.__version__, "built_for": torch.version.cuda, "names": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        size = torch.cuda.get_device_properties(index).total_memory / 1024**3
        found["names"].append(f"{torch.cuda.get_device_name(index)} ({size:.0f} GiB)")
print(json.dumps(found))
"""


def look_around() -> Iterator[Finding]:
    """Yield what is found here: libraries, GPU, disk and, where they are set, the servers."""
    yield check_libraries()
    try:
        settings = Settings()
    except ValidationError as error:
        yield Finding("settings", "fail", explain(error), "Correct these environment variables.")
        return
    yield check_settings(settings)
    yield check_gpu(settings)
    yield check_disk(settings)
    bucket = bucket_of(settings)
    if bucket is not None:
        yield check_bucket(bucket)
    if settings.database_url is None:
        yield Finding(
            "servers",
            "ok",
            "WINNOW_DATABASE_URL is not set here: `winnow serve` brings its own database and "
            "broker, and its API tells of them.",
        )
        return
    yield from check_servers(settings)


def check_libraries() -> Finding:
    """Compare what is installed with what this version asks for."""
    extras = ["", "worker"] if find_spec("torch") else [""]
    wrong = []
    for line in metadata.requires("winnow") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    if wrong:
        advice = f"{sys.executable} -m pip install --upgrade 'winnow[worker]'"
        return Finding("libraries", "fail", "; ".join(wrong) + ".", advice)
    names = [name for name in SHOWN if find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return Finding("libraries", "ok", f"Python {sys.version.split()[0]}, {versions}.")


def check_gpu(settings: Settings) -> Finding:
    """Look, in a process of its own, at what torch can compute on."""
    if find_spec("torch") is None:
        return Finding(
            "gpu",
            "warn",
            "There is no torch: the API runs here, workers do not.",
            "For workers: pip install 'winnow[worker]'",
        )
    try:
        done = subprocess.run(  # noqa: S603  our own program
            [sys.executable, "-c", _LOOK_AT_TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_SECONDS,
            check=True,
        )
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        last = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        return Finding("gpu", "fail", f"torch cannot be used: {last}", "Install torch anew.")
    if found["names"]:
        return Finding("gpu", "ok", f"{', '.join(found['names'])}, CUDA {found['built_for']}.")
    has_driver = shutil.which("nvidia-smi") is not None
    built = f"torch {found['version']}"
    if settings.device == "cuda" or has_driver:
        return Finding(
            "gpu",
            "fail" if settings.device == "cuda" else "warn",
            f"{built} sees no GPU"
            + (", though there is an NVIDIA driver." if has_driver else " (WINNOW_DEVICE=cuda)."),
            "Install a build of torch for the driver's CUDA (https://pytorch.org), or set "
            "WINNOW_DEVICE=cpu.",
        )
    return Finding("gpu", "ok", f"No GPU; workers compute on the CPU ({built}).")


def check_disk(settings: Settings) -> Finding:
    """Look at the data directory, or at where it will be made."""
    folder = settings.data_dir
    if not folder.exists():
        return Finding(
            "disk",
            "ok" if settings.database_url is None else "fail",
            f"{folder} is not there yet.",
            "`winnow serve` makes it; for `winnow api` and `winnow worker` make a folder that all "
            "of them share, and name it in WINNOW_DATA_DIR.",
        )
    check = check_storage(settings)
    free = shutil.disk_usage(folder).free
    if check.ok and free < ENOUGH_FREE_BYTES:
        advice = "Delete audits or datasets, or add room, before large audits need it."
        return Finding("disk", "warn", f"{folder}: {check.detail}", advice)
    advice = f"It needs {LEAST_FREE_BYTES / 1024**2:.0f} MiB, and a user who may write there."
    return Finding(
        "disk",
        "ok" if check.ok else "fail",
        f"{folder}: {check.detail}",
        None if check.ok else advice,
    )


def check_bucket(bucket: "Bucket") -> Finding:
    """Put, read and delete an object where the service's files are."""
    try:
        bucket.try_out()
    except NotReady as error:
        advice = "docs/scaling.md (Shared files) lists what its key must be allowed."
        return Finding("bucket", "fail", str(error.detail), advice)
    return Finding("bucket", "ok", "It can be listed, written, read and deleted from.")


def check_settings(settings: Settings) -> Finding:
    """Look for settings that are each right and do not go together."""
    wrong = [sentence for is_so, sentence in _contradictions(settings) if is_so]
    if wrong:
        advice = "docs/configuration.md says what each is for."
        return Finding("settings", "warn", " ".join(wrong), advice)
    return Finding("settings", "ok", "They go together.")


def _contradictions(settings: Settings) -> Iterator[tuple[bool, str]]:
    yield (
        3 * settings.heartbeat_seconds > settings.lease_seconds,
        (
            "WINNOW_LEASE_SECONDS is less than three times WINNOW_HEARTBEAT_SECONDS: a worker that "
            "misses one renewal loses its work."
        ),
    )
    yield (
        settings.worker_stale_seconds < 2 * SIGN_OF_LIFE_SECONDS,
        (
            f"WINNOW_WORKER_STALE_SECONDS is less than {2 * SIGN_OF_LIFE_SECONDS}: workers, which "
            f"tell of themselves every {SIGN_OF_LIFE_SECONDS} s, count as gone."
        ),
    )
    yield (
        0 < settings.audit_days < settings.influence_days,
        "WINNOW_AUDIT_DAYS is less than WINNOW_INFLUENCE_DAYS: influence goes with its audit.",
    )
    yield (
        (settings.database_url is None) != (settings.broker_url is None),
        (
            "Only one of WINNOW_DATABASE_URL and WINNOW_BROKER_URL is set: `winnow api` and "
            "`winnow worker` need both."
        ),
    )
    missing = [str(root) for root in settings.file_roots if not root.is_dir()]
    yield bool(missing), f"WINNOW_FILE_ROOTS names what is no folder here: {', '.join(missing)}."
    certificates = settings.webhook_ca_file
    yield (
        certificates is not None and not certificates.is_file(),
        f"WINNOW_WEBHOOK_CA_FILE is no file here: {certificates}.",
    )
    yield (
        settings.webhook_plain_http and not settings.webhook_networks,
        "WINNOW_WEBHOOK_PLAIN_HTTP lets messages go unencrypted to public addresses.",
    )
