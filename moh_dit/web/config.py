"""Settings of the demo page. The docstring under a field is its help text."""

from dataclasses import dataclass

from ..common.errors import UserError
from ..common.paths import split_hub_id
from ..sampling.config import ModelSettings, Precision, SampleConfig, require_at_least


@dataclass(kw_only=True)
class DemoConfig(ModelSettings):
    """The model, the address of the page, and the limits of a request"""

    host: str = "127.0.0.1"
    """Address to listen on. The page has no passwords: keep the default unless everyone who can
    reach the address may use the page (docs/web.md)."""
    port: int = 7860
    """Port to listen on; 0 chooses a free port."""

    guidance_scale: float = 4.0
    """Initial guidance weight on the page."""
    num_inference_steps: int = 50
    """Initial number of denoising steps on the page."""

    max_images: int = 64
    """Maximum number of images per request."""
    max_inference_steps: int = 250
    """Maximum number of denoising steps per request."""
    max_waiting: int = 16
    """Maximum number of waiting requests; further requests are rejected."""
    previews: int = 10
    """Number of previews per request. The autoencoder decodes all images for each; 0 turns previews
    off."""

    decode_dtype: Precision = "float32"
    """Precision of the autoencoder."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for invalid values and for a checkpoint that does not exist."""
        require_at_least(self, max_images=1, max_inference_steps=1, max_waiting=0)
        require_at_least(self, previews=0, batch_size=1)
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port is {self.port}; it must be between 0 and 65535")
        split_hub_id(self.checkpoint)

    def to_sample_config(self) -> SampleConfig:
        """Return the default settings of a request."""
        return SampleConfig.from_config(self, output="grid.png", images_per_class=1)
