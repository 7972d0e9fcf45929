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


# One for all tests, so that what they share is the same again whichever of them is repeated.
SEED = int(os.environ.get("PEFT_TEST_SEED") or random.SystemRandom().randrange(2**32))


@pytest.hookimpl(tryfirst=True)  # before fixtures that several tests share
def pytest_runtest_setup() -> None:
    """Seed all generators for each test, in every run anew. A failing test shows the number; PEFT_TEST_SEED=number
    repeats it."""
    print(f"PEFT_TEST_SEED={SEED}")  # captured by pytest, shown for failures only
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def seed() -> int:
    return SEED


@pytest.fixture(scope="module")
def quiet_transformers():
    """Trainers and loaders without their logs and progress bars."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
