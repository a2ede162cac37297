"""``moh-dit convert``, and pipeline folders with code and model card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from helpers.checkpoint_files import diffusers_pipeline, flip, output, peer, same, truncate
from helpers.models import ROUTED, SMALL, randomized, tiny_pipeline
from PIL import Image

import moh_dit
from moh_dit import MoHDiTPipeline, load_pipeline, load_pretrained
from moh_dit.__main__ import run_command
from moh_dit.checkpoints.opening import open_checkpoint
from moh_dit.checkpoints.run_details import run_details
from moh_dit.diffusion.objectives import FlowObjective
from moh_dit.pipeline.model_card import card_license

HEADS = ("--model.num_heads", "4")


@pytest.fixture
def convert(monkeypatch, capsys):
    """Return a function that runs the program and returns its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moh-dit", *map(str, arguments)])
        code = 0
        try:
            run_command("convert")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def weights(source, **overrides):
    return load_pretrained(source, **overrides).state_dict()


@pytest.fixture
def run_folder(tmp_path):
    """Write the parts of a run folder that a model card describes."""
    pipeline, folder = tiny_pipeline(list("abcde")), tmp_path / "run"
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.transformer.save_pretrained(folder / "checkpoints/step-00000010/transformer")
    (folder / "classes.json").write_text(json.dumps(list("abcde")))
    (folder / "config.yaml").write_text("num_steps: 10\nbatch_size: 4\n")
    (folder / "samples").mkdir()
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(folder / "samples/step-00000010.png")
    (folder / "evaluations").mkdir()
    result = dict(step=10, metrics={"fd_digits": 12.5}, samples={"count": 1000})
    (folder / "evaluations/step-00000010.json").write_text(json.dumps(result))
    return folder


# ----------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_goes_through_all_formats_and_back(dtype, tmp_path, convert):
    model = randomized(SMALL).to(dtype)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    steps = [
        ("a.pt", "diffusers", "b", HEADS),
        ("b", "moh-dit", "c", ()),
        ("c", "diffusers", "d", ()),
        ("d", "published", "e.pt", ()),
    ]
    for source, kind, target, heads in steps:
        code, out, _ = convert(
            tmp_path / source, "--to", kind, "--output", tmp_path / target, *heads
        )
        assert code == 0
        assert str(dtype).removeprefix("torch.") in out
    assert same(torch.load(tmp_path / "e.pt", weights_only=True), model.state_dict())
    assert (tmp_path / "b/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "d/diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_a_moh_model_goes_to_a_file_and_back(tmp_path, convert):
    model = randomized(ROUTED)
    model.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", "--to", "published", "--output", tmp_path / "b.pt")[0] == 0
    plan = [f"--model.{key}={ROUTED[key]}" for key in ROUTED if "heads" in key]
    assert convert(tmp_path / "b.pt", "--to", "moh-dit", "--output", tmp_path / "c", *plan)[0] == 0
    assert same(weights(tmp_path / "c"), model.state_dict())
    configs = [(tmp_path / name / "config.json").read_text() for name in "ac"]
    assert configs[0] == configs[1]


def test_a_pipeline_of_diffusers_converts_both_ways(tmp_path, convert):
    (tmp_path / "a").mkdir()
    source = diffusers_pipeline(tmp_path / "a")
    assert convert(source, "--to", "pipeline", "--output", tmp_path / "b")[0] == 0
    code, *_ = convert(tmp_path / "b", "--to", "diffusers-pipeline", "--output", tmp_path / "c")
    assert code == 0
    theirs = DiTPipeline.from_pretrained(tmp_path / "c")
    assert same(theirs.transformer.state_dict(), peer().state_dict())
    assert same(theirs.vae.state_dict(), load_pipeline(source).vae.state_dict())
    assert theirs.get_label_ids(["synonym 3"]) == [3]
    theirs.set_progress_bar_config(disable=True)
    options = dict(guidance_scale=1, num_inference_steps=2, output_type="np")
    assert np.isfinite(theirs([1], **options).images).all()  # guidance would use class 1000


def test_a_model_with_learned_variance_gets_a_ddim_scheduler(tmp_path, convert):
    """diffusers' DiTPipeline drops the variance channels, which ``learned_range`` needs."""
    randomized(SMALL).save_pretrained(tmp_path / "a")
    arguments = ("--to", "diffusers-pipeline", "--autoencoder", "digits")
    assert convert(tmp_path / "a", *arguments, "--output", tmp_path / "b")[0] == 0
    theirs = DiTPipeline.from_pretrained(tmp_path / "b")
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    theirs.set_progress_bar_config(disable=True)
    options = dict(guidance_scale=1, num_inference_steps=2, output_type="np")
    assert theirs([1], **options).images.shape == (1, 32, 32, 3)


def test_precision_changes_only_when_asked(tmp_path, convert):
    model = randomized(SMALL)
    model.save_pretrained(tmp_path / "a")
    arguments = ("--to", "moh-dit", "--dtype", "bfloat16", "--output", tmp_path / "b")
    assert convert(tmp_path / "a", *arguments)[0] == 0
    assert same(weights(tmp_path / "b"), model.bfloat16().state_dict())


def test_without_a_format_the_source_is_described(tmp_path, convert):
    peer().save_pretrained(tmp_path / "a")
    code, out, _ = convert(tmp_path / "a")
    assert code == 0
    assert "a DiT of no preset (3 layers of width 32, patch 2), latents 4×8×8, 5 classes" in out
    assert "70,432 parameters in float32, diffusers format" in out


def test_a_dense_model_is_converted_to_moh(tmp_path, convert):
    model = randomized(SMALL).eval()
    model.save_pretrained(tmp_path / "a")
    plan = ("--moh.num_shared_heads", "1", "--moh.num_active_routed_heads", "3")
    assert convert(tmp_path / "a", *plan, "--to", "moh-dit", "--output", tmp_path / "b")[0] == 0
    moh = load_pretrained(tmp_path / "b")
    assert moh.config.num_shared_heads == [1, 1, 1]
    assert torch.allclose(output(moh), output(model), atol=1e-5)  # every head is active
    code, _, err = convert(tmp_path / "b", "--to", "published", "--output", tmp_path / "c.pt")
    assert code == 2
    assert "the query_norm router has no weights" in err


# ------------------------------------------------------------------------------------- bad input


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{0}/torn.pt --to diffusers --output {0}/o", "truncated or damaged"),
        (
            "{0}/flipped.pt --model.num_heads 4 --to diffusers --output {0}/o",
            "does not match its checksum",
        ),
        (
            "{0}/flipped.pt --model.num_heads 4 --to published --output {0}/deep/o.pt",
            "does not match its checksum",
        ),
        ("{0}/a.pt --to moh-dit --output {0}/o", "no preset has the shapes"),
        ("{0}/a.pt --model.num_heads 5 --to moh-dit --output {0}/o", "not divisible"),
        ("{0}/a.pt --model.num_heads 4 --to pipeline --output {0}/o", "no autoencoder"),
        ("{0}/moh --to diffusers --output {0}/o", "no mixture-of-head layers"),
        ("{0}/moh --to moh-dit --output {0}/a.pt", "exists"),
        ("{0}/moh --to published --output {0}/o", "must end in .pt"),
        ("{0}/moh --to moh-dit", "output is not set"),
        ("{0}/moh --to moh-dit --with_code --output {0}/o", "only with --to pipeline"),
        ("{0}/moh --to moh-did --output {0}/o", "moh-did"),
        ("{0}/missing --to moh-dit --output {0}/o", "does not exist"),
        ("{0}/moh --weights ema-0.5 --model.num_heads 8 --to moh-dit --output {0}/o", "match"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(arguments, words, tmp_path, convert):
    randomized(ROUTED).save_pretrained(tmp_path / "moh")
    for name, spoil in dict(a=None, torn=truncate, flipped=flip).items():
        torch.save(randomized(SMALL).state_dict(), tmp_path / f"{name}.pt")
        if spoil is not None:
            spoil(tmp_path / f"{name}.pt")
    before = contents(tmp_path)
    code, _, err = convert(*arguments.format(tmp_path).split())
    lines = err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("moh-dit convert: error: ")
    assert words in lines[0]
    assert contents(tmp_path) == before
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("./missing --to moh-dit --output o", "checkpoint ./missing does not exist"),
        ("owner/name --to moh-dit --output taken", "output taken exists"),
        ("owner/name --to published --output o", "must end in .pt"),
    ],
)
def test_wrong_paths_are_reported_without_importing_torch(arguments, words, tmp_path):
    (tmp_path / "taken").mkdir()
    script = """
import sys
from moh_dit.__main__ import main
try:
    main(["convert", *sys.argv[1:]])
finally:
    assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", script, *arguments.split()]
    environment = os.environ | dict(PYTHONPATH=str(Path(moh_dit.__file__).parents[1]))
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert words in line


def test_missing_disk_space_is_reported_before_writing(tmp_path, convert, monkeypatch):
    randomized(SMALL).save_pretrained(tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = convert(tmp_path / "a", "--to", "moh-dit", "--output", tmp_path / "b")
    assert code == 2
    assert "only 1000 bytes are free" in err
    assert not (tmp_path / "b").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, convert, monkeypatch):
    randomized(SMALL).save_pretrained(tmp_path / "a")

    def fail(file, state):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moh_dit.checkpoints.writing.write_safetensors", fail)
    code, _, err = convert(tmp_path / "a", "--to", "moh-dit", "--output", tmp_path / "b")
    assert code == 2
    assert "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --------------------------------------------------------------------------- self-contained folders

ALONE = """
import importlib
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moh_dit", "fid_eval", "jsonargparse"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from diffusers import AutoModel, DiffusionPipeline

folder, again, results = sys.argv[1:]
for number, source in enumerate((folder, again, "owner/name")):
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["b", 3], num_inference_steps=3, generator=generator, output_type="pt").images
    torch.save(images, f"{results}/{number}.pt")
    if source == folder:
        pipeline.save_pretrained(again)
    if source == "owner/name":  # diffusers' AutoModel asks the hub even for a cached repository
        continue
    model = AutoModel.from_pretrained(source, subfolder="transformer", trust_remote_code=True)
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert type(model) is type(pipeline.transformer)
package = type(pipeline.transformer).__module__.partition(".")[0]
for kernels in ("attention_operators", "triton_adaln"):  # operators of this version only
    importlib.import_module(f"{package}.kernels.{kernels}")
assert {"attention", "adaln"} <= set(dir(getattr(torch.ops, package)))
assert not hasattr(torch.ops.moh_dit, "attention")
assert "moh_dit" not in sys.modules
"""


def into_hub_cache(folder, cache):
    """Write what the hub's client leaves after downloading ``owner/name``."""
    repository, commit = cache / "models--owner--name", "0123abcd" * 5
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return cache


def test_a_folder_with_code_opens_without_this_package(run_folder, tmp_path, convert, monkeypatch):
    folder, again = tmp_path / "shared", tmp_path / "again"
    arguments = ("--to", "pipeline", "--with_code", "--license", "mit", "--output", folder)
    assert convert(run_folder, *arguments)[0] == 0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    cache = into_hub_cache(folder, tmp_path / "hf" / "hub")
    environment |= dict(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", ALONE, str(folder), str(again), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)

    installed = MoHDiTPipeline.from_pretrained(folder)
    assert type(installed) is MoHDiTPipeline
    assert type(installed.transformer).__module__ == "moh_dit.model.transformer"
    installed.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    images = installed(["b", 3], output_type="pt", **options).images
    for number in range(3):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), images)
    for file in ("pipeline.py", "transformer/moh_dit_transformer.py", "README.md", "samples.png"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert same(weights(again), weights(run_folder))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert same(weights("owner/name", local_files_only=True), weights(run_folder))


def test_the_card_contains_metrics_recipe_and_samples_of_the_run(run_folder, tmp_path, convert):
    arguments = ("--to", "pipeline", "--license", "cc-by-nc-4.0", "--output", tmp_path / "a")
    assert convert(run_folder, *arguments)[0] == 0
    card = (tmp_path / "a" / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    for line in ("license: cc-by-nc-4.0", "library_name: diffusers", "type: fd_digits"):
        assert line in front
    for text in ("| fd_digits | 12.5 |", "After 10 steps, on 1,000 samples", "batch_size: 4"):
        assert text in body
    assert "![Samples, one row per class](samples.png)" in body
    grid = run_folder / "samples/step-00000010.png"
    assert (tmp_path / "a" / "samples.png").read_bytes() == grid.read_bytes()
    assert convert(tmp_path / "a", "--to", "pipeline", "--output", tmp_path / "b")[0] == 0
    assert card_license(tmp_path / "b") == "cc-by-nc-4.0"
    assert (tmp_path / "b" / "README.md").read_text() == card
    plan = ("--to", "pipeline", "--license", "mit")
    assert convert(tmp_path / "a", *plan, "--output", tmp_path / "c")[0] == 0
    assert card_license(tmp_path / "c") == "mit"


def test_a_run_without_evaluations_has_a_card_without_metrics(run_folder):
    shutil.rmtree(run_folder / "evaluations")
    details = run_details(run_folder)
    assert details.metrics == {}
    assert details.recipe == "num_steps: 10\nbatch_size: 4\n"


def test_the_card_has_the_metrics_of_the_newest_measured_set(run_folder):
    record = dict(time="", kind="set", path="samples.npz", step=10)
    settings = dict(guidance_scale=2.0, num_inference_steps=50, seed=1)
    record_text = json.dumps(record | dict(settings=settings))
    grid = json.dumps(record | dict(kind="grid", path="grid.png", settings=settings))
    (run_folder / "outputs.jsonl").write_text(f"{record_text}\n{grid}\n")
    for name in ("samples.npz", "grid.png"):
        (run_folder / name).write_bytes(b"")
    result = dict(name="samples.npz", metrics={"fd_digits": 3.5}, samples={"count": 70})
    document = dict(sets=[result], reference={"name": "train.npz"}, extractors={"digits": {}})
    (run_folder / "metrics.json").write_text(json.dumps(document))
    details = run_details(run_folder, "mit")
    assert (details.metrics, details.license) == ({"fd_digits": 3.5}, "mit")
    assert details.grid == run_folder / "grid.png"
    assert details.conditions == (
        "After 10 steps, on 70 samples (guidance 2.0, 50 steps, seed 1) against train.npz; "
        "features of digits."
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub: store uploads in a folder, and provide a card for ``owner/known``."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    uploaded = tmp_path / "uploaded"

    def upload_folder(repo_id, folder_path, **options):
        shutil.copytree(folder_path, uploaded / repo_id)
        return f"https://hub/{repo_id}"

    def load(repo_id, **options):
        if repo_id != "owner/known":
            raise EntryNotFoundError("404")
        return ModelCard("---\nlicense: mit\n---\n\nWritten by hand.")

    def create_repo(repo_id, **options):
        return type("Url", (), {"repo_id": repo_id})

    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", create_repo)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", load)
    return uploaded


def test_push_to_hub_uploads_code_and_card(hub, tmp_path):
    pipeline = tiny_pipeline()
    assert pipeline.push_to_hub("owner/new") == "https://hub/owner/new"
    pushed = hub / "owner/new"
    assert "MoH-DiT of no preset" in (pushed / "README.md").read_text()
    assert (pushed / "pipeline.py").is_file()
    assert same(weights(pushed), pipeline.transformer.state_dict())
    pipeline.push_to_hub("owner/known")
    assert "Written by hand." in (hub / "owner/known/README.md").read_text()
    pipeline.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="owner/third")
    assert (hub / "owner/third/transformer/moh_dit_transformer.py").is_file()
    assert json.loads((hub / "owner/third/model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "MoHDiTPipeline",
    ]


def test_hub_ids_open_as_pipelines(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("moh_dit.common.hub.snapshot_download", snapshot_download)
    pipeline = MoHDiTPipeline.from_pretrained("owner/name", revision="v1")
    assert asked["name"] == "owner/name"
    assert asked["revision"] == "v1"
    assert same(pipeline.transformer.state_dict(), weights(tmp_path / "snapshot"))


def test_a_flow_model_does_not_convert_to_the_pipeline_of_diffusers(run_folder, tmp_path, convert):
    shutil.rmtree(run_folder / "scheduler")
    FlowObjective().scheduler.save_pretrained(run_folder / "scheduler")
    randomized(SMALL).save_pretrained(run_folder / "checkpoints/step-00000020/transformer")
    code, _, err = convert(run_folder, "--to", "diffusers-pipeline", "--output", tmp_path / "a")
    assert code == 2
    assert "predicts a flow" in err


def test_formats_are_recognized(run_folder, tmp_path):
    assert open_checkpoint(run_folder).format == "moh-dit"
    torch.save(randomized(SMALL).state_dict(), tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt").format == "published"
