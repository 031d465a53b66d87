"""What other packages do not document is still as ``sentence_transformers_inf.compat`` takes it to be."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from sentence_transformers_inf.compat import HTTPError
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
