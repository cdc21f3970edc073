"""Bridges in the scheduler: what a step needs, what it refuses, saving; the laws that samplers reach are in
`test_gaussian_pairs`.
"""

import pytest
import torch

from si_distill import StochasticInterpolantScheduler, get_interpolant


def bridge(**config) -> StochasticInterpolantScheduler:
    return StochasticInterpolantScheduler(**{"interpolant": "bridge", "prediction_type": "sample", **config})


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 1, 3, 3)), generator=torch.Generator().manual_seed(seed))


def sample(scheduler, steps, x1, reference=None, seed=0):
    """With a network that says half of its state."""
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(seed), x1
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x, generator=generator, return_dict=False, reference=reference)[0]
    return x


@pytest.mark.parametrize("solver", ["posterior", "euler", "heun"])
def test_a_saved_scheduler_makes_the_same_steps(solver, tmp_path):
    scheduler, x1 = bridge(solver=solver, interpolant_kwargs={"scale": 0.4}, first_step_size=0.01), numbers(0)
    scheduler.save_pretrained(tmp_path)
    loaded = StochasticInterpolantScheduler.from_pretrained(tmp_path)
    assert loaded.interpolant == get_interpolant("bridge", scale=0.4)
    made = sample(scheduler, 5, x1, x1)
    assert torch.equal(made, sample(loaded, 5, x1, x1))
    assert not torch.equal(made, sample(loaded, 5, x1, x1, seed=1))
    assert made.dtype == torch.float32
    assert sample(scheduler, 5, x1.bfloat16(), x1.bfloat16()).dtype == torch.bfloat16


def test_defaults_are_those_of_what_the_network_predicts():
    assert bridge().solver == "posterior"
    assert bridge(prediction_type="velocity").solver == "euler"
    assert bridge().init_noise_sigma == 1.0
    for count in (1, 2, 7):
        for solver, evaluations in (("posterior", count), ("euler", count), ("heun", max(1, 2 * count - 2))):
            scheduler = bridge(solver=solver)
            scheduler.set_timesteps(count)
            assert len(scheduler.timesteps) == evaluations
            assert scheduler.timesteps[0] == 1
            assert (scheduler.timesteps > 0).all()
    scheduler.set_timesteps(7)
    assert scheduler.timesteps[1] == pytest.approx(0.999)  # the first step of the ODE, taken with noise


def test_any_time_of_a_run_can_be_found_again():
    scheduler = bridge(solver="heun")
    scheduler.set_timesteps(4)
    starts = [0, 1, 3, 5]  # the first and the last step have one evaluation, the others two
    assert [scheduler.index_for_timestep(scheduler.timesteps[n]) for n in starts] == starts


@pytest.mark.parametrize("solver", ["posterior", "euler", "heun"])
def test_without_noise_it_samples_as_flow_matching_does(solver):
    x1, times = numbers(0).double(), [1.0, 0.7, 0.3, 0.1]
    scheduler = bridge(solver=solver, interpolant_kwargs={"scale": 0.0})
    linear = StochasticInterpolantScheduler(
        prediction_type="sample", solver="euler" if solver == "posterior" else solver
    )
    ends = []
    for each in (scheduler, linear):
        each.set_timesteps(timesteps=times)
        x = x1
        for t in each.timesteps:
            reference = {"reference": x1} if each is scheduler else {}
            x = each.step(torch.sin(x), t, x, return_dict=False, **reference)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)  # times are float32


def test_data_are_noised_towards_their_reference():
    it, x0, x1, z, t = get_interpolant("bridge"), numbers(0), numbers(1), numbers(2), torch.tensor([0.2, 0.7])
    scheduler = bridge()
    assert torch.equal(scheduler.add_noise(x0, z, t, reference=x1), it.interpolate(x0, x1, t, z))
    assert torch.equal(scheduler.scale_noise(x0, t, z, reference=x1), it.interpolate(x0, x1, t, z))
    assert torch.equal(scheduler.get_velocity(x0, z, t, reference=x1), it.velocity(x0, x1, t, z))
    with pytest.raises(ValueError, match="`noise` is z: pass the `reference` x1 too"):
        scheduler.add_noise(x0, z, t)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            (dict(solver=solver), f"'{solver}' is not defined on .* 'bridge'; choose one of: posterior, euler, heun")
            for solver in ("ddim", "edm_heun", "dpmpp_2m", "sde_euler", "sde_heun", "dopri5")
        ),
        (dict(solver="posterior", prediction_type="velocity"), "needs a network that predicts the sample"),
        (dict(solver="posterior", interpolant="linear"), "'posterior' is for bridges"),
        (dict(prediction_type="epsilon"), "epsilon prediction needs Gaussian noise"),
        (dict(prediction_type="edm"), "edm prediction needs Gaussian noise"),
        (dict(timestep_type="log_sigma"), "tells the network a noise level"),
        (dict(timestep_type="discrete"), "tells the network a noise level"),
        (dict(init_time=0.7), "starts at its reference, `init_time` 1, got 0.7"),
        (dict(noise_channels=-1), "`noise_channels` is -1"),
        (dict(noise_channels=1, interpolant="linear"), "the state itself is noise: leave it at 0"),
        (dict(first_step_size=1.0), r"`first_step_size` must lie in \(0, 1\)"),
        (dict(interpolant_kwargs={"scale": -1}), "finite scale >= 0"),
    ],
)
def test_what_a_bridge_does_not_have_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        bridge(**config)


def test_steps_need_what_the_networks_saw():
    x1 = numbers(0)
    with pytest.raises(ValueError, match="needs the pair's `reference`; without pairs use 'posterior'"):
        sample(bridge(solver="heun"), 3, x1)
    sample(bridge(), 3, x1)  # the posterior does not
    with pytest.raises(ValueError, match="those of unpaired ones do not see the reference"):
        sample(bridge(prediction_type="velocity"), 3, x1, x1)
    with pytest.raises(ValueError, match=r"start at 1, at its reference, got \[0.5"):
        bridge().set_timesteps(timesteps=[0.5, 0.25])
