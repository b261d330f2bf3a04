"""What activation checkpointing saves, and what it costs: memory on paper, and time for real.

Each row is one pass of per-sample gradients, a batch of 8 samples of 128 tokens, LoRA on the query
and value projections, random weights. Memory is the most that lives at once beside the weights, as
PyTorch's meta device tells it; the large models exist there alone. Time is CPU seconds of the same
pass on one thread, for the models that are small enough.

    .venv/bin/python -m benchmarks.recomputing [--largest-timed 150]
"""

import argparse
import time
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from workers.influence.batching import collate
from workers.influence.footprint import counting, peak_of, weight_bytes
from workers.influence.gradients import GradientExtractor
from workers.influence.objectives import CausalLanguageModel

SAMPLES, TOKENS = 8, 128
# blocks, width, feed-forward width, heads, vocabulary: of SmolLM2-135M and its like
MODELS = {
    "8 blocks × 512": (8, 512, 1536, 8, 16_000),
    "135 M": (30, 576, 1536, 9, 49_152),
    "360 M": (32, 960, 2560, 15, 49_152),
    "1.5 B": (28, 1536, 8960, 12, 151_936),
    "7 B": (32, 4096, 11_008, 32, 32_000),
}


def extractor(shape: tuple[int, ...], *, device: str, recompute: bool) -> tuple[Any, int]:
    """Return an extractor of a model with random weights, and what these take."""
    blocks, width, inner, heads, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config)
    options = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, options, low_cpu_mem_usage=device == "meta").eval()
    taken = weight_bytes(model)
    with counting():
        made = GradientExtractor(model, objective=CausalLanguageModel(), recompute=recompute)
    return made, taken


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest-timed", type=int, default=150, help="million weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | weights GB | batch GB | checkpointed GB | ratio | time |")
    print("|---|---|---|---|---|---|")
    for name, shape in MODELS.items():
        peaks, seconds, weights = [], [], 0
        for recompute in (False, True):
            paper, weights = extractor(shape, device="meta", recompute=recompute)
            peaks.append(peak_of(partial(paper.extract, *batch("meta"))))
            if weights / 4e6 <= options.largest_timed:
                real, _ = extractor(shape, device="cpu", recompute=recompute)
                times = []
                for _ in range(2):
                    started = time.process_time()
                    real.extract(*batch("cpu"))
                    times.append(time.process_time() - started)
                seconds.append(min(times))
        slower = f"{seconds[1] / seconds[0]:.2f} ×" if seconds else "–"
        plain, again = peaks
        print(
            f"| {name} | {weights / 1e9:.2f} | {plain / 1e9:.2f} | {again / 1e9:.2f} | "
            f"{again / plain:.2f} | {slower} |",
            flush=True,
        )


def batch(device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return samples of which the last quarter is the completion."""
    inputs = collate([[5] * TOKENS] * SAMPLES, pad_id=0, device=device)
    targets = inputs["input_ids"].clone()
    if device == "meta":
        return inputs, targets[:, : 1 + TOKENS // 4]
    targets[:, : -TOKENS // 4] = -100
    return inputs, targets


if __name__ == "__main__":
    main()
