"""Adapters on disk: PEFT on transformers reads ours and gives the same logits, and the reverse."""

import nanopersrm  # noqa: F401, I001  (before torch)

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopersrm import InputError
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import TARGETS, Lora, LoraConfig
from nanopersrm.model.lora import CONFIG, TENSORS, load, save
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load as load_base

IDS = torch.tensor([5, 90, 17, 33, 2, 64, 128, 9, 77, 41])
CPU = torch.device("cpu")
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIGS = {
    "default": LoraConfig(rank=4, alpha=8),
    "few targets": LoraConfig(rank=3, alpha=3, targets=("q_proj", "down_proj")),
    "rslora": LoraConfig(rank=4, alpha=6, rslora=True),
    "alpha": LoraConfig(rank=2, alpha=7.5, dropout=0.25),
}
THEIRS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3, "use_rslora": True},
    "regex": {"target_modules": r".*\.layers\.[01]\.(self_attn\.o|mlp\.up)_proj"},
    "layers": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1},
    "exclude": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
}


def model_of(base: Base, dtype: torch.dtype = torch.float32) -> Model:
    return load_base(base, dtype, CPU)


def logits(model: Model) -> torch.Tensor:
    return model.logits(model(IDS, Layout.of([len(IDS)])))


def randomized(model: Model, config: LoraConfig, seed: int = 0) -> Lora:
    """An adapter whose B is not zero, so that it matters."""
    lora, random = Lora(model, config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, B in lora.masters.values():
            B.normal_(0, 0.3, generator=random)
    lora.refresh()
    return lora


def peft_adapter(folder: Path, oracle_folder: Path, **fields):
    """PEFT's model with random B, saved by PEFT."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(oracle_folder)
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **fields})
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    theirs.save_pretrained(str(folder))
    return theirs.eval()


@pytest.mark.parametrize("which", CONFIGS)
def test_peft_reads_ours(which, tiny_pair, tmp_path):
    import peft
    import transformers

    _, base = tiny_pair
    model = model_of(base)
    lora = randomized(model, CONFIGS[which])
    save(tmp_path, lora, str(base.path))
    before = logits(model)
    with lora.using(model):
        ours = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh = transformers.AutoModelForCausalLM.from_pretrained(base.path)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (ours - before).abs().max() > 0.05


@pytest.mark.parametrize("which", THEIRS)
def test_we_read_pefts(which, tiny_pair, tmp_path):
    _, base = tiny_pair
    theirs = peft_adapter(tmp_path, base.path, **THEIRS[which])
    model = model_of(base)
    lora = load(tmp_path, model)
    assert len(lora.masters) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    lora.on(model)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["layers", "regex", "exclude"])
def test_an_adapter_on_some_layers_goes_round(which, tiny_base, tmp_path):
    """PEFT -> here -> disk -> PEFT."""
    import peft
    import transformers

    theirs = peft_adapter(tmp_path / "theirs", tiny_base.path, **THEIRS[which])
    model = model_of(tiny_base)
    save(tmp_path / "ours", load(tmp_path / "theirs", model), "tiny")
    again = load(tmp_path / "ours", model)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_base.path)
    reread = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(reread(IDS[None]).logits, theirs(IDS[None]).logits)
    assert 0 < len(again.masters) < 3 * len(again.config.targets)


def test_gradients_are_pefts(tiny_pair, tmp_path):
    _, base = tiny_pair
    theirs = peft_adapter(tmp_path, base.path, target_modules=list(TARGETS))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model = model_of(base)
    lora = load(tmp_path, model)
    lora.on(model)
    torch.nn.functional.cross_entropy(logits(model)[:-1], IDS[1:]).backward()
    torch.nn.functional.cross_entropy(theirs(IDS[None]).logits[0, :-1], IDS[1:]).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == len(lora.parameters()) == 2 * 7 * 3
    for name, pair in lora.masters.items():
        for letter, part in zip("AB", pair, strict=True):
            grad = expected[f"base_model.model.model.{name}.lora_{letter}.default.weight"]
            scale = grad.abs().max().item()
            torch.testing.assert_close(part.grad, grad, atol=1e-4 * max(scale, 1e-3), rtol=1e-4)


def test_the_files_are_pefts(tiny_base, tmp_path):
    """The same fields and values as PEFT writes for the same adapter, and the same tensors."""
    theirs = tmp_path / "theirs"
    peft_adapter(theirs, tiny_base.path, target_modules=list(TARGETS), lora_dropout=0.1)
    lora = load(theirs, model_of(tiny_base))
    save(tmp_path / "ours", lora, str(tiny_base.path))
    found = [json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs")]
    found[1]["target_modules"].sort(key=TARGETS.index)  # PEFT writes a set
    assert found[0] == found[1]
    ours = (tmp_path / "ours" / TENSORS).read_bytes()
    assert ours == (theirs / TENSORS).read_bytes()


def test_same_adapter_same_bytes(tiny_base, tmp_path):
    model = model_of(tiny_base)
    for folder in ("one", "two"):
        save(tmp_path / folder, randomized(model, CONFIGS["default"], seed=3), "tiny")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_in_16_bits(dtype, tiny_base, tmp_path):
    model = model_of(tiny_base)
    save(tmp_path, randomized(model, CONFIGS["default"]), "tiny")
    half = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(half, tmp_path / TENSORS)
    A, _ = load(tmp_path, model).masters["layers.0.self_attn.q_proj"]
    assert A.dtype == torch.float32
    assert torch.equal(A.detach(), half[A0].float())


def test_loaded_into_bf16_it_learns(tiny_base, tmp_path):
    """The copies lead back to the masters at once, without another refresh."""
    model = model_of(tiny_base, torch.bfloat16)
    save(tmp_path, randomized(model, CONFIGS["default"]), "tiny")
    lora = load(tmp_path, model)
    lora.on(model)
    logits(model).sum().backward()
    assert all(part.grad is not None for part in lora.parameters())


WRONG = [  # field, value, what the error says of it
    ("peft_type", "IA3", "field peft_type: expected 'LORA', found 'IA3'"),
    ("peft_type", None, "field peft_type: expected 'LORA', found None"),
    ("use_dora", True, "field use_dora: expected False, found True"),
    ("bias", "all", "field bias: expected 'none', found 'all'"),
    ("modules_to_save", ["lm_head"], "field modules_to_save: expected None, found ['lm_head']"),
    ("rank_pattern", {"q_proj": 2}, "field rank_pattern: expected {}, found {'q_proj': 2}"),
    ("alpha_pattern", {"q_proj": 2}, "field alpha_pattern: expected {}, found"),
    ("fan_in_fan_out", True, "field fan_in_fan_out: expected False, found True"),
    ("lora_bias", True, "field lora_bias"),
    ("layer_replication", [[0, 2]], "field layer_replication"),
    ("trainable_token_indices", [3], "field trainable_token_indices"),
    ("init_lora_weights", "pissa", "field init_lora_weights: expected a start"),
    ("r", "4", "field r: expected a whole number, found '4'"),
    ("r", True, "field r: expected a whole number, found True"),
    ("r", 0, "rank: expected a number from 1, got 0"),
    ("r", 10**12, "expected (1000000000000, 80)"),
    ("lora_alpha", "8", "field lora_alpha: expected a number, found '8'"),
    ("lora_alpha", float("inf"), "field lora_alpha: expected a number, found inf"),
    ("lora_dropout", 1.0, "dropout: expected 0 up to, but not, 1, got 1.0"),
    ("use_rslora", "no", "field use_rslora: expected true or false, found 'no'"),
    ("target_modules", 3, "field target_modules: expected a list of names or a regular"),
    ("target_modules", [3], "field target_modules: expected a list of names or a regular"),
    ("target_modules", None, "field target_modules: expected a list of names or a regular"),
    ("target_modules", "(", "field target_modules: expected a regular expression, found '('"),
    ("target_modules", ["c_attn"], "field target_modules: expected some of q_proj"),
    ("target_modules", ["q_proj"], f"{TENSORS}: unexpected tensor"),
    ("exclude_modules", 3, "field exclude_modules: expected a list of names or"),
    ("layers_to_transform", ["0"], "field layers_to_transform: expected numbers of layers"),
    ("layers_to_transform", [0], f"{TENSORS}: unexpected tensor"),
]


@pytest.mark.parametrize(("field", "value", "says"), WRONG)
def test_a_wrong_field_is_named(field, value, says, tiny_base, tmp_path):
    model = model_of(tiny_base)
    save(tmp_path, Lora(model, CONFIGS["default"], seed=0), "tiny")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load(tmp_path, model)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


Q = "base_model.model.model.layers.1.self_attn.q_proj"
WRONG_TENSORS = [  # name, None to take it away or a tensor to put there, what the error says
    (A0, None, f"missing tensor {A0}, which {CONFIG} promises"),
    (A0, torch.zeros(4, 47), f"tensor {A0} has shape (4, 47), expected (4, 48)"),
    (A0, torch.zeros(4, 48, dtype=torch.int64), f"tensor {A0} holds other than finite floats"),
    (A0, torch.full((4, 48), torch.nan), f"tensor {A0} holds other than finite floats"),
    ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "base_model.model.lm_head"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 131), "embed_tokens"),
    (f"{Q}.lora_magnitude_vector", torch.zeros(48), f"tensor {Q}.lora_magnitude_vector"),
    (A0.replace("layers.0", "layers.9"), torch.zeros(4, 48), "layers.9.self_attn.q_proj.lora_A"),
    ("x.A", torch.zeros(1), "unexpected tensor"),
]


@pytest.mark.parametrize(("name", "tensor", "says"), WRONG_TENSORS)
def test_a_wrong_tensor_is_named(name, tensor, says, tiny_base, tmp_path):
    model = model_of(tiny_base)
    save(tmp_path, Lora(model, CONFIGS["default"], seed=0), "tiny")
    tensors = load_file(tmp_path / TENSORS) | {name: tensor}
    save_file({key: t for key, t in tensors.items() if t is not None}, tmp_path / TENSORS)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load(tmp_path, model)
    assert str(tmp_path / TENSORS) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (CONFIG, b'{"r": 4,', "line 1: expected JSON"),
        (CONFIG, b"\xff\xfe", "expected UTF-8"),
        (CONFIG, b"[]", "expected a JSON object"),
        (CONFIG, None, f"expected a folder with {CONFIG} and {TENSORS}, no {CONFIG}"),
        (TENSORS, b"", "truncated or not a safetensors file"),
        (TENSORS, b"\xff" * 100, "truncated or not a safetensors file"),
        (TENSORS, None, f"no {TENSORS}"),
    ],
)
def test_a_broken_file_is_named(file, content, says, tiny_base, tmp_path):
    model = model_of(tiny_base)
    save(tmp_path, Lora(model, CONFIGS["default"], seed=0), "tiny")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load(tmp_path, model)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_cannot_be_written(tiny_base, tmp_path):
    (tmp_path / "file").write_text("")
    lora = Lora(model_of(tiny_base), CONFIGS["default"], seed=0)
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "file", lora, "tiny")


def test_an_adapter_of_another_base(tiny_base, tmp_path, tmp_path_factory):
    from conftest import tiny

    save(tmp_path, Lora(model_of(tiny_base), CONFIGS["default"], seed=0), "tiny")
    other = tmp_path_factory.mktemp("qwen3")
    tiny("qwen3", other)
    with pytest.raises(InputError, match=r"has shape .* expected"):
        load(tmp_path, model_of(resolve(str(other))))
