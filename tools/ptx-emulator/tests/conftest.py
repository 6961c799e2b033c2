import os
import shutil
import subprocess

import pytest

import ptx_emulator

pytest.register_assert_rewrite("checked_kernels", "instruction_values")

os.environ.setdefault("PTX_EMULATOR_DEADLOCK_SECONDS", "1")


@pytest.fixture(scope="session", autouse=True)
def device():

    try:
        return ptx_emulator.library_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def nvcc():
    """Runs nvcc; sanitizers are preloaded for the device, not for the compiler."""
    path = shutil.which("nvcc")
    if not path:
        pytest.skip("nvcc is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return lambda *arguments: subprocess.run([path, *map(str, arguments)], check=True, env=environment)


@pytest.fixture(scope="session")
def run_cuda(nvcc, tmp_path_factory):
    """Compiles a CUDA program with nvcc and runs it on the PTX emulator."""
    import ptx_emulator

    folder = tmp_path_factory.mktemp("cuda")

    def run(source, *arguments: str, flags=("-arch=sm_80",), environment=None, check=True):
        name = f"p{len(list(folder.iterdir()))}"
        file = source
        if isinstance(source, str):
            file = folder / f"{name}.cu"
            file.write_text(source)
        nvcc(*flags, "-std=c++17", "-cudart", "shared", "-o", folder / name, file)
        return execute(folder / name, *arguments, environment=environment, check=check)

    def execute(program, *arguments, environment=None, check=True):
        env = dict(os.environ, LD_LIBRARY_PATH=str(ptx_emulator.library_path()), **(environment or {}))
        done = subprocess.run([str(program), *arguments], env=env, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    run.execute = execute
    return run


@pytest.fixture
def checked(monkeypatch):
    """Launches with every check."""
    monkeypatch.setenv("PTX_EMULATOR_QUIET", "1")
    ptx_emulator.checks("all")
    yield
    ptx_emulator.checks()
    ptx_emulator.schedule()
    ptx_emulator.clear()


@pytest.fixture
def hopper():
    """The device is an sm_90."""
    ptx_emulator.device(90)
    yield
    ptx_emulator.device(80)
