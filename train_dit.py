"""Train a (MoH-)DiT.

python train_dit.py --config digits --run_dir runs/digits
accelerate launch train_dit.py --config configs/imagenet256_moh_dit_xl2_75.yaml
"""

from moh_dit.cli import run_program
from moh_dit.training.config import TrainConfig
from moh_dit.training.preemption import Preemption


def train(config: TrainConfig) -> None:
    Preemption()  # listens while the rest is imported
    from moh_dit.training.loop import Trainer

    Trainer(config).train()


def main() -> None:
    run_program(
        train,
        TrainConfig,
        prog="train_dit.py",
        description="Train a Diffusion Transformer with mixture-of-head attention.",
        example="train_dit.py --config digits --run_dir runs/digits",
    )


if __name__ == "__main__":
    main()
