"""Whole audits, from the request to rows and files, for every form of model and data."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.audits.models import Audit
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import MAX_POSITIONS, reviews
from tests.pipeline.workplace import Workplace

EVERYTHING = ["grad_dot", "grad_cosine", "datainf", "self_influence", "loss", "random"]


def check_consistent(workplace: Workplace, audit: Audit) -> None:
    """Rows, files, and what the audit says of itself must tell one story."""
    training = workplace.training_rows(audit.id)
    ranked = workplace.ranked_rows(audit.id)
    assert len(training) == len(ranked) == audit.num_train
    assert len(workplace.validation_rows(audit.id)) == audit.num_validation
    assert [row.rank for row in ranked] == list(range(len(ranked)))
    assert sorted(row.sample_index for row in ranked) == list(range(len(ranked)))
    keys = [(row.score, row.sample_index) for row in ranked]
    assert keys == sorted(keys)
    assert sum(row.flagged for row in ranked) == audit.summary["num_flagged"]
    assert all(row.flagged == (row.rank < audit.summary["num_flagged"]) for row in ranked)
    place = audit.summary["group_order"].index(audit.request["ranking"]["layers"])
    assert all(row.group_scores[place] == row.score for row in ranked)
    assert all(row.group_ranks[place] == row.rank for row in ranked)
    for group in range(len(audit.summary["group_order"])):
        assert sorted(row.group_ranks[group] for row in ranked) == list(range(len(ranked)))

    folder = workplace.artifacts(audit.id).results(audit.summary["ranking_id"])
    table = pq.read_table(folder / "suspects.parquet").to_pylist()
    for row, filed in zip(ranked, table, strict=True):
        sample = training[row.sample_index]
        assert (row.rank, row.sample_index) == (filed["rank"], filed["index"])
        # PostgreSQL gives the shortest digits that name a float32, Parquet the float32 itself
        assert np.float32(row.score) == filed["score"]
        assert np.float32(sample.loss) == filed["loss"]
        for name in ("text", "text_pair", "given_label", "predicted_label", "is_noisy"):
            assert getattr(sample, name) == filed[name]
        assert row.given_label == sample.given_label

    accurate = [row.given_label == row.predicted_label for row in training]
    assert audit.summary["train_accuracy"] == sum(accurate) / len(accurate)
    assert audit.progress == 1
    assert not workplace.artifacts(audit.id).queries(0).parent.exists(), "scratch is left"
    assert {unit.state for unit in workplace.units(audit.id)} == {"done"}


def test_a_base_model_is_fine_tuned_and_audited(workplace: Workplace, models: Models) -> None:
    """Everything at once: fine-tuning, planted noise, every estimator, every stage timed."""
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            **workplace.reviews(num_train=120),
            fine_tune={"epochs": 5, "learning_rate": 2e-2, "batch_size": 8},
            plant_noise={"fraction": 0.2},
            estimators=EVERYTHING,
            ranking={"estimator": "datainf", "aggregation": "vote", "correct_only": True},
        )
    )
    check_consistent(workplace, audit)
    assert audit.summary["num_noisy"] == 24
    assert audit.summary["labels"] == ["neg", "pos"]
    assert audit.summary["detection"]["auc_ndr"] > 0.75  # random: 0.556
    assert set(audit.timings) == {
        "prepare",
        "fine_tune",
        "validation",
        "gradients",
        "curvature",
        "influence",
        "aggregate",
    }
    assert audit.provenance["num_shards"] > 1
    assert len(audit.provenance["validation_losses"]) == 5
    groups = audit.summary["group_order"]
    assert groups == ["all", "00", "01", "CL"]
    configurations = audit.summary["configurations"]
    pairwise = {"grad_dot", "grad_cosine", "datainf"}
    expected = {
        (name, group, aggregation, correct_only)
        for name in (*pairwise, "self_influence")
        for group in groups
        for aggregation in ("mean", "rank", "vote")
        for correct_only in ((False, True) if name in pairwise else (False,))
    } | {(name, "all", None, False) for name in ("loss", "random", "oracle")}
    found = [
        (c["estimator"], c["layer_group"], c["aggregation"], c["correct_only"])
        for c in configurations
    ]
    assert len(found) == len(expected)
    assert set(found) == expected
    (oracle,) = [c for c in configurations if c["estimator"] == "oracle"]
    assert oracle["detection"]["auc_ndr"] == 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_is_audited_as_it_is(
    workplace: Workplace, models: Models, precision: str
) -> None:
    """Nothing is trained; integer labels index the head's classes; no noise is known."""
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            adapter=models.adapter,
            train=workplace.table("train", reviews(30, seed=0, labels=(0, 1))),
            validation=workplace.table("validation", reviews(8, seed=1, labels=(0, 1))),
            ranking={"layers": "01"},
            flag={"count": 3},
            precision=precision,
        )
    )
    check_consistent(workplace, audit)
    assert audit.summary["num_flagged"] == 3
    assert audit.summary["num_noisy"] is None
    assert audit.summary["detection"] is None
    assert audit.summary["labels"] == ["0", "1"]
    assert audit.provenance["precision"] == precision
    assert audit.provenance["adapter_revision"]
    assert not set(audit.timings) & {"fine_tune", "curvature", "influence"}


def test_a_full_model_is_audited_by_the_modules_that_were_named(
    workplace: Workplace, models: Models
) -> None:
    """Three classes without names, planted noise over all of them, output projections only."""
    audit = workplace.succeed(
        workplace.submit(
            models.distilbert,
            train=workplace.table("train", reviews(40, seed=0, labels=(0, 1, 2))),
            validation=workplace.table("validation", reviews(10, seed=1, labels=(0, 1, 2))),
            target_modules=["out_lin"],
            plant_noise={"fraction": 0.5, "seed": 4},
            ranking={"estimator": "grad_dot", "layers": "CL"},
        )
    )
    check_consistent(workplace, audit)
    groups = audit.summary["layer_groups"]
    assert audit.summary["group_order"] == ["all", "00", "01", "02", "CL"]
    assert all(".out_lin.weight" in name for band in ("00", "01", "02") for name in groups[band])
    assert len(groups["CL"]) == 4  # DistilBERT's head: two layers with biases
    clean = reviews(40, seed=0, labels=(0, 1, 2))["label"]
    rows = workplace.training_rows(audit.id)
    flips = [(row.given_label != str(label)) for row, label in zip(rows, clean, strict=True)]
    assert sum(flips) == 20
    assert flips == [row.is_noisy for row in rows]
    shifts = {
        (int(row.given_label or 0) - label) % 3
        for row, label in zip(rows, clean, strict=True)
        if row.is_noisy
    }
    assert shifts == {1, 2}


def test_text_pairs_keep_their_second_text(workplace: Workplace, models: Models) -> None:
    """Pairs are tokenised together, and the second text is no decoration: it changes the loss."""
    pairs = reviews(20, seed=0)
    pairs["other"] = reviews(20, seed=9)["text"]
    columns = {"text": "text", "text_pair": "other"}
    audits = [
        workplace.succeed(
            workplace.submit(
                models.classifier,
                train=workplace.table("train", pairs) | {"columns": asked},
                validation=workplace.table("validation", pairs) | {"columns": asked},
            )
        )
        for asked in (columns, {"text": "text"})
    ]
    for audit in audits:
        check_consistent(workplace, audit)
    with_pairs, without = (workplace.training_rows(audit.id) for audit in audits)
    assert [row.text_pair for row in with_pairs] == pairs["other"]
    assert [row.text_pair for row in without] == [None] * 20
    assert [row.loss for row in with_pairs] != [row.loss for row in without]


@pytest.mark.parametrize("marks", [[True, False], [1, 0]])
def test_a_column_of_known_noise_is_used_to_measure(
    workplace: Workplace, models: Models, marks: list[Any]
) -> None:
    table = reviews(24, seed=0) | {"wrong": marks * 12}
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            train=workplace.table("train", table) | {"columns": {"noise": "wrong"}},
            validation=workplace.table("validation", reviews(8, seed=1)),
            ranking={"estimator": "oracle"},
        )
    )
    check_consistent(workplace, audit)
    assert audit.summary["num_noisy"] == 12
    assert audit.summary["detection"]["auc_ndr"] == 1.0
    assert [row.is_noisy for row in workplace.training_rows(audit.id)] == [True, False] * 12


@pytest.mark.parametrize("name", ["loss", "self_influence"])
def test_a_ranking_without_pairs_has_no_related_samples(
    workplace: Workplace, models: Models, name: str
) -> None:
    """correct_only means nothing to an estimator that looks at no validation sample."""
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            **workplace.reviews(num_train=20),
            ranking={"estimator": name, "correct_only": True},
        )
    )
    check_consistent(workplace, audit)
    rows = workplace.ranked_rows(audit.id)
    assert all(row.harmed_validation == row.helped_validation == [] for row in rows)


def test_texts_are_cut_to_the_positions_that_the_model_has(
    workplace: Workplace, models: Models
) -> None:
    """Neither the request nor this tokenizer knows a limit that the model could bear."""
    table = reviews(12, seed=0)
    table["text"][5] = "film " * 100
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            train=workplace.table("train", table),
            validation=workplace.table("validation", reviews(8, seed=1)),
            max_tokens=512,
        )
    )
    check_consistent(workplace, audit)
    assert workplace.training_rows(audit.id)[5].text == table["text"][5]
    assert MAX_POSITIONS < 100


def test_a_model_that_gets_nothing_right_still_ranks(workplace: Workplace, models: Models) -> None:
    """Without any correct prediction, correct_only falls back to all, and says so."""
    data = workplace.reviews(num_train=20)
    first = workplace.succeed(workplace.submit(models.classifier, **data))
    rows = workplace.validation_rows(first.id)
    swapped = {"neg": "pos", "pos": "neg"}
    wrong = {
        "text": [row.text for row in rows],
        "label": [swapped[str(row.predicted_label)] for row in rows],
    }
    if len(set(wrong["label"])) == 1:  # a table needs two labels
        wrong["text"].append(rows[0].text)
        wrong["label"].append(wrong["label"][0])
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            train=data["train"],
            validation=workplace.table("wrong", wrong),
            ranking={"correct_only": True},
        )
    )
    assert audit.summary["validation_accuracy"] == 0
    assert "no validation sample correctly" in audit.summary["warnings"][0]
