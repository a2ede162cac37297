"""The pipeline compared with stored arrays of the published sampler; saving, labels, caches."""

import subprocess
import sys

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from helpers.models import reference_model, tiny_pipeline, tiny_vae
from helpers.reference_arrays import relative_error

from moh_dit.common.errors import UserError
from moh_dit.diffusion.process import make_scheduler
from moh_dit.pipeline.guidance import Guidance
from moh_dit.pipeline.pipeline import MoHDiTPipeline


@pytest.mark.parametrize("case", ["uniform_heads", "pyramid_heads"])
def test_guidance_on_three_channels_matches_published(case):
    model, _, arrays = reference_model(case)
    half = len(arrays["cfg.x"]) // 2
    latents = arrays["cfg.x"][:half].repeat(2, 1, 1, 1)  # the published guidance uses this half
    with torch.no_grad():
        conditional, null = model(latents, arrays["cfg.t"], arrays["cfg.y"]).sample.chunk(2)
    guided = Guidance(3.0, num_channels=3)(conditional, null, 4)
    assert relative_error(guided, arrays["cfg.out_first3"][:half]) < 1e-8


@pytest.mark.parametrize("case", ["uniform_heads", "pyramid_heads"])
def test_ancestral_sampling_matches_published(case, monkeypatch):
    model, _, arrays = reference_model(case)
    pipeline = MoHDiTPipeline(model, tiny_vae(), make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    noise = iter(arrays["sample.noise"])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(noise)
    )
    seen = []
    latents = pipeline(
        arrays["sample.labels"],
        guidance_scale=2.0,
        num_inference_steps=20,
        latents=arrays["sample.z"],
        output_type="latent",
        callback_on_step_end=lambda p, step, t, tensors: seen.append(t.item()),
    ).images
    assert seen == arrays["sample.timesteps"].tolist()
    assert relative_error(latents, arrays["sample.out"]) < 1e-8


def test_saved_folder_loads_in_a_fresh_process(tmp_path):
    pipeline = tiny_pipeline(["a", "b", "c", "d", "e"])
    pipeline.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    expected = pipeline("b", num_inference_steps=3, generator=torch.Generator().manual_seed(3),
                        output_type="pt").images  # fmt: skip
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import torch
from moh_dit import MoHDiTPipeline
pipeline = MoHDiTPipeline.from_pretrained({str(tmp_path / "saved")!r})
image = pipeline("b", num_inference_steps=3, generator=torch.Generator().manual_seed(3),
                 output_type="pt").images
assert torch.equal(image, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_output_types_and_labels():
    pipeline = tiny_pipeline(["cat", "dog", "eel", "fox", "gnu"])
    assert pipeline.label_ids(["fox", 0, "2", "eel"]) == [3, 0, 2, 2]
    options = dict(num_inference_steps=2, guidance_scale=1.5)
    assert pipeline([0, "dog"], output_type="latent", **options).images.shape == (2, 4, 8, 8)
    images = pipeline([0, "dog"], output_type="np", decode_batch_size=1, **options).images
    assert images.shape == (2, 16, 16, 3)
    assert 0 <= images.min() <= images.max() <= 1
    assert pipeline(1, **options).images[0].size == (16, 16)


def test_latents_stay_float32_in_a_bf16_model():
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    latents = pipeline([0], num_inference_steps=2, output_type="latent").images
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())


def test_generators_make_an_image_independent_of_its_batch():
    pipeline = tiny_pipeline()
    generators = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    options = dict(num_inference_steps=3, output_type="latent")
    pair = pipeline([1, 2], generator=generators(5, 6), **options).images
    alone = pipeline([2], generator=generators(6), **options).images
    assert relative_error(pair[1:], alone) < 1e-5  # a batch of another size rounds differently


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["catt"], {}, "nearest are cat"),
        ([5], {}, "out of range 0 … 4"),
        ([0], dict(num_inference_steps=1001), "1 … 1000"),
        ([0], dict(output_type="jpeg"), "choose one of pil"),
        ([0], dict(latents=torch.zeros(1, 4, 4, 4)), "expected"),
    ],
)
def test_bad_input_is_reported(labels, options, message):
    with pytest.raises(UserError, match=message):
        tiny_pipeline(["cat", "dog", "eel", "fox", "gnu"])(labels, **options)


def test_caches_of_diffusers_skip_blocks_and_are_reset_for_each_call():
    pipeline = tiny_pipeline()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    runs = []
    pipeline.transformer.blocks[1].register_forward_hook(lambda *arguments: runs.append(1))

    def sample():
        runs.clear()
        generator = torch.Generator().manual_seed(0)
        latents = pipeline([1, 2], latents=noise, num_inference_steps=10, generator=generator,
                           guidance_interval=(0.3, 0.8), output_type="latent").images  # fmt: skip
        return latents, len(runs)

    plain, blocks_run = sample()
    assert blocks_run == 10
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample()[0], plain)
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    computed = []
    pipeline.transformer.blocks[2].mlp.register_forward_hook(lambda *a: computed.append(1))
    cached = sample()[0]
    assert len(computed) == 2  # the first guided and the first unguided step
    assert torch.equal(sample()[0], cached)
    pipeline.transformer.disable_cache()
    assert torch.equal(sample()[0], plain)
