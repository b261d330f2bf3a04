from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers import LlamaForSequenceClassification as Llama

from tests.influence.tiny_models import NUM_CLASSES, VOCABULARY, tiny_adapted, tiny_classifier
from workers.influence.errors import UnsupportedModule
from workers.influence.lora import is_adapted, merge_adapter


def test_factors_are_kept_and_merged() -> None:
    model = tiny_adapted("bert")
    name = "bert.encoder.layer.1.attention.self.value"
    layer: Any = model.get_submodule(f"base_model.model.{name}")
    before = layer.base_layer.weight.detach().clone()
    merged = merge_adapter(model)
    factors = merged.factors[name]
    assert factors.scaling == 6 / 4
    torch.testing.assert_close(
        merged.model.get_submodule(name).weight,
        before + factors.scaling * factors.b_OR @ factors.a_RI,
    )
    assert merged.saved_names == ("classifier",)
    assert not is_adapted(merged.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [5]}, "ALora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=False"),
        ({"target_modules": ["query", "word_embeddings"]}, "LoRA on an embedding"),
        ({"trainable_token_indices": [3, 4]}, "TrainableTokensWrapper"),
    ],
)
def test_features_that_would_not_be_exact_are_refused(
    options: dict[str, Any], message: str
) -> None:
    """Each refusal names what it found."""
    with pytest.raises(UnsupportedModule, match=message):
        merge_adapter(tiny_adapted("bert", **options))


def test_other_kinds_of_adapter_are_refused() -> None:
    config = IA3Config(
        task_type="SEQ_CLS", target_modules=["query", "dense"], feedforward_modules=["dense"]
    )
    with pytest.raises(UnsupportedModule, match="only LoRA"):
        merge_adapter(get_peft_model(tiny_classifier("bert"), config))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dora_is_kept_and_merged(family: str) -> None:
    """Every output of the merged layer is as long as its magnitude, Conv1D's columns too."""
    model = tiny_adapted(family, use_dora=True)
    merged = merge_adapter(model)
    for name, factors in merged.factors.items():
        assert factors.magnitude_O is not None
        assert factors.gain_O is not None
        weight = merged.model.get_submodule(name).get_parameter("weight")
        weight_OI = weight.T if family == "gpt2" else weight
        torch.testing.assert_close(weight_OI.norm(dim=1), factors.magnitude_O)


def test_magnitude_of_zero_is_refused() -> None:
    model = tiny_adapted("bert", use_dora=True)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            with torch.no_grad():
                parameter[0] = 0
    with pytest.raises(UnsupportedModule, match="zero in DoRA's magnitude"):
        merge_adapter(model)


def test_modules_saved_beside_the_adapter_are_named() -> None:
    """Those with parameters, in the order of the tree."""
    merged = merge_adapter(tiny_adapted("roberta", modules_to_save=["classifier", "LayerNorm"]))
    assert merged.saved_names[0] == "roberta.embeddings.LayerNorm"
    assert merged.saved_names[-2:] == ("classifier.dense", "classifier.out_proj")


def test_blocks_that_share_weights_are_refused() -> None:
    """Replicated layers have adapters of their own but one base weight."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=NUM_CLASSES,
    )
    model = tiny_adapted("llama", base=Llama(config), layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(UnsupportedModule, match="shares its base_layer"):
        merge_adapter(model)


def test_two_active_adapters_are_refused() -> None:
    config = LoraConfig(target_modules=["query"])
    model: Any = get_peft_model(tiny_classifier("bert"), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedModule, match="2 adapters are active"):
        merge_adapter(model)


def test_an_inactive_adapter_is_left_aside() -> None:
    """Only the active adapter is merged and tracked."""
    model: Any = tiny_adapted("bert")
    expected = merge_adapter(tiny_adapted("bert"))
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".second." in name and "lora_B" in name:
            nn.init.normal_(parameter)
    merged = merge_adapter(model)
    assert merged.factors.keys() == expected.factors.keys()
    for name, parameter in merged.model.named_parameters():
        torch.testing.assert_close(parameter, expected.model.get_parameter(name))
