"""Serve a small untrained model for tests of the page; its steps can be paused."""

import contextlib
import json
import socket
import threading

import torch
from PIL import Image

from moh_dit.autoencoder import load_autoencoder
from moh_dit.data.digits import DIGIT_NAMES
from moh_dit.diffusion.process import make_scheduler
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.web.app import Server
from moh_dit.web.config import DemoConfig

PATIENCE = 120  # seconds
MODEL = dict(sample_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10,
             num_shared_heads=[4, 2], num_active_routed_heads=[0, 1])  # fmt: skip


def write_run(folder, **model):
    """Write a run folder in the layout of training, with random weights."""
    torch.manual_seed(0)
    transformer = MoHDiTTransformer2DModel(**{**MODEL, **model})
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    checkpoint = folder / "checkpoints" / "step-00000002"
    transformer.save_pretrained(checkpoint / "transformer")
    load_autoencoder("digits").save_pretrained(folder / "vae")
    make_scheduler().save_pretrained(folder / "scheduler")
    (folder / "classes.json").write_text(json.dumps(DIGIT_NAMES))
    (folder / "config.yaml").write_text("run_dir: digits\n")
    (folder / "samples").mkdir()
    Image.new("RGB", (64, 64), "gray").save(folder / "samples" / "step-00000002.png")
    return folder


def demo_config(run, **options):
    checkpoint = str(run / "checkpoints" / "step-00000002")
    return DemoConfig(checkpoint=checkpoint, num_inference_steps=4, device="cpu", **options)


class Gate:
    """Pauses a model before each evaluation while the gate is closed; counts evaluations."""

    def __init__(self, model):
        self.open, self.reached, self.evaluations = threading.Event(), threading.Event(), 0
        self.open.set()
        model.register_forward_pre_hook(self._pass)

    def _pass(self, *_):
        self.evaluations += 1
        self.reached.set()
        assert self.open.wait(PATIENCE)

    @contextlib.contextmanager
    def closed(self):
        self.reached.clear()
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def wait(self):
        """Wait until the model reaches the gate."""
        assert self.reached.wait(PATIENCE)


@contextlib.contextmanager
def serving(service, allowed_hosts=("127.0.0.1",)):
    """Serve from a thread; yield the address."""
    server = Server(service, list(allowed_hosts))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
