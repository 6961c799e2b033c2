"""The commands with images: generate, and importance, calibrate and evaluate on image-text samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import pop
from vision_models import picture
from vision_pairs import SIZES, frames_of

from pop_ext.analysis.importance import truncation_kl
from pop_ext.analysis.refinement import refine
from pop_ext.analysis.samples import load_samples
from pop_ext.vision.encoder import transformers_inputs


def test_command(pair, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, SIZES, strict=False):
        picture(*size).save(path)
    options = ("--image", paths[0], "--image", paths[1], "--prompt", "the", "--max-new-tokens", 5, "--dtype", "float32")
    result = pop("generate", pair.folder, *options, "--json", "--prefill-depth", 3)
    assert result.exit_code == 0, result.stderr
    chat = [{"role": "user", "content": "the"}]
    wanted = pair.model.generate(chat, images=paths, max_new_tokens=5, prefill_depth=3)
    output = json.loads(result.stdout)
    assert (output["tokens"], output["prompt_tokens"]) == (wanted.tokens[0], wanted.prompt_tokens[0])
    assert output["times"]["vision"] > 0
    result = pop("generate", pair.folder, *options, "--no-chat")
    assert result.stdout.rstrip("\n") == pair.model.generate("the", images=paths, max_new_tokens=5).text[0].rstrip("\n")
    assert "vision tower" in result.stderr
    result = pop("generate", pair.folder, "--prompt", "the", "--image", tmp_path / "none.png")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "none.png: no such file" in result.stderr


def test_command_with_a_video(qwen, gemma, tmp_path):
    frames = [frame.quantize(64).convert("RGB") for frame in frames_of(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    options = ("--prompt", "the", "--max-new-tokens", 5, "--dtype", "float32", "--video", tmp_path / "clip.gif")
    chat = [{"role": "user", "content": "the"}]
    for extra, fps in ((), 2), (("--fps", 8), 8):
        result = pop("generate", qwen.folder, *options, "--json", *extra)
        assert result.exit_code == 0, result.stderr
        wanted = qwen.model.generate(chat, videos=[(frames, fps)], max_new_tokens=5)
        output = json.loads(result.stdout)
        assert (output["tokens"], output["prompt_tokens"]) == (wanted.tokens[0], wanted.prompt_tokens[0])
    for arguments, message in [
        ((gemma.folder, *options), "gemma3 takes images only"),
        ((qwen.folder, "--prompt", "the", "--fps", 2), "expected it with --video"),
        ((qwen.folder, *options, "--fps", -1), "frames per second is -1.0, expected a positive number"),
    ]:
        result = pop("generate", *arguments)
        assert result.exit_code == 1 and message in result.stderr


# Image-text samples


@pytest.fixture
def samples(pair, tmp_path) -> Path:
    lines = []
    for i in range(12):
        picture(40, 30, i).save(tmp_path / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "prompt": f"the {pair.mark} and {'an' * i}", "continuation": "then the"})
    lines[1] |= {"images": [], "prompt": "the and an"}
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "samples.jsonl"


def test_gates_are_the_runner(pair, samples):
    """Closing all prefill gates from P up in transformers' model is POP with own weights, on images too."""
    loaded = load_samples(samples, pair.model)
    prompts, continuations, media, windows = loaded.prompts, loaded.continuations, loaded.media, loaded.windows
    inputs = [transformers_inputs(pair.peer.config, *both) for both in zip(windows, media, strict=True)]
    loaded.encode_images(pair.model)
    visuals = loaded.visuals
    depth = max(pair.deepstack, 2)
    kl = truncation_kl(pair.peer, windows, [len(prompt) for prompt in prompts], depth, images=inputs)
    full, cut = (
        [rows.log_softmax(-1) for rows in pair.model.logits(prompts, continuations, visuals=visuals, prefill_depth=d)]
        for d in (pair.layers, depth)
    )
    ours = sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(full, cut, strict=True)) / len(full)
    assert abs(ours / kl - 1) < 1e-3 and kl > 0.01


def test_sample_commands(pair, samples, tmp_path):
    """importance, calibrate and evaluate, one after the other."""
    result = pop("importance", pair.folder, "--samples", samples, "--draws", 1, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["prompts"] == 12 and len(summary["importance"]) == 2 * pair.layers
    assert all(row["importance"] > 0 for row in summary["importance"] if row["layer"] < pair.layers - 1)
    depth, output = max(pair.deepstack, 2), tmp_path / "calibration.safetensors"
    options = ("--samples", samples, "--prefill-depth", depth, "--dtype", "float32", "--json")
    result = pop("calibrate", pair.folder, *options, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"] == ["samples.jsonl"]
    names = ("pop_uncalibrated", "pop_calibrated", "speed", "shortgpt")
    methods = [option for name in names for option in ("--method", name)]
    result = pop("evaluate", pair.folder, *options, "--calibration", output, *methods)
    assert result.exit_code == 0, result.stderr
    kl = {row["method"]: row["kl"] for row in json.loads(result.stdout)}
    assert kl.keys() == {"full", "pop_uncalibrated", "pop_calibrated", "speed", "shortgpt"}
    assert 0 < kl["pop_calibrated"] < kl["pop_uncalibrated"]


def test_refinement_is_refused(pair, samples, tmp_path):
    """Before anything is computed or written."""
    (tmp_path / "text.txt").write_text("the an and " * 200)
    options = ("--prefill-depth", 2, "--refine", 3, "--output", tmp_path / "out.safetensors")
    for source, message in [
        (("--samples", samples), "expected it without --samples"),
        (("--text", tmp_path / "text.txt"), "has a vision tower"),
    ]:
        result = pop("calibrate", pair.folder, *source, *options)
        assert result.exit_code == 1 and message in result.stderr
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=r"the model has a vision tower \((qwen3_vl|gemma3)\), expected"):
        refine(pair.model, None, [[5] * 90] * 2, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"images": "a.png", "prompt": "a", "continuation": "b"}', "line 1: images is .*, expected a list"),
        ('{"images": [], "prompt": "a"}', "expected an object with messages, or with prompt and continuation"),
        ('{"images": [], "prompt": "a", "continuation": ""}', "line 1: the continuation is empty"),
        ('{"images": ["none.png"], "prompt": "a", "continuation": "b"}', "line 1, image 0: .*none.png: no such file"),
        ("", "no samples"),
    ],
)
def test_bad_samples(pair, tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_samples(tmp_path / "samples.jsonl", pair.model)
