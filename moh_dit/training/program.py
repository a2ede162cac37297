"""Run `moh-dit train`: catch SIGTERM first, then import the trainer."""

from .config import TrainConfig
from .preemption import Preemption


def train(config: TrainConfig) -> None:
    """Train the run that ``config`` describes."""
    Preemption()  # Catch SIGTERM while the slow imports run.
    from .trainer import Trainer

    Trainer(config).train()
