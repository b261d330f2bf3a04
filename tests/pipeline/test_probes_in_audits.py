"""The gradients and influence of probes, in whole audits, equal slow loops over the copies.

Shapes: M modules, T training samples, P probes, V validation samples.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from app.audits.models import Audit
from app.work.models import Stage
from tests import oracles
from tests.influence import estimator_oracles as slow
from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import (
    DOTS,
    TRAIN,
    VALIDATION,
    Oracle,
    assert_near,
    audit_of,
    module_names,
    read_influence,
)
from tests.pipeline.test_estimators import CURVATURES, SHARE, kronecker_factors
from tests.pipeline.workplace import Workplace, interrupted, results
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.column_source import InfluenceReader
from workers.pipeline.training_facts import TrainingFacts

AUTO = {"estimator": "auto", "layers": "auto", "aggregation": "auto"}
CONSENSUS = {"estimator": "consensus", "layers": "auto", "aggregation": "auto"}
PROBES = {"fraction": 0.5, "seed": 1}
Table = dict[str, Any]


def drawn(workplace: Workplace, audit: Audit) -> tuple[list[int], list[int]]:
    """Return which samples were copied, and the class or the sample that the copies get."""
    probes = read_tensors(workplace.artifacts(audit.id).drawn_probes)
    return probes["index"].tolist(), probes["target"].tolist()


def facts_of_probes(workplace: Workplace, audit: Audit) -> TrainingFacts:
    return TrainingFacts(workplace.artifacts(audit.id).probes, audit.provenance["num_probe_shards"])


def influence_of_probes(workplace: Workplace, audit: Audit, estimator: str) -> Tensor:
    """Read what an audit wrote of its probes, [rows, columns, P]."""
    facts = facts_of_probes(workplace, audit)
    reader = InfluenceReader(workplace.artifacts(audit.id).probes, estimator, facts)
    columns = slice(0, reader.num_columns)
    return torch.stack([reader.read(row, columns) for row in range(reader.num_rows)])


def copies(workplace: Workplace, audit: Audit, table: Table = TRAIN) -> Table:
    """Return the user's rows of the copied samples with their wrong targets."""
    index_P, target_P = drawn(workplace, audit)
    if "prompt" in table:
        return {
            "prompt": [table["prompt"][index] for index in index_P],
            "completion": [table["completion"][target] for target in target_P],
        }
    return {"text": [table["text"][index] for index in index_P], "label": target_P}


def joined(one: Table, other: Table) -> Table:
    return {name: [*one[name], *other[name]] for name in one}


def test_copies_of_classes_are_measured_like_samples_with_wrong_labels(
    workplace: Workplace, models: Models
) -> None:
    """By a curvature that sums over them too; the samples' own leaves them out."""
    asked = [*SHARE, "ekfac", "repsim", "self_influence"]
    place = workplace.with_settings(samples_per_shard=8)
    audit = audit_of(place, models, "auto", *asked, ranking=AUTO, probes=PROBES)
    assert audit.provenance["num_probe_shards"] > 1
    index_P, target_P = drawn(workplace, audit)
    assert len(index_P) == 13
    wrong = copies(workplace, audit)
    assert all(
        TRAIN["label"][index] != target for index, target in zip(index_P, target_P, strict=True)
    )
    model = loops.classifier(models.encoder, models.adapter)
    gradients, loss_P = oracles.loop_gradients(
        model, loops.review_ids(wrong), loops.review_labels(wrong)
    )
    facts = facts_of_probes(workplace, audit)
    assert_near(facts.loss_T, loss_P)
    train, validation = (loops.review_gradients(model, table) for table in (TRAIN, VALIDATION))
    factors = kronecker_factors(model, joined(TRAIN, wrong))
    names = module_names(workplace, audit)

    def ekfac_of(name: str) -> Oracle:
        return lambda v, g: slow.ekfac(v, g, factors=factors.get(name))

    for estimator in (*SHARE, "ekfac"):
        found_MVP = influence_of_probes(workplace, audit, estimator)
        assert len(found_MVP) == len(names)
        for module, name in enumerate(names):
            oracle = ekfac_of(name) if estimator == "ekfac" else (DOTS | CURVATURES)[estimator]
            of_all = torch.cat([train[name], gradients[name]])
            expected_VP = oracle(validation[name], of_all)[:, len(train[name]) :]
            assert_near(found_MVP[module], expected_VP, share=SHARE.get(estimator, 1e-4))
    for estimator, oracle in CURVATURES.items():
        found_MVT = read_influence(workplace, audit, estimator)
        for module, name in enumerate(names):
            assert_near(found_MVT[module], oracle(validation[name], train[name]), share=1e-4)
    for module, name in enumerate(names):
        squared_P = torch.cat([file.rows("squared_norm", module) for file in facts.files])
        back_P = torch.cat(facts.shard_index).argsort()
        assert_near(squared_P[back_P], gradients[name].double().square().sum(dim=1))
    # what a model makes of a text before it hears the label is the same for the copy
    repsim_LVT = read_influence(workplace, audit, "repsim")[..., index_P]
    assert_near(influence_of_probes(workplace, audit, "repsim"), repsim_LVT)


def test_copies_of_completions_are_measured_with_those_of_others(
    workplace: Workplace, models: Models
) -> None:
    train, validation = tiny.instructions(26, seed=0), tiny.instructions(7, seed=1)
    audit = workplace.with_settings(samples_per_shard=8).succeed(
        workplace.submit(
            models.llama,
            adapter=models.llama_adapter,
            task="causal_lm",
            train=workplace.table("train", train),
            validation=workplace.table("validation", validation),
            estimators=["grad_dot", "datainf", "gauss_newton"],
            ranking=AUTO,
            probes=PROBES,
        )
    )
    index_P, target_P = drawn(workplace, audit)
    assert 8 < len(index_P) <= 13
    wrong = copies(workplace, audit, train)
    assert sorted(index_P) == sorted(target_P), "exchanged among the copies"
    assert all(
        train["completion"][index] != completion
        for index, completion in zip(index_P, wrong["completion"], strict=True)
    )
    model = loops.language_model(models.llama, models.llama_adapter)
    of_probes, loss_P = oracles.loop_gradients(model, *loops.instruction_ids(wrong))
    assert_near(facts_of_probes(workplace, audit).loss_T, loss_P)
    of_train, of_validation = (
        loops.instruction_gradients(model, table) for table in (train, validation)
    )
    for estimator in ("grad_dot", "datainf", "gauss_newton"):
        oracle = (DOTS | CURVATURES)[estimator]
        found_MVP = influence_of_probes(workplace, audit, estimator)
        found_MVT = read_influence(workplace, audit, estimator)
        for module, name in enumerate(module_names(workplace, audit)):
            v, g = of_validation[name], of_train[name]
            of_all_VN = oracle(v, torch.cat([g, of_probes[name]]))
            assert_near(found_MVP[module], of_all_VN[:, len(g) :], share=2e-4)
            assert_near(found_MVT[module], oracle(v, g), share=2e-4)


class TestSameBytes:
    """The choice and all that follows depend on request and data, not on how work was cut."""

    @pytest.fixture
    def submit(self, workplace: Workplace, models: Models) -> Callable[..., str]:
        data = loops.sets(workplace, tiny.reviews(70, seed=0, labels=(0, 1)))

        def submit(**request: Any) -> str:
            return workplace.submit(
                models.encoder,
                adapter=models.adapter,
                **data,
                ranking=CONSENSUS,
                flag="auto",
                probes={"fraction": 0.4},
                **request,
            )

        return submit

    def told(self, workplace: Workplace, audit: Audit) -> tuple[Any, ...]:
        names = ("configurations", "choice", "noise", "num_flagged", "warnings")
        rows = [
            (row.sample_index, row.score, row.noise_probability, row.suggested_label)
            for row in workplace.ranked_rows(audit.id)
        ]
        return results(audit), [audit.summary[name] for name in names], rows

    def test_for_any_number_of_shards_and_with_gradients_kept_or_not(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        whole = workplace.with_settings(samples_per_shard=1000).succeed(submit())
        assert (whole.provenance["num_shards"], whole.provenance["num_probe_shards"]) == (1, 1)
        assert whole.provenance["keeps_gradients"]
        expected = self.told(workplace, whole)
        for changes in (
            {"samples_per_shard": 7},
            {"samples_per_shard": 7, "max_gradient_cache_bytes": 0},
            {"samples_per_shard": 1000, "max_gradient_cache_bytes": 20_000},
        ):
            cut = workplace.with_settings(**changes).succeed(submit())
            if changes["samples_per_shard"] == 7:
                assert cut.provenance["num_probe_shards"] > 2
            assert cut.provenance["keeps_gradients"] == ("max_gradient_cache_bytes" not in changes)
            assert self.told(workplace, cut) == expected, changes

    def test_wherever_the_work_on_the_probes_was_interrupted(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = self.told(workplace, workplace.succeed(submit()))
        stops = 0
        for stage, tick in (
            (Stage.PROBES, 1),
            (Stage.PROBES, 2),
            (Stage.CURVATURE, 9),
            (Stage.AGGREGATE, 3),
        ):
            audit_id = submit()
            claim = workplace.claim_stage(audit_id, stage)
            with interrupted(monkeypatch, tick=tick):
                workplace.execute(claim)
            stops += workplace.unit(claim).state != "done"
            assert self.told(workplace, workplace.succeed(audit_id)) == expected, (stage, tick)
        assert stops >= 3, "in the middle of the work, but where a stage has fewer steps"
