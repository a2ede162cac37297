"""Small models and pipelines that several tests use."""

import torch
from diffusers import AutoencoderKL
from helpers.reference_arrays import load_reference

from moh_dit.diffusion.process import make_scheduler
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline

SMALL = dict(sample_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=5)


ROUTED = SMALL | dict(num_shared_heads=[2, 1, 0], num_active_routed_heads=[1, 2, 2])


# Parameters and active heads of the published models.
PUBLISHED = {
    "S/2-90": (32_997_152, 64), "S/2-75": (32_998_688, 54),
    "B/2-90": (130_638_368, 129), "B/2-75": (130_638_368, 108),
    "L/2-90": (458_512_416, 344), "L/2-75": (458_528_800, 288),
    "XL/2-90": (675_666_464, 403), "XL/2-75": (675_689_504, 336),
}  # fmt: skip


def reference_model(case):
    arrays, metadata = load_reference(f"model_{case}")
    names = ["sample_size", "patch_size", "hidden_size", "depth", "num_heads", "num_classes"]
    names += ["num_shared_heads", "num_active_routed_heads"]
    config = {name: metadata[name] for name in names}
    head_dim = metadata["head_dim"]
    config["head_dim"] = head_dim[0] if isinstance(head_dim, list) else head_dim
    model = MoHDiTTransformer2DModel(**config).double().eval()
    state = {key[6:]: value for key, value in arrays.items() if key.startswith("state.")}
    model.load_state_dict(state)
    return model, state, arrays


def randomized(config):
    torch.manual_seed(0)
    model = MoHDiTTransformer2DModel(**config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    ).eval()


def tiny_pipeline(class_names=None):
    pipeline = MoHDiTPipeline(
        randomized(ROUTED).eval(), tiny_vae(), make_scheduler(), class_names=class_names
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
