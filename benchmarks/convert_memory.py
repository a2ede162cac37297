"""Peak memory of converting a model the size of DiT-XL/2 between the formats, each in its process.

python benchmarks/convert_memory.py --folder /tmp/xl2

Makes a synthetic file (2.7 GB), converts it along published → diffusers → moh-dit → published, and
compares the last with the first, tensor by tensor. Needs 11 GB of disk in ``--folder``.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from moh_dit.checkpoints.weight_files import LazyTensor, open_weights, write_torch
from moh_dit.model.presets import build_model

STEPS = (("dit.pt", "diffusers", "diffusers"), ("diffusers", "moh-dit", "moh-dit"),
         ("moh-dit", "published", "back.pt"))  # fmt: skip
PROGRAM = """
import resource, sys
from moh_dit.convert import main
main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def synthetic(preset: str) -> dict[str, LazyTensor]:
    """Random float32 weights of a preset, each made when it is read; the positions as they are."""
    with torch.device("meta"):
        model = build_model(preset)
    state = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):

        def read(shape: torch.Size = tensor.shape, seed: int = seed) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02

        state[name] = LazyTensor(tuple(tensor.shape), torch.float32, read)
    with torch.device("cpu"):
        positions = build_model(preset, depth=0).pos_embed.detach()
    state["pos_embed"] = LazyTensor(tuple(positions.shape), torch.float32, lambda: positions)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="DiT-XL/2")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    write_torch(args.folder / "dit.pt", synthetic(args.preset))
    for source, kind, output in STEPS:
        command = [sys.executable, "-c", PROGRAM, str(args.folder / source)]
        command += ["--to", kind, "--output", str(args.folder / output)]
        start = time.perf_counter()
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak = time.perf_counter() - start, float(lines.split()[-1])
        print(f"{source} → {output}: peak {peak:.2f} GiB, {seconds:.0f} s", flush=True)
    first, last = (open_weights(args.folder / name) for name in ("dit.pt", "back.pt"))
    same = first.keys() == last.keys()
    same = same and all(torch.equal(first[key].read(), last[key].read()) for key in first)
    print("bit-identical" if same else "NOT the same")
    print(f"this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
