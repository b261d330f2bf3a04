"""How likely a sample is wrong, and which class it should have: against loops in plain Python.

Shapes: T training samples, V validation samples, N known samples, C classes.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.pipeline import sample_files
from tests.pipeline.score_files import LAYOUT
from workers.influence.quantification import NoiseShare, estimate_noise_share
from workers.pipeline.artifacts import Artifacts, write_tensors
from workers.pipeline.confidence import OutOfSample
from workers.pipeline.context import StageContext
from workers.pipeline.findings import Findings
from workers.pipeline.judging import (
    Judgement,
    along_ranking,
    flagged_number,
    judge,
    posterior,
    suggest,
)
from workers.pipeline.layout import ModelLayout
from workers.pipeline.samples import NO_CLASS
from workers.pipeline.training_facts import TrainingFacts

CONFIDENCES = st.lists(st.integers(0, 8), min_size=1, max_size=7)


def falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises, by its min-max formula over all means of runs."""

    def mean(start: int, stop: int) -> float:
        total = sum(weights[start:stop])
        return sum(map(math.prod, zip(values[start:stop], weights[start:stop], strict=True))) / (
            total
        )

    places = range(len(values))
    return [
        min(max(mean(a, b + 1) for b in places if b >= i) for a in places if a <= i) for i in places
    ]


def slow_posterior(right: list[int], wrong: list[int], share: float) -> dict[float, float]:
    """The probability of being wrong at each known confidence; equal ones count as one."""
    known = sorted({*right, *wrong})
    weights = [
        [right.count(value) * (1 - share) / len(right), wrong.count(value) * share / len(wrong)]
        for value in known
    ]
    totals = [sum(parts) for parts in weights]
    shares = [parts[1] / sum(parts) for parts in weights]
    return dict(zip(known, falling(shares, totals), strict=True))


@given(CONFIDENCES, CONFIDENCES, st.floats(0.01, 0.99))
def test_the_posterior_is_the_falling_curve_nearest_to_the_known_samples(
    right: list[int], wrong: list[int], share: float
) -> None:
    expected = slow_posterior(right, wrong, share)
    known = [torch.tensor(values) / 8 for values in (right, wrong)]
    # between two known confidences as well, and beyond them
    asked_T = torch.arange(-2, 21) / 16
    found = posterior(asked_T, *known, share=share).tolist()
    assert all(one >= other - 1e-7 for one, other in itertools.pairwise(found))
    assert 0 <= min(found) <= max(found) <= 1
    for place, value in zip((16 * asked_T).tolist(), found, strict=True):
        below = max((at for at in expected if 2 * at <= place), default=min(expected))
        above = min((at for at in expected if 2 * at >= place), default=max(expected))
        part = (place / 2 - below) / (above - below) if below < above else 0.0
        between = expected[below] + part * (expected[above] - expected[below])
        assert value == pytest.approx(between, abs=1e-5)


@given(CONFIDENCES, CONFIDENCES, st.floats(0, 1))
def test_the_posterior_averages_to_the_share_over_the_known_samples(
    right: list[int], wrong: list[int], share: float
) -> None:
    right_M, wrong_W = torch.tensor(right) / 8, torch.tensor(wrong) / 8
    means = [
        float(posterior(known_N, right_M, wrong_W, share=share).double().mean())
        for known_N in (right_M, wrong_W)
    ]
    assert (1 - share) * means[0] + share * means[1] == pytest.approx(share, abs=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 4)), min_size=1, max_size=9))
def test_probabilities_fall_along_the_ranking_and_keep_their_mean(
    samples: list[tuple[float, int]],
) -> None:
    """The lowest scores are the most suspect; ties stand by training index."""
    probability_T = torch.tensor([probability for probability, _ in samples])
    score_T = torch.tensor([score for _, score in samples], dtype=torch.float32)
    found_T = along_ranking(probability_T, score_T)
    order = sorted(range(len(samples)), key=lambda i: (samples[i][1], i))
    expected = falling([samples[i][0] for i in order], [1.0] * len(order))
    assert [float(found_T[i]) for i in order] == pytest.approx(expected, abs=1e-5)
    assert float(found_T.double().mean()) == pytest.approx(
        float(probability_T.double().mean()), abs=1e-6
    )
    assert found_T.dtype == torch.float32


@st.composite
def asked_for_classes(
    draw: st.DrawFn,
) -> tuple[list[list[float]], list[int], list[float]]:
    num_classes = draw(st.integers(2, 4))
    weights = st.lists(st.integers(0, 5), min_size=num_classes, max_size=num_classes)
    rows = draw(st.lists(weights, min_size=1, max_size=5))
    labels = [draw(st.integers(0, num_classes - 1)) for _ in rows]
    wrong = [draw(st.integers(0, 16)) / 16 for _ in rows]
    return [[value / (sum(row) or 1) for value in row] for row in rows], labels, wrong


def slow_classes(row: list[float], label: int, wrong: float) -> list[float]:
    """The probability of each class: the given one's is known, the others share the rest."""
    others = sum(value for index, value in enumerate(row) if index != label)
    return [
        1 - wrong
        if index == label
        else wrong * (value / others if others > 0 else 1 / (len(row) - 1))
        for index, value in enumerate(row)
    ]


@given(asked_for_classes())
def test_the_most_probable_class_is_suggested(
    asked: tuple[list[list[float]], list[int], list[float]],
) -> None:
    rows, labels, wrongs = asked
    suggested_T, probability_T = suggest(
        torch.tensor(rows), torch.tensor(labels), torch.tensor(wrongs)
    )
    for row, label, wrong, suggested, probability in zip(
        rows, labels, wrongs, suggested_T.tolist(), probability_T.tolist(), strict=True
    ):
        expected = slow_classes(row, label, wrong)
        assert sum(expected) == pytest.approx(1)
        assert probability == pytest.approx(max(expected), abs=1e-6)
        assert expected[suggested] == pytest.approx(max(expected), abs=1e-6)
        if wrong < 0.5:
            assert suggested == label, "more likely right than wrong"


def test_a_single_class_has_nothing_to_suggest_but_itself() -> None:
    suggested_T, probability_T = suggest(torch.ones(2, 1), torch.zeros(2).long(), torch.zeros(2))
    assert suggested_T.tolist() == [0, 0]
    assert probability_T.tolist() == [1.0, 1.0]


def write_facts(
    artifacts: Artifacts, given_probability_N: Tensor, *, broken: Sequence[int] = ()
) -> TrainingFacts:
    num_samples = len(given_probability_N)
    is_finite_N = torch.ones(num_samples, dtype=torch.bool)
    is_finite_N[list(broken)] = False
    tensors = {
        "index": torch.arange(num_samples),
        "loss": -given_probability_N.log(),
        "predicted": torch.zeros(num_samples, dtype=torch.int32),
        "predicted_probability": torch.ones(num_samples),
        "given_probability": given_probability_N,
        "squared_norm": torch.ones(6, num_samples),
        "is_finite": is_finite_N,
    }
    write_tensors(artifacts.facts(0), tensors)
    return TrainingFacts(artifacts, 1)


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
    right, wrong = [], []
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
