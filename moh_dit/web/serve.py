"""Serve the demo page (`moh-dit demo RUN`) until interrupted."""

import socket
from dataclasses import replace

from ..common.errors import UserError
from .config import DemoConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]"]  # as in a Host header


def serve(config: DemoConfig) -> None:
    """Load the model and answer requests until interrupted."""
    config.check_paths()
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the page needs {error.name}, which is not installed: pip install 'moh-dit[web]'"
        ) from None
    from ..sampling.sample import load_for_sampling, pin_checkpoint, start_processes
    from .app import Server
    from .service import ImageService

    config = replace(config, checkpoint=pin_checkpoint(config.checkpoint))
    with listen(config.host, config.port) as listening:  # before the slow loading of the model
        device = start_processes(config.device).device
        pipeline = load_for_sampling(
            config.to_sample_config(), device, config.checkpoint, config.weights
        )
        local = config.host in LOOPBACK
        server = Server(ImageService(pipeline, config), LOOPBACK_HOSTS if local else ["*"])
        name = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{name}:{listening.getsockname()[1]}/"
        print(f"{url} samples from {config.checkpoint}; stop with Ctrl-C", flush=True)
        if not local:
            print("Everyone who can reach this address can use it; see docs/web.md", flush=True)
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: the address does not belong to this machine, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; give another host or port"
        ) from None
