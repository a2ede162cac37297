"""Sample from a trained model: a labelled grid, or an exact set for evaluation.

python sample_dit.py --checkpoint runs/digits --guidance_scale 2 --output grid.png
accelerate launch sample_dit.py --checkpoint runs/digits --num_samples 50000 --output s.npz
"""

from moh_dit.cli import run_program
from moh_dit.sampling.config import SampleConfig


def sample(config: SampleConfig) -> None:
    from moh_dit.sampling.program import sample  # here, so that --help stays quick

    sample(config)


def main() -> None:
    run_program(
        sample,
        SampleConfig,
        prog="sample_dit.py",
        description="Sample from a trained model: a labelled grid, or an exact set.",
        example="sample_dit.py --checkpoint runs/digits --guidance_scale 2 --output grid.png",
    )


if __name__ == "__main__":
    main()
