"""Time the phases from the command to the end of the first training step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import psutil


class StartUp:
    """The seconds that each phase of the start-up takes.

    Only one phase is measured at a time, so that the phases add up to the whole start-up. The
    first phase, ``imports``, begins when the operating system starts this process.

    Attributes:
        seconds: wall-clock seconds by phase, in the order in which the phases end first.
        first_step_done: whether the first step has ended. Nothing is measured afterwards.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first_step_done = False
        self._phase = "imports"
        self._since = psutil.Process().create_time()

    def begin(self, phase: str) -> str:
        """Begin a phase, or continue an earlier one, and return the phase that ends."""
        now, previous = time.time(), self._phase
        self.seconds[previous] = self.seconds.get(previous, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return previous

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase of its own, then continue the phase around it."""
        if self.first_step_done:
            yield
            return
        previous = self.begin(name)
        try:
            yield
        finally:
            self.begin(previous)

    @contextmanager
    def first_step(self, report: Callable[[str], object]) -> Iterator[None]:
        """Measure the first training step, and within it the compilation as ``compile``.

        The step ends when the GPU has finished. Blocks after the first one are not measured.

        Args:
            report: called with the line of all times.
        """
        if self.first_step_done:
            yield
            return
        import torch

        self.seconds["compile"] = 0.0  # listed before the first step, of which it is a part
        with self._compilation(), self.phase("first step"):
            yield
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        self.first_step_done = True
        report(str(self))

    @contextmanager
    def _compilation(self) -> Iterator[None]:
        """Measure ``compile`` while torch.compile or Triton compiles a graph or a kernel."""
        from torch._dynamo.callback import callback_handler

        previous: list[str] = []

        def start(_: object) -> None:
            previous.append(self.begin("compile"))

        def end(_: object) -> None:
            self.begin(previous.pop())

        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)
        compiler: Any = None
        if find_spec("triton"):
            from triton import knobs

            compiler = knobs.compilation
            listener, compiler.listener = compiler.listener, self._add_kernel
        try:
            yield
        finally:
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)
            if compiler is not None:
                compiler.listener = listener

    def _add_kernel(self, *, times: Any, **_: Any) -> None:
        """Count the compilation of a Triton kernel that is not part of a compiled graph."""
        if self._phase != "compile":
            before = self.begin("compile")
            self.begin(before)
            self.seconds["compile"] += times.total / 1e6
            self.seconds[before] -= times.total / 1e6

    def __str__(self) -> str:
        phases = [f"{name} {value:.1f}" for name, value in self.seconds.items() if value]
        return f"start-up {sum(self.seconds.values()):.1f} s: {', '.join(phases)}"
