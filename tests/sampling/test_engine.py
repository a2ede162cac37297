"""Noise matches its published values; the bytes of an image do not depend on its batch."""

import numpy as np
import pytest
import torch
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.diffusion.noise import ImageNoise, philox, philox_normal
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.engine import (
    REQUEST,
    denoise_batch,
    evaluation_mode,
    generate,
    images_per_unit,
    plan_units,
    run_in_units,
    to_uint8,
    use_settings,
)

WORD = 0xFFFFFFFF
STEPS = 3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers from the authors' Random123 library
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, WORD << 32 | WORD, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0 << 32 | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox([torch.tensor(word) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_noise_is_standard_normal_and_independent():
    values = philox_normal(3, torch.arange(64), 0, 8, 1024)
    assert abs(values.mean()) < 0.01
    assert abs(values.square().mean() - 1) < 0.01
    assert abs(values.pow(4).mean() - 3) < 0.05
    rows = values.reshape(512, 1024)
    correlation = (rows @ rows.T / 1024).fill_diagonal_(0)
    assert correlation.abs().max() < 0.2  # 6 standard deviations of 1 / √1024


def test_noise_depends_on_seed_index_and_draw_alone():
    noise = ImageNoise(7, [0, 5, 2**40], "cpu")
    draws = [noise.draw((3, 2, 4, 4)) for _ in range(70)]
    alone = ImageNoise(7, [2**40], "cpu")
    assert all(torch.equal(alone.draw((1, 2, 4, 4))[0], draw[2]) for draw in draws)
    other = ImageNoise(8, [2**40], "cpu").draw((1, 2, 4, 4))
    assert len({float(draw[i, 0, 0, 0]) for draw in [*draws, other.expand(3, -1, -1, -1)]
                for i in range(3)}) == 211  # fmt: skip


def test_torch_randn_returns_the_noise_inside_the_block():
    noise = ImageNoise(1, [4, 9], "cpu")
    with noise:
        inside = torch.randn((2, 3, 2, 2), generator=None, dtype=torch.float64)
    assert torch.equal(inside, ImageNoise(1, [4, 9], "cpu").draw((2, 3, 2, 2), torch.float64))


def sampled(pipeline, labels, indices, batch_size, **settings):
    images = np.zeros((len(labels), 16, 16, 3), np.uint8)
    chosen = SamplingSettings(**{"num_inference_steps": STEPS, **settings})
    for positions, part in generate(
        pipeline, labels, chosen, indices=indices, batch_size=batch_size
    ):
        images[positions] = part
    return images


@pytest.mark.parametrize("scheduler", ["ddpm", "sde-dpmsolver++", "euler-ancestral"])
def test_bytes_do_not_depend_on_batch_or_neighbours(scheduler):
    pipeline = tiny_pipeline()
    unit = images_per_unit(pipeline.transformer)
    assert unit > 2  # otherwise no images share a unit below
    labels = [index % 5 for index in range(37)]
    whole = sampled(pipeline, labels, None, 37, scheduler=scheduler)
    for batch_size in (1, 5, 16):
        again = sampled(pipeline, labels[:10], None, batch_size, scheduler=scheduler)
        assert np.array_equal(again, whole[:10])
    # In any order, and beside other classes.
    few = sampled(pipeline, [labels[30], 4, labels[3]], [30, 14, 3], 3, scheduler=scheduler)
    assert np.array_equal(few[[0, 2]], whole[[30, 3]])
    assert not np.array_equal(few[1], few[2])


def test_latents_agree_to_the_last_bit():
    # Rounding to bytes hides small differences of the latents.
    pipeline, settings = tiny_pipeline(), SamplingSettings(num_inference_steps=STEPS)
    chosen, guidance = use_settings(pipeline, settings)
    compute = lambda asked: denoise_batch(chosen, guidance, settings, asked).numpy()  # noqa: E731
    requests = np.zeros(40, REQUEST)
    requests["index"], requests["label"] = np.arange(40), np.arange(40) % 5
    with evaluation_mode(pipeline.transformer):
        whole = run_in_units(pipeline.transformer, compute, requests)
        for some in ([3], [39, 2, 18], list(range(5, 30))):
            part = run_in_units(pipeline.transformer, compute, requests[some])
            assert np.array_equal(part, whole[some])


def test_threads_do_not_change_bytes():
    pipeline, threads = tiny_pipeline(), torch.get_num_threads()
    labels = [index % 5 for index in range(40)]
    images = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            images.append(sampled(pipeline, labels, None, 40))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_batches_of_an_accelerator_have_one_size(monkeypatch):
    pipeline, labels = tiny_pipeline(), [index % 5 for index in range(11)]
    in_units = sampled(pipeline, labels, None, 4)
    monkeypatch.setattr("moh_dit.sampling.engine.runs_in_units", lambda transformer: False)
    sizes = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments: sizes.append(len(arguments[0]))
    )
    in_batches = sampled(pipeline, labels, None, 4)
    assert set(sizes) == {8}  # 4 images, with and without guidance; the last batch is padded
    assert abs(in_batches.astype(int) - in_units.astype(int)).max() <= 1


@pytest.mark.parametrize("in_units", [True, False])
def test_on_step_gets_every_step_of_every_image(monkeypatch, in_units):
    pipeline, labels = tiny_pipeline(), [index % 5 for index in range(11)]
    monkeypatch.setattr("moh_dit.sampling.engine.runs_in_units", lambda transformer: in_units)
    states = {}

    def watch(positions, step, latents):
        rows = zip(positions.tolist(), latents.clone(), strict=True)
        states.update({(position, step): state for position, state in rows if position >= 0})

    settings = SamplingSettings(num_inference_steps=STEPS)
    batches = list(generate(pipeline, labels, settings, batch_size=4, on_step=watch))
    assert states.keys() == {(image, step) for image in range(11) for step in range(STEPS)}
    images = np.concatenate([images for _, images in batches])
    last = torch.stack([states[image, STEPS - 1] for image in range(11)])
    with torch.no_grad():
        decoded = to_uint8(pipeline.decode(last, 1)).astype(int)
    assert abs(decoded - images).max() <= 1


def test_an_exception_in_on_step_ends_the_sampling():
    pipeline, calls = tiny_pipeline(), []

    def stop(positions, step, latents):
        calls.append(step)
        raise InterruptedError

    batches = generate(
        pipeline, [0] * 40, SamplingSettings(num_inference_steps=STEPS), on_step=stop
    )
    with pytest.raises(InterruptedError):
        next(batches)
    assert set(calls) == {0}


def test_units_put_each_image_into_its_row():
    indices = np.array([0, 3, 4, 8, 1, 4])
    units = plan_units(indices, 4)
    assert [unit.tolist() for unit in units] == [[0, 4, -1, 1], [2, -1, -1, -1],
                                                 [3, -1, -1, -1], [5, -1, -1, -1]]  # fmt: skip
    placed = np.concatenate([unit[unit >= 0] for unit in units])
    assert sorted(placed) == list(range(6))


def test_a_model_in_training_keeps_its_mode():
    pipeline = tiny_pipeline()
    pipeline.transformer.train()
    scheduler = pipeline.scheduler
    first = sampled(pipeline, [1, 2], None, 2, scheduler="ddim")
    assert pipeline.transformer.training
    assert pipeline.scheduler is scheduler
    pipeline.transformer.eval()
    assert np.array_equal(first, sampled(pipeline, [1, 2], None, 2, scheduler="ddim"))
    # Training may continue, so no joined copy of the weights may remain.
    assert all(layer.fused_weight is None for layer in pipeline.transformer.routed_layers.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "flow-euler"}, "those that fit are ddpm, ddim, dpmsolver"),
        ({"scheduler": "magic"}, "unknown; those that fit are ddpm"),
        ({"num_inference_steps": 1001}, "1 … 1000"),
        ({"guidance_interval": (0.8, 0.2)}, "low ≤ high"),
        ({"guidance_channels": 5}, "between 1 and 4"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings, message):
    chosen = SamplingSettings(**settings)
    with pytest.raises(UserError, match=message):
        generate(tiny_pipeline(), [0], chosen)
