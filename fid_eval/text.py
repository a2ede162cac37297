"""Small helpers for messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest_name(name: str, known: Iterable[str]) -> str:
    """ "did you mean …?" for the known name closest to a mistyped one."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}?" if close else "nothing is known by that name"
