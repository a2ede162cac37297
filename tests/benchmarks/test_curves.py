"""Benchmarks draw images/s over the batch size; compare.py guards each point."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from common import draw_curves  # noqa: E402


def rows(speed=1.0):
    return [
        dict(model=model, batch=batch, way=way, gpu=gpu, images_per_s=speed * batch**0.9 + gpu)
        for model in ("DiT-XL/2", "MoH-DiT-XL/2-75") for batch in (16, 32, 64)
        for way in ("python", "graph") for gpu in (0, 1)
    ]  # fmt: skip


def test_curves_are_drawn(tmp_path):
    draw_curves(tmp_path / "a.png", rows(), ["way"])
    draw_curves(tmp_path / "b.png", rows()[:4], ["way"])
    draw_curves(None, rows(), ["way"])
    sizes = [Image.open(tmp_path / name).size for name in ("a.png", "b.png")]
    assert sizes[0] == sizes[1] == (1650, 675)


def test_every_point_is_compared(tmp_path):
    slower = rows()
    slower[7]["images_per_s"] *= 0.9
    paths = []
    for name, measured in (("a.json", rows()), ("b.json", slower)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(dict(environment={}, rows=measured)))
    command = [sys.executable, str(BENCHMARKS / "compare.py"), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "DiT-XL/2, 32, graph, 1: images_per_s" in result.stdout
    assert len(result.stdout.splitlines()) == 3
