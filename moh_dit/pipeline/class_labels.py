"""Convert class names and nested class labels to class ids."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..common.errors import UserError

Labels: TypeAlias = int | str | Sequence[Any] | Tensor


def class_ids(labels: Labels, names: Sequence[str], num_classes: int) -> list[int]:
    """Convert labels to class ids: ids, names, or nested lists or tensors of these.

    Args:
        labels: ids, names, or texts of ids.
        names: the name of each class; empty if classes have no names.
        num_classes: valid ids are ``0 … num_classes - 1``.

    Raises:
        UserError: an id is out of range, or a name is not a class (similar names are given).
    """
    ids = []
    for label in _flatten(labels):
        if isinstance(label, str) and label in names:
            label = names.index(label)
        elif isinstance(label, str) and not re.fullmatch(r"-?\d+", label):
            nearest = difflib.get_close_matches(label, names, n=3)
            nearest = nearest or [name for name in names if label.lower() in name.lower()][:3]
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "give an id"
            if names and not nearest:
                hint += f", or a name such as {', '.join(names[:3])}"
            raise UserError(f"no class is named {label!r}; {hint}")
        if not 0 <= (number := int(label)) < num_classes:
            raise UserError(f"class label {number} is out of range 0 … {num_classes - 1}")
        ids.append(number)
    return ids


def _flatten(labels: Any) -> list[Any]:
    if isinstance(labels, Tensor):
        return labels.flatten().tolist()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        return [labels]
    return [label for item in labels for label in _flatten(item)]
