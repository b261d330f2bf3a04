"""The engine's dot products against kronfluence's and dattri-llm's, in padded batches."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.independent.cases import BERT, FULL, LINEAR, LLAMA, NUM_TRAIN, NUM_VALIDATION, Case
from tests.independent.engine import engine_gradients
from tests.independent.peers import dattri_dot_products, import_peer, kronfluence_scores
from workers.influence.rows import DenseRows, FactoredRows, SparseRows

# the peers are older than the libraries here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def _assert_equal(case: Case, peer: Mapping[str, Tensor]) -> None:
    """Every layer's matrix, to 1e-5 of the largest entry and of the whole matrix."""
    dot_products = {
        name: module.validation.dot(module.train) for name, module in engine_gradients(case).items()
    }
    # the peers append the bias to a layer's weight
    for name in [name for name in dot_products if name.endswith(".bias")]:
        weight = name.removesuffix("bias") + "weight"
        dot_products[weight] = dot_products[weight] + dot_products.pop(name)
    assert dot_products.keys() == peer.keys()
    for name, dot_VT in dot_products.items():
        error_VT = dot_VT - peer[name]
        assert dot_VT.shape == (NUM_VALIDATION, NUM_TRAIN)
        assert float(error_VT.norm() / peer[name].norm()) < 1e-5, name
        assert float(error_VT.abs().max() / peer[name].abs().max()) < 1e-5, name


@pytest.mark.parametrize("case", [BERT, LLAMA, *LINEAR], ids=lambda case: case.name)
def test_grad_dot_is_kronfluences_score_without_a_curvature(case: Case, tmp_path: Path) -> None:
    """With the same sign: the measurement is the loss, positive is helpful."""
    _assert_equal(case, kronfluence_scores(case, strategy="identity", output_dir=tmp_path))


@pytest.mark.parametrize("case", [BERT, LLAMA, FULL], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_grad_dot_is_dattri_llms_dot_product(case: Case) -> None:
    """Theirs contracts inputs and output gradients without writing a gradient out."""
    _assert_equal(case, dattri_dot_products(case))


def test_the_full_case_has_gradients_of_every_form() -> None:
    forms = {type(module.train) for module in engine_gradients(FULL).values()}
    assert forms == {DenseRows, FactoredRows, SparseRows}


def test_the_cases_tell_samples_apart() -> None:
    """Dot products differ from sample to sample, in sign as well, so that equality means much."""
    for case in (BERT, LLAMA, FULL, *LINEAR):
        for module in engine_gradients(case).values():
            dot_VT = module.validation.dot(module.train)
            assert bool((dot_VT > 0).any())
            assert bool((dot_VT < 0).any())
            assert int(torch.linalg.matrix_rank(dot_VT)) >= 2


def test_a_missing_peer_fails_in_ci_and_is_skipped_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either way the message says what to install."""
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no_such_peer.*requirements-checks\.txt"):
        import_peer("no_such_peer")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=r"no_such_peer.*requirements-checks\.txt"):
        import_peer("no_such_peer")
