"""The critic that learns the size of its loss (EDM2, eq. 21; SiDA on EDM2)."""

import math

import pytest
import torch
from helpers import tiny_edm2
from trainer_builders import distillation

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.log_variance import LogVariance


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    folder = tmp_path_factory.mktemp("edm2")
    InterpolantPipeline(tiny_edm2(in_channels=1, num_classes=10), scheduler).save_pretrained(folder)
    return folder


SIDA = ["--objective", "sida", "--adversarial.kind", "encoder"]


def test_best_value_is_the_log_of_the_loss_at_each_noise_level():
    # w e^(−u) L + u is least at u = ln(w L); L depends on the level, and a linear map of features can follow it.
    torch.manual_seed(0)
    head = LogVariance().double()
    level = torch.linspace(-1.5, 1.0, 50, dtype=torch.float64)
    loss = torch.exp(2 * level + 0.3)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        u = head(level)
        value = (torch.exp(-u) * loss + u).mean()
        value.backward()
        return value

    assert torch.equal(head(level), torch.zeros(50, dtype=torch.float64))
    optimizer.step(closure)
    torch.testing.assert_close(head(level), loss.log(), atol=0.02, rtol=0)


def test_first_update_is_that_of_the_plain_loss_and_then_they_part(teacher, tmp_path):
    plain = distillation(teacher, tmp_path / "plain", *SIDA)
    learned = distillation(teacher, tmp_path / "learned", *SIDA, "--critic_log_variance", "true")
    found = []
    for trainer in (plain, learned):
        metrics, _ = trainer.iteration()
        trainer.step += 1
        found.append(metrics)
    # u = 0 at the critic's update; it moves there, so the generator's terms already feel it.
    torch.testing.assert_close(found[0]["critic_loss"], found[1]["critic_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found[0]["critic_adversarial_loss"], found[1]["critic_adversarial_loss"], rtol=1e-6, atol=0
    )
    assert learned.critic.unwrapped.log_variance.linear.weight.abs().min() > 0
    assert "critic_log_variance" not in found[0]
    second = [trainer.iteration()[0] for trainer in (plain, learned)]
    assert second[1]["critic_log_variance"] != 0
    assert second[0]["critic_loss"] != second[1]["critic_loss"]


def test_generator_is_divided_by_e_to_the_u(teacher, tmp_path):
    trainer = distillation(teacher, tmp_path / "s", *SIDA, "--critic_log_variance", "true")
    trainer.iteration()  # critic and teacher differ after it
    batch = trainer._micro_batch(0)
    losses = []
    for u in (0.0, math.log(4)):
        critic = trainer.critic.unwrapped
        critic.log_variance.forward = lambda level, u=u: torch.full_like(level, u)
        with trainer.critic.frozen() as network:
            terms = trainer._generator_loss(trainer._field(network), batch, trainer._samples(batch), 0)
        losses.append(terms.logged())
    for name in ("generator_loss", "generator_adversarial_loss"):
        torch.testing.assert_close(losses[0][name], 4 * losses[1][name], rtol=1e-5, atol=0)


def test_where_it_means_nothing_it_is_refused(teacher, teacher_folder, tmp_path):
    with pytest.raises(InputError, match="'realuid' has terms of real data"):
        distillation(teacher, tmp_path / "a", "--objective", "realuid", "--critic_log_variance", "true")
    with pytest.raises(InputError, match="timestep_type='time'"):
        distillation(teacher_folder, tmp_path / "b", "--critic_log_variance", "true")
