"""Compute the load-balance loss of a batch that is split over processes and micro-batches.

The loss is L = Σ_i f_i P̄_i · E / k, where f is the load and P̄ the mean score over the whole batch.
f carries no gradient. Each process therefore uses f averaged over all processes and its own P̄. The
mean of these losses over the processes is the loss of the whole batch. Data parallelism averages
the gradients, so the gradient is that of the whole batch, too. Only f, a few numbers per layer, is
exchanged.

Under gradient accumulation f is the mean over the micro-batches of the step so far (global-batch
load balancing, arXiv 2501.11873). It is exact for the last micro-batch. If a separate forward pass
observes all micro-batches first, it is exact for each of them.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ..model.routing import load_balance_loss


class BalanceLoss:
    """Computes the load-balance loss from the router statistics of this rank's micro-batches.

    Args:
        accelerator: averages the load over the processes.
        num_active_routed_heads: k of each routed layer, in the order of the statistics.
        published: compute the loss as published, separately for each process and micro-batch; it
            is k for balanced routing.
    """

    def __init__(
        self, accelerator: Accelerator, num_active_routed_heads: list[int], published: bool = False
    ):
        self.accelerator = accelerator
        self.num_active_routed_heads = num_active_routed_heads
        self.published = published
        self._loads: list[Tensor] = []
        self._observed = False

    def start_step(self, observed: Sequence[tuple[Tensor, ...]] = ()) -> None:
        """Discard the loads of the previous step.

        Args:
            observed: router statistics of all micro-batches of this step, if a separate forward
                pass has computed them.
        """
        self._loads = [self._mean_load(stats) for stats in observed]
        self._observed = bool(observed)

    def _mean_load(self, router_stats: tuple[Tensor, ...]) -> Tensor:
        """Average f of a micro-batch over all processes; layers are concatenated to (ΣE,)."""
        load = torch.cat(router_stats, dim=1)[0].detach()
        return self.accelerator.reduce(load, "mean")

    def __call__(self, router_stats: tuple[Tensor, ...]) -> Tensor:
        """Return the scalar loss of one micro-batch; 1 for balanced routing unless published."""
        if not self._observed:
            self._loads.append(self._mean_load(router_stats))
        if self.published:
            return load_balance_loss(router_stats, self.num_active_routed_heads, published=True)
        f = torch.stack(self._loads).mean(0)
        pooled = torch.stack([f, torch.cat(router_stats, dim=1)[1]])
        sizes = [stats.shape[1] for stats in router_stats]
        return load_balance_loss(pooled.split(sizes, dim=1), self.num_active_routed_heads)

    def load(self) -> Tensor | None:
        """Return f over all processes and the micro-batches of the step so far (ΣE,)."""
        return torch.stack(self._loads).mean(0) if self._loads else None
