"""Encoders and decoders, tiny and of random weights, go the whole way: train, save, load, encode, evaluate."""

import math
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import OBJECTIVES, InstructionContrastiveLoss
from sentence_transformers_inf.modules import InstructionTransformer, add_lora, encoder_of, encoders_of, two_towers
from sentence_transformers_inf.modules.instruction_transformer import _unpadded_rows
from sentence_transformers_inf.training import train

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|endoftext|>"]
FAMILIES = {"bert": (BertConfig, "mean"), "modernbert": (ModernBertConfig, "cls"), "qwen": (Qwen2Config, "lasttoken"),
            "llama": (LlamaConfig, "lasttoken")}  # fmt: skip
PAIRS = [
    {"instruction": "For young children, in simple words.", "query": "why is the sky blue"},
    {"instruction": "Brief.", "query": "income tax rates for people who moved abroad during the year"},
    {"query": "vaccines"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    load_records("mini", "train").select(range(8)).to_json(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    """The folder of a model of the family, as a user would have it from the Hub."""
    kind, pooling = FAMILIES[request.param]
    records = load_records("mini", "validation")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [*records["document"], *records["instruction_positive"]],
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL),
    )
    decoder = pooling == "lasttoken"
    if not decoder:
        special = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    places = {"pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 4, "max_position_embeddings": 512}
    torch.manual_seed(0)
    automatic = AutoModelForCausalLM if decoder else AutoModel
    model = automatic.from_config(kind(vocab_size=tokenizer.get_vocab_size(), **SIZE, **places))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "raw")
    names = {} if decoder else {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|endoftext|>", model_max_length=256, **names
    ).save_pretrained(folder / "raw")  # fmt: skip
    if decoder:
        return folder / "raw"
    SentenceTransformer(modules=[Transformer(str(folder / "raw")), Pooling(32, pooling)]).save(str(folder / "model"))
    return folder / "model"


WAYS = [
    ("concatenation", 0, 1),
    ("paper", 0, 1),
    ("gated", 0, 1),
    ("concatenation", 4, 1),
    ("gated", 4, 1),
    ("concatenation", 0, 2),
    ("concatenation", 4, 2),
    ("gated", 4, 2),
]
OTHERS = [objective for objective in OBJECTIVES if objective != "multi_P_I"]


@pytest.mark.parametrize(
    ("interaction", "lora_r", "towers", "objective"),
    [*((*way, "multi_P_I") for way in WAYS), *((*way, other) for way, other in zip([*WAYS, *WAYS], OTHERS))],
)
def test_a_backbone_trains_saves_loads_encodes_and_is_measured(
    backbone, interaction, lora_r, towers, objective, data, tmp_path
):
    options = {"interaction": interaction, "frozen_layers": 0, "batch_size": 4, "epochs": 1, "show_progress": False}
    options |= {
        "lora_r": lora_r,
        "encoders": "shared" if towers == 1 else "separate",
        "learning_rate": 1e-2,
        "objective": objective,
    }
    trained = train(data, backbone, tmp_path / "model", **options).eval()
    before = load_instruction_model(backbone, interaction=interaction).eval()
    loaded = load_instruction_model(tmp_path / "model").eval()
    for encode in ("encode", "encode_query", "encode_document"):
        inputs = [*PAIRS, "a passage"] if encode != "encode_document" else ["a passage", "another"]
        embeddings = getattr(loaded, encode)(inputs)
        assert np.allclose(embeddings, getattr(trained, encode)(inputs), atol=1e-6)
        assert not np.allclose(embeddings, getattr(before, encode)(inputs), atol=1e-4)
    same = np.allclose(loaded.encode_query(["a passage"]), loaded.encode_document(["a passage"]), atol=1e-5)
    assert same == (towers == 1)
    decoder = loaded.tokenizer.sep_token is None
    assert encoder_of(loaded)[0].template == ("{query} {instruction}" if decoder else "{query} [SEP] {instruction}")
    means = measure(loaded, load_records(data)).means()
    assert all(math.isfinite(value) for value in means.values())
    if lora_r and towers == 1:
        assert (tmp_path / "model" / "adapter_model.safetensors").stat().st_size < 2**16


def test_a_lora_sits_on_the_feed_forward_layers(backbone):
    encoder = load_instruction_model(backbone)[0]
    add_lora(encoder, 2)
    layers = {name.rpartition(".lora_A")[0] for name, weight in encoder.model.named_parameters() if weight.requires_grad}
    by_family = {
        "bert": ("encoder.layer", ("intermediate.dense", "output.dense")),
        "modernbert": ("layers", ("mlp.Wi", "mlp.Wo")),
        "llama": ("layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    }
    kind = encoder.model.config.model_type
    stack, names = by_family["llama" if kind == "qwen2" else kind]
    assert layers - {""} == {f"{stack}.{number}.{name}" for number in range(2) for name in names}


def test_a_merged_lora_is_the_model_with_it(backbone, data, tmp_path):
    options = {"lora_r": 4, "batch_size": 4, "epochs": 1, "show_progress": False}
    apart = train(data, backbone, tmp_path / "apart", **options).eval()
    train(data, backbone, tmp_path / "merged", merge_base=True, **options)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    loaded = load_instruction_model(tmp_path / "merged").eval()
    assert np.allclose(loaded.encode([*PAIRS, "a passage"]), apart.encode([*PAIRS, "a passage"]), atol=1e-5)


def test_a_decoder_gets_what_its_pooling_needs(backbone, tmp_path):
    model = load_instruction_model(backbone)
    tokens = model.preprocess(["a passage", "a much longer passage about taxes"])
    last = [row[mask.bool()][-1].item() for row, mask in zip(tokens["input_ids"], tokens["attention_mask"])]
    decoder = model[1].pooling_mode == "lasttoken"
    assert decoder == (model[0].model.config.model_type in ("qwen2", "llama"))
    assert last == [model.tokenizer.eos_token_id if decoder else model.tokenizer.sep_token_id] * 2
    model.max_seq_length = 4
    cut = model.preprocess(["a much longer passage about taxes"])["input_ids"][0]
    assert len(cut) == 4
    assert cut[-1] == last[0]
    model.max_seq_length = 64
    model.save(str(tmp_path / "saved"))
    assert np.allclose(SentenceTransformer(str(tmp_path / "saved")).encode(["a passage"]), model.encode(["a passage"]))


def test_checkpointed_activations_change_nothing_but_memory(backbone, data, tmp_path):
    options = {"batch_size": 4, "epochs": 1, "dropout": 0.0, "frozen_layers": 0, "show_progress": False}
    found = []
    for checkpointing in (False, True):
        model = train(data, backbone, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing, **options)
        assert not any(encoder.model.is_gradient_checkpointing for encoder in encoders_of(model))
        found.append(model.eval().encode([*PAIRS, "a passage"]))
    assert np.allclose(*found, atol=1e-4)


def test_e5_has_its_prompts_in_training_and_use(base, data, tmp_path):
    shutil.copytree(base, tmp_path / "e5-tiny")
    trained = train(data, tmp_path / "e5-tiny", tmp_path / "m", max_records=4, batch_size=4, epochs=1, show_progress=False)
    loaded = load_instruction_model(tmp_path / "m")
    for model in (trained.eval(), loaded.eval()):
        joined = model.encode("query: vaccines [SEP] Brief.", task="instructed")
        assert np.allclose(model.encode_query({"instruction": "Brief.", "query": "vaccines"}), joined, atol=1e-6)
        assert np.allclose(model.encode_document("a passage"), model.encode("passage: a passage"), atol=1e-6)


def test_training_sees_the_prompts_of_use(base, data, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "e5-tiny")
    seen = set()
    forward = InstructionTransformer.forward

    def look(self, features, **kwargs):
        if self.training:
            seen.update(self.tokenizer.decode(row["input_ids"][1:3]) for row in _unpadded_rows(features))
        return forward(self, features, **kwargs)

    monkeypatch.setattr(InstructionTransformer, "forward", look)
    options = {"max_records": 4, "batch_size": 4, "epochs": 1, "show_progress": False, "lora_r": 2}
    lines = []
    train(data, tmp_path / "e5-tiny", tmp_path / "m", say=lines.append, **options)
    assert seen == {"query :", "passage :"}
    inferred, _, precision = lines[0].rpartition("; ")
    assert inferred == (
        "Base: BertModel; mean pooling; padding on the right; prompt 'query: ' before a query; prompt 'passage: ' before a "
        "document; LoRA on intermediate.dense, output.dense"
    )
    assert precision.split()[0] in ("float32", "bfloat16")


@pytest.mark.parametrize("interaction", ["concatenation", "paper", "gated"])
def test_the_side_of_the_padding_does_not_matter(backbone, interaction):
    model = load_instruction_model(backbone, interaction=interaction).eval()
    alone = np.concatenate([model.encode([item]) for item in [*PAIRS, "a passage"]])
    absolute = model[0].model.config.model_type == "bert"  # counts positions from the padding: BERT is padded on the right
    for side in ("right",) if absolute else ("left", "right"):
        model.tokenizer.padding_side = side
        assert np.allclose(model.encode([*PAIRS, "a passage"]), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("interaction", "lora_r", "towers"),
    [("concatenation", 0, 1), ("gated", 0, 1), ("gated", 4, 1), ("gated", 0, 2), ("concatenation", 4, 2)],
)
def test_every_objective_reaches_the_encoder(backbone, interaction, lora_r, towers, few_records):
    model = load_instruction_model(backbone, interaction=interaction)
    model = two_towers(model) if towers == 2 else model
    if lora_r:
        for encoder in encoders_of(model):
            add_lora(encoder, lora_r)
    rows = training_dataset(few_records)
    features = [model.preprocess(rows[column]) for column in rows.column_names]
    for objective in OBJECTIVES:
        model.zero_grad()
        loss = InstructionContrastiveLoss(model, objective, plain_weight=0.5)([dict(column) for column in features])
        loss.backward()
        for encoder in encoders_of(model):
            norms = [float(weight.grad.norm()) for weight in encoder.parameters() if weight.grad is not None]
            assert math.isfinite(sum(norms))
            assert sum(norms) > 0, objective
