"""Do DE-NAS's scores mean anything? Rank correlation of scores with the loss after a short fine-tuning.

    python benchmarks/denas_proxy.py                fine-tunes the structures that are missing, one by one
    python benchmarks/denas_proxy.py --table        only the table

Random structures of LoRA on all linear layers of SmolLM2-135M are each fine-tuned on a task of reasoning-gym, and the
loss on held-out problems is measured. Half of them are drawn over all sizes ("wide"), half from a band of parameters of
a few percent ("narrow"), where the mere number of parameters says nothing. Every structure writes one JSON file when it
is done, so that the benchmark can be stopped at any time and goes on where it was. The scores are computed for the
table; they see one batch of the training data. All structures share the order of the batches.

The table gives Spearman's correlation of each predictor with minus the loss (1: it orders structures as training does),
and its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from peft.tuners.denas.space import SearchSpace

RESULTS = Path(__file__).resolve().parent / "results" / "denas_proxy"
STRUCTURES = 24
"""Of each kind, wide and narrow."""
BAND = (0.98, 1.0)
"""Share of an even rank-4 LoRA's parameters that narrow structures have."""
SETTINGS = {
    "model": "smollm2", "task": "letter_counting", "granularity": "layer", "rank": 4, "r_max": 12, "steps": 60,
    "batch": 8, "rate": 1e-3, "train": 480, "held_out": 96, "max_length": 160, "seed": 0,
}  # fmt: skip
"""What a loss depends on; a file that was measured under others is refused."""


class Bench:
    """The model, the data, the search space, and the structures to measure."""

    def __init__(self) -> None:
        from peft import DenasConfig, LoraConfig
        from peft.cli.data import Collator, encode_rows, pad_id_of
        from peft.cli.models import load_model, load_tokenizer
        from peft.cli.tasks import Task, task_row
        from peft.tuners.denas.space import SearchSpace

        s = SETTINGS
        self.model: PreTrainedModel = load_model(s["model"], torch.float32)
        tokenizer = load_tokenizer(s["model"])
        task = Task(s["task"], {}, s["train"], s["held_out"], s["seed"])
        encoded = (
            encode_rows(tokenizer, [task_row(tokenizer, problem) for problem in problems], s["max_length"])[0]
            for problems in (task.train, task.held_out)
        )
        self.train, self.held_out = encoded
        self.collate = Collator(pad_id_of(tokenizer))
        rank = s["rank"]
        self.config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        search = DenasConfig(granularity=s["granularity"], r_max=s["r_max"])
        self.space: SearchSpace = SearchSpace(self.model, self.config, search, with_alpha=False)

    def structures(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and candidate of all structures, always the same."""
        from peft.tuners.denas.space import Budget

        full, most = self.space.full_params, int(self.space.costs.max(axis=1).sum())
        for kind, budget in (("wide", Budget(most)), ("narrow", Budget(int(BAND[1] * full), int(BAND[0] * full)))):
            rng = np.random.default_rng([SETTINGS["seed"], len(kind)])
            for number in range(STRUCTURES):
                codes = self.space.fit(self.space.draw(rng), budget, rng)
                if codes is None:
                    raise SystemExit(f"no structure has {budget.min_params:,} to {budget.max_params:,} parameters")
                yield f"{kind}-{number:02d}", codes

    def loss_after_training(self, codes: np.ndarray) -> float:
        """Mean held-out loss per token after a short fine-tuning of this structure."""
        from peft import get_peft_model
        from peft.tuners.denas import apply_structure

        torch.manual_seed(SETTINGS["seed"])
        model = get_peft_model(self.model, apply_structure(self.config, self.model, self.space.to_dict(codes)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SETTINGS["rate"])
        model.train()
        for batch in self.batches(self.train)[: SETTINGS["steps"]]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        total = count = 0
        with torch.no_grad():
            for batch in self.batches(self.held_out):
                tokens = int((batch["labels"] != -100).sum())
                total, count = total + model(**batch).loss.item() * tokens, count + tokens
        model.unload()
        return total / count

    def batches(self, examples: list) -> list[dict[str, torch.Tensor]]:
        size = SETTINGS["batch"]
        return [self.collate(examples[i : i + size]) for i in range(0, len(examples), size)]

    def predictors(self, codes: list[np.ndarray]) -> dict[str, list[float]]:
        """What each score, and each baseline, says of the structures."""
        from peft import DenasConfig
        from peft.tuners.denas.gradients import score_table
        from peft.tuners.denas.model import left_as_it_was
        from peft.tuners.denas.score import de_score
        from peft.tuners.denas.supernet import supernet

        space, batches = self.space, self.batches(self.train)[:2]
        found = {"number of parameters": [float(space.params(one)) for one in codes]}
        found["random"] = np.random.default_rng(1).random(len(codes)).tolist()
        config = DenasConfig(score="deltatuner")
        with left_as_it_was(self.model, SETTINGS["seed"]):
            self.model.eval()
            for score in ("gradient_energy", "gradient_norm"):
                table = score_table(self.model, space, batches, score)
                found[score] = [float(space.lookup(table, one)) for one in codes]
                if score == "gradient_energy":  # of each layer's largest rank, whatever the structure's
                    whole = np.repeat(table[:, -1:], table.shape[1], axis=1)
                    found["gradient norm of the layers"] = [float(space.lookup(whole, one)) for one in codes]
            with supernet(self.model, space, batches[0], SETTINGS["seed"]) as net:
                found["deltatuner"] = [de_score(net.terms(one), 0.0, config, space.method) for one in codes]
        return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; ties get their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def interval(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of `spearman`."""
    rng = np.random.default_rng(0)
    samples = (rng.integers(0, len(a), len(a)) for _ in range(draws))
    values = [spearman(a[i], b[i]) for i in samples if len(np.unique(a[i])) > 1 and len(np.unique(b[i])) > 1]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished structures by name."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, result in found.items():
        if result["settings"] != SETTINGS:
            raise SystemExit(
                f"{folder / name}.json was measured under other settings: delete it, or take another folder"
            )
    return found


def table(bench: Bench, results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the correlations."""
    lines = ["| predictor | structures | Spearman | 95 % |", "|---|---|---:|---:|"]
    for kind in ("wide", "narrow"):
        done = [
            (codes, results[name]["loss"]) for name, codes in bench.structures() if name in results and kind in name
        ]
        if len(done) < 3:
            lines.append(f"| | {kind}: {len(done)} | | |")
            continue
        gain = -np.array([loss for _, loss in done])
        for predictor, values in bench.predictors([codes for codes, _ in done]).items():
            values = np.array(values)
            low, high = interval(values, gain)
            lines.append(
                f"| {predictor} | {kind}: {len(done)} | {spearman(values, gain):.2f} | {low:.2f} to {high:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="fine-tune nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured structures")
    parser.add_argument("--limit", type=int, help="fine-tune at most so many structures now")
    args = parser.parse_args()
    from peft.config import write_atomically

    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    results, bench = read(args.results), Bench()
    todo = [] if args.table else [item for item in bench.structures() if item[0] not in results][: args.limit]
    for name, codes in todo:
        start = time.monotonic()
        loss = bench.loss_after_training(codes)
        result = {"settings": SETTINGS, "structure": bench.space.to_dict(codes), "loss": loss}
        result |= {"params": int(bench.space.params(codes)), "seconds": round(time.monotonic() - start)}
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(args.results / f"{name}.json", lambda path, text=text: Path(path).write_text(text))
        print(f"{name}: loss {loss:.4f}, {result['seconds']} s", file=sys.stderr, flush=True)
    print(table(bench, read(args.results)))


if __name__ == "__main__":
    main()
