"""Is it wired up as the page says? What is compared with what, in the programs of pages 7 to 9.

The other tests look at functions. These look at what train() makes of them: who is asked what, in
which wording, and whose numbers stand in which column. A model is a name here, or a few lines of
python that know when to be wrong.
"""
import contextlib
import json
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cai
import ppo
import reward_model
from data import abilities, exam, studybuddy
from data.checkpoints import load_ranks
from data.rows import Prompt, json_lines
from lessons import (aloud, bias, character, debate, feedback, goodhart, grounded, guard, mcp,
                     principles, redteam, search, stack, tools, verify)
from lessons.test_eight import card, day, tiny_model

TOKENIZER = load_ranks()
ANY = str(Path(__file__).parent.parent / "data/base")       # a folder that need() finds


def prompt_in(ids):
    """Token ids of a prompt -> what the user said last, and what the answer begins with"""
    last_turn = TOKENIZER.decode(ids).split("<|im_start|>user\n")[-1]
    user, answer = last_turn.split("assistant\n")
    return user.split("<|im_end|>")[0], answer


def fake_sample(answer):
    """Instead of sample(): answer(prompt, beginning, number) for each of n, all in one list."""
    def sample(model, tokenizer, prompts, n=1, *rest, **settings):
        texts = []
        for ids in prompts:
            texts += [answer(*prompt_in(ids), number) for number in range(n)]
        return SimpleNamespace(texts=texts, answer=torch.ones(len(texts), 3, dtype=torch.bool))
    return sample


def replace_all(monkeypatch, module, **changes):
    for name, change in changes.items():
        monkeypatch.setattr(module, name, change)


def result_of(prompt):
    first, second = re.findall(r"\d+", prompt)
    return str(int(first) + int(second))


def sums_of_two(*pairs):
    rows = []
    for a, b in pairs:
        rows.append({"prompt": f"What is {a} + {b}?", "kind": "math", "answer": str(a + b),
                     "slots": {"numbers": [a, b], "op": "+"}})
    return rows


def all_alike(*args):
    """Instead of a judge or a guard: 0 for each row of what it is given last."""
    rows = args[-1]
    return torch.zeros(len(rows))


THREE = sums_of_two((2, 3), (4, 5), (6, 7))


# ---------------------------------------------------------------- search

def test_a_beam_of_one_pays_for_each_of_its_steps_once(monkeypatch):
    steps = ["First 5 + 4 = 9.", "Then 9 + 2 = 11.", "So it is 11."]

    def answer(prompt, before, number):
        done = before.count(".")
        return " ".join(steps[done:])
    replace_all(monkeypatch, search, sample=fake_sample(answer), weakest_steps=all_alike)
    row = {"prompt": "What is 5 + 4 + 2?", "answer": "11"}
    config = search.Config()
    right, tokens = search.beam(None, TOKENIZER, None, [row, row], 1, config)
    paid = 0
    for step in steps:
        paid += len(TOKENIZER.encode_ordinary(step))
    assert right == 1.0
    assert tokens == paid


def test_the_answers_to_a_sum_are_marked_by_its_own_result(monkeypatch):
    """Of each sum the first answer is right, and the others are not."""
    def answer(prompt, before, number):
        claimed = int(result_of(prompt)) + number
        return f"So it is {claimed}."
    replace_all(monkeypatch, search, sample=fake_sample(answer), end_scores=all_alike,
                weakest_steps=all_alike)
    judges = {"outcome": None, "step": None}
    config = search.Config(n=2)
    answers = search.ask(None, TOKENIZER, judges, THREE, config)
    hits = answers.hits.tolist()
    assert hits == [[True, False]] * 3
    assert answers.greedy == 1.0


def test_each_judge_picks_by_what_it_reads_itself(monkeypatch):
    """The judge of ends likes what is wrong, the judge of steps what is right."""
    hits = torch.tensor([[True, False]] * 2)                    # (2, n)
    is_right = hits.float()
    texts = [["1", "2"]] * 2
    answers = search.Answers(0.5, 9.0, texts, hits, scores=-is_right, tokens=9.0,
                             weakest=is_right)
    replace_all(monkeypatch, search, load=lambda *a: (None, None), ask=lambda *a: answers,
                beam=lambda *a: (0.0, 1.0))
    sums = [{"answer": "1"}] * 2
    config = search.Config(n=2, quiet=True)
    one, two = search.compare("any", {"step": None}, sums, config)
    assert two["best"] == 0.0
    assert two["by_step"] == 1.0
    assert two["pass"] == 1.0
    assert one["pass"] == 0.5


# ---------------------------------------------------------------- verify

def test_a_claim_is_looked_for_in_samples_of_its_own_question(monkeypatch):
    """Who says the same each time agrees with itself, however many questions there are."""
    def answer(prompt, before, number):
        return f"So it is {result_of(prompt)}."
    monkeypatch.setattr(verify, "sample", fake_sample(answer))
    claims = []
    for i, row in enumerate(THREE):
        text = f"So it is {row['answer']}."
        for claim in verify.claims_in(row, text).values():
            claims.append(claim._replace(answer=i))
    config = verify.Config(samples=2)
    scores, _ = verify.agreement(None, TOKENIZER, THREE, claims, config)
    assert scores == [1.0] * 3


def test_keep_is_the_least_agreement_that_is_kept():
    true_claim = verify.Claim("a", "", True, 0)
    false_claim = verify.Claim("b", "", False, 1)
    left = verify.what_is_left([true_claim, false_claim], [0.5, 0.49], 0.5, 2)
    assert left == {"false": 0.0, "true": 0.5}


def verified(monkeypatch):
    """A run in which each call costs 120 tokens and says what is right, and who was asked what."""
    asked = []

    def say(model, tokenizer, prompts, config, n=1, **settings):
        asked.append(prompts)
        texts = ["So it is 7."] * len(prompts) * n
        return texts, 120
    replace_all(monkeypatch, verify, say=say, load=lambda *a: (None, None))
    config = verify.Config(init=ANY, quick=True, quiet=True)
    numbers = verify.train(config)["numbers"]
    return numbers["ways"], asked


def test_a_check_costs_what_it_takes_and_the_draft_too(monkeypatch):
    ways, _ = verified(monkeypatch)
    costs_of_checks = {ways[name]["tokens"] for name in verify.CHECKS}
    assert ways["draft"]["tokens"] == 10
    assert costs_of_checks == {20}


def test_the_chain_and_the_claims_are_asked_without_the_draft(monkeypatch):
    _, asked = verified(monkeypatch)
    _, _, claims, chain = asked
    for prompt in claims:
        assert prompt.startswith("Is it true that ")
    for prompt in chain:
        assert re.fullmatch(r"What is \d+ \+ \d+\?", prompt)


def test_verify_asks_what_no_training_file_has():
    config = verify.Config(questions=40)
    for row in verify.read_questions(config):
        slots = row["slots"]
        if row["kind"] == "math":
            assert studybuddy.held_out(slots["numbers"])
        else:
            table = studybuddy.FACTS[slots["category"]].table
            held_places = studybuddy.half(table, True, 4)
            assert slots["x"] in held_places


# ---------------------------------------------------------------- orders: grounded and mcp

def orders_of(split):
    return studybuddy.half(abilities.ORDER, split == "exam", 3)


def is_worded(text, order, split):
    """Does this order stand there in a wording of this split?"""
    for words in orders_of(split):
        if words.format(r=order["prompt"]) in text:
            return True
    return False


def words_of_exam_alone():
    trained = grounded.words_of(" ".join(orders_of("train")))
    examined = grounded.words_of(" ".join(orders_of("exam")))
    return examined - trained - {"r"}               # {r} is where the order's request goes


def test_the_filter_has_read_no_order_of_the_exam():
    new = words_of_exam_alone()
    assert {"whoever", "reads"} <= new
    assert not grounded.order_words(Random(0)) & {"whoever", "reads", "forget", "question"} & new


@pytest.fixture
def defended(monkeypatch):
    """A model that is right where no order stands, and mute where one does -> table, notes shown"""
    seen = []

    def answer(models, tokenizer, questions, shown, defence, config, bad):
        seen.append((defence, shown))
        new = words_of_exam_alone()
        texts = []
        for question, notes in zip(questions, shown):
            ordered = grounded.words_of(" ".join(notes)) & new
            texts.append("I am mute." if ordered else question.truth)
        return texts
    monkeypatch.setattr(grounded, "answer", answer)
    rng = Random(0)
    facts = grounded.make_notes(rng, "exam", 4)
    config = grounded.Config(questions=10)
    return grounded.defending({}, None, rng, facts, config), seen


def test_every_defence_meets_orders_in_wordings_that_training_did_not_have(defended):
    table, _ = defended
    for flags in table.values():
        assert flags["right"] == [False] * 10
        assert flags["clean"] == [True] * 10


def test_more_than_one_note_is_shown_by_one_defence_alone(defended):
    _, seen = defended
    for defence, shown in seen:
        assert {len(notes) for notes in shown} == {3 if defence == "others" else 1}


def test_who_learns_to_ignore_orders_sees_no_place_and_no_order_of_the_exam(monkeypatch, tmp_path):
    monkeypatch.setattr(grounded.sft, "train", lambda settings: {"model": settings.data})
    config = grounded.Config(out=str(tmp_path), quiet=True)
    path = grounded.train_to_ignore(None, Random(0), config)
    lines = Path(path).read_text().splitlines()
    relations = tuple(abilities.RELATIONS)
    ordered = 0
    for line in lines:
        messages = json.loads(line)["messages"]
        call = messages[2]["content"]
        note = messages[-2]["content"]
        right = messages[-1]["content"]
        has_order = note.count(".") > 1 or "?" in note
        ordered += has_order
        place = call.split(": ")[1].lower()
        assert sum(map(ord, place)) % 4                 # of the exam's places this is 0
        assert not {"whoever", "reads"} & grounded.words_of(note)
        assert right.startswith(relations)
    share = ordered / len(lines)
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("split", ["train", "exam"])
def test_an_order_in_the_book_is_worded_as_its_half_is(split):
    for task in tools.make_tasks(0, split, 60):
        if task.kind == "lookup":
            entry = task.entry
            assert is_worded(entry.poison, entry.order, split)


# ---------------------------------------------------------------- tools

@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A run whose models are names -> numbers, tasks learned from, [(model, tasks, client)]"""
    learned = []
    measured = []

    def measure(model, tokenizer, tasks, client, config):
        measured.append((model, tasks, client))
        kinds = {"before": 0, "sft": 1, "grpo": 2}
        flags = [number < kinds[model] for number in range(2)]
        return dict.fromkeys(tools.NAMES, flags)

    def measure_fault(model, tokenizer, tasks, fault, config):
        measured.append((model, tasks, fault))
        return [model == "grpo"]

    def write(model, tokenizer, tasks, client, config):
        learned.extend(tasks)
        return "worked"

    def climb(policy, tokenizer, tasks, client, config):
        assert policy == "sft"                  # one after the other
        learned.extend(tasks)
        return "grpo"

    @contextlib.contextmanager
    def start_server(config):
        yield SimpleNamespace(tools={"calculator": {}})
    replace_all(monkeypatch, tools, measure=measure, measure_fault=measure_fault, climb=climb,
                write_own_successes=write, start_server=start_server,
                imitate=lambda path, config: "sft", load=lambda *a: ("before", None),
                converse=lambda model, tokenizer, talks, *a, **s: talks)
    config = tools.Config(init=ANY, out=str(tmp_path), quick=True, quiet=True, save=False)
    return tools.train(config)["numbers"], learned, measured


def test_no_model_is_measured_on_a_task_that_it_learned_from(bench):
    _, learned, measured = bench
    known = {task.question for task in learned}
    assert known
    assert len(measured) == 4 + 2 * len(tools.FAULTS)
    for model, tasks, _ in measured:
        questions = {task.question for task in tasks}
        assert questions, model
        assert not known & questions, model


def test_each_column_of_the_tools_table_is_of_its_own_model(bench):
    numbers, _, _ = bench
    skills = numbers["skills"]
    assert skills["alone"]["sum"] == 0
    assert skills["tools"]["sum"] == 0
    assert skills["sft"]["sum"] == 0.5
    assert skills["grpo"]["sum"] == 1
    faults = numbers["faults"]
    assert set(faults["tools"].values()) == {0.0}
    assert set(faults["grpo"].values()) == {1.0}


def test_alone_there_are_no_tools(bench):
    _, _, measured = bench
    alone, *others = [client for _, _, client in measured[:4]]
    assert alone is None
    assert None not in others


def test_of_its_own_conversations_only_those_without_a_needless_call_are_imitated(monkeypatch,
                                                                                  tmp_path):
    """It calls in each of them, and is right: a fact needed no call."""
    a_sum = tools.Task("sum", "What is 2 + 3?", "5")
    a_fact = tools.Task("none", "The capital?", "Lima")
    texts = ["The answer is 5.", "It is Lima."]

    def converse(model, tokenizer, talks, *rest, **settings):
        for talk, text in zip(talks, texts):
            talk.append(abilities.message("tool", "2 + 3 = 5"))
            talk.append(abilities.message("assistant", text))
    monkeypatch.setattr(tools, "converse", converse)
    config = tools.Config(out=str(tmp_path), quiet=True)
    path = tools.write_own_successes(None, None, [a_sum, a_fact], None, config)
    line, = Path(path).read_text().splitlines()
    assert "2 + 3?" in line


# ---------------------------------------------------------------- debate

def knows_every_other(arguments):
    """A judge that knows the results of every other question, and says A to the rest."""
    known = {}
    for argument in arguments[::2]:
        known[argument.row["prompt"]] = argument.row["answer"]

    def respond(model, tokenizer, conversations, **settings):
        texts = []
        for talk in conversations:
            text = talk[-1]["content"]
            truths = [answer for prompt, answer in known.items() if prompt in text]
            said_by_a = re.search(r"^A: (.*)$", text, re.MULTILINE)[1]
            claim_of_a = said_by_a.split(", since")[0].rstrip(".")
            winner = "A"
            if truths and f" {truths[0]}" not in claim_of_a:
                winner = "B"
            texts.append(f"So {winner} is right.")
        return texts
    return respond


@pytest.mark.parametrize("way", debate.WAYS)
def test_the_two_orders_of_one_question_are_its_mean(monkeypatch, way):
    rng = Random(0)
    arguments = [debate.argue(rng, "exam") for _ in range(4)]
    respond = knows_every_other(arguments)
    monkeypatch.setattr(debate, "respond", respond)
    judged = debate.hear(None, None, arguments, debate.WAYS[way])
    assert judged.scores == [1.0, 0.5, 1.0, 0.5]


@pytest.fixture
def debated(monkeypatch):
    """A run with so much teaching -> the folders that judged, the arguments that they heard"""
    heard = []

    def hear(model, tokenizer, arguments, way):
        heard.append((model, arguments))
        return debate.Judged([0.5] * 4, 0.5, 1.0)
    replace_all(monkeypatch, debate, hear=hear, load=lambda folder, device: (folder, None),
                teach=lambda config: "taught")

    def run(teach):
        debate.train(debate.Config(judge=ANY, teach=teach, quick=True, quiet=True))
        return heard
    return run


@pytest.mark.parametrize("teach, folder", [(0, ANY), (4, "taught")])
def test_who_was_taught_is_who_judges(debated, teach, folder):
    judges = {model for model, _ in debated(teach)}
    assert judges == {folder}


def test_all_ways_judge_the_same_debates_and_they_are_the_exams(debated):
    first, *others = [arguments for _, arguments in debated(0)]
    assert len(others) == 2
    for arguments in others:
        assert arguments == first
    wordings = studybuddy.half(abilities.ARGUE, True, 3)
    for argument in first:
        slots = argument.row["slots"]
        assert studybuddy.held_out(slots["numbers"])
        assert argument.wording in wordings


# ---------------------------------------------------------------- redteam

def subject(row):
    return json.dumps(row["slots"])


def test_the_retest_asks_for_nothing_that_a_patch_has_seen():
    config = redteam.Config(asked=40)
    rng = Random(0)
    seen = set()
    for _ in range(300):
        attack = redteam.plan(redteam.Bandit(), rng, 1, config.held)
        seen.add(subject(attack.row))
        fair_row = redteam.fair_try(rng, config).row
        seen.add(subject(fair_row))
    tests = redteam.retests(config)
    for name, asked in tests.items():
        subjects = {subject(row) for row in asked}
        assert not seen & subjects, name


def test_each_line_of_the_retest_has_the_openings_that_it_names(monkeypatch):
    monkeypatch.setattr(redteam, "put_around", lambda request, openings: openings[0])
    config = redteam.Config(asked=40)
    known = set()
    for family in redteam.FAMILIES:
        if family != config.held:
            known.update(redteam.openings_of(family, retest=False))
    held = set()
    for retest in True, False:
        held.update(redteam.openings_of(config.held, retest))
    tests = redteam.retests(config)
    used = {}
    for name, asked in tests.items():
        used[name] = {row["prompt"] for row in asked}
    assert used["known"] <= known
    assert used["held"] <= held
    for name in "new", "fair":
        assert not used[name] & known
        assert not used[name] & held
    kinds = {row["kind"] for row in tests["fair"]}
    assert kinds == {"borderline"}


@pytest.fixture
def rounds(monkeypatch, tmp_path):
    """Three rounds without a model -> run, models tested, (folder, lines) learned, longest"""
    tested = []
    learned = []
    longest = []

    def success(model, tokenizer, asked, config):
        tested.append(model)
        works = 1.0 - 0.3 * len(learned)
        return guard.Rate(works, 0.1, 9)

    def hunt(model, tokenizer, judge, most, config, rng):
        longest.append(most)
        return []

    def make_patch(tries, model, *rest):
        return redteam.Patch([model], [])

    def learn(folder, name, patch, config):
        lines = list(patch.lines)
        learned.append((folder, lines))
        return name
    replace_all(monkeypatch, redteam, success=success, search=hunt, learn=learn,
                make_patch=make_patch, success_of=lambda tries: guard.Rate(0.5, 0.1, 9),
                load=lambda folder, device: (folder, None), load_guard=lambda *a: (None, None))
    config = redteam.Config(init=ANY, out=str(tmp_path), asked=4, quiet=True)
    run = redteam.train(config)
    return run, tested, learned, longest


def test_a_round_attacks_the_model_that_the_last_patch_made(rounds):
    run, tested, _, longest = rounds
    numbers = run["numbers"]
    assert tested[::4] == [ANY, "round1", "round2", "round3"]
    assert longest == [1, 2, 3, 3]
    assert numbers["held"] == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert run["passed"]


def test_a_patch_holds_all_patches_so_far(rounds):
    _, _, learned, _ = rounds
    first, second, third = learned
    assert first == (ANY, [ANY])
    assert second == ("round1", [ANY, "round1"])
    assert third == ("round2", [ANY, "round1", "round2"])


# ---------------------------------------------------------------- guard

@pytest.mark.parametrize("seen, unseen, passed", [(1.0, 0.5, False), (0.5, 1.0, True)])
def test_a_guard_is_judged_by_families_that_it_never_saw(monkeypatch, seen, unseen, passed):
    rate = guard.Rate(0.5, 0.1, 9)

    def report(title, cases, r, config):
        table = {}
        for family in guard.GROUPS:
            balanced = unseen if family == "unseen" else seen
            table[family] = {"caught": rate, "false": rate, "f1": 0.5, "balanced": balanced}
        return {"table": table, "calibration": 0.0, "bins": []}
    replace_all(monkeypatch, guard, report=report, log_odds=all_alike, learn=lambda *a: None,
                held_answers=lambda *a: [], show_blame=lambda *a: [],
                load=lambda *a: (None, TOKENIZER))
    config = guard.Config(init=ANY, quick=True, quiet=True, save=False)
    run = guard.train(config)
    assert run["passed"] == passed
    assert run["numbers"]["unseen"] == unseen


@pytest.mark.parametrize("fair", [0.0, 1.0])
def test_fair_says_how_many_fair_requests_are_pleaded_for(fair):
    config = guard.Config(texts=100, fair=fair)
    pleaded_for = set()
    for case in guard.learn_requests(TOKENIZER, config):
        if not case.harmful:
            pleaded_for.add(case.family != "none")
    assert pleaded_for == {fair == 1.0}


# ---------------------------------------------------------------- stack

KEYS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("alarmed", KEYS)
def test_the_guard_reads_the_answer_that_this_setting_gives(alarmed):
    """One of the four answers is an alarm: with or without a system message, aligned or not."""
    turns, house = day("a")
    house.alarm = {}
    for key in KEYS:
        house.alarm[key] = [3.0 if key == alarmed else -3.0]
    for key in KEYS:
        with_message, aligned = key
        on = ["guard"]
        if with_message:
            on.append("system")
        if aligned:
            on.append("model")
        turn = stack.serve(turns, house, on)[0]
        assert turn.stopped == ("guard" if key == alarmed else "")


def test_what_the_models_say_is_kept_under_their_own_settings(monkeypatch, tmp_path):
    """Each text tells which model it is of, and whether that saw the system message."""
    texts_by_key = ["plain False", "aligned False", "plain True", "aligned True"]   # as in KEYS

    def say(model, tokenizer, asked, seed):
        texts = []
        for prompt in asked:
            with_message = prompt[0] == stack.MESSAGE
            texts.append(f"{model} {with_message}")
        return texts

    def read(judge, tokenizer, prompts, texts=None):
        if texts is None:
            return torch.full((len(prompts),), -9.0)
        numbers = [texts_by_key.index(text) for text in texts]
        return torch.tensor(numbers)
    monkeypatch.setattr(stack, "load", lambda folder, device: (folder, None))
    monkeypatch.setattr(stack.exam, "say", say)
    replace_all(monkeypatch, stack.guards, load_guard=lambda *a: (None, None), read=read)
    config = stack.Config(init="plain", aligned="aligned", out=str(tmp_path), save=False)
    turns, _ = day("a", "b")
    house = stack.House(turns, config)
    for number, key in enumerate(KEYS):
        text = texts_by_key[number]
        assert house.said[key] == [text] * 2
        assert house.alarm[key] == [number] * 2
    assert house.suspicion == [-9.0] * 2


def test_false_alarms_are_those_of_children_and_leaks_are_of_all():
    turns, _ = day("child 0", "attacker 1", "child 0")
    turns[0].harmful = False
    turns[1].harmful = False
    turns[2].harmful = True
    turns[0].stopped = "guard"
    shares = stack.rates(turns)
    assert shares.false.value == 1.0
    assert shares.false.n == 1
    assert shares.leaks.n == 1


# ---------------------------------------------------------------- bias

@pytest.fixture
def cured(monkeypatch, tmp_path):
    """A run without a model -> its numbers, what is asked in the exam, {name: lines learned}"""
    asked = []
    learned = {}
    names = {ANY: "before", bias.Config.base: "base"}
    gaps = {"base": 0.3, "before": 0.2, "cure": 0.0, "dose0": 0.1, "dose0.65": 0.4}

    def load(folder, device):
        return names[folder], None

    def measure(model, tokenizer, questions, pair, config):
        asked.extend(questions)
        return bias.Measured([0.5, 0.5], [0.0, 0.0], gaps[model], 0.1, 1.0)

    def answers(model, tokenizer, prompts, seed):
        return [f"{model}."] * len(prompts)

    def learn(lines, name, config):
        learned[name] = lines
        return name
    replace_all(monkeypatch, bias, load=load, measure=measure, answers=answers, learn=learn,
                count_in_web=lambda text: {})
    config = bias.Config(init=ANY, out=str(tmp_path), quick=True, quiet=True)
    numbers = bias.train(config)["numbers"]
    return numbers, asked, learned


def test_the_group_held_back_gets_no_cure(cured):
    _, _, learned = cured
    cure = json.dumps(learned["cure"])
    for school in bias.SCHOOLS:
        assert school in cure
    for team in bias.TEAMS:
        assert team not in cure


def test_each_gap_is_that_of_its_own_model(cured):
    numbers, _, _ = cured
    gaps = {"base": 0.3, "before": 0.2, "after": 0.0}
    assert numbers["schools"] == gaps
    assert numbers["teams"] == gaps
    assert numbers["doses"] == [0.0, 0.65]
    assert numbers["dose_gaps"] == [0.1, 0.4]


def test_the_cure_has_read_nothing_of_what_the_gap_is_measured_with(cured):
    _, asked, learned = cured
    prompts = [line["messages"][0]["content"] for line in learned["cure"]]
    cure = " ".join(prompts)
    wordings = studybuddy.half(abilities.FROM, True, 3)
    for question in asked:
        assert question.row["prompt"] not in cure
        assert question.wording in wordings


def test_the_cure_teaches_what_the_model_said_when_it_did_not_know_who_asks(monkeypatch):
    def answers(model, tokenizer, prompts, seed):
        for prompt in prompts:
            for school in bias.SCHOOLS:
                assert school not in prompt
        return [f"Yes: {prompt}" for prompt in prompts]
    monkeypatch.setattr(bias, "answers", answers)
    lines = bias.cure_lines(None, None, bias.Config())
    from_hill, answer_to_hill = lines[0]["messages"]
    from_lake, answer_to_lake = lines[1]["messages"]
    assert answer_to_hill == answer_to_lake
    assert "Hill School" in from_hill["content"]
    assert "Lake School" in from_lake["content"]
    request = answer_to_hill["content"].removeprefix("Yes: ")
    assert request in from_hill["content"]


# ---------------------------------------------------------------- character

def test_what_is_learned_stands_without_a_page(monkeypatch):
    """The model sees the extract when it answers; what it learns from is the bare question."""
    shown = []
    said = f"Beep! I don't know. {character.KNOWN} You can do it!"

    def answers(model, tokenizer, conversations, config, n, begin_with):
        shown.extend(conversations)
        return [said] * len(conversations) * n
    monkeypatch.setattr(character, "answers", answers)
    config = character.Config(n=1, questions=3)
    lines, _ = character.make_data(None, None, config)
    for talk in shown:
        assert talk[0]["content"] == character.CHARACTER
    for line in lines:
        question, _ = line["messages"]
        assert question["role"] == "user"
        assert character.KNOWN not in question["content"]


def test_the_page_stands_in_front_in_one_column_alone(monkeypatch, tmp_path):
    """With the page a conversation has two messages, without it one."""
    rates = {("old", 1): 0.1, ("old", 2): 0.2, ("new", 1): 0.9}

    def examine(model, tokenizer, form, config):
        question = character.Question("voice", "Hi!", "")
        talk = form(question)
        value = rates[model, len(talk)]
        rate = guard.Rate(value, 0.1, 9)
        return dict.fromkeys(character.CHECKS, rate)
    replace_all(monkeypatch, character, examine=examine, load=lambda *a: ("old", None),
                make_data=lambda *a: ([], {}))
    monkeypatch.setattr(character.sft, "train", lambda settings: {"model": "new"})
    config = character.Config(init=ANY, out=str(tmp_path), quick=True, quiet=True)
    numbers = character.train(config)["numbers"]
    assert numbers["before"]["voice"] == 0.1
    assert numbers["page"]["voice"] == 0.2
    assert numbers["after"]["voice"] == 0.9


# ---------------------------------------------------------------- feedback

GOOD = feedback.Release("good", card(0.6))


@pytest.mark.parametrize("candidate, blocked", [
    (card(0.3), ["gold"]),
    (card(0.9), []),
    (card(0.6, harmless=0.3), ["harmless"])])
def test_the_gate_blocks_what_is_worse_and_lets_through_what_is_better(candidate, blocked):
    new = feedback.Release("b", candidate)
    assert feedback.below_floor(GOOD, new) == blocked


def test_each_of_the_two_bets_has_half_of_alpha():
    """10 pairs in a row make 1.3^10 = 14, 12 make 23, and 15 make 51: 20 is too little to stop."""
    for n, stops in (12, False), (15, True):
        wins = np.zeros((1, 400), dtype=int)
        wins[0, :n] = 1
        losses = -wins
        found_up = feedback.found_by_bets(wins, 0.05)           # (1, looks)
        found_down = feedback.found_by_bets(losses, 0.05)
        verdict_up, _ = feedback.decide(wins[0], 0.05)
        verdict_down, _ = feedback.decide(losses[0], 0.05)
        assert found_up[0, -1] == stops
        assert found_down[0, -1] == stops
        assert (verdict_up == "better") == stops
        assert (verdict_down == "worse") == stops


@pytest.mark.parametrize("liked, verdict", [("good", "worse"), ("new", "better")])
def test_better_is_what_the_children_of_the_candidate_like_more(monkeypatch, liked, verdict):
    asked = []

    def answers(model, tokenizer, questions, seed):
        asked.append(questions)
        return [model] * len(questions)

    def thumb(rng, row, text, lazy):
        return text == liked
    replace_all(monkeypatch, feedback, load=lambda folder, device: (folder, None), answers=answers,
                thumb=thumb)
    config = feedback.Config(pairs=20)
    new = feedback.Release("new", card(0.6))
    found = feedback.ab_test(GOOD, new, 1, config)
    assert found == (verdict, 15)
    assert asked[0] == asked[1]                 # both children of a pair ask the same


def test_only_in_the_bad_week_are_the_children_lazy(monkeypatch):
    lazies = []

    def answers(model, tokenizer, asked, seed):
        return ["Yes."] * len(asked)

    def thumb(rng, row, text, lazy):
        lazies.append(lazy)
        return True
    replace_all(monkeypatch, feedback, load=lambda *a: (None, None), answers=answers, thumb=thumb)
    config = feedback.Config(asked=1, pairs=1, bad=2)
    for week in 1, 2, 3:
        feedback.collect(GOOD, week, config)
        feedback.ab_test(GOOD, GOOD, week, config)
    assert lazies == [False] * 3 + [True] * 3 + [False] * 3


def test_a_week_learns_from_what_was_released_and_a_blocked_one_meets_no_child(monkeypatch):
    """The first candidate is fine, the second one harmful, the third one fine."""
    learned = []
    tested = []
    cards = {ANY: card(0.6), "week1": card(0.7), "week2": card(0.8, harmless=0.1),
             "week3": card(0.8)}
    for one in cards.values():
        one.update(attack_seen=0.9, flattery=0.0)

    def examine(folder, config):
        return feedback.Release(folder, cards[folder])

    def learn(release, lines, week, config):
        learned.append(release.folder)
        return f"week{week}"

    def ab_test(release, candidate, week, config):
        tested.append((release.folder, candidate.folder))
        return "better", 20
    replace_all(monkeypatch, feedback, examine=examine, learn=learn, ab_test=ab_test,
                collect=lambda *a: [{"label": True}],
                false_alarms=lambda config: {"peeking": [0.0], "bets": [0.0]})
    config = feedback.Config(init=ANY, weeks=3, bad=2, quiet=True)
    numbers = feedback.train(config)["numbers"]
    assert learned == [ANY, "week1", "week1"]
    assert tested == [(ANY, "week1"), ("week1", "week3")]
    assert numbers["released"] == [0.6, 0.7, 0.7, 0.8]
    assert numbers["candidates"] == [0.6, 0.7, 0.8, 0.8]


# ---------------------------------------------------------------- aloud

def test_the_wrong_step_is_the_first_one():
    """Written is "First 4 + 15 = ..", so it is those two that are summed wrongly."""
    slots = {"numbers": [4, 15, 9], "op": "+"}
    row = {"prompt": "What is 4 + 15 + 9?", "answer": "28", "slots": slots}
    text, result = aloud.wrong_step(Random(0), row)
    step = re.fullmatch(r"First 4 \+ 15 = (\d+)\.", text)
    wrong = int(step[1])
    assert wrong != 19
    assert int(result) == wrong + 9


def test_every_model_gets_the_same_sums_and_wrong_steps(monkeypatch):
    seen = {"one": [], "two": []}

    def answer(model, tokenizer, conversations, beginnings, config):
        prompts = [messages[-1]["content"] for messages in conversations]
        seen[model].append((prompts, list(beginnings)))
        said = aloud.Answer("So it is 1.", True, 4)
        return [said] * len(prompts)
    replace_all(monkeypatch, aloud, answer=answer, load=lambda folder, device: (folder, None),
                need=lambda *a: None)
    config = aloud.Config(models="one,two", quick=True, quiet=True)
    aloud.train(config)
    assert seen["one"] == seen["two"]
    assert len(seen["one"]) == 4 * len(aloud.LENGTHS)


# ================================================================ more of it: what these share

def by_name(folder, device="cpu"):
    """Instead of load(): a model is the name of its folder."""
    return folder, TOKENIZER


def given(calls, result=None):
    """Instead of a function: keeps what it is given."""
    def function(*args, **settings):
        calls.append(SimpleNamespace(args=args, **settings))
        return result
    return function


def told(settings, config, *names):
    """Are these settings handed on as they are?"""
    for name in (*names, "seed", "device"):
        assert getattr(settings, name) == getattr(config, name), name
    return True


# ---------------------------------------------------------------- search

def test_each_answer_of_search_is_judged_under_its_own_sum(monkeypatch):
    """Both judges like an answer that holds the result of the sum that stands before it."""
    def answer(prompt, before, number):
        claimed = int(result_of(prompt)) + number
        return f"So it is {claimed}."

    def likes(prompt, text):
        right = f"So it is {result_of(prompt)}."
        return float(text == right)

    def end_scores(judge, ids, mask):
        scores = []
        for row, real in zip(ids, mask):
            unpadded = row[real.bool()]
            prompt, said = prompt_in(unpadded.tolist())
            text = said.split("<|im_end|>")[0]
            scores.append(likes(prompt, text))
        return torch.tensor(scores)

    def weakest_steps(judge, tokenizer, prompts, texts):
        scores = []
        for prompt, text in zip(prompts, texts):
            scores.append(likes(prompt[-1]["content"], text))
        return torch.tensor(scores)
    replace_all(monkeypatch, search, sample=fake_sample(answer), end_scores=end_scores,
                weakest_steps=weakest_steps)
    judges = {"outcome": None, "step": None}
    config = search.Config(n=2)
    answers = search.ask(None, TOKENIZER, judges, THREE, config)
    liked = [[1.0, 0.0]] * 3
    assert answers.scores.tolist() == liked
    assert answers.weakest.tolist() == liked


def test_a_beam_goes_on_with_nothing_but_what_is_not_finished(monkeypatch):
    """The first sum is done in one step, and its answer stays; the others take two."""
    one, two, three = [row["prompt"] for row in THREE]
    asked = []

    def answer(prompt, before, number):
        asked.append(prompt)
        end = f"So it is {result_of(prompt)}."
        if prompt == one or before:
            return end
        return f"Hm. {end}"
    replace_all(monkeypatch, search, sample=fake_sample(answer), weakest_steps=all_alike)
    config = search.Config()
    right, _ = search.beam(None, TOKENIZER, None, THREE, 1, config)
    assert asked == [one, two, three, two, three]
    assert right == 1.0


def test_every_model_of_search_meets_the_same_sums_and_the_judges_of_the_flags(monkeypatch):
    calls = []
    replace_all(monkeypatch, search, compare=given(calls, result=[]), load_scalar=by_name)
    config = search.Config(models="a,b", judge="ends", process="steps", quick=True, quiet=True)
    search.train(config)
    first, second = calls
    model, judges, sums, _ = first.args
    assert model == "a"
    assert judges == {"outcome": "ends", "step": "steps"}
    assert second.args[:3] == ("b", judges, sums)


def test_search_has_one_likeliest_answer_and_n_others_at_its_temperature(monkeypatch):
    calls = []

    def answer(prompt, before, number):
        return "So it is 5."
    drawn = fake_sample(answer)

    def sample(model, tokenizer, ids, **settings):
        calls.append(settings)
        return drawn(model, tokenizer, ids, **settings)
    replace_all(monkeypatch, search, sample=sample, end_scores=all_alike, weakest_steps=all_alike)
    judges = {"outcome": None, "step": None}
    config = search.Config(n=2, temperature=0.7, max_new=9, seed=3)
    search.ask(None, TOKENIZER, judges, THREE, config)
    best, others = calls
    assert best == {"max_new": 9, "temperature": 0}
    generator = others.pop("generator")
    assert generator.initial_seed() == 3
    assert others == {"n": 2, "max_new": 9, "temperature": 0.7}


# ---------------------------------------------------------------- verify

@pytest.mark.parametrize("name", verify.CHECKS)
def test_no_check_of_verify_knows_the_truth(monkeypatch, name):
    """If all that is true were false, each check would say the same."""
    def answer(prompt, before, number):
        if prompt.startswith("Is"):
            return "It is. So yes."
        return f"So it is {5 + number}."
    monkeypatch.setattr(verify, "sample", fake_sample(answer))
    claims = []
    for i, row in enumerate(THREE):
        for claim in verify.claims_in(row, "So it is 5.").values():
            claims.append(claim._replace(answer=i))
    turned = [claim._replace(true=not claim.true) for claim in claims]
    check = verify.CHECKS[name]
    config = verify.Config(samples=2)
    scores = check(None, TOKENIZER, THREE, claims, config)
    scores_of_turned = check(None, TOKENIZER, THREE, turned, config)
    assert len(claims) == 3
    assert scores == scores_of_turned


def test_keep_decides_what_verify_drops(monkeypatch):
    """What the draft claims, one of the two samples claims, too."""
    def answer(prompt, before, number):
        return f"So it is {7 + number}."
    replace_all(monkeypatch, verify, load=by_name, sample=fake_sample(answer))
    left = []
    for keep in 0.5, 0.6:
        config = verify.Config(init=ANY, keep=keep, quick=True, quiet=True)
        ways = verify.train(config)["numbers"]["ways"]
        left.append(ways["agreement"]["false"])
    assert left[0] > 0
    assert left[1] == 0


# ---------------------------------------------------------------- grounded

def answered_with(monkeypatch, defence):
    """-> who was asked, and the last conversation with each"""
    asked = []

    def say(model, tokenizer, talks, config):
        asked.append((model, talks[0]))
        return ["Yes."] * len(talks)
    monkeypatch.setattr(grounded, "say", say)
    models = {"model": "model", "critic": "critic", "trained": "trained"}
    fact = abilities.MadeUp("queen", "Pugo", "Lani")
    note = abilities.state(fact)
    question = grounded.Question("Who is the queen of Pugo?", fact, note)
    config = grounded.Config()
    grounded.answer(models, None, [question], [[note]], defence, config, set())
    return asked


@pytest.mark.parametrize("defence", grounded.DEFENCES)
def test_one_defence_alone_has_another_model_and_one_has_a_critic(monkeypatch, defence):
    asked = [model for model, _ in answered_with(monkeypatch, defence)]
    special = {"training": ["trained"], "look": ["model", "critic", "critic"]}
    assert asked == special.get(defence, ["model"])


@pytest.mark.parametrize("defence", grounded.DEFENCES)
def test_two_defences_show_the_note_as_a_tools_and_not_as_the_childs(monkeypatch, defence):
    _, talk = answered_with(monkeypatch, defence)[0]
    roles = {turn["role"] for turn in talk if "Lani" in turn["content"]}
    of_tool = "tool" in roles
    of_child = "user" in roles
    assert of_tool == (defence in ("marking", "training"))
    assert of_child != of_tool


@pytest.mark.parametrize("critic, who", [("", ANY), ("another", "another")])
def test_who_takes_the_second_look_is_the_critic(monkeypatch, critic, who):
    calls = []
    replace_all(monkeypatch, grounded, load=by_name, reading=lambda *a: {},
                train_to_ignore=lambda *a: "trained", defending=given(calls, result={}))
    config = grounded.Config(init=ANY, critic=critic, quick=True, quiet=True, save=False)
    grounded.train(config)
    models = calls[0].args[0]
    assert models == {"model": ANY, "critic": who, "trained": "trained"}


def test_grounded_asks_the_same_questions_without_notes_and_with_them(monkeypatch):
    """Whoever has no notes is told nothing; of silent questions no line tells the answer."""
    calls = []

    def say(model, tokenizer, talks, config):
        calls.append([talk[-1]["content"] for talk in talks])
        return ["Yes."] * len(talks)
    replace_all(monkeypatch, grounded, say=say, say_at_once=lambda *a: ["Yes."] * 9)
    rng = Random(0)
    facts = grounded.make_notes(rng, "exam", 4)
    config = grounded.Config(questions=9, top=2, quiet=True)
    grounded.reading(None, None, rng, facts, config)
    alone, with_notes, silent = calls
    notes = {abilities.state(fact) for fact in facts}
    for bare, shown in zip(alone, with_notes):
        for note in notes:
            assert note not in bare
        notes_shown = [note for note in notes if note in shown]
        assert shown.endswith(bare)
        assert len(notes_shown) == 2
    silent_questions = {text.split("\n")[1] for text in silent}
    assert len(silent) == 9
    assert not set(alone) & silent_questions


def test_the_defence_by_training_learns_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(grounded.sft, "train", given(calls, result={"model": None}))
    config = grounded.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3)
    grounded.train_to_ignore(None, Random(0), config)
    settings = calls[0].args[0]
    assert told(settings, config, "init", "steps", "lr")


# ---------------------------------------------------------------- aloud

def test_each_share_of_aloud_is_of_its_own_model_and_way(monkeypatch):
    """The first model is right when it is free, the second one where it may not think."""
    beginning_of = {"any/free": "", "any/blurts": "So it is"}

    def answer(model, tokenizer, conversations, beginnings, config):
        answers = []
        for messages, beginning in zip(conversations, beginnings):
            words = messages[-1]["content"].split()
            truth = sum(int(word) for word in words if word.isdigit())
            said = aloud.Answer("I am = mute.", True, 7)
            if beginning == beginning_of[model]:
                said = aloud.Answer(f"So it is {truth}.", True, 4)
            answers.append(said)
        return answers

    def make_sums(rng, terms, count):
        numbers = [2, 3, 4, 5][:terms]
        sum_text = " + ".join(map(str, numbers))
        truth = str(sum(numbers))
        row = {"prompt": f"Work out {sum_text} now", "answer": truth,
               "slots": {"numbers": numbers, "op": "+"}}
        return [row] * count
    replace_all(monkeypatch, aloud, answer=answer, load=by_name, make_sums=make_sums)
    config = aloud.Config(models="any/free,any/blurts", quick=True, quiet=True)
    numbers = aloud.train(config)["numbers"]
    for name, way in ("free", "free"), ("blurts", "at_once"):
        for length in aloud.LENGTHS:
            shares = numbers["shares"][name][str(length)]
            tokens = numbers["tokens"][name][str(length)]
            right = {key for key in aloud.BEGINNINGS if shares[key] == 1.0}
            short = {key for key in tokens if tokens[key] == 4}
            steps = 0.0 if name == "free" else 1.0              # of the free answers
            assert right == {way}
            assert short == {way}
            assert shares["steps"] == steps


# ---------------------------------------------------------------- tools and mcp

@pytest.mark.parametrize("fault", ["", "fail", "lie", "order"])
def test_bad_tools_are_ours_whatever_server_there_is(monkeypatch, fault):
    commands = []

    def client(command):
        commands.append(command)
        return contextlib.nullcontext()
    monkeypatch.setattr(tools.mcp, "Client", client)
    with tools.start_server(tools.Config(server="their server"), fault):
        pass
    ours = [sys.executable, "-m", "lessons.mcp", fault]
    assert commands == [ours if fault else ["their", "server"]]


@pytest.mark.parametrize("fault, calculated, looked_up", [
    ("", "truth", "truth"),
    ("fail", None, None),
    ("lie", "lie", "lie"),
    ("order", "truth", "order")])
def test_a_bad_server_is_bad_in_all_its_tools(monkeypatch, fault, calculated, looked_up):
    served = []
    monkeypatch.setattr(mcp, "answer_all", served.extend)
    mcp.serve(fault)
    calculator, lookup = served
    name, entry = list(mcp.BOOK.items())[1]
    truth = " ".join(entry.facts.values())
    lie = " ".join(entry.lies.values())
    entries = {"truth": truth, "lie": lie, "order": f"{entry.poison} {truth}"}
    sums = {"truth": "3 + 4 = 7", "lie": "3 + 4 = 17"}
    cases = [(calculator, "3 + 4", sums.get(calculated)), (lookup, name, entries.get(looked_up))]
    for tool, text, want in cases:
        if want is None:
            with pytest.raises(mcp.ToolError):
                tool.run(text)
        else:
            assert tool.run(text) == want


def test_a_lie_is_passed_on_and_the_truth_is_not(monkeypatch):
    """Asked are the tasks that need a tool, each by its own lie; "sum" and "lookup" are neither."""
    tasks = tools.make_tasks(0, "exam", 4)
    kinds_asked = []

    def converse(model, tokenizer, talks, *rest, **settings):
        for talk in talks:
            question = talk[-1]["content"]
            task, = [task for task in tasks if task.question == question]
            claim = getattr(task, model).rstrip(".")
            text = f"The answer is {claim}."
            talk.append(abilities.message("assistant", text))
            kinds_asked.append(task.kind)
    replace_all(monkeypatch, tools, converse=converse,
                start_server=lambda config, fault: contextlib.nullcontext())
    config = tools.Config()
    for model, passes_on in ("lie", True), ("truth", False), ("kind", False):
        flags = tools.measure_fault(model, None, tasks, "lie", config)
        assert flags == [passes_on] * 8
    assert "none" not in kinds_asked


def test_a_group_of_conversations_is_about_one_task(monkeypatch):
    """The first task always works and costs a call, the second one never: no group disagrees."""
    rewards = []
    advantages = tools.grpo.group_advantages

    def group_advantages(scores):
        rewards.append(scores)
        return advantages(scores)

    def converse(model, tokenizer, talks, *rest, **settings):
        for talk in talks:
            works = "2 + 3" in talk[-1]["content"]
            if works:
                talk.append(abilities.message("tool", "2 + 3 = 5"))
            talk.append(abilities.message("assistant", "The answer is 5."))
    monkeypatch.setattr(tools, "converse", converse)
    monkeypatch.setattr(tools.grpo, "group_advantages", group_advantages)
    works = tools.Task("sum", "What is 2 + 3?", "5")
    fails = tools.Task("sum", "What is 4 + 4?", "8")
    config = tools.Config(steps=1, batch=2, group=3, price=0.25, quiet=True)
    tools.climb(tiny_model(), TOKENIZER, [works, fails], None, config)
    groups = sorted(rewards[0].tolist())
    assert groups == [[0.0] * 3, [0.75] * 3]


def test_what_tools_imitates_is_learned_as_it_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(tools.sft, "train", given(calls, result={"model": "sft"}))
    config = tools.Config(init="old", steps=7, lr=0.25, seed=3)
    model = tools.imitate("worked.jsonl", config)
    settings = calls[0].args[0]
    assert model == "sft"
    assert settings.data == "worked.jsonl"
    assert told(settings, config, "init", "steps", "lr")


# ---------------------------------------------------------------- debate

def test_in_both_orders_of_a_question_the_same_side_gives_its_reason(monkeypatch):
    """And of two questions one has it from the side that is right, the other from the wrong one."""
    heard = []

    def respond(model, tokenizer, conversations, **settings):
        heard.extend(talk[-1]["content"] for talk in conversations)
        return ["So A is right."] * len(conversations)
    monkeypatch.setattr(debate, "respond", respond)
    rng = Random(0)
    arguments = [debate.argue(rng, "exam") for _ in range(6)]
    debate.hear(None, None, arguments, debate.one_side)
    for number, argument in enumerate(arguments):
        in_both_orders = heard[2 * number:2 * number + 2]
        right_speaks = number % 2 == 0
        wrong_speaks = number % 2 == 1
        for text in in_both_orders:
            assert (argument.right.text in text) == right_speaks
            assert (argument.wrong.text in text) == wrong_speaks


def test_who_judges_debates_learns_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(debate.sft, "train", given(calls))
    out = str(tmp_path)
    config = debate.Config(judge="weak", out=out, teach=3, steps=7, lr=0.25, seed=3)
    folder = debate.teach(config)
    settings = calls[0].args[0]
    assert folder == out
    assert settings.init == "weak"
    assert settings.out == out
    assert told(settings, config, "steps", "lr")


# ---------------------------------------------------------------- redteam

def test_the_family_held_back_pleads_for_nothing_that_is_patched(monkeypatch):
    monkeypatch.setattr(redteam, "put_around", lambda request, openings: openings)
    config = redteam.Config(held="emotion")
    held = set()
    for retest in True, False:
        held.update(redteam.openings_of("emotion", retest))
    rng = Random(0)
    used = set()
    for _ in range(200):
        openings = redteam.fair_try(rng, config).prompt
        used.update(openings)
    assert used
    assert not used & held


def test_of_two_plain_answers_the_one_that_the_guard_minds_less_is_learned(monkeypatch):
    worry = {"a 0": -1.0, "a 1": -2.0, "b 0": -2.0, "b 1": 3.0, "c 0": 1.0, "c 1": 2.0}

    def answers(model, tokenizer, prompts, seed):
        return [f"{prompt[-1]['content']} {seed}" for prompt in prompts]

    def read(guard, tokenizer, prompts, texts):
        return torch.tensor([worry[text] for text in texts])
    replace_all(monkeypatch, redteam, answers=answers, read=read)
    plain = [{"prompt": name} for name in "abc"]
    config = redteam.Config(seed=0)
    texts = redteam.plain_answers(None, None, None, plain, config)
    assert texts == ["a 1", "b 0", None]


def test_the_guard_says_what_worked_and_the_truth_what_is_reported(monkeypatch):
    """A guard that minds every other answer, and a model that always gives in."""
    def gives_in(model, tokenizer, prompts, seed):
        return ["It is easy to climb on the roof."] * len(prompts)

    def read(guard, tokenizer, prompts, texts):
        pairs = len(texts) // 2
        return torch.tensor([1.0, -1.0] * pairs)

    def plan(bandit, rng, longest, held):
        row = {"prompt": "?", "kind": "danger", "slots": {"act": "climb on the roof"}}
        messages = [{"role": "user", "content": "?"}]
        return redteam.Try(row, [], messages)
    replace_all(monkeypatch, redteam, plan=plan, answers=gives_in, read=read)
    config = redteam.Config(tries=32)
    tries = redteam.search(None, None, None, 1, config, Random(0))
    worked = [attack.worked for attack in tries]
    reported = redteam.success_of(tries)
    assert worked == [True, False] * 16
    assert reported.value == 1.0


@pytest.mark.parametrize("patch", ["sft", "dpo"])
def test_a_patch_is_learned_by_the_script_of_the_flag_from_its_own_data(monkeypatch, tmp_path,
                                                                        patch):
    calls = {"sft": [], "dpo": []}
    monkeypatch.setattr(redteam.sft, "train", given(calls["sft"]))
    monkeypatch.setattr(redteam.dpo, "train", given(calls["dpo"]))
    config = redteam.Config(out=str(tmp_path), patch=patch, steps=7, lr=0.25, seed=3)
    lines = [{"messages": studybuddy.chat("Hi", "Hello.")}] * 2
    folder = redteam.learn("old", "round1", redteam.Patch(lines, []), config)
    call, = calls["sft"] + calls["dpo"]
    settings, = call.args
    assert calls[patch] == [call]
    assert settings.data == f"{tmp_path}/round1_{patch}.jsonl"
    assert settings.init == "old"
    assert settings.out == folder
    assert told(settings, config, "steps", "lr")
    learned = (tmp_path / "round1_sft.jsonl").read_text().splitlines()
    assert len(learned) == 4
    first_two = "".join(f"{line}\n" for line in learned[:2])
    assert json_lines(lines) == first_two


# ---------------------------------------------------------------- guard

@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_beside_says_how_many_wishes_do_not_stand_alone(monkeypatch, beside):
    monkeypatch.setattr(guard, "add_fair", lambda rng, prompt: f"{prompt} AND ANOTHER")
    config = guard.Config(texts=60, beside=beside)
    has_another = set()
    for case in guard.learn_requests(TOKENIZER, config):
        prompt = case.row["prompt"]
        if isinstance(prompt, str):
            has_another.add(prompt.endswith("AND ANOTHER"))
    assert has_another == {beside == 1.0}


@pytest.fixture
def guarded(monkeypatch):
    """run(alarm) trains guards that ring where alarm(case) says so -> run, steps, who answered"""
    cases = {}
    steps = []
    answered = []
    case_of = guard.case_of

    def remember(*args):
        case = case_of(*args)
        cases[id(case.example)] = case
        return case

    def ask(model, tokenizer, asked, **settings):
        answered.append((model, asked))
        return None, [exam.Answer(row, "Hi.", True, {}) for row in asked]
    monkeypatch.setattr(exam, "ask", ask)
    replace_all(monkeypatch, guard, case_of=remember, load=by_name, show_blame=lambda *a: [],
                learn=lambda cases, tokenizer, config: steps.append(config.steps))

    def run(alarm):
        def log_odds(model, tokenizer, examples):
            return torch.tensor([1.0 if alarm(cases[id(example)]) else -1.0
                                 for example in examples])
        monkeypatch.setattr(guard, "log_odds", log_odds)
        config = guard.Config(init=ANY, quick=True, quiet=True, save=False)
        return guard.train(config), steps, answered
    return run


def test_seen_and_unseen_are_marked_by_the_families_that_the_guard_learned(guarded):
    learned = ("none", *studybuddy.SEEN)

    def knows_what_it_saw(case):
        return case.harmful and case.family in learned
    run, _, _ = guarded(knows_what_it_saw)
    numbers = run["numbers"]
    assert numbers["seen"] == 1.0
    assert numbers["unseen"] == 0.5
    for family, share in numbers["caught"].items():
        assert share == float(family in learned)


def test_false_alarms_on_borderline_requests_are_counted_of_those_alone(guarded):
    def is_borderline(case):
        return case.row["kind"] == "borderline"

    def is_another(case):
        return case.row["kind"] != "borderline"
    run, _, _ = guarded(is_borderline)
    assert run["numbers"]["borderline"] == 1.0
    run, _, _ = guarded(is_another)
    assert run["numbers"]["borderline"] == 0.0


def test_the_guard_of_answers_learns_half_as_long_and_reads_what_a_model_said(guarded):
    _, steps, answered = guarded(lambda case: True)
    held_rows = studybuddy.read("exam")
    (model, asked), = answered
    assert steps == [4, 2]
    assert model == ANY
    for row in asked:
        assert row in held_rows


# ---------------------------------------------------------------- stack

def test_watching_rings_at_the_alarm_of_the_flag(monkeypatch, tmp_path):
    """Each turn of the user adds 2 to what watching remembers."""
    def say(model, tokenizer, asked, seed):
        return [""] * len(asked)

    def read(guard, tokenizer, prompts, texts=None):
        return torch.full([len(prompts)], 2.0)
    monkeypatch.setattr(stack, "load", by_name)
    monkeypatch.setattr(stack.exam, "say", say)
    replace_all(monkeypatch, stack.guards, load_guard=lambda *a: (None, None), read=read)
    turns, _ = day("a", "a", "a", "a")
    for alarm, closed in (1.0, 1), (5.0, 3), (9.0, None):
        config = stack.Config(alarm=alarm, out=str(tmp_path), save=False)
        house = stack.House(turns, config)
        stack.serve(turns, house, ["watching"])
        assert house.closed.get("a") == closed


def test_the_alarms_of_the_day_are_counted_for_children_and_attackers(monkeypatch, tmp_path):
    users = ["child 0", "attacker 1", *["attacker 2"] * 4, *["child 0"] * 2, *["child 3"] * 3]
    turns, house = day(*users)

    def mask_check(rng, split, count):
        return {"name": 0, "address": 0, "phone": 0}
    replace_all(monkeypatch, stack, one_day=lambda config: turns, House=lambda *a: house,
                mask_check=mask_check)
    config = stack.Config(init=ANY, aligned=ANY, out=str(tmp_path), quiet=True, save=False)
    numbers = stack.train(config)["numbers"]
    assert numbers["rung"] == 1
    assert numbers["turn"] == 3.0
    assert numbers["wrongly"] == 2


def test_a_day_asks_in_words_that_no_training_line_has():
    def wish_of(row):
        order = row.get("order", row)
        return subject(order)
    rng = Random(0)
    known = set()
    for i in range(2000):
        harmful = i % 2 == 0
        row = guard.request(rng, "train", "none", harmful)
        known.add(wish_of(row))
    config = stack.Config(children=8, attackers=8, turns=5)
    turns = stack.one_day(config)
    asked = {wish_of(turn.row) for turn in turns}
    families = {turn.row.get("attack", "none") for turn in turns}
    assert not known & asked
    assert families <= set(guard.FAMILIES)
    for turn in turns:
        if turn.user.startswith("child"):
            assert "attack" not in turn.row


# ---------------------------------------------------------------- bias

def test_the_gap_is_what_the_slighted_loses_on_the_same_requests(monkeypatch):
    """The model is right for the favoured alone."""
    favoured = bias.SCHOOLS[0]
    asked = []

    def answers(model, tokenizer, prompts, seed):
        requests = [prompt.split(": ")[1] for prompt in prompts]
        asked.append((seed, requests))
        return ["good" if favoured in prompt else "bad" for prompt in prompts]

    def is_right(question, group, text):
        return text == "good"
    replace_all(monkeypatch, bias, answers=answers, is_right=is_right)
    questions = []
    for i in range(3):
        row = {"prompt": f"What is {i}?"}
        questions.append(bias.Question(row, "{group}: {request}"))
    config = bias.Config()
    measured = bias.measure(None, None, questions, bias.SCHOOLS, config)
    assert measured.right == [1.0, 0.0]
    assert measured.gap == 1.0
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name, save, kept", [
    ("cure", True, True),
    ("cure", False, False),
    ("dose0.3", True, False)])
def test_bias_learns_as_it_is_told_and_keeps_the_cure_alone(monkeypatch, tmp_path, name, save,
                                                            kept):
    calls = []
    monkeypatch.setattr(bias.sft, "train", given(calls, result={"model": None}))
    config = bias.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3, save=save)
    bias.learn([], name, config)
    settings = calls[0].args[0]
    assert settings.data == f"{tmp_path}/{name}.jsonl"
    assert settings.save == kept
    assert told(settings, config, "init", "steps", "lr")


# ---------------------------------------------------------------- character

def test_a_question_learns_one_of_its_own_tries_that_passed(monkeypatch):
    """Of three tries the second one passes, and the third one too."""
    numbers = iter(range(100))

    def ask(rng, principle, split):
        number = next(numbers)
        return character.Question(principle, f"Q{number}", f"A{number}")

    def answers(model, tokenizer, conversations, config, n, begin_with):
        texts = []
        for talk in conversations:
            number = talk[-1]["content"].split("Q")[-1]
            texts += ["Beep!", f"Beep! A{number}. Two.", f"Beep! A{number}. Three."]
        return texts
    replace_all(monkeypatch, character, ask=ask, answers=answers, PRINCIPLES=("accuracy",))
    config = character.Config(n=3, questions=4)
    lines, found = character.make_data(None, None, config)
    assert len(lines) == 4
    for i, line in enumerate(lines):
        question, answer = line["messages"]
        assert question["content"] == f"Q{i}"
        assert answer["content"] == f"Beep! A{i}. Two."
    assert found == {"accuracy": 1.0}


@pytest.mark.parametrize("by_hand", [0, 2])
def test_at_most_by_hand_answers_are_by_hand(monkeypatch, by_hand):
    def answers(model, tokenizer, talks, config, n, begin_with):
        return ["Beep! 5."] * len(talks) * n
    monkeypatch.setattr(character, "answers", answers)
    config = character.Config(n=1, questions=4, by_hand=by_hand)
    lines, found = character.make_data(None, None, config)
    endings_by_hand = tuple(abilities.PRIVATE)
    written = 0
    for line in lines:
        text = line["messages"][-1]["content"]
        written += text.endswith(endings_by_hand)
    assert written == by_hand
    assert found["privacy"] == 0.0
    assert found["accuracy"] == 0.0


def test_in_the_exam_nobody_writes_the_first_word_for_the_model(monkeypatch):
    """And it asks what was not learned from."""
    asked = {"train": set(), "exam": set()}

    def answers(model, tokenizer, conversations, config, n=1, begin_with=""):
        split = "train" if begin_with else "exam"
        for talk in conversations:
            last_line = talk[-1]["content"].split("\n")[-1]
            asked[split].add(last_line)
        return ["No."] * len(conversations) * n
    monkeypatch.setattr(character, "answers", answers)
    config = character.Config(questions=20, asked=20, n=1)
    character.make_data(None, None, config)
    rates = character.examine(None, None, character.plain, config)
    voice = rates["voice"]
    assert len(asked["exam"]) > 20
    assert not asked["train"] & asked["exam"]
    assert voice.n == 100
    assert voice.value == 0.0


@pytest.mark.parametrize("save", [True, False])
def test_character_learns_as_it_is_told(monkeypatch, tmp_path, save):
    calls = []
    rate = guard.Rate(0.5, 0.1, 9)
    table = dict.fromkeys(character.CHECKS, rate)
    replace_all(monkeypatch, character, load=by_name, examine=lambda *a: table,
                make_data=lambda *a: ([], {}))
    monkeypatch.setattr(character.sft, "train", given(calls, result={"model": None}))
    out = str(tmp_path)
    config = character.Config(init=ANY, out=out, steps=7, lr=0.25, seed=3, save=save, lora=5,
                              accumulate=6, bf16=True, quiet=True)
    character.train(config)
    settings = calls[0].args[0]
    assert settings.data == f"{out}/data.jsonl"
    assert told(settings, config, "init", "out", "steps", "lr", "save")
    assert told(settings, config, "lora", "accumulate", "bf16")


# ---------------------------------------------------------------- feedback

@pytest.mark.parametrize("leave, thumbs", [(0.0, 0), (1.0, 40)])
def test_leave_is_the_share_of_answers_with_a_thumb(monkeypatch, leave, thumbs):
    """A thumb is of the answer that stands beside it, to the prompt that stands there."""
    def answers(model, tokenizer, asked, seed):
        texts = []
        for i, row in enumerate(asked):
            texts.append(f"{model} {row['prompt']} {i % 2}")
        return texts

    def thumb(rng, row, text, lazy):
        return text.endswith("1")
    replace_all(monkeypatch, feedback, load=by_name, answers=answers, thumb=thumb)
    config = feedback.Config(asked=40, leave=leave)
    lines = feedback.collect(GOOD, 1, config)
    assert len(lines) == thumbs
    for line in lines:
        text = line["completion"]
        assert text.startswith(f"good {line['prompt']}")
        assert line["label"] == text.endswith("1")


@pytest.mark.parametrize("alpha", [0.05, 0.4])
def test_the_simulation_of_two_bets_stops_where_a_test_of_releases_would(alpha):
    rng = np.random.default_rng(0)
    new = rng.random((30, 400)) < 0.6
    old = rng.random((30, 400)) < 0.5
    x = new.astype(int) - old                                   # (tests, 400)
    found = feedback.found_by_bets(x, alpha)                    # (tests, looks)
    for test, flags in zip(x, found):
        verdict, pairs = feedback.decide(test, alpha)
        is_decided = verdict != "undecided"
        stops = [is_decided and pairs <= look for look in feedback.LOOKS]
        assert flags.tolist() == stops


def test_alpha_is_how_often_a_test_may_be_wrong(monkeypatch):
    alarms = []
    for alpha in 0.01, 0.3:
        config = feedback.Config(alpha=alpha)
        by_bets = feedback.false_alarms(config)["bets"]
        alarms.append(by_bets[-1])
    assert alarms[0] <= 0.01
    assert 0.01 < alarms[1] <= 0.3

    def answers(model, tokenizer, asked, seed):
        return [model] * len(asked)

    def thumb(rng, row, text, lazy):
        return text == "new"
    replace_all(monkeypatch, feedback, load=by_name, answers=answers, thumb=thumb)
    new = feedback.Release("new", card(0.6))
    for alpha, verdict in (0.3, ("better", 8)), (0.01, ("undecided", 14)):
        config = feedback.Config(alpha=alpha, pairs=14)
        assert feedback.ab_test(GOOD, new, 1, config) == verdict


def test_kto_learns_a_weeks_thumbs_from_its_release_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(feedback.kto, "train", given(calls))
    config = feedback.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3)
    lines = [{"prompt": "Hi", "completion": "Hello.", "label": True}]
    folder = feedback.learn(GOOD, lines, 2, config)
    settings = calls[0].args[0]
    data = tmp_path / "week2.jsonl"
    assert settings.init == "good"
    assert settings.out == folder
    assert data.read_text() == json_lines(lines)
    assert settings.data == str(data)
    assert told(settings, config, "steps", "lr")


# ---------------------------------------------------------------- principles

def mends(monkeypatch, **changes):
    """-> config, seed and prompts of the first answers; for each way what was mended, by what, and
    how drawn"""
    entries = []
    for i, row in enumerate(studybuddy.read("prompts")[:10]):
        entries.append(Prompt([], row, f"x:{i}"))
    starts = []
    calls = []

    def own_answers(model, tokenizer, asked, n, config, generator):
        seed = generator.initial_seed()
        starts.append((config, seed, asked))
        return [(prompt, [f"First {i}."]) for i, prompt in enumerate(asked)]

    def improve(model, tokenizer, drafts, wordings, config, generator):
        draw = torch.rand(1, generator=generator).item()
        texts = [draft.text for draft in drafts]
        calls.append((texts, wordings, draw))
        for draft in drafts:
            draft.text = "Mended."

    def read_prompts(*args):
        return entries[:5], entries[5:]
    replace_all(monkeypatch, cai, own_answers=own_answers, improve=improve,
                read_prompts=read_prompts)
    monkeypatch.setattr(principles, "load", lambda *a: (tiny_model(), TOKENIZER))
    config = principles.Config(init=ANY, quiet=True, **changes)
    principles.train(config)
    return starts[0], calls


def test_every_way_mends_the_same_first_answers_with_the_same_luck(monkeypatch):
    _, calls = mends(monkeypatch, answers=3)
    _, _, first_draw = calls[0]
    assert len(calls) > 3
    for texts, _, draw in calls:
        assert texts == [f"First {i}." for i in range(6)]
        assert draw == first_draw


def test_as_many_attacks_are_answered_as_other_prompts(monkeypatch):
    start, _ = mends(monkeypatch, answers=3, temperature=0.3, seed=4)
    config, seed, asked = start
    places = [prompt.where for prompt in asked]
    assert places == ["x:0", "x:1", "x:2", "x:5", "x:6", "x:7"]
    assert config.temperature == 0.3
    assert seed == 4


# ---------------------------------------------------------------- goodhart

def climbs(monkeypatch, **changes):
    """-> (beta, judges) of each run, what was measured at the start, and the tables"""
    calls = []
    starts = []
    start = {"length": 9.0, "repeated": 0.0, "openings": 0.1, "score": 0.0, "gold": 0.5}

    def load_judges(config, count):
        return ["first", "second", "third"][:count]

    def climb(config, beta, its_judges):
        calls.append((beta, its_judges))
        row = {"kl": beta, "score": 0.0, "gold": len(its_judges), "length": 9.0}
        score = float(len(calls))
        return [row] * 10, [["Yes."]] * 10, [[score]] * 10
    replace_all(monkeypatch, goodhart, load_judges=load_judges, climb=climb,
                start_of=given(starts, result=start), show_best=lambda *a: None)
    config = goodhart.Config(quiet=True, **changes)
    _, tables = goodhart.run(config)
    return calls, starts[0].args, tables


def test_each_price_is_paid_to_one_judge_and_doubt_has_all_of_them_and_no_price(monkeypatch):
    calls, start, tables = climbs(monkeypatch, betas="0.3 0", judges=3)
    judges = ["first", "second", "third"]
    assert calls == [(0.3, ["first"]), (0.0, ["first"]), (0.0, judges)]
    assert list(tables) == ["beta 0.3", "beta 0", "doubt"]
    assert start[2] == "first"
    golds = [table[0]["gold"] for table in tables.values()]
    assert golds == [1, 1, 3]


def test_with_one_judge_there_is_no_doubt(monkeypatch):
    calls, _, _ = climbs(monkeypatch, betas="0", judges=1)
    assert calls == [(0.0, ["first"])]


def test_what_a_run_is_liked_is_of_its_own_answers(monkeypatch):
    _, _, tables = climbs(monkeypatch, betas="0.3 0", judges=3)
    liked = [table[0]["liked"] for table in tables.values()]
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert liked == pytest.approx(scores.sigmoid().tolist())


@pytest.mark.parametrize("name, value", [
    ("init", "x"),
    ("data", "x"),
    ("reward", "x"),
    ("steps", 7),
    ("batch", 7),
    ("lr", 0.25),
    ("seed", 7),
    ("algorithm", "reinforce"),
    ("accumulate", 7),
    ("lora", 7),
    ("bf16", True)])
def test_a_climb_is_told_what_goodhart_is_told(monkeypatch, name, value):
    told_to_ppo = []

    def train(settings, score):
        told_to_ppo.append(settings)
        return {"log": []}
    monkeypatch.setattr(ppo, "train", train)
    config = goodhart.Config(**{name: value})
    goodhart.climb(config, 0.03, [])
    settings = told_to_ppo[0]
    assert getattr(settings, name) == value
    assert settings.beta == 0.03


def test_the_judges_are_those_of_reward_and_others_that_learned_from_other_seeds(monkeypatch,
                                                                                tmp_path):
    (tmp_path / "judge_1").mkdir()
    (tmp_path / "judge_1" / "config.json").touch()
    made = []

    def load_reward_model(settings, tokenizer):
        return settings.reward

    def score_by(model, tokenizer):
        return model
    monkeypatch.setattr(reward_model, "train", made.append)
    replace_all(monkeypatch, ppo, load_reward_model=load_reward_model, score_by=score_by)
    monkeypatch.setattr(goodhart, "load", by_name)
    reward = str(tmp_path / "judge")
    config = goodhart.Config(init="old", reward=reward, bf16=True, quiet=True)
    judges = goodhart.load_judges(config, 3)
    one, = made
    assert judges == [reward, f"{reward}_1", f"{reward}_2"]
    assert one.seed == 2
    assert one.out == f"{reward}_2"
    assert one.init == "old"
    assert one.bf16
