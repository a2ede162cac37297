"""Whatever is broken in a run folder, programs go on or end with one line."""

import shutil

import pytest
from helpers.training_runs import tiny_config, write_images

from moh_dit.analysis.run_reader import read_run_folder
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.atomic_write import remove
from moh_dit.common.cli import FILE_ERRORS
from moh_dit.common.errors import UserError
from moh_dit.training.config import DataConfig, EvaluationConfig
from moh_dit.training.progress import RunProgress
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

REPORTED_FILES = ("config.yaml", "log.jsonl", "environment.jsonl", "samples/step-00000003.png",
                  "results.json")  # fmt: skip
FOLDERS = ("checkpoints", "samples", "evaluations")


def write(content):
    def attack(path):
        remove(path)
        path.write_bytes(content)

    return attack


def make_folder(path):
    remove(path)
    path.mkdir()
    (path / "file").write_text("")


DAMAGES = {
    "empty": write(b""),
    "binary": write(bytes(range(256))),
    "a list": write(b"[1, 2]\n"),
    "an object": write(b"{}\n"),
    "nested": write(b"[" * 100_000),
    "a folder": make_folder,
    "removed": remove,
}
ATTACKS = [
    *((file, damage) for file in REPORTED_FILES for damage in DAMAGES),
    *((folder, damage) for folder in FOLDERS for damage in ("empty", "removed")),
]
RESUMED = [
    ("config.yaml", "binary"), ("data.json", "a list"), ("data.json", "nested"),
    ("log.jsonl", "binary"), ("environment.jsonl", "a folder"), ("samples", "empty"),
]  # fmt: skip
DURING_TRAINING = [
    (".", "removed"), ("log.jsonl", "a folder"), ("checkpoints", "empty"),
    (".owner.json", "binary"),
]  # fmt: skip


def config(run, **options):
    return tiny_config(
        run,
        data=DataConfig(source=str(run.parent / "images"), image_size=32, autoencoder="digits"),
        evaluation=EvaluationConfig(num_inference_steps=1),
        **options,
    )


def survives(program):
    """Require that a program succeeds or ends with one line; return whether it succeeds."""
    try:
        program()
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return False
    except OSError as error:
        # The command line reports these in one line.
        assert error.errno in FILE_ERRORS  # noqa: PT017
        return False
    return True


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory):
    """Train a run of three steps and return its folder."""
    folder = tmp_path_factory.mktemp("broken")
    write_images(folder / "images")
    Trainer(config(folder / "run", num_steps=3)).train()
    return folder / "run"


@pytest.fixture
def copy(run):
    """Copy the run, beside its images."""
    folder = run.with_name("copy")
    yield shutil.copytree(run, folder)
    remove(folder)


def test_every_broken_run_has_a_report(run):
    for name, damage in ATTACKS:
        folder = shutil.copytree(run, run.with_name("reported"))
        DAMAGES[damage](folder / name)
        assert survives(lambda folder=folder: read_run_folder(folder, "run")), (name, damage)
        remove(folder)


@pytest.mark.parametrize(("name", "damage"), RESUMED)
def test_a_broken_run_resumes_or_says_why_not(copy, name, damage):
    DAMAGES[damage](copy / name)
    if survives(lambda: Trainer(config(copy, num_steps=4, resume=True)).train()):
        assert list_checkpoints(copy)[-1].name == "step-00000004"


@pytest.mark.parametrize(("name", "damage"), DURING_TRAINING)
def test_damage_during_training_ends_in_one_line(copy, monkeypatch, name, damage):
    log = RunProgress.log

    def damage_and_log(self, entry):
        DAMAGES[damage](copy / name)
        log(self, entry)

    monkeypatch.setattr(RunProgress, "log", damage_and_log)
    assert not survives(lambda: Trainer(config(copy, num_steps=9, resume=True)).train())
