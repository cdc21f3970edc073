"""Finished networks and pipelines that get further inputs say at first, bit for bit, what they said."""

import pytest
import torch
from helpers import tiny_edm, tiny_edm2, tiny_sit

from si_distill import Condition, Guidance, InterpolantPipeline, SiTTransformer2DModel, StochasticInterpolantScheduler
from si_distill.models.extension import extend_network, extend_pipeline, with_learned_positions
from si_distill.pipelines import view_network


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs():
    return numbers(0, 3, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0, 1, 3])


def test_a_network_becomes_conditional_without_changing(inputs):
    plain = tiny_sit()
    extended = extend_network(plain, condition_channels=2)
    assert view_network(extended).condition_channels == 2
    assert view_network(plain).condition_channels == 0
    assert torch.equal(extended(*inputs, condition=numbers(1, 3, 2, 8, 8)).sample, plain(*inputs).sample)
    assert all(torch.equal(value, extended.state_dict()[name]) for name, value in plain.state_dict().items())
    # A copy: training it leaves the original alone.
    extended.pos_embed.proj.weight.data.zero_()
    assert plain.pos_embed.proj.weight.any()


def test_a_conditional_network_gets_noise_beside_its_reference(inputs):
    teacher, (reference, noise) = tiny_sit(condition_channels=1), numbers(1, 2, 3, 1, 8, 8)
    student = extend_network(teacher, condition_channels=2)
    both = view_network(student).condition_image(reference, noise)
    assert torch.equal(both, torch.cat([reference, noise], 1))
    said = student(*inputs, condition=both).sample
    assert torch.equal(said, teacher(*inputs, condition=view_network(teacher).condition_image(reference)).sample)
    random = extend_network(teacher, zero=False, condition_channels=2)
    assert not torch.equal(random(*inputs, condition=both).sample, said)
    silent = view_network(random).condition_image(reference, torch.zeros_like(noise))
    torch.testing.assert_close(random(*inputs, condition=silent).sample, said)


def test_an_unpaired_bridge_does_not_see_its_reference():
    reference, noise = numbers(1, 2, 3, 1, 8, 8)
    assert view_network(tiny_sit()).condition_image(reference) is None
    assert view_network(tiny_sit(condition_channels=1)).condition_image(reference, noise) is noise


def test_conditions_of_other_channels_are_refused():
    network, reference = tiny_sit(condition_channels=3), numbers(0, 2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"reference image of 3 channels.*none was given"):
        view_network(network).condition_image(None)
    with pytest.raises(ValueError, match=r"reference image of 3 channels.*the one given has 1"):
        view_network(network).condition_image(reference)
    with pytest.raises(ValueError, match=r"reference image of 2 channels.*the one given has 1"):
        view_network(network).condition_image(reference, reference)


def test_dtype_mode_and_other_inputs_are_kept():
    network = tiny_edm("ddpmpp", augment_dim=0).double().train()
    extended = extend_network(network, augment_dim=9)
    assert (extended.dtype, extended.training, extended.config.augment_dim) == (torch.float64, True, 9)


def test_what_cannot_grow_is_refused():
    with pytest.raises(ValueError, match="EDMUNet2DModel has no `condition_channels`"):
        extend_network(tiny_edm("ddpmpp"), condition_channels=3)
    with pytest.raises(ValueError, match="is 3 and can only grow, but 1"):
        extend_network(tiny_sit(condition_channels=3), condition_channels=1)


def test_a_pipeline_is_extended_and_saved(tmp_path, inputs):
    teacher = InterpolantPipeline(
        tiny_sit(), StochasticInterpolantScheduler(), id2label={0: "zero", 1: "one", 2: "two"}
    )
    extend_pipeline(teacher, 3).save_pretrained(tmp_path)
    loaded = InterpolantPipeline.from_pretrained(tmp_path)
    assert loaded.network.condition_channels == 3
    assert loaded.config.id2label == teacher.config.id2label
    condition = numbers(1, 3, 3, 8, 8)
    assert torch.equal(loaded.transformer(*inputs, condition=condition).sample, teacher.transformer(*inputs).sample)


def test_guidance_shows_the_condition_to_both_halves(inputs):
    network, condition = tiny_sit(condition_channels=1), numbers(1, 3, 1, 8, 8)
    x, t, _ = inputs
    labels, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    told = Condition(labels, image=condition)
    field = InterpolantPipeline(network, StochasticInterpolantScheduler()).field(guidance=Guidance(2.0))
    guided = field.predict(x, t, told)
    with_class, without = (network(x, t, y, condition=condition).sample for y in (labels, null))
    torch.testing.assert_close(guided, without + 2 * (with_class - without))


def test_learned_positions_start_as_the_sines_and_are_saved(tmp_path):
    network = tiny_sit()
    learned = with_learned_positions(network)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(learned(x, t, labels).sample, network(x, t, labels).sample)
        learned.pos_embed.pos_embed.add_(torch.randn_like(learned.pos_embed.pos_embed))
        moved = learned(x, t, labels).sample
        assert not torch.equal(moved, network(x, t, labels).sample)
        learned.save_pretrained(tmp_path)
        assert torch.equal(SiTTransformer2DModel.from_pretrained(tmp_path)(x, t, labels).sample, moved)
    names = {name for name, _ in learned.named_parameters()} - {name for name, _ in network.named_parameters()}
    assert names == {"pos_embed.pos_embed"}
    with pytest.raises(ValueError, match="only SiT's networks have"):
        with_learned_positions(tiny_edm2())
