"""The engine's EK-FAC against kronfluence's, in padded batches with an attention mask."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.independent.cases import BATCH_SIZE, BERT, LLAMA, NUM_TRAIN, NUM_VALIDATION, Case
from tests.independent.engine import ModuleGradients, engine_gradients
from tests.independent.peers import kronfluence_scores
from workers.influence.estimators.ekfac import EKFAC
from workers.influence.estimators.training import TrainingGradients

# the peers are older than the libraries here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
CASES = pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)


def _factor_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave the head out: kronfluence makes one matrix of its weight and bias, the engine two."""
    return {name: score_VT for name, score_VT in scores.items() if ".lora_" in name}


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
    """Every factor's scores, to 1e-4 of the largest entry and of the whole matrix."""
    scores = _factor_scores(kronfluence_scores(case, strategy="ekfac", output_dir=tmp_path))
    gradients = engine_gradients(case)
    assert len(scores) == 8
    for name, expected_VT in scores.items():
        influence_VT = _influence(gradients[name])
        error_VT = influence_VT - expected_VT
        assert influence_VT.shape == (NUM_VALIDATION, NUM_TRAIN)
        assert float(error_VT.norm() / expected_VT.norm()) < 1e-4, name
        assert float(error_VT.abs().max() / expected_VT.abs().max()) < 1e-4, name


@CASES
def test_the_eigenbasis_matters(case: Case, tmp_path: Path) -> None:
    """The scores are far from a mere diagonal Fisher, so that equality says something."""
    scores = _factor_scores(kronfluence_scores(case, strategy="diagonal", output_dir=tmp_path))
    gradients = engine_gradients(case)
    distances = [
        float((_influence(gradients[name]) - score_VT).norm() / score_VT.norm())
        for name, score_VT in scores.items()
    ]
    assert float(torch.tensor(distances).median()) > 0.05
