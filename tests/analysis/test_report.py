"""A report shows the contents of the runs, lists missing parts, and is self-contained."""

import base64
import io
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from moh_dit.__main__ import run_command
from moh_dit.analysis.config import ReportConfig
from moh_dit.analysis.report import (
    metric_rows,
    relative_load,
    render_report,
    setting_differences,
    write_report,
)
from moh_dit.analysis.report_charts import (
    MAX_POINTS,
    Series,
    downsample,
    head_load_chart,
    line_chart,
)
from moh_dit.analysis.run_reader import read_run_folders
from moh_dit.checkpoints.outputs import record_output
from moh_dit.common.cli import save_config
from moh_dit.common.errors import UserError
from moh_dit.sampling.config import SampleConfig
from moh_dit.training.config import ModelConfig, TrainConfig

VOID = {"meta", "img", "input", "wbr", "br", "link", "path", "use", "image"}


class Page(HTMLParser):
    """Collects the elements and the text of a page; fails if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.text.append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(folder, steps=4, **settings):
    """Write a run folder in the layout of training, with made-up numbers."""
    model = ModelConfig(hidden_size=32, depth=2, num_heads=4)
    folder.mkdir(parents=True)
    save_config(TrainConfig(num_steps=steps * 10, model=model, **settings), folder / "config.yaml")
    with (folder / "log.jsonl").open("w") as log:
        for step in range(10, 10 * steps + 1, 10):
            entry = dict(step=step, loss=1 / step, mse=1 / step, vlb=0.1, balance=1.5)
            entry |= dict(grad_norm=2.0, learning_rate=1e-4, images_per_second=100.0 + step)
            entry |= dict(data_wait=0.25, mfu=0.5, head_load={"1": [0.5, 0.75, 0.0, 0.75]})
            log.write(json.dumps(entry) + "\n")
            log.write(json.dumps({"step": step, "fid": 9.0}) + "\n")
    start = dict(start_step=0, time="2026-01-01", device="abacus", packages={"torch": "2.x"})
    (folder / "environment.jsonl").write_text(json.dumps(start) + "\n")
    for name in ("samples", "evaluations"):
        (folder / name).mkdir()
    for step in (20, 40):
        picture = np.full((8, 8, 3), step, np.uint8)
        Image.fromarray(picture).save(folder / "samples" / f"step-{step:08d}.png")
        result = dict(step=step, metrics={"fid": 1000 / step}, samples={"count": 500})
        result |= dict(reference={"name": "ref", "image_count": 70}, warnings=["few samples"])
        result |= dict(higher_is_better={"fid": False})
        (folder / "evaluations" / f"step-{step:08d}.json").write_text(json.dumps(result))
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)
    return folder


def test_a_complete_run(tmp_path):
    page = Page(text := render_report([make_run(tmp_path / "a", batch_size=7)]))
    assert "Missing or damaged" not in page.text
    for words in ("40 of 40", "batch_", "7", "256", "125", "25", "abacus", "Note: few samples",
                  "50.0 %", "25.0 %", "fid, lower is better", "layer 1"):  # fmt: skip
        assert words in page.text, words
    images = page.all("img")
    assert [image["data-step"] for image in images] == ["20", "40"]
    assert [image.get("class") for image in images] == [None, "shown"]
    for image, value in zip(images, (20, 40), strict=True):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        assert (pixels == value).all()
    # mse, vlb, balance, gradient norm, learning rate; head load; fid; speed, MFU, waiting.
    assert len(page.all("svg")) == 10
    assert text.count("currentColor") > 50


def record(run, name, kind="set", **settings):
    """Write an output of a run and record it."""
    config = SampleConfig(checkpoint=str(run), output=name, **settings)
    path = run / name
    Image.new("RGB", (8, 8)).save(path) if kind == "grid" else path.write_bytes(b"")
    record_output(str(run / "checkpoints" / "step-00000040"), kind, path, config)
    return path


def write_results(file, **sets):
    entries = [dict(name=name, metrics={"fid": fid}, samples={"count": 5}, warnings=["too few"])
               for name, fid in sets.items()]  # fmt: skip
    document = dict(settings={}, reference={"name": "train.npz"}, extractors={"inception": {}})
    file.write_text(json.dumps(dict(document, sets=entries)))


def test_outputs_and_their_metrics_are_shown(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "checkpoints" / "step-00000040" / "transformer").mkdir()
    record(run, "grid.png", "grid", seed=5, guidance_scale=1.5)
    record(run, "gone.png", "grid").unlink()
    record(run, "one.npz", num_samples=5, guidance_scale=1.5)
    record(run, "two.npz", num_samples=5, guidance_scale=2.0)
    write_results(run / "metrics.json", **{"a/one.npz": 12.5})
    page = Page(render_report([run]))
    text = " ".join(page.text)
    assert "grid after step 40, guidance 1.5, 250 steps, seed 5" in text
    assert [i["alt"] for i in page.all("img")][-1].startswith("grid after step 40, guidance 1.5")
    assert "one.npz after step 40, guidance 1.5" in text
    assert "two.npz after step 40, guidance 2.0" in text
    assert "12.5" in text
    assert "Note: too few" in text
    assert "fid of a" not in text  # one measured set is no sweep
    write_results(run / "metrics.json", **{"a/one.npz": 12.5, "two.npz": 3.5})
    assert "fid of a" in Page(render_report([run])).text
    (read,) = read_run_folders([run])
    assert [result.path.name for result in read.results] == ["one.npz", "two.npz"]
    record(run, "three.npz", num_samples=5, guidance_scale=2.0, num_inference_steps=50)
    write_results(tmp_path / "elsewhere.json", **{"a/one.npz": 1.0})
    write_results(run / "more.json", **{"a/three.npz": 30.25})
    text = render_report([run])
    assert "guidance_scale</" in text  # the axes of the surface
    assert "num_inference_steps</" in text
    assert "30.25" in text


def test_an_output_that_cannot_be_recorded_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (run / "checkpoints" / "step-00000040" / "transformer").mkdir()
    (run / "outputs.jsonl").mkdir()
    record(run, "one.npz")
    assert "one.npz is not recorded in" in capsys.readouterr().err
    (run / "outputs.jsonl").rmdir()
    (run / "outputs.jsonl").write_text('[1]\n{"path": 3}\n')
    assert "outputs.jsonl: line 2 cannot be read" in Page(render_report([run])).text


def test_heads_are_numbered_as_in_the_layer(tmp_path):
    run = make_run(tmp_path / "a")
    assert read_run_folders([run])[0].first_heads == {}
    config = run / "checkpoints" / "step-00000040" / "transformer" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"num_shared_heads": [None, 3]}))
    assert read_run_folders([run])[0].first_heads == {"0": 0, "1": 3}
    chart = head_load_chart("layer 1", [10, 20], np.ones((2, 4)), 0.1, first_head=3)
    labels = [text for text in Page(chart).text if text.isdigit()]
    assert labels[-4:] == ["3", "4", "5", "6"]


def test_pauses_restarts_and_held_out_loss_are_shown(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(dict(step=40, held_out_loss=0.5, paused_seconds=7.2)) + "\n")
    with (run / "environment.jsonl").open("a") as starts:
        starts.write(json.dumps({"start_step": 20}) + "\n")
    text = " ".join(Page(render_report([run])).text)
    assert "a: 1 pause, 7 s, resumed 1 time" in text
    assert "dashed on held-out images" in text
    only = make_run(tmp_path / "b", steps=1)
    (only / "samples" / "step-00000020.png").unlink()
    page = Page(render_report([only]))
    assert not page.all("input")  # no slider for a single grid
    assert not page.all("script")


def test_the_report_loads_no_other_files(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    for tag, attributes in Page(render_report(runs)).elements:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name])
        assert tag != "script" or not attributes


def test_runs_side_by_side_show_where_they_differ(tmp_path):
    folders = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run", seed=3)]
    runs = read_run_folders(folders)
    assert [run.name for run in runs] == ["x/run", "y/run"]
    assert setting_differences(runs) == [("seed", ["0", "3"])]
    assert [(row["run"], row["step"]) for row in metric_rows(runs)] == [
        ("x/run", "20"), ("x/run", "40"), ("y/run", "20"), ("y/run", "40")
    ]  # fmt: skip
    page = Page(render_report(folders))
    assert len([div for div in page.all("figure") if "data-run" in div]) == 2


def test_pictures_of_equal_settings_stand_side_by_side(tmp_path):
    folders = [make_run(tmp_path / name) for name in "ab"]
    for folder, seeds in zip(folders, [(1, 0), (0, 2)], strict=True):
        (folder / "checkpoints" / "step-00000040" / "transformer").mkdir()
        for seed in seeds:
            record(folder, f"{seed}.png", "grid", seed=seed)
    page = Page(render_report(folders))
    rows = [text for text in page.text if text.startswith("grid, ")]
    assert [row[-6:] for row in rows] == ["seed 0", "seed 1", "seed 2"]
    cells = page.text[page.text.index(rows[0]) : page.text.index(rows[2]) + 3]
    a, b = "a, step 40", "b, step 40"
    assert cells == [rows[0], a, b, rows[1], a, "b: none", rows[2], "a: none", b]


def test_a_single_run_is_compared_with_the_defaults(tmp_path):
    (run,) = read_run_folders([make_run(tmp_path / "a", ema_decays=[0.5, 0.9])])
    assert setting_differences([run]) == [
        ("model.hidden_size", ["32", "none"]),
        ("model.depth", ["2", "none"]),
        ("model.num_heads", ["4", "none"]),
        ("num_steps", ["40", "400000"]),
        ("ema_decays", ["0.5, 0.9", "0.9999"]),
    ]
    # Each token activates two of four heads, so the balanced load is 0.5.
    assert np.allclose(relative_load(run)["1"], [[1, 1.5, 0, 1.5]] * 4)


def test_a_damaged_run_has_a_report_that_lists_missing_parts(tmp_path):
    torn = make_run(tmp_path / "torn")
    lines = (torn / "log.jsonl").read_text().splitlines()
    (torn / "log.jsonl").write_text("\n".join([*lines[:4], lines[4][:30]]))
    samples = sorted((torn / "samples").iterdir())
    samples[1].write_bytes(samples[1].read_bytes()[:40])
    (torn / "evaluations" / "step-00000040.json").write_text('{"step": 40')
    (torn / "config.yaml").write_text("num_steps: 50\nan_old_setting: 1\n")
    page = Page(render_report([torn]))
    missing = " ".join(page.text)
    assert "log.jsonl: line 5 is incomplete; it is left out" in missing
    assert "samples/step-00000040.png (cannot be read)" in missing
    assert "evaluations/step-00000040.json (cannot be read)" in missing
    assert "an_old_setting" in missing
    assert "The run has not finished: step 40 of 50." in missing
    assert [image["data-step"] for image in page.all("img")] == ["20"]


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "environment.jsonl", "samples"])
def test_any_part_alone_makes_a_report(tmp_path, name):
    whole = make_run(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (whole / name).rename(tmp_path / "part" / name)
    page = Page(render_report([tmp_path / "part"]))
    assert "Missing or damaged" in page.text
    both = Page(render_report([tmp_path / "part", make_run(tmp_path / "other")]))
    assert "part: There is no complete checkpoint yet." in " ".join(both.text)


def test_names_and_settings_are_escaped(tmp_path):
    folder = make_run(tmp_path / "<b>&run", init_from="<script>alert(1)</script>")
    page = Page(render_report([folder]))
    assert not page.all("b")
    assert len(page.all("script")) == 1
    assert "<script>alert(1)</script>" in page.text


def test_many_grids_are_thinned_evenly_with_the_last(tmp_path):
    folder = make_run(tmp_path / "a")
    for step in range(60, 241, 20):
        Image.new("RGB", (8, 8)).save(folder / "samples" / f"step-{step:08d}.png")
    page = Page(render_report([folder], max_grids=4))
    assert [int(image["data-step"]) for image in page.all("img")] == [20, 100, 160, 240]
    assert "8 of 12 sample grids are left out" in " ".join(page.text)


def test_large_pictures_shrink(tmp_path):
    folder = make_run(tmp_path / "a")
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(folder / "samples" / "step-00000040.png")
    assert (folder / "samples" / "step-00000040.png").stat().st_size > 200_000
    image = Page(render_report([folder])).all("img")[-1]
    assert image["src"].startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("300", "300")
    assert len(image["src"]) < 200_000


def test_lines_keep_their_mean_and_leave_out_what_is_not_finite():
    steps = np.arange(8_000)
    line = downsample(Series("#000000", steps, np.where(steps % 10, steps, np.nan)))
    assert len(line.steps) == MAX_POINTS
    assert np.allclose(line.steps, line.values)
    assert np.mean(line.values) == pytest.approx(steps[steps % 10 > 0].mean())
    assert line_chart("nothing", [Series("#000000", [1], [float("nan")])]) == ""


def test_the_command(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name)) for name in "ab"]
    output = tmp_path / "new" / "report.html"
    run_command("report", [*runs, "--output", str(output)])
    assert "wrote" in capsys.readouterr().out
    assert "a · b" in Page(output.read_text()).text
    with pytest.raises(SystemExit):
        run_command("report", [*runs, "--output", str(output)])
    assert "exists; give another name, or --replace" in capsys.readouterr().err
    run_command("report", [runs[0], "--output", str(output), "--replace"])
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    assert "a · b" not in Page(output.read_text()).text


def test_without_jinja2_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"pip install 'moh-dit\[report\]'"):
        render_report([make_run(tmp_path / "a")])


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (["nowhere"], {}, "nowhere does not exist"),
        (["empty"], {}, "empty is not a run folder"),
        (["a", "a"], {}, "a is given twice"),
        (["a"], dict(output="r.pdf"), "a report is an .html file"),
        (["a"], dict(max_grids=0), "max_grids is 0"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, runs, options, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        write_report(ReportConfig(**{"runs": runs, "output": "r.html", **options}))
    assert not (tmp_path / "r.html").exists()
