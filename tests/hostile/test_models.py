"""Model folders that were made to do harm: refused with a reason, in bounded memory and time.

What could run code writes a file when it does; no such file is ever there.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from tests.hostile.isolated import Isolated
from tests.sources.conftest import edit_json, tiny_config, write_tokenizer

MOST_MIB = 700
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated("tests.hostile.model_jobs") as running:
        yield running


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, root / "model"))


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def mark_of(folder: Path) -> Path:
    return folder.parent.parent / "ran"


def config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tokenizer_config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def pickled(name: str, *, keeps: bool) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Bomb(mark_of(folder))))
        if not keeps:
            (folder / "model.safetensors").unlink()

    return spoil


def code(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(f"open({str(mark_of(folder))!r}, 'w')\n")

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def safetensors_of(header: bytes, *, length: int | None = None, num_bytes: int = 0) -> Spoil:
    def spoil(folder: Path) -> None:
        said = struct.pack("<Q", len(header) if length is None else length)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(said + header)
            file.truncate(8 + len(header) + num_bytes)

    return spoil


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def link_out(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        outside = folder.parent.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


def link_to_itself(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return spoil


def tokenizer_json(make: Callable[[], str]) -> Spoil:
    return lambda folder: (folder / "tokenizer.json").write_text(make())


def regex_tokenizer() -> str:
    """Splits by a pattern that backtracks for ever on a long run of one letter."""
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$|(a|aa)+b"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "good": 1}, "unk_token": "[UNK]"},
        }
    )


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


HUGE = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}
REFUSED: dict[str, tuple[Spoil, str, str]] = {
    "a pickle for weights": (
        pickled("pytorch_model.bin", keeps=False),
        "missing_file",
        "could run code",
    ),
    "a pickle of torch's": (pickled("model.pt", keeps=False), "missing_file", "could run code"),
    "a pickle by the name of safetensors": (
        pickled("model.safetensors", keeps=True),
        "unreadable_file",
        "not a safetensors file",
    ),
    "another architecture": (
        config(model_type="evil"),
        "unsupported_model",
        "not an architecture",
    ),
    "a billion layers": (config(num_hidden_layers=10**9), "unsupported_model", "at most 1,000"),
    "layers below zero": (config(num_hidden_layers=-1), "unsupported_model", ""),
    "a vocabulary of 10^12": (config(vocab_size=10**12), "unsupported_model", "vocab_size"),
    "a vocabulary of 10^9": (config(vocab_size=10**9), "unsupported_model", "describes"),
    "a width of 10^9": (config(hidden_size=10**9, num_attention_heads=1), "unsupported_model", ""),
    "a width of nothing": (config(hidden_size=0), "unsupported_model", ""),
    "10^9 heads": (config(num_attention_heads=10**9), "unsupported_model", ""),
    "10^9 positions": (config(max_position_embeddings=10**9), "unsupported_model", "describes"),
    "10^9 classes": (config(num_labels=10**9), "unsupported_model", "num_labels"),
    "numbers that are texts": (config(hidden_size="16"), "unsupported_model", ""),
    "an infinite size": (config(hidden_size=float("inf")), "unsupported_model", ""),
    "quantized": (
        config(quantization_config={"quant_method": "bitsandbytes"}),
        "unsupported_model",
        "quantization_config",
    ),
    "config of no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "unreadable_file",
        "JSON object",
    ),
    "config nested deeply": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 100_000),
        "unreadable_file",
        "config.json",
    ),
    "config of 9 MB": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"a": "x" * 9_000_000})),
        "unreadable_file",
        "8,388,608 bytes",
    ),
    "a number of many digits": (
        lambda folder: (folder / "config.json").write_text('{"a":' + "9" * 5_000 + "}"),
        "unreadable_file",
        "config.json",
    ),
    "other shapes": (
        weights(lambda of: of.update({"classifier.weight": torch.zeros(2, 17)})),
        "unsupported_model",
        "other shapes",
    ),
    "missing weights": (
        weights(lambda of: of.pop("bert.encoder.layer.0.attention.self.query.weight")),
        "missing_file",
        "weights are missing",
    ),
    "a header beyond the file": (
        safetensors_of(b"{}", length=2**40),
        "unreadable_file",
        "not a safetensors file",
    ),
    "a header of a gigabyte": (
        safetensors_of(b"{", length=2**30, num_bytes=2**30),
        "unreadable_file",
        "not a safetensors file",
    ),
    "a header that lies of its bytes": (
        safetensors_of(header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]})),
        "unreadable_file",
        "not a safetensors file",
    ),
    "a header that lies of its shape": (
        safetensors_of(header(a=HUGE), num_bytes=8),
        "unreadable_file",
        "not a safetensors file",
    ),
    "tensors over one another": (
        safetensors_of(
            header(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            ),
            num_bytes=12,
        ),
        "unreadable_file",
        "not a safetensors file",
    ),
    "weights that lie outside": (link_out("model.safetensors"), "invalid_reference", "outside"),
    "a tokenizer that lies outside": (link_out("vocab.txt"), "invalid_reference", "outside"),
    "a config that lies outside": (link_out("config.json"), "invalid_reference", "outside"),
    "a link to itself": (
        link_to_itself("vocab.txt"),
        "invalid_reference",
        "vocab.txt",
    ),
    "an index that leads out": (
        both(
            lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../../outside.safetensors"}})
            ),
        ),
        "unsafe_file",
        "names the weights",
    ),
    "tokenizer.json nested deeply": (
        tokenizer_json(lambda: '{"a":' * 100_000),
        "unreadable_file",
        "tokenizer",
    ),
    "tokenizer.json of 300 MB": (
        tokenizer_json(lambda: json.dumps({"model": {"vocab": "x" * 300_000_000}})),
        "unreadable_file",
        "tokenizer.json has more than",
    ),
    "tokenizer.json of nothing": (tokenizer_json(lambda: ""), "unreadable_file", "tokenizer"),
    "a chat template of 2 MB": (
        lambda folder: (folder / "chat_template.jinja").write_text("x" * 2 * 1024**2),
        "unreadable_file",
        "chat_template.jinja",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_reason_in_bounded_memory(
    isolated: Isolated, root: Path, folder: Path, name: str
) -> None:
    spoil, code, message = REFUSED[name]
    spoil(folder)
    answer = isolated.run("load", model=str(folder), root=str(root))
    assert answer.get("code") == code, answer
    assert message in answer["message"]
    assert answer["field"] == "model"
    assert answer["peak"] <= MOST_MIB
    assert not mark_of(folder).exists()


HARMLESS: dict[str, Spoil] = {
    "nothing wrong": lambda folder: None,
    "a pickle beside the weights": pickled("pytorch_model.bin", keeps=True),
    "code beside the config": both(
        code("modeling_evil.py"),
        code("tokenization_evil.py"),
        config(auto_map={"AutoModelForSequenceClassification": "modeling_evil.Evil"}),
        tokenizer_config(auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ),
    "implementations of strangers": config(
        _attn_implementation="evil/kernels",
        attn_implementation="evil/kernels:attention",
        _experts_implementation="evil/experts",
        use_kernels=True,
        kernel_config={"Attention": "evil/kernels:Attention"},
    ),
    "names that lead elsewhere": both(
        config(_name_or_path="/etc", transformers_weights="/etc/passwd", gguf_file="/etc/passwd"),
        tokenizer_config(name_or_path="/etc", vocab_file="/etc/passwd", tokenizer_file="/etc/x"),
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_could_run_code_is_left_out_and_the_model_loads(
    isolated: Isolated, root: Path, folder: Path, name: str
) -> None:
    HARMLESS[name](folder)
    answer = isolated.run("load", model=str(folder), root=str(root))
    assert answer.get("code", "") is None, answer
    assert answer["is_finite"]
    assert not mark_of(folder).exists()


def test_weights_that_are_no_numbers_load_and_are_the_audits_matter(
    isolated: Isolated, root: Path, folder: Path
) -> None:
    """tests/pipeline shows that such an audit fails with non_finite_influence, naming the rows."""
    weights(lambda of: of["classifier.weight"].fill_(torch.nan))(folder)
    answer = isolated.run("load", model=str(folder), root=str(root))
    assert (answer["code"], answer["is_finite"]) == (None, False)


def test_a_pattern_that_backtracks_for_ever_ends(
    isolated: Isolated, root: Path, folder: Path
) -> None:
    """The tokenizers' library gives such a pattern up; the process's limit of time is not met."""
    (folder / "tokenizer.json").write_text(regex_tokenizer())
    names = {"unk_token": "[UNK]", "pad_token": "[UNK]"}
    tokenizer_config(tokenizer_class="PreTrainedTokenizerFast", **names)(folder)
    answer = isolated.run("load", model=str(folder), root=str(root))
    assert "killed" not in answer, answer
