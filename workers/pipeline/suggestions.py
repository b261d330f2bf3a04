"""Which label a suspect should rather have.

Shapes: T training samples.
"""

import torch
from torch import Tensor

from workers.pipeline.training_facts import TrainingFacts


def suggest_labels(facts: TrainingFacts, label_T: Tensor) -> Tensor:
    """Return the class that every training sample should rather have: the model's own prediction.

    Args:
        facts: what the audited model said of the training samples.
        label_T: int64, the given classes; samples whose loss or gradient is not finite keep them.

    Returns:
        int64 [T]; the given class where nothing else is suggested.
    """
    return torch.where(facts.is_finite_T, facts.predicted_T.to(label_T.dtype), label_T)
