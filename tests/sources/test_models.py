"""Models and adapters from folders and from a hub, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from app.references import HubModelReference
from tests.hub import LoopbackHub, files_below
from tests.sources.conftest import Resolve, edit_json
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.loading import load_model
from workers.sources.models import ResolvedModel, resolve_model


def test_the_revision_of_a_folder_follows_its_content(
    resolve: Resolve, classifier_folder: Path
) -> None:
    before = resolve(classifier_folder)
    assert resolve(classifier_folder) == before
    edit_json(classifier_folder / "config.json", classifier_dropout=0.5)
    after = resolve(classifier_folder)
    assert after.revision != before.revision
    assert "classifier_dropout" in (after.path / "config.json").read_text()


class TestHub:
    def test_a_branch_is_pinned_and_only_what_is_needed_is_downloaded(
        self, resolve: Resolve, server: LoopbackHub, classifier_folder: Path
    ) -> None:
        extra = {"pytorch_model.bin": b"pickle", "modeling_x.py": b"evil", "onnx/model.onnx": b"x"}
        commit = server.push("models", "lab/tiny", files_below(classifier_folder) | extra)
        resolved = resolve(HubModelReference("lab/tiny"))
        assert resolved.revision == commit
        load_model(resolved, labels=[0, 1])
        downloaded = {
            path.rsplit("/", 1)[1] for path in server.paths_of("GET") if "resolve" in path
        }
        assert downloaded == {
            "config.json",
            "model.safetensors",
            "vocab.txt",
            "tokenizer_config.json",
        }

    def test_a_pinned_commit_is_not_asked_for_again(
        self, resolve: Resolve, server: LoopbackHub, classifier_folder: Path
    ) -> None:
        """A resumed audit goes on while the hub is down."""
        server.push("models", "lab/tiny", files_below(classifier_folder))
        first = resolve(HubModelReference("lab/tiny"))
        server.status = 503
        server.requests.clear()
        assert resolve(HubModelReference("lab/tiny", first.revision)) == first
        assert server.requests == []

    def test_base_and_adapter_from_the_hub(
        self, resolve: Resolve, server: LoopbackHub, encoder_folder: Path, adapter_folder: Path
    ) -> None:
        server.push("models", "lab/base", files_below(encoder_folder))
        commit = server.push("models", "lab/lora", files_below(adapter_folder), branch="v1")
        resolved = resolve(HubModelReference("lab/base"), HubModelReference("lab/lora", "v1"))
        assert resolved.adapter_revision == commit
        load_model(resolved, labels=[0, 1, 2])

    def test_the_token_is_sent_only_if_the_operator_gave_one(
        self, tmp_path: Path, server: LoopbackHub, classifier_folder: Path, hub: Hub
    ) -> None:
        server.push("models", "lab/secret", files_below(classifier_folder), token="hf_x")

        def resolve_with(hub: Hub) -> ResolvedModel:
            return resolve_model(
                HubModelReference("lab/secret"),
                adapter=None,
                roots=[],
                hub=hub,
                cache_dir=tmp_path / "cache",
            )

        with pytest.raises(SourceError, match="WINNOW_HUB_TOKEN") as caught:
            resolve_with(hub)
        assert caught.value.code == "not_permitted"
        assert {request.authorization for request in server.requests} == {None}
        secret = Hub(endpoint=server.endpoint, cache_dir=tmp_path / "other", token="hf_x")
        assert "hf_x" not in repr(secret)
        assert resolve_with(secret).model_type == "bert"

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            (HubModelReference("lab/none"), "no such model repository"),
            (HubModelReference("lab/tiny", "v9"), "no branch, tag or commit 'v9'"),
        ],
    )
    def test_what_is_not_there(
        self,
        resolve: Resolve,
        server: LoopbackHub,
        reference: HubModelReference,
        message: str,
    ) -> None:
        server.push("models", "lab/tiny", {})
        with pytest.raises(SourceError, match=message) as caught:
            resolve(reference)
        assert caught.value.code == "not_found"
        assert not caught.value.transient

    def test_an_ailing_hub_is_worth_another_try(
        self, resolve: Resolve, server: LoopbackHub
    ) -> None:
        server.status = 500
        with pytest.raises(SourceError, match="status 500") as caught:
            resolve(HubModelReference("lab/tiny"))
        assert caught.value.code == "hub_error"
        assert caught.value.transient

    def test_an_unreachable_hub_is_worth_another_try(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="could not be reached") as caught:
            resolve_model(
                HubModelReference("lab/tiny"),
                adapter=None,
                roots=[],
                hub=Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path),
                cache_dir=tmp_path,
            )
        assert caught.value.code == "hub_unreachable"
        assert caught.value.transient


class TestRefusedFolders:
    def test_pickled_weights(self, resolve: Resolve, classifier_folder: Path) -> None:
        (classifier_folder / "model.safetensors").rename(classifier_folder / "pytorch_model.bin")
        with pytest.raises(
            SourceError, match="save_pretrained, which writes safetensors"
        ) as caught:
            resolve(classifier_folder)
        assert caught.value.code == "missing_file"

    def test_pickled_weights_by_the_name_of_safetensors(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        torch.save({"a": torch.zeros(1)}, classifier_folder / "model.safetensors")
        with pytest.raises(SourceError, match="not a safetensors file") as caught:
            resolve(classifier_folder)
        assert caught.value.code == "unreadable_file"

    def test_outside_the_roots(self, resolve: Resolve, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="outside the folders") as caught:
            resolve(tmp_path)
        assert caught.value.code == "invalid_reference"
        assert caught.value.field == "model"

    def test_a_link_that_leads_out_of_the_roots(
        self, resolve: Resolve, classifier_folder: Path, tmp_path: Path
    ) -> None:
        config = classifier_folder / "config.json"
        config.rename(tmp_path / "config.json")
        config.symlink_to(tmp_path / "config.json")
        with pytest.raises(SourceError, match="outside the folders"):
            resolve(classifier_folder)

    def test_a_shard_that_leads_out_of_the_folder(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        (classifier_folder / "model.safetensors").unlink()
        index = classifier_folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
        with pytest.raises(SourceError, match=r"'\.\./\.\./secret") as caught:
            resolve(classifier_folder)
        assert caught.value.code == "unsafe_file"

    def test_an_adapter_in_the_place_of_the_model(
        self, resolve: Resolve, adapter_folder: Path
    ) -> None:
        with pytest.raises(SourceError, match="give its base as the model"):
            resolve(adapter_folder)

    @pytest.mark.parametrize("name", ["config.json", "vocab.txt"])
    def test_a_missing_file(self, resolve: Resolve, classifier_folder: Path, name: str) -> None:
        (classifier_folder / name).unlink()
        with pytest.raises(SourceError, match=name) as caught:
            resolve(classifier_folder)
        assert caught.value.code == "missing_file"

    def test_a_file_in_the_place_of_a_folder(
        self, resolve: Resolve, classifier_folder: Path
    ) -> None:
        with pytest.raises(SourceError, match="name the folder"):
            resolve(classifier_folder / "config.json")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "unheard-of"}, "not an architecture"),
            ({"model_type": ["bert"]}, "not an architecture"),
            ({"quantization_config": {"quant_method": "gptq"}}, "dequantized"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
            ({"vocab_size": 2**40}, "vocab_size"),
            ({"text_config": {"num_local_experts": 10**6}}, "num_local_experts"),
        ],
    )
    def test_a_config_that_is_not_taken(
        self,
        resolve: Resolve,
        classifier_folder: Path,
        changes: dict[str, object],
        message: str,
    ) -> None:
        edit_json(classifier_folder / "config.json", **changes)
        with pytest.raises(SourceError, match=message) as caught:
            resolve(classifier_folder)
        assert caught.value.code == "unsupported_model"

    @pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "\xff"])
    def test_a_config_that_is_not_json(
        self, resolve: Resolve, classifier_folder: Path, content: str
    ) -> None:
        (classifier_folder / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(SourceError, match=r"config\.json") as caught:
            resolve(classifier_folder)
        assert caught.value.code == "unreadable_file"


def test_code_in_a_config_is_stripped_and_never_run(
    resolve: Resolve, classifier_folder: Path, tmp_path: Path
) -> None:
    """Every known way from a config to code leads nowhere, and the model still loads."""
    proof = tmp_path / "ran"
    (classifier_folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        classifier_folder / "config.json",
        auto_map={
            "AutoConfig": "evil.Evil",
            "AutoModelForSequenceClassification": "evil.Evil",
        },
        attn_implementation="stranger/kernel",
        _attn_implementation="stranger/kernel",
        _attn_implementation_internal="stranger/kernel",
        _experts_implementation="stranger/kernel",
        transformers_weights="../../../etc/passwd",
        nested={"auto_map": {"AutoConfig": "evil.Evil"}, "kept": 1},
    )
    edit_json(
        classifier_folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        vocab_file="/etc/passwd",
        tokenizer_file="/etc/passwd",
    )
    resolved = resolve(classifier_folder)
    loaded = load_model(resolved, labels=[0, 1])
    assert loaded.tokenizer.tokenize("film") == ["film"]
    kept = "".join(path.read_text() for path in resolved.path.glob("*.json"))
    assert "stranger" not in kept
    assert "evil" not in kept
    assert "passwd" not in kept
    assert '"kept": 1' in kept
    assert not (resolved.path / "evil.py").exists()
    assert not proof.exists()


class TestRefusedAdapters:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"task_type": "CAUSAL_LM"}, "SEQ_CLS"),
            ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"target_modules": "(a+)+$"}, "as a list"),
            ({"target_modules": ["(a+)+$"]}, "plain module names"),
            ({"rank_pattern": {"(a+)+$": 3}}, "plain module names"),
            ({"rank_pattern": [3]}, "plain module names"),
            ({"r": 0}, "positive integer"),
            ({"r": "8"}, "positive integer"),
        ],
    )
    def test_a_config_that_is_not_plain_lora(
        self,
        resolve: Resolve,
        encoder_folder: Path,
        adapter_folder: Path,
        changes: dict[str, object],
        message: str,
    ) -> None:
        edit_json(adapter_folder / "adapter_config.json", **changes)
        with pytest.raises(SourceError, match=message) as caught:
            resolve(encoder_folder, adapter_folder)
        assert caught.value.code == "unsupported_adapter"
        assert caught.value.field == "adapter"

    def test_pickled_weights(
        self, resolve: Resolve, encoder_folder: Path, adapter_folder: Path
    ) -> None:
        weights = adapter_folder / "adapter_model.safetensors"
        weights.rename(adapter_folder / "adapter_model.bin")
        with pytest.raises(SourceError, match=r"adapter_model\.safetensors"):
            resolve(encoder_folder, adapter_folder)
