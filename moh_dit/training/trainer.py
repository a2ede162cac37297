"""Train a (MoH-)DiT into a run folder, whose layout ``moh_dit.checkpoints.runs`` describes."""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..autoencoder import latent_scaling, latent_shape, load_autoencoder
from ..checkpoints.runs import list_checkpoints
from ..common.distributed import acquire_folder, run_on_main_process
from ..common.errors import UserError
from ..model.flops import peak_flops
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .checkpoint_checks import newest_intact_checkpoint
from .config import TrainConfig
from .config_checks import check_run_dir
from .ema import Ema, PowerEma, WeightAverage
from .evaluation import DueOutputs, SampleEvaluator
from .graphed_step import GraphedStep, reason_without_graph
from .nonfinite import NonFiniteGuard, first_nonfinite_module
from .preemption import PREEMPTED, Interrupted, Preemption
from .progress import RunProgress, doing_before_training
from .run_folder import (
    CONFIG_FILE,
    check_resumable,
    check_same_data,
    init_trackers,
    prepare_run_folder,
    resolve_autoencoder,
)
from .run_log import StepStatistics
from .setup import (
    checkpoint_block,
    create_model,
    create_optimizer,
    create_optimizer_state,
    learning_rate_factor,
    make_accelerator,
    trainable_parameters,
)
from .sharding import free_gathered_weights, shard_model
from .start_up import StartUp
from .step_inputs import BatchPartition, StepRandomNumbers
from .training_data import TrainingData
from .training_state import TrainingState
from .training_step import LOSS_TERMS, TrainingStep


class Trainer:
    """One training run. Creating it checks all input; :meth:`train` runs it.

    From creation until :meth:`train`, SIGTERM ends the program with exit code 75. From creation
    until :meth:`train` has ended, rank 0 owns the run folder.

    Args:
        config: settings of the run.
        start_up: measures the start-up of the program; by default a new one.

    Raises:
        UserError: input is missing, unreadable, or contradicts other input, or another process
            owns the run folder.
    """

    def __init__(self, config: TrainConfig, start_up: StartUp | None = None):
        self.start_up = start_up or StartUp()
        self.start_up.begin("data")
        self.preemption = Preemption()
        self.run_dir = Path(config.run_dir)
        check_run_dir(self.run_dir, config.resume)
        self.config = config = resolve_autoencoder(config)
        if (self.run_dir / CONFIG_FILE).is_file():
            check_resumable(config, self.run_dir)
        self.accelerator = make_accelerator(config)
        config.check(self.accelerator.num_processes)
        self.lock = acquire_folder(self.accelerator, self.run_dir)
        try:
            self._set_up()
        except BaseException:
            self.lock.release()
            raise

    def _set_up(self) -> None:
        config = self.config
        self.vae = load_autoencoder(cast(str, config.data.autoencoder))
        self.latent_shape = latent_shape(self.vae, config.data.image_size)
        self.data = TrainingData(config, self.vae, self.latent_shape, self.accelerator)
        check_same_data(self.run_dir, self.data.identity)
        self.checkpoint = run_on_main_process(
            self.accelerator, lambda: newest_intact_checkpoint(self.run_dir, config)
        )
        self.start_up.begin("model")
        torch.manual_seed(config.seed)
        self.objective = config.objective.build(self.accelerator.device)
        num_classes = len(self.data.class_names)
        self.raw_model = create_model(
            config, self.objective, self.latent_shape, num_classes, self.checkpoint
        )
        self.vae.to(self.accelerator.device)
        self._prepare()
        pipeline = MoHDiTPipeline(
            self.averages[0].model, self.vae, self.objective.scheduler, self.data.class_names
        )
        self.evaluator = SampleEvaluator(
            config, self.accelerator, pipeline, self.objective, self.data, self.preemption
        )
        self.start_up.begin("data")
        steps = self.start_step, config.num_steps
        with doing_before_training(self.accelerator, self.run_dir, "encoding images", *steps):
            self.evaluator.encode(self.run_dir)

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        model = self.raw_model.to(accelerator.device).train()
        self.averages: list[WeightAverage[MoHDiTTransformer2DModel]] = [
            *(Ema(model, decay) for decay in config.ema_decays),
            *(PowerEma(model, std) for std in config.ema_power_stds),
        ]
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing(checkpoint_block)
        if config.compile:
            # Compile block by block: equal blocks share a graph, and FSDP2 gathers between blocks.
            model.compile_repeated_blocks()
        self.model: nn.Module = model
        if accelerator.is_fsdp2:
            # Autocast rounds all weights of a block to bf16, because only linear layers use them.
            in_bf16 = config.mixed_precision == "bf16"
            shard_model(model, accelerator, torch.bfloat16 if in_bf16 else None)
        else:
            self.model = accelerator.prepare_model(model)
        adamw = create_optimizer(model, config.optimizer)
        # Prepare the optimizer separately. Together with the model, accelerate would identify
        # FSDP2's shards by their address, and all empty shards have the same address.
        self.optimizer = accelerator.prepare_optimizer(adamw)
        self.lr_factor = learning_rate_factor(config.optimizer, config.num_steps, adamw)
        self.guard = NonFiniteGuard(
            trainable_parameters(model),
            adamw,
            config.optimizer.max_grad_norm,
            LOSS_TERMS,
            stop=config.on_nonfinite == "stop",
            scaler=accelerator.scaler,
        )
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.partition = BatchPartition(
            config.batch_size, rank, world_size, config.gradient_accumulation_steps
        )
        for average in self.averages:
            average.shard(model)
        self.training_step = TrainingStep(
            config,
            accelerator,
            self.model,
            model,
            self.objective,
            latent_scaling(self.vae),
            self.optimizer,
            self.averages,
            self.guard,
        )
        reason = reason_without_graph(config, accelerator)
        self.graphed_step = GraphedStep(self.training_step, reason, config.cuda_graphs is True)
        self.state = TrainingState(accelerator, model, adamw, self.averages)
        self.start_step = 0
        if self.checkpoint is not None:
            self.start_step = self.state.restore(self.checkpoint)
        else:
            create_optimizer_state(adamw)

    def train(self) -> None:
        """Train up to ``num_steps``. After SIGTERM, save and exit with code 75.

        Raises:
            UserError: the loss or a gradient is not finite, or the disk is full.
            SystemExit: code 75 after SIGTERM.
        """
        try:
            self._train()
        finally:
            self.lock.release()

    def _train(self) -> None:
        config, accelerator = self.config, self.accelerator
        step, missing = self.start_step, DueOutputs(False, False)
        if step:
            missing = self.evaluator.missing(step, step == config.num_steps, self.run_dir)
        if step >= config.num_steps and not any(missing):
            accelerator.print(
                f"{self.run_dir} is complete at step {step}; to continue, increase --num_steps"
            )
            return
        with self.preemption.deferred(), self.state.writer:
            stopped = self._run(step, missing)
        if stopped:
            accelerator.print(f"stopped by SIGTERM, saved {self.run_dir}; continue with --resume")
            raise SystemExit(PREEMPTED)
        accelerator.print(
            f"wrote {self.run_dir}: curves.png, samples/, checkpoints/; for more images: "
            f"sample_dit.py --checkpoint {self.run_dir} --output grid.png"
        )

    def _run(self, step: int, missing: DueOutputs) -> bool:
        """Continue after ``step``; return whether SIGTERM stopped the run."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            prepare_run_folder(config, step, self.data, self.objective.scheduler)
            self.state.warn_if_disk_is_full(self.run_dir)
        accelerator.wait_for_everyone()
        init_trackers(accelerator, config)
        given = config.peak_tflops and config.peak_tflops * 1e12
        peak = given or peak_flops(config.mixed_precision, config.allow_tf32)
        statistics = StepStatistics(accelerator, self.raw_model, config.batch_size, peak)
        self.statistics = statistics
        self.progress = progress = RunProgress(accelerator, self.run_dir, step, config.num_steps)
        # Closing the generator ends the data-loader workers, which ignore SIGTERM.
        batches = self.data.micro_batches(self.partition, config.seed, step)
        with closing(batches), progress:
            with statistics.exclude_time():
                stop = not self._evaluate(step, missing)
            while step < config.num_steps and not stop:
                step += 1
                first = step == self.start_step + 1
                doing = progress.doing("first step") if first else nullcontext()
                with doing, self.start_up.first_step(accelerator.print):
                    statistics.add(*self._step(step, batches))
                progress.update()
                self.state.writer.check()
                last = step == config.num_steps
                stop = self.preemption.should_stop(accelerator, step)
                # An entry at each checkpoint, so that a resumed run logs the same averages.
                checkpoint = step % config.checkpoint_every == 0 or last or stop
                if step % config.log_every == 0 or checkpoint:
                    self._log_statistics(step)
                with statistics.exclude_time():
                    snapshot_every = config.ema_snapshot_every or config.checkpoint_every
                    snapshot = step % snapshot_every == 0 or last
                    if snapshot or checkpoint:
                        self._save(step, checkpoint, snapshot)
                    due = self.evaluator.due(step, last)
                    interrupted = not stop and not self._evaluate(step, due)
                if interrupted:
                    stop = True
                    if statistics.steps:
                        self._log_statistics(step)
                    self._save(step)
            with progress.doing("saving"):
                self.state.finish()
        accelerator.end_training()
        return stop

    def _log_statistics(self, step: int) -> None:
        self.lock.check()
        learning_rate = self.training_step.learning_rate
        self.progress.log(self.statistics.make_entry(step, learning_rate))

    def _save(self, step: int, checkpoint: bool = True, snapshot: bool = False) -> None:
        self._check_finite()
        self.lock.check()
        keep = self.config.keep_checkpoints
        with self.progress.doing("saving"):
            self.state.save(self.run_dir, step, keep, checkpoint=checkpoint, snapshot=snapshot)
            if checkpoint:
                self.progress.plot()

    def _evaluate(self, step: int, due: DueOutputs) -> bool:
        """Write the samples and metrics that are due; return False if SIGTERM interrupted this."""
        if not any(due):
            return True
        self._check_finite()
        self.graphed_step.release()  # sampling and metrics need its memory
        self.averages[0].gather()
        try:
            doing = self.progress.doing("sampling and measuring")
            with doing, self.start_up.phase("samples"):
                metrics = self.evaluator.make(due, step, self.run_dir)
        except Interrupted:
            return False
        if metrics:
            self.progress.log({"step": step, **metrics})
            self.progress.plot()
        return True

    def _step(
        self, step: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run one optimizer step.

        Returns:
            Loss terms (3,), gradient norm and head load, without waiting for the GPU.
        """
        config = self.config
        random = StepRandomNumbers.draw(
            config.seed,
            step,
            (config.batch_size, *self.latent_shape),
            self.objective.draw_times,
            config.label_dropout,
            self.accelerator.device,
        )
        with self.statistics.count_data_wait(), self.start_up.phase("data"):
            data = [next(batches) for _ in range(self.partition.num_micro_batches)]
        micro_batches = [
            (*batch, random.rows(self.partition.rows(number))) for number, batch in enumerate(data)
        ]
        graph = self.graphed_step
        doing = self.progress.doing("capturing the step") if graph.will_capture else nullcontext()
        with self.statistics.exclude_time(), doing:
            if line := graph.prepare(micro_batches):
                self.accelerator.print(line)
        rate = config.optimizer.learning_rate * self.lr_factor(step - 1)
        self.training_step.set_step(step, rate)
        output = graph(micro_batches)
        self._check_finite()  # the previous step; this step is already queued
        self.guard.record(step, output.nonfinite, output.parameter_norms, output.terms)
        self._last_micro_batches = micro_batches
        return output.terms, output.grad_norm, output.load

    def _check_finite(self) -> None:
        """Report the last step if its loss or gradient was not finite.

        Raises:
            UserError: if ``on_nonfinite`` is "stop".
        """
        if (report := self.guard.describe_last_step()) is None:
            return
        # No update has followed (on_nonfinite "stop"), or the update of one step ("skip"), so the
        # forward pass can be repeated.
        module = first_nonfinite_module(
            self.raw_model,
            lambda: [self.training_step.predict(*batch) for batch in self._last_micro_batches],
        )
        free_gathered_weights(self.raw_model)  # no backward pass follows
        modules = dict.fromkeys(each for each in gather_object([module]) if each)  # of all ranks
        report += f"; first module with such an output: {', '.join(modules) or 'none'}"
        if self.config.on_nonfinite == "skip":
            self.accelerator.print(f"skipped the update of {report}")
            return
        self.state.writer.wait()
        checkpoints = list_checkpoints(self.run_dir)
        saved = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint yet"
        raise UserError(
            f"{report}. The update was skipped; {saved}. Lower optimizer.learning_rate, set "
            "optimizer.max_grad_norm, or set on_nonfinite to skip"
        )
