"""Write broken sets of many kinds. ``KINDS`` lists them with the expected error messages."""

import io
import json
import os
import socket
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from fid_eval.sets.decoding import PNG_SIGNATURE

from .image_sources import png

COUNT, SIDE = 12, 32
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8)
KINDS = {}  # name → (function that writes the set into a folder and returns its path, message)


def kind(message):
    def add(function):
        KINDS[function.__name__] = function, message
        return function

    return add


def savez(path, save=np.savez, **arrays):
    save(path / "set.npz", **{"arr_0": IMAGES, **arrays})
    return path / "set.npz"


def replace_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    return path


def image_folder(path):
    for index, image in enumerate(IMAGES):
        (path / f"{index % 2}").mkdir(exist_ok=True)
        (path / f"{index % 2}/{index}.png").write_bytes(png(image))
    return path


def write_zip(path, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path / "set.zip", "w", method) as archive:
        for index, image in enumerate(IMAGES):
            archive.writestr(f"{index}.png", png(image))
    return path / "set.zip"


def change_headers(path, local, central, value):
    """Overwrite a field of two bytes in all headers of a zip."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        start = data.find(signature)
        while start >= 0:
            data[start + offset : start + offset + 2] = struct.pack("<H", value)
            start = data.find(signature, start + 1)
    path.write_bytes(data)
    return path


@kind("arr_0.npy cannot be read")
def one_byte_of_a_compressed_npz(path):
    return replace_byte(savez(path, np.savez_compressed), 9000)


@kind("arr_0.npy cannot be read")
def first_byte_of_a_compressed_npz(path):
    return replace_byte(savez(path, np.savez_compressed), 60)


@kind("arr_0.npy cannot be read")
def header_of_a_compressed_member(path):
    return replace_byte(savez(path, np.savez_compressed), 1)


@kind("is encrypted")
def encrypted_npz(path):
    return change_headers(savez(path), 6, 8, 1)


@kind("compression method")
def npz_with_unknown_compression(path):
    return change_headers(savez(path, np.savez_compressed), 8, 10, 9)


def npy_header(path, text):
    header = text.encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", data + IMAGES.tobytes())
    return path / "set.npz"


@kind("arr_0.npy cannot be read")
def npy_header_that_is_no_dictionary(path):
    return npy_header(path, "{'descr': '|u1', 'fortran_order': False, 'shape': (1")


@kind("arr_0.npy cannot be read")
def npy_header_with_unknown_dtype(path):
    return npy_header(path, "{'descr': '|q9', 'fortran_order': False, 'shape': (12, 32, 32, 3), }")


@kind("impossible shape")
def npy_header_with_negative_shape(path):
    shape = "(-12, -32, 32, 3)"
    return npy_header(path, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")


@kind("bytes, but only")
def npy_header_with_huge_shape(path):
    shape = "(999999999999, 32, 32, 3)"
    return npy_header(path, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")


@kind("labels must be integers")
def npz_labels_beyond_int64(path):
    return savez(path, arr_1=np.full(COUNT, 2**64 - 1, np.uint64))


@kind("12 images, but labels of shape")
def npz_with_too_many_labels(path):
    return savez(path, arr_1=np.zeros(1 << 20, int))


@kind("have no pixels")
def npz_of_images_without_pixels(path):
    return savez(path, arr_0=np.zeros((12, 0, 32, 3), np.uint8))


@kind(r"its settings \(fid_eval\) are damaged")
def npz_with_damaged_settings(path):
    return savez(path, fid_eval=np.array('{"count": '))


@kind("has only one of mu and sigma")
def npz_with_a_mean_without_covariance(path):
    return savez(path, mu=np.zeros(3))


def folder_with_listing(path, text):
    (image_folder(path) / "dataset.json").write_bytes(text)
    return path


@kind("dataset.json is not a table")
def dataset_json_that_is_cut(path):
    return folder_with_listing(path, b'{"labels": ')


@kind("dataset.json is not a table")
def dataset_json_of_another_tool(path):
    return folder_with_listing(path, b'["a", "b"]')


@kind("dataset.json is not a table")
def dataset_json_that_is_not_utf8(path):
    return folder_with_listing(path, b'{"labels": "\xff\xfe\x00"}')


@kind("dataset.json is not a table")
def dataset_json_nested_deeply(path):
    return folder_with_listing(path, b"[" * 100_000)


@kind("dataset.json has the label")
def dataset_json_with_vectors(path):
    labels = [[f"{i % 2}/{i}.png", [0.5, 0.5]] for i in range(COUNT)]
    return folder_with_listing(path, json.dumps({"labels": labels}).encode())


@kind("x.png: not a regular file")
def fifo_among_images(path):
    os.mkfifo(image_folder(path) / "0/x.png")
    return path


@kind("set.npz: is not a regular file")
def fifo(path):
    os.mkfifo(path / "set.npz")
    return path / "set.npz"


@kind("dataset.json: is not a regular file")
def fifo_as_dataset_json(path):
    os.mkfifo(image_folder(path) / "dataset.json")
    return path


@kind("part.tar: is not a regular file")
def fifo_as_tar(path):
    os.mkfifo(path / "part.tar")
    return path


@kind("is not a regular file")
def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path / "s.zip"))  # Names of sockets must be short.
    return path / "s.zip"


@kind("x.png: No such file or directory")
def link_to_nothing(path):
    (image_folder(path) / "0/x.png").symlink_to("/nonexistent.png")
    return path


@kind("x.png: not an image")
def random_bytes_as_image(path):
    (image_folder(path) / "0/x.png").write_bytes(bytes(range(256)) * 9)
    return path


def png_of_size(width, height):
    """Make a PNG file that declares a size and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(9999))), (b"IEND", b"")]
    written = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return PNG_SIGNATURE + written


@kind("are too many for an image")
def decompression_bomb_png(path):
    (path / "a.png").write_bytes(png_of_size(50_000, 50_000))
    (path / "b.png").write_bytes(png_of_size(50_000, 50_000))
    return path


@kind("decompression bomb DOS attack")
def decompression_bomb_bmp(path):
    header = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6)
    (image_folder(path) / "0/x.bmp").write_bytes(header)
    return path


@kind("bytes are too many for an image")
def sparse_file_of_2_gib(path):
    with (image_folder(path) / "0/x.jpg").open("wb") as file:
        file.truncate(2 << 30)
    return path


@kind("is encrypted")
def encrypted_zip(path):
    return change_headers(write_zip(path), 6, 8, 1)


@kind("compression method")
def zip_with_unknown_compression(path):
    return change_headers(write_zip(path), 8, 10, 9)


@kind("damaged inside the archive|truncated or damaged|cannot be used")
def damaged_zip_member(path):
    return replace_byte(write_zip(path, zipfile.ZIP_DEFLATED), 200)


def write_tar(path, label):
    with tarfile.open(path / "set.tar", "w") as archive:
        for index, image in enumerate(IMAGES):
            for name, data in ((f"{index}.png", png(image)), (f"{index}.cls", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path / "set.tar"


@kind("labels must be integers")
def tar_label_beyond_int64(path):
    return write_tar(path, b"9" * 30)


@kind("set.tar")
def tar_member_larger_than_the_file(path):
    tar = write_tar(path, b"0")
    data = bytearray(tar.read_bytes())
    data[124:136] = b"77777777777\0"
    header = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = b"%06o\0 " % sum(header)
    tar.write_bytes(data)
    return tar


@kind("cannot be read|not a complete|not a set")
def npy_of_random_bytes(path):
    (path / "set.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + bytes(100))
    return path / "set.npy"


@kind("name too long|no such file")
def name_that_is_too_long(path):
    return path / ("x" * 300 + ".npz")
