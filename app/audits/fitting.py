"""What must fit together in an audit's request: between its fields, before any file is read."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from app.audits.automatic import computed_estimators
from app.audits.ranking_fitting import Path, check_ranking
from app.audits.verification_schemas import ArmName, Configurations
from app.catalogue import AUTO, CONSENSUS, ESTIMATORS, EstimatorName
from app.errors import FieldConflict

if TYPE_CHECKING:
    from app.audits.schemas import AuditRequest, Configuration, RankingSpecification

MAX_METADATA_KEYS = 50
MIN_CHECKPOINTS = 2


def check_fits_together(request: "AuditRequest") -> None:
    """Check what the fields say of one another.

    Raises:
        FieldConflict: the field to change, and how.
    """
    _check_model(request)
    _check_columns(request)
    _check_verification(request)
    _check_layer_groups(request)
    for path, ranking in named_rankings(request):
        check_ranking(request, ranking, at=path)
    if request.ranking.estimator in {AUTO, CONSENSUS} and request.estimators == []:
        raise FieldConflict(
            "estimators",
            message="there is nothing to choose among: name estimators, or leave them out",
        )
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
    for path, ranking in named_rankings(request):
        if ranking.estimator not in {AUTO, CONSENSUS}:
            yield (*path, "estimator"), EstimatorName(ranking.estimator)


def named_rankings(
    request: "AuditRequest",
) -> Iterator[tuple[Path, "RankingSpecification | Configuration"]]:
    """Yield the audit's own ranking and those that are verified beside it, and where."""
    yield ("ranking",), request.ranking
    for place, ranking in enumerate(request.verify.rankings if request.verify else ()):
        yield ("verify", "rankings", place), ranking


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
    if model.quantization and not has_adapter:
        raise FieldConflict(
            *("model", "quantization"),
            message="model.quantization is for a base model with an adapter: name model.adapter "
            "or fine_tune, or leave it out",
        )
    if model.checkpoints and not model.adapter:
        raise FieldConflict(
            *("model", "checkpoints"),
            message="model.checkpoints are earlier states of model.adapter; name the final "
            "adapter there, or leave out model.checkpoints (with fine_tune its epochs are the "
            "checkpoints)",
        )


def _check_columns(request: "AuditRequest") -> None:
    sources = {"train": request.train, "validation": request.validation, "test": request.test}
    for name, source in sources.items():
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
    for name in ("validation", "test"):
        source = sources[name]
        if source and source.columns and source.columns.noise:
            raise FieldConflict(
                *(name, "columns", "noise"),
                message=f"the {name} set is trusted: leave out {name}.columns.noise",
            )
    if request.plant_noise and request.train.columns and request.train.columns.noise:
        raise FieldConflict(
            "plant_noise",
            message="train.columns.noise names known noise and plant_noise adds more; use one of "
            "them",
        )


def _check_configurations(request: "AuditRequest", configurations: Configurations) -> None:
    """Check that the configurations to verify are among those that the audit computes."""
    aggregations = [*request.aggregations, request.ranking.aggregation]
    lists: tuple[tuple[str, Sequence[StrEnum], Sequence[str]], ...] = (
        ("estimators", configurations.estimators or (), computed_estimators(request.stored())),
        ("aggregations", configurations.aggregations or (), aggregations),
    )
    for field, asked, there_are in lists:
        for place, name in enumerate(asked):
            if name not in there_are:
                raise FieldConflict(
                    *("verify", "configurations", field, place),
                    message=f"the audit does not compute {name.value}; add it to {field}, or leave "
                    "it out here",
                )


def _check_layer_groups(request: "AuditRequest") -> None:
    """Check the layers that the table is asked for, as far as no model is needed."""
    named = [name for _, name in named_estimators(request)]
    needs = {need for name in named for need in ESTIMATORS[name].needs}
    looks_at_words = request.model.word_embeddings or "word_embeddings" in needs
    seen: set[str] = set()
    for place, layers in enumerate(request.layer_groups or ()):
        message = None
        if layers in seen:
            message = f"the layers {layers} stand here twice; name them once"
        if "WE" in layers.split(",") and not looks_at_words:
            message = (
                "the gradients of the word embeddings are not taken; set model.word_embeddings to "
                "true, or leave WE out of layer_groups"
            )
        for part in layers.split(","):
            first, _, last = part.partition("-")
            if last and int(last) < int(first):
                message = f"the layers {part} end before they begin; write {last}-{first}"
        if message is not None:
            raise FieldConflict("layer_groups", place, message=message)
        seen.add(layers)


def _check_verification(request: "AuditRequest") -> None:
    verify, test = request.verify, request.test
    if verify is None:
        if test is not None:
            raise FieldConflict(
                "test", message="only verify reads the test set; add verify, or leave out test"
            )
        return
    if test is None:
        raise FieldConflict(
            "test", message="verify measures on a test set that took no part: name one in test"
        )
    if request.fine_tune is None:
        raise FieldConflict(
            "fine_tune",
            message="verify fine-tunes again from where the audit did, and this audit does not "
            "fine-tune; add fine_tune and name the base model, or leave out verify",
        )
    others = {"train": request.train, "validation": request.validation}
    for name, source in others.items():
        if source is not None and source.reference == test.reference:
            raise FieldConflict(
                *("test", "reference"),
                message=f"the test set takes no part in the audit, but this is {name}.reference; "
                "name a set of other samples",
            )
    if verify.configurations is not None:
        _check_configurations(request, verify.configurations)
    if request.task != "classification" and ArmName.RELABELLED in (verify.arms or ()):
        raise FieldConflict(
            *("verify", "arms", (verify.arms or []).index(ArmName.RELABELLED)),
            message="relabelled needs classes, which a causal language model does not have; leave "
            "it out",
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
