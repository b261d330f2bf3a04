"""Gradients of one module, in every form, against the same gradients written out.

Shapes: N samples, S tokens, I/O input and output features, P sample and token pairs, H width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.influence.row_forms import (
    EVERY_FORM,
    INPUTS,
    OUTPUTS,
    VOCABULARY,
    WIDTH,
    Build,
    build_dense,
    build_factored,
    build_sparse,
    build_tokens,
    generator_of,
    written_out,
)
from workers.influence.rows import (
    DenseRows,
    FactoredRows,
    GradientRows,
    SparseRows,
    factored,
    join,
    rows_from_tensors,
    sparse_rows,
)


@EVERY_FORM
@pytest.mark.parametrize(("num_left", "num_right"), [(1, 1), (5, 3), (9, 20), (0, 4), (4, 0)])
def test_dot_is_the_product_of_the_rows(build: Build, num_left: int, num_right: int) -> None:
    left, right = build(num_left, seed=1), build(num_right, seed=2)
    dot = left.dot(right)
    assert dot.dtype is torch.float32
    assert dot.shape == (num_left, num_right)
    torch.testing.assert_close(
        dot.double(), written_out(left) @ written_out(right).T, rtol=1e-5, atol=1e-4
    )


@EVERY_FORM
def test_sums_are_those_of_the_rows(build: Build) -> None:
    rows = build(9)
    dense_Nd = written_out(rows)
    for result_N, expected_N in (
        (rows.squared_norm(), dense_Nd.square().sum(dim=1)),
        (rows.absolute_sum(), dense_Nd.abs().sum(dim=1)),
        (rows.entry_sum(), dense_Nd.sum(dim=1)),
    ):
        assert result_N.dtype is torch.float32
        torch.testing.assert_close(result_N.double(), expected_N, rtol=1e-5, atol=1e-4)
    total = rows.total()
    if isinstance(total, tuple):
        token_U, total_UH = total
        assert token_U.tolist() == sorted(set(rows.tensors()["token"].tolist()))
        dense_UH = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64)
        dense_UH[token_U] = total_UH
        total = dense_UH.flatten()
    assert total.dtype is torch.float64
    torch.testing.assert_close(total, dense_Nd.sum(dim=0), rtol=1e-5, atol=1e-4)


@EVERY_FORM
def test_rows_of_no_samples_have_no_sums(build: Build) -> None:
    rows = build(0)
    for result_N in (rows.squared_norm(), rows.absolute_sum(), rows.entry_sum()):
        assert result_N.shape == (0,)
    total = rows.total()
    assert (total if isinstance(total, Tensor) else total[1]).sum() == 0


@EVERY_FORM
@pytest.mark.parametrize("index", [[], [3], [4, 0, 4, 2], [0, 1, 2, 3, 4, 5]])
def test_select_takes_and_orders_samples(build: Build, index: list[int]) -> None:
    """Repeats are allowed, and so is nothing."""
    rows = build(6)
    selected = rows.select(torch.tensor(index, dtype=torch.int64))
    assert len(selected) == selected.num_samples == len(index)
    assert selected.num_parameters == rows.num_parameters
    torch.testing.assert_close(written_out(selected), written_out(rows)[index])


@EVERY_FORM
def test_concatenate_puts_samples_behind_one_another(build: Build) -> None:
    parts = [build(3, seed=1), build(0, seed=2), build(4, seed=3)]
    joined = GradientRows.concatenate(parts)
    assert type(joined) is type(parts[0])
    assert len(joined) == 7
    torch.testing.assert_close(
        written_out(joined), torch.cat([written_out(part) for part in parts])
    )
    torch.testing.assert_close(joined.dot(joined), joined.dot(joined).T)


@EVERY_FORM
def test_tensors_survive_a_file(build: Build, tmp_path: Path) -> None:
    rows = build(6).select(torch.tensor([5, 1, 1]))
    save_file(rows.tensors(), tmp_path / "rows.safetensors")
    loaded = rows_from_tensors(load_file(tmp_path / "rows.safetensors"))
    assert type(loaded) is type(rows)
    assert (len(loaded), loaded.num_parameters) == (3, rows.num_parameters)
    assert not any("/" in name for name in rows.tensors())
    assert torch.equal(written_out(loaded), written_out(rows))


@EVERY_FORM
def test_rows_move_to_a_device(build: Build, device: torch.device) -> None:
    rows = build(4).to(device)
    torch.testing.assert_close(rows.dot(rows).cpu(), build(4).dot(build(4)))


def test_rows_of_different_forms_or_modules_do_not_mix() -> None:
    with pytest.raises(TypeError, match="DenseRows has no dot product with FactoredRows"):
        build_dense(2).dot(build_factored(2))
    with pytest.raises(ValueError, match="12 entries against 13"):
        build_dense(2).dot(DenseRows(torch.zeros(2, 13)))
    mixed: list[GradientRows] = [build_dense(2), build_factored(2)]
    with pytest.raises(TypeError, match="cannot be joined with FactoredRows"):
        GradientRows.concatenate(mixed)
    with pytest.raises(ValueError, match="not of one module"):
        GradientRows.concatenate([build_dense(2), DenseRows(torch.zeros(2, 13))])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        GradientRows.concatenate([])
    with pytest.raises(ValueError, match="named a, b are no gradient rows"):
        rows_from_tensors({"b": torch.zeros(1), "a": torch.zeros(1)})
    with pytest.raises(TypeError, match="never written out"):
        build_sparse(2).dense()


def test_factored_rows_are_flattened_like_the_weight() -> None:
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    rows = build_factored(1)
    (layer(rows.x_NSI) * rows.g_NSO).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(rows.dense()[0], layer.weight.grad.flatten())


def test_padding_of_factored_rows_changes_nothing() -> None:
    """More zero tokens, whatever the inputs there, leave every result as it is."""
    rows, other = build_factored(5), build_factored(4, seed=1, num_tokens=3)
    padded = FactoredRows(
        torch.cat([rows.x_NSI, torch.full((5, 6, INPUTS), 1e6)], dim=1),
        torch.cat([rows.g_NSO, torch.zeros(5, 6, OUTPUTS)], dim=1),
    )
    torch.testing.assert_close(padded.dot(other), rows.dot(other))
    torch.testing.assert_close(other.dot(padded), other.dot(rows))
    for name in ("squared_norm", "absolute_sum", "entry_sum", "total", "dense"):
        torch.testing.assert_close(getattr(padded, name)(), getattr(rows, name)())


@pytest.mark.parametrize("chunk", [1, 10, 200])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_chunks_of_factored_rows_do_not_show(
    chunk: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, other = build_factored(9, num_tokens=num_tokens), build_factored(8, seed=1)
    names = ("squared_norm", "absolute_sum", "entry_sum", "total")
    expected = [rows.dot(other), *(getattr(rows, name)() for name in names)]
    monkeypatch.setattr(factored, "_CHUNK_ENTRIES", chunk)
    result = [rows.dot(other), *(getattr(rows, name)() for name in names)]
    torch.testing.assert_close(result, expected)


class _LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives no types
        self.num_entries = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_entries = max(self.num_entries, result.numel())
        return result


def test_factored_rows_never_build_the_gradients() -> None:
    """Neither the dot product nor the length makes N × O × I entries, or all pairs of tokens."""
    num_samples, num_tokens, size = 64, 48, 512
    generator = generator_of(0)
    rows = FactoredRows(
        torch.randn(num_samples, num_tokens, size, generator=generator),
        torch.randn(num_samples, num_tokens, size, generator=generator),
    )
    with _LargestTensor() as largest:
        rows.dot(rows)
        rows.squared_norm()
    assert largest.num_entries <= 2**22 < (num_samples * num_tokens) ** 2
    assert largest.num_entries < num_samples * size * size


def test_squared_length_of_factored_rows_is_never_negative() -> None:
    """Two tokens that cancel leave rounding only."""
    x_NSI = torch.full((1, 2, 3), 1 / 3)
    g_NSO = torch.tensor([[[0.1, 0.7], [-0.1, -0.7]]])
    assert float(FactoredRows(x_NSI, g_NSO).squared_norm()) >= 0


_SPARSE = st.builds(
    build_sparse,
    st.integers(0, 7),
    seed=st.integers(0, 1000),
    vocabulary=st.integers(1, VOCABULARY),
    length=st.integers(1, 12),
)


@given(
    left=_SPARSE,
    right=_SPARSE,
    few=st.sampled_from([0, 4, 10**6]),
    chunk=st.sampled_from([1, 9, 2**20]),
)
def test_sparse_dot_pairs_the_same_tokens(
    left: SparseRows, right: SparseRows, few: int, chunk: int
) -> None:
    """All, some or no tokens in common, empty samples, every way and size of the join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "_FEW_PRODUCTS", few)
        patch.setattr(join, "_CHUNK_PRODUCTS", chunk)
        dot_NN = left.dot(right)
    torch.testing.assert_close(
        dot_NN.double(), written_out(left) @ written_out(right).T, rtol=1e-5, atol=1e-4
    )


def test_sparse_dot_without_a_common_token_is_zero() -> None:
    left = build_sparse(4)
    right = SparseRows(
        3,
        left.num_parameters,
        torch.tensor([1]),
        torch.tensor([VOCABULARY - 1]),
        torch.ones(1, WIDTH),
        torch.tensor([1]),
    )
    left = left._take((left.token_P != VOCABULARY - 1).nonzero().flatten())
    assert torch.equal(left.dot(right), torch.zeros(4, 3))


@given(seed=st.integers(0, 1000), num_samples=st.integers(0, 6), length=st.integers(1, 12))
def test_sparse_rows_are_the_gradient_of_the_embedding(
    seed: int, num_samples: int, length: int
) -> None:
    """Summed over the occurrences of a token; padding, on either side, gives nothing."""
    input_ids_BS, gradient_BSH, mask_BS = build_tokens(
        num_samples, seed=seed, vocabulary=VOCABULARY, length=length
    )
    rows = sparse_rows(input_ids_BS, gradient_BSH, mask_BS, vocabulary=VOCABULARY)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    for sample in range(num_samples):
        embedding.zero_grad()
        weight_SH = gradient_BSH[sample] * mask_BS[sample][:, None]
        (embedding(input_ids_BS[sample]) * weight_SH).sum().backward()
        assert embedding.weight.grad is not None
        torch.testing.assert_close(
            written_out(rows)[sample].float(), embedding.weight.grad.flatten()
        )
        real = input_ids_BS[sample][mask_BS[sample] == 1].tolist()
        of_sample = rows.sample_P == sample
        tokens, counts = rows.token_P[of_sample].tolist(), rows.count_P[of_sample].tolist()
        assert dict(zip(tokens, counts, strict=True)) == {t: real.count(t) for t in real}
    assert torch.equal(rows.sample_P, rows.sample_P.sort().values)
    assert rows.num_parameters == VOCABULARY * WIDTH


def test_sparse_rows_of_a_low_precision_model_are_float32() -> None:
    input_ids_BS, gradient_BSH, mask_BS = build_tokens(3, seed=0, vocabulary=4, length=6)
    rows = sparse_rows(input_ids_BS, gradient_BSH.bfloat16(), mask_BS, vocabulary=4)
    assert rows.value_PH.dtype is torch.float32
    expected = sparse_rows(input_ids_BS, gradient_BSH.bfloat16().float(), mask_BS, vocabulary=4)
    assert torch.equal(rows.value_PH, expected.value_PH)


@given(seed=st.integers(0, 1000), k=st.integers(1, 9))
def test_strongest_tokens_are_those_of_a_sorted_list(seed: int, k: int) -> None:
    rows = build_sparse(5, seed=seed, vocabulary=9, length=12)
    # values of few different lengths, so that ties happen
    rows.value_PH.copy_(rows.value_PH.sign() * rows.token_P[:, None].remainder(3))
    kept = rows.strongest(k)
    assert len(kept) == 5
    for sample in range(5):
        of_sample = rows.sample_P == sample
        strength = (rows.value_PH[of_sample].norm(dim=1) / rows.count_P[of_sample]).tolist()
        tokens = rows.token_P[of_sample].tolist()
        best = sorted(zip(strength, tokens, strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        assert kept.token_P[kept.sample_P == sample].tolist() == sorted(t for _, t in best)
    dense_Nd, kept_Nd = written_out(rows), written_out(kept)
    torch.testing.assert_close(kept_Nd[kept_Nd != 0], dense_Nd[kept_Nd != 0])


def test_strongest_tokens_go_by_the_length_per_occurrence() -> None:
    """A frequent token with a longer gradient loses to a rare one; of equals the smaller id."""
    rows = SparseRows(
        num_samples=2,
        num_parameters=20,
        sample_P=torch.tensor([0, 0, 0, 1, 1]),
        token_P=torch.tensor([2, 5, 7, 1, 3]),
        value_PH=torch.tensor([[4.0, 0.0], [0.0, 3.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        count_P=torch.tensor([4, 1, 1, 1, 1]),
    )
    assert rows.strongest(1).token_P.tolist() == [5, 1]
    assert rows.strongest(2).token_P.tolist() == [5, 7, 1, 3]
    assert rows.strongest(2).count_P.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="below 1"):
        rows.strongest(0)


def test_the_order_of_a_tokens_occurrences_is_lost_in_the_rounding() -> None:
    """A GPU leaves it open: in float32 the 1 would be there in some orders alone."""
    gradient_S = torch.tensor([1e8, 1.0, -1e8])
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        rows = sparse_rows(
            torch.zeros(1, 3, dtype=torch.int64),
            gradient_S[order][None, :, None],
            torch.ones(1, 3),
            vocabulary=VOCABULARY,
        )
        assert rows.value_PH.tolist() == [[1.0]]
        assert rows.value_PH.dtype is torch.float32
