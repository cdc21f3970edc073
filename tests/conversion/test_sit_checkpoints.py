"""SiT and REPA checkpoints: the converted network is the original, in this library's time and sign."""

import argparse

import pytest
import torch
from conversion_runs import TIMES, convert, distance
from foreign_sit import HEADS, sit_output, sit_weights

from si_distill import Condition, InterpolantPipeline, get_interpolant
from si_distill.errors import InputError

LABELS = torch.tensor([0, 1, 4, 5, 2])  # of 5 classes; 5 is the null class
TOLD = Condition(LABELS)
TINY = ("--num_attention_heads", HEADS)


@pytest.fixture
def images():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def saved_by_sit(weights, **arguments):
    """What SiT's training script saves: the average beside the weights, the optimizer and the parsed arguments."""
    others = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    opt = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"model": others, "ema": weights, "opt": opt, "args": argparse.Namespace(**arguments)}


def with_projectors(weights):
    projectors = {f"projectors.0.{n}.weight": torch.ones(3, 3) for n in (0, 2, 4)}
    return {**weights, **projectors}


class TestOutputs:
    @pytest.mark.parametrize("learn_sigma", [False, True])
    @pytest.mark.parametrize(("size", "patch"), [(8, 2), (16, 4)])
    def test_of_a_velocity_network(self, tmp_path, learn_sigma, size, patch):
        weights = sit_weights(size=size, patch=patch, learn_sigma=learn_sigma)
        kind = () if learn_sigma else ("--kind", "sit")
        pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, weights, *TINY, *kind))
        images = torch.randn(5, 4, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output = pipeline.field().predict(images, TIMES, TOLD)
        assert distance(output, -sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5
        assert pipeline.scheduler.config.prediction_type == "velocity"
        assert pipeline.transformer.config.num_classes == 5
        assert pipeline.transformer.null_class == 5

    def test_agree_in_float64_up_to_float32_frequencies(self, tmp_path, images):
        weights = sit_weights()
        pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, weights, *TINY))
        pipeline.transformer.double()
        with torch.no_grad():
            output = pipeline.field().predict(images, TIMES.double(), TOLD)
        assert distance(output, -sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 2e-7

    @pytest.mark.parametrize(
        ("prediction", "ours"), [("score", "score"), ("noise", "epsilon"), ("velocity", "velocity")]
    )
    @pytest.mark.parametrize(("path", "interpolant"), [("Linear", "linear"), ("GVP", "trigonometric"), ("VP", "vp")])
    def test_of_every_prediction_and_path(self, tmp_path, images, path, interpolant, prediction, ours):
        weights = sit_weights()
        out = convert(tmp_path, saved_by_sit(weights, path_type=path, prediction=prediction, num_classes=5), *TINY)
        pipeline = InterpolantPipeline.from_pretrained(out)
        config = pipeline.scheduler.config
        assert (config.interpolant, config.prediction_type) == (interpolant, ours)
        with torch.no_grad():
            output = pipeline.field().predict(images.float(), TIMES, TOLD)
        sign = -1 if prediction == "velocity" else 1  # a derivative in t changes its sign, noise and score do not
        assert distance(output, sign * sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5

    def test_of_repa_keep_their_time_and_sign(self, tmp_path, images, capsys):
        weights = sit_weights(learn_sigma=False)
        arguments = dict(path_type="cosine", prediction="v", num_classes=5, proj_coeff=0.5)
        out = convert(tmp_path, saved_by_sit(with_projectors(weights), **arguments), *TINY)
        pipeline = InterpolantPipeline.from_pretrained(out)
        with torch.no_grad():
            output = pipeline.field().predict(images.float(), TIMES, TOLD)
        assert distance(output, sit_output(weights, images, TIMES, LABELS)) < 1e-5
        assert pipeline.scheduler.config.interpolant == "trigonometric"
        printed = capsys.readouterr().out
        assert "REPA teacher" in printed
        assert "3 tensors: projectors" in printed

    def test_of_repa_without_projectors_need_the_kind(self, tmp_path, images):
        weights = sit_weights(learn_sigma=False)
        with pytest.raises(InputError, match=r"SiT's or REPA's, which run time in opposite directions.*--kind"):
            convert(tmp_path, weights, *TINY)
        network = InterpolantPipeline.from_pretrained(convert(tmp_path, weights, *TINY, "--kind", "repa")).transformer
        with torch.no_grad():
            output = network(images.float(), TIMES, LABELS).sample
        assert distance(output, sit_output(weights, images, TIMES, LABELS)) < 1e-5

    def test_of_repas_first_checkpoints(self, tmp_path, images):
        weights = sit_weights(learn_sigma=False)
        renamed = {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in weights.items()}
        network = InterpolantPipeline.from_pretrained(convert(tmp_path, with_projectors(renamed), *TINY)).transformer
        with torch.no_grad():
            output = network(images.float(), TIMES, LABELS).sample
        assert distance(output, sit_output(weights, images, TIMES, LABELS)) < 1e-5


@pytest.mark.parametrize(
    ("which", "chosen"), [([], "ema"), (["--which", "model"], "model"), (["--which", "ema"], "ema")]
)
def test_averages_are_preferred_and_others_can_be_chosen(tmp_path, images, which, chosen):
    content = saved_by_sit(sit_weights(seed=1))
    content["model"] = sit_weights(seed=2)
    content["model"] = {f"module.{name}": tensor for name, tensor in content["model"].items()}  # of a distributed run
    pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, content, *TINY, *which))
    weights = sit_weights(seed=1 if chosen == "ema" else 2)
    with torch.no_grad():
        output = pipeline.field().predict(images.float(), TIMES, TOLD)
    assert distance(output, -sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5


def test_vp_in_sits_formula_is_ours_with_time_reversed():
    """SiT integrates dx/ds = ½ b(s) (x + score) from noise at s = 0, with b(s) = 0.1 + (1 − s) 19.9; here t = 1 − s."""
    generator = torch.Generator().manual_seed(0)
    x, score = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    b = 0.1 + t * 19.9
    velocity = get_interpolant("vp", b0=0.1, b1=20.0).convert(score, x, t, "score", "velocity")
    torch.testing.assert_close(velocity, -0.5 * b[:, None] * (x + score), rtol=1e-9, atol=1e-9)


def test_a_network_without_a_null_class(tmp_path):
    out = convert(tmp_path, sit_weights(), *TINY, "--num_classes", 6)
    network = InterpolantPipeline.from_pretrained(out).transformer
    assert (network.config.num_classes, network.null_class) == (6, None)


WRAPPED = {
    "torch.compile": lambda w: {"ema": {f"_orig_mod.{name}": value for name, value in w.items()}},
    "torch.compile of a distributed network": lambda w: {
        f"module._orig_mod.{name}": value for name, value in w.items()
    },
    "AveragedModel": lambda w: {
        "n_averaged": torch.tensor(7),
        **{f"module.{name}": value for name, value in w.items()},
    },
    "Lightning": lambda w: {"state_dict": {f"model.{name}": value for name, value in w.items()}, "epoch": 3},
    "Lightning with an average": lambda w: {
        "state_dict": {
            **{f"ema_model._orig_mod.{name}": value for name, value in w.items()},
            **{f"model.{name}": torch.zeros_like(value) for name, value in w.items()},
            "loss.scale": torch.ones(1),
        },
        "hyper_parameters": {"lr": 1e-4},
    },
}


class TestWrappers:
    @pytest.mark.parametrize("wrapper", WRAPPED)
    def test_are_taken_off(self, tmp_path, images, wrapper):
        weights = sit_weights()
        pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, WRAPPED[wrapper](weights), *TINY))
        with torch.no_grad():
            output = pipeline.field().predict(images.float(), TIMES, TOLD)
        assert distance(output, -sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_of_other_precision(self, tmp_path, images, dtype):
        weights = {name: value.to(dtype) for name, value in sit_weights().items()}
        pipeline = InterpolantPipeline.from_pretrained(convert(tmp_path, weights, *TINY))
        with torch.no_grad():
            output = pipeline.field().predict(images.float(), TIMES, TOLD)
        weights["pos_embed"] = sit_weights()["pos_embed"]
        assert distance(output, -sit_output(weights, images, 1 - TIMES.double(), LABELS)) < 1e-5


class TestArguments:
    """What a training script was told, in the forms that people save it in."""

    @pytest.mark.parametrize(
        "saved",
        [
            {"args": {"path_type": "GVP", "prediction": "score"}},
            {"args": {"transport": {"path_type": "GVP", "prediction": "score"}, "lr": 1e-4}},
            {"hyper_parameters": {"path_type": "GVP", "prediction": "score"}},
            {"args": {"transport": {"params": {"path_type": "GVP", "prediction": "score"}}}},
            {"args": {}, "config": {"path_type": "GVP", "prediction": "score"}},
            {"hyper_parameters": {"args": argparse.Namespace(path_type="GVP", prediction="score")}},
            {"training_args": {"path_type": "GVP", "prediction": "score"}},
        ],
    )
    def test_are_read(self, tmp_path, saved):
        config = InterpolantPipeline.from_pretrained(
            convert(tmp_path, {"ema": sit_weights(), **saved}, *TINY)
        ).scheduler.config
        assert (config.interpolant, config.prediction_type) == ("trigonometric", "score")

    def test_that_do_not_say_the_direction(self, tmp_path):
        content = {"ema": sit_weights(learn_sigma=False), "config": {"lr": 1e-4}}
        with pytest.raises(InputError, match="run time in opposite directions"):
            convert(tmp_path, content, *TINY)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            ({"args": ["--path-type", "GVP"]}, "arguments saved in the checkpoint are a list"),
            ({"args": {"num_classes": "many"}}, "says that it has 'many' classes: give --num_classes"),
            (
                {"args": {"path_type": "GVP"}, "cfg": {"path_type": "Linear"}},
                "says of its `path_type` both 'GVP' and 'Linear'",
            ),
            ({"args": {"path_type": ["GVP"]}}, "trained with .'GVP'., which is not known here"),
        ],
    )
    def test_that_are_something_else(self, tmp_path, saved, message):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, {"ema": sit_weights(), **saved}, *TINY)


class TestRefusals:
    """Nothing is written, and the text names tensors and shapes."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    def changed(self, **tensors):
        weights = sit_weights()
        for name, tensor in tensors.items():
            name = name.replace("__", ".")
            weights.pop(name, None)
            if tensor is not None:
                weights[name] = tensor
        return weights

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"blocks__1__mlp__fc2__bias": None}, r"1 missing: blocks\.1\.mlp\.fc2\.bias \(24,\)"),
            ({"blocks__0__attn__q_norm__weight": torch.ones(8)}, r"1 not part of it: blocks\.0\.attn\.q_norm"),
            (
                {"blocks__0__attn__proj__weight": torch.ones(24, 12)},
                r"1 of another shape: blocks\.0\.attn\.proj\.weight is \(24, 12\) instead of \(24, 24\)",
            ),
            ({"final_layer__linear__weight": torch.ones(20, 24)}, r"final_layer\.linear\.weight is \(20, 24\)"),
            ({"x_embedder__proj__weight": torch.ones(24, 4)}, r"x_embedder\.proj\.weight with 4 axes is \(24, 4\)"),
            ({"final_layer__linear__weight": None}, r"final_layer\.linear\.weight with 2 axes is missing"),
            ({"pos_embed": torch.zeros(1, 16, 24)}, r"pos_embed \(1, 16, 24\) is not the fixed sine-cosine embedding"),
            ({"pos_embed": torch.full((1, 16, 24), float("nan"))}, r"differs by up to nan"),
            ({"pos_embed": torch.zeros(1, 15, 24)}, r"15 patches of 2×2 make no square image"),
            (
                {"blocks__0__mlp__fc1__bias": torch.zeros(96).to(torch.float8_e5m2)},
                r"1 of a type that is not read: blocks\.0\.mlp\.fc1\.bias is float8_e5m2",
            ),
            ({"blocks__0__mlp__fc1__bias": torch.zeros(96, dtype=torch.complex64)}, "fc1.bias is complex64"),
            (
                {"y_embedder__embedding_table__weight": torch.full((6, 24), float("inf"))},
                "1 tensors are not finite: y_emb",
            ),
            ({"pos_embed": None}, r"no pos_embed .* give --sample_size"),
        ],
    )
    def test_of_tensors_that_are_not_sits(self, tmp_path, tensors, message):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, self.changed(**tensors), *TINY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), r"2 blocks of width 24 are no published size.*--num_attention_heads"),
            (("--num_attention_heads", 5), "`num_attention_heads` 5 does not divide the width 24"),
            (
                ("--preset", "SiT-XL/2"),
                r"SiT-XL/2, with 28 blocks, width 1152.*has 2 blocks and x_embedder.*\(24, 4, 2, 2\)",
            ),
            (("--preset", "SiT-M/2"), "Unknown `preset` 'SiT-M/2'. Choose one of: SiT-S/2"),
            (
                (*TINY, "--sample_size", 64),
                r"pos_embed is \(1, 16, 24\): 16 patches of 2×2 make an image of 8×8, not",
            ),
            (
                (*TINY, "--num_classes", 10),
                r"embedding_table\.weight is \(6, 24\): it has 6 rows, which are not 10 classes",
            ),
            ((*TINY, "--which", "ema"), "no 'ema'. It is a state dictionary itself"),
            (
                (*TINY, "--ema_decay", 0.9),
                "`ema_decay` is 0.9, but there are no averages. It is a state dictionary itself",
            ),
            ((*TINY, "--kind", "torchcfm"), "taken for torchcfm's UNet, but it has 0 input_blocks"),
        ],
    )
    def test_of_settings_that_contradict_the_checkpoint(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, sit_weights(), *options)

    def test_of_settings_that_contradict_its_arguments(self, tmp_path):
        content = saved_by_sit(sit_weights(), path_type="GVP", prediction="noise")
        with pytest.raises(
            InputError, match="`interpolant` is vp, but the checkpoint was trained with GVP, which is trig"
        ):
            convert(tmp_path, content, *TINY, "--interpolant", "vp")
        with pytest.raises(InputError, match="`prediction_type` is score, but the checkpoint was trained with noise"):
            convert(tmp_path, content, *TINY, "--prediction_type", "score")
        content = saved_by_sit(sit_weights(), path_type="Spiral")
        with pytest.raises(InputError, match=r"trained with 'Spiral', which is not known here.*--interpolant"):
            convert(tmp_path, content, *TINY)

    def test_of_a_direction_that_would_be_wrong(self, tmp_path):
        with pytest.raises(InputError, match="`kind` is sit, but the checkpoint has REPA's projectors"):
            convert(tmp_path, with_projectors(sit_weights()), *TINY, "--kind", "sit")

    def test_of_the_students_of_si_adistill(self, tmp_path):
        weights = sit_weights()
        content = {"student": weights, "critic": weights, "cfg_scale": 1.5, "step": 1000}
        with pytest.raises(InputError, match=r"one-step student of si-adistill.*raw velocity is the image"):
            convert(tmp_path, content)
