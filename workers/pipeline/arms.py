"""What the verification trains: which samples every arm keeps, and which label they have.

Shapes: T training samples.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from app.audits.schemas import Configuration
from app.audits.verification_schemas import ArmName, Configurations, Verify, ranking_name
from app.catalogue import ESTIMATORS, AggregationName, EstimatorName
from workers.influence.aggregation import order_by_score
from workers.influence.estimators import Estimator
from workers.pipeline.artifacts import Artifacts, read_json, read_tensors, write_json, write_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.draws import random_order
from workers.pipeline.samples import SampleSet
from workers.pipeline.scores import Scorer
from workers.pipeline.training_facts import TrainingFacts

_ARMS_ANYWAY = frozenset({EstimatorName.RANDOM, EstimatorName.ORACLE})


@dataclass(frozen=True)
class TrainingData:
    """What one training learns from.

    Attributes:
        is_kept_T: which samples.
        label_T: their classes where they differ from the given ones, else None.
    """

    is_kept_T: Tensor
    label_T: Tensor | None = None

    @property
    def digest(self) -> str:
        """The same for the same samples with the same labels, and only for those."""
        parts = [self.is_kept_T] if self.label_T is None else [self.is_kept_T, self.label_T]
        return hashlib.sha256(b"|".join(part.numpy().tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class PlannedArm:
    """One arm of the verification.

    Attributes:
        name: of the kind of arm, or of its ranking.
        ranking: what it filters by; None for an arm that is no ranking's.
        num_train: samples that are trained on.
        num_removed: samples that are left out.
        num_relabelled: samples whose label is another one.
        trainings: which training tells of the arm, for every seed; None where nothing is left to
            train on.
    """

    name: str
    ranking: dict[str, Any] | None
    num_train: int
    num_removed: int
    num_relabelled: int
    trainings: list[int | None]


@dataclass(frozen=True)
class PlannedTraining:
    """One training: a unit of work; arms that keep the same samples share it.

    Attributes:
        seed: of the head, the adapters, the batches and dropout.
        data: which of the plan's training data.
    """

    seed: int
    data: int


@dataclass(frozen=True)
class Plan:
    """All arms, and the trainings that tell of them."""

    arms: list[PlannedArm]
    trainings: list[PlannedTraining]

    def write(self, artifacts: Artifacts, data: Sequence[TrainingData]) -> None:
        """Keep the plan with its training data for the stages that follow."""
        tensors = {}
        for number, item in enumerate(data):
            tensors[f"kept/{number:05d}"] = item.is_kept_T
            if item.label_T is not None:
                tensors[f"label/{number:05d}"] = item.label_T
        write_tensors(artifacts.kept_sets, tensors)
        write_json(artifacts.plan, asdict(self))

    @classmethod
    def read(cls, artifacts: Artifacts) -> Self:
        """Read it back."""
        kept: dict[str, Any] = read_json(artifacts.plan)
        return cls(
            [PlannedArm(**arm) for arm in kept["arms"]],
            [PlannedTraining(**training) for training in kept["trainings"]],
        )


def read_training_data(artifacts: Artifacts, number: int) -> TrainingData:
    """Read one of a plan's training data."""
    label = read_tensors(artifacts.kept_sets, f"label/{number:05d}")
    return TrainingData(read_tensors(artifacts.kept_sets, f"kept/{number:05d}")[""], label.get(""))


def plan_verification(
    context: StageContext,
    verify: Verify,
    *,
    train: SampleSet,
    facts: TrainingFacts,
    scorer: Scorer,
    estimators: Sequence[Estimator],
    score_T: Tensor,
    lead: Configuration,
    suggested_T: Tensor | None,
    table: Sequence[Mapping[str, Any]],
) -> Plan:
    """Decide what is trained, and write it down.

    Args:
        context: the unit of work.
        verify: what is asked for.
        train: the training samples.
        facts: of them.
        scorer: scores the rankings.
        estimators: those of the audit, the rankings' own among them.
        score_T: of the audit's own ranking.
        lead: the configuration that ranks; its options are the table's.
        suggested_T: the classes that it suggests; None for those that the model predicts.
        table: the configurations that the audit computed.
    """
    rankings = rankings_of(verify, table, options=lead)
    orders = [order_by_score(scores_T) for scores_T in _scores(rankings, scorer, estimators)]
    arms: list[PlannedArm] = []
    data: dict[str, int] = {}
    distinct: list[TrainingData] = []
    trainings: dict[PlannedTraining, int] = {}

    def number_of(item: TrainingData) -> int:
        if item.digest not in data:
            data[item.digest] = len(distinct)
            distinct.append(item)
        return data[item.digest]

    def add(name: str, items: Sequence[TrainingData], ranking: dict[str, Any] | None) -> None:
        cells: list[int | None] = []
        for seed, item in zip(verify.seeds, items, strict=True):
            if bool(item.is_kept_T.any()):
                training = PlannedTraining(seed, number_of(item))
                cells.append(trainings.setdefault(training, len(trainings)))
            else:
                cells.append(None)
        first, num_relabelled = items[0], 0
        if first.label_T is not None:
            num_relabelled = int((first.label_T != train.label_T).sum())
        num_train = int(first.is_kept_T.sum())
        arms.append(
            PlannedArm(name, ranking, num_train, len(train) - num_train, num_relabelled, cells)
        )

    knows_noise = train.is_noisy_T is not None
    order_T = order_by_score(score_T)
    if suggested_T is None:
        suggested_T = facts.predicted_T.to(train.label_T.dtype)
    # of a sample that is not finite nothing is known
    suggested_T = torch.where(facts.is_finite_T, suggested_T, train.label_T)
    for arm in verify.arms_of(task=context.request.task, knows_noise=knows_noise):
        items = list(_data_of(arm, verify, train=train, suggested_T=suggested_T, order_T=order_T))
        add(arm.value, items, None)
        context.hold.keep_alive()
    for ranking, ranked_T in zip(rankings, orders, strict=True):
        item = TrainingData(kept_without_lowest(ranked_T, verify.fraction))
        add(ranking_name(ranking), [item] * len(verify.seeds), ranking.model_dump(mode="json"))
        context.hold.keep_alive()
    plan = Plan(arms, list(trainings))
    plan.write(context.artifacts, distinct)
    return plan


def rankings_of(
    verify: Verify, table: Sequence[Mapping[str, Any]], *, options: Configuration
) -> list[Configuration]:
    """Return what is filtered by beside the audit's own ranking, each order once.

    Args:
        verify: names some, and says whether the table's are among them.
        table: the configurations that the audit computed.
        options: the parameters of the table's aggregations.
    """
    rankings = {ranking_name(ranking): ranking for ranking in verify.rankings}
    for item in table:
        if verify.configurations is None or not _is_asked(verify.configurations, item):
            continue
        changes = {
            "estimator": EstimatorName(item["estimator"]),
            "layers": item["layer_group"],
            "aggregation": AggregationName(item["aggregation"] or options.aggregation),
            "correct_only": item["correct_only"],
        }
        ranking = options.model_copy(update=changes)
        rankings.setdefault(ranking_name(ranking), ranking)
    return list(rankings.values())


def _is_asked(configurations: Configurations, item: Mapping[str, Any]) -> bool:
    """Return whether one of the table's configurations is; correct_only needs pairs to say much."""
    estimators, aggregations = configurations.estimators, configurations.aggregations
    has_pairs = ESTIMATORS[item["estimator"]].kind == "pairwise"
    return (
        item["estimator"] not in _ARMS_ANYWAY
        and (estimators is None or item["estimator"] in estimators)
        and (aggregations is None or item["aggregation"] in {None, *aggregations})
        and (not has_pairs or item["correct_only"] in configurations.correct_only)
    )


def _scores(
    rankings: Sequence[Configuration], scorer: Scorer, estimators: Sequence[Estimator]
) -> list[Tensor]:
    """Return score_T by every ranking, estimator by estimator, in the order they are named in."""
    by_place: dict[int, Tensor] = {}
    for estimator in estimators:
        mine: dict[int, Configuration] = {
            place: ranking
            for place, ranking in enumerate(rankings)
            if ranking.estimator == estimator.name
        }
        by_place |= zip(mine, scorer.score_rankings(estimator, list(mine.values())), strict=True)
    return [by_place[place] for place in range(len(rankings))]


def _data_of(
    arm: ArmName, verify: Verify, *, train: SampleSet, suggested_T: Tensor, order_T: Tensor
) -> Iterator[TrainingData]:
    """Yield an arm's training data for every seed."""
    everything_T = torch.ones(len(train), dtype=torch.bool)
    for seed in verify.seeds:
        match arm:
            case ArmName.FULL:
                yield TrainingData(everything_T)
            case ArmName.FILTERED:
                yield TrainingData(kept_without_lowest(order_T, verify.fraction))
            case ArmName.RANDOM:
                drawn_T = random_order(len(train), seed=seed, purpose="removal at random")
                yield TrainingData(kept_without_lowest(drawn_T, verify.fraction))
            case ArmName.ORACLE:
                noisy_T = train.is_noisy_T
                yield TrainingData(everything_T if noisy_T is None else ~noisy_T)
            case ArmName.RELABELLED:
                is_high_T = kept_without_lowest(order_T, verify.fraction)
                label_T = torch.where(is_high_T, train.label_T, suggested_T)
                is_same = torch.equal(label_T, train.label_T)
                yield TrainingData(everything_T, None if is_same else label_T)


def kept_without_lowest(order_T: Tensor, fraction: float) -> Tensor:
    """Return a bool for each sample, False for the first `round(fraction · T)` of an order."""
    is_kept_T = torch.ones(len(order_T), dtype=torch.bool)
    is_kept_T[order_T[: round(fraction * len(order_T))]] = False
    return is_kept_T
