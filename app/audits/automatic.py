"""What `auto` stands for before any model is seen: what is computed, and whether probes are planted.

All functions take a request as it is stored.
"""

from collections.abc import Mapping
from typing import Any

from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName

# Chosen by measurement (docs/results.md): each was among the best somewhere, and together they cost
# little more than one.
_DOT = (EstimatorName.GRAD_DOT, EstimatorName.GRAD_COSINE)
_CURVATURE = (EstimatorName.DATAINF, EstimatorName.GAUSS_NEWTON, EstimatorName.EKFAC)
_ALONE = (EstimatorName.SELF_INFLUENCE,)
BASELINES = (EstimatorName.LOSS, EstimatorName.RANDOM)
# Probes are only ranked by aggregations that stream.
CANDIDATE_AGGREGATIONS = ("mean", "rank", "vote")


def computed_estimators(request: Mapping[str, Any]) -> list[str]:
    """Return the estimators that an audit computes: asked ones, those of `auto`, and baselines."""
    asked = [] if request["estimators"] == AUTO else list(request["estimators"])
    ranks_by = request["ranking"]["estimator"]
    if ranks_by not in {AUTO, CONSENSUS}:
        asked.append(ranks_by)
    elif request["estimators"] == AUTO:
        asked += _candidates(request)
    asked += BASELINES
    if _knows_noise(request):
        asked.append(EstimatorName.ORACLE)
    return list(dict.fromkeys(str(name) for name in asked))


def _candidates(request: Mapping[str, Any]) -> tuple[EstimatorName, ...]:
    has_adapter = bool(request["model"]["adapter"] or request["fine_tune"])
    # the curvature of full matrices takes more than one fixed configuration would
    return (*_DOT, *(_CURVATURE if has_adapter else ()), *_ALONE)


def needs_probes(request: Mapping[str, Any]) -> bool:
    """Return whether something is chosen, or measured, by planted probes."""
    ranking = request["ranking"]
    estimator = ESTIMATORS.get(ranking["estimator"])
    if estimator is not None and not estimator.has_layers:
        return bool(request["flag"] == AUTO)
    chosen = (ranking["estimator"], ranking["layers"], ranking["aggregation"], request["flag"])
    return AUTO in chosen or CONSENSUS in chosen


def needs_split(request: Mapping[str, Any]) -> bool:
    """Return whether the validation set is split off the training set: one is needed, none named."""
    names = computed_estimators(request)
    needs = {need for name in names for need in ESTIMATORS[name].needs}
    return request["validation"] is None and "validation" in needs


def _knows_noise(request: Mapping[str, Any]) -> bool:
    columns = request["train"]["columns"]
    return bool(request["plant_noise"] or (columns and columns.get("noise")))
