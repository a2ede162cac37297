"""Samplers compared with the exact solution for Gaussian data, guidance, and DiTPipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from helpers.models import ROUTED, randomized, tiny_pipeline, tiny_vae
from helpers.reference_arrays import relative_error

from moh_dit.common.errors import UserError
from moh_dit.diffusion.noise import ImageNoise
from moh_dit.diffusion.process import make_scheduler
from moh_dit.diffusion.samplers import SAMPLERS, named_scheduler, samplers_for
from moh_dit.model.transformer import MoHDiTOutput, MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline

SPREAD = 0.3
CENTRES = torch.tensor([-0.5, 0.8])  # one per class
STOCHASTIC = ("ddpm", "sde-dpmsolver++", "euler-ancestral")
SECOND_ORDER = ("dpmsolver++", "unipc", "heun", "flow-heun", "flow-dpmsolver++", "flow-unipc")


class GaussianModel(MoHDiTTransformer2DModel):
    """Return the exact prediction for latents that follow N(centre of the class, SPREAD²)."""

    def __init__(self, prediction="epsilon"):
        super().__init__(sample_size=8, out_channels=4, hidden_size=4, depth=1, num_heads=1,
                         num_classes=len(CENTRES))  # fmt: skip
        self.prediction = prediction
        alpha_bar = make_scheduler().alphas_cumprod.double()
        self.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        time = float(timestep[0])
        if self.prediction == "flow_prediction":
            signal, noise = 1 - time / 1000, time / 1000
        else:  # between steps, σ as diffusers interpolates it
            sigma = np.interp(time, np.arange(1000), self.sigmas)
            signal, noise = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        centre = CENTRES[class_labels].view(-1, 1, 1, 1).to(hidden_states)
        scaled = (hidden_states - signal * centre) / (signal**2 * SPREAD**2 + noise**2)
        epsilon, latents = noise * scaled, centre + signal * SPREAD**2 * scaled
        predictions = dict(
            epsilon=epsilon,
            sample=latents,
            v_prediction=signal * epsilon - noise * latents,
            flow_prediction=epsilon - latents,
        )
        return MoHDiTOutput(predictions[self.prediction])


def gaussian_pipeline(prediction, sampler):
    if prediction == "flow_prediction":
        trained = FlowMatchEulerDiscreteScheduler()
    else:
        trained = type(make_scheduler()).from_config(
            make_scheduler(learned_variance=False).config, prediction_type=prediction
        )
    pipeline = MoHDiTPipeline(GaussianModel(prediction), tiny_vae(), trained)
    pipeline.scheduler = named_scheduler(sampler, trained)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = [
    (prediction, sampler)
    for prediction in ("epsilon", "v_prediction", "sample", "flow_prediction")
    for sampler in samplers_for(prediction)
]


@pytest.mark.parametrize(("prediction", "sampler"), CASES)
def test_sampler_solves_the_reverse_process(prediction, sampler):
    pipeline = gaussian_pipeline(prediction, sampler)
    labels = [0, 1] * 8
    noise = ImageNoise(0, range(16), "cpu").draw((16, 4, 8, 8))
    latents = pipeline(labels, guidance_scale=1.0, num_inference_steps=60, latents=noise,
                       generator=ImageNoise(1, range(16), "cpu"),
                       output_type="latent").images  # fmt: skip
    centre = CENTRES[labels].view(-1, 1, 1, 1)
    if sampler in STOCHASTIC:
        residual = (latents - centre) / SPREAD
        assert abs(residual.mean()) < 0.06
        assert 0.8 < residual.std() < 1.1  # few steps reduce the spread
        assert abs((residual * noise).mean()) < 0.1  # independent of the initial noise
        return
    # The probability-flow ODE keeps a Gaussian's quantiles.
    signal = 0.0 if prediction == "flow_prediction" else make_scheduler().alphas_cumprod[-1].sqrt()
    start = (noise - signal * centre) / (signal**2 * SPREAD**2 + 1 - signal**2) ** 0.5
    limit = 0.01 if sampler in SECOND_ORDER else 0.05
    assert relative_error(latents, centre + SPREAD * start) < limit


def test_the_cases_contain_every_sampler():
    assert {sampler for _, sampler in CASES} == set(SAMPLERS)


@pytest.mark.parametrize("name", samplers_for("epsilon"))
def test_learned_variance_model_runs_under_every_sampler(name):
    pipeline = tiny_pipeline()
    pipeline.scheduler = named_scheduler(name, pipeline.scheduler)
    latents = pipeline([1], num_inference_steps=4, output_type="latent").images
    assert torch.isfinite(latents).all()


def test_a_scheduler_made_from_the_config_of_the_trained_one():
    # It inherits variance_type="learned_range", with which diffusers' own step fails.
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    latents = pipeline([1], num_inference_steps=4, output_type="latent").images
    assert torch.isfinite(latents).all()


def test_scheduler_of_another_process_is_an_error():
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="those that fit are DDPMScheduler, DDIMScheduler"):
        pipeline([0])
    flow = gaussian_pipeline("flow_prediction", "flow-euler")
    flow.scheduler = EulerDiscreteScheduler()
    with pytest.raises(UserError, match="predicts epsilon, this model predicts flow_prediction"):
        flow([0])


def test_what_the_model_predicts_is_saved(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = MoHDiTPipeline.from_pretrained(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="predicts epsilon"):
        loaded([0])


def test_guidance_interval_guides_inside_it_only():
    pipeline, batches = tiny_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments: batches.append((float(arguments[1][0]), len(arguments[0])))
    )
    options = dict(num_inference_steps=10, output_type="latent", guidance_scale=3.0)
    run = lambda **more: pipeline([1], generator=torch.Generator().manual_seed(0),  # noqa: E731
                                  **options, **more).images  # fmt: skip
    limited = run(guidance_interval=(0.25, 0.7))
    assert batches == [(t, 2 if 250 <= t <= 700 else 1) for t, _ in batches]
    assert {size for _, size in batches} == {1, 2}
    assert torch.equal(run(guidance_interval=(0.0, 1.0)), run())
    assert not torch.equal(limited, run())


def test_autoguidance_extrapolates_from_the_weaker_model():
    pipeline = tiny_pipeline()
    weak = randomized(ROUTED).eval()
    torch.nn.init.normal_(weak.final_layer.linear.weight)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler = named_scheduler("ddim", pipeline.scheduler)
    run = lambda **more: pipeline([1], latents=noise, num_inference_steps=1,  # noqa: E731
                                  output_type="latent", **more).images  # fmt: skip
    one = run(guidance_scale=1.0)
    alone = pipeline.transformer
    pipeline.transformer = weak
    zero = run(guidance_scale=1.0)
    pipeline.transformer = alone
    # A single DDIM step is affine in the prediction, so guidance extrapolates its result.
    guided = run(guidance_scale=2.5, guidance_model=weak)
    assert relative_error(guided, zero + 2.5 * (one - zero)) < 1e-4
    with pytest.raises(UserError, match="guidance_model has num_classes 3, but the model has 5"):
        run(guidance_model=randomized(ROUTED | dict(num_classes=3)))


def test_autoencoder_of_other_latents_is_an_error():
    pipeline = tiny_pipeline()
    other = MoHDiTPipeline(pipeline.transformer, AutoencoderKL(latent_channels=8), make_scheduler())
    with pytest.raises(UserError, match="8 latent channels, the transformer 4"):
        other([0])


def test_model_in_diffusers_own_pipeline():
    # DiTPipeline supports 1000 classes, a fixed variance, and one generator for all images.
    model = randomized(ROUTED | dict(num_classes=1000)).eval()
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    options = dict(num_inference_steps=5, guidance_scale=2.0)
    images = []
    for kind, output_type in ((DiTPipeline, "np"), (MoHDiTPipeline, "np")):
        pipeline = kind(transformer=model, vae=tiny_vae(), scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = pipeline([7, 970], generator=generator, output_type=output_type, **options)
        images.append(result.images)
    np.testing.assert_allclose(images[0], images[1], atol=1e-4)


def test_compiled_model_is_compiled_for_two_shapes():
    pipeline, programs = tiny_pipeline(), []
    options = dict(num_inference_steps=8, guidance_interval=(0.2, 0.7), output_type="latent")
    run = lambda: pipeline([0, 1, 2], generator=ImageNoise(0, range(3), "cpu"),  # noqa: E731
                           **options).images  # fmt: skip
    expected = run()
    pipeline.transformer.compile(
        backend=lambda graph, inputs: programs.append(graph) or graph, fullgraph=True, dynamic=False
    )
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    assert len(programs) == 2  # with guidance and without
