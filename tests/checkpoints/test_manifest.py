"""Checksums of files: folders that this project writes are verified when they are opened."""

import json

import pytest
from helpers.checkpoint_files import DAMAGES, flip
from helpers.models import tiny_pipeline

from moh_dit.checkpoints.config import ConvertConfig
from moh_dit.checkpoints.converting import convert
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common import manifest
from moh_dit.common.errors import UserError
from moh_dit.common.manifest import MANIFEST, find_damage, verify_files, write_manifest

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE_FILES = [
    "model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}", "vae/config.json",
    f"vae/{WEIGHTS}", "scheduler/scheduler_config.json",
]  # fmt: skip


@pytest.fixture
def exported(tmp_path):
    """Export a pipeline by the command, and return its folder."""
    tiny_pipeline(class_names=list("abcde")).save_pretrained(tmp_path / "source")
    output = tmp_path / "exported"
    convert(ConvertConfig(str(tmp_path / "source"), to="pipeline", output=str(output)))
    return output


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", PIPELINE_FILES)
def test_damage_in_an_exported_pipeline_is_one_line(file, damage, exported):
    DAMAGES[damage](exported / file)
    with pytest.raises(UserError) as error:
        load_pipeline(exported)
    assert "\n" not in str(error.value)
    assert str(exported) in str(error.value)


def test_a_folder_that_is_saved_again_gets_a_new_manifest(exported):
    pipeline = load_pipeline(exported)
    pipeline.transformer.final_layer.linear.bias.data.fill_(1)
    pipeline.save_pretrained(exported)
    assert find_damage(exported) is None
    assert (load_pipeline(exported).transformer.final_layer.linear.bias == 1).all()


def test_a_changed_file_opens_without_verification_or_without_manifest(exported):
    flip(exported / "transformer" / WEIGHTS)
    load_pipeline(exported, verify=False)
    (exported / MANIFEST).unlink()
    load_pipeline(exported)


def test_each_chunk_of_a_file_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 10)
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(range(35)))
    (tmp_path / "empty.txt").touch()
    write_manifest(tmp_path)
    entries = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert [len(entries[name]["crc32"]) for name in ("a.bin", "empty.txt")] == [4, 0]
    verify_files(file, tmp_path / "empty.txt")
    for position in (0, 9, 10, 34):
        changed = bytearray(range(35))
        changed[position] ^= 128
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"a\.bin is damaged: its checksum"):
            verify_files(file)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"files": 3}', '{"files": {"a.bin": {}}}', '{"files": {"a.bin": null}}',
     '{"files": {"a.bin": {"bytes": "x", "crc32": []}}}', "\xff", "[" * 9999],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_one_line(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"content")
    (tmp_path / MANIFEST).write_text(content, encoding="latin1")
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as error:
        verify_files(tmp_path / "a.bin")
    assert "\n" not in str(error.value)


def test_files_added_later_are_not_verified_silently(tmp_path):
    write_manifest(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"content")
    with pytest.raises(UserError, match="not listed in"):
        verify_files(tmp_path / "a.bin")
