"""MoH-DiT: Diffusion Transformers with Mixture-of-Head attention."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up on first use, so that `import moh_dit` and every --help stay quick.
_EXPORTS = {
    "MoHAttention": "attention",
    "MoHDiTPipeline": "pipeline",
    "MoHDiTTransformer2DModel": "transformer",
    "MoHSettings": "continue_tuning",
    "PRESETS": "presets",
    "build_model": "presets",
    "dense_to_moh": "continue_tuning",
    "load_pipeline": "checkpoints",
    "load_pretrained": "checkpoints",
}
__all__ = [
    "PRESETS",
    "MoHAttention",
    "MoHDiTPipeline",
    "MoHDiTTransformer2DModel",
    "MoHSettings",
    "build_model",
    "dense_to_moh",
    "load_pipeline",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
