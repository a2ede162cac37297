"""Train small runs: contents of the run folder, settings, bad input, metrics during training."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from helpers.training_runs import command, tiny_config, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dit
from fid_eval import EvaluationError
from fid_eval.networks import weight_files
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.model.flops import flops_per_image
from moh_dit.training.config import EvaluationConfig, ObjectiveConfig, OptimizerConfig
from moh_dit.training.progress import RunProgress
from moh_dit.training.run_log import progress_postfix, read_log
from moh_dit.training.setup import learning_rate_factor, weight_decay_groups
from moh_dit.training.trainer import Trainer
from moh_dit.training.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_run_folder_contains_everything(finished_run):
    assert [p.name for p in list_checkpoints(finished_run)] == [f"step-{s:08d}" for s in (6, 9, 12)]
    entries = read_log(finished_run / "log.jsonl")
    # Every second step, and every checkpoint at steps 3, 6, 9 and 12.
    assert [entry["step"] for entry in entries] == [2, 3, 4, 6, 8, 9, 10, 12]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["mse"] + entry["vlb"])
        assert 0 < entry["data_wait"] < 1
        assert "mfu" not in entry  # the peak of a CPU is unknown
        assert sum(entry["head_load"]["1"]) == pytest.approx(2, abs=1e-4)  # Σf = k
    assert json.loads((finished_run / "classes.json").read_text()) == [str(i) for i in range(10)]
    start = json.loads((finished_run / "environment.jsonl").read_text())
    assert start["packages"]["torch"] == importlib.metadata.version("torch")
    assert (finished_run / "curves.png").stat().st_size > 5000
    pipeline = load_pipeline(finished_run)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([3], num_inference_steps=2).images[0].size == (32, 32)


def test_all_saved_weights_can_be_sampled(finished_run):
    states = [load_pipeline(finished_run, w).transformer.state_dict()
              for w in ("transformer", "ema-0.5", "raw")]  # fmt: skip
    key = "final_layer.linear.weight"
    assert not torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[1][key], states[2][key])
    with pytest.raises(UserError, match=r"choose one of ema-0\.5, transformer, raw"):
        load_pipeline(finished_run, "ema-0.7")


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
    with pytest.raises(UserError, match=r"'\*\.wg\.\*', which matches no parameter"):
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


def test_wrong_options_of_a_schedule_are_reported(tmp_path):
    options = OptimizerConfig(lr_schedule="piecewise_constant")
    with pytest.raises(UserError, match="lr_schedule piecewise_constant does not accept"):
        learning_rate_factor(options, 10, torch.optim.AdamW([torch.zeros(1)]))


def test_an_image_folder_trains(tmp_path):
    config = tiny_config(tmp_path / "run", num_steps=2)
    config.data.source, config.data.autoencoder = str(write_images(tmp_path / "data")), "digits"
    config.data.horizontal_flip = True
    Trainer(config).train()
    assert load_pipeline(tmp_path / "run").label_ids(["c1"]) == [1]


def test_fine_tuning_loads_all_weights_but_the_label_table(finished_run, tmp_path, capsys):
    config = tiny_config(tmp_path / "run", init_from=str(finished_run))
    config.data.source, config.data.autoencoder = str(write_images(tmp_path / "data")), "digits"
    model = Trainer(config).raw_model
    expected = load_pipeline(finished_run).transformer
    torch.testing.assert_close(model.blocks[1].attn.wg.weight, expected.blocks[1].attn.wg.weight)
    assert model.y_embedder.embedding_table.weight.shape[0] == 3
    assert "label embeddings are newly initialised" in capsys.readouterr().out


@pytest.fixture
def bad_inputs(tmp_path):
    """Create bad inputs; return the folder that contains them."""
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "torn")
    torn = tmp_path / "torn" / "c0" / "1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    write_images(tmp_path / "good", classes=3)
    torch.save({}, tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.source={}/missing", ["missing", "not exist"]),
        ("--data.autoencoder=digits --data.source={}/empty", ["empty"]),
        ("--data.autoencoder=digits --data.source={}/torn", ["torn: c0/1.png"]),
        (
            "--data.autoencoder=digits --data.source={}/good --model.num_classes=2",
            ["3 classes", "num_classes is 2"],
        ),
        ("--data.source={}/good", ["no autoencoder is given", "--data.autoencoder"]),
        ("--data.latents={}/missing", ["data.latents", "missing does not exist"]),
        ("--init_from={}/missing", ["missing does not exist"]),
        ("--evaluation.fid_every=3 --evaluation.reference={}/none.npz", ["none.npz does not"]),
        ("--data.image_size=30", ["30", "divisible"]),
        ("--data.image_size=36", ["36", "patch_size 2", "multiple of 8"]),
        ("--model.num_shared_heads=[4]", ["num_shared_heads", "1 layers", "depth is 2"]),
        ("--model.num_active_routed_heads=[0,4]", ["layer 1", "leave 3"]),
        ("--model.num_shared_heads=[5,1]", ["layer 0", "num_shared_heads is 5"]),
        ("--model.preset=MoH-DiT-S/2-80", ["MoH-DiT-S/2-80", "MoH-DiT-S/2-90"]),
        ("--init_from={}/weights.pt", ["weights.pt", "no state dict"]),
        (
            "--init_from={finished} --model.hidden_size=64",
            ["does not match", "proj.bias is (32,), expected (64,)"],
        ),
        ("--run_dir={finished}", ["exists", "--resume"]),
        ("--run_dir={finished} --resume=true --seed=1", ["seed is 1, was 0"]),
        ("--run_dir={finished} --resume=true --model.hidden_size=64", ["model.hidden_size"]),
        ("--data.autoencoder={}/empty", ["empty", "config.json"]),
        ("--evaluation.num_inference_steps=2000", ["num_inference_steps", "2000"]),
        ("--model.depth=0", ["model.depth is 0"]),
        ("--model.patch_size=0", ["model.patch_size is 0"]),
        ("--seed=-1", ["seed is -1"]),
        ("--objective.min_snr_gamma=-5", ["min_snr_gamma is -5"]),
        ("--run_dir={}/weights.pt/run", ["weights.pt is not a folder"]),
        ("--optimizer.learning_rate=-1", ["learning_rate is -1", "greater than 0"]),
        ("--optimizer.betas=[0.9,1.0]", ["betas", "[0, 1)"]),
        ("--evaluation.fid_every=3 --evaluation.feature_extractor_weights=none.pth", ["none.pth"]),
        ("--evaluation.fid_every=3 --evaluation.num_samples=1", ["num_samples is 1", "at least 4"]),
        ("--batch_size=9 --gradient_accumulation_steps=2", ["batch_size 9"]),
        ("--optimizer.learning_rat=1", ["did you mean optimizer.learning_rate?"]),
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
    arguments, words, bad_inputs, finished_run, monkeypatch, capsys
):
    before = sorted(p for p in (*bad_inputs.rglob("*"), *finished_run.rglob("*")))
    arguments = arguments.format(bad_inputs, finished=finished_run).split()
    argv = command(bad_inputs / "run", *arguments)[2:]
    monkeypatch.setattr(sys, "argv", ["train_dit.py", *argv])
    with pytest.raises(SystemExit) as stop:
        train_dit.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith("train_dit.py: error: ")
    # Besides the error there may be progress, and a line about the data.
    allowed = re.compile(r"checking|encoding|.* images, .* class")
    assert not [line for line in message[:-1] if not allowed.match(line)]
    for word in words:
        assert word in message[-1]
    assert sorted(p for p in (*bad_inputs.rglob("*"), *finished_run.rglob("*"))) == before


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig("v_prediction", learned_variance=False, min_snr_gamma=5.0),
        ObjectiveConfig("flow"),
    ],
)
def test_other_objectives_train_and_sample(objective, tmp_path):
    Trainer(tiny_config(tmp_path / "run", num_steps=2, objective=objective)).train()
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.transformer.config.out_channels == 4
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


@pytest.mark.parametrize("name", [None, "digits"])
def test_latents_name_their_autoencoder(name, tmp_path):
    encode_data(EncodeConfig(output=str(tmp_path / "latents")))
    config = tiny_config(tmp_path / "run", num_steps=1)
    config.data.latents, config.data.autoencoder = str(tmp_path / "latents"), name
    assert Trainer(config).config.data.autoencoder == "digits"
    assert config.data.autoencoder == name


def test_paths_are_checked_without_torch(tmp_path):
    code = """
import sys
from moh_dit.common.errors import UserError
from moh_dit.training.config import TrainConfig
config = TrainConfig(run_dir=sys.argv[1], init_from="owner/name")
config.check_paths()
config.data.source = "missing"
try:
    config.check_paths()
except UserError as error:
    print(error, "torch" in sys.modules)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "missing does not exist" in printed
    assert printed.endswith("False\n")


def test_latents_on_disk_and_in_memory_give_the_same_run(finished_run, tmp_path):
    encode_data(EncodeConfig(output=str(tmp_path / "latents")))
    config = tiny_config(tmp_path / "run")
    config.data.latents, config.data.num_workers = str(tmp_path / "latents"), 1
    Trainer(config).train()
    a, b = (read_log(d / "log.jsonl") for d in (finished_run, tmp_path / "run"))
    assert [entry["mse"] for entry in b] == pytest.approx([entry["mse"] for entry in a], rel=1e-3)


def test_extractor_weights_are_downloaded_before_training(tmp_path, monkeypatch):
    def fetch(url, published):
        raise EvaluationError(f"cannot download {url}")

    monkeypatch.setattr(weight_files, "hub_file", fetch)
    with pytest.raises(UserError, match=r"evaluation: cannot download .*inception"):
        Trainer(tiny_config(tmp_path / "run", evaluation=EvaluationConfig(fid_every=3)))
    assert not (tmp_path / "run").exists()


def test_evaluation_during_training_is_logged(tmp_path):
    evaluation = EvaluationConfig(
        fid_every=2, num_samples=40, num_inference_steps=2, feature_extractor="digits",
        metrics=["fid", "accuracy"],
    )  # fmt: skip
    Trainer(tiny_config(tmp_path / "run", num_steps=2, evaluation=evaluation)).train()
    (entry,) = [e for e in read_log(tmp_path / "run" / "log.jsonl") if "accuracy_digits" in e]
    assert entry["fd_digits"] > 0
    record = json.loads((tmp_path / "run" / "evaluations" / "step-00000002.json").read_text())
    assert record["metrics"]["fd_digits"] == entry["fd_digits"]
    assert record["samples"]["count"] == 40


def test_trackers_receive_the_values_of_the_log(tmp_path):
    Trainer(tiny_config(tmp_path / "run", num_steps=2, trackers=["tensorboard"])).train()
    (file,) = (tmp_path / "run" / "moh-dit").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    for key in ("loss", "balance", "grad_norm", "images_per_second"):
        (event,) = events.Scalars(key)
        assert event.step == 2
        assert event.value == pytest.approx(entry[key])
    assert events.Histograms("head_load/layer_1")[0].histogram_value.num == 3
    assert events.Images("samples")[0].step == 2


def test_the_status_names_the_activity(tmp_path):
    progress = RunProgress(Accelerator(cpu=True), tmp_path, 4, 5)

    def activity():
        return json.loads((tmp_path / "status.json").read_text())["activity"]

    with progress:
        with progress.doing("saving"):
            assert activity() == "saving"
            with progress.doing("capturing"):
                assert activity() == "capturing"
            assert activity() == "saving"
        assert activity() == "training"
        progress.update()
    assert activity() == "finished"
    with pytest.raises(ValueError, match="broken"), RunProgress(Accelerator(), tmp_path, 4, 5):
        raise ValueError("broken")
    assert activity() == "failed"


def test_the_status_before_training(tmp_path, monkeypatch):
    status, seen = tmp_path / "run" / "status.json", []
    encode = TrainingData.encode

    def observed(data, run_dir):
        seen.append(json.loads(status.read_text()))
        encode(data, run_dir)

    def failing(data, run_dir):
        raise UserError("broken")

    monkeypatch.setattr(TrainingData, "encode", failing)
    with pytest.raises(UserError, match="broken"):
        Trainer(tiny_config(tmp_path / "run", num_steps=1))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(TrainingData, "encode", observed)
    Trainer(tiny_config(tmp_path / "run", num_steps=1)).train()
    assert (seen[0]["activity"], seen[0]["step"]) == ("encoding images", 0)


def test_unused_routed_heads_are_reported(tmp_path, capsys):
    trainer = Trainer(tiny_config(tmp_path / "run", num_steps=2))
    # Equal scores for the three routed heads of layer 1, so the last one is never chosen.
    attention = trainer.raw_model.routed_layers[1]
    with torch.no_grad():
        attention.wg.weight.zero_()
    trainer.config.optimizer.learning_rate = 0.0
    trainer.train()
    printed = capsys.readouterr().out
    assert "step 2: no token chose layer 1 head 3" in printed
    assert "head 1" not in printed


def test_a_nearly_full_disk_is_reported(finished_run, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    Trainer(tiny_config(tmp_path / "run", num_steps=1)).train()
    assert "warning: the next checkpoint needs" in capsys.readouterr().err


def test_utilisation_is_logged_if_the_peak_is_known(tmp_path):
    Trainer(tiny_config(tmp_path / "run", num_steps=1, peak_tflops=0.5)).train()
    (entry,) = read_log(tmp_path / "run" / "log.jsonl")
    flops = 3 * flops_per_image(load_pipeline(tmp_path / "run").transformer)
    assert entry["mfu"] == pytest.approx(entry["images_per_second"] * flops / 0.5e12)
    assert progress_postfix(entry)["MFU"].endswith("%")
    del entry["mfu"]
    assert "MFU" not in progress_postfix(entry)
