"""The pipeline behaves like those of diffusers (its PipelineTesterMixin checks the same)."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import PipelineCallback
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.pipeline.pipeline import MoHDiTPipeline

NAMES = ["cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def pipeline():
    return tiny_pipeline(NAMES)


def run(pipeline, labels=(1,), **options):
    options = dict(num_inference_steps=3, output_type="np") | options
    generator = torch.Generator().manual_seed(0)
    return pipeline(labels, **(dict(generator=generator) | options))[0]


def test_the_call_takes_the_arguments_of_diffusers():
    expected = {"class_labels", "guidance_scale", "num_inference_steps", "num_images_per_prompt"}
    expected |= {"generator", "latents", "output_type", "return_dict", "callback_on_step_end"}
    expected |= {"callback_on_step_end_tensor_inputs"}
    assert expected <= inspect.signature(MoHDiTPipeline.__call__).parameters.keys()


@pytest.mark.parametrize(
    "labels",
    [[[1], [2]], [torch.tensor([1, 2])], torch.tensor([[1], [2]]), [["dog"], [2]],
     np.array([1, 2]), [torch.tensor(1), "eel"], ([1, 2],)],
)  # fmt: skip
def test_labels_may_be_nested(labels, pipeline):
    assert np.array_equal(run(pipeline, labels), run(pipeline, [1, 2]))


def test_several_images_of_each_label(pipeline):
    images = run(pipeline, [1, 2], num_images_per_prompt=3)
    assert images.shape == (6, 16, 16, 3)
    assert np.array_equal(images, run(pipeline, [1, 1, 1, 2, 2, 2]))


def test_a_batch_gives_the_images_of_single_calls(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = run(pipeline, [[1], [2]], generator=generators)
    single = run(pipeline, [2], generator=[torch.Generator().manual_seed(6)])
    np.testing.assert_allclose(both[1:], single, atol=1e-4)


def test_tuple_and_named_output_are_equal(pipeline):
    named = pipeline([1], generator=torch.Generator().manual_seed(0), num_inference_steps=3,
                     output_type="np").images  # fmt: skip
    assert np.array_equal(named, run(pipeline, [1], return_dict=False))


def test_components_make_another_pipeline(pipeline):
    again = MoHDiTPipeline(**pipeline.components, class_names=NAMES)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(run(again), run(pipeline))


@pytest.mark.parametrize("options", [{}, dict(variant="fp16"), dict(safe_serialization=False)])
def test_saved_pipelines_generate_the_same(options, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, **options)
    loading = {key: value for key, value in options.items() if key == "variant"}
    loaded = MoHDiTPipeline.from_pretrained(tmp_path, **loading)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(run(loaded), run(pipeline), atol=1e-4)


def test_a_missing_variant_is_an_error(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=no"):
        MoHDiTPipeline.from_pretrained(tmp_path, variant="no")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_prints_nothing_and_survives_saving(dtype, pipeline, tmp_path, capfd):
    assert pipeline.to(dtype).dtype == dtype
    assert capfd.readouterr() == ("", "")
    pipeline.save_pretrained(tmp_path)
    loaded = MoHDiTPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.transformer.dtype == loaded.vae.dtype == dtype
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(run(loaded), run(pipeline), atol=1e-2)


def test_a_dtype_for_each_component(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = MoHDiTPipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float16


def test_another_scheduler_may_be_given_when_loading(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    loaded = MoHDiTPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    assert type(loaded.scheduler) is DDIMScheduler


# ------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("names", [["latents"], []])
def test_callbacks_get_the_tensors_that_they_ask_for(names, pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, list(tensors)))
        return tensors

    run(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(step, names) for step in range(3)]
    with pytest.raises(UserError, match="contains 'prompt_embeds'"):
        run(pipeline, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_callbacks_change_latents(pipeline):
    def callback(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert run(pipeline, callback_on_step_end=callback, output_type="latent").abs().sum() == 0


def test_callbacks_change_the_guidance_scale(pipeline):
    batches = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, given: batches.append(len(given[0]))
    )

    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0

    run(pipeline, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps
    batches.clear()

    def turn_off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0

    run(pipeline, guidance_scale=2.0, callback_on_step_end=turn_off)
    assert batches == [2, 1, 1]  # without guidance, the null class is not evaluated


def test_callbacks_interrupt_the_process(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1

    run(pipeline, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipeline.interrupt
    run(pipeline)
    assert not pipeline.interrupt


def test_callback_objects_of_diffusers(pipeline):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012 - as diffusers writes it

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
            return callback_kwargs

    callback = Zero(cutoff_step_ratio=1.0)
    latents = run(pipeline, callback_on_step_end=callback, output_type="latent")
    assert latents.abs().sum() == 0
