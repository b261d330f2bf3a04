"""TracIn on the word embeddings."""

from torch import Tensor

from workers.influence.estimators.base import WordEmbeddingEstimator
from workers.influence.rows import SparseRows


class TracInWE(WordEmbeddingEstimator):
    """TracIn-WE (Yeh et al. 2022): Σ over tokens w that occur in BOTH texts of v_j[w] · g_i[w].

    That is grad_dot on the embedding, since the rows of absent tokens are zero.
    """

    name = "tracin_we"
    description = (
        "The dot product on the word embeddings: pairs of texts that share words, special tokens "
        "included; to be compared with the layers above, and aggregated by vote."
    )

    def influence(self, *, validation: SparseRows, train: SparseRows) -> Tensor:
        return validation.dot(train)
