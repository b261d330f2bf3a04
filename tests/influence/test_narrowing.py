"""The last block computes what is read, and nothing that matters changes."""

import pytest
import torch
from torch import nn

from tests.influence.extraction import assert_rows_close, extract
from tests.influence.tiny_models import sample_tokens, tiny_adapted, tiny_classifier
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor
from workers.influence.narrowing import NarrowLayers


def narrow_names(model: nn.Module, block: nn.Module) -> list[str]:
    layers = NarrowLayers(model, block)._layers
    return [name for name, each in block.named_modules() if any(each is one for one in layers)]


def last_block(model: nn.Module) -> nn.Module:
    return model.get_submodule("bert.encoder.layer.2")


def test_everything_but_keys_and_values_is_narrow() -> None:
    model = tiny_classifier("bert")
    assert narrow_names(model, last_block(model)) == [
        "attention.self.query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]


def test_nothing_is_narrow_below_the_last_block() -> None:
    """Its outputs are what the last block's keys and values are made of."""
    model = tiny_classifier("bert")
    assert narrow_names(model, model.get_submodule("bert.encoder.layer.1")) == []


def test_nothing_is_narrow_where_all_positions_are_read() -> None:
    model = tiny_classifier("bert")

    class MeanPooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model.get_submodule("bert")
            self.classifier = model.get_submodule("classifier")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)
            logits = self.classifier(hidden.last_hidden_state.mean(dim=1))
            return type("Output", (), {"logits": logits})

    pooled = MeanPooled()
    assert narrow_names(pooled, last_block(pooled)) == []


BERT = ["query", "value", "attention.output.dense", "intermediate.dense"]


@pytest.mark.parametrize(
    ("family", "targets"),
    [("bert", BERT), ("roberta", BERT), ("distilbert", ["q_lin", "v_lin", "out_lin", "lin1"])],
)
def test_gradients_are_the_same_with_and_without(
    family: str, targets: list[str], device: torch.device
) -> None:
    """With padding, for factors in the narrow layers themselves too."""
    token_ids, labels = sample_tokens(6)
    narrow = GradientExtractor(tiny_adapted(family, target_modules=targets).to(device))
    assert narrow._narrow is not None
    assert len(narrow._narrow) >= 4
    whole = GradientExtractor(tiny_adapted(family, target_modules=targets).to(device))
    whole._narrow = None
    assert_rows_close(extract(narrow, token_ids, labels), extract(whole, token_ids, labels))


def test_sums_over_tokens_see_every_position(device: torch.device) -> None:
    """The inputs of the last block's layers count at all positions for the Kronecker sums."""
    token_ids, labels = sample_tokens(4)
    batch = collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    model = tiny_adapted("bert", target_modules=["dense"], modules_to_save=["classifier"])
    extractor = GradientExtractor(model.to(device), kronecker=True)
    found = extractor.extract(*batch).kronecker
    extractor._narrow = None
    for sums, expected in zip(found, extractor.extract(*batch).kronecker, strict=True):
        if sums is not None and expected is not None:
            torch.testing.assert_close(sums.input_II, expected.input_II)
