"""Define the error for wrong input, and describe errors in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(ValueError):
    """Input or settings are wrong; the message says what to change."""


def describe_error(error: Exception, name: str | None = None) -> str:
    """Return one line about an error, with its type if it is unexpected.

    Args:
        error: the error.
        name: what caused it, such as the name of a sample set. An EvaluationError names its cause.
    """
    text = " ".join(str(error).split())
    if isinstance(error, EvaluationError):
        return text
    kind = type(error).__name__.lstrip("_")
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if kind == "OutOfMemoryError":  # torch's; this module does not import torch
        text = f"out of memory on the GPU; use a smaller --batch_size: {text}"
    return (f"{name}: " if name else "") + (f"{text} ({kind})" if text else kind)


def printable(name: str) -> str:
    """Escape the bytes of a file name that are not UTF-8, which no report can hold."""
    return name.encode(errors="backslashreplace").decode()


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" with the known name that is most like ``name``, in any case."""
    folded = {each.casefold(): each for each in known}
    close = get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.0)
    return f"did you mean {folded[close[0]]!r}?" if close else "no name is known"
