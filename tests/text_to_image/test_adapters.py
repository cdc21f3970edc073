"""Student, critic and teacher as adapters of one network, against three networks."""

import copy

import pytest
import torch
from tiny_pipelines import ALL, build

from si_distill.errors import InputError
from si_distill.pipelines import Field
from si_distill.text_to_image.teacher import TextToImageTeacher
from si_distill.text_to_image.texts import encode_texts


def conditions(name, pipeline):
    told = 3.5 if name == "flux" else None
    limit = {} if name in ("sd15", "sdxl") else {"max_length": 64}
    texts = encode_texts(pipeline, ["a red fox in the snow", "two boats"], told_guidance=told, **limit)
    return texts.condition(torch.arange(2))


def game_loss(student, critic, teacher, scheduler, x1, noise, condition):
    """A student's loss with gradients through all three networks."""
    fields = [
        Field(lambda *a, n=network, **k: n(*a[:2], **a[2].text, guidance=a[2].guidance, **k), scheduler)
        for network in (student, critic, teacher)
    ]
    x0 = fields[0].one_step(x1, 1.0, condition)
    t = torch.full((len(x1),), 0.6)
    x_t = scheduler.interpolant.interpolate(x0, noise, t)
    v_critic, v_teacher = (field(x_t, t, condition, "velocity") for field in fields[1:])
    return ((v_critic - v_teacher) * (v_critic - scheduler.interpolant.target(x0, noise, t, "velocity"))).mean()


def disturbed(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_one_base_gives_the_gradients_of_three_networks(name, checkpointing):
    pipeline = build(name)
    condition = conditions(name, pipeline)
    teacher = TextToImageTeacher(pipeline, (32, 32), lora_rank=4)
    x1, noise = torch.randn(2, 2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    network, scheduler = teacher.transformer, teacher.scheduler
    student, critic = (disturbed(copy.deepcopy(network), seed) for seed in (1, 2))
    apart = [copy.deepcopy(student.adapters) for _ in range(3)]  # whole copies, with all adapters inside
    networks = [
        type(network)(adapters.base, network.convention, teacher.latent_shape, adapters, each.adapter)
        for adapters, each in zip(apart, (student, critic, network), strict=True)
    ]
    networks[0].requires_grad_(True)
    expected = game_loss(*networks, scheduler, x1, noise, condition)
    expected.backward()
    wanted = [parameter.grad for parameter in networks[0].parameters()]

    if checkpointing:
        student.adapters.checkpoint_blocks()
        student.base.train()
    student.requires_grad_(True)
    loss = game_loss(student, critic, network, scheduler, x1, noise, condition)
    with critic.adapters.use(critic.adapter):  # what is active by then must not matter
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    given = [parameter.grad for parameter in student.parameters()]
    assert sum(gradient is not None for gradient in given) > len(given) / 2
    for gradient, other in zip(given, wanted, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.grad is None for key, parameter in student.base.named_parameters() if "lora" not in key)


@pytest.mark.parametrize("name", ALL)
def test_a_copy_is_a_fresh_or_an_equal_adapter(name):
    pipeline = build(name)
    condition = conditions(name, pipeline)
    teacher = TextToImageTeacher(pipeline, (32, 32), lora_rank=2)
    x1 = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))

    def predicted(network):
        with torch.no_grad():
            return network(x1, torch.full((2,), 0.7), guidance=condition.guidance, **condition.text)[0]

    before = predicted(teacher.transformer)
    student = copy.deepcopy(teacher.transformer)
    assert torch.equal(predicted(student), before)
    disturbed(student, 1)
    twin = copy.deepcopy(student)
    changed = predicted(student)
    assert not torch.equal(changed, before)
    assert torch.equal(predicted(twin), changed)
    assert torch.equal(predicted(teacher.transformer), before)
    disturbed(student, 2)
    assert torch.equal(predicted(twin), changed)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in student.base.parameters()) / 4


def test_layers_that_are_not_there():
    with pytest.raises(InputError, match="no linear layer of the SD3Transformer2DModel ends so"):
        TextToImageTeacher(build("sd3"), (32, 32), lora_rank=4, lora_targets=("to_qq",))
