"""Run a function in several processes that form one gloo group, as a launcher would."""

import os
import socket

import torch
import torch.multiprocessing as multiprocessing

# Forked from a server that has imported all this and done nothing yet: importing takes seconds, and
# a process that has computed cannot be forked safely (OpenMP).
multiprocessing.set_forkserver_preload(["moh_dit.training.trainer"])


def launch(function, *arguments, num_processes):
    """Call ``function(*arguments)``, importable by name, in each of ``num_processes`` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        _child, (function, arguments, num_processes, port), num_processes, start_method="forkserver"
    )


def _child(rank, function, arguments, num_processes, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    function(*arguments)
