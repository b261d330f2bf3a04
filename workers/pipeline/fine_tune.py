"""Stage 2: LoRA fine-tuning on the training set, to the epoch with the lowest validation loss."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from app.audits.schemas import FineTune
from app.shared_files import publish_folder
from workers.device import choose_device, device_name
from workers.influence.errors import NoTrackedModules, UnsupportedModule
from workers.influence.layers import ALL_LINEAR, find_block_stack, find_targets, is_linear_like
from workers.pipeline.artifacts import write_json
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimating import wishes_of
from workers.pipeline.failures import AuditRefused
from workers.pipeline.placing import load_placed, on_device
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SampleSet
from workers.pipeline.splitting import is_trained_on
from workers.pipeline.training import Diverged, Runner, Training, train
from workers.sources.libraries import Task
from workers.sources.loading import is_on_paper, place_adapter

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
    samples = SampleSet(artifacts.train)
    keeps_epochs = wishes_of(context).checkpoints
    with context.hold.silence():
        model = adapted_model(context, prepared, options)

    def keep_epoch(epoch: int) -> None:
        if keeps_epochs:
            _save_adapter(model, artifacts.epoch_adapter(epoch))

    try:
        trained = train(
            context,
            Runner(model, prepared, device),
            Training(
                samples=samples,
                index_N=is_trained_on(artifacts, len(samples)).nonzero().flatten(),
                validation=SampleSet(artifacts.validation) if context.has_validation else None,
                options=options,
                checkpoint=artifacts.checkpoint,
            ),
            after_epoch=keep_epoch,
        )
    except Diverged as error:
        raise AuditRefused(
            "diverged",
            f"{error} Lower fine_tune.learning_rate.",
            field="fine_tune.learning_rate",
        ) from error
    if keeps_epochs:
        write_json(artifacts.epochs, {"learning_rates": trained.learning_rates})
    _save_adapter(model, artifacts.adapter)
    losses = list(trained.losses)
    return StageOutput(
        result={"validation_losses": losses, "best_loss": trained.best_loss},
        provenance={"fine_tune_device": device_name(device), "validation_losses": losses},
    )


def adapted_model(context: StageContext, prepared: Prepared, options: FineTune) -> PeftModel:
    """Return the base model with new adapters, and for a classifier a new head, ready to train.

    Both are drawn from the seed of the options alone.

    Raises:
        AuditRefused: the adapters do not fit the model; names the field.
    """
    base = load_placed(context, prepared, prepared.model, new_head_seed=options.seed)
    return on_device(context, add_adapters(base, prepared.task, options), trains=True)


def add_adapters(base: Any, task: Task, options: FineTune) -> PeftModel:  # noqa: ANN401
    """Return a base model with new adapters, drawn from the seed of the options alone.

    A model without memory for its weights, on the meta device, gets adapters without any too.

    Raises:
        AuditRefused: the adapters do not fit the model; names the field.
    """
    base.config.use_cache = False
    try:
        targets = _targets(base, options)
    except (NoTrackedModules, UnsupportedModule) as error:
        raise AuditRefused(error.code, str(error), field="fine_tune.target_modules") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            adapted = get_peft_model(
                base,
                LoraConfig(
                    task_type=TASK_TYPES[task],
                    r=options.rank,
                    lora_alpha=options.alpha,
                    lora_dropout=options.dropout,
                    target_modules=targets,
                    fan_in_fan_out=_is_transposed(base, targets),
                ),
                low_cpu_mem_usage=is_on_paper(base),
            )
        except ValueError as error:
            raise AuditRefused(
                "unsupported_module",
                f"PEFT cannot put adapters on {', '.join(targets)}: {error}",
                field="fine_tune.target_modules",
            ) from error
        place_adapter(adapted)
    return adapted


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


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter's folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".adapter-", suffix=".partial") as temporary:
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
    publish_folder(folder)
