"""Print what got slower (or needs more memory) between two JSON files of the same benchmark.

A row is known by everything in it that is not a measurement, a number with a point.

    python benchmarks/compare.py before.json after.json [--tolerance 0.03]

Exit code 1 if anything did, 2 if the files do not belong together.
"""

import argparse
import json
import math
import re
import sys
from typing import NoReturn

# Names of measurements, or words of them, of which less is better; of the others, these more.
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
                raise ValueError(f"it has two rows of {', '.join(v for _, v in known)}")
            rows[known] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        _refuse(f"{path} is not a benchmark's JSON file: {error}")
    return data["environment"], rows


def _refuse(message) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def compare(before, after, tolerance):
    """Lines about what got worse by more than ``tolerance`` between two sets of rows."""
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
    parser.add_argument("--tolerance", type=float, default=0.03, help="ignored change, a fraction")
    args = parser.parse_args()
    (environment_before, before), (environment_after, after) = load(args.before), load(args.after)
    if not before.keys() & after.keys():
        _refuse("the files have no row in common; compare two runs of one script")
    print(f"before: {environment_before}\nafter:  {environment_after}")
    missing = before.keys() - after.keys()
    if missing:
        print(f"{len(missing)} rows of the first file are missing in the second")
    worse = compare(before, after, args.tolerance)
    print("\n".join(worse) if worse else f"nothing is worse by more than {args.tolerance:.0%}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
