"""What all verbs share: where the service is, how to answer, and how errors are told."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from winnow.client import Client
    from winnow.errors import WinnowError

DEFAULT_URL = "http://127.0.0.1:8000"
OK, TOO_MANY, REFUSED, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

Options = ParamSpec("Options")

Url = Annotated[
    str | None,
    typer.Option("--url", help=f"Where the service is; else WINNOW_URL, else {DEFAULT_URL}."),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="A key, where it asks for one; else WINNOW_API_KEY.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Answer in JSON on stdout; messages go to stderr.")
]


@dataclass(frozen=True)
class Session:
    """One run of a verb.

    Attributes:
        url: where the service is.
        api_key: sent with every call when given.
        as_json: whether to answer in JSON.
    """

    url: str
    api_key: str | None
    as_json: bool

    @contextmanager
    def client(self, *, attempts: int = 8) -> Iterator["Client"]:
        """Connect to the service."""
        import warnings

        from winnow.client import Client

        if not self.url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"{self.url!r} is no address such as {DEFAULT_URL} (--url)")
        with (
            warnings.catch_warnings(),
            Client(self.url, self.api_key, attempts=attempts) as client,
        ):
            warnings.showwarning = lambda message, *_, **__: self.say(f"winnow: {message}")
            yield client

    def answer(self, value: Any) -> None:  # noqa: ANN401  a model, or what JSON knows
        """Print the answer as JSON."""
        from pydantic_core import to_json

        typer.echo(to_json(value, indent=2).decode())

    def say(self, message: str) -> None:
        """Print a message that is no part of the answer."""
        typer.echo(message, err=True)

    def console(self) -> "Console":
        """Return where tables are printed; a file or pipe gets them as wide as they are."""
        from rich.console import Console

        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
        return Console(width=width, highlight=False, soft_wrap=False)

    def again(self, *words: str) -> str:
        """Return a command that talks to the same service."""
        url = () if self.url == os.environ.get("WINNOW_URL", DEFAULT_URL) else ("--url", self.url)
        return " ".join(("winnow", *words, *url))


def remember(
    context: typer.Context, *, url: str | None, api_key: str | None, as_json: bool
) -> None:
    """Keep the options that stand before the verb."""
    context.obj = (url, api_key, as_json)


def verb(
    command: Callable[Concatenate[Session, Options], int | None],
) -> Callable[..., None]:
    """Return a command for typer: with the common options, and errors told as a sentence.

    Args:
        command: takes the session first; returns the exit code, None for 0.
    """
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())[1:]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, default, kind in (
            ("url", None, Url),
            ("api_key", None, ApiKey),
            ("as_json", False, Json),
            ("context", inspect.Parameter.empty, typer.Context),
        )
    ]

    @wraps(command)
    def run(
        *arguments: Any,
        url: str | None,
        api_key: str | None,
        as_json: bool,
        context: typer.Context,
        **options: Any,
    ) -> None:
        first_url, first_key, first_json = context.find_root().obj or (None, None, False)
        session = Session(
            url=url or first_url or DEFAULT_URL,
            api_key=api_key or first_key,
            as_json=as_json or first_json,
        )
        with _told(session):
            code = command(session, *arguments, **options)
        raise typer.Exit(code or OK)

    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *common], return_annotation=None
    )
    run.__doc__ = _help(command)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
    return run


def _help(command: Callable[..., Any]) -> str:
    """Return the docstring with its examples kept line by line."""
    return inspect.cleandoc(command.__doc__ or "").replace("Examples:\n", "\b\nExamples:\n")


@contextmanager
def _told(session: Session) -> Iterator[None]:
    """Print the errors that a person can act on as one sentence, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        session.say("Stopped.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        from winnow.errors import MissingExtra, WinnowError

        if isinstance(error, WinnowError):
            _tell(session, error)
        if isinstance(error, BrokenPipeError) or not isinstance(
            error, (OSError, Refused, MissingExtra)
        ):
            raise
        _end(session, str(error), code=REFUSED)


class Refused(ValueError):
    """A request that cannot be right; the message says what to change."""


def _tell(session: Session, error: "WinnowError") -> NoReturn:
    code = REFUSED if error.status in range(400, 500) else FAILED
    lines = [str(error)]
    told = error.detail or ""
    lines += [
        f"  {item.pointer}: {item.detail}"
        for item in error.errors
        if not (item.pointer in told or (item.detail in told and len(error.errors) == 1))
    ]
    if error.status == HTTPStatus.UNAUTHORIZED:
        lines.append("Pass a key with --api-key or WINNOW_API_KEY; `winnow keys create` makes one.")
    problem = {
        "title": error.title,
        "detail": error.detail,
        "status": error.status,
        "type": error.type,
        "errors": [item.model_dump() for item in error.errors],
        "request_id": error.request_id,
    }
    _end(session, "\n".join(lines), code=code, problem=problem)


def _end(
    session: Session, message: str, *, code: int, problem: dict[str, Any] | None = None
) -> NoReturn:
    if session.as_json:
        session.answer({"error": problem or {"title": message}})
    session.say(f"winnow: {message}")
    raise typer.Exit(code)


def share(text: str) -> float:
    """Return a share that is written as 2% or 0.02.

    Raises:
        Refused: it is neither.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise Refused(f"{text!r} is no share: write it as 2% or as 0.02.")
    return value


def pairs(texts: Sequence[str], *, option: str) -> dict[str, str]:
    """Return what is written as key=value, several times.

    Raises:
        Refused: one is written otherwise.
    """
    split = [text.partition("=") for text in texts]
    for key, sign, _ in split:
        if not (key and sign):
            raise Refused(f"{option} takes key=value, not {key!r}.")
    return {key: value for key, _, value in split}
