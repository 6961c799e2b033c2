"""Static facts of a kernel: what NVIDIA's assembler makes of its PTX, and how much of it fits on a multiprocessor.

`ptxas` (of `nvidia-cuda-nvcc` or a toolkit) tells registers, spills and shared memory, `nvdisasm` (of
`nvidia-cuda-nvdisasm` or a toolkit) the machine instructions, SASS, each with the PTX line that it comes from.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile

# Opcodes of the tensor cores; HFMA2.MMA and its kin are none.
TENSOR = ("HMMA", "IMMA", "DMMA", "BMMA", "QMMA")


@dataclasses.dataclass(frozen=True)
class SassLoop:
    """A natural loop: the addresses of its header and of its last branch back, how many loops it lies in (itself
    included), its instructions by opcode and by PTX line."""

    first: int
    last: int
    depth: int
    opcodes: dict[str, int]
    lines: dict[int, int]

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def tensor(self) -> int:
        return sum(self.opcodes.get(name, 0) for name in TENSOR)


@dataclasses.dataclass(frozen=True)
class StaticFacts:
    """Of one kernel on `sm`: registers a thread, bytes of a thread's spill stores and loads and of its stack, bytes of
    static shared memory, SASS instructions by opcode, and loops."""

    kernel: str
    sm: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    opcodes: dict[str, int]
    loops: list[SassLoop]


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that a multiprocessor holds at a time, of how many warps at most, and the blocks that each of
    its resources alone would allow."""

    blocks: int
    warps: int
    most_warps: int
    limits: dict[str, int]


# CUDA C++ programming guide, technical specifications: warps, blocks, bytes of shared memory of a multiprocessor, by
# compute capability.
_LIMITS = {80: (64, 32, 164 << 10), 86: (48, 16, 100 << 10), 90: (64, 32, 228 << 10)}


def occupancy(registers: int, threads: int, shared: int, sm: int = 80) -> Occupancy:
    """What fits on a multiprocessor of blocks of `threads`, with `registers` a thread and `shared` bytes a block.

    By the rules of CUDA's cuda_occupancy.h: registers are given to warps by 256, in four partitions of 16384; shared
    memory by 128 bytes, with 1 KB more for the system.
    """
    if sm not in _LIMITS:
        raise ValueError(f"sm is {sm}: expected one of {', '.join(map(str, _LIMITS))}")
    if not (1 <= threads <= 1024 and 1 <= registers <= 255 and shared >= 0):
        raise ValueError(
            f"registers {registers}, threads {threads}, shared {shared}: expected 1 to 255, 1 to 1024, not negative"
        )
    most_warps, most_blocks, memory = _LIMITS[sm]
    warps = -(-threads // 32)
    by_registers = 16384 // (-(-registers * 32 // 256) * 256) * 4 // warps
    limits = {
        "registers": by_registers,
        "shared memory": memory // (-(-(shared + 1024) // 128) * 128),
        "warps": most_warps // warps,
        "blocks": most_blocks,
    }
    blocks = min(limits.values())
    return Occupancy(blocks, blocks * warps, most_warps, limits)


@functools.cache
def tool(name: str) -> str:
    """The path of one of NVIDIA's programs. FileNotFoundError where it is not installed."""
    packaged = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    path = str(packaged) if packaged.exists() else shutil.which(name)
    if not path:
        raise FileNotFoundError(f"{name} is not installed; the packages of ptx-emulator[sass] bring it")
    return path


def _run(*command: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{pathlib.Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()}")
    return done


@functools.lru_cache(maxsize=64)
def static_facts(ptx: str, kernel: str, sm: int = 80) -> StaticFacts:
    """Assembles one kernel of a PTX text for `sm`.

    Raises FileNotFoundError without the tools, RuntimeError with ptxas's words where it refuses the text.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin"
        pathlib.Path(source).write_text(ptx)
        flags = ["-v", "-lineinfo", f"-arch=sm_{sm}", "-e", kernel]
        said = _run(tool("ptxas"), *flags, source, "-o", binary).stderr
        listing = _run(tool("nvdisasm"), "-c", "-gp", binary).stdout

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found.group(1)) if found else 0

    # The kernel's own lines follow its name; functions that were not inlined have theirs.
    own = said[said.index(f"Function properties for {kernel}\n") :]
    own = own[: own.find("Function properties", 1)] if own.count("Function properties") > 1 else own
    opcodes, loops = _analyse(listing, kernel)
    return StaticFacts(
        kernel,
        sm,
        number(r"Used (\d+) registers", said),
        number(r"(\d+) bytes spill stores", own),
        number(r"(\d+) bytes spill loads", own),
        number(r"(\d+) bytes stack frame", own),
        number(r"(\d+) bytes smem", said),
        opcodes,
        loops,
    )


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*([A-Z][\w.]*)([^;]*);")


def _instructions(listing: str, kernel: str) -> tuple[list[tuple], dict[str, int]]:
    """A kernel's (address, guard, opcode, operands, line of PTX) in nvdisasm's listing, and its labels."""
    rows, labels, line, inside = [], {}, 0, False
    for text in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", text):
            inside = section.group(1) == kernel
        elif not inside:
            continue
        elif place := re.search(r'## File "\.nv_debug_ptx_txt[^"]*", line (\d+)', text):
            line = int(place.group(1))
        elif label := re.match(r"(\.L_x_\d+):", text):
            labels[label.group(1)] = len(rows)
        elif found := _INSTRUCTION.match(text):
            address, guard, opcode, rest = found.groups()
            rows.append((int(address, 16), guard, opcode.split(".")[0], rest + text[found.end() :], line))
    # Past the last exit lie a branch to itself and padding.
    while rows and rows[-1][2] == "NOP":
        rows.pop()
    if len(rows) > 1 and rows[-1][2] == "BRA" and labels.get(_target(rows[-1][3])) == len(rows) - 1:
        rows.pop()
    return rows, labels


def _successors(rows: list[tuple], labels: dict[str, int]) -> list[list[int]]:
    """The instructions that each may be followed by."""
    count = len(rows)
    after: list[list[int]] = [[] for _ in rows]
    for at, (_, guard, opcode, rest, _) in enumerate(rows):
        jumps = opcode in ("BRA", "BRX", "JMP", "JMX")
        if jumps:
            after[at] += [labels[name] for name in re.findall(r"\.L_x_\d+", rest) if labels.get(name, count) < count]
        conditional = guard or (opcode == "BRA" and re.match(r"\s*!?U?P\d", rest))
        if conditional or not (jumps or opcode in ("EXIT", "RET")):
            after[at] += [at + 1] if at + 1 < count else []
    return after


def _analyse(listing: str, kernel: str) -> tuple[dict[str, int], list[SassLoop]]:
    """Opcodes and natural loops of a kernel in nvdisasm's listing."""
    rows, labels = _instructions(listing, kernel)
    after = _successors(rows, labels)
    before: list[list[int]] = [[] for _ in rows]
    for at, targets in enumerate(after):
        for target in targets:
            before[target].append(at)

    bodies: dict[int, set[int]] = {}
    backs: dict[int, int] = {}
    for at, targets in enumerate(after):
        for header in targets:
            if header > at:
                continue
            # All that reaches the branch without its target; were the entry among it, the target would not dominate.
            body, stack = {header}, [at]
            while stack:
                node = stack.pop()
                if node not in body:
                    body.add(node)
                    stack += before[node]
            if 0 in body and header != 0:
                continue
            bodies.setdefault(header, set()).update(body)
            backs[header] = max(backs.get(header, 0), at)

    def opcodes(body) -> dict[str, int]:
        return dict(collections.Counter(rows[k][2] for k in body).most_common())

    loops = [
        SassLoop(
            rows[header][0],
            rows[backs[header]][0],
            sum(header in other for other in bodies.values()),
            opcodes(sorted(body)),
            dict(collections.Counter(rows[k][4] for k in sorted(body))),
        )
        for header, body in sorted(bodies.items())
    ]
    return opcodes(range(len(rows))), loops


def _target(operands: str) -> str:
    found = re.search(r"\.L_x_\d+", operands)
    return found.group(0) if found else ""


def join(launch: dict, ptx: str, sm: int = 80) -> dict:
    """The static facts of a launch's kernel beside its counts (`launch`: a row of `ptx_emulator.counts()`).

    Returns a dictionary: "facts", "occupancy", and "loops", which are pairs of a SassLoop and the launch's loop that
    most of its instructions come from, innermost (None: it comes from no loop of the PTX).
    """
    facts = static_facts(ptx, launch["kernel"], sm)
    block = launch["block"]
    fits = occupancy(
        facts.registers, block[0] * block[1] * block[2], facts.static_shared + launch["dynamic_shared"], sm
    )
    pairs = []
    for loop in facts.loops:
        inside = [
            row
            for row in launch["loops"]
            if 2 * sum(n for at, n in loop.lines.items() if row["line"] <= at <= row["last_line"]) > loop.instructions
        ]
        pairs.append((loop, min(inside, key=lambda row: row["last_line"] - row["line"], default=None)))
    return {"facts": facts, "occupancy": fits, "loops": pairs}


def _mix(opcodes: dict[str, int], most: int = 14) -> str:
    rows = list(opcodes.items())
    text = ", ".join(f"{name} {count}" for name, count in rows[:most])
    rest = sum(count for _, count in rows[most:])
    return text + (f", others {rest}" if rest else "")


def text(launch: dict, ptx: str, sm: int = 80) -> str:
    """`join` as lines of text."""
    joined = join(launch, ptx, sm)
    facts, fits = joined["facts"], joined["occupancy"]
    threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
    limits = ", ".join(f"{name} {count}" for name, count in fits.limits.items())
    lines = [
        f"static facts for sm_{sm}: {facts.registers} registers; spills {facts.spill_stores} bytes stored,"
        f" {facts.spill_loads} loaded; stack {facts.stack}; shared memory {facts.static_shared} static,"
        f" {launch['dynamic_shared']} dynamic",
        f"  occupancy: {fits.blocks} blocks of {threads} threads on a multiprocessor, {fits.warps} of"
        f" {fits.most_warps} warps (blocks by {limits})",
        f"  SASS: {sum(facts.opcodes.values())} instructions: {_mix(facts.opcodes)}",
    ]
    for loop, row in joined["loops"]:
        main = "main " if row and row["main"] and loop.tensor else ""
        lines.append(
            f"  {main}loop {loop.first:#06x} to {loop.last:#06x}, depth {loop.depth}: {loop.instructions} instructions:"
            f" {_mix(loop.opcodes)}"
        )
        if row is None or not row["trips"]:
            lines.append(
                f"    of PTX lines {min(loop.lines)} to {max(loop.lines)}" + ("" if row is None else ", not run")
            )
            continue
        classes = {name: count["issued"] / row["trips"] for name, count in row["classes"].items()}
        per_trip = ", ".join(f"{name} {count:.4g}" for name, count in sorted(classes.items(), key=lambda c: -c[1]))
        lines.append(
            f"    of PTX lines {row['line']} to {row['last_line']}: {row['trips']} warp trips of"
            f" {row['issued'] / row['trips']:.4g} instructions: {per_trip}"
        )
        if loop.tensor and row["main"]:
            ratio = loop.tensor / classes["tensor"]
            each = loop.instructions / loop.tensor
            lines.append(f"    {ratio:.4g} of these trips each; {each:.2f} instructions for a tensor-core one")
    return "\n".join(lines) + "\n"
