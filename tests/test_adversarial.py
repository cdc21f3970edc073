"""Adversarial terms against their published formulas, term by term."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_sit

from si_distill import Condition
from si_distill.adversarial import AdversarialTerm
from si_distill.critic import CriticNetwork
from si_distill.objectives import get_objective, sid_weight

B, C, H = 5, 3, 4
N = C * H * H


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bce(logits: torch.Tensor, label: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def test_sida_critic_is_its_published_sum_over_values():
    x0_critic, x_g, weight = tensor(0, B, C, H, H), tensor(1, B, C, H, H), tensor(2, B).exp()
    real, fake = tensor(3, B, 6), tensor(4, B, 6)
    lambda_d = 100.0
    published = (weight * (x0_critic - x_g).square().flatten(1).sum(1)).mean()
    published += lambda_d * (weight * 0.5 * (bce(real, 1) + bce(fake, 0))).mean()
    ours = N * (weight * get_objective("sida").critic_loss(x0_critic, None, x_g)).mean()
    ours += AdversarialTerm("encoder", lambda_d, 0.01).critic_loss(real, fake, weight)
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)


def test_sida_generator_is_its_published_loss():
    x0_critic, x0_teacher, x_g = (tensor(seed, B, C, H, H) for seed in (0, 1, 2))
    fake = 8 * tensor(3, B, 6)  # some beyond the clamp
    alpha, lambda_g = 1.0, 0.01
    d = (x_g - x0_teacher).abs().flatten(1).mean(1)
    # ½ · 100 · (½ Σ ℓ) / d  +  ½ · λ_G · N · B / d, with ℓ of our family (twice SiD's own sum).
    difference = x0_teacher - x0_critic
    sid_sum = (difference * (x0_teacher - x_g)).flatten(1).sum(1) - alpha * difference.square().flatten(1).sum(1)
    published = (0.5 * 100 * sid_sum / d + 0.5 * lambda_g * N * bce(fake.clamp(-10, 10), 1) / d).mean()
    weight = sid_weight(x_g, x0_teacher)
    term = AdversarialTerm("encoder", 1.0, lambda_g, combine="mean", clamp=10.0)
    ours = 50 * N * get_objective("sida", alpha=alpha).generator_loss(x0_critic, x0_teacher, x_g, weight).mean()
    ours = term.combined(ours, term.generator_loss(fake, weight, N))
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)


def test_dmd2_head_uses_its_weights_as_published():
    real, fake, ones = tensor(0, B, 6), tensor(1, B, 6), torch.ones(B, dtype=torch.float64)
    term = AdversarialTerm("head", 1e-2, 3e-3)
    torch.testing.assert_close(
        term.critic_loss(real, fake, ones), 1e-2 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    )
    torch.testing.assert_close(term.generator_loss(fake, ones, N), 3e-3 * F.softplus(-fake).mean())


def test_factors_of_a_head_do_not_depend_on_the_number_of_values():
    fake, ones = tensor(1, B, 6), torch.ones(B, dtype=torch.float64)
    head, encoder = (AdversarialTerm(kind, 1.0, 0.3) for kind in ("head", "encoder"))
    assert torch.equal(head.generator_loss(fake, ones, N), head.generator_loss(fake, ones, 1))
    torch.testing.assert_close(encoder.generator_loss(fake, ones, N), N * encoder.generator_loss(fake, ones, 1))


def test_the_terms_pull_logits_in_opposite_directions():
    term = AdversarialTerm("encoder", 1.0, 1.0)
    real, fake = (tensor(seed, B, 6).requires_grad_() for seed in (0, 1))
    ones = torch.ones(B, dtype=torch.float64)
    real_gradient, fake_gradient = torch.autograd.grad(term.critic_loss(real, fake, ones), [real, fake])
    (generator_gradient,) = torch.autograd.grad(term.generator_loss(fake, ones, N), fake)
    assert (real_gradient < 0).all()
    assert (fake_gradient > 0).all()
    assert (generator_gradient < 0).all()


def test_logits_beyond_the_clamp_stop_pushing_the_generator():
    fake = torch.tensor([[-30.0, -9.0]], dtype=torch.float64, requires_grad=True)
    term = AdversarialTerm("encoder", 1.0, 1.0, clamp=10.0)
    (gradient,) = torch.autograd.grad(term.generator_loss(fake, torch.ones(1, dtype=torch.float64), N), fake)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] < 0


@pytest.mark.parametrize("kind", [None, "encoder", "head"])
def test_one_forward_of_the_critic_yields_prediction_and_logits(kind):
    network = tiny_sit()
    critic = CriticNetwork(network, kind)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    x, t, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    with torch.no_grad():
        prediction, logits, _ = critic(x, t, Condition(labels))
        assert len(calls) == 1
        assert torch.equal(prediction, network(x, t, labels).sample)
        features = network(x, t, labels, return_features=True).features
    assert features.shape == (3, 4, 16)  # two by two patches
    if kind is None:
        assert logits is None
    elif kind == "encoder":
        assert sum(p.numel() for p in critic.parameters()) == sum(p.numel() for p in network.parameters())
        torch.testing.assert_close(logits, features.mean(-1))
    else:
        torch.testing.assert_close(logits, critic.head(features).squeeze(-1))


def test_features_are_the_tokens_after_the_middle_block():
    network = tiny_sit(num_layers=4)
    seen = []
    network.transformer_blocks[1].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        features = network(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1]), return_features=True).features
    assert torch.equal(features, seen[0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(kind="gan"), "Unknown kind 'gan' of an adversarial term.*encoder, head"),
        (dict(critic_weight=-1), "critic_weight must be finite and not negative"),
        (dict(generator_weight=float("nan")), "generator_weight must be finite and not negative"),
        (dict(combine="product"), "Unknown combine 'product'.*sum, mean"),
    ],
)
def test_wrong_settings_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        AdversarialTerm(**{"kind": "head", "critic_weight": 1.0, "generator_weight": 1.0, **config})
