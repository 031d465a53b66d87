"""The page: Gradio around what the other modules of this room make."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers_inf.hub.card import RESULTS_FILE
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from sentence_transformers_inf.playground import render
from sentence_transformers_inf.playground.corpus import Corpus, ordered, read_corpus
from sentence_transformers_inf.playground.ranking import Ranker, load_rankers, problem, rank
from sentence_transformers_inf.recipe import read_json, read_recipe

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        f"the playground needs Gradio: pip install 'sentence-transformers-inf[playground]' ({error})"
    ) from error

_OPENING = (
    "wedding budget breakdown",
    "Give me general priorities in words that I can talk over with my fiancé. Shares, prices or quantities as numbers "
    "are not wanted.",
)
"""The example that the page opens with, where the corpus has it: the shipped adapter obeys, its base does not."""

_BATCH = 16
"""At most so many waiting queries are encoded together."""


def build_page(
    model: str | None = None, compare: str | None = None, corpus: str = "mini", show_progress: bool = False
) -> gr.Blocks:
    """The page, with its models loaded and its corpus encoded; :func:`launch` serves it.

    Args:
        model: See :func:`~sentence_transformers_inf.playground.ranking.load_rankers`, as for ``compare``.
        compare: The same.
        corpus: See :func:`~sentence_transformers_inf.playground.corpus.read_corpus`.
        show_progress: Show the encoding of the corpus.

    Raises:
        OSError, ValueError: A model or the corpus cannot be read; the message says which.
    """
    passages = read_corpus(corpus)
    rankers = load_rankers(model, compare, passages.passages, show_progress)
    folder = BUNDLED_ADAPTER if model is None else Path(model)
    path = folder / RESULTS_FILE
    results = read_json(path) if path.exists() else {}
    return page_of(rankers, passages, read_recipe(folder), results)


def page_of(
    rankers: Sequence[Ranker],
    corpus: Corpus,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> gr.Blocks:
    """The page on models that are loaded; see :func:`build_page`."""
    with gr.Blocks(title="Does the ranking obey?", analytics_enabled=False) as page:
        names = " against ".join(render.text(ranker.name) for ranker in reversed(rankers))
        gr.HTML(
            '<div class="about"><h1>Does the ranking obey?</h1><p>A query finds passages. An instruction says what they '
            f"should be like. See what it moves: {names}, {len(corpus.passages):,} passages.</p></div>"
        )
        with gr.Tab("Search"):
            _search_tab(rankers, corpus)
        with gr.Tab("Corpus"):
            _corpus_tab(corpus)
        with gr.Tab("Checkpoint"):
            gr.HTML(render.checkpoint(recipe, results or {}))
    return page


def launch(page: gr.Blocks, port: int | None = None, **options: Any) -> str:
    """Serve a page until the process ends, and return its address; nothing is sent elsewhere.

    Args:
        page: From :func:`build_page`.
        port: ``None``: Gradio's choice.
        **options: For Gradio's ``launch``. A Space says by itself where it listens; else it is ``server_name``.
    """
    theme = gr.themes.Default(  # with the machine's own fonts: none is fetched
        primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    _, address, _ = page.launch(
        server_port=port, share=False, quiet=True, ssr_mode=False, run_history=False, footer_links=[], max_file_size="1kb",
        enable_monitoring=False, mcp_server=False, theme=theme, css_paths=Path(__file__).with_name("page.css"), **options,
    )  # fmt: skip
    return address


def search(rankers: Sequence[Ranker], corpus: Corpus, queries: Sequence[str], instructions: Sequence[str]) -> list[str]:
    """The HTML of the rankings of each query, or of what is wrong with it."""
    asked = list(zip(queries, instructions))
    found = iter(rank(rankers, [texts for texts in asked if not problem(*texts)]))

    def shown(query: str, instruction: str) -> str:
        if wrong := problem(query, instruction):
            return render.message(wrong)
        return render.rankings(next(found), corpus, corpus.example(query, instruction), rankers[-1].exclusions(instruction))

    return [shown(*texts) for texts in asked]


def _search_tab(rankers: Sequence[Ranker], corpus: Corpus) -> None:
    def run(query: str, instruction: str) -> str:
        return search(rankers, corpus, [query], [instruction])[0]

    def run_batch(queries: list[str], instructions: list[str]) -> tuple[list[str]]:
        return (search(rankers, corpus, queries, instructions),)

    kinds = corpus.kinds_of_examples()
    opening = corpus.example(*_OPENING) or next(iter(corpus.examples), None)
    asked, told = (opening.query, opening.instruction) if opening else ("", "")

    def show(kind: str, query: str) -> tuple[str, str, str]:
        example = corpus.next_example(kind, query)
        return example.query, example.instruction, run(example.query, example.instruction)

    def turn(query: str, instruction: str) -> tuple[str, str]:
        example = corpus.example(query, instruction)
        if example is None:
            return instruction, render.message("Only examples have an opposite. Press one of the kinds for an example.")
        return example.opposite, run(query, example.opposite)

    with gr.Row(equal_height=True):
        query = gr.Textbox(
            asked, label="Query", placeholder="how do vaccines work", max_lines=3, scale=2, min_width=240, elem_id="query"
        )
        instruction = gr.Textbox(
            told,
            label="Instruction",
            placeholder="for young children",
            max_lines=6,
            scale=3,
            min_width=240,
            elem_id="instruction",
        )
    with gr.Row(elem_classes="chips"):
        button = gr.Button("Search", variant="primary", size="sm", elem_id="search")
        turned = gr.Button("⇄ Opposite instruction", size="sm", visible=bool(kinds), elem_id="opposite")
    if kinds:
        gr.HTML("<b>Examples by kind of instruction.</b> Press again for the next one.")
        with gr.Row(elem_classes="chips", elem_id="kinds"):
            chips = {kind: gr.Button(f"{kind or 'example'} ({count})", size="sm") for kind, count in kinds.items()}
    result = gr.HTML(run(asked, told) if opening else render.message("Type a query, then an instruction."), elem_id="result")
    event: dict[str, Any] = {"inputs": [query, instruction], "show_progress": "hidden"}
    asks = [button.click, query.submit, instruction.submit]
    gr.on(asks, run_batch, outputs=result, api_name="search", batch=True, max_batch_size=_BATCH, **event)
    turned.click(turn, outputs=[instruction, result], api_name="opposite", **event)
    for kind, chip in (chips if kinds else {}).items():
        chip.click(
            functools.partial(show, kind),
            query,
            [query, instruction, result],
            show_progress="hidden",
            api_visibility="private",
        )


def _corpus_tab(corpus: Corpus) -> None:
    def find(kind: str, topic: str, words: str) -> str:
        return render.corpus_list(corpus, corpus.find(kind, topic, words[:1000]))

    def choices(values: Sequence[str], word: str) -> list[tuple[str, str]]:
        return [(f"any {word}", ""), *((value, value) for value in values if value)]

    with gr.Row():
        kind = gr.Dropdown(
            choices(ordered(corpus.kinds), "kind"), value="", label="Kind", visible=any(corpus.kinds), elem_id="kind"
        )
        topic = gr.Dropdown(
            choices(sorted({*corpus.topics}), "topic"), value="", label="Topic", visible=any(corpus.topics), elem_id="topic"
        )
        words = gr.Textbox(label="Words in the passage", placeholder="Type words, then Enter", elem_id="words")
    listed = gr.HTML(find("", "", ""), elem_id="listed")
    gr.on(
        [kind.input, topic.input, words.submit],
        find,
        [kind, topic, words],
        listed,
        api_name="corpus",
        show_progress="hidden",
    )
