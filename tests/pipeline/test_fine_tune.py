"""Which modules get adapters, what is trained, and which epochs are kept."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    FNetConfig,
    FNetForSequenceClassification,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
    get_linear_schedule_with_warmup,
)

from app.work.models import Stage
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import (
    gpt2_config,
    instructions,
    llama_config,
    save_gpt2,
    save_llama,
)
from tests.pipeline.workplace import Workplace, interrupted
from workers.influence.errors import NoTrackedModules
from workers.influence.objectives import CausalLanguageModel
from workers.pipeline.fine_tune import query_and_value
from workers.pipeline.samples import SampleSet

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
FINE_TUNE: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 8, "dropout": 0.2}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestTargets:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (llama_config(), ["q_proj", "v_proj"]),
            (OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16), ["q_proj", "v_proj"]),
            (gpt2_config(), ["c_attn"]),
            (GPTNeoXConfig(**SIZES, intermediate_size=16), ["query_key_value"]),
            (BloomConfig(vocab_size=30, hidden_size=16, n_head=2, n_layer=2), ["query_key_value"]),
            (Phi3Config(**SIZES, intermediate_size=16, pad_token_id=0), ["qkv_proj"]),
            (
                CTRLConfig(vocab_size=30, n_positions=24, n_embd=16, dff=16, n_layer=2, n_head=2),
                [
                    "multi_head_attention.Wq",
                    "multi_head_attention.Wk",
                    "multi_head_attention.Wv",
                    "multi_head_attention.dense",
                ],
            ),
        ],
        ids=lambda value: getattr(value, "model_type", None),
    )
    def test_the_names_of_query_and_value(self, config: Any, expected: list[str]) -> None:
        """By their usual names, else the layer that makes both, else the whole attention."""
        assert query_and_value(AutoModelForCausalLM.from_config(config)) == expected

    def test_a_model_without_attention_must_name_its_own(self) -> None:
        config = FNetConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, intermediate_size=16
        )
        with pytest.raises(NoTrackedModules, match=r"in target_modules: .*dense"):
            query_and_value(FNetForSequenceClassification(config))


def submit(workplace: Workplace, model: Path, *, validation: bool = True, **request: Any) -> str:
    """Submit an audit of a causal language model with fine-tuning."""
    data: dict[str, Any] = {"train": workplace.table("train", instructions(20, seed=0))}
    if validation:
        data["validation"] = workplace.table("validation", instructions(6, seed=1))
    return workplace.submit(
        model, **data, **{"task": "causal_lm", "fine_tune": FINE_TUNE, **request}
    )


def fine_tune(workplace: Workplace, audit_id: str) -> None:
    assert workplace.execute(workplace.claim_stage(audit_id, Stage.FINE_TUNE))


@pytest.fixture
def llama(workplace: Workplace) -> Path:
    return save_llama(workplace.files / "llama")


def mean_loss(model: nn.Module, samples: SampleSet) -> float:
    """The mean of the samples' own losses, one by one."""
    losses = []
    for place in range(len(samples)):
        inputs, label_BS = samples.batch(
            torch.tensor([place]), pad_id=0, device=torch.device("cpu")
        )
        with torch.no_grad():
            losses.append(CausalLanguageModel().run(model, inputs, label_BS).loss_B)
    return float(torch.cat(losses).mean())


class TestCausalLanguageModels:
    def test_it_learns_the_completions(self, workplace: Workplace, llama: Path) -> None:
        audit_id = submit(
            workplace, llama, fine_tune={"epochs": 5, "learning_rate": 0.05, "batch_size": 4}
        )
        fine_tune(workplace, audit_id)
        artifacts = workplace.artifacts(audit_id)
        losses = workplace.audit(audit_id).provenance["validation_losses"]
        validation = SampleSet(artifacts.validation)
        base = AutoModelForCausalLM.from_pretrained(llama).eval()
        assert min(losses) < mean_loss(base, validation) - 0.1
        adapted = PeftModel.from_pretrained(base, artifacts.adapter).eval()
        assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
        # the adapter is that of the best epoch
        assert mean_loss(adapted, validation) == pytest.approx(min(losses), rel=1e-5)

    @pytest.mark.parametrize("target_modules", [None, ["all-linear"], ["attn.c_proj"]])
    def test_transposed_layers(
        self, workplace: Workplace, target_modules: list[str] | None
    ) -> None:
        folder = save_gpt2(workplace.files / "gpt2")
        audit_id = submit(
            workplace, folder, fine_tune=FINE_TUNE | {"target_modules": target_modules}
        )
        fine_tune(workplace, audit_id)
        adapter = workplace.artifacts(audit_id).adapter
        assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        names = {
            name.split(".h.0.")[1].split(".lora_")[0]
            for name in load_file(adapter / "adapter_model.safetensors")
            if ".h.0." in name
        }
        assert (
            names
            == {
                None: {"attn.c_attn"},
                "all-linear": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
                "attn.c_proj": {"attn.c_proj"},
            }[target_modules[0] if target_modules else None]
        )

    def test_it_can_become_a_classifier(self, workplace: Workplace, llama: Path) -> None:
        audit_id = workplace.submit(
            llama, **workplace.reviews(num_train=20, num_validation=6), fine_tune=FINE_TUNE
        )
        fine_tune(workplace, audit_id)
        weights = load_file(workplace.artifacts(audit_id).adapter / "adapter_model.safetensors")
        assert weights["base_model.model.score.weight"].shape == (2, 16)

    def test_modules_that_are_not_there(self, workplace: Workplace, llama: Path) -> None:
        audit = workplace.finish(
            submit(workplace, llama, fine_tune=FINE_TUNE | {"target_modules": ["nowhere"]})
        )
        assert (audit.state, audit.error_field) == ("failed", "fine_tune.target_modules")


def test_without_a_validation_set_the_last_epoch_is_kept(workplace: Workplace, llama: Path) -> None:
    """It is the same as the last epoch of an audit that keeps every one."""
    alone = submit(workplace, llama, validation=False, **baselines_only())
    fine_tune(workplace, alone)
    kept = submit(workplace, llama, estimators=["tracin"])
    fine_tune(workplace, kept)
    assert workplace.audit(alone).provenance["validation_losses"] == []
    name = "adapter_model.safetensors"
    last = workplace.artifacts(kept).epoch_adapter(FINE_TUNE["epochs"] - 1)
    assert (workplace.artifacts(alone).adapter / name).read_bytes() == (last / name).read_bytes()


def baselines_only() -> dict[str, Any]:
    return {
        "estimators": ["self_influence"],
        "ranking": {"estimator": "self_influence", "aggregation": "mean"},
    }


class TestEpochs:
    """What tracin needs: the adapter after every epoch, and what it was trained with."""

    @pytest.fixture
    def submit_tracin(self, workplace: Workplace, models: Models) -> Callable[[], str]:
        data = workplace.reviews(num_train=30, num_validation=8)
        return lambda: workplace.submit(
            models.encoder, **data, fine_tune=FINE_TUNE, estimators=["tracin"]
        )

    def test_every_epoch_is_kept_with_its_mean_learning_rate(
        self, workplace: Workplace, submit_tracin: Callable[[], str]
    ) -> None:
        audit_id = submit_tracin()
        fine_tune(workplace, audit_id)
        artifacts = workplace.artifacts(audit_id)
        folders = [artifacts.epoch_adapter(epoch) for epoch in range(3)]
        assert sorted(folders[0].parent.iterdir()) == folders
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
        assert len(set(weights)) == 3
        losses = workplace.audit(audit_id).provenance["validation_losses"]
        best = losses.index(min(losses))
        assert (artifacts.adapter / "adapter_model.safetensors").read_bytes() == weights[best]

        # 30 samples in batches of 8 make 4 steps an epoch; the schedule, asked step by step
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * 12), 12)
        rates = []
        for _ in range(12):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        expected = [sum(rates[first : first + 4]) / 4 for first in (0, 4, 8)]
        kept = json.loads(artifacts.epochs.read_text())["learning_rates"]
        assert kept == pytest.approx(expected, rel=1e-12)

    def test_an_epoch_that_only_warms_up_weighs_nothing(
        self, workplace: Workplace, models: Models
    ) -> None:
        """With one step an epoch, the first one's learning rate is 0; the audit goes on."""
        audit_id = workplace.submit(
            models.encoder,
            **workplace.reviews(num_train=8, num_validation=4),
            fine_tune=FINE_TUNE | {"epochs": 2, "warmup_fraction": 0.5},
            estimators=["tracin"],
        )
        audit = workplace.finish(audit_id)
        assert audit.state == "succeeded", audit.error_message
        kept = json.loads(workplace.artifacts(audit_id).epochs.read_text())["learning_rates"]
        assert kept == [0.0, pytest.approx(1e-2)]

    def test_they_are_not_kept_for_nothing(self, workplace: Workplace, models: Models) -> None:
        audit_id = workplace.submit(
            models.encoder,
            **workplace.reviews(num_train=20, num_validation=6),
            fine_tune=FINE_TUNE,
        )
        fine_tune(workplace, audit_id)
        artifacts = workplace.artifacts(audit_id)
        assert not artifacts.epoch_adapter(0).parent.exists()
        assert not artifacts.epochs.exists()

    def test_stopped_at_any_step_they_are_the_same_to_the_bit(
        self,
        workplace: Workplace,
        submit_tracin: Callable[[], str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Neither half an epoch's folder nor one of other bytes is ever left."""
        quiet = submit_tracin()
        fine_tune(workplace, quiet)
        expected = self.kept(workplace, quiet)
        for tick in (2, 7, 10, 12, 15):
            audit_id = submit_tracin()
            claim = workplace.claim_stage(audit_id, Stage.FINE_TUNE)
            with interrupted(monkeypatch, tick=tick):
                assert not workplace.execute(claim)
            torch.manual_seed(tick)  # the next worker is another process
            fine_tune(workplace, audit_id)
            assert self.kept(workplace, audit_id) == expected, f"interrupted at tick {tick}"

    def test_a_folder_of_an_epoch_that_is_done_again_is_replaced(
        self, workplace: Workplace, submit_tracin: Callable[[], str]
    ) -> None:
        """A kill between the folder and the checkpoint leaves one that is not counted yet."""
        quiet = submit_tracin()
        fine_tune(workplace, quiet)
        audit_id = submit_tracin()
        claim = workplace.claim_stage(audit_id, Stage.FINE_TUNE)
        stale = workplace.artifacts(audit_id).epoch_adapter(0)
        stale.mkdir(parents=True)
        (stale / "stale").write_text("from an epoch that was not counted")
        assert workplace.execute(claim)
        assert self.kept(workplace, audit_id) == self.kept(workplace, quiet)

    @staticmethod
    def kept(workplace: Workplace, audit_id: str) -> dict[str, str]:
        artifacts = workplace.artifacts(audit_id)
        folder = artifacts.epochs.parent
        assert not [path.name for path in folder.rglob(".*")], "no temporary folder is left"
        return {
            name: digest
            for name, digest in digests(folder).items()
            if name != artifacts.checkpoint.name
        }
