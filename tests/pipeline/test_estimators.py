"""The influence files of whole audits equal the slow oracles, for every estimator with pairs.

Expected numbers come from the user's tables and models alone: one unpadded sample at a time,
backward through PEFT's own forward pass, then loops over pairs.

Shapes: M modules, T training samples, V validation samples, C classes, d entries of a module.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

from app.audits.models import Audit
from tests.influence import estimator_oracles as slow
from tests.oracles import engine_name
from tests.pipeline import loops
from tests.pipeline.conftest import Models
from tests.pipeline.loops import (
    DOTS,
    TRAIN,
    VALIDATION,
    WORD_EMBEDDING,
    Oracle,
    assert_mean_scores,
    assert_near,
    audit_of,
    module_names,
    read_influence,
)
from tests.pipeline.workplace import Workplace
from workers.pipeline.artifacts import read_json

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def both(models: Models) -> tuple[Gradients, Gradients]:
    """Gradients of the training and of the validation samples at the adapter."""
    model = loops.classifier(models.encoder, models.adapter)
    return loops.review_gradients(model, TRAIN), loops.review_gradients(model, VALIDATION)


def assert_modules_equal(
    workplace: Workplace,
    audit: Audit,
    estimator: str,
    both: tuple[Gradients, Gradients],
    *,
    oracle: Oracle | None = None,
    share: float,
) -> None:
    oracle = oracle or (DOTS | CURVATURES)[estimator]
    train, validation = both
    assert_rows_equal(
        module_names(workplace, audit),
        read_influence(workplace, audit, estimator),
        lambda name: oracle(validation[name], train[name]),
        share=share,
    )


def assert_rows_equal(
    names: list[str],
    influence_MVT: Tensor,
    expected: Callable[[str], Tensor],
    *,
    share: float = 1e-5,
) -> None:
    """Each module's influence; of the word embeddings, which come last, there may be one more."""
    dense = [name for name in names if name != WORD_EMBEDDING]
    assert len(dense) == 4 * 2 + 2, "A and B of query and value in two blocks, the head"
    for name, influence_VT in zip(dense, influence_MVT, strict=False):
        assert_near(influence_VT, expected(name), share=share)


def lissa_of(**options: Any) -> Oracle:
    """LiSSA with the smallest scale that is large enough, and the margin that the engine takes."""

    def oracle(validation_Vd: Tensor, train_Td: Tensor) -> Tensor:
        eigenvalue_d = torch.linalg.eigvalsh(slow.fisher(train_Td))
        scale = min(1.05 * float(eigenvalue_d[-1]), float(eigenvalue_d.sum()))
        scale += slow.damping_of(train_Td, options.get("damping", 0.1))
        return slow.lissa(validation_Vd, train_Td, scale=scale, steps=10, **options)

    return oracle


CURVATURES: dict[str, Oracle] = {
    "datainf": slow.datainf,
    "gauss_newton": slow.gauss_newton,
    "lissa": lissa_of(),
}
SHARE = dict.fromkeys(DOTS, 1e-5) | dict.fromkeys(CURVATURES, 1e-4)


@pytest.mark.parametrize("estimator", SHARE)
def test_influence_of_gradients(
    workplace: Workplace, models: Models, both: tuple[Gradients, Gradients], estimator: str
) -> None:
    """Over several shards and batches."""
    audit = audit_of(workplace, models, estimator)
    assert audit.provenance["num_shards"] > 1
    assert_modules_equal(workplace, audit, estimator, both, share=SHARE[estimator])


def test_all_estimators_of_one_audit(
    workplace: Workplace, models: Models, both: tuple[Gradients, Gradients]
) -> None:
    """None is in another's way, though some ask for other passes or for more in the same one."""
    others = ["ekfac", "outlier_gradient", "repsim", "tracin_we", "self_influence", "oracle"]
    audit = audit_of(
        workplace,
        models,
        "lissa",
        *SHARE,
        *others,
        plant_noise={"fraction": 1e-9},
        source={"word_embeddings": True},
    )
    assert {c["estimator"] for c in audit.summary["configurations"]} >= {*SHARE, *others}
    for estimator, share in SHARE.items():
        assert_modules_equal(workplace, audit, estimator, both, share=share)


@pytest.mark.parametrize(
    ("estimator", "parameters", "oracle"),
    [
        ("datainf", {"damping": 2}, lambda v, g: slow.datainf(v, g, damping=2)),
        ("gauss_newton", {"damping": 2}, lambda v, g: slow.gauss_newton(v, g, damping=2)),
        ("lissa", {"damping": 2}, lissa_of(damping=2)),
        ("lissa", {"steps": 10_000}, slow.gauss_newton),
    ],
    ids=["datainf", "gauss_newton", "lissa", "lissa that has converged"],
)
def test_parameters_of_the_request_arrive(
    workplace: Workplace,
    models: Models,
    both: tuple[Gradients, Gradients],
    *,
    estimator: str,
    parameters: dict[str, float],
    oracle: Oracle,
) -> None:
    audit = audit_of(workplace, models, estimator, estimator_parameters={estimator: parameters})
    assert_modules_equal(workplace, audit, estimator, both, oracle=oracle, share=1e-4)


def kronecker_factors(model: nn.Module, table: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum g gᵀ and x xᵀ token by token, as hooks on PEFT's own layers see them, by module."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            x_SI = arguments[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                for x, g in zip(x_SI, gradient.flatten(0, -2), strict=True):
                    output_OO, input_II = factors.get(name, (torch.zeros(()), torch.zeros(())))
                    factors[name] = output_OO + torch.outer(g, g), input_II + torch.outer(x, x)

            output.register_hook(add)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(".default"):
            module.register_forward_hook(hook_for(engine_name(f"{name}.weight")))
    loops.review_gradients(model, table)
    return factors


@pytest.mark.parametrize("damping", [0.1, 3])
def test_ekfac_with_its_kronecker_products_written_out(
    workplace: Workplace, models: Models, both: tuple[Gradients, Gradients], damping: float
) -> None:
    """The bias of the head has no factors: the diagonal of its curvature stands."""
    audit = audit_of(
        workplace, models, "ekfac", estimator_parameters={"ekfac": {"damping": damping}}
    )
    factors = kronecker_factors(loops.classifier(models.encoder, models.adapter), TRAIN)
    train, validation = both
    assert set(train) - set(factors) == {"classifier.bias"}
    assert_rows_equal(
        module_names(workplace, audit),
        read_influence(workplace, audit, "ekfac"),
        lambda name: slow.ekfac(
            validation[name], train[name], factors=factors.get(name), damping=damping
        ),
        share=1e-4,
    )


def summed_over_states(
    models: Models, adapters: list[Path], learning_rates: list[float]
) -> Callable[[str], Tensor]:
    """Return Σ_c η_c v^c · g^c by module."""
    states = [loops.classifier(models.encoder, adapter) for adapter in adapters]
    parts = [
        (rate, loops.review_gradients(model, TRAIN), loops.review_gradients(model, VALIDATION))
        for rate, model in zip(learning_rates, states, strict=True)
    ]

    def expected(name: str) -> Tensor:
        return torch.stack(
            [
                rate * slow.pairs(validation[name], train[name], lambda v, g: float(v @ g))
                for rate, train, validation in parts
            ]
        ).sum(dim=0)

    return expected


def test_tracin_over_the_epochs_of_the_fine_tuning(workplace: Workplace, models: Models) -> None:
    """Each epoch's adapter weighs with the mean rate of its steps: warmed up, then to zero."""
    audit = audit_of(
        workplace,
        models,
        "tracin",
        adapter=None,
        fine_tune={
            "epochs": 3,
            "learning_rate": 2e-2,
            "batch_size": 8,
            "warmup_fraction": 0.25,
        },
    )
    artifacts = workplace.artifacts(audit.id)
    rates: Any = read_json(artifacts.epochs)["learning_rates"]
    shares = [step / 3 for step in range(3)] + [(12 - step) / 9 for step in range(3, 12)]
    assert rates == pytest.approx(
        [2e-2 * sum(shares[first : first + 4]) / 4 for first in (0, 4, 8)]
    )
    expected = summed_over_states(models, [artifacts.epoch_adapter(n) for n in range(3)], rates)
    influence_MVT = read_influence(workplace, audit, "tracin", num_checkpoints=3)
    assert_rows_equal(module_names(workplace, audit), influence_MVT, expected)
    assert_mean_scores(workplace, audit, influence_MVT)


def test_tracin_over_adapters_that_the_user_kept(workplace: Workplace, models: Models) -> None:
    folders = [models.adapter]
    for state in (1, 2):
        folder = shutil.copytree(models.adapter, workplace.files / f"state{state}")
        weights = load_file(folder / "adapter_model.safetensors")
        draw = torch.Generator().manual_seed(state)
        moved = {
            name: w + 0.2 * torch.randn(w.shape, generator=draw) for name, w in weights.items()
        }
        save_file(moved, folder / "adapter_model.safetensors")
        folders.insert(0, folder)
    rates = [0.5, 0.25, 0.125]
    audit = audit_of(
        workplace,
        models,
        "tracin",
        "grad_dot",
        source={
            "checkpoints": [
                {"adapter": f"file://{folder}", "learning_rate": rate}
                for folder, rate in zip(folders, rates, strict=True)
            ]
        },
    )
    assert len(audit.provenance["checkpoint_revisions"]) == 3
    influence_MVT = read_influence(workplace, audit, "tracin", num_checkpoints=3)
    expected = summed_over_states(models, folders, rates)
    assert_rows_equal(module_names(workplace, audit), influence_MVT, expected)
    # the last state is the audited one, whose dot products are not weighted
    assert_rows_equal(
        module_names(workplace, audit),
        read_influence(workplace, audit, "grad_dot"),
        summed_over_states(models, folders[-1:], [1.0]),
    )


@pytest.mark.parametrize("nu", [0.5, 0.2])
def test_outlier_gradient_is_scikit_learns_machine_on_each_class(
    workplace: Workplace, models: Models, both: tuple[Gradients, Gradients], nu: float
) -> None:
    audit = audit_of(
        workplace,
        models,
        "outlier_gradient",
        estimator_parameters={"outlier_gradient": {"nu": nu}},
    )
    train, validation = both
    label_V = np.array(loops.review_labels(VALIDATION))
    assert set(label_V) == {0, 1}
    influence_MCT = read_influence(workplace, audit, "outlier_gradient")
    for name, influence_CT in zip(module_names(workplace, audit), influence_MCT, strict=True):
        for label, influence_T in enumerate(influence_CT):
            members = validation[name].double().numpy()[label_V == label]
            gamma = 1 / np.square(members).sum(axis=1).mean()
            machine = OneClassSVM(gamma=gamma, nu=nu, tol=1e-6).fit(members)
            expected_T = machine.decision_function(train[name].double().numpy())
            np.testing.assert_allclose(influence_T.numpy(), expected_T, rtol=0, atol=1e-4)
    assert audit.summary["group_order"] == ["all", "00", "01", "CL"]
