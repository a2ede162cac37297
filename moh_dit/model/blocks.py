"""Define the blocks of the Diffusion Transformer: attention, MLP, adaLN-Zero, last layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.compat import register_cacheable_block
from ..kernels.linear_gelu import can_fuse_gelu, linear_gelu
from .attention import MoHAttention
from .modulation import adaln


class DiTBlock(nn.Module):
    """adaLN-Zero block (DiT §3.2): attention and MLP, each shifted, scaled and gated by (t, y).

    In training mode it returns ``(hidden_states, router_stats)``. In evaluation mode it returns
    only hidden_states (B, N, C), because diffusers' caches expect a single tensor.
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
        # Statistics are an output, so that they keep their gradient under activation checkpointing.
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, C) each
        backend = self.modulation_backend
        hidden_states, modulated = adaln(hidden_states, shift1, scale1, backend=backend)
        attended, router_stats = self.attn(modulated)
        hidden_states, modulated = adaln(hidden_states, shift2, scale2, gate1, attended, backend)
        hidden_states = hidden_states + gate2 * self.mlp(modulated)
        return (hidden_states, router_stats) if self.training else hidden_states


register_cacheable_block(DiTBlock)


class Mlp(nn.Module):
    """Two linear layers with a tanh GELU between them."""

    backend = "auto"

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "auto" and can_fuse_gelu(x, self.fc1):
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """adaLN, followed by a linear map to the pixels of each patch."""

    modulation_backend = "auto"

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        _, modulated = adaln(hidden_states, shift, scale, backend=self.modulation_backend)
        return self.linear(modulated)
