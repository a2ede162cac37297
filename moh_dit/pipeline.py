"""MoHDiTPipeline: class labels in, images out, through any diffusers scheduler that fits."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .autoencoder import decode_latents
from .diffusion import LearnedVarianceDDPMScheduler
from .errors import UserError
from .transformer import MoHDiTTransformer2DModel


@dataclass
class Guidance:
    """Classifier-free guidance: ε̂ = ε_null + scale (ε_cond - ε_null).

    ``num_channels``: how many latent channels are guided, from the first; ``None`` for all. The
    papers' samples guide 3 of 4, a slip kept here for comparison only.
    """

    scale: float = 4.0
    num_channels: int | None = None

    @property
    def active(self) -> bool:
        return self.scale != 1.0

    def __call__(self, conditional: Tensor, null: Tensor, latent_channels: int) -> Tensor:
        """Combine two predictions (B, C or 2C, H, W); variance values stay the conditional ones."""
        guided = self.num_channels or latent_channels
        epsilon = null[:, :guided] + self.scale * (conditional[:, :guided] - null[:, :guided])
        return torch.cat([epsilon, conditional[:, guided:]], dim=1)


class MoHDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a (MoH-)DiT.

    Args:
        transformer: the denoiser, predicting ε and, if ``out_channels`` is twice ``in_channels``,
            the values of the learned variance.
        vae: the autoencoder whose latents the transformer was trained on.
        scheduler: a diffusers scheduler of the process the transformer was trained on.
        class_names: a name per class, so that labels can be given by name; ``None`` for none.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: MoHDiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(class_names=class_names)

    def label_ids(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Class ids from ids, names, or a mixture.

        Raises:
            UserError: for an id out of range or a name that is not a class (the nearest are named).
        """
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        names: list[str] = self.config.class_names or []
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if isinstance(label, str) and label in names:
                label = names.index(label)
            elif isinstance(label, str) and not label.isdecimal():
                nearest = difflib.get_close_matches(label, names, n=3)
                hint = f"the nearest are {', '.join(nearest)}" if nearest else "give an id"
                raise UserError(f"no class is named {label!r}; {hint}")
            if not 0 <= (number := int(label)) < num_classes:
                raise UserError(f"class label {number} is out of range 0 … {num_classes - 1}")
            ids.append(number)
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        decode_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: ids or names, B of them.
            guidance_scale: weight w of classifier-free guidance; 1 turns it off.
            guidance_channels: guide the first so many latent channels; ``None`` for all.
            num_inference_steps: denoising steps, at most the length of the trained process.
            generator: one, or a list of B, which makes an image independent of its batch.
            latents: initial noise (B, C, h, w) instead of the generator's.
            decode_batch_size: images decoded at once; ``None`` for all.
            output_type: ``"pil"``, ``"np"`` (float32 B×H×W×3 in 0 … 1), ``"pt"`` (float32 B×3×H×W
                in 0 … 1) or ``"latent"`` (B, C, h, w).
            return_dict: whether to return an ``ImagePipelineOutput`` or the tuple ``(images,)``.
            callback_on_step_end: called as ``f(pipeline, step, timestep, {"latents": latents})``;
                may return a dictionary with new ``latents``.

        Raises:
            UserError: for labels, step counts or output types that do not fit.
        """
        labels = torch.tensor(self.label_ids(class_labels), device=self._execution_device)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        self._check_steps(num_inference_steps)
        guidance = Guidance(guidance_scale, guidance_channels)
        latents = self.prepare_latents(len(labels), generator, latents)
        latents = self.denoise(
            latents, labels, guidance, num_inference_steps, generator, callback_on_step_end
        )
        images = latents if output_type == "latent" else self.decode(latents, decode_batch_size)
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Initial noise (B, C, h, w), at least float32 whatever the model runs in."""
        config, dtype = self.transformer.config, self.transformer.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, dtype)
            return cast(Tensor, latents) * self.scheduler.init_noise_sigma
        if latents.shape != shape:
            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
        return latents.to(self._execution_device, dtype)

    def denoise(
        self,
        latents: Tensor,
        labels: Tensor,
        guidance: Guidance,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> Tensor:
        """Run the reverse process on initial noise (B, C, h, w) for int64 labels (B,)."""
        scheduler = self.scheduler
        learned_variance = scheduler.config.get("variance_type") == "learned_range"
        if learned_variance and type(scheduler) is DDPMScheduler:
            scheduler = LearnedVarianceDDPMScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        channels = self.transformer.config.in_channels
        step_options = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        null = torch.full_like(labels, self.transformer.config.num_classes)

        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            scaled = scheduler.scale_model_input(latents, timestep)
            if guidance.active:
                both = self.predict(torch.cat([scaled] * 2), timestep, torch.cat([labels, null]))
                conditional, unconditional = both.chunk(2)
                prediction = guidance(conditional, unconditional, channels)
            else:
                prediction = self.predict(scaled, timestep, labels)
            if not learned_variance:
                prediction = prediction[:, :channels]
            prediction = prediction.to(latents.dtype)
            latents = scheduler.step(prediction, timestep, latents, **step_options).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, timestep, {"latents": latents})
                latents = (changed or {}).get("latents", latents)
        return latents

    def predict(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The transformer's raw output for a batch at one timestep."""
        timesteps = timestep.to(latents.device).expand(len(latents))
        return self.transformer(latents.to(self.transformer.dtype), timesteps, labels).sample

    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W) in -1 … 1, ``batch_size`` at once."""
        chunks = latents.split(batch_size or len(latents))
        return torch.cat([decode_latents(self.vae, chunk) for chunk in chunks])

    def _check_steps(self, num_inference_steps: int) -> None:
        limit = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= limit:
            raise UserError(
                f"num_inference_steps is {num_inference_steps}; the model was trained on {limit} "
                f"steps, so give 1 … {limit}"
            )
