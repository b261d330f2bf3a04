"""Frozen linear layers give what torch's own give, forwards and backwards."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.influence.frozen_linear import FrozenLayers

NOWHERE = nn.ModuleList()


def frozen(layer: nn.Module, *, is_in_last_block: bool) -> nn.Module:
    model = nn.ModuleList([copy.deepcopy(layer)])
    FrozenLayers(model, last_block=model if is_in_last_block else NOWHERE)
    return model[0]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 6), nn.Linear(5, 6, bias=False), Conv1D(6, 5)],
    ids=["bias", "no_bias", "conv1d"],
)
@pytest.mark.parametrize("is_in_last_block", [False, True])
@pytest.mark.parametrize("num_used", [0, 1, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_input_gradient_are_the_plain_ones(
    dtype: torch.dtype,
    num_used: int,
    is_in_last_block: bool,
    layer: nn.Module,
    device: torch.device,
) -> None:
    """For no, few, most and all rows with a gradient."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).to(device, dtype).requires_grad_(requires_grad=False)
    x_BSI = torch.randn(3, 4, 5, device=device, dtype=dtype, requires_grad=True)
    weight_BSO = torch.zeros(3, 4, 6, device=device, dtype=dtype)
    rows = torch.randperm(12)[:num_used]
    weight_BSO.view(12, 6)[rows] = torch.randn(num_used, 6, device=device, dtype=dtype)

    y_BSO = layer(x_BSI)
    (expected_BSI,) = torch.autograd.grad((y_BSO * weight_BSO).sum(), x_BSI)
    frozen_BSO = frozen(layer, is_in_last_block=is_in_last_block)(x_BSI)
    (gradient_BSI,) = torch.autograd.grad((frozen_BSO * weight_BSO).sum(), x_BSI)
    torch.testing.assert_close(frozen_BSO, y_BSO)
    torch.testing.assert_close(gradient_BSI, expected_BSI)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (0, 3, 5), (2, 3, 4, 5)])
def test_any_number_of_axes_is_taken(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 6).requires_grad_(requires_grad=False)
    x = torch.randn(shape)
    torch.testing.assert_close(frozen(layer, is_in_last_block=False)(x), layer(x))


def test_an_input_that_is_not_contiguous_is_taken_as_it_is() -> None:
    layer = nn.Linear(5, 6).requires_grad_(requires_grad=False)
    x_BSI = torch.randn(2, 5, 3).transpose(1, 2)
    torch.testing.assert_close(frozen(layer, is_in_last_block=False)(x_BSI), layer(x_BSI))


@pytest.mark.parametrize("is_in_last_block", [False, True])
def test_the_output_may_be_written_in_place(is_in_last_block: bool, device: torch.device) -> None:
    """Models add residuals in place."""
    layer = nn.Linear(5, 5).to(device).requires_grad_(requires_grad=False)
    x_BSI = torch.randn(2, 3, 5, device=device, requires_grad=True)
    y_BSI = frozen(layer, is_in_last_block=is_in_last_block)(x_BSI)
    y_BSI += x_BSI
    (gradient_BSI,) = torch.autograd.grad(y_BSI.sum(), x_BSI)
    torch.testing.assert_close(gradient_BSI, (1 + layer.weight.sum(dim=0)).expand(2, 3, 5))


def test_subclasses_of_linear_layers_are_left_alone() -> None:
    """They may hold something else than a weight matrix."""

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = Doubling(5, 6).requires_grad_(requires_grad=False)
    x = torch.randn(2, 5)
    torch.testing.assert_close(frozen(layer, is_in_last_block=True)(x), layer(x))
