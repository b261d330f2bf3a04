"""How much of a training set is wrong, and which samples: by samples that are known to be.

Shapes: T training samples, V validation samples, C classes.
"""

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.pipeline import sample_files
from tests.pipeline.sample_files import write_facts
from tests.pipeline.score_files import LAYOUT
from tests.pipeline.test_posterior import slow_classes
from workers.influence.quantification import NoiseShare, estimate_noise_share
from workers.pipeline.artifacts import write_tensors
from workers.pipeline.confidence import OutOfSample
from workers.pipeline.context import StageContext
from workers.pipeline.findings import Findings
from workers.pipeline.judging import Judgement, flagged_number, judge, posterior
from workers.pipeline.layout import ModelLayout
from workers.pipeline.samples import NO_CLASS


def class_findings(
    folder: Path, *, share: float, num_train: int = 300, has_validation: bool = True
) -> tuple[StageContext, Findings, Tensor]:
    """Make up what a good model says of samples, a share of whose classes are wrong."""
    context = sample_files.context_of(folder)
    draw = torch.Generator().manual_seed(0)

    def answers(true_N: Tensor) -> Tensor:
        logit_NC = torch.randn(len(true_N), 3, generator=draw)
        logit_NC[torch.arange(len(true_N)), true_N] += 3
        return logit_NC.softmax(dim=1)

    true_T, true_V = (torch.randint(3, (count,), generator=draw) for count in (num_train, 600))
    is_wrong_T = torch.rand(num_train, generator=draw) < share
    label_T = torch.where(is_wrong_T, (true_T + 1) % 3, true_T)
    artifacts = context.artifacts
    train_TC = answers(true_T)
    given_T = train_TC.gather(1, label_T[:, None])[:, 0]
    is_finite_V = torch.arange(600) % 10 != 4
    findings = Findings(
        train=sample_files.classes(artifacts.train, label_T.tolist()),
        validation=sample_files.classes(artifacts.validation, true_V.tolist())
        if has_validation
        else None,
        facts=write_facts(artifacts, given_T),
        validation_facts={"is_finite": is_finite_V} if has_validation else {},
        layout=ModelLayout.of(LAYOUT),
        labels=["a", "b", "c"],
        out_of_sample=OutOfSample(train_TC, answers(true_V)),
    )
    return context, findings, is_wrong_T


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_classes_are_judged_by_the_validation_set_with_right_and_with_wrong_classes(
    tmp_path: Path, share: float
) -> None:
    context, findings, is_wrong_T = class_findings(tmp_path, share=share)
    found = findings.out_of_sample
    assert found is not None
    assert findings.validation is not None
    right: list[float] = []
    wrong: list[float] = []
    for sample, row in enumerate(found.validation_VC.tolist()):
        if findings.validation_facts["is_finite"][sample]:
            for label, value in enumerate(row):
                (right if label == findings.validation.label_T[sample] else wrong).append(value)
    confidence_T = findings.facts.given_probability_T
    judgement = judge(context, findings, confidence_T)
    assert judgement is not None
    expected = estimate_noise_share(
        confidence_T, torch.tensor(right), torch.tensor(wrong), seed=context.request.seed
    )
    assert judgement.share == expected
    assert judgement.share.share == pytest.approx(float(is_wrong_T.float().mean()), abs=0.06)
    own_T = posterior(
        confidence_T, torch.tensor(right), torch.tensor(wrong), share=judgement.share.share
    )
    torch.testing.assert_close(judgement.probability_T, own_T, rtol=0, atol=1e-6)
    assert float(judgement.probability_T.mean()) == pytest.approx(judgement.share.share, abs=0.03)
    label_T = findings.train.label_T
    for sample in range(len(label_T)):
        probability = float(judgement.probability_T[sample])
        row = slow_classes(found.train_TC[sample].tolist(), int(label_T[sample]), probability)
        assert float(judgement.suggested_probability_T[sample]) == pytest.approx(max(row), abs=1e-5)
        assert row[int(judgement.suggested_T[sample])] == pytest.approx(max(row), abs=1e-5)
    told = judgement.described()
    assert told["low"] <= told["share"] <= told["high"]
    assert told["confidence"] == 0.9


def test_the_ranking_decides_who_is_likely_wrong_and_not_how_many(tmp_path: Path) -> None:
    context, findings, _ = class_findings(tmp_path, share=0.3)
    score_T = torch.arange(300).float()
    judgement = judge(context, findings, score_T)
    best = judge(context, findings, findings.facts.given_probability_T)
    assert judgement is not None
    assert best is not None
    assert judgement.share == best.share
    assert bool((judgement.probability_T.diff() <= 1e-7).all())
    means = [float(each.probability_T.double().mean()) for each in (judgement, best)]
    assert means[0] == pytest.approx(means[1], abs=1e-6)


def test_without_known_samples_nothing_is_judged(tmp_path: Path) -> None:
    context, findings, _ = class_findings(tmp_path, share=0.3, has_validation=False)
    assert judge(context, findings, torch.zeros(300)) is None
    number, (warning,) = flagged_number(None, 300)
    assert number == 0
    assert "set flag.fraction or flag.count" in warning


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.125, 1), (0.1666, 2), (1.0, 10)])
def test_as_many_are_flagged_as_seem_wrong(share: float, number: int) -> None:
    judgement = Judgement(NoiseShare(share, share, share), *[torch.zeros(10)] * 3)
    assert flagged_number(judgement, 10) == (number, [])


class TestLanguageModels:
    """Right are the validation samples, wrong are the planted probes."""

    def findings(
        self, folder: Path, *, num_probe_shards: int = 1, probe_probability: float = 0.1
    ) -> tuple[StageContext, Findings]:
        provenance = {"num_probe_shards": num_probe_shards, "max_tokens": 64}
        context = sample_files.context_of(
            folder, provenance=provenance, task="causal_lm", flag="auto"
        )
        artifacts = context.artifacts
        pairs = [([1, number + 5], [number % 7 + 5, 2]) for number in range(20)]
        # sixteen samples are right, four are wrong, one of which the model has half learned
        given_T = torch.tensor([0.9] * 16 + [0.1, 0.1, 0.1, 0.5])
        index_P = torch.tensor([1, 4, 9])
        write_tensors(artifacts.drawn_probes, {"index": index_P, "target": index_P + 1})
        if num_probe_shards:
            write_facts(artifacts.probes, torch.tensor([1, 1, 7]) * probe_probability, broken=[2])
        findings = Findings(
            train=sample_files.completions(artifacts.train, pairs),
            validation=sample_files.completions(artifacts.validation, pairs[:5]),
            facts=write_facts(artifacts, given_T),
            validation_facts={
                "is_finite": torch.tensor([1, 1, 1, 1, 0]),
                "given_probability": torch.tensor([0.8, 0.9, 0.9, 1.0, 0.0]),
            },
            layout=ModelLayout.of(LAYOUT),
            labels=[],
            out_of_sample=None,
        )
        return context, findings

    def test_completions_are_judged_by_the_probes(self, tmp_path: Path) -> None:
        """What is not finite, of the probes as of the validation set, does not count."""
        context, findings = self.findings(tmp_path)
        judgement = judge(context, findings, findings.facts.given_probability_T)
        assert judgement is not None
        mean = statistics.fmean([0.9] * 16 + [0.1, 0.1, 0.1, 0.5])
        assert judgement.share.share == pytest.approx((0.9 - mean) / (0.9 - 0.1))
        # where only wrong ones are, only right ones are, and halfway to the lowest right one
        expected = [0.0] * 16 + [1.0, 1.0, 1.0, (0.8 - 0.5) / 0.7]
        assert judgement.probability_T.tolist() == pytest.approx(expected, abs=1e-5)
        assert judgement.suggested_T.tolist() == [NO_CLASS] * 20
        assert bool(judgement.suggested_probability_T.isnan().all())

    def test_without_probes_nothing_is_judged(self, tmp_path: Path) -> None:
        context, findings = self.findings(tmp_path, num_probe_shards=0)
        assert judge(context, findings, torch.zeros(20)) is None

    def test_probes_that_the_model_finds_likely_tell_nothing(self, tmp_path: Path) -> None:
        context, findings = self.findings(tmp_path, probe_probability=0.95)
        assert judge(context, findings, torch.zeros(20)) is None
