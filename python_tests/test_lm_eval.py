"""POP as a model of lm-eval, on tasks made from local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import make_chat_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")

from lm_eval.api.instance import Instance

import pop_ext
from pop_ext.analysis.calibration import calibrate
from pop_ext.integrations.lm_eval import POP

QUESTIONS = [
    {"question": "What does a lamp give?", "choices": ["light", "rain", "bread"], "answer": 0},
    {"question": "Where do fish live?", "choices": ["in the sky", "in the water"], "answer": 1},
    {"question": "What is cold?", "choices": ["a flame", "the sun", "ice"], "answer": 2},
]
CHOICE_TASK = """
task: pop_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
GENERATE_TASK = """
task: pop_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return str(make_chat_folder(tiny_llama, tmp_path_factory))


@pytest.fixture(scope="module")
def model(folder):
    return POP(pretrained=folder, prefill_depth="3", dtype="float32")


def requests(pairs) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_without_a_boundary(folder):
    """The first token of a continuation comes from the prefill depth: it is the runner's own."""
    bare = POP(pretrained=folder, prefill_depth="3", boundary_tokens=0, anchor_tokens=0, dtype="float32")
    ((found, _),) = bare.loglikelihood(requests([("One context here", " a")]), disable_tqdm=True)
    ids = [bare.tokenizer(text).input_ids for text in ("One context here", " a")]
    model = pop_ext.load(folder, prefill_depth=3, boundary_tokens=0, anchor_tokens=0, dtype="float32")
    log_p = model.logits([ids[0]], [ids[1]])[0].log_softmax(-1)
    assert found == pytest.approx(float(log_p.gather(1, torch.tensor(ids[1])[:, None]).sum()), abs=1e-4)
    model.boundary_tokens = 1
    assert not torch.allclose(model.logits([ids[0]], [ids[1]])[0].log_softmax(-1)[0], log_p[0], atol=1e-2)


def test_loglikelihood(model, monkeypatch):
    """Sums of log-probabilities in the order asked, and each context prefilled once."""
    pairs = [
        ("One context here", " a"),
        ("Another one", " b c"),
        ("One context here", " longer end"),
        ("One context here", " a"),
    ]
    reference = pop_ext.load(str(model.model.folder), prefill_depth=3, dtype=torch.float32)
    expected = []
    for context, continuation in pairs:
        whole, prompt = (reference.tokenizer(text).input_ids for text in (context + continuation, context))
        target = whole[len(prompt) :]
        log_p = reference.logits([prompt], [target])[0].double().log_softmax(-1)
        expected.append((log_p[range(len(target)), target].sum().item(), log_p.argmax(-1).tolist() == target))
    prefills = []
    turn = type(model.model)._turn

    def counted(self, sequences, prompts, name, *args, **kwargs):
        prefills.append(name)
        return turn(self, sequences, prompts, name, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "_turn", counted)
    found = model.loglikelihood(requests(pairs), disable_tqdm=True)
    assert prefills.count("prompts") == 2
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-3) and greedy == wanted_greedy


def test_greedy_is_recognised(model):
    prompt = "A context of some words"
    ids = model.tokenizer(prompt).input_ids
    answer = model.model.generate([ids], max_new_tokens=3).tokens[0]
    ((_, greedy),) = model._loglikelihood_tokens([(None, ids, answer)], disable_tqdm=True)
    ((_, other),) = model._loglikelihood_tokens([(None, ids, [answer[0], (answer[1] + 1) % 200, answer[2]])], True)
    assert greedy and not other


def test_empty_context_takes_the_prefix_token(model, monkeypatch):
    monkeypatch.setattr(type(model), "prefix_token_id", property(lambda self: 7))
    ((value, _),) = model.loglikelihood(requests([("", "Some text")]), disable_tqdm=True)
    target = model.tokenizer("Some text", add_special_tokens=False).input_ids
    log_p = model.model.logits([[7]], [target])[0].log_softmax(-1)
    assert value == pytest.approx(log_p[range(len(target)), target].sum().item(), abs=1e-4)


def test_long_contexts_lose_their_start(model):
    context, target = [5] * 3 + list(range(model.max_length - 2)), [1, 2]
    context = [token % 293 for token in context]
    ((value, _),) = model._loglikelihood_tokens([(None, context, target)], disable_tqdm=True)
    log_p = model.model.logits([context[-(model.max_length - 2) :]], [target])[0].log_softmax(-1)
    assert value == pytest.approx(log_p[range(2), target].sum().item(), abs=1e-4)


def test_rolling_is_refused(model):
    with pytest.raises(NotImplementedError, match="nothing for prefill-only pruning to prune"):
        model.loglikelihood_rolling(requests([("text",)]))


def generate(model, context: str, **settings) -> str:
    return model.generate_until([Instance("generate_until", {}, (context, settings), 0)], disable_tqdm=True)[0]


def test_lengths_of_answers(model):
    """Under any of the names that tasks use, in lm-eval's order."""
    whole = generate(model, "Some text", until=[], max_gen_toks=8)
    ids = model.tokenizer("Some text").input_ids
    assert whole == model.model.generate([ids], max_new_tokens=8, do_sample=False).text[0]
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert generate(model, "Some text", until=[], **{name: 8}) == whole
    assert generate(model, "Some text", until=[], max_gen_toks=8, max_new_tokens=2) == whole
    assert generate(model, "Some text", until=["", None, ""], max_gen_toks=8) == whole
    assert generate(model, "Some text", until="", max_gen_toks=8) == whole
    assert generate(model, "Some text", until=None, max_gen_toks=8, do_sample=True, temperature=0) == whole


def test_answers_as_long_as_the_context(model, monkeypatch):
    monkeypatch.setattr(model, "max_length", 12)
    for count in (12, 13, 10**6, 0):
        with pytest.raises(ValueError, match=f"max_gen_toks is {count}, expected 1 to 11: the model's context is 12"):
            generate(model, "Some text", until=[], max_gen_toks=count)
    prompts = []
    monkeypatch.setattr(
        model.model, "generate", lambda prompt, **_: prompts.append(prompt[0]) or SimpleNamespace(text=[""])
    )
    for count in (11, 5):
        generate(model, "A longer text than that", until=[], max_gen_toks=count)
    assert [len(prompt) for prompt in prompts] == [1, 7]


def test_other_models_stay_known():
    code = "import pop_ext.integrations.lm_eval; from lm_eval.api.registry import get_model as get; "
    code += "print(get('dummy'), get('pop'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "DummyLM" in run.stdout and "POP" in run.stdout, run.stderr[-2000:]


def test_bad_arguments(folder, tiny_llama):
    for arguments, message in (
        ({"prefill_depth": 9}, "prefill_depth is 9"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"calibration": "none.safetensors"}, "no such calibration file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            POP(pretrained=folder, **arguments)
    with pytest.raises(ValueError, match="no tokenizer"):
        POP(pretrained=str(tiny_llama))


def test_command_line(folder, tmp_path):
    """lm-eval's own command line, offline, on a multiple-choice and a generation task, with calibrated projections."""
    windows = torch.randint(200, (8, 50), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = tmp_path / "c.safetensors"
    calibrate(pop_ext.load(folder, dtype=torch.float32), windows, [3]).save(calibration)
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in (("choice", CHOICE_TASK), ("generate", GENERATE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(task.format(file=data))
    result = subprocess.run(
        [
            sys.executable, "-m", "pop_ext.integrations.lm_eval", "--model", "pop",
            "--model_args", f"pretrained={folder},prefill_depth=3,dtype=float32,calibration={calibration}",
            "--tasks", "pop_choice,pop_generate",
            "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results.keys() == {"pop_choice", "pop_generate"}
    model = pop_ext.load(folder, prefill_depth=3, dtype=torch.float32, calibration=calibration)
    own = pop_ext.load(folder, prefill_depth=3, dtype=torch.float32)
    logged = {}
    for task in results:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        logged[task] = [json.loads(line) for line in file.read_text().splitlines()]
    right, differs = 0, False
    for row, choice_log, answer_log in zip(QUESTIONS, *(logged[task] for task in sorted(logged)), strict=True):
        prompt = model.tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        scores = []
        for choice in row["choices"]:
            target = model.tokenizer(f"Question: {row['question']}\nAnswer: {choice}").input_ids[len(prompt) :]
            scores.append(model.logits([prompt], [target])[0].log_softmax(-1)[range(len(target)), target].sum().item())
            plain = own.logits([prompt], [target])[0].log_softmax(-1)[range(len(target)), target].sum().item()
            differs |= abs(plain - scores[-1]) > 0.01
        found = [float(response[0][0]) for response in choice_log["resps"]]
        assert found == pytest.approx(scores, abs=1e-3)
        right += scores.index(max(scores)) == row["answer"]
        answer = model.generate([prompt], max_new_tokens=6, do_sample=False).text[0]
        assert answer_log["resps"][0][0] == answer.split("\n")[0]
    assert differs  # the calibration was used
    assert results["pop_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
