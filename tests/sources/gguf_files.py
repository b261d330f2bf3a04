"""GGUF files of tiny models, as llama.cpp writes them."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.pipeline.tiny import CHAT_TEMPLATE

# Single letters and one merge, in GPT-2's alphabet of bytes (Ġ is a space).
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "go", "od"]
MERGES = ["g o", "o d"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_llama(*, is_tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=is_tied,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    template: str | None = CHAT_TEMPLATE,
    leave_out: str | None = None,
) -> Path:
    """Write a Llama model, its matrices in Q8_0, norms and embeddings in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in model.state_dict().items():
        if name == leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        _add_tensor(writer, name, tensor, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, config: LlamaConfig) -> None:
    if name in OUTER_NAMES:
        writer.add_tensor(OUTER_NAMES[name], tensor.numpy())
        return
    _, _, layer, rest = name.split(".", 3)
    inner = rest.removesuffix(".weight")
    for part, num_heads in (
        ("self_attn.q_proj", config.num_attention_heads),
        ("self_attn.k_proj", config.num_key_value_heads),
    ):
        if inner == part:
            tensor = _interleave(tensor, num_heads)
    target = f"blk.{layer}.{NAMES[inner]}.weight"
    if tensor.dim() == 1:
        writer.add_tensor(target, tensor.numpy())
        return
    packed = quantize(tensor.numpy(), GGMLQuantizationType.Q8_0)
    writer.add_tensor(target, packed, raw_dtype=GGMLQuantizationType.Q8_0)


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of a rotary projection as llama.cpp does: pairs side by side."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
