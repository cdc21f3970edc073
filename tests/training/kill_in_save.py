"""Runs train_distill.py and dies by SIGKILL inside the save of a given step.

    python kill_in_save.py STEP MOMENT [arguments of the script]

MOMENT is `writing` (tensors are half written) or `renaming` (everything is written, the folder has not its name yet).
Only the operating system's calls are intercepted, to hit the moment; the code that saves is the real one.
"""

import os
import signal
import sys

import accelerate.utils.other

from si_distill.settings import parse_settings
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.distillation.trainer import DistillationTrainer

step, moment, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
folder = f"step_{step:08d}.tmp"
rename, save_file = os.rename, accelerate.utils.other.safe_save_file


def dying_rename(source, target, **kwargs):
    if moment == "renaming" and str(source).endswith(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, **kwargs)


def dying_save_file(tensors, filename, *args, **kwargs):
    save_file(tensors, filename, *args, **kwargs)
    if moment == "writing" and folder in str(filename):
        os.truncate(filename, os.path.getsize(filename) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


os.rename = dying_rename
accelerate.utils.other.safe_save_file = dying_save_file
DistillationTrainer(parse_settings(DistillConfig, arguments)).train()
