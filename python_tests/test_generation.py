"""`model.generate` against transformers', and what only ours does: rows on their own, further turns, times, errors."""

from __future__ import annotations

import io
import shutil
import time
from contextlib import redirect_stdout

import pytest
import torch
import transformers
from helpers import transformers_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pop_ext
from pop_ext.runtime.sampling import sample

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START, END = 256, 257


def make_tokenizer():
    """One token per byte, and two special ones: ids 0 .. 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_chat_folder(checkpoint, tmp_path_factory):
    """A copy of the checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return make_chat_folder(tiny_llama, tmp_path_factory)


@pytest.fixture(scope="module")
def peer(folder):
    return transformers_model(folder)


@pytest.fixture
def model(loaded):
    """The shared model; a test may change its generation_config."""
    before = loaded.generation_config
    loaded.generation_config = transformers.GenerationConfig(**before.to_diff_dict())
    yield loaded
    loaded.generation_config = before


@pytest.fixture(scope="module")
def loaded(folder):
    return pop_ext.load(folder, dtype=torch.float32)


@pytest.fixture
def live(model, monkeypatch):
    """The conversations that are in the model's cache."""
    sequences = []
    new_sequence, free = model.new_sequence, model.free

    def tracked_new():
        sequences.append(new_sequence())
        return sequences[-1]

    def tracked_free(sequence):
        free(sequence)
        sequences[:] = [other for other in sequences if other is not sequence]

    monkeypatch.setattr(model, "new_sequence", tracked_new)
    monkeypatch.setattr(model, "free", tracked_free)
    return sequences


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(7, 1, 33)


def expected(peer, prompt: list[int], **settings) -> list[int]:
    """The new tokens of transformers' generate for one prompt."""
    ids = torch.tensor([prompt])
    return peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


# The same tokens as transformers


def test_greedy_batch_is_transformers(model, peer):
    output = model.generate(PROMPTS, max_new_tokens=64)
    assert output.tokens == [expected(peer, prompt, max_new_tokens=64) for prompt in PROMPTS]
    assert output.text == [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in output.tokens]
    assert output.logprobs is None and output.sequences is None


def frequent(peer, count: int) -> list[int]:
    """Tokens that greedy decoding of PROMPTS makes late in the row: what a setting has to act on."""
    return [expected(peer, prompt, max_new_tokens=32)[11] for prompt in PROMPTS][:count]


SETTINGS = {
    "repetition_penalty": lambda peer: dict(repetition_penalty=1.7),
    "encoder_repetition_penalty": lambda peer: dict(encoder_repetition_penalty=2.5),
    "no_repeat_ngram_size": lambda peer: dict(no_repeat_ngram_size=2),
    "bad_words_ids": lambda peer: dict(bad_words_ids=[[token] for token in frequent(peer, 3)] + [[5, 6]]),
    "suppress_tokens": lambda peer: dict(suppress_tokens=frequent(peer, 3)),
    "begin_suppress_tokens": lambda peer: dict(
        begin_suppress_tokens=[expected(peer, prompt, max_new_tokens=1)[0] for prompt in PROMPTS]
    ),
    "sequence_bias": lambda peer: dict(sequence_bias=[[[token], -8.0] for token in frequent(peer, 2)]),
    "eos": lambda peer: dict(eos_token_id=frequent(peer, 1)[0]),
    "eos list": lambda peer: dict(eos_token_id=frequent(peer, 3)),
    "min_new_tokens": lambda peer: dict(eos_token_id=frequent(peer, 3), min_new_tokens=20),
    "min_length": lambda peer: dict(eos_token_id=frequent(peer, 3), min_length=25),
    "forced_eos_token_id": lambda peer: dict(forced_eos_token_id=9),
    "exponential_decay": lambda peer: dict(eos_token_id=3, exponential_decay_length_penalty=(4, 1.4)),
    "renormalize_logits": lambda peer: dict(renormalize_logits=True, remove_invalid_values=True),
    "watermarking": lambda peer: dict(watermarking_config={"bias": 4.0, "seeding_scheme": "selfhash"}),
    "several": lambda peer: dict(repetition_penalty=1.3, no_repeat_ngram_size=3, eos_token_id=frequent(peer, 3)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_transformers(model, peer, name):
    settings = SETTINGS[name](peer) | dict(max_new_tokens=32, pad_token_id=0)
    wanted = [expected(peer, prompt, **settings) for prompt in PROMPTS]
    if name != "renormalize_logits":
        assert wanted != [expected(peer, prompt, max_new_tokens=32) for prompt in PROMPTS], "the setting does nothing"
    assert model.generate(PROMPTS, **settings).tokens == wanted
    config = transformers.GenerationConfig(**settings)
    assert model.generate(PROMPTS, generation_config=config).tokens == wanted
    model.generation_config = config
    assert model.generate(PROMPTS).tokens == wanted


def test_max_length(model, peer):
    output = model.generate(PROMPTS, max_length=40)
    assert [len(prompt) + len(tokens) for prompt, tokens in zip(PROMPTS, output.tokens, strict=True)] == [40] * 3
    assert output.tokens == [expected(peer, prompt, max_length=40) for prompt in PROMPTS]
    with pytest.raises(ValueError, match=r"max_length=33 leaves nothing to generate.* 33 tokens"):
        model.generate(PROMPTS, max_length=33)


def test_the_context_ends_a_row(model):
    (prompt,) = make_prompts(1020)
    assert len(model.generate([prompt], max_new_tokens=50).tokens[0]) == 4
    with pytest.raises(ValueError, match=r"leaves nothing to generate.*context is 1024"):
        model.generate([prompt + [1] * 4], max_new_tokens=50)


def test_default_length_is_transformers(model, peer):
    with pytest.warns(UserWarning, match="neither max_new_tokens nor max_length"):
        output = model.generate(PROMPTS)
    assert output.tokens == [expected(peer, prompt, max_new_tokens=20) for prompt in PROMPTS]


def test_stop_strings(model, peer):
    tokens = expected(peer, PROMPTS[0], max_new_tokens=32)
    ascii_pairs = [
        model.tokenizer.decode(tokens[i : i + 2]) for i in range(8, 30) if max(tokens[i : i + 2]) < 94
    ]  # byte-level ids 0 .. 93 are the printable ASCII characters
    stop = ascii_pairs[0] if ascii_pairs else model.tokenizer.decode(tokens[9:10])
    settings = dict(max_new_tokens=32, stop_strings=[stop, "never this"])
    wanted = [expected(peer, prompt, tokenizer=model.tokenizer, **settings) for prompt in PROMPTS]
    assert len(wanted[0]) < 32
    assert model.generate(PROMPTS, **settings).tokens == wanted


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.7, top_k=0),
        dict(top_k=5),
        dict(top_k=0, top_p=0.8),
        dict(min_p=0.1, temperature=1.5),
        dict(top_k=0, typical_p=0.9),
        dict(top_k=0, epsilon_cutoff=0.01),
        dict(top_k=0, eta_cutoff=0.02),
        dict(top_p=0.9, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_sampling_is_transformers(model, peer, settings, monkeypatch):
    """The same tokens, when transformers draws from its probabilities as we do."""
    settings = dict(max_new_tokens=24, do_sample=True) | settings
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(torch, "multinomial", lambda p, num_samples, g=generator: torch.tensor([[sample(p, g)]]))
        assert model.generate([prompt], seed=seed, **settings).tokens == [expected(peer, prompt, **settings)]


def test_sample_follows_the_probabilities():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(probabilities, generator) for _ in range(20000)]), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    # five standard deviations
    torch.testing.assert_close(counts / 20000, probabilities[0], atol=5 * (0.25 / 20000) ** 0.5, rtol=0)
    with pytest.raises(ValueError, match="no token can be sampled"):
        sample(torch.full((1, 6), torch.nan), generator)


# Rows have nothing to do with each other


def test_sampling_does_not_depend_on_neighbours(model):
    settings = dict(max_new_tokens=16, do_sample=True, top_k=0)
    batch = model.generate(PROMPTS, seed=11, **settings).tokens
    assert batch == model.generate(PROMPTS, seed=11, **settings).tokens
    assert batch != model.generate(PROMPTS, seed=12, **settings).tokens
    alone = [model.generate([prompt], seed=11 + i, **settings).tokens[0] for i, prompt in enumerate(PROMPTS)]
    assert batch == alone
    assert model.generate(PROMPTS[:2], seed=11, **settings).tokens == batch[:2]
    same = model.generate([PROMPTS[0]] * 3, seed=11, **settings).tokens
    assert len({tuple(tokens) for tokens in same}) == 3


def test_without_a_seed_torch_decides(model):
    def sample():
        return model.generate(PROMPTS, max_new_tokens=16, do_sample=True).tokens

    torch.manual_seed(0)
    first, second = sample(), sample()
    torch.manual_seed(0)
    assert first == sample() and first != second


def test_finished_rows_are_not_decoded(model, peer, monkeypatch):
    eos = expected(peer, PROMPTS[1], max_new_tokens=4)[3]
    rows = []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda sequences, ids: (rows.append(len(sequences)), decode(sequences, ids))[1]
    )
    output = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=eos)
    lengths = [len(tokens) for tokens in output.tokens]
    assert lengths[1] <= 4
    assert rows == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert output.times.decode_tokens == sum(rows)
    rows.clear()
    assert [len(tokens) for tokens in model.generate(PROMPTS, max_new_tokens=1).tokens] == [1, 1, 1]
    assert rows == []


def test_own_processors_and_criteria_see_their_row(model):
    seen = []

    def only_even(ids, scores):
        seen.append(ids.tolist()[0])
        scores[:, 1::2] = -torch.inf
        return scores

    class StopAfter(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            assert scores is None
            return torch.tensor([ids[0, -1] % 32 == 0])

    output = model.generate(
        PROMPTS,
        max_new_tokens=24,
        logits_processor=transformers.LogitsProcessorList([only_even]),
        stopping_criteria=[StopAfter()],
        return_logprobs=True,
    )
    for prompt, tokens, logprobs in zip(PROMPTS, output.tokens, output.logprobs, strict=True):
        assert not any(token % 2 for token in tokens)
        assert all(token % 32 for token in tokens[:-1]) and (len(tokens) == 24 or tokens[-1] % 32 == 0)
        assert all(prompt + tokens[:i] in seen for i in range(len(tokens)))
        # processors work on a copy: the log-probabilities are the model's own
        raw = model.logits([prompt], [tokens])[0].log_softmax(-1)
        assert logprobs == pytest.approx(raw.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-4)


def test_own_length_criterion_goes_before_the_setting(model):
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(40)])
    output = model.generate(PROMPTS, stopping_criteria=criteria, max_new_tokens=3)
    assert [len(prompt) + len(tokens) for prompt, tokens in zip(PROMPTS, output.tokens, strict=True)] == [40] * 3


def test_max_time(model):
    start = time.perf_counter()
    output = model.generate(PROMPTS, max_new_tokens=900, max_time=0.05)
    assert time.perf_counter() - start < 5
    assert all(1 <= len(tokens) < 900 for tokens in output.tokens)


def test_logprobs(model):
    output = model.generate(PROMPTS, max_new_tokens=10, return_logprobs=True)
    logits = model.logits(PROMPTS, output.tokens)
    for raw, tokens, logprobs in zip(logits, output.tokens, output.logprobs, strict=True):
        wanted = raw.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


# Prompts


def test_kinds_of_prompts(model):
    ids = model.tokenizer("Hello, world").input_ids
    wanted = model.generate(ids, max_new_tokens=5).tokens
    assert len(wanted) == 1
    for prompts in ("Hello, world", ["Hello, world"], [ids], tuple(ids), [tuple(ids)]):
        assert model.generate(prompts, max_new_tokens=5).tokens == wanted
    chat = [{"role": "user", "content": "Hello"}]
    rendered = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHello<|end|>\n<|start|>assistant\n"
    wanted_chat = model.generate(rendered, max_new_tokens=5).tokens
    assert model.generate(chat, max_new_tokens=5).tokens == wanted_chat
    assert model.generate([ids, chat, "Hello, world"], max_new_tokens=5).tokens == wanted + wanted_chat + wanted


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], ValueError, "prompts is empty"),
        ([[]], ValueError, r"prompts\[0\] is empty"),
        ("", ValueError, r"prompts\[0\] is empty"),
        (None, TypeError, "prompts must be .* got NoneType"),
        (7, TypeError, "prompts must be .* got int"),
        (torch.tensor([1, 2]), TypeError, "prompts must be .* got Tensor"),
        ([1, "a"], TypeError, r"prompts\[0\]\[1\] must be a token id \(int\), got str"),
        ([1, True], TypeError, "got bool"),
        ([[1, 2.0]], TypeError, r"prompts\[0\]\[1\] must be a token id \(int\), got float"),
        ([[1], None], TypeError, r"prompts\[1\] must be .* got NoneType"),
        ([[1], [2, 293]], ValueError, r"prompts\[1\] has token id 293 at position 1, outside .* \[0, 293\)"),
        ([-1], ValueError, r"prompts\[0\] has token id -1"),
        ([2**70], ValueError, "token id"),
        ([{"role": "user"}], TypeError, r"prompts\[0\]\[0\] must be a message with 'role' and 'content'"),
        ([{"role": "user", "content": "a"}, "b"], TypeError, r"prompts\[0\]\[1\] must be a message"),
    ],
    ids=str,
)
def test_bad_prompts(model, live, prompts, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompts, max_new_tokens=2)
    assert live == []


def test_text_needs_a_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        model.generate([{"role": "user", "content": "a"}], max_new_tokens=2)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("a", max_new_tokens=2)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate([1], max_new_tokens=2, stop_strings="a")
    assert model.generate([1], max_new_tokens=2).text is None


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(num_beams=2), ValueError, "num_beams=2 is not supported"),
        (dict(num_return_sequences=2, do_sample=True), ValueError, "num_return_sequences=2 is not supported"),
        (dict(num_beam_groups=2), ValueError, "num_beam_groups"),
        (dict(guidance_scale=1.5), ValueError, "guidance_scale=1.5"),
        (dict(prompt_lookup_num_tokens=3), ValueError, "prompt_lookup_num_tokens"),
        (dict(assistant_early_exit=2), ValueError, "assistant_early_exit"),
        (dict(assistant_model=object()), ValueError, "assistant_model"),
        (dict(penalty_alpha=0.6), ValueError, "penalty_alpha"),
        (dict(dola_layers="low"), ValueError, "dola_layers"),
        (dict(force_words_ids=[[1]]), ValueError, "force_words_ids"),
        (dict(constraints=[1]), ValueError, "constraints"),
        (dict(token_healing=True), ValueError, "token_healing"),
        (dict(use_mtp=True), ValueError, "use_mtp"),
        (dict(cache_implementation="static"), ValueError, "cache_implementation='static'"),
        (dict(use_cache=False), ValueError, "use_cache=False"),
        (dict(prefill_chunk_size=8), ValueError, "prefill_chunk_size"),
        (dict(output_scores=True), ValueError, "output_scores"),
        (dict(return_dict_in_generate=True), ValueError, "return_dict_in_generate"),
        (dict(custom_generate="somebody/something"), ValueError, "custom_generate"),
        (dict(attention_mask=torch.ones(1, 1)), ValueError, "attention_mask"),
        (dict(max_new_token=3), ValueError, "does not know or support max_new_token$"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens="3"), TypeError, "max_new_tokens must be an int, got str"),
        (dict(min_new_tokens=1.0), TypeError, "min_new_tokens must be an int, got float"),
        (dict(seed="x"), TypeError, "seed must be an int, got str"),
        (dict(do_sample=True, temperature=0.0), ValueError, "temperature"),
        (
            dict(generation_config={"max_length": 3}),
            TypeError,
            "generation_config must be a GenerationConfig, got dict",
        ),
        (dict(logits_processor=lambda ids, scores: scores), TypeError, "logits_processor must be a list of callables"),
        (dict(stopping_criteria=[3]), TypeError, "stopping_criteria must be a list of callables"),
        (dict(sequences=3), TypeError, "sequences must be a list of conversations"),
        (dict(sequences=[]), ValueError, "sequences has 0 conversations for 1 prompts"),
    ],
    ids=str,
)
def test_unsupported_settings(model, live, settings, error, message):
    with pytest.raises(error, match=message):
        model.generate([1, 2, 3], **(dict(max_new_tokens=2) | settings))
    assert live == []


def test_unsupported_setting_of_the_checkpoint(model):
    model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams=4 is not supported"):
        model.generate([1, 2, 3], max_new_tokens=2)
    assert model.generate([1, 2, 3], max_new_tokens=2, num_beams=1).tokens


# Streams


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
    with pytest.raises(ValueError, match="streamer takes a single prompt, got 3 prompts"):
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


# Depth and times


@pytest.mark.parametrize("prefill_depth", [None, 3, 0.5, 1.0])
def test_prefill_depth_is_passed_on(model, prefill_depth):
    output = model.generate(PROMPTS, max_new_tokens=12, prefill_depth=prefill_depth)
    logits = model.logits(PROMPTS, output.tokens, prefill_depth=prefill_depth)
    assert output.tokens == [row.argmax(-1).tolist() for row in logits]


def test_times(model):
    start = time.perf_counter()
    times = model.generate(PROMPTS, max_new_tokens=20, prefill_depth=3).times
    elapsed = time.perf_counter() - start
    stages = (times.truncated_prefill, times.projection, times.boundary)
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) <= times.time_to_first_token
    assert times.time_to_first_token + times.decode <= elapsed
    assert times.decode_tokens == 3 * 19
    assert times.decode_tokens_per_second == pytest.approx(3 * 19 / times.decode)
    assert model.generate(PROMPTS, max_new_tokens=1).times.decode_tokens_per_second is None
