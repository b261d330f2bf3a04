"""Take the gradients of the validation samples and hold them, module by module.

Shapes: V validation samples, L blocks, H hidden width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.influence.rows import GradientRows
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
    parts: list[list[GradientRows]] = [[] for _ in range(num_modules)]
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
        # what is appended comes last: a batch that runs out of memory is done again in halves
        for module, part in enumerate(rows):
            parts[module].append(part)
        if sample.hidden_LBH is not None:
            hidden.append(sample.hidden_LBH.cpu())

    runtime.limits = in_batches(
        index_V, samples.length_T[index_V], limits=runtime.limits, work=work
    )
    back_V = index_V.argsort()
    rows: list[GradientRows] = []
    for part in parts:  # module by module, so that only one is held twice
        rows.append(GradientRows.concatenate(part).select(back_V))
        part.clear()
    return ValidationRows(
        rows=rows,
        facts=facts,
        hidden_LVH=torch.cat(hidden, dim=1)[:, back_V] if hidden else None,
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
