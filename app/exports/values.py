"""From what was decided to what a cell holds: in the type that it had."""

import json
from typing import Any

from app.datasets.columns import ColumnNames, DatasetKind
from app.exports.changes import Change

_BOOLEANS = {"0": False, "1": True}


class NotWritable(Exception):
    """A class that the type of the column cannot hold."""


def target_column(columns: ColumnNames) -> str:
    """Return the column that decisions are about."""
    name = columns.label or columns.completion or columns.messages
    assert name is not None  # noqa: S101  one of the three is always there
    return name


def changed_value(before: Any, change: Change, kind: DatasetKind) -> Any:  # noqa: ANN401  a cell
    """Return what a cell holds after a change, in the type that it held before.

    Raises:
        NotWritable: a label that is none of the type.
    """
    value = change.value or ""
    if change.kind == "relabel":
        return relabelled(before, value)
    return with_answer(before, value) if kind == "chat" else value


def relabelled(before: object, label: str) -> bool | int | float | str:
    """Return a label in the type of the one before.

    Raises:
        NotWritable: it is none of the type.
    """
    try:
        if isinstance(before, bool):
            return _BOOLEANS[label]
        if isinstance(before, int):
            return int(label)
        if isinstance(before, float):
            return float(label)
    except (KeyError, ValueError) as error:
        raise NotWritable(label) from error
    return label


def with_answer(before: Any, text: str) -> Any:  # noqa: ANN401  a list of messages, or JSON of it
    """Return a chat whose last message says something else."""
    if isinstance(before, str):
        chat = with_answer(json.loads(before), text)
        return json.dumps(chat, ensure_ascii=before.isascii())
    return [*before[:-1], {**before[-1], "content": text}]
