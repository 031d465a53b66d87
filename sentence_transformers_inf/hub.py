"""Checkpoints to the Hugging Face Hub, and one line about what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

HUB_ERRORS = (HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
"""What ``huggingface_hub`` raises where it does not get what it asked for; see :func:`hub_problem`."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_NOT_PUSHED = ["eval/*", "checkpoints/*", ".cache/*", *_PICKLES]


class HubError(OSError):
    """The Hub refuses or cannot be reached; the message names the repository and the remedy, and no token."""


def hub_problem(repo: str, error: Exception) -> str:
    """One line about what the Hub said, without a token or the address of a request.

    Args:
        repo: ``user/name``.
        error: One of :data:`HUB_ERRORS`.
    """
    if isinstance(error, HFValidationError):
        return f"{repo}: expected user/name"
    if isinstance(error, GatedRepoError):
        return f"{repo}: access to this repository is restricted; ask for it on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo}: there is no such repository for you; check the name, and log in with `hf auth login`"
    if not isinstance(error, HfHubHTTPError):
        return f"{repo}: the Hub cannot be reached; run the same command again when it can"
    status = error.response.status_code
    if status == 401:
        return f"{repo}: the Hub does not accept the token (status 401); log in with `hf auth login`"
    if status == 403:
        return f"{repo}: the token may not write here (status 403); check the name and the token's rights"
    message = f" ({error.server_message})" if error.server_message else ""
    return f"{repo}: the Hub answers with status {status}{message}; run the same command again"


def claim_repo(repo: str, repo_type: str, *, public: bool = False, revision: str | None = None) -> str:
    """Create a repository, or make sure that it is there and may be written to.

    Args:
        repo: ``user/name``.
        repo_type: ``model`` or ``dataset``.
        public: Make it public; else a new one is private, and one that exists keeps its visibility.
        revision: A branch, created where it is missing.

    Returns:
        Its address.

    Raises:
        HubError: The Hub refuses.
    """
    if repo.count("/") != 1:
        raise HubError(f"{repo}: expected user/name")
    api = HfApi()
    try:
        url = str(api.create_repo(repo, repo_type=repo_type, private=not public, exist_ok=True))
        if public:
            api.update_repo_settings(repo, repo_type=repo_type, private=False)
        if revision is not None:
            api.create_branch(repo, repo_type=repo_type, branch=revision, exist_ok=True)
    except HUB_ERRORS as error:
        raise HubError(hub_problem(repo, error)) from error
    return url


def push_model(folder: str | Path, repo: str, *, public: bool = False, revision: str | None = None) -> str:
    """Push a saved model and its card; repeating it, after an interruption too, ends in the same repository.

    The card names the model by ``repo``. One that was changed by hand is pushed as it is.

    Args:
        folder: The saved model, in safetensors.
        repo: ``user/name``.
        public: Make the repository public; else it is private (one that exists keeps its visibility, unless it is made
            public).
        revision: Branch to push to.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: ``folder`` holds no saved model.
        ValueError: Its run is not finished, or it holds pickled weights.
        HubError: The Hub refuses.
    """
    # These import PyTorch, which publishing data does without.
    from sentence_transformers_inf.model_card import RECIPE_FILE, RESULTS_FILE, model_card
    from sentence_transformers_inf.modules import load_instruction_model

    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder}: there is no saved model here")
    recipe = folder / RECIPE_FILE
    if recipe.exists() and not json.loads(recipe.read_text(encoding="utf-8")).get("finished", False):
        raise ValueError(f"{folder}: the training is not finished; give the same train command again")
    if pickled := [path for pattern in _PICKLES for path in folder.rglob(pattern) if "checkpoints" not in path.parts]:
        raise ValueError(f"{pickled[0]}: pickled weights are not pushed; save the model in safetensors (save_pretrained)")
    model = load_instruction_model(folder)
    card = model_card(folder, repo, model).content
    if (path := folder / "README.md").exists():
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)$", text, flags=re.MULTILINE)  # the folder may have had another name
        if title is None or text.strip() != model_card(folder, title[1], model).content.strip():
            card = text  # changed by hand
    url = claim_repo(repo, "model", public=public, revision=revision)
    api = HfApi()
    try:
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message="Upload the model",
            ignore_patterns=[*_NOT_PUSHED, RECIPE_FILE, RESULTS_FILE, "README.md"],
        )  # fmt: skip
        api.upload_file(
            repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md", revision=revision,
            commit_message="Write the model card",
        )  # fmt: skip
    except HUB_ERRORS as error:
        raise HubError(hub_problem(repo, error)) from error
    return url
