"""TRL's own trainer learns with a judge as its reward, and the judge's own scores are what it sees.

The policy and the judge are tiny random models. Training is slow and needs TRL; the first tests
check without TRL what it asks of a reward function (TRL 1.16.0: trl.trainer.utils.is_async_callable
and get_callable_name, GRPOTrainer._calculate_rewards).
"""

import importlib.metadata
import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures import make_base

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig

VERSION = "1.16.0"
HERE = importlib.util.find_spec("trl") is not None
with_trl = pytest.mark.skipif(
    not HERE or importlib.metadata.version("trl") != VERSION, reason=f"needs trl {VERSION}"
)
ONE = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
TWO = ["lol no food 😭 again!!"]
TEXTS = ["We arrived late, and there was no supper.", "lol no", "", "It is what it is; so be it."]
QUICK = JudgeConfig(think=False, evidence=False)
G, STEPS = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("trl") / "smollm", "smollm").path


@pytest.fixture(scope="module")
def judge(folder) -> Judge:
    return Judge.load(str(folder), dtype="fp32")


def test_a_reward_function_as_trl_sees_it(judge):
    reward = judge.reward_fn(ONE)
    assert not inspect.iscoroutinefunction(reward)
    assert not inspect.iscoroutinefunction(reward.__call__)
    assert reward.__name__ == "fits_writer"
    kinds = [parameter.kind for parameter in inspect.signature(reward).parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2 + [inspect.Parameter.VAR_KEYWORD]


def test_rewards_are_the_scores_of_the_judge(judge):
    """Both shapes of a batch, two writers, and an empty completion."""
    random_state = torch.random.get_rng_state()
    rows = [(prompt, whose) for prompt, whose in (("Why?", ONE), ("How?", TWO)) for _ in TEXTS]
    prompts, exemplars = [prompt for prompt, _ in rows], [whose for _, whose in rows]
    found = judge.reward_fn(scale="soft", config=QUICK)(prompts, TEXTS * 2, exemplars=exemplars)
    written = [text for text in TEXTS if text]
    for k, (question, whose) in enumerate((("Why?", ONE), ("How?", TWO))):
        judgement = judge.judge(whose, written, question, config=QUICK)
        one, two, empty, three = found[k * 4 : k * 4 + 4]
        assert [one, two, three] == pytest.approx(judgement.scores, abs=1e-5)
        assert empty == 1
        assert len({one, two, three}) == 3
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = [[{"role": "assistant", "content": text}] for text in TEXTS * 2]
    again = judge.reward_fn(scale="soft", config=QUICK)(chat, said, exemplars=exemplars)
    assert again == found
    assert torch.equal(torch.random.get_rng_state(), random_state)  # training draws as before
    relative = judge.reward_fn(ONE, scale="relative", config=QUICK)(prompts[:4], TEXTS)
    table = judge.judge(ONE, written, "Why?", config=QUICK).preference
    assert relative[0] == pytest.approx((table[0][1] + table[0][2] + 1) / 3, abs=1e-5)


def test_a_completion_longer_than_the_context(judge):
    found = judge.reward_fn(ONE, config=QUICK)(["Why?"] * 2, ["supper " * 5000, TEXTS[0]])
    alone = judge.reward_fn(ONE, config=QUICK)(["Why?"], [TEXTS[0]])
    assert found == [None, pytest.approx(alone[0], abs=1e-5)]


def tokenizer_of(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.slow
@with_trl
@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_with_it(chat, folder, judge, tmp_path):
    """Two steps of GRPO, each on the prompts of two writers and of nobody."""
    import datasets
    import trl

    rows: list[dict[str, Any]] = []
    for prompt, whose in (("Why?", ONE), ("How?", TWO), ("Who?", None)):
        said = [{"role": "user", "content": prompt}] if chat else prompt
        rows.append({"prompt": said, "exemplars": whose})
    reward = judge.reward_fn(config=QUICK, name="mine")
    seen: list[tuple[list[Any], list[Any], list[float | None]]] = []

    def looking_on(
        prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        """A second reward, which never applies."""
        again = reward(prompts, completions, **{**columns, "log_metric": None})
        seen.append((prompts, completions, again))
        return [None] * len(completions)

    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = [weight.detach().clone() for weight in policy.parameters()]
    options = trl.GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=3 * G,
        num_generations=G,
        max_completion_length=6,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    trainer = trl.GRPOTrainer(
        policy,
        [reward, looking_on],
        options,
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(folder),
    )
    trainer.train()
    assert len(seen) == STEPS
    logs = [line for line in trainer.state.log_history if "rewards/mine/mean" in line]
    assert len(logs) == STEPS
    for log, (prompts, completions, found) in zip(logs, seen, strict=True):
        assert len(prompts) == len(completions) == len(found) == 3 * G
        asks = [prompt[0]["content"] if chat else prompt for prompt in prompts]
        assert [reward is None for reward in found] == [asked == "Who?" for asked in asks]
        given = [reward for reward in found if reward is not None]
        assert all(0 <= reward <= 1 for reward in given)
        assert len(set(given)) > 1
        assert log["rewards/mine/mean"] == pytest.approx(math.fsum(given) / len(given), abs=1e-5)
        assert log["mine/no_score"] == 0
        texts = [said[0]["content"] if chat else said for said in completions]
        for asked, whose in (("Why?", ONE), ("How?", TWO)):
            which = [i for i in range(3 * G) if asks[i] == asked and texts[i].strip()]
            soft = judge.judge(whose, [texts[i] for i in which], asked, config=QUICK).scores
            expected = [(score - 1) / 8 for score in soft if score is not None]
            assert [found[i] for i in which] == pytest.approx(expected, abs=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
    assert any(moved)
