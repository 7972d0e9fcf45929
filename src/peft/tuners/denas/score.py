"""deltatuner's train-free score, term by term, and the formula that joins them.

Of a candidate with random deltas one batch goes forward in training mode, the logits are summed, and one backward pass
gives the gradients. Below, `w` is a trained matrix of the candidate (A or B of LoRA, scale or shift of SSF), `g` its
gradient, and a pair is `(w, g)`.

    score = ((w_e expressivity + w_c complexity + w_d diversity) / 1e9 + w_s saliency / 1e9) / (1 + w_l latency)

with 1e5 in place of the second 1e9 for SSF. deltatuner finds matrices by names (attn, mlp, ...) and counts those of the
frozen base, which have no gradient, as zeros; here the terms are over the delta's own parameters at its actual targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.peft_types import PeftType
from .config import DenasConfig

SCALE = 1e9
SALIENCY_SCALE = {PeftType.LORA: 1e9, PeftType.SSF: 1e5}
Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Terms:
    """The terms of one candidate's score."""

    expressivity: float
    complexity: float
    diversity: float
    saliency: float


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values, from the eigenvalues of the smaller Gram matrix in float64 (thin matrices: fast)."""
    M = matrix.flatten(1).double()
    gram = M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()


def size_of(tensor: Tensor) -> Tensor:
    """The nuclear norm of a matrix (or of a kernel, seen as one), the 2-norm of a vector."""
    return nuclear_norm(tensor) if tensor.dim() > 1 else torch.linalg.vector_norm(tensor.double())


def diversity(pairs: Pairs) -> float:
    """`sum over pairs of ||w|| * ||g||`, with nuclear norms of matrices and 2-norms of vectors."""
    return float(sum(size_of(w) * size_of(g) for w, g in pairs))


def saliency(pairs: Pairs) -> float:
    """Synaptic flow (arXiv 2006.05467, eq. 2): `sum over pairs of mean over rows of sum over columns of |w * g|`.

    A vector is one row.
    """
    return float(sum((w * g).abs().double().sum() / (w.shape[0] if w.dim() > 1 else 1) for w, g in pairs))


def expressivity(logits: Tensor, base_logits: Tensor) -> float:
    """How far the random delta moves the outputs: `||f(x; W + delta) - f(x; W)||_F`."""
    return float(torch.linalg.vector_norm(logits.detach().float() - base_logits.float()))


def complexity(deltas: Sequence[tuple[int, ...]]) -> float:
    """Degrees of freedom of the deltas: `r (O + I - r)` for `(O, I, r)` of a LoRA, n for `(n,)` other numbers.

    (`B M` and `M^-1 A` are the same delta for every invertible M (r, r), which takes r^2 from the sizes of A and B.)
    """
    return float(sum(d[2] * (d[0] + d[1] - d[2]) if len(d) == 3 else d[0] for d in deltas))


def de_score(terms: Terms, latency: float, config: DenasConfig, method: PeftType) -> float:
    """The formula above; latency is in seconds."""
    sum_ = (
        config.expressivity_weight * terms.expressivity
        + config.complexity_weight * terms.complexity
        + config.diversity_weight * terms.diversity
    ) / SCALE + config.saliency_weight * terms.saliency / SALIENCY_SCALE[method]
    return sum_ / (1 + config.latency_weight * latency)
