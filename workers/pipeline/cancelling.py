"""The cancellation of layer groups, from what the shards' passes added up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from workers.influence.cancellation import Cancellation, CancellationSums
from workers.pipeline.artifacts import TensorFile
from workers.pipeline.layout import ModelLayout
from workers.pipeline.training_facts import TrainingFacts


def measure_cancellation(
    facts: TrainingFacts, groups: Mapping[str, Sequence[int]]
) -> dict[str, Cancellation]:
    """Return the cancellation of every group of modules; one module is held at a time."""
    sums = CancellationSums(groups, num_modules=facts.num_modules)
    for file in facts.files:
        sums.add_samples(
            absolute_sum_M=file.rows("absolute_sum"), squared_norm_MT=file.rows("squared_norm")
        )
    for module in sorted({module for modules in groups.values() for module in modules}):
        sums.set_total(module, _total(facts.files, module))
    return sums.result()


def describe_cancellation(
    facts: TrainingFacts, layout: ModelLayout, *, expressions: Sequence[str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return what the audit tells of cancellation.

    Args:
        facts: of the training samples.
        layout: where the modules stand.
        expressions: further layers, the ranking's own among them.

    Returns:
        `cancellation` of every layer group, of every block, and of `expressions`;
        `module_cancellation` of every single module, by name.
    """
    groups = {**layout.groups, **layout.blocks()}
    for layers in expressions:
        if (members := layout.members(layers)) and layers not in groups:
            groups[layers] = members
    # one name is one module's: no layer group begins with a dot
    single = {f".{name}": (module,) for module, name in enumerate(layout.modules)}
    measured = measure_cancellation(facts, {**groups, **single})
    return {
        "cancellation": {name: asdict(measured[name]) for name in groups},
        "module_cancellation": {name[1:]: asdict(measured[name]) for name in single},
    }


def _total(files: Sequence[TensorFile], module: int) -> Tensor:
    """Return Σ_i g_i of a module; of word embeddings the rows of the tokens that occur, [U, H]."""
    name, tokens = f"total/{module:05d}", f"total_tokens/{module:05d}"
    files = [file for file in files if name in file]  # not where a shard has nobody to compare
    parts = [file.rows(name) for file in files]
    if tokens not in files[0]:
        total, *others = parts
        for part in others:
            total += part
        return total
    _, place_P = torch.cat([file.rows(tokens) for file in files]).unique(return_inverse=True)
    rows_PH = torch.cat(parts)
    total_UH = rows_PH.new_zeros(int(place_P.max()) + 1 if len(place_P) else 0, rows_PH.shape[1])
    return total_UH.index_add_(0, place_P, rows_PH)
