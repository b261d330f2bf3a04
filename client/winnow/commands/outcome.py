"""How an audit ended, for people and for exit codes."""

from typing import TYPE_CHECKING, Any

import typer

from winnow.commands.progress import duration
from winnow.commands.session import FAILED, OK, TOO_MANY, Session

if TYPE_CHECKING:
    from winnow.results import Audit, AuditResults


def tell_outcome(session: Session, audit: "Audit", *, fail_over: float | None) -> int:
    """Print how an audit ended and return the exit code.

    Args:
        session: how to answer.
        audit: it is done.
        fail_over: the largest share of flagged samples that is no failure; None for any.
    """
    results = audit.results
    if results is None:
        return _tell_failure(session, audit)
    share = results.num_flagged / (audit.num_train or 1)
    is_over = fail_over is not None and share > fail_over
    if session.as_json:
        gate = {"share": share, "fail_over": fail_over, "passed": not is_over}
        body = audit.model_dump(mode="json")
        session.answer(body if fail_over is None else {**body, "gate": gate})
    else:
        typer.echo("\n".join(_lines(session, audit, results)))
    if fail_over is None:
        return OK
    if _flag_is_fixed(audit):
        session.say(
            "Note: this audit flags a fixed number of samples, whatever they are; for a gate leave "
            "`flag` to auto."
        )
    relation = "more" if is_over else "not more"
    session.say(
        f"{'Too many suspects' if is_over else 'Clean'}: {share:.2%} of the training samples are "
        f"flagged, {relation} than {fail_over:.2%}."
    )
    return TOO_MANY if is_over else OK


def _tell_failure(session: Session, audit: "Audit") -> int:
    if session.as_json:
        session.answer(audit)
    reason = f": {audit.error.message}" if audit.error else "."
    session.say(f"winnow: {audit.id} {_ended(audit)}{reason}")
    return FAILED


def _ended(audit: "Audit") -> str:
    return "was cancelled" if audit.state == "cancelled" else audit.state


def _flag_is_fixed(audit: "Audit") -> bool:
    return isinstance(audit.request.get("flag"), dict)


def _lines(session: Session, audit: "Audit", results: "AuditResults") -> list[str]:
    num_train = audit.num_train or 0
    taken = ""
    if audit.finished_at is not None:
        taken = f" in {duration((audit.finished_at - audit.created_at).total_seconds())}"
    share = results.num_flagged / (num_train or 1)
    found = f"{results.num_flagged:,} of {num_train:,} samples are flagged ({share:.1%})."
    lines = [f"{audit.id} succeeded{taken}: {found}"]
    if results.noise is not None:
        noise = results.noise
        lines.append(
            f"About {noise.share:.1%} seem to be wrong ({noise.low:.1%} to {noise.high:.1%}, with "
            f"{noise.confidence:.0%} confidence)."
        )
    if results.detection is not None:
        lines.append(
            f"Of the known noise {results.detection.ndr_20:.0%} is among the lowest 20 % of the "
            f"scores (AUC-NDR {results.detection.auc_ndr:.3f})."
        )
    lines += [f"Note: {warning}" for warning in results.warnings]
    lines.append(f"See them: {session.again('suspects', audit.id)}")
    return lines


def standing(audit: "Audit") -> list[tuple[str, str]]:
    """Return what `audit show` tells of an audit that runs, or of how it ended."""
    rows: list[tuple[str, Any]] = [
        ("id", audit.id),
        ("state", audit.state),
        ("stage", None if audit.done else audit.stage),
        ("progress", f"{audit.progress:.0%}"),
        (
            "speed",
            audit.samples_per_second
            and not audit.done
            and f"{audit.samples_per_second:,.0f} samples/s",
        ),
        ("left", None if audit.eta_seconds is None else duration(audit.eta_seconds)),
        ("created", f"{audit.created_at:%Y-%m-%d %H:%M} UTC"),
        ("model", audit.request.get("model", {}).get("reference")),
        ("train", audit.request.get("train", {}).get("reference")),
        ("metadata", ", ".join(f"{key}={value}" for key, value in audit.metadata.items())),
        ("error", audit.error and f"{audit.error.code}: {audit.error.message}"),
    ]
    return [(name, str(value)) for name, value in rows if value]
