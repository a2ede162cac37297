"""Measure the peak memory of converting a model the size of DiT-XL/2, for each pair of formats.

python benchmarks/convert_memory.py --folder /tmp/xl2

Writes a synthetic checkpoint (2.7 GB) and converts it published → diffusers → moh-dit → published,
each step in a process of its own. Then compares the last file with the first, tensor by tensor.
Needs 11 GB of disk in ``--folder``.

The peak includes the pages of memory-mapped files, which the system can release at any time.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from moh_dit.checkpoints.weight_files import open_weights, write_torch
from moh_dit.model.presets import build_model

STEPS = (("dit.pt", "diffusers", "diffusers"), ("diffusers", "moh-dit", "moh-dit"),
         ("moh-dit", "published", "back.pt"))  # fmt: skip
PROGRAM = """
import resource
from moh_dit.__main__ import main
main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def random_weights(preset: str) -> dict[str, torch.Tensor]:
    """Return random float32 weights of a preset, with its own position table."""
    model = build_model(preset)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="DiT-XL/2")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    write_torch(args.folder / "dit.pt", random_weights(args.preset))
    for source, kind, output in STEPS:
        command = [sys.executable, "-c", PROGRAM, "convert", str(args.folder / source)]
        command += ["--to", kind, "--output", str(args.folder / output)]
        start = time.perf_counter()
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak = time.perf_counter() - start, float(lines.split()[-1])
        print(f"{source} → {output}: peak {peak:.2f} GiB, {seconds:.0f} s", flush=True)
    first, last = (open_weights(args.folder / name) for name in ("dit.pt", "back.pt"))
    same = first.keys() == last.keys()
    same = same and all(torch.equal(first[key], last[key]) for key in first)
    print("bit-identical" if same else "NOT the same")


if __name__ == "__main__":
    main()
