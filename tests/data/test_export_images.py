"""Export in ADM format: the images that training sees, in a file that never replaces another."""

import numpy as np
import pytest
from PIL import Image

from moh_dit.__main__ import run_command
from moh_dit.common.errors import UserError
from moh_dit.data.config import ExportConfig
from moh_dit.data.export_images import export_npz
from moh_dit.data.images import load_batch, open_images


def test_digits(tmp_path):
    output = tmp_path / "new" / "digits.npz"
    export_npz(ExportConfig(data="digits", output=str(output)))
    images = open_images("digits", 32)
    with np.load(output) as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    expected, _ = load_batch(images, range(len(images)))
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(labels, images.labels)
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(UserError, match="exists"):
        export_npz(ExportConfig(data="digits", output=str(output)))


def test_folder_through_loader_processes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(70):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (11, 13, 3), np.uint8)).save(path)
    config = ExportConfig(
        data=str(tmp_path / "data"), image_size=8, output=str(tmp_path / "x.npz"), num_workers=1
    )
    export_npz(config)
    images = open_images(tmp_path / "data", 8)
    with np.load(tmp_path / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], load_batch(images, range(70))[0])
        np.testing.assert_array_equal(arrays["arr_1"], images.labels)


def test_mistakes_leave_no_files(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"must end in \.npz"):
        export_npz(ExportConfig(data="digits", output=str(tmp_path / "digits")))
    with pytest.raises(UserError, match="nowhere"):
        export_npz(ExportConfig(data="nowhere", output=str(tmp_path / "x" / "x.npz")))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["export", "--data", "nowhere", "--output", "x.npz"])
    with pytest.raises(SystemExit) as stop:
        run_command("export")
    assert stop.value.code == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_no_files(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{i}.png")

    def open_then_delete_one(*args, **options):
        images = open_images(*args, **options)
        (folder / "2.png").unlink()
        return images

    monkeypatch.setattr("moh_dit.data.export_images.open_images", open_then_delete_one)
    with pytest.raises(UserError, match=r"2\.png"):
        export_npz(
            ExportConfig(data=str(tmp_path / "data"), image_size=8, output=str(tmp_path / "x.npz"))
        )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
