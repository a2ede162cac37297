"""Train a (MoH-)DiT: configuration in, run folder out (layout: ``moh_dit.checkpoints.opening``)."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..autoencoder import latent_scaling, latent_shape, load_autoencoder, sample_posterior
from ..checkpoints.opening import list_checkpoints
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..common.progress import progress_bar
from ..data.latents import LatentSet, LatentStore
from ..model.flops import peak_flops
from ..model.transformer import MoHDiTOutput, MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .balance import BalanceLoss
from .config import TrainConfig
from .data_order import DataOrder, Share, StepRandom, load
from .ema import Ema, PowerEma, WeightAverage
from .evaluation import Due, Preview
from .nonfinite import GradientWatch, first_not_finite
from .preemption import PREEMPTED, Interrupted, Preemption
from .run_folder import (
    check_resumable,
    check_same_data,
    data_identity,
    init_trackers,
    open_run_folder,
    refuse_existing,
)
from .run_log import RunLog, Window, dead_heads, plot_curves, shown
from .setup import (
    build_model,
    encode_training_data,
    gradient_exchange,
    learning_rate_factor,
    make_accelerator,
    open_training_data,
    trainable,
    weight_decay_groups,
)
from .sharding import release, shard
from .training_state import TrainingState, newest_whole_checkpoint

LOSS_TERMS = ("mse", "vlb", "balance")


class Trainer:
    """One run. Whatever can be wrong with the input is found while this is made.

    A SIGTERM ends the program with exit code 75 from then on, until :meth:`train` at once.

    Raises:
        UserError: for input that is missing, unreadable, or does not fit together.
    """

    def __init__(self, config: TrainConfig):
        self.preemption = Preemption()
        self.config = config
        self.run_dir = Path(config.run_dir)
        refuse_existing(self.run_dir, config.resume)
        if (self.run_dir / "config.yaml").is_file():
            check_resumable(config, self.run_dir)
        self.accelerator = make_accelerator(config)
        config.check(self.accelerator.num_processes)

        self.vae = load_autoencoder(config.data.autoencoder)
        self.latent_shape = latent_shape(self.vae, config.data.image_size)
        opened = open_training_data(config.data, self.vae, self.latent_shape, self.accelerator)
        self.class_names = opened.class_names
        self.identity = run_on_main_process(
            self.accelerator, lambda: data_identity(opened, self.vae)
        )
        check_same_data(self.run_dir, self.identity)
        self.checkpoint = run_on_main_process(
            self.accelerator, lambda: newest_whole_checkpoint(self.run_dir, config)
        )
        torch.manual_seed(config.seed)
        self.objective = config.objective.build(self.accelerator.device)
        self.raw_model = build_model(
            config, self.objective, self.latent_shape, len(self.class_names), self.checkpoint
        )
        self._prepare()
        self.vae.to(self.accelerator.device)
        self.preview = Preview(
            config.evaluation,
            self.accelerator,
            MoHDiTPipeline(
                self.averages[0].model, self.vae, self.objective.scheduler, self.class_names
            ),
            opened,
            self.preemption,
        )
        self.latents = (
            opened
            if isinstance(opened, LatentSet)
            else encode_training_data(
                config, opened, self.identity["content"], self.vae, self.accelerator
            )
        )

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        model = self.raw_model.to(accelerator.device).train()
        self.averages: list[WeightAverage[MoHDiTTransformer2DModel]] = [
            *(Ema(model, decay) for decay in config.ema_decays),
            *(PowerEma(model, std) for std in config.ema_power_stds),
        ]
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            # Block by block: layers of one plan share a graph, and FSDP2 works between them.
            model.compile_repeated_blocks()
        self.model: nn.Module = model
        if accelerator.is_fsdp2:
            # Autocast rounds every weight of a block where it is used, all in linear maps.
            in_bf16 = config.mixed_precision == "bf16"
            shard(model, accelerator, torch.bfloat16 if in_bf16 else None)
        else:
            self.model = accelerator.prepare_model(model)
        adamw = torch.optim.AdamW(
            weight_decay_groups(trainable(model), config.optimizer),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            fused=True,
        )
        # Not together with the model: under FSDP2 accelerate would look for the optimizer's weights
        # by address, and the empty parts of small ones all have the same.
        self.optimizer = accelerator.prepare_optimizer(adamw)
        self.lr_factor = learning_rate_factor(config.optimizer, config.num_steps, adamw)
        self.watch = GradientWatch(
            trainable(model),
            adamw,
            config.optimizer.max_grad_norm,
            LOSS_TERMS,
            loss_scaled=accelerator.scaler is not None,
        )
        self.balance = BalanceLoss(
            accelerator,
            [layer.num_active_routed_heads for layer in model.routed_layers.values()],
            published=config.balance_loss == "published",
        )
        self.share = Share(
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.gradient_accumulation_steps,
        )
        for average in self.averages:
            average.spread(model)
        self.state = TrainingState(accelerator, model, adamw, self.averages)
        self.start_step = 0
        if self.checkpoint is not None:
            self.start_step = self.state.restore(self.checkpoint)

    def train(self) -> None:
        """Run to ``num_steps``. After SIGTERM: save, then exit with code 75."""
        config, accelerator, preemption = self.config, self.accelerator, self.preemption
        step, missed = self.start_step, Due(False, False)
        if step:
            missed = self.preview.missed(step, step == config.num_steps, self.run_dir)
        if step >= config.num_steps and not any(missed):
            accelerator.print(f"{self.run_dir} is done: step {step}; raise num_steps")
            return
        with preemption.held():
            stop = self._run(step, missed)
        if stop:
            accelerator.print(f"told to stop: saved; continue {self.run_dir} with --resume")
            raise SystemExit(PREEMPTED)
        accelerator.print(
            f"wrote {self.run_dir}: curves.png, samples/, checkpoints/; more images with "
            f"sample_dit.py --checkpoint {self.run_dir} --output grid.png"
        )

    def _run(self, step: int, missed: Due) -> bool:
        """Go on after ``step``; returns whether it was told to stop."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            open_run_folder(
                config, step, self.class_names, self.identity, self.vae, self.objective.scheduler
            )
            self.run_log = RunLog(self.run_dir / "log.jsonl", step)
            self.state.check_space(self.run_dir)
        accelerator.wait_for_everyone()
        init_trackers(accelerator, config)
        given = config.peak_tflops and config.peak_tflops * 1e12
        peak = given or peak_flops(config.mixed_precision, config.allow_tf32)
        self.window = window = Window(accelerator, self.raw_model, config.batch_size, peak)
        bar = progress_bar(
            config.num_steps,
            desc="training",
            unit="step",
            initial=step,
            enabled=accelerator.is_main_process,
        )
        flip, on_disk = config.data.horizontal_flip, isinstance(self.latents, LatentStore)
        order = DataOrder(len(self.latents), self.share, config.seed, flip, step)
        num_workers = config.data.num_workers if on_disk else 0
        # Closed, it ends its workers, which nothing else would: they do not hear SIGTERM.
        with closing(load(self.latents, order, num_workers, accelerator.device)) as batches, bar:
            with window.paused():
                stop = not self._look(step, missed)
            while step < config.num_steps and not stop:
                step += 1
                window.add(*self._step(step, batches))
                bar.update()
                last = step == config.num_steps
                stop = self.preemption.is_due(accelerator, step)
                if step % config.log_every == 0 or last or stop:
                    bar.set_postfix(shown(self._close_window(step)))
                with window.paused():
                    if step % (config.ema_snapshot_every or config.checkpoint_every) == 0 or last:
                        self._check_finite()
                        self.state.save_snapshot(self.run_dir, step)
                    if step % config.checkpoint_every == 0 or last or stop:
                        self._save(step)
                    broken_off = not stop and not self._look(step, self.preview.due(step, last))
                if broken_off:
                    stop = True
                    if window.steps:
                        self._close_window(step)
                    self._save(step)
        accelerator.end_training()
        return stop

    def _close_window(self, step: int) -> dict[str, Any]:
        entry = self.window.close(step, self.optimizer.param_groups[0]["lr"])
        self._log(entry)
        return entry

    def _save(self, step: int) -> None:
        self._check_finite()
        self.state.save(self.run_dir, step, self.config.keep_checkpoints)
        if self.accelerator.is_main_process:
            plot_curves(self.run_dir / "log.jsonl", self.run_dir / "curves.png")

    def _look(self, step: int, due: Due) -> bool:
        """Samples and metrics of ``step``, as far as they are due; false after a SIGTERM."""
        if not any(due):
            return True
        self._check_finite()
        self.averages[0].gather()
        try:
            metrics = self.preview.make(due, step, self.run_dir)
        except Interrupted:
            return False
        if metrics:
            self._log({"step": step, **metrics})
        return True

    def _step(
        self, step: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One optimizer step; returns loss terms, gradient norm and head load, unsynchronised."""
        config, accelerator, num_parts = self.config, self.accelerator, self.share.num_micro_batches
        random = StepRandom.draw(
            config.seed,
            step,
            (config.batch_size, *self.latent_shape),
            self.objective.draw_times,
            config.label_dropout,
            accelerator.device,
        )
        with self.window.waiting():
            data = [next(batches) for _ in range(num_parts)]
        micro_batches = [
            (*batch, random.rows(self.share.rows(part))) for part, batch in enumerate(data)
        ]
        self.balance.start_step(self._observe(micro_batches))
        terms = torch.zeros(len(LOSS_TERMS), device=accelerator.device)
        for part, micro_batch in enumerate(micro_batches):
            with gradient_exchange(accelerator, self.model, part == num_parts - 1):
                loss, parts = self._loss(*micro_batch)
                accelerator.backward(loss / num_parts)
            terms += parts.detach() / num_parts
        self._check_finite()  # of the step before, now that this one is queued
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self.optimizer)
        terms = cast(Tensor, accelerator.reduce(terms, "mean"))
        grad_norm = self.watch.before_update(step, terms)
        self._seen = micro_batches
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * self.lr_factor(step - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.raw_model, step)
        return terms, grad_norm, self.balance.load()

    @torch.no_grad()
    def _observe(self, micro_batches: list[tuple[Tensor, Tensor, StepRandom]]) -> list:
        """Router statistics of the step's micro-batches, in a pass before the one that learns."""
        if self.config.balance_loss != "two_pass" or len(micro_batches) == 1:
            return []
        outputs = [self._predict(*micro_batch)[0] for micro_batch in micro_batches]
        return [output.router_stats for output in outputs if output.router_stats is not None]

    def _predict(
        self, moments: Tensor, labels: Tensor, random: StepRandom
    ) -> tuple[MoHDiTOutput, Tensor]:
        """The model's output for one micro-batch, and the latents (b, C, h, w) behind it."""
        latents = sample_posterior(moments, random.posterior_noise, latent_scaling(self.vae))
        labels = torch.where(random.drop_label, self.raw_model.null_class, labels)
        noisy = self.objective.add_noise(latents, random.noise, random.times)
        with self.accelerator.autocast():
            return self.model(noisy, random.times, labels), latents

    def _loss(self, moments: Tensor, labels: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch, and its terms: noise MSE, VLB, load balance."""
        output, latents = self._predict(moments, labels, random)
        mse, vlb = self.objective.loss(output.sample, latents, random.noise, random.times)
        balance = latents.new_zeros(())
        if output.router_stats is not None:
            balance = self.balance(output.router_stats)
        loss = mse.mean() + vlb.mean() + self.config.balance_loss_weight * balance
        return loss, torch.stack([mse.mean(), vlb.mean(), balance])

    def _check_finite(self) -> None:
        if (verdict := self.watch.verdict()) is None:
            return
        # The update was held back: the weights are still those that the batch met.
        origin = first_not_finite(self.raw_model, lambda: [self._predict(*m) for m in self._seen])
        release(self.raw_model)  # no backward pass follows
        origins = [each for each in gather_object([origin]) if each]  # of the processes' batches
        verdict += f"; in the forward pass first in {', '.join(dict.fromkeys(origins)) or 'none'}"
        if self.config.on_nonfinite == "skip":
            self.accelerator.print(f"skipped {verdict}")
            return
        checkpoints = list_checkpoints(self.run_dir)
        where = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "none is saved yet"
        raise UserError(
            f"{verdict}. The update was held back; {where}. Lower optimizer.learning_rate, set "
            "optimizer.max_grad_norm, or set on_nonfinite to skip"
        )

    def _log(self, entry: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        self.run_log.write(entry)
        numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=entry["step"])
        if dead := dead_heads(entry):
            self.accelerator.print(f"step {entry['step']}: no token chose {', '.join(dead)}")
