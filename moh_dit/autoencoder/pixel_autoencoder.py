"""Use pixels as latents, for diffusion models without an autoencoder."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Return images (B, 3, H, W) in −1 … 1 unchanged, with the interface of an autoencoder."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("placeholder", torch.zeros(1))  # has a dtype and a device

    def encode(self, images: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        return EncoderOutput(latent=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=latents)
