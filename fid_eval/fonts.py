"""Choose installed fonts that draw a text in any script."""

import unicodedata
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager

FIRST_FONT = "DejaVu Sans"  # part of matplotlib
ADVICE = "install a font with these characters, such as the packages fonts-noto and fonts-noto-cjk"


def choose_fonts(texts: Iterable[str]) -> list[str]:
    """Return paths of font files that together draw the texts, in order of preference.

    The first font is DejaVu Sans. Others follow if a text has characters that it lacks. Characters
    that no installed font draws appear as boxes, and a warning names them.
    """
    fonts = [str(font_manager.findfont(FIRST_FONT))]
    drawn = {ord(character) for text in texts for character in text if character.isprintable()}
    missing = drawn - characters_of(fonts[0])
    for font in _installed_fonts() if missing else []:
        if missing & characters_of(font):
            fonts.append(font)
            missing -= characters_of(font)
        if not missing:
            break
    # Marks without an own glyph, such as variation selectors, do not appear as boxes.
    boxes = sorted(c for c in missing if unicodedata.category(chr(c)) not in ("Mn", "Cf"))
    if boxes:
        shown = "".join(map(chr, boxes[:20]))
        warnings.warn(f"no installed font draws {shown}; {ADVICE}", stacklevel=2)
    return fonts


@cache
def characters_of(font: str) -> frozenset[int]:
    """Return the code points of a font file; none for a font that cannot be scaled or read."""
    try:
        face = font_manager.get_font(font)
        return frozenset(face.get_charmap()) if face.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _installed_fonts() -> list[str]:
    """Return the font files of the system: regular sans-serif faces first, sorted by name.

    The disk is searched, because matplotlib's own list may be older than a font.
    """

    def rank(path: str) -> tuple:
        name = Path(path).name
        return "Regular" not in name, "Sans" not in name, "Mono" in name, name

    return sorted(font_manager.findSystemFonts(), key=rank)


def plain_text(texts: Iterable[str]) -> AbstractContextManager[None]:
    """Set matplotlib's fonts for the texts, and draw ``$`` as a character inside the block."""
    names = []
    for font in choose_fonts(texts):
        font_manager.fontManager.addfont(font)
        names.append(font_manager.get_font(font).family_name)
    return matplotlib.rc_context({"font.family": names, "text.parse_math": False})
