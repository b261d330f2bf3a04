"""How near the estimate that an audit tells after its preparation comes to what it takes.

Each configuration runs as a whole audit in a fresh process. Memory is the highest resident memory
of the process from prepare to aggregate, disk the most that the audit's folder held.

    .venv/bin/python -m benchmarks.estimate [--only NAME ...]
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from app.embedded import embedded_postgres
from benchmarks.memory import MINILM, measure, minilm_request

NUM_TRAIN, NUM_VALIDATION = 400, 100
VOCABULARY = 16_000
CHEAP = {"estimators": ["grad_dot", "grad_cosine"], "ranking": {"estimator": "grad_cosine"}}
CURVED = {
    "estimators": ["grad_cosine", "datainf", "ekfac", "gauss_newton"],
    "ranking": {"estimator": "ekfac"},
}
FINE_TUNE = {"fine_tune": {"epochs": 1, "batch_size": 16}}
LONG = {"max_tokens": 192}


def encoder(folder: Path) -> dict[str, Any]:
    """Return a request for MiniLM with an adapter."""
    return minilm_request(folder, num_train=NUM_TRAIN, characters=2000) | LONG


def base_encoder(folder: Path) -> dict[str, Any]:
    """Return a request for MiniLM that is fine-tuned first."""
    return encoder(folder) | FINE_TUNE | {"model": {"reference": MINILM.as_uri()}}


def whole_encoder(folder: Path) -> dict[str, Any]:
    """Return a request for a MiniLM classifier that was fine-tuned in full."""
    request = encoder(folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
    model.save_pretrained(folder / "whole")
    for path in (*MINILM.glob("*token*"), *MINILM.glob("vocab*")):
        (folder / "whole" / path.name).write_bytes(path.read_bytes())
    return request | {"model": {"reference": (folder / "whole").as_uri()}}


def decoder(folder: Path) -> dict[str, Any]:
    """Return a request for a decoder of 8 blocks with random weights, fine-tuned first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "decoder")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "decoder")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(5, most)))

    for name, number in ((f"{NUM_TRAIN}", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        columns = {"prompt": [text(120) for _ in range(number)]}
        columns["completion"] = [text(60) for _ in range(number)]
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return {
        "task": "causal_lm",
        "model": {"reference": (folder / "decoder").as_uri()},
        "validation": {"reference": (folder / "validation.parquet").as_uri()},
        **LONG,
        **FINE_TUNE,
    }


CONFIGURATIONS: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any]]] = {
    "encoder, LoRA": (encoder, CHEAP),
    "encoder, LoRA, curvature": (encoder, CURVED),
    "encoder, LoRA, fine-tuned, auto": (base_encoder, {}),
    "encoder, full": (whole_encoder, CHEAP),
    "encoder, full, datainf": (whole_encoder, CHEAP | {"estimators": ["grad_cosine", "datainf"]}),
    "decoder, LoRA, fine-tuned": (decoder, CHEAP),
    "decoder, LoRA, curvature": (decoder, CURVED),
}


def main() -> None:
    """Run every configuration and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS))
    options = parser.parse_args()
    table = Table(title="Estimated before, measured after")
    for column in ("audit", "memory MB", "measured", "ratio", "disk MB", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "audit" else "right")
    for name in options.only:
        request_of, more = CONFIGURATIONS[name]
        with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as temporary:
            folder = Path(temporary)
            request = request_of(folder) | more
            request["ranking"] = {"layers": "all", "aggregation": "rank"} | more.get("ranking", {})
            with embedded_postgres(folder / "servers") as database_url:
                measured = measure(folder, request, NUM_TRAIN, database_url)
        told = measured.estimate
        pairs = (
            (told["memory_bytes"], max(measured.peaks.values())),
            (told["disk_bytes"], measured.disk_bytes),
        )
        cells = [f"{value / 1e6:.0f}" for pair in pairs for value in pair]
        ratios = [f"{estimated / found:.2f}" for estimated, found in pairs]
        table.add_row(name, *cells[:2], ratios[0], *cells[2:], ratios[1])
        print(name, measured.peaks, told, flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
