"""Compute block sizes. Triton's own helpers are meant for its compiler and slow on the host."""


def cdiv(a: int, b: int) -> int:
    """Return ⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def previous_power_of_2(n: int) -> int:
    """Return the largest power of two that is at most ``n``."""
    return 1 << (n.bit_length() - 1)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Split a head into ``(D0, D1)`` columns: a power of two, and the padded rest.

    D1 is 0 if nothing is left, else at least 16, the smallest k of the matrix units.
    """
    main = max(16, previous_power_of_2(head_dim))
    rest = head_dim - main
    return main, max(16, next_power_of_2(rest)) if rest > 0 else 0
