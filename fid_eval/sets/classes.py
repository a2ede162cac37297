"""Number classes. Labels are positions in one list of class names.

The names come from ``classes.json``, if it exists. Otherwise they are the names of class folders or
the text labels: in numerical order if all are whole numbers, else sorted as strings. Labels that
are whole numbers are positions already.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..errors import EvaluationError, printable

MAX_CLASSES = 1_000_000


def class_order(names: Collection[str]) -> list[str]:
    """Sort class names: in numerical order if all are whole numbers, else as strings."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def parse_class_names(content: bytes, where: str) -> list[str]:
    """Parse ``classes.json``, a list of distinct names; ``where`` names the file in messages."""
    try:
        names = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is not JSON: {error}") from None
    if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
        raise EvaluationError(f"{where} must be a list of distinct class names")
    return [str(name) for name in names]


def number_labels(
    values: Sequence[Any], items: Sequence[str], given: list[str] | None, where: str
) -> tuple[np.ndarray, list[str] | None]:
    """Convert the labels of images to class numbers.

    Args:
        values: a whole number or a class name for each image.
        items: name of each image, for messages.
        given: class names in order; None to derive them.
        where: file or set with the labels, for messages.

    Returns:
        Labels, int64 (N,), and the class names; None if the labels are numbers without names.

    Raises:
        EvaluationError: a label is missing, negative, a fraction, a vector, or not in ``given``.
    """

    def refuse(index: int, reason: str) -> EvaluationError:
        label, item = printable(str(values[index])[:60]), printable(items[index])
        return EvaluationError(f"{where} has the label {label!r} for {item}; {reason}")

    for index, value in enumerate(values):
        if value is None or value == "":
            raise refuse(index, "add the label, or remove the image")
    numbers = [_number(value) for value in values]
    if None not in numbers:
        for index, number in enumerate(numbers):
            if number % 1 or not abs(number) < 2**63:
                raise refuse(index, "labels must be integers of at most 63 bits, or class names")
            if number < 0:
                raise refuse(index, "class numbers start at 0")
        labels = np.array([int(number) for number in numbers], np.int64)
        if given is not None and labels.max(initial=-1) >= len(given):
            raise refuse(int(labels.argmax()), f"classes.json names only {len(given)} classes")
        return labels, given
    for index, value in enumerate(values):
        if not isinstance(value, str):
            is_number = numbers[index] is not None
            reason = "other labels are class names" if is_number else "labels must be integers"
            raise refuse(index, f"{reason}; give whole numbers or class names")
    names = given or class_order(set(values))
    known = {name: number for number, name in enumerate(names)}
    for index, value in enumerate(values):
        if value not in known:
            raise refuse(index, "classes.json does not name this class")
    return np.array([known[value] for value in values], np.int64), names


def _number(value: Any) -> Any:
    """Return a number or numeric text as an int or float; None for anything else."""
    if isinstance(value, str):
        if value.isdecimal():
            return int(value)
        try:
            return float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float | np.integer | np.floating)
    return value if is_number and not isinstance(value, bool) else None


def names_of_numbers(labels: np.ndarray, where: str) -> list[str]:
    """Name the classes 0 … max(labels) by their numbers."""
    highest = int(labels.max(initial=0))
    if highest >= MAX_CLASSES:
        raise EvaluationError(
            f"{where} has the label {highest}; at most {MAX_CLASSES} classes are supported"
        )
    return [str(number) for number in range(highest + 1)]


def summarize_classes(names: Sequence[str]) -> str:
    """Return one line such as "36 classes: a … z"."""
    shown = " … ".join(printable(name) for name in dict.fromkeys((names[0], names[-1])))
    return f"{len(names)} class{'es' if len(names) > 1 else ''}: {shown}"
