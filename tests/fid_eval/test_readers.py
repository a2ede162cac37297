"""Read every kind of input with the same pixels and labels, and refuse wrong input."""

import io
import zipfile

import datasets
import numpy as np
import pytest
import torch
from helpers.image_sources import COUNT, SIDE, png, sources, write_zip
from PIL import Image
from safetensors.torch import save_file

from fid_eval.errors import EvaluationError
from fid_eval.sets.decoding import AS_IS, Preprocess, decode
from fid_eval.sets.npz import NpzFile
from fid_eval.sets.opening import open_set

KINDS = [
    "stored", "compressed", "folder", "zip", "tar", "tar-pattern",
    "dataset", "array", "tensor", "iterable", "generator", "share",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_gives_the_same_images_in_the_same_batches(kind, images, labels, tmp_path):
    opened = open_set(sources(tmp_path, images, labels)[kind])
    batches = list(opened.images.batches(4, lambda chunk: True, workers=3))
    assert [start for start, _, _ in batches] == [0, 4, 8]
    assert [len(batch) for _, batch, _ in batches] == [4, 4, 3]
    pixels = torch.cat([batch for _, batch, _ in batches])
    assert torch.equal(pixels.permute(0, 2, 3, 1), torch.from_numpy(images))
    assert torch.equal(torch.cat([label for _, _, label in batches]), torch.from_numpy(labels))
    assert opened.images.size == (SIDE, SIDE)
    assert opened.images.count == COUNT


def test_an_uncompressed_npz_is_read_by_rows(images, tmp_path):
    np.savez(tmp_path / "a.npz", images)
    member = NpzFile(tmp_path / "a.npz")["arr_0"]
    np.testing.assert_array_equal(member.read(7, 9), images[7:9])
    np.testing.assert_array_equal(member.read(0, 2), images[:2])


def test_a_compressed_npz_can_be_read_again_from_the_start(images, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images)
    member = NpzFile(tmp_path / "a.npz")["arr_0"]
    np.testing.assert_array_equal(member.read(5, 9), images[5:9])
    np.testing.assert_array_equal(member.read(1, 3), images[1:3])


def test_the_hash_depends_on_the_content_and_not_on_the_name(images, tmp_path):
    np.savez(tmp_path / "a.npz", images)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "c.npz", images[::-1])
    a, b, c = (open_set(tmp_path / f"{name}.npz").content_hash() for name in "abc")
    assert a == b != c


def test_images_are_resized_and_cropped_only_on_request(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    (tmp_path / "a.png").write_bytes(png(wide))
    (tmp_path / "b.png").write_bytes(png(wide[:, :20]))
    with pytest.raises(EvaluationError, match=r"different sizes: 1 of 40×20 \(as a.png\), 1 of"):
        open_set(tmp_path)
    cropped = open_set(tmp_path, Preprocess(8, crop=True)).images.read(0, 1)
    assert cropped.shape == (1, 8, 8, 3)
    assert (cropped > 240).all()  # only the white middle is left
    stretched = open_set(tmp_path, Preprocess(8)).images.read(0, 1)
    assert stretched[0, :, 0].max() < 30


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_images_become_rgb(mode, tmp_path):
    grey = np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1))
    image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(open_set(tmp_path).images.read(0, 1)[0], expected)


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_truncated_images_are_named_and_counted(format, images, tmp_path):
    for name in "abc":
        Image.fromarray(images[0]).resize((64, 64)).save(tmp_path / f"{name}.{format}")
    for name in "bc":
        file = tmp_path / f"{name}.{format}"
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(
        EvaluationError, match=rf"2 of 3 images .*b.{format}: truncated, c.{format}"
    ):
        open_set(tmp_path)


@pytest.mark.parametrize("with_pyspng", [True, False])
def test_damage_inside_an_image_is_found_when_it_is_decoded(with_pyspng, tmp_path, monkeypatch):
    if not with_pyspng:
        monkeypatch.setattr("fid_eval.sets.decoding.pyspng", None)
    data = bytearray(png(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)))
    data[2000:2100] = bytes(100)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(EvaluationError, match=r"a.png: truncated or damaged"):
        open_set(tmp_path).images.read(0, 1)


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_npz_and_zip_are_refused(kept, images, labels, tmp_path):
    np.savez(tmp_path / "a.npz", images)
    for path in (tmp_path / "a.npz", write_zip(tmp_path / "b.zip", images, labels)):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(EvaluationError, match=rf"{path.name}: not a complete"):
            open_set(path)


def test_npz_whose_member_is_short_is_refused(images, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array(header, images)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue()[:-100])
    with pytest.raises(EvaluationError, match=r"arr_0.npy is \(11, 12, 12, 3\) uint8 .*truncated"):
        open_set(tmp_path / "a.npz")


def test_compressed_npz_with_a_wrong_checksum_is_refused(images, tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images)
    data = bytearray(path.read_bytes())
    data[3000] ^= 255
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=r"arr_0.npy cannot be read: Bad CRC-32"):
        open_set(path).images.read(0, COUNT)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
        (np.zeros((4, 8, 8, 3), np.float32), "float32.*scale them to 0..255"),
        (np.zeros((4, 8, 8, 3), np.uint16), "uint16.*8 bits"),
        (np.zeros((4, 8, 8, 4), np.uint8), "4 channels"),
        (np.zeros((4, 8), np.uint8), r"shape \(4, 8\)"),
    ],
)
def test_arrays_other_than_uint8_rgb_images_are_refused(array, reason):
    with pytest.raises(EvaluationError, match=reason):
        open_set(array)


def test_iterables_of_floats_or_of_two_sizes_are_refused():
    with pytest.raises(EvaluationError, match=r"torch.float32; uint8 is needed"):
        list(open_set([torch.zeros(2, 3, 8, 8)]).images.batches(4, lambda c: True, 1))
    two = [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 9, 9, 3), np.uint8)]
    with pytest.raises(EvaluationError, match=r"\(8, 8\) and of \(9, 9\)"):
        list(open_set(two).images.batches(4, lambda c: True, 1))


def test_missing_empty_and_unknown_paths_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no such file"):
        open_set(tmp_path / "none")
    with pytest.raises(EvaluationError, match="holds no images"):
        open_set(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(EvaluationError, match="not a set of images"):
        open_set(tmp_path / "a.txt")
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    with pytest.raises(EvaluationError, match=r"holds \['other'\]; it needs images arr_0"):
        open_set(tmp_path / "b.npz")


def test_pickled_arrays_are_not_opened(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{}, None], object))
    with pytest.raises(EvaluationError, match="pickled"):
        open_set(tmp_path / "a.npz")


def test_safetensors_of_features_with_nan_are_refused(tmp_path):
    pool = torch.randn(6, 4)
    pool[2, 1] = torch.nan
    save_file({"pool": pool}, tmp_path / "a.safetensors")
    with pytest.raises(EvaluationError, match=r"1 of 6 rows of pool hold NaN .*row 2"):
        open_set(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [">f8", "<f4", ">f2", "f2", "longdouble"])
def test_statistics_of_other_types_are_converted(dtype, tmp_path):
    features = np.random.default_rng(0).standard_normal((9, 30))  # a singular covariance
    sigma = np.cov(features.T).astype(dtype)
    np.savez(tmp_path / "a.npz", mu=features.mean(0).astype(dtype), sigma=sigma)
    read = open_set(tmp_path / "a.npz").statistics
    assert read["mu"].dtype == read["sigma"].dtype == np.dtype("=f8")
    np.testing.assert_array_equal(read["sigma"], sigma.astype(np.float64))


def test_bfloat16_statistics_and_features_are_converted(tmp_path):
    pool = torch.randn(20, 5).bfloat16()
    tensors = {"pool": pool, "mu": pool.mean(0), "sigma": torch.eye(5).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors")
    opened = open_set(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(opened.statistics["mu"], tensors["mu"].double().numpy())
    assert torch.equal(opened.features["pool"], pool)


def test_labels_of_the_wrong_number_are_refused(images):
    with pytest.raises(EvaluationError, match="11 images, but labels of shape"):
        open_set((images, np.zeros(3, np.int64)))


def test_hidden_files_and_circular_links_are_ignored(images, tmp_path):
    folder = tmp_path / "set"
    for name in ("a/0.png", "b/1.png", "b/._1.png", "b/.ipynb_checkpoints/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(folder / name)
    (folder / "b" / "circle").symlink_to(folder)
    opened = open_set(str(folder))
    assert list(opened.images.names) == ["a/0.png", "b/1.png"]
    assert opened.skipped.counts == {"hidden": 2}


@pytest.mark.parametrize("with_pyspng", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"compress_level": 0}, {"transparency": (1, 2, 3)}, {"optimize": True}]
)
def test_png_is_decoded_to_the_same_pixels_with_and_without_pyspng(
    options, with_pyspng, monkeypatch
):
    if with_pyspng:
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr("fid_eval.sets.decoding.pyspng", None)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 21, 3), np.uint8)
    pixels[:16] = np.arange(21)[None, :, None] * 5  # smooth and noisy parts use all filters of PNG
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", gamma=0.4, **options)
    np.testing.assert_array_equal(decode(buffer.getvalue(), AS_IS)[0], pixels)


def test_npy_files_of_images_are_read_and_others_refused(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    np.testing.assert_array_equal(
        open_set(str(tmp_path / "images.npy")).images.read(0, 3), images[:3]
    )
    whole = (tmp_path / "images.npy").read_bytes()
    for content in (b"hello", b"", whole[:-1]):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(EvaluationError, match="not a complete \\.npy"):
            open_set(str(tmp_path / "bad.npy"))


def batches_of(source, name="samples"):
    """Read all images (N, 3, H, W) and labels of a source."""
    parts = list(open_set(source, name=name).images.batches(4, lambda chunk: True, 1))
    labels = [labels for _, _, labels in parts]
    return torch.cat([images for _, images, _ in parts]), labels[0] is None or torch.cat(labels)


def test_pictures_of_pillow_and_streamed_datasets_are_iterables(images, labels):
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in images]
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=int(labels.max()) + 1)}
    )
    rows = {"image": pictures, "label": labels.tolist()}
    stream = datasets.Dataset.from_dict(rows, features=kinds).to_iterable_dataset()
    for source in (pictures, [pictures[:2], pictures[2:]], stream):
        found, found_labels = batches_of(source)
        assert torch.equal(found, expected)
    assert torch.equal(found_labels, torch.from_numpy(labels).long())


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([np.zeros((8, 8, 3), np.uint8)] * 4, "is one image; give batches"),
        ([Image.new("F", (8, 8))], "an image cannot be used: floating-point pixels"),
        ([[Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))] * 2], "images of different sizes"),
        ([(np.zeros((2, 8, 8, 3), np.uint8), [0, 1]), np.zeros((2, 8, 8, 3), np.uint8)],
         "some batches have labels"),
        (["a", "b"], "a batch must be uint8 images"),
        ({"train": [], "test": []}, "a dictionary of train, test; choose one"),
    ],
)  # fmt: skip
def test_iterables_of_other_things_than_images_are_refused(batches, reason):
    with pytest.raises(EvaluationError, match=reason):
        batches_of(batches)
