"""Fine-tuning again without the suspects: what is trained, what is measured, what is told."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from app.audits.assemble import assemble_audit
from app.audits.models import Audit
from app.work.models import Stage
from tests.influence import aggregation_oracles as slow
from tests.oracles import sample_loss
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import instruction_ids, read_influence, review_ids
from tests.pipeline.verifying import (
    FINE_TUNE,
    TEST,
    TRAIN,
    arms_of,
    kept_rows,
    plan_of,
    submit_reviews,
    without_lowest,
)
from tests.pipeline.workplace import Workplace
from workers.pipeline.artifacts import read_tensors

NAMES = ["neg", "pos"]
RANKINGS: list[dict[str, Any]] = [
    {"estimator": "grad_dot", "aggregation": "mean"},
    {"estimator": "grad_dot", "aggregation": "vote", "vote_fraction": 0.5},
    {"estimator": "grad_cosine", "layers": "01,CL", "aggregation": "rank", "correct_only": True},
    {"estimator": "self_influence", "layers": "CL", "aggregation": "mean"},
    {"estimator": "loss"},
]


@pytest.fixture
def submit(workplace: Workplace, models: Models) -> Callable[..., str]:
    return partial(submit_reviews, workplace, models)


class TestWhatIsKept:
    @pytest.fixture
    def audit(self, workplace: Workplace, submit: Callable[..., str]) -> Audit:
        verify = {"fraction": 0.25, "seeds": [3, 0], "rankings": RANKINGS}
        audit_id = submit(verify=verify, fine_tune=FINE_TUNE | {"epochs": 1})
        workplace.claim_stage(audit_id, Stage.VERIFY)  # all is planned, and nothing trained yet
        return workplace.audit(audit_id)

    def test_it_is_what_the_scores_say(self, workplace: Workplace, audit: Audit) -> None:
        ranked = sorted(workplace.ranked_rows(audit.id), key=lambda row: row.sample_index)
        rows = workplace.training_rows(audit.id)
        everything = list(range(60))
        lowest = without_lowest([row.score for row in ranked], 0.25)
        assert kept_rows(workplace, audit, "filtered") == lowest
        assert kept_rows(workplace, audit, "full") == everything
        assert kept_rows(workplace, audit, "relabelled") == everything
        clean = [row.sample_index for row in rows if not row.is_noisy]
        assert kept_rows(workplace, audit, "oracle") == clean
        random = [kept_rows(workplace, audit, "random", seed=seed) for seed in (0, 3)]
        assert [len(kept) for kept in random] == [45, 45]
        assert random[0] != random[1]

        arms = {arm["name"]: arm for arm in plan_of(workplace, audit)["arms"]}
        assert (arms["filtered"]["num_train"], arms["filtered"]["num_removed"]) == (45, 15)
        assert (arms["oracle"]["num_train"], arms["oracle"]["num_removed"]) == (48, 12)
        assert (arms["full"]["num_train"], arms["full"]["num_removed"]) == (60, 0)
        suspects = set(everything) - set(lowest)
        assert arms["relabelled"]["num_relabelled"] == sum(
            row.predicted_label != row.given_label for row in rows if row.sample_index in suspects
        )

    def test_every_ranking_is_an_arm_of_its_own(self, workplace: Workplace, audit: Audit) -> None:
        """Its order, computed from the kept influence by Python's own sorts and sums."""
        influence = {
            name: read_influence(workplace, audit, name) for name in ("grad_dot", "grad_cosine")
        }
        groups = json.loads(workplace.artifacts(audit.id).modules.read_text())
        in_block_1 = [place for place, layer in enumerate(groups["layers"]) if layer == 1]
        in_head = groups["groups"]["CL"]
        validation = workplace.validation_rows(audit.id)
        right_V = torch.tensor([row.given_label == row.predicted_label for row in validation])
        assert bool(right_V.any())
        assert not bool(right_V.all())
        squared_MT = torch.cat(
            [
                read_tensors(workplace.artifacts(audit.id).facts(shard))["squared_norm"]
                for shard in range(audit.provenance["num_shards"])
            ],
            dim=1,
        )
        index_T = torch.cat(
            [
                read_tensors(workplace.artifacts(audit.id).facts(shard))["index"]
                for shard in range(audit.provenance["num_shards"])
            ]
        )

        def columns(influence_MVT: Tensor) -> list[list[float]]:
            flat: list[list[float]] = influence_MVT.flatten(0, 1).tolist()
            return flat

        dot = columns(influence["grad_dot"])
        some = influence["grad_cosine"][[*in_block_1, *in_head]][:, right_V]
        expected = {
            "grad_dot/all/mean": slow.mean(dot),
            "grad_dot/all/vote=0.5": slow.vote(dot, fraction=0.5),
            "grad_cosine/01,CL/rank/correct_only": slow.rank(columns(some)),
            "self_influence/CL/mean": (
                -squared_MT[in_head][:, index_T.argsort()].mean(dim=0)
            ).tolist(),
            "loss/all/rank": [-row.loss for row in workplace.training_rows(audit.id)],
        }
        arms = {arm["name"]: arm for arm in plan_of(workplace, audit)["arms"]}
        assert list(arms) == ["filtered", "relabelled", "full", "random", "oracle", *expected]
        for name, scores in expected.items():
            assert kept_rows(workplace, audit, name) == without_lowest(scores, 0.25), name
            assert arms[name]["ranking"]["estimator"] == name.split("/")[0]
        in_table = {row["estimator"] for row in audit.summary["configurations"]}
        assert in_table >= {"grad_dot", "grad_cosine", "self_influence"}


def test_arms_that_keep_the_same_share_their_trainings(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    """The audit's own ranking, named once more, costs nothing."""
    ranking = {"estimator": "grad_cosine", "aggregation": "rank"}
    audit_id = submit(
        ranking=ranking,
        verify={"seeds": [0, 4], "arms": ["filtered", "full"], "rankings": [ranking]},
        fine_tune=FINE_TUNE | {"epochs": 1},
    )
    audit = workplace.succeed(audit_id)
    assert sum(unit.stage == Stage.VERIFY for unit in workplace.units(audit_id)) == 4
    filtered, _, ranked = audit.summary["verification"]["arms"]
    assert ranked["name"] == "grad_cosine/all/rank"
    assert (filtered["ranking"], ranked["ranking"]["estimator"]) == (None, "grad_cosine")
    assert filtered["metrics"] == ranked["metrics"]
    assert filtered["against_full"] == ranked["against_full"]


class TestWhatIsMeasured:
    def measure(self, models: Models, adapter: Path) -> dict[str, float]:
        """Answer the test set one unpadded sample at a time, through PEFT's own forward pass."""
        base = AutoModelForSequenceClassification.from_pretrained(models.encoder, num_labels=2)
        model = PeftModel.from_pretrained(base, adapter).eval()
        labels = [NAMES.index(label) for label in TEST["label"]]
        predicted, losses = [], []
        with torch.no_grad():
            for ids, label in zip(review_ids(TEST), labels, strict=True):
                predicted.append(int(model(input_ids=torch.tensor([ids])).logits.argmax()))
                losses.append(float(sample_loss(model, ids, label)))
        return {
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "loss": sum(losses) / len(losses),
        }

    def test_an_arm_is_what_an_audit_of_its_samples_would_fine_tune(
        self, workplace: Workplace, models: Models, submit: Callable[..., str]
    ) -> None:
        """The saved adapters of such audits, with the seed of the arm, answer the test set."""
        audit = workplace.succeed(submit(ranking={"estimator": "loss"}))
        given = [row.given_label for row in workplace.training_rows(audit.id)]
        predicted = [row.predicted_label for row in workplace.training_rows(audit.id)]
        filtered = kept_rows(workplace, audit, "filtered")
        cases = {
            "full": (range(60), given),
            "filtered": (filtered, given),
            "random": (kept_rows(workplace, audit, "random", seed=1), given),
            "oracle": (kept_rows(workplace, audit, "oracle", seed=1), given),
            "relabelled": (
                range(60),
                [given[row] if row in filtered else predicted[row] for row in range(60)],
            ),
        }
        arms = arms_of(audit)
        assert arms["relabelled"]["num_relabelled"] > 0
        for name, (rows, labels) in cases.items():
            table = {
                "text": [TRAIN["text"][row] for row in rows],
                "label": [labels[row] for row in rows],
            }
            alone = workplace.submit(
                models.encoder,
                train=workplace.table(f"train-{name}", table),
                validation=workplace.reviews()["validation"],
                fine_tune=FINE_TUNE | {"seed": 1},
            )
            workplace.execute(workplace.claim_stage(alone, Stage.FINE_TUNE))
            expected = self.measure(models, workplace.artifacts(alone).adapter)
            found = {
                metric: values["values"][1] for metric, values in arms[name]["metrics"].items()
            }
            assert found == pytest.approx(expected, rel=1e-4), name

        metrics = [arm["metrics"]["loss"]["mean"] for arm in arms.values()]
        assert len(set(metrics)) == len(metrics), "the arms differ"
        one, other = arms["oracle"], arms["full"]
        pairs = zip(
            one["metrics"]["loss"]["values"], other["metrics"]["loss"]["values"], strict=True
        )
        against = one["against_full"]["loss"]
        assert against["difference"] == pytest.approx(sum(a - b for a, b in pairs) / 2)
        assert against["low"] < against["difference"] < against["high"]
        assert against["sample_low"] < against["difference"] < against["sample_high"]
        assert one["against_full"]["macro_f1"]["sample_low"] is None
        assert other["against_full"] is None
        assert audit.summary["verification"]["num_test"] == 25
        assert audit.summary["verification"]["warnings"] == []
        answer = assemble_audit(audit, influence_days=0)
        assert answer.results is not None
        assert answer.results.verification is not None
        assert list(answer.state_times)[-2:] == ["verifying", "succeeded"]
        assert {"verify", "conclude"} <= answer.timings.keys()
        assert answer.provenance["test_revision"]

    def test_it_does_not_keep_the_models(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        audit = workplace.succeed(submit(verify={"seeds": [0], "arms": ["filtered"]}))
        root = workplace.artifacts(audit.id).root
        assert not (root / "scratch").exists()
        files = {str(path.relative_to(root / "verify")) for path in (root / "verify").rglob("*.*")}
        assert files == {"plan.json", "kept.safetensors", "outcomes/00000.safetensors"}


class TestLanguageModels:
    FINE_TUNE = FINE_TUNE | {"epochs": 12, "learning_rate": 3e-2, "dropout": 0.0}

    def submit(self, workplace: Workplace, models: Models, test: dict[str, Any]) -> str:
        return workplace.submit(
            models.llama,
            task="causal_lm",
            train=workplace.table("instructions", tiny.instructions(40, seed=0)),
            validation=workplace.table("trusted_instructions", tiny.instructions(10, seed=1)),
            test=workplace.table("asked_instructions", test),
            fine_tune=self.FINE_TUNE,
            verify={"arms": ["full"], "seeds": [0]},
        )

    def test_exact_match_is_what_greedy_decoding_writes(
        self, workplace: Workplace, models: Models
    ) -> None:
        """Completions that the model itself writes by generate() match, others do not."""
        prompts = tiny.instructions(30, seed=7)["prompt"]
        alone = self.submit(workplace, models, {"prompt": prompts, "completion": prompts})
        workplace.execute(workplace.claim_stage(alone, Stage.FINE_TUNE))
        base = AutoModelForCausalLM.from_pretrained(models.llama)
        model = PeftModel.from_pretrained(base, workplace.artifacts(alone).adapter).eval()

        def write(prompt: str) -> list[int]:
            ids = torch.tensor([[tiny.LANGUAGE_VOCABULARY.index(word) for word in prompt.split()]])
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
            )[0, ids.shape[1] :]
            tokens: list[int] = written.tolist()
            return tokens

        completions = []
        for place, prompt in enumerate(prompts):
            words = [tiny.LANGUAGE_VOCABULARY[token] for token in write(prompt) if token != 2]
            if place % 3 == 0:  # a word too many, or one of another kind
                words = [*words, "film"] if place % 2 else ["plot", *words[1:]]
            completions.append(" ".join(words) or "film")
        test = {"prompt": prompts, "completion": completions}
        ids, labels = instruction_ids(test)
        exact = [
            write(prompt) == [token for token in label if token >= 0]
            for prompt, label in zip(prompts, labels, strict=True)
        ]
        assert 3 < sum(exact) < 25
        losses = [float(sample_loss(model, *pair)) for pair in zip(ids, labels, strict=True)]

        audit = workplace.succeed(self.submit(workplace, models, test))
        full = arms_of(audit)["full"]
        assert full["metrics"].keys() == {"loss", "exact_match"}
        assert full["metrics"]["exact_match"]["values"][0] == pytest.approx(sum(exact) / 30)
        assert full["metrics"]["loss"]["values"][0] == pytest.approx(sum(losses) / 30, rel=1e-4)
        plan = plan_of(workplace, audit)
        (number,) = plan["arms"][0]["trainings"]
        outcome = read_tensors(workplace.artifacts(audit.id).outcome(number))
        assert outcome["is_exact"].tolist() == exact
        assert outcome["loss"].tolist() == pytest.approx(losses, rel=1e-4)

    def test_arms_fit_the_task(self, workplace: Workplace, models: Models) -> None:
        audit_id = workplace.submit(
            models.llama,
            task="causal_lm",
            train=workplace.table("instructions", tiny.instructions(16, seed=0)),
            validation=workplace.table("trusted_instructions", tiny.instructions(6, seed=1)),
            test=workplace.table("asked_instructions", tiny.instructions(5, seed=2)),
            fine_tune={"epochs": 1},
            verify={"seeds": [0]},
        )
        audit = workplace.succeed(audit_id)
        assert list(arms_of(audit)) == ["filtered", "full", "random"]
