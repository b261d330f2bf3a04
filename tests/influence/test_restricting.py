"""Gradients of some layers alone: the same numbers, and nothing computed below them."""

import pytest
import torch
from torch import nn

from tests.influence.tiny_models import sample_tokens, tiny_adapted
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor


def chosen_of(extractor: GradientExtractor, *groups: str) -> list[int]:
    return sorted({place for group in groups for place in extractor.groups[group]})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_gradients_are_those_of_the_whole_pass(family: str, device: torch.device) -> None:
    token_ids, labels = sample_tokens(6)
    batch = collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    extractor = GradientExtractor(tiny_adapted(family).to(device), kronecker=True)
    whole, names = extractor.extract(*batch), [spec.name for spec in extractor.modules]
    chosen = chosen_of(extractor, "02", "CL")
    extractor.restrict(chosen)
    assert [spec.name for spec in extractor.modules] == [names[place] for place in chosen]
    some = extractor.extract(*batch)
    for place, rows, sums in zip(chosen, some.gradients, some.kronecker, strict=True):
        torch.testing.assert_close(rows.dense(), whole.gradients[place].dense())
        expected = whole.kronecker[place]
        if expected is not None:
            assert sums is not None
            torch.testing.assert_close(sums.input_II, expected.input_II)
    torch.testing.assert_close(some.squared_norm_MB, whole.squared_norm_MB[chosen])


@pytest.mark.parametrize(("group", "reached"), [("00", [0, 1]), ("01", [1]), ("CL", [])])
def test_the_pass_back_ends_at_the_lowest_of_them(group: str, reached: list[int]) -> None:
    """Of the blocks below the last, those alone get a gradient that something needs."""
    token_ids, labels = sample_tokens(3)
    model = tiny_adapted("bert")
    extractor = GradientExtractor(model)
    extractor.restrict(chosen_of(extractor, group))
    seen: list[int] = []
    assert extractor._model is not None
    for number in (0, 1):
        block: nn.Module = extractor._model.get_submodule(f"bert.encoder.layer.{number}.output")

        def mark(_: torch.Tensor, number: int = number) -> None:
            seen.append(number)

        def hook(_: nn.Module, __: object, output: torch.Tensor, mark: object = mark) -> None:
            if output.requires_grad:
                output.register_hook(mark)

        block.register_forward_hook(hook)
    extractor.extract(collate(token_ids, pad_id=0, device="cpu"), torch.tensor(labels))
    assert sorted(seen) == reached


def test_a_group_that_lost_a_module_is_none_any_more() -> None:
    extractor = GradientExtractor(tiny_adapted("bert"))
    assert {"all", "00", "01", "02", "CL"} <= set(extractor.groups)
    extractor.restrict(chosen_of(extractor, "01", "CL"))
    assert set(extractor.groups) == {"01", "CL"}
    names = [extractor.modules[place].name for place in extractor.groups["01"]]
    assert all(".layer.1." in name for name in names)
