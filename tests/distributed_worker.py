"""Runs for test_distributed.py: `distributed_worker.py FOLDER loops|trainers|adapters|zero3`, started by torchrun.

Each scenario takes its start (model, batches) from the folder, where the test has put it, and leaves its result there.
The test imports the same functions to do in one process, on the joined batch, what the two processes did.
"""

import contextlib
import copy
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sft_runs import snapshot
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

from peft import SftAdamW, SftConfig, SftSelector, SftSM3, get_peft_model, get_peft_model_state_dict
from peft.tuners.sft import gradients
from peft.utils.placement import is_sharded, whole_tensor

BETAS = (0.9, 0.99)
TOTAL = 20


class Net(nn.Module):
    """Two layers with a choice of experts between them; the first input feature chooses."""

    def __init__(self, recompute=None):
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.experts = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.last = nn.Linear(9, 5)
        self.recompute = recompute

    def middle(self, h, chosen):
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):  # as mixtures of experts do: a layer without tokens is not run
                y = y.index_copy(0, rows, torch.tanh(expert(h[rows])))
        return y

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.recompute == "shared":
            once, between, _ = self.experts
            return self.last(once(torch.tanh(between(once(h)))))
        chosen = x[:, 0].round()
        if self.recompute is None:
            h = self.middle(h, chosen)
        else:
            h = checkpoint.checkpoint(self.middle, h, chosen, use_reentrant=self.recompute == "reentrant")
        return self.last(h)


def adapted(algorithm="rigl", recompute=None):
    config = SftConfig(
        target_modules=["first", "last", "0", "1", "2"],
        dtype="auto",
        density=0.3,
        selection_algorithm=algorithm,
        reselection_steps=6,
        selection_accumulation_steps=3,
    )
    return get_peft_model(Net(recompute).double(), config)


def random_batches(steps, micro_batches, experts):
    """[update step][micro-batch] -> (inputs, targets), of 8 rows; `experts(step, micro-batch)` chooses for each row."""
    batches = []
    for step in range(steps):
        batches.append([])
        for micro in range(micro_batches):
            x = torch.randn(8, 7).double()
            x[:, 0] = torch.as_tensor(experts(step, micro)).double()
            batches[-1].append((x, torch.randn(8, 5).double()))
    return batches


def drive(model, adapter, start=0, **settings):
    config = adapter.peft_config["default"]
    params = [param for param in model.parameters() if param.requires_grad]
    if config.selection_algorithm == "sm3":
        optimizer = SftSM3(params, {delta.values: delta for _, _, delta in adapter.active_deltas()}, lr=0.05)
    else:
        optimizer = SftAdamW(params, lr=0.05, betas=BETAS)
    return optimizer, SftSelector(model, optimizer, config, TOTAL, 1, start, **settings)


def train(model, optimizer, selector, batches, scaler=None, clip=None):
    for micro_batches in batches:
        for number, (x, y) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = (model(x) - y).square().mean() / len(micro_batches)
                (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        selector.step()


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)


@contextlib.contextmanager
def blocks_of(rows):
    """Gradients of nine columns are formed in blocks of so many rows."""
    whole = gradients.WORKSPACE_BYTES
    gradients.WORKSPACE_BYTES = rows * 9 * 8
    try:
        yield
    finally:
        gradients.WORKSPACE_BYTES = whole


def share_of(rank, batches):
    """The rows of this process."""
    return [[(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in micro_batches] for micro_batches in batches]


def message_of(error, make):
    """What is refused: the message, or None."""
    try:
        make()
    except error as refused:
        return str(refused)
    return None


# ---- Loops ----

PLAIN = {  # scenario -> algorithm, recompute, settings of DDP
    "rigl": ("rigl", None, {}),
    "sm3": ("sm3", None, {}),
    "experts": ("rigl", None, {"find_unused_parameters": True}),
    "reentrant": ("rigl", "reentrant", {}),
    "recompute": ("rigl", "not reentrant", {}),
    "overflow": ("rigl", None, {}),
    "shared": ("rigl", "shared", {"find_unused_parameters": True}),
    "clipped": ("rigl", None, {}),
}
CLIP = {"clipped": 0.02}  # largest norm


def run_plain(name, folder, rank):
    model, batches = torch.load(folder / f"{name}.pt", weights_only=False)
    _, _, settings = PLAIN[name]
    if rank == 1:  # DDP has to copy the weights and the positions from rank 0
        for param in model.parameters():
            param.data = torch.randn(param.shape).double() if param.is_floating_point() else param.data.flip(0)
    parallel = DistributedDataParallel(model, **settings)
    grads = scaler() if name == "overflow" else None
    if name == "recompute":  # the selector may be told what it does not see
        optimizer, selector = drive(model, model, process_group=dist.group.WORLD)
    else:
        optimizer, selector = drive(parallel, model)
    copied = copy.deepcopy(model)  # in a gathering window; it takes no part in the run
    with blocks_of(2) if name == "experts" else contextlib.nullcontext():
        train(parallel, optimizer, selector, share_of(rank, batches), grads, CLIP.get(name))
    selector.close()
    copied(batches[0][0][0]).sum().backward()
    return {"state": snapshot(model, optimizer), "history": selector.history, "discarded": selector.discarded_updates}


def run_resumed(folder, rank):
    """The experts again, stopped in the middle of the second window and continued by new objects."""
    stop = 8
    _, batches = torch.load(folder / "experts.pt", weights_only=False)
    batches = share_of(rank, batches)
    saved, gathering = None, []
    for part in (batches[:stop], batches[stop:]):
        model, _ = torch.load(folder / "experts.pt", weights_only=False)
        if saved is not None:
            model.load_state_dict(saved[0])
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer, selector = drive(parallel, model)
        if saved is not None:
            optimizer.load_state_dict(saved[1])
            selector.load_state_dict(saved[2])
        train(parallel, optimizer, selector, part)
        saved = model.state_dict(), optimizer.state_dict(), selector.state_dict()
        gathering.append(any(key.endswith(".candidates") for key in saved[2]))
        selector.close()
    return {"state": snapshot(model, optimizer), "gathering": gathering}


def run_alone(folder, rank):
    """Every process trains a model of its own, the second one for longer."""
    model, batches = torch.load(folder / f"alone{rank}.pt", weights_only=False)
    undecided = message_of(ValueError, lambda: drive(model, model))
    optimizer, selector = drive(model, model, process_group=None)
    train(model, optimizer, selector, batches)
    return {"state": snapshot(model, optimizer), "undecided": undecided}


def run_sharded(name, folder, rank):
    """FSDP2 with an adapter whose positions are not exchanged, by any optimiser."""
    model, batches = torch.load(folder / f"sharded-{name}.pt", weights_only=False)
    base = model.get_base_model()
    for module in (base.first, *base.experts, model):
        fully_shard(module)
    refused = message_of(ValueError, lambda: drive(model, model)) if name == "SFT" else None
    train_plainly(model, share_of(rank, batches))
    return {"adapter": whole_adapter(model), "refused": refused}


def whole_adapter(model):
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: whole_tensor(value).detach().clone() for key, value in tensors.items()}


def train_plainly(model, batches):
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1, momentum=0.9)
    for [(x, y)] in batches:
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def run_fsdp1(folder, rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted().float()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), ignored_states=[
        delta.indices for _, _, delta in model.active_deltas()])  # fmt: skip
    return message_of(ValueError, lambda: drive(wrapped, model))


def run_blocks(folder, rank):
    """Processes that cut the gradient into other blocks."""
    model = adapted()
    optimizer, selector = drive(model, model, process_group=dist.group.WORLD)
    with blocks_of(1 + rank):
        return message_of(RuntimeError, lambda: model(torch.randn(3, 7).double()).sum().backward())


class Disordered(nn.Module):
    """Runs its layers in an order of its own on rank 0."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        order = (self.first, self.third, self.second) if dist.get_rank() == 0 else (self.first, self.second, self.third)
        for layer in order:
            x = layer(x)
        return x


def run_disordered(folder, rank):
    """Ends the process group: rank 0 stops, and the others find out."""
    model = get_peft_model(Disordered(), SftConfig(target_modules=["first", "second", "third"], density=0.3))
    optimizer, selector = drive(model, model, process_group=dist.group.WORLD)
    return message_of(RuntimeError, lambda: model(torch.randn(3, 4)).sum().backward())


def loops(folder, rank):
    dist.init_process_group("gloo")
    run = {name: lambda name=name: run_plain(name, folder, rank) for name in PLAIN}
    run |= {f"sharded-{name}": lambda name=name: run_sharded(name, folder, rank) for name in ("SFT", "LORA", "SSF")}
    run |= {
        name: lambda function=function: function(folder, rank)
        for name, function in (
            ("resumed", run_resumed),
            ("alone", run_alone),
            ("fsdp1", run_fsdp1),
            ("blocks", run_blocks),
            ("disordered", run_disordered),  # the last one
        )
    }
    for name, scenario in run.items():
        torch.save(scenario(), folder / f"{name}.{rank}.pt")


# ---- Trainer and accelerate ----

STEPS = 12


def make_trainer(model, data, output, rows, **settings):
    """SftTrainer on `model`; `rows` per process and micro-batch."""
    from transformers import Trainer, TrainingArguments

    from peft import SftTrainer

    args = TrainingArguments(
        str(output),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        save_steps=7,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return SftTrainer(Trainer)(model, args, train_dataset=data)


def run_trainer(name, folder, rank):
    """The whole training, and the end of it from the checkpoint in the middle of the second gathering window."""
    result = {}
    for key in ("unbroken", "resumed"):
        model, data = torch.load(folder / f"{name}.pt", weights_only=False)
        torch.manual_seed(rank)
        trainer = make_trainer(model, data, folder / name, rows=3)
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-7") if key == "resumed" else None)
        result[key] = {"state": snapshot(model), "history": trainer.sft_selector.history}
    return result


def run_without_file(folder, rank):
    """A checkpoint of which rank 1, on another machine, has not got everything."""
    checkpoint_folder = folder / "trainer-rigl" / "checkpoint-7"
    if rank == 1:
        checkpoint_folder = shutil.copytree(
            checkpoint_folder, folder / "incomplete", ignore=lambda *_: ["sft_selector.safetensors"]
        )
    model, data = torch.load(folder / "trainer-rigl.pt", weights_only=False)
    trainer = make_trainer(model, data, folder / "never", rows=3)
    return message_of(ValueError, lambda: trainer.train(resume_from_checkpoint=str(checkpoint_folder)))


def run_accelerate(folder, rank):
    from accelerate import Accelerator

    model, batches = torch.load(folder / "accelerate.pt", weights_only=False)
    rows = [torch.cat([micro[part] for step in batches for micro in step]) for part in range(2)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SftAdamW([param for param in model.parameters() if param.requires_grad], lr=0.05, betas=BETAS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    selector = SftSelector(model, optimizer, model.module.peft_config["default"], TOTAL, 2)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            selector.step()
    return snapshot(model.module)


def trainers(folder, rank):
    for name in ("trainer-rigl", "trainer-sm3"):
        torch.save(run_trainer(name, folder, rank), folder / f"{name}.{rank}.pt")
    torch.save(run_without_file(folder, rank), folder / f"without-file.{rank}.pt")
    torch.save(run_accelerate(folder, rank), folder / f"accelerate.{rank}.pt")


# ---- Adapters of language models, by accelerate ----

ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # 1 otherwise
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # 0: the adapter's small tensors are partitioned like all others
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def make_accelerator(kind):
    """For DDP, FSDP2 or DeepSpeed. accelerate has the latter two on accelerators only, so it is told afterwards."""
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    told = {"fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    for state in (PartialState, AcceleratorState):  # the one is copied into the other now and then
        state._shared_state["distributed_type"] = told.get(kind, DistributedType.MULTI_CPU)
    if kind == "fsdp2":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
    elif kind == "zero3":
        plugin = DeepSpeedPlugin(hf_ds_config=ZERO3)
        plugin.select(_from_accelerator_state=True)
        accelerator.state.deepspeed_plugins = {"default": plugin}
        accelerator.deepspeed_engine_wrapped = None
    return accelerator


def train_tokens(model, optimizer, batches, backward):
    for ids in batches:
        backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()


def adapters_optimizer(model):
    return torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1, momentum=0.9)


def run_adapter(kind, method, folder, rank):
    """Train two steps, save the adapter in two ways; save the state, train on, and load the state again."""
    model, batches = torch.load(folder / f"{method}.pt", weights_only=False)
    accelerator = make_accelerator(kind)
    model, optimizer = accelerator.prepare(model, adapters_optimizer(model))
    share = [ids.chunk(2)[rank] for ids in batches]
    train_tokens(model, optimizer, share, accelerator.backward)
    plain = accelerator.unwrap_model(model)
    place = folder / f"{kind}-{method}"
    options = {"is_main_process": accelerator.is_main_process, "save_embedding_layers": False}
    plain.save_pretrained(place / "gathered", **options)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:  # which alone has it all, and alone saves, as in transformers' Trainer
        plain.save_pretrained(place / "state dict", state_dict=state, **options)
    tensors = whole_adapter(plain)
    accelerator.save_state(place / "state")
    train_tokens(model, optimizer, share, accelerator.backward)
    later = whole_adapter(plain)
    accelerator.load_state(place / "state")
    restored = whole_adapter(plain)
    sharded = [name for name, p in plain.named_parameters() if is_sharded(p)]
    return {"tensors": tensors, "later": later, "restored": restored, "sharded": sharded}


def adapters(folder, rank, kinds=("ddp", "fsdp2")):
    for kind in kinds:
        for method in ("lora", "ssf"):
            torch.save(run_adapter(kind, method, folder, rank), folder / f"{kind}-{method}.{rank}.pt")


def zero3(folder, rank):
    adapters(folder, rank, ["zero3"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = {"loops": loops, "trainers": trainers, "adapters": adapters, "zero3": zero3}
    runs[sys.argv[2]](Path(sys.argv[1]), int(os.environ["RANK"]))
