"""Two processes, started by torchrun, against one process on the joined batch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

from peft import LoraConfig, SsfConfig, get_peft_model, get_peft_model_state_dict

WORKER = Path(worker.__file__)


def launch(folder, kind):
    """Run the worker in two processes; a free port is found by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run(
        [*command, str(folder), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},  # the peft that is tested
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def results(folder, name):
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def assert_close(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.endswith(".indices"):
            assert torch.equal(value, other[key]), key
        else:
            torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-7, msg=lambda text: f"{key}: {text}")


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
        for name, param in model.named_parameters():
            if param.requires_grad:  # an adapter that does nothing would hide what is wrong with it
                param.data += 0.1 * torch.randn_like(param)
    return models


@pytest.fixture(scope="module")
def loops(start):
    launch(start, "loops")
    return start


@pytest.mark.parametrize("name", worker.PLAIN)
def test_two_processes_do_what_one_does(name, loops):
    model, batches = torch.load(loops / f"{name}.pt", weights_only=False)
    scaler = worker.scaler() if name == "overflow" else None
    optimizer, selector = worker.drive(model, model, grad_scale=scaler and scaler.get_scale)
    worker.train(model, optimizer, selector, batches, scaler)

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


def test_processes_may_train_models_of_their_own(loops):
    for rank, result in enumerate(results(loops, "alone")):
        model, batches = torch.load(loops / f"alone{rank}.pt", weights_only=False)
        optimizer, selector = worker.drive(model, model)
        worker.train(model, optimizer, selector, batches)
        assert_same(result["state"], worker.snapshot(model, optimizer))
        assert "There are 2 processes, but PeftModel does not tell whether they share" in result["undecided"]


def test_an_order_that_differs_is_an_error(loops):
    confused, left = results(loops, "disordered")
    assert "Rank 0 runs the adapted layers in another order" in confused and "delta 2 of 3" in confused
    assert left is not None  # it does not wait for ever


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
