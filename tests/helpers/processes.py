"""Run a function in several processes that form one gloo process group."""

import os
import socket

import torch
import torch.multiprocessing as multiprocessing

# Fork from a server process that has imported the trainer but computed nothing. Importing takes
# seconds, and a process that has used OpenMP cannot be forked safely.
multiprocessing.set_forkserver_preload(["moh_dit.training.trainer"])


def launch(function, *arguments, num_processes):
    """Call ``function(*arguments)`` in each process; the function must be importable by name."""
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
