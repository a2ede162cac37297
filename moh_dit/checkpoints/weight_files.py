"""Weight files, opened without being read and written tensor by tensor.

A state dict here is a mapping from names to :class:`LazyTensor`, so that converting a model holds
one of its tensors in memory at a time, however large it is. Files are safetensors, single or
sharded with an index, or what ``torch.save`` writes; a pickle in the latter is never run.
"""

import argparse
import io
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import UserError
from ..common.hub import PICKLES

# By how wide they are: a file begins with the widest, so that every tensor in it is aligned.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where training scripts put a state dict among other things: averaged weights, then raw ones.
ENTRIES = {"averaged": ("ema", "model", "state_dict"), "raw": ("model", "state_dict")}
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
ALIGNMENT = 64  # bytes, as torch.save


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for, and then given away."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same, converted when it is read."""
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))


State = Mapping[str, LazyTensor]


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor already in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_weights(file: Path, entry: str = "averaged") -> dict[str, LazyTensor]:
    """The state dict in a weight file.

    Args:
        file: ``.safetensors``, ``.index.json`` of a sharded file, or a file of ``torch.save``.
        entry: ``"averaged"`` or ``"raw"``: which one of a file that holds both.

    Raises:
        UserError: when it is missing, damaged, no such file, or a pickle that would run code.
    """
    if not file.is_file():
        raise UserError(f"weights {file} do not exist")
    if file.name.endswith(".index.json"):
        return _open_shards(file, entry)
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix in PICKLES:
        return _open_torch(file, entry)
    raise UserError(f"{file} is no weight file; give .safetensors or one of {', '.join(PICKLES)}")


def _open_shards(index: Path, entry: str) -> dict[str, LazyTensor]:
    try:
        shards = json.loads(index.read_text())["weight_map"]
        names = sorted(set(shards.values()))
        opened = {name: open_weights(index.parent / Path(name).name, entry) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not the index of a sharded file") from None
    if missing := [key for key, name in shards.items() if key not in opened[name]]:
        raise UserError(f"{index} names {missing[0]}, which {shards[missing[0]]} does not hold")
    return {key: opened[name][key] for key, name in shards.items()}


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    state = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                header = opened.get_slice(name)
                if (kind := header.get_dtype()) not in DTYPES:
                    raise UserError(f"{file}: {name} is {kind}; weights are {', '.join(DTYPES)}")
                read = partial(_read_safetensors, file, name)
                state[name] = LazyTensor(tuple(header.get_shape()), DTYPES[kind], read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
    return state


def _read_safetensors(file: Path, name: str) -> Tensor:
    # Opened anew each time: a mapping that stays would keep all that was read resident.
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _open_torch(file: Path, entry: str) -> dict[str, LazyTensor]:
    zipped = zipfile.is_zipfile(file)
    state = find_state(_unpickle(file, "meta" if zipped else "cpu"), entry)
    if not state:
        raise UserError(
            f"{file} holds no state dict; one is expected as it is, or as its entry "
            + " or ".join(ENTRIES["averaged"])
        )
    known = DTYPES.values()
    if wrong := [f"{key} is {t.dtype}" for key, t in state.items() if t.dtype not in known]:
        raise UserError(f"{file}: {wrong[0]}; weights are {', '.join(DTYPES)}")
    if not zipped:  # of torch before 1.6: read whole
        return {key: lazy(tensor) for key, tensor in state.items()}
    records = _records(file)
    opened = {}
    for key, tensor in state.items():
        record = records[cast(int, tensor.untyped_storage()._checkpoint_offset)]
        read = partial(_read_record, file, record, tensor)
        opened[key] = LazyTensor(tuple(tensor.shape), tensor.dtype, read)
    return opened


def _unpickle(file: Path, location: str) -> Any:
    """What ``torch.save`` wrote, without its code; on ``"meta"`` without its data either."""
    # Training scripts store their arguments beside the weights: a plain bag of values.
    harmless = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols, before it fails
            return torch.load(file, map_location=location, weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} is a pickle that would run code ({found[1]}) and is not opened; if you "
                "trust its source, save its state dict alone and give that"
            ) from None
        raise UserError(f"{file} is damaged, or no file of torch.save") from None
    except Exception:  # a torn pickle fails in any way
        raise UserError(f"{file} is truncated or damaged; get it again") from None


def find_state(entries: Any, entry: str) -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint, without wrappers' prefixes; empty where none is."""
    if not isinstance(entries, Mapping):
        return {}
    for name in ENTRIES[entry]:
        if isinstance(entries.get(name), Mapping):
            entries = entries[name]
            break
    state = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _records(file: Path) -> dict[int, zipfile.ZipInfo]:
    """Members of the archive by where their data begin: behind 30 bytes, a name and a field."""
    records = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        for record in archive.infolist():
            raw.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            records[record.header_offset + 30 + name + extra] = record
    return records


def _read_record(file: Path, record: zipfile.ZipInfo, meta: Tensor) -> Tensor:
    try:
        with zipfile.ZipFile(file) as archive:
            values = bytearray(archive.read(record))  # checks them against their CRC
    except (zipfile.BadZipFile, OSError, EOFError):
        raise UserError(f"{file} is damaged: {record.filename} fails its checksum") from None
    storage = torch.frombuffer(values, dtype=meta.dtype)
    return storage.as_strided(meta.shape, meta.stride(), meta.storage_offset())


def write_safetensors(
    file: Path, state: State, on_written: Callable[[], Any] = lambda: None
) -> None:
    """Write a state dict as safetensors, one tensor in memory at a time.

    Args:
        file: where to write.
        state: what to write.
        on_written: called after each tensor.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[key] = dict(
            dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end]
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            out.write(values(tensor))
            on_written()


def write_torch(file: Path, state: State, on_written: Callable[[], Any] = lambda: None) -> None:
    """Write a state dict as ``torch.save`` does, one tensor in memory at a time.

    ``torch.load`` opens it, also with ``weights_only=True`` and ``mmap=True``.
    """
    description = io.BytesIO()
    pickler = _StatePickler(description)
    pickler.dump(OrderedDict(state))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", description.getvalue())
        _write_record(archive, "byteorder", b"little")
        for number, tensor in enumerate(pickler.tensors):
            _write_record(archive, f"data/{number}", values(tensor))
            on_written()
        _write_record(archive, "version", b"3\n")


class _Storage:
    """Stands for the data of a tensor in the pickle of ``torch.save``."""

    def __init__(self, key: int, tensor: LazyTensor):
        kind = torch.storage._dtype_to_storage_type_map()[tensor.dtype]
        numel = torch.Size(tensor.shape).numel()
        self.identity = ("storage", getattr(torch, kind), str(key), "cpu", numel)


class _StatePickler(pickle.Pickler):
    """The pickle that describes a state dict in a file of ``torch.save``, its format since 1.6."""

    def __init__(self, out: io.BytesIO):
        super().__init__(out, protocol=2)
        self.tensors: list[LazyTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        storage = _Storage(len(self.tensors), obj)
        self.tensors.append(obj)
        stride = torch.empty(obj.shape, device="meta").stride()
        arguments: tuple = (storage, 0, obj.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    before = archive.fp.tell() + 30 + len(record.filename) + 4
    padding = -before % ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(record, data)  # type: ignore[arg-type]


def values(tensor: LazyTensor) -> memoryview:
    """The bytes of a tensor's values, row by row."""
    flat = tensor.read().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
