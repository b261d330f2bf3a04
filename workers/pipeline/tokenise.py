"""From the rows of a table to tokens: labelled texts, prompts with completions, and chats.

For causal language models a sample is a prompt and a completion, and only the completion counts.
What is too long is cut: a prompt on the left, since what stands next to the completion matters
most, and a completion that does not fit by itself on the right.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.datasets.columns import DatasetKind
from app.datasets.messages import Message, read_messages, show_messages
from workers.pipeline.failures import AuditRefused
from workers.pipeline.tables import Table
from workers.sources.tokenizers import has_chat_template, write_chat

# A template of a stranger's may fail in any of these ways on a chat.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
Tokens = list[int]


@dataclass(frozen=True)
class TokenisedRows:
    """Rows as they are shown and as the model reads them.

    Attributes:
        token_type_ids: segments of text pairs, for models that tell them apart so.
        completion_start: position of the first token of the completion, at least 1; None for
            classifiers.
        num_truncated: samples that were cut.
    """

    text: Sequence[str]
    text_pair: Sequence[str | None]
    input_ids: Sequence[Tokens]
    token_type_ids: Sequence[Tokens] | None = None
    completion_start: Sequence[int] | None = None
    num_truncated: int = 0


class RowTokeniser(ABC):
    """Turns the rows of one table into tokens.

    Attributes:
        rows_per_call: how many rows at once; all their tokens are in memory.
    """

    rows_per_call = 512

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, table: Table, *, max_tokens: int
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.table = table
        self.max_tokens = max_tokens

    @abstractmethod
    def tokenise(
        self, rows: pa.RecordBatch, *, first_row: int, completions: Sequence[str] | None
    ) -> TokenisedRows:
        """Tokenise some rows in the normalised form.

        Args:
            rows: at most `rows_per_call` of them.
            first_row: the number of the first, from 1.
            completions: given to the rows instead of their own.

        Raises:
            AuditRefused: names the row that cannot be read, and why.
        """


class LabelledTexts(RowTokeniser):
    """Texts, or pairs of texts, of a classifier; too long ones are cut on the right."""

    def tokenise(
        self, rows: pa.RecordBatch, *, first_row: int, completions: Sequence[str] | None
    ) -> TokenisedRows:
        """Tokenise texts; they have no completions."""
        del first_row, completions
        texts, pairs = rows["text"].to_pylist(), rows["text_pair"].to_pylist()
        has_pairs = self.table.columns.text_pair is not None
        tokens = self.tokenizer(
            texts, pairs if has_pairs else None, truncation=True, max_length=self.max_tokens
        )
        segments = tokens.get("token_type_ids") if has_pairs else None
        return TokenisedRows(
            texts,
            pairs,
            tokens["input_ids"],
            token_type_ids=segments,
            num_truncated=self._count_cut(tokens, texts, pairs),
        )

    def _count_cut(self, tokens: Any, texts: Sequence[str], pairs: Sequence[str | None]) -> int:  # noqa: ANN401 — transformers carries no types
        if tokens.encodings is not None:
            return sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        # tokenizers in plain Python do not keep what they cut off
        return sum(
            len(self.tokenizer(text, pair, verbose=False)["input_ids"]) > self.max_tokens
            for text, pair, kept in zip(texts, pairs, tokens["input_ids"], strict=True)
            if len(kept) == self.max_tokens
        )


class Completions(RowTokeniser):
    """Prompts, with the tokenizer's special tokens, and their completions, with an end token."""

    rows_per_call = 128

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, table: Table, *, max_tokens: int
    ) -> None:
        super().__init__(tokenizer, table, max_tokens=max_tokens)
        marks = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        # Some tokenizers end every text with a special token; the completion comes before it.
        self._num_trailing = next((n for n, mark in enumerate(marks[::-1]) if not mark), 0)

    def tokenise(
        self, rows: pa.RecordBatch, *, first_row: int, completions: Sequence[str] | None
    ) -> TokenisedRows:
        """Tokenise prompts and completions, each by itself."""
        prompts = rows["text"].to_pylist()
        completions = rows["text_pair"].to_pylist() if completions is None else completions
        prompt_ids = [
            tokens[: len(tokens) - self._num_trailing]
            for tokens in self.tokenizer(prompts, verbose=False)["input_ids"]
        ]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        completion_ids = [
            [*tokens, *end]
            for tokens in self.tokenizer(completions, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        ]
        return self.join(prompts, completions, prompt_ids, completion_ids, first_row=first_row)

    def join(
        self,
        texts: Sequence[str],
        completions: Sequence[str],
        prompt_ids: Sequence[Tokens],
        completion_ids: Sequence[Tokens],
        *,
        first_row: int,
    ) -> TokenisedRows:
        """Put prompts and completions together, cutting what is too long."""
        joined: list[Tokens] = []
        starts: list[int] = []
        num_truncated = 0
        beginning = self.tokenizer.bos_token_id
        if beginning is None:
            beginning = self.tokenizer.eos_token_id
        for row, (prompt, completion) in enumerate(
            zip(prompt_ids, completion_ids, strict=True), start=first_row
        ):
            if not completion:
                raise self.refuse(row, "empty_value", "the completion has no tokens", "completion")
            if not prompt and beginning is None:
                raise self.refuse(row, "empty_value", "the prompt has no tokens", "prompt")
            tokens, start = cut(
                prompt or [beginning], completion, max_tokens=self.max_tokens, beginning=beginning
            )
            num_truncated += len(tokens) < max(1, len(prompt)) + len(completion)
            joined.append(tokens)
            starts.append(start)
        return TokenisedRows(
            texts, completions, joined, completion_start=starts, num_truncated=num_truncated
        )

    def refuse(self, row: int, code: str, what: str, field: str) -> AuditRefused:
        """Return the error about one row."""
        name = "messages" if self.table.columns.kind == "chat" else field
        return AuditRefused(
            code, f"row {row:,}: {what}.", field=f"{self.table.field}.columns.{name}"
        )


class Chats(Completions):
    """Chats in the form of the tokenizer's template: the last answer is the completion."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, table: Table, *, max_tokens: int
    ) -> None:
        super().__init__(tokenizer, table, max_tokens=max_tokens)
        if not has_chat_template(tokenizer):
            raise AuditRefused(
                "no_chat_template",
                "The model's tokenizer has no chat template, so it cannot be said how a chat is "
                "written. Use a model with a chat template, or write the chats as prompts and "
                "completions yourself.",
                field=f"{table.field}.columns.messages",
            )

    def tokenise(
        self, rows: pa.RecordBatch, *, first_row: int, completions: Sequence[str] | None
    ) -> TokenisedRows:
        """Write chats by the template, without and with the last answer, and tokenise both."""
        chats = [read_messages(text) for text in rows["text"].to_pylist()]
        if completions is not None:
            chats = [
                [*earlier, Message(role=last["role"], content=completion)]
                for (*earlier, last), completion in zip(chats, completions, strict=True)
            ]
        prompts, wholes = [], []
        for row, chat in enumerate(chats, start=first_row):
            prompts.append(self._written(chat[:-1], row=row, add_generation_prompt=True))
            wholes.append(self._written(chat, row=row, add_generation_prompt=False))
        prompt_ids, whole_ids = (
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for texts in (prompts, wholes)
        )
        completion_ids = []
        for row, (prompt, whole) in enumerate(
            zip(prompt_ids, whole_ids, strict=True), start=first_row
        ):
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise self.refuse(
                    row,
                    "unsupported_chat_template",
                    "the chat template does not write the whole chat as the prompt and then the "
                    "answer, so the answer's tokens cannot be told; write the chats as prompts "
                    "and completions yourself",
                    "messages",
                )
            completion_ids.append(whole[len(prompt) :])
        shown = [show_messages(chat) for chat in chats]
        return self.join(
            [text for text, _ in shown],
            [completion for _, completion in shown],
            prompt_ids,
            completion_ids,
            first_row=first_row,
        )

    def _written(self, chat: list[Message], *, row: int, add_generation_prompt: bool) -> str:
        try:
            return write_chat(self.tokenizer, chat, add_generation_prompt=add_generation_prompt)
        except _TEMPLATE_ERRORS as error:
            raise self.refuse(
                row,
                "unsupported_chat_template",
                f"the model's chat template does not take this chat: {str(error).rstrip('.')}",
                "messages",
            ) from error


TOKENISERS: dict[DatasetKind, type[RowTokeniser]] = {
    "classification": LabelledTexts,
    "completion": Completions,
    "chat": Chats,
}


def truncation_warnings(provenance: Mapping[str, Any]) -> list[str]:
    """Return a warning for every set of which samples were cut.

    Args:
        provenance: of the audit, with what `prepare` counted.
    """
    names = {"train": "training", "validation": "validation", "test": "test"}
    consequences = {"test": "it was measured on what was left"}
    return [
        f"{count:,} {names[field]} sample{'s were' if count > 1 else ' was'} cut to the "
        f"{provenance['max_tokens']:,} tokens that max_tokens and the model allow: "
        f"{consequences.get(field, 'the influence is of what was left')}. Raise max_tokens if the "
        "model reads more, or shorten the texts."
        for field, count in provenance.get("num_truncated", {}).items()
        if count
    ]


def cut(
    prompt: Tokens, completion: Tokens, *, max_tokens: int, beginning: int | None
) -> tuple[Tokens, int]:
    """Return the tokens of prompt and completion, and where the completion starts.

    Args:
        prompt: loses tokens on its left, but at most all but one.
        completion: loses tokens on its right where it has more than max_tokens - 1.
        max_tokens: of both together, at least 2.
        beginning: a token that stays where the prompt begins with it and there is room for more.
    """
    completion = completion[: max_tokens - 1]
    room = max_tokens - len(completion)
    if len(prompt) > room:
        kept = prompt[:1] if room > 1 and prompt[0] == beginning else []
        prompt = kept + prompt[len(prompt) - room + len(kept) :]
    return prompt + completion, len(prompt)
