"""One way to configure a program: typed dataclasses, a YAML file, dotted overrides, generated help.

The docstring under each field of a configuration dataclass is its help text. A wrong key or type,
and any ``UserError`` raised later, end the program with one line on stderr and exit code 2.
"""

import dataclasses
import difflib
import errno
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings
from PIL import Image

from .atomic_write import atomic_write
from .errors import UserError

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """Says what is wrong in one line and names the nearest valid key."""

    config_class: type

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        if re.search("not accept|nrecognized", text):
            for word in re.findall(r"--([\w.]+)|'([\w.]+)'", text)[::-1]:
                key = next(filter(None, word))
                if nearest := nearest_key(key, list(_dotted_fields(self.config_class))):
                    text += f" (did you mean {nearest}?)"
                    break
        raise UserError(text)


def run_program(
    main: Callable[[Config], None],
    config_class: type[Config],
    *,
    prog: str,
    description: str,
    example: str,
    positional: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse ``argv`` into ``config_class`` and call ``main`` with it.

    ``positional`` is the field that may be given without its name: ``PROG RUN`` for
    ``PROG --checkpoint RUN``; a field that is a list takes several.

    Exit codes: 2 for the user's mistakes (one line on stderr, no traceback), 130 after Ctrl-C.
    """
    parser = _make_parser(config_class, prog=prog, description=description, example=example)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _complete_flags(_resolve_config_names(arguments), config_class)
        if positional is not None:
            several = get_origin(_dotted_fields(config_class)[positional]) is list
            arguments = _name_positional(arguments, positional, several)
        main(_instantiate(parser, parser.parse_args(arguments)))
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"{prog}: error: the disk is full ({error}); what is finished stays: free space, then "
            "go on",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def load_config(config_class: type[Config], path: Path) -> Config:
    """Read a YAML file, as strict about keys and types as the command line.

    Raises:
        UserError: when the file is missing, or a key or type in it is wrong.
    """
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist")
    parser = _make_parser(config_class, prog="", description="", example="")
    try:
        return _instantiate(parser, parser.parse_path(str(path)))
    except UserError as error:
        raise UserError(f"configuration {path}: {error}") from None


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML; ``load_config`` and ``--config`` read it back."""
    text = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    atomic_write(path, text.encode())


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key most like ``key``: the whole dotted key or its last part."""
    if matches := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return matches[0]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.6)
    return by_last_part[last[0]] if last else None


def find_config(name: str) -> Path | None:
    """A configuration that ships with the package: ``digits`` is ``configs/digits.yaml``."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def _make_parser(config_class: type, *, prog: str, description: str, example: str) -> _Parser:
    required = [
        f"--{field.name} {field.name.upper()}"
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join(["%(prog)s [--config NAME]", *required, "[--KEY VALUE ...]"]),
        description=description,
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file, the name of one in configs/, or a PNG with its settings inside.",
    )
    parser.add_class_arguments(config_class, None)
    parser.config_class = config_class
    return parser


def _instantiate(parser: _Parser, namespace: Any) -> Any:
    values = parser.instantiate(namespace)
    fields = dataclasses.fields(parser.config_class)
    return parser.config_class(**{field.name: values[field.name] for field in fields})


def _resolve_config_names(arguments: Sequence[str]) -> list[str]:
    """Replace ``--config NAME`` by the shipped file of that name where no such path exists, and
    ``--config SHEET.png`` by the settings inside the picture."""
    resolved = list(arguments)
    for i, argument in enumerate(resolved):
        if i and resolved[i - 1] == "--config":
            prefix, name = "", argument
        elif argument.startswith("--config="):
            prefix, name = "--config=", argument.removeprefix("--config=")
        else:
            continue
        if not Path(name).exists() and (path := find_config(name)):
            resolved[i] = f"{prefix}{path}"
        elif name.endswith(".png") and Path(name).is_file():
            resolved[i] = f"{prefix}{settings_in(Path(name))}"
    return resolved


def settings_in(picture: Path) -> str:
    """The YAML that a sampling program left in a PNG (chunk ``settings``)."""
    try:
        with Image.open(picture) as image:
            text = getattr(image, "text", {}).get("settings")
    except OSError as error:
        raise UserError(f"config {picture} cannot be read as a picture: {error}") from None
    if text is None:
        raise UserError(f"config {picture} has no settings inside; give a sheet as it was made")
    return text


def _name_positional(arguments: Sequence[str], name: str, several: bool = False) -> list[str]:
    """Put ``--name`` before the first argument that is neither a flag nor a flag's value.

    ``several``: it takes that argument and those that follow, up to the next flag, as a list.
    """
    named = list(arguments)
    for i, argument in enumerate(named):
        is_value = i and named[i - 1].startswith("--") and "=" not in named[i - 1]
        if not argument.startswith("-") and not is_value:
            if not several:
                return [*named[:i], f"--{name}", *named[i:]]
            values = list(takewhile(lambda value: not value.startswith("-"), named[i:]))
            return [*named[:i], f"--{name}={json.dumps(values)}", *named[i + len(values) :]]
    return named


def _complete_flags(arguments: Sequence[str], config_class: type) -> list[str]:
    """``--resume`` alone means ``--resume=true``."""
    flags = {f"--{key}" for key, kind in _dotted_fields(config_class).items() if kind is bool}
    following = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in flags and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _dotted_fields(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Type of every field, by dotted key."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        fields[prefix + field.name] = field.type
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            fields |= _dotted_fields(field.type, f"{prefix}{field.name}.")
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
