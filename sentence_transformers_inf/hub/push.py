"""Push a checkpoint and its card to the Hugging Face Hub: what makes up a Sentence Transformers model, and nothing else."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from sentence_transformers_inf.hub.card import RESULTS_FILE, is_generated, model_card
from sentence_transformers_inf.hub.errors import claim_repo, hub_errors
from sentence_transformers_inf.modules import load_instruction_model
from sentence_transformers_inf.modules.adapter import ADAPTER_FILE
from sentence_transformers_inf.reading import read_text
from sentence_transformers_inf.recipe import LOCK_FILE, RECIPE_FILE, model_files, read_json, read_recipe

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_MODEL_FILE = re.compile(
    r"modules\.json|config(_sentence_transformers)?\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|(sentence_\w+|tokenizer|preprocessor|processor|generation|adapter|router|instruction|wordembedding)_config\.json"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
    rf"|{re.escape(ADAPTER_FILE)}|instruction_query_attention\.json|(LICENSE|NOTICE)(\.(md|txt))?"
)
"""The names of what belongs to a model: configurations, weights, tokenizers, licences."""

_CODE_FILE = re.compile(r"(configuration|modeling|tokenization|processing)_\w+\.py")
"""The names of the code that a base model brings, beside the configuration that asks for it."""

_OF_THE_RUN = {RECIPE_FILE, RESULTS_FILE, LOCK_FILE, "README.md", "training_args.bin", "flips.svg", ".gitattributes"}
_FOLDERS_OF_THE_RUN = {"eval", "runs", ".cache"}


def check_saved(folder: Path) -> None:
    """Refuse a folder that may not be pushed.

    Raises:
        FileNotFoundError: It holds no saved model.
        ValueError: Its run is not finished.
    """
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder}: there is no saved model here: name a model's folder")
    if (recipe := read_recipe(folder)) is not None and not recipe.get("finished", False):
        raise ValueError(f"{folder}: the training is not finished; give the same train command again")


def push_model(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload the model",
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda line: None,
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
        trust_remote_code: See :func:`~sentence_transformers_inf.load_instruction_model`; to write the card.
        log: Called with a line about files that are no part of a model and stay here.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: ``folder`` holds no saved model.
        ValueError: Its run is not finished, it holds pickled files, or a file of the model is a link.
        HubError: The Hub refuses.
    """
    folder = Path(folder)
    check_saved(folder)
    parts, strays = model_parts(folder)
    if strays:
        log(f"{len(strays)} files are no part of a model and are not pushed: {', '.join(strays)[:200]}")
    path = folder / "README.md"
    card = read_text(path) if path.exists() else None
    if card is None or is_generated(card):
        loaded = load_instruction_model(folder, trust_remote_code=trust_remote_code)
        card = model_card(folder, repo, loaded).content
    url = claim_repo(repo, "model", public=public, revision=revision, token=token)
    api = HfApi(token=token)
    with hub_errors(repo):
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message,
            allow_patterns=parts,
        )  # fmt: skip
        api.upload_file(
            repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md", revision=revision,
            commit_message="Write the model card",
        )  # fmt: skip
    return url


def model_parts(folder: Path) -> tuple[list[str], list[str]]:
    """What is pushed of a folder, and what is not although no run left it there, by their paths in it.

    Raises:
        ValueError: A file is pickled, or what would be pushed is a link, which may lead to anything.
    """
    folders = {"."}
    for entry in read_json(folder / "modules.json", list, ("path",)):
        folders.add(os.path.normpath(str(entry["path"])))
    for path in model_files(folder, "router_config.json"):
        parent = path.parent.relative_to(folder)
        folders |= {os.path.normpath(parent / name) for name in read_json(path, dict, ("types",))["types"]}
    parts: list[str] = []
    strays: list[str] = []
    for path in sorted(model_files(folder, "*")):
        inside = path.relative_to(folder)
        belongs = str(inside.parent) in folders and (
            _MODEL_FILE.fullmatch(path.name) or (_CODE_FILE.fullmatch(path.name) and _asks_for_code(path.parent))
        )
        if path.is_symlink() and (belongs or str(inside) in folders | _OF_THE_RUN):
            raise ValueError(f"{path}: a link is not pushed: put the file itself there")
        if inside.parts[0] in _FOLDERS_OF_THE_RUN or str(inside) in _OF_THE_RUN:
            continue
        if path.is_dir():
            continue
        if path.suffix.lower() in _PICKLES:
            raise ValueError(f"{path}: pickled weights are not pushed; save the model in safetensors (save_pretrained)")
        (parts if belongs else strays).append(inside.as_posix())
    return parts, strays


def _asks_for_code(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "auto_map" in read_json(path)
