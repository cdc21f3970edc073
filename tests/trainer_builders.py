"""Trainers in this process, of a size that tests can afford."""

from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.distillation.trainer import DistillationTrainer
from si_distill.training.teacher import TeacherTrainer

SMALL = "--per_device_train_batch_size 4 --logging_steps 1 --eval_steps 1000 --save_steps 1000".split()


def distillation(teacher, folder, *arguments) -> DistillationTrainer:
    argv = ["--teacher", teacher, "--output_dir", folder, *SMALL, *arguments]
    return DistillationTrainer(parse_settings(DistillConfig, list(map(str, argv))))


def teaching(folder, *arguments) -> TeacherTrainer:
    model = ["--model", "{patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8}"]
    argv = ["--output_dir", folder, *SMALL, *model, *arguments]
    return TeacherTrainer(parse_settings(TeacherConfig, list(map(str, argv))))
