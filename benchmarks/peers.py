"""Build the models of the benchmarks: those of this project and those they are compared with."""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn

from moh_dit import build_model
from moh_dit.kernels.backends import MODULATION_BACKENDS
from moh_dit.model.attention import MoHAttention, split_heads

MODELS = ["DiT-XL/2", "MoH-DiT-XL/2-75", "MoH-DiT-XL/2-90", "MoH-DiT-XL/2-75 then mask",
          "diffusers DiT-XL/2"]  # fmt: skip


class DenseThenMask(nn.Module):
    """MoH as published: every head for every token, then a multiplication by the gates."""

    def __init__(self, layer: MoHAttention):
        super().__init__()
        self.layer = layer
        self.num_active_routed_heads = layer.num_active_routed_heads

    def forward(self, x):
        layer, shared = self.layer, self.layer.num_shared_heads
        active, heads = layer.num_active_routed_heads, layer.num_heads
        query, key, value = split_heads(layer.qkv(x), heads, layer.head_dim)
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        gates, stats = [], None
        if shared:
            gates.append(layer.wg_1(x).softmax(-1) * shared)
        if active:
            scores = layer.wg(x).softmax(-1)
            chosen = torch.zeros_like(scores).scatter(-1, scores.topk(active, dim=-1).indices, 1.0)
            kept = scores * chosen
            gates.append(active * kept / kept.sum(-1, keepdim=True))
            stats = torch.stack([chosen.flatten(0, 1).mean(0), scores.flatten(0, 1).mean(0)])
        if len(gates) == 2:
            stages = 2 * layer.wg_0(x).softmax(-1)
            gates = [stages[..., :1] * gates[0], stages[..., 1:] * gates[1]]
        output = output * torch.cat(gates, -1).unsqueeze(-1)
        return layer.proj(output.flatten(2)), stats


def build(name, sample_size):
    """Build a model: a preset, a preset + " then mask", or "diffusers DiT-XL/2"."""
    if name == "diffusers DiT-XL/2":
        return DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
            num_layers=28, sample_size=sample_size, patch_size=2, num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate", norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )  # fmt: skip
    model = build_model(name.removesuffix(" then mask"), sample_size=sample_size)
    if name.endswith(" then mask"):
        for block in model.blocks:
            block.attn = DenseThenMask(block.attn)
    return model


def blocks(model):
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def add_arguments(parser, sizes, seconds):
    """Add the arguments that model.py and training.py share."""
    parser.add_argument("--models", nargs="+", default=MODELS, help="see build() in peers.py")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(sizes), help="pixels")
    parser.add_argument("--seconds", type=float, default=seconds, help="duration of one timing")
    parser.add_argument(
        "--compile", choices=("blocks", "model"), default="blocks", help="unit of one graph"
    )
    parser.add_argument(
        "--mode", choices=("default", "max-autotune-no-cudagraphs"), default="default",
        help="mode of torch.compile",
    )  # fmt: skip
    parser.add_argument(
        "--modulation", choices=MODULATION_BACKENDS, default="auto", help="backend of adaLN"
    )
    parser.add_argument("--float8", action="store_true", help="compute linear layers in FP8")
    parser.add_argument("--profile", action="store_true", help="print GPU time by kind of kernel")
    parser.add_argument("--json", help="file for the results")


def compiled(model, args):
    """Compile the model: each block (blocks of equal head plans share a graph), or all as one."""
    if hasattr(model, "set_modulation_backend"):
        model.set_modulation_backend(args.modulation)
        model.set_mlp_backend(
            "reference" if args.float8 else "auto"
        )  # FP8 products cannot fuse the GELU
    if args.compile == "model":
        model.compile(dynamic=False, mode=args.mode)
        return model
    for block in blocks(model):
        block.compile(mode=args.mode)
    return model


def initialise(model):
    """Fill zero-initialized layers with random values: products with zeros would run faster."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model
