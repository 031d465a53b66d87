"""Models that flatten their inputs, as Sentence Transformers does with flash attention: the same values.

Flash attention runs on GPUs alone. Here its two functions are stood in for by PyTorch's own attention, one text at a time;
what transformers and Sentence Transformers do around them is real.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from transformers import modeling_flash_attention_utils as flash

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoders_of, two_towers
from tests.test_losses import columns, loss_and_gradients
from tests.training import trainer


def attend(query, key, value, softmax_scale=None, causal=False):
    """N×tokens×heads×d, as flash attention has it."""
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def attend_each(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """The same of texts that lie one after the other: tokens×heads×d."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    texts = zip(*(states.split(lengths) for states in (query, key, value)))
    return torch.cat([attend(*(states[None] for states in text), softmax_scale, causal)[0] for text in texts])


@pytest.fixture
def model(tiny):
    """A fresh instruction-aware tiny model, without dropout's randomness."""
    return load_instruction_model(tiny).eval()


@pytest.fixture
def flattening(monkeypatch):
    """Make a model use flash attention, and so flatten its inputs."""
    imported = (attend, attend_each, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: imported)
    monkeypatch.setattr(flash, "_loaded_implementation", None)

    def change(model: SentenceTransformer) -> SentenceTransformer:
        for encoder in encoders_of(model):
            encoder.model.config._attn_implementation = "flash_attention_2"
            encoder.unpad_inputs = True
            assert encoder.can_flatten_inputs
        return model

    return change


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_flattened_columns_give_the_loss_and_gradients_of_padded_ones(model, few_records, flattening, kind, towers):
    model = model.double()
    if towers == 2:
        model = two_towers(model).requires_grad_(True)
    size = {"mini_batch_size": 5} if kind is CachedInstructionContrastiveLoss else {}
    options = {"sampled_instructions": 1, "plain_weight": 0.5, **size}
    padded = kind(model, **options)
    value, gradient = loss_and_gradients(padded, model, columns(model, few_records.select([0, 1])))
    flattened = kind(flattening(model), **options)
    features = columns(model, few_records.select([0, 1]))
    assert all("cu_seq_lens_q" in column and "attention_mask" not in column for column in features)
    other_value, other_gradient = loss_and_gradients(flattened, model, features)
    assert other_value == pytest.approx(value, abs=1e-9)
    assert torch.allclose(other_gradient, gradient, rtol=0, atol=1e-9)
    assert flattened.last_step_stats == padded.last_step_stats


def test_flattened_queries_and_passages_have_the_same_embeddings(model, flattening):
    model.double()
    told = {"instruction": "For young children, and leave out anything about its price.", "query": "how do vaccines work"}
    inputs = [told, "a passage", {"instruction": None, "query": "why is the sky blue"}, "another, longer passage", told]
    mixed, queries = model.encode(inputs), model.encode_query(inputs[::2])
    flattening(model)
    assert torch.allclose(torch.tensor(model.encode(inputs)), torch.tensor(mixed), atol=1e-9)
    assert torch.allclose(torch.tensor(model.encode_query(inputs[::2])), torch.tensor(queries), atol=1e-9)


def test_the_query_survives_where_a_flattened_input_is_too_long(tiny, flattening):
    model = flattening(load_instruction_model(tiny, "{instruction} {query}", max_query_length=16))
    told = {"instruction": "only what was peer reviewed " * 10, "query": "why is the sky blue"}
    tokens = model.preprocess([told, told])["input_ids"][0].tolist()
    text = model.tokenizer.decode(tokens)
    assert text.count("why is the sky blue") == 2
    assert len(tokens) <= 32


def test_attention_between_instruction_and_query_is_padded_as_ever(tiny, few_records, flattening):
    padded = load_instruction_model(tiny, interaction="paper").eval()
    model = load_instruction_model(flattening(load_instruction_model(tiny)), interaction="paper").eval()
    features = columns(model, few_records)
    assert all("attention_mask" in column and "cu_seq_lens_q" not in column for column in features)
    expected = InstructionContrastiveLoss(padded)(columns(padded, few_records)).item()
    assert InstructionContrastiveLoss(model)(features).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"update": "queries", "lora_r": 4}])
def test_a_model_that_flattens_is_trained(tiny, few_records, flattening, tmp_path, settings):
    base = flattening(load_instruction_model(tiny))
    running = trainer(few_records, base, tmp_path / "model", save_strategy="no", **settings)
    given = []
    running.loss.register_forward_pre_hook(lambda _, args: given.extend(args[0]))
    running.train()
    assert given
    assert all("cu_seq_lens_q" in column for column in given)
    assert json.loads((tmp_path / "model" / "recipe.json").read_text(encoding="utf-8"))["finished"]
