"""Accumulate mean and covariance in a stream, independently of the order of the parts.

Each part adds n, Σx and Σxxᵀ in float64. The running totals are pairs (high, low) of float64 that
keep the rounding error of each addition (Knuth's two-sum), about 106 bits. Rounded to float64 at
the end, they do not depend on how the parts were distributed over ranks.
"""

import torch
from torch import Tensor


class Moments:
    """Running sums n, Σx (d,) and Σxxᵀ (d, d) of feature vectors."""

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
        """Add the sums of ``other``."""
        self.count += other.count
        for total, part in zip(self.totals, other.totals, strict=True):
            _add(total, part[0].to(total.device))
            _add(total, part[1].to(total.device))

    def cpu(self) -> "Moments":
        """Move the sums to the CPU and return this object."""
        self.totals = [total.cpu() for total in self.totals]
        return self

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return mean (d,) and covariance (d, d) in float64, divided by n − 1."""
        sums, products = self.totals
        mean = sums[0] / self.count
        # Add the low part last, after the large terms have cancelled.
        covariance = products[0] - torch.outer(sums[0], mean) + products[1]
        return mean, covariance / (self.count - 1)


def _add(total: Tensor, part: Tensor) -> None:
    """Add ``part`` to ``total`` in place with a relative error of 2⁻¹⁰⁶ (two-sum, renormalise)."""
    high, low = total
    s = high + part
    b = s - high
    low += (high - (s - b)) + (part - b)
    torch.add(s, low, out=high)
    low += s - high  # As |s| ≥ |low|, this is the exact rounding error of the line above.
