"""Take the gradients of the validation samples and hold them, module by module.

Shapes: V validation samples, L blocks, H hidden width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.influence.rows import GradientRows, HeldRows
from workers.pipeline.artifacts import write_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import wishes_of
from workers.pipeline.facts import Facts
from workers.pipeline.memory import in_batches, plan_batches
from workers.pipeline.runtime import Runtime


@dataclass(frozen=True)
class ValidationRows:
    """What one pass over the validation set gives, in the order of the file.

    Attributes:
        rows: by module.
        facts: losses, predictions, gradient lengths.
        hidden_LVH: the hidden states that were read, where an estimator asks for them.
    """

    rows: list[GradientRows]
    facts: Facts
    hidden_LVH: Tensor | None


def collect_validation(context: StageContext, runtime: Runtime) -> ValidationRows:
    """Take the validation gradients, on the CPU."""
    samples, num_modules = runtime.trusted, len(runtime.extractor.modules)
    held: list[HeldRows] = []
    hidden: list[Tensor] = []
    facts = Facts(len(samples), num_modules, features=wishes_of(context).features)
    batches = plan_batches(samples.length_T, runtime.limits)
    index_V = torch.cat(batches)

    def work(positions: slice, indices: Tensor) -> None:
        context.hold.tick(positions.start, len(samples))
        with runtime.pace.measure(int(samples.length_T[indices].sum())):
            sample = runtime.extract(samples, indices)
            rows = [part.to(torch.device("cpu")) for part in sample.gradients]
        facts.put(indices, sample)
        # what is kept comes last: a batch that runs out of memory is done again in halves
        holders = held or [HeldRows(len(samples)) for _ in rows]
        for holder, part in zip(holders, rows, strict=True):
            holder.put(indices, part)
        held[:] = holders
        if sample.hidden_LBH is not None:
            hidden.append(sample.hidden_LBH.cpu())

    runtime.limits = in_batches(
        index_V, samples.length_T[index_V], limits=runtime.limits, work=work
    )
    return ValidationRows(
        rows=[holder.rows() for holder in held],
        facts=facts,
        hidden_LVH=torch.cat(hidden, dim=1)[:, index_V.argsort()] if hidden else None,
    )


def write_rows(path: Path, rows: list[GradientRows]) -> None:
    """Write the rows of every module."""
    write_tensors(
        path,
        {
            f"{module:05d}/{name}": tensor
            for module, part in enumerate(rows)
            for name, tensor in part.tensors().items()
        },
    )
