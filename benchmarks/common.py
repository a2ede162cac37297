"""What the benchmark scripts share: timing by graph replay, environment records, tables, JSON."""

import datetime
import json
import statistics

import torch
import triton


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def time_graph(call, target_ms=4.0, repeats=7):
    """Median milliseconds of one ``call``, from replays of a CUDA graph of several calls.

    A graph leaves out Python and launch overhead on every side alike; inputs should exceed the L2
    cache. Replays of at least ``target_ms`` are timed with events.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            call()
        end.record()
        end.synchronize()
        once = start.elapsed_time(end) / 3
        inner = max(1, min(50, int(target_ms / max(once, 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(inner):
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / inner)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times)


def environment():
    return dict(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.date.today().isoformat(),
    )


def write_json(path, rows, **extra):
    if path:
        with open(path, "w") as file:
            json.dump(dict(environment=environment(), **extra, rows=rows), file, indent=1)
