# MoHDiTPipeline and MoHDiTTransformer2DModel of moh-dit 0.1.0, with all they need.
#
# For diffusers' trust_remote_code=True; written by moh-dit, Apache-2.0. Below are modules of that
# package as they are, every line behind a bar: diffusers takes what looks like an import at the
# start of a line for one of this file.

import importlib
import importlib.abc
import importlib.util
import pathlib
import sys

PACKAGE = "moh_dit_77fb5d46"
MODULES = {}
MODULES[PACKAGE + ''] = r'''
|"""MoH-DiT: Diffusion Transformers with Mixture-of-Head attention."""
|
|from importlib import import_module
|from typing import Any
|
|__version__ = "0.1.0"
|
|# Looked up on first use, so that `import moh_dit` and every --help stay quick.
|_EXPORTS = {
|    "MoHAttention": "attention",
|    "MoHDiTPipeline": "pipeline",
|    "MoHDiTTransformer2DModel": "transformer",
|    "MoHSettings": "continue_tuning",
|    "PRESETS": "presets",
|    "build_model": "presets",
|    "dense_to_moh": "continue_tuning",
|    "load_pipeline": "checkpoints",
|    "load_pretrained": "checkpoints",
|}
|__all__ = [
|    "PRESETS",
|    "MoHAttention",
|    "MoHDiTPipeline",
|    "MoHDiTTransformer2DModel",
|    "MoHSettings",
|    "build_model",
|    "dense_to_moh",
|    "load_pipeline",
|    "load_pretrained",
|]
|
|
|def __getattr__(name: str) -> Any:
|    if name not in _EXPORTS:
|        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
|    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
'''
MODULES[PACKAGE + '.attention'] = r'''
|"""Mixture-of-head attention: the mathematics, readable (MoH, arXiv 2410.11842, §3).
|
|``MoHAttention`` is the definition that every kernel is held against. Heads ``0 … s-1`` are shared
|(always active), the other ``E = h - s`` are routed; each token activates its top ``k`` of those.
|The layer stands alone, too: with masks, rotary embeddings, grouped keys and a cache it takes the
|place of attention in other transformers (``examples/``).
|"""
|
|from collections.abc import Callable, Iterator
|from contextlib import ExitStack, contextmanager
|
|import torch
|import torch.nn.functional as F
|from torch import Tensor, nn
|
|from .errors import UserError
|from .kernels import (
|    BACKENDS,
|    attend_gathered,
|    check_choice,
|    choose_backend,
|    moh_attention_triton,
|)
|from .projection import JointProjection
|from .routing import ROUTERS, check_head_plan, load_balance_loss, moh_gates, query_norm_gates
|
|__all__ = [
|    "MoHAttention",
|    "load_balance_loss",
|    "moh_attention",
|    "moh_gates",
|    "query_norm_gates",
|    "recorded_router_stats",
|]
|
|Pair = tuple[Tensor, Tensor]
|
|
|class MoHAttention(JointProjection):
|    """Multi-head self-attention in which every token chooses and weighs its heads.
|
|    Args:
|        dim: model width C.
|        num_heads: heads h of the layer.
|        num_shared_heads: shared heads s, ``0 ≤ s ≤ h``; ``None`` makes plain multi-head attention
|            without a router (dense DiT; ``num_active_routed_heads`` is then ignored).
|        num_active_routed_heads: routed heads k that each token activates, ``0 ≤ k ≤ h - s``.
|            ``k = 0`` needs ``s = h``: gated, but every head active.
|        head_dim: width d of a head; ``None`` means ``dim // num_heads``. ``h·d`` may differ from C.
|        qkv_bias: whether the query/key/value projection has a bias.
|        attention_backend: how a layer with a router computes, see :func:`moh_attention`; can be
|            changed later through the attribute of that name.
|        router: "learned" (MoH §3), or "query_norm" (§4.4): no parameters, see
|            :func:`query_norm_gates`; computed by "reference" or "gathered", on a GPU by the former.
|        num_key_value_heads: keys and values that the heads share in groups (arXiv 2305.13245), a
|            divisor of h; ``None`` means one for each head.
|        proj_bias: whether the output projection has a bias.
|
|    Raises:
|        UserError: when the head plan does not add up or the backend or router is unknown.
|
|    Parameter names are those of the published checkpoints: ``wg`` is W_routed (E, C), ``wg_0``
|    W_stage (2, C) and ``wg_1`` W_shared (s, C). ``qkv`` holds the rows of all queries, then keys,
|    then values. With grouped keys the buffer ``key_value_head`` (h,) says whose keys a head asks.
|    """
|
|    key_value_head: Tensor
|
|    def __init__(
|        self,
|        dim: int,
|        num_heads: int,
|        num_shared_heads: int | None = None,
|        num_active_routed_heads: int | None = None,
|        head_dim: int | None = None,
|        qkv_bias: bool = True,
|        attention_backend: str = "auto",
|        router: str = "learned",
|        num_key_value_heads: int | None = None,
|        proj_bias: bool = True,
|    ):
|        super().__init__()
|        check_head_plan(dim, num_heads, num_shared_heads, num_active_routed_heads, head_dim)
|        check_choice("attention_backend", attention_backend, BACKENDS)
|        check_choice("router", router, ROUTERS)
|        key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
|        if key_value_heads < 1 or num_heads % key_value_heads:
|            raise UserError(
|                f"num_key_value_heads is {key_value_heads}; it must divide num_heads {num_heads}"
|            )
|        self.attention_backend = attention_backend
|        self.router = router
|        self.num_heads = num_heads
|        self.num_key_value_heads = key_value_heads
|        self.head_dim = head_dim or dim // num_heads
|        self.num_shared_heads = num_shared_heads
|        self.num_active_routed_heads = num_active_routed_heads or 0
|
|        rows = (num_heads + 2 * key_value_heads) * self.head_dim
|        self.qkv = nn.Linear(dim, rows, bias=qkv_bias)
|        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)
|        if key_value_heads < num_heads:
|            groups = torch.arange(num_heads) // (num_heads // key_value_heads)
|            self.register_buffer("key_value_head", groups)
|        if num_shared_heads is not None and router == "learned":
|            if num_shared_heads < num_heads:
|                self.wg = nn.Linear(dim, num_heads - num_shared_heads, bias=False)
|                if num_shared_heads > 0:
|                    self.wg_0 = nn.Linear(dim, 2, bias=False)
|            if num_shared_heads > 0:
|                self.wg_1 = nn.Linear(dim, num_shared_heads, bias=False)
|
|    def extra_repr(self) -> str:
|        return (
|            f"num_heads={self.num_heads}, num_shared_heads={self.num_shared_heads}, "
|            f"num_active_routed_heads={self.num_active_routed_heads}, head_dim={self.head_dim}, "
|            f"num_key_value_heads={self.num_key_value_heads}, router={self.router!r}"
|        )
|
|    def route(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
|        """Gates (B, N, h) and router_stats (2, E) for inputs (B, N, C); ``None`` without router."""
|        if not (routers := self.router_weights()):
|            return self._gates(self.qkv(hidden_states))
|        logits = F.linear(hidden_states, torch.cat(routers))
|        return moh_gates(
|            logits, self.num_heads, self.num_shared_heads or 0, self.num_active_routed_heads
|        )
|
|    def forward(
|        self,
|        hidden_states: Tensor,
|        attention_mask: Tensor | None = None,
|        is_causal: bool = False,
|        rotary: Callable[[Tensor, Tensor], Pair] | None = None,
|        cache: Callable[[Tensor, Tensor], Pair] | None = None,
|    ) -> tuple[Tensor, Tensor | None]:
|        """Attend.
|
|        Args:
|            hidden_states: (B, N, C), any floating dtype.
|            attention_mask: broadcastable to (B, h, N, M) over M keys, those of the cache included:
|                true where a query may look, or a floating-point number to add to the scores.
|            is_causal: whether a token sees only itself and earlier ones; the N queries are the last
|                of the M tokens. Adds to ``attention_mask``.
|            rotary: hook for relative positions: takes queries (B, h, N, d) and keys
|                (B, key-value heads, N, d), returns both. The router reads the queries before it.
|            cache: hook for generation: takes the keys and values of these N tokens
|                (B, key-value heads, N, d), returns those of all M tokens.
|
|        Returns:
|            ``(output, router_stats)``: output (B, N, C) in the input's dtype; router_stats as in
|            :func:`moh_gates`, ``None`` for a layer without routed heads.
|        """
|        projected = self._project(hidden_states)
|        plan = self.num_heads, self.num_shared_heads or 0, self.num_active_routed_heads
|        plain = attention_mask is None and not is_causal and rotary is None and cache is None
|        fused = self.num_shared_heads is not None and self.router == "learned"
|        if plain and fused and self.num_key_value_heads == self.num_heads:
|            output, router_stats = moh_attention(
|                projected, *plan, self.head_dim, self.attention_backend
|            )
|            return self.proj(output), router_stats
|
|        gates, router_stats = self._gates(projected)
|        query, key, value = self._split(projected)
|        if rotary is not None:
|            query, key = rotary(query, key)
|        if cache is not None:
|            key, value = cache(key, value)
|        if self.num_key_value_heads < self.num_heads:
|            key, value = key[:, self.key_value_head], value[:, self.key_value_head]
|        mask, is_causal = merge_masks(attention_mask, is_causal, query, key)
|        backend = "reference"
|        if gates is not None:
|            backend = choose_backend(self.attention_backend, projected, *plan, self.head_dim)
|        if backend == "triton":
|            if self.attention_backend != "auto":
|                raise UserError(
|                    'attention_backend "triton" has no kernels for masks, hooks, grouped keys or '
|                    'the query-norm router; use "auto"'
|                )
|            backend = "reference"
|        output = attend(query, key, value, gates, plan[1], backend, mask, is_causal)
|        return self.proj(output), router_stats
|
|    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
|        return split_heads(projected, self.num_heads, self.head_dim, self.num_key_value_heads)
|
|    def _gates(self, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
|        if self.num_shared_heads is None:
|            return None, None
|        shared, active = self.num_shared_heads, self.num_active_routed_heads
|        if self.router == "query_norm":
|            return query_norm_gates(self._split(projected)[0], shared, active)
|        logits = projected[..., self.qkv.out_features :]
|        return moh_gates(logits, self.num_heads, shared, active)
|
|
|def split_heads(
|    projected: Tensor, num_heads: int, head_dim: int, num_key_value_heads: int | None = None
|) -> tuple[Tensor, ...]:
|    """Queries, keys, values (B, their heads, N, d) from the first columns of (B, N, columns)."""
|    batch, tokens, _ = projected.shape
|    if num_key_value_heads not in (None, num_heads):
|        sizes = [num_heads, num_key_value_heads, num_key_value_heads]
|        qkv = projected[..., : sum(sizes) * head_dim].unflatten(-1, (-1, head_dim))
|        return qkv.transpose(1, 2).split(sizes, dim=1)
|    qkv = projected[..., : 3 * num_heads * head_dim]
|    return qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
|
|
|def moh_attention(
|    projected: Tensor,
|    heads: int,
|    shared: int,
|    active: int,
|    head_dim: int,
|    backend: str = "auto",
|) -> tuple[Tensor, Tensor | None]:
|    """Mixture-of-head attention between its two projections (MoH §3).
|
|    Args:
|        projected: (B, N, 3·h·d + router columns): queries, keys, values (each h·d), then router
|            logits as in :func:`moh_gates`, then any padding.
|        heads, shared, active, head_dim: h, s, k, d.
|        backend: "reference" (dense attention, then the gates), "triton" (GPU: only selected
|            queries, gates fused; float32, float16, bfloat16), "gathered" (only selected queries,
|            in plain torch, made for CPUs), or "auto", the fastest by measurement.
|
|    Returns:
|        ``(output, router_stats)``: Σ is left to the output projection, so output is
|        (B, N, h·d) with ``g_i o_i`` for each head; router_stats as in :func:`moh_gates`.
|
|    Raises:
|        UserError: when the backend is unknown or cannot run on this device or dtype.
|    """
|    backend = choose_backend(backend, projected, heads, shared, active, head_dim)
|    if backend == "triton":
|        return moh_attention_triton(projected, heads, shared, active, head_dim)
|    query, key, value = split_heads(projected, heads, head_dim)
|    gates, router_stats = moh_gates(projected[..., 3 * heads * head_dim :], heads, shared, active)
|    return attend(query, key, value, gates, shared, backend), router_stats
|
|
|def attend(
|    query: Tensor,
|    key: Tensor,
|    value: Tensor,
|    gates: Tensor | None,
|    shared: int,
|    backend: str = "reference",
|    mask: Tensor | None = None,
|    is_causal: bool = False,
|) -> Tensor:
|    """``g_i o_i`` of every head (B, N, h·d) by "reference" or "gathered"; all g = 1 if ``None``."""
|    if gates is not None and backend == "gathered":
|        return attend_gathered(query, key, value, gates, shared, mask, is_causal)
|    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
|    output = output.transpose(1, 2)  # (B, N, h, d)
|    if gates is not None:
|        output = output * gates.to(output.dtype).unsqueeze(-1)
|    return output.flatten(2)
|
|
|def merge_masks(
|    mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
|) -> tuple[Tensor | None, bool]:
|    """One mask or the causal flag, whichever says it: torch takes one, and aligns it top left."""
|    tokens, keys = query.shape[2], key.shape[2]
|    if not is_causal or (mask is None and tokens == keys):
|        return mask, is_causal
|    if tokens == 1:  # the last token sees all
|        return mask, False
|    past = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
|    if mask is None:
|        return past, False
|    return (mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)), False
|
|
|@contextmanager
|def recorded_router_stats(model: nn.Module) -> Iterator[list[Tensor]]:
|    """Collect router_stats (2, E) of the routed layers in a model whose blocks drop them.
|
|        with recorded_router_stats(model) as stats:
|            loss = model(inputs).loss
|        loss = loss + 0.01 * load_balance_loss(stats, [2] * len(stats))
|
|    In the order in which the layers run, each time one runs inside the block.
|
|    Raises:
|        UserError: where activation checkpointing is re-entrant, which would cut the gradient.
|    """
|    stats: list[Tensor] = []
|    learning = torch.is_grad_enabled()
|
|    def record(layer: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor | None]) -> None:
|        if output[1] is None:
|            return
|        if learning and not torch.is_grad_enabled():
|            raise UserError(
|                "router statistics lose their gradient under re-entrant activation checkpointing; "
|                "set use_reentrant=False"
|            )
|        stats.append(output[1])
|
|    with ExitStack() as hooks:
|        for module in model.modules():
|            if isinstance(module, MoHAttention):
|                hooks.callback(module.register_forward_hook(record).remove)
|        yield stats
'''
MODULES[PACKAGE + '.autoencoder'] = r'''
|"""The autoencoder between images and latents: open one, use it, train one for your own images.
|
|``"digits"`` names the tiny one that ships with the package. Any other diffusers ``AutoencoderKL``,
|a local folder or a hub id, takes its place. Train one with
|
|    python -m moh_dit.autoencoder --data my_images --image_size 64 --output my_autoencoder
|"""
|
|import contextlib
|import hashlib
|import json
|import warnings
|from fnmatch import fnmatch
|from pathlib import Path
|from typing import Any, NamedTuple
|
|import torch
|from diffusers import AutoencoderKL
|from huggingface_hub import HfApi
|from torch import Tensor
|
|from .errors import UserError
|
|EMBEDDED = {"digits": Path(__file__).parent / "embedded" / "digits_autoencoder"}
|WEIGHTS = "diffusion_pytorch_model*.safetensors"
|PICKLES = (".bin", ".pt", ".pth", ".ckpt")
|
|
|class LatentScaling(NamedTuple):
|    """The affine map from the autoencoder's latents to those the diffusion model sees."""
|
|    factor: float
|    shift: float = 0.0
|
|
|def load_autoencoder(name_or_path: str | Path) -> AutoencoderKL:
|    """Open an autoencoder: float32, in evaluation mode, frozen, on the CPU.
|
|    Args:
|        name_or_path: ``"digits"`` (embedded), a folder written by diffusers (also a whole pipeline
|            with the autoencoder in ``vae/``), or a hub id such as ``stabilityai/sd-vae-ft-ema``.
|
|    Raises:
|        UserError: nothing found, no network for a hub id, or weights that are not safetensors.
|    """
|    name = str(name_or_path)
|    folder = EMBEDDED.get(name, Path(name))
|    if folder.is_file():
|        raise UserError(f"autoencoder {name} is a file: give the folder with its config.json")
|    if folder.is_dir():
|        vae = _load_local(folder)
|    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
|        vae = _load_from_hub(name)
|    else:
|        raise UserError(
|            f'autoencoder folder {name} does not exist: give "digits", a folder with config.json '
|            "and diffusion_pytorch_model.safetensors, or a hub id"
|        )
|    latent_scaling(vae)  # says at once when the scaling is of a kind that is not supported
|    return vae.float().eval().requires_grad_(False)
|
|
|def latent_scaling(vae: AutoencoderKL) -> LatentScaling:
|    """The scaling that the autoencoder's configuration asks for."""
|    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
|        raise UserError(
|            "this autoencoder normalises its latents per channel (latents_mean, latents_std), "
|            "which is not supported: use one with scaling_factor and shift_factor alone"
|        )
|    return LatentScaling(float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0))
|
|
|def downsampling_factor(vae: AutoencoderKL) -> int:
|    """Image pixels per latent position along a side."""
|    return 2 ** (len(vae.config.block_out_channels) - 1)
|
|
|def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
|    """(C, h, w) of the latents of square images; a UserError where the size does not divide."""
|    factor = downsampling_factor(vae)
|    if image_size % factor:
|        raise UserError(
|            f"image size {image_size} is not divisible by the autoencoder's factor {factor}: "
|            f"use {max(1, image_size // factor) * factor} or {(image_size // factor + 1) * factor}"
|        )
|    return vae.config.latent_channels, image_size // factor, image_size // factor
|
|
|def autoencoder_identity(vae: AutoencoderKL) -> str:
|    """SHA-256 over the names and float32 values of all weights, as hexadecimal text.
|
|    Two folders with the same weights are the same autoencoder; where it came from plays no part.
|    """
|    digest = hashlib.sha256()
|    for name, tensor in sorted(vae.state_dict().items()):
|        digest.update(name.encode())
|        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
|    return digest.hexdigest()
|
|
|@torch.no_grad()
|def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
|    """Images (B, 3, H, W) in −1 … 1 → posterior mean and log-variance, float32 (B, 2C, h, w)."""
|    with torch.autocast(images.device.type, enabled=False):
|        posterior = vae.encode(images.to(vae.dtype)).latent_dist
|    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()
|
|
|def sample_latents(moments: Tensor, noise: Tensor, scaling: LatentScaling) -> Tensor:
|    """Draw from the posterior and scale: (B, 2C, h, w) and normal (B, C, h, w) → (B, C, h, w)."""
|    mean, log_variance = moments.float().chunk(2, dim=1)
|    return (mean + torch.exp(0.5 * log_variance) * noise - scaling.shift) * scaling.factor
|
|
|@torch.no_grad()
|def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
|    """Scaled latents (B, C, h, w) → images, float32 (B, 3, H, W), clipped to −1 … 1."""
|    scaling = latent_scaling(vae)
|    with torch.autocast(latents.device.type, enabled=False):
|        images = vae.decode(latents.to(vae.dtype) / scaling.factor + scaling.shift).sample
|    return images.float().clamp(-1, 1)
|
|
|def _load_local(folder: Path) -> AutoencoderKL:
|    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
|        folder = folder / "vae"
|    if not (folder / "config.json").is_file():
|        raise UserError(f"autoencoder folder {folder} has no config.json")
|    try:
|        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
|    except (ValueError, AttributeError):
|        raise UserError(f"{folder / 'config.json'} is not a diffusers configuration") from None
|    if kind != "AutoencoderKL":
|        raise UserError(f"{folder / 'config.json'} describes {kind}, not an AutoencoderKL")
|    _require_safetensors(f"autoencoder folder {folder}", [path.name for path in folder.iterdir()])
|    return _from_pretrained(str(folder), local_files_only=True)
|
|
|def _load_from_hub(name: str) -> AutoencoderKL:
|    for subfolder in ("", "vae"):  # a copy in the local cache needs no network
|        with contextlib.suppress(UserError):
|            return _from_pretrained(name, subfolder=subfolder, local_files_only=True)
|    try:
|        found = HfApi().model_info(name, timeout=10).siblings or []
|    except Exception as error:  # no network, no such repository, or a private one
|        raise UserError(
|            f"autoencoder {name}: there is no such folder, no copy in the local cache, and the "
|            f"hub could not give it ({_one_line(error)}); without network, give the path of a "
|            'local folder, or "digits"'
|        ) from None
|    names = [entry.rfilename for entry in found]
|    subfolder = "" if "config.json" in names else "vae"
|    inside = f"{subfolder}/" if subfolder else ""
|    _require_safetensors(
|        f"autoencoder {name} on the hub",
|        [file.removeprefix(inside) for file in names if file.startswith(inside)],
|    )
|    return _from_pretrained(name, subfolder=subfolder)
|
|
|def _require_safetensors(where: str, names: list[str]) -> None:
|    if any(fnmatch(name, WEIGHTS) for name in names):
|        return
|    pickles = sorted(name for name in names if name.endswith(PICKLES))
|    found = f"only the pickle {pickles[0]}" if pickles else "no weights"
|    raise UserError(
|        f"{where}: expected diffusion_pytorch_model.safetensors, found {found}; save the "
|        "autoencoder with save_pretrained(..., safe_serialization=True)"
|    )
|
|
|def _from_pretrained(name: str, **options: Any) -> AutoencoderKL:
|    try:
|        with warnings.catch_warnings():  # diffusers passes on an option that the hub has retired
|            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
|            vae, report = AutoencoderKL.from_pretrained(
|                name,
|                use_safetensors=True,
|                torch_dtype=torch.float32,
|                output_loading_info=True,
|                **options,
|            )
|    except Exception as error:  # whatever is wrong with the files, the user has to mend it
|        raise UserError(f"autoencoder {name} cannot be opened: {_one_line(error)}") from None
|    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
|        if keys := sorted(map(str, report[problem])):
|            raise UserError(
|                f"autoencoder {name}: the weights do not fit config.json, {len(keys)} "
|                f"{problem.replace('_', ' ')}, {keys[0]} among them"
|            )
|    return vae
|
|
|def _one_line(error: Exception) -> str:
|    text = " ".join(str(error).split()) or type(error).__name__
|    return text if len(text) <= 200 else text[:199] + "…"
|
|
|def main() -> None:
|    """``python -m moh_dit.autoencoder``, the same as ``moh-dit-train-autoencoder``."""
|    from .data.commands import train_autoencoder
|
|    train_autoencoder()
|
|
|if __name__ == "__main__":
|    main()
'''
MODULES[PACKAGE + '.bundle'] = r'''
|"""A pipeline folder with its code beside it: diffusers loads it alone, with trust_remote_code.
|
|diffusers fetches one Python file for the pipeline and one for a component, and no package. So the
|modules that the pipeline needs go into one generated file, which imports them as a package of its
|own name; both places get that file.
|"""
|
|import ast
|import hashlib
|import importlib
|import importlib.util
|import json
|from pathlib import Path
|from typing import Any
|
|# File names: the first is diffusers' own for a pipeline.
|PIPELINE, TRANSFORMER = "pipeline", "moh_dit_transformer"
|CLASSES = {"pipeline": "MoHDiTPipeline", "transformer": "MoHDiTTransformer2DModel"}
|PACKAGE = __package__ or "moh_dit"
|
|QUOTES = "'" * 3
|
|HEADER = """# MoHDiTPipeline and MoHDiTTransformer2DModel of moh-dit VERSION, with all they need.
|#
|# For diffusers' trust_remote_code=True; written by moh-dit, Apache-2.0. Below are modules of that
|# package as they are, every line behind a bar: diffusers takes what looks like an import at the
|# start of a line for one of this file.
|
|import importlib
|import importlib.abc
|import importlib.util
|import pathlib
|import sys
|
|PACKAGE = "NAME"
|MODULES = {}
|"""
|
|FOOTER = """
|
|class Modules(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
|    # Imports the package from the texts above.
|
|    text = pathlib.Path(__file__).read_text(encoding="utf-8")  # to be saved with the weights again
|
|    def find_spec(self, name, path=None, target=None):
|        if name not in MODULES:
|            return None
|        folder = [] if any(module.startswith(name + ".") for module in MODULES) else None
|        return importlib.util.spec_from_file_location(
|            name, self.get_filename(name), loader=self, submodule_search_locations=folder
|        )
|
|    def get_filename(self, name):
|        return __file__ + "/" + name.replace(".", "/") + ".py"
|
|    def get_source(self, name):
|        return "\\n".join(line[1:] for line in MODULES[name].splitlines()[1:]) + "\\n"
|
|    def get_code(self, name):
|        return compile(self.get_source(name), self.get_filename(name), "exec")
|
|
|if PACKAGE not in sys.modules:
|    sys.meta_path.append(Modules())
|MoHDiTPipeline = importlib.import_module(PACKAGE + ".pipeline").MoHDiTPipeline
|MoHDiTTransformer2DModel = importlib.import_module(
|    PACKAGE + ".transformer"
|).MoHDiTTransformer2DModel
|"""
|
|
|def is_bundled() -> bool:
|    """Whether this code itself came beside weights."""
|    return PACKAGE != "moh_dit"
|
|
|def add_code(folder: Path) -> None:
|    """Put the code into a saved pipeline folder and name it in ``model_index.json``."""
|    text = bundle()
|    (folder / f"{PIPELINE}.py").write_text(text, encoding="utf-8")
|    (folder / "transformer" / f"{TRANSFORMER}.py").write_text(text, encoding="utf-8")
|    index = folder / "model_index.json"
|    config = json.loads(index.read_text())
|    config["_class_name"] = [PIPELINE, CLASSES["pipeline"]]
|    config["transformer"] = [TRANSFORMER, CLASSES["transformer"]]
|    index.write_text(json.dumps(config, indent=2) + "\n")
|
|
|def use_installed(config: dict[str, Any]) -> dict[str, Any]:
|    """A pipeline's configuration, with this package's classes in place of those beside it."""
|    if not isinstance(config.get("_class_name"), list):
|        return config
|    transformer = [f"{PACKAGE}.transformer", CLASSES["transformer"]]
|    return {**config, "_class_name": CLASSES["pipeline"], "transformer": transformer}
|
|
|def bundle() -> str:
|    """The generated file."""
|    if is_bundled():
|        return importlib.util.find_spec(PACKAGE).loader.text  # type: ignore[union-attr]
|    sources = {
|        name: file.read_text(encoding="utf-8") for name, file in sorted(needed_modules().items())
|    }
|    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()
|    name = f"moh_dit_{digest[:8]}"  # other code beside other weights is another package
|    parts = [HEADER.replace("VERSION", moh_dit_version()).replace("NAME", name)]
|    for module, source in sources.items():
|        assert QUOTES not in source, f"{module} has the quotes that the bundle uses"
|        lines = "\n".join(f"|{line}" for line in source.splitlines())
|        parts.append(f"MODULES[PACKAGE + {module!r}] = r{QUOTES}\n{lines}\n{QUOTES}\n")
|    return "".join(parts) + FOOTER
|
|
|def moh_dit_version() -> str:
|    """Of the package, or of the one that wrote the code beside the weights."""
|    return importlib.import_module(PACKAGE).__version__
|
|
|def needed_modules() -> dict[str, Path]:
|    """The package, its pipeline, and what is imported at the top of a module; packages whole.
|
|    By name within the package: ``""`` is the package itself, ``".attention"`` is ``attention.py``.
|    """
|    root = Path(__file__).parent
|    found: dict[str, Path] = {}
|    waiting = [root / "__init__.py", root / "pipeline.py"]
|    while waiting:
|        file = waiting.pop()
|        name = _module_name(file, root)
|        if name in found:
|            continue
|        found[name] = file
|        if name and file.name == "__init__.py":
|            waiting += file.parent.glob("*.py")
|        waiting += [file.parent / "__init__.py", *_relative_imports(file)]
|    return found
|
|
|def _module_name(file: Path, root: Path) -> str:
|    parts = file.relative_to(root).with_suffix("").parts
|    return ".".join(["", *(part for part in parts if part != "__init__")])
|
|
|def _relative_imports(file: Path) -> list[Path]:
|    """Files of the package that a file imports at its top."""
|    files = []
|    for node in ast.parse(file.read_text(encoding="utf-8")).body:
|        if isinstance(node, ast.ImportFrom) and node.level:
|            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
|            for path in [base, *(base / alias.name for alias in node.names)]:
|                files += [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
|    return files
'''
MODULES[PACKAGE + '.card'] = r'''
|"""The model card of a folder: what it is, how it was trained, what was measured, what it draws.
|
|``README.md`` with the YAML front matter that the hub reads, and the sample grid beside it.
|"""
|
|import json
|import re
|import shutil
|from dataclasses import dataclass, field
|from pathlib import Path
|from typing import Any
|
|from huggingface_hub import EvalResult, ModelCardData
|
|from .formats.identify import describe, preset_of
|
|CARD, GRID = "README.md", "samples.png"
|AUTOMATIC = "automatically generated"  # what diffusers says in a card that it made up
|TAGS = ["diffusers", "class-conditional", "diffusion-transformer", "dit"]
|TASK = "unconditional-image-generation"  # the nearest that the hub knows
|
|USE = """## Use
|
|With moh-dit installed, FOLDER being this folder or its hub id:
|
|```python
|from moh_dit import load_pipeline
|
|pipeline = load_pipeline("FOLDER")
|pipeline([0, 1, 2], guidance_scale=4.0).images
|```
|
|Where its code lies beside the weights (`pipeline.py`), diffusers alone opens it too:
|
|```python
|from diffusers import DiffusionPipeline
|
|pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
|```
|"""
|
|
|@dataclass
|class Facts:
|    """What is known of a model beside its weights.
|
|    Attributes:
|        license: of the weights, as the hub spells it; "unknown" where nobody said.
|        recipe: the resolved configuration of the run, as YAML.
|        metrics: name and value, as far as measured.
|        conditions: what the metrics depend on, in words.
|        grid: a picture of samples.
|        base_model: where the weights came from, for the hub.
|    """
|
|    license: str = "unknown"
|    recipe: str | None = None
|    metrics: dict[str, float] = field(default_factory=dict)
|    conditions: str = ""
|    grid: Path | None = None
|    base_model: str | None = None
|
|
|def run_facts(run: Path) -> Facts:
|    """What a run folder says of its model: configuration, newest evaluation, newest grid."""
|    facts = Facts()
|    if (run / "config.yaml").is_file():
|        facts.recipe = (run / "config.yaml").read_text()
|    if evaluations := sorted((run / "evaluations").glob("step-*.json")):
|        result = json.loads(evaluations[-1].read_text())
|        facts.metrics = result["metrics"]
|        samples, extractors = result.get("samples", {}), result.get("extractors", {})
|        facts.conditions = f"After {result['step']:,} steps"
|        if count := samples.get("count"):
|            facts.conditions += f", on {count:,} samples"
|        if extractors:
|            facts.conditions += f", features of {', '.join(extractors)}"
|        facts.conditions += "; guidance and sampling steps under `evaluation` in the recipe."
|    if grids := sorted((run / "samples").glob("step-*.png")):
|        facts.grid = grids[-1]
|    return facts
|
|
|def write_card(folder: Path, config: dict[str, Any], facts: Facts) -> None:
|    """Write ``README.md``, and the grid if there is one, into a pipeline folder."""
|    description = describe(config)
|    moh = "MoH" in description
|    name = preset_of(config) or ("MoH-DiT" if moh else "DiT")
|    results = [
|        EvalResult(
|            task_type=TASK,
|            dataset_type="training-data",
|            dataset_name="the run's reference",
|            metric_type=metric,
|            metric_value=value,
|        )
|        for metric, value in facts.metrics.items()
|    ]
|    front = ModelCardData(
|        license=facts.license,
|        library_name="diffusers",
|        pipeline_tag=TASK,
|        tags=TAGS + ["mixture-of-head-attention"] * moh,
|        base_model=facts.base_model,
|        model_name=name if results else None,
|        eval_results=results or None,
|    )
|    parts = [f"---\n{front.to_yaml()}\n---", f"# {name}", _introduction(description, moh)]
|    if facts.grid is not None:
|        shutil.copyfile(facts.grid, folder / GRID)
|        parts.append(f"![Samples, a row a class]({GRID})")
|    parts.append(USE.strip())
|    if facts.metrics:
|        rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in facts.metrics.items())
|        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n\n{facts.conditions}")
|    if facts.recipe is not None:
|        parts.append(f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```")
|    unknown = "Nobody stated the licence of these weights; ask whoever trained them."
|    stated = f"The weights: {facts.license}." if facts.license != "unknown" else unknown
|    parts.append(f"## Licence\n\n{stated} The code of moh-dit: apache-2.0.")
|    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
|
|
|def _introduction(description: str, moh: bool) -> str:
|    text = (
|        f"{description[0].upper()}{description[1:]}: a class-conditional latent Diffusion "
|        "Transformer ([DiT](https://arxiv.org/abs/2212.09748))"
|    )
|    if moh:
|        text += (
|            " whose tokens choose their attention heads "
|            "([Mixture-of-Head attention](https://arxiv.org/abs/2410.11842))"
|        )
|    return text + "."
|
|
|def keep_card(folder: Path, loaded_from: str | None, config: dict[str, Any]) -> None:
|    """Give a saved folder the card of the one it was loaded from, or a plain one.
|
|    A card that somebody wrote is left alone; one that diffusers made up is replaced.
|    """
|    card = folder / CARD
|    if card.is_file() and AUTOMATIC not in card.read_text(encoding="utf-8"):
|        return None
|    source = Path(loaded_from or "") / CARD
|    if not loaded_from or not source.is_file():
|        return write_card(folder, config, Facts())
|    text = source.read_text(encoding="utf-8")
|    for picture in re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text):
|        if (source.parent / picture).is_file() and not (folder / picture).exists():
|            shutil.copyfile(source.parent / picture, folder / picture)
|    card.write_text(text, encoding="utf-8")
|    return None
|
|
|def describes(folder: Path, config: dict[str, Any]) -> bool:
|    """Whether a folder has a card written here, of just this model."""
|    card = folder / CARD
|    return card.is_file() and describe(config)[1:] in card.read_text(encoding="utf-8")
|
|
|def stated_license(folder: Path) -> str | None:
|    """The licence in the front matter of a folder's card."""
|    card = folder / CARD
|    if not card.is_file():
|        return None
|    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
|    line = re.search(r"^license:\s*(\S+)", match[1], re.MULTILINE) if match else None
|    return line[1] if line else None
'''
MODULES[PACKAGE + '.diffusion'] = r'''
|"""The diffusion objective: MSE on the noise plus the bound that trains the learned variance.
|
|DDPM (arXiv 2006.11239) with the learned variance of Improved DDPM (arXiv 2102.09672), over the
|constants of a diffusers ``DDPMScheduler``, which also samples from the model.
|"""
|
|import math
|from typing import Any, NamedTuple
|
|import torch
|from diffusers import DDPMScheduler
|from diffusers.schedulers import scheduling_ddpm
|from torch import Tensor
|
|from .noise import ImageNoise
|
|
|class DiffusionLoss(NamedTuple):
|    """Per-image terms (B,): ``mse`` of the noise and ``vlb`` in bits per dimension."""
|
|    mse: Tensor
|    vlb: Tensor
|
|
|class DiffusionProcess:
|    """q(x_t | x_0), its reverse, and the training loss of a model that predicts ε and v.
|
|    Args:
|        scheduler: source of the β schedule.
|        timesteps: descending subset of ``0 … T-1`` to walk instead of all (iDDPM §4); timestep
|            arguments below then count its members from the last, as ``0 … len - 1``.
|        device: where the tables live; float32, one value per step.
|    """
|
|    def __init__(
|        self,
|        scheduler: DDPMScheduler,
|        timesteps: Tensor | None = None,
|        device: torch.device | str = "cpu",
|    ):
|        alpha_bar = (1 - _float64_betas(scheduler)).cumprod(0)
|        if timesteps is not None:
|            alpha_bar = alpha_bar[timesteps.cpu().flip(0)]
|        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])  # ᾱ_{t-1}
|        alpha = alpha_bar / previous
|        beta = 1 - alpha
|        posterior = beta * (1 - previous) / (1 - alpha_bar)  # β̃_t, DDPM eq. 7
|        # β̃_0 is 0 and its log is needed: the next one stands in. A single step never uses it.
|        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
|        tables = dict(
|            sqrt_alpha_bar=alpha_bar.sqrt(),
|            sqrt_noise=(1 - alpha_bar).sqrt(),
|            recip_alpha_bar=(1 / alpha_bar).sqrt(),
|            recip_noise=(1 / alpha_bar - 1).sqrt(),
|            mean_x0=beta * previous.sqrt() / (1 - alpha_bar),  # DDPM eq. 7
|            mean_xt=(1 - previous) * alpha.sqrt() / (1 - alpha_bar),
|            log_beta=beta.log(),
|            log_posterior=posterior.log(),
|        )
|        self.num_timesteps = len(alpha_bar)
|        # Computed in float64 and rounded once, where the published code rounds: the loss and the
|        # samples then agree with it to the last digits.
|        self.tables = {name: table.float().to(device) for name, table in tables.items()}
|
|    def constant(self, name: str, timesteps: Tensor | int, like: Tensor) -> Tensor:
|        """A table at one timestep or at each image's, shaped to broadcast over ``like`` (B, …)."""
|        return self.tables[name][timesteps].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
|
|    def to(self, device: torch.device) -> None:
|        """Move the tables, once."""
|        if self.tables["log_beta"].device != device:
|            self.tables = {name: table.to(device) for name, table in self.tables.items()}
|
|    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
|        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε (DDPM eq. 4)."""
|        signal = self.constant("sqrt_alpha_bar", timesteps, latents)
|        return signal * latents + self.constant("sqrt_noise", timesteps, latents) * noise
|
|    def loss(
|        self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor
|    ) -> DiffusionLoss:
|        """Per-image loss terms; the papers minimise ``(mse + vlb).mean()``.
|
|        Args:
|            model_output: (B, 2C, H, W), ε̂ then v, for ``add_noise(latents, noise, timesteps)``.
|            latents: (B, C, H, W), x_0.
|            noise: (B, C, H, W), the ε that was added.
|            timesteps: int64 (B,), ``0 … T-1``.
|        """
|        predicted_noise, v = model_output.to(latents.dtype).chunk(2, dim=1)
|        mse = image_mean((noise - predicted_noise).square())
|
|        # The bound trains v alone: ε̂ is detached in it (iDDPM §3.1).
|        noisy = self.add_noise(latents, noise, timesteps)
|        predicted = self.predict_latents(predicted_noise.detach(), noisy, timesteps)
|        mean = self.posterior_mean(predicted, noisy, timesteps)
|        log_variance = self.log_variance(v, timesteps)
|        true_mean = self.posterior_mean(latents, noisy, timesteps)
|        true_log_variance = self.constant("log_posterior", timesteps, latents)
|        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
|        nll = discretised_gaussian_nll(latents, mean, log_variance)
|        first = (timesteps == 0).view(-1, 1, 1, 1)
|        return DiffusionLoss(mse, image_mean(torch.where(first, nll, kl)) / math.log(2))
|
|    def predict_latents(
|        self, predicted_noise: Tensor, noisy: Tensor, timesteps: Tensor | int
|    ) -> Tensor:
|        """x̂_0 from x_t and ε̂ (DDPM eq. 4, solved)."""
|        signal = self.constant("recip_alpha_bar", timesteps, noisy) * noisy
|        return signal - self.constant("recip_noise", timesteps, noisy) * predicted_noise
|
|    def log_variance(self, v: Tensor, timesteps: Tensor | int) -> Tensor:
|        """log σ² between log β̃_t (v = -1) and log β_t (v = 1) (iDDPM eq. 15)."""
|        share = (v + 1) / 2
|        upper = share * self.constant("log_beta", timesteps, v)
|        return upper + (1 - share) * self.constant("log_posterior", timesteps, v)
|
|    def posterior_mean(self, latents: Tensor, noisy: Tensor, timesteps: Tensor | int) -> Tensor:
|        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
|        weighted = self.constant("mean_x0", timesteps, noisy) * latents
|        return weighted + self.constant("mean_xt", timesteps, noisy) * noisy
|
|
|class LearnedVarianceDDPMScheduler(DDPMScheduler):
|    """diffusers' ``DDPMScheduler`` for ``learned_range``, with the arithmetic of the loss above.
|
|    The parent holds β in float32, where 1 - ᾱ_t / ᾱ_{t-1} keeps three digits of a β of 1e-4; this
|    one takes every step through the tables of :class:`DiffusionProcess`. Saved folders name the
|    parent; the pipeline puts this in its place (``from_config``) when it samples.
|    """
|
|    def set_timesteps(self, *args: Any, **options: Any) -> None:
|        """As the parent's; then prepares the tables of the chosen timesteps."""
|        super().set_timesteps(*args, **options)
|        self._process = DiffusionProcess(self, self.timesteps)
|        last = len(self.timesteps) - 1
|        self._positions = {t: last - i for i, t in enumerate(self.timesteps.tolist())}
|
|    def step(
|        self,
|        model_output: Tensor,
|        timestep: Tensor | int,
|        sample: Tensor,
|        generator: torch.Generator | list[torch.Generator] | ImageNoise | None = None,
|        return_dict: bool = True,
|    ) -> scheduling_ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
|        """One ancestral step (DDPM eq. 11 with iDDPM eq. 15).
|
|        Args:
|            model_output: (B, 2C, H, W), ε̂ then v.
|            timestep: a member of ``timesteps``.
|            sample: (B, C, H, W), x_t.
|            generator: one, or a list of B, for the added noise; or that noise itself.
|            return_dict: whether to return a ``DDPMSchedulerOutput`` or its two tensors.
|        """
|        process, position = self._process, self._positions[int(timestep)]
|        process.to(sample.device)
|        predicted_noise, v = model_output.chunk(2, dim=1)
|        predicted = process.predict_latents(predicted_noise, sample, position)
|        previous = process.posterior_mean(predicted, sample, position)
|        if position > 0:
|            if isinstance(generator, ImageNoise):
|                noise = generator.draw(sample.shape, sample.dtype)
|            else:
|                noise = scheduling_ddpm.randn_tensor(
|                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
|                )
|            previous = previous + (0.5 * process.log_variance(v, position)).exp() * noise
|        if not return_dict:
|            return previous, predicted
|        return scheduling_ddpm.DDPMSchedulerOutput(previous, predicted)
|
|
|def make_scheduler(
|    learned_variance: bool = True, prediction_type: str = "epsilon"
|) -> DDPMScheduler:
|    """The papers' process: 1000 steps, linear β, ancestral sampling, no clipping.
|
|    Args:
|        learned_variance: whether the model predicts the variance values v beside the noise.
|        prediction_type: what it predicts, in diffusers' terms.
|    """
|    return DDPMScheduler(
|        num_train_timesteps=1000,
|        prediction_type=prediction_type,
|        beta_schedule="linear",
|        beta_start=1e-4,
|        beta_end=2e-2,
|        variance_type="learned_range" if learned_variance else "fixed_small",
|        clip_sample=False,
|        timestep_spacing="linspace",
|    )
|
|
|def _float64_betas(scheduler: DDPMScheduler) -> Tensor:
|    config = scheduler.config
|    if config.beta_schedule == "linear" and config.trained_betas is None:
|        steps = config.num_train_timesteps
|        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
|    return scheduler.betas.double()
|
|
|def image_mean(values: Tensor) -> Tensor:
|    return values.flatten(1).mean(1)
|
|
|def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
|    """KL(N(mean1, e^log_var1) ‖ N(mean2, e^log_var2)) in nats, elementwise."""
|    difference = log_var1 - log_var2
|    squared = (mean1 - mean2).square() * (-log_var2).exp()
|    return 0.5 * (difference.exp() + squared - 1 - difference)
|
|
|def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
|    """-log of the Gaussian's mass in the bin of width 2/255 around x, in nats, elementwise.
|
|    DDPM eq. 13, with the tanh approximation of the normal distribution function that Improved
|    DDPM uses; the outermost bins reach to infinity.
|    """
|    inverse_std = (-0.5 * log_variance).exp()
|    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
|    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
|    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
|    return -mass.clamp(min=1e-12).log()
|
|
|def _normal_cdf(x: Tensor) -> Tensor:
|    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
'''
MODULES[PACKAGE + '.embeddings'] = r'''
|"""What a Diffusion Transformer reads (DiT §3.2): patches, timestep and class, as vectors."""
|
|from diffusers.models.embeddings import get_timestep_embedding
|from torch import Tensor, nn
|
|
|class PatchEmbedder(nn.Module):
|    """Latent → tokens, row by row: (B, C_in, H, W) → (B, N, C)."""
|
|    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
|        super().__init__()
|        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
|
|    def forward(self, latents: Tensor) -> Tensor:
|        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
|
|
|class TimestepEmbedder(nn.Module):
|    """256 sinusoidal features (cos first) and an MLP: (B,) → (B, C)."""
|
|    num_features = 256
|
|    def __init__(self, hidden_size: int, freq_shift: float = 0):
|        super().__init__()
|        self.freq_shift = freq_shift
|        self.mlp = nn.Sequential(
|            nn.Linear(self.num_features, hidden_size),
|            nn.SiLU(),
|            nn.Linear(hidden_size, hidden_size),
|        )
|
|    def forward(self, timestep: Tensor) -> Tensor:
|        features = get_timestep_embedding(
|            timestep,
|            self.num_features,
|            flip_sin_to_cos=True,
|            downscale_freq_shift=self.freq_shift,
|        )
|        return self.mlp(features.to(next(self.mlp.parameters()).dtype))
|
|
|class LabelEmbedder(nn.Module):
|    """A vector per class and one for the null class: (B,) → (B, C)."""
|
|    def __init__(self, num_classes: int, hidden_size: int):
|        super().__init__()
|        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
|
|    def forward(self, class_labels: Tensor) -> Tensor:
|        return self.embedding_table(class_labels)
'''
MODULES[PACKAGE + '.errors'] = r'''
|"""The one exception that means: the user can mend this. Programs print one line and exit 2."""
|
|
|class UserError(ValueError):
|    """Bad input. The message names the input, what is wrong with it and what to do."""
'''
MODULES[PACKAGE + '.formats'] = r'''
|"""Other people's checkpoints: what is in a file, how its weights are called, which model it is."""
'''
MODULES[PACKAGE + '.formats.hub'] = r'''
|"""Hub ids where a path is expected: a repository's files become a local folder, or one of them."""
|
|import re
|from collections.abc import Sequence
|from pathlib import Path
|from typing import Any
|
|from huggingface_hub import snapshot_download
|
|from ..errors import UserError
|from .weights import PICKLES
|
|# Nothing else of a repository is wanted: not its code, nor weights for other frameworks.
|SAFE = ["*.json", "*.safetensors", "README.md", "*.png"]
|PICKLED = [f"*{suffix}" for suffix in PICKLES]
|
|
|def local_path(source: str | Path, local_files_only: bool = False) -> Path:
|    """Where a local path or a hub id is on this machine; downloads what the cache lacks.
|
|    Args:
|        source: a path; ``owner/name``; or ``owner/name/path/to/file`` for one weight file of a
|            repository that has several.
|        local_files_only: never ask the hub; also with ``HF_HUB_OFFLINE=1`` in the environment.
|
|    Raises:
|        UserError: when there is neither such a path nor, in the cache or on the hub, such an id.
|    """
|    if Path(source).exists():
|        return Path(source)
|    name = str(source)
|    match = re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)", name)
|    file = match[2].removeprefix("/") if match else ""
|    if match is None or name.startswith(".") or is_weight_file(file or name) != bool(file):
|        raise UserError(f"checkpoint {name} does not exist; give a path, or a hub id (owner/name)")
|    if file:
|        folder = snapshot(match[1], [file], local_files_only=local_files_only)
|        if not (folder / file).is_file():
|            raise UserError(f"{name}: {match[1]} has no file {file}")
|        return folder / file
|    folder = snapshot(match[1], local_files_only=local_files_only)
|    model = folder / "transformer" if (folder / "transformer").is_dir() else folder
|    if not list(model.glob("*.safetensors")):
|        folder = snapshot(match[1], SAFE + PICKLED, local_files_only=local_files_only)
|    return folder
|
|
|def is_weight_file(name: str) -> bool:
|    """Whether a file is called like one with weights."""
|    return name.endswith((".safetensors", *PICKLES))
|
|
|def snapshot(repository: str, patterns: Sequence[str] = SAFE, **options: Any) -> Path:
|    """The local folder of a hub repository with the files that match ``patterns``.
|
|    Args:
|        repository: ``owner/name``.
|        patterns: which files are wanted.
|        options: of ``huggingface_hub.snapshot_download``.
|
|    Raises:
|        UserError: when it is neither in the cache nor to be had from the hub.
|    """
|    try:
|        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
|    except Exception as error:  # no network, no such repository, or a private one
|        reason = " ".join(str(error).split()) or type(error).__name__
|        raise UserError(
|            f"{repository}: there is no such path, and as a hub id it is neither in the local "
|            f"cache nor to be had ({reason[:160]}); give a local path, or go online once"
|        ) from None
'''
MODULES[PACKAGE + '.formats.identify'] = r'''
|"""Which model is it: the configuration and the preset behind the shapes of a state dict."""
|
|import inspect
|import re
|from collections.abc import Iterator, Mapping
|from typing import Any
|
|from torch import Tensor
|
|from ..errors import UserError
|from ..presets import PRESETS
|from ..transformer import MoHDiTTransformer2DModel, per_layer
|from .weights import LazyTensor, State
|
|POSITIONS, LABEL_TABLE = "pos_embed", "y_embedder.embedding_table.weight"
|
|
|def infer_config(state: State, overrides: dict[str, Any]) -> dict[str, Any]:
|    """The configuration behind a state dict with published names.
|
|    Heads are not in the shapes of a dense layer, nor active heads in those of a routed one: they
|    are those of the preset with the same shapes, or ``overrides``.
|
|    Raises:
|        UserError: when no preset has these shapes; the nearest is named with what differs.
|    """
|    found = _sizes(state)
|    shapes = _layer_shapes(state, found["depth"])
|    given = {"num_heads", "num_shared_heads", "num_active_routed_heads"} & overrides.keys()
|    if given:
|        return {**found, **overrides}
|    differences = {
|        name: list(_differences(found, shapes, full_config(plan))) for name, plan in PRESETS.items()
|    }
|    nearest = min(differences, key=lambda name: len(differences[name]))
|    if differences[nearest]:
|        few = differences[nearest][:3]
|        more = len(differences[nearest]) - len(few)
|        raise UserError(
|            f"no preset has these weights; from the nearest, {nearest}, they differ in "
|            f"{'; '.join(few)}{f' and {more} more' if more else ''}. If that is meant, give "
|            "model.num_heads and, for MoH, model.num_shared_heads and "
|            "model.num_active_routed_heads"
|        )
|    return {**found, **PRESETS[nearest], **overrides}
|
|
|def preset_of(config: dict[str, Any]) -> str | None:
|    """The preset with this architecture, whatever its latent size, channels and classes."""
|    config = full_config(config)
|    if config["mlp_ratio"] != 4 or config["timestep_freq_shift"] or _is_parameter_free(config):
|        return None
|    for name, plan in PRESETS.items():
|        preset = full_config(plan)
|        same = all(preset[key] == config[key] for key in ("depth", "hidden_size", "patch_size"))
|        if same and head_plan(preset) == head_plan(config):
|            return name
|    return None
|
|
|def describe(config: dict[str, Any]) -> str:
|    """A model in words: its preset, or its sizes, then latents and classes."""
|    config = full_config(config)
|    moh = any(plan[1] is not None for plan in head_plan(config))
|    name = preset_of(config) or (
|        f"a {'MoH-' if moh else ''}DiT of no preset ({config['depth']} layers of width "
|        f"{config['hidden_size']}, patch {config['patch_size']})"
|    )
|    if _is_parameter_free(config):
|        name += " with the query-norm router"
|    size, classes = config["sample_size"], config["num_classes"]
|    return f"{name}, latents {config['in_channels']}×{size}×{size}, {classes} classes"
|
|
|def full_config(config: dict[str, Any]) -> dict[str, Any]:
|    """A configuration with every argument of the model, defaults where it has none."""
|    parameters = list(inspect.signature(MoHDiTTransformer2DModel.__init__).parameters.values())[1:]
|    defaults = {parameter.name: parameter.default for parameter in parameters}
|    full = {**defaults, **{key: config[key] for key in defaults.keys() & config.keys()}}
|    full["out_channels"] = full["out_channels"] or 2 * full["in_channels"]
|    return full
|
|
|def head_plan(config: dict[str, Any]) -> list[tuple[int, int | None, int, int]]:
|    """Heads, shared heads, active routed heads and head width of every layer."""
|    depth = config["depth"]
|    heads = per_layer("num_heads", config["num_heads"], depth)
|    shared = per_layer("num_shared_heads", config["num_shared_heads"], depth)
|    active = per_layer("num_active_routed_heads", config["num_active_routed_heads"], depth)
|    width = config["head_dim"]
|    return [
|        (h, s, 0 if s is None else k or 0, width or config["hidden_size"] // h)
|        for h, s, k in zip(heads, shared, active, strict=True)
|    ]
|
|
|def _is_parameter_free(config: dict[str, Any]) -> bool:
|    return config["router"] != "learned"
|
|
|def _sizes(state: State) -> dict[str, Any]:
|    try:
|        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
|        tokens = state[POSITIONS].shape[1]
|        classes = state[LABEL_TABLE].shape[0] - 1
|        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
|        out = state["final_layer.linear.weight"].shape[0]
|    except KeyError as error:
|        raise UserError(f"these are no weights of a (MoH-)DiT: missing {error.args[0]}") from None
|    except (ValueError, IndexError):
|        raise UserError("these are no weights of a (MoH-)DiT: x_embedder.proj is 4-D") from None
|    layers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
|    return dict(
|        sample_size=round(tokens**0.5) * patch,
|        patch_size=patch,
|        in_channels=channels,
|        out_channels=out // patch**2,
|        hidden_size=width,
|        depth=max(layers) + 1,
|        mlp_ratio=hidden / width,
|        num_classes=classes,
|    )
|
|
|def _layer_shapes(state: State, depth: int) -> list[tuple[int, int | None, int]]:
|    """Rows of the value projection, shared heads, routed heads of every layer."""
|    layers = []
|    for i in range(depth):
|        names = [f"blocks.{i}.attn.{name}.weight" for name in ("qkv", "wg_1", "wg")]
|        rows, shared, routed = (state[n].shape[0] if n in state else None for n in names)
|        if shared is None and routed is not None:
|            shared = 0
|        layers.append(((rows or 0) // 3, shared, routed or 0))
|    return layers
|
|
|def _differences(
|    found: dict[str, Any], shapes: list[tuple[int, int | None, int]], preset: dict[str, Any]
|) -> Iterator[str]:
|    """In words, how shapes differ from what a preset has."""
|    for key in ("depth", "hidden_size", "patch_size"):
|        if found[key] != preset[key]:
|            yield f"{key} {found[key]} ({preset[key]} in the preset)"
|    if found["mlp_ratio"] != 4:
|        yield f"mlp_ratio {found['mlp_ratio']} (4 in the preset)"
|    expected = [
|        (heads * width, shared, 0 if shared is None else heads - shared)
|        for heads, shared, _, width in head_plan(preset)
|    ]
|    for i, (mine, theirs) in enumerate(zip(shapes, expected, strict=False)):
|        if mine != theirs:
|            yield f"layer {i}: {_layer_words(*mine)} ({_layer_words(*theirs)} in the preset)"
|
|
|def _layer_words(rows: int, shared: int | None, routed: int) -> str:
|    router = "no router" if shared is None else f"{shared} shared and {routed} routed heads"
|    return f"{router}, {rows} value rows"
|
|
|def state_difference(
|    model: MoHDiTTransformer2DModel, state: Mapping[str, Tensor | LazyTensor]
|) -> str:
|    """In words, how a state dict differs from what the model expects; empty when it does not."""
|    expected = model.state_dict()
|    shapes = [
|        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
|        for key in sorted(expected.keys() & state.keys())
|        if state[key].shape != expected[key].shape
|    ]
|    parts = [
|        _some("missing", sorted(expected.keys() - state.keys())),
|        _some("unexpected", sorted(state.keys() - expected.keys())),
|        _some("shapes", shapes),
|    ]
|    return "; ".join(filter(None, parts))
|
|
|def _some(what: str, items: list[str], limit: int = 4) -> str:
|    if not items:
|        return ""
|    more = f" and {len(items) - limit} more" if len(items) > limit else ""
|    return f"{what}: {', '.join(items[:limit])}{more}"
'''
MODULES[PACKAGE + '.formats.names'] = r'''
|"""The same model under other names: this project's state dicts and diffusers', either way.
|
|Published names are this project's own (see ``transformer``), for dense DiT as for MoH-DiT. In
|diffusers' ``DiTTransformer2DModel`` the same weights have other names: queries, keys and values are
|apart, the timestep and label embedders stored once per block, the position table computed.
|"""
|
|from typing import Any
|
|import torch
|from diffusers.models.embeddings import get_2d_sincos_pos_embed
|from torch import Tensor
|
|from ..errors import UserError
|from .identify import POSITIONS, full_config, head_plan
|from .weights import LazyTensor, State, lazy
|
|DIFFUSERS_POSITIONS = "pos_embed.pos_embed"
|DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders
|
|# Module names, ours to diffusers': outside the blocks, in a block, in a block but outside ours.
|LABELS = "y_embedder.embedding_table"  # has no bias
|OUTSIDE = {
|    "x_embedder.proj": "pos_embed.proj",
|    "final_layer.adaLN_modulation.1": "proj_out_1",
|    "final_layer.linear": "proj_out_2",
|}
|BLOCK = {
|    "adaLN_modulation.1": "norm1.linear",
|    "attn.proj": "attn1.to_out.0",
|    "mlp.fc1": "ff.net.0.proj",
|    "mlp.fc2": "ff.net.2",
|}
|REPEATED = {
|    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
|    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
|    LABELS: "norm1.emb.class_embedder.embedding_table",
|}
|QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
|# What diffusers' class can be configured to, and this model cannot.
|DIFFUSERS_FIXED = dict(
|    norm_type="ada_norm_zero",
|    activation_fn="gelu-approximate",
|    attention_bias=True,
|    norm_elementwise_affine=False,
|)
|
|
|def is_diffusers(state: State) -> bool:
|    """Whether a state dict has the names of diffusers' ``DiTTransformer2DModel``."""
|    return any(key.startswith("transformer_blocks.") for key in state)
|
|
|def from_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
|    """Arguments of :class:`MoHDiTTransformer2DModel` from a ``DiTTransformer2DModel``'s.
|
|    Raises:
|        UserError: for a setting that this model does not have.
|    """
|    for key, expected in DIFFUSERS_FIXED.items():
|        if (found := config.get(key, expected)) != expected:
|            raise UserError(f"{key} is {found!r}; a DiT has {expected!r}")
|    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
|    in_channels = config.get("in_channels", 4)
|    return dict(
|        sample_size=config.get("sample_size", 32),
|        patch_size=config.get("patch_size", 2),
|        in_channels=in_channels,
|        out_channels=config.get("out_channels") or in_channels,
|        hidden_size=heads * head_dim,
|        depth=config.get("num_layers", 28),
|        num_heads=heads,
|        num_classes=config.get("num_embeds_ada_norm", 1000),
|        timestep_freq_shift=config.get("timestep_freq_shift", 0),
|    )
|
|
|def to_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
|    """The reverse of :func:`from_diffusers_config`.
|
|    Raises:
|        UserError: when diffusers' class cannot express the model.
|    """
|    config = full_config(config)
|    heads = config["num_heads"]
|    if any(plan[1] is not None for plan in head_plan(config)):
|        raise UserError(
|            "diffusers' DiTTransformer2DModel has no mixture-of-head layers; convert a MoH model "
|            "to moh-dit, pipeline or published instead"
|        )
|    if not isinstance(heads, int) and len(set(heads)) == 1:
|        heads = heads[0]
|    if not isinstance(heads, int):
|        raise UserError("diffusers' DiTTransformer2DModel has the same num_heads in every layer")
|    width = config["head_dim"] or config["hidden_size"] // heads
|    if heads * width != config["hidden_size"] or config["mlp_ratio"] != 4:
|        raise UserError(
|            "diffusers' DiTTransformer2DModel has num_heads · head_dim = hidden_size and an "
|            f"mlp_ratio of 4; this model has {heads} · {width}, {config['hidden_size']} and "
|            f"{config['mlp_ratio']}"
|        )
|    converted = dict(
|        _class_name="DiTTransformer2DModel",
|        sample_size=config["sample_size"],
|        patch_size=config["patch_size"],
|        in_channels=config["in_channels"],
|        out_channels=config["out_channels"],
|        num_attention_heads=heads,
|        attention_head_dim=width,
|        num_layers=config["depth"],
|        num_embeds_ada_norm=config["num_classes"],
|        norm_eps=1e-6,
|        **DIFFUSERS_FIXED,
|    )
|    if config["timestep_freq_shift"]:  # not diffusers', which ignores it; for the way back
|        converted["timestep_freq_shift"] = config["timestep_freq_shift"]
|    return converted
|
|
|def from_diffusers(state: State, config: dict[str, Any]) -> dict[str, LazyTensor]:
|    """A ``DiTTransformer2DModel``'s state dict under this project's names.
|
|    That the embedders are equal in all blocks is checked when they are read.
|
|    Raises:
|        UserError: for names that are missing or unknown.
|    """
|    names, converted = dict(state), {}
|    depth = config["depth"]
|
|    def take(key: str) -> LazyTensor:
|        if key not in names:
|            raise UserError(f"missing: {key}")
|        return names.pop(key)
|
|    for kind in ("weight", "bias"):
|        for own, theirs in OUTSIDE.items():
|            converted[f"{own}.{kind}"] = take(f"{theirs}.{kind}")
|        for own, theirs in REPEATED.items():
|            if (own, kind) == (LABELS, "bias"):
|                continue
|            each = [take(f"transformer_blocks.{i}.{theirs}.{kind}") for i in range(depth)]
|            converted[f"{own}.{kind}"] = _the_same(each, f"{theirs}.{kind}")
|        for i in range(depth):
|            for own, theirs in BLOCK.items():
|                key = f"blocks.{i}.{own}.{kind}"
|                converted[key] = take(f"transformer_blocks.{i}.{theirs}.{kind}")
|            parts = [take(f"transformer_blocks.{i}.{part}.{kind}") for part in QKV]
|            converted[f"blocks.{i}.attn.qkv.{kind}"] = _stacked(parts)
|    dtype = converted["x_embedder.proj.weight"].dtype
|    stored = names.pop(DIFFUSERS_POSITIONS, None)
|    converted[POSITIONS] = stored or lazy(position_table(config).to(dtype))
|    if names:
|        raise UserError(f"unexpected: {', '.join(sorted(names)[:4])}")
|    return converted
|
|
|def to_diffusers(state: State, config: dict[str, Any]) -> dict[str, LazyTensor]:
|    """This project's state dict of a dense model under diffusers' names.
|
|    The position table, which diffusers computes, is left out, unless that would lose anything of
|    it; diffusers ignores it then.
|
|    Raises:
|        UserError: for positions other than the sin-cos table.
|    """
|    depth, converted = config["depth"], {}
|    for kind in ("weight", "bias"):
|        for own, theirs in OUTSIDE.items():
|            converted[f"{theirs}.{kind}"] = state[f"{own}.{kind}"]
|        for i in range(depth):
|            block = f"transformer_blocks.{i}"
|            for own, theirs in REPEATED.items():
|                if (key := f"{own}.{kind}") in state:
|                    converted[f"{block}.{theirs}.{kind}"] = state[key]
|            for own, theirs in BLOCK.items():
|                converted[f"{block}.{theirs}.{kind}"] = state[f"blocks.{i}.{own}.{kind}"]
|            qkv = state[f"blocks.{i}.attn.qkv.{kind}"]
|            for part, name in enumerate(QKV):
|                converted[f"{block}.{name}.{kind}"] = _third(qkv, part)
|    positions, computed = state[POSITIONS].read(), position_table(config)
|    if not torch.allclose(positions.float(), computed.to(positions.dtype).float(), atol=1e-5):
|        raise UserError(
|            f"{POSITIONS} is not the 2-D sin-cos table, which diffusers' DiTTransformer2DModel "
|            "computes and does not store"
|        )
|    rebuilt = computed.to(state["x_embedder.proj.weight"].dtype)
|    if rebuilt.dtype != positions.dtype or not torch.equal(rebuilt, positions):
|        converted[DIFFUSERS_POSITIONS] = state[POSITIONS]
|    return converted
|
|
|def position_table(config: dict[str, Any]) -> Tensor:
|    """The fixed 2-D sin-cos positions (1, N, C) of a configuration, float32."""
|    grid = config["sample_size"] // config["patch_size"]
|    table = get_2d_sincos_pos_embed(config["hidden_size"], grid, base_size=grid)
|    return table.float().unsqueeze(0)
|
|
|def _the_same(copies: list[LazyTensor], name: str) -> LazyTensor:
|    def read() -> Tensor:
|        first = copies[0].read()
|        for i, copy in enumerate(copies):
|            if i and not torch.equal(first, copy.read()):
|                raise UserError(
|                    f"{name} differs between block 0 and block {i}: a DiT has one timestep and "
|                    "one label embedder for all blocks"
|                )
|        return first
|
|    return LazyTensor(copies[0].shape, copies[0].dtype, read)
|
|
|def _stacked(parts: list[LazyTensor]) -> LazyTensor:
|    rows = sum(part.shape[0] for part in parts)
|    shape = (rows, *parts[0].shape[1:])
|    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))
|
|
|def _third(qkv: LazyTensor, part: int) -> LazyTensor:
|    rows = qkv.shape[0] // 3
|    shape = (rows, *qkv.shape[1:])
|    return LazyTensor(shape, qkv.dtype, lambda: qkv.read()[part * rows : (part + 1) * rows])
'''
MODULES[PACKAGE + '.formats.weights'] = r'''
|"""Weight files, opened without being read and written tensor by tensor.
|
|A state dict here is a mapping from names to :class:`LazyTensor`, so that converting a model holds
|one of its tensors in memory at a time, however large it is. Files are safetensors, single or
|sharded with an index, or what ``torch.save`` writes; a pickle in the latter is never run.
|"""
|
|import argparse
|import io
|import json
|import pickle
|import re
|import warnings
|import zipfile
|from collections import OrderedDict
|from collections.abc import Callable, Mapping
|from dataclasses import dataclass
|from functools import partial
|from pathlib import Path
|from typing import Any, cast
|
|import torch
|from safetensors import SafetensorError, safe_open
|from torch import Tensor
|
|from ..errors import UserError
|
|PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
|# By how wide they are: a file begins with the widest, so that every tensor in it is aligned.
|DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
|# Where training scripts put a state dict among other things: averaged weights, then raw ones.
|ENTRIES = {"averaged": ("ema", "model", "state_dict"), "raw": ("model", "state_dict")}
|WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
|ALIGNMENT = 64  # bytes, as torch.save
|
|
|@dataclass(frozen=True)
|class LazyTensor:
|    """A tensor that is read when asked for, and then given away."""
|
|    shape: tuple[int, ...]
|    dtype: torch.dtype
|    read: Callable[[], Tensor]
|
|    @property
|    def nbytes(self) -> int:
|        """Bytes of its values."""
|        return torch.Size(self.shape).numel() * self.dtype.itemsize
|
|    def to(self, dtype: torch.dtype) -> "LazyTensor":
|        """The same, converted when it is read."""
|        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))
|
|
|State = Mapping[str, LazyTensor]
|
|
|def lazy(tensor: Tensor) -> LazyTensor:
|    """A tensor already in memory."""
|    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
|
|
|def open_weights(file: Path, entry: str = "averaged") -> dict[str, LazyTensor]:
|    """The state dict in a weight file.
|
|    Args:
|        file: ``.safetensors``, ``.index.json`` of a sharded file, or a file of ``torch.save``.
|        entry: ``"averaged"`` or ``"raw"``: which one of a file that holds both.
|
|    Raises:
|        UserError: when it is missing, damaged, no such file, or a pickle that would run code.
|    """
|    if not file.is_file():
|        raise UserError(f"weights {file} do not exist")
|    if file.name.endswith(".index.json"):
|        return _open_shards(file, entry)
|    if file.suffix == ".safetensors":
|        return _open_safetensors(file)
|    if file.suffix in PICKLES:
|        return _open_torch(file, entry)
|    raise UserError(f"{file} is no weight file; give .safetensors or one of {', '.join(PICKLES)}")
|
|
|def _open_shards(index: Path, entry: str) -> dict[str, LazyTensor]:
|    try:
|        shards = json.loads(index.read_text())["weight_map"]
|        names = sorted(set(shards.values()))
|        opened = {name: open_weights(index.parent / Path(name).name, entry) for name in names}
|    except (ValueError, KeyError, TypeError, AttributeError):
|        raise UserError(f"{index} is not the index of a sharded file") from None
|    if missing := [key for key, name in shards.items() if key not in opened[name]]:
|        raise UserError(f"{index} names {missing[0]}, which {shards[missing[0]]} does not hold")
|    return {key: opened[name][key] for key, name in shards.items()}
|
|
|def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
|    state = {}
|    try:
|        with safe_open(file, framework="pt") as opened:
|            for name in opened.keys():  # noqa: SIM118 - not a dictionary
|                header = opened.get_slice(name)
|                if (kind := header.get_dtype()) not in DTYPES:
|                    raise UserError(f"{file}: {name} is {kind}; weights are {', '.join(DTYPES)}")
|                read = partial(_read_safetensors, file, name)
|                state[name] = LazyTensor(tuple(header.get_shape()), DTYPES[kind], read)
|    except (SafetensorError, OSError) as error:
|        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
|    return state
|
|
|def _read_safetensors(file: Path, name: str) -> Tensor:
|    # Opened anew each time: a mapping that stays would keep all that was read resident.
|    with safe_open(file, framework="pt") as opened:
|        return opened.get_tensor(name)
|
|
|def _open_torch(file: Path, entry: str) -> dict[str, LazyTensor]:
|    zipped = zipfile.is_zipfile(file)
|    state = find_state(_unpickle(file, "meta" if zipped else "cpu"), entry)
|    if not state:
|        raise UserError(
|            f"{file} holds no state dict; one is expected as it is, or as its entry "
|            + " or ".join(ENTRIES["averaged"])
|        )
|    known = DTYPES.values()
|    if wrong := [f"{key} is {t.dtype}" for key, t in state.items() if t.dtype not in known]:
|        raise UserError(f"{file}: {wrong[0]}; weights are {', '.join(DTYPES)}")
|    if not zipped:  # of torch before 1.6: read whole
|        return {key: lazy(tensor) for key, tensor in state.items()}
|    records = _records(file)
|    opened = {}
|    for key, tensor in state.items():
|        record = records[cast(int, tensor.untyped_storage()._checkpoint_offset)]
|        read = partial(_read_record, file, record, tensor)
|        opened[key] = LazyTensor(tuple(tensor.shape), tensor.dtype, read)
|    return opened
|
|
|def _unpickle(file: Path, location: str) -> Any:
|    """What ``torch.save`` wrote, without its code; on ``"meta"`` without its data either."""
|    # Training scripts store their arguments beside the weights: a plain bag of values.
|    harmless = torch.serialization.safe_globals([argparse.Namespace])
|    try:
|        with harmless, warnings.catch_warnings():
|            warnings.simplefilter("ignore")  # about protocols, before it fails
|            return torch.load(file, map_location=location, weights_only=True)
|    except pickle.UnpicklingError as error:
|        if found := re.search(r"GLOBAL (\S+)", str(error)):
|            raise UserError(
|                f"{file} is a pickle that would run code ({found[1]}) and is not opened; if you "
|                "trust its source, save its state dict alone and give that"
|            ) from None
|        raise UserError(f"{file} is damaged, or no file of torch.save") from None
|    except Exception:  # a torn pickle fails in any way
|        raise UserError(f"{file} is truncated or damaged; get it again") from None
|
|
|def find_state(entries: Any, entry: str) -> dict[str, Tensor]:
|    """The state dict in a loaded checkpoint, without wrappers' prefixes; empty where none is."""
|    if not isinstance(entries, Mapping):
|        return {}
|    for name in ENTRIES[entry]:
|        if isinstance(entries.get(name), Mapping):
|            entries = entries[name]
|            break
|    state = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
|    for prefix in WRAPPERS:
|        if state and all(key.startswith(prefix) for key in state):
|            state = {key.removeprefix(prefix): value for key, value in state.items()}
|    return state
|
|
|def _records(file: Path) -> dict[int, zipfile.ZipInfo]:
|    """Members of the archive by where their data begin: behind 30 bytes, a name and a field."""
|    records = {}
|    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
|        for record in archive.infolist():
|            raw.seek(record.header_offset + 26)
|            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
|            records[record.header_offset + 30 + name + extra] = record
|    return records
|
|
|def _read_record(file: Path, record: zipfile.ZipInfo, meta: Tensor) -> Tensor:
|    try:
|        with zipfile.ZipFile(file) as archive:
|            values = bytearray(archive.read(record))  # checks them against their CRC
|    except (zipfile.BadZipFile, OSError, EOFError):
|        raise UserError(f"{file} is damaged: {record.filename} fails its checksum") from None
|    storage = torch.frombuffer(values, dtype=meta.dtype)
|    return storage.as_strided(meta.shape, meta.stride(), meta.storage_offset())
|
|
|def write_safetensors(
|    file: Path, state: State, on_written: Callable[[], Any] = lambda: None
|) -> None:
|    """Write a state dict as safetensors, one tensor in memory at a time.
|
|    Args:
|        file: where to write.
|        state: what to write.
|        on_written: called after each tensor.
|    """
|    names = {dtype: name for name, dtype in DTYPES.items()}
|    ordered = sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
|    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
|    end = 0
|    for key, tensor in ordered:
|        start, end = end, end + tensor.nbytes
|        header[key] = dict(
|            dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end]
|        )
|    text = json.dumps(header, separators=(",", ":")).encode()
|    text += b" " * (-len(text) % 8)
|    with file.open("wb") as out:
|        out.write(len(text).to_bytes(8, "little") + text)
|        for _, tensor in ordered:
|            out.write(values(tensor))
|            on_written()
|
|
|def write_torch(file: Path, state: State, on_written: Callable[[], Any] = lambda: None) -> None:
|    """Write a state dict as ``torch.save`` does, one tensor in memory at a time.
|
|    ``torch.load`` opens it, also with ``weights_only=True`` and ``mmap=True``.
|    """
|    description = io.BytesIO()
|    pickler = _StatePickler(description)
|    pickler.dump(OrderedDict(state))
|    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
|        _write_record(archive, "data.pkl", description.getvalue())
|        _write_record(archive, "byteorder", b"little")
|        for number, tensor in enumerate(pickler.tensors):
|            _write_record(archive, f"data/{number}", values(tensor))
|            on_written()
|        _write_record(archive, "version", b"3\n")
|
|
|class _Storage:
|    """Stands for the data of a tensor in the pickle of ``torch.save``."""
|
|    def __init__(self, key: int, tensor: LazyTensor):
|        kind = torch.storage._dtype_to_storage_type_map()[tensor.dtype]
|        numel = torch.Size(tensor.shape).numel()
|        self.identity = ("storage", getattr(torch, kind), str(key), "cpu", numel)
|
|
|class _StatePickler(pickle.Pickler):
|    """The pickle that describes a state dict in a file of ``torch.save``, its format since 1.6."""
|
|    def __init__(self, out: io.BytesIO):
|        super().__init__(out, protocol=2)
|        self.tensors: list[LazyTensor] = []
|
|    def persistent_id(self, obj: Any) -> Any:
|        return obj.identity if isinstance(obj, _Storage) else None
|
|    def reducer_override(self, obj: Any) -> Any:
|        if not isinstance(obj, LazyTensor):
|            return NotImplemented
|        storage = _Storage(len(self.tensors), obj)
|        self.tensors.append(obj)
|        stride = torch.empty(obj.shape, device="meta").stride()
|        arguments: tuple = (storage, 0, obj.shape, stride, False, OrderedDict())
|        return torch._utils._rebuild_tensor_v2, arguments
|
|
|def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
|    record = zipfile.ZipInfo(f"archive/{name}")
|    assert archive.fp is not None
|    before = archive.fp.tell() + 30 + len(record.filename) + 4
|    padding = -before % ALIGNMENT
|    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
|    archive.writestr(record, data)  # type: ignore[arg-type]
|
|
|def values(tensor: LazyTensor) -> memoryview:
|    """The bytes of a tensor's values, row by row."""
|    flat = tensor.read().contiguous().reshape(-1)
|    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
'''
MODULES[PACKAGE + '.kernels'] = r'''
|"""Fast implementations of ``moh_dit.attention`` and ``moh_dit.modulation``, held to those."""
|
|from importlib.util import find_spec
|
|import torch
|from torch import Tensor
|
|from ..errors import UserError
|from .gathered import attend_gathered
|from .table import auto_backend, auto_cpu_backend, auto_modulation_backend
|
|BACKENDS = ("auto", "reference", "gathered", "triton")
|MODULATION_BACKENDS = ("auto", "reference", "triton")
|MLP_BACKENDS = ("auto", "reference")
|LAYER_NORM_EPSILON = 1e-6  # of adaLN (DiT's code)
|# Of torch operators: torch has one of a name, and code beside weights may be of another version.
|NAMESPACE = __name__.partition(".")[0]
|
|__all__ = [
|    "BACKENDS",
|    "LAYER_NORM_EPSILON",
|    "MLP_BACKENDS",
|    "MODULATION_BACKENDS",
|    "NAMESPACE",
|    "adaln_triton",
|    "attend_gathered",
|    "check_choice",
|    "choose_backend",
|    "choose_modulation_backend",
|    "moh_attention_triton",
|]
|
|
|def choose_backend(
|    backend: str, projected: Tensor, heads: int, shared: int, active: int, head_dim: int
|) -> str:
|    """The backend that will run: the one asked for, checked, or for "auto" the table's choice."""
|    _check("attention_backend", backend, BACKENDS, projected)
|    if backend != "auto":
|        return backend
|    if projected.device.type == "cpu" and projected.numel() > 0:
|        return auto_cpu_backend(projected.shape[1], heads, shared, active)
|    return auto_backend(capability(projected), projected.dtype, head_dim)
|
|
|def choose_modulation_backend(
|    backend: str,
|    x: Tensor,
|    shift: Tensor,
|    scale: Tensor,
|    gate: Tensor | None,
|    branch: Tensor | None,
|) -> str:
|    """As :func:`choose_backend`, for :func:`moh_dit.modulation.adaln`."""
|    _check("modulation_backend", backend, MODULATION_BACKENDS, x)
|    if backend == "auto":
|        backend = auto_modulation_backend(capability(x), scale.dtype)
|        return backend if _fits(x, shift, scale, gate, branch) else "reference"
|    if backend == "triton" and not _fits(x, shift, scale, gate, branch):
|        raise UserError(
|            'modulation_backend "triton" takes shift, scale and gate of (B, 1, C) for a stream and '
|            f'branch of (B, N, C), here {tuple(x.shape)}; use "auto"'
|        )
|    return backend
|
|
|def _fits(
|    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, branch: Tensor | None
|) -> bool:
|    """Whether shapes are those that the kernels take, without any broadcasting."""
|    parts = [part for part in (shift, scale, gate) if part is not None]
|    of_image = (x.shape[0], 1, x.shape[2])
|    return all(part.shape == of_image for part in parts) and (
|        branch is None or branch.shape == x.shape
|    )
|
|
|def check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
|    """Raise ``UserError`` unless ``setting`` has a known value."""
|    if value not in known:
|        raise UserError(f"{setting} is {value!r}; choose one of {', '.join(known)}")
|
|
|def _check(setting: str, backend: str, backends: tuple[str, ...], x: Tensor) -> None:
|    check_choice(setting, backend, backends)
|    if backend != "triton":
|        return
|    if not _installed():
|        raise UserError(f'{setting} "triton" needs Triton: pip install triton, or "auto"')
|    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
|        raise UserError(
|            f'{setting} "triton" has no kernels for {x.dtype}; use float32, float16 or bfloat16, '
|            'or the backend "auto"'
|        )
|    if not (x.is_cuda or _interpreted()):
|        raise UserError(f'{setting} "triton" needs a GPU, the input is on {x.device}; use "auto"')
|
|
|def capability(x: Tensor) -> tuple[int, int] | None:
|    """NVIDIA's, where Triton can run."""
|    return _capability_of(x.device.index) if x.is_cuda and not torch.version.hip else None
|
|
|@torch.compiler.assume_constant_result
|def _capability_of(device: int) -> tuple[int, int] | None:
|    return torch.cuda.get_device_capability(device) if _installed() else None
|
|
|@torch.compiler.assume_constant_result
|def _installed() -> bool:
|    return find_spec("triton") is not None
|
|
|@torch.compiler.assume_constant_result
|def _interpreted() -> bool:
|    import triton
|
|    return triton.knobs.runtime.interpret
|
|
|def moh_attention_triton(
|    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
|) -> tuple[Tensor, Tensor | None]:
|    """The Triton backend of :func:`moh_dit.attention.moh_attention`."""
|    from .ops import moh_attention_triton as run  # Triton is imported where it runs
|
|    return run(projected, heads, shared, active, head_dim)
|
|
|def adaln_triton(
|    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
|) -> tuple[Tensor, Tensor]:
|    """The Triton backend of :func:`moh_dit.modulation.adaln`."""
|    from .triton_adaln import AdaLN
|
|    return AdaLN.apply(x, gate, branch, shift, scale)
'''
MODULES[PACKAGE + '.kernels.gathered'] = r'''
|"""CPU: shared heads in one dense attention, routed heads over the queries that selected them."""
|
|import torch
|import torch.nn.functional as F
|from torch import Tensor
|
|
|def attend_gathered(
|    query: Tensor,
|    key: Tensor,
|    value: Tensor,
|    gates: Tensor,
|    shared: int,
|    mask: Tensor | None = None,
|    is_causal: bool = False,
|) -> Tensor:
|    """Gated attention output (B, N, h·d) that leaves unselected queries uncomputed.
|
|    Args:
|        query, key, value: (B, h, N, d), of keys and values (B, h, M, d).
|        gates: (B, N, h), zero where a head is not selected.
|        shared: heads 0 … shared-1 are computed for every token.
|        mask, is_causal: one of torch's masks, broadcastable to (B, h, N, M), or its flag (N = M).
|
|    The lists of an image's routed heads are padded to the longest among them, so time follows the
|    busiest head.
|    """
|    batch, heads, tokens, width = query.shape
|    gates = gates.transpose(1, 2).to(query.dtype)  # (B, h, N)
|    # Split, not sliced: the gradient of a split is one concatenation.
|    (query0, query), (key0, key), (value0, value), (gates0, gates) = (
|        tensor.split([shared, heads - shared], dim=1) for tensor in (query, key, value, gates)
|    )
|    mask0 = None
|    if is_causal:  # the shared heads keep the flag, which is faster than a mask
|        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
|        mask = mask.expand(batch, heads - shared, -1, -1)
|    elif mask is not None:
|        mask = mask.expand(batch, heads, tokens, key.shape[2])
|        mask0, mask = mask.split([shared, heads - shared], dim=1)
|    output = query.new_zeros(batch, tokens, heads, width)
|    if shared:
|        dense = F.scaled_dot_product_attention(query0, key0, value0, mask0, is_causal=is_causal)
|        output[:, :, :shared] = (dense * gates0.unsqueeze(-1)).transpose(1, 2)
|    if shared < heads:
|        chosen = gates.detach() != 0
|        longest = max(1, int(chosen.sum(-1).max()))
|        # Selected tokens first, in token order (stable), each list cut at the longest.
|        slots = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
|        rows = slots.unsqueeze(-1).expand(-1, -1, -1, width)
|        if mask is not None:
|            mask = mask.gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, key.shape[2]))
|        some = F.scaled_dot_product_attention(query.gather(2, rows), key, value, mask)
|        # Beyond a head's own list stand unselected tokens, whose gate makes them write zeros.
|        some = some * gates.gather(2, slots).unsqueeze(-1)
|        output[:, :, shared:].scatter_(1, rows.transpose(1, 2), some.transpose(1, 2))
|    return output.flatten(2)
'''
MODULES[PACKAGE + '.kernels.linear_gelu'] = r'''
|"""A linear layer and the GELU (tanh) of its result as one product: the epilogue of cuBLASLt.
|
|In evaluation without gradients alone: the backward pass needs what the layer gave before its GELU,
|and a pass that is only repeated with gradients should round as that one does.
|"""
|
|import torch
|import torch.nn.functional as F
|from torch import Tensor, nn
|
|from . import NAMESPACE, capability
|from .table import GPU_DTYPES, GPU_LINEAR_GELU
|
|
|@torch.library.custom_op(f"{NAMESPACE}::linear_gelu", mutates_args=())
|def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
|    """``gelu(x Wᵀ + b)`` of x (…, C) and weight (M, C): (…, M) in the dtype of x.
|
|    An operator because torch.compile would take the product and its epilogue apart.
|    """
|    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
|    return rows.unflatten(0, x.shape[:-1])
|
|
|@linear_gelu.register_kernel("cpu")
|def _(x, weight, bias):  # where torch's own would take the GELU without tanh
|    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
|
|
|@linear_gelu.register_fake
|def _(x, weight, bias):
|    return x.new_empty(*x.shape[:-1], weight.shape[0])
|
|
|def takes_linear_gelu(x: Tensor, linear: nn.Module) -> bool:
|    """Whether it was measured to pay for these, and ``linear`` is no more than its weights.
|
|    Adapters, quantisers, sharding and offloading put something else in the layer's or its weight's
|    place, or wait for a call of the layer: accelerate and diffusers by hooks that replace
|    ``forward``, which torch.compile sees by their names alone.
|    """
|    return (
|        not (linear.training or torch.is_grad_enabled())
|        and capability(x) in GPU_LINEAR_GELU
|        and x.dtype in GPU_DTYPES
|        and type(linear) is nn.Linear
|        and type(linear.weight) is nn.Parameter
|        and linear.bias is not None
|        and (x.dtype, x.device) == (linear.weight.dtype, linear.weight.device)
|        and "forward" not in linear.__dict__
|        and not (hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook"))
|        and not (linear._forward_hooks or linear._forward_pre_hooks)
|    )
'''
MODULES[PACKAGE + '.kernels.ops'] = r'''
|"""The Triton kernels as two torch operators, one forward and one backward, with shapes for tracing.
|
|One tensor goes in: ``projected`` (B, N, 3·h·d + router columns), contiguous: queries, keys, values,
|then the router logits of shared heads (s), routed heads (E) and the two stages (2, where both kinds
|exist), then padding that nobody reads. Its gradient has the same layout, so a single matrix product
|makes all of it and a single one takes its gradient back.
|"""
|
|import math
|
|import torch
|from torch import Tensor
|from triton.tools.tensor_descriptor import TensorDescriptor
|
|from . import NAMESPACE, capability, triton_backward, triton_forward, triton_routing
|from .sizes import cdiv, head_split, power_of_2
|from .table import launch_configuration
|
|
|def _launch(kernel, projected, heads, shared, head_dim, config) -> tuple[dict, dict]:
|    """Launch configuration (the table's, unless given) and the other compile-time constants."""
|    tokens = projected.shape[1]
|    d0, d1 = head_split(head_dim)
|    config = dict(config or launch_configuration(kernel, projected, head_dim))
|    # The copy engine wants every stride, those of (B, h, N) float32 too, to be 16 bytes' multiple.
|    size = projected.element_size()
|    aligned = not (head_dim * size % 16 or projected.shape[2] * size % 16 or tokens % 4)
|    aligned = aligned and projected.data_ptr() % 16 == 0 and projected.numel() > 0
|    config["TMA"] = config["TMA"] and aligned
|    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
|    tf32 = tf32 and projected.dtype == torch.float32
|    constants = dict(
|        H=heads, S=shared, D=head_dim, D0=d0, D1=d1, STRIDE=projected.shape[2],
|        EVEN_KEYS=tokens % config["BN"] == 0, EVEN_QUERIES=tokens % config["BM"] == 0,
|        PRECISION="tf32" if tf32 else "ieee",
|        scale_log2=math.log2(math.e) / math.sqrt(head_dim),
|    )  # fmt: skip
|    return config, constants
|
|
|def _early(projected: Tensor, head_dim: int, config: dict | None = None) -> dict:
|    """Launch options of kernels that start while the one before them runs (from Hopper on)."""
|    config = config or launch_configuration("attend", projected, head_dim)
|    early = config.get("EARLY", False) and (capability(projected) or (0, 0)) >= (9, 0)
|    return dict(EARLY=True, launch_pdl=True) if early else dict(EARLY=False)
|
|
|def _query_tiles(tokens: int, heads: int, shared: int, config: dict) -> int:
|    routed_tiles = cdiv(tokens, config["BM_ROUTED"])
|    return shared * cdiv(tokens, config["BM"]) + (heads - shared) * routed_tiles
|
|
|def _blocks(tensor: Tensor, heads: int, head_dim: int, block: int, tma: bool) -> tuple:
|    """Copy-engine views (B, N, heads, d) of both parts of a head; rows lie a token apart."""
|    if not tma:
|        return None, None
|    batch, tokens, stride = tensor.shape
|    shape, strides = [batch, tokens, heads, head_dim], [tokens * stride, stride, head_dim, 1]
|    return tuple(
|        TensorDescriptor(tensor, shape, strides, [1, block, 1, width]) if width else None
|        for width in head_split(head_dim)
|    )
|
|
|def _row_blocks(rows: Tensor, block: int, tma: bool) -> TensorDescriptor | None:
|    return TensorDescriptor.from_tensor(rows, [1, 1, block]) if tma else None
|
|
|def run_route(projected, heads, shared, active, head_dim, tile=32, num_warps=2):
|    """Gates (B, h, N) float32, index (B, E, N), count (B, E) int32; stats (B, 2, E) per image."""
|    batch, tokens, stride = projected.shape
|    routed = heads - shared
|    early = _early(projected, head_dim)
|    new = projected.new_empty
|    gates = new(batch, heads, tokens, dtype=torch.float32)
|    index = new(batch, routed, tokens, dtype=torch.int32)
|    count = new(batch, routed, dtype=torch.int32)
|    stats = new(batch, 2, routed, dtype=torch.float32)
|    tiles = cdiv(tokens, tile)
|    score_sums = new(batch, tiles, routed, dtype=torch.float32)
|    triton_routing.route[(tiles, batch)](
|        projected, gates, score_sums, tokens, H=heads, S=shared, K=active, D=head_dim,
|        STRIDE=stride, H_PAD=power_of_2(heads), TOKENS=tile, EARLY=early["EARLY"],
|        num_warps=num_warps,
|    )  # fmt: skip
|    if routed:
|        triton_routing.list_tokens[(routed, batch)](
|            gates, score_sums, index, count, stats, tokens, tiles, H=heads, S=shared,
|            CHUNK=min(1024, max(16, power_of_2(tokens))), num_warps=4, **early,
|        )  # fmt: skip
|    return gates, index, count, stats
|
|
|def run_attend(
|    projected, gates, index, count, image_stats, out, stats, shared, head_dim, config=None
|):
|    """Write ``out`` (B, N, h·d), ``stats`` (2, E); return lse (B, h, N), base 2, where selected."""
|    batch, tokens, _ = projected.shape
|    heads = gates.shape[1]
|    lse = torch.empty_like(gates)
|    config, constants = _launch("attend", projected, heads, shared, head_dim, config)
|    # p·v may be as narrow as 8 columns, where the copy engine (16 at least) does not load them.
|    tail = max(8, power_of_2(head_dim - constants["D0"]))
|    tail = constants["D1"] if constants["D1"] and config["TMA"] else tail
|    tiles = _query_tiles(tokens, heads, shared, config)
|    triton_forward.attend[(tiles, batch)](
|        projected, *_blocks(projected, 3 * heads, head_dim, config["BN"], config["TMA"]),
|        gates, index, count, out, lse, image_stats, stats, tokens, constants.pop("scale_log2"),
|        E_PAD=power_of_2(max(1, 2 * (heads - shared))), V1=tail, **constants,
|        **config | _early(projected, head_dim, config),
|    )  # fmt: skip
|    return lse
|
|
|def run_query_gradient(
|    projected, grad_out, out, gates, lse, index, count, grad_projected, shared, head_dim,
|    config=None,
|):  # fmt: skip
|    """Write dq into ``grad_projected``; return δ (B, h, N), defined where selected."""
|    batch, tokens, _ = projected.shape
|    heads = gates.shape[1]
|    delta = torch.empty_like(gates)
|    config, constants = _launch("query_gradient", projected, heads, shared, head_dim, config)
|    triton_backward.query_gradient[(_query_tiles(tokens, heads, shared, config), batch)](
|        projected, *_blocks(projected, 3 * heads, head_dim, config["BN"], config["TMA"]),
|        grad_out, out, gates, lse, delta, index, count, grad_projected, tokens,
|        1 / math.sqrt(head_dim), constants.pop("scale_log2"), **constants, **config,
|    )  # fmt: skip
|    return delta
|
|
|def run_key_value_gradient(
|    projected, grad_out, lse, delta, index, count, grad_projected, shared, head_dim, config=None
|):
|    """Write dk and dv into ``grad_projected``."""
|    batch, tokens, _ = projected.shape
|    heads = lse.shape[1]
|    config, constants = _launch("key_value_gradient", projected, heads, shared, head_dim, config)
|    block, tma = config["BM"], config["TMA"]
|    tiles = heads * cdiv(tokens, config["BN"])
|    triton_backward.key_value_gradient[(tiles, batch)](
|        projected, *_blocks(projected, 3 * heads, head_dim, block, tma),
|        *_blocks(grad_out, heads, head_dim, block, tma), _row_blocks(lse, block, tma),
|        _row_blocks(delta, block, tma), grad_out, lse, delta, index, count, grad_projected, tokens,
|        1 / math.sqrt(head_dim), constants.pop("scale_log2"), **constants, **config,
|    )  # fmt: skip
|
|
|def run_route_backward(
|    projected, gates, delta, grad_stats, grad_projected, shared, head_dim, tile=32, num_warps=2
|):
|    """Write the gradients of the router logits into ``grad_projected``."""
|    batch, tokens, stride = projected.shape
|    heads = gates.shape[1]
|    triton_routing.route_backward[(cdiv(tokens, tile), batch)](
|        projected, gates, delta, grad_stats, grad_projected, tokens, H=heads, S=shared, D=head_dim,
|        STRIDE=stride, H_PAD=power_of_2(heads),
|        TAIL=power_of_2(max(1, stride - 3 * heads * head_dim - heads)),
|        TOKENS=tile, num_warps=num_warps,
|    )  # fmt: skip
|
|
|@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
|def attention_op(
|    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
|) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
|    """Gated output (B, N, h·d), router stats (2, E); gates, lse, index, count for backward."""
|    projected = projected.contiguous()
|    out = projected.new_empty(*projected.shape[:2], heads * head_dim)
|    with torch.cuda.device_of(projected):  # Triton launches on the current one
|        gates, index, count, image_stats = run_route(projected, heads, shared, active, head_dim)
|        stats = gates.new_empty(2, heads - shared)
|        lse = run_attend(projected, gates, index, count, image_stats, out, stats, shared, head_dim)
|    return out, stats, gates, lse, index, count
|
|
|@attention_op.register_fake
|def _(projected, heads, shared, active, head_dim):
|    batch, tokens, _ = projected.shape
|    routed = heads - shared
|    new = projected.new_empty
|    return (
|        new(batch, tokens, heads * head_dim),
|        new(2, routed, dtype=torch.float32),
|        new(batch, heads, tokens, dtype=torch.float32),
|        new(batch, heads, tokens, dtype=torch.float32),
|        new(batch, routed, tokens, dtype=torch.int32),
|        new(batch, routed, dtype=torch.int32),
|    )
|
|
|@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
|def attention_backward_op(
|    grad_out: Tensor,
|    grad_stats: Tensor,
|    projected: Tensor,
|    out: Tensor,
|    gates: Tensor,
|    lse: Tensor,
|    index: Tensor,
|    count: Tensor,
|    shared: int,
|    head_dim: int,
|) -> Tensor:
|    """Gradient of ``projected``; the same bits in every run (no atomic additions)."""
|    grad_out, grad_stats, projected = (
|        grad_out.contiguous(),
|        grad_stats.contiguous(),
|        projected.contiguous(),
|    )
|    if grad_out.data_ptr() % 16:  # a part of something else, which the copy engine cannot read
|        grad_out = grad_out.clone()
|    grad_projected = torch.empty_like(projected)
|    with torch.cuda.device_of(projected):
|        delta = run_query_gradient(
|            projected, grad_out, out, gates, lse, index, count, grad_projected, shared, head_dim
|        )
|        run_key_value_gradient(
|            projected, grad_out, lse, delta, index, count, grad_projected, shared, head_dim
|        )
|        run_route_backward(projected, gates, delta, grad_stats, grad_projected, shared, head_dim)
|    return grad_projected
|
|
|@attention_backward_op.register_fake
|def _(grad_out, grad_stats, projected, out, gates, lse, index, count, shared, head_dim):
|    return torch.empty_like(projected, memory_format=torch.contiguous_format)
|
|
|def _save(ctx, inputs, output):
|    projected, _, ctx.shared, _, ctx.head_dim = inputs
|    out, stats, gates, lse, index, count = output
|    ctx.save_for_backward(projected, out, gates, lse, index, count)
|    ctx.mark_non_differentiable(gates, lse, index, count)
|    ctx.stats_shape = stats.shape
|
|
|def _backward(ctx, grad_out, grad_stats, *_):
|    projected, out, gates, lse, index, count = ctx.saved_tensors
|    if grad_out is None:
|        grad_out = torch.zeros_like(out)
|    if grad_stats is None:
|        grad_stats = gates.new_zeros(ctx.stats_shape)
|    grad = attention_backward_op(
|        grad_out, grad_stats, projected, out, gates, lse, index, count, ctx.shared, ctx.head_dim
|    )
|    return grad, None, None, None, None
|
|
|attention_op.register_autograd(_backward, setup_context=_save)
|
|
|def moh_attention_triton(
|    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
|) -> tuple[Tensor, Tensor | None]:
|    """The Triton backend of :func:`moh_dit.attention.moh_attention`."""
|    out, stats, *_ = attention_op(projected, heads, shared, active, head_dim)
|    return out, stats if active else None
'''
MODULES[PACKAGE + '.kernels.sizes'] = r'''
|"""Integer arithmetic of launches. Triton's own helpers are made for its compiler and slow here."""
|
|
|def cdiv(a: int, b: int) -> int:
|    """⌈a / b⌉."""
|    return -(-a // b)
|
|
|def power_of_2(n: int) -> int:
|    """The least that is at least ``n``."""
|    return 1 << max(0, n - 1).bit_length()
|
|
|def power_of_2_up_to(n: int) -> int:
|    """The greatest that is at most ``n``."""
|    return 1 << (n.bit_length() - 1)
|
|
|def head_split(head_dim: int) -> tuple[int, int]:
|    """``(D0, D1)``: a power of two and the padded rest, D1 0 or at least 16 (matrix units' k)."""
|    main = max(16, power_of_2_up_to(head_dim))
|    rest = head_dim - main
|    return main, max(16, power_of_2(rest)) if rest > 0 else 0
'''
MODULES[PACKAGE + '.kernels.table'] = r'''
|"""Measured choices, as data (NVIDIA H200, torch 2.11, triton 3.6; ``benchmarks/tune.py``).
|
|Every configuration was timed and held against float64 on the chip (``docs/performance.md``);
|``benchmarks/check_kernels.py`` repeats the latter.
|"""
|
|import torch
|
|
|def _block(bm, bm_routed, bn, stages, tma=False, **more) -> dict:
|    return dict(BM=bm, BM_ROUTED=bm_routed, BN=bn, TMA=tma, num_warps=4, num_stages=stages, **more)
|
|
|# Fastest found, by (kernel, padded width of a head's tail): rows of (first N it holds for,
|# configuration). The 72-wide heads have a tail, the 64-wide ones none. ``EARLY``: attend and what
|# routes for it start while the kernel before them runs; 72 wide, that is slower from 512 tokens on.
|LAUNCH: dict[tuple[str, bool], list[tuple[int, dict]]] = {
|    ("attend", True): [
|        (512, _block(128, 128, 64, 3, tma=True)),
|        (0, _block(128, 64, 32, 3, EARLY=True)),
|    ],
|    ("attend", False): [
|        (2048, _block(64, 64, 128, 2, tma=True)),
|        (0, _block(64, 64, 64, 3, EARLY=True)),
|    ],
|    ("query_gradient", True): [
|        (2048, _block(64, 64, 64, 3)),
|        (0, _block(64, 64, 32, 3, tma=True)),
|    ],
|    ("query_gradient", False): [(0, _block(64, 64, 32, 3))],
|    ("key_value_gradient", True): [
|        (2048, _block(64, 32, 64, 3)),
|        (512, _block(32, 32, 64, 3, tma=True, maxnreg=168)),
|        (0, _block(32, 32, 64, 2, tma=True, maxnreg=168)),
|    ],
|    ("key_value_gradient", False): [
|        (2048, _block(64, 64, 64, 3, tma=True)),
|        (0, _block(32, 32, 64, 3, tma=True)),
|    ],
|}
|# Untuned, for what ``auto`` never takes: float32 and other head widths.
|PLAIN = _block(32, 32, 32, 1)
|TUNED_HEAD_DIMS = (64, 72)
|
|
|def launch_configuration(kernel: str, projected: torch.Tensor, head_dim: int) -> dict:
|    """Block sizes, warps and pipeline stages of one kernel for this input."""
|    tokens = projected.shape[1]
|    if projected.dtype == torch.float32 or head_dim not in TUNED_HEAD_DIMS:
|        return dict(PLAIN)
|    rows = LAUNCH[kernel, head_dim not in (64,)]
|    return dict(next(config for first, config in rows if tokens >= first))
|
|
|# Where ``auto`` takes which backend. GPU: by compute capability and head width, as far as measured
|# and verified; anything else takes "reference", that is dense attention and a multiplication by
|# gates: eager, that was slower at every size, also in layers whose every head is shared.
|GPU_BACKENDS: dict[tuple[int, int], dict[int, str]] = {
|    (9, 0): {64: "triton", 72: "triton"},
|}
|GPU_DTYPES = (torch.bfloat16, torch.float16)
|# The same of adaLN, whatever the width of the model.
|GPU_MODULATION_BACKENDS: dict[tuple[int, int], str] = {(9, 0): "triton"}
|# Where the MLP's first linear layer takes its GELU along, in evaluation.
|GPU_LINEAR_GELU = {(9, 0)}
|# CPU: gathering pays from this many tokens and up to this share of active heads.
|GATHERED_FROM_TOKENS, GATHERED_UP_TO_SHARE = 256, 0.8
|
|
|def auto_backend(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str:
|    """The fastest backend by measurement; ``capability`` is ``None`` where Triton cannot run."""
|    if capability is None or dtype not in GPU_DTYPES:
|        return "reference"
|    return GPU_BACKENDS.get(capability, {}).get(head_dim, "reference")
|
|
|def auto_cpu_backend(tokens: int, heads: int, shared: int, active: int) -> str:
|    """As :func:`auto_backend`."""
|    pays = tokens >= GATHERED_FROM_TOKENS and shared + active <= GATHERED_UP_TO_SHARE * heads
|    # Its lists are as long as the data make them, which a compiled graph cannot hold.
|    return "gathered" if pays and not torch.compiler.is_compiling() else "reference"
|
|
|def auto_modulation_backend(capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
|    """As :func:`auto_backend`, by the dtype of shift, scale and gate."""
|    if capability is None or dtype not in GPU_DTYPES:
|        return "reference"
|    return GPU_MODULATION_BACKENDS.get(capability, "reference")
'''
MODULES[PACKAGE + '.kernels.triton_adaln'] = r'''
|"""Triton kernels: adaLN (DiT §3.2), each direction in one pass over the tokens.
|
|What ``moh_dit.modulation`` says in plain torch. Compilers read a row that is too long for them to
|keep several times, and once more for every gradient that is a sum over tokens.
|"""
|
|import torch
|import triton
|import triton.language as tl
|from torch import Tensor
|
|from . import LAYER_NORM_EPSILON, NAMESPACE
|from .sizes import cdiv, power_of_2, power_of_2_up_to
|
|
|@triton.jit
|def _load(pointer, mask):
|    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
|
|
|@triton.jit
|def adaln_forward(
|    x, gate, branch, shift, scale, residual, out, statistics, N, modulation_stride, epsilon,
|    C: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
|):  # fmt: skip
|    """residual, out (B, N, C); statistics (2, B, N): mean and 1/σ. Grid (N, B)."""
|    b = tl.program_id(1)
|    columns = tl.arange(0, BLOCK)
|    inside = columns < C
|    of_image = b.to(tl.int64) * modulation_stride + columns
|    row = b.to(tl.int64) * N + tl.program_id(0)
|    values = _load(x + row * C + columns, inside)
|    if RESIDUAL:
|        values += _load(gate + of_image, inside) * _load(branch + row * C + columns, inside)
|        values = values.to(residual.dtype.element_ty)
|        tl.store(residual + row * C + columns, values, mask=inside)
|        values = values.to(tl.float32)
|    mean = tl.sum(values, 0) / C
|    centred = tl.where(inside, values - mean, 0.0)
|    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + epsilon)
|    normal = centred * inverse * (1.0 + _load(scale + of_image, inside))
|    normal += _load(shift + of_image, inside)
|    tl.store(out + row * C + columns, normal.to(out.dtype.element_ty), mask=inside)
|    tl.store(statistics + row, mean)
|    tl.store(statistics + tl.num_programs(1).to(tl.int64) * N + row, inverse)
|
|
|@triton.jit
|def _add_pairs(a, b, c, d):
|    return a + c, b + d
|
|
|@triton.jit
|def _read(
|    x, branch, grad_residual, grad_out, gate, factor, mean, inverse, offsets, mask,
|    RESIDUAL: tl.constexpr,
|):  # fmt: skip
|    """A part of a row: n, dy, the stream's gradient and the branch; sums of dn and dn·n over it."""
|    values = _load(x + offsets, mask)
|    dy = _load(grad_out + offsets, mask)
|    dx = _load(grad_residual + offsets, mask)
|    added = dx
|    if RESIDUAL:  # r again, as the forward pass had it: the branch is read anyway
|        added = _load(branch + offsets, mask)
|        values = (values + gate * added).to(x.dtype.element_ty).to(tl.float32)
|    normal = tl.where(mask, (values - mean) * inverse, 0.0)
|    dn = dy * factor
|    total, total_n = tl.reduce((dn, dn * normal), 0, _add_pairs)
|    return normal, dy, dx, added, total, total_n
|
|
|@triton.jit
|def _write(
|    grad_x, grad_branch, normal, dy, dx, factor, gate, mean_dn, mean_dn_n, inverse,
|    offsets, mask, RESIDUAL: tl.constexpr,
|):  # fmt: skip
|    """Gradients of x, which is returned, and branch of a part of a row."""
|    dx += (dy * factor - mean_dn - normal * mean_dn_n) * inverse
|    tl.store(grad_x + offsets, dx.to(grad_x.dtype.element_ty), mask=mask)
|    if RESIDUAL:
|        tl.store(grad_branch + offsets, (dx * gate).to(grad_branch.dtype.element_ty), mask=mask)
|    return dx
|
|
|@triton.jit
|def _modulation(scale, gate, offsets, mask, RESIDUAL: tl.constexpr):
|    factor = 1.0 + _load(scale + offsets, mask)
|    return factor, _load(gate + offsets, mask) if RESIDUAL else factor
|
|
|@triton.jit
|def _store_sums(
|    part, columns, mask, shift_sum, scale_sum, gate_sum, C: tl.constexpr, RESIDUAL: tl.constexpr
|):
|    tl.store(part + columns, shift_sum, mask=mask)
|    tl.store(part + C + columns, scale_sum, mask=mask)
|    if RESIDUAL:
|        tl.store(part + 2 * C + columns, gate_sum, mask=mask)
|
|
|@triton.jit
|def adaln_backward(
|    x, gate, branch, scale, statistics, grad_residual, grad_out, grad_x, grad_branch, sums,
|    N, modulation_stride,
|    C: tl.constexpr, RESIDUAL: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
|    TOKENS: tl.constexpr, STAGES: tl.constexpr,
|):  # fmt: skip
|    """grad_x, grad_branch (B, N, C); sums (B, ⌈N/TOKENS⌉, 3 or 2, C): this program's part of the
|    gradients of shift, scale and, where there is a branch, gate. Grid (⌈N/TOKENS⌉, B).
|
|    A row is C0 columns, a power of two, and the rest in C1: padded as a whole it would be kept in
|    nearly twice the registers at a width of 1152.
|    """
|    b = tl.program_id(1)
|    of_image = b.to(tl.int64) * modulation_stride
|    columns0 = tl.arange(0, C0)
|    every0 = columns0 < C0
|    factor0, gate0 = _modulation(scale, gate, of_image + columns0, every0, RESIDUAL)
|    shift_sum0 = tl.zeros([C0], tl.float32)
|    scale_sum0 = shift_sum0
|    gate_sum0 = shift_sum0
|    if C1 > 0:
|        columns1 = C0 + tl.arange(0, C1)
|        every1 = columns1 < C
|        factor1, gate1 = _modulation(scale, gate, of_image + columns1, every1, RESIDUAL)
|        shift_sum1 = tl.zeros([C1], tl.float32)
|        scale_sum1 = shift_sum1
|        gate_sum1 = shift_sum1
|    for i in tl.range(TOKENS, num_stages=STAGES):
|        token = tl.program_id(0) * TOKENS + i
|        row = b.to(tl.int64) * N + token
|        mean = _load(statistics + row, token < N)
|        inverse = _load(statistics + tl.num_programs(1).to(tl.int64) * N + row, token < N)
|        offsets0 = row * C + columns0
|        mask0 = every0 & (token < N)
|        n0, dy0, dx0, added0, total, total_n = _read(
|            x, branch, grad_residual, grad_out, gate0, factor0, mean, inverse, offsets0, mask0,
|            RESIDUAL,
|        )  # fmt: skip
|        if C1 > 0:
|            offsets1 = row * C + columns1
|            mask1 = every1 & (token < N)
|            n1, dy1, dx1, added1, more, more_n = _read(
|                x, branch, grad_residual, grad_out, gate1, factor1, mean, inverse, offsets1,
|                mask1, RESIDUAL,
|            )  # fmt: skip
|            total += more
|            total_n += more_n
|        shift_sum0 += dy0
|        scale_sum0 += dy0 * n0
|        dx0 = _write(
|            grad_x, grad_branch, n0, dy0, dx0, factor0, gate0, total / C, total_n / C, inverse,
|            offsets0, mask0, RESIDUAL,
|        )  # fmt: skip
|        if RESIDUAL:
|            gate_sum0 += dx0 * added0
|        if C1 > 0:
|            shift_sum1 += dy1
|            scale_sum1 += dy1 * n1
|            dx1 = _write(
|                grad_x, grad_branch, n1, dy1, dx1, factor1, gate1, total / C, total_n / C, inverse,
|                offsets1, mask1, RESIDUAL,
|            )  # fmt: skip
|            if RESIDUAL:
|                gate_sum1 += dx1 * added1
|    program = (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
|    part = sums + program * ((3 if RESIDUAL else 2) * C)
|    _store_sums(part, columns0, every0, shift_sum0, scale_sum0, gate_sum0, C, RESIDUAL)
|    if C1 > 0:
|        _store_sums(part, columns1, every1, shift_sum1, scale_sum1, gate_sum1, C, RESIDUAL)
|
|
|# Columns of a warp; tokens of a program and stages of its loop in the backward pass. The fastest
|# found at 1152 columns (H200, torch 2.11, triton 3.6; ``benchmarks/adaln.py --tune``).
|FORWARD = 512
|BACKWARD = (16, 512, 3)
|
|
|def run_forward(x, gate, branch, shift, scale, columns_each=FORWARD):
|    """As :func:`adaln_op`."""
|    batch, tokens, width = x.shape
|    gate, shift, scale = _strided_alike(gate, shift, scale)
|    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
|    residual, out, statistics = _results(x, branch, shift)
|    adaln_forward[(tokens, batch)](
|        x, gate, branch, shift, scale, residual, out, statistics, tokens, scale.stride(0),
|        LAYER_NORM_EPSILON, C=width, RESIDUAL=branch is not None, BLOCK=power_of_2(width),
|        num_warps=_warps(width, columns_each),
|    )  # fmt: skip
|    return residual, out, statistics
|
|
|def run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale, config=BACKWARD):
|    """As :func:`adaln_backward_op`."""
|    batch, tokens, width = x.shape
|    tokens_each, columns_each, stages = config
|    gate, scale = _strided_alike(gate, scale)
|    x, grad_residual, grad_out = (t.contiguous() for t in (x, grad_residual, grad_out))
|    branch = None if branch is None else branch.contiguous()
|    grad_x, grad_branch, grad_modulation = _gradients(x, branch, scale)
|    tiles = cdiv(tokens, tokens_each)
|    # Added up afterwards, in a fixed order: the same bits in every run.
|    sums = x.new_empty(batch, tiles, grad_modulation.shape[1], width, dtype=torch.float32)
|    main = power_of_2_up_to(width)
|    rest = power_of_2(width - main) if width > main else 0
|    adaln_backward[(tiles, batch)](
|        x, gate, branch, scale, statistics, grad_residual, grad_out, grad_x, grad_branch, sums,
|        tokens, scale.stride(0), C=width, RESIDUAL=branch is not None, C0=main, C1=rest,
|        TOKENS=tokens_each, STAGES=stages, num_warps=_warps(width, columns_each),
|    )  # fmt: skip
|    return grad_x, grad_branch, grad_modulation.copy_(sums.sum(1))
|
|
|def _warps(width: int, columns_each: int) -> int:
|    return min(16, max(1, power_of_2_up_to(width) // columns_each))
|
|
|def _strided_alike(*modulation: Tensor | None) -> tuple[Tensor | None, ...]:
|    """Rows (B, 1, C), dense, at one distance from image to image: parts of one product are."""
|    strides = {(part.stride(0), part.stride(-1)) for part in modulation if part is not None}
|    if len(strides) == 1 and next(iter(strides))[1] == 1:
|        return modulation
|    return tuple(None if part is None else part.contiguous() for part in modulation)
|
|
|def _results(x: Tensor, branch: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
|    return (
|        x.new_empty(0 if branch is None else x.shape),
|        x.new_empty(x.shape, dtype=shift.dtype),
|        x.new_empty(2, *x.shape[:2], dtype=torch.float32),
|    )
|
|
|def _gradients(x: Tensor, branch: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
|    return (
|        x.new_empty(x.shape),
|        x.new_empty(0) if branch is None else branch.new_empty(branch.shape),
|        scale.new_empty(x.shape[0], 2 if branch is None else 3, x.shape[2]),
|    )
|
|
|@torch.library.custom_op(f"{NAMESPACE}::adaln", mutates_args=())
|def adaln_op(
|    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
|) -> tuple[Tensor, Tensor, Tensor]:
|    """``r = x + gate·branch`` in the dtype of x; ``LN(r)·(1 + scale) + shift`` in that of shift.
|
|    Without ``branch`` r is x, and the first result empty. Third: mean and 1/σ of the rows
|    (2, B, N) float32, for the backward pass.
|    """
|    with torch.cuda.device_of(x):  # Triton launches on the current one
|        return run_forward(x, gate, branch, shift, scale)
|
|
|@adaln_op.register_fake
|def _(x, gate, branch, shift, scale):
|    return _results(x, branch, shift)
|
|
|@torch.library.custom_op(f"{NAMESPACE}::adaln_backward", mutates_args=())
|def adaln_backward_op(
|    grad_residual: Tensor,
|    grad_out: Tensor,
|    x: Tensor,
|    statistics: Tensor,
|    gate: Tensor | None,
|    branch: Tensor | None,
|    scale: Tensor,
|) -> tuple[Tensor, Tensor, Tensor]:
|    """Gradients of x and branch, and of shift, scale and gate together: (B, 3, C).
|
|    Without ``branch`` the second is empty, and the third (B, 2, C).
|    """
|    with torch.cuda.device_of(x):
|        return run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale)
|
|
|@adaln_backward_op.register_fake
|def _(grad_residual, grad_out, x, statistics, gate, branch, scale):
|    return _gradients(x, branch, scale)
|
|
|class AdaLN(torch.autograd.Function):
|    """Both operators. Not joined by torch.library's own rule: x goes on as a result, so that its
|    two gradients meet in the kernel instead of in another pass, and operators may not return what
|    they were given."""
|
|    @staticmethod
|    def forward(ctx, x, gate, branch, shift, scale):
|        residual, out, statistics = adaln_op(x, gate, branch, shift, scale)
|        ctx.save_for_backward(x, statistics, gate, branch, scale)
|        return x.view_as(x) if branch is None else residual, out
|
|    @staticmethod
|    def backward(ctx, grad_residual, grad_out):
|        x, statistics, gate, branch, scale = ctx.saved_tensors
|        grad_x, grad_branch, sums = adaln_backward_op(
|            grad_residual, grad_out, x, statistics, gate, branch, scale
|        )
|        of_shift, of_scale, *of_gate = sums.split(1, 1)  # (B, 1, C) each
|        if branch is None:
|            return grad_x, None, None, of_shift, of_scale
|        return grad_x, of_gate[0], grad_branch, of_shift, of_scale
'''
MODULES[PACKAGE + '.kernels.triton_backward'] = r'''
|"""Triton kernels: gradients of queries, keys, values and gates, as in :mod:`.triton_forward`.
|
|Two passes (queries over keys, keys over queries) instead of one with atomic additions: a little
|more arithmetic, the same bits in every run.
|"""
|
|import triton
|import triton.language as tl
|
|from .triton_forward import load_block, load_rows, store_rows, zero_unselected
|
|
|@triton.jit
|def _query_gradient_tile(
|    projected,
|    kv0,
|    kv1,
|    grad_out,
|    out,
|    gates,
|    lse,
|    delta,
|    index,
|    grad_projected,
|    limit,
|    tile,
|    b,
|    head,
|    N,
|    scale,
|    scale_log2,
|    H: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    MASKED: tl.constexpr,
|    GATHER: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    BM: tl.constexpr,
|    BN: tl.constexpr,
|):
|    slots = tile * BM + tl.arange(0, BM)
|    valid = slots < limit
|    rows = tl.load(index + slots, mask=valid, other=0) if GATHER else slots
|    query = projected + b.to(tl.int64) * N * STRIDE + head * D
|    upstream = grad_out + b.to(tl.int64) * N * (H * D) + head * D
|    q0 = load_rows(query, rows, valid, STRIDE, 0, D0, D, MASKED)
|    y0 = load_rows(upstream, rows, valid, H * D, 0, D0, D, MASKED)
|    if D1 > 0:
|        q1 = load_rows(query, rows, valid, STRIDE, D0, D1, D, MASKED)
|        y1 = load_rows(upstream, rows, valid, H * D, D0, D1, D, MASKED)
|    row_of = (b * H + head).to(tl.int64) * N
|    norm = tl.load(lse + row_of + rows, mask=valid, other=float("inf"))[:, None]
|    # δ = Σ dy·o, the row sum of flash attention's backward pass; ``out`` holds g·o.
|    result = out + b.to(tl.int64) * N * (H * D) + head * D
|    o0 = load_rows(result, rows, valid, H * D, 0, D0, D, MASKED)
|    sums = tl.sum(o0.to(tl.float32) * y0.to(tl.float32), 1)
|    if D1 > 0:
|        o1 = load_rows(result, rows, valid, H * D, D0, D1, D, MASKED)
|        sums += tl.sum(o1.to(tl.float32) * y1.to(tl.float32), 1)
|    gate = tl.load(gates + row_of + rows, mask=valid, other=0.0)
|    shift = tl.where(gate != 0.0, sums / gate, 0.0)
|    tl.store(delta + row_of + rows, shift, mask=valid)
|    shift = shift[:, None]
|
|    dq0 = tl.zeros([BM, D0], tl.float32)
|    if D1 > 0:
|        dq1 = tl.zeros([BM, D1], tl.float32)
|    keys = tl.arange(0, BN)
|    key = query + H * D
|    value = key + H * D
|    for start in tl.range(0, N, BN):
|        inside = start + keys < N
|        k0 = load_block(
|            kv0, key, b, start, H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
|        )
|        v0 = load_block(
|            kv0, value, b, start, 2 * H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS,
|            TMA,
|        )  # fmt: skip
|        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
|        dp = tl.dot(y0, tl.trans(v0), input_precision=PRECISION)
|        if D1 > 0:
|            k1 = load_block(
|                kv1, key, b, start, H + head, keys, inside, STRIDE, D0, D1, D, BN, not EVEN_KEYS,
|                TMA,
|            )  # fmt: skip
|            v1 = load_block(
|                kv1, value, b, start, 2 * H + head, keys, inside, STRIDE, D0, D1, D, BN,
|                not EVEN_KEYS, TMA,
|            )  # fmt: skip
|            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
|            dp = tl.dot(y1, tl.trans(v1), dp, input_precision=PRECISION)
|        p = tl.exp2(s * scale_log2 - norm)
|        if not EVEN_KEYS:  # k is zero beyond N, but p may be infinite there
|            p = tl.where(inside[None, :], p, 0.0)
|        ds = (p * (dp - shift)).to(projected.dtype.element_ty)
|        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
|        if D1 > 0:
|            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
|
|    target = grad_projected + b.to(tl.int64) * N * STRIDE + head * D
|    store_rows(target, rows, valid, dq0 * scale, STRIDE, 0, D0, D, MASKED)
|    if D1 > 0:
|        store_rows(target, rows, valid, dq1 * scale, STRIDE, D0, D1, D, MASKED)
|
|
|@triton.jit
|def query_gradient(
|    projected,
|    kv0,
|    kv1,
|    grad_out,
|    out,
|    gates,
|    lse,
|    delta,
|    index,
|    count,
|    grad_projected,
|    N,
|    scale,
|    scale_log2,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    EVEN_QUERIES: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    BM: tl.constexpr,
|    BM_ROUTED: tl.constexpr,
|    BN: tl.constexpr,
|):
|    """δ (B, h, N) of the selected queries and dq, zero for the others. Grid as :func:`attend`."""
|    pid = tl.program_id(0)
|    b = tl.program_id(1)
|    tiles = tl.cdiv(N, BM)
|    if pid < S * tiles:
|        _query_gradient_tile(
|            projected, kv0, kv1, grad_out, out, gates, lse, delta, index, grad_projected, N,
|            pid % tiles, b, pid // tiles, N, scale, scale_log2,
|            H, D, D0, D1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, BM, BN,
|        )  # fmt: skip
|    elif S < H:
|        routed_tiles = tl.cdiv(N, BM_ROUTED)
|        routed = (pid - S * tiles) // routed_tiles
|        tile = (pid - S * tiles) % routed_tiles
|        list_of = b * (H - S) + routed
|        limit = tl.load(count + list_of)
|        zero_unselected(
|            gates + (b * H + S + routed).to(tl.int64) * N,
|            grad_projected + b.to(tl.int64) * N * STRIDE + (S + routed) * D, tile, N,
|            STRIDE, D, D0, D1, BM_ROUTED,
|        )  # fmt: skip
|        if tile * BM_ROUTED < limit:
|            _query_gradient_tile(
|                projected, kv0, kv1, grad_out, out, gates, lse, delta,
|                index + list_of.to(tl.int64) * N, grad_projected, limit, tile, b, S + routed, N,
|                scale, scale_log2,
|                H, D, D0, D1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, BM_ROUTED, BN,
|            )  # fmt: skip
|
|
|@triton.jit
|def _key_value_gradient_tile(
|    projected,
|    q0_blocks,
|    q1_blocks,
|    y0_blocks,
|    y1_blocks,
|    lse_blocks,
|    delta_blocks,
|    grad_out,
|    lse,
|    delta,
|    index,
|    grad_projected,
|    limit,
|    tile,
|    b,
|    head,
|    N,
|    scale,
|    scale_log2,
|    H: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    MASKED: tl.constexpr,
|    GATHER: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    BM: tl.constexpr,
|    BN: tl.constexpr,
|):
|    keys = tile * BN + tl.arange(0, BN)
|    inside = keys < N
|    query = projected + b.to(tl.int64) * N * STRIDE + head * D
|    upstream = grad_out + b.to(tl.int64) * N * (H * D) + head * D
|    k0 = load_rows(query + H * D, keys, inside, STRIDE, 0, D0, D, not EVEN_KEYS)
|    v0 = load_rows(query + 2 * H * D, keys, inside, STRIDE, 0, D0, D, not EVEN_KEYS)
|    dk0 = tl.zeros([BN, D0], tl.float32)
|    dv0 = tl.zeros([BN, D0], tl.float32)
|    if D1 > 0:
|        k1 = load_rows(query + H * D, keys, inside, STRIDE, D0, D1, D, not EVEN_KEYS)
|        v1 = load_rows(query + 2 * H * D, keys, inside, STRIDE, D0, D1, D, not EVEN_KEYS)
|        dk1 = tl.zeros([BN, D1], tl.float32)
|        dv1 = tl.zeros([BN, D1], tl.float32)
|    row_of = (b * H + head).to(tl.int64) * N
|    offsets = tl.arange(0, BM)
|    BLOCKS: tl.constexpr = TMA and not GATHER
|    for start in tl.range(0, limit, BM):
|        slots = start + offsets
|        valid = slots < limit
|        if GATHER:
|            rows = tl.load(index + slots, mask=valid, other=0)
|            origin = 0
|        else:
|            rows = offsets
|            origin = start
|        q0 = load_block(
|            q0_blocks, query, b, origin, head, rows, valid, STRIDE, 0, D0, D, BM, MASKED, BLOCKS
|        )  # fmt: skip
|        y0 = load_block(
|            y0_blocks, upstream, b, origin, head, rows, valid, H * D, 0, D0, D, BM, MASKED, BLOCKS
|        )  # fmt: skip
|        if BLOCKS:  # beyond N all of q, dy, lse and δ are zero, and so is what they add
|            norm = lse_blocks.load([b, head, start]).reshape(1, BM)
|            shift = delta_blocks.load([b, head, start]).reshape(1, BM)
|        elif MASKED:  # a query beyond the list has p = exp2(-inf) = 0
|            norm = tl.load(lse + row_of + origin + rows, mask=valid, other=float("inf"))[None, :]
|            shift = tl.load(delta + row_of + origin + rows, mask=valid, other=0.0)[None, :]
|        else:
|            norm = tl.load(lse + row_of + origin + rows)[None, :]
|            shift = tl.load(delta + row_of + origin + rows)[None, :]
|        s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
|        dp = tl.dot(v0, tl.trans(y0), input_precision=PRECISION)
|        if D1 > 0:
|            q1 = load_block(
|                q1_blocks, query, b, origin, head, rows, valid, STRIDE, D0, D1, D, BM, MASKED,
|                BLOCKS,
|            )  # fmt: skip
|            y1 = load_block(
|                y1_blocks, upstream, b, origin, head, rows, valid, H * D, D0, D1, D, BM, MASKED,
|                BLOCKS,
|            )  # fmt: skip
|            s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
|            dp = tl.dot(v1, tl.trans(y1), dp, input_precision=PRECISION)
|        p = tl.exp2(s * scale_log2 - norm)
|        ds = (p * (dp - shift)).to(projected.dtype.element_ty)
|        p = p.to(projected.dtype.element_ty)
|        dv0 = tl.dot(p, y0, dv0, input_precision=PRECISION)
|        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
|        if D1 > 0:
|            dv1 = tl.dot(p, y1, dv1, input_precision=PRECISION)
|            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
|
|    dk = grad_projected + b.to(tl.int64) * N * STRIDE + H * D + head * D
|    dv = dk + H * D
|    store_rows(dk, keys, inside, dk0 * scale, STRIDE, 0, D0, D, not EVEN_KEYS)
|    store_rows(dv, keys, inside, dv0, STRIDE, 0, D0, D, not EVEN_KEYS)
|    if D1 > 0:
|        store_rows(dk, keys, inside, dk1 * scale, STRIDE, D0, D1, D, not EVEN_KEYS)
|        store_rows(dv, keys, inside, dv1, STRIDE, D0, D1, D, not EVEN_KEYS)
|
|
|@triton.jit
|def key_value_gradient(
|    projected,
|    q0_blocks,
|    q1_blocks,
|    y0_blocks,
|    y1_blocks,
|    lse_blocks,
|    delta_blocks,
|    grad_out,
|    lse,
|    delta,
|    index,
|    count,
|    grad_projected,
|    N,
|    scale,
|    scale_log2,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    EVEN_QUERIES: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    BM: tl.constexpr,
|    BM_ROUTED: tl.constexpr,
|    BN: tl.constexpr,
|):
|    """dk and dv of every key, from the queries that selected its head. Grid (H·⌈N/BN⌉, B)."""
|    pid = tl.program_id(0)
|    b = tl.program_id(1)
|    tiles = tl.cdiv(N, BN)
|    head = pid // tiles
|    if head < S:
|        _key_value_gradient_tile(
|            projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks,
|            grad_out, lse, delta, index, grad_projected, N, pid % tiles, b, head,
|            N, scale, scale_log2,
|            H, D, D0, D1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, BM, BN,
|        )  # fmt: skip
|    elif S < H:
|        list_of = b * (H - S) + head - S
|        limit = tl.load(count + list_of)
|        _key_value_gradient_tile(
|            projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks,
|            grad_out, lse, delta, index + list_of.to(tl.int64) * N,
|            grad_projected, limit, pid % tiles, b, head, N, scale, scale_log2,
|            H, D, D0, D1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, BM_ROUTED, BN,
|        )  # fmt: skip
'''
MODULES[PACKAGE + '.kernels.triton_forward'] = r'''
|"""Triton kernels: softmax attention of the selected (token, head) queries alone.
|
|Tensors as in :mod:`.ops`. Queries, keys and values are read where the projection left them, rows
|``STRIDE`` apart; a head is ``D0 + D1`` columns, ``D0`` a power of two and ``D1`` the padded tail
|(72 = 64 + 8, not 128). Every stride is a compile-time constant: 72 is no multiple of 16, so as
|run-time arguments they would lose 16-byte loads. Exponentials are base 2,
|``scale_log2 = log2(e)/√d``.
|
|Shared heads take their queries in order, routed heads through the list that routing made. Nothing
|is added atomically: results are the same in every run. ``TMA`` loads consecutive rows through the
|copy engine (descriptors ``kv0`` … of the two column parts) instead of by pointers. ``EARLY``
|kernels start while the one before them runs (programmatic dependent launch), do what they can
|without it, and wait for its end.
|"""
|
|import triton
|import triton.language as tl
|
|
|@triton.jit
|def wait_for_previous(EARLY: tl.constexpr):
|    """The end of the kernel before, and with it all that it wrote."""
|    if EARLY:
|        tl.extra.cuda.gdc_wait()
|
|
|@triton.jit
|def let_next_start(EARLY: tl.constexpr):
|    """Say that the next kernel may start, once every program of this one has come here."""
|    if EARLY:
|        tl.extra.cuda.gdc_launch_dependents()
|
|
|@triton.jit
|def load_rows(
|    base,
|    rows,
|    valid,
|    STRIDE: tl.constexpr,
|    FIRST: tl.constexpr,
|    WIDTH: tl.constexpr,
|    D: tl.constexpr,
|    MASKED: tl.constexpr,
|):
|    """Columns FIRST … FIRST+WIDTH-1 of some rows; zero beyond column D and where not valid."""
|    columns = FIRST + tl.arange(0, WIDTH)
|    pointers = base + rows[:, None] * STRIDE + columns[None, :]
|    if FIRST + WIDTH > D:
|        if MASKED:
|            return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
|        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
|    if MASKED:
|        return tl.load(pointers, mask=valid[:, None], other=0.0)
|    return tl.load(pointers)
|
|
|@triton.jit
|def store_rows(
|    base,
|    rows,
|    valid,
|    values,
|    STRIDE: tl.constexpr,
|    FIRST: tl.constexpr,
|    WIDTH: tl.constexpr,
|    D: tl.constexpr,
|    MASKED: tl.constexpr,
|):
|    columns = FIRST + tl.arange(0, WIDTH)
|    pointers = base + rows[:, None] * STRIDE + columns[None, :]
|    values = values.to(base.dtype.element_ty)
|    if FIRST + WIDTH > D:
|        if MASKED:
|            tl.store(pointers, values, mask=valid[:, None] & (columns < D)[None, :])
|        else:
|            tl.store(pointers, values, mask=(columns < D)[None, :])
|    elif MASKED:
|        tl.store(pointers, values, mask=valid[:, None])
|    else:
|        tl.store(pointers, values)
|
|
|@triton.jit
|def load_block(
|    descriptor,
|    base,
|    b,
|    start,
|    head,
|    rows,
|    valid,
|    STRIDE: tl.constexpr,
|    FIRST: tl.constexpr,
|    WIDTH: tl.constexpr,
|    D: tl.constexpr,
|    BLOCK: tl.constexpr,
|    MASKED: tl.constexpr,
|    TMA: tl.constexpr,
|):
|    """Rows of one head, through the copy engine (zeros out of bounds) or by pointers."""
|    if TMA:
|        return descriptor.load([b, start, head, FIRST]).reshape(BLOCK, WIDTH)
|    return load_rows(base + start * STRIDE, rows, valid, STRIDE, FIRST, WIDTH, D, MASKED)
|
|
|@triton.jit
|def zero_unselected(
|    gates,
|    target,
|    tile,
|    N,
|    STRIDE: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    BM: tl.constexpr,
|):
|    """Zeros for the tokens tile·BM … of one head that did not select it."""
|    tokens = tile * BM + tl.arange(0, BM)
|    empty = tl.load(gates + tokens, mask=tokens < N, other=1.0) == 0.0
|    store_rows(target, tokens, empty, tl.zeros([BM, D0], tl.float32), STRIDE, 0, D0, D, True)
|    if D1 > 0:
|        store_rows(target, tokens, empty, tl.zeros([BM, D1], tl.float32), STRIDE, D0, D1, D, True)
|
|
|@triton.jit
|def _attend_tile(
|    projected,
|    kv0,
|    kv1,
|    gates,
|    index,
|    out,
|    lse,
|    limit,
|    tile,
|    b,
|    head,
|    N,
|    scale_log2,
|    H: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    V1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    MASKED: tl.constexpr,
|    GATHER: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    EARLY: tl.constexpr,
|    BM: tl.constexpr,
|    BN: tl.constexpr,
|):
|    """One tile of BM queries of one head over all keys: online softmax, gate, store."""
|    slots = tile * BM + tl.arange(0, BM)
|    valid = slots < limit
|    rows = tl.load(index + slots, mask=valid, other=0) if GATHER else slots
|    query = projected + b.to(tl.int64) * N * STRIDE + head * D
|    q0 = load_rows(query, rows, valid, STRIDE, 0, D0, D, MASKED)
|    q1 = q0  # not read where there is no tail
|    if D1 > 0:
|        q1 = load_rows(query, rows, valid, STRIDE, D0, D1, D, MASKED)
|    m = tl.full([BM], float("-inf"), tl.float32)
|    total = tl.zeros([BM], tl.float32)
|    acc0 = tl.zeros([BM, D0], tl.float32)
|    acc1 = tl.zeros([BM, V1], tl.float32)
|    keys = tl.arange(0, BN)
|    key = query + H * D
|    value = key + H * D
|    for start in tl.range(0, N, BN):
|        inside = start + keys < N
|        k0 = load_block(
|            kv0, key, b, start, H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
|        )  # fmt: skip
|        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
|        if D1 > 0:
|            k1 = load_block(
|                kv1, key, b, start, H + head, keys, inside, STRIDE, D0, D1, D, BN,
|                not EVEN_KEYS, TMA,
|            )  # fmt: skip
|            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
|        if not EVEN_KEYS:
|            s = tl.where(inside[None, :], s, float("-inf"))
|        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
|        p = tl.exp2(s * scale_log2 - m_new[:, None])
|        rescale = tl.exp2(m - m_new)
|        total = total * rescale + tl.sum(p, 1)
|        m = m_new
|        p = p.to(projected.dtype.element_ty)
|        v0 = load_block(
|            kv0, value, b, start, 2 * H + head, keys, inside, STRIDE, 0, D0, D, BN,
|            not EVEN_KEYS, TMA,
|        )  # fmt: skip
|        acc0 = tl.dot(p, v0, acc0 * rescale[:, None], input_precision=PRECISION)
|        if D1 > 0:
|            v1 = load_block(
|                kv1, value, b, start, 2 * H + head, keys, inside, STRIDE, D0, V1, D, BN,
|                not EVEN_KEYS, TMA,
|            )  # fmt: skip
|            acc1 = tl.dot(p, v1, acc1 * rescale[:, None], input_precision=PRECISION)
|
|    wait_for_previous(EARLY)  # shared heads have not needed routing until here
|    row_of = (b * H + head).to(tl.int64) * N
|    gate = tl.load(gates + row_of + rows, mask=valid, other=0.0)
|    # The gate joins the normaliser: exp2(s - lse) is g·p, all that the backward pass needs.
|    tl.store(lse + row_of + rows, m + tl.log2(total) - tl.log2(gate), mask=valid)
|    gate = gate / total
|    target = out + b.to(tl.int64) * N * (H * D) + head * D
|    store_rows(target, rows, valid, acc0 * gate[:, None], H * D, 0, D0, D, MASKED)
|    if D1 > 0:
|        store_rows(target, rows, valid, acc1 * gate[:, None], H * D, D0, V1, D, MASKED)
|
|
|@triton.jit
|def attend(
|    projected,
|    kv0,
|    kv1,
|    gates,
|    index,
|    count,
|    out,
|    lse,
|    image_stats,
|    stats,
|    N,
|    scale_log2,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    E_PAD: tl.constexpr,
|    D: tl.constexpr,
|    D0: tl.constexpr,
|    D1: tl.constexpr,
|    V1: tl.constexpr,
|    STRIDE: tl.constexpr,
|    EVEN_KEYS: tl.constexpr,
|    EVEN_QUERIES: tl.constexpr,
|    PRECISION: tl.constexpr,
|    TMA: tl.constexpr,
|    EARLY: tl.constexpr,
|    BM: tl.constexpr,
|    BM_ROUTED: tl.constexpr,
|    BN: tl.constexpr,
|):
|    """Gated attention. Grid (S·⌈N/BM⌉ + E·⌈N/BM_ROUTED⌉, B).
|
|    One program also averages the routing statistics over the batch, which spares a launch.
|    """
|    pid = tl.program_id(0)
|    b = tl.program_id(1)
|    tiles = tl.cdiv(N, BM)
|    if pid < S * tiles:
|        _attend_tile(
|            projected, kv0, kv1, gates, index, out, lse, N, pid % tiles, b, pid // tiles, N,
|            scale_log2,
|            H, D, D0, D1, V1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, EARLY,
|            BM, BN,
|        )  # fmt: skip
|    elif S < H:
|        wait_for_previous(EARLY)
|        routed_tiles = tl.cdiv(N, BM_ROUTED)
|        routed = (pid - S * tiles) // routed_tiles
|        tile = (pid - S * tiles) % routed_tiles
|        list_of = b * (H - S) + routed
|        limit = tl.load(count + list_of)
|        zero_unselected(
|            gates + (b * H + S + routed).to(tl.int64) * N,
|            out + b.to(tl.int64) * N * (H * D) + (S + routed) * D, tile, N,
|            H * D, D, D0, D1, BM_ROUTED,
|        )  # fmt: skip
|        if tile * BM_ROUTED < limit:
|            _attend_tile(
|                projected, kv0, kv1, gates, index + list_of.to(tl.int64) * N, out, lse, limit,
|                tile, b, S + routed, N, scale_log2,
|                H, D, D0, D1, V1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, False,
|                BM_ROUTED, BN,
|            )  # fmt: skip
|    if S < H and pid + b == 0:  # it has waited
|        columns = tl.arange(0, E_PAD)
|        inside = columns < 2 * (H - S)
|        sums = tl.zeros([E_PAD], tl.float32)
|        batch = tl.num_programs(1)
|        for first in range(0, batch, 32):
|            images = first + tl.arange(0, 32)
|            slots = images[:, None] * 2 * (H - S) + columns[None, :]
|            mask = (images < batch)[:, None] & inside[None, :]
|            sums += tl.sum(tl.load(image_stats + slots, mask=mask, other=0.0), 0)
|        tl.store(stats + columns, sums / batch, mask=inside)
'''
MODULES[PACKAGE + '.kernels.triton_noise'] = r'''
|"""Triton kernel: per-image normal noise in one launch, the numbers of ``moh_dit.noise``.
|
|The plain tensor operations there are some 170 small kernels, which a small model waits for.
|"""
|
|import math
|
|import torch
|import triton
|import triton.language as tl
|from torch import Tensor
|from triton.language.extra import libdevice
|
|from .sizes import cdiv
|
|BLOCK = 256  # counters of one program, each of which gives four values
|
|
|@triton.jit
|def _normal_pair(radius_word, angle_word, TURN: tl.constexpr, INTERPRETED: tl.constexpr):
|    """Box-Muller in float64, by libdevice: the compiler's own log and cos are float32's."""
|    uniform = (radius_word.to(tl.float64) + 0.5) * 2.0**-32
|    angle = angle_word.to(tl.float64) * TURN
|    if INTERPRETED:
|        radius = tl.sqrt(tl.log(uniform) * -2.0)
|        return radius * tl.cos(angle), radius * tl.sin(angle)
|    radius = tl.sqrt(libdevice.log(uniform) * -2.0)
|    return radius * libdevice.cos(angle), radius * libdevice.sin(angle)
|
|
|@triton.jit(do_not_specialize=["seed", "first_draw"])
|def philox_normal_kernel(
|    out,
|    indices,
|    seed,
|    first_draw,
|    COUNT: tl.constexpr,
|    BLOCK: tl.constexpr,
|    TURN: tl.constexpr,
|    INTERPRETED: tl.constexpr,
|):
|    """out float64 (draws, B, COUNT). Grid (⌈COUNT/4/BLOCK⌉, B, draws)."""
|    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
|    row, draw = tl.program_id(1), tl.program_id(2)
|    image = tl.load(indices + row)
|    zero = counter * 0
|    w0, w1, w2, w3 = tl.philox(
|        seed,
|        counter,
|        zero + (first_draw + draw).to(tl.int32),
|        zero + (image & 0xFFFFFFFF).to(tl.int32),
|        zero + (image >> 32).to(tl.int32),
|    )
|    v0, v1 = _normal_pair(w0, w1, TURN, INTERPRETED)
|    v2, v3 = _normal_pair(w2, w3, TURN, INTERPRETED)
|    target = out + (draw * tl.num_programs(1) + row).to(tl.int64) * COUNT + counter * 4
|    tl.store(target, v0, mask=counter * 4 < COUNT)
|    tl.store(target + 1, v1, mask=counter * 4 + 1 < COUNT)
|    tl.store(target + 2, v2, mask=counter * 4 + 2 < COUNT)
|    tl.store(target + 3, v3, mask=counter * 4 + 3 < COUNT)
|
|
|def philox_normal_triton(
|    seed: int, indices: Tensor, first_draw: int, draws: int, count: int
|) -> Tensor:
|    """As :func:`moh_dit.noise.philox_normal`."""
|    out = torch.empty(draws, len(indices), count, dtype=torch.float64, device=indices.device)
|    grid = (cdiv(cdiv(count, 4), BLOCK), len(indices), draws)
|    interpreted = triton.knobs.runtime.interpret
|    seed = (seed + 2**63) % 2**64 - 2**63  # the same bits as a signed integer
|    with torch.cuda.device_of(out):
|        philox_normal_kernel[grid](
|            out, indices, seed, first_draw, count, BLOCK, 2 * math.pi * 2.0**-32, interpreted
|        )
|    return out
'''
MODULES[PACKAGE + '.kernels.triton_routing'] = r'''
|"""Triton kernels: gates, lists of selected tokens and balance statistics, and their gradients.
|
|Tensors as in :mod:`.ops`. The router logits of a token stand behind its queries, keys and values:
|shared heads, routed heads, then the two of the two-stage weights.
|"""
|
|import triton
|import triton.language as tl
|
|from .triton_forward import let_next_start, wait_for_previous
|
|
|@triton.jit
|def _router_logits(
|    logits,
|    tokens,
|    valid,
|    H: tl.constexpr,
|    STRIDE: tl.constexpr,
|    H_PAD: tl.constexpr,
|):
|    """Logits (tokens, H_PAD) of shared and routed heads; zeros where there are none."""
|    heads = tl.arange(0, H_PAD)
|    return tl.load(
|        logits + tokens[:, None] * STRIDE + heads[None, :],
|        mask=valid[:, None] & (heads < H)[None, :],
|        other=0.0,
|    ).to(tl.float32)
|
|
|@triton.jit
|def _group_softmax(raw, group):
|    """Softmax over the columns of a group, zero elsewhere."""
|    raw = tl.where(group, raw, float("-inf"))
|    weights = tl.exp(raw - tl.max(raw, 1)[:, None])
|    return weights / tl.sum(weights, 1)[:, None]
|
|
|@triton.jit
|def _centred(values, weights):
|    """``values - Σ weights·values`` along rows of weights that sum to 1.
|
|    Taken relative to the heaviest column: where one weight is nearly 1 nothing cancels.
|    """
|    columns = tl.arange(0, weights.shape[1])[None, :]
|    heaviest = columns == tl.argmax(weights, 1)[:, None]
|    values = values - tl.sum(tl.where(heaviest, values, 0.0), 1)[:, None]
|    return values - tl.sum(weights * values, 1)[:, None]
|
|
|@triton.jit
|def _stages(logits, tokens, valid, H: tl.constexpr, STRIDE: tl.constexpr):
|    """The two-stage softmax: α₀/2 and α₁/2."""
|    l0 = tl.load(logits + tokens * STRIDE + H, mask=valid, other=0.0).to(tl.float32)
|    l1 = tl.load(logits + tokens * STRIDE + H + 1, mask=valid, other=0.0).to(tl.float32)
|    return 1.0 / (1.0 + tl.exp(l1 - l0)), 1.0 / (1.0 + tl.exp(l0 - l1))
|
|
|@triton.jit
|def route(
|    projected,
|    gates,
|    score_sums,
|    N,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    K: tl.constexpr,
|    D: tl.constexpr,
|    STRIDE: tl.constexpr,
|    H_PAD: tl.constexpr,
|    TOKENS: tl.constexpr,
|    EARLY: tl.constexpr,
|):
|    """Gates of a tile of tokens (MoH eq. 5–7) and its ΣP. Grid (⌈N/TOKENS⌉, B)."""
|    let_next_start(EARLY)
|    E: tl.constexpr = H - S
|    tile = tl.program_id(0)
|    b = tl.program_id(1)
|    tokens = tile * TOKENS + tl.arange(0, TOKENS)
|    valid = tokens < N
|    heads = tl.arange(0, H_PAD)
|    logits = projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
|    raw = _router_logits(logits, tokens, valid, H, STRIDE, H_PAD)
|    gate = tl.zeros([TOKENS, H_PAD], tl.float32)
|    if S > 0:
|        gate = S * _group_softmax(raw, (heads < S)[None, :])
|    if E > 0:
|        is_routed = ((heads >= S) & (heads < H))[None, :]
|        scores = _group_softmax(raw, is_routed)
|        # Top K by repeated maximum; of equal logits the lowest head wins.
|        chosen = tl.zeros([TOKENS, H_PAD], tl.int1)
|        left = tl.where(is_routed, raw, float("-inf"))
|        for _ in tl.static_range(K):
|            best = heads[None, :] == tl.argmax(left, 1)[:, None]
|            chosen = chosen | best
|            left = tl.where(best, float("-inf"), left)
|        kept = tl.where(chosen, scores, 0.0)
|        routed_gate = K * kept / tl.sum(kept, 1)[:, None]
|        if S > 0:
|            first, second = _stages(logits, tokens, valid, H, STRIDE)
|            gate = gate * (2 * first)[:, None]
|            routed_gate = routed_gate * (2 * second)[:, None]
|        # "Selected" is gate != 0 from here on: keep it so if a weight underflows.
|        gate += tl.where(chosen, tl.maximum(routed_gate, 1e-37), 0.0)
|        tl.store(
|            score_sums + (b * tl.num_programs(0) + tile) * E + heads - S,
|            tl.sum(tl.where(valid[:, None], scores, 0.0), 0),
|            mask=(heads >= S) & (heads < H),
|        )
|    tl.store(
|        gates + b.to(tl.int64) * H * N + heads[None, :] * N + tokens[:, None],
|        gate,
|        mask=valid[:, None] & (heads < H)[None, :],
|    )
|
|
|@triton.jit
|def list_tokens(
|    gates,
|    score_sums,
|    index,
|    count,
|    stats,
|    N,
|    tiles,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    CHUNK: tl.constexpr,
|    EARLY: tl.constexpr,
|):
|    """Tokens that selected a routed head, in order, hence no atomics; f and P̄. Grid (E, B)."""
|    let_next_start(EARLY)
|    wait_for_previous(EARLY)
|    E: tl.constexpr = H - S
|    routed = tl.program_id(0)
|    b = tl.program_id(1)
|    row = gates + (b * H + S + routed).to(tl.int64) * N
|    target = index + (b * E + routed).to(tl.int64) * N
|    offsets = tl.arange(0, CHUNK)
|    length = tl.zeros([], tl.int32)
|    score_sum = tl.zeros([], tl.float32)
|    for start in range(0, N, CHUNK):
|        tokens = start + offsets
|        selected = tl.load(row + tokens, mask=tokens < N, other=0.0) != 0.0
|        ones = selected.to(tl.int32)
|        tl.store(target + length + tl.cumsum(ones, 0) - 1, tokens, mask=selected)
|        length += tl.sum(ones, 0)
|    for start in range(0, tiles, CHUNK):
|        tile = start + offsets
|        sums = tl.load(score_sums + (b * tiles + tile) * E + routed, mask=tile < tiles, other=0.0)
|        score_sum += tl.sum(sums, 0)
|    tl.store(count + b * E + routed, length)
|    tl.store(stats + (b * 2) * E + routed, length.to(tl.float32) / N)
|    tl.store(stats + (b * 2 + 1) * E + routed, score_sum / N)
|
|
|@triton.jit
|def route_backward(
|    projected,
|    gates,
|    delta,
|    grad_stats,
|    grad_projected,
|    N,
|    H: tl.constexpr,
|    S: tl.constexpr,
|    D: tl.constexpr,
|    STRIDE: tl.constexpr,
|    H_PAD: tl.constexpr,
|    TAIL: tl.constexpr,
|    TOKENS: tl.constexpr,
|):
|    """Gradients of the router logits from δ = ∂L/∂g. Grid (⌈N/TOKENS⌉, B).
|
|    With w the weights of a softmax group (shared; selected routed) ``dl_i = g_i (δ_i - Σ w δ)``;
|    for the two stages ``dl_0 = a_1 Σ_shared g δ - a_0 Σ_routed g δ = -dl_1``. P̄ adds
|    ``P_i (c_i - Σ P c)/(B N)`` with c its upstream gradient.
|    """
|    E: tl.constexpr = H - S
|    b = tl.program_id(1)
|    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
|    valid = tokens < N
|    heads = tl.arange(0, H_PAD)
|    inside = valid[:, None] & (heads < H)[None, :]
|    slots = b.to(tl.int64) * H * N + heads[None, :] * N + tokens[:, None]
|    gate = tl.load(gates + slots, mask=inside, other=0.0)
|    pull = tl.load(delta + slots, mask=inside & (gate != 0.0), other=0.0)
|
|    logits = projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
|    target = grad_projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
|    raw = _router_logits(logits, tokens, valid, H, STRIDE, H_PAD)
|    grad = tl.zeros([TOKENS, H_PAD], tl.float32)
|    shared_sum = tl.zeros([TOKENS], tl.float32)
|    if S > 0:
|        is_shared = (heads < S)[None, :]
|        shared_sum = tl.sum(tl.where(is_shared, gate * pull, 0.0), 1)
|        weights = _group_softmax(raw, is_shared)
|        grad += tl.where(is_shared, gate * _centred(pull, weights), 0.0)
|    if E > 0:
|        is_routed = ((heads >= S) & (heads < H))[None, :]
|        routed_gate = tl.where(is_routed, gate, 0.0)
|        weights = routed_gate / tl.maximum(tl.sum(routed_gate, 1), 1e-37)[:, None]
|        routed_sum = tl.sum(tl.where(is_routed, gate * pull, 0.0), 1)
|        grad += routed_gate * _centred(pull, weights)
|        scores = _group_softmax(raw, is_routed)
|        balance = tl.load(grad_stats + E + heads - S, mask=(heads >= S) & (heads < H), other=0.0)
|        balance = (balance / (tl.num_programs(1) * N))[None, :] + tl.zeros_like(scores)
|        grad += scores * _centred(balance, scores)
|        if S > 0:
|            first, second = _stages(logits, tokens, valid, H, STRIDE)
|            stage = second * shared_sum - first * routed_sum
|            slot = target + tokens * STRIDE + H
|            tl.store(slot, stage.to(target.dtype.element_ty), mask=valid)
|            tl.store(slot + 1, (-stage).to(target.dtype.element_ty), mask=valid)
|    tl.store(
|        target + tokens[:, None] * STRIDE + heads[None, :],
|        grad.to(target.dtype.element_ty),
|        mask=inside,
|    )
|    USED: tl.constexpr = H + 2 if (S > 0 and E > 0) else H
|    PAD: tl.constexpr = STRIDE - 3 * H * D - USED
|    if PAD > 0:
|        pad = tl.arange(0, TAIL)
|        tl.store(
|            target + tokens[:, None] * STRIDE + (USED + pad)[None, :],
|            tl.zeros([TOKENS, TAIL], target.dtype.element_ty),
|            mask=valid[:, None] & (pad < PAD)[None, :],
|        )
'''
MODULES[PACKAGE + '.modulation'] = r'''
|"""adaLN-Zero (DiT §3.2): what lies between the residual stream and a block's attention and MLP."""
|
|import torch.nn.functional as F
|from torch import Tensor
|
|from .errors import UserError
|from .kernels import LAYER_NORM_EPSILON, adaln_triton, choose_modulation_backend
|
|
|def adaln(
|    x: Tensor,
|    shift: Tensor,
|    scale: Tensor,
|    gate: Tensor | None = None,
|    branch: Tensor | None = None,
|    backend: str = "auto",
|) -> tuple[Tensor, Tensor]:
|    """Add a branch to the stream, and normalise and modulate what the next one reads of it.
|
|    Args:
|        x: the residual stream (B, N, C).
|        shift, scale: of the next branch, (B, 1, C).
|        gate, branch: (B, 1, C) and (B, N, C) of the branch before; ``None``: nothing is added.
|        backend: "reference" (takes whatever broadcasts), "triton" (GPU: one pass each way; float32,
|            float16, bfloat16), or "auto", the fastest by measurement.
|
|    Returns:
|        ``r = x + gate·branch`` and ``LN(r)·(1 + scale) + shift``; the latter, from "triton", in the
|        dtype of ``shift``, as a linear layer under autocast would round it.
|
|    Raises:
|        UserError: when the backend is unknown or cannot run on this device, dtype or shape, or a
|            gate comes without a branch.
|    """
|    if (gate is None) != (branch is None):
|        raise UserError("adaln takes gate and branch together, or neither")
|    if choose_modulation_backend(backend, x, shift, scale, gate, branch) == "triton":
|        return adaln_triton(x, gate, branch, shift, scale)
|    if gate is not None and branch is not None:
|        x = x + gate * branch
|    return x, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON) * (1 + scale) + shift
'''
MODULES[PACKAGE + '.noise'] = r'''
|"""Noise that depends on (seed, image index, draw) alone, made for a whole batch at once.
|
|A counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
|1, 2, 3", SC 2011), in plain tensor operations: the same numbers for an image in any batch, on any
|device, in any process, and no loop over per-image generators. On a GPU a kernel makes them.
|"""
|
|import math
|from collections.abc import Sequence
|from importlib.util import find_spec
|from typing import Any
|
|import torch
|from torch import Tensor
|from torch.overrides import TorchFunctionMode
|
|WORD = 0xFFFFFFFF
|MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
|KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
|DRAWS_AHEAD = 64
|# Values made at once: what stays in a CPU's cache, and what keeps a GPU without the kernel busy for
|# longer than it takes to launch a hundred small ones.
|VALUES_AHEAD = {"cpu": 1 << 18, "cuda": 1 << 23}
|
|
|def philox(counter: Sequence[Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
|    """Philox4x32-10: four int64 tensors of 32-bit counter words (broadcast) and a 64-bit key.
|
|    Returns four int64 tensors of 32-bit random words.
|    """
|    c0, c1, c2, c3 = counter
|    k0, k1 = key & WORD, key >> 32 & WORD
|    for _ in range(10):
|        # The 64-bit products wrap around in int64; their bits are those of the unsigned ones.
|        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
|        c0, c1 = (right >> 32 & WORD) ^ c1 ^ k0, right & WORD
|        c2, c3 = (left >> 32 & WORD) ^ c3 ^ k1, left & WORD
|        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
|    return c0, c1, c2, c3
|
|
|def philox_normal(seed: int, indices: Tensor, first_draw: int, draws: int, count: int) -> Tensor:
|    """Standard normal values, float64 (draws, B, count), on the device of ``indices``.
|
|    Args:
|        seed: 64 bits of key.
|        indices: int64 (B,), the image each row belongs to.
|        first_draw: number of the first draw of each image.
|        draws: how many consecutive draws.
|        count: values per draw.
|    """
|    device = indices.device
|    if device.type == "cuda" and find_spec("triton"):
|        from .kernels.triton_noise import philox_normal_triton  # Triton is imported where it runs
|
|        return philox_normal_triton(seed, indices, first_draw, draws, count)
|    block = torch.arange(-(-count // 4), device=device)
|    draw = torch.arange(first_draw, first_draw + draws, device=device).view(-1, 1, 1)
|    image = indices.view(-1, 1)
|    words = philox((block, draw, image & WORD, image >> 32 & WORD), seed)
|    # Box-Muller in float64: rounded to float32 it no longer shows which device computed it.
|    values = []
|    for radius_word, angle_word in (words[:2], words[2:]):
|        radius = ((radius_word.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
|        angle = angle_word.double() * (2 * math.pi * 2.0**-32)
|        values += [radius * angle.cos(), radius * angle.sin()]
|    return torch.stack(values, dim=-1).flatten(-2)[..., :count]
|
|
|class ImageNoise(TorchFunctionMode):
|    """Per-image noise for a batch: ``draw`` gives the next draw of every image.
|
|    As a context manager it also answers every ``torch.randn`` inside, which is where diffusers'
|    schedulers take their noise from, so that any of them is stochastic per image.
|
|    Args:
|        seed: chooses the noise of all images.
|        indices: the image each row of the batch is, B integers in ``0 … 2^63 - 1``.
|        device: where the noise is used; made there, or on the CPU where float64 is missing.
|    """
|
|    def __init__(self, seed: int, indices: Sequence[int] | Tensor, device: torch.device | str):
|        super().__init__()
|        self.seed, self.device = seed, torch.device(device)
|        made_on = "cpu" if self.device.type == "mps" else self.device
|        self.indices = torch.as_tensor(indices, dtype=torch.int64, device=made_on)
|        self.next_draw = 0
|        self.ahead: list[Tensor] = []  # draws made but not taken, the next one last
|
|    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
|        """The next draw, (B, …) as ``shape`` says, standard normal."""
|        if len(shape) < 2 or shape[0] != len(self.indices):
|            raise ValueError(f"noise of shape {tuple(shape)} for {len(self.indices)} images")
|        count = math.prod(shape[1:])
|        if not self.ahead or self.ahead[-1].shape[1:] != (count,):
|            # The first draw is often the only one; later ones come in blocks, so that a small
|            # model does not wait for many small operations at every step.
|            values = VALUES_AHEAD.get(self.indices.device.type, VALUES_AHEAD["cpu"])
|            draws = max(1, min(DRAWS_AHEAD, values // (len(self.indices) * count)))
|            draws = draws if self.next_draw else 1
|            made = philox_normal(self.seed, self.indices, self.next_draw, draws, count)
|            self.ahead = list(made.to(dtype).to(self.device).unbind())[::-1]
|        self.next_draw += 1
|        return self.ahead.pop().to(dtype).view(tuple(shape))
|
|    def __torch_function__(
|        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
|    ) -> Any:
|        kwargs = kwargs or {}
|        if func is not torch.randn:
|            return func(*args, **kwargs)
|        shape = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
|        return self.draw(shape, kwargs.get("dtype") or torch.get_default_dtype())
|
|
|class BlendedNoise(ImageNoise):
|    """Noise between two images' for each row: cos(πf/2) of the one and sin(πf/2) of the other.
|
|    Both being independent and standard normal, so is every blend: each is as likely an image as
|    its two ends.
|
|    Args:
|        seed, indices, device: as for :class:`ImageNoise`; the noise at fraction 0.
|        others: B integers, the images whose noise is met at fraction 1.
|        fractions: B numbers in 0 … 1.
|    """
|
|    def __init__(
|        self,
|        seed: int,
|        indices: Sequence[int] | Tensor,
|        device: torch.device | str,
|        others: Sequence[int] | Tensor,
|        fractions: Sequence[float] | Tensor,
|    ):
|        super().__init__(seed, indices, device)
|        self.other = ImageNoise(seed, others, device)
|        angle = torch.as_tensor(fractions, dtype=torch.float64) * (math.pi / 2)
|        # cos(π/2) is not quite 0 in floating point; the ends shall be the images themselves.
|        self.weights = (angle.cos().round(decimals=15), angle.sin().round(decimals=15))
|
|    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
|        ends = super().draw(shape, dtype), self.other.draw(shape, dtype)
|        near, far = (
|            weight.to(self.device, dtype).view(-1, *[1] * (len(shape) - 1))
|            for weight in self.weights
|        )
|        return near * ends[0] + far * ends[1]
'''
MODULES[PACKAGE + '.pipeline'] = r'''
|"""MoHDiTPipeline: class labels in, images out, through any diffusers scheduler that fits."""
|
|import contextlib
|import difflib
|import inspect
|import os
|import re
|from collections.abc import Callable, Sequence
|from dataclasses import dataclass
|from pathlib import Path
|from typing import Any, TypeAlias, cast
|
|import torch
|from diffusers import AutoencoderKL, DiffusionPipeline
|from diffusers.image_processor import VaeImageProcessor
|from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
|from diffusers.schedulers import KarrasDiffusionSchedulers
|from diffusers.utils.torch_utils import randn_tensor
|from torch import Tensor
|
|from .autoencoder import decode_latents
|from .bundle import add_code, is_bundled, use_installed
|from .card import keep_card
|from .diffusion import LearnedVarianceDDPMScheduler
|from .errors import UserError
|from .formats.hub import snapshot
|from .noise import ImageNoise
|from .schedulers import check_scheduler, check_steps, prepare_scheduler
|from .schedulers import prediction_type as predicted_by
|from .transformer import MoHDiTTransformer2DModel
|
|Noise: TypeAlias = torch.Generator | list[torch.Generator] | ImageNoise | None
|StepCallback: TypeAlias = Callable[[Any, int, int, dict], dict | None]
|
|
|@dataclass
|class Guidance:
|    """ε̂ = ε_weak + scale (ε_cond - ε_weak).
|
|    Classifier-free guidance (arXiv 2207.12598) with the null class as the weak prediction, or
|    autoguidance (arXiv 2406.02070) with a weaker model given the same class.
|
|    Attributes:
|        scale: the weight w; 1 for no guidance.
|        num_channels: how many latent channels are guided, from the first; ``None`` for all. The
|            papers' samples guide 3 of 4, a slip kept here for comparison only.
|        interval: guide where the timestep, as a share of the process (1 is pure noise), lies in
|            it; elsewhere one evaluation suffices (limited interval, arXiv 2404.07724).
|        model: the weaker model of autoguidance; ``None`` for the null class.
|    """
|
|    scale: float = 4.0
|    num_channels: int | None = None
|    interval: tuple[float, float] = (0.0, 1.0)
|    model: MoHDiTTransformer2DModel | None = None
|
|    def check(self, transformer: MoHDiTTransformer2DModel) -> None:
|        """Raise ``UserError`` for values that mean nothing with this model."""
|        channels = transformer.config.in_channels
|        if self.num_channels is not None and not 1 <= self.num_channels <= channels:
|            raise UserError(
|                f"guidance_channels is {self.num_channels}; the latent has {channels} channels"
|            )
|        low, high = self.interval
|        if not 0 <= low <= high <= 1:
|            raise UserError(
|                f"guidance_interval is {low}, {high}; give two shares of the process, "
|                "0 ≤ low ≤ high ≤ 1 (1 is pure noise)"
|            )
|        if self.model is not None:
|            for key in ("in_channels", "out_channels", "sample_size", "num_classes"):
|                weak, main = self.model.config[key], transformer.config[key]
|                if weak != main:
|                    raise UserError(f"the guidance model has {key} {weak}, the model has {main}")
|
|    def active_at(self, timestep: Tensor, num_train_timesteps: int) -> bool:
|        """Whether a step at this timestep is guided."""
|        low, high = self.interval
|        return self.scale != 1.0 and low <= float(timestep) / num_train_timesteps <= high
|
|    def __call__(self, conditional: Tensor, weak: Tensor, latent_channels: int) -> Tensor:
|        """Combine two predictions (B, C or 2C, H, W); variance values stay the conditional ones."""
|        guided = self.num_channels or latent_channels
|        epsilon = weak[:, :guided] + self.scale * (conditional[:, :guided] - weak[:, :guided])
|        return torch.cat([epsilon, conditional[:, guided:]], dim=1)
|
|
|class MoHDiTPipeline(DiffusionPipeline):
|    """Class-conditional image generation with a (MoH-)DiT.
|
|    Args:
|        transformer: the denoiser, predicting ε and, if ``out_channels`` is twice ``in_channels``,
|            the values of the learned variance.
|        vae: the autoencoder whose latents the transformer was trained on.
|        scheduler: a diffusers scheduler of the process the transformer was trained on.
|        class_names: a name per class, so that labels can be given by name; ``None`` for none.
|        prediction_type: what the transformer predicts, in diffusers' terms (``"epsilon"``,
|            ``"v_prediction"``, ``"sample"``, ``"flow_prediction"``); ``None`` for what the
|            scheduler steps. Saved, and any scheduler put in later must fit it.
|    """
|
|    model_cpu_offload_seq = "transformer->vae"
|
|    def __init__(
|        self,
|        transformer: MoHDiTTransformer2DModel,
|        vae: AutoencoderKL,
|        scheduler: KarrasDiffusionSchedulers,
|        class_names: list[str] | None = None,
|        prediction_type: str | None = None,
|    ):
|        super().__init__()
|        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
|        prediction_type = prediction_type or predicted_by(scheduler)
|        self.register_to_config(class_names=class_names, prediction_type=prediction_type)
|
|    @classmethod
|    def load_config(cls, *args: Any, **options: Any) -> Any:
|        """As diffusers'; a folder with its own code opens with this class all the same."""
|        config = super().load_config(*args, **options)
|        return use_installed(config) if isinstance(config, dict) else config
|
|    @classmethod
|    def download(cls, pretrained_model_name: str, **options: Any) -> str:
|        """As diffusers', which does not let a repository name a class outside diffusers."""
|        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
|        given = {key: options[key] for key in known if options.get(key) is not None}
|        return str(snapshot(pretrained_model_name, **given))
|
|    def save_pretrained(
|        self, save_directory: str | os.PathLike, *args: Any, with_code: bool = False, **options: Any
|    ) -> None:
|        """As diffusers', and a model card beside, which is kept if the folder loaded has one.
|
|        Args:
|            save_directory, args, options: see ``DiffusionPipeline.save_pretrained``.
|            with_code: also put the code there, so that diffusers opens the folder without this
|                package, by ``trust_remote_code=True``. What came with code keeps it.
|        """
|        super().save_pretrained(save_directory, *args, **options)
|        self._complete(Path(save_directory), with_code or is_bundled())
|
|    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **options: Any) -> Any:
|        # Behind both ways to push: whoever downloads may not have this package.
|        self._complete(Path(working_dir), with_code=True)
|        return super()._upload_folder(working_dir, *args, **options)
|
|    def _complete(self, folder: Path, with_code: bool) -> None:
|        if with_code:
|            add_code(folder)
|        keep_card(folder, self.name_or_path, dict(self.transformer.config))
|
|    def label_ids(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
|        """Class ids from ids, names, or a mixture.
|
|        Raises:
|            UserError: for an id out of range or a name that is not a class (the nearest are named).
|        """
|        if isinstance(class_labels, (int, str)):
|            class_labels = [class_labels]
|        names: list[str] = self.config.class_names or []
|        num_classes = self.transformer.config.num_classes
|        ids = []
|        for label in class_labels:
|            if isinstance(label, str) and label in names:
|                label = names.index(label)
|            elif isinstance(label, str) and not re.fullmatch(r"-?\d+", label):
|                nearest = difflib.get_close_matches(label, names, n=3)
|                nearest = nearest or [name for name in names if label.lower() in name.lower()][:3]
|                hint = f"the nearest are {', '.join(nearest)}" if nearest else "give an id"
|                if names and not nearest:
|                    hint += f", or a name such as {', '.join(names[:3])}"
|                raise UserError(f"no class is named {label!r}; {hint}")
|            if not 0 <= (number := int(label)) < num_classes:
|                raise UserError(f"class label {number} is out of range 0 … {num_classes - 1}")
|            ids.append(number)
|        return ids
|
|    @torch.no_grad()
|    def __call__(
|        self,
|        class_labels: int | str | Sequence[int | str] | Tensor,
|        guidance_scale: float = 4.0,
|        guidance_interval: tuple[float, float] = (0.0, 1.0),
|        guidance_channels: int | None = None,
|        guidance_model: MoHDiTTransformer2DModel | None = None,
|        num_inference_steps: int = 250,
|        generator: Noise = None,
|        latents: Tensor | None = None,
|        decode_batch_size: int | None = None,
|        output_type: str = "pil",
|        return_dict: bool = True,
|        callback_on_step_end: StepCallback | None = None,
|    ) -> ImagePipelineOutput | tuple:
|        """Generate one image per label.
|
|        Args:
|            class_labels: ids or names, B of them.
|            guidance_scale: weight w of guidance; 1 turns it off.
|            guidance_interval: guide from the first to the second share of the process only.
|            guidance_channels: guide the first so many latent channels; ``None`` for all.
|            guidance_model: guide away from this weaker model instead of the null class.
|            num_inference_steps: denoising steps, at most the length of the trained process.
|            generator: one; a list of B, which makes an image independent of its batch; or an
|                :class:`~moh_dit.noise.ImageNoise`, the same without B generators to walk.
|            latents: initial noise (B, C, h, w) instead of the generator's.
|            decode_batch_size: images decoded at once; ``None`` for all.
|            output_type: ``"pil"``, ``"np"`` (float32 B×H×W×3 in 0 … 1), ``"pt"`` (float32 B×3×H×W
|                in 0 … 1) or ``"latent"`` (B, C, h, w).
|            return_dict: whether to return an ``ImagePipelineOutput`` or the tuple ``(images,)``.
|            callback_on_step_end: called as ``f(pipeline, step, timestep, {"latents": latents})``;
|                may return a dictionary with new ``latents``.
|
|        Raises:
|            UserError: for labels, steps, guidance, schedulers or output types that do not fit.
|        """
|        labels = torch.tensor(self.label_ids(class_labels), device=self._execution_device)
|        if output_type not in ("pil", "np", "pt", "latent"):
|            raise UserError(f"output_type {output_type!r} is none of pil, np, pt, latent")
|        guidance = Guidance(guidance_scale, guidance_channels, guidance_interval, guidance_model)
|        self.check(guidance, num_inference_steps)
|        latents = self.prepare_latents(len(labels), generator, latents)
|        with self.progress_bar(total=num_inference_steps) as bar:
|
|            def on_step(pipeline: Any, step: int, timestep: int, tensors: dict) -> dict | None:
|                bar.update(min(step + 1, num_inference_steps) - bar.n)  # Heun evaluates twice
|                if callback_on_step_end is None:
|                    return None
|                return callback_on_step_end(pipeline, step, timestep, tensors)
|
|            latents = self.denoise(
|                latents, labels, guidance, num_inference_steps, generator, on_step
|            )
|        images = latents if output_type == "latent" else self.decode(latents, decode_batch_size)
|        if output_type != "latent":
|            images = VaeImageProcessor().postprocess(images, output_type)
|        self.maybe_free_model_hooks()
|        return ImagePipelineOutput(images=images) if return_dict else (images,)
|
|    def check(self, guidance: Guidance, num_inference_steps: int) -> None:
|        """Raise ``UserError`` unless scheduler, steps and guidance fit the model."""
|        check_scheduler(self.scheduler, self.config.prediction_type)
|        check_steps(self.scheduler, num_inference_steps)
|        guidance.check(self.transformer)
|        latent, expected = self.vae.config.latent_channels, self.transformer.config.in_channels
|        if latent != expected:
|            raise UserError(
|                f"the autoencoder has {latent} latent channels, the transformer {expected}: they "
|                "do not belong together"
|            )
|
|    def prepare_latents(
|        self, batch_size: int, generator: Noise = None, latents: Tensor | None = None
|    ) -> Tensor:
|        """Standard normal noise (B, C, h, w), at least float32 whatever the model runs in."""
|        config, dtype = self.transformer.config, self.transformer.dtype
|        dtype = torch.promote_types(dtype, torch.float32)
|        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
|        if latents is None and isinstance(generator, ImageNoise):
|            return generator.draw(shape, dtype)
|        if latents is None:
|            return cast(Tensor, randn_tensor(shape, generator, self._execution_device, dtype))
|        if latents.shape != shape:
|            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
|        return latents.to(self._execution_device, dtype)
|
|    def denoise(
|        self,
|        latents: Tensor,
|        labels: Tensor,
|        guidance: Guidance,
|        num_inference_steps: int,
|        generator: Noise = None,
|        callback_on_step_end: StepCallback | None = None,
|    ) -> Tensor:
|        """Run the reverse process on initial noise (B, C, h, w) for int64 labels (B,).
|
|        The pipeline's scheduler stays as it is: each call steps a fresh one of its configuration,
|        so several threads may sample from one pipeline.
|        """
|        scheduler = prepare_scheduler(self.scheduler, num_inference_steps)
|        learned_variance = isinstance(scheduler, LearnedVarianceDDPMScheduler)
|        channels = self.transformer.config.in_channels
|        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
|        options = {"generator": generator} if takes_generator else {}
|        noise: Any = contextlib.nullcontext()
|        if isinstance(generator, ImageNoise) and not learned_variance:
|            noise, options = generator, {}  # for a scheduler that asks torch for its noise
|        for model in filter(None, (self.transformer, guidance.model)):
|            if model.is_cache_enabled:
|                model._reset_stateful_cache()  # of the images before
|        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
|        on_device = scheduler.timesteps.to(latents.device)  # once: a copy each step would wait
|
|        for step, timestep in enumerate(scheduler.timesteps):
|            scaled = latents
|            if hasattr(scheduler, "scale_model_input"):
|                scaled = scheduler.scale_model_input(latents, timestep)
|            active = guidance.active_at(timestep, scheduler.config.num_train_timesteps)
|            prediction = self.predict(scaled, on_device[step], labels, guidance if active else None)
|            if not learned_variance:
|                prediction = prediction[:, :channels]
|            with noise:
|                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
|            if callback_on_step_end is not None:
|                changed = callback_on_step_end(self, step, timestep, {"latents": latents})
|                latents = (changed or {}).get("latents", latents)
|        return latents
|
|    def predict(
|        self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance: Guidance | None
|    ) -> Tensor:
|        """Prediction (B, out_channels, h, w) for a batch at one timestep, guided or not."""
|        channels = self.transformer.config.in_channels
|        if guidance is None:
|            return self.run_model(self.transformer, latents, timestep, labels)
|        if guidance.model is not None:
|            conditional = self.run_model(self.transformer, latents, timestep, labels)
|            weaker = self.run_model(guidance.model, latents, timestep, labels)
|            return guidance(conditional, weaker, channels)
|        null = torch.full_like(labels, self.transformer.config.num_classes)
|        both = self.run_model(
|            self.transformer, torch.cat([latents] * 2), timestep, torch.cat([labels, null])
|        )
|        conditional, unconditional = both.chunk(2)
|        return guidance(conditional, unconditional, channels)
|
|    def run_model(
|        self, model: MoHDiTTransformer2DModel, latents: Tensor, timestep: Tensor, labels: Tensor
|    ) -> Tensor:
|        """A model's raw output for a batch at one timestep, in the dtype of the latents."""
|        # Guided and unguided steps differ in batch size, so caches keep them apart.
|        caching: Any = contextlib.nullcontext()
|        if model.is_cache_enabled:
|            caching = model.cache_context(f"batch of {len(latents)}")
|        with caching:
|            output = model(latents.to(model.dtype), timestep.expand(len(latents)), labels).sample
|        # A copy: with CUDA graphs the next call overwrites the output.
|        return output.to(latents.dtype, copy=True)
|
|    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
|        """Latents (B, C, h, w) → images (B, 3, H, W) in -1 … 1, ``batch_size`` at once."""
|        chunks = latents.split(batch_size or len(latents))
|        return torch.cat([decode_latents(self.vae, chunk) for chunk in chunks])
'''
MODULES[PACKAGE + '.presets'] = r'''
|"""The published models, one line each (MoH §4.2, appendix; DiT table 1)."""
|
|import difflib
|from typing import TYPE_CHECKING, Any
|
|from .errors import UserError
|
|if TYPE_CHECKING:
|    from .transformer import MoHDiTTransformer2DModel
|
|SIZES: dict[str, dict[str, Any]] = {
|    "S": dict(depth=12, hidden_size=384, num_heads=6),
|    "B": dict(depth=12, hidden_size=768, num_heads=12),
|    "L": dict(depth=24, hidden_size=1024, num_heads=16),
|    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
|}
|
|
|def _moh(heads: Any, shared: list[int], routed: list[int], head_dim: int) -> dict[str, Any]:
|    plan = dict(num_heads=heads, num_shared_heads=shared, num_active_routed_heads=routed)
|    return {**plan, "head_dim": head_dim}
|
|
|# Heads, shared heads and active routed heads of every layer; head width. The number in the name is
|# the share of active heads in percent, over the whole model.
|_L_HEADS = [8] * 8 + [16] * 8 + [24] * 8
|_XL_HEADS = [8] * 9 + [16] * 10 + [24] * 9
|# fmt: off
|MOH_PLANS = {
|    "S/2-90": _moh(6, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4, 64),
|    "S/2-75": _moh(6, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2, 64),
|    "B/2-90": _moh(12, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2, 64),
|    "B/2-75": _moh(12, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2, 64),
|    "L/2-90": _moh(_L_HEADS, [8] * 8 + [16] * 8 + [16] * 8, [0] * 8 + [0] * 8 + [3] * 8, 64),
|    "L/2-75": _moh(_L_HEADS, [8] * 8 + [8] * 8 + [12] * 8, [0] * 8 + [4] * 8 + [4] * 8, 64),
|    "XL/2-90": _moh(_XL_HEADS, [8] * 9 + [16] * 10 + [16] * 9, [0] * 9 + [0] * 10 + [3] * 9, 72),
|    "XL/2-75": _moh(_XL_HEADS, [8] * 9 + [10] * 10 + [14] * 9, [0] * 9 + [2] * 10 + [2] * 9, 72),
|}
|# fmt: on
|
|PRESETS: dict[str, dict[str, Any]] = {
|    f"DiT-{size}/{patch}": {**shape, "patch_size": patch}
|    for size, shape in SIZES.items()
|    for patch in (2, 4, 8)
|} | {
|    f"MoH-DiT-{name}": {**SIZES[name.split("/")[0]], "patch_size": 2, **plan}
|    for name, plan in MOH_PLANS.items()
|}
|
|
|def build_model(preset: str, **overrides: Any) -> "MoHDiTTransformer2DModel":
|    """Build a model by name, e.g. ``build_model("MoH-DiT-XL/2-75", sample_size=64)``.
|
|    Args:
|        preset: a key of ``PRESETS``.
|        overrides: any configuration of :class:`MoHDiTTransformer2DModel`; ``sample_size`` is 32
|            (256 px images through a factor-8 autoencoder) and ``num_classes`` 1000 unless given.
|
|    Raises:
|        UserError: when there is no preset of that name.
|    """
|    from .transformer import MoHDiTTransformer2DModel  # imports torch; naming presets need not
|
|    return MoHDiTTransformer2DModel(**{**preset_config(preset), **overrides})
|
|
|def preset_config(preset: str) -> dict[str, Any]:
|    """The configuration a preset stands for."""
|    if preset not in PRESETS:
|        nearest = difflib.get_close_matches(preset, PRESETS, n=3, cutoff=0.3) or list(PRESETS)
|        raise UserError(f"no preset is named {preset!r}; the nearest are {', '.join(nearest)}")
|    return PRESETS[preset]
'''
MODULES[PACKAGE + '.projection'] = r'''
|"""Queries, keys, values and router logits as one product."""
|
|from typing import Any, TypeVar
|
|import torch
|import torch.nn.functional as F
|from torch import Tensor, nn
|
|Layer = TypeVar("Layer", bound="JointProjection")
|
|
|class JointProjection(nn.Module):
|    """The part of :class:`moh_dit.MoHAttention` that multiplies by ``qkv`` and the routers."""
|
|    qkv: nn.Linear
|    fused_weight: Tensor | None
|    fused_bias: Tensor | None
|
|    def __init__(self) -> None:
|        super().__init__()
|        self.register_buffer("fused_weight", None, persistent=False)
|        self.register_buffer("fused_bias", None, persistent=False)
|
|    def router_weights(self) -> list[Tensor]:
|        """W_shared (s, C), W_routed (E, C) and W_stage (2, C), as far as the layer has them."""
|        names = ("wg_1", "wg", "wg_0")
|        return [getattr(self, name).weight for name in names if hasattr(self, name)]
|
|    @torch.no_grad()
|    def fuse_projections(self) -> None:
|        """Join ``qkv`` and the routers once, not in every pass, for passes without gradients.
|
|        The layer keeps the copy, a weight (columns, C) and its bias, beside its parameters and out
|        of its state dict; one without router weights has nothing to join. ``train()``, loading a
|        state dict into the layer and :meth:`unfuse_projections` drop it. Weights that change
|        otherwise, as in place by an optimizer or an average, it does not follow: call this again.
|        """
|        if self.router_weights():
|            self.fused_weight, self.fused_bias = self._join()
|
|    def unfuse_projections(self) -> None:
|        """Drop what :meth:`fuse_projections` keeps."""
|        self.fused_weight = self.fused_bias = None
|
|    def train(self: Layer, mode: bool = True) -> Layer:
|        if mode:
|            self.unfuse_projections()
|        return super().train(mode)
|
|    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
|        self.unfuse_projections()
|        super()._load_from_state_dict(*args, **kwargs)
|
|    def _project(self, hidden_states: Tensor) -> Tensor:
|        """(B, N, C) → (B, N, columns), see :func:`moh_dit.attention.moh_attention`."""
|        if self.fused_weight is not None and not torch.is_grad_enabled():
|            return F.linear(hidden_states, self.fused_weight, self.fused_bias)
|        if not self.router_weights():
|            return self.qkv(hidden_states)
|        return F.linear(hidden_states, *self._join())
|
|    def _join(self) -> tuple[Tensor, Tensor | None]:
|        # The router maps ride along as extra rows of one product, padded so that rows of the result
|        # are whole 128-byte lines: compilers would otherwise pad it themselves, by a copy.
|        rows = [self.qkv.weight, *self.router_weights()]
|        padding = -sum(map(len, rows)) % 64
|        weight = torch.cat([*rows, rows[0].new_zeros(padding, self.qkv.in_features)])
|        bias: Tensor | None = self.qkv.bias
|        if bias is not None:
|            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
|        return weight, bias
'''
MODULES[PACKAGE + '.routing'] = r'''
|"""Which heads a token uses and with what weight: gates, their statistics, the load-balance loss.
|
|MoH (arXiv 2410.11842) §3, and §4.4 for the router without parameters. Of h heads the first s are
|shared, the other E = h - s routed, of which each token activates its top k.
|"""
|
|from collections.abc import Sequence
|
|import torch
|from torch import Tensor
|
|from .errors import UserError
|
|ROUTERS = ("learned", "query_norm")
|
|
|def moh_gates(logits: Tensor, heads: int, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
|    """Gates and routing statistics (MoH §3) from router logits.
|
|    Args:
|        logits: (B, N, ≥ h, or h + 2 where there are shared and routed heads), columns W_shared x,
|            W_routed x, W_stage x; whatever follows is ignored.
|        heads, shared: h and s.
|        active: routed heads k that each token activates, 0 for none. Of equal scores the lowest
|            head wins, in every backend.
|
|    Returns:
|        ``gates`` (B, N, h), at least float32, zero where a head is not selected, with mean 1
|        over the shared and over the active routed heads (twice that share of α where both
|        exist); ``router_stats`` (2, E): the share f of tokens that selected each routed head
|        and its mean score P̄ (the gradient flows through P̄ alone), ``None`` without routed
|        heads. Both are batch means, so processes of equal batch size average them.
|    """
|    # Softmax in bf16 would quantise the gates to 8 bits: at least float32 from here.
|    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
|
|    shared_gates = routed_gates = router_stats = None
|    if shared > 0:
|        shared_gates = shared * logits[..., :shared].softmax(-1)  # S
|    if active > 0:
|        scores = logits[..., shared:heads].softmax(-1)  # P
|        selected = select(logits[..., shared:heads], active)  # M
|        kept = scores * selected
|        routed_gates = active * kept / kept.sum(-1, keepdim=True)  # R; the sum is at least 1/E
|        router_stats = load_and_score(selected, scores)
|
|    if shared_gates is None:
|        assert routed_gates is not None
|        return routed_gates, router_stats
|    if routed_gates is None:
|        return shared_gates, router_stats
|    alpha = 2 * logits[..., heads : heads + 2].softmax(-1)  # two-stage α
|    gates = torch.cat([alpha[..., :1] * shared_gates, alpha[..., 1:] * routed_gates], dim=-1)
|    return gates, router_stats
|
|
|def query_norm_gates(query: Tensor, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
|    """Gates and routing statistics without parameters, for continue-tuning (MoH §4.4).
|
|    Shared and selected heads have the gate 1. That of a selected one passes its gradient on to the
|    score P as if the gate were P (straight-through, arXiv 1308.3432), but for k = E, where nothing
|    was selected: there the layer and its gradients are those of plain attention.
|
|    Args:
|        query: (B, h, N, d), before any rotation (which would not change its norm).
|        shared, active: s and k.
|
|    Returns:
|        As :func:`moh_gates`: gates (B, N, h), exactly 1 or 0, and router_stats (2, E).
|    """
|    logits = query_norm_logits(query, shared)
|    ones = logits.new_ones(*logits.shape[:2], shared)
|    if active == 0:
|        return ones, None
|    scores, selected = logits.softmax(-1), select(logits, active)  # P, M
|    gates = selected
|    if active < logits.shape[-1]:
|        gates = selected * (1 + (scores - scores.detach()))
|    return torch.cat([ones, gates], dim=-1), load_and_score(selected, scores)
|
|
|def query_norm_logits(query: Tensor, shared: int) -> Tensor:
|    """‖q_i‖₂ of queries (B, h, N, d) over its standard deviation among the routed heads (B, N, E).
|
|    At least float32. Heads of equal norm have equal logits, and finite gradients.
|    """
|    dtype = torch.promote_types(query.dtype, torch.float32)
|    norms = torch.linalg.vector_norm(query[:, shared:], dim=-1, dtype=dtype).transpose(1, 2)
|    unbiased = norms.shape[-1] > 1
|    return norms * (norms.var(-1, keepdim=True, correction=int(unbiased)) + 1e-12).rsqrt()
|
|
|def select(logits: Tensor, active: int) -> Tensor:
|    """One for the ``active`` highest of the last axis, else zero; of equal ones the lowest wins."""
|    order = logits.argsort(dim=-1, descending=True, stable=True)
|    return torch.zeros_like(logits).scatter(-1, order[..., :active], 1.0)
|
|
|def load_and_score(selected: Tensor, scores: Tensor) -> Tensor:
|    """router_stats (2, E): means over all tokens of M and P (B, N, E)."""
|    return torch.stack([selected.flatten(0, -2).mean(0), scores.flatten(0, -2).mean(0)])
|
|
|def load_balance_loss(
|    router_stats: Sequence[Tensor], num_active_routed_heads: list[int], published: bool = False
|) -> Tensor:
|    """Mean over routed layers of the load-balance term (MoH eq. 8), as a scalar.
|
|    Args:
|        router_stats: (2, E) of each routed layer, f and P̄, averaged over as large a batch as the
|            caller likes (all processes, all micro-steps).
|        num_active_routed_heads: k of the same layers.
|        published: the published scale, ``L_b = E Σ f_i P̄_i``, which is k at even routing, so that
|            layers of different k weigh differently. Default: ``L_b / k``, 1 at even routing
|            whatever the mix.
|    """
|    f, mean_scores = torch.cat(tuple(router_stats), dim=1)  # (ΣE,) each
|    # Neighbours of one scale E / k are summed at once: a sum per layer is hundreds of tiny kernels.
|    scales: list[float] = []
|    columns: list[int] = []
|    for stats, k in zip(router_stats, num_active_routed_heads, strict=True):
|        scale = stats.shape[1] / (1 if published else k)
|        if not scales or scale != scales[-1]:
|            scales.append(scale)
|            columns.append(0)
|        columns[-1] += stats.shape[1]
|    products = (f * mean_scores).split(columns)
|    terms = [scale * part.sum() for scale, part in zip(scales, products, strict=True)]
|    return torch.stack(terms).sum() / len(router_stats)
|
|
|def check_head_plan(
|    dim: int, num_heads: int, shared: int | None, active: int | None, head_dim: int | None
|) -> None:
|    """Raise ``UserError`` unless one layer's heads add up."""
|    if num_heads < 1:
|        raise UserError(f"num_heads is {num_heads}; a layer needs at least one head")
|    if head_dim is None and dim % num_heads:
|        raise UserError(f"width {dim} is not divisible by num_heads {num_heads}; set head_dim")
|    if head_dim is not None and head_dim < 1:
|        raise UserError(f"head_dim is {head_dim}; it must be at least 1")
|    if shared is None:
|        if active:
|            raise UserError(
|                f"num_active_routed_heads is {active} but num_shared_heads is not set; "
|                "give num_shared_heads (0 for none), or neither for dense attention"
|            )
|        return
|    active = active or 0
|    if not 0 <= shared <= num_heads:
|        raise UserError(f"num_shared_heads is {shared}; it must lie in 0 … num_heads ({num_heads})")
|    if not 0 <= active <= num_heads - shared:
|        raise UserError(
|            f"num_active_routed_heads is {active}, but {num_heads} heads with {shared} shared "
|            f"leave {num_heads - shared} to route over"
|        )
|    if active == 0 and shared < num_heads:
|        raise UserError(
|            f"num_active_routed_heads is 0 with {num_heads - shared} routed heads, which no token "
|            f"could ever use; set num_shared_heads to {num_heads} or activate at least one"
|        )
'''
MODULES[PACKAGE + '.schedulers'] = r'''
|"""Samplers by name, as diffusers schedulers, and which of them fit what a model predicts."""
|
|import inspect
|from typing import Any, NamedTuple
|
|import diffusers
|from diffusers import DDPMScheduler
|
|from .diffusion import LearnedVarianceDDPMScheduler
|from .errors import UserError
|
|NOISE = ("epsilon", "v_prediction", "sample")
|FLOW = ("flow_prediction",)
|
|
|class Sampler(NamedTuple):
|    """A diffusers class, its options beyond the trained process, the predictions it can step."""
|
|    scheduler: str
|    predictions: tuple[str, ...]
|    options: dict[str, Any]
|
|
|# fmt: off
|SAMPLERS = {
|    "ddpm": Sampler("DDPMScheduler", NOISE, {}),
|    "ddim": Sampler("DDIMScheduler", NOISE, dict(timestep_spacing="leading", clip_sample=False)),
|    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", NOISE, dict(solver_order=2)),
|    "sde-dpmsolver++": Sampler("DPMSolverMultistepScheduler", NOISE,
|                               dict(solver_order=2, algorithm_type="sde-dpmsolver++")),
|    "unipc": Sampler("UniPCMultistepScheduler", NOISE, {}),
|    "euler": Sampler("EulerDiscreteScheduler", NOISE, {}),
|    "euler-ancestral": Sampler("EulerAncestralDiscreteScheduler", ("epsilon", "v_prediction"), {}),
|    "heun": Sampler("HeunDiscreteScheduler", ("epsilon", "v_prediction"), {}),
|    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler", FLOW, {}),
|    "flow-heun": Sampler("FlowMatchHeunDiscreteScheduler", FLOW, {}),
|    "flow-dpmsolver++": Sampler("DPMSolverMultistepScheduler", FLOW,
|                                dict(use_flow_sigmas=True, prediction_type="flow_prediction")),
|    "flow-unipc": Sampler("UniPCMultistepScheduler", FLOW,
|                          dict(use_flow_sigmas=True, prediction_type="flow_prediction")),
|}
|# fmt: on
|
|
|def prediction_type(scheduler: Any) -> str:
|    """What a model stepped by this scheduler must predict, in diffusers' terms."""
|    if type(scheduler).__name__.startswith("FlowMatch"):
|        return "flow_prediction"
|    return scheduler.config.get("prediction_type", "epsilon")
|
|
|def samplers_for(prediction: str) -> list[str]:
|    """Names of the samplers for a model that predicts ``prediction``."""
|    return [name for name, sampler in SAMPLERS.items() if prediction in sampler.predictions]
|
|
|def named_scheduler(name: str, trained: Any) -> Any:
|    """The sampler ``name`` on the process of the ``trained`` scheduler.
|
|    Raises:
|        UserError: for an unknown name, or a sampler that does not fit what the model predicts.
|    """
|    prediction = prediction_type(trained)
|    fitting = samplers_for(prediction)
|    if name not in fitting:
|        reason = "unknown"
|        if name in SAMPLERS:
|            steps = " or ".join(SAMPLERS[name].predictions)
|            reason = f"the model predicts {prediction}, {name} steps {steps}"
|        raise UserError(f"scheduler {name!r}: {reason}; those that fit are {', '.join(fitting)}")
|    sampler = SAMPLERS[name]
|    config = dict(trained.config)
|    if sampler.scheduler != "DDPMScheduler":
|        config.pop("variance_type", None)
|    if not sampler.scheduler.startswith("FlowMatch") and "shift" in config:
|        config["flow_shift"] = config["shift"]  # the same under the other classes' name
|    kind = getattr(diffusers, sampler.scheduler)
|    known = inspect.signature(kind.__init__).parameters  # what the class would warn about, left out
|    config = {key: value for key, value in config.items() if key in known or key[0] == "_"}
|    return kind.from_config(config, **sampler.options)
|
|
|def check_scheduler(scheduler: Any, prediction: str) -> None:
|    """Raise ``UserError`` unless ``scheduler`` steps what the model predicts."""
|    if (stepped := prediction_type(scheduler)) == prediction:
|        return
|    fitting = [SAMPLERS[name].scheduler for name in samplers_for(prediction)]
|    raise UserError(
|        f"{type(scheduler).__name__} steps {stepped}, the model predicts {prediction}; "
|        f"those that fit are {', '.join(dict.fromkeys(fitting))}"
|    )
|
|
|def check_steps(scheduler: Any, num_inference_steps: int) -> None:
|    """Raise ``UserError`` unless the trained process has that many steps."""
|    limit = scheduler.config.num_train_timesteps
|    if not 1 <= num_inference_steps <= limit:
|        raise UserError(
|            f"num_inference_steps is {num_inference_steps}; the model was trained on {limit} "
|            f"steps, so give 1 … {limit}"
|        )
|
|
|def prepare_scheduler(scheduler: Any, num_inference_steps: int) -> Any:
|    """A fresh scheduler of the same configuration, its timesteps set.
|
|    The learned variance is stepped by this project's own class; elsewhere the variance type means
|    another kind of model output, and is dropped with it.
|    """
|    kind: Any = type(scheduler)
|    options: dict[str, Any] = {}
|    if kind is DDPMScheduler and scheduler.config.variance_type == "learned_range":
|        kind = LearnedVarianceDDPMScheduler
|    elif not isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type"):
|        options["variance_type"] = None
|    fresh = kind.from_config(dict(scheduler.config), **options)
|    fresh.set_timesteps(num_inference_steps)
|    return fresh
'''
MODULES[PACKAGE + '.transformer'] = r'''
|"""MoHDiTTransformer2DModel: a class-conditional Diffusion Transformer with mixture-of-head layers.
|
|DiT (arXiv 2212.09748) with adaLN-Zero blocks; attention is MoH (arXiv 2410.11842) or, in a layer
|without a router, plain multi-head attention. Parameter names are those of the published
|checkpoints, so their state dicts load as they are.
|"""
|
|from dataclasses import dataclass
|from typing import ClassVar, cast
|
|import torch
|import torch.nn.functional as F
|from diffusers.configuration_utils import ConfigMixin, register_to_config
|from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
|from diffusers.models.cache_utils import CacheMixin
|from diffusers.models.embeddings import get_2d_sincos_pos_embed
|from diffusers.models.modeling_utils import ModelMixin
|from diffusers.utils import BaseOutput
|from torch import Tensor, nn
|
|from .attention import MoHAttention, load_balance_loss
|from .embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder
|from .errors import UserError
|from .kernels import BACKENDS, MLP_BACKENDS, MODULATION_BACKENDS, check_choice
|from .kernels.linear_gelu import linear_gelu, takes_linear_gelu
|from .modulation import adaln
|
|HeadPlan = int | list[int] | list[int | None] | None
|
|
|@dataclass
|class MoHDiTOutput(BaseOutput):
|    """What the model returns.
|
|    ``sample`` (B, out_channels, H, W): ε̂, and with learned variance the values v behind it.
|    ``load_balance_loss``: scalar, the mean over routed layers of L_b / k (MoH eq. 8; 1 at even
|    routing), over this batch; ``None`` in evaluation mode or without routed layers.
|    ``router_stats``: for each routed layer in turn (2, E), the load f and mean score P̄ behind that
|    loss; ``None`` where it is.
|    """
|
|    sample: Tensor
|    load_balance_loss: Tensor | None = None
|    router_stats: tuple[Tensor, ...] | None = None
|
|
|class MoHDiTTransformer2DModel(ModelMixin, ConfigMixin, CacheMixin):
|    """Diffusion Transformer whose layers each have their own head plan.
|
|    Args:
|        sample_size: height and width of the latent, in latent pixels.
|        patch_size: side of a token, in latent pixels; divides ``sample_size``.
|        in_channels: latent channels.
|        out_channels: channels of the prediction; ``None`` means ``2 * in_channels`` (ε and the
|            values of the learned variance, iDDPM eq. 15).
|        hidden_size: model width C, a multiple of 4 (2-D sin-cos positions).
|        depth: number of blocks.
|        num_heads: heads h, one number or one per layer.
|        num_shared_heads: shared heads s, one number or one per layer; ``None``, for all layers or
|            for one, is plain multi-head attention there.
|        num_active_routed_heads: routed heads k that each token activates, likewise.
|        head_dim: width d of a head in every layer; ``None`` means ``hidden_size / h``.
|        mlp_ratio: hidden width of the MLP over C.
|        num_classes: classes; the label ``num_classes`` is the null class of guidance.
|        router: "learned", or "query_norm" without parameters, as continue-tuning from a dense model
|            wants it (``moh_dit.continue_tuning``); of all layers that route.
|        label_init_std: standard deviation of the label table at the start. At the published 0.02
|            a model needs some thousands of steps to hear its labels; short runs want 0.5.
|        timestep_freq_shift: what is taken off the number of timestep frequencies before they are
|            spread: 0 as published; 1 for a model trained in diffusers' ``DiTTransformer2DModel``.
|
|    Raises:
|        UserError: when the head plan or the sizes do not add up.
|    """
|
|    _supports_gradient_checkpointing = True
|    _no_split_modules: ClassVar = ["DiTBlock"]
|    _repeated_blocks: ClassVar = ["DiTBlock"]
|
|    @register_to_config
|    def __init__(
|        self,
|        sample_size: int = 32,
|        patch_size: int = 2,
|        in_channels: int = 4,
|        out_channels: int | None = None,
|        hidden_size: int = 1152,
|        depth: int = 28,
|        num_heads: HeadPlan = 16,
|        num_shared_heads: HeadPlan = None,
|        num_active_routed_heads: HeadPlan = None,
|        head_dim: int | None = None,
|        mlp_ratio: float = 4.0,
|        num_classes: int = 1000,
|        label_init_std: float = 0.02,
|        router: str = "learned",
|        timestep_freq_shift: float = 0,
|    ):
|        super().__init__()
|        if sample_size % patch_size:
|            raise UserError(
|                f"sample_size {sample_size} is not divisible by patch_size {patch_size}"
|            )
|        if hidden_size % 4:
|            raise UserError(f"hidden_size {hidden_size} is not a multiple of 4")
|        heads = per_layer("num_heads", num_heads, depth)
|        shared = per_layer("num_shared_heads", num_shared_heads, depth)
|        active = per_layer("num_active_routed_heads", num_active_routed_heads, depth)
|        out_channels = out_channels or 2 * in_channels
|        self.register_to_config(out_channels=out_channels)
|
|        grid_size = sample_size // patch_size
|        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
|        positions = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size)
|        # Frozen, but a parameter: published parameter counts include it.
|        self.pos_embed = nn.Parameter(positions.float().unsqueeze(0), requires_grad=False)
|        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_shift)
|        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
|        self.blocks = nn.ModuleList()
|        for layer, plan in enumerate(zip(heads, shared, active, strict=True)):
|            try:
|                self.blocks.append(DiTBlock(hidden_size, mlp_ratio, *plan, head_dim, router))
|            except UserError as error:
|                raise UserError(f"layer {layer}: {error}") from None
|        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
|        self.gradient_checkpointing = False
|        self.initialize_weights()
|
|    def initialize_weights(self) -> None:
|        """Xavier-uniform linears, normal label table and timestep MLP, zero modulation."""
|        for module in self.modules():
|            if isinstance(module, nn.Linear):
|                nn.init.xavier_uniform_(module.weight)
|                if module.bias is not None:
|                    nn.init.zeros_(module.bias)
|        patches = self.x_embedder.proj
|        nn.init.xavier_uniform_(patches.weight.flatten(1))
|        nn.init.zeros_(cast(Tensor, patches.bias))
|        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_init_std)
|        for name, parameter in self.t_embedder.named_parameters():
|            if name.endswith("weight"):
|                nn.init.normal_(parameter, std=0.02)
|        # adaLN-Zero: every block starts as the identity, the whole model as zero.
|        for name, parameter in self.named_parameters():
|            if "adaLN_modulation" in name:
|                nn.init.zeros_(parameter)
|        nn.init.zeros_(self.final_layer.linear.weight)
|
|    @property
|    def null_class(self) -> int:
|        """The label that stands for "no class" in guidance and label dropout."""
|        return self.config.num_classes
|
|    @property
|    def routed_layers(self) -> dict[int, MoHAttention]:
|        """The attention of the layers that route, by layer index, in ``router_stats`` order."""
|        layers = enumerate(cast(DiTBlock, block).attn for block in self.blocks)
|        return {i: attention for i, attention in layers if attention.num_active_routed_heads}
|
|    def set_attention_backend(self, backend: str) -> None:
|        """Compute every layer with a router by ``backend`` (see ``moh_dit.attention``).
|
|        Raises:
|            UserError: when there is no backend of that name.
|        """
|        check_choice("attention_backend", backend, BACKENDS)
|        for block in self.blocks:
|            cast(DiTBlock, block).attn.attention_backend = backend
|
|    def set_modulation_backend(self, backend: str) -> None:
|        """Compute adaLN by ``backend``: "reference", "triton" (GPU: one pass) or "auto".
|
|        Raises:
|            UserError: when there is no backend of that name.
|        """
|        check_choice("modulation_backend", backend, MODULATION_BACKENDS)
|        for layer in (*self.blocks, self.final_layer):
|            cast(DiTBlock | FinalLayer, layer).modulation_backend = backend
|
|    def set_mlp_backend(self, backend: str) -> None:
|        """Compute the MLPs by ``backend``: "reference", or "auto", in which the GELU rides on the
|        linear layer before it where that was measured to be faster (GPU, evaluation).
|
|        Raises:
|            UserError: when there is no backend of that name.
|        """
|        check_choice("mlp_backend", backend, MLP_BACKENDS)
|        for block in self.blocks:
|            cast(DiTBlock, block).mlp.backend = backend
|
|    def fuse_qkv_projections(self) -> None:
|        """Join queries, keys, values and routers of every layer once, for weights that stay.
|
|        See :meth:`MoHAttention.fuse_projections`: passes without gradients use the copy, and
|        weights that change in place need another call.
|        """
|        for module in self.modules():
|            if isinstance(module, MoHAttention):
|                module.fuse_projections()
|
|    def unfuse_qkv_projections(self) -> None:
|        """Undo :meth:`fuse_qkv_projections`."""
|        for module in self.modules():
|            if isinstance(module, MoHAttention):
|                module.unfuse_projections()
|
|    def forward(
|        self,
|        hidden_states: Tensor,
|        timestep: Tensor,
|        class_labels: Tensor,
|        return_dict: bool = True,
|    ) -> MoHDiTOutput | tuple[Tensor]:
|        """Predict the noise (and variance values) in noisy latents.
|
|        Args:
|            hidden_states: (B, in_channels, sample_size, sample_size).
|            timestep: (B,) or scalar, integer or fractional, in ``0 … 999`` as trained.
|            class_labels: int64 (B,), ``0 … num_classes``; the last is the null class.
|            return_dict: whether to return a :class:`MoHDiTOutput` or the tuple ``(sample,)``.
|
|        Raises:
|            UserError: when the latents are not of the configured size.
|        """
|        size = self.config.sample_size
|        if hidden_states.shape[-2:] != (size, size):
|            raise UserError(
|                f"latents are {tuple(hidden_states.shape[-2:])}, the model's sample_size is {size}"
|            )
|        hidden_states = self.x_embedder(hidden_states) + self.pos_embed  # (B, N, C)
|        timestep = timestep.expand(hidden_states.shape[0])
|        condition = self.t_embedder(timestep) + self.y_embedder(class_labels)  # (B, C)
|
|        router_stats = []
|        for block in self.blocks:
|            if torch.is_grad_enabled() and self.gradient_checkpointing:
|                output = self._gradient_checkpointing_func(block, hidden_states, condition)
|            else:
|                output = block(hidden_states, condition)
|            hidden_states, stats = output if self.training else (output, None)
|            if stats is not None:
|                router_stats.append(stats)
|
|        sample = self.unpatchify(self.final_layer(hidden_states, condition))
|        if not return_dict:
|            return (sample,)
|        if not (self.training and router_stats):
|            return MoHDiTOutput(sample=sample)
|        active = [layer.num_active_routed_heads for layer in self.routed_layers.values()]
|        balance = load_balance_loss(router_stats, active)
|        return MoHDiTOutput(sample, balance, tuple(router_stats))
|
|    def unpatchify(self, tokens: Tensor) -> Tensor:
|        """(B, N, p·p·out_channels) → (B, out_channels, H, W)."""
|        p, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
|        tokens = tokens.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
|        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
|
|
|class DiTBlock(nn.Module):
|    """adaLN-Zero block (DiT §3.2): attention and MLP, each shifted, scaled and gated by (t, y).
|
|    Returns (B, N, C) alone in evaluation mode, which is what diffusers' caches can replay, and
|    with the attention's ``router_stats`` in training.
|    """
|
|    modulation_backend = "auto"
|
|    def __init__(
|        self,
|        hidden_size: int,
|        mlp_ratio: float,
|        num_heads: int,
|        num_shared_heads: int | None,
|        num_active_routed_heads: int | None,
|        head_dim: int | None,
|        router: str = "learned",
|    ):
|        super().__init__()
|        self.attn = MoHAttention(
|            hidden_size,
|            num_heads,
|            num_shared_heads,
|            num_active_routed_heads,
|            head_dim,
|            router=router,
|        )
|        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
|        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
|
|    def forward(
|        self, hidden_states: Tensor, condition: Tensor
|    ) -> Tensor | tuple[Tensor, Tensor | None]:
|        # The statistics leave as a plain output: checkpointing, re-entrant or not, keeps gradients.
|        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
|        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, C) each
|        backend = self.modulation_backend
|        hidden_states, read = adaln(hidden_states, shift1, scale1, backend=backend)
|        attended, router_stats = self.attn(read)
|        hidden_states, read = adaln(hidden_states, shift2, scale2, gate1, attended, backend)
|        hidden_states = hidden_states + gate2 * self.mlp(read)
|        return (hidden_states, router_stats) if self.training else hidden_states
|
|
|# What diffusers' caches (first-block, MagCache) need to know of a block.
|TransformerBlockRegistry.register(DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
|
|
|class Mlp(nn.Module):
|    """Two linears around a tanh GELU."""
|
|    backend = "auto"
|
|    def __init__(self, dim: int, hidden_dim: int):
|        super().__init__()
|        self.fc1 = nn.Linear(dim, hidden_dim)
|        self.fc2 = nn.Linear(hidden_dim, dim)
|
|    def forward(self, x: Tensor) -> Tensor:
|        if self.backend == "auto" and takes_linear_gelu(x, self.fc1):
|            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
|        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
|
|
|class FinalLayer(nn.Module):
|    """adaLN, then a linear map to the pixels of each patch."""
|
|    modulation_backend = "auto"
|
|    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
|        super().__init__()
|        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
|        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
|
|    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
|        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
|        _, read = adaln(hidden_states, shift, scale, backend=self.modulation_backend)
|        return self.linear(read)
|
|
|def per_layer(name: str, value: HeadPlan, depth: int) -> list:
|    """One value per layer from one for all or a list."""
|    if not isinstance(value, (list, tuple)):
|        return [value] * depth
|    if len(value) != depth:
|        raise UserError(f"{name} lists {len(value)} layers, depth is {depth}")
|    return list(value)
'''


class Modules(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    # Imports the package from the texts above.

    text = pathlib.Path(__file__).read_text(encoding="utf-8")  # to be saved with the weights again

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        folder = [] if any(module.startswith(name + ".") for module in MODULES) else None
        return importlib.util.spec_from_file_location(
            name, self.get_filename(name), loader=self, submodule_search_locations=folder
        )

    def get_filename(self, name):
        return __file__ + "/" + name.replace(".", "/") + ".py"

    def get_source(self, name):
        return "\n".join(line[1:] for line in MODULES[name].splitlines()[1:]) + "\n"

    def get_code(self, name):
        return compile(self.get_source(name), self.get_filename(name), "exec")


if PACKAGE not in sys.modules:
    sys.meta_path.append(Modules())
MoHDiTPipeline = importlib.import_module(PACKAGE + ".pipeline").MoHDiTPipeline
MoHDiTTransformer2DModel = importlib.import_module(
    PACKAGE + ".transformer"
).MoHDiTTransformer2DModel
