"""What an audit shows of a training sample beside its places in rankings: why it stands out.

Shapes: T training samples, N some of them, C classes, P the classes that are shown, K neighbours.
"""

from dataclasses import dataclass
from typing import Self

import pyarrow as pa
from torch import Tensor

from workers.influence.aggregation import order_by_score
from workers.pipeline.alike import Alike, Neighbours, asked_samples, find_alike
from workers.pipeline.arrow_columns import lists
from workers.pipeline.context import StageContext
from workers.pipeline.copying import Columns
from workers.pipeline.findings import Findings

# Of more classes only the most probable are shown.
MAX_CLASSES = 100
NUM_PROBABLE = 10


@dataclass(frozen=True)
class Probabilities:
    """The probabilities of the classes that are shown.

    Attributes:
        class_TP: int64, ascending; None where all classes are shown.
        model_TP: by the audited model; 0 for a sample of which it says nothing finite.
        out_of_sample_TP: by the simple model that has not seen the sample, where one was asked.
    """

    class_TP: Tensor | None
    model_TP: Tensor
    out_of_sample_TP: Tensor | None

    @classmethod
    def of(cls, model_TC: Tensor, out_of_sample_TC: Tensor | None) -> Self:
        """Choose the classes that are shown."""
        if model_TC.shape[1] <= MAX_CLASSES:
            return cls(None, model_TC, out_of_sample_TC)
        class_TP = model_TC.topk(NUM_PROBABLE, dim=1).indices.sort(dim=1).values
        return cls(
            class_TP,
            model_TC.gather(1, class_TP),
            None if out_of_sample_TC is None else out_of_sample_TC.gather(1, class_TP),
        )


@dataclass(frozen=True)
class Evidence:
    """What is known of each training sample, whatever the ranking.

    Attributes:
        alike: None where no gradients were sketched: only word embeddings are tracked.
        probabilities: None for a causal language model.
    """

    alike: Alike | None = None
    probabilities: Probabilities | None = None

    def columns(self, index_N: Tensor) -> Columns:
        """Return what the table of training samples holds of it, a value for every sample."""
        return {**self._alike_columns(index_N), **self._probability_columns(index_N)}

    def _alike_columns(self, index_N: Tensor) -> Columns:
        names = ("alike_training", "alike_cosine", "opposed_training", "opposed_cosine")
        if self.alike is None:
            return dict.fromkeys(names, pa.nulls(len(index_N)))
        place_N = self.alike.place_T[index_N]
        columns = (
            *_lists(self.alike.alike, place_N),
            *_lists(self.alike.opposed, place_N),
        )
        return dict(zip(names, columns, strict=True))

    def _probability_columns(self, index_N: Tensor) -> Columns:
        names = ("shown_classes", "class_probabilities", "out_of_sample_probabilities")
        nothing, found = pa.nulls(len(index_N)), self.probabilities
        if found is None:
            return dict.fromkeys(names, nothing)
        is_unsaid_N = ~found.model_TP[index_N].any(dim=1)
        values = (found.class_TP, found.model_TP, found.out_of_sample_TP)
        return {
            name: nothing if value_TP is None else lists(value_TP[index_N], is_null_N=is_unsaid_N)
            for name, value_TP in zip(names, values, strict=True)
        }


def _lists(found: Neighbours, place_N: Tensor) -> tuple[pa.Array, pa.Array]:
    """Return indices and cosines of some samples' neighbours; null where nobody asked."""
    is_null_N = place_N < 0
    index_NK, cosine_NK = found.index_AK[place_N], found.cosine_AK[place_N]
    is_there_NK = index_NK >= 0
    return (
        lists(index_NK, is_there_NK, is_null_N=is_null_N),
        lists(cosine_NK, is_there_NK, is_null_N=is_null_N),
    )


def find_evidence(context: StageContext, findings: Findings, score_T: Tensor) -> Evidence:
    """Compare the training samples with each other, and take over what the models say of them.

    Args:
        context: the unit of work.
        findings: of the audit.
        score_T: of the audit's own ranking: of a large set only the most suspect are compared.
    """
    facts, alike, probabilities = findings.facts, None, None
    sketches = facts.wide("sketch")
    if sketches is not None:
        asked_A = asked_samples(order_by_score(score_T))
        alike = find_alike(sketches, asked_A, keep_alive=context.hold.keep_alive)
    class_probability = facts.wide("class_probability")
    if class_probability is not None and findings.labels:
        out_of_sample = findings.out_of_sample
        probabilities = Probabilities.of(
            class_probability.all(), out_of_sample.train_TC if out_of_sample is not None else None
        )
    return Evidence(alike, probabilities)
