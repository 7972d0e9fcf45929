"""Common to all tests: no network, inputs that differ from run to run, one thread."""

import os
import random

# Read by the libraries when they are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tiny models gain nothing from more, which wait for each other on a busy machine


SEED = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before fixtures that several tests share
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed all generators afresh for each test. A failing test shows the number; PEFT_TEST_SEED=number repeats it."""
    seed = int(os.environ.get("PEFT_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"PEFT_TEST_SEED={seed}")  # captured by pytest, shown for failures only
    item.stash[SEED] = seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.node.stash[SEED]


@pytest.fixture(scope="module")
def quiet_transformers():
    """Trainers and loaders without their logs and progress bars."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
