"""Follow an audit on the terminal: a bar for people, plain lines for logs."""

import sys
import time
from typing import TYPE_CHECKING

import typer

from winnow.commands.session import INTERRUPTED, Session

if TYPE_CHECKING:
    from winnow.client import Client
    from winnow.results import Audit, Progress

LINE_SECONDS = 30.0
LINE_STEP = 0.1
MINUTE, HOUR = 60, 3600


def follow(session: Session, client: "Client", audit_id: str) -> "Audit":
    """Return an audit when it is done, and show meanwhile where it stands.

    Ctrl-C ends the waiting, not the audit.
    """
    show = _follow_with_bar if sys.stderr.isatty() else _follow_with_lines
    try:
        show(client, audit_id)
        return client.get(audit_id)
    except KeyboardInterrupt:
        session.say(
            f"\n{audit_id} goes on. Wait for it again: "
            f"{session.again('audit', 'show', audit_id, '--wait')}\n"
            f"Or end it: {session.again('audit', 'cancel', audit_id)}"
        )
        raise typer.Exit(INTERRUPTED) from None


def _follow_with_bar(client: "Client", audit_id: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("queued", total=1.0, speed="")
        for now in client.events(audit_id):
            bar.update(task, completed=now.progress, description=_stage(now), speed=_speed(now))


def _follow_with_lines(client: "Client", audit_id: str) -> None:
    """Print a line when the stage changes, after every tenth, and twice a minute."""
    said: tuple[str, float] | None = None
    said_at = 0.0
    for now in client.events(audit_id):
        is_old = time.monotonic() - said_at >= LINE_SECONDS
        is_further = said is None or now.progress >= said[1] + LINE_STEP
        if is_old or is_further or (said and said[0] != _stage(now)):
            line = f"{audit_id} {_stage(now)} {now.progress:.0%} {_speed(now)}"
            typer.echo(line.rstrip(), err=True)
            said, said_at = (_stage(now), now.progress), time.monotonic()


def _stage(now: "Progress") -> str:
    if now.waiting is not None:
        return f"waiting: {now.waiting}"
    return now.stage if now.stage is not None and not now.done else now.state


def _speed(now: "Progress") -> str:
    if now.done:
        return ""
    parts = []
    if now.samples_per_second:
        parts.append(f"{now.samples_per_second:,.0f} samples/s")
    if now.eta_seconds is not None:
        parts.append(f"{duration(now.eta_seconds)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a duration as 45 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
