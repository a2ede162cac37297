"""Nearest neighbours by tiles of a distance matrix that is never held whole.

All distances are squared Euclidean. In the mode ``fp32`` they are those of the float32 features,
in float64: by matrix products, whose rounding is bounded, and where that much decides, by summing
squared differences, so that equal distances are equal. In ``adm-fp16`` they are those of ADM's
evaluator: features, norms and product rounded to float16, ((‖u‖² − 2u·v) + ‖v‖²) rounded after each
step, negative ones set to 0; where a block of 10,000 × 10,000 overflows float16, that block in
float32.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError

Precision = Literal["fp32", "adm-fp16"]
ADM_BLOCK = 10_000  # ADM decides about overflow block by block
HALF_MAX = 65504.0
TILE = {"cpu": 2_500, "cuda": 10_000}
PAIRS = 1024  # distances summed from differences at once; always as many, so that they round alike
SPARE_NEIGHBOURS = 8  # looked at beyond the k-th, as rounding may have swapped some


def neighbour_radii(features: Tensor, k: int, mode: Precision = "fp32") -> Tensor:
    """Squared distance (n,) of each of ``features`` (n, d) to its k-th nearest neighbour.

    ``fp32`` leaves the point itself out. ADM counts it as the nearest and takes number k + 1: the
    same, but for the rounding of float16.
    """
    n = len(features)
    if n < k + 1:
        raise EvaluationError(
            f"{n} images: the {k} nearest neighbours of each need at least {k + 1}"
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
    """Take the distances of ``block`` into the smallest of each row, with where they are."""
    k = smallest.shape[1]
    found = block.topk(min(k, block.shape[1]), dim=1, largest=False, sorted=False)
    candidates = torch.cat((smallest[rows], found.values), 1)
    places = torch.cat((where[rows], found.indices + columns.start), 1)
    smallest[rows], chosen = candidates.topk(k, dim=1, largest=False, sorted=False)
    where[rows] = places.gather(1, chosen)


def coverage_flags(
    a: Tensor, radii_a: Tensor, b: Tensor, radii_b: Tensor, mode: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """(n_a,) bool: a point of ``a`` lies within some ball of b; (n_b,) bool: the converse."""
    a_in = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    b_in = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    distances = PairDistances(a, b, mode)
    for rows, columns, block in distances.tiles():
        a_in[rows] |= distances.within(rows, columns, block, radii_b[None, columns]).any(1)
        b_in[columns] |= distances.within(rows, columns, block, radii_a[rows, None]).any(0)
    return a_in, b_in


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``a`` (n, d) the squared distance to its nearest in ``b``, and its index."""
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
    """Squared distances between rows of ``a`` (n, d) and ``b`` (m, d), float32 features."""

    def __init__(self, a: Tensor, b: Tensor, mode: Precision) -> None:
        if mode not in get_args(Precision):
            raise EvaluationError(f"precision mode {mode!r}: choose one of {get_args(Precision)}")
        if a.shape[1] != b.shape[1]:
            raise EvaluationError(
                f"features of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared"
            )
        self.mode = mode
        self.same = a is b
        self.tile = TILE.get(a.device.type, TILE["cpu"])
        self.raw_a, self.raw_b = a, b
        if mode == "fp32":
            self.dtype = torch.float64
            centre = b.double().mean(0)  # distances do not change, cancellation shrinks
            self.a = a.double() - centre
            self.b = self.a if self.same else b.double() - centre
            self.norm_a, self.norm_b = (x.square().sum(1) for x in (self.a, self.b))
        else:
            self.dtype = torch.float32
            self.a, self.b = a.float(), b.float()
            self.half_a, self.half_b = self.a.half(), self.b.half()
            self.norm_a, self.norm_b = (  # square rounded to half, sum rounded to half
                x.square().float().sum(1).half() for x in (self.half_a, self.half_b)
            )

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Every (rows, columns, distances)."""
        for rows in _slices(len(self.a), self.tile):
            for columns in _slices(len(self.b), self.tile):
                yield rows, columns, self.block(rows, columns)[0]

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Distances of the pairs (rows[i], columns[i]) from their differences, float64."""
        parts = []
        for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
            i, j = (F.pad(index, (0, PAIRS - len(index))) for index in (i, j))
            parts.append((self.raw_a[i].double() - self.raw_b[j].double()).square().sum(1))
        return torch.cat([*parts, rows.new_empty(0, dtype=torch.float64)])[: len(rows)]

    def within(
        self, rows: slice, columns: slice, block: Tensor, radii: Tensor, strictly: bool = False
    ) -> Tensor:
        """Which distances of a tile reach no further than ``radii`` (r, 1) or (1, c); bool (r, c).

        ``strictly``: fall short of them.
        """
        if self.mode != "fp32":
            return block < radii if strictly else block <= radii
        # |error| ≤ γ (‖u‖ + ‖v‖)² for products and norms of d terms, γ = d ε (Higham 2002, §3.1)
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
        """Tiles on and above the diagonal of a set with itself, each with the mirrored one."""
        assert self.same
        for rows in _slices(len(self.a), self.tile):
            for columns in _slices(len(self.a), self.tile):
                if columns.start >= rows.start:
                    block, transposed = self.block(rows, columns, mirrored=rows != columns)
                    yield rows, columns, block, transposed

    def block(self, rows: slice, columns: slice, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Distances (r, c), and those of the swapped pair (c, r) if ``mirrored``."""
        norm_a, norm_b = self.norm_a[rows, None], self.norm_b[None, columns]
        if self.mode == "fp32":
            block = torch.addmm(norm_b, self.a[rows], self.b[columns].T, alpha=-2)
            block = block.add_(norm_a).clamp_min_(0)
            return block, block.T
        if self._overflows(rows, columns):
            a, b = self.a[rows], self.b[columns]
            norms = a.square().sum(1)[:, None], b.square().sum(1)[None]
            product = 2 * (a @ b.T)
            block = (norms[0] - product + norms[1]).clamp_min_(0)
            other = (norms[1] - product + norms[0]).clamp_min_(0) if mirrored else block
            return block, other.T
        product = 2 * half_product(self.half_a[rows], self.half_b[columns])
        block = ((norm_a - product) + norm_b).clamp_min_(0)
        other = ((norm_b - product) + norm_a).clamp_min_(0) if mirrored else block
        return block.float(), other.float().T

    def _overflows(self, rows: slice, columns: slice) -> bool:
        """Would ADM's 10,000 × 10,000 block around this tile hold a value that is not finite?"""
        rows = _adm_block(rows, len(self.a))
        columns = _adm_block(columns, len(self.b))
        key = (rows.start, columns.start)
        cache = self.__dict__.setdefault("_overflow_cache", {})
        if key not in cache:
            largest = self.norm_a[rows].float().max(), self.norm_b[columns].float().max()
            # |2u·v| ≤ 2‖u‖‖v‖, so nothing overflows below this bound (5 % for the rounding)
            bound = (largest[0].sqrt() + largest[1].sqrt()) ** 2 * 1.05
            cache[key] = bool(~(bound < HALF_MAX)) and self._block_overflows(rows, columns)
        return cache[key]

    def _block_overflows(self, rows: slice, columns: slice) -> bool:
        for part in _slices(rows.stop - rows.start, self.tile):
            part = slice(rows.start + part.start, rows.start + part.stop)
            product = 2 * half_product(self.half_a[part], self.half_b[columns])
            distances = (self.norm_a[part, None] - product) + self.norm_b[None, columns]
            if not distances.isfinite().all():
                return True
        return False


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of float16 matrices, summed in float32 and rounded once to float16."""
    # every float16 product is exact in float32, and TF32 keeps float16's 11 bits too
    return (a.float() @ b.float().T).half()


def _adm_block(tile: slice, length: int) -> slice:
    start = tile.start // ADM_BLOCK * ADM_BLOCK
    return slice(start, min(start + ADM_BLOCK, length))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
