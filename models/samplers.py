"""Which of several ground truths to learn from (paper Sec. 4.2; the baselines of Sec. 5)."""

import numpy as np
import torch
from torch import Tensor, nn

SAMPLERS = ("origs_only", "rand", "upos", "sma", "smp", "amo")
LABELLED = ("upos", "smp")  # need human labels
SCORING = ("sma", "smp", "amo")  # need a quality model


def sampling_weights(
    sampler: str, labels: np.ndarray | None, quality: np.ndarray | None, tau: float, shape: tuple
) -> np.ndarray | None:
    """Probability of each ground truth of each set (paper Eq. 2-4 and the baselines of Sec. 5).

    labels:  (n, K) +1 positive, 0 similar, -1 negative, column 0 the original; upos and smp only
    quality: (n, K) image-level NR-IQA scores, up = better; sma and smp only
    tau:     softmax temperature on the scale of quality (tau -> inf: uniform)
    shape:   (n, K)
    Returns (n, K) float64, rows sum to 1, a set without candidates is a row of zeros; None for amo,
    whose choice is made per patch by `choose_argmax`.
    """
    if sampler == "amo":
        return None
    if sampler == "origs_only":
        return np.repeat(np.eye(1, shape[1]), shape[0], axis=0)
    if sampler == "rand":
        return np.full(shape, 1 / shape[1])
    allowed = labels > 0 if sampler in LABELLED else np.ones(shape, bool)
    # PAPER: Eq. 2, SoftMax_tau(Q(S_I)) over S_I = all or the positives; upos is tau -> infinity
    logits = np.zeros(shape) if sampler == "upos" else quality.astype(np.float64) / tau
    logits = np.where(allowed, logits, -np.inf)
    best = logits.max(1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(best), best, 0))
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


@torch.no_grad()
def choose_argmax(gts: Tensor, iqa: nn.Module) -> Tensor:
    """Argmax-online (paper Sec. 4.2): the best of the K patches of each sample.

    gts: (N, K, 3, H, W) in [0, 1], the same random location of every ground truth
    Returns (N,) int64 indices into K. A patch without a score (NaN) is not the best.
    """
    quality = iqa(gts.flatten(0, 1)).view(gts.shape[:2])
    return quality.nan_to_num(nan=-torch.inf).argmax(1)
