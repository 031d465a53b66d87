"""The recipe trains, repeats itself, and survives being killed; fit and the Trainer are the same training."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch.utils.data import DataLoader

from sentence_transformers_inf import load_instruction_model, load_records, training, training_dataset
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import InstructionTransformer, encoder_of, encoders_of
from sentence_transformers_inf.training import HiddenDropout, bundled_base, train

# Small enough for a test, with dropout and the choice of a checkpoint so that both must survive a resume.
RECIPE = {"batch_size": 2, "epochs": 2, "dropout": 0.1, "evaluations": 4, "show_progress": False, "learning_rate": 1e-4}
RECIPE["bf16"] = False  # else the machine would choose, and bfloat16 rounds two runs that should be equal apart


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    load_records("mini", "train").select(range(12)).to_json(folder / "train.jsonl")
    load_records("mini", "validation").select(range(6)).to_json(folder / "validation.jsonl")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "model"
    train(corpus, output=output, **RECIPE)
    return output


def weights(folder):
    """The weights that shape an embedding.

    Softmax takes no notice of a bias of the keys, so its gradient is rounding noise, which Adam scales up to the size of a
    step: it differs between two runs that are otherwise the same.
    """
    return {
        f"{path.parent.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("model.safetensors"))
        for name, value in load_file(path).items()
        if not name.endswith("attention.self.key.bias")
    }


def test_one_evaluation_is_one_at_the_end(corpus, tmp_path):
    train(corpus, output=tmp_path / "model", **{**RECIPE, "max_records": 6, "evaluations": 1})
    log = (tmp_path / "model" / "eval" / "instruction_following_evaluation_validation_results.csv").read_text()
    assert [line.split(",")[1] for line in log.splitlines()] == ["steps", "6"]


def test_instructed_queries_have_an_encoder_of_their_own_which_loads_anywhere(uninterrupted, base):
    model, plain = load_instruction_model(uninterrupted), SentenceTransformer(str(uninterrupted))
    instructed, other = encoders_of(model)
    assert encoder_of(model)[0] is instructed
    name = "encoder.layer.5.output.dense.weight"
    before = SentenceTransformer(base)[0].model.get_parameter(name)
    learned = [encoder.model.get_parameter(name) for encoder in (instructed, other)]
    assert not torch.equal(*learned)
    assert not any(torch.equal(weight, before) for weight in learned)
    pair = {"instruction": "For a ten-year-old.", "query": "why is the sky blue"}
    told = model.encode([pair])
    assert np.array_equal(told, plain.encode(["why is the sky blue [SEP] For a ten-year-old."], task="instructed"))
    assert not np.allclose(told, model.encode(["why is the sky blue [SEP] For a ten-year-old."]), atol=1e-4)
    for texts in (["why is the sky blue"], ["Air scatters blue light."]):
        assert np.array_equal(model.encode_query(texts), plain.encode_query(texts))
        assert np.array_equal(model.encode_document(texts), plain.encode_query(texts))


def test_what_has_no_instructions_has_one_encoder(corpus, tmp_path):
    settings = {**RECIPE, "max_records": 2, "evaluations": 1}
    assert isinstance(train(corpus, output=tmp_path / "bare", instructions=False, **settings)[0], InstructionTransformer)
    assert isinstance(train(corpus, output=tmp_path / "shared", encoders="shared", **settings)[0], InstructionTransformer)
    with pytest.raises(ValueError, match="without instructions nothing would train their encoder"):
        train(corpus, output=tmp_path / "refused", instructions=False, encoders="instructed")


def test_a_base_that_takes_instructions_already_keeps_its_template(base, corpus, tmp_path):
    load_instruction_model(base, template="{instruction}: {query}").save_pretrained(str(tmp_path / "base"))
    trained = train(corpus, tmp_path / "base", tmp_path / "model", **{**RECIPE, "max_records": 2, "evaluations": 1})
    assert [encoder.template for encoder in encoders_of(trained)] == 2 * ["{instruction}: {query}"]
    assert encoder_of(trained)[0].template == "{instruction}: {query}"


@pytest.mark.parametrize("update", ["both", "queries"])
def test_another_corpus_is_trained_on_in_rows(update, base, few_records, tmp_path):
    """A positive and a negative for each instructed query: training puts the positive first."""
    rows = [
        {
            "only_query": record["query_positive"], "only_instruction": record["instruction_negative"],
            "has_instruction": True, "positive_passages": [{"title": "-", "text": record["hard_negative_document_1"]}],
            "new_negatives": [{"title": "-", "text": record["document"]}], "negative_passages": [],
        }
        for record in few_records
    ]  # fmt: skip
    Dataset.from_list([*rows, {**rows[0], "has_instruction": False}]).to_parquet(tmp_path / "train.parquet")
    options = {**RECIPE, "epochs": 8, "learning_rate": 5e-4 if update == "both" else 5e-3, "evaluations": 1}
    trained = train(tmp_path / "train.parquet", base, tmp_path / "model", update=update, **options).eval()
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["records"] == 4

    def margins(model):
        told = [{"instruction": row["only_instruction"], "query": row["only_query"]} for row in rows]
        right, wrong = (model.encode([row[of][0]["text"] for row in rows]) for of in ("positive_passages", "new_negatives"))
        return (model.encode(told) * (right - wrong)).sum(axis=1)

    before = margins(load_instruction_model(base))
    assert (margins(trained) > before + 0.05).all()


def test_training_leaves_a_model_a_card_and_its_recipe(uninterrupted):
    recipe = json.loads((uninterrupted / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["finished"] is True
    assert recipe["base"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert recipe["records"] == 12
    card = (uninterrupted / "README.md").read_text(encoding="utf-8")
    assert "load_instruction_model" in card
    assert "objective: multi_P_I" in card
    assert not (uninterrupted / "checkpoints").exists()
    log = (uninterrupted / "eval" / "instruction_following_evaluation_validation_results.csv").read_text()
    assert len(log.splitlines()) == 1 + RECIPE["evaluations"]


def test_training_teaches_what_it_is_given(corpus, tmp_path):
    """Without a validation split, by which the checkpoint would be chosen, the last weights are kept."""
    train(corpus / "train.jsonl", output=tmp_path / "model", **RECIPE)
    records = load_records(corpus, "train")
    before, after = (
        measure(load_instruction_model(model), records).means() for model in (bundled_base(), tmp_path / "model")
    )
    assert after["p_mrr"] > before["p_mrr"] + 5


@pytest.mark.parametrize(
    ("best", "taken"),
    [
        ([9.0, 9.0, 9.0, 10.0], True),
        ([4.0, 0.0, 0.0, 1.0], True),  # ahead by 1.25, with a standard error of 0.95
        ([3.0, 0.0, 0.0, -1.0], False),  # by 0.5, with one of 0.87
        (None, False),
    ],
)
def test_an_earlier_checkpoint_must_be_ahead_beyond_noise(best, taken):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)  # the last; the best has 2.0
    state = SimpleNamespace(best_model_checkpoint="checkpoint-5", best_global_step=5, global_step=5 if best is None else 9)
    trainer = SimpleNamespace(state=state, _load_best_model=lambda: torch.nn.init.constant_(model.weight, 2.0))

    def measured(model):
        assert best is not None, "there is nothing to choose"
        return SimpleNamespace(values={"p_mrr": np.array(best if model.weight.item() == 2 else [0.0] * 4)})

    training._take_best(trainer, model, measured)
    assert model.weight.item() == (2.0 if taken else 1.0)


def test_a_seed_repeats_the_run(uninterrupted, corpus, tmp_path):
    train(corpus, output=tmp_path / "again", **RECIPE)
    first, again = weights(uninterrupted), weights(tmp_path / "again")
    assert all(torch.allclose(first[name], again[name], rtol=0, atol=1e-5) for name in first)


def test_a_killed_run_resumes_to_the_same_weights(uninterrupted, corpus, tmp_path):
    output = tmp_path / "model"
    script = (
        "import datasets, torch; torch.set_num_threads(2)\n"
        "from sentence_transformers_inf.training import train\n"
        f"train({str(corpus)!r}, output={str(output)!r}, **{RECIPE!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
        with pytest.raises(subprocess.TimeoutExpired):  # the run must not end before it is killed
            process.wait(timeout=0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    # A checkpoint that was being written when the run died is passed over.
    (output / "checkpoints" / "checkpoint-99").mkdir()
    train(corpus, output=output, **RECIPE)
    expected, resumed = weights(uninterrupted), weights(output)
    assert expected.keys() == resumed.keys()
    for name in expected:
        assert torch.allclose(expected[name], resumed[name], rtol=0, atol=1e-5), name
    # All weights together, the biases of the keys too: the embeddings are the same.
    texts = load_records(corpus, "validation")["document"]
    first, second = (
        load_instruction_model(folder).encode(texts, convert_to_tensor=True) for folder in (uninterrupted, output)
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-5)


def test_a_finished_or_foreign_folder_is_not_touched(uninterrupted, corpus, tmp_path):
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(corpus, output=uninterrupted, **RECIPE)
    (tmp_path / "recipe.json").write_text(json.dumps({"learning_rate": 1.0}), encoding="utf-8")
    with pytest.raises(FileExistsError, match="an unfinished run with another"):
        train(corpus, output=tmp_path, **RECIPE)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        train(corpus, output=foreign, **RECIPE)
    assert (foreign / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"objective": "multi_P"}, "unknown objective"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"base_weight": 1.0}, "base_weight must be"),
        ({"frozen_layers": 6}, "less than the 6 layers"),
        ({"frozen_layers": -1}, "must not be negative"),
        ({"template": "{query}"}, "template"),
        ({"base": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(corpus, tmp_path, bad, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(corpus, output=tmp_path / "model", **bad)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile amx_bf16\n\nprocessor\t: 1\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f amx_tile amx_int8\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
    ],
)
def test_bfloat16_is_taken_where_the_cpu_has_it(monkeypatch, tmp_path, text, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(training, "_CPUINFO", tmp_path / "cpuinfo")
    assert training.has_fast_bfloat16() == fast
    monkeypatch.setattr(training, "_CPUINFO", tmp_path / "none")
    assert not training.has_fast_bfloat16()


def test_the_precision_is_said_and_noted(corpus, tmp_path):
    """bfloat16 on a CPU without instructions for it is slow and right; the similarities and the loss stay in float32."""
    said, models = [], {}
    for bf16 in (None, True):
        options = {**RECIPE, "max_records": 6, "epochs": 1, "evaluations": 1, "dropout": 0.0, "bf16": bf16}
        models[bf16] = train(corpus, output=tmp_path / str(bf16), **options, say=said.append)
    fast = training.has_fast_bfloat16()
    recipes = [json.loads((tmp_path / str(bf16) / "recipe.json").read_text()) for bf16 in models]
    assert [recipe["bf16"] for recipe in recipes] == [fast, True]
    assert ("bfloat16" in said[0], "float32" in said[0]) == (fast, not fast)
    assert "bfloat16 on" in said[1]
    assert all(parameter.dtype == torch.float32 for parameter in models[True].parameters())
    told = [{"instruction": "For young children.", "query": "why is the sky blue"}, "a passage"]
    saved = load_instruction_model(tmp_path / "True")
    assert np.array_equal(models[True].encode(told), saved.encode(told))  # no autocast is left behind
    for model in models.values():  # nor the attention of training
        assert {encoder.model.config._attn_implementation for encoder in encoders_of(model)} == {"sdpa"}
        assert not any(encoder.can_flatten_inputs for encoder in encoders_of(model))
    assert not any("attend_on" in path.read_text() for path in (tmp_path / "True").rglob("*.json"))
    first, second = weights(tmp_path / "None"), weights(tmp_path / "True")
    assert fast or any(not torch.equal(first[name], second[name]) for name in first)


def test_frozen_weights_are_cast_once(corpus, tmp_path, monkeypatch):
    """Training goes as where autocast casts them for every chunk, and nothing of it is left in the model."""
    recipe, dtypes, used = {**RECIPE, "max_records": 4, "epochs": 1, "bf16": True, "frozen_layers": 2}, set(), set()
    multiply = training._linear

    def look(weight, bias, hidden_states):
        dtypes.add(weight.dtype)
        used.add(weight.data_ptr())
        return multiply(weight, bias, hidden_states)

    monkeypatch.setattr(training, "_linear", look)
    model = train(corpus, output=tmp_path / "once", **recipe)
    assert dtypes == {torch.bfloat16}
    assert len(used) == 2 * 2 * 6  # encoders, frozen layers, linear layers of each
    used.clear()
    model.encode(["a passage"])
    assert not used
    monkeypatch.setattr(training, "_cast_frozen", lambda model: [])
    train(corpus, output=tmp_path / "each", **recipe)
    first, second = weights(tmp_path / "once"), weights(tmp_path / "each")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_base_weight_mixes_the_weights(corpus, uninterrupted, tmp_path):
    train(corpus, output=tmp_path / "half", base_weight=0.5, **RECIPE)
    trained, half, base = weights(uninterrupted), weights(tmp_path / "half"), weights(Path(bundled_base()))
    for encoder in ("instructed_0_Transformer", "base_0_Transformer"):
        name = "encoder.layer.3.output.dense.weight"
        before, name = base[f"./{name}"], f"{encoder}/{name}"
        assert torch.allclose(half[name], (trained[name] + before) / 2, atol=1e-5)
        assert not torch.allclose(trained[name], before, atol=1e-5)


def test_frozen_layers_stay_those_of_the_base(corpus, tmp_path):
    model = train(corpus, output=tmp_path / "model", frozen_layers=2, **RECIPE)
    trained, base = weights(tmp_path / "model"), weights(Path(bundled_base()))
    same = {name for name in trained if torch.equal(trained[name], base[f"./{name.partition('/')[2]}"])}
    for encoder in ("instructed_0_Transformer", "base_0_Transformer"):
        assert f"{encoder}/embeddings.word_embeddings.weight" in same
        for layer in range(6):
            assert (f"{encoder}/encoder.layer.{layer}.output.dense.weight" in same) == (layer < 2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_leaves_the_model_s_own_dropout_in_place(corpus, tmp_path):
    model = train(corpus, output=tmp_path / "model", max_records=2, **RECIPE)
    assert not [module for module in model.modules() if isinstance(module, HiddenDropout)]
    assert [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]


def test_hidden_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    mask = (torch.rand(1 << 20) >= 0.25).float() / 0.75
    dropout = HiddenDropout(0.25, mask)
    hidden_states = torch.ones(8, 100, 384)
    dropped = dropout(hidden_states)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(dropped, dropout(hidden_states))  # another slice of the mask
    lower = HiddenDropout(0.25, mask.bfloat16())(hidden_states)  # hidden states become what the mask is
    assert lower.dtype == torch.bfloat16
    assert lower.float().mean() == pytest.approx(1.0, abs=0.01)
    larger = torch.ones(1 << 21)  # than the mask: drawn afresh
    assert (dropout(larger) == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropout.eval()(hidden_states), hidden_states)


def steps(loss):
    """Make the loss note its value at every step."""
    values, forward = [], loss.forward

    def noting(features, labels=None):
        value = forward(features, labels)
        values.append(value.item())
        return value

    loss.forward = noting
    return values


def test_fit_and_the_trainer_are_the_same_training(base, few_records, tmp_path):
    view = training_dataset(few_records)
    losses = {}
    for way in ("trainer", "fit"):
        model = load_instruction_model(base)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = InstructionContrastiveLoss(model, sampled_instructions=0)
        losses[way] = steps(loss)
        if way == "trainer":
            arguments = SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / "trainer"),
                per_device_train_batch_size=4,
                num_train_epochs=3,
                learning_rate=5e-5,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            SentenceTransformerTrainer(model=model, args=arguments, train_dataset=view, loss=loss).train()
        else:
            examples = [InputExample(texts=[row[name] for name in view.column_names]) for row in view]
            model.fit(
                [(DataLoader(examples, batch_size=4), loss)],
                epochs=3,
                scheduler="constantlr",
                optimizer_params={"lr": 5e-5},
                weight_decay=0.0,
                show_progress_bar=False,
                checkpoint_path=str(tmp_path / "fit"),
                checkpoint_save_steps=1000,
            )
    assert len(losses["trainer"]) == 3
    assert losses["trainer"][-1] < losses["trainer"][0]
    assert losses["fit"] == pytest.approx(losses["trainer"], abs=1e-4)
