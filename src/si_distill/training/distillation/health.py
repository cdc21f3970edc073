"""Early warnings of training going wrong, with suggestions."""

from collections import defaultdict

#: Lines of the log in a row before a warning: one bad line is noise.
PATIENCE = 3


class HealthMonitor:
    """Watches the means of each line of the log.

    * The critic must know the student's samples at least as well as the teacher does: ‖v_ψ − İ‖² ≤ ‖v* − İ‖² on them.
    * The distance of the fields E‖v_ψ − v*‖² rises while the critic, which begins as a copy of the teacher, gets to know the
      student, and then falls as the student learns; the loss itself says nothing (it is a game).
    * The spread of the student's samples is that of the data from the first steps on; a collapse or an explosion shows.
    * Of images of prompts (`image_means`): saturated values, and images of one prompt that become one another. Both are
      compared with the teacher's where these are logged, otherwise with the student's first ones.
    """

    def __init__(self) -> None:
        self._in_a_row: defaultdict[str, int] = defaultdict(int)
        self._peak_distance = 0.0
        self._least_distance = float("inf")
        self._first: dict[str, float] = {}

    def check(self, means: dict[str, float]) -> list[str]:
        """Warnings for the user, each once per spell of trouble; none while the generator does not learn yet."""
        signs = {**self._game(means), **self._images_of_prompts(means)}
        warnings = []
        for kind, (trouble, text) in signs.items():
            self._in_a_row[kind] = self._in_a_row[kind] + 1 if trouble else 0
            if self._in_a_row[kind] == PATIENCE:
                warnings.append(text)
        return warnings

    def _game(self, means: dict[str, float]) -> dict[str, tuple[bool, str]]:
        if "field_distance" not in means:
            return {}
        distance, spread = means["field_distance"], means["sample_std"]
        self._peak_distance = max(self._peak_distance, distance)
        if distance < 0.8 * self._peak_distance:
            self._least_distance = min(self._least_distance, distance)
        first = self._first["sample_std"] = self._first.get("sample_std") or spread
        critic, teacher = means["critic_matching_loss"], means["teacher_matching_loss"]
        return {
            "critic": (
                critic > 1.05 * teacher,
                f"the critic follows the student worse than the teacher does ({critic:.4g} against {teacher:.4g} on its "
                "samples), so its gradient is wrong. Try more critic_steps, a higher critic_learning_rate or a lower "
                "learning_rate.",
            ),
            "distance": (
                distance > 10 * self._least_distance,
                f"the fields drift apart (distance {distance:.4g}, it was {self._least_distance:.4g}). Try a lower "
                "learning_rate, more critic_steps or, with sid, alpha=1.0.",
            ),
            "spread": (
                not 0.5 < spread / first < 2,
                f"the spread of the student's samples is {spread:.4g} and began at {first:.4g}: it collapses or "
                "explodes. Try a lower learning_rate, or start again from the last good checkpoint.",
            ),
        }

    def _images_of_prompts(self, means: dict[str, float]) -> dict[str, tuple[bool, str]]:
        signs = {}
        if (share := means.get("saturation")) is not None:
            usual = means.get("teacher_saturation", self._first.setdefault("saturation", share))
            signs["saturation"] = (
                share > 2 * usual + 0.02,
                f"{share:.1%} of the values in the student's images are black or full ({usual:.1%} are usual): it "
                "saturates. Try a lower guidance_scale or a lower learning_rate.",
            )
        if (diversity := means.get("prompt_diversity")) is not None:
            usual = means.get("teacher_prompt_diversity", self._first.setdefault("prompt_diversity", diversity))
            signs["diversity"] = (
                diversity < 0.5 * usual,
                f"the student's images of one prompt become alike (distance {diversity:.4g}, {usual:.4g} is usual). Try a "
                "lower guidance_scale, more critic_steps or, with sid, alpha=1.0.",
            )
        return signs
