"""Loading gives the model that was saved, with its classes in a known order, or says why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertForSequenceClassification,
    BltConfig,
    CanineConfig,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from tests.sources.conftest import WORDS, Resolve, edit_json, write_tokenizer
from workers.sources.errors import SourceError
from workers.sources.libraries import Task, check_text_config
from workers.sources.loading import load_model, longest_input, match_labels


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tokenizer("good film", return_tensors="pt")).logits
    return result


def test_a_folder_gives_the_model_that_was_saved(resolve: Resolve, classifier_folder: Path) -> None:
    resolved = resolve(classifier_folder)
    loaded = load_model(resolved, labels=match_labels(resolved, [0, 1]))
    original = BertForSequenceClassification.from_pretrained(classifier_folder).eval()
    torch.testing.assert_close(
        logits(loaded.model, loaded.tokenizer), logits(original, loaded.tokenizer)
    )
    assert not loaded.model.training
    assert loaded.tokenizer.tokenize("good film") == ["good", "film"]


def test_an_adapter_is_put_on_its_base(
    resolve: Resolve, encoder_folder: Path, adapter_folder: Path
) -> None:
    """The adapter brings the head; the result equals PEFT's own loading."""
    resolved = resolve(encoder_folder, adapter_folder)
    loaded = load_model(resolved, labels=match_labels(resolved, [0, 1, 2]))
    base = BertForSequenceClassification.from_pretrained(encoder_folder, num_labels=3)
    original = PeftModel.from_pretrained(base, adapter_folder).eval()
    assert isinstance(loaded.model, PeftModel)
    torch.testing.assert_close(
        logits(loaded.model, loaded.tokenizer), logits(original, loaded.tokenizer)
    )


def test_a_new_head_depends_on_its_seed_alone(resolve: Resolve, encoder_folder: Path) -> None:
    resolved = resolve(encoder_folder)

    def head(seed: int) -> torch.Tensor:
        model: Any = load_model(resolved, labels=["a", "b", "c"], new_head_seed=seed).model
        weight: torch.Tensor = model.classifier.weight
        return weight.detach()

    state = torch.get_rng_state()
    assert head(1).shape == (3, 16)
    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    assert torch.equal(state, torch.get_rng_state())


def test_a_new_head_replaces_a_trained_one(resolve: Resolve, classifier_folder: Path) -> None:
    """Fine-tuning starts the same way whether or not the checkpoint has a head."""
    resolved = resolve(classifier_folder)
    trained: Any = load_model(resolved, labels=[0, 1]).model
    fresh: Any = load_model(resolved, labels=[0, 1], new_head_seed=1).model
    assert not torch.equal(trained.classifier.weight, fresh.classifier.weight)
    assert torch.equal(
        trained.bert.encoder.layer[0].output.dense.weight,
        fresh.bert.encoder.layer[0].output.dense.weight,
    )


def test_weights_in_shards_load(resolve: Resolve, classifier_folder: Path) -> None:
    whole = load_model(resolve(classifier_folder), labels=[0, 1])
    model = BertForSequenceClassification.from_pretrained(classifier_folder)
    (classifier_folder / "model.safetensors").unlink()
    model.save_pretrained(classifier_folder, max_shard_size="4KB")
    sharded = load_model(resolve(classifier_folder), labels=[0, 1])
    assert len(list(classifier_folder.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(whole.model, whole.tokenizer), logits(sharded.model, sharded.tokenizer)
    )


def test_weights_that_change_after_the_check(resolve: Resolve, classifier_folder: Path) -> None:
    """A long audit never goes on with other weights than it began with."""
    resolved = resolve(classifier_folder)
    weights = classifier_folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(SourceError, match="moved or changed") as caught:
        load_model(resolved, labels=[0, 1])
    assert caught.value.code == "changed_file"
    weights.unlink()
    with pytest.raises(SourceError, match="moved or changed"):
        load_model(resolved, labels=[0, 1])
    weights.write_bytes(content)
    assert resolve(classifier_folder) == resolved
    load_model(resolved, labels=[0, 1])


def test_bfloat16_weights_on_request(resolve: Resolve, classifier_folder: Path) -> None:
    loaded = load_model(resolve(classifier_folder), labels=[0, 1], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


class TestLabels:
    def test_names_of_the_model_decide_the_order(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        edit_json(classifier_folder / "config.json", id2label={"0": "neg", "1": "pos"})
        assert match_labels(resolve(classifier_folder), ["pos", "neg"]) == ("neg", "pos")

    def test_numbers_match_names_that_are_numbers(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        edit_json(classifier_folder / "config.json", id2label={"0": "2", "1": "1"})
        assert match_labels(resolve(classifier_folder), [1, 2]) == (2, 1)

    def test_integers_are_class_numbers_where_names_are_words(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        edit_json(classifier_folder / "config.json", id2label={"0": "neg", "1": "pos"})
        assert match_labels(resolve(classifier_folder), [0, 1]) == (0, 1)

    @pytest.mark.parametrize("labels", [["neg", "pos"], [1, 2], [0, 5]])
    def test_a_guess_is_refused(
        self, resolve: Resolve, classifier_folder: Path, labels: list[int | str]
    ) -> None:
        with pytest.raises(SourceError, match="integers 0 to 1") as caught:
            match_labels(resolve(classifier_folder), labels)
        assert caught.value.code == "labels_mismatch"

    def test_an_encoder_has_no_trained_head(self, resolve: Resolve, encoder_folder: Path) -> None:
        resolved = resolve(encoder_folder)
        with pytest.raises(SourceError, match="ask for fine-tuning") as caught:
            match_labels(resolved, [0, 1])
        assert caught.value.code == "untrained_head"
        with pytest.raises(SourceError, match="ask for fine-tuning"):
            load_model(resolved, labels=[0, 1])


class TestRefusedModels:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 10**8}, "describes"),
            ({"hidden_size": "wide"}, r"config\.json"),
            ({"hidden_size": 32}, "other shapes"),
            ({"num_hidden_layers": 3}, "weights are missing"),
            ({"hidden_act": "no_such_function"}, "config"),
        ],
    )
    def test_a_config_that_does_not_fit_the_weights(
        self,
        resolve: Resolve,
        classifier_folder: Path,
        changes: dict[str, object],
        message: str,
    ) -> None:
        edit_json(classifier_folder / "config.json", **changes)
        with pytest.raises(SourceError, match=message):
            load_model(resolve(classifier_folder), labels=[0, 1])

    def test_a_broken_tokenizer(self, resolve: Resolve, classifier_folder: Path) -> None:
        (classifier_folder / "tokenizer.json").write_text("{}")
        with pytest.raises(SourceError, match="tokenizer") as caught:
            load_model(resolve(classifier_folder), labels=[0, 1])
        assert caught.value.code == "unreadable_file"


class TestRefusedAdapters:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"r": 4}, "does not fit"),
            ({"target_modules": ["nowhere"]}, "does not fit"),
            ({"target_modules": ["query"]}, "do not match"),
            ({"target_modules": ["query", "value", "key"]}, "do not match"),
        ],
    )
    def test_a_config_that_does_not_fit_the_weights(
        self,
        resolve: Resolve,
        encoder_folder: Path,
        adapter_folder: Path,
        changes: dict[str, object],
        message: str,
    ) -> None:
        edit_json(adapter_folder / "adapter_config.json", **changes)
        with pytest.raises(SourceError, match=message) as caught:
            load_model(resolve(encoder_folder, adapter_folder), labels=[0, 1, 2])
        assert caught.value.field == "adapter"


class TestNestedConfigs:
    """Models of text and pictures keep the sizes of their text model one level down."""

    @pytest.fixture
    def gemma(self, tmp_path: Path) -> Path:
        folder = tmp_path / "models" / "gemma"
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = sizes | {
            "vocab_size": len(WORDS),
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 32,
        }
        vision = sizes | {"image_size": 4, "patch_size": 2}
        config = Gemma3Config(
            text_config=text, vision_config=vision, num_labels=2, mm_tokens_per_image=4
        )
        torch.manual_seed(0)
        Gemma3ForSequenceClassification(config).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    def test_the_text_model_is_found(self, resolve: Resolve, gemma: Path) -> None:
        resolved = resolve(gemma)
        assert longest_input(resolved) == 32
        model: Any = load_model(resolved, labels=[0, 1]).model
        assert model.config.get_text_config().pad_token_id == 0
        ids_BS = torch.tensor([[2, 5, 7, 3], [2, 6, 0, 0]])
        mask_BS = ids_BS.ne(0).long()
        with torch.no_grad():
            padded_BC = model(input_ids=ids_BS, attention_mask=mask_BS).logits
            alone_BC = model(input_ids=ids_BS[1:, :2], attention_mask=mask_BS[1:, :2]).logits
        torch.testing.assert_close(padded_BC[1:], alone_BC)

    @pytest.mark.parametrize("task", ["classification", "causal_lm"])
    def test_one_that_does_not_say_its_size_is_refused(self, task: Task) -> None:
        with pytest.raises(SourceError, match="blt models cannot be audited") as caught:
            check_text_config(BltConfig(), task)
        assert caught.value.code == "unsupported_model"
        assert "does not say hidden_size, num_hidden_layers" in caught.value.message

    def test_only_language_models_must_say_their_vocabulary(self) -> None:
        check_text_config(CanineConfig(), "classification")
        with pytest.raises(SourceError, match="does not say vocab_size"):
            check_text_config(CanineConfig(), "causal_lm")


def test_wrong_number_of_labels(resolve: Resolve, classifier_folder: Path) -> None:
    with pytest.raises(SourceError, match="2 classes, but 3 labels"):
        load_model(resolve(classifier_folder), labels=[0, 1, 2])


def test_a_decoder_pads_with_its_end_token(resolve: Resolve, tmp_path: Path) -> None:
    """GPT-like tokenizers have no padding token; the classification head needs one."""
    folder = tmp_path / "models" / "decoder"
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="BertTokenizer",
        pad_token=None,
        eos_token="[SEP]",
    )
    loaded = load_model(resolve(folder), labels=[0, 1])
    model: Any = loaded.model
    assert loaded.tokenizer.pad_token == "[SEP]"
    assert model.config.pad_token_id == loaded.tokenizer.pad_token_id
