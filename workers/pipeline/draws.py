"""Random draws from a seed that do not meet other draws from the same seed."""

import hashlib

import torch
from torch import Tensor


def random_order(num_samples: int, *, seed: int, purpose: str) -> Tensor:
    """Return indices in a random order, int64 [N], that depends on seed and purpose alone.

    Planted noise is drawn from a seed too, and from the same number in the same way the same draw
    would come: removal at random with the seed of the planted noise would remove exactly that. So
    the seed is hashed with the purpose first.
    """
    digest = hashlib.sha256(f"winnow: {purpose}, seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(num_samples, generator=generator)
