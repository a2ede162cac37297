"""Whole runs: resume after a kill, other numbers of processes, watchfulness, bad input."""

import importlib.metadata
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dit
from fid_eval import EvaluationError, extractors
from moh_dit.checkpoints import WEIGHTS, list_checkpoints, load_pipeline
from moh_dit.data.commands import Encoding
from moh_dit.data.encoding import encode_data
from moh_dit.data.latents import open_latents
from moh_dit.errors import UserError
from moh_dit.flops import flops_per_image
from moh_dit.training import loop, preview, state
from moh_dit.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moh_dit.training.loop import Trainer
from moh_dit.training.preemption import PREEMPTED, Preemption
from moh_dit.training.record import RunLog, read_log, shown
from moh_dit.training.setup import learning_rate_factor, weight_decay_groups
from moh_dit.training.watch import GradientWatch

ROOT = Path(__file__).parent.parent
MODEL = dict(hidden_size=32, depth=2, num_heads=4, num_shared_heads=[4, 1],
             num_active_routed_heads=[0, 2])  # fmt: skip
NUM_STEPS = 12


def tiny(run_dir, **options):
    options = dict(num_steps=NUM_STEPS, batch_size=8, checkpoint_every=3, log_every=2,
                   trackers=[]) | options  # fmt: skip
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(**(MODEL | options.pop("model", {}))),
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0),
        ema_decays=[0.9, 0.5],
        **options,
    )


def command(run_dir, *extra, processes=1):
    """The command line of ``tiny``."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={processes}"]  # fmt: skip
    model = [f"--model.{key}={value}" for key, value in MODEL.items()]
    return [*launcher, str(ROOT / "train_dit.py"), f"--run_dir={run_dir}", *model,
            f"--num_steps={NUM_STEPS}", "--batch_size=8", "--checkpoint_every=3", "--log_every=2",
            "--optimizer.learning_rate=1e-2", "--optimizer.max_grad_norm=1",
            "--ema_decays=[0.9, 0.5]", "--keep_checkpoints=3", "--trackers=[]", *extra]  # fmt: skip


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments, **options):
    return subprocess.run(
        command(*arguments, **options), env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the subprocesses: sums in the same order
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    Trainer(tiny(run_dir)).train()
    return run_dir


def assert_identical(a, b):
    """Weights, averages and optimizer of the last checkpoints, bit for bit."""
    last_a, last_b = list_checkpoints(a)[-1], list_checkpoints(b)[-1]
    assert last_a.name == last_b.name
    files = {p.relative_to(last_a) for p in last_a.rglob("*.safetensors")}
    assert len(files) == 4  # weights, optimizer, two averages
    for file in files:
        x, y = load_file(last_a / file), load_file(last_b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), file


def test_run_folder_explains_itself(whole):
    assert [p.name for p in list_checkpoints(whole)] == [f"step-{s:08d}" for s in (6, 9, 12)]
    entries = read_log(whole / "log.jsonl")
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["mse"] + entry["vlb"])
        assert 0 < entry["data_wait"] < 1
        assert "mfu" not in entry  # nobody knows the peak of a CPU
        assert sum(entry["head_load"]["1"]) == pytest.approx(2, abs=1e-4)  # Σf = k
    assert json.loads((whole / "classes.json").read_text()) == [str(i) for i in range(10)]
    start = json.loads((whole / "environment.jsonl").read_text())
    assert start["packages"]["torch"] == importlib.metadata.version("torch")
    assert (whole / "curves.png").stat().st_size > 5000
    pipeline = load_pipeline(whole)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([3], num_inference_steps=2).images[0].size == (32, 32)


def test_weights_to_sample_with_can_be_chosen(whole):
    states = [load_pipeline(whole, w).transformer.state_dict()
              for w in ("transformer", "ema-0.5", "raw")]  # fmt: skip
    key = "final_layer.linear.weight"
    assert not torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[1][key], states[2][key])
    with pytest.raises(UserError, match=r"it has ema-0\.5, transformer, raw"):
        load_pipeline(whole, "ema-0.7")


def test_killed_at_a_random_moment_and_resumed_is_identical(whole, tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run"), env=environment(), stderr=subprocess.DEVNULL
    )
    until = random.randrange(3, NUM_STEPS)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)[-1:] and
                                          read_log(log)[-1]["step"] >= until - 2):  # fmt: skip
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = run(tmp_path / "run", "--resume=true")
    assert finished.returncode == 0, finished.stderr
    assert_identical(whole, tmp_path / "run")
    steps = [entry["step"] for entry in read_log(log)]
    assert steps == sorted(set(steps))


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    Trainer(tiny(whole, resume=True)).train()
    assert "is done: step 12" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_sigterm_saves_and_asks_to_be_requeued(whole, tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run", "--log_every=1"), env=environment(), stderr=subprocess.DEVNULL
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == PREEMPTED
    stopped = int(list_checkpoints(tmp_path / "run")[-1].name[5:])
    assert 1 <= stopped < NUM_STEPS
    assert run(tmp_path / "run", "--resume=true", "--log_every=1").returncode == 0
    assert_identical(whole, tmp_path / "run")


def test_sigterm_to_all_processes_of_a_run_saves_and_ends_it(tmp_path):
    """As schedulers send it: to the workers that read latents, too."""
    encode_data(Encoding(output=str(tmp_path / "latents")))
    options = [f"--data.latents={tmp_path / 'latents'}", "--data.num_workers=2"]
    process = subprocess.Popen(
        command(tmp_path / "run", "--log_every=1", *options), env=environment(),
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == PREEMPTED
    assert 1 <= int(list_checkpoints(tmp_path / "run")[-1].name[5:]) < NUM_STEPS
    assert run(tmp_path / "run", "--resume=true", "--log_every=1", *options).returncode == 0
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{NUM_STEPS:08d}"


def test_sigterm_before_the_first_step_asks_to_be_requeued(tmp_path, monkeypatch):
    encode = loop.encode_training_data

    def told_meanwhile(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(loop, "encode_training_data", told_meanwhile)
    monkeypatch.setattr(Preemption, "_insist", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as end:
        Trainer(tiny(tmp_path / "run"))
    assert end.value.code == PREEMPTED
    assert not (tmp_path / "run").exists()


LOOKING = dict(
    evaluation=EvaluationConfig(
        sample_every=4, fid_every=4, num_samples=40, num_inference_steps=2,
        feature_extractor="digits", metrics=["fid"],
    ),
    log_every=3,
)  # fmt: skip


def test_sigterm_is_heard_where_a_process_waits_for_another(tmp_path):
    """For the first one's answer, in C, where the main thread hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        alone = environment() | {
            "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]),
        }  # fmt: skip
        process = subprocess.Popen(command(tmp_path / "run"), env=alone, stderr=subprocess.DEVNULL)
        silent.settimeout(60)
        with silent.accept()[0]:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == PREEMPTED
    assert not (tmp_path / "run").exists()


def test_the_callers_own_handler_is_back_after_a_run(tmp_path):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    signal.set_wakeup_fd(-1)
    try:
        Trainer(tiny(tmp_path / "run", num_steps=1)).train()
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def told_during(name, monkeypatch):
    """Have a SIGTERM come when the preview calls ``name``."""
    function = getattr(preview, name)

    def told(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(preview, name, told)


@pytest.mark.parametrize("name", ["sample_grid", "generate", "read_batches"])
def test_sigterm_while_looking_saves_and_the_look_is_made_up_for(
    name, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        told_during(name, patch)
        with pytest.raises(SystemExit) as end:
            Trainer(tiny(run, **LOOKING)).train()
    assert end.value.code == PREEMPTED
    assert list_checkpoints(run)[-1].name == "step-00000004"
    made = {str(path.relative_to(run)) for path in run.glob("*/step-00000004.*")}
    assert made == (set() if name == "sample_grid" else {"samples/step-00000004.png"})
    # What was not logged before is logged with the save.
    assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [3, 4]
    Trainer(tiny(run, resume=True, **LOOKING)).train()
    for step in (4, 8, 12):
        assert (run / "samples" / f"step-{step:08d}.png").exists()
        assert (run / "evaluations" / f"step-{step:08d}.json").exists()
    entries = read_log(run / "log.jsonl")
    assert [entry["step"] for entry in entries if "fd_digits" in entry] == [4, 8, 12]
    assert_identical(whole, run)


def look_until_told(name, run_dir):
    """In each of two processes, of which the second is told during the evaluation."""
    if os.environ["RANK"] == "1":
        told_during(name, pytest.MonkeyPatch())
    with pytest.raises(SystemExit) as end:
        Trainer(tiny(run_dir, **LOOKING)).train()
    (run_dir / f"code-{os.environ['RANK']}").write_text(str(end.value.code))


def fail_while_looking(run_dir):
    """In each of two processes, of which the second runs out of memory."""

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("not enough")

    if os.environ["RANK"] == "1":
        preview.generate = full
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(tiny(run_dir, **LOOKING)).train()


def test_a_process_that_fails_while_all_evaluate_ends_all(tmp_path):
    launch(fail_while_looking, tmp_path / "run", num_processes=2)


@pytest.mark.parametrize("name", ["generate", "read_batches"])
def test_a_process_that_is_told_while_all_evaluate_stops_all(name, tmp_path):
    launch(look_until_told, name, tmp_path / "run", num_processes=2)
    codes = [(tmp_path / "run" / f"code-{rank}").read_text() for rank in (0, 1)]
    assert codes == [str(PREEMPTED)] * 2
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000004"
    assert not (tmp_path / "run" / "evaluations").exists()


def test_the_last_grid_is_made_up_for_after_a_kill(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    grid = tmp_path / "run" / "samples" / f"step-{NUM_STEPS:08d}.png"
    expected = grid.read_bytes()
    grid.unlink()
    Trainer(tiny(tmp_path / "run", resume=True)).train()
    assert grid.read_bytes() == expected


def test_a_run_goes_on_with_its_data_wherever_they_lie_and_no_others(tmp_path):
    images(tmp_path / "data")

    def resumed(where, **options):
        data = DataConfig(source=str(tmp_path / where), num_workers=0)
        return Trainer(tiny(tmp_path / "run", data=data, resume=True, **options))

    resumed("data", num_steps=1).train()
    (tmp_path / "data").rename(tmp_path / "moved")
    resumed("moved", num_steps=2).train()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "moved" / "c0" / "new.png")
    count = len(list((tmp_path / "moved").rglob("*.png")))
    with pytest.raises(
        UserError, match=f"began with other data: {count - 1} images then, {count} images now"
    ):
        resumed("moved", num_steps=3)
    (tmp_path / "moved" / "c0" / "new.png").rename(tmp_path / "moved" / "c0" / "0.png")
    with pytest.raises(UserError, match=f"{count - 1} images, but not the same"):
        resumed("moved", num_steps=3)
    (tmp_path / "run" / "data.json").write_text("")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        resumed("moved", num_steps=3)


def test_weights_to_start_from_are_not_needed_to_go_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "given")
    start = dict(init_from=str(tmp_path / "given"), model=dict.fromkeys(MODEL))
    Trainer(tiny(tmp_path / "run", num_steps=1, **start)).train()
    shutil.rmtree(tmp_path / "given")
    trainer = Trainer(tiny(tmp_path / "run", num_steps=2, resume=True, **start))
    assert trainer.start_step == 1
    assert trainer.raw_model.config.hidden_size == MODEL["hidden_size"]


def test_a_start_that_was_killed_while_it_wrote_the_autoencoder_leaves_nothing_half(tmp_path):
    (tmp_path / "run" / ".writing-vae").mkdir(parents=True)
    (tmp_path / "run" / ".writing-vae" / "config.json").write_text("{")
    Trainer(tiny(tmp_path / "run", num_steps=1, resume=True)).train()
    assert load_pipeline(tmp_path / "run").vae.config.latent_channels
    assert not list((tmp_path / "run").glob(".writing-*"))


def test_a_checkpoint_without_weights_is_passed_over_each_time(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for _ in range(2):
        (list_checkpoints(tmp_path / "run")[-1] / "state" / "model.safetensors").unlink()
        Trainer(tiny(tmp_path / "run", resume=True)).train()
        assert_identical(whole, tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("damaged-*"))
    assert left == ["damaged-damaged-step-00000012", "damaged-step-00000012"]


def test_two_processes_compute_the_same_run_and_one_can_finish_it(whole, tmp_path):
    first = run(tmp_path / "run", "--num_steps=6", processes=2)
    assert first.returncode == 0, first.stderr
    # Both encoded their share, once; one process goes on from there.
    store = tmp_path / "run" / "latents"
    made = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(open_latents(store)) == 1797
    assert sorted(made) == ["index.json", "labels.npy", "moments-00000-of-00001.npy"]
    second = run(tmp_path / "run", "--resume=true")
    assert second.returncode == 0, second.stderr
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == made
    a, b = (read_log(d / "log.jsonl") for d in (whole, tmp_path / "run"))
    for key in ("mse", "vlb", "balance", "grad_norm"):
        # Sums are rounded in another order, and AdamW at 1e-2 lets that grow from step to step.
        assert [entry[key] for entry in b] == pytest.approx([entry[key] for entry in a], rel=1e-2)
        assert b[0][key] == pytest.approx(a[0][key], rel=1e-5)


def test_latents_of_other_images_are_not_trained_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    encode_data(Encoding(output=str(tmp_path / "run" / "latents"), flip=False))
    index = tmp_path / "run" / "latents" / "index.json"
    Trainer(tiny(tmp_path / "run", resume=True))
    index.write_text(index.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(UserError, match=r"digits has changed since .*latents was made"):
        Trainer(tiny(tmp_path / "run", resume=True))


def test_what_a_kill_left_half_written_or_half_deleted_goes_at_the_next_start(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".deleting-step-00000006")
    (checkpoints / ".writing-step-00000015" / "state").mkdir(parents=True)
    Trainer(tiny(tmp_path / "run", resume=True, num_steps=13, checkpoint_every=100)).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000009", "step-00000012", "step-00000013"
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for step, name in ((12, "state/optimizer.safetensors"), (9, "ema-0.5/" + WEIGHTS)):
        file = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / name
        file.write_bytes(file.read_bytes()[:-1])
    trainer = Trainer(tiny(tmp_path / "run", resume=True))
    assert trainer.start_step == 6
    assert "step-00000012/state/optimizer.safetensors is damaged" in capsys.readouterr().err
    trainer.train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "damaged-step-00000012")
    assert_identical(whole, tmp_path / "run")


def test_a_checkpoint_without_one_of_the_averages_is_passed_over(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012" / "ema-0.5")
    assert Trainer(tiny(tmp_path / "run", resume=True)).start_step == 9
    assert "step-00000012/ema-0.5/" in capsys.readouterr().err


def test_checkpoints_none_of_which_is_whole_are_left_alone(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint / "ema-0.5")
    with pytest.raises(UserError, match=r"none of the 3 checkpoints .* is whole: .*ema-0\.5"):
        Trainer(tiny(tmp_path / "run", resume=True))
    assert list_checkpoints(tmp_path / "run") == checkpoints


def test_a_disk_that_is_full_while_logging_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "write", full)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "run")[1:])
    with pytest.raises(SystemExit) as end:
        train_dit.main()
    assert end.value.code == 2
    assert "error: the disk is full" in capsys.readouterr().err


def test_weight_decay_follows_the_names(tmp_path):
    def groups(*patterns):
        options = OptimizerConfig(weight_decay=0.1)
        if patterns:
            options.no_weight_decay = list(patterns)
        model = [
            (name, torch.zeros(2)) for name in ("a.bias", "a.weight", "y.embedding_table.weight")
        ]
        decayed, exempt = weight_decay_groups(model, options)
        assert decayed["weight_decay"] == 0.1
        assert exempt["weight_decay"] == 0
        return [
            [name for name, p in model if any(p is q for q in group["params"])]
            for group in (decayed, exempt)
        ]

    assert groups() == [["a.weight"], ["a.bias", "y.embedding_table.weight"]]
    assert groups("*.bias", "a.w*") == [["y.embedding_table.weight"], ["a.bias", "a.weight"]]
    with pytest.raises(UserError, match=r"'\*\.wg\.\*', which no parameter matches"):
        groups("*.bias", "*.wg.*")


@pytest.mark.parametrize(
    ("name", "options", "expected"),  # the rate after 0, 5 and 9 of ten steps
    [
        ("cosine_with_restarts", {"num_cycles": 2}, [1, 1, 0.0955]),
        ("polynomial", {"power": 2.0}, [1, 0.25, 0.01]),
        ("piecewise_constant", {"step_rules": "1:5,0.1"}, [1, 0.1, 0.1]),
        ("linear", {}, [1, 0.5, 0.1]),
    ],
)
def test_learning_rates_are_diffusers_schedules(name, options, expected):
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig(lr_schedule=name, lr_schedule_options=options)
    factor = learning_rate_factor(config, 10, adamw)
    assert [factor(step) for step in (0, 5, 9)] == pytest.approx(expected, abs=1e-3)


def test_options_that_a_schedule_lacks_are_named(tmp_path):
    options = OptimizerConfig(lr_schedule="piecewise_constant")
    with pytest.raises(UserError, match="lr_schedule piecewise_constant with lr_schedule_options"):
        learning_rate_factor(options, 10, torch.optim.AdamW([torch.zeros(1)]))


def test_a_value_that_is_not_finite_is_caught_where_it_happens(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run"))
    loss, calls = trainer._loss, []

    def poisoned(*arguments):
        calls.append(1)
        value, parts = loss(*arguments)
        return value * (float("nan") if len(calls) == 5 else 1), parts

    monkeypatch.setattr(trainer, "_loss", poisoned)
    with pytest.raises(
        UserError,
        match=r"step 5: mse \S+, vlb \S+, balance \S+; gradient not finite in x_embedder.* "
        r"held back.*step-00000003",
    ):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.raw_model.parameters())


def test_the_module_where_it_begins_is_named(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"))
    with torch.no_grad():
        trainer.raw_model.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 1: .* first in blocks\.1\.mlp\.fc1\. "):
        trainer.train()


def name_the_module(run_dir):
    """In each of two processes: the second one's share of the batch makes infinities."""
    rank = os.environ["RANK"]
    trainer = Trainer(tiny(run_dir))
    if rank == "1":
        trainer.raw_model.blocks[1].mlp.register_forward_hook(lambda *a: a[-1] + float("inf"))
    with pytest.raises(UserError) as error:
        trainer.train()
    (run_dir / f"error-{rank}").write_text(str(error.value))


def test_a_module_of_another_process_is_named(tmp_path):
    launch(name_the_module, tmp_path / "run", num_processes=2)
    for rank in (0, 1):
        assert "first in blocks.1.mlp" in (tmp_path / "run" / f"error-{rank}").read_text()


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path, monkeypatch, capsys):
    trainer = Trainer(tiny(tmp_path / "run", num_steps=4, log_every=1, on_nonfinite="skip"))
    loss, calls, weights = trainer._loss, [], []

    def poisoned(*arguments):
        calls.append(1)
        weights.append(trainer.raw_model.final_layer.linear.weight.detach().clone())
        value, parts = loss(*arguments)
        return value * (float("inf") if len(calls) == 3 else 1), parts

    monkeypatch.setattr(trainer, "_loss", poisoned)
    trainer.train()
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert "skipped step 3" in capsys.readouterr().out
    # Averages of no step are left out; NaN would be no JSON.
    log = tmp_path / "run" / "log.jsonl"
    assert "NaN" not in log.read_text()
    entries = read_log(log)
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 0]
    assert ["loss" in entry and "head_load" in entry for entry in entries] == [1, 1, 0, 1]


def test_fp16_gradients_that_no_scale_makes_finite_are_reported():
    weight = torch.nn.Parameter(torch.zeros(2))
    watch = GradientWatch([("weight", weight)], None, None, ("mse",), loss_scaled=True)
    verdicts = []
    for step in range(1, 121):
        overflow = step != 60  # ordinary now and then
        weight.grad = torch.full((2,), float("inf") if overflow else 1.0)
        watch.before_update(step, torch.ones(1))
        verdicts.append(watch.verdict())
    heard = [step for step, verdict in enumerate(verdicts, 1) if verdict]
    assert heard == [50, 110]
    assert "gradient not finite in weight" in verdicts[49]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save, calls = state.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        save(tensors, path, **options)
        if len(calls) == 6:  # the second file of the second checkpoint
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    trainer = Trainer(tiny(tmp_path / "run"))
    with pytest.raises(UserError, match=r"No space left.*resume from .*step-00000003"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def images(folder, classes=2):
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(255, size=(40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"c{label}" / f"{i}.png")
    return folder


def test_an_image_folder_trains(tmp_path):
    config = tiny(tmp_path / "run", num_steps=2)
    config.data.source, config.data.horizontal_flip = str(images(tmp_path / "data")), True
    Trainer(config).train()
    assert load_pipeline(tmp_path / "run").label_ids(["c1"]) == [1]


def test_fine_tuning_starts_from_given_weights_with_a_fresh_label_table(whole, tmp_path, capsys):
    config = tiny(tmp_path / "run", init_from=str(whole))
    config.data.source = str(images(tmp_path / "data"))
    model = Trainer(config).raw_model
    expected = load_pipeline(whole).transformer
    torch.testing.assert_close(model.blocks[1].attn.wg.weight, expected.blocks[1].attn.wg.weight)
    assert model.y_embedder.embedding_table.weight.shape[0] == 3
    assert "label table starts afresh" in capsys.readouterr().out


@pytest.fixture
def bad_inputs(tmp_path):
    """Names used below → paths."""
    (tmp_path / "empty").mkdir()
    images(tmp_path / "hollow")
    for file in (tmp_path / "hollow" / "c1").iterdir():
        file.unlink()
    images(tmp_path / "torn")
    torn = tmp_path / "torn" / "c0" / "1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    images(tmp_path / "good", classes=3)
    torch.save({}, tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.source={}/missing", ["missing", "not exist"]),
        ("--data.source={}/empty", ["empty"]),
        ("--data.source={}/hollow", ["hollow/c1", "no images"]),
        ("--data.source={}/torn", ["torn/c0/1.png"]),
        ("--data.source={}/good --model.num_classes=2", ["3 classes", "num_classes is 2"]),
        ("--data.image_size=30", ["30", "divisible"]),
        ("--data.image_size=36", ["36", "patch_size 2", "multiple of 8"]),
        ("--model.num_shared_heads=[4]", ["num_shared_heads", "1 layers", "depth is 2"]),
        ("--model.num_active_routed_heads=[0,4]", ["layer 1", "leave 3"]),
        ("--model.num_shared_heads=[5,1]", ["layer 0", "num_shared_heads is 5"]),
        ("--model.preset=MoH-DiT-S/2-80", ["MoH-DiT-S/2-80", "MoH-DiT-S/2-90"]),
        ("--init_from={}/weights.pt", ["weights.pt", "no state dict"]),
        (
            "--init_from={whole} --model.hidden_size=64",
            ["does not match", "proj.bias is (32,), expected (64,)"],
        ),
        ("--run_dir={whole}", ["exists", "--resume"]),
        ("--run_dir={whole} --resume=true --seed=1", ["seed is 1, was 0"]),
        ("--run_dir={whole} --resume=true --model.hidden_size=64", ["model.hidden_size"]),
        ("--data.autoencoder={}/empty", ["empty", "config.json"]),
        ("--evaluation.num_inference_steps=2000", ["num_inference_steps", "2000"]),
        ("--model.depth=0", ["model.depth is 0"]),
        ("--model.patch_size=0", ["model.patch_size is 0"]),
        ("--seed=-1", ["seed is -1"]),
        ("--objective.min_snr_gamma=-5", ["min_snr_gamma is -5"]),
        ("--run_dir={}/weights.pt/run", ["weights.pt is no folder"]),
        ("--optimizer.learning_rate=-1", ["learning_rate is -1", "greater than 0"]),
        ("--optimizer.betas=[0.9,1.0]", ["betas", "[0, 1)"]),
        ("--evaluation.fid_every=3 --evaluation.feature_extractor_weights=none.pth", ["none.pth"]),
        ("--evaluation.fid_every=3 --evaluation.num_samples=1", ["num_samples is 1", "at least 4"]),
        ("--batch_size=9 --gradient_accumulation_steps=2", ["batch_size 9"]),
        ("--optimizer.learning_rat=1", ["optimizer.learning_rate?"]),
        ("--trackers=[nothing]", ["nothing"]),
        ("--trackers=[dvclive,tensorboard]", ["dvclive is not installed", "moh-dit[tracking]"]),
        ("--peak_tflops=0", ["peak_tflops is 0"]),
        ("--model.mlp_ratio=-1", ["mlp_ratio is -1"]),
        ("--data.num_workers=-1", ["num_workers is -1"]),
        ("--gradient_accumulation_steps=0", ["gradient_accumulation_steps is 0"]),
        ("--model.label_init_std=-1", ["label_init_std is -1"]),
        ("--model.num_classes=0", ["model.num_classes is 0; it must be at least 1"]),
        ("--balance_loss_weight=-0.1", ["balance_loss_weight is -0.1; it must be at least 0"]),
        ("--balance_loss_weight=.inf", ["balance_loss_weight is inf; it must be finite"]),
        ("--optimizer.learning_rate=.inf", ["learning_rate is inf; it must be finite"]),
        ("--evaluation.fid_every=3 --evaluation.metrics=[]", ["evaluation.metrics is empty"]),
        ("--evaluation.fid_every=-3", ["evaluation.fid_every is -3"]),
        ("--optimizer.max_grad_norm=0", ["max_grad_norm is 0", "greater than 0"]),
        ("--seed=18446744073709551616", ["seed is 18446744073709551616"]),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    arguments, words, bad_inputs, whole, monkeypatch, capsys
):
    before = sorted(p for p in (*bad_inputs.rglob("*"), *whole.rglob("*")))
    argv = command(bad_inputs / "run", *arguments.format(bad_inputs, whole=whole).split())[2:]
    monkeypatch.setattr(sys, "argv", ["train_dit.py", *argv])
    with pytest.raises(SystemExit) as stop:
        train_dit.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith("train_dit.py: error: ")
    assert not [line for line in message[:-1] if not line.startswith("checking")]  # progress
    for word in words:
        assert word in message[-1]
    assert sorted(p for p in (*bad_inputs.rglob("*"), *whole.rglob("*"))) == before


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig("v_prediction", learned_variance=False, min_snr_gamma=5.0),
        ObjectiveConfig("flow"),
    ],
)
def test_other_objectives_train_and_sample(objective, tmp_path):
    Trainer(tiny(tmp_path / "run", num_steps=2, objective=objective)).train()
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.transformer.config.out_channels == 4
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


def test_latents_on_disk_train_like_those_in_memory(whole, tmp_path):
    encode_data(Encoding(output=str(tmp_path / "latents")))
    config = tiny(tmp_path / "run")
    config.data.latents, config.data.num_workers = str(tmp_path / "latents"), 1
    Trainer(config).train()
    a, b = (read_log(d / "log.jsonl") for d in (whole, tmp_path / "run"))
    assert [entry["mse"] for entry in b] == pytest.approx([entry["mse"] for entry in a], rel=1e-3)


def test_weights_of_the_extractor_are_fetched_before_training(tmp_path, monkeypatch):
    def fetch(url, published):
        raise EvaluationError(f"cannot download {url}")

    monkeypatch.setattr(extractors, "hub_file", fetch)
    with pytest.raises(UserError, match=r"evaluation: cannot download .*inception"):
        Trainer(tiny(tmp_path / "run", evaluation=EvaluationConfig(fid_every=3)))
    assert not (tmp_path / "run").exists()


def test_evaluation_during_training_is_logged(tmp_path):
    evaluation = EvaluationConfig(
        fid_every=2, num_samples=40, num_inference_steps=2, feature_extractor="digits",
        metrics=["fid", "accuracy"],
    )  # fmt: skip
    Trainer(tiny(tmp_path / "run", num_steps=2, evaluation=evaluation)).train()
    (entry,) = [e for e in read_log(tmp_path / "run" / "log.jsonl") if "accuracy_digits" in e]
    assert entry["fd_digits"] > 0
    record = json.loads((tmp_path / "run" / "evaluations" / "step-00000002.json").read_text())
    assert record["metrics"]["fd_digits"] == entry["fd_digits"]
    assert record["samples"]["count"] == 40


def test_trackers_get_what_the_log_gets(tmp_path):
    assert TrainConfig().trackers == ["tensorboard"]
    Trainer(tiny(tmp_path / "run", num_steps=2, trackers=["tensorboard"])).train()
    (file,) = (tmp_path / "run" / "moh-dit").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    for key in ("loss", "balance", "grad_norm", "images_per_second"):
        (event,) = events.Scalars(key)
        assert event.step == 2
        assert event.value == pytest.approx(entry[key])


def test_routed_heads_that_no_token_chooses_are_named(tmp_path, capsys):
    trainer = Trainer(tiny(tmp_path / "run", num_steps=2))
    # Scores of layer 1's three routed heads: the last one always loses.
    attention = trainer.raw_model.routed_layers[1]
    with torch.no_grad():
        attention.wg.weight.zero_()
    trainer.config.optimizer.learning_rate = 0.0
    trainer.train()
    printed = capsys.readouterr().out
    assert "step 2: no token chose layer 1 routed head 2" in printed
    assert "routed head 0" not in printed


def test_a_disk_that_will_be_full_is_announced(whole, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    Trainer(tiny(tmp_path / "run", num_steps=1)).train()
    assert "warning: 0.0 GiB are free" in capsys.readouterr().err


def test_utilisation_is_logged_where_the_peak_is_known(tmp_path):
    Trainer(tiny(tmp_path / "run", num_steps=1, peak_tflops=0.5)).train()
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    flops = 3 * flops_per_image(load_pipeline(tmp_path / "run").transformer)
    assert entry["mfu"] == pytest.approx(entry["images_per_second"] * flops / 0.5e12)
    assert shown(entry)["MFU"].endswith("%")
    del entry["mfu"]
    assert "MFU" not in shown(entry)
