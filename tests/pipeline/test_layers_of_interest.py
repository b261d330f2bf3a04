"""An audit that names its layers computes the gradients of these alone."""

import torch

from tests.pipeline.conftest import Models
from tests.pipeline.loops import audit_of, module_names, read_influence, sets
from tests.pipeline.workplace import Workplace

BOTH = ("gauss_newton", "grad_cosine")


def test_its_influence_is_that_of_an_audit_of_all_layers(
    workplace: Workplace, models: Models
) -> None:
    whole = audit_of(workplace, models, *BOTH)
    some = audit_of(
        workplace,
        models,
        *BOTH,
        layer_groups=["CL"],
        ranking={"layers": "01", "correct_only": True},
    )
    names, kept = module_names(workplace, whole), module_names(workplace, some)
    assert 0 < len(kept) < len(names)
    groups = some.summary["layer_groups"]
    assert groups.pop("all") == []  # of the loss, which has no layers
    assert set(groups) == {"01", "CL"}
    for estimator in BOTH:
        expected = read_influence(workplace, whole, estimator)[[names.index(name) for name in kept]]
        torch.testing.assert_close(read_influence(workplace, some, estimator), expected)


def test_where_winnow_chooses_the_layers_all_of_them_are_computed(
    workplace: Workplace, models: Models
) -> None:
    audit = audit_of(
        workplace, models, "grad_cosine", layer_groups=["CL"], ranking={"layers": "auto"}
    )
    whole = audit_of(workplace, models, "grad_cosine")
    assert module_names(workplace, audit) == module_names(workplace, whole)


def test_layers_that_are_not_there_are_refused_as_ever(
    workplace: Workplace, models: Models
) -> None:
    audit = workplace.finish(
        workplace.submit(
            models.encoder,
            adapter=models.adapter,
            **sets(workplace),
            estimators=["grad_dot"],
            layer_groups=["CL", "09"],
        )
    )
    assert (audit.error_code, audit.error_field) == ("unknown_layers", "layer_groups.1")
    assert audit.error_message is not None
    assert "there are all, " in audit.error_message
