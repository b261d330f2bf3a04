"""What an estimator is: eight kinds by what they are given.

Every estimator is a frozen dataclass whose fields are its parameters; it is stateless and
deterministic. Positive influence = helpful; the lowest-scored samples are the suspects.

Shapes: V validation samples, B a block of training samples, T all of them, d entries of a module,
C classes, H hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.influence.errors import NonFiniteInfluence
from workers.influence.estimators.parameters import Parameter
from workers.influence.estimators.training import TrainingGradients
from workers.influence.layers import ModuleSpec
from workers.influence.rows import SparseRows


class Estimator(ABC):
    """What is common to all estimators.

    Attributes:
        name: key in the registry.
        kind: pairwise: an influence for every pair of a training and a validation sample; class:
            one for every pair of a training sample and a class; sample: one number per training
            sample; baseline: the same, without layers.
        axis: what the pairs are taken over: every module, the word embedding alone, every
            transformer block, or nothing.
        description: when to use it, in a sentence.
        needs_validation: whether it looks at validation samples.
        needs_known_noise: whether it needs to know which samples are noisy.
        needs_curvature: whether it needs a sum over all training gradients beforehand.
        needs_kronecker: whether that sum needs `KroneckerSums`.
        needs_checkpoints: whether it needs several states of the model.
        needs_word_embeddings: whether it looks at the gradients of the word embeddings.
        needs_hidden_states: whether it looks at hidden states.
        needs_features: it needs the model's last hidden states, kept.
        needs_classes: whether samples must have classes.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["pairwise", "class", "sample", "baseline"]]
    axis: ClassVar[Literal["modules", "word_embedding", "blocks", "none"]] = "modules"
    description: ClassVar[str]
    needs_validation: ClassVar[bool] = True
    needs_known_noise: ClassVar[bool] = False
    needs_curvature: ClassVar[bool] = False
    needs_kronecker: ClassVar[bool] = False
    needs_checkpoints: ClassVar[bool] = False
    needs_word_embeddings: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, described in self.parameters().items():
            described.check(name, getattr(self, name))

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """Return what a user may set, by name."""
        if not is_dataclass(cls):
            return {}
        return {each.name: each.metadata["parameter"] for each in fields(cls)}

    @property
    def has_layers(self) -> bool:
        """Whether it has a value for every module or block, hence for every layer group."""
        return self.axis != "none"


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """What is known of the gradients of one module beside their dot products.

    Attributes:
        norm_N: float32, the length of every gradient.
        entry_sum_N: float32, the sum of its entries; zeros where no estimator needs it.
        num_parameters: d.
    """

    norm_N: Tensor
    entry_sum_N: Tensor
    num_parameters: int


class DotEstimator(Estimator):
    """Influence from the dot products of two gradients of one module, their lengths and sums.

    Attributes:
        needs_entry_sums: whether it looks at `RowStatistics.entry_sum_N`.
    """

    kind = "pairwise"
    needs_entry_sums: ClassVar[bool] = False

    @abstractmethod
    def influence(
        self, *, dot_VB: Tensor, validation: RowStatistics, train: RowStatistics
    ) -> Tensor:
        """Estimate the influence of a block of training samples by one module.

        Args:
            dot_VB: v_j · g_i.
            validation: of the gradients v_j.
            train: of the gradients g_i.

        Returns:
            influence_VB, of the dtype of `dot_VB`; finite wherever its input is.
        """


class ClassEstimator(Estimator):
    """Influence on a class as a whole, from dot products with its validation gradients."""

    kind = "class"
    needs_classes = True

    @abstractmethod
    def fit(
        self, *, gram_VV: Tensor, norm_V: Tensor, class_V: Tensor, num_classes: int
    ) -> dict[str, Tensor]:
        """Fit the validation gradients of every class, by one module.

        Args:
            gram_VV: v_j · v_k.
            norm_V: ‖v_j‖.
            class_V: int64; −1 for samples that are left out.
            num_classes: C.

        Returns:
            Contiguous tensors on the CPU, for `influence`.
        """

    @abstractmethod
    def influence(
        self,
        *,
        dot_VB: Tensor,
        norm_V: Tensor,
        train_norm_B: Tensor,
        fitted: Mapping[str, Tensor],
    ) -> Tensor:
        """Estimate the influence of a block of training samples on every class.

        Args:
            dot_VB: v_j · g_i.
            norm_V: ‖v_j‖.
            train_norm_B: ‖g_i‖.
            fitted: what `fit` gave, on the device of the others.

        Returns:
            influence_CB, of the dtype of `dot_VB`; zeros for classes without validation samples.
        """


class CurvatureEstimator(Estimator):
    """Influence through a curvature that is summed over all training samples first.

    Its query is the validation gradient times the inverse of the curvature; rows dotted with
    training gradients are influence. Decompositions and sums are in float64.

    Attributes:
        damping: λ as a share of the mean eigenvalue of the curvature, trace / d.
    """

    kind = "pairwise"
    needs_curvature = True
    damping: float

    def queries(self, *, validation_Vd: Tensor, training: TrainingGradients) -> Tensor:
        """Return query_Vd, float32, with query_j · g_i = the influence of x_i on v_j by one module.

        Zeros where all training gradients of the module are zero: it tells nothing.

        Args:
            validation_Vd: gradients v_j.
            training: the gradients of ALL training samples.

        Raises:
            InsufficientMemory: the module is too large for the estimator; says what to change.
            NonFiniteInfluence: a query is not finite; names the validation samples.
        """
        damping = self.damping * training.mean_eigenvalue
        if damping == 0 or len(validation_Vd) == 0:
            return torch.zeros_like(validation_Vd, dtype=torch.float32)
        query_Vd = self.precondition(validation_Vd.double(), training, damping).float()
        broken_V = ~torch.isfinite(query_Vd).all(dim=1)
        if bool(broken_V.any()):
            raise NonFiniteInfluence(
                "the preconditioned validation gradient",
                positions=broken_V.nonzero().flatten().tolist(),
            )
        return query_Vd

    def check_size(self, spec: ModuleSpec) -> None:
        """Check, before any gradient is taken, that a module is not too large.

        Raises:
            InsufficientMemory: it is; says what to change.
        """

    @abstractmethod
    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        """Return the queries in float64 for float64 gradients and λ > 0."""


class WordEmbeddingEstimator(Estimator):
    """Influence from the gradients of the word embeddings, sparse by token."""

    kind = "pairwise"
    axis = "word_embedding"
    needs_word_embeddings = True

    @abstractmethod
    def influence(self, *, validation: SparseRows, train: SparseRows) -> Tensor:
        """Return influence_VB, float32."""


class HiddenStateEstimator(Estimator):
    """Influence from the hidden states that a transformer block puts out."""

    kind = "pairwise"
    axis = "blocks"
    needs_hidden_states = True

    @abstractmethod
    def influence(self, *, validation_VH: Tensor, train_BH: Tensor) -> Tensor:
        """Return influence_VB, float32, from the hidden states of one block."""


class CheckpointEstimator(Estimator):
    """Influence summed over several states of the model."""

    kind = "pairwise"
    needs_checkpoints = True

    @abstractmethod
    def weights(self, learning_rates: Sequence[float]) -> list[float]:
        """Return what the dot products v_j · g_i at every checkpoint are weighted with.

        Args:
            learning_rates: of the steps that led to each checkpoint.

        Raises:
            ValueError: there are fewer than two checkpoints, a rate is negative or not finite, or
                none is positive. A checkpoint of rate 0 adds nothing.
        """


class SampleEstimator(Estimator):
    """One number per training sample and module, without a validation sample."""

    kind = "sample"
    needs_validation = False

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
        confidence_T: float32, the probability of the given class by a model that has not seen the
            sample; None where there is none.
    """

    loss_T: Tensor
    is_noisy_T: Tensor | None
    seed: int
    confidence_T: Tensor | None = None


class Baseline(Estimator):
    """One score per training sample, to compare influence with."""

    kind = "baseline"
    axis = "none"
    needs_validation = False

    @abstractmethod
    def score(self, facts: SampleFacts) -> Tensor:
        """Return score_T, float32; the lowest are suspects."""
