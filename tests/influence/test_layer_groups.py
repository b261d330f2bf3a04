import pytest

from workers.influence.layer_groups import UnknownLayers, resolve_layers

LAYERS = [0, 0, 1, 2, 2, 3, 5, None, None, None]
GROUPS = {"all": range(9), "WE": [9], "00-01": [0, 1, 2], "CL": [7, 8]}


def resolve(expression: str) -> tuple[int, ...]:
    return resolve_layers(expression, groups=GROUPS, layers=LAYERS, num_blocks=7)


@pytest.mark.parametrize(
    ("expression", "positions"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        ("WE", (9,)),
        ("00-01", (0, 1, 2)),
        ("02", (3, 4)),
        ("2", (3, 4)),
        ("02-03", (3, 4, 5)),
        ("03-04", (5,)),
        ("02-03,05,CL", (3, 4, 5, 6, 7, 8)),
        ("CL,02,02-02", (3, 4, 7, 8)),
        ("all,WE", tuple(range(10))),
        ("00-06", (0, 1, 2, 3, 4, 5, 6)),
    ],
)
def test_expressions_name_modules(expression: str, positions: tuple[int, ...]) -> None:
    """Unions of groups, blocks and ranges with both ends, each module once."""
    assert resolve(expression) == positions


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("head", "there are no layers 'head' here; there are all, WE, 00-01, CL and the blocks"),
        ("02,,03", "there are no layers ''"),
        ("01-02-03", "there are no layers '01-02-03'"),
        ("-3", "there are no layers '-3'"),
        ("03-02", "the layers '03-02' end before they begin"),
        ("07", "there is no block 07 for the layers '07': the model has 7, counted from 00"),
        ("02-12", "there is no block 12"),
        ("04", "no gradients are taken in the layers '04'; .* the blocks 00, 01, 02, 03, 05"),
    ],
)
def test_what_names_nothing_is_refused(expression: str, message: str) -> None:
    with pytest.raises(UnknownLayers, match=message):
        resolve(expression)


def test_the_answer_tells_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"there are WE\.$"):
        resolve_layers("all", groups={"WE": [0]}, layers=[None], num_blocks=7)
    with pytest.raises(ValueError, match=r"there are all and the blocks 00 to 03\.$"):
        resolve_layers("CL", groups={"all": range(4)}, layers=range(4), num_blocks=4)
