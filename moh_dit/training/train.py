"""Run `moh-dit train`."""

from .config import TrainConfig
from .preemption import Preemption
from .start_up import StartUp


def train(config: TrainConfig) -> None:
    """Train the run that ``config`` describes."""
    Preemption()  # Catch SIGTERM before the slow imports.
    start_up = StartUp()
    from .trainer import Trainer

    Trainer(config, start_up).train()
