import math

import pytest

from workers.influence.estimators.tracin import TracIn


def test_checkpoints_are_weighted_by_their_learning_rates() -> None:
    assert TracIn().weights([1e-3, 5e-4, 1e-4]) == [1e-3, 5e-4, 1e-4]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([], "at least 2 checkpoints, not 0"),
        ([1e-3], "at least 2 checkpoints, not 1"),
        ([1e-3, 0.0], "a learning rate of 0 "),
        ([1e-3, math.nan], "a learning rate of nan"),
        ([1e-3, math.inf], "a learning rate of inf"),
    ],
)
def test_what_cannot_be_a_weight_is_refused(rates: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TracIn().weights(rates)
