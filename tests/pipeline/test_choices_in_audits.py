"""What `auto` and `consensus` choose, against loops over all configurations of an audit.

Shapes: K configurations, T training samples, F those that take part, V validation samples.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from app.audits.models import Audit
from app.audits.schemas import AuditRequest, Configuration, RankingSpecification
from app.work.claims import Claim
from app.work.models import Stage
from tests import oracles
from tests.influence import aggregation_oracles
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import read_influence
from tests.pipeline.test_choosing import likeness
from tests.pipeline.test_probes_in_audits import (
    CONSENSUS,
    drawn,
    facts_of_probes,
    influence_of_probes,
)
from tests.pipeline.workplace import Workplace
from workers.lease import Hold
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.choosing import FLATTERED, Choice, choose, standard_error
from workers.pipeline.context import StageContext
from workers.pipeline.findings import Findings
from workers.pipeline.samples import SampleSet
from workers.pipeline.training_facts import TrainingFacts

GROUPS = {
    "all": range(10),
    "00": range(4),
    "01": range(4, 8),
    "CL": (8, 9),
}
"""Rows of A and B of query and value in two blocks, and of the head's weight and bias."""
PAIRWISE = ("grad_dot", "grad_cosine", "datainf", "gauss_newton")
AGGREGATIONS = ("mean", "rank", "vote")
Key = tuple[str, str, str, bool]


class Measured:
    """All configurations of an audit, with their scores of the probed set and of the real one.

    Attributes:
        is_probe: of every training sample.
        probed, real: score_T by configuration.
    """

    def __init__(self, workplace: Workplace, audit: Audit) -> None:
        artifacts = workplace.artifacts(audit.id)
        index_P, target_P = drawn(workplace, audit)
        facts = TrainingFacts(artifacts, audit.provenance["num_shards"])
        validation = SampleSet(artifacts.validation)
        predicted_V = read_tensors(artifacts.validation_facts)["predicted"]
        is_correct_V = predicted_V == validation.label_T
        assert 0 < int(is_correct_V.sum()) < len(validation)
        self.is_probe = [sample in index_P for sample in range(len(facts))]
        self.probed: dict[Key, list[float]] = {}
        self.real: dict[Key, list[float]] = {}
        for name in PAIRWISE:
            real_MVT = read_influence(workplace, audit, name)
            probed_MVT = real_MVT.clone()
            probed_MVT[..., index_P] = influence_of_probes(workplace, audit, name)
            for group, aggregation, correct_only in itertools.product(
                GROUPS, AGGREGATIONS, (False, True)
            ):
                key = (name, group, aggregation, correct_only)
                used_V = is_correct_V if correct_only else torch.ones_like(is_correct_V)
                for scores, influence in ((self.probed, probed_MVT), (self.real, real_MVT)):
                    columns = influence[list(GROUPS[group])][:, used_V]
                    scores[key] = aggregation_oracles.aggregate(columns, aggregation)
        train_TC = read_tensors(artifacts.out_of_sample)["train"]
        label_T = SampleSet(artifacts.train).label_T.clone()
        loss_T = -facts.loss_T
        self._add("confidence", self.real, train_TC.gather(1, label_T[:, None])[:, 0])
        self._add("loss", self.real, loss_T)
        label_T[index_P] = torch.tensor(target_P)
        loss_T[index_P] = -facts_of_probes(workplace, audit).loss_T
        self._add("confidence", self.probed, train_TC.gather(1, label_T[:, None])[:, 0])
        self._add("loss", self.probed, loss_T)
        self.auc_ndr = {
            key: oracles.auc_ndr(scores, self.is_probe) for key, scores in self.probed.items()
        }

    @staticmethod
    def _add(name: str, scores: dict[Key, list[float]], score_T: Tensor) -> None:
        scores[name, "all", "mean", False] = score_T.tolist()


def key_of(configuration: Configuration) -> Key:
    return (
        str(configuration.estimator),
        configuration.layers,
        str(configuration.aggregation),
        configuration.correct_only,
    )


def choice_of(workplace: Workplace, audit: Audit, **ranking: Any) -> Choice:
    """Choose anew among what an audit computed."""
    claim = Claim("unt_1", audit.id, Stage.AGGREGATE, position=0, epoch=1, attempts=1)
    context = StageContext(
        engine=workplace.engine,
        settings=workplace.settings,
        claim=claim,
        hold=Hold(workplace.engine, workplace.settings, claim),
        request=AuditRequest.model_validate(audit.request),
        provenance=audit.provenance,
        tenant=audit.tenant,
    )
    return choose(context, Findings.open(context), RankingSpecification.model_validate(ranking))


@pytest.fixture
def audit(workplace: Workplace, models: Models) -> Audit:
    return workplace.succeed(
        workplace.submit(
            models.encoder,
            train=workplace.table("train", tiny.reviews(40, seed=0)),
            validation=workplace.table("validation", tiny.reviews(7, seed=1)),
            fine_tune={"epochs": 3, "learning_rate": 1e-2, "batch_size": 8},
            estimators=list(PAIRWISE),
            ranking=CONSENSUS,
            probes={"fraction": 0.3},
        )
    )


OPEN: list[tuple[dict[str, Any], dict[int, set[Any]]]] = [
    ({}, {}),
    ({"aggregation": "vote"}, {2: {"vote"}}),
    ({"layers": "01"}, {1: {"01"}}),
    ({"layers": "CL", "aggregation": "mean"}, {1: {"CL"}, 2: {"mean"}}),
    ({"layers": "all", "correct_only": True}, {1: {"all"}, 3: {True}}),
    ({"correct_only": False}, {3: {False}}),
    ({"estimator": "datainf"}, {0: {"datainf"}}),
    ({"estimator": "grad_cosine", "layers": "00"}, {0: {"grad_cosine"}, 1: {"00"}}),
    (
        {"estimator": "grad_dot", "aggregation": "rank", "correct_only": True},
        {0: {"grad_dot"}, 2: {"rank"}, 3: {True}},
    ),
]


def test_the_choice_is_the_best_or_one_that_the_probes_cannot_tell_from_it(
    workplace: Workplace, audit: Audit
) -> None:
    """Of what a request leaves open; what it says stays as it is."""
    measured = Measured(workplace, audit)
    num_probes, num_samples = sum(measured.is_probe), len(measured.is_probe)
    has_layers = set(PAIRWISE)
    for asked, fixed in OPEN:
        keys = [
            key
            for key in measured.auc_ndr
            if all(key[part] in values for part, values in fixed.items() if key[0] in has_layers)
            and (key[0] in has_layers or not {0, 1} & set(fixed))
            and key[0] not in FLATTERED
        ]
        choice = choice_of(workplace, audit, **asked)
        chosen = key_of(choice.lead)
        assert chosen in keys, asked
        (member,) = choice.members
        assert member.auc_ndr == pytest.approx(measured.auc_ndr[chosen], abs=1e-9)
        best = max(measured.auc_ndr[key] for key in keys)
        error = standard_error(best, num_probes=num_probes, num_samples=num_samples)
        near = [key for key in keys if measured.auc_ndr[key] >= best - error - 1e-9]
        assert chosen in near, (asked, best, error, measured.auc_ndr[chosen])
        like = dict(zip(near, likeness([measured.probed[key] for key in near]), strict=True))
        assert like[chosen] >= max(like.values()) - 1e-9, (asked, chosen)
        evidence = choice.evidence
        assert evidence is not None
        assert (evidence["num_probes"], evidence["num_samples"]) == (num_probes, num_samples)
        told = [row["auc_ndr"] for row in evidence["configurations"]]
        assert told == sorted(told, reverse=True)


def test_a_consensus_is_the_weighted_mean_of_the_ranks_of_the_best_of_every_estimator(
    workplace: Workplace, audit: Audit
) -> None:
    measured = Measured(workplace, audit)
    members = audit.summary["choice"]["members"]
    assert {member["estimator"] for member in members} == {*PAIRWISE, "loss", "confidence"}
    assert len(members) == len(PAIRWISE) + 2
    sound = {key: auc for key, auc in measured.auc_ndr.items() if key[0] != "loss"}
    top = max(sound.values())
    total = [0.0] * len(measured.is_probe)
    others = sum(member["weight"] for member in members if member["estimator"] != "confidence")
    for member in members:
        key = key_of(Configuration(**{name: member[name] for name in Configuration.model_fields}))
        theirs = [auc for other, auc in measured.auc_ndr.items() if other[0] == key[0]]
        assert measured.auc_ndr[key] == pytest.approx(max(theirs), abs=1e-9)
        assert member["auc_ndr"] == pytest.approx(max(theirs), abs=1e-9)
        weight = min(1.0, math.exp((max(theirs) - top) / 0.02))
        if member["estimator"] == "confidence":
            weight = max(weight, others)
        assert member["weight"] == pytest.approx(weight, rel=1e-6)
        for sample, rank in enumerate(oracles.ranks(measured.real[key])):
            total[sample] += weight * rank
    weights = sum(member["weight"] for member in members)
    assert [member["weight"] for member in members] == sorted(
        (member["weight"] for member in members), reverse=True
    )
    expected = [value / weights / (len(total) - 1) for value in total]
    rows = sorted(workplace.ranked_rows(audit.id), key=lambda row: row.sample_index)
    assert [row.score for row in rows] == pytest.approx(expected, abs=1e-5)
    *groups, last = audit.summary["group_order"]
    assert (last, len(groups) > 1) == ("consensus", True), "standings by layer group, then fused"
    assert all(row.harmed_validation and row.helped_validation for row in rows)
