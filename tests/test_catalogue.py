"""What the API says it can compute is what the engine can compute."""

from app.catalogue import AGGREGATIONS, ESTIMATORS, AggregationName, EstimatorName
from workers.influence import aggregation, estimators


def test_the_catalogue_agrees_with_the_engines_registries() -> None:
    """Names, kinds and needs: the API refuses at submit what the engine could not do."""
    assert set(ESTIMATORS) == set(estimators.ESTIMATORS) == set(EstimatorName)
    for name, offered in ESTIMATORS.items():
        engine = estimators.ESTIMATORS[name]
        assert (offered.kind, offered.has_layers) == (engine.kind, engine.has_layers)
        assert offered.needs_curvature == engine.needs_curvature
        assert offered.needs_known_noise == engine.needs_known_noise
    assert set(AGGREGATIONS) == set(aggregation.AGGREGATIONS) == set(AggregationName)
