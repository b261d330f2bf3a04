"""What can be told of a model's folder without loading anything."""

from pathlib import Path

import orjson

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MAX_CONFIG_BYTES = 8 * 1024**2


def gguf_files(folder: Path) -> list[str]:
    """Return the GGUF files that are a folder's weights; none where there are safetensors.

    One brings its own tokenizer; of several, it cannot be told which is meant.
    """
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return []
    return [name for name in names if name.endswith(".gguf")]


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
