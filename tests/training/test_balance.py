"""The balance loss of a batch does not depend on the number of processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.processes import launch
from helpers.reference_arrays import relative_error

from moh_dit.model.attention import load_balance_loss
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.training.balance import BalanceLoss

BATCH = 8
ACTIVE = [2, 1]


def make_model():
    torch.manual_seed(0)
    model = MoHDiTTransformer2DModel(
        sample_size=8, hidden_size=48, depth=2, num_heads=6, num_shared_heads=[2, 0],
        num_active_routed_heads=ACTIVE, num_classes=4,
    )  # fmt: skip
    for parameter in model.parameters():  # at the adaLN-Zero initialisation most gradients vanish
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, 4, 8, 8, generator=generator)
    return latents, torch.arange(BATCH) * 100, torch.arange(BATCH) % 4


def gradient(folder, num_micro_batches=1, published=False, two_pass=False):
    """Write this rank's gradient of MSE + balance loss."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make_model())
    balance = BalanceLoss(accelerator, ACTIVE, published=published)
    parts = [x.chunk(num_micro_batches) for x in batch()]
    micro_batches = [
        [x[part].chunk(accelerator.num_processes)[accelerator.process_index] for x in parts]
        for part in range(num_micro_batches)
    ]
    observed = [model(*inputs).router_stats for inputs in micro_batches] if two_pass else []
    balance.start_step(observed)
    for inputs in micro_batches:
        output = model(*inputs)
        loss = output.sample.square().mean() + balance(output.router_stats)
        accelerator.backward(loss / num_micro_batches)
    grads = {n.removeprefix("module."): p.grad.numpy() for n, p in model.named_parameters()
             if p.grad is not None}  # fmt: skip
    np.savez(folder / f"{accelerator.process_index}.npz", **grads)


def read(folder, process=0):
    with np.load(folder / f"{process}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(scope="module")
def expected_gradient():
    """Compute the gradient of the whole batch from the definition."""
    model = make_model()
    output = model(*batch())
    (output.sample.square().mean() + load_balance_loss(output.router_stats, ACTIVE)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_gradient_is_that_of_the_whole_batch(processes, expected_gradient, tmp_path):
    launch(gradient, tmp_path, num_processes=processes)
    for process in range(processes):
        found = read(tmp_path, process)
        assert found.keys() == expected_gradient.keys()
        for name, expected in expected_gradient.items():
            assert relative_error(found[name], expected) < 1e-6, name


def test_the_published_loss_depends_on_the_number_of_processes(expected_gradient, tmp_path):
    launch(gradient, tmp_path, 1, True, num_processes=2)
    router = "blocks.0.attn.wg.weight"
    assert relative_error(read(tmp_path)[router], expected_gradient[router]) > 1e-2


def test_two_passes_make_accumulation_exact(expected_gradient, tmp_path):
    """Without the first pass, early micro-batches use the load of few images."""
    routers = [f"blocks.{layer}.attn.wg.weight" for layer in range(2)]
    distances = {}
    for two_pass in (False, True):
        gradient(tmp_path, num_micro_batches=4, two_pass=two_pass)
        found = read(tmp_path)
        distances[two_pass] = [
            relative_error(found[name], expected_gradient[name]) for name in routers
        ]
    assert max(distances[True]) < 1e-6
    assert min(distances[False]) > 1e-4
