"""Test the checks of requests; images equal those of the command line."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from helpers.web_server import Gate, demo_config, write_run
from PIL import Image

import sample_dit
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common.errors import UserError
from moh_dit.sampling.engine import generate
from moh_dit.web.job_queue import Cancelled, Job
from moh_dit.web.service import ImageService

ASKED = {"class_labels": ["3", 7], "images_per_class": 2, "scheduler": "euler-ancestral"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def service(run):
    options = dict(max_images=6, max_inference_steps=50, previews=2)
    return ImageService(load_pipeline(run), demo_config(run, **options))


def make(service, asked):
    job = Job(service.parse_request(asked))
    return job, service.run_job(job)


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("mode", [{}, {"interpolate": 3}, {"guidance_scales": "1, 2.5"}])
def test_the_command_line_reproduces_the_sheet(service, tmp_path, monkeypatch, mode):
    job, news = make(service, {**ASKED, "seed": "5", "guidance_scale": 1.5, **mode})
    assert news["name"] == "digits-step-00000002-seed5.png"
    (tmp_path / news["name"]).write_bytes(job.files["grid.png"])
    with Image.open(tmp_path / news["name"]) as sheet:
        assert sheet.text["settings"].encode() == job.files["settings.yaml"]
    again = ["--config", str(tmp_path / news["name"]), "--output", str(tmp_path / "again.png")]
    monkeypatch.setattr(sys, "argv", ["sample_dit.py", *again])
    sample_dit.main()
    assert np.array_equal(
        pixels(job.files["grid.png"]), np.asarray(Image.open(tmp_path / "again.png"))
    )


def test_cells_are_the_images_edge_to_edge(service):
    job, news = make(service, ASKED)
    assert (news["rows"], news["columns"]) == (["3", "7"], 2)
    _, images = next(generate(service.pipeline, [3, 3, 7, 7], service.parse_request(ASKED)))
    cells = pixels(job.files["cells.png"])
    assert cells.shape == (64, 64, 3)
    for index, image in enumerate(images):
        y, x = divmod(index, 2)
        assert np.array_equal(cells[32 * y : 32 * y + 32, 32 * x : 32 * x + 32], image)


def test_progress_and_previews(service):
    news, previews = [], []

    def watch():
        news.append(job.state)
        if job.state["picture"] > len(previews):
            previews.append(job.files["preview.jpg"])

    job = Job(service.parse_request({**ASKED, "num_inference_steps": 9}), watch)
    service.run_job(job)
    assert [state["done"] for state in news] == [4 * (step + 1) for step in range(9)]
    assert {state["total"] for state in news} == {36}
    assert [state["picture"] for state in news] == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    early, late = map(pixels, previews)
    assert early.shape == late.shape == (64, 64, 3)
    assert not np.array_equal(early, late)


def test_head_load_is_of_these_images(service):
    job, news = make(service, ASKED)
    (layer,) = news["head_load"]["layers"]
    assert layer == {"index": 1, "shared_heads": 2, "active_routed_heads": 1, "even": 0.5}
    views = {view["name"]: view["shares"][0] for view in news["head_load"]["views"]}
    assert list(views) == ["all classes", "3", "7", "null class (other half of guidance)"]
    for shares in views.values():
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert np.allclose(np.mean([views["3"], views["7"]], axis=0), views["all classes"], atol=1e-3)
    numbers = json.loads(job.files["head_load.json"])
    assert [one["name"] for one in numbers["classes"]] == ["3", "7"]

    _, news = make(service, {"class_labels": [3], "guidance_scale": 1})
    assert [view["name"] for view in news["head_load"]["views"]] == ["all classes"]


def test_a_model_without_routed_heads_has_no_head_load(tmp_path):
    dense = dict(num_shared_heads=None, num_active_routed_heads=None)
    run = write_run(tmp_path / "dense", **dense)
    job, news = make(ImageService(load_pipeline(run), demo_config(run)), {"class_labels": [3]})
    assert "head_load" not in news
    assert "head_load.json" not in job.files


def test_cancelling_stops_within_a_step(run):
    pipeline = load_pipeline(run)
    service, gate = ImageService(pipeline, demo_config(run)), Gate(pipeline.transformer)
    job = Job(service.parse_request({"class_labels": [1, 2], "num_inference_steps": 10}))
    job.on_change = job.cancelled.set  # called after the first step
    with pytest.raises(Cancelled):
        service.run_job(job)
    assert gate.evaluations == 2
    assert not pipeline.transformer.routed_layers[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "a request must be a JSON object"),
        ({"class_labels": []}, "no class is chosen"),
        ({}, "no class is chosen"),
        ({"class_labels": ["cat"]}, "no class is named 'cat'"),
        ({"class_labels": [10]}, "out of range 0 … 9"),
        ({"class_labels": ["-1"]}, "class label -1 is out of range"),
        ({"class_labels": "3"}, "class_labels is '3'; give a list of class names or ids"),
        ({"class_labels": [True]}, "give a list of class names or ids"),
        ({"class_labels": ["9" * 5000]}, "give a list of class names or ids"),
        ({"images_per_class": 0}, "images_per_class is 0; it must be at least 1"),
        ({"images_per_class": 2.5}, "images_per_class is 2.5; give a whole number"),
        ({"images_per_class": "4"}, "4 images of each of 2 classes are 8 images; at most 6"),
        ({"images_per_class": 10**20}, "at most 6 are allowed per request"),
        ({"num_inference_steps": 51}, "at most 50 are allowed"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": "many"}, "num_inference_steps is 'many'; give a whole number"),
        ({"guidance_scale": "NaN"}, "guidance_scale is 'NaN'; give a number"),
        ({"guidance_scale": True}, "guidance_scale is True; give a number"),
        ({"guidance_scale": 10**400}, "give a number"),
        ({"scheduler": "flow-euler"}, "those that fit are ddpm, ddim"),
        ({"scheduler": 3}, "scheduler is 3; give the name of a sampler"),
        ({"interpolate": 1}, "interpolate is 1; it must be at least 2"),
        ({"guidance_scales": "1,x"}, "the values of guidance_scale must be numbers"),
        ({"guidance_scales": "1,inf"}, "guidance_scale is inf; give finite numbers"),
        ({"guidance_scales": "1,2,3,4"}, "at most 6 are allowed per request"),
        ({"seed": -1}, "seed is -1; it must be between 0 and 2^64 - 1"),
        ({"seed": str(1 << 64)}, "it must be between 0 and 2^64 - 1"),
        ({"checkpoint": "/etc"}, "unknown setting 'checkpoint'"),
        ({"gidance_scale": 2}, "did you mean guidance_scale?"),
    ],
)
def test_wrong_values_are_errors_in_one_short_line(service, asked, message):
    if isinstance(asked, dict) and asked and "class_labels" not in asked:
        asked = {"class_labels": [0, 1], **asked}
    with pytest.raises(UserError) as error:
        service.parse_request(asked)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_missing_settings_keep_their_default(service):
    config = service.parse_request(
        {"class_labels": ["0"], "scheduler": "", "seed": None, "guidance_scale": 0}
    )
    assert (config.scheduler, config.seed, config.guidance_scale) == (None, 0, 0.0)
    assert config.num_inference_steps == 4
    big = service.parse_request({"class_labels": ["0"], "seed": str((1 << 64) - 1)})
    assert big.seed == (1 << 64) - 1


def test_classes_with_equal_names_are_recorded_by_id(run):
    pipeline = load_pipeline(run)
    names = ["crane"] * 2 + ["a, b", "a", " b", *"56789"]
    pipeline.register_to_config(class_names=names)
    service = ImageService(pipeline, demo_config(run))
    assert service.parse_request({"class_labels": [1, 2]}).class_labels == "1,2"
    assert service.parse_request({"class_labels": [2, 5]}).class_labels == "a, b,5"
    assert service.parse_request({"class_labels": ["a, b"]}).class_labels == "a, b"


def test_too_little_memory_is_an_error_with_advice(service, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moh_dit.web.service.sample_rows", fail)
    with pytest.raises(UserError, match="request fewer images"):
        make(service, ASKED)
