"""One rank of several that play a list of trainings one after the other, without a launcher.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… LOCAL_RANK=… python ranks.py PLAN.json

PLAN is a list of {"script", "arguments", "sharded", "port", "die": [step, moment] or null}. Each rank writes
PLAN.rank.json: for each training the error that ended it, or null. The last one runs as the script does, with its exit code.

Accelerate shards on accelerators only. Here it is told that this is such a training, with the settings of
configs/accelerate/fsdp2.yaml; the code that shards, trains, saves and samples is the real one. `die` intercepts the
operating system's rename or the writing of shards, to be killed inside a save.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import accelerate
import accelerate.utils.fsdp_utils
import torch.distributed.checkpoint as distributed_checkpoint
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from si_distill.errors import InputError
from si_distill.settings import script_main
from si_distill.training import acceleration

ROOT = Path(__file__).parent.parent.parent
CONFIG = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]


class ShardingAccelerator(accelerate.Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        os.environ.update({name.upper(): str(value) for name, value in CONFIG.items()})  # as `accelerate launch` does
        for state in (self.state, PartialState()):  # as `AcceleratorState` does where there are GPUs
            state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def die_in_save(step: int, moment: str) -> None:
    folder, rename, save = f"step_{step:08d}.tmp", os.rename, distributed_checkpoint.save

    def dying_rename(source, target, **kwargs):
        if moment == "renaming" and str(source).endswith(folder):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **kwargs)

    def dying_save(state_dict, storage_writer, **kwargs):
        if moment == "writing" and folder in str(storage_writer.path) and "optimizer" in state_dict:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(state_dict=state_dict, storage_writer=storage_writer, **kwargs)

    os.rename, distributed_checkpoint.save = dying_rename, dying_save


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


plan = Path(sys.argv[1])
entries = json.loads(plan.read_text())
errors = []
for number, entry in enumerate(entries):
    os.environ["MASTER_PORT"] = str(entry["port"])  # a rank must not meet the training before
    acceleration.Accelerator = ShardingAccelerator if entry["sharded"] else accelerate.Accelerator
    if entry["die"] and os.environ["RANK"] == "0":
        die_in_save(*entry["die"])
    if number == len(entries) - 1:
        plan.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(errors))
        sys.argv[1:] = entry["arguments"]
        script_main(script(entry["script"]))
        break
    try:
        script(entry["script"])(entry["arguments"])
        errors.append(None)
    except InputError as error:
        errors.append(str(error))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
