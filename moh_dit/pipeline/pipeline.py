"""Generate images from class labels with any diffusers scheduler that fits the model."""

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..autoencoder import decode_latents, latent_layout
from ..common.compat import UploadHook, execution_device, reset_cache
from ..common.errors import UserError
from ..common.hub import snapshot
from ..common.manifest import write_manifest
from ..diffusion.noise import ImageNoise
from ..diffusion.process import LearnedVarianceDDPMScheduler
from ..diffusion.samplers import check_scheduler, check_steps, prepare_scheduler
from ..diffusion.samplers import prediction_type as predicted_by
from ..kernels.backends import check_choice
from ..model.transformer import MoHDiTTransformer2DModel
from .bundled_code import is_bundled, use_installed_classes, write_code
from .class_labels import Labels, class_ids
from .forward_graphs import ForwardGraphs
from .guidance import Guidance, predict
from .model_card import copy_or_write_card
from .step_cache import StepCache, caching

Noise: TypeAlias = torch.Generator | list[torch.Generator] | ImageNoise | None
StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict], dict | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class MoHDiTPipeline(UploadHook, DiffusionPipeline):
    """Class-conditional image generation with a (MoH-)DiT.

    Args:
        transformer: predicts ε and, if ``out_channels`` is twice ``in_channels``, the values of the
            learned variance.
        vae: the autoencoder whose latents the transformer was trained on.
        scheduler: a diffusers scheduler of the noise process that the transformer was trained on.
        class_names: the name of each class, so that labels can be names; ``None`` for no names.
        prediction_type: what the transformer predicts, in diffusers' terms (``"epsilon"``,
            ``"v_prediction"``, ``"sample"``, ``"flow_prediction"``); ``None`` for what the
            scheduler expects. It is saved, and every other scheduler must match it.

    Attributes:
        graphs: replays forward passes as CUDA graphs. ``graphs.mode`` is ``"auto"``, True or False;
            ``graphs.release()`` frees their memory.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        transformer: MoHDiTTransformer2DModel,
        vae: ModelMixin,
        scheduler: KarrasDiffusionSchedulers,
        class_names: list[str] | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        prediction_type = prediction_type or predicted_by(scheduler)
        self.register_to_config(class_names=class_names, prediction_type=prediction_type)
        self.graphs = ForwardGraphs()

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """Load a configuration like diffusers, but with the installed classes of this package."""
        config = super().load_config(*args, **options)
        return use_installed_classes(config) if isinstance(config, dict) else config

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the arguments in a configuration, without ``auto_map``, which AutoModel reads."""
        config = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(config, **options)

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Download a repository; diffusers' method refuses classes of other packages."""
        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {key: options[key] for key in known if options.get(key) is not None}
        return str(snapshot(pretrained_model_name, **given))

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, with_code: bool = False, **options: Any
    ) -> None:
        """Save the pipeline, a model card, and a manifest with the checksums of all files.

        The folder gets the card of the folder that the pipeline was loaded from, or a new one.

        Args:
            save_directory, args, options: see ``DiffusionPipeline.save_pretrained``.
            with_code: also write the code, so that diffusers opens the folder without this package,
                by ``trust_remote_code=True``. A pipeline loaded with its code is saved with it.
        """
        super().save_pretrained(save_directory, *args, **options)
        self._write_card_and_code(Path(save_directory), with_code or is_bundled())
        write_manifest(Path(save_directory))

    def before_upload(self, folder: Path) -> None:
        """Add the code before uploading to the hub: users there may not have this package."""
        self._write_card_and_code(folder, with_code=True)

    def _write_card_and_code(self, folder: Path, with_code: bool) -> None:
        if with_code:
            write_code(folder)
        copy_or_write_card(folder, self.name_or_path, dict(self.transformer.config))

    def label_ids(self, class_labels: Labels) -> list[int]:
        """Convert labels to class ids: ids, names, or nested lists or tensors of these.

        Raises:
            UserError: an id is out of range, or a name is not a class (similar names are given).
        """
        names = self.config.class_names or []
        return class_ids(class_labels, names, self.transformer.config.num_classes)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the latest call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of evaluations of the model in the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback stopped the latest call, by setting ``_interrupt``."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
        cache: StepCache | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Below, B is the number of labels times ``num_images_per_prompt``.

        Args:
            class_labels: class ids or names, also as nested lists or tensors.
            guidance_scale: weight w of guidance; 1 turns guidance off.
            guidance_interval: guide only between these two fractions of the process; 1 is pure
                noise.
            guidance_channels: guide only this number of latent channels, from the first; ``None``
                for all.
            guidance_model: guide away from this weaker model instead of the null class.
            num_inference_steps: denoising steps, at most the number that the model was trained on.
            generator: a generator; a list of B generators, which makes each image independent of
                its batch; or an :class:`~moh_dit.diffusion.noise.ImageNoise`, which does the same
                faster.
            latents: initial noise (B, C, h, w); ``None`` to draw it from the generator.
            decode_batch_size: number of images to decode at once; ``None`` for all.
            output_type: ``"pil"``, ``"np"`` (float32 B×H×W×3 in 0 … 1), ``"pt"`` (float32 B×3×H×W
                in 0 … 1) or ``"latent"`` (B, C, h, w).
            return_dict: whether to return an ``ImagePipelineOutput`` or the tuple ``(images,)``.
            callback_on_step_end: called after each step as ``f(pipeline, step, timestep,
                tensors)``; may return a dictionary with new ``latents``.
            callback_on_step_end_tensor_inputs: names in ``tensors``: ``["latents"]`` or ``[]``.
            num_images_per_prompt: images per label; those of one label follow each other.
            cache: skip transformer blocks in some steps; ``None`` for the exact result.

        Raises:
            UserError: labels, steps, guidance, scheduler or output type do not fit the model.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs contains {min(unknown)!r}; callbacks get "
                "'latents' only"
            )
        device = execution_device(self)
        labels = torch.tensor(self.label_ids(class_labels), device=device)
        labels = labels.repeat_interleave(num_images_per_prompt)
        guidance = Guidance(guidance_scale, guidance_channels, guidance_interval, guidance_model)
        self.check(guidance, num_inference_steps, cache)
        latents = self.prepare_latents(len(labels), generator, latents)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = len(prepare_scheduler(self.scheduler, num_inference_steps).timesteps)
        cached = caching(self, cache, guidance, num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar, cached:

            def on_step(pipeline: Any, step: int, timestep: Tensor, tensors: dict) -> dict:
                bar.update(min(step + 1, num_inference_steps) - bar.n)  # Heun evaluates twice
                if callback_on_step_end is None:
                    return {}
                given, scale = {name: tensors[name] for name in names}, self._guidance_scale
                changed = callback_on_step_end(pipeline, step, timestep, given) or {}
                if self._guidance_scale != scale:  # not changed by another thread's call
                    guidance.scale = self._guidance_scale
                return {**changed, "stop": self._interrupt}

            latents = self.denoise(
                latents, labels, guidance, num_inference_steps, generator, on_step
            )
        images = latents if output_type == "latent" else self.decode(latents, decode_batch_size)
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check(
        self, guidance: Guidance, num_inference_steps: int, cache: StepCache | None = None
    ) -> None:
        """Raise ``UserError`` if a setting, the scheduler or the autoencoder do not fit the model.

        This includes models that cannot be captured into CUDA graphs if ``graphs.mode`` is True.
        """
        check_scheduler(self.scheduler, self.config.prediction_type)
        check_steps(self.scheduler, num_inference_steps)
        guidance.check(self.transformer)
        latent, expected = latent_layout(self.vae).channels, self.transformer.config.in_channels
        if latent != expected:
            raise UserError(
                f"the autoencoder has {latent} latent channels, the transformer {expected}; use "
                "the autoencoder that the transformer was trained with"
            )
        for model in filter(None, (self.transformer, guidance.model)):
            self.graphs.obstacle(model)
            if cache is not None:
                cache.check(model, guidance)

    def prepare_latents(
        self, batch_size: int, generator: Noise = None, latents: Tensor | None = None
    ) -> Tensor:
        """Draw the initial noise (B, C, h, w), or check the given one.

        It is float32 also for a model in half precision: a bfloat16 state would add a visible
        error over 250 steps.
        """
        config, dtype = self.transformer.config, self.transformer.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None and isinstance(generator, ImageNoise):
            return generator.draw(shape, dtype)
        if latents is None:
            return cast(Tensor, randn_tensor(shape, generator, execution_device(self), dtype))
        if latents.shape != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(execution_device(self), dtype)

    def denoise(
        self,
        latents: Tensor,
        labels: Tensor,
        guidance: Guidance,
        num_inference_steps: int,
        generator: Noise = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Tensor:
        """Run the reverse process and return the latents (B, C, h, w).

        Several threads may call this method at once: each call makes a scheduler of its own.

        Args:
            latents: initial noise (B, C, h, w).
            labels: int64 (B,).
            guidance: read before every step, so a callback may change it.
            num_inference_steps, generator: see :meth:`__call__`.
            callback_on_step_end: see :meth:`__call__`. If the returned dictionary contains ``stop``
                with a true value, the process ends after this step.
        """
        scheduler = prepare_scheduler(self.scheduler, num_inference_steps)
        learned_variance = isinstance(scheduler, LearnedVarianceDDPMScheduler)
        channels = self.transformer.config.in_channels
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        noise: Any = contextlib.nullcontext()
        if isinstance(generator, ImageNoise) and not learned_variance:
            noise, options = generator, {}  # diffusers' schedulers draw their noise from torch
        for model in filter(None, (self.transformer, guidance.model)):
            if model.is_cache_enabled:
                reset_cache(model)  # it contains activations of the previous images
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        # Copied once: copying in every step would synchronize.
        on_device = scheduler.timesteps.to(latents.device)

        for step, timestep in enumerate(scheduler.timesteps):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            active = guidance.active_at(timestep, scheduler.config.num_train_timesteps)
            prediction = predict(
                self.transformer, scaled, on_device[step], labels, guidance if active else None,
                self.graphs,
            )  # fmt: skip
            if not learned_variance:
                prediction = prediction[:, :channels]
            with noise:
                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                latents = changed.get("latents", latents)
                if changed.get("stop"):
                    break
        return latents

    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in -1 … 1, ``batch_size`` at once."""
        chunks = latents.split(batch_size or len(latents))
        return torch.cat([decode_latents(self.vae, chunk) for chunk in chunks])
