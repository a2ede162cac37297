"""Checkpoints of other projects: equal outputs, exact conversion both ways, clear errors."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from helpers.checkpoint_files import diffusers_pipeline, flip, output, peer, same, truncate
from helpers.models import ROUTED, SMALL, randomized
from safetensors.torch import load_file, save_file

import moh_dit.common.hub
from moh_dit import load_pipeline, load_pretrained
from moh_dit.checkpoints.infer_config import infer_config
from moh_dit.checkpoints.opening import open_checkpoint
from moh_dit.checkpoints.runs import WEIGHTS
from moh_dit.checkpoints.state_dict_names import from_diffusers, to_diffusers, to_diffusers_config
from moh_dit.checkpoints.weight_files import open_weights, write_safetensors, write_torch
from moh_dit.common.errors import UserError
from moh_dit.model.architecture import describe_architecture, find_preset, full_config
from moh_dit.model.presets import PRESETS, build_model

HEADS = dict(num_heads=4)


def as_published(model):
    """Give a model of diffusers the timestep frequencies of the papers."""
    for module in model.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = 0
    return model


# ------------------------------------------------------------------------------- diffusers


def test_a_dit_of_diffusers_computes_the_same_here(tmp_path):
    model = peer()
    model.save_pretrained(tmp_path)
    with_its_frequencies = load_pretrained(tmp_path, timestep_freq_shift=1)
    assert torch.allclose(output(with_its_frequencies), output(model), atol=1e-5)
    published = load_pretrained(tmp_path)
    assert torch.allclose(output(published), output(as_published(model)), atol=1e-5)
    assert not torch.allclose(output(published), output(with_its_frequencies), atol=1e-3)


def test_a_dense_model_computes_the_same_in_diffusers(tmp_path):
    model = randomized(SMALL).eval()
    theirs = to_diffusers_config(dict(model.config))
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    state = model.state_dict()
    write_safetensors(tmp_path / WEIGHTS, to_diffusers(state, dict(model.config)))
    loaded, report = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.allclose(output(as_published(loaded.eval())), output(model), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dicts_convert_to_diffusers_and_back_exactly(dtype):
    model = randomized(SMALL).to(dtype)
    config, state = full_config(dict(model.config)), model.state_dict()
    theirs = to_diffusers(state, config)
    assert "pos_embed.pos_embed" not in theirs
    assert same(from_diffusers(theirs, config), state)


def test_positions_that_differ_from_those_of_diffusers_are_stored_or_refused():
    model = randomized(SMALL)
    config, state = full_config(dict(model.config)), model.state_dict()
    state["pos_embed"] = state["pos_embed"] + 1e-7  # as if computed by another library
    theirs = to_diffusers(state, config)
    assert same(from_diffusers(theirs, config), state)
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    with pytest.raises(UserError, match="pos_embed is not the 2-D sin-cos table"):
        to_diffusers(state, config)


def test_embedders_that_differ_between_blocks_are_refused(tmp_path):
    model = peer()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="differs between block 0 and block 2"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(activation_fn="geglu"), "activation_fn is 'geglu'"),
        (dict(attention_bias=False), "attention_bias"),
        (dict(num_layers=4), "missing: transformer_blocks.3"),
        (dict(num_layers=2), "unexpected: transformer_blocks.2"),
        (dict(num_embeds_ada_norm=6), "embedding_table.weight is .6, 32., expected .7, 32."),
        (dict(_class_name="UNet2DModel"), "UNet2DModel, which is not a DiT"),
    ],
)
def test_an_unsupported_configuration_is_reported(change, words, tmp_path):
    peer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        load_pretrained(tmp_path)


def test_moh_does_not_convert_to_diffusers():
    with pytest.raises(UserError, match="no mixture-of-head layers"):
        to_diffusers_config(PRESETS["MoH-DiT-S/2-75"])


@pytest.mark.parametrize("kind", ["sharded", "pickle", "sharded pickle"])
def test_shards_and_old_pickles_open_too(kind, tmp_path):
    model = peer()
    options = dict(max_shard_size="40KB") if "sharded" in kind else {}
    model.save_pretrained(tmp_path, safe_serialization="pickle" not in kind, **options)
    assert len(list(tmp_path.glob("*.index.json"))) == ("sharded" in kind)
    reference = load_pretrained(tmp_path, timestep_freq_shift=1)
    assert torch.allclose(output(reference), output(model), atol=1e-5)


def test_a_whole_pipeline_of_diffusers_samples(tmp_path):
    pipeline = load_pipeline(diffusers_pipeline(tmp_path))
    assert pipeline.label_ids(["name 1, synonym 1", 4]) == [1, 4]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([2], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


# ------------------------------------------------------------------------- published .pt files


@pytest.mark.parametrize("zipped", [True, False])
def test_published_files_open_with_and_without_training_state(zipped, tmp_path):
    model, other = randomized(SMALL), randomized(SMALL | dict(label_init_std=1.0))
    raw = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    arguments = argparse.Namespace(lr=1e-4)  # DiT's training script stores its arguments
    stored = dict(ema=model.state_dict(), model=raw, opt={"step": 3}, args=arguments)
    file = tmp_path / "0400000.pt"
    torch.save(stored, file, _use_new_zipfile_serialization=zipped)
    assert same(load_pretrained(file, **HEADS).state_dict(), model.state_dict())
    loaded = load_pretrained(file, weights="raw", **HEADS)
    assert same(loaded.state_dict(), other.state_dict())
    torch.save(model.half().state_dict(), tmp_path / "bare.pt")
    bare = load_pretrained(tmp_path / "bare.pt", **HEADS)
    assert bare.dtype == torch.float16
    assert not bare.pos_embed.requires_grad
    assert same(bare.state_dict(), model.state_dict())


def test_written_files_open_in_torch_and_safetensors(tmp_path):
    state = {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "odd": torch.randn(7).half(),
        "transposed": torch.randn(4, 6).bfloat16().t(),
        "scalar": torch.tensor(2.5),
    }
    write_torch(tmp_path / "a.pt", state)
    for mmap in (True, False):
        assert same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap), state)
    write_safetensors(tmp_path / "a.safetensors", state)
    assert same(load_file(tmp_path / "a.safetensors"), state)
    modes = {(tmp_path / name).stat().st_mode for name in ("a.pt", "a.safetensors")}
    assert len(modes) == 1  # safetensors alone would make the file private
    for name in ("a.pt", "a.safetensors"):
        assert same(open_weights(tmp_path / name), state)


def test_a_full_disk_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"torch\.save"):
        write_torch(Path("/dev/full"), {"a": torch.randn(100_000)})


def test_a_loaded_model_can_be_saved_to_its_own_file(tmp_path):
    """Saving a model to its own file truncates that file before it is written."""
    model = randomized(SMALL)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load_pretrained(tmp_path / "a.pt", **HEADS)
    torch.save(loaded.state_dict(), tmp_path / "a.pt")
    again = load_pretrained(tmp_path / "a.pt", **HEADS)
    assert same(again.state_dict(), model.state_dict())


# ------------------------------------------------------------------------------- inferring


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognized_by_their_shapes(name):
    with torch.device("meta"):
        model = build_model(name, sample_size=64, num_classes=10)
    state = dict(model.named_parameters())
    config = full_config(infer_config(state, {}))
    assert config == full_config(dict(model.config))
    assert find_preset(config) == name
    assert describe_architecture(config) == f"{name}, latents 4×64×64, 10 classes"


def test_the_most_similar_preset_and_the_differences_are_reported(tmp_path):
    plan = dict(PRESETS["MoH-DiT-S/2-75"])
    plan["num_shared_heads"] = [2, 3, *plan["num_shared_heads"][2:]]
    with torch.device("meta"):
        model = build_model("MoH-DiT-S/2-75", **plan)
    state = dict(model.named_parameters())
    with pytest.raises(UserError) as error:
        infer_config(state, {})
    text = str(error.value)
    assert "the most similar preset, MoH-DiT-S/2-75," in text
    assert "layer 1: 3 shared and 3 routed heads" in text
    assert "2 shared and 4 routed heads" in text
    assert "layer 0" not in text
    given = {key: plan[key] for key in ("num_heads", "num_shared_heads")}
    active = plan["num_active_routed_heads"]
    config = infer_config(state, {**given, "num_active_routed_heads": active, "head_dim": 64})
    assert full_config(config) == full_config(dict(model.config))


def test_keys_and_shapes_that_differ_are_named(tmp_path):
    state = randomized(ROUTED).state_dict()
    for key in ("blocks.1.mlp.fc2.bias", "final_layer.linear.weight"):
        state.pop(key)
    state["blocks.0.attn.proj.weight"] = torch.zeros(32, 16)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: .*final_layer\.linear\.weight is missing"):
        load_pretrained(tmp_path / "a.pt")
    state["final_layer.linear.weight"] = torch.zeros(32, 32)
    torch.save(state, tmp_path / "a.pt")
    heads = {key: ROUTED[key] for key in ROUTED if "heads" in key}
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "a.pt", **heads)
    assert "missing: blocks.1.mlp.fc2.bias" in str(error.value)
    assert "blocks.0.attn.proj.weight is (32, 16), expected (32, 32)" in str(error.value)


def test_weights_without_a_pipeline_need_an_autoencoder_to_sample(tmp_path):
    save_file(randomized(SMALL).state_dict(), tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "config_less.safetensors")
    randomized(SMALL).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has no autoencoder"):
        load_pipeline(tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model", autoencoder="digits")
    assert pipeline.scheduler.config.variance_type == "learned_range"


# --------------------------------------------------------------------------------- damaged files


class Exploit:
    def __reduce__(self):
        return exec, ("open('exploited', 'w')",)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("a.pt", truncate, "truncated or damaged"),
        ("a.pt", flip, "match its checksum"),
        ("a.pt", lambda file: file.write_bytes(b""), "truncated or damaged"),
        ("a.pt", lambda file: file.write_bytes(b"<!DOCTYPE html>"), "was not written by torch"),
        ("a.pt", lambda file: torch.save({"ema": Exploit()}, file), "would run code .*exec"),
        ("a.pt", lambda file: torch.save([1, 2], file), "contains no state dict"),
        ("a.safetensors", truncate, "cannot be read as safetensors"),
        ("a.safetensors", lambda file: file.write_bytes(b"x" * 99), "read as safetensors"),
        ("a.pt", lambda file: file.rename(file.with_suffix(".txt")), "does not exist"),
    ],
)  # fmt: skip
def test_damaged_and_unsafe_files_are_reported(name, spoil, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = randomized(SMALL).state_dict()
    file = tmp_path / name
    (write_torch if file.suffix == ".pt" else write_safetensors)(file, state)
    spoil(file)
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(file, **HEADS)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert not (tmp_path / "exploited").exists()


# ------------------------------------------------------------------------------------------ hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Replace the hub: serve the files of a folder as the repository ``owner/name``."""
    folder, asked = tmp_path / "repository", []
    folder.mkdir()

    def snapshot_download(name, allow_patterns, **options):
        asked.append((name, tuple(allow_patterns), options))
        if name != "owner/name":
            raise OSError("404: no such repository")
        snapshot = tmp_path / "cache"
        for file in (file for pattern in allow_patterns for file in folder.rglob(pattern)):
            copy = snapshot / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        return str(snapshot)

    monkeypatch.setattr(moh_dit.common.hub, "snapshot_download", snapshot_download)
    return folder, asked


def test_hub_ids_and_folders_are_interchangeable(repository):
    folder, asked = repository
    peer().save_pretrained(folder)
    peer().save_pretrained(folder, safe_serialization=False)
    assert same(
        load_pretrained("owner/name").state_dict(), load_pretrained(folder / WEIGHTS).state_dict()
    )
    assert not [
        patterns for _, patterns, _ in asked if "*.bin" in patterns
    ]  # pickles only without safetensors


def test_a_repository_with_only_a_pickle(repository):
    folder, asked = repository
    model = randomized(SMALL)
    torch.save(model.state_dict(), folder / "MoH.pt")
    for source in ("owner/name", "owner/name/MoH.pt"):
        assert same(load_pretrained(source, **HEADS).state_dict(), model.state_dict())
    load_pretrained("owner/name", local_files_only=True, **HEADS)
    assert asked[-1][2] == {"local_files_only": True}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/missing", "owner/missing: there is no such path.*404.*local path, or go online"),
        ("owner/name/other.pt", "has no file other.pt"),
        ("runs/model.pt", "runs/model.pt does not exist"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist"),
    ],
)
def test_missing_sources_are_reported_in_one_line(source, words, repository):
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(source)
    assert "\n" not in str(error.value)


def test_offline_a_missing_id_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/name: there is no such path") as error:
        load_pretrained("owner/name")
    assert "\n" not in str(error.value)
