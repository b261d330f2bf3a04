import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from workers.influence.evaluation import auc_ndr, noise_detection_curve, noise_detection_rate

rankings = st.lists(
    st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=1, max_size=40
).filter(lambda rows: any(noisy for _, noisy in rows))


@settings(deadline=None, derandomize=True)
@given(rows=rankings, fraction=st.floats(0, 1))
def test_metrics_equal_their_definition(rows: list[tuple[float, bool]], fraction: float) -> None:
    """With many ties, which the training index breaks."""
    scores, noisy = zip(*rows, strict=True)
    score_T, is_noisy_T = torch.tensor(scores), torch.tensor(noisy)
    rates = oracles.noise_detection_rates(scores, noisy)
    assert noise_detection_curve(score_T, is_noisy_T).tolist() == pytest.approx(rates)
    assert auc_ndr(score_T, is_noisy_T) == pytest.approx(oracles.auc_ndr(scores, noisy))
    cut = round(fraction * len(rows))
    expected = rates[cut - 1] if cut else 0.0
    assert noise_detection_rate(score_T, is_noisy_T, fraction=fraction) == pytest.approx(expected)


@settings(deadline=None, derandomize=True)
@given(num_noisy=st.integers(1, 500), num_clean=st.integers(0, 2000))
def test_all_noise_first_is_exactly_one(num_noisy: int, num_clean: int) -> None:
    score_T = torch.arange(num_noisy + num_clean).float()
    is_noisy_T = score_T < num_noisy
    assert auc_ndr(score_T, is_noisy_T) == 1.0
    if num_clean:
        assert auc_ndr(-score_T, is_noisy_T) < 1.0


def test_the_cut_counts_no_sample_too_many() -> None:
    """The lowest 20 % of ten samples are two."""
    score_T = torch.arange(10.0)
    is_noisy_T = torch.tensor([True, False, True] + [False] * 7)
    assert noise_detection_rate(score_T, is_noisy_T, fraction=0.2) == 0.5
    assert noise_detection_rate(score_T, is_noisy_T, fraction=0.3) == 1.0


def test_no_known_noise_is_an_error() -> None:
    for metric in (auc_ndr, noise_detection_curve):
        with pytest.raises(ValueError, match="no sample is marked as noisy"):
            metric(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="not between 0 and 1"):
        noise_detection_rate(torch.zeros(1), torch.ones(1, dtype=torch.bool), fraction=1.5)
