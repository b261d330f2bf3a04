"""What each further dot-product-like estimator adds to the gradient and influence stage.

The same pass as benchmarks.gradients: MiniLM-L6 with LoRA (r = 4, query and value), one thread, CPU
seconds. Gradients and their dot products with the validation gradients are computed once, however
many estimators an audit has; each estimator's own arithmetic on them is timed beside it.

Run it: `.venv/bin/python -m benchmarks.estimators`
"""

import argparse
import time
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gradients import build_batches, build_model, dense_rows, load_samples
from workers.influence.estimators import ESTIMATORS, DotEstimator
from workers.influence.gradients import GradientExtractor
from workers.influence.rows import DenseRows
from workers.pipeline.shard_influence import row_statistics

STAGE = "gradients and dot products"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-train", type=int, default=500)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, texts, labels = load_samples()
    split = options.num_validation
    extractor = GradientExtractor(build_model())
    held = build_batches(texts[:split], labels[:split], max_samples=options.batch_size)
    validation = [
        DenseRows(rows)
        for rows in dense_rows([extractor.extract(*each).gradients for each in held])
    ]
    known = [row_statistics(rows, with_sums=True) for rows in validation]
    end = split + options.num_train
    seconds: dict[str, float] = defaultdict(float)
    estimators = [each for each in ESTIMATORS.values() if isinstance(each, DotEstimator)]
    for batch in build_batches(texts[split:end], labels[split:end], max_samples=options.batch_size):
        started = time.process_time()
        gradients = extractor.extract(*batch).gradients
        dots = [one.dot(other) for one, other in zip(validation, gradients, strict=True)]
        seconds[STAGE] += time.process_time() - started
        for estimator in estimators:
            started = time.process_time()
            for module, rows in enumerate(gradients):
                train = row_statistics(rows, with_sums=estimator.needs_entry_sums)
                estimator.influence(dot_VB=dots[module], validation=known[module], train=train)
            seconds[estimator.name] += time.process_time() - started
    table = Table(title=f"{options.num_train} training × {split} validation samples")
    for heading in ("what", "CPU s", "of the stage"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, spent in seconds.items():
        table.add_row(name, f"{spent:.2f}", f"{100 * spent / seconds[STAGE]:.1f} %")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
