"""Stock text-to-image pipelines as one field: their own calls give what the field gives."""

import itertools

import numpy as np
import pytest
import torch
from tiny_pipelines import ALL, FLOWS, build

from si_distill.errors import InputError
from si_distill.pipelines import Field, Guidance
from si_distill.text_to_image.conventions import CONVENTIONS
from si_distill.text_to_image.teacher import TextToImageTeacher
from si_distill.text_to_image.texts import encode_texts

PROMPTS = ["a red fox in the snow", "two boats"]


def teacher_and_texts(name, **settings):
    pipeline = build(name)
    told = 3.5 if name == "flux" else None
    texts = encode_texts(pipeline, PROMPTS, max_length=None if name in ("sd15", "sdxl") else 64, told_guidance=told)
    return TextToImageTeacher(pipeline, (32, 32), **settings), texts


def noise(teacher):
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))


def stock_call(teacher, x1, **settings):
    """The pipeline's own images, (B, 3, H, W) in [0, 1]."""
    pipeline = teacher.pipeline
    given = {} if teacher.convention.network == "unet" else {"max_sequence_length": 64}
    latents = pipeline._pack_latents(x1, *x1.shape) if teacher.convention.packed else x1
    height, width = teacher.size
    return pipeline(PROMPTS, height=height, width=width, latents=latents, output_type="pt", **given, **settings).images


def shown(teacher, latents):
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)


def test_every_class_is_tried():
    assert {type(build(name)).__name__ for name in ALL} == set(CONVENTIONS)


@pytest.mark.parametrize("name", ALL)
def test_a_stock_call_of_one_step_is_the_one_step_map(name):
    teacher, texts = teacher_and_texts(name)
    x1, settings = noise(teacher), dict(teacher.convention.unguided)
    if name == "qwen":
        teacher.pipeline.scheduler.register_to_config(shift_terminal=None)  # 0/0 in a call of one step
    field = Field(teacher.network, teacher.scheduler)
    with torch.no_grad():
        ours = shown(teacher, field.one_step(x1, 1.0, texts.condition(torch.arange(2))))
    x1 = x1 * teacher.scheduler.interpolant.at(torch.ones(1), x1).beta  # Stable Diffusion's last level is not all noise
    theirs = stock_call(teacher, x1, num_inference_steps=1, **settings)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


#: Arguments of a guided call, and the w of u + w (c − u) that it is.
GUIDED = {
    "sd3": ({"guidance_scale": 3.0}, 3.0),
    "sana": ({"guidance_scale": 3.0, "use_resolution_binning": False}, 3.0),
    "lumina2": ({"guidance_scale": 3.0}, 3.0),
    "qwen": ({"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]}, 3.0),
    "z_image": ({"guidance_scale": 2.0}, 3.0),
}


@pytest.mark.parametrize("name", GUIDED)
def test_four_guided_steps_are_those_of_the_stock_call(name):
    teacher, texts = teacher_and_texts(name)
    negative = " " if name == "qwen" else ""
    texts = encode_texts(teacher.pipeline, PROMPTS, 64, negative)
    arguments, scale = GUIDED[name]
    if name == "qwen":
        teacher.pipeline.scheduler.register_to_config(shift_terminal=None)
    sigmas = np.linspace(1.0, 0.25, 4)
    x = x1 = noise(teacher)
    theirs = stock_call(teacher, x1, sigmas=sigmas.tolist(), **({"num_inference_steps": 4} | arguments))
    levels = [*teacher.pipeline.scheduler.sigmas.tolist()]
    field = Field(teacher.network, teacher.scheduler, texts.null, Guidance(scale, rescale=teacher.convention.rescale))
    with torch.no_grad():
        for t, s in itertools.pairwise(levels):
            v = field(x, torch.tensor(t), texts.condition(torch.arange(2)), "velocity")
            x = x + (s - t) * v
    torch.testing.assert_close(shown(teacher, x), theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ALL)
def test_padding_is_not_seen(name):
    pipeline = build(name)
    limit = {} if name in ("sd15", "sdxl") else {"max_length": 64}
    limit |= {"told_guidance": 3.5} if name == "flux" else {}
    alone, among = (encode_texts(pipeline, prompts, **limit) for prompts in (PROMPTS[1:], PROMPTS))
    teacher = TextToImageTeacher(pipeline, (32, 32))
    field, x1 = Field(teacher.network, teacher.scheduler), noise(teacher)[:1]
    with torch.no_grad():
        one, other = (
            field.predict(x1, torch.tensor(0.7), texts.condition(torch.tensor([row])))
            for texts, row in ((alone, 0), (among, 1))
        )
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_a_side_that_tokens_do_not_divide(name):
    with pytest.raises(InputError, match="multiples of"):
        TextToImageTeacher(build(name), (33, 32))
