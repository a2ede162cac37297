"""Files written by version 0.1.0 must open, resume and sample as they did with that version.

``reference/version_0_1_0/README.md`` lists the files and the commands that wrote them.

The tests compare with stored arrays up to ``REFERENCE_TOLERANCE`` (environment variable, default
1e-5), because other CPUs and other versions of PyTorch round differently. On the machine that
wrote the files, ``REFERENCE_TOLERANCE=0`` requires equal bits.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiTPipeline
from PIL import Image
from safetensors.torch import load_file

import moh_dit
from fid_eval.__main__ import main as fid_eval
from moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel, load_pipeline, load_pretrained
from moh_dit.__main__ import run_command
from moh_dit.analysis.config import HeadLoadConfig
from moh_dit.analysis.run_reader import read_run_folders
from moh_dit.autoencoder import autoencoder_identity, load_autoencoder
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.cli import load_config
from moh_dit.common.config_files import settings_in
from moh_dit.common.renamed import SETTINGS
from moh_dit.data.images import open_images
from moh_dit.data.latents import open_latents
from moh_dit.diffusion.noise import ImageNoise
from moh_dit.sampling.config import SampleConfig
from moh_dit.training.autoencoder_config import AutoencoderTrainingConfig
from moh_dit.training.config import TrainConfig, flatten
from moh_dit.training.run_log import read_log

FILES = Path(__file__).parents[1] / "reference" / "version_0_1_0"
ROOT = Path(moh_dit.__file__).parents[1]
CONFIGS = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "head_load": HeadLoadConfig,
    "autoencoder": AutoencoderTrainingConfig,
}

EXPECTED = load_file(FILES / "expected.safetensors")
FACTS = json.loads((FILES / "expected.json").read_text())
TOLERANCE = float(os.environ.get("REFERENCE_TOLERANCE", "1e-5"))

LABELS = ["ant", 1, "cat"]
OPTIONS = dict(guidance_scale=2.0, num_inference_steps=25)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Copy all files of version 0.1.0 into a temporary folder and make it the current folder.

    Relative paths inside the files (``run_dir: run``, ``checkpoint: pipeline``) then resolve.
    """
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    monkeypatch.setenv("FID_EVAL_HOME", "fid_eval_home")
    yield tmp_path / "files"
    torch.use_deterministic_algorithms(False)  # the run was trained with deterministic: true


def call(command, *arguments):
    """Run ``moh-dit COMMAND`` in this process."""
    run_command(command, [str(argument) for argument in arguments])


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compare two tensors by their relative error; a tolerance of 0 requires equal values."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"absolute error {error:.2g}"


def assert_pixels_close(actual, expected, share=0.01):
    """Compare 8-bit images: at most ``share`` of the values may differ by more than one level."""
    actual, expected = np.asarray(actual, np.int64), np.asarray(expected, np.int64)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected)
    if TOLERANCE == 0:
        assert not difference.any()
    assert (difference > 1).mean() <= share


def assert_logged(log, expected):
    """Compare the losses of a log with stored ones."""
    entries = [entry for entry in read_log(log) if "loss" in entry][-len(expected) :]
    relative = dict(rel=max(TOLERANCE * 10, 1e-12))
    for entry, known in zip(entries, expected, strict=True):
        assert {key: entry[key] for key in known} == pytest.approx(known, **relative)


def draw(pipeline, output_type="pt"):
    """Sample the three images whose expected values are stored."""
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise(seed=5, indices=[0, 1, 2], device="cpu")
    return pipeline(LABELS, **OPTIONS, generator=noise, output_type=output_type).images


def assert_same_files(first, second):
    """Compare the weight files of two checkpoints, byte by byte."""
    names = [path.relative_to(first) for path in sorted(first.rglob("*.safetensors"))]
    assert len(names) == 5  # model, optimizer, two averages, one power-function average
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_files_are_those_that_version_0_1_0_wrote():
    """Guard against edits of the files, for example by a search and replace over ``tests/``."""
    listed = {}
    for line in (FILES / "files.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        listed[name] = digest
    found = {
        path.relative_to(FILES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FILES.rglob("*")
        if path.is_file() and path.name not in ("README.md", "files.sha256")
    }
    assert found == listed


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("weights", ["transformer", "raw", "ema-0.1", "ema-power-0.1"])
def test_a_run_samples_as_before(weights, files):
    pipeline = load_pipeline("run", weights)
    assert_close(draw(pipeline, "latent"), EXPECTED[f"run.{weights}.latents"])


def resume(run, num_steps):
    call("train", "--config", "run/config.yaml", "--run_dir", run, "--resume",
         "--num_steps", num_steps)  # fmt: skip
    return list_checkpoints(Path(run))[-1]


def assert_resumed_as_before(checkpoint, tolerance=TOLERANCE):
    """Compare raw and averaged weights at step 6 with the stored ones.

    Softmax ignores the biases of the keys, so their gradient is rounding error, which AdamW
    enlarges to steps of full size. They are compared only when equal bits are required.
    """
    assert checkpoint.name == "step-00000006"
    weights = {
        "raw": load_file(checkpoint / "state/model.safetensors"),
        "transformer": load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors"),
    }
    for kind, state in weights.items():
        names = [name for name in EXPECTED if name.startswith(f"resumed.{kind}.")]
        assert {f"resumed.{kind}.{name}" for name in state} == set(names)
        for name in names:
            actual, expected = state[name.removeprefix(f"resumed.{kind}.")], EXPECTED[name]
            if name.endswith("qkv.bias") and tolerance > 0:
                actual, expected = (torch.cat(bias.chunk(3)[::2]) for bias in (actual, expected))
            assert_close(actual, expected, tolerance)


def test_a_run_resumes_as_before_and_an_interruption_changes_no_byte(files):
    """The folder of ``init_from`` no longer exists; ``--resume`` does not need it."""
    shutil.copytree("run", "interrupted")
    whole = resume("run", 6)
    assert_resumed_as_before(whole)
    assert_logged(Path("run/log.jsonl"), FACTS["resumed"])
    steps = [entry["step"] for entry in read_log(Path("run/log.jsonl")) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    resume("interrupted", 5)
    assert_same_files(whole, resume("interrupted", 6))
    assert load_pipeline("run").config.class_names == ["ant", "bee", "cat"]


def test_a_run_resumes_from_the_latents_in_its_folder(files):
    """Training on several processes leaves ``latents/`` in the run folder.

    They were encoded in batches of another size and are therefore rounded differently.
    """
    shutil.copytree("latents", "run/latents")
    assert_resumed_as_before(resume("run", 6), max(TOLERANCE, 1e-5))


def test_snapshots_combine_as_before(files):
    call("ema", "--run", "run", "--std", 0.08)
    pipeline = load_pipeline("run", "ema-posthoc-0.08")
    assert_close(draw(pipeline, "latent"), EXPECTED["run.ema-posthoc-0.08.latents"])


def test_a_run_is_complete_for_its_report(files):
    assert read_run_folders([Path("run")])[0].missing == []
    call("report", "run", "--output", "report.html")
    assert "fd_images" in Path("report.html").read_text()


# -------------------------------------------------------------------------- models and pipelines


def test_a_pipeline_opens_every_way_and_samples_as_before(files):
    opened = MoHDiTPipeline.from_pretrained("pipeline")
    assert type(opened.transformer) is MoHDiTTransformer2DModel
    images = draw(opened)
    assert torch.equal(images, draw(load_pipeline("pipeline")))
    assert torch.equal(images, draw(load_pipeline("run")))
    assert_close(images, EXPECTED["pipeline.images"])


def test_classes_of_diffusers_find_the_module_that_a_pipeline_names(files):
    """``model_index.json`` names ``moh_dit.transformer``, where 0.1.0 defined the model.

    diffusers looks for this name in ``sys.modules``, without an import.
    ``DiffusionPipeline.from_pretrained`` did not open the folder with 0.1.0, because it accepts
    pipeline classes of diffusers only.
    """
    model = AutoModel.from_pretrained("pipeline", subfolder="transformer")
    assert type(model) is MoHDiTTransformer2DModel
    assert type(DiTPipeline.from_pretrained("pipeline").transformer) is MoHDiTTransformer2DModel


def test_a_pipeline_with_code_opens_as_this_package(files):
    opened = MoHDiTPipeline.from_pretrained("pipeline_with_code")
    assert type(opened) is MoHDiTPipeline
    assert type(opened.transformer) is MoHDiTTransformer2DModel
    assert torch.equal(draw(opened), draw(load_pipeline("pipeline")))
    assert torch.equal(draw(load_pipeline("pipeline_with_code")), draw(opened))


WITH_CODE = """
import importlib
import sys

installed, results = sys.argv[1] == "installed", sys.argv[2]


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moh_dit", "fid_eval", "jsonargparse"):
            raise ModuleNotFoundError(name)


if installed:  # diffusers finds the module that model_index.json names, see the other test
    from diffusers import AutoModel
    from moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel

    model = AutoModel.from_pretrained("pipeline", subfolder="transformer")
    assert type(model) is MoHDiTTransformer2DModel
else:
    sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("pipeline_with_code", trust_remote_code=True)
package = type(pipeline.transformer).__module__.partition(".")[0]
assert package.startswith("moh_dit_") and type(pipeline).__module__ == package + ".pipeline"
ImageNoise = importlib.import_module(package + ".noise").ImageNoise
pipeline.set_progress_bar_config(disable=True)
noise = ImageNoise(seed=5, indices=[0, 1, 2], device="cpu")
images = pipeline(["ant", 1, "cat"], guidance_scale=2.0, num_inference_steps=25, generator=noise,
                  output_type="pt").images
torch.save(images, results + "/images.pt")
pipeline.save_pretrained(results + "/saved")
assert installed or "moh_dit" not in sys.modules
"""


def test_a_pipeline_with_code_opens_by_diffusers_with_and_without_this_package(files, tmp_path):
    """The bundled code is that of 0.1.0 and runs by itself, whatever is installed."""
    processes = {}
    for name in ("absent", "installed"):
        (tmp_path / name).mkdir()
        environment = os.environ | dict(HF_HOME=str(tmp_path / name / "hf"), OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = str(ROOT) if name == "installed" else ""
        command = [sys.executable, "-c", WITH_CODE, name, str(tmp_path / name)]
        processes[name] = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True
        )
    for name, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert_close(torch.load(tmp_path / name / "images.pt"), EXPECTED["pipeline.images"])
        for file in ("pipeline.py", "transformer/moh_dit_transformer.py"):
            saved = tmp_path / name / "saved" / file
            assert saved.read_bytes() == Path("pipeline_with_code", file).read_bytes()


def test_a_model_folder_and_a_published_file_open_as_before(files):
    in_run = load_pretrained("run").state_dict()
    model = load_pretrained("model")
    assert all(torch.equal(value, in_run[name]) for name, value in model.state_dict().items())
    heads = dict(num_heads=4, num_shared_heads=[4, 1], num_active_routed_heads=[0, 1], head_dim=4)
    raw = load_pretrained("run", weights="raw").state_dict()
    published = load_pretrained("published.pt", **heads).state_dict()
    assert all(torch.equal(value, raw[name]) for name, value in published.items())
    call("convert", "pipeline_with_code", "--to", "moh-dit", "--output", "converted")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert Path("converted", file).read_bytes() == Path("model", file).read_bytes()


# ------------------------------------------------------------------------- autoencoders, latents


def test_an_autoencoder_is_known_as_the_same(files):
    """The identity decides whether latents and runs accept an autoencoder."""
    known = json.loads(Path("run/data.json").read_text())["autoencoder"]
    for folder in ("autoencoder", "run/vae", "pipeline"):
        assert autoencoder_identity(load_autoencoder(folder)) == known


def test_the_digits_are_known_as_the_same():
    images, autoencoder = open_images("digits", 32), load_autoencoder("digits")
    assert images.fingerprint() == FACTS["digits"]["images"]
    assert autoencoder_identity(autoencoder) == FACTS["digits"]["autoencoder"]


def test_latents_open_and_train_as_before(files):
    store = open_latents("latents", load_autoencoder("autoencoder"), flip=True)
    store.verify()
    assert len(store) == 24
    call("train", "--config", "run/config.yaml", "--run_dir", "from_latents",
         "--init_from", "pipeline", "--data.latents", "latents", "--data.num_workers", 0,
         "--num_steps", 2, "--evaluation.fid_every", 0)  # fmt: skip
    assert_logged(Path("from_latents/log.jsonl"), FACTS["from_latents"])


def test_an_interrupted_encoding_goes_on(files):
    call("encode", "--data", "images", "--image_size", 16, "--autoencoder", "autoencoder",
         "--output", "latents_interrupted", "--resume")  # fmt: skip
    finished, whole = Path("latents_interrupted"), Path("latents")
    assert {path.name for path in finished.iterdir()} == {path.name for path in whole.iterdir()}
    for file in whole.glob("*.npy"):
        assert_close(
            torch.from_numpy(np.load(finished / file.name)), torch.from_numpy(np.load(file))
        )


# ------------------------------------------------------------------------ settings and their use


@pytest.mark.parametrize(
    ("kind", "file"), [(kind, file) for kind in CONFIGS for file in FACTS[kind]]
)
def test_settings_mean_the_same(kind, file):
    """New settings may exist. Stored settings keep their values, under their present names."""
    settings = flatten(load_config(CONFIGS[kind], FILES / file))
    present = SETTINGS.get(CONFIGS[kind].__name__, {})
    known = {present.get(key, key): value for key, value in FACTS[kind][file].items()}
    if "trackers" not in (FILES / file).read_text():
        known.pop("trackers", None)  # its default changed, because TensorBoard became optional
    assert {key: settings.get(key, "missing") for key in known} == known


def test_a_sheet_holds_its_settings_and_is_made_again(files):
    settings = settings_in(Path("sheet.png"))
    assert settings == Path("sheet.png.yaml").read_text()
    call("sample", "--config", "sheet.png", "--output", "again.png")
    call("sample", "--config", "sheet.png.yaml", "--output", "once_more.png")
    with (
        Image.open("sheet.png") as sheet,
        Image.open("again.png") as again,
        Image.open("once_more.png") as once_more,
    ):
        # Other fonts may draw the class names, whose width decides the left margin.
        width = min(sheet.width, again.width)
        images = [np.asarray(each)[:, -width:] for each in (again, sheet)]
        assert_pixels_close(*images, share=0.05)
        assert np.array_equal(np.asarray(again), np.asarray(once_more))
    facts = [line for line in settings.splitlines() if line.startswith("# ")]
    written = settings_in(Path("again.png")).splitlines()
    assert [line for line in facts if "sha256" in line] == [
        line for line in written if "sha256" in line
    ]


def test_an_exact_set_is_made_again(files):
    call("sample", "--config", "samples.npz.yaml", "--output", "again.npz")
    with np.load("samples.npz") as before, np.load("again.npz") as again:
        assert np.array_equal(before["arr_1"], again["arr_1"])
        assert_pixels_close(again["arr_0"], before["arr_0"])


def test_an_interrupted_set_is_finished(files):
    shard = "interrupted.npz.partial/images-000000000-000000016.npy"
    made_before = np.load(shard)
    call("sample", "--checkpoint", "pipeline", "--num_inference_steps", 100,
         "--guidance_scale", 1.5, "--num_samples", 32, "--batch_size", 16,
         "--output", "interrupted.npz", "--resume")  # fmt: skip
    with np.load("interrupted.npz") as finished:
        assert np.array_equal(finished["arr_0"][:16], made_before)
        assert_pixels_close(finished["arr_0"], EXPECTED["interrupted.images"])


# -------------------------------------------------------------------------------------- fid_eval


def test_an_evaluation_goes_on_and_renews_its_cache(files):
    def features():
        return {path: path.stat().st_mtime_ns for path in Path("features").rglob("*.safetensors")}

    before, cached = json.loads(Path("results.json").read_text()), features()
    assert len(cached) == 3
    assert fid_eval(["jobs.yaml", "--quiet", "--resume"]) == 0
    assert json.loads(Path("results.json").read_text())["sets"] == before["sets"]
    assert fid_eval(["jobs.yaml", "--quiet", "--overwrite"]) == 0
    after = json.loads(Path("results.json").read_text())
    assert after["settings"] == before["settings"]
    for known, measured in zip(before["sets"], after["sets"], strict=True):
        assert measured["metrics"] == pytest.approx(known["metrics"], rel=1e-6, abs=1e-9)
        assert "has no checksum, as files of fid-eval 0.1.0" in " ".join(measured["warnings"])
    renewed = features()
    assert renewed.keys() == cached.keys()
    assert fid_eval(["jobs.yaml", "--quiet", "--overwrite"]) == 0
    assert features() == renewed  # read, not computed again
