"""Kronecker sums over the tokens of a batch."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.influence.extraction import (
    OBJECTIVES,
    run,
)
from tests.influence.tiny_models import (
    Task,
    samples_for,
    tiny_adapted,
    tiny_model,
)
from tests.oracles import engine_name, sample_loss
from workers.influence import contraction
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.influence.layers import ALL_LINEAR, ModuleSpec
from workers.influence.projection import ModuleProjection, Projection


def hooked_sums(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[Any],
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Sum x xᵀ and g gᵀ token by token, as hooks on the layers of a loop over samples see them.

    Of the head of a language model, the tokens that no loss is taken of do not count.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def forward_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            x_SI = arguments[0].detach().flatten(0, -2).double()

            def backward_hook(gradient: Tensor) -> None:
                for x_I, g_O in zip(x_SI, gradient.flatten(0, -2).double(), strict=True):
                    if name != "lm_head.weight" or g_O.any():
                        pairs[name].append((x_I, g_O))

            # PEFT runs a matrix through DoRA's factors that no gradient comes back from
            output.register_hook(backward_hook)

        return hook

    handles = [module.register_forward_hook(forward_hook(name)) for name, module in modules.items()]
    for ids, label in zip(token_ids, labels, strict=True):
        sample_loss(model, ids, label).backward()
    for handle in handles:
        handle.remove()
    return {
        name: (
            sum((torch.outer(x_I, x_I) for x_I, _ in pairs[name]), torch.tensor(0.0)),
            sum((torch.outer(g_O, g_O) for _, g_O in pairs[name]), torch.tensor(0.0)),
            len(pairs[name]),
        )
        for name in modules
    }


def assert_sums_equal(
    extractor: GradientExtractor,
    batch: SampleGradients,
    expected: dict[str, tuple[Tensor, Tensor, int]],
) -> None:
    assert expected
    sums_by_name = {
        spec.name: sums
        for spec, sums in zip(extractor.modules, batch.kronecker, strict=True)
        if sums is not None
    }
    assert sums_by_name.keys() == expected.keys()
    for name, (input_II, output_OO, count) in expected.items():
        sums = sums_by_name[name]
        assert sums.num_tokens == count
        assert sums.input_II.dtype == torch.float64
        assert sums.input_II.device.type == sums.output_OO.device.type == "cpu"
        for actual, exact in ((sums.input_II, input_II), (sums.output_OO, output_OO)):
            assert (actual - exact.cpu()).norm() <= 1e-5 * exact.norm(), name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("task", "family"), [("classification", "bert"), ("causal_lm", "gpt2"), ("causal_lm", "llama")]
)
def test_kronecker_sums_are_what_hooks_on_the_factors_see(
    task: Task, family: str, dora: bool, device: torch.device
) -> None:
    """On PEFT's own lora_A and lora_B, one sample at a time."""
    model = tiny_adapted(family, task=task, use_dora=dora).to(device)
    token_ids, labels = samples_for(task, 4)
    loop = copy.deepcopy(model).double()
    modules = {
        engine_name(f"{name}.weight"): module
        for name, module in loop.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(".default")
    }
    expected = hooked_sums(loop, modules, token_ids, labels)
    extractor = GradientExtractor(model, objective=OBJECTIVES[task], kronecker=True)
    batch = run(extractor, token_ids, labels)
    assert_sums_equal(extractor, batch, expected)


@pytest.mark.parametrize(
    ("task", "family"), [("classification", "bert"), ("causal_lm", "gpt2"), ("causal_lm", "llama")]
)
@pytest.mark.parametrize("projection", [None, Projection(dimension=5, seed=1)])
def test_kronecker_sums_of_whole_layers(
    task: Task, family: str, projection: Projection | None, device: torch.device
) -> None:
    """For Conv1D, whose weight is [I, O], the two sums change places; projected where rows are."""
    model = tiny_model(task, family).to(device)
    token_ids, labels = samples_for(task, 4)
    extractor = GradientExtractor(
        copy.deepcopy(model),
        objective=OBJECTIVES[task],
        target_modules=[ALL_LINEAR, *(["lm_head"] if task == "causal_lm" else [])],
        projection=projection,
        kronecker=True,
    )
    matrices = {spec.name: spec for spec in extractor.modules if len(spec.shape) == 2}
    loop = model.double()
    modules = {name: loop.get_submodule(name.removesuffix(".weight")) for name in matrices}
    sums = hooked_sums(loop, modules, token_ids, labels)
    expected = {}
    for name, (input_II, output_OO, count) in sums.items():
        column_cc, row_rr = input_II, output_OO
        if type(modules[name]).__name__ == "Conv1D":
            column_cc, row_rr = row_rr, column_cc
        expected[name] = (*_projected(matrices[name], projection, column_cc, row_rr), count)
    batch = run(extractor, token_ids, labels)
    assert_sums_equal(extractor, batch, expected)


def _projected(
    spec: ModuleSpec, projection: Projection | None, column_cc: Tensor, row_rr: Tensor
) -> tuple[Tensor, Tensor]:
    if projection is None or spec.form != "projected":
        return column_cc, row_rr
    matrices = ModuleProjection(
        projection,
        name=spec.name,
        in_features=len(column_cc),
        out_features=len(row_rr),
        device=column_cc.device,
    )
    right_cK, left_rK = matrices.project_tokens(
        torch.eye(len(column_cc), device=column_cc.device),
        torch.eye(len(row_rr), device=column_cc.device),
    )
    return (
        right_cK.double().T @ column_cc @ right_cK.double(),
        left_rK.double().T @ row_rr @ left_rK.double(),
    )


@pytest.mark.parametrize("projection", [None, Projection(dimension=40, seed=1)])
def test_a_matrix_with_a_long_side_has_no_sums(
    monkeypatch: pytest.MonkeyPatch, projection: Projection | None, device: torch.device
) -> None:
    """Of 60 words, or 64 features, where at most 40 are allowed; projected to 40 they have some."""
    monkeypatch.setattr(contraction, "MAX_SIDE", 40)
    extractor = GradientExtractor(
        tiny_model("causal_lm", "llama").to(device),
        objective=OBJECTIVES["causal_lm"],
        target_modules=[ALL_LINEAR, "lm_head"],
        projection=projection,
        kronecker=True,
    )
    batch = run(extractor, *samples_for("causal_lm", 4))
    missing = {
        spec.name.split(".")[-2]
        for spec, sums in zip(extractor.modules, batch.kronecker, strict=True)
        if sums is None
    }
    long = {"gate_proj", "up_proj", "down_proj", "lm_head"}
    assert missing == (long if projection is None else set())
    assert any(sums is not None for sums in batch.kronecker)
