"""Find nearest neighbours in tiles of the distance matrix, which is never held as a whole.

All distances are squared Euclidean distances. Two modes compute them:

``fp32``: float32 features in float64, by matrix products. Where the bounded rounding error of the
product could change a comparison, the distance is recomputed from differences, so that equal
distances compare equal.

``adm-fp16``: as ADM's evaluator. Features, norms and products are rounded to float16;
(‖u‖² − 2u·v) + ‖v‖² is rounded after each step; negative values become 0. A block of
10,000 × 10,000 that overflows float16 is computed in float32.
"""

from collections.abc import Iterator
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import DistancePrecision
from ..errors import EvaluationError

ADM_BLOCK = 10_000  # ADM checks each block for overflow
HALF_MAX = 65504.0
TILE = {"cpu": 2_500, "cuda": 10_000}
PAIRS = 1024  # exact distances computed at once; a constant shape keeps the rounding constant
SPARE_NEIGHBOURS = 8  # candidates beyond the k-th, because rounding may change the order


def neighbour_radii(features: Tensor, k: int, mode: DistancePrecision = "fp32") -> Tensor:
    """Return the squared distance (n,) of each row of ``features`` (n, d) to its k-th neighbour.

    ``fp32`` excludes the row itself. ``adm-fp16`` counts the row as its own nearest neighbour and
    takes neighbour k + 1, as ADM does; only float16 rounding makes a difference.
    """
    n = len(features)
    if n < k + 1:
        raise EvaluationError(
            f"{n} images are too few for {k} nearest neighbours; at least {k + 1} are needed"
        )
    distances = PairDistances(features, features, mode)
    wanted = k + 1 if mode == "adm-fp16" else min(k + SPARE_NEIGHBOURS, n - 1)
    smallest = torch.full((n, wanted), torch.inf, dtype=distances.dtype, device=features.device)
    where = torch.zeros(n, wanted, dtype=torch.int64, device=features.device)
    for rows, columns, block, transposed in distances.upper_tiles():
        if mode == "fp32" and rows == columns:
            block.fill_diagonal_(torch.inf)
        _keep_smallest(smallest, where, rows, columns, block)
        if rows != columns:
            _keep_smallest(smallest, where, columns, rows, transposed)
    if mode == "adm-fp16":
        return smallest.amax(1)
    own = torch.arange(n, device=features.device).repeat_interleave(wanted)
    exact = distances.exact(own, where.flatten()).view(n, wanted)
    return exact.kthvalue(k, dim=1).values


def _keep_smallest(
    smallest: Tensor, where: Tensor, rows: slice, columns: slice, block: Tensor
) -> None:
    """Merge a tile into the smallest distances of each row and their column indices, in place."""
    k = smallest.shape[1]
    found = block.topk(min(k, block.shape[1]), dim=1, largest=False, sorted=False)
    candidates = torch.cat((smallest[rows], found.values), 1)
    places = torch.cat((where[rows], found.indices + columns.start), 1)
    smallest[rows], chosen = candidates.topk(k, dim=1, largest=False, sorted=False)
    where[rows] = places.gather(1, chosen)


def coverage_flags(
    a: Tensor, radii_a: Tensor, b: Tensor, radii_b: Tensor, mode: DistancePrecision = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return which points of ``a`` lie in a ball of ``b``, and vice versa (bool)."""
    a_in = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    b_in = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    distances = PairDistances(a, b, mode)
    for rows, columns, block in distances.tiles():
        a_in[rows] |= distances.within(rows, columns, block, radii_b[None, columns]).any(1)
        b_in[columns] |= distances.within(rows, columns, block, radii_a[rows, None]).any(0)
    return a_in, b_in


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of ``a`` the squared distance and index of the nearest row of ``b``."""
    best = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    distances = PairDistances(a, b, "fp32")
    for rows, columns, block in distances.tiles():
        distance, where = block.min(1)
        closer = distance < best[rows]
        best[rows] = torch.where(closer, distance, best[rows])
        index[rows] = torch.where(closer, where + columns.start, index[rows])
    return distances.exact(torch.arange(len(a), device=a.device), index), index


class PairDistances:
    """Computes squared distances between rows of ``a`` (n, d) and ``b`` (m, d), float32."""

    def __init__(self, a: Tensor, b: Tensor, mode: DistancePrecision) -> None:
        if mode not in get_args(DistancePrecision):
            raise EvaluationError(
                f"distances {mode!r}: choose one of {get_args(DistancePrecision)}"
            )
        if a.shape[1] != b.shape[1]:
            raise EvaluationError(
                f"features have {a.shape[1]} and {b.shape[1]} dimensions and cannot be compared"
            )
        self.mode = mode
        self.same = a is b
        self.tile = TILE.get(a.device.type, TILE["cpu"])
        self.raw_a, self.raw_b = a, b
        self._overflowing: dict[tuple[int, int], bool] = {}  # by start of ADM's block
        if mode == "fp32":
            self.dtype = torch.float64
            centre = b.double().mean(0)  # Centring reduces cancellation and keeps distances.
            self.a = a.double() - centre
            self.b = self.a if self.same else b.double() - centre
            self.norm_a, self.norm_b = (x.square().sum(1) for x in (self.a, self.b))
        else:
            self.dtype = torch.float32
            self.a, self.b = a.float(), b.float()
            self.half_a, self.half_b = self.a.half(), self.b.half()
            self.norm_a, self.norm_b = (  # Round squares and sums to float16.
                x.square().float().sum(1).half() for x in (self.half_a, self.half_b)
            )

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, columns, distances) of each tile."""
        for rows in _slices(len(self.a), self.tile):
            for columns in _slices(len(self.b), self.tile):
                yield rows, columns, self.block(rows, columns)[0]

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return distances of the pairs (rows[i], columns[i]) from their differences, float64."""
        parts = []
        for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
            i, j = (F.pad(index, (0, PAIRS - len(index))) for index in (i, j))
            parts.append((self.raw_a[i].double() - self.raw_b[j].double()).square().sum(1))
        return torch.cat([*parts, rows.new_empty(0, dtype=torch.float64)])[: len(rows)]

    def within(
        self, rows: slice, columns: slice, block: Tensor, radii: Tensor, strictly: bool = False
    ) -> Tensor:
        """Return which distances of a tile are ≤ ``radii`` (r, 1) or (1, c), as bool (r, c).

        With ``strictly``, return which are < ``radii``.
        """
        if self.mode != "fp32":
            return block < radii if strictly else block <= radii
        # The rounding error is at most γ (‖u‖ + ‖v‖)² with γ = d ε (Higham 2002, §3.1).
        reach = self.norm_a[rows].max().sqrt() + self.norm_b[columns].max().sqrt()
        slack = (self.a.shape[1] + 8) * torch.finfo(torch.float64).eps * reach.square()
        inside = block <= radii - slack
        i, j = (inside ^ (block <= radii + slack)).nonzero(as_tuple=True)
        if len(i):
            exact = self.exact(i + rows.start, j + columns.start)
            at = radii.expand_as(block)[i, j]
            inside[i, j] = exact < at if strictly else exact <= at
        return inside

    def upper_tiles(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield tiles on and above the diagonal (a set with itself), and the mirrored tiles."""
        assert self.same
        for rows in _slices(len(self.a), self.tile):
            for columns in _slices(len(self.a), self.tile):
                if columns.start >= rows.start:
                    block, transposed = self.block(rows, columns, mirrored=rows != columns)
                    yield rows, columns, block, transposed

    def block(self, rows: slice, columns: slice, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Return a tile (r, c) and the mirrored tile (c, r), rounded separately if ``mirrored``."""
        norm_a, norm_b = self.norm_a[rows, None], self.norm_b[None, columns]
        if self.mode == "fp32":
            block = torch.addmm(norm_b, self.a[rows], self.b[columns].T, alpha=-2)
            block = block.add_(norm_a).clamp_min_(0)
            return block, block.T
        if self._overflows(rows, columns):
            a, b = self.a[rows], self.b[columns]
            norm_a, norm_b = a.square().sum(1)[:, None], b.square().sum(1)[None]
            product = 2 * (a @ b.T)
        else:
            product = 2 * half_product(self.half_a[rows], self.half_b[columns])
        block = ((norm_a - product) + norm_b).clamp_min_(0)
        other = ((norm_b - product) + norm_a).clamp_min_(0) if mirrored else block
        return block.float(), other.float().T

    def _overflows(self, rows: slice, columns: slice) -> bool:
        """Return whether ADM's 10,000 × 10,000 block around this tile overflows float16."""
        rows = _adm_block(rows, len(self.a))
        columns = _adm_block(columns, len(self.b))
        key = (rows.start, columns.start)
        if key not in self._overflowing:
            largest = self.norm_a[rows].float().max(), self.norm_b[columns].float().max()
            # |2u·v| ≤ 2‖u‖‖v‖, so nothing overflows below this bound (5 % margin for rounding).
            bound = (largest[0].sqrt() + largest[1].sqrt()) ** 2 * 1.05
            self._overflowing[key] = bool(~(bound < HALF_MAX)) and self._block_overflows(
                rows, columns
            )
        return self._overflowing[key]

    def _block_overflows(self, rows: slice, columns: slice) -> bool:
        for part in _slices(rows.stop, self.tile, rows.start):
            product = 2 * half_product(self.half_a[part], self.half_b[columns])
            distances = (self.norm_a[part, None] - product) + self.norm_b[None, columns]
            if not distances.isfinite().all():
                return True
        return False


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ of float16 matrices, summed in float32 and rounded once to float16."""
    # Products of float16 values are exact in float32 and also in TF32.
    return (a.float() @ b.float().T).half()


def _adm_block(tile: slice, length: int) -> slice:
    start = tile.start // ADM_BLOCK * ADM_BLOCK
    return slice(start, min(start + ADM_BLOCK, length))


def _slices(stop: int, step: int, first: int = 0) -> Iterator[slice]:
    for start in range(first, stop, step):
        yield slice(start, min(start + step, stop))
