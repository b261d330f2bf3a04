"""The ranking as a table of a library that is installed beside the client."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from winnow.errors import MissingExtra

TableKind = Literal["pandas", "polars", "arrow"]

_NEEDS: dict[str, tuple[str, ...]] = {
    "pandas": ("pandas", "pyarrow"),
    "polars": ("polars",),
    "arrow": ("pyarrow",),
}


def require(kind: TableKind) -> None:
    """Raise unless tables of this kind can be made.

    Raises:
        MissingExtra: the library is not installed.
        ValueError: there is no such kind.
    """
    if kind not in _NEEDS:
        raise ValueError(f"{kind!r} is no kind of table: pass pandas, polars or arrow")
    missing = [name for name in _NEEDS[kind] if find_spec(name) is None]
    if missing:
        raise MissingExtra(" and ".join(missing), extra=kind)


def read(path: Path, kind: TableKind, *, flagged: bool | None = None) -> Any:  # noqa: ANN401  by kind
    """Return a Parquet file of suspects as a table: all, or only (not) flagged ones."""
    if kind == "polars":
        import polars as pl  # noqa: PLC0415  an extra

        frame = pl.read_parquet(path, memory_map=False)  # the file will be gone
        return frame if flagged is None else frame.filter(pl.col("flagged") == flagged)
    import pyarrow.parquet as pq  # noqa: PLC0415  an extra

    filters = None if flagged is None else [("flagged", "==", flagged)]
    table = pq.read_table(path, filters=filters)
    if kind == "arrow":
        return table
    import pandas as pd  # noqa: PLC0415  an extra

    # Arrow's types know missing values: a missing boolean is neither true nor an object.
    return table.to_pandas(types_mapper=pd.ArrowDtype)
