"""The ranking as a table of pandas, polars or Arrow."""

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sqlalchemy import Engine
from winnow import Client, MissingExtra
from winnow.tables import TableKind

from app.settings import Settings
from tests.factories import make_finished_audit, make_ranking


@pytest.fixture
def audit_id(engine: Engine, settings: Settings) -> str:
    return make_finished_audit(engine, settings, num_train=25).id


def test_pandas_has_typed_columns_with_missing_values(client: Client, audit_id: str) -> None:
    table = client.suspects_table(audit_id)
    assert isinstance(table, pd.DataFrame)
    assert table["rank"].tolist() == [*range(25)]
    assert {name: str(table.dtypes[name]) for name in ("rank", "text", "score", "flagged")} == {
        "rank": "int64[pyarrow]",
        "text": "string[pyarrow]",
        "score": "double[pyarrow]",
        "flagged": "bool[pyarrow]",
    }
    assert table["text_pair"].isna().all()


def test_polars_and_arrow_hold_the_same(client: Client, audit_id: str) -> None:
    frame = client.suspects_table(audit_id, "polars")
    table = client.suspects_table(audit_id, "arrow")
    assert frame.schema["rank"] == pl.Int64
    assert table.schema.field("rank").type == pa.int64()
    assert frame.to_dicts() == table.to_pylist()


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
@pytest.mark.parametrize(("flagged", "number"), [(True, 2), (False, 23)])
def test_only_flagged_samples_or_only_others(
    client: Client, audit_id: str, kind: TableKind, flagged: bool, number: int
) -> None:
    assert len(client.suspects_table(audit_id, kind, flagged=flagged)) == number


def test_another_ranking(client: Client, engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    later = make_ranking(engine, audit, settings=settings)
    table = client.suspects_table(audit.id, "polars", ranking_id=later.id)
    assert table["index"].to_list() == [*range(10)]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("pandas", r"pandas and pyarrow.*winnow-client\[pandas\]"),
        ("polars", r"polars.*winnow-client\[polars\]"),
        ("arrow", r"pyarrow.*winnow-client\[arrow\]"),
    ],
)
def test_a_missing_library_is_named_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, kind: TableKind, named: str
) -> None:
    monkeypatch.setattr("winnow.tables.find_spec", lambda _: None)
    with Client("http://127.0.0.1:1") as client, pytest.raises(MissingExtra, match=named):
        client.suspects_table("aud_1", kind)


def test_an_unknown_kind_is_refused() -> None:
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(ValueError, match="no kind of table"),
    ):
        client.suspects_table("aud_1", "excel")  # type: ignore[call-overload]
