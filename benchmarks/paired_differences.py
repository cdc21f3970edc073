#!/usr/bin/env python
"""Students less their teachers, paired by seed: what `training/evaluate.py` has measured, one evaluation file for each seed.

    python benchmarks/paired_differences.py runs/seed-*/digits-student/evaluation.json

Each student is compared with the best of its own teacher's rows. The interval is Student's t over the seeds, 95 %.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench_tools import markdown_table
from scipy.stats import t as student_t

from si_distill.errors import InputError
from si_distill.settings import script_main

#: What must not differ between the files.
SHARED = ("evaluator", "features", "num_samples", "class_balance")


@dataclass
class Pair:
    """A row of a student and the best of its teacher's, of one file."""

    student: dict
    teacher: dict

    def difference(self, name: str) -> float | None:
        """Student less teacher."""
        values = [row.get(name) for row in (self.student, self.teacher)]
        return None if None in values else values[0] - values[1]


def read(files: list[Path]) -> tuple[str, dict[str, list[Pair]]]:
    """What the distance is called, and the pairs of each row of a student.

    Raises:
        InputError: for files that are no evaluations, that do not compare, or without a student or a teacher.
    """
    found: dict[str, list[Pair]] = {}
    first = None
    for file in files:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            rows, distance = values["rows"], values["distance"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not an evaluation of training/evaluate.py: {error}") from None
        shared = {name: values.get(name) for name in SHARED} | {"reference": values["reference"].get("probe")}
        first = first or (distance, shared)
        if (distance, shared) != first:
            raise InputError(f"{file} was measured in another way than {files[0]}: {shared} and {first[1]}.")
        kinds = {
            kind: [row for row in rows if row["made"]["kind"] == kind and row[distance] is not None]
            for kind in ("student", "teacher")
        }
        for kind, there in kinds.items():
            if not there:
                raise InputError(f"{file} has no row of a {kind}: give both to training/evaluate.py.")
        best = min(kinds["teacher"], key=lambda row: row[distance])
        for row in kinds["student"]:
            found.setdefault(row["generator"], []).append(Pair(row, best))
    return first[0], found


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(distance: str, found: dict[str, list[Pair]]) -> str:
    """Markdown: a row for each of a student's numbers of steps."""
    rows = []
    for name, pairs in found.items():
        differences = [pair.difference(distance) for pair in pairs]
        accuracies = [pair.difference("label accuracy") for pair in pairs]
        rows.append(
            [
                name,
                str(len(pairs)),
                " ".join(f"{pair.student[distance]:.3f}" for pair in pairs),
                " ".join(f"{pair.teacher[distance]:.3f}" for pair in pairs),
                interval(differences),
                str(sum(difference < 0 for difference in differences)),
                "" if None in accuracies else interval(accuracies),
            ]
        )
    head = ["generator", "seeds", distance, "teacher's best", "difference", "below 0", "label accuracy, difference"]
    return markdown_table(head, rows)


def main(arguments: list[str]) -> None:
    files = [Path(word) for word in arguments]
    if not files or arguments[0].startswith("-"):
        raise InputError((__doc__ or "").strip())
    distance, found = read(files)
    teachers = {pair.teacher["generator"] for pairs in found.values() for pair in pairs}
    print(table(distance, found))
    print(f"\nThe teacher's best: {'; '.join(sorted(teachers))}.")


if __name__ == "__main__":
    script_main(main)
