"""The card of a checkpoint says what its folder says, and knows whether somebody has edited it."""

import json
import shutil

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.hub.card import is_generated, model_card, write_model_card
from sentence_transformers_inf.modules import adapter_tower, copy_tower, save_adapter, two_towers

RECIPE = {
    "base": "sentence-transformers/all-MiniLM-L6-v2",
    "base_on_hub": True,
    "data": "/home/somebody/data",
    "data_on_hub": False,
    "data_revision": None,
    "records": 8,
    "license": "apache-2.0",
    "minutes": 1.5,
    "hardware": "2 CPU threads",
    "settings": {"objective": "multi_P_I", "a_setting_of_tomorrow": 7, "mini_batch_size": None},
    "finished": True,
}


def save_towers(base, folder, recipe=RECIPE):
    """Save a model with an encoder of its own for queries, and the recipe of the run that it may come from."""
    model = two_towers(load_instruction_model(base))
    model.save_pretrained(str(folder), create_model_card=False)
    if recipe is not None:
        (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")


def test_settings_are_shown_as_the_recipe_has_them(tiny, tmp_path):
    save_towers(tiny, tmp_path / "model")
    text = model_card(tmp_path / "model").text
    training = text.partition("## Training\n")[2].partition("\n## ")[0]
    assert training.strip().splitlines() == [
        "- data: `data`, 8 records",
        "- objective: multi_P_I",
        "- a_setting_of_tomorrow: 7",
        "- time: 1.5 minutes on 2 CPU threads",
    ]
    assert "# model\n" in text
    assert "# user/name\n" in model_card(tmp_path / "model", "user/name").text


def test_the_revision_of_the_data_is_shown(tiny, tmp_path):
    save_towers(tiny, tmp_path, {**RECIPE, "data": "user/records", "data_on_hub": True, "data_revision": "abc"})
    card = model_card(tmp_path)
    assert "[user/records](https://huggingface.co/datasets/user/records), revision `abc`, 8 records" in card.text
    assert card.data.datasets == "user/records"


def test_only_an_adapter_promises_the_base_model_s_embeddings(tiny, tmp_path):
    """A model with two encoders may come from anybody's trainer: nobody knows whether the other is the base's still."""
    for recipe in (None, RECIPE):
        save_towers(tiny, tmp_path / str(recipe is None), recipe)
        text = model_card(tmp_path / str(recipe is None)).text
        assert "Queries and passages have an encoder each" in text
        assert "bit for bit" not in text
    base = load_instruction_model(tiny)
    save_adapter(adapter_tower(base, copy_tower(base, share=False)), tmp_path / "adapter", tiny)
    assert "bit for bit" in model_card(tmp_path / "adapter").text


def test_an_edited_card_is_told_from_a_generated_one(tiny, tmp_path):
    save_towers(tiny, tmp_path / "model")
    write_model_card(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert is_generated(card)
    assert str(model_card(tmp_path / "model")) == card
    for edited in (
        card + "\nMore.\n",
        card.replace("8 records", "9 records"),
        card.replace("- en", "- de"),
        "# model\n",
        "",
    ):
        assert not is_generated(edited)
