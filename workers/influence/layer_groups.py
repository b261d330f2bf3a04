"""Which modules an expression such as `02-03,05,CL` names."""

from collections.abc import Mapping, Sequence


class UnknownLayers(ValueError):
    """A layer expression names something that the model, or an estimator, does not have."""


def resolve_layers(
    expression: str,
    *,
    groups: Mapping[str, Sequence[int]],
    layers: Sequence[int | None],
    num_blocks: int,
) -> tuple[int, ...]:
    """Return the positions that a layer expression names, ascending, each once.

    Args:
        expression: names of groups, blocks (`04`) and ranges of blocks with both ends (`02-03`),
            with commas between them: their union.
        groups: positions by name, such as `layer_groups` gives.
        layers: of every position the transformer block, None outside the blocks.
        num_blocks: how many blocks the model has.

    Raises:
        UnknownLayers: a part of the expression names nothing; says which and what there is.
    """
    chosen: set[int] = set()
    for part in expression.split(","):
        name = part.strip()
        if name in groups:
            chosen.update(groups[name])
        else:
            chosen.update(_blocks(name, groups=groups, layers=layers, num_blocks=num_blocks))
    return tuple(sorted(chosen))


def block_name(block: int) -> str:
    """Return how a transformer block is named in expressions and tables."""
    return f"{block:02d}"


def _blocks(
    name: str,
    *,
    groups: Mapping[str, Sequence[int]],
    layers: Sequence[int | None],
    num_blocks: int,
) -> list[int]:
    known = _describe(groups, layers)
    ends = name.split("-")
    if not (len(ends) in {1, 2} and all(end.isdecimal() for end in ends)):
        raise UnknownLayers(f"there are no layers {name!r} here; there are {known}.")
    first, last = int(ends[0]), int(ends[-1])
    if first > last:
        raise UnknownLayers(f"the layers {name!r} end before they begin; there are {known}.")
    if last >= num_blocks:
        raise UnknownLayers(
            f"there is no block {block_name(last)} for the layers {name!r}: the model has "
            f"{num_blocks}, counted from 00; there are {known}."
        )
    chosen = [
        position
        for position, layer in enumerate(layers)
        if layer is not None and first <= layer <= last
    ]
    if not chosen:
        raise UnknownLayers(
            f"no gradients are taken in the layers {name!r}; there are {known}. An adapter or "
            "target_modules decide in which blocks they are."
        )
    return chosen


def _describe(groups: Mapping[str, Sequence[int]], layers: Sequence[int | None]) -> str:
    blocks = sorted({layer for layer in layers if layer is not None})
    names = list(groups)
    if not blocks:
        return ", ".join(names)
    is_gapless = blocks == list(range(blocks[0], blocks[-1] + 1))
    if is_gapless and len(blocks) > 1:
        return f"{', '.join(names)} and the blocks {block_name(blocks[0])} to " + block_name(
            blocks[-1]
        )
    return f"{', '.join(names)} and the blocks {', '.join(map(block_name, blocks))}"
