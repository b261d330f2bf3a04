"""What `auto` stands for before any model is seen: what is computed, and if probes are planted.

All functions take a request as it is stored.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName

# By measurement (docs/results.md): each is the best somewhere, and others added nothing to them.
_CURVATURE = (EstimatorName.GAUSS_NEWTON, EstimatorName.EKFAC)
_BASELINES = (EstimatorName.LOSS, EstimatorName.RANDOM)
# Probes are ranked by aggregations that take columns as they come.
CANDIDATE_AGGREGATIONS = ("mean", "rank", "vote")


def computed_estimators(request: Mapping[str, Any]) -> list[str]:
    """Return the estimators that an audit computes: asked ones, those of `auto`, and baselines."""
    names = [*_asked(request), *_BASELINES]
    if needs_features(request):
        names.append(EstimatorName.CONFIDENCE)
    if _knows_noise(request):
        names.append(EstimatorName.ORACLE)
    return list(dict.fromkeys(str(name) for name in names))


def needs_probes(request: Mapping[str, Any]) -> bool:
    """Return whether something is chosen, or measured, by planted probes."""
    ranking = request["ranking"]
    estimator = ESTIMATORS.get(ranking["estimator"])
    if estimator is None:
        return True
    if estimator.has_layers and AUTO in {ranking["layers"], ranking["aggregation"]}:
        return True
    # where there are classes, validation samples with wrong ones do for the flag
    return bool(request["flag"] == AUTO and _task_of(request) != "classification")


def needs_features(request: Mapping[str, Any]) -> bool:
    """Return whether a simple model is asked, out of sample, how likely each class is."""
    if _task_of(request) != "classification":
        return False
    asked = set(_asked(request))
    if EstimatorName.CONFIDENCE in asked:
        return True
    if request["validation"] is None and not _need_validation(asked):
        return False
    return needs_probes(request) or request["flag"] == AUTO


def needs_split(request: Mapping[str, Any]) -> bool:
    """Return whether the validation set is taken from the training set: needed, and not named."""
    return request["validation"] is None and _need_validation(computed_estimators(request))


def _asked(request: Mapping[str, Any]) -> Iterator[str]:
    if request["estimators"] != AUTO:
        yield from request["estimators"]
    ranks_by = request["ranking"]["estimator"]
    if ranks_by not in {AUTO, CONSENSUS}:
        yield ranks_by
    elif request["estimators"] == AUTO:
        yield EstimatorName.GRAD_COSINE
        # the curvature of whole matrices would cost more than all the rest
        if request["model"]["adapter"] or request["fine_tune"]:
            yield from _CURVATURE
    verify = request.get("verify")
    yield from (ranking["estimator"] for ranking in (verify["rankings"] if verify else ()))


def _task_of(request: Mapping[str, Any]) -> str:
    """Return the task; the first version knew one alone."""
    return str(request.get("task", "classification"))


def _need_validation(names: Iterable[str]) -> bool:
    return any("validation" in ESTIMATORS[name].needs for name in names)


def _knows_noise(request: Mapping[str, Any]) -> bool:
    columns = request["train"]["columns"]
    return bool(request["plant_noise"] or (columns and columns.get("noise")))
