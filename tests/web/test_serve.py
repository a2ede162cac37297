"""The demo, started from the command line."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers.web_server import write_run

from moh_dit.__main__ import run_command
from moh_dit.web import serve


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "digits")


def start(*arguments):
    with pytest.raises(SystemExit) as end:
        run_command("demo", [*map(str, arguments)], prog="moh-dit demo")
    return end.value.code


def test_it_answers_on_this_machine_until_interrupted(run):
    root = Path(serve.__file__).parents[2]
    command = [sys.executable, "-m", "moh_dit", "demo", run, "--port", "0"]
    server = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # SIGINT may be ignored if the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), server.stderr.read()
        address = line.split()[0]
        with urllib.request.urlopen(f"{address}model", timeout=120) as answer:
            assert b'"name":"digits-step-00000002"' in answer.read()
        asked = urllib.request.Request(
            f"{address}images",
            b'{"class_labels": [3], "images_per_class": 64, "num_inference_steps": 250}',
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=120) as news:
            while b"running" not in news.readline():
                pass
            server.send_signal(signal.SIGINT)
            assert b'"status": "cancelled"' in news.read().splitlines()[-1]
        _, errors = server.communicate(timeout=120)
    finally:
        server.kill()
    assert server.returncode == 130
    assert errors == "python -m moh_dit demo: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "checkpoint nowhere does not exist"),
        (["--port", "8000", "nowhere"], "checkpoint nowhere does not exist"),
        (["--port", "8000"], "checkpoint"),
        (["nowhere", "--max_images", "0"], "max_images is 0; it must be at least 1"),
        (["nowhere", "--port", "65536"], "port is 65536"),
        (["nowhere", "--max_image", "1"], "did you mean max_images"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert start(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(run, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("moh_dit.sampling.sample.load_pipeline", None)
        assert start(run, "--port", port) == 2
    said = "Address already in use; give another host or port"
    expected = f"moh-dit demo: error: cannot listen on 127.0.0.1, port {port}: {said}\n"
    assert capsys.readouterr().err == expected


def test_an_address_of_another_machine_is_an_error(run, capsys):
    assert start(run, "--host", "192.0.2.1", "--port", 0) == 2
    assert "cannot listen on 192.0.2.1, port 0: Cannot assign" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(run, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert start(run) == 2
    expected = f"the page needs {package}, which is not installed: pip install 'moh-dit[web]'"
    assert expected in capsys.readouterr().err
