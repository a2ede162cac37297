"""Build a folder of 14,561 emoji pictures in 36 classes (4 drawing styles × 9 groups).

    python benchmarks/emoji.py OUTPUT [--held_out] [--zip] [--size 128] [--format png]

The pictures come from npm packages of fixed versions and from Debian's Noto Color Emoji font.
OUTPUT/LICENSES.txt states their licences. A picture is OUTPUT/STYLE-GROUP/CODE_POINTS.png, drawn
on white. The program needs npm and the font: apt-get install npm fonts-noto-color-emoji
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from emoji_sources import (
    MIT_LICENSE,
    NOTO_FONT,
    NOTO_VERSION,
    SVG_STYLES,
    install_packages,
    licences,
    open_font,
    read_drawings,
    render_svgs,
)
from emoji_subjects import (
    HELD_OUT_LIST,
    PERSONS,
    SKIN_TONES,
    read_held_out,
    subject,
    write_held_out,
)
from PIL import Image

from fid_eval.progress import progress_bar
from moh_dit.common.atomic_write import atomic_write
from moh_dit.common.errors import UserError

EXPECTED = dict(pictures=14561, person=2890, skin_tone=7075)  # with NOTO_VERSION of the font


def fit(image: Image.Image, size: int) -> Image.Image:
    """Return ``image`` on a white square of ``size`` pixels, with a margin of 5 % on each side."""
    image = image.convert("RGBA")
    scale = content_size(size) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
    picture = Image.new("RGB", (size, size), "white")
    picture.paste(image, ((size - image.width) // 2, (size - image.height) // 2), image)
    return picture


def content_size(size: int) -> int:
    """Return the longer side of a drawing inside a picture of ``size`` pixels."""
    return round(size * 116 / 128)


def picture_files(output: Path) -> dict[str, Path]:
    """Return the path of every picture below ``output`` by its name CLASS/CODE, sorted by name."""
    files = [path for suffix in ("png", "webp") for path in output.rglob(f"*/*.{suffix}")]
    return dict(sorted((f"{path.parent.name}/{path.stem}", path) for path in files))


def hash_pictures(files: dict[str, Path]) -> str:
    """Return a SHA-256 over the names and decoded pixels of pictures."""
    digest = hashlib.sha256()
    with progress_bar(len(files), desc="checking pictures", unit="img") as bar:
        for name, path in files.items():
            try:
                pixels = Image.open(path).convert("RGB").tobytes()
            except (OSError, SyntaxError):
                raise UserError(f"{path} cannot be read: delete the output and repeat") from None
            digest.update(f"{name}\n".encode() + pixels)
            bar.update()
    return digest.hexdigest()


def write_zip(output: Path, path: Path) -> None:
    """Write all files below ``output`` into an uncompressed zip file, with fixed dates."""
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for file in sorted(file for file in output.rglob("*") if file.is_file()):
            archive.writestr(zipfile.ZipInfo(str(file.relative_to(output))), file.read_bytes())
    partial.replace(path)


def write_pictures(args: argparse.Namespace, settings: dict) -> None:
    """Write every picture that is missing below the output folder, and first its settings."""
    font = open_font(args.noto_font)
    with tempfile.TemporaryDirectory() as folder:
        print("downloading the npm packages (22 MB)", file=sys.stderr)
        packages = install_packages(Path(folder))
        emoji, drawings = read_drawings(packages, font)
        classes = {
            (style, code): f"{style}-{emoji[code]['group']}"
            for style, by_code in drawings.items()
            for code in by_code
        }
        if args.choose_held_out is not None:
            pairs = [(name, code) for (_, code), name in classes.items()]
            write_held_out(pairs, args.choose_held_out, emoji)
        held_out = read_held_out()
        if unknown := held_out - {subject(code) for _, code in classes}:
            raise UserError(f"{HELD_OUT_LIST}: no picture shows {', '.join(sorted(unknown))}")

        def target(style: str, code: str) -> Path:
            side = "held_out" if subject(code) in held_out else "train"
            parent = args.output / side if args.held_out else args.output
            return parent / classes[style, code] / f"{code}.{args.format}"

        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "LICENSES.txt").write_text(licences() + MIT_LICENSE)
        atomic_write(args.output / "emoji.json", json.dumps(settings).encode())
        missing = [key for key in classes if not target(*key).exists()]
        svgs = [drawings[s][code] for s, code in missing if s in SVG_STYLES]
        rendered = render_svgs(svgs, 2 * content_size(args.size), packages)
        with progress_bar(
            len(classes), desc="drawing", unit="img", initial=len(classes) - len(missing)
        ) as bar:
            for style, code in missing:
                drawing = drawings[style][code]
                if style in SVG_STYLES:
                    image = next(rendered)
                else:
                    image = Image.open(io.BytesIO(drawing) if style == "noto" else drawing)
                path, partial = target(style, code), args.output / ".partial"
                path.parent.mkdir(parents=True, exist_ok=True)
                fit(image, args.size).save(partial, args.format, quality=90)
                partial.replace(path)
                bar.update()
        if unexpected := {*picture_files(args.output).values()} - {target(*k) for k in classes}:
            raise UserError(f"{min(unexpected)} does not belong to the set: delete it")


def print_summary(args: argparse.Namespace, files: dict[str, Path]) -> None:
    """Print the number of pictures in each class and the number of pictures of persons."""
    train, held_out = Counter(), Counter()
    for name, path in files.items():
        counts = held_out if path.parts[-3] == "held_out" and args.held_out else train
        counts[name.split("/")[0]] += 1
    print(f"{'class':28} {'train':>6} {'held out':>9}")
    names = sorted(train.keys() | held_out.keys())
    for name in names:
        total = train[name] + held_out[name]
        print(f"{name:28} {train[name]:6} {held_out[name]:9} {held_out[name] / total:6.1%}")
    points = [set(path.stem.split("-")) for path in files.values()]
    counts = dict(
        pictures=len(files),
        person=sum(not PERSONS.isdisjoint(p) for p in points),
        skin_tone=sum(not SKIN_TONES.isdisjoint(p) for p in points),
    )
    size = sum(path.stat().st_size for path in files.values())
    print(
        f"{counts['pictures']} pictures in {len(names)} classes, {held_out.total()} held out, "
        f"{size / 1e6:.0f} MB; {counts['person']} with a person, {counts['skin_tone']} with a "
        "skin tone"
    )
    if counts != EXPECTED:
        print(f"note: version {NOTO_VERSION} of the Noto font gives {EXPECTED}")


def run(args: argparse.Namespace) -> None:
    """Build the set, or check it if it is complete, and print a summary."""
    started = time.monotonic()
    record = args.output / "emoji.json"
    archive = args.output.with_name(f"{args.output.name}.zip")
    started_before = args.output.exists() and any(args.output.iterdir())
    for path, exists in ((args.output, started_before), (archive, args.zip and archive.exists())):
        if exists and not args.resume:
            raise UserError(f"{path} exists: give --resume to continue and check it")
    settings = dict(size=args.size, format=args.format, held_out=args.held_out)
    old = settings
    if started_before:
        if not record.exists():
            raise UserError(f"{args.output} has files but no emoji.json: choose another folder")
        old = json.loads(record.read_text())
        if differing := [name for name in settings if settings[name] != old[name]]:
            raise UserError(
                f"{args.output} was built with {differing[0]} = {old[differing[0]]}: give the "
                "same settings, or another folder"
            )
    if "sha256" not in old:
        write_pictures(args, settings)
    files = picture_files(args.output)
    sha256 = hash_pictures(files)
    if old.get("sha256", sha256) != sha256:
        raise UserError(f"pictures in {args.output} have changed: delete it, and build it again")
    atomic_write(record, json.dumps(settings | dict(sha256=sha256)).encode())
    if args.zip:
        write_zip(args.output, archive)
    print(licences())
    print_summary(args, files)
    print(f"SHA-256 of names and pixels: {sha256} ({time.monotonic() - started:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python benchmarks/emoji.py /data/emoji --held_out --size 64 --zip",
        usage="emoji.py OUTPUT [options]",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        metavar="PIXELS",
        help="width and height in pixels, 16 to 512 (default: 128); Noto's drawings have 136 "
        "pixels and Fluent's 256",
    )
    parser.add_argument(
        "--format",
        choices=["png", "webp"],
        default="png",
        help="png (lossless, default), or webp (quality 90, about a quarter of the size)",
    )
    parser.add_argument(
        "--held_out",
        action="store_true",
        help=f"write OUTPUT/train and OUTPUT/held_out, which has the subjects in "
        f"benchmarks/{HELD_OUT_LIST.name} (default: all pictures in OUTPUT)",
    )
    parser.add_argument(
        "--zip", action="store_true", help="also write all files into OUTPUT.zip, uncompressed"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run, or check the pictures of a complete one",
    )
    parser.add_argument(
        "--noto_font",
        type=Path,
        default=NOTO_FONT,
        metavar="FILE",
        help=f"Noto Color Emoji font with bitmaps, version {NOTO_VERSION} (default: {NOTO_FONT})",
    )
    parser.add_argument(
        "--choose_held_out",
        type=int,
        metavar="SEED",
        help="choose 10 %% of each class anew and overwrite the list of held-out subjects",
    )
    parser.error = lambda message: parser.exit(2, f"emoji.py: error: {message}\n")
    args = parser.parse_args()
    try:
        if not 16 <= args.size <= 512:
            raise UserError(f"--size must be 16 to 512 pixels, got {args.size}")
        run(args)
    except (UserError, OSError) as error:
        print(f"emoji.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: give --resume to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
