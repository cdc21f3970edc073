"""What the devices of a distillation send each other in one iteration, from the networks' sizes alone."""

import math
import statistics
from dataclasses import dataclass

from ...objectives import DistillationObjective
from ..distillation.config import DistillConfig
from .memory import BFLOAT16, FLOAT32, Devices


@dataclass(frozen=True)
class Transfer:
    """One kind of collective operation.

    Args:
        network: whose weights or gradients.
        operation: `all-reduce`, `all-gather` or `reduce-scatter`.
        size: bytes of the whole tensors, all devices together.
        times: how often in an iteration.
    """

    network: str
    operation: str
    size: int
    times: int

    def sent(self, devices: int) -> float:
        """Bytes that each device sends in an iteration, by the ring algorithm: (N − 1) / N of the size, twice to reduce it
        everywhere (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms").
        """
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * (devices - 1) / devices * self.size * self.times


def transfers(
    parameters: int, objective: DistillationObjective, settings: DistillConfig, devices: Devices
) -> list[Transfer]:
    """The collective operations of one iteration with one micro-batch.

    DDP sums the gradients of each update. FSDP2 gathers the weights for every forward and again for its backward, and sums
    and cuts the gradients; the frozen networks are gathered too. What lies outside the blocks is gathered less often and is
    counted as if it were not. The averages need nothing, a gradient's norm and the metrics a few numbers.

    Args:
        parameters: of each of the three networks.
        objective: whether the gradient flows through teacher and critic.
        settings: updates and precision.
        devices: number, and whether networks are cut.
    """
    if devices.count == 1:
        return []
    critic_steps, steps = settings.critic_steps, settings.generator_steps
    gradients = FLOAT32 * parameters  # summed in float32 whatever the precision
    if not devices.sharded:
        return [
            Transfer("critic", "all-reduce", gradients, critic_steps),
            Transfer("student", "all-reduce", gradients, steps),
        ]
    weights = parameters * (BFLOAT16 if settings.mixed_precision == "bf16" else FLOAT32)
    judged = steps * (1 + objective.needs_field_gradient)
    fresh = settings.critic_draws == "fresh"
    made = critic_steps - settings.generator_first if fresh else 0  # images for the critic alone
    rolled = statistics.mean((count - 1) / 2 for count in settings.student_steps)  # steps before the one that learns
    on_teacher = settings.adversarial.kind == "head" and settings.adversarial.features == "teacher"
    return [
        Transfer("critic", "all-gather", weights, 2 * critic_steps + judged),
        Transfer("critic", "reduce-scatter", gradients, critic_steps),
        Transfer("student", "all-gather", weights, 2 * steps + made + math.ceil(rolled * (steps + made))),
        Transfer("student", "reduce-scatter", gradients, steps),
        Transfer(
            "teacher", "all-gather", weights, judged + critic_steps * (objective.uses_teacher_in_critic + on_teacher)
        ),
    ]
