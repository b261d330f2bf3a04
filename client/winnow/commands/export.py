"""`winnow export`: the ranking as a file, or the training set without its errors."""

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.commands.session import Refused, Session, verb

if TYPE_CHECKING:
    from winnow.client import Client


class Format(StrEnum):
    """How the ranking is written."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class Apply(StrEnum):
    """What becomes of the suspects."""

    DECISIONS = "decisions"
    DROP = "drop"
    CORRECT = "correct"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(verb(export))


def export(
    session: Session,
    audit_id: Annotated[str, typer.Argument(help="As `winnow audit list` shows it.")],
    *,
    apply: Annotated[
        Apply | None,
        typer.Option(
            help="Write the training set instead: as decided, without the flagged samples, or with "
            "their suggested labels; in its own format and column order, and a patch file beside."
        ),
    ] = None,
    ranking: Annotated[str | None, typer.Option(help="Another ranking of the audit.")] = None,
    file_format: Annotated[
        Format | None, typer.Option("--format", help="Of the ranking; else by the file's ending.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file, or the folder it goes to.")
    ] = None,
) -> None:
    """Save the whole ranking, or with --apply the training set without its errors.

    A download that breaks off goes on where it ended when the command is given again.

    Examples:
        winnow export aud_… -o suspects.parquet
        winnow export aud_… --apply correct -o train-clean.csv
        winnow export aud_… --apply decisions
    """
    if apply is not None and file_format is not None:
        raise Refused("--format is for the ranking; --apply keeps the format of the training set.")
    with session.client() as client:
        if apply is None:
            path = _path_of_ranking(audit_id, ranking, file_format, output)
            client.download(
                audit_id,
                path,
                file_format=None if file_format is None else file_format.value,
                ranking_id=ranking,
            )
            _answer(session, {"file": str(path)}, f"Saved {path}")
            return
        _export(session, client, audit_id, apply=apply, ranking=ranking, output=output)


def _export(
    session: Session,
    client: "Client",
    audit_id: str,
    *,
    apply: Apply,
    ranking: str | None,
    output: Path | None,
) -> None:
    import json

    to = output or Path()
    data = client.export(audit_id, to, suspects=apply.value, ranking_id=ranking)
    patch = data.with_name(f"{data.name}.patch.jsonl")
    client.patch(audit_id, patch, suspects=apply.value, ranking_id=ranking)
    with patch.open(encoding="utf-8") as lines:
        changes = Counter(str(json.loads(line)["change"]) for line in lines)
    counts = ", ".join(f"{number:,} × {change}" for change, number in sorted(changes.items()))
    _answer(
        session,
        {"file": str(data), "patch": str(patch), "changes": dict(changes)},
        f"Saved {data} ({counts or 'nothing changed'})\nEvery change: {patch}",
    )


def _path_of_ranking(
    audit_id: str, ranking: str | None, file_format: Format | None, output: Path | None
) -> Path:
    """Return where the ranking goes.

    Raises:
        Refused: neither the option nor the ending says a format.
    """
    if output is None or output.is_dir():
        ending = file_format or Format.CSV
        return (output or Path()) / f"{ranking or audit_id}-suspects.{ending}"
    if file_format is None and output.suffix.removeprefix(".") not in set(Format):
        raise Refused(
            f"{output.name!r} does not say a format: end it in .parquet, .csv or .jsonl, or pass "
            "--format."
        )
    return output


def _answer(session: Session, answer: dict[str, object], message: str) -> None:
    if session.as_json:
        session.answer(answer)
    else:
        session.say(message)
