"""Whether a training still learns: it is stopped where going on would waste time."""

from ...errors import TrainingStopped

#: Updates in a row with a gradient of exactly 0, and the largest mean or spread of samples, before training stops.
MAX_STILL, MAX_SAMPLE = 100, 1e4


class Vitals:
    """Watches the means of each line of the log."""

    def __init__(self) -> None:
        self._still: dict[str, int] = {}

    def check(self, means: dict[str, float], counts: dict[str, int], step: int) -> None:
        """
        Args:
            means: over the iterations since the last line, of all ranks: they stop alike.
            counts: iterations behind each mean.
            step: of the training.

        Raises:
            TrainingStopped: says what is wrong, and what to try.
        """
        advice = "The last checkpoint is whole. Try a smaller learning_rate or a larger t_min."
        for name in ("sample_mean", "sample_std"):
            if not abs(means.get(name, 0.0)) <= MAX_SAMPLE:
                raise TrainingStopped(
                    f"The {name} of the generated images is {means[name]:.3g} at step {step}, and that of data is around 1: "
                    f"the student has exploded. {advice}"
                )
        for name in [name for name in means if name.endswith("grad_norm")]:
            self._still[name] = self._still.get(name, 0) + counts[name] if means[name] == 0 else 0
            if self._still[name] >= MAX_STILL:
                raise TrainingStopped(
                    f"The {name} was exactly 0 in the last {self._still[name]} iterations (now at step {step}): nothing is "
                    f"learned. Its loss may underflow (`loss_scale`), or not depend on the network. {advice}"
                )
