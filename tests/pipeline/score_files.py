"""The files of an audit, made up: influence, facts and layout without any model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.audits.schemas import Configuration
from workers.influence.estimators import ESTIMATORS
from workers.pipeline.artifacts import Artifacts, write_tensors
from workers.pipeline.layout import ModelLayout
from workers.pipeline.scores import Scorer
from workers.pipeline.training_facts import TrainingFacts
from workers.pipeline.validation_choice import ValidationChoice

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES, NUM_BLOCKS, NUM_CHECKPOINTS = 13, 5, 3, 4, 2
LAYOUT: dict[str, Any] = {
    "modules": ["query.0", "value.0", "query.1", "query.3", "head", "words"],
    "parts": ["attention"] * 4 + ["head", "word_embedding"],
    "layers": [0, 0, 1, 3, None, None],
    "groups": {
        "all": [0, 1, 2, 3, 4],
        "WE": [5],
        "00": [0, 1],
        "01": [2],
        "03": [3],
        "CL": [4],
    },
    "blocks": NUM_BLOCKS,
    "word_embedding": 5,
}
NUM_ROWS = {
    "grad_dot": 6,
    "datainf": 5,
    "tracin": 5,
    "tracin_we": 1,
    "repsim": NUM_BLOCKS,
    "outlier_gradient": 5,
}
"""Rows of the influence files by estimator."""


class ScoreFiles:
    """Random influence of every kind of estimator, and the same in memory.

    Attributes:
        influence: [rows, columns, T] by estimator, of tracin the sum over the checkpoints.
        squared_norm_MT: what self_influence is made of.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        cuts: Sequence[int] = (6,),
        non_finite: Sequence[int] = (),
        non_finite_validation: Sequence[int] = (),
        estimators: Sequence[str] = tuple(NUM_ROWS),
        layout: dict[str, Any] = LAYOUT,
        num_train: int = NUM_TRAIN,
        num_validation: int = NUM_VALIDATION,
    ) -> None:
        """Write the files, the training set in a random order cut into shards at `cuts`."""
        self.artifacts = Artifacts(folder, "aud_1")
        self.layout = ModelLayout.of(layout)
        self.draw = torch.Generator().manual_seed(seed)
        self.is_finite_T = torch.ones(num_train, dtype=torch.bool)
        self.is_finite_T[list(non_finite)] = False
        is_finite_V = torch.ones(num_validation, dtype=torch.bool)
        is_finite_V[list(non_finite_validation)] = False
        # of the three classes one has no validation sample
        self.validation = ValidationChoice(
            is_finite_V=is_finite_V,
            is_correct_V=torch.arange(num_validation) % 2 == 0,
            class_V=torch.arange(num_validation) % 2 * 2,
        )
        order_T = torch.randperm(num_train, generator=self.draw)
        self.shards = [part for part in torch.tensor_split(order_T, list(cuts)) if len(part)]
        self.loss_T = self._random(num_train)
        self.squared_norm_MT = self._random(len(layout["modules"]), num_train).square()
        self.is_noisy_T = torch.arange(num_train) % 3 == 0
        self.influence = {name: self._write(name, num_train, num_validation) for name in estimators}
        for shard, index in enumerate(self.shards):
            write_tensors(
                self.artifacts.facts(shard),
                {
                    "index": index,
                    "loss": self.loss_T[index],
                    "predicted": torch.zeros(len(index), dtype=torch.int32),
                    "predicted_probability": torch.ones(len(index)),
                    "given_probability": torch.ones(len(index)),
                    "squared_norm": self.squared_norm_MT[:, index],
                    "is_finite": self.is_finite_T[index],
                },
            )

    def scorer(self, **options: Any) -> Scorer:
        return Scorer(
            self.artifacts,
            TrainingFacts(self.artifacts, len(self.shards)),
            layout=self.layout,
            validation=self.validation,
            num_checkpoints=NUM_CHECKPOINTS,
            is_noisy_T=self.is_noisy_T,
            **options,
        )

    def scores(self, estimator: str, aggregation: str, **ranking: Any) -> dict[str, Tensor]:
        """Return score_T by layer group."""
        specification = Configuration(estimator=estimator, aggregation=aggregation, **ranking)
        scored = self.scorer().score_all(
            [ESTIMATORS[estimator]], aggregations=[], ranking=specification
        )
        return scored.group_scores

    def columns(self, estimator: str, rows: Sequence[int], *, correct_only: bool) -> Tensor:
        """Return the influence that scores are made of, [rows, columns, F]."""
        if estimator == "self_influence":
            return -self.squared_norm_MT[list(rows), None][..., self.is_finite_T]
        is_used = self.validation.is_finite_V
        if estimator == "outlier_gradient":
            is_used = torch.tensor(
                [bool((self.validation.class_V[is_used] == label).any()) for label in range(3)]
            )
        elif correct_only:
            is_used = is_used & self.validation.is_correct_V
        return self.influence[estimator][list(rows)][:, is_used][..., self.is_finite_T]

    def _write(self, name: str, num_train: int, num_validation: int) -> Tensor:
        num_columns = NUM_CLASSES if name == "outlier_gradient" else num_validation
        parts = [
            self._random(NUM_ROWS[name], num_columns, num_train)
            for _ in range(NUM_CHECKPOINTS if name == "tracin" else 1)
        ]
        for checkpoint, part in enumerate(parts):
            part[..., ~self.is_finite_T] = 0
            for shard, index in enumerate(self.shards):
                path = self.artifacts.influence(
                    name, shard, checkpoint if name == "tracin" else None
                )
                write_tensors(path, {"influence": part[..., index]})
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)
