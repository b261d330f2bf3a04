"""A validation set for audits that name none: a part of the training set.

Fine-tuning leaves these samples out, so that what the model says of them is honest; they are ranked
all the same. Their labels may be wrong like any: rank and vote live with that, and the audit says
so.

Shapes: T training samples.
"""

import torch
from torch import Tensor

from app.shared_files import fetch
from workers.pipeline.artifacts import Artifacts, read_tensors, write_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.samples import MappedRows, write_samples

SPLIT_SHARE = 0.2
MAX_SPLIT = 500
_SEED_SPACE = 0x73706C69
_ROWS = 10_000


def split_off(context: StageContext) -> int:
    """Write the validation set and which samples it holds; return how many."""
    artifacts = context.artifacts
    rows = MappedRows(artifacts.train)
    num_train = int(rows.table.num_rows)
    count = min(MAX_SPLIT, max(1, round(SPLIT_SHARE * num_train)))
    generator = torch.Generator().manual_seed(_SEED_SPACE + context.request.seed)
    held_out = torch.randperm(num_train, generator=generator)[:count].sort().values
    batches = (
        batch
        for indices in held_out.split(_ROWS)
        for batch in rows.take(rows.table.column_names, indices).to_batches()
    )
    write_samples(artifacts.validation, batches, tick=lambda _: context.hold.keep_alive())
    # a single sample is all that there is to train on
    write_tensors(artifacts.held_out, {"index": held_out if count < num_train else held_out[:0]})
    return count


def is_trained_on(artifacts: Artifacts, num_train: int) -> Tensor:
    """Return which training samples fine-tuning may see, bool [T]."""
    is_seen_T = torch.ones(num_train, dtype=torch.bool)
    if fetch(artifacts.held_out):
        is_seen_T[read_tensors(artifacts.held_out)["index"]] = False
    return is_seen_T


def split_warning(count: int) -> str:
    """Return what the user should know."""
    return (
        f"No validation set was named, so {count:,} training samples stand in for one: fine-tuning "
        "left them out, and their labels may be wrong like any. Name a set that you trust in "
        "validation for a better ranking."
    )
