"""An objective gives every sample the loss it has alone, whatever batch and padding it comes in."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.influence.tiny_models import sample_tokens, tiny_classifier
from tests.pipeline.tiny import LANGUAGE_VOCABULARY, gpt2_config, llama_config
from workers.influence.batching import collate
from workers.influence.objectives import IGNORED, CausalLanguageModel, Classification

CONFIGS = {"llama": llama_config, "gpt2": gpt2_config}
STARTS = [1, 3, 2, 5]
LENGTHS = [4, 9, 6, 7]


def language_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def tokens_and_labels() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for start, length in zip(STARTS, LENGTHS, strict=True):
        tokens = torch.randint(3, len(LANGUAGE_VOCABULARY), (length,), generator=generator).tolist()
        samples.append((tokens, [IGNORED] * start + tokens[start:]))
    return samples


def padded(samples: list[tuple[list[int], list[int]]]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = collate([tokens for tokens, _ in samples], pad_id=0, device=torch.device("cpu"))
    label_BS = torch.full_like(inputs["input_ids"], IGNORED)
    for label_S, (_, labels) in zip(label_BS, samples, strict=True):
        label_S[: len(labels)] = torch.tensor(labels)
    return inputs, label_BS


def naive_loss(model: Any, tokens: list[int], labels: list[int]) -> tuple[Tensor, float]:
    """The mean over the completion, token by token, from the logits at the token before."""
    logits_SV = model(input_ids=torch.tensor([tokens])).logits[0]
    places = [place for place, label in enumerate(labels) if label != IGNORED and place]
    losses = [cross_entropy(logits_SV[place - 1], torch.tensor(labels[place])) for place in places]
    right = [int(logits_SV[place - 1].argmax()) == labels[place] for place in places]
    return torch.stack(losses).mean(), sum(right) / len(right)


class TestCausalLanguageModel:
    @pytest.mark.parametrize("family", CONFIGS)
    def test_the_loss_is_the_mean_over_the_completion(self, family: str) -> None:
        model, samples = language_model(family), tokens_and_labels()
        outcome = CausalLanguageModel().run(model, *padded(samples))
        for place, (tokens, labels) in enumerate(samples):
            loss, share_right = naive_loss(model, tokens, labels)
            torch.testing.assert_close(outcome.loss_B[place], loss, rtol=1e-5, atol=1e-6)
            assert float(outcome.predicted_probability_B[place]) == pytest.approx(share_right)
        torch.testing.assert_close(outcome.given_probability_B, (-outcome.loss_B.detach()).exp())
        assert outcome.predicted_B is None
        assert outcome.logits_BC is None
        assert not outcome.detach().loss_B.requires_grad

    @pytest.mark.parametrize("family", CONFIGS)
    def test_gradients_are_those_of_the_naive_loss(self, family: str) -> None:
        model, samples = language_model(family), tokens_and_labels()
        parameters = list(model.parameters())
        outcome = CausalLanguageModel().run(model, *padded(samples))
        together = torch.autograd.grad(outcome.loss_B.sum(), parameters)
        naive = torch.stack([naive_loss(model, *sample)[0] for sample in samples])
        expected = torch.autograd.grad(naive.sum(), parameters)
        for gradient, right in zip(together, expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)

    def test_the_head_runs_only_where_a_completion_needs_it(self) -> None:
        model: Any = language_model("llama")
        seen: list[int] = []
        model.lm_head.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output.shape[1])
        )
        tokens = [5] * 30
        batch = padded([(tokens, [IGNORED] * 28 + tokens[28:])])
        CausalLanguageModel().run(model, *batch)
        CausalLanguageModel().run(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), *batch)
        assert seen == [2, 2]

    def test_a_forward_that_gives_all_logits(self) -> None:
        """A model that cannot leave positions out has the same loss."""
        model: Any = language_model("gpt2")

        class Older(nn.Module):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
                return model(input_ids=input_ids, attention_mask=attention_mask)

        batch = padded(tokens_and_labels())
        torch.testing.assert_close(
            CausalLanguageModel().run(Older(), *batch).loss_B,
            CausalLanguageModel().run(model, *batch).loss_B,
        )

    def test_the_first_token_of_all_is_predicted_from_nothing(self) -> None:
        model = language_model("llama")
        (tokens, _), *_ = tokens_and_labels()
        whole = CausalLanguageModel().run(model, *padded([(tokens, tokens)]))
        rest = CausalLanguageModel().run(model, *padded([(tokens, [IGNORED, *tokens[1:]])]))
        torch.testing.assert_close(whole.loss_B, rest.loss_B)

    def test_a_sample_without_completion_has_loss_zero(self) -> None:
        model, samples = language_model("llama"), tokens_and_labels()
        nothing = (samples[0][0], [IGNORED] * len(samples[0][0]))
        for batch in ([nothing], [nothing, samples[1]]):
            outcome = CausalLanguageModel().run(model, *padded(batch))
            assert float(outcome.loss_B[0]) == 0
            gradients = torch.autograd.grad(outcome.loss_B.sum(), list(model.parameters()))
            assert all(bool(gradient.isfinite().all()) for gradient in gradients)

    def test_bfloat16_models_have_float32_losses(self) -> None:
        model = language_model("llama").bfloat16()
        outcome = CausalLanguageModel().run(model, *padded(tokens_and_labels()))
        assert outcome.loss_B.dtype == outcome.given_probability_B.dtype == torch.float32


def test_classification_says_what_the_logits_say() -> None:
    model = tiny_classifier("bert")
    token_ids, labels = sample_tokens(5)
    inputs = collate(token_ids, pad_id=0, device=torch.device("cpu"))
    label_B = torch.tensor(labels)
    outcome = Classification().run(model, inputs, label_B)
    logits_BC = model(**inputs).logits
    probability_BC = logits_BC.softmax(dim=1)
    torch.testing.assert_close(outcome.loss_B, cross_entropy(logits_BC, label_B, reduction="none"))
    assert outcome.predicted_B is not None
    assert outcome.predicted_B.tolist() == logits_BC.argmax(dim=1).tolist()
    torch.testing.assert_close(
        outcome.given_probability_B, probability_BC.gather(1, label_B[:, None])[:, 0]
    )
    torch.testing.assert_close(outcome.predicted_probability_B, probability_BC.amax(dim=1))
    assert outcome.logits_BC is not None
    assert outcome.loss_B.requires_grad
    assert not outcome.logits_BC.requires_grad
