"""An engine of bench/engines.py in a process of its own, and how busy the machine was meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bench.engines import THREADS

ROOT = Path(__file__).resolve().parent.parent
QUIET = 0.1  # processors that others may use during an undisturbed sample


class EngineError(RuntimeError):
    pass


def busy_seconds() -> float:
    """Processor time that was not idle since the machine started, of all processors; taken by its host included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, file.readline().split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


class Worker:
    """An engine's process. Waits for commands without using a processor."""

    def __init__(self, engine: str, model: str, options: dict, python: str, environment: dict):
        self.name = engine
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        command = [python, str(ROOT / "bench" / "engines.py"), engine, model, json.dumps(options)]
        # torch's own compile cache spares later runs the minutes of compiling
        defaults = {"OMP_NUM_THREADS": str(THREADS), "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor")}
        defaults["POP_BENCH_PARENT"] = str(os.getpid())  # the worker ends with this process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | defaults | environment,
        )

    def run(self, **command) -> dict:
        """The answer, and `other_load`: processors that were busy with something else meanwhile."""
        start, busy = time.perf_counter(), busy_seconds()
        answer = self._run(command)
        busy = busy_seconds() - busy - answer["cpu_seconds"]
        return answer | {"other_load": max(0.0, busy / (time.perf_counter() - start))}

    def patient_run(self, patience: float, **command) -> dict:
        """The quietest sample of `patience` seconds: waits for a quiet machine, and repeats what others disturbed."""
        end, quietest = time.perf_counter() + patience, None
        while quietest is None or (quietest["other_load"] > QUIET and time.perf_counter() < end):
            loaded = True
            while loaded and time.perf_counter() < end:
                busy = busy_seconds()
                time.sleep(0.2)
                loaded = busy_seconds() - busy > 0.2 * QUIET
            answer = self.run(**command)
            if quietest is None or answer["other_load"] < quietest["other_load"]:
                quietest = answer
        return quietest

    def _run(self, command: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise EngineError(f"{self.name} ended with status {self.process.returncode}:\n{self.log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
