"""Prompts, completions and chats as tokens: where the completion begins, and what is cut."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from app.datasets.columns import ColumnNames
from workers.pipeline.failures import AuditRefused
from workers.pipeline.tables import Table
from workers.pipeline.tokenise import (
    Chats,
    Completions,
    LabelledTexts,
    RowTokeniser,
    TokenisedRows,
    cut,
    truncation_warnings,
)
from workers.sources.local import ResolvedDataset

VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "a", "b", "c", "d", "e"]
PAD, UNK, BOS, EOS, USER, ASSISTANT, A, B, C, D, E = range(len(VOCABULARY))
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer(
    *, post: str | None = None, template: Any = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token=eos
    )
    if post is not None and "<s>" in post:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


def tokenise(
    kind: type[RowTokeniser],
    tokenizer: PreTrainedTokenizerFast,
    *rows: tuple[str, str | None],
    max_tokens: int = 32,
    completions: list[str] | None = None,
) -> TokenisedRows:
    names = {
        LabelledTexts: ColumnNames(),
        Completions: ColumnNames(prompt="p"),
        Chats: ColumnNames(messages="m"),
    }
    table = Table(ResolvedDataset(Path(), "csv", ""), names[kind], "train")
    texts, pairs = zip(*rows, strict=True)
    batch = pa.record_batch(
        {"text": pa.array(texts, pa.string()), "text_pair": pa.array(pairs, pa.string())}
    )
    tokeniser = kind(tokenizer, table, max_tokens=max_tokens)
    return tokeniser.tokenise(batch, first_row=41, completions=completions)


def chat(*contents: str) -> tuple[str, None]:
    """Make a chat of a user and an assistant in turns."""
    roles = ("user", "assistant")
    turns = [
        {"role": roles[place % 2], "content": content} for place, content in enumerate(contents)
    ]
    return json.dumps(turns), None


class TestCompletions:
    def test_special_tokens_frame_the_sample_once(self) -> None:
        tokens = tokenise(Completions, make_tokenizer(post="<s> $A"), ("a b", "c"), ("d", "e c a"))
        assert tokens.input_ids == [[BOS, A, B, C, EOS], [BOS, D, E, C, A, EOS]]
        assert tokens.completion_start == [3, 2]
        assert (list(tokens.text), list(tokens.text_pair)) == (["a b", "d"], ["c", "e c a"])
        assert tokens.num_truncated == 0

    def test_a_tokenizer_without_special_tokens_of_its_own(self) -> None:
        tokens = tokenise(Completions, make_tokenizer(), ("a b", "c"))
        assert (tokens.input_ids, tokens.completion_start) == ([[A, B, C, EOS]], [2])

    def test_a_tokenizer_that_ends_every_text(self) -> None:
        """The completion does not come after the end."""
        tokens = tokenise(Completions, make_tokenizer(post="<s> $A </s>"), ("a b", "c"))
        assert (tokens.input_ids, tokens.completion_start) == ([[BOS, A, B, C, EOS]], [3])

    def test_a_tokenizer_without_an_end(self) -> None:
        tokens = tokenise(Completions, make_tokenizer(eos=None), ("a b", "c"))
        assert (tokens.input_ids, tokens.completion_start) == ([[A, B, C]], [2])

    def test_long_prompts_are_cut_on_the_left_and_completions_on_the_right(self) -> None:
        tokens = tokenise(
            Completions,
            make_tokenizer(post="<s> $A"),
            ("a b c d e", "a"),
            ("a b", "c d e a b c d e"),
            ("a b c", "d e a b"),
            ("a", "b"),
            max_tokens=6,
        )
        assert tokens.input_ids == [
            [BOS, C, D, E, A, EOS],
            [B, C, D, E, A, B],
            [C, D, E, A, B, EOS],
            [BOS, A, B, EOS],
        ]
        assert tokens.completion_start == [4, 1, 1, 2]
        assert tokens.num_truncated == 3

    def test_other_completions_replace_the_rows_own(self) -> None:
        tokens = tokenise(
            Completions, make_tokenizer(), ("a", "b"), ("c", "d"), completions=["d", "b"]
        )
        assert tokens.input_ids == [[A, D, EOS], [C, B, EOS]]
        assert list(tokens.text_pair) == ["d", "b"]

    def test_a_completion_without_tokens_is_refused(self) -> None:
        tokenizer = make_tokenizer(eos=None)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
        with pytest.raises(AuditRefused, match="row 42: the completion has no tokens") as caught:
            tokenise(Completions, tokenizer, ("a", "b"), ("a", "|"))
        assert caught.value.failure.field == "train.columns.completion"

    def test_a_prompt_without_tokens_begins_all_the_same(self) -> None:
        """The first token of a completion is predicted from something."""
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
        tokens = tokenise(Completions, tokenizer, ("|", "b"))
        assert (tokens.input_ids, tokens.completion_start) == ([[EOS, B, EOS]], [1])
        assert tokens.num_truncated == 0


class TestChats:
    def test_the_last_answer_is_the_completion(self) -> None:
        tokens = tokenise(
            Chats, make_tokenizer(template=TEMPLATE), chat("a", "b"), chat("a", "b", "c", "d e")
        )
        assert tokens.input_ids == [
            [USER, A, EOS, ASSISTANT, B, EOS],
            [USER, A, EOS, ASSISTANT, B, EOS, USER, C, EOS, ASSISTANT, D, E, EOS],
        ]
        assert tokens.completion_start == [4, 10]
        assert list(tokens.text) == ["user: a", "user: a\nassistant: b\nuser: c"]
        assert list(tokens.text_pair) == ["b", "d e"]

    def test_the_template_writes_the_special_tokens(self) -> None:
        """They are not added a second time."""
        tokenizer = make_tokenizer(post="<s> $A </s>", template="<s> " + TEMPLATE)
        tokens = tokenise(Chats, tokenizer, chat("a", "b"))
        assert tokens.input_ids == [[BOS, USER, A, EOS, ASSISTANT, B, EOS]]

    def test_other_answers_replace_the_rows_own(self) -> None:
        tokenizer = make_tokenizer(template=TEMPLATE)
        tokens = tokenise(Chats, tokenizer, chat("a", "b"), completions=["e"])
        assert tokens.input_ids == [[USER, A, EOS, ASSISTANT, E, EOS]]
        assert list(tokens.text_pair) == ["e"]

    def test_long_chats_are_cut_on_the_left(self) -> None:
        tokenizer = make_tokenizer(template=TEMPLATE)
        tokens = tokenise(Chats, tokenizer, chat("a b c", "d"), max_tokens=5)
        assert tokens.input_ids == [[C, EOS, ASSISTANT, D, EOS]]
        assert (tokens.completion_start, tokens.num_truncated) == ([3], 1)

    @pytest.mark.parametrize(
        "dated",
        [
            "{{ '<s> ' if strftime_now('%d %b %Y') == '01 Jan 2025' else 'e ' }}",
            "{{ '<s> ' if strftime_now('%Y-%m-%d') == '2025-01-01' else 'e ' }}",
            # as Llama 3.2 does
            "{{ '<s> ' if date_string == '01 Jan 2025' else 'e ' }}",
        ],
    )
    def test_the_tokens_do_not_depend_on_the_day(self, dated: str) -> None:
        tokenizer = make_tokenizer(post="<s> $A", template=dated + TEMPLATE)
        tokens = tokenise(Chats, tokenizer, chat("a", "b"))
        assert tokens.input_ids == [[BOS, USER, A, EOS, ASSISTANT, B, EOS]]
        today = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}],
            tokenize=False,
            chat_template="{{ strftime_now('%Y') }}",
        )
        assert today == str(datetime.now(UTC).year), "elsewhere it is the day that it is"

    @pytest.mark.parametrize("template", [None, {"tool_use": TEMPLATE}])
    def test_a_tokenizer_without_a_template_is_refused(self, template: Any) -> None:
        with pytest.raises(AuditRefused, match="no chat template") as caught:
            tokenise(Chats, make_tokenizer(template=template), chat("a", "b"))
        assert caught.value.failure.code == "no_chat_template"
        assert caught.value.failure.field == "train.columns.messages"

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            # the prompt holds what the whole chat does not
            ("{{ messages[0]['content'] }}{% if add_generation_prompt %} b{% endif %}", "answer"),
            ("{{ messages[-1]['content'] }}", "answer"),
            ("{{ messages[0]['content'] }}", "answer"),
            ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
            ("{{ messages[0]['content'] + 1 }}", "does not take this chat"),
            ("{{ 1 // 0 }}", "does not take this chat"),
            ("{{ messages.__class__.__mro__ }}", "unsafe"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ],
    )
    def test_a_template_that_does_not_fit_is_refused(self, template: str, words: str) -> None:
        with pytest.raises(AuditRefused, match=rf"row 41: .*({words})") as caught:
            tokenise(Chats, make_tokenizer(template=template), chat("a", "c"))
        assert caught.value.failure.code == "unsupported_chat_template"
        assert caught.value.failure.field == "train.columns.messages"


class TestLabelledTexts:
    def test_they_have_no_completions(self) -> None:
        tokens = tokenise(
            LabelledTexts,
            make_tokenizer(),
            ("a b c", None),
            ("d", None),
            ("b c", None),
            max_tokens=2,
        )
        assert tokens.input_ids == [[A, B], [D], [B, C]]
        assert tokens.num_truncated == 1
        assert tokens.completion_start is None
        assert tokens.token_type_ids is None

    def test_a_tokenizer_in_plain_python(self) -> None:
        """It keeps nothing of what it cut off."""
        tokenizer: Any = CanineTokenizer()
        tokens = tokenise(LabelledTexts, tokenizer, ("a" * 9, None), ("b" * 8, None), max_tokens=10)
        assert [len(row) for row in tokens.input_ids] == [10, 10]
        assert tokens.num_truncated == 1


def test_what_was_cut_is_told() -> None:
    provenance = {"max_tokens": 2048, "num_truncated": {"train": 1234, "validation": 1}}
    train, validation = truncation_warnings(provenance)
    assert train.startswith("1,234 training samples were cut to the 2,048 tokens")
    assert validation.startswith("1 validation sample was cut")
    assert "Raise max_tokens" in train
    assert truncation_warnings({"max_tokens": 8, "num_truncated": {"train": 0}}) == []
    assert truncation_warnings({"engine_version": "0.1.0"}) == []


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    completion=st.lists(st.integers(4, 9), min_size=1, max_size=12),
    max_tokens=st.integers(2, 15),
)
def test_what_is_cut_keeps_the_completion_and_the_end_of_the_prompt(
    prompt: list[int], completion: list[int], max_tokens: int
) -> None:
    tokens, start = cut(prompt, completion, max_tokens=max_tokens, beginning=0)
    assert len(tokens) <= max_tokens
    assert start >= 1
    assert tokens[start:] == completion[: max_tokens - 1]
    kept = tokens[:start]
    if len(prompt) + len(completion) <= max_tokens:
        assert tokens == prompt + completion
    elif kept[0] == prompt[0] == 0 and len(kept) > 1:
        assert kept[1:] == prompt[len(prompt) - len(kept) + 1 :]
    else:
        assert kept == prompt[len(prompt) - len(kept) :]
    if len(prompt) + len(completion) > max_tokens:
        assert len(tokens) == max_tokens or len(completion) < max_tokens
