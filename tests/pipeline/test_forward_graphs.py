"""Forward passes by graphs equal those without, also after the model was changed."""

import copy
import logging

import pytest
import torch
from helpers.fake_graphs import fake_capture as fake_capture
from helpers.models import tiny_pipeline

from moh_dit.common.errors import UserError
from moh_dit.pipeline.forward_graphs import ForwardGraphs
from moh_dit.pipeline.pipeline import MoHDiTPipeline


def sample(pipeline, mode, steps=6, labels=(1, 2), **options):
    pipeline.graphs.mode = mode
    return pipeline(
        list(labels), num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
        output_type="latent", **options,
    ).images  # fmt: skip


def test_graphs_give_the_same_latents(fake_capture):
    pipeline = tiny_pipeline()
    options = dict(guidance_interval=(0.3, 0.8), steps=10)
    expected = sample(pipeline, False, **options)
    assert fake_capture.captures == 0
    assert torch.equal(sample(pipeline, "auto", **options), expected)
    assert fake_capture.captures == 2  # guided and unguided steps
    assert fake_capture.replays == 10 - 2  # the first step of each kind warms up
    assert torch.equal(sample(pipeline, True, **options), expected)
    assert (fake_capture.captures, fake_capture.replays) == (2, 18)
    pipeline.graphs.release()
    assert torch.equal(sample(pipeline, "auto", **options), expected)
    assert fake_capture.captures == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.x_embedder.proj.bias.data.add_(0.5),
        lambda model: setattr(model.blocks[1].mlp.fc1, "bias", None),
        lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        lambda model: setattr(model.blocks[0].mlp.fc2.weight, "data",
                              2 * model.blocks[0].mlp.fc2.weight.data),
        lambda model: setattr(model.blocks, "0", copy.deepcopy(model.blocks[2])),
        lambda model: model.blocks[1].register_forward_hook(lambda *a: a[2] * 2),
        lambda model: setattr(model.blocks[1].mlp, "fc1", Adapter(model.blocks[1].mlp.fc1)),
    ],
)  # fmt: skip
def test_a_changed_model_gives_no_stale_results(fake_capture, change):
    pipeline = tiny_pipeline()
    before = sample(pipeline, "auto")
    change(pipeline.transformer)
    after = sample(pipeline, "auto")
    assert torch.equal(after, sample(pipeline, False))
    assert not torch.equal(after, before)


class Adapter(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, 1.5

    def forward(self, x):
        return self.layer(x) * self.scale


def test_a_change_between_two_steps_takes_effect_at_once(fake_capture):
    def change(pipeline, step, timestep, tensors):
        if step == 3:
            pipeline.transformer.final_layer.linear = torch.nn.Linear(32, 32).requires_grad_(False)
            torch.nn.init.constant_(pipeline.transformer.final_layer.linear.weight, 0.01)
            torch.nn.init.zeros_(pipeline.transformer.final_layer.linear.bias)

    results = []
    for mode in (False, "auto"):
        pipeline = tiny_pipeline()
        results.append(sample(pipeline, mode, callback_on_step_end=change))
    assert torch.equal(*results)


def test_adapters_and_hooks_run_without_graphs_or_are_an_error(fake_capture):
    pipeline = tiny_pipeline()
    pipeline.transformer.blocks[1].mlp.fc1 = Adapter(pipeline.transformer.blocks[1].mlp.fc1)
    sample(pipeline, "auto")
    assert fake_capture.captures == 0
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1 is a Adapter of another package"):
        sample(pipeline, True)
    pipeline = tiny_pipeline()
    pipeline.transformer.blocks[0].attn.register_forward_hook(lambda *a: None)
    with pytest.raises(UserError, match=r"true, but blocks\.0\.attn has a hook"):
        sample(pipeline, True)


def test_other_settings_need_another_graph(fake_capture):
    torch.set_float32_matmul_precision("highest")  # training in the same process may change it
    pipeline = tiny_pipeline()
    sample(pipeline, "auto")
    pipeline.transformer.set_mlp_backend("reference")
    sample(pipeline, "auto")
    assert fake_capture.captures == 2
    torch.set_float32_matmul_precision("high")
    try:
        sample(pipeline, "auto")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert fake_capture.captures == 3
    with torch.inference_mode():
        sample(pipeline, "auto")
    assert fake_capture.captures == 4
    sample(pipeline, "auto")
    replays = fake_capture.replays
    torch.set_autocast_enabled("cuda", True)
    try:
        sample(pipeline, "auto")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert (fake_capture.captures, fake_capture.replays) == (4, replays)


def test_at_most_four_shapes_are_kept(fake_capture):
    pipeline = tiny_pipeline()
    for count in range(1, 7):
        sample(pipeline, "auto", steps=3, labels=[0] * count)
    assert len(pipeline.graphs._shared) == 4
    sample(pipeline, "auto", steps=3, labels=[0])
    assert fake_capture.captures == 7


def test_the_model_of_autoguidance_has_a_graph_of_its_own(fake_capture):
    pipeline = tiny_pipeline()
    weaker = copy.deepcopy(pipeline.transformer)
    weaker.x_embedder.proj.weight.data *= 0.9
    expected = sample(pipeline, False, guidance_model=weaker)
    assert torch.equal(sample(pipeline, "auto", guidance_model=weaker), expected)
    assert (fake_capture.captures, len(pipeline.graphs._shared)) == (2, 1)


def test_a_failed_capture_is_one_line_and_sampling_goes_on(fake_capture, caplog):
    def fail(function, pool):
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    pipeline = tiny_pipeline()
    expected = sample(pipeline, False)
    pipeline.graphs = ForwardGraphs("auto", fail)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(pipeline, "auto"), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graphs are off, because the capture failed: CUDA error: operation not permitted when "
        "stream is capturing"
    ]
    pipeline.graphs = ForwardGraphs(True, fail)
    with pytest.raises(UserError, match="but the capture failed"):
        sample(pipeline, True)


def test_copies_and_saved_pipelines_have_no_graphs(fake_capture, tmp_path):
    pipeline = tiny_pipeline()
    expected = sample(pipeline, "auto")
    assert torch.equal(sample(copy.deepcopy(pipeline), "auto"), expected)
    pipeline.save_pretrained(tmp_path)
    loaded = MoHDiTPipeline.from_pretrained(tmp_path)
    assert loaded.graphs.mode == "auto"


def test_graphs_need_a_gpu():
    with pytest.raises(UserError, match="the device is cpu, not an NVIDIA GPU"):
        sample(tiny_pipeline(), True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_bits_with_and_without_graphs(dtype):
    """A graph launches the same kernels, with the same launch settings, on the same values."""
    pipeline = tiny_pipeline()
    pipeline.transformer.to("cuda", dtype)
    pipeline.vae.to("cuda")
    options = dict(num_inference_steps=10, guidance_interval=(0.3, 0.8), output_type="latent")
    latents = []
    for pipeline.graphs.mode in (False, True, True):
        generator = torch.Generator("cuda").manual_seed(0)
        latents.append(pipeline([1, 2], generator=generator, **options).images)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
