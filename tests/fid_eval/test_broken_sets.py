"""Broken sets of many kinds: one line for each, and the other sets of a batch are evaluated."""

import json
import multiprocessing
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import broken_features  # noqa: F401  adds to KINDS
from helpers.broken_sets import IMAGES, KINDS, SIDE
from helpers.image_sources import png
from helpers.projection_extractor import Projection, draw, options

from fid_eval import Evaluator
from fid_eval.__main__ import main
from fid_eval.jobs import run_jobs
from fid_eval.jobs_file import Job


def run(*arguments):
    return main([*map(str, arguments), "--extractor", "digits", "--device", "cpu", "--quiet"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Write 40 images as good.npz and return its path."""
    path = tmp_path_factory.mktemp("good") / "good.npz"
    np.savez(path, np.random.default_rng(1).integers(0, 256, (40, SIDE, SIDE, 3), np.uint8))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_batch_reports_every_broken_set_and_evaluates_the_others(good, tmp_path, capsys):
    paths = {}
    for name, (write, _) in KINDS.items():
        (tmp_path / name).mkdir()
        paths[name] = write(tmp_path / name)
    last = good.parent / "last.npz"
    last.write_bytes(good.read_bytes())
    output = tmp_path / "results.json"
    assert run(good, good, *paths.values(), last, "--output", output) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("\n") == len(KINDS)
    first, *broken, final = json.loads(output.read_text())["sets"]
    assert final["metrics"] == first["metrics"]
    errors = dict(zip(KINDS, (entry.get("error") for entry in broken), strict=True))
    wrong = {n: text for n, text in errors.items() if not re.search(KINDS[n][1], text or "")}
    assert wrong == {}
    unnamed = {n: text for n, text in errors.items() if paths[n].name not in text}
    assert unnamed == {}


@pytest.mark.parametrize("position", ["reference", "samples"])
@pytest.mark.parametrize(
    "name", ["fifo", "encrypted_npz", "one_byte_of_a_compressed_npz", "dataset_json_that_is_cut"]
)
def test_a_single_broken_set_is_an_error_of_one_line(name, position, good, tmp_path, capsys):
    write, message = KINDS[name]
    sets = [write(tmp_path), good]
    assert run(*(sets if position == "reference" else reversed(sets))) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    assert not captured.out


SCRIPT = """
import os, sys, time
import numpy as np
import torch
from fid_eval.__main__ import main
from fid_eval.sets import decoding, encoded, npz, readers

readers.PROCESSES_FROM = 1  # decode in worker processes
decode, read = encoded.decode, npz.NpzMember.read
fault, *arguments = sys.argv[1:]

def decode_in_worker(data, preprocess):
    image, conversions = decode(data, preprocess)
    if image[0, 0, 0] == 77:  # the bad set
        {"killed": lambda: os.kill(os.getpid(), 9), "hung": lambda: time.sleep(1000),
         "memory": lambda: [][0], "thread": int}[fault]()
    return image, conversions

def read_in_thread(self, *span):
    if fault == "thread" and self.path.name == "bad.npz":
        time.sleep(1000)
    return read(self, *span)

encoded.decode, npz.NpzMember.read = decode_in_worker, read_in_thread
sys.exit(main(arguments))
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "worker processes was killed"),
        ("hung", "took longer than --time_limit 5"),
        ("thread", "bad.npz: took longer than --time_limit 5"),
        ("memory", r"0.png: list index out of range \(IndexError\)"),
    ],
)
def test_a_set_whose_loader_dies_or_hangs_is_an_error(fault, message, good, tmp_path):
    images = IMAGES.copy()
    images[:, 0, 0, 0] = 77
    bad = tmp_path / ("bad.npz" if fault == "thread" else "bad")
    if fault == "thread":
        np.savez(bad, images)
    else:
        bad.mkdir()
        for index, image in enumerate(images):
            (bad / f"{index}.png").write_bytes(png(image))
    output = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, fault, good, bad, good, "--extractor", "digits", "--quiet",
         "--device", "cpu", "--output", output, "--time_limit", "5"],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    failed, evaluated = json.loads(output.read_text())["sets"]
    assert re.search(message, failed["error"])
    assert evaluated["metrics"]["fd_digits"] == pytest.approx(0, abs=1e-6)


def test_a_set_whose_evaluation_fails_leaves_no_worker_processes(tmp_path, monkeypatch):
    """Otherwise the memory of many failed sets would add up."""
    monkeypatch.setattr("fid_eval.sets.readers.PROCESSES_FROM", 1)
    for name in ("reference", "samples"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(draw(60, len(name))[0]):
            (tmp_path / name / f"{index}.png").write_bytes(png(image))

    class Fails(Projection):
        def forward(self, images):
            if self.images_seen >= 70:
                raise RuntimeError("two\nlines")
            return super().forward(images)

    evaluator = Evaluator(tmp_path / "reference", **options(extractor=Fails(), batch_size=10))
    jobs = [Job(str(tmp_path / "samples"), "set a")]
    (entry,) = run_jobs(evaluator, jobs)["sets"]
    assert entry == {"name": "set a", "error": "set a: two lines (RuntimeError)"}
    assert not multiprocessing.active_children()


def test_a_file_name_that_is_not_utf8_is_escaped_in_reports(good, tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.npz"
    with open(path, "wb") as file:
        file.write(good.read_bytes())
    outputs = ["--output", tmp_path / "a.json", "--csv", tmp_path / "a.csv"]
    assert run(good, os.fsdecode(path), good, *outputs, "--plot", tmp_path / "a.png") == 0
    assert r"caf\udce9.npz" in capsys.readouterr().out
    assert r"caf\udce9.npz" in (tmp_path / "a.csv").read_text()


def test_debug_shows_the_traceback(good, tmp_path, capsys):
    broken = KINDS["npz_with_unknown_compression"][0](tmp_path)
    assert run(good, broken, good, "--debug") == 1
    assert "NotImplementedError: " in capsys.readouterr().err
