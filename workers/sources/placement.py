"""Where the weights of a model go, and in how many bits they are held."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a model go; by default all to the CPU, as they were saved.

    Attributes:
        device_map: what Transformers and accelerate take: `auto` fills the GPUs, then memory, then
            the disk; or a device (`disk` is one) by path of a module.
        offload_folder: for what lies on disk and cannot be read from the model's own files.
        quantization: of the weights of linear layers inside the blocks.
        unquantized: paths of modules that stay as they are.
        compute_dtype: what quantised layers compute in.
    """

    device_map: str | dict[str, Any] | None = None
    offload_folder: Path | None = None
    quantization: Quantization | None = None
    unquantized: tuple[str, ...] = ()
    compute_dtype: torch.dtype = torch.float32

    @property
    def is_final(self) -> bool:
        """Whether the weights are where they compute, and cannot be moved or cast."""
        return self.device_map is not None

    def options(self) -> dict[str, Any]:
        """Return what `from_pretrained` takes."""
        options: dict[str, Any] = {}
        if self.device_map is not None:
            options["device_map"] = self.device_map
            options["offload_folder"] = self.offload_folder
        if self.quantization is not None:
            options["quantization_config"] = self._bits()
        return options

    def _bits(self) -> Any:  # noqa: ANN401 - transformers carries no types
        from transformers import BitsAndBytesConfig  # noqa: PLC0415 - bitsandbytes is optional

        shared: dict[str, Any] = {"llm_int8_skip_modules": list(self.unquantized)}
        if self.quantization == "4bit":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=self.compute_dtype,
                **shared,
            )
        # no columns in float16: which ones, would depend on the other samples of the batch
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, **shared)


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    In evaluation mode bitsandbytes would repack them there for products without a backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False


def can_quantize() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None
