"""POP in one minute: a small model answers a question about a long document, its prompt at full depth and truncated.

python bench/demo.py MODEL_FOLDER [--prefill-depth 20] [--json]
"""

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

STAGES = ("truncated_prefill", "projection", "boundary")

TOPIC = "typesmapping"  # the chapter on dictionaries, which ships with Python as pydoc's help text
QUESTION = "How do I create a dictionary in Python?"


def measure(model, prompt: list[int], depths: list[int], rounds: int, console: Console) -> dict[int, list]:
    """Times of the first token at each depth, in turn within a round so that both see the same machine."""
    times = {depth: [] for depth in depths}
    with console.status("") as status:
        for i in range(rounds):
            status.update(f"timing the first token, round {i + 1} of {rounds}")
            for depth in depths if i % 2 == 0 else depths[::-1]:
                times[depth].append(model.generate([prompt], prefill_depth=depth, max_new_tokens=1).times)
    return times


def compare(model, prompt: list[int], answer: list[int], full: int, depth: int) -> tuple[float, float]:
    """Mean KL divergence in nats, and share of equal top tokens, of the next-token distributions along `answer`."""
    exact, truncated = (
        model.logits([prompt], [answer], prefill_depth=depth)[0].log_softmax(-1) for depth in (full, depth)
    )
    kl = (exact.exp() * (exact - truncated)).sum(-1).mean().item()
    return kl, (exact.argmax(-1) == truncated.argmax(-1)).float().mean().item()


def long_prompt(tokenizer) -> list[int]:
    """The document, the question before and after it: a model this small loses it otherwise."""
    text = f"{QUESTION}\n\n{topics[TOPIC].strip()}\n\n{QUESTION}"
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids


def answer_both(model, prompt: list[int], full: int, depth: int, max_new_tokens: int, console: Console) -> dict:
    """What the model answers at each depth, shown as it comes."""
    answers = {}
    for name, layers in ((f"full depth, {full} layers", full), (f"prompt through {depth} of {full} layers", depth)):
        with console.status(f"answering: {name}"):
            answers[layers] = model.generate([prompt], prefill_depth=layers, max_new_tokens=max_new_tokens)
        answer = answers[layers].text[0].strip()
        if len(answers[layers].tokens[0]) == max_new_tokens:
            answer += " [...]"
        console.print(Panel(escape(answer), title=name, title_align="left"))
    return answers


def run(arguments, console: Console) -> dict:
    folder = arguments.model
    with console.status(f"loading {folder}"):
        import torch
        import transformers

        import pop_ext

        transformers.utils.logging.set_verbosity_error()
        model = pop_ext.load(folder)
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer")
    full = model.spec.num_layers
    depth = arguments.prefill_depth or round(full * 2 / 3)

    prompt = long_prompt(model.tokenizer)
    console.print(
        f"[bold]{escape(Path(folder).name)}[/], {full} layers, {str(model.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads. Document: pydoc_data.topics[{TOPIC!r}], {len(prompt)} prompt tokens.",
        f'Question: "{QUESTION}"\n',
        sep="\n",
    )
    answers = answer_both(model, prompt, full, depth, arguments.max_new_tokens, console)
    with console.status("comparing the next-token distributions along the full-depth answer"):
        kl, top1 = compare(model, prompt, answers[full].tokens[0], full, depth)
    times = measure(model, prompt, [full, depth], arguments.rounds, console)
    ratios = [
        exact.time_to_first_token / truncated.time_to_first_token
        for exact, truncated in zip(times[full], times[depth], strict=True)
    ]
    return {
        "model": Path(folder).name,
        "layers": full,
        "prefill_depth": depth,
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(prompt),
        "question": QUESTION,
        "rounds": arguments.rounds,
        "engines": [
            {
                "prefill_depth": layers,
                "answer": answers[layers].text[0],
                "answer_tokens": len(answers[layers].tokens[0]),
                **{f"{stage}_seconds": median(getattr(t, stage) for t in times[layers]) for stage in STAGES},
                "time_to_first_token_seconds": median(t.time_to_first_token for t in times[layers]),
                "decode_tokens_per_second": answers[layers].times.decode_tokens_per_second,
            }
            for layers in (full, depth)
        ],
        "time_to_first_token_ratio": median(ratios),
        "compared_tokens": len(answers[full].tokens[0]),
        "kl_nats_per_token": kl,
        "top1_agreement": top1,
    }


def show(result: dict, console: Console) -> None:
    full, truncated = result["engines"]
    table = Table(title=f"\nTime to first token, {result['prompt_tokens']} prompt tokens", title_justify="left")
    table.add_column("")
    for engine in (full, truncated):
        table.add_column(f"{engine['prefill_depth']} of {result['layers']} layers", justify="right")
    for stage in STAGES:
        table.add_row(stage.replace("_", " "), *(f"{e[f'{stage}_seconds']:.3f} s" for e in (full, truncated)))
    table.add_section()
    table.add_row("time to first token", *(f"{e['time_to_first_token_seconds']:.3f} s" for e in (full, truncated)))
    table.add_row("", "", f"[bold green]{result['time_to_first_token_ratio']:.2f}x faster")
    table.add_section()
    rates = (e["decode_tokens_per_second"] for e in (full, truncated))
    table.add_row("decode, tokens a second", *("-" if rate is None else f"{rate:.1f}" for rate in rates))
    console.print(table)
    console.print(
        f"Medians of {result['rounds']} interleaved runs. Along the {result['compared_tokens']} tokens of the "
        f"full-depth answer the truncated prompt's next-token distributions are "
        f"[bold]{result['kl_nats_per_token']:.3f} nats[/] (KL) from the full ones a token, and the likeliest token is "
        f"the same for [bold]{result['top1_agreement']:.0%}[/]."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--prefill-depth", type=int, help="layers of the truncated prompt (default: two thirds)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # With --json all that is for a person goes to standard error.
    console = Console(stderr=arguments.json, highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        result = run(arguments, console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 1
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
