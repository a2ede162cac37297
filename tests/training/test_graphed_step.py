"""A captured training step computes what the step without a graph computes."""

import pytest
import torch
from helpers.recorded_graphs import FailingGraphs, RecordedGraphs
from helpers.training_runs import NUM_STEPS, assert_identical, tiny_config

from moh_dit.common.errors import UserError
from moh_dit.training.config import EvaluationConfig
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def graphed_trainer(config, graphs):
    """Return a trainer whose step is captured by ``graphs``, as on a GPU."""
    trainer = Trainer(config)
    trainer.graphed_step.reason, trainer.graphed_step.capture = None, graphs.capture
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "balance_loss": "two_pass"},
        {"gradient_checkpointing": True, "ema_power_stds": [0.1]},
    ],
    ids=["plain", "two_pass", "checkpointing"],
)
def test_graphs_change_no_bit_of_a_run(tmp_path, settings):
    Trainer(tiny_config(tmp_path / "eager", **settings)).train()
    graphs = RecordedGraphs()
    # One run is interrupted in the middle: warm-up and capture happen twice, on trained weights.
    for num_steps in (NUM_STEPS // 2, NUM_STEPS):
        config = tiny_config(tmp_path / "graphed", **settings, resume=True, num_steps=num_steps)
        graphed_trainer(config, graphs).train()
    assert graphs.replays == NUM_STEPS
    assert_identical(
        tmp_path / "eager", tmp_path / "graphed", files=4 + len(settings.get("ema_power_stds", []))
    )


def test_evaluations_release_the_graph(tmp_path):
    evaluation = EvaluationConfig(sample_every=5, num_inference_steps=1)
    graphs = RecordedGraphs()
    trainer = graphed_trainer(tiny_config(tmp_path / "run", evaluation=evaluation), graphs)
    trainer.train()  # grids after steps 5, 10 and 12
    assert (graphs.captures, graphs.replays) == (3, NUM_STEPS)
    Trainer(tiny_config(tmp_path / "eager", evaluation=evaluation)).train()
    assert_identical(tmp_path / "eager", tmp_path / "run")


def test_a_bad_step_is_reported_with_its_own_inputs(tmp_path):
    messages = []
    for name, graphs in (("eager", None), ("graphed", RecordedGraphs())):
        config = tiny_config(tmp_path / name, batch_size=4)
        trainer = Trainer(config) if graphs is None else graphed_trainer(config, graphs)
        with torch.no_grad():  # the first step without an image of class 3 is good
            trainer.raw_model.y_embedder.embedding_table.weight[3] = float("nan")
        with pytest.raises(UserError, match="such an output: y_embedder") as error:
            trainer.train()
        messages.append(str(error.value).replace(name, ""))
    assert messages[0] == messages[1]
    assert not messages[0].startswith("step 1:")


def test_a_failed_capture_continues_without_a_graph(tmp_path):
    Trainer(tiny_config(tmp_path / "eager")).train()
    trainer = graphed_trainer(tiny_config(tmp_path / "run"), FailingGraphs())
    trainer.train()
    assert trainer.graphed_step.reason == "the capture failed (CUDA out of memory.)"
    assert_identical(tmp_path / "eager", tmp_path / "run")


def test_a_failed_capture_stops_the_run_if_graphs_are_required(tmp_path):
    trainer = graphed_trainer(tiny_config(tmp_path / "run"), FailingGraphs())
    trainer.graphed_step.required = True
    with pytest.raises(UserError, match=r"CUDA out of memory.*set cuda_graphs to false"):
        trainer.train()


def test_graphs_without_a_gpu_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="cuda_graphs is true, but there is no NVIDIA GPU"):
        Trainer(tiny_config(tmp_path / "run", cuda_graphs=True))
