"""Find feature extractors by name or import path.

An extractor computes ``pool`` (B, d) and optionally ``spatial`` (B, s) from uint8 (B, 3, H, W). It
may compute class ``logits`` from ``pool``. Its identity (name, hash of the weights, preprocessing)
is known before the network is built. Wrong input is therefore rejected, and cached features are
found, without loading weights.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..choices import NetworkPrecision
from ..errors import EvaluationError
from .weight_files import fetch_weights, identify_weights, load_state, save_to_buffer, state_sha256

DIGITS_WEIGHTS = Path(__file__).parents[1] / "weights" / "digits.safetensors"

# SHA-256 and URL of published weights. DINOv2 is published without hashes.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
VGG16_SHA256_START = "397923af"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
DINOV2 = {
    "dinov2": "dinov2_vitl14",  # FD-DINOv2 is defined with ViT-L/14 (Stein et al. 2023)
    "dinov2-vit-s-14": "dinov2_vits14",
    "dinov2-vit-b-14": "dinov2_vitb14",
    "dinov2-vit-l-14": "dinov2_vitl14",
    "dinov2-vit-g-14": "dinov2_vitg14",
}
CLIP = {
    "clip": "clip-vit-l-14-336px",  # CMMD is defined with this model (Jayasumana et al. 2024)
    "clip-vit-b-32": "clip-vit-b-32",
    "clip-vit-l-14": "clip-vit-l-14",
}
TF_RESIZE = "TensorFlow 1 bilinear"
IMAGENET_224 = f"{TF_RESIZE} to 224, ImageNet mean and deviation"
CLIP_PREPROCESSING = f"{TF_RESIZE} to the model's size, CLIP mean and deviation"


@dataclass
class Extractor:
    """A feature extractor, whose network is built when it is first used.

    Attributes:
        name: name on the command line.
        label: suffix of metric names (fd_digits, …); None for the published Inception, whose
            metrics have the names of papers (fid, …).
        sha256: hash of the weights.
        preprocessing: description of the resizing and scaling of images.
        build: returns a module or function from uint8 (B, 3, H, W) to a Tensor, a tuple of one
            Tensor or {"pool": …, "spatial": …}, optionally with a method ``logits(pool)``.
        image_size: the only (height, width) that it accepts, or None.
        has_spatial: whether it computes spatial features.
        has_logits: whether it has a method ``logits``.
        knows_labels: whether its classes are the labels of the data.
        dimensions: number of features by layer, as far as known.
        network: the network, once it is built.
    """

    name: str
    label: str | None
    sha256: str | None
    preprocessing: str
    build: Callable[[], Any]
    image_size: tuple[int, int] | None = None
    has_spatial: bool = False
    has_logits: bool = False
    knows_labels: bool = False
    dimensions: dict[str, int] = field(default_factory=dict)
    network: Any = None

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for two sets of features to be comparable."""
        return {"name": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing}

    def load(self, device: torch.device, compiled: bool = False) -> None:
        """Build the network on ``device``, unless it is built already."""
        if self.network is not None:
            return
        network = self.build()
        if isinstance(network, nn.Module):
            network = network.eval().requires_grad_(False).to(device)
            network = network.to(memory_format=torch.channels_last)
        self.network = network
        self.call = torch.compile(network) if compiled else network

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        out = self.call(images)
        if not isinstance(out, dict):  # torch-fidelity returns a tuple of one tensor.
            out = {"pool": out[0] if isinstance(out, tuple) else out}
        return {key: value.float().flatten(1) for key, value in out.items()}

    def logits(self, pool: Tensor, device: torch.device) -> Tensor:
        """Compute class logits (n, classes) of pooled features (n, d) on ``device``."""
        self.load(device)
        with torch.inference_mode(), network_precision("float32"):
            return torch.cat([self.network.logits(x.to(device)) for x in pool.split(8192)])


@contextlib.contextmanager
def network_precision(precision: NetworkPrecision, device_type: str = "cuda") -> Iterator[None]:
    """Set the precision of float32 convolutions and products; restore the old one on exit."""
    if precision not in get_args(NetworkPrecision):
        raise EvaluationError(
            f"network precision {precision!r}: choose one of {get_args(NetworkPrecision)}"
        )
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]

    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee" if precision == "float32" else "tf32"
    try:
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def get_extractor(
    name: str, weights: str | Path | None = None, weights_sha256: str | None = None
) -> Extractor:
    """Return the extractor called ``name``.

    Args:
        name: a key of ``EXTRACTORS``, or an import path ``package.module:factory``.
        weights: a local file of weights with the published SHA-256 or with ``weights_sha256``.
        weights_sha256: SHA-256 that permits other weights than the published ones. The names of
            metrics then end in its first eight digits.

    Raises:
        EvaluationError: unknown name, missing file, or wrong hash.
    """
    weights = Path(weights).expanduser() if weights is not None else None
    if weights is not None and not weights.is_file():
        raise EvaluationError(f"{weights}: no such weights file (--weights)")
    if name in EXTRACTORS:
        return EXTRACTORS[name](name, weights, weights_sha256)
    if ":" in name:
        return _imported(name, weights, weights_sha256)
    raise EvaluationError(
        f"extractor {name!r} is unknown; give one of {', '.join(EXTRACTORS)}, or an import path "
        "package.module:factory"
    )


def label_of(name: str, published: bool = True, sha256: str | None = None) -> str:
    """Return the suffix of metric names: the extractor and, for own weights, digits of the hash."""
    word = "".join(c if c.isalnum() else "_" for c in name.lower())
    return word if published or sha256 is None else f"{word}_{sha256[:8]}"


def _inception(name: str, weights: Path | None, given: str | None) -> Extractor:
    sha256, published = identify_weights(weights, INCEPTION_SHA256, given)

    def build() -> nn.Module:
        from .inception import Inception

        path = fetch_weights(weights, INCEPTION_URL, INCEPTION_SHA256, sha256)
        return Inception(load_state(path))

    return Extractor(
        name="inception",
        label=None if published else label_of("inception", False, sha256),
        sha256=sha256,
        preprocessing=f"{TF_RESIZE} to 299, (x - 128) / 128",
        build=build,
        has_spatial=True,
        has_logits=True,
        dimensions={"pool": 2048, "spatial": 2023},
    )


def _classifier(name: str, weights: Path | None, given: str | None) -> Extractor:
    from .classifier import load_classifier

    if name == "digits":
        if weights is not None:
            raise EvaluationError(
                "the extractor digits has built-in weights; to give --weights, use --extractor "
                "classifier"
            )
        weights = DIGITS_WEIGHTS
    if weights is None:
        raise EvaluationError(
            f"the extractor {name} needs --weights FILE, written by fid-eval classifier"
        )
    sha256, _ = identify_weights(weights, None, given)
    model, metadata = load_classifier(weights)
    height, width = metadata["height_width"]
    return Extractor(
        name=metadata["name"],
        label=label_of(metadata["name"]),
        sha256=sha256,
        preprocessing="x / 127.5 - 1",
        build=lambda: model,
        image_size=(height, width),
        has_spatial=True,
        has_logits=True,
        knows_labels=True,
        dimensions=model.dimensions(height, width),
    )


def _vgg16(name: str, weights: Path | None, given: str | None) -> Extractor:
    sha256, published = identify_weights(weights, VGG16_SHA256_START, given)

    def build() -> nn.Module:
        from torch_fidelity import FeatureExtractorVGG16

        path = fetch_weights(weights, VGG16_URL, VGG16_SHA256_START, sha256)
        state = save_to_buffer(load_state(path))
        return FeatureExtractorVGG16("vgg16", ["fc2_relu"], state)

    label = label_of(name, published, sha256)
    return Extractor(name, label, sha256, IMAGENET_224, build, dimensions={"pool": 4096})


def _clip(name: str, weights: Path | None, given: str | None) -> Extractor:
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    model_name = CLIP[name]
    published_sha256 = MODEL_METADATA[model_name]["hash"]
    sha256, published = identify_weights(weights, published_sha256, given)

    def build() -> nn.Module:
        from torch_fidelity import FeatureExtractorCLIP

        # A TorchScript archive runs code. Its hash is checked, so only known code runs.
        path = fetch_weights(weights, MODEL_URLS[model_name], published_sha256, sha256)
        return FeatureExtractorCLIP(model_name, ["clip"], str(path))

    label = label_of(name, published, sha256)
    return Extractor(name, label, sha256, CLIP_PREPROCESSING, build)


def _dinov2(name: str, weights: Path | None, given: str | None) -> Extractor:
    sha256, _ = identify_weights(weights, None, given)

    def build() -> nn.Module:
        from .dinov2 import DINOv2

        return DINOv2(DINOV2[name], load_state(weights) if weights is not None else None)

    # The label has no hash, because there is no published hash to compare with.
    return Extractor(name, label_of(name), sha256, IMAGENET_224, build)


def _timm(name: str, weights: Path | None, given: str | None) -> Extractor:
    from .timm_models import MODELS, TimmFeatures, import_timm, published_weights

    import_timm()
    model = MODELS[name]
    path = weights or published_weights(model)
    sha256, _ = identify_weights(path, None, given)
    preprocessing = f"antialiased bicubic to {model.size}, mean and deviation of {model.name}"

    def build() -> nn.Module:
        return TimmFeatures(model, load_state(path))

    return Extractor(name, label_of(name), sha256, preprocessing, build)


def _imported(name: str, weights: Path | None, given: str | None) -> Extractor:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"extractor {name!r} cannot be imported: {error}") from None
    sha256, _ = identify_weights(weights, None, given)
    made = factory(weights) if weights is not None else factory()
    return wrap_extractor(made, attribute, sha256)


def wrap_extractor(network: Any, name: str | None = None, sha256: str | None = None) -> Extractor:
    """Make an Extractor of a module or function from uint8 (B, 3, H, W) to (B, d) or a dict.

    ``network`` may have the attributes ``name``, ``preprocessing``, ``image_size``, ``logits``,
    ``knows_labels`` and ``has_spatial`` of ``Extractor``.

    Args:
        network: the module or function.
        name: its name, unless it has an attribute ``name``.
        sha256: hash of its weights; by default of the state dict of a module.
    """
    if isinstance(network, Extractor):
        return network
    if not callable(network):
        raise EvaluationError(
            f"extractor {name!r} is a {type(network).__name__}, which is not callable"
        )
    if sha256 is None and isinstance(network, nn.Module):
        sha256 = state_sha256(network)
    own = getattr(network, "name", None) or getattr(network, "__name__", None)
    name = own or name or type(network).__name__
    return Extractor(
        name=name,
        label=label_of(name),
        sha256=sha256,
        preprocessing=getattr(network, "preprocessing", "its own"),
        build=lambda: network,
        image_size=getattr(network, "image_size", None),
        has_spatial=bool(getattr(network, "has_spatial", False)),
        has_logits=callable(getattr(network, "logits", None)),
        knows_labels=bool(getattr(network, "knows_labels", False)),
    )


EXTRACTORS: dict[str, Callable[[str, Path | None, str | None], Extractor]] = {
    "inception": _inception,
    "digits": _classifier,
    "classifier": _classifier,
    "vgg16": _vgg16,
    **dict.fromkeys(DINOV2, _dinov2),
    **dict.fromkeys(CLIP, _clip),
    **dict.fromkeys(("r6-convnext", "r6-dinov2", "r6-mae", "r6-siglip", "r6-clip"), _timm),
}
