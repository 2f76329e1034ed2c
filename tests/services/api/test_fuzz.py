"""The routes under random input made from the service's own description."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.services.serving import serving, tiny_files

STATUSES = {200, 400, 401, 404, 405, 413, 422, 429, 499}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    answers = {"default_max_tokens": 4, "max_tokens": 8}
    with serving(folder, tiny_files(folder / "model"), answers=answers) as running:
        yield running


@pytest.mark.slow
def test_no_input_breaks_the_service(server):
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/feedback",
    }
    for operation in operations:
        for mode in GenerationMode:  # what the description allows, and what it does not

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
            )
            def refuse_or_answer(case):
                response = case.call(timeout=30)
                assert response.status_code in STATUSES, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
                assert "Traceback" not in response.text

            if mode is GenerationMode.POSITIVE or operation.body:
                refuse_or_answer()  # else there is nothing to get wrong
