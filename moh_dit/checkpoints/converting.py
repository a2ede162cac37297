"""Describe a checkpoint, or convert it to another format."""

from dataclasses import replace
from pathlib import Path

import torch

from ..common.atomic_write import atomic_output
from ..common.disk_space import format_bytes, require_disk_space
from ..continue_tuning.model import dense_to_moh, noisy_batches
from ..model.architecture import describe_architecture, full_config
from ..pipeline.pipeline import MoHDiTPipeline
from .config import ConvertConfig
from .opening import OpenedCheckpoint, load_vae_and_scheduler, open_checkpoint
from .writing import PLANS


def convert(config: ConvertConfig) -> None:
    """Describe the source, and write it in the format ``config.to`` if that is set."""
    config.check_paths()
    opened = open_checkpoint(
        config.source,
        config.weights,
        local_files_only=config.local_files_only,
        verify=not config.no_verify,
    )
    given = {key: value for key, value in vars(config.model).items() if value is not None}
    opened = replace(opened, config=opened.resolve(**given))
    if config.moh.num_shared_heads is not None:
        print(summary(config.source, opened))
        opened = to_moh(opened, config)
    if config.dtype != "keep":
        for name, tensor in opened.state.items():
            opened.state[name] = tensor.to(getattr(torch, config.dtype))
    print(summary(config.source, opened))
    if config.to is None:
        return
    output = Path(config.output or "")
    write = PLANS[config.to](opened, config)
    size = sum(tensor.nbytes for tensor in opened.state.values())
    require_disk_space(output, size * 1.02, f"output {output}")
    print(f"writing {output} ({format_bytes(size)})", flush=True)
    with atomic_output(output, manifest=config.to != "published") as partial:
        write(partial)
    print(f"wrote {output}")


def to_moh(opened: OpenedCheckpoint, config: ConvertConfig) -> OpenedCheckpoint:
    """Convert a dense checkpoint to mixture-of-head layers, with the whole model in memory."""
    model = opened.build(torch.float32)
    data = None
    if config.moh.data is not None:
        vae, scheduler = load_vae_and_scheduler(opened, dict(model.config), config.autoencoder)
        pipeline = MoHDiTPipeline(model, vae.float(), scheduler)
        data = noisy_batches(pipeline, config.moh.data, config.moh.num_images, seed=config.moh.seed)
    dense_to_moh(model, config.moh, data)
    dtype = next(iter(opened.state.values())).dtype
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return replace(opened, config=full_config(dict(model.config)), state=state, format="moh-dit")


def summary(source: str, opened: OpenedCheckpoint) -> str:
    """Describe a checkpoint in one line."""
    assert opened.config is not None
    state = opened.state.values()
    parameters = sum(tensor.numel() for tensor in state)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state})
    sizes = f"{parameters:,} parameters in {' and '.join(dtypes)}"
    return f"{source}: {describe_architecture(opened.config)}; {sizes}, {opened.format} format"
