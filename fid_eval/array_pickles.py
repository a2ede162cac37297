"""Load pickles and PyTorch files that hold NumPy arrays, without running code in them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import EvaluationError

# What a pickled array or NumPy scalar refers to, in NumPy 1 and 2.
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, "_reconstruct"): np._core.multiarray._reconstruct for module in _MODULES},  # type: ignore[attr-defined]
    **{(module, "scalar"): np._core.multiarray.scalar for module in _MODULES},  # type: ignore[attr-defined]
    **{(module, "_frombuffer"): np._core.numeric._frombuffer for module in _NUMERIC},  # type: ignore[attr-defined]
    ("dnnlib.util", "EasyDict"): dict,  # NVIDIA's dictionary with attributes
}
_DTYPES = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "?", "u1")]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles built-in containers, numbers, strings and NumPy arrays; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes in pickles of protocol 2
            return _encode_latin1
        if (module, name) not in ARRAY_GLOBALS:
            raise EvaluationError(f"refers to {module}.{name}; only NumPy arrays are loaded")
        return ARRAY_GLOBALS[module, name]


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise EvaluationError(f"refers to the codec {encoding}; only NumPy arrays are loaded")
    return text.encode("latin1")


def load_array_pickle(path: Path) -> Any:
    """Load a pickle of arrays in built-in containers.

    Raises:
        EvaluationError: the file is damaged, or refers to anything else, which is not loaded.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file).load()
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error}") from None
    except Exception as error:  # A damaged pickle raises errors of any type.
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"{path}: not a pickle of NumPy arrays, or damaged: {reason}"
        ) from None


def load_torch_arrays(path: Path) -> Any:
    """Load a file of ``torch.save`` with tensors and NumPy arrays in built-in containers.

    Raises:
        EvaluationError: as for ``load_array_pickle``.
    """
    allowed = [(value, f"{module}.{name}") for (module, name), value in ARRAY_GLOBALS.items()]
    try:
        with torch.serialization.safe_globals([*allowed, *_DTYPES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"{path}: not a file of tensors and NumPy arrays, or damaged: {reason}"
        ) from None
