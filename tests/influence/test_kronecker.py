"""Sums over tokens, added up and written down."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from workers.influence.kronecker import KroneckerSums

INPUTS, OUTPUTS = 4, 3


def test_kronecker_sums_add_up_and_survive_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(10, INPUTS, generator=generator)
    g_RO = torch.randn(10, OUTPUTS, generator=generator)
    whole = KroneckerSums.of_tokens(x_RI, g_RO, num_tokens=10)
    parts = [
        KroneckerSums.of_tokens(x_RI[rows], g_RO[rows], num_tokens=len(x_RI[rows]))
        for rows in (slice(0, 3), slice(3, 10))
    ]
    added = parts[0] + parts[1]
    assert added.num_tokens == 10
    torch.testing.assert_close(whole.input_II.float(), x_RI.T @ x_RI)
    torch.testing.assert_close(added.tensors(), whole.tensors(), rtol=1e-6, atol=1e-6)
    save_file(added.tensors(), tmp_path / "sums.safetensors")
    loaded = KroneckerSums.from_tensors(load_file(tmp_path / "sums.safetensors")).to("cpu")
    torch.testing.assert_close(loaded.tensors(), added.tensors(), rtol=0, atol=0)
    assert loaded.num_tokens == 10
    assert loaded.output_OO.dtype is torch.float64


def test_sums_are_added_in_place() -> None:
    """To the same bits as side by side, and without new matrices."""
    generator = torch.Generator().manual_seed(1)
    first, second = (
        KroneckerSums.of_tokens(
            torch.randn(size, INPUTS, generator=generator),
            torch.randn(size, OUTPUTS, generator=generator),
            num_tokens=size,
        )
        for size in (3, 7)
    )
    added = first + second
    assert (first.num_tokens, second.num_tokens, added.num_tokens) == (3, 7, 10)
    in_place = KroneckerSums.zeros(OUTPUTS, INPUTS)
    held = in_place.input_II
    assert in_place.add_(first).add_(second) is in_place
    assert in_place.input_II is held
    torch.testing.assert_close(in_place.tensors(), added.tensors(), rtol=0, atol=0)
