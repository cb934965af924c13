"""The same work by transformers, PEFT and TRL, from the same weights, ids and first A and B.

transformers' model is made around the tensors of ours. In 4 bits it is saved and loaded again by
bitsandbytes, whose NF4 has the same bytes. Replies never end early, on either side.
"""

import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.lora import Lora
from nanopersrm.model.transformer import Model

IGNORED = -100  # the label that transformers' loss leaves out
CLIP = 1.0  # longest gradient, TRL's default and ours
Text = tuple[list[int], int]  # ids, and the index of the first one of the reply


def need(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(f"expected {', '.join(missing)} beside us: pip install -e '.[bench]'")


def transformers_model(model: Model, sizes: dict[str, Any], nf4: bool = False) -> Any:
    """transformers' model with the weights of `model`, whose matrices are not quantized."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, dtype = model.device, model.norm.weight.dtype
    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    options: dict[str, Any] = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    plain = {k: v for k, v in sizes.items() if k not in ("rope_theta", "rope_scaling")}
    rope = sizes.get("rope_scaling") or {"rope_type": "default"}
    plain["rope_parameters"] = rope | {"rope_theta": sizes["rope_theta"]}
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**plain), dtype=dtype, **options
        )
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    state = {names.get(k, f"model.{k}"): weight.data for k, weight in model.named_parameters()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    peer.load_state_dict(state, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(device)  # was on "meta"
    if nf4:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="nanopersrm-bench-") as folder:
            peer.save_pretrained(folder)
            peer = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map={"": str(device)},
                quantization_config=quantization, **options,
            )  # fmt: skip
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval()


def generate(peer: Any, prompts: Tensor, replies: int, new: int) -> Tensor:
    """prompts (B, P) -> (B · replies, P + new), drawn at temperature 1."""
    with torch.inference_mode():
        return peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=replies, max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip


def with_adapter(peer: Any, lora: Lora, recompute: bool) -> Any:
    """PEFT's adapter on `peer`, in fp32, with the A and B of `lora`."""
    import peft

    rank, targets = lora.config.rank, list(lora.config.targets)
    alpha: Any = lora.config.alpha  # peft says int, a float will do
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    if recompute:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
        peer.enable_input_require_grads()
    adapted = peft.get_peft_model(peer, config)
    for name, pair in lora.masters.items():
        place: Any = adapted.get_submodule(f"base_model.model.model.{name}")
        for part, master in zip((place.lora_A, place.lora_B), pair, strict=True):
            part["default"].weight.data = master.detach().clone()
    return adapted


class PeftSide:
    """Fine-tuning steps on texts of one length, a few rows at a time, without padding."""

    def __init__(self, adapted: Any, lr: float, rows: int, autocast: bool):
        self.model, self.rows, self.autocast = adapted, rows, autocast
        self.device = next(adapted.parameters()).device
        learns = [p for p in adapted.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr, weight_decay=0.0)

    def step(self, texts: Sequence[Text]) -> float:
        """One step -> the mean loss of a reply token."""
        self.model.train()
        self.model.config.use_cache = False
        count = sum(len(ids) - first for ids, first in texts)
        total = torch.zeros((), device=self.device)
        for at in range(0, len(texts), self.rows):
            some = texts[at : at + self.rows]
            labels = [[IGNORED] * first + ids[first:] for ids, first in some]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(
                    input_ids=torch.tensor([ids for ids, _ in some], device=self.device),
                    labels=torch.tensor(labels, device=self.device),
                    num_items_in_batch=count,
                ).loss
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)


def number_tokenizer(V: int) -> Any:
    """Ids as text, as TRL takes it: "17 4 99" is [17, 4, 99]. The last id ends and fills."""
    import tokenizers
    import transformers

    words = {str(i): i for i in range(V - 1)} | {"<end>": V - 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", padding_side="left"
    )


def trl_trainer(
    adapted: Any,
    prompts: Sequence[list[int]],
    rewards: Callable[[list[list[int]]], list[float]],
    before_step: Callable[[int], None],
    after_step: Callable[[], None],
    config: Any,
) -> Any:
    """TRL's GRPOTrainer without a reference: a step for each prompt, G rows drawn and trained at
    once. `before_step` sees its number."""
    import datasets
    import transformers
    import trl

    class Between(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            before_step(state.global_step)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    cpu = torch.device(config.device).type == "cpu"
    options = trl.GRPOConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "nanopersrm-bench-trl"),
        use_cpu=cpu, bf16=config.dtype == "bf16", gradient_checkpointing=config.recompute,
        max_steps=len(prompts), per_device_train_batch_size=config.group,
        num_generations=config.group, shuffle_dataset=False,
        max_completion_length=config.reply, generation_kwargs={"min_new_tokens": config.reply},
        temperature=1.0, beta=0.0, loss_type="grpo", learning_rate=config.lr,
        lr_scheduler_type="constant", max_grad_norm=CLIP, seed=config.seed,
        dataloader_pin_memory=not cpu, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        adapted,
        lambda completion_ids, **_: list[float | None](rewards(completion_ids)),
        options,
        datasets.Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in prompts]),
        processing_class=number_tokenizer(adapted.config.vocab_size),
        callbacks=[Between()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
