"""Read all images of sets and report what was found (``fid-eval --check``)."""

from collections.abc import Sequence

from ..errors import EvaluationError, describe_error, printable
from ..progress import progress_bar
from .classes import summarize_classes
from .decoding import Preprocess
from .encoded import EncodedReader
from .loading import CHUNK
from .opening import open_set


def check_sets(paths: Sequence[str], preprocess: Preprocess, quiet: bool = False) -> int:
    """Read all images of each set, and print their number, classes, conversions and errors.

    Returns:
        The exit code: 0, or 1 if one of several sets cannot be used.

    Raises:
        EvaluationError: the only set cannot be used.
    """
    code = 0
    for path in paths:
        try:
            for line in _check(path, preprocess, quiet):
                print(line, flush=True)
        except Exception as error:
            if len(paths) == 1:
                raise
            print(f"error: {printable(describe_error(error, path))}", flush=True)
            code = 1
    return code


def _check(path: str, preprocess: Preprocess, quiet: bool) -> list[str]:
    opened = open_set(path, preprocess, check_headers=False)
    reader, name = opened.images, opened.name
    if reader is None:
        return [f"{name}: statistics or features without images"]
    if reader.count is None:
        raise EvaluationError(f"{name}: a stream cannot be checked; remove streaming=true")
    with progress_bar(reader.count, desc=name, unit=" images", enabled=not quiet) as bar:
        if isinstance(reader, EncodedReader):
            if bad := reader.check_contents(bar.update):
                raise EvaluationError(f"{name}: {reader.describe_bad(bad)}")
        else:
            for start in range(0, reader.count, CHUNK):
                bar.update(len(reader.read(start, min(start + CHUNK, reader.count))))
    names = opened.names_of_classes()
    classes = summarize_classes(names) if names else "no labels"
    return [f"{name}: {reader.count:,} images, {classes}", *opened.remarks()]
