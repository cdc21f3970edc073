r"""Publishes a student or a teacher on the Hugging Face Hub, and a Space that shows a student.

    si-distill publish --pipeline runs/digits-student --repo-id user/digits-student --dry-run
    si-distill publish --pipeline runs/digits-student --repo-id user/digits-student --private --variant bf16
    si-distill publish --pipeline runs/digits-student --repo-id user/digits-student --license mit --space \
        --teacher-repo-id user/digits-teacher
    si-distill publish --pipeline runs/sd35-turbo --repo-id user/sd35-turbo --prompts "a red fox" "two boats" --merged

Everything is first written to hub/ in the pipeline's folder, where it stays; the upload is one commit. docs/publishing.md
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..settings import TRUST, parse_settings, script_main, setting


@dataclass
class PublishConfig:
    pipeline: str = setting("", "The folder of a run or a pipeline.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    repo_id: str = setting("", "Where to publish it: `user/name`.")
    private: bool = setting(False, "Make a new repository private.")
    space: bool = setting(False, "Publish a Space of the same name that shows the student.")
    dry_run: bool = setting(False, "Write the folders and list their files; upload nothing.")
    variant: str | None = setting(None, "A further copy of the weights: `bf16`.")
    license: str | None = setting(None, "The Hub's identifier of a licence, e.g. `mit`.")
    teacher_repo_id: str | None = setting(None, "Where the teacher is published, if the run loaded it from a folder.")
    merged: bool = setting(False, "Put a LoRA into the weights and publish the whole text-to-image pipeline.")
    prompts: list[str] = setting([], "Prompts of the pictures on the card of a text-to-image student.")
    base: str | None = setting(None, "The stock pipeline that a LoRA is for, if it has moved.")
    dtype: str = setting(
        "float32", "Precision of a text-to-image pipeline, also of a merged one.", ("float32", "bfloat16", "float16")
    )


def main(argv: list[str]) -> None:
    settings = parse_settings(PublishConfig, argv, __doc__)

    import torch

    from ..errors import InputError, PublishError
    from ..hub.facts import read_facts
    from ..hub.publishing import check_name, check_ready, upload
    from ..hub.staging import listing, stage_model, stage_space
    from ..hub.text_staging import PROMPTS, stage_text_student
    from ..loading import load_pipeline
    from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
    from ..places import similar_paths

    run = Path(settings.pipeline)
    if not settings.pipeline or not settings.repo_id:
        raise InputError("Give --pipeline FOLDER and --repo-id user/name.")
    for name in filter(None, (settings.repo_id, settings.teacher_repo_id)):
        check_name(name)
    if settings.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", settings.license):
        raise InputError(
            f"`license` {settings.license!r} is no identifier of the Hub's list, such as `mit` or `apache-2.0`."
        )
    if not run.is_dir():
        raise InputError(
            f"There is no folder {run}: `pipeline` is the folder of a run or a pipeline.{similar_paths(run)}"
        )
    facts = read_facts(run)
    if settings.space and not facts.is_student:
        raise InputError(f"{run} holds a {facts.pipeline_class}: a Space shows a student.")
    if settings.space and facts.takes_image:
        raise InputError(f"{run} holds a student that takes images, which the Space cannot upload: leave out --space.")
    model, space = run / "hub" / "model", run / "hub" / "space"
    teacher = settings.teacher_repo_id or facts.teacher_repository
    if facts.texts:
        if settings.variant:
            raise InputError(
                "`variant` is for pipelines of classes: leave it out, or publish --merged --dtype bfloat16."
            )
        stage_text_student(
            run, model, settings.repo_id, settings.merged, settings.license, settings.teacher_repo_id,
            settings.prompts or PROMPTS, settings.base, getattr(torch, settings.dtype),
        )  # fmt: skip
    else:
        if settings.merged or settings.prompts or settings.base:
            raise InputError(
                f"{run} holds a {facts.pipeline_class}: --merged, --prompts and --base are for text to image."
            )
        kind = OneStepInterpolantPipeline if facts.is_student else InterpolantPipeline
        pipeline = load_pipeline(kind, "pipeline", str(run), settings.trust_remote_code)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        stage_model(
            pipeline, model, settings.repo_id, run, settings.variant, settings.license, settings.teacher_repo_id
        )

    def show_space(revision: str | None) -> None:
        stage_space(
            space, settings.repo_id, settings.repo_id, revision, None if facts.texts else teacher, settings.private,
            texts=bool(facts.texts),
        )  # fmt: skip

    if settings.dry_run:
        if settings.space:
            show_space(None)
        for folder in [model, *([space] if settings.space else [])]:
            files = listing(folder)
            print(f"\n{folder} → {settings.repo_id}{' (Space)' if folder == space else ''}")
            for name, size in files:
                print(f"{size:>14,}  {name}")
            print(f"{sum(size for _, size in files):>14,}  bytes in {len(files)} files")
        print("\nDry run: nothing was uploaded.")
        return
    private = settings.private or None
    try:
        check_ready(settings.repo_id)
        published = upload(model, settings.repo_id, "model", private)
        print(f"Published {published.url}")
        print(f'Load this very version with revision="{published.commit}".')
        if settings.space:
            show_space(published.commit)
            print(f"Published {upload(space, settings.repo_id, 'space', private).url}")
    except (InputError, PublishError) as error:
        raise type(error)(f"{error} What was to be uploaded is kept in {run / 'hub'}.") from error


if __name__ == "__main__":
    script_main(main)
