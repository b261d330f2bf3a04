"""Whole audits of causal language models: completions, chats, adapters, full models."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from app.audits.models import Audit
from tests import oracles
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace
from workers.pipeline.artifacts import read_json, read_tensors

CHAT = [
    [
        {"role": "user", "content": f"{word} film"},
        {"role": "assistant", "content": f"{word} {word}"},
    ]
    for word in (*tiny.GOOD, *tiny.BAD)
]


def audit_of(workplace: Workplace, models: Models, **request: Any) -> Audit:
    sets = {
        "train": workplace.table("instructions", tiny.instructions(40, seed=0)),
        "validation": workplace.table("trusted_instructions", tiny.instructions(10, seed=1)),
    }
    request = {"task": "causal_lm", **sets, **request}
    return workplace.succeed(workplace.submit(models.llama, **request))


def test_a_base_model_is_fine_tuned_and_finds_exchanged_completions(
    workplace: Workplace, models: Models
) -> None:
    """Everything at once: fine-tuning, exchanged completions, every kind of estimator."""
    audit = audit_of(
        workplace,
        models,
        fine_tune={"epochs": 4, "learning_rate": 2e-2, "batch_size": 8},
        plant_noise={"fraction": 0.2},
        estimators=["grad_dot", "datainf", "repsim", "tracin", "tracin_we", "self_influence"],
        ranking={"estimator": "grad_cosine", "correct_only": True},
    )
    summary = audit.summary
    assert summary["labels"] == []
    assert 0 <= summary["validation_accuracy"] <= 1, "the share of tokens predicted right"
    assert 0 < summary["num_noisy"] <= 8
    (oracle,) = [c for c in summary["configurations"] if c["estimator"] == "oracle"]
    assert oracle["detection"]["auc_ndr"] == 1.0
    assert {c["estimator"] for c in summary["configurations"]} > {"repsim", "tracin", "datainf"}
    row = workplace.training_rows(audit.id)[0]
    assert row.given_label is None
    assert row.predicted_label is None
    assert row.given_probability == pytest.approx(float(torch.tensor(-row.loss).exp()), rel=1e-5)
    assert 0 <= row.predicted_probability <= 1


def test_gradients_are_those_of_the_mean_loss_of_the_completion(
    workplace: Workplace, models: Models
) -> None:
    """One sample at a time, its loss written out, through PEFT's own forward pass."""
    audit = audit_of(
        workplace, models, adapter=models.llama_adapter, ranking={"estimator": "grad_dot"}
    )
    base = AutoModelForCausalLM.from_pretrained(models.llama)
    model = PeftModel.from_pretrained(base, models.llama_adapter, is_trainable=True).eval()
    train, validation = (
        loop(model, tiny.instructions(number, seed=seed)) for number, seed in ((40, 0), (10, 1))
    )
    artifacts = workplace.artifacts(audit.id)
    layout = read_json(artifacts.modules)
    index_T = torch.cat(
        [
            read_tensors(artifacts.facts(shard))["index"]
            for shard in range(audit.provenance["num_shards"])
        ]
    )
    influence_MVT = torch.cat(
        [
            read_tensors(artifacts.influence("grad_dot", shard))["influence"]
            for shard in range(audit.provenance["num_shards"])
        ],
        dim=2,
    )[..., index_T.argsort()]
    for module, name in enumerate(layout["modules"]):  # type: ignore[arg-type, var-annotated]
        expected_VT = validation[name] @ train[name].T
        scale = float(expected_VT.abs().max())
        torch.testing.assert_close(influence_MVT[module], expected_VT, rtol=1e-4, atol=1e-5 * scale)


def loop(model: Any, table: dict[str, list[str]]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for prompt, completion in zip(table["prompt"], table["completion"], strict=True):
        words = [tiny.LANGUAGE_VOCABULARY.index(word) for word in prompt.split()]
        written = [*(tiny.LANGUAGE_VOCABULARY.index(word) for word in completion.split()), 2]
        ids = torch.tensor([[*words, *written]])
        model.zero_grad()
        logits = model(input_ids=ids).logits[0, len(words) - 1 : -1]
        cross_entropy(logits, torch.tensor(written)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                row = parameter.grad.flatten().clone()
                rows.setdefault(oracles.engine_name(name), []).append(row)
    return {name: torch.stack(row) for name, row in rows.items()}


def test_a_chat_is_written_by_the_template_and_judged_by_its_last_answer(
    workplace: Workplace, models: Models
) -> None:
    audit = audit_of(
        workplace,
        models,
        adapter=models.llama_adapter,
        train=workplace.table("train", {"messages": CHAT}) | {"columns": {"messages": "messages"}},
        validation=workplace.table("validation", {"messages": CHAT[:3]})
        | {"columns": {"messages": "messages"}},
    )
    row = workplace.training_rows(audit.id)[1]
    assert (row.text, row.text_pair) == ("user: fine film", "fine fine")


@pytest.mark.parametrize(
    "targets", [None, ["q_proj", "input_layernorm", "lm_head"], ["all-linear"]]
)
def test_a_model_that_was_fine_tuned_in_full(
    workplace: Workplace, models: Models, targets: list[str] | None
) -> None:
    audit = audit_of(
        workplace, models, target_modules=targets, estimators=["grad_cosine", "gauss_newton"]
    )
    names = read_json(workplace.artifacts(audit.id).modules)["modules"]
    assert isinstance(names, list)
    for target in targets or ["q_proj", "v_proj"]:
        assert target == "all-linear" or any(target in name for name in names)
    assert audit.provenance["preflight"]["max_gradient_error"] < 1e-4


def test_correct_only_keeps_the_better_half_of_the_validation_set(
    workplace: Workplace, models: Models
) -> None:
    whole, half = (
        audit_of(
            workplace,
            models,
            adapter=models.llama_adapter,
            ranking={"aggregation": "mean", "correct_only": correct_only},
        )
        for correct_only in (False, True)
    )
    scores = [
        [row.score for row in sorted(workplace.ranked_rows(audit.id), key=lambda r: r.sample_index)]
        for audit in (whole, half)
    ]
    assert scores[0] != scores[1]
