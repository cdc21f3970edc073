"""What networks are given: the state, scaled exactly once where they predict EDM's raw output."""

import pytest
import torch
from helpers import field_on, tiny_sit

from si_distill import Condition, Guidance, InterpolantPipeline, StochasticInterpolantScheduler, get_interpolant
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, PREDICTIONS


@pytest.mark.parametrize("name", GAUSSIAN_INTERPOLANTS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_fields_and_pipelines_scale_the_input_once(name, prediction_type, guidance_scale):
    interpolant, init_time = get_interpolant(name), 0.6
    network, seen = tiny_sit(num_classes=3, class_dropout_prob=0.1), []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0][:2]))
    x1, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    t = torch.tensor(init_time)
    x_t = interpolant.coefficients(t).beta * x1
    guidance, told = Guidance(guidance_scale), Condition(labels)
    null = Condition(torch.tensor([3]))
    field = field_on(interpolant, network, prediction_type, null=null, guidance=guidance)
    pipe = InterpolantPipeline(
        network,
        StochasticInterpolantScheduler(interpolant=name, prediction_type=prediction_type, init_time=init_time),
    )
    with torch.no_grad():
        field.predict(x_t, t.expand(2), told)
        field.one_step(x1, init_time, told)
        pipe.field(guidance=guidance).predict(x_t, t, told)
        pipe.set_progress_bar_config(disable=True)
        pipe([0, 2], num_inference_steps=1, guidance_scale=guidance_scale, latents=x1)
    expected = interpolant.network_input(x_t, t, prediction_type)
    assert len(seen) == 4
    for network_input in seen:
        torch.testing.assert_close(network_input, expected, rtol=1e-5, atol=1e-6)
