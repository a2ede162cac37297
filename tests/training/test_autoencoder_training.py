"""Autoencoder training: resuming, SIGTERM, images in memory, and bf16."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.processes import launch
from helpers.training_runs import environment
from PIL import Image

from fid_eval.networks import lpips
from fid_eval.sets.hashing import file_sha256
from moh_dit.autoencoder import load_autoencoder
from moh_dit.common.errors import UserError
from moh_dit.data.images import open_images
from moh_dit.training import autoencoder_training
from moh_dit.training.autoencoder_checkpoint import AutoencoderCheckpoint
from moh_dit.training.autoencoder_config import AutoencoderConfig, AutoencoderTrainingConfig
from moh_dit.training.autoencoder_training import train_autoencoder
from moh_dit.training.image_cache import CachedImages, pixel_batches
from moh_dit.training.perceptual import PerceptualLoss
from moh_dit.training.preemption import PREEMPTED

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 12
SHAPE = AutoencoderConfig(
    block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, mid_block_attention=False
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write 26 images; with 2 kept out and batches of 5, an epoch skips 4 of them."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(13):
            corners = Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))
            corners.resize((16, 16), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")
    return root


def config(images, output, **changes):
    options = dict(
        data=str(images), output=str(output), image_size=16, autoencoder=SHAPE,
        num_steps=NUM_STEPS, batch_size=5, num_held_out=2, learning_rate=5e-3, checkpoint_every=4,
    )  # fmt: skip
    return AutoencoderTrainingConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def finished(one_thread, images, tmp_path_factory):
    """Train without interruption and return the output folder."""
    output = tmp_path_factory.mktemp("finished") / "vae"
    train_autoencoder(config(images, output))
    return output


def assert_same_output(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    # The settings contain the output's name, and the manifest their checksum.
    for name in set(names) - {"training.yaml", "manifest.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def interrupt_after(step, monkeypatch, action):
    """Call ``action`` after the random numbers of this step are drawn."""
    draw, calls = autoencoder_training._draw, []

    def draw_then_act(*arguments):
        calls.append(None)
        if len(calls) == step:
            action()
        return draw(*arguments)

    monkeypatch.setattr(autoencoder_training, "_draw", draw_then_act)


def raise_keyboard_interrupt():
    raise KeyboardInterrupt


def interrupted_training(images, output, monkeypatch, step=7, **changes):
    with monkeypatch.context() as patch:
        interrupt_after(step, patch, raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(config(images, output, **changes))


@pytest.mark.parametrize("step", [7, 12])
def test_a_resumed_training_writes_the_same_bytes(finished, images, tmp_path, monkeypatch, step):
    output = tmp_path / "vae"
    interrupted_training(images, output, monkeypatch, step)
    saved = (step - 1) // 4 * 4
    assert [path.name for path in (tmp_path / "vae.partial").iterdir()] == [f"step-{saved:08d}"]
    assert not output.exists()
    with pytest.raises(UserError, match=r"vae\.partial is an unfinished training.*--resume"):
        train_autoencoder(config(images, output))
    train_autoencoder(config(images, output, resume=True, checkpoint_every=5))
    assert_same_output(finished, output)
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(UserError, match="already finished"):
        train_autoencoder(config(images, output, resume=True))


def test_resume_without_a_checkpoint_starts(finished, images, tmp_path):
    train_autoencoder(config(images, tmp_path / "vae", resume=True))
    assert_same_output(finished, tmp_path / "vae")


def test_an_interruption_before_the_measurements_repeats_only_them(
    finished, images, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder_training, "measure", lambda *_: raise_keyboard_interrupt())
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(config(images, tmp_path / "vae"))
    monkeypatch.setattr(autoencoder_training, "_draw", None)
    train_autoencoder(config(images, tmp_path / "vae", resume=True))
    assert_same_output(finished, tmp_path / "vae")


def test_other_settings_data_or_damage_are_refused_on_resume(images, tmp_path, monkeypatch):
    output = tmp_path / "vae"
    interrupted_training(images, output, monkeypatch)
    for changes, words in (
        (dict(num_steps=20), "num_steps is 20, was 12"),
        (dict(seed=1, kl_weight=1.0), r"kl_weight is 1\.0, was 0\.0001; seed is 1, was 0"),
        (dict(data="digits"), "other data"),
    ):
        with pytest.raises(UserError, match=words):
            train_autoencoder(config(images, output, resume=True, **changes))
    file = tmp_path / "vae.partial" / "step-00000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-00000004 is damaged"):
        train_autoencoder(config(images, output, resume=True))


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(images, tmp_path, monkeypatch):
    output = tmp_path / "vae"
    save = AutoencoderCheckpoint.save

    def save_nan(self, step):
        if step == 8:
            self.vae.decoder.conv_out.bias.data.fill_(float("nan"))
        save(self, step)

    monkeypatch.setattr(AutoencoderCheckpoint, "save", save_nan)
    with pytest.raises(UserError, match="not finite after step 8"):
        train_autoencoder(config(images, output))
    assert [path.name for path in (tmp_path / "vae.partial").iterdir()] == ["step-00000004"]


def test_sigterm_saves_and_exits_with_75(finished, images, tmp_path, monkeypatch, capsys):
    output = tmp_path / "vae"
    with monkeypatch.context() as patch:
        interrupt_after(6, patch, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            train_autoencoder(config(images, output))
    assert end.value.code == PREEMPTED
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "vae.partial").iterdir()] == ["step-00000006"]
    train_autoencoder(config(images, output, resume=True))
    assert_same_output(finished, output)


def test_sigterm_to_all_processes_of_the_command_saves(images, tmp_path):
    """Schedulers send SIGTERM also to the data-loader workers."""
    output = tmp_path / "vae"
    process = subprocess.Popen(
        [sys.executable, "-m", "moh_dit", "autoencoder", f"--data={images}", f"--output={output}",
         "--image_size=16", "--autoencoder.block_out_channels=[8, 8]", "--batch_size=5",
         "--autoencoder.norm_num_groups=4", "--num_held_out=2", "--num_workers=1",
         "--num_steps=100000", "--checkpoint_every=1", "--cache_images_gib=0"],
        env=environment(), stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    partial = tmp_path / "vae.partial"
    while process.poll() is None and not list(partial.glob("step-*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == PREEMPTED
    assert len(list(partial.glob("step-*"))) == 1


@pytest.mark.parametrize(
    "changes", [dict(cache_images_gib=0), dict(num_workers=1), dict(num_workers=2)]
)
def test_caching_and_workers_do_not_change_the_result(finished, images, tmp_path, capsys, changes):
    train_autoencoder(config(images, tmp_path / "vae", **changes))
    assert_same_output(finished, tmp_path / "vae")
    cached = "cache_images_gib" not in changes
    assert ("kept in memory" if cached else "read again") in capsys.readouterr().out


def test_batches_of_cached_images_are_those_of_the_images(images):
    plain, device = open_images(images, 16), torch.device("cpu")
    batches = np.random.default_rng(0).permutation(26).reshape(2, 13).tolist()
    expected = [torch.from_numpy(np.stack([plain[i][0] for i in batch])) for batch in batches]
    for source in (plain, CachedImages(plain), CachedImages(plain, num_workers=1)):
        with closing(pixel_batches(source, batches, 0, device)) as pixels:
            assert all(map(torch.equal, pixels, expected))
        assert source[3][1] == plain[3][1]


@pytest.fixture
def fresh_accelerator():
    """Let a test use another precision: accelerate allows one per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_resumes_exactly(images, tmp_path, monkeypatch, fresh_accelerator):
    train_autoencoder(config(images, tmp_path / "whole", mixed_precision="bf16"))
    interrupted_training(images, tmp_path / "vae", monkeypatch, mixed_precision="bf16")
    train_autoencoder(config(images, tmp_path / "vae", mixed_precision="bf16", resume=True))
    assert_same_output(tmp_path / "whole", tmp_path / "vae")
    assert load_autoencoder(tmp_path / "vae").dtype == torch.float32


def test_bf16_learns_as_well_as_float32(tmp_path, fresh_accelerator):
    psnr = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = dict(num_steps=60, batch_size=32, num_held_out=20, mixed_precision=precision)
        psnr[precision] = train_autoencoder(config("digits", tmp_path / precision, **options))[
            "psnr"
        ]
    first = train_autoencoder(config("digits", tmp_path / "short", **options | {"num_steps": 1}))
    assert psnr["bf16"] > first["psnr"] + 3
    assert abs(psnr["bf16"] - psnr["no"]) < 0.1


def train_on_this_rank(images, folder):
    train_autoencoder(config(images, folder / "whole", batch_size=4))
    patch = pytest.MonkeyPatch()
    if os.environ["RANK"] == "1":
        interrupt_after(5, patch, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        train_autoencoder(config(images, folder / "vae", batch_size=4))
    assert end.value.code == PREEMPTED
    patch.undo()
    assert [path.name for path in (folder / "vae.partial").glob("step-*")] == ["step-00000010"]
    metrics = train_autoencoder(config(images, folder / "vae", batch_size=4, resume=True))
    assert metrics["psnr"] > 0


def test_two_processes_stop_together_and_resume_exactly(images, tmp_path):
    launch(train_on_this_rank, images, tmp_path, num_processes=2)
    assert_same_output(tmp_path / "whole", tmp_path / "vae")


@pytest.fixture
def vgg_weights(tmp_path, monkeypatch):
    """Write random weights of VGG-16, and accept them as the published ones."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    state = torchvision.models.vgg16().features.state_dict()
    path = tmp_path / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in state.items()}, path)
    monkeypatch.setitem(lpips.BACKBONES, "vgg", (file_sha256(path), path.name))
    return path


def test_the_perceptual_term_is_added_to_the_loss_and_resumes_exactly(
    images, tmp_path, monkeypatch, vgg_weights
):
    options = dict(num_steps=3, checkpoint_every=1, perceptual_weights=str(vgg_weights))
    train_autoencoder(config(images, tmp_path / "without", **options))
    options["perceptual_weight"] = 1.0
    train_autoencoder(config(images, tmp_path / "whole", **options))
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "without" / weights).read_bytes() != (
        tmp_path / "whole" / weights
    ).read_bytes()
    interrupted_training(images, tmp_path / "vae", monkeypatch, 3, **options)
    vgg_weights.rename(tmp_path / "moved.pth")
    options["perceptual_weights"] = str(tmp_path / "moved.pth")
    with monkeypatch.context() as patch:
        patch.setattr(
            PerceptualLoss, "sha256", property(lambda self: "other", lambda *_: None), False
        )
        with pytest.raises(UserError, match="other data or perceptual_weights"):
            train_autoencoder(config(images, tmp_path / "vae", resume=True, **options))
    train_autoencoder(config(images, tmp_path / "vae", resume=True, **options))
    assert_same_output(tmp_path / "whole", tmp_path / "vae")


def test_wrong_perceptual_settings_are_reported(images, tmp_path):
    (tmp_path / "file.pth").write_bytes(b"weights")
    for changes, words in (
        (dict(perceptual_weights="nowhere.pth"), "perceptual_weights nowhere.pth: no such file"),
        (dict(perceptual_weights=str(tmp_path / "file.pth")), "file.pth: the sha256 is"),
        (dict(image_size=8), "image_size is 8: perceptual_weight needs at least 16 pixels"),
        (dict(perceptual_weight=-1.0), r"perceptual_weight is -1\.0: it must be at least 0"),
    ):
        with pytest.raises(UserError, match=words):
            train_autoencoder(
                config(images, tmp_path / "vae", **{"perceptual_weight": 1.0} | changes)
            )
