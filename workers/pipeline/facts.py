"""What the forward and backward pass tells of each sample, beside its gradients.

Shapes: N samples, C classes, M modules.
"""

import torch
from torch import Tensor

from workers.influence.gradients import SampleGradients


class Facts:
    """Collects loss, prediction and gradient lengths of samples, batch by batch."""

    def __init__(self, num_samples: int, num_modules: int) -> None:
        self._tensors = {
            "loss": torch.zeros(num_samples),
            "predicted": torch.zeros(num_samples, dtype=torch.int32),
            "predicted_probability": torch.zeros(num_samples),
            "given_probability": torch.zeros(num_samples),
            "squared_norm": torch.zeros(num_modules, num_samples),
        }

    def put(self, positions: slice | Tensor, sample: SampleGradients, label_B: Tensor) -> None:
        """Keep what a batch told of the samples at some positions."""
        probability_BC = sample.logits_BC.softmax(dim=1)
        predicted = probability_BC.max(dim=1)
        given_B = probability_BC.gather(1, label_B.to(probability_BC.device)[:, None])[:, 0]
        self._tensors["loss"][positions] = sample.loss_B.cpu()
        self._tensors["predicted"][positions] = predicted.indices.int().cpu()
        self._tensors["predicted_probability"][positions] = predicted.values.cpu()
        self._tensors["given_probability"][positions] = given_B.cpu()
        self._tensors["squared_norm"][:, positions] = sample.squared_norm_MB.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, with the sum of the squared norms of each module in float64."""
        total = self._tensors["squared_norm"].double().sum(dim=1)
        return {**self._tensors, "squared_norm_sum": total}
