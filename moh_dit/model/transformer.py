"""Define MoHDiTTransformer2DModel, a class-conditional Diffusion Transformer with MoH layers.

DiT (arXiv 2212.09748) with adaLN-Zero blocks. Attention is MoH (arXiv 2410.11842) or, in a layer
without a router, plain multi-head attention. Parameters are named as in the published checkpoints,
so published state dicts load without renaming.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..common.compat import silence_empty_float32_warning
from ..common.errors import UserError
from ..common.renamed import alias_modules
from ..kernels.backends import BACKENDS, MLP_BACKENDS, MODULATION_BACKENDS, check_choice
from .attention import MoHAttention
from .blocks import DiTBlock, FinalLayer
from .embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder
from .routing import load_balance_loss

HeadPlan = int | list[int] | list[int | None] | None

silence_empty_float32_warning()
alias_modules()


@dataclass
class MoHDiTOutput(BaseOutput):
    """Output of the model.

    ``sample`` (B, out_channels, H, W): the prediction ε̂, followed by the variance values v if the
    variance is learned.
    ``load_balance_loss``: scalar, the mean of L_b / k over routed layers for this batch (MoH eq. 8;
    1 at even routing). ``None`` in evaluation mode or without routed layers.
    ``router_stats``: load f and mean score P̄ of each routed layer, (2, E) each, from which that
    loss is computed. ``None`` if ``load_balance_loss`` is.
    """

    sample: Tensor
    load_balance_loss: Tensor | None = None
    router_stats: tuple[Tensor, ...] | None = None


class MoHDiTTransformer2DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Diffusion Transformer whose layers each have their own head plan.

    Args:
        sample_size: height and width of the latent, in latent pixels.
        patch_size: height and width of a token, in latent pixels; divides ``sample_size``.
        in_channels: number of latent channels.
        out_channels: number of channels of the prediction; ``None`` means ``2 * in_channels`` (ε
            and the values of the learned variance, iDDPM eq. 15).
        hidden_size: model width C, a multiple of 4 (needed by 2-D sin-cos positions).
        depth: number of blocks.
        num_heads: number of heads h, one number or a list with one per layer.
        num_shared_heads: number of shared heads s, one number or a list with one per layer. A layer
            with ``None`` is plain multi-head attention.
        num_active_routed_heads: number of routed heads k that each token activates, one number or a
            list with one per layer.
        head_dim: width d of a head in every layer; ``None`` means ``hidden_size / h``.
        mlp_ratio: hidden width of the MLP divided by C.
        num_classes: number of classes; the label ``num_classes`` is the null class of guidance.
        router: router of every routed layer: "learned", or "query_norm", which has no parameters
            and suits continue-tuning from a dense model (``moh_dit.continue_tuning.model``).
        label_init_std: standard deviation of the label table at initialization. With the published
            0.02, a model follows its labels only after some thousand steps; use 0.5 for short runs.
        timestep_freq_shift: number subtracted from the count of timestep frequencies when they are
            spaced: 0 as published, 1 for models trained with diffusers' ``DiTTransformer2DModel``.

    Raises:
        UserError: if the numbers of heads or the sizes are inconsistent.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DiTBlock"]
    _repeated_blocks: ClassVar = ["DiTBlock"]
    # Layers whose weights are used outside of their own forward, where diffusers casts them.
    _skip_layerwise_casting_patterns: ClassVar = ["_embedder", "pos_embed", r"\.qkv", r"\.wg"]

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
        # A frozen parameter, because published parameter counts include it. diffusers sets torch's
        # default dtype while it opens a model with ``torch_dtype`` and low_cpu_mem_usage=False.
        positions = positions.float().to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
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
        """Initialize all weights as DiT does.

        Linear layers are Xavier-uniform; label table and timestep MLP are normal; modulation and
        output layers are zero.
        """
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
        # adaLN-Zero: at initialization every block is the identity and the output is zero.
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def null_class(self) -> int:
        """Return the label that means "no class" in guidance and label dropout."""
        return self.config.num_classes

    @property
    def routed_layers(self) -> dict[int, MoHAttention]:
        """Return the attention of routed layers by layer index, ordered as ``router_stats``."""
        layers = enumerate(cast(DiTBlock, block).attn for block in self.blocks)
        return {i: attention for i, attention in layers if attention.num_active_routed_heads}

    def set_attention_backend(self, backend: str) -> None:
        """Set the backend of every attention layer that has a router.

        Args:
            backend: "auto", "reference", "gathered" or "triton", see
                :func:`moh_dit.model.attention.moh_attention`.

        Raises:
            UserError: if the backend is unknown.
        """
        check_choice("attention_backend", backend, BACKENDS)
        for block in self.blocks:
            cast(DiTBlock, block).attn.attention_backend = backend

    def set_modulation_backend(self, backend: str) -> None:
        """Set the backend of adaLN: "auto", "reference" or "triton" (GPU).

        See :func:`moh_dit.model.modulation.adaln`.

        Raises:
            UserError: if the backend is unknown.
        """
        check_choice("modulation_backend", backend, MODULATION_BACKENDS)
        for layer in (*self.blocks, self.final_layer):
            cast(DiTBlock | FinalLayer, layer).modulation_backend = backend

    def set_mlp_backend(self, backend: str) -> None:
        """Set the backend of the MLPs: "auto" or "reference".

        On GPUs where this was measured to be faster, "auto" fuses the GELU into the linear layer
        before it, in evaluation mode without gradients.

        Raises:
            UserError: if the backend is unknown.
        """
        check_choice("mlp_backend", backend, MLP_BACKENDS)
        for block in self.blocks:
            cast(DiTBlock, block).mlp.backend = backend

    def fuse_qkv_projections(self) -> None:
        """Concatenate the query, key, value and router weights of every layer once.

        Passes without gradients then use the copy. After a change of weights in place, call this
        method again, see :meth:`MoHAttention.fuse_projections`.
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
        """Predict the noise (and the variance values) for noisy latents.

        Args:
            hidden_states: (B, in_channels, sample_size, sample_size).
            timestep: (B,) or scalar, integer or fractional, in ``0 … 999`` as in training.
            class_labels: int64 (B,), ``0 … num_classes``; the last is the null class.
            return_dict: whether to return a :class:`MoHDiTOutput` or the tuple ``(sample,)``.

        Raises:
            UserError: if height or width of the latents is not ``sample_size``.
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
        """Rearrange tokens (B, N, p·p·out_channels) into an image (B, out_channels, H, W)."""
        p, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        tokens = tokens.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def per_layer(name: str, value: HeadPlan, depth: int) -> list:
    """Return a list of one value per layer, from a list or from one value for all layers.

    Raises:
        UserError: if the list does not have ``depth`` entries.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * depth
    if len(value) != depth:
        raise UserError(f"{name} lists {len(value)} layers, depth is {depth}")
    return list(value)
