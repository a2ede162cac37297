"""Train small image classifiers (``fid-eval classifier``), whose features replace Inception's.

A random fifth of the images is held out from training. The accuracy on it is stored in the metadata
of the weights file, with everything that is needed to repeat the training.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_write import atomic_path
from ..errors import EvaluationError
from ..progress import SECONDS_BETWEEN_LINES, progress_bar
from ..sets.hashing import file_sha256
from ..sets.npz import NpzFile

HELD_OUT = 0.2
SPATIAL_CHANNELS = 4  # of the last feature map: 4 × 8 × 8 spatial features for 32 px images


class Classifier(nn.Module):
    """Five convolutions to a quarter of the resolution, mean pooling and a linear head."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        plan = [(3, width // 2, 1), (width // 2, width, 2), (width, width, 1),
                (width, width, 2), (width, width, 1)]  # fmt: skip  # (in, out, stride)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in plan:
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute pool (B, width) and spatial (B, SPATIAL_CHANNELS · H/4 · W/4) of uint8 images."""
        maps = self.trunk(images.float() / 127.5 - 1)
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # channels last
        return {"pool": maps.mean((2, 3)), "spatial": spatial}

    def logits(self, pool: Tensor) -> Tensor:
        """Compute class logits (B, classes) from pool (B, width)."""
        return self.head(pool)

    def classify(self, images: Tensor) -> Tensor:
        """Compute class logits (B, classes) of uint8 (B, 3, H, W)."""
        return self.logits(self(images)["pool"])


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """Load a classifier that ``fid-eval classifier`` has written, with its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("fid_eval_classifier", "null"))
        if metadata is None:
            raise EvaluationError(f"{path}: not a file written by fid-eval classifier")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = Classifier(metadata["classes"], metadata["width"])
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), metadata


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply small random rotations, scalings, shifts, blur, contrast and noise.

    Features that judge generated images should depend on shapes, not on these differences.

    Args:
        images: uint8 (B, 3, H, W).
        generator: source of the random numbers.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.1)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    shift = torch.stack((uniform(-0.1, 0.1), uniform(-0.1, 0.1)), 1)[..., None]
    matrix = torch.cat((turn / scale[:, None, None], shift), 2)
    x = images.float()
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    blurred = F.conv2d(x.flatten(0, 1)[:, None], torch.outer(kernel, kernel)[None, None], padding=1)
    x = torch.lerp(x, blurred.view_as(x), uniform(0, 1.5).clamp_max(1)[:, None, None, None])
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * uniform(0.7, 1.2)[:, None, None, None] + middle
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 20)[:, None, None, None]
    return (x + noise).round().clamp(0, 255).byte()


def split_indices(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of training images and of held-out images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(count * HELD_OUT))
    return order[held_out:], order[:held_out]


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of uint8 images (N, 3, H, W) whose label is predicted."""
    with torch.inference_mode():
        predicted = torch.cat([model.classify(batch).argmax(1) for batch in images.split(256)])
    return float((predicted == labels).double().mean())


def train(
    images: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 64, width: int = 64
) -> tuple[Classifier, float]:
    """Train on uint8 (N, 3, H, W); return the model and its accuracy on the held-out fifth."""
    fitted, held_out = split_indices(len(images), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights
        model = Classifier(int(labels.max()) + 1, width)
    steps = math.ceil(len(fitted) / batch_size) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with progress_bar(epochs, desc="training", unit=" epochs", delay=SECONDS_BETWEEN_LINES) as bar:
        for _ in range(epochs):
            model.train()
            order = fitted[torch.randperm(len(fitted), generator=generator)]
            for index in order.split(batch_size):
                logits = model.classify(augment(images[index], generator))
                loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            bar.update(1)
    model.eval()
    return model, accuracy(model, images[held_out], labels[held_out])


def train_classifier(
    data: Path,
    output: Path,
    name: str | None = None,
    epochs: int = 40,
    seed: int = 0,
    width: int = 64,
) -> None:
    """Train a classifier on an .npz, write it to ``output`` and print its held-out accuracy.

    Args:
        data: .npz with uint8 images arr_0 (N, H, W, 3) and integer labels arr_1 (N,).
        output: .safetensors to write; it must not exist.
        name: suffix of metric names; by default the name of ``data``.
        epochs: passes over the training images.
        seed: of the held-out images, the initial weights and the augmentation.
        width: number of pooled features.

    Raises:
        EvaluationError: ``output`` exists, or ``data`` is not suitable.
    """
    if output.exists():
        raise EvaluationError(f"{output}: exists and is not overwritten; choose another --output")
    if output.suffix != ".safetensors":
        raise EvaluationError(f"{output}: --output must end in .safetensors")
    arrays = NpzFile(data)
    if "arr_0" not in arrays or "arr_1" not in arrays:
        raise EvaluationError(f"{data}: needs images arr_0 and labels arr_1")
    array, label_array = arrays["arr_0"].read(), arrays["arr_1"].read()
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise EvaluationError(
            f"{data}: arr_0 is {array.dtype} {array.shape}; uint8 (N, H, W, 3) is needed"
        )
    if label_array.shape != (len(array),) or label_array.min() < 0:
        raise EvaluationError(f"{data}: arr_1 must be {len(array)} labels ≥ 0")
    if len(array) < 10:
        raise EvaluationError(f"{data}: {len(array)} images are too few; at least 10 are needed")
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    labels = torch.from_numpy(label_array.astype(np.int64))
    model, held_out_accuracy = train(images, labels, epochs, seed, width=width)
    metadata = {
        "name": name or data.stem,
        "classes": model.head.out_features,
        "width": width,
        "height_width": list(array.shape[1:3]),
        "held_out_accuracy": held_out_accuracy,
        "held_out_images": len(split_indices(len(array), seed)[1]),
        "data_sha256": file_sha256(data),
        "command": (
            f"fid-eval classifier {data.name} --output {output.name} --epochs {epochs} "
            f"--seed {seed} --width {width}"
        ),
        "torch": torch.__version__,
    }
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_path(output) as temporary:
        save_file(state, temporary, {"fid_eval_classifier": json.dumps(metadata)})
    print(
        f"{output}: held-out accuracy {held_out_accuracy:.4f} "
        f"({metadata['held_out_images']} of {len(array)} images held out)"
    )
