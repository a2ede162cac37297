"""Measure the error of the balance loss's gradient under gradient accumulation.

    python benchmarks/balance_accumulation.py [--run runs/digits] [--micro_batches 2 4 8]

Uses batches of the digits. Prints ‖g - g_exact‖ / ‖g_exact‖ over all weights, the mean over the
batches, where g_exact is the gradient for the whole batch at once. "f so far": each micro-batch
uses the load f of all micro-batches so far, as in training. "f of each alone": each micro-batch
uses only its own load, as published.
"""

import argparse

import torch
from accelerate import Accelerator

from moh_dit.autoencoder import latent_scaling, load_autoencoder, sample_posterior
from moh_dit.checkpoints.opening import load_pretrained
from moh_dit.common.cli import load_config
from moh_dit.common.config_files import shipped_configs
from moh_dit.data.images import open_images
from moh_dit.data.latents import encode_images
from moh_dit.diffusion.objectives import NoiseObjective
from moh_dit.model.attention import load_balance_loss
from moh_dit.training.balance import BalanceLoss
from moh_dit.training.config import TrainConfig
from moh_dit.training.setup import create_model


def gradient(model, inputs, loss_of, parts):
    """Return the flat gradient of the balance loss, accumulated over ``parts`` micro-batches."""
    model.zero_grad()
    for rows in zip(*(x.chunk(parts) for x in inputs), strict=True):
        (loss_of(model(*rows).router_stats) / parts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", help="trained run of configs/digits.yaml (default: initial weights)"
    )
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator, objective = Accelerator(cpu=True), NoiseObjective()
    vae = load_autoencoder("digits")
    latents = encode_images(open_images("digits", 32), vae, progress=False)
    if args.run:
        model = load_pretrained(args.run, weights="raw")
    else:
        config = load_config(TrainConfig, shipped_configs()["digits"])
        model = create_model(config, objective, (4, 8, 8), 10)
    model.train()
    active = [layer.num_active_routed_heads for layer in model.routed_layers.values()]

    distances = {(kind, m): [] for m in args.micro_batches for kind in ("so far", "published")}
    for _ in range(args.batches):
        rows = torch.randint(len(latents), (args.batch_size,)).tolist()
        moments, labels = latents.__getitems__([(i, False) for i in rows])
        clean = sample_posterior(
            moments, torch.randn(args.batch_size, 4, 8, 8), latent_scaling(vae)
        )
        times = torch.randint(1000, (args.batch_size,))
        noisy = objective.add_noise(clean, torch.randn_like(clean), times)
        inputs = noisy, times, labels

        def exact(stats):
            return load_balance_loss(stats, active)

        whole = gradient(model, inputs, exact, 1)
        for parts in args.micro_batches:
            so_far = BalanceLoss(accelerator, active)
            so_far.start_step()
            for kind, loss_of in (("so far", so_far), ("published", exact)):
                distance = (gradient(model, inputs, loss_of, parts) - whole).norm() / whole.norm()
                distances[kind, parts].append(distance.item())
    print(f"{'micro-batches':>14}  {'f so far':>9}  {'f of each alone':>15}")
    for parts in args.micro_batches:
        means = [
            sum(d) / len(d) for d in (distances["so far", parts], distances["published", parts])
        ]
        print(f"{parts:14}  {means[0]:9.3f}  {means[1]:15.3f}")


if __name__ == "__main__":
    main()
