"""pip's way to CMakeLists.txt: configures it, builds it with Ninja, and installs the libraries into pop_ext/."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        source = Path(__file__).resolve().parent
        build = Path(os.environ.get("POP_BUILD_DIR") or self.build_temp).resolve()  # a lasting one spares recompiling
        prefix = Path(self.get_ext_fullpath(extension.name)).resolve().parents[1]
        # cmake and ninja as installed beside this Python, where the environment is not activated
        environment = os.environ | {"PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]}
        arguments = [f"-DPython_EXECUTABLE={sys.executable}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        for command in (
            ["cmake", "--fresh", "-S", source, "-B", build, "-G", "Ninja", *arguments],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", prefix],
        ):
            subprocess.run(command, check=True, env=environment)


# setup_requires: CUTLASS's headers, for pip's own build environment, where there is a compiler for the CUDA kernels.
setup(
    setup_requires=["nvidia-cutlass==4.2.0.0"] if shutil.which("nvcc") else [],
    ext_modules=[Extension("pop_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
