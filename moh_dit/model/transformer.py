"""MoHDiTTransformer2DModel: a class-conditional Diffusion Transformer with mixture-of-head layers.

DiT (arXiv 2212.09748) with adaLN-Zero blocks; attention is MoH (arXiv 2410.11842) or, in a layer
without a router, plain multi-head attention. Parameter names are those of the published
checkpoints, so their state dicts load as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..common.errors import UserError
from ..kernels.backends import BACKENDS, MLP_BACKENDS, MODULATION_BACKENDS, check_choice
from ..kernels.linear_gelu import linear_gelu, takes_linear_gelu
from .attention import MoHAttention, load_balance_loss
from .embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder
from .modulation import adaln

HeadPlan = int | list[int] | list[int | None] | None


@dataclass
class MoHDiTOutput(BaseOutput):
    """What the model returns.

    ``sample`` (B, out_channels, H, W): ε̂, and with learned variance the values v behind it.
    ``load_balance_loss``: scalar, the mean over routed layers of L_b / k (MoH eq. 8; 1 at even
    routing), over this batch; ``None`` in evaluation mode or without routed layers.
    ``router_stats``: for each routed layer in turn (2, E), the load f and mean score P̄ behind that
    loss; ``None`` where it is.
    """

    sample: Tensor
    load_balance_loss: Tensor | None = None
    router_stats: tuple[Tensor, ...] | None = None


class MoHDiTTransformer2DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Diffusion Transformer whose layers each have their own head plan.

    Args:
        sample_size: height and width of the latent, in latent pixels.
        patch_size: side of a token, in latent pixels; divides ``sample_size``.
        in_channels: latent channels.
        out_channels: channels of the prediction; ``None`` means ``2 * in_channels`` (ε and the
            values of the learned variance, iDDPM eq. 15).
        hidden_size: model width C, a multiple of 4 (2-D sin-cos positions).
        depth: number of blocks.
        num_heads: heads h, one number or one per layer.
        num_shared_heads: shared heads s, one number or one per layer; ``None``, for all layers or
            for one, is plain multi-head attention there.
        num_active_routed_heads: routed heads k that each token activates, likewise.
        head_dim: width d of a head in every layer; ``None`` means ``hidden_size / h``.
        mlp_ratio: hidden width of the MLP over C.
        num_classes: classes; the label ``num_classes`` is the null class of guidance.
        router: "learned", or "query_norm" without parameters, as continue-tuning from a dense model
            wants it (``moh_dit.continue_tuning.model``); of all layers that route.
        label_init_std: standard deviation of the label table at the start. At the published 0.02
            a model needs some thousands of steps to hear its labels; short runs want 0.5.
        timestep_freq_shift: what is taken off the number of timestep frequencies before they are
            spread: 0 as published; 1 for a model trained in diffusers' ``DiTTransformer2DModel``.

    Raises:
        UserError: when the head plan or the sizes do not add up.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DiTBlock"]
    _repeated_blocks: ClassVar = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: HeadPlan = 16,
        num_shared_heads: HeadPlan = None,
        num_active_routed_heads: HeadPlan = None,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        label_init_std: float = 0.02,
        router: str = "learned",
        timestep_freq_shift: float = 0,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise UserError(
                f"sample_size {sample_size} is not divisible by patch_size {patch_size}"
            )
        if hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} is not a multiple of 4")
        heads = per_layer("num_heads", num_heads, depth)
        shared = per_layer("num_shared_heads", num_shared_heads, depth)
        active = per_layer("num_active_routed_heads", num_active_routed_heads, depth)
        out_channels = out_channels or 2 * in_channels
        self.register_to_config(out_channels=out_channels)

        grid_size = sample_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        positions = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size)
        # Frozen, but a parameter: published parameter counts include it.
        self.pos_embed = nn.Parameter(positions.float().unsqueeze(0), requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList()
        for layer, plan in enumerate(zip(heads, shared, active, strict=True)):
            try:
                self.blocks.append(DiTBlock(hidden_size, mlp_ratio, *plan, head_dim, router))
            except UserError as error:
                raise UserError(f"layer {layer}: {error}") from None
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform linears, normal label table and timestep MLP, zero modulation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, patches.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_init_std)
        for name, parameter in self.t_embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        # adaLN-Zero: every block starts as the identity, the whole model as zero.
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class" in guidance and label dropout."""
        return self.config.num_classes

    @property
    def routed_layers(self) -> dict[int, MoHAttention]:
        """The attention of the layers that route, by layer index, in ``router_stats`` order."""
        layers = enumerate(cast(DiTBlock, block).attn for block in self.blocks)
        return {i: attention for i, attention in layers if attention.num_active_routed_heads}

    def set_attention_backend(self, backend: str) -> None:
        """Compute every layer with a router by ``backend`` (see ``moh_dit.model.attention``).

        Raises:
            UserError: when there is no backend of that name.
        """
        check_choice("attention_backend", backend, BACKENDS)
        for block in self.blocks:
            cast(DiTBlock, block).attn.attention_backend = backend

    def set_modulation_backend(self, backend: str) -> None:
        """Compute adaLN by ``backend``: "reference", "triton" (GPU: one pass) or "auto".

        Raises:
            UserError: when there is no backend of that name.
        """
        check_choice("modulation_backend", backend, MODULATION_BACKENDS)
        for layer in (*self.blocks, self.final_layer):
            cast(DiTBlock | FinalLayer, layer).modulation_backend = backend

    def set_mlp_backend(self, backend: str) -> None:
        """Compute the MLPs by ``backend``: "reference", or "auto", in which the GELU rides on the
        linear layer before it where that was measured to be faster (GPU, evaluation).

        Raises:
            UserError: when there is no backend of that name.
        """
        check_choice("mlp_backend", backend, MLP_BACKENDS)
        for block in self.blocks:
            cast(DiTBlock, block).mlp.backend = backend

    def fuse_qkv_projections(self) -> None:
        """Join queries, keys, values and routers of every layer once, for weights that stay.

        See :meth:`MoHAttention.fuse_projections`: passes without gradients use the copy, and
        weights that change in place need another call.
        """
        for module in self.modules():
            if isinstance(module, MoHAttention):
                module.fuse_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo :meth:`fuse_qkv_projections`."""
        for module in self.modules():
            if isinstance(module, MoHAttention):
                module.unfuse_projections()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> MoHDiTOutput | tuple[Tensor]:
        """Predict the noise (and variance values) in noisy latents.

        Args:
            hidden_states: (B, in_channels, sample_size, sample_size).
            timestep: (B,) or scalar, integer or fractional, in ``0 … 999`` as trained.
            class_labels: int64 (B,), ``0 … num_classes``; the last is the null class.
            return_dict: whether to return a :class:`MoHDiTOutput` or the tuple ``(sample,)``.

        Raises:
            UserError: when the latents are not of the configured size.
        """
        size = self.config.sample_size
        if hidden_states.shape[-2:] != (size, size):
            raise UserError(
                f"latents are {tuple(hidden_states.shape[-2:])}, the model's sample_size is {size}"
            )
        hidden_states = self.x_embedder(hidden_states) + self.pos_embed  # (B, N, C)
        timestep = timestep.expand(hidden_states.shape[0])
        condition = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (B, C)

        router_stats = []
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                output = self._gradient_checkpointing_func(block, hidden_states, condition)
            else:
                output = block(hidden_states, condition)
            hidden_states, stats = output if self.training else (output, None)
            if stats is not None:
                router_stats.append(stats)

        sample = self.unpatchify(self.final_layer(hidden_states, condition))
        if not return_dict:
            return (sample,)
        if not (self.training and router_stats):
            return MoHDiTOutput(sample=sample)
        active = [layer.num_active_routed_heads for layer in self.routed_layers.values()]
        balance = load_balance_loss(router_stats, active)
        return MoHDiTOutput(sample, balance, tuple(router_stats))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, p·p·out_channels) → (B, out_channels, H, W)."""
        p, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        tokens = tokens.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class DiTBlock(nn.Module):
    """adaLN-Zero block (DiT §3.2): attention and MLP, each shifted, scaled and gated by (t, y).

    Returns (B, N, C) alone in evaluation mode, which is what diffusers' caches can replay, and
    with the attention's ``router_stats`` in training.
    """

    modulation_backend = "auto"

    def __init__(
        self,
        hidden_size: int,
        mlp_ratio: float,
        num_heads: int,
        num_shared_heads: int | None,
        num_active_routed_heads: int | None,
        head_dim: int | None,
        router: str = "learned",
    ):
        super().__init__()
        self.attn = MoHAttention(
            hidden_size,
            num_heads,
            num_shared_heads,
            num_active_routed_heads,
            head_dim,
            router=router,
        )
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, hidden_states: Tensor, condition: Tensor
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        # The statistics leave as a plain output: checkpointing, re-entrant or not, keeps gradients.
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, C) each
        backend = self.modulation_backend
        hidden_states, read = adaln(hidden_states, shift1, scale1, backend=backend)
        attended, router_stats = self.attn(read)
        hidden_states, read = adaln(hidden_states, shift2, scale2, gate1, attended, backend)
        hidden_states = hidden_states + gate2 * self.mlp(read)
        return (hidden_states, router_stats) if self.training else hidden_states


# What diffusers' caches (first-block, MagCache) need to know of a block.
TransformerBlockRegistry.register(DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class Mlp(nn.Module):
    """Two linears around a tanh GELU."""

    backend = "auto"

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "auto" and takes_linear_gelu(x, self.fc1):
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the pixels of each patch."""

    modulation_backend = "auto"

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        _, read = adaln(hidden_states, shift, scale, backend=self.modulation_backend)
        return self.linear(read)


def per_layer(name: str, value: HeadPlan, depth: int) -> list:
    """One value per layer from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * depth
    if len(value) != depth:
        raise UserError(f"{name} lists {len(value)} layers, depth is {depth}")
    return list(value)
