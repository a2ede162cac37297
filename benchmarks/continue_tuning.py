"""Continue-tune a dense model of the digits to MoH, and compare it with MoH from scratch.

    python benchmarks/continue_tuning.py --work runs/continue_tuning --threads 1

1,500 scans are used for training, 297 are held out. A dense model is trained as in
configs/digits.yaml. Copies of it are converted to MoH with 75 % and 50 % active heads and trained
for another fifth of its steps; models with the same head plans are trained from scratch as long.

The held-out loss (without the balance term) is measured before and right after the conversion, and
after 5, 10 and 20 % of the steps. It uses averaged weights and ``--draws`` fixed times and noises
per image. Prints one JSON line per model; writes results.json and continue_tuning.png into the work
folder. An interrupted run continues when started again.
"""

import argparse
import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moh_dit.autoencoder import latent_scaling, load_autoencoder, sample_posterior
from moh_dit.checkpoints.opening import load_pretrained
from moh_dit.checkpoints.runs import checkpoint_name
from moh_dit.common.cli import load_config
from moh_dit.common.config_files import shipped_configs
from moh_dit.continue_tuning.model import MoHSettings, dense_to_moh, noisy_batches
from moh_dit.data.digits import load_digit_images
from moh_dit.data.images import open_images
from moh_dit.data.latents import encode_images
from moh_dit.diffusion.objectives import NoiseObjective
from moh_dit.pipeline.pipeline import MoHDiTPipeline
from moh_dit.training.config import ModelConfig, TrainConfig
from moh_dit.training.trainer import Trainer

PLANS = {  # shared heads, active routed heads of the six layers of six heads
    75: dict(num_shared_heads=3, num_active_routed_heads=[2, 2, 2, 1, 1, 1]),
    50: dict(num_shared_heads=1, num_active_routed_heads=2),
}
SHARES = (0.05, 0.1, 0.2)
HELD_OUT = 297


@dataclass
class Arm:
    """One model that is trained for a fifth of the dense model's steps."""

    start: str  # "dense" (the trained model, converted if `active` is set) or "scratch"
    active: int | None = None  # percent, a key of PLANS
    router: str = "query_norm"
    shared_heads: str = "first"

    @property
    def name(self) -> str:
        if self.active is None:
            return "dense, trained on"
        if self.start == "scratch":
            return f"{self.active} %, from scratch"
        return f"{self.active} %, {self.router}, shared: {self.shared_heads}"

    @property
    def folder(self) -> str:
        parts = [self.start, self.active, self.router, self.shared_heads]
        return "-".join(str(part) for part in parts if part is not None)


ARMS = [
    Arm("dense", 75),
    Arm("scratch", 75, "learned"),
    Arm("dense", 50),
    Arm("scratch", 50, "learned"),
    Arm("dense"),
    Arm("dense", 50, "learned"),
    Arm("dense", 50, shared_heads="importance"),
]


def split(folder: Path) -> tuple[Path, Path]:
    """Write training scans and held-out scans into two folders of classes; return both."""
    images, labels = load_digit_images()
    held_out = set(np.random.default_rng(0).permutation(len(images))[:HELD_OUT].tolist())
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("held_out" if i in held_out else "digits") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.fromarray(image).save(path)
    return folder / "digits", folder / "held_out"


def configure(work: Path, name: str, data: Path, num_steps: int) -> TrainConfig:
    config = load_config(TrainConfig, shipped_configs()["digits"])
    config.run_dir, config.resume, config.data.source = str(work / name), True, str(data)
    config.num_steps, config.keep_checkpoints = num_steps, 0
    config.checkpoint_every = min(config.checkpoint_every, num_steps // 2)
    config.evaluation.num_inference_steps = 2  # grids are not needed
    return config


def configure_arm(args: argparse.Namespace, arm: Arm, data: Path) -> TrainConfig:
    config = configure(args.work, arm.folder, data, round(SHARES[-1] * args.steps))
    config.checkpoint_every = round(SHARES[0] * args.steps)
    config.optimizer.lr_schedule = "constant_with_warmup"  # one run serves all fractions
    config.optimizer.lr_warmup_steps = config.checkpoint_every // 5
    if arm.start == "scratch":
        plan = PLANS[arm.active]
        config.model = ModelConfig(**{**vars(config.model), **plan, "router": arm.router})
    else:
        config.init_from = str(args.work / "converted" / arm.folder)
        config.model, config.optimizer.learning_rate = ModelConfig(), args.learning_rate
    return config


class HeldOut:
    """Loss of each held-out image, with the same times and noise for every model."""

    def __init__(self, folder: Path, draws: int):
        self.objective, vae = NoiseObjective(), load_autoencoder("digits")
        latents = encode_images(open_images(folder, 32, progress=False), vae, progress=False)
        moments, self.labels = latents.__getitems__([(i, False) for i in range(len(latents))])
        generator = torch.Generator().manual_seed(0)
        shape = len(latents), 4, 8, 8
        posterior = torch.randn(shape, generator=generator)
        self.clean = sample_posterior(moments, posterior, latent_scaling(vae))
        # Times are spread evenly over the 1,000 timesteps, in a random order for each draw.
        grid = (torch.arange(len(latents)) * 1000) // len(latents)
        self.draws = [
            (grid[torch.randperm(len(grid), generator=generator)],
             torch.randn(shape, generator=generator))
            for _ in range(draws)
        ]  # fmt: skip

    @torch.no_grad()
    def __call__(self, model) -> torch.Tensor:
        """Return squared error and variational bound (images, 2), means over the draws."""
        model.eval()
        terms = []
        for times, noise in self.draws:
            noisy = self.objective.add_noise(self.clean, noise, times)
            output = model(noisy, times, self.labels).sample
            terms.append(torch.stack(self.objective.loss(output, self.clean, noise, times), 1))
        return torch.stack(terms).mean(0)


@torch.no_grad()
def without_attention(model):
    """Return a copy whose attention outputs zero, as an upper bound of the loss."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    return model


def summary(terms: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return the mean loss, its terms, and its excess over the dense model with standard error."""
    difference = (terms - reference).sum(1)
    return {
        "loss": terms.sum(1).mean().item(),
        "mse": terms[:, 0].mean().item(),
        "vlb": terms[:, 1].mean().item(),
        "above_dense": difference.mean().item(),
        "standard_error": (difference.std() / len(difference) ** 0.5).item(),
    }


@torch.no_grad()
def agreement(dense, settings: MoHSettings, data, inputs) -> list[float]:
    """Return, per layer, the fraction of query-norm selections that a fitted router shares."""
    routers = {}
    for router in ("query_norm", "learned"):
        both = MoHSettings(**{**vars(settings), "router": router})
        routers[router] = dense_to_moh(copy.deepcopy(dense), both, data).routed_layers
    shares = []
    for i, layer in routers["query_norm"].items():
        given: list[torch.Tensor] = []
        hook = dense.blocks[i].attn.register_forward_pre_hook(
            lambda module, arguments, given=given: given.append(arguments[0])
        )
        dense.eval()(*inputs)
        hook.remove()
        a, b = (m.route(given[0])[0][..., layer.num_shared_heads :] > 0
                for m in (layer, routers["learned"][i]))  # fmt: skip
        shares.append(((a & b).sum() / a.sum()).item())
    return shares


def plot(results: dict, path: Path) -> None:
    """Plot the excess loss over the dense model during tuning, one panel per head plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PLANS), figsize=(11, 4.2), sharey=True)
    for ax, active in zip(axes, PLANS, strict=True):
        for arm in results["arms"]:
            if arm["active"] not in (active, None):
                continue
            points = [(float(share), value) for share, value in arm["after"].items()]
            if arm["start"] == "dense":
                points.insert(0, (0.0, arm["right_after"]))
            ax.errorbar(
                [share for share, _ in points],
                [value["above_dense"] for _, value in points],
                [value["standard_error"] for _, value in points],
                fmt="o--" if arm["start"] == "scratch" else "o-",
                markersize=4,
                label=arm["name"].removeprefix(f"{active} %, "),
            )
        ax.axhline(0, color="grey", linewidth=1)
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.set_xticks([0, *SHARES], [f"{share:.0%}" for share in (0, *SHARES)])
        steps = results["dense_steps"]
        ax.set(title=f"{active} % of the heads active", xlabel=f"training, of {steps:,} steps")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.76))
    axes[0].set_ylabel("loss on held-out digits, above dense")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/continue_tuning"))
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the dense model")
    parser.add_argument("--draws", type=int, default=4, help="times and noises per held-out image")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="peak rate of tuning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = args.work
    training, held_out = split(work)

    config = configure(work, "dense", training, args.steps)
    config.model.num_shared_heads = config.model.num_active_routed_heads = None
    Trainer(config).train()
    final = work / "dense" / "checkpoints" / checkpoint_name(args.steps)
    dense = load_pretrained(final)
    half = load_pretrained(final.with_name(checkpoint_name(args.steps // 2)))
    loss = HeldOut(held_out, args.draws)
    reference = loss(dense)
    score = partial(summary, reference=reference)
    pipeline = MoHDiTPipeline(dense, load_autoencoder("digits"), loss.objective.scheduler)
    data = noisy_batches(pipeline, str(training), num_images=512)
    times, noise = loss.draws[0]
    inputs = (loss.objective.add_noise(loss.clean, noise, times), times, loss.labels)

    def converted(active: int, router: str, shared_heads: str):
        settings = MoHSettings(**PLANS[active], router=router, shared_heads=shared_heads)
        return dense_to_moh(copy.deepcopy(dense), settings, data)

    results = {
        "dense_steps": args.steps,
        "learning_rate": args.learning_rate,
        "dense": score(reference),
        "dense_at_half": score(loss(half)),
        "without_attention": score(loss(without_attention(dense))),
        "right_after": [
            dict(active=active, router=router, shared_heads=choice)
            | score(loss(converted(active, router, choice)))
            for active in PLANS
            for router in ("query_norm", "learned")
            for choice in ("first", "random", "importance")
        ],
        "agreement": {
            active: agreement(dense, MoHSettings(**plan), data, inputs)
            for active, plan in PLANS.items()
        },
        "arms": [],
    }
    (work / "results.json").write_text(json.dumps(results, indent=1))
    for arm in ARMS:
        config = configure_arm(args, arm, training)
        entry = {"name": arm.name, **vars(arm)}
        if arm.start == "dense":
            model = dense
            if arm.active is not None:
                model = converted(arm.active, arm.router, arm.shared_heads)
            entry["right_after"] = score(loss(model))
            model.save_pretrained(config.init_from)
        Trainer(config).train()
        checkpoints = work / arm.folder / "checkpoints"
        entry["after"] = {
            share: score(loss(load_pretrained(checkpoints / checkpoint_name(step))))
            for share, step in ((share, round(share * args.steps)) for share in SHARES)
        }
        results["arms"].append(entry)
        print(json.dumps(entry))
        (work / "results.json").write_text(json.dumps(results, indent=1))
        plot(json.loads((work / "results.json").read_text()), work / "continue_tuning.png")


if __name__ == "__main__":
    main()
