"""Wiring: do the programs of the lessons do with their functions what they tell their readers?

A function can be right and be called with the wrong thing: a control that is treated as well, a
flag that nobody reads, an exam of what was learned, a number under another one's name. That runs
without an error, and a lesson tells its reader something false. So every test here runs a train(),
or the step of it that counts, on tiny models, looks at what went in and out, and names one claim.

In place of the exam a watcher looks on: it says whose weights it was shown. So a card can be asked
whose it is. The slow tests run with --full alone.
"""
import copy
import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
import grpo
import model as M
import ppo
import reward_model
import sft
from data import exam, rows
from data import run as house
from data import studybuddy as world
from data.checkpoints import load, load_ranks, load_scalar, save
from lessons import (best_of, distill, forgetting, judge_bias, kto, landscape, online,
                     process_reward, race, report, safe)
from lessons.test_half_two import config_of, folders, tiny_model        # noqa: F401, a fixture
from test_all import ends_soon, same, slow, weights

TOKENIZER = load_ranks()


# ---------------------------------------------------------------- what the tests share

def weight(network):
    """One number that tells a model from any other."""
    return sum(p.detach().double().abs().sum().item() for p in network.parameters())


def moved(network, by):
    """A model that has learned something."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.embed.weight += by
    return other


class Exams:
    """Stands in for the exam. In its card gold (and math) is the weight of the model that sat it,
    kl of the one that it is far from, and against of the one whose answers it has to beat."""

    def __init__(self):
        self.asked = []                 # the prompts of each exam
        self.golds = []                 # a test's own, of the first exam, the second ..

    def __call__(self, model, tokenizer, reference=None, against=None, seed=0, rows=None, parts=()):
        gold = self.golds[len(self.asked)] if self.golds else weight(model)
        some = rows or world.read("exam")[::150]
        self.asked.append(some)
        card = dict.fromkeys(exam.CARD, 0.5) | {"seed": seed}
        del card["kl"]
        card["gold"] = card["math"] = card["math_greedy"] = gold
        if reference is not None:
            card["kl"] = weight(reference)
        if against is not None:
            card["against"] = float(against[0].text)
        text = repr(weight(model))
        return card, [exam.Answer(row, text, True, world.judge(row, text)) for row in some]


@pytest.fixture
def exams(monkeypatch):
    stand_in = Exams()
    monkeypatch.setattr(exam, "exam", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def files(folders):
    """Beside the tiny models and prompts of test_half_two.py: a model of few words, and pairs."""
    short = ends_soon(tiny_model(4), share=0.2)
    save(folders / "short", short, TOKENIZER)
    save(folders / "base", tiny_model(5), TOKENIZER)
    for name, count in {"preferences": 80, "steps": 40}.items():
        lines = world.read(name)[:count]
        (folders / f"{name}.jsonl").write_text(rows.json_lines(lines))
    talks = {}
    for row in world.read("sft"):
        talks.setdefault(row["kind"], []).append(row)
    lines = sum([some[:5] for some in talks.values()], [])
    (folders / "talks.jsonl").write_text(rows.json_lines(lines))
    return folders


def told(Config, files, data="prompts", **changes):
    """The settings of a small and silent run."""
    settings = {"init": str(files / "short"), "data": str(files / f"{data}.jsonl"), "quiet": True}
    return config_of(Config, files, **settings | changes)


def weight_of(folder):
    return weight(load(folder)[0])


def texts_of(examples):
    """-> {(prompt, answer)} of Examples, as they are read"""
    pairs = set()
    for example in examples:
        start = example.answer.index(1)
        pairs.add((TOKENIZER.decode(example.ids[:start]), TOKENIZER.decode(example.ids[start:])))
    return pairs


def prompts_of(comparisons):
    return {world.flat(comparison.prompt) for comparison in comparisons}


def wrapped(monkeypatch, module, name):
    """Keeps the arguments of every call of a function, which still does what it did."""
    function = getattr(module, name)
    calls = []

    def call(*args, **settings):
        calls.append(args)
        return function(*args, **settings)
    monkeypatch.setattr(module, name, call)
    return calls


def weights_given(monkeypatch, module, name):
    """Keeps the weight of the model that each call begins with, as it is then: it may learn."""
    function = getattr(module, name)
    weights = []

    def call(model, *args):
        weights.append(weight(model))
        return function(model, *args)
    monkeypatch.setattr(module, name, call)
    return weights


# ---------------------------------------------------------------- safe

def harms_half(prompts, texts):
    """The judges of help like long answers; half of everything is harm."""
    help = torch.tensor([float(len(text)) for text in texts])
    return help, torch.full([len(texts)], 0.5)


@pytest.fixture(scope="module")
def prices(files):
    """The price of harm in each of the three ways, batch after batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "exam", Exams())
        patch.setattr(safe, "load_judges", lambda config: harms_half)
        config = told(safe.Config, files, steps=2, guess=3.0, price=2.0, rate=0.5, limit=0.1)
        logs = safe.compare(config)[1]
    return {name: [row["price"] for row in log] for name, log in logs.items()}


def test_whoever_wants_help_alone_pays_nothing_for_harm(prices):
    assert max(prices["free"]) < 1e-6


def test_the_price_in_one_score_stays_at_its_guess(prices):
    assert prices["one_score"] == pytest.approx([3.0, 3.0])


def test_the_price_of_a_limit_is_found_by_the_run(prices):
    first = math.exp(math.log(2.0) + 0.5 * 2.0 * (0.5 - 0.1))
    second = math.exp(math.log(first) + 0.5 * first * (0.5 - 0.1))
    assert prices["limit"] == pytest.approx([first, second], rel=1e-4)


@pytest.fixture
def safe_run(files, exams, monkeypatch):
    """A run in which nothing is learned but who it was; marks of help say who wrote the answer."""
    def climb(policy, tokenizer, score, price, rate, config):
        with torch.no_grad():
            policy.embed.weight += 1 + price
        return [{"price": price, "harm": price / 100}]
    monkeypatch.setattr(safe, "climb", climb)
    monkeypatch.setattr(safe, "load_judges", lambda config: None)
    monkeypatch.setattr(safe, "marks_of", lambda row, text: {"helpful": float(text)})
    return safe.train(told(safe.Config, files, guess=3.0, price=2.0))


def safe_weight(files, price):
    return weight(moved(load(files / "short")[0], 1 + price))


def test_each_way_of_safe_is_examined_itself(files, safe_run):
    start = weight_of(files / "short")
    golds = {name: card["gold"] for name, card in safe_run["numbers"]["cards"].items()}
    assert golds == pytest.approx({"before": start, "free": safe_weight(files, safe.LEAST),
                                   "one_score": safe_weight(files, 3.0),
                                   "limit": safe_weight(files, 2.0)})


def test_what_helped_is_marked_on_the_same_answers_as_gold(safe_run):
    for card in safe_run["numbers"]["cards"].values():
        assert card["helped"] == pytest.approx(card["gold"])


def test_the_ways_of_safe_are_as_far_as_they_went_from_the_start(files, safe_run):
    start = weight_of(files / "short")
    for name in "before", "free", "one_score", "limit":
        assert safe_run["cards"][name]["kl"] == start
        assert safe_run["cards"][name].get("against", start) == start


@slow
def test_the_figure_of_safe_shows_the_price_of_the_limit(safe_run):
    assert safe_run["numbers"]["price"] == [2.0]
    harms = {name: round(harm[0], 6) for name, harm in safe_run["numbers"]["harm"].items()}
    assert harms == {"free": 0.0, "one_score": 0.03, "limit": 0.02}


@slow
def test_harm_is_what_the_head_of_harmless_denies(files, monkeypatch):
    r = torch.tensor([[1.0, -30.0, 2.0], [1.0, 30.0, 2.0], [5.0, 30.0, 2.0], [1.0, 30.0, 7.0]])
    monkeypatch.setattr(ppo, "score_by", lambda judge, tokenizer: lambda prompts, texts: r)
    score = safe.load_judges(told(safe.Config, files, judges=str(files / "judges")))
    help, harm = score(None, None)
    assert harm.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert help[0] == help[1] and help[2] > help[1] and help[3] > help[1]


def safe_climb(files, score=harms_half, price=1.0, rate=1.0, **changes):
    config = told(safe.Config, files, **{"steps": 3} | changes)
    policy, tokenizer = load(config.init)
    log = safe.climb(policy, tokenizer, score, price, rate, config)
    return weights(policy), log


@pytest.fixture(scope="module")
def plain_climb(files):
    return safe_climb(files, harms_some)[0]


def harms_some(prompts, texts):
    help, _ = harms_half(prompts, texts)
    return help, torch.tensor([len(text) % 3 / 2 for text in texts])


@slow
@pytest.mark.parametrize("changes", [dict(price=9.0), dict(rate=9.0), dict(limit=0.9), dict(lr=0.1),
                                     dict(beta=9.0), dict(batch=16), dict(seed=1), dict(steps=2),
                                     dict(data="sft")])
def test_every_setting_of_safe_changes_what_is_learned(files, plain_climb, changes):
    if changes.get("data") == "sft":
        path = files / "math.jsonl"
        path.write_text(rows.json_lines(world.read("prompts")[40:60]))
        changes = {"data": "math"}
    assert not same(safe_climb(files, harms_some, **changes)[0], plain_climb)


@slow
def test_four_answers_in_a_row_have_one_prompt(files):
    """RLOO holds each four against one another."""
    asked = []

    def score(prompts, texts):
        asked.append([world.flat(prompt) for prompt in prompts])
        return harms_half(prompts, texts)
    safe_climb(files, score, steps=1, batch=16)
    fours = [set(asked[0][i:i + 4]) for i in range(0, 16, 4)]
    assert [len(four) for four in fours] == [1] * 4 and len(set.union(*fours)) > 1


# ---------------------------------------------------------------- race

def some_are_right(truth, text, ended):
    return [1.0, 0.1, 0.0][len(text) % 3]


def race_climb(name, files, **changes):
    """Eight answers a batch, of 72 tokens each as this model hardly ever ends: two batches."""
    settings = {"init": str(files / "init"), "tokens": 1000}
    return race.climb(name, told(race.Config, files, **settings | changes))


@pytest.fixture
def verified(monkeypatch):
    monkeypatch.setattr(grpo, "strict", some_are_right)


@pytest.fixture(scope="module")
def plain_race(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "strict", some_are_right)
        torch.manual_seed(0)
        return weights(race_climb("ppo", files)[0])


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.01), dict(critic_lr=0.1), dict(batch=16),
                                     dict(seed=1), dict(tokens=1500), dict(data="math_only")])
def test_every_setting_of_the_race_changes_what_is_learned(files, verified, plain_race, changes):
    lines = [row for row in world.read("prompts") if row["kind"] == "math"][12:24]
    (files / "math_only.jsonl").write_text(rows.json_lines(lines))
    torch.manual_seed(0)
    assert not same(weights(race_climb("ppo", files, **changes)[0]), plain_race)


@pytest.mark.parametrize("name", race.RACERS)
def test_the_budget_of_the_race_counts_sampled_tokens_alone(files, monkeypatch, name):
    """Prompts are free."""
    drawn = []

    def look(*args, **settings):
        samples = M.sample(*args, **settings)
        drawn.append(int(samples.answer.sum()))
        return samples
    monkeypatch.setattr(race, "sample", look)
    sampled = [tokens for tokens, right in race_climb(name, files)[2]]
    assert sampled == np.cumsum(drawn).tolist()
    assert sampled[-2] < 1000 <= sampled[-1]


@pytest.mark.parametrize("critic_lr", [0.0, 1e-2])
def test_the_critic_of_the_race_learns_at_critic_lr(files, verified, monkeypatch, critic_lr):
    critics = []

    def critic_of(transformer):
        critic = M.ScalarModel(transformer)
        critics.append((critic, weights(critic)))
        return critic
    monkeypatch.setattr(race, "ScalarModel", critic_of)
    race_climb("ppo", files, critic_lr=critic_lr)
    [(critic, before)] = critics
    assert same(weights(critic), before) == (critic_lr == 0)


@slow
@pytest.mark.parametrize("changes, rate", [(dict(lr=0.03), 0.03),
                                           (dict(critic_lr=0.02), ppo.ALGORITHMS["ppo"].lr)])
def test_a_racer_learns_at_his_own_rate_unless_told(files, monkeypatch, changes, rate):
    optimizers = wrapped(monkeypatch, race, "adamw")
    race_climb("ppo", files, **changes)
    assert {type(network): lr for network, lr in optimizers}[M.Transformer] == rate


@slow
@pytest.mark.parametrize("name", race.RACERS)
def test_every_racer_draws_as_many_answers_at_a_time(files, monkeypatch, name):
    counts = []

    def look(policy, tokenizer, prompts, n, *args, **settings):
        counts.append((len(prompts), n))
        return M.sample(policy, tokenizer, prompts, n, *args, **settings)
    monkeypatch.setattr(race, "sample", look)
    race_climb(name, files)
    assert set(counts) == {(8 // race.RACERS[name].group, race.RACERS[name].group)}


@slow
@pytest.mark.parametrize("name, sizes", [("rloo", [8]), ("grpo", [8]), ("ppo", [4] * 4)])
def test_ppo_alone_takes_two_passes_in_small_batches(files, monkeypatch, name, sizes):
    seen = []
    loss_of = race.loss_of

    def look(name, logps, *args):
        seen.append(len(logps))
        return loss_of(name, logps, *args)
    monkeypatch.setattr(race, "loss_of", look)
    race_climb(name, files)
    assert seen == sizes * 2


@slow
def test_who_ran_before_leaves_no_trace(files, verified):
    alone, _, curve = race_climb("rloo", files)
    race_climb("reinforce", files)
    again, _, curve_again = race_climb("rloo", files)
    assert same(weights(alone), weights(again)) and curve == curve_again


@slow
@pytest.mark.parametrize("reward, right", [(1.0, 1.0), (0.1, 0.0)])
def test_what_is_wrong_in_the_right_form_is_wrong(files, monkeypatch, reward, right):
    monkeypatch.setattr(grpo, "strict", lambda truth, text, ended: reward)
    assert {share for tokens, share in race_climb("rloo", files)[2]} == {right}


@pytest.fixture
def race_run(files, exams, monkeypatch):
    def climb(name, config):
        policy, tokenizer = load(config.init)
        place = list(race.RACERS).index(name) + 1
        return moved(policy, place), tokenizer, [(500, 0.1), (1000 * place, 0.1 + place / 5)]
    monkeypatch.setattr(race, "climb", climb)
    return race.train(told(race.Config, files, tokens=4000, goal=0.4))["numbers"], exams.asked


def test_the_exam_of_a_racer_is_his_own(files, race_run):
    start = load(files / "short")[0]
    for place, name in enumerate(race.RACERS, 1):
        assert race_run[0]["greedy"][name] == weight(moved(start, place))


def test_racers_are_examined_in_sums(race_run):
    assert len(race_run[1]) == 4
    assert all(row["kind"] == "math" for asked in race_run[1] for row in asked)


@slow
def test_who_never_reaches_the_goal_spends_the_budget(race_run):
    assert race_run[0]["until"] == dict(zip(race.RACERS, [4000, 2000, 3000, 4000]))


# ---------------------------------------------------------------- landscape

@pytest.fixture
def learned(files, monkeypatch):
    """What each run of the landscape was told: {name: changes}"""
    changes_of = {}

    def learn(name, config, **changes):
        changes_of[name] = changes
        place = len(changes_of)
        card = {"gold": place / 10, "kl": place, "length": 20.0, "flattery": 0.1}
        return {"after": card, "log": [{"chosen": -place, "rejected": -2 * place}]}
    monkeypatch.setattr(landscape, "learn", learn)
    monkeypatch.setattr(landscape, "exact_toy", lambda config: {1.0: 0.0})
    monkeypatch.setattr(landscape, "ask_all", lambda config: {})
    monkeypatch.setattr(landscape, "need", lambda *args: None)
    return changes_of


def landscaped(files, tmp_path, data="preferences", **changes):
    config = told(landscape.Config, files, data=data, out=str(tmp_path), **changes)
    return landscape.train(config)["numbers"]


def test_a_third_of_the_noisy_labels_is_really_wrong(files, learned, tmp_path):
    landscaped(files, tmp_path, scenario="noisy")
    [data] = {changes["data"] for changes in learned.values()}
    before = rows.read_pairs(files / "preferences.jsonl")
    after = rows.read_pairs(data)
    turned = 0
    for old, new in zip(before, after, strict=True):
        assert new.prompt == old.prompt and {new.chosen, new.rejected} == {old.chosen, old.rejected}
        assert new.row["kind"] == old.row["kind"]               # the rest of a line stays
        turned += new.chosen == old.rejected
    assert 15 <= turned <= 40


@slow
def test_noisy_labels_come_from_the_seed(files, learned, tmp_path):
    texts = []
    for seed in 0, 1:
        landscaped(files, tmp_path, scenario="noisy", seed=seed)
        texts.append(Path(learned["dpo"]["data"]).read_text())
    assert texts[0] != texts[1]


def test_only_the_robust_loss_is_told_of_the_noise(files, learned, tmp_path):
    landscaped(files, tmp_path, scenario="noisy")
    noise = {name: changes.get("noise") for name, changes in learned.items()}
    assert noise == {"dpo": None, "robust": 1 / 3, "ipo": None}


def test_few_are_two_hundred_pairs_for_all(files, learned, tmp_path):
    lines = world.read("preferences")[:230]
    (files / "many.jsonl").write_text(rows.json_lines(lines))
    landscaped(files, tmp_path, data="many", scenario="few")
    [data] = {changes["data"] for changes in learned.values()}
    assert [pair.row for pair in rows.read_pairs(data)] == lines[:200]


@slow
def test_ahead_starts_from_a_model_that_is_better_than_the_winners(files, learned, tmp_path):
    landscaped(files, tmp_path, scenario="ahead")
    assert learned == {"apo_zero": {"init": "out/ppo"}, "apo_down": {"init": "out/ppo"}}


@slow
def test_small_tries_losses_without_a_second_model(files, learned, tmp_path):
    landscaped(files, tmp_path, scenario="small")
    assert {name for name in learned if not dpo.LOSSES[name].reference} == {"simpo", "orpo"}


@slow
def test_the_card_of_a_loss_is_its_own(files, learned, tmp_path):
    cards = landscaped(files, tmp_path, runs="ipo dpo kto")["cards"]
    assert {name: card["gold"] for name, card in cards.items()} == {"ipo": 0.1, "dpo": 0.2,
                                                                    "kto": 0.3}


@slow
def test_the_curve_of_the_landscape_is_dpos(files, learned, tmp_path):
    numbers = landscaped(files, tmp_path, runs="ipo dpo kto")
    assert (numbers["chosen"], numbers["rejected"]) == ([-2.0], [-4.0])


@pytest.fixture
def settings_of(files, monkeypatch):
    """What dpo.py, kto.py and ppo.py are told by a run."""
    seen = {}
    for name, module in {"dpo": dpo, "kto": kto, "ppo": ppo}.items():
        monkeypatch.setattr(module, "train", lambda config, name=name: seen.update({name: config}))
    config = told(landscape.Config, files, data="preferences", steps=20, seed=5, beta=0.7)
    for name in "ipo", "kto", "ppo":
        landscape.learn(name, config)
    return seen


@slow
def test_all_runs_of_the_landscape_have_its_settings(files, settings_of):
    for name in "dpo", "kto", "ppo":
        config = settings_of[name]
        assert (config.init, config.steps, config.seed) == (str(files / "short"), 20, 5)
        assert config.beta == 0.7 and not config.save
    assert settings_of["dpo"].loss == "ipo"


@slow
def test_thumbs_and_pairs_are_the_same_answers(files, settings_of):
    assert settings_of["kto"].data == settings_of["dpo"].data == str(files / "preferences.jsonl")
    assert settings_of["kto"].batch == 2 * settings_of["dpo"].batch


@slow
def test_ppo_in_the_landscape_asks_its_own_prompts(settings_of):
    assert settings_of["ppo"].data == ppo.Config.data


# ---------------------------------------------------------------- online

def judged_and_learned(monkeypatch):
    """Two answers to each of three prompts, which name their prompt, and the second is better.
    -> [(prompt, text)] that were judged; prompts and pairs that are learned from"""
    prompts = [rows.Prompt(rows.to_messages(f"Ask {i}"), {"prompt": f"Ask {i}"}, "")
               for i in range(3)]
    judged = []

    def answer(policy, tokenizer, asked, n, *args, **settings):
        texts, examples = [], []
        for ids in asked:
            for end in "?", "!":
                texts.append(TOKENIZER.decode(ids).split("\n")[1].split("<")[0] + end)
                tail = TOKENIZER.encode_ordinary(end)
                examples.append(M.Example(ids + tail, [0] * len(ids) + [1] * len(tail)))
        ids, mask, answered = M.collate(examples, TOKENIZER, "cpu")
        return M.Samples(ids, mask, answered, None, torch.ones(len(ids)).bool(), texts)

    def score(asked, texts):
        judged.extend(zip(asked, texts, strict=True))
        return [float(text.endswith("!")) for text in texts]
    monkeypatch.setattr(online, "sample", answer)
    pairs = online.own_pairs(None, TOKENIZER, score, prompts, online.Config(), None)
    return judged, list(zip(prompts, pairs, strict=True))


def test_an_answer_is_judged_under_the_prompt_that_it_answers(monkeypatch):
    judged, _ = judged_and_learned(monkeypatch)
    assert len(judged) == 6
    assert all(text[:-1] == prompt.row["prompt"] for prompt, text in judged)


def test_of_two_own_answers_the_better_one_is_chosen(monkeypatch):
    _, learned = judged_and_learned(monkeypatch)
    for prompt, pair in learned:
        asked = TOKENIZER.decode(M.render_prompt(TOKENIZER, prompt.messages))
        assert texts_of([pair.chosen]) == {(asked, "!")}
        assert texts_of([pair.rejected]) == {(asked, "?")} and pair.row == prompt.row


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_online_answers_anew_in_each_round_with_the_policy_as_it_is(files, monkeypatch, rounds):
    asked = []

    def own_pairs(policy, tokenizer, score, prompts, config, generator):
        asked.append(weights(policy))
        pairs = []
        for prompt in prompts:
            good = M.render_answer(tokenizer, prompt.messages, "Yes.")
            bad = M.render_answer(tokenizer, prompt.messages, "No, not at all.")
            pairs.append(dpo.Pair(good, bad, prompt.row))
        return pairs
    monkeypatch.setattr(online, "own_pairs", own_pairs)
    online.learn(told(online.Config, files, steps=4, rounds=rounds), None)
    assert len(asked) == rounds
    for before, after in zip(asked, asked[1:]):
        assert not same(before, after)


def test_online_offline_learns_as_long_and_as_fast(files, monkeypatch):
    seen = []

    def train(config):
        seen.append(config)
        return {"after": {}}
    monkeypatch.setattr(dpo, "train", train)
    changes = {"steps": 7, "batch": 5, "lr": 0.25, "beta": 0.75, "seed": 4}
    config = told(online.Config, files, **changes)
    online.offline(config)
    for name in ("init", "data", *changes):
        assert getattr(seen[0], name) == getattr(config, name)


@pytest.fixture
def online_run(files, exams, monkeypatch):
    """-> run(**settings), whose learner moves as far as it has rounds"""
    def learn(config, score):
        policy, _ = load(config.init)
        return moved(policy, config.rounds), SimpleNamespace(rows=[{"rounds": config.rounds}])

    def run(**changes):
        config = told(online.Config, files, data="preferences", **{"steps": 7} | changes)
        return online.train(config, lambda prompts, texts: None)
    monkeypatch.setattr(online, "learn", learn)
    monkeypatch.setattr(online, "offline", lambda config: exam.exam(tiny_model(9), None)[0]
                        | {"kl": weight_of(config.init)})
    return run


def test_online_answers_anew_at_every_step_and_between_in_three_rounds(files, online_run):
    start = load(files / "short")[0]
    golds = {name: card["gold"] for name, card in online_run()["cards"].items()}
    assert golds == {"before": weight(start), "offline": weight(tiny_model(9)),
                     "3 rounds": weight(moved(start, 3)), "online": weight(moved(start, 7))}


def test_online_is_far_from_where_it_began(files, online_run):
    start = weight_of(files / "short")
    for name, card in online_run()["cards"].items():
        assert card["kl"] == start and card.get("against", start) == start, name


@slow
def test_after_and_the_log_of_online_are_the_freshest_run(online_run):
    results = online_run()
    assert results["after"] is results["cards"]["online"]
    assert results["log"] == [{"rounds": 7}]
    assert weight(results["model"]) == results["after"]["gold"]


@slow
def test_so_many_rounds_are_run_alone(files, online_run):
    results = online_run(rounds=2)
    assert list(results["cards"]) == ["before", "2 rounds"]
    assert results["after"]["gold"] == weight(moved(load(files / "short")[0], 2))


@slow
def test_online_keeps_the_model_of_its_last_run(files, online_run, tmp_path):
    results = online_run(save=True, out=str(tmp_path / "out"))
    assert weight_of(tmp_path / "out") == pytest.approx(weight(results["model"]), rel=1e-2)
    assert abs(weight_of(tmp_path / "out") - results["before"]["gold"]) > 100


@slow
def test_the_judge_of_online_is_the_one_that_was_named(files):
    scores = []
    prompts = [rows.Prompt(rows.to_messages("Hi"), {}, "")]
    for name in "reward", "reward_1":
        config = told(online.Config, files, judge=str(files / name))
        judge, _ = load_scalar(config.judge)
        scores.append(online.load_judge(config)(prompts, ["Yes."]).item())
        assert scores[-1] == best_of.reward(judge, TOKENIZER, prompts, ["Yes."]).item()
    assert scores[0] != scores[1]


# ---------------------------------------------------------------- kto

@pytest.fixture(scope="module")
def thumbed(files):
    """A run of kto.py: what was judged before and after, what was learned, what z was asked."""
    seen = SimpleNamespace(held=[], learned=[], others=[])
    evaluate, fixed_ratios, ratios = kto.evaluate, kto.fixed_ratios, kto.ratios

    def look(policy, reference, thumbs, *args):
        seen.held.append(thumbs)
        return evaluate(policy, reference, thumbs, *args)

    def look_at_others(policy, reference, examples, *args):
        seen.others.append(examples)
        return fixed_ratios(policy, reference, examples, *args)

    def look_at_learned(policy, reference, examples, *args):
        if torch.is_grad_enabled():
            seen.learned.extend(examples)
        return ratios(policy, reference, examples, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "exam", Exams())
        patch.setattr(kto, "evaluate", look)
        patch.setattr(kto, "fixed_ratios", look_at_others)
        patch.setattr(kto, "ratios", look_at_learned)
        config = told(kto.Config, files, data="preferences", steps=12, batch=16, lr=0.01)
        seen.results = kto.train(config)
    seen.start = weight_of(config.init)
    return seen


def test_kto_tells_good_from_bad_on_prompts_that_it_has_not_learned(thumbed):
    held = {prompt for prompt, _ in texts_of(thumb.judged for thumb in thumbed.held[1])}
    assert held and not held & {prompt for prompt, _ in texts_of(thumbed.learned)}


def test_before_and_after_are_of_the_same_thumbs(thumbed):
    before, after = thumbed.held
    assert before == after


@slow
def test_all_other_thumbs_are_learned_from(files, thumbed):
    count = 2 * len(rows.read_pairs(files / "preferences.jsonl"))
    learned = {tuple(example.ids) for example in thumbed.learned}
    assert len(learned) + len(thumbed.held[0]) >= 0.97 * count


def test_z_is_measured_on_answers_under_other_prompts(files):
    """The prompt is the thumb's own, and the answer was given to another one."""
    config = told(kto.Config, files, data="preferences")
    answers = {}
    for one in rows.read_judgements(config.data):
        [(prompt, answer)] = texts_of([M.render_answer(TOKENIZER, one.prompt, one.answer)])
        answers.setdefault(prompt, set()).add(answer)
    for thumb in sum(kto.read_thumbs(config, TOKENIZER, 256), []):
        [(prompt, answer)] = texts_of([thumb.mismatched])
        assert {prompt} == {own for own, _ in texts_of([thumb.judged])}
        assert answer not in answers[prompt]
        assert any(answer in others for others in answers.values())


@slow
def test_every_step_of_kto_asks_z_of_answers_to_other_prompts(files, thumbed):
    true = set()
    for judgement in rows.read_judgements(files / "preferences.jsonl"):
        true |= texts_of([M.render_answer(TOKENIZER, judgement.prompt, judgement.answer)])
    of_steps = thumbed.others[1:-1]                             # the first and last are evaluate's
    assert len(of_steps) == 12
    for examples in of_steps:
        prompts = {prompt for prompt, answer in texts_of(examples)}
        assert not texts_of(examples) & true and len(prompts) > 1


def test_kto_is_far_from_where_it_began(thumbed):
    before, after = thumbed.results["before"], thumbed.results["after"]
    assert (before["kl"], before["gold"]) == (thumbed.start, thumbed.start)
    assert (after["kl"], after["against"]) == (thumbed.start, thumbed.start)
    assert after["gold"] == weight(thumbed.results["model"]) != thumbed.start


@slow
def test_the_figure_of_kto_has_both_cards(thumbed):
    for key in "separation", "gold", "kl":
        for when in "before", "after":
            assert thumbed.results["numbers"][key][when] == thumbed.results[when][key]


def test_few_thumbs_up_are_judged_by_as_many_held_out_ones(files):
    config = told(kto.Config, files, data="preferences", share=0.1)
    few, held = kto.read_thumbs(config, TOKENIZER, 256)
    many, all_held = kto.read_thumbs(told(kto.Config, files, data="preferences"), TOKENIZER, 256)
    assert len(few) < len(many) and held == all_held


def test_the_share_of_kto_thins_out_the_good_thumbs_that_it_learns(files, exams, monkeypatch):
    learned = wrapped(monkeypatch, kto, "batches")
    kto.train(told(kto.Config, files, data="preferences", steps=1, share=0.2))
    thumbs = learned[0][0]
    assert sum(thumb.good for thumb in thumbs) < sum(not thumb.good for thumb in thumbs) / 2


@pytest.mark.parametrize("gold, passed", [(0.52, False), (0.54, True)])
def test_ktos_target_is_gold_above_that_of_the_start(files, exams, gold, passed):
    exams.golds = [0.5, gold]
    results = kto.train(told(kto.Config, files, data="preferences", steps=1))
    assert results["passed"] is passed


# ---------------------------------------------------------------- best_of

def likes_a(prompts, texts):
    return [float(text.count("a")) + len(text) / 1000 for text in texts]


def numbered(model, tokenizer, config, n, generator):
    """In place of best_of.ask(): n answers to each prompt, which are called 0 to n - 1."""
    prompts = rows.read_prompts(config.data)[:config.prompts]
    asked = [prompt for prompt in prompts for _ in range(n)]
    texts = [str(i % n) for i in range(len(asked))]
    return asked, texts, torch.ones(len(texts), dtype=torch.bool)


def likes(number):
    return lambda prompts, texts: [-abs(float(text) - number) for text in texts]


def answers_in(lines):
    return [json.loads(line)["messages"][-1]["content"] for line in lines.splitlines()]


@pytest.fixture
def chosen(files, exams, tmp_path, monkeypatch):
    """-> run(score, **settings). Who learns from best.jsonl moves by 2, from random.jsonl by 1."""
    runs = []

    def learn_from(path, config, **changes):
        name = Path(path).stem
        runs.append((name, changes))
        model = moved(load(config.init)[0], {"best": 2, "random": 1}[name])
        return {"model": model, "log": [{"step": 0, "loss": 1.0}]}

    def run(score=likes_a, **changes):
        settings = {"out": str(tmp_path), "n": 4, "prompts": 12, "max_new": 12}
        config = told(best_of.Config, files, **settings | changes)
        results = best_of.train(config, score)
        return results | {"kept": {name: (tmp_path / f"{name}.jsonl").read_text()
                                   for name in ("best", "random")}}
    monkeypatch.setattr(best_of, "learn_from", learn_from)
    run.runs = runs
    return run


def test_the_judge_has_no_say_in_the_control(chosen, monkeypatch):
    monkeypatch.setattr(best_of, "ask", numbered)
    controls = [answers_in(chosen(likes(number))["kept"]["random"]) for number in (0, 2)]
    assert controls[0] == controls[1] and len(set(controls[0])) > 2


def test_of_the_answers_to_each_prompt_the_judges_best_is_kept(chosen, monkeypatch):
    monkeypatch.setattr(best_of, "ask", numbered)
    assert answers_in(chosen(likes(2))["kept"]["best"]) == ["2"] * 12


@slow
def test_the_truth_has_no_say_in_the_best(chosen, monkeypatch):
    kept = chosen()["kept"]
    truth = best_of.truth
    monkeypatch.setattr(best_of, "truth", lambda *args: 1 - truth(*args))
    assert chosen()["kept"] == kept


def test_the_models_of_best_of_are_examined_by_name(files, chosen):
    start = load(files / "short")[0]
    results = chosen()
    want = {"before": weight(start), "random": weight(moved(start, 1)),
            "best": weight(moved(start, 2))}
    assert {name: card["gold"] for name, card in results["cards"].items()} == want
    assert results["numbers"]["models"] == want


def test_both_learners_of_best_of_are_far_from_where_they_began(files, chosen):
    start = weight_of(files / "short")
    cards = chosen()["cards"]
    for name in "random", "best":
        assert (cards[name]["kl"], cards[name]["against"]) == (start, start)


@slow
def test_the_control_is_not_kept(chosen):
    chosen()
    changes = dict(chosen.runs)
    assert changes["random"]["save"] is False and "save" not in changes["best"]


@pytest.mark.parametrize("golds, passed", [((0.9, 0.5, 0.6), True), ((0.1, 0.5, 0.55), False)])
def test_the_best_have_to_beat_the_control(chosen, exams, golds, passed):
    """It trained as long on the model's own words: what beats the start may be that alone."""
    exams.golds = golds                                         # before, random, best
    assert chosen()["passed"] is passed


@slow
@pytest.mark.parametrize("changes", [dict(n=2), dict(prompts=6), dict(max_new=3), dict(seed=1)])
def test_every_setting_of_best_of_changes_what_is_kept(chosen, changes):
    assert chosen(**changes)["kept"]["best"] != chosen()["kept"]["best"]


@slow
def test_the_judge_that_was_named_chooses(files, chosen, monkeypatch):
    asked = weights_given(monkeypatch, best_of, "reward")
    for name in "reward", "reward_1":
        chosen(None, judge=str(files / name))
    assert asked == [weight(load_scalar(files / name)[0]) for name in ("reward", "reward_1")]


@slow
def test_answers_are_learned_with_the_settings_of_the_run(files, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "train", seen.append)
    settings = dict(steps=3, batch=5, accumulate=2, lr=0.02, lora=4, seed=7, out="x")
    config = told(best_of.Config, files, **settings)
    best_of.learn_from("kept.jsonl", config, save=False)
    for name, value in (settings | {"init": config.init, "data": "kept.jsonl"}).items():
        assert getattr(seen[0], name) == value, name
    assert not seen[0].save


# ---------------------------------------------------------------- distill

def sure_model(seed):
    """A tiny model of strong opinions."""
    network = tiny_model(seed)
    with torch.no_grad():
        for p in network.parameters():
            p *= 4
    return network


def test_the_student_is_held_against_what_the_teacher_expects(files):
    """KL(teacher || student) at each token of the answers, by plain sums; the other KL is another
    number. Of no held-out conversation."""
    path = str(files / "sft.jsonl")
    teacher, student = sure_model(1), tiny_model(2)
    lines = rows.read_conversations(path)
    lines, _ = house.hold_out(lines, [line.messages[:-1] for line in lines], most=40)
    there, back, count = 0.0, 0.0, 0
    with torch.no_grad():
        for line in lines:
            ids, answer = M.render(TOKENIZER, line.messages)
            log_t = teacher(torch.tensor([ids]))[0].log_softmax(-1)         # (T, V)
            log_s = student(torch.tensor([ids]))[0].log_softmax(-1)
            for t in range(1, len(ids)):
                if answer[t]:
                    p, q = log_t[t - 1], log_s[t - 1]                       # (V,)
                    there += (p.exp() * (p - q)).sum().item()
                    back += (q.exp() * (q - p)).sum().item()
                    count += 1
    config = distill.Config(steps=1, batch=1000, lr=0.0, quiet=True)
    log = distill.learn_distribution(student, teacher, path, TOKENIZER, config)
    assert log.rows[0]["loss"] == pytest.approx(there / count, rel=1e-3)
    assert abs(there - back) > 0.01 * there and log.rows[0]["targets"] == count


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.1), dict(batch=4), dict(seed=1), dict(steps=1),
                                     dict(lora=2)])
def test_every_setting_of_distill_changes_the_student(files, changes):
    learned = []
    for more in {}, changes:
        config = distill.Config(**dict(steps=2, batch=8, quiet=True) | more)
        student = tiny_model(2)
        torch.manual_seed(0)
        distill.learn_distribution(student, tiny_model(1), str(files / "sft.jsonl"), TOKENIZER,
                                   config)
        learned.append(weights(student))
    assert not same(*learned)


@pytest.fixture
def distilled(files, exams, tmp_path, monkeypatch):
    """-> run(). The teacher is the model of few words, the student starts from another one."""
    answered = weights_given(monkeypatch, distill, "ask")
    seen = SimpleNamespace(answered=answered, paths=[], taught=[])

    def learn_from(path, config, **changes):
        seen.paths.append(path)
        return {"model": moved(load(config.init)[0], 1), "log": [{"loss": 1.0}]}

    def learn_distribution(student, teacher, path, tokenizer, config):
        seen.paths.append(path)
        seen.taught.append((weight(student), weight(teacher)))
        with torch.no_grad():
            student.embed.weight += 2
        log = house.Log(config)
        log.rows = [{"step": 0, "loss": 2.0}]
        return log

    def run(**changes):
        settings = {"init": str(files / "base"), "teacher": str(files / "short"), "prompts": 12,
                    "out": str(tmp_path), "max_new": 12}
        seen.results = distill.train(told(distill.Config, files, **settings | changes))
        return seen
    monkeypatch.setattr(distill, "learn_from", learn_from)
    monkeypatch.setattr(distill, "learn_distribution", learn_distribution)
    return run


@slow
def test_the_teacher_answers_and_both_students_read_it(files, distilled, tmp_path):
    seen = distilled()
    assert seen.answered == [weight_of(files / "short")]
    assert seen.paths == [f"{tmp_path}/teacher.jsonl"] * 2


@slow
def test_the_student_of_the_distribution_starts_from_init(files, distilled):
    assert distilled().taught == [(weight_of(files / "base"), weight_of(files / "short"))]


def test_the_students_are_examined_by_name(files, distilled):
    teacher, start = load(files / "short")[0], load(files / "base")[0]
    cards = distilled().results["numbers"]["cards"]
    assert {name: card["gold"] for name, card in cards.items()} == {
        "teacher": weight(teacher), "before": weight(start), "samples": weight(moved(start, 1)),
        "distribution": weight(moved(start, 2))}


def test_students_are_as_far_as_they_are_from_the_teacher(files, distilled):
    cards = distilled().results["cards"]
    for name in "before", "samples", "distribution":
        assert cards[name]["kl"] == weight_of(files / "short"), name


@slow
def test_the_curves_of_distill_have_their_names(distilled):
    numbers = distilled().results["numbers"]
    assert (numbers["samples"], numbers["distribution"]) == ([1.0], [2.0])


@slow
def test_distill_keeps_the_student_of_the_distribution(files, distilled, tmp_path):
    distilled(save=True)
    want = weight(moved(load(files / "base")[0], 2))
    assert weight_of(tmp_path) == pytest.approx(want, rel=1e-5)


def test_before_and_after_are_the_student_of_the_distribution(files, distilled):
    results = distilled().results
    start = load(files / "base")[0]
    golds = results["before"]["gold"], results["after"]["gold"]
    assert golds == (weight(start), weight(moved(start, 2)))


@pytest.mark.parametrize("gold, passed", [(0.84, False), (0.86, True)])
def test_distills_target_is_the_teachers_gold(distilled, exams, gold, passed):
    exams.golds = [0.9, 0.1, 0.1, gold]                 # teacher, before, samples, distribution
    assert distilled().results["passed"] is passed


@slow
@pytest.mark.parametrize("changes", [dict(prompts=6), dict(max_new=3), dict(seed=1)])
def test_every_setting_of_distill_changes_the_teachers_answers(distilled, tmp_path, changes):
    texts = []
    for more in {}, changes:
        distilled(**more)
        texts.append((tmp_path / "teacher.jsonl").read_text())
    assert texts[0] != texts[1]


# ---------------------------------------------------------------- forgetting

@pytest.fixture
def forgot(files, exams, tmp_path, monkeypatch):
    """-> run(**settings). What was learned from, by the share of old answers in it; the more of
    them, the farther a learner moves."""
    seen = SimpleNamespace(learned={}, told=[])

    def learn_from(path, config, **changes):
        lines = rows.read_conversations(path)
        seen.learned[Path(path).stem.removeprefix("mixed_")] = lines
        seen.told.append((config, changes))
        return {"model": moved(load(config.init)[0], 1 + len(lines)), "log": []}

    def run(**changes):
        settings = {"shares": "0 0.25", "prompts": 24, "out": str(tmp_path), "max_new": 12,
                    "new": str(files / "talks.jsonl")}
        config = told(forgetting.Config, files, **settings | changes)
        seen.results = forgetting.train(config)
        seen.new = [json.loads(line)["messages"] for line in forgetting.harmless(config.new)]
        seen.old = [line.messages for line in rows.read_conversations(tmp_path / "old.jsonl")]
        return seen
    monkeypatch.setattr(forgetting, "learn_from", learn_from)
    return run


def test_without_rehearsal_no_old_answer_is_learned(forgot):
    seen = forgot()
    assert [line.messages for line in seen.learned["0"]] == seen.new


def test_a_share_of_old_answers_joins_all_of_the_new_ones(forgot):
    seen = forgot()
    messages = [line.messages for line in seen.learned["0.25"]]
    assert messages[:len(seen.new)] == seen.new
    count = len(messages) - len(seen.new)
    assert messages[len(seen.new):] == seen.old[:count] and count / len(messages) == \
        pytest.approx(0.25, abs=0.03)


@slow
def test_nobody_asks_for_anything_bad_in_the_new_data(files, forgot):
    kinds = {world.flat(line.messages[:-1]): line.row["kind"]
             for line in rows.read_conversations(files / "talks.jsonl")}
    seen = forgot()
    assert {kinds[world.flat(messages[:-1])] for messages in seen.new} == {"math", "fact", "chat"}


@slow
def test_old_answers_are_those_of_the_model_before(files, forgot, monkeypatch):
    asked = weights_given(monkeypatch, forgetting, "ask")
    forgot()
    assert asked == [weight_of(files / "short")]


def test_every_share_of_forgetting_has_its_own_card(files, forgot):
    seen = forgot()
    start = load(files / "short")[0]
    want = [weight(start)]
    for share in "0", "0.25":
        want.append(weight(moved(start, 1 + len(seen.learned[share]))))
    numbers = seen.results["numbers"]
    assert (numbers["shares"], numbers["gold"], numbers["math"]) == ([0, 0.25], want, want)


def test_what_is_forgotten_is_far_from_the_aligned_model(files, forgot):
    start = weight_of(files / "short")
    for name, card in forgot().results["cards"].items():
        assert card["kl"] == start and card.get("against", start) == start, name


@slow
def test_every_run_of_forgetting_has_its_settings(files, forgot):
    for config, changes in forgot(steps=7, lr=0.02, seed=3).told:
        assert (config.init, config.steps, config.lr) == (str(files / "short"), 7, 0.02)
        assert changes == {"save": False}


# ---------------------------------------------------------------- judge_bias

@pytest.fixture(scope="module")
def mending(files):
    """A run of judge_bias.py: what it was mended on, what it was probed with, what its report is
    about; and whose numbers stand where."""
    seen = SimpleNamespace(votes=[], ties=[], probes=[], reported=[], mending=False)
    mend, scores = judge_bias.mend, judge_bias.scores
    with_answers, report_of = judge_bias.with_answers, judge_bias.report

    def look_at_mending(*args):
        seen.mending = True
        mended = mend(*args)
        seen.mending = False
        return mended

    def look_at_changed(comparison, answers, tokenizer):
        changed = with_answers(comparison, answers, tokenizer)
        (seen.ties if seen.mending else seen.probes).append(changed)
        return changed

    def look_at_scores(model, comparisons, tokenizer):
        seen.votes.extend(comparisons)
        return scores(model, comparisons, tokenizer)

    def look_at_report(r, held):
        seen.reported.append(held)
        return report_of(r, held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_bias, "mend", look_at_mending)
        patch.setattr(judge_bias, "with_answers", look_at_changed)
        patch.setattr(judge_bias, "scores", look_at_scores)
        patch.setattr(judge_bias, "report", look_at_report)
        config = mending_config(files, steps=4, most=5)
        seen.results = judge_bias.train(config)
    seen.before = load_scalar(config.init)[0]
    return seen


def mending_config(files, **changes):
    settings = {"init": str(files / "reward"), "batch": 32, "lr": 0.02}
    return told(judge_bias.Config, files, data="preferences", **settings | changes)


def openings(probes):
    """The compliments that stand before answers."""
    found = set()
    for probe in probes:
        changed, text = probe.answers
        if changed.endswith(f" {text}") and world.praise(changed) > world.praise(text):
            found.add(changed.removesuffix(f" {text}"))
    return found


def test_the_compliments_of_the_probe_were_not_mended_away(mending):
    assert openings(mending.ties) and openings(mending.probes)
    assert not openings(mending.ties) & openings(mending.probes)


def test_what_is_probed_was_not_learned_from(mending):
    learned = prompts_of(mending.ties) | prompts_of(mending.votes)
    assert mending.probes and not learned & prompts_of(mending.probes)


def test_the_report_on_a_judge_is_of_held_out_votes(mending):
    assert len(mending.reported) == 3                           # at the start, before, mended
    for held in mending.reported:
        assert held and not prompts_of(held) & prompts_of(mending.votes)


def test_half_of_what_mends_a_judge_are_votes(mending):
    ties = [one for one in mending.votes if any(one is tie for tie in mending.ties)]
    assert len(ties) == len(mending.ties) == len(mending.votes) / 2


@slow
def test_who_is_complimented_already_is_no_probe(mending):
    texts = [one.answers[1] for one in mending.ties + mending.probes]
    assert not any(map(world.praise, texts))


@slow
def test_so_many_answers_are_changed_by_each_probe(mending):
    assert len(openings(mending.probes)) == 3
    flattered = [probe for probe in mending.probes if openings([probe])]
    assert len(mending.probes) - len(flattered) == 4 * 5        # padded and swapped, of two judges


def test_before_is_the_judge_that_was_named_and_mended_is_the_other(files, mending):
    numbers = mending.results["numbers"]
    mended = mending.results["model"]
    assert weight(mended) != weight(mending.before)
    _, held = reward_model.read_comparisons(mending_config(files), TOKENIZER, 256)
    plain = [one for one in held if world.praise(one.answers[0]) == 0][:5]
    for name, judge in {"before": mending.before, "mended": mended}.items():
        again = judge_bias.examine(judge, held, plain, TOKENIZER)
        assert numbers[name]["probes"]["flattery"]["score"] == pytest.approx(
            again["probes"]["flattery"]["score"], abs=1e-5), name
        assert numbers[name]["accuracy"] == pytest.approx(again["accuracy"]), name
    assert numbers["before"]["probes"] != numbers["mended"]["probes"]
    assert numbers["credit"]["before"] != numbers["credit"]["mended"]


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.1), dict(batch=8), dict(steps=2), dict(seed=1)])
def test_every_setting_of_judge_bias_changes_the_mended_judge(files, changes):
    learned = []
    for more in {}, changes:
        config = mending_config(files, **{"steps": 3} | more)
        judge, tokenizer = load_scalar(config.init)
        comparisons, _ = reward_model.read_comparisons(config, tokenizer, 256)
        learned.append(weights(judge_bias.mend(judge, comparisons, tokenizer, config)))
    assert not same(*learned)


# ---------------------------------------------------------------- process_reward

@pytest.mark.parametrize("judge, labels", [("outcome", [0] * 8), ("process", [0, 1] * 8)])
def test_a_judge_of_solutions_learns_the_labels_of_its_places(files, monkeypatch, judge, labels):
    """The outcome judge the last one of each solution, the process judge all of them."""
    lines = []
    for i in range(24):
        lines.append({"prompt": f"What is {i} + 2?", "steps": [f"First {i} + 1.", f"It is {i}."],
                      "labels": [1, 0]})
    (files / "two_steps.jsonl").write_text(rows.json_lines(lines))
    taught = wrapped(monkeypatch, process_reward, "outcome_loss")
    process_reward.train_judge(told(process_reward.Config, files, data="two_steps", steps=1), judge)
    [(_, learned)] = taught
    assert sorted(learned.tolist()) == sorted(labels)


@slow
def test_an_outcome_judge_learns_whether_the_result_is_right(files):
    config = told(process_reward.Config, files, data="steps")
    truth = {}
    for line in rows.read_solutions(config.data):
        is_right = process_reward.result_of(line.steps[-1]) == line.row["answer"]
        truth[world.flat(line.prompt), tuple(line.steps)] = is_right
    slips = 0
    for solution in sum(process_reward.read_solutions(config, TOKENIZER, 256, "outcome"), []):
        is_right = truth[world.flat(solution.prompt), tuple(solution.steps)]
        assert solution.labels == [int(is_right)]
        slips += not is_right
    assert 0 < slips < len(truth)


@slow
def test_both_judges_learn_from_the_same_solutions(files):
    config = told(process_reward.Config, files, data="steps")
    sides = []
    for judge in "outcome", "process":
        both = process_reward.read_solutions(config, TOKENIZER, 256, judge)
        sides.append([[solution.steps for solution in side] for side in both])
    assert sides[0] == sides[1]


@pytest.fixture
def picked(files, monkeypatch):
    """Of two sums eight solutions each: what is shown to both judges."""
    rng = Random(0)
    sums = [world.ask(rng, "math", "exam") for _ in range(2)]
    texts = []
    for row in sums:
        texts += [" ".join(world.worked(rng, row)[0])[6:]] * 8
    shown = {}

    def look(name, examples, tokenizer):
        shown[name] = examples
        return [torch.zeros(sum(example.answer)) for example in examples]
    monkeypatch.setattr(process_reward, "sample", lambda *a, **k: SimpleNamespace(texts=texts))
    monkeypatch.setattr(process_reward, "score_lists", look)
    monkeypatch.setattr(process_reward, "marks_in_words",
                        lambda critic, tokenizer, solved: [[1.0] for _ in solved])
    config = told(process_reward.Config, files, problems=2)
    judges = {"outcome": "outcome", "process": "process"}
    attempts = process_reward.attempts_at_sums(tiny_model(0), TOKENIZER, config)
    process_reward.best_of(attempts, judges, None, TOKENIZER)
    return shown


def test_an_outcome_judge_picks_as_it_learned_by_the_end_alone(picked):
    assert len(picked["outcome"]) == 16
    for example in picked["outcome"]:
        assert sum(example.answer) == example.answer[-1] == 1


def test_a_process_judge_picks_by_every_step(picked):
    for example in picked["process"]:
        text = TOKENIZER.decode(example.ids).split("assistant\n")[-1]
        assert sum(example.answer) == text.count(". ") + 1 > 1


@pytest.fixture
def process_run(files, tmp_path, monkeypatch):
    """-> run(majority), in which judges are made by hand, and picks say who made them. The majority
    picks so many right ones, and the process judge 0.8."""
    seen = SimpleNamespace()
    accuracies = {"outcome": (0.1, 0.2), "process": (0.3, 0.4)}
    config = told(process_reward.Config, files, data="steps", critic=str(files / "base"), save=True,
                  out=str(tmp_path))
    truth = {tuple(line.steps): line.labels for line in rows.read_solutions(config.data)}

    def train_judge(config, judge):
        network = M.ScalarModel(tiny_model(len(judge) + (judge == "process")))
        log = house.Log(config)
        log.rows = [{"step": 0, "loss": 1.0, "judge": judge}]
        cards = [{"accuracy": share, "calibration": 0.1, "first_wrong": 0.9, "all_right": 0.9}
                 for share in accuracies[judge]]
        seen.__dict__[judge] = weight(network)
        _, held = process_reward.read_solutions(config, TOKENIZER, 256, judge)
        return network, log, *cards, held

    def in_words(critic, tokenizer, solved):
        seen.marked = weight(critic)
        seen.solved = solved
        return [truth[tuple(sentences)] for _, sentences in solved]

    def run(majority=0.7):
        def attempts(policy, tokenizer, config):
            seen.policy = weight(policy)

        def picks(attempts, judges, critic, tokenizer):
            seen.critic = weight(critic)
            seen.judges = {name: weight(judge) for name, judge in judges.items()}
            return {"random": 0.5, "any": 1.0, "by_majority": majority, "by_outcome": 0.6,
                    "by_process": 0.8, "by_words": 0.9}
        monkeypatch.setattr(process_reward, "attempts_at_sums", attempts)
        monkeypatch.setattr(process_reward, "best_of", picks)
        seen.results = process_reward.train(config)
        return seen
    monkeypatch.setattr(process_reward, "train_judge", train_judge)
    monkeypatch.setattr(process_reward, "marks_in_words", in_words)
    return run


@pytest.fixture
def processed(process_run):
    return process_run()


def test_each_judge_picks_under_its_name(processed):
    assert processed.judges == {"outcome": processed.outcome, "process": processed.process}
    assert processed.outcome != processed.process


@slow
def test_the_policy_solves_and_the_critic_marks(files, processed):
    assert processed.policy == weight_of(files / "short")
    assert processed.critic == processed.marked == weight_of(files / "base")


@slow
def test_the_cards_of_process_reward_are_the_process_judges(processed):
    numbers = processed.results["numbers"]
    assert (numbers["before"]["accuracy"], numbers["after"]["accuracy"]) == (0.3, 0.4)
    assert numbers["after"]["outcome_accuracy"] == 0.2
    assert processed.results["log"][0]["judge"] == "process"


@pytest.mark.parametrize("majority, passed", [(0.7, True), (0.9, False)])
def test_the_process_judge_has_to_pick_better_than_the_majority(process_run, majority, passed):
    assert process_run(majority).results["passed"] is passed


@slow
def test_the_process_judge_is_kept(processed, tmp_path):
    assert weight(load_scalar(tmp_path)[0]) == pytest.approx(processed.process, rel=1e-5)


@slow
def test_marks_in_words_are_of_held_out_solutions(files, processed):
    config = told(process_reward.Config, files, data="steps")
    learned, held = process_reward.read_solutions(config, TOKENIZER, 256, "process")
    asked = {world.flat(prompt) for prompt, _ in processed.solved}
    assert asked == prompts_of(held) and not asked & prompts_of(learned)


@slow
@pytest.mark.parametrize("judge", ["outcome", "process"])
def test_judges_of_solutions_are_judged_on_held_out_ones(files, monkeypatch, judge):
    learned, evaluated = set(), []
    scores = process_reward.scores

    def look(model, examples, tokenizer):
        if torch.is_grad_enabled():
            learned.update(TOKENIZER.decode(example.ids) for example in examples)
        return scores(model, examples, tokenizer)

    def evaluate(model, held, tokenizer):
        evaluated.append({TOKENIZER.decode(solution.example.ids) for solution in held})
        return {}
    monkeypatch.setattr(process_reward, "scores", look)
    monkeypatch.setattr(process_reward, "evaluate", evaluate)
    config = told(process_reward.Config, files, data="steps", steps=6)
    held = process_reward.train_judge(config, judge)[-1]
    before, after = evaluated
    assert before == after and learned and not learned & after
    assert {TOKENIZER.decode(solution.example.ids) for solution in held} == after


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.1), dict(batch=4), dict(steps=2), dict(seed=1),
                                     dict(lora=2), dict(held=2)])
def test_every_setting_of_process_reward_changes_the_judge(files, monkeypatch, changes):
    monkeypatch.setattr(process_reward, "evaluate", lambda *args: {})
    learned = []
    for more in {}, changes:
        config = told(process_reward.Config, files, data="steps", **{"steps": 3} | more)
        learned.append(weights(process_reward.train_judge(config, "process")[0]))
    assert not same(*learned)


# ---------------------------------------------------------------- report

@pytest.mark.parametrize("better, star", [(8, False), (9, True)])
def test_a_star_is_twelve_times_surer_than_one_in_twenty(capsys, better, star):
    """Of 8 changes that are all rises, p = 2 / 2^8 = 0.008; of 9 it is 0.004, below 0.05 / 12."""
    before = np.zeros(40)
    after = np.zeros(40)
    after[:better] = 1
    marks = {}
    for folder, values in {"a": before, "b": after}.items():
        marks[folder] = {line.name: values for line in report.ROWS}
    report.show_card(marks, report.Config())
    lines = [line for line in capsys.readouterr().out.split("\n") if " p " in line]
    assert len(lines) == 12
    assert all(line.endswith("*") == star for line in lines)


def leak(files, exams, tmp_path, monkeypatch):
    """An exam leaks into SFT; who learned from it has moved."""
    seen = SimpleNamespace(asked=exams.asked)

    def train(config):
        seen.config = config
        seen.learned = rows.read_conversations(config.data)
        return {"model": moved(load(config.init)[0], 1)}
    monkeypatch.setattr(sft, "train", train)
    config = told(report.Config, files, out=str(tmp_path), leak=17, seed=3)
    seen.golds = report.contaminate(config, str(files / "base"))
    return seen


@pytest.fixture
def leaking(files, exams, tmp_path, monkeypatch):
    return leak(files, exams, tmp_path, monkeypatch)


def test_a_reworded_sum_is_none_that_leaked(leaking):
    leaked, _, reworded, *_ = leaking.asked
    learned = {world.flat(line.messages[:1]) for line in leaking.learned}
    assert {row["prompt"] for row in leaked} < learned
    assert not learned & {row["prompt"] for row in reworded}
    for row, other in zip(leaked, reworded, strict=True):
        assert row["slots"] == other["slots"] and row["answer"] == other["answer"]


def test_the_clean_half_is_not_learned(leaking):
    clean, learned = leaking.asked[4], leaking.asked[0]
    sums = {str(row["slots"]["numbers"]) for row in learned}
    assert len(clean) == 100 and not sums & {str(row["slots"]["numbers"]) for row in clean}


@slow
def test_what_leaks_are_the_right_results(leaking):
    texts = {world.flat(line.messages[:1]): line.messages[1] for line in leaking.learned}
    for row in leaking.asked[0]:
        assert world.judge(row, texts[row["prompt"]]["content"])["honest"] == 1


def test_the_leaked_half_is_what_sft_learns_of_it(leaking):
    lines = leaking.learned
    learned, _ = house.hold_out(lines, [line.messages[:-1] for line in lines], most=40)
    assert len(lines) == report.Config.leaked
    assert [row["prompt"] for row in leaking.asked[0]] == \
           [world.flat(line.messages[:1]) for line in learned]


def test_the_leak_is_told_before_and_after_of_each_part(files, exams, tmp_path, monkeypatch):
    exams.golds = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    golds = leak(files, exams, tmp_path, monkeypatch).golds
    assert golds == {"leaked": [0.1, 0.2], "reworded": [0.3, 0.4], "clean": [0.5, 0.6]}


def test_before_and_after_a_leak_are_the_checkpoint_and_who_learned_it(files, leaking):
    start = load(files / "base")[0]
    golds = [weight(start), weight(moved(start, 1))]
    assert leaking.golds == {"leaked": golds, "reworded": golds, "clean": golds}


@slow
def test_the_leak_is_learned_with_the_settings_of_the_run(files, leaking):
    config = leaking.config
    assert (config.init, config.steps, config.seed) == (str(files / "base"), 17, 3)
    assert not config.save


@pytest.fixture
def reported(files, exams, tmp_path, monkeypatch):
    """A report on two checkpoints, in which every mark is the weight of who wrote the answer."""
    def measure(answers):
        return {row.name: np.array([float(answer.text) for answer in answers])
                for row in report.ROWS}
    seen = SimpleNamespace(leaks=[], worded=[])

    def contaminate(config, folder):
        seen.leaks.append(folder)
        return {"leaked": [0.5, 0.9]}

    def consistency(model, tokenizer, lines, most):
        seen.worded.append(lines)
        return {"always": weight(model)}
    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report, "consistency", consistency)
    monkeypatch.setattr(report, "contaminate", contaminate)
    monkeypatch.setattr(report, "failure", lambda answer: answer.text)
    config = told(report.Config, files, init=str(files / "init"), against=str(files / "base"),
                  out=str(tmp_path), card=True)
    seen.numbers = report.train(config)["numbers"]
    return seen


def test_each_column_of_the_report_is_its_checkpoint(files, reported):
    numbers = reported.numbers
    want = {str(files / name): pytest.approx(weight_of(files / name)) for name in ("init", "base")}
    for row in report.ROWS:
        assert numbers["card"][row.name] == want, row.name
    assert {folder: shares["always"] for folder, shares in numbers["wording"].items()} == want


@slow
def test_each_failure_is_counted_for_who_failed(files, reported):
    for folder in "init", "base":
        counts = reported.numbers["failures"][repr(weight_of(files / folder))]
        others = [count for name, count in counts.items() if name != str(files / folder)]
        assert counts[str(files / folder)] > 0 and others == [0]


def test_both_checkpoints_answered_the_same_exam(reported, exams):
    assert len(exams.asked) == 2 and exams.asked[0] == exams.asked[1]


def test_the_wordings_are_asked_of_the_exams_own_requests(reported, exams):
    assert reported.worded == exams.asked == [world.read("exam")] * 2


@slow
def test_the_leak_and_the_model_card_are_of_the_last_checkpoint(files, reported, tmp_path):
    assert reported.leaks == [str(files / "base")]
    card = (tmp_path / "CARD.md").read_text()
    assert f"# Model card: {files / 'base'}" in card
    assert f"{weight_of(files / 'base'):.2f}" in card
    assert f"{weight_of(files / 'init'):.2f}" not in card


@slow
def test_another_wording_is_asked_of_the_same_requests(monkeypatch):
    """Who answers the first wording of each alone does it sometimes."""
    some = [row for row in world.read("exam") if report.has_wordings(row)][:6]
    firsts = {report.wordings(row)[0]["prompt"] for row in some}

    def ask(model, tokenizer, asked, temperature):
        return None, [SimpleNamespace(mark={"gold": float(row["prompt"] in firsts)})
                      for row in asked]
    monkeypatch.setattr(exam, "ask", ask)
    assert report.consistency(None, None, some, 6) == {"always": 0, "sometimes": 1, "never": 0}
