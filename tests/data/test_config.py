"""Wrong paths are reported from the settings alone, before torch is imported."""

import subprocess
import sys

import pytest

from moh_dit.common import cli
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig, ExportConfig
from moh_dit.training.autoencoder_config import AutoencoderTrainingConfig


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "index.json").write_text('{"shards": []}')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "encoding.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(data="nowhere"), "data nowhere does not exist"),
        (dict(data="images"), "no autoencoder is given for data images: set --autoencoder"),
        (dict(data="hf://a/b"), "no autoencoder is given for data hf://a/b"),
        (dict(autoencoder="./nowhere"), r"autoencoder \./nowhere does not exist"),
        (dict(autoencoder="a/b/c"), "autoencoder a/b/c does not exist"),
        (dict(output="there"), "output there exists"),
        (dict(output="begun"), "output begun is an unfinished encoding: continue it with --resume"),
        (dict(output="finished"), "latents finished are already finished"),
        (dict(output="finished", resume=True), "latents finished are already finished"),
    ],
)
def test_encoding_refuses(changes, words):
    with pytest.raises(UserError, match=words):
        EncodeConfig(**{"output": "new", **changes}).check_paths()


@pytest.mark.parametrize(
    "settings",
    [
        dict(output="new"),
        dict(output="begun", resume=True),
        dict(output="new", resume=True),
        dict(output="new", data="images", autoencoder="owner/name"),
        dict(output="new", data="images/*-{000..003}.tar", autoencoder="digits"),
        dict(output="new", data="hf://owner/name?streaming=true", autoencoder="there"),
    ],
)
def test_encoding_accepts(settings):
    EncodeConfig(**settings).check_paths()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ExportConfig("nowhere", "x.npz"), "data nowhere does not exist"),
        (ExportConfig("digits", "there"), r"output there must end in \.npz"),
        (AutoencoderTrainingConfig("new", data="nowhere"), "data nowhere does not exist"),
        (AutoencoderTrainingConfig("new", init_from="a/b/c"), "autoencoder a/b/c does not exist"),
        (AutoencoderTrainingConfig("there"), "output there exists"),
    ],
)
def test_export_and_autoencoder_training_refuse(config, words):
    with pytest.raises(UserError, match=words):
        config.check_paths()


def test_torch_is_not_imported():
    program = (
        "import sys; from moh_dit.data.config import EncodeConfig, ExportConfig;"
        "from moh_dit.training.autoencoder_config import AutoencoderTrainingConfig;"
        "EncodeConfig('new').check_paths(); ExportConfig('digits', 'x.npz').check_paths();"
        "AutoencoderTrainingConfig('new').check_paths(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("config_class", "old"), [(EncodeConfig, "flip"), (AutoencoderTrainingConfig, "random_flip")]
)
def test_old_names_of_horizontal_flip(config_class, old, tmp_path):
    found = []
    options = dict(prog="", description="", example="")
    cli.run_program(found.append, config_class, argv=["--output", "x", f"--{old}=false"], **options)
    (tmp_path / "old.yaml").write_text(f"output: x\n{old}: false\n")
    found.append(cli.load_config(config_class, tmp_path / "old.yaml"))
    assert [config.horizontal_flip for config in found] == [False, False]


def test_the_old_name_of_init_from(tmp_path):
    (tmp_path / "old.yaml").write_text("output: x\ninitial: digits\n")
    config = cli.load_config(AutoencoderTrainingConfig, tmp_path / "old.yaml")
    assert config.init_from == "digits"
