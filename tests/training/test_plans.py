"""What cannot work is refused by a run and by its dry run in the same words."""

import pytest
from diffusers_models import tiny_unet
from helpers import tiny_sit
from trainer_builders import SMALL, distillation, teaching

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run

#: Teachers by name: the settings of the network, and of the scheduler.
TEACHERS = {
    "linear": (dict(num_classes=10), {}),
    "no null class": (dict(num_classes=10, class_dropout_prob=0.0), {}),
    "unconditional": (dict(num_classes=0), {}),
    "vp": (dict(num_classes=10), dict(interpolant="vp")),
    "epsilon": (dict(num_classes=10), dict(prediction_type="epsilon", init_time=0.9)),
    "ve": (dict(num_classes=10), dict(interpolant="edm")),
    "pairs": (dict(num_classes=10, condition_channels=1), dict(interpolant="bridge", prediction_type="sample")),
    "pairs of the velocity": (dict(num_classes=10, condition_channels=1), dict(interpolant="bridge", solver="euler")),
    "unpaired": (dict(num_classes=0), dict(interpolant="bridge", prediction_type="velocity")),
    "unpaired of the sample": (dict(num_classes=0), dict(interpolant="bridge", prediction_type="sample")),
    "ten times": (
        dict(num_classes=10),
        dict(
            interpolant="ddpm",
            interpolant_kwargs=dict(num_train_timesteps=10, beta_end=0.9),
            timestep_type="discrete",
            init_time=1.0,
        ),
    ),
    "unet": (None, dict(interpolant="ddpm", timestep_type="discrete", prediction_type="epsilon")),
}
PAIRS = ["--data.degradation", "downsample", "--data.degradation_kwargs", "{factor: 2}"]
OTHERS = ["--data.reference_name", "digits"]
REFUSALS = [
    ("no null class", ["--guidance_scale", 2], "guidance_scale=2.0 need a null class"),
    ("no null class", ["--critic_class_dropout_prob", 0.1], "critic_class_dropout_prob=0.1 need a null class"),
    ("unconditional", ["--label_sampling", "uniform"], "the teacher has no classes"),
    (
        "linear",
        ["--label_sampling", "empirical", "--class_frequencies", "[1, 2]"],
        "`class_frequencies` has 2 values, but the teacher has 10 classes",
    ),
    ("linear", ["--t_min", 0], "must be above 0"),
    ("linear", ["--objective_kwargs", "{critic_weight: edm}"], "EDM's preconditioning"),
    ("ve", ["--objective", "cross_term", "--objective_kwargs", "{space: velocity}"], "has no gradient"),
    ("linear", ["--objective", "realuid", "--critic_log_variance", "true"], "terms of real data"),
    ("linear", ["--critic_log_variance", "true"], "timestep_type='time'"),
    ("linear", ["--noise_channels", 2], "starts from noise: leave it out"),
    ("linear", PAIRS, "neither starts from them nor sees them"),
    ("linear", ["--adversarial.kind", "head", "--adversarial.head", "dmd2"], "need a larger map"),
    ("epsilon", ["--init_time", 1], "says nothing about the sample"),
    ("vp", ["--student_map", "negative_velocity"], "velocity networks on `linear`"),
    ("linear", ["--student_map", "negative_velocity", "--student_steps", 2], "is a map of one step"),
    ("ten times", ["--student_steps", 4, 20], "`student_steps` [4, 20] does not fit the teacher: "),
    ("pairs", [*PAIRS, "--student_steps", 4], "a bridge's student has one step"),
    ("unet", ["--student_steps", 4, "--critic_sees_level", "true"], "takes none and `augment_prob` is 0"),
    ("pairs", [*PAIRS, "--flow_map.weight", 1], "the teacher is a bridge's, and the term is for paths"),
    ("unet", ["--flow_map.weight", 1], "a UNet2DModel cannot be told a second time"),
    ("linear", ["--flow_map.weight", 1, "--student_map", "negative_velocity"], "is a map from one time alone"),
    ("linear", ["--flow_map.weight", 1, "--dropout", 0.1], "one of two masks"),
    ("linear", ["--flow_map.weight", 1, "--flow_map.batch_share", 0.1], "that is less than one"),
    ("linear", ["--flow_map.weight", 1, "--mixed_precision", "bf16"], "in bfloat16 the difference"),
    ("linear", ["--flow_map.weight", 1, "--flow_map.step_size", 0.5], "does not fit twice between `t_min` 0.02"),
    ("pairs", [], "distillation needs them whatever the objective"),
    ("pairs", OTHERS, "the data are unpaired"),
    ("pairs", [*PAIRS, "--init_time", 0.5], "a bridge's student starts at its reference"),
    ("pairs", [*PAIRS, "--label_sampling", "uniform"], "a pair's class is that of its image"),
    ("pairs", [*PAIRS, "--objective_kwargs", "{critic_weight: edm}"], "which a bridge does not have"),
    ("pairs of the velocity", PAIRS, "train it with prediction_type=sample"),
    ("unpaired", OTHERS, "needs the teacher's x̂0"),
    ("unpaired of the sample", [*OTHERS, "--objective_kwargs", "{space: velocity}"], "set it to sample"),
    ("unet", ["--augment_prob", 0.1], "augmentation would leak"),
    ("unet", ["--learned_positions", "true"], "`learned_positions` does not fit the teacher"),
    (
        "linear",
        ["--augment_prob", 0.1, "--adversarial.kind", "head", "--adversarial.features", "teacher"],
        "would leak",
    ),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name, (network, scheduler) in TEACHERS.items():
        network = tiny_unet(in_channels=1, out_channels=1) if network is None else tiny_sit(**network)
        InterpolantPipeline(network, StochasticInterpolantScheduler(**scheduler)).save_pretrained(folder / name)
    return folder


def refusal(attempt) -> str:
    with pytest.raises(InputError) as caught:
        attempt()
    return str(caught.value)


@pytest.mark.parametrize(("teacher", "arguments", "words"), REFUSALS)
def test_of_a_distillation(teachers, tmp_path, teacher, arguments, words):
    folder = teachers / teacher
    argv = ["--teacher", folder, "--output_dir", tmp_path / "run", *SMALL, *arguments]
    described = refusal(lambda: dry_run(parse_settings(DistillConfig, list(map(str, argv)))))
    assert words in described
    assert refusal(lambda: distillation(folder, tmp_path / "run", *arguments)) == described
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.num_classes", 4], "`model.num_classes` is 4, but the data set has 10"),
        (["--model.in_channels", 3], "`model.in_channels` is 3, but the data set has 1"),
        (["--model.sample_size", 16], "`model.sample_size` is 16, but the data set has 8"),
        (["--model.condition_channels", 1], "leave it out"),
        (["--model.augment_dim", 4], "leave it out"),
        (["--model.depth", 4], "Unknown setting `model.depth`"),
    ],
)
def test_of_a_teachers_training(tmp_path, arguments, words):
    shape = [
        "--data.image_size",
        8,
        "--model",
        "{patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8}",
    ]
    argv = ["--output_dir", tmp_path / "run", *SMALL, *shape, *arguments]
    described = refusal(lambda: dry_run(parse_settings(TeacherConfig, list(map(str, argv)))))
    assert words in described
    assert refusal(lambda: teaching(tmp_path / "run", "--data.image_size", 8, *arguments)) == described


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "edm"])
def test_a_plan_of_any_prediction_needs_no_weights(tmp_path, prediction_type):
    argv = ["--output_dir", tmp_path / "run", "--prediction_type", prediction_type, "--t_min", 0.01, *SMALL]
    assert f"prediction {prediction_type}" in dry_run(parse_settings(TeacherConfig, list(map(str, argv))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report_to", "trackio"], "which is not installed: pip install trackio"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a whole checkpoint"),
        (
            ["--eval_metric_steps", 1, "--evaluation.reference", "nowhere.npz"],
            "nowhere.npz is no file",
        ),
        (["--model.num_layers", "1e0"], "`num_layers` must be a whole number, got 1.0"),
    ],
)
def test_what_a_dry_run_can_see_without_data(tmp_path, arguments, words):
    argv = ["--output_dir", tmp_path / "run", *SMALL, *arguments]
    assert words in refusal(lambda: dry_run(parse_settings(TeacherConfig, list(map(str, argv)))))


def test_a_student_to_start_from_that_is_none(teachers, tmp_path):
    argv = ["--teacher", teachers / "linear", "--student", teachers / "vp", "--output_dir", tmp_path / "run", *SMALL]
    words = refusal(lambda: dry_run(parse_settings(DistillConfig, list(map(str, argv)))))
    assert "Cannot load the student" in words
    assert "it was saved as InterpolantPipeline" in words
