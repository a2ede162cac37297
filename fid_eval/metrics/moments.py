"""Mean and covariance by streaming, with sums that do not depend on the order of their parts.

Each part adds n, Σx and Σxxᵀ in float64. The running totals are pairs (high, low) of float64
that keep the rounding error of every addition (Knuth's two-sum), about 106 bits; rounded to
float64 at the end, they are the same however the parts were spread over processes.
"""

import torch
from torch import Tensor


class Moments:
    """n, Σx (d,) and Σxxᵀ (d, d) of feature vectors."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.totals = [  # (high, low) of Σx, then of Σxxᵀ
            torch.zeros(2, *shape, dtype=torch.float64, device=device)
            for shape in ((dim,), (dim, dim))
        ]

    def add(self, features: Tensor) -> None:
        """Add the rows of ``features`` (n, d) as one part."""
        x = features.to(self.totals[0].device, torch.float64)
        self.count += len(x)
        for total, part in zip(self.totals, (x.sum(0), x.T @ x), strict=True):
            _add(total, part)

    def merge(self, other: "Moments") -> None:
        self.count += other.count
        for total, part in zip(self.totals, other.totals, strict=True):
            _add(total, part[0].to(total.device))
            _add(total, part[1].to(total.device))

    def cpu(self) -> "Moments":
        self.totals = [total.cpu() for total in self.totals]
        return self

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) divided by n − 1, in float64."""
        sums, products = self.totals
        mean = sums[0] / self.count
        # the low parts re-enter after the large terms have cancelled
        covariance = products[0] - torch.outer(sums[0], mean) + products[1]
        return mean, covariance / (self.count - 1)


def _add(total: Tensor, part: Tensor) -> None:
    """total ← total + part, exactly but for 2⁻¹⁰⁶ (two-sum, then renormalise)."""
    high, low = total
    s = high + part
    b = s - high
    low += (high - (s - b)) + (part - b)
    torch.add(s, low, out=high)
    low += s - high  # |s| ≥ |low|: the rounding error of the line above, exactly
