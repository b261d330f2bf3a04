"""What must fit together in a ranking: of an audit's request, or asked when the audit has ended."""

from typing import TYPE_CHECKING

from app.audits.automatic import CANDIDATE_AGGREGATIONS, computed_estimators, needs_probes
from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName
from app.errors import FieldConflict

if TYPE_CHECKING:
    from app.audits.schemas import AuditRequest, Configuration, RankingSpecification

# Estimators that need one of these look at other modules than the word embeddings.
_NEEDS_OTHER_MODULES = frozenset({"curvature", "classes", "checkpoints"})

Path = tuple[str | int, ...]


def check_ranking(
    request: "AuditRequest",
    ranking: "RankingSpecification | Configuration",
    *,
    at: Path = (),
) -> None:
    """Check that a ranking's layers fit its estimator, and the audit that it is of.

    Args:
        request: the audit's.
        ranking: its own or a later one.
        at: where the ranking stands in the body that is checked.

    Raises:
        FieldConflict: the field to change, and how.
    """
    if ranking.estimator == CONSENSUS:
        for name in ("layers", "aggregation"):
            if getattr(ranking, name) != AUTO:
                raise FieldConflict(
                    *(*at, name),
                    message=f"a consensus chooses its members itself; leave out {name}",
                )
        return
    if ranking.estimator == EstimatorName.TRACIN:
        for name in ("layers", "aggregation"):
            if getattr(ranking, name) == AUTO:
                raise FieldConflict(
                    *(*at, name),
                    message="the planted probes are scored at one checkpoint and cannot choose "
                    f"for tracin; set {name}, such as "
                    f"{'all' if name == 'layers' else 'rank'}",
                )
    _check_aggregation(ranking, at)
    if ranking.layers != AUTO:
        _check_order(ranking.layers, at)
        if ranking.estimator != AUTO:
            _check_layers(request, ranking, EstimatorName(ranking.estimator), at)
        elif "WE" in ranking.layers.split(","):
            _check_word_embeddings(request, at)


def check_later_ranking(request: "AuditRequest", ranking: "RankingSpecification") -> None:
    """Check a ranking that is asked when the audit has ended against what the audit computed.

    Raises:
        FieldConflict: the field to change, and how.
    """
    stored = request.stored()
    estimator = ESTIMATORS.get(ranking.estimator)
    # the lengths of all gradients are kept with every audit
    there_are = dict.fromkeys([*computed_estimators(stored), EstimatorName.SELF_INFLUENCE.value])
    if estimator is not None and ranking.estimator not in there_are:
        raise FieldConflict(
            "estimator",
            message=f"the audit did not compute {estimator.name.value}; it has "
            f"{', '.join(there_are)}. Choose one of them, or submit an audit with this one among "
            "its estimators",
        )
    chooses = AUTO in {ranking.estimator, ranking.layers, ranking.aggregation}
    chooses = chooses or ranking.estimator == CONSENSUS
    if chooses and not needs_probes(stored) and (estimator is None or estimator.has_layers):
        name = next(
            name
            for name in ("estimator", "layers", "aggregation")
            if getattr(ranking, name) in {AUTO, CONSENSUS}
        )
        raise FieldConflict(
            name,
            message=f"the audit planted no probes, so nothing can be chosen by them; set {name} "
            "yourself, or submit an audit whose ranking or flag is auto",
        )
    check_ranking(request, ranking)


def _check_aggregation(ranking: "RankingSpecification | Configuration", at: Path) -> None:
    """Check that the probes can be ranked by the aggregation where they choose the rest."""
    estimator = ESTIMATORS.get(ranking.estimator)
    if estimator is not None and not estimator.has_layers:
        return
    chooses = AUTO in {ranking.estimator, ranking.layers}
    if chooses and ranking.aggregation not in {AUTO, *CANDIDATE_AGGREGATIONS}:
        raise FieldConflict(
            *(*at, "aggregation"),
            message=f"{ranking.aggregation} cannot rank the planted probes, which choose estimator "
            f"and layers here; set both, or take {', '.join(CANDIDATE_AGGREGATIONS)} or auto",
        )


def _check_order(layers: str, at: Path) -> None:
    for part in layers.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise FieldConflict(
                *(*at, "layers"),
                message=f"the layers {part} end before they begin; write {last}-{first}",
            )


def _check_layers(
    request: "AuditRequest",
    ranking: "RankingSpecification | Configuration",
    name: EstimatorName,
    at: Path,
) -> None:
    estimator = ESTIMATORS[name]
    parts = ranking.layers.split(",")
    the_estimator = f"{'.'.join(map(str, (*at, 'estimator')))} {name.value}"
    the_layers = ".".join(map(str, (*at, "layers")))

    def conflict(message: str) -> FieldConflict:
        return FieldConflict(*at, "layers", message=message)

    if not estimator.has_layers and ranking.layers != "all":
        raise conflict(f"{the_estimator} has no layers; set {the_layers} to all")
    if "word_embeddings" in estimator.needs and ranking.layers != "WE":
        raise conflict(
            f"{the_estimator} looks at the word embeddings alone; set {the_layers} to WE"
        )
    elsewhere = [part for part in parts if part in {"CL", "WE"}]
    if "hidden_states" in estimator.needs and elsewhere:
        raise conflict(
            f"{the_estimator} compares what the transformer blocks put out, and has no layers "
            f"{' and '.join(elsewhere)}; set {the_layers} to all, to a block (04) or to a range "
            "of blocks (02-03)"
        )
    if "WE" not in parts or "word_embeddings" in estimator.needs:
        return
    if not _NEEDS_OTHER_MODULES.isdisjoint(estimator.needs):
        raise conflict(
            f"{the_estimator} does not look at the word embeddings; leave WE out of {the_layers}, "
            "or rank by grad_dot, grad_cosine or tracin_we"
        )
    _check_word_embeddings(request, at)


def _check_word_embeddings(request: "AuditRequest", at: Path) -> None:
    if not request.model.word_embeddings:
        where = "" if at else " in another audit"
        raise FieldConflict(
            *(*at, "layers"),
            message="the gradients of the word embeddings are not taken; set "
            f"model.word_embeddings to true{where}, or leave WE out of "
            f"{'.'.join(map(str, (*at, 'layers')))}",
        )
