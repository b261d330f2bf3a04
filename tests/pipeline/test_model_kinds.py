"""Whole audits of less common models, precisions and sets of data.

Shapes: M modules, T training samples, V validation samples.
"""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2ForSequenceClassification

from app.audits.models import Audit
from tests.oracles import loop_gradients
from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import TRAIN, VALIDATION, assert_near, module_names, read_influence, sets
from tests.pipeline.workplace import Workplace


def test_gpt2_as_a_classifier_in_full(workplace: Workplace, models: Models) -> None:
    """Conv1D keeps its weights [I, O]; the last token is read; the head has no bias."""
    torch.manual_seed(6)
    model = GPT2ForSequenceClassification(tiny.gpt2_config(num_labels=2, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    folder = workplace.files / "gpt2"
    model.save_pretrained(folder)
    tiny.save_language_tokenizer(folder, template=None)
    place = workplace.with_settings(file_roots=(*workplace.settings.file_roots, workplace.files))
    audit = place.succeed(
        place.submit(
            folder,
            **sets(place),
            target_modules=["all-linear"],
            estimators=["gauss_newton", "ekfac", "repsim"],
            ranking={"estimator": "grad_dot"},
        )
    )
    loop_model = loops.classifier(folder)
    loop_model.config.pad_token_id = None
    ids_of = [
        [[tiny.LANGUAGE_VOCABULARY.index(word) for word in text.split()] for text in table["text"]]
        for table in (TRAIN, VALIDATION)
    ]
    (train, _), (validation, _) = (
        loop_gradients(loop_model, ids, loops.review_labels(table))
        for ids, table in zip(ids_of, (TRAIN, VALIDATION), strict=True)
    )
    names = module_names(workplace, audit)
    assert any("c_attn" in name for name in names)
    assert "score.weight" in names
    for name, influence_VT in zip(names, read_influence(place, audit, "grad_dot"), strict=True):
        assert_near(influence_VT, validation[name].double() @ train[name].double().T)


def test_gpt2_as_a_language_model_in_full(workplace: Workplace, models: Models) -> None:
    """Embeddings and head are tied: the embeddings' gradient is the part of the inputs."""
    train, validation = tiny.instructions(26, seed=0), tiny.instructions(7, seed=1)
    audit = workplace.succeed(
        workplace.submit(
            models.gpt2,
            task="causal_lm",
            **sets(workplace, train, validation),
            target_modules=["c_attn", "c_fc", "ln_1"],
            source={"word_embeddings": True},
            estimators=["datainf", "tracin_we", "repsim"],
            ranking={"estimator": "grad_dot"},
        )
    )
    model = loops.language_model(models.gpt2)
    expected = [loops.instruction_gradients(model, table) for table in (train, validation)]
    names = module_names(workplace, audit)
    assert names[-1] == "transformer.wte.weight"
    assert {name.split(".")[-2] for name in names[:-1]} == {"c_attn", "c_fc", "ln_1"}
    influence_MVT = read_influence(workplace, audit, "grad_dot")
    for name, influence_VT in zip(names[:-1], influence_MVT, strict=False):
        assert_near(influence_VT, expected[1][name].double() @ expected[0][name].double().T)
    assert torch.equal(influence_MVT[-1:], read_influence(workplace, audit, "tracin_we"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_low_precision_agrees_with_float32(
    workplace: Workplace, models: Models, task: str, precision: str
) -> None:
    """Scores are float32 whatever the weights are, and their order is nearly the same."""
    base, adapter, tables = models.encoder, models.adapter, (TRAIN, VALIDATION)
    if task == "causal_lm":
        base, adapter = models.llama, models.llama_adapter
        tables = (tiny.instructions(26, seed=0), tiny.instructions(7, seed=1))
    exact, low = (
        workplace.succeed(
            workplace.submit(
                base,
                adapter=adapter,
                task=task,
                **sets(workplace, *tables),
                estimators=["gauss_newton", "datainf", "repsim"],
                ranking={"estimator": "grad_dot"},
                precision=asked,
            )
        )
        for asked in ("float32", precision)
    )
    for name, least in (
        ("grad_dot", 0.99),
        ("datainf", 0.95),
        ("gauss_newton", 0.9),
        ("repsim", 0.95),
    ):
        first, second = (read_influence(workplace, audit, name) for audit in (exact, low))
        assert not torch.equal(first, second), "the precision made no difference"
        agreement = [loops.spearman(one, other) for one, other in zip(first, second, strict=True)]
        assert min(agreement) > least, (name, agreement)
    assert low.summary["num_non_finite"] == 0
    exact_rows, low_rows = (workplace.training_rows(audit.id) for audit in (exact, low))
    for one, other in zip(exact_rows, low_rows, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=0.1, abs=0.05)


def without_validation(
    workplace: Workplace, models: Models, task: str, *, is_fine_tuned: bool
) -> Audit:
    base, adapter, train = models.encoder, models.adapter, TRAIN
    if task == "causal_lm":
        base, adapter, train = models.llama, models.llama_adapter, tiny.instructions(26, seed=0)
    state: dict[str, Any] = {"adapter": adapter}
    if is_fine_tuned:
        state = {"fine_tune": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8}}
    return workplace.succeed(
        workplace.submit(
            base,
            task=task,
            train=workplace.table("train", train),
            **state,
            plant_noise={"fraction": 0.2},
            estimators=["self_influence", "loss", "random", "oracle"],
            aggregations=["mean", "rank", "vote", "trimmed_mean", "median", "min", "common_set"],
            ranking={"estimator": "self_influence", "aggregation": "mean"},
        )
    )


@pytest.mark.parametrize("is_fine_tuned", [False, True])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_without_a_validation_set_samples_are_ranked_by_themselves(
    workplace: Workplace, models: Models, task: str, *, is_fine_tuned: bool
) -> None:
    audit = without_validation(workplace, models, task, is_fine_tuned=is_fine_tuned)
    assert audit.num_validation == 0
    assert audit.summary["validation_accuracy"] is None
    assert workplace.validation_rows(audit.id) == []
    assert audit.provenance.get("validation_losses", []) == []
    assert audit.provenance["preflight"]["max_gradient_error"] < 1e-4
    assert {c["estimator"] for c in audit.summary["configurations"]} == {
        "self_influence",
        "loss",
        "random",
        "oracle",
    }
    assert not workplace.artifacts(audit.id).validation_gradients().exists()
    rows = workplace.ranked_rows(audit.id)
    assert sorted(row.sample_index for row in rows) == list(range(26))
    assert all(row.harmed_validation == row.helped_validation == [] for row in rows)


def test_self_influence_without_a_validation_set_is_the_length_of_the_gradients(
    workplace: Workplace, models: Models
) -> None:
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            adapter=models.adapter,
            train=workplace.table("train", TRAIN),
            ranking={"estimator": "self_influence", "aggregation": "mean"},
            estimators=["self_influence"],
        )
    )
    gradients = loops.review_gradients(loops.classifier(models.encoder, models.adapter), TRAIN)
    names = module_names(workplace, audit)
    score_T = -torch.stack([gradients[name].square().sum(dim=1) for name in names]).mean(dim=0)
    rows = sorted(workplace.ranked_rows(audit.id), key=lambda row: row.sample_index)
    assert_near(torch.tensor([row.score for row in rows]), score_T)


def test_validation_samples_that_are_not_finite_are_left_out(
    workplace: Workplace, models: Models
) -> None:
    """As if they were not in the file, but named; too many of them end the audit."""
    folder = shutil.copytree(models.encoder, workplace.files / "broken")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    weights[name][tiny.VOCABULARY.index("great")] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    train, clean = (
        {**table, "text": [text.replace("great", "good") for text in table["text"]]}
        for table in (TRAIN, VALIDATION)
    )
    broken = {**clean, "text": [*clean["text"]]}
    broken["text"][2] += " great"
    broken["text"][5] = "great film"
    kept = [row for row in range(len(broken["text"])) if row not in {2, 5}]
    rest = {name: [values[row] for row in kept] for name, values in broken.items()}
    asked: dict[str, Any] = {
        "adapter": models.adapter,
        "estimators": ["datainf", "gauss_newton", "outlier_gradient", "repsim", "tracin_we"],
        "aggregations": ["mean", "rank", "median", "common_set"],
        "plant_noise": {"fraction": 0.2},
        "ranking": {"estimator": "gauss_newton", "aggregation": "median"},
    }
    audit = workplace.finish(workplace.submit(folder, **sets(workplace, train, broken), **asked))
    assert (audit.state, audit.error_code) == ("failed", "non_finite_influence")
    assert "2 of 7 validation samples is not finite (rows 2, 5)" in (audit.error_message or "")

    audit, without = (
        workplace.succeed(
            workplace.submit(
                folder, **sets(workplace, train, table), **asked, max_nonfinite_fraction=0.3
            )
        )
        for table in (broken, rest)
    )
    assert audit.summary["num_non_finite_validation"] == 2
    assert audit.summary["num_non_finite"] == 0
    assert any("rows 2, 5" in warning for warning in audit.summary["warnings"])
    assert audit.summary["validation_accuracy"] == without.summary["validation_accuracy"]
    assert audit.summary["configurations"] == without.summary["configurations"]
    for row, expected in zip(
        workplace.ranked_rows(audit.id), workplace.ranked_rows(without.id), strict=True
    ):
        assert row.sample_index == expected.sample_index
        assert row.harmed_validation == [kept[place] for place in expected.harmed_validation]
        assert row.helped_validation == [kept[place] for place in expected.helped_validation]
