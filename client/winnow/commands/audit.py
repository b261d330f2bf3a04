"""`winnow audit`: run, list, show, wait, cancel, delete."""

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.commands import outcome, progress, request
from winnow.commands.session import OK, Refused, Session, pairs, share, verb

AuditId = Annotated[str, typer.Argument(help="As `winnow audit list` shows it.")]
FailOver = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE", help="Exit with 1 when more samples are flagged than this share, as 2%."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    audits = typer.Typer(no_args_is_help=True, help="Submit audits, follow and remove them.")
    audits.command("run")(verb(run))
    audits.command("list")(verb(list_audits))
    audits.command("show")(verb(show))
    audits.command("wait")(verb(wait))
    audits.command("cancel")(verb(cancel))
    audits.command("delete")(verb(delete))
    app.add_typer(audits, name="audit")


def run(
    session: Session,
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="REF|FOLDER", help="A model's folder, file:///… or hf://owner/name@…"),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|REF", help="The training set: a table, upload:…, file:///…, hf://…"
        ),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE|REF", help="A small set that you trust.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FILE|REF", help="What --verify measures on.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification (the default) or causal_lm.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="The column of texts.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Of the second text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of the labels.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Of the prompts (causal_lm).")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Of the completions.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Of the chats.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="REF|FOLDER", help="A LoRA adapter of the model.")
    ] = None,
    fine_tune: Annotated[
        bool | None, typer.Option("--fine-tune", help="Fine-tune the model on the set first.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of the fine-tuning, which it implies.")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="What ranks: auto (the default), consensus, grad_cosine, …")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="auto, all, 02-03, CL, …")] = None,
    aggregation: Annotated[str | None, typer.Option(help="auto, mean, rank, vote, …")] = None,
    flag: Annotated[
        str | None, typer.Option(help="How many are flagged: auto, a share (5%) or a number (100).")
    ] = None,
    plant_noise: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Plant wrong labels first, to measure.")
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Fine-tune again without so many; needs --test."),
    ] = None,
    request_file: Annotated[
        Path | None,
        typer.Option("--request", help="JSON or YAML of the request; options stand above it."),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field: fine_tune.rank=8"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Kept as the metadata `name`.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the audit.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key is the same audit for a day.")
    ] = None,
    wait_for_it: Annotated[
        bool, typer.Option("--wait", help="Wait for the end and show it.")
    ] = False,
    fail_over: FailOver = None,
) -> int:
    """Submit an audit; local files are uploaded, the same file once.

    Without --wait the audit's id is printed. The exit code is 0 when all is well, 1 with more
    suspects than --fail-over, 2 for a refused request, 3 for a failed audit.

    Examples:
        winnow audit run --model ./model --train train.csv --validation good.csv --wait
        winnow audit run --model hf://org/model@main --train train.jsonl --task causal_lm
        winnow audit run --request audit.yaml --flag 5% --name nightly
        winnow audit run --request audit.yaml --wait --fail-over 2% --json
    """
    limit = None if fail_over is None else share(fail_over)
    if limit is not None and not wait_for_it:
        raise Refused("--fail-over needs --wait: only a finished audit has suspects.")
    columns = {
        "text": text_column,
        "text_pair": text_pair_column,
        "label": label_column,
        "prompt": prompt_column,
        "completion": completion_column,
        "messages": messages_column,
    }
    options: dict[str, Any] = {
        "task": task,
        "model": {"reference": model, "adapter": adapter},
        "train": {"reference": train},
        "validation": {"reference": validation},
        "test": {"reference": test},
        "fine_tune": {} if fine_tune and epochs is None else {"epochs": epochs},
        "ranking": {"estimator": estimator, "layers": layers, "aggregation": aggregation},
        "plant_noise": {"fraction": None if plant_noise is None else share(plant_noise)},
        "verify": {"fraction": None if verify is None else share(verify)},
        "metadata": {**pairs(metadata or [], option="--metadata"), "name": name},
    }
    body = request.merge(request.read_request(request_file), options)
    if flag is not None:
        body["flag"] = request.flag_of(flag)
    body = request.merge(body, request.set_fields(pairs(fields or [], option="--set")))
    with session.client() as client:
        named = {field: column for field, column in columns.items() if column is not None}
        body = request.make_local(session, client, body, named)
        audit = client.submit(body, idempotency_key=idempotency_key)
        if wait_for_it:
            session.say(f"{audit.id} is submitted.")
            audit = progress.follow(session, client, audit.id)
            return outcome.tell_outcome(session, audit, fail_over=limit)
    if session.as_json:
        session.answer(audit)
    else:
        typer.echo(audit.id)
        session.say(f"Wait for it: {session.again('audit', 'show', audit.id, '--wait')}")
    return OK


def list_audits(
    session: Session,
    *,
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this reference.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only those of this training set.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """List your audits, the newest first.

    Examples:
        winnow audit list
        winnow audit list --state failed --limit 5
        winnow audit list --json | jq -r '.[].id'
    """
    with session.client() as client:
        listed = client.audits(
            state=state, model=model, dataset=dataset, page_size=min(limit, 1000)
        )
        audits = list(islice(listed, limit))
    if session.as_json:
        session.answer(audits)
        return
    if not audits:
        session.say("There are no audits.")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("audit", "state", "created", "flagged", "name", "model", box=None)
    for audit in audits:
        flagged = ""
        if audit.results is not None:
            flagged = f"{audit.results.num_flagged:,} of {audit.num_train or 0:,}"
        state_now = audit.state if audit.done else f"{audit.state} {audit.progress:.0%}"
        cells = (
            *(audit.id, state_now, f"{audit.created_at:%Y-%m-%d %H:%M}", flagged),
            *(audit.metadata.get("name", ""), str(audit.request["model"]["reference"])),
        )
        table.add_row(*(Text(cell, overflow="ellipsis") for cell in cells))
    table.columns[0].no_wrap = True
    session.console().print(table)


def show(
    session: Session,
    audit_id: AuditId,
    *,
    wait_for_it: Annotated[
        bool, typer.Option("--wait", help="Wait for the end and show it.")
    ] = False,
    fail_over: FailOver = None,
) -> int:
    """Show where an audit stands, or how it ended.

    Examples:
        winnow audit show aud_…
        winnow audit show aud_… --wait --fail-over 2%
        winnow audit show aud_… --json | jq .results.noise
    """
    limit = None if fail_over is None else share(fail_over)
    with session.client() as client:
        audit = client.get(audit_id)
        if wait_for_it and not audit.done:
            audit = progress.follow(session, client, audit_id)
    if audit.done and (wait_for_it or limit is not None):
        return outcome.tell_outcome(session, audit, fail_over=limit)
    if limit is not None:
        raise Refused(f"{audit_id} still runs; --fail-over needs --wait.")
    if session.as_json:
        session.answer(audit)
        return OK
    width = max(len(name) for name, _ in outcome.standing(audit))
    for name, value in outcome.standing(audit):
        typer.echo(f"{name:<{width}}  {value}")
    if audit.results is not None:
        outcome.tell_outcome(session, audit, fail_over=None)
    return OK


def wait(session: Session, audit_id: AuditId, *, fail_over: FailOver = None) -> int:
    """Wait for an audit's end and show it; the same as `winnow audit show --wait`.

    Examples:
        winnow audit wait aud_… --fail-over 2%
    """
    return show(session, audit_id, wait_for_it=True, fail_over=fail_over)


def cancel(session: Session, audit_id: AuditId) -> None:
    """Ask an audit to stop; it does within seconds.

    Examples:
        winnow audit cancel aud_…
    """
    with session.client() as client:
        audit = client.cancel(audit_id)
    if session.as_json:
        session.answer(audit)
    else:
        session.say(f"{audit_id} is asked to stop.")


def delete(
    session: Session,
    audit_id: AuditId,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove an ended audit with its rankings, decisions and files, for good.

    Examples:
        winnow audit delete aud_… --yes
    """
    if not yes:
        if not sys.stdin.isatty():
            raise Refused("Nobody can be asked here: pass --yes to remove the audit for good.")
        typer.confirm(f"Remove {audit_id} with all its results?", abort=True, err=True)
    with session.client() as client:
        client.delete(audit_id)
    if session.as_json:
        session.answer({"id": audit_id, "deleted": True})
    else:
        session.say(f"{audit_id} is removed.")
