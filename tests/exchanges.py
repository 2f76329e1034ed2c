"""One recorded exchange, from which the tests of the store, the drift test and the canary make theirs."""

from services.events import Exchange

VERSION = "0123456789ab"
EXCHANGE = Exchange(
    request_id="r0",
    received_at=1000.0,
    route="/v1/chat/completions",
    key_id=None,
    user=None,
    session=None,
    role="champion",
    shadow_of=None,
    model="toy",
    version=VERSION,
    messages='[{"role": "user", "content": "turn on the light"}]',
    parameters="{}",
    status=200,
    reason=None,
    answer='{"intent":"On"}',
    reasoning=None,
    finish_reason="stop",
    prompt_tokens=5,
    completion_tokens=4,
    queue_s=0.001,
    first_token_s=0.1,
    total_s=0.5,
    decisions='{"toxicity": [true, null]}',
    valid_output=True,
    mean_logprob=-0.1,
)
