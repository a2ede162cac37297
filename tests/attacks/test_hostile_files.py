"""Files that could exhaust memory, run as formulas in a spreadsheet, or end in a traceback."""

import csv
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fid_eval.report import write_csv
from moh_dit.common.cli import load_config, run_program
from moh_dit.common.errors import UserError
from moh_dit.sampling.config import SampleConfig
from moh_dit.sampling.output_formats import write_folder
from moh_dit.training.config import TrainConfig
from moh_dit.training.run_log import RunLog, plot_curves, read_log

BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB.encode(), "has more than 100000 values once its aliases are expanded"),
        (b"a: &a [*a]", "has more than 100000 values"),
        (b"[" * 10_000, "is not valid YAML"),
        (bytes(range(256)), "cannot be read"),
        (b"a\x00b: 1", "is not valid YAML"),
        (b"- 1", "must contain settings"),
        (b"2024-99-99: 1", "is not valid YAML"),
    ],
)
def test_a_hostile_yaml_file_is_one_line(tmp_path, text, said):
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(UserError, match=rf"configuration .*c\.yaml {said}"):
        load_config(TrainConfig, tmp_path / "c.yaml")


def test_settings_that_fill_the_memory_are_refused(tmp_path):
    text = PngInfo()
    text.add(b"zTXt", b"settings\0\0" + zlib.compress(b" " * (1 << 24)))
    Image.new("RGB", (1, 1)).save(tmp_path / "large.png", pnginfo=text)
    with pytest.raises(UserError, match=r"large\.png is not a readable picture"):
        load_config(SampleConfig, tmp_path / "large.png")
    text = PngInfo()
    text.add_itxt("settings", BOMB)
    Image.new("RGB", (1, 1)).save(tmp_path / "bomb.png", pnginfo=text)
    with pytest.raises(UserError, match=r"bomb\.png has more than 100000 values"):
        load_config(SampleConfig, tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("number", "said"), [(2, "a file or folder is missing"), (30, "the file system is read-only")]
)
def test_a_file_error_during_a_program_is_one_line(tmp_path, capsys, number, said):
    def fail(config):
        raise OSError(number, "reason", "runs/log.jsonl")

    with pytest.raises(SystemExit) as end:
        run_program(
            fail, SampleConfig, prog="p", description="", example="",
            argv=["--checkpoint", str(tmp_path), "--output", str(tmp_path / "a.png")],
        )  # fmt: skip
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"p: error: {said} ([Errno {number}] reason: 'runs/log.jsonl'); ")
    assert error.count("\n") == 1
    assert "again with --resume" in error


def test_damaged_lines_of_a_log_are_skipped_and_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b'{"step": 1, "mse": 0.5}\n\xff\xfe\n[1]\n{"mse": 1}\n{"step": "2"}\n'
        b'{"step": 3, "mse": "text"}\n{"step": 4, "mse": 0.25}\n{"step": 5, "ms'
    )
    before = log.read_bytes()
    assert [entry["step"] for entry in read_log(log)] == [1, 3, 4]
    plot_curves(log, tmp_path / "curves.png")
    RunLog(log, 3).write({"step": 4})
    assert [entry["step"] for entry in read_log(log)] == [1, 3, 4]
    (kept,) = tmp_path.glob("damaged-*-log.jsonl")
    assert kept.read_bytes() == before
    RunLog(log, 3)
    assert list(tmp_path.glob("damaged-*-log.jsonl")) == [kept]


def test_names_in_csv_files_are_no_formulas(tmp_path):
    names = ["=1+1", "@x", "-2+3", "plain", "-"]
    images = np.zeros((5, 2, 2, 3), np.uint8)
    write_folder(tmp_path / "set", [images], np.arange(5), names)
    with (tmp_path / "set" / "labels.csv").open(newline="") as file:
        written = [row["class"] for row in csv.DictReader(file)]
    assert written == ["'=1+1", "'@x", "'-2+3", "plain", "-"]
    document = dict(
        versions=dict(fid_eval="1", torch="2"), reference={}, extractors={},
        sets=[dict(name="=1+1", metrics={"fid": -1.5}, samples=dict(count=3))],
    )  # fmt: skip
    write_csv(document, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["name"], row["fid"]) == ("'=1+1", "-1.5")
