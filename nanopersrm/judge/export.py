"""Merge a trained adapter into its base: a plain model folder for transformers and vLLM.

    python -m nanopersrm.judge.export --adapter runs/sft --out my-judge

    W' = W + scale · B A        in fp32, rounded once to --dtype, for every matrix with an adapter

W is the base *as it was trained on*. An adapter that learned beside weights in 4 bits has learned
to correct their rounding too, so its W is what those 4 bits stand for (as QLoRA's own authors
merge), and not the original: judge.json says which. An update smaller than half a step of the
16-bit format, 2^-9 of a weight in bf16, is rounded away.

What is written: config.json, generation_config.json, tokenizer.json, tokenizer_config.json with the
chat template, README.md and model.safetensors, in shards where it is above 5 GB. From a Hugging
Face folder all but the weights are copied; from a GGUF file they are made of what it says. All goes
to a temporary folder beside --out, renamed when it is complete.

What we left out: merging back into 4 bits, which rounds again; the style adapter, which is for
other prompts; replacing a folder that is there.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from nanopersrm import InputError, __version__
from nanopersrm.command import exit_code
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model import weights
from nanopersrm.model.base import Base, read_json, resolve
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import CONFIG_FILE, Lora, load_lora
from nanopersrm.model.tokenizer import PLAIN_TEMPLATE, Tokenizer, read_vocabulary
from nanopersrm.model.transformer import Model

SHARD_BYTES = 5_000_000_000  # of one file, as the hub likes it
TEXT_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
TEXT_FILES += ["merges.txt", "chat_template.*", "generation_config.json", "LICENSE*"]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# A judge of personal style

{base} with a LoRA adapter merged into it, written by nanopersrm {version}.

* Merged into {precision}.
* Adapter: rank {rank}, scale {scale:g}, on {count} matrices. Stored in {dtype}.

The licence is that of the base.
"""


@dataclass(frozen=True)
class Config:
    """What to merge and where to write it."""

    adapter: Path  # a run of train_sft.py, or a folder with adapter_config.json
    out: Path  # the folder to write: a new one, or an empty one
    base: str | None = None  # the base, if it now lies elsewhere than when it was trained on
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights written


def main(config: Config) -> None:
    """Read, merge, write, rename."""
    folder = adapter_folder(config.adapter.expanduser())
    made_for = adapter_settings.read(folder)
    out = config.out.expanduser().resolve()
    base = resolve(config.base or _base_name(folder, made_for), print)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new or empty folder")
    note = made_for.same_base(folder, base) if made_for else None
    if note:
        print(f"note: {note.replace('the scores may', 'the merged model may')}")
    dtype, nf4 = _trained_on(made_for, folder, config.dtype)
    precision = f"the {'dequantized NF4' if nf4 else dtype} weights of {base.name}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            part = Path(work) / "new"
            part.mkdir()
            print(f"reading {precision} and the adapter {folder}")
            _write_texts(part, base, config.dtype)  # refuses what it does not know, before the rest
            model = weights.load(base, weights.DTYPES[dtype], torch.device("cpu"), nf4)
            lora = load_lora(folder, model)
            card = CARD.format(
                base=base.name,
                version=__version__,
                precision=precision,
                rank=lora.config.rank,
                scale=lora.config.scale,
                count=len(lora.masters),
                dtype=config.dtype,
            )
            (part / "README.md").write_text(card, encoding="utf-8")
            tensors = dict(merged(model, lora, weights.DTYPES[config.dtype]))
            save_torch_state_dict(tensors, part, max_shard_size=SHARD_BYTES)
            os.replace(part, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{out}: cannot be written ({reason})") from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"merged into {precision}: {out}, {size / 1e9:.2f} GB in {config.dtype}")


def adapter_folder(path: Path) -> Path:
    """The folder with the adapter itself: `path`, or the one that a run keeps."""
    inside = path / "adapter"
    is_run = not (path / CONFIG_FILE).is_file() and (inside / CONFIG_FILE).is_file()
    return inside if is_run else path


def _base_name(folder: Path, made_for: AdapterSettings | None) -> str:
    """The base that the adapter names."""
    if made_for is not None:
        return made_for.base
    name = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / CONFIG_FILE} names no base: say --base")
    return name


def _trained_on(made_for: AdapterSettings | None, folder: Path, dtype: str) -> tuple[str, bool]:
    """The type of the base when it was trained on, and whether its matrices were in NF4."""
    if made_for is None:
        return dtype, False
    if made_for.dtype not in weights.DTYPES:
        raise InputError(
            f"{folder / adapter_settings.FILE}, field dtype: expected {', '.join(weights.DTYPES)}, "
            f"found {made_for.dtype!r}"
        )
    return made_for.dtype, made_for.nf4


def merged(model: Model, lora: Lora, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor) of each parameter, the adapter in it, in the model's order."""
    for name, parameter in model.named_parameters():
        owner, tensor = name.removesuffix(".weight"), parameter.detach()
        module = model.get_submodule(owner) if owner != name else None
        if isinstance(module, Linear):
            tensor = module.dense(torch.float32).detach()  # (out, in); in NF4 `parameter` is empty
            if owner in lora.masters:
                A, B = (master.detach() for master in lora.masters[owner])
                tensor = torch.addmm(tensor, B, A, alpha=lora.config.scale)
        tensor = tensor.to(dtype)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name}: too large for {dtype}; try --dtype bf16")
        yield _source_name(name), tensor


def _source_name(name: str) -> str:
    """ "layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj.weight" """
    if name == "lm_head.weight":
        return name
    return "model.embed_tokens.weight" if name == "embed_tokens" else f"model.{name}"


def _write_texts(folder: Path, base: Base, dtype: str) -> None:
    """Everything but the weights and the card."""
    tokenizer = Tokenizer.load(base)
    if base.kind == "safetensors":
        config = read_json(base.path / "config.json")
        for pattern in TEXT_FILES:
            for file in sorted(base.path.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        if read_vocabulary(base).template is None:  # it was trained with ours
            template = _plain_template(read_vocabulary(base).adds_bos)
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config = {**base.config, "hidden_act": "silu"}
        ends = config["eos_token_id"]
        config["eos_token_id"] = ends[0] if isinstance(ends, list) else ends
        _write_tokenizer(folder, base)
    config.setdefault("architectures", [CLASSES[config["model_type"]]])
    config.pop("dtype", None)
    config["torch_dtype"] = str(weights.DTYPES[dtype]).removeprefix("torch.")
    ends = base.config["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    generation: dict[str, Any] = {
        "eos_token_id": list(dict.fromkeys([*ends, *sorted(tokenizer.eos_ids)]))
    }
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id
    _write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").is_file():
        _write_json(folder / "generation_config.json", generation)


def _write_tokenizer(folder: Path, base: Base) -> None:
    """tokenizer.json and tokenizer_config.json from what a GGUF file says."""
    vocabulary, meta = read_vocabulary(base), base.reader().metadata
    backend, bos = vocabulary.backend, vocabulary.bos
    if vocabulary.adds_bos and bos is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    backend.save(str(folder / "tokenizer.json"))
    pad = meta.get("tokenizer.ggml.padding_token_id")
    words: dict[str, Any] = {
        "bos_token": bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.eos if pad is None else backend.id_to_token(pad),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # all of it is in tokenizer.json
        "model_max_length": base.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{key: word for key, word in words.items() if word is not None},
        "chat_template": vocabulary.template or _plain_template(vocabulary.adds_bos),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _plain_template(adds_bos: bool) -> str:
    """That of `tokenizer.py` for a base without one, for a reader that knows no `adds_bos`."""
    return PLAIN_TEMPLATE.replace("if adds_bos ", f"if {str(adds_bos).lower()} ")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; nothing was written"
    return exit_code("nanopersrm.judge.export", lambda: main(config), ended)


if __name__ == "__main__":
    about = __doc__.split("    W' =")[0]
    sys.exit(run(tyro.cli(Config, prog="nanopersrm.judge.export", description=about)))
