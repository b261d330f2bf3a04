import pytest
import torch
from torch import Tensor, nn

from tests.influence.extraction import CASES, OBJECTIVES
from tests.influence.tiny_models import (
    CAUSAL_FAMILIES,
    Task,
    pad_targets,
    samples_for,
    tiny_adapted,
    tiny_causal_lm,
    tiny_classifier,
    tiny_model,
)
from workers.influence.batching import collate
from workers.influence.errors import UnsupportedModule
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import find_block_stack
from workers.influence.reading import hidden_states, probe, reading_position


@pytest.mark.parametrize(("task", "family"), CASES)
def test_models_are_told_apart_by_what_the_first_token_knows(task: Task, family: str) -> None:
    model = tiny_model(task, family)
    seen = probe(model, block_name=find_block_stack(model).block_names[-1], names=[])
    assert seen.is_causal == (family in CAUSAL_FAMILIES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_in_low_precision_are_told_apart_too(family: str, dtype: torch.dtype) -> None:
    model = tiny_classifier(family).to(dtype)
    seen = probe(model, block_name=find_block_stack(model).block_names[-1], names=[])
    assert seen.is_causal == (family == "llama")


def test_classifier_without_a_padding_token_is_probed() -> None:
    """Llama refuses batches then; the probe has one sample at a time."""
    model = tiny_classifier("llama", pad_token_id=None)
    assert probe(model, block_name="model.layers.2", names=[]).is_causal


def test_pooled_modules_see_one_position() -> None:
    model = tiny_classifier("roberta")
    names = ["classifier.dense", "roberta.encoder.layer.0.output.dense"]
    seen = probe(model, block_name="roberta.encoder.layer.2", names=names)
    assert seen.pooled_names == {"classifier.dense"}


def test_position_is_the_last_or_the_first_token_whatever_the_padding() -> None:
    mask_BS = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert reading_position(mask_BS, is_causal=True).tolist() == [2, 3, 3, 2]
    assert reading_position(mask_BS, is_causal=False).tolist() == [0, 2, 0, 1]


def expected_states(model: nn.Module, ids: list[int], *, is_causal: bool) -> Tensor:
    """Output of every block at the first or last token, of one unpadded sample."""
    inputs = collate([ids], pad_id=0, device=next(model.parameters()).device)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[1:]
    return torch.stack([state[0, -1 if is_causal else 0] for state in states])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("classification", "bert"),
        ("classification", "distilbert"),
        ("classification", "llama"),
        ("causal_lm", "gpt2"),
        ("causal_lm", "qwen3"),
    ],
)
def test_hidden_states_are_the_blocks_outputs_where_the_sample_is_read(
    task: Task, family: str, left: bool, device: torch.device
) -> None:
    """Those of `output_hidden_states`, but for the last, which some models pass through a norm."""
    if left and family not in ("llama", "qwen3"):
        pytest.skip("positions are counted from the left")
    model = tiny_model(task, family).to(device)
    token_ids, labels = samples_for(task, 5)
    expected_BLH = torch.stack(
        [expected_states(model, ids, is_causal=family in CAUSAL_FAMILIES) for ids in token_ids]
    )
    norm: nn.Module = nn.Identity()
    if family in ("llama", "qwen3"):
        norm = model.get_submodule("model.norm")
    elif family == "gpt2":
        norm = model.get_submodule("transformer.ln_f")
    inputs = collate(token_ids, pad_id=0, device=device)
    if left:
        count_B = inputs["attention_mask"].sum(dim=1).tolist()
        inputs = {
            name: torch.stack(
                [row.roll(len(row) - n) for row, n in zip(value, count_B, strict=True)]
            )
            for name, value in inputs.items()
        }
    extractor = GradientExtractor(
        model,
        objective=OBJECTIVES[task],
        target_modules=["all-linear"],
        hidden_states=True,
    )
    batch = extractor.extract(inputs, pad_targets(labels, device=device, left=left))
    assert batch.hidden_LBH is not None
    assert batch.hidden_LBH.dtype == torch.float32
    with torch.no_grad():
        last_BH = norm(batch.hidden_LBH[-1])
    actual_LBH = torch.cat([batch.hidden_LBH[:-1], last_BH[None]])
    torch.testing.assert_close(actual_LBH, expected_BLH.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_hidden_states_of_an_adapted_model_hold_the_adapter(device: torch.device) -> None:
    model = tiny_adapted("bert").to(device)
    token_ids, labels = samples_for("classification", 3)
    expected_BLH = torch.stack([expected_states(model, ids, is_causal=False) for ids in token_ids])
    batch = GradientExtractor(model, hidden_states=True).extract(
        collate(token_ids, pad_id=0, device=device), pad_targets(labels, device=device)
    )
    assert batch.hidden_LBH is not None
    torch.testing.assert_close(batch.hidden_LBH, expected_BLH.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_block_without_hidden_states_is_refused() -> None:
    model = tiny_causal_lm("llama")
    blocks = {"lm_head": nn.Linear(2, 2)}
    with (
        pytest.raises(UnsupportedModule, match="'lm_head' gives no hidden states"),
        hidden_states(blocks, torch.zeros(1, dtype=torch.int64)),
    ):
        blocks["lm_head"](torch.zeros(1, 2))
    assert not any(module._forward_hooks for module in [*model.modules(), *blocks.values()])
