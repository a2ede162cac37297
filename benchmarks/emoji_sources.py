"""Install and read the public drawings of emoji: imported by emoji.py."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from emoji_subjects import normalize
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image

from moh_dit.common.errors import UserError

NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_VERSION = "2.042"  # in Debian 12


class Source(NamedTuple):
    """Where the pictures of a style come from, and their licence."""

    package: str  # npm package and version, or font
    pictures: str  # below node_modules
    licence: str
    credit: str


RENDERER = "@resvg/resvg-wasm@2.6.2"
SOURCES = {
    "openmoji": Source(
        "openmoji@17.0.0", "openmoji/color/svg/*.svg",
        "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
        "OpenMoji, the open-source emoji and icon project, https://openmoji.org",
    ),
    "twemoji": Source(
        "@twemoji/svg@15.0.0", "@twemoji/svg/*.svg",
        "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "Twemoji, copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji",
    ),
    "fluent": Source(
        "@lobehub/fluent-emoji-3d@1.1.0", "@lobehub/fluent-emoji-3d/assets/*.webp",
        "MIT, https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "Fluent Emoji, copyright Microsoft Corporation",
    ),
    "noto": Source(
        "Noto Color Emoji", "", "SIL Open Font License 1.1, https://openfontlicense.org",
        "Noto Emoji, copyright Google LLC, https://github.com/googlefonts/noto-emoji",
    ),
}  # fmt: skip

MIT_LICENSE = """
MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""  # must accompany copies of Fluent Emoji

SVG_STYLES = {name for name, source in SOURCES.items() if source.pictures.endswith(".svg")}

# Render the SVG files listed in argv[2] and write their RGBA pixels to standard output.
RENDER_SCRIPT = """
const fs = require("fs"), [, folder, list, width] = process.argv;
const {initWasm, Resvg} = require(folder + "/index.js");
initWasm(fs.readFileSync(folder + "/index_bg.wasm")).then(() => {
  for (const path of fs.readFileSync(list, "utf8").split("\\n")) {
    const options = {background: "white", fitTo: {mode: "width", value: Number(width)}};
    const svg = new Resvg(fs.readFileSync(path, "utf8"), options), image = svg.render();
    const pixels = Buffer.from(image.pixels);
    for (let done = 0; done < pixels.length;) done += fs.writeSync(1, pixels, done);
    image.free(); svg.free();
  }
}).catch(error => { console.error(String(error)); process.exit(1); });
"""


def licences() -> str:
    """Return the source, author and licence of each style as text."""
    lines = [f"{style}: {s.package}\n  {s.credit}\n  {s.licence}\n" for style, s in SOURCES.items()]
    return "".join(lines) + "Changes: the pictures were scaled and drawn on white.\n"


def open_font(path: Path) -> TTFont:
    """Open the Noto font, and report a missing or wrong file."""
    try:
        font = TTFont(path)
    except (OSError, TTLibError):
        font = {}
    if "CBDT" not in font:
        raise UserError(
            f"{path} is not the Noto Color Emoji font with bitmaps: apt-get install "
            "fonts-noto-color-emoji, or give the path of NotoColorEmoji.ttf by --noto_font"
        )
    return font


def install_packages(folder: Path) -> Path:
    """Install the npm packages without running their scripts, and return node_modules."""
    names = [RENDERER, *(s.package for s in SOURCES.values() if s.pictures)]
    options = "--prefer-offline --fetch-retries=1 --ignore-scripts --no-audit --prefix=."
    command = ["npm", "install", *names, *options.split()]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True)
    except FileNotFoundError:
        raise UserError("npm is not installed: apt-get install npm") from None
    if result.returncode:
        raise UserError(
            "npm could not install the packages: check the network and the registry that `npm "
            f"config get registry` prints. To see npm's message: {' '.join(command)}"
        )
    return folder / "node_modules"


def read_drawings(packages: Path, font: TTFont) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return OpenMoji's description of each emoji, and the drawings of each style, both by code.

    A drawing is the path of an SVG or WebP file, or the bytes of a PNG file.
    """
    entries = json.loads((packages / "openmoji/data/openmoji.json").read_text())
    emoji = {
        normalize(entry["hexcode"]): entry
        for entry in entries
        if entry["group"] != "component" and not entry["group"].startswith("extras")
    }
    drawings = {
        style: {normalize(path.stem): path for path in sorted(packages.glob(source.pictures))}
        for style, source in SOURCES.items()
        if source.pictures
    }
    drawings["noto"] = read_noto(font)
    for style, by_code in drawings.items():
        drawings[style] = {code: by_code[code] for code in sorted(by_code.keys() & emoji.keys())}
    return emoji, drawings


def read_noto(font: TTFont) -> dict[str, bytes]:
    """Return the PNG files inside the Noto Color Emoji font, by code."""
    codes: dict[str, str] = {}
    for point, glyph in font.getBestCmap().items():
        codes.setdefault(glyph, f"{point:04X}")
    ligatures: dict[str, list[str]] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = table.ExtSubTable if table.LookupType == 7 else table
            if table.LookupType == 4:
                for first, rows in table.ligatures.items():
                    ligatures |= {row.LigGlyph: [first, *row.Component] for row in rows}
    drawings = {}
    for name, glyph in font["CBDT"].strikeData[0].items():
        parts = ligatures.get(name, [name])
        if hasattr(glyph, "imageData") and all(part in codes for part in parts):
            drawings[normalize("-".join(codes[part] for part in parts))] = glyph.imageData
    return drawings


def render_svgs(paths: list[Path], width: int, packages: Path) -> Iterator[Image.Image]:
    """Yield the pictures of square SVG files, ``width`` pixels wide, on white."""
    jobs = packages / "svg_files.txt"
    jobs.write_text("\n".join(map(str, paths)))
    command = ["node", "-e", RENDER_SCRIPT, packages / "@resvg/resvg-wasm", jobs, str(width)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as node:
        try:
            for path in paths:
                pixels = node.stdout.read(4 * width * width)
                if len(pixels) < 4 * width * width:
                    raise UserError(f"Node.js could not render {path.name}: see its message above")
                yield Image.frombytes("RGBA", (width, width), pixels)
        finally:
            node.kill()
