"""Chats: lists of {role, content} objects, from nested columns or from JSON, brought to JSON.

Of a message only role and content are read. A chat has at least two messages and ends with the
assistant's answer, which is what the model is trained to write.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from app.datasets.columns import (
    NUL,
    Column,
    DatasetError,
    DatasetErrorCode,
    DatasetLimits,
    check_strings,
    is_string,
)

ROLES = ("system", "user", "assistant", "tool")
MIN_MESSAGES = 2
_MISSING = "is empty; give every row its messages, or leave the row out"
_SHAPE = 'must be a list of messages, such as [{"role": "user", "content": "…"}, …]'
_MAX_BYTES_PER_CHAR = 4
_MAX_JSON_CHARS_PER_CHAR = 6  # \u0041
_JSON_CHARS_PER_MESSAGE = 100


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class _Refused(Exception):
    """A chat that cannot be used; says why."""

    def __init__(self, code: DatasetErrorCode, what: str) -> None:
        super().__init__(what)
        self.code: DatasetErrorCode = code
        self.what = what


def normalise_messages(column: Column, *, limits: DatasetLimits) -> pa.StringArray:
    """Return every chat as JSON: a list of objects with role and content, both strings.

    Sizes are looked at before values, so that a small file cannot unfold into a huge batch.
    """
    array = column.array
    if pa.types.is_null(array.type):
        column.refuse_row(0, "empty_value", _MISSING)
    column.refuse_where(array.is_null(), "empty_value", _MISSING)
    if is_string(array.type):
        num_chars = _MAX_JSON_CHARS_PER_CHAR * limits.max_text_chars
        num_chars += _JSON_CHARS_PER_MESSAGE * limits.max_messages
        check_strings(column, max_chars=num_chars, code="text_too_long")
        values = _parsed(column)
    elif is_messages(array.type):
        _check_sizes(column, limits=limits)
        values = _plain(column)
    else:
        raise column.refuse("wrong_type", f"holds {array.type} values; it {_SHAPE}")
    texts = []
    for index, value in enumerate(values):
        try:
            texts.append(orjson.dumps(_checked(value, limits=limits)).decode())
        except _Refused as error:
            column.refuse_row(index, error.code, error.what)
    return pa.array(texts, pa.string())


def as_json(value: object, *, name: str, row: int) -> str | None:
    """Return a value of a column of messages as JSON; a string is JSON already.

    Raises:
        DatasetError: it is nested too deeply for messages.
    """
    if value is None or isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise DatasetError(
            f"row {row:,}: column {name!r} is nested too deeply for messages",
            code="bad_messages",
            field="messages",
            row=row,
        ) from error


def read_messages(text: str) -> list[Message]:
    """Return the messages of a chat in the normalised form."""
    messages: list[Message] = orjson.loads(text)
    return messages


def show_messages(messages: Sequence[Message]) -> tuple[str, str]:
    """Return what is shown of a chat: the earlier messages as lines, and the last one's content."""
    *earlier, last = messages
    return "\n".join(f"{of['role']}: {of['content']}" for of in earlier), last["content"]


def is_messages(data_type: pa.DataType) -> bool:
    """Tell whether a column of this type holds lists of structs with role and content."""
    if not (pa.types.is_list(data_type) or pa.types.is_large_list(data_type)):
        return False
    item = data_type.value_type
    if not pa.types.is_struct(item):
        return False
    names = [field.name for field in item]
    return all(
        names.count(name) == 1 and is_string(item.field(name).type) for name in ("role", "content")
    )


def _parsed(column: Column) -> Iterator[object]:
    """Yield the values of strings that hold JSON."""
    for index, text in enumerate(column.array):
        try:
            yield orjson.loads(text.as_py())
        except orjson.JSONDecodeError as error:
            column.refuse_row(
                index, "bad_messages", f"is not valid JSON ({error.msg}); it {_SHAPE}"
            )


def _plain(column: Column) -> Iterator[object]:
    """Yield the values of a nested column."""
    for index, value in enumerate(column.array):
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            column.refuse_row(index, "bad_encoding", "is not valid UTF-8; save the file as UTF-8")


def _check_sizes(column: Column, *, limits: DatasetLimits) -> None:
    """Raise for a row of too many messages, or of more bytes than any text of legal length."""
    array = column.array
    column.refuse_where(
        pc.greater(pc.list_value_length(array), limits.max_messages),
        "text_too_long",
        f"has more than {limits.max_messages:,} messages",
    )
    items = pc.list_flatten(array)
    roles, contents = (
        pc.fill_null(_binary_lengths(pc.struct_field(items, name)), 0)
        for name in ("role", "content")
    )
    sums = pc.cumulative_sum(pc.add(roles, contents))
    sum_before = pa.concat_arrays([pa.array([0], pa.int64()), sums])
    length = pc.list_value_length(array).cast(pa.int64())
    end = pc.cumulative_sum(length)
    num_bytes = pc.subtract(sum_before.take(end), sum_before.take(pc.subtract(end, length)))
    most = (
        _MAX_BYTES_PER_CHAR * limits.max_text_chars + _JSON_CHARS_PER_MESSAGE * limits.max_messages
    )
    column.refuse_where(pc.greater(num_bytes, most), "text_too_long", _too_long(limits))


def _binary_lengths(array: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        return _binary_lengths(array.dictionary).take(array.indices)
    return pc.binary_length(array.cast(pa.large_string())).cast(pa.int64())


def _checked(value: object, *, limits: DatasetLimits) -> list[Message]:
    if not isinstance(value, list):
        raise _Refused("bad_messages", _SHAPE)
    if len(value) > limits.max_messages:
        raise _Refused("text_too_long", f"has more than {limits.max_messages:,} messages")
    messages = [_message(item, number) for number, item in enumerate(value, start=1)]
    if len(messages) < MIN_MESSAGES:
        raise _Refused(
            "bad_messages",
            f"has {len(messages)} messages; a chat needs a message and the assistant's answer",
        )
    if messages[-1]["role"] != "assistant":
        raise _Refused(
            "bad_messages",
            f"ends with a message of the role {messages[-1]['role']!r}; the last message must be "
            "the assistant's, whose answer is audited",
        )
    if sum(len(message["content"]) for message in messages) > limits.max_text_chars:
        raise _Refused("text_too_long", _too_long(limits))
    return messages


def _message(item: Any, number: int) -> Message:  # noqa: ANN401  whatever the file holds
    if not isinstance(item, dict):
        raise _Refused("bad_messages", f"message {number} is no object; the column {_SHAPE}")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        said = f"the role {role[:20]!r}" if isinstance(role, str) else "no role"
        raise _Refused("bad_messages", f"message {number} has {said}; roles are {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise _Refused("bad_messages", f"message {number} has a content that is no string")
    if content is None or not content.strip():
        raise _Refused("empty_value", f"message {number} has no content")
    if NUL in content:
        raise _Refused(
            "bad_text",
            f"message {number} holds a NUL character (U+0000), which cannot be stored; remove it",
        )
    return Message(role=role, content=content)


def _too_long(limits: DatasetLimits) -> str:
    return f"has more than {limits.max_text_chars:,} characters in all messages together"
