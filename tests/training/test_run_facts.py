"""What a run notes for its model card, over a resume; and that a publication is thought of before the training."""

import json

import pytest
from accelerate.state import AcceleratorState, GradientState

from si_distill.errors import InputError, PublishError
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.distillation.trainer import DistillationTrainer
from si_distill.training.teacher import TeacherTrainer

SMALL = "--per_device_train_batch_size 4 --logging_steps 1 --eval_steps 1000 --save_steps 2".split()


def distillation(teacher, folder, *arguments) -> DistillationTrainer:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    argv = ["--teacher", teacher, "--output_dir", folder, *SMALL, *arguments]
    return DistillationTrainer(parse_settings(DistillConfig, list(map(str, argv))))


def test_facts_and_card_of_a_run_survive_a_resume(teacher_folder, tmp_path):
    folder = tmp_path / "student"
    objective = ["--objective", "realuid"]
    distillation(teacher_folder, folder, *objective, "--max_steps", 3).train()
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["data"] == {
        "source": "local", "name": "sklearn-digits", "split": "train", "images": 1797, "classes": 10, "size": 8,
    }  # fmt: skip
    assert (facts["teacher"]["name"], facts["teacher"]["source"]) == (str(teacher_folder), "local")
    assert facts["teacher"]["network"] == facts["network"]
    assert [session["first_step"] for session in facts["sessions"]] == [0]
    assert "| Images seen | 12 |" in (folder / "README.md").read_text()

    # Twice from step 2, as after two kills: the first of the two resumed sessions repeats nothing that stays.
    (folder / "checkpoints" / "step_00000003" / "manifest.json").unlink()
    for _ in range(2):
        distillation(
            teacher_folder, folder, *objective, "--max_steps", 4,
            "--resume_from_checkpoint", folder / "checkpoints" / "step_00000002",
        ).train()  # fmt: skip
    facts = json.loads((folder / "facts.json").read_text())
    assert [session["first_step"] for session in facts["sessions"]] == [0, 2]
    card = (folder / "README.md").read_text()
    assert "| Images seen | 16 |" in card
    assert "| Resumed | 1 times |" in card
    assert "sklearn-digits, split train, 1797 images" in card

    distillation(teacher_folder, folder, "--max_steps", 1, "--overwrite_output_dir").train()
    facts = json.loads((folder / "facts.json").read_text())
    assert len(facts["sessions"]) == 1
    assert facts["data"] is None  # `sid` reads no images
    assert "| Data | no images: generated samples only |" in (folder / "README.md").read_text()


def test_a_publication_that_cannot_work_is_refused_before_training(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = tmp_path / "student"
    with pytest.raises(InputError, match="`hub_model_id` is not"):
        distillation(teacher_folder, folder, "--push_to_hub")
    with pytest.raises(InputError, match="does not say whose it is"):
        distillation(teacher_folder, folder, "--push_to_hub", "--hub_model_id", "student")
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    argv = ["--output_dir", str(folder), *SMALL, "--push_to_hub", "--hub_model_id", "user/teacher"]
    with pytest.raises(PublishError, match="no connection"):  # conftest sets HF_HUB_OFFLINE
        TeacherTrainer(parse_settings(TeacherConfig, argv))
    assert not folder.exists()
