"""Wiring: do the programs of the lessons do with their functions what they tell their readers?

A function can be right and be called with the wrong thing: a control that is treated as well, a
flag that nobody reads, an exam of what was learned. So every test here runs a train(), or the step
of it that counts, on tiny models, looks at what went in and out, and names one claim.
"""
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import sft
from data import exam, rows
from data import studybuddy as world
from data.checkpoints import load, load_ranks, save
from lessons import (best_of, distill, forgetting, judge_bias, kto, landscape, online,
                     process_reward, race, report, safe)
from lessons.test_half_two import config_of, tiny_model
from model import Example, Samples, ScalarModel, render_answer


# ---------------------------------------------------------------- what the tests share

class Call(NamedTuple):
    """One exam: whose it was, what its KL was measured from, whom it was held against, on what."""
    model: object
    reference: object
    against: list
    rows: list
    answers: list


class Exams:
    """Stands in for the exam: keeps every call, and gives the golds that a test asks for."""

    def __init__(self):
        self.calls = []
        self.golds = []                 # of the first, the second .. exam; then 0.5
        self.texts = []                 # what is answered in the first, the second ..

    def __call__(self, model, tokenizer, reference=None, against=None, seed=0, rows=None, parts=()):
        number = len(self.calls)
        gold = self.golds[number] if number < len(self.golds) else 0.5
        text = self.texts[number] if number < len(self.texts) else f"Answer {number}."
        answers = []
        for row in (rows or world.read("exam"))[:2]:
            answers.append(exam.Answer(row, text, True, world.judge(row, text)))
        self.calls.append(Call(model, reference, against, rows, answers))
        return dict.fromkeys(exam.CARD, 0.5) | {"gold": gold}, answers


@pytest.fixture
def exams(monkeypatch):
    stand_in = Exams()
    monkeypatch.setattr(exam, "exam", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two policies, a judge, prompts of sums and pairs of answers to them."""
    path = tmp_path_factory.mktemp("wiring_one")
    tokenizer = load_ranks()
    save(path / "init", tiny_model(0), tokenizer)
    save(path / "teacher", tiny_model(1), tokenizer)
    save(path / "judge", ScalarModel(tiny_model(2)), tokenizer)
    asked = [row for row in world.read("prompts") if row["kind"] == "math"][:16]
    write(path / "prompts.jsonl", asked)
    pairs = []
    for i, row in enumerate(asked):
        pairs.append(row | {"chosen": f"It is {i}.", "rejected": f"No, {i} is wrong."})
    write(path / "pairs.jsonl", pairs)
    return path


def write(path, lines):
    path.write_text(rows.json_lines(lines))
    return str(path)


def quiet(Config, folders, **changes):
    return config_of(Config, folders, quiet=True, **changes)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def same(a, b):
    return torch.equal(weights(a), weights(b))


def of_folder(folder):
    return load(str(folder))[0]


def wrapped(monkeypatch, module, name):
    """Keeps the arguments of every call of a function, which still does what it did."""
    function = getattr(module, name)
    calls = []

    def call(*args, **settings):
        calls.append(args)
        return function(*args, **settings)
    monkeypatch.setattr(module, name, call)
    return calls


# ---------------------------------------------------------------- safe

def half_harmful(config):
    def score(prompts, texts):
        return torch.ones(len(texts)), torch.full([len(texts)], 0.5)
    return score


def test_only_the_limit_moves_the_price_of_harm(folders, exams, monkeypatch):
    monkeypatch.setattr(safe, "load_judges", half_harmful)
    logs = safe.train(quiet(safe.Config, folders, steps=2, guess=3.0, price=2.0))["logs"]
    assert [row["price"] for row in logs["one_score"]] == pytest.approx([3.0, 3.0])
    assert [row["price"] for row in logs["free"]] == pytest.approx([safe.LEAST] * 2, rel=1e-12)
    assert 2.0 < logs["limit"][0]["price"] < logs["limit"][1]["price"]


def safe_without_training(folders, monkeypatch):
    """-> the cards, and the weights that each of the three ways began with"""
    begun = []

    def climb(policy, *args):
        begun.append(weights(policy))
        with torch.no_grad():
            policy.embed.weight += 1
        return [{"price": 1.0, "harm": 0.5}]
    monkeypatch.setattr(safe, "load_judges", half_harmful)
    monkeypatch.setattr(safe, "climb", climb)
    return safe.train(quiet(safe.Config, folders, steps=1))["cards"], begun


def test_each_way_of_safe_is_as_helpful_as_its_own_answers(folders, exams, monkeypatch):
    monkeypatch.setattr(safe, "marks_of", lambda row, text: {"helpful": float(text)})
    exams.texts = ["0.1", "0.2", "0.3", "0.4"]                  # before, and of the three ways
    cards, _ = safe_without_training(folders, monkeypatch)
    helped = [card["helped"] for card in cards.values()]
    assert helped == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_each_way_of_safe_begins_where_the_others_began(folders, exams, monkeypatch):
    _, begun = safe_without_training(folders, monkeypatch)
    assert len(begun) == 3
    assert all(torch.equal(one, weights(of_folder(folders / "init"))) for one in begun)


def test_the_kl_of_safe_is_the_distance_from_the_start(folders, exams, monkeypatch):
    safe_without_training(folders, monkeypatch)
    start = of_folder(folders / "init")
    assert all(same(call.reference, start) for call in exams.calls)
    assert not any(same(call.model, start) for call in exams.calls[1:])


# ---------------------------------------------------------------- race

def lucky_draws(monkeypatch):
    """Every other answer is right, so there is something to learn. -> all Samples"""
    draw = race.draw
    drawn = []

    def luck(*args):
        samples, rewards = draw(*args)
        drawn.append(samples)
        return samples, (torch.arange(len(rewards)) % 2).float()
    monkeypatch.setattr(race, "draw", luck)
    return drawn


@pytest.mark.parametrize("critic_lr", [0.0, 1e-2])
def test_the_critic_of_the_race_learns_at_critic_lr(folders, monkeypatch, critic_lr):
    lucky_draws(monkeypatch)
    critics = []

    def critic_of(transformer):
        critic = ScalarModel(transformer)
        critics.append((critic, weights(critic)))
        return critic
    monkeypatch.setattr(race, "ScalarModel", critic_of)
    policy, _, _ = race.climb("ppo", quiet(race.Config, folders, tokens=1000, critic_lr=critic_lr))
    critic, before = critics[0]
    assert torch.equal(weights(critic), before) == (critic_lr == 0)
    assert not same(policy, of_folder(folders / "init"))        # whose rate is another one


@pytest.mark.parametrize("name", list(race.RACERS))
def test_the_budget_of_the_race_counts_sampled_tokens_alone(folders, monkeypatch, name):
    drawn = lucky_draws(monkeypatch)
    _, _, curve = race.climb(name, quiet(race.Config, folders, tokens=1000))
    sampled = np.cumsum([int(samples.answer.sum()) for samples in drawn]).tolist()
    assert [tokens for tokens, _ in curve] == sampled
    assert sampled[-2] < 1000 <= sampled[-1]


def test_the_race_ends_in_an_exam_of_sums_alone(folders, exams, monkeypatch):
    monkeypatch.setattr(race, "climb", lambda name, config: (name, None, [(1000, 0.5)]))
    race.train(quiet(race.Config, folders, tokens=1000))
    assert [call.model for call in exams.calls] == ["reinforce", "rloo", "grpo", "ppo"]
    for call in exams.calls:
        assert {row["kind"] for row in call.rows} == {"math"}


# ---------------------------------------------------------------- landscape

def landscape_runs(folders, monkeypatch, tmp_path, data, name):
    """-> what each run of a scenario was told"""
    told = {}

    def learn(name, config, **changes):
        told[name] = changes
        return {"after": dict.fromkeys(exam.CARD, 0.5) | {"gold": 0.5},
                "log": [{"chosen": 0.0, "rejected": 0.0}]}
    monkeypatch.setattr(landscape, "learn", learn)
    monkeypatch.setattr(landscape, "exact_toy", lambda config: {1.0: 0.0})
    landscape.train(quiet(landscape.Config, folders, runs="", scenario=name, data=data,
                          out=str(tmp_path)))
    return told


def many_pairs(tmp_path, count):
    lines = []
    for i in range(count):
        lines.append({"prompt": f"Which? {i}", "chosen": "good", "rejected": "bad", "kind": "chat"})
    return write(tmp_path / "many.jsonl", lines)


def test_a_third_of_the_labels_that_noisy_runs_learn_from_is_wrong(folders, monkeypatch, tmp_path):
    told = landscape_runs(folders, monkeypatch, tmp_path, many_pairs(tmp_path, 300), "noisy")
    assert len({changes["data"] for changes in told.values()}) == 1
    pairs = rows.read_pairs(told["dpo"]["data"])
    wrong = [pair for pair in pairs if (pair.chosen, pair.rejected) == ("bad", "good")]
    assert len(pairs) == 300 and 70 < len(wrong) < 130
    assert all(pair.row["kind"] == "chat" for pair in pairs)    # the rest of a line stays


def test_only_the_robust_loss_is_told_of_the_noise(folders, monkeypatch, tmp_path):
    told = landscape_runs(folders, monkeypatch, tmp_path, many_pairs(tmp_path, 9), "noisy")
    noise = {name: changes.get("noise") for name, changes in told.items()}
    assert noise == {"dpo": None, "robust": 1 / 3, "ipo": None}


def test_few_runs_learn_from_200_pairs(folders, monkeypatch, tmp_path):
    told = landscape_runs(folders, monkeypatch, tmp_path, many_pairs(tmp_path, 300), "few")
    assert [len(rows.read_pairs(changes["data"])) for changes in told.values()] == [200, 200]


# ---------------------------------------------------------------- online

def echo(policy, tokenizer, prompts, n=1, max_new=64, **settings):
    """Says back what it was asked, and which of n answers it is."""
    texts = []
    examples = []
    for ids in prompts:
        for k in range(n):
            texts.append(f"{tokenizer.decode(ids)} {k}")
            tail = tokenizer.encode_ordinary(f" {k}")
            examples.append(Example(ids + tail, [0] * len(ids) + [1] * len(tail)))
    longest = max(len(example.ids) for example in examples)
    ids, mask, answer = [], [], []
    for one in examples:
        blank = [0] * (longest - len(one.ids))
        ids.append(one.ids + blank)
        mask.append([1] * len(one.ids) + blank)
        answer.append(one.answer + blank)
    answer = torch.tensor(answer).bool()
    return Samples(torch.tensor(ids), torch.tensor(mask).bool(), answer,
                   torch.zeros(answer.shape), torch.ones(len(texts), dtype=torch.bool), texts)


def test_online_answers_are_judged_under_the_prompts_that_they_answer(folders, monkeypatch):
    monkeypatch.setattr(online, "sample", echo)
    judged = []

    def score(prompts, texts):
        judged.extend(zip(prompts, texts))
        return [float(i) for i in range(len(texts))]            # the second one is better
    tokenizer = load_ranks()
    prompts = rows.read_prompts(str(folders / "prompts.jsonl"))[:5]
    pairs = online.own_pairs(None, tokenizer, score, prompts, quiet(online.Config, folders), None)
    assert len(judged) == 10
    for prompt, text in judged:
        assert prompt.row["prompt"] in text
    for pair in pairs:                                          # and so they are learned from
        assert tokenizer.decode(pair.chosen.ids).rstrip().endswith("1")
        assert pair.row["prompt"] in tokenizer.decode(pair.chosen.ids)
        assert pair.row["prompt"] in tokenizer.decode(pair.rejected.ids)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_online_answers_anew_in_each_round_with_the_policy_as_it_is(folders, monkeypatch, rounds):
    asked = []

    def own_pairs(policy, tokenizer, score, prompts, config, generator):
        asked.append(weights(policy))
        return pairs_of(prompts, tokenizer)
    monkeypatch.setattr(online, "own_pairs", own_pairs)
    config = quiet(online.Config, folders, steps=4, rounds=rounds)
    online.learn(config, None)
    assert len(asked) == rounds
    for before, after in zip(asked, asked[1:]):
        assert not torch.equal(before, after)


def pairs_of(prompts, tokenizer):
    pairs = []
    for prompt in prompts:
        good = render_answer(tokenizer, prompt.messages, "Yes.")
        bad = render_answer(tokenizer, prompt.messages, "No, not at all.")
        pairs.append(online.dpo.Pair(good, bad, prompt.row))
    return pairs


def test_online_compares_the_file_three_rounds_and_one_for_each_step(folders, exams, monkeypatch):
    told = []

    def learn(config, score):
        told.append(config.rounds)
        return f"{config.rounds} rounds", online.Log(config)
    monkeypatch.setattr(online, "learn", learn)
    monkeypatch.setattr(online, "offline", lambda config: dict.fromkeys(exam.CARD, 0.5))
    results = online.train(quiet(online.Config, folders, steps=7), score=len)
    assert list(results["cards"]) == ["before", "offline", "3 rounds", "online"]
    assert told == [3, 7]
    assert [call.model for call in exams.calls[1:]] == ["3 rounds", "7 rounds"]
    start = of_folder(folders / "init")
    assert all(same(call.reference, start) for call in exams.calls)


def test_online_offline_learns_as_long_and_as_fast(folders, monkeypatch):
    told = []

    def train(config):
        told.append(config)
        return {"after": {}}
    monkeypatch.setattr(online.dpo, "train", train)
    changes = {"steps": 7, "batch": 5, "lr": 0.25, "beta": 0.75, "seed": 4}
    config = quiet(online.Config, folders, **changes)
    online.offline(config)
    for name in ("init", "data", *changes):
        assert getattr(told[0], name) == getattr(config, name)


# ---------------------------------------------------------------- kto

def test_z_is_measured_on_answers_under_other_prompts(folders):
    """The prompt is the thumb's own, and the answer was given to another one."""
    tokenizer = load_ranks()
    config = quiet(kto.Config, folders, data=str(folders / "pairs.jsonl"))
    answers = {}
    for one in rows.read_judgements(config.data):
        example = render_answer(tokenizer, one.prompt, one.answer)
        prompt, answer = halves(example)
        answers.setdefault(prompt, set()).add(answer)
    for thumb in sum(kto.read_thumbs(config, tokenizer, 256), []):
        prompt, answer = halves(thumb.mismatched)
        assert prompt == halves(thumb.judged)[0]
        assert answer not in answers[prompt]
        assert any(answer in others for others in answers.values())


def halves(example):
    start = list(example.answer).index(1)
    return tuple(example.ids[:start]), tuple(example.ids[start:])


def kto_run(folders, monkeypatch, **changes):
    """-> the results, the thumbs that were looked at, and those that were learned from"""
    looked = wrapped(monkeypatch, kto, "evaluate")
    learned = wrapped(monkeypatch, kto, "batches")
    settings = {"steps": 2, "data": str(folders / "pairs.jsonl")} | changes
    results = kto.train(quiet(kto.Config, folders, **settings))
    return results, [call[2] for call in looked], learned[0][0]


def test_kto_tells_good_from_bad_on_thumbs_that_it_has_not_learned(folders, exams, monkeypatch):
    _, looked, learned = kto_run(folders, monkeypatch)
    assert len(looked) == 2 and looked[0] == looked[1]          # before and after
    prompts = {halves(thumb.judged)[0] for thumb in learned}
    for thumb in looked[1]:
        assert halves(thumb.judged)[0] not in prompts


def test_the_share_of_kto_thins_out_the_good_thumbs_that_it_learns(folders, exams, monkeypatch):
    _, looked, learned = kto_run(folders, monkeypatch, share=0.2)
    assert sum(thumb.good for thumb in learned) < sum(not thumb.good for thumb in learned)
    assert sum(thumb.good for thumb in looked[1]) == sum(not thumb.good for thumb in looked[1])


def test_ktos_kl_is_the_distance_from_the_start(folders, exams, monkeypatch):
    kto_run(folders, monkeypatch)
    start = of_folder(folders / "init")
    assert all(same(call.reference, start) for call in exams.calls)
    assert not same(exams.calls[-1].model, start)


@pytest.mark.parametrize("gold, passed", [(0.52, False), (0.54, True)])
def test_ktos_target_is_gold_above_that_of_the_start(folders, exams, monkeypatch, gold, passed):
    exams.golds = [0.5, gold]
    results, _, _ = kto_run(folders, monkeypatch, steps=1)
    assert results["passed"] == passed


# ---------------------------------------------------------------- best_of

def best_of_run(folders, monkeypatch, tmp_path, **changes):
    """Answers 0 to 3 to each prompt, of which 2 is the best. -> results, and what was learned"""
    monkeypatch.setattr(best_of, "ask", numbered)
    learned = {}

    def learn_from(path, config, **changes):
        said = [row.messages[-1]["content"] for row in rows.read_conversations(path)]
        learned[path.split("/")[-1]] = said
        return {"model": path.split("/")[-1], "log": [{"step": 0, "loss": 1.0}]}
    monkeypatch.setattr(best_of, "learn_from", learn_from)

    def likes_two(prompts, texts):
        return [-abs(float(text) - 2) for text in texts]
    config = quiet(best_of.Config, folders, n=4, prompts=16, out=str(tmp_path), **changes)
    return best_of.train(config, score=likes_two), learned


def numbered(model, tokenizer, config, n, generator):
    """The same as best_of.ask(): n answers to each prompt, which are called 0 to n - 1."""
    prompts = rows.read_prompts(config.data)[:config.prompts]
    asked = [prompt for prompt in prompts for _ in range(n)]
    texts = [str(i % n) for i in range(len(asked))]
    return asked, texts, torch.ones(len(texts), dtype=torch.bool)


@pytest.mark.parametrize("golds, passed", [((0.9, 0.5, 0.6), True), ((0.1, 0.5, 0.55), False)])
def test_best_ofs_target_is_against_the_random_control(folders, exams, monkeypatch, tmp_path,
                                                       golds, passed):
    exams.golds = golds                                         # before, random, best
    results, _ = best_of_run(folders, monkeypatch, tmp_path)
    assert results["passed"] == passed


def test_the_control_of_best_of_learns_answers_that_nobody_chose(folders, exams, monkeypatch,
                                                                 tmp_path):
    _, learned = best_of_run(folders, monkeypatch, tmp_path)
    assert learned["best.jsonl"] == ["2"] * 16
    assert len(learned["random.jsonl"]) == 16 and len(set(learned["random.jsonl"])) > 2


def test_best_of_examines_who_learned_what_and_measures_kl_from_before(folders, exams, monkeypatch,
                                                                      tmp_path):
    exams.golds = [0.1, 0.2, 0.3]
    results, _ = best_of_run(folders, monkeypatch, tmp_path)
    assert [call.model for call in exams.calls[1:]] == ["random.jsonl", "best.jsonl"]
    assert results["numbers"]["models"] == {"before": 0.1, "random": 0.2, "best": 0.3}
    start = of_folder(folders / "init")
    assert all(same(call.reference, start) for call in exams.calls[1:])


# ---------------------------------------------------------------- distill

def test_distill_learns_the_kl_from_teacher_to_student(folders, tmp_path):
    """The loss of the first step is the mean, over the answers' tokens, of KL(p_T || p_S)."""
    tokenizer = load_ranks()
    student, teacher = tiny_model(0), tiny_model(1)
    with torch.no_grad():
        teacher.embed.weight *= 8                               # so sure that both ways differ
    lines = []
    for i in range(8):
        lines.append({"messages": world.chat(f"What is {i}?", f"So it is {i}.")})
    path = write(tmp_path / "said.jsonl", lines)
    config = quiet(distill.Config, folders, steps=1, batch=6)
    examples = sft.to_examples(rows.read_conversations(path), tokenizer, 256, sft.Config(cut=True))
    examples, _ = distill.hold_out(examples, most=40)
    assert len(examples) == 6                                   # all of them are in the batch
    forth, back = [], []
    with torch.no_grad():
        for example in examples:
            log_s, _ = sft.shift(student, [example], tokenizer)
            log_t, _ = sft.shift(teacher, [example], tokenizer)
            log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
            forth += (log_t.exp() * (log_t - log_s)).sum(-1).tolist()
            back += (log_s.exp() * (log_s - log_t)).sum(-1).tolist()
    log = distill.learn_distribution(student, teacher, path, tokenizer, config)
    assert log.rows[0]["loss"] == pytest.approx(np.mean(forth), rel=1e-3)
    assert abs(np.mean(forth) - np.mean(back)) > 0.02 * np.mean(forth)


def distill_run(folders, exams, monkeypatch, tmp_path):
    monkeypatch.setattr(distill, "ask", numbered)

    def learn_from(path, config, **changes):
        return {"model": "learned samples", "log": [{"step": 0, "loss": 1.0}]}

    def learn_distribution(student, teacher, path, tokenizer, config):
        with torch.no_grad():
            student.embed.weight += 1
        log = distill.Log(config)
        log(0, loss=1.0)
        return log
    monkeypatch.setattr(distill, "learn_from", learn_from)
    monkeypatch.setattr(distill, "learn_distribution", learn_distribution)
    config = quiet(distill.Config, folders, teacher=str(folders / "teacher"), prompts=4, steps=1,
                   out=str(tmp_path))
    return distill.train(config)


def test_the_kl_of_distill_is_the_distance_from_the_teacher(folders, exams, monkeypatch, tmp_path):
    distill_run(folders, exams, monkeypatch, tmp_path)
    teacher = of_folder(folders / "teacher")
    assert len(exams.calls) == 4
    assert all(same(call.reference, teacher) for call in exams.calls[1:])


def test_before_is_the_student_that_has_learned_nothing(folders, exams, monkeypatch, tmp_path):
    exams.golds = [0.9, 0.2, 0.3, 0.4]
    results = distill_run(folders, exams, monkeypatch, tmp_path)
    _, before, samples, distribution = exams.calls
    assert same(before.model, of_folder(folders / "init"))
    assert samples.model == "learned samples" and not same(distribution.model, before.model)
    assert results["before"]["gold"] == 0.2 and results["after"]["gold"] == 0.4


@pytest.mark.parametrize("gold, passed", [(0.84, False), (0.86, True)])
def test_distills_target_is_the_teachers_gold(folders, exams, monkeypatch, tmp_path, gold, passed):
    exams.golds = [0.9, 0.1, 0.1, gold]
    assert distill_run(folders, exams, monkeypatch, tmp_path)["passed"] == passed


# ---------------------------------------------------------------- forgetting

def forgetting_run(folders, monkeypatch, tmp_path):
    """-> for each share, what the assistants of its file say"""
    monkeypatch.setattr(forgetting, "ask", numbered)
    new = []
    for i in range(8):
        new.append({"messages": world.chat(f"What is {i}?", "new"), "kind": "math"})
    learned = []

    def learn_from(path, config, **changes):
        learned.append([row.messages[-1]["content"] for row in rows.read_conversations(path)])
        return {"model": len(learned)}
    monkeypatch.setattr(forgetting, "learn_from", learn_from)
    config = quiet(forgetting.Config, folders, new=write(tmp_path / "new.jsonl", new), prompts=16,
                   out=str(tmp_path), shares="0 0.2 0.5")
    forgetting.train(config)
    return learned


def test_without_a_share_nothing_old_is_learned(folders, exams, monkeypatch, tmp_path):
    learned = forgetting_run(folders, monkeypatch, tmp_path)
    assert learned[0] == ["new"] * 8


def test_each_share_has_its_old_answers_beside_all_the_new(folders, exams, monkeypatch, tmp_path):
    learned = forgetting_run(folders, monkeypatch, tmp_path)
    assert [said.count("new") for said in learned] == [8, 8, 8]
    assert [len(said) for said in learned] == [8, 10, 16]


def test_forgetting_is_measured_from_the_aligned_model(folders, exams, monkeypatch, tmp_path):
    forgetting_run(folders, monkeypatch, tmp_path)
    aligned = of_folder(folders / "init")
    assert [call.model for call in exams.calls[1:]] == [1, 2, 3]
    assert all(same(call.reference, aligned) for call in exams.calls)
    assert all(call.against == exams.calls[0].answers for call in exams.calls[1:])


# ---------------------------------------------------------------- judge_bias

@pytest.fixture(scope="module")
def mending(folders):
    """One run. -> its results, comparisons that it learned from, and lists that it looked at"""
    with pytest.MonkeyPatch.context() as monkeypatch:
        learned = wrapped(monkeypatch, judge_bias, "scores")
        looked = wrapped(monkeypatch, judge_bias, "all_scores")
        lines = []
        for i in range(60):
            lines.append({"prompt": f"What is {i} + 1?", "chosen": f"It is {i}.",
                          "rejected": f"No, {i} is not it."})
        config = quiet(judge_bias.Config, folders, init=str(folders / "judge"), steps=6, batch=8,
                       data=write(folders / "votes.jsonl", lines))
        results = judge_bias.train(config)
    return results, sum([call[1] for call in learned], []), looked


def compliments_in(comparisons):
    texts = [text for comparison in comparisons for text in comparison.answers]
    return {one for one in world.SAY["flattery"] for text in texts if text.startswith(one)}


def test_the_judge_is_probed_with_other_compliments_than_it_was_mended_with(mending):
    _, learned, looked = mending
    probed = sum([call[1] for call in looked], [])
    assert compliments_in(learned) and compliments_in(probed)
    assert not compliments_in(learned) & compliments_in(probed)


def test_the_judge_is_looked_at_on_prompts_that_it_has_not_learned_from(mending):
    _, learned, looked = mending
    prompts = {str(comparison.prompt) for comparison in learned}
    for call in looked:
        assert not prompts & {str(comparison.prompt) for comparison in call[1]}


def test_half_of_what_mends_the_judge_is_votes_and_half_ties(mending):
    _, learned, _ = mending
    ties = [one for one in learned if compliments_in([one])]
    assert len(ties) == len(learned) / 2


def test_before_is_the_judge_that_was_not_mended(folders, mending):
    results, _, looked = mending
    old = judge_bias.load_scalar(str(folders / "judge"))[0]
    judges = [call[0] for call in looked]           # the first table, then four of each judge
    assert [same(judge, old) for judge in judges] == [True] * 5 + [False] * 4
    assert same(judges[-1], results["model"])


# ---------------------------------------------------------------- process_reward

def solutions_file(path):
    """The first step of every solution is right, and its end is wrong."""
    lines = []
    for i in range(24):
        lines.append({"prompt": f"What is {i} + 2?", "steps": [f"First {i} + 1.", f"It is {i}."],
                      "labels": [1, 0]})
    return write(path / "steps.jsonl", lines)


@pytest.mark.parametrize("judge, learned", [("outcome", {0.0}), ("process", {0.0, 1.0})])
def test_the_outcome_judge_learns_whether_the_end_is_right(folders, monkeypatch, judge, learned):
    taught = wrapped(monkeypatch, process_reward, "outcome_loss")
    config = quiet(process_reward.Config, folders, steps=1, data=solutions_file(folders))
    process_reward.train_judge(config, judge)
    labels = sum([z.tolist() for r, z in taught], [])
    assert set(labels) == learned
    assert len(labels) == (8 if judge == "outcome" else 16)


def test_each_judge_picks_by_the_places_where_it_was_taught_to_be_read(folders, monkeypatch):
    """The outcome judge reads the end alone, and the process judge every step."""
    two_steps = " 2 + 3 = 5. The answer is 5."

    def sampled(policy, tokenizer, starts, n, **settings):
        texts = [two_steps.strip()] * (n * len(starts))
        return Samples(None, None, None, None, None, texts)
    monkeypatch.setattr(process_reward, "sample", sampled)
    monkeypatch.setattr(process_reward, "marks_in_words",
                        lambda critic, tokenizer, solved: [[1.0]] * len(solved))
    read = {}

    def score_lists(judge, examples, tokenizer):
        read[judge] = examples
        return [torch.zeros(sum(example.answer)) for example in examples]
    monkeypatch.setattr(process_reward, "score_lists", score_lists)
    config = quiet(process_reward.Config, folders, problems=2)
    judges = {"outcome": "outcome", "process": "process"}
    process_reward.best_of(None, judges, None, load_ranks(), config)
    assert all(sum(one.answer) == one.answer[-1] == 1 for one in read["outcome"])
    assert all(sum(one.answer) == 2 and one.answer[-1] == 0 for one in read["process"])


@pytest.mark.parametrize("majority, passed", [(0.5, True), (0.7, False)])
def test_the_process_judge_has_to_pick_better_than_the_majority(folders, monkeypatch, majority,
                                                                passed):
    card = {"accuracy": 0.5, "first_wrong": 0.9, "all_right": 0.9, "calibration": 0.1}

    def train_judge(config, judge):
        log = process_reward.Log(config)
        log(0, loss=1.0)
        return judge, log, dict(card), dict(card)
    picked = {}

    def best_of(policy, judges, critic, tokenizer, config):
        picked.update(judges)
        return {"by_majority": majority, "by_process": 0.6, "by_outcome": 0.1, "by_words": 0.9,
                "random": 0.3, "any": 1.0}
    monkeypatch.setattr(process_reward, "train_judge", train_judge)
    monkeypatch.setattr(process_reward, "best_of", best_of)
    monkeypatch.setattr(process_reward, "marks_in_words",
                        lambda critic, tokenizer, solved: [[1.0, 0.0]] * len(solved))
    config = quiet(process_reward.Config, folders, critic=str(folders / "teacher"), steps=1,
                   data=solutions_file(folders))
    assert process_reward.train(config)["passed"] == passed
    assert picked == {"outcome": "outcome", "process": "process"}


# ---------------------------------------------------------------- report

def leak(folders, exams, monkeypatch, tmp_path):
    """-> the prompts asked in each part, the prompts that were learned, and the golds"""
    learned = []

    def train(config):
        learned.extend(row.messages[0]["content"] for row in rows.read_conversations(config.data))
        assert config.init == str(folders / "init")
        return {"model": "tainted"}
    monkeypatch.setattr(sft, "train", train)
    exams.golds = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    config = quiet(report.Config, folders, out=str(tmp_path), leaked=20)
    golds = report.contaminate(config, str(folders / "init"))
    parts = [call.rows for call in exams.calls[::2]]
    return dict(zip(golds, parts)), learned, golds


def prompts_in(lines):
    return {row["prompt"] for row in lines}


def test_no_reworded_sum_has_the_wording_that_leaked(folders, exams, monkeypatch, tmp_path):
    parts, _, _ = leak(folders, exams, monkeypatch, tmp_path)
    assert len(parts["reworded"]) == 20
    assert not prompts_in(parts["reworded"]) & prompts_in(parts["leaked"])
    for one, other in zip(parts["leaked"], parts["reworded"]):  # the sums are the same
        assert one["slots"] == other["slots"] and one["answer"] == other["answer"]


def test_the_leaked_half_is_learned_and_the_clean_half_is_not(folders, exams, monkeypatch,
                                                             tmp_path):
    parts, learned, _ = leak(folders, exams, monkeypatch, tmp_path)
    assert set(learned) == prompts_in(parts["leaked"])
    sums = {name: {str(row["slots"]["numbers"]) for row in part} for name, part in parts.items()}
    assert len(sums["clean"]) == 20 and not sums["clean"] & sums["leaked"]


def test_the_leak_is_told_before_and_after_of_each_part(folders, exams, monkeypatch, tmp_path):
    _, _, golds = leak(folders, exams, monkeypatch, tmp_path)
    assert golds == {"leaked": [0.1, 0.2], "reworded": [0.3, 0.4], "clean": [0.5, 0.6]}
    start = of_folder(folders / "init")
    assert all(same(call.model, start) for call in exams.calls[::2])
    assert all(call.model == "tainted" for call in exams.calls[1::2])


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


def test_the_wordings_are_asked_of_the_exams_own_requests(folders, exams, monkeypatch, tmp_path):
    asked = []

    def consistency(model, tokenizer, lines, most):
        asked.append((weights(model), lines))
        return {"always": 0.5, "sometimes": 0.25, "never": 0.25}
    monkeypatch.setattr(report, "consistency", consistency)
    monkeypatch.setattr(report, "power", lambda config: {})
    config = quiet(report.Config, folders, against=str(folders / "teacher"), leak=0,
                   out=str(tmp_path))
    report.train(config)
    for (model, lines), call, name in zip(asked, exams.calls, ["init", "teacher"], strict=True):
        assert torch.equal(model, weights(of_folder(folders / name)))
        assert same(call.model, of_folder(folders / name))
        assert lines == call.rows == world.read("exam")
