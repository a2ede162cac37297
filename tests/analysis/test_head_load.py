"""Compare head load with the statistics of the layers and with exact counts."""

import functools
import json

import numpy as np
import pytest
import torch
from helpers.models import tiny_pipeline
from helpers.processes import launch
from PIL import Image

from moh_dit.analysis.config import HeadLoadConfig
from moh_dit.analysis.head_load import HALVES, HeadLoadRecorder
from moh_dit.analysis.head_load_figures import (
    OPACITY,
    class_bars,
    class_map,
    head_colors,
    layer_map,
    overlay_heads,
    timestep_map,
    to_bytes,
)
from moh_dit.analysis.measure_head_load import measure_head_load
from moh_dit.common.cli import load_config
from moh_dit.common.errors import UserError
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.engine import generate

STEPS, TOKENS = 4, 16
FIGURES = ("class-bars", "class-map", "layer-map", "timestep-map")
FILES = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")} | {
    "head_load.json", "head-maps.png", "settings.yaml"
}  # fmt: skip
PLANS = {
    0: (2, 1),
    1: (3, 2),
    2: (4, 2),
}  # (routed, active) heads of tiny_pipeline's layers


def record(pipeline, labels, settings=None, indices=None, **options):
    settings = settings or SamplingSettings(num_inference_steps=STEPS, guidance_scale=2.0)
    with HeadLoadRecorder(pipeline.transformer, timestep_ranges=4, **options) as recorder:
        batches = generate(
            pipeline, labels, settings, indices=indices, on_step=recorder.on_step, batch_size=3
        )
        images = np.concatenate([images for _, images in batches])
    return recorder, images


def forward(model, rows):
    """Evaluate ``rows`` requests at one timestep, with guidance as in the pipeline."""
    torch.manual_seed(0)
    latents, labels = torch.randn(8, 4, 8, 8)[rows], torch.arange(8)[rows] % 5
    null = torch.full_like(labels, model.null_class)
    timestep = torch.tensor(600).expand(2 * len(labels))
    with torch.no_grad():
        return model(torch.cat([latents] * 2), timestep, torch.cat([labels, null]))


def test_shares_are_the_loads_that_the_layers_return():
    model = tiny_pipeline().transformer.train()
    with HeadLoadRecorder(model) as recorder:
        stats = forward(model, slice(None)).router_stats
        recorder.on_step(np.arange(8), 0, torch.zeros(8, 4, 8, 8))
    load = recorder.result()
    for layer, (f, _) in zip(load.layers, stats, strict=True):
        assert np.allclose(load.share(layer), f, atol=1e-6)
        assert np.allclose(load.share(layer, "timestep")[6], f, atol=1e-6)
        assert np.isnan(load.share(layer, "timestep")[5]).all()


def test_padding_does_not_count():
    model = tiny_pipeline().transformer.train()
    with HeadLoadRecorder(model) as recorder:
        forward(model, slice(None))
        recorder.on_step(np.array([0, 1, 2, 3, 4, -1, -1, -1]), 0, torch.zeros(8, 4, 8, 8))
    load = recorder.result()
    stats = forward(model, slice(5)).router_stats
    for layer, (f, _) in zip(load.layers, stats, strict=True):
        assert np.allclose(load.share(layer), f, atol=1e-6)


def test_every_token_of_every_image_is_counted_once():
    pipeline, labels = tiny_pipeline(), [0, 3, 3, 1, 3, 0, 3]
    settings = SamplingSettings(num_inference_steps=STEPS, guidance_scale=2.0)
    plain = np.concatenate([images for _, images in generate(pipeline, labels, settings)])
    recorder, images = record(pipeline, labels)
    assert np.array_equal(images, plain)  # recording does not change the images
    assert not pipeline.transformer._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in pipeline.transformer.modules())
    load = recorder.result()
    assert load.classes == [0, 1, 3]
    counts = np.array([2, 1, 4])[:, None, None]
    for layer, (routed, active) in PLANS.items():
        # One of the four steps (t = 999, 666, 333, 0) in each range, with and without the class.
        assert np.array_equal(load.tokens[layer], np.tile(counts * TOKENS, (1, 2, 4)))
        assert load.activated[layer].shape == (3, 2, 4, routed)
        assert np.array_equal(load.activated[layer].sum(-1), active * load.tokens[layer])
        assert np.allclose(load.share(layer, "class", "half").sum(-1), active)
        assert load.balanced_share(layer) == active / routed


def test_a_compiled_model_is_recorded_too():
    plain = record(tiny_pipeline(), [1, 4])[0].result()
    pipeline = tiny_pipeline()
    pipeline.transformer.compile(backend="eager")
    for _ in generate(pipeline, [1, 4], SamplingSettings(num_inference_steps=1)):
        pass  # compiles the model without hooks
    load = record(pipeline, [1, 4])[0].result()
    for layer, counts in plain.activated.items():
        assert np.array_equal(load.activated[layer], counts)


def test_null_half_is_counted_only_inside_the_guidance_interval():
    settings = SamplingSettings(
        num_inference_steps=STEPS, guidance_scale=2.0, guidance_interval=(0.0, 0.5)
    )
    recorder, _ = record(tiny_pipeline(), [1, 2], settings)
    tokens = recorder.result().tokens[1].sum(0)
    assert (tokens[HALVES.index("conditional")] == 2 * TOKENS).all()
    assert tokens[HALVES.index("null")].tolist() == [2 * TOKENS] * 2 + [0] * 2


def test_maps_hold_the_head_of_each_patch():
    pipeline = tiny_pipeline()
    recorder, _ = record(pipeline, [2, 4], map_images=[1], map_steps=[0, 3])
    assert sorted(recorder.maps) == [(1, 0), (1, 3)]
    first, last = recorder.maps[1, 0], recorder.maps[1, 3]
    assert (first.timestep, last.timestep) == (999, 0)
    alone = record(pipeline, [4], indices=[1])[0].result()
    for layer, (routed, active) in PLANS.items():
        assert first.heads[layer].shape == (TOKENS,)
        if active == 1:  # the active head is the one with the greatest gate
            counted = alone.activated[layer][0, 0, 3]
            assert np.array_equal(np.bincount(first.heads[layer], minlength=routed), counted)
    assert first.latents.shape == last.latents.shape == (4, 8, 8)
    assert not torch.equal(first.latents, last.latents)


def test_a_model_without_routed_heads_is_refused():
    model = MoHDiTTransformer2DModel(sample_size=8, hidden_size=32, depth=2, num_heads=4)
    with pytest.raises(UserError, match="has no routed heads"):
        HeadLoadRecorder(model)


def measure(checkpoint, output, **options):
    measure_head_load(
        HeadLoadConfig(
            checkpoint=str(checkpoint),
            output=str(output),
            **dict(num_inference_steps=STEPS, guidance_scale=2.0, device="cpu", batch_size=3),
            **options,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline(["cat", "dog", "eel", "fox", "gnu"]).save_pretrained(folder)
    return folder


def test_two_processes_find_what_one_finds(saved, tmp_path):
    options = dict(class_labels="fox,cat", images_per_class=3, map_images=2, map_steps=2)
    measure(saved, tmp_path / "1", **options)
    launch(functools.partial(measure, **options), saved, tmp_path / "2", num_processes=2)
    one, two = (json.loads((tmp_path / n / "head_load.json").read_text()) for n in "12")
    assert one["head_load"] == two["head_load"]
    assert one["transformer_sha256"] == two["transformer_sha256"]
    assert [c["name"] for c in one["head_load"]["classes"]] == ["cat", "fox"]
    layer = one["head_load"]["layers"]["2"]
    assert np.sum(layer["tokens_by_class_half_timestep"]) == 6 * STEPS * 2 * TOKENS
    shares = np.array(layer["share_by_class_half_timestep"], float)
    assert shares.shape == (2, 2, 10, 4)
    assert np.isnan(shares).any(-1).sum() == 2 * 2 * (10 - STEPS)
    assert np.allclose(np.nansum(shares[..., 9, :], -1), layer["active_routed_heads"], atol=1e-5)
    for n in "12":
        assert {path.name for path in (tmp_path / n).iterdir()} == FILES
    sheets = [np.asarray(Image.open(tmp_path / n / "head-maps.png")) for n in "12"]
    assert np.array_equal(*sheets)
    assert load_config(HeadLoadConfig, tmp_path / "1" / "settings.yaml").class_labels == "fox,cat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layer=7), "layer 7 has no routed heads; give one of 0, 1, 2"),
        (dict(class_labels="cta"), "the nearest are cat"),
        (dict(timestep_ranges=0), "timestep_ranges is 0; it must be at least 1"),
        (dict(images_per_class=0), "images_per_class is 0; it must be at least 1"),
        (dict(cache="taylorseer"), "cache skips layers, whose head load cannot be counted"),
    ],
)
def test_mistakes_leave_nothing(saved, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        measure(saved, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(saved, tmp_path):
    with pytest.raises(UserError, match="exists"):
        measure(saved, tmp_path)


def test_patches_have_the_colour_of_their_head():
    heads = np.array([0, 1, 2, 0])
    shown = overlay_heads(np.full((32, 32, 3), 100, np.uint8), heads, 3)
    assert shown.shape == (128, 128, 3)
    expected = (1 - OPACITY) * 100 + OPACITY * head_colors(3)[heads]
    assert np.abs(shown[[10, 10, 90, 90], [10, 90, 10, 90]] - expected).max() <= 0.5


def test_figures_show_the_shares():
    load = record(tiny_pipeline(), [0, 3])[0].result()
    names = ["$x^{", "Gesichter ü"]
    bars = class_bars(load, names, 2).axes
    assert [axis.get_title() for axis in bars] == names
    for figure in (class_bars(load, names, 2), class_map(load, names, 2)):
        assert all(name in to_bytes(figure, "svg").decode() for name in names)
    heights = [[bar.get_height() for bar in axis.patches] for axis in bars]
    assert np.allclose(heights, load.share(2, "class", "half")[:, HALVES.index("conditional")])
    assert [label.get_text() for label in bars[0].get_xticklabels()] == ["0", "1", "2", "3"]
    (shown,) = layer_map(load).axes[0].images
    first = load.num_shared[1] - min(load.num_shared.values())
    row = shown.get_array().filled(np.nan)[1]
    assert np.allclose(row[first : first + 3], load.share(1, "half")[0])
    assert np.isnan(row).sum() == len(row) - 3  # the layer has three routed heads
    figure = timestep_map(load, 1)
    null = load.share(1, "half", "timestep")[1]
    assert np.allclose(figure.axes[1].images[0].get_array(), null[::-1])
    assert to_bytes(figure, "svg") == to_bytes(timestep_map(load, 1), "svg")
