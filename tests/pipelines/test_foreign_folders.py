"""Pipeline folders that somebody else filled: damaged weights, strange types, garbage in configs."""

import json

import pytest
import torch
from helpers import tiny_sit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.autoencoders import describe_vae, load_vae
from si_distill.conversion.diffusers_teachers import saved_class
from si_distill.errors import InputError
from si_distill.loading import load_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "student"
    OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value * torch.nan, "are damaged: 1 tensors hold values that are not finite"),
        (lambda value: value + torch.inf, "are damaged: 1 tensors"),
        (
            lambda value: value.to(torch.float8_e4m3fn),
            "hold 1 tensors of a type that networks are not run in: .* is F8_E4M3",
        ),
        (lambda value: value.to(torch.complex64), "hold 1 tensors of a type that networks are not run in"),
        (lambda value: value.to(torch.int8), "hold 1 tensors of a type that networks are not run in: .* is I8"),
    ],
    ids=["nan", "infinite", "float8", "complex", "integer"],
)
def test_weights_that_no_network_can_have_are_refused(folder, change, words):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("proj_out.weight"))
    save_file({**tensors, name: change(tensors[name])}, folder / WEIGHTS)
    try:
        with pytest.raises(InputError, match=words):
            load_pipeline(OneStepInterpolantPipeline, "student", str(folder))
    finally:
        save_file(tensors, folder / WEIGHTS)


def test_pictures_of_values_that_are_not_finite_are_refused():
    network = tiny_sit(num_classes=0)
    torch.nn.init.constant_(network.proj_out.bias, 3e38)
    torch.nn.init.constant_(network.proj_out.weight, 3e38)
    pipeline = OneStepInterpolantPipeline(network, StochasticInterpolantScheduler())
    with pytest.raises(ValueError, match=r"2 of 2 images hold values that are not finite: the weights are damaged"):
        pipeline(batch_size=2)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"patch_size": 0}, "sizes are 1 to 65,536"),
        ("transformer/config.json", {"patch_size": "4"}, "`patch_size` must be a whole number, got '4'"),
        ("transformer/config.json", {"sample_size": None}, "`sample_size` must be a whole number, got None"),
        ("transformer/config.json", {"num_classes": 3.0}, "`num_classes` must be a whole number, got 3.0"),
        ("transformer/config.json", {"num_layers": 10**9}, "layers 0 to 1,000"),
        ("transformer/config.json", {"attention_head_dim": 10**12}, "which is too large"),
        ("transformer/config.json", {"timestep_scale": float("nan")}, "`timestep_scale` is nan"),
        ("transformer/config.json", [], "transformer/config.json: it must be a mapping"),
        ("scheduler/scheduler_config.json", {"interpolant": ["linear"]}, "`interpolant` must be text"),
        ("scheduler/scheduler_config.json", {"init_time": True}, "`init_time` must be a number"),
        ("scheduler/scheduler_config.json", {"interpolant": None}, "`interpolant` must be text"),
        ("model_index.json", {"id2label": ["a"]}, "`id2label` must be a mapping"),
        ("model_index.json", {"vae_pixel_min": 0.5}, "`vae_pixel_min` is the darkest pixel"),
        ("model_index.json", {"transformer": "SiT"}, "must be the pair .library, class. of a component"),
        ("model_index.json", {"_class_name": {"a": 1}}, "it was saved as"),
    ],
)
def test_configs_of_other_types_are_named(folder, file, changes, words):
    whole = (folder / file).read_text()
    content = {**json.loads(whole), **changes} if isinstance(changes, dict) else changes
    (folder / file).write_text(json.dumps(content))
    try:
        with pytest.raises(InputError, match=words):
            load_pipeline(OneStepInterpolantPipeline, "student", str(folder))
    finally:
        (folder / file).write_text(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_in_a_config_is_a_sentence_or_a_pipeline(folder, data):
    file = folder / data.draw(
        st.sampled_from(["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
    )
    whole = file.read_text()
    content = json.loads(whole)
    key = data.draw(st.sampled_from([None, *content]))
    value = data.draw(JSON)
    file.write_text(json.dumps(value if key is None else {**content, key: value}))
    try:
        assert isinstance(saved_class(str(folder)), (str, type(None)))
        for read in (
            lambda: load_pipeline(OneStepInterpolantPipeline, "student", str(folder)),
            lambda: load_vae(str(folder)),
            lambda: describe_vae(str(folder)),
        ):
            try:
                read()
            except InputError as error:
                assert str(folder) in str(error)  # noqa: PT017
    finally:
        file.write_text(whole)


def test_one_file_of_weights_replaces_an_earlier_saves_shards(tmp_path):
    pipeline = OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler())
    pipeline.save_pretrained(tmp_path, max_shard_size=10_000)
    assert list((tmp_path / "transformer").glob("*.index.json"))
    pipeline.save_pretrained(tmp_path)
    loaded = OneStepInterpolantPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pipeline.transformer.state_dict().items())
    pipeline.save_pretrained(tmp_path, max_shard_size=10_000)
    OneStepInterpolantPipeline.from_pretrained(tmp_path)
