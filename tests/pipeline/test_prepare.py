"""The first stage: what later stages find on disk, for every kind of table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sqlalchemy.orm import Session
from transformers import GPT2Config, GPT2LMHeadModel

from app.audits.models import Audit
from app.audits.schemas import AuditRequest, Checkpoint
from app.datasets.columns import ColumnNames
from tests.factories import TENANT
from tests.pipeline.conftest import Models
from tests.pipeline.test_tokenise import ASSISTANT, EOS, TEMPLATE, USER, VOCABULARY, make_tokenizer
from tests.pipeline.tiny import reviews
from tests.pipeline.workplace import Workplace
from workers.lease import Hold
from workers.pipeline.artifacts import Artifacts
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepare import prepare
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SampleSet
from workers.pipeline.tokenise import truncation_warnings
from workers.sources import models as model_sources

CPU = torch.device("cpu")
WORDS = ["a", "b", "c", "d", "e"]


def save_language_model(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=24,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(template=template).save_pretrained(folder)
    return folder


def save_language_adapter(folder: Path, *, base: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel.from_pretrained(base)
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(model, options).save_pretrained(folder)
    return folder


@pytest.fixture
def language_model(workplace: Workplace) -> Path:
    return save_language_model(workplace.files / "lm")


Prepare = Callable[..., tuple[StageOutput, Artifacts]]


@pytest.fixture
def run(workplace: Workplace) -> Prepare:
    """Prepare an audit in place; `change` its request after it was checked."""

    def prepare_audit(
        model: Path,
        *,
        change: Callable[[AuditRequest], AuditRequest] = lambda request: request,
        **request: Any,
    ) -> tuple[StageOutput, Artifacts]:
        audit_id = workplace.submit(model, **request)
        claim = workplace.claim(audit_id)
        assert claim is not None
        with Session(workplace.engine) as session:
            stored = session.get_one(Audit, audit_id).request
        context = StageContext(
            engine=workplace.engine,
            settings=workplace.settings,
            claim=claim,
            hold=Hold(workplace.engine, workplace.settings, claim),
            request=change(AuditRequest.model_validate(stored)),
            provenance={},
            tenant=TENANT,
        )
        return prepare(context), context.artifacts

    return prepare_audit


def prompts(number: int) -> dict[str, Any]:
    """Make up prompts whose completions all differ: the number in the base of the words."""
    digits = [[i // 25 % 5, i // 5 % 5, i % 5] for i in range(number)]
    return {
        "prompt": [" ".join(WORDS[i % 5] * (i % 3 + 1)) for i in range(number)],
        "completion": [" ".join(WORDS[digit] for digit in of) for of in digits],
    }


def chats(number: int) -> dict[str, Any]:
    table = prompts(number)
    return {
        "messages": [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(*table.values(), strict=True)
        ]
    }


def targets(samples: SampleSet) -> list[str]:
    """Return the words that the model is trained to write, without the end."""
    everything = torch.arange(len(samples))
    _, label_BS = samples.batch(everything, pad_id=0, device=CPU)
    rows = [[token for token in row if token != -100] for row in label_BS.tolist()]
    assert all(row[-1] == EOS for row in rows)
    return [" ".join(VOCABULARY[token] for token in row[:-1]) for row in rows]


class TestCausalLanguageModels:
    def test_prompts_and_completions(
        self, workplace: Workplace, run: Prepare, language_model: Path
    ) -> None:
        table, small = prompts(40), prompts(7)
        output, artifacts = run(
            language_model,
            task="causal_lm",
            train=workplace.table("train", table),
            validation=workplace.table("validation", small),
        )
        assert output.columns == {"num_train": 40, "num_validation": 7}
        assert output.provenance["num_truncated"] == {"train": 0, "validation": 0}
        prepared = Prepared.read(artifacts.prepared)
        assert (prepared.task, prepared.labels, prepared.pad_id) == ("causal_lm", (), 0)
        assert prepared.model.adapter_path is None
        for path, rows in ((artifacts.train, table), (artifacts.validation, small)):
            samples = SampleSet(path)
            assert targets(samples) == rows["completion"]
            assert samples.is_noisy_T is None
            assert samples.texts(torch.tensor([3])) == [(rows["prompt"][3], rows["completion"][3])]

    def test_chats(self, workplace: Workplace, run: Prepare, language_model: Path) -> None:
        source = workplace.table("train", chats(9)) | {"columns": {"messages": "messages"}}
        output, artifacts = run(
            language_model,
            task="causal_lm",
            train=source,
            validation=workplace.table("validation", prompts(4)),
        )
        assert output.provenance["chat_date"] == "2025-01-01"
        samples = SampleSet(artifacts.train)
        assert targets(samples) == prompts(9)["completion"]
        assert samples.texts(torch.tensor([4])) == [("user: e e", "a a e")]
        inputs, _ = samples.batch(torch.tensor([0]), pad_id=0, device=CPU)
        assert inputs["input_ids"][0].tolist()[:2] == [USER, VOCABULARY.index("a")]
        assert ASSISTANT in inputs["input_ids"][0].tolist()

    @pytest.mark.parametrize("make", [prompts, chats])
    def test_planted_noise_exchanges_completions(
        self,
        workplace: Workplace,
        run: Prepare,
        language_model: Path,
        make: Callable[[int], dict[str, Any]],
    ) -> None:
        source = workplace.table("train", make(100))
        if make is chats:
            source["columns"] = {"messages": "messages"}
        _, artifacts = run(
            language_model,
            task="causal_lm",
            train=source,
            validation=workplace.table("validation", prompts(5)),
            plant_noise={"fraction": 0.3, "seed": 1},
        )
        samples, own = SampleSet(artifacts.train), prompts(100)["completion"]
        written = targets(samples)
        assert samples.is_noisy_T is not None
        assert samples.is_noisy_T.tolist() == [a != b for a, b in zip(written, own, strict=True)]
        assert int(samples.is_noisy_T.sum()) == 30
        assert sorted(written) == sorted(own)
        shown = samples.texts(torch.arange(100))
        assert [pair for _, pair in shown] == written
        assert targets(SampleSet(artifacts.validation)) == prompts(5)["completion"]
        assert {path.suffix for path in artifacts.train.parent.iterdir()} == {".arrow", ".json"}
        assert not list(artifacts.train.parent.glob("*completions*"))

    def test_known_noise_is_kept(
        self, workplace: Workplace, run: Prepare, language_model: Path
    ) -> None:
        table = prompts(6) | {"wrong": [i == 2 for i in range(6)]}
        columns = {"completion": "completion", "noise": "wrong"}
        _, artifacts = run(
            language_model,
            task="causal_lm",
            train=workplace.table("train", table) | {"columns": columns},
            validation=workplace.table("validation", prompts(4)),
        )
        noisy_T = SampleSet(artifacts.train).is_noisy_T
        assert noisy_T is not None
        assert noisy_T.tolist() == table["wrong"]

    def test_samples_that_were_cut_are_counted(
        self, workplace: Workplace, run: Prepare, language_model: Path
    ) -> None:
        """The model has 24 positions, fewer than max_tokens asks for."""
        table = {"prompt": ["a " * 30, "b", "c"], "completion": ["a", "b " * 40, "c"]}
        output, artifacts = run(
            language_model,
            task="causal_lm",
            train=workplace.table("train", table),
            validation=workplace.table("validation", prompts(4)),
        )
        assert output.provenance["num_truncated"] == {"train": 2, "validation": 0}
        assert output.provenance["max_tokens"] == 24
        (warning,) = truncation_warnings(output.provenance)
        assert "2 training samples were cut to the 24 tokens" in warning
        assert SampleSet(artifacts.train).length_T.tolist() == [24, 24, 3]

    def test_without_a_validation_set(
        self, workplace: Workplace, run: Prepare, language_model: Path
    ) -> None:
        output, artifacts = run(
            language_model,
            task="causal_lm",
            train=workplace.table("train", prompts(6)),
            ranking={"estimator": "self_influence"},
            estimators=[],
        )
        assert output.columns == {"num_train": 6, "num_validation": 0}
        assert output.provenance["validation_revision"] is None
        assert not artifacts.validation.exists()

    def test_checkpoints_are_brought_here(
        self,
        workplace: Workplace,
        run: Prepare,
        language_model: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The base is read and hashed once, however many there are."""
        looked_at: list[str] = []
        original = model_sources._resolve_part

        def watched(reference: Any, **options: Any) -> tuple[Path, str]:
            looked_at.append(options["field"])
            return original(reference, **options)

        monkeypatch.setattr(model_sources, "_resolve_part", watched)
        adapters = [
            save_language_adapter(workplace.files / f"a{seed}", base=language_model, seed=seed)
            for seed in range(3)
        ]
        checkpoints = [
            Checkpoint(adapter=f"file://{adapter}", learning_rate=0.1) for adapter in adapters[:2]
        ]

        def change(request: AuditRequest) -> AuditRequest:
            model = request.model.model_copy(update={"checkpoints": checkpoints})
            return request.model_copy(update={"model": model})

        output, artifacts = run(
            language_model,
            adapter=adapters[2],
            task="causal_lm",
            train=workplace.table("train", prompts(6)),
            validation=workplace.table("validation", prompts(4)),
            change=change,
        )
        prepared = Prepared.read(artifacts.prepared)
        assert len(prepared.checkpoint_paths) == 2
        assert all(
            (folder / "adapter_config.json").exists() for folder in prepared.checkpoint_paths
        )
        assert prepared.model.adapter_path not in {None, *prepared.checkpoint_paths}
        assert len(set(output.provenance["checkpoint_revisions"])) == 2
        assert looked_at == ["model", "adapter", "adapter", "adapter"]


class TestClassifiers:
    def test_without_a_validation_set(
        self, workplace: Workplace, run: Prepare, models: Models
    ) -> None:
        table = reviews(12, seed=0)
        output, artifacts = run(
            models.classifier,
            train=workplace.table("train", table),
            ranking={"estimator": "self_influence"},
            estimators=[],
        )
        assert output.columns == {"num_train": 12, "num_validation": 0}
        assert output.provenance["num_truncated"] == {"train": 0}
        assert "chat_date" not in output.provenance
        samples = SampleSet(artifacts.train)
        assert not samples.has_completions
        prepared = Prepared.read(artifacts.prepared)
        assert prepared.task == "classification"
        given = [prepared.labels[index] for index in samples.label_T.tolist()]
        assert given == table["label"]

    def test_a_new_head_needs_two_labels(
        self, workplace: Workplace, run: Prepare, models: Models
    ) -> None:
        table = reviews(12, seed=0, labels=("neg",))
        with pytest.raises(AuditRefused, match="same label"):
            run(
                models.encoder,
                train=workplace.table("train", table),
                ranking={"estimator": "self_influence"},
                estimators=[],
                fine_tune={},
            )


class TestRefusals:
    def refusal(self, run: Prepare, model: Path, **request: Any) -> tuple[str, str | None, str]:
        with pytest.raises(AuditRefused) as caught:
            run(model, **request)
        failure = caught.value.failure
        return failure.code, failure.field, failure.message

    def test_columns_of_another_task(
        self, workplace: Workplace, run: Prepare, language_model: Path
    ) -> None:
        """And columns that are not there, when none are named."""

        def change(request: AuditRequest) -> AuditRequest:
            source = request.train.model_copy(update={"columns": ColumnNames(messages="m")})
            return request.model_copy(update={"train": source})

        tables = {
            name: workplace.table(name, reviews(6, seed=0)) for name in ("train", "validation")
        }
        code, field, message = self.refusal(run, language_model, change=change, **tables)
        assert (code, field) == ("columns_mismatch", "train.columns")
        assert "A classification audit cannot read messages ('m')" in message
        code, field, message = self.refusal(run, language_model, task="causal_lm", **tables)
        assert (code, field) == ("missing_column", "train.columns.prompt")
        assert "'text'" in message

    def test_a_chat_without_a_template(self, workplace: Workplace, run: Prepare) -> None:
        model = save_language_model(workplace.files / "plain", template=None)
        source = workplace.table("train", chats(6)) | {"columns": {"messages": "messages"}}
        code, field, _ = self.refusal(
            run,
            model,
            task="causal_lm",
            train=source,
            validation=workplace.table("validation", prompts(4)),
        )
        assert (code, field) == ("no_chat_template", "train.columns.messages")

    def test_a_bad_row(self, workplace: Workplace, run: Prepare, language_model: Path) -> None:
        table = prompts(6)
        table["completion"][3] = " "
        code, field, message = self.refusal(
            run,
            language_model,
            task="causal_lm",
            train=workplace.table("train", prompts(5)),
            validation=workplace.table("validation", table),
        )
        assert (code, field) == ("empty_value", "validation.columns.completion")
        assert "row 4" in message
