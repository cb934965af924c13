"""Gemma 3 270M, zero-shot: a ready-made model of twice our base's size gets the same question.

It is a yardstick for the judge `untrained`: what does a larger and newer model know of this task by
itself? Both are asked pointwise, in the words of `prompts.py`, with the measured block, without
reasoning. The reply is begun for them and they are scored by the digit that would follow:

    …question…  <think>↵</think>↵<scores>A=  ->  p(1) … p(9)         of these nine alone
    score       = Σ d · p(d)                                         `verdict.soft_score`
    preference  = P(a > b) + ½ P(a = b)                              `verdict.beats`

transformers loads the GGUF file of `gemma_file.py` (Q4_K_M, expanded to 16 bits where the machine
multiplies them fast) and runs it; our own `model.py` has no such family. Both prompts of a pair
begin alike, and what they have in common is computed once. A pair takes 2.4 s of one core.
Only for comparison: nothing else here uses it, and it needs the extra `bench`.

What we chose. TEMPLATE is the chat form of Gemma's instruction-tuned models, where the system's
text stands in front of the user's. These weights are the pretrained ones and have hardly seen it;
on 22 pairs for validation, "System: … User: … Assistant:" did no better (16 right and 14). In bf16
the gap between two scores moves by 0.015 (median of 12 pairs, whose gaps are 0.02 in fp32; two
turned over): `--dtype fp32` takes 1.6 times as long and is nearer to the truth.

What we left out: pairwise questions, reasoning, cutting exemplars, since 32,768 tokens hold all.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from nanopersrm import InputError
from nanopersrm.evaluate.gemma_file import gemma_file
from nanopersrm.evaluate.predictions import Opine, Opinion, from_scores
from nanopersrm.judge.prompts import messages
from nanopersrm.judge.verdict import OPEN, beats, closing, soft_score
from nanopersrm.model.device import device_of, dtype_of
from nanopersrm.model.sampler import common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.vocabulary import Vocabulary
from nanopersrm.style.profile import measured_block

TEMPLATE = (
    "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] }}\n\n"
    "{{ messages[1]['content'] }}<end_of_turn>\n{{ '<start_of_turn>model\n' }}"
)
REPLY = OPEN + closing("")[1]  # what is begun for it, up to the digit
PROBE = "The capital of  France\n\nis", [818, 5279, 529, 138, 31756, 108, 511]  # two blanks


def load(device: str, dtype: str, say: Callable[[str], None]) -> tuple[Any, Tokenizer]:
    """transformers' Gemma3ForCausalLM and its tokenizer, fetched first if they are not here yet."""
    place = device_of(device)
    kind = dtype_of(dtype, place)
    if kind == torch.float16:
        kind = torch.float32  # Gemma's hidden states grow beyond what fp16 can hold
    model, tokenizer = read(gemma_file(say), kind)
    return model.to(place), tokenizer


def read(path: Path, dtype: torch.dtype) -> tuple[Any, Tokenizer]:
    """Gemma3ForCausalLM and its tokenizer from a GGUF file.

    What such a file does not say, which layers see everything (each sixth) and by what attention is
    scaled (1 / sqrt(256)), transformers knows of Gemma 3 270M: these are its defaults.
    """
    import transformers  # takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    found = transformers.GemmaTokenizer.from_pretrained(path.parent, **where)
    tokenizer = wrapped(found.backend_tokenizer)
    if (ids := tokenizer.encode(PROBE[0])) != PROBE[1]:
        raise InputError(
            f"{path}: expected transformers to read {PROBE[0]!r} as {PROBE[1]}, found {ids} by "
            f"{transformers.__version__}: take another release"
        )
    with redirect_stderr(StringIO()):  # another progress bar, which has no switch
        model = transformers.Gemma3ForCausalLM.from_pretrained(path.parent, dtype=dtype, **where)
    return model.eval(), tokenizer


def wrapped(backend: Any) -> Tokenizer:
    """Gemma's tokenizer as ours: texts stay data, control tokens come from TEMPLATE alone."""
    return Tokenizer(Vocabulary(backend, TEMPLATE, "<bos>", "<eos>", set(), True), "gemma")


def gemma(model: Any, tokenizer: Tokenizer, evidence: bool) -> Opine:
    """The judge of a Gemma3ForCausalLM. evidence: show the measured block."""
    context = model.config.max_position_embeddings

    def say(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Opinion:
        prompts = [ids_of(tokenizer, exemplars, question, text, evidence) for text in candidates]
        if (longest := max(map(len, prompts))) > context:
            raise InputError(f"expected texts that fit {context} tokens, got {longest}")
        one, two = digits(model, prompts, tokenizer.digit_ids)
        found = from_scores([soft_score(one), soft_score(two)])
        return found if found.scores is None else replace(found, preference=beats(one, two))

    return say


def ids_of(
    tokenizer: Tokenizer, exemplars: Sequence[str], question: str, candidate: str, evidence: bool
) -> list[int]:
    """The prompt about one candidate, up to the digit."""
    exemplars, candidate = [text.strip() for text in exemplars], candidate.strip()
    measured = measured_block(exemplars, [candidate]) if evidence else None
    chat = messages(exemplars, [candidate], question or None, measured=measured)
    return tokenizer.chat(chat, continuation=REPLY)


@torch.inference_mode()
def digits(model: Any, prompts: Sequence[list[int]], digit_ids: Sequence[int]) -> list[list[float]]:
    """p(1), …, p(9) after each prompt; what all begin with is computed once."""
    import transformers

    shared = min(common_prefix(prompts), *(len(prompt) - 1 for prompt in prompts))
    rows = model.lm_head.weight[list(digit_ids)].float()  # (9, D)
    begun = transformers.DynamicCache(config=model.config)
    # Without names: the fourth argument, the cache, has had two within transformers 5.
    model.model(_row(prompts[0][:shared], model), None, None, begun)
    found = []
    for prompt in prompts:
        rest = _row(prompt[shared:], model)  # (1, T)
        cache = copy.deepcopy(begun)  # it grows as it is used
        hidden = model.model(rest, None, None, cache).last_hidden_state  # (1, T, D)
        logits = rows @ hidden[0, -1].float()  # (9,) in fp32: bf16 cannot part nine digits
        found.append(logits.double().softmax(-1).tolist())
    return found


def _row(ids: list[int], model: Any) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)  # (1, T)
