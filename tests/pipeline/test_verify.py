"""Fine-tuning again without the suspects: what is trained, what is measured, what is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from app.audits.assemble import assemble_audit
from app.audits.models import Audit
from app.db import transaction
from app.work import repository as work
from app.work.models import Stage
from tests.influence import aggregation_oracles as slow
from tests.oracles import sample_loss
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import instruction_ids, read_influence, review_ids
from tests.pipeline.workplace import Workplace, interrupted, results
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.training import Diverged, train

FINE_TUNE: dict[str, Any] = {
    "epochs": 4,
    "learning_rate": 2e-2,
    "batch_size": 8,
    "dropout": 0.1,
    "target_modules": ["all-linear"],
}
TRAIN, TEST = tiny.reviews(60, seed=0), tiny.reviews(25, seed=2)
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
    """Submit an audit of reviews with planted noise, fine-tuning and a verification."""

    def submit(**request: Any) -> str:
        defaults = {
            "fine_tune": FINE_TUNE,
            "plant_noise": {"fraction": 0.2},
            "test": workplace.table("test", TEST),
            "verify": {"seeds": [0, 1]},
        }
        return workplace.submit(models.encoder, **workplace.reviews() | defaults | request)

    return submit


def arms_of(audit: Audit) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in audit.summary["verification"]["arms"]}


def plan_of(workplace: Workplace, audit: Audit) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(workplace.artifacts(audit.id).plan.read_text())
    return plan


def kept_rows(workplace: Workplace, audit: Audit, arm: str, *, seed: int = 0) -> list[int]:
    """Read which training samples an arm keeps."""
    artifacts, plan = workplace.artifacts(audit.id), plan_of(workplace, audit)
    (planned,) = [item for item in plan["arms"] if item["name"] == arm]
    place = audit.request["verify"]["seeds"].index(seed)
    number = plan["trainings"][planned["trainings"][place]]["data"]
    kept_T = read_tensors(artifacts.kept_sets)[f"kept/{number:05d}"]
    rows: list[int] = kept_T.nonzero().flatten().tolist()
    return rows


def without_lowest(scores: list[float], fraction: float) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    return sorted(order[round(fraction * len(scores)) :])


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
        answer = assemble_audit(audit)
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


class TestInterrupted:
    VERIFY: ClassVar[dict[str, Any]] = {"seeds": [2], "arms": ["relabelled"]}

    def outcome(self, workplace: Workplace, audit_id: str) -> bytes:
        return workplace.artifacts(audit_id).outcome(0).read_bytes()

    def test_stopped_at_any_step_it_goes_on_to_the_bit(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        request = {"verify": self.VERIFY, "fine_tune": FINE_TUNE | {"epochs": 2}}
        quiet = workplace.succeed(submit(**request))
        expected = self.outcome(workplace, quiet.id)
        tick, was_interrupted = 0, True
        while was_interrupted:
            tick += 5
            audit_id = submit(**request)
            claim = workplace.claim_stage(audit_id, Stage.VERIFY)
            with interrupted(monkeypatch, tick=tick):
                was_interrupted = not workplace.execute(claim)
            torch.manual_seed(tick)  # the next worker is another process
            audit = workplace.succeed(audit_id)
            assert self.outcome(workplace, audit_id) == expected, f"interrupted at tick {tick}"
            assert audit.summary["verification"] == quiet.summary["verification"]
            assert results(audit) == results(quiet)
        assert tick > 2 * 8, "in the middle of every epoch, and in the answers"

    def test_cancelled_it_stops_within_a_batch(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        place = workplace.with_settings(heartbeat_seconds=0.01)
        audit_id = submit(verify=self.VERIFY, fine_tune=FINE_TUNE | {"epochs": 8})
        claim = place.claim_stage(audit_id, Stage.VERIFY)
        assert place.audit(audit_id).state == "verifying"
        with transaction(place.engine) as session:
            work.request_cancel(session, session.get_one(Audit, audit_id))
        assert place.execute(claim) == []
        audit = place.audit(audit_id)
        assert (audit.state, audit.summary.keys() & {"verification"}) == ("cancelled", set())
        assert not place.artifacts(audit_id).outcome(0).exists()

    def test_a_training_that_is_done_is_not_done_again(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A worker that dies between the file and the commit leaves the file to the next."""
        audit_id = submit(verify=self.VERIFY)
        claim = workplace.claim_stage(audit_id, Stage.VERIFY)
        with monkeypatch.context() as patch:
            patch.setattr(work, "complete", died)
            workplace.execute(claim)
        before = self.outcome(workplace, audit_id)
        monkeypatch.setattr("workers.pipeline.verify.train", died)
        audit = workplace.succeed(audit_id)
        assert self.outcome(workplace, audit_id) == before
        assert arms_of(audit)["relabelled"]["metrics"]["accuracy"]["mean"] is not None


def died(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the worker died here")


class TestWhatIsSaidOfOddArms:
    def table(self, workplace: Workplace, labels: list[str], noise: list[bool]) -> dict[str, Any]:
        texts = [f"{word} film" for word in (*tiny.GOOD, *tiny.BAD)][: len(labels)]
        columns = {"text": "text", "label": "label", "noise": "noise"}
        table = {"text": texts, "label": labels, "noise": noise}
        return workplace.table("odd", table) | {"columns": columns}

    def warnings(self, audit: Audit) -> str:
        return "\n".join(audit.summary["verification"]["warnings"])

    def test_an_arm_without_samples_has_no_measures(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        train = self.table(workplace, ["pos", "neg"] * 4, [True] * 8)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["full", "oracle"]})
        )
        oracle = arms_of(audit)["oracle"]
        assert (oracle["num_train"], oracle["num_removed"]) == (0, 8)
        assert oracle["metrics"]["accuracy"] == {"mean": None, "values": [None, None, None]}
        assert oracle["against_full"]["accuracy"] is None
        assert "The arm oracle leaves no sample to train on" in self.warnings(audit)

    def test_an_audit_of_nothing_but_such_arms_ends_all_the_same(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        train = self.table(workplace, ["pos", "neg"] * 4, [True] * 8)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["oracle"]})
        )
        assert audit.provenance["num_trainings"] == 0
        assert arms_of(audit)["oracle"]["against_full"] is None

    def test_a_class_that_is_lost_is_named(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        noise = [label == "neg" for label in ["pos", "neg"] * 4]
        train = self.table(workplace, ["pos", "neg"] * 4, noise)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["full", "oracle"], "seeds": [0]})
        )
        said = self.warnings(audit)
        assert "The arm oracle trains on no sample of the class 'neg'. One class is left" in said
        assert "One seed gives no interval" in said
        against = arms_of(audit)["oracle"]["against_full"]["accuracy"]
        assert (against["low"], against["num_seeds"]) == (None, 1)
        assert against["sample_low"] is not None

    def test_test_samples_that_took_part_are_counted(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        test = {
            "text": [*TRAIN["text"][:3], *TEST["text"]],
            "label": [*TRAIN["label"][:3], *TEST["label"]],
        }
        audit = workplace.succeed(
            submit(
                test=workplace.table("leaking", test),
                fine_tune=FINE_TUNE | {"epochs": 1},
                verify={"arms": ["full"]},
            )
        )
        assert "3 of the 28 test samples stand in the training set too" in self.warnings(audit)

    def test_a_training_that_diverges_ends_no_audit(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def diverging(context: Any, runner: Any, training: Any) -> Any:
            if training.options.seed == 1 and len(training.index_N) < 60:
                raise Diverged(7)
            return train(context, runner, training)

        monkeypatch.setattr("workers.pipeline.verify.train", diverging)
        audit = workplace.succeed(
            submit(
                fine_tune=FINE_TUNE | {"epochs": 1},
                verify={"arms": ["full", "filtered"], "seeds": [0, 1, 2]},
            )
        )
        arms = arms_of(audit)
        accuracy = arms["filtered"]["metrics"]["accuracy"]
        assert [value is None for value in accuracy["values"]] == [False, True, False]
        assert accuracy["mean"] == pytest.approx(
            (accuracy["values"][0] + accuracy["values"][2]) / 2
        )
        assert arms["filtered"]["against_full"]["accuracy"]["num_seeds"] == 2
        assert "The arm filtered diverged with seed 1, which has no" in self.warnings(audit)


@pytest.mark.parametrize(
    ("test", "field", "sentence"),
    [
        ({"text": ["a film"], "label": ["maybe"]}, "test.columns.label", "has labels that the"),
        ({"text": ["a film"], "label": [1]}, "test.columns.label", "both have text labels"),
        ({"text": ["a film"]}, "test.columns.label", "label"),
        ({"text": [], "label": []}, "test", "no rows"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_by_name(
    workplace: Workplace,
    submit: Callable[..., str],
    test: dict[str, Any],
    field: str,
    sentence: str,
) -> None:
    audit = workplace.finish(submit(test=workplace.table("unfit", test)))
    assert (audit.state, audit.error_field) == ("failed", field)
    assert sentence in (audit.error_message or "")


def test_layers_that_the_model_has_not_are_refused_before_the_work(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    rankings = [{"layers": "00"}, {"layers": "07"}]
    audit = workplace.finish(submit(verify={"rankings": rankings}))
    assert (audit.error_code, audit.error_field) == (
        "unknown_layers",
        "verify.rankings.1.layers",
    )
    assert audit.timings.keys() == {"prepare", "fine_tune"}
