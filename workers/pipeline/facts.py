"""What the forward and backward pass tells of each sample, beside influence.

Shapes: N samples, M modules, d entries of a module, U tokens, H width, W columns.
"""

import torch
from torch import Tensor

from workers.influence.gradients import SampleGradients
from workers.pipeline.samples import NO_CLASS


class Facts:
    """Collects loss, prediction and gradient lengths of samples, batch by batch.

    Of a classifier also the probabilities of the classes, and with `features` what it reads its
    answer from: the last block's hidden states. Compared by influence are the samples whose
    gradient was taken, and is finite.
    """

    def __init__(self, num_samples: int, num_modules: int, *, features: bool = False) -> None:
        self._num_samples, self._has_features = num_samples, features
        self._tensors = {
            "loss": torch.zeros(num_samples),
            "predicted": torch.full((num_samples,), NO_CLASS, dtype=torch.int32),
            "predicted_probability": torch.zeros(num_samples),
            "given_probability": torch.zeros(num_samples),
            "squared_norm": torch.zeros(num_modules, num_samples),
            "is_finite": torch.zeros(num_samples, dtype=torch.bool),
            "is_compared": torch.zeros(num_samples, dtype=torch.bool),
        }

    def put(self, positions: slice | Tensor, sample: SampleGradients) -> None:
        """Keep what a batch told of the samples at some positions."""
        outcome = sample.outcome
        self._tensors["loss"][positions] = sample.loss_B.cpu()
        if outcome.predicted_B is not None:
            self._tensors["predicted"][positions] = outcome.predicted_B.int().cpu()
        self._tensors["predicted_probability"][positions] = outcome.predicted_probability_B.cpu()
        self._tensors["given_probability"][positions] = outcome.given_probability_B.cpu()
        self._tensors["squared_norm"][:, positions] = sample.squared_norm_MB.cpu()
        self._tensors["is_finite"][positions] = sample.is_finite_B.cpu()
        if sample.gradients:
            self._tensors["is_compared"][positions] = sample.is_finite_B.cpu()
        if outcome.logits_BC is not None:
            self._put_wide("class_probability", positions, outcome.logits_BC.softmax(dim=1))
            if self._has_features and sample.hidden_LBH is not None:
                self._put_wide("features", positions, sample.hidden_LBH[-1])

    def put_sketch(self, positions: slice | Tensor, sketch_BK: Tensor) -> None:
        """Keep sketches of length 1 of a batch's gradients: float16 does for them."""
        self._put_wide("sketch", positions, sketch_BK, dtype=torch.float16)

    def _put_wide(
        self,
        name: str,
        positions: slice | Tensor,
        value_BW: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(self._num_samples, value_BW.shape[1], dtype=dtype)
        self._tensors[name][positions] = value_BW.to("cpu", dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything; numbers of samples that are not finite are 0.

        So every answer can carry them.
        """
        return {
            name: value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            if value.is_floating_point()
            else value
            for name, value in self._tensors.items()
        }


class Totals:
    """Sums gradients over samples, module by module: what the cancellation is made of."""

    def __init__(self, num_modules: int) -> None:
        self._absolute_M = torch.zeros(num_modules, dtype=torch.float64)
        self._dense: dict[int, Tensor] = {}
        self._sparse: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, sample: SampleGradients) -> None:
        """Add the gradients of a batch; those of samples that are not finite are zero."""
        # all sums first: a batch that runs out of memory here is done again, and counts once
        absolute_M = torch.stack(
            [rows.absolute_sum().double().sum().cpu() for rows in sample.gradients]
        )
        totals = [rows.total() for rows in sample.gradients]
        self._absolute_M += absolute_M
        for module, total in enumerate(totals):
            if isinstance(total, tuple):
                ids_U, rows_UH = total
                self._sparse.setdefault(module, []).append((ids_U.cpu(), rows_UH.cpu()))
            elif module in self._dense:
                self._dense[module] += total.cpu()
            else:
                self._dense[module] = total.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Return `absolute_sum` [M] and, by module, `total/<module>`, float64.

        That of the word embeddings is [U, H], with the tokens [U] as `total_tokens/<module>`.
        """
        result = {"absolute_sum": self._absolute_M}
        for module, total_d in self._dense.items():
            result[f"total/{module:05d}"] = total_d
        for module, parts in self._sparse.items():
            ids_U, place_P = torch.cat([ids for ids, _ in parts]).unique(return_inverse=True)
            rows_PH = torch.cat([rows for _, rows in parts])
            total_UH = rows_PH.new_zeros(len(ids_U), rows_PH.shape[1])
            result[f"total/{module:05d}"] = total_UH.index_add_(0, place_P, rows_PH)
            result[f"total_tokens/{module:05d}"] = ids_U
        return result
