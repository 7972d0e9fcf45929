"""What may predict how well a structure trains: DE-NAS's scores, candidates that lost to them, and baselines.

The first group of candidates are sums over modules, like "gradient_coherence" of the package. Of one batch a weight has
the inputs x (N, I), the gradients g (N, O) of its outputs, and the gradient G = g^T x with singular values sigma:

- gradient energy: `sum_{i<=r} sigma_i^2`; the decrease of the loss by gradient descent, as LoRA-GA starts.
- gradient norm: `sum_{i<=r} sigma_i`; "gradient_coherence" without its denominator.
- natural gradient: gradient energy of `C_g^-1/2 G C_x^-1/2`, where C are second moments of g and x, each plus the
  mean of its eigenvalues (K-FAC, arXiv 1503.05671).
- Fisher: r times the sum over examples of `|G_example|_F^2`.
- Adam: `r sum_o |G_o|_2 / sqrt(I)`; the decrease by Adam's first step of B, in expectation over A.

SynFlow and GraSP are of whole candidates with random factors w and their gradients d of the loss, so they cost passes
for each: `sum |w d|` (arXiv 2006.05467) and `-w^T H d` (arXiv 2002.07376, by a finite difference of gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from denas_proxy import Bench

    from peft.tuners.denas.supernet import Supernet

STEP = 1e-3
"""Of the finite difference, relative to the norms of w and d."""


def predictors(bench: Bench, candidates: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`{predictor: {structure: value}}`."""
    from peft import DenasConfig
    from peft.tuners.denas.gradients import score_table
    from peft.tuners.denas.model import left_as_it_was
    from peft.tuners.denas.score import de_score
    from peft.tuners.denas.supernet import supernet

    space, batches = bench.space, bench.batches()
    sizes = np.array(space.values[0])
    tables = {"number of parameters": space.costs, "number of layers": np.ones(space.costs.shape)}
    found: dict[str, dict[str, float]] = {}
    with left_as_it_was(bench.model, seed=0):
        bench.model.eval()
        tables = {"gradient_coherence": score_table(bench.model, space, batches)} | tables
        for batch in batches:
            calls = layer_calls(bench.model, batch, list(space.layout.places))
            for name, formula in FORMULAS.items():
                values = {key: formula(*call, sizes) for key, call in calls.items()}
                new = np.stack([sum(values[key] for key in unit.keys) for unit in space.units])
                tables[name] = tables.get(name, 0.0) + new
        with supernet(bench.model, space, batches[0], seed=0) as net:
            config = DenasConfig(score="deltatuner")
            for structure, codes in candidates.items():
                terms = net.terms(codes)
                one = {"deltatuner": de_score(terms, 0.0, config, space.method)} | of_loss(net)
                for name, value in one.items():
                    found.setdefault(name, {})[structure] = value
    by_table = {
        name: {structure: float(space.lookup(table, codes)) for structure, codes in candidates.items()}
        for name, table in tables.items()
    }
    random = {name: np.random.default_rng(list(name.encode())).random() for name in candidates}
    return by_table | found | {"random": random}


def layer_calls(model: nn.Module, batch: Mapping[str, Any], keys: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each linear layer its input (B, T, I) and its output's gradient (B, T, O)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(key: str):
        def forward(module, args, output):
            if not output.requires_grad:  # nothing before it is trained: the graph begins here
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda g: seen.__setitem__(key, (args[0].detach(), g)))
            return output

        return forward

    handles = [model.get_submodule(key).register_forward_hook(hook(key)) for key in keys]
    try:
        model(**batch).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- Sums over modules: of x (B, T, I), g (B, T, O) and ranks (V,) -> (V,) ----


def weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    return g.flatten(0, 1).T @ x.flatten(0, 1)


def spectrum(G: Tensor, ranks: np.ndarray, power: int) -> np.ndarray:
    from peft.tuners.denas.gradients import singular_values

    return singular_values(G, int(ranks.max())).double().pow(power).cumsum(0).numpy()[ranks - 1]


def natural_gradient(x: Tensor, g: Tensor, ranks: np.ndarray) -> np.ndarray:
    def whitening(rows: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        return vectors * (values.clamp_min(0) + values.mean()).rsqrt() @ vectors.T

    x, g = x.flatten(0, 1), g.flatten(0, 1) * g.shape[:2].numel()  # the gradient of each token's own loss
    return spectrum(whitening(g) @ (g.T @ x / len(x)) @ whitening(x), ranks, 2)


FORMULAS: dict[str, Callable[[Tensor, Tensor, np.ndarray], np.ndarray]] = {
    "gradient energy": lambda x, g, ranks: spectrum(weight_gradient(x, g), ranks, 2),
    "gradient norm": lambda x, g, ranks: spectrum(weight_gradient(x, g), ranks, 1),
    "natural gradient": natural_gradient,
    "Fisher": lambda x, g, ranks: ranks * torch.einsum("bto,bti->boi", g, x).square().sum().item(),
    "Adam": lambda x, g, ranks: ranks * (weight_gradient(x, g).norm(dim=1).sum() / x.shape[-1] ** 0.5).item(),
}


# ---- Of a candidate: of the supernet as it is set ----


def of_loss(net: Supernet) -> dict[str, float]:
    """SynFlow and GraSP of the candidate that was scored last."""
    parameters = [p for layer in net.active for name, p in layer.named_parameters() if "lora_" in name]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(net.model(**net.batch).loss, parameters))

    net.model.eval()
    start = [p.detach().clone() for p in parameters]
    d = gradients()
    step = STEP * total(start, start) ** 0.5 / max(total(d, d) ** 0.5, 1e-30)
    with torch.no_grad():
        for p, w, direction in zip(parameters, start, d):
            p.copy_(w + step * direction)
    moved = gradients()
    with torch.no_grad():
        for p, w in zip(parameters, start):
            p.copy_(w)
    product = [(after - before) / step for after, before in zip(moved, d)]
    flow = sum((w * direction).abs().sum().item() for w, direction in zip(start, d))
    return {"SynFlow": flow, "GraSP": -total(start, product)}


def total(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b))
