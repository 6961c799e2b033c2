"""The README's commands and code run as printed."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_commands_and_code(nvcc, tmp_path):
    (program,) = blocks("cuda")
    (tmp_path / "saxpy.cu").write_text(program)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PATH": path}
    outputs = []
    for block in blocks("console"):
        command, expected = None, ""
        for line in [*block.splitlines(), "$ "]:
            if not line.startswith("$ "):
                expected += line + "\n"
                continue
            if command:
                done = subprocess.run(
                    ["bash", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
                )
                assert done.returncode == 0, done.stderr
                assert not expected or done.stdout == expected
                outputs.append(done.stdout)
            command, expected = line[2:], ""
    assert outputs[1] == "1999\n" and "kernel saxpy" in outputs[2], outputs
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("python"))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "saxpy" in done.stdout and "global:" in done.stdout
