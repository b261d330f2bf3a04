from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.influence.estimator_oracles import fisher
from tests.influence.estimators.streams import randn, training
from workers.influence.errors import InsufficientMemory
from workers.influence.estimators import training as module
from workers.influence.estimators.gauss_newton import GaussNewton
from workers.influence.estimators.lissa import LiSSA


def test_the_gram_matrix_is_the_sum_of_outer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """With panels that do not divide its size; exactly symmetric."""
    monkeypatch.setattr(module, "_PANEL", 3)
    train_Td = randn(9, 8, seed=0)
    gram_dd = training(train_Td, cuts=[2, 2, 7]).gram()
    assert gram_dd.dtype == torch.float64
    assert torch.equal(gram_dd, gram_dd.T)
    torch.testing.assert_close(gram_dd, 9 * fisher(train_Td))


def test_wide_blocks_hold_the_same_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_WIDE_ROWS", 3)
    monkeypatch.setattr(module, "_WIDE_ENTRIES", 1)
    train_Td = randn(10, 2, seed=1)
    blocks = list(training(train_Td, cuts=[1, 2, 4, 5, 9]).wide_blocks())
    assert [len(block) for block in blocks] == [4, 5, 1]
    assert torch.equal(torch.cat(blocks), train_Td.double())


def test_the_gram_matrix_is_summed_once_for_all_estimators() -> None:
    passes = 0
    stream = training(randn(6, 4, seed=2))

    def blocks() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        yield from stream.blocks()

    counted = replace(stream, blocks=blocks)
    validation_Vd = randn(2, 4, seed=3)
    GaussNewton().queries(validation_Vd=validation_Vd, training=counted)
    LiSSA().queries(validation_Vd=validation_Vd, training=counted)
    assert passes == 1


def test_no_sample_no_curvature() -> None:
    stream = training(torch.zeros(1, 3))
    empty = replace(stream, num_samples=0, blocks=lambda: iter(()))
    assert torch.equal(empty.gram(), torch.zeros(3, 3, dtype=torch.float64))


def test_a_module_that_is_too_large_is_named() -> None:
    stream = training(randn(3, 10, seed=4), max_gram_bytes=799)
    with pytest.raises(
        InsufficientMemory, match=r"block\.0\.value\.lora_A.*lower rank, a smaller projection"
    ):
        GaussNewton().queries(validation_Vd=randn(1, 10, seed=5), training=stream)
    assert len(training(randn(3, 10, seed=4), max_gram_bytes=800).gram()) == 10
