"""The known formulations of a sparse delta beside each other: the table that decides which one `kernels.py` takes.

For the forward product (and its like, the gradient of the input): the delta written into the weight and taken out
again, a sparse product beside the frozen one, or a dense copy of the weight with the delta in it; given is what each
adds to the frozen product. For the gradient of the values: the sampled product, or the dense product of which the
entries are taken. N rows of input, float32 unless asked otherwise; minima of interleaved rounds.

    python benchmarks/sft_kernels.py --rounds 30
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from peft.tuners.sft import gradients, kernels
from peft.tuners.sft.layer import SparseDelta

SHAPES = ((576, 576), (1536, 576), (4096, 4096))  # (O, I): SmolLM2-135M's, and an attention layer of LLaMA-7B
DENSITIES = (0.003, 0.01, 0.03, 0.1)


def formulations(shape: tuple[int, int], density: float, tokens: int, dtype: torch.dtype) -> dict[str, Callable]:
    out_features, in_features = shape
    weight = torch.randn(shape, dtype=dtype)
    x, gradient = torch.randn(tokens, in_features, dtype=dtype), torch.randn(tokens, out_features, dtype=dtype)
    delta = SparseDelta(torch.Size(shape), int(density * weight.numel()), dtype)
    delta.values.data.normal_()
    values, indices = delta.values.detach(), delta.indices.detach()

    def written():
        with kernels._written(weight, False, [delta], [values], [indices]):
            F.linear(x, weight)

    def beside():
        F.linear(x, weight)
        kernels._multiply(x, values, indices, delta.shape, False)

    def dense_copy():
        F.linear(x, weight.flatten().scatter_add(0, indices.long(), values).view(shape))

    def sampled():
        blocks = (gradients.transposed_blocks(gradient), gradients.transposed_blocks(x))
        gradients._sampled_product(*blocks, indices)

    found = {
        "frozen": lambda: F.linear(x, weight),
        "written": written,
        "sparse beside": beside,
        "dense copy": dense_copy,
        "dense, then entries": lambda: (gradient.T @ x).view(-1)[indices.long()],
    }
    return found | ({"sampled": sampled} if gradients.can_compress(x) else {})


def milliseconds(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N = {args.tokens}, {args.dtype}, ms\n")
    print(
        "| O × I | density | frozen product | + written | + sparse beside | + dense copy | gradient: sampled | dense |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        for density in DENSITIES:
            ms = milliseconds(formulations(shape, density, args.tokens, getattr(torch, args.dtype)), args.rounds)
            frozen = ms["frozen"]
            added = " | ".join(f"{ms[name] - frozen:.2f}" for name in ("written", "sparse beside", "dense copy"))
            sampled = f"{ms['sampled']:.2f}" if "sampled" in ms else "–"
            print(
                f"| {shape[0]} × {shape[1]} | {100 * density:.1f} % | {frozen:.2f} | {added} | {sampled} | "
                f"{ms['dense, then entries']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
