"""Ranks that play trainings one after the other, without a launcher and with one import of the libraries for all.

    python ranks.py PLAN.json

PLAN is a list of groups of processes, {"ranks": number, "copies": [[from, to], …], "trainings": […]}, each training
{"script", "arguments", "sharded", "port", "die": [step, moment] or null}. Before a group starts, its copies are made without
their newest checkpoint. Beside the plan are left, for group G and rank R: `G.pids`, `G.codes` (exit codes), `G.R.log`, and
`G.R.errors`, for each training but the last the error that ended it, or null. The last one ends as the script does.

Accelerate shards on accelerators only. Here it is told that this is such a training, with the settings of
configs/accelerate/fsdp2.yaml; the code that shards, trains, saves and samples is the real one. `die` intercepts the
operating system's rename or the writing of shards, to be killed inside a save.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
import traceback
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
from si_distill.training.parallel import accelerator as acceleration

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


def play(trainings: list[dict], rank: int, errors_file: Path) -> None:
    errors: list[str | None] = []
    for training in trainings:
        os.environ["MASTER_PORT"] = str(training["port"])  # a rank must not meet the training before
        acceleration.Accelerator = ShardingAccelerator if training["sharded"] else accelerate.Accelerator
        if training["die"] and rank == 0:
            die_in_save(*training["die"])
        if training is trainings[-1]:
            errors_file.write_text(json.dumps(errors))
            sys.argv[1:] = training["arguments"]
            script_main(script(training["script"]))
            return
        try:
            script(training["script"])(training["arguments"])
            errors.append(None)
        except InputError as error:
            errors.append(str(error))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def be_rank(group: dict, rank: int, beside: str) -> None:
    """The life of a child; does not return."""
    log = os.open(f"{beside}.{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group["ranks"], "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        play(group["trainings"], rank, Path(f"{beside}.{rank}.errors"))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


plan = Path(sys.argv[1])
for number, group in enumerate(json.loads(plan.read_text())):
    beside = str(plan.parent / str(number))
    for source, target in group["copies"]:
        shutil.copytree(source, target)
        shutil.rmtree(max((Path(target) / "checkpoints").iterdir()))
    pids = [os.fork() or be_rank(group, rank, beside) for rank in range(group["ranks"])]
    Path(f"{beside}.pids").write_text(json.dumps(pids))
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == -signal.SIGKILL:  # the others would wait for it
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    Path(f"{beside}.codes").write_text(json.dumps([codes[pid] for pid in pids]))
