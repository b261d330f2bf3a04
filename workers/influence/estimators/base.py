"""What an estimator is: four kinds by what they are given.

Every estimator is stateless and deterministic. Positive influence = helpful; the lowest-scored
samples are the suspects.

Shapes: V validation samples, B a block of training samples, T all of them, d entries of a module.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


class Estimator(ABC):
    """What is common to all estimators.

    Attributes:
        name: key in the registry.
        kind: pairwise: an influence for every pair of a training and a validation sample and every
            module; sample: one number per training sample and module; baseline: one number per
            training sample.
        description: when to use it, in a sentence.
        needs_validation: whether it looks at validation samples.
        needs_curvature: whether it needs a sum over all training gradients beforehand.
        needs_known_noise: whether it needs to know which samples are noisy.
        has_layers: whether it has a value for every module, hence for every layer group.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["pairwise", "sample", "baseline"]]
    description: ClassVar[str]
    needs_validation: ClassVar[bool]
    needs_curvature: ClassVar[bool] = False
    needs_known_noise: ClassVar[bool] = False
    has_layers: ClassVar[bool]


class DotEstimator(Estimator):
    """Influence from the dot products and lengths of two gradients of one module."""

    kind = "pairwise"
    needs_validation = True
    has_layers = True

    @abstractmethod
    def influence(
        self, *, dot_VB: Tensor, validation_norm_V: Tensor, train_norm_B: Tensor
    ) -> Tensor:
        """Estimate the influence of a block of training samples by one module.

        Args:
            dot_VB: v_j · g_i.
            validation_norm_V: ‖v_j‖.
            train_norm_B: ‖g_i‖.

        Returns:
            influence_VB, of the dtype of `dot_VB`.
        """


class CurvatureEstimator(Estimator):
    """Influence through a curvature that is summed over all training samples first.

    A module is done in two passes over the training gradients: `partial_curvature` of every block,
    summed up; then `precondition` once, whose rows dotted with training gradients are influence.
    """

    kind = "pairwise"
    needs_validation = True
    needs_curvature = True
    has_layers = True

    @abstractmethod
    def damping(self, *, mean_squared_norm: float, num_parameters: int) -> float:
        """Return the damping λ of a module, 0 where all its gradients are zero.

        Args:
            mean_squared_norm: mean of ‖g_k‖² over ALL training samples.
            num_parameters: entries of the module, d.
        """

    @abstractmethod
    def partial_curvature(
        self, *, validation_Vd: Tensor, train_Bd: Tensor, damping: float
    ) -> Tensor:
        """Return a block's part of the curvature term, float64 [V, d]; parts add up.

        Args:
            validation_Vd: gradients v_j; pass float64 to spare a conversion for every block.
            train_Bd: gradients g_k of the block.
            damping: λ of the module.
        """

    @abstractmethod
    def precondition(
        self, *, validation_Vd: Tensor, curvature_Vd: Tensor, num_train: int, damping: float
    ) -> Tensor:
        """Return query_Vd, float32, with query_j · g_i = the influence of x_i on v_j.

        Args:
            validation_Vd: gradients v_j.
            curvature_Vd: the parts of ALL training samples, summed.
            num_train: number of all training samples.
            damping: λ of the module.

        Raises:
            NonFiniteInfluence: a query is not finite; names the validation samples.
        """


class SampleEstimator(Estimator):
    """One number per training sample and module, without a validation sample."""

    kind = "sample"
    needs_validation = False
    has_layers = True

    @abstractmethod
    def influence(self, *, squared_norm_B: Tensor) -> Tensor:
        """Return influence_1B, as if on one validation sample, from ‖g_i‖² of one module."""


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What is known of every training sample without gradients.

    Attributes:
        loss_T: float32, the loss at the checkpoint.
        is_noisy_T: bool, the known noise; None where nobody knows.
        seed: of whatever is drawn.
    """

    loss_T: Tensor
    is_noisy_T: Tensor | None
    seed: int


class Baseline(Estimator):
    """One score per training sample, to compare influence with."""

    kind = "baseline"
    needs_validation = False
    has_layers = False

    @abstractmethod
    def score(self, facts: SampleFacts) -> Tensor:
        """Return score_T, float32; the lowest are suspects."""
