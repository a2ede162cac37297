"""Caches of diffusers skip blocks, and compute the exact result where they skip none."""

import pytest
import torch
from helpers.fake_graphs import fake_capture as fake_capture
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.pipeline.guidance import Guidance
from moh_dit.pipeline.step_cache import MagnitudeRatios, StepCache

STEPS = 12
EXACT = [StepCache("first-block", 0), StepCache("taylorseer", interval=1), StepCache("magcache", 0)]
SKIPPING = [StepCache("first-block", 0.1), StepCache("taylorseer", interval=3),
            StepCache("magcache", 0.1)]  # fmt: skip


def smooth_pipeline():
    """Return a pipeline whose blocks change slowly with time, as those of a trained model do."""
    pipeline = tiny_pipeline()
    for parameter in pipeline.transformer.t_embedder.parameters():
        parameter.data *= 0.1
    return pipeline


def sample(pipeline, cache=None, mode=False):
    pipeline.graphs.mode = mode
    latents = pipeline([1, 2], num_inference_steps=STEPS, output_type="latent", cache=cache,
                       generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert not pipeline.transformer.is_cache_enabled
    assert not any("forward" in vars(block) for block in pipeline.transformer.blocks)
    return latents


@pytest.mark.parametrize("cache", EXACT, ids=lambda cache: cache.name)
def test_a_cache_that_skips_nothing_is_exact(cache):
    pipeline = smooth_pipeline()
    assert torch.equal(sample(pipeline, cache), sample(pipeline))


@pytest.mark.parametrize("cache", SKIPPING, ids=lambda cache: cache.name)
def test_a_cache_skips_blocks(cache, monkeypatch):
    pipeline, calls = smooth_pipeline(), []
    exact = sample(pipeline)
    mlp = pipeline.transformer.blocks[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x, f=mlp.forward: calls.append(len(x)) or f(x))
    again = [sample(pipeline, cache) for _ in range(2)]
    assert torch.equal(*again)  # nothing remains of the first call
    assert not torch.equal(again[0], exact)
    computed = calls.count(4)  # two images, guided
    assert 0 < computed < 2 * 0.7 * STEPS
    # "magcache" measures its ratios with four images.
    assert calls.count(8) == (2 * STEPS if cache.name == "magcache" else 0)


@pytest.mark.parametrize("cache", SKIPPING, ids=lambda cache: cache.name)
def test_computed_blocks_run_as_graphs(cache, fake_capture):
    pipeline = smooth_pipeline()
    expected = sample(pipeline, cache)
    assert fake_capture.captures == 0
    for _ in range(2):
        assert torch.equal(sample(pipeline, cache, True), expected)
        assert fake_capture.captures == len(pipeline.transformer.blocks)
    sample(pipeline, None, True)
    assert fake_capture.captures == len(pipeline.transformer.blocks) + 1


def test_only_the_blocks_below_the_hooks_are_compiled(monkeypatch):
    cache = SKIPPING[2]  # its hooks disable compilation
    torch._dynamo.reset()  # torch compiles a method for at most eight combinations
    runs, compile = [], torch.compile

    def backend(graph, inputs):
        return lambda *arguments: runs.append(1) or graph(*arguments)

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, dynamic=False, backend=backend))
    pipeline = smooth_pipeline()
    expected = sample(pipeline, cache)
    assert not runs
    for block in pipeline.transformer.blocks:
        block.compile(backend=backend)
    assert torch.equal(sample(pipeline, cache), expected)
    computed = len(runs)
    assert 0 < computed < 0.7 * 3 * STEPS
    runs.clear()
    sample(pipeline)
    assert len(runs) == 3 * STEPS


def test_ratios_are_those_of_diffusers(capsys):
    """diffusers prints the ratios that its own calibration measures."""
    from diffusers import MagCacheConfig

    pipeline = smooth_pipeline()
    with MagnitudeRatios(pipeline.transformer) as measured:
        sample(pipeline)
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    pipeline.transformer.enable_cache(config)
    pipeline([1, 2], num_inference_steps=STEPS, output_type="latent",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    printed = capsys.readouterr().out
    ratios = eval(printed[printed.index("):\n") + 3 :])
    assert len(ratios) == STEPS
    assert measured.values == pytest.approx(ratios, rel=1e-5)


def test_the_model_of_autoguidance_is_cached_too():
    pipeline, weaker = smooth_pipeline(), smooth_pipeline().transformer
    calls = []
    weaker.blocks[1].mlp.register_forward_hook(lambda *a: calls.append(1))
    pipeline([1], num_inference_steps=STEPS, guidance_model=weaker, output_type="latent",
             cache=StepCache("taylorseer", interval=3))  # fmt: skip
    assert 0 < len(calls) < 0.7 * STEPS
    assert not weaker.is_cache_enabled


@pytest.mark.parametrize(
    ("cache", "guidance", "message"),
    [
        (StepCache("teacache"), Guidance(), "choose one of first-block, taylorseer, magcache"),
        (StepCache("first-block", interval=2), Guidance(), "has no interval; give cache_threshold"),
        (StepCache("taylorseer", 0.1), Guidance(), "has no threshold; give cache_interval"),
        (StepCache("taylorseer", interval=0), Guidance(), "must be at least 1"),
        (StepCache("magcache", -1.0), Guidance(), "must be at least 0"),
        (StepCache("magcache"), Guidance(interval=(0.1, 0.7)), "with a guidance_interval"),
    ],
)
def test_settings_that_do_not_fit_are_errors(cache, guidance, message):
    with pytest.raises(UserError, match=message):
        cache.check(tiny_pipeline().transformer, guidance)
