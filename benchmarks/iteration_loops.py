"""The training loops that `iteration.py` compares, each run in a process of its own at the pace of the benchmark."""

import builtins
import gc
import importlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
#: The recipe of ours: the report's distillation of SiT on ImageNet 256 × 256.
RECIPE = ROOT / "configs/imagenet256/distill.yaml"
#: The seed's script in its checkout.
PEER_SCRIPT = "SiT/distill_ddp.py"
#: The seed's loop: critic updates of an iteration, guidance of its student, learning rate of both networks.
CRITIC_STEPS, GUIDANCE_SCALE, LEARNING_RATE = 5, 4.0, 1e-5


@dataclass(frozen=True)
class Loop:
    """One row of the benchmark.

    Args:
        name: of the row.
        kind: `ours`, `schedule` (the seed's loop, reproduced), `peer` (the seed's own code) or `matrices` (a product).
        precision: `fp32`, `tf32` or `bf16`.
        settings: further `--key value` of our trainer.
    """

    name: str
    kind: str
    precision: str = "fp32"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    Args:
        teacher: folder of the teacher's pipeline.
        preset: the size, for the peer's own networks.
        batch: samples of an iteration.
        device: `cpu` or `cuda`.
        threads: of the CPU.
        peer: checkout of the seed's repository.
        matrix: side of the square matrices whose product is the machine's rate.
    """

    teacher: str
    preset: str
    batch: int
    device: str
    threads: int
    peer: str = ""
    matrix: int = 4096


class Pace:
    """An iterable whose iterations are started, timed and measured by the process that made this one.

    Args:
        connection: to that process. Each request is one iteration, `"time"`, `"count"` (its operations) or `"profile"`;
            None ends the loop.
        device: where the loop runs.
    """

    def __init__(self, connection: Connection, device: str):
        self.connection, self.device = connection, device
        self.idle = resident_bytes() if device == "cpu" else 0

    def __iter__(self) -> Iterator[int]:
        from torch.profiler import profile
        from torch.utils.flop_counter import FlopCounterMode

        number = 0
        while (request := self.connection.recv()) is not None:
            number += 1
            watched = {"count": lambda: FlopCounterMode(display=False), "profile": profile}.get(request, nullcontext)()
            self._synchronize()
            reset_peak(self.device)
            started = time.perf_counter()
            with watched:
                yield number
                self._synchronize()
            reply = {"seconds": time.perf_counter() - started, "memory": peak_bytes(self.device) - self.idle}
            if request == "count":
                reply["flops"] = watched.get_total_flops()
            if request == "profile":
                order = f"self_{self.device}_time_total"
                reply["profile"] = watched.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)
            self.connection.send(reply)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def serve(connection: Connection, loop: Loop, bench: Bench) -> None:
    """The body of a process: runs the loop until it is told to end; a failure is sent instead of a reply."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(bench.threads),
        "ACCELERATE_USE_CPU": str(bench.device == "cpu"),
    }
    try:
        import torch

        torch.set_num_threads(bench.threads)
        torch.manual_seed(0)
        allow_tf32 = loop.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
        _touch_libraries(bench.device)
        {"ours": ours, "schedule": schedule, "peer": peer, "matrices": matrices}[loop.kind](
            Pace(connection, bench.device), loop, bench
        )
    except EOFError:  # the benchmark was stopped
        pass
    except Exception as error:  # shown by the process that asked
        connection.send({"error": f"{loop.name}: {error}", "traceback": traceback.format_exc()})


def ours(pace: Iterable[int], loop: Loop, bench: Bench) -> None:
    """Iterations of the product's own trainer with the settings of the published run."""
    from si_distill.settings import parse_settings
    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.distillation.trainer import DistillationTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", RECIPE, "--teacher", bench.teacher, "--output_dir", f"{folder}/run"]
        arguments += ["--per_device_train_batch_size", bench.batch]
        arguments += ["--mixed_precision", "bf16" if loop.precision == "bf16" else "no", *loop.settings]
        trainer = DistillationTrainer(parse_settings(DistillConfig, list(map(str, arguments))))
        for _ in pace:
            trainer.iteration()
            trainer.step += 1


def schedule(pace: Iterable[int], loop: Loop, bench: Bench) -> None:
    """The seed's loop on our network."""
    from si_distill import InterpolantPipeline

    teacher = InterpolantPipeline.from_pretrained(bench.teacher).transformer.to(bench.device)
    seed_schedule(teacher, pace, bench.batch)


def seed_schedule(teacher: Any, pace: Iterable[int], batch: int) -> None:
    """The schedule of `SiT/distill_ddp.py` in WladGrm/si-adistill at one process: five critic updates, each on a guided
    generation of its own (two rows for an image), one guided generator update, Adam, no precision but the weights'.

    Args:
        teacher: a SiT with a null class; two copies are trained.
        pace: one item for each iteration.
        batch: samples of an iteration.
    """
    import copy

    import torch

    device, config = teacher.device, teacher.config
    critic, generator = (copy.deepcopy(teacher).requires_grad_(True).train() for _ in range(2))
    teacher.requires_grad_(False).eval()
    critic_optimizer, optimizer = (torch.optim.Adam(n.parameters(), lr=LEARNING_RATE) for n in (critic, generator))
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)

    def forward(network: Any, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return network(x_t, t, labels, return_dict=False)[0]

    def generate(z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        both = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        given, none = forward(generator, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return none + GUIDANCE_SCALE * (given - none)

    def interpolate(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t, noise = torch.rand(batch, device=device), torch.randn_like(sample)
        share = t.view(-1, 1, 1, 1)
        return share * sample + (1 - share) * noise, t, sample - noise

    half = torch.full((batch,), 0.5, device=device)
    for _ in pace:
        z = torch.randn(shape, device=device)
        labels = torch.randint(0, config.num_classes, (batch,), device=device)
        generator.requires_grad_(False)
        critic.requires_grad_(True)
        for _ in range(CRITIC_STEPS):
            with torch.no_grad():
                sample = generate(z, half, labels)
            x_t, t, velocity = interpolate(sample)
            loss = (forward(critic, x_t, t, labels) - velocity).square().flatten(1).mean(1).mean()
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        generator.requires_grad_(True)
        critic.requires_grad_(False)
        sample = generate(z, half, labels)
        x_t, t, velocity = interpolate(sample)
        with torch.no_grad():
            difference = forward(teacher, x_t, t, labels) - forward(critic, x_t, t, labels)
        gap = -2 * (difference * velocity).flatten(1).sum(1).mean()
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
        # What its loop reads in every iteration on rank 0, for the log and the progress bar.
        sum(p.grad.norm() ** 2 for p in generator.parameters() if p.grad is not None).sqrt()
        gap.item()


class _Stop(Exception):
    """Leaves the peer's `main` where its loop ends, before it writes anything."""


def peer(pace: Pace, loop: Loop, bench: Bench) -> None:
    """The seed's own `main()`, from a checkout, on one process.

    Replaced around it: the progress bar (by `pace`), the process group and its wrapper (there is one process), the
    autoencoder that its pictures need and, on a CPU, the names of CUDA devices. Its teacher is randomly initialised.
    """
    import torch

    sys.path.insert(0, str((Path(bench.peer) / PEER_SCRIPT).parent))
    os.environ["LOCAL_RANK"] = "0"
    os.environ.pop("WANDB_KEY", None)
    builtins.torch = torch  # its transport.py names `torch` without importing it
    try:
        module = importlib.import_module("distill_ddp")
    except ModuleNotFoundError as error:
        raise ValueError(f"the peer's code needs {error.name}: pip install timm torchdiffeq wandb") from error

    class Unwrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module, device_ids: list[int]):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    class Bar:
        def __init__(self, *args, **kwargs):
            pass

        def __iter__(self) -> Iterator[int]:
            yield from pace
            raise _Stop

        def set_postfix(self, **values: str) -> None:
            pass

    module.tqdm, module.DDP = Bar, Unwrapped
    module.dist = SimpleNamespace(init_process_group=lambda backend: None, get_rank=lambda: 0)
    module.AutoencoderKL = SimpleNamespace(from_pretrained=lambda name: torch.nn.Identity())
    if bench.device == "cpu":
        module.torch = _TorchWithoutCUDA(torch)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/teacher.pt"
        network = module.SiT_models[bench.preset](input_size=32, num_classes=1000, learn_sigma=True)
        randomize_zeros(network)
        torch.save(network.state_dict(), checkpoint)
        copies = 2 * sum(p.numel() * p.element_size() for p in network.parameters())
        del network
        if bench.device == "cpu":
            pace.idle += copies  # its script keeps the checkpoint and a first network on the host
        sys.argv = [
            "distill_ddp.py",
            "--model",
            bench.preset,
            "--teacher_ckpt",
            checkpoint,
            "--batch",
            str(bench.batch),
        ]
        try:
            module.main()
        except _Stop:
            pass


class _TorchWithoutCUDA:
    """`torch` as the peer's script uses it, with its CUDA device being the CPU."""

    cuda = SimpleNamespace(set_device=lambda index: None)

    def __init__(self, torch: Any):
        self._torch = torch

    def device(self, name: str) -> Any:
        return self._torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def matrices(pace: Iterable[int], loop: Loop, bench: Bench) -> None:
    """One product of square matrices in the precision: the rate that the machine has."""
    import torch

    dtype = torch.bfloat16 if loop.precision == "bf16" else torch.float32
    a, b = (torch.randn(bench.matrix, bench.matrix, device=bench.device).to(dtype) for _ in range(2))
    for _ in pace:
        torch.mm(a, b)


def randomize_zeros(network: Any) -> None:
    """Gives the zero-initialised layers numbers, so that no gradient is 0."""
    import torch

    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def _touch_libraries(device: str) -> None:
    """Loads what a first forward and backward load, so that it is not counted as the loop's memory."""
    import torch

    network = torch.nn.Sequential(torch.nn.Conv2d(4, 64, 2, 2), torch.nn.Flatten(2), torch.nn.Linear(256, 64)).to(
        device
    )
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            network(torch.zeros(1, 4, 32, 32, device=device)).float().sum().backward()
    gc.collect()


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Starts a new peak at what is held now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int:
    """The most bytes held since `reset_peak`: by CUDA's allocator, or by this process on the CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024
