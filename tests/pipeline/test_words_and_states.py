"""Influence by word embeddings and by hidden states, in whole audits, equals slow loops.

Shapes: L blocks, T training samples, V validation samples, E = W · H entries of the embeddings of W
words, H width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.influence import estimator_oracles as slow
from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import (
    DOTS,
    TRAIN,
    VALIDATION,
    WORD_EMBEDDING,
    assert_mean_scores,
    assert_near,
    audit_of,
    module_names,
    read_influence,
)
from tests.pipeline.workplace import Workplace


@pytest.fixture(scope="module")
def words(models: Models) -> tuple[Tensor, Tensor]:
    """Dense gradients of the word embeddings at the adapter: [T, W · H] and [V, W · H]."""
    model = loops.classifier(models.encoder, models.adapter)
    model.get_input_embeddings().weight.requires_grad_(requires_grad=True)
    train, validation = (loops.review_gradients(model, table) for table in (TRAIN, VALIDATION))
    return train[WORD_EMBEDDING], validation[WORD_EMBEDDING]


def strongest(gradient_NE: Tensor, table: dict[str, Any], k: int) -> Tensor:
    """Keep the rows of the k words of every text with the largest gradient per occurrence."""
    rows = [
        slow.strongest_words(
            gradient_E.double().view(len(tiny.VOCABULARY), -1),
            [ids.count(word) for word in range(len(tiny.VOCABULARY))],
            k,
        )
        for gradient_E, ids in zip(gradient_NE, loops.review_ids(table), strict=True)
    ]
    return torch.stack(rows).flatten(1)


def test_tracin_on_word_embeddings(
    workplace: Workplace, models: Models, words: tuple[Tensor, Tensor]
) -> None:
    """The sparse products equal those of the dense gradients; the one group is WE."""
    train_TE, validation_VE = words
    audit = audit_of(
        workplace,
        models,
        "tracin_we",
        "tracin_we_topk",
        "grad_dot",
        ranking={"layers": "WE"},
        estimator_parameters={"tracin_we_topk": {"num_tokens": 3}},
    )
    assert_near(
        read_influence(workplace, audit, "tracin_we")[0],
        slow.pairs(validation_VE, train_TE, lambda v, g: float(v @ g)),
    )
    assert_near(
        read_influence(workplace, audit, "tracin_we_topk")[0],
        slow.pairs(
            strongest(validation_VE, VALIDATION, 3),
            strongest(train_TE, TRAIN, 3),
            lambda v, g: float(v @ g),
        ),
    )
    assert audit.summary["group_order"] == ["WE"]
    # not asked for in the request, so dot products leave the embeddings alone
    assert len(read_influence(workplace, audit, "grad_dot")) == 10
    groups = {
        (c["estimator"], c["layer_group"])
        for c in audit.summary["configurations"]
        if c["layer_group"] == "WE"
    }
    assert groups == {("tracin_we", "WE"), ("tracin_we_topk", "WE")}


WORD_DOTS = DOTS | {
    # the matrix of the definition is too large: by its closed form
    "datainf_self": lambda v, g: (
        (v.double() @ g.double().T)
        / g.double().square().sum(dim=1)
        * (g.shape[1] / (0.1 + g.shape[1]))
    ),
}


def test_word_embeddings_give_dot_products_one_more_group(
    workplace: Workplace, models: Models, words: tuple[Tensor, Tensor]
) -> None:
    """The group WE stands apart: `all` has the modules that it has without them."""
    train_TE, validation_VE = words
    asked = [*WORD_DOTS, "self_influence", "gauss_newton"]
    audit = audit_of(
        workplace,
        models,
        "grad_dot",
        *asked,
        source={"word_embeddings": True},
        ranking={"layers": "WE"},
    )
    names = module_names(workplace, audit)
    assert names[-1] == WORD_EMBEDDING
    assert WORD_EMBEDDING not in audit.summary["layer_groups"]["all"]
    for name, oracle in WORD_DOTS.items():
        influence_MVT = read_influence(workplace, audit, name)
        assert len(influence_MVT) == len(names)
        assert_near(influence_MVT[-1], oracle(validation_VE, train_TE))
    assert len(read_influence(workplace, audit, "gauss_newton")) == len(names) - 1
    with_words = {
        c["estimator"] for c in audit.summary["configurations"] if c["layer_group"] == "WE"
    }
    assert with_words == {*WORD_DOTS, "self_influence"}
    assert_mean_scores(workplace, audit, read_influence(workplace, audit, "grad_dot")[-1:])


def test_repsim_is_the_cosine_of_what_the_blocks_put_out_at_the_first_token(
    workplace: Workplace, models: Models
) -> None:
    audit = audit_of(workplace, models, "repsim", ranking={"layers": "01"})
    model = loops.classifier(models.encoder, models.adapter)

    def read(table: dict[str, Any]) -> Tensor:
        rows = []
        for ids in loops.review_ids(table):
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            rows.append(torch.stack([state[0, 0] for state in output.hidden_states[1:]]))
        return torch.stack(rows, dim=1).detach()

    train_LTH, validation_LVH = read(TRAIN), read(VALIDATION)
    influence_LVT = read_influence(workplace, audit, "repsim")
    assert len(influence_LVT) == 2
    for block, influence_VT in enumerate(influence_LVT):
        assert_near(influence_VT, slow.pairs(validation_LVH[block], train_LTH[block], slow.cosine))
    assert audit.summary["group_order"] == ["all", "00", "01"]
    assert_mean_scores(workplace, audit, influence_LVT[1:])


def test_repsim_of_a_language_model_reads_the_last_token(
    workplace: Workplace, models: Models
) -> None:
    """What the last block puts out, before the norm that follows it."""
    train, validation = tiny.instructions(26, seed=0), tiny.instructions(7, seed=1)
    audit = workplace.succeed(
        workplace.submit(
            models.llama,
            adapter=models.llama_adapter,
            task="causal_lm",
            train=workplace.table("train", train),
            validation=workplace.table("validation", validation),
            ranking={"estimator": "repsim"},
        )
    )
    model = loops.language_model(models.llama, models.llama_adapter)
    blocks = [m for name, m in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    states: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda *call: states.append(call[-1]))

    def read(table: dict[str, Any]) -> Tensor:
        rows = []
        for ids in loops.instruction_ids(table)[0]:
            states.clear()
            model(input_ids=torch.tensor([ids]))
            rows.append(torch.stack([state[0, -1] for state in states]))
        return torch.stack(rows, dim=1).detach()

    train_LTH, validation_LVH = read(train), read(validation)
    for block, influence_VT in enumerate(read_influence(workplace, audit, "repsim")):
        assert_near(influence_VT, slow.pairs(validation_LVH[block], train_LTH[block], slow.cosine))
