"""Head load against the statistics that the layers return, and as exact counts of what was made."""

import numpy as np
import pytest
import torch
from processes import launch
from test_pipeline import tiny_pipeline

from moh_dit.analysis.head_load import HALVES, HeadLoadRecorder
from moh_dit.errors import UserError
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.engine import generate
from moh_dit.transformer import MoHDiTTransformer2DModel

STEPS, TOKENS = 4, 16
PLANS = {0: (2, 1), 1: (3, 2), 2: (4, 2)}  # routed heads and active ones of tiny_pipeline's layers


def record(pipeline, labels, settings=None, indices=None, **options):
    settings = settings or SamplingSettings(num_inference_steps=STEPS, guidance_scale=2.0)
    with HeadLoadRecorder(pipeline.transformer, timestep_ranges=4, **options) as recorder:
        batches = generate(
            pipeline, labels, settings, indices=indices, on_step=recorder.on_step, batch_size=3
        )
        images = np.concatenate([images for _, images in batches])
    return recorder, images


def forward(model, rows):
    """One evaluation of ``rows`` requests at one timestep, guided as the pipeline guides."""
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


def test_rows_that_only_fill_a_batch_do_not_count():
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
    assert np.array_equal(images, plain)  # looking changes nothing
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
        assert load.even(layer) == active / routed


def test_null_half_is_counted_where_guidance_acts():
    settings = SamplingSettings(
        num_inference_steps=STEPS, guidance_scale=2.0, guidance_interval=(0.0, 0.5)
    )
    recorder, _ = record(tiny_pipeline(), [1, 2], settings)
    tokens = recorder.result().tokens[1].sum(0)
    assert (tokens[HALVES.index("conditional")] == 2 * TOKENS).all()
    assert tokens[HALVES.index("null")].tolist() == [2 * TOKENS] * 2 + [0] * 2


def test_maps_hold_what_each_patch_chose():
    pipeline = tiny_pipeline()
    recorder, _ = record(pipeline, [2, 4], map_images=[1], map_steps=[0, 3])
    assert sorted(recorder.maps) == [(1, 0), (1, 3)]
    first, last = recorder.maps[1, 0], recorder.maps[1, 3]
    assert (first.timestep, last.timestep) == (999, 0)
    alone = record(pipeline, [4], indices=[1])[0].result()
    for layer, (routed, active) in PLANS.items():
        assert first.heads[layer].shape == (TOKENS,)
        if active == 1:  # the chosen head is the one of greatest gate
            counted = alone.activated[layer][0, 0, 3]
            assert np.array_equal(np.bincount(first.heads[layer], minlength=routed), counted)
    assert first.latents.shape == last.latents.shape == (4, 8, 8)
    assert not torch.equal(first.latents, last.latents)


def test_a_model_without_routed_heads_is_refused():
    model = MoHDiTTransformer2DModel(sample_size=8, hidden_size=32, depth=2, num_heads=4)
    with pytest.raises(UserError, match="has no routed heads"):
        HeadLoadRecorder(model)


def save_share_of_load(folder, num_processes):
    """Record this process's share of seven images; process 0 writes the sum."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == num_processes
    mine = np.arange(7)[state.process_index :: state.num_processes]
    recorder, _ = record(tiny_pipeline(), (mine % 5).tolist(), indices=mine)
    load = recorder.result()
    if state.is_main_process:
        arrays = {f"activated{layer}": count for layer, count in load.activated.items()}
        arrays |= {f"tokens{layer}": count for layer, count in load.tokens.items()}
        np.savez(folder / f"{num_processes}.npz", classes=load.classes, **arrays)


def test_two_processes_count_what_one_counts(tmp_path):
    for num_processes in (1, 2):
        launch(save_share_of_load, tmp_path, num_processes, num_processes=num_processes)
    one, two = (dict(np.load(tmp_path / f"{count}.npz")) for count in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) == 7
    assert all(np.array_equal(one[key], two[key]) for key in one)
