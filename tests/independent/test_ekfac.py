"""The engine's EK-FAC against kronfluence's, in padded batches with an attention mask."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.independent.cases import (
    BATCH_SIZE,
    BERT,
    LINEAR,
    LLAMA,
    NUM_TRAIN,
    NUM_VALIDATION,
    Case,
)
from tests.independent.engine import ModuleGradients, engine_gradients
from tests.independent.peers import kronfluence_scores
from workers.influence.estimators.ekfac import EKFAC
from workers.influence.estimators.training import TrainingGradients

# the peers are older than the libraries here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
CASES = pytest.mark.parametrize("case", [BERT, LLAMA, *LINEAR], ids=lambda case: case.name)


def _comparable_gradients(case: Case) -> dict[str, ModuleGradients]:
    """Take the engine's gradients, leaving out layers with a bias: here, BERT's head."""
    gradients = engine_gradients(case)
    biased = tuple(name.removesuffix("bias") for name in gradients if name.endswith(".bias"))
    return {name: module for name, module in gradients.items() if not name.startswith(biased)}


def _influence(module: ModuleGradients) -> Tensor:
    train_Td = module.train.dense()

    def blocks() -> Iterator[Tensor]:
        yield from train_Td.split(BATCH_SIZE)

    training = TrainingGradients(
        num_samples=len(train_Td),
        mean_squared_norm=float(module.train.squared_norm().double().mean()),
        spec=module.spec,
        kronecker=module.kronecker,
        blocks=blocks,
    )
    query_Vd = EKFAC().queries(validation_Vd=module.validation.dense(), training=training)
    return query_Vd @ train_Td.T


@CASES
def test_ekfac_is_kronfluences(case: Case, tmp_path: Path) -> None:
    """Scores of every factor and whole weight, to 1e-4 of the largest entry and of the matrix.

    Where a layer has a bias, the two mean different things. kronfluence appends the bias to the
    weight and a one to every input: one matrix, one eigenbasis, one damping. To the engine the bias
    is a module of its own in a head, and none inside the blocks.
    """
    scores = kronfluence_scores(case, strategy="ekfac", output_dir=tmp_path)
    gradients = _comparable_gradients(case)
    assert scores.keys() - gradients.keys() == ({"classifier.weight"} if case is BERT else set())
    for name, module in gradients.items():
        influence_VT, expected_VT = _influence(module), scores[name]
        error_VT = influence_VT - expected_VT
        assert module.kronecker is not None
        assert influence_VT.shape == (NUM_VALIDATION, NUM_TRAIN)
        assert float(error_VT.norm() / expected_VT.norm()) < 1e-4, name
        assert float(error_VT.abs().max() / expected_VT.abs().max()) < 1e-4, name


@CASES
def test_the_eigenbasis_matters(case: Case, tmp_path: Path) -> None:
    """The scores are far from a mere diagonal Fisher, so that equality says something."""
    scores = kronfluence_scores(case, strategy="diagonal", output_dir=tmp_path)
    distances = [
        float((_influence(module) - scores[name]).norm() / scores[name].norm())
        for name, module in _comparable_gradients(case).items()
    ]
    assert float(torch.tensor(distances).median()) > 0.05
