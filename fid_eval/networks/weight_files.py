"""Files of extractor weights: their hashes, loading them safely, fetching them once."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..sets.hashing import file_sha256


def checked_sha256(weights: Path, published: str | None, given: str | None) -> tuple[str, bool]:
    """(sha256 of the file, is it the published one?); refuses a file that is neither."""
    found = file_sha256(weights)
    if given is not None and found != given.lower():
        raise EvaluationError(f"{weights}: sha256 {found}, not {given} as asked: another file")
    is_published = published is not None and found.startswith(published)
    if published is not None and not is_published and given is None:
        raise EvaluationError(
            f"{weights}: sha256 {found}, the published weights have {published}: damaged or other "
            f"weights. If you mean these, say --weights-sha256 {found}"
        )
    return found, is_published


def load_state(weights: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or a pickle that holds tensors only."""
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(weights)
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise EvaluationError(f"{weights}: not a plain file of weights: {error}") from None


def hub_file(url: str, published: str | None) -> Path:
    """The file of ``url`` in torch's download folder, fetched there if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), published, progress=True)
        except Exception as error:
            raise EvaluationError(
                f"cannot download {url} ({error}). Without a network: fetch it elsewhere and give "
                f"its path with --weights, or put it at {path}"
            ) from None
    return path


def repacked(state: dict[str, Tensor]) -> Any:
    """A state dict, already loaded safely, as the pickle that torch-fidelity insists on opening."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(json.dumps([key, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
