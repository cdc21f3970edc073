"""The memory estimate against counts done another way."""

import itertools

import pytest
import torch
from helpers import tiny_sit
from torch import nn
from trainer_builders import distillation

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.models import EDM2UNet2DModel, EDMUNet2DModel, SiTTransformer2DModel
from si_distill.objectives import get_objective
from si_distill.pipelines import Condition, view_network
from si_distill.training.distillation.config import AdversarialConfig, DistillConfig
from si_distill.training.dry_run.graphs import graph_bytes
from si_distill.training.dry_run.memory import (
    Devices,
    average_count,
    checkpoint_bytes,
    distillation_activations,
    parameter_count,
    teacher_activations,
    training_memory,
)

#: Attention is counted as a fused kernel keeps it; the order of EDM's channels keeps the CPU from its own.
NETWORKS = {
    "sit": (SiTTransformer2DModel, dict(sample_size=8, num_layers=2, in_channels=3, num_classes=4)),
    "edm": (EDMUNet2DModel, dict(sample_size=16, num_blocks=1, model_channels=32, attn_resolutions=[])),
    "edm2": (
        EDM2UNet2DModel,
        dict(sample_size=16, num_blocks=1, model_channels=64, num_classes=4, attn_resolutions=[]),
    ),
}


def on_meta(cls, arguments) -> nn.Module:
    with torch.device("meta"):
        return cls(**arguments)


def settings(**values) -> DistillConfig:
    return DistillConfig(output_dir="run", teacher="teacher", **{"per_device_train_batch_size": 4, **values})


def forward_bytes(network: nn.Module, batch: int, through: bool = False) -> int:
    view, device = view_network(network), next(network.parameters()).device
    network.requires_grad_(not through)
    x = torch.zeros(batch, *view.sample_shape, device=device, requires_grad=through)
    t, labels = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    return graph_bytes(network, lambda: view(x, t, Condition(labels)))


def test_graph_of_two_layers_is_their_inputs():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.zeros(5, 8)
    # The first layer keeps x; ReLU's output is kept once, for itself and for the second layer.
    assert graph_bytes(network, lambda: network(x)) == 4 * 5 * (8 + 16)
    assert graph_bytes(network.requires_grad_(False), lambda: network(x)) == 0


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("through", [False, True], ids=["learning", "passing"])
def test_the_meta_device_keeps_what_a_real_forward_keeps(kind, through):
    cls, arguments = NETWORKS[kind]
    real = cls(**arguments).requires_grad_(not through)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        x = torch.zeros(2, *view_network(real).sample_shape, requires_grad=through)
        view_network(real)(x, torch.zeros(2), Condition(torch.zeros(2, dtype=torch.long)))
    for tensor in (*real.parameters(), *real.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert forward_bytes(on_meta(cls, arguments), 2, through) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", NETWORKS)
def test_activations_of_any_batch_follow_from_two(kind):
    network = on_meta(*NETWORKS[kind])
    expected = forward_bytes(network, 7)
    assert teacher_activations(network, settings(per_device_train_batch_size=7)) == pytest.approx(expected, rel=1e-3)


def test_parts_are_parameters_times_what_each_needs():
    trained, teacher = [on_meta(*NETWORKS["sit"]) for _ in range(2)], on_meta(*NETWORKS["sit"])
    vae = on_meta(*NETWORKS["edm"])
    count, other = (sum(p.numel() for p in network.parameters()) for network in (teacher, vae))
    assert (parameter_count(trained), parameter_count([vae])) == (2 * count, other)

    def parts(devices, vae=None, **values):
        values = settings(ema_extra=[0.9, 0.99], **values)
        return training_memory(trained, teacher, trained[0], values, 1000, devices, vae)

    one = parts(Devices(), vae)
    assert list(one.values()) == [8 * count, 4 * count, 16 * count, 12 * count, 4 * count, 4 * other, 1000]
    assert checkpoint_bytes(one, Devices()) == 4 * (2 * count + 4 * count + 3 * count)
    # DDP's buckets hold the gradients of both networks; the rest is as on one device.
    assert parts(Devices(8), vae) == one | {"gradients": 8 * count}
    # Of a teacher in bfloat16 only the blocks are.
    block = parameter_count([teacher.transformer_blocks[0]])
    assert parts(Devices(), mixed_precision="bf16")["teacher"] == 4 * count - 2 * 2 * block

    cut = parts(Devices(2, sharded=True), vae)
    gathered = 3 * 4 * (count - 2 * block) + 2 * block * (4 + 4 + 4)
    halves = [4 * count, 2 * count, 8 * count, 6 * count, 2 * count]
    assert list(cut.values()) == [*halves, 4 * other, gathered, 1000]
    assert checkpoint_bytes(cut, Devices(2, sharded=True)) == checkpoint_bytes(one, Devices())
    assert average_count(settings(ema_extra=[0.9, 0.99], ema_power_sigmas=[0.05])) == 4


def test_checkpointed_blocks_keep_their_inputs_and_one_block_more():
    def activations(layers, **values):
        arguments = dict(sample_size=16, num_layers=layers, in_channels=3, num_classes=4)
        return teacher_activations(on_meta(SiTTransformer2DModel, arguments), settings(**values))

    block = activations(7) - activations(6)
    each = activations(7, gradient_checkpointing=True) - activations(6, gradient_checkpointing=True)
    assert each == 4 * 64 * 384 * 4  # float32 tokens of 4 samples, which go from block to block
    # What is kept of the whole network beside the blocks, the blocks' inputs, and one block's insides.
    kept, outside = activations(6, gradient_checkpointing=True), activations(6) - 6 * block
    assert kept == pytest.approx(outside + 6 * each + block, rel=0.1)


def measured_peak(call) -> int:
    """The most bytes that torch's allocator holds in a call above what it held before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_real_iteration_needs(tmp_path, checkpointing):
    network = SiTTransformer2DModel(sample_size=16, num_layers=4, in_channels=3, num_classes=4)
    InterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(tmp_path / "teacher")
    arguments = "--objective cross_term_detached --guidance_scale 2 --per_device_train_batch_size 16".split()
    arguments += ["--gradient_checkpointing", str(checkpointing).lower()]
    trainer = distillation(tmp_path / "teacher", tmp_path / "run", *arguments)
    trained = (trainer.critic, trainer.generator)
    teacher = trainer.teacher_pipeline.transformer
    activations = distillation_activations(teacher, trainer.objective, False, trainer.settings)
    networks = [one.unwrapped for one in trained]
    parts = training_memory(networks, teacher, networks[1], trainer.settings, activations, Devices())

    trainer.iteration()
    trainer.step += 1
    held = [p for network in (*networks, teacher, trainer.averages.network) for p in network.parameters()]
    held += [value for one in trained for state in one.optimizer.state.values() for value in state.values()]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in held)
    # Weights, moments and averages to the byte, but for Adam's counters.
    fixed = sum(size for name, size in parts.items() if name not in ("gradients", "activations"))
    assert fixed == pytest.approx(expected, rel=1e-3)
    # Activations are all there when a backward begins, gradients when it ends: their sum is not reached.
    peak = measured_peak(trainer.iteration)
    assert max(parts["gradients"], parts["activations"]) < 1.1 * peak
    assert peak < 1.1 * (parts["gradients"] + parts["activations"])


def test_peak_of_a_distillation_is_the_larger_of_its_two_updates():
    network = tiny_sit(num_classes=3).to("meta")
    learning, passing = forward_bytes(network, 4), forward_bytes(network, 4, through=True)
    gap, detached, real = (get_objective(name) for name in ("gap", "cross_term_detached", "realuid"))

    def peak(objective, judged=False, **values):
        return distillation_activations(network, objective, judged, settings(**values))

    assert peak(gap) == learning + max(learning, 2 * passing)
    assert peak(detached) == 2 * learning
    assert peak(real) == learning + max(2 * learning, 2 * passing)
    assert peak(detached, gradient_accumulation_steps=2) == learning
    assert peak(gap, guidance_scale=2.0) == learning + max(learning, 3 * passing)
    # An adversarial term with times of its own: four views in the critic, two in the generator's loss.
    own = AdversarialConfig(kind="head", t_min=0.0, t_max=1.0)
    assert peak(detached, judged=True, adversarial=own) == learning + max(3 * learning, 2 * passing)
    copies = 2 * parameter_count([network])
    assert peak(detached, mixed_precision="bf16") == 2 * (learning // 2 + copies)
