"""fid_eval: FID, sFID, Inception Score, precision and recall as ADM defines them, and more.

from fid_eval import evaluate
result = evaluate("imagenet256.npz", "samples.npz")
print(result["fid"])
"""

from .errors import EvaluationError
from .evaluator import Evaluator, Result, evaluate
from .sets.readers import Share
from .version import __version__

__all__ = ["EvaluationError", "Evaluator", "Result", "Share", "__version__", "evaluate"]
