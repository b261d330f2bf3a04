"""An audit that cannot work is refused at submit, with the field and what to change."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.settings import Settings
from tests.factories import CSV_TABLE, request_body

ADAPTER = {"reference": "hf://org/model@main", "adapter": "hf://org/adapter@main"}
EPOCH = {"adapter": "hf://org/adapter@epoch", "learning_rate": 1e-3}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def errors_of(client: TestClient, **changes: Any) -> list[tuple[str, str]]:
    """Submit, expect a refusal, and return its pointers with their sentences."""
    response = client.post("/v1/audits", json=request_body(**changes))
    assert response.status_code == 422, response.text
    return [(error["pointer"], error["detail"]) for error in response.json()["errors"]]


def upload(client: TestClient, name: str, content: str) -> dict[str, str]:
    response = client.post("/v1/datasets", files={"file": (name, content)})
    assert response.status_code == 201, response.text
    return {"reference": response.json()["reference"]}


@pytest.mark.parametrize(
    ("changes", "pointer", "sentence"),
    [
        ({"validation": None}, "#/validation", "needs a validation set"),
        (
            {
                "validation": None,
                "ranking": {"estimator": "loss"},
                "estimators": ["self_influence", "datainf"],
            },
            "#/validation",
            "datainf (estimators.1) needs a validation set",
        ),
        ({"estimators": ["tracin"]}, "#/estimators/0", "at least 2 checkpoints"),
        (
            {"estimators": ["tracin"], "fine_tune": None, "model": ADAPTER},
            "#/estimators/0",
            "at least 2 checkpoints",
        ),
        (
            {"task": "causal_lm", "estimators": ["outlier_gradient"]},
            "#/estimators/0",
            "needs classes",
        ),
        ({"ranking": {"estimator": "tracin_we"}}, "#/ranking/layers", "set ranking.layers to WE"),
        ({"ranking": {"layers": "middle"}}, "#/ranking/layers", "pattern"),
        ({"ranking": {"layers": "05-02"}}, "#/ranking/layers", "write 02-05"),
        ({"ranking": {"layers": "00,03-001,CL"}}, "#/ranking/layers", "write 001-03"),
        ({"ranking": {"layers": "WE"}}, "#/ranking/layers", "set model.word_embeddings to true"),
        (
            {"ranking": {"estimator": "self_influence", "layers": "02,WE"}},
            "#/ranking/layers",
            "leave WE out of ranking.layers",
        ),
        (
            {
                "model": {"reference": "hf://org/model@main", "word_embeddings": True},
                "ranking": {"estimator": "datainf", "layers": "WE"},
            },
            "#/ranking/layers",
            "datainf does not look at the word embeddings",
        ),
        (
            {"ranking": {"estimator": "repsim", "layers": "01,CL"}},
            "#/ranking/layers",
            "has no layers CL; set ranking.layers to all",
        ),
        (
            {
                "model": {"reference": "hf://org/model@main", "word_embeddings": True},
                "ranking": {"estimator": "repsim", "layers": "CL,WE"},
            },
            "#/ranking/layers",
            "has no layers CL and WE",
        ),
        (
            {"estimator_parameters": {"lissa": {"depth": 3}}},
            "#/estimator_parameters/lissa/depth",
            "no parameter 'depth'",
        ),
        (
            {"estimator_parameters": {"outlier_gradient": {"nu": 7}}},
            "#/estimator_parameters/outlier_gradient/nu",
            "it goes from",
        ),
        (
            {"estimator_parameters": {"lissa": {"steps": 2.5}}},
            "#/estimator_parameters/lissa/steps",
            "whole number",
        ),
        (
            {"model": {"reference": "hf://org/model@main", "projection": {}}},
            "#/model/projection",
            "fine-tuned in full",
        ),
        (
            {"model": {"reference": "hf://org/model@main", "checkpoints": [EPOCH, EPOCH]}},
            "#/model/checkpoints",
            "earlier states of model.adapter",
        ),
        ({"model": {**ADAPTER, "checkpoints": [EPOCH]}}, "#/model/checkpoints", "at least 2"),
        (
            {
                "task": "causal_lm",
                "train": {
                    "reference": "hf://datasets/org/texts@main?split=train",
                    "columns": {"text": "t", "label": "l"},
                },
            },
            "#/train/columns",
            "does not fit task causal_lm",
        ),
        ({"ranking": {"trim_fraction": 0.5}}, "#/ranking/trim_fraction", "less than 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("#") else "",
)
def test_what_does_not_fit_together_is_refused_by_name(
    client: TestClient, changes: dict[str, Any], pointer: str, sentence: str
) -> None:
    errors = dict(errors_of(client, **changes))
    assert pointer in errors, errors
    assert sentence in errors[pointer]


@pytest.mark.parametrize(
    "changes",
    [
        {"validation": None, "ranking": {"estimator": "self_influence"}, "estimators": ["loss"]},
        {"estimators": ["tracin"], "fine_tune": {"epochs": 2}},
        {
            "estimators": ["tracin"],
            "fine_tune": None,
            "model": {**ADAPTER, "checkpoints": [EPOCH] * 2},
        },
        {"ranking": {"estimator": "tracin_we", "layers": "WE"}},
        {"ranking": {"layers": "00-01,03,CL"}},
        {"ranking": {"layers": "02-02"}},
        {"ranking": {"estimator": "repsim", "layers": "00-01,03"}},
        *(
            {
                "model": {"reference": "hf://org/model@main", "word_embeddings": True},
                "ranking": {"estimator": estimator, "layers": "WE,CL"},
            }
            for estimator in ("grad_cosine", "grad_covariance", "datainf_self", "self_influence")
        ),
        {"task": "causal_lm", "estimators": ["repsim"]},
        {"estimator_parameters": {"lissa": {"steps": 20}}},
    ],
)
def test_what_fits_is_accepted(client: TestClient, changes: dict[str, Any]) -> None:
    response = client.post("/v1/audits", json=request_body(**changes))
    assert response.status_code == 202, response.text


def test_a_causal_language_model_reads_prompt_and_completion_unless_told_otherwise(
    client: TestClient,
) -> None:
    body = request_body(task="causal_lm")
    columns = client.post("/v1/audits", json=body).json()["request"]["train"]["columns"]
    assert (columns["prompt"], columns["completion"]) == ("prompt", "completion")
    assert columns["text"] is None


def test_an_upload_of_the_other_kind_is_refused_with_the_task_to_set(client: TestClient) -> None:
    labelled = upload(client, "a.csv", CSV_TABLE)
    written = upload(client, "b.csv", "prompt,completion\na,b\nc,d\n")
    (pointer, sentence) = errors_of(client, task="causal_lm", train=labelled)[0]
    assert pointer == "#/train"
    assert "has labels, which a causal_lm audit does not read" in sentence
    (pointer, sentence) = errors_of(client, train=labelled, validation=written)[0]
    assert pointer == "#/validation"
    assert "Set task to causal_lm" in sentence


def test_chats_need_a_tokenizer_with_a_template(client: TestClient, settings: Settings) -> None:
    folder = settings.file_roots[0] / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    chats = upload(client, "a.jsonl", json.dumps({"messages": CHAT}) + "\n")
    changes = {
        "task": "causal_lm",
        "model": {"reference": folder.as_uri()},
        "train": chats,
        "validation": chats,
    }
    (pointer, sentence) = errors_of(client, **changes)[0]
    assert pointer == "#/train/columns/messages"
    assert "no chat template" in sentence

    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert client.post("/v1/audits", json=request_body(**changes)).status_code == 202


def test_a_folder_with_one_gguf_file_is_a_model(client: TestClient, settings: Settings) -> None:
    folder: Path = settings.file_roots[0] / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    changes = {"task": "causal_lm", "model": {"reference": folder.as_uri()}}
    assert client.post("/v1/audits", json=request_body(**changes)).status_code == 202
    (folder / "other.gguf").write_bytes(b"GGUF")
    (pointer, sentence) = errors_of(client, **changes)[0]
    assert pointer == "#/model/reference"
    assert "holds several GGUF files (model.gguf, other.gguf); name a folder with one" in sentence
