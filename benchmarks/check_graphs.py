"""Check on a GPU that CUDA graphs change no bit of a training run.

    python benchmarks/check_graphs.py --work /tmp/graphs [--model MoH-DiT-S/2-75]
    torchrun --nproc_per_node 2 benchmarks/check_graphs.py --work /tmp/graphs

For each variant, train on the digits without graphs, with graphs, and with graphs and an
interruption in the middle. All three must end with the same weights, moments and averages. The
last row checks that a step that is not finite gives the same message. Prints one row per variant.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from common import environment, table

from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.training.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainConfig
from moh_dit.training.trainer import Trainer

NUM_STEPS = 12
VARIANTS = {
    "float32": {},
    "bf16, compiled": {"mixed_precision": "bf16", "compile": True},
    "fp16": {"mixed_precision": "fp16"},
    "two_pass, 2 micro-batches": {"gradient_accumulation_steps": 2, "balance_loss": "two_pass"},
    "activation checkpointing": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "2 EMAs, power-function average": {"ema_decays": [0.99, 0.9], "ema_power_stds": [0.1]},
    "grids in between": {"evaluation": EvaluationConfig(sample_every=5, num_inference_steps=2)},
}  # fmt: skip


def train(run: Path, model: str, num_steps: int = NUM_STEPS, **settings) -> None:
    AcceleratorState._reset_state()
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        TrainConfig(
            run_dir=str(run), resume=True, model=ModelConfig(preset=model), num_steps=num_steps,
            batch_size=64, checkpoint_every=NUM_STEPS // 2, log_every=4, deterministic=True,
            optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=1.0), **settings,
        )
    )  # fmt: skip
    trainer.accelerator.end_training = lambda: None  # keep the process group for the next run
    trainer.train()


def state(run: Path) -> dict[str, bytes]:
    last = list_checkpoints(run)[-1]
    return {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*.safetensors")}


def compare(work: Path, model: str, settings: dict) -> dict:
    peak = {}
    for name, graphs in (("eager", False), ("graphs", True)):
        train(work / name, model, cuda_graphs=graphs, **settings)
        peak[name] = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
    for num_steps in (NUM_STEPS // 2, NUM_STEPS):
        train(work / "resumed", model, num_steps, cuda_graphs=True, **settings)
    eager, graphed, resumed = (state(work / each) for each in ("eager", "graphs", "resumed"))
    return dict(
        files=len(eager), graphs=eager == graphed, resumed=eager == resumed,
        reserved=peak["graphs"] / peak["eager"],
    )  # fmt: skip


def bad_step(work: Path, model: str) -> dict:
    messages = []
    for name, graphs in (("eager", False), ("graphs", True)):
        AcceleratorState._reset_state()
        trainer = Trainer(
            TrainConfig(run_dir=str(work / name), model=ModelConfig(preset=model), batch_size=4,
                        num_steps=NUM_STEPS, cuda_graphs=graphs)
        )  # fmt: skip
        with torch.no_grad():
            trainer.raw_model.y_embedder.embedding_table.weight[3] = float("nan")
        try:
            trainer.train()
        except UserError as error:
            messages.append(str(error).replace(name, ""))
    return dict(files=0, graphs=len(messages) == 2 and messages[0] == messages[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--model", default="MoH-DiT-S/2-75")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    columns, rows = ["variant", "files", "graphs", "resumed", "reserved"], []
    if is_main := int(os.environ.get("RANK", 0)) == 0:
        print(environment())
    for number, name in enumerate(args.variants):
        rows.append(
            dict(variant=name, **compare(args.work / str(number), args.model, VARIANTS[name]))
        )
        if is_main:
            print(rows[-1], flush=True)
    rows.append(dict(variant="a bad step", **bad_step(args.work / "bad", args.model)))
    if is_main:
        table(rows, columns)
        shutil.rmtree(args.work)
    return int(not all(row["graphs"] and row.get("resumed", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
