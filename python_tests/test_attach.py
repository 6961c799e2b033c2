"""POP inside transformers' generate, against the runner: every family, cache, way of padding and of cutting prompts."""

from __future__ import annotations

import copy

import pytest
import torch
from attach_cases import NEW, TOLERANCE, answer, check, generate, left_padded, load_peer, load_runner, make_prompts
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

import pop_ext
from pop_ext.analysis.calibration import calibrate

PROMPTS = make_prompts(37, 1, 2, 21)  # longer than every window, and shorter than boundary and anchors together
SETTINGS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 7},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 12},
}


# Against the runner


@pytest.mark.filterwarnings("ignore:prefill_depth=1 is one layer")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_is_the_runner(tiny, attention):
    peer, inputs = load_peer(tiny, attention), left_padded(PROMPTS)
    layers = peer.config.num_hidden_layers
    for depth in (1, layers // 2, layers - 1, layers) if attention == "sdpa" else (3,):
        expected = answer(load_runner(tiny, depth), PROMPTS)
        pop_ext.attach(peer, prefill_depth=depth)
        for name, settings in SETTINGS.items() if depth == layers // 2 else [("dynamic", {})]:
            check(peer, inputs, expected, f"{name}, {depth} layers", **settings)


@pytest.mark.parametrize("boundary, anchors", [(1, 0), (3, 2), (9, 1), (2, 30)])
def test_boundary_and_anchors(tiny, boundary, anchors):
    peer, settings = load_peer(tiny), {"boundary_tokens": boundary, "anchor_tokens": anchors}
    expected = answer(load_runner(tiny, 2, **settings), PROMPTS)
    pop_ext.attach(peer, prefill_depth=2, **settings)
    for name in ("dynamic", "static, chunks"):
        check(peer, left_padded(PROMPTS), expected, name, **SETTINGS[name])


def test_without_padding(tiny):
    """generate then hands on no mask, and sdpa gets none: one prompt, and several of a length."""
    peer, runner = load_peer(tiny), load_runner(tiny, 2)
    pop_ext.attach(peer, prefill_depth=2)
    for prompts, names in ((PROMPTS[:1], SETTINGS), (make_prompts(19, 19, 19), ["dynamic"])):
        expected = answer(runner, prompts)
        for name in names:
            check(peer, left_padded(prompts), expected, name, **SETTINGS[name])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_further_turns(tiny, cache):
    """The cache of one generate given to the next, with all tokens so far; the last one sampled is not in it yet."""
    peer, runner = load_peer(tiny), load_runner(tiny, 2)
    pop_ext.attach(peer, prefill_depth=2)
    config = peer.config
    kept = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=128)
    ids, sequences = torch.empty(2, 0, dtype=torch.int64), None
    for turn, length in enumerate((23, 1, 14)):
        prompts = make_prompts(length, length, seed=turn)
        expected = answer(runner, prompts, sequences, keep=True)
        ids = torch.cat([ids, torch.tensor(prompts)], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = check(peer, inputs, expected, f"turn {turn}", past_key_values=kept)
        ids, sequences = output.sequences, expected.sequences


def test_further_turns_of_unequal_length(tiny_llama, peer):
    """Padding in the middle: between the first turn's answer and the second prompt."""
    settings = {"boundary_tokens": 2, "anchor_tokens": 2}
    runner = load_runner(tiny_llama, 2, **settings)
    pop_ext.attach(peer, prefill_depth=2, **settings)
    first, second = make_prompts(9, 17), make_prompts(12, 5, seed=3)
    inputs, more = left_padded(first), left_padded(second)
    expected = answer(runner, first, keep=True)
    output = check(peer, inputs, expected)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.int64), more["attention_mask"]], 1)
    ids = torch.cat([output.sequences, more["input_ids"]], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": output.past_key_values}
    check(peer, inputs, answer(runner, second, expected.sequences))


@pytest.mark.parametrize("rank", [0, 8])
def test_calibrated(tiny, rank, tmp_path):
    """Projections of a calibration, and their features of the token before, over padding, chunks and turns."""
    runner, path = load_runner(tiny, 1.0), tmp_path / "calibration.safetensors"
    calibrate(runner, make_prompts(*[40] * 8, seed=5), [2], rank=rank).save(path)
    peer, inputs = load_peer(tiny), left_padded(PROMPTS)
    own = generate(pop_ext.attach(peer, prefill_depth=2), inputs).logits[1]
    for anchors in (0, 1):
        runner = load_runner(tiny, 2, calibration=path, anchor_tokens=anchors)
        pop_ext.attach(peer, calibration=path, anchor_tokens=anchors)  # its only depth
        expected = answer(runner, PROMPTS)
        for name in ("dynamic", "chunks"):
            output = check(peer, inputs, expected, name, **SETTINGS[name])
    assert not torch.allclose(own, output.logits[1], atol=1e-2)  # the calibration was used
    prompts = make_prompts(20, 20)
    expected = answer(runner, prompts, keep=True)
    output = check(peer, left_padded(prompts), expected)
    ids = torch.cat([output.sequences, torch.tensor(prompts)], 1)
    expected = answer(runner, prompts, expected.sequences)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check(peer, inputs, expected, "second turn", past_key_values=output.past_key_values)


def test_calibration_is_not_for_an_exact_input(tiny_llama, peer, tmp_path):
    """Layer L - 1's input is exact at P = L - 1: its own weights serve, whatever the calibration has."""
    path = tmp_path / "calibration.safetensors"
    calibrate(load_runner(tiny_llama, 1.0), make_prompts(*[40] * 8, seed=5), [2]).save(path)
    pop_ext.attach(peer, prefill_depth=5, calibration=path)
    check(peer, left_padded(PROMPTS), answer(load_runner(tiny_llama, 1.0), PROMPTS))


def test_inputs_embeds(tiny_llama, peer):
    pop_ext.attach(peer, prefill_depth=2)
    (prompt,) = make_prompts(30)
    embeds = peer.get_input_embeddings()(torch.tensor([prompt]))
    output = peer.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert output.tolist() == answer(load_runner(tiny_llama, 2), [prompt]).tokens


# The ways of generate


def test_beams_have_the_runners_scores(tiny_llama, peer):
    runner = load_runner(tiny_llama, 2)
    pop_ext.attach(peer, prefill_depth=2)
    prompts = make_prompts(25, 11)
    inputs = left_padded(prompts)
    greedy = generate(peer, inputs, num_beams=1)
    settings = dict(num_beams=4, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    output = generate(peer, inputs, **settings)
    for row, score in enumerate(output.sequences_scores.tolist()):
        prompt, tokens = prompts[row // 2], output.sequences[row, 25:].tolist()
        (logits,) = runner.logits([prompt], [tokens])
        assert logits.log_softmax(-1)[range(NEW), tokens].sum().item() == pytest.approx(score, abs=NEW * TOLERANCE)
    logprobs = torch.stack(greedy.logits, 1).log_softmax(-1).max(-1).values.sum(1)
    assert (output.sequences_scores[::2] >= logprobs - NEW * TOLERANCE).all()


def test_sampling_and_streamers(tiny_llama, peer):
    from transformers import TextStreamer

    class Collected(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    pop_ext.attach(peer, prefill_depth=2)
    (prompt,), streamer = make_prompts(25), Collected()
    torch.manual_seed(0)
    output = generate(peer, left_padded([prompt]), do_sample=True, streamer=streamer)
    assert streamer.tokens == [*output.sequences[0].tolist(), "end"]
    (logits,) = load_runner(tiny_llama, 2).logits([prompt], [output.sequences[0, 25:].tolist()])
    assert (torch.cat(output.logits) - logits).abs().max() <= TOLERANCE * 10  # of tens, where log p is of some


def test_compiled_decode(tiny_llama, peer, tmp_path):
    """Decoding runs compiled, prefill eagerly and truncated, whether generate compiles or the model's forward is."""
    peer.model.layers, peer.config.num_hidden_layers = peer.model.layers[:3], 3  # compiling takes its time
    peer.save_pretrained(tmp_path)
    prompts, compiled = make_prompts(30, 12), []
    expected = answer(load_runner(tmp_path, 0.4), prompts)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=False)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config, "prefill_chunk_size": 7}
    pop_ext.attach(peer, prefill_depth=0.4)
    check(peer, left_padded(prompts), expected, **settings)
    assert compiled
    torch._dynamo.reset()
    compiled.clear()
    pop_ext.detach(peer)
    peer.forward = torch.compile(peer.forward, backend=backend)
    generate(peer, left_padded(prompts), max_new_tokens=2)  # so that there is compiled code of a whole prefill
    assert compiled
    pop_ext.attach(peer, prefill_depth=0.4)
    check(peer, left_padded(prompts), expected)
    torch._dynamo.reset()


def test_assisted_generation(tiny_llama, peer):
    """A model with POP may assist, and cannot be assisted."""
    helper = pop_ext.attach(load_peer(tiny_llama), prefill_depth=2)
    inputs = left_padded(make_prompts(25))
    expected = peer.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert peer.generate(**inputs, max_new_tokens=NEW, do_sample=False, assistant_model=helper).equal(expected)
    for settings in ({"assistant_model": peer}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation does not prefill by POP: call"):
            helper.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
    with pytest.raises(ValueError, match="continuous batching does not prefill by POP"):
        helper.generate_batch([[1, 2, 3]])


# What runs, and what stays as it was


def test_deep_layers_see_deep_tokens_only(peer):
    """By the model's own hooks: the layers below 2 run every token, those above boundary and anchor."""
    seen = [[] for _ in peer.model.layers]
    for layer, found in zip(peer.model.layers, seen, strict=True):
        layer.mlp.register_forward_hook(lambda module, args, output, found=found: found.append(output.shape[1]))
    pop_ext.attach(peer, prefill_depth=2)
    generate(peer, left_padded(make_prompts(30, 4)), max_new_tokens=2)
    assert seen == [[30, 1]] * 2 + [[2, 1]] * 4
    for found in seen:
        found.clear()
    generate(peer, left_padded(make_prompts(30)), max_new_tokens=1, prefill_chunk_size=10)
    assert seen == [[10, 10, 10]] * 2 + [[1, 1]] * 4  # the middle chunk has no deep token


def test_full_depth_and_detach_are_the_untouched_model(tiny_llama, peer):
    inputs, untouched = left_padded(PROMPTS), load_peer(tiny_llama)
    names = set(vars(peer))
    expected = generate(untouched, inputs)
    pop_ext.attach(peer, prefill_depth=1.0)
    for attached in (True, False):
        output = generate(peer, inputs)
        assert output.sequences.equal(expected.sequences)
        assert torch.stack(output.logits).equal(torch.stack(expected.logits))
        if attached:
            pop_ext.attach(peer, prefill_depth=2)
            assert not generate(peer, inputs).logits[1].equal(expected.logits[1])
            assert peer(**inputs).logits.equal(untouched(**inputs).logits)  # a forward is not a prefill
            pop_ext.detach(peer)
    assert set(vars(peer)) == names and not any("forward" in vars(layer) for layer in peer.model.layers)


def test_other_calls_during_a_prefill_are_plain(tiny_llama, peer):
    """Another thread may run the model meanwhile: its cache tells it apart. A failing prefill leaves nothing behind."""
    prompt, other = make_prompts(25, 18)
    answered = answer(load_runner(tiny_llama, 2), [prompt])
    expected = peer(torch.tensor([other])).logits
    pop_ext.attach(peer, prefill_depth=2)
    found = []

    def interrupt(module, args):
        if not found:
            found.append(None)
            found[0] = peer(torch.tensor([other]), past_key_values=DynamicCache(config=peer.config)).logits

    hook = peer.model.layers[1].register_forward_pre_hook(interrupt)
    check(peer, left_padded([prompt]), answered)
    assert found[0].equal(expected)
    hook.remove()

    def fail(module, args):
        raise RuntimeError("broken")

    hook = peer.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        generate(peer, left_padded([prompt]))
    hook.remove()
    assert not any("forward" in vars(layer) for layer in peer.model.layers)
    check(peer, left_padded([prompt]), answered)


def test_copies_and_conversions_keep_it(tiny_llama, peer):
    prompts = make_prompts(25, 18)
    twin = copy.deepcopy(pop_ext.attach(peer, prefill_depth=2))
    pop_ext.detach(peer)
    check(twin, left_padded(prompts), answer(load_runner(tiny_llama, 2), prompts))
    expected = generate(twin, left_padded(prompts))
    output = generate(twin.double(), left_padded(prompts))
    assert output.past_key_values.layers[5].keys.dtype == torch.float64
    torch.testing.assert_close(output.logits[1], expected.logits[1], atol=TOLERANCE * 10, rtol=0)


def test_bfloat16(tiny):
    """Truncation adds nothing to what bfloat16 costs: log-probabilities lie no farther from float32's than at full
    depth (a factor of 1.5 for chance).
    """
    prompts = make_prompts(30, 30, 30, 30)
    errors = {}
    for depth in (2, 1.0):
        exact, rounded = (
            pop_ext.attach(load_peer(tiny).to(dtype), prefill_depth=depth) for dtype in (torch.float32, torch.bfloat16)
        )
        tokens = generate(exact, left_padded(prompts)).sequences
        logprobs = [
            torch.stack(generate(model, {"input_ids": tokens[:, :30]}, max_new_tokens=1).logits).log_softmax(-1)
            for model in (exact, rounded)
        ]
        errors[depth] = (logprobs[0] - logprobs[1]).square().mean().sqrt().item()
    assert errors[2] <= 1.5 * errors[1.0], errors
