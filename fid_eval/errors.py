"""Define the error for wrong input, and hints for mistyped names."""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(ValueError):
    """Input or settings are wrong; the message says what to change."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" with the known name that is most like ``name``."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}?" if close else "no name is known"
