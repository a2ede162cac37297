"""Latents of a data set: moments of every image and its mirror image, on disk and in memory."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader

from fid_eval.sets.decoding import POLICY_VERSION
from moh_dit.__main__ import run_command
from moh_dit.autoencoder import autoencoder_identity, encode_moments, load_autoencoder
from moh_dit.common.errors import UserError
from moh_dit.data import encoding, encoding_passes
from moh_dit.data import latent_shards as shards
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.images import load_batch, open_images
from moh_dit.data.latents import LatentMoments, encode_images, open_latents
from moh_dit.data.pixels import to_float
from moh_dit.data.read_ahead import default_workers
from moh_dit.data.stored_arrays import StoredArray
from moh_dit.training.step_inputs import load_micro_batches


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(13):
        path = root / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return open_images(root, 8, progress=False)


@pytest.mark.parametrize("flip", [False, True])
def test_moments_of_every_image(vae, images, flip):
    latents = encode_images(images, vae, flip=flip, batch_size=5, progress=False)
    assert isinstance(latents, LatentMoments)
    assert latents.flipped is flip
    assert latents.class_names == ["a", "b", "c"]
    pixels = to_float(load_batch(images, range(len(images)))[0])
    torch.testing.assert_close(latents.moments[0], encode_moments(vae, pixels))
    if flip:
        mirrored = encode_moments(vae, torch.flip(pixels, dims=[3]))
        torch.testing.assert_close(latents.moments[1], mirrored)


def test_batches_through_a_loader(vae, images):
    latents = encode_images(images, vae, flip=True, progress=False)
    order = [[(3, True), (12, False), (3, False)], [(0, True)]]
    batches = list(DataLoader(latents, batch_sampler=order, collate_fn=lambda batch: batch))
    for (moments, labels), items in zip(batches, order, strict=True):
        for row, (index, flip) in enumerate(items):
            one, label = latents[index, flip]
            torch.testing.assert_close(moments[row], one)
            torch.testing.assert_close(one, latents.moments[int(flip), index])
            assert labels[row] == label == images.labels[index]
        assert moments.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_size_must_divide(vae):
    with pytest.raises(UserError, match="31 is not divisible"):
        encode_images(open_images("digits", 31), vae)


# Latents on disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "MAX_IMAGES_PER_SHARD", 8)


@pytest.fixture
def config(vae, images, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    return EncodeConfig(
        output=str(tmp_path / "latents"),
        data=images.source,
        image_size=8,
        autoencoder=str(tmp_path / "vae"),
        batch_size=5,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_store_gives_what_memory_gives(config, images, vae, small_shards, dtype, tolerance):
    config.dtype = dtype
    encode_data(config)
    store = open_latents(config.output, vae, flip=True)
    expected = encode_images(images, vae, flip=True, progress=False)
    assert sorted(contents(config.output)) == [
        "index.json",
        "labels.npy",
        "moments-00000-of-00002.npy",
        "moments-00001-of-00002.npy",
        "moments.crc32.npy",
    ]
    assert len(store) == 13
    assert store.class_names == expected.class_names
    np.testing.assert_array_equal(store.labels, expected.labels)
    items = [(i, flip) for i in (12, 0, 7, 8, 3) for flip in (True, False)]
    moments, labels = store.__getitems__(items)
    wanted, wanted_labels = expected.__getitems__(items)
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(labels, wanted_labels)
    torch.testing.assert_close(store[12, True][0], moments[0])
    store.verify()
    with pytest.raises(IndexError):
        store[13, False]
    # The shards are plain .npy files.
    shard = np.load(Path(config.output) / "moments-00001-of-00002.npy")
    np.testing.assert_array_equal(shard[0, 4], store[12, False][0].numpy())


def test_bf16_and_workers(config, images, vae, small_shards):
    """Precision is part of the plan. The number of workers changes nothing."""
    config.mixed_precision, config.num_workers = "bf16", 1
    encode_data(config)
    expected = encode_images(images, vae, flip=True, progress=False)
    items = [(i, True) for i in range(13)]
    moments = open_latents(config.output, vae).__getitems__(items)[0]
    error = (moments - expected.__getitems__(items)[0]).abs().max()
    assert 1e-5 < error < 0.05
    index = json.loads((Path(config.output) / "index.json").read_text())
    assert index["mixed_precision"] == "bf16"


def test_default_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16), raising=False)
    assert [default_workers(count) for count in (255, 1000, 10**6, None)] == [0, 3, 16, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(10**6) == 2


def test_store_in_loader_processes_and_pickled(config, vae, small_shards):
    encode_data(config)
    store = open_latents(config.output)
    store[0, False]
    again = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(again[3, True][0], store[3, True][0])
    order = [[(i, bool(i % 2)) for i in range(7)]]
    loader = DataLoader(store, batch_sampler=order, num_workers=1, collate_fn=lambda batch: batch)
    ((moments, _),) = list(loader)
    torch.testing.assert_close(moments, store.__getitems__(order[0])[0])


def test_same_bits_whatever_the_batch_size(config, tmp_path, small_shards):
    encode_data(config)
    expected = contents(config.output)
    for batch_size in (1, 8, 64):
        config.output = str(tmp_path / f"again{batch_size}")
        config.batch_size = batch_size
        encode_data(config)
        assert contents(config.output) == expected


def test_same_bits_whatever_the_number_of_threads(tmp_path, small_shards):
    """Use the embedded autoencoder, whose convolutions depend on the number of threads."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02}.png")
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            output = str(tmp_path / f"threads{number}")
            encode_data(EncodeConfig(data=str(folder.parent), output=output, autoencoder="digits"))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "threads2") == contents(tmp_path / "threads1")
    assert contents(tmp_path / "threads3") == contents(tmp_path / "threads1")


def test_same_bits_whatever_the_number_of_processes(tmp_path):
    """The command on two processes writes the same files as one process here."""
    root = tmp_path / "images"
    for name in "ab":
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i}.png")
    options = dict(data=str(root), output=str(tmp_path / "two"), autoencoder="digits")
    program = (
        "from moh_dit.__main__ import run_command; from moh_dit.data import encoding;"
        "encoding.MAX_IMAGES_PER_SHARD = 8; run_command('encode')"
    )
    arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    subprocess.run(
        [*launcher, "--master_port=29511", str(script), *arguments],
        env=environment,
        check=True,
        timeout=300,
        capture_output=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MAX_IMAGES_PER_SHARD", 8)
        encode_data(EncodeConfig(**{**options, "output": str(tmp_path / "one")}))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 6


def test_resume_after_a_kill(config, tmp_path, monkeypatch, small_shards):
    encode_data(config)
    expected = contents(config.output)
    config.output = str(tmp_path / "killed")
    write = shards.atomic_write

    def die_in_second_shard(path, data):
        if path.name == "moments-00001-of-00002.npy":
            (path.parent / ".partial-host-1-0-half").write_bytes(bytes(data[:100]))
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", die_in_second_shard)
        with pytest.raises(KeyboardInterrupt):
            encode_data(config)
    with pytest.raises(UserError, match=r"unfinished.*--resume"):
        open_latents(config.output)
    with pytest.raises(UserError, match=r"is an unfinished encoding: continue it with --resume"):
        encode_data(config)
    first = Path(config.output) / "moments-00000-of-00002.npy"
    written = first.stat().st_mtime_ns
    config.resume = True
    for change in (dict(image_size=16), dict(horizontal_flip=False), dict(autoencoder="digits")):
        with pytest.raises(UserError, match=r"other settings|not divisible"):
            encode_data(EncodeConfig(**{**vars(config), **change}))
    encode_data(config)
    assert first.stat().st_mtime_ns == written  # not made again
    assert contents(config.output) == expected
    with pytest.raises(UserError, match="already finished"):
        encode_data(config)


def test_resume_refuses_changed_data(config, images, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding_passes, "write_latent_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_data(config)
    extra = Path(images.source) / "a" / "extra.png"
    Image.new("RGB", (8, 8)).save(extra)
    config.resume = True
    try:
        with pytest.raises(UserError, match=r"num_images.*data.* differ"):
            encode_data(config)
    finally:
        extra.unlink()


def test_another_autoencoder_is_refused(config, vae, tmp_path):
    config.horizontal_flip = False
    encode_data(config)
    open_latents(config.output, load_autoencoder(config.autoencoder))
    with pytest.raises(UserError, match=r"made with the autoencoder .*vae, whose weights differ"):
        open_latents(config.output, load_autoencoder("digits"))
    with pytest.raises(UserError, match="no mirrored images"):
        open_latents(config.output, vae, flip=True)
    file = Path(config.output) / "index.json"
    index = json.loads(file.read_text())
    assert index["format"] == 2
    assert index["decoding_policy"] == POLICY_VERSION
    assert index["autoencoder"]["identity"] == autoencoder_identity(vae)
    assert index["autoencoder"]["factor"] == 0.5
    for fact, other, words in (
        ("factor", 0.25, r"another factor of the autoencoder \(0\.25, now 0\.5\)"),
        ("adapter_version", 0, "another adapter version"),
        ("class", "AutoencoderTiny", "another class"),
    ):
        changed = {**index, "autoencoder": {**index["autoencoder"], fact: other}}
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            open_latents(config.output, vae)


def test_damage_is_found(config, small_shards, tmp_path):
    encode_data(config)
    shard = Path(config.output) / "moments-00001-of-00002.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"abcd")
    damaged = r"latents.moments-00001-of-00002\.npy are damaged: record 4 \(image 12, mirrored\)"
    store = open_latents(config.output)
    with pytest.raises(UserError, match=damaged):
        store.verify()
    with pytest.raises(UserError, match=damaged):
        store.__getitems__([(3, False), (12, True)])
    store.__getitems__([(3, False), (12, False)])  # other records are good
    sampler = [[(12, True)]]
    with pytest.raises(UserError, match=f"^latents .*{damaged}[^\n]*$"):  # one line from a worker
        next(load_micro_batches(store, sampler, 1, torch.device("cpu")))
    shard.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="incomplete"):
        open_latents(config.output)[12, False]
    shard.unlink()
    with pytest.raises(UserError, match=r"moments-00001-of-00002\.npy is missing"):
        open_latents(config.output)
    with pytest.raises(UserError, match="contains no latents"):
        open_latents(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_latents(tmp_path / "nowhere")


def test_the_command_verifies(config, small_shards, monkeypatch, capsys):
    encode_data(config)
    monkeypatch.setattr(
        "sys.argv", ["moh-dit encode", "--output", config.output, "--verify", "true"]
    )
    run_command("encode")
    assert "all files of 13 images are as they were written" in capsys.readouterr().out
    checksums = Path(config.output) / "moments.crc32.npy"
    checksums.write_bytes(checksums.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit) as stop:
        run_command("encode")
    assert stop.value.code == 2
    assert "moments.crc32.npy are damaged" in capsys.readouterr().err


def test_several_shapes_and_further_arrays(tmp_path):
    """Format 2 holds shards of several shapes, and arrays beside the moments."""
    rng = np.random.default_rng(0)
    shapes = [(4, 2, 6), (4, 3, 4)]
    moments = [rng.standard_normal((2, n, *shape), np.float32)
               for n, shape in zip((3, 2), shapes, strict=True)]  # fmt: skip
    features = [rng.standard_normal((2, n, 5)).astype(np.float16) for n in (3, 2)]
    arrays, shards = {}, [{"num_images": 3, "arrays": {}}, {"num_images": 2, "arrays": {}}]
    for name, parts in (("moments", moments), ("features", features)):
        for number, part in enumerate(parts):
            np.save(tmp_path / f"{name}-{number}.npy", part)
            entry = {"file": f"{name}-{number}.npy", "sha256": "", "shape": part.shape[2:]}
            shards[number]["arrays"][name] = entry
        checksums = [[zlib.crc32(record) for part in parts for record in part[flip]]
                     for flip in (0, 1)]  # fmt: skip
        np.save(tmp_path / f"{name}.crc32.npy", np.array(checksums, np.uint32))
        crc32 = {"file": f"{name}.crc32.npy", "sha256": ""}
        arrays[name] = {"dtype": str(parts[0].dtype), "shape": None, "crc32": crc32}
    np.save(tmp_path / "labels.npy", np.arange(5))
    index = dict(format=2, arrays=arrays, shards=shards, flipped=True, class_names=["a"] * 5)
    (tmp_path / "index.json").write_text(json.dumps(index))
    store = open_latents(tmp_path)
    items = [(4, True), (3, False)]
    torch.testing.assert_close(
        store.__getitems__(items)[0].numpy(), np.stack([moments[1][1, 1], moments[1][0, 0]])
    )
    np.testing.assert_array_equal(
        store.arrays["features"].read([(4, True), (0, False)]),
        np.stack([features[1][1, 1], features[0][0, 0]]),
    )
    with pytest.raises(UserError, match="2 shapes, but one shape is required"):
        store.moments_shape  # noqa: B018


def test_a_full_disk_is_reported(config, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            encode_data(config)
    assert not Path(config.output).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    config.output = str(tmp_path / "other")
    with pytest.raises(UserError, match="are free"):
        encode_data(config)


def test_imagenet_sized_store_stays_small(tmp_path):
    """Open and read latents of 1.28 million images and their mirror images (sparse files)."""
    make_synthetic_store(tmp_path / "store", num_images=1_281_167)
    program = """
import sys
import numpy as np
from moh_dit.data.latents import open_latents

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

before = resident()
store = open_latents(sys.argv[1], flip=True)
opened = resident()
random = np.random.default_rng(0)
peak = 0
for _ in range(160):
    items = [(int(i), bool(f)) for i, f in
             zip(random.integers(len(store), size=128), random.integers(2, size=128))]
    moments, labels = store.__getitems__(items)
    assert moments.shape == (128, 8, 32, 32) and labels.max() < 1000
    peak = max(peak, resident())
print(opened - before, peak - before, moments.nbytes * 160)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    opened, peak, read = map(int, result.stdout.split())
    assert read > 2.4 * StoredArray.RESIDENT_BYTES  # more bytes were read than may stay resident
    assert opened < 64 * 2**20
    assert peak < 2 * StoredArray.RESIDENT_BYTES


def make_synthetic_store(folder, num_images, images_per_shard=4096):
    """Write sparse files that look like the latents of zeros."""
    folder.mkdir()
    shape, num_shards = (8, 32, 32), -(-num_images // images_per_shard)
    shards = []
    for number in range(num_shards):
        count = min(images_per_shard, num_images - number * images_per_shard)
        name = f"moments-{number:05}-of-{num_shards:05}.npy"
        with (folder / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (2, count, *shape)}
            )
            file.truncate(file.tell() + 2 * count * 8 * 32 * 32 * 4)
        shards.append({"num_images": count, "arrays": {"moments": {"file": name, "sha256": ""}}})
    np.save(folder / "labels.npy", np.arange(num_images) % 1000)
    checksum = zlib.crc32(np.zeros(shape, np.float32))
    np.save(folder / "moments.crc32.npy", np.full((2, num_images), checksum, np.uint32))
    crc32 = {"file": "moments.crc32.npy", "sha256": ""}
    index = dict(
        format=2,
        num_images=num_images,
        image_size=256,
        arrays={"moments": {"dtype": "float32", "shape": shape, "crc32": crc32}},
        flipped=True,
        images_per_shard=images_per_shard,
        autoencoder=dict(identity="", name="synthetic"),
        class_names=[str(i) for i in range(1000)],
        shards=shards,
        content_hash="",
    )
    (folder / "index.json").write_text(json.dumps(index))
