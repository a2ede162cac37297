"""Which heads the tokens choose while images are made (MoH, figure 4), recorded through hooks.

    with HeadLoadRecorder(pipeline.transformer) as recorder:
        batches = generate(pipeline, labels, settings, on_step=recorder.on_step)
        images = np.concatenate([images for _, images in batches])
    load = recorder.result()
    load.share(load.layers[-1], "class")        # float64 (classes, E)

Hooks exist inside the ``with`` alone; a model that nobody looks into does nothing more. What a
head's kernel keeps to itself is computed again from the layer's input, by ``MoHAttention.route``.
"""

import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from ..common.errors import UserError
from ..model.attention import MoHAttention
from ..model.transformer import MoHDiTTransformer2DModel

HALVES = ("conditional", "null")
AXES = ("class", "half", "timestep")


@dataclass
class HeadLoad:
    """Counts behind the share of tokens that activate each routed head.

    Attributes:
        classes: class ids along axis 0.
        timestep_edges: float64 (T + 1,), bounds of the timestep ranges along axis 2.
        activated: for each routed layer int64 (classes, 2, T, E), tokens that activated each
            routed head; axis 1 is the half of guidance, as in ``HALVES``.
        tokens: for each routed layer int64 (classes, 2, T), tokens that chose.
        num_shared: shared heads s of these layers: routed head i is head s + i of its layer.
        num_active: routed heads k that a token activates in them.
    """

    classes: list[int]
    timestep_edges: np.ndarray
    activated: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]
    num_shared: dict[int, int]
    num_active: dict[int, int]

    @property
    def layers(self) -> list[int]:
        """Indices of the routed layers."""
        return list(self.activated)

    def even(self, layer: int) -> float:
        """The share of every head at even routing, k / E."""
        return self.num_active[layer] / self.activated[layer].shape[-1]

    def share(self, layer: int, *by: str) -> np.ndarray:
        """Share of tokens that activate each routed head, 0 … 1; they sum to k.

        Args:
            layer: index of a routed layer.
            by: what to keep apart, of ``AXES`` and in their order; all else is pooled.

        Returns:
            float64 (…, E), an axis for each of ``by``; NaN where there were no tokens.
        """
        pooled = tuple(axis for axis, name in enumerate(AXES) if name not in by)
        tokens = self.tokens[layer].sum(pooled)[..., None]
        with np.errstate(invalid="ignore"):
            return self.activated[layer].sum(pooled) / tokens

    def to_dict(self, class_names: list[str]) -> dict[str, Any]:
        """All of it for JSON, with ``class_names`` of the classes; null where no tokens were."""
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
                    "share": _rounded(self.share(layer)),
                    "share_by_class_half": _rounded(self.share(layer, "class", "half")),
                    "share_by_class_half_timestep": _rounded(self.share(layer, *AXES)),
                    "tokens_by_class_half_timestep": self.tokens[layer].tolist(),
                }
                for layer in self.layers
            },
        }


@dataclass
class HeadMap:
    """What the patches of one image chose at one step.

    Attributes:
        timestep: of the process, as the model is told it.
        latents: (C, h, w), the state after the step.
        heads: for each routed layer uint8 (N,), the routed head of greatest gate of each token,
            row by row, with the class (not the null half).
    """

    timestep: float
    latents: Tensor
    heads: dict[int, np.ndarray]


@dataclass
class _Evaluation:
    """What the hooks saw of one forward pass; ``gates`` (rows, N, E) of each layer."""

    timestep: Tensor
    class_labels: Tensor
    gates: dict[int, Tensor]


class HeadLoadRecorder:
    """Counts, for the images made inside its ``with``, which routed heads their tokens activate.

    A head counts as activated where its gate is not zero. Steps may run on several threads, as
    they do on the CPU. Compiled models run uncompiled inside the ``with``.

    Args:
        model: the model to look into; left as it is afterwards.
        timestep_ranges: equal parts T of the process to keep apart.
        num_train_timesteps: length of the process.
        map_images: images to keep :class:`HeadMap` of, by position (see ``generate``) ...
        map_steps: ... after these steps of sampling.

    Raises:
        UserError: when no layer of the model routes.
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
                "the model has no routed heads: every token uses all heads of every layer, so "
                "there is no head load to look at; give a MoH-DiT with "
                "num_active_routed_heads above 0"
            )
        self.model = model
        self.timestep_ranges, self.num_train_timesteps = timestep_ranges, num_train_timesteps
        self.map_images, self.map_steps = frozenset(map_images), frozenset(map_steps)
        self.maps: dict[tuple[int, int], HeadMap] = {}
        """By (position of the image, step)."""
        cells = (model.config.num_classes * len(HALVES) * timestep_ranges,)
        new, device = torch.zeros, model.device
        self._tokens = {i: new(cells, dtype=torch.int64, device=device) for i in self._layers}
        self._activated = {
            i: new((*cells, _routed(layer)), dtype=torch.int64, device=device)
            for i, layer in self._layers.items()
        }
        self._seen = threading.local()
        self._lock = threading.Lock()
        self._attached = ExitStack()

    @property
    def _layers(self) -> dict[int, MoHAttention]:
        return self.model.routed_layers

    def __enter__(self) -> "HeadLoadRecorder":
        with ExitStack() as attached:
            # Compiled code would not see the hooks.
            attached.enter_context(torch.compiler.set_stance("force_eager"))
            hook = self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            attached.callback(hook.remove)
            for index, layer in self._layers.items():
                hook = layer.register_forward_pre_hook(self._before_layer(index))
                attached.callback(hook.remove)
            self._attached = attached.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._attached.close()

    def _before_model(self, model: Any, args: tuple, kwargs: dict) -> None:
        given = signature(type(model).forward).bind(model, *args, **kwargs).arguments
        self._seen.evaluation = _Evaluation(given["timestep"], given["class_labels"], {})

    def _before_layer(self, index: int) -> Any:
        @torch.no_grad()
        def hook(layer: MoHAttention, args: tuple) -> None:
            gates, _ = layer.route(args[0])
            assert gates is not None  # the layers that route have a router
            self._seen.evaluation.gates[index] = gates[..., layer.num_shared_heads or 0 :]

        return hook

    def on_step(self, positions: np.ndarray, step: int, latents: Tensor) -> None:
        """Count the evaluation of the model that this thread has just made; for ``generate``.

        Args:
            positions: int64 (B,), which image each row is; -1 for one that only fills a batch.
            step: number of the evaluation on the way to these images.
            latents: (B, C, h, w), their state after it.
        """
        seen: _Evaluation = self._seen.evaluation
        device, rows = latents.device, len(seen.class_labels)
        halves = rows // len(positions)  # guided: with the class, then without
        labels = seen.class_labels[: len(positions)].repeat(halves)
        half = torch.arange(halves, device=device).repeat_interleave(len(positions))
        part = seen.timestep.expand(rows) * self.timestep_ranges / self.num_train_timesteps
        part = part.long().clamp(0, self.timestep_ranges - 1)
        cell = (labels * len(HALVES) + half) * self.timestep_ranges + part
        real = torch.from_numpy(positions >= 0).to(device).repeat(halves).long()
        with self._lock:
            for index, gates in seen.gates.items():
                activated = (gates > 0).sum(1) * real[:, None]
                self._activated[index].index_add_(0, cell, activated)
                self._tokens[index].index_add_(0, cell, real * gates.shape[1])
        if step in self.map_steps:
            for row, position in enumerate(positions.tolist()):
                if position in self.map_images:
                    self.maps[position, step] = HeadMap(
                        float(seen.timestep.expand(rows)[row]),
                        latents[row].cpu(),
                        {i: _best(gates[row]) for i, gates in seen.gates.items()},
                    )

    def result(self) -> HeadLoad:
        """What was counted so far, summed over all processes; called by every one of them."""
        shape = (self.model.config.num_classes, len(HALVES), self.timestep_ranges)
        tokens = {i: _over_processes(count).reshape(shape) for i, count in self._tokens.items()}
        activated = {
            i: _over_processes(count).reshape(*shape, -1) for i, count in self._activated.items()
        }
        seen = sum(count.sum((1, 2)) for count in tokens.values())
        (classes,) = np.nonzero(seen)
        return HeadLoad(
            classes.tolist(),
            np.linspace(0, self.num_train_timesteps, self.timestep_ranges + 1),
            {index: counts[classes] for index, counts in activated.items()},
            {index: counts[classes] for index, counts in tokens.items()},
            {index: layer.num_shared_heads or 0 for index, layer in self._layers.items()},
            {index: layer.num_active_routed_heads for index, layer in self._layers.items()},
        )


def _routed(layer: MoHAttention) -> int:
    return layer.num_heads - (layer.num_shared_heads or 0)


def _over_processes(counts: Tensor) -> np.ndarray:
    return reduce(counts, "sum").cpu().numpy()


def _best(gates: Tensor) -> np.ndarray:
    return gates.argmax(-1).to(torch.uint8).cpu().numpy()


def _rounded(shares: np.ndarray) -> Any:
    """Nested lists of six decimals, ``None`` for NaN."""
    if shares.ndim:
        return [_rounded(part) for part in shares]
    return None if np.isnan(shares) else round(float(shares), 6)
