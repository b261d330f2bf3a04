"""Stage 2: LoRA fine-tuning on the training set, keeping the epoch with the lowest validation loss.

A plain loop and not Transformers' Trainer: Trainer's checkpoints appear file by file, so a kill
can leave half of one, and it reads them back through pickle. This one resumes to the bit.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from app.audits.schemas import FineTune
from workers.device import choose_device, device_name
from workers.influence.batching import token_budget_batches
from workers.influence.errors import NoTrackedModules, UnsupportedModule
from workers.influence.layers import ALL_LINEAR, find_block_stack, find_targets, is_linear_like
from workers.influence.objectives import OBJECTIVES
from workers.pipeline.artifacts import write_json
from workers.pipeline.checkpoint import (
    Position,
    load_checkpoint,
    load_trainable,
    save_checkpoint,
    trainable,
)
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import wishes_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepare import Prepared
from workers.pipeline.samples import SampleSet
from workers.sources.loading import load_model

BATCHES_PER_WINDOW = 32
QUERY_AND_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
)
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
TASK_TYPES = {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM}


def query_and_value(model: nn.Module) -> list[str]:
    """Return the names that this model's query and value projections go by.

    Where one layer makes both (GPT-2's c_attn), that one; where no name is known, all linear layers
    of the attention.

    Raises:
        NoTrackedModules: there is no attention; the request must name the modules.
        UnsupportedModule: the model has no transformer blocks.
    """
    linear_names = [name for name, module in model.named_modules() if is_linear_like(module)]
    names = {name.rpartition(".")[2] for name in linear_names}
    for known in (*QUERY_AND_VALUE, *((name,) for name in FUSED)):
        if names.issuperset(known):
            return list(known)
    if in_attention := _attention_names(model):
        return in_attention
    raise NoTrackedModules(
        "the model has no linear modules named like a query and a value projection, and no "
        "attention with linear layers; name its own in target_modules: "
        f"{', '.join(sorted({name.rpartition('.')[2] for name in linear_names}))}."
    )


def _attention_names(model: nn.Module) -> list[str]:
    """Name the linear layers of the attention of all blocks, each by its path from there."""
    found: dict[str, None] = {}
    for block_name in find_block_stack(model).block_names:
        for name, module in model.get_submodule(block_name).named_modules():
            own_name = name.rpartition(".")[2]
            if "attention" in type(module).__name__.lower() or "attn" in own_name:
                found |= {
                    f"{own_name}.{path}": None
                    for path, layer in module.named_modules()
                    if path and is_linear_like(layer)
                }
    return list(found)


def fine_tune(context: StageContext) -> StageOutput:
    """Train the adapter and the head; go on from the last checkpoint if there is one."""
    options = context.request.fine_tune
    if options is None:
        raise AuditRefused("internal_error", "The stage was reached without fine_tune.")
    artifacts = context.artifacts
    device = choose_device(context.settings.device)
    prepared = Prepared.read(artifacts.prepared)
    train = SampleSet(artifacts.train)
    validation = SampleSet(artifacts.validation) if context.request.validation else None
    keeps_epochs = wishes_of(context).checkpoints
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
    objective = OBJECTIVES[prepared.task]

    def run(samples: SampleSet, indices: Tensor) -> Tensor:
        inputs, targets = samples.batch(indices, pad_id=prepared.pad_id, device=device)
        return objective.run(model, inputs, targets).loss_B

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
        if keeps_epochs:
            # before the checkpoint: who resumes from there finds the epochs up to it
            _save_adapter(model, artifacts.epoch_adapter(epoch))
        save_checkpoint(artifacts.checkpoint, position, **parts)

    if keeps_epochs:
        rates = _learning_rates(schedule, options, steps_per_epoch=steps_per_epoch)
        write_json(artifacts.epochs, {"learning_rates": rates})
    load_trainable(model, position.best)
    _save_adapter(model, artifacts.adapter)
    return StageOutput(
        result={"validation_losses": list(position.losses), "best_loss": position.best_loss},
        provenance={
            "fine_tune_device": device_name(device),
            "validation_losses": list(position.losses),
        },
    )


def _learning_rates(schedule: LambdaLR, options: FineTune, *, steps_per_epoch: int) -> list[float]:
    """Return the mean learning rate of the steps of every epoch."""
    share = schedule.lr_lambdas[0]
    return [
        options.learning_rate
        * math.fsum(share(first + step) for step in range(steps_per_epoch))
        / steps_per_epoch
        for first in range(0, options.epochs * steps_per_epoch, steps_per_epoch)
    ]


def _adapted(prepared: Prepared, options: FineTune) -> PeftModel:
    base: Any = load_model(
        prepared.model, task=prepared.task, labels=prepared.labels, new_head_seed=options.seed
    ).model
    base.config.use_cache = False
    try:
        targets = _targets(base, options)
    except (NoTrackedModules, UnsupportedModule) as error:
        raise AuditRefused(error.code, str(error), field="fine_tune.target_modules") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            return get_peft_model(
                base,
                LoraConfig(
                    task_type=TASK_TYPES[prepared.task],
                    r=options.rank,
                    lora_alpha=options.alpha,
                    lora_dropout=options.dropout,
                    target_modules=targets,
                    fan_in_fan_out=_is_transposed(base, targets),
                ),
            )
        except ValueError as error:
            raise AuditRefused(
                "unsupported_module",
                f"PEFT cannot put adapters on {', '.join(targets)}: {error}",
                field="fine_tune.target_modules",
            ) from error


def _targets(model: nn.Module, options: FineTune) -> list[str]:
    asked = options.target_modules
    if asked is None:
        return query_and_value(model)
    if ALL_LINEAR in asked:
        return find_targets(model, find_block_stack(model), asked)
    return asked


def _is_transposed(model: nn.Module, targets: Sequence[str]) -> bool:
    """Tell whether the targets keep their weights as [inputs, outputs], as GPT-2's Conv1D does."""
    return any(
        is_linear_like(module) and not isinstance(module, nn.Linear)
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    )


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
    validation: SampleSet | None,
    run: Callable[[SampleSet, Tensor], Tensor],
) -> None:
    """Measure the validation loss after an epoch, and keep the parameters if it is the lowest.

    Without a validation set, the last epoch's parameters are kept.
    """
    if validation is not None:
        loss = _mean_loss(context, model, validation, run)
        _check_finite(loss, position)
        position.losses = (*position.losses, loss)
        if position.best_loss is not None and loss >= position.best_loss:
            return
        position.best_loss = loss
    position.best = {
        name: parameter.detach().clone() for name, parameter in trainable(model).items()
    }


def _mean_loss(
    context: StageContext,
    model: nn.Module,
    samples: SampleSet,
    run: Callable[[SampleSet, Tensor], Tensor],
) -> float:
    model.eval()
    batches = token_budget_batches(
        samples.length_T, max_tokens=context.settings.tokens_per_batch, max_samples=256
    )
    total = 0.0
    with torch.no_grad():
        for indices in batches:
            total += float(run(samples, indices).double().sum())
            context.hold.keep_alive()
    return total / len(samples)


def _check_finite(loss: float, position: Position) -> None:
    if not math.isfinite(loss):
        raise AuditRefused(
            "diverged",
            f"The loss is not finite at step {position.step}. Lower fine_tune.learning_rate.",
            field="fine_tune.learning_rate",
        )


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter's folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as temporary:
        content = Path(temporary) / "content"
        model.save_pretrained(content, safe_serialization=True, save_embedding_layers=False)
        for path in content.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        try:
            content.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another worker was first, with the same
                raise
