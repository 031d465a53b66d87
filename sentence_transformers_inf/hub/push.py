"""Push a checkpoint and its card to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from sentence_transformers_inf.hub.card import RESULTS_FILE, is_generated, model_card
from sentence_transformers_inf.hub.errors import claim_repo, hub_errors
from sentence_transformers_inf.modules import load_instruction_model
from sentence_transformers_inf.recipe import RECIPE_FILE, model_files, read_recipe

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
NOT_PUSHED = ["eval/*", "runs/*", "checkpoint-*/*", ".cache/*", *_PICKLES]
"""Patterns of the files of a run that are not its model's."""


def check_saved(folder: Path) -> None:
    """Refuse a folder that may not be pushed.

    Raises:
        FileNotFoundError: It holds no saved model.
        ValueError: Its run is not finished, or it holds pickled weights.
    """
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder}: there is no saved model here")
    if (recipe := read_recipe(folder)) is not None and not recipe.get("finished", False):
        raise ValueError(f"{folder}: the training is not finished; give the same train command again")
    pickled = [path for pattern in _PICKLES for path in model_files(folder, pattern) if path.name != "training_args.bin"]
    if pickled:
        raise ValueError(f"{pickled[0]}: pickled weights are not pushed; save the model in safetensors (save_pretrained)")


def push_model(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload the model",
) -> str:
    """Push a saved model and its card; repeating it, after an interruption too, ends in the same repository.

    The card names the model by ``repo``. One that was edited by hand is pushed as it is.

    Args:
        folder: The saved model, in safetensors.
        repo: ``user/name``.
        public: Make the repository public; else it is private (one that exists keeps its visibility, unless it is made
            public).
        revision: Branch to push to.
        token: ``None``: that of the login.
        commit_message: Of the model's files.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: ``folder`` holds no saved model.
        ValueError: Its run is not finished, or it holds pickled weights.
        HubError: The Hub refuses.
    """
    folder = Path(folder)
    check_saved(folder)
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else None
    if card is None or is_generated(card):
        card = model_card(folder, repo, load_instruction_model(folder)).content
    url = claim_repo(repo, "model", public=public, revision=revision, token=token)
    api = HfApi(token=token)
    with hub_errors(repo):
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message,
            ignore_patterns=[*NOT_PUSHED, RECIPE_FILE, RESULTS_FILE, "README.md"],
        )  # fmt: skip
        api.upload_file(
            repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md", revision=revision,
            commit_message="Write the model card",
        )  # fmt: skip
    return url
