"""Every tensor lands where transformers puts it, damage is named, and memory is held once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.model.base import resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
PEAK = """
import sys, threading, time, torch
from nanopersrm.model.base import resolve
from nanopersrm.model.weights import load

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

def watch():
    global anonymous
    while not ended:
        anonymous = max(anonymous, status("RssAnon"))
        time.sleep(0.001)

base, ended = resolve(sys.argv[1]), False
load(resolve(sys.argv[2]), torch.float32, torch.device("cpu"))  # what is allocated once
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before, anonymous_before = status("VmHWM"), status("RssAnon")
anonymous = anonymous_before
thread = threading.Thread(target=watch)
thread.start()
model = load(base, torch.float32, torch.device("cpu"))
ended = True
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, status("VmHWM") - before, anonymous - anonymous_before)
"""


def parameters(model: Model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def their_name(name: str) -> str:
    """Our parameter's name in transformers."""
    if name == "lm_head.weight":
        return name
    return "model.embed_tokens.weight" if name == "embed_tokens" else f"model.{name}"


def logits(model: Model, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.logits(model(torch.tensor(ids), Layout.of([len(ids)])))


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


# Safetensors folders


def test_sharded_folder_equals_transformers(tiny_pair):
    oracle, base = tiny_pair
    assert len(list(base.path.glob("*.safetensors"))) > 2
    theirs, ours = oracle.state_dict(), parameters(load(base, torch.float32, CPU))
    assert len(ours) == len({t.data_ptr() for t in theirs.values()})  # a tied head counts once
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[their_name(name)]), name
        assert not tensor.requires_grad


def test_dtype_is_rounded_once(tiny_base):
    exact = parameters(load(tiny_base, torch.float32, CPU))
    for dtype in (torch.bfloat16, torch.float16):
        for name, tensor in parameters(load(tiny_base, dtype, CPU)).items():
            assert torch.equal(tensor, exact[name].to(dtype)), name


@pytest.fixture
def folder(tmp_path, tiny_base) -> Path:
    """A copy of a tied tiny model in one shard, to be damaged."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(tiny_base.path.glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_base.path / "config.json").read_text())
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard)


def reload(folder: Path) -> Model:
    return load(resolve(str(folder)), torch.float32, CPU)


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(lambda: reload(folder), str(folder), "missing 1", "layers.1.mlp.up_proj.weight")


def test_many_missing_tensors_stay_one_line(folder):
    rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers" in n])
    refused(lambda: reload(folder), str(folder), "missing 27", "layers.0.")


def test_unexpected_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(2)}))
    refused(lambda: reload(folder), str(folder), "unexpected", "model.layers.0.extra")


def test_a_layer_too_many(folder):
    name = "model.layers.3.input_layernorm.weight"  # the config says three layers, 0 to 2
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(48)}))
    refused(lambda: reload(folder), "unexpected", name)


@pytest.mark.parametrize("wrong", [(48, 79), (80, 48), (1, 1), (48 * 80,)])
def test_wrong_shape(folder, wrong):
    """Also those that would broadcast, or that have as many numbers."""
    name = "model.layers.2.mlp.down_proj.weight"  # (48, 80)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(wrong)}))
    refused(lambda: reload(folder), name, str(wrong), "(48, 80)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_a_tensor_of_integers(folder, dtype):
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(lambda: reload(folder), str(folder), name, str(dtype))


@pytest.mark.parametrize("shard", ["model.safetensors", "weights.safetensors"])
def test_an_adapter_beside_the_model_is_ignored(folder, shard):
    before = parameters(reload(folder))
    (folder / "model.safetensors").rename(folder / shard)
    save_file({"model.odd": torch.ones(2)}, folder / "adapter_model.safetensors")
    after = parameters(reload(folder))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("keep", [0, 5, 8, 400, 20_000, -1])
def test_truncated_shard(folder, keep):
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(lambda: reload(folder), str(shard))


@pytest.mark.parametrize(
    "noise", [b"\0" * 64, b"{}", b"\xff" * 4096, b"not a tensor\nat all\n" * 9]
)
def test_garbage_shard(folder, noise):
    shard = folder / "model.safetensors"
    shard.write_bytes(noise)
    refused(lambda: reload(folder), str(shard))


def test_derived_tables_are_tolerated(folder):
    before = parameters(reload(folder))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    for key, tensor in parameters(reload(folder)).items():
        assert torch.equal(tensor, before[key])


def test_a_tied_head_may_be_repeated(folder):
    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = logits(reload(folder), [5, 6, 7])
    rewrite(folder, repeat)
    model = reload(folder)
    assert model.lm_head is None
    assert torch.equal(logits(model, [5, 6, 7]), before)


def test_loading_holds_one_copy(tmp_path, tiny_base):
    """105 MB in shards of 15: at most the model and one mapped shard, privately the model alone."""
    sizes: dict[str, Any] = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536}
    sizes |= {"num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    config.save_pretrained(tmp_path)
    shapes.pop("lm_head.weight")
    shard: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(shapes.items()):
        shard[name] = torch.rand(tensor.shape)
        if sum(t.nbytes for t in shard.values()) > 15e6 or i + 1 == len(shapes):
            save_file(shard, tmp_path / f"model-{i:05}.safetensors")
            shard = {}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(tiny_base.path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    size, peak, anonymous = map(int, done.stdout.split())
    assert size > 100e6
    assert peak < 1.6 * size
    assert 0.9 * size < anonymous < 1.2 * size


def test_the_config_is_read_from_the_folder(folder):
    """Not guessed from the tensors: other sizes in config.json are an error that names a tensor."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    refused(lambda: reload(folder), "mlp.down_proj", "(48, 80)", "(48, 81)")
