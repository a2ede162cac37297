"""Emulate CUDA graphs on the CPU, for tests without a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moh_dit.pipeline import forward_graphs


class Recorder(TorchDispatchMode):
    """Records the operations inside the block, with their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        outputs = operator(*arguments, **(options or {}))
        self.operations.append((operator, arguments, options or {}, outputs))
        return outputs

    def replay(self):
        """Repeat the operations and write their results to where the recorded ones are."""
        for operator, arguments, options, outputs in self.operations:
            read = {each.untyped_storage().data_ptr() for each in tensors((arguments, options))}
            for new, old in zip(
                tensors(operator(*arguments, **options)), tensors(outputs), strict=True
            ):
                if old.untyped_storage().data_ptr() not in read:  # otherwise a view, or in place
                    old.copy_(new)


def tensors(values):
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


class FakeCapture:
    """Records the operations of a function; a replay repeats them on the same tensors.

    Like a CUDA graph, a replay runs no Python code of the function, and reads weights where they
    were at the time of the capture.

    Attributes:
        captures: number of captures so far.
        replays: number of replays so far.
    """

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, function, pool):
        self.captures += 1
        with Recorder() as recorder:
            function()

        def replay():
            self.replays += 1
            recorder.replay()

        return replay


@pytest.fixture
def fake_capture(monkeypatch):
    """Let pipelines capture on the CPU; return the :class:`FakeCapture` that they use."""
    capture = FakeCapture()
    monkeypatch.setattr(forward_graphs, "device_obstacle", lambda device: None)
    monkeypatch.setattr(forward_graphs.ForwardGraphs.__init__, "__defaults__", ("auto", capture))
    return capture
