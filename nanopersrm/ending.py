"""What a run leaves: the adapter as it ended, and as it was when it judged best.

    RUN/adapter    after the last step
    RUN/best       after the step whose trial went best, where that was an earlier one

Both are folders that `judge.py --adapter` takes. A trial asks few pairs, and the best of several is
partly the luckiest: measure both with `evaluate.py`, on other pairs, before one is believed.

The best is that of the checkpoints in RUN/checkpoints, which keep the last few and the best one;
of equal ones the later. What we left out: stopping a run when it gets worse. Where to read next:
`checkpoint.py`.
"""

import shutil
from pathlib import Path

from nanopersrm import checkpoint
from nanopersrm.lora import Lora
from nanopersrm.style import Style
from nanopersrm.trained import Trained
from nanopersrm.training import named, save_adapter


def save(
    out: Path, phase: str, steps: int, made_for: Trained, lora: Lora, style: Style | None
) -> str:
    """Write RUN/adapter, and RUN/best where an earlier step than the last of `steps` judged better;
    a line about that, or "". The adapter is as it was best then."""
    save_adapter(out / "adapter", made_for, lora, style)
    found = checkpoint.best(out / "checkpoints")
    if found is None or found.step == steps or found.facts["phase"] != phase:
        shutil.rmtree(out / "best", ignore_errors=True)  # of a run that was thrown away
        return ""
    lora.load_tensors(named(found.tensors, phase))
    save_adapter(out / "best", made_for, lora, style)
    right = found.facts["score"]
    return f"{out / 'best'} is the adapter of step {found.step}, which judged best: {right:.1%}\n"
