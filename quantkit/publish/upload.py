"""To the Hub: weight files one after the other, then everything in a single commit.

Files go to the Hub's storage by what they hold, and only the commit at the end shows them. An upload that breaks off leaves the repository
as it was; the same command goes on, and what the storage has is not sent again.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

from quantkit import __version__
from quantkit.errors import PublishError
from quantkit.publish.artefact import TOKEN, Artefact, read_json
from quantkit.publish.card import version
from quantkit.publish.evaluation import passed, verdict
from quantkit.publish.manifest import CARD, NAME
from quantkit.publish.verify import Verified
from quantkit.report import gigabytes

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Package:
    """What goes up: files of one folder, and the commit's message."""

    folder: Path
    files: tuple[str, ...]
    weights: tuple[str, ...]  # of the files, those that are large
    bytes: int
    message: str
    description: str

    def lines(self) -> list[str]:
        """What would go, for people."""
        sizes = [f"  {name:44} {(self.folder / name).stat().st_size:>16,} bytes" for name in self.files]
        return [f"{len(self.files)} files, {self.bytes:,} bytes = {gigabytes(self.bytes)}", *sizes, f"commit: {self.message}"]


def package(artefact: Artefact) -> Package:
    """The files that the manifest lists, and the manifest itself; nothing else ever leaves the folder."""
    weights = tuple(path.name for path in artefact.weights)
    files = tuple(sorted([*artefact.manifest["files"], NAME], key=lambda name: (name not in weights, name)))
    recipe = artefact.manifest["recipe"]
    message = f"{artefact.manifest['model']}: {recipe['name']} as {artefact.format}, version {version(artefact.manifest)}"
    size = sum((artefact.folder / name).stat().st_size for name in files)
    return Package(artefact.folder, files, weights, size, message, f"{recipe['description']}\n\nMade with quantkit {__version__}.")


def refusals(artefact: Artefact, verified: Verified) -> list[str]:
    """Why this folder should not be published: no card, something off, a gate that failed. One line each."""
    found = [] if (artefact.folder / CARD).is_file() else [f"{CARD}: missing; quantkit card {artefact.folder} makes one"]
    found += [f"{one.check}: {one.text}" for one in verified.findings if one.state == "off" and not one.text.startswith(f"{CARD}: missing")]
    if not passed(artefact.judged):
        found.append(f"gate: {verdict(artefact.judged)}; the evaluation stands in {artefact.folder.parent}")
    return found


def check_name(repo_id: str) -> None:
    """
    Raises:
        PublishError: it is no owner/name.
    """
    if not _REPO.fullmatch(repo_id):
        raise PublishError(f"--repo-id {repo_id!r}: owner/name is expected")


def upload(
    package: Package,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    collection: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """Create or update a repository, and return the commit's address.

    Args:
        package: what goes.
        repo_id: owner/name.
        private: for a repository that does not exist yet; None: the account's default.
        revision: a branch, made where it does not exist; None: main.
        collection: a collection's slug (owner/title-id), or a title, under which one is made for the repository's owner.
        endpoint, token: of the Hub; None: huggingface_hub's own (HF_ENDPOINT; HF_TOKEN or the stored login).
        tell: is told of each file.

    Raises:
        PublishError: the name is none, or the Hub cannot be reached, refuses or breaks off. It never holds a token.
    """
    check_name(repo_id)
    api = HfApi(endpoint=endpoint, token=token, library_name="quantkit", library_version=__version__)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        api.create_repo(repo_id, exist_ok=True, private=private)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(package.folder / name)) for name in package.files]
        for number, operation in enumerate(operations):
            if operation.path_in_repo in package.weights:
                tell(f"{operation.path_in_repo} ({number + 1} of {len(package.weights)} weight files)")
                api.preupload_lfs_files(repo_id, [operation], revision=revision)
        leftovers = [CommitOperationDelete(name) for name in _left_over(api, repo_id, revision, package.files)]
        tell("commit")
        commit = api.create_commit(
            repo_id, [*operations, *leftovers], commit_message=package.message, commit_description=package.description, revision=revision
        )
        if collection:
            _collect(api, collection, repo_id)
    except Exception as problem:  # network, rights, names, quotas: the library raises a score of kinds
        raise PublishError(f"{repo_id}: {_in_one_line(problem, token)}") from None
    return str(commit.commit_url)


def _left_over(api: HfApi, repo_id: str, revision: str | None, files: Sequence[str]) -> list[str]:
    """Files of an earlier version of ours that this one does not have, an old shard say. What others put there is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            earlier = read_json(Path(api.hf_hub_download(repo_id, NAME, revision=revision, local_dir=folder)))
        except (RemoteEntryNotFoundError, PublishError):
            return []
    there = set(api.list_repo_files(repo_id, revision=revision))
    return sorted(name for name in earlier.get("files", ()) if name not in files and name in there)


def _collect(api: HfApi, collection: str, repo_id: str) -> None:
    slug = collection
    if "/" not in collection:
        slug = api.create_collection(title=collection, namespace=repo_id.partition("/")[0], exists_ok=True).slug
    api.add_collection_item(slug, item_id=repo_id, item_type="model", exists_ok=True)


def _in_one_line(problem: BaseException, token: str | None) -> str:
    """What went wrong and what to do, without a token."""
    cause = problem
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):  # an upload's error wraps what the network said
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        if status in (401, 403):
            return f"the Hub says no ({status}); log in with `hf auth login`, or give HF_TOKEN one with write access to it"
        said = " ".join(str(cause.server_message or cause).split())
        return f"the Hub answers {status} ({_without_token(said, token)[:160]}); the same command goes on where this one stopped"
    if isinstance(cause, HFValidationError):
        return _without_token(" ".join(str(cause).split()), token)[:200]
    said = _without_token(" ".join(str(cause).split()), token)[:160]
    return f"the upload broke off ({type(cause).__name__}: {said}); the same command goes on, what is there is not sent again"


def _without_token(text: str, token: str | None) -> str:
    for secret in filter(None, (token, huggingface_hub.get_token())):
        text = text.replace(secret, "(token)")
    return TOKEN.sub("(token)", text)
