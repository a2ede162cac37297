"""Encoding a stream gives the latents of the stored data set, and stores nothing else."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.processes import launch
from PIL import Image

from moh_dit.common.errors import UserError
from moh_dit.data import encoding, encoding_passes
from moh_dit.data import latent_shards as shards
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.images import open_images
from moh_dit.data.latents import open_latents

ROWS = (13, 5, 0, 9)  # of each file


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "MAX_IMAGES_PER_SHARD", 8)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_files(folder, broken=()):
    """Write Parquet files as on the Hub; the images of rows ``broken`` are truncated."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"kind": datasets.ClassLabel(names=["cat", "dog"]), "picture": datasets.Image()}
    )
    folder.mkdir()
    number = 0
    for file, count in enumerate(ROWS):
        pictures = []
        for _ in range(count):
            picture = png(Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)))
            pictures.append({"bytes": picture[:50] if number in broken else picture, "path": None})
            number += 1
        rows = {"kind": [i % 2 for i in range(count)], "picture": pictures}
        path = folder / f"train-{file:05}-of-{len(ROWS):05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "files")


def stream(files):
    return f"hf://{files}?streaming=true"


def config(**settings):
    return EncodeConfig(autoencoder="digits", **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_stream_gives_the_latents_of_the_stored_set(files, tmp_path):
    encode_data(config(data=stream(files), output=str(tmp_path / "streamed")))
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # nothing was stored
    encode_data(config(data=f"hf://{files}", output=str(tmp_path / "stored")))
    streamed, stored = (open_latents(tmp_path / name) for name in ("streamed", "stored"))
    assert streamed.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(streamed.labels, stored.labels)
    counts = [shard["num_images"] for shard in streamed.index["shards"]]
    assert counts == [8, 5, 5, 8, 1]  # 13 = 8 + 5, 9 = 8 + 1
    items = [(i, flip) for i in range(sum(ROWS)) for flip in (False, True)]
    torch.testing.assert_close(streamed.__getitems__(items), stored.__getitems__(items))
    streamed.verify()


def encode(data, output):
    encoding.MAX_IMAGES_PER_SHARD = 8
    encode_data(config(data=data, output=output))


def test_same_files_whatever_batch_size_and_processes(files, tmp_path):
    encode_data(config(data=stream(files), output=str(tmp_path / "one")))
    again = config(data=stream(files), output=str(tmp_path / "two"), batch_size=20, num_workers=2)
    encode_data(again)
    launch(encode, stream(files), str(tmp_path / "three"), num_processes=2)
    for name in ("two", "three"):
        assert contents(tmp_path / name) == contents(tmp_path / "one")


@pytest.mark.parametrize("last_written", [0, 1, 2, 4])
def test_resume_after_a_kill(files, tmp_path, monkeypatch, last_written):
    settings = config(data=stream(files), output=str(tmp_path / "whole"))
    encode_data(settings)
    settings.output = str(tmp_path / "killed")
    written = []

    def die(path, data, labels):
        if len(written) == last_written:
            raise KeyboardInterrupt
        written.append(path)
        shards.write_latent_shard(path, data, labels)

    with monkeypatch.context() as patch:
        patch.setattr(encoding_passes, "write_latent_shard", die)
        with pytest.raises(KeyboardInterrupt):
            encode_data(settings)
    times = {path: path.stat().st_mtime_ns for path in written}
    settings.resume = True
    encode_data(settings)
    assert {path: path.stat().st_mtime_ns for path in written} == times  # not made again
    assert contents(settings.output) == contents(tmp_path / "whole")


def test_unreadable_images_are_named_or_left_out(tmp_path, capsys):
    files = write_files(tmp_path / "files", broken=(2, 17))
    settings = config(data=stream(files), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match=r"image 2 of file 0 of hf://.* skip_unreadable"):
        encode_data(settings)
    settings.skip_unreadable = settings.resume = True
    encode_data(settings)
    assert "skipped image 4 of file 1" in capsys.readouterr().err
    streamed = open_latents(settings.output)
    stored = open_images(f"hf://{files}", 32, skip_unreadable=True, progress=False)
    np.testing.assert_array_equal(streamed.labels, stored.labels)


def test_a_stream_that_breaks_off_can_be_resumed(files, tmp_path, monkeypatch):
    settings = config(data=stream(files), output=str(tmp_path / "latents"))
    skip = datasets.IterableDataset.skip

    def breaking(self, count):
        rows = iter(skip(self, count))
        for _ in range(9):
            yield next(rows)
        raise ConnectionError("Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "skip", breaking)
        with pytest.raises(UserError, match=r"failed \(Connection reset.*--resume"):
            encode_data(settings)
    settings.resume = True
    encode_data(settings)
    assert len(open_latents(settings.output)) == sum(ROWS)


def test_mistakes(files, tmp_path):
    with pytest.raises(UserError, match="random order: encode it once with moh-dit encode"):
        open_images(stream(files), 32)
    with pytest.raises(UserError, match=r"nobody/nothing.* cannot be opened"):
        encode_data(config(data=stream("nobody/nothing"), output=str(tmp_path / "out")))
    plain = datasets.Dataset.from_dict({"text": ["x"]})
    plain.save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match=r"it has text \(Value\)"):
        encode_data(config(data=stream(tmp_path / "plain"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_syntax_of_version_0_1_still_streams(files, tmp_path):
    encode_data(config(data=f"hf-stream:{files}", output=str(tmp_path / "old")))
    encode_data(config(data=stream(files), output=str(tmp_path / "new")))
    old, new = (contents(tmp_path / name) for name in ("old", "new"))
    assert {**old, "index.json": b""} == {**new, "index.json": b""}
    assert b"hf-stream:" in old["index.json"]  # the index stores the source as it was given
