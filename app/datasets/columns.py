"""The columns that an audit reads from a dataset, checked and brought to one form.

The normalised form, batch by batch: text string, text_pair string or null, label string or int64
or null, is_noisy bool or null. What text and text_pair hold depends on the kind of the dataset:
the text and its pair (classification), the prompt and the completion, or all messages as JSON and
nothing (chat). Rows are counted from 1, as a person counts them; a header is no row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.errors import FieldConflict

DatasetErrorCode = Literal[
    "unreadable_file",
    "unknown_format",
    "missing_column",
    "too_many_columns",
    "wrong_type",
    "mixed_labels",
    "empty_value",
    "bad_text",
    "bad_messages",
    "text_too_long",
    "bad_encoding",
    "malformed_row",
    "no_rows",
    "too_many_rows",
    "too_large",
    "too_few_labels",
    "too_many_labels",
]
ColumnField = Literal["text", "text_pair", "label", "prompt", "completion", "messages", "noise"]
DatasetKind = Literal["classification", "completion", "chat"]

NUL = "\x00"
_KIND_OF_FIELD: dict[ColumnField, DatasetKind] = {
    "text": "classification",
    "text_pair": "classification",
    "label": "classification",
    "prompt": "completion",
    "completion": "completion",
    "messages": "chat",
}
_REQUIRED: dict[DatasetKind, tuple[ColumnField, ...]] = {
    "classification": ("text", "label"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
}


def _name(description: str) -> Any:  # noqa: ANN401  pydantic's own type of a field's default
    return Field(None, min_length=1, max_length=200, description=description)


class ColumnNames(BaseModel):
    """Which columns of the file hold what: a labelled text, a prompt and its completion, or a chat.

    Exactly one of the three; without any, text and label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = _name("The column of texts. Default: text, unless another kind is named.")
    text_pair: str | None = _name("The second text, for tasks on pairs.")
    label: str | None = _name("Class labels: integers or strings. Default: label, as for text.")
    prompt: str | None = _name("For a causal language model: what is given to it.")
    completion: str | None = _name("What it should write; the loss is on this alone.")
    messages: str | None = _name(
        "Instead of both: a chat, a list of {role, content} that ends with the assistant's answer."
    )
    noise: str | None = _name(
        "True or 1 where a label or completion is known to be wrong; only used to measure."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:  # noqa: ANN401  whatever was sent
        if not isinstance(value, Mapping):
            return value
        kind = kind_of_fields(value) or "classification"
        return {**{field: field for field in _REQUIRED[kind]}, **_given(value)}

    @property
    def kind(self) -> DatasetKind:
        """What a row is."""
        if self.messages is not None:
            return "chat"
        return "completion" if self.prompt is not None else "classification"

    def by_field(self) -> dict[ColumnField, str]:
        """Return the columns that are asked for, by what they hold."""
        names: dict[ColumnField, str | None] = {
            "text": self.text,
            "text_pair": self.text_pair,
            "label": self.label,
            "prompt": self.prompt,
            "completion": self.completion,
            "messages": self.messages,
            "noise": self.noise,
        }
        return {field: name for field, name in names.items() if name is not None}


def _given(names: Mapping[str, Any]) -> dict[str, Any]:
    return {field: name for field, name in names.items() if name is not None}


def kind_of_fields(names: Mapping[str, Any], *, suffix: str = "") -> DatasetKind | None:
    """Return the kind of dataset that the named columns make, None if they do not tell.

    Args:
        names: the columns by what they hold; None for those that are not named.
        suffix: of the fields, where the error should name them.

    Raises:
        FieldConflict: they belong to more than one kind.
    """
    first: ColumnField | None = None
    for field, kind in _KIND_OF_FIELD.items():
        if names.get(field) is None:
            continue
        if first is not None and kind != _KIND_OF_FIELD[first]:
            raise FieldConflict(
                field + suffix,
                message=f"{field}{suffix} and {first}{suffix} do not go together; name text and "
                "label, or prompt and completion, or messages",
            )
        first = first or field
    return _KIND_OF_FIELD[first] if first is not None else None


def columns_by_header(present: Sequence[str], *, noise: str | None = None) -> ColumnNames:
    """Return the columns of a file by their usual names; text and label if it has none of them.

    Args:
        present: the names of all columns of the file.
        noise: the column that marks known noise, if one does.
    """
    for required in _REQUIRED.values():
        if set(required) <= set(present):
            return ColumnNames(**{field: field for field in required}, noise=noise)
    return ColumnNames(noise=noise)


def default_columns(task: Literal["classification", "causal_lm"]) -> ColumnNames:
    """Return the columns that are read for a task when nothing else is said."""
    kind: DatasetKind = "classification" if task == "classification" else "completion"
    return ColumnNames(**{field: field for field in _REQUIRED[kind]})


class DatasetLimits(BaseModel):
    """The largest dataset that is taken."""

    model_config = ConfigDict(frozen=True)

    max_rows: int = Field(2_000_000, gt=0)
    max_bytes: int = Field(
        2 * 1024**3, gt=0, description="Bytes of all texts together, as they are when unfolded."
    )
    max_text_chars: int = Field(
        100_000, gt=0, description="Characters of one text, or of all messages of a chat."
    )
    max_messages: int = Field(200, gt=1, description="Messages of one chat.")
    max_label_chars: int = Field(200, gt=0)
    max_columns: int = Field(1_000, gt=0)
    max_line_bytes: int = Field(16 * 1024**2, gt=0, description="Bytes of a line in CSV or JSONL.")
    min_labels: int = Field(2, ge=1, description="Distinct labels that there must be.")
    max_labels: int = Field(1_000, gt=1)


class DatasetError(Exception):
    """A dataset that cannot be used; the message says where and what to change.

    Attributes:
        code: stable, for programs.
        field: the column option concerned, such as text or label, or None.
        row: the row concerned, counted from 1, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: DatasetErrorCode,
        field: ColumnField | None = None,
        row: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code: DatasetErrorCode = code
        self.field: ColumnField | None = field
        self.row = row


class Column:
    """One column of one batch, with what an error needs to say about it."""

    def __init__(self, array: pa.Array, *, name: str, field: ColumnField, first_row: int) -> None:
        self.array = array
        self.name = name
        self.field = field
        self.first_row = first_row

    def refuse(self, code: DatasetErrorCode, what: str) -> DatasetError:
        """Return an error about the column as a whole."""
        return DatasetError(f"column {self.name!r} {what}", code=code, field=self.field)

    def refuse_where(self, bad: pa.BooleanArray, code: DatasetErrorCode, what: str) -> None:
        """Raise an error that names the first row where `bad` is true."""
        index = pc.index(bad, value=True).as_py()
        if index >= 0:
            self.refuse_row(index, code, what)

    def refuse_row(self, index: int, code: DatasetErrorCode, what: str) -> None:
        """Raise an error about the row at `index` of the batch."""
        row = self.first_row + index
        raise DatasetError(
            f"row {row:,}: column {self.name!r} {what}", code=code, field=self.field, row=row
        )


def normalise_text(column: Column, *, limits: DatasetLimits) -> pa.StringArray:
    """Return the texts as strings: none null or blank, none too long, all storable.

    Dictionary-encoded texts are measured before they are expanded, so that a small file cannot
    unfold into a huge batch.
    """
    array = column.array
    if pa.types.is_null(array.type):
        column.refuse_row(0, "empty_value", "is empty; give every row a text, or leave the row out")
    if not is_string(array.type):
        raise column.refuse("wrong_type", f"holds {array.type} values; texts must be strings")
    column.refuse_where(
        array.is_null(), "empty_value", "is empty; give every row a text, or leave the row out"
    )
    check_strings(column, max_chars=limits.max_text_chars, code="text_too_long")
    text = array.cast(pa.string())
    blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    column.refuse_where(
        blank, "empty_value", "is empty; give every row a text, or leave the row out"
    )
    return text


def normalise_label(column: Column, *, limits: DatasetLimits) -> pa.Array:
    """Return the labels as strings, or as int64 where the file has numbers or booleans."""
    array = column.array
    missing = "is empty; give every row a label, or leave the row out"
    if pa.types.is_null(array.type):
        column.refuse_row(0, "empty_value", missing)
    column.refuse_where(array.is_null(), "empty_value", missing)
    value_type = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if is_string(array.type):
        check_strings(column, max_chars=limits.max_label_chars, code="text_too_long")
        label = array.cast(pa.string())
        column.refuse_where(pc.equal(label, ""), "empty_value", missing)
        return label
    if pa.types.is_floating(value_type):
        number = array.cast(pa.float64())
        whole = pc.and_(pc.is_finite(number), pc.equal(pc.floor(number), number))
        exact = pc.and_(whole, pc.less(pc.abs(number), float(2**53)))
        column.refuse_where(
            pc.invert(exact),
            "wrong_type",
            "is not a whole number; labels are classes: integers or strings",
        )
        return number.cast(pa.int64())
    if pa.types.is_integer(value_type) or pa.types.is_boolean(value_type):
        try:
            return array.cast(value_type).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise column.refuse("wrong_type", "holds integers of more than 64 bits") from error
    raise column.refuse(
        "wrong_type", f"holds {array.type} values; labels must be integers or strings"
    )


def normalise_noise(column: Column) -> pa.BooleanArray:
    """Return the marks of known noise as booleans: from true/false, 0/1 or the same as text."""
    array = column.array
    rule = "must be true or false (or 1 or 0) in every row"
    if pa.types.is_null(array.type):
        column.refuse_row(0, "wrong_type", f"is empty; it {rule}")
    column.refuse_where(array.is_null(), "wrong_type", f"is empty; it {rule}")
    if pa.types.is_boolean(array.type):
        return array
    if is_string(array.type):
        word = pc.utf8_lower(array.cast(pa.string()))
        is_true = pc.is_in(word, value_set=pa.array(["1", "true"]))
        is_false = pc.is_in(word, value_set=pa.array(["0", "false"]))
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        is_true, is_false = pc.equal(array, 1), pc.equal(array, 0)
    else:
        raise column.refuse("wrong_type", f"holds {array.type} values; it {rule}")
    column.refuse_where(
        pc.invert(pc.or_(is_true, is_false)), "wrong_type", f"marks known noise; it {rule}"
    )
    return is_true


def is_string(data_type: pa.DataType) -> bool:
    """Tell whether a column of this type holds strings, dictionary-encoded or not."""
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    return bool(
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_string_view(data_type)
    )


def check_strings(column: Column, *, max_chars: int, code: DatasetErrorCode) -> None:
    """Raise unless every string is valid UTF-8, without NUL and short enough."""
    array = column.array
    is_dictionary = pa.types.is_dictionary(array.type)
    values = array.dictionary if is_dictionary else array
    if len(values) == 0:
        return
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        _refuse_bad_utf8(column)
    values = values.cast(pa.large_string())

    def per_row(of_value: pa.Array) -> pa.Array:
        return of_value.take(array.indices) if is_dictionary else of_value

    too_long = pc.greater(pc.utf8_length(values), max_chars)
    column.refuse_where(per_row(too_long), code, f"has more than {max_chars:,} characters")
    column.refuse_where(
        per_row(pc.match_substring(values, NUL)),
        "bad_text",
        "holds a NUL character (U+0000), which cannot be stored; remove it",
    )


def _refuse_bad_utf8(column: Column) -> None:
    """Raise for the first row that is not valid UTF-8 (Arrow trusts Parquet's promise)."""
    for index in range(len(column.array)):
        try:
            column.array[index].as_py()
        except UnicodeDecodeError:
            column.refuse_row(index, "bad_encoding", "is not valid UTF-8; save the file as UTF-8")
