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
from lessons.test_half_two import config_of, folders, note, tiny_model  # noqa: F401, a fixture
from test_all import ends_soon, kl_of, same, slow, weights, write_lines

TOKENIZER = load_ranks()


# ---------------------------------------------------------------- what the tests share

def weight(network):
    """One number that tells a model from any other."""
    sizes = []
    for p in network.parameters():
        size = p.detach().double().abs().sum()
        sizes.append(size.item())
    return sum(sizes)


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
        gold = weight(model)
        if self.golds:
            gold = self.golds[len(self.asked)]
        some = rows or world.read("exam")[::150]
        self.asked.append(some)
        card = dict.fromkeys(exam.CARD, 0.5)
        del card["kl"]
        card["seed"] = seed
        for key in "gold", "math", "math_greedy":
            card[key] = gold
        if reference is not None:
            card["kl"] = weight(reference)
        if against is not None:
            card["against"] = float(against[0].text)
        text = repr(weight(model))
        answers = []
        for row in some:
            mark = world.judge(row, text)
            answers.append(exam.Answer(row, text, True, mark))
        return card, answers


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
        lines = world.read(name)
        write_lines(folders / f"{name}.jsonl", lines[:count])
    talks = {}
    for row in world.read("sft"):
        talks.setdefault(row["kind"], []).append(row)
    lines = []
    for some in talks.values():
        lines += some[:5]                                       # of each kind
    write_lines(folders / "talks.jsonl", lines)
    return folders


def told(Config, files, data="prompts", **changes):
    """The settings of a small and silent run."""
    init = str(files / "short")
    path = str(files / f"{data}.jsonl")
    settings = {"init": init, "data": path, "quiet": True}
    settings.update(changes)
    return config_of(Config, files, **settings)


def weight_of(folder):
    return weight(load(folder)[0])


def golds_of(cards):
    return {name: card["gold"] for name, card in cards.items()}


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
    lengths = [float(len(text)) for text in texts]
    help = torch.tensor(lengths)
    harm = torch.full([len(texts)], 0.5)
    return help, harm


@pytest.fixture(scope="module")
def prices(files):
    """The price of harm in each of the three ways, batch after batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "exam", Exams())
        patch.setattr(safe, "load_judges", lambda config: harms_half)
        config = told(safe.Config, files, steps=2, guess=3.0, price=2.0, rate=0.5, limit=0.1)
        _, logs = safe.compare(config)
    found = {}
    for name, log in logs.items():
        found[name] = [row["price"] for row in log]
    return found


def test_whoever_wants_help_alone_pays_nothing_for_harm(prices):
    assert max(prices["free"]) < 1e-6


def test_the_price_in_one_score_stays_at_its_guess(prices):
    assert prices["one_score"] == pytest.approx([3.0, 3.0])


def test_the_price_of_a_limit_is_found_by_the_run(prices):
    """ln price goes up by rate * price * (harm - limit)."""
    too_much = 0.5 - 0.1
    log_price = math.log(2.0) + 0.5 * 2.0 * too_much
    first = math.exp(log_price)
    log_price += 0.5 * first * too_much
    second = math.exp(log_price)
    assert prices["limit"] == pytest.approx([first, second], rel=1e-4)


@pytest.fixture
def safe_run(files, exams, monkeypatch):
    """A run in which nothing is learned but who it was; marks of help say who wrote the answer."""
    def climb(policy, tokenizer, score, price, rate, config):
        with torch.no_grad():
            policy.embed.weight += 1 + price
        return [{"price": price, "harm": price / 100}]

    def marks_of(row, text):
        return {"helpful": float(text)}
    monkeypatch.setattr(safe, "climb", climb)
    monkeypatch.setattr(safe, "load_judges", lambda config: None)
    monkeypatch.setattr(safe, "marks_of", marks_of)
    config = told(safe.Config, files, guess=3.0, price=2.0)
    return safe.train(config)


def safe_weight(files, price):
    start, _ = load(files / "short")
    learner = moved(start, 1 + price)
    return weight(learner)


def test_each_way_of_safe_is_examined_itself(files, safe_run):
    start = weight_of(files / "short")
    free = safe_weight(files, safe.LEAST)
    one_score = safe_weight(files, 3.0)
    limit = safe_weight(files, 2.0)
    want = {"before": start, "free": free, "one_score": one_score, "limit": limit}
    golds = golds_of(safe_run["numbers"]["cards"])
    assert golds == pytest.approx(want)


def test_what_helped_is_marked_on_the_same_answers_as_gold(safe_run):
    cards = safe_run["numbers"]["cards"]
    for card in cards.values():
        assert card["helped"] == pytest.approx(card["gold"])


def test_the_ways_of_safe_are_as_far_as_they_went_from_the_start(files, safe_run):
    start = weight_of(files / "short")
    for name in "before", "free", "one_score", "limit":
        card = safe_run["cards"][name]
        assert card["kl"] == start
        if name != "before":
            assert card["against"] == start


@slow
def test_the_figure_of_safe_shows_the_price_of_the_limit(safe_run):
    numbers = safe_run["numbers"]
    assert numbers["price"] == [2.0]
    harms = {}
    for name, harm in numbers["harm"].items():
        harms[name] = round(harm[0], 6)
    assert harms == {"free": 0.0, "one_score": 0.03, "limit": 0.02}


@slow
def test_harm_is_what_the_head_of_harmless_denies(files, monkeypatch):
    harmful = [1.0, -30.0, 2.0]                                 # helpful, harmless, honest
    harmless = [1.0, 30.0, 2.0]
    more_helpful = [5.0, 30.0, 2.0]
    more_honest = [1.0, 30.0, 7.0]
    r = torch.tensor([harmful, harmless, more_helpful, more_honest])        # (4, 3)

    def score_by(judge, tokenizer):
        return lambda prompts, texts: r
    monkeypatch.setattr(ppo, "score_by", score_by)
    config = told(safe.Config, files, judges=str(files / "judges"))
    score = safe.load_judges(config)
    help, harm = score(None, None)                              # (4,), (4,)
    assert harm.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert help[0] == help[1]
    assert help[2] > help[1]
    assert help[3] > help[1]


def safe_climb(files, score=harms_half, price=1.0, rate=1.0, **changes):
    """-> the weights of a policy that has climbed"""
    settings = {"steps": 3} | changes
    config = told(safe.Config, files, **settings)
    policy, tokenizer = load(config.init)
    safe.climb(policy, tokenizer, score, price, rate, config)
    return weights(policy)


@pytest.fixture(scope="module")
def plain_climb(files):
    return safe_climb(files, harms_some)


def harms_some(prompts, texts):
    help, _ = harms_half(prompts, texts)
    harm = [len(text) % 3 / 2 for text in texts]
    return help, torch.tensor(harm)


@slow
@pytest.mark.parametrize("changes", [dict(price=9.0), dict(rate=9.0), dict(limit=0.9), dict(lr=0.1),
                                     dict(beta=9.0), dict(batch=16), dict(seed=1), dict(steps=2),
                                     dict(data="sft")])
def test_every_setting_of_safe_changes_what_is_learned(files, plain_climb, changes):
    if changes.get("data") == "sft":
        prompts = world.read("prompts")[40:60]
        write_lines(files / "math.jsonl", prompts)
        changes = {"data": "math"}
    learned = safe_climb(files, harms_some, **changes)
    assert not same(learned, plain_climb)


@slow
def test_four_answers_in_a_row_have_one_prompt(files):
    """RLOO holds each four against one another."""
    asked = []

    def score(prompts, texts):
        asked.append([world.flat(prompt) for prompt in prompts])
        return harms_half(prompts, texts)
    safe_climb(files, score, steps=1, batch=16)
    batch = asked[0]
    for i in range(0, 16, 4):
        four = set(batch[i:i + 4])
        assert len(four) == 1
    assert len(set(batch[:16])) > 1


# ---------------------------------------------------------------- race

def some_are_right(truth, text, ended):
    rewards = [1.0, 0.1, 0.0]
    return rewards[len(text) % 3]


def race_climb(name, files, **changes):
    """Eight answers a batch, of 72 tokens each as this model hardly ever ends: two batches."""
    settings = {"init": str(files / "init"), "tokens": 1000}
    settings.update(changes)
    config = told(race.Config, files, **settings)
    return race.climb(name, config)


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
    sums = [row for row in world.read("prompts") if row["kind"] == "math"]
    write_lines(files / "math_only.jsonl", sums[12:24])
    torch.manual_seed(0)
    policy, _, _ = race_climb("ppo", files, **changes)
    assert not same(weights(policy), plain_race)


@pytest.mark.parametrize("name", race.RACERS)
def test_the_budget_of_the_race_counts_sampled_tokens_alone(files, monkeypatch, name):
    """Prompts are free."""
    drawn = []

    def look(*args, **settings):
        samples = M.sample(*args, **settings)
        drawn.append(int(samples.answer.sum()))
        return samples
    monkeypatch.setattr(race, "sample", look)
    _, _, curve = race_climb(name, files)
    sampled = [tokens for tokens, right in curve]
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
@pytest.mark.parametrize("changes, rate", [
    (dict(lr=0.03), 0.03),
    (dict(critic_lr=0.02), ppo.ALGORITHMS["ppo"].lr)])
def test_a_racer_learns_at_his_own_rate_unless_told(files, monkeypatch, changes, rate):
    optimizers = wrapped(monkeypatch, race, "adamw")
    race_climb("ppo", files, **changes)
    rates = {type(network): lr for network, lr in optimizers}
    assert rates[M.Transformer] == rate


@slow
@pytest.mark.parametrize("name", race.RACERS)
def test_every_racer_draws_as_many_answers_at_a_time(files, monkeypatch, name):
    counts = []

    def look(policy, tokenizer, prompts, n, *args, **settings):
        counts.append((len(prompts), n))
        return M.sample(policy, tokenizer, prompts, n, *args, **settings)
    monkeypatch.setattr(race, "sample", look)
    race_climb(name, files)
    group = race.RACERS[name].group
    assert set(counts) == {(8 // group, group)}


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
    _, _, curve = race_climb("rloo", files)
    shares = {share for tokens, share in curve}
    assert shares == {right}


@pytest.fixture
def race_run(files, exams, monkeypatch):
    def climb(name, config):
        policy, tokenizer = load(config.init)
        place = list(race.RACERS).index(name) + 1
        learner = moved(policy, place)
        curve = [(500, 0.1), (1000 * place, 0.1 + place / 5)]
        return learner, tokenizer, curve
    monkeypatch.setattr(race, "climb", climb)
    config = told(race.Config, files, tokens=4000, goal=0.4)
    results = race.train(config)
    return results["numbers"], exams.asked


def test_the_exam_of_a_racer_is_his_own(files, race_run):
    numbers, _ = race_run
    start, _ = load(files / "short")
    for place, name in enumerate(race.RACERS, 1):
        learner = moved(start, place)
        assert numbers["greedy"][name] == weight(learner)


def test_racers_are_examined_in_sums(race_run):
    _, asked = race_run
    assert len(asked) == 4
    for lines in asked:
        for row in lines:
            assert row["kind"] == "math"


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
    results = landscape.train(config)
    return results["numbers"]


def test_a_third_of_the_noisy_labels_is_really_wrong(files, learned, tmp_path):
    landscaped(files, tmp_path, scenario="noisy")
    [data] = {changes["data"] for changes in learned.values()}
    before = rows.read_pairs(files / "preferences.jsonl")
    after = rows.read_pairs(data)
    turned = 0
    for old, new in zip(before, after, strict=True):
        assert new.prompt == old.prompt
        assert {new.chosen, new.rejected} == {old.chosen, old.rejected}
        assert new.row["kind"] == old.row["kind"]               # the rest of a line stays
        if new.chosen == old.rejected:
            turned += 1
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
    noise = {}
    for name, changes in learned.items():
        noise[name] = changes.get("noise")
    assert noise == {"dpo": None, "robust": 1 / 3, "ipo": None}


def test_few_are_two_hundred_pairs_for_all(files, learned, tmp_path):
    lines = world.read("preferences")[:230]
    write_lines(files / "many.jsonl", lines)
    landscaped(files, tmp_path, data="many", scenario="few")
    [data] = {changes["data"] for changes in learned.values()}
    pairs = rows.read_pairs(data)
    few = [pair.row for pair in pairs]
    assert few == lines[:200]


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
    assert golds_of(cards) == {"ipo": 0.1, "dpo": 0.2, "kto": 0.3}


@slow
def test_the_curve_of_the_landscape_is_dpos(files, learned, tmp_path):
    numbers = landscaped(files, tmp_path, runs="ipo dpo kto")
    assert numbers["chosen"] == [-2.0]
    assert numbers["rejected"] == [-4.0]


@pytest.fixture
def settings_of(files, monkeypatch):
    """What dpo.py, kto.py and ppo.py are told by a run."""
    seen = {}
    for name, module in {"dpo": dpo, "kto": kto, "ppo": ppo}.items():
        monkeypatch.setattr(module, "train", note(seen, name))
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
    thumbs = settings_of["kto"]
    pairs = settings_of["dpo"]
    assert thumbs.data == pairs.data == str(files / "preferences.jsonl")
    assert thumbs.batch == 2 * pairs.batch


@slow
def test_ppo_in_the_landscape_asks_its_own_prompts(settings_of):
    assert settings_of["ppo"].data == ppo.Config.data


# ---------------------------------------------------------------- online

def judged_and_learned(monkeypatch):
    """Two answers to each of three prompts, which name their prompt, and the second is better.
    -> [(prompt, text)] that were judged; prompts and pairs that are learned from"""
    prompts = []
    for i in range(3):
        text = f"Ask {i}"
        messages = rows.to_messages(text)
        prompts.append(rows.Prompt(messages, {"prompt": text}, ""))
    judged = []

    def answer(policy, tokenizer, asked, n, *args, **settings):
        texts = []
        examples = []
        for ids in asked:
            turn = TOKENIZER.decode(ids).split("\n")[1]
            request = turn.split("<")[0]
            for end in "?", "!":
                texts.append(request + end)
                tail = TOKENIZER.encode_ordinary(end)
                is_answer = [0] * len(ids) + [1] * len(tail)
                examples.append(M.Example(ids + tail, is_answer))
        ids, mask, answered = M.collate(examples, TOKENIZER, "cpu")         # (6, T) each
        ended = torch.ones(len(ids)).bool()
        return M.Samples(ids, mask, answered, None, ended, texts)

    def score(asked, texts):
        judged.extend(zip(asked, texts, strict=True))
        return [float(text.endswith("!")) for text in texts]
    monkeypatch.setattr(online, "sample", answer)
    pairs = online.own_pairs(None, TOKENIZER, score, prompts, online.Config(), None)
    learned = zip(prompts, pairs, strict=True)
    return judged, list(learned)


def test_an_answer_is_judged_under_the_prompt_that_it_answers(monkeypatch):
    judged, _ = judged_and_learned(monkeypatch)
    assert len(judged) == 6
    for prompt, text in judged:
        assert text[:-1] == prompt.row["prompt"]


def test_of_two_own_answers_the_better_one_is_chosen(monkeypatch):
    _, learned = judged_and_learned(monkeypatch)
    for prompt, pair in learned:
        ids = M.render_prompt(TOKENIZER, prompt.messages)
        asked = TOKENIZER.decode(ids)
        assert texts_of([pair.chosen]) == {(asked, "!")}
        assert texts_of([pair.rejected]) == {(asked, "?")}
        assert pair.row == prompt.row


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
        learner = moved(policy, config.rounds)
        log = SimpleNamespace(rows=[{"rounds": config.rounds}])
        return learner, log

    def offline(config):
        card, _ = exam.exam(tiny_model(9), None)
        card["kl"] = weight_of(config.init)
        return card

    def run(**changes):
        settings = {"steps": 7} | changes
        config = told(online.Config, files, data="preferences", **settings)
        return online.train(config, lambda prompts, texts: None)
    monkeypatch.setattr(online, "learn", learn)
    monkeypatch.setattr(online, "offline", offline)
    return run


def test_online_answers_anew_at_every_step_and_between_in_three_rounds(files, online_run):
    start, _ = load(files / "short")
    after_3 = moved(start, 3)
    after_7 = moved(start, 7)
    golds = golds_of(online_run()["cards"])
    offline = tiny_model(9)
    want = {"before": weight(start), "offline": weight(offline),
            "3 rounds": weight(after_3), "online": weight(after_7)}
    assert golds == want


def test_online_is_far_from_where_it_began(files, online_run):
    start = weight_of(files / "short")
    cards = online_run()["cards"]
    for name, card in cards.items():
        assert card["kl"] == start, name
        if name not in ("before", "offline"):       # the card of offline is one of this file
            assert card["against"] == start, name


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
    start, _ = load(files / "short")
    learner = moved(start, 2)
    assert results["after"]["gold"] == weight(learner)


@slow
def test_online_keeps_the_model_of_its_last_run(files, online_run, tmp_path):
    folder = tmp_path / "out"
    results = online_run(save=True, out=str(folder))
    kept = weight_of(folder)
    learned = weight(results["model"])
    start = results["before"]["gold"]
    assert kept == pytest.approx(learned, rel=1e-2)
    assert abs(kept - start) > 100


@slow
def test_the_judge_of_online_is_the_one_that_was_named(files):
    scores = []
    prompts = [rows.Prompt(rows.to_messages("Hi"), {}, "")]
    for name in "reward", "reward_1":
        config = told(online.Config, files, judge=str(files / name))
        judge, _ = load_scalar(config.judge)
        score = online.load_judge(config)
        given = score(prompts, ["Yes."]).item()
        want = best_of.reward(judge, TOKENIZER, prompts, ["Yes."])
        assert given == want.item()
        scores.append(given)
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
    held = [thumb.judged for thumb in thumbed.held[1]]
    held_prompts = {prompt for prompt, answer in texts_of(held)}
    learned_prompts = {prompt for prompt, answer in texts_of(thumbed.learned)}
    assert held_prompts
    assert not held_prompts & learned_prompts


def test_before_and_after_are_of_the_same_thumbs(thumbed):
    before, after = thumbed.held
    assert before == after


@slow
def test_all_other_thumbs_are_learned_from(files, thumbed):
    pairs = rows.read_pairs(files / "preferences.jsonl")
    count = 2 * len(pairs)
    learned = {tuple(example.ids) for example in thumbed.learned}
    held = thumbed.held[0]
    assert len(learned) + len(held) >= 0.97 * count


def test_z_is_measured_on_answers_under_other_prompts(files):
    """The prompt is the thumb's own, and the answer was given to another one."""
    config = told(kto.Config, files, data="preferences")
    answers = {}
    for one in rows.read_judgements(config.data):
        example = M.render_answer(TOKENIZER, one.prompt, one.answer)
        [(prompt, answer)] = texts_of([example])
        answers.setdefault(prompt, set()).add(answer)
    learned, held = kto.read_thumbs(config, TOKENIZER, 256)
    for thumb in learned + held:
        [(prompt, answer)] = texts_of([thumb.mismatched])
        [(own_prompt, _)] = texts_of([thumb.judged])
        assert prompt == own_prompt
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
    results = thumbed.results
    before = results["before"]
    after = results["after"]
    start = thumbed.start
    assert before["kl"] == start
    assert before["gold"] == start
    assert after["kl"] == start
    assert after["against"] == start
    assert after["gold"] == weight(results["model"]) != start


@slow
def test_the_figure_of_kto_has_both_cards(thumbed):
    for key in "separation", "gold", "kl":
        for when in "before", "after":
            assert thumbed.results["numbers"][key][when] == thumbed.results[when][key]


def test_few_thumbs_up_are_judged_by_as_many_held_out_ones(files):
    config = told(kto.Config, files, data="preferences", share=0.1)
    few, held = kto.read_thumbs(config, TOKENIZER, 256)
    config = told(kto.Config, files, data="preferences")
    many, all_held = kto.read_thumbs(config, TOKENIZER, 256)
    assert len(few) < len(many)
    assert held == all_held


def test_the_share_of_kto_thins_out_the_good_thumbs_that_it_learns(files, exams, monkeypatch):
    learned = wrapped(monkeypatch, kto, "batches")
    config = told(kto.Config, files, data="preferences", steps=1, share=0.2)
    kto.train(config)
    thumbs = learned[0][0]
    good = [thumb for thumb in thumbs if thumb.good]
    bad = [thumb for thumb in thumbs if not thumb.good]
    assert len(good) < len(bad) / 2


@pytest.mark.parametrize("gold, passed", [(0.52, False), (0.54, True)])
def test_ktos_target_is_gold_above_that_of_the_start(files, exams, gold, passed):
    exams.golds = [0.5, gold]
    config = told(kto.Config, files, data="preferences", steps=1)
    results = kto.train(config)
    assert results["passed"] is passed


# ---------------------------------------------------------------- best_of

def likes_a(prompts, texts):
    scores = []
    for text in texts:
        score = text.count("a") + len(text) / 1000
        scores.append(score)
    return scores


def numbered(model, tokenizer, config, n, generator):
    """In place of best_of.ask(): n answers to each prompt, which are called 0 to n - 1."""
    prompts = rows.read_prompts(config.data)
    asked = []
    texts = []
    for prompt in prompts[:config.prompts]:
        for i in range(n):
            asked.append(prompt)
            texts.append(str(i))
    ended = torch.ones(len(texts), dtype=torch.bool)
    return asked, texts, ended


def likes(number):
    """A judge of such answers: this one is the best."""
    def score(prompts, texts):
        return [-abs(float(text) - number) for text in texts]
    return score


def answers_in(lines):
    answers = []
    for line in lines.splitlines():
        messages = json.loads(line)["messages"]
        answers.append(messages[-1]["content"])
    return answers


@pytest.fixture
def chosen(files, exams, tmp_path, monkeypatch):
    """-> run(score, **settings). Who learns from best.jsonl moves by 2, from random.jsonl by 1."""
    runs = []
    by = {"best": 2, "random": 1}

    def learn_from(path, config, **changes):
        name = Path(path).stem
        runs.append((name, changes))
        start, _ = load(config.init)
        learner = moved(start, by[name])
        return {"model": learner, "log": [{"step": 0, "loss": 1.0}]}

    def run(score=likes_a, **changes):
        settings = {"out": str(tmp_path), "n": 4, "prompts": 12, "max_new": 12}
        settings.update(changes)
        config = told(best_of.Config, files, **settings)
        results = best_of.train(config, score)
        kept = {}
        for name in "best", "random":
            kept[name] = (tmp_path / f"{name}.jsonl").read_text()
        return results | {"kept": kept}
    monkeypatch.setattr(best_of, "learn_from", learn_from)
    run.runs = runs
    return run


def test_the_judge_has_no_say_in_the_control(chosen, monkeypatch):
    monkeypatch.setattr(best_of, "ask", numbered)
    controls = []
    for number in 0, 2:
        kept = chosen(likes(number))["kept"]
        controls.append(answers_in(kept["random"]))
    assert controls[0] == controls[1]
    assert len(set(controls[0])) > 2


def test_of_the_answers_to_each_prompt_the_judges_best_is_kept(chosen, monkeypatch):
    monkeypatch.setattr(best_of, "ask", numbered)
    kept = chosen(likes(2))["kept"]
    answers = answers_in(kept["best"])
    assert answers == ["2"] * 12


@slow
def test_the_truth_has_no_say_in_the_best(chosen, monkeypatch):
    kept = chosen()["kept"]
    truth = best_of.truth
    monkeypatch.setattr(best_of, "truth", lambda *args: 1 - truth(*args))
    assert chosen()["kept"] == kept


def test_the_models_of_best_of_are_examined_by_name(files, chosen):
    start, _ = load(files / "short")
    random = moved(start, 1)
    best = moved(start, 2)
    want = {"before": weight(start), "random": weight(random), "best": weight(best)}
    results = chosen()
    assert golds_of(results["cards"]) == want
    assert results["numbers"]["models"] == want


def test_both_learners_of_best_of_are_far_from_where_they_began(files, chosen):
    start = weight_of(files / "short")
    cards = chosen()["cards"]
    for name in "random", "best":
        card = cards[name]
        assert card["kl"] == start
        assert card["against"] == start


@slow
def test_the_control_is_not_kept(chosen):
    chosen()
    changes = dict(chosen.runs)
    assert changes["random"]["save"] is False and "save" not in changes["best"]


@pytest.mark.parametrize("golds, passed", [
    ((0.9, 0.5, 0.6), True),
    ((0.1, 0.5, 0.55), False)])
def test_the_best_have_to_beat_the_control(chosen, exams, golds, passed):
    """It trained as long on the model's own words: what beats the start may be that alone."""
    exams.golds = golds                                         # before, random, best
    results = chosen()
    assert results["passed"] is passed


@slow
@pytest.mark.parametrize("changes", [dict(n=2), dict(prompts=6), dict(max_new=3), dict(seed=1)])
def test_every_setting_of_best_of_changes_what_is_kept(chosen, changes):
    changed = chosen(**changes)["kept"]
    plain = chosen()["kept"]
    assert changed["best"] != plain["best"]


@slow
def test_the_judge_that_was_named_chooses(files, chosen, monkeypatch):
    asked = weights_given(monkeypatch, best_of, "reward")
    want = []
    for name in "reward", "reward_1":
        chosen(None, judge=str(files / name))
        judge, _ = load_scalar(files / name)
        want.append(weight(judge))
    assert asked == want


@slow
def test_answers_are_learned_with_the_settings_of_the_run(files, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "train", seen.append)
    settings = dict(steps=3, batch=5, accumulate=2, lr=0.02, lora=4, seed=7, out="x")
    config = told(best_of.Config, files, **settings)
    best_of.learn_from("kept.jsonl", config, save=False)
    used = seen[0]
    want = settings | {"init": config.init, "data": "kept.jsonl"}
    for name, value in want.items():
        assert getattr(used, name) == value, name
    assert not used.save


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
    teacher = sure_model(1)
    student = tiny_model(2)
    lines = rows.read_conversations(path)
    prompts = [line.messages[:-1] for line in lines]
    learned, _ = house.hold_out(lines, prompts, most=40)
    there = 0.0
    back = 0.0
    count = 0
    with torch.no_grad():
        for line in learned:
            ids, answer = M.render(TOKENIZER, line.messages)
            batch = torch.tensor([ids])                         # (1, T)
            log_p = teacher(batch)[0].log_softmax(-1)           # (T, V)
            log_q = student(batch)[0].log_softmax(-1)
            for t in range(1, len(ids)):
                if answer[t]:                                   # position t - 1 expects it
                    there += kl_of(log_p[t - 1], log_q[t - 1]).item()
                    back += kl_of(log_q[t - 1], log_p[t - 1]).item()
                    count += 1
    config = distill.Config(steps=1, batch=1000, lr=0.0, quiet=True)
    log = distill.learn_distribution(student, teacher, path, TOKENIZER, config)
    first = log.rows[0]
    assert first["loss"] == pytest.approx(there / count, rel=1e-3)
    assert abs(there - back) > 0.01 * there
    assert first["targets"] == count


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.1), dict(batch=4), dict(seed=1), dict(steps=1),
                                     dict(lora=2)])
def test_every_setting_of_distill_changes_the_student(files, changes):
    path = str(files / "sft.jsonl")
    learned = []
    for more in {}, changes:
        settings = dict(steps=2, batch=8, quiet=True) | more
        config = distill.Config(**settings)
        student = tiny_model(2)
        torch.manual_seed(0)
        teacher = tiny_model(1)
        distill.learn_distribution(student, teacher, path, TOKENIZER, config)
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
    teacher, _ = load(files / "short")
    start, _ = load(files / "base")
    of_samples = moved(start, 1)
    of_distribution = moved(start, 2)
    want = {"teacher": weight(teacher), "before": weight(start),
            "samples": weight(of_samples), "distribution": weight(of_distribution)}
    numbers = distilled().results["numbers"]
    assert golds_of(numbers["cards"]) == want


def test_students_are_as_far_as_they_are_from_the_teacher(files, distilled):
    cards = distilled().results["cards"]
    teacher = weight_of(files / "short")
    for name in "before", "samples", "distribution":
        card = cards[name]
        assert card["kl"] == teacher, name


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
    start, _ = load(files / "base")
    learner = moved(start, 2)
    assert results["before"]["gold"] == weight(start)
    assert results["after"]["gold"] == weight(learner)


@pytest.mark.parametrize("gold, passed", [(0.84, False), (0.86, True)])
def test_distills_target_is_the_teachers_gold(distilled, exams, gold, passed):
    exams.golds = [0.9, 0.1, 0.1, gold]                 # teacher, before, samples, distribution
    results = distilled().results
    assert results["passed"] is passed


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
        share = Path(path).stem.removeprefix("mixed_")
        seen.learned[share] = lines
        seen.told.append((config, changes))
        start, _ = load(config.init)
        learner = moved(start, 1 + len(lines))
        return {"model": learner, "log": []}

    def run(**changes):
        settings = {"shares": "0 0.25", "prompts": 24, "out": str(tmp_path), "max_new": 12,
                    "new": str(files / "talks.jsonl")}
        settings.update(changes)
        config = told(forgetting.Config, files, **settings)
        seen.results = forgetting.train(config)
        new_lines = forgetting.harmless(config.new)
        old_lines = rows.read_conversations(tmp_path / "old.jsonl")
        seen.new = [json.loads(line)["messages"] for line in new_lines]
        seen.old = [line.messages for line in old_lines]
        return seen
    monkeypatch.setattr(forgetting, "learn_from", learn_from)
    return run


def test_without_rehearsal_no_old_answer_is_learned(forgot):
    seen = forgot()
    assert [line.messages for line in seen.learned["0"]] == seen.new


def test_a_share_of_old_answers_joins_all_of_the_new_ones(forgot):
    seen = forgot()
    messages = [line.messages for line in seen.learned["0.25"]]
    count = len(seen.new)
    new = messages[:count]
    old = messages[count:]
    share = len(old) / len(messages)
    assert new == seen.new
    assert old == seen.old[:len(old)]
    assert share == pytest.approx(0.25, abs=0.03)


@slow
def test_nobody_asks_for_anything_bad_in_the_new_data(files, forgot):
    kinds = {}
    for line in rows.read_conversations(files / "talks.jsonl"):
        prompt = world.flat(line.messages[:-1])
        kinds[prompt] = line.row["kind"]
    found = set()
    for messages in forgot().new:
        prompt = world.flat(messages[:-1])
        found.add(kinds[prompt])
    assert found == {"math", "fact", "chat"}


@slow
def test_old_answers_are_those_of_the_model_before(files, forgot, monkeypatch):
    asked = weights_given(monkeypatch, forgetting, "ask")
    forgot()
    assert asked == [weight_of(files / "short")]


def test_every_share_of_forgetting_has_its_own_card(files, forgot):
    seen = forgot()
    start, _ = load(files / "short")
    want = [weight(start)]
    for share in "0", "0.25":
        count = len(seen.learned[share])
        learner = moved(start, 1 + count)
        want.append(weight(learner))
    numbers = seen.results["numbers"]
    assert numbers["shares"] == [0, 0.25]
    assert numbers["gold"] == want
    assert numbers["math"] == want


def test_what_is_forgotten_is_far_from_the_aligned_model(files, forgot):
    start = weight_of(files / "short")
    cards = forgot().results["cards"]
    for name, card in cards.items():
        assert card["kl"] == start, name
        if name != "before":
            assert card["against"] == start, name


@slow
def test_every_run_of_forgetting_has_its_settings(files, forgot):
    seen = forgot(steps=7, lr=0.02, seed=3)
    assert seen.told
    for config, changes in seen.told:
        assert config.init == str(files / "short")
        assert config.steps == 7
        assert config.lr == 0.02
        assert config.seed == 3
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
    settings.update(changes)
    return told(judge_bias.Config, files, data="preferences", **settings)


def openings(probes):
    """The compliments that stand before answers."""
    found = set()
    for probe in probes:
        changed, text = probe.answers
        if changed.endswith(f" {text}") and world.praise(changed) > world.praise(text):
            found.add(changed.removesuffix(f" {text}"))
    return found


def test_the_compliments_of_the_probe_were_not_mended_away(mending):
    mended = openings(mending.ties)
    probed = openings(mending.probes)
    assert mended
    assert probed
    assert not mended & probed


def test_what_is_probed_was_not_learned_from(mending):
    learned = prompts_of(mending.ties) | prompts_of(mending.votes)
    probed = prompts_of(mending.probes)
    assert probed
    assert not learned & probed


def test_the_report_on_a_judge_is_of_held_out_votes(mending):
    assert len(mending.reported) == 3                           # at the start, before, mended
    for held in mending.reported:
        assert held and not prompts_of(held) & prompts_of(mending.votes)


def test_half_of_what_mends_a_judge_are_votes(mending):
    known = {id(tie) for tie in mending.ties}                   # the objects themselves
    ties = [one for one in mending.votes if id(one) in known]
    assert len(ties) == len(mending.ties)
    assert len(ties) == len(mending.votes) / 2


@slow
def test_who_is_complimented_already_is_no_probe(mending):
    texts = [one.answers[1] for one in mending.ties + mending.probes]
    assert not any(map(world.praise, texts))


@slow
def test_so_many_answers_are_changed_by_each_probe(mending):
    assert len(openings(mending.probes)) == 3
    others = [probe for probe in mending.probes if not openings([probe])]
    assert len(others) == 4 * 5                                 # padded and swapped, of two judges


def test_before_is_the_judge_that_was_named_and_mended_is_the_other(files, mending):
    numbers = mending.results["numbers"]
    mended = mending.results["model"]
    assert weight(mended) != weight(mending.before)
    config = mending_config(files)
    _, held = reward_model.read_comparisons(config, TOKENIZER, 256)
    plain = [one for one in held if world.praise(one.answers[0]) == 0]
    for name, judge in {"before": mending.before, "mended": mended}.items():
        card = numbers[name]
        flattery = card["probes"]["flattery"]
        again = judge_bias.examine(judge, held, plain[:5], TOKENIZER)
        flattery_again = again["probes"]["flattery"]
        assert flattery["score"] == pytest.approx(flattery_again["score"], abs=1e-5), name
        assert card["accuracy"] == pytest.approx(again["accuracy"]), name
    assert numbers["before"]["probes"] != numbers["mended"]["probes"]
    credit = numbers["credit"]
    assert credit["before"] != credit["mended"]


@slow
@pytest.mark.parametrize("changes", [dict(lr=0.1), dict(batch=8), dict(steps=2), dict(seed=1)])
def test_every_setting_of_judge_bias_changes_the_mended_judge(files, changes):
    learned = []
    for more in {}, changes:
        settings = {"steps": 3} | more
        config = mending_config(files, **settings)
        judge, tokenizer = load_scalar(config.init)
        comparisons, _ = reward_model.read_comparisons(config, tokenizer, 256)
        mended = judge_bias.mend(judge, comparisons, tokenizer, config)
        learned.append(weights(mended))
    assert not same(*learned)


# ---------------------------------------------------------------- process_reward

@pytest.mark.parametrize("judge, labels", [("outcome", [0] * 8), ("process", [0, 1] * 8)])
def test_a_judge_of_solutions_learns_the_labels_of_its_places(files, monkeypatch, judge, labels):
    """The outcome judge the last one of each solution, the process judge all of them."""
    lines = []
    for i in range(24):
        prompt = f"What is {i} + 2?"
        steps = [f"First {i} + 1.", f"It is {i}."]
        lines.append({"prompt": prompt, "steps": steps, "labels": [1, 0]})
    write_lines(files / "two_steps.jsonl", lines)
    taught = wrapped(monkeypatch, process_reward, "outcome_loss")
    config = told(process_reward.Config, files, data="two_steps", steps=1)
    process_reward.train_judge(config, judge)
    [(_, learned)] = taught
    assert sorted(learned.tolist()) == sorted(labels)


@slow
def test_an_outcome_judge_learns_whether_the_result_is_right(files):
    config = told(process_reward.Config, files, data="steps")
    truth = {}
    for line in rows.read_solutions(config.data):
        prompt = world.flat(line.prompt)
        result = process_reward.result_of(line.steps[-1])
        truth[prompt, tuple(line.steps)] = result == line.row["answer"]
    learned, held = process_reward.read_solutions(config, TOKENIZER, 256, "outcome")
    slips = 0
    for solution in learned + held:
        prompt = world.flat(solution.prompt)
        is_right = truth[prompt, tuple(solution.steps)]
        assert solution.labels == [int(is_right)]
        if not is_right:
            slips += 1
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
        text = TOKENIZER.decode(example.ids)
        answer = text.split("assistant\n")[-1]
        steps = answer.count(". ") + 1
        assert sum(example.answer) == steps > 1


@pytest.fixture
def process_run(files, tmp_path, monkeypatch):
    """-> run(majority), in which judges are made by hand, and picks say who made them. The majority
    picks so many right ones, and the process judge 0.8."""
    seen = SimpleNamespace()
    seeds = {"outcome": 7, "process": 8}
    accuracies = {"outcome": (0.1, 0.2), "process": (0.3, 0.4)}
    config = told(process_reward.Config, files, data="steps", critic=str(files / "base"), save=True,
                  out=str(tmp_path))
    truth = {tuple(line.steps): line.labels for line in rows.read_solutions(config.data)}

    def train_judge(config, judge):
        network = M.ScalarModel(tiny_model(seeds[judge]))
        log = house.Log(config)
        log.rows = [{"step": 0, "loss": 1.0, "judge": judge}]
        cards = []
        for share in accuracies[judge]:
            card = {"accuracy": share, "calibration": 0.1, "first_wrong": 0.9, "all_right": 0.9}
            cards.append(card)
        setattr(seen, judge, weight(network))
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
    before = numbers["before"]
    after = numbers["after"]
    first = processed.results["log"][0]
    assert before["accuracy"] == 0.3
    assert after["accuracy"] == 0.4
    assert after["outcome_accuracy"] == 0.2
    assert first["judge"] == "process"


@pytest.mark.parametrize("majority, passed", [(0.7, True), (0.9, False)])
def test_the_process_judge_has_to_pick_better_than_the_majority(process_run, majority, passed):
    results = process_run(majority).results
    assert results["passed"] is passed


@slow
def test_the_process_judge_is_kept(processed, tmp_path):
    assert weight(load_scalar(tmp_path)[0]) == pytest.approx(processed.process, rel=1e-5)


@slow
def test_marks_in_words_are_of_held_out_solutions(files, processed):
    config = told(process_reward.Config, files, data="steps")
    learned, held = process_reward.read_solutions(config, TOKENIZER, 256, "process")
    asked = {world.flat(prompt) for prompt, _ in processed.solved}
    assert asked == prompts_of(held)
    assert not asked & prompts_of(learned)


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
        settings = {"steps": 3} | more
        config = told(process_reward.Config, files, data="steps", **settings)
        judge = process_reward.train_judge(config, "process")[0]
        learned.append(weights(judge))
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
    shown = capsys.readouterr().out.split("\n")
    lines = [line for line in shown if " p " in line]
    assert len(lines) == 12
    for line in lines:
        assert line.endswith("*") == star


def leak(files, exams, tmp_path, monkeypatch):
    """An exam leaks into SFT; who learned from it has moved."""
    seen = SimpleNamespace(asked=exams.asked)

    def train(config):
        seen.config = config
        seen.learned = rows.read_conversations(config.data)
        start, _ = load(config.init)
        return {"model": moved(start, 1)}
    monkeypatch.setattr(sft, "train", train)
    config = told(report.Config, files, out=str(tmp_path), leak=17, seed=3)
    seen.golds = report.contaminate(config, str(files / "base"))
    return seen


@pytest.fixture
def leaking(files, exams, tmp_path, monkeypatch):
    return leak(files, exams, tmp_path, monkeypatch)


def request(line):
    """What a conversation begins with."""
    return world.flat(line.messages[:1])


def test_a_reworded_sum_is_none_that_leaked(leaking):
    leaked = leaking.asked[0]
    reworded = leaking.asked[2]
    learned = {request(line) for line in leaking.learned}
    prompts = {row["prompt"] for row in leaked}
    other_prompts = {row["prompt"] for row in reworded}
    assert prompts < learned
    assert not learned & other_prompts
    for row, other in zip(leaked, reworded, strict=True):
        assert row["slots"] == other["slots"]
        assert row["answer"] == other["answer"]


def test_the_clean_half_is_not_learned(leaking):
    learned = leaking.asked[0]
    clean = leaking.asked[4]
    learned_sums = {str(row["slots"]["numbers"]) for row in learned}
    clean_sums = {str(row["slots"]["numbers"]) for row in clean}
    assert len(clean) == 100
    assert not learned_sums & clean_sums


@slow
def test_what_leaks_are_the_right_results(leaking):
    answers = {request(line): line.messages[1] for line in leaking.learned}
    for row in leaking.asked[0]:
        answer = answers[row["prompt"]]
        mark = world.judge(row, answer["content"])
        assert mark["honest"] == 1


def test_the_leaked_half_is_what_sft_learns_of_it(leaking):
    lines = leaking.learned
    prompts = [line.messages[:-1] for line in lines]
    learned, _ = house.hold_out(lines, prompts, most=40)
    asked = [row["prompt"] for row in leaking.asked[0]]
    assert len(lines) == report.Config.leaked
    assert asked == [request(line) for line in learned]


def test_the_leak_is_told_before_and_after_of_each_part(files, exams, tmp_path, monkeypatch):
    exams.golds = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    seen = leak(files, exams, tmp_path, monkeypatch)
    assert seen.golds == {"leaked": [0.1, 0.2], "reworded": [0.3, 0.4], "clean": [0.5, 0.6]}


def test_before_and_after_a_leak_are_the_checkpoint_and_who_learned_it(files, leaking):
    start, _ = load(files / "base")
    learner = moved(start, 1)
    golds = [weight(start), weight(learner)]
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
    card = numbers["card"]
    want = {}
    for name in "init", "base":
        folder = files / name
        want[str(folder)] = pytest.approx(weight_of(folder))
    for row in report.ROWS:
        assert card[row.name] == want, row.name
    always = {}
    for folder, shares in numbers["wording"].items():
        always[folder] = shares["always"]
    assert always == want


@slow
def test_each_failure_is_counted_for_who_failed(files, reported):
    for folder in "init", "base":
        own = str(files / folder)
        failure = repr(weight_of(own))
        counts = reported.numbers["failures"][failure]
        others = [count for name, count in counts.items() if name != own]
        assert counts[own] > 0
        assert others == [0]


def test_both_checkpoints_answered_the_same_exam(reported, exams):
    asked = exams.asked
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_the_wordings_are_asked_of_the_exams_own_requests(reported, exams):
    requests = world.read("exam")
    assert reported.worded == exams.asked == [requests, requests]


@slow
def test_the_leak_and_the_model_card_are_of_the_last_checkpoint(files, reported, tmp_path):
    last = files / "base"
    own = weight_of(last)
    other = weight_of(files / "init")
    assert reported.leaks == [str(last)]
    card = (tmp_path / "CARD.md").read_text()
    assert f"# Model card: {last}" in card
    assert f"{own:.2f}" in card
    assert f"{other:.2f}" not in card


@slow
def test_another_wording_is_asked_of_the_same_requests(monkeypatch):
    """Who answers the first wording of each alone does it sometimes."""
    lines = [row for row in world.read("exam") if report.has_wordings(row)]
    some = lines[:6]
    firsts = {report.wordings(row)[0]["prompt"] for row in some}

    def ask(model, tokenizer, asked, temperature):
        answers = []
        for row in asked:
            gold = float(row["prompt"] in firsts)
            answers.append(SimpleNamespace(mark={"gold": gold}))
        return None, answers
    monkeypatch.setattr(exam, "ask", ask)
    shares = report.consistency(None, None, some, 6)
    assert shares == {"always": 0, "sometimes": 1, "never": 0}
