"""Runs precompute_latents.py and dies by SIGKILL while its second shard is written.

    python kill_in_shard.py [arguments of the script]

Only safetensors' call is intercepted, to hit the moment; the code that encodes and writes is the real one.
"""

import os
import signal
import sys

from si_distill.data.latents import format as latents_format
from si_distill.data.latents.config import LatentsConfig
from si_distill.data.latents.encoding import precompute_latents
from si_distill.settings import parse_settings

save, files = latents_format.save, []


def dying_save(tensors, metadata):
    files.append(save(tensors, metadata))
    if len(files) == 2:
        partial = os.path.join(settings.output_dir, "shard_00001-00000.safetensors.tmp")
        with open(partial, "wb") as file:
            file.write(files[-1][: len(files[-1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return files[-1]


latents_format.save = dying_save
settings = parse_settings(LatentsConfig, sys.argv[1:])
precompute_latents(settings)
