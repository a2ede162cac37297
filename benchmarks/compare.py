"""Compare two JSON files of the same benchmark.

    python benchmarks/compare.py before.json after.json [--tolerance 0.03]

Prints every measurement that got slower, or needs more memory, by more than the tolerance. Rows are
matched by all values that are not floating-point numbers. Exit code 1 if something got worse, 2 if
the files cannot be compared.
"""

import argparse
import json
import math
import re
import sys
from typing import NoReturn

# Names of measurements for which less is better, and the one for which more is better.
LESS_IS_BETTER = re.compile(r"\bms\b|\bpeak_GiB\b|^(dense|then mask|compiled mask|triton)\b")
MORE_IS_BETTER = "images_per_s"


def load(path):
    try:
        with open(path) as file:
            data = json.load(file)
        rows = {}
        for row in data["rows"]:
            known = tuple((k, str(v)) for k, v in row.items() if not isinstance(v, float))
            if known in rows:
                raise ValueError(f"it contains two rows of {', '.join(v for _, v in known)}")
            rows[known] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"{path} is not a benchmark's JSON file: {error}")
    return data["environment"], rows


def _fail(message) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def compare(before, after, tolerance):
    """Describe each measurement that got worse by more than ``tolerance``, worst first."""
    worse = []
    for key in before.keys() & after.keys():
        for name, old in before[key].items():
            new = after[key].get(name)
            if not isinstance(old, float) or not isinstance(new, float):
                continue
            if LESS_IS_BETTER.search(name):
                change = new / old - 1
            elif name == MORE_IS_BETTER:
                change = old / new - 1
            else:
                continue
            if change > tolerance or (math.isnan(new) and not math.isnan(old)):
                label = ", ".join(str(value) for _, value in key)
                worse.append((change, f"{label}: {name} {old:.4g} → {new:.4g} ({change:+.1%})"))
    worse.sort(key=lambda pair: (not math.isnan(pair[0]), -pair[0]))
    return [line for _, line in worse]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="relative change that is ignored"
    )
    args = parser.parse_args()
    (environment_before, before), (environment_after, after) = load(args.before), load(args.after)
    if not before.keys() & after.keys():
        _fail("the files have no row in common; compare two runs of the same script")
    print(f"before: {environment_before}\nafter:  {environment_after}")
    missing = before.keys() - after.keys()
    if missing:
        print(f"{len(missing)} rows of the first file are missing in the second")
    worse = compare(before, after, args.tolerance)
    print("\n".join(worse) if worse else f"nothing is worse by more than {args.tolerance:.0%}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
