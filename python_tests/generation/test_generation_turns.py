"""Streams, and conversations of several turns."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest
import transformers
from generation_prompts import PROMPTS, expected, make_prompts
from helpers import END, START


def test_stream_is_the_returned_text(model):
    printed = io.StringIO()
    streamer = transformers.TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with redirect_stdout(printed):
        output = model.generate("Some prompt", max_new_tokens=32, streamer=streamer)
    assert printed.getvalue() == output.text[0] + "\n"


class Recorder(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


def test_streamer_protocol_is_transformers(model, peer):
    ours, theirs = Recorder(), Recorder()
    model.generate([PROMPTS[0]], max_new_tokens=6, streamer=ours)
    expected(peer, PROMPTS[0], max_new_tokens=6, streamer=theirs)
    assert [value.tolist() for value in ours.values] == [value.tolist() for value in theirs.values]
    assert ours.ended == theirs.ended == 1
    with pytest.raises(ValueError, match="streamer is given with 3 prompts, expected a single prompt"):
        model.generate(PROMPTS, max_new_tokens=6, streamer=ours)


def test_stream_ends_when_generation_fails(model):
    def fail(ids, scores):
        raise RuntimeError("stop here")

    streamer = Recorder()
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate([1, 2], max_new_tokens=4, streamer=streamer, logits_processor=[fail])
    assert streamer.ended == 1


# Conversations


def test_further_turns_are_one_conversation(model, peer, live):
    turns = [make_prompts(12, 3), make_prompts(5, 1), make_prompts(2, 20)]
    history, output = [[], []], None
    for turn, prompts in enumerate(turns):
        output = model.generate(
            prompts,
            sequences=output and output.sequences,
            keep=turn < 2,
            max_new_tokens=8,
            eos_token_id=None,
            repetition_penalty=1.2,  # over the whole conversation
        )
        for i in range(2):
            history[i] = history[i] + prompts[i]
            assert output.tokens[i] == expected(peer, history[i], max_new_tokens=8, repetition_penalty=1.2)
            history[i] = history[i] + output.tokens[i]
        if turn < 2:
            assert [sequence.token_ids for sequence in output.sequences] == history
            assert len(live) == 2
    assert output.sequences is None and live == []


def test_chat_turns_follow_the_template(model, live):
    first = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4, keep=True)
    (sequence,) = first.sequences
    before = list(sequence.token_ids)
    second = model.generate(
        [{"role": "user", "content": "Again"}], sequences=first.sequences, max_new_tokens=4, keep=True
    )
    turn = model.tokenizer("<|end|>\n<|start|>user\nAgain<|end|>\n<|start|>assistant\n").input_ids
    assert turn[0] == END and turn.count(START) == 2
    assert sequence.token_ids == before + turn + second.tokens[0]
    # an answer that ended itself is not ended twice
    sequence.token_ids[-1] = END
    before = list(sequence.token_ids)
    third = model.generate([{"role": "user", "content": "Again"}], sequences=[sequence], max_new_tokens=4, keep=True)
    assert sequence.token_ids == before + turn[1:] + third.tokens[0]
    with pytest.raises(ValueError, match="the same conversation twice"):
        model.generate([[1], [2]], sequences=[sequence, sequence], max_new_tokens=2)
    model.free(sequence)
    assert live == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("keep", [False, True])
def test_a_failed_call_leaves_nothing_behind(model, live, error, keep):
    def fail(ids, scores):
        if ids.shape[1] > len(PROMPTS[0]) + 2:
            raise error("stop here")
        return scores

    with pytest.raises(error):
        model.generate(PROMPTS, max_new_tokens=8, logits_processor=[fail], keep=keep)
    assert live == []
    # a conversation of the caller's stays the caller's when it was to be kept
    sequences = model.generate([PROMPTS[0]], max_new_tokens=1, keep=True).sequences
    with pytest.raises(error):
        model.generate([[1, 2, 3]], sequences=sequences, max_new_tokens=8, logits_processor=[fail], keep=keep)
    assert live == (sequences if keep else [])
    if keep:
        model.free(sequences[0])
