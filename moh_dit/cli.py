"""One way to configure a program: typed dataclasses, a YAML file, dotted overrides, generated help.

The docstring under each field of a configuration dataclass is its help text. A wrong key or type,
and any ``UserError`` raised later, end the program with one line on stderr and exit code 2.
"""

import dataclasses
import difflib
import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

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
    argv: Sequence[str] | None = None,
) -> None:
    """Parse ``argv`` into ``config_class`` and call ``main`` with it.

    Exit codes: 2 for the user's mistakes (one line on stderr, no traceback), 130 after Ctrl-C.
    """
    parser = _make_parser(config_class, prog=prog, description=description, example=example)
    arguments = _resolve_config_names(sys.argv[1:] if argv is None else argv)
    arguments = _complete_flags(arguments, config_class)
    try:
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
    path.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key most like ``key``: the whole dotted key or its last part."""
    if matches := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return matches[0]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.6)
    return by_last_part[last[0]] if last else None


def find_config(name: str) -> Path | None:
    """A configuration that ships with the package: ``digits`` is ``configs/digits.yaml``."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def _make_parser(config_class: type, *, prog: str, description: str, example: str) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file, or the name of one in configs/."
    )
    parser.add_class_arguments(config_class, None)
    parser.config_class = config_class
    return parser


def _instantiate(parser: _Parser, namespace: Any) -> Any:
    values = parser.instantiate(namespace)
    fields = dataclasses.fields(parser.config_class)
    return parser.config_class(**{field.name: values[field.name] for field in fields})


def _resolve_config_names(arguments: Sequence[str]) -> list[str]:
    """Replace ``--config NAME`` by the shipped file of that name where no such path exists."""
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
    return resolved


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
