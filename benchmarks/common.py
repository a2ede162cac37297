"""Shared by the benchmarks: random inputs, timing, tables and JSON files."""

import collections
import contextlib
import datetime
import functools
import itertools
import json
import statistics

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel


def environment():
    return dict(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.date.today().isoformat(),
    )


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def make_projected(batch, tokens, heads, shared, active, width, dtype, routing="random"):
    """Return random q, k, v and router logits in one tensor, as the layer's projection does.

    ``routing`` is "random"; "skewed", where some heads are selected far more often than others;
    "extreme", where in image 0 every token selects the first routed head and none the last; or
    "cold", where all attention scores are far below zero.
    """
    columns = 3 * heads * width
    total = columns + heads + (2 if shared and active else 0)
    projected = torch.randn(batch, tokens, total + -total % 64, device="cuda")
    if active and routing == "skewed":
        projected[..., columns + shared : columns + heads] += torch.linspace(
            3, -3, heads - shared, device="cuda"
        )
    if active and routing == "extreme":
        projected[0, :, columns + shared] = 20
        projected[0, :, columns + heads - 1] = -20
    if routing == "cold":
        projected[..., : heads * width] += 1.5
        projected[..., heads * width : 2 * heads * width] -= 1.5
    return projected.to(dtype)


@functools.cache
def dense_backends():
    """Return the dense attention backends of torch that run here, fastest first (bf16, d = 72)."""
    q = torch.randn(16, 16, 1024, 72, device="cuda", dtype=torch.bfloat16)
    times = {}
    for backend in (
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    ):  # fmt: skip
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            times[backend] = time_graph(lambda: F.scaled_dot_product_attention(q, q, q))
    print("dense attention, ms:", {b.name.lower(): round(ms, 4) for b, ms in times.items()})
    return sorted(times, key=times.__getitem__)


def fastest_dense():
    """Return a context in which dense attention uses the fastest backend that takes the inputs."""
    return sdpa_kernel([*dense_backends()[:1], SDPBackend.MATH], set_priority=True)


def time_graph(call):
    """Return the median milliseconds of one ``call``, from replays of a CUDA graph."""
    return time_replays([Captured(call)], turns=1, seconds=0.04)[0]


def time_events(call):
    """Return the GPU milliseconds of one ``call``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Captured:
    """A CUDA graph of about 4 ms of calls, at most 50.

    A graph excludes the overhead of Python and of launches. Inputs should exceed the L2 cache.
    """

    def __init__(self, call):
        self.call, self.graph, self.stream = call, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                call()
            once = statistics.fmean(time_events(call) for _ in range(3))
            self.calls = max(1, min(50, int(4 / max(once, 1e-3))))
            with torch.cuda.graph(self.graph, stream=self.stream):
                for _ in range(self.calls):
                    call()
            self.graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)

    def milliseconds(self):
        """Replay the graph once and return the milliseconds per call."""
        with torch.cuda.stream(self.stream):
            return time_events(self.graph.replay) / self.calls


def time_replays(captured, turns=4, seconds=0.6):
    """Return the median milliseconds of each graph, measured in turns.

    Turns spread changes of temperature and host load over all graphs. A turn is long enough for the
    clocks to settle; its first third is not counted.
    """
    times = [[] for _ in captured]
    for _ in range(turns):
        for each, own in zip(captured, times, strict=True):
            count = max(6, int(1000 * seconds / each.milliseconds() / each.calls))
            own += [each.milliseconds() for _ in range(count)][count // 3 :]
    return [statistics.median(own) for own in times]


def time_steps(call, seconds=2.0, warmup=3, minimum=5):
    """Return the median milliseconds of ``call``, run back to back and timed with events."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    count = max(minimum, min(200, int(1000 * seconds / time_events(call))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


KINDS = {  # part of a kernel's name: its kind in the profile; the first match counts
    "attend": "attention", "sdpa": "attention", "flash": "attention", "_gradient": "attention",
    "route": "routing", "list_tokens": "routing",
    "gemm": "matrix products", "nvjet": "matrix products", "cutlass": "matrix products",
    "xmma": "matrix products", "Memcpy": "copies", "Memset": "copies",
    "adam": "optimizer, averages", "Adam": "optimizer, averages", "lerp": "optimizer, averages",
    "triton_red": "fused, with sums along rows or columns", "triton_per": "fused, with sums along "
    "rows or columns", "triton_poi": "fused, elementwise",
}  # fmt: skip


def kernel_times(call, steps=3, shown=15):
    """Print the GPU time of ``call`` by kind of kernel, and the longest kernels."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    kinds = collections.Counter()
    for event in events:
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "other")
        kinds[kind] += event.self_device_time_total / 1000 / steps
    total = sum(kinds.values())
    rows = [dict(kind=kind, ms=ms, share=ms / total) for kind, ms in kinds.most_common()]
    table([*rows, dict(kind="all", ms=total, share=1.0)], ["kind", "ms", "share"])
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:shown]
    rows = [
        dict(kernel=event.key[:90], calls=event.count // steps,
             ms=event.self_device_time_total / 1000 / steps)
        for event in longest
    ]  # fmt: skip
    table(rows, list(rows[0]))


def table(rows, columns):
    """Print columns of some rows as a table."""

    def show(value):
        if isinstance(value, float):
            return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"
        return str(value)

    cells = [columns] + [[show(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def draw_curves(path, rows, columns):
    """Draw images/s over the batch size, a line for each combination of other columns.

    A second panel shows each line over the line of the same settings with the first model.

    Args:
        path: file to write; ``None`` for none.
        rows: results with "model", "batch" and "images_per_s".
        columns: other columns that tell lines apart. Those with a single value are not named.
    """
    if not path:
        return
    from matplotlib import pyplot

    columns = [name for name in columns if len({row[name] for row in rows}) > 1]
    lines = collections.defaultdict(dict)
    for row in rows:
        line = row["model"], *(row[name] for name in columns)
        lines[line].setdefault(row["batch"], []).append(row["images_per_s"])
    figure, (speed, ratio) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (model, *others), points in lines.items():
        means = {batch: statistics.fmean(values) for batch, values in sorted(points.items())}
        label = ", ".join(map(str, (model, *others)))
        speed.plot(means.keys(), means.values(), marker="o", label=label)
        base = lines[rows[0]["model"], *others]
        over = {b: v / statistics.fmean(base[b]) for b, v in means.items() if b in base}
        ratio.plot(over.keys(), over.values(), marker="o")
    speed.set(xscale="log", ylabel="images/s")
    speed.set_ylim(bottom=0)
    ratio.set(xscale="log", ylabel=f"over {rows[0]['model']}")
    batches = sorted({row["batch"] for row in rows})
    for axes in (speed, ratio):
        axes.set_xlabel("images per step")
        axes.set_xticks(batches, batches, minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_json(path, rows):
    if path:
        with open(path, "w") as file:
            json.dump(dict(environment=environment(), rows=rows), file, indent=1)
