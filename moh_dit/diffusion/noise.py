"""Draw noise that depends only on (seed, image index, draw), for a whole batch at once.

The generator is counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). An image gets the same numbers in any batch, on any device and in any process,
without a loop over per-image generators. On a CPU it uses plain tensor operations, on a GPU a
Triton kernel.
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
# Values drawn at once. On a CPU they fit in the cache. On a GPU without Triton, computing them
# takes longer than launching the hundred small kernels that do it.
VALUES_AHEAD = {"cpu": 1 << 18, "cuda": 1 << 23}


def philox(counter: Sequence[Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words, which broadcast.
        key: 64 bits.

    Returns:
        Four int64 tensors of 32-bit random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        # The products wrap around in int64, but their bits equal those of unsigned products.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (right >> 32 & WORD) ^ c1 ^ k0, right & WORD
        c2, c3 = (left >> 32 & WORD) ^ c3 ^ k1, left & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def philox_normal(seed: int, indices: Tensor, first_draw: int, draws: int, count: int) -> Tensor:
    """Return standard normal values, float64 (draws, B, count), on the device of ``indices``.

    Args:
        seed: key, 64 bits.
        indices: int64 (B,), the image index of each row.
        first_draw: number of the first draw.
        draws: number of consecutive draws.
        count: number of values per draw.
    """
    device = indices.device
    if device.type == "cuda" and find_spec("triton"):
        from ..kernels.triton_noise import philox_normal_triton  # imports triton, which is optional

        return philox_normal_triton(seed, indices, first_draw, draws, count)
    block = torch.arange(-(-count // 4), device=device)
    draw = torch.arange(first_draw, first_draw + draws, device=device).view(-1, 1, 1)
    image = indices.view(-1, 1)
    words = philox((block, draw, image & WORD, image >> 32 & WORD), seed)
    # Box-Muller transform in float64, so that values rounded to float32 are equal on all devices.
    values = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = ((radius_word.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = angle_word.double() * (2 * math.pi * 2.0**-32)
        values += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(values, dim=-1).flatten(-2)[..., :count]


class ImageNoise(TorchFunctionMode):
    """Source of per-image noise for a batch; ``draw`` returns the next draw of every image.

    Used as a context manager, it also replaces every ``torch.randn`` inside. diffusers' schedulers
    take their noise from there, so any stochastic scheduler becomes reproducible per image.

    Args:
        seed: seed of the noise of all images.
        indices: image index of each row of the batch, B integers in ``0 … 2^63 - 1``.
        device: device of the returned noise. On devices without float64 it is computed on the CPU.
    """

    def __init__(self, seed: int, indices: Sequence[int] | Tensor, device: torch.device | str):
        super().__init__()
        self.seed, self.device = seed, torch.device(device)
        computed_on = "cpu" if self.device.type == "mps" else self.device
        self.indices = torch.as_tensor(indices, dtype=torch.int64, device=computed_on)
        self.next_draw = 0
        self.ahead: list[Tensor] = []  # draws computed in advance, the next one last

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the next draw of standard normal noise, of shape ``shape`` = (B, …).

        Raises:
            ValueError: if the first dimension of ``shape`` is not the number of images.
        """
        if len(shape) < 2 or shape[0] != len(self.indices):
            raise ValueError(
                f"noise of shape {tuple(shape)} was requested; this source draws for "
                f"{len(self.indices)} images, which must be the first of at least two dimensions"
            )
        count = math.prod(shape[1:])
        if not self.ahead or self.ahead[-1].shape[1:] != (count,):
            # The first draw is often the only one, so it is computed alone. Later draws are
            # computed in blocks: a small model then waits less often for many small operations.
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
    """Source of noise that blends the noise of two images in each row.

    At fraction f, a row is cos(πf/2) times the noise of one image plus sin(πf/2) times the noise of
    the other. Both are independent and standard normal, so every blend is standard normal, too.

    Args:
        seed, device: as for :class:`ImageNoise`.
        indices: B integers, the images whose noise is returned at fraction 0.
        others: B integers, the images whose noise is returned at fraction 1.
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
        # Rounding makes cos(π/2) exactly 0, so both ends are exactly the noise of one image.
        self.weights = (angle.cos().round(decimals=15), angle.sin().round(decimals=15))

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        ends = super().draw(shape, dtype), self.other.draw(shape, dtype)
        near, far = (
            weight.to(self.device, dtype).view(-1, *[1] * (len(shape) - 1))
            for weight in self.weights
        )
        return near * ends[0] + far * ends[1]
