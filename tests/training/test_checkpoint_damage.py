"""Every kind of damage to every file of a run is found before anything is changed."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.checkpoint_files import DAMAGES, flip
from helpers.models import SMALL, randomized
from helpers.training_runs import assert_identical, tiny_config
from safetensors.torch import load_file, save_file

from moh_dit.checkpoints.opening import load_pipeline, load_pretrained
from moh_dit.checkpoints.runs import DATA_FILE, WEIGHTS, list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.common.manifest import MANIFEST, write_manifest
from moh_dit.training.checkpoint_checks import MODEL_FILE, OPTIMIZER_FILE, find_fault
from moh_dit.training.config import PosthocConfig
from moh_dit.training.posthoc_ema import reconstruct
from moh_dit.training.run_folder import move_aside_if_damaged
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

AVERAGES = [f"transformer/{WEIGHTS}", f"ema-0.5/{WEIGHTS}"]
TENSORS = [MODEL_FILE, OPTIMIZER_FILE, *AVERAGES]


@pytest.fixture
def checkpoint(finished_run, tmp_path):
    """Return the newest checkpoint of a copy of the finished run."""
    shutil.copytree(finished_run, tmp_path / "run")
    return list_checkpoints(tmp_path / "run")[-1]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*TENSORS, "transformer/config.json", MANIFEST])
def test_damage_is_found_before_resuming(file, damage, checkpoint):
    config = tiny_config(checkpoint.parents[1])
    assert find_fault(checkpoint, config) is None
    DAMAGES[damage](checkpoint / file)
    fault = find_fault(checkpoint, config)
    if file == MANIFEST and damage in ("missing", "renamed"):
        assert fault is None  # as in checkpoints of older versions
    else:
        assert str(checkpoint) in fault
        assert "\n" not in fault


def test_no_verify_resumes_from_a_changed_tensor(checkpoint):
    flip(checkpoint / OPTIMIZER_FILE)
    config = tiny_config(checkpoint.parents[1])
    assert find_fault(checkpoint, replace(config, no_verify=True)) is None
    assert "checksum" in find_fault(checkpoint, config)


def change_tensors(checkpoint, file, change):
    """Change the tensors of a file, and write a manifest that matches."""
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file(tensors, checkpoint / file, metadata={"format": "pt"})
    write_manifest(checkpoint)


def first_row(tensors, name):
    tensors[name] = tensors[name][:1].contiguous()


def swap_names(tensors, name):
    tensors[f"old.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_row, r"is \(1, 32\), expected \(96, 32\)"),
        (swap_names, "missing: .*unexpected: old"),
        (lambda tensors, name: tensors.pop(name), "missing: "),
        (lambda tensors, name: tensors.update({name: tensors[name].half()}), "contains F16"),
    ],
    ids=["shape", "renamed", "missing", "dtype"],
)
@pytest.mark.parametrize("file", TENSORS)
def test_tensors_that_do_not_fit_are_found_before_anything_is_changed(
    file, change, words, checkpoint
):
    name = "blocks.0.attn.qkv.weight"
    name = f"exp_avg.{name}" if file == OPTIMIZER_FILE else name
    change_tensors(checkpoint, file, lambda tensors: change(tensors, name))
    fault = find_fault(checkpoint, tiny_config(checkpoint.parents[1]))
    assert str(checkpoint / file) in fault
    assert re.search(words, fault)


def test_restoring_a_state_that_does_not_fit_changes_nothing(checkpoint):
    trainer = Trainer(tiny_config(checkpoint.parents[1], resume=True))
    models = [trainer.raw_model, *(average.model for average in trainer.averages)]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    change_tensors(checkpoint, MODEL_FILE, lambda tensors: tensors.update(
        {name: tensor + 1 for name, tensor in tensors.items()}))  # fmt: skip
    change_tensors(checkpoint, OPTIMIZER_FILE, lambda tensors: tensors.popitem())
    with pytest.raises(UserError, match=r"optimizer\.safetensors does not match the model"):
        trainer.state.restore(checkpoint)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_damaged_newest_checkpoint_is_moved_aside_and_named(checkpoint, finished_run, capsys):
    run = checkpoint.parents[1]
    flip(checkpoint / OPTIMIZER_FILE)
    trainer = Trainer(tiny_config(run, resume=True))
    assert trainer.start_step == 9
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    for words in (OPTIMIZER_FILE, "moved the checkpoint to damaged-step-00000012", "step-00000009"):
        assert words in line
    trainer.train()
    assert_identical(finished_run, run)
    assert (run / "checkpoints" / "damaged-step-00000012" / OPTIMIZER_FILE).exists()


def test_a_checkpoint_without_checksums_says_so(checkpoint, capsys):
    (checkpoint / MANIFEST).unlink()
    assert Trainer(tiny_config(checkpoint.parents[1], resume=True)).start_step == 12
    assert f"{checkpoint} has no {MANIFEST}" in capsys.readouterr().err


# ------------------------------------------------------------------------------ loading a run


@pytest.mark.parametrize("damage", ["flipped", "zeroed"])
@pytest.mark.parametrize(
    ("file", "weights"),
    [(MODEL_FILE, "raw"), (AVERAGES[0], "transformer"), (AVERAGES[1], "ema-0.5"),
     ("transformer/config.json", "raw")],
)  # fmt: skip
def test_sampling_refuses_damaged_weights(file, weights, damage, checkpoint):
    DAMAGES[damage](checkpoint / file)
    with pytest.raises(UserError, match="checksum") as error:
        load_pretrained(checkpoint, weights=weights)
    assert "--no_verify" in str(error.value)
    if file.endswith(WEIGHTS):
        load_pretrained(checkpoint, weights=weights, verify=False)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", [f"vae/{WEIGHTS}", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_damaged_parts_of_a_run_are_refused_and_written_again(file, damage, checkpoint, capsys):
    run = checkpoint.parents[1]
    DAMAGES[damage](run / file)
    with pytest.raises(UserError) as error:
        load_pipeline(run)
    assert "\n" not in str(error.value)
    folder = (run / file).parent
    identity = json.loads((run / DATA_FILE).read_text())
    move_aside_if_damaged(folder, identity["autoencoder"])
    assert not folder.exists()
    assert f"moved it to damaged-{folder.name}" in capsys.readouterr().out


def test_resuming_writes_damaged_parts_again(checkpoint):
    run = checkpoint.parents[1]
    files = [run / "vae" / WEIGHTS, run / "scheduler" / "scheduler_config.json"]
    before = [file.read_bytes() for file in files]
    for file in files:
        flip(file)
    Trainer(tiny_config(run, resume=True, num_steps=13)).train()
    assert [file.read_bytes() for file in files] == before


def test_another_autoencoder_without_checksums_is_found_by_its_hash(checkpoint):
    run = checkpoint.parents[1]
    (run / "vae" / MANIFEST).unlink()
    flip(run / "vae" / WEIGHTS)
    with pytest.raises(UserError, match=r"vae is damaged: .* hash in .*data\.json"):
        load_pipeline(run)
    load_pipeline(run, verify=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_snapshots_are_found(damage, tmp_path):
    for step in (1, 2):
        folder = tmp_path / "snapshots" / f"step-0000000{step}"
        randomized(SMALL).save_pretrained(folder / "ema-power-0.1")
        write_manifest(folder)
    settings = PosthocConfig(str(tmp_path), output=str(tmp_path / "average"))
    DAMAGES[damage](tmp_path / "snapshots" / "step-00000001" / "ema-power-0.1" / WEIGHTS)
    with pytest.raises(UserError, match="step-00000001"):
        reconstruct(settings)


def test_manifests_have_the_same_bytes_in_every_run(finished_run, checkpoint):
    text = (checkpoint / MANIFEST).read_text()
    assert set(json.loads(text)["files"]) == {*TENSORS, *(
        f"{folder}/config.json" for folder in ("transformer", "ema-0.5"))}  # fmt: skip
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    assert (checkpoint / MANIFEST).read_text() == text
