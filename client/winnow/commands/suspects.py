"""`winnow suspects`: the ranked training samples on the terminal."""

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.commands.session import Session, verb

if TYPE_CHECKING:
    from winnow.results import Suspect

MAX_TEXT_CHARS = 200


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("suspects")(verb(suspects))


def suspects(
    session: Session,
    audit_id: Annotated[str, typer.Argument(help="As `winnow audit list` shows it.")],
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many, the most suspect first.")] = 20,
    flagged: Annotated[
        bool | None, typer.Option("--flagged/--not-flagged", help="Only those, or only others.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Only with this given label.")] = None,
    suggested_label: Annotated[str | None, typer.Option(help="Only with this suggestion.")] = None,
    search: Annotated[str | None, typer.Option(help="Only texts that hold this.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Only scores from here on.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Only scores up to here.")] = None,
    ranking: Annotated[str | None, typer.Option(help="Another ranking of the audit.")] = None,
) -> None:
    """List the most suspect training samples of a finished audit: the lowest scores.

    Examples:
        winnow suspects aud_… --limit 50
        winnow suspects aud_… --flagged --label positive
        winnow suspects aud_… --search refund --json | jq '.[].index'
    """
    with session.client() as client:
        found = client.suspects(
            audit_id,
            ranking_id=ranking,
            flagged=flagged,
            label=label,
            suggested_label=suggested_label,
            search=search,
            min_score=min_score,
            max_score=max_score,
            page_size=min(limit, 1000),
        )
        rows = list(islice(found, limit))
    if session.as_json:
        session.answer(rows)
    elif not rows:
        session.say("No training sample matches.")
    else:
        _print(session, rows)


def _print(session: Session, rows: "list[Suspect]") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("rank", "row"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("given → suggested", no_wrap=True, overflow="ellipsis", max_width=32)
    for heading in ("wrong", "score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for suspect in rows:
        probability = suspect.noise_probability
        cells = (
            *(f"{suspect.rank + 1}", f"{suspect.index}", _text(suspect), _labels(suspect)),
            "" if probability is None else f"{probability:.0%}",
            "not finite" if suspect.non_finite else f"{suspect.score:.4g}",
        )
        table.add_row(*(Text(cell) for cell in cells), style="bold" if suspect.flagged else "")
    session.console().print(table)


def _text(suspect: "Suspect") -> str:
    both = suspect.text if suspect.text_pair is None else f"{suspect.text} ⇒ {suspect.text_pair}"
    shown = "".join(char if char.isprintable() else " " for char in both[: MAX_TEXT_CHARS + 1])
    return shown if len(shown) <= MAX_TEXT_CHARS else f"{shown[:MAX_TEXT_CHARS]}…"


def _labels(suspect: "Suspect") -> str:
    if suspect.given_label is None:
        return ""
    suggested = suspect.suggested_label
    if suggested is None or suggested == suspect.given_label:
        return suspect.given_label
    chance = suspect.suggested_probability
    return f"{suspect.given_label} → {suggested}" + ("" if chance is None else f" {chance:.0%}")
