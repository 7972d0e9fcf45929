"""Two processes, started by torchrun, against one process on the joined batch.

Both round differently: of two candidates whose gradients agree in six digits they may choose different ones, and a
gradient that all but cancels differs in more than its last digits. So what they start from is the same at each run.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from sft_runs import assert_same
from tiny_models import adapted, llama, logits, tokens
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import (
    LoraConfig,
    PeftModel,
    SftConfig,
    SftTrainer,
    SsfConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

WORKER = Path(worker.__file__)


def launch(folder, kind):
    """Run the worker in two processes; a free port is found by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run(
        [*command, str(folder), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},  # the peft that is tested
        capture_output=True,
        text=True,
        timeout=900,  # for a hang
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def results(folder, name):
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.endswith(".indices"):
            assert torch.equal(value, other[key]), key
        else:
            torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-7)


# ---- Loops ----


def any_expert(step, micro):
    return [0, 1, 2, 0, 1, 2, 0, 1]


def changing_experts(step, micro):
    """Rows 0..3 are rank 0's. Each rank uses other experts, and expert 2 nobody at first, or only one rank."""
    own = [[0] * 4 + [1] * 4, [1] * 4 + [0] * 4, [0, 0, 2, 1] + [1] * 4, [2] * 4 + [1, 0, 1, 0]]
    return own[(step + 2 * micro) % 4]


def alone_at_times(step, micro):
    return [0] * 4 + [1, 2, 1, 2] if step % 2 else any_expert(step, micro)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder that the two processes work in, with what they begin from."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    for name, (algorithm, recompute, settings) in worker.PLAIN.items():
        experts = changing_experts if settings else any_expert
        batches = worker.random_batches(11, 2, experts)
        if name == "overflow":  # on rank 1, in the first step of the second window
            batches[6][0][0][7] = torch.inf
        torch.save((worker.adapted(algorithm, recompute), batches), folder / f"{name}.pt")
    for rank in range(2):
        model = worker.adapted()
        torch.save((model, worker.random_batches(6 + 4 * rank, 1, any_expert)), folder / f"alone{rank}.pt")
    for name, model in sharded_models().items():
        torch.save((model, worker.random_batches(4, 1, any_expert)), folder / f"sharded-{name}.pt")
    return folder


def sharded_models():
    targets = ["first", "last", "0", "1", "2"]
    models = {
        "SFT": worker.adapted(),
        "LORA": get_peft_model(worker.Net().double(), LoraConfig(target_modules=targets, r=2)),
        "SSF": get_peft_model(worker.Net().double(), SsfConfig(target_modules=targets)),
    }
    for model in models.values():
        for param in model.parameters():
            if param.requires_grad:  # an adapter that does nothing would hide what is wrong with it
                param.data += 0.1 * torch.randn_like(param)
    return models


@pytest.fixture(scope="module")
def loops(start):
    launch(start, "loops")
    return start


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    torch.manual_seed(0)
    rows = torch.randint(32, (12 * worker.STEPS, 6))  # one epoch: whole batches only
    data = [{"input_ids": row, "labels": row} for row in rows]
    for algorithm in ("rigl", "sm3"):
        torch.save((adapted_llama(algorithm), data), folder / f"trainer-{algorithm}.pt")
    batches = worker.random_batches(11, 2, any_expert)
    torch.save((worker.adapted(), batches), folder / "accelerate.pt")
    launch(folder, "trainers")
    return folder


def adapted_llama(algorithm):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    settings = {"density": 0.2, "reselection_steps": 5, "selection_accumulation_steps": 3, "dtype": "auto"}
    sft = SftConfig(task_type="CAUSAL_LM", selection_algorithm=algorithm, **settings)
    return get_peft_model(LlamaForCausalLM(config).double(), sft)


@pytest.mark.parametrize("name", worker.PLAIN)
def test_two_processes_do_what_one_does(name, loops):
    model, batches = torch.load(loops / f"{name}.pt", weights_only=False)
    scaler = worker.scaler() if name == "overflow" else None
    optimizer, selector = worker.drive(model, model)
    worker.train(model, optimizer, selector, batches, scaler, worker.CLIP.get(name))

    one, other = results(loops, name)
    assert_same(one["state"], other["state"])
    assert one["history"] == other["history"] == selector.history
    assert [entry["step"] for entry in selector.history] == [3, 9] and selector.history[0]["moved"] > 0
    assert one["discarded"] == other["discarded"] == selector.discarded_updates == (name == "overflow")
    assert_close(one["state"], worker.snapshot(model, optimizer))


def test_a_resumed_run_is_the_same_run(loops):
    unbroken, resumed = results(loops, "experts"), results(loops, "resumed")
    for rank in range(2):
        assert_same(unbroken[rank]["state"], resumed[rank]["state"])
        assert resumed[rank]["gathering"] == [True, False]  # where it was stopped, and at the end


def test_processes_may_train_models_of_their_own(loops):
    for rank, result in enumerate(results(loops, "alone")):
        model, batches = torch.load(loops / f"alone{rank}.pt", weights_only=False)
        optimizer, selector = worker.drive(model, model)
        worker.train(model, optimizer, selector, batches)
        assert_same(result["state"], worker.snapshot(model, optimizer))
        assert "There are 2 processes, but PeftModel does not tell whether they share" in result["undecided"]


def test_a_process_group_must_exist():
    model = worker.adapted()
    with pytest.raises(ValueError, match="process_group is 'all', but torch.distributed is not initialized"):
        worker.drive(model, model, process_group="all")


def test_an_order_that_differs_is_an_error(loops):
    confused, left = results(loops, "disordered")
    assert "Rank 0 runs the adapted layers in another order" in confused and "delta 2 of 3" in confused
    assert left is not None  # it does not wait for ever


def test_blocks_that_differ_are_an_error(loops):
    for message in results(loops, "blocks"):
        assert "The ranks see the gradient of delta 4 in different blocks: [(4, 0, 9), (4, 0, 18)]" in message


@pytest.mark.parametrize("name", ["SFT", "LORA", "SSF"])
def test_adapters_train_under_fully_shard(name, loops):
    model, batches = torch.load(loops / f"sharded-{name}.pt", weights_only=False)
    before = copy.deepcopy(get_peft_model_state_dict(model))
    worker.train_plainly(model, batches)
    after = get_peft_model_state_dict(model)
    assert any(not torch.equal(before[key], after[key]) for key in after)
    for result in results(loops, f"sharded-{name}"):
        assert_close(result["adapter"], after)
        if name == "SFT":
            assert "FSDP2 (fully_shard) partitions the trained values" in result["refused"]


def test_reselection_under_fsdp1_is_refused(loops):
    for message in results(loops, "fsdp1"):
        assert "FSDP partitions the trained values" in message


# ---- Trainer and accelerate ----


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_the_trainer_in_two_processes(algorithm, trainers, tmp_path):
    model, data = torch.load(trainers / f"trainer-{algorithm}.pt", weights_only=False)
    trainer = worker.make_trainer(model, data, tmp_path, rows=6)
    trainer.train()
    one, other = results(trainers, f"trainer-{algorithm}")
    assert_same(one["unbroken"]["state"], other["unbroken"]["state"])
    assert_close(one["unbroken"]["state"], worker.snapshot(model))
    assert one["unbroken"]["history"] == trainer.sft_selector.history
    assert [entry["step"] for entry in trainer.sft_selector.history] == [3, 8]
    for result in (one, other):
        assert_same(result["unbroken"]["state"], result["resumed"]["state"])
        assert result["resumed"]["history"] == result["unbroken"]["history"][1:]


def test_all_processes_need_the_checkpoint(trainers):
    for message in results(trainers, "without-file"):
        assert "sft_selector.safetensors is missing for the processes [1] of 2" in message


def test_a_loop_with_accelerate(trainers):
    model, batches = torch.load(trainers / "accelerate.pt", weights_only=False)
    optimizer, selector = worker.drive(model, model)
    worker.train(model, optimizer, selector, batches)
    one, other = results(trainers, "accelerate")
    assert_same(one, other)
    assert_close(one, worker.snapshot(model))


# ---- Adapters of language models, by accelerate ----


def start_adapters(folder):
    torch.manual_seed(0)
    for method in ("lora", "ssf"):
        base = llama(initializer_range=0.3)  # or the gradients vanish beside the numbers
        start = adapted(base, method=method, task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"])
        torch.save((start, [tokens(4) for _ in range(2)]), folder / f"{method}.pt")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = start_adapters(tmp_path_factory.mktemp("adapters"))
    launch(folder, "adapters")
    return folder


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = start_adapters(tmp_path_factory.mktemp("zero3"))
    launch(folder, "zero3")
    return folder


@pytest.mark.parametrize("method", ["lora", "ssf"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_adapters_train_and_are_saved_as_in_one_process(kind, method, request):
    folder = request.getfixturevalue("zero3" if kind == "zero3" else "adapters")
    model, batches = torch.load(folder / f"{method}.pt", weights_only=False)
    base = copy.deepcopy(model).unload()
    start = get_peft_model_state_dict(copy.deepcopy(model))
    worker.train_tokens(model, worker.adapters_optimizer(model), batches, torch.Tensor.backward)
    expected = get_peft_model_state_dict(model)
    assert all(not torch.equal(start[key], expected[key]) for key in expected)
    close = {"rtol": 1e-4, "atol": 1e-6}
    for result in results(folder, f"{kind}-{method}"):
        assert (kind == "ddp") != any(method in name for name in result["sharded"])
        assert result["tensors"].keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(result["tensors"][key], tensor, **close)
            assert not torch.equal(result["later"][key], result["tensors"][key])
            assert torch.equal(result["restored"][key], result["tensors"][key]), key
    for way in ("gathered", "state dict"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / f"{kind}-{method}" / way)
        saved = load_file(folder / f"{kind}-{method}" / way / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        torch.testing.assert_close(saved, expected, **close)
        same = copy.deepcopy(model).eval()
        set_peft_model_state_dict(same, saved)
        ids = tokens()
        torch.testing.assert_close(logits(loaded, ids), logits(same, ids))


@pytest.mark.parametrize("flag, name", [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")])
def test_the_trainer_refuses_what_partitions(flag, name, tmp_path):
    """By a stand-in for the flag: there is no DeepSpeed here, and accelerate has FSDP on accelerators only."""

    class PartitioningTrainer(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, flag, True)

    with pytest.raises(ValueError, match=f"{name} partitions the trained values or their optimizer's state"):
        SftTrainer(PartitioningTrainer)(worker.adapted(), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_selector_refuses_deepspeed(compiled):
    class Engine(torch.nn.Module):
        __module__ = "deepspeed.runtime.engine"

        def __init__(self, module):
            super().__init__()
            self.module = module

    model = worker.adapted()
    wrapped = torch.compile(Engine(model)) if compiled else Engine(model)
    with pytest.raises(ValueError, match="DeepSpeed partitions the trained values"):
        worker.drive(wrapped, model)


def test_the_selector_refuses_replicas():
    model = worker.adapted()
    replicated = torch.nn.DataParallel(model)
    worker.drive(replicated, model)  # on one device there are none
    replicated.device_ids = [0, 1]
    with pytest.raises(ValueError, match="drives 2 devices through nn.DataParallel"):
        worker.drive(replicated, model)
