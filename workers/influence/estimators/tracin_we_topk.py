"""TracIn on the word embeddings of the strongest tokens."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from workers.influence.estimators.base import WordEmbeddingEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.rows import SparseRows

_kept: WeakKeyDictionary[SparseRows, tuple[int, SparseRows]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TracInWETopK(WordEmbeddingEstimator):
    """TracIn-WE with the `num_tokens` tokens of each text that have the largest gradients.

    Large by the norm per occurrence; the same token is paired on both sides, never the k-th of one
    text with the k-th of the other.
    """

    name = "tracin_we_topk"
    description = (
        "tracin_we with the tokens alone that matter most in either text: less drowned by "
        "frequent words and separators; aggregate it by vote."
    )

    num_tokens: int = parameter(10, minimum=1, maximum=1000)

    def influence(self, *, validation: SparseRows, train: SparseRows) -> Tensor:
        kept = _keep_strongest(validation, self.num_tokens)
        return kept.dot(train.strongest(self.num_tokens))


def _keep_strongest(validation: SparseRows, num_tokens: int) -> SparseRows:
    """Return the strongest tokens; of the same rows, which meet every batch, found only once."""
    known = _kept.get(validation)
    if known is None or known[0] != num_tokens:
        known = _kept[validation] = (num_tokens, validation.strongest(num_tokens))
    return known[1]
