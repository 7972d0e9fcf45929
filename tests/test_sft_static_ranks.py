"""Positions chosen by several processes. In a file of its own, since each of them imports it, the Trainer is slow."""

import torch
from torch import nn

from peft.tuners.sft.config import SftConfig
from peft.tuners.sft.model import SftModel
from peft.tuners.sft.static import select_static


def make(criterion):
    config = SftConfig(
        selection_algorithm="static", static_criterion=criterion, target_modules=["0", "2"], density=0.2, dtype="auto"
    )
    return SftModel(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double(), config, "default")


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def chosen(model):
    return {name: delta.indices.tolist() for _, name, delta in model.active_deltas()}


def data_parallel_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    models, batches = torch.load(f"{folder}/start.pt", weights_only=False)
    for model in models:
        parallel = nn.parallel.DistributedDataParallel(model)
        select_static(parallel, batches[rank::2], loss_of, progress=False)
    torch.save([chosen(model) for model in models], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_ranks_choose_what_one_process_does(tmp_path):
    models, batches = (
        [make("gradient"), make("fisher")],
        [tuple(torch.randn(8, n, dtype=torch.float64) for n in (7, 5)) for _ in range(4)],
    )
    torch.save((models, batches), tmp_path / "start.pt")
    torch.multiprocessing.spawn(data_parallel_worker, (str(tmp_path),), nprocs=2)
    for model in models:
        select_static(model, batches, loss_of, progress=False)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [chosen(model) for model in models]
