"""A folder has one owner, which is known by name; after its death another process takes over."""

import json
import os
import time
from pathlib import Path

import pytest
from helpers.folder_owner import folder_owner

from moh_dit.common import folder_lock as module
from moh_dit.common.errors import UserError
from moh_dit.common.folder_lock import OWNER_FILE, FolderLock


@pytest.fixture(params=[True, False], ids=["kernel lock", "heartbeat"])
def options(request, monkeypatch):
    monkeypatch.setattr(module, "SETTLING_SECONDS", 0.1)
    return dict(kernel_lock=request.param, beat_seconds=0.2, stale_seconds=3.0)


def test_a_second_process_is_told_the_owner_and_takes_over_after_its_death(tmp_path, options):
    lock = FolderLock(tmp_path / "run", **options)
    with folder_owner(tmp_path / "run", options["kernel_lock"]) as owner:
        told = rf"-c, process {owner.pid} on host {module.HOST}, started 20\d\d-.*: wait until"
        with pytest.raises(UserError, match=f"run is in use by {told}"):
            lock.acquire()
    lock.acquire()
    lock.check()
    assert json.loads((tmp_path / "run" / OWNER_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert (tmp_path / "run").is_dir()  # another process created it


def test_an_owner_on_another_host_counts_until_its_heartbeat_is_stale(tmp_path, options, capsys):
    file = tmp_path / OWNER_FILE
    lock = FolderLock(tmp_path, **options)
    with folder_owner(tmp_path, options["kernel_lock"]) as owner:
        file.write_text(file.read_text().replace(module.HOST, "elsewhere"))
        with pytest.raises(UserError, match=f"process {owner.pid} on host elsewhere"):
            lock.acquire()
    os.utime(file)
    lock.acquire()
    assert "may still be in use by -c" in capsys.readouterr().err
    lock.release()


def test_one_process_may_acquire_a_folder_twice(tmp_path, options):
    first, second = FolderLock(tmp_path / "a", **options), FolderLock(tmp_path / "a", **options)
    first.acquire()
    second.acquire()
    second.release()
    first.check()
    first.release()
    assert not (tmp_path / "a").exists()  # empty, and created by the first


def test_a_folder_that_was_removed_or_taken_over_is_noticed(tmp_path, options):
    lock = FolderLock(tmp_path / "run", **options)
    lock.acquire()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="run was removed or moved while"):
        lock.check()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OWNER_FILE).write_text(json.dumps({"host": "other", "pid": 5}))
    with pytest.raises(UserError, match="in use by None, process 5 on host other"):
        lock.check()
    lock.release()
    assert (tmp_path / "run" / OWNER_FILE).exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": 1e300, "host": 1}', b"{"])
def test_a_damaged_owner_file_stops_nobody(tmp_path, options, content):
    (tmp_path / OWNER_FILE).write_bytes(content)
    lock = FolderLock(tmp_path, **options)
    lock.acquire()
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_keep_the_lock(tmp_path, options):
    lock = FolderLock(tmp_path, **options)
    lock.acquire()
    if (child := os.fork()) == 0:
        lock.release()  # does nothing
        time.sleep(60)
    try:
        lock.check()
        lock.release()
        with folder_owner(tmp_path, options["kernel_lock"]):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"{folder} cannot be written"):
            FolderLock(folder).acquire()
