"""`moh-dit watch` describes what a run folder contains."""

import json

import pytest

from moh_dit.analysis.config import WatchConfig
from moh_dit.analysis.watch import describe, watch
from moh_dit.common.errors import UserError

ENTRY = dict(step=20, time="2026-01-01T00:00:00+00:00", images=160, loss=0.5,
             images_per_second=16.0, mfu=0.4, peak_memory_gib=30.25)  # fmt: skip
STATUS = dict(activity="training", since="2026-01-01T00:00:00+00:00", step=22, num_steps=40)
START = 1767225600.0  # the times above


def test_a_line_has_the_values_of_the_run():
    log = [dict(step=10, held_out_loss=0.75), ENTRY]
    assert describe(log, STATUS, START + 5) == (
        "step 22 of 40 (55%), loss 0.5000, img/s 16, MFU 40.0%, GPU memory 30.2 GiB, "
        "held-out 0.7500 at 10, 9 s of training left, training"
    )
    assert describe(log, STATUS, START + 600).endswith("training, last entry 10 min ago")
    saving = STATUS | dict(activity="saving")
    assert describe(log, saving, START + 30).endswith("saving for 30 s")
    assert describe([], {}, START) == "no log entries"
    assert describe([], STATUS, None) == "step 22 of 40 (55%), training"


def test_it_ends_with_the_run(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text(json.dumps(ENTRY) + "\n")
    (tmp_path / "status.json").write_text(json.dumps(STATUS | dict(activity="finished", step=40)))
    watch(WatchConfig(run=str(tmp_path)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 40 of 40 (100%), loss 0.5000")
    assert line.endswith("finished")
    (tmp_path / "status.json").write_text("[")
    watch(WatchConfig(run=str(tmp_path)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 20, loss 0.5000")
    assert line.endswith("status.json is missing or damaged, so it cannot be followed)")
    with pytest.raises(UserError, match="does not exist"):
        watch(WatchConfig(run=str(tmp_path / "none")))
