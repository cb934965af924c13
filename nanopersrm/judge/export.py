"""Merge a trained adapter into its base: a plain model folder for transformers and vLLM.

    python -m nanopersrm.judge.export --adapter runs/sft --out my-judge

    W' = W + scale · B A        in fp32, rounded once to --dtype, for every matrix with an adapter

W is the base *as it was trained on*. An adapter that learned beside weights in 4 bits has learned
to correct their rounding too, so its W is what those 4 bits stand for, and not the original:
judge.json says which. An update smaller than half a step of the 16-bit format is rounded away.

From a Hugging Face folder all but the weights is copied; from a GGUF file it is made of what it
says. All goes to a temporary folder beside --out, renamed when it is complete.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.command import exit_code
from nanopersrm.files import reason, write_json
from nanopersrm.judge import adapter_settings
from nanopersrm.model import weights
from nanopersrm.model.base import Base, read_json, resolve
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import CONFIG_FILE, Lora, load_lora
from nanopersrm.model.tokenizer import PLAIN_TEMPLATE, Tokenizer, Vocabulary, read_vocabulary
from nanopersrm.model.transformer import Model

SHARD_BYTES = 5_000_000_000  # of one file, as the hub likes it
TEXT_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
TEXT_FILES += ["merges.txt", "chat_template.*", "generation_config.json", "LICENSE*"]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Config:
    """What to merge and where to write it."""

    adapter: Path  # a run of train_sft.py, or a folder with adapter_config.json
    out: Path  # the folder to write: a new one, or an empty one
    base: str | None = None  # the base, if it now lies elsewhere than when it was trained on
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights written


def main(config: Config) -> None:
    """Read, merge, write, rename."""
    folder = config.adapter.expanduser()
    if (folder / "adapter" / CONFIG_FILE).is_file():  # a run keeps it there
        folder /= "adapter"
    made_for, out = adapter_settings.read(folder), config.out.expanduser().resolve()
    if made_for is None:
        raise InputError(f"{folder}: expected {adapter_settings.FILE} beside the adapter")
    base = resolve(config.base or made_for.base, print)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new or empty folder")
    dtype, nf4 = made_for.dtype, made_for.nf4
    if note := made_for.same_base(folder, base):
        print(f"note: {note}")
    if dtype not in weights.DTYPES:
        raise InputError(f"{folder}: expected a dtype of {', '.join(weights.DTYPES)}, got {dtype}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            part = Path(work) / "new"
            part.mkdir()
            _write_texts(part, base, config.dtype)  # refuses what it does not know, before the rest
            model = weights.load(base, weights.DTYPES[dtype], torch.device("cpu"), nf4)
            tensors = merged(model, load_lora(folder, model), weights.DTYPES[config.dtype])
            save_torch_state_dict(tensors, part, max_shard_size=SHARD_BYTES)
            os.replace(part, out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: cannot be written ({reason(error)})") from error
    precision = f"the {'dequantized NF4' if nf4 else dtype} weights of {base.name}"
    print(f"merged into {precision}: {out}, in {config.dtype}")


def merged(model: Model, lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hugging Face's name -> each parameter, the adapter in it, in the model's order."""
    tensors = {}
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
        source = "embed_tokens.weight" if name == "embed_tokens" else name
        tensors[source if name == "lm_head.weight" else f"model.{source}"] = tensor
    return tensors


def _write_texts(folder: Path, base: Base, dtype: str) -> None:
    """Everything but the weights."""
    tokenizer, vocabulary = Tokenizer.load(base), read_vocabulary(base)
    template = vocabulary.template or PLAIN_TEMPLATE.replace(
        "if adds_bos ", f"if {str(vocabulary.adds_bos).lower()} "
    )
    config = dict(base.config)
    ends = config["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if base.kind == "safetensors":
        config = read_json(base.path / "config.json")
        for file in (file for pattern in TEXT_FILES for file in sorted(base.path.glob(pattern))):
            shutil.copyfile(file, folder / file.name)
        if vocabulary.template is None:  # it was trained with ours
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config |= {"hidden_act": "silu", "eos_token_id": ends[0] if ends else None}
        _write_tokenizer(folder, base, vocabulary, template)
    config.setdefault("architectures", [CLASSES[config["model_type"]]])
    config.pop("dtype", None)
    config["torch_dtype"] = str(weights.DTYPES[dtype]).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").is_file():
        ids = list(dict.fromkeys([*ends, *sorted(tokenizer.eos_ids)]))
        generation = {"eos_token_id": ids, "bos_token_id": tokenizer.bos_id}
        write_json(folder / "generation_config.json", generation)


def _write_tokenizer(folder: Path, base: Base, vocabulary: Vocabulary, template: str) -> None:
    """tokenizer.json and tokenizer_config.json from what a GGUF file says."""
    backend, bos = vocabulary.backend, vocabulary.bos
    if vocabulary.adds_bos and bos is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    backend.save(str(folder / "tokenizer.json"))
    pad = base.reader.metadata.get("tokenizer.ggml.padding_token_id")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # all of it is in tokenizer.json
        "model_max_length": base.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.eos if pad is None else backend.id_to_token(pad),
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def run(config: Config) -> int:
    """`main` with an exit code."""
    ended = "interrupted; nothing was written"
    return exit_code("nanopersrm.judge.export", lambda: main(config), ended)


if __name__ == "__main__":
    about = __doc__.split("    W' =")[0]
    sys.exit(run(tyro.cli(Config, prog="python -m nanopersrm.judge.export", description=about)))
