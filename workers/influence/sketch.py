"""A short sketch of each sample's whole gradient, from which cosines of gradients are told.

A count sketch (Charikar et al. 2002) throws every entry of a vector, with a random sign, into one
of K buckets; the dot product of two sketches has that of the vectors as its mean, with a standard
deviation of at most ‖v‖‖g‖·√(2/K), about ‖v‖‖g‖/√K. The gradient Gᵀ X of a module that is held as
factors is never written out: the count sketch of an outer product is the circular convolution of
its sides' (Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps", 2013),
three times as noisy at worst. Each module is thrown by a draw of its own, and the sketch of the
whole is the sum.

Shapes: B samples, S tokens, d entries of a module, F length of a vector, P the same filled up to a
multiple of K, I/O input and output features, K buckets.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from workers.influence.layers import ModuleSpec
from workers.influence.rows import DenseRows, FactoredRows, GradientRows

NUM_BUCKETS = 256
# What is thrown together stays in the processor's cache. A multiple of the number of buckets.
_SEGMENT = 2**14
_CHUNK_ENTRIES = 2**22
_TINY = 1e-300


class GradientSketch:
    """Sketches gradients over all modules but the word embeddings.

    The draws depend on the modules' names and sizes alone, and are made on the CPU: all workers of
    an audit have the same.

    Args:
        modules: whose gradients come, in their order.
        device: where they are.
    """

    def __init__(self, modules: Sequence[ModuleSpec], *, device: torch.device | str) -> None:
        self._sides: list[tuple[_CountSketch, ...]] = [
            tuple(
                _CountSketch(size, name=f"{spec.name}/{side}", device=device)
                for side, size in enumerate(_sides(spec))
            )
            for spec in modules
        ]

    @property
    def is_empty(self) -> bool:
        """Whether there is no module to sketch."""
        return not any(self._sides)

    def sketch(self, gradients: Sequence[GradientRows]) -> Tensor:
        """Return the sketches scaled to length 1, float32 [B, K]; zero where the gradient is.

        Args:
            gradients: of the same samples, by module.
        """
        total_BK: Tensor | None = None
        for rows, sides in zip(gradients, self._sides, strict=True):
            if not sides:
                continue
            sketch_BK = _sketch_rows(rows, sides).double()
            total_BK = sketch_BK if total_BK is None else total_BK + sketch_BK
        if total_BK is None:
            raise ValueError("there is no module to sketch.")
        return normalize(total_BK, eps=_TINY).float()


def sketch_floats(modules: Sequence[ModuleSpec]) -> int:
    """Return how many float32 numbers the draws for some modules take."""
    return sum(2 * max(size, NUM_BUCKETS) for spec in modules for size in _sides(spec))


def _sides(spec: ModuleSpec) -> tuple[int, ...]:
    match spec.form:
        case "sparse":
            return ()
        case "factored":
            num_outputs, num_inputs = spec.shape
            return num_inputs, num_outputs
        case _:
            return (spec.num_parameters,)


def _sketch_rows(rows: GradientRows, sides: Sequence["_CountSketch"]) -> Tensor:
    match rows:
        case DenseRows():
            (whole,) = sides
            return whole(rows.gradient_Nd)
        case FactoredRows():
            inputs, outputs = sides
            return _convolve(inputs(rows.x_NSI), outputs(rows.g_NSO))
    raise TypeError(f"{type(rows).__name__} is not sketched.")


def _convolve(x_BSK: Tensor, g_BSK: Tensor) -> Tensor:
    """Return the circular convolutions, summed over the tokens, [B, K]."""
    product_BSK = torch.fft.rfft(x_BSK) * torch.fft.rfft(g_BSK)
    sum_BK: Tensor = torch.fft.irfft(product_BSK.sum(dim=1), n=NUM_BUCKETS)
    return sum_BK


class _CountSketch:
    """Throws vectors of one length, as many entries into one bucket as into another.

    Entries are mixed inside segments, each by its own draw: two entries share a bucket with a
    probability of no more than about 1/K, as if all were mixed.
    """

    def __init__(self, size: int, *, name: str, device: torch.device | str) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        filled = -(-size // NUM_BUCKETS) * NUM_BUCKETS
        index_P = torch.cat(
            [
                start + torch.randperm(min(_SEGMENT, filled - start), generator=generator)
                for start in range(0, filled, _SEGMENT)
            ]
        )
        sign_P = 2.0 * torch.randint(0, 2, (filled,), generator=generator) - 1
        # what fills up counts nothing
        sign_P[index_P >= size] = 0
        self._index_P = index_P.clamp_(max=size - 1).int().to(device)
        self._sign_P = sign_P.to(device)

    def __call__(self, value_F: Tensor) -> Tensor:
        """Return the sketches of vectors along the last dimension, float32 [..., K]."""
        value_BF = value_F.flatten(0, -2)
        sketch_BK = value_BF.new_zeros(len(value_BF), NUM_BUCKETS)
        step = max(1, _CHUNK_ENTRIES // max(1, len(value_BF)) // NUM_BUCKETS) * NUM_BUCKETS
        for start in range(0, len(self._index_P), step):
            part = slice(start, start + step)
            thrown_BP = value_BF.index_select(1, self._index_P[part]).mul_(self._sign_P[part])
            sketch_BK += thrown_BP.unflatten(1, (-1, NUM_BUCKETS)).sum(dim=1)
        return sketch_BK.view(*value_F.shape[:-1], NUM_BUCKETS)
