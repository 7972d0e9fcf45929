"""Prefix tuning beside full fine-tuning: time, memory and quality on a small T5 that learns to judge reviews.

There is no network to fetch a model or data with, so both are made here. A T5 with random weights is first trained to
read: it names the thing that a sentence is about, or says whether it is kind ("good", "bad"). Then it is to judge
reviews, which are written in another form, by the words "positive" and "negative": once with all of its weights,
once with nothing but a prefix of keys and values in front of its decoder's.

    python examples/prefix_tuning_t5.py --plot prefix.png
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft import PrefixTuningConfig, TaskType, get_peft_model

KIND = "great lovely superb charming tasty brilliant pleasant fresh warm perfect".split()
UNKIND = "awful dreadful poor boring stale broken horrid bland cold rotten".split()
THINGS = "film book soup hotel song train garden phone coffee novel museum jacket".split()
FRAME = "the a was is it not and but i found we thought quite rather very topic mood : .".split()
ANSWERS = "good bad positive negative".split()
VOCABULARY = {word: number for number, word in enumerate(["<pad>", "</s>", *FRAME, *ANSWERS, *KIND, *UNKIND, *THINGS])}
Pair = tuple[str, str]


def sentence(rng: random.Random) -> Pair:
    """A sentence to learn reading from, with what is asked about it, and the answer."""
    thing, kind, negated = rng.choice(THINGS), rng.random() < 0.5, rng.random() < 0.3
    words = [rng.choice(KIND if kind != negated else UNKIND), rng.choice(KIND if kind else UNKIND)]
    text = f"the {thing} was {'not ' if negated else ''}{words[0]} and {rng.choice(['quite', 'very'])} {words[1]} ."
    return rng.choice([(f"topic : {text}", thing), (f"mood : {text}", "good" if kind else "bad")])


def review(rng: random.Random) -> Pair:
    """A review and its label: a negation turns the word around."""
    thing, kind, negated = rng.choice(THINGS), rng.random() < 0.5, rng.random() < 0.3
    start = rng.choice([f"i found the {thing}", f"we thought the {thing} was", f"it is a {thing} i found"])
    words = ["not"] * negated + [rng.choice(["very", "quite"]), rng.choice(KIND if kind else UNKIND)]
    text = f"mood : {start} {' '.join(words)} ."
    return text, "positive" if kind != negated else "negative"


def encode(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """Token ids, padded on the right; labels end with the end of the sequence."""
    rows = [[VOCABULARY[word] for word in text.split()] + [1] for text, _ in pairs]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([[VOCABULARY[answer], 1] for _, answer in pairs]),
    }


def batches(make, steps: int, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rng = random.Random(seed)
    for _ in range(steps):
        yield encode([make(rng) for _ in range(size)])


def make_t5(width: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@torch.no_grad()
def accuracy(model: nn.Module, make, rows: int = 300) -> float:
    """The share of answers, generated for new examples, that are right."""
    (batch,) = batches(make, 1, rows, seed=10**6)
    labels = batch.pop("labels")
    answers = model.eval().generate(**batch, max_new_tokens=1, decoder_start_token_id=0)
    return (answers[:, 1] == labels[:, 0]).float().mean().item()


def kept_for_backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of what one forward keeps for its backward, the model's own parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch).loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def train(model: nn.Module, make, steps: int, size: int, rate: float, seed: int, every: int = 0) -> dict:
    """Train with AdamW; what it took, and the accuracy after every `every` steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    seconds, curve = 0.0, []
    for step, batch in enumerate(batches(make, steps, size, seed), start=1):
        model.train()
        start = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if every and step % every == 0:
            curve.append((step, accuracy(model, make)))
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": states,
        "activations": kept_for_backward(model, batch),
        "seconds": seconds,
        "curve": curve,
    }


def full(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return model


def prefix(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    # With num_transformer_submodules=1 every layer of the decoder has a prefix of its own.
    sizes = {"num_virtual_tokens": args.tokens, "num_transformer_submodules": 1}
    config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, **sizes)
    return get_peft_model(model, config)


METHODS = {"full fine-tuning": (full, 1e-3), "prefix tuning": (prefix, 3e-2)}  # with their learning rates


def run(seed: int, args: argparse.Namespace) -> dict[str, dict]:
    torch.manual_seed(seed)
    base = make_t5(args.width)
    train(base, sentence, args.base_steps, args.batch_size, 2e-3, seed)
    results = {"not adapted": {"trained": 0, "seconds": 0.0, "accuracy": accuracy(base, review), "curve": []}}
    print(f"seed {seed}: the base model answers {accuracy(base, sentence):.1%} of the questions of its own training")
    for name, (adapt, rate) in METHODS.items():
        model = adapt(copy.deepcopy(base), args)
        result = train(model, review, args.steps, args.batch_size, rate, seed + 1, max(1, args.steps // 10))
        results[name] = result | {"accuracy": accuracy(model, review)}
    return results


def table(results: list[dict[str, dict]]) -> str:
    """Means over the seeds as Markdown; memory is that of a training step beside the weights themselves."""
    parts = ("gradients", "optimizer", "activations")
    head = ["", "trained parameters", *(f"{part}, KiB" for part in parts), "CPU seconds", "accuracy, %"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, first in results[0].items():
        accuracies = [100 * result[name]["accuracy"] for result in results]
        error = statistics.stdev(accuracies) / len(results) ** 0.5 if len(results) > 1 else float("nan")
        seconds = statistics.mean(result[name]["seconds"] for result in results)
        memory = [f"{first[part] / 2**10:,.0f}" if part in first else "0" for part in parts]
        cells = [
            name,
            f"{first['trained']:,}",
            *memory,
            f"{seconds:.1f}",
            f"{statistics.mean(accuracies):.1f} ± {error:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, dict]], path: str) -> None:
    """Accuracy over the steps, and memory by part."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    bottoms = dict.fromkeys(METHODS, 0.0)
    for name in METHODS:
        curves = [result[name]["curve"] for result in results]
        steps = [step for step, _ in curves[0]]
        left.plot(
            steps, [100 * statistics.mean(point) for point in zip(*([a for _, a in c] for c in curves))], label=name
        )
    for part in ("gradients", "optimizer", "activations"):
        sizes = [results[0][name][part] / 2**10 for name in METHODS]
        right.bar(list(METHODS), sizes, bottom=list(bottoms.values()), label=part)
        bottoms = {name: bottoms[name] + size for name, size in zip(METHODS, sizes)}
    left.set(xlabel="steps", ylabel="accuracy, %", title="reviews judged rightly")
    right.set(ylabel="KiB beside the weights", title="memory of a training step")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is repeated (default: 3)")
    parser.add_argument("--width", type=int, default=64, help="of the model, a multiple of 8 (default: 64)")
    parser.add_argument("--tokens", type=int, default=16, help="virtual tokens of the prefix (default: 16)")
    parser.add_argument("--base-steps", type=int, default=600, help="of the base model's training (default: 600)")
    parser.add_argument("--steps", type=int, default=300, help="of each method's training (default: 300)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--plot", help="file for the plot")
    args = parser.parse_args(argv)
    if (
        min(args.seeds, args.tokens, args.base_steps, args.steps, args.batch_size) < 1
        or args.width % 8
        or args.width < 8
    ):
        parser.error(
            "--seeds, --tokens, --base-steps, --steps and --batch-size must be at least 1, --width a multiple of 8"
        )
    torch.set_num_threads(1)  # so small a model gains nothing from more
    results = [run(seed, args) for seed in range(args.seeds)]
    print("\n" + table(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
