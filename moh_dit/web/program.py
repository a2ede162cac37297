"""The demo program: a trained model in, a page in the browser out.

moh-dit-demo runs/digits --guidance_scale 2
"""

import socket
from dataclasses import replace

from ..common.errors import UserError
from .config import DemoConfig

THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
NAMES_OF_THIS_MACHINE = ["127.0.0.1", "localhost", "[::1]"]  # as in a Host header


def serve(config: DemoConfig) -> None:
    """Load the model and answer until interrupted."""
    config.check()
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the page needs {error.name}, which is not installed: pip install 'moh-dit[web]'"
        ) from None
    from ..sampling.program import place, resolved, start_processes
    from .app import Server
    from .service import ImageService

    config = replace(config, checkpoint=resolved(config.checkpoint))
    with listen(config.host, config.port) as listening:  # before the model is loaded
        device = start_processes(config.device).device
        pipeline = place(config.sampling(), device, config.checkpoint, config.weights)
        local = config.host in THIS_MACHINE
        server = Server(ImageService(pipeline, config), NAMES_OF_THIS_MACHINE if local else ["*"])
        name = f"[{config.host}]" if ":" in config.host else config.host
        print(f"http://{name}:{listening.getsockname()[1]}/ shows {config.checkpoint}", flush=True)
        if not local:
            print("Everyone who can reach this address can use it; see docs/web.md", flush=True)
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: when the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; give another host or port"
        ) from None
