"""What a run leaves: the adapter as it ended, and as it was when it judged best.

    RUN/adapter    after the last step
    RUN/best       after the step whose trial went best, where that was an earlier one

Both are folders that `judge.py --adapter` takes. A trial asks few pairs, at once and one text a
prompt, and the best of several is partly the luckiest: measure both with `evaluate.py`, on other
pairs, before one is believed.

The best is that of the checkpoints in RUN/checkpoints, which keep the last few and the best one;
of equal ones the later. Where no trial was better than the one before training there is none, and
something else by the name RUN/best is left alone.

`said_of_untaught` says at the end which steps of reinforcement taught nothing. What we left out:
stopping a run when it gets worse.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nanopersrm import InputError
from nanopersrm.files import reason
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model.lora import Lora
from nanopersrm.style.similarity import Style
from nanopersrm.train import checkpoint
from nanopersrm.train.training import named, save_adapter

LAST, MOSTLY = 8, 0.75  # steps at the end of a run, and a share of groups worth a warning
MINE = {"adapter_config.json", "adapter_model.safetensors", "judge.json", "style"}


def save(
    out: Path, phase: str, steps: int, made_for: AdapterSettings, lora: Lora, style: Style | None
) -> str:
    """Write RUN/adapter, and RUN/best where an earlier step than the last of `steps` judged better;
    a line about that, or "". The adapter is as it was best then."""
    best = out / "best"
    try:
        found = checkpoint.best(out / "checkpoints")
    except InputError as error:
        save_adapter(out / "adapter", made_for, lora, style)
        return f"no earlier step is looked at: {error}\n"
    try:
        mine = best.is_dir() and {path.name for path in best.iterdir()} <= MINE
        if mine:  # of a run that was thrown away
            shutil.rmtree(best)
    except OSError as error:
        raise InputError(f"{best}: cannot be removed ({reason(error)})") from error
    save_adapter(out / "adapter", made_for, lora, style)
    if found is None or found.step == steps or found.facts["phase"] != phase:
        return ""
    right, before = found.facts["score"], found.facts["trials"][0]
    if before["pairs"] and before["accuracy"] >= right:
        return f"no trial went better than the one before training; the best was {right:.1%}\n"
    said = f"the adapter of step {found.step}, whose trial went best ({right:.1%} at once)"
    if best.exists():
        return f"{best} holds other files, so it is left alone and not made {said}\n"
    lora.load_tensors(named(found.tensors, phase))
    save_adapter(best, made_for, lora, style)
    return f"{best} is {said}\n"


def said_of_untaught(lines: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Lines about what metrics.jsonl shows to have taught nothing, with advice; or ""."""
    return _said_of_flat(lines, steps) + _said_of_unanimous(lines[-LAST:])


def _said_of_unanimous(lines: Sequence[Mapping[str, Any]]) -> str:
    alike = [line["unanimous"] for line in lines if line.get("flat") != 1 and "unanimous" in line]
    if not alike or fmean(alike) < MOSTLY:
        return ""
    return (
        f"in {fmean(alike):.0%} of the groups of the last steps all replies had the same order, "
        "which then teaches nothing; what can help: a higher --temperature, a lower --optim.lr, "
        "more --plans a step, --group-by plan\n"
    )


def _said_of_flat(lines: Sequence[Mapping[str, Any]], steps: int) -> str:
    flat = [line for line in lines if line.get("flat") == 1]
    if not flat:
        return ""
    said = f"{len(flat)} of {steps} steps taught nothing: no reply did better than its group"
    if not any(line["formed"] for line in lines):
        return f"{said}, since none was well formed; teach the form first, with train_sft.py\n"
    more = "--resample 2, a larger --group or --temperature, --group-by plan, --grpo.variant gdpo"
    more += " (not with --reward.expected)"
    return f"{said}; what can help: {more}\n"
