"""Settings of making a MoH model from a dense one."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class MoHSettings:
    """How to make a MoH model from a dense one."""

    num_shared_heads: int | list[int | None] | None
    """Shared heads s, one number or one per layer; null for a layer that stays dense."""
    num_active_routed_heads: int | list[int | None] | None
    """Routed heads k that each token activates, one number or one per layer."""
    router: Literal["query_norm", "learned"] = "query_norm"
    """query_norm: no parameters. learned: MoH's own router, fitted on data to select the same
    heads as query_norm."""
    shared_heads: Literal["first", "random", "importance"] = "first"
    """Which heads become shared: the first ones, a random choice, or those that contribute most to
    the residual stream, measured on data."""
    seed: int = 0
    """Seed of random choices."""
