"""Whatever a checkpoint holds, it becomes a teacher whose images are finite, or a sentence and no folder."""

import tempfile
from pathlib import Path

import torch
from conversion_runs import convert
from foreign_sit import HEADS, sit_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from si_distill import InterpolantPipeline
from si_distill.errors import InputError

NAMES = sorted(sit_weights())
NUMBERS = st.integers(-2, 70) | st.floats() | st.none() | st.text(max_size=3) | st.booleans()
#: What happens to a tensor of the checkpoint.
DAMAGES = {
    "left out": lambda value: None,
    "flat": lambda value: value.flatten(),
    "empty": lambda value: value[:0],
    "longer": lambda value: torch.cat([value, value]),
    "integers": lambda value: value.to(torch.int64),
    "half": lambda value: value.half(),
    "complex": lambda value: value.to(torch.complex64),
    "not finite": lambda value: torch.full_like(value, torch.inf),
    "a list": lambda value: [1.0],
    "a scalar": lambda value: torch.tensor(1.0),
}


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(sorted(DAMAGES))), max_size=2),
    st.dictionaries(st.sampled_from(["path_type", "prediction", "num_classes", "proj_coeff"]), NUMBERS, max_size=2),
    st.sampled_from(["", "module.", "_orig_mod.", "net."]),
    st.sampled_from([None, "ema", "state_dict", "model", "weights"]),
    st.lists(
        st.sampled_from(
            ["--kind sit", "--kind edm", "--num_classes 5", "--num_classes 99", "--sample_size 7", "--which x"]
        ),
        max_size=2,
        unique=True,
    ),
)
@settings(max_examples=40, deadline=None)
def test_is_a_teacher_or_a_sentence(damages, arguments, prefix, place, options):
    weights = {prefix + name: value for name, value in sit_weights().items()}
    for name, damage in damages:
        value = weights.get(prefix + name)
        weights[prefix + name] = DAMAGES[damage](value) if torch.is_tensor(value) else value
    weights = {name: value for name, value in weights.items() if value is not None}
    content = weights if place is None else {place: weights, "args": arguments}
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = convert(Path(folder), content, "--num_attention_heads", HEADS, *" ".join(options).split())
        except InputError as error:
            assert len(str(error)) > 20  # noqa: PT017
            assert not (Path(folder) / "converted").exists()
        else:
            pipe = InterpolantPipeline.from_pretrained(out)
            pipe.set_progress_bar_config(disable=True)
            assert pipe([0], num_inference_steps=1, output_type="latent").images.isfinite().all()
