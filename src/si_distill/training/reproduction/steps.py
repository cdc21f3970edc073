"""The steps of a reproduction, each done once: convert, measure the teacher, distil with milestones, measure the student."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InputError, TrainingInterrupted, TrainingStopped
from ...files import FolderLock, write_text
from ...named_configs import CONFIGS
from ...reading import read_json
from ...settings import given_settings, parse_settings, settings_to_dict
from ..config import BEST
from ..distillation.config import DistillConfig
from .config import ReproduceConfig
from .launching import launch
from .published import Published, find_recipe, read_published
from .report import figure, milestone_rows, write_report
from .track import Milestone, off_track, read_milestones

#: What is done, and with what: in the folder of the reproduction.
RECORD = "reproduction.json"
_RECORD = {"with": dict, "done": {str: dict}}
_FOUND = {"distance": str, "features": dict, "rows": [{"Fréchet distance": (float, None)}]}
_FACTS = {"sessions": [{"hardware?": (str, None), "processes?": int, "versions?": dict}]}


class Reproduction:
    """A recipe on its way from a published checkpoint to a table.

    Args:
        settings: of the command.

    Raises:
        InputError: for an unknown recipe, settings that cannot work, a missing checkpoint, or a folder that holds the
            reproduction of something else. Nothing is written then.
    """

    def __init__(self, settings: ReproduceConfig):
        self.settings = settings
        self.name, self.recipe = find_recipe(settings.recipe, CONFIGS)
        teacher = given_settings(DistillConfig, ["--config", str(self.recipe)]).get("teacher", "")
        figures = Path(settings.published or CONFIGS / "published.yaml")
        self.published = read_published(figures, self.name, Path(str(teacher)).name)
        self.folder = Path(settings.output_dir or f"runs/reproduction/{self.name}")
        self.teacher, self.student = self.folder / "teacher", self.folder / "student"
        self.features = settings.features or self.published.features
        #: Published figures on other features say nothing of the measured ones.
        self.compared = self.published if self.features == self.published.features else Published()
        self.training = parse_settings(DistillConfig, self._training_words())
        self.images_per_update = self._images_per_update()
        with_what = self._with()
        path = self.folder / RECORD
        record = read_json(path, _RECORD) if path.exists() else {"with": with_what, "done": {}}
        if "convert" in record["done"] and not settings.checkpoint:
            with_what["checkpoint"] = record["with"]["checkpoint"]  # it is not needed again
        changed = [key for key in with_what if record["with"].get(key) != with_what[key]]
        if changed:
            listing = "; ".join(f"{key}: {record['with'].get(key)!r} then, {with_what[key]!r} now" for key in changed)
            raise InputError(
                f"{self.folder} holds a reproduction with other settings ({listing}). Use the same ones, or give another "
                "--output_dir."
            )
        self.record = record
        if "convert" not in self.done:
            self._check_checkpoint()
        for written in (self.student, self.folder / "teacher_features", self.folder / "student_features"):
            FolderLock(written).check()  # a command that outlived its parent

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """The finished steps with what they found."""
        return self.record["done"]

    def run(self) -> None:
        """Does what is not done yet, and writes the report after each step.

        Raises:
            InputError: when the teacher cannot be converted, or misses its published figure.
            TrainingStopped: when a command failed, or the run is off track.
            TrainingInterrupted: after SIGTERM or SIGINT, when the training has saved.
        """
        with _interruptible():
            if "convert" not in self.done:
                self._convert()
            if "teacher" not in self.done:
                self._measure("teacher", ["--teacher", str(self.teacher), *self._sampler()], self.settings.seed)
            self._check_teacher()
            if "distil" not in self.done:
                self._distil()
            if "student" not in self.done:
                self._measure("student", ["--pipeline", str(self.student / BEST)], self.settings.seed + 1)
        print(f"{self._conclude()} The report: {self.folder / 'report.md'}")

    # What is planned.

    def _training_words(self) -> list[str]:
        """The training's command line, but for the batch and the milestones, which depend on the recipe's settings."""
        s = self.settings
        words = ["--config", str(self.recipe)]
        for key, value in s.train.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        words += ["--teacher", str(self.teacher), "--output_dir", str(self.student)]
        words += ["--evaluation.features", self.features, "--evaluation.num_samples", str(s.num_samples)]
        words += ["--evaluation.batch_size", str(s.batch_size)]
        if s.feature_weights is not None:
            words += ["--evaluation.feature_weights", s.feature_weights]
        if s.reference is not None:
            words += ["--evaluation.reference", s.reference]
        return words

    def _images_per_update(self) -> int:
        training, processes = self.training, self.settings.num_processes
        device = training.per_device_train_batch_size
        total = self.published.images_per_update or device * training.gradient_accumulation_steps
        if total % (device * processes):
            raise InputError(
                f"An update of {self.name} has {total} images, which {processes} processes with {device} images at once "
                "cannot make: choose another --num_processes, or --train '{per_device_train_batch_size: …}'."
            )
        return total

    def _with(self) -> dict[str, Any]:
        """What must not change between two starts."""
        s, training = self.settings, settings_to_dict(self.training)
        free = {*self.training.RESUMABLE, "data", "teacher"}  # the teacher's folder is ours, which may be moved
        kept = {f"training.{key}": value for key, value in training.items() if key not in free}
        return {
            "recipe": self.name,
            **kept,
            "convert": self._conversion(),
            "checkpoint": Path(s.checkpoint).name,
            "features": self.features,
            "reference": s.reference and Path(s.reference).name,
            "num_samples": s.num_samples,
            "seed": s.seed,
        }

    def _check_checkpoint(self) -> None:
        known = self.published.teacher.get("checkpoint")
        where = f" Its authors' file: {known}." if known else ""
        if not self.settings.checkpoint:
            raise InputError(f"`checkpoint` is not set: give the teacher of {self.name}, --checkpoint FILE.{where}")
        if not Path(self.settings.checkpoint).exists():
            raise InputError(f"There is no checkpoint {self.settings.checkpoint}: download it first.{where}")
        start = self.training.student
        if start is not None and not Path(start).exists():
            raise InputError(
                f"{self.name} goes on from a finished student, `student` {start}, which is not there: convert it first, by "
                f"the command at the top of {self.recipe}."
            )

    def _conversion(self) -> dict[str, Any]:
        """Settings of the teacher's conversion."""
        return {**self.published.teacher.get("convert", {}), **self.settings.convert}

    def _sampler(self) -> list[str]:
        known = self.published.teacher
        words = ["--teacher_steps", str(known.get("steps", 50))]
        for key in ("solver", "guidance_scale"):
            words += [f"--{key}", str(known[key])] if key in known else []
        return words

    # The steps.

    def _convert(self) -> None:
        from ...conversion.config import ConvertConfig  # it, and torch with it, is used once
        from ...conversion.convert import convert_checkpoint

        words = [word for key, value in self._conversion().items() for word in (f"--{key}", str(value))]
        # A teacher that is there without a record of it: killed in between.
        place = ["--source", self.settings.checkpoint, "--out", str(self.teacher), "--overwrite"]
        convert_checkpoint(parse_settings(ConvertConfig, [*place, *words]))
        self._finish("convert", {"bytes": Path(self.settings.checkpoint).stat().st_size})

    def _measure(self, who: str, words: list[str], seed: int) -> None:
        s, output = self.settings, self.folder / f"{who}.json"
        words += ["--features", self.features, "--metrics", "fid", "--num_samples", str(s.num_samples)]
        words += ["--batch_size", str(s.batch_size), "--seed", str(seed), "--output", str(output)]
        words += ["--data", json.dumps(settings_to_dict(self.training.data))]
        words += ["--class_balance", "uniform"] if s.reference else []
        for key in ("feature_weights", "reference"):
            words += [f"--{key}", getattr(s, key)] if getattr(s, key) is not None else []
        code = launch("evaluate", words, s.num_processes, s.accelerate_config)
        if code:
            raise TrainingStopped(
                f"Measuring the {who} ended with exit code {code}; what it said is above. The same command goes on here."
            )
        found = read_json(output, _FOUND)
        rows = [row for row in found["rows"] if str(row.get("generator", "")).startswith(who)]
        about = {"distance": found["distance"], "value": rows[0]["Fréchet distance"], "what": rows[0]["generator"]}
        self._finish(who, {**about, "evaluations": rows[0].get("network evaluations"), "seed": seed})

    def _check_teacher(self) -> None:
        found, published = self.done["teacher"]["value"], self.compared.teacher.get("value")
        if published is None or found <= published * (1 + self.settings.tolerance):
            return
        named = figure(self.done["teacher"]["distance"], self.features)
        reason = (
            f"The teacher's {named} is {found:.4g}, and {published:.4g} is published "
            f"({self.compared.teacher['source']}): {found / published - 1:.1%} above, where "
            f"{self.settings.tolerance:.1%} is allowed."
        )
        self._report("The teacher misses its published figure", reason)
        raise InputError(
            f"{reason} Check the checkpoint, the reference and the number of images; --tolerance "
            f"{found / published - 0.99:.2f} goes on all the same. The report: {self.folder / 'report.md'}"
        )

    def _distil(self) -> None:
        s, training = self.settings, self.training
        wanted = s.milestone_images or max(1, training.max_steps // 50) * self.images_per_update
        micro = self.images_per_update // (training.per_device_train_batch_size * s.num_processes)
        words = [*self._training_words(), "--gradient_accumulation_steps", str(micro)]
        words += ["--eval_metric_steps", str(max(1, round(wanted / self.images_per_update)))]
        words += ["--resume_from_checkpoint", "latest"]

        def watch() -> bool:
            return self._off_track() is not None

        code = None
        if not watch():
            code = launch("train_distill", words, s.num_processes, s.accelerate_config, watch, self.student)
        reason = self._off_track()
        if reason is not None:
            self._report("Off track", f"The run was ended: {reason}.")
            raise TrainingStopped(
                f"The run is off track: {reason}. It is saved in {self.student}; a larger --track_tolerance or "
                f"--patience goes on with it. The report: {self.folder / 'report.md'}"
            )
        if code:
            self._report("Not finished", "The training ended before its last iteration.")
            raise TrainingStopped(
                f"The training ended with exit code {code}; what it said is above. The same command goes on from its last "
                "checkpoint."
            )
        self._finish("distil", {"iterations": training.max_steps})

    # What is found.

    def _milestones(self) -> list[Milestone]:
        return read_milestones(self.student, self.images_per_update, self.compared)

    def _off_track(self) -> str | None:
        return off_track(self._milestones(), self.settings.track_tolerance, self.settings.patience)

    def _finish(self, step: str, found: dict[str, Any]) -> None:
        self.done[step] = found
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RECORD, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")
        if "teacher" in self.done:
            self._report("Under way", f"Finished: {', '.join(self.done)}.")

    def _conclude(self) -> str:
        found, published = self.done["student"]["value"], self.compared.student.get("value")
        named = figure(self.done["student"]["distance"], self.features)
        if published is None:
            status, reason = "Finished", f"The student's {named} is {found:.4g}; no published figure compares with it."
        else:
            near = found <= published * (1 + self.settings.tolerance)
            status = "Reproduced" if near else "Not reproduced"
            reason = f"The student's {named} is {found:.4g}, and {published:.4g} is published."
        self._report(status, reason)
        return f"{status}: {reason}"

    def _report(self, status: str, reason: str) -> None:
        source, s = "no figure with a source is known", self.settings
        if self.compared is not self.published:
            source = f"figures are on {self.published.features}, which do not compare with {self.features}"
        milestones = self._milestones()
        best = min(milestones, key=lambda m: m.value, default=None)
        rows = {}
        for who in ("teacher", "student"):
            known, found = getattr(self.compared, who), self.done.get(who, {})
            what = found.get("what", "student, best milestone (optimistic)" if best else "student")
            value = found.get("value", best.value if who == "student" and best else None)
            rows[who] = {"what": what, "value": value, "published": known.get("value")}
            rows[who]["source"] = known.get("source", source)
        reference = Path(s.reference).name if s.reference else f"{self.training.data.name}, {self.training.data.split}"
        report = {
            "recipe": self.name,
            "status": status,
            "reason": reason,
            "distance": self.done["teacher"]["distance"],
            "features": self.features,
            **rows,
            "curve source": self.compared.curve.get("source", source),
            "measured": f"{s.num_samples:,} images each, seed {s.seed} (the student's {s.seed + 1}), against {reference}",
            "run": self._run_facts(),
            "milestones": milestone_rows(milestones),
        }
        write_report(self.folder, report)

    def _run_facts(self) -> dict[str, str]:
        facts = {"checkpoint": f"{self.record['with']['checkpoint']}, {self.done['convert']['bytes']:,} bytes"}
        facts["images per update"] = str(self.images_per_update)
        if self.settings.train:
            facts["settings other than the recipe's"] = json.dumps(self.settings.train, ensure_ascii=False)
        path = self.student / "facts.json"
        if path.is_file():
            session = read_json(path, _FACTS)["sessions"][-1]
            versions = ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items())
            facts |= {
                "hardware": f"{session.get('hardware')}, {session.get('processes')} processes",
                "versions": versions,
            }
        return facts


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT end what runs, in order, and then this process."""

    def interrupt(number: int, frame: Any) -> None:
        raise TrainingInterrupted("what was finished is kept. Run the same command to go on.", number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
