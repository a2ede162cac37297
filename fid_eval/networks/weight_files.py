"""Download extractor weights, check their hashes and load them safely."""

import hashlib
import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..sets.hashing import file_sha256


def identify_weights(
    weights: Path | None, published: str | None, given: str | None = None
) -> tuple[str | None, bool]:
    """Return the SHA-256 of weights, and whether they are the published weights.

    Args:
        weights: a local file; None for the published weights.
        published: SHA-256 of the published weights, or its first digits; None if there is none.
        given: SHA-256 that the user expects, or None.

    Raises:
        EvaluationError: the file has neither hash.
    """
    if weights is None:
        return published, True
    found = file_sha256(weights)
    if given is not None and found != given.lower():
        raise EvaluationError(
            f"{weights}: the sha256 is {found}, but --weights_sha256 is {given}; use another file"
        )
    is_published = published is not None and found.startswith(published)
    if published is not None and not is_published and given is None:
        raise EvaluationError(
            f"{weights}: the sha256 is {found}, but the published weights have {published}. The "
            f"file is damaged or holds other weights; to use it, add --weights_sha256 {found}"
        )
    return (published if is_published else found), is_published


def load_state(weights: Path) -> dict[str, Tensor]:
    """Load a state dict from .safetensors, or from a PyTorch file that holds only tensors."""
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(weights)
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        raise EvaluationError(
            f"{weights}: not a file that holds only tensors, or damaged: {error}"
        ) from None


def hub_file(url: str, published: str | None) -> Path:
    """Return the path of ``url`` in the download folder of torch.hub; download it if missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), published, progress=True)
        except Exception as error:
            raise EvaluationError(
                f"cannot download {url} ({error}). Without a network, download it elsewhere and "
                f"give its path with --weights, or copy it to {path}"
            ) from None
    return path


def fetch_weights(weights: Path | None, url: str, published: str, sha256: str | None) -> Path:
    """Return the path of ``weights`` or of the downloaded ``url``, after a check of its SHA-256."""
    path = weights or hub_file(url, published)
    identify_weights(path, sha256)
    return path


def save_to_buffer(state: dict[str, Tensor]) -> io.BytesIO:
    """Save a safely loaded state dict to memory, because torch-fidelity only accepts files."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def state_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and values of a module's state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(json.dumps([key, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
