"""Sets have exactly the requested size and the same bytes after any interruption."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.sampling import sample_set as module
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.output_formats import partial_folder
from moh_dit.sampling.sample_set import sample_set, set_labels
from moh_dit.sampling.set_shards import SetShards, Shard, list_shards, missing_batches

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=1.5)
LABELS = set_labels(55, range(5), "balanced", 0)
FEWER = LABELS[:36]


def make(path, pipeline=None, settings=SETTINGS, labels=LABELS, batch_size=8, **options):
    pipeline = pipeline or tiny_pipeline()
    sample_set(pipeline, settings, path, labels, batch_size=batch_size, quiet=True, **options)
    return path.read_bytes()


def test_adm_file_has_exactly_n_images(tmp_path):
    make(tmp_path / "s.npz", settings_yaml="seed: 0\n")
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["arr_0"].shape == (55, 16, 16, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].dtype == np.int64
    assert np.bincount(arrays["arr_1"]).tolist() == [11] * 5
    assert yaml.safe_load((tmp_path / "s.npz.yaml").read_text()) == {"seed": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "s.npz.yaml"]


def test_drawn_labels_are_uniform_and_depend_on_the_seed():
    labels = set_labels(5000, [3, 7, 9], "drawn", 1)
    counts = [int((labels == label).sum()) for label in (3, 7, 9)]
    assert sum(counts) == 5000
    assert min(counts) > 1550
    assert np.array_equal(labels[:10], set_labels(10, [3, 7, 9], "drawn", 1))
    assert not np.array_equal(labels, set_labels(5000, [3, 7, 9], "drawn", 2))


class Stop(Exception):
    """Ends a set before it is finished."""


def interrupt(path, monkeypatch, shards=2, **options):
    """Start a set, stop it after some shards of 16 images, and return their files."""
    write, written = SetShards.write, []

    def write_or_stop(self, start, images):
        if len(written) == shards:
            raise Stop
        written.append(start)
        write(self, start, images)

    with monkeypatch.context() as patch:
        patch.setattr(SetShards, "write", write_or_stop)
        with pytest.raises(Stop):
            make(path, **options)
    return [shard.file for shard in list_shards(partial_folder(path))]


@pytest.fixture
def sampled(monkeypatch):
    """Record the first image of every shard that is written."""
    write, starts = SetShards.write, []
    monkeypatch.setattr(
        SetShards, "write", lambda self, start, images: starts.append(start) or
        write(self, start, images))  # fmt: skip
    return starts


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the bytes of the set of the labels FEWER."""
    return make(tmp_path_factory.mktemp("whole") / "whole.npz", labels=FEWER)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Return the folder of such a set with its first two shards of 16 images."""
    path = tmp_path_factory.mktemp("unfinished") / "s.npz"
    return interrupt(path, pytest.MonkeyPatch(), labels=FEWER)[0].parent


def continued(unfinished, path):
    """Copy an unfinished set and return its shards."""
    shutil.copytree(unfinished, partial_folder(path))
    return [shard.file for shard in list_shards(partial_folder(path))]


def test_interrupted_set_is_finished_to_the_same_bytes(tmp_path, monkeypatch, sampled):
    expected = make(tmp_path / "whole.npz")
    files = interrupt(tmp_path / "s.npz", monkeypatch)
    assert [file.name[:26] for file in files] == [
        "images-000000000-000000016", "images-000000016-000000032"]  # fmt: skip
    sampled.clear()
    with pytest.raises(UserError, match=r"unfinished set; continue it with --resume"):
        make(tmp_path / "s.npz")
    # Resuming with another batch size gives the same bytes.
    assert make(tmp_path / "s.npz", batch_size=30, resume=True) == expected
    assert sampled == [32]


DAMAGES = {
    "empty": lambda a, b: a.write_bytes(b""),
    "truncated": lambda a, b: os.truncate(a, a.stat().st_size // 2),
    "one bit": lambda a, b: a.write_bytes(a.read_bytes()[:-1] + bytes([a.read_bytes()[-1] ^ 1])),
    "no array": lambda a, b: a.write_bytes(b"text" * 1000),
    "a folder": lambda a, b: (a.unlink(), a.mkdir()),
    "content of another shard": lambda a, b: a.write_bytes(b.read_bytes()),
    "name of another shard": lambda a, b: (a.unlink(), b.rename(
        a.with_name(a.name[:26] + b.name[26:]))),
    "other size": lambda a, b: np.save(a, np.zeros((16, 8, 8, 3), np.uint8)),
    "too many images": lambda a, b: a.rename(
        a.with_name("images-000000000-000000999" + a.name[26:])),
    "overlap": lambda a, b: np.save(
        a.with_name("images-000000008-000000024.npy"), np.zeros((16, 16, 16, 3), np.uint8)),
    "leftover": lambda a, b: (a.parent / ".partial-elsewhere-1-01234567-x.npy").write_text(""),
    "settings": lambda a, b: (a.parent / "settings.json").write_bytes(b"\xff{"),
    "settings of another kind": lambda a, b: (a.parent / "settings.json").write_text("[]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_sampled_again(tmp_path, unfinished, expected, sampled, damage):
    DAMAGES[damage](*continued(unfinished, tmp_path / "s.npz"))
    assert make(tmp_path / "s.npz", labels=FEWER, resume=True) == expected
    harmless = damage in ("leftover", "overlap") or damage.startswith("settings")
    assert sampled[0] == (32 if harmless else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_shards_of_other_settings_are_kept_when_the_settings_are_damaged(tmp_path, unfinished):
    files = continued(unfinished, tmp_path / "s.npz")
    (files[0].parent / "settings.json").write_text("")
    other = replace(SETTINGS, seed=1)
    with pytest.raises(UserError, match=r"settings\.json is damaged, and no shard beside it has"):
        make(tmp_path / "s.npz", settings=other, labels=FEWER, resume=True)
    assert all(file.exists() for file in files)


def test_damage_after_writing_is_found_before_the_set_is_published(tmp_path, monkeypatch, expected):
    write = SetShards.write

    def write_badly(self, start, images):
        write(self, start, images)
        if start == 16:
            DAMAGES["one bit"](list_shards(self.folder)[-1].file, None)

    with monkeypatch.context() as patch:
        patch.setattr(SetShards, "write", write_badly)
        with pytest.raises(UserError, match=r"image 16 .* --resume"):
            make(tmp_path / "s.npz", labels=FEWER)
    assert not (tmp_path / "s.npz").exists()
    assert make(tmp_path / "s.npz", labels=FEWER, resume=True) == expected


def test_gaps_are_filled():
    shards = [Shard(4, 8, Path("a"), None), Shard(10, 11, Path("b"), None)]
    assert missing_batches(shards, 14, 3) == [(0, 3), (3, 4), (8, 10), (11, 14)]


def test_an_output_of_another_process_is_kept(tmp_path, monkeypatch, expected):
    def appear(self, start, images):
        (tmp_path / "s.npz").write_text("precious")
        write(self, start, images)

    write = SetShards.write
    monkeypatch.setattr(SetShards, "write", appear)
    with pytest.raises(UserError, match=r"the finished set is .*s\.npz\.partial/joined"):
        make(tmp_path / "s.npz", labels=FEWER, settings_yaml="seed: 0\n")
    assert (tmp_path / "s.npz").read_text() == "precious"
    assert not (tmp_path / "s.npz.yaml").exists()
    assert (tmp_path / "s.npz.partial" / "joined").read_bytes() == expected


def test_an_interrupted_removal_of_shards_leaves_no_unfinished_set(tmp_path, monkeypatch, expected):
    def stop(path):
        if path.name.endswith("s.npz.partial"):
            raise Stop

    monkeypatch.setattr(module, "remove", stop)
    with pytest.raises(Stop):
        make(tmp_path / "s.npz", labels=FEWER)
    assert (tmp_path / "s.npz").read_bytes() == expected
    assert not partial_folder(tmp_path / "s.npz").exists()


def test_nothing_is_written_over(tmp_path):
    output = tmp_path / "s.npz"
    output.write_text("precious")
    with pytest.raises(UserError, match="exists"):
        make(output)
    assert output.read_text() == "precious"


def test_resuming_with_other_settings_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "join_shards", lambda *arguments: None)
    with pytest.raises(FileNotFoundError):
        make(tmp_path / "s.npz", resume=True)  # starts: there is nothing to continue
    before = (tmp_path / "s.npz.partial" / "settings.json").read_text()
    other = SamplingSettings(num_inference_steps=2, guidance_scale=3.0)
    with pytest.raises(UserError, match=r"guidance_scale was 1\.5, now 3\.0"):
        make(tmp_path / "s.npz", settings=other, resume=True)
    other = SamplingSettings(num_inference_steps=2, scheduler="ddim")
    with pytest.raises(UserError, match="class was 'DDPMScheduler', now 'DDIMScheduler'"):
        make(tmp_path / "s.npz", settings=other, resume=True)
    weights = tiny_pipeline()
    weights.transformer.final_layer.linear.bias.data[0] += 1
    with pytest.raises(UserError, match="transformer was '"):
        make(tmp_path / "s.npz", pipeline=weights, resume=True)
    assert (tmp_path / "s.npz.partial" / "settings.json").read_text() == before
    assert json.loads(before)["num_samples"] == 55


def test_a_full_disk_is_an_error_before_sampling(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": module.SPARE_BYTES + 20_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"s\.npz needs .* MiB are free"):
        make(tmp_path / "s.npz")
    assert not list(tmp_path.iterdir())
