"""Convert a checkpoint from one format to another, or describe it."""

from dataclasses import replace
from pathlib import Path

import torch

from ..common.atomic_write import atomic_output
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..continue_tuning.model import MoHSettings, dense_to_moh, noisy_batches
from ..model.architecture import describe, full_config
from ..pipeline.pipeline import MoHDiTPipeline
from .config import ConvertConfig
from .opening import Opened, open_checkpoint, surroundings
from .weight_files import State, lazy
from .writing import PLANS, Extras


def convert(config: ConvertConfig) -> None:
    """Say what the source is, and write it as asked."""
    if config.to is not None:
        check_output(config)
    opened = open_checkpoint(
        config.source, config.weights, local_files_only=config.local_files_only
    )
    given = {key: value for key, value in vars(config.model).items() if value is not None}
    opened = replace(opened, config=opened.resolve(**given))
    if config.moh.num_shared_heads is not None:
        print(summary(config.source, opened))
        opened = to_moh(opened, config)
    if config.dtype != "keep":
        dtype = getattr(torch, config.dtype)
        opened.state = {name: tensor.to(dtype) for name, tensor in opened.state.items()}
    print(summary(config.source, opened))
    if config.to is None:
        return
    output = Path(config.output or "")
    is_hub_id = not Path(config.source).exists()
    base_model = "/".join(config.source.split("/")[:2]) if is_hub_id else None
    extras = Extras(config.autoencoder, config.with_code, config.license, base_model)
    write = PLANS[config.to](opened, extras)
    check_space(output, opened.state)
    with atomic_output(output) as aside:
        write(aside)
    print(f"wrote {output}")


def to_moh(opened: Opened, config: ConvertConfig) -> Opened:
    """The same with mixture-of-head layers; this one holds the whole model in memory."""
    plan = config.moh
    settings = MoHSettings(
        plan.num_shared_heads,
        plan.num_active_routed_heads,
        plan.router,
        plan.shared_heads,
        plan.seed,
    )
    model = opened.build(torch.float32)
    data = None
    if plan.data is not None:
        vae, scheduler = surroundings(opened, dict(model.config), config.autoencoder)
        pipeline = MoHDiTPipeline(model, vae.float(), scheduler)
        data = noisy_batches(pipeline, plan.data, plan.num_images, seed=plan.seed)
    dense_to_moh(model, settings, data)
    stored = next(iter(opened.state.values())).dtype
    state = {name: lazy(tensor.to(stored)) for name, tensor in model.state_dict().items()}
    return replace(opened, config=full_config(dict(model.config)), state=state, kind="moh-dit")


def summary(source: str, opened: Opened) -> str:
    """What a checkpoint is, in one line."""
    assert opened.config is not None
    state = opened.state.values()
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in state)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state})
    sizes = f"{parameters:,} parameters in {' and '.join(dtypes)}"
    return f"{source}: {describe(opened.config)}; {sizes}, {opened.kind} format"


def check_output(config: ConvertConfig) -> None:
    """Raise ``UserError`` unless the output is named, new, and fits the format."""
    if config.output is None:
        raise UserError("output is not set; say what to write, or leave --to out")
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    if config.to == "published" and output.suffix != ".pt":
        raise UserError(f"output {output}: the published format is a file called .pt")
    if config.with_code and config.to != "pipeline":
        raise UserError("with_code goes with --to pipeline")


def check_space(output: Path, state: State) -> None:
    """Raise ``UserError`` unless the weights fit on the disk."""
    needed = sum(tensor.nbytes for tensor in state.values())
    require_disk_space(output, needed * 1.02, f"output {output}")
