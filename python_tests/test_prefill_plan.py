"""`prefill_plan`: truncated tokens that run through some attentions and MLPs only; on tiny models of every family, in
float32, against `reference_pop` and against closed gates.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY, make_chat_folder, normwise, pop, tiny_folder
from pairs import CONTINUATIONS, PROMPTS, Conversation, assert_logits, batched_logits, load, tokens
from reference_pop import ReferencePOP
from vision_models import TINY_VISION
from windows import random_windows

import pop_ext
from pop_ext.analysis import calibration, importance
from pop_ext.checkpoints.prefill_plan import BRANCHES, PrefillPlan
from pop_ext.integrations.vllm.settings import Settings

SOME = (0, 1, 5, 8)  # of PROMPTS
PART_PROMPTS, PART_CONTINUATIONS = ([lists[i] for i in SOME] for lists in (PROMPTS, CONTINUATIONS))


def plans(layers: int) -> list[PrefillPlan]:
    """Deep attentions without their MLPs, the other way round, holes, only one kind, all but one, without layer 0."""
    low, every = (True,) * 2 + (False,) * (layers - 2), (True,) * layers
    return [
        PrefillPlan((*every[:-1], False), low),
        PrefillPlan(low, every),
        PrefillPlan(tuple(i % 2 == 0 for i in range(layers)), tuple(i % 3 == 1 for i in range(layers))),
        PrefillPlan((False,) * layers, low),
        PrefillPlan.suffix(layers, layers).switched(1, "attention", False),
        PrefillPlan.suffix(3, layers).switched(0, "attention", False).switched(0, "mlp", False),
    ]


def reference(pair, plan: PrefillPlan, boundary: int = 1, anchors: int = 1) -> ReferencePOP:
    runs = list(zip(plan.attention, plan.mlp, strict=True))
    return ReferencePOP(pair.peer, plan.depth, boundary, anchors, plan=runs)


def reference_logits(pair, plan, boundary=1, anchors=1, prompts=PART_PROMPTS, continuations=PART_CONTINUATIONS):
    pairs = zip(prompts, continuations, strict=True)
    return [reference(pair, plan, boundary, anchors).logits(*both) for both in pairs]


def test_a_suffix_is_a_depth_to_the_bit(pair):
    model, arguments = pair.model, (PART_PROMPTS, PART_CONTINUATIONS)
    for depth in (1, 2, pair.layers - 1, pair.layers):
        model.prefill_plan = None
        expected = model.logits(*arguments, prefill_depth=depth) + batched_logits(model, *arguments, depth)
        model.prefill_plan = PrefillPlan.suffix(depth, pair.layers)
        found = model.logits(*arguments) + batched_logits(model, *arguments, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), depth


@pytest.mark.parametrize("boundary, anchors", [(1, 1), (4, 0), (2, 3)])
def test_plans_are_the_reference(pair, boundary, anchors):
    pair.model.boundary_tokens, pair.model.anchor_tokens = boundary, anchors
    for plan in plans(pair.layers)[boundary % 2 :: 2]:
        pair.model.prefill_plan = plan
        expected = reference_logits(pair, plan, boundary, anchors)
        assert_logits(pair.model.logits(PART_PROMPTS, PART_CONTINUATIONS), expected)
        assert_logits(batched_logits(pair.model, PART_PROMPTS, PART_CONTINUATIONS, None), expected)


@pytest.mark.parametrize("name", TINY)
def test_plans_are_closed_prefill_gates(name, tmp_path_factory):
    """Of transformers' model, in one pass over prompt and continuation."""
    folder = tiny_folder(name, tmp_path_factory)
    model, peer = load(folder, boundary_tokens=2), importance.load_transformers(folder)
    gates, (window,) = importance.Gates(peer, branches=True), random_windows(1, 44, seed=5)
    acts = importance.stage_masks(44, 30, 2, 1)
    full = model.logits([window[:30]], [window[30:]], prefill_depth=1.0)[0]
    for plan in plans(model.spec.num_layers):
        values = torch.ones(gates.shape(1))
        for index, branch in enumerate(BRANCHES):
            values[0, :, 0, index] = torch.tensor(getattr(plan, branch)).float()
        with torch.no_grad(), gates(values, acts):
            expected = peer(input_ids=torch.tensor([window])).logits[0, 29:-1]
        model.prefill_plan = plan
        found = model.logits([window[:30]], [window[30:]])[0]
        assert normwise(found, expected) < 1e-5 and normwise(found, full) > 1e-3, plan


def test_chunks_do_not_matter(pair):
    """Down to one token a pass; edges before, in and after boundary and anchors."""
    model, prompts, continuations = pair.model, [tokens(40, 5), tokens(9, 6)], [tokens(3, 7), tokens(2, 8)]
    model.boundary_tokens, model.anchor_tokens = 3, 2
    for plan in plans(pair.layers)[:3]:
        model.prefill_plan = plan
        expected = reference_logits(pair, plan, 3, 2, prompts, continuations)
        for chunk in (1, 2, 7, 38, 46):
            model.chunk_tokens = chunk
            assert_logits(batched_logits(model, prompts, continuations, None), expected)


def test_turns(pair):
    """With tokens that were sampled and not run, and prompts that are shorter than the boundary."""
    plan = plans(pair.layers)[0]
    pair.model.chunk_tokens, pair.model.prefill_plan = 17, plan
    talk = Conversation(pair, 2, None, boundary=2)
    talk.references = [reference(pair, plan, 2) for _ in range(2)]
    talk.prompt([tokens(20, 1), tokens(2, 2)])
    talk.decode([tokens(2, 10), tokens(2, 11)])
    talk.leave_pending(tokens(2, 20))
    talk.prompt([tokens(4, 4), tokens(70, 5)])
    talk.decode([tokens(2, 30)])
    talk.end()


def test_a_depth_takes_the_plans_place(llama):
    model, arguments = llama.model, (PART_PROMPTS, PART_CONTINUATIONS)
    plan = plans(6)[0]
    expected = {depth: model.logits(*arguments, prefill_depth=depth) for depth in (2, plan.depth, 1.0)}
    model.prefill_plan = plan
    planned = torch.cat(model.logits(*arguments))
    for depth, logits in expected.items():
        assert torch.equal(torch.cat(model.logits(*arguments, prefill_depth=depth)), torch.cat(logits))
        assert normwise(planned, torch.cat(logits)) > 1e-3
    tokens = [model.generate(PROMPTS[:1], max_new_tokens=12, prefill_depth=d).tokens for d in (plan.depth, None, 1.0)]
    assert tokens[1] != tokens[0] and "prefill depth 5 of 6 layers, by a plan" in repr(model)


def test_prefixes_are_shared_by_one_plan_only(tiny_llama):
    plain, shared = load(tiny_llama), load(tiny_llama, prefix_cache=True)
    first, second, prompt = *plans(6)[:2], tokens(150)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_logprobs": True}
    for plan, reused in ((first, 0), (first, 128), (second, 0), (None, 0), (second, 128)):
        plain.prefill_plan = shared.prefill_plan = plan
        expected, found = (model.generate([prompt], **settings) for model in (plain, shared))
        assert found.reused_tokens == [reused] and found.tokens == expected.tokens
        assert normwise(torch.tensor(found.logprobs), torch.tensor(expected.logprobs)) < 1e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_calibrations(tiny_llama, tmp_path, rank):
    """A suffix is a depth, to the bit; chunks do not matter; projections that are the layers' own change nothing."""
    model, path = load(tiny_llama), tmp_path / "c.safetensors"
    found = calibration.calibrate(model, random_windows(8, 60), [3], rank=rank)
    found.save(path)
    plan = PrefillPlan.suffix(3, 6).switched(1, "attention", False).switched(2, "mlp", False)
    calibrated = load(tiny_llama, calibration=path, prefill_depth=3)
    arguments = PART_PROMPTS, PART_CONTINUATIONS
    expected = calibrated.logits(*arguments)
    calibrated.prefill_plan = PrefillPlan.suffix(3, 6)
    assert torch.equal(torch.cat(calibrated.logits(*arguments)), torch.cat(expected))
    calibrated.prefill_plan = model.prefill_plan = plan
    whole, own = calibrated.logits(*arguments), model.logits(*arguments)
    for chunk in (5, 40):
        calibrated.chunk_tokens = chunk
        assert_logits(batched_logits(calibrated, *arguments, None), whole)
    assert normwise(torch.cat(whole), torch.cat(own)) > 1e-3
    if rank == 0:
        calibrated.calibration.projections[3] = model.weights.projections_from(3)
        assert_logits(calibrated.logits(*arguments), own)
    calibrated.prefill_plan = plan.switched(3, "mlp", True)
    with pytest.raises(pop_ext.CalibrationError, match="prefill_depth is 4 layers, but the calibration was made for 3"):
        calibrated.logits(*arguments)


# Files


def saved(folder, path, plan: PrefillPlan, **changes) -> None:
    """A plan file for a checkpoint, with other values."""
    PrefillPlan(plan.attention, plan.mlp, load(folder).fingerprint(), {"by": "a test"}).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files(tiny_llama, llama, tmp_path):
    plan, path = plans(6)[0], tmp_path / "plan.json"
    saved(tiny_llama, path, plan)
    model = load(tiny_llama, prefill_plan=path)
    assert model.prefill_plan.found_with == {"by": "a test"}
    assert (model.prefill_plan.attention, model.prefill_plan.mlp) == (plan.attention, plan.mlp)
    assert model.resolve_prefill_depth() == plan.depth == 5 and model.resolve_prefill_depth(2) == 2
    llama.model.prefill_plan = plan
    expected = llama.model.logits(PART_PROMPTS, PART_CONTINUATIONS)
    assert torch.equal(torch.cat(model.logits(PART_PROMPTS, PART_CONTINUATIONS)), torch.cat(expected))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert str(plan) == "attention of layers 0-4; MLPs of layers 0-1"
    assert str(plans(6)[2]) == "attention of layers 0, 2, 4; MLPs of layers 1, 4"


LAYERS = [{"attention": True, "mlp": False}] * 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "pop-calibration-2"}, r"its format is 'pop-calibration-2', expected 'pop-prefill-plan-1'"),
        ({"layers": LAYERS[:5]}, r"it has 5 layers, expected 6, as many as the model"),
        ({"layers": {}}, r"expected a string as fingerprint, a list as layers"),
        ({"fingerprint": None}, r"expected a string as fingerprint"),
        ({"fingerprint": "another"}, r"prefill_plan was found for another model: its fingerprint differs"),
        ({"depth": 3}, r"it has 'depth', expected fingerprint, format, found_with, layers only"),
        ({"layers": [*LAYERS[:5], {"attention": True}]}, r"layers\[5\] has no mlp"),
        (
            {"layers": [*LAYERS[:5], {"attention": 1, "mlp": True}]},
            r"layers\[5\].attention is 1, expected true or false",
        ),
        (
            {"layers": [*LAYERS[:5], {**LAYERS[0], "norm": True}]},
            r"layers\[5\] has 'norm', expected attention, mlp only",
        ),
        ({"layers": [*LAYERS[:5], True]}, r"layers\[5\] is True, expected a table of attention and mlp"),
        ({"layers": [{"attention": False, "mlp": False}] * 6}, r"runs no branch of any layer, expected at least one"),
    ],
)
def test_refused_files(tiny_llama, tmp_path, changes, message):
    saved(tiny_llama, tmp_path / "plan.json", plans(6)[0], **changes)
    with pytest.raises(ValueError, match=message) as error:
        pop_ext.load(tiny_llama, prefill_plan=tmp_path / "plan.json")
    assert str(error.value).startswith("prefill_plan")


def test_what_is_no_plan_file(tiny_llama, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prefill_plan is .*none: no such file, expected one of `pop plan`"):
        pop_ext.load(tiny_llama, prefill_plan=tmp_path / "none")
    for text in ("", "[1]", "{", '{"layers": []}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"prefill_plan is .*plan\.json: "):
            pop_ext.load(tiny_llama, prefill_plan=tmp_path / "plan.json")


def test_what_a_plan_does_not_go_with(tiny_llama, tmp_path, llama):
    path, plan = tmp_path / "plan.json", plans(6)[0]
    saved(tiny_llama, path, plan)
    with pytest.raises(ValueError, match=r"prefill_plan and prefill_depth \(3\) are given, expected one of them"):
        load(tiny_llama, prefill_plan=path, prefill_depth=3)
    with pytest.raises(ValueError, match=r"deep_tokens is 0\.1, expected 0 with a prefill_plan that runs parts"):
        load(tiny_llama, prefill_plan=path, deep_tokens=0.1)
    for wrong, error in ((PrefillPlan.suffix(3, 5), ValueError), ("plan.json", TypeError)):
        llama.model.prefill_plan = wrong
        with pytest.raises(error, match="prefill_plan"):
            llama.model.logits([tokens(9)], [tokens(2)])
    with pytest.raises(ValueError, match="expected as many of both"):
        PrefillPlan((True,), (True, False))
    with pytest.raises(TypeError, match="prefill_plan"):
        pop_ext.attach(llama.peer, prefill_plan=path)
    with pytest.raises(ValueError, match="pop has 'prefill_plan', expected of prefill_depth"):
        Settings.read({"pop": {"prefill_depth": 3, "prefill_plan": str(path)}})


@pytest.mark.parametrize("name", TINY_VISION)
def test_not_for_images(name, tmp_path):
    folder = TINY_VISION[name].make(tmp_path / "model", seed=1)
    model = load(folder)
    layers = model.spec.num_layers
    PrefillPlan.suffix(layers, layers, model.fingerprint()).switched(0, "mlp", False).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"prefill_plan runs parts of layers, which a vision-language model .* text"):
        load(folder, prefill_plan=tmp_path / "plan.json")
    PrefillPlan.suffix(2, layers, model.fingerprint()).save(tmp_path / "plan.json")  # is a prefill depth
    found = load(folder, prefill_plan=tmp_path / "plan.json").logits([[5, 6, 7] * 9], [[8, 9]])
    assert torch.equal(found[0], model.logits([[5, 6, 7] * 9], [[8, 9]], prefill_depth=2)[0])


# The commands


@pytest.fixture(scope="module")
def chat_folder(tiny_llama, tmp_path_factory):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    saved(folder, folder.parent / "plan.json", plans(6)[0])
    return folder


def test_generate(chat_folder):
    plan = chat_folder.parent / "plan.json"
    options = ("generate", chat_folder, "--prompt", "Hello, who are you?", "--dtype", "float32", "--max-new-tokens", 4)
    shown = pop(*options, "--prefill-plan", plan)
    by = "prefill depth 5 of 6 by a plan (attention of layers 0-4; MLPs of layers 0-1), own projections; "
    assert shown.exit_code == 0 and by in shown.stderr
    found = json.loads(pop(*options, "--prefill-plan", plan, "--json").stdout)
    expected = load(chat_folder, prefill_plan=plan).generate(
        [{"role": "user", "content": "Hello, who are you?"}], max_new_tokens=4
    )
    assert found["tokens"] == expected.tokens[0] and found["prefill_depth"] == 5
    assert found["prefill_plan"] == "attention of layers 0-4; MLPs of layers 0-1"
    failed = pop(*options, "--prefill-plan", plan, "--prefill-depth", 3)
    assert failed.exit_code == 1
    assert "--prefill-plan and --prefill-depth (3) are given, expected one of them" in failed.stderr


def test_evaluate(chat_folder, tmp_path):
    """A row for the plan after those of depths; KL and the rest are of the plan's logits."""
    (tmp_path / "text").write_text("Some text, and some more of it. " * 40)
    plan = chat_folder.parent / "plan.json"
    options = ("evaluate", chat_folder, "--text", tmp_path / "text", "--prompts", 2, "--prompt-tokens", 64,
               "--continuation-tokens", 4, "--dtype", "float32", "--prefill-plan", plan)  # fmt: skip
    rows = json.loads(pop(*options, "--prefill-depth", 2, "--json").stdout)
    expected = [("full", 6, False), ("pop_uncalibrated", 2, False), ("pop_uncalibrated", 5, True)]
    assert [(row["method"], row["prefill_depth"], row["prefill_plan"]) for row in rows] == expected
    model = load(chat_folder)
    ids = model.tokenizer((tmp_path / "text").read_text()).input_ids
    step, kl = len(ids) // 2, []
    for start in (0, step):
        pair = [ids[start : start + 64]], [ids[start + 64 : start + 68]]
        model.prefill_plan = plans(6)[0]
        full, cut = (model.logits(*pair, prefill_depth=depth)[0].log_softmax(-1) for depth in (1.0, None))
        kl.append(float((full.exp() * (full - cut)).sum(-1).mean()))
    assert rows[2]["kl"] == pytest.approx(sum(kl) / 2, rel=1e-3) and rows[2]["kl"] > 1e-3
    assert rows[1]["kl"] != rows[2]["kl"]
    shown = pop(*options)
    assert shown.exit_code == 0 and "5 by the plan, own weights" in " ".join(shown.stdout.split())


def test_verify(tmp_path_factory, tiny_llama, chat_folder):
    plan = chat_folder.parent / "plan.json"
    options = ("--prompts", 8, "--prompt-tokens", 224, "--dtype", "float32", "--json")
    done = pop("verify", chat_folder, "--prefill-plan", plan, *options)
    found = json.loads(done.stdout)
    assert done.exit_code == 2 and found["prefill_plan"] and found["prefill_depth"] == 5
    deep = json.loads(pop("verify", chat_folder, "--prefill-depth", 5, *options).stdout)
    assert not deep["prefill_plan"] and deep["verdict"] == "safe"
