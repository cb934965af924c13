"""What many tests share: tiny random models of every family (transformers is the oracle) and the
real base.

No test needs weights, a network or a GPU, except those marked `base` (the embedded SmolLM2, fetched
once) and `gpu`.
"""

import nanopersrm  # noqa: F401, I001  (before torch: see the note on threads there)

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nanopersrm.model.base import DEFAULT_BASE, Base, resolve

if TYPE_CHECKING:
    import transformers

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    torch.set_num_threads(1)

SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# name -> (transformers' config class, its further arguments)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-bias-linear": (
        "LlamaConfig",
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied-yarn": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3Config", {"head_dim": 8}),
}


def tiny(name: str, folder: Path) -> "transformers.PreTrainedModel":
    """A random fp32 model of a family, also saved under `folder` as a Hugging Face directory."""
    import transformers  # takes seconds, and many files do not need it

    kind, more = TINY[name]
    torch.manual_seed(7)
    oracle = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**SIZES, **more)
    ).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # larger than the default 0.02: attention must matter
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 1.0)
    oracle.save_pretrained(folder, max_shard_size="60KB")
    return oracle


@pytest.fixture(scope="session", params=list(TINY))
def tiny_pair(request, tmp_path_factory) -> "tuple[transformers.PreTrainedModel, Base]":
    """(transformers' model, our Base of the same files) for every family in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny(request.param, folder), resolve(str(folder))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Base:
    """One small model for tests that do not care which."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny("llama-tied", folder)
    return resolve(str(folder))


@pytest.fixture(scope="session")
def smollm() -> Base:
    """The embedded default base."""
    return resolve(DEFAULT_BASE)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Base:
    """A random model with a tokenizer of SmolLM2's kind, and room for 16,384 tokens."""
    from fixtures import make_base  # which needs this file

    return make_base(tmp_path_factory.mktemp("base") / "smollm", "smollm", 16_384)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As processes of a run have; sums of several threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
