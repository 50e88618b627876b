"""On PYTHONPATH: tsm_jit finds nothing that compiles for CUDA, wherever this machine has it."""

import sys


class _Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "tsm_jit._jit.spec":  # imported after tools, before anything is looked for
            tools = sys.modules["tsm_jit._jit.tools"]
            tools.find_nvcc = tools.find_nvrtc = lambda: None


sys.meta_path.insert(0, _Hide())
