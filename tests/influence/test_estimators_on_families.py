"""Every estimator on every family of models equals its slow oracle, module by module.

The engine takes padded batches in float32, as the pipeline hands them to the estimators; the oracle
takes one unpadded sample at a time in float64, then loops over pairs.

Shapes: V validation samples, C classes, T training samples, N samples, B a batch of them, d entries
of a module, E = W · H entries of the embeddings of W words, H width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.svm import OneClassSVM
from torch import Tensor

from tests.influence import estimator_oracles as slow
from tests.influence.family_streams import LEARNING_RATES, NUM_TRAIN, Case, State, make_cases
from tests.influence.tiny_models import FAMILIES, NUM_CLASSES, VOCABULARY
from workers.influence.estimators import (
    ESTIMATORS,
    Baseline,
    CheckpointEstimator,
    ClassEstimator,
    CurvatureEstimator,
    DotEstimator,
    Estimator,
    HiddenStateEstimator,
    SampleEstimator,
    SampleFacts,
    WordEmbeddingEstimator,
    make_estimator,
)
from workers.influence.gradients import SampleGradients
from workers.influence.rows import SparseRows
from workers.pipeline.shard_influence import row_statistics

DAMPING, STEPS, NU, NUM_TOKENS, SEED = 0.5, 7, 0.4, 3, 11
PARAMETERS: dict[str, dict[str, float]] = {
    **{name: {"damping": DAMPING} for name in ("datainf", "gauss_newton", "ekfac")},
    "lissa": {"damping": DAMPING, "steps": STEPS},
    "outlier_gradient": {"nu": NU},
    "tracin_we_topk": {"num_tokens": NUM_TOKENS},
}
IS_NOISY_T = torch.arange(NUM_TRAIN) % 5 == 1

Influence = dict[str, Tensor]
"""[V, T] by module or block; [C, T], [1, T] or [T] where an estimator has no pairs."""
Oracle = Callable[[Case], Influence]


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, device: torch.device) -> list[Case]:
    """All models of a family, with gradients that the estimators share."""
    return make_cases(request.param, device)


def by_engine(estimator: Estimator, case: Case) -> Influence:
    """Compute influence batch by batch, as the pipeline does for an estimator of this kind."""
    state, train = case.audited, case.audited.train
    match estimator:
        case DotEstimator():
            parts = [_dotted(estimator, state, module) for module in range(len(state.names))]
        case CurvatureEstimator():
            parts = [_queried(estimator, case, module) for module in range(len(case.dense))]
        case CheckpointEstimator():
            first, last = estimator.weights(LEARNING_RATES)
            parts = [
                first * case.states[0].dots(module) + last * case.states[1].dots(module)
                for module in range(len(case.dense))
            ]
        case ClassEstimator():
            parts = [_fitted(estimator, case, module) for module in range(len(case.dense))]
        case SampleEstimator():
            norm_MT = train.collect(lambda batch: batch.squared_norm_MB)
            parts = [estimator.influence(squared_norm_B=norm_T) for norm_T in norm_MT]
        case WordEmbeddingEstimator():
            return {state.words: _of_words(estimator, state)}
        case HiddenStateEstimator():
            pairs = zip(state.validation.hidden(), train.hidden(), strict=True)
            parts = [estimator.influence(validation_VH=v, train_BH=t) for v, t in pairs]
            return dict(zip(state.loop_train.hidden, parts, strict=True))
        case Baseline():
            loss_T = train.collect(lambda batch: batch.loss_B)
            return {"": estimator.score(SampleFacts(loss_T, IS_NOISY_T.to(loss_T.device), SEED))}
        case _:
            raise TypeError(f"{estimator.name} is of no kind")
    # the word embedding, which some leave out, is the last
    return dict(zip(state.names, parts, strict=False))


def _dotted(estimator: DotEstimator, state: State, module: int) -> Tensor:
    rows = state.validation.rows(module)
    statistics = partial(row_statistics, with_sums=estimator.needs_entry_sums)

    def influence(batch: SampleGradients) -> Tensor:
        train = batch.gradients[module]
        return estimator.influence(
            dot_VB=rows.dot(train), validation=statistics(rows), train=statistics(train)
        )

    return state.train.collect(influence)


def _queried(estimator: CurvatureEstimator, case: Case, module: int) -> Tensor:
    query_Vd = estimator.queries(
        validation_Vd=case.dense_validation.rows(module).dense(),
        training=case.dense_train.training(module),
    )
    return case.dense_train.collect(lambda batch: query_Vd @ batch.gradients[module].dense().T)


def _fitted(estimator: ClassEstimator, case: Case, module: int) -> Tensor:
    rows = case.audited.validation.rows(module)
    norm_V = rows.squared_norm().sqrt()
    class_V = torch.tensor(case.validation.labels)
    fitted = estimator.fit(
        gram_VV=rows.dot(rows), norm_V=norm_V, class_V=class_V, num_classes=NUM_CLASSES
    )

    def influence(batch: SampleGradients) -> Tensor:
        train = batch.gradients[module]
        return estimator.influence(
            dot_VB=rows.dot(train),
            norm_V=norm_V,
            train_norm_B=train.squared_norm().sqrt(),
            fitted={name: tensor.to(norm_V.device) for name, tensor in fitted.items()},
        )

    return case.audited.train.collect(influence)


def _of_words(estimator: WordEmbeddingEstimator, state: State) -> Tensor:
    validation = state.validation.rows(-1)
    assert isinstance(validation, SparseRows)

    def influence(batch: SampleGradients) -> Tensor:
        train = batch.gradients[-1]
        assert isinstance(train, SparseRows)
        return estimator.influence(validation=validation, train=train)

    return state.train.collect(influence)


def on_modules(of_sets: Callable[[Tensor, Tensor], Tensor], *, words: bool = False) -> Oracle:
    """Make an oracle of a function of a module's gradients [V, d] and [T, d]."""

    def oracle(case: Case) -> Influence:
        names = case.audited.names if words else case.dense
        return {name: of_sets(*case.audited.loop(name)) for name in names}

    return oracle


def on_pairs(of_pair: Callable[[Tensor, Tensor], float]) -> Oracle:
    """Make an oracle of a function of two gradients; the word embedding has them too."""
    return on_modules(lambda v, g: slow.pairs(v, g, of_pair), words=True)


def dot(v: Tensor, g: Tensor) -> float:
    return float(v @ g)


def datainf_self(v: Tensor, g: Tensor) -> float:
    """By the matrix of the definition; where that is large, by its closed form."""
    if len(g) < VOCABULARY:
        return slow.datainf_self(v, g)
    return dot(v, g) / dot(g, g) * len(g) / (0.1 + len(g))


def lissa(validation_Vd: Tensor, train_Td: Tensor) -> Tensor:
    """With the smallest scale that is large enough, and the margin that the engine takes."""
    eigenvalue_d = torch.linalg.eigvalsh(slow.fisher(train_Td))
    scale = min(1.05 * float(eigenvalue_d[-1]), float(eigenvalue_d.sum()))
    scale += slow.damping_of(train_Td, DAMPING)
    return slow.lissa(validation_Vd, train_Td, scale=scale, steps=STEPS, damping=DAMPING)


def ekfac(case: Case) -> Influence:
    """With the Kronecker products written out; vectors have none and keep the diagonal."""
    state, factors = case.audited, case.audited.loop_train.factors
    return {
        name: slow.ekfac(*state.loop(name), factors=factors.get(name), damping=DAMPING)
        for name in case.dense
    }


def tracin(case: Case) -> Influence:
    """Σ_c η_c v^c · g^c."""
    first, last = (
        {name: rate * slow.pairs(*state.loop(name), dot) for name in case.dense}
        for rate, state in zip(LEARNING_RATES, case.states, strict=True)
    )
    return {name: first[name] + last[name] for name in case.dense}


def tracin_we(case: Case, *, num_tokens: int = VOCABULARY) -> Influence:
    """Pair the dense gradients, all words but each text's strongest set to zero."""

    def kept(gradient_NE: Tensor, token_ids: list[list[int]]) -> Tensor:
        rows = []
        for gradient_E, ids in zip(gradient_NE, token_ids, strict=True):
            count = [ids.count(word) for word in range(VOCABULARY)]
            gradient_WH = gradient_E.double().view(VOCABULARY, -1)
            rows.append(slow.strongest_words(gradient_WH, count, num_tokens).flatten())
        return torch.stack(rows)

    validation_VE, train_TE = case.audited.loop(case.audited.words)
    validation_VE = kept(validation_VE, case.validation.token_ids)
    train_TE = kept(train_TE, case.train.token_ids)
    return {case.audited.words: slow.pairs(validation_VE, train_TE, dot)}


def outlier_gradient(case: Case) -> Influence:
    """By scikit-learn's machine on the gradients of each class."""
    label_V = torch.tensor(case.validation.labels)

    def of_sets(validation_Vd: Tensor, train_Td: Tensor) -> Tensor:
        rows = []
        for label in range(NUM_CLASSES):
            members_Nd = validation_Vd[label_V == label].double()
            gamma = 1 / float(members_Nd.square().sum(dim=1).mean())
            machine = OneClassSVM(gamma=gamma, nu=NU, tol=1e-6).fit(members_Nd.numpy())
            rows.append(torch.from_numpy(machine.decision_function(train_Td.double().numpy())))
        return torch.stack(rows)

    return on_modules(of_sets)(case)


def repsim(case: Case) -> Influence:
    train, validation = case.audited.loop_train.hidden, case.audited.loop_validation.hidden
    return {name: slow.pairs(validation[name], train[name], slow.cosine) for name in train}


def random(case: Case) -> Influence:
    """One number after the other, whatever the model."""
    generator = torch.Generator().manual_seed(SEED)
    return {"": torch.cat([torch.rand(1, generator=generator) for _ in case.train.labels])}


ORACLES: dict[str, Oracle] = {
    "grad_dot": on_pairs(dot),
    "grad_cosine": on_pairs(slow.cosine),
    "grad_covariance": on_pairs(slow.covariance),
    "datainf_self": on_pairs(datainf_self),
    "datainf": on_modules(partial(slow.datainf, damping=DAMPING)),
    "gauss_newton": on_modules(partial(slow.gauss_newton, damping=DAMPING)),
    "lissa": on_modules(lissa),
    "ekfac": ekfac,
    "tracin": tracin,
    "tracin_we": tracin_we,
    "tracin_we_topk": partial(tracin_we, num_tokens=NUM_TOKENS),
    "outlier_gradient": outlier_gradient,
    "repsim": repsim,
    "self_influence": on_modules(
        lambda _, g: torch.tensor([[-dot(each, each) for each in g.double()]]), words=True
    ),
    "loss": lambda case: {"": -case.audited.loop_train.loss_N},
    "random": random,
    "oracle": lambda _: {"": -IS_NOISY_T.float()},
}

# All others are off by a few millionths of the module's largest influence, as the gradients are.
LARGER = dict.fromkeys(
    # small gradients of a sample with larger ones are less exact, and divided by their length;
    # across the training gradients errors are divided by the damping; and a fit ends at 1e-6
    ("grad_cosine", "datainf_self", "gauss_newton", "ekfac", "outlier_gradient"),
    1e-4,
)


@pytest.mark.parametrize("estimator", ORACLES)
@pytest.mark.parametrize("cases", FAMILIES, indirect=True)
def test_influence_equals_the_oracle(cases: list[Case], estimator: str) -> None:
    """As classifier and as language model, with LoRA and in full, wherever the estimator can."""
    made = make_estimator(estimator, PARAMETERS.get(estimator))
    for case in cases:
        if made.needs_classes and case.task != "classification":
            continue
        actual, expected = by_engine(made, case), ORACLES[estimator](case)
        assert actual.keys() == expected.keys()
        for name, influence in actual.items():
            where = f"{case.name}, {name}"
            assert influence.dtype == torch.float32, where
            assert influence.shape == expected[name].shape, where
            scale = float(expected[name].abs().max())
            assert scale > 0, f"{where}: nothing to compare"
            error = float((influence.cpu().double() - expected[name]).abs().max()) / scale
            assert error <= LARGER.get(estimator, 1e-5), f"{where}: {error:.1e} of the largest"


def test_no_estimator_and_no_family_is_left_out() -> None:
    """Whoever adds an estimator gives it an oracle here."""
    test: Any = test_influence_equals_the_oracle
    tested = {mark.args[0]: set(mark.args[1]) for mark in test.pytestmark}
    families = {"bert", "roberta", "distilbert", "gpt2", "llama", "qwen3", "mistral"}
    assert tested == {"estimator": set(ESTIMATORS), "cases": families}
