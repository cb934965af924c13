"""What training starts from: the base as a preset computes it, and what the result says of it.

    folder, made = named(adapter, base)              an adapter to go on from, and its judge.json
    model = load(base, how, device, seed, tiny)      16 bits, or NF4 with 16 bits around it
    adapters(folder, model, seed, twice)             the one that learns, and its frozen reference
    going_on(folder, model, said)                    the one that learns on
    instruments(folder, made, model, …)              its style adapter, and what its prompts show
    made_for(…)                                      the judge.json of what comes out

`--preset tiny` puts a small model of the base's vocabulary in its place: two random blocks of width
64, which learn nothing worth keeping and show in seconds that everything runs. No reply of a wholly
random one would ever parse, all rewards would be the lowest, and reinforcement would have nothing
to compare. So its embedding and head are made for one thing, a *chain*: what comes next follows
from the last token alone, by a table that leads through a reply,

    Very very very alike.</think><scores>A=7</scores>         any digit, any number of "very"

with a fork wherever a token stands twice: after ">" the score or the end. Each is as likely, so a
quarter of the replies about one candidate parse, and rewards differ by form, digit and length. It
cannot read: a judgement of it is chance, before training and after.
"""

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings, verdict
from nanopersrm.judge.adapter_settings import AdapterSettings, weights_sha256
from nanopersrm.model import lora_files, weights
from nanopersrm.model.bases import DEFAULT_BASE, Base
from nanopersrm.model.device import dtype_of
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.similarity import Style, StyleEvidenceFn, style_evidence_fn
from nanopersrm.train.presets import Preset

TINY = {  # sizes of the random model
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
# Its replies in pieces that are one token each of SmolLM2, so that few of them stand twice.
REPLY = ("Very", " very", " very", " alike", ".", "</", "think", "><", "scores", ">", "A", "=")
END = ("<", "/", "s", "cores", ">")
SURE = 5.0  # nats by which the next token of the chain is above all others together
RANDOM = "a random model"
SHOW = "--exemplar data/demo/zoe/1.txt --candidates data/demo/zoe/4.txt data/demo/beatrice/4.txt"


def is_random(preset: str | None, base: str) -> bool:
    """True where nobody has named a base for the preset tiny."""
    return preset == "tiny" and base == DEFAULT_BASE


def load(base: Base, how: Preset, device: torch.device, seed: int, tiny: bool) -> Model:
    """The base as it is trained on, frozen; `tiny`: a random model of its vocabulary."""
    dtype = dtype_of(how.dtype, device)
    if tiny:
        model = weights.random(base.config | TINY, dtype, device, how.nf4, seed)
        _chain(model, Tokenizer.load(base))
    else:
        model = weights.load(base, dtype, device, how.nf4, how.host_embedding)
    return model.train()


@torch.no_grad()
def _chain(model: Model, tokenizer: Tokenizer) -> None:
    """Have the head of a random model write replies: the state behind a token is near its own row
    of the embedding, which the head gives to the tokens that may come next."""

    def ids(*pieces: str) -> list[int]:
        return [one for piece in pieces for one in tokenizer.encode(piece)]

    start, end = ids(verdict.OPEN, *REPLY), ids(*END)
    table = {*pairwise(start[-len(ids(*REPLY)) - 1 :]), *pairwise(end)}
    table |= {(start[-1], digit) for digit in tokenizer.digit_ids}
    table |= {(digit, end[0]) for digit in tokenizer.digit_ids}
    table |= {(end[-1], one) for one in tokenizer.eos_ids}
    assert model.lm_head is not None, "expected a head of its own"
    rows = F.normalize(model.embed_tokens.float(), dim=-1)  # (V, D); states have length √D
    height = (math.log(model.config.V) + SURE) / math.sqrt(model.config.D)
    for last, after in sorted(table):
        model.lm_head.weight[after] += (height * rows[last]).to(model.lm_head.weight.dtype)


def made_for(
    said: str, base: Base, model: Model, tiny: bool, evidence: bool, form: str, style: bool
) -> AdapterSettings:
    """What an adapter says of itself; `said` is how the base was named."""
    kinds = {kind: name for name, kind in weights.DTYPES.items()}
    name = str(base.path) if Path(said).exists() else said  # found from any folder
    return AdapterSettings(
        base=RANDOM if tiny else name,
        base_sha256=weights_sha256(base),
        nf4=any(matrix.nf4 is not None for matrix in model.modules() if isinstance(matrix, Linear)),
        dtype=kinds[model.norm.weight.dtype],
        evidence=evidence,
        form=form,
        style=style,
    )


def named(adapter: str | Path | None, base: str) -> tuple[Path | None, AdapterSettings | None]:
    """The folder of the adapter to go on from, "default" being the one that comes with the base,
    and its judge.json where it has one; None: a new adapter."""
    folder = adapter_settings.resolve_adapter(adapter, base)
    if folder is None:
        if adapter is not None and str(adapter) == adapter_settings.DEFAULT:
            raise InputError(f"--adapter {adapter}: no adapter comes with the base {base}")
        return None, None
    return folder, adapter_settings.read(folder)


def said_by(
    folder: str | Path | None, default: Path, base: str
) -> tuple[Path, AdapterSettings | None]:
    """What `named` gives, of a run that cannot do without an adapter.

    None: the `default`, what train_sft.py leaves, or else the one that comes with the base.
    """
    if folder is None and not default.is_dir():
        folder = adapter_settings.resolve_adapter(adapter_settings.DEFAULT, base)
    if folder is None and not default.is_dir():
        raise InputError(
            f"expected a trained adapter in {default}, found none: run `python train_sft.py` "
            "first, or name another one with --adapter"
        )
    found, made = named(folder or default, base)
    if found is None:
        raise InputError(f"--adapter {folder}: expected an adapter to go on from, got none")
    return found, made


def unsaid(
    made: AdapterSettings | None, base: str, nf4: bool | None, dtype: str | None
) -> dict[str, Any]:
    """Settings of a run that nobody has said, from what its adapter was trained on."""
    if made is None:
        return {}
    return {
        "base": made.base if base == DEFAULT_BASE and made.base != RANDOM else base,
        "nf4": made.nf4 if nf4 is None else nf4,
        "dtype": dtype or (made.dtype if made.nf4 else None),
    }


def form_of(made: AdapterSettings | None) -> Literal["pointwise", "pairwise"]:
    """The form of prompts that reinforcement goes on with: one of two, of an adapter for both."""
    return "pairwise" if made is not None and made.form == "pairwise" else "pointwise"


def same_base(
    made: AdapterSettings | None, folder: Path | None, base: Base, tiny: bool
) -> str | None:
    """A note if the adapter may have been trained on another base, an error if it surely was."""
    if made is None or folder is None:
        return None
    if made.base == RANDOM and not tiny:
        raise InputError(
            f"{folder}: this adapter was trained on {RANDOM}: say --preset tiny, or name another "
            "one with --adapter"
        )
    if made.base != RANDOM and tiny:
        raise InputError(
            f"{folder}: this adapter was trained on {made.base}, and --preset tiny puts a random "
            "model in its place: name another preset, or leave --adapter out"
        )
    return None if tiny else made.same_base(folder, base)


def adapters(folder: Path | None, model: Model, seed: int, twice: bool) -> tuple[Lora, Lora | None]:
    """The adapter that learns, from its folder or new, and `twice`: the same once more, frozen."""

    def one() -> Lora:
        return Lora(model, LoraConfig(), seed) if folder is None else lora_files.load(folder, model)

    return one(), one().freeze() if twice else None


def going_on(folder: Path, model: Model, said: LoraConfig) -> Lora:
    """The adapter of a folder, to learn on. Where `said` is no default, it must be the same."""
    lora = lora_files.load(folder, model)
    for name, value in vars(said).items():
        kept = getattr(lora.config, name)
        if value not in (getattr(LoraConfig(), name), kept):
            raise InputError(
                f"--lora.{name}: {folder}, which is learned on, has {kept!r}, got {value!r}; leave "
                "it out"
            )
    return lora


def instruments(
    folder: Path | None,
    made: AdapterSettings | None,
    model: Model,
    tokenizer: Tokenizer,
    writers: Mapping[tuple[str, ...], str],
) -> tuple[Style | None, StyleEvidenceFn | None]:
    """The style adapter beside an adapter, and what it measures where the prompts show that.

    writers: see `similarity.py`.
    """
    if folder is None or not (folder / "style").is_dir():
        return None, None
    styled = Style.load(folder / "style", model)
    shows = bool(styled.quantiles) and (made is None or made.style)
    return styled, style_evidence_fn(tokenizer, styled, writers) if shows else None


def adapter_sha256(folder: Path | None) -> str | None:
    """Of the adapter that a run begins with: all that learning from it depends on.

    How sure it may be (`calibrate.py`) and what its README.md says can change without harm.
    """
    if folder is None:
        return None
    made = adapter_settings.read(folder)
    plain = None if made is None else replace(made, sharpness=1.0, sharpness_reasoned=1.0)
    sha = hashlib.sha256(repr(plain).encode())
    told = (adapter_settings.FILE, "README.md")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.relative_to(folder).as_posix() not in told:
            sha.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()


def to_judge_with(folder: Path, base: str, tiny: bool) -> str:
    """The last words of a run: the command that judges with what it has made."""
    if tiny:
        return "All of it runs. (A random model has nothing to judge with.)"
    other = ("--base", base) if base != DEFAULT_BASE else ()
    words = ["python", "judge.py", "--adapter", str(folder), *other, *SHOW.split()]
    return f"To judge with it:\n{shlex.join(words)}"
