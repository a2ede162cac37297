"""Check paths and names that a user gives, without importing torch."""

import re
from pathlib import Path

from .errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


def require_data(source: str | Path) -> None:
    """Raise ``UserError`` if ``source`` is a local path that does not exist.

    The digits, Hugging Face data sets, patterns of tar shards and folders within archives are not
    checked.
    """
    name = str(source)
    if name == "digits" or name.startswith(("hf:", "hf-stream:")) or re.search(r"[*?\[{]", name):
        return
    path = Path(name).expanduser()
    if not path.exists() and not any(parent.is_file() for parent in path.parents):
        raise UserError(
            f'data {name} does not exist: give "digits", a folder with one sub-folder for each '
            "class, an archive, or hf://OWNER/NAME"
        )


def require_autoencoder(name: str | Path) -> None:
    """Raise ``UserError`` if no autoencoder can have this name.

    An autoencoder is ``"digits"``, a local folder, or a repository ``owner/name`` on the Hub.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"autoencoder {name} is a file: give the folder that contains it")
    if (
        str(name) not in ("digits", "none")
        and not path.is_dir()
        and not HUB_ID.fullmatch(str(name))
    ):
        raise UserError(
            f'autoencoder {name} does not exist: give "digits", "none", a folder with config.json '
            "and diffusion_pytorch_model.safetensors, or a Hub id (owner/name)"
        )


def choose_autoencoder(
    autoencoder: str | None, source: str | Path, option: str = "--autoencoder"
) -> str:
    """Return the autoencoder for a data set.

    Args:
        autoencoder: the user's choice, or ``None`` for the default, which only the digits have.
        source: the data set.
        option: the option that sets the autoencoder, for the message.

    Raises:
        UserError: no autoencoder is given for a data set other than ``"digits"``.
    """
    if autoencoder is not None:
        return autoencoder
    if str(source) == "digits":
        return "digits"
    raise UserError(
        f"no autoencoder is given for data {source}: set {option} to a folder or a Hub id, for "
        "example stabilityai/sd-vae-ft-ema, or train one with moh-dit autoencoder"
    )


def holds_files(folder: Path) -> bool:
    """Return whether a folder exists and contains more than hidden files of killed processes."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def require_new_output(output: Path) -> None:
    """Raise ``UserError`` if the file or folder ``output`` exists."""
    if output.exists():
        raise UserError(f"output {output} exists: give another name, or move it away")


def split_hub_id(source: str | Path, option: str = "checkpoint") -> tuple[str, str] | None:
    """Split a hub id into repository and file, or return ``None`` for an existing local path.

    Args:
        source: a path; ``owner/name``; or ``owner/name/path/to/file`` for one weight file of a
            repository. The file is ``""`` for a whole repository.
        option: name of the setting, for the message.

    Raises:
        UserError: ``source`` neither exists nor has the form of a hub id.
    """
    if Path(source).exists():
        return None
    name = str(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)", name)
    file = match[2].removeprefix("/") if match else ""
    if match is None or name.startswith(".") or is_weight_file(file or name) != bool(file):
        raise UserError(f"{option} {name} does not exist; give a path, or a hub id (owner/name)")
    return match[1], file


def is_weight_file(name: str) -> bool:
    """Return whether a file name has the suffix of a weight file."""
    return name.endswith((".safetensors", *PICKLES))
