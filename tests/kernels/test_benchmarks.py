"""The benchmark scripts import; compare.py finds measurements that got worse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "compare.py"


def test_every_script_imports():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import {', '.join(names)}"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text(json.dumps(dict(environment={}, rows=rows)))
        return str(path)

    return write


def run(*paths):
    return subprocess.run([sys.executable, str(SCRIPT), *paths], capture_output=True, text=True)


def test_names_what_got_slower_and_nothing_else(write):
    before = write("a.json", [dict(model="A", ms=10.0, images_per_s=100.0),
                              dict(model="B", ms=10.0, images_per_s=100.0)])  # fmt: skip
    after = write("b.json", [dict(model="A", ms=12.5, images_per_s=80.0),
                             dict(model="B", ms=9.0, images_per_s=111.0)])  # fmt: skip
    result = run(before, after)
    assert result.returncode == 1
    assert "A: ms 10 → 12.5 (+25.0%)" in result.stdout
    assert "A: images_per_s 100 → 80 (+25.0%)" in result.stdout
    assert "B:" not in result.stdout
    assert run(before, before).returncode == 0


def test_knows_a_row_by_its_settings_and_a_time_by_its_unit(write):
    rows = [dict(kernel="attend", config=[16, n], TMA=n == 1, ms=1.0) for n in (1, 2)]
    rows.append(
        {"plan": "12: 3+3", "N": 256, "gathered ms": 2.0, "no graph, ms": 3.0, "ratio": 1.0}
    )
    slower = [dict(rows[0], ms=float("nan")), dict(rows[1], ms=2.0)]
    slower.append(rows[2] | {"gathered ms": 4.0, "no graph, ms": 9.0, "ratio": 5.0})
    result = run(write("a.json", rows), write("b.json", slower))
    assert result.returncode == 1
    lines = result.stdout.splitlines()[2:]
    assert [line.split("(")[1] for line in lines] == ["+nan%)", "+200.0%)", "+100.0%)", "+100.0%)"]
    assert "attend, [16, 1], True: ms" in lines[0]


def test_two_rows_of_one_thing_are_refused(write):
    result = run(*[write("a.json", [dict(model="A", ms=10.0)] * 2)] * 2)
    assert result.returncode == 2
    assert "two rows of A" in result.stderr


def test_files_that_do_not_belong_together_are_refused(write, tmp_path):
    one = write("a.json", [dict(model="A", ms=10.0)])
    result = run(one, write("b.json", [dict(model="B", ms=10.0)]))
    assert result.returncode == 2
    assert "no row in common" in result.stderr
    broken = tmp_path / "c.json"
    broken.write_text("{")
    result = run(one, str(broken))
    assert result.returncode == 2
    assert "c.json is not a benchmark's JSON file" in result.stderr
    assert "Traceback" not in result.stderr
