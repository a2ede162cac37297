"""Subjects of emoji, the committed list of held-out subjects, and a small set built offline."""

import json
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DRAWN = {  # drawings of each style in the fake packages
    "openmoji/color/svg": ["1F436.svg", "1F468-1F3FB-200D-2695-FE0F.svg", "1FAF5.svg"],
    "@twemoji/svg": ["1f436.svg", "1f469-200d-2695-fe0f.svg"],
    "@lobehub/fluent-emoji-3d/assets": ["1f436.webp", "1f34e.webp"],
}
GROUPS = {
    "1F436": "animals-nature", "1F34E": "food-drink", "1F468-1F3FB-200D-2695-FE0F": "people-body",
    "1F469-200D-2695-FE0F": "people-body", "1F3FB": "component", "1FAF5": "extras-openmoji",
}  # fmt: skip


@pytest.fixture
def emoji(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import emoji

    return emoji


@pytest.fixture
def build(emoji, monkeypatch, tmp_path, capsys):
    """Return a function that runs emoji.py on fake packages: exit code and printed text."""
    import emoji_sources

    def install(folder):
        data = folder / "openmoji/data/openmoji.json"
        data.parent.mkdir(parents=True)
        entries = [dict(hexcode=c, group=g, annotation=c) for c, g in GROUPS.items()]
        data.write_text(json.dumps(entries))
        for parent, names in DRAWN.items():
            (folder / parent).mkdir(parents=True)
            for name in names:
                Image.new("RGBA", (64, 64), "red").save(folder / parent / name, "webp")
        return folder

    def render(paths, width, packages):
        return (Image.new("RGB", (width, width), "blue") for _ in paths)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["emoji.py", str(tmp_path / "set"), *arguments])
        try:
            code = emoji.main()
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    monkeypatch.setattr(emoji, "install_packages", install)
    monkeypatch.setattr(emoji, "render_svgs", render)
    monkeypatch.setattr(emoji, "open_font", lambda path: None)
    monkeypatch.setattr(emoji, "read_held_out", lambda: {"1F9D1-2695"})
    monkeypatch.setattr(emoji_sources, "read_noto", lambda font: {})
    return run


def digest(text):
    return text.split("names and pixels: ")[1].split()[0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F436", "1F436"),
        ("1F468-1F3FB-200D-2695", "1F9D1-2695"),  # man health worker, light skin tone
        ("1F469-1F3FF-200D-1F9B0", "1F9D1"),  # woman, dark skin tone, red hair
        ("1F3C3-1F3FB-200D-2640-FE0F-200D-27A1", "1F3C3"),  # woman running, facing right
        ("1F46C-1F3FD", "1F9D1-1F91D-1F9D1"),  # men holding hands
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FC", "1F9D1-1F91D-1F9D1"),
        ("1F468-200D-1F469-200D-1F467", "1F9D1-1F9D1-1F9D2"),  # family
        ("1FAF1-1F3FB-200D-1FAF2-1F3FF", "1F91D"),  # handshake
        ("1F1F8-1F1EF", "1F1F3-1F1F4"),  # Svalbard has Norway's flag
        ("2640", "2640"),  # female sign
        ("27A1", "27A1"),  # right arrow
    ],
)
def test_subject(emoji, code, expected):
    assert emoji.subject(code) == emoji.subject(expected) == expected


def test_the_committed_list_names_subjects(emoji):
    from emoji_subjects import read_held_out

    subjects = read_held_out()
    assert 150 < len(subjects) < 200
    assert all(emoji.subject(code) == code for code in subjects)


def test_held_out_subjects_cover_a_tenth_of_each_class(emoji):
    from emoji_subjects import choose_held_out

    codes = [f"{number:04X}" for number in range(0x1F400, 0x1F4C8)]  # 200 subjects
    toned = [f"{code}-{tone}" for code in codes[:100] for tone in sorted(emoji.SKIN_TONES)]
    pictures = [("a", code) for code in codes + toned] + [("b", code) for code in codes[:50]]
    chosen = choose_held_out(pictures, 0)
    counts = Counter(name for name, code in pictures if emoji.subject(code) in chosen)
    assert 65 <= counts["a"] <= 70
    assert 4 <= counts["b"] <= 5
    assert choose_held_out(reversed(pictures), 0) == chosen
    assert choose_held_out(pictures, 1) != chosen


def test_build_resume_and_zip(build, tmp_path):
    code, text = build("--held_out", "--zip", "--size", "32")
    assert code == 0, text
    assert "6 pictures in 6 classes, 2 held out" in text
    files = {str(path.relative_to(tmp_path / "set")) for path in tmp_path.rglob("*.png")}
    assert files == {
        "train/openmoji-animals-nature/1F436.png",
        "train/twemoji-animals-nature/1F436.png",
        "train/fluent-animals-nature/1F436.png",
        "train/fluent-food-drink/1F34E.png",
        "held_out/openmoji-people-body/1F468-1F3FB-200D-2695.png",
        "held_out/twemoji-people-body/1F469-200D-2695.png",
    }
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert set(archive.namelist()) == files | {"LICENSES.txt", "emoji.json"}
    picture = Image.open(tmp_path / "set/train/openmoji-animals-nature/1F436.png")
    assert picture.size == (32, 32)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert "CC BY-SA 4.0" in (tmp_path / "set/LICENSES.txt").read_text()

    assert build("--held_out", "--size", "32") == (
        2,
        f"emoji.py: error: {tmp_path}/set exists: give --resume to continue and check it\n",
    )
    assert "built with size = 32" in build("--held_out", "--resume")[1]
    code, again = build("--held_out", "--size", "32", "--resume")
    assert (code, digest(again)) == (0, digest(text))


def test_resume_continues_an_interrupted_run(build, tmp_path):
    expected = digest(build()[1])
    record = tmp_path / "set/emoji.json"
    settings = json.loads(record.read_text())
    del settings["sha256"]
    record.write_text(json.dumps(settings))
    (tmp_path / "set/fluent-food-drink/1F34E.png").unlink()
    code, text = build("--resume")
    assert (code, digest(text)) == (0, expected)
    (tmp_path / "set/fluent-food-drink/1F34E.png").unlink()
    code, text = build("--resume")
    assert code == 2
    assert "have changed" in text


def test_mistakes_are_one_line(emoji, build, monkeypatch):
    assert build("--size", "1000") == (
        2,
        "emoji.py: error: --size must be 16 to 512 pixels, got 1000\n",
    )
    code, text = build("--format", "gif")
    assert (code, text.count("\n")) == (2, 1)
    monkeypatch.setattr(emoji, "read_held_out", lambda: {"1F436", "1F9FF"})
    code, text = build("--held_out")
    assert code == 2
    assert "no picture shows 1F9FF" in text
