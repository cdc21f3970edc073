"""Augmentation, label sampling and cut gradients in the real trainers: who is told what, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from helpers import tiny_sit
from script_runs import ROOT
from test_trainers import distillation, save_teacher, teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.data.augmentation import AUGMENT_LABELS
from si_distill.errors import InputError
from si_distill.models import EDMUNet2DModel

SIDA = ("--config", ROOT / "configs/recipes/sida.yaml", "--generator_start_images", 0, "--adversarial.start_images", 0)


@pytest.fixture(scope="module")
def augmented_teacher(tmp_path_factory):
    """A teacher that was told about augmentation."""
    return save_teacher(tmp_path_factory.mktemp("augmented"), augment_dim=AUGMENT_LABELS)


def save_edm_teacher(folder, augment_dim):
    torch.manual_seed(0)
    shape = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], attention_head_dim=8)
    network = EDMUNet2DModel(sample_size=8, in_channels=1, num_classes=10, augment_dim=augment_dim, **shape)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    edm = dict(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    InterpolantPipeline(network, StochasticInterpolantScheduler(**edm)).save_pretrained(folder)
    return folder


def listen(trainer) -> dict[str, list[dict]]:
    """What the three networks are given from now on."""
    heard = {"student": [], "critic": [], "teacher": []}
    networks = (trainer.generator.unwrapped, trainer.critic.unwrapped.network, trainer.teacher_pipeline.transformer)
    for name, network in zip(heard, networks, strict=True):

        def hook(module, args, kwargs, name=name):
            heard[name].append({"images": args[0], "classes": args[2], "told": kwargs.get("augment_labels")})

        network.register_forward_pre_hook(hook, with_kwargs=True)
    return heard


@pytest.mark.parametrize("shared", ["true", "false"])
@pytest.mark.parametrize("network", ["sit", "edm"])
def test_only_the_critic_is_told_what_was_done_to_its_images(augmented_teacher, tmp_path, network, shared):
    teacher = augmented_teacher if network == "sit" else save_edm_teacher(tmp_path / "t", AUGMENT_LABELS)
    trainer = distillation(
        teacher, tmp_path / "run", *SIDA, "--adversarial.shared_augmentation", shared, "--augment_prob", 1
    )
    heard = listen(trainer)
    metrics, finite = trainer.iteration()
    assert finite
    assert {"critic_adversarial_loss", "generator_adversarial_loss"} <= metrics.keys()
    learning, judging = heard["critic"]
    assert learning["told"].shape == (8, AUGMENT_LABELS)  # four generated and four real images
    assert learning["told"].any(1).all()
    assert torch.equal(*learning["told"].chunk(2)) == (shared == "true")
    # What is generated, and what judges it, knows of no augmentation.
    calls = [judging, *heard["student"], *heard["teacher"]]
    assert [call["told"] for call in calls] == [None] * 4  # the student makes images for the critic and for itself


def test_the_teacher_is_told_where_it_sees_augmented_images(augmented_teacher, tmp_path):
    trainer = distillation(
        augmented_teacher, tmp_path / "run", "--objective", "realuid",
        "--objective_kwargs", "{alpha: 0.9, beta: 0.95, gamma: 0.8}", "--augment_prob", 1,
    )  # fmt: skip
    heard = listen(trainer)
    assert trainer.iteration()[1]
    told = [call["told"] for call in heard["teacher"]]
    assert len(told) == 3  # generated and real images of the critic's loss, then the generator's loss
    assert torch.equal(told[0], told[1])
    assert torch.equal(told[0], heard["critic"][0]["told"][:4])
    assert told[2] is None


def test_the_critic_sees_the_images_that_its_labels_speak_of(augmented_teacher, tmp_path):
    """With next to no probability only left and right change places, in half of the images, and nothing else changes."""
    seen = {}
    for probability in (0, 1e-12):
        trainer = distillation(
            augmented_teacher, tmp_path / "run", *SIDA, "--augment_prob", probability, "--per_device_train_batch_size", 16,
        )  # fmt: skip
        heard = listen(trainer)
        trainer.iteration()
        seen[probability] = heard["critic"][0]
    assert seen[0]["told"] is None
    flipped = seen[1e-12]["told"][:, 0] == 1
    assert 4 < flipped.sum() < 28
    change = seen[1e-12]["images"] - seen[0]["images"]  # α (flipped x0 − x0), since the noise is the same
    assert not change[~flipped].any()
    assert change[flipped].flatten(1).any(1).all()
    torch.testing.assert_close(change[flipped].flip(3), -change[flipped])


@pytest.mark.parametrize("network", ["sit", "older sit", "edm"])
def test_a_critic_of_a_teacher_without_augmentation_learns_its_labels_from_zero(teacher_folder, tmp_path, network):
    folder = save_edm_teacher(tmp_path / "t", 0) if network == "edm" else teacher_folder
    if network == "older sit":
        folder = shutil.copytree(teacher_folder, tmp_path / "older")
        config = folder / "transformer" / "config.json"
        values = json.loads(config.read_text())
        del values["augment_dim"]
        config.write_text(json.dumps(values))
    trainer = distillation(folder, tmp_path / "run", *SIDA, "--augment_prob", 0.5, "--max_steps", 2)
    critic, teacher = trainer.critic.unwrapped.network, trainer.teacher_pipeline.transformer
    images, t, classes = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    labels = torch.randn(3, AUGMENT_LABELS)
    told = critic.eval()(images, t, classes, augment_labels=labels).sample
    torch.testing.assert_close(told, teacher(images, t, classes).sample)
    trainer.train()
    told = critic.eval()(images, t, classes, augment_labels=labels).sample
    assert not torch.equal(told, critic(images, t, classes).sample)
    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run").transformer
    assert student.config.augment_dim == 0


def test_an_augmented_teacher_is_trained_saved_and_distilled(tmp_path):
    trainer = teaching(tmp_path / "t", "--augment_prob", 0.5, "--max_steps", 2)
    told = []
    trainer.trained.unwrapped.register_forward_pre_hook(
        lambda m, args, kwargs: told.append((args[0], kwargs.get("augment_labels"))), with_kwargs=True
    )
    trainer.iteration()
    (images, labels), *_ = told
    assert labels.shape == (4, AUGMENT_LABELS)
    assert labels.any()
    plain = teaching(tmp_path / "plain", "--max_steps", 2)
    plain.trained.unwrapped.register_forward_pre_hook(lambda m, args: told.append((args[0], None)))
    plain.iteration()
    same = (images == told[-1][0]).flatten(1).all(1)
    assert torch.equal(same, ~labels.any(1))  # the same times and noise: what differs is the augmentation
    trainer.train()
    teacher = InterpolantPipeline.from_pretrained(tmp_path / "t")
    assert teacher.transformer.config.augment_dim == AUGMENT_LABELS
    assert teacher.transformer.augment_embed.weight.any()
    distillation(tmp_path / "t", tmp_path / "s", "--max_steps", 1).train()
    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "s")
    assert student.transformer.config.augment_dim == AUGMENT_LABELS  # it stays a copy of the teacher
    assert torch.isfinite(student([3], output_type="latent").images).all()


def test_augmentation_that_would_leak_or_cannot_be_done_is_refused(tmp_path, teacher_folder):
    gamma = ("--objective", "realuid", "--objective_kwargs", "{alpha: 0.9, beta: 0.95, gamma: 0.8}")
    other = save_teacher(tmp_path / "other", augment_dim=4)
    blocks = dict(block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    unet = UNet2DModel(
        8, 1, 1, **blocks, layers_per_block=1, norm_num_groups=2, num_class_embeds=10, attention_head_dim=4
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
    for name, parts in (("unet", (unet,)), ("latents", (tiny_sit(in_channels=4, num_classes=10),))):
        parts += (StochasticInterpolantScheduler(), vae if name == "latents" else None)
        InterpolantPipeline(*parts).save_pretrained(tmp_path / name)
    for teacher, arguments, words in (
        (teacher_folder, ("--augment_prob", 1.5), r"`augment_prob` must lie in \[0, 1\], got 1.5"),
        (teacher_folder, ("--augment_prob", 0.1, *gamma), "teacher in the critic's loss.*would leak"),
        (other, ("--augment_prob", 0.1), "takes 4 augmentation labels.*9"),
        (
            tmp_path / "unet",
            ("--augment_prob", 0.1),
            "UNet2DModel takes no augmentation labels: augmentation would leak",
        ),
        (tmp_path / "latents", ("--augment_prob", 0.1), "works on latents, which cannot be flipped"),
    ):
        with pytest.raises(InputError, match=words):
            distillation(teacher, tmp_path / "run", *arguments)
    with pytest.raises(InputError, match=r"`model.augment_dim` is 4.*augment_prob=0.1 gives 9"):
        teaching(tmp_path / "t", "--augment_prob", 0.1, "--model.augment_dim", 4)


# Classes of the generated images.


def classes_of(trainer) -> list[list[int]]:
    """The classes that the student was given in one iteration, and those of the real images beside them."""
    heard = listen(trainer)
    trainer.iteration()
    learning = heard["critic"][0]["classes"].view(-1, trainer.settings.per_device_train_batch_size)
    assert torch.equal(learning[0], heard["student"][0]["classes"])
    return learning.tolist()


def test_generated_classes_are_those_of_the_real_images_unless_a_law_is_asked_for(teacher_folder, tmp_path):
    def drawn(*arguments):
        few = ("--per_device_train_batch_size", 64, "--data.max_train_samples", 3)  # the digits 0, 1 and 2
        few = (*few, "--critic_draws", "shared")
        return classes_of(distillation(teacher_folder, tmp_path / "run", *arguments, *few))

    generated, real = drawn(*SIDA)
    assert generated == real
    assert set(real) == {0, 1, 2}
    assert drawn(*SIDA, "--label_sampling", "empirical") == [real, real]
    generated, same = drawn(*SIDA, "--label_sampling", "uniform")
    assert set(generated) == set(range(10))
    assert same == real
    generated, same = drawn(*SIDA, "--label_sampling", "empirical", "--class_frequencies", *[0] * 8, 3, 1)
    assert set(generated) == {8, 9}
    assert same == real
    # Recipes without real images: only the classes of the data set are read.
    assert set(drawn("--objective", "sid")[0]) == set(range(10))
    assert set(drawn("--objective", "sid", "--label_sampling", "empirical")[0]) == {0, 1, 2}


def test_empirical_classes_have_their_frequencies(teacher_folder, tmp_path):
    trainer = distillation(
        teacher_folder, tmp_path / "run", "--per_device_train_batch_size", 4000, "--label_sampling", "empirical",
        "--class_frequencies", 0, 2, 0, 1, 1, 0, 0, 0, 0, 4,
    )  # fmt: skip
    shares = torch.bincount(trainer._micro_batch(0).labels, minlength=10) / 4000
    expected = torch.tensor([0, 2, 0, 1, 1, 0, 0, 0, 0, 4]) / 8
    assert torch.equal(shares == 0, expected == 0)
    assert (shares - expected).abs().max() < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--class_frequencies", 1, 2), "for label_sampling=empirical"),
        (("--label_sampling", "empirical", "--class_frequencies", 1, -2), "must not be negative"),
        (("--label_sampling", "empirical", "--class_frequencies", 1, 2), "2 values, but the teacher has 10 classes"),
        (("--label_sampling", "empirical", "--data.name", "no/such-data"), "Cannot load the data set 'no/such-data'"),
        (("--label_sampling", "often"), "uniform, empirical"),
    ],
)
def test_laws_of_classes_that_cannot_work_are_refused(teacher_folder, tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        distillation(teacher_folder, tmp_path / "run", *arguments)


def test_classes_of_a_network_without_any_are_refused(tmp_path):
    teacher = save_teacher(tmp_path / "t", num_classes=0)
    with pytest.raises(InputError, match="`label_sampling` is 'uniform', but the teacher has no classes"):
        distillation(teacher, tmp_path / "run", "--label_sampling", "uniform")


# Gradients.


def test_each_value_of_the_critics_gradient_is_cut(teacher_folder, tmp_path):
    largest = {}
    for limit in ("null", 1e-3):
        trainer = distillation(
            teacher_folder, tmp_path / "run", *SIDA, "--adversarial.max_grad_value", limit, "--max_grad_norm", 1e6
        )
        for name, network in (("critic", trainer.critic), ("student", trainer.generator)):
            network.optimizer.optimizer.register_step_pre_hook(
                lambda optimizer, *_, key=(limit, name): largest.update(
                    {key: max(p.grad.abs().max() for group in optimizer.param_groups for p in group["params"])}
                )
            )
        assert trainer.iteration()[1]
    assert largest["null", "critic"] > 2e-3
    assert largest[1e-3, "critic"] == pytest.approx(1e-3)
    assert largest[1e-3, "student"] > 2e-3


@pytest.mark.parametrize(("limit", "clipped"), [(1e-5, True), (1.0, False)])
def test_gradients_are_clipped_to_their_norm(teacher_folder, tmp_path, limit, clipped):
    trainer = distillation(teacher_folder, tmp_path / "run", *SIDA, "--max_grad_norm", limit)
    norms = []
    trainer.generator.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.get_total_norm(p.grad for p in trainer.generator.parameters))
    )
    metrics, _ = trainer.iteration()
    before = metrics["generator_grad_norm"]
    assert 1e-4 < before < 1
    if clipped:
        assert norms[0] == pytest.approx(limit, rel=0.1)  # torch adds 1e-6 to the norm that it divides by
    else:
        assert norms[0] == before


def test_a_cut_does_not_hide_gradients_that_are_infinite(teacher_folder, tmp_path):
    trainer = distillation(teacher_folder, tmp_path / "run", *SIDA)
    before = [p.clone() for p in trainer.critic.parameters]
    trainer.critic.parameters[0].register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    assert not trainer.iteration()[1]
    assert all(torch.equal(p, q) for p, q in zip(trainer.critic.parameters, before, strict=True))
