"""`pop bench` in both its forms, whole at 80 columns, and `pop chat` as a person uses it, on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import statistics
import subprocess
import sys
import termios
import time

import pytest
import torch
from helpers import make_chat_folder, make_tokenizer, pop, run_in_terminal

import pop_ext
from pop_ext.analysis.speed import measure_speed, processor_name, spread


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return str(make_chat_folder(tiny_llama, tmp_path_factory))


class Terminal:
    """A program on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str):
        master, slave = pty.openpty()
        environment = os.environ | {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pop_ext.cli", *arguments], stdin=slave, stdout=slave, stderr=slave,
            env=environment, start_new_session=True, preexec_fn=self.take,
        )  # fmt: skip
        os.close(slave)
        self.master, self.seen = master, ""

    @staticmethod
    def take() -> None:
        """In the program's process: the terminal is its own, and Ctrl-C reaches it though these tests may ignore it."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """What is printed up to a match of `pattern`."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.seen), f"{pattern!r} did not come: {self.seen!r}"
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the program waits: Python misses one that comes between its prompt and the call that reads."""
        for _ in range(600):
            with open(f"/proc/{self.process.pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "S":
                    break
            time.sleep(0.1)
        self.type("\x03")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind, *_) -> None:
        """Where nothing went wrong the program must end by itself, with status 0."""
        try:
            if kind is None:
                assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)


ANSWERED = r"prefill depth 3 of 6, own projections; first token after [\d.]+ s(, then [\d.]+ tokens a second)?\n"


def answers(folder: str, *turns: str, depth: int = 3) -> list[str]:
    """Greedy answers of a conversation."""
    model = pop_ext.load(folder, dtype=torch.float32, prefill_depth=depth)
    conversation, texts = model.new_sequence(), []
    for turn in turns:
        message = [{"role": "user", "content": turn}]
        output = model.generate(message, sequences=[conversation], keep=True, max_new_tokens=6, do_sample=False)
        texts += output.text
    return texts


def test_chat_on_a_terminal(folder):
    """Turns that remember, the times of each, and Ctrl-D."""
    options = ("--prefill-depth", "3", "--max-new-tokens", "6", "--temperature", "0", "--dtype", "float32")
    with Terminal("chat", folder, *options) as terminal:
        assert "Ctrl-C stops an answer, Ctrl-D ends." in terminal.read_until(r"> $")
        terminal.type("Hello\n")
        first = terminal.read_until(ANSWERED)
        terminal.read_until(r"> $")
        terminal.type("Again\n")
        second = terminal.read_until(ANSWERED)
        terminal.read_until(r"> $")
        for shown, wanted in zip((first, second), answers(folder, "Hello", "Again"), strict=True):
            assert visible(wanted) in visible(shown)
        terminal.type("\n\x04")  # an empty line asks nothing


def visible(text: str) -> str:
    """Without what a terminal does not show as it is."""
    return re.sub(r"[^!-~]+", "", text)


def test_an_answer_is_stopped(folder):
    """Ctrl-C ends it, long before its last token, and the conversation goes on."""
    with Terminal("chat", folder, "--max-new-tokens", "900", "--temperature", "3", "--seed", "1") as terminal:
        terminal.read_until(r"> $")
        for _ in range(2):
            terminal.type("Hello\n")
            terminal.read_until(r"Hello\n")
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.read_until(r"stopped\n> $", 30)
        terminal.type("x" * 1000 + "\n")
        terminal.read_until(r"pop: .*1024(.|\n)*A new conversation begins\.\n> $", 30)
        terminal.type("\x04")


def test_a_line_is_thrown_away(folder):
    """Ctrl-C at the prompt, in a line and at an empty one: the program goes on, and nothing of the line is asked."""
    options = ("--prefill-depth", "3", "--max-new-tokens", "6", "--temperature", "0", "--dtype", "float32")
    with Terminal("chat", folder, *options) as terminal:
        terminal.read_until(r"> $")
        for typed in ("thrown away", "", ""):
            terminal.type(typed)
            terminal.read_until(rf"{typed}$")
            terminal.interrupt()
            terminal.read_until(r"\n> $")
        terminal.type("Hello\n")
        shown = terminal.read_until(ANSWERED)
        assert visible(answers(folder, "Hello")[0]) in visible(shown)
        terminal.read_until(r"> $")
        terminal.type("\x04")


def test_chat_in_a_pipe(folder):
    """Answers alone go to standard output."""
    options = ("--prefill-depth", 3, "--max-new-tokens", 6, "--temperature", 0, "--dtype", "float32")
    result = pop("chat", folder, *options, stdin="Hello\n\nAgain\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(text + "\n" for text in answers(folder, "Hello", "Again"))
    assert len(re.findall(ANSWERED, result.stderr)) == 2 and result.stderr.count("\n") == 2


def test_a_system_message_goes_first(folder):
    options = ("--max-new-tokens", 6, "--temperature", 0, "--dtype", "float32", "--system", "Speak in rhymes.")
    result = pop("chat", folder, *options, stdin="Hello\n")
    messages = [{"role": "system", "content": "Speak in rhymes."}, {"role": "user", "content": "Hello"}]
    model = pop_ext.load(folder, dtype=torch.float32)
    assert result.stdout == model.generate(messages, max_new_tokens=6, do_sample=False).text[0] + "\n"


def test_chat_refuses(folder, tiny_llama, tmp_path_factory, monkeypatch):
    for arguments, message in (
        ((folder, "--prefill-depth", "7"), "--prefill-depth is 7"),
        ((tiny_llama,), "no tokenizer"),
    ):
        result = pop("chat", *arguments, stdin="Hello\n")
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    bare = make_chat_folder(tiny_llama, tmp_path_factory)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    monkeypatch.setattr(pop_ext, "load", None)  # before any weights are read
    for command in (("chat", bare), ("generate", bare, "--chat", "--prompt", "Hello")):
        result = pop(*command, stdin="Hello\n")
        assert result.exit_code == 1 and "has no chat template: use `pop generate` with --no-chat" in result.stderr
    result = pop("generate", folder, "--prompt", "Hello", "--image", bare / "none.png")
    assert result.exit_code == 1 and "none.png: no such file" in result.stderr


# pop bench

SMALL = ("--prompt-tokens", "20", "--prompt-tokens", "70", "--decode-tokens", "3", "--rounds", "3")


def test_bench_on_a_terminal(folder):
    """All of the table within 80 columns."""
    command = [sys.executable, "-m", "pop_ext.cli", "bench", folder, *SMALL]
    status, text = run_in_terminal([*command, "--prefill-depth", "1.0", "--prefill-depth", "3"], 80)
    assert status == 0, text
    lines = [line.rstrip() for line in text.splitlines() if re.search(r"\d of 6 ", line)]
    assert all(len(line) <= 80 for line in lines)
    figure = r"[\d.]+ ± [\d.]+"
    for line, (length, depth) in zip(lines, [(20, 6), (20, 3), (70, 6), (70, 3)], strict=True):
        gain = "" if depth == 6 else rf" +{figure}"
        assert re.fullmatch(rf" *{length} +{depth} of 6 +{figure}{gain} +{figure}", line), line
    heading = " ".join(text.split())
    for part in ("model, bfloat16,", pop_ext.cpu_isa(), "threads", "prefill, tokens/s", "gain", "decode, tokens/s"):
        assert part in heading


def test_bench_json(folder):
    result = pop("bench", folder, *SMALL, "--prefill-depth", "3", "--json", "--dtype", "float32")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    output = json.loads(result.stdout)
    assert output.keys() == {"model", "machine", "dtype", "layers", "decode_tokens", "results"}
    assert (output["dtype"], output["layers"], output["decode_tokens"]) == ("float32", 6, 3)
    assert pop_ext.cpu_isa() in output["machine"]
    assert [(row["prompt_tokens"], row["prefill_depth"]) for row in output["results"]] == [(20, 3), (70, 3)]
    for row in output["results"]:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            assert len(row[name]) == 3 and all(rate > 0 for rate in row[name])


def test_measured_speed_is_the_calls_times(folder, monkeypatch):
    """With a clock that only the model moves: 2 s a prefill at full depth, 1 s at 3 layers, 0.25 s a decode step."""
    model = pop_ext.load(folder, dtype=torch.float32)
    now, order = [0.0], []
    prefill, decode = model.prefill, model.decode

    def slow_prefill(sequences, prompts, *, prefill_depth):
        now[0] += 2 if prefill_depth == 6 else 1
        order.append((len(prompts[0]), prefill_depth))
        return prefill(sequences, prompts, prefill_depth=prefill_depth)

    def slow_decode(sequences, token_ids):
        now[0] += 0.25
        return decode(sequences, token_ids)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(model, "prefill", slow_prefill)
    monkeypatch.setattr(model, "decode", slow_decode)
    results = measure_speed(model, [10, 30], [6, 3], decode_tokens=4, rounds=2)
    assert order == [(10, 6), (10, 3), (30, 6), (30, 3)] * 3
    assert [row.prefill for row in results] == [[5, 5], [10, 10], [15, 15], [30, 30]]
    assert all(row.decode == [4, 4] for row in results)
    assert len(model.cache.free_blocks) == model.cache.num_blocks


def test_spread_and_machine(folder):
    rates = [3.0, 5.0, 10.0]
    assert spread(rates) == (6, statistics.stdev(rates)) and spread([2.0]) == (2, 0)
    assert processor_name(pop_ext.load(folder)).split(", ")[-2] == pop_ext.cpu_isa()


def test_bench_refuses(folder, monkeypatch):
    monkeypatch.setattr(pop_ext, "load", None)  # before any weights are read
    for arguments, message in (
        (("--prefill-depth", "9"), "--prefill-depth is 9, expected 1 to 6"),
        (
            ("--prompt-tokens", "1020"),
            "--prompt-tokens and --decode-tokens make 1052, expected at most the model's 1024",
        ),
    ):
        result = pop("bench", folder, *arguments)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
