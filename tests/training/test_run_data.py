"""The data of a run to be resumed are compared with its data.json, also of older versions."""

import json

import pytest

from moh_dit.common.errors import UserError
from moh_dit.training.run_folder import check_same_data

IDENTITY = {
    "kind": "images", "images": 4, "content": "abc", "autoencoder": "def",
    "decoding": 2, "classes": ["0", "1", "10"],
}  # fmt: skip


def stored(run, **changed):
    entry = {key: value for key, value in {**IDENTITY, **changed}.items() if value is not None}
    (run / "data.json").write_text(json.dumps(entry))
    return run


def test_data_of_version_0_1_0_has_neither_classes_nor_a_policy(tmp_path, capsys):
    check_same_data(stored(tmp_path, classes=None, decoding=None), IDENTITY)
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.json is damaged \('content'\)"):
        check_same_data(stored(tmp_path, content=None), IDENTITY)


def test_another_class_order_is_other_data_and_another_policy_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match="other content"):
        check_same_data(stored(tmp_path, classes=["0", "10", "1"]), IDENTITY)
    check_same_data(stored(tmp_path, decoding=1), IDENTITY)
    assert "started with version 1 of the decoding policy" in capsys.readouterr().out
