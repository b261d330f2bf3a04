"""What an audit says of its own numbers: tried before the work, measured, and true.

Shapes: M modules, T training samples, V validation samples, d entries of a module.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.audits.models import Audit
from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import TRAIN, VALIDATION, assert_near, module_names, read_influence, sets
from tests.pipeline.workplace import Workplace
from workers.influence import batching
from workers.influence.projection import ModuleProjection, Projection
from workers.pipeline import checkup, samples


def reweighted(
    folder: Path, target: Path, *, name: str, value: float, suffix: str = "model.safetensors"
) -> Path:
    """Copy a model or an adapter with all weights of that name set to a value."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(target / suffix)
    assert any(name in key for key in weights)
    changed = {
        key: torch.full_like(weight, value) if name in key else weight
        for key, weight in weights.items()
    }
    save_file(changed, target / suffix, metadata={"format": "pt"})
    return target


def test_a_good_model_shows_its_preflight(workplace: Workplace, models: Models) -> None:
    audit = workplace.succeed(workplace.submit(models.classifier, **workplace.reviews()))
    for report in (audit.provenance["preflight"], audit.summary["preflight"]):
        assert 0 < report["max_gradient_error"] < 1e-5
        assert 0 <= report["max_loss_error"] < 1e-5
        assert set(report["gradient_errors"]) == set(module_names(workplace, audit))
        assert report["zero_modules"] == report["warnings"] == []
        assert report["num_non_finite"] == 0


def without_mask(*arguments: Any, **options: Any) -> dict[str, Tensor]:
    """Collate as ever, but let the model see the padding."""
    inputs = batching.collate(*arguments, **options)
    return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_that_looks_at_padding_is_refused_with_the_numbers(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """In low precision the advice is the precision, which may as well be the reason."""
    monkeypatch.setattr(samples, "collate", without_mask)
    monkeypatch.setitem(checkup.REFUSE_ABOVE, "bfloat16", 0.01)
    audit = workplace.finish(
        workplace.submit(models.classifier, **workplace.reviews(), precision=precision)
    )
    assert (audit.state, audit.error_code) == ("failed", "preflight_failed")
    is_exact = precision == "float32"
    assert audit.error_field == ("model.reference" if is_exact else "precision")
    assert audit.error_message
    assert ("padding" if is_exact else "float32") in audit.error_message
    numbers = [float(text) for text in re.findall(r"\d\.\de[+-]\d+", audit.error_message)]
    assert len(numbers) == 2, "that of the loss and that of the gradient"
    assert max(numbers) > 0.01
    units = workplace.units(audit.id)
    assert max(unit.attempts for unit in units) == 1, "trying again would not help"
    assert {unit.stage for unit in units} == {"prepare", "validation"}


def test_what_may_be_rounding_is_a_warning_with_the_numbers(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "collate", without_mask)
    monkeypatch.setitem(checkup.WARN_ABOVE, "bfloat16", 0.01)
    audit = workplace.succeed(
        workplace.submit(models.classifier, **workplace.reviews(), precision="bfloat16")
    )
    error = audit.summary["preflight"]["max_gradient_error"]
    (warning,) = [text for text in audit.summary["warnings"] if "padded" in text]
    assert f"{error:.1e}" in warning
    assert "precision" in warning
    assert "float32" in warning


def test_modules_without_gradients_are_named_in_a_warning(
    workplace: Workplace, models: Models
) -> None:
    """An adapter that was never trained: B is zero, so A has no gradient."""
    fresh = reweighted(
        models.adapter,
        workplace.files / "fresh",
        name="lora_B",
        value=0.0,
        suffix="adapter_model.safetensors",
    )
    audit = workplace.succeed(
        workplace.submit(models.encoder, adapter=fresh, **sets(workplace), estimators=["datainf"])
    )
    zero = audit.provenance["preflight"]["zero_modules"]
    assert zero == [name for name in module_names(workplace, audit) if "lora_A" in name]
    (warning,) = [text for text in audit.summary["warnings"] if "no gradient" in text]
    assert warning.startswith("4 modules")
    assert zero[0] in warning


@pytest.mark.parametrize("is_fine_tuned", [False, True])
def test_a_model_without_any_gradient_is_refused(
    workplace: Workplace, models: Models, *, is_fine_tuned: bool
) -> None:
    """A head of zeros: the loss is the same whatever the blocks put out."""
    broken = reweighted(models.llama, workplace.files / "broken", name="lm_head", value=0.0)
    place = workplace.with_settings(file_roots=(*workplace.settings.file_roots, workplace.files))
    tables = sets(place, tiny.instructions(20, seed=0), tiny.instructions(6, seed=1))
    extra: dict[str, Any] = {"fine_tune": {"epochs": 1}} if is_fine_tuned else {}
    audit = place.finish(place.submit(broken, task="causal_lm", **tables, **extra))
    assert (audit.state, audit.error_code) == ("failed", "preflight_failed")
    assert audit.error_field == ("fine_tune" if is_fine_tuned else "model.target_modules")
    assert "all modules are zero" in (audit.error_message or "")


def projected_audit(workplace: Workplace, models: Models, dimension: int, **request: Any) -> Audit:
    return workplace.succeed(
        workplace.submit(
            models.classifier,
            **sets(workplace, tiny.reviews(60, seed=0), tiny.reviews(12, seed=1)),
            target_modules=["all-linear"],
            source={"projection": {"dimension": dimension, "seed": 7}},
            **{"ranking": {"estimator": "grad_dot"}} | request,
        )
    )


def test_projected_scores_are_compared_with_exact_ones(
    workplace: Workplace, models: Models
) -> None:
    """Projected and exact dot products of all pairs, both made from the loop's gradients."""
    audit = projected_audit(workplace, models, 8)
    report = audit.provenance["projection"]
    assert report == audit.summary["projection"]
    assert (report["dimension"], report["num_pairs"]) == (8, 60 * 12)
    assert report["spearman"] == report["by_group"]["all"]

    model = loops.classifier(models.classifier)
    train, validation = (
        loops.review_gradients(model, tiny.reviews(number, seed=seed), names=("neg", "pos"))
        for number, seed in ((60, 0), (12, 1))
    )
    names = module_names(workplace, audit)
    projected, exact = {}, {}
    for name in names:
        exact[name] = validation[name].double() @ train[name].double().T
        weight = model.get_parameter(name)
        if weight.numel() <= 8 * 8 or weight.dim() == 1:
            projected[name] = exact[name]
            continue
        project = ModuleProjection(
            Projection(dimension=8, seed=7),
            name=name,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
        )
        v, g = (
            project_rows(project, gradients[name], weight.shape)
            for gradients in (validation, train)
        )
        projected[name] = v @ g.T
    influence_MVT = read_influence(workplace, audit, "grad_dot")
    for name, influence_VT in zip(names, influence_MVT, strict=True):
        assert_near(influence_VT, projected[name])

    assert set(report["by_group"]) == {"all", "00", "01", "CL"}
    for group, members in audit.summary["layer_groups"].items():
        totals = [
            torch.stack([dots[name] for name in members]).sum(dim=0) for dots in (projected, exact)
        ]
        expected = loops.spearman(*totals)
        assert report["by_group"][group] == pytest.approx(expected, abs=1e-3), group
    assert 0.5 < report["by_group"]["00"] < 0.99
    assert report["by_group"]["CL"] == 1.0, "the head is small, and exact"


def project_rows(project: ModuleProjection, gradient_Nd: Tensor, shape: torch.Size) -> Tensor:
    """Project written-out gradients: their rows are output gradients of inputs e_1, e_2, …"""
    gradient_NOI = gradient_Nd.view(-1, *shape)
    unit_NII = torch.eye(shape[1]).expand(len(gradient_Nd), -1, -1)
    return project.project(unit_NII, gradient_NOI.mT).double()


def test_the_larger_the_dimension_the_truer_the_scores(
    workplace: Workplace, models: Models
) -> None:
    """Matrices of 16 by 16 are exact at 16; at 32 nothing is left to project, and to report."""
    small, large, whole = (projected_audit(workplace, models, number) for number in (2, 16, 32))
    low, high = (audit.provenance["projection"]["spearman"] for audit in (small, large))
    assert low < 0.95
    assert low < high <= 1.0
    assert whole.provenance["projection"] is whole.summary["projection"] is None
    exact = workplace.succeed(
        workplace.submit(
            models.classifier,
            **sets(workplace, tiny.reviews(60, seed=0), tiny.reviews(12, seed=1)),
            target_modules=["all-linear"],
            ranking={"estimator": "grad_dot"},
        )
    )
    assert torch.equal(
        read_influence(workplace, whole, "grad_dot"), read_influence(workplace, exact, "grad_dot")
    )


@pytest.mark.parametrize("estimator", ["gauss_newton", "ekfac", "outlier_gradient", "grad_cosine"])
def test_every_kind_of_estimator_takes_projected_gradients(
    workplace: Workplace, models: Models, estimator: str
) -> None:
    audit = projected_audit(workplace, models, 4, ranking={"estimator": estimator})
    assert audit.summary["projection"]["dimension"] == 4
    assert read_influence(workplace, audit, estimator).any()


@pytest.mark.parametrize("is_fine_tuned_in_full", [False, True])
def test_cancellation_is_that_of_the_loops_gradients(
    workplace: Workplace, models: Models, *, is_fine_tuned_in_full: bool
) -> None:
    """Of every group, every block, every module and the ranking's layers; both forms."""
    tables = {"train": TRAIN, "validation": VALIDATION}
    request: dict[str, Any] = {"adapter": models.adapter}
    base, groups = models.encoder, {"all", "00", "01", "CL", "01,CL"}
    if is_fine_tuned_in_full:
        base, groups = models.classifier, groups | {"WE"}
        tables = {"train": tiny.reviews(26, seed=0), "validation": tiny.reviews(7, seed=1)}
        request = {
            "target_modules": ["query", "output.dense", "LayerNorm"],
            "source": {"word_embeddings": True},
        }
    audit = workplace.succeed(
        workplace.submit(
            base,
            **sets(workplace, **tables),
            **request,
            ranking={"layers": "01,CL", "estimator": "grad_dot"},
        )
    )
    assert audit.provenance["num_shards"] > 1
    model = loops.classifier(base, request.get("adapter"))
    labels = ("neg", "pos") if is_fine_tuned_in_full else (0, 1)
    gradients = loops.review_gradients(model, tables["train"], labels)
    measured, members = audit.summary["cancellation"], audit.summary["layer_groups"]
    assert set(measured) == set(members) == groups
    for group, names in members.items():
        check_cancellation(measured[group], [gradients[name] for name in names])
    by_module = audit.summary["module_cancellation"]
    assert set(by_module) == set(module_names(workplace, audit))
    for name, single in by_module.items():
        check_cancellation(single, [gradients[name]])


def check_cancellation(measured: dict[str, float], gradients: list[Tensor]) -> None:
    """Σ_i ‖g_i‖ / ‖Σ_i g_i‖ of the modules' gradients side by side, sample by sample."""
    gradient_Td = torch.cat(gradients, dim=1).double()
    total_d = torch.zeros(gradient_Td.shape[1], dtype=torch.float64)
    for gradient_d in gradient_Td:
        total_d += gradient_d
    l1 = sum(float(g.abs().sum()) for g in gradient_Td) / float(total_d.abs().sum())
    l2 = sum(float(g.norm()) for g in gradient_Td) / float(total_d.norm())
    assert measured["l1"] == pytest.approx(l1, rel=1e-4)
    assert measured["l2"] == pytest.approx(l2, rel=1e-4)
    assert l1 >= 1
    assert l2 >= 1
