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


TEST = {"reference": "hf://datasets/org/texts@main?split=test"}


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
        (
            {"ranking": {"estimator": "tracin_we", "layers": "all"}},
            "#/ranking/layers",
            "set ranking.layers to WE",
        ),
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
        ({"verify": {}}, "#/test", "name one in test"),
        ({"test": TEST}, "#/test", "only verify reads the test set"),
        ({"verify": {}, "test": TEST, "fine_tune": None}, "#/fine_tune", "does not fine-tune"),
        (
            {"verify": {}, "test": {**TEST, "columns": {"prompt": "p", "completion": "c"}}},
            "#/test/columns",
            "test.columns does not fit task classification",
        ),
        (
            {"verify": {}, "test": {**TEST, "columns": {"text": "t", "label": "l", "noise": "n"}}},
            "#/test/columns/noise",
            "the test set is trusted",
        ),
        *(
            (
                {"verify": {}, "test": {"reference": f"hf://datasets/org/texts@main?split={name}"}},
                "#/test/reference",
                f"this is {name}.reference",
            )
            for name in ("train", "validation")
        ),
        *(
            ({"verify": verify, "test": TEST}, f"#/verify/{place}", sentence)
            for verify, place, sentence in (
                ({"fraction": 0}, "fraction", "greater than 0"),
                ({"fraction": 0.95}, "fraction", "less than or equal to 0.9"),
                ({"seeds": []}, "seeds", "at least 1"),
                ({"seeds": [1, 0, 1]}, "seeds", "name each only once"),
                ({"seeds": list(range(21))}, "seeds", "at most 20"),
                ({"seeds": [-1]}, "seeds/0", "greater than or equal to 0"),
                ({"arms": ["full", "full"]}, "arms", "name each only once"),
                ({"arms": []}, "arms", "at least one of arms, rankings and configurations"),
                ({"arms": ["best"]}, "arms/0", "'filtered'"),
                ({"arms": ["full", "oracle"]}, "arms/1", "arm oracle needs known noise"),
                ({"confidence": 1}, "confidence", "less than or equal to 0.999"),
                ({"rankings": [{}, {"seed": 1}]}, "rankings/1/seed", "not permitted"),
                (
                    {"rankings": [{}, {"layers": "00"}, {"vote_fraction": 0.1}]},
                    "rankings/2",
                    "verify.rankings 0 and 2 are the same, grad_cosine/all/rank",
                ),
                (
                    {"rankings": [{}, {"layers": "05-02"}]},
                    "rankings/1/layers",
                    "write 02-05",
                ),
                (
                    {"rankings": [{"estimator": "loss", "layers": "00"}]},
                    "rankings/0/layers",
                    "verify.rankings.0.estimator loss has no layers; set verify.rankings.0.layers",
                ),
                (
                    {"rankings": [{"estimator": "tracin"}]},
                    "rankings/0/estimator",
                    "at least 2 checkpoints",
                ),
                (
                    {"rankings": [{"estimator": "oracle"}]},
                    "rankings/0/estimator",
                    "estimator oracle needs known noise",
                ),
            )
        ),
        (
            {"task": "causal_lm", "test": TEST, "verify": {"arms": ["full", "relabelled"]}},
            "#/verify/arms/1",
            "relabelled needs classes",
        ),
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
        {"test": TEST, "verify": {"arms": [], "rankings": [{}, {"aggregation": "mean"}]}},
        {"test": TEST, "verify": {}, "validation": None, "ranking": {"estimator": "loss"}}
        | {"estimators": []},
    ],
)
def test_what_fits_is_accepted(client: TestClient, changes: dict[str, Any]) -> None:
    response = client.post("/v1/audits", json=request_body(**changes))
    assert response.status_code == 202, response.text


@pytest.mark.parametrize(
    ("changes", "arms"),
    [
        ({}, ["filtered", "relabelled", "full", "random"]),
        ({"plant_noise": {}}, ["filtered", "relabelled", "full", "random", "oracle"]),
        ({"task": "causal_lm"}, ["filtered", "full", "random"]),
        ({"task": "causal_lm", "plant_noise": {}}, ["filtered", "full", "random", "oracle"]),
    ],
)
def test_the_arms_of_a_verification_fit_the_audit_unless_named(
    client: TestClient, changes: dict[str, Any], arms: list[str]
) -> None:
    body = request_body(test=TEST, verify={"rankings": [{"aggregation": "vote"}]}, **changes)
    response = client.post("/v1/audits", json=body)
    assert response.status_code == 202, response.text
    verify = response.json()["request"]["verify"]
    assert verify["arms"] == arms
    assert (verify["fraction"], verify["seeds"], verify["confidence"]) == (0.3, [0, 1, 2], 0.95)
    assert verify["rankings"][0]["vote_fraction"] == 0.3
    assert response.json()["request"]["test"]["columns"] is not None


def test_an_upload_with_known_noise_has_an_oracle_and_a_trusted_test_set(
    client: TestClient,
) -> None:
    table = "text,label,wrong\na,b,true\nc,d,false\n"
    files = {"file": ("a.csv", table)}
    noisy = [
        {"reference": client.post("/v1/datasets", files=files, data=form).json()["reference"]}
        for form in [{"noise_column": "wrong"}] * 2
    ]
    body = request_body(train=noisy[0], test=noisy[1], verify={})
    request = client.post("/v1/audits", json=body).json()["request"]
    assert request["verify"]["arms"][-1] == "oracle"
    assert request["train"]["columns"]["noise"] == "wrong"
    assert request["test"]["columns"]["noise"] is None
    dataset_id = noisy[1]["reference"].removeprefix("upload:")
    assert client.delete(f"/v1/datasets/{dataset_id}").status_code == 409, "an audit reads it"


def test_a_test_upload_that_is_gone_is_refused(client: TestClient) -> None:
    gone = {"reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"}
    (pointer, sentence) = errors_of(client, test=gone, verify={})[0]
    assert pointer == "#/test/reference"
    assert "There is no upload" in sentence


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
