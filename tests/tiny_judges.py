"""A randomly initialised cross-encoder and causal language model."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sentence_transformers_inf import load_records


def write_judges(folder):
    """Save the models into ``folder/cross-encoder`` and ``folder/reranker``."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "true", "false"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special)
    tokenizer.train_from_iterator(load_records("mini", "validation")["document"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    shape = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForSequenceClassification(BertConfig(**shape, num_labels=1, max_position_embeddings=1024))
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    for name, model in (("cross-encoder", bert), ("reranker", llama)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
