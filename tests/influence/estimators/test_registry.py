import pytest

from workers.influence.estimators import (
    ESTIMATORS,
    Baseline,
    CheckpointEstimator,
    ClassEstimator,
    CurvatureEstimator,
    DotEstimator,
    HiddenStateEstimator,
    SampleEstimator,
    WordEmbeddingEstimator,
    make_estimator,
)

KINDS = {
    DotEstimator: {"grad_dot", "grad_cosine", "grad_covariance", "datainf_self"},
    CurvatureEstimator: {"datainf", "lissa", "gauss_newton", "ekfac"},
    CheckpointEstimator: {"tracin"},
    WordEmbeddingEstimator: {"tracin_we", "tracin_we_topk"},
    HiddenStateEstimator: {"repsim"},
    ClassEstimator: {"outlier_gradient"},
    SampleEstimator: {"self_influence"},
    Baseline: {"loss", "confidence", "random", "oracle"},
}


def test_every_estimator_is_of_one_kind() -> None:
    assert {
        kind: {name for name, estimator in ESTIMATORS.items() if isinstance(estimator, kind)}
        for kind in KINDS
    } == KINDS
    assert sum(map(len, KINDS.values())) == len(ESTIMATORS) == 18


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_says_when_to_use_it_and_what_it_needs(name: str) -> None:
    estimator = ESTIMATORS[name]
    assert estimator.name == name
    assert estimator.description.endswith(".")
    assert estimator.needs_validation == (
        estimator.kind in {"pairwise", "class"} or name == "confidence"
    )
    assert estimator.has_layers == (estimator.kind != "baseline") == (estimator.axis != "none")
    assert estimator.needs_known_noise == (name == "oracle")
    assert estimator.needs_curvature == isinstance(estimator, CurvatureEstimator)
    assert estimator.needs_checkpoints == (name == "tracin")
    assert estimator.needs_word_embeddings == (estimator.axis == "word_embedding")
    assert estimator.needs_hidden_states == (estimator.axis == "blocks")
    assert estimator.needs_classes == (estimator.kind == "class" or name == "confidence")
    assert estimator.needs_features == (name == "confidence")
    assert estimator.needs_kronecker == (name == "ekfac")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_defaults_are_what_the_registry_holds(name: str) -> None:
    assert make_estimator(name).parameters() == ESTIMATORS[name].parameters()
    defaults = {key: each.default for key, each in ESTIMATORS[name].parameters().items()}
    assert vars(make_estimator(name, defaults)) == vars(ESTIMATORS[name])


def test_json_knows_no_whole_numbers() -> None:
    assert vars(make_estimator("lissa", {"steps": 20.0, "damping": 1})) == {
        "steps": 20,
        "damping": 1.0,
    }
    assert isinstance(vars(make_estimator("lissa", {"steps": 20.0}))["steps"], int)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("exact", {}, "no estimator 'exact'; there are grad_dot"),
        ("lissa", {"depth": 3}, "lissa has no parameter 'depth'; it has damping, steps"),
        ("grad_dot", {"damping": 0.1}, "it has none"),
        ("lissa", {"steps": 0}, "lissa.steps is 0; it goes from 1 to 10000"),
        ("lissa", {"steps": 2.5}, "lissa.steps is 2.5; it is a whole number"),
        ("gauss_newton", {"damping": 0.0}, "gauss_newton.damping is 0"),
        ("gauss_newton", {"damping": float("nan")}, "gauss_newton.damping is nan"),
        ("outlier_gradient", {"nu": 1.5}, "outlier_gradient.nu is 1.5"),
    ],
)
def test_what_cannot_be_set_is_named(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_estimator(name, parameters)
