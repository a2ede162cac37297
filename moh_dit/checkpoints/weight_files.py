"""Open and write weight files: safetensors, single or sharded, and files of ``torch.save``.

Tensors are memory-mapped, so opening a file reads little of it. Pickles are opened with
``weights_only=True`` and cannot run code.
"""

import argparse
import json
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common.disk_space import format_bytes
from ..common.errors import UserError
from ..common.manifest import verify_files
from ..common.paths import PICKLES

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Entries of a training checkpoint that may contain the state dict, in order of preference.
RAW = ("model", "state_dict", "module")
ENTRIES = {"averaged": ("ema", "model_ema", "state_dict_ema", *RAW), "raw": RAW}
# DistributedDataParallel, torch.compile, FSDP and activation checkpointing add these to names.
WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# A weight of every DiT, here and in diffusers. Its prefix is that of the model in a larger module.
ANCHORS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
MAX_EXPANSION = 100  # of compressed records, so that a small file cannot fill the memory

State = dict[str, Tensor]


def open_weights(file: Path, entry: str = "averaged", verify: bool = True) -> State:
    """Return the state dict in a weight file, as memory-mapped CPU tensors.

    Args:
        file: a ``.safetensors`` file, the ``.index.json`` of a sharded one, or a file of
            ``torch.save``.
        entry: which weights to take from a file that contains both, ``"averaged"`` or ``"raw"``.
        verify: compare the file with its manifest, if it has one.

    Raises:
        UserError: the file is missing, damaged or not a weight file, or a pickle in it would run
            code.
    """
    if not file.is_file():
        raise UserError(f"weights {file} do not exist")
    if verify:
        verify_files(file)
    if file.name.endswith(".index.json"):
        state = _open_shards(file, entry, verify)
    elif file.suffix == ".safetensors":
        state = _open_safetensors(file)
    elif file.suffix in PICKLES:
        state = _open_torch(file, entry)
    else:
        known = ", ".join(PICKLES)
        raise UserError(f"{file} is not a weight file; give a .safetensors file or one of {known}")
    for name, tensor in state.items():
        # Batch norms count their batches in an int64 buffer.
        if tensor.dtype not in DTYPES and not name.endswith("num_batches_tracked"):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise UserError(f"{file}: {name} is {tensor.dtype}; weights must be one of {known}")
    return state


def _open_shards(index: Path, entry: str, verify: bool) -> State:
    try:
        shards = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / Path(name).name for name in sorted(set(shards.values()))}
        if any(name.endswith(".index.json") for name in files):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
        raise UserError(f"{index} is not the index of a sharded weight file") from None
    opened = {name: open_weights(file, entry, verify) for name, file in files.items()}
    if missing := [key for key, name in shards.items() if key not in opened[name]]:
        file = shards[missing[0]]
        raise UserError(f"{index} expects {missing[0]} in {file}, which does not contain it")
    return {key: opened[name][key] for key, name in shards.items()}


def _open_safetensors(file: Path) -> State:
    state = {}
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            # One mapping per tensor, so that its pages are released together with it.
            with safe_open(file, framework="pt") as opened:
                state[name] = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
    return state


def _open_torch(file: Path, entry: str) -> State:
    # torch before 1.6 wrote another format, which cannot be memory-mapped.
    mmap = zipfile.is_zipfile(file) and _verify_records(file)
    state = _find_state(_unpickle(file, mmap), entry)
    if not state:
        raise UserError(
            f"{file} contains no state dict; expected one as the whole content or as the entry "
            + " or ".join(ENTRIES["averaged"])
        )
    return state


def _verify_records(file: Path) -> bool:
    """Verify the checksums of all records; return whether the file can be memory-mapped."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if size > MAX_EXPANSION * max(file.stat().st_size, 1 << 20):
                raise UserError(f"{file} is refused: it would expand to {format_bytes(size)}")
            damaged = archive.testzip()  # torch.load does not verify them
    except (zipfile.BadZipFile, OSError, EOFError):
        raise UserError(f"{file} is truncated or damaged; download or copy it again") from None
    if damaged:
        raise UserError(f"{file} is damaged: {damaged} does not match its checksum")
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _unpickle(file: Path, mmap: bool) -> Any:
    """Load a file of ``torch.save`` without running any code in it."""
    # Published training checkpoints contain their arguments: a namespace of plain values.
    harmless = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with harmless, warnings.catch_warnings():
            # torch warns about pickle protocols before it raises the error handled below.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} is a pickle that would run code ({found[1]}) and was not opened; if you "
                "trust its source, save its state dict alone and give that file"
            ) from None
        raise UserError(f"{file} is damaged, or was not written by torch.save") from None
    except Exception:  # a truncated pickle raises errors of many types
        raise UserError(f"{file} is truncated or damaged; download or copy it again") from None


def _find_state(content: Any, entry: str) -> State:
    """Return the state dict in a loaded file; may be empty."""
    if not isinstance(content, Mapping):
        return {}
    for name in ENTRIES[entry]:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def unwrap_names(state: State, entry: str = "averaged") -> State:
    """Return the weights of the DiT in a state dict, without prefixes of wrappers.

    If several modules contain a DiT, as in Lightning's checkpoints, one whose name contains "ema"
    is taken for the averaged weights.

    Args:
        state: a state dict of a DiT, or of a module that contains one.
        entry: ``"averaged"`` or ``"raw"``.

    Raises:
        UserError: two weights have the same name without the prefixes.
    """
    names = {key: WRAPPERS.sub("", key) for key in state}
    prefixes = [
        name.removesuffix(anchor)
        for name in names.values()
        for anchor in ANCHORS
        if name == anchor or name.endswith(f".{anchor}")
    ]
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    others = [prefix for prefix in prefixes if prefix not in averaged]
    chosen = averaged + others if entry == "averaged" else others + averaged
    prefix = chosen[0] if chosen and "" not in prefixes else ""
    unwrapped: State = {}
    for key, name in names.items():
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            if short in unwrapped:
                raise UserError(f"several weights are named {short} without their prefixes")
            unwrapped[short] = state[key]
    return unwrapped


def write_safetensors(file: Path, state: State) -> None:
    """Write a state dict as safetensors."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors makes files that only their owner can read


def write_torch(file: Path, state: State) -> None:
    """Write a state dict with ``torch.save``."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch does not raise OSError when the disk is full
        raise OSError(f"torch.save: {str(error).splitlines()[0]}") from None
