"""Ablations: configurations, cells that are run once, and the report."""

import json
import math
import re

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.elsewhere import measure_help_centre, measure_narratives, measure_plain
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.training.ablation import BASE, BASELINE, read_config, run_ablation
from sentence_transformers_inf.training.ablation_report import write_report
from tests.beir import write_beir
from tests.commands import call, error_line

CONFIG = """
data: {data}
evaluate: {{data: {data}, split: test, plain: {plain}}}
seeds: [1, 2]
settings:
  {{base: {base}, frozen_layers: 1, num_train_epochs: 1, per_device_train_batch_size: 4, learning_rate: 0.001}}
grid:
  max_records: [4, 8]
"""


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    load_records("mini", "train").select(range(8)).to_parquet(folder / "data" / "train.parquet")
    load_records("mini", "test").select(range(6)).to_parquet(folder / "data" / "test.parquet")
    (folder / "curve.yaml").write_text(CONFIG.format(data=folder / "data", base=tiny, plain=write_beir(folder / "beir")))
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """The cells of CONFIG, stopped once on the way."""
    ablation, said = read_config(folder / "curve.yaml"), []

    class Stop(Exception):
        pass

    def stop(line):
        said.append(line)
        if len(said) == 3:
            raise Stop

    with pytest.raises(Stop):
        run_ablation(ablation, folder / "out", stop)
    results = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("result.json")}
    assert len(results) == 2
    rows = run_ablation(ablation, folder / "out")
    assert results == {path: path.stat().st_mtime_ns for path in results}, "what was there is not run again"
    return ablation, rows


def test_every_cell_is_run_for_every_seed_and_the_baseline_with_them(folder, done):
    _, rows = done
    assert [row.name for row in rows] == [BASE, "max_records 4", "max_records 8", BASELINE]
    assert len(list((folder / "out").rglob("result.json"))) == 6
    assert not list((folder / "out").rglob("*.safetensors")), "models are not kept"


def test_rows_are_means_over_seeds_and_gains_are_paired(folder, done, tiny):
    ablation, rows = done
    results = [json.loads(path.read_text()) for path in (folder / "out").rglob("result.json")]

    def of(name):
        return [result for result in results if result["settings"].items() >= {**ablation.cells[name]}.items()]

    cell, baseline = of("max_records 8"), of(BASELINE)
    assert [len(cell), len(baseline)] == [2, 2]
    values = [result["means"]["p_mrr"] for result in cell]
    assert rows[2].means["p_mrr"] == pytest.approx(np.mean(values))
    assert rows[2].errors["p_mrr"] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)
    assert values[0] != values[1], "the seeds differ"
    gain, low, high = rows[2].gains["ndcg_at_10"]
    expected = rows[2].means["ndcg_at_10"] - rows[3].means["ndcg_at_10"]
    assert gain == pytest.approx(expected)
    assert low <= gain <= high
    assert rows[3].gains["p_mrr"] == (0, 0, 0)
    model = load_instruction_model(tiny)
    base = measure(model, load_records(folder / "data", "test")).means()
    base |= {f"narratives_{name}": value for name, value in measure_narratives(model).items()}
    base |= {f"help_centre_{name}": value for name, value in measure_help_centre(model).items()}
    base["plain_mrr_at_10"] = measure_plain(model, folder / "beir")["mrr_at_10"]
    assert rows[0].means == pytest.approx(base, abs=0.02)
    assert rows[2].minutes >= 0
    assert math.isnan(rows[2].dollars)


def test_the_report_has_a_table_failures_and_charts(folder, done, tmp_path):
    ablation, rows = done
    table = write_report(ablation, rows, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert [line.count("|") for line in text.splitlines()[:6]] == [len(table[0]) + 1] * 6
    assert len(table) == 1 + 4
    assert set(table[0]) > {"narratives: p-MRR", "help centre: pairs", "plain corpus: MRR@10"}
    assert f"| max_records 8 | {rows[2].means['p_mrr']:.1f} ± {rows[2].errors['p_mrr']:.1f} |" in text
    assert ablation.axis == "max_records"
    for name in ("ablation", "types"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "max_records (dotted: the base model)" in re.sub(r"<!--|-->", "", (tmp_path / "ablation.svg").read_text())
    best = max(rows[1:], key=lambda row: row.means["p_mrr"])
    assert f"## What {best.name} gets wrong" in text
    records = load_records(folder / "data", "test")
    obeyed = np.array(best.values["pair_accuracy"]) == 100
    for index, record in enumerate(records):
        of_kind = np.array(records["instruction_type"]) == record["instruction_type"]
        counted = f"**{record['instruction_type']}**: {(obeyed & of_kind).sum()} of {of_kind.sum()} obeyed with every seed."
        assert counted in text
        if of_kind.sum() == 1:
            assert (record["query_positive"] in text) == (not obeyed[index])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report] == [row.name for row in rows]
    assert report[1]["dollars"] is None


def test_the_command_runs_what_is_missing_and_refuses_results_of_other_settings(folder, done):
    changed = folder / "changed.yaml"
    changed.write_text((folder / "curve.yaml").read_text().replace("train_batch_size: 4", "train_batch_size: 2"))
    status, printed, error = call("inf-embed", "ablate", folder / "curve.yaml", "--output", folder / "out")
    assert status == 0, error
    assert "max_records 8" in printed
    status, _, error = call("inf-embed", "ablate", changed, "--output", folder / "out")
    assert status == 2
    assert "max_records 4, seed 1" in error_line(error)
    assert "is of other settings: name another --output" in error_line(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [", "not valid YAML"),
        ("- a", "expected names and their values"),
        ("cells: {mine: {learning_rate: fast}}", "mine: "),
        ("cells: {mine: {objective: uni_Q}}", "mine: unknown objective"),
        ("cells: {mine: {report_to: wandb}}", "mine: there is no argument 'report_to'"),
        ("gird: {objective: [uni_P]}", "unknown key 'gird'"),
        ("grid: {objective: uni_P}", "grid: objective must be a list"),
        ("grid: {objectve: [uni_P]}", "there is no argument 'objectve'"),
        ("cells: {mine: {output_dir: here}}", "mine: there is no argument 'output_dir'"),
        ("cells: {mine: uni_P}", "mine must be a mapping"),
        ("seeds: [1, 1]\ngrid: {objective: [uni_P]}", "seeds must be different whole numbers"),
        ("data: mini", "neither a grid nor a cell"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path / "config.yaml")
    assert "config.yaml" in str(error.value)


def test_a_grid_is_every_combination_and_cells_are_added(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "settings: {num_train_epochs: 1}\ngrid: {objective: [uni_P, multi_P_I], plain_weight: [0, 1]}\n"
        "cells: {long: {num_train_epochs: 9, learning_rate: 3e-4}}"
    )
    ablation = read_config(tmp_path / "config.yaml")
    assert list(ablation.cells) == [
        "objective uni_P, plain_weight 0", "objective uni_P, plain_weight 1", "objective multi_P_I, plain_weight 0",
        "objective multi_P_I, plain_weight 1", "long", BASELINE,
    ]  # fmt: skip
    assert ablation.cells["long"] == {"data": "mini", "num_train_epochs": 9, "learning_rate": 0.0003}
    assert ablation.cells[BASELINE] == {"data": "mini", "num_train_epochs": 1, "instructions": False}
    assert (ablation.evaluate, ablation.seeds, ablation.axis) == ({"data": "mini", "split": "validation"}, [42], None)


def test_the_baseline_has_the_same_queries_and_passages_and_no_instruction(few_records, model):
    with_them, without = training_dataset(few_records), training_dataset(few_records, instructions=False)
    assert without.column_names == with_them.column_names
    for column in without.column_names[:3]:
        assert [pair["query"] for pair in without[column]] == [pair["query"] for pair in with_them[column]]
        assert {pair["instruction"] for pair in without[column]} == {""}
    assert without["document"] == with_them["document"]
    rows = without[:]
    columns = [model.preprocess(rows[name]) for name in without.column_names]
    loss = InstructionContrastiveLoss(model, "multi_P_I")([dict(column) for column in columns])
    alone = InstructionContrastiveLoss(model, "uni_P")([dict(column) for column in columns])
    assert loss.item() == pytest.approx(alone.item(), abs=1e-5), "there is no other instruction to tell apart"
