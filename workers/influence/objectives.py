"""What a sample's loss is: the class of a text, or the tokens of a completion.

Shapes: B batch, S sequence, C classes, P positions that the head is run at, N completion tokens of
the batch.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a token that is not in the completion."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model says of every sample of a batch; all float32 but the predicted class.

    Attributes:
        loss_B: of every sample on its own; the only part that gradients flow through.
        predicted_B: int64, the class with the highest probability; None for a language model.
        predicted_probability_B: the probability of that class; for a language model the share of
            the completion tokens that the model finds the most likely ones.
        given_probability_B: the probability of the given class; for a language model exp(-loss),
            the geometric mean of the probabilities of the completion tokens.
        logits_BC: of the classes; None for a language model.
    """

    loss_B: Tensor
    predicted_B: Tensor | None
    predicted_probability_B: Tensor
    given_probability_B: Tensor
    logits_BC: Tensor | None

    def detach(self) -> "Outcome":
        """Return the same numbers without the graph behind the loss."""
        return replace(self, loss_B=self.loss_B.detach())


class Objective(ABC):
    """Runs a model on a batch and says what it makes of every sample.

    A sample's outcome depends neither on the batch nor on its padding, up to rounding.
    """

    @abstractmethod
    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Outcome:
        """Run the model forward.

        Args:
            model: what its forward returns has `logits`.
            inputs: `input_ids` and `attention_mask` [B, S] among them, on the model's device.
            targets: what the objective compares with, on the same device.
        """


@dataclass(frozen=True, slots=True)
class Classification(Objective):
    """Cross-entropy of a text's class; targets are int64 class indices [B]."""

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Outcome:
        """Run a sequence classifier forward; see `Objective.run`."""
        logits_BC = model(**inputs).logits.float()
        loss_B = cross_entropy(logits_BC, targets, reduction="none")
        probability_BC = logits_BC.detach().softmax(dim=1)
        predicted_probability_B, predicted_B = probability_BC.max(dim=1)
        return Outcome(
            loss_B=loss_B,
            predicted_B=predicted_B,
            predicted_probability_B=predicted_probability_B,
            given_probability_B=(-loss_B.detach()).exp(),
            logits_BC=logits_BC.detach(),
        )


@dataclass(frozen=True, slots=True)
class CausalLanguageModel(Objective):
    """Mean cross-entropy of a completion's tokens, each predicted from all tokens before it.

    Targets are int64 [B, S], the token ids of the completion at their own places in `input_ids`
    and -100 everywhere else: the shift by one happens here. The first token of a sequence is
    predicted from nothing and never counts. A sample without completion tokens has loss 0.
    """

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Outcome:
        """Run a causal language model forward; see `Objective.run`.

        The vocabulary is large and most prompts are long, so the head runs only at the positions
        that some sample of the batch needs.
        """
        next_BS = targets[:, 1:]
        position_P = next_BS.ne(IGNORED).any(dim=0).nonzero().flatten()
        if not len(position_P):
            position_P = position_P.new_zeros(1)
        target_BP = targets.index_select(1, position_P + 1)
        is_counted_BP = target_BP.ne(IGNORED)
        if _takes_logits_to_keep(model):
            logits = model(**inputs, logits_to_keep=position_P).logits[is_counted_BP]
        else:
            logits = model(**inputs).logits.index_select(1, position_P)[is_counted_BP]
        logits_NV = logits.float()
        token_N = target_BP[is_counted_BP]
        loss_BP = logits_NV.new_zeros(target_BP.shape).masked_scatter(
            is_counted_BP, cross_entropy(logits_NV, token_N, reduction="none")
        )
        is_right_BP = torch.zeros_like(loss_BP).masked_scatter(
            is_counted_BP, logits_NV.detach().argmax(dim=1).eq(token_N).float()
        )
        count_B = is_counted_BP.sum(dim=1).clamp(min=1)
        loss_B = loss_BP.sum(dim=1) / count_B
        return Outcome(
            loss_B=loss_B,
            predicted_B=None,
            predicted_probability_B=is_right_BP.sum(dim=1) / count_B,
            given_probability_B=(-loss_B.detach()).exp(),
            logits_BC=None,
        )


OBJECTIVES: Mapping[str, Objective] = {
    "classification": Classification(),
    "causal_lm": CausalLanguageModel(),
}
"""The objective of every task of an audit."""


def _takes_logits_to_keep(model: nn.Module) -> bool:
    """Tell whether the forward pass, below an adapter, can leave positions out of the head."""
    adapted: Any = model
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
