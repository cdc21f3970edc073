"""Runs precompute_texts.py and dies by SIGKILL while its second shard is written.

    python kill_in_shard.py [arguments of the script]

Only safetensors' call is intercepted, to hit the moment; the code that encodes and writes is the real one.
"""

import os
import signal
import sys

from si_distill.commands.precompute_texts import main
from si_distill.text_to_image import text_cache

save, files = text_cache.save, []


def dying_save(tensors, metadata):
    files.append(save(tensors, metadata))
    if len(files) == 2:
        partial = os.path.join(sys.argv[sys.argv.index("--texts_dir") + 1], "texts_00001.safetensors.tmp")
        with open(partial, "wb") as file:
            file.write(files[-1][: len(files[-1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return files[-1]


text_cache.save = dying_save
main(sys.argv[1:])
