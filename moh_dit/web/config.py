"""Everything that defines the page. The docstring under a field is its help text."""

from dataclasses import dataclass
from typing import Literal

from ..common.errors import UserError
from ..sampling.config import Precision, SampleConfig


@dataclass(kw_only=True)
class DemoConfig:
    """The page, who can reach it, and what a visitor may ask for:"""

    checkpoint: str
    """Run folder (its newest checkpoint), one of its checkpoints, or a saved pipeline folder; may
    be given without the name: moh-dit-demo RUN."""
    weights: str = "transformer"
    """Averaged weights to use: transformer (the first), raw, or a folder such as ema-0.999."""

    host: str = "127.0.0.1"
    """Address to listen on. The page has no passwords: leave it at this machine's own unless
    everyone who can reach it may use it (docs/web.md)."""
    port: int = 7860
    """Port to listen on; 0 for any that is free."""

    guidance_scale: float = 4.0
    """Guidance weight that the page starts with."""
    num_inference_steps: int = 50
    """Denoising steps that the page starts with."""

    max_images: int = 64
    """Images that one request may ask for."""
    max_inference_steps: int = 250
    """Denoising steps that one request may ask for."""
    max_waiting: int = 16
    """Requests that may wait their turn; further ones are turned away."""
    previews: int = 10
    """Pictures on the way to the images, each decoded by the autoencoder; 0 for none."""

    batch_size: int = 64
    """Images per batch; on the CPU rounded up to whole units (docs/sampling.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; a GPU if there is one unless given."""
    dtype: Precision = "float32"
    """What the transformer runs in; latents and scheduler stay float32."""
    decode_dtype: Precision = "float32"
    """What the autoencoder runs in."""

    def check(self) -> None:
        """Raise ``UserError`` for values that mean nothing, before any work."""
        at_least = dict(max_images=1, max_inference_steps=1, max_waiting=0, previews=0)
        for name, least in dict(at_least, batch_size=1).items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port is {self.port}; give one in 0 … 65535")

    def sampling(self) -> SampleConfig:
        """The settings that every request starts from."""
        return SampleConfig(
            checkpoint=self.checkpoint,
            output="grid.png",
            weights=self.weights,
            images_per_class=1,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            decode_dtype=self.decode_dtype,
        )
