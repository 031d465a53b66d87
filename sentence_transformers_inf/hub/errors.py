"""What the Hub refuses, in one line."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from sentence_transformers_inf.compat import HTTPError


class HubError(OSError):
    """The Hub refuses or cannot be reached; the message names the repository and the remedy, and no token."""


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Raise :class:`HubError` where ``huggingface_hub`` does not get what it asks for of ``user/name``."""
    try:
        yield
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{repo}: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """What the Hub said, without a token or the address of a request."""
    if isinstance(error, HFValidationError):
        return "expected user/name"
    if isinstance(error, GatedRepoError):
        return "access to this repository is restricted; ask for it on its page"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository for you; check the name, and log in with `hf auth login`"
    if not isinstance(error, HfHubHTTPError):
        return "the Hub cannot be reached; run the same command again when it can"
    status = error.response.status_code
    if status == 401:
        return "the Hub does not accept the token (status 401); log in with `hf auth login`"
    if status == 403:
        return "the token may not write here (status 403); check the name and the token's rights"
    message = f" ({error.server_message})" if error.server_message else ""
    return f"the Hub answers with status {status}{message}; run the same command again"


def claim_repo(
    repo: str, repo_type: str, *, public: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Create a repository, or make sure that it is there and may be written to.

    Args:
        repo: ``user/name``.
        repo_type: ``model``, ``dataset`` or ``space`` (of Gradio).
        public: Make it public; else a new one is private, and one that exists keeps its visibility.
        revision: A branch, created where it is missing.
        token: ``None``: that of the login.

    Returns:
        Its address.

    Raises:
        HubError: The Hub refuses.
    """
    if repo.count("/") != 1:
        raise HubError(f"{repo}: expected user/name")
    api = HfApi(token=token)
    with hub_errors(repo):
        sdk = "gradio" if repo_type == "space" else None
        url = str(api.create_repo(repo, repo_type=repo_type, private=not public, exist_ok=True, space_sdk=sdk))
        if public:
            api.update_repo_settings(repo, repo_type=repo_type, private=False)
        if revision is not None:
            api.create_branch(repo, repo_type=repo_type, branch=revision, exist_ok=True)
    return url
