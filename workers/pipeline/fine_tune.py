"""Stage 2: LoRA fine-tuning on the training set, keeping the epoch with the lowest validation loss.

A plain loop and not Transformers' Trainer: Trainer's checkpoints appear file by file, so a kill
can leave half of one, and it reads them back through pickle. This one resumes to the bit.
"""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup

from app.audits.schemas import FineTune
from workers.device import choose_device, device_name
from workers.influence.batching import token_budget_batches
from workers.influence.errors import NoTrackedModules
from workers.pipeline.artifacts import atomically
from workers.pipeline.checkpoint import (
    Position,
    load_checkpoint,
    load_trainable,
    save_checkpoint,
    trainable,
)
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepare import Prepared
from workers.pipeline.samples import SampleSet
from workers.sources.loading import load_model

BATCHES_PER_WINDOW = 32
QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))


def query_and_value(model: nn.Module) -> list[str]:
    """Return the names that this model's query and value projections go by.

    Raises:
        NoTrackedModules: none of the known names; the request must name the modules.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for pair in QUERY_AND_VALUE:
        if names.issuperset(pair):
            return list(pair)
    raise NoTrackedModules(
        "the model has no linear modules named like a query and a value projection; name its own "
        f"in target_modules: {', '.join(sorted(names))}."
    )


def fine_tune(context: StageContext) -> StageOutput:
    """Train the adapter and the head; go on from the last checkpoint if there is one."""
    options = context.request.fine_tune
    if options is None:
        raise AuditRefused("internal_error", "The stage was reached without fine_tune.")
    artifacts = context.artifacts
    device = choose_device(context.settings.device)
    prepared = Prepared.read(artifacts.prepared)
    train, validation = SampleSet(artifacts.train), SampleSet(artifacts.validation)
    with context.hold.silence():
        model = _adapted(prepared, options).to(device)
    optimizer = AdamW(
        trainable(model).values(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    steps_per_epoch = -(-len(train) // options.batch_size)
    num_steps = steps_per_epoch * options.epochs
    schedule = get_linear_schedule_with_warmup(
        optimizer, round(options.warmup_fraction * num_steps), num_steps
    )
    torch.manual_seed(options.seed)
    position = Position()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "device": device}
    if artifacts.checkpoint.exists():
        position = load_checkpoint(artifacts.checkpoint, **parts)

    def run(samples: SampleSet, indices: Tensor) -> Tensor:
        inputs, label_B = samples.batch(indices, pad_id=prepared.pad_id, device=device)
        return cross_entropy(model(**inputs).logits.float(), label_B, reduction="none")

    while position.step < num_steps:
        epoch, step_in_epoch = divmod(position.step, steps_per_epoch)
        model.train()
        for indices in _epoch_batches(train.length_T, options, epoch=epoch)[step_in_epoch:]:
            context.hold.tick(position.step * options.batch_size, num_steps * options.batch_size)
            loss = run(train, indices).mean()
            _check_finite(float(loss.detach()), position)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            position.step += 1
            is_epoch_over = position.step % steps_per_epoch == 0
            if position.step % context.settings.checkpoint_steps == 0 and not is_epoch_over:
                save_checkpoint(artifacts.checkpoint, position, **parts)
        _keep_if_best(context, position, model, validation, run)
        save_checkpoint(artifacts.checkpoint, position, **parts)

    load_trainable(model, position.best)
    _save_adapter(model, artifacts.adapter)
    return StageOutput(
        result={"validation_losses": list(position.losses), "best_loss": position.best_loss},
        provenance={
            "fine_tune_device": device_name(device),
            "validation_losses": list(position.losses),
        },
    )


def _adapted(prepared: Prepared, options: FineTune) -> PeftModel:
    base = load_model(prepared.model, labels=prepared.labels, new_head_seed=options.seed).model
    try:
        targets = options.target_modules or query_and_value(base)
    except NoTrackedModules as error:
        raise AuditRefused(error.code, str(error), field="fine_tune.target_modules") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            return get_peft_model(
                base,
                LoraConfig(
                    task_type=TaskType.SEQ_CLS,
                    r=options.rank,
                    lora_alpha=options.alpha,
                    lora_dropout=options.dropout,
                    target_modules=targets,
                ),
            )
        except ValueError as error:
            raise AuditRefused(
                "unsupported_module",
                f"PEFT cannot put adapters on {', '.join(targets)}: {error}",
                field="fine_tune.target_modules",
            ) from error


def _epoch_batches(length_T: Tensor, options: FineTune, *, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch; they depend on lengths, seed and epoch alone.

    Samples are shuffled, and sorted by length only within windows of some batches: little padding
    (a third to a half of the time on sentences), and batches that still differ every epoch.
    """
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    order_T = torch.randperm(len(length_T), generator=generator)
    batches: list[Tensor] = []
    for window in order_T.split(BATCHES_PER_WINDOW * options.batch_size):
        by_length = window[length_T[window].argsort(stable=True)]
        batches += by_length.split(options.batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _keep_if_best(
    context: StageContext,
    position: Position,
    model: nn.Module,
    validation: SampleSet,
    run: Callable[[SampleSet, Tensor], Tensor],
) -> None:
    """Measure the validation loss after an epoch, and keep the parameters if it is the lowest."""
    model.eval()
    batches = token_budget_batches(
        validation.length_T, max_tokens=context.settings.tokens_per_batch, max_samples=256
    )
    total = 0.0
    with torch.no_grad():
        for indices in batches:
            total += float(run(validation, indices).double().sum())
            context.hold.keep_alive()
    loss = total / len(validation)
    _check_finite(loss, position)
    position.losses = (*position.losses, loss)
    if position.best_loss is None or loss < position.best_loss:
        position.best_loss = loss
        position.best = {
            name: parameter.detach().clone() for name, parameter in trainable(model).items()
        }


def _check_finite(loss: float, position: Position) -> None:
    if not math.isfinite(loss):
        raise AuditRefused(
            "diverged",
            f"The loss is not finite at step {position.step}. Lower fine_tune.learning_rate.",
            field="fine_tune.learning_rate",
        )


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter file by file, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        for path in sorted(Path(temporary).iterdir()):
            with atomically(folder / path.name) as partial:
                path.rename(partial)
