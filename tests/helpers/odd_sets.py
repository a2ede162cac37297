"""Write sets with labels and names in many forms, as other tools write them.

Each function in ``SETS`` writes a set of eight images and returns its path. Beside it stand the
labels (or None) and class names that must be read, or a part of the error message.
"""

import csv
import io
import json
import os
import tarfile
import zipfile

import datasets
import numpy as np
from PIL import Image

COUNT = 8
ARRAYS = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
ALTERNATING = [0, 1] * 4
HALVES = [0] * 4 + [1] * 4
SETS = {}  # name: (function, expected labels, class names or None) or (function, message)


def expect(*expected):
    def add(function):
        SETS[function.__name__] = function, *expected
        return function

    return add


def png(index):
    buffer = io.BytesIO()
    Image.fromarray(ARRAYS[index]).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root, names):
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(index))
    return root


FLAT = [f"{index}.png" for index in range(COUNT)]
CLASSES = [f"{'ab'[index // 4]}/{index}.png" for index in range(COUNT)]
EDM = [f"00000/img{index:08}.png" for index in range(COUNT)]
EDM_LABELS = [[name, index % 2] for index, name in enumerate(EDM)]
NO_CLASSES = None, None


@expect(HALVES, ["a", "b"])
def class_folders(path):
    return write_folder(path, CLASSES)


@expect([0, 1, 2, 3, 4, 5, 6, 7], ["0", "1", "2", "3", "9", "10", "11", "100"])
def class_folders_named_by_numbers(path):
    numbers = [0, 1, 2, 3, 9, 10, 11, 100]
    return write_folder(path, [f"{number}/{number}.png" for number in numbers])


@expect(HALVES, ["a", "b"])
def stray_files_beside_class_folders(path):
    (write_folder(path, CLASSES) / "state.json").write_text("{}")
    (path / "Thumbs.db").write_text("")
    with tarfile.open(path / "notes.tar", "w") as archive:
        archive.add(path / "state.json", "readme.txt")
    return path


@expect(HALVES, ["a", "b"])
def only_split(path):
    return write_folder(path, [f"train/{name}" for name in CLASSES])


@expect("has the splits train, val; choose one")
def two_splits(path):
    return write_folder(path, [f"{'train' if i % 2 else 'val'}/{n}" for i, n in enumerate(CLASSES)])


@expect(*NO_CLASSES)
def flat_folder(path):
    return write_folder(path, FLAT)


def write_table(path, name, rows):
    with (write_folder(path, FLAT) / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@expect([3, 1] * 4, ["0", "dog", "2", "cat"])
def sampler_folder(path):
    rows = [[name, [3, 1][i % 2], ["cat", "dog"][i % 2]] for i, name in enumerate(FLAT)]
    return write_table(path, "labels.csv", [["file", "label", "class"], *rows])


@expect([1, 0] * 4, ["cat", "dog"])
def metadata_with_class_names(path):
    rows = [[name, ["dog", "cat"][i % 2]] for i, name in enumerate(FLAT)]
    return write_table(path, "metadata.csv", [["file_name", "label"], *rows])


@expect([1, 0] * 4, ["cat", "dog"])
def metadata_jsonl_with_class_names(path):
    lines = [{"file_name": n, "label": ["dog", "cat"][i % 2]} for i, n in enumerate(FLAT)]
    (write_folder(path, FLAT) / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@expect("labels.csv has no label for 7.png")
def table_that_misses_a_file(path):
    return write_table(path, "labels.csv", [["file", "label"], *([n, 0] for n in FLAT[:7])])


def with_dataset_json(path, labels):
    content = labels if isinstance(labels, bytes) else json.dumps({"labels": labels}).encode()
    (write_folder(path, EDM) / "dataset.json").write_bytes(content)
    return path


@expect(ALTERNATING, ["0", "1"])
def edm_folder(path):
    return with_dataset_json(path, EDM_LABELS)


@expect(ALTERNATING, ["0", "1"])
def edm_backslashes_and_bom(path):
    labels = [[name.replace("/", "\\"), label] for name, label in EDM_LABELS]
    return with_dataset_json(path, b"\xef\xbb\xbf" + json.dumps({"labels": labels}).encode())


@expect(*NO_CLASSES)
def edm_without_labels(path):
    return with_dataset_json(path, None)


@expect("label 'None' for 00000/img00000007.png; add the label")
def edm_with_some_labels(path):
    return with_dataset_json(path, [*EDM_LABELS[:7], [EDM[7], None]])


@expect(r"label '\[0.5, 0.5\]' for 00000/img00000000.png; labels must be integers")
def edm_vectors(path):
    return with_dataset_json(path, [[name, [0.5, 0.5]] for name in EDM])


@expect("label '1.7' for 00000/img00000000.png; labels must be integers")
def edm_fractions(path):
    return with_dataset_json(path, [[name, 1.7] for name in EDM])


@expect("label '-1' for 00000/img00000000.png; class numbers start at 0")
def edm_negative(path):
    return with_dataset_json(path, [[name, -1] for name in EDM])


@expect("dataset.json is not a table")
def dataset_json_of_another_tool(path):
    return with_dataset_json(path, b'["a", "b"]')


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path / "set.zip", "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path / "set.zip"


def edm_members(prefix=""):
    members = [(prefix + name, png(index)) for index, name in enumerate(EDM)]
    return [*members, (prefix + "dataset.json", json.dumps({"labels": EDM_LABELS}))]


@expect(ALTERNATING, ["0", "1"])
def edm_zip(path):
    return write_zip(path, edm_members())


@expect(ALTERNATING, ["0", "1"])
def edm_zip_of_one_folder_from_macos(path):
    hidden = [("__MACOSX/dataset.json", b"\0\5"), ("__MACOSX/data/._img.png", b"x")]
    return write_zip(path, hidden + edm_members("./data/"), zipfile.ZIP_DEFLATED)


@expect(HALVES, ["a", "b"])
def zip_of_class_folders(path):
    return write_zip(path, [(f"train/{name}", png(i)) for i, name in enumerate(CLASSES)])


@expect("set.zip: train/a/0.png is encrypted")
def encrypted_zip(path):
    data = bytearray(zip_of_class_folders(path).read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.find(signature)
        while start >= 0:
            data[start + offset] |= 1
            start = data.find(signature, start + 1)
    (path / "set.zip").write_bytes(data)
    return path / "set.zip"


def write_tar(path, members, mode="w", name="set.tar"):
    with tarfile.open(path / name, mode) as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            if isinstance(data, str):  # a link
                info.type, info.linkname = tarfile.SYMTYPE, data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path / name


IMAGES = [(f"{i:03}.png", png(i)) for i in range(COUNT)]
LABELS = [(f"{i:03}.cls", str(i % 2).encode()) for i in range(COUNT)]
PAIRS = [member for pair in zip(IMAGES, LABELS, strict=True) for member in pair]


@expect(ALTERNATING, ["0", "1"])
def tar(path):
    return write_tar(path, PAIRS)


@expect(ALTERNATING, ["0", "1"])
def tar_with_labels_apart_and_hidden_files(path):
    return write_tar(path, [("._000.png", b"x"), *IMAGES, *LABELS])


@expect(ALTERNATING, ["0", "1"])
def tar_of_a_folder_with_capitals(path):
    return write_tar(path, [("./" + name.upper(), data) for name, data in PAIRS])


@expect(ALTERNATING, ["0", "1"])
def compressed_tar(path):
    return write_tar(path, PAIRS, "w:gz", "set.tar.gz")


@expect(ALTERNATING, ["cat", "dog"])
def tar_with_json_class_names(path):
    labels = [(f"{i:03}.json", json.dumps({"label": ["cat", "dog"][i % 2]}).encode())
              for i in range(COUNT)]  # fmt: skip
    return write_tar(path, IMAGES + labels)


@expect([1] * COUNT, ["0", "1"])
def tar_with_dotted_names(path):
    return write_tar(path, [
        member for i in range(COUNT)
        for member in ((f"img.{i:03}.png", png(i)), (f"img.{i:03}.cls", b"1"))
    ])  # fmt: skip


@expect(ALTERNATING, ["0", "1"])
def tar_with_some_dotted_names(path):
    return write_tar(path, [(name.replace("7.", "7.v2."), data) for name, data in PAIRS])


@expect(ALTERNATING, ["0", "1"])
def tar_with_links(path):
    links = [(f"set/{i:03}.png", f"../store/{i:03}.bin") for i in range(COUNT)]
    labels = [(f"set/{name}", label) for name, label in LABELS]
    return write_tar(path, links + labels + [(f"store/{i:03}.bin", png(i)) for i in range(COUNT)])


@expect("000.png links to store/x.png, which is not in the archive")
def tar_with_a_dangling_link(path):
    return write_tar(path, [("000.png", "store/x.png"), *PAIRS[1:]])


@expect("007.png has no label; add a .cls file")
def tar_with_some_labels(path):
    return write_tar(path, PAIRS[:-1])


@expect("label '-1' for 000.png; class numbers start at 0")
def tar_with_a_negative_label(path):
    return write_tar(path, [("000.cls", b"-1"), *PAIRS[2:], PAIRS[0]])


@expect(HALVES, ["a", "b"])
def tar_of_class_folders(path):
    return write_tar(path, [(name, png(i)) for i, name in enumerate(CLASSES)])


def write_npz(path, save=np.savez, **arrays):
    save(path / "set.npz", **{"arr_0": ARRAYS, **arrays})
    return path / "set.npz"


@expect(ALTERNATING, ["0", "1"])
def npz(path):
    return write_npz(path, arr_1=np.array(ALTERNATING, ">i8"))


@expect(ALTERNATING, ["0", "1"])
def compressed_npz(path):
    return write_npz(path, np.savez_compressed, arr_1=np.array(ALTERNATING))


@expect(*NO_CLASSES)
def npz_without_labels(path):
    return write_npz(path, arr_0=ARRAYS.transpose(0, 3, 1, 2).copy())


@expect("image 0 .* has the label -1; class numbers start at 0")
def npz_with_negative_labels(path):
    return write_npz(path, arr_1=-np.ones(COUNT, int))


@expect("arr_1 is float64; labels must be integers")
def npz_with_one_hot_labels(path):
    return write_npz(path, arr_1=np.eye(COUNT))


def write_dataset(path, labels, kind, images=None):
    features = {"image": datasets.Image(), "label": kind}
    pictures = [Image.fromarray(array) for array in ARRAYS]
    columns = {"image": images or pictures, "label": labels}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(str(path / "set"))
    return path / "set"


CAT_OR_DOG = datasets.ClassLabel(names=["cat", "dog"])


@expect(ALTERNATING, ["cat", "dog"])
def dataset(path):
    return write_dataset(path, ALTERNATING, CAT_OR_DOG)


@expect(ALTERNATING, ["0", "1"])
def dataset_with_numbers(path):
    return write_dataset(path, ALTERNATING, datasets.Value("int64"))


@expect(ALTERNATING, ["cat", "dog"])
def dataset_with_strings(path):
    return write_dataset(path, ["cat", "dog"] * 4, datasets.Value("string"))


@expect("label '-1' for row 2; class numbers start at 0")
def dataset_with_a_negative_label(path):
    return write_dataset(path, [0, 1, -1, 0, 1, 0, 1, 0], CAT_OR_DOG)


@expect("label 'None' for row 0; add the label")
def dataset_with_a_missing_label(path):
    return write_dataset(path, [None, 1] + [0, 1] * 3, CAT_OR_DOG)


@expect("row 7: the row has no image")
def dataset_with_a_missing_image(path):
    images = [Image.fromarray(array) for array in ARRAYS[:7]]
    return write_dataset(path, ALTERNATING, CAT_OR_DOG, [*images, None])


def odd_file(write):
    def add(path):
        write(write_folder(path, CLASSES) / "a" / "x.png")
        return path

    return add


SETS |= {
    "dangling_link": (
        odd_file(lambda x: x.symlink_to("/nonexistent.png")),
        "a/x.png: No such file",
    ),
    "fifo": (odd_file(os.mkfifo), "a/x.png: not a regular file"),
    "empty_file": (odd_file(lambda x: x.write_bytes(b"")), "a/x.png: empty file"),
    "truncated": (odd_file(lambda x: x.write_bytes(png(0)[:-20])), "a/x.png: truncated"),
}
