"""The phases of the start-up add up, and compilation is separated from the first step."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.training_runs import tiny_config

from moh_dit.training import start_up
from moh_dit.training.config import EvaluationConfig
from moh_dit.training.start_up import StartUp
from moh_dit.training.train import train


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by an attribute; the process starts at 100."""
    clock = SimpleNamespace(now=105.0)
    process = SimpleNamespace(create_time=lambda: 100.0)
    monkeypatch.setattr(start_up, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(start_up, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def test_phases_add_up_and_nested_phases_are_counted_once(clock):
    times, lines = StartUp(), []
    times.begin("data")
    clock.now += 2
    times.begin("model")
    clock.now += 0.01
    times.begin("data")
    with times.first_step(lines.append):
        clock.now += 4
        with times.phase("data"):
            clock.now += 1
    assert lines == ["start-up 12.0 s: imports 5.0, data 3.0, model 0.0, first step 4.0"]
    with times.first_step(lines.append), times.phase("data"):
        clock.now += 10
    assert len(lines) == 1
    assert sum(times.seconds.values()) == pytest.approx(12.01)


def test_compiled_graphs_and_triton_kernels_are_counted_as_compilation(clock):
    times = StartUp()

    def backend(graph, inputs):
        clock.now += 3
        return graph.forward

    with times.first_step(lambda line: None):
        clock.now += 1
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        clock.now += 2  # of which the compiler of Triton reports half
        times._add_kernel(times=SimpleNamespace(total=1e6), cache_hit=False)
    assert times.seconds == {"imports": 5, "compile": 4, "first step": 2}


def test_a_run_prints_its_start_up_once(tmp_path, capsys):
    evaluation = EvaluationConfig(num_inference_steps=1)
    train(tiny_config(tmp_path / "run", num_steps=2, evaluation=evaluation))
    printed = capsys.readouterr().out
    number = r"\d+\.\d"
    names = ["imports", "data", "model", "first step"]
    line = f"^start-up {number} s: " + ", ".join(f"{name} {number}" for name in names) + "$"
    assert len(re.findall(line, printed, re.MULTILINE)) == 1
