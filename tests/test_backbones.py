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
from sentence_transformers_inf.modules import add_lora, encoder_of, encoders_of, has_lora, merge_lora, two_towers
from sentence_transformers_inf.modules.tokens import unpad
from sentence_transformers_inf.training.encoders import describe
from tests.training import train, trainer

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
def folders(tmp_path_factory):
    """The folder of a model of each family, as a user would have it from the Hub; made when it is first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(params=FAMILIES)
def backbone(request, folders):
    return folders(request.param)


def make(family, folder):
    kind, pooling = FAMILIES[family]
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
    model.save_pretrained(folder / "raw")
    names = {} if decoder else {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|endoftext|>", model_max_length=256, **names
    ).save_pretrained(folder / "raw")  # fmt: skip
    if decoder:
        return folder / "raw"
    SentenceTransformer(modules=[Transformer(str(folder / "raw")), Pooling(32, pooling)]).save(str(folder / "model"))
    return folder / "model"


# Every value with each family, and every pair of values of the first three with some family.
WAYS = [
    # family, encoders ("queries": an adapter), interaction, lora_r, objective
    ("bert", "shared", "paper", 4, "multi_P_I"),
    ("bert", "separate", "gated", 0, "uni_P"),
    ("bert", "shared", "concatenation", 0, "uni_I"),
    ("bert", "queries", "gated", 4, "multi_P_IQ"),
    ("modernbert", "shared", "gated", 4, "uni_P_I"),
    ("modernbert", "separate", "paper", 0, "multi_P_I"),
    ("modernbert", "separate", "concatenation", 0, "uni_IQ"),
    ("modernbert", "queries", "concatenation", 4, "multi_I_IQ"),
    ("qwen", "shared", "concatenation", 0, "multi_P_I_IQ"),
    ("qwen", "separate", "gated", 4, "uni_I_IQ"),
    ("qwen", "separate", "concatenation", 4, "uni_P_IQ"),
    ("qwen", "queries", "paper", 0, "multi_P_I"),
    ("llama", "shared", "gated", 0, "uni_P_I_IQ"),
    ("llama", "separate", "concatenation", 4, "multi_P_I"),
    ("llama", "shared", "concatenation", 4, "multi_P_I"),
    ("llama", "queries", "paper", 4, "multi_P_I_IQ"),
]


def test_the_ways_leave_no_objective_out():
    assert {way[-1] for way in WAYS} == set(OBJECTIVES)
    for family in FAMILIES:
        own = [way for way in WAYS if way[0] == family]
        assert [len({way[place] for way in own}) for place in (1, 2, 3)] == [3, 3, 2]


@pytest.mark.parametrize(("family", "encoders", "interaction", "lora_r", "objective"), WAYS)
def test_a_backbone_trains_saves_loads_encodes_and_is_measured(
    folders, family, encoders, interaction, lora_r, objective, few_records, tmp_path
):
    backbone = folders(family)
    options = {"interaction": interaction, "lora_r": lora_r, "objective": objective, "learning_rate": 1e-2}
    options["num_train_epochs"] = 4  # a LoRA begins at zero: one step moves plain texts by about the tolerance below
    options |= {"update": "queries"} if encoders == "queries" else {"encoders": encoders, "anchor_weight": 0}
    trained = train(few_records, backbone, tmp_path / "model", save_strategy="no", **options)
    before = load_instruction_model(backbone, interaction=interaction).eval()
    loaded = load_instruction_model(tmp_path / "model").eval()
    for encode in ("encode", "encode_query", "encode_document"):
        inputs = [*PAIRS, "a passage"] if encode != "encode_document" else ["a passage", "another"]
        embeddings, was = getattr(loaded, encode)(inputs), getattr(before, encode)(inputs)
        assert np.allclose(embeddings, getattr(trained, encode)(inputs), atol=1e-6)
        told = [row for row, item in enumerate(inputs) if isinstance(item, dict) and "instruction" in item]
        others = [row for row in range(len(inputs)) if row not in told]
        assert all(not np.allclose(embeddings[row], was[row], atol=1e-4) for row in told)
        if encoders == "queries":
            assert np.allclose(embeddings[others], was[others], atol=1e-6)
        else:
            assert not np.allclose(embeddings[others], was[others], atol=1e-4)
    same = np.allclose(loaded.encode_query(["a passage"]), loaded.encode_document(["a passage"]), atol=1e-5)
    assert same == (encoders != "separate")
    assert encoder_of(loaded)[0].template == "{query} {instruction}"
    assert all(math.isfinite(value) for value in measure(loaded, few_records).means().values())
    if lora_r and encoders in ("shared", "queries"):
        assert (tmp_path / "model" / "adapter_model.safetensors").stat().st_size < 2**16


@pytest.mark.parametrize(("interaction", "lora_r", "towers"), [("concatenation", 0, 1), ("gated", 4, 2)])
def test_every_objective_reaches_the_encoder(backbone, interaction, lora_r, towers, few_records):
    model = load_instruction_model(backbone, interaction=interaction)
    model = two_towers(model) if towers == 2 else model
    if lora_r:
        for encoder in encoders_of(model):
            add_lora(encoder, lora_r)
    rows = training_dataset(few_records.select(range(2)))
    features = [model.preprocess(rows[column][:]) for column in rows.column_names]
    for objective in OBJECTIVES:
        model.zero_grad()
        loss = InstructionContrastiveLoss(model, objective, plain_weight=0.5)([dict(column) for column in features])
        loss.backward()
        for encoder in encoders_of(model):
            norms = [float(weight.grad.norm()) for weight in encoder.parameters() if weight.grad is not None]
            assert math.isfinite(sum(norms))
            assert sum(norms) > 0, objective


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


def test_a_merged_lora_is_the_model_with_it(backbone, tmp_path):
    model = load_instruction_model(backbone).eval()
    plain = model.encode([*PAIRS, "a passage"])
    add_lora(model[0], 4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    apart = model.encode([*PAIRS, "a passage"])
    assert not np.allclose(apart, plain, atol=1e-3)
    merge_lora(model[0])
    assert not has_lora(model[0])
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert not (tmp_path / "adapter_config.json").exists()
    for merged in (model, load_instruction_model(tmp_path)):
        assert np.allclose(merged.encode([*PAIRS, "a passage"]), apart, atol=1e-5)


def test_merge_base_saves_the_weights_with_the_lora_in_them(folders, few_records, tmp_path):
    trained = train(few_records, folders("bert"), tmp_path / "m", lora_r=4, merge_base=True, learning_rate=1e-2)
    assert not (tmp_path / "m" / "adapter_config.json").exists()
    loaded = load_instruction_model(tmp_path / "m")
    assert not has_lora(loaded[0])
    assert np.allclose(loaded.encode(PAIRS), trained.encode(PAIRS), atol=1e-6)


def test_dropout_is_refused_where_there_are_no_dropout_layers(backbone, few_records, tmp_path):
    decoder = load_instruction_model(backbone)[1].pooling_mode == "lasttoken"
    assert trainer(few_records, backbone, tmp_path / "m").args.dropout == 0.0
    if decoder:
        with pytest.raises(ValueError, match=r"the encoder has no dropout layers, dropout=0.2 would do nothing"):
            trainer(few_records, backbone, tmp_path / "m", dropout=0.2)
    else:
        assert trainer(few_records, backbone, tmp_path / "m", dropout=0.2).args.dropout == 0.2


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


@pytest.mark.parametrize("family", ["modernbert", "qwen"])
def test_checkpointed_activations_change_nothing_but_memory(folders, family, few_records, tmp_path):
    found = []
    for checkpointing in (False, True):
        options = {"dropout": 0.0, "save_strategy": "no", "gradient_checkpointing": checkpointing}
        model = train(few_records, folders(family), tmp_path / str(checkpointing), **options)
        assert not any(encoder.model.is_gradient_checkpointing for encoder in encoders_of(model))
        found.append(model.encode([*PAIRS, "a passage"]))
    assert np.allclose(*found, atol=1e-4)


@pytest.fixture
def e5(tiny, tmp_path):
    """A model that is called as those are which have prompts without saying so."""
    return shutil.copytree(tiny, tmp_path / "e5-tiny")


def test_e5_has_its_prompts_in_training_and_use(e5, few_records, tmp_path):
    trained = train(few_records, e5, tmp_path / "m", save_strategy="no")
    for model in (trained, load_instruction_model(tmp_path / "m").eval()):
        joined = model.encode_query("vaccines Brief.")
        assert np.array_equal(model.encode_query({"instruction": "Brief.", "query": "vaccines"}), joined)
        assert np.allclose(model.encode("query: vaccines Brief.", task="query"), joined, atol=1e-6)
        assert np.allclose(model.encode_document("a passage"), model.encode("passage: a passage"), atol=1e-6)


@pytest.mark.parametrize("settings", [{"lora_r": 2}, {}, {"encoders": "separate"}, {"update": "queries"}])
def test_training_sees_the_prompts_of_use(e5, few_records, tmp_path, settings):
    running = trainer(few_records, e5, tmp_path / "m", save_strategy="no", plain_weight=0.5, **settings)
    seen = set()

    def look(encoder, args):
        if encoder.training:
            seen.update(running.model.tokenizer.decode(text["input_ids"][1:3]) for text in unpad(args[0]))

    for encoder in encoders_of(running.model):
        encoder.register_forward_pre_hook(look)
    running.train()
    assert seen == ({"query :"} if "update" in settings else {"query :", "passage :"})


def test_what_was_inferred_is_said(e5, few_records, tmp_path):
    model = trainer(few_records, e5, tmp_path / "m", lora_r=2).model
    assert describe(model) == (
        "BertModel; mean pooling; padding on the right; prompt 'query: ' before a query; prompt 'passage: ' before a "
        "document; LoRA on intermediate.dense, output.dense; 768 weights are trained"
    )


@pytest.mark.parametrize("interaction", ["concatenation", "paper", "gated"])
def test_the_side_of_the_padding_does_not_matter(backbone, interaction):
    model = load_instruction_model(backbone, interaction=interaction).eval()
    alone = np.concatenate([model.encode([item]) for item in [*PAIRS, "a passage"]])
    absolute = model[0].model.config.model_type == "bert"  # counts positions from the padding: BERT is padded on the right
    for side in ("right",) if absolute else ("left", "right"):
        model.tokenizer.padding_side = side
        assert np.allclose(model.encode([*PAIRS, "a passage"]), alone, atol=1e-5)
