"""Formulas and advice of the catalogue.

In the formulas v_j and g_i are the gradients of the loss of validation sample j and training sample
i by one module, d its parameters, n the number of training samples, λ = damping · mean ‖g_k‖² / d.
"""

from typing import NamedTuple


class Text(NamedTuple):
    """What is said of one entry."""

    formula: str
    description: str


ESTIMATOR_TEXTS: dict[str, Text] = {
    "grad_dot": Text(
        "v_j · g_i",
        "TracIn at one checkpoint. Use it to compare with; a few large gradients decide, so "
        "combine it with vote.",
    ),
    "grad_cosine": Text(
        "v_j · g_i / (‖v_j‖ ‖g_i‖)",
        "The dot product without the lengths of the gradients. Use it first: with rank it is a "
        "robust default for classifiers and language models.",
    ),
    "grad_covariance": Text(
        "Σ (v_j − mean v_j) (g_i − mean g_i) / (d − 1) over the d entries",
        "The dot product without what all entries of a gradient share. Use it where grad_dot is "
        "dominated by a common shift; on matrices the two hardly differ.",
    ),
    "datainf": Text(
        "(1/λ) [v_j·g_i − (1/n) Σ_k (v_j·g_k)(g_k·g_i) / (λ + ‖g_k‖²)]",
        "A closed-form inverse Hessian for adapters (Kwon et al. 2024). Use it with rank, where "
        "modules are too large for gauss_newton and you want no Kronecker factors.",
    ),
    "datainf_self": Text(
        "(v_j · g_i) / ‖g_i‖² · d / (0.1 + d)",
        "DataInf with the curvature of the one training sample. Use it for the cost of grad_dot, "
        "with rank or vote; training samples that the model fits already count most.",
    ),
    "lissa": Text(
        "(r/σ) · g_i after some steps of r ← v_j + r − (1/σ) (mean_k (g_k·r) g_k + λ r)",
        "The inverse curvature by a truncated series. Use it to compare with published results; "
        "gauss_newton costs less and is exact.",
    ),
    "gauss_newton": Text(
        "v_jᵀ (GᵀG/n + λ I)⁻¹ g_i",
        "The curvature of every module, inverted exactly. Use it on language models that tell "
        "classes, with rank over all layers: the best single choice there. It grows with the "
        "square of a module's parameters: for large modules use ekfac or datainf.",
    ),
    "ekfac": Text(
        "⟨Q_S [(Q_Sᵀ V_j Q_A) / (Λ + λ)] Q_Aᵀ, G_i⟩, Λ = mean_k (Q_Sᵀ G_k Q_A)², with the "
        "eigenvectors Q_A of Σ x xᵀ and Q_S of Σ g gᵀ over all tokens",
        "The curvature in the eigenbasis of its Kronecker factors (Grosse et al. 2023). Use it on "
        "causal language models, with mean over the middle blocks, and wherever you want one "
        "choice that was near the best everywhere; sides above 8,192 become diagonal.",
    ),
    "tracin": Text(
        "Σ_c η_c v_j^c · g_i^c over checkpoints c with learning rates η_c",
        "The dot product over the whole training (Pruthi et al. 2020). Use it where the final "
        "model has memorised its noise and its gradients say little; combine it with vote.",
    ),
    "tracin_we": Text(
        "Σ v_j[w] · g_i[w] over the tokens w of both texts",
        "The dot product on the word embeddings (Yeh et al. 2022). Use it for behaviour that "
        "hangs on words, and to compare with the layers above.",
    ),
    "tracin_we_topk": Text(
        "Σ v_j[w] · g_i[w] over the tokens w that are among the num_tokens with the largest "
        "gradient per occurrence in both texts",
        "tracin_we without the tokens that hardly matter. Use it where frequent words and "
        "separators drown tracin_we.",
    ),
    "outlier_gradient": Text(
        "Σ_s α_s exp(−γ ‖v_s − g_i‖²) − ρ, a one-class SVM on the validation gradients of a "
        "class, γ = 1 / mean ‖v‖²",
        "Whether a gradient looks like those of a class's trusted samples (Chhabra et al. 2025). "
        "Use it on classifiers with some tens of validation samples of every class.",
    ),
    "repsim": Text(
        "h(v_j) · h(x_i) / (‖h(v_j)‖ ‖h(x_i)‖) with the hidden state h after each block",
        "Similar texts, without gradients. Use it on causal language models, to find the samples "
        "that a behaviour was learned from; it does not see labels, hence no wrong ones.",
    ),
    "self_influence": Text(
        "−‖g_i‖²",
        "How hard a sample pulls on the model. Use it where there is no validation set, and to "
        "tell outliers; on classifiers the head alone (layers CL) is best.",
    ),
    "loss": Text(
        "−loss(x_i)",
        "The plain loss at the checkpoint. Use it as the baseline that influence must beat: with "
        "random wrong labels and a good encoder it is hard to beat.",
    ),
    "confidence": Text(
        "P(y_i | x_i) of a model that has not seen x_i",
        "A logistic regression on the fine-tuned model's last hidden states, fitted anew for every "
        "fifth of the training set, in the manner of Confident Learning. Use it beside influence "
        "on classifiers: it is hard to beat on random flips, and says nothing of why.",
    ),
    "random": Text(
        "a seeded draw",
        "Chance. Use it as the floor of every comparison.",
    ),
    "oracle": Text(
        "known noise first",
        "The best that is possible, where the noise is known. Use it as the ceiling of every "
        "comparison.",
    ),
}

AGGREGATION_TEXTS: dict[str, Text] = {
    "mean": Text(
        "mean of I[l, j, i] over modules l and validation samples j",
        "The classic; a few modules or validation samples with large gradients can decide it.",
    ),
    "rank": Text(
        "mean over (l, j) of the rank of i among all training samples, 0 = lowest",
        "Every module and validation sample has the same weight: the default.",
    ),
    "vote": Text(
        "−Σ over (l, j) of max(k − rank, 0)",
        "Only the k lowest of every column vote; makes the choice of layers nearly harmless for "
        "grad_dot and datainf.",
    ),
    "trimmed_mean": Text(
        "mean over (l, j) of I[l, j, i] without the lowest and highest of them",
        "The mean without the columns that are extreme for a sample; use it where mean is decided "
        "by a few of them.",
    ),
    "median": Text(
        "median over (l, j) of I[l, j, i]",
        "What the middle column says of a sample: the most robust against extreme columns.",
    ),
    "min": Text(
        "min over (l, j) of I[l, j, i]",
        "The harm that a sample does where it does most; use it for harm to few validation "
        "samples. One noisy column decides.",
    ),
    "common_set": Text(
        "the depth at which common_share of the rankings (l, j) have listed i",
        "A sample is suspect when many columns place it low; an order statistic of its ranks, "
        "less moved by a few columns than rank.",
    ),
}
