"""Sketches of gradients against the gradients themselves.

Shapes: N samples, S tokens, d entries, K buckets, I/O input and output features.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.influence.extraction import run
from tests.influence.tiny_models import samples_for, tiny_adapted, tiny_model
from tests.oracles import loop_gradients
from workers.influence import sketch as module
from workers.influence.gradients import GradientExtractor
from workers.influence.layers import Form, ModuleSpec, Part
from workers.influence.rows import DenseRows, FactoredRows, GradientRows
from workers.influence.sketch import NUM_BUCKETS, GradientSketch

INPUTS, OUTPUTS = 40, 30


def spec(*shape: int, name: str = "layer.0.weight", form: Form = "dense") -> ModuleSpec:
    return ModuleSpec(name, 0, Part.ATTENTION, math.prod(shape), shape, form)


def sketched(specs: Sequence[ModuleSpec], rows: Sequence[GradientRows]) -> Tensor:
    return GradientSketch(specs, device="cpu").sketch(rows)


def factored(num_samples: int, *, seed: int = 0) -> FactoredRows:
    generator = torch.Generator().manual_seed(seed)
    x_NSI = torch.randn(num_samples, 5, INPUTS, generator=generator)
    g_NSO = torch.randn(num_samples, 5, OUTPUTS, generator=generator)
    g_NSO[:, 3:] = 0  # padding
    return FactoredRows(x_NSI, g_NSO)


def cosines(gradient_Nd: Tensor) -> Tensor:
    unit_Nd = normalize(gradient_Nd.double())
    return (unit_Nd @ unit_Nd.T).float()


@pytest.mark.parametrize("size", [1, 7, NUM_BUCKETS, 2500, 10 * NUM_BUCKETS])
def test_every_entry_falls_into_one_bucket_and_buckets_fill_evenly(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(module, "_SEGMENT", 1024)
    thrown_dK = module._CountSketch(size, name="layer.0.weight", device="cpu")(torch.eye(size))
    assert bool((thrown_dK.abs().sum(dim=1) == 1).all())
    filled_K = thrown_dK.abs().sum(dim=0)
    assert float(filled_K.max()) == -(-size // NUM_BUCKETS)
    if size % NUM_BUCKETS == 0:
        assert float(filled_K.min()) == size // NUM_BUCKETS


def test_the_sketch_of_factors_throws_the_entries_of_their_product() -> None:
    """Entry (o, i) falls into the sum of both sides' buckets, with the product of their signs."""
    sketch = GradientSketch([spec(OUTPUTS, INPUTS, form="factored")], device="cpu")
    ((inputs, outputs),) = sketch._sides
    thrown_IK, thrown_OK = inputs(torch.eye(INPUTS)), outputs(torch.eye(OUTPUTS))
    rows = factored(3)
    expected_NK = torch.zeros(3, NUM_BUCKETS)
    gradient_NOI = rows.dense().view(3, OUTPUTS, INPUTS)
    for o in range(OUTPUTS):
        for i in range(INPUTS):
            bucket = (thrown_OK[o].abs().argmax() + thrown_IK[i].abs().argmax()) % NUM_BUCKETS
            sign = thrown_OK[o].sum() * thrown_IK[i].sum()
            expected_NK[:, bucket] += sign * gradient_NOI[:, o, i]
    torch.testing.assert_close(sketch.sketch([rows]), normalize(expected_NK))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_cosines_are_right_on_average(form: Form) -> None:
    """Over many draws their mean is the exact cosine, and they stray by no more than they may."""
    rows = factored(6)
    gradient_Nd = rows.dense()
    # a pair that is alike, one that is opposed, and others that have nothing to do with each other
    mixed_Nd = gradient_Nd[[0, 1, 0, 3, 4, 5]] * torch.tensor([[1.0], [1], [-2], [1], [1], [1]])
    mixed_Nd[1] += 2 * mixed_Nd[0]
    draws = []
    for seed in range(400):
        if form == "dense":
            draw = sketched([spec(OUTPUTS, INPUTS, name=f"{seed}")], [DenseRows(mixed_Nd)])
            expected_NN = cosines(mixed_Nd)
        else:
            draw = sketched([spec(OUTPUTS, INPUTS, name=f"{seed}", form=form)], [rows])
            expected_NN = cosines(gradient_Nd)
        draws.append(draw @ draw.T)
    cosine_DNN = torch.stack(draws)
    deviation_NN = (cosine_DNN - expected_NN).square().mean(dim=0).sqrt()
    assert float(deviation_NN.max()) < (3 / NUM_BUCKETS) ** 0.5
    error_NN = (cosine_DNN.mean(dim=0) - expected_NN).abs()
    # the mean of a ratio of estimates is off by some 1/K
    assert float(error_NN.max()) < 4 * 0.0625 / 400**0.5 + 1 / NUM_BUCKETS
    if form == "dense":
        torch.testing.assert_close(cosine_DNN[:, 0, 2], torch.full((400,), -1.0))


@pytest.mark.parametrize("longest", [None, 4], ids=["dense", "factored"])
def test_cosines_of_a_models_gradients(longest: int | None) -> None:
    """All modules together, whatever form they are held in, and the word embeddings left out."""
    model = tiny_model("classification", "bert")
    token_ids, labels = samples_for("classification", 24)
    token_ids = [ids[:4] for ids in token_ids]
    targets = ["query", "value", "dense", "LayerNorm"]
    loop, _ = loop_gradients(model, token_ids, labels)
    with GradientExtractor(
        model, target_modules=targets, word_embeddings=True, longest=longest
    ) as extractor:
        batch = run(extractor, token_ids, labels)
        names = [item.name for item in extractor.modules if item.form != "sparse"]
        assert {item.form for item in extractor.modules} == {"dense", "sparse"} | (
            {"factored"} if longest else set()
        )
        sketch_NK = GradientSketch(extractor.modules, device=extractor.device).sketch(
            batch.gradients
        )
    exact_NN = cosines(torch.cat([loop[name].flatten(1) for name in names], dim=1))
    error_NN = (sketch_NK @ sketch_NK.T).cpu() - exact_NN
    assert float(error_NN.square().mean().sqrt()) < (1.5 / NUM_BUCKETS) ** 0.5
    assert float(error_NN.abs().max()) < 5 / NUM_BUCKETS**0.5


def test_the_same_text_has_one_direction_whatever_its_label(device: torch.device) -> None:
    """With two classes the gradients under either label are opposite; the batch does not matter."""
    model = tiny_adapted("bert", base=tiny_model("classification", "bert", num_labels=2)).to(device)
    token_ids, _ = samples_for("classification", 3)
    with GradientExtractor(model) as extractor:
        sketch = GradientSketch(extractor.modules, device=device)
        batch = run(extractor, [token_ids[0], token_ids[0], *token_ids], [0, 1, 0, 1, 1])
        sketch_NK = sketch.sketch(batch.gradients)
        alone_NK = sketch.sketch(run(extractor, token_ids[2:], [1]).gradients)
    cosine_NN = sketch_NK @ sketch_NK.T
    torch.testing.assert_close(
        cosine_NN[0, [1, 2]].cpu(), torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(sketch_NK[4], alone_NK[0], atol=1e-5, rtol=0)


def test_sketches_have_length_one_unless_there_is_no_gradient() -> None:
    """However short the gradient is, also where its square is below what float32 can say."""
    gradient_Nd = torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
    scaled_Nd = gradient_Nd * torch.tensor([[1.0], [1e-25], [1e18], [0]])
    sketch_NK = sketched([spec(600)], [DenseRows(scaled_Nd)])
    torch.testing.assert_close(sketch_NK.norm(dim=1), torch.tensor([1.0, 1, 1, 0]))
    whole_NK = sketched([spec(600)], [DenseRows(gradient_Nd)])
    torch.testing.assert_close(sketch_NK[:3], whole_NK[:3])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = DenseRows(torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0)))
    whole_NK = sketched([spec(40_000)], [rows])
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 3 * 1000)
    torch.testing.assert_close(sketched([spec(40_000)], [rows]), whole_NK)


def test_nothing_is_sketched_where_only_words_are_tracked() -> None:
    assert GradientSketch([spec(60, 8, form="sparse")], device="cpu").is_empty
    assert not GradientSketch([spec(60, 8)], device="cpu").is_empty
