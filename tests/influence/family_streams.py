"""Tiny models of every family, through the engine in padded batches and through a slow loop.

Shapes: N samples, T training samples, V validation samples, B a batch, S tokens of one sample, L
blocks, I/O input and output features, H width, d entries of a module.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.influence.extraction import OBJECTIVES, norm_names
from tests.influence.tiny_models import (
    CAUSAL_FAMILIES,
    NUM_CLASSES,
    Task,
    pad_targets,
    samples_for,
    tiny_adapted,
    tiny_model,
)
from tests.oracles import engine_name, loop_gradients
from workers.influence.batching import collate, token_budget_batches
from workers.influence.estimators import TrainingGradients
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ALL_LINEAR, ModuleSpec, is_linear_like
from workers.influence.rows import GradientRows

NUM_TRAIN, NUM_VALIDATION = 12, 6
LEARNING_RATES = [0.5, 0.25]
"""Of the steps that led to the two states of a model."""

# d x d matrices, solved pair by pair, are cheap for the slow side at this size
_SIZE = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
_GROUPED_SIZE = {**_SIZE, "num_key_value_heads": 1, "head_dim": 4}
_SIZES: dict[str, dict[str, int]] = {
    "distilbert": {"dim": 8, "hidden_dim": 16, "n_heads": 2},
    "gpt2": {"n_embd": 8, "n_inner": 16, "n_head": 2},
    "bert": _SIZE,
    "roberta": _SIZE,
    "llama": _GROUPED_SIZE,
    "qwen3": _GROUPED_SIZE,
    # without a window that is shorter than the samples it would be Llama once more
    "mistral": {**_GROUPED_SIZE, "sliding_window": 4},
}


@dataclass(frozen=True)
class Samples:
    """Token ids without padding, and labels."""

    token_ids: list[list[int]]
    labels: list[Any]


@dataclass(frozen=True)
class Streamed:
    """Samples as the engine gave them, batch by batch, the longest first.

    Attributes:
        modules: what the engine tracks; the word embedding is the last.
        batches: what it gave.
        place_N: where in them every sample stands.
    """

    modules: tuple[ModuleSpec, ...]
    batches: list[SampleGradients]
    place_N: Tensor

    def rows(self, module: int) -> GradientRows:
        """Return a module's gradients in the order of the samples."""
        parts = [batch.gradients[module] for batch in self.batches]
        return GradientRows.concatenate(parts).select(self.place_N)

    def collect(self, work: Callable[[SampleGradients], Tensor]) -> Tensor:
        """Return what is made of every batch, [..., N] in the order of the samples."""
        return torch.cat([work(batch) for batch in self.batches], dim=-1)[..., self.place_N]

    def hidden(self) -> Tensor:
        """Return the hidden states [L, N, H] in the order of the samples."""
        parts = [batch.hidden_LBH for batch in self.batches if batch.hidden_LBH is not None]
        return torch.cat(parts, dim=1)[:, self.place_N]

    def training(self, module: int) -> TrainingGradients:
        """Return one module's gradients as a stream, as the pipeline makes it of what it kept."""
        squared_norm_N = self.collect(lambda batch: batch.squared_norm_MB[module])
        return TrainingGradients(
            num_samples=len(squared_norm_N),
            mean_squared_norm=float(squared_norm_N.double().mean()),
            spec=self.modules[module],
            kronecker=self._kronecker(module),
            blocks=partial(self._blocks, module),
        )

    def _blocks(self, module: int) -> Iterator[Tensor]:
        return (batch.gradients[module].dense() for batch in self.batches)

    def _kronecker(self, module: int) -> KroneckerSums | None:
        total: KroneckerSums | None = None
        for batch in self.batches:
            sums = batch.kronecker[module]
            if sums is not None:
                total = sums if total is None else total + sums
        return total


@dataclass(frozen=True)
class Looped:
    """Samples through the model in float64, one after the other and without padding.

    Attributes:
        gradients: [N, d] by the engine's name of the parameter.
        loss_N: every sample's loss.
        hidden: the outputs [N, H] of the blocks where the sample is read, by name.
        factors: of the matrices that were asked for, the sums over the tokens of the outer products
            of what belongs to the rows and of what belongs to the columns.
    """

    gradients: dict[str, Tensor]
    loss_N: Tensor
    hidden: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class State:
    """A model at one state of its training: both sets through the engine and through the loop."""

    train: Streamed
    validation: Streamed
    loop_train: Looped
    loop_validation: Looped

    def dots(self, module: int) -> Tensor:
        """Return what the engine says of v_j · g_i by one module, [V, T]."""
        rows = self.validation.rows(module)
        return self.train.collect(lambda batch: rows.dot(batch.gradients[module]))

    def loop(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a module's gradients by the loop, [V, d] and [T, d]."""
        return self.loop_validation.gradients[name], self.loop_train.gradients[name]

    @property
    def names(self) -> list[str]:
        """Names of all modules."""
        return [spec.name for spec in self.train.modules]

    @property
    def words(self) -> str:
        """Name of the word embedding."""
        assert self.train.modules[-1].form == "sparse"
        return self.names[-1]


@dataclass(frozen=True)
class Case:
    """A tiny model of one family, and what it was trained and is validated on.

    Attributes:
        name: the task, the family, and which parameters are tracked.
        states: the earlier one, then the audited one.
        dense_train: at the audited state, written out and with Kronecker sums, as audits with a
            curvature take gradients.
        dense_validation: the same.
    """

    name: str
    task: Task
    train: Samples
    validation: Samples
    states: tuple[State, State]
    dense_train: Streamed
    dense_validation: Streamed

    @property
    def audited(self) -> State:
        """The state that all estimators but tracin look at alone."""
        return self.states[-1]

    @property
    def dense(self) -> list[str]:
        """Names of all modules but the word embedding, which no curvature is taken of."""
        return self.audited.names[:-1]


def make_cases(family: str, device: torch.device) -> list[Case]:
    """Return a family's classifier and, where it has one, causal LM, with LoRA and in full."""
    tasks: list[Task] = ["classification"]
    if family in CAUSAL_FAMILIES:
        tasks.append("causal_lm")
    return [
        _make_case(family, task, is_adapted=is_adapted, device=device)
        for task in tasks
        for is_adapted in (True, False)
    ]


def _make_case(family: str, task: Task, *, is_adapted: bool, device: torch.device) -> Case:
    model = tiny_model(task, family, num_layers=2, **_SIZES[family])
    targets = [ALL_LINEAR, *norm_names(model), *(["lm_head"] if task == "causal_lm" else [])]
    if is_adapted:
        model = tiny_adapted(family, task=task, base=model, r=2)
    model = model.to(device)
    train = _samples(task, NUM_TRAIN, seed=0)
    validation = _samples(task, NUM_VALIDATION, seed=1)
    extract = partial(
        GradientExtractor,
        objective=OBJECTIVES[task],
        target_modules=None if is_adapted else targets,
        longest=max(map(len, train.token_ids + validation.token_ids)),
        word_embeddings=True,
        hidden_states=True,
    )
    dense = extract(copy.deepcopy(model), needs_dense=True, kronecker=True)
    matrices = {spec.name for spec in dense.modules if len(spec.shape) == 2}

    def state_of(model: Any) -> State:
        extractor = extract(copy.deepcopy(model))
        # PEFT freezes it, and the engine looks at it all the same
        model.get_input_embeddings().weight.requires_grad_(requires_grad=True)
        loop = partial(_loop, model, is_causal=family in CAUSAL_FAMILIES)
        return State(
            train=_stream(extractor, train),
            validation=_stream(extractor, validation),
            loop_train=loop(train, matrices=matrices),
            loop_validation=loop(validation),
        )

    return Case(
        name=f"{task} of {family} {'with LoRA' if is_adapted else 'in full'}",
        task=task,
        train=train,
        validation=validation,
        states=(state_of(_moved(model)), state_of(model)),
        dense_train=_stream(dense, train),
        dense_validation=_stream(dense, validation),
    )


def _moved(model: nn.Module) -> nn.Module:
    """Return the model as it may have been earlier in its training."""
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = 0.1 * torch.randn(parameter.shape, generator=draw)
                parameter.add_(step.to(parameter.device))
    return model


def _samples(task: Task, num_samples: int, *, seed: int) -> Samples:
    token_ids, labels = samples_for(task, 2 * num_samples, seed=seed)
    # what attends to a token or two has queries whose gradients are hardly more than rounding
    # errors, and an estimator that divides by their length would compare those
    chosen = [place for place, ids in enumerate(token_ids) if len(ids) > 4][:num_samples]
    if task == "classification":
        labels = [place % NUM_CLASSES for place in range(len(labels))]
    return Samples([token_ids[place] for place in chosen], [labels[place] for place in chosen])


def _stream(extractor: GradientExtractor, samples: Samples) -> Streamed:
    length_N = torch.tensor([len(ids) for ids in samples.token_ids])
    planned = token_budget_batches(length_N, max_tokens=80, max_samples=5)
    assert all(length_N[index_B].unique().numel() > 1 for index_B in planned), "no padding"
    batches = [
        extractor.extract(
            collate([samples.token_ids[i] for i in index_B], pad_id=0, device=extractor.device),
            pad_targets([samples.labels[i] for i in index_B], device=extractor.device),
        )
        for index_B in planned
    ]
    return Streamed(extractor.modules, batches, torch.cat(planned).argsort())


def _loop(
    model: nn.Module, samples: Samples, *, is_causal: bool, matrices: Collection[str] = ()
) -> Looped:
    model = copy.deepcopy(model).double()
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    states: dict[str, list[Tensor]] = {}

    def keep_state(name: str, _: nn.Module, __: Any, output: Any) -> None:
        state_1SH = output if isinstance(output, Tensor) else output[0]
        states.setdefault(name, []).append(state_1SH[0, -1 if is_causal else 0].detach())

    def keep_factors(
        name: str, module: nn.Module, arguments: tuple[Tensor], output: Tensor
    ) -> None:
        x_SI = arguments[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            for x_I, g_O in zip(x_SI, gradient.flatten(0, -2), strict=True):
                # a language model's head runs at the tokens of the completion alone
                if name == "lm_head.weight" and not g_O.any():
                    continue
                # GPT-2's Conv1D keeps its weight transposed
                row, column = (g_O, x_I) if isinstance(module, nn.Linear) else (x_I, g_O)
                sums = factors.get(name, (torch.zeros(()), torch.zeros(())))
                factors[name] = sums[0] + row.outer(row), sums[1] + column.outer(column)

        output.register_hook(add)

    for path, module in model.named_modules():
        name = engine_name(f"{path}.weight")
        if path.rpartition(".")[2].isdigit():
            module.register_forward_hook(partial(keep_state, path))
        elif name in matrices and is_linear_like(module):
            module.register_forward_hook(partial(keep_factors, name))
    gradients, loss_N = loop_gradients(model, samples.token_ids, samples.labels)
    return Looped(
        gradients={name: each.cpu() for name, each in gradients.items()},
        loss_N=loss_N.cpu(),
        hidden={name: torch.stack(each).cpu() for name, each in states.items()},
        factors={name: (rows.cpu(), columns.cpu()) for name, (rows, columns) in factors.items()},
    )
