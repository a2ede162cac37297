"""MoH-DiT: Diffusion Transformers with Mixture-of-Head attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common.version import __version__

if TYPE_CHECKING:
    from .checkpoints.opening import load_pipeline, load_pretrained
    from .continue_tuning.config import MoHSettings
    from .continue_tuning.model import dense_to_moh
    from .model.attention import MoHAttention
    from .model.presets import PRESETS, build_model
    from .model.transformer import MoHDiTTransformer2DModel
    from .pipeline.pipeline import MoHDiTPipeline

# Import each name on first use, so that `import moh_dit` and every --help stay fast.
_EXPORTS = {
    "MoHAttention": "model.attention",
    "MoHDiTPipeline": "pipeline.pipeline",
    "MoHDiTTransformer2DModel": "model.transformer",
    "MoHSettings": "continue_tuning.config",
    "PRESETS": "model.presets",
    "build_model": "model.presets",
    "dense_to_moh": "continue_tuning.model",
    "load_pipeline": "checkpoints.opening",
    "load_pretrained": "checkpoints.opening",
}
__all__ = [
    "PRESETS",
    "MoHAttention",
    "MoHDiTPipeline",
    "MoHDiTTransformer2DModel",
    "MoHSettings",
    "__version__",
    "build_model",
    "dense_to_moh",
    "load_pipeline",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
