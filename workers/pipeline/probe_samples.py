"""The probes of an audit as samples: made of the training samples' tokens while they are read.

Shapes: P probes, B a batch of them.
"""

from typing import Any

import torch
from torch import Tensor

from app.shared_files import fetch
from workers.influence.batching import collate, completion_labels
from workers.influence.probes import Probes, draw_completion_probes, draw_label_probes
from workers.pipeline.artifacts import read_tensors, write_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.prepared import Prepared
from workers.pipeline.samples import SampleSet
from workers.pipeline.tokenise import cut
from workers.pipeline.training_facts import TrainingFacts

# Enough to tell configurations apart; beyond, more only cost.
MAX_PROBES = 1000


class ProbeSet:
    """Copies of training samples with wrong classes, or with completions of other samples.

    Attributes:
        probes: which samples are copied, and with what target.
        length_P: int64, tokens of each probe.
    """

    def __init__(self, train: SampleSet, probes: Probes, *, max_tokens: int) -> None:
        self.probes = probes
        self._train, self._max_tokens = train, max_tokens
        self.length_T = train.length_T[probes.index_P]
        if train.has_completions:
            start_T = train.completion_start_T
            longest_P = start_T[probes.index_P] + (
                train.length_T[probes.target_P] - start_T[probes.target_P]
            )
            self.length_T = longest_P.clamp(max=max_tokens)

    def __len__(self) -> int:
        return len(self.probes)

    def batch(
        self, indices: Tensor, *, pad_id: int, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs [B, S] and the wrong targets of the probes at `indices`."""
        index_B, target_B = self.probes.index_P[indices], self.probes.target_P[indices]
        if not self._train.has_completions:
            inputs, _ = self._train.batch(index_B, pad_id=pad_id, device=device)
            return inputs, target_B.to(device)
        token_ids, starts = [], []
        for (tokens, start), (others, other_start) in zip(
            self._train.tokens(index_B), self._train.tokens(target_B), strict=True
        ):
            joined, begin = cut(
                tokens[:start],
                others[other_start:],
                max_tokens=self._max_tokens,
                beginning=tokens[0],
            )
            token_ids.append(joined)
            starts.append(begin)
        inputs = collate(token_ids, pad_id=pad_id, device=device)
        return inputs, completion_labels(token_ids, starts, device=device)


def read_probes(context: StageContext, train: SampleSet) -> ProbeSet:
    """Return the audit's probes, drawn once all training samples have been seen.

    Among all samples that are finite, whatever the model says of them: those that it fits alone
    would hide what it has learned wrongly. Every worker draws the same.
    """
    path, provenance = context.artifacts.drawn_probes, context.provenance
    if not fetch(path):
        facts = TrainingFacts(context.artifacts, provenance["num_shards"])
        probes = _draw(context, train, eligible_T=facts.is_finite_T)
        write_tensors(path, {"index": probes.index_P, "target": probes.target_P})
    drawn = read_tensors(path)
    probes = Probes(drawn["index"], drawn["target"])
    return ProbeSet(train, probes, max_tokens=provenance["max_tokens"])


def num_probes(context: StageContext, num_train: int) -> int:
    """Return how many samples are copied."""
    return min(MAX_PROBES, max(1, round(context.request.probes.fraction * num_train)))


def _draw(context: StageContext, train: SampleSet, *, eligible_T: Tensor) -> Probes:
    options: dict[str, Any] = {
        "eligible_T": eligible_T,
        "count": num_probes(context, len(train)),
        "seed": context.request.probes.seed,
    }
    if train.has_completions:
        return draw_completion_probes(train.completion_digests(), **options)
    num_classes = len(Prepared.read(context.artifacts.prepared).labels)
    return draw_label_probes(train.label_T, num_classes=num_classes, **options)
