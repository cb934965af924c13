"""Adapters in memory and on disk: PEFT on transformers reads ours, and we read PEFT's."""

import nanopersrm  # noqa: F401, I001  (before torch)

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_bases import CPU, peft_adapter, random_lora, refused

from nanopersrm.model.base import Base
from nanopersrm.model.cache import Layout
from nanopersrm.model.linear import TARGETS, Linear, matrices
from nanopersrm.model.lora import Lora, LoraConfig, adapter_off, load_lora, save_lora
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as PEFT's
FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.tensor([5, 90, 17, 33, 2, 64, 128, 9, 77, 41, 3, 8])
FLAT = Layout.of([7, 5])
SMALL = LoraConfig(rank=4, alpha=8)
Q0 = "layers.0.self_attn.q_proj"
PEFT_Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A0 = f"{PEFT_Q0}.lora_A.weight"


CONFIGS = {
    "default": SMALL,
    "few targets": LoraConfig(rank=3, alpha=3, targets=("q_proj", "down_proj")),
    "alpha": LoraConfig(rank=2, alpha=7.5),
}
THEIRS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj", "gate_proj"], "lora_dropout": 0.1},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3},
}


def model_of(base: Base, dtype: torch.dtype = FP32, nf4: bool = False) -> Model:
    return load(base, dtype, CPU, nf4)


def hidden(model: Model, ids: torch.Tensor = IDS, layout: Layout = FLAT) -> torch.Tensor:
    return model(ids, layout)


def all_logits(model: Model) -> torch.Tensor:
    return model.logits(model(IDS, Layout.of([len(IDS)])))


def gradients(lora: Lora) -> list[torch.Tensor]:
    grads = []
    for part in lora.parameters():
        assert part.grad is not None
        grads.append(part.grad)
        part.grad = None
    return grads


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"rank": 0}, "rank"),
        ({"targets": ("q_proj", "lm_head")}, "'lm_head'"),
        ({"targets": ()}, "targets"),
    ],
)
def test_wrong_configs(fields, part):
    refused(lambda: LoraConfig(**fields), part)


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "down_proj")])
def test_sizes_and_start(targets, tiny_base):
    model = model_of(tiny_base)
    lora = Lora(model, LoraConfig(rank=3, targets=targets), seed=1)
    assert list(lora.masters) == list(matrices(model, targets))
    assert len(lora.parameters()) == 2 * 3 * len(targets)
    for name, (A, B) in lora.masters.items():
        matrix = model.get_submodule(name)
        assert isinstance(matrix, Linear)
        assert A.shape == (3, matrix.width_in)
        assert B.shape == (matrix.width_out, 3)
        bound = matrix.width_in**-0.5
        assert 0.8 * bound < A.abs().max() <= bound
        assert abs(A.mean()) < 0.3 * bound
        assert not B.any()
    before = hidden(model)
    with lora.using(model):
        assert torch.equal(hidden(model), before)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_refresh_reaches_the_model(dtype, tiny_base):
    """Also while it is on, and the base never moves."""
    model = model_of(tiny_base, dtype)
    lora = random_lora(model)
    base = hidden(model)
    lora.on(model)
    before = hidden(model)
    with torch.no_grad():
        for part in lora.parameters():
            part.mul_(2)
    lora.refresh()
    after = hidden(model)
    assert not torch.equal(after, before)
    matrix = model.get_submodule(Q0)
    assert isinstance(matrix, Linear)
    assert matrix.adapter is not None
    assert matrix.adapter.A.dtype == dtype
    torch.testing.assert_close(matrix.adapter.A, lora.masters[Q0][0].to(dtype))
    lora.off(model)
    assert torch.equal(hidden(model), base)


def test_masters_add_up_in_fp32(tiny_base):
    """bf16 gradients of micro-batches are summed in fp32: exactly the sum of those one by one."""
    model = model_of(tiny_base, BF16)
    lora = random_lora(model)
    lora.on(model)
    assert {part.dtype for part in lora.parameters()} == {FP32}
    parts = [IDS, IDS.flip(0)]
    alone = []
    for ids in parts:
        F.cross_entropy(model.logits(hidden(model, ids)), ids.roll(-1)).backward()
        alone.append(gradients(lora))
    for ids in parts:  # one refresh, two backward calls
        F.cross_entropy(model.logits(hidden(model, ids)), ids.roll(-1)).backward()
    coarse = 0
    for both, one, two in zip(gradients(lora), *alone, strict=True):
        assert both.dtype == FP32
        assert torch.equal(both, one + two)
        coarse += int(not torch.equal(both, (one.bfloat16() + two.bfloat16()).float()))
    assert coarse > len(lora.parameters()) // 2  # in bf16 the sum would be another


def adapters(model: Model) -> list:
    return [matrix.adapter for matrix in matrices(model).values()]


@pytest.mark.parametrize("nf4", [False, True])
def test_using_and_off_nest(nf4, tiny_base):
    model = model_of(tiny_base, nf4=nf4)
    policy = random_lora(model, seed=1)
    style = random_lora(model, LoraConfig(rank=2, targets=("q_proj",)), seed=2)
    base = hidden(model)
    policy.on(model)
    on = adapters(model)
    with style.using(model):
        inside = adapters(model)
        assert inside[0] is style.copies[Q0]
        assert inside[1] is None  # not a mixture of both
        with adapter_off(model):
            assert torch.equal(hidden(model), base)
            with policy.using(model):
                assert all(a is b for a, b in zip(adapters(model), on, strict=True))
        assert all(a is b for a, b in zip(adapters(model), inside, strict=True))
    for context in (style.using, adapter_off):
        with pytest.raises(KeyError), context(model):
            raise KeyError
        assert all(a is b for a, b in zip(adapters(model), on, strict=True))
    assert (hidden(model) - base).abs().max() > 1e-3
    policy.off(model)
    assert torch.equal(hidden(model), base)


def test_tensors_go_round(tiny_base):
    model = model_of(tiny_base, BF16)
    one, two = random_lora(model, seed=1), random_lora(model, seed=2)
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    assert set(kept) == {f"{name}.{letter}" for name in one.masters for letter in "AB"}
    masters = two.parameters()
    two.on(model)
    two.load_tensors(kept)
    assert all(a is b for a, b in zip(masters, two.parameters(), strict=True))  # of the optimizer
    assert all(torch.equal(kept[name], tensor) for name, tensor in two.tensors().items())
    after = hidden(model)
    with one.using(model):
        assert torch.equal(hidden(model), after)
    after.float().sum().backward()
    assert all(part.grad is not None for part in masters)
    two.freeze()
    assert not hidden(model).requires_grad


# On disk


@pytest.mark.parametrize("which", CONFIGS)
def test_peft_reads_ours(which, tiny_pair, tmp_path):
    import peft
    import transformers

    _, base = tiny_pair
    model = model_of(base)
    lora = random_lora(model, CONFIGS[which])
    save_lora(tmp_path, lora, str(base.path))
    before = all_logits(model)
    with lora.using(model):
        ours = all_logits(model)
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
    lora = load_lora(tmp_path, model)
    assert len(lora.masters) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    lora.on(model)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(all_logits(model), expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_pefts(tiny_pair, tmp_path):
    _, base = tiny_pair
    theirs = peft_adapter(tmp_path, base.path, target_modules=list(TARGETS))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model = model_of(base)
    lora = load_lora(tmp_path, model)
    lora.on(model)
    torch.nn.functional.cross_entropy(all_logits(model)[:-1], IDS[1:]).backward()
    torch.nn.functional.cross_entropy(theirs(IDS[None]).logits[0, :-1], IDS[1:]).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(expected) == len(lora.parameters()) == 2 * 7 * 3
    for name, pair in lora.masters.items():
        for letter, part in zip("AB", pair, strict=True):
            grad = expected[f"base_model.model.model.{name}.lora_{letter}.default.weight"]
            scale = grad.abs().max().item()
            torch.testing.assert_close(part.grad, grad, atol=1e-4 * max(scale, 1e-3), rtol=1e-4)


def test_the_files_are_pefts(tiny_base, tmp_path):
    """Each field as PEFT writes it for the same adapter, and the same tensors."""
    theirs = tmp_path / "theirs"
    peft_adapter(theirs, tiny_base.path, target_modules=list(TARGETS))
    lora = load_lora(theirs, model_of(tiny_base))
    save_lora(tmp_path / "ours", lora, str(tiny_base.path))
    ours, peft = (json.loads((f / CONFIG_FILE).read_text()) for f in (tmp_path / "ours", theirs))
    peft["target_modules"].sort(key=TARGETS.index)  # PEFT writes a set
    assert ours == {field: peft[field] for field in ours}
    tensors = (tmp_path / "ours" / TENSORS_FILE).read_bytes()
    assert tensors == (theirs / TENSORS_FILE).read_bytes()


WRONG = [  # field, value, what the error names beside the field
    ("peft_type", "IA3", "'IA3'"),
    ("use_dora", True, "True"),
    ("modules_to_save", ["lm_head"], "lm_head"),
    ("rank_pattern", {"q_proj": 2}, "q_proj"),
    ("some_later_field", 1, "1"),
    ("init_lora_weights", "pissa", "'pissa'"),
    ("r", "4", "'4'"),
    ("r", 0, "0"),
    ("lora_alpha", "8", "'8'"),
    ("target_modules", None, "None"),
    ("target_modules", ".*q_proj", "q_proj"),
    ("target_modules", ["c_attn"], "c_attn"),
]


@pytest.fixture
def damaged(tiny_base, tmp_path):
    """(model, folder with an adapter of it), to be damaged."""
    model = model_of(tiny_base)
    save_lora(tmp_path, Lora(model, SMALL, seed=0), "tiny")
    return model, tmp_path


@pytest.mark.parametrize(("field", "value", "part"), WRONG)
def test_a_wrong_field_is_named(field, value, part, damaged):
    model, folder = damaged
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {field: value}))
    refused(lambda: load_lora(folder, model), str(folder / CONFIG_FILE), field, part)


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [  # None: taken away
        (A0, None, "missing"),
        (A0, torch.zeros(4, 47), "(4, 47)"),
        (A0, torch.zeros(4, 48, dtype=torch.int64), "finite"),
        (A0, torch.full((4, 48), torch.nan), "finite"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "unexpected"),
        (f"{PEFT_Q0}.lora_magnitude_vector", torch.zeros(48), "unexpected"),
    ],
)
def test_a_wrong_tensor_is_named(name, tensor, part, damaged):
    model, folder = damaged
    tensors = load_file(folder / TENSORS_FILE) | {name: tensor}
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / TENSORS_FILE)
    refused(lambda: load_lora(folder, model), str(folder / TENSORS_FILE), name, part)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSORS_FILE])
@pytest.mark.parametrize("content", [b'{"r": 4,', b"", None])
def test_a_broken_file_is_named(file, content, damaged):
    model, folder = damaged
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    refused(lambda: load_lora(folder, model), str(folder), file)


def test_a_rank_beyond_the_tensors(damaged):
    """Named before room is made for it."""
    model, folder = damaged
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"r": 10**12}))
    refused(lambda: load_lora(folder, model), str(folder), "rank")


def test_a_folder_that_cannot_be_written(damaged):
    model, folder = damaged
    lora = Lora(model, SMALL, seed=0)
    refused(lambda: save_lora(folder / CONFIG_FILE, lora, "tiny"), "written")
