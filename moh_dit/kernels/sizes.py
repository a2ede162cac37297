"""Integer arithmetic of launches. Triton's own helpers are made for its compiler and slow here."""


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def power_of_2_up_to(n: int) -> int:
    """The greatest that is at most ``n``."""
    return 1 << (n.bit_length() - 1)


def head_split(head_dim: int) -> tuple[int, int]:
    """``(D0, D1)``: a power of two and the padded rest, D1 0 or at least 16 (matrix units' k)."""
    main = max(16, power_of_2_up_to(head_dim))
    rest = head_dim - main
    return main, max(16, power_of_2(rest)) if rest > 0 else 0
