"""Read the reference arrays in ``tests/reference/`` (see its README) and measure errors."""

import json
from pathlib import Path

from safetensors import safe_open

DIRECTORY = Path(__file__).parents[1] / "reference"


def load_reference(name):
    """Return the tensors and the parsed metadata of ``reference/<name>.safetensors``."""
    with safe_open(DIRECTORY / f"{name}.safetensors", framework="pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = {
            key: None if value == "None" else json.loads(value)
            for key, value in file.metadata().items()
        }
    return arrays, metadata


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
