"""Find and read configurations: YAML files, shipped ones, and settings inside PNG files."""

import difflib
import math
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .renamed import SETTINGS

MAX_YAML_VALUES = 100_000


def config_text(name: str, config_class: type) -> str:
    """Return the YAML of a file, of a shipped configuration, or of the settings in a PNG.

    Args:
        name: a path, or the name of a shipped configuration.
        config_class: the dataclass of the settings. Former names of its fields are replaced.

    Raises:
        UserError: there is no such configuration, or it cannot be read.
    """
    path, shipped = Path(name), shipped_configs()
    if not path.exists() and name not in shipped:
        nearest = difflib.get_close_matches(name, shipped, n=1)
        known = f"give a YAML file or one of {', '.join(shipped)}"
        hint = f"did you mean {nearest[0]}?" if nearest else known
        raise UserError(f"configuration {name} does not exist; {hint}")
    if path.suffix == ".png":
        text = str(settings_in(path))  # yaml takes no subclass of str
    else:
        text = _read(path if path.exists() else shipped[name])
    if not isinstance(parse_yaml(text, name) or {}, dict):
        raise UserError(f"configuration {name} must contain settings as KEY: VALUE lines")
    for old, new in SETTINGS.get(config_class.__name__, {}).items():
        text = re.sub(rf"^{re.escape(old)}\s*:", f"{new}:", text, flags=re.MULTILINE)
    return text or "{}"


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that ship with the package, by name."""
    package = Path(__file__).parents[1]
    folders = (package.parent / "configs", package / "configs")  # a checkout; an installed wheel
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def settings_in(picture: Path) -> str:
    """Return the YAML that a sampling program stored in a PNG (text chunk ``settings``)."""
    from PIL import Image

    try:
        with Image.open(picture) as image:
            text = getattr(image, "text", {}).get("settings")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"configuration {picture} is not a readable picture: {error}") from None
    if text is None:
        raise UserError(
            f"configuration {picture} contains no settings; give a picture as the sampling program "
            "wrote it, or a YAML file"
        )
    return text


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; see :func:`parse_yaml`."""
    return parse_yaml(_read(path), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of YAML.

    Args:
        text: the YAML.
        name: its source, for messages.

    Raises:
        UserError: ``text`` is not YAML, or aliases expand it to a huge size.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"configuration {name} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if _expanded_size(content, {}) > MAX_YAML_VALUES:
        raise UserError(
            f"configuration {name} has more than {MAX_YAML_VALUES} values once its aliases are "
            "expanded; write the values that are needed without aliases"
        )
    return content


def _expanded_size(value: Any, known: dict[int, float]) -> float:
    """Count the values in nested lists and dictionaries; infinite if one contains itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded_size(part, known) for part in parts)
    return known[id(value)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} cannot be read: {error}") from None
