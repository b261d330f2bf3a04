"""Prompts with completions, and chats: what is read, in which form, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.datasets import parquet as parquet_files
from app.datasets.columns import NUL, ColumnNames, columns_by_header, default_columns
from app.datasets.files import DatasetError, FileFormat
from app.datasets.messages import ROLES, read_messages, show_messages
from app.datasets.readers import read_header
from tests.app.tables import FORMATS, LIMITS, encode, inspect, parquet, read, write

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "say it", "completion": "it", "wrong": False},
    {"prompt": 'now, "that"\nthing', "completion": " schön 🎬", "wrong": True},
]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": 'hello, "you"\n'},
    {"role": "assistant", "content": "hi 🎬"},
]
SHORT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chat_rows(form: FileFormat, *chats: Any) -> list[dict[str, Any]]:
    """Put chats in rows; a cell of CSV holds them as JSON."""
    return [{"messages": json.dumps(chat) if form == "csv" else chat} for chat in chats]


@pytest.mark.parametrize("form", FORMATS)
class TestEveryFormat:
    def test_prompts_are_texts_and_completions_their_pairs(
        self, tmp_path: Path, form: FileFormat
    ) -> None:
        path = write(tmp_path, encode(PROMPTS, form), form)
        assert read(path, form, prompt="prompt", noise="wrong") == [
            {
                "text": row["prompt"],
                "text_pair": row["completion"],
                "label": None,
                "is_noisy": row["wrong"],
            }
            for row in PROMPTS
        ]

    def test_chats_are_json(self, tmp_path: Path, form: FileFormat) -> None:
        path = write(tmp_path, encode(chat_rows(form, CHAT, SHORT), form), form)
        rows = read(path, form, messages="messages")
        assert [read_messages(row["text"]) for row in rows] == [CHAT, SHORT]
        assert {row["text_pair"] for row in rows} == {row["label"] for row in rows} == {None}

    def test_the_summary_has_no_labels(self, tmp_path: Path, form: FileFormat) -> None:
        path = write(tmp_path, encode(PROMPTS, form), form)
        summary = inspect(path, form, completion="completion", noise="wrong")
        assert (summary.kind, summary.num_rows, summary.num_noisy) == ("completion", 2, 1)
        assert (summary.label_type, summary.labels, summary.label_counts) == (None, (), {})
        assert summary.longest_text_chars == 17
        assert summary.mean_text_chars == pytest.approx((6 + 2 + 17 + 8) / 2)
        path = write(tmp_path, encode(chat_rows(form, CHAT, SHORT), form), form)
        summary = inspect(path, form, messages="messages")
        assert (summary.kind, summary.num_rows, summary.label_type) == ("chat", 2, None)
        assert summary.longest_text_chars == 7 + 13 + 4

    def test_the_header_tells_the_kind(self, tmp_path: Path, form: FileFormat) -> None:
        for rows, kind in ((PROMPTS, "completion"), (chat_rows(form, SHORT), "chat")):
            path = write(tmp_path, encode(rows, form), form)
            header = read_header(path, format=form, limits=LIMITS)
            assert columns_by_header([column.name for column in header]).kind == kind

    @pytest.mark.parametrize("field", ["prompt", "completion"])
    def test_an_empty_prompt_or_completion_is_refused(
        self, tmp_path: Path, form: FileFormat, field: str
    ) -> None:
        for empty in ("", " \n", None):
            path = write(tmp_path, encode([PROMPTS[0], PROMPTS[1] | {field: empty}], form), form)
            with pytest.raises(DatasetError, match=f"row 2: column '{field}' is empty") as caught:
                inspect(path, form, prompt="prompt")
            assert (caught.value.code, caught.value.field) == ("empty_value", field)

    def test_many_batches_keep_their_order_and_row_numbers(
        self, tmp_path: Path, form: FileFormat
    ) -> None:
        chats = [[*SHORT[:1], {"role": "assistant", "content": f"{i}"}] for i in range(2500)]
        path = write(tmp_path, encode(chat_rows(form, *chats), form), form)
        rows = read(path, form, messages="messages")
        assert [read_messages(row["text"])[-1]["content"] for row in rows] == [
            f"{i}" for i in range(2500)
        ]
        chats[2222][-1]["content"] = ""
        path = write(tmp_path, encode(chat_rows(form, *chats), form), form)
        with pytest.raises(DatasetError, match="row 2,223: column 'messages' message 2") as caught:
            inspect(path, form, messages="messages")
        assert caught.value.row == 2223


BAD_CHATS: list[tuple[Any, str, str]] = [
    ([], "bad_messages", "has 0 messages"),
    (SHORT[1:], "bad_messages", "has 1 messages"),
    (SHORT[:1] * 2, "bad_messages", "ends with a message of the role 'user'"),
    ([{"role": "bot", "content": "a"}, SHORT[1]], "bad_messages", "message 1 has the role 'bot'"),
    ([{"content": "a"}, SHORT[1]], "bad_messages", "message 1 has no role"),
    ([{"role": None, "content": "a"}, SHORT[1]], "bad_messages", "message 1 has no role"),
    ([SHORT[0], {"role": "assistant"}], "empty_value", "message 2 has no content"),
    ([SHORT[0], {"role": "assistant", "content": " "}], "empty_value", "message 2 has no content"),
    ([{"role": "user", "content": f"a{NUL}"}, SHORT[1]], "bad_text", "message 1 holds a NUL"),
    ([{"role": "user", "content": "x" * 100}, SHORT[1]], "text_too_long", "more than 100 charact"),
    ([SHORT[0]] * 201, "text_too_long", "more than 200 messages"),
]
# What a typed column of Parquet cannot hold.
BAD_JSON_CHATS: list[tuple[Any, str, str]] = [
    ([{"role": "user", "content": ["a"]}, SHORT[1]], "bad_messages", "content that is no str"),
    (
        [{"role": "user", "content": {"a": 1}}, SHORT[1]],
        "bad_messages",
        "content that is no str",
    ),
    ([{"role": "user", "content": 5}, SHORT[1]], "bad_messages", "content that is no str"),
    ([{"role": ["user"], "content": "a"}, SHORT[1]], "bad_messages", "message 1 has no role"),
    (["hello", "you"], "bad_messages", "message 1 is no object"),
    ([[SHORT[0]], SHORT[1]], "bad_messages", "message 1 is no object"),
    ([None, SHORT[1]], "bad_messages", "message 1 is no object"),
]
ROOMY = LIMITS.model_copy(update={"max_line_bytes": 100_000})


class TestBadChats:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(("chat", "code", "message"), BAD_CHATS)
    def test_in_every_format(
        self, tmp_path: Path, form: FileFormat, chat: Any, code: str, message: str
    ) -> None:
        self.check(tmp_path, form, encode(chat_rows(form, SHORT, chat), form), code, message)

    @pytest.mark.parametrize("form", ["jsonl", "csv"])
    @pytest.mark.parametrize(("chat", "code", "message"), BAD_JSON_CHATS)
    def test_in_json(
        self, tmp_path: Path, form: FileFormat, chat: Any, code: str, message: str
    ) -> None:
        self.check(tmp_path, form, encode(chat_rows(form, SHORT, chat), form), code, message)

    @pytest.mark.parametrize("form", FORMATS)
    def test_none(self, tmp_path: Path, form: FileFormat) -> None:
        rows = [*chat_rows(form, SHORT), {"messages": None}]
        self.check(tmp_path, form, encode(rows, form), "empty_value", "is empty")

    @pytest.mark.parametrize("text", ["hello", "{", "[" * 2000, '["\\ud800"]', "5", '{"a": 1}'])
    @pytest.mark.parametrize("form", FORMATS)
    def test_strings_that_hold_no_chat(self, tmp_path: Path, form: FileFormat, text: str) -> None:
        rows = [{"messages": json.dumps(SHORT)}, {"messages": text}]
        code = "text_too_long" if len(text) > 50_000 else "bad_messages"
        self.check(tmp_path, form, encode(rows, form), code, "must be a list of messages")

    def test_json_that_is_nested_too_deeply(self, tmp_path: Path) -> None:
        line = '{"messages": ' + "[" * 900 + "]" * 900 + "}\n"
        content = json.dumps({"messages": SHORT}) + "\n" + line
        self.check(tmp_path, "jsonl", content.encode(), "bad_messages", "too deeply")

    @pytest.mark.parametrize("value", [5, True, {"role": "user"}])
    def test_other_types_of_json(self, tmp_path: Path, value: object) -> None:
        content = encode([{"messages": SHORT}, {"messages": value}], "jsonl")
        self.check(tmp_path, "jsonl", content, "wrong_type", "it must be a list of messages")

    def test_a_prompt_that_is_no_string(self, tmp_path: Path) -> None:
        for bad in (5, ["a"], {"a": 1}, True):
            content = encode([PROMPTS[0], {"prompt": bad, "completion": "a"}], "jsonl")
            with pytest.raises(DatasetError, match="row 2: column 'prompt' is a JSON") as caught:
                inspect(write(tmp_path, content, "jsonl"), "jsonl", prompt="prompt")
            assert (caught.value.code, caught.value.field) == ("wrong_type", "prompt")
        table = pa.table({"prompt": [1, 2], "completion": ["a", "b"]})
        with pytest.raises(DatasetError, match="holds int64 values; texts must be strings"):
            inspect(write(tmp_path, parquet(table), "parquet"), "parquet", prompt="prompt")

    @pytest.mark.parametrize(
        "column",
        [
            pa.array([1, 2]),
            pa.array([["a"], ["b"]]),
            pa.array([[{"role": "user"}], []]),
            pa.array([[{"role": "user", "content": 1}], []]),
            pa.array([{"role": "user", "content": "a"}] * 2),
            pa.array([[[{"role": "user", "content": "a"}]], []]),
        ],
    )
    def test_other_types_of_parquet(self, tmp_path: Path, column: pa.Array) -> None:
        path = write(tmp_path, parquet(pa.table({"messages": column})), "parquet")
        with pytest.raises(DatasetError, match="column 'messages' holds") as caught:
            inspect(path, "parquet", messages="messages")
        assert (caught.value.code, caught.value.field) == ("wrong_type", "messages")

    def test_bytes_that_are_no_utf_8(self, tmp_path: Path) -> None:
        broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
        items = pa.StructArray.from_arrays(
            [pa.array(["user", "assistant"]), broken], names=["role", "content"]
        )
        table = pa.table({"messages": pa.ListArray.from_arrays([0, 2], items)})
        path = write(tmp_path, parquet(table), "parquet")
        with pytest.raises(DatasetError, match=r"row 1: .*not valid UTF-8") as caught:
            inspect(path, "parquet", messages="messages")
        assert caught.value.code == "bad_encoding"

    def check(
        self, folder: Path, form: FileFormat, content: bytes, code: str, message: str
    ) -> None:
        with pytest.raises(DatasetError, match=rf"row 2: column 'messages' .*{message}") as caught:
            inspect(write(folder, content, form), form, ROOMY, messages="messages")
        error = caught.value
        assert (error.code, error.field, error.row) == (code, "messages", 2)


class TestParquet:
    def test_only_role_and_content_are_read(self, tmp_path: Path) -> None:
        chat = [{**message, "extra": "x" * 500, "calls": [{"id": 1}]} for message in SHORT]
        path = write(tmp_path, encode([{"messages": chat, "role": "x"}], "parquet"), "parquet")
        (row,) = read(path, "parquet", messages="messages")
        assert read_messages(row["text"]) == SHORT

    def test_large_lists_and_categories(self, tmp_path: Path) -> None:
        message = pa.struct({"content": pa.large_string(), "role": pa.string()})
        for column in (pa.array([SHORT], pa.large_list(message)), pa.array([SHORT, SHORT])[1:]):
            path = write(tmp_path, parquet(pa.table({"messages": column})), "parquet")
            (row,) = read(path, "parquet", messages="messages")
            assert read_messages(row["text"]) == SHORT
        text = pa.array([json.dumps(SHORT)] * 2).dictionary_encode()
        path = write(tmp_path, parquet(pa.table({"messages": text})), "parquet")
        assert len(read(path, "parquet", messages="messages")) == 2

    def test_a_small_file_cannot_unfold_into_a_huge_batch(self, tmp_path: Path) -> None:
        """A long content that a dictionary stores once is refused before it is repeated."""
        content = pa.DictionaryArray.from_arrays(
            pa.array([0, 1] * 3000, pa.int32()), pa.array(["x" * 500_000, "y"])
        )
        items = pa.StructArray.from_arrays(
            [pa.array(["user", "assistant"] * 3000), content], names=["role", "content"]
        )
        table = pa.table({"messages": pa.ListArray.from_arrays([*range(0, 6001, 2)], items)})
        path = tmp_path / "data.parquet"
        pq.write_table(table, path, store_schema=False)
        assert path.stat().st_size < 1_000_000
        default = pa.default_memory_pool()
        counted = pa.proxy_memory_pool(default)
        pa.set_memory_pool(counted)
        try:
            with pytest.raises(DatasetError, match=r"row 1: .*more than 100 characters"):
                inspect(path, "parquet", messages="messages")
        finally:
            pa.set_memory_pool(default)
        assert 0 < counted.max_memory() < 100_000_000

    def test_the_row_that_is_too_long_is_named(self, tmp_path: Path) -> None:
        """Sizes are summed by row, whatever rows stand before and in the batch."""
        long = [SHORT[0], {"role": "assistant", "content": "y" * 30_000}]
        chats = [SHORT, [*SHORT, *SHORT], SHORT, long, SHORT]
        path = write(tmp_path, encode(chat_rows("parquet", *chats), "parquet"), "parquet")
        with pytest.raises(DatasetError, match=r"row 4: .*in all messages") as caught:
            inspect(path, "parquet", messages="messages")
        assert caught.value.code == "text_too_long"

    def test_a_row_group_of_too_many_messages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Millions of equal messages take a few bytes; they are counted before they are read."""
        monkeypatch.setattr(parquet_files, "_MAX_ITEMS_PER_ROW_GROUP", 3)
        path = write(tmp_path, encode([{"messages": SHORT}], "parquet"), "parquet")
        assert inspect(path, "parquet", messages="messages").num_rows == 1
        path = write(tmp_path, encode([{"messages": SHORT}] * 2, "parquet"), "parquet")
        with pytest.raises(DatasetError, match="4 messages in a row group") as caught:
            inspect(path, "parquet", messages="messages")
        assert (caught.value.code, caught.value.field) == ("text_too_long", "messages")


@given(
    chat=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(ROLES),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_no_json_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, chat: Any) -> None:
    """Whatever a cell holds, the answer is a chat or a DatasetError."""
    folder = tmp_path_factory.mktemp("fuzz")
    forms: list[FileFormat] = ["jsonl", "csv"]
    for form in forms:
        rows = chat_rows(form, chat)
        path = write(folder, encode(rows, form), form)
        try:
            (row,) = read(path, form, messages="messages")
        except DatasetError:
            continue
        assert all(message["role"] in ROLES for message in read_messages(row["text"]))


def test_what_is_shown_of_a_chat() -> None:
    shown = show_messages(read_messages(json.dumps(CHAT)))
    assert shown == ('system: be kind\nuser: hello, "you"\n', "hi 🎬")


class TestColumnNames:
    def test_a_kind_is_filled_in(self) -> None:
        assert ColumnNames().by_field() == {"text": "text", "label": "label"}
        assert ColumnNames(noise="n").kind == "classification"
        assert ColumnNames(prompt="q").by_field() == {"prompt": "q", "completion": "completion"}
        assert ColumnNames(messages="m").by_field() == {"messages": "m"}
        assert ColumnNames(text=None, messages="m").kind == "chat"
        assert default_columns("causal_lm").kind == "completion"
        assert default_columns("classification") == ColumnNames()

    def test_what_was_stored_before_is_read(self) -> None:
        old = {"text": "q", "text_pair": None, "label": "y", "noise": None}
        assert ColumnNames.model_validate(old).by_field() == {"text": "q", "label": "y"}
        columns = ColumnNames(completion="c")
        assert ColumnNames.model_validate(columns.model_dump()) == columns

    @pytest.mark.parametrize(
        "names",
        [
            {"text": "a", "prompt": "b"},
            {"label": "a", "completion": "b"},
            {"text_pair": "a", "messages": "b"},
            {"prompt": "a", "messages": "b"},
        ],
    )
    def test_two_kinds_do_not_go_together(self, names: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="do not go together"):
            ColumnNames(**names)

    def test_the_header_names_the_first_kind_it_has(self) -> None:
        assert columns_by_header(["messages", "label", "text"]).kind == "classification"
        assert columns_by_header(["messages", "prompt", "text"]).kind == "chat"
        assert columns_by_header(["messages", "prompt", "completion"]).kind == "completion"
        assert columns_by_header(["x", "n"], noise="n") == ColumnNames(noise="n")


class TestUploads:
    def upload(self, client: TestClient, rows: list[dict[str, Any]], **fields: str) -> Any:
        content = encode(rows, "jsonl")
        return client.post("/v1/datasets", files={"file": ("a.jsonl", content)}, data=fields)

    def test_the_header_tells_the_kind(self, client: TestClient) -> None:
        dataset = self.upload(client, PROMPTS, noise_column="wrong").json()
        assert dataset["summary"]["kind"] == "completion"
        assert dataset["columns"]["completion"] == "completion"
        assert dataset["summary"]["num_noisy"] == 1
        assert client.get(dataset["links"]["self"]).json() == dataset
        dataset = self.upload(client, [{"messages": CHAT}]).json()
        assert dataset["summary"]["kind"] == "chat"
        assert dataset["columns"]["messages"] == "messages"
        assert dataset["columns"]["text"] is None

    def test_options_name_the_columns(self, client: TestClient) -> None:
        rows = [{"q": "a", "a": "b", "text": "t", "label": "x"}]
        dataset = self.upload(client, rows, prompt_column="q", completion_column="a").json()
        assert dataset["summary"]["kind"] == "completion"
        dataset = self.upload(client, [{"m": SHORT}], messages_column="m").json()
        assert dataset["columns"]["messages"] == "m"

    @pytest.mark.parametrize(
        ("fields", "pointer", "words"),
        [
            ({"prompt_column": "q"}, "#/completion_column", "'completion'"),
            ({"prompt_column": "q", "completion_column": "a"}, "#/completion_column", "row 1"),
            ({"prompt_column": "n", "completion_column": "q"}, "#/prompt_column", "JSON number"),
            ({"messages_column": "q"}, "#/messages_column", "row 1"),
            ({"messages_column": "q", "text_column": "q"}, "#/messages_column", "go together"),
            ({}, "#/text_column", "no column 'text'"),
        ],
    )
    def test_a_refusal_names_the_place(
        self, client: TestClient, fields: dict[str, str], pointer: str, words: str
    ) -> None:
        response = self.upload(client, [{"q": "x", "a": " ", "n": 1}], **fields)
        assert response.status_code == 422
        error = response.json()["errors"][0]
        assert error["pointer"] == pointer
        assert words in error["detail"]
