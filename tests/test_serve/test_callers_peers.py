"""The reward functions inside verl and OpenRLHF themselves, from their data sets to their tensors.

Both want CUDA and pin their neighbours, so they are installed without what they ask for, in an
environment of their own:

    python -m venv peers && . peers/bin/activate && pip install -e '.[test]'
    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    pip install ray==2.55.0 tensordict==0.10.0 torchdata aiohttp pillow orjson pylatexenc
    pip install codetiming hydra-core omegaconf
    python -m pytest tests/test_callers_peers.py

pip then lists what is not as they want it. So these tests pass with Python 3.11.7, torch 2.13.0
(CPU) and transformers 5.24.0; without a package, or with another version of it, its are skipped.

The policy's replies are given, and vLLM's names too where a file only imports them; all else
between a row and its reward is theirs. A judge by rule shows that every reward reaches its sample.
"""

import asyncio
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import openai
import pytest
import torch
import transformers
from fake_judge import digits_of
from fixtures import make_base
from test_readme import MINE, block
from test_reward import LONG, OTHER, WRITER, Rule
from test_serve import TOKEN, Live, live

from nanopersrm import InputError
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.verdict import soft_score
from nanopersrm.serve.wire import Limits

pytestmark = pytest.mark.slow
VERL, OPENRLHF = "0.9.1", "0.11.2"
PROMPT = 3  # tokens of a prompt in verl's batch, which no manager reads
RULE = """
from test_callers_peers import JUDGES
from test_reward import Rule

from nanopersrm.serve.callers import openrlhf_reward, verl_score, verl_score_async

judge = Rule()
JUDGES.append(judge)
compute_score = verl_score(judge)
compute_score_async = verl_score_async(judge)
reward_func = openrlhf_reward(judge)
"""
JUDGES: list[Rule] = []  # of the files that were loaded


def peer(package: str, version: str, *names: str) -> Any:
    """Modules of a package; the test is skipped where it is not there in this version."""
    pytest.importorskip(package)
    found = importlib.metadata.version(package)
    if found != version:
        pytest.skip(f"needs {package} {version}, found {found}")
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's tokenizer, and a tiny model to judge with."""
    return make_base(tmp_path_factory.mktemp("peers") / "smollm", "smollm").path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    (tmp_path / "my_reward.py").write_text(RULE, encoding="utf-8")
    return tmp_path / "my_reward.py"


@pytest.fixture
def readme(tmp_path: Path, folder: Path) -> Path:
    """The README's file, with a tiny judge."""
    text, load = block("verl_score"), 'Judge.load(adapter="runs/mine/adapter")'
    assert load in text
    text = text.replace(load, f"Judge.load({str(folder)!r}, dtype='fp32')")
    (tmp_path / "my_reward.py").write_text(text, encoding="utf-8")
    return tmp_path / "my_reward.py"


# verl: RLHFDataset, RewardLoopWorker, load_reward_manager, run_single, assemble_rm_scores


@pytest.fixture
def verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    names = ("experimental.reward_loop", "experimental.reward_loop.reward_manager")
    found = peer("verl", VERL, "protocol", "utils.dataset.rl_dataset", *names)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    limited = found.reward_manager.RateLimitedRewardManager
    monkeypatch.setattr(limited, "_class_initialized", False)  # it keeps the first event loop
    return found


def verl_config(verl: Any, folder: Path, file: Path, manager: str, name: str) -> Any:
    """verl's own defaults, and the settings that the README speaks of."""
    from omegaconf import OmegaConf

    root = Path(verl.protocol.__file__).parent
    reward = OmegaConf.load(root / "trainer" / "config" / "reward" / "reward.yaml")
    policy = {"model": {"path": str(folder), "tokenizer_path": None}}
    config = OmegaConf.create({"reward": reward, "actor_rollout_ref": policy})
    config.trainer = {"experiment_name": "peers"}  # gdpo reads it
    OmegaConf.set_struct(config, True)  # a setting that verl does not know fails
    config.reward.custom_reward_function.path = str(file)
    config.reward.custom_reward_function.name = name
    config.reward.reward_manager.name = manager
    return config


def verl_batch(verl: Any, rows: Sequence[Any], tokenizer: Any, file: Path) -> Any:
    """Rows of a parquet file with a reply each, as they are after a rollout."""
    import datasets
    from omegaconf import OmegaConf

    of_all: dict[str, Any] = {"data_source": "letters", "reward_model": {"ground_truth": ""}}
    of_all["prompt"] = [{"role": "user", "content": "Write."}]
    asked = [of_all | {"extra_info": {"exemplars": e, "question": q}} for e, q, _ in rows]
    datasets.Dataset.from_list(asked).to_parquet(file)
    config = OmegaConf.create({"filter_overlong_prompts": False})
    read = verl.rl_dataset.RLHFDataset(str(file), tokenizer, config)
    given = verl.rl_dataset.collate_fn([read[i] for i in range(len(read))])
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    replies = [tokenizer(text)["input_ids"] + [end] for _, _, text in rows]
    most = max(map(len, replies)) + 2
    mask = [[0] + [1] * (PROMPT - 1 + len(ids)) + [0] * (most - len(ids)) for ids in replies]
    drawn = {
        "prompts": torch.full((len(rows), PROMPT), end),
        "responses": torch.tensor([ids + [pad] * (most - len(ids)) for ids in replies]),
        "attention_mask": torch.tensor(mask),
    }
    return verl.protocol.DataProto.from_single_dict(given | drawn)


def verl_rewards(verl: Any, config: Any, batch: Any) -> tuple[list[float], list[Any]]:
    """The reward at the last token of each reply, and what verl logs beside it."""

    async def run() -> Any:
        worker = verl.reward_loop.RewardLoopWorker(config)
        return worker, await worker.compute_score_batch(batch)

    worker, found = asyncio.run(run())
    scores = [one["reward_score"] for one in found]
    rewards = worker.reward_manager.assemble_rm_scores(batch, scores)  # (B, T)
    last = batch.batch["attention_mask"][:, PROMPT:].sum(1) - 1  # (B,)
    at_last = rewards[torch.arange(len(found)), last]
    assert torch.equal(rewards.sum(1), at_last)  # nothing elsewhere
    return at_last.tolist(), [one["reward_extra_info"] for one in found]


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
@pytest.mark.parametrize("manager", ["naive", "dapo", "gdpo", "rate_limited"])
def test_verl(verl, manager, name, folder, tokenizer, rule, tmp_path):
    """Two writers, with and without a question, an empty reply, and more rows than threads."""
    rows = [(list(WRITER), "Why?", "is a 7"), (list(OTHER), None, "is a 3"), (OTHER, "Why?", "")]
    rows += [(list(OTHER), f"{k}?", f"{k} is a {k % 9 + 1}") for k in range(20)]
    batch = verl_batch(verl, rows, tokenizer, tmp_path / "train.parquet")
    rewards, logs = verl_rewards(verl, verl_config(verl, folder, rule, manager, name), batch)
    assert rewards == [0.75, 0.25, 0] + [k % 9 / 8 for k in range(20)]
    assert logs == [{"acc": reward} for reward in rewards]
    expected = [(tuple(whose), [text], asked) for whose, asked, text in rows if text]
    assert sorted(JUDGES[-1].calls, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
@pytest.mark.parametrize(
    ("whose", "text", "part"),
    [
        (None, "is a 7", "extra_info: expected the field exemplars"),
        (["So.", " "], "is a 7", "extra_info, field exemplars, text 2: expected some text"),
        (["So."], LONG, "the judge gave this completion no score"),
        (["So."], "what?", "the judge gave this completion no score"),
    ],
)
def test_verl_gets_no_reward_for_what_cannot_be_judged(
    verl, whose, text, part, name, folder, tokenizer, rule, tmp_path
):
    """The error ends the batch. Only verl's `rate_limited` catches it, and takes 0 instead."""
    rows = [(["So."], None, "is a 7"), (whose, None, text)]
    batch = verl_batch(verl, rows, tokenizer, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=part):
        verl_rewards(verl, verl_config(verl, folder, rule, "naive", name), batch)
    limited = verl_config(verl, folder, rule, "rate_limited", name)
    rewards, logs = verl_rewards(verl, limited, batch)
    assert rewards == [0.75, 0]
    assert part in logs[1]["error"]


def test_verl_with_the_file_of_the_readme(verl, folder, tokenizer, readme, tmp_path):
    rows = [(MINE, "Rain?", "It rained; so be it."), (MINE, "Rain?", "lol rain")]
    batch = verl_batch(verl, rows, tokenizer, tmp_path / "train.parquet")
    config = verl_config(verl, folder, readme, "naive", "compute_score")
    check(verl_rewards(verl, config, batch)[0], folder, [row[2] for row in rows], "Rain?")


def check(rewards: Sequence[float], folder: Path, texts: Sequence[str], asked: str | None) -> None:
    """Against the judge itself, text by text."""
    judge = Judge.load(str(folder), dtype="fp32")
    scores = [judge.judge(MINE, [text], asked).scores[0] for text in texts]
    expected = [(score - 1) / 8 for score in scores if score is not None]
    assert len(set(expected)) == len(texts)
    assert rewards == pytest.approx(expected, abs=1e-5)


# OpenRLHF: PromptDataset, SingleTurnAgentExecutor, SamplesGenerator, Experience


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """samples_generator.py imports two names that need vLLM, and that nothing here calls."""
    found = peer("openrlhf", OPENRLHF, "datasets", "utils.agent")
    engine = "openrlhf.trainer.ray.vllm_engine"
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=None))
    monkeypatch.setitem(sys.modules, engine, SimpleNamespace(batch_vllm_engine_call=None))
    found.samples = importlib.import_module("openrlhf.trainer.ppo_utils.samples_generator")
    return found


@pytest.fixture
def server() -> Iterator[Live]:
    yield from live(Limits(seconds=20), TOKEN)


def openrlhf_samples(
    openrlhf: Any, url: str, rows: Sequence[Any], tokenizer: Any, room: int = 999
) -> list[Any]:
    """OpenRLHF's Experience of each row: label and reply -> tensors. room: tokens of a sample."""
    data = SimpleNamespace(input_key="prompt", label_key="label", apply_chat_template=True)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    asked = [{"prompt": f"{k}?", "label": label} for k, (label, _) in enumerate(rows)]
    read = openrlhf.datasets.PromptDataset(asked, tokenizer, strategy)
    _, prompts, labels, _ = read.collate_fn([read[i] for i in range(len(read))])
    executor = openrlhf.agent.SingleTurnAgentExecutor(url.split(","))
    params = SimpleNamespace(max_tokens=30, logprobs=None)

    async def sample(prompt: str, label: Any, text: str) -> Any:
        ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert len(ids) <= params.max_tokens
        reply = SimpleNamespace(token_ids=ids, text=text, finish_reason="stop", logprobs=None)
        engine = AsyncMock(**{"generate.return_value": SimpleNamespace(outputs=[reply])})
        return await executor.execute(prompt, label, params, room, tokenizer, engine)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(sample, prompts, labels, [text for _, text in rows]))

    generator = object.__new__(openrlhf.samples.SamplesGenerator)
    return [generator._process_response_into_experience(x) for x in asyncio.run(all_of_them())]


def rewards_of(samples: Sequence[Any]) -> list[float]:
    """As they are learned from; everything that is logged or filtered by is the same."""
    for one in samples:
        for other in (one.scores, one.info["reward"], one.info["score"], one.info["fits_writer"]):
            assert torch.equal(other.flatten(), one.rewards.flatten())
    return torch.cat([one.rewards for one in samples]).reshape(-1).tolist()


def test_openrlhf_with_a_function(openrlhf, tokenizer, rule):
    rows: list[tuple[Any, str]] = [(list(WRITER), "is a 7"), (OTHER[0], "is a 3")]
    rows += [({"exemplars": WRITER, "question": "Why?"}, "is a 9"), (list(WRITER), "")]
    rows += [(f"Writer {k}.", f"{k} is a {k % 9 + 1}") for k in range(20)]
    samples = openrlhf_samples(openrlhf, str(rule), rows, tokenizer)
    assert rewards_of(samples) == [0.75, 0.25, 1, 0] + [k % 9 / 8 for k in range(20)]
    expected: list[Any] = [(WRITER, ["is a 7"], None), (OTHER, ["is a 3"], None)]
    expected += [(WRITER, ["is a 9"], "Why?")]
    expected += [((whose,), [text], None) for whose, text in rows[4:]]
    assert sorted(JUDGES[-1].calls, key=str) == sorted(expected, key=str)


def test_openrlhf_with_the_server(openrlhf, tokenizer, server):
    """Labels as texts, lists, JSON and objects; or one writer for all, said in the address."""
    url = f"http://any:{TOKEN}@127.0.0.1:{server.port}/get_reward"
    whose = ["So.", ["I came; I saw."], json.dumps({"exemplars": ["lol"]}), {"exemplars": ["Ha."]}]
    rows = [(label, f"Text {k}.") for k, label in enumerate(whose * 3)] + [("So.", "")]
    samples = openrlhf_samples(openrlhf, url, rows, tokenizer)
    expected = [(soft_score(digits_of(text)) - 1) / 8 for _, text in rows[:-1]] + [0]
    assert rewards_of(samples) == pytest.approx(expected)
    said = ["So.", "I came; I saw.", "lol", "Ha."] * 3
    asked = [(one, text) for one, (_, text) in zip(said, rows[:-1], strict=True)]
    assert sorted(judged(server)) == sorted(asked)
    server.judge.calls.clear()
    openai.OpenAI(base_url=server.url, api_key=TOKEN).put(
        "/writers/ada", body={"exemplars": ["Hm."]}, cast_to=object
    )
    samples = openrlhf_samples(openrlhf, f"{url}?writer=ada", [("", "Text 1.")], tokenizer)
    assert rewards_of(samples) == pytest.approx(expected[1:2])
    assert judged(server) == [("Hm.", "Text 1.")]


def judged(server: Live) -> list[tuple[str, str]]:
    """Writers and texts, whichever were judged together."""
    return [(whose, text) for (whose,), texts in server.judge.calls for text in texts]


@pytest.mark.parametrize(
    ("label", "text", "room", "part"),
    [
        ("", "is a 7", 999, "labels[0]: expected the field exemplars"),
        (None, "is a 7", 999, "labels[0]: expected the field exemplars"),
        ({"text": "So."}, "is a 7", 999, "exemplars, question, principles, got 'text'"),
        ("So.", "what?", 999, "the judge gave this completion no score"),
        # OpenRLHF cuts the prompt to make room: where the reply begins is not known
        ("So.", "is a 7", 34, "queries[0]: expected the prompt and a reply, found another text"),
    ],
)
def test_openrlhf_gets_no_reward_from_a_function_that_refuses(
    openrlhf, label, text, room, part, tokenizer, rule, caplog
):
    (sample,) = openrlhf_samples(openrlhf, str(rule), [(label, text)], tokenizer, room)
    assert (sample.rewards, sample.scores) == (None, None)
    assert not {"reward", "score", "fits_writer"} & set(sample.info)
    assert "Failed to fetch reward from remote RM" in caplog.text
    assert part in caplog.text


def test_openrlhf_gets_no_reward_from_a_server_that_refuses(openrlhf, tokenizer, server, caplog):
    """Each is asked for five times, beside a good one."""
    url = f"http://any:{TOKEN}@127.0.0.1:{server.port}/get_reward"
    rows = [("", "One."), (["So."], "invalid"), ({"writer": "nobody"}, "One."), ("So.", "Two.")]
    samples = openrlhf_samples(openrlhf, url, rows, tokenizer)
    assert [one.rewards is None for one in samples] == [True, True, True, False]
    assert judged(server).count(("So.", "invalid")) == 5
    wrong = url.replace(TOKEN, "wrong")
    (sample,) = openrlhf_samples(openrlhf, wrong, rows[-1:], tokenizer)
    assert sample.rewards is None
    for status in (422, 500, 404, 401):
        assert caplog.text.count(f"please check: {status}, ") == 5


def test_openrlhf_with_the_file_of_the_readme(openrlhf, folder, tokenizer, readme):
    rows = [(MINE, "It rained; so be it."), (MINE, "lol rain")]
    samples = openrlhf_samples(openrlhf, str(readme), rows, tokenizer)
    check(rewards_of(samples), folder, [row[1] for row in rows], None)
