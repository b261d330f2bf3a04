"""From influence files to scores: every estimator on every layer group with every aggregation.

One module at a time and one block of validation samples at a time: memory is bounded by the block,
never by modules × validation × training samples.

Shapes: T training samples, V validation samples, M modules, K related samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.audits.schemas import RankingSpecification
from workers.influence.aggregation import AGGREGATIONS, GroupAggregator
from workers.influence.estimators import ESTIMATORS, Baseline, SampleEstimator, SampleFacts
from workers.influence.evaluation import auc_ndr, noise_detection_rate
from workers.pipeline.artifacts import Artifacts, TensorFile

BLOCK_BYTES = 64 * 1024**2
NUM_RELATED = 5


@dataclass(frozen=True)
class Scored:
    """What the ranking needs.

    Attributes:
        group_scores: score_T of the ranking's estimator and aggregation by layer group.
        configurations: every computed configuration with its detection, as stored.
        warnings: what the user should know.
    """

    group_scores: dict[str, Tensor]
    configurations: list[dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True)
class Related:
    """Validation samples that each training sample harms and helps most.

    Attributes:
        harmed_KT, helped_KT: validation indices, the most affected first.
        harm_KT, help_KT: mean influence over the ranking's modules.
    """

    harmed_KT: Tensor
    harm_KT: Tensor
    helped_KT: Tensor
    help_KT: Tensor


class TrainingFacts:
    """The shards' facts, joined in the order of the training file."""

    def __init__(self, artifacts: Artifacts, num_shards: int) -> None:
        files = [TensorFile(artifacts.facts(shard)) for shard in range(num_shards)]
        self.shard_index = [file.rows("index") for file in files]
        back_T = torch.cat(self.shard_index).argsort()

        def join(name: str) -> Tensor:
            return torch.cat([file.rows(name) for file in files])[back_T]

        self.loss_T = join("loss")
        self.predicted_T = join("predicted")
        self.predicted_probability_T = join("predicted_probability")
        self.given_probability_T = join("given_probability")
        self._back_T = back_T
        self._files = files
        self.num_modules = files[0].shape("squared_norm")[0]

    def squared_norm_T(self, module: int) -> Tensor:
        """Return the squared gradient lengths of one module; they are not held in memory."""
        parts = [file.rows("squared_norm", module) for file in self._files]
        return torch.cat(parts)[self._back_T]

    def __len__(self) -> int:
        return len(self.loss_T)


class InfluenceReader:
    """Reads blocks of one estimator's influence, in the order of the training file."""

    def __init__(self, artifacts: Artifacts, estimator: str, shard_index: Sequence[Tensor]) -> None:
        self._shard_index = shard_index
        self._files = [
            TensorFile(artifacts.influence(estimator, shard)) for shard in range(len(shard_index))
        ]
        self.num_train = sum(len(index) for index in shard_index)
        self.num_validation = self._files[0].shape("influence")[1]

    def blocks(self) -> Iterator[slice]:
        """Yield the blocks of validation samples that keep memory bounded."""
        step = max(1, BLOCK_BYTES // (4 * self.num_train))
        for start in range(0, self.num_validation, step):
            yield slice(start, min(start + step, self.num_validation))

    def read(self, module: int, validation: slice) -> Tensor:
        """Return influence_VT of one module on a block of validation samples."""
        influence_VT = torch.empty(validation.stop - validation.start, self.num_train)
        for index, file in zip(self._shard_index, self._files, strict=True):
            influence_VT[:, index] = file.rows("influence", module, rows=validation)
        return influence_VT


def detection(score_T: Tensor, is_noisy_T: Tensor | None) -> dict[str, float] | None:
    """Return how well the scores find the known noise, None without any."""
    if is_noisy_T is None or not bool(is_noisy_T.any()):
        return None
    rates = {
        f"ndr_{percent}": noise_detection_rate(score_T, is_noisy_T, fraction=percent / 100)
        for percent in (10, 20, 30)
    }
    return {**rates, "auc_ndr": auc_ndr(score_T, is_noisy_T)}


def score_all(
    artifacts: Artifacts,
    facts: TrainingFacts,
    *,
    estimators: Sequence[str],
    ranking: RankingSpecification,
    groups: Mapping[str, Sequence[int]],
    is_correct_V: Tensor,
    is_noisy_T: Tensor | None,
    seed: int,
    tick: Callable[[int, int], None],
) -> Scored:
    """Compute the scores of every configuration, and keep those of the ranking."""
    configurations: list[dict[str, Any]] = []
    group_scores: dict[str, Tensor] = {}
    warnings: list[str] = []

    def keep(
        score_T: Tensor, name: str, group: str, aggregation: str | None, *, correct_only: bool
    ) -> None:
        configurations.append(
            {
                "estimator": name,
                "layer_group": group,
                "aggregation": aggregation,
                "correct_only": correct_only,
                "detection": detection(score_T, is_noisy_T),
            }
        )
        # correct_only says nothing to an estimator without validation samples
        is_asked = aggregation in {None, ranking.aggregation} and (
            correct_only == ranking.correct_only or not ESTIMATORS[name].needs_validation
        )
        if name == ranking.estimator and is_asked:
            group_scores[group] = score_T

    for number, name in enumerate(estimators):
        estimator = ESTIMATORS[name]
        if isinstance(estimator, Baseline):
            sample_facts = SampleFacts(loss_T=facts.loss_T, is_noisy_T=is_noisy_T, seed=seed)
            keep(estimator.score(sample_facts), name, "all", None, correct_only=False)
            continue
        is_pairwise = not isinstance(estimator, SampleEstimator)
        aggregator = GroupAggregator(
            groups,
            num_train=len(facts),
            vote_fraction=ranking.vote_fraction,
            is_correct_V=is_correct_V if is_pairwise else torch.ones(1, dtype=torch.bool),
        )
        for module, validation, influence_VT in _influence(artifacts, facts, name):
            tick(number * facts.num_modules + module, _total(estimators, facts))
            aggregator.add(module=module, influence_VT=influence_VT, validation=validation)
        if aggregator.correct_only_fell_back and name == ranking.estimator:
            warnings.append(
                "The model predicts no validation sample correctly, so correct_only would have "
                "left none: all validation samples were used."
            )
        for group in groups:
            for aggregation in AGGREGATIONS:
                for correct_only in (False, True) if is_pairwise else (False,):
                    score_T = aggregator.scores(group, aggregation, correct_only=correct_only)
                    keep(score_T, name, group, aggregation, correct_only=correct_only)
    return Scored(group_scores, configurations, warnings)


def _total(estimators: Sequence[str], facts: TrainingFacts) -> int:
    return len(estimators) * facts.num_modules


def _influence(
    artifacts: Artifacts, facts: TrainingFacts, name: str
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield module, block of validation samples and influence_VT, module by module."""
    estimator = ESTIMATORS[name]
    if isinstance(estimator, SampleEstimator):
        for module in range(facts.num_modules):
            influence_1T = estimator.influence(squared_norm_B=facts.squared_norm_T(module))
            yield module, slice(0, 1), influence_1T
        return
    reader = InfluenceReader(artifacts, name, facts.shard_index)
    for module in range(facts.num_modules):
        for validation in reader.blocks():
            yield module, validation, reader.read(module, validation)


def find_related(
    artifacts: Artifacts, facts: TrainingFacts, *, estimator: str, modules: Sequence[int]
) -> Related | None:
    """Find what each training sample harms and helps most; None where influence has no pairs."""
    if ESTIMATORS[estimator].kind != "pairwise":
        return None
    reader = InfluenceReader(artifacts, estimator, facts.shard_index)
    best: list[tuple[Tensor, Tensor]] = [
        (torch.empty(0, len(facts)), torch.empty(0, len(facts), dtype=torch.int64))
        for _ in range(2)
    ]
    for validation in reader.blocks():
        mean_VT = torch.zeros(validation.stop - validation.start, len(facts), dtype=torch.float64)
        for module in modules:
            mean_VT += reader.read(module, validation)
        mean_VT = (mean_VT / len(modules)).float()
        index_V1 = torch.arange(validation.start, validation.stop)[:, None]
        for side, is_helped in enumerate((False, True)):
            value, index = best[side]
            candidate = torch.cat([value, mean_VT])
            candidate_index = torch.cat([index, index_V1.expand_as(mean_VT)])
            order = candidate.argsort(dim=0, descending=is_helped, stable=True)[:NUM_RELATED]
            best[side] = (candidate.gather(0, order), candidate_index.gather(0, order))
    (harm_KT, harmed_KT), (help_KT, helped_KT) = best
    return Related(harmed_KT, harm_KT, helped_KT, help_KT)
