"""Split emoji into train and held out by subject: imported by emoji.py.

A subject exists in four drawing styles, and a person also in five skin tones and several genders.
All pictures of a subject belong to the same side, so that held-out subjects are new to a model.
"""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HELD_OUT_LIST = Path(__file__).with_name("emoji_held_out.txt")
HELD_OUT_SHARE = 0.1

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
PERSONS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
MODIFIERS = SKIN_TONES | {
    "2640", "2642", "FE0F", "200D",  # gender signs, variation selector, zero-width joiner
    "1F9B0", "1F9B1", "1F9B2", "1F9B3",  # hair
    "27A1",  # facing right: the mirror image of a person
}  # fmt: skip
SAME_SUBJECT = {
    # Unicode gives some subjects a code for each gender, or spells them in several ways.
    "1F466": "1F9D2", "1F467": "1F9D2",  # boy, girl: child
    "1F471": "1F9D1",  # person with blond hair: person
    "1F474": "1F9D3", "1F475": "1F9D3",  # old man, old woman: older person
    "1F934": "1FAC5", "1F478": "1FAC5",  # prince, princess: person with crown
    "1F930": "1FAC4", "1FAC3": "1FAC4",  # pregnant woman, pregnant man: pregnant person
    "1F385": "1F9D1-1F384", "1F936": "1F9D1-1F384",  # Santa Claus, Mrs. Claus: Mx Claus
    "1F46B": "1F9D1-1F91D-1F9D1",  # woman and man holding hands: people holding hands
    "1F46C": "1F9D1-1F91D-1F9D1", "1F46D": "1F9D1-1F91D-1F9D1",  # men, women holding hands
    "1F46A": "1F9D1-1F9D1-1F9D2",  # family: two adults and a child
    "1F491": "1F9D1-2764-1F9D1", "1F48F": "1F9D1-2764-1F48B-1F9D1",  # couple with heart, kiss
    "1F9D1-1F430-1F9D1": "1F46F", "1F9D1-1FAEF-1F9D1": "1F93C",  # bunny ears, wrestling
    "1FAF1-1FAF2": "1F91D",  # two hands of different skin tones: handshake
    # The packages draw some pairs alike, pixel by pixel or nearly so.
    "1F1ED-1F1F2": "1F1E6-1F1FA", "1F1E9-1F1EC": "1F1EE-1F1F4",  # flags of HM and AU, DG and IO
    "1F1E8-1F1F5": "1F1EB-1F1F7", "1F1F2-1F1EB": "1F1EB-1F1F7",  # CP and FR, MF and FR
    "1F1EA-1F1E6": "1F1EA-1F1F8", "1F1F2-1F1E8": "1F1EE-1F1E9",  # EA and ES, MC and ID
    "1F1E7-1F1FB": "1F1F3-1F1F4", "1F1F8-1F1EF": "1F1F3-1F1F4",  # BV and NO, SJ and NO
    "1F1F9-1F1E9": "1F1F7-1F1F4", "1F1FA-1F1F2": "1F1FA-1F1F8",  # TD and RO, UM and US
    "1F63A": "1F431", "26C4": "2603",  # grinning cat and cat, snowmen with and without snow
    "1F315": "1F7E1", "1F311": "26AB",  # full moon and yellow circle, new moon and black circle
}  # fmt: skip


def normalize(code: str) -> str:
    """Return hyphenated code points in upper case with 4 digits or more, without FE0F."""
    points = (point.lstrip("0").upper().rjust(4, "0") for point in code.split("-"))
    return "-".join(point for point in points if point != "FE0F")


def subject(code: str) -> str:
    """Return the subject of an emoji: its code points without skin tone, gender, hair, direction.

    Man, woman and person become person. An emoji that consists of modifiers only, such as the
    female sign, is its own subject.
    """
    points = [
        "1F9D1" if point in PERSONS else SAME_SUBJECT.get(point, point)
        for point in code.split("-")
        if point not in MODIFIERS
    ]
    joined = "-".join(points) or code
    return SAME_SUBJECT.get(joined, joined)


def choose_held_out(pictures: Iterable[tuple[str, str]], seed: int) -> set[str]:
    """Choose subjects at random that cover about 10 % of the pictures of every class.

    A subject that covers more than 2 % of a class is not chosen, except one with a single picture.

    Args:
        pictures: class and code of each picture.
        seed: seed of the order in which subjects are tried.
    """
    pictures = list(pictures)
    totals = Counter(name for name, _ in pictures)
    free = {name: HELD_OUT_SHARE * total for name, total in totals.items()}
    subjects: dict[str, Counter[str]] = {}
    for name, code in pictures:
        subjects.setdefault(subject(code), Counter())[name] += 1
    order = sorted(subjects)
    random.Random(seed).shuffle(order)
    chosen = set()
    for candidate in order:
        counts = subjects[candidate]
        if all(n <= min(free[c] + 0.5, max(1, totals[c] / 50)) for c, n in counts.items()):
            chosen.add(candidate)
            for name, count in counts.items():
                free[name] -= count
    return chosen


def read_held_out() -> set[str]:
    """Return the subjects in the committed list of held-out subjects."""
    lines = HELD_OUT_LIST.read_text().splitlines()
    return {line.split()[0] for line in lines if not line.startswith("#")}


def write_held_out(pictures: Iterable[tuple[str, str]], seed: int, emoji: dict[str, dict]) -> None:
    """Choose held-out subjects, and write each with the name of its shortest emoji.

    Args:
        pictures, seed: as of ``choose_held_out``.
        emoji: OpenMoji's description of each emoji, by code.
    """
    names: dict[str, str] = {}
    for code in sorted(emoji, key=lambda code: (len(code), code)):
        names.setdefault(subject(code), emoji[code]["annotation"])
    header = f"# Written by: python benchmarks/emoji.py OUTPUT --choose_held_out {seed}\n"
    lines = [f"{name}  {names[name]}\n" for name in sorted(choose_held_out(pictures, seed))]
    HELD_OUT_LIST.write_text(header + "".join(lines))
