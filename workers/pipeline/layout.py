"""Where the rows of an estimator's influence stand in the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from workers.influence.estimators import DotEstimator, Estimator, SampleEstimator
from workers.influence.layer_groups import UnknownLayers, block_name, resolve_layers
from workers.pipeline.artifacts import read_json

ALL, WORD_EMBEDDING = "all", "WE"


@dataclass(frozen=True)
class ModelLayout:
    """The modules whose gradients an audit takes.

    Attributes:
        modules: their names; a module of word embeddings is the last.
        layers: of every module the transformer block, None outside the blocks.
        groups: positions of modules by layer group.
        num_blocks: transformer blocks of the model.
        has_word_embedding: whether estimators of dot products look at the word embeddings too.
    """

    modules: Sequence[str]
    layers: Sequence[int | None]
    groups: Mapping[str, Sequence[int]]
    num_blocks: int
    has_word_embedding: bool

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what the validation stage wrote."""
        return cls.of(read_json(path))

    @classmethod
    def of(cls, layout: Mapping[str, Any]) -> Self:
        """Take over what the validation stage writes."""
        return cls(
            modules=layout["modules"],
            layers=layout["layers"],
            groups=layout["groups"],
            num_blocks=layout["blocks"],
            has_word_embedding=layout["word_embedding"] is not None,
        )

    def groups_of(self, estimator: Estimator, layers: str = ALL) -> dict[str, tuple[int, ...]]:
        """Return which rows of an estimator's influence every layer group has.

        The groups are `all`, `WE`, the bands of blocks and `CL`, as far as the estimator has rows
        in them, and `layers` as one more.

        Args:
            estimator: decides what its rows stand for: modules, blocks or the word embedding; a
                baseline has the one group `all` without rows.
            layers: a layer expression.

        Raises:
            UnknownLayers: the estimator has no such layers; says what there is.
        """
        groups, row_layers = self._rows(estimator)
        if layers not in groups:
            groups[layers] = resolve_layers(
                layers, groups=groups, layers=row_layers, num_blocks=self.num_blocks
            )
        return groups

    def check_layers(self, estimators: Sequence[Estimator], layers: str) -> None:
        """Check that one of several estimators at least has some layers.

        Raises:
            UnknownLayers: none has them; says what the last one with layers has.
        """
        asked = [each for each in estimators if each.has_layers] or list(estimators)
        for number, estimator in enumerate(asked, start=1):
            try:
                self.groups_of(estimator, layers)
            except UnknownLayers:
                if number == len(asked):
                    raise
            else:
                return

    def rows_of(self, estimator: Estimator, layers: str) -> tuple[int, ...] | None:
        """Return which rows some layers have, None where the estimator has no such layers."""
        try:
            return self.groups_of(estimator, layers)[layers]
        except UnknownLayers:
            return None

    def standard_groups(self, estimator: Estimator) -> dict[str, tuple[int, ...]]:
        """Return the same without one more."""
        return self._rows(estimator)[0]

    def members(self, layers: str) -> tuple[int, ...]:
        """Return the modules in a group or layer expression, none where it names none."""
        try:
            return resolve_layers(
                layers, groups=self.groups, layers=self.layers, num_blocks=self.num_blocks
            )
        except UnknownLayers:
            return ()

    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Return the modules of every single block that has some."""
        blocks = sorted({layer for layer in self.layers if layer is not None})
        return {
            block_name(block): tuple(
                module for module, layer in enumerate(self.layers) if layer == block
            )
            for block in blocks
        }

    def _rows(
        self, estimator: Estimator
    ) -> tuple[dict[str, tuple[int, ...]], Sequence[int | None]]:
        """Return the standard groups of an estimator's rows, and the block of each row."""
        match estimator.axis:
            case "none":
                return {ALL: ()}, ()
            case "word_embedding":
                return {WORD_EMBEDDING: (0,)}, (None,)
            case "blocks":
                return self._bands(), range(self.num_blocks)
        looks_at_words = self.has_word_embedding and isinstance(
            estimator, DotEstimator | SampleEstimator
        )
        groups = {
            name: tuple(members)
            for name, members in self.groups.items()
            if name != WORD_EMBEDDING or looks_at_words
        }
        return groups, self.layers

    def _bands(self) -> dict[str, tuple[int, ...]]:
        """Return the blocks of every band of blocks."""
        blocks = range(self.num_blocks)
        groups: dict[str, tuple[int, ...]] = {ALL: tuple(blocks)}
        for name, members in self.groups.items():
            layers = [self.layers[module] for module in members]
            ends = [layer for layer in layers if layer is not None]
            if name != ALL and len(ends) == len(layers):
                groups[name] = tuple(blocks[min(ends) : max(ends) + 1])
        return groups
