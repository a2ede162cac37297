"""Run ``fid-eval`` on many sets, with jobs files, resuming, reports and several processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fid_eval import evaluate, report
from fid_eval.__main__ import main
from fid_eval.evaluator import Evaluator
from fid_eval.parsers import SUBCOMMANDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make ref.npz, step-100.npz and step-200.npz of 32 × 32 images for the extractor digits."""
    path = tmp_path_factory.mktemp("sets")
    generator = np.random.default_rng(0)
    for name, count in (("ref", 60), ("step-100", 50), ("step-200", 40)):
        coarse = generator.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
        images = coarse.repeat(8, 1).repeat(8, 2).repeat(3, 3)
        np.savez(path / f"{name}.npz", images, generator.integers(0, 10, count))
    return path


def run(*arguments):
    return main([*map(str, arguments), "--extractor", "digits", "--device", "cpu", "--quiet"])


def document(path):
    return json.loads(Path(path).read_text())


def test_several_sets_make_a_table_json_csv_and_plot(folder, tmp_path, capsys):
    sets = [folder / "step-200.npz", folder / "step-100.npz"]
    outputs = [tmp_path / f"out/r.{end}" for end in ("json", "csv", "png")]
    code = run(folder / "ref.npz", *sets, "--output", outputs[0], "--csv", outputs[1], "--plot",
               outputs[2], "--bootstrap", 3)  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    for word in ("step-100.npz", "fd_digits", "accuracy_digits", "fp32 distances", "weights "):
        assert word in printed
    results = document(outputs[0])
    assert [entry["name"] for entry in results["sets"]] == list(map(str, sets))
    entry = results["sets"][0]
    assert entry["samples"]["count"] == 40
    assert len(entry["samples"]["sha256"]) == 64
    assert results["extractors"]["digits"]["network_precision"] == "float32"
    assert results["reference"]["frechet_from"] == "images"
    assert results["versions"]["torch"]
    rows = list(csv.DictReader(outputs[1].open()))
    assert float(rows[1]["fd_digits"]) == results["sets"][1]["metrics"]["fd_digits"]
    assert float(rows[0]["fd_digits_low"]) < float(rows[0]["fd_digits"])
    assert Image.open(outputs[2]).width > 500
    assert report.plot_positions(results) == ([200.0, 100.0], True)


def test_a_broken_set_is_reported_at_the_end_with_exit_code_1(folder, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes((folder / "ref.npz").read_bytes()[:5000])
    output = tmp_path / "r.json"
    assert run(folder / "ref.npz", broken, folder / "step-100.npz", "--output", output) == 1
    captured = capsys.readouterr()
    assert captured.err.strip().endswith(f": error: {document(output)['sets'][0]['error']}")
    assert "not a complete .npz" in captured.err
    assert document(output)["sets"][1]["metrics"]["fd_digits"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ref.npz", "none.npz"], "none.npz: no such file or folder"),
        (["none.npz", "step-100.npz"], "no such file or folder, and no saved reference"),
        (["ref.npz"], "no sample sets to compare"),
        (["ref.npz", "step-100.npz", "--metrics", "fjd"], "did you mean 'fid'"),
        (["ref.npz", "step-100.npz", "--batch-size", "0"], "at least 1"),
        (["ref.npz", "step-100.npz", "--batch_sizes", "8"], "did you mean '--batch_size'"),
        (["ref.npz", "step-100.npz", "--crop"], "--crop needs --resize SIZE"),
        (["classifier", "none.npz", "--output", "a.safetensors"], "none.npz: no such file"),
        (["stats", "ref.npz", "--output", "ref.npz"], "exists and is not overwritten"),
        (["stats", "none", "--name", "a"], "none: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FID_EVAL_HOME", str(folder / "home"))
    monkeypatch.setattr(sys, "argv", ["/some/fid_eval/__main__.py"])
    runtime = [] if arguments[0] == "classifier" else ["--extractor", "digits", "--quiet"]
    assert main([*arguments, *runtime]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    program = "python -m fid_eval" + f" {arguments[0]}" * (arguments[0] in SUBCOMMANDS)
    assert captured.err.startswith(f"{program}: error: ")
    assert not captured.out


def test_a_jobs_file_names_sets_options_and_metrics(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        f"""
reference: ref.npz
metrics: [fid, precision]
batch-size: 16
output: {tmp_path / "r.json"}
sets:
  - step-100.npz
  - path: step-200.npz
    name: last
    metrics: [fid]
    x: 2
"""
    )
    assert run(jobs) == 0
    first, last = document(tmp_path / "r.json")["sets"]
    assert list(first["metrics"]) == ["fd_digits", "precision_digits"]
    assert (last["name"], last["x"], list(last["metrics"])) == ("last", 2, ["fd_digits"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reference: a\nsets: [b]\nmetric: [fid]", "unknown key 'metric'; did you mean 'metrics'"),
        (
            "reference: a\nsets: [{path: b, nam: c}]",
            "a set: unknown key 'nam'; did you mean 'name'",
        ),
        ("reference: a", "'sets' is missing"),
        ("reference: a\nsets: [{name: c}]", "a set has no 'path'"),
        ("reference: [", "cannot be read"),
    ],
)
def test_mistakes_in_a_jobs_file_are_errors(text, message, tmp_path, capsys):
    (tmp_path / "jobs.yaml").write_text(text)
    assert run(tmp_path / "jobs.yaml") == 2
    assert message in capsys.readouterr().err


def test_resume_continues_a_killed_run(folder, tmp_path, monkeypatch):
    sets = [folder / "step-100.npz", folder / "step-200.npz"]
    output = tmp_path / "r.json"
    measured = []
    call = Evaluator.__call__

    def counted(self, samples, **more):
        measured.append(Path(samples.name).name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return call(self, samples, **more)

    monkeypatch.setattr(Evaluator, "__call__", counted)
    assert run(folder / "ref.npz", *sets, "--output", output) == 130
    assert len(document(output)["sets"]) == 1
    assert run(folder / "ref.npz", *sets, "--output", output, "--resume") == 0
    assert measured == ["step-100.npz", "step-200.npz", "step-200.npz"]
    assert len(document(output)["sets"]) == 2


def test_existing_results_need_resume_or_overwrite(folder, tmp_path, capsys):
    output = tmp_path / "r.json"
    command = [folder / "ref.npz", folder / "step-100.npz", "--output", output]
    assert run(*command) == 0
    before = output.read_text()
    assert run(*command) == 2
    message = capsys.readouterr().err
    assert "--resume to continue it or --overwrite to replace it" in message
    assert run(*command, "--resume", "--overwrite") == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert run(*command, "--resume", "--k", 5) == 2
    assert "has results with k 3, but this run has 5" in capsys.readouterr().err
    assert output.read_text() == before
    assert run(*command, "--k", 5, "--overwrite") == 0
    output.write_text("{}")
    assert run(*command, "--resume") == 2
    assert "not a results file" in capsys.readouterr().err
    assert run(*command[:-1], tmp_path / "new.json", "--resume") == 0  # starts a new file


def test_stats_then_evaluation_by_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FID_EVAL_HOME", str(tmp_path))
    assert run("stats", folder / "ref.npz", "--name", "blobs", "--images", 20) == 0
    assert main(["references"]) == 0
    assert "blobs\t" in capsys.readouterr().out
    assert run("blobs", folder / "step-100.npz", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["reference"]["statistics_count"] == 60
    assert results["reference"]["image_count"] == 20


BOTH = """
import sys
import numpy as np
import torch.distributed as dist
from fid_eval import Share, evaluate
from fid_eval.__main__ import main

dist.init_process_group("gloo")  # as a training program does
reference, damaged, many, *arguments = sys.argv[1:]
code = main([reference, damaged, many, *arguments])
rank, size = dist.get_rank(), dist.get_world_size()
images = np.load(many)["arr_0"][:1500]
mine = np.array_split(images, size)[rank]
shared = evaluate(reference, Share([mine]), metrics=["fid", "is"], extractor="digits", device="cpu")
found = f"{code} {shared['fd_digits']:.10f} {shared['class_score_digits']:.10f}"
sys.stdout.write(f"rank {rank}: {found}\\n")  # one write: print would write the newline separately
dist.destroy_process_group()
"""


def test_two_processes_give_the_results_of_one(folder, tmp_path):
    """Sums are merged exactly, so no bit differs. A broken set must not block a rank."""
    images = np.random.default_rng(1).integers(0, 256, (2100, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "many.npz", images)
    np.savez(tmp_path / "broken.npz", images[:1])
    np.savez_compressed(tmp_path / "damaged.npz", images)
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[len(data) * 3 // 4] ^= 255  # in a chunk of rank 1
    (tmp_path / "damaged.npz").write_bytes(data)
    (tmp_path / "both.py").write_text(BOTH)
    sets = [tmp_path / f"{name}.npz" for name in ("damaged", "many", "broken")]
    arguments = [folder / "ref.npz", *sets, "--quiet", "--time_limit", "1000",
                 "--extractor", "digits", "--device", "cpu", "--output"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", tmp_path / "both.py", *arguments,
         tmp_path / "two.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "broken.npz: holds 1 image" in done.stderr

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like each of the two processes
    try:
        assert main([*map(str, arguments), str(tmp_path / "one.json")]) == 1
        alone = evaluate(
            folder / "ref.npz", images[:1500], metrics=["fid", "is"], extractor="digits",
            device="cpu", quiet=True,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    one, two = document(tmp_path / "one.json"), document(tmp_path / "two.json")
    assert "arr_0.npy cannot be read" in one["sets"][0]["error"]
    assert two["sets"][0] == one["sets"][0]
    assert two["sets"][1]["metrics"] == one["sets"][1]["metrics"]
    assert two["sets"][2] == one["sets"][2]
    assert two["reference"] == one["reference"]

    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert [line[:6] for line in lines] == ["rank 0", "rank 1"], done.stdout + done.stderr
    for line in lines:  # each rank had half of the images, in other batches
        code, distance, score = map(float, line.split()[2:])
        assert code == (1 if line[:6] == "rank 0" else 0)  # one set failed; only rank 0 reports it
        assert distance == pytest.approx(alone["fd_digits"], rel=1e-5)
        assert score == pytest.approx(alone["class_score_digits"], rel=1e-5)


@pytest.mark.parametrize("option", ["--output", "--csv", "--plot"])
def test_outputs_that_cannot_be_written_are_reported_before_the_work(
    option, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Evaluator, "__call__", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "r.json", tmp_path):
        assert run(folder / "ref.npz", folder / "step-100.npz", option, target) == 2
        assert str(target) in capsys.readouterr().err
    code = main(["stats", str(folder / "ref.npz"), "--output", f"{tmp_path}/file/r.npz",
                 "--extractor", "digits", "--quiet"])  # fmt: skip
    assert code == 2


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_an_unavailable_device_is_an_error_of_one_line(device, folder, capsys):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    code = main([str(folder / "ref.npz"), str(folder / "step-100.npz"), "--device", device])
    assert code == 2
    assert f": error: device '{device}' cannot be used" in capsys.readouterr().err


def test_a_distance_of_zero_is_printed_without_a_sign():
    assert report.format_value(-1e-13) == "0.0000"
    assert report.format_value(-0.5) == "-0.5000"


def test_a_closed_pipe_is_not_an_error(folder):
    arguments = [folder / "ref.npz", folder / "step-100.npz", "--extractor", "digits", "--quiet"]
    command = [sys.executable, "-m", "fid_eval", *map(str, arguments)]
    end, other = os.pipe()
    os.close(end)  # close the reading end of the pipe
    done = subprocess.run(command, stdout=other, stderr=subprocess.PIPE, text=True)
    os.close(other)
    assert done.returncode == 0
    assert done.stderr == ""
