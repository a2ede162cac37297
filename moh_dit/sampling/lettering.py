"""Draw labels in any script on Pillow images."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from PIL import ImageDraw, ImageFont

ELLIPSIS = "…"
LONGEST_EM = 18  # longest label, in font sizes


class Lettering:
    """Fonts of one size that together draw given texts.

    Args:
        texts: the texts that will be drawn.
        size: font size in pixels.
    """

    def __init__(self, texts: Iterable[str], size: int):
        from fid_eval.fonts import characters_of, choose_fonts  # imports matplotlib, which is slow

        self.size = size
        paths = choose_fonts([*texts, ELLIPSIS])
        self.fonts = [(characters_of(path), ImageFont.truetype(path, size)) for path in paths]

    def fit(self, text: str) -> str:
        """Return the text on one line, shortened to ``LONGEST_EM`` font sizes."""
        text = " ".join(text.split())
        if self.width(text) <= LONGEST_EM * self.size:
            return text
        while text and self.width(text + ELLIPSIS) > LONGEST_EM * self.size:
            text = text[:-1]
        return text.rstrip() + ELLIPSIS

    def width(self, text: str) -> int:
        """Return the width of a text in pixels."""
        return round(sum(font.getlength(part) for part, font in self._parts(text)))

    def height(self) -> int:
        """Return the height of a line in pixels."""
        return max(sum(font.getmetrics()) for _, font in self.fonts)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: str) -> None:
        """Draw a text whose left end and middle height are at (x, y)."""
        for part, font in self._parts(text):
            draw.text((x, y), part, fill=color, font=font, anchor="lm")
            x += font.getlength(part)

    def _parts(self, text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        """Split a text into parts with one font each: a font that draws all of it, if any."""
        for characters, font in self.fonts:
            if characters.issuperset(map(ord, text)):
                yield text, font
                return
        for number, part in groupby(text, self._font_of):
            yield "".join(part), self.fonts[number][1]

    def _font_of(self, character: str) -> int:
        return next((i for i, (known, _) in enumerate(self.fonts) if ord(character) in known), 0)
