"""The `openai` package against the server: what it returns is what the model gives directly."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image

from internvl_jax.serving import Sampling

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def data_url(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages, **settings):
    return client.chat.completions.create(model="chat", messages=messages, **settings)


def expected(served, rounds, pixels, **settings):
    return "".join(served.models["chat"].reply(rounds, list(pixels), **settings))


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["chat", "g"]
    assert client.models.retrieve("g").id == "g"
    with pytest.raises(openai.NotFoundError, match="choose from chat, g"):
        client.models.retrieve("gpt")


def test_an_answer_about_images_is_the_models(client, served):
    reply = ask(client, [question("what is it?", PIXELS[0], PIXELS[1])], max_tokens=8)
    rounds = [("<image>\n<image>\nwhat is it?", None)]
    (choice,) = reply.choices
    assert choice.message.content == expected(served, rounds, PIXELS[:2], max_new_tokens=8)
    assert choice.message.content != expected(served, rounds, PIXELS[1:], max_new_tokens=8)
    assert reply.usage.prompt_tokens == len(served.models["chat"].chat_prompt(rounds))
    assert (choice.finish_reason, reply.usage.completion_tokens) in (
        [("length", 8)] + [("stop", n) for n in range(1, 9)]
    )


def test_turns_and_instructions_are_one_conversation(client, served):
    messages = [
        {"role": "system", "content": "be brief"},
        question("what is it?", PIXELS[0]),
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "which color?"},
    ]
    rounds = [("be brief\n<image>\nwhat is it?", "a star"), ("which color?", None)]
    answer = ask(client, messages, max_tokens=5).choices[0].message.content
    assert answer == expected(served, rounds, PIXELS[:1], max_new_tokens=5)


def test_a_stream_is_the_answer_in_pieces(client):
    messages = [question("what is it?", PIXELS[0])]
    whole = ask(client, messages, max_tokens=12)
    chunks = list(
        ask(client, messages, max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 2
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_stop_text_ends_the_answer_before_it(client):
    messages = [question("what is it?", PIXELS[0])]
    whole = ask(client, messages, max_tokens=12).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = ask(client, messages, max_tokens=12, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = ask(client, messages, max_tokens=12, stop=[stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut.message.content


@pytest.mark.slow
def test_a_seed_fixes_a_sample_whatever_runs_beside_it(client, served):
    rounds = [("<image>\nwhat is it?", None)]

    def sample(seed):
        messages = [question("what is it?", PIXELS[0])]
        reply = ask(client, messages, max_tokens=8, temperature=2.0, top_p=0.9, seed=seed)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(sample, range(8)))
    assert len(set(answers)) > 4
    for seed in (0, 5):
        sampling = Sampling(2.0, 0.9, seed)
        alone = expected(served, rounds, PIXELS[:1], max_new_tokens=8, sampling=sampling)
        assert answers[seed] == alone


def test_embeddings_of_texts_and_images_are_unit_features_in_order(client, served):
    model = served.models["g"]
    inputs = ["a red star", data_url(PIXELS[0]), "una estrella roja", data_url(PIXELS[1])]
    texts = model.encode_text(inputs[::2])
    for extra, mode in (({}, "g"), ({"mode": "c"}, "c")):
        features = np.stack([texts, model.encode_image(PIXELS[:2], mode)], 1).reshape(4, -1)
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        for encoding in ("float", "base64"):
            reply = client.embeddings.create(
                model="g", input=inputs, encoding_format=encoding, extra_body=extra
            )
            got = [entry.embedding for entry in reply.data]
            if encoding == "base64":
                got = [np.frombuffer(base64.b64decode(x), "<f4") for x in got]
            np.testing.assert_allclose(got, features, atol=1e-5)
    default = client.embeddings.create(model="g", input="a red star").data[0].embedding
    np.testing.assert_allclose(default, texts[0] / np.linalg.norm(texts[0]), atol=1e-5)


def test_embeddings_tell_how_many_tokens_they_took(client, served):
    model = served.models["g"]
    texts = ["a red star", "una estrella roja y un círculo azul"]
    tokens = int((model.text_ids(texts) > 0).sum())
    assert client.embeddings.create(model="g", input=texts).usage.prompt_tokens == tokens
    patches = model.config.vit.grid**2
    both = client.embeddings.create(model="g", input=[*texts, data_url(PIXELS[0])]).usage
    assert both.prompt_tokens == both.total_tokens == tokens + 1 + patches


def test_more_chats_than_rows_are_all_answered_as_if_alone(client, served):
    """Some end early, so others join beside rows that stand elsewhere."""

    def sample(number):
        settings = dict(max_tokens=3 + number % 9, temperature=1.0 * (number % 2), seed=number)
        reply = ask(client, [question(f"what is {number}?", PIXELS[number % 3])], **settings)
        return reply.choices[0].message.content

    assert served.limits.batch < 12
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(sample, range(12)))
    for number, answer in enumerate(answers):
        alone = expected(
            served,
            [(f"<image>\nwhat is {number}?", None)],
            [PIXELS[number % 3]],
            max_new_tokens=3 + number % 9,
            sampling=Sampling(1.0 * (number % 2), 1.0, number),
        )
        assert answer == alone, number


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="not a chat model"):
        client.chat.completions.create(model="g", messages=[question("what?")])
    with pytest.raises(openai.BadRequestError, match="has no embeddings"):
        client.embeddings.create(model="chat", input="a star")
