"""What kronfluence and dattri-llm compute for a case; only tests import them.

Both take the gradients of the factors from hooks inside the PEFT model, which is not merged.

Shapes: V validation samples, T training samples, B batch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.independent.cases import (
    BATCH_SIZE,
    Batch,
    Case,
    batches,
    collate_samples,
)
from tests.oracles import engine_name

REASON = "is not installed; `make install` installs what requirements-checks.txt lists"


def kronfluence_scores(case: Case, *, strategy: str, output_dir: Path) -> Mapping[str, Tensor]:
    """Let kronfluence score every pair, by layer: float32 [V, T].

    The measurement is the loss of the validation sample, so positive is helpful. The Fisher is the
    empirical one, and no damping factor given: 0.1 of the mean eigenvalue.
    """
    pytest.importorskip("kronfluence", reason=f"kronfluence {REASON}")
    from kronfluence.analyzer import Analyzer, prepare_model  # noqa: PLC0415 - may be missing
    from kronfluence.arguments import FactorArguments, ScoreArguments  # noqa: PLC0415
    from kronfluence.task import Task  # noqa: PLC0415
    from kronfluence.utils.dataset import DataLoaderKwargs  # noqa: PLC0415

    model = case.build()
    names = case.layer_names(model)

    class PeerTask(Task):  # type: ignore[misc]  # kronfluence has no types
        def compute_train_loss(
            self, batch: Batch, model: nn.Module, sample: bool = False
        ) -> Tensor:
            assert not sample
            return case.losses(model, batch).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return case.losses(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    task = PeerTask()
    analyzer = Analyzer(
        analysis_name=case.name,
        model=prepare_model(model, task),
        task=task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(output_dir),
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate_samples))
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=case.train,
        per_device_batch_size=BATCH_SIZE,
        factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="factors",
        query_dataset=case.validation,
        train_dataset=case.train,
        per_device_query_batch_size=BATCH_SIZE,
        per_device_train_batch_size=BATCH_SIZE,
        score_args=ScoreArguments(damping_factor=None, compute_per_module_scores=True),
    )
    scores: dict[str, Tensor] = analyzer.load_pairwise_scores("scores")
    return {engine_name(f"{name}.weight"): score_VT for name, score_VT in scores.items()}


def dattri_dot_products(case: Case) -> Mapping[str, Tensor]:
    """Let dattri-llm take the dot product of every pair, by layer: float32 [V, T]."""
    dattri_llm = pytest.importorskip("dattri_llm", reason=f"dattri-llm {REASON}")
    model = case.build()
    names = case.layer_names(model)
    # of the layers that it does not know by their class's name it is told what they are
    norms = {
        name: model.get_submodule(name).variance_epsilon for name in names if name.endswith("norm")
    }
    config = dattri_llm.HookManagerConfig(
        hook_types=dict.fromkeys(names, "linear_io"),
        layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
        module_kwargs={
            name: {
                "has_bias": False,
                "normalized_shape": tuple(model.get_parameter(f"{name}.weight").shape),
                "eps": epsilon,
            }
            for name, epsilon in norms.items()
        },
    )

    def capture(samples: list[Batch]) -> list[Any]:
        gradients = []
        for batch in batches(samples):
            callback = dattri_llm.CaptureCallback()
            manager = dattri_llm.HookManager(model, config, callbacks=[callback])
            with manager.collect(deregister_on_exit=True):
                case.losses(model, batch).sum().backward()
            model.zero_grad()
            gradients.append(callback.record.gradient)
        return gradients

    train = capture(case.train)
    rows: dict[str, list[Tensor]] = {}
    for validation in capture(case.validation):
        blocks = [validation.similarity(block, mode="factorized") for block in train]
        for name in blocks[0]:
            rows.setdefault(engine_name(f"{name}.weight"), []).append(
                torch.cat([block[name] for block in blocks], dim=1)
            )
    return {name: torch.cat(parts) for name, parts in rows.items()}
