from workers.influence.estimators import (
    ESTIMATORS,
    Baseline,
    CurvatureEstimator,
    DotEstimator,
    SampleEstimator,
)


def test_every_estimator_is_of_one_kind_and_says_when_to_use_it() -> None:
    kinds = {
        DotEstimator: {"grad_dot", "grad_cosine"},
        CurvatureEstimator: {"datainf"},
        SampleEstimator: {"self_influence"},
        Baseline: {"loss", "random", "oracle"},
    }
    assert {
        kind: {name for name, estimator in ESTIMATORS.items() if isinstance(estimator, kind)}
        for kind in kinds
    } == kinds
    for name, estimator in ESTIMATORS.items():
        assert estimator.name == name
        assert estimator.description.endswith(".")
        assert estimator.needs_validation == (estimator.kind == "pairwise")
        assert estimator.has_layers == (estimator.kind != "baseline")
        assert estimator.needs_known_noise == (name == "oracle")
