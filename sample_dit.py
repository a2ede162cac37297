"""Sample from a trained model: the same program as `moh-dit sample`.

python sample_dit.py --checkpoint runs/digits --guidance_scale 2 --output grid.png
accelerate launch sample_dit.py --checkpoint runs/digits --num_samples 50000 --output s.npz
"""

from moh_dit.__main__ import run_command


def main() -> None:
    run_command("sample", prog="sample_dit.py")


if __name__ == "__main__":
    main()
