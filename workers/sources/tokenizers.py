"""Load a resolved model's tokenizer."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from workers.sources.errors import SourceError
from workers.sources.libraries import refused
from workers.sources.models import ResolvedModel


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a padding token pads with its end token.

    Raises:
        SourceError: it cannot be loaded, or has neither token.
    """
    with refused("the tokenizer cannot be loaded", "unreadable_file", "model"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, trust_remote_code=False, local_files_only=True
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise SourceError(
                "the tokenizer has neither a padding nor an end token; set pad_token",
                code="unsupported_model",
                field="model",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `apply_chat_template` can write messages without being given a template."""
    template = tokenizer.chat_template
    return bool(template.get("default") if isinstance(template, dict) else template)
