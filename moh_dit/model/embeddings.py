"""Embed the three inputs of a Diffusion Transformer (DiT §3.2): patches, timestep and class."""

from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class PatchEmbedder(nn.Module):
    """Map a latent to tokens, row by row: (B, C_in, H, W) → (B, N, C)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Map timesteps to vectors, (B,) → (B, C): 256 sinusoidal features (cos first), then an MLP."""

    num_features = 256

    def __init__(self, hidden_size: int, freq_shift: float = 0):
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, timestep: Tensor) -> Tensor:
        features = get_timestep_embedding(
            timestep, self.num_features, flip_sin_to_cos=True, downscale_freq_shift=self.freq_shift
        )
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Look up one vector per class, and one for the null class: (B,) → (B, C)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)
