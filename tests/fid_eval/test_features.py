"""Extract features: streaming, caching, interruption and reading ahead."""

import multiprocessing

import pytest
import torch
from helpers.projection_extractor import Projection, draw, features_of, options
from PIL import Image

from fid_eval import EvaluationError, Evaluator, evaluate
from fid_eval.metrics.adm import frechet_distance_of_features
from fid_eval.sets.loading import CHUNK


def test_streamed_statistics_equal_kept_features(sets):
    (a, _), _ = sets
    many, _ = draw(2 * CHUNK + 30, 3)
    streamed = evaluate(a, many, metrics=["fid"], **options())
    kept = evaluate(a, many, metrics=["fid", "precision"], **options())
    expected = frechet_distance_of_features(features_of(a), features_of(many))
    assert streamed["fd_projection"] == pytest.approx(expected, rel=1e-9)
    assert kept["fd_projection"] == streamed["fd_projection"]


def test_cached_features_are_used_again_also_by_another_container(sets, tmp_path):
    (a, _), (b, _) = sets
    first = evaluate(a, b, cache=tmp_path, **options())
    network = Projection()
    again = evaluate(a, b, cache=tmp_path, **options(extractor=network))
    assert network.images_seen == 0
    assert again.metrics == first.metrics
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])  # damaged files are computed again
    assert evaluate(a, b, cache=tmp_path, **options()).metrics == first.metrics


def test_after_a_kill_only_the_missing_chunks_are_computed(sets, tmp_path):
    (a, _), _ = sets
    many, _ = draw(2 * CHUNK + 9, 4)

    class Dies(Projection):
        def forward(self, images):
            if self.images_seen > CHUNK + 90 + 200:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        evaluate(a, many, cache=tmp_path, **options(extractor=Dies()))
    network = Projection()
    resumed = evaluate(a, many, cache=tmp_path, **options(extractor=network))
    assert network.images_seen == CHUNK + 9  # reference and first chunk are cached
    assert resumed.metrics == evaluate(a, many, **options()).metrics


def test_the_reference_is_computed_once_for_many_sets(sets):
    network = Projection()
    evaluator = Evaluator(sets[0], **options(extractor=network))
    evaluator(sets[1])
    seen = network.images_seen
    evaluator(sets[1])
    assert network.images_seen - seen == len(sets[1][0])


def test_nan_features_are_an_error_that_names_the_image(sets):
    class Broken(Projection):
        def forward(self, images):
            out = super().forward(images)
            out["pool"][3] = torch.nan
            return out

    with pytest.raises(EvaluationError, match=r"features of image 3 .*NaN"):
        evaluate(*sets, **options(extractor=Broken()))


@pytest.fixture
def png_folders(tmp_path, monkeypatch):
    """Make folders of PNG files, which worker processes decode: (reference, samples)."""
    monkeypatch.setattr("fid_eval.sets.readers.PROCESSES_FROM", 1)
    for seed, name in enumerate(("reference", "samples")):
        (tmp_path / name).mkdir()
        for number, image in enumerate(draw(60, seed)[0]):
            Image.fromarray(image).save(tmp_path / name / f"{number:02d}.png")
    return tmp_path / "reference", tmp_path / "samples"


def test_a_set_read_ahead_gives_the_same_numbers(png_folders, sets):
    given = evaluate(*png_folders, **options(metrics=["fid"]))
    arrays = evaluate(draw(60, 0)[0], draw(60, 1)[0], **options(metrics=["fid"]))
    assert given.metrics == arrays.metrics
    assert not multiprocessing.active_children()


def test_reading_ahead_stops_when_its_images_are_not_needed(png_folders):
    reference, samples = png_folders
    evaluator = Evaluator(reference, **options(metrics=["is"]))
    evaluator(samples)  # the Inception Score needs no reference
    assert evaluator.reference.images.ahead is None
    damaged = reference / "30.png"
    content = damaged.read_bytes()
    pixels = content.index(b"IDAT") + 4  # the header stays good
    damaged.write_bytes(content[:pixels] + bytes(20) + content[pixels + 20 :])
    opened = Evaluator(reference, **options(metrics=["fid"])).open(samples)
    with pytest.raises(EvaluationError, match=r"30.png: truncated or damaged"):
        Evaluator(reference, **options(metrics=["fid"]))(opened)
    assert opened.images.ahead is None
    assert not multiprocessing.active_children()
