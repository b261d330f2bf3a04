"""What the engine gives for a case.

Shapes: V validation samples, T training samples, d entries of a module.
"""

from dataclasses import dataclass

from tests.independent.cases import Case, Sample, batches, inputs_of
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.influence.kronecker import KroneckerSums
from workers.influence.layers import ModuleSpec
from workers.influence.objectives import CausalLanguageModel, Classification
from workers.influence.rows import GradientRows


@dataclass(frozen=True)
class ModuleGradients:
    """One module's gradients of all samples of a case.

    Attributes:
        spec: the module.
        train: gradients of the training samples.
        validation: gradients of the validation samples.
        kronecker: sums over the training tokens, where the module is a matrix.
    """

    spec: ModuleSpec
    train: GradientRows
    validation: GradientRows
    kronecker: KroneckerSums | None


def engine_gradients(case: Case) -> dict[str, ModuleGradients]:
    """Take the gradients in padded batches, by module name."""
    objective = CausalLanguageModel() if case.has_token_labels else Classification()
    with GradientExtractor(
        case.build(), objective=objective, kronecker=True, **case.options
    ) as extractor:

        def extract(samples: list[Sample]) -> list[SampleGradients]:
            return [
                extractor.extract(inputs_of(batch), batch["labels"]) for batch in batches(samples)
            ]

        train, validation = extract(case.train), extract(case.validation)
        return {
            spec.name: ModuleGradients(
                spec=spec,
                train=_joined(train, position),
                validation=_joined(validation, position),
                kronecker=_sum(train, position),
            )
            for position, spec in enumerate(extractor.modules)
        }


def _joined(parts: list[SampleGradients], position: int) -> GradientRows:
    return GradientRows.concatenate([part.gradients[position] for part in parts])


def _sum(parts: list[SampleGradients], position: int) -> KroneckerSums | None:
    total = None
    for part in parts:
        sums = part.kronecker[position]
        if sums is not None:
            total = sums if total is None else total + sums
    return total
