"""Fine-tune again on one arm's samples, and let the model answer the test set: a unit a training.

Shapes: N test samples.
"""

import torch
from torch import Tensor

from app.audits.schemas import FineTune
from app.shared_files import fetch
from workers.device import choose_device, device_name
from workers.pipeline.arms import Plan, read_training_data
from workers.pipeline.artifacts import read_tensors, write_tensors
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.fine_tune import adapted_model
from workers.pipeline.prepared import Prepared
from workers.pipeline.runtime import forget_runtime
from workers.pipeline.samples import NO_CLASS, SampleSet
from workers.pipeline.splitting import is_trained_on
from workers.pipeline.training import Diverged, Runner, Training, train


def verify(context: StageContext) -> StageOutput:
    """Train what the unit stands for, unless that is done, and write what came of it."""
    path = context.artifacts.outcome(context.claim.position)
    device = choose_device(context.settings.device)
    if not fetch(path):  # it appears whole or not at all, and two workers write the same
        forget_runtime()
        write_tensors(path, _outcome(context, device))
    context.artifacts.training_checkpoint(context.claim.position).unlink(missing_ok=True)
    outcome = read_tensors(path)
    step = outcome.get("diverged_at")
    return StageOutput(
        result={"diverged_at": None if step is None else int(step)},
        provenance={"verify_device": device_name(device)},
    )


def _outcome(context: StageContext, device: torch.device) -> dict[str, Tensor]:
    """Train, and return what the model says of the test samples.

    Returns:
        loss_N, float32, and predicted_N, int32, or for a causal language model is_exact_N, bool;
        diverged_at, the step, where the loss did not stay finite.
    """
    artifacts = context.artifacts
    planned = Plan.read(artifacts).trainings[context.claim.position]
    data = read_training_data(artifacts, planned.data)
    samples = SampleSet(artifacts.train)
    if data.label_T is not None:
        samples = samples.relabelled(data.label_T)
    prepared = Prepared.read(artifacts.prepared)
    options = _options(context).model_copy(update={"seed": planned.seed})
    with context.hold.silence():
        model = adapted_model(context, prepared, options)
    runner = Runner(model, prepared, device)
    training = Training(
        samples=samples,
        index_N=(data.is_kept_T & is_trained_on(artifacts, len(samples))).nonzero().flatten(),
        validation=SampleSet(artifacts.validation) if context.has_validation else None,
        options=options,
        checkpoint=artifacts.training_checkpoint(context.claim.position),
    )
    try:
        train(context, runner, training)
    except Diverged as error:
        return {"diverged_at": torch.tensor(error.step)}
    return answer_test(context, runner, SampleSet(artifacts.test))


def answer_test(context: StageContext, runner: Runner, test: SampleSet) -> dict[str, Tensor]:
    """Return what the model says of every test sample.

    A causal language model's completion is exact when every one of its tokens, its end token
    among them, is the most likely one after the prompt and the completion's own earlier tokens.
    That equals greedy decoding from the prompt: as long as all tokens so far were right, decoding
    stands before the very same tokens, so it takes the right one next exactly when it is the most
    likely there; and at the first wrong one both have failed. So decoding writes the completion and
    ends there if and only if all are right, up to ties and rounding. (A completion that was cut to
    max_tokens has no end token: then decoding begins with it. What a chat template writes behind
    the end token counts here too.)
    """
    loss_N = torch.zeros(len(test))
    predicted_N = torch.full((len(test),), NO_CLASS, dtype=torch.int32)
    is_exact_N = torch.zeros(len(test), dtype=torch.bool)
    for indices, outcome in runner.over(context, test):
        loss_B = outcome.loss_B.float().cpu()
        loss_N[indices] = loss_B
        is_finite_B = loss_B.isfinite()
        if outcome.predicted_B is not None:
            # of logits that are no numbers nothing is predicted
            predicted_N[indices] = outcome.predicted_B.int().cpu().where(is_finite_B, NO_CLASS)
        else:
            is_exact_N[indices] = (outcome.predicted_probability_B.cpu() == 1) & is_finite_B
    if test.has_completions:
        return {"loss": loss_N, "is_exact": is_exact_N}
    return {"loss": loss_N, "predicted": predicted_N}


def _options(context: StageContext) -> FineTune:
    options = context.request.fine_tune
    if options is None:
        raise AuditRefused("internal_error", "The stage was reached without fine_tune.")
    return options
