"""Write checkpoints in the formats of other projects, and damage files."""

import json

import torch
from diffusers import DiTTransformer2DModel
from helpers.models import tiny_vae

from moh_dit.diffusion.process import make_scheduler

INPUTS = (torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 5]))


def peer(eps=1e-6):
    """Return diffusers' DiT with random weights and equal embedders in all blocks."""
    torch.manual_seed(1)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_eps=eps,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@torch.no_grad()
def output(model):
    return model(*INPUTS).sample


def diffusers_pipeline(folder):
    """Write a folder like facebook/DiT-XL-2-256: old class name, .bin weights, id2label."""
    peer().save_pretrained(folder / "transformer", safe_serialization=False)
    config = json.loads((folder / "transformer/config.json").read_text())
    config["_class_name"] = "Transformer2DModel"
    (folder / "transformer/config.json").write_text(json.dumps(config))
    tiny_vae().save_pretrained(folder / "vae", safe_serialization=False)
    make_scheduler(learned_variance=False).save_pretrained(folder / "scheduler")
    labels = {str(i): f"name {i}, synonym {i}" for i in range(5)}
    index = dict(_class_name="DiTPipeline", _diffusers_version="0.12.0", id2label=labels)
    for name, kind in dict(scheduler="DDPMScheduler", vae="AutoencoderKL").items():
        index[name] = ["diffusers", kind]
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def truncate(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def zero_half(file):
    data = file.read_bytes()
    half = len(data) // 2
    file.write_bytes(data[:half] + bytes(len(data) - half))


def rename(file):
    file.rename(file.with_name(f"old-{file.name}"))


# What can happen to a file without a word from the operating system, by name.
DAMAGES = {
    "flipped": flip,
    "zeroed": zero_half,
    "truncated": truncate,
    "missing": lambda file: file.unlink(),
    "renamed": rename,
}
