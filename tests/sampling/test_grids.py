"""Each cell of a sheet shows the image that its labels name."""

import numpy as np
import pytest
from helpers.models import tiny_pipeline
from PIL import Image

from fid_eval import fonts
from moh_dit.common.errors import UserError
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.engine import generate
from moh_dit.sampling.grids import (
    draw_sheet,
    sample_animation,
    sample_grid,
    sample_strip,
)
from moh_dit.sampling.lettering import Lettering
from moh_dit.sampling.output_formats import save_animation
from moh_dit.sampling.sweeps import Axis, parse_axis, sample_sweep

NAMES = ["cat", "dog", "eel", "fox", "gnu"]
SETTINGS = SamplingSettings(num_inference_steps=3)


@pytest.fixture
def cells(monkeypatch):
    """Record the arguments of the last ``draw_sheet``: images, row labels, column labels."""
    drawn = []

    def remember(images, rows, columns=()):
        drawn[:] = images, list(rows), list(columns)
        return draw_sheet(images, rows, columns)

    for module in ("grids", "sweeps"):
        monkeypatch.setattr(f"moh_dit.sampling.{module}.draw_sheet", remember)
    return drawn


def one(label, index, **settings):
    chosen = SamplingSettings(**{"num_inference_steps": 3, **settings})
    return next(generate(tiny_pipeline(), [label], chosen, indices=[index]))[1][0]


def test_grid_has_a_row_per_class(cells):
    sheet = sample_grid(tiny_pipeline(NAMES), SETTINGS, ["fox", 0], 3)
    images, rows, _ = cells
    assert rows == ["fox", "cat"]
    assert images.shape == (2, 3, 16, 16, 3)
    assert np.array_equal(images[1, 2], one(0, 5))
    assert sheet.height == 2 * (64 + 2)


def test_sheet_contains_every_image():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    sheet = np.asarray(draw_sheet(images, ["a", "much longer"], ["x", "y", "z"]))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (64, 64))
    for image in images.reshape(-1, 64, 64, 3):
        assert (windows[:, :, :2, :2] == image[:2, :2, 0]).all(axis=(2, 3)).any()


def test_many_rows_stand_in_blocks_side_by_side():
    images = np.random.default_rng(0).integers(0, 256, (45, 1, 64, 64, 3), np.uint8)
    sheet = draw_sheet(images, [f"class {row}" for row in range(45)])
    assert sheet.width > sheet.height / 2
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet)[..., 0], (64, 2))
    for image in images[:, 0]:
        assert (windows == image[:, :2, 0]).all(axis=(2, 3)).any()


def test_a_sheet_that_is_too_large_is_refused_before_sampling(monkeypatch):
    monkeypatch.setattr("moh_dit.sampling.grids.generate", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(UserError, match="2 rows of 20000 images would be 164 megapixels"):
        sample_grid(tiny_pipeline(NAMES), SETTINGS, ["fox", 0], 20_000)


def test_labels_use_a_font_that_has_their_characters(monkeypatch):
    dejavu, stix = (fonts.font_manager.findfont(name) for name in ("DejaVu Sans", "STIXGeneral"))
    character = chr(min(fonts.characters_of(stix) - fonts.characters_of(dejavu)))
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: [dejavu, stix])
    assert fonts.choose_fonts(["ü собака"]) == [dejavu]
    assert fonts.choose_fonts([f"a{character}"]) == [dejavu, stix]
    letters = Lettering([f"ع{character}"], 20)
    assert [font.path for _, font in letters._parts(f"ع{character}")] == [dejavu, stix]
    with pytest.warns(UserWarning, match="no installed font draws 猫; install"):
        fonts.choose_fonts(["猫"])
    assert letters.fit("two\nlines " + 50 * "a").startswith("two lines aaa")
    assert letters.fit(50 * "a").endswith("a…")


def test_sweep_changes_only_the_swept_settings(cells):
    pipelines = {"transformer": tiny_pipeline(NAMES), "raw": tiny_pipeline(NAMES)}
    pipelines["raw"].transformer.final_layer.linear.bias.data += 1
    rows = Axis("weights", ["transformer", "raw"])
    sample_sweep(pipelines.get, SETTINGS, rows, Axis("class_labels", [1, 4]), class_label=3)
    images, names, columns = cells
    assert (names, columns) == (["transformer", "raw"], ["dog", "gnu"])
    assert np.array_equal(images[0], [one(1, 0), one(4, 0)])
    assert not np.array_equal(images[1], images[0])

    rows, columns = Axis("guidance_scale", [1.0, 2.5]), Axis("scheduler", ["ddim", "unipc"])
    sample_sweep(pipelines.get, SETTINGS, rows, columns, class_label=3)
    images, names, columns = cells
    assert (names, columns) == (["guidance 1", "guidance 2.5"], ["ddim", "unipc"])
    assert np.array_equal(images[1, 0], one(3, 0, guidance_scale=2.5, scheduler="ddim"))

    sample_sweep(pipelines.get, SETTINGS, Axis("seed", [5, 6]), Axis("num_inference_steps", [2, 4]))
    assert np.array_equal(cells[0][1, 1], one(0, 0, seed=6, num_inference_steps=4))
    sample_sweep(pipelines.get, SETTINGS, Axis("seed", [5, 6]), Axis("index", [0, 1, 2]))
    assert np.array_equal(cells[0][0, 2], one(0, 2, seed=5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_scal=1", "did you mean guidance_scale"),
        ("seed", "no values"),
        ("seed=1,x", "values of seed must be whole numbers"),
    ],
)
def test_wrong_sweeps_are_errors(text, message):
    with pytest.raises(UserError, match=message):
        parse_axis(text, lambda values: [])


def test_sweep_is_checked_before_sampling(monkeypatch):
    pipeline = tiny_pipeline(NAMES)
    monkeypatch.setattr("moh_dit.sampling.sweeps.generate", lambda *a, **k: pytest.fail("worked"))
    rows = Axis("num_inference_steps", [2, 2000])
    with pytest.raises(UserError, match="1 … 1000"):
        sample_sweep(lambda name: pipeline, SETTINGS, rows, Axis("index", [0]))
    with pytest.raises(UserError, match="both vary seed"):
        sample_sweep(lambda name: pipeline, SETTINGS, Axis("seed", [1]), Axis("seed", [2]))


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_strip_blends_from_image_0_to_image_1(cells, scheduler):
    settings = SamplingSettings(num_inference_steps=3, scheduler=scheduler)
    sample_strip(tiny_pipeline(NAMES), settings, ["dog", "eel"], 4)
    images, rows, columns = cells
    assert (rows, columns) == (["dog", "eel"], ["0 %", "33 %", "67 %", "100 %"])
    assert np.array_equal(images[0, 0], one(1, 0, scheduler=scheduler))
    # The last image is computed in another row of its unit, which may round differently.
    end = one(2, 1, scheduler=scheduler).astype(int)
    assert abs(images[1, 3] - end).max() <= 1
    steps = np.abs(np.diff(images.astype(int), axis=1)).mean(axis=(2, 3, 4))
    assert (steps > 0).all()


def test_animation_ends_in_the_grid(tmp_path, cells):
    pipeline = tiny_pipeline(NAMES)
    settings = SamplingSettings(num_inference_steps=7)
    frames = sample_animation(pipeline, settings, ["cat", "eel"], 2, frames=5)
    grid = sample_grid(pipeline, settings, ["cat", "eel"], 2)
    assert len(frames) == 5
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(grid))
    assert not np.array_equal(np.asarray(frames[0]), np.asarray(grid))
    for suffix in (".gif", ".webp"):
        save_animation(frames, tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as movie:
            assert movie.n_frames == 5
            assert movie.format == suffix[1:].upper()
