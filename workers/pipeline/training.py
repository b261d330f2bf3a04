"""The training loop: some of the samples, from an adapted model to its best epoch.

A plain loop and not Transformers' Trainer: Trainer's checkpoints appear file by file, so a kill
can leave half of one, and it reads them back through pickle. This one resumes to the bit.

Shapes: T samples of a set, N those that are trained on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from app.audits.schemas import FineTune
from app.shared_files import fetch
from workers.influence.batching import token_budget_batches
from workers.influence.objectives import OBJECTIVES, Outcome
from workers.pipeline.checkpoint import (
    Position,
    load_checkpoint,
    load_trainable,
    save_checkpoint,
    trainable,
)
from workers.pipeline.context import StageContext
from workers.pipeline.memory import most_tokens
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SampleSet

BATCHES_PER_WINDOW = 32
MAX_SAMPLES_PER_BATCH = 256


class Diverged(Exception):
    """The loss is not finite any more.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"The loss is not finite at step {step}.")
        self.step = step


@dataclass(frozen=True)
class Training:
    """What is trained on, and how.

    Attributes:
        samples: the set.
        index_N: which of its samples, ascending; all of them is `arange`.
        validation: decides which epoch is the best; None keeps the last.
        options: epochs, rates, batches and the seed of their order and of dropout.
        checkpoint: where the training stands when it is interrupted.
    """

    samples: SampleSet
    index_N: Tensor
    validation: SampleSet | None
    options: FineTune
    checkpoint: Path

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.index_N) // self.options.batch_size)


@dataclass(frozen=True)
class Runner:
    """Runs a model on samples of a set."""

    model: nn.Module
    prepared: Prepared
    device: torch.device

    def __call__(self, samples: SampleSet, indices: Tensor) -> Outcome:
        """Return what the model says of the samples at `indices`."""
        inputs, targets = samples.batch(indices, pad_id=self.prepared.pad_id, device=self.device)
        return OBJECTIVES[self.prepared.task].run(self.model, inputs, targets)

    def over(self, context: StageContext, samples: SampleSet) -> Iterator[tuple[Tensor, Outcome]]:
        """Yield indices and outcomes of all samples of a set, in evaluation mode."""
        self.model.eval()
        batches = token_budget_batches(
            samples.length_T,
            max_tokens=most_tokens(context.settings),
            max_samples=MAX_SAMPLES_PER_BATCH,
        )
        for indices in batches:
            with torch.no_grad():
                outcome = self(samples, indices)
            yield indices, outcome
            context.hold.keep_alive()


@dataclass(frozen=True)
class Trained:
    """A finished training; the model has the parameters of the best epoch.

    Attributes:
        losses: mean validation loss after every epoch; none without a validation set.
        best_loss: the lowest of them.
        learning_rates: mean learning rate of the steps of every epoch.
    """

    losses: tuple[float, ...]
    best_loss: float | None
    learning_rates: list[float]


def train(
    context: StageContext,
    runner: Runner,
    training: Training,
    *,
    after_epoch: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train the runner's model from its last checkpoint, or from the start, to its best epoch.

    Args:
        context: the unit of work; every step ticks its hold.
        runner: with the model as it starts.
        training: what is trained on.
        after_epoch: is told the epoch, from 0, before the checkpoint that counts it; after an
            interruption perhaps once more.

    Raises:
        Diverged: the loss of a batch or of the validation set is not finite.
    """
    model, options, device = runner.model, training.options, runner.device
    optimizer = AdamW(
        trainable(model).values(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    num_steps = training.steps_per_epoch * options.epochs
    schedule = get_linear_schedule_with_warmup(
        optimizer, round(options.warmup_fraction * num_steps), num_steps
    )
    torch.manual_seed(options.seed)
    position = Position()

    def keep() -> None:
        save_checkpoint(
            training.checkpoint,
            position,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            device=device,
        )

    if fetch(training.checkpoint):
        position = load_checkpoint(
            training.checkpoint, model=model, optimizer=optimizer, schedule=schedule, device=device
        )
    length_N = training.samples.length_T[training.index_N]
    while position.step < num_steps:
        epoch, step_in_epoch = divmod(position.step, training.steps_per_epoch)
        model.train()
        for place_B in _epoch_batches(length_N, options, epoch=epoch)[step_in_epoch:]:
            context.hold.tick(position.step * options.batch_size, num_steps * options.batch_size)
            loss = runner(training.samples, training.index_N[place_B]).loss_B.mean()
            _check_finite(float(loss.detach()), position)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            position.step += 1
            is_epoch_over = position.step % training.steps_per_epoch == 0
            if position.step % context.settings.checkpoint_steps == 0 and not is_epoch_over:
                keep()
        _keep_if_best(context, position, runner, training.validation)
        # before the checkpoint: who resumes from there finds what the epochs up to it left
        after_epoch(epoch)
        keep()

    load_trainable(model, position.best)
    return Trained(
        losses=position.losses,
        best_loss=position.best_loss,
        learning_rates=_learning_rates(schedule, training),
    )


def _learning_rates(schedule: LambdaLR, training: Training) -> list[float]:
    """Return the mean learning rate of the steps of every epoch."""
    share, steps = schedule.lr_lambdas[0], training.steps_per_epoch
    return [
        training.options.learning_rate
        * math.fsum(share(first + step) for step in range(steps))
        / steps
        for first in range(0, training.options.epochs * steps, steps)
    ]


def _epoch_batches(length_N: Tensor, options: FineTune, *, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch, as positions; they depend on lengths, seed and epoch alone.

    Samples are shuffled, and sorted by length only within windows of some batches: little padding
    (a third to a half of the time on sentences), and batches that still differ every epoch.
    """
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    order_N = torch.randperm(len(length_N), generator=generator)
    batches: list[Tensor] = []
    for window in order_N.split(BATCHES_PER_WINDOW * options.batch_size):
        by_length = window[length_N[window].argsort(stable=True)]
        batches += by_length.split(options.batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _keep_if_best(
    context: StageContext, position: Position, runner: Runner, validation: SampleSet | None
) -> None:
    """Measure the validation loss after an epoch, and keep the parameters if it is the lowest.

    Without a validation set, the last epoch's parameters are kept.
    """
    if validation is not None:
        total = 0.0
        for _, outcome in runner.over(context, validation):
            total += float(outcome.loss_B.double().sum())
        loss = total / len(validation)
        _check_finite(loss, position)
        position.losses = (*position.losses, loss)
        if position.best_loss is not None and loss >= position.best_loss:
            return
        position.best_loss = loss
    position.best = {
        name: parameter.detach().clone() for name, parameter in trainable(runner.model).items()
    }


def _check_finite(loss: float, position: Position) -> None:
    if not math.isfinite(loss):
        raise Diverged(position.step)
