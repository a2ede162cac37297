"""Configure a program by typed dataclasses, a YAML file and dotted options.

The docstring under a field of a configuration dataclass is its help text. A wrong option or value,
and any ``UserError`` raised later, end the program with one line on stderr and exit code 2.
"""

import dataclasses
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from .atomic_write import atomic_write
from .config_files import config_text
from .errors import UserError
from .renamed import SETTINGS
from .version import __version__

Config = TypeVar("Config")

# Errors of the file system that a user can solve, and what they mean.
FILE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "a file or folder may not be read or written",
    errno.EPERM: "a file or folder may not be changed",
    errno.ENOENT: "a file or folder is missing",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EEXIST: "a file stands where a folder should be",
    errno.EISDIR: "a folder stands where a file should be",
    errno.ENOTEMPTY: "a folder stands where a file should be",
    errno.EIO: "the disk failed",
    errno.ESTALE: "the network file system lost a file",
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """Reports a mistake in one line, in the words of the configuration."""

    config_class: type

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_explain(" ".join(str(message).split()), self.config_class))


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

    Before ``main``, which imports torch, the method ``check_paths`` of the configuration runs, if
    there is one.

    Args:
        main: takes the configuration.
        config_class: the dataclass of the settings.
        prog: name of the program in help and errors.
        description: first paragraph of the help.
        example: a command, shown at the end of the help.
        positional: the field that may be given without its name: ``PROG RUN`` for
            ``PROG --checkpoint RUN``. A field that is a list takes several values.
        argv: arguments without the program; ``None`` for those of this process.

    Raises:
        SystemExit: code 2 after a mistake of the user (one line on stderr, no traceback), 130 after
            Ctrl-C, 0 after ``--help`` and ``--version``.
    """
    parser = _make_parser(config_class, prog=prog, description=description, example=example)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = [_normalize_option(argument, config_class) for argument in arguments]
        arguments = _complete_flags(_insert_config_files(arguments, config_class), config_class)
        if positional is not None:
            several = get_origin(_dotted_fields(config_class)[positional]) is list
            arguments = _name_positional(arguments, positional, several)
        config = _instantiate(parser, parser.parse_args(arguments))
        if hasattr(config, "check_paths"):
            config.check_paths()
        main(config)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        again = " with --resume" if "resume" in _dotted_fields(config_class) else ""
        print(
            f"{prog}: error: {FILE_ERRORS[error.errno]} ({error}); finished files are kept: solve "
            f"the problem, then run the command again{again}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def load_config(config_class: type[Config], path: Path) -> Config:
    """Read a YAML file and check its keys and types as strictly as the command line does.

    Raises:
        UserError: the file is missing, or a key or type in it is wrong.
    """
    parser = _make_parser(config_class, prog="", description="", example="")
    try:
        return _instantiate(parser, parser.parse_string(config_text(str(path), config_class)))
    except UserError as error:
        text = str(error)
        raise UserError(
            text if text.startswith("configuration ") else f"configuration {path}: {text}"
        ) from None


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML, for ``load_config`` and ``--config``."""
    text = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    atomic_write(path, text.encode())


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """Return the known key most similar to ``key``, by the whole key or by its last part."""
    if matches := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return matches[0]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.6)
    return by_last_part[last[0]] if last else None


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
    parser.add_argument(
        "--version",
        action="version",
        version=f"{prog} {__version__}",
        help="Print the version and exit.",
    )
    parser.add_class_arguments(config_class, None)
    parser.config_class = config_class
    return parser


def _instantiate(parser: _Parser, namespace: Any) -> Any:
    values = parser.instantiate(namespace)
    fields = dataclasses.fields(parser.config_class)
    return parser.config_class(**{field.name: values[field.name] for field in fields})


def _normalize_option(argument: str, config_class: type) -> str:
    """Write an option with underscores, and by its present name."""
    if not (match := re.fullmatch(r"--([\w.-]+)(=.*)?", argument, re.DOTALL)):
        return argument
    key = match[1].replace("-", "_")
    renamed = SETTINGS.get(config_class.__name__, {})
    return f"--{renamed.get(key, key)}{match[2] or ''}"


def _insert_config_files(arguments: Sequence[str], config_class: type) -> list[str]:
    """Replace the value of each ``--config`` by the YAML that it names."""
    inserted = list(arguments)
    for i, argument in enumerate(inserted):
        if i and inserted[i - 1] == "--config":
            inserted[i] = config_text(argument, config_class)
        elif argument.startswith("--config="):
            text = config_text(argument.removeprefix("--config="), config_class)
            inserted[i] = f"--config={text}"
    return inserted


def _name_positional(arguments: Sequence[str], name: str, several: bool = False) -> list[str]:
    """Put ``--name`` before the first argument that is neither an option nor its value.

    ``several``: the option takes that argument and all up to the next option, as a list.
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
    """Read ``--resume`` without a value as ``--resume=true``."""
    flags = {f"--{key}" for key, kind in _dotted_fields(config_class).items() if kind is bool}
    following = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in flags and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _dotted_fields(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field, by dotted key."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        fields[prefix + field.name] = field.type
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            fields |= _dotted_fields(field.type, f"{prefix}{field.name}.")
    return fields


def _explain(message: str, config_class: type) -> str:
    """Turn a message of the parsing library into one about the user's options."""
    fields = _dotted_fields(config_class)
    if match := re.match(r'Parser key "([\w.]+)": (.*)', message):
        key, rest = match.groups()
        kind = fields.get(key)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return f"{key} is a group of settings; set one of them as {key}.NAME"
        value = re.search(r"(?:Got value|Given value): (.*)", rest)
        if kind is not None and value:
            return f"{key} is {value[1]}; it must be {_in_words(kind)}"
        return f"{key}: {rest}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"missing {', '.join(f'--{name}' for name in match[1].split(', '))}"
    if match := re.match(r"argument (\S+): expected one argument", message):
        return f"{match[1]} needs a value"
    unknown_setting = (
        r"unrecognized arguments: (?P<argument>[^\s=]+)|Option '(?P<key>[\w.]+)' is not accepted|"
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'"
    )
    if match := re.match(unknown_setting, message):
        unknown = ".".join(filter(None, match.group("argument", "key", "group", "member")))
        nearest = nearest_key(unknown.lstrip("-"), list(fields))
        hint = f"; did you mean {nearest}?" if nearest else "; --help lists all"
        return f"there is no setting {unknown}{hint}"
    return message


def _in_words(kind: Any) -> str:
    """Describe the values that a type allows: ``list[int]`` is "a list of whole numbers"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
             NoneType: "null"}  # fmt: skip
    if kind in names:
        return names[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list [A, B, ...], each {_in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    if origin is dict:
        return "pairs {NAME: VALUE, ...}"
    return " or ".join(map(_in_words, arguments)) if arguments else str(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
