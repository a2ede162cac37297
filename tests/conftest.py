"""Tests never ask the network: with this, a missing name fails at once instead of after retries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the subprocesses: sums in the same order
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished_run(one_thread, tmp_path_factory):
    """Train a small run without interruption and return its folder."""
    from helpers.training_runs import tiny_config

    from moh_dit.training.trainer import Trainer

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    Trainer(tiny_config(run_dir)).train()
    return run_dir
