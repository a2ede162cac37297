"""Test help, versions and checks of ``fid-eval`` that need no torch."""

import subprocess
import sys

import pytest

import fid_eval
from fid_eval.choices import EXTRACTOR_NAMES, METRIC_NAMES
from fid_eval.cli import parse
from fid_eval.errors import EvaluationError
from fid_eval.fdr6 import FDR6
from fid_eval.metric_checks import check_metrics
from fid_eval.metric_registry import METRICS
from fid_eval.networks.extractors import EXTRACTORS

HEAVY = ("torch", "numpy", "PIL", "yaml", "torch_fidelity", "torchvision", "matplotlib", "sklearn")
CALL = """
import sys
from fid_eval.__main__ import main

try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


def call(*arguments):
    """Run the program in a new process; return its exit code, output and imported modules."""
    command = [sys.executable, "-c", CALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *errors, modules = done.stderr.splitlines()
    return done.returncode, done.stdout + "\n".join(errors), set(modules.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["stats", "--help"],
        ["stats", "--version"],
        ["classifier", "--help"],
        ["classifier", "--version"],
        ["references", "--help"],
        ["references", "--version"],
        ["references"],
    ],
)
def test_help_and_version_import_nothing_heavy(arguments):
    code, output, modules = call(*arguments)
    assert code == 0, output
    if "--help" in arguments:
        assert "fid-eval" in output
        assert arguments[0] == "references" or "(default: " in output
    if "--version" in arguments:
        assert output.strip() == f"fid-eval {fid_eval.__version__}"
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.npz", "none.npz"], "none.npz: no such file or folder, and no saved reference"),
        ([__file__, "none/"], "none/: no such file or folder"),
        (["stats", "none", "--name", "a"], "none: no such file or folder"),
        (["classifier", "none.npz", "--output", "a.safetensors"], "none.npz: no such file"),
    ],
)
def test_wrong_paths_are_reported_before_torch_is_imported(arguments, message):
    code, output, modules = call(*arguments)
    assert code == 2
    assert message in output
    assert not modules & set(HEAVY)


def test_options_are_spelled_with_underscores_or_hyphens():
    one = parse(["a", "b-c", "--batch_size=8", "--plot_metrics", "fid", "--weights_sha256", "a-b"])
    other = parse(
        ["a", "b-c", "--batch-size=8", "--plot-metrics", "fid", "--weights-sha256", "a-b"]
    )
    assert one == other
    assert (one.samples, one.batch_size, one.weights_sha256) == (["b-c"], 8, ["a-b"])


def test_patterns_pass_over_the_settings_beside_a_sample_set(tmp_path):
    for name in ("a.npz", "a.npz.yaml", "b.npz"):
        (tmp_path / name).touch()
    paths = [str(tmp_path / name) for name in ("a.npz", "a.npz.yaml", "b.npz")]
    options = parse(["ref.npz", *paths])
    assert [job.path for job in options.jobs] == [paths[0], paths[2]]
    assert parse(["ref.npz", "other.yaml"]).samples == ["other.yaml"]  # reported as missing


@pytest.mark.parametrize(("given", "meant"), [("FID", "fid"), ("KDD", "kid"), ("Recal", "recall")])
def test_a_misspelt_metric_suggests_the_right_one(given, meant):
    with pytest.raises(EvaluationError, match=f"did you mean '{meant}'"):
        check_metrics([given])


def test_names_on_the_command_line_are_those_of_the_registries():
    assert set(METRIC_NAMES) == {*METRICS, FDR6}
    assert set(EXTRACTOR_NAMES) == set(EXTRACTORS)


def test_the_package_exports_its_names_without_importing_torch():
    program = (
        "import sys, fid_eval\n"
        "assert set(fid_eval.__all__) <= set(dir(fid_eval))\n"
        "assert 'torch' not in sys.modules\n"
        "from fid_eval import Evaluator, Result, Share, evaluate\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
