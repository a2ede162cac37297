"""Test the HTTP interface over real connections, including closed ones."""

import http.client
import json
import re
import socket
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.web_server import Gate, demo_config, serving, write_run

import moh_dit.web.app
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.web.service import ImageService

ASKED = {"class_labels": [3], "images_per_class": 2}
PATIENCE = 120


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "digits")
    return ImageService(load_pipeline(run), demo_config(run, max_waiting=1))


@pytest.fixture(scope="module")
def gate(service):
    return Gate(service.pipeline.transformer)


@pytest.fixture(scope="module")
def address(service, gate):
    with serving(service) as address:
        yield address


def connect(address):
    return closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE))


def ask(connection, method, path, body=None, **headers):
    """Send a request; return status, headers and body, with JSON decoded."""
    if body is not None:
        headers = {"Content-Type": "application/json", **headers}
        body = body if isinstance(body, (str, bytes)) else json.dumps(body)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    if response.headers.get_content_type() == "application/json":
        content = json.loads(content)
    return response.status, response.headers, content


class Making:
    """A POST whose progress is read line by line."""

    def __init__(self, connection, asked=ASKED):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/images", json.dumps(asked), headers)
        self.response = connection.getresponse()
        assert self.response.status == 200
        self.id = self.next()["id"]

    def next(self):
        return json.loads(self.response.readline())

    def until(self, status):
        news = {"status": None}
        while news["status"] != status:
            news = self.next()
        return news


def test_the_page_loads_nothing_from_other_servers(address):
    folder = Path(moh_dit.web.app.__file__).parent / "page"
    with connect(address) as connection:
        for path in ("/", *(f"/page/{file.name}" for file in folder.iterdir())):
            status, headers, content = ask(connection, "GET", path)
            assert status == 200
            assert headers["content-security-policy"].startswith("default-src 'self'")
            assert "server" not in headers
            text = content.decode().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//[a-z]+\.", text)
        assert b"<form" in ask(connection, "GET", "/")[2]


def test_a_request_is_followed_to_its_files(address, service):
    with connect(address) as connection:
        _, _, model = ask(connection, "GET", "/model")
        assert model["classes"] == list("0123456789")
        assert {"value": "ddim", "name": "DDIM"} in model["schedulers"]
        assert "flow-euler" not in [scheduler["value"] for scheduler in model["schedulers"]]
        assert ask(connection, "GET", "/first")[1]["content-type"] == "image/png"
        making = Making(connection)
        done = making.until("done")
        assert (done["rows"], done["columns"], done["id"]) == (["3"], 2, making.id)
        assert making.response.read() == b""
        for name, start in (("grid.png", b"\x89PNG"), ("cells.png", b"\x89PNG"),
                            ("settings.yaml", b"# moh-dit")):  # fmt: skip
            _, headers, content = ask(connection, "GET", f"/images/{making.id}/{name}")
            assert content.startswith(start)
            assert headers["cache-control"] == "no-store"
        _, _, load = ask(connection, "GET", f"/images/{making.id}/head_load.json")
        assert load["classes"] == [{"id": 3, "name": "3"}]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/images", {"class_labels": ["cat"]}, {}, 400, "no class is named 'cat'"),
        ("POST", "/images", {**ASKED, "images_per_class": 65}, {}, 400, "at most 64"),
        ("POST", "/images", {**ASKED, "num_inference_steps": 1001}, {}, 400, "at most 250"),
        ("POST", "/images", "{", {}, 400, "not valid JSON"),
        ("POST", "/images", "[" * 9999, {}, 400, "not valid JSON"),
        ("POST", "/images", b"\xff", {}, 400, "not valid JSON"),
        ("POST", "/images", '{"class_labels": [0], "guidance_scale": NaN}', {}, 400, "is nan"),
        ("POST", "/images", " " * 70_000, {}, 413, "at most 65536 bytes"),
        ("POST", "/images", ASKED, {"Content-Type": "text/plain"}, 415, "application/json"),
        ("GET", "/images", None, {}, 405, "Method Not Allowed"),
        ("GET", "/images/x/grid.png", None, {}, 404, "generate them again"),
        ("DELETE", "/images/x", None, {}, 404, "generate them again"),
        ("GET", "/page/../app.py", None, {}, 404, "Not Found"),
        ("GET", "/nothing", None, {}, 404, "Not Found"),
    ],
)
def test_mistakes_have_an_error_message(address, method, path, body, headers, status, message):
    with connect(address) as connection:
        got, _, content = ask(connection, method, path, body, **headers)
    assert got == status
    assert message in content["error"]


def test_unfinished_uploads_end_without_a_traceback(address, monkeypatch, capfd):
    head = b"POST /images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    monkeypatch.setattr(moh_dit.web.app, "SECONDS_TO_UPLOAD", 0.2)
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as aborted:
        aborted.sendall(head + b"Content-Length: 100\r\n\r\n{")
    with socket.create_connection(("127.0.0.1", port)) as stalled:
        stalled.sendall(head + b"Content-Length: 100\r\n\r\n{")
        answer = b""
        while part := stalled.recv(4096):  # until the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert "Traceback" not in capfd.readouterr().err


def test_an_unknown_file_is_an_error(address):
    with connect(address) as connection:
        making = Making(connection)
        making.until("done")
        assert making.response.read() == b""
        status, _, content = ask(connection, "GET", f"/images/{making.id}/raw.pt")
        assert (status, content) == (404, {"error": "these images have no file raw.pt"})


def test_other_host_names_are_rejected(address):
    # A page of another domain that resolves to this machine could otherwise read this one.
    with connect(address) as connection:
        status, _, content = ask(connection, "GET", "/model", Host="example.org")
        assert (status, content) == (400, b"Invalid host header")
        assert ask(connection, "GET", "/model", Host="127.0.0.1:99")[0] == 200


def test_requests_queue_and_can_be_cancelled(address, gate):
    with connect(address) as first, connect(address) as second, connect(address) as other:
        with gate.closed():
            running, waiting = Making(first), Making(second)
            gate.wait()
            assert ask(other, "POST", "/images", ASKED)[0] == 503
            assert ask(other, "DELETE", f"/images/{waiting.id}")[0] == 204
            assert waiting.until("cancelled")
            assert ask(other, "DELETE", f"/images/{running.id}")[0] == 204
            assert ask(other, "GET", "/model")[0] == 200  # the server answers while the model runs
            before = gate.evaluations
        assert running.until("cancelled")
        assert gate.evaluations == before  # it ended within its current step
        assert Making(other).until("done")


def test_closing_a_connection_cancels_its_request(address, gate):
    with connect(address) as first, connect(address) as second, connect(address) as third:
        with gate.closed():
            gone = [Making(first), Making(second)]
            gate.wait()
            for making, connection in zip(gone, (first, second), strict=True):
                connection.close()
                making.response.close()
            # The queue has room as soon as the server notices the closed connections.
            headers = {"Content-Type": "application/json"}
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                third.request("POST", "/images", json.dumps(ASKED), headers)
                response = third.getresponse()
                if response.status != 503:
                    break
                response.read()
            assert response.status == 200
            before = gate.evaluations
        assert json.loads(response.read().splitlines()[-1])["status"] == "done"
        # The running request ended within its current step; the waiting one never started.
        assert gate.evaluations == before + 4
