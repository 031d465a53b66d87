"""A built corpus to the Hub: Parquet for every configuration, and a dataset card filled from the run's report."""

import importlib.resources
import itertools
import tempfile
from pathlib import Path
from typing import Any

import datasets
import jinja2
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard, DatasetCardData, hf_hub_download

from dataset_builder.diversity import count_ngrams
from dataset_builder.inf_ir import BUILD_AGAIN, InFIR
from dataset_builder.quality import normalised
from sentence_transformers_inf.escaping import markdown_environment
from sentence_transformers_inf.hub.errors import claim_repo, hub_errors
from sentence_transformers_inf.reading import RecordError
from sentence_transformers_inf.recipe import read_json

_SAMPLE = 10_000
"""So many texts of a column are looked at for the card's measures of diversity."""

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def build_splits(source: str, config: str, cache: Path) -> datasets.DatasetDict:
    """Build a configuration of :class:`~dataset_builder.inf_ir.InFIR`; splits without a record are left out.

    Args:
        source: ``mini`` or the output folder of ``inf-ir build``.
        config: ``mini``, ``default`` or ``unfiltered``.
        cache: Where the Arrow files go.

    Raises:
        FileNotFoundError: There is no ``train.parquet``.
        ValueError: One is damaged.
    """
    folder = None if config == "mini" else str(Path(source).resolve())
    builder = InFIR(config_name=config, cache_dir=str(cache), data_dir=folder)
    try:
        builder.download_and_prepare(verification_mode="no_checks")
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, RecordError):
            raise error.__cause__ from None
        raise ValueError(f"{source}, {config}: {error.__cause__ or error}: {BUILD_AGAIN}") from error
    names = [name for name, split in builder.info.splits.items() if split.num_examples]
    return datasets.DatasetDict({name: builder.as_dataset(split=name) for name in names})


def publish(source: str, repo: str, *, public: bool = False, revision: str | None = None) -> str:
    """Push a corpus to the Hub; repeating it, after an interruption too, ends in the same repository.

    Args:
        source: ``mini`` or the output folder of ``inf-ir build``.
        repo: ``user/name``.
        public: Make the repository public; else it is private (one that exists keeps its visibility, unless it is
            made public).
        revision: Branch to push to.

    Returns:
        The address of the dataset.

    Raises:
        HubError: The Hub refuses.
        FileNotFoundError: ``source`` holds no build.
        ValueError: It holds no records, or its files are damaged. Nothing was sent.
    """
    configs = ["mini"] if source == "mini" else ["default", "unfiltered"]
    with tempfile.TemporaryDirectory() as cache:
        built = {config: build_splits(source, config, Path(cache)) for config in configs}
        if not any(len(splits) for splits in built.values()):
            raise ValueError(f"{source}: there are no records to publish")
        card = dataset_card(source, repo, built)
        url = claim_repo(repo, "dataset", public=public, revision=revision)
        with hub_errors(repo):
            for config, splits in built.items():
                if splits:
                    name = "default" if config == "mini" else config
                    splits.push_to_hub(
                        repo, config_name=name, set_default=name == "default", private=not public, revision=revision,
                        commit_message=f"Upload {name}",
                    )  # fmt: skip
            pushed = hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
            of_files = DatasetCard.load(pushed).data.to_dict()  # its configurations and features
            card.data = DatasetCardData(**of_files | card.data.to_dict())
            card.push_to_hub(repo, repo_type="dataset", revision=revision, commit_message="Write the dataset card")
    return url


def dataset_card(source: str, repo: str, built: dict[str, datasets.DatasetDict]) -> DatasetCard:
    """The card of a corpus, from ``dataset_card.md`` beside this file.

    Args:
        built: The splits by configuration.

    Raises:
        FileNotFoundError: There is no ``report.json``.
        ValueError: It is damaged, or is no report of a build.
    """
    is_mini, path, report, statement = source == "mini", Path(source) / "report.json", None, None
    if is_mini:
        text = (importlib.resources.files("dataset_builder") / "data" / "README.md").read_text(encoding="utf-8")
        statement = text.split("## Data statement", 1)[1].strip()
    elif path.exists():
        report = read_json(path)
    else:
        raise FileNotFoundError(f"{path}: there is no report, as inf-ir build writes it: {BUILD_AGAIN}")
    first = built["mini" if is_mini else "default"]
    total = sum(len(data) for data in first.values())
    metadata: dict[str, Any] = {
        "language": ["en"],
        "license": "cc0-1.0" if is_mini else "other",
        "task_categories": ["text-retrieval", "sentence-similarity"],
        "tags": ["instruction-following", "retrieval", "hard-negatives", "sentence-transformers"],
        "size_categories": [next((name for limit, name in _SIZES if total < limit), "1M<n<10M")],
        "pretty_name": repo.split("/")[-1],
    }
    if not is_mini:
        metadata["license_name"] = "see-the-source-of-the-pairs"
    text = Path(__file__).with_name("dataset_card.md").read_text(encoding="utf-8")
    template = markdown_environment(undefined=jinja2.StrictUndefined).from_string(text)
    known = {
        "card_data": DatasetCardData(**metadata).to_yaml(),
        "title": repo.split("/")[-1],
        "repo": repo,
        "counts": {
            "default" if config == "mini" else config: {name: len(data) for name, data in splits.items()}
            for config, splits in built.items()
            if splits
        },
        "example": next(iter(first.values()))[0] if len(first) else None,
        "diversity": _diversity(first),
        "report": report,
        "statement": statement,
    }
    try:
        return DatasetCard(template.render(known))
    except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: this is no report of inf-ir build ({error}): {BUILD_AGAIN}") from error


def _diversity(splits: datasets.DatasetDict) -> dict[str, dict[str, float]]:
    """By column: the number of texts looked at, the share of distinct ones, distinct-1 and distinct-2."""
    found = {}
    for column in ("query_positive", "query_negative", "instruction_positive", "instruction_negative"):
        texts = list(itertools.islice((text for data in splits.values() for text in data[column] if text), _SAMPLE))
        if texts:
            measures = {"distinct": len({normalised(text) for text in texts}) / len(texts)}
            measures |= {f"distinct_{n}": count_ngrams(texts, n).distinct_share for n in (1, 2)}
            found[column] = {"texts": len(texts), **measures}
    return found
