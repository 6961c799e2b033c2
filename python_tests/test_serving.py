"""One model in a service: threads take turns, a stream ends whatever happens, an answer is stopped within one token,
and the service of docs/serving.md keeps its promises.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from contextlib import aclosing
from queue import Queue

import pytest
import torch
import transformers
from helpers import ROOT, make_chat_folder

import pop_ext

CHAT = [{"role": "user", "content": "Hello, who is there?"}]


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return make_chat_folder(tiny_llama, tmp_path_factory)


@pytest.fixture(params=[False, True], ids=["plain", "prefix cache"])
def model(request, folder):
    return pop_ext.load(folder, dtype=torch.float32, prefill_depth=3, prefix_cache=request.param, max_cache_tokens=8192)


def test_eight_threads_take_turns(model):
    """Everything that a service does at once: each thread gets what it would get alone."""
    prompts = [f"Thread {i} " * 12 for i in range(8)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(prompt, **options).tokens for prompt in prompts]
    logits = model.logits([[1, 2, 3]], [[4, 5]])[0]
    found, errors, inside = [[] for _ in prompts], [], []
    forward = model._forward

    def watched(*args):
        inside.append(threading.get_ident())
        before = len(inside)
        time.sleep(0.001)  # another thread would come in here
        result = forward(*args)
        if len(inside) != before:
            errors.append("two threads are in one model")
        return result

    model._forward = watched
    start = threading.Barrier(8)

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(3):
                output = model.generate(prompts[i], keep=True, **options)
                found[i].append(output.tokens)
                with output.sequences[0] as sequence, sequence.fork() as fork:
                    ours, theirs = (
                        model.generate([7, 8], sequences=[s], keep=True, **options).tokens for s in (sequence, fork)
                    )
                    assert ours == theirs
                assert torch.allclose(model.logits([[1, 2, 3]], [[4, 5]])[0], logits, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert found == [[tokens] * 3 for tokens in expected]
    assert len(set(inside)) == 8
    assert len(model.cache.free_blocks) + len(model.cache.prefixes) == model.cache.num_blocks
    assert sum(model.cache.references) == len(model.cache.prefixes)


def test_closing_waits_for_a_call(model):
    """A conversation that another thread generates from is closed after that."""
    output = model.generate("Hello", max_new_tokens=2, keep=True)
    (sequence,) = output.sequences
    entered, leave = threading.Event(), threading.Event()

    def hold(ids, scores):
        entered.set()
        assert leave.wait(60)
        return torch.tensor([False])

    options = {"sequences": [sequence], "keep": True, "max_new_tokens": 2, "stopping_criteria": [hold]}
    call = threading.Thread(target=model.generate, args=["again"], kwargs=options)
    close = threading.Thread(target=sequence.close)
    call.start()
    assert entered.wait(60)
    close.start()
    close.join(timeout=0.2)
    assert close.is_alive() and sequence.cache is not None
    leave.set()
    close.join(timeout=60), call.join(timeout=60)
    assert sequence.cache is None and sequence.blocks == []
    sequence.close()
    with pytest.raises(ValueError, match="was freed"):
        model.generate("more", sequences=[sequence], max_new_tokens=2)


def test_a_full_cache_says_what_to_do(folder):
    model = pop_ext.load(folder, max_cache_tokens=128)
    (kept,) = model.generate([1] * 100, max_new_tokens=2, keep=True).sequences
    with pytest.raises(pop_ext.CacheFullError, match=r"close a conversation that is kept \(sequence\.close\(\)\)"):
        model.generate([2] * 100, max_new_tokens=2)
    with kept:
        pass
    assert model.generate([2] * 100, max_new_tokens=2).tokens


def test_stopped_within_one_token(model):
    stop, tokens = threading.Event(), Queue()

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            tokens.put(value)

        def end(self):
            tokens.put(None)

    outputs = []
    options = {"max_new_tokens": 900, "eos_token_id": None, "streamer": Streamer()}
    options["stopping_criteria"] = [lambda ids, scores: torch.tensor([stop.is_set()])]
    thread = threading.Thread(target=lambda: outputs.append(model.generate(CHAT, **options)))
    thread.start()
    for _ in range(5):  # the prompt and four tokens
        tokens.get(timeout=60)
    seen = tokens.qsize()
    stop.set()
    thread.join(timeout=60)
    (output,) = outputs
    # those that were there by then, one on its way to the queue, one that had been chosen, and one that sees it
    assert 4 <= len(output.tokens[0]) <= 4 + seen + 2 + 1


@pytest.mark.parametrize(
    "prompt, options", [("", {}), ("a", {"num_beams": 2}), ("a" * 2000, {}), ("a", {"prefill_depth": 99})], ids=str
)
def test_a_stream_ends_also_when_arguments_are_refused(model, prompt, options):
    streamer = transformers.TextIteratorStreamer(model.tokenizer, timeout=60)
    with pytest.raises(ValueError):
        model.generate(prompt, streamer=streamer, max_new_tokens=4, **options)
    assert "".join(streamer) in ("", prompt)


# The page


@pytest.fixture
def service(model):
    page = (ROOT / "docs" / "serving.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1].partition("\nasync def main")[0]
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    return names["Service"], names["Busy"]


SETTINGS = {"max_new_tokens": 8, "do_sample": False}


async def collect(answer) -> str:
    return "".join([text async for text in answer])


def test_the_service_streams(model, service):
    async def main():
        served = service[0](model)
        answers = [served.answer(CHAT, **SETTINGS) for _ in range(4)]
        return await asyncio.gather(*map(collect, answers))

    wanted = model.generate(CHAT, **SETTINGS).text[0]
    assert asyncio.run(asyncio.wait_for(main(), 120)) == [wanted] * 4


def test_the_service_stops_and_refuses(model, service):
    made = []
    choose = model.generate

    def counted(*args, **settings):
        output = choose(*args, **settings)
        made.append(len(output.tokens[0]))
        return output

    (space,) = model.tokenizer(" ").input_ids

    def spaces(ids, scores):  # a streamer hands out whole words
        scores[:, space] += 1000 * (ids.shape[1] % 2)
        return scores

    async def main():
        served = service[0](model, room=2)
        endless = {"max_new_tokens": 900, "eos_token_id": None, "logits_processor": [spaces]}
        async with aclosing(served.answer(CHAT, **endless)) as first:
            await anext(first)
            waiting = asyncio.create_task(collect(served.answer(CHAT, **SETTINGS)))
            await asyncio.sleep(0)  # until it waits
            with pytest.raises(service[1]):
                await collect(served.answer(CHAT, **SETTINGS))
            assert not waiting.done()
        assert await waiting == wanted
        with pytest.raises(ValueError, match="num_beams"):
            await collect(served.answer(CHAT, num_beams=2))
        assert await collect(served.answer(CHAT, **SETTINGS)) == wanted

    wanted = model.generate(CHAT, **SETTINGS).text[0]
    model.generate = counted
    asyncio.run(asyncio.wait_for(main(), 120))
    assert made[0] < 200, "the endless answer went on"
