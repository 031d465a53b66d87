"""The trainer repeats itself, survives being killed, and gives what the host's trainer gives."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import HfApi
from safetensors.torch import load_file
from sentence_transformers import (
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from sentence_transformers_inf import (
    InstructionTrainer,
    InstructionTrainingArguments,
    load_instruction_model,
    load_records,
    training_dataset,
)
from sentence_transformers_inf.corpora import load_training_data
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoder_of, encoders_of
from sentence_transformers_inf.training import arguments
from sentence_transformers_inf.training.run_folder import COMPLETE_FILE

# With dropout and the choice of a checkpoint, so that both must survive a resume; in float32, because bfloat16 rounds
# two runs that should be equal apart.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "frozen_layers": 1,
    "bf16": False,
}
QUIET = {"disable_tqdm": True, "report_to": "none"}
EVALUATOR_LOG = "eval/instruction_following_evaluation_validation_results.csv"


def trainer(corpus, base, output, limit=None, callbacks=None, **settings):
    args = InstructionTrainingArguments(output_dir=str(output), **{**QUIET, **SETTINGS, **settings})
    return InstructionTrainer(base, args, *load_training_data(corpus, limit), callbacks=callbacks)


def train(*arguments, **settings):
    made = trainer(*arguments, **settings)
    made.train()
    return made.model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    load_records("mini", "train").select(range(12)).to_json(folder / "train.jsonl")
    load_records("mini", "validation").select(range(6)).to_json(folder / "validation.jsonl")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "model"
    train(corpus, tiny, output)
    return output


def weights(folder):
    """The weights that shape an embedding.

    Softmax takes no notice of a bias of the keys, so its gradient is rounding noise, which Adam scales up to the size of a
    step: it differs between two runs that are otherwise the same.
    """
    return {
        f"{path.parent.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("model.safetensors"))
        if not path.relative_to(folder).parts[0].startswith("checkpoint-")
        for name, value in load_file(path).items()
        if not name.endswith("attention.self.key.bias")
    }


def test_a_finished_model_has_its_recipe_its_card_and_its_measurements(uninterrupted, tiny):
    recipe = json.loads((uninterrupted / "recipe.json").read_text(encoding="utf-8"))
    assert (recipe["finished"], recipe["base"], recipe["records"]) == (True, tiny, 12)
    assert recipe["settings"]["objective"] == "multi_P_I"
    assert recipe["settings"]["encoders"] == "separate"
    assert recipe["settings"]["per_device_train_batch_size"] == 2
    card = (uninterrupted / "README.md").read_text(encoding="utf-8")
    assert "load_instruction_model" in card
    assert "objective: multi_P_I" in card
    assert tiny not in card, "no path of this machine"
    log = (uninterrupted / EVALUATOR_LOG).read_text()
    assert len(log.splitlines()) == 1 + 4, "as many evaluations as there are by default"


def test_one_evaluation_is_one_at_the_end(corpus, tiny, tmp_path):
    train(corpus, tiny, tmp_path / "model", limit=6, evaluations=1)
    log = (tmp_path / "model" / EVALUATOR_LOG).read_text()
    assert [line.split(",")[1] for line in log.splitlines()] == ["steps", "6"]


def test_queries_have_an_encoder_of_their_own_which_obeys_wherever_it_is_loaded(uninterrupted, tiny):
    model, plain = load_instruction_model(uninterrupted), SentenceTransformer(str(uninterrupted))
    assert encoder_of(model)[0] is encoders_of(model)[1]
    name = "encoder.layer.1.output.dense.weight"
    before = SentenceTransformer(tiny)[0].model.get_parameter(name)
    learned = [encoder.model.get_parameter(name) for encoder in encoders_of(model)]
    assert not torch.equal(*learned)
    assert not any(torch.equal(weight, before) for weight in learned)
    pair = {"instruction": "For a ten-year-old.", "query": "why is the sky blue"}
    long = {**pair, "instruction": "Only what was measured, nothing that is a guess. " * 60}
    for told in (pair, long):
        joined = [f"{told['query']} {told['instruction']}"]
        for encoded in (model.encode([told]), model.encode_query([told]), model.encode_query(joined)):
            assert np.array_equal(encoded, plain.encode_query(joined))
    for texts in (["why is the sky blue"], ["Air scatters blue light."]):
        assert np.array_equal(model.encode_query(texts), plain.encode_query(texts))
        assert np.array_equal(model.encode_document(texts), plain.encode_document(texts))


def test_one_encoder_may_serve_both_sides(corpus, tiny, tmp_path):
    model = train(corpus, tiny, tmp_path / "shared", encoders="shared", limit=2, evaluations=1)
    assert len(encoders_of(model)) == 1


def test_a_base_that_takes_instructions_already_keeps_its_template(tiny, corpus, tmp_path):
    load_instruction_model(tiny, template="{instruction}: {query}").save_pretrained(str(tmp_path / "base"))
    trained = train(corpus, str(tmp_path / "base"), tmp_path / "model", limit=2, evaluations=1)
    assert [encoder.template for encoder in encoders_of(trained)] == 2 * ["{instruction}: {query}"]
    assert encoder_of(load_instruction_model(tmp_path / "model"))[0].template == "{instruction}: {query}"


def test_training_teaches_what_it_is_given(corpus, base, tmp_path):
    """Without a validation split, by which the checkpoint would be chosen, the last weights are kept."""
    settings = {"learning_rate": 1e-4, "frozen_layers": 2}
    train(corpus / "train.jsonl", base, tmp_path / "model", **settings)
    records = load_records(corpus, "train")
    before, after = (measure(load_instruction_model(model), records).means() for model in (base, tmp_path / "model"))
    assert after["p_mrr"] > before["p_mrr"] + 5


@pytest.mark.parametrize("update", ["both", "queries"])
def test_another_corpus_is_trained_on_in_rows(update, base, few_records, tmp_path):
    """A positive and a negative for each instructed query: training puts the positive first."""
    rows = [
        {
            "instruction": record["instruction_negative"], "query": record["query_positive"],
            "document": record[name], "label": label,
        }
        for record in few_records
        for name, label in (("hard_negative_document_1", "true"), ("document", "false"))
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"num_train_epochs": 8, "learning_rate": 5e-4 if update == "both" else 5e-3, "evaluations": 1}
    settings |= {"frozen_layers": None}
    trained = train(tmp_path / "train.jsonl", base, tmp_path / "model", update=update, **settings).eval()
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["records"] == 4

    def margins(model):
        right, wrong = (model.encode([row["document"] for row in rows[start::2]]) for start in (0, 1))
        pairs = [{"instruction": row["instruction"], "query": row["query"]} for row in rows[::2]]
        return (model.encode(pairs) * (right - wrong)).sum(axis=1)

    assert (margins(trained) > margins(load_instruction_model(base)) + 0.05).all()


def test_the_best_checkpoint_is_taken_only_beyond_noise(corpus, tiny, tmp_path, monkeypatch):
    """The last is kept, unless the best is ahead of it by more than the standard error over the records."""
    for ahead, is_taken in (([9.0, 9.0, 9.0, 10.0], True), ([4.0, 0.0, 0.0, 1.0], True), ([3.0, 0.0, 0.0, -1.0], False)):
        made = trainer(corpus, tiny, tmp_path / str(ahead[0]), limit=4, evaluations=2)
        made.train()
        best = {name: torch.zeros_like(value) for name, value in made.model.state_dict().items()}
        last = made.keep_last.weights
        made.model.load_state_dict(best)

        def scores(model, records, passage_embeddings=None, ahead=ahead):
            is_best = not any(value.any() for value in model.state_dict().values())
            return type("Scores", (), {"values": {"p_mrr": np.array(ahead if is_best else [0.0] * 4)}})

        monkeypatch.setattr("sentence_transformers_inf.training.trainer.measure", scores)
        made.state.best_model_checkpoint = "checkpoint-0"
        made.choose_weights()
        taken = best if is_taken else last
        assert all(torch.equal(value, taken[name]) for name, value in made.model.state_dict().items())
        made.model.load_state_dict(best)
        made.state.best_model_checkpoint = f"checkpoint-{made.state.global_step}"
        made.choose_weights()  # the best are the last: nothing is measured, nor loaded
        assert not any(value.any() for value in made.model.state_dict().values())
        monkeypatch.undo()


def test_what_is_saved_has_the_score_of_the_evaluation_that_chose_it(corpus, tiny, tmp_path):
    model = train(corpus, tiny, tmp_path / "model", evaluations=3)
    scores = [float(line.split(",")[2]) for line in (tmp_path / "model" / EVALUATOR_LOG).read_text().splitlines()[1:]]
    assert len(scores) == 3
    found = measure(model, load_records(corpus, "validation")).means()["p_mrr"]
    assert any(found == pytest.approx(score, abs=1e-6) for score in (scores[-1], max(scores)))
    assert measure(load_instruction_model(tmp_path / "model"), load_records(corpus, "validation")).means()["p_mrr"] == found


def test_a_seed_repeats_the_run(uninterrupted, corpus, tiny, tmp_path):
    train(corpus, tiny, tmp_path / "again")
    first, again = weights(uninterrupted), weights(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.allclose(first[name], again[name], rtol=0, atol=1e-5) for name in first)


def test_a_killed_run_resumes_to_the_same_weights(uninterrupted, corpus, tiny, tmp_path):
    output = tmp_path / "model"
    command = [sys.executable, "-m", "sentence_transformers_inf.cli", "train", "--base", tiny, "--data", corpus]
    command += [
        "--output",
        output,
        *(word for name, value in {**SETTINGS, **QUIET}.items() for word in (f"--{name}", value)),
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(output.glob(f"checkpoint-*/{COMPLETE_FILE}")):
        with pytest.raises(subprocess.TimeoutExpired):  # the run must not end before it is killed
            process.wait(timeout=0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "modules.json").exists()
    # A checkpoint that was being written when the run died is passed over.
    (output / "checkpoint-99").mkdir()
    (output / "checkpoint-99" / "trainer_state.json").write_text("{")
    train(corpus, tiny, output)
    expected, resumed = weights(uninterrupted), weights(output)
    assert expected.keys() == resumed.keys()
    for name in expected:
        assert torch.allclose(expected[name], resumed[name], rtol=0, atol=1e-5), name
    texts = load_records(corpus, "validation")["document"]
    first, second = (
        load_instruction_model(folder).encode(texts, convert_to_tensor=True) for folder in (uninterrupted, output)
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-5)


def test_a_finished_or_foreign_folder_is_not_touched(uninterrupted, corpus, tiny, tmp_path):
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(corpus, tiny, uninterrupted)
    output = tmp_path / "interrupted"

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(corpus, tiny, output, callbacks=[Stop()])
    with pytest.raises(FileExistsError, match=r"an unfinished run with another learning_rate \(0.001, now 0.5\)"):
        train(corpus, tiny, output, learning_rate=0.5)
    with pytest.raises(FileExistsError, match="an unfinished run with another weight_decay"):
        train(corpus, tiny, output, weight_decay=0.5)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        train(corpus, tiny, foreign)
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_a_finished_model_is_replaced_when_that_is_asked_for(corpus, tiny, tmp_path):
    for seed in (1, 2):
        train(corpus, tiny, tmp_path / "model", limit=2, evaluations=1, seed=seed, overwrite=True)
        assert json.loads((tmp_path / "model" / "recipe.json").read_text())["settings"]["seed"] == seed


def test_nothing_of_a_replaced_model_stays_beside_the_new_one(corpus, tiny, tmp_path):
    quick = {"limit": 2, "evaluations": 1, "num_train_epochs": 1}
    train(corpus, tiny, tmp_path / "model", update="queries", lora_r=4, frozen_layers=None, **quick)
    assert (tmp_path / "model" / "instruction_adapter.json").exists()
    train(corpus, tiny, tmp_path / "model", encoders="shared", overwrite=True, **quick)
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert not names & {"instruction_adapter.json", "adapter_config.json"}
    assert len(encoders_of(load_instruction_model(tmp_path / "model"))) == 1
    foreign = tmp_path / "thesis"
    (foreign / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds no run"):
        train(corpus, tiny, foreign, overwrite=True)
    assert (foreign / "checkpoint-1").is_dir()


def test_a_model_may_be_evaluated_before_and_saved_elsewhere_after(corpus, tiny, tmp_path):
    made = trainer(corpus, tiny, tmp_path / "model", limit=2, evaluations=1, num_train_epochs=1)
    assert "eval_validation_p_mrr" in made.evaluate()
    made.save_model(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / "recipe.json").exists()
    made.train()
    made.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "recipe.json").read_bytes() == (tmp_path / "model" / "recipe.json").read_bytes()
    assert "# elsewhere" in (tmp_path / "elsewhere" / "README.md").read_text()
    asked = [{"instruction": "Brief.", "query": "vaccines"}]
    assert np.array_equal(load_instruction_model(tmp_path / "elsewhere").encode(asked), made.model.encode(asked))


@pytest.mark.parametrize(
    ("given", "strategy", "loads_best"),
    [
        ({}, "steps", True),
        ({"load_best_model_at_end": False}, "steps", False),
        ({"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}, "epoch", True),
        ({"save_strategy": "epoch"}, "epoch", True),
        ({"save_strategy": "no"}, "steps", False),
        ({"eval_strategy": "steps", "eval_steps": 5}, "steps", False),
    ],
)
def test_it_evaluates_however_checkpoints_are_written(corpus, tiny, tmp_path, given, strategy, loads_best):
    made = trainer(corpus, tiny, tmp_path / "model", **given)
    assert made.args.eval_strategy.value == strategy
    assert bool(made.args.load_best_model_at_end) is loads_best
    assert made.args.metric_for_best_model == ("eval_validation_p_mrr" if loads_best else None)
    made.train()
    assert [log for log in made.state.log_history if "eval_validation_p_mrr" in log]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"objective": "multi_P"}, "unknown objective"),
        ({"num_train_epochs": 0}, "num_train_epochs must be positive"),
        ({"frozen_layers": 2}, "less than the 2 layers"),
        ({"frozen_layers": -1}, "must not be negative"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"template": "{query}"}, "template"),
        ({"update": "passages"}, "unknown update 'passages'"),
        ({"update": "queries", "encoders": "separate"}, "leave encoders out"),
        ({"encoders": "two"}, "there are shared, separate"),
        ({"passage_embeddings": "v.npy"}, "use them with update='queries'"),
        ({"update": "queries", "instructions": False}, "leave instructions on"),
        ({"lora_r": -1}, "lora_r must not be negative"),
        ({"lora_r": 4, "frozen_layers": 1}, "a LoRA keeps all layers"),
        ({"hub_strategy": "every_save", "hub_token": "hf_secret"}, "leave hub_token out"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha does not work with Sentence Transformers: leave it out"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect on these objectives: leave it out"),
        ({"resume_from_checkpoint": "somewhere"}, "goes on from its last checkpoint by itself: leave it out"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(corpus, tiny, tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train(corpus, tiny, tmp_path / "model", **bad)
    assert not (tmp_path / "model").exists()


def test_a_base_or_data_that_are_not_there_are_named(corpus, tmp_path, few_records):
    with pytest.raises(OSError, match="/no/such/model"):
        train(corpus, "/no/such/model", tmp_path / "model")
    with pytest.raises(ValueError, match="train_dataset is missing"):
        InstructionTrainer()
    with pytest.raises(ValueError, match=r"one split, a datasets.Dataset, not DatasetDict"):
        InstructionTrainer(train_dataset=DatasetDict(train=few_records))
    view = training_dataset(few_records)
    with pytest.raises(ValueError, match="eval_dataset holds no InF-IR records"):
        InstructionTrainer(train_dataset=few_records, eval_dataset=view)
    with pytest.raises(ValueError, match="instructions=False needs records or rows"):
        InstructionTrainer(args=InstructionTrainingArguments(instructions=False), train_dataset=view)
    with pytest.raises(ValueError, match="model_init would replace the encoders"):
        InstructionTrainer(train_dataset=few_records, model_init=lambda: None)
    with pytest.raises(ValueError, match=r"neither InF-IR records .* it has the columns topic"):
        InstructionTrainer(train_dataset=few_records.select_columns(["topic"]))


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
    monkeypatch.setattr(arguments, "CPUINFO", tmp_path / "cpuinfo")
    assert arguments.has_fast_bfloat16() == fast
    assert InstructionTrainingArguments(output_dir=str(tmp_path)).bf16 == fast
    monkeypatch.setattr(arguments, "CPUINFO", tmp_path / "none")
    assert not arguments.has_fast_bfloat16()


def test_a_model_trained_in_bfloat16_encodes_in_float32_again(corpus, tiny, tmp_path):
    model = train(corpus, tiny, tmp_path / "model", limit=6, evaluations=1, dropout=0.0, bf16=True)
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["settings"]["bf16"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    inputs = [{"instruction": "For young children.", "query": "why is the sky blue"}, "a passage"]
    saved = load_instruction_model(tmp_path / "model")
    assert np.array_equal(model.encode(inputs), saved.encode(inputs)), "no autocast is left behind"


def test_frozen_layers_stay_those_of_the_base(corpus, tiny, tmp_path):
    model = train(corpus, tiny, tmp_path / "model", frozen_layers=1, limit=4, evaluations=1)
    before = SentenceTransformer(tiny)[0].model.state_dict()
    for encoder in encoders_of(model):
        same = {name for name, value in encoder.model.state_dict().items() if torch.equal(value, before[name])}
        assert "embeddings.word_embeddings.weight" in same
        for layer in range(2):
            assert (f"encoder.layer.{layer}.output.dense.weight" in same) == (layer < 1)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Noting(TrainerCallback):
    def __init__(self):
        self.steps, self.logs = 0, []

    def on_step_end(self, *args, **kwargs):
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_the_host_s_trainer_is_all_there(corpus, tiny, tmp_path, connected):
    """Accumulation, a tracker, a callback, a scheduler, checkpoints by epoch, and a push to the Hub."""
    noting = Noting()
    made = trainer(
        corpus, tiny, tmp_path / "model", callbacks=[noting],
        gradient_accumulation_steps=2, report_to="tensorboard", logging_steps=1, lr_scheduler_type="cosine",
        save_strategy="epoch", eval_strategy="epoch", push_to_hub=True, hub_model_id="user/obedient", hub_strategy="end",
    )  # fmt: skip
    made.train()
    made.push_to_hub()
    assert noting.steps == 2 * 3, "12 records in steps of 2 times 2, for two epochs"
    assert [log["learning_rate"] for log in noting.logs if "learning_rate" in log]
    assert sum("eval_validation_p_mrr" in log for log in noting.logs) == 2
    assert list((tmp_path / "model").rglob("events.out.tfevents.*")), "the tracker wrote"
    pushed = set(HfApi().list_repo_files("user/obedient"))
    assert {"README.md", "modules.json", "router_config.json"} <= pushed
    assert not any(name.startswith("checkpoint-") or name.endswith((".bin", ".pt", ".pth")) for name in pushed)
    assert HfApi().model_info("user/obedient").private
    loaded = load_instruction_model("user/obedient")
    pair = {"instruction": "Brief.", "query": "vaccines"}
    assert np.array_equal(loaded.encode(pair), made.model.encode(pair))


def test_the_host_pushes_at_every_save_to_the_repository_that_it_names(corpus, tiny, tmp_path, connected):
    made = trainer(corpus, tiny, tmp_path / "often", 2, push_to_hub=True, hub_strategy="every_save", evaluations=2)
    made.train()
    made.push_to_hub()
    repo = f"{HfApi().whoami()['name']}/often"
    assert made.hub_model_id == repo
    assert {"README.md", "modules.json"} <= set(HfApi().list_repo_files(repo))


def steps(loss):
    """Make the loss note its value at every step."""
    values, forward = [], loss.forward

    def noting(features, labels=None):
        value = forward(features, labels)
        values.append(value.item())
        return value

    loss.forward = noting
    return values


def test_fit_and_the_host_s_trainer_are_the_same_training(tiny, few_records, tmp_path):
    view = training_dataset(few_records)
    losses = {}
    for way in ("trainer", "fit"):
        model = load_instruction_model(tiny)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = InstructionContrastiveLoss(model, sampled_instructions=0)
        losses[way] = steps(loss)
        if way == "trainer":
            args = SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / "trainer"),
                per_device_train_batch_size=4,
                num_train_epochs=3,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            SentenceTransformerTrainer(model=model, args=args, train_dataset=view, loss=loss).train()
        else:
            examples = [InputExample(texts=[row[name] for name in view.column_names]) for row in view]
            model.fit(
                [(DataLoader(examples, batch_size=4), loss)],
                epochs=3,
                scheduler="constantlr",
                optimizer_params={"lr": 1e-3},
                weight_decay=0.0,
                show_progress_bar=False,
                checkpoint_path=str(tmp_path / "fit"),
                checkpoint_save_steps=1000,
            )
    assert len(losses["trainer"]) == 3
    assert losses["trainer"][-1] < losses["trainer"][0]
    assert losses["fit"] == pytest.approx(losses["trainer"], abs=1e-4)
