"""Record through hooks which heads the tokens activate during sampling (MoH, figure 4).

    with HeadLoadRecorder(pipeline.transformer) as recorder:
        batches = generate(pipeline, labels, settings, on_step=recorder.on_step)
        images = np.concatenate([images for _, images in batches])
    load = recorder.result()
    load.share(load.layers[-1], "class")        # float64 (classes, E)

Hooks exist only inside the ``with`` block, so other forward passes have no overhead. The attention
kernels do not return the gates, so ``MoHAttention.route`` recomputes them from the layer's input.
"""

import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from ..common.errors import UserError
from ..model.attention import MoHAttention
from ..model.transformer import MoHDiTTransformer2DModel

HALVES = ("conditional", "null")
AXES = ("class", "half", "timestep")


@dataclass
class HeadLoad:
    """Numbers of tokens that activated each routed head, by layer.

    Axis 0 of the arrays is the class. Axis 1 is the half of guidance: ``HALVES``. Axis 2 is the
    timestep range.

    Attributes:
        classes: class ids along axis 0.
        timestep_edges: float64 (T + 1,), bounds of the timestep ranges along axis 2.
        activated: for each routed layer int64 (classes, 2, T, E), tokens that activated each head.
        tokens: for each routed layer int64 (classes, 2, T), all tokens.
        num_shared: for each routed layer the number s of shared heads. Routed head i is head s + i.
        num_active: for each routed layer the number k of routed heads that a token activates.
    """

    classes: list[int]
    timestep_edges: np.ndarray
    activated: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]
    num_shared: dict[int, int]
    num_active: dict[int, int]

    @property
    def layers(self) -> list[int]:
        """Return the indices of the routed layers."""
        return list(self.activated)

    def balanced_share(self, layer: int) -> float:
        """Return the share of each head at balanced routing, k / E."""
        return self.num_active[layer] / self.activated[layer].shape[-1]

    def share(self, layer: int, *by: str) -> np.ndarray:
        """Return the share (0 … 1) of tokens that activate each routed head; the shares sum to k.

        Args:
            layer: index of a routed layer.
            by: axes to keep, from ``AXES`` and in their order. The other axes are summed.

        Returns:
            float64 (…, E) with one axis for each of ``by``; NaN for cells without tokens.
        """
        pooled = tuple(axis for axis, name in enumerate(AXES) if name not in by)
        tokens = self.tokens[layer].sum(pooled)[..., None]
        with np.errstate(invalid="ignore"):
            return self.activated[layer].sum(pooled) / tokens

    def to_dict(self, class_names: list[str]) -> dict[str, Any]:
        """Return all shares and token counts for JSON; shares of cells without tokens are None."""
        ranges = np.stack([self.timestep_edges[:-1], self.timestep_edges[1:]], axis=-1)
        named = zip(self.classes, class_names, strict=True)
        return {
            "classes": [{"id": label, "name": name} for label, name in named],
            "halves": list(HALVES),
            "timestep_ranges": ranges.tolist(),
            "layers": {
                str(layer): {
                    "shared_heads": self.num_shared[layer],
                    "routed_heads": self.activated[layer].shape[-1],
                    "active_routed_heads": self.num_active[layer],
                    "share": _rounded(self.share(layer)).tolist(),
                    "share_by_class_half": _rounded(self.share(layer, "class", "half")).tolist(),
                    "share_by_class_half_timestep": _rounded(self.share(layer, *AXES)).tolist(),
                    "tokens_by_class_half_timestep": self.tokens[layer].tolist(),
                }
                for layer in self.layers
            },
        }


@dataclass
class HeadMap:
    """The routed head of each patch of one image at one step.

    Attributes:
        timestep: timestep that the model was given.
        latents: (C, h, w), latents after the step.
        heads: for each routed layer uint8 (N,), the routed head with the greatest gate of each
            token, in raster order, from the evaluation with the class.
    """

    timestep: float
    latents: Tensor
    heads: dict[int, np.ndarray]


@dataclass
class _Evaluation:
    """Inputs and gates of one forward pass; ``gates`` (rows, N, E) by layer."""

    timestep: Tensor
    class_labels: Tensor
    gates: dict[int, Tensor]


class HeadLoadRecorder:
    """Counts which routed heads the tokens activate, for images sampled inside its ``with`` block.

    A head is activated where its gate is not zero. Sampling may run on several threads, as it does
    on the CPU. Compiled models run in eager mode inside the block.

    Args:
        model: the model to record; it is restored on exit.
        timestep_ranges: number T of equal timestep ranges to count separately.
        num_train_timesteps: number of training timesteps.
        map_images: positions (see ``generate``) of images to keep a :class:`HeadMap` of.
        map_steps: steps of sampling to keep a :class:`HeadMap` of.

    Raises:
        UserError: the model has no routed heads.
    """

    def __init__(
        self,
        model: MoHDiTTransformer2DModel,
        *,
        timestep_ranges: int = 10,
        num_train_timesteps: int = 1000,
        map_images: Collection[int] = (),
        map_steps: Collection[int] = (),
    ):
        if not model.routed_layers:
            raise UserError(
                "the model has no routed heads, so it has no head load; give a MoH-DiT with "
                "num_active_routed_heads above 0"
            )
        self.model, self._layers = model, model.routed_layers
        self.timestep_ranges, self.num_train_timesteps = timestep_ranges, num_train_timesteps
        self.map_images, self.map_steps = frozenset(map_images), frozenset(map_steps)
        self.maps: dict[tuple[int, int], HeadMap] = {}
        """Maps by (position of the image, step)."""
        cells = model.config.num_classes * len(HALVES) * timestep_ranges
        # For each layer (cells, E + 1): tokens that activated each routed head, then all tokens.
        self._counts = {
            i: torch.zeros(
                cells, _count_routed_heads(layer) + 1, dtype=torch.int64, device=model.device
            )
            for i, layer in self._layers.items()
        }
        self._seen = threading.local()
        self._lock = threading.Lock()
        self._attached = ExitStack()

    def __enter__(self) -> "HeadLoadRecorder":
        with ExitStack() as attached:
            # Compiled code does not run hooks that are registered after compilation.
            attached.enter_context(torch.compiler.set_stance("force_eager"))
            attached.enter_context(
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            )
            for index, layer in self._layers.items():
                before = partial(self._before_layer, index)
                attached.enter_context(layer.register_forward_pre_hook(before))
            self._attached = attached.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._attached.close()

    def _before_model(self, model: Any, args: tuple, kwargs: dict) -> None:
        given = signature(type(model).forward).bind(model, *args, **kwargs).arguments
        self._seen.evaluation = _Evaluation(given["timestep"], given["class_labels"], {})

    @torch.no_grad()
    def _before_layer(self, index: int, layer: MoHAttention, args: tuple) -> None:
        gates, _ = layer.route(args[0])
        assert gates is not None  # routed layers have a router
        self._seen.evaluation.gates[index] = gates[..., layer.num_shared_heads or 0 :]

    def on_step(self, positions: np.ndarray, step: int, latents: Tensor) -> None:
        """Count the last model evaluation of this thread. Pass this to ``generate``.

        Args:
            positions: int64 (B,), the image in each row, -1 for padding.
            step: number of the evaluation within the sampling of these images.
            latents: (B, C, h, w), latents after the step.
        """
        seen: _Evaluation = self._seen.evaluation
        device, rows = latents.device, len(seen.class_labels)
        halves = rows // len(positions)  # guided: rows with the class, then rows without it
        labels = seen.class_labels[: len(positions)].repeat(halves)
        half = torch.arange(halves, device=device).repeat_interleave(len(positions))
        part = seen.timestep.expand(rows) * self.timestep_ranges / self.num_train_timesteps
        part = part.long().clamp(0, self.timestep_ranges - 1)
        cell = (labels * len(HALVES) + half) * self.timestep_ranges + part
        real = torch.from_numpy(positions >= 0).to(device).repeat(halves).long()
        with self._lock:
            for index, gates in seen.gates.items():
                counts = F.pad((gates > 0).sum(1), (0, 1), value=gates.shape[1])
                self._counts[index].index_add_(0, cell, counts * real[:, None])
        if step in self.map_steps:
            for row, position in enumerate(positions.tolist()):
                if position in self.map_images:
                    heads = {
                        i: gates[row].argmax(-1).to(torch.uint8).cpu().numpy()
                        for i, gates in seen.gates.items()
                    }
                    timestep = float(seen.timestep.expand(rows)[row])
                    self.maps[position, step] = HeadMap(timestep, latents[row].cpu(), heads)

    def result(self) -> HeadLoad:
        """Return the counts so far, summed over all processes. Every process must call this."""
        shape = (self.model.config.num_classes, len(HALVES), self.timestep_ranges)
        counts = {
            i: reduce(count, "sum").cpu().numpy().reshape(*shape, -1)
            for i, count in self._counts.items()
        }
        (classes,) = np.nonzero(sum(count[..., -1].sum((1, 2)) for count in counts.values()))
        return HeadLoad(
            classes.tolist(),
            np.linspace(0, self.num_train_timesteps, self.timestep_ranges + 1),
            {index: count[classes, ..., :-1] for index, count in counts.items()},
            {index: count[classes, ..., -1] for index, count in counts.items()},
            {index: layer.num_shared_heads or 0 for index, layer in self._layers.items()},
            {index: layer.num_active_routed_heads for index, layer in self._layers.items()},
        )


def _count_routed_heads(layer: MoHAttention) -> int:
    return layer.num_heads - (layer.num_shared_heads or 0)


@partial(np.vectorize, otypes=[object])
def _rounded(share: float) -> float | None:
    """Round each share of an array to six decimals; ``None`` for NaN."""
    return None if np.isnan(share) else round(float(share), 6)
