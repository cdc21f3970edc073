"""UNet checkpoints of torchcfm and RealUID, as teachers and as one-step students."""

import pytest
import torch
from conversion_runs import TIMES, convert, distance
from foreign_unet import HEADS, unet_output, unet_weights

from si_distill import Condition, InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.errors import InputError

LABELS = torch.tensor([0, 1, 2, 2, 0])
TINY = ("--sample_size", 8, "--num_attention_heads", HEADS)


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def with_head(weights):
    """RealUID's discriminator head, saved with every network of its distillation."""
    return {**weights, "cls_pred_branch.0.weight": torch.ones(4, 4), "cls_pred_branch.0.bias": torch.ones(4)}


def saved_student(**generators):
    others = with_head(unet_weights(seed=9))
    return {
        "gen": others,
        "u": others,
        "ema_gens": generators,
        "sched": {},
        "optim_gen": {},
        "optim_u": {},
        "step": 6000,
    }


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_a_teacher_is_the_original_in_our_time_and_sign(tmp_path, images, classes, scale_shift, resblock_updown):
    weights = unet_weights(classes, scale_shift, resblock_updown)
    content = {"net_model": unet_weights(classes, seed=5), "ema_model": weights, "sched": {}, "optim": {}, "step": 1}
    pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, content, *TINY))
    expected = -unet_output(weights, images, 1 - TIMES.double(), LABELS, scale_shift)
    with torch.no_grad():
        output = pipeline.field().predict(images, TIMES, Condition(LABELS))
        pipeline.transformer.double()
        precise = pipeline.field().predict(images.double(), TIMES.double(), Condition(LABELS))
    assert distance(output, expected) < 1e-5
    assert distance(precise, expected) < 2e-7
    assert pipeline.transformer.config.num_class_embeds == (classes or None)
    assert (pipeline.scheduler.config.interpolant, pipeline.scheduler.config.prediction_type) == ("linear", "velocity")


def test_one_head_of_each_layers_own_width(tmp_path, images):
    # As in torchcfm's MNIST example: attention at full resolution and in the bottleneck, of different widths.
    weights = unet_weights(attention_level=0)
    out = convert(tmp_path, weights, "--sample_size", 8, "--num_attention_heads", 1)
    with torch.no_grad():
        output = InterpolantPipeline.from_pretrained(out).field().predict(images, TIMES, Condition())
    assert distance(output, -unet_output(weights, images, 1 - TIMES.double(), heads=1)) < 1e-5


def test_a_generator_becomes_the_one_step_map(tmp_path, images, capsys):
    weights = unet_weights(classes=3)
    content = saved_student(**{"0.999": with_head(unet_weights(classes=3, seed=7)), "0.9999": with_head(weights)})
    pipeline = OneStepInterpolantPipeline.from_pretrained(convert(tmp_path, content, *TINY, "--ema_decay", 0.9999))
    generated = pipeline(class_labels=LABELS, latents=images, output_type="latent").images
    # RealUID's generator: z + v(z, 0), one Euler step in its time.
    expected = images + unet_output(weights, images, torch.zeros(5, dtype=torch.float64), LABELS)
    assert distance(generated, expected) < 1e-5
    assert pipeline.scheduler.config.init_time == 1.0
    printed = capsys.readouterr().out
    assert "RealUID student, weights 'ema_gens 0.9999'" in printed
    assert "2 tensors: cls_pred_branch" in printed


def test_a_single_average_needs_no_choice(tmp_path, images):
    weights = unet_weights(classes=3)
    content = {"net_model": unet_weights(classes=3, seed=5), "ema_models": {"0.9996": with_head(weights)}, "step": 1}
    pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, content, *TINY))
    with torch.no_grad():
        output = pipeline.field().predict(images, TIMES, Condition(LABELS))
    assert distance(output, -unet_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5


def test_published_settings_are_assumed_where_tensors_are_silent(tmp_path):
    # Attention after one halving is at 16×16 for images of 32×32, with heads of width 64.
    network = InterpolantPipeline.from_pretrained(convert(tmp_path, unet_weights(classes=3))).transformer
    assert (network.config.sample_size, network.config.attention_head_dim) == (32, 64)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "'ema_gens' holds averages of the decays 0.999, 0.9999: choose one with --ema_decay"),
            (("--ema_decay", 0.99), "no average of decay 0.99. It has: 0.999, 0.9999"),
            (("--which", "ema"), "no 'ema'. It has: ema_gens, gen"),
            (("--which", "gen", "--ema_decay", 0.99), "'gen' is a single network"),
        ],
    )
    def test_of_a_choice_among_generators(self, tmp_path, options, message):
        content = saved_student(**{"0.999": unet_weights(), "0.9999": unet_weights()})
        with pytest.raises(InputError, match=message):
            convert(tmp_path, content, *TINY, *options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("middle_block.0.in_layers.2.bias"), r"1 missing: middle_block\.0\.in_layers\.2\.bias"),
            (lambda w: w.update({"skip.weight": torch.ones(2)}), r"1 not part of it: skip\.weight \(2,\)"),
            (
                lambda w: w.update({"out.2.weight": torch.ones(6, 32, 3, 3)}),
                r"out\.2\.weight is \(6, 32, 3, 3\) instead",
            ),
            (
                lambda w: w.pop("input_blocks.3.0.in_layers.2.weight"),
                r"input_blocks\.3\.0\.in_layers\.2\.weight with 4 axes is missing",
            ),
            (lambda w: w.pop("input_blocks.2.0.op.weight"), r"1 missing: input_blocks\.2\.0\.op\.weight"),
        ],
    )
    def test_of_tensors_that_are_not_the_unets(self, tmp_path, change, message):
        weights = unet_weights()
        change(weights)
        with pytest.raises(InputError, match=message):
            convert(tmp_path, weights, *TINY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--num_attention_heads", 5), r"widths \[64\]: they need one width that is a multiple of it"),
            (("--sample_size", 9), "`sample_size` 9 cannot be halved 1 times"),
            (("--interpolant", "vp"), "torchcfm trains no network"),
            (("--preset", "SiT-S/2"), "`preset` is 'SiT-S/2', but the checkpoint is of kind torchcfm"),
        ],
    )
    def test_of_settings_that_do_not_fit(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, unet_weights(), *options)
