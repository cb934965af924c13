"""The rooms: imports point upwards in the list that README.md shows, and nowhere else.

The list is the fenced block of the README that begins with "```rooms". The checker reads every
import statement, those inside functions too; what it cannot see is a module named by a string. It
is itself tested on small trees with one planted fault each.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nanopersrm", "kernels", "data")
MOST_LINES = 350
WITHOUT_TORCH = ("files", "text")
OPPONENTS = {"transformers", "peft", "trl"}  # oracles and opponents, never parts
MEETS_OPPONENTS = tuple(f"nanopersrm.{name}" for name in ("bench", "bench_peers", "bench_trl"))
MEETS_OPPONENTS += ("nanopersrm.gemma",)
BEFORE_TORCH = "kernels.process"  # settings that torch reads: a package's own file may import it


def rooms(root: Path) -> dict[str, list[str]]:
    """room -> its modules in order, as `nanopersrm.answer`, `kernels.rope` or `judge.py`."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```rooms\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, f"README.md: expected one ```rooms block, found {len(blocks)}"
    found: dict[str, list[str]] = {}
    for line in blocks[0].splitlines():
        room, words = line.split(":")
        assert room not in found or room == list(found)[-1], f"room {room} stands twice"
        names = [word if "." in word else f"nanopersrm.{word}" for word in words.split()]
        found[room] = found.get(room, []) + names  # a long room goes on in the next line
    return found


def modules(root: Path) -> dict[str, Path]:
    """Every file of the product by the name it has in the list; the packages' own files too."""
    found = {path.name: path for path in root.glob("*.py")}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[list[str]]:
    """What each import statement may mean, the most precise name first."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = "." * node.level + (node.module or "")
            yield from ([f"{above}.{alias.name}", above] for alias in node.names)


def faults(root: Path) -> list[str]:
    """Everything that breaks the order, one line each."""
    listed, files = rooms(root), modules(root)
    order = [name for names in listed.values() for name in names]
    room_of = {name: room for room, names in listed.items() for name in names}
    found = [f"{name} is listed twice" for name in room_of if order.count(name) > 1]
    found += [f"{name} is listed and missing" for name in room_of if name not in files]
    found += [f"{name} is not listed" for name in files if name not in [*order, *PACKAGES]]
    for name, path in files.items():
        for meanings in imports(path):
            top = meanings[0].split(".")[0]
            target = next((m for m in meanings if m in files), meanings[-1])
            if top == "":
                found.append(f"{name} uses a relative import")
            elif f"{top}.py" in files:
                found.append(f"{name} imports the script {top}.py")
            elif top in PACKAGES and name in PACKAGES and target != BEFORE_TORCH:
                found.append(f"the package {name} imports {target}")
            elif top == "nanopersrm" and name.startswith("kernels"):
                found.append(f"{name} imports {target}")
            elif top in PACKAGES and target not in ("nanopersrm", BEFORE_TORCH):
                above = order[: order.index(name)] if name in order else order
                if target not in above:
                    found.append(f"{name} imports {target}, which is not above it")
            elif top == "torch" and (name in PACKAGES or room_of.get(name) in WITHOUT_TORCH):
                found.append(f"{name} imports torch")
            elif top in OPPONENTS and name not in MEETS_OPPONENTS:
                found.append(f"{name} imports {top}")
    return found


def long_files(root: Path) -> list[str]:
    """Files of the product and of its tests that are too long to read at one sitting."""
    paths = [*modules(root).values(), *(root / "tests").rglob("*.py")]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path.name}: {n} lines" for path, n in counts.items() if n > MOST_LINES]


def test_imports_point_upwards():
    assert faults(ROOT) == []


def test_no_file_is_too_long():
    assert long_files(ROOT) == []


def test_the_text_side_comes_up_without_torch():
    names = [name for room in WITHOUT_TORCH for name in rooms(ROOT)[room]]
    assert len(names) > 5
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "print('no torch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("no torch", 0), done.stderr


# A tree in miniature: the list, and what each file imports.
LIST = """
```rooms
kernels: kernels.norm
kernels: kernels.rope
files: disk
text: words verdict
tensors: model
meeting: judge bench
data: data.pairs
scripts: run.py
```
"""
SOUND = {
    "nanopersrm/__init__.py": "import sys\n",
    "kernels/__init__.py": "",
    "data/__init__.py": "",
    "kernels/norm.py": "import torch\n",
    "kernels/rope.py": "import torch\nfrom kernels.norm import norm\n",
    "nanopersrm/disk.py": "from nanopersrm import InputError\n",
    "nanopersrm/words.py": "from nanopersrm.disk import read\n",
    "nanopersrm/verdict.py": "from nanopersrm import InputError, words\n",
    "nanopersrm/model.py": "import torch\nfrom kernels import rope\n",
    "nanopersrm/judge.py": "import nanopersrm.model\nfrom nanopersrm.verdict import parse\n",
    "nanopersrm/bench.py": "def run():\n    import transformers\n",
    "data/pairs.py": "from nanopersrm.words import split\n",
    "run.py": "from nanopersrm.judge import Judge\nimport data.pairs\n",
}


def plant(root: Path, changed: dict[str, str], listed: str = LIST) -> Path:
    for name, source in (SOUND | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    (root / "README.md").write_text(f"# Title\n{listed}\nThe end.\n", encoding="utf-8")
    return root


def test_a_sound_tree_has_no_faults(tmp_path):
    assert faults(plant(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("nanopersrm/words.py", "import nanopersrm.judge\n", "words imports nanopersrm.judge, "),
        ("nanopersrm/words.py", "from nanopersrm import verdict\n", "nanopersrm.verdict, which"),
        ("nanopersrm/words.py", "from nanopersrm.verdict import a\n", "nanopersrm.verdict, which"),
        ("nanopersrm/words.py", "from nanopersrm.words import a\n", "nanopersrm.words, which"),
        ("nanopersrm/words.py", "from nanopersrm.gone import a\n", "nanopersrm.gone, which"),
        ("nanopersrm/words.py", "def f():\n    import data.pairs\n", "data.pairs, which"),
        ("nanopersrm/words.py", "from . import disk\n", "uses a relative import"),
        ("nanopersrm/words.py", "from .disk import a\n", "uses a relative import"),
        ("nanopersrm/words.py", "from torch import Tensor\n", "nanopersrm.words imports torch"),
        ("nanopersrm/disk.py", "import torch.nn as nn\n", "nanopersrm.disk imports torch"),
        ("nanopersrm/disk.py", "import run\n", "imports the script run.py"),
        ("nanopersrm/model.py", "if 1:\n    import peft\n", "nanopersrm.model imports peft"),
        ("nanopersrm/judge.py", "from trl import A\n", "nanopersrm.judge imports trl"),
        ("run.py", "import transformers\n", "run.py imports transformers"),
        ("kernels/norm.py", "import kernels.rope\n", "kernels.norm imports kernels.rope, "),
        ("kernels/rope.py", "from nanopersrm import A\n", "kernels.rope imports nanopersrm"),
        ("kernels/__init__.py", "import torch\n", "kernels imports torch"),
        ("kernels/__init__.py", "import kernels.norm\n", "the package kernels imports"),
        ("nanopersrm/__init__.py", "from nanopersrm.disk import a\n", "the package nanopersrm"),
        ("nanopersrm/new.py", "", "nanopersrm.new is not listed"),
        ("nanopersrm/deep/er.py", "", "nanopersrm.deep.er is not listed"),
        ("other.py", "", "other.py is not listed"),
    ],
)
def test_a_planted_fault_is_found(name: str, source: str, fault: str, tmp_path: Path):
    found = faults(plant(tmp_path, {name: source}))
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("text: words", "text: gone words", "nanopersrm.gone is listed and missing"),
        ("text: words", "text: disk words", "nanopersrm.disk is listed twice"),
        ("text: words verdict", "text: verdict words", "verdict imports nanopersrm.words, which"),
    ],
)
def test_a_wrong_list_is_found(before: str, after: str, fault: str, tmp_path: Path):
    found = faults(plant(tmp_path, {}, LIST.replace(before, after)))
    assert len(found) == 1
    assert fault in found[0]


def test_a_missing_or_second_list_is_found(tmp_path):
    for listed in ("", LIST * 2, LIST.replace("```rooms", "```")):
        with pytest.raises(AssertionError, match="expected one"):
            rooms(plant(tmp_path, {}, listed))


def test_a_room_that_stands_in_two_places_is_found(tmp_path):
    twice = LIST.replace("scripts: run.py", "scripts: run.py\ntext: more")
    with pytest.raises(AssertionError, match="room text stands twice"):
        rooms(plant(tmp_path, {}, twice))


def test_a_long_file_is_found(tmp_path):
    plant(tmp_path, {"nanopersrm/words.py": "\n" * MOST_LINES, "tests/test_a.py": "\n" * 351})
    assert long_files(tmp_path) == ["test_a.py: 351 lines"]
