"""On PYTHONPATH: tsm_jit finds nothing that compiles for CUDA, wherever this machine has it."""

import sys


class _Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "tsm_jit._info":  # imported after _toolchain, before anything is looked for
            toolchain = sys.modules["tsm_jit._toolchain"]
            toolchain.find_nvcc = toolchain.find_nvrtc = lambda: None


sys.meta_path.insert(0, _Hide())
