"""Evaluate sets of images: FID, sFID, Inception Score, precision and recall as ADM defines them.

from fid_eval import evaluate
result = evaluate("imagenet256.npz", "samples.npz")
print(result["fid"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import EvaluationError
from .version import __version__

if TYPE_CHECKING:
    from .evaluator import Evaluator, Result, evaluate
    from .reconstruction import evaluate_reconstructions
    from .sets.readers import Share

# Import each name on first use, so that `import fid_eval` and --help are fast.
_EXPORTS = {
    "Evaluator": "evaluator",
    "Result": "evaluator",
    "Share": "sets.readers",
    "evaluate": "evaluator",
    "evaluate_reconstructions": "reconstruction",
}
__all__ = [
    "EvaluationError",
    "Evaluator",
    "Result",
    "Share",
    "__version__",
    "evaluate",
    "evaluate_reconstructions",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
