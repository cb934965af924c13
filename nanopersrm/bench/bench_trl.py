"""TRL's GRPOTrainer with PEFT, for `bench_rft.py`.

Imports nothing of ours but the clock, `bench_turns.py`, so that a process of this side lives as
those of the people who use TRL: our package would settle threads and memory for it
(`kernels/process.py`).

    trl          as it comes: blocks are computed again in the backward (gradient checkpointing)
    trl-reply    without Triton, that is on a CPU, TRL's head scores all tokens, those of the prompt
                 too; here those of the reply only, as on a GPU. No option does that: see `trainer`
    trl-fast     as trl-reply, everything kept, and freed memory stays with the process, as in ours

What all have. The base in bf16, although TRL would load it in fp32 where nobody says otherwise;
the adapter in fp32 under autocast to bf16, as PEFT and `bf16=True` make it; PyTorch's fused
attention; with NF4 the adapter in bf16, as TRL makes it. Replies come from transformers' `generate`
with a cache of keys and values; one batch of G rows is drawn and trained at once, with the loss of
GRPO, no reference, a constant learning rate and AdamW, all options of TRL. Nothing is logged or
saved. A smallest number of new tokens, equal to the largest, keeps replies from ending.

Prompts are ids, and TRL takes text. So there is a tokenizer whose words are numbers: "17 4 99" is
[17, 4, 99], and back.

Where a step divides. TRL calls the reward when the replies are there: up to the end of that call it
draws, from then on it trains. Ours is measured in the same places. Rows are what goes through the
embedding: drawing with a cache takes G · P + G · (R - 1) of them, without one several times that;
training takes G · (P + R), and with checkpointing most of the work of the forward twice.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanopersrm.bench.bench_peers import DTYPES, start_peak
from nanopersrm.bench.bench_turns import Turns, own_turns

SIDES = ("trl", "trl-reply", "trl-fast")
END = "<end>"  # the last id of the vocabulary
CLIP = 1.0  # longest gradient, TRL's default and ours


def text(ids: Sequence[int]) -> str:
    """[17, 4, 99] -> "17 4 99" """
    return " ".join(map(str, ids))


def number_tokenizer(V: int) -> Any:
    """Words are numbers, and these are their ids; the last id ends a text, and fills."""
    import tokenizers
    import transformers

    words = {str(i): i for i in range(V - 1)} | {END: V - 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=END))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=END, padding_side="left"
    )


def load(job: dict[str, Any]) -> Any:
    """The base in transformers, each weight touched once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype, device = DTYPES[job["dtype"]], torch.device(job["device"])
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
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
    model.train()  # for inference on a CPU, bitsandbytes would round its scales
    with torch.no_grad():
        model(input_ids=torch.arange(8, device=device)[None], use_cache=False)
    return model


def trainer(job: dict[str, Any], name: str, base: Any, turns: Turns, folder: Path) -> Any:
    """TRL's trainer, whose steps wait for their turns.

    job: adapter (folder), device, dtype, lr, seed, prompts (a list of ids for each step), group,
    reply.
    """
    import datasets
    import peft
    import transformers
    import trl

    G, R, prompts = job["group"], job["reply"], job["prompts"]
    cpu = torch.device(job["device"]).type == "cpu"

    class InTurn(transformers.TrainerCallback):
        """Begins and ends a step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done()

    def rewarded(completion_ids: list[list[int]], **_: Any) -> Any:
        return turns.drawn(completion_ids)

    options = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=cpu,
        bf16=job["dtype"] == "bf16",
        gradient_checkpointing=name != "trl-fast",
        max_steps=len(prompts),
        per_device_train_batch_size=G,
        num_generations=G,
        shuffle_dataset=False,
        max_completion_length=R,
        generation_kwargs={"min_new_tokens": R},
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        seed=job["seed"],
        dataloader_pin_memory=not cpu,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if name != "trl":  # read nowhere else in that file: may tiles have as many rows as there are?
        assert hasattr(trl.trainer.utils, "_use_triton"), f"trl {trl.__version__}: another head"
        setattr(trl.trainer.utils, "_use_triton", lambda device: True)  # noqa: B010
    base.get_input_embeddings().register_forward_pre_hook(lambda _, args: turns.count(args[0]))
    made = trl.GRPOTrainer(
        peft.PeftModel.from_pretrained(base, job["adapter"], is_trainable=True),
        rewarded,
        options,
        datasets.Dataset.from_list([{"prompt": text(ids)} for ids in prompts]),
        processing_class=number_tokenizer(base.config.vocab_size),
        callbacks=[InTurn()],
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def alone(folder: str, name: str) -> None:
    """In a process of its own: train on FOLDER/job.json, a step whenever a line comes."""
    import trl  # noqa: F401  (before memory is measured)

    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    turns = own_turns(device)
    base = load(job)
    loaded = start_peak(device)
    made = trainer(job, name, base, turns, Path(folder) / name)
    turns.say({"loaded": loaded})
    made.train()
    named = dict(made.model.named_parameters())
    learned = {name: part for name, part in named.items() if "lora_B" in name}
    turns.ended(loaded, [p for name, p in named.items() if "lora_" not in name], learned)
