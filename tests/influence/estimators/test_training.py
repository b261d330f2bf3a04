from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.influence.estimator_oracles import fisher
from tests.influence.estimators.streams import randn, training
from workers.influence.errors import InsufficientMemory
from workers.influence.estimators import TrainingGradients
from workers.influence.estimators import training as module
from workers.influence.estimators.ekfac import EKFAC
from workers.influence.estimators.gauss_newton import GaussNewton
from workers.influence.estimators.lissa import LiSSA
from workers.influence.kronecker import KroneckerSums


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


def test_a_set_with_more_at_its_end_goes_on_from_the_sum_of_the_first() -> None:
    """What is there already is not read again, and the sum is that of all."""
    first_Td, more_Td = randn(9, 4, seed=1), randn(5, 4, seed=2)
    earlier = training(first_Td, cuts=[4])
    earlier.gram()
    all_of_them = training(torch.cat([first_Td, more_Td]))
    grown = replace(all_of_them, grown_from=(earlier, lambda: iter([more_Td])), blocks=unread)
    torch.testing.assert_close(grown.gram(), all_of_them.gram())
    torch.testing.assert_close(earlier.gram(), training(first_Td).gram())  # made anew if asked for


def unread() -> Iterator[Tensor]:
    raise AssertionError("the gradients that are summed already were read again")


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


@dataclass
class Calls:
    """What an estimator told of its work, in order."""

    calls: list[str] = field(default_factory=list)

    def keep_alive(self) -> None:
        assert self.calls[-1:] != ["enter"], "nothing can be called while a step is silent"
        self.calls.append("alive")

    @contextmanager
    def silence(self) -> Iterator[None]:
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    @property
    def num_silent(self) -> int:
        return self.calls.count("enter")

    def watch(self, stream: TrainingGradients) -> TrainingGradients:
        return replace(stream, keep_alive=self.keep_alive, silence=self.silence)


def test_steps_that_cannot_be_interrupted_are_silent() -> None:
    """One Cholesky and two triangular systems, or two eigenbases; alive before and after each."""
    validation_Vd = randn(2, 4, seed=3)
    sums = KroneckerSums.of_tokens(randn(5, 2, seed=4), randn(5, 2, seed=5), num_tokens=5)
    stream = training(randn(6, 4, seed=2), shape=(2, 2), kronecker=sums)
    for estimator, num_silent in ((GaussNewton(), 3), (EKFAC(), 2), (LiSSA(), 0)):
        watched = Calls()
        query_Vd = estimator.queries(validation_Vd=validation_Vd, training=watched.watch(stream))
        expected_Vd = estimator.queries(validation_Vd=validation_Vd, training=stream)
        assert torch.equal(query_Vd, expected_Vd)
        assert watched.num_silent == num_silent
        for place, call in enumerate(watched.calls):
            if call == "enter":
                around = watched.calls[place - 1 : place + 3]
                assert around == ["alive", "enter", "leave", "alive"]


def test_it_is_alive_between_the_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 blocks of 8 columns 3 at a time, then of the half that is mirrored."""
    monkeypatch.setattr(module, "_PANEL", 3)
    monkeypatch.setattr(module, "_MIN_WIDE_ROWS", 1)
    monkeypatch.setattr(module, "_WIDE_ENTRIES", 1)
    watched = Calls()
    watched.watch(training(randn(9, 8, seed=0), cuts=[4])).gram()
    assert watched.calls == ["alive"] * (2 * 3 + 3)


@pytest.mark.parametrize("estimator", [GaussNewton(), LiSSA(), EKFAC()])
def test_what_keep_alive_raises_ends_the_work(
    estimator: GaussNewton | LiSSA | EKFAC,
) -> None:
    def cancelled() -> None:
        raise TimeoutError

    sums = KroneckerSums.of_tokens(randn(5, 2, seed=4), randn(5, 2, seed=5), num_tokens=5)
    stream = training(randn(6, 4, seed=2), shape=(2, 2), kronecker=sums)
    with pytest.raises(TimeoutError):
        estimator.queries(
            validation_Vd=randn(2, 4, seed=3), training=replace(stream, keep_alive=cancelled)
        )


def test_the_factor_is_the_only_copy_of_the_gram_matrix() -> None:
    """Which stays as it is, for the next estimator."""
    num_parameters = 300
    stream = training(randn(20, num_parameters, seed=0))
    gram_dd = stream.gram().clone()
    validation_Vd = randn(3, num_parameters, seed=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        GaussNewton().queries(validation_Vd=validation_Vd, training=stream)
    held = peak = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 1.0 <= peak / gram_dd.nbytes < 1.1
    assert torch.equal(stream.gram(), gram_dd)
