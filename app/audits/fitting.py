"""What must fit together in an audit's request: between its fields, before any file is read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName
from app.errors import FieldConflict

if TYPE_CHECKING:
    from app.audits.schemas import AuditRequest

MAX_METADATA_KEYS = 50
MIN_CHECKPOINTS = 2
# Estimators that need one of these look at other modules than the word embeddings.
_NEEDS_OTHER_MODULES = frozenset({"curvature", "classes", "checkpoints"})

Path = tuple[str | int, ...]


def check_fits_together(request: "AuditRequest") -> None:
    """Check what the fields say of one another.

    Raises:
        FieldConflict: the field to change, and how.
    """
    _check_model(request)
    _check_columns(request)
    _check_choice(request)
    if request.ranking.estimator not in {AUTO, CONSENSUS} and request.ranking.layers != AUTO:
        _check_layers(request, EstimatorName(request.ranking.estimator))
    for path, name in named_estimators(request):
        _check_needs(request, path, name)
    _check_parameters(request)
    if len(request.metadata) > MAX_METADATA_KEYS:
        raise FieldConflict("metadata", message=f"metadata has more than {MAX_METADATA_KEYS} keys")


def named_estimators(request: "AuditRequest") -> Iterator[tuple[Path, EstimatorName]]:
    """Yield every estimator that the request names, and where."""
    if request.estimators != AUTO:
        for place, name in enumerate(request.estimators):
            yield ("estimators", place), name
    if request.ranking.estimator not in {AUTO, CONSENSUS}:
        yield ("ranking", "estimator"), EstimatorName(request.ranking.estimator)


def _check_model(request: "AuditRequest") -> None:
    model, has_adapter = request.model, bool(request.model.adapter or request.fine_tune)
    if model.adapter and request.fine_tune:
        raise FieldConflict(
            "fine_tune",
            message="fine_tune starts from a base model; leave out either fine_tune or "
            "model.adapter",
        )
    if model.target_modules and has_adapter:
        raise FieldConflict(
            *("model", "target_modules"),
            message="model.target_modules is for a model that was fine-tuned in full; with "
            "adapters their own modules are used (fine_tune.target_modules chooses them)",
        )
    if model.projection and has_adapter:
        raise FieldConflict(
            *("model", "projection"),
            message="model.projection is for a model that was fine-tuned in full; the gradients "
            "of adapters are small and always exact",
        )
    if model.checkpoints and not model.adapter:
        raise FieldConflict(
            *("model", "checkpoints"),
            message="model.checkpoints are earlier states of model.adapter; name the final "
            "adapter there, or leave out model.checkpoints (with fine_tune its epochs are the "
            "checkpoints)",
        )


def _check_columns(request: "AuditRequest") -> None:
    for name, source in (("train", request.train), ("validation", request.validation)):
        if source is None or source.columns is None:
            continue
        is_labelled = source.columns.kind == "classification"
        if is_labelled != (request.task == "classification"):
            raise FieldConflict(
                *(name, "columns"),
                message="a classification audit reads columns text and label, a causal_lm audit "
                f"prompt and completion, or messages; {name}.columns does not fit task "
                f"{request.task}",
            )
    if request.validation and request.validation.columns and request.validation.columns.noise:
        raise FieldConflict(
            *("validation", "columns", "noise"),
            message="the validation set is trusted: leave out validation.columns.noise",
        )
    if request.plant_noise and request.train.columns and request.train.columns.noise:
        raise FieldConflict(
            "plant_noise",
            message="train.columns.noise names known noise and plant_noise adds more; use one of "
            "them",
        )


def _check_choice(request: "AuditRequest") -> None:
    """Check what `auto` and `consensus` may choose."""
    ranking = request.ranking
    if ranking.estimator == CONSENSUS:
        for name in ("layers", "aggregation"):
            if getattr(ranking, name) != AUTO:
                raise FieldConflict(
                    *("ranking", name),
                    message=f"a consensus chooses its members itself; leave out ranking.{name}",
                )
    if ranking.estimator in {AUTO, CONSENSUS} and request.estimators == []:
        raise FieldConflict(
            "estimators",
            message="there is nothing to choose among: name estimators, or leave them out",
        )
    if ranking.estimator == EstimatorName.TRACIN and AUTO in {ranking.layers, ranking.aggregation}:
        name = "layers" if ranking.layers == AUTO else "aggregation"
        raise FieldConflict(
            *("ranking", name),
            message="the planted probes are scored at one checkpoint, so they cannot choose for "
            f"tracin: set ranking.{name} yourself (all, rank)",
        )


def _check_layers(request: "AuditRequest", name: EstimatorName) -> None:
    ranking, estimator = request.ranking, ESTIMATORS[name]
    parts = ranking.layers.split(",")
    for part in parts:
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise FieldConflict(
                *("ranking", "layers"),
                message=f"the layers {part} end before they begin; write {last}-{first}",
            )
    if not estimator.has_layers and ranking.layers != "all":
        raise FieldConflict(
            *("ranking", "layers"),
            message=f"ranking.estimator {name.value} has no layers; set ranking.layers to all",
        )
    if "word_embeddings" in estimator.needs and ranking.layers != "WE":
        raise FieldConflict(
            *("ranking", "layers"),
            message=f"ranking.estimator {name.value} looks at the word embeddings "
            "alone; set ranking.layers to WE",
        )
    elsewhere = [part for part in parts if part in {"CL", "WE"}]
    if "hidden_states" in estimator.needs and elsewhere:
        raise FieldConflict(
            *("ranking", "layers"),
            message=f"ranking.estimator {name.value} compares what the transformer "
            f"blocks put out, and has no layers {' and '.join(elsewhere)}; set ranking.layers to "
            "all, to a block (04) or to a range of blocks (02-03)",
        )
    if "WE" in parts and "word_embeddings" not in estimator.needs:
        _check_word_embeddings(request, name)


def _check_word_embeddings(request: "AuditRequest", name: EstimatorName) -> None:
    if not _NEEDS_OTHER_MODULES.isdisjoint(ESTIMATORS[name].needs):
        raise FieldConflict(
            *("ranking", "layers"),
            message=f"ranking.estimator {name.value} does not look at the word embeddings; leave "
            "WE out of ranking.layers, or rank by grad_dot, grad_cosine or tracin_we",
        )
    if not request.model.word_embeddings:
        raise FieldConflict(
            *("ranking", "layers"),
            message="the gradients of the word embeddings are not taken; set "
            "model.word_embeddings to true, or leave WE out of ranking.layers",
        )


def _check_needs(request: "AuditRequest", path: Path, name: EstimatorName) -> None:
    needs = ESTIMATORS[name].needs
    if "checkpoints" in needs and not _has_checkpoints(request):
        raise FieldConflict(
            *path,
            message=f"the estimator {name.value} needs at least {MIN_CHECKPOINTS} checkpoints: "
            "fine-tune with fine_tune.epochs of 2 or more, or name adapters in model.checkpoints",
        )
    if "classes" in needs and request.task != "classification":
        raise FieldConflict(
            *path,
            message=f"the estimator {name.value} needs classes, which a causal language model "
            "does not have; leave it out",
        )


def _has_checkpoints(request: "AuditRequest") -> bool:
    if request.fine_tune is not None:
        return request.fine_tune.epochs >= MIN_CHECKPOINTS
    return request.model.checkpoints is not None


def _check_parameters(request: "AuditRequest") -> None:
    for name, values in request.estimator_parameters.items():
        known = {parameter.name: parameter for parameter in ESTIMATORS[name].parameters}
        for parameter_name, value in values.items():
            path = ("estimator_parameters", name.value, parameter_name)
            parameter = known.get(parameter_name)
            if parameter is None:
                has = f"has {', '.join(known)}" if known else "has none"
                raise FieldConflict(
                    *path,
                    message=f"the estimator {name.value} has no parameter {parameter_name!r}; "
                    f"it {has}",
                )
            if not parameter.minimum <= value <= parameter.maximum:
                raise FieldConflict(
                    *path,
                    message=f"{parameter_name} is {value:g}; it goes from {parameter.minimum:g} "
                    f"to {parameter.maximum:g}",
                )
            if parameter.is_whole and value != int(value):
                raise FieldConflict(
                    *path, message=f"{parameter_name} is {value:g}; it must be a whole number"
                )
