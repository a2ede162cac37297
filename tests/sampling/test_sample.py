"""Run the sampling program on a run folder, in one process and in several."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.models import tiny_pipeline
from PIL import Image

import sample_dit
from moh_dit.common.errors import UserError
from moh_dit.sampling.config import SampleConfig
from moh_dit.sampling.sample import load_for_sampling, parse_labels
from moh_dit.sampling.sample_set import set_labels

NAMES = ["cat", "dog, domestic", "eel", "fox", "gnu"]
PROGRAM = Path(sample_dit.__file__)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a run folder with one checkpoint in the layout of training."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pipeline = tiny_pipeline()
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    checkpoint = folder / "checkpoints" / "step-00000002"
    pipeline.transformer.save_pretrained(checkpoint / "transformer")
    pipeline.transformer.final_layer.linear.bias.data += 0.1
    pipeline.transformer.save_pretrained(checkpoint / "ema-0.5")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    (folder / "config.yaml").write_text("run_dir: tiny\n")
    return folder


def command(monkeypatch, run, output, *arguments):
    options = ["--checkpoint", str(run), "--num_inference_steps", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["sample_dit.py", *options, *map(str, arguments)])
    sample_dit.main()


def test_guidance_without_a_trained_null_class_is_a_warning(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("label_dropout: 0.0\n")
    for scale, count in ((1.0, 0), (2.0, 1)):
        output = tmp_path / f"{scale}.png"
        command(monkeypatch, tmp_path / "run", output, "--guidance_scale", scale)
        assert capsys.readouterr().err.count("null class was never trained") == count


def test_the_settings_alone_reproduce_the_sheet(run, tmp_path, monkeypatch):
    arguments = ("--class_labels", "fox,dog, domestic", "--guidance_channels", 3)
    command(monkeypatch, run, tmp_path / "a.png", *arguments, "--images_per_class", 2)
    record = (tmp_path / "a.png.yaml").read_text()
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.text["settings"] == record
    assert "# guidance on the first 3 of 4 latent channels" in record
    assert yaml.safe_load(record)["checkpoint"].endswith("step-00000002")
    assert "resume" not in yaml.safe_load(record)
    for config, output in (("a.png.yaml", "b.png"), ("a.png", "c.png")):
        again = ["--config", str(tmp_path / config), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", ["sample_dit.py", *again])
        sample_dit.main()
        pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", output)]
        assert np.array_equal(*pixels)


def test_all_formats_of_a_set_hold_the_same_images(run, tmp_path, monkeypatch):
    for name in ("s.npz", "s.tar", "s"):
        command(monkeypatch, run, tmp_path / name, "--num_samples", 7, "--batch_size", 4)
    arrays = np.load(tmp_path / "s.npz")
    images, labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    for index in range(7):
        png = np.asarray(Image.open(tmp_path / "s" / f"{index:09d}.png"))
        assert np.array_equal(png, images[index])
    table = (tmp_path / "s" / "labels.csv").read_text().splitlines()
    assert table[:3] == ["file,label,class", "000000000.png,0,cat",
                         '000000001.png,1,"dog, domestic"']  # fmt: skip
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert archive.getnames()[:2] == ["000000000.png", "000000000.cls"]
        assert np.array_equal(np.asarray(Image.open(archive.extractfile("000000006.png"))),
                              images[6])  # fmt: skip
        assert archive.extractfile("000000006.cls").read() == b"1"


def test_other_weights_strips_and_sweeps(run, tmp_path, monkeypatch):
    common = ("--images_per_class", 1, "--class_labels", 0)
    command(monkeypatch, run, tmp_path / "a.png", *common)
    command(monkeypatch, run, tmp_path / "b.png", *common, "--weights", "ema-0.5")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    weak = ("--guidance_checkpoint", run, "--guidance_weights", "ema-0.5")
    command(monkeypatch, run, tmp_path / "c.png", *common, *weak)
    command(monkeypatch, run, tmp_path / "d.png", *common, "--interpolate", 3)
    command(monkeypatch, run, tmp_path / "e.gif", *common, "--frames", 2)
    sweep = ("--rows", "weights=transformer,ema-0.5", "--columns", "seed=1,2,3")
    command(monkeypatch, run, tmp_path / "f.png", *sweep)
    sizes = {name: Image.open(tmp_path / name).size for name in ("a.png", "c.png", "d.png")}
    assert sizes["a.png"] == sizes["c.png"]
    assert sizes["d.png"][0] >= 3 * 64


@pytest.mark.parametrize("cache", ["taylorseer", "magcache"])
def test_caches_of_grids_sweeps_and_sets(run, tmp_path, monkeypatch, cache):
    setting, none = ("interval", 1) if cache == "taylorseer" else ("threshold", 0)
    exact = ("--num_inference_steps", 8, "--class_labels", 0, "--images_per_class", 1)
    options = (*exact, "--cache", cache)
    command(monkeypatch, run, tmp_path / "a.png", *exact)
    command(monkeypatch, run, tmp_path / "b.png", *options, f"--cache_{setting}", none)
    images = [np.asarray(Image.open(tmp_path / f)) for f in ("a.png", "b.png")]
    assert np.array_equal(*images)
    command(monkeypatch, run, tmp_path / "c.png", *options, "--rows", f"cache_{setting}=1,4")
    command(monkeypatch, run, tmp_path / "s.npz", *options, "--num_samples", 3)
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_labels", "catt"], "no class is named 'catt'; the nearest are cat"),
        (["--class_labels", "5"], "out of range 0 … 4"),
        (["--class_labels=-1"], "class label -1 is out of range 0 … 4"),
        (["--num_inference_steps", "1001"], "1 … 1000"),
        (["--scheduler", "flow-euler"], "those that fit are ddpm, ddim"),
        (["--weights", "ema-0.9"], "has no weights named 'ema-0.9'"),
        (["--num_samples", "100000000000", "--output", "set.npz"], "set.npz needs"),
        (["--num_samples", "0"], "must be at least 1"),
        (["--num_samples", "5"], "a set is written as"),
        (["--num_samples", "5", "--interpolate", "3"], "cannot be combined"),
        (["--rows", "seed=1", "--columns", "seed=2"], "both vary seed"),
        (["--compile", "true"], "compile needs a GPU"),
        (["--cuda_graphs", "true"], "cuda_graphs is true, but the device is cpu"),
        (
            ["--cuda_graphs", "maybe"],
            "cuda_graphs is maybe; it must be true or false or one of auto",
        ),
        (["--cache", "tea"], "cache is tea; it must be one of first-block, taylorseer, magcache"),
        (["--cache_interval", "3"], "cache_interval is 3, but cache is not set"),
        (["--cache", "taylorseer", "--cache_threshold", "1"], "taylorseer has no threshold"),
        (["--guidance_checkpoint", "nowhere"], "nowhere does not exist"),
        (["--guidance_scal", "2"], "did you mean guidance_scale"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path, monkeypatch, capsys, arguments,
                                                 message):  # fmt: skip
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, run, tmp_path / "x.png", *arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sample_dit.py: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_an_error_before_sampling(
    run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    for name in ("x.png", "x.npz"):
        more = ["--num_samples", "2"] if name == "x.npz" else []
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, run, tmp_path / "file" / name, *more)
        assert end.value.code == 2
        assert f"{tmp_path / 'file'} is not a writable folder" in capsys.readouterr().err


def test_an_unfinished_set_needs_resume(run, tmp_path, monkeypatch, capsys):
    arguments = ("--num_samples", 5, "--batch_size", 2)
    command(monkeypatch, run, tmp_path / "new.npz", *arguments, "--resume")  # starts
    command(monkeypatch, run, tmp_path / "old.npz", *arguments)
    (tmp_path / "s.npz.partial").mkdir()
    (tmp_path / "s.npz.partial" / "settings.json").write_text("{}")
    with pytest.raises(SystemExit):
        command(monkeypatch, run, tmp_path / "s.npz", *arguments)
    assert "s.npz.partial holds an unfinished set; continue it with --resume" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "new.npz").read_bytes() == (tmp_path / "old.npz").read_bytes()


CONFIGS_WITH_WRONG_PATHS = """
import sys
from moh_dit.analysis.config import CostConfig, HeadLoadConfig, ReportConfig
from moh_dit.common.errors import UserError
from moh_dit.sampling.config import SampleConfig
from moh_dit.web.config import DemoConfig

for config in (
    SampleConfig(checkpoint="nowhere", output="x.png"),
    HeadLoadConfig(checkpoint="nowhere", output="x"),
    CostConfig(checkpoint="nowhere"),
    ReportConfig(runs=["nowhere"], output="x.html"),
    DemoConfig(checkpoint="nowhere"),
):
    try:
        config.check_paths()
    except UserError as error:
        assert "nowhere does not exist" in str(error), error
    else:
        raise AssertionError(config)
assert "torch" not in sys.modules
"""


def test_wrong_paths_are_found_without_torch():
    subprocess.run([sys.executable, "-c", CONFIGS_WITH_WRONG_PATHS], cwd=PROGRAM.parent, check=True)


def test_a_large_grid_has_several_pages(run, tmp_path, monkeypatch, capsys):
    arguments = ("--class_labels", "0,1,2,3,4", "--images_per_class", 2)
    command(monkeypatch, run, tmp_path / "whole.png", *arguments)
    monkeypatch.setattr("moh_dit.sampling.grids.MAX_PIXELS", 2.5 * 2 * 64**2)  # two rows
    command(monkeypatch, run, tmp_path / "a.png", *arguments)
    assert "it has 3 pages" in capsys.readouterr().out
    names = ["whole.png", "a.png", "a-2.png", "a-3.png"]
    assert all((tmp_path / f"{name}.yaml").exists() for name in names)
    # Without labels, whose column may be narrower on a page.
    whole, *pages = [np.asarray(Image.open(tmp_path / name))[:, -130:] for name in names]
    assert np.array_equal(np.concatenate(pages), whole)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png.yaml").unlink()
    with pytest.raises(SystemExit):
        command(monkeypatch, run, tmp_path / "a.png", *arguments)
    assert "a-2.png exists" in capsys.readouterr().err


def test_nothing_is_written_over(run, tmp_path, monkeypatch, capsys):
    for name in ("x.png", "y.png.yaml"):
        (tmp_path / name).write_text("precious")
    for name in ("x.png", "y.png"):
        with pytest.raises(SystemExit):
            command(monkeypatch, run, tmp_path / name)
        assert "exists" in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}


def test_the_sampler_joins_projections_in_its_precision(run):
    config = SampleConfig(checkpoint=str(run), output="x.png", dtype="bfloat16")
    model = load_for_sampling(config, torch.device("cpu"), str(run), "transformer").transformer
    joined = [layer.fused_weight for layer in model.routed_layers.values()]
    assert len(joined) == 3
    assert all(weight is not None and weight.dtype == torch.bfloat16 for weight in joined)


def test_class_names_may_contain_commas():
    pipeline = tiny_pipeline(NAMES)
    assert parse_labels(pipeline, "dog, domestic,eel, 0") == [1, 2, 0]
    assert parse_labels(pipeline, None) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="named 'dog'; the nearest are dog, domestic"):
        parse_labels(pipeline, "dog")


def two_processes(*arguments):
    """Start the program on two gloo processes of one CPU thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [
        subprocess.Popen(
            [*map(str, [sys.executable, PROGRAM, *arguments])],
            env={**os.environ, **rendezvous, "RANK": rank, "LOCAL_RANK": rank}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]


def test_two_processes_killed_and_resumed_make_the_file_of_one(run, tmp_path, monkeypatch):
    arguments = ["--num_samples", 192, "--num_inference_steps", 20, "--labels", "drawn"]
    command(monkeypatch, run, tmp_path / "whole.npz", *arguments, "--batch_size", 16)
    expected = (tmp_path / "whole.npz").read_bytes()

    output, partial = tmp_path / "s.npz", tmp_path / "s.npz.partial"
    common = ["--checkpoint", run, "--output", output, *arguments, "--batch_size"]
    pair = two_processes(*common, 4)
    try:
        while len(list(partial.glob("images-*"))) < 4:
            assert all(process.poll() is None for process in pair)
            time.sleep(0.01)
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    done = sorted(int(path.stem.split("-")[1]) for path in partial.glob("images-*"))
    assert 4 <= len(done) < 12
    assert not output.exists()

    said = []
    for process in two_processes(*common, 7, "--resume"):
        text, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        said.append(text.decode())
    assert "already finished" in said[0]
    assert not said[1]  # only the main process prints
    assert output.read_bytes() == expected
    labels = np.load(output)["arr_1"]
    assert np.array_equal(labels, set_labels(192, range(5), "drawn", 0))
    assert not partial.exists()
