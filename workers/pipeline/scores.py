"""From influence files to scores: every estimator on every layer group with every aggregation.

Shapes: T training samples, N those that are finite, F those that are compared, V validation
samples.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.audits.schemas import Configuration
from workers.influence.aggregation import AggregationOptions
from workers.influence.errors import NonFiniteInfluence
from workers.influence.estimators import (
    Baseline,
    CheckpointEstimator,
    Estimator,
    SampleEstimator,
    SampleFacts,
)
from workers.influence.evaluation import measure_detection
from workers.influence.layer_groups import UnknownLayers
from workers.pipeline.artifacts import Artifacts
from workers.pipeline.column_source import ColumnSource, InfluenceReader, LengthReader
from workers.pipeline.estimator_scores import EstimatorScores
from workers.pipeline.layout import ALL, ModelLayout
from workers.pipeline.probed_set import ProbedSet, ProbedSource
from workers.pipeline.related import Related, find_related
from workers.pipeline.training_facts import TrainingFacts
from workers.pipeline.validation_choice import ValidationChoice

PERCENTS = (10, 20, 30)
_STEPS = 1000


@dataclass(frozen=True)
class Scored:
    """What the ranking needs.

    Attributes:
        group_scores: score_T of the ranking's estimator and aggregation by layer group.
        configurations: every computed configuration with its detection, as stored.
        probed_scores: score_N of every configuration of a probed set, in the same order.
        warnings: what the user should know.
    """

    group_scores: dict[str, Tensor]
    configurations: list[dict[str, Any]]
    warnings: list[str]
    probed_scores: list[Tensor] = field(default_factory=list)


def detection(score_T: Tensor, is_noisy_T: Tensor | None) -> dict[str, float] | None:
    """Return how well the scores find the known noise, None without any."""
    if is_noisy_T is None or not bool(is_noisy_T.any()):
        return None
    fractions = [percent / 100 for percent in PERCENTS]
    measured = measure_detection(score_T, is_noisy_T, fractions=fractions)
    rates = {f"ndr_{percent}": rate for percent, rate in zip(PERCENTS, measured.rates, strict=True)}
    return {**rates, "auc_ndr": measured.auc_ndr}


def _options(ranking: Configuration) -> AggregationOptions:
    return AggregationOptions(
        vote_fraction=ranking.vote_fraction,
        trim_fraction=ranking.trim_fraction,
        common_share=ranking.common_share,
    )


class Scorer:
    """Turns the influence of an audit into scores.

    Args:
        artifacts: the audit's files.
        facts: of the training samples.
        layout: where modules stand in the model.
        validation: which validation samples count.
        num_checkpoints: how many an estimator of several checkpoints adds up.
        is_noisy_T: the known noise.
        confidence_T: of the samples' classes, out of sample.
        probed: the set with the probes in place, whose scores are asked for instead; `facts` are
            its own, and the probes are the noise.
        seed: of the random baseline.
        tick: is told how much of the work is done, and how much there is.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        facts: TrainingFacts,
        *,
        layout: ModelLayout,
        validation: ValidationChoice,
        num_checkpoints: int = 0,
        is_noisy_T: Tensor | None = None,
        confidence_T: Tensor | None = None,
        probed: ProbedSet | None = None,
        seed: int = 0,
        tick: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._artifacts, self._facts, self._layout = artifacts, facts, layout
        self._validation, self._num_checkpoints = validation, num_checkpoints
        self._is_noisy_T, self._seed, self._report = is_noisy_T, seed, tick
        self._told = (0, 1)
        self._confidence_T, self._probed = confidence_T, probed

    def score_all(
        self,
        estimators: Sequence[Estimator],
        *,
        aggregations: Sequence[str],
        ranking: Configuration,
        layer_groups: Sequence[str] | None = None,
        is_alone: bool = False,
    ) -> Scored:
        """Compute the scores of every configuration, and keep those of the ranking.

        Args:
            estimators: with their parameters.
            aggregations: names; the ranking's own is always among them.
            ranking: what ranks.
            layer_groups: layer expressions in place of the standard groups; an estimator takes
                those that it has.
            is_alone: compute with the ranking's `correct_only` alone, not with both.

        Raises:
            NonFiniteInfluence: an influence on a sample that is finite itself is NaN or infinite;
                names the training samples.
            InsufficientMemory: the disk has no room for the ranks of common_set.
            UnknownLayers: the ranking's estimator has no such layers.
        """
        names = list(dict.fromkeys(str(name) for name in (*aggregations, ranking.aggregation)))
        scored = Scored({}, [], [])
        for number, estimator in enumerate(estimators):
            is_ranking = estimator.name == ranking.estimator
            if isinstance(estimator, Baseline):
                score_T = self._score_baseline(estimator)
                self._keep_probed(scored, score_T)
                scored.configurations.append(self._configuration(score_T, estimator))
                if is_ranking:
                    scored.group_scores[ALL] = score_T
                continue

            def tick(share: float, number: int = number) -> None:
                self._tick(int(_STEPS * (number + share)), _STEPS * len(estimators))

            groups = self._groups(
                estimator, ranking.layers, layer_groups=layer_groups, is_ranking=is_ranking
            )
            if not groups:
                continue
            has_pairs = estimator.kind == "pairwise"
            choices: tuple[bool, ...] = (False,)
            if has_pairs:
                choices = (ranking.correct_only,) if is_alone else (False, True)
            scores = self._score(
                estimator, groups, names, ranking=ranking, choices=choices, tick=tick
            )
            for group, name, correct_only in itertools.product(groups, names, choices):
                tick(1.0)
                score_T = self._facts.spread(scores.get(group, name, correct_only=correct_only))
                self._keep_probed(scored, score_T)
                scored.configurations.append(
                    self._configuration(score_T, estimator, group, name, correct_only=correct_only)
                )
                # correct_only says nothing to an estimator without pairs
                is_asked = correct_only == ranking.correct_only or not has_pairs
                if is_ranking and is_asked and name == ranking.aggregation:
                    scored.group_scores[group] = score_T
            if is_ranking and has_pairs and not bool(self._is_correct(estimator).any()):
                scored.warnings.append(
                    "The model predicts no validation sample correctly, so correct_only would "
                    "have left none: all validation samples were used."
                )
        return scored

    def score_rankings(
        self, estimator: Estimator, rankings: Sequence[Configuration]
    ) -> list[Tensor]:
        """Return score_T by each of some rankings of one estimator.

        Rankings that differ in layers, aggregation and correct_only alone share a pass.

        Raises:
            NonFiniteInfluence, InsufficientMemory, UnknownLayers: as `score_all`.
        """
        if isinstance(estimator, Baseline):
            return [self._score_baseline(estimator)] * len(rankings)
        passes: dict[AggregationOptions, list[Configuration]] = {}
        for ranking in rankings:
            passes.setdefault(_options(ranking), []).append(ranking)
        scores: dict[AggregationOptions, EstimatorScores] = {}
        for options, members in passes.items():
            groups: dict[str, tuple[int, ...]] = {}
            for ranking in members:
                groups |= self._layout.groups_of(estimator, ranking.layers)
            scores[options] = self._score(
                estimator,
                groups,
                list(dict.fromkeys(str(ranking.aggregation) for ranking in members)),
                ranking=members[0],
                choices=sorted({_is_correct_only(estimator, ranking) for ranking in members}),
                tick=lambda _: self._keep_alive(),
            )
        return [
            self._facts.spread(
                scores[_options(ranking)].get(
                    ranking.layers,
                    str(ranking.aggregation),
                    correct_only=_is_correct_only(estimator, ranking),
                )
            )
            for ranking in rankings
        ]

    def find_related(self, estimator: Estimator, *, layers: str) -> Related | None:
        """Find what each training sample harms and helps most, by the rows of some layers.

        Returns:
            None where influence has no pairs.

        Raises:
            UnknownLayers: the estimator has no such layers.
        """
        if estimator.kind != "pairwise":
            return None
        return find_related(
            self._reader(estimator, self._artifacts, self._facts),
            self._facts,
            rows=self._layout.groups_of(estimator, layers)[layers],
            index_V=self._columns(estimator),
            keep_alive=self._keep_alive,
        )

    def _tick(self, done: int, total: int) -> None:
        self._told = done, total
        self._report(done, total)

    def _keep_alive(self) -> None:
        self._report(*self._told)

    def _groups(
        self,
        estimator: Estimator,
        layers: str,
        *,
        layer_groups: Sequence[str] | None,
        is_ranking: bool,
    ) -> dict[str, tuple[int, ...]]:
        own = {}
        try:
            own = self._layout.groups_of(estimator, layers)
        except UnknownLayers:
            if is_ranking:
                raise
        if layer_groups is None:
            return own or self._layout.standard_groups(estimator)
        groups = {
            asked: found
            for asked in layer_groups
            if (found := self._layout.rows_of(estimator, asked)) is not None
        }
        return groups | ({layers: own[layers]} if is_ranking else {})

    def _columns(self, estimator: Estimator) -> Tensor:
        """Return which columns of an estimator's files count: validation samples, or classes."""
        is_finite_V = self._validation.is_finite_V
        if estimator.kind == "class":
            # the column of a class without validation samples is zero: its ranks mean nothing
            class_C: Tensor = self._validation.class_V[is_finite_V].unique()
            return class_C
        return is_finite_V.nonzero().flatten()

    def _is_correct(self, estimator: Estimator) -> Tensor:
        """Return which of the columns that count `correct_only` keeps."""
        if estimator.kind == "pairwise":
            is_correct_V: Tensor = self._validation.is_correct_V[self._validation.is_finite_V]
            return is_correct_V
        num_columns = 1 if estimator.kind == "sample" else len(self._columns(estimator))
        return torch.ones(num_columns, dtype=torch.bool)

    def _reader(
        self, estimator: Estimator, artifacts: Artifacts, facts: TrainingFacts
    ) -> InfluenceReader:
        has_checkpoints = isinstance(estimator, CheckpointEstimator)
        return InfluenceReader(
            artifacts,
            estimator.name,
            facts,
            chosen_V=self._columns(estimator),
            checkpoints=range(self._num_checkpoints) if has_checkpoints else (None,),
        )

    def _source(self, estimator: Estimator, *, num_rows: int) -> ColumnSource:
        """Return an estimator's influence, with `num_rows` where it is made of lengths."""

        def read(artifacts: Artifacts, facts: TrainingFacts) -> ColumnSource:
            if isinstance(estimator, SampleEstimator):
                return LengthReader(estimator, facts, num_rows=num_rows)
            return self._reader(estimator, artifacts, facts)

        train, probed = read(self._artifacts, self._facts), self._probed
        if probed is None:
            return train
        return ProbedSource(train, read(probed.artifacts, probed.probe_facts), probed.is_probe_F)

    def _score(
        self,
        estimator: Estimator,
        groups: dict[str, tuple[int, ...]],
        names: Sequence[str],
        *,
        ranking: Configuration,
        choices: Sequence[bool],
        tick: Callable[[float], None],
    ) -> EstimatorScores:
        num_rows = 1 + max(row for rows in groups.values() for row in rows)
        source = self._source(estimator, num_rows=num_rows)
        try:
            return EstimatorScores(
                source,
                groups=groups,
                is_correct_K=self._is_correct(estimator),
                aggregations=names,
                options=_options(ranking),
                choices=choices,
                scratch=self._artifacts.ranks,
                tick=tick,
            )
        except NonFiniteInfluence as error:
            raise NonFiniteInfluence(
                f"the influence by {estimator.name}",
                positions=self._facts.compared_F[list(error.positions)].tolist(),
            ) from error

    def _score_baseline(self, estimator: Baseline) -> Tensor:
        facts = SampleFacts(
            loss_T=self._facts.loss_T,
            is_noisy_T=self._is_noisy_T,
            seed=self._seed,
            confidence_T=self._confidence_T,
        )
        return self._facts.put_first(estimator.score(facts))

    def _keep_probed(self, scored: Scored, score_T: Tensor) -> None:
        """Keep the scores of a probed set: it is small, and they are compared with one another."""
        if self._probed is not None:
            scored.probed_scores.append(score_T[self._facts.finite_N])

    def _detection(self, score_T: Tensor) -> dict[str, float] | None:
        if self._probed is None:
            return detection(score_T, self._is_noisy_T)
        # the others take no part
        return detection(score_T[self._facts.finite_N], self._probed.is_probe_N)

    def _configuration(
        self,
        score_T: Tensor,
        estimator: Estimator,
        group: str = ALL,
        aggregation: str | None = None,
        *,
        correct_only: bool = False,
    ) -> dict[str, Any]:
        return {
            "estimator": estimator.name,
            "layer_group": group,
            "aggregation": aggregation,
            "correct_only": correct_only,
            "detection": self._detection(score_T),
        }


def _is_correct_only(estimator: Estimator, ranking: Configuration) -> bool:
    """Return whether `correct_only` says something to the estimator, and is asked for."""
    return estimator.kind == "pairwise" and bool(ranking.correct_only)
