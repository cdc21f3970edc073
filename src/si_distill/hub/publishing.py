"""Publication on the Hugging Face Hub: one commit for all files, or none; every failure a sentence."""

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError, PublishError
from ..evaluation.config import EVALUATION
from ..reading import read_json
from .card import CARD, SAMPLES
from .facts import CONFIG, FACTS, INDEX, LORA_WEIGHTS, METRICS, TEXT_STUDENT, class_name
from .staging import listing, stage_model

#: Files outside the folders of components that a publication writes, and removes when it no longer has them.
OWN_FILES = {CARD, SAMPLES, CONFIG, METRICS, FACTS, EVALUATION, LORA_WEIGHTS, TEXT_STUDENT}


@dataclass
class Published:
    """
    Args:
        url: of the repository.
        commit: its new main revision, 40 hexadecimal digits.
    """

    url: str
    commit: str


def check_name(repo_id: str) -> None:
    """Raises InputError for a name that no repository can have, or that does not say whose it is."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"`repo_id` {repo_id!r} cannot be the name of a repository: {error}") from None
    if "/" not in repo_id:
        raise InputError(
            f"`repo_id` {repo_id!r} does not say whose it is: give user/{repo_id} or organisation/{repo_id}."
        )


def check_ready(repo_id: str, token: str | None = None) -> None:
    """
    Asks whether a publication can work, before the work that leads to it.

    Args:
        repo_id: `user/name`.
        token: of the Hub; by default `HF_TOKEN` or the one of `hf auth login`.

    Raises:
        InputError: for a name that cannot be one, a missing, refused or read-only token, or a name space of others.
        PublishError: when the Hub cannot be reached.
    """
    check_name(repo_id)
    if not (token or get_token()):
        raise InputError(
            "There is no token of the Hub: log in with `hf auth login`, or set HF_TOKEN. Make one that may write at "
            "https://huggingface.co/settings/tokens."
        )
    with _explained(repo_id):
        who = HfApi(token=token).whoami()
    names = [who.get("name"), *(organisation.get("name") for organisation in who.get("orgs") or ())]
    if repo_id.split("/")[0] not in names:
        raise InputError(
            f"The token is of {names[0]!r}, who may not write to {repo_id.split('/')[0]!r} (may write to: "
            f"{', '.join(map(str, names))}). Use another --repo-id, or that user's token."
        )
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise InputError("The token may only read. Make one that may write at https://huggingface.co/settings/tokens.")


def upload(
    folder: Path,
    repo_id: str,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> Published:
    """
    Makes a repository hold a staged folder, in a single commit on top of what was looked at.

    Files of an earlier publication that are no longer there are removed in the same commit; files of others are left.

    Args:
        folder: of `stage_model` or `stage_space`.
        repo_id: `user/name`; made when it does not exist.
        repo_type: `"model"` or `"space"`.
        private: whether a new repository is private; None takes the owner's default.
        token: of the Hub.
        commit_message: of the commit.
        create_pr: propose the commit as a pull request instead.

    Raises:
        InputError: when the repository holds something else, or is public and should be private.
        PublishError: when the Hub refuses or cannot be reached. Its main revision is then what it was before.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            # `exist_ok` stays False: a name that exists but cannot be read is somebody else's.
            sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
            api.create_repo(repo_id, repo_type=repo_type, private=private, **sdk)
            info = api.repo_info(repo_id, repo_type=repo_type)
        if private and info.private is False:
            raise InputError(
                f"{repo_id} exists and is public: make it private in its settings on the Hub first, or leave --private out."
            )
        present = {sibling.rfilename for sibling in info.siblings or ()}
        if repo_type == "model":
            _check_same_kind(api, folder, repo_id, info.sha, present)
        files = [name for name, _ in listing(folder)]
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in files]
        operations += [CommitOperationDelete(name) for name in sorted(_stale(present, files))]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Publish {repo_id.split('/')[-1]} with si_distill",
            repo_type=repo_type,
            parent_commit=info.sha,  # refused if somebody else committed since
            create_pr=create_pr,
        )
    prefix = "spaces/" if repo_type == "space" else ""
    return Published(commit.pr_url or f"{api.endpoint}/{prefix}{repo_id}", commit.oid)


def publish_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    **staging: Any,
) -> Published:
    """
    What `pipe.push_to_hub` does: stages the pipeline in a temporary folder and uploads it.

    The folder is kept when the upload fails, and the error names it.

    Args:
        pipeline: a student or a teacher; what its run left in the folder that it was loaded from goes along.
        repo_id, private, token, commit_message, create_pr: see `upload`.
        staging: `variant`, `license`, `teacher_repo_id` of `stage_model`.
    """
    run = Path(pipeline.name_or_path) if pipeline.name_or_path and Path(pipeline.name_or_path).is_dir() else None
    base = Path(tempfile.mkdtemp(prefix="si_distill-"))
    folder = base / "hub" / "model"
    try:
        stage_model(pipeline, folder, repo_id, run, **staging)
        check_ready(repo_id, token)
        published = upload(folder, repo_id, "model", private, token, commit_message, create_pr)
    except (InputError, PublishError) as error:
        raise type(error)(f"{error} What was to be uploaded is kept in {folder}.") from error
    shutil.rmtree(base)
    return published


def _stale(present: set[str], files: list[str]) -> set[str]:
    """Files of an earlier publication: results, and whatever lies in the folders of components."""
    rooms = {name.split("/")[0] for name in files if "/" in name}
    return {name for name in present - set(files) if name in OWN_FILES or ("/" in name and name.split("/")[0] in rooms)}


def _check_same_kind(api: HfApi, folder: Path, repo_id: str, revision: str, present: set[str]) -> None:
    """A name is taken when its repository holds something that this publication would bury."""
    if not present - {".gitattributes", CARD, "LICENSE"}:
        return
    here = _published_class(folder)
    there = None
    for name in (TEXT_STUDENT, "model_index.json"):
        if name in present and there is None:
            there = _published_class(Path(api.hf_hub_download(repo_id, name, revision=revision)).parent)
    if there != here:
        what = f"a {there}" if there else "other files, and no pipeline"
        raise InputError(
            f"The name {repo_id} is taken: its repository holds {what}, and this is a {here}. Give another --repo-id."
        )


def _published_class(folder: Path) -> str | None:
    """What a published folder holds: a pipeline of some class, or a text-to-image student of one."""
    if (folder / TEXT_STUDENT).is_file():
        kind = read_json(folder / TEXT_STUDENT, {"pipeline_class": str})["pipeline_class"]
        return f"text-to-image student of a {kind}"
    return class_name(read_json(folder / "model_index.json", INDEX))


@contextmanager
def _explained(repo_id: str):
    """Turns exceptions of the Hub's client into user-facing errors."""
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {
            401: "the Hub does not accept the token: it is wrong or has expired. Log in again with `hf auth login`, or set "
            "HF_TOKEN.",
            403: f"the token has no permission to write to {repo_id}. Use a token with write access to it.",
            409: f"the name {repo_id} is taken by a repository that this token cannot see. Give another --repo-id.",
            412: f"somebody else changed {repo_id} at the same time. Look at it and publish again.",
            413: "the Hub says that it is too large.",
            429: "the Hub asks for fewer requests. Wait some minutes and publish again.",
        }.get(status)
        if reason is None and status is not None and status >= 500:
            reason = f"the Hub has an error of its own ({status}). Try again later."
        raise PublishError(f"Not published: {reason or error}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        offline = " HF_HUB_OFFLINE is set." if constants.HF_HUB_OFFLINE else ""
        raise PublishError(
            f"Not published: no connection to {constants.ENDPOINT} ({type(error).__name__}).{offline} Check the network and "
            "publish again."
        ) from error
    except InputError:
        raise
    except ValueError as error:  # the Hub's check of the card
        raise PublishError(f"Not published: the Hub does not accept the files: {error}") from error
