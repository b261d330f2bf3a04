"""Scores of the training set with the probes in place, from made-up files, equal slow oracles."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.audits.schemas import Configuration
from tests import oracles
from tests.influence import aggregation_oracles
from tests.pipeline import sample_files
from tests.pipeline.score_files import LAYOUT, NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION, ScoreFiles
from tests.pipeline.test_scorer import GROUPS
from workers.influence.estimators import ESTIMATORS
from workers.influence.probes import Probes
from workers.pipeline.artifacts import write_tensors
from workers.pipeline.confidence import OutOfSample
from workers.pipeline.findings import Findings
from workers.pipeline.layout import ModelLayout
from workers.pipeline.probed_set import ProbedSet
from workers.pipeline.scores import Scored, Scorer
from workers.pipeline.training_facts import TrainingFacts

AGGREGATIONS = ("mean", "rank", "vote")
INDEX = (1, 4, 5, 9, 12)
ESTIMATORS_WITH_FILES = ("grad_dot", "datainf", "outlier_gradient", "tracin_we", "repsim")
KINDS = [*ESTIMATORS_WITH_FILES, "self_influence"]


def first_group(estimator: str) -> str:
    return next(iter(GROUPS.get(estimator, {"all": ()})))


class ProbedFiles:
    """An audit's files with those of its probes, and the same in memory.

    Attributes:
        influence: of the training samples and of the probes by estimator, [rows, columns, T | P].
        takes_part_T: which training samples are ranked: no copy or original of them is broken.
    """

    def __init__(
        self,
        folder: Path,
        *,
        non_finite: Sequence[int] = (),
        non_finite_probes: Sequence[int] = (),
        cuts: Sequence[int] = (2,),
        **options: Any,
    ) -> None:
        self.files = ScoreFiles(
            folder, non_finite=non_finite, estimators=ESTIMATORS_WITH_FILES, **options
        )
        draw = torch.Generator().manual_seed(7)
        self.artifacts = self.files.artifacts
        self.label_T = torch.randint(NUM_CLASSES, (NUM_TRAIN,), generator=draw)
        self.train = sample_files.classes(self.artifacts.train, self.label_T.tolist())
        index_P = torch.tensor(INDEX)
        self.probes = Probes(index_P, (self.label_T[index_P] + 1) % NUM_CLASSES)
        count = len(index_P)
        self.is_finite_P = torch.ones(count, dtype=torch.bool)
        self.is_finite_P[list(non_finite_probes)] = False
        self.loss_P = torch.randn(count, generator=draw)
        self.squared_norm_MP = torch.rand(len(LAYOUT["modules"]), count, generator=draw)
        self.influence_P: dict[str, Tensor] = {}
        order_P = torch.randperm(count, generator=draw)
        self.shards = list(torch.tensor_split(order_P, list(cuts)))
        for name in ESTIMATORS_WITH_FILES:
            rows, columns, _ = self.files.influence[name].shape
            influence = torch.randn(rows, columns, count, generator=draw)
            influence[..., ~self.is_finite_P] = 0
            self.influence_P[name] = influence
        for number, part in enumerate(self.shards):
            self._write(number, part)
        is_left_out_T = ~self.files.is_finite_T
        is_left_out_T[index_P[~self.is_finite_P]] = True
        self.takes_part_T = ~is_left_out_T

    def _write(self, number: int, part: Tensor) -> None:
        artifacts = self.artifacts.probes
        for name, influence in self.influence_P.items():
            path = artifacts.influence(name, number)
            write_tensors(path, {"influence": influence[..., part]})
        facts = {
            "index": part,
            "loss": self.loss_P[part],
            "predicted": torch.zeros(len(part), dtype=torch.int32),
            "predicted_probability": torch.ones(len(part)),
            "given_probability": torch.ones(len(part)),
            "squared_norm": self.squared_norm_MP[:, part],
            "is_finite": self.is_finite_P[part],
        }
        write_tensors(artifacts.facts(number), facts)

    def probed(self, *, max_samples: int = 1000, seed: int = 0) -> ProbedSet:
        return ProbedSet.of(
            self.artifacts,
            self.train,
            TrainingFacts(self.artifacts, len(self.files.shards)),
            self.probes,
            num_shards=len(self.shards),
            max_samples=max_samples,
            seed=seed,
        )

    def scored(self, probed: ProbedSet, estimator: str, ranking: Configuration) -> Scored:
        scorer = Scorer(
            self.artifacts,
            probed.facts,
            layout=self.files.layout,
            validation=self.files.validation,
            is_noisy_T=probed.is_probe_T,
            probed=probed,
        )
        return scorer.score_all([ESTIMATORS[estimator]], aggregations=AGGREGATIONS, ranking=ranking)

    def scores(self, probed: ProbedSet, estimator: str, **ranking: Any) -> dict[str, Tensor]:
        """Return score_T by layer group."""
        ranking = {"layers": first_group(estimator), **ranking}
        configuration = Configuration(estimator=estimator, **ranking)
        return self.scored(probed, estimator, configuration).group_scores

    def columns(
        self, estimator: str, rows: Sequence[int], takes_part_T: Tensor, *, correct_only: bool
    ) -> Tensor:
        """Return the influence with the columns of the copies put in, [rows, columns, F]."""
        files = self.files
        kept = self.is_finite_P
        if estimator == "self_influence":
            influence = -files.squared_norm_MT[:, None]
            copies = -self.squared_norm_MP[:, None]
            is_used = torch.ones(1, dtype=torch.bool)
        else:
            influence, copies = files.influence[estimator], self.influence_P[estimator]
            is_used = files.validation.is_finite_V
            if estimator == "outlier_gradient":
                is_used = torch.tensor([True, False, True])  # the classes of the validation set
            elif correct_only:
                is_used = is_used & files.validation.is_correct_V
        probed = influence.clone()
        probed[..., self.probes.index_P[kept]] = copies[..., kept]
        return probed[list(rows)][:, is_used][..., takes_part_T]


@pytest.fixture
def broken(tmp_path: Path) -> ProbedFiles:
    """The third probe is not finite, nor is the original of the second, nor sample 7."""
    return ProbedFiles(
        tmp_path, non_finite=[4, 7], non_finite_probes=[2], non_finite_validation=[3]
    )


@pytest.mark.parametrize(("estimator", "aggregation"), list(itertools.product(KINDS, AGGREGATIONS)))
@pytest.mark.parametrize("correct_only", [False, True])
def test_scores_equal_those_of_the_influence_with_the_columns_of_the_copies(
    tmp_path: Path, estimator: str, aggregation: str, correct_only: bool
) -> None:
    files = ProbedFiles(tmp_path, non_finite=[7], non_finite_probes=[2])
    probed = files.probed()
    assert torch.equal(probed.facts.is_finite_T, files.takes_part_T)
    found = files.scores(
        probed,
        estimator,
        aggregation=aggregation,
        correct_only=correct_only,
        vote_fraction=0.3,
    )
    for group, score_T in found.items():
        columns = files.columns(
            estimator, GROUPS[estimator][group], files.takes_part_T, correct_only=correct_only
        )
        expected = aggregation_oracles.aggregate(columns, aggregation, vote_fraction=0.3)
        assert score_T[files.takes_part_T].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(found) >= {name for name in GROUPS[estimator] if name in LAYOUT["groups"]}


def test_the_loss_is_that_of_the_copies(broken: ProbedFiles) -> None:
    probed = broken.probed()
    expected_T = -broken.files.loss_T
    for place, sample in enumerate(INDEX):
        if place not in {1, 2}:
            expected_T[sample] = -broken.loss_P[place]
    takes_part_T = probed.facts.is_finite_T
    score_T = broken.scores(probed, "loss")["all"]
    assert torch.equal(score_T[takes_part_T], expected_T[takes_part_T])


def test_a_copy_or_an_original_that_is_not_finite_leaves_with_the_other(
    broken: ProbedFiles,
) -> None:
    probed = broken.probed()
    assert probed.is_probe_T.nonzero().flatten().tolist() == [1, 9, 12]
    assert (~probed.facts.is_finite_T).nonzero().flatten().tolist() == [4, 5, 7]
    assert probed.probe_facts.is_finite_T.tolist() == [True, False, False, True, True]
    assert probed.is_probe_N.tolist() == [i in {1, 9, 12} for i in range(13) if i not in {4, 5, 7}]
    for estimator in KINDS:
        score_T = broken.scores(probed, estimator)[first_group(estimator)]
        lowest = score_T[probed.facts.is_finite_T].min()
        assert bool((score_T[[4, 5, 7]] < lowest).all())


def test_how_well_the_copies_are_found_is_measured_on_those_that_take_part(
    broken: ProbedFiles,
) -> None:
    probed = broken.probed()
    scored = broken.scored(probed, "grad_dot", Configuration(estimator="grad_dot"))
    assert len(scored.configurations) == 6 * 3 * 2
    for row in scored.configurations:
        columns = broken.columns(
            "grad_dot",
            GROUPS["grad_dot"][row["layer_group"]],
            torch.ones(NUM_TRAIN, dtype=torch.bool),
            correct_only=row["correct_only"],
        )[..., probed.facts.is_finite_T]
        scores = aggregation_oracles.aggregate(columns, row["aggregation"])
        expected = oracles.auc_ndr(scores, probed.is_probe_N.tolist())
        assert row["detection"]["auc_ndr"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4), (0, 3, 5)], ids=["one", "five", "empty ones"])
def test_shards_of_the_probes_change_no_bit(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    """Nor do some without any probe."""
    one = ProbedFiles(tmp_path / "one", non_finite_probes=[2])
    other = ProbedFiles(tmp_path / "other", non_finite_probes=[2], cuts=cuts)
    for estimator in (*KINDS, "loss"):
        expected = one.scores(one.probed(), estimator, aggregation="mean")
        found = other.scores(other.probed(), estimator, aggregation="mean")
        assert expected
        for group, score_T in expected.items():
            assert torch.equal(found[group], score_T)


def test_a_large_training_set_takes_part_with_all_probes_and_some_others(
    broken: ProbedFiles,
) -> None:
    whole = broken.probed()
    parts = [broken.probed(max_samples=7, seed=seed) for seed in (0, 0, 1, 2, 3)]
    for part in parts:
        assert torch.equal(part.is_probe_T, whole.is_probe_T)
        assert len(part.facts.finite_N) == 7
        assert bool((whole.facts.is_finite_T | ~part.facts.is_finite_T).all())
        score_T = broken.scores(part, "repsim", aggregation="rank")["all"]
        columns = broken.columns(
            "repsim", GROUPS["repsim"]["all"], part.facts.is_finite_T, correct_only=False
        )
        expected = aggregation_oracles.aggregate(columns, "rank")
        assert score_T[part.facts.is_finite_T].tolist() == pytest.approx(expected, rel=1e-5)
    drawn = [tuple(part.facts.finite_N.tolist()) for part in parts]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2
    alone = broken.probed(max_samples=2)
    assert torch.equal(alone.facts.is_finite_T, whole.is_probe_T), "probes are never cut"


def test_copies_have_the_confidence_of_their_wrong_class(broken: ProbedFiles) -> None:
    draw = torch.Generator().manual_seed(0)
    train_TC = torch.rand(NUM_TRAIN, NUM_CLASSES, generator=draw)
    context = sample_files.context_of(broken.artifacts.root.parents[1])
    findings = Findings(
        train=broken.train,
        validation=None,
        facts=TrainingFacts(broken.artifacts, len(broken.files.shards)),
        validation_facts={},
        layout=ModelLayout.of(LAYOUT),
        labels=["a", "b", "c"],
        out_of_sample=OutOfSample(train_TC, torch.zeros(NUM_VALIDATION, NUM_CLASSES)),
    )
    probed = broken.probed()
    estimator = ESTIMATORS["confidence"]
    (score_T,) = findings.scorer(context, probed).score_rankings(
        estimator, [Configuration(estimator="confidence")]
    )
    (of_all_T,) = findings.scorer(context).score_rankings(
        estimator, [Configuration(estimator="confidence")]
    )
    for sample in range(NUM_TRAIN):
        label = int(broken.label_T[sample])
        if sample not in {4, 7}:
            assert of_all_T[sample] == train_TC[sample, label]
        if sample not in {4, 5, 7}:
            wrong = (label + 1) % NUM_CLASSES if sample in {1, 9, 12} else label
            assert score_T[sample] == train_TC[sample, wrong]
