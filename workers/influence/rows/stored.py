"""Rows of gradients out of the tensors that they were stored as."""

from collections.abc import Mapping

from torch import Tensor

from workers.influence.rows.base import GradientRows
from workers.influence.rows.dense import DenseRows
from workers.influence.rows.factored import FactoredRows
from workers.influence.rows.sparse import SparseRows


def rows_from_tensors(tensors: Mapping[str, Tensor]) -> GradientRows:
    """Make rows of what their `tensors()` gave; the names tell the form.

    Raises:
        ValueError: the names are of no form.
    """
    match sorted(tensors):
        case ["gradient"]:
            return DenseRows(tensors["gradient"])
        case ["g", "x"]:
            return FactoredRows(tensors["x"], tensors["g"])
        case ["count", "sample", "size", "token", "value"]:
            num_samples, num_parameters = tensors["size"].tolist()
            return SparseRows(
                num_samples=num_samples,
                num_parameters=num_parameters,
                sample_P=tensors["sample"],
                token_P=tensors["token"],
                value_PH=tensors["value"],
                count_P=tensors["count"],
            )
        case names:
            raise ValueError(f"tensors named {', '.join(names)} are no gradient rows.")
