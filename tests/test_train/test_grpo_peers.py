"""The losses beside TRL's: its own code turns rewards into advantages, and these into a loss.

Two methods of its trainer run on a stand-in that has the attributes they read: those that turn
replies and rewards into advantages, and these into a loss. Both are private, so this runs under
exactly the version that it was written for.
"""

import importlib.metadata
import importlib.util
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopersrm.train.grpo import (
    GrpoConfig,
    Variant,
    advantages,
    informative,
    policy_loss,
    statistics,
    token_weights,
)

VERSION = "1.16.0"
HERE = importlib.util.find_spec("trl") is not None
pytestmark = pytest.mark.skipif(
    not HERE or importlib.metadata.version("trl") != VERSION, reason=f"needs trl {VERSION}"
)
LENGTHS = (4, 1, 6, 3, 2, 7, 5, 3, 2, 2, 4, 1)  # of three groups of four
S, G, N, LONGEST = len(LENGTHS), 4, sum(LENGTHS), 9
OWNER = torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))
GROUP = torch.arange(S) // G
WEIGHTS = [1.0, 0.5, 2.0]
TRL: dict[Variant, dict[str, Any]] = {  # how our variants are spelled there
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    | {"epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},  # the bound, not its distance to 1
    "gdpo": {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
}


def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lp = -torch.rand(N, generator=generator) * 3
    noise = torch.randn(N, generator=generator) * 0.3
    parts = torch.rand(S, 3, generator=generator).mul(4).round() / 4
    parts[G : 2 * G] = parts[G]  # a group without variance
    return {"lp": lp, "old": lp + noise, "parts": parts}


def padded(x: Tensor) -> Tensor:
    """(N,) of the tokens -> (S, longest of them), zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True)


class StandIn:
    """An object whose other attributes are None."""

    def __init__(self, **known: Any):
        self.__dict__ |= known

    def __getattr__(self, name: str) -> None:
        return None


def stand_in(x: dict[str, Tensor], leaf: Tensor, options: dict[str, Any]) -> Any:
    """What the two methods read of a GRPOTrainer; `options` over TRL's defaults."""
    replies = [[7] * length for length in LENGTHS]

    def log_probs(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        rows = padded(leaf if torch.is_grad_enabled() else x["old"])  # in the loss, or before it
        return rows, torch.zeros_like(rows), None

    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    sizes = {"steps_per_generation": 1, "gradient_accumulation_steps": 1}
    known = {
        "accelerator": accelerator,
        "args": StandIn(per_device_train_batch_size=S, **sizes),
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_high": 0.2,
        "epsilon_low": 0.2,
        "importance_sampling_level": "token",
        "max_completion_length": LONGEST,
        "model": StandIn(training=True),
        "multi_objective_aggregation": "sum_then_normalize",
        "num_generations": G,
        "num_iterations": 1 if options.get("first") else 2,
        "reward_func_names": ["one", "two", "three"],
        "reward_funcs": [None] * 3,
        "reward_weights": torch.tensor(WEIGHTS),
        "scale_rewards": "group",
        "top_entropy_quantile": 1.0,
        "vllm_importance_sampling_mode": "token_truncate",
        "_calculate_rewards": lambda *_: x["parts"].clone(),
        "_generate": lambda _: ([[1]] * S, replies, None, ["text"] * S, None, {}, None, []),
        "_get_per_token_logps_and_entropies": log_probs,
        "_logs": {"prompt": [], "completion": [], "advantages": []}
        | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_metrics": {"train": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=0, batch_decode=lambda ids, **_: ["x"] * S),
    }
    return StandIn(**known | options)


def trl(
    x: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """TRL's advantages (S,), loss (), gradient (N,) and metrics."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    leaf = x["lp"].clone().requires_grad_()
    trainer = stand_in(x, leaf, options)
    inputs = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "one"}] * S)
    assert ("old_per_token_logps" in inputs) == (not options.get("first"))
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return inputs["advantages"], loss.detach(), gradient, trainer._metrics["train"]


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("variant", TRL)
def test_advantages_loss_and_gradient_equal_those_of_trl(variant, first):
    x = drawn()
    theirs: dict[str, Any] = dict(TRL[variant], first=first)
    old = None if first else x["old"]
    A_trl, loss_trl, gradient_trl, metrics = trl(x, theirs)

    config = GrpoConfig(variant=variant)
    A = advantages(x["parts"], torch.tensor(WEIGHTS), GROUP, S // G, config)
    torch.testing.assert_close(A, A_trl, rtol=1e-5, atol=1e-5)
    assert informative(A, GROUP, S // G).tolist() == [True, False, True]
    leaf = x["lp"].clone().requires_grad_()
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    loss, measured = policy_loss(leaf, OWNER, A, w, config, old=old)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach(), loss_trl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradient_trl, rtol=1e-5, atol=1e-6)

    numbers = statistics([measured])
    if variant not in ("cispo", "gspo", "gdpo"):  # there TRL counts otherwise
        assert numbers["clip_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0], abs=1e-6)
        assert numbers["clip_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0], abs=1e-6)
