"""fid_eval: FID, sFID, Inception Score, precision and recall as ADM defines them, and more.

from fid_eval import evaluate
result = evaluate("imagenet256.npz", "samples.npz")
print(result["fid"])
"""

__version__ = "0.1.0"

from .errors import EvaluationError
from .evaluator import Evaluator, Result, evaluate
from .readers import Share

__all__ = ["EvaluationError", "Evaluator", "Result", "Share", "evaluate"]
