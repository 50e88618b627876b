"""On PYTHONPATH: tsm_jit finds no CUDA toolkit, wherever this machine has one."""

import sys


class _HideNvcc:
    def find_spec(self, name, path=None, target=None):
        if name == "tsm_jit._info":  # imported after _toolchain, before anything is looked for
            sys.modules["tsm_jit._toolchain"].find_nvcc = lambda: None


sys.meta_path.insert(0, _HideNvcc())
