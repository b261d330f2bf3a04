import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, randn
from workers.influence.estimators import tracin_we_topk
from workers.influence.estimators.tracin_we import TracInWE
from workers.influence.estimators.tracin_we_topk import TracInWETopK
from workers.influence.rows import SparseRows, sparse_rows

VOCABULARY = 12
WIDTH = 3
Text = list[int]

texts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=9), min_size=1, max_size=4)


def sides(ids: list[Text], *, seed: int) -> tuple[SparseRows, list[tuple[Tensor, list[int]]]]:
    """Rows as the engine holds them, padded, and every text's gradient [W, H] with its counts."""
    longest = max(1, *map(len, ids))
    ids_NS = torch.tensor([text + [0] * (longest - len(text)) for text in ids])
    mask_NS = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in ids])
    gradient_NSH = randn(len(ids), longest, WIDTH, seed=seed)
    rows = sparse_rows(ids_NS, gradient_NSH, mask_NS, vocabulary=VOCABULARY)
    dense = [
        oracles.embedding_gradient(text, gradient_SH[: len(text)], vocabulary=VOCABULARY)
        for text, gradient_SH in zip(ids, gradient_NSH, strict=True)
    ]
    return rows, dense


@settings(deadline=None, derandomize=True, max_examples=40)
@given(validation_ids=texts, train_ids=texts, seed=st.integers(0, 1000))
def test_tracin_we_is_the_dot_product_of_dense_gradients(
    validation_ids: list[Text], train_ids: list[Text], seed: int
) -> None:
    """Texts without common tokens, without any token, and with repeated ones."""
    validation, validation_dense = sides(validation_ids, seed=seed)
    train, train_dense = sides(train_ids, seed=seed + 1)
    expected_VB = oracles.pairs(
        torch.stack([gradient_WH.flatten() for gradient_WH, _ in validation_dense]),
        torch.stack([gradient_WH.flatten() for gradient_WH, _ in train_dense]),
        lambda v, g: float(v @ g),
    )
    assert_near(TracInWE().influence(validation=validation, train=train), expected_VB, share=1e-5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    validation_ids=texts, train_ids=texts, seed=st.integers(0, 1000), num_tokens=st.integers(1, 5)
)
def test_topk_pairs_the_same_tokens_on_both_sides(
    validation_ids: list[Text], train_ids: list[Text], seed: int, num_tokens: int
) -> None:
    validation, validation_dense = sides(validation_ids, seed=seed)
    train, train_dense = sides(train_ids, seed=seed + 1)
    kept = [
        torch.stack([oracles.strongest_words(*side, num_tokens).flatten() for side in dense_sides])
        for dense_sides in (validation_dense, train_dense)
    ]
    expected_VB = oracles.pairs(kept[0], kept[1], lambda v, g: float(v @ g))
    influence_VB = TracInWETopK(num_tokens=num_tokens).influence(validation=validation, train=train)
    assert_near(influence_VB, expected_VB, share=1e-5)


def test_different_strongest_tokens_have_nothing_in_common() -> None:
    """The k-th token of one side is not the k-th of the other."""
    validation, _ = sides([[3, 3, 3]], seed=0)
    train, _ = sides([[4, 4, 4]], seed=0)
    for estimator in (TracInWE(), TracInWETopK(num_tokens=1)):
        assert estimator.influence(validation=validation, train=train).tolist() == [[0.0]]


def test_enough_tokens_are_all_tokens() -> None:
    validation, _ = sides([[1, 2, 2], [5, 6, 7, 8]], seed=1)
    train, _ = sides([[2, 7], [1], [9, 9, 8]], seed=2)
    torch.testing.assert_close(
        TracInWETopK(num_tokens=VOCABULARY).influence(validation=validation, train=train),
        TracInWE().influence(validation=validation, train=train),
    )


def test_the_first_pair_leaves_the_gradients_as_they_were() -> None:
    """Nor does another number of tokens take what was kept for the first."""
    validation, _ = sides([[1, 2, 3, 4]], seed=3)
    train, _ = sides([[4, 3, 2, 1]], seed=4)

    def influence(validation: SparseRows, num_tokens: int) -> Tensor:
        return TracInWETopK(num_tokens=num_tokens).influence(validation=validation, train=train)

    first_VB = influence(validation, 3)
    assert not torch.equal(influence(validation, 4), first_VB)
    assert torch.equal(influence(validation, 3), first_VB)


def test_what_is_kept_of_the_validation_side_goes_with_it() -> None:
    before = len(tracin_we_topk._kept)
    validation, _ = sides([[1, 2, 3, 4]], seed=3)
    TracInWETopK(num_tokens=2).influence(validation=validation, train=validation)
    assert len(tracin_we_topk._kept) == before + 1
    del validation
    gc.collect()
    assert len(tracin_we_topk._kept) <= before
