"""Start small training runs, as objects and as command lines, and compare them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.training.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainConfig

ROOT = Path(__file__).parents[2]
MODEL = dict(hidden_size=32, depth=2, num_heads=4, num_shared_heads=[4, 1],
             num_active_routed_heads=[0, 2])  # fmt: skip
NUM_STEPS = 12


def tiny_config(run_dir, **options):
    defaults = dict(
        num_steps=NUM_STEPS, batch_size=8, checkpoint_every=3, log_every=2,
        evaluation=EvaluationConfig(num_inference_steps=2),
    )  # fmt: skip
    options = defaults | options
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(**(MODEL | options.pop("model", {}))),
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0),
        ema_decays=[0.9, 0.5],
        **options,
    )


def command(run_dir, *extra, processes=1):
    """Return the command line of the run of ``tiny_config``."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={processes}"]  # fmt: skip
    model = [f"--model.{key}={value}" for key, value in MODEL.items()]
    return [*launcher, str(ROOT / "train_dit.py"), f"--run_dir={run_dir}", *model,
            f"--num_steps={NUM_STEPS}", "--batch_size=8", "--checkpoint_every=3", "--log_every=2",
            "--optimizer.learning_rate=1e-2", "--optimizer.max_grad_norm=1",
            "--ema_decays=[0.9, 0.5]", "--keep_checkpoints=3",
            "--evaluation.num_inference_steps=2", *extra]  # fmt: skip


def environment():
    """Return the environment of a run on one thread, so that sums have the same order."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments, **options):
    """Run the command line to its end and capture its output."""
    return subprocess.run(
        command(*arguments, **options), env=environment(), capture_output=True, text=True
    )


def assert_identical(a, b, files=4):
    """Require equal bits in weights, averages and optimizer state of the last checkpoints."""
    last_a, last_b = list_checkpoints(a)[-1], list_checkpoints(b)[-1]
    assert last_a.name == last_b.name
    names = {p.relative_to(last_a) for p in last_a.rglob("*.safetensors")}
    assert len(names) == files  # weights, optimizer, two averages
    for file in names:
        x, y = load_file(last_a / file), load_file(last_b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), file


def write_images(folder, classes=2):
    """Write a folder with two random PNG files per class."""
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(255, size=(40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"c{label}" / f"{i}.png")
    return folder
