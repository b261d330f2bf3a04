"""What can be told of a model's folder without loading anything."""

from pathlib import Path

import orjson

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MAX_CONFIG_BYTES = 8 * 1024**2


def has_gguf_only(folder: Path) -> bool:
    """Return whether a folder's weights are one GGUF file, which brings its own tokenizer."""
    suffixes = [path.suffix for path in folder.iterdir()]
    return suffixes.count(".gguf") == 1 and ".safetensors" not in suffixes


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer can write chats; True where the file is not readable here.

    The worker looks again, with the tokenizer itself.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return True
    path = folder / TOKENIZER_CONFIG
    try:
        if not path.is_file():
            return False
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return True
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return True
    return isinstance(config, dict) and bool(config.get("chat_template"))
