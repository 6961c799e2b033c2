"""bench/vlm_synthetic.py: its pictures, its batches, and the whole of it with hardly any training."""

from __future__ import annotations

import json
import random
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import vlm_pictures
import vlm_synthetic
import vlm_training


def test_questions_are_about_the_picture():
    rng = random.Random(3)
    kinds = set()
    for _ in range(300):
        picture = vlm_pictures.Picture(rng)
        question, answer = picture.question(rng)
        words = question.split()
        if words[0] in vlm_pictures.CELLS:
            assert answer.split() == list(picture.items[vlm_pictures.CELLS.index(words[0])])
        else:
            row, column = words[1]
            under = chr(ord(row) + 1) + column
            assert answer.split() == list(picture.items[vlm_pictures.CELLS.index(under)])
        kinds.add("cell" if words[0] in vlm_pictures.CELLS else words[0])
    assert kinds == {"cell", "below"}


@pytest.mark.parametrize("family", list(vlm_pictures.SPECIAL))
def test_batch(family):
    """Labels are the answers where they stand; the first pixels of the image stand for its first token."""
    tokenizer, (model, processor) = vlm_pictures.make_tokenizer(family), vlm_training.make_model(family)
    rng = random.Random(5)
    pictures = [vlm_pictures.Picture(rng) for _ in range(3)]
    asked = [(picture, [picture.question(rng) for _ in range(2)]) for picture in pictures]
    inputs = vlm_pictures.batch_of(family, asked, tokenizer, processor)
    labels = inputs["labels"]
    for row, wanted, (_, questions) in zip(inputs["input_ids"], labels, asked, strict=True):
        assert row[wanted != -100].equal(wanted[wanted != -100])
        assert tokenizer.decode(wanted[wanted != -100]).split() == [
            *" <end> ".join(a for _, a in questions).split(),
            "<end>",
        ]
        assert int((row == model.config.image_token_id).sum()) == vlm_pictures.IMAGE_TOKENS
    figures = inputs["figures"].unflatten(0, (3, vlm_pictures.IMAGE_TOKENS))
    assert figures[:, 0, 2].tolist() == [0] * 3 and figures[:, -1, 2].tolist() == [15] * 3
    assert figures[0, 8 * 3 + 4].tolist()[2] == 6  # the fourth row and fifth column of tokens: b3
    # where colour and shape are asked for, the cell under which they are
    known, colours = inputs["cells"], tokenizer.convert_tokens_to_ids(list(vlm_pictures.COLOURS))
    assert int((known != -100).sum()) == 3 * 2 * 2
    for wanted, at, picture in zip(labels, known, pictures, strict=True):
        for place in (at != -100).nonzero().flatten().tolist():
            words = picture.items[int(at[place])]
            word = tokenizer.decode([int(wanted[place + 1])])
            assert word == words[0 if int(wanted[place + 1]) in colours else 1]
    assert list(vlm_pictures.COLOURS)[int(figures[1, 0, 0])] == pictures[1].items[0][0]


@pytest.mark.parametrize("family", list(vlm_pictures.SPECIAL))
def test_report(family, tmp_path, monkeypatch, capsys):
    """A model that has learnt nothing is reported as blind. The reference is POP with own weights, so it is right as
    often as the runner, but for ties that bfloat16 makes.
    """
    monkeypatch.setattr(vlm_synthetic, "CALIBRATION_PICTURES", 16)
    options = ["--family", family, "--steps", "4", "--questions", "50", "--json"]
    monkeypatch.setattr(sys, "argv", ["vlm_synthetic.py", str(tmp_path), *options])
    assert vlm_synthetic.main() == 1
    output = capsys.readouterr()
    assert "fewer than 95% right" in output.err
    (report,) = json.loads(output.out)
    assert report["questions"] == 50 and report["prompt_tokens"] > report["image_tokens"] == 64
    assert [row["prefill_depth"] for row in report["depths"]] == [6, 5, 4, 3, 2, 1]
    for row in report["depths"]:
        assert row["accuracy"].keys() == {"own", "calibrated", "control", "reference"}
        assert abs(row["accuracy"]["own"] - row["accuracy"]["reference"]) <= 0.06
        assert row["milliseconds"].keys() == set(vlm_synthetic.STAGES) and row["milliseconds"]["truncated_prefill"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {f"vlm-synthetic-{family.replace('_', '-')}"}
