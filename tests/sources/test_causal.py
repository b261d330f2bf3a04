"""Causal language models load whole or not at all, and become classifiers by fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.pipeline.tiny import (
    CHAT_TEMPLATE,
    LANGUAGE_VOCABULARY,
    MAX_LANGUAGE_POSITIONS,
    llama_config,
    save_gpt2,
    save_language_adapter,
    save_language_tokenizer,
    save_llama,
)
from tests.sources.conftest import Resolve, edit_json
from workers.sources.errors import SourceError
from workers.sources.loading import has_chat_template, load_model, load_tokenizer, longest_input

SAVE = {"llama": save_llama, "gpt2": save_gpt2}


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tokenizer("good film", return_tensors="pt")).logits
    return result


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "models" / "llama")


class TestLanguageModels:
    @pytest.mark.parametrize("family", SAVE)
    def test_a_folder_gives_the_model_that_was_saved(
        self, resolve: Resolve, tmp_path: Path, family: str
    ) -> None:
        folder = SAVE[family](tmp_path / "models" / family)
        resolved = resolve(folder, task="causal_lm")
        loaded = load_model(resolved, task="causal_lm")
        original = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(
            logits(loaded.model, loaded.tokenizer), logits(original, loaded.tokenizer)
        )
        assert not loaded.model.training
        assert loaded.tokenizer.pad_token == "</s>"
        assert longest_input(resolved, task="causal_lm") == MAX_LANGUAGE_POSITIONS

    def test_an_adapter_is_put_on_its_base(
        self, resolve: Resolve, tmp_path: Path, llama: Path
    ) -> None:
        adapter = save_language_adapter(tmp_path / "models" / "adapter", base=llama)
        loaded = load_model(resolve(llama, adapter, task="causal_lm"), task="causal_lm")
        base = AutoModelForCausalLM.from_pretrained(llama)
        original = PeftModel.from_pretrained(base, adapter).eval()
        assert isinstance(loaded.model, PeftModel)
        torch.testing.assert_close(
            logits(loaded.model, loaded.tokenizer), logits(original, loaded.tokenizer)
        )

    def test_an_adapter_of_transposed_layers(self, resolve: Resolve, tmp_path: Path) -> None:
        base = save_gpt2(tmp_path / "models" / "gpt2")
        adapter = save_language_adapter(
            tmp_path / "models" / "adapter", base=base, target_modules=["c_attn"]
        )
        loaded = load_model(resolve(base, adapter, task="causal_lm"), task="causal_lm")
        assert isinstance(loaded.model, PeftModel)

    def test_a_tied_head_need_not_be_saved(self, resolve: Resolve, tmp_path: Path) -> None:
        folder = save_llama(tmp_path / "models" / "tied", tie_word_embeddings=True)
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        model: Any = load_model(resolve(folder, task="causal_lm"), task="causal_lm").model
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_missing_head_is_never_made_up(self, resolve: Resolve, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "headless"
        LlamaModel(llama_config()).save_pretrained(folder)
        save_language_tokenizer(folder)
        with pytest.raises(SourceError, match=r"missing: lm_head\.weight") as caught:
            load_model(resolve(folder, task="causal_lm"), task="causal_lm")
        assert caught.value.code == "missing_file"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 10**8}, "describes"),
            ({"hidden_size": "wide"}, r"config\.json"),
            ({"intermediate_size": 32}, "other shapes"),
            ({"num_hidden_layers": 3}, "weights are missing"),
            ({"num_attention_heads": 0}, r"config\.json|built"),
        ],
    )
    def test_a_config_that_does_not_fit_the_weights(
        self, resolve: Resolve, llama: Path, changes: dict[str, object], message: str
    ) -> None:
        edit_json(llama / "config.json", **changes)
        with pytest.raises(SourceError, match=message):
            load_model(resolve(llama, task="causal_lm"), task="causal_lm")

    def test_a_bidirectional_model_is_no_language_model(
        self, resolve: Resolve, tmp_path: Path
    ) -> None:
        """BERT has a class with an LM head, and would read the answers from the completion."""
        folder = tmp_path / "models" / "bert"
        config = BertConfig(
            vocab_size=len(LANGUAGE_VOCABULARY),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
        )
        BertForMaskedLM(config).save_pretrained(folder)
        save_language_tokenizer(folder)
        with pytest.raises(SourceError, match="sees the tokens that follow") as caught:
            load_model(resolve(folder, task="causal_lm"), task="causal_lm")
        assert caught.value.code == "unsupported_model"
        edit_json(folder / "config.json", is_decoder=True)
        load_model(resolve(folder, task="causal_lm"), task="causal_lm")

    def test_an_encoder_decoder_is_not_on_the_list(self, resolve: Resolve, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "t5"
        config = T5Config(vocab_size=30, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(folder)
        save_language_tokenizer(folder)
        with pytest.raises(SourceError, match="with a causal language model head") as caught:
            resolve(folder, task="causal_lm")
        assert caught.value.code == "unsupported_model"

    def test_a_padding_token_that_the_model_does_not_embed(
        self, resolve: Resolve, llama: Path
    ) -> None:
        edit_json(llama / "tokenizer_config.json", pad_token="[PAD]")
        with pytest.raises(SourceError, match=r"'\[PAD\]' has id \d+, but the model embeds"):
            load_model(resolve(llama, task="causal_lm"), task="causal_lm")

    def test_an_adapter_of_a_classifier(
        self, resolve: Resolve, llama: Path, adapter_folder: Path
    ) -> None:
        message = "task_type is SEQ_CLS, .* task is causal_lm"
        with pytest.raises(SourceError, match=message) as caught:
            resolve(llama, adapter_folder, task="causal_lm")
        assert (caught.value.code, caught.value.field) == ("unsupported_adapter", "adapter")

    def test_an_adapter_of_a_language_model_on_a_classifier(
        self, resolve: Resolve, tmp_path: Path, llama: Path, encoder_folder: Path
    ) -> None:
        adapter = save_language_adapter(tmp_path / "models" / "lora", base=llama)
        message = "task_type is CAUSAL_LM, .* task is classification"
        with pytest.raises(SourceError, match=message):
            resolve(encoder_folder, adapter)


class TestClassifiers:
    """A causal language model's checkpoint, fine-tuned to tell classes."""

    @pytest.mark.parametrize("family", SAVE)
    @pytest.mark.parametrize("is_tied", [False, True])
    def test_its_head_is_drawn_and_its_blocks_are_kept(
        self, resolve: Resolve, tmp_path: Path, family: str, is_tied: bool
    ) -> None:
        folder = SAVE[family](tmp_path / "models" / family, tie_word_embeddings=is_tied)
        resolved = resolve(folder)
        model: Any = load_model(resolved, labels=["a", "b", "c"], new_head_seed=1).model
        again: Any = load_model(resolved, labels=["a", "b", "c"], new_head_seed=1).model
        other: Any = load_model(resolved, labels=["a", "b", "c"], new_head_seed=2).model
        assert isinstance(model, LlamaForSequenceClassification | GPT2ForSequenceClassification)
        assert model.score.weight.shape == (3, 16)
        assert torch.equal(model.score.weight, again.score.weight)
        assert not torch.equal(model.score.weight, other.score.weight)
        original = AutoModelForCausalLM.from_pretrained(folder)
        saved = dict(original.base_model.named_parameters())
        assert all(
            torch.equal(value, saved[name]) for name, value in model.base_model.named_parameters()
        )

    def test_it_has_no_trained_head(self, resolve: Resolve, llama: Path) -> None:
        with pytest.raises(SourceError, match="ask for fine-tuning") as caught:
            load_model(resolve(llama), labels=[0, 1])
        assert caught.value.code == "untrained_head"

    def test_missing_blocks_are_refused(self, resolve: Resolve, llama: Path) -> None:
        weights = load_file(llama / "model.safetensors")
        gone = "model.layers.1.mlp.up_proj.weight"
        del weights[gone]
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match=gone):
            load_model(resolve(llama), labels=[0, 1], new_head_seed=0)


class TestChatTemplates:
    @pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
    def test_it_comes_along(self, resolve: Resolve, llama: Path, place: str) -> None:
        if place == "tokenizer_config.json":
            (llama / "chat_template.jinja").unlink()
            edit_json(llama / place, chat_template=CHAT_TEMPLATE)
        tokenizer = load_tokenizer(resolve(llama, task="causal_lm"))
        assert has_chat_template(tokenizer)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False)
        assert text.split() == ["<s>", "user", "good", "</s>"]

    def test_a_tokenizer_without_one(self, resolve: Resolve, tmp_path: Path) -> None:
        folder = save_gpt2(tmp_path / "models" / "gpt2", template=None)
        assert not has_chat_template(load_tokenizer(resolve(folder, task="causal_lm")))

    @pytest.mark.parametrize(("names", "expected"), [(["default"], True), (["tool_use"], False)])
    def test_several_templates_need_a_default_one(
        self, resolve: Resolve, llama: Path, names: list[str], expected: bool
    ) -> None:
        (llama / "chat_template.jinja").unlink()
        templates = [{"name": name, "template": CHAT_TEMPLATE} for name in [*names, "rag"]]
        edit_json(llama / "tokenizer_config.json", chat_template=templates)
        tokenizer = load_tokenizer(resolve(llama, task="causal_lm"))
        assert has_chat_template(tokenizer) is expected

    def test_it_reaches_nothing_outside_its_sandbox(self, resolve: Resolve, llama: Path) -> None:
        proof = llama.parent.parent / "ran"
        escape = (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}"
            f"{{{{ cycler.__init__.__globals__.os.system('touch {proof}') }}}}"
        )
        (llama / "chat_template.jinja").write_text(escape)
        tokenizer = load_tokenizer(resolve(llama, task="causal_lm"))
        with pytest.raises(Exception, match=r"unsafe|undefined"):
            tokenizer.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False)
        assert not proof.exists()

    def test_an_endless_one_is_refused(self, resolve: Resolve, llama: Path) -> None:
        (llama / "chat_template.jinja").write_text("x" * (1024**2 + 1))
        with pytest.raises(SourceError, match=r"chat_template\.jinja has more than") as caught:
            resolve(llama, task="causal_lm")
        assert caught.value.code == "unreadable_file"

    def test_its_bytes_are_part_of_the_revision(self, resolve: Resolve, llama: Path) -> None:
        before = resolve(llama, task="causal_lm")
        (llama / "chat_template.jinja").write_text(CHAT_TEMPLATE + "!")
        assert resolve(llama, task="causal_lm").revision != before.revision
