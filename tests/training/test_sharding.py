"""What sharding, compiling and checkpointing do to a network, in this process: a group of one rank."""

import copy
import os
import subprocess

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import tiny_edm2, tiny_sit
from script_runs import DISTILL, ROOT
from trainer_builders import distillation, teaching

from si_distill import Condition
from si_distill.critic import CriticNetwork
from si_distill.errors import InputError
from si_distill.log_variance import LogVariance
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.parallel.accelerator import build_accelerator
from si_distill.training.parallel.sharding import average_replicated, clip_grad_norm, plain_class, shard, whole_network


@pytest.fixture
def sharding(tmp_path):
    """Makes accelerators that shard, as `Accelerator` does where there are several GPUs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def build(mixed_precision: str = "no") -> Accelerator:
        accelerator = Accelerator(mixed_precision=mixed_precision)
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        return accelerator

    yield build
    torch.distributed.destroy_process_group()


def test_blocks_compute_in_bfloat16_and_times_losses_and_gradients_stay_in_float32(sharding):
    accelerator = sharding("bf16")
    network = CriticNetwork(tiny_sit(), "head", log_variance=LogVariance())
    shard(accelerator, network)
    seen = {}
    sit = network.network
    sit.time_proj.register_forward_pre_hook(lambda module, args: seen.update(time=args[0]))
    sit.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda module, args, output: seen.update(weight=module.weight.dtype, output=output.dtype)
    )
    t = torch.tensor([0.9990, 0.0011])
    with accelerator.autocast():
        prediction, logits, log_variance = network(torch.randn(2, 1, 8, 8), t, Condition(torch.tensor([0, 2])))
    assert torch.equal(seen["time"], t)  # in bfloat16 0.9990 is 1
    assert (seen["weight"], seen["output"]) == (torch.bfloat16, torch.bfloat16)
    assert (logits.dtype, log_variance.dtype) == (torch.float32, torch.float32)
    (prediction.float().square().mean() + logits.mean() + log_variance.mean()).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("limit", [0.7, 1e6])
def test_gradients_of_parameters_with_and_without_dimensions_are_clipped_together(sharding, limit):
    whole = tiny_edm2()
    network = shard(sharding(), copy.deepcopy(whole))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in whole.parameters()]
    for plain, cut, gradient in zip(whole.parameters(), network.parameters(), gradients, strict=True):
        plain.grad = gradient.clone()
        cut.grad = gradient.clone() if cut.ndim == 0 else cut.detach().clone()
        if cut.ndim:
            cut.grad.to_local().copy_(gradient)
    accelerator = Accelerator()
    parameters = list(network.parameters())
    average_replicated(accelerator, parameters)
    norm = clip_grad_norm(accelerator, parameters, limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), limit))
    for plain, cut in zip(whole.parameters(), parameters, strict=True):
        found = cut.grad if cut.ndim == 0 else cut.grad.full_tensor()
        torch.testing.assert_close(found, plain.grad)


def test_a_sharded_network_comes_together_as_its_own_class(sharding):
    accelerator = sharding()
    for original in (tiny_sit(), tiny_edm2()):
        network = shard(accelerator, copy.deepcopy(original))
        assert plain_class(network) is type(original)
        whole = whole_network(accelerator, network)
        assert type(whole) is type(original)
        expected = original.state_dict()
        assert whole.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsdp_version": 1, "sharding_strategy": "FULL_SHARD"}, "fsdp_version: 1.*set 2"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "all ranks read from the same file"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "--gradient_checkpointing"),
        ({"fsdp_version": 2, "cpu_offload": True}, "parameters stay on the GPUs"),
        ({"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}, "set SHARDED_STATE_DICT"),
    ],
)
def test_other_ways_to_shard_are_refused(sharding, monkeypatch, changes, words):
    monkeypatch.setitem(os.environ, "FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    sharding().state.fsdp_plugin = FullyShardedDataParallelPlugin(**changes)
    with pytest.raises(InputError, match=words):
        build_accelerator(TeacherConfig(output_dir="run"))


def test_another_library_for_sharding_is_refused(sharding):
    sharding()
    PartialState().distributed_type = DistributedType.MEGATRON_LM
    with pytest.raises(InputError, match="distillation couples three"):
        build_accelerator(TeacherConfig(output_dir="run"))


def test_gradient_checkpointing_keeps_every_bit(teacher_folder, tmp_path):
    found = {}
    for kept in ("true", "false"):
        trainer = distillation(
            teacher_folder, tmp_path / kept, *DISTILL, "--objective", "cross_term", "--gradient_checkpointing", kept
        )
        calls = []
        for network in (trainer.critic.unwrapped.network, trainer.generator.unwrapped):
            network.transformer_blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        metrics, _ = trainer.iteration()
        found[kept] = {name: value.item() for name, value in metrics.items()}, len(calls)
    assert found["true"][0] == found["false"][0]
    # Two critic updates, and the generator's update through both networks, run their blocks a second time.
    assert (found["true"][1], found["false"][1]) == (8, 4)


@pytest.mark.slow  # C++ compilers take their time
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-2)])
def test_compiled_blocks_give_the_same_numbers_and_names(teacher_folder, tmp_path, precision, tolerance):
    results = {}
    for compiled in ("true", "false"):
        trainer = teaching(tmp_path / compiled, "--compile", compiled, "--seed", 4, "--mixed_precision", precision)
        metrics, _ = trainer.iteration()
        results[compiled] = metrics["loss"].item(), list(trainer.trained.unwrapped.state_dict())
    assert results["true"][0] == pytest.approx(results["false"][0], rel=tolerance)
    assert results["true"][1] == results["false"][1]


def test_a_missing_compiler_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"torch cannot compile for cpu here.*g\+\+"):
        teaching(tmp_path / "run", "--compile", "true")
    assert not (tmp_path / "run").exists()


def test_the_slurm_script_starts_ranks_that_know_each_other(tmp_path):
    """The real script with Slurm's commands replaced by ones that say what they were given."""
    script = ROOT / "docs" / "slurm" / "distill.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    commands = {
        "scontrol": 'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" >> "$SAID/requeued"; fi',
        "python": 'env > "$SAID/environment"; printf "%s\\n" "$@" > "$SAID/arguments"; exit "$CODE"',
        "srun": 'shift; export SLURM_PROCID=9 SLURM_LOCALID=1; "$@"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path), "SLURM_NTASKS": "16"}
    given = ["--config", "configs/digits/distill.yaml", "--teacher", "a teacher", "--output_dir", str(tmp_path / "run")]
    for code, requeued in ((143, True), (1, False)):
        (tmp_path / "requeued").unlink(missing_ok=True)
        job = {**variables, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "CODE": str(code)}
        assert subprocess.run(["bash", script, *given], env=job, cwd=ROOT).returncode == code
        assert (tmp_path / "requeued").exists() == requeued
    told = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"], told["MASTER_ADDR"]) == ("9", "1", "16", "node0")
    name, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert name == "training/train_distill.py"
    settings = parse_settings(DistillConfig, arguments)
    assert (settings.teacher, settings.mixed_precision) == ("a teacher", "bf16")
    assert settings.resume_from_checkpoint == "latest"
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert {name: told[name.upper()].lower() for name in config} == {
        name: str(value).lower() for name, value in config.items()
    }
