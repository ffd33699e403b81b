"""Upload files to a repository on the Hugging Face Hub, in one commit: it has all of them, or none.

Large files go first, each to the store of its content; the Hub has them by their digest and takes none twice, so the
same call resumes an upload that was interrupted. Only then the commit is made. HF_ENDPOINT and HF_TOKEN have the same
meaning as for huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from snugfit.errors import Unfinished, UserError
from snugfit.progress import Progress
from snugfit.storage.http_ranges import RUN_AGAIN, NetworkError
from snugfit.storage.hub import no_bars

LARGE_BYTES = 50_000_000  # files from this size on are sent one after another, so that progress shows
_LOGIN = "Log in with `hf auth login` (or HF_TOKEN), with a token that may write there."


@dataclass(frozen=True)
class RemoteState:
    """A repository as it is: whether it is private, and its files' names; None for one that does not exist."""

    private: bool
    files: frozenset[str]


def read_remote(repo: str) -> RemoteState | None:
    """The state of a repository, None where this user can see none; UserError where the Hub cannot be asked."""
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(repo)
    except RepositoryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, NetworkError, OSError) as error:
        raise _as_user_error(error, repo) from None
    siblings = info.siblings or []
    return RemoteState(bool(info.private), frozenset(entry.rfilename for entry in siblings))


def upload(repo: str, files: Mapping[str, Path], *, private: bool, message: str, progress: Progress) -> str:
    """Upload `files` (name in the repository -> path here), a new repository is private or not; the commit's address.

    Unfinished where the network or the Hub fails: what it has it keeps, and the same call resumes.
    """
    api = HfApi(endpoint=constants.ENDPOINT)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    small = [operation for operation in operations if operation.upload_info.size < LARGE_BYTES]
    batches = [[operation] for operation in operations if operation not in small] + ([small] if small else [])
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        with no_bars(), progress.bar(len(batches), "uploads") as advance:
            for batch in batches:
                api.preupload_lfs_files(repo, batch, repo_type="model", free_memory=False)
                advance()
            commit = api.create_commit(repo, operations, commit_message=message, repo_type="model")
    except (HfHubHTTPError, HFValidationError, NetworkError, OSError, RuntimeError, ValueError) as error:
        raise _as_user_error(error, repo) from None
    return str(commit.commit_url)


def stale_weights(remote: RemoteState, names: Sequence[str]) -> list[str]:
    """Weight files and indexes of the repository that are not among `names`: engines would load them as well."""
    kept = set(names)
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
    return sorted(name for name in remote.files if name not in kept and name.endswith(endings))


def _as_user_error(error: Exception, repo: str) -> UserError:
    """What the Hub or the network said; an upload can be resumed unless it is refused."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, HFValidationError):
        return UserError(
            "not the id of a repository.", code="option-invalid", where="repo", remedy="An id is org/name."
        )
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403, 404):
            return UserError(f"the Hub refuses access (HTTP {status}).", code="hub-refused", where=repo, remedy=_LOGIN)
        return Unfinished(f"the Hub answers HTTP {status}.", code="hub-unreachable", where=repo, remedy=RUN_AGAIN)
    place = re.sub(r"//[^/]*@", "//", constants.ENDPOINT)
    reason = " ".join(str(cause).split())[:200] or type(cause).__name__
    what = f"{place} cannot be reached, or broke off ({reason})."
    return Unfinished(what, code="hub-unreachable", where=repo, remedy=RUN_AGAIN)
