"""Imports point one way, and text is read without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_contract_of_pyproject_holds():
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    linted = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


TEXT = ["judge.prompts", "judge.tell", "style.ledger", "pairs", "model.tokenizer", "model.base"]


@pytest.mark.parametrize("module", ["judge", *(f"nanopersrm.{name}" for name in TEXT)])
def test_text_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert imported.returncode == 0, imported.stderr
