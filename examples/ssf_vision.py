"""Adapting an image classifier to other images: linear probe, SSF, LoRA and full fine-tuning side by side.

A small vision transformer is trained on scikit-learn's handwritten digits (8 x 8 pixels). Then the digits are inverted,
turned on their side and covered with noise, and each method adapts the trained model to a few of them; the others tell
the accuracy. Everything is repeated for several seeds: other weights, other noise, another division.

    python examples/ssf_vision.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft import LoraConfig, SsfConfig, get_peft_model

BATCH = 64
HEAD = "classifier"
# The linear layers of ViT's blocks. SSF stands behind every operation: norms and the convolution of the patches too.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
OTHERS = ["projection", "layernorm_before", "layernorm_after", "layernorm"]

Data = tuple[torch.Tensor, torch.Tensor]  # images (N, 1, 8, 8) in -1..1, labels (N,)


def load_digits() -> Data:
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The images inverted, turned by 90 degrees, with noise."""
    return -images.rot90(dims=(2, 3)) + 0.3 * torch.randn_like(images)


def make_vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=48, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def linear_probe(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def ssf(model: nn.Module) -> nn.Module:
    return get_peft_model(model, SsfConfig(target_modules=[*LINEAR, *OTHERS], modules_to_save=[HEAD]))


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, modules_to_save=[HEAD]))


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


METHODS = {  # with their learning rates
    "linear probe": (linear_probe, 1e-2),
    "SSF": (ssf, 1e-2),
    "LoRA, rank 4": (lora, 5e-3),
    "full fine-tuning": (full, 1e-3),
}


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """AdamW with a learning rate that falls to 0 along a cosine."""
    images, labels = data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data
    return (model.eval()(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()


def run(seed: int, args: argparse.Namespace) -> dict[str, tuple[int, float, float]]:
    """`{method: (trained parameters, accuracy, CPU seconds)}` for one seed."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    # Three parts: to train the base model, to adapt it, to measure.
    last, few = len(images) // 2, args.images
    base = make_vit()
    train(base, (images[:last], labels[:last]), args.base_epochs, 3e-3)
    original = images[last + few :], labels[last + few :]
    images = shifted(images[last:])
    new = images[:few], labels[last : last + few]
    held_out = images[few:], labels[last + few :]

    results = {
        "not adapted, original digits": (0, accuracy(base, original), 0.0),
        "not adapted": (0, accuracy(base, held_out), 0.0),
    }
    for name, (adapt, rate) in METHODS.items():
        model = adapt(copy.deepcopy(base))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        start = time.process_time()
        train(model, new, args.epochs, rate)
        results[name] = trained, accuracy(model, held_out), time.process_time() - start
    return results


def table(results: list[dict[str, tuple[int, float, float]]]) -> str:
    """Means and standard errors over the seeds, as Markdown."""
    lines = ["| | trained parameters | accuracy, % | CPU seconds |", "|---|---:|---:|---:|"]
    for name, (trained, _, _) in results[0].items():
        accuracies = [100 * result[name][1] for result in results]
        error = statistics.stdev(accuracies) / len(results) ** 0.5 if len(results) > 1 else float("nan")
        seconds = statistics.mean(result[name][2] for result in results)
        lines.append(f"| {name} | {trained:,} | {statistics.mean(accuracies):.1f} ± {error:.1f} | {seconds:.1f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is repeated (default: 3)")
    parser.add_argument("--images", type=int, default=300, help="shifted images to adapt to (default: 300)")
    parser.add_argument("--base-epochs", type=int, default=15, help="of the base model's training (default: 15)")
    parser.add_argument("--epochs", type=int, default=30, help="of each method's training (default: 30)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not 1 <= args.images < 800:
        parser.error(f"--seeds must be at least 1 and --images in 1..799, got {args.seeds} and {args.images}")
    torch.set_num_threads(1)  # so small a model gains nothing from more
    results = []
    for seed in range(args.seeds):
        results.append(run(seed, args))
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * result[1]:.1f} %" for name, result in results[-1].items()))
    print("\n" + table(results))


if __name__ == "__main__":
    main()
