import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.influence.row_sparse import skip_zero_rows


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 6), nn.Linear(5, 6, bias=False), Conv1D(6, 5)],
    ids=["bias", "no_bias", "conv1d"],
)
@pytest.mark.parametrize("num_used", [0, 1, 7, 12])
def test_input_gradient_is_the_dense_one(
    num_used: int, layer: nn.Module, device: torch.device
) -> None:
    """For no, few, most and all rows with a gradient."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).to(device).requires_grad_(requires_grad=False)
    x_BSI = torch.randn(3, 4, 5, device=device, requires_grad=True)
    weight_BSO = torch.zeros(3, 4, 6, device=device)
    weight_BSO.view(12, 6)[torch.randperm(12)[:num_used]] = torch.randn(num_used, 6, device=device)

    y_BSO = layer(x_BSI)
    (expected_BSI,) = torch.autograd.grad((y_BSO * weight_BSO).sum(), x_BSI)
    skip_zero_rows(nn.ModuleList([layer]))
    skipping_BSO = layer(x_BSI)
    (gradient_BSI,) = torch.autograd.grad((skipping_BSO * weight_BSO).sum(), x_BSI)
    torch.testing.assert_close(skipping_BSO, y_BSO)
    torch.testing.assert_close(gradient_BSI, expected_BSI)


def test_the_output_may_be_written_in_place(device: torch.device) -> None:
    """Models add residuals in place."""
    layer = nn.Linear(5, 5).to(device).requires_grad_(requires_grad=False)
    skip_zero_rows(layer)
    x_BSI = torch.randn(2, 3, 5, device=device, requires_grad=True)
    y_BSI = layer(x_BSI)
    y_BSI += x_BSI
    (gradient_BSI,) = torch.autograd.grad(y_BSI.sum(), x_BSI)
    torch.testing.assert_close(gradient_BSI, (1 + layer.weight.sum(dim=0)).expand(2, 3, 5))
