"""The last stage: what every arm of the verification measures on the test set, and the differences.

Shapes: N test samples, T training samples, S seeds.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from app.audits.verification_schemas import ArmName, Verify
from workers.influence.comparison import (
    MIN_PAIRS,
    accuracy,
    macro_f1,
    paired_difference,
    paired_sample_difference,
)
from workers.pipeline.arms import Plan, PlannedArm, read_training_data
from workers.pipeline.artifacts import Artifacts, read_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SampleSet

ROWS_PER_CHUNK = 20_000
_SHOWN_CLASSES = 10


class Measured:
    """What one trained model is worth on the test set.

    Attributes:
        values: every metric; none when the training diverged.
        by_sample: the metrics that are means over the test samples, float [N] each.
        diverged_at: the step, where the loss did not stay finite.
        num_non_finite: test samples whose loss is not finite.
    """

    def __init__(self, outcome: dict[str, Tensor], label_N: Tensor) -> None:
        self.values: dict[str, float] = {}
        self.by_sample: dict[str, Tensor] = {}
        step = outcome.get("diverged_at")
        self.diverged_at = None if step is None else int(step)
        self.num_non_finite = 0
        if self.diverged_at is not None:
            return
        if "is_exact" in outcome:
            self.by_sample["exact_match"] = outcome["is_exact"].float()
            self.values["exact_match"] = float(outcome["is_exact"].double().mean())
        else:
            predicted_N = outcome["predicted"].long()
            self.by_sample["accuracy"] = (predicted_N == label_N).float()
            self.values["accuracy"] = accuracy(label_N, predicted_N)
            self.values["macro_f1"] = macro_f1(label_N, predicted_N)
        self.num_non_finite = int((~outcome["loss"].isfinite()).sum())
        if not self.num_non_finite:
            self.by_sample["loss"] = outcome["loss"]
            self.values["loss"] = float(outcome["loss"].double().mean())


def conclude(context: StageContext) -> StageOutput:
    """Compare the arms, and add them to what the audit found."""
    verify, artifacts = context.request.verify, context.artifacts
    if verify is None:
        raise AuditRefused("internal_error", "The stage was reached without verify.")
    plan, test = Plan.read(artifacts), SampleSet(artifacts.test)
    metrics = ["loss", "exact_match"] if test.has_completions else ["accuracy", "macro_f1", "loss"]

    def measure(arm: PlannedArm) -> list[Measured | None]:
        return [
            None
            if number is None
            else Measured(read_tensors(artifacts.outcome(number)), test.label_T)
            for number in arm.trainings
        ]

    full = next((arm for arm in plan.arms if arm.name == ArmName.FULL), None)
    of_full = measure(full) if full is not None else []
    arms, warnings = [], [*_warn_of_seeds(verify, full), *_warn_of_shared(context, test)]
    for number, arm in enumerate(plan.arms):
        context.hold.step(number, len(plan.arms))
        told = measure(arm)  # those of one arm at a time: there may be thousands of trainings
        warnings += _warn_of_trainings(arm, told, verify)
        arms.append(
            {
                "name": arm.name,
                "ranking": arm.ranking,
                "num_train": arm.num_train,
                "num_removed": arm.num_removed,
                "num_relabelled": arm.num_relabelled,
                "metrics": {metric: _over_seeds(told, metric) for metric in metrics},
                "against_full": {
                    metric: _against(told, of_full, metric, confidence=verify.confidence)
                    for metric in metrics
                }
                if full is not None and arm is not full
                else None,
            }
        )
    verification = {
        "fraction": verify.fraction,
        "seeds": verify.seeds,
        "confidence": verify.confidence,
        "num_test": len(test),
        "arms": arms,
        "warnings": [*warnings, *_warn_of_classes(context, plan)],
    }
    context.hold.keep_alive()  # who lost the lease leaves the files to the heir
    context.remove_scratch()
    return StageOutput(summary={"verification": verification})


def _value(of: Measured | None, metric: str) -> float | None:
    return of.values.get(metric) if of is not None else None


def _over_seeds(told: Sequence[Measured | None], metric: str) -> dict[str, Any]:
    """Return the mean of a metric over the seeds that have it, and the value of every seed."""
    values = [_value(of, metric) for of in told]
    known = [value for value in values if value is not None]
    return {"mean": math.fsum(known) / len(known) if known else None, "values": values}


def _against(
    told: Sequence[Measured | None],
    full: Sequence[Measured | None],
    metric: str,
    *,
    confidence: float,
) -> dict[str, Any] | None:
    """Compare with the full set, seed by seed; None where no seed has both."""
    pairs = [
        (one, other)
        for one, other in zip(told, full, strict=True)
        if one and other and metric in one.values and metric in other.values
    ]
    if not pairs:
        return None
    over_seeds = paired_difference(
        [one.values[metric] for one, _ in pairs],
        [other.values[metric] for _, other in pairs],
        confidence=confidence,
    )
    result: dict[str, Any] = {
        "difference": over_seeds.mean,
        "low": over_seeds.low,
        "high": over_seeds.high,
        "num_seeds": over_seeds.num_pairs,
        "sample_low": None,
        "sample_high": None,
    }
    if all(metric in one.by_sample for one, _ in pairs):
        over_samples = paired_sample_difference(
            torch.stack([one.by_sample[metric] for one, _ in pairs]),
            torch.stack([other.by_sample[metric] for _, other in pairs]),
            confidence=confidence,
        )
        result |= {"sample_low": over_samples.low, "sample_high": over_samples.high}
    return result


def _warn_of_seeds(verify: Verify, full: PlannedArm | None) -> list[str]:
    if full is not None and len(verify.seeds) < MIN_PAIRS:
        return ["One seed gives no interval over seeds. Name at least two in verify.seeds."]
    return []


def _warn_of_shared(context: StageContext, test: SampleSet) -> list[str]:
    """Return a warning for every set that has samples of the test set in it."""
    warnings, artifacts = [], context.artifacts
    kept = _digests(test, context.hold.keep_alive)
    known = set(kept)
    sets = {"training": artifacts.train}
    if context.has_validation:
        sets["validation"] = artifacts.validation
    for name, path in sets.items():
        shared = known.intersection(_digests(SampleSet(path), context.hold.keep_alive))
        if count := sum(digest in shared for digest in kept):
            warnings.append(
                f"{count:,} of the {len(kept):,} test samples stand in the {name} set too: they "
                "took part in what they measure. Leave them out of the test set."
            )
    return warnings


def _digests(samples: SampleSet, keep_alive: Callable[[], None]) -> list[bytes]:
    """Return 8 bytes for every sample that tell texts apart."""
    return [
        hashlib.blake2b(repr(texts).encode(), digest_size=8).digest()
        for index_N in torch.arange(len(samples)).split(ROWS_PER_CHUNK)
        for texts in _texts(samples, index_N, keep_alive)
    ]


def _texts(
    samples: SampleSet, index_N: Tensor, keep_alive: Callable[[], None]
) -> list[tuple[str, str | None]]:
    keep_alive()
    return samples.texts(index_N)


def _warn_of_trainings(
    arm: PlannedArm, told: Sequence[Measured | None], verify: Verify
) -> list[str]:
    seeds = [(seed, of) for seed, of in zip(verify.seeds, told, strict=True) if of is not None]
    if not seeds:
        return [f"The arm {arm.name} leaves no sample to train on, so it has no measures."]
    warnings = []
    if diverged := [seed for seed, of in seeds if of.diverged_at is not None]:
        warnings.append(
            f"The arm {arm.name} diverged with seed {_listed(diverged)}, which has no measures. "
            "Lower fine_tune.learning_rate."
        )
    if broken := [seed for seed, of in seeds if of.num_non_finite]:
        warnings.append(
            f"The arm {arm.name} with seed {_listed(broken)} has test samples whose loss is not "
            "finite: they count as wrong, and there is no mean loss."
        )
    return warnings


def _warn_of_classes(context: StageContext, plan: Plan) -> Iterator[str]:
    """Yield a warning for every arm that keeps no sample of some class."""
    artifacts = context.artifacts
    labels = [str(label) for label in Prepared.read(artifacts.prepared).labels]
    if not labels:
        return
    label_T = SampleSet(artifacts.train).label_T
    num_data = 1 + max((training.data for training in plan.trainings), default=-1)
    lost = [_lost_classes(artifacts, number, label_T, len(labels)) for number in range(num_data)]
    for arm in plan.arms:
        numbers = {plan.trainings[number].data for number in arm.trainings if number is not None}
        classes = sorted({index for number in numbers for index in lost[number]})
        if not classes:
            continue
        named = _listed([repr(labels[index]) for index in classes])
        only = " One class is left: the model learns to answer it always." * (
            len(labels) - len(classes) == 1
        )
        yield f"The arm {arm.name} trains on no sample of the class {named}.{only}"


def _lost_classes(
    artifacts: Artifacts, number: int, label_T: Tensor, num_classes: int
) -> list[int]:
    data = read_training_data(artifacts, number)
    kept_N = (label_T if data.label_T is None else data.label_T)[data.is_kept_T]
    count_C = kept_N.bincount(minlength=num_classes)
    absent: list[int] = (count_C == 0).nonzero().flatten().tolist()
    return absent


def _listed(items: Sequence[object]) -> str:
    rest = f" and {len(items) - _SHOWN_CLASSES:,} more" if len(items) > _SHOWN_CLASSES else ""
    return ", ".join(map(str, items[:_SHOWN_CLASSES])) + rest
