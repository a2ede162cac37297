"""Write images and labels in every form that ``fid_eval`` reads."""

import io
import json
import tarfile
import zipfile

import datasets
import numpy as np
import torch
from PIL import Image

from fid_eval import Share

COUNT, SIDE = 11, 12


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
