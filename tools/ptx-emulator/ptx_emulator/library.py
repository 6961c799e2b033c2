"""The emulator's shared library: where it is, and its C interface."""

import ctypes
import functools
import os
import pathlib

from . import __path__


class EmulatorError(RuntimeError):
    """PTX that cannot be loaded, or a kernel that failed; `code` is CUDA's error code (0 at load)."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


def library_path() -> pathlib.Path:
    """The folder with the emulator's libcudart.so.13: for LD_LIBRARY_PATH, to run any program on it.

    PTX_EMULATOR_PATH overrides the one that was installed. Raises FileNotFoundError where there is none.
    """
    if folder := os.environ.get("PTX_EMULATOR_PATH"):
        return pathlib.Path(folder)
    # An editable installation has two folders, of its Python files and of what was built.
    folders = [pathlib.Path(folder) / "lib" for folder in __path__]
    for folder in folders:
        if (folder / "libcudart.so.13").exists():
            return folder
    raise FileNotFoundError(
        f"no libcudart.so.13 in {' or '.join(map(str, folders))}; pip install ptx-emulator builds it"
    )


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulator's libcudart.so.13, loaded; it is the one that libraries which are loaded later get."""
    library = ctypes.CDLL(str(library_path() / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    library.ptx_emulator_load.restype = ctypes.c_void_p
    library.ptx_emulator_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.ptx_emulator_unload.argtypes = [ctypes.c_void_p]
    library.ptx_emulator_error.restype = ctypes.c_char_p
    library.ptx_emulator_kernels.restype = ctypes.c_char_p
    library.ptx_emulator_kernels.argtypes = [ctypes.c_void_p]
    library.ptx_emulator_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    library.ptx_emulator_launch.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.ptx_emulator_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
    library.ptx_emulator_unregister.argtypes = [ctypes.c_void_p]
    library.ptx_emulator_allocate.restype = ctypes.c_void_p
    library.ptx_emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
    library.ptx_emulator_free.argtypes = [ctypes.c_void_p]
    library.ptx_emulator_checks.argtypes = [ctypes.c_char_p]
    library.ptx_emulator_schedule.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.ptx_emulator_host_reads.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.ptx_emulator_expect_stream.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.ptx_emulator_counted_module.restype = ctypes.c_char_p
    library.ptx_emulator_counted_module.argtypes = [ctypes.c_size_t]
    library.ptx_emulator_findings.restype = library.ptx_emulator_counts.restype = ctypes.c_char_p
    return library


def message() -> str:
    """What the last failed call was about."""
    return runtime().ptx_emulator_error().decode(errors="replace")
