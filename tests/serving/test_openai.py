"""The endpoints as the `openai` client from PyPI uses them: what it sends is understood, what it reads is complete."""

import math
import typing

import openai
import pytest
from openai.types import completion_create_params as texts
from openai.types.chat import completion_create_params as chats

from mixdpo.evaluation.generate import choose_expert


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, text="hello", **options):
    return client.chat.completions.create(model=options.pop("model", "mixture"),
                                          messages=[{"role": "user", "content": text}], **options)


def ask(client, prompt="hello", **options):
    return client.completions.create(model=options.pop("model", "mixture"), prompt=prompt, **options)


def test_models(client, live):
    names = [model.id for model in client.models.list()]
    assert names == ["mixture", "sparse", "reference", "expert-0", "expert-1", "dpo"]
    assert client.models.retrieve("expert-1").id == "expert-1"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found" and "expert-0" in caught.value.message


def test_a_completion_says_who_answered_under_which_weights(client):
    answer = ask(client, seed=5)
    choice, extra = answer.choices[0], answer.mixdpo
    assert answer.object == "text_completion" and answer.model == "mixture" and choice.text
    assert choice.finish_reason in ("stop", "length") and choice.index == 0
    assert extra["weights"] == pytest.approx([0.7, 0.3], abs=1e-6) and extra["seed"] == 5
    wanted = choose_expert(_log([0.7, 0.3]), 1, "mixture", 5).item()
    assert extra["expert"] == wanted and extra["experts"] == [wanted]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    assert choice.text == ask(client, model=f"expert-{wanted}", seed=5).choices[0].text


def _log(weights):
    import torch

    return torch.tensor(weights).log()


def test_the_model_names_the_policy(client):
    assert ask(client, model="sparse").mixdpo["expert"] == 0
    assert ask(client, model="expert-1").mixdpo["expert"] == 1
    for name in ("reference", "dpo"):
        answer = ask(client, model=name)
        assert answer.mixdpo["expert"] is None and answer.mixdpo["weights"] == pytest.approx([0.7, 0.3], abs=1e-6)
    texts = {ask(client, model=name, seed=3).choices[0].text for name in ("reference", "expert-0", "expert-1", "dpo")}
    assert len(texts) == 4


def test_the_same_seed_gives_the_same_text_and_the_seed_that_was_drawn_is_returned(client):
    first = ask(client)
    again = ask(client, seed=first.mixdpo["seed"])
    assert first.choices[0].text == again.choices[0].text and first.mixdpo == again.mixdpo
    assert len({ask(client, seed=n).choices[0].text for n in range(5)}) > 1
    assert len({ask(client).mixdpo["seed"] for _ in range(3)}) == 3


def test_options_reach_the_model(client):
    """Catches: temperature or top_p that is read and not passed on."""
    texts = {ask(client, model="expert-0", seed=1, **options).choices[0].text
             for options in ({}, {"top_p": 0.5}, {"temperature": 0})}
    assert len(texts) == 3
    assert ask(client, temperature=0, model="expert-0", seed=1).choices[0].text == ask(
        client, temperature=0, model="expert-0", seed=2).choices[0].text
    answer = ask(client, "say:0123456789", max_tokens=4)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("0123", "length")
    assert answer.usage.completion_tokens == 4
    answer = ask(client, "say:01", max_tokens=4)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("01", "stop")


@pytest.mark.parametrize("call", [ask, chat])
@pytest.mark.parametrize("stop, wanted", [("END", "ö one E EN "), (["two", " EN"], "ö one E"), ("absent", None)])
def test_stop_sequences(client, call, stop, wanted):
    """Catches: a stop sequence of several tokens that is not found, or that is shown in part by a stream."""
    text = "ö one E EN END two"
    whole = call(client, f"say:{text}", stop=stop)
    said = _text(whole.choices[0])
    assert said == (wanted or text) and whole.choices[0].finish_reason == "stop"
    parts = [_delta(chunk.choices[0]) for chunk in call(client, f"say:{text}", stop=stop, stream=True)]
    assert "".join(parts) == said and "\ufffd" not in said and len(parts) > 5


def _text(choice):
    return choice.message.content if hasattr(choice, "message") else choice.text


def _delta(choice):
    return (choice.delta.content or "") if hasattr(choice, "delta") else choice.text


@pytest.mark.parametrize("call", [ask, chat])
def test_a_stream_gives_the_text_of_the_answer_without_one(client, call):
    for seed in range(5):
        whole = call(client, "words", seed=seed, n=2)
        stream = call(client, "words", seed=seed, n=2, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        parts, reasons = {0: [], 1: []}, {}
        for chunk in chunks[:-1]:
            for choice in chunk.choices:
                parts[choice.index].append(_delta(choice))
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        assert ["".join(parts[n]) for n in range(2)] == [_text(choice) for choice in whole.choices]
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
        assert chunks[0].mixdpo == whole.mixdpo and chunks[0].mixdpo["experts"][0] == chunks[0].mixdpo["expert"]
        assert not any(hasattr(chunk, "mixdpo") for chunk in chunks[1:])
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1
        assert all("\ufffd" not in part for own in parts.values() for part in own)


def test_chat_chunks_open_with_the_role(client):
    chunks = list(chat(client, "say:ab", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert chunks[0].usage is None and chunks[-1].choices[0].finish_reason == "stop"
    whole = chat(client, "say:ab")
    assert (whole.object, whole.choices[0].message.role, whole.choices[0].message.content) == (
        "chat.completion", "assistant", "ab")


def test_several_choices_differ_and_the_first_is_that_of_n_1(client):
    """Catches: n copies of one text; a choice that depends on how many there are."""
    one, four = ask(client, seed=11), ask(client, seed=11, n=4)
    texts = [choice.text for choice in four.choices]
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3] and len({*texts}) == 4
    assert texts[0] == one.choices[0].text and texts[:2] == [choice.text for choice in ask(client, seed=11,
                                                                                           n=2).choices]
    assert four.mixdpo["experts"] == choose_expert(_log([0.7, 0.3]), 4, "mixture", 11).tolist()
    assert four.usage.completion_tokens == sum(len(text.encode()) for text in texts)
    experts = [expert for seed in range(40) for expert in ask(client, seed=seed, n=8).mixdpo["experts"]]
    assert abs(experts.count(1) / len(experts) - 0.3) < 4 * math.sqrt(0.21 / len(experts))


def test_logprobs_of_a_completion(client):
    answer = ask(client, "say:aö", logprobs=2)
    found = answer.choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xb6"] and found.text_offset == [0, 1, 1]
    assert all(-1 <= logp < 0 for logp in found.token_logprobs)
    assert [top[name] for top, name in zip(found.top_logprobs, found.tokens)] == found.token_logprobs
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    assert ask(client, "say:ab", logprobs=0).choices[0].logprobs.top_logprobs is None
    assert ask(client, "say:ab").choices[0].logprobs is None
    stream = list(ask(client, "say:aö", logprobs=2, stream=True, seed=answer.mixdpo["seed"]))
    parts = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [t for part in parts for t in part.token_logprobs] == found.token_logprobs


def test_logprobs_of_chat(client):
    answer = chat(client, "say:aö", logprobs=True, top_logprobs=3, seed=4)
    found = answer.choices[0].logprobs.content
    assert bytes(b for one in found for b in one.bytes).decode() == "aö"
    assert [len(one.top_logprobs) for one in found] == [3, 3, 3]
    assert found[0].token == "a" and found[0].top_logprobs[0].logprob == found[0].logprob
    assert chat(client, "say:a", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client, "say:a").choices[0].logprobs is None
    cut = chat(client, "say:abcd", logprobs=True, stop="c").choices[0]
    assert cut.message.content == "ab" and [one.token for one in cut.logprobs.content] == ["a", "b"]


def test_a_user_changes_the_weights(client, live):
    """Catches: evidence that is stored and not used; the evidence of another user."""
    import httpx

    for _ in range(3):
        httpx.post(f"{live.url}/v1/users/short/preferences",
                   json={"prompt": "p", "chosen": "a", "rejected": "a" * 30}).raise_for_status()
    weights = ask(client, user="short").mixdpo["weights"]
    h = 2.0
    odds = 0.7 / 0.3 * ((1 + math.exp(-h)) / (1 + math.exp(h))) ** 3
    assert weights == pytest.approx([odds / (1 + odds), 1 / (1 + odds)], rel=1e-4)
    assert ask(client, user="short", model="sparse").mixdpo["expert"] == 1
    assert ask(client, user="other").mixdpo["weights"] == pytest.approx([0.7, 0.3], abs=1e-6)
    assert ask(client, user="trained").mixdpo["weights"] == pytest.approx([0.1, 0.9], abs=1e-6)
    assert chat(client, user="short").mixdpo["weights"] == pytest.approx(weights)


@pytest.mark.parametrize("options, kind, param", [
    ({"model": "gpt-5"}, openai.NotFoundError, "model"), ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"), ({"user": "a b"}, openai.BadRequestError, "user"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"), ({"prompt": ["a", "b"]}, openai.BadRequestError, "prompt"),
    ({"n": 9}, openai.BadRequestError, "n"), ({"extra_body": {"top_k": 1}}, openai.BadRequestError, "top_k"),
    ({"prompt": "fail:"}, openai.InternalServerError, None)])
def test_errors_are_the_clients_exceptions(client, options, kind, param):
    with pytest.raises(kind) as caught:
        ask(client, **options)
    error = caught.value
    assert error.param == param and error.body["type"] and len(error.body["message"]) > 10
    options = options | {"stream": True}
    with pytest.raises(kind if "fail:" not in options.values() else openai.APIError):
        list(ask(client, **options))


def test_an_error_in_the_middle_of_a_stream_is_an_exception(client, live):
    """Catches: a stream that ends as if it were complete; a log that shows the prompt."""
    shown = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in ask(client, "fail: secret", stream=True, model="expert-0", seed=1):    # begins with letters
            shown.append(chunk.choices[0].text)
    assert len("".join(shown)) > 0 and "log" in caught.value.message
    assert any("RuntimeError" in line for line in live.log) and not any("secret" in line for line in live.log)


def test_conversations_that_the_template_cannot_write_are_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="mixture", messages=[{"role": "assistant", "content": "x"}])
    assert "user" in caught.value.message
    parts = [{"type": "text", "text": "say:"}, {"type": "text", "text": "ok"}]
    answer = client.chat.completions.create(model="mixture", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "ok"


def test_an_answer_is_a_turn_of_the_next_request(client):
    """In each form in which the client gives it. Catches: a field of its message, such as annotations, unknown."""
    said = chat(client, "say:ok").choices[0].message
    for turn in (said, said.model_dump(), said.to_dict()):
        messages = [{"role": "user", "content": "a"}, turn, {"role": "user", "content": "say:yes"}]
        answer = client.chat.completions.create(model="mixture", messages=messages)
        assert answer.choices[0].message.content == "yes"


@pytest.mark.parametrize("call, fields", [(ask, texts.CompletionCreateParamsBase),
                                          (chat, chats.CompletionCreateParamsBase)])
def test_every_field_of_the_client_may_be_null(client, call, fields):
    """Catches: a field of OpenAI's API that is unknown here."""
    names = typing.get_type_hints(fields).keys() - {"model", "prompt", "messages"}
    assert {"max_tokens", "user"} < names and len(names) > 10
    call(client, extra_body=dict.fromkeys(names))


def test_an_error_names_the_field_that_was_sent(client, live):
    """Catches: max_tokens named to a client that sent max_completion_tokens; prompt to one that sent messages."""
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **{name: 0})
        assert caught.value.param == name and caught.value.body["message"].startswith(f"{name}: got 0")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="mixture", messages=[{"role": "assistant", "content": "x"}])
    assert caught.value.param == "messages"
    live.service.served.context = 5
    for call, name in ((ask, "prompt"), (chat, "messages")):
        with pytest.raises(openai.BadRequestError) as caught:
            call(client, "too long")
        assert caught.value.param == name and caught.value.code == "context_length_exceeded"


def test_the_asynchronous_client_streams_too(live):
    import asyncio

    async def texts():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            async def one(n):
                stream = await client.completions.create(model="mixture", prompt=f"say:{n}-" + "x" * 20, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(n) for n in range(20)))

    assert asyncio.run(texts()) == [f"{n}-" + "x" * 20 for n in range(20)]
