"""Load a resolved model's tokenizer, and write chats by its template."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from app.datasets.messages import Message
from workers.sources.errors import SourceError
from workers.sources.libraries import refused
from workers.sources.models import ResolvedModel

# The day that chat templates are told: tokens must not depend on when an audit runs.
CHAT_DATE = datetime(2025, 1, 1)  # noqa: DTZ001 — templates are told the local time, without a zone


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a padding token pads with its end token.

    Raises:
        SourceError: it cannot be loaded, or has neither token.
    """
    with refused("the tokenizer cannot be loaded", "unreadable_file", "model"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, trust_remote_code=False, local_files_only=True
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise SourceError(
                "the tokenizer has neither a padding nor an end token; set pad_token",
                code="unsupported_model",
                field="model",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `apply_chat_template` can write messages without being given a template."""
    template = tokenizer.chat_template
    return bool(template.get("default") if isinstance(template, dict) else template)


def write_chat(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """Return a chat as the tokenizer's template writes it on the fixed `CHAT_DATE`.

    Templates ask for today's date by strftime_now, or take it as date_string.

    Raises:
        Exception: whatever a template of a stranger's fails with.
    """
    with _fixed_date():
        text: str = tokenizer.apply_chat_template(
            list(chat),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=CHAT_DATE.strftime("%d %b %Y"),
        )
    return text


class _FixedDate(datetime):
    """The time as a template finds it."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_FixedDate":
        del tz
        return cls(CHAT_DATE.year, CHAT_DATE.month, CHAT_DATE.day)


@contextmanager
def _fixed_date() -> Iterator[None]:
    """Let Transformers' strftime_now read a fixed date.

    It is a closure over that module's `datetime`, and what is passed to a template comes as plain
    data, so no function of ours would reach it there.
    """
    module: Any = chat_template_utils
    original = module.datetime
    module.datetime = _FixedDate
    try:
        yield
    finally:
        module.datetime = original
