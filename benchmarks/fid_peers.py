"""Compare `fid-eval` with pytorch-fid, clean-fid and torch-fidelity on the same folders.

    python -m venv peers && peers/bin/pip install pytorch-fid clean-fid torch-fidelity 'scipy<1.18'
    python benchmarks/fid_peers.py --python peers/bin/python --work /tmp/fid_peers

Each program runs by its own command, with the same seeded random weights of Inception. The images
are synthetic; those of 299 × 299 pixels need no resizing. Prints one row per program and metric,
one column per size, and in brackets the difference from `fid-eval`, relative to its value.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from common import environment, table
from evaluation import make_images, random_inception
from PIL import Image, ImageFilter
from torch import nn

from fid_eval.networks.inception import Inception
from fid_eval.networks.weight_files import load_state
from fid_eval.sets.hashing import file_sha256

PYTORCH_FID_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
CLEAN_FID_WEIGHTS = Path("/tmp/inception-2015-12-05.pt")  # clean-fid reads this path only
CLEAN_FID = """
import sys, torch
from cleanfid import fid
a, b, device, mode, number = sys.argv[1:]
options = dict(mode=mode, device=torch.device(device), num_workers=0, verbose=False)
print("VALUE", getattr(fid, number)(a, b, use_dataparallel=False, **options))
"""


class CleanFidNetwork(nn.Module):
    """Inception in the form that clean-fid expects in its TorchScript file: ``layers``."""

    def __init__(self, weights):
        super().__init__()
        net = Inception(load_state(weights)).eval()
        layers = nn.Sequential(net.stem, net.middle, net.top)
        self.layers = torch.jit.trace(layers, torch.zeros(1, 3, 299, 299))


def write_folders(work, count, size):
    """Write two folders of PNGs; the second holds other images, blurred a little."""
    folders = []
    for seed, name in ((1, "reference"), (2, "samples")):
        folder = work / f"{name}-{size}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, array in enumerate(make_images(seed, count)):
            image = Image.fromarray(array).resize((size, size), Image.Resampling.LANCZOS)
            if name == "samples":
                image = image.filter(ImageFilter.GaussianBlur(size / 300))
            image.save(folder / f"{index:05d}.png", compress_level=1)
        folders.append(str(folder))
    return folders


def run(command, home):
    print("running", " ".join(map(str, command))[:60], file=sys.stderr, flush=True)
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env={**os.environ, "TORCH_HOME": str(home)},
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    return result.stdout


def measure(folders, weights, options, home):
    """Return the values of all programs for two folders, by (metric, program)."""
    reference, samples = folders
    count, device = options.images, options.device
    ours = [sys.executable, "-m", "fid_eval", reference, samples, "--weights", weights,
            "--weights_sha256", file_sha256(weights), "--device", device, "--quiet", "--json",
            "--metrics", "fid,is,kid,precision,recall", "--distances", "fp32"]  # fmt: skip
    found = json.loads(run(ours, home))["sets"][0]["metrics"]
    values = {
        (name, "fid-eval"): next(v for key, v in found.items() if key.startswith(prefix))
        for name, prefix in (
            ("FID", "fd_"), ("IS", "class_score"), ("KID", "kd_"), ("precision", "precision"),
            ("recall", "recall"),
        )
    }  # fmt: skip
    gpu = ["--gpu", "0"] if device == "cuda" else ["--cpu"]
    theirs = [options.python, "-m", "torch_fidelity.fidelity", *gpu, "--fid", "--isc", "--kid",
              "--prc", "--input1", samples, "--input2", reference, "--no-cache", "--json",
              "--silent", "--feature-extractor", "inception-v3-compat",
              "--feature-extractor-weights-path", weights, "--isc-splits", "1", "--kid-subsets",
              "1", "--kid-subset-size", count]  # fmt: skip
    printed = json.loads(re.search(r"\{.*\}", run(theirs, home), re.DOTALL)[0])
    for name, key in (
        ("FID", "frechet_inception_distance"), ("IS", "inception_score_mean"),
        ("KID", "kernel_inception_distance_mean"), ("precision", "precision"), ("recall", "recall"),
    ):  # fmt: skip
        values[name, "torch-fidelity"] = printed[key]
    command = [options.python, "-m", "pytorch_fid", reference, samples, "--device", device,
               "--num-workers", 0]  # fmt: skip
    values["FID", "pytorch-fid"] = float(run(command, home).split()[-1])
    for mode in ("clean", "legacy_pytorch"):
        for name, function in (("FID", "compute_fid"), ("KID", "compute_kid")):
            command = [options.python, "-c", CLEAN_FID, reference, samples, device, mode, function]
            printed = run(command, home)
            values[name, f"clean-fid, {mode}"] = float(printed.rsplit("VALUE", 1)[1])
    return values


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="Python in which the peers are installed")
    parser.add_argument("--work", required=True, type=Path, help="folder for images and weights")
    parser.add_argument("--images", type=int, default=128, help="images per folder")
    parser.add_argument("--sizes", default="299,256,64", help="sides of the images in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if CLEAN_FID_WEIGHTS.exists():
        sys.exit(f"{CLEAN_FID_WEIGHTS} exists, perhaps with published weights; move it")
    home = options.work / "torch"
    (home / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = home / "hub" / "checkpoints" / PYTORCH_FID_WEIGHTS
    random_inception(weights)
    try:
        torch.jit.script(CleanFidNetwork(weights)).save(str(CLEAN_FID_WEIGHTS))
        sizes = options.sizes.split(",")
        by_size = {
            size: measure(
                write_folders(options.work, options.images, int(size)), weights, options, home
            )
            for size in sizes
        }
    finally:
        CLEAN_FID_WEIGHTS.unlink(missing_ok=True)
    print({**environment(), "images": options.images})
    rows = []
    for name, program in sorted(by_size[sizes[0]], key=lambda key: key[0]):
        row = {"metric": name, "program": program}
        for size in sizes:
            value, own = by_size[size][name, program], by_size[size][name, "fid-eval"]
            difference = "" if program == "fid-eval" else f" ({(value - own) / abs(own):+.1e})"
            row[f"{size} px"] = (
                f"{np.format_float_positional(value, 7, fractional=False)}{difference}"
            )
        rows.append(row)
    table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
