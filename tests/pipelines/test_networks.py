"""Networks of other classes, and networks without classes, in both pipelines."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_models import tiny_dit, tiny_unet
from helpers import tiny_sit
from torch import nn
from torch.distributed.fsdp import fully_shard

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.critic import CriticNetwork
from si_distill.pipelines import Condition, Guidance, view_network

NETWORKS = {
    "sit": lambda: tiny_sit(in_channels=2),
    "unconditional sit": lambda: tiny_sit(in_channels=2, num_classes=0),
    "dit": tiny_dit,
    "dit with learned variance": lambda: tiny_dit(out_channels=4),
    "unet": tiny_unet,
    "unet with classes": lambda: tiny_unet(num_class_embeds=3),
}
FACTS = {  # classes, null class, width and number of the tokens
    "sit": (3, 3, 16, 4),
    "unconditional sit": (0, None, 16, 4),
    "dit": (3, 3, 8, 4),
    "dit with learned variance": (3, 3, 8, 4),
    "unet": (0, None, 8, 16),
    "unet with classes": (3, None, 8, 16),
}
SCHEDULER = dict(interpolant="ddpm", prediction_type="epsilon", timestep_type="discrete")
every_network = pytest.mark.parametrize("name", NETWORKS)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 8, 8, generator=generator), torch.tensor([7, 800]), torch.tensor([0, 2])


@every_network
def test_views_say_what_networks_are(name):
    view = view_network(NETWORKS[name]())
    num_classes, null_class, width, _ = FACTS[name]
    assert view.sample_shape == (2, 8, 8)
    assert (view.num_classes, view.null_class, view.feature_width) == (num_classes, null_class, width)


@every_network
def test_views_give_prediction_and_features(name):
    network = NETWORKS[name]().eval()
    x, t, y = inputs()
    view = view_network(network)
    with torch.no_grad():
        prediction, features = view(x, t, Condition(y), return_features=True)
        (alone,) = view(x, t, Condition(y))
    assert torch.equal(prediction, alone)
    assert prediction.shape == x.shape
    assert features.shape == (2, FACTS[name][3], FACTS[name][2])
    labels = (y,) if view.num_classes else ()
    own = network(x, t, *labels).sample
    assert torch.equal(prediction, own[:, :2])


def test_features_of_a_dit_are_the_tokens_after_half_of_its_blocks():
    network = tiny_dit(num_layers=4).eval()
    x, t, y = inputs()
    hidden = network.pos_embed(x)
    for block in network.transformer_blocks[:2]:
        hidden = block(hidden, timestep=t, class_labels=y)
    torch.testing.assert_close(view_network(network)(x, t, Condition(y), return_features=True)[1], hidden)


@every_network
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_carry_gradients_through_frozen_and_wrapped_critics(name, checkpointing, tmp_path):
    network = NETWORKS[name]()
    if checkpointing:
        network.enable_gradient_checkpointing()
    critic = CriticNetwork(network, "encoder").train()
    x, t, y = inputs()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(critic)
        prediction, logits, _ = wrapped(x, t, Condition(y))
        (prediction.square().mean() + logits.square().mean()).backward()
        student = view_network(nn.parallel.DistributedDataParallel(copy.deepcopy(network)))
        assert student(x, t, Condition(y))[0].shape == x.shape
        assert student.sample_shape == (2, 8, 8)
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in critic.parameters())
    critic.requires_grad_(False)
    x.requires_grad_(True)
    gradients = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in critic(x, t, Condition(y))[:2]]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_dit_in_training_does_not_drop_labels_by_itself():
    network = tiny_dit().train()
    x, t, y = inputs()
    outputs = [view_network(network)(x.repeat(32, 1, 1, 1), t.repeat(32), Condition(y.repeat(32)))[0] for _ in range(2)]
    assert torch.equal(*outputs)


def test_guidance_of_a_dit_uses_its_null_class():
    network = tiny_dit(out_channels=4).eval()
    x, t, y = inputs()
    null = torch.full((2,), 3)
    with torch.no_grad():
        field = InterpolantPipeline(network, StochasticInterpolantScheduler()).field(guidance=Guidance(2.5))
        guided = field.predict(x, t, Condition(y))
        conditional, unconditional = (network(x, t, labels).sample[:, :2] for labels in (y, null))
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-3


@every_network
@pytest.mark.parametrize("cls", [InterpolantPipeline, OneStepInterpolantPipeline])
def test_pipelines_of_every_network_save_and_load(name, cls, tmp_path, remote_code_cache):
    network = NETWORKS[name]().eval()
    pipe = cls(network, StochasticInterpolantScheduler(**SCHEDULER))
    what = {"class_labels": [0, 2]} if FACTS[name][0] else {"batch_size": 2}

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        steps = {"num_inference_steps": 3} if cls is InterpolantPipeline else {}
        return pipe(**what, **steps, generator=torch.Generator().manual_seed(0), output_type="latent").images

    expected = images(pipe)
    assert expected.shape == (2, 2, 8, 8)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = cls.from_pretrained(tmp_path / "saved")
    assert type(loaded.transformer) is type(network)
    assert torch.equal(images(loaded), expected)
    trusted = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(trusted).__module__.startswith("diffusers_modules")
    assert torch.equal(images(trusted), expected)


@pytest.mark.parametrize("cls", [InterpolantPipeline, OneStepInterpolantPipeline])
def test_labels_and_batch_size_are_not_mixed_up(cls):
    unconditional = cls(tiny_sit(num_classes=0), StochasticInterpolantScheduler())
    assert len(unconditional(output_type="latent").images) == 1
    for labels in (3, [0, 1], "one"):
        with pytest.raises(ValueError, match=r"unconditional: pass `batch_size`"):
            unconditional(labels)
    for batch_size in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"at least 1, got {batch_size}"):
            unconditional(batch_size=batch_size)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        unconditional(batch_size=2, generator=[torch.Generator()])
    conditional = cls(tiny_sit(), StochasticInterpolantScheduler())
    for arguments in (dict(), dict(batch_size=2), dict(class_labels=[0, 1], batch_size=2)):
        with pytest.raises(ValueError, match="has 3 classes: pass `class_labels`"):
            conditional(**arguments)
    with pytest.raises(ValueError, match="the network is unconditional: leave it out"):
        cls(tiny_sit(num_classes=0), StochasticInterpolantScheduler(), id2label={0: "zero"})


def test_an_unconditional_network_cannot_be_guided():
    pipe = InterpolantPipeline(tiny_unet(), StochasticInterpolantScheduler(**SCHEDULER))
    with pytest.raises(ValueError, match="without labels, and has no null class"):
        pipe(guidance_scale=2.0)


class Foreign(nn.Module):
    """Takes and gives what a network does, and says nothing about itself."""

    def forward(self, x, t, y, return_dict=False):
        return (x,)


def test_networks_that_do_not_say_what_they_are_are_refused():
    with pytest.raises(
        ValueError, match=r"Foreign has no `num_classes` in its config.*DiTTransformer2DModel or UNet2DModel"
    ):
        InterpolantPipeline(Foreign(), StochasticInterpolantScheduler())
    with pytest.raises(ValueError, match="Foreign gives no features"):
        CriticNetwork(Foreign(), "head")
    with pytest.raises(ValueError, match="no middle block"):
        CriticNetwork(tiny_unet(mid_block_type=None), "encoder")
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        InterpolantPipeline(tiny_unet(class_embed_type="timestep"), StochasticInterpolantScheduler())
    with pytest.raises(ValueError, match="8×16"):
        InterpolantPipeline(tiny_unet(sample_size=(8, 16)), StochasticInterpolantScheduler())(batch_size=1)


def test_a_sit_with_classes_asks_for_labels():
    with pytest.raises(ValueError, match="3 classes: pass `class_labels`"):
        tiny_sit()(torch.zeros(1, 1, 8, 8), 0.5)


def test_a_sharded_dit_needs_its_embeddings_to_be_units_of_their_own(tmp_path):
    """DiT's output layer uses the embeddings inside the first block, which FSDP2 has put away again by then."""
    x, t, labels = inputs()
    told = Condition(labels)

    def sharded(*kinds):
        network = tiny_dit()
        for module in (*(m for m in reversed(list(network.modules())) if type(m).__name__ in kinds), network):
            fully_shard(module)
        return view_network(network)(x, t, told)[0]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            sharded("BasicTransformerBlock")
        prediction = sharded("BasicTransformerBlock", "CombinedTimestepLabelEmbeddings")
        prediction.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(prediction, view_network(tiny_dit())(x, t, told)[0])
