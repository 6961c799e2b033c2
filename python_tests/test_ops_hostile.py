"""10,000 random bad arguments, from a seed: each call raises, and the message names an argument that is wrong.

The calls run in a process of their own with a bounded address space, so that a crash, a hang or a runaway allocation
is a failed test that names its case (`python test_ops_hostile.py SEED FIRST COUNT` runs those cases by hand).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pop_ext  # noqa: F401  registers torch.ops.pop

CASES, SEED = 10_000, 2024
MEMORY = 256 << 20  # bytes that all cases together may add to the process

T, D, HQ, HKV, E, F, N, S, R, BLOCKS, BLOCK, ROPES = 6, 10, 6, 3, 8, 7, 9, 3, 4, 5, 4, 2
CAPACITY = BLOCKS * BLOCK
CONTEXTS, QUERIES = [5, 9, 2], [2, 3, 1]


def valid(op: str, dtype: torch.dtype) -> dict:
    """The arguments of a correct call, by name, all optional ones given."""
    real = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    fp32 = torch.randn
    slots = torch.randperm(CAPACITY)[:T]
    if op == "rms_norm":
        return dict(x=real(T, D), weight=fp32(D), eps=1e-6, residual=real(T, D))
    if op == "linear":
        return dict(x=real(T, D), weight=real(N, D), bias=real(N), residual=real(T, N), out_dtype=torch.float32)
    if op == "gated_linear":
        return dict(x=real(T, D), gate_up_weight=real(2 * F, D), activation="silu")
    if op == "qkv_project":
        rows = (HQ + 2 * HKV) * E
        return dict(
            x=real(T, D), weight=real(rows, D), bias=real(rows), q_norm=fp32(E), k_norm=fp32(E), eps=1e-6,
            cos=fp32(T, E // 2), sin=fp32(T, E // 2), slot_mapping=slots, key_cache=real(BLOCKS, BLOCK, HKV, E),
            value_cache=real(BLOCKS, BLOCK, HKV, E),
        )  # fmt: skip
    if op == "attention":
        tables = torch.randint(0, BLOCKS, (S, 3), dtype=torch.int32)
        starts = torch.tensor([0, *itertools.accumulate(QUERIES)], dtype=torch.int32)
        return dict(
            query=real(T, HQ, E), key_cache=real(BLOCKS, BLOCK, HKV, E), value_cache=real(BLOCKS, BLOCK, HKV, E),
            block_tables=tables, cu_seqlens_q=starts, seqlens_k=torch.tensor(CONTEXTS, dtype=torch.int32),
            max_seqlen_q=max(QUERIES), max_seqlen_k=max(CONTEXTS), softmax_scale=0.3, window_size=4,
            spans=torch.full((S, max(CONTEXTS)), -1, dtype=torch.int32),
        )  # fmt: skip
    return dict(
        hidden=real(T, D), weight=real(R, 2 * HKV * E, D), bias=real(R, 2 * HKV * E), k_norm=fp32(R, E), eps=1e-6,
        cos=fp32(ROPES, T, E // 2), sin=fp32(ROPES, T, E // 2), 
        rope_index=torch.randint(0, ROPES, (R,), dtype=torch.int32),
        slot_mapping=slots, key_caches=real(R, BLOCKS, BLOCK, HKV, E), value_caches=real(R, BLOCKS, BLOCK, HKV, E),
    )  # fmt: skip


OPS = ["rms_norm", "linear", "gated_linear", "qkv_project", "attention", "project_kv"]

# Dimensions that arguments share: changing it in one of them alone is an error that may name any of them.
SHARED = {
    "rms_norm": [[("x", 0), ("residual", 0)], [("x", 1), ("weight", 0), ("residual", 1)]],
    "linear": [
        [("x", 0), ("residual", 0)], [("x", 1), ("weight", 1)], [("weight", 0), ("bias", 0), ("residual", 1)],
    ],
    "gated_linear": [[("x", 1), ("gate_up_weight", 1)]],
    "qkv_project": [
        [("x", 0), ("cos", 0), ("sin", 0), ("slot_mapping", 0)], [("x", 1), ("weight", 1)],
        [("weight", 0), ("bias", 0)],
        [("q_norm", 0), ("k_norm", 0), ("cos", 1), ("sin", 1), ("key_cache", 3), ("value_cache", 3)],
        *([("key_cache", d), ("value_cache", d)] for d in range(4)),
    ],
    "attention": [
        [("query", 0), ("cu_seqlens_q", -1)], [("query", 2), ("key_cache", 3), ("value_cache", 3)],
        [("block_tables", 0), ("cu_seqlens_q", 0), ("seqlens_k", 0), ("spans", 0)],
        *([("key_cache", d), ("value_cache", d)] for d in range(4)),
    ],
    "project_kv": [
        [("hidden", 0), ("cos", 1), ("sin", 1), ("slot_mapping", 0)], [("hidden", 1), ("weight", 2)],
        [("weight", 0), ("bias", 0), ("k_norm", 0), ("rope_index", 0), ("key_caches", 0), ("value_caches", 0)],
        [("weight", 1), ("bias", 1)], [("cos", 0), ("sin", 0)],
        [("k_norm", 1), ("cos", 2), ("sin", 2), ("key_caches", 4), ("value_caches", 4)],
        *([("key_caches", d), ("value_caches", d)] for d in range(1, 5)),
    ],
}  # fmt: skip

# Arguments whose dtype must be the same: a change in one may be reported for another.
SAME_DTYPE = {
    "x", "residual", "gate_up_weight", "query", "hidden", "weight", "bias", "key_cache", "value_cache", "key_caches",
    "value_caches",
}  # fmt: skip
OPTIONAL = {"residual", "bias", "q_norm", "k_norm", "spans", "out_dtype"}
HUGE = [2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
OTHER_DTYPES = [
    torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.int32, torch.int64, torch.float32, torch.bfloat16,
]  # fmt: skip


def tensors(args: dict) -> list[str]:
    return [name for name, value in args.items() if isinstance(value, torch.Tensor)]


def partners(op: str, name: str, dim: int | None = None) -> set[str]:
    """Arguments that share the dimension `dim` (any dimension) of `name`."""
    groups = [group for group in SHARED[op] if any(n == name and (dim is None or d == dim) for n, d in group)]
    return {name} | {n for group in groups for n, _ in group}


# Each mutation changes `args` in place and returns the names of which the message must hold one; None where it does not
# apply to the operation.


def wrong_size(rng, op, args):
    name, dim = rng.choice(rng.choice(SHARED[op]))
    if dim < 0 or name not in args:
        return None
    size = args[name].shape[dim]
    new = rng.choice([size + 1, size - 1, 0, size * 2, size + 7])
    if new == size:
        return None
    keep = args[name].narrow(dim, 0, min(size, new))
    shape = list(args[name].shape)
    shape[dim] = new
    args[name] = torch.zeros(shape, dtype=args[name].dtype)
    args[name].narrow(dim, 0, min(size, new)).copy_(keep)
    return partners(op, name, dim)


def huge_size(rng, op, args):
    """A view of a few bytes that claims to be enormous."""
    name, dim = rng.choice(rng.choice(SHARED[op]))
    value = args.get(name)
    if value is None or value.dim() < 2 or not 0 <= dim < value.dim() - 1:
        return None
    shape = list(value.shape)
    shape[dim] = rng.choice([2**31, 2**33, 2**40])
    args[name] = value.narrow(dim, 0, 1).expand(shape)
    return partners(op, name, dim)


def odd_rows(rng, op, args):
    """Row counts that no whole number of heads (or of gate and up pairs) has."""
    name = {
        "gated_linear": "gate_up_weight",
        "qkv_project": "weight",
        "project_kv": "weight",
        "attention": "query",
    }.get(op)
    if name is None:
        return None
    dim = 1 if op in ("project_kv", "attention") else 0
    extra = rng.choice([1, -1]) if op == "attention" else rng.choice([1, 3, -1])
    for other in {name, "bias"} & set(args):
        shape = list(args[other].shape)
        shape[dim if other == name or op == "project_kv" else 0] += extra
        args[other] = torch.zeros(shape, dtype=args[other].dtype)
    return {name, "bias", *(n for n in args if "cache" in n)}


def wrong_rank(rng, op, args):
    name = rng.choice(tensors(args))
    value = args[name]
    args[name] = rng.choice(
        [
            value.unsqueeze(0),
            value.unsqueeze(-1),
            value.flatten().unsqueeze(0).unsqueeze(0).unsqueeze(0).unsqueeze(0).unsqueeze(0),
            value[0],
        ]
    )
    return {name}


def wrong_dtype(rng, op, args):
    name = rng.choice(tensors(args))
    valid = {torch.int32, torch.int64} if name == "slot_mapping" else {args[name].dtype}
    options = [d for d in OTHER_DTYPES if d not in valid]
    args[name] = args[name].to(rng.choice(options))
    return {name} | (SAME_DTYPE & set(args) if name in SAME_DTYPE else set())


def wrong_out_dtype(rng, op, args):
    if op != "linear":
        return None
    args["out_dtype"] = rng.choice([torch.float16, torch.int64, torch.float64, torch.bool, torch.complex64])
    return {"out_dtype"}


def wrong_device(rng, op, args):
    name = rng.choice(tensors(args))
    args[name] = args[name].to("meta")
    return set(tensors(args))  # on the meta device the others are the odd ones out


def wrong_strides(rng, op, args):
    """The last dimension is not contiguous."""
    name = rng.choice([n for n in tensors(args) if args[n].shape[-1] > 1])
    value = args[name]
    if value.dim() > 1 and rng.random() < 0.5:
        args[name] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif rng.random() < 0.5:
        args[name] = value.repeat_interleave(2, -1)[..., ::2]
    else:
        args[name] = value[..., :1].expand(value.shape)
    return {name}


def wrong_type(rng, op, args):
    name = rng.choice(list(args))
    if isinstance(args[name], torch.Tensor):
        args[name] = rng.choice(["x", 3.5, [], {}, object()] + ([] if name in OPTIONAL else [None]))
    else:
        args[name] = rng.choice([None, [], {}, object(), torch.zeros(3)])
        if args[name] is None and name in OPTIONAL:
            return None
    return {name}


def missing(rng, op, args):
    name = rng.choice([n for n in args if n not in OPTIONAL | {"window_size"}])
    del args[name]
    return {name}


def wrong_eps(rng, op, args):
    if "eps" not in args:
        return None
    args["eps"] = rng.choice([math.nan, math.inf, -math.inf, -1e-6, -1.0])
    return {"eps"}


def wrong_activation(rng, op, args):
    if op != "gated_linear":
        return None
    args["activation"] = rng.choice(["", "relu", "SILU", "silu\0", "silu ", "gelu", "é", "x" * 100_000])
    return {"activation"}


def wrong_slots(rng, op, args):
    if "slot_mapping" not in args:
        return None
    args["slot_mapping"][rng.randrange(T)] = rng.choice([CAPACITY, CAPACITY + 1, -2, -(2**63), *HUGE])
    return {"slot_mapping"}


def wrong_rope_index(rng, op, args):
    if "rope_index" not in args:
        return None
    args["rope_index"][rng.randrange(R)] = rng.choice([ROPES, -1, 2**31 - 1, -(2**31)])
    return {"rope_index"}


def wrong_block_tables(rng, op, args):
    if op != "attention":
        return None
    s = rng.randrange(S)
    args["block_tables"][s, rng.randrange(-(-CONTEXTS[s] // BLOCK))] = rng.choice(
        [BLOCKS, BLOCKS + 1, -1, -2, 2**31 - 1, -(2**31)]
    )
    return {"block_tables"}


def narrow_tables(rng, op, args):
    """Fewer columns than the contexts need."""
    if op != "attention":
        return None
    name = rng.choice(["block_tables", "spans"])
    args[name] = args[name][:, : rng.randrange({"block_tables": 3, "spans": max(CONTEXTS)}[name])].contiguous()
    return {name}


def wrong_cu_seqlens_q(rng, op, args):
    if op != "attention":
        return None
    starts = args["cu_seqlens_q"]
    index = rng.randrange(S + 1)
    values = [-1, T + 1, 2**31 - 1, -(2**31)] if 0 < index < S else [-1, 1, T + 1, T - 1, 2**31 - 1, -(2**31)]
    value = rng.choice(values)
    if value == starts[index] or (index == S and value == 0):
        return None
    starts[index] = value
    return {"cu_seqlens_q"}


def wrong_seqlens_k(rng, op, args):
    if op != "attention":
        return None
    s = rng.randrange(S)
    args["seqlens_k"][s] = rng.choice([-1, QUERIES[s] - 1 or -2, max(CONTEXTS) + 1, 3 * BLOCK + 1, 2**31 - 1, -(2**31)])
    return {"seqlens_k", "max_seqlen_k"}


def wrong_lengths(rng, op, args):
    if op != "attention":
        return None
    name = rng.choice(["max_seqlen_q", "max_seqlen_k"])
    values = [-1, args[name] - 1, -(2**63)]  # a bound may be generous, but block_tables must hold max_seqlen_k
    args[name] = rng.choice(values if name == "max_seqlen_q" else values + HUGE)
    return {name, "cu_seqlens_q" if name == "max_seqlen_q" else "seqlens_k"}


def wrong_window_size(rng, op, args):
    if op != "attention":
        return None
    args["window_size"] = rng.choice([-1, -2, -(2**31), -(2**63)])
    return {"window_size"}


def wrong_softmax_scale(rng, op, args):
    if op != "attention":
        return None
    args["softmax_scale"] = rng.choice([math.nan, math.inf, -math.inf])
    return {"softmax_scale"}


MUTATIONS = [
    wrong_size, wrong_size, wrong_size, huge_size, odd_rows, wrong_rank, wrong_rank, wrong_dtype, wrong_dtype,
    wrong_out_dtype, wrong_device, wrong_strides, wrong_strides, wrong_type, missing, wrong_eps, wrong_activation,
    wrong_slots, wrong_rope_index, wrong_block_tables, narrow_tables, wrong_cu_seqlens_q, wrong_seqlens_k,
    wrong_lengths, wrong_window_size, wrong_softmax_scale,
]  # fmt: skip
KEYWORD_ONLY = {"out_dtype"}


def run_case(number: int, seed: int) -> str | None:
    """One bad call; returns what is wrong with the answer, or None."""
    rng = random.Random(f"{seed}:{number}")
    torch.manual_seed(number)
    op = rng.choice(OPS)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    names = None
    while names is None:
        args = valid(op, dtype)
        mutation = rng.choice(MUTATIONS)
        names = mutation(rng, op, args)
    positional = rng.random() < 0.5 and mutation is not missing
    call = f"case {number}: {op} after {mutation.__name__}"
    try:
        if positional:
            keywords = {name: args.pop(name) for name in KEYWORD_ONLY & set(args)}
            getattr(torch.ops.pop, op)(*args.values(), **keywords)
        else:
            getattr(torch.ops.pop, op)(**args)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not any(re.search(rf"\b{name}\b", str(error)) for name in names):
            return f"{call}: the message names none of {sorted(names)}: {type(error).__name__}: {str(error)[:300]}"
        return None
    return f"{call} did not raise (expected an error about {sorted(names)})"


def main(seed: int, first: int, count: int) -> None:
    torch.set_num_threads(1)
    for op, dtype in itertools.product(OPS, [torch.float32, torch.bfloat16]):
        getattr(torch.ops.pop, op)(**valid(op, dtype))  # what is mutated is valid
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # noqa: E731  bytes, the highest so far
    before = used()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), now + (1 << 30)))
    wrong = []
    for number in range(first, first + count):
        print(number, file=sys.stderr, flush=True)  # the last line before a crash is its case
        failure = run_case(number, seed)
        if failure:
            wrong.append(failure)
    print(json.dumps({"wrong": wrong, "memory": used() - before}))


def test_bad_arguments():
    command = [sys.executable, __file__, str(SEED), "0", str(CASES)]
    try:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs at case {error.stderr.decode().split()[-1]}")
    last = done.stderr.split()[-1:]
    assert done.returncode == 0, f"the process ended with {done.returncode} at case {last}:\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert not report["wrong"], f"{len(report['wrong'])} of {CASES} cases:\n" + "\n".join(report["wrong"][:40])
    assert report["memory"] < MEMORY, f"{report['memory'] >> 20} MiB"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
