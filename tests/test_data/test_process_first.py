"""Importing a file of data/ settles threads and memory before torch is loaded."""

import subprocess
import sys

import pytest

ORDER = """
import sys, importlib
asked = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "kernels.process"):
            asked.append(name)
sys.meta_path.insert(0, Finder())
importlib.import_module(sys.argv[1])
print(*asked)
"""


@pytest.mark.parametrize(
    "module",
    ["nanopersrm.train.exam", "nanopersrm.train.course", "nanopersrm.train.harvest", "train_sft"],
)
def test_process_comes_before_torch(module):
    words = [sys.executable, "-c", ORDER, module]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kernels.process", "torch"]
