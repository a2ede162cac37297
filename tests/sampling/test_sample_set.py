"""Sets have exactly the requested size and the same bytes after any interruption."""

import json

import numpy as np
import pytest
import yaml
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.sampling import sample_set as module
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.sample_set import list_shards, missing_batches, sample_set, set_labels

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=1.5)
LABELS = set_labels(55, range(5), "balanced", 0)


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


def test_interrupted_set_is_finished_to_the_same_bytes(tmp_path, monkeypatch):
    expected = make(tmp_path / "whole.npz")
    written: list[int] = []

    def stop_after_two(partial, start, images):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(start)
        write_shard(partial, start, images)

    write_shard = module.write_shard
    monkeypatch.setattr(module, "write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s.npz")
    monkeypatch.setattr(module, "write_shard", lambda p, s, i: written.append(s) or
                        write_shard(p, s, i))  # fmt: skip
    assert [shard[:2] for shard in list_shards(tmp_path / "s.npz.partial")] == [(0, 16), (16, 32)]
    with pytest.raises(UserError, match=r"unfinished set; continue it with --resume"):
        make(tmp_path / "s.npz")
    # Resuming with another batch size gives the same bytes.
    assert make(tmp_path / "s.npz", batch_size=30, resume=True) == expected
    assert written == [0, 16, 32]


def test_gaps_are_filled(tmp_path):
    for start, stop in [(4, 8), (10, 11)]:
        module.write_shard(tmp_path, start, np.zeros((stop - start, 2, 2, 3), np.uint8))
    assert missing_batches(tmp_path, 14, 3) == [(0, 3), (3, 4), (8, 10), (11, 14)]


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
