"""Training of a text-to-image pipeline of diffusers on captioned images, from scratch or further."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..data import load_training_data
from ..data.batches import Batch
from ..data.latents.dataset import LatentDataset
from ..errors import InputError
from ..pipelines import Condition, Field, view_network
from ..pipelines.interpolant_field import Guidance
from ..text_to_image.lora import LoraWeights
from ..text_to_image.stock_calls import teacher_images
from ..text_to_image.teacher import TextToImageTeacher, load_stock_pipeline
from ..text_to_image.texts import Texts, encode_texts
from ..visualization import image_grid, tensor_to_pil
from .parallel.blocks import prepare_blocks
from .run.facts import describe_data, describe_network
from .teacher import SAMPLE_STEPS, TeacherTrainer
from .texts_state import TextsState

if TYPE_CHECKING:
    from ..evaluation.text import Draw
    from .run.measured import PromptImages

#: Captions and guidance scales of a sample grid.
SHOWN, SCALES = 8, (1.0, 3.0)


class TextTeacherTrainer(TextsState, TeacherTrainer):
    """The regression of `TeacherTrainer` for a stock pipeline: on its own path, of latents of its autoencoder, with caption
    dropout. The run folder becomes such a pipeline, or with `lora_rank` the adapter that it loads.
    """

    def setup(self) -> None:
        settings = self.settings
        if self.accelerator.is_fsdp2:
            raise InputError("A text-to-image pipeline is trained whole on each process: launch without FSDP.")
        self.data = load_training_data(settings.data, self.readers)
        pipeline = load_stock_pipeline(settings.model["pipeline"])
        size, rank = settings.data.image_size, settings.lora_rank
        self.teacher = TextToImageTeacher(pipeline, (size, size), rank, tuple(settings.lora_targets))
        self._check_latents()
        self.scheduler = self.teacher.scheduler
        self.interpolant, path = self.scheduler.interpolant, self.scheduler.config
        if path.prediction_type == "velocity":
            settings.check_times(self.interpolant)
        self.time_sampler = settings.build_time_sampler(self.interpolant, path.timestep_type)
        self.texts = self._encode_captions()
        network = copy.deepcopy(self.teacher.transformer) if rank else self.teacher.transformer
        if rank:
            prepare_blocks(self.teacher.transformer, settings)
        network.null, self.dropout_prob = self.texts.null, settings.caption_dropout_prob
        self.train_network(network)

    def _check_latents(self) -> None:
        """Refuses a cache of latents of another autoencoder."""
        if isinstance(self.data, LatentDataset):
            name = f"the autoencoder of {self.settings.model['pipeline']}"
            self.data.check_vae(self.teacher.vae, self.teacher.config["vae_pixel_min"], name)

    def _encode_captions(self) -> Texts:
        """The captions of the data; the text encoders are on the device meanwhile, network and autoencoder stay there."""
        teacher, device = self.teacher, self.accelerator.device
        teacher.vae.to(device)
        network = teacher.transformer.to(device).base
        # A network that was distilled from guidance is told to use none.
        told = 1.0 if teacher.convention.told_guidance and network.config.guidance_embeds else None
        return encode_texts(teacher.pipeline, self.data.class_names, device=device, told_guidance=told)

    def samples(self, batch: Batch) -> torch.Tensor:
        return batch["images"] if isinstance(self.data, LatentDataset) else self.teacher.encode(batch["images"])

    def condition(self, batch: Batch) -> Condition:
        return self.texts.condition(batch["labels"])

    def pipeline(self, network: nn.Module | None = None) -> DiffusionPipeline | LoraWeights:
        network = self.averages.network if network is None else network
        if network.shares_base:
            return LoraWeights(self.teacher, network)
        return self.teacher.pipeline_with(network)

    def measured(self) -> "PromptImages":
        from .run.measured import PromptImages

        steps = self.settings.evaluation.num_inference_steps
        return PromptImages(self.settings, self.accelerator.device, self.teacher.size, self._drawn, steps=steps)

    @contextmanager
    def _drawn(self) -> "Iterator[tuple[DiffusionPipeline, Draw]]":
        """The stock pipeline with the average inside, and its call."""
        network, steps = self.averages.network, self.settings.evaluation.num_inference_steps
        pipeline = self.teacher.pipeline_with(network)
        with network.worn():
            yield pipeline, partial(teacher_images, pipeline, steps=steps)

    def sample_grid(self) -> Image.Image:
        count = min(SHOWN, len(self.texts))
        captions = torch.linspace(0, len(self.texts) - 1, count).round().long().to(self.accelerator.device)
        noise = self.noise.normal(self.teacher.latent_shape, "samples", indices=range(count))
        rows = {
            f"{SAMPLE_STEPS} steps, guidance {scale:g}": self._draw(noise, self.texts.condition(captions), scale)
            for scale in SCALES
        }
        return image_grid(list(rows.values()), list(rows), [self.texts.prompts[n] for n in captions.tolist()])

    def _draw(self, latents: torch.Tensor, condition: Condition, scale: float) -> list[Image.Image]:
        """Images of noise, by equal steps."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(SAMPLE_STEPS, device=latents.device)
        guidance = Guidance(scale, rescale=self.teacher.convention.rescale)
        field = Field(view_network(self.averages.network), scheduler, self.texts.null, guidance)
        with self.accelerator.autocast():
            for timestep in scheduler.timesteps:
                prediction = field.predict(latents, timestep, condition)
                latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return tensor_to_pil(self.teacher.decode(latents))

    def facts(self) -> dict[str, Any]:
        return {
            "network": describe_network(self.averages.network.base),
            "data": describe_data(self.settings.data, self.data),
        }
