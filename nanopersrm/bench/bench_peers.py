"""transformers + PEFT in training, for `bench_train.py`; and the yardstick for all sides.

Imports nothing of ours, so that a process which runs this file by its path lives as those of the
people who use transformers: our package would settle threads and memory for it
(`kernels/process.py`).

The texts of a step (ids, and where the reply begins) become micro-batches in three ways:

    padded   texts in the data's order, filled up on the right to the longest; the attention mask
             and labels of -100 leave the filling out
    packed   texts end to end in one row; positions that start again tell transformers where a text
             begins. With flash-attn no masked product is computed; with PyTorch's own attention
             the mask of the row is whole, N x N, and most of it is zero
    single   a text at a time: no filling and no mask. The fastest of the three on a CPU, where one
             text is enough to keep the cores busy

The adapter computes in one of three ways: in fp32, as PEFT makes it by default for a base in 16
bits; under autocast, as `Trainer(bf16=True)` adds, where its masters stay in fp32 and its products
are in bf16, as ours are; or with everything in bf16, which rounds what is learned.

transformers computes the logits of every row, in fp32. It can be told to compute those of the reply
only, which few people know; "-reply" does that.

In 4 bits (bitsandbytes' NF4), PEFT's `prepare_model_for_kbit_training` turns whatever is not in 4
bits into fp32, embedding and head included. The ways in bf16 leave that out, as kindness.

Peak memory is what a process (CPU: all its pages in memory; GPU: tensors) came to at most after the
model was loaded and had read a few tokens, for which every weight is touched once.
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label that transformers' loss leaves out
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Way:
    """One way to train with PEFT."""

    batches: str  # padded, packed or single
    adapter: str  # fp32, autocast or 16bit
    reply: bool = False  # logits of the reply only


WAYS = {
    "peft-padded": Way("padded", "fp32"),
    "peft-padded-autocast": Way("padded", "autocast"),
    "peft-padded-16bit": Way("padded", "16bit"),
    "peft-packed": Way("packed", "fp32"),
    "peft-packed-autocast": Way("packed", "autocast"),
    "peft-packed-16bit": Way("packed", "16bit"),
    "peft-packed-16bit-reply": Way("packed", "16bit", True),
    "peft-single": Way("single", "fp32"),
    "peft-single-autocast": Way("single", "autocast"),
    "peft-single-16bit": Way("single", "16bit"),
    "peft-single-16bit-reply": Way("single", "16bit", True),
}


class Peer:
    """An adapter in training. `shared` holds the bases of several of them in one process."""

    def __init__(self, job: dict[str, Any], name: str, shared: dict[bool, Any]):
        """job: base and adapter (folders), device, dtype, nf4, recompute, lr."""
        import peft

        self.name, self.way, self.device = name, WAYS[name], torch.device(job["device"])
        prepared = bool(job["nf4"]) and self.way.adapter != "16bit"
        if prepared in shared:
            shared[prepared].load_adapter(job["adapter"], name, is_trainable=True)
        else:
            base = load(job, prepared)
            shared[prepared] = peft.PeftModel.from_pretrained(
                base, job["adapter"], name, is_trainable=True
            )
        self.model = shared[prepared]
        own = [p for n, p in self.model.named_parameters() if f".{name}." in n]
        for p in own:
            p.data = p.data.to(
                DTYPES[job["dtype"]] if self.way.adapter == "16bit" else torch.float32
            )
        self.optimizer = torch.optim.AdamW(own, job["lr"], weight_decay=0.0, fused=True)

    def step(self, step: dict[str, Any]) -> float:
        """One step on its texts -> the mean loss of a reply token."""
        self.model.set_adapter(self.name)
        self.model.train()
        texts = step["texts"]
        assert all(first for _, first in texts), "no text before it may predict a reply"
        count = sum(len(ids) - first for ids, first in texts)
        places = step.get(self.way.batches) or [[i] for i in range(len(texts))]
        total = torch.zeros((), device=self.device)
        mixed = torch.autocast(self.device.type, torch.bfloat16)
        for some in places:
            with mixed if self.way.adapter == "autocast" else nullcontext():
                inputs = self.inputs([texts[i] for i in some])
                loss = self.model(**inputs, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def inputs(self, texts: list[tuple[list[int], int]]) -> dict[str, Any]:
        """What transformers' model takes: rows of B texts, or one row of N tokens."""
        labels = [[IGNORED] * first + ids[first:] for ids, first in texts]
        if self.way.batches == "padded":
            masks = [[1] * len(ids) for ids, _ in texts]
            return {
                "input_ids": self.padded([ids for ids, _ in texts], 0),
                "attention_mask": self.padded(masks, 0),
                "labels": self.padded(labels, IGNORED),
            }  # (B, longest)
        inputs = {"input_ids": self.joined([ids for ids, _ in texts])}  # (1, N)
        if self.way.batches == "packed":
            inputs["position_ids"] = self.joined([range(len(ids)) for ids, _ in texts])
        flat = self.joined(labels)
        if not self.way.reply:
            return inputs | {"labels": flat}
        rows = (flat[0, 1:] != IGNORED).nonzero()[:, 0]  # (M,) each predicts the token after it
        targets = flat[:, 1:][:, rows]  # (1, M)
        return inputs | {"labels": targets, "shift_labels": targets, "logits_to_keep": rows}

    def padded(self, rows: list[list[int]], filling: int) -> Tensor:
        """Rows of ids -> (B, longest)"""
        tensors = [torch.tensor(row, device=self.device) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=filling)

    def joined(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids -> (1, N)"""
        return torch.tensor([[i for row in rows for i in row]], device=self.device)


def load(job: dict[str, Any], prepared: bool) -> Any:
    """The base in transformers, without an adapter."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype, device = DTYPES[job["dtype"]], torch.device(job["device"])
    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    options: dict[str, Any] = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    if job["nf4"]:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=dtype, device_map={"": str(device)}, **options
    )
    model.config.use_cache = False  # a cache would also hide the borders of packed texts
    again = {"use_reentrant": False}
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, job["recompute"], again)
    elif job["recompute"]:
        model.gradient_checkpointing_enable(again)
        model.enable_input_require_grads()
    model.train()  # for inference on a CPU, bitsandbytes would round its scales
    with torch.no_grad():
        model(input_ids=torch.arange(8, device=device)[None])
    return model


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> int:
    """Bytes in use; what comes to be used at most is counted from here on. CPU: Linux, glibc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free is not in use
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(side: Any, steps: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Train for these steps -> losses, seconds of each, bytes before and at the peak."""
    loaded = start_peak(device)
    losses, seconds = [], []
    for step in steps:
        start = now(device)
        losses.append(side.step(step))
        seconds.append(now(device) - start)
    found = {"losses": losses, "seconds": seconds, "loaded": loaded, "peak": peak(device)}
    if device.type == "cuda":  # with the gaps between tensors
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found


if (
    __name__ == "__main__"
):  # python THIS FOLDER SIDE: train on FOLDER/job.json, write FOLDER/SIDE.json
    folder, name = Path(sys.argv[1]), sys.argv[2]
    asked = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    found = measure(Peer(asked, name, {}), asked["steps"], torch.device(asked["device"]))
    (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
