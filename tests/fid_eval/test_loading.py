"""Load batches ahead of use with threads and worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.image_sources import COUNT, png, sources

from fid_eval.errors import EvaluationError
from fid_eval.sets import readers
from fid_eval.sets.hashing import path_hash
from fid_eval.sets.loading import CHUNK, batch_spans, load_spans
from fid_eval.sets.opening import open_set
from fid_eval.sets.readers import ImageReader


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


HUNG_LOADERS = """
import multiprocessing, time
from fid_eval.sets.loading import load_spans
from fid_eval.sets.readers import ImageReader

class Hung(ImageReader):
    decodes, size, count = True, (2, 3), 300

    def read_into(self, start, stop, images):
        time.sleep(1000)

spans = [(start, start + 10) for start in range(0, 300, 10)]
loaded = [load_spans(Hung(), spans, 10, workers=2, decoding=True) for _ in range(2)]
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
next(loaded[0])
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_worker_processes_end_with_their_parent(sent):
    parent = subprocess.Popen([sys.executable, "-c", HUNG_LOADERS], stdout=subprocess.PIPE)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 4
    assert all(map(psutil.pid_exists, pids))
    parent.send_signal(sent)
    parent.wait()
    parent.stdout.close()
    assert ended(pids)


def ended(pids):
    """Return whether the processes end within a few seconds."""
    until = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Slow(Numbered):
    def read_into(self, start, stop, images):
        time.sleep(1000 if start else 0)


def test_hung_worker_processes_end_when_the_batches_are_not_needed():
    loaded = load_spans(Slow(), [(0, 4), (4, 8)], 4, workers=2, decoding=True)
    next(loaded)
    started = time.monotonic()
    loaded.close()
    assert time.monotonic() - started < 60


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
