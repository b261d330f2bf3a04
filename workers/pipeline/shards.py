"""What one unit of work computes on: a run of training samples, or of probes.

Shapes: T samples of the shard.
"""

from dataclasses import dataclass

from torch import Tensor

from workers.pipeline.artifacts import Artifacts
from workers.pipeline.probe_samples import ProbeSet
from workers.pipeline.samples import SampleSet


@dataclass(frozen=True)
class Shard:
    """A part of the training set, or of the probes.

    Attributes:
        samples: the whole set.
        index_T: which of its samples, in batch order.
        files: where the shard's facts, gradients and influence lie.
        number: its own, in these files.
        is_probes: whether the samples are copies with wrong targets.
    """

    samples: SampleSet | ProbeSet
    index_T: Tensor
    files: Artifacts
    number: int
    is_probes: bool

    @property
    def length_T(self) -> Tensor:
        """Tokens of the shard's samples."""
        return self.samples.length_T[self.index_T]

    def __len__(self) -> int:
        return len(self.index_T)
