"""Choosing by probes on sets that leave little to choose by: clear results, or clear refusals."""

from collections.abc import Callable
from typing import Any

import pytest

from app.audits.models import Audit
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.test_automatic_audits import LITTLE, flag_auto, rows_of
from tests.pipeline.test_probes_in_audits import AUTO, CONSENSUS
from tests.pipeline.workplace import Workplace

BOTH = pytest.mark.parametrize("ranking", [AUTO, CONSENSUS], ids=["auto", "consensus"])
FINE_TUNE = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4}
REVIEWS = tiny.reviews(40, seed=0)
INSTRUCTIONS = tiny.instructions(40, seed=0)
Table = dict[str, list[Any]]
Finish = Callable[..., Audit]


def first(table: Table, number: int, **columns: list[Any]) -> Table:
    return {name: values[:number] for name, values in (table | columns).items()}


@pytest.fixture
def finish(workplace: Workplace, models: Models) -> Finish:
    """Run an audit of a small table, of a model that is fine-tuned already or is to be."""

    def finish(
        train: Table,
        *,
        ranking: dict[str, str],
        validation: Table | None = None,
        fine_tune: bool = False,
        **request: Any,
    ) -> Audit:
        is_language_model = "prompt" in train
        model = models.llama if is_language_model else models.classifier
        if validation is not None:
            request["validation"] = workplace.table("validation", validation)
        if is_language_model:
            request["task"] = "causal_lm"
        return workplace.finish(
            workplace.submit(
                models.encoder if fine_tune and not is_language_model else model,
                train=workplace.table("train", train),
                fine_tune=FINE_TUNE if fine_tune else None,
                ranking=ranking,
                flag="auto",
                **request,
            )
        )

    return finish


def assert_ranked(workplace: Workplace, audit: Audit) -> None:
    assert audit.state == "succeeded", (audit.error_code, audit.error_message)
    assert audit.summary["num_flagged"] == flag_auto(audit)
    rows_of(workplace, audit)


def is_refused(audit: Audit) -> bool:
    """Return whether an audit was refused, which is clear: it names a field and what to change."""
    if audit.state != "failed":
        return False
    assert audit.error_code != "internal_error", audit.error_message
    assert (audit.error_field or "").split(".")[0] in {"train", "validation", "ranking", "probes"}
    return True


@BOTH
@pytest.mark.parametrize("label", ["neg", "pos"])
def test_a_training_set_of_one_class(
    workplace: Workplace, finish: Finish, ranking: dict[str, str], label: str
) -> None:
    """The probes have the model's other class."""
    train = REVIEWS | {"label": [label] * 40}
    audit = finish(train, ranking=ranking, validation=tiny.reviews(9, seed=1))
    assert_ranked(workplace, audit)
    assert audit.summary["choice"]["num_probes"] == 8


@BOTH
@pytest.mark.parametrize("label", ["neg", "pos"])
def test_a_validation_set_of_one_class(
    workplace: Workplace, finish: Finish, ranking: dict[str, str], label: str
) -> None:
    assert_ranked(
        workplace,
        finish(REVIEWS, ranking=ranking, validation=first(REVIEWS, 5, label=[label] * 5)),
    )


@BOTH
@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("table", [REVIEWS, INSTRUCTIONS], ids=["classes", "completions"])
def test_a_few_samples(
    workplace: Workplace, finish: Finish, ranking: dict[str, str], number: int, table: Table
) -> None:
    """They are ranked, and that it says little is said. One completion has no wrong one."""
    maker = tiny.instructions if table is INSTRUCTIONS else tiny.reviews
    audit = finish(first(table, number), ranking=ranking, validation=maker(4, seed=1))
    if number == 1 and table is INSTRUCTIONS and is_refused(audit):
        return
    assert_ranked(workplace, audit)
    assert any(LITTLE in warning for warning in audit.summary["warnings"])


@pytest.mark.parametrize("number", [1, 2, 3, 6])
@pytest.mark.parametrize("fine_tune", [False, True], ids=["fine-tuned already", "to be"])
@pytest.mark.parametrize("table", [REVIEWS, INSTRUCTIONS], ids=["classes", "completions"])
def test_a_few_samples_that_stand_in_for_a_validation_set_as_well(
    workplace: Workplace, finish: Finish, number: int, *, fine_tune: bool, table: Table
) -> None:
    """They are ranked, or it is said that there are too few to leave some out."""
    labels = ["neg", "pos"] * 20
    few = first(table, number, **({"label": labels} if "label" in table else {}))
    audit = finish(few, ranking=AUTO, fine_tune=fine_tune)
    if number < 3 and is_refused(audit):
        return
    assert_ranked(workplace, audit)


@BOTH
@pytest.mark.parametrize("table", [REVIEWS, INSTRUCTIONS], ids=["classes", "completions"])
def test_samples_that_are_all_the_same(
    workplace: Workplace, finish: Finish, ranking: dict[str, str], table: Table
) -> None:
    """Ties stand by training index. Of equal completions no wrong one can be made."""
    train = {name: values[:1] * 12 for name, values in table.items()}
    audit = finish(train, ranking=ranking, validation=first(table, 5))
    if table is INSTRUCTIONS and is_refused(audit):
        return
    assert_ranked(workplace, audit)


@BOTH
def test_prompts_that_almost_all_have_the_same_completion(
    workplace: Workplace, finish: Finish, ranking: dict[str, str]
) -> None:
    """The probes that keep theirs are none: fewer are planted than were asked for."""
    train = INSTRUCTIONS | {"completion": ["good"] * 36 + ["bad dull"] * 4}
    audit = finish(
        train, ranking=ranking, validation=tiny.instructions(5, seed=1), probes={"fraction": 0.5}
    )
    assert_ranked(workplace, audit)
    assert 0 < audit.summary["choice"]["num_probes"] < 20


@BOTH
@pytest.mark.parametrize("table", [REVIEWS, INSTRUCTIONS], ids=["classes", "completions"])
def test_one_validation_sample(
    workplace: Workplace, finish: Finish, ranking: dict[str, str], table: Table
) -> None:
    assert_ranked(workplace, finish(first(table, 20), ranking=ranking, validation=first(table, 1)))


@BOTH
def test_pairs_of_duplicates_with_different_labels(
    workplace: Workplace, finish: Finish, ranking: dict[str, str]
) -> None:
    texts = [text for text in REVIEWS["text"][:10] for _ in range(2)]
    train = {"text": texts, "label": ["neg", "pos"] * 10}
    assert_ranked(
        workplace,
        finish(train, ranking=ranking, validation=tiny.reviews(6, seed=1), fine_tune=True),
    )
