"""MoHDiTPipeline: class labels in, images out, through any diffusers scheduler that fits."""

import contextlib
import difflib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..autoencoder import decode_latents
from ..common.errors import UserError
from ..common.hub import snapshot
from ..diffusion.noise import ImageNoise
from ..diffusion.process import LearnedVarianceDDPMScheduler
from ..diffusion.samplers import check_scheduler, check_steps, prepare_scheduler
from ..diffusion.samplers import prediction_type as predicted_by
from ..model.transformer import MoHDiTTransformer2DModel
from .bundled_code import add_code, is_bundled, use_installed
from .model_card import keep_card

Noise: TypeAlias = torch.Generator | list[torch.Generator] | ImageNoise | None
StepCallback: TypeAlias = Callable[[Any, int, int, dict], dict | None]


@dataclass
class Guidance:
    """ε̂ = ε_weak + scale (ε_cond - ε_weak).

    Classifier-free guidance (arXiv 2207.12598) with the null class as the weak prediction, or
    autoguidance (arXiv 2406.02070) with a weaker model given the same class.

    Attributes:
        scale: the weight w; 1 for no guidance.
        num_channels: how many latent channels are guided, from the first; ``None`` for all. The
            papers' samples guide 3 of 4, a slip kept here for comparison only.
        interval: guide where the timestep, as a share of the process (1 is pure noise), lies in
            it; elsewhere one evaluation suffices (limited interval, arXiv 2404.07724).
        model: the weaker model of autoguidance; ``None`` for the null class.
    """

    scale: float = 4.0
    num_channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    model: MoHDiTTransformer2DModel | None = None

    def check(self, transformer: MoHDiTTransformer2DModel) -> None:
        """Raise ``UserError`` for values that mean nothing with this model."""
        channels = transformer.config.in_channels
        if self.num_channels is not None and not 1 <= self.num_channels <= channels:
            raise UserError(
                f"guidance_channels is {self.num_channels}; the latent has {channels} channels"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"guidance_interval is {low}, {high}; give two shares of the process, "
                "0 ≤ low ≤ high ≤ 1 (1 is pure noise)"
            )
        if self.model is not None:
            for key in ("in_channels", "out_channels", "sample_size", "num_classes"):
                weak, main = self.model.config[key], transformer.config[key]
                if weak != main:
                    raise UserError(f"the guidance model has {key} {weak}, the model has {main}")

    def active_at(self, timestep: Tensor, num_train_timesteps: int) -> bool:
        """Whether a step at this timestep is guided."""
        low, high = self.interval
        return self.scale != 1.0 and low <= float(timestep) / num_train_timesteps <= high

    def __call__(self, conditional: Tensor, weak: Tensor, latent_channels: int) -> Tensor:
        """Combine two predictions (B, C or 2C, H, W); variance values stay the conditional ones."""
        guided = self.num_channels or latent_channels
        epsilon = weak[:, :guided] + self.scale * (conditional[:, :guided] - weak[:, :guided])
        return torch.cat([epsilon, conditional[:, guided:]], dim=1)


class MoHDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a (MoH-)DiT.

    Args:
        transformer: the denoiser, predicting ε and, if ``out_channels`` is twice ``in_channels``,
            the values of the learned variance.
        vae: the autoencoder whose latents the transformer was trained on.
        scheduler: a diffusers scheduler of the process the transformer was trained on.
        class_names: a name per class, so that labels can be given by name; ``None`` for none.
        prediction_type: what the transformer predicts, in diffusers' terms (``"epsilon"``,
            ``"v_prediction"``, ``"sample"``, ``"flow_prediction"``); ``None`` for what the
            scheduler steps. Saved, and any scheduler put in later must fit it.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: MoHDiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        class_names: list[str] | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        prediction_type = prediction_type or predicted_by(scheduler)
        self.register_to_config(class_names=class_names, prediction_type=prediction_type)

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """As diffusers'; a folder with its own code opens with this class all the same."""
        config = super().load_config(*args, **options)
        return use_installed(config) if isinstance(config, dict) else config

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """As diffusers', which does not let a repository name a class outside diffusers."""
        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {key: options[key] for key in known if options.get(key) is not None}
        return str(snapshot(pretrained_model_name, **given))

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, with_code: bool = False, **options: Any
    ) -> None:
        """As diffusers', and a model card beside, which is kept if the folder loaded has one.

        Args:
            save_directory, args, options: see ``DiffusionPipeline.save_pretrained``.
            with_code: also put the code there, so that diffusers opens the folder without this
                package, by ``trust_remote_code=True``. What came with code keeps it.
        """
        super().save_pretrained(save_directory, *args, **options)
        self._complete(Path(save_directory), with_code or is_bundled())

    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **options: Any) -> Any:
        # Behind both ways to push: whoever downloads may not have this package.
        self._complete(Path(working_dir), with_code=True)
        return super()._upload_folder(working_dir, *args, **options)

    def _complete(self, folder: Path, with_code: bool) -> None:
        if with_code:
            add_code(folder)
        keep_card(folder, self.name_or_path, dict(self.transformer.config))

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
            elif isinstance(label, str) and not re.fullmatch(r"-?\d+", label):
                nearest = difflib.get_close_matches(label, names, n=3)
                nearest = nearest or [name for name in names if label.lower() in name.lower()][:3]
                hint = f"the nearest are {', '.join(nearest)}" if nearest else "give an id"
                if names and not nearest:
                    hint += f", or a name such as {', '.join(names[:3])}"
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
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        guidance_model: MoHDiTTransformer2DModel | None = None,
        num_inference_steps: int = 250,
        generator: Noise = None,
        latents: Tensor | None = None,
        decode_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: ids or names, B of them.
            guidance_scale: weight w of guidance; 1 turns it off.
            guidance_interval: guide from the first to the second share of the process only.
            guidance_channels: guide the first so many latent channels; ``None`` for all.
            guidance_model: guide away from this weaker model instead of the null class.
            num_inference_steps: denoising steps, at most the length of the trained process.
            generator: one; a list of B, which makes an image independent of its batch; or an
                :class:`~moh_dit.diffusion.noise.ImageNoise`, the same without B generators to walk.
            latents: initial noise (B, C, h, w) instead of the generator's.
            decode_batch_size: images decoded at once; ``None`` for all.
            output_type: ``"pil"``, ``"np"`` (float32 B×H×W×3 in 0 … 1), ``"pt"`` (float32 B×3×H×W
                in 0 … 1) or ``"latent"`` (B, C, h, w).
            return_dict: whether to return an ``ImagePipelineOutput`` or the tuple ``(images,)``.
            callback_on_step_end: called as ``f(pipeline, step, timestep, {"latents": latents})``;
                may return a dictionary with new ``latents``.

        Raises:
            UserError: for labels, steps, guidance, schedulers or output types that do not fit.
        """
        labels = torch.tensor(self.label_ids(class_labels), device=self._execution_device)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        guidance = Guidance(guidance_scale, guidance_channels, guidance_interval, guidance_model)
        self.check(guidance, num_inference_steps)
        latents = self.prepare_latents(len(labels), generator, latents)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(pipeline: Any, step: int, timestep: int, tensors: dict) -> dict | None:
                bar.update(min(step + 1, num_inference_steps) - bar.n)  # Heun evaluates twice
                if callback_on_step_end is None:
                    return None
                return callback_on_step_end(pipeline, step, timestep, tensors)

            latents = self.denoise(
                latents, labels, guidance, num_inference_steps, generator, on_step
            )
        images = latents if output_type == "latent" else self.decode(latents, decode_batch_size)
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check(self, guidance: Guidance, num_inference_steps: int) -> None:
        """Raise ``UserError`` unless scheduler, steps and guidance fit the model."""
        check_scheduler(self.scheduler, self.config.prediction_type)
        check_steps(self.scheduler, num_inference_steps)
        guidance.check(self.transformer)
        latent, expected = self.vae.config.latent_channels, self.transformer.config.in_channels
        if latent != expected:
            raise UserError(
                f"the autoencoder has {latent} latent channels, the transformer {expected}: they "
                "do not belong together"
            )

    def prepare_latents(
        self, batch_size: int, generator: Noise = None, latents: Tensor | None = None
    ) -> Tensor:
        """Standard normal noise (B, C, h, w), at least float32 whatever the model runs in."""
        config, dtype = self.transformer.config, self.transformer.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None and isinstance(generator, ImageNoise):
            return generator.draw(shape, dtype)
        if latents is None:
            return cast(Tensor, randn_tensor(shape, generator, self._execution_device, dtype))
        if latents.shape != shape:
            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
        return latents.to(self._execution_device, dtype)

    def denoise(
        self,
        latents: Tensor,
        labels: Tensor,
        guidance: Guidance,
        num_inference_steps: int,
        generator: Noise = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Tensor:
        """Run the reverse process on initial noise (B, C, h, w) for int64 labels (B,).

        The pipeline's scheduler stays as it is: each call steps a fresh one of its configuration,
        so several threads may sample from one pipeline.
        """
        scheduler = prepare_scheduler(self.scheduler, num_inference_steps)
        learned_variance = isinstance(scheduler, LearnedVarianceDDPMScheduler)
        channels = self.transformer.config.in_channels
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        noise: Any = contextlib.nullcontext()
        if isinstance(generator, ImageNoise) and not learned_variance:
            noise, options = generator, {}  # for a scheduler that asks torch for its noise
        for model in filter(None, (self.transformer, guidance.model)):
            if model.is_cache_enabled:
                model._reset_stateful_cache()  # of the images before
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        on_device = scheduler.timesteps.to(latents.device)  # once: a copy each step would wait

        for step, timestep in enumerate(scheduler.timesteps):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            active = guidance.active_at(timestep, scheduler.config.num_train_timesteps)
            prediction = self.predict(scaled, on_device[step], labels, guidance if active else None)
            if not learned_variance:
                prediction = prediction[:, :channels]
            with noise:
                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, timestep, {"latents": latents})
                latents = (changed or {}).get("latents", latents)
        return latents

    def predict(
        self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance: Guidance | None
    ) -> Tensor:
        """Prediction (B, out_channels, h, w) for a batch at one timestep, guided or not."""
        channels = self.transformer.config.in_channels
        if guidance is None:
            return self.run_model(self.transformer, latents, timestep, labels)
        if guidance.model is not None:
            conditional = self.run_model(self.transformer, latents, timestep, labels)
            weaker = self.run_model(guidance.model, latents, timestep, labels)
            return guidance(conditional, weaker, channels)
        null = torch.full_like(labels, self.transformer.config.num_classes)
        both = self.run_model(
            self.transformer, torch.cat([latents] * 2), timestep, torch.cat([labels, null])
        )
        conditional, unconditional = both.chunk(2)
        return guidance(conditional, unconditional, channels)

    def run_model(
        self, model: MoHDiTTransformer2DModel, latents: Tensor, timestep: Tensor, labels: Tensor
    ) -> Tensor:
        """A model's raw output for a batch at one timestep, in the dtype of the latents."""
        # Guided and unguided steps differ in batch size, so caches keep them apart.
        caching: Any = contextlib.nullcontext()
        if model.is_cache_enabled:
            caching = model.cache_context(f"batch of {len(latents)}")
        with caching:
            output = model(latents.to(model.dtype), timestep.expand(len(latents)), labels).sample
        # A copy: with CUDA graphs the next call overwrites the output.
        return output.to(latents.dtype, copy=True)

    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W) in -1 … 1, ``batch_size`` at once."""
        chunks = latents.split(batch_size or len(latents))
        return torch.cat([decode_latents(self.vae, chunk) for chunk in chunks])
