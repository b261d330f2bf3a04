"""What the demo prints of a finished audit: its choice, suspects, layers and baselines."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table
from winnow import AuditResults, Detection, LayerResult, LayerTable, Suspect

AGGREGATIONS = ("mean", "rank", "vote")


def suspect_table(suspects: Sequence[Suspect], *, width: int) -> Table:
    """Return the most suspect samples, in a table as wide as the terminal."""
    table = Table(title=f"The {len(suspects)} most suspect training samples", title_justify="left")
    for heading in ("#", "text", "given", "model says", "score", "planted"):
        table.add_column(heading, justify="right" if heading in "# score" else "left", no_wrap=True)
    text_width = max(20, width - 56)  # what the other columns and the frame leave
    for suspect in suspects:
        text = suspect.text
        table.add_row(
            str(suspect.rank + 1),
            escape(text if len(text) <= text_width else text[: text_width - 1] + "…"),
            suspect.given_label,
            f"{suspect.predicted_label} {suspect.predicted_probability:.0%}",
            f"{suspect.score:#,.4g}",
            "yes" if suspect.is_noisy else "-",
            style=None if suspect.is_noisy else "dim",
        )
    return table


def layer_table(layers: LayerTable) -> Table:
    """Return how well each estimator × layer group × aggregation found the planted noise."""
    pairwise = {
        (row.estimator, row.layer_group, row.aggregation): row.detection
        for row in layers.data
        if row.aggregation is not None and not row.correct_only and row.detection is not None
    }
    best = {
        estimator: max(
            detection.auc_ndr for (name, _, _), detection in pairwise.items() if name == estimator
        )
        for estimator, _, _ in pairwise
    }
    table = Table(
        title="Planted labels found, in %: NDR@10 NDR@20 NDR@30 · AUC-NDR (best in green)",
        title_justify="left",
    )
    table.add_column("estimator")
    table.add_column("layers")
    for aggregation in AGGREGATIONS:
        table.add_column(aggregation, justify="right")
    for estimator, best_auc in best.items():
        for group in layers.layer_groups:
            cells = []
            for aggregation in AGGREGATIONS:
                detection = pairwise.get((estimator, group, aggregation))
                cell = detection_cell(detection)
                is_best = detection is not None and detection.auc_ndr == best_auc
                cells.append(f"[bold green]{cell}[/]" if is_best else cell)
            table.add_row(estimator, group, *cells, end_section=group == [*layers.layer_groups][-1])
    return table


def comparison_table(layers: LayerTable, results: AuditResults) -> Table:
    """Return the audit's ranking beside the best configuration, the baselines and chance."""
    table = Table(title="Beside the baselines", title_justify="left")
    for heading in ("ranking", "NDR@10", "NDR@20", "NDR@30", "AUC-NDR"):
        table.add_column(heading, justify="left" if heading == "ranking" else "right")

    def add(name: str, detection: Detection | None, *, style: str | None = None) -> None:
        if detection is not None:
            shares = (detection.ndr_10, detection.ndr_20, detection.ndr_30)
            numbers = [*(f"{share:.1%}" for share in shares), f"{detection.auc_ndr:.3f}"]
            table.add_row(name, *numbers, style=style)

    add(f"chosen by the probes: {chosen_name(results)}", results.detection, style="bold")
    measured = [row for row in layers.data if row.detection is not None]
    influence = [row for row in measured if row.aggregation is not None]
    if influence:
        best = max(influence, key=auc_ndr)
        add(f"best in hindsight: {name_of(best)}", best.detection)
    for row in sorted((row for row in measured if row.aggregation is None), key=auc_ndr):
        add(name_of(row), row.detection)
    return table


def detection_cell(detection: Detection | None) -> str:
    """Return the four figures of one configuration as percentages."""
    if detection is None:
        return ""
    shares = (detection.ndr_10, detection.ndr_20, detection.ndr_30)
    return " ".join(f"{100 * share:3.0f}" for share in shares) + f" · {100 * detection.auc_ndr:.1f}"


def auc_ndr(row: LayerResult) -> float:
    """Return a configuration's AUC-NDR."""
    assert row.detection is not None
    return row.detection.auc_ndr


def name_of(row: LayerResult) -> str:
    """Return a configuration in words."""
    if row.aggregation is None:
        return row.estimator
    return in_words(row.estimator, row.layer_group, row.aggregation, correct_only=row.correct_only)


def chosen_name(results: AuditResults) -> str:
    """Return what ranks in words."""
    assert results.choice is not None
    chosen = results.choice.members[0]
    return in_words(
        chosen.estimator, chosen.layers, chosen.aggregation, correct_only=chosen.correct_only
    )


def in_words(*parts: object, correct_only: bool | None) -> str:
    """Join the parts of a configuration; `correct_only` is of the validation samples."""
    return ", ".join(map(str, [*parts, *(["correct only"] if correct_only else [])]))


def choice_text(results: AuditResults) -> str:
    """Tell what was chosen and why, and how much seems to be wrong."""
    choice, noise = results.choice, results.noise
    assert choice is not None
    told = (
        f"{choice.num_probes} probes with wrong labels chose [bold]{chosen_name(results)}[/]: it "
        f"finds them with AUC-NDR {choice.members[0].auc_ndr:.3f} (chance {choice.chance:.3f})."
    )
    if noise is not None:
        told += (
            f"\nAbout [bold]{noise.share:.0%}[/] of the labels seem to be wrong "
            f"({noise.low:.0%} to {noise.high:.0%}); 20% are. "
            f"{results.num_flagged} samples are flagged."
        )
    return told
