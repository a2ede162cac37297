"""The configuration mechanism that every program shares."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moh_dit.__main__ import COMMANDS, load, main
from moh_dit.common.cli import load_config, run_program, save_config
from moh_dit.common.errors import UserError
from moh_dit.common.renamed import SETTINGS
from moh_dit.common.version import __version__

ROOT = Path(__file__).parents[2]


@dataclass
class Inner:
    learning_rate: float = 1e-4
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging factors."""


@dataclass
class Outer:
    optimizer: Inner = field(default_factory=Inner)
    num_steps: int = 10
    """Length of the run, in steps."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic."""
    plan: list[int] | int | None = None
    """A list or one for all."""
    resume: bool = False
    """Go on."""


def run(*argv):
    seen = []
    run_program(seen.append, Outer, prog="p", description="d", example="p --x", argv=argv)
    return seen[0]


def test_yaml_then_dotted_overrides_and_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {learning_rate: 0.5}\nnum_steps: 7\nplan: [1, 2]\n")
    config = run("--config", str(path), "--optimizer.betas", "[0.1, 0.2]", "--num_steps=8")
    assert config == Outer(Inner(0.5, (0.1, 0.2)), 8, "no", [1, 2], False)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(Outer, tmp_path / "resolved.yaml") == config
    assert run("--config", str(tmp_path / "resolved.yaml")) == config


def test_a_flag_alone_means_true():
    assert run("--resume").resume
    assert run("--resume", "--num_steps=3") == Outer(num_steps=3, resume=True)
    assert run("--resume", "true").resume
    assert not run("--resume", "false").resume
    assert not run("--resume=false").resume


def test_one_field_may_go_without_its_name():
    def run(*argv):
        seen = []
        options = dict(prog="p", description="d", example="p x", positional="mixed_precision")
        run_program(seen.append, Outer, argv=argv, **options)
        return seen[0]

    expected = Outer(num_steps=3, mixed_precision="bf16")
    assert run("bf16", "--num_steps", "3") == expected
    assert run("--num_steps", "3", "bf16") == expected
    assert run("--num_steps=3", "bf16") == expected
    assert run("--num_steps=3", "--mixed_precision", "bf16") == expected
    assert run("--num_steps=3") == Outer(num_steps=3)
    with pytest.raises(SystemExit):
        run("bf16", "no")


def test_a_list_may_go_without_its_name():
    @dataclass
    class Several:
        runs: list[str]
        output: str = "o"

    def run(*argv):
        seen = []
        options = dict(prog="p", description="d", example="p x y", positional="runs")
        run_program(seen.append, Several, argv=argv, **options)
        return seen[0]

    assert run("a b", 'c"d', "--output", "e") == Several(["a b", 'c"d'], "e")
    assert run("--output=e", "a") == Several(["a"], "e")
    assert run("--runs=[a, b]") == Several(["a", "b"])


def test_a_picture_with_settings_inside_is_a_configuration(tmp_path, capsys):
    settings = PngInfo()
    settings.add_itxt("settings", "# a fact\nnum_steps: 7\nplan: [1, 2]\n" + "# more\n" * 200)
    picture = Image.new("RGB", (2, 2))
    picture.save(tmp_path / "a.png", pnginfo=settings)
    picture.save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("num_steps: 7")
    assert run("--config", str(tmp_path / "a.png"), "--resume").num_steps == 7
    for name, message in (("b.png", "contains no settings"), ("c.png", "not a readable")):
        with pytest.raises(SystemExit):
            run(f"--config={tmp_path / name}")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optimizer.learning_rat", "1"], ["learning_rat", "optimizer.learning_rate?"]),
        (["--num_step=1"], ["num_step", "num_steps?"]),
        (["--learning_rate=1"], ["optimizer.learning_rate?"]),
        (["--num_steps=many"], ["num_steps", "many"]),
        (["--mixed_precision=int3"], ["mixed_precision", "bf16"]),
        (["--config=missing.yaml"], ["missing.yaml does not exist"]),
        (["--config=digit"], ["did you mean digits?"]),
        (["--num_steps=many"], ["num_steps is many; it must be a whole number"]),
        (["--mixed_precision=int3"], ["mixed_precision is int3; it must be one of no, bf16"]),
        (["--plan=x"], ["it must be a list [A, B, ...], each a whole number"]),
        (["--optimizer.betas=[1]"], ["it must be a list of 2, each a number"]),
        (["--optimizer=4"], ["optimizer is a group of settings"]),
        (["--num_steps"], ["--num_steps needs a value"]),
        (["stray"], ["there is no setting stray"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in (*words, "p: error: "):
        assert word in message
    assert "Parser key" not in message
    assert "typing" not in message


def test_unknown_keys_in_a_file_name_the_nearest(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {learning_rte: 1}\n")
    with pytest.raises(SystemExit):
        run("--config", str(path))
    assert "did you mean optimizer.learning_rate?" in capsys.readouterr().err
    with pytest.raises(UserError, match="learning_rte"):
        load_config(Outer, path)


def test_user_errors_become_one_line(capsys):
    def fail(config):
        raise UserError("folder x is empty")

    with pytest.raises(SystemExit) as stop:
        run_program(fail, Outer, prog="p", description="d", example="e", argv=[])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "p: error: folder x is empty\n"


def test_help_shows_field_docstrings_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Length of the run, in steps. (type: int, default: 10)" in text
    assert "example: p --x" in text


HEAVY = {"torch", "diffusers", "accelerate", "matplotlib"}


def fresh_process(*arguments, module="moh_dit"):
    """Run a program in a new process that fails if it has imported torch in the end."""
    script = (
        f"import runpy, sys\n"
        f"sys.argv = ['p', *{list(arguments)!r}]\n"
        f"try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit as end:\n"
        f"    code = end.code or 0\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        f"sys.exit(f'imported {{heavy}}' if heavy else code)\n"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_do_not_import_torch(command):
    shown = fresh_process(command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"example: moh-dit {command} " in shown.stdout
    assert "--version" in shown.stdout
    printed = fresh_process(command, "--version")
    assert (printed.returncode, printed.stdout) == (0, f"moh-dit {command} {__version__}\n")


@pytest.mark.parametrize("program", ["train_dit", "sample_dit"])
def test_scripts_at_the_top_are_the_sub_commands(program):
    shown = fresh_process("--help", module=program)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: {program}.py ")


def test_the_program_lists_its_commands_and_suggests_the_nearest(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in listed] == []
    with pytest.raises(SystemExit) as stop:
        main(["smaple"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "moh-dit: error: there is no command 'smaple'; did you mean sample?\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_loaded(command):
    assert dataclasses.is_dataclass(load(COMMANDS[command].config))
    assert callable(load(COMMANDS[command].function))
    assert COMMANDS[command].positional in {
        None,
        *(field.name for field in dataclasses.fields(load(COMMANDS[command].config))),
    }


def test_a_wrong_path_is_found_before_torch_is_imported():
    done = fresh_process("sample", "no/such/run", "--output", "grid.png")
    assert done.returncode == 2, done.stderr
    assert "no/such/run" in done.stderr


def test_options_take_hyphens_and_names_of_earlier_versions(tmp_path, monkeypatch):
    assert run("--num-steps", "3", "--optimizer.learning-rate=2").optimizer.learning_rate == 2
    monkeypatch.setitem(SETTINGS, "Outer", {"steps": "num_steps"})
    assert run("--steps", "4").num_steps == 4
    (tmp_path / "old.yaml").write_text("steps: 5\nplan: 1\n")
    assert run("--config", str(tmp_path / "old.yaml")).num_steps == 5
    assert load_config(Outer, tmp_path / "old.yaml").num_steps == 5


def test_paths_are_checked_before_the_program_starts(capsys):
    @dataclass
    class Checked:
        source: str = "nowhere"

        def check_paths(self):
            raise UserError(f"{self.source} does not exist")

    with pytest.raises(SystemExit):
        run_program(pytest.fail, Checked, prog="p", description="d", example="e", argv=[])
    assert capsys.readouterr().err == "p: error: nowhere does not exist\n"


def test_usage_names_what_is_required(capsys):
    from moh_dit.sampling.config import SampleConfig

    with pytest.raises(SystemExit):
        run_program(print, SampleConfig, prog="p", description="d", example="e", argv=["--help"])
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage == (
        "usage: p [--config NAME] --checkpoint CHECKPOINT --output OUTPUT [--KEY VALUE ...]"
    )
