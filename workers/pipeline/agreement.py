"""How well projected scores agree with exact ones, on a sample of pairs.

Shapes: V, T samples of the validation and the training set.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.influence.evaluation import spearman
from workers.influence.gradients import GradientExtractor
from workers.influence.rows import GradientRows
from workers.pipeline.context import StageContext
from workers.pipeline.memory import FLOAT32, row_floats
from workers.pipeline.runtime import Runtime
from workers.pipeline.samples import SampleSet

NUM_QUERIES, NUM_TRAIN = 16, 64
SAMPLES_PER_BATCH = 8
MAX_HELD_BYTES = 1024**3


def compare_projection(context: StageContext, runtime: Runtime) -> dict[str, Any] | None:
    """Return the Spearman correlation of projected and exact dot products over pairs.

    Of validation and training samples; without a validation set of training samples alone.

    Returns:
        `spearman` of the sums over all modules, `by_group` of the sums over each layer group,
        `num_pairs` and the `dimension`; None for an audit whose gradients are exact.
    """
    wanted = context.request.model.projection
    projected_specs = [spec for spec in runtime.extractor.modules if spec.form == "projected"]
    if wanted is None or not projected_specs:
        return None
    exact = runtime.extractor.exact()
    longest = int(runtime.train.length_T.max())
    row_bytes = FLOAT32 * sum(row_floats(spec, num_tokens=longest) for spec in exact.modules)
    # exact rows are what projection was asked to avoid: few at a time, whatever the model
    most = max(2, MAX_HELD_BYTES // max(1, row_bytes))
    projected, true = (
        _dot_products(context, runtime, extractor, most=most)
        for extractor in (runtime.extractor, exact)
    )
    by_group = {
        name: _correlate(projected, true, members)
        for name, members in runtime.extractor.groups.items()
    }
    return {
        "dimension": wanted.dimension,
        "num_pairs": projected[0].numel(),
        "spearman": by_group["all"],
        "by_group": by_group,
    }


def _correlate(
    projected: Sequence[Tensor], true: Sequence[Tensor], members: Sequence[int]
) -> float:
    def total(dots: Sequence[Tensor]) -> Tensor:
        return torch.stack([dots[module] for module in members]).sum(dim=0).flatten()

    return round(spearman(total(projected), total(true)), 4)


def _spread(samples: SampleSet, number: int) -> Tensor:
    """Return samples spread evenly over the file."""
    return torch.linspace(0, len(samples) - 1, min(number, len(samples))).round().long()


def _dot_products(
    context: StageContext, runtime: Runtime, extractor: GradientExtractor, *, most: int
) -> list[Tensor]:
    """Return the dot products [V, T] of the pairs, float64, by module.

    Only the rows of the queries are held, and of one batch of training samples: `most` of each.
    """
    queries = runtime.validation or runtime.train
    index_V = _spread(queries, min(NUM_QUERIES, most))
    size = min(SAMPLES_PER_BATCH, most)
    held = [*_rows(context, runtime, extractor, queries, index_V.split(size))]
    query_rows = [GradientRows.concatenate(parts) for parts in zip(*held, strict=True)]
    del held
    batches = _spread(runtime.train, NUM_TRAIN).split(size)
    parts = [
        [one.dot(other).double().cpu() for one, other in zip(query_rows, rows, strict=True)]
        for rows in _rows(context, runtime, extractor, runtime.train, batches)
    ]
    return [torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)]


def _rows(
    context: StageContext,
    runtime: Runtime,
    extractor: GradientExtractor,
    samples: SampleSet,
    batches: Sequence[Tensor],
) -> Iterator[tuple[GradientRows, ...]]:
    """Yield the gradients of all modules, batch by batch."""
    for indices in batches:
        context.hold.keep_alive()
        inputs, targets = samples.batch(
            indices, pad_id=runtime.prepared.pad_id, device=runtime.device
        )
        yield extractor.extract(inputs, targets).gradients
