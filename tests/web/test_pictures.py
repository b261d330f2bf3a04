"""The numbers behind the pictures."""

import pytest

from app.web.names import duration, model_name, score, share
from app.web.pictures import Curve, Histogram, Measured, heat_maps, sparkline


def test_a_line_rises_where_a_sample_is_suspect() -> None:
    heights = [float(point.split(",")[1]) for point in sparkline([0, 50, 99], 100).split()]
    assert heights == sorted(heights)
    assert heights[0] == 2
    assert heights[-1] == 16


def test_one_layer_makes_a_line_too() -> None:
    assert len(sparkline([3], 10).split()) == 2


def test_bars_keep_every_sample() -> None:
    histogram = Histogram([float(i) for i in range(193)], [i % 7 for i in range(192)], [1] * 192)
    bars = histogram.bars()
    assert len(bars) == 48
    assert sum(bar.count for bar in bars) == sum(histogram.counts) == histogram.num_below[-1]
    assert sum(bar.num_flagged for bar in bars) == 192
    assert [bar.low for bar in bars[1:]] == [bar.high for bar in bars[:-1]]


def test_a_rare_bar_can_be_seen() -> None:
    assert Histogram([0, 1, 2], [100_000, 1], [0, 0]).bars()[1].height == 1


def test_a_curve_ends_where_all_is_found() -> None:
    curve = Curve([0.0, 0.5, 1.0])
    assert curve.points() == "0.0,150.0 240.0,75.0 480.0,0.0"
    assert curve.at(0.5) == 0.5


def test_the_columns_of_all_heat_maps_have_one_order() -> None:
    """They stand beside each other, so that a reader compares by place."""
    measured = [
        Measured(estimator, "all", aggregation, 0.5)
        for estimator, order in {"a": ["rank", "vote", "mean"], "b": ["vote", "mean"]}.items()
        for aggregation in order
    ]
    maps = heat_maps(measured, layer_order=["all"], chosen={})
    assert [one.columns for one in maps] == [["mean", "rank", "vote"], ["mean", "vote"]]


def test_a_heat_map_takes_the_better_of_two_and_marks_what_ranks() -> None:
    measured = [
        Measured("a", "all", "mean", 0.5),
        Measured("a", "all", "mean", 0.6),
        Measured("a", "CL", "rank", 0.9),
        Measured("alone", "all", "mean", 0.7),
    ]
    (of,) = heat_maps(measured, layer_order=["CL", "all"], chosen={("a", "CL", "rank"): True})
    assert of.columns == ["mean", "rank"]
    assert [name for name, _ in of.rows] == ["CL", "all"]
    (_, first), (_, second) = of.rows
    assert first[0].value is None
    assert (first[1].value, first[1].shade, first[1].is_chosen) == (0.9, 9, True)
    assert (second[0].value, second[0].shade) == (0.6, 0)


def test_nothing_measured_makes_no_map() -> None:
    assert heat_maps([], layer_order=[], chosen={}) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (share(0.034), "3.4%"),
        (share(0.34), "34%"),
        (share(None), "–"),
        (score(-0.00001234), "-1.23e-05"),
        (score(0.0), "0"),
        (score(12.3456), "12.35"),
        (score(float("-inf")), "-inf"),
        (duration(59.6), "1 min 0 s"),
        (duration(3), "3 s"),
        (duration(3700), "1 h 1 min"),
        (model_name("hf://org/model@main"), "org/model@main"),
        (model_name("hf://datasets/org/texts@main?split=train"), "org/texts@main"),
        (model_name("file:///models/my-model/"), "my-model"),
    ],
)
def test_numbers_and_names_as_people_write_them(written: str, expected: str) -> None:
    assert written == expected
