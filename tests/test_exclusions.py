"""What an instruction excludes: finding it, and subtracting it."""

import subprocess
import sys

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoder_of, two_towers
from sentence_transformers_inf.modules.exclusions import find_exclusions
from sentence_transformers_inf.modules.instruction_transformer import EXCLUSION_WEIGHT
from tests.test_modules import adapter
from tests.training import train

ASK = {"query": "how to pay an invoice", "instruction": "Official guidance, but nothing about pricing."}
FREE = {"query": "how to pay an invoice", "instruction": "Official guidance, with the steps in order."}


@pytest.mark.parametrize(
    ("instruction", "excluded"),
    [
        ("Nothing that needs the Enterprise plan.", ["Enterprise plan"]),
        ("It has to work without touching the terminal.", ["terminal"]),
        ("Leave out anything about mobile.", ["mobile"]),
        ("Skip solutions that involve contacting support.", ["contacting support"]),
        ("Something other than SAML, please.", ["SAML"]),
        ("Anything but email.", ["email"]),
        ("Tell me how it is done, except on Windows.", ["Windows"]),
        ("I don't want to reinstall anything.", ["reinstall anything"]),
        ("Rule out whatever costs extra.", ["costs extra"]),
        ("A cure at home; surgery is not wanted.", ["surgery"]),
        ("Documents on hedging are not relevant.", ["hedging"]),
        ("Texts on summer breeding are beside the point.", ["summer breeding"]),
        ("My phone is old, so apps are to be left out.", ["apps"]),
        ("Nothing on roads, nothing on court rulings.", ["roads", "court rulings"]),
        ("Written for nurses, not for parents.", ["parents"]),
        ("Dr. Singh's view, rather than the ministry's.", ["ministry's"]),
    ],
)
def test_what_is_excluded_is_found(instruction, excluded):
    assert find_exclusions(instruction) == excluded


@pytest.mark.parametrize(
    "instruction",
    [
        "For young children, in simple words.",
        "Not only the causes but the remedies as well.",
        "Nothing that is not official.",
        "It must not go without a figure.",
        "No later than 1950, and no more than sixty words.",
        "Whether or not it is legal does not matter.",
        "Our compliance people have forbidden links. Don't suggest those.",
        "Ohne Preise, bitte.",
        "",
    ],
)
def test_what_excludes_nothing_or_denies_twice_is_left_alone(instruction):
    assert find_exclusions(instruction) == []


@pytest.fixture(scope="module", params=["one encoder", "two encoders", "attention", "adapter"])
def model(request, tiny):
    if request.param == "attention":
        return load_instruction_model(tiny, interaction="gated").eval()
    model = load_instruction_model(tiny)
    made = {"one encoder": lambda model: model, "two encoders": two_towers, "adapter": adapter}
    return made[request.param](model).eval()


def unit(vector):
    return vector / np.linalg.norm(vector)


def expected(model, item, excluded):
    """By the definition: the excluded text's direction, encoded as a query of its own kind, is subtracted."""
    route = {"instruction": "x", **item}
    told = model.encode_query({key: route[key] for key in ("query", "instruction")})
    alone = model.encode_query({"query": excluded, "instruction": " "})
    first = model[0]
    if hasattr(first, "sub_modules") and "instructed" in first.sub_modules:  # an adapter encodes both by its own encoder
        alone = model.encode(excluded, task="instructed")
    return unit(unit(told) - EXCLUSION_WEIGHT * unit(alone)) * np.linalg.norm(told)


def test_what_is_excluded_is_subtracted(model):
    for exclude, text in (("pricing", "pricing"), (["pricing", "taxes"], "pricing; taxes"), (("pricing",), "pricing")):
        got = model.encode_query({**ASK, "exclude": exclude})
        assert np.allclose(got, expected(model, ASK, text), atol=1e-6)


def test_other_rows_of_the_batch_keep_their_embeddings(model):
    items = [FREE, {**ASK, "exclude": "pricing"}, "a plain query", {"query": "bare"}, {**FREE, "exclude": []}]
    got = model.encode_query(items)
    alone = np.stack([model.encode_query(item) for item in items])
    assert got.shape == alone.shape
    assert np.allclose(got, alone, atol=1e-6)
    assert np.allclose(got[4], model.encode_query(FREE), atol=1e-6)


def test_exclusions_are_found_only_where_a_model_is_told_to(tiny, tmp_path):
    plain = load_instruction_model(tiny).eval()
    finding = load_instruction_model(tiny, find_exclusions=True).eval()
    joined = f"{ASK['query']} {ASK['instruction']}"
    assert np.array_equal(plain.encode_query(ASK), plain.encode_query(joined))
    assert np.allclose(finding.encode_query(ASK), plain.encode_query({**ASK, "exclude": "pricing"}), atol=1e-6)
    # Without an exclusion to be found, or where the user says what it is, nothing changes.
    assert np.array_equal(finding.encode_query(FREE), plain.encode_query(FREE))
    assert np.array_equal(finding.encode_query({**ASK, "exclude": None}), plain.encode_query(ASK))
    finding[0].exclusion_weight = 0.75
    finding.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = load_instruction_model(tmp_path)
    assert (loaded[0].find_exclusions, loaded[0].exclusion_weight) == (True, 0.75)
    assert np.allclose(loaded.encode_query(ASK), finding.encode_query(ASK), atol=1e-6)
    assert np.array_equal(load_instruction_model(tmp_path, find_exclusions=False).encode_query(ASK), plain.encode_query(ASK))


def test_an_adapter_finds_exclusions_and_is_trained_further_without(tiny, few_records, tmp_path):
    train(few_records, tiny, tmp_path / "a", update="queries", lora_r=4, save_strategy="no")
    loaded = load_instruction_model(tmp_path / "a")
    assert encoder_of(loaded)[0].find_exclusions
    by_hand = load_instruction_model(tmp_path / "a", find_exclusions=False).encode_query({**ASK, "exclude": "pricing"})
    assert np.allclose(loaded.encode_query(ASK), by_hand, atol=1e-6)
    assert np.array_equal(loaded.encode_query(ASK["query"]), load_instruction_model(tiny).encode_query(ASK["query"]))
    further = train(few_records, tmp_path / "a", tmp_path / "b", save_strategy="no")
    assert np.allclose(load_instruction_model(tmp_path / "b").encode_query(ASK), further.encode_query(ASK), atol=1e-6)
    loss = InstructionContrastiveLoss(loaded)
    with pytest.raises(ValueError, match="loaded with find_exclusions=False"):
        loss([loaded.preprocess([ASK]), loaded.preprocess(["a passage"])])


@pytest.mark.parametrize("exclude", [3, ["pricing", None], {"a": 1}])
def test_an_exclusion_that_is_no_text_is_refused(tiny, exclude):
    with pytest.raises(TypeError, match="input 1: 'exclude' must be a string or a list of strings"):
        load_instruction_model(tiny).preprocess([FREE, {**ASK, "exclude": exclude}])


def test_an_unknown_key_is_named(tiny):
    with pytest.raises(TypeError, match="unknown key 'excludes'"):
        load_instruction_model(tiny).encode([{**ASK, "excludes": "pricing"}])


def test_the_rule_is_quick_on_long_text():
    """No pattern backtracks for ever."""
    script = (
        "from sentence_transformers_inf.modules.exclusions import find_exclusions\n"
        "for words in ('not ', 'no a ', 'a, ', 'without the a of ', 'x', 'any but ', 'is not ', ', so ', 'one'):\n"
        "    for times in (20, 60, 120, 20_000):\n"
        "        find_exclusions(words * times + 'is not wanted')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=900)
