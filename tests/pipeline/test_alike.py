"""Which training samples are alike in gradient space, and how likely their classes are.

Shapes: T training samples, W width of the sketches, d entries of all modules, C classes.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.held import Held
from tests.pipeline.loops import TRAIN, VALIDATION, sets
from tests.pipeline.workplace import Workplace
from workers.pipeline import alike
from workers.pipeline.alike import Neighbours, asked_samples, find_alike, highest_positive
from workers.pipeline.evidence import MAX_CLASSES, NUM_PROBABLE, Evidence, Probabilities

NUM_SKETCHES = 70


def sketches() -> Tensor:
    """Sketches in a few directions, some of them twice or opposite, and one of no gradient."""
    generator = torch.Generator().manual_seed(0)
    sketch_TW = torch.randn(NUM_SKETCHES, 8, generator=generator)
    sketch_TW[30:40] = sketch_TW[3]
    sketch_TW[41:44] = -sketch_TW[3]
    sketch_TW[50] = 0
    return normalize(sketch_TW).half()


def loop(sketch_TW: Tensor, index: int) -> tuple[list[int], list[int]]:
    """Compare one sample with every other, one by one."""
    cosines = {}
    for other in range(len(sketch_TW)):
        if other == index:
            continue
        one_W, other_W = sketch_TW[index].double(), sketch_TW[other].double()
        length = float(one_W.norm() * other_W.norm())
        cosine = float(one_W @ other_W) / length if length else 0.0
        cosines[other] = round(cosine * 2**16) / 2**16
    order = sorted(cosines, key=lambda other: (cosines[other], other))
    lowest = [other for other in order if cosines[other] < 0]
    order = sorted(cosines, key=lambda other: (-cosines[other], other))
    highest = [other for other in order if cosines[other] > 0]
    return highest[:5], lowest[:5]


def present(found: Neighbours, place: int) -> list[int]:
    return [index for index in found.index_AK[place].tolist() if index >= 0]


@pytest.mark.parametrize("blocks", [(1024, 1), (7, 9), (1, 23)])
def test_neighbours_are_those_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int]
) -> None:
    """However samples are cut into blocks and shards; copies stand in the order of the file."""
    monkeypatch.setattr(alike, "_ASKED_BLOCK", blocks[0])
    sketch_TW = sketches()
    asked_A = torch.tensor([*range(45), 50, 69])
    found = find_alike(Held(sketch_TW, blocks[1]), asked_A, keep_alive=lambda: None)
    for place, index in enumerate(asked_A.tolist()):
        assert found.place_T[index] == place
        expected = loop(sketch_TW, index)
        assert (present(found.alike, place), present(found.opposed, place)) == expected
    assert set(found.place_T[45:50].tolist()) == {-1}
    assert present(found.alike, int(found.place_T[3])) == [30, 31, 32, 33, 34]
    assert present(found.opposed, int(found.place_T[3]))[:3] == [41, 42, 43]
    assert found.alike.cosine_AK[3].tolist() == [1.0] * 5
    assert found.opposed.cosine_AK[3, :3].tolist() == [-1.0] * 3
    assert present(found.alike, int(found.place_T[50])) == []


@pytest.mark.parametrize("num_values", [1, 5, 6, 40])
def test_the_highest_are_those_of_a_stable_sort(num_values: int) -> None:
    generator = torch.Generator().manual_seed(num_values)
    value_BC = torch.randint(-3, 4, (50, num_values), generator=generator).float()
    place_BK = highest_positive(value_BC, 5)
    expected_BK = value_BC.argsort(dim=1, descending=True, stable=True)[:, :5]
    is_positive_BK = value_BC.gather(1, expected_BK) > 0
    assert torch.equal(place_BK[is_positive_BK], expected_BK[is_positive_BK])


def test_a_single_sample_is_like_no_other() -> None:
    found = find_alike(Held(sketches()[:1]), torch.tensor([0]), keep_alive=lambda: None)
    assert present(found.alike, 0) == present(found.opposed, 0) == []


def test_of_a_large_set_the_most_suspect_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all others; for the rest the answer is that nobody looked."""
    order_T = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert asked_samples(order_T).tolist() == list(range(9))
    monkeypatch.setattr(alike, "MAX_ALL", 8)
    monkeypatch.setattr(alike, "MAX_SUSPECTS", 3)
    asked_A = asked_samples(order_T)
    assert asked_A.tolist() == sorted(order_T[:3].tolist())
    found = find_alike(Held(sketches()[:9]), asked_A, keep_alive=lambda: None)
    columns = Evidence(alike=found).columns(torch.arange(9))
    for name in ("alike_training", "alike_cosine", "opposed_training", "opposed_cosine"):
        is_there = columns[name].is_valid().to_pylist()
        assert is_there == [index in asked_A.tolist() for index in range(9)]


class TestProbabilities:
    def test_all_of_a_few_classes_are_shown(self) -> None:
        model_TC = torch.tensor([[0.25, 0.75], [0.0, 0.0]])
        out_of_sample_TC = torch.tensor([[0.5, 0.5], [0.125, 0.875]])
        columns = Evidence(probabilities=Probabilities.of(model_TC, out_of_sample_TC)).columns(
            torch.arange(2)
        )
        assert columns["shown_classes"].to_pylist() == [None, None]
        # nothing finite is known of the second
        assert columns["class_probabilities"].to_pylist() == [[0.25, 0.75], None]
        assert columns["out_of_sample_probabilities"].to_pylist() == [[0.5, 0.5], None]
        assert columns["alike_training"].to_pylist() == [None, None]

    def test_of_many_classes_the_most_probable_are_shown(self) -> None:
        logits_TC = torch.randn(3, MAX_CLASSES + 1, generator=torch.Generator().manual_seed(0))
        model_TC = logits_TC.softmax(dim=1)
        shown = Probabilities.of(model_TC, model_TC / 2)
        assert shown.class_TP is not None
        assert shown.out_of_sample_TP is not None
        for row, classes in enumerate(shown.class_TP.tolist()):
            expected = sorted(range(MAX_CLASSES + 1), key=lambda c: -float(model_TC[row, c]))
            assert classes == sorted(expected[:NUM_PROBABLE])
            assert torch.equal(shown.model_TP[row], model_TC[row, classes])
            assert torch.equal(shown.out_of_sample_TP[row], model_TC[row, classes] / 2)


def exact_cosines(gradients: dict[str, Tensor]) -> Tensor:
    unit_Td = normalize(torch.cat(list(gradients.values()), dim=1).double())
    return unit_Td @ unit_Td.T


def evidence_of(workplace: Workplace, audit_id: str) -> list[tuple[Any, ...]]:
    return [
        (
            *(row.alike_training, row.alike_cosine, row.opposed_training, row.opposed_cosine),
            *(row.shown_classes, row.class_probabilities, row.out_of_sample_probabilities),
        )
        for row in workplace.training_rows(audit_id)
    ]


def test_an_audit_tells_who_is_alike(workplace: Workplace, models: Models) -> None:
    """By the cosines of the gradients that a loop takes, duplicates with either label first."""
    table = {name: list(values) for name, values in TRAIN.items()}
    # a copy of row 2, and one with the other label
    for label in (table["label"][2], 1 - table["label"][2]):
        table["text"].append(table["text"][2])
        table["label"].append(label)
    copy, opposite = len(table["text"]) - 2, len(table["text"]) - 1
    asked: dict[str, Any] = {
        **sets(workplace, table, VALIDATION),
        "ranking": {"estimator": "grad_dot", "aggregation": "mean"},
    }
    audit = workplace.succeed(workplace.submit(models.encoder, adapter=models.adapter, **asked))
    rows = workplace.training_rows(audit.id)
    assert copy in (rows[2].alike_training or ())
    place = (rows[2].alike_training or []).index(copy)
    assert (rows[2].alike_cosine or [])[place] == 1.0
    place = (rows[2].opposed_training or []).index(opposite)
    assert (rows[2].opposed_cosine or [])[place] == -1.0

    model = loops.classifier(models.encoder, models.adapter)
    exact_TT = exact_cosines(loops.review_gradients(model, table))
    for index, row in enumerate(rows):
        assert row.alike_training is not None
        assert row.alike_cosine is not None
        assert row.opposed_training is not None
        assert row.opposed_cosine is not None
        assert index not in row.alike_training
        assert all(one >= other > 0 for one, other in pairwise(row.alike_cosine))
        assert all(one <= other < 0 for one, other in pairwise(row.opposed_cosine))
        told = torch.tensor([*row.alike_cosine, *row.opposed_cosine])
        exact = exact_TT[index, [*row.alike_training, *row.opposed_training]]
        assert float((told - exact).abs().max()) < 0.25  # four standard deviations
        # nobody who is clearly nearer is missing
        others = exact_TT[index].clone()
        others[[index, *row.alike_training]] = -1
        assert float(others.max()) <= row.alike_cosine[-1] + 0.25

    probability_TC = torch.stack(
        [
            model(torch.tensor([ids])).logits[0].softmax(dim=0).detach()
            for ids in loops.review_ids(table)
        ]
    )
    told_TC = torch.tensor([row.class_probabilities for row in rows])
    torch.testing.assert_close(told_TC.double(), probability_TC, atol=1e-5, rtol=0)
    assert {row.out_of_sample_probabilities for row in rows} == {None}

    whole = workplace.with_settings(samples_per_shard=1000)
    again = whole.succeed(whole.submit(models.encoder, adapter=models.adapter, **asked))
    assert (audit.provenance["num_shards"], again.provenance["num_shards"]) == (2, 1)
    assert evidence_of(workplace, again.id) == evidence_of(workplace, audit.id)


def test_a_simple_model_tells_its_probabilities_where_it_was_asked(
    workplace: Workplace, models: Models
) -> None:
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            **workplace.reviews(num_train=40),
            ranking={"estimator": "confidence", "layers": "all", "aggregation": "mean"},
        )
    )
    rows = workplace.training_rows(audit.id)
    scores = {row.sample_index: row.score for row in workplace.ranked_rows(audit.id)}
    for row in rows:
        assert row.out_of_sample_probabilities is not None
        own = row.out_of_sample_probabilities[["neg", "pos"].index(row.given_label or "")]
        assert own == pytest.approx(scores[row.sample_index], abs=1e-6)
        assert row.class_probabilities is not None
        assert sum(row.class_probabilities) == pytest.approx(1, abs=1e-5)


def test_completions_are_compared_too(workplace: Workplace, models: Models) -> None:
    """They have no classes; a copy of an instruction is most like it."""
    table = tiny.instructions(24, seed=0)
    for name in table:
        table[name].append(table[name][5])
    audit = workplace.succeed(
        workplace.submit(
            models.llama,
            adapter=models.llama_adapter,
            train=workplace.table("train", table),
            validation=workplace.table("validation", tiny.instructions(6, seed=1)),
            task="causal_lm",
            ranking={"estimator": "grad_dot", "aggregation": "mean"},
        )
    )
    rows = workplace.training_rows(audit.id)
    assert 24 in (rows[5].alike_training or ())
    assert {row.class_probabilities for row in rows} == {None}
