"""The loop that every training shares: run folder, resume, progress, metrics, samples, checkpoints, signals."""

import math
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..data import TrainingData
from ..data.augmentation import AUGMENT_NUMBERS, Augmentation
from ..data.batches import Batch, BatchIterator, flipped, on_device
from ..data.latents.dataset import LatentDataset, sampled
from ..data.references import reference_source
from ..errors import InputError, TrainingInterrupted, TrainingStopped
from ..hub.publishing import check_ready
from ..sample_noise import SampleNoise, sample_seed
from .averaging.ema import Averages
from .config import TrainingConfig
from .parallel.accelerator import agree, build_accelerator
from .run.checkpoints import Checkpoints
from .run.facts import describe_session
from .run.folder import CHECKPOINTS, RunFolder
from .run.measurement import check_measurement
from .run.outputs import Outputs
from .run.profiling import IterationProfiler
from .run.throughput import Throughput
from .run.trackers import start_trackers
from .run.vitals import Vitals
from .trained_network import TrainedNetwork

if TYPE_CHECKING:
    from .run.measured import Measured

#: Iterations in a row with an update that was thrown away (not finite) before training stops.
MAX_FAILURES = 10


class Trainer:
    """Base of the trainers. A subclass builds its networks and their `averages` in `setup` and plays one round in
    `iteration`.

    Nothing is written before `setup` has accepted all inputs.

    Args:
        settings: of the subclass's kind.

    Raises:
        InputError: when something that the user gave cannot work.
    """

    def __init__(self, settings: TrainingConfig):
        self.settings = settings
        self.run = RunFolder(settings, writes=int(os.environ.get("RANK", "0")) == 0)
        self.run.check()
        check_measurement(settings, self.of_prompts)
        if settings.push_to_hub and self.run.writes:
            check_ready(settings.hub_model_id)
        self.accelerator = build_accelerator(settings)
        self.noise = SampleNoise(settings.seed, self.accelerator.device)
        self.throughput = Throughput(self.accelerator)
        self.profiler = IterationProfiler(self.accelerator, self.run.path, settings.profile)
        self.checkpoints = Checkpoints(
            self.accelerator,
            self.run.path / CHECKPOINTS,
            settings.save_total_limit,
            self.global_batch_size,
            settings.dataloader_num_workers,
        )
        self.step = 0
        self.failures = 0
        self._totals: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._saved_means: dict[str, float] = {}
        self.vitals = Vitals()
        self._signal: int | None = None
        self._batches: BatchIterator | None = None
        self._resumed = False
        self._data_state: dict[str, Any] | None = None
        self._shown: Batch | None = None
        self._references = reference_source(settings.data)
        set_seed(settings.seed)
        self.setup()
        self.outputs = Outputs(
            settings, self.accelerator, self.run, self.averages, self.pipeline, self.sample_grid, self.measured
        )

    # Set by subclasses.

    averages: Averages
    #: Names of the losses, which every line of the log has.
    losses: tuple[str, ...]
    #: Whether the pipeline makes images of prompts.
    of_prompts = False

    def setup(self) -> None:
        """Loads data and networks; raises `InputError` for what does not fit."""
        raise NotImplementedError

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        """One round. Returns its metrics (scalars of this rank) and whether every update was finite."""
        raise NotImplementedError

    def watch(self, means: dict[str, float]) -> list[str]:
        """Warnings for the user from one line of the log."""
        return []

    @property
    def networks(self) -> dict[str, TrainedNetwork]:
        """The trained networks by the prefix of their settings (`""`, `critic_`)."""
        raise NotImplementedError

    def pipeline(self, network: nn.Module | None = None) -> DiffusionPipeline:
        """The pipeline that the run folder becomes, around `network`, or around the average in training."""
        raise NotImplementedError

    def sample_grid(self) -> Image.Image:
        """A picture from fixed noise and labels; collective."""
        raise NotImplementedError

    def measured(self) -> "Measured":
        """The images of the pipeline that `eval_metric_steps` measures."""
        from .run.measured import ClassImages  # brings the libraries of feature extractors with it

        return ClassImages(self.settings, self.pipeline)

    def facts(self) -> dict[str, Any]:
        """What the model card tells beyond the settings (see `run.facts`)."""
        raise NotImplementedError

    # The state that is saved with the networks.

    def state_dict(self) -> dict[str, Any]:
        schedules = {name: network.schedule.state_dict() for name, network in self.networks.items()}
        return {
            "step": self.step,
            "failures": self.failures,
            "means": self._saved_means,
            "counts": dict(self._counts),
            "schedules": schedules,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.failures, self._counts = state["step"], state["failures"], dict(state["counts"])
        self._totals = {name: mean * self._counts[name] for name, mean in state["means"].items()}
        for name, network in self.networks.items():
            network.schedule.load_state_dict(state["schedules"][name])

    # Arithmetic of the global batch.

    @property
    def global_batch_size(self) -> int:
        """Samples per update over all devices and micro-batches."""
        s = self.settings
        return s.per_device_train_batch_size * s.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def readers(self) -> int:
        """Processes that read data, over all ranks."""
        return self.accelerator.num_processes * max(1, self.settings.dataloader_num_workers)

    @property
    def batches_per_iteration(self) -> int:
        """Batches of data that each rank reads in an iteration."""
        return self.settings.gradient_accumulation_steps

    def indices(self, micro_batch: int) -> range:
        """This rank's places in the global batch."""
        size = self.settings.per_device_train_batch_size
        start = (micro_batch * self.accelerator.num_processes + self.accelerator.process_index) * size
        return range(start, start + size)

    def next_batch(self, data: TrainingData, micro_batch: int, *draw: int) -> Batch:
        """This rank's next batch on the device: `images` (B, C, H, W), in [-1, 1] or latents as the network sees them,
        `labels` (B,), and what else `data` gives.

        The same whether the run was resumed or not.

        Args:
            data: the data set.
            micro_batch: of the update.
            draw: number of the draw in the iteration, where it has several.
        """
        settings, accelerator = self.settings, self.accelerator
        if self._batches is None:
            self._batches = data.batches(
                settings.per_device_train_batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                seed=settings.seed,
                start=self.step * self.batches_per_iteration,
                num_workers=settings.dataloader_num_workers,
            )
            if self._resumed:
                try:
                    self._batches.load_state_dict(self._data_state)
                except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                    raise InputError(
                        f"The checkpoint's place in the data is damaged ({type(error).__name__}: {error}). Take another one."
                    ) from error
        with self.throughput.waiting_for_data():
            batch = next(self._batches)
        batch, indices = on_device(batch, accelerator.device), self.indices(micro_batch)
        random_flip = settings.data.random_flip
        counters = (self.step, *draw)
        flip = self.noise.uniform("flip", *counters, indices=indices) < 0.5 if random_flip else None
        if isinstance(data, LatentDataset):
            shape = batch["latents_mean"].shape[2:]
            batch = sampled(batch, flip, self.noise.normal(shape, "latents", *counters, indices=indices), data.scaling)
        elif flip is not None:
            batch = flipped(batch, flip)
        if self._references is not None:
            batch = self._references(batch, self.noise, *counters, indices=indices)
        return batch

    def shown_batch(self, data: TrainingData, count: int) -> Batch:
        """`count` items that are always the same ones, on the device, with their references: what sample grids show."""
        if self._shown is None:
            settings, device = self.settings, self.accelerator.device
            batch = on_device(next(data.batches(count, seed=settings.seed)), device)
            if self._references is not None:
                batch = self._references(batch, self.noise, 0, indices=range(count))
            self._shown = batch
        return self._shown

    def augmentation(self, indices: range, *sub_steps: int) -> Augmentation | None:
        """The transformation of each of these places in the global batch, or None without augmentation."""
        probability = self.settings.augment_prob
        if probability == 0:
            return None
        numbers = self.noise.normal((AUGMENT_NUMBERS,), "augmentation", self.step, *sub_steps, indices=indices)
        return Augmentation.draw(numbers, probability)

    # The loop.

    def train(self) -> None:
        """Trains to `max_steps`, then leaves the finished pipeline in the run folder.

        Raises:
            TrainingInterrupted: after SIGTERM or SIGINT, when everything is saved.
            TrainingStopped: when losses stay not finite or a checkpoint cannot be written.
        """
        settings, accelerator = self.settings, self.accelerator
        try:
            self._train()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingStopped(
                f"A process that reads data has died at step {self.step}: {error} Most often memory ran out: take fewer "
                "dataloader_num_workers, and resume with --resume_from_checkpoint latest. Whole checkpoints stay."
            ) from error
        finally:
            self.run.lock.release()
        accelerator.wait_for_everyone()
        accelerator.end_training()
        accelerator.print(f"Finished {settings.max_steps} iterations: the pipeline is in {self.run.path}.")
        if settings.push_to_hub and accelerator.is_main_process:
            self.outputs.publish()

    def _train(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        resumed = self._start()
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(
            total=settings.max_steps,
            initial=self.step,
            desc=settings.output_dir,
            unit="it",
            disable=not accelerator.is_local_main_process,
            mininterval=0.5,
        )
        try:
            if not resumed:
                self.outputs.samples(self.step)
            while self.step < settings.max_steps:
                self._one_iteration(bar)
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _one_iteration(self, bar: tqdm) -> None:
        settings = self.settings
        # Dropout is all that draws from the process's own generator; this makes it a function of the step and rank.
        torch.manual_seed(sample_seed(settings.seed, "dropout", self.step, self.accelerator.process_index))
        with self.throughput.iteration(), self.profiler.iteration(self.step + 1):
            metrics, finite = self.iteration()
        self.step += 1
        self._record(metrics, finite)
        bar.update()
        last = self.step == settings.max_steps
        if last or self.step % settings.logging_steps == 0:
            to_go = (settings.max_steps - self.step) * self.global_batch_size
            shown = {name: f"{value:.4g}" for name, value in self._log().items()}
            bar.set_postfix({**shown, "images to go": f"{to_go:,}"}, refresh=False)
        if last or self.step % settings.eval_steps == 0:
            self.outputs.samples(self.step)
        if self.outputs.best and (last or self.step % settings.eval_metric_steps == 0):
            self.accelerator.log(self.outputs.measure(self.step), step=self.step)
        # Before the checkpoint: a kill between the two leaves a snapshot that the resumed run writes again.
        self.averages.store(self.step)
        stop = self._stop_asked()
        if last or stop or self.step % settings.save_steps == 0:
            self._save()
        if stop and not last:
            raise TrainingInterrupted(
                f"saved step {self.step} of {settings.max_steps} in {self.run.path}. Run the same command with "
                "--resume_from_checkpoint latest to go on.",
                self._signal or signal.SIGTERM,
            )

    def _start(self) -> bool:
        settings, accelerator = self.settings, self.accelerator
        accelerator.wait_for_everyone()  # every rank has checked the folder before rank 0 writes to it
        self._on_main(self.run.claim)
        self.checkpoints.run_id = settings.run_id
        found = self.checkpoints.find(settings.resume_from_checkpoint) if settings.resume_from_checkpoint else None
        start_trackers(accelerator, settings, self.run.path.name)
        if found:
            try:
                self.load_state_dict(self.checkpoints.load(found))
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"The checkpoint {found} lacks a part of its state: {error}. Take another one."
                ) from error
            if self.step > settings.max_steps:
                raise InputError(
                    f"{found} is of step {self.step}, past max_steps={settings.max_steps}: give a larger max_steps, or "
                    "an earlier checkpoint."
                )
            self._resumed, self._data_state = True, self.checkpoints.rank_state(found)
            accelerator.print(f"Resumed from {found} at step {self.step}.")
        elif settings.resume_from_checkpoint:
            accelerator.print(f"No whole checkpoint in {self.checkpoints.folder} yet: starting at step 0.")
        facts, session = self.facts(), describe_session(accelerator)

        def write() -> None:
            if found:
                self.run.forget_metrics_after(self.step)
                self.run.write_config()
            else:
                self.run.start()
            if self.outputs.best:
                self.outputs.best.resume(self.step)
            self.run.write_facts(facts, session, self.step)

        self._on_main(write)
        self.checkpoints.run_id = settings.run_id
        return found is not None

    def _on_main(self, action: Callable[[], None]) -> None:
        """Does what writes at the start, on the main process; where it fails, every rank says so. Collective."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                reason = error.strerror or error
                raise InputError(
                    f"Cannot write to `output_dir` {self.run.path}: {reason}. Give another one."
                ) from error

        error = agree(self.accelerator, attempt if self.accelerator.is_main_process else lambda: None, (InputError,))
        if error:
            raise InputError(error)

    def _record(self, metrics: dict[str, torch.Tensor], finite: bool) -> None:
        self.failures = 0 if finite else self.failures + 1
        if self.failures >= MAX_FAILURES:
            raise TrainingStopped(
                f"Gradients were not finite in {MAX_FAILURES} iterations in a row (now at step {self.step}). The last "
                "checkpoint is whole. Try a smaller learning_rate, a larger t_min, or mixed_precision=no."
            )
        if not finite:
            self.accelerator.print(f"Step {self.step}: gradients not finite, update thrown away on all ranks.")
            return
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        """Means over the iterations since the last line of the log, over all ranks; collective."""
        names = sorted(self._totals)
        if not names:
            return {}
        kind = dict(dtype=torch.float64, device=self.accelerator.device)
        totals = torch.stack([torch.as_tensor(self._totals[name], **kind) for name in names])
        means = self.accelerator.reduce(totals, "mean") / torch.tensor([self._counts[name] for name in names], **kind)
        return dict(zip(names, means.tolist(), strict=True))

    def _data_counts(self) -> dict[str, int]:
        """Totals over all ranks, such as of images that could not be read; collective."""
        counts = self._batches.counts if self._batches is not None else {}
        return {
            name: int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum"))
            for name, count in counts.items()
        }

    def _log(self) -> dict[str, float]:
        means = self._means()
        self.vitals.check(means, self._counts, self.step)
        self._totals, self._counts = {}, {}
        values = {
            **means,
            **{f"{name}learning_rate": network.learning_rate for name, network in self.networks.items()},
            **self.throughput.line(self.global_batch_size),
            **self._data_counts(),
        }
        line = {"step": self.step, "images": self.step * self.global_batch_size}
        line |= dict.fromkeys(self.losses)  # null in lines in which a network did not learn
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.outputs.write("metrics", self.step, lambda: self.run.append_metrics(line))
        self.accelerator.log({"images": line["images"], **values}, step=self.step)
        for warning in self.watch(means):
            self.accelerator.print(f"Step {self.step}, warning: {warning}")
        return {name: values[name] for name in (*self.losses, "images_per_second") if name in values}

    def _save(self) -> None:
        self._saved_means = self._means()  # collective, so not inside `state_dict`
        self.checkpoints.save(self.step, self.state_dict(), self._batches and self._batches.state_dict())
        self.outputs.pipeline(self.step)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is None:
            print(f"\n{signal.Signals(number).name}: saving after this iteration …", flush=True)
        self._signal = number

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop; collective, so that all ranks stop at the same iteration."""
        if self._signal is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
