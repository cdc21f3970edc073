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

from ..data.batches import Batch
from ..data.latents.dataset import LatentDataset
from ..pipelines import Condition, Field, view_network
from ..pipelines.interpolant_field import Guidance
from ..text_to_image.lora import LoraWeights
from ..text_to_image.prompts import check_length
from ..text_to_image.stock_calls import teacher_images
from ..text_to_image.teacher import TextToImageTeacher, load_stock_pipeline
from ..text_to_image.texts import Texts, encode_texts
from ..visualization import image_grid, tensor_to_pil
from .captioned import base_dtype, describe_captioned, load_captioned_images
from .config import TeacherConfig
from .parallel.blocks import prepare_blocks
from .parallel.sharding import place_frozen
from .run.facts import describe_network
from .teacher import SAMPLE_STEPS, TeacherTrainer
from .texts_state import TextsState
from .times import TimeSampler

if TYPE_CHECKING:
    from ..evaluation.text import Draw
    from .run.measured import PromptImages

#: Captions and guidance scales of a sample grid.
SHOWN, SCALES = 8, (1.0, 3.0)


def text_teacher(pipeline: DiffusionPipeline, settings: TeacherConfig) -> TextToImageTeacher:
    """A stock pipeline at the size that `text`, or else `data.image_size`, says; its weights may be on the meta device.

    Raises:
        InputError: for a size or layers that it does not have.
    """
    size = settings.text.size or settings.data.square
    return TextToImageTeacher(pipeline, size, settings.lora_rank, tuple(settings.lora_targets))


def text_teacher_times(teacher: TextToImageTeacher, settings: TeacherConfig) -> TimeSampler:
    """The distribution of the training times, on the pipeline's own path.

    Raises:
        InputError: for times at which the velocity of that path is infinite.
    """
    interpolant, path = teacher.scheduler.interpolant, teacher.scheduler.config
    if path.prediction_type == "velocity":
        settings.check_times(interpolant)
    return settings.build_time_sampler(interpolant, path.timestep_type)


class TextTeacherTrainer(TextsState, TeacherTrainer):
    """The regression of `TeacherTrainer` for a stock pipeline: on its own path, of latents of its autoencoder, with caption
    dropout. The run folder becomes such a pipeline, or with `lora_rank` the adapter that it loads.
    """

    def setup(self) -> None:
        settings = self.settings
        pipeline = load_stock_pipeline(settings.model["pipeline"], base_dtype(settings))
        self.teacher = text_teacher(pipeline, settings)
        self.scheduler, self.interpolant = self.teacher.scheduler, self.teacher.scheduler.interpolant
        self.time_sampler = text_teacher_times(self.teacher, settings)
        self.data = load_captioned_images(settings.data, self.teacher.size, self.readers)
        self._check_latents()
        self.teacher.vae.to(self.accelerator.device)
        self.texts = self._encode_captions()
        self.teacher.transformer.null, self.dropout_prob = self.texts.null, settings.caption_dropout_prob
        if settings.lora_rank is None:
            self.train_network(self.teacher.transformer)
        else:
            self.train_network(copy.deepcopy(self.teacher.transformer))
            prepare_blocks(self.teacher.transformer, settings)
            place_frozen(self.accelerator, self.teacher.transformer, shared=True)

    def _check_latents(self) -> None:
        """Refuses a cache of latents of another autoencoder."""
        if isinstance(self.data, LatentDataset):
            name = f"the autoencoder of {self.settings.model['pipeline']}"
            self.data.check_vae(self.teacher.vae, self.teacher.config["vae_pixel_min"], name)

    def _encode_captions(self) -> Texts:
        """The captions of the data; the text encoders are on the device meanwhile."""
        teacher, text, network = self.teacher, self.settings.text, self.teacher.transformer.base
        check_length(text.max_length, teacher.pipeline)
        # A network that was distilled from guidance is told to use none.
        told = 1.0 if teacher.convention.told_guidance and network.config.guidance_embeds else None
        return encode_texts(
            teacher.pipeline,
            self.data.class_names,
            text.max_length,
            device=self.accelerator.device,
            told_guidance=told,
        )

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
            "data": describe_captioned(self.settings.data, self.data, self.teacher.size),
        }
