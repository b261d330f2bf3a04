import numpy as np
import pytest
from torch import nn

from tests.influence.tiny_models import FAMILIES, tiny_causal_lm, tiny_classifier
from workers.influence.errors import UnsupportedModule
from workers.influence.layers import (
    ALL_LINEAR,
    ModuleSpec,
    Part,
    find_block_stack,
    find_head,
    find_targets,
    find_word_embedding,
    is_linear_like,
    layer_groups,
)


def spec(layer: int | None, part: Part = Part.ATTENTION) -> ModuleSpec:
    return ModuleSpec(f"{part}.{layer}", layer, part, num_parameters=6, shape=(2, 3))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 6, 12, 30])
def test_bands_are_quarters_of_the_depth(num_layers: int) -> None:
    """The same quarters as numpy.array_split, two modules a block."""
    modules = [spec(layer) for layer in range(num_layers) for _ in range(2)]
    groups = layer_groups(modules)
    assert groups.pop("all") == tuple(range(2 * num_layers))
    parts = np.array_split(np.arange(num_layers), min(4, num_layers))
    assert list(groups.values()) == [
        tuple(index for layer in part.tolist() for index in (2 * layer, 2 * layer + 1))
        for part in parts
    ]


def test_bands_are_named_by_first_and_last_block() -> None:
    modules = [spec(None, Part.WORD_EMBEDDING), *(spec(layer) for layer in range(6))]
    modules.append(spec(None, Part.HEAD))
    assert layer_groups(modules) == {
        "all": tuple(range(1, 8)),
        "WE": (0,),
        "00-01": (1, 2),
        "02-03": (3, 4),
        "04": (5,),
        "05": (6,),
        "CL": (7,),
    }


def test_blocks_without_modules_make_no_band() -> None:
    """An adapter on the upper blocks only."""
    assert layer_groups([spec(8), spec(9)]) == {"all": (0, 1), "08": (0,), "09": (1,)}


def test_modules_before_the_blocks_stand_in_all_alone() -> None:
    assert layer_groups([spec(None, Part.OTHER), spec(0)]) == {"all": (0, 1), "00": (1,)}


def test_head_alone_has_no_band() -> None:
    assert layer_groups([spec(None, Part.HEAD)]) == {"all": (0,), "CL": (0,)}


@pytest.mark.parametrize(
    ("family", "name", "head"),
    [
        ("bert", "bert.encoder.layer", ["classifier"]),
        ("roberta", "roberta.encoder.layer", ["classifier.dense", "classifier.out_proj"]),
        ("distilbert", "distilbert.transformer.layer", ["pre_classifier", "classifier"]),
        ("gpt2", "transformer.h", ["score"]),
        ("llama", "model.layers", ["score"]),
        ("qwen3", "model.layers", ["score"]),
        ("mistral", "model.layers", ["score"]),
    ],
)
def test_blocks_and_head_are_found_in_the_module_tree(
    family: str, name: str, head: list[str]
) -> None:
    model = tiny_classifier(family, num_layers=3)
    stack = find_block_stack(model)
    assert (stack.name, stack.num_blocks) == (name, 3)
    assert find_head(model, stack) == head
    query = FAMILIES[family][0]
    found = {
        stack.locate(path)
        for path, module in model.named_modules()
        if is_linear_like(module) and path.endswith(query)
    }
    assert found == {(layer, Part.ATTENTION) for layer in range(3)}
    assert stack.locate(head[-1]) == (None, Part.HEAD)
    assert stack.block_names == tuple(f"{name}.{index}" for index in range(3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(16)])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Experts() for _ in range(3)])
        self.score = nn.Linear(4, 2)


def test_many_experts_are_not_taken_for_blocks() -> None:
    """Sixteen experts stand in each of three blocks."""
    assert find_block_stack(Mixture()).name == "blocks"


def test_module_before_the_blocks_is_no_part_of_the_head() -> None:
    stack = find_block_stack(Mixture())
    assert stack.locate("project") == (None, Part.OTHER)
    assert stack.locate("score") == (None, Part.HEAD)


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "transformer.h"), ("llama", "model.layers"), ("qwen3", "model.layers")],
)
def test_causal_language_models_have_blocks_and_a_head(family: str, name: str) -> None:
    stack = find_block_stack(tiny_causal_lm(family, num_layers=2))
    assert (stack.name, stack.num_blocks) == (name, 2)
    assert stack.locate("lm_head") == (None, Part.HEAD)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], [f"bert.encoder.layer.{index}.attention.self.query" for index in range(2)]),
        (
            ["self.query"],
            [f"bert.encoder.layer.{index}.attention.self.query" for index in range(2)],
        ),
        (["bert.encoder.layer.1.output.dense"], ["bert.encoder.layer.1.output.dense"]),
        (["classifier"], ["classifier"]),
        (["pooler.dense"], ["bert.pooler.dense"]),
        (["classifier", "embeddings.LayerNorm"], ["bert.embeddings.LayerNorm", "classifier"]),
    ],
)
def test_targets_name_modules_inside_the_blocks_first(
    targets: list[str], expected: list[str]
) -> None:
    """In the order of the tree; a name that is nothing there is looked for outside."""
    model = tiny_classifier("bert", num_layers=2)
    assert find_targets(model, find_block_stack(model), targets) == expected


def test_ambiguous_last_parts_stay_inside_the_blocks() -> None:
    """BERT's pooler has a `dense` as well."""
    model = tiny_classifier("bert", num_layers=2)
    found = find_targets(model, find_block_stack(model), ["dense"])
    assert len(found) == 6
    assert all(name.startswith("bert.encoder.layer.") for name in found)


@pytest.mark.parametrize(("family", "number"), [("bert", 6), ("gpt2", 4), ("llama", 7)])
def test_all_linear_means_those_of_the_blocks(family: str, number: int) -> None:
    model = tiny_classifier(family, num_layers=2)
    found = find_targets(model, find_block_stack(model), [ALL_LINEAR])
    assert len(found) == 2 * number


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "bert.embeddings.word_embeddings"),
        ("distilbert", "distilbert.embeddings.word_embeddings"),
        ("gpt2", "transformer.wte"),
        ("llama", "model.embed_tokens"),
    ],
)
def test_word_embedding_is_the_one_of_the_tokens(family: str, name: str) -> None:
    assert find_word_embedding(tiny_classifier(family))[0] == name


def test_model_without_word_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="no word embedding"):
        find_word_embedding(Mixture())


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="no list of transformer blocks"):
        find_block_stack(nn.Sequential(nn.Linear(2, 2)))


def test_parts_are_stable_names() -> None:
    """They are stored with an audit."""
    assert [part.value for part in Part] == ["word_embedding", "attention", "head", "other"]
