"""Stage 1: resolve the references, check and tokenise the data, plant noise if asked.

Afterwards the audit needs neither the network nor the caller's files any more.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from app.audits.automatic import needs_split
from app.references import parse_model_reference
from app.shared_files import publish, publish_folder
from app.version import VERSION
from workers.pipeline.artifacts import sha256_of
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.estimate import estimate
from workers.pipeline.failures import AuditRefused
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SCHEMA, write_samples
from workers.pipeline.splitting import split_off
from workers.pipeline.tables import Table, read_batches, resolve_table
from workers.pipeline.targets import Label, Targets, read_classes, read_completions
from workers.pipeline.tokenise import TOKENISERS, RowTokeniser, TokenisedRows
from workers.sources.errors import SourceError
from workers.sources.loading import longest_input
from workers.sources.models import ResolvedModel, resolve_adapter, resolve_model
from workers.sources.staging import LINKS
from workers.sources.tokenizers import CHAT_DATE, load_tokenizer


@dataclass(frozen=True)
class _Sources:
    """Everything that the request refers to, brought here.

    Attributes:
        trusted: validation and test set, as far as there are any, by field.
    """

    model: ResolvedModel
    checkpoints: tuple[ResolvedModel, ...]
    train: Table
    trusted: dict[str, Table]

    def all(self) -> list[Table]:
        """Return every table, the training set first."""
        return [self.train, *self.trusted.values()]


def prepare(context: StageContext) -> StageOutput:
    """Resolve, check, tokenise; write the prepared sample files."""
    request, artifacts = context.request, context.artifacts
    with context.hold.silence():
        sources = _resolve(context)
        _publish(sources)
        train_file = _described(sources.train)
    classes: tuple[Label, ...] = ()
    if request.task == "classification":
        classes, targets = read_classes(context, sources.model, sources.train, sources.trusted)
    else:
        targets = {
            table.field: read_completions(
                context, table, scratch=artifacts.train.with_name("completions.arrow")
            )
            for table in sources.all()
        }

    tokenizer = load_tokenizer(sources.model)
    max_tokens = min(
        request.max_tokens,
        tokenizer.model_max_length,
        longest_input(sources.model, task=request.task) or sys.maxsize,
    )
    total = sum(of.num_rows for of in targets.values())
    paths = {"train": artifacts.train, "validation": artifacts.validation, "test": artifacts.test}
    num_truncated: dict[str, int] = {}

    def write(table: Table, *, before: int) -> None:
        tokeniser = TOKENISERS[table.columns.kind](tokenizer, table, max_tokens=max_tokens)
        batches = _Tokenised(context, tokeniser, targets[table.field])
        write_samples(
            paths[table.field],
            iter(batches),
            tick=lambda done: context.hold.tick(before + done, total),
        )
        num_truncated[table.field] = batches.num_truncated

    before = 0
    for table in sources.all():
        write(table, before=before)
        before += targets[table.field].num_rows
        if (swapped := targets[table.field].completions) is not None:
            swapped.remove()
    num_validation = targets["validation"].num_rows if "validation" in targets else 0
    num_split = split_off(context) if needs_split(request.stored()) else 0
    prepared = Prepared(
        task=request.task,
        model=sources.model,
        labels=classes,
        pad_id=tokenizer.pad_token_id,
        checkpoint_paths=tuple(of.adapter_path for of in sources.checkpoints if of.adapter_path),
    )
    prepared.write(artifacts.prepared)
    with context.hold.silence():
        told = estimate(context, prepared)
    provenance: dict[str, Any] = {
        "engine_version": VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "model_revision": sources.model.revision,
        "adapter_revision": sources.model.adapter_revision,
        "train_revision": sources.train.revision,
        "train_file": train_file,
        **{
            f"{name}_revision": sources.trusted[name].revision if name in sources.trusted else None
            for name in ("validation", "test")
        },
        "precision": request.precision,
        "seed": request.seed,
        "max_tokens": max_tokens,
        "num_truncated": num_truncated,
        "estimate": told.described() if told is not None else None,
    }
    if num_split:
        provenance["num_split"] = num_split
    if any(table.columns.kind == "chat" for table in sources.all()):
        provenance["chat_date"] = CHAT_DATE.date().isoformat()
    if sources.checkpoints:
        provenance["checkpoint_revisions"] = [of.adapter_revision for of in sources.checkpoints]
    return StageOutput(
        columns={
            "num_train": targets["train"].num_rows,
            "num_validation": num_validation or num_split,
        },
        provenance=provenance,
    )


def _publish(sources: _Sources) -> None:
    """Let other workers have the models, and the API the training file, for exports."""
    folders = [sources.model.path, sources.model.adapter_path]
    folders += [checkpoint.adapter_path for checkpoint in sources.checkpoints]
    for folder in folders:
        if folder is not None:
            publish_folder(folder, once=True, without=frozenset({LINKS}))
    publish(sources.train.path)


def _described(table: Table) -> dict[str, Any]:
    """Return what an export finds the file by, and proves that it is the very one."""
    return {
        "format": table.format,
        "bytes": table.path.stat().st_size,
        "sha256": sha256_of(table.path),
    }


def _resolve(context: StageContext) -> _Sources:
    request = context.request
    places: dict[str, Any] = {
        "task": request.task,
        "roots": context.settings.file_roots,
        "hub": context.hub,
        "store": context.store,
        "cache_dir": context.cache_dir,
    }
    adapter = request.model.adapter
    model = resolve_model(
        parse_model_reference(request.model.reference),
        adapter=parse_model_reference(adapter) if adapter else None,
        **places,
    )
    checkpoints = []
    for number, checkpoint in enumerate(request.model.checkpoints or ()):
        try:
            reference = parse_model_reference(checkpoint.adapter)
            checkpoints.append(resolve_adapter(model, reference, **places))
        except SourceError as error:
            raise AuditRefused(
                error.code,
                error.message,
                field=f"model.checkpoints.{number}.adapter",
                transient=error.transient,
            ) from error
    trusted = {"validation": request.validation, "test": request.test}
    return _Sources(
        model=model,
        checkpoints=tuple(checkpoints),
        train=resolve_table(context, request.train, field="train"),
        trusted={
            name: resolve_table(context, source, field=name)
            for name, source in trusted.items()
            if source is not None
        },
    )


class _Tokenised:
    """The record batches of a sample file, made while they are written.

    Attributes:
        num_truncated: samples that were cut so far.
    """

    def __init__(self, context: StageContext, tokeniser: RowTokeniser, targets: Targets) -> None:
        self._context = context
        self._tokeniser = tokeniser
        self._targets = targets
        self.num_truncated = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        tokeniser, targets = self._tokeniser, self._targets
        first = 0
        for batch in read_batches(self._context, tokeniser.table):
            for start in range(0, batch.num_rows, tokeniser.rows_per_call):
                part = batch.slice(start, tokeniser.rows_per_call)
                rows = slice(first, first + part.num_rows)
                swapped = targets.completions
                tokens = tokeniser.tokenise(
                    part,
                    first_row=first + 1,
                    completions=swapped.of(rows) if swapped is not None else None,
                )
                self.num_truncated += tokens.num_truncated
                yield _record_batch(tokens, targets, rows)
                first = rows.stop


def _record_batch(tokens: TokenisedRows, targets: Targets, rows: slice) -> pa.RecordBatch:
    columns = {
        "text": tokens.text,
        "text_pair": tokens.text_pair,
        "label": None if targets.label_N is None else targets.label_N[rows].tolist(),
        "is_noisy": None if targets.is_noisy_N is None else targets.is_noisy_N[rows].tolist(),
        "input_ids": tokens.input_ids,
        "token_type_ids": tokens.token_type_ids,
        "completion_start": tokens.completion_start,
    }
    return pa.record_batch(
        [
            pa.nulls(len(tokens.text), field.type)
            if columns[field.name] is None
            else pa.array(columns[field.name], field.type)
            for field in SCHEMA
        ],
        schema=SCHEMA,
    )
