"""Whole updates against the papers: the trainer's critic and student updates, in float64, next to a transcription of each
paper's pseudo-code in its own notation, with the values of our recipe files.

What is random (noise, classes, times, real images) is taken from the trainer; all else is written out here: which network is
in which mode, losses, their scales, clipping, the optimizer, the average.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import said, tiny_sit
from script_runs import ROOT
from test_trainers import save_teacher
from trainer_builders import distillation

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.models import EDMUNet2DModel
from si_distill.models.extension import with_learned_positions

B, N = 4, 64
SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5


@pytest.fixture(autouse=True)
def _float32_afterwards():
    yield
    torch.set_default_dtype(torch.float32)


# The trainer, in float64, and what it draws.


class Recorder:
    """A trainer whose draws are kept, in the order in which they are made."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.batches, self.draws, self.augmentations = [], [], []
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # Gradients that pass zeros, and those of biases of keys, are rounding noise, which Adam makes steps of.
            for parameter in trainer.critic.module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        for network in (trainer.critic.module, trainer.generator.module, trainer.averages.network):
            network.double()
        for ema in trainer.averages.further.values():
            ema.network.double()
        trainer.teacher_pipeline.transformer.double()
        self.student = copy.deepcopy(trainer.generator.unwrapped)
        self.critic = copy.deepcopy(trainer.critic.unwrapped)
        self.average = copy.deepcopy(trainer.averages.network)
        self.teacher = copy.deepcopy(trainer.teacher_pipeline.transformer)
        self.starts = [copy.deepcopy(network) for network in (self.critic, self.student, self.average)]
        self._keep("_micro_batch", self.batches)
        self._keep("_loss_draw", self.draws)
        self._keep("augmentation", self.augmentations)
        read = trainer.next_batch

        def in_float64(*arguments):
            return {k: v.double() if v.is_floating_point() else v for k, v in read(*arguments).items()}

        trainer.next_batch = in_float64

    def _keep(self, name, found):
        method = getattr(self.trainer, name)

        def kept(*arguments):
            found.append(method(*arguments))
            return found[-1]

        setattr(self.trainer, name, kept)

    def play(self, iterations=1):
        torch.set_default_dtype(torch.float64)  # also of random numbers
        torch.manual_seed(0)
        for _ in range(iterations):
            _, finite = self.trainer.iteration()
            self.trainer.step += 1
            assert finite
        torch.manual_seed(0)  # the transcription's dropout masks are the trainer's

    def compare(self, student, critic, average):
        trainer = self.trainer
        ours = (trainer.critic.unwrapped, trainer.generator.unwrapped, trainer.averages.network)
        for name, found, expected, start in zip(
            ("critic", "student", "average"), ours, (critic, student, average), self.starts, strict=True
        ):
            moved = 0.0
            for (key, value), wanted, before in zip(
                found.named_parameters(), expected.parameters(), start.parameters(), strict=True
            ):
                value, wanted, before = (tensor.detach() for tensor in (value, wanted, before))
                error = float((value - wanted).norm() / wanted.norm())
                assert error < 1e-9, f"{name}'s {key} differs by {error:.2g} of its norm"
                moved += float((wanted - before).norm() / before.norm())
            assert moved > 1e-6, f"the {name} has not moved"


def recipe_trainer(tmp_path, recipe, network, scheduler, *arguments):
    InterpolantPipeline(network, StochasticInterpolantScheduler(**scheduler)).save_pretrained(tmp_path / "teacher")
    data = ["--data.name", "digits", "--data.image_size", 8, "--data.streaming", "false", "--dataloader_num_workers", 0]
    micro = ["--gradient_accumulation_steps", 1, "--mixed_precision", "no", "--augment_prob", 0]
    trainer = distillation(
        tmp_path / "teacher", tmp_path / "run", "--config", ROOT / f"configs/{recipe}.yaml", *data, *micro, *arguments
    )
    return Recorder(trainer)


EDM = dict(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")


def edm_network(**config):
    # NCSN++: its embedding of the time is computed in float64, which DDPM++'s and ADM's is not.
    shape = dict(
        architecture="ncsnpp",
        sample_size=8,
        in_channels=1,
        num_classes=10,
        model_channels=8,
        channel_mult=[1, 2],
        num_blocks=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EDMUNet2DModel(**{**shape, "attn_resolutions": [4], "channel_mult_emb": 2, **config})
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    return network.eval()


# The published updates' parts.


def sigma_of(t):
    """EDM's map of a uniform number to a noise level (Karras et al. 2022, eq. 5), increasing in t."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (high + (1 - t) * (low - high)) ** RHO


def denoise(network, x, sigma, labels, **given):
    """D(x; σ) in EDM's preconditioning (Karras et al. 2022, eq. 7); of a critic also its logits."""
    norm = (sigma**2 + SIGMA_DATA**2).sqrt()
    output = said(network, pixelwise(1 / norm) * x, sigma.log() / 4, labels, **given)
    skip, out = pixelwise(SIGMA_DATA**2 / norm**2), pixelwise(sigma * SIGMA_DATA / norm)
    prediction = skip * x + out * output[0]
    return (prediction, *output[1:]) if len(output) > 1 else prediction


def pixelwise(values):
    return values[:, None, None, None]


def edm_weight(sigma):
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


class Adam:
    """Kingma & Ba 2015, algorithm 1; with decay Loshchilov & Hutter 2019, algorithm 2."""

    def __init__(self, network, beta1, beta2=0.999, eps=1e-8, decay=0.0):
        self.parameters = list(network.parameters())
        self.beta1, self.beta2, self.eps, self.decay, self.t = beta1, beta2, eps, decay, 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, loss, lr, max_norm=None, max_value=None):
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, self.parameters, strict=True)]
        if max_value is not None:
            gradients = [g.clamp(-max_value, max_value) for g in gradients]
        if max_norm is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            gradients = [g * min(1.0, max_norm / (norm + 1e-6)) for g in gradients]
        self.t += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
                p.mul_(1 - lr * self.decay)
                m.mul_(self.beta1).add_((1 - self.beta1) * g)
                v.mul_(self.beta2).add_((1 - self.beta2) * g * g)
                m_hat, v_hat = m / (1 - self.beta1**self.t), v / (1 - self.beta2**self.t)
                p.sub_(lr * m_hat / (v_hat.sqrt() + self.eps))


@torch.no_grad()
def average_towards(average, network, decay):
    for a, p in zip(average.parameters(), network.parameters(), strict=True):
        a.copy_(decay * a + (1 - decay) * p)


def half_life_decay(images_seen, half_life=500_000, ramp=0.05):
    return 0.5 ** (B / max(min(half_life, images_seen * ramp), 1e-8))


# SiD and SiDA (Zhou et al. 2024, algorithm 1 and algorithm 1 of "Adversarial Score Identity Distillation").


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid(tmp_path, alpha):
    played = recipe_trainer(
        tmp_path, "cifar10/distill_sid_cond", edm_network(dropout=0.13), EDM,
        "--objective_kwargs", f"{{alpha: {alpha}}}", "--learning_rate", 1e-3,
    )  # fmt: skip
    played.trainer.step = 2500  # 10,000 images: the average is being ramped up
    played.play()
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    of_critic, of_student = played.batches[::-1]  # the student's noise is drawn first, the critic's with its update
    sigma, n = (sigma_of(played.draws[0].t), played.draws[0].noise)
    start = torch.full((B,), 2.5, dtype=torch.float64)

    # ψ: the student makes images in evaluation mode, the critic is in training mode.
    student.eval(), critic.train()
    with torch.no_grad():
        x_g = denoise(student, 2.5 * of_critic.noise, start, of_critic.labels)
    output = denoise(critic, x_g + pixelwise(sigma) * n, sigma, of_critic.labels)[0]
    loss = (pixelwise(edm_weight(sigma)) * (output - x_g).square()).sum() / B
    Adam(critic, beta1=0.0).step(loss, 1e-3)

    # θ: the other way round.
    student.train(), critic.eval()
    sigma, n, labels = sigma_of(played.draws[1].t), played.draws[1].noise, of_student.labels
    x_g = denoise(student, 2.5 * of_student.noise, start, labels)
    x_t = x_g + pixelwise(sigma) * n
    real, fake = denoise(teacher, x_t, sigma, labels), denoise(critic, x_t, sigma, labels)[0]
    weight = (x_g - real).detach().abs().mean((1, 2, 3), keepdim=True)
    loss = 100 * ((real - fake) * ((real - x_g) - alpha * (real - fake)) / weight).sum() / B
    Adam(student, beta1=0.0).step(loss, 1e-3)
    average_towards(average, student, half_life_decay(10_000))
    played.compare(student, critic, average)


def test_sida_with_cut_values(tmp_path):
    played = recipe_trainer(
        tmp_path, "cifar10/distill_sida_cond", edm_network(dropout=0.13, augment_dim=9), EDM, "--learning_rate", 1e-3,
        "--augment_prob", 0.12,
    )  # fmt: skip
    played.trainer.step = 60_000  # 240,000 images: the student feels the term
    played.play()
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    of_critic, of_student = played.batches[::-1]
    assert not torch.equal(of_critic.labels, of_student.labels)
    start = torch.full((B,), 2.5, dtype=torch.float64)

    student.eval(), critic.train()
    sigma, n, labels = sigma_of(played.draws[0].t), played.draws[0].noise, of_critic.labels
    with torch.no_grad():
        x_g = denoise(student, 2.5 * of_critic.noise, start, labels)
    generated, real = played.augmentations
    assert not torch.equal(generated.labels, real.labels)  # apart
    x_g, x = generated(x_g), real(of_critic.data["images"])
    # Both halves in one forward: the same masks of dropout as the trainer's.
    output, logits, _ = denoise(
        critic, torch.cat([x_g, x]) + pixelwise(sigma.repeat(2)) * n.repeat(2, 1, 1, 1), sigma.repeat(2), labels.repeat(2),
        augment_labels=torch.cat([generated.labels, real.labels]),
    )  # fmt: skip
    of_fake, of_real = logits.chunk(2)
    weight = edm_weight(sigma)
    loss = (pixelwise(weight) * (output[:B] - x_g).square()).sum() / B
    loss += (weight * (F.softplus(-of_real).mean() + F.softplus(of_fake).mean()) / 2).sum() / B
    Adam(critic, beta1=0.0).step(loss, 1e-3, max_value=1.0)

    student.train(), critic.eval()
    sigma, n, labels = sigma_of(played.draws[1].t), played.draws[1].noise, of_student.labels
    x_g = denoise(student, 2.5 * of_student.noise, start, labels)
    x_t = x_g + pixelwise(sigma) * n
    real = denoise(teacher, x_t, sigma, labels)
    fake, logits, _ = denoise(critic, x_t, sigma, labels)
    d = (x_g - real).detach().abs().mean((1, 2, 3), keepdim=True)
    sid = 100 * ((real - fake) * ((real - x_g) - 1.0 * (real - fake)) / d).sum() / B
    gan = 0.01 * (F.softplus(-logits.clamp(-10, 10)).mean() / d * N).sum() / B
    Adam(student, beta1=0.0).step(0.5 * sid + 0.5 * gan, 1e-3)
    average_towards(average, student, half_life_decay(240_000))
    played.compare(student, critic, average)


def test_sid_freezes_nothing_and_sida_the_student_at_first(tmp_path):
    played = recipe_trainer(tmp_path, "cifar10/distill_sida_cond", edm_network(dropout=0.13), EDM)
    before = [p.clone() for p in played.trainer.generator.parameters]
    played.play()
    assert all(torch.equal(p, q) for p, q in zip(played.trainer.generator.parameters, before, strict=True))
    assert len(played.batches) == 2  # the student's batch is drawn all the same


# RealUID (Kornilov et al. 2026, algorithm 1, in its own time: data at t = 1).


@pytest.mark.parametrize(("alpha", "beta", "dropout"), [(0.92, 0.94, 0.0), (0.92, 0.94, 0.1), (1.0, 1.0, 0.1)])
def test_realuid(tmp_path, alpha, beta, dropout):
    played = recipe_trainer(
        tmp_path, "cifar10/distill_realuid_cond", tiny_sit(num_classes=10, dropout=dropout), {},
        "--objective_kwargs", f"{{alpha: {alpha}, beta: {beta}}}", "--learning_rate", 1e-3, "--lr_warmup_steps", 2,
        "--ema_decay", 0.9, "--data.random_flip", "false",
    )  # fmt: skip
    assert not torch.equal(played.critic.network.class_embed.weight, played.student.class_embed.weight)  # random start
    played.play(iterations=2)
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    warm_up = lambda step: min(step, 2) / 2  # noqa: E731 - the paper's code has it so
    optimizers = {"u": Adam(critic, beta1=0.0), "gen": Adam(student, beta1=0.0)}

    def velocity(network, t, x, y):
        output = said(network, x, 1 - t, y)[0]
        return -output  # d/dt = −d/ds

    def generate(z, y):
        return z + velocity(student, torch.zeros(len(z), dtype=z.dtype), z, y)

    def squares(values):
        return values.square().sum()

    updates = 0
    for iteration in range(2):
        # An iteration's first batch is the student's, which is used last.
        batches = played.batches[6 * iteration : 6 * iteration + 6]
        draws = played.draws[6 * iteration : 6 * iteration + 6]
        for k, batch in enumerate([*batches[1:], batches[0]]):
            t, x0, y = 1 - draws[k].t, draws[k].noise, batch.labels
            t_ = pixelwise(t)
            assert torch.equal(y, batch.data.get("labels", y))
            if k < 5:
                student.eval(), critic.train()
                with torch.no_grad():
                    x1 = generate(batch.noise, y)
                xt, real = t_ * x1 + (1 - t_) * x0, batch.data.get("images")
                if alpha == 1:
                    loss = squares(velocity(critic, t, xt, y) - (x1 - x0))
                else:
                    xt_real = t_ * real + (1 - t_) * x0
                    both = velocity(critic, t.repeat(2), torch.cat([xt, xt_real]), y.repeat(2))
                    loss = alpha * squares(both[:B] - beta / alpha * (x1 - x0))
                    loss += (1 - alpha) * squares(both[B:] - (1 - beta) / (1 - alpha) * (real - x0))
                optimizers["u"].step(loss / B, 1e-3 * warm_up(updates), max_norm=1.0)
                updates += 1
            else:
                student.train(), critic.eval()
                x1 = generate(batch.noise, y)
                xt = t_ * x1 + (1 - t_) * x0
                target = beta / alpha * (x1 - x0)
                loss = alpha * squares(velocity(teacher, t, xt, y) - target)
                loss -= alpha * squares(velocity(critic, t, xt, y) - target)
                optimizers["gen"].step(loss / B, 1e-3 * warm_up(iteration), max_norm=1.0)
                average_towards(average, student, 0.9)  # constant from the first update
    played.compare(student, critic, average)


def test_realuid_with_gan(tmp_path):
    played = recipe_trainer(
        tmp_path, "cifar10/distill_realuid_cond_gan", tiny_sit(num_classes=10, patch_size=2), {},
        "--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--critic_steps", 1, "--data.random_flip", "false",
    )  # fmt: skip
    played.play()
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    of_student, of_critic = played.batches

    def squares(values):
        return values.square().sum()

    def at(x1, draw):
        """x_t and u_t of the losses, and x_t at the GAN's own times with the same noise, in our time."""
        t, own = pixelwise(draw.t), pixelwise(draw.adversarial.t)
        return (1 - t) * x1 + t * draw.noise, draw.noise - x1, (1 - own) * x1 + own * draw.noise

    draw, y = played.draws[0], of_critic.labels
    assert float(draw.adversarial.t.max()) <= 0.2
    assert torch.equal(draw.adversarial.noise, draw.noise)
    one = torch.ones(B, dtype=torch.float64)
    with torch.no_grad():
        x1 = of_critic.noise - said(student, of_critic.noise, one, y)[0]
    x_t, u_t, fake = at(x1, draw)
    _, _, real = at(of_critic.data["images"], draw)
    loss = squares(said(critic, x_t, draw.t, y)[0] - u_t) / B
    loss += 1.0 * F.softplus(said(critic, fake, draw.adversarial.t, y)[1]).mean()
    loss += 1.0 * F.softplus(-said(critic, real, draw.adversarial.t, y)[1]).mean()
    Adam(critic, beta1=0.0).step(loss, 1e-3, max_norm=1.0)

    draw, y = played.draws[1], of_student.labels
    x1 = of_student.noise - said(student, of_student.noise, one, y)[0]
    x_t, u_t, fake = at(x1, draw)
    loss = squares(said(teacher, x_t, draw.t, y)[0] - u_t) - squares(said(critic, x_t, draw.t, y)[0] - u_t)
    loss = loss / B + 0.3 * F.softplus(-said(critic, fake, draw.adversarial.t, y)[1]).mean()
    Adam(student, beta1=0.0).step(loss, 1e-3, max_norm=1.0)
    average_towards(average, student, 0.9999)
    played.compare(student, critic, average)


# DMD2 (Yin et al. 2024, "Improved Distribution Matching Distillation", section 4), and FastGen's variant.


@pytest.mark.parametrize("stage", ["distill_dmd2", "distill_dmd2_no_gan"])
def test_dmd2(tmp_path, stage):
    network = edm_network(model_channels=64, channel_mult=[1], dropout=0.1)  # a map of 8 × 8; DMD2's own dropout is 0
    played = recipe_trainer(
        tmp_path, f"imagenet64/{stage}", network, EDM,
        "--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--critic_lr_warmup_steps", 0,
    )  # fmt: skip
    gan = stage == "distill_dmd2"
    played.play()
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    start = torch.full((B,), 80.0, dtype=torch.float64)
    guidance = Adam(critic, beta1=0.9, decay=0.01)

    def logits(x, draw, y):
        sigma = sigma_of(draw.t)
        return denoise(critic, x + pixelwise(sigma) * draw.noise, sigma, y)[1]

    for k in range(5):
        batch, y = played.batches[k], played.batches[k].labels
        draw = played.draws[k + 1]
        if k == 0:
            # The generator first, and its images serve the critic too.
            own = played.draws[0]
            sigma = sigma_of(own.t)
            steps = own.t * 999
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)  # of 1,000 Karras levels
            assert 20 <= steps.min().round() <= steps.max().round() <= 980
            x_g = denoise(student, 80 * batch.noise, start, y)
            x_t = x_g + pixelwise(sigma) * own.noise
            with torch.no_grad():
                p_real = x_g - denoise(teacher, x_t, sigma, y)
                p_fake = x_g - denoise(critic, x_t, sigma, y)[0]
                gradient = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
            loss = 0.5 * (x_g - (x_g - gradient).detach()).square().mean()
            if gan:
                assert not torch.equal(own.adversarial.noise, own.noise)
                loss = loss + 3e-3 * F.softplus(-logits(x_g, own.adversarial, y)).mean()
            Adam(student, beta1=0.9, decay=0.01).step(loss, 1e-3, max_norm=10.0)
            x_g = x_g.detach()
        else:
            with torch.no_grad():
                x_g = denoise(student, 80 * batch.noise, start, y)
        sigma = sigma_of(draw.t)
        output = denoise(critic, x_g + pixelwise(sigma) * draw.noise, sigma, y)[0]
        loss = (pixelwise(sigma**-2 + 1 / SIGMA_DATA**2) * (output - x_g).square()).mean()
        if gan:
            fake, real = draw.adversarial, draw.adversarial_real
            assert not torch.equal(fake.t, real.t)
            assert not torch.equal(fake.noise, real.noise)
            loss = loss + 1e-2 * F.softplus(logits(x_g, fake, y)).mean()
            loss = loss + 1e-2 * F.softplus(-logits(batch.data["images"], real, batch.data["labels"])).mean()
        guidance.step(loss, 1e-3, max_norm=10.0)
    average_towards(average, student, 0.0)  # there is none
    played.compare(student, critic, average)


def test_dmd2_of_fastgen(tmp_path):
    network = edm_network(model_channels=64, channel_mult=[1])
    played = recipe_trainer(
        tmp_path, "imagenet64/distill_dmd2_fastgen", network, EDM, "--learning_rate", 1e-3, "--critic_steps", 1
    )
    played.play()
    student, critic, average, teacher = played.student, played.critic, played.average, played.teacher
    of_student, of_critic = played.batches
    start = torch.full((B,), 80.0, dtype=torch.float64)

    def features(x_t, sigma, y):
        c_in = pixelwise(1 / (sigma**2 + SIGMA_DATA**2).sqrt())
        return teacher(c_in * x_t, sigma.log() / 4, y, return_features=True).features

    draw, y, real = played.draws[0], of_critic.labels, played.draws[0].adversarial_real
    sigma, of_real = sigma_of(draw.t), sigma_of(real.t)
    with torch.no_grad():
        x_g = denoise(student, 80 * of_critic.noise, start, y)
    x_t = x_g + pixelwise(sigma) * draw.noise
    loss = (denoise(critic, x_t, sigma, y)[0] - x_g).square().mean()
    fake = critic.head(features(x_t, sigma, y).detach())
    x_t = of_critic.data["images"] + pixelwise(of_real) * real.noise
    loss = loss + F.softplus(fake).mean() + F.softplus(-critic.head(features(x_t, of_real, y).detach())).mean()
    Adam(critic, beta1=0.9, decay=0.01).step(loss, 1e-3)

    draw, y = played.draws[1], of_student.labels
    sigma = sigma_of(draw.t)
    x_g = denoise(student, 80 * of_student.noise, start, y)
    x_t = x_g + pixelwise(sigma) * draw.noise
    with torch.no_grad():
        teacher_x0, fake_x0 = denoise(teacher, x_t, sigma, y), denoise(critic, x_t, sigma, y)[0]
        gradient = (fake_x0 - teacher_x0) / (x_g - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
    loss = 0.5 * (x_g - (x_g - gradient).detach()).square().mean()
    loss = loss + 3e-3 * F.softplus(-critic.head(features(x_t, sigma, y))).mean()
    Adam(student, beta1=0.9, decay=0.01).step(loss, 1e-3, max_norm=10.0)
    average_towards(average, student, 0.9999**5)
    played.compare(student, critic, average)


# si-adistill (the report's public code), in its own time: data at t = 1.


def test_si_adistill(tmp_path):
    network = tiny_sit(num_classes=10, in_channels=4, class_dropout_prob=0.1, learn_sigma=True, timestep_scale=1.0)
    save_teacher(tmp_path / "unused")  # the same tiny networks as elsewhere
    played = recipe_trainer(
        tmp_path, "imagenet256/distill_si_adistill", network, {}, "--learning_rate", 1e-3, "--max_steps", 5
    )
    played.play()
    critic, average, teacher = played.critic, played.average, played.teacher
    # Their student is the teacher's copy; ours has the sign and the time in its scheduler. All parameters are trained.
    student = with_learned_positions(teacher).requires_grad_(True)
    (batch,) = played.batches
    y, z = batch.labels, batch.noise

    def velocity(net, t, x, labels):
        return -said(net, x, 1 - t, labels)[0]

    def generate(labels):
        """OneStepGen.forward with forward_with_cfg: v at t = ½, guided in the first three channels."""
        half = torch.full((2 * B,), 0.5, dtype=torch.float64)
        out = velocity(student, half, torch.cat([z, z]), torch.cat([labels, torch.full_like(labels, 10)]))
        cond, uncond = out.chunk(2)
        guided = uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3])
        return torch.cat([guided, cond[:, 3:]], 1)

    def dropped(labels, *key):
        return torch.where(played.trainer.noise.uniform(*key, indices=batch.indices) < 0.1, 10, labels)

    optimizer = Adam(critic, beta1=0.9)
    with torch.no_grad():
        x1 = generate(y)  # in evaluation mode: no label is dropped
    for k in range(5):
        t, x0 = 1 - played.draws[k].t, played.draws[k].noise
        xt = pixelwise(t) * x1 + pixelwise(1 - t) * x0
        loss = (velocity(critic, t, xt, dropped(y, "labels", 0, k)) - (x1 - x0)).square().flatten(1).mean(1).mean()
        optimizer.step(loss, 1e-3)
    t, x0 = 1 - played.draws[5].t, played.draws[5].noise
    x1 = generate(dropped(y, "student_label_dropout", 0, 0))
    xt, ut = pixelwise(t) * x1 + pixelwise(1 - t) * x0, x1 - x0
    with torch.no_grad():
        diff = velocity(teacher, t, xt, y) - velocity(critic, t, xt, y)
    loss = (-2 * (diff * ut).flatten(1).sum(1)).mean()
    Adam(student, beta1=0.9).step(loss, 1e-3)
    average_towards(average, student, 0.0)
    played.compare(student, critic, average)
    # The student that is saved says what it costs.
    pipeline = played.trainer.pipeline()
    output = pipeline(class_labels=y.tolist(), latents=z, output_type="latent")
    assert output.num_network_evaluations == 2
    with torch.no_grad():
        torch.testing.assert_close(output.images, generate(y), rtol=1e-9, atol=1e-9)
