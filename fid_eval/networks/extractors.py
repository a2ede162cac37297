"""Feature extractors by name or import path.

An extractor turns uint8 (B, 3, H, W) into ``pool`` (B, d) and, where it has them, ``spatial``
(B, s); ``logits`` maps pooled features to class logits. What identifies it (name, hash of the
weights, preprocessing) is known before the network is built, so that bad input is refused and
cached features are found without it.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from .weight_files import checked_sha256, hub_file, load_state, repacked, state_sha256

NetworkPrecision = Literal["float32", "tf32", "bf16"]
DIGITS_WEIGHTS = Path(__file__).parents[1] / "weights" / "digits.safetensors"

# sha256 of the published weights; DINOv2's publishers give none
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
VGG16_SHA256_START = "397923af"
DINOV2 = {
    "dinov2": "dinov2_vitl14",  # FD-DINOv2 is defined with ViT-L/14 (Stein et al. 2023)
    "dinov2-vit-s-14": "dinov2_vits14",
    "dinov2-vit-b-14": "dinov2_vitb14",
    "dinov2-vit-l-14": "dinov2_vitl14",
    "dinov2-vit-g-14": "dinov2_vitg14",
}
CLIP = {
    "clip": "clip-vit-l-14-336px",  # CMMD is defined with it (Jayasumana et al. 2024)
    "clip-vit-b-32": "clip-vit-b-32",
    "clip-vit-l-14": "clip-vit-l-14",
}
TF_RESIZE = "TensorFlow 1 bilinear"


@dataclass
class Extractor:
    """What is known of a feature extractor, and the network once it is needed.

    ``label``: None for the published Inception, whose numbers have names of their own (fid, …);
    for every other extractor the word that its metric names carry (fd_digits, …).
    ``build()`` gives a module or function uint8 (B, 3, H, W) → Tensor or {"pool": …,
    "spatial": …}, with an optional method ``logits(pool)``.
    """

    name: str
    label: str | None
    sha256: str | None  # of the weights
    preprocessing: str
    build: Callable[[], Any]
    image_size: tuple[int, int] | None = None  # the only size it takes
    has_spatial: bool = False
    has_logits: bool = False
    knows_labels: bool = False  # its classes are the data's labels
    dimensions: dict[str, int] = field(default_factory=dict)
    network: Any = None

    def identity(self) -> dict[str, Any]:
        """What must agree for two sets of features to be comparable."""
        return {"name": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing}

    def load(self, device: torch.device, compiled: bool = False) -> None:
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
        out = out if isinstance(out, dict) else {"pool": out}
        return {key: value.float().flatten(1) for key, value in out.items()}

    def logits(self, pool: Tensor, device: torch.device) -> Tensor:
        """Class logits (n, classes) of pooled features (n, d), on ``device``."""
        self.load(device)
        with torch.inference_mode(), network_precision("float32"):
            return torch.cat([self.network.logits(x.to(device)) for x in pool.split(8192)])


@contextlib.contextmanager
def network_precision(precision: NetworkPrecision, device_type: str = "cuda") -> Iterator[None]:
    """Run float32 convolutions and products as ``precision`` says; restores what was set."""
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
    """The extractor called ``name``: of EXTRACTORS, or an import path ``package.module:factory``.

    ``weights``: a local file. Its sha256 must be the published one, or ``weights_sha256``, which
    accepts other weights knowingly (the metric names then carry the first eight digits).
    """
    weights = Path(weights).expanduser() if weights is not None else None
    if weights is not None and not weights.is_file():
        raise EvaluationError(f"{weights}: no such file of extractor weights")
    if name in EXTRACTORS:
        return EXTRACTORS[name](name, weights, weights_sha256)
    if ":" in name:
        return _imported(name, weights, weights_sha256)
    raise EvaluationError(
        f"extractor {name!r}: not one of {', '.join(EXTRACTORS)}, nor an import path "
        "package.module:factory"
    )


def label_of(name: str, published: bool, sha256: str | None) -> str:
    """What metric names carry: the extractor's name, and digits of weights not the published."""
    word = "".join(c if c.isalnum() else "_" for c in name.lower())
    return word if published or sha256 is None else f"{word}_{sha256[:8]}"


def _inception(name: str, weights: Path | None, given: str | None) -> Extractor:
    published = weights is None
    if weights is not None:
        sha256, published = checked_sha256(weights, INCEPTION_SHA256, given)
    else:
        sha256 = INCEPTION_SHA256

    def build() -> nn.Module:
        from .inception import Inception

        path = weights or hub_file(INCEPTION_URL, INCEPTION_SHA256)
        checked_sha256(path, sha256, sha256)
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


class _Classified(nn.Module):
    """A ``Classifier`` behind the extractor interface."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, spatial = self.model.features(images)
        return {"pool": pool, "spatial": spatial}

    def logits(self, pool: Tensor) -> Tensor:
        return self.model.head(pool)


def _classifier(name: str, weights: Path | None, given: str | None) -> Extractor:
    from .classifier import SPATIAL_CHANNELS, load_classifier

    if name == "digits":
        if weights is not None:
            raise EvaluationError("digits: its weights are built in; use --extractor classifier")
        weights = DIGITS_WEIGHTS
    if weights is None:
        raise EvaluationError(
            f"{name}: give --weights, from python -m fid_eval.networks.classifier train"
        )
    sha256, _ = checked_sha256(weights, None, given)
    model, metadata = load_classifier(weights)
    height, width = metadata["height_width"]
    quarter = -(-height // 4) * -(-width // 4)
    return Extractor(
        name=metadata["name"],
        label=label_of(metadata["name"], True, None),
        sha256=sha256,
        preprocessing="x / 127.5 - 1",
        build=lambda: _Classified(model),
        image_size=(height, width),
        has_spatial=True,
        has_logits=True,
        knows_labels=True,
        dimensions={"pool": metadata["width"], "spatial": SPATIAL_CHANNELS * quarter},
    )


class _FirstOf(nn.Module):
    """A torch-fidelity extractor, which returns a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


def _vgg16(name: str, weights: Path | None, given: str | None) -> Extractor:
    sha256, published = VGG16_SHA256_START, True
    if weights is not None:
        found, published = checked_sha256(weights, VGG16_SHA256_START, given)
        sha256 = sha256 if published else found

    def build() -> nn.Module:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
        from torchvision.models import VGG16_Weights

        path = weights or hub_file(VGG16_Weights.IMAGENET1K_V1.url, VGG16_SHA256_START)
        checked_sha256(path, sha256, None)
        safe = repacked(load_state(path))
        return _FirstOf(FeatureExtractorVGG16("vgg16", ["fc2_relu"], safe))

    return Extractor(
        "vgg16",
        label_of("vgg16", published, sha256),
        sha256,
        f"{TF_RESIZE} to 224, ImageNet mean and deviation",
        build,
        dimensions={"pool": 4096},
    )


def _clip(name: str, weights: Path | None, given: str | None) -> Extractor:
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    model_name = CLIP[name]
    sha256 = published = MODEL_METADATA[model_name]["hash"]
    if weights is not None:
        sha256, _ = checked_sha256(weights, published, given)

    def build() -> nn.Module:
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        path = weights or hub_file(MODEL_URLS[model_name], published)
        checked_sha256(path, sha256, None)  # a TorchScript archive: run only if known
        return _FirstOf(FeatureExtractorCLIP(model_name, ["clip"], str(path)))

    return Extractor(
        name,
        label_of(name, sha256 == published, sha256),
        sha256,
        f"{TF_RESIZE} to the model's size, CLIP mean and deviation",
        build,
    )


def _dinov2(name: str, weights: Path | None, given: str | None) -> Extractor:
    sha256 = checked_sha256(weights, None, given)[0] if weights is not None else None

    def build() -> nn.Module:
        from .dinov2 import DINOv2

        return DINOv2(DINOV2[name], load_state(weights) if weights is not None else None)

    return Extractor(
        name,
        label_of(name, True, None),  # their publishers give no hash to tell them by
        sha256,
        f"{TF_RESIZE} to 224, ImageNet mean and deviation",
        build,
    )


def _imported(name: str, weights: Path | None, given: str | None) -> Extractor:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"extractor {name!r}: cannot import it: {error}") from None
    sha256 = checked_sha256(weights, None, given)[0] if weights is not None else None
    made = factory(weights) if weights is not None else factory()
    return wrap_extractor(made, attribute, sha256)


def wrap_extractor(network: Any, name: str | None = None, sha256: str | None = None) -> Extractor:
    """The user's own module or function uint8 (B, 3, H, W) → (B, d) or a dict, as an Extractor.

    Optional attributes: ``name``, ``preprocessing``, ``image_size``, ``logits``, ``knows_labels``,
    ``has_spatial``. Without a weights file, a module is identified by the hash of its state dict.
    """
    if isinstance(network, Extractor):
        return network
    if not callable(network):
        raise EvaluationError(f"extractor {name!r}: {type(network).__name__} is not callable")
    if sha256 is None and isinstance(network, nn.Module):
        sha256 = state_sha256(network)
    own = getattr(network, "name", None) or getattr(network, "__name__", None)
    name = own or name or type(network).__name__
    return Extractor(
        name=name,
        label=label_of(name, True, None),
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
}
