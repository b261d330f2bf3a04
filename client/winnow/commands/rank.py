"""`winnow rank`: another ranking of a finished audit."""

from typing import Annotated

import typer

from winnow.commands.request import flag_of, merge
from winnow.commands.session import FAILED, OK, Session, verb


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("rank")(verb(rank))


def rank(
    session: Session,
    audit_id: Annotated[str, typer.Argument(help="As `winnow audit list` shows it.")],
    *,
    estimator: Annotated[str | None, typer.Option(help="One that the audit computed.")] = None,
    layers: Annotated[str | None, typer.Option(help="all, 02-03, CL, …")] = None,
    aggregation: Annotated[str | None, typer.Option(help="mean, rank, vote, median, …")] = None,
    flag: Annotated[
        str | None, typer.Option(help="How many are flagged; as the audit by default.")
    ] = None,
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Wait for the ranking.")] = False,
) -> int:
    """Rank the samples of a finished audit anew, from the influence that it computed; no GPU.

    Examples:
        winnow rank aud_… --estimator grad_cosine --layers 02-03 --aggregation vote --wait
        winnow suspects aud_… --ranking rnk_…
    """
    options = {"estimator": estimator, "layers": layers, "aggregation": aggregation}
    body = merge({}, {**options, "flag": flag_of(flag)})
    with session.client() as client:
        ranking = client.rank(audit_id, body)
        if wait_for_it:
            ranking = client.wait_for_ranking(audit_id, ranking.id)
    if session.as_json:
        session.answer(ranking)
    if ranking.error is not None:
        session.say(f"winnow: {ranking.id} {ranking.state}: {ranking.error.message}")
        return FAILED
    if session.as_json:
        return OK
    typer.echo(ranking.id)
    results = ranking.results
    if results is not None:
        session.say(f"{results.num_flagged:,} samples are flagged.")
    session.say(f"See them: {session.again('suspects', audit_id, '--ranking', ranking.id)}")
    return OK
