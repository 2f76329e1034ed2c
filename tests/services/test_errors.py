import pytest

from services import errors


def test_the_body_has_the_four_keys_that_openais_clients_read():
    body = errors.invalid_value("temperature", "is 3, and at most 2 is taken").body()

    assert body == {
        "error": {
            "message": "temperature: is 3, and at most 2 is taken",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_a_refusal_says_its_reason_and_not_the_content():
    error = errors.content_refused("prompt_injection")

    assert error.status == 400
    assert error.body()["error"]["reason"] == "prompt_injection"


def test_retry_after_is_rounded_up_so_that_a_client_is_never_early():
    assert errors.rate_limit_exceeded(1.01).headers() == {"Retry-After": "2"}
    assert errors.overloaded(0.0).headers() == {"Retry-After": "1"}


@pytest.mark.parametrize(
    ("tokens", "left", "words", "waits"),
    [
        (900, 300, "the quota of a whole day is 300. Lower max_tokens", False),
        (200, 100, "100 of today's 300 are left. Lower max_tokens, or wait 60 s", True),
        (200, 0, "The daily quota of 300 tokens is used up. It resets in 60 s", True),
    ],
)
def test_a_quota_that_is_too_small_is_told_apart_from_one_that_is_used_up(tokens, left, words, waits):
    error = errors.insufficient_quota(tokens, left, 300, 60)

    assert words in error.message
    assert ("Retry-After" in error.headers()) is waits


def test_a_missing_key_is_challenged():
    assert errors.invalid_api_key().headers() == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.invalid_json("line 1"), 400),
        (errors.invalid_value(None, "messages are missing"), 422),
        (errors.context_length_exceeded(9000, 8192), 400),
        (errors.invalid_api_key(), 401),
        (errors.not_found("/v2"), 404),
        (errors.model_not_found("gpt", ["home"]), 404),
        (errors.method_not_allowed("GET", "/v1/chat/completions", ["POST"]), 405),
        (errors.body_timed_out(10), 408),
        (errors.request_too_large(1000), 413),
        (errors.rate_limit_exceeded(1), 429),
        (errors.insufficient_quota(9, 0, 10, 60), 429),
        (errors.overloaded(1), 429),
        (errors.engine_failed("r1"), 500),
        (errors.store_unavailable(), 503),
        (errors.not_ready("loading"), 503),
        (errors.timed_out(120), 504),
    ],
    ids=lambda value: value.code if isinstance(value, errors.ApiError) else str(value),
)
def test_a_code_has_its_status(error, status):
    assert error.status == status
    assert errors.CODES[error.code][0] == status
