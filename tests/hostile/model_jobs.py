"""What a process of its own does with a stranger's model folder."""

from pathlib import Path
from typing import Any

from app.references import FileReference
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.loading import load_model, longest_input
from workers.sources.models import resolve_model


def load(model: str, root: str, adapter: str | None = None) -> dict[str, Any]:
    """Resolve and load a classifier of two classes, and write one text as its tokens."""
    cache = Path(root).with_name("cache")
    try:
        resolved = resolve_model(
            FileReference(Path(model)),
            adapter=FileReference(Path(adapter)) if adapter else None,
            roots=[Path(root)],
            hub=Hub(endpoint="http://127.0.0.1:9", cache_dir=cache / "hub"),
            cache_dir=cache,
        )
        longest_input(resolved)
        loaded = load_model(resolved, labels=[0, 1])
        tokens = loaded.tokenizer("good " + "a" * 5_000)["input_ids"]
    except SourceError as error:
        return {"code": error.code, "message": error.message, "field": error.field}
    finite = all(bool(of.isfinite().all()) for of in loaded.model.parameters())
    return {"code": None, "num_tokens": len(tokens), "is_finite": finite}
