"""What other packages do not document is still as ``sentence_transformers_inf.compat`` takes it to be."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.compat import HTTPError, attention_of, import_openvino
from tests.hub import connect

NOWHERE = "http://127.0.0.1:9"


def test_huggingface_hub_raises_its_http_client_s_error(tmp_path, monkeypatch):
    connect(monkeypatch, NOWHERE, tmp_path)
    assert issubclass(HfHubHTTPError, HTTPError), "an answer of the Hub that is an error is no HTTPError any more"
    try:
        HfApi().model_info("user/model")
    except HTTPError:
        return
    except Exception as error:
        pytest.fail(f"where the Hub cannot be reached, huggingface_hub raises {type(error)} and no HTTPError any more")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_keeps_the_attention_that_is_used_in_the_configuration(tiny, attention):
    encoder = load_instruction_model(tiny)[0].model
    encoder.set_attn_implementation(attention)
    assert attention_of(encoder) == attention, (
        "what set_attn_implementation sets is not where attention_of reads it any more"
    )


def test_openvino_has_nobody_to_report_to():
    reporting = import_openvino().tools.ovc.telemetry_utils.tm
    assert reporting.__name__ == "openvino.tools.ovc.telemetry_stub", "importing OpenVINO sends an event to its maker again"
