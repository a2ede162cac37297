"""Files of other projects, damaged or hostile: they open as meant, or end in one line.

``ATTACKS`` is the table of everything that is tried; docs/checkpoints.md tells what is promised.
"""

import json
import zipfile

import pytest
import torch
from helpers.checkpoint_files import peer, same
from helpers.models import SMALL, randomized, tiny_vae
from safetensors.torch import save_file

from moh_dit import load_pipeline, load_pretrained
from moh_dit.autoencoder import load_autoencoder
from moh_dit.checkpoints.infer_config import LABEL_TABLE
from moh_dit.checkpoints.opening import open_checkpoint
from moh_dit.checkpoints.runs import WEIGHTS
from moh_dit.common.errors import UserError
from moh_dit.training.setup import load_initial_weights

HEADS = dict(num_heads=4)


@pytest.fixture
def model():
    return randomized(SMALL)


# ------------------------------------------------------------------- names that wrappers change


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
        lambda name: name.replace(".0.attn.", ".0._fsdp_wrapped_module.attn._orig_mod."),
        lambda name: f"model.{name}",
        lambda name: f"model.module.{name}",
        lambda name: f"model._orig_mod.{name}",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_are_removed_anywhere(wrap, suffix, model, tmp_path):
    state = {wrap(name): tensor for name, tensor in model.state_dict().items()}
    file = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state, file)
    assert same(load_pretrained(file, **HEADS).state_dict(), model.state_dict())


def test_a_checkpoint_of_lightning_with_other_modules_and_an_average(model, tmp_path):
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    average["pos_embed"] = model.pos_embed
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema_model.{name}": tensor for name, tensor in average.items()}
    state |= {"vae.encoder.weight": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    opened = load_pretrained(tmp_path / "last.ckpt", **HEADS)
    assert same(opened.state_dict(), average)
    opened = load_pretrained(tmp_path / "last.ckpt", weights="raw", **HEADS)
    assert same(opened.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema"])
def test_averages_beside_the_weights_are_taken(name, model, tmp_path):
    raw = {key: tensor * 2 for key, tensor in model.state_dict().items()}
    torch.save({"model": raw, name: model.state_dict()}, tmp_path / "a.pt")
    assert same(load_pretrained(tmp_path / "a.pt", **HEADS).state_dict(), model.state_dict())
    raw_model = load_pretrained(tmp_path / "a.pt", weights="raw", **HEADS)
    assert same(raw_model.state_dict(), raw)


def test_two_weights_of_one_name_are_refused(model, tmp_path):
    state = model.state_dict()
    torch.save(state | {"module.pos_embed": state["pos_embed"]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="several weights are named pos_embed"):
        load_pretrained(tmp_path / "a.pt", **HEADS)


# --------------------------------------------------------------------------- another image size


def test_the_position_table_is_computed_for_another_size(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    larger = randomized(SMALL | dict(sample_size=16))
    opened = load_pretrained(tmp_path / "a.pt", sample_size=16, **HEADS)
    assert torch.equal(opened.pos_embed, larger.pos_embed)
    assert torch.equal(opened.x_embedder.proj.weight, model.x_embedder.proj.weight)
    load_initial_weights(larger, open_checkpoint(tmp_path / "a.pt"))
    assert torch.equal(larger.pos_embed, opened.pos_embed)


def test_learned_positions_of_another_size_are_refused(model, tmp_path):
    state = model.state_dict() | {"pos_embed": torch.randn_like(model.pos_embed)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"pos_embed is \(1, 16, 32\), expected \(1, 64, 32\)"):
        load_pretrained(tmp_path / "a.pt", sample_size=16, **HEADS)


# ------------------------------------------------------------------------------- the null class


def test_a_table_without_a_null_class_opens_with_all_its_classes(model, tmp_path, capsys):
    state = model.state_dict()
    state[LABEL_TABLE] = state[LABEL_TABLE][:-1].clone()
    torch.save(state, tmp_path / "a.pt")
    opened = load_pretrained(tmp_path / "a.pt", num_classes=5, **HEADS)
    assert opened.config.num_classes == 5
    assert torch.equal(opened.state_dict()[LABEL_TABLE][:5], state[LABEL_TABLE])
    assert "none for the null class" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "a.pt", **HEADS).config.num_classes == 4
    assert "if it is a class, give model.num_classes 5" in capsys.readouterr().out


def test_one_row_for_one_class_needs_the_number_of_classes(model, tmp_path):
    state = model.state_dict()
    state[LABEL_TABLE] = state[LABEL_TABLE][:1].clone()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"one row, .* give model\.num_classes 1"):
        load_pretrained(tmp_path / "a.pt", **HEADS)
    assert load_pretrained(tmp_path / "a.pt", num_classes=1, **HEADS).config.num_classes == 1


def test_a_table_of_1000_rows_has_1000_classes(tmp_path):
    state = randomized(SMALL | dict(num_classes=999)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert load_pretrained(tmp_path / "a.pt", **HEADS).config.num_classes == 1000


# ----------------------------------------------------------------------------- records of .pt


def rewrite(file, method=zipfile.ZIP_STORED, change=lambda name, content: content):
    """Write the records of a file of ``torch.save`` again, compressed or changed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_deflated_records_open(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    assert same(load_pretrained(tmp_path / "a.pt", **HEADS).state_dict(), model.state_dict())


def shorten(name, content):
    return content[: len(content) // 2] if "/data/" in name else content


def bomb(name, content):
    return bytes(120 << 20) if name.endswith("/data/0") else content


def self_reference(folder):
    name = f"{WEIGHTS}.index.json"
    (folder / name).write_text(json.dumps({"weight_map": {"pos_embed": name}}))
    return folder / name


def config_with(**changes):
    """Return a function that writes a model folder with a changed configuration."""

    def write(folder):
        randomized(SMALL).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return write


def diffusers_config_with(**changes):
    def write(folder):
        peer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return write


def records(method=zipfile.ZIP_STORED, change=shorten):
    def write(folder):
        torch.save(randomized(SMALL).state_dict(), folder / "a.pt")
        rewrite(folder / "a.pt", method, change)
        return folder / "a.pt"

    return write


def text(name, content):
    def write(folder):
        randomized(SMALL).save_pretrained(folder)
        (folder / name).write_text(content)
        return folder

    return write


HUGE = 10**7
# What is tried, and words of the line that it ends in.
ATTACKS = {
    "short records": (records(), "truncated or damaged"),
    "zip bomb": (records(zipfile.ZIP_DEFLATED, bomb), "it would expand to"),
    "index of itself": (self_reference, "is not the index"),
    "index of a folder": (text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": ""}}'), "exist"),
    "index with numbers": (text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": 3}}'), "not the"),
    "nested index": (text(f"{WEIGHTS}.index.json", "[" * 99999), "is not the index"),
    "nested config": (text("config.json", "[" * 99999), "cannot be read"),
    "config is a list": (text("config.json", "[]"), "is not a configuration"),
    "config is not text": (text("config.json", "\x00\x01"), "cannot be read"),
    **{
        f"{key} {value!r}": (config_with(**{key: value}), words)
        for key, value, words in (
            ("depth", HUGE, "only .* weights"), ("depth", 0, "positive"), ("depth", "", "positive"),
            ("depth", -1, "positive"), ("depth", None, "positive"), ("depth", 2.5, "positive"),
            ("hidden_size", HUGE * 4, "far too large"), ("hidden_size", "32", "positive"),
            ("sample_size", HUGE, "far too large"), ("sample_size", [8], "positive"),
            ("patch_size", 0, "positive"), ("num_classes", HUGE, "expected"),
            ("num_classes", -3, "positive"), ("in_channels", 0, "positive"),
            ("num_heads", 0, "num_heads is 0"), ("num_heads", "x", "configuration"),
            ("num_heads", HUGE, "a.*"), ("num_heads", [4], "lists 1 layers"),
            ("num_shared_heads", 9, "layer 0"), ("mlp_ratio", "x", "configuration"),
            ("mlp_ratio", -4, "configuration"), ("mlp_ratio", 1e9, "expected"),
            ("router", "other", "router"), ("out_channels", HUGE, "expected"),
            ("_class_name", 3, "not a DiT"),
        )
    },
    **{
        f"diffusers {key} {value!r}": (diffusers_config_with(**{key: value}), words)
        for key, value, words in (
            ("num_layers", HUGE, "only .* weights"), ("num_layers", "x", "positive"),
            ("attention_head_dim", "x", "positive|configuration"),
            ("sample_size", HUGE, "too large"),
            ("num_attention_heads", None, "configuration|positive"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_ends_in_one_line(attack, tmp_path):
    write, words = ATTACKS[attack]
    source = write(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(source)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(scaling_factor=0), "scaling_factor is 0"),
        (dict(scaling_factor=None), "scaling_factor is None"),
        (dict(scaling_factor="x"), "scaling_factor is x"),
        (dict(scaling_factor=float("nan")), "scaling_factor is nan"),
        (dict(layers_per_block=HUGE), "layers_per_block .* more than"),
        (dict(block_out_channels=[8] * 9999), "block_out_channels .* more than"),
        (dict(block_out_channels=[8, HUGE]), "cannot be loaded|match"),
        (dict(_class_name="Exploit"), "Exploit"),
    ],
)
def test_autoencoders_with_absurd_configurations_are_one_line(changes, words, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | changes))
    randomized(SMALL).save_pretrained(tmp_path / "model")
    for load in (
        lambda: load_autoencoder(tmp_path / "vae"),
        lambda: load_pipeline(tmp_path / "model", autoencoder=str(tmp_path / "vae")),
    ):
        with pytest.raises(UserError, match=words) as error:
            load()
        assert "\n" not in str(error.value)
