"""Temporary names are unique, nothing is overwritten, and leftovers of killed processes go."""

import os
import subprocess
import sys

import pytest

from fid_eval.atomic_write import HOST, remove_leftovers, temporary_path
from moh_dit.common.atomic_write import atomic_output, atomic_write
from moh_dit.common.errors import UserError


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(output, meanwhile):
    """Write ``output`` and call ``meanwhile`` before it is complete."""
    with atomic_output(output) as temporary:
        temporary.write_text("slow")
        meanwhile(output)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_of_another_process_is_not_overwritten(tmp_path, monkeypatch, links):
    def no_links(*paths):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UserError, match="File exists"):
        write(tmp_path / "a", lambda output: output.write_text("fast"))
    with pytest.raises(UserError, match="File exists"):
        write(tmp_path / "b", lambda output: write(output, lambda _: None))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "fast",
        "b": "slow",
    }


def test_a_missing_folder_is_not_created_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "removed" / "file", b"")
    assert not list(tmp_path.iterdir())


def test_only_leftovers_of_ended_processes_are_removed(tmp_path):
    other = "another-host"
    names = {
        "ended": f".partial-{HOST}-{ended_process()}-0123abcd-samples.npz",
        "running": temporary_path(tmp_path / "samples.npz").name,
        "elsewhere": f".partial-{other}-{ended_process()}-0123abcd-samples.npz",
        "own": "samples.npz",
    }
    for name in names.values():
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    kept = {names[key] for key in ("running", "elsewhere", "own")}
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path, owned=True)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.npz"}
