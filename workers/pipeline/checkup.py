"""Preflight: a few samples alone and in a padded batch, before anything long begins."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from workers.influence.preflight import PreflightReport, preflight
from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused
from workers.pipeline.runtime import Runtime
from workers.pipeline.samples import SampleSet

NUM_SAMPLES = 4
# relative to the length of a sample's gradient; rounding alone gives 1e-6 in a shallow model in
# float32 and 2e-4 in one of 30 blocks
WARN_ABOVE = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.005}
REFUSE_ABOVE = {"float32": 1e-2, "bfloat16": 0.25, "float16": 0.1}
MAX_NAMED = 5


def check_model(context: StageContext, runtime: Runtime) -> dict[str, Any]:
    """Try the model on a few samples and return the report, warnings included.

    Raises:
        AuditRefused: a sample's gradient depends on its padding, or no module has any gradient;
            with the numbers and what to change.
    """
    samples = runtime.validation or runtime.train
    indices = _of_all_lengths(samples)
    context.hold.keep_alive()

    def batch(chosen: Tensor) -> tuple[Any, Tensor]:
        return samples.batch(chosen, pad_id=runtime.prepared.pad_id, device=runtime.device)

    report = preflight(
        runtime.extractor,
        samples=[batch(index[None]) for index in indices],
        padded=batch(indices),
    )
    _refuse(context, report, num_modules=len(runtime.extractor.modules))
    return {**asdict(report), "warnings": _warnings(context, report)}


def _of_all_lengths(samples: SampleSet) -> Tensor:
    """Return samples from the shortest to the longest: the more padding, the better the test."""
    order_N = samples.length_T.argsort(stable=True)
    places = torch.linspace(0, len(order_N) - 1, min(NUM_SAMPLES, len(order_N))).round().long()
    return order_N[places]


def _refuse(context: StageContext, report: PreflightReport, *, num_modules: int) -> None:
    precision = context.request.precision
    worst = max(report.max_loss_error, report.max_gradient_error)
    if worst > REFUSE_ABOVE[precision]:
        advice = (
            "use precision float32"
            if precision != "float32"
            else "its attention looks at padding: audit it with another tokenizer or model"
        )
        raise AuditRefused(
            "preflight_failed",
            f"A sample alone and the same sample in a padded batch differ by "
            f"{report.max_loss_error:.1e} in the loss and {report.max_gradient_error:.1e} in the "
            f"gradient, relative to its size (at most {REFUSE_ABOVE[precision]:g} is accepted in "
            f"{precision}); {advice}.",
            field="precision" if precision != "float32" else "model.reference",
        )
    if len(report.zero_modules) == num_modules:
        raise AuditRefused(
            "preflight_failed",
            "The gradients of all modules are zero on a few samples: the model does not depend on "
            "them. Name other modules, or check that the model is trained.",
            field="model.target_modules" if context.request.fine_tune is None else "fine_tune",
        )


def _warnings(context: StageContext, report: PreflightReport) -> list[str]:
    precision = context.request.precision
    warnings = []
    if max(report.max_loss_error, report.max_gradient_error) > WARN_ABOVE[precision]:
        warnings.append(
            f"A sample's gradient changes by {report.max_gradient_error:.1e} of its length when "
            f"its batch is padded (loss: {report.max_loss_error:.1e}); rankings may depend on the "
            "batches a little. "
            + (
                "Set precision to float32 to avoid it."
                if precision != "float32"
                else "A smaller max_tokens leaves less to be padded."
            )
        )
    if report.zero_modules:
        named = ", ".join(report.zero_modules[:MAX_NAMED])
        more = len(report.zero_modules) - MAX_NAMED
        warnings.append(
            f"{len(report.zero_modules)} modules have no gradient on a few samples and tell "
            f"nothing: {named}{f' and {more} more' if more > 0 else ''}. Leave them out of the "
            "adapter's or the audit's target_modules."
        )
    return warnings
