"""The model behaves like the models of diffusers (its ModelTesterMixin checks the same)."""

import copy

import pytest
import torch
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from helpers.models import ROUTED, SMALL, randomized

from moh_dit.model.transformer import MoHDiTTransformer2DModel

CONFIGS = pytest.mark.parametrize("config", [SMALL, ROUTED], ids=["dense", "moh"])


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, 4, 8, 8, generator=generator),
        timestep=torch.tensor([999, 3])[:batch],
        class_labels=torch.tensor([1, 5])[:batch],
    )


@torch.no_grad()
def output(model):
    return model(**inputs()).sample


def same_parameters(one, other):
    others = dict(other.named_parameters())
    return all(torch.equal(value, others[name]) for name, value in one.named_parameters())


@CONFIGS
@pytest.mark.parametrize(
    "options",
    [{}, dict(variant="fp16"), dict(max_shard_size="20KB"), dict(safe_serialization=False)],
    ids=["plain", "variant", "shards", "pickle"],
)
def test_a_saved_model_computes_the_same(config, options, tmp_path):
    model = randomized(config).eval()
    model.save_pretrained(tmp_path, **options)
    loading = {key: value for key, value in options.items() if key == "variant"}
    loaded = MoHDiTTransformer2DModel.from_pretrained(tmp_path, **loading)
    assert not loaded.training
    assert same_parameters(model, loaded)
    torch.testing.assert_close(output(loaded), output(model))
    if "variant" in options:
        with pytest.raises(OSError, match="no file named"):
            MoHDiTTransformer2DModel.from_pretrained(tmp_path)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_model_in_half_precision_keeps_its_dtype(config, dtype, low_cpu_mem_usage, tmp_path):
    model = randomized(config).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MoHDiTTransformer2DModel.from_pretrained(
        tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, dtype=dtype
    )
    assert loaded.dtype == dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert same_parameters(model, loaded)


def test_a_change_of_dtype_prints_nothing(capfd):
    randomized(SMALL).to(torch.bfloat16)
    randomized(SMALL).to("cpu", dtype=torch.float16)
    assert capfd.readouterr() == ("", "")


@CONFIGS
def test_outputs_are_deterministic_and_equal_as_tuple_and_by_name(config):
    model = randomized(config).eval()
    assert torch.equal(output(model), output(model))
    with torch.no_grad():
        (as_tuple,) = model(**inputs(), return_dict=False)
    assert torch.equal(as_tuple, output(model))


@CONFIGS
def test_training_with_ema_and_gradient_checkpointing(config):
    model = randomized(config).train()
    checkpointed = copy.deepcopy(model)
    assert not model.is_gradient_checkpointing
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    average = EMAModel(model.parameters())
    for each in (model, checkpointed):
        each(**inputs()).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in checkpointed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    average.step(model.parameters())


@CONFIGS
def test_layerwise_casting_stores_weights_in_eight_bits(config):
    model = randomized(config).eval()
    expected = output(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    assert (output(model) - expected).norm() < 0.2 * expected.norm()


def test_from_config_and_repr_of_a_loaded_model(tmp_path):
    model = randomized(ROUTED)
    model.save_pretrained(tmp_path)
    again = MoHDiTTransformer2DModel.from_config(MoHDiTTransformer2DModel.load_config(tmp_path))
    assert {key: again.config[key] for key in ROUTED} == ROUTED
    assert "MoHAttention" in repr(again)
    with pytest.raises(Exception, match="MoHDiTTransformer2DModel"):
        AutoModel.from_pretrained(tmp_path)  # without its code, diffusers cannot know the class


def test_device_map_on_the_cpu(tmp_path):
    model = randomized(ROUTED).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = MoHDiTTransformer2DModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(output(loaded), output(model))
