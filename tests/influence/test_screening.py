"""Losses by a forward pass alone, for telling which samples are worth their gradients."""

import pytest
import torch

from tests.influence.tiny_models import sample_tokens, tiny_adapted
from workers.influence.batching import collate
from workers.influence.gradients import GradientExtractor


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_forward_pass_tells_losses_and_predictions_as_the_whole_pass_does(
    family: str, device: torch.device
) -> None:
    """Its products are in bfloat16, so up to a percent; the model is left as it was."""
    token_ids, labels = sample_tokens(6)
    extractor = GradientExtractor(tiny_adapted(family).to(device), hidden_states=True)
    batch = collate(token_ids, pad_id=0, device=device), torch.tensor(labels, device=device)
    before = extractor.extract(*batch)
    seen = extractor.screen(*batch)
    torch.testing.assert_close(seen.loss_B, before.loss_B, rtol=0.02, atol=0.02)
    assert seen.hidden_LBH is not None
    assert before.hidden_LBH is not None
    torch.testing.assert_close(seen.hidden_LBH, before.hidden_LBH, rtol=0.05, atol=0.05)
    assert bool(seen.is_finite_B.all())
    assert not seen.gradients
    assert not seen.squared_norm_MB.any()
    assert torch.equal(extractor.extract(*batch).loss_B, before.loss_B)
