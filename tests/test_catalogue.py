"""What the API says it can compute is what the engine can compute."""

import math
import re

import pytest
from pydantic.fields import FieldInfo

from app.audits.schemas import RankingSpecification
from app.catalogue import AGGREGATIONS, ESTIMATORS, AggregationName, EstimatorName, Parameter
from workers.influence import aggregation, estimators

FLAGS = {
    "validation": "needs_validation",
    "known_noise": "needs_known_noise",
    "curvature": "needs_curvature",
    "checkpoints": "needs_checkpoints",
    "word_embeddings": "needs_word_embeddings",
    "hidden_states": "needs_hidden_states",
    "classes": "needs_classes",
    "features": "needs_features",
}


def test_the_catalogue_names_what_the_engine_has() -> None:
    assert list(ESTIMATORS) == list(EstimatorName) == list(estimators.ESTIMATORS)
    assert list(AGGREGATIONS) == list(AggregationName)
    assert set(AGGREGATIONS) == set(aggregation.AGGREGATIONS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_what_the_engine_says(name: str) -> None:
    """Kinds, needs and parameters: the API refuses at submit what the engine could not do."""
    offered, engine = ESTIMATORS[name], estimators.ESTIMATORS[name]
    assert (offered.kind, offered.has_layers) == (engine.kind, engine.has_layers)
    assert set(offered.needs) == {need for need, flag in FLAGS.items() if getattr(engine, flag)}
    assert ("causal_lm" in offered.tasks) != engine.needs_classes
    assert "classification" in offered.tasks
    assert {each.name: limits(each) for each in offered.parameters} == {
        name: (each.minimum, each.maximum, each.default, each.is_whole)
        for name, each in engine.parameters().items()
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_says_when_to_use_it_and_what_it_costs(name: str) -> None:
    offered = ESTIMATORS[name]
    assert re.search(r"\. Use it [^.]+", offered.description)
    assert offered.formula
    assert offered.cost >= 1
    assert (offered.cost_class == "second pass") == ("curvature" in offered.needs)
    assert (offered.cost_class == "checkpoints") == ("checkpoints" in offered.needs)
    assert (offered.cost_class == "free") == (offered.kind == "baseline")


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_ranking_takes_every_parameter_of_an_aggregation(name: str) -> None:
    offered = AGGREGATIONS[name]
    assert offered.formula
    assert offered.description.endswith(".")
    for parameter in offered.parameters:
        field = RankingSpecification.model_fields[parameter.name]
        assert (*bounds(field), field.default, False) == limits(parameter)


def test_every_parameter_of_the_ranking_belongs_to_an_aggregation() -> None:
    known = {each.name for offered in AGGREGATIONS.values() for each in offered.parameters}
    other = {"estimator", "layers", "aggregation", "correct_only"}
    assert set(RankingSpecification.model_fields) == known | other


def limits(parameter: Parameter) -> tuple[float, float, float, bool]:
    return parameter.minimum, parameter.maximum, parameter.default, parameter.is_whole


def bounds(field: FieldInfo) -> tuple[float, float]:
    """Return the least and the most that a field takes, whether or not they are allowed."""
    found = {
        name: getattr(each, name)
        for each in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(each, name)
    }
    return found.get("gt", found.get("ge", math.nan)), found.get("lt", found.get("le", math.nan))
