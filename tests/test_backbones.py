"""Encoders and decoders, tiny and of random weights, go the whole way: train, save, load, encode, evaluate."""

import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, BertConfig, LlamaConfig, ModernBertConfig, PreTrainedTokenizerFast, Qwen2Config

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import OBJECTIVES, InstructionContrastiveLoss
from sentence_transformers_inf.training import train

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>"]
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
    pattern = "$A <eos>" if pooling == "lasttoken" else "[CLS] $A [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[(name, tokenizer.token_to_id(name)) for name in SPECIAL if name in pattern]
    )
    places = {"pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 4, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModel.from_config(kind(vocab_size=tokenizer.get_vocab_size(), **SIZE, **places))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "raw")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="<eos>", model_max_length=256, padding_side="left" if pooling == "lasttoken" else "right",
    ).save_pretrained(folder / "raw")  # fmt: skip
    SentenceTransformer(modules=[Transformer(str(folder / "raw")), Pooling(32, pooling)]).save(str(folder / "model"))
    return folder / "model"


@pytest.mark.parametrize("interaction", ["concatenation", "paper", "gated"])
def test_a_backbone_trains_saves_loads_encodes_and_is_measured(backbone, interaction, data, tmp_path):
    options = {"interaction": interaction, "frozen_layers": 0, "batch_size": 4, "epochs": 1, "show_progress": False}
    trained = train(data, backbone, tmp_path / "model", **options).eval()
    before = load_instruction_model(backbone, interaction=interaction).eval()
    loaded = load_instruction_model(tmp_path / "model").eval()
    embeddings = loaded.encode([*PAIRS, "a passage"])
    assert np.allclose(embeddings, trained.encode([*PAIRS, "a passage"]), atol=1e-6)
    assert not np.allclose(embeddings, before.encode([*PAIRS, "a passage"]), atol=1e-4)
    means = measure(loaded, load_records(data)).means()
    assert all(math.isfinite(value) for value in means.values())


@pytest.mark.parametrize("interaction", ["concatenation", "paper", "gated"])
def test_the_side_of_the_padding_does_not_matter(backbone, interaction):
    model = load_instruction_model(backbone, interaction=interaction).eval()
    alone = np.concatenate([model.encode([item]) for item in [*PAIRS, "a passage"]])
    absolute = model[0].model.config.model_type == "bert"  # counts positions from the padding: BERT is padded on the right
    for side in ("right",) if absolute else ("left", "right"):
        model.tokenizer.padding_side = side
        assert np.allclose(model.encode([*PAIRS, "a passage"]), alone, atol=1e-5)


@pytest.mark.parametrize("interaction", ["concatenation", "gated"])
def test_every_objective_reaches_the_encoder(backbone, interaction, few_records):
    model = load_instruction_model(backbone, interaction=interaction)
    rows = training_dataset(few_records)
    features = [model.preprocess(rows[column]) for column in rows.column_names]
    for objective in OBJECTIVES:
        model.zero_grad()
        loss = InstructionContrastiveLoss(model, objective, plain_weight=0.5)([dict(column) for column in features])
        loss.backward()
        norms = [float(weight.grad.norm()) for weight in model[0].parameters() if weight.grad is not None]
        assert math.isfinite(sum(norms))
        assert sum(norms) > 0, objective
