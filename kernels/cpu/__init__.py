"""The CPU's own kernels: C++ that is compiled once for the machine, and what PyTorch does where that is not possible.

``library()`` compiles the files of ``source`` with the machine's C++ compiler (``$CXX``, else ``c++``, ``g++`` or
``clang++``) for the machine's own instruction set when a kernel is first wanted, and keeps the result in the cache
folder. Without a compiler, or with ``OCTO_RUN_CPU_KERNELS=0``, it is None: then the PyTorch references run.
"""

from octo_run.kernels.cpu.native import KernelError, build, failure, library, on_compile, path_name

__all__ = ["KernelError", "build", "failure", "library", "on_compile", "path_name"]
