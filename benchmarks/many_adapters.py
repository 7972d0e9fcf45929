"""Time to load adapters, the 20th beside the first, and to inject into and save a model of LLaMA-7B's shape.

The model of the first part is a small Llama with random weights: what is timed is the bookkeeping, which grows with
the number of modules and adapters, not the reading of numbers. That of the second part lies on the meta device and has
no numbers; the adapter's are written. Each round runs one process per library, in turn, so that a slow phase of the
machine hits both alike. Upstream takes part as in `train_step.py`.

    python benchmarks/many_adapters.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from train_step import UPSTREAM_PYTHON

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
ROWS = {
    "first": "load the first adapter",
    "last": "load the 20th",
    "inject": "inject into 7B on meta",
    "save": "save its adapter",
}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def work(count: int) -> dict[str, float]:
    """Seconds of each row, with the peft of this interpreter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft import LoraConfig, PeftModel, get_peft_model

    def config():
        return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        base = LlamaForCausalLM(LlamaConfig(**SMALL))
        get_peft_model(base, config()).save_pretrained(folder)
        model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**SMALL)), folder)
        times = [timed(partial(model.load_adapter, folder, f"number-{i}")) for i in range(count)]
        seconds["first"], seconds["last"] = times[0], times[-1]
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
        model = None

        def inject():
            nonlocal model
            model = get_peft_model(base, config())

        seconds["inject"] = timed(inject)
        tensors = {
            name: torch.empty_like(parameter, device="cpu")
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        # The file needs numbers: they are given, as a gathered state dict would be.
        seconds["save"] = timed(lambda: model.save_pretrained(folder, state_dict=tensors))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=20, help="adapters")
    parser.add_argument("--upstream-python", metavar="PATH", help="interpreter of an environment with upstream's peft")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.count)))
        return
    pythons = {"ours": sys.executable}
    upstream = args.upstream_python or (str(UPSTREAM_PYTHON) if UPSTREAM_PYTHON.exists() else None)
    if upstream:
        pythons["upstream"] = upstream
    results: dict[str, list[dict]] = {name: [] for name in pythons}
    for _ in range(args.rounds):
        for name, python in pythons.items():
            environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
            if name == "upstream":
                environment.pop("PYTHONPATH", None)  # it would put our package before upstream's
            command = [python, __file__, "--worker", f"--count={args.count}"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"The worker of {name!r} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| ms, median (minimum) | " + " | ".join(pythons) + " |\n|---|" + "---:|" * len(pythons))
    for row, label in ROWS.items():
        times = [[1e3 * one[row] for one in results[name]] for name in pythons]
        print(f"| {label} | " + " | ".join(f"{statistics.median(t):.0f} ({min(t):.0f})" for t in times) + " |")


if __name__ == "__main__":
    main()
