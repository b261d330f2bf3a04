"""The two-sided random projection of big weight matrices.

Shapes: B batch, S sequence, I/O input and output features, V draws.
"""

import pytest
import torch
from torch import Tensor

from workers.influence.projection import ModuleProjection, Projection

INPUTS, OUTPUTS = 24, 17


def _tokens(num_samples: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BSI = torch.randn(num_samples, 5, INPUTS, generator=generator)
    g_BSO = torch.randn(num_samples, 5, OUTPUTS, generator=generator)
    g_BSO[:, 3:] = 0
    return x_BSI, g_BSO


def _project(
    *, dimension: int = 6, seed: int = 0, name: str = "layer.0", device: str = "cpu"
) -> Tensor:
    projection = ModuleProjection(
        Projection(dimension, seed),
        name=name,
        in_features=INPUTS,
        out_features=OUTPUTS,
        device=device,
    )
    x_BSI, g_BSO = _tokens()
    return projection.project(x_BSI.to(device), g_BSO.to(device))


def test_projected_dot_products_are_right_on_average() -> None:
    """Over many seeds their mean is within three standard errors of the exact dot product."""
    x_BSI, g_BSO = _tokens()
    exact_Bd = (g_BSO.mT @ x_BSI).flatten(1)
    exact_BB = exact_Bd @ exact_Bd.T
    draws = torch.stack([_project(seed=seed) for seed in range(600)])
    dot_VBB = draws @ draws.mT
    error_BB = (dot_VBB.mean(dim=0) - exact_BB).abs()
    assert bool((error_BB < 3 * dot_VBB.std(dim=0) / 600**0.5).all())


def test_projection_is_that_of_the_whole_gradient() -> None:
    """Projecting tokens is P_O G P_Iᵀ, flattened row by row."""
    projection = ModuleProjection(
        Projection(6, 0), name="layer.0", in_features=INPUTS, out_features=OUTPUTS
    )
    x_BSI, g_BSO = _tokens()
    p_KI = projection._input_KI
    p_KO = projection._output_KO
    assert p_KI is not None
    assert p_KO is not None
    expected = p_KO @ (g_BSO.mT @ x_BSI) @ p_KI.T
    assert projection.shape == (6, 6) == tuple(expected.shape[1:])
    torch.testing.assert_close(projection.project(x_BSI, g_BSO), expected.flatten(1))


def test_entries_have_the_variance_of_one_over_the_dimension() -> None:
    projection = ModuleProjection(
        Projection(64, 0), name="layer.0", in_features=2000, out_features=1000
    )
    for matrix in (projection._input_KI, projection._output_KO):
        assert matrix is not None
        assert abs(float(matrix.var()) * 64 - 1) < 0.03
        assert abs(float(matrix.mean())) < 1e-3


@pytest.mark.parametrize("dimension", [INPUTS, 100])
def test_a_dimension_beyond_the_module_leaves_it_exact(dimension: int) -> None:
    x_BSI, g_BSO = _tokens()
    torch.testing.assert_close(_project(dimension=dimension), (g_BSO.mT @ x_BSI).flatten(1))


def test_only_the_longer_side_is_projected() -> None:
    projection = ModuleProjection(
        Projection(20, 0), name="layer.0", in_features=INPUTS, out_features=OUTPUTS
    )
    assert projection.shape == (OUTPUTS, 20)
    assert projection.project(*_tokens()).shape == (3, OUTPUTS * 20)


def test_the_draw_depends_on_seed_and_name_alone() -> None:
    """Neither on modules drawn before nor on torch's own seed; both sides differ."""
    first = _project()
    torch.manual_seed(1)
    _project(name="layer.1")
    assert torch.equal(_project(), first)
    assert not torch.equal(_project(seed=1), first)
    assert not torch.equal(_project(name="layer.1"), first)
    square = ModuleProjection(Projection(4, 0), name="a", in_features=8, out_features=8)
    assert square._input_KI is not None
    assert square._output_KO is not None
    assert not torch.equal(square._input_KI, square._output_KO)


def test_the_draw_is_the_same_on_every_device(device: torch.device) -> None:
    torch.testing.assert_close(_project(device=str(device)).cpu(), _project())


def test_low_precision_is_projected_in_float32() -> None:
    projection = ModuleProjection(
        Projection(6, 0), name="layer.0", in_features=INPUTS, out_features=OUTPUTS
    )
    x_BSI, g_BSO = (value.bfloat16() for value in _tokens())
    result = projection.project(x_BSI, g_BSO)
    assert result.dtype is torch.float32
    assert torch.equal(result, projection.project(x_BSI.float(), g_BSO.float()))


def test_padding_changes_nothing() -> None:
    projection = ModuleProjection(
        Projection(6, 0), name="layer.0", in_features=INPUTS, out_features=OUTPUTS
    )
    x_BSI, g_BSO = _tokens()
    torch.testing.assert_close(
        projection.project(x_BSI, g_BSO), projection.project(x_BSI[:, :3], g_BSO[:, :3])
    )


def test_a_dimension_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        Projection(0, 0)
