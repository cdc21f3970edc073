"""A text-to-image student on a double of the Hub: published as a LoRA, then merged, and loaded by its name."""

import pytest
from exported_students import save_student
from hub_double import Hub
from test_publishing import in_process

SCRIPT = """
import sys
import torch
from si_distill.commands.publish import main
from si_distill.errors import InputError
from si_distill.text_to_image.student import is_text_student, load_student

run, base = sys.argv[1:]

def image(student):
    return student.images(["two boats"], 4, [torch.Generator().manual_seed(0)])[0]

def publish(*arguments):
    main(["--pipeline", run, "--repo-id", "user/turbo", "--prompts", "two boats", *arguments])

assert not is_text_student("user/turbo")
expected = image(load_student(run))
publish("--teacher-repo-id", "user/base")
assert is_text_student("user/turbo")
lora = load_student("user/turbo", base=base)
assert lora.record["base"] == "user/base" and lora.record["lora_rank"] == 4
assert image(lora).tobytes() == expected.tobytes()
try:
    load_student("user/turbo")
    raise SystemExit("there is no user/base")
except InputError as error:
    assert "an adapter of the SanaPipeline 'user/base', which cannot be loaded" in str(error), error
publish("--merged")
merged = load_student("user/turbo")
assert merged.record["lora_rank"] is None
difference = [abs(a - b) for a, b in zip(image(merged).tobytes(), expected.tobytes(), strict=True)]
assert max(difference) <= 1, max(difference)
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def test_a_student_is_published_as_a_lora_and_then_merged(hub, tmp_path):
    run = save_student(tmp_path, "sana", "student")
    done = in_process(hub, tmp_path, "-c", SCRIPT, run, tmp_path / "sana")
    assert done.returncode == 0, done.stderr
    files = hub.files("user/turbo")
    assert {"README.md", "student.json", "model_index.json", "images/0.png"} <= files.keys()
    assert "pytorch_lora_weights.safetensors" not in files  # of the first publication
    assert len(hub.commits("user/turbo")) == 3
