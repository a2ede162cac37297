"""Read every kind of input with the same pixels and labels, and refuse wrong input."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fid_eval import Share
from fid_eval.errors import EvaluationError
from fid_eval.sets import readers
from fid_eval.sets.decoding import AS_IS, Preprocess, decode
from fid_eval.sets.hashing import path_hash
from fid_eval.sets.hugging_face import HubUrl, is_hub_url, parse_hub_url
from fid_eval.sets.loading import CHUNK, batch_spans, load_spans
from fid_eval.sets.npz import NpzFile
from fid_eval.sets.opening import open_set
from fid_eval.sets.readers import ImageReader

COUNT, SIDE = 11, 12


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def labels():
    return np.sort(np.random.default_rng(1).integers(0, 3, COUNT))


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(path, images, labels):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = path / str(label) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def write_zip(path, images, labels):
    with zipfile.ZipFile(path, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"img{index:04d}.png", png(image))
        table = [[f"img{i:04d}.png", int(label)] for i, label in enumerate(labels)]
        archive.writestr("dataset.json", json.dumps({"labels": table}))
    return path


def write_tar(path, images, labels, first=0):
    with tarfile.open(path, "w") as archive:
        for index, (image, label) in enumerate(zip(images, labels, strict=True), first):
            for name, data in (
                (f"{index:04d}.png", png(image)),
                (f"{index:04d}.cls", b"%d" % label),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def hugging_face(images, labels):
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    columns = {"picture": [Image.fromarray(image) for image in images], "kind": list(labels)}
    return datasets.Dataset.from_dict(columns, features=features)


def sources(path, images, labels):
    """Write the images and labels in every supported form; return the sources by name."""
    np.savez(path / "stored.npz", images, labels)
    np.savez_compressed(path / "compressed.npz", images, labels)
    half = COUNT // 2
    write_tar(path / "part-00.tar", images[:half], labels[:half])
    write_tar(path / "part-01.tar", images[half:], labels[half:], half)
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    return {
        "stored": path / "stored.npz",
        "compressed": str(path / "compressed.npz"),
        "folder": write_folder(path / "folder", images, labels),
        "zip": write_zip(path / "images.zip", images, labels),
        "tar": str(path / "part-{00..01}.tar"),
        "tar-pattern": str(path / "part-*.tar"),
        "dataset": hugging_face(images, labels),
        "array": (images, labels),
        "tensor": (nchw, torch.from_numpy(labels)),
        "iterable": [(nchw[:3], labels[:3]), (nchw[3:], labels[3:])],
        "generator": ((images[i : i + 4], labels[i : i + 4]) for i in range(0, COUNT, 4)),
        "share": Share([(nchw, labels)]),
    }


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


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "dataset"])
def test_worker_processes_decode_the_same_images_as_threads(
    kind, images, labels, tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "PROCESSES_FROM", 1)
    opened = open_set(sources(tmp_path, images, labels)[kind])
    batches = [batch for _, batch, _ in opened.images.batches(4, lambda chunk: True, workers=2)]
    assert torch.equal(torch.cat(batches).permute(0, 2, 3, 1), torch.from_numpy(images))


def test_damage_found_by_a_worker_process_is_an_error_of_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PROCESSES_FROM", 1)
    data = bytearray(png(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)))
    data[2000:2100] = bytes(100)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(EvaluationError, match=r"^[^\n]*a.png: truncated or damaged[^\n]*$"):
        list(open_set(tmp_path).images.batches(4, lambda chunk: True, workers=2))


def test_the_batches_of_all_ranks_equal_those_of_one_rank():
    count = 2 * CHUNK + 5
    alone = list(batch_spans(count, 100, lambda chunk: True))
    shared = [list(batch_spans(count, 100, lambda c, r=rank: c % 3 == r)) for rank in range(3)]
    assert sorted(span for spans in shared for span in spans) == alone
    assert alone[-1] == (2 * CHUNK, count)


def test_batches_of_an_iterable_do_not_cross_chunks():
    parts = [np.zeros((700, 2, 2, 3), np.uint8)] * 3
    spans = [(s, len(b)) for s, b, _ in open_set(parts).images.batches(1000, lambda c: True, 1)]
    assert spans == [(0, 1000), (1000, 24), (1024, 1000), (2024, 24), (2048, 52)]


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


def test_hugging_face_data_sets_are_read_from_disk_and_by_url(images, labels, tmp_path):
    dataset = hugging_face(images, labels)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "hub" / "train.parquet")
    saved = open_set(tmp_path / "saved")
    named = open_set(f"hf://{tmp_path / 'hub'}?split=train&image=picture&label=kind")
    for opened in (saved, named):
        np.testing.assert_array_equal(opened.images.read(0, COUNT), images)
        np.testing.assert_array_equal(opened.images.labels, labels)
    assert saved.content_hash() == named.content_hash()
    with pytest.raises(EvaluationError, match="no column 'photo' among"):
        open_set(f"hf://{tmp_path / 'hub'}?image=photo")
    with pytest.raises(EvaluationError, match=r"unknown option 'splitt'"):
        open_set(f"hf://{tmp_path / 'hub'}?splitt=train")


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


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("RGBA", "transparency"), ("LA", "transparency"), ("I;16", "16 bits per channel")],
)
def test_transparent_and_16_bit_images_are_refused(mode, reason, tmp_path):
    Image.new(mode, (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(EvaluationError, match=rf"1 of 2 images cannot be used \(a.png: {reason}"):
        open_set(tmp_path)


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
    with pytest.raises(EvaluationError, match="damaged"):
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


def test_labels_of_the_wrong_number_are_refused(images):
    with pytest.raises(EvaluationError, match="11 images, but labels of shape"):
        open_set((images, np.zeros(3, np.int64)))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://a/b", HubUrl("a/b")),
        ("hf://a/b/c?split=test&streaming=true", HubUrl("a/b", "c", "test", True)),
        ("hf://mnist?image=x&label=y", HubUrl("mnist", image="x", label="y")),
        ("hf://a/b?config=c&streaming=0", HubUrl("a/b", "c")),  # form of 0.1.0
        ("hf:a/b/c@test", HubUrl("a/b", "c", "test")),  # form of 0.1.0
        ("hf-stream:a/b", HubUrl("a/b", streaming=True)),  # form of 0.1.0
        ("hf:///tmp/folder", HubUrl("/tmp/folder")),
        ("hf:./some/folder", HubUrl("./some/folder")),
    ],
)
def test_hub_urls_are_parsed_in_the_new_and_the_old_forms(url, expected):
    assert is_hub_url(url)
    assert parse_hub_url(url) == expected


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hf://a/b?splitt=test", "unknown option 'splitt'; choose from split,"),
        ("hf://a/b?streaming=yes", "streaming is 'yes'; give true or false"),
        ("hf://?split=test", "no data set is named"),
    ],
)
def test_wrong_hub_urls_are_refused(url, reason):
    with pytest.raises(EvaluationError, match=reason):
        parse_hub_url(url)


def test_hugging_face_datasets_are_an_optional_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EvaluationError, match="pip install datasets"):
        open_set("hf://mnist?split=test")


def test_hidden_files_and_circular_links_are_ignored(images, tmp_path):
    folder = tmp_path / "set"
    for name in ("a/0.png", "b/1.png", "b/._1.png", "b/.ipynb_checkpoints/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(folder / name)
    (folder / "b" / "circle").symlink_to(folder)
    opened = open_set(str(folder))
    assert opened.images.names == ["a/0.png", "b/1.png"]


class Numbered(ImageReader):
    """Reads images whose pixels all equal their index."""

    decodes, size, count = True, (2, 3), 300

    def read_into(self, start, stop, images):
        images[:] = np.arange(start, stop).astype(np.uint8).reshape(-1, 1, 1, 1)


class Killed(Numbered):
    def read_into(self, start, stop, images):
        os._exit(9)


def test_worker_processes_keep_the_order_with_few_slots():
    spans = [(start, min(start + 7, 300)) for start in range(0, 300, 7)]
    loaded = list(load_spans(Numbered(), spans, 7, workers=2, decoding=True))
    assert [len(images) for images in loaded] == [stop - start for start, stop in spans]
    assert torch.equal(torch.cat(loaded)[:, 0, 0, 0], torch.arange(300).to(torch.uint8))


def test_a_killed_worker_process_is_an_error():
    with pytest.raises(EvaluationError, match=r"was killed, .* fewer --workers"):
        list(load_spans(Killed(), [(0, 4)], 4, workers=1, decoding=True))


@pytest.mark.parametrize("kind", ["folder", "dataset", "tar-pattern"])
@pytest.mark.parametrize("processes_from", [1, 500])
def test_hashing_while_decoding_gives_the_same_hash(
    kind, processes_from, images, labels, tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "PROCESSES_FROM", processes_from)
    source = sources(tmp_path, images, labels)[kind]
    if kind == "folder":
        (Path(source) / "notes.txt").write_text("no image, but part of the folder")
    before, decoded = open_set(source), open_set(source)
    expected = before.content_hash()
    chunks = iter(decoded.images.batches(4, lambda chunk: True, workers=2))
    next(chunks)  # decode some images
    assert 4 <= len(decoded.images.digests) <= COUNT
    list(chunks)
    assert len(decoded.images.digests) == COUNT
    monkeypatch.setattr(decoded.images, "fetch", None)  # no file is read again
    assert decoded.content_hash() == expected
    if kind == "folder":
        assert path_hash(Path(source), decoded.images.file_digests()) == expected
        wrong = dict.fromkeys(decoded.images.file_digests(), "0" * 64)
        assert path_hash(Path(source), wrong) != expected  # known hashes are used as given


def test_headers_are_checked_by_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("fid_eval.sets.encoded.HEADERS_PER_TASK", 1)
    monkeypatch.setattr("fid_eval.sets.encoded.os.cpu_count", lambda: 2)
    for name in "abcdefg":
        (tmp_path / f"{name}.png").write_bytes(png(np.zeros((4, 5, 3), np.uint8)))
    assert open_set(tmp_path).images.size == (4, 5)
    (tmp_path / "e.png").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"1 of 7 images cannot be used \(e.png: empty file"):
        open_set(tmp_path)


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
    np.testing.assert_array_equal(decode(buffer.getvalue(), AS_IS), pixels)


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
        ([Image.new("RGBA", (8, 8))], "an image has transparency"),
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


def test_batches_continue_what_was_read_ahead(images, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PROCESSES_FROM", 1)
    reader = open_set(sources(tmp_path, images, labels)["folder"]).images
    reader.read_ahead(4, everything, 2, torch.device("cpu"))
    begun = reader.ahead[1]
    reader.read_ahead(4, everything, 2, torch.device("cpu"))
    assert reader.ahead[1] is begun
    for _ in range(2):  # the second pass starts from the beginning
        batches = [batch for _, batch, _ in reader.batches(4, everything, workers=2)]
        assert torch.equal(torch.cat(batches).permute(0, 2, 3, 1), torch.from_numpy(images))
        with pytest.raises(StopIteration):
            next(begun)
    reader.read_ahead(4, everything, 2, torch.device("cpu"))
    assert [len(batch) for _, batch, _ in reader.batches(8, everything, workers=2)] == [8, 3]


def everything(chunk):
    return True
