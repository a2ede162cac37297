"""Train a (MoH-)DiT: the same program as `moh-dit train`.

python train_dit.py --config digits --run_dir runs/digits
accelerate launch train_dit.py --config configs/imagenet256_moh_dit_xl2_75.yaml
"""

from moh_dit.__main__ import run_command


def main() -> None:
    run_command("train", prog="train_dit.py")


if __name__ == "__main__":
    main()
