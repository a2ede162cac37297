"""Every code block of README and docs runs, page by page, on small sizes.

Blocks of a page run in order in an empty folder that holds what its text takes for granted (a
trained run, a folder of images, …: ``provide``). Commands are checked by their programs' own
parsers as they stand; :mod:`documented_commands` says what is made smaller. A block that cannot
run has ``<!-- test: skip, WHY -->`` before it; its arguments are parsed all the same.
"""

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import documented_commands as documented
from helpers.documented_commands import ROOT, Block, blocks, commands
from PIL import Image

from fid_eval.networks import extractors
from moh_dit.common.cli import load_config
from moh_dit.common.config_files import shipped_configs
from moh_dit.data.digits import load_digit_images
from moh_dit.model import attention, presets, routing
from moh_dit.training.config import ModelConfig, TrainConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = [
    "runs/digits",
    "runs/mine",
    "runs/pretrained",
    "runs/first",
    "runs/second",
    "RUN",
    "MODEL",
    "WEAKER",
]
FOLDERS = ["train", "imagenet/train"]
SETS = [
    "digits.npz", "samples.npz", "my_images.npz", "mine.npz", "data.npz", "held_out.npz",
    "imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz", "run/step-1.npz", "run/step-2.npz",
    "samples/cfg-1.0.npz", "samples/cfg-1.5.npz",
]  # fmt: skip


class FakeModel:
    """The model of somebody's own training loop."""

    def sample(self, count):
        return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)


class FakeCache:
    """Keys and values of one step, which are all there are."""

    def update(self, key, value):
        return key, value


class FakeDecoder(torch.nn.Module):
    """Somebody's model with a layer in it."""

    def __init__(self):
        super().__init__()
        self.layer = attention.MoHAttention(512, 8, 4, 2)

    def forward(self, inputs):
        output, _ = self.layer(inputs)
        return types.SimpleNamespace(loss=output.square().mean())


# Names that a page's Python takes for granted.
NAMES = {
    "README.md": lambda: dict(folder="folder"),
    "autoencoder.md": lambda: dict(images=torch.zeros(2, 3, 32, 32), noise=torch.zeros(2, 4, 8, 8)),
    "data.md": lambda: dict(vae=load_autoencoder()),
    "checkpoints.md": lambda: dict(pipeline=load_pipeline()),
    "continue_tuning.md": lambda: dict(
        hidden_states=torch.zeros(2, 16, 512),
        present=torch.ones(2, 16, dtype=torch.bool),
        turn=lambda rows: rows,
        store=FakeCache(),
        model=FakeDecoder(),
        inputs=torch.zeros(2, 16, 512),
        recorded_router_stats=attention.recorded_router_stats,
        load_balance_loss=routing.load_balance_loss,
    ),
    "evaluation.md": lambda: dict(model=FakeModel(), torch=torch, world_size=156, step=1),
}


def load_autoencoder():
    from moh_dit.autoencoder import load_autoencoder

    return load_autoencoder("digits")


def load_pipeline():
    from moh_dit.checkpoints.opening import load_pipeline

    return load_pipeline("runs/digits")


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    """What pages take for granted, made once: images, a set, a trained run, a saved pipeline."""
    folder = tmp_path_factory.mktemp("documentation")
    images, labels = load_digit_images()
    pixels = np.stack(
        [np.asarray(Image.fromarray(i).convert("RGB").resize((32, 32))) for i in images[:30]]
    )
    for i, (image, label) in enumerate(zip(pixels, labels[:30], strict=True)):
        path = folder / "my_images" / str(label) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "set.npz", arr_0=pixels, arr_1=np.asarray(labels[:30], np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_small_run("run", ema_power_stds=[0.05, 0.1])
        plain = dict(num_shared_heads=None, num_active_routed_heads=None)
        train_small_run("dense", model=ModelConfig(**documented.TINY_MODEL | plain))
        save_named_pipeline()
    return folder


def train_small_run(run_dir, **changes):
    from moh_dit.training.trainer import Trainer

    config = documented.smaller(load_config(TrainConfig, shipped_configs()["digits"]))
    Trainer(dataclasses.replace(config, run_dir=run_dir, num_steps=4, **changes)).train()


def save_named_pipeline():
    from moh_dit.checkpoints.opening import load_pipeline
    from moh_dit.model.transformer import MoHDiTTransformer2DModel
    from moh_dit.pipeline.pipeline import MoHDiTPipeline

    trained = load_pipeline("run")
    tiny = {key: value for key, value in documented.TINY_MODEL.items() if key != "preset"}
    model = MoHDiTTransformer2DModel(sample_size=8, num_classes=100, **tiny).eval()
    names = ["cat", "golden retriever", *map(str, range(2, 100))]
    MoHDiTPipeline(model, trained.vae, trained.scheduler, names).save_pretrained("folder")


def provide(text: str, things: Path) -> None:
    """Put what ``text`` names into the working folder."""
    shutil.copytree(things / "my_images", "my_images")  # stands for the digits too
    text = text.replace("finetune_images256", "runs/pretrained")  # where that recipe starts from
    for names, source in (
        (RUNS, "run"),
        (["runs/dense"], "dense"),
        (FOLDERS, "my_images"),
        (["folder"], "folder"),
    ):
        for name in names:
            if name in text:
                shutil.copytree(things / source, name)
    for name in SETS:
        if name.split("step-")[0] in text:
            Path(name).parent.mkdir(exist_ok=True)
            shutil.copy(things / "set.npz", name)


@pytest.fixture
def small(things, tmp_path, monkeypatch):
    """An empty folder in which published names stand for small things."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    monkeypatch.setenv("FID_EVAL_HOME", str(tmp_path / "home"))
    build = presets.build_model
    tiny = {key: value for key, value in documented.TINY_MODEL.items() if key != "preset"}
    monkeypatch.setattr(
        presets, "build_model", lambda name, **options: build(name, **options, **tiny)
    )

    def small_inception(name, weights, sha256):
        digits = extractors.get_extractor("digits")
        return dataclasses.replace(digits, name="inception", label=None)

    monkeypatch.setitem(extractors.EXTRACTORS, "inception", small_inception)
    return monkeypatch


def check_yaml(block: Block) -> None:
    """A file of evaluations, or settings of a training run."""
    if "reference:" in block.text:
        return  # the command that names it runs it
    Path("block.yaml").write_text(block.text)
    load_config(TrainConfig, Path("block.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, small, things, capsys):
    provide(page.read_text(), things)
    found = blocks(page)
    for block in found:
        if block.language == "yaml" and "reference:" in block.text:
            Path("jobs.yaml").write_text(block.text)
    if "fid-eval imagenet256" in page.read_text():
        stats = ["fid-eval", "stats", str(things / "set.npz"), "--name", "imagenet256"]
        documented.run(stats, small)
    names = {"__name__": "__main__", **NAMES.get(page.name, dict)()}
    for block in found:
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language == "python" and not block.skipped:
            text = block.text
            for word, here in documented.WORDS.items():
                text = text.replace(word, here)
            exec(compile(text, where, "exec"), names)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language in ("", "bash", "sh"):
            for words in commands(block):
                try:
                    documented.run(words, small, block.skipped)
                except (SystemExit, AssertionError) as problem:
                    said = capsys.readouterr().err.strip().splitlines()[-1:]
                    pytest.fail(f"{where}: {' '.join(words)}: {problem} {said}", pytrace=False)


def test_a_wrong_option_is_found(small, capsys):
    with pytest.raises(SystemExit):
        documented.run(["accelerate", "launch", "train_dit.py", "--num_step", "3"], small, True)
    assert "did you mean num_steps?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        documented.run(["torchrun", "--nproc_pernode", "8", "train_dit.py"], small, True)


def test_blocks_and_their_kinds(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n    python a.py --x \\\n        'b c'  # why\n    make demo\n\ntext\n\n"
        "    tree/\n      leaf\n\n```{note}\nno code\n```\n\n"
        "<!-- test: skip, needs two GPUs -->\n```bash\ntorchrun a.py\n```\n\n"
        "```python\nx = 1\n```\n"
    )
    first, figure, skipped, python = blocks(page)
    assert list(commands(first)) == [["python", "a.py", "--x", "b c"], ["make", "demo"]]
    assert not list(commands(figure))
    assert [b.skipped for b in (first, figure, skipped, python)] == [False, False, True, False]
    assert (python.language, python.line) == ("python", 21)
