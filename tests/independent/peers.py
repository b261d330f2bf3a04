"""What kronfluence and dattri-llm compute for a case; only tests import them.

Both take gradients from hooks, those of factors inside the PEFT model, which is not merged.

Shapes: V validation samples, T training samples, B batch.
"""

import importlib
import os
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


def import_peer(name: str) -> Any:
    """Import an independent implementation: a test without it fails in CI, elsewhere it is skipped.

    Not at the top of a file, so that the other tests run without it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        reason = f"{error}; `make install` installs what requirements-checks.txt lists"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def kronfluence_scores(case: Case, *, strategy: str, output_dir: Path) -> Mapping[str, Tensor]:
    """Let kronfluence score every pair, by layer: float32 [V, T].

    The measurement is the loss of the validation sample, so positive is helpful. The Fisher is the
    empirical one, and no damping factor given: 0.1 of the mean eigenvalue.
    """
    kronfluence = import_peer("kronfluence")
    model = case.build()
    names = case.layer_names(model)

    class PeerTask(kronfluence.Task):  # type: ignore[misc, name-defined]  # no types
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
    analyzer = kronfluence.Analyzer(
        analysis_name=case.name,
        model=kronfluence.prepare_model(model, task),
        task=task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(output_dir),
    )
    loading = kronfluence.utils.dataset.DataLoaderKwargs(collate_fn=collate_samples)
    analyzer.set_dataloader_kwargs(loading)
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=case.train,
        per_device_batch_size=BATCH_SIZE,
        factor_args=kronfluence.FactorArguments(strategy=strategy, use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="factors",
        query_dataset=case.validation,
        train_dataset=case.train,
        per_device_query_batch_size=BATCH_SIZE,
        per_device_train_batch_size=BATCH_SIZE,
        score_args=kronfluence.ScoreArguments(damping_factor=None, compute_per_module_scores=True),
    )
    scores: dict[str, Tensor] = analyzer.load_pairwise_scores("scores")
    return {engine_name(f"{name}.weight"): score_VT for name, score_VT in scores.items()}


def dattri_dot_products(case: Case) -> Mapping[str, Tensor]:
    """Let dattri-llm take the dot product of every pair, by layer: float32 [V, T]."""
    dattri_llm = import_peer("dattri_llm")
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
