"""The tables of an experiment against slow, obvious counting, and against SciPy."""

import itertools
import math
from collections import defaultdict
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from app.experiments import tables
from app.experiments.rows import FACTORS, Cell, Row, rows_of_audit

CELLS = [Cell("reviews", "bert", 0), Cell("reviews", "bert", 1), Cell("questions", "bert", 0)]
PATIENTLY = settings(deadline=None, max_examples=40)
VALUES = [0.0, 0.25, 0.5, 0.5, 0.75]  # ties are common


def make_row(cell: Cell = CELLS[0], **changes: Any) -> Row:
    options: dict[str, Any] = {
        "is_baseline": False,
        "estimator": "grad_dot",
        "layer_group": "00-01",
        "layer_position": "band 1 of 4",
        "aggregation": "mean",
        "correct_only": False,
        "detection": {},
        "cancellation": {},
        "measured": {},
        "num_train": 10,
    }
    return Row(cell=cell, **options | changes)


def make_rows(random: Random) -> list[Row]:
    """Return some of the configurations in every cell, with few distinct values."""
    rows = []
    factors = (["dot", "cosine", "inf"], ["00", "01", "CL"], ["mean", "rank"], [False, True])
    for cell in CELLS:
        for estimator, group, aggregation, correct_only in itertools.product(*factors):
            if random.random() < 0.6:
                value = random.choice([None, *VALUES])
                rows.append(
                    make_row(
                        cell,
                        estimator=estimator,
                        layer_group=group,
                        aggregation=aggregation,
                        correct_only=correct_only,
                        detection={} if value is None else {"auc_ndr": value},
                        measured={"accuracy": random.choice(VALUES), "loss": random.choice(VALUES)},
                    )
                )
    return rows


row_sets = st.integers(0, 2**32).map(lambda seed: make_rows(Random(seed)))


def slow_win_rates(rows: list[Row], factor: str) -> dict[str, tuple[float, int]]:
    """Compare every pair of rows that may be compared, both ways."""
    wins: dict[str, float] = defaultdict(float)
    number: dict[str, int] = defaultdict(int)
    others = [name for name in FACTORS if name != factor] if factor in FACTORS else []
    for one, other in itertools.permutations(rows, 2):
        mine, theirs = one.value("auc_ndr"), other.value("auc_ndr")
        is_fair = one.cell == other.cell and all(
            getattr(one, name) == getattr(other, name) for name in others
        )
        if mine is not None and theirs is not None and is_fair:
            wins[level(one, factor)] += 1 if mine > theirs else 0.5 if mine == theirs else 0
            number[level(one, factor)] += 1
    return {name: (wins[name] / number[name], number[name]) for name in number}


def level(row: Row, factor: str) -> str:
    if factor in FACTORS:
        return str(getattr(row, factor))
    return "/".join(row.configuration)


@PATIENTLY
@given(row_sets, st.sampled_from([*FACTORS, tables.CONFIGURATION]))
def test_win_rates_are_those_of_comparing_pair_by_pair(rows: list[Row], factor: str) -> None:
    found = tables.win_rates(
        rows, measure="auc_ndr", factor=factor, level_of=lambda row: level(row, factor)
    )
    expected = slow_win_rates(rows, factor)
    assert {rate.level: rate.num_comparisons for rate in found} == {
        name: number for name, (_, number) in expected.items()
    }
    for rate in found:
        assert rate.win_rate == pytest.approx(expected[rate.level][0])
    assert [rate.win_rate for rate in found] == sorted(
        (rate.win_rate for rate in found), reverse=True
    )


@PATIENTLY
@given(row_sets)
def test_what_one_wins_the_other_loses(rows: list[Row]) -> None:
    found = tables.win_rates(
        rows, measure="auc_ndr", factor="estimator", level_of=lambda row: row.estimator
    )
    wins = sum(rate.win_rate * rate.num_comparisons for rate in found)
    assert wins == pytest.approx(sum(rate.num_comparisons for rate in found) / 2)


@PATIENTLY
@given(st.lists(st.tuples(st.sampled_from(VALUES), st.sampled_from(VALUES)), max_size=12))
def test_spearman_is_scipys(points: list[tuple[float, float]]) -> None:
    first, second = [x for x, _ in points], [y for _, y in points]
    found = tables.spearman(first, second)
    if len(points) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


@PATIENTLY
@given(row_sets)
def test_correlations_are_scipys_in_every_cell(rows: list[Row]) -> None:
    found = tables.correlate_configurations(rows, predictor="auc_ndr", outcome="negative_loss")
    assert [item.cell for item in found] == list(dict.fromkeys(row.cell for row in rows))
    for item in found:
        points = [
            (row.detection["auc_ndr"], -float(row.measured["loss"] or 0))
            for row in rows
            if row.cell == item.cell and row.detection
        ]
        assert item.num_points == len(points)
        if item.spearman is not None:
            expected = spearmanr([x for x, _ in points], [y for _, y in points]).statistic
            assert item.spearman == pytest.approx(expected, abs=1e-12)


def test_a_layer_groups_point_is_the_mean_over_its_configurations() -> None:
    """Cancellation is the group's own; all, which is made of the others, is left out."""
    accuracies = {"00": (0.1, 0.3), "01": (0.5, 0.9), "CL": (0.4, 0.2), "all": (1.0, 1.0)}
    cancellation = {"00": 5.0, "01": 1.0, "CL": 3.0, "all": 9.0}
    rows = [
        make_row(
            layer_group=group,
            aggregation=aggregation,
            cancellation={"cancellation_l1": cancellation[group]},
            measured={"accuracy": accuracy},
        )
        for group, pair in accuracies.items()
        for aggregation, accuracy in zip(("mean", "rank"), pair, strict=True)
    ]
    (found,) = tables.correlate_layer_groups(rows, predictor="cancellation_l1", outcome="accuracy")
    expected = spearmanr([5.0, 1.0, 3.0], [0.2, 0.7, 0.3]).statistic
    assert found.spearman == pytest.approx(expected)
    assert found.num_points == 3


@PATIENTLY
@given(row_sets)
def test_the_best_has_the_highest_mean_over_all_cells(rows: list[Row]) -> None:
    found = tables.best_configuration(rows, measure="accuracy")
    cells = {row.cell for row in rows}
    means = {}
    for configuration in {row.configuration for row in rows}:
        members = [row for row in rows if row.configuration == configuration]
        if {row.cell for row in members} == cells:
            means[configuration] = math.fsum(row.measured["accuracy"] or 0 for row in members) / (
                len(members)
            )
    if found is None:
        assert not means
    else:
        assert found.means["accuracy"] == pytest.approx(max(means.values()))
        assert means[found.row.configuration] == pytest.approx(max(means.values()))


def test_the_best_stands_beside_the_baselines() -> None:
    rows = [
        make_row(detection={"auc_ndr": 0.8}, measured={"accuracy": 0.7, "loss": 0.5}),
        make_row(estimator="datainf", detection={"auc_ndr": 0.9}, measured={"accuracy": 0.6}),
        make_row(estimator="full", is_baseline=True, measured={"accuracy": 0.65, "loss": 0.6}),
        make_row(estimator="loss", is_baseline=True, detection={"auc_ndr": 0.95}),
    ]
    by_detection = tables.best_configuration(rows, measure="auc_ndr")
    by_accuracy = tables.best_configuration(rows, measure="accuracy")
    assert by_detection is not None
    assert by_accuracy is not None
    assert by_detection.row.estimator == "datainf"
    assert by_accuracy.row.estimator == "grad_dot"
    assert by_accuracy.means == {"auc_ndr": 0.8, "accuracy": 0.7, "negative_loss": -0.5}
    assert by_accuracy.beside == {
        "full": {"accuracy": 0.65, "negative_loss": -0.6},
        "loss": {"auc_ndr": 0.95},
    }


class TestRowsOfAnAudit:
    DETECTION = {"ndr_10": 0.1, "ndr_20": 0.2, "ndr_30": 0.3, "auc_ndr": 0.6}  # noqa: RUF012

    def item(self, **changes: Any) -> dict[str, Any]:
        return {
            "estimator": "grad_dot",
            "layer_group": "all",
            "aggregation": "mean",
            "correct_only": False,
            "detection": self.DETECTION,
        } | changes

    def arm(self, name: str, accuracy: float | None, **ranking: Any) -> dict[str, Any]:
        return {
            "name": name,
            "ranking": ranking or None,
            "num_train": 7,
            "metrics": {"accuracy": {"mean": accuracy, "values": [accuracy]}},
        }

    def rows(self, **request: Any) -> dict[tuple[Any, ...], Row]:
        ranking = {"layers": "all", "aggregation": "mean", "correct_only": False}
        summary = {
            "layer_group_order": ["all", "WE", "00-01", "02-03", "CL"],
            "cancellation": {"all": {"l1": 4.0, "l2": None}},
            "configurations": [
                self.item(),
                self.item(correct_only=True),
                self.item(aggregation="rank"),
                self.item(estimator="self_influence"),
                self.item(layer_group="02-03"),
                self.item(estimator="loss", aggregation=None),
                self.item(estimator="random", aggregation=None),
                self.item(estimator="oracle", aggregation=None),
            ],
            "verification": {
                "arms": [
                    self.arm("full", 0.5),
                    self.arm("random", 0.4),
                    self.arm("oracle", 0.9),
                    self.arm("grad_dot/all/mean", 0.7, estimator="grad_dot", **ranking),
                    self.arm("loss/all/mean", 0.8, estimator="loss", **ranking),
                ]
            },
        }
        asked = {
            "layer_groups": None,
            "estimators": ["grad_dot", "self_influence"],
            "aggregations": ["mean"],
            "correct_only": [False],
        }
        found = rows_of_audit(CELLS[0], summary, request=asked | request)
        return {
            (row.estimator, row.layer_group, row.aggregation, row.correct_only): row
            for row in found
        }

    def test_they_are_the_configurations_that_were_asked_for_and_the_baselines(self) -> None:
        assert set(self.rows()) == {
            ("grad_dot", "all", "mean", False),
            ("grad_dot", "02-03", "mean", False),
            ("self_influence", "all", "mean", False),
            ("loss", None, None, False),
            ("random", None, None, False),
            ("oracle", None, None, False),
            ("full", None, None, False),
        }
        assert ("grad_dot", "all", "mean", False) not in self.rows(correct_only=[True])
        # which validation samples count says nothing to an estimator without pairs
        assert ("self_influence", "all", "mean", False) in self.rows(correct_only=[True])
        assert ("grad_dot", "all", "mean", False) not in self.rows(layer_groups=["02-03"])

    def test_each_has_what_it_detected_and_what_its_filtered_model_is_worth(self) -> None:
        rows = self.rows()
        row = rows["grad_dot", "all", "mean", False]
        assert (row.detection, row.measured, row.num_train) == (
            self.DETECTION,
            {"accuracy": 0.7},
            7,
        )
        assert row.cancellation == {"cancellation_l1": 4.0, "cancellation_l2": None}
        assert rows["grad_dot", "02-03", "mean", False].measured == {}
        accuracy = {key[0]: row.measured.get("accuracy") for key, row in rows.items()}
        assert accuracy["loss"] == 0.8
        assert accuracy["random"] == 0.4
        assert accuracy["oracle"] == 0.9
        assert rows["full", None, None, False].detection == {}

    def test_a_band_is_named_by_its_place_in_the_model(self) -> None:
        rows = self.rows()
        assert rows["grad_dot", "02-03", "mean", False].layer_position == "band 2 of 2"
        assert rows["grad_dot", "all", "mean", False].layer_position == "all"
