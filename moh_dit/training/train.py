"""Run `moh-dit train`."""

from .config import TrainConfig
from .preemption import Preemption


def train(config: TrainConfig) -> None:
    """Train the run that ``config`` describes."""
    Preemption()  # Catch SIGTERM before the slow imports.
    from .trainer import Trainer

    Trainer(config).train()
