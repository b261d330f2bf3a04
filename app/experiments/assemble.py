"""Make answers out of experiments and the rows of their audits."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import get_args

from app.audits.answers import AuditError
from app.audits.assemble import audit_path
from app.audits.models import Audit, AuditState
from app.experiments import answers, tables
from app.experiments.rows import FACTORS, MEASURES, Cell, Row, rows_of_audit
from app.experiments.service import ExperimentWithAudits

CORRELATE: dict[answers.Over, Callable[..., list[tables.Correlation]]] = {
    "configurations": tables.correlate_configurations,
    "layer_groups": tables.correlate_layer_groups,
}


def assemble_experiment(found: ExperimentWithAudits) -> answers.Experiment:
    """Return an experiment and where it stands."""
    experiment, standing = found.experiment, found.standing
    return answers.Experiment(
        id=experiment.id,
        state=standing.state,
        done=standing.state.is_final,
        progress=standing.progress,
        created_at=experiment.created_at,
        finished_at=found.finished_at,
        cancel_requested_at=experiment.cancel_requested_at,
        request=experiment.request,
        metadata=experiment.metadata_,
        num_audits=len(found.audits),
        num_ended=standing.num_ended,
        audits=[
            answers.ExperimentAudit(
                id=audit.id,
                task=cell.task,
                seed=cell.seed,
                state=AuditState(audit.state),
                progress=audit.progress,
                error=_error(audit),
                href=audit_path(audit.id),
            )
            for cell, audit in found.cells()
        ],
        links=standing.links,
    )


def _error(audit: Audit) -> AuditError | None:
    if audit.state != AuditState.FAILED:
        return None
    return AuditError(
        code=audit.error_code or "", message=audit.error_message or "", field=audit.error_field
    )


def rows_of(found: ExperimentWithAudits) -> list[Row]:
    """Return the rows of all audits that have succeeded."""
    return [
        row
        for cell, audit in found.cells()
        if audit.state == AuditState.SUCCEEDED
        for row in rows_of_audit(cell, audit.summary, request=found.experiment.request)
    ]


def assemble_results(found: ExperimentWithAudits) -> answers.ExperimentResults:
    """Return the tables of an experiment whose audits have ended."""
    missing = [
        answers.Missing(
            task=cell.task,
            seed=cell.seed,
            audit_id=audit.id,
            state=AuditState(audit.state),
            error=_error(audit),
        )
        for cell, audit in found.cells()
        if audit.state != AuditState.SUCCEEDED
    ]
    rows = rows_of(found)
    return answers.ExperimentResults(
        experiment_id=found.experiment.id,
        is_partial=bool(missing),
        missing=missing,
        win_rates=list(compare_levels(rows)),
        correlations=list(correlate(rows)),
        best=list(choose_best(rows)),
        rows=[assemble_row(row) for row in rows],
    )


def assemble_row(row: Row) -> answers.ResultRow:
    """Return one row with all its numbers."""
    numbers = {**row.detection, **row.cancellation, **row.measured}
    names = answers.ResultRow.model_fields
    said = {name: getattr(row, name) for name in names if name in Row.__dataclass_fields__}
    cell = {"task": row.cell.task, "model": row.cell.model, "seed": row.cell.seed}
    blank = dict.fromkeys(names)
    return answers.ResultRow.model_validate({**blank, **said, **cell, **numbers})


def write_csv(rows: Sequence[Row]) -> str:
    """Return the rows as a table with a header; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, answers.ResultRow.model_fields.keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(assemble_row(row).model_dump() for row in rows)
    return text.getvalue()


def compare_levels(rows: Sequence[Row]) -> Iterator[answers.WinRates]:
    """Yield the tables over all models, then those of each model where there are several."""
    configurations = [row for row in rows if not row.is_baseline]
    models = list(dict.fromkeys(row.cell.model for row in configurations))
    scopes: list[tuple[str | None, list[Row]]] = [(None, configurations)]
    if len(models) > 1:
        scopes += [
            (model, [row for row in configurations if row.cell.model == model]) for model in models
        ]
    for model, members in scopes:
        layer_level = _layer_level(members)
        for factor in get_args(answers.Factor):
            level_of = partial(_level, factor=factor, layer_level=layer_level)
            for measure in MEASURES:
                rates = tables.win_rates(members, measure=measure, factor=factor, level_of=level_of)
                if rates:
                    yield answers.WinRates(
                        factor=factor,
                        measure=measure,
                        model=model,
                        levels=[answers.Level.model_validate(vars(rate)) for rate in rates],
                    )


def _layer_level(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return how layer groups are called: by their names where all models have the same ones."""
    groups: dict[Cell, set[str | None]] = {
        cell: {row.layer_group for row in members} for cell, members in tables.by_cell(rows).items()
    }
    agree = len({frozenset(names) for names in groups.values()}) <= 1
    return lambda row: str(row.layer_group if agree else row.layer_position)


def _level(row: Row, *, factor: str, layer_level: Callable[[Row], str]) -> str:
    names = {
        "estimator": row.estimator,
        "layer_group": layer_level(row),
        "aggregation": str(row.aggregation),
        "correct_only": "correct_only" if row.correct_only else "all_samples",
    }
    if factor != tables.CONFIGURATION:
        return names[factor]
    parts = [names[name] for name in FACTORS[:-1]]
    return "/".join([*parts, "correct_only"] if row.correct_only else parts)


def correlate(rows: Sequence[Row]) -> Iterator[answers.Correlation]:
    """Yield the rank correlations of every predictor with every outcome."""
    configurations = [row for row in rows if not row.is_baseline]
    for over in get_args(answers.Over):
        for predictor in get_args(answers.Predictor):
            for outcome in get_args(answers.Outcome):
                found = CORRELATE[over](configurations, predictor=predictor, outcome=outcome)
                if not any(item.num_points for item in found):
                    continue
                yield answers.Correlation(
                    predictor=predictor,
                    outcome=outcome,
                    over=over,
                    mean=tables.mean_of(item.spearman for item in found),
                    audits=[
                        answers.CellCorrelation(
                            task=item.cell.task,
                            seed=item.cell.seed,
                            spearman=item.spearman,
                            num_points=item.num_points,
                        )
                        for item in found
                    ],
                )


def choose_best(rows: Sequence[Row]) -> Iterator[answers.Best]:
    """Yield the best of every model over its tasks, and of every task."""
    models: dict[str, list[str]] = {}
    for row in rows:
        tasks = models.setdefault(row.cell.model, [])
        if row.cell.task not in tasks:
            tasks.append(row.cell.task)
    for model, tasks in models.items():
        scopes: list[str | None] = [*tasks]
        if len(tasks) > 1:
            scopes.insert(0, None)
        for task in scopes:
            members = [
                row for row in rows if row.cell.model == model and task in {None, row.cell.task}
            ]
            for measure in MEASURES:
                best = tables.best_configuration(members, measure=measure)
                if best is None:
                    continue
                yield answers.Best(
                    model=model,
                    task=task,
                    measure=measure,
                    estimator=best.row.estimator,
                    layer_group=str(best.row.layer_group),
                    aggregation=best.row.aggregation,
                    correct_only=best.row.correct_only,
                    means=dict(best.means),
                    beside={name: dict(means) for name, means in best.beside.items()},
                )
