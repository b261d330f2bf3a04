"""The training set with the probes in the place of their originals.

Shapes: T training samples, N those of them that take part, F those of these that are compared, P
probes, C a block of columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.probes import Probes
from workers.pipeline.artifacts import Artifacts
from workers.pipeline.column_source import ColumnSource
from workers.pipeline.samples import SampleSet
from workers.pipeline.training_facts import TrainingFacts


@dataclass(frozen=True)
class ProbedSet:
    """Training samples, some of them replaced by copies with wrong targets.

    Attributes:
        facts: of the training samples, with the losses of the probes; those that take part count as
            the finite ones.
        label_T: int64, the classes, those of the probes wrong.
        is_probe_T: bool, which samples are replaced.
        artifacts: where the influence of the probes lies.
        probe_facts: of the probes; those that take part count as the finite ones.
    """

    facts: TrainingFacts
    label_T: Tensor
    is_probe_T: Tensor
    artifacts: Artifacts
    probe_facts: TrainingFacts

    @classmethod
    def of(
        cls,
        artifacts: Artifacts,
        train: SampleSet,
        facts: TrainingFacts,
        probes: Probes,
        *,
        num_shards: int,
        max_samples: int,
        seed: int,
    ) -> "ProbedSet":
        """Put the probes in place.

        A probe whose loss or gradient is not finite is left out with its original.

        Args:
            artifacts: the audit's files.
            train: the training samples.
            facts: of them.
            probes: which samples are copied.
            num_shards: into how many shards the probes were cut.
            max_samples: of a larger training set a random part is taken, beside the probes.
            seed: of the random part.
        """
        probe_facts = TrainingFacts(artifacts.probes, num_shards)
        index_P = probes.index_P
        used_P = probe_facts.is_finite_T & facts.is_finite_T[index_P]
        is_probe_T = torch.zeros(len(facts), dtype=torch.bool)
        is_probe_T[index_P[used_P]] = True
        is_other_T = facts.is_finite_T.clone()
        is_other_T[index_P] = False
        other_N = is_other_T.nonzero().flatten()
        room = max(0, max_samples - int(used_P.sum()))
        if len(other_N) > room:
            generator = torch.Generator().manual_seed(seed)
            other_N = other_N[torch.randperm(len(other_N), generator=generator)[:room]]
        takes_part_T = is_probe_T.clone()
        takes_part_T[other_N] = True
        probe_facts = probe_facts.only(used_P)
        label_T = train.label_T.clone()
        if not train.has_completions:
            label_T[index_P] = probes.target_P
        originals = facts.only(takes_part_T)
        return cls(
            facts=originals.replaced(index_P[used_P], probe_facts),
            label_T=label_T,
            is_probe_T=is_probe_T,
            artifacts=artifacts.probes,
            probe_facts=probe_facts,
        )

    @property
    def is_probe_N(self) -> Tensor:
        """Which of the samples that take part are probes."""
        return self.is_probe_T[self.facts.finite_N]

    @property
    def is_probe_F(self) -> Tensor:
        """Which of the samples that are compared are probes."""
        return self.is_probe_T[self.facts.compared_F]


class ProbedSource(ColumnSource):
    """Influence by columns, that of the probes in the place of their originals'.

    Args:
        train: the influence of the samples that are compared.
        probes: that of the probes.
        is_probe_F: which of the samples are replaced.
    """

    def __init__(self, train: ColumnSource, probes: ColumnSource, is_probe_F: Tensor) -> None:
        self._train, self._probes = train, probes
        self._place_P = is_probe_F.nonzero().flatten()
        self.num_rows, self.num_columns = train.num_rows, train.num_columns
        self.num_train, self.num_read = train.num_train, train.num_read

    def read(self, row: int, columns: slice) -> Tensor:
        """Return influence_CF of one row on some columns."""
        influence_CF = self._train.read(row, columns)
        influence_CF[:, self._place_P] = self._probes.read(row, columns)
        return influence_CF
