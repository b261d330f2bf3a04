"""Per-sample gradients of one module, in the cheapest form that is exact."""

from workers.influence.rows.base import GradientRows
from workers.influence.rows.dense import DenseRows
from workers.influence.rows.factored import FactoredRows
from workers.influence.rows.held import HeldRows
from workers.influence.rows.sparse import SparseRows, sparse_rows
from workers.influence.rows.stored import rows_from_tensors

__all__ = [
    "DenseRows",
    "FactoredRows",
    "GradientRows",
    "HeldRows",
    "SparseRows",
    "rows_from_tensors",
    "sparse_rows",
]
