"""Answers about single training samples."""

from winnow.results.base import Page, Result
from winnow.results.decisions import SampleDecision


class Suspect(Result):
    """One training sample at its place in the ranking; rank 0 is the most suspect.

    `index` is its row in the training file, from 0. Of a causal language model `text` is the
    prompt and `text_pair` the completion, and there are no labels.
    """

    rank: int
    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    predicted_probability: float
    given_probability: float
    loss: float
    score: float
    flagged: bool
    noise_probability: float | None = None
    suggested_label: str | None = None
    suggested_probability: float | None = None
    is_noisy: bool | None
    non_finite: bool = False
    decision: SampleDecision | None = None


class SuspectPage(Page[Suspect]):
    """A page of the ranking."""

    ranking_id: str
    score_order: str


class GroupStanding(Result):
    """A sample's score and rank by one layer group alone."""

    layer_group: str
    score: float
    rank: int


class RelatedSample(Result):
    """A validation sample, and what the training sample does to it: negative influence harms."""

    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    influence: float


class AlikeSample(Result):
    """Another training sample, and how its gradient lies to that of the sample.

    `similarity` is the cosine of the two gradients: 1 for samples that do the same to the model,
    -1 for the opposite, as a near-duplicate with another label does.
    """

    index: int
    text: str
    text_pair: str | None
    given_label: str | None
    predicted_label: str | None
    similarity: float
    has_other_label: bool | None


class ClassProbability(Result):
    """How likely a class is by the model, and by a simple one that has not seen the sample."""

    label: str
    probability: float
    out_of_sample: float | None


class SampleDetail(Suspect):
    """One training sample with the evidence.

    `most_alike` and `most_opposed` are None where the service did not look for them: beyond 20,000
    training samples only the most suspect are compared.
    """

    layer_groups: list[GroupStanding]
    harms_most: list[RelatedSample]
    helps_most: list[RelatedSample]
    most_alike: list[AlikeSample] | None = None
    most_opposed: list[AlikeSample] | None = None
    class_probabilities: list[ClassProbability] | None = None
    ranking_id: str
    score_order: str
