"""The notebook runs from training to metrics, with few steps."""

import json

import matplotlib
from helpers.documented_commands import ROOT

SMALL = {"NUM_STEPS = 2000": "NUM_STEPS = 3", "NUM_SAMPLES = 1000": "NUM_SAMPLES = 20",
         "SAMPLING_STEPS = 50": "SAMPLING_STEPS = 2",
         '"--resume"': '"--resume", "--evaluation.num_inference_steps", "2"'}  # fmt: skip


def test_first_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())
    names = {}
    replaced = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            text = "".join(cell["source"])
            for written, small in SMALL.items():
                replaced += text.count(written)
                text = text.replace(written, small)
            exec(text, names)
    assert replaced == len(SMALL)
    assert len(names["entries"]) == 1
    assert names["result"]["fd_digits"] > 0
    assert "fd_digits" in capsys.readouterr().out
