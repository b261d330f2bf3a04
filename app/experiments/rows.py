"""The rows of an experiment's tables: what every configuration of every audit came to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.audits.verification_schemas import ArmName
from app.catalogue import ESTIMATORS, EstimatorName

DETECTION = ("ndr_10", "ndr_20", "ndr_30", "auc_ndr")
CANCELLATION = ("cancellation_l1", "cancellation_l2")
MEASURED = ("accuracy", "macro_f1", "exact_match", "loss")
# What higher is better of; the first two tell of detection, the others of the filtered model.
MEASURES = ("auc_ndr", "ndr_30", "accuracy", "negative_loss")
FACTORS = ("estimator", "layer_group", "aggregation", "correct_only")
FULL = "full"
BASELINES = (EstimatorName.LOSS, EstimatorName.RANDOM, EstimatorName.ORACLE)


@dataclass(frozen=True)
class Cell:
    """Where a row belongs: one audit of the experiment."""

    task: str
    model: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One configuration, or baseline, in one cell.

    Attributes:
        cell: the task, its model and the seed.
        is_baseline: loss, random, oracle, or the full training set.
        estimator: or the baseline.
        layer_group: None for a baseline.
        layer_position: the group's place in the model, the same for models of different depths:
            all, WE, CL, or band 2 of 4.
        aggregation: None for a baseline.
        correct_only: whether only validation samples that the model predicts correctly count.
        detection: NDR and AUC-NDR; empty without known noise, and for the full set.
        cancellation: of the layer group; empty where there is none.
        measured: on the test set, of the model without what the configuration puts lowest;
            empty without verification.
        num_train: samples that it was trained on.
    """

    cell: Cell
    is_baseline: bool
    estimator: str
    layer_group: str | None
    layer_position: str | None
    aggregation: str | None
    correct_only: bool
    detection: Mapping[str, float]
    cancellation: Mapping[str, float | None]
    measured: Mapping[str, float | None]
    num_train: int | None

    def value(self, measure: str) -> float | None:
        """Return a measure of which higher is better (except for cancellation, which is told)."""
        if measure == "negative_loss":
            loss = self.measured.get("loss")
            return None if loss is None else -loss
        for table in (self.detection, self.cancellation, self.measured):
            if measure in table:
                return table[measure]
        return None

    @property
    def configuration(self) -> tuple[str, ...]:
        """What makes two rows of different cells the same configuration."""
        return tuple(str(getattr(self, name)) for name in FACTORS)


def rows_of_audit(
    cell: Cell, summary: Mapping[str, Any], *, request: Mapping[str, Any]
) -> Iterator[Row]:
    """Yield the rows of one audit that has succeeded.

    Args:
        cell: where they belong.
        summary: what the audit found.
        request: the experiment's, as stored: which configurations were asked for.
    """
    arms = _arms(summary)
    positions = _layer_positions(summary["layer_group_order"])
    cancellation = summary.get("cancellation") or {}
    baselines = {name: arms[name] for name in (ArmName.RANDOM, ArmName.ORACLE) if name in arms}
    for item in summary["configurations"]:
        kind = ESTIMATORS[item["estimator"]].kind
        if kind == "baseline":
            arm = baselines.get(item["estimator"]) or arms.get(_key(item, is_baseline=True))
            yield _row(cell, item["estimator"], item=item, arm=arm, is_baseline=True)
        elif _is_asked(item, request, has_pairs=kind == "pairwise"):
            group = item["layer_group"]
            found = cancellation.get(group) or {}
            yield _row(
                cell,
                item["estimator"],
                item=item,
                arm=arms.get(_key(item, is_baseline=False)),
                position=positions[group],
                cancellation={
                    name: found.get(name.removeprefix("cancellation_")) for name in CANCELLATION
                },
            )
    if FULL in arms:
        yield _row(cell, FULL, item={}, arm=arms[FULL], is_baseline=True)


def _row(
    cell: Cell,
    estimator: str,
    *,
    item: Mapping[str, Any],
    arm: Mapping[str, Any] | None,
    is_baseline: bool = False,
    position: str | None = None,
    cancellation: Mapping[str, float | None] | None = None,
) -> Row:
    metrics = arm["metrics"] if arm else {}
    return Row(
        cell=cell,
        is_baseline=is_baseline,
        estimator=estimator,
        layer_group=None if is_baseline else item["layer_group"],
        layer_position=position,
        aggregation=None if is_baseline else item["aggregation"],
        correct_only=item.get("correct_only", False),
        detection=item.get("detection") or {},
        cancellation=cancellation or {},
        measured={name: metrics[name]["mean"] for name in MEASURED if name in metrics},
        num_train=arm["num_train"] if arm else None,
    )


def _is_asked(item: Mapping[str, Any], request: Mapping[str, Any], *, has_pairs: bool) -> bool:
    """Return whether the experiment asks for a configuration: an audit's own ranking adds some."""
    groups = request["layer_groups"]
    return (
        (groups is None or item["layer_group"] in groups)
        and item["estimator"] in request["estimators"]
        and item["aggregation"] in request["aggregations"]
        and (not has_pairs or item["correct_only"] in request["correct_only"])
    )


def _key(item: Mapping[str, Any], *, is_baseline: bool) -> tuple[Any, ...]:
    """Return what an arm's ranking and a configuration have in common."""
    layers = item["layer_group"] if "layer_group" in item else item["layers"]
    aggregation = None if is_baseline else item["aggregation"]
    return item["estimator"], layers, aggregation, item["correct_only"]


def _arms(summary: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
    """Return the arms by name, and those of rankings by what ranks."""
    arms: dict[Any, Mapping[str, Any]] = {}
    for arm in (summary.get("verification") or {}).get("arms", ()):
        ranking = arm["ranking"]
        if ranking is None:
            arms[arm["name"]] = arm
        else:
            is_baseline = ESTIMATORS[ranking["estimator"]].kind == "baseline"
            arms[_key(ranking, is_baseline=is_baseline)] = arm
    return arms


def _layer_positions(order: Sequence[str]) -> dict[str, str]:
    """Return the groups' places in the model; layers that only a request names keep their name."""
    bands = [name for name in order if name.replace("-", "").isdecimal()]
    starts = [int(name.split("-")[0]) for name in bands]
    # the bands of a model lie one behind the other; other layers that were named may not
    is_standard = starts == sorted(set(starts))
    return {
        name: f"band {bands.index(name) + 1} of {len(bands)}"
        if is_standard and name in bands
        else name
        for name in order
    }
