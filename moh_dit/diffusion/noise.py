"""Noise that depends on (seed, image index, draw) alone, made for a whole batch at once.

A counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), in plain tensor operations: the same numbers for an image in any batch, on any
device, in any process, and no loop over per-image generators. On a GPU a kernel makes them.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
DRAWS_AHEAD = 64
# Values made at once: what stays in a CPU's cache, and what keeps a GPU without the kernel busy for
# longer than it takes to launch a hundred small ones.
VALUES_AHEAD = {"cpu": 1 << 18, "cuda": 1 << 23}


def philox(counter: Sequence[Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit counter words (broadcast) and a 64-bit key.

    Returns four int64 tensors of 32-bit random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        # The 64-bit products wrap around in int64; their bits are those of the unsigned ones.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (right >> 32 & WORD) ^ c1 ^ k0, right & WORD
        c2, c3 = (left >> 32 & WORD) ^ c3 ^ k1, left & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def philox_normal(seed: int, indices: Tensor, first_draw: int, draws: int, count: int) -> Tensor:
    """Standard normal values, float64 (draws, B, count), on the device of ``indices``.

    Args:
        seed: 64 bits of key.
        indices: int64 (B,), the image each row belongs to.
        first_draw: number of the first draw of each image.
        draws: how many consecutive draws.
        count: values per draw.
    """
    device = indices.device
    if device.type == "cuda" and find_spec("triton"):
        from ..kernels.triton_noise import philox_normal_triton  # Triton is imported where it runs

        return philox_normal_triton(seed, indices, first_draw, draws, count)
    block = torch.arange(-(-count // 4), device=device)
    draw = torch.arange(first_draw, first_draw + draws, device=device).view(-1, 1, 1)
    image = indices.view(-1, 1)
    words = philox((block, draw, image & WORD, image >> 32 & WORD), seed)
    # Box-Muller in float64: rounded to float32 it no longer shows which device computed it.
    values = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = ((radius_word.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = angle_word.double() * (2 * math.pi * 2.0**-32)
        values += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(values, dim=-1).flatten(-2)[..., :count]


class ImageNoise(TorchFunctionMode):
    """Per-image noise for a batch: ``draw`` gives the next draw of every image.

    As a context manager it also answers every ``torch.randn`` inside, which is where diffusers'
    schedulers take their noise from, so that any of them is stochastic per image.

    Args:
        seed: chooses the noise of all images.
        indices: the image each row of the batch is, B integers in ``0 … 2^63 - 1``.
        device: where the noise is used; made there, or on the CPU where float64 is missing.
    """

    def __init__(self, seed: int, indices: Sequence[int] | Tensor, device: torch.device | str):
        super().__init__()
        self.seed, self.device = seed, torch.device(device)
        made_on = "cpu" if self.device.type == "mps" else self.device
        self.indices = torch.as_tensor(indices, dtype=torch.int64, device=made_on)
        self.next_draw = 0
        self.ahead: list[Tensor] = []  # draws made but not taken, the next one last

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The next draw, (B, …) as ``shape`` says, standard normal."""
        if len(shape) < 2 or shape[0] != len(self.indices):
            raise ValueError(f"noise of shape {tuple(shape)} for {len(self.indices)} images")
        count = math.prod(shape[1:])
        if not self.ahead or self.ahead[-1].shape[1:] != (count,):
            # The first draw is often the only one; later ones come in blocks, so that a small
            # model does not wait for many small operations at every step.
            values = VALUES_AHEAD.get(self.indices.device.type, VALUES_AHEAD["cpu"])
            draws = max(1, min(DRAWS_AHEAD, values // (len(self.indices) * count)))
            draws = draws if self.next_draw else 1
            made = philox_normal(self.seed, self.indices, self.next_draw, draws, count)
            self.ahead = list(made.to(dtype).to(self.device).unbind())[::-1]
        self.next_draw += 1
        return self.ahead.pop().to(dtype).view(tuple(shape))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        return self.draw(shape, kwargs.get("dtype") or torch.get_default_dtype())


class BlendedNoise(ImageNoise):
    """Noise between two images' for each row: cos(πf/2) of the one and sin(πf/2) of the other.

    Both being independent and standard normal, so is every blend: each is as likely an image as
    its two ends.

    Args:
        seed, indices, device: as for :class:`ImageNoise`; the noise at fraction 0.
        others: B integers, the images whose noise is met at fraction 1.
        fractions: B numbers in 0 … 1.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int] | Tensor,
        device: torch.device | str,
        others: Sequence[int] | Tensor,
        fractions: Sequence[float] | Tensor,
    ):
        super().__init__(seed, indices, device)
        self.other = ImageNoise(seed, others, device)
        angle = torch.as_tensor(fractions, dtype=torch.float64) * (math.pi / 2)
        # cos(π/2) is not quite 0 in floating point; the ends shall be the images themselves.
        self.weights = (angle.cos().round(decimals=15), angle.sin().round(decimals=15))

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        ends = super().draw(shape, dtype), self.other.draw(shape, dtype)
        near, far = (
            weight.to(self.device, dtype).view(-1, *[1] * (len(shape) - 1))
            for weight in self.weights
        )
        return near * ends[0] + far * ends[1]
