"""The load-balance loss of a batch that is spread over processes and micro-batches.

L = Σ_i f_i P̄_i · E / k needs the load f and the mean score P̄ of the whole batch, but f carries no
gradient: with f averaged over all processes and P̄ the process's own, the mean of the processes'
losses is the loss of the whole batch, and the mean of their gradients (which data parallelism
takes anyway) its gradient. Only f is exchanged, a few numbers per layer.

Under gradient accumulation f is the mean over the micro-batches seen so far in the step (global
batch load balancing, arXiv 2501.11873); it is exact for the last one. Where all of them were
observed in a pass of their own beforehand, it is exact for each.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ..model.routing import load_balance_loss


class BalanceLoss:
    """Turns the router statistics of one process's micro-batches into its loss.

    Args:
        accelerator: exchanges the load between processes.
        num_active_routed_heads: k of the routed layers, in the order of the statistics.
        published: the published loss instead: per process, micro-batch by micro-batch, and k at
            even routing.
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
        """Forget the step before.

        Args:
            observed: router statistics of all micro-batches of this step, where known beforehand.
        """
        self._loads = [self._load(stats) for stats in observed]
        self._observed = bool(observed)

    def _load(self, router_stats: tuple[Tensor, ...]) -> Tensor:
        """f of a micro-batch over all processes, layer after layer (ΣE,)."""
        load = torch.cat(router_stats, dim=1)[0].detach()
        return self.accelerator.reduce(load, "mean")

    def __call__(self, router_stats: tuple[Tensor, ...]) -> Tensor:
        """The loss of one micro-batch, 1 at even routing unless published; a scalar."""
        if not self._observed:
            self._loads.append(self._load(router_stats))
        if self.published:
            return load_balance_loss(router_stats, self.num_active_routed_heads, published=True)
        f = torch.stack(self._loads).mean(0)
        pooled = torch.stack([f, torch.cat(router_stats, dim=1)[1]])
        sizes = [stats.shape[1] for stats in router_stats]
        return load_balance_loss(pooled.split(sizes, dim=1), self.num_active_routed_heads)

    def load(self) -> Tensor | None:
        """f over all processes and the step's micro-batches so far, layer after layer (ΣE,)."""
        return torch.stack(self._loads).mean(0) if self._loads else None
