"""Train a small image classifier: ``fid-eval classifier``.

All images are decoded once and kept as uint8, on the GPU if they fit. The augmentation runs on the
device. The accuracy on held-out images is stored in the metadata of the weights file, with
everything that is needed to repeat the training.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_write import atomic_path
from ..distributed import move_if_small
from ..errors import EvaluationError
from ..progress import progress_bar
from ..sets.decoding import Preprocess
from ..sets.opening import open_set
from .classifier import METADATA, Classifier, residual_classifier
from .classifier_data import LabelledImages, match_labels, read_images, split, warn_of_held_out

LEARNING_RATE = 3e-3  # peak of the one-cycle schedule of AdamW
AUGMENTATION_NUMBERS = 10  # uniform random numbers per image
LARGE_IMAGES = 64  # side in pixels from which the network has 256 features by default
EVALUATION_BATCH = 256


def augment(images: Tensor, random: Tensor, flip: bool) -> Tensor:
    """Turn, zoom, shift and recolour images at random, and mirror half of them if ``flip``.

    Features that judge generated images should depend on shapes, not on these differences.

    Args:
        images: uint8 (B, 3, H, W).
        random: uniform random numbers in 0 … 1, (B, AUGMENTATION_NUMBERS).
        flip: mirror images.

    Returns:
        float32 (B, 3, H, W) in −1 … 1.
    """

    def uniform(column: int, low: float, high: float) -> Tensor:
        return random[:, column] * (high - low) + low

    angle, zoom = uniform(0, -0.15, 0.15), uniform(1, 0.85, 1.15)
    mirror = torch.where(random[:, 2] < 0.5, -1.0, 1.0) if flip else torch.ones_like(zoom)
    turn = torch.stack((mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()), 1)
    shift = torch.stack((uniform(3, -0.1, 0.1), uniform(4, -0.1, 0.1)), 1)[..., None]
    matrix = torch.cat((turn.view(-1, 2, 2) / zoom[:, None, None], shift), 2)
    x = images.float() / 127.5 - 1
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * uniform(5, 0.7, 1.2)[:, None, None, None] + middle
    x = x + uniform(6, -0.1, 0.1)[:, None, None, None]
    gains = random[:, 7:10, None, None] * 0.3 + 0.85  # of red, green and blue
    return ((x + 1) * gains - 1).clamp(-1, 1)


def train(
    data: LabelledImages,
    device: torch.device,
    epochs: int,
    seed: int,
    batch_size: int,
    width: int,
    flip: bool = False,
) -> Classifier:
    """Train a residual classifier. The same seed gives the same weights on the same device.

    Raises:
        EvaluationError: the loss is not finite.
    """
    count, height, width_px, _ = data.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights
        model = residual_classifier(height, width_px, width, int(data.labels.max()) + 1)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    batch_size = min(batch_size, count)
    steps = count // batch_size  # per epoch; the shuffled rest is skipped
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=on_gpu
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps
    )
    images, labels = data.images, data.labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    bar = progress_bar(epochs * steps * batch_size, desc="training", unit="img")
    with bar, _deterministic_cudnn():
        for _ in range(epochs):
            # One transfer per epoch: the loop over the steps never waits for the device.
            order = torch.randperm(count, generator=generator)[: steps * batch_size]
            random = torch.rand(len(order), AUGMENTATION_NUMBERS, generator=generator).to(device)
            rows, order = order.to(images.device), order.to(device)
            for part, row, numbers in zip(
                order.split(batch_size), rows.split(batch_size), random.split(batch_size),
                strict=True,
            ):  # fmt: skip
                batch = images[row].to(device, non_blocking=True).permute(0, 3, 1, 2)
                batch = augment(batch, numbers, flip)
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    logits = model.classify(batch.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits.float(), labels[part], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch_size)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if not loss.isfinite():
                raise EvaluationError(
                    "the loss of the classifier is not finite: try another --seed"
                )
    return model.eval()


@contextlib.contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Let cuDNN choose only algorithms that give the same result each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def accuracy(model: Classifier, data: LabelledImages, device: torch.device) -> float:
    """Return the fraction of images whose label is predicted, in float32."""
    predicted = []
    with torch.inference_mode():
        for batch in data.images.split(EVALUATION_BATCH):
            pool = model(batch.to(device).permute(0, 3, 1, 2))["pool"]
            predicted.append(model.logits(pool).argmax(1).cpu())
    return float((torch.cat(predicted) == data.labels).double().mean())


def train_classifier(
    data: str,
    output: Path,
    device: torch.device,
    workers: int,
    held_out: float | str = 0.2,
    name: str | None = None,
    epochs: int = 40,
    seed: int = 0,
    batch_size: int = 128,
    width: int | None = None,
    flip: bool = False,
    resize: int | None = None,
    crop: bool = False,
    background: str = "white",
    strict: bool = False,
) -> None:
    """Train a classifier, write it to ``output`` and print its accuracy on held-out images.

    Args:
        data: labelled images, in any form that ``fid-eval`` reads.
        output: .safetensors to write; it must not exist.
        device: device to train on.
        workers: workers that decode images.
        held_out: a share of the images, a .txt file that lists some of them, or another set.
        name: suffix of metric names; by default the name of ``data``.
        epochs: passes over the training images.
        seed: of the held-out share, the initial weights, the order and the augmentation.
        batch_size: images per step.
        width: number of pooled features; by default 256, or 64 for images below 64 px.
        flip: mirror half of the training images.
        resize: resize images to this side in pixels.
        crop: crop the centre instead of stretching.
        background: colour behind transparent pixels.
        strict: refuse images that are not 8-bit RGB, and tars without an end mark.

    Raises:
        EvaluationError: ``output`` exists, or ``data`` or ``held_out`` is not suitable.
    """
    if output.exists():
        raise EvaluationError(f"{output}: exists and is not overwritten; choose another --output")
    if output.suffix != ".safetensors":
        raise EvaluationError(f"{output}: --output must end in .safetensors")
    preprocess = Preprocess(resize, crop, background, strict)
    source = open_set(data, preprocess)
    if isinstance(held_out, float) or held_out.endswith(".txt"):
        training, measured = split(read_images(source, workers), held_out, seed)
    else:
        other = open_set(held_out, preprocess)
        training = read_images(source, workers)
        measured = match_labels(read_images(other, workers), training, held_out)
    warn_of_held_out(training, measured)
    height, width_px = training.images.shape[1:3]
    width = width or (64 if min(height, width_px) < LARGE_IMAGES else 256)
    print(
        f"{len(training.images)} training images and {len(measured.images)} held-out images of "
        f"{len(training.labels.unique())} classes, {width_px}×{height} px",
        flush=True,
    )
    training = training._replace(images=move_if_small(training.images, device))
    model = train(training, device, epochs, seed, batch_size, width, flip)
    held_out_accuracy = accuracy(model, measured, device)
    metadata = {
        "name": name or Path(data).stem,
        "network": "residual",
        "classes": model.head.out_features,
        "width": width,
        "height_width": [height, width_px],
        "held_out_accuracy": held_out_accuracy,
        "held_out_images": len(measured.images),
        "data_sha256": source.content_hash(),
        "command": _command(
            data,
            output=output.name,
            held_out=held_out,
            epochs=epochs,
            seed=seed,
            batch_size=batch_size,
            width=width,
            flip=flip,
            resize=resize,
            crop=crop,
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_path(output) as temporary:
        save_file(state, temporary, {METADATA: json.dumps(metadata)})
    print(
        f"{output}: held-out accuracy {held_out_accuracy:.4f} "
        f"({len(measured.images)} held-out images)"
    )


def _command(data: str, **options: Any) -> str:
    """Return the command of a training; options that are None or False are left out."""
    words = ["fid-eval", "classifier", data]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)
