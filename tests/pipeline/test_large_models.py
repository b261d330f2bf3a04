"""Audits of models that are held in fewer bits or computed again, and what is said beforehand."""

from typing import Any

import pytest

from app.audits.models import Audit
from app.work.models import Stage
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import llama_config, reviews, save_language_model
from tests.pipeline.workplace import Workplace
from workers.pipeline import estimate as estimating
from workers.sources.placement import can_quantize

FINE_TUNE = {"epochs": 1, "batch_size": 8}


def digest(workplace: Workplace, audit: Audit) -> str:
    sha256: str = audit.summary["files"]["jsonl"]["sha256"]
    return sha256


def test_computing_blocks_again_changes_no_byte_of_the_ranking(
    workplace: Workplace, models: Models
) -> None:
    found = [
        workplace.succeed(
            workplace.submit(
                models.encoder,
                source={"activation_checkpointing": recompute},
                fine_tune=FINE_TUNE,
                **workplace.reviews(),
            )
        )
        for recompute in (False, True)
    ]
    assert digest(workplace, found[0]) == digest(workplace, found[1])
    told = [audit.provenance["estimate"] for audit in found]
    assert [each["activation_checkpointing"] for each in told] == [False, True]
    assert told[1]["activation_bytes"] < told[0]["activation_bytes"]


def test_what_does_not_fit_is_computed_again_or_refused_before_it_begins(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the numbers, and the settings that would help."""
    request: dict[str, Any] = {"fine_tune": FINE_TUNE, **workplace.reviews()}
    told = workplace.succeed(workplace.submit(models.encoder, **request)).provenance["estimate"]
    least = told["least_bytes"][Stage.FINE_TUNE.value]
    monkeypatch.setattr(estimating, "free_bytes", lambda _: least - 1)
    audit = workplace.succeed(workplace.submit(models.encoder, **request))
    assert audit.provenance["estimate"]["activation_checkpointing"]
    refused = workplace.finish(
        workplace.submit(models.encoder, source={"activation_checkpointing": False}, **request)
    )
    assert (refused.state, refused.error_code) == ("failed", "insufficient_memory")
    for part in ("fine_tune needs at least", "model.activation_checkpointing (", "batch_size"):
        assert part in str(refused.error_message)


def test_without_bitsandbytes_quantisation_is_refused(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.pipeline.placing.can_quantize", lambda: False)
    audit = workplace.finish(
        workplace.submit(
            models.encoder,
            source={"quantization": "4bit"},
            fine_tune=FINE_TUNE,
            **workplace.reviews(),
        )
    )
    assert (audit.error_code, audit.error_field) == (
        "quantization_unavailable",
        "model.quantization",
    )


@pytest.mark.skipif(not can_quantize(), reason="bitsandbytes is optional")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_is_fine_tuned_and_audited(
    workplace: Workplace, quantization: str
) -> None:
    config = llama_config(hidden_size=64, intermediate_size=128)
    config.pad_token_id = 0
    model = save_language_model(workplace.files / "model", config)
    audit = workplace.succeed(
        workplace.submit(
            model,
            source={"quantization": quantization},
            fine_tune=FINE_TUNE,
            train=workplace.table("few", reviews(40, seed=0)),
            validation=workplace.table("trusted", reviews(8, seed=1)),
        )
    )
    assert audit.summary["num_non_finite"] == 0
    assert audit.provenance["preflight"]["max_gradient_error"] < 1e-3
