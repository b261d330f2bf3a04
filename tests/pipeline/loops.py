"""What an audit should have computed: loops over unpadded samples, through the models as saved.

Everything is in float64 and comes from the user's tables, not from the audit's files.

Shapes: N samples, T training samples, V validation samples, d entries of a module, H width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from app.audits.models import Audit
from tests import oracles
from tests.influence import estimator_oracles as slow
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace
from workers.pipeline.artifacts import read_json
from workers.pipeline.column_source import InfluenceReader
from workers.pipeline.training_facts import TrainingFacts

CLS, SEP, END = 2, 3, 2

TRAIN = tiny.reviews(26, seed=0, labels=(0, 1))
VALIDATION = tiny.reviews(7, seed=1, labels=(0, 1))
WORD_EMBEDDING = "bert.embeddings.word_embeddings.weight"

Oracle = Callable[[Tensor, Tensor], Tensor]
"""Influence [V, T] of the gradients [V, d] and [T, d] of one module."""

DOTS: dict[str, Oracle] = {
    "grad_dot": lambda v, g: v.double() @ g.double().T,
    "grad_cosine": lambda v, g: slow.pairs(v, g, slow.cosine),
    "grad_covariance": lambda v, g: slow.pairs(v, g, slow.covariance),
    "datainf_self": lambda v, g: slow.pairs(v, g, slow.datainf_self),
}


def audit_of(
    workplace: Workplace, models: Models, estimator: str, *others: str, **request: Any
) -> Audit:
    """Audit the adapter, unless the request says otherwise."""
    request = {"model": models.encoder, "adapter": models.adapter, **request}
    ranking = {"estimator": estimator, "aggregation": "mean"} | request.pop("ranking", {})
    model = request.pop("model")
    return workplace.succeed(
        workplace.submit(
            model,
            train=workplace.table("train", TRAIN),
            validation=workplace.table("validation", VALIDATION),
            estimators=list(others),
            ranking=ranking,
            **request,
        )
    )


def sets(workplace: Workplace, train: Any = TRAIN, validation: Any = VALIDATION) -> dict[str, Any]:
    """Write a training and a validation set; return the request's parts that name them."""
    return {
        "train": workplace.table("train", train),
        "validation": workplace.table("validation", validation),
    }


def review_ids(table: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of the texts, as BERT's tokenizer makes them."""
    return [
        [CLS, *(tiny.VOCABULARY.index(word) for word in text.split()), SEP]
        for text in table["text"]
    ]


def review_labels(table: dict[str, Any], names: Sequence[Any] = (0, 1)) -> list[int]:
    return [list(names).index(label) for label in table["label"]]


def instruction_ids(table: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of prompts with completions, and the labels: completion and end."""
    ids, labels = [], []
    for prompt, completion in zip(table["prompt"], table["completion"], strict=True):
        asked, written = (
            [tiny.LANGUAGE_VOCABULARY.index(word) for word in text.split()]
            for text in (prompt, completion)
        )
        ids.append([*asked, *written, END])
        labels.append([-100] * len(asked) + [*written, END])
    return ids, labels


def classifier(base: Path, adapter: Path | None = None, *, num_labels: int = 2) -> Any:
    """Load a classifier in float64; with an adapter, only that one's parameters are trainable."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    return _adapted(model, adapter)


def language_model(base: Path, adapter: Path | None = None) -> Any:
    return _adapted(AutoModelForCausalLM.from_pretrained(base), adapter)


def _adapted(model: Any, adapter: Path | None) -> Any:
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.double().eval()


def review_gradients(
    model: nn.Module, table: dict[str, Any], names: Sequence[Any] = (0, 1)
) -> dict[str, Tensor]:
    """Return every trainable parameter's gradients [N, d], by the engine's name."""
    gradients, _ = oracles.loop_gradients(model, review_ids(table), review_labels(table, names))
    return gradients


def instruction_gradients(model: nn.Module, table: dict[str, Any]) -> dict[str, Tensor]:
    gradients, _ = oracles.loop_gradients(model, *instruction_ids(table))
    return gradients


def read_influence(
    workplace: Workplace, audit: Audit, estimator: str, *, num_checkpoints: int | None = None
) -> Tensor:
    """Read what an audit wrote, [rows, columns, T] in the order of the training file."""
    artifacts = workplace.artifacts(audit.id)
    reader = InfluenceReader(
        artifacts,
        estimator,
        TrainingFacts(artifacts, audit.provenance["num_shards"]),
        checkpoints=(None,) if num_checkpoints is None else range(num_checkpoints),
    )
    columns = slice(0, reader.num_columns)
    return torch.stack([reader.read(row, columns) for row in range(reader.num_rows)])


def module_names(workplace: Workplace, audit: Audit) -> list[str]:
    names = read_json(workplace.artifacts(audit.id).modules)["modules"]
    assert isinstance(names, list)
    return names


def assert_near(actual: Tensor, expected: Tensor, *, share: float = 1e-5) -> None:
    """Every number agrees within a share of the largest."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    scale = float(expected.abs().max())
    assert scale > 0, "nothing to compare"
    error = float((actual.double() - expected.double()).abs().max()) / scale
    assert error <= share, f"the largest error is {error:.1e} of the largest number"


def assert_mean_scores(workplace: Workplace, audit: Audit, influence_MVT: Tensor) -> None:
    """The scores of the ranking are the mean over modules and columns."""
    score_T = influence_MVT.double().flatten(0, 1).mean(dim=0)
    rows = sorted(workplace.ranked_rows(audit.id), key=lambda row: row.sample_index)
    assert_near(torch.tensor([row.score for row in rows]), score_T)


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlate the ranks of two sets of numbers without ties."""
    ranks = [torch.tensor(oracles.ranks(values.flatten().tolist())) for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])
