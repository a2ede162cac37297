"""The held-out loss: its value, the split, resuming, several processes, bad input."""

import copy
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.processes import launch
from helpers.training_runs import tiny_config, write_images

from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.latents import LatentMoments
from moh_dit.diffusion.objectives import FlowObjective, NoiseObjective
from moh_dit.training import evaluation, held_out, training_data
from moh_dit.training.config import DataConfig, EvaluationConfig
from moh_dit.training.held_out_split import split_images, warn_of_overlap
from moh_dit.training.preemption import PREEMPTED
from moh_dit.training.run_log import read_log
from moh_dit.training.step_inputs import BatchPartition, MicroBatchSampler
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def held_out_config(run_dir, share=0.02, **options):
    given = options.pop("evaluation", {})
    evaluation = EvaluationConfig(
        held_out=share, held_out_images=32, num_inference_steps=1, **given
    )
    return tiny_config(run_dir, evaluation=evaluation, **options)


def losses(run_dir):
    """Return the entries with a held-out loss, by step."""
    entries = read_log(run_dir / "log.jsonl")
    return {entry["step"]: entry for entry in entries if "held_out_loss" in entry}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    encode_data(EncodeConfig(output=str(folder), horizontal_flip=False))
    return folder


@pytest.fixture(scope="module")
def held_out_run(one_thread, latents, tmp_path_factory):
    """Train four steps with held-out images, evaluated every two steps."""
    run_dir = tmp_path_factory.mktemp("held_out") / "run"
    data = DataConfig(latents=str(latents), num_workers=0)
    Trainer(
        held_out_config(run_dir, num_steps=4, data=data, evaluation={"held_out_every": 2})
    ).train()
    return run_dir


def resumed(run_dir, latents, **options):
    data = DataConfig(latents=str(latents), num_workers=0)
    options = dict(num_steps=4, evaluation={"held_out_every": 2}) | options
    return Trainer(held_out_config(run_dir, data=data, resume=True, **options))


def test_without_held_out_images_the_batches_are_those_of_version_0_1_0():
    sampler = MicroBatchSampler(10, BatchPartition(5), seed=3, flip=True)
    expected = []
    for epoch in range(2):
        generator = np.random.default_rng((3, 0, epoch))
        order, flips = generator.permutation(10), generator.integers(2, size=10, dtype=np.uint8)
        expected += list(zip(order.tolist(), flips.astype(bool).tolist(), strict=True))
    assert [pair for step in range(4) for pair in sampler.global_batch(step)] == expected
    assert [index for index, _ in expected[:5]] == [9, 6, 0, 2, 1]


def test_held_out_images_are_never_trained_on(tmp_path, monkeypatch):
    samplers = []
    load = training_data.load_micro_batches

    def load_and_keep(latents, sampler, *arguments):
        samplers.append(sampler)
        return load(latents, sampler, *arguments)

    monkeypatch.setattr(training_data, "load_micro_batches", load_and_keep)
    trainer = Trainer(held_out_config(tmp_path / "run", 0.3, num_steps=1))
    trainer.train()
    split, labels = trainer.data.split, trainer.data.labels
    assert sorted([*split.training, *split.held_out]) == list(range(len(labels)))
    shares = np.bincount(labels[split.held_out]) / np.bincount(labels)
    assert shares == pytest.approx(0.3, abs=0.01)
    (sampler,) = samplers
    epochs = len(labels) // 8 * 3
    seen = {index for step in range(epochs) for index, _ in sampler.global_batch(step)}
    assert seen == set(split.training.tolist())
    assert set(trainer.evaluator.held_out.held_out) <= set(split.held_out)
    assert set(trainer.evaluator.held_out.training) <= set(split.training)


def test_the_loss_equals_a_reference_in_float64(held_out_run, latents):
    trainer = resumed(held_out_run, latents)
    entry = losses(held_out_run)[4]
    measured = trainer.evaluator.held_out
    model = copy.deepcopy(trainer.averages[0].model).double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal_power = (1 - betas).cumprod(0)
    for name, images in (
        ("held_out_loss", measured.held_out),
        ("train_sample_loss", measured.training),
    ):
        by_time = [[] for _ in range(8)]
        for entry_number in range(256):  # 8 draws of 32 images
            draw, position = divmod(entry_number, 32)
            generator = np.random.default_rng((0, 4, entry_number))
            time_range = (position + draw) % 8
            time = int((time_range + generator.random()) / 8 * 1000)
            assert time // 125 == time_range
            posterior, noise = torch.from_numpy(
                generator.standard_normal((2, 1, 4, 8, 8), np.float32)
            ).double()
            moments, label = trainer.data.latents[(int(images[position]), False)]
            mean, log_variance = moments.double()[None].chunk(2, dim=1)
            clean = (
                mean + (log_variance / 2).exp() * posterior
            ) * trainer.vae.config.scaling_factor
            power = signal_power[time]
            noisy = power.sqrt() * clean + (1 - power).sqrt() * noise
            with torch.no_grad():
                output = model(noisy, torch.tensor([time]), torch.tensor([label])).sample
            by_time[time_range].append(float((output[:, :4] - noise).square().mean()))
        expected = [float(np.mean(each)) for each in by_time]
        assert entry[f"{name}_by_time"] == pytest.approx(expected, rel=1e-5)
        assert entry[name] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("objective", [NoiseObjective(), FlowObjective(0.5, 0.8)])
def test_times_at_quantiles_follow_the_times_in_training(objective):
    drawn = objective.draw_times(40_000, torch.Generator().manual_seed(0)).double()
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = drawn.quantile(quantiles).tolist()
    assert objective.times_at(quantiles).tolist() == pytest.approx(expected, rel=0.03)


def measure_again(run_dir, latents):
    resumed(run_dir, latents, num_steps=4).train()


def without_last_measurement(run, copied):
    shutil.copytree(run, copied)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 4 or "held_out_loss" not in line]
    (copied / "log.jsonl").write_text("".join(kept))
    assert 4 not in losses(copied)
    return copied


def test_the_number_is_the_same_for_two_processes_and_after_a_kill(held_out_run, latents, tmp_path):
    """A killed run lacks the last measurement; resuming repeats it."""
    expected = losses(held_out_run)[4]
    for processes in (1, 2):
        run = without_last_measurement(held_out_run, tmp_path / f"run-{processes}")
        launch(measure_again, run, latents, num_processes=processes)
        assert losses(run)[4] == expected


def test_a_resumed_run_measures_the_same(held_out_run, latents, tmp_path):
    run = tmp_path / "run"
    Trainer(
        held_out_config(
            run,
            num_steps=2,
            data=DataConfig(latents=str(latents), num_workers=0),
            evaluation={"held_out_every": 2},
        )
    ).train()
    resumed(run, latents).train()
    assert losses(run) == losses(held_out_run)
    assert sorted(losses(run)) == [2, 4]
    with pytest.raises(UserError, match="started with 39 held-out images, 60 held-out images now"):
        resumed(run, latents, share=0.033)
    with pytest.raises(UserError, match="started with 39 held-out images, no held-out images now"):
        resumed(run, latents, share=None)


def test_sigterm_during_a_measurement_saves_and_resuming_repeats_it(
    held_out_run, latents, tmp_path, monkeypatch
):
    run, run_in_units = tmp_path / "run", held_out.run_in_units

    def run_after_sigterm(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return run_in_units(*arguments)

    data = DataConfig(latents=str(latents), num_workers=0)
    options = dict(num_steps=4, data=data, evaluation={"held_out_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "run_in_units", run_after_sigterm)
        with pytest.raises(SystemExit) as end:
            Trainer(held_out_config(run, **options)).train()
    assert end.value.code == PREEMPTED
    assert losses(run) == {}
    resumed(run, latents).train()
    assert losses(run) == losses(held_out_run)


def test_separate_images_are_measured_and_duplicates_reported(tmp_path, capsys):
    source = write_images(tmp_path / "data")
    shutil.copytree(source, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "c1")
    duplicate = tmp_path / "other" / "c0" / "0.png"
    (tmp_path / "other" / "c0" / "1.png").write_bytes(duplicate.read_bytes() + b"changed")
    config = held_out_config(
        tmp_path / "run",
        str(tmp_path / "other"),
        num_steps=1,
        data=DataConfig(source=str(source), autoencoder="digits"),
    )
    Trainer(config).train()
    printed = capsys.readouterr().err
    assert "warning: 1 of 2 held-out images have the same content as training images" in printed
    assert "warning: no held-out images of class c1" in printed
    assert "warning: 2 held-out images are fewer than one batch (batch_size 8)" in printed
    entry = losses(tmp_path / "run")[1]
    assert len(entry["held_out_loss_by_time"]) == 8
    assert (tmp_path / "run" / "held_out" / "index.json").is_file()


def test_separate_images_of_other_classes_are_refused(tmp_path):
    source = write_images(tmp_path / "data")
    config = held_out_config(tmp_path / "run", str(source))
    with pytest.raises(UserError, match="has a class c0, which the training data do not have"):
        Trainer(config)


def test_lists_name_images_by_path_or_number(tmp_path):
    source = write_images(tmp_path / "data")
    images = training_data.open_images(str(source), 32, progress=False)
    listed = tmp_path / "list.txt"

    def held_out_images(text):
        listed.write_text(text)
        return split_images(str(listed), images.labels, 0, str(source), images).held_out.tolist()

    assert held_out_images(f"c0/1.png\n\n{source}/c1/0.png\n") == [1, 2]
    assert held_out_images("3\n") == [3]
    with pytest.raises(UserError, match=r"names no image; .* has 4"):
        held_out_images("\n")
    with pytest.raises(UserError, match=r"names all 4 images of .* none is left to train on"):
        held_out_images("0\n1\n2\n3\n")
    with pytest.raises(UserError, match=r"has 2 lines that name no image of .*'4'; write one"):
        held_out_images("4\nc9/0.png\n0\n")
    assert held_out_images("\ufeffc0/0.png\r\n") == [0]  # as Windows writes it
    with pytest.raises(UserError, match=r"'c0/0.png'; write one image per line, as a number from"):
        split_images(str(listed), images.labels, 0, "latents", None)  # they have no paths
    listed.write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"list\.txt cannot be read as text"):
        split_images(str(listed), images.labels, 0, str(source), images)


def test_a_list_without_a_class_and_duplicates_inside_one_set_are_reported(tmp_path, capsys):
    source = write_images(tmp_path / "data")
    shutil.copy(source / "c0" / "0.png", source / "c0" / "copy.png")
    (tmp_path / "list.txt").write_text("c0/copy.png\n")
    data = DataConfig(source=str(source), autoencoder="digits")
    Trainer(held_out_config(tmp_path / "run", str(tmp_path / "list.txt"), data=data))
    printed = capsys.readouterr().err
    assert "warning: no held-out images of class c1" in printed
    assert "warning: 1 held-out images are fewer than one batch (batch_size 8)" in printed
    assert "warning: 1 of 1 held-out images have the same content as training images" in printed


def test_equal_latents_are_reported(tmp_path, capsys):
    """Latents have no files, so their moments are compared."""
    moments = torch.randn(1, 3, 8, 8, 8)
    moments[0, 2] = moments[0, 0]
    latents = LatentMoments(moments, np.array([0, 0, 0]), ["c0"])
    warn_of_overlap(latents, [2], latents, [0, 1])
    assert "warning: 1 of 1 held-out images have the same content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "a share must lie between 0 and 1"),
        ("nowhere", "nowhere does not exist; give a share"),
    ],
)
def test_wrong_settings_are_reported(value, message, tmp_path):
    config = held_out_config(tmp_path / "run", value)

    def check():
        config.check_paths()
        config.check(1)

    with pytest.raises(UserError, match=f"evaluation.held_out.*{message}"):
        check()


def test_a_share_leaves_single_images_in_training(tmp_path):
    labels = np.array([0, 1, 1, 1, 2])
    split = split_images(0.1, labels, 0, "data", None)
    assert labels[split.held_out].tolist() == [1]
    with pytest.raises(UserError, match="takes none, as classes are too small"):
        split_images(0.5, np.array([0, 1]), 0, "data", None)


def test_measurements_follow_the_cadence_of_the_other_outputs(tmp_path):
    given = {"held_out_every": 0, "sample_every": 2}
    evaluator = Trainer(held_out_config(tmp_path / "run", evaluation=given)).evaluator
    assert [evaluator.due(step, step == 5).held_out_loss for step in (1, 2, 3, 4, 5)] == [
        False, True, False, True, True,
    ]  # fmt: skip
    assert evaluation.LOSS_KEY in evaluator.held_out.samples
