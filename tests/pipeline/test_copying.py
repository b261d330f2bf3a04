"""Rows that Arrow wrote are the rows that PostgreSQL has, whatever stands in them."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from workers.pipeline.copying import copy_columns

SCHEMA = pa.schema(
    {
        "place": pa.int32(),
        "words": pa.string(),
        "number": pa.float32(),
        "is_so": pa.bool_(),
        "numbers": pa.list_(pa.float32()),
        "places": pa.list_(pa.int32()),
    }
)
NOTHING: dict[str, Any] = {name: [None] for name in SCHEMA.names}
TABLE = (
    "CREATE TEMPORARY TABLE copied (place int, words text, number real, is_so boolean, "
    "numbers real[], places int[])"
)
numbers = st.floats(width=32, allow_nan=False)
places = st.integers(-(2**31), 2**31 - 1)
rows = st.tuples(
    st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.none() | numbers,
    st.none() | st.booleans(),
    st.none() | st.lists(numbers, max_size=3),
    st.none() | st.lists(places, max_size=3),
)


def copied(engine: Engine, chunks: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    try:
        with driver.cursor() as cursor:
            cursor.execute(TABLE)
            copy_columns(cursor, "copied", SCHEMA, chunks)
            # PostgreSQL tells a real by its shortest digits, as a double it is another number
            cursor.execute(
                "SELECT place, words, number::float8, is_so, numbers::float8[], places FROM copied "
                "ORDER BY place"
            )
            found: list[tuple[Any, ...]] = cursor.fetchall()
            return found
    finally:
        connection.rollback()
        connection.close()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(rows, min_size=1, max_size=5))
def test_what_goes_in_comes_out(migrated_engine: Engine, given_rows: list[tuple[Any, ...]]) -> None:
    numbered = [(place, *row) for place, row in enumerate(given_rows)]
    columns = dict(zip(SCHEMA.names, map(list, zip(*numbered, strict=True)), strict=True))
    assert copied(migrated_engine, [columns]) == numbered


@pytest.mark.parametrize("words", ["\\N", "\\.", "a\n\\.\nb", "\t", "\\", '"', "", "\r\n", "{1}"])
def test_what_means_something_to_copy_is_only_words(migrated_engine: Engine, words: str) -> None:
    chunks = [{**NOTHING, "place": [place], "words": [words]} for place in range(2)]
    assert [row[1] for row in copied(migrated_engine, chunks)] == [words, words]


def test_numbers_that_are_none_are_kept(migrated_engine: Engine) -> None:
    odd = [float("inf"), float("-inf"), 2.0**-149, 3.4028234663852886e38]
    [row] = copied(migrated_engine, [{**NOTHING, "place": [0], "numbers": [[*odd, float("nan")]]}])
    assert row[4][:4] == odd
    assert row[4][4] != row[4][4]
