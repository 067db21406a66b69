"""The unmodified openai-python against a running server: python openai_python.py http://127.0.0.1:8000

Prints one line for each check; the exit code is 1 when one fails. `cargo xtask clients` runs it.
"""

import concurrent.futures
import json
import sys
import time
import urllib.request

import openai
from openai import OpenAI

address = sys.argv[1].rstrip("/")
client = OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
STORY = ", there was a little girl named Lily"
PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": PROMPT}]
checks = []


def check(function):
    checks.append(function)
    return function


def stats():
    request = urllib.request.Request(f"{address}/tinyserve/stats", headers={"authorization": "Bearer key"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def refused(kind, status, **request):
    try:
        client.completions.create(model=request.pop("model", MODEL), **request)
    except kind as error:
        assert error.status_code == status, error
        return error
    raise AssertionError(f"expected {kind.__name__}")


@check
def models():
    model = client.models.retrieve(MODEL)
    assert model.object == "model" and model.owned_by == "tinyserve", model


@check
def completion():
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12)
    assert answer.object == "text_completion" and answer.choices[0].text.startswith(STORY), answer
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


@check
def completion_of_many_prompts():
    answer = client.completions.create(
        model=MODEL, prompt=[[1, 403, 407, 261, 378], [1, 403]], n=2, temperature=0, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text


@check
def completion_streamed():
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=20, seed=1)
    text, usage = "", None
    for chunk in client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=20, seed=1, stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices:
            text += chunk.choices[0].text
        else:
            usage = chunk.usage
    assert text == whole.choices[0].text, (text, whole)
    assert usage.completion_tokens == 20


@check
def completion_logprobs():
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs))[1:]:
        assert top[token] == logprob


@check
def stop():
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40, stop=["girl"])
    assert answer.choices[0].text == ", there was a little " and answer.choices[0].finish_reason == "stop"


@check
def chat():
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=12)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content.startswith(STORY), answer
    assert answer.object == "chat.completion" and answer.usage.total_tokens == 17


@check
def chat_streamed():
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith(STORY)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


@check
def chat_through_the_helper():
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, temperature=0, stop=["girl"]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content == ", there was a little ", final


@check
def chat_logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=3, logprobs=True, top_logprobs=2)
    for token in answer.choices[0].logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob


@check
def errors():
    error = refused(openai.BadRequestError, 400, prompt=PROMPT, temperature=-1)
    assert error.param == "temperature" and error.type == "invalid_request_error", error
    error = refused(openai.BadRequestError, 400, prompt=[5] * 600)
    assert error.code == "context_length_exceeded", error
    error = refused(openai.NotFoundError, 404, model="gpt-4", prompt=PROMPT)
    assert error.code == "model_not_found", error
    wrong = OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
    try:
        wrong.models.list()
        raise AssertionError("a wrong key opened")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error


@check
def retries():
    # The client waits for as long as it is told, and then gets its answer, also from a slow machine.
    patient = OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=60, timeout=120)
    ask = dict(model=MODEL, prompt=PROMPT, max_tokens=200, extra_body={"ignore_eos": True})
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda _: patient.completions.create(**ask), range(48)))
    assert all(answer.usage.completion_tokens == 200 for answer in answers)


@check
def cancellation():
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, n=16, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while stats()["running"] + stats()["waiting"]:
        assert time.monotonic() < deadline, stats()
        time.sleep(0.01)


@check
def extensions():
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4,
        extra_body={"tinyserve": {"attention": "sparse", "session": "s1"}})
    assert answer.choices[0].model_extra["tinyserve"]["kv"]["pages"] >= 1, answer
    again = client.completions.create(
        model=MODEL, prompt=PROMPT + STORY, max_tokens=4, extra_headers={"x-session-id": "s1"})
    assert again.usage.prompt_tokens_details.cached_tokens >= 8, again


failed = 0
for function in checks:
    try:
        function()
        print(f"ok      {function.__name__}")
    except Exception as error:  # noqa: BLE001
        failed += 1
        print(f"FAILED  {function.__name__}: {type(error).__name__}: {error}")
print(f"openai-python {openai.__version__}: {len(checks) - failed} of {len(checks)} checks passed")
sys.exit(1 if failed else 0)
