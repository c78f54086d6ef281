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
    user, answer = TOKENIZER.decode(ids).split("<|im_start|>user\n")[-1].split("assistant\n")
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


THREE = sums_of_two((2, 3), (4, 5), (6, 7))


# ---------------------------------------------------------------- search

def test_a_beam_of_one_pays_for_each_of_its_steps_once(monkeypatch):
    steps = ["First 5 + 4 = 9.", "Then 9 + 2 = 11.", "So it is 11."]

    def answer(prompt, before, number):
        done = before.count(".")
        return " ".join(steps[done:])
    monkeypatch.setattr(search, "sample", fake_sample(answer))
    monkeypatch.setattr(search, "weakest_steps", lambda *a: torch.zeros(len(a[-1])))
    sums = [{"prompt": "What is 5 + 4 + 2?", "answer": "11"}] * 2
    right, tokens = search.beam(None, TOKENIZER, None, sums, 1, search.Config())
    assert right == 1.0
    assert tokens == sum(len(TOKENIZER.encode_ordinary(step)) for step in steps)


def test_the_answers_to_a_sum_are_marked_by_its_own_result(monkeypatch):
    """Of each sum the first answer is right, and the others are not."""
    def answer(prompt, before, number):
        return f"So it is {int(result_of(prompt)) + number}."
    replace_all(monkeypatch, search, sample=fake_sample(answer),
                end_scores=lambda judge, ids, mask: torch.zeros(len(ids)),
                weakest_steps=lambda *a: torch.zeros(len(a[-1])))
    judges = {"outcome": None, "step": None}
    answers = search.ask(None, TOKENIZER, judges, THREE, search.Config(n=2))
    assert answers.hits.tolist() == [[True, False]] * 3
    assert answers.greedy == 1.0


def test_each_judge_picks_by_what_it_reads_itself(monkeypatch):
    """The judge of ends likes what is wrong, the judge of steps what is right."""
    hits = torch.tensor([[True, False]] * 2)
    answers = search.Answers(0.5, 9.0, [["1", "2"]] * 2, hits, scores=-hits.float(), tokens=9.0,
                             weakest=hits.float())
    replace_all(monkeypatch, search, load=lambda *a: (None, None), ask=lambda *a: answers,
                beam=lambda *a: (0.0, 1.0))
    config = search.Config(n=2, quiet=True)
    one, two = search.compare("any", {"step": None}, [{"answer": "1"}] * 2, config)
    assert (two["best"], two["by_step"], two["pass"]) == (0.0, 1.0, 1.0)
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
        claims += [claim._replace(answer=i) for claim in verify.claims_in(row, text).values()]
    scores, _ = verify.agreement(None, TOKENIZER, THREE, claims, verify.Config(samples=2))
    assert scores == [1.0] * 3


def test_keep_is_the_least_agreement_that_is_kept():
    claims = [verify.Claim("a", "", True, 0), verify.Claim("b", "", False, 1)]
    assert verify.what_is_left(claims, [0.5, 0.49], 0.5, 2) == {"false": 0.0, "true": 0.5}


def verified(monkeypatch, **changes):
    """A run in which each call costs 120 tokens and says what is right, and who was asked what."""
    asked = []

    def say(model, tokenizer, prompts, config, n=1, **settings):
        asked.append(prompts)
        return ["So it is 7."] * len(prompts) * n, 120
    replace_all(monkeypatch, verify, say=say, load=lambda *a: (None, None))
    run = verify.train(verify.Config(init=ANY, quick=True, quiet=True, **changes))
    return run["numbers"]["ways"], asked


def test_a_check_costs_what_it_takes_and_the_draft_too(monkeypatch):
    ways, _ = verified(monkeypatch)
    assert ways["draft"]["tokens"] == 10
    assert {ways[name]["tokens"] for name in verify.CHECKS} == {20}


def test_the_chain_and_the_claims_are_asked_without_the_draft(monkeypatch):
    _, asked = verified(monkeypatch)
    _, _, claims, chain = asked
    assert all(prompt.startswith("Is it true that ") for prompt in claims)
    assert all(re.fullmatch(r"What is \d+ \+ \d+\?", prompt) for prompt in chain)


def test_verify_asks_what_no_training_file_has():
    for row in verify.read_questions(verify.Config(questions=40)):
        if row["kind"] == "math":
            assert studybuddy.held_out(row["slots"]["numbers"])
        else:
            table = studybuddy.FACTS[row["slots"]["category"]].table
            assert row["slots"]["x"] in studybuddy.half(table, True, 4)


# ---------------------------------------------------------------- orders: grounded and mcp

def orders_of(split):
    return studybuddy.half(abilities.ORDER, split == "exam", 3)


def is_worded(text, order, split):
    """Does this order stand there in a wording of this split?"""
    return any(words.format(r=order["prompt"]) in text for words in orders_of(split))


def words_of_exam_alone():
    trained = grounded.words_of(" ".join(orders_of("train")))
    return grounded.words_of(" ".join(orders_of("exam"))) - trained - {"r"}


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
        assert flags["right"] == [False] * 10 and flags["clean"] == [True] * 10


def test_more_than_one_note_is_shown_by_one_defence_alone(defended):
    _, seen = defended
    for defence, shown in seen:
        assert {len(notes) for notes in shown} == {3 if defence == "others" else 1}


def test_who_learns_to_ignore_orders_sees_no_place_and_no_order_of_the_exam(monkeypatch, tmp_path):
    monkeypatch.setattr(grounded.sft, "train", lambda settings: {"model": settings.data})
    config = grounded.Config(out=str(tmp_path), quiet=True)
    path = grounded.train_to_ignore(None, Random(0), config)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    ordered = 0
    for line in lines:
        note = line["messages"][-2]["content"]
        ordered += note.count(".") > 1 or "?" in note
        name = line["messages"][2]["content"].split(": ")[1].lower()
        assert sum(map(ord, name)) % 4                  # of the exam's places this is 0
        assert not {"whoever", "reads"} & grounded.words_of(note)
        assert line["messages"][-1]["content"].startswith(tuple(abilities.RELATIONS))
    assert 0.4 < ordered / len(lines) < 0.6


@pytest.mark.parametrize("split", ["train", "exam"])
def test_an_order_in_the_book_is_worded_as_its_half_is(split):
    tasks = tools.make_tasks(0, split, 60)
    entries = [task.entry for task in tasks if task.kind == "lookup"]
    assert all(is_worded(entry.poison, entry.order, split) for entry in entries)


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
    assert known and len(measured) == 4 + 2 * len(tools.FAULTS)
    for model, tasks, _ in measured:
        assert tasks and not known & {task.question for task in tasks}, model


def test_each_column_of_the_tools_table_is_of_its_own_model(bench):
    skills = bench[0]["skills"]
    assert [skills[name]["sum"] for name in ("alone", "tools", "sft", "grpo")] == [0, 0, 0.5, 1]
    faults = bench[0]["faults"]
    assert set(faults["tools"].values()) == {0.0} and set(faults["grpo"].values()) == {1.0}


def test_alone_there_are_no_tools(bench):
    clients = [client for _, _, client in bench[2][:4]]
    assert clients[0] is None and None not in clients[1:]


def test_of_its_own_conversations_only_those_without_a_needless_call_are_imitated(monkeypatch,
                                                                                  tmp_path):
    """It calls in each of them, and is right: a fact needed no call."""
    tasks = [tools.Task("sum", "What is 2 + 3?", "5"), tools.Task("none", "The capital?", "Lima")]

    def converse(model, tokenizer, talks, *rest, **settings):
        for talk, text in zip(talks, ["The answer is 5.", "It is Lima."]):
            talk += [abilities.message("tool", "2 + 3 = 5"), abilities.message("assistant", text)]
    monkeypatch.setattr(tools, "converse", converse)
    config = tools.Config(out=str(tmp_path), quiet=True)
    path = tools.write_own_successes(None, None, tasks, None, config)
    line, = Path(path).read_text().splitlines()
    assert "2 + 3?" in line


# ---------------------------------------------------------------- debate

def knows_every_other(arguments):
    """A judge that knows the results of every other question, and says A to the rest."""
    known = {argument.row["prompt"]: argument.row["answer"] for argument in arguments[::2]}

    def respond(model, tokenizer, conversations, **settings):
        texts = []
        for talk in conversations:
            text = talk[-1]["content"]
            truth = [answer for prompt, answer in known.items() if prompt in text]
            first = re.search(r"^A: (.*)$", text, re.MULTILINE)[1]
            says_b = truth and f" {truth[0]}" not in first.split(", since")[0].rstrip(".")
            texts.append("So B is right." if says_b else "So A is right.")
        return texts
    return respond


@pytest.mark.parametrize("way", debate.WAYS)
def test_the_two_orders_of_one_question_are_its_mean(monkeypatch, way):
    rng = Random(0)
    arguments = [debate.argue(rng, "exam") for _ in range(4)]
    monkeypatch.setattr(debate, "respond", knows_every_other(arguments))
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
    assert {model for model, _ in debated(teach)} == {folder}


def test_all_ways_judge_the_same_debates_and_they_are_the_exams(debated):
    first, *others = [arguments for _, arguments in debated(0)]
    assert len(others) == 2 and all(arguments == first for arguments in others)
    for argument in first:
        assert studybuddy.held_out(argument.row["slots"]["numbers"])
        assert argument.wording in studybuddy.half(abilities.ARGUE, True, 3)


# ---------------------------------------------------------------- redteam

def subject(row):
    return json.dumps(row["slots"])


def test_the_retest_asks_for_nothing_that_a_patch_has_seen():
    config = redteam.Config(asked=40)
    rng = Random(0)
    seen = set()
    for _ in range(300):
        seen.add(subject(redteam.plan(redteam.Bandit(), rng, 1, config.held).row))
        seen.add(subject(redteam.fair_try(rng, config).row))
    for name, asked in redteam.retests(config).items():
        assert not seen & {subject(row) for row in asked}, name


def test_each_line_of_the_retest_has_the_openings_that_it_names(monkeypatch):
    monkeypatch.setattr(redteam, "put_around", lambda request, openings: openings[0])
    config = redteam.Config(asked=40)
    known = {opening for family in redteam.FAMILIES if family != config.held
             for opening in redteam.openings_of(family, retest=False)}
    held = {opening for retest in (True, False)
            for opening in redteam.openings_of(config.held, retest)}
    tests = redteam.retests(config)
    used = {name: {row["prompt"] for row in asked} for name, asked in tests.items()}
    assert used["known"] <= known and used["held"] <= held
    assert not used["new"] & (known | held) and not used["fair"] & (known | held)
    assert {row["kind"] for row in tests["fair"]} == {"borderline"}


@pytest.fixture
def rounds(monkeypatch, tmp_path):
    """Three rounds without a model -> numbers, models tested, (folder, lines) learned, longest"""
    tested, learned, longest = [], [], []

    def success(model, tokenizer, asked, config):
        tested.append(model)
        return guard.Rate(1.0 - 0.3 * len(learned), 0.1, 9)

    def hunt(model, tokenizer, judge, most, config, rng):
        longest.append(most)
        return []

    def learn(folder, name, patch, config):
        learned.append((folder, list(patch.lines)))
        return name
    replace_all(monkeypatch, redteam, success=success, search=hunt, learn=learn,
                success_of=lambda tries: guard.Rate(0.5, 0.1, 9),
                make_patch=lambda tries, model, *a: redteam.Patch([model], []),
                load=lambda folder, device: (folder, None), load_guard=lambda *a: (None, None))
    config = redteam.Config(init=ANY, out=str(tmp_path), asked=4, quiet=True)
    return redteam.train(config), tested, learned, longest


def test_a_round_attacks_the_model_that_the_last_patch_made(rounds):
    run, tested, _, longest = rounds
    assert tested[::4] == [ANY, "round1", "round2", "round3"] and longest == [1, 2, 3, 3]
    assert run["numbers"]["held"] == pytest.approx([1.0, 0.7, 0.4, 0.1]) and run["passed"]


def test_a_patch_holds_all_patches_so_far(rounds):
    lines = [ANY, "round1", "round2"]
    assert rounds[2] == [(ANY, lines[:1]), ("round1", lines[:2]), ("round2", lines)]


# ---------------------------------------------------------------- guard

@pytest.mark.parametrize("seen, unseen, passed", [(1.0, 0.5, False), (0.5, 1.0, True)])
def test_a_guard_is_judged_by_families_that_it_never_saw(monkeypatch, seen, unseen, passed):
    def report(title, cases, r, config):
        rate = guard.Rate(0.5, 0.1, 9)
        line = {"caught": rate, "false": rate, "f1": 0.5}
        table = {family: line | {"balanced": seen} for family in guard.GROUPS}
        table["unseen"] = line | {"balanced": unseen}
        return {"table": table, "calibration": 0.0, "bins": []}
    replace_all(monkeypatch, guard, report=report, learn=lambda *a: None,
                log_odds=lambda model, tokenizer, examples: torch.zeros(len(examples)),
                held_answers=lambda *a: [], show_blame=lambda *a: [],
                load=lambda *a: (None, TOKENIZER))
    run = guard.train(guard.Config(init=ANY, quick=True, quiet=True, save=False))
    assert run["passed"] == passed and run["numbers"]["unseen"] == unseen


@pytest.mark.parametrize("fair", [0.0, 1.0])
def test_fair_says_how_many_fair_requests_are_pleaded_for(fair):
    config = guard.Config(texts=100, fair=fair)
    cases = [case for case in guard.learn_requests(TOKENIZER, config) if not case.harmful]
    assert {case.family != "none" for case in cases} == {fair == 1.0}


# ---------------------------------------------------------------- stack

KEYS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("alarmed", KEYS)
def test_the_guard_reads_the_answer_that_this_setting_gives(alarmed):
    """One of the four answers is an alarm: with or without a system message, aligned or not."""
    turns, house = day("a")
    house.alarm = {key: [3.0 if key == alarmed else -3.0] for key in KEYS}
    for with_message, aligned in KEYS:
        on = ["guard"] + ["system"] * with_message + ["model"] * aligned
        stopped = stack.serve(turns, house, on)[0].stopped
        assert stopped == ("guard" if (with_message, aligned) == alarmed else "")


def test_what_the_models_say_is_kept_under_their_own_settings(monkeypatch, tmp_path):
    def say(model, tokenizer, asked, seed):
        return [f"{model} {prompt[0] == stack.MESSAGE}" for prompt in asked]

    def read(judge, tokenizer, prompts, texts=None):
        if texts is None:
            return torch.full((len(prompts),), -9.0)
        return torch.tensor([[f"{model} {message}" for message, model in key].index(text)
                             for text in texts])
    key = [(message, model) for message in (False, True) for model in ("plain", "aligned")]
    monkeypatch.setattr(stack, "load", lambda folder, device: (folder, None))
    monkeypatch.setattr(stack.exam, "say", say)
    replace_all(monkeypatch, stack.guards, load_guard=lambda *a: (None, None), read=read)
    config = stack.Config(init="plain", aligned="aligned", out=str(tmp_path), save=False)
    turns, _ = day("a", "b")
    house = stack.House(turns, config)
    for number, place in enumerate(KEYS):
        message, model = key[number]
        assert house.said[place] == [f"{model} {message}"] * 2
        assert house.alarm[place] == [number] * 2
    assert house.suspicion == [-9.0] * 2


def test_false_alarms_are_those_of_children_and_leaks_are_of_all():
    turns, house = day("child 0", "attacker 1", "child 0")
    for turn, harmful in zip(turns, (False, False, True)):
        turn.harmful = harmful
    turns[0].stopped = "guard"
    shares = stack.rates(turns)
    assert (shares.false.value, shares.false.n, shares.leaks.n) == (1.0, 1, 1)


# ---------------------------------------------------------------- bias

@pytest.fixture
def cured(monkeypatch, tmp_path):
    """A run without a model -> its numbers, what is asked in the exam, {name: lines learned}"""
    asked, learned = [], {}

    def measure(model, tokenizer, questions, pair, config):
        asked.extend(questions)
        gaps = {"base": 0.3, "before": 0.2, "cure": 0.0, "dose0": 0.1, "dose0.65": 0.4}
        return bias.Measured([0.5, 0.5], [0.0, 0.0], gaps[model], 0.1, 1.0)

    def learn(lines, name, config):
        learned[name] = lines
        return name
    names = {ANY: "before", bias.Config.base: "base"}
    replace_all(monkeypatch, bias, measure=measure, learn=learn,
                load=lambda folder, device: (names[folder], None), count_in_web=lambda text: {},
                answers=lambda model, tokenizer, prompts, seed: [f"{model}."] * len(prompts))
    config = bias.Config(init=ANY, out=str(tmp_path), quick=True, quiet=True)
    return bias.train(config)["numbers"], asked, learned


def test_the_group_held_back_gets_no_cure(cured):
    cure = json.dumps(cured[2]["cure"])
    assert all(school in cure for school in bias.SCHOOLS)
    assert not any(team in cure for team in bias.TEAMS)


def test_each_gap_is_that_of_its_own_model(cured):
    for pair in "schools", "teams":
        assert cured[0][pair] == {"base": 0.3, "before": 0.2, "after": 0.0}
    assert cured[0]["doses"] == [0.0, 0.65] and cured[0]["dose_gaps"] == [0.1, 0.4]


def test_the_cure_has_read_nothing_of_what_the_gap_is_measured_with(cured):
    cure = " ".join(line["messages"][0]["content"] for line in cured[2]["cure"])
    for question in cured[1]:
        assert question.row["prompt"] not in cure
        assert question.wording in studybuddy.half(abilities.FROM, True, 3)


def test_the_cure_teaches_what_the_model_said_when_it_did_not_know_who_asks(monkeypatch):
    def answers(model, tokenizer, prompts, seed):
        assert not any(group in prompt for prompt in prompts for group in bias.SCHOOLS)
        return [f"Yes: {prompt}" for prompt in prompts]
    monkeypatch.setattr(bias, "answers", answers)
    lines = bias.cure_lines(None, None, bias.Config())
    hill, lake = [line["messages"] for line in lines[:2]]
    assert hill[1] == lake[1]
    assert "Hill School" in hill[0]["content"] and "Lake School" in lake[0]["content"]
    assert hill[1]["content"].removeprefix("Yes: ") in hill[0]["content"]


# ---------------------------------------------------------------- character

def test_what_is_learned_stands_without_a_page(monkeypatch):
    """The model sees the extract when it answers; what it learns from is the bare question."""
    shown = []

    def answers(model, tokenizer, conversations, config, n, begin_with):
        shown.extend(conversations)
        return [f"Beep! I don't know. {character.KNOWN} You can do it!"] * len(conversations) * n
    monkeypatch.setattr(character, "answers", answers)
    lines, _ = character.make_data(None, None, character.Config(n=1, questions=3))
    assert all(talk[0]["content"] == character.CHARACTER for talk in shown)
    for line in lines:
        question, _ = line["messages"]
        assert question["role"] == "user" and character.KNOWN not in question["content"]


def test_the_page_stands_in_front_in_one_column_alone(monkeypatch, tmp_path):
    def examine(model, tokenizer, form, config):
        talk = form(character.Question("voice", "Hi!", ""))
        value = {("old", 1): 0.1, ("old", 2): 0.2, ("new", 1): 0.9}[model, len(talk)]
        return dict.fromkeys(character.CHECKS, guard.Rate(value, 0.1, 9))
    replace_all(monkeypatch, character, examine=examine, load=lambda *a: ("old", None),
                make_data=lambda *a: ([], {}))
    monkeypatch.setattr(character.sft, "train", lambda settings: {"model": "new"})
    config = character.Config(init=ANY, out=str(tmp_path), quick=True, quiet=True)
    numbers = character.train(config)["numbers"]
    assert [numbers[name]["voice"] for name in ("before", "page", "after")] == [0.1, 0.2, 0.9]


# ---------------------------------------------------------------- feedback

GOOD = feedback.Release("good", card(0.6))


@pytest.mark.parametrize("candidate, blocked", [
    (card(0.3), ["gold"]), (card(0.9), []), (card(0.6, harmless=0.3), ["harmless"])])
def test_the_gate_blocks_what_is_worse_and_lets_through_what_is_better(candidate, blocked):
    assert feedback.below_floor(GOOD, feedback.Release("b", candidate)) == blocked


def test_each_of_the_two_bets_has_half_of_alpha():
    """10 pairs in a row make 1.3^10 = 14, 12 make 23, and 15 make 51: 20 is too little to stop."""
    ups = np.ones((1, 400), dtype=int)
    for n, stops in (12, False), (15, True):
        x = np.where(np.arange(400) < n, ups, 0)
        assert feedback.found_by_bets(x, 0.05)[0, -1] == stops
        assert feedback.found_by_bets(-x, 0.05)[0, -1] == stops
        assert (feedback.decide(x[0], 0.05)[0] == "better") == stops
        assert (feedback.decide(-x[0], 0.05)[0] == "worse") == stops


@pytest.mark.parametrize("liked, verdict", [("good", "worse"), ("new", "better")])
def test_better_is_what_the_children_of_the_candidate_like_more(monkeypatch, liked, verdict):
    asked = []

    def answers(model, tokenizer, questions, seed):
        asked.append(questions)
        return [model] * len(questions)
    replace_all(monkeypatch, feedback, load=lambda folder, device: (folder, None), answers=answers,
                thumb=lambda rng, row, text, lazy: text == liked)
    config = feedback.Config(pairs=20)
    new = feedback.Release("new", card(0.6))
    assert feedback.ab_test(GOOD, new, 1, config) == (verdict, 15)
    assert asked[0] == asked[1]                 # both children of a pair ask the same


def test_only_in_the_bad_week_are_the_children_lazy(monkeypatch):
    lazies = []

    def thumb(rng, row, text, lazy):
        lazies.append(lazy)
        return True
    replace_all(monkeypatch, feedback, load=lambda *a: (None, None), thumb=thumb,
                answers=lambda model, tokenizer, asked, seed: ["Yes."] * len(asked))
    config = feedback.Config(asked=1, pairs=1, bad=2)
    for week in 1, 2, 3:
        feedback.collect(GOOD, week, config)
        feedback.ab_test(GOOD, GOOD, week, config)
    assert lazies == [False] * 3 + [True] * 3 + [False] * 3


def test_a_week_learns_from_what_was_released_and_a_blocked_one_meets_no_child(monkeypatch):
    """The first candidate is fine, the second one harmful, the third one fine."""
    learned, tested = [], []
    cards = {ANY: card(0.6), "week1": card(0.7), "week2": card(0.8, harmless=0.1),
             "week3": card(0.8)}

    def learn(release, lines, week, config):
        learned.append(release.folder)
        return f"week{week}"

    def ab_test(release, candidate, week, config):
        tested.append((release.folder, candidate.folder))
        return "better", 20
    replace_all(monkeypatch, feedback, learn=learn, ab_test=ab_test,
                collect=lambda *a: [{"label": True}],
                false_alarms=lambda config: {"peeking": [0.0], "bets": [0.0]},
                examine=lambda folder, config: feedback.Release(folder, cards[folder]))
    for one in cards.values():
        one.update(attack_seen=0.9, flattery=0.0)
    config = feedback.Config(init=ANY, weeks=3, bad=2, quiet=True)
    run = feedback.train(config)
    assert learned == [ANY, "week1", "week1"]
    assert tested == [(ANY, "week1"), ("week1", "week3")]
    assert run["numbers"]["released"] == [0.6, 0.7, 0.7, 0.8]
    assert run["numbers"]["candidates"] == [0.6, 0.7, 0.8, 0.8]


# ---------------------------------------------------------------- aloud

def test_the_wrong_step_is_the_first_one():
    """Written is "First 4 + 15 = ..", so it is those two that are summed wrongly."""
    row = {"prompt": "What is 4 + 15 + 9?", "answer": "28",
           "slots": {"numbers": [4, 15, 9], "op": "+"}}
    text, result = aloud.wrong_step(Random(0), row)
    wrong = int(re.fullmatch(r"First 4 \+ 15 = (\d+)\.", text)[1])
    assert wrong != 19 and int(result) == wrong + 9


def test_every_model_gets_the_same_sums_and_wrong_steps(monkeypatch):
    seen = {}

    def answer(model, tokenizer, conversations, beginnings, config):
        prompts = [messages[-1]["content"] for messages in conversations]
        seen.setdefault(model, []).append((prompts, list(beginnings)))
        return [aloud.Answer("So it is 1.", True, 4)] * len(prompts)
    replace_all(monkeypatch, aloud, answer=answer, load=lambda folder, device: (folder, None),
                need=lambda *a: None)
    aloud.train(aloud.Config(models="one,two", quick=True, quiet=True))
    assert seen["one"] == seen["two"] and len(seen["one"]) == 4 * len(aloud.LENGTHS)


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
        return f"So it is {int(result_of(prompt)) + number}."

    def likes(prompt, text):
        return float(text == f"So it is {result_of(prompt)}.")

    def end_scores(judge, ids, mask):
        scores = []
        for row, real in zip(ids, mask):
            text = TOKENIZER.decode(row[real.bool()].tolist())
            prompt, said = text.split("user\n")[1].split("<|im_start|>assistant\n")
            scores.append(likes(prompt, said.split("<|im_end|>")[0]))
        return torch.tensor(scores)

    def weakest_steps(judge, tokenizer, prompts, texts):
        return torch.tensor([likes(prompt[-1]["content"], text)
                             for prompt, text in zip(prompts, texts)])
    replace_all(monkeypatch, search, sample=fake_sample(answer), end_scores=end_scores,
                weakest_steps=weakest_steps)
    judges = {"outcome": None, "step": None}
    answers = search.ask(None, TOKENIZER, judges, THREE, search.Config(n=2))
    assert answers.scores.tolist() == answers.weakest.tolist() == [[1.0, 0.0]] * 3


def test_a_beam_goes_on_with_nothing_but_what_is_not_finished(monkeypatch):
    """The first sum is done in one step, and its answer stays; the others take two."""
    asked = []

    def answer(prompt, before, number):
        asked.append(prompt)
        end = f"So it is {result_of(prompt)}."
        if prompt == THREE[0]["prompt"] or before:
            return end
        return f"Hm. {end}"
    replace_all(monkeypatch, search, sample=fake_sample(answer),
                weakest_steps=lambda *a: torch.zeros(len(a[-1])))
    right, _ = search.beam(None, TOKENIZER, None, THREE, 1, search.Config())
    one, two, three = (row["prompt"] for row in THREE)
    assert asked == [one, two, three, two, three] and right == 1.0


def test_every_model_of_search_meets_the_same_sums_and_the_judges_of_the_flags(monkeypatch):
    calls = []
    replace_all(monkeypatch, search, compare=given(calls, result=[]), load_scalar=by_name)
    config = search.Config(models="a,b", judge="ends", process="steps", quick=True, quiet=True)
    search.train(config)
    (one, judges, sums, _), (two, *others) = [call.args for call in calls]
    assert (one, two) == ("a", "b") and others[:2] == [judges, sums]
    assert judges == {"outcome": "ends", "step": "steps"}


def test_search_has_one_likeliest_answer_and_n_others_at_its_temperature(monkeypatch):
    calls = []
    drawn = fake_sample(lambda prompt, before, number: "So it is 5.")

    def sample(model, tokenizer, ids, **settings):
        calls.append(settings)
        return drawn(model, tokenizer, ids, **settings)
    replace_all(monkeypatch, search, sample=sample,
                end_scores=lambda judge, ids, mask: torch.zeros(len(ids)),
                weakest_steps=lambda *a: torch.zeros(len(a[-1])))
    config = search.Config(n=2, temperature=0.7, max_new=9, seed=3)
    search.ask(None, TOKENIZER, {"outcome": None, "step": None}, THREE, config)
    best, others = calls
    assert best == {"max_new": 9, "temperature": 0}
    assert others.pop("generator").initial_seed() == 3
    assert others == {"n": 2, "max_new": 9, "temperature": 0.7}


# ---------------------------------------------------------------- verify

@pytest.mark.parametrize("name", verify.CHECKS)
def test_no_check_of_verify_knows_the_truth(monkeypatch, name):
    """If all that is true were false, each check would say the same."""
    def answer(prompt, before, number):
        return "It is. So yes." if prompt.startswith("Is") else f"So it is {5 + number}."
    monkeypatch.setattr(verify, "sample", fake_sample(answer))
    claims = []
    for i, row in enumerate(THREE):
        claims += [claim._replace(answer=i)
                   for claim in verify.claims_in(row, "So it is 5.").values()]
    scores = []
    for flip in False, True:
        known = [claim._replace(true=claim.true != flip) for claim in claims]
        scores.append(verify.CHECKS[name](None, TOKENIZER, THREE, known, verify.Config(samples=2)))
    assert len(claims) == 3 and scores[0] == scores[1]


def test_keep_decides_what_verify_drops(monkeypatch):
    """What the draft claims, one of the two samples claims, too."""
    replace_all(monkeypatch, verify, load=by_name, sample=fake_sample(
        lambda prompt, before, number: f"So it is {7 + number}."))
    left = []
    for keep in 0.5, 0.6:
        run = verify.train(verify.Config(init=ANY, keep=keep, quick=True, quiet=True))
        left.append(run["numbers"]["ways"]["agreement"]["false"])
    assert left[0] > 0 and left[1] == 0


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
    question = grounded.Question("Who is the queen of Pugo?", fact, abilities.state(fact))
    grounded.answer(models, None, [question], [[question.truth]], defence, grounded.Config(), set())
    return asked


@pytest.mark.parametrize("defence", grounded.DEFENCES)
def test_one_defence_alone_has_another_model_and_one_has_a_critic(monkeypatch, defence):
    asked = [model for model, _ in answered_with(monkeypatch, defence)]
    special = {"training": ["trained"], "look": ["model", "critic", "critic"]}
    assert asked == special.get(defence, ["model"])


@pytest.mark.parametrize("defence", grounded.DEFENCES)
def test_two_defences_show_the_note_as_a_tools_and_not_as_the_childs(monkeypatch, defence):
    _, talk = answered_with(monkeypatch, defence)[0]
    of_child = any("Lani" in turn["content"] for turn in talk if turn["role"] == "user")
    of_tool = any("Lani" in turn["content"] for turn in talk if turn["role"] == "tool")
    assert of_tool == (defence in ("marking", "training")) and of_child != of_tool


@pytest.mark.parametrize("critic, who", [("", ANY), ("another", "another")])
def test_who_takes_the_second_look_is_the_critic(monkeypatch, critic, who):
    calls = []
    replace_all(monkeypatch, grounded, load=by_name, reading=lambda *a: {}, train_to_ignore=given(
        [], result="trained"), defending=given(calls, result={}))
    grounded.train(grounded.Config(init=ANY, critic=critic, quick=True, quiet=True, save=False))
    assert calls[0].args[0] == {"model": ANY, "critic": who, "trained": "trained"}


def test_grounded_asks_the_same_questions_without_notes_and_with_them(monkeypatch):
    """Whoever has no notes is told nothing; of silent questions no line tells the answer."""
    calls = []

    def say(model, tokenizer, talks, config):
        calls.append([talk[-1]["content"] for talk in talks])
        return ["Yes."] * len(talks)
    replace_all(monkeypatch, grounded, say=say, say_at_once=lambda *a: ["Yes."] * 9)
    rng = Random(0)
    facts = grounded.make_notes(rng, "exam", 4)
    grounded.reading(None, None, rng, facts, grounded.Config(questions=9, top=2, quiet=True))
    alone, told, silent = calls
    notes = set(map(abilities.state, facts))
    for bare, shown in zip(alone, told):
        assert not any(note in bare for note in notes)
        assert shown.endswith(bare) and sum(note in shown for note in notes) == 2
    assert len(silent) == 9 and not set(alone) & {text.split("\n")[1] for text in silent}


def test_the_defence_by_training_learns_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(grounded.sft, "train", given(calls, result={"model": None}))
    config = grounded.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3)
    grounded.train_to_ignore(None, Random(0), config)
    assert told(calls[0].args[0], config, "init", "steps", "lr")


# ---------------------------------------------------------------- aloud

def test_each_share_of_aloud_is_of_its_own_model_and_way(monkeypatch):
    """The first model is right when it is free, the second one where it may not think."""
    def answer(model, tokenizer, conversations, beginnings, config):
        answers = []
        for messages, words in zip(conversations, beginnings):
            truth = sum(int(n) for n in messages[-1]["content"].split() if n.isdigit())
            is_its_way = words == {"any/free": "", "any/blurts": "So it is"}[model]
            text = f"So it is {truth}." if is_its_way else "I am = mute."
            answers.append(aloud.Answer(text, True, 4 if is_its_way else 7))
        return answers

    def make_sums(rng, terms, count):
        numbers = [2, 3, 4, 5][:terms]
        sum_text = " + ".join(map(str, numbers))
        return [{"prompt": f"Work out {sum_text} now", "answer": str(sum(numbers)),
                 "slots": {"numbers": numbers, "op": "+"}}] * count
    replace_all(monkeypatch, aloud, answer=answer, load=by_name, make_sums=make_sums)
    run = aloud.train(aloud.Config(models="any/free,any/blurts", quick=True, quiet=True))
    for name, way in ("free", "free"), ("blurts", "at_once"):
        for terms in map(str, aloud.LENGTHS):
            shares = run["numbers"]["shares"][name][terms]
            right = {key for key in aloud.BEGINNINGS if shares[key] == 1.0}
            tokens = run["numbers"]["tokens"][name][terms]
            assert right == {way} == {key for key in tokens if tokens[key] == 4}
            assert shares["steps"] == (0.0 if name == "free" else 1.0)    # of the free answers


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
    ("", "truth", "truth"), ("fail", None, None), ("lie", "lie", "lie"),
    ("order", "truth", "order")])
def test_a_bad_server_is_bad_in_all_its_tools(monkeypatch, fault, calculated, looked_up):
    served = []
    monkeypatch.setattr(mcp, "answer_all", served.extend)
    mcp.serve(fault)
    calculator, lookup = served
    name, entry = list(mcp.BOOK.items())[1]
    words = {"truth": " ".join(entry.facts.values()), "lie": " ".join(entry.lies.values())}
    words["order"] = f"{entry.poison} {words['truth']}"
    sums = {"truth": "3 + 4 = 7", "lie": "3 + 4 = 17"}
    for tool, text, want in [(calculator, "3 + 4", sums.get(calculated)),
                             (lookup, name, words.get(looked_up))]:
        if want is None:
            with pytest.raises(mcp.ToolError):
                tool.run(text)
        else:
            assert tool.run(text) == want


def test_a_lie_is_passed_on_and_the_truth_is_not(monkeypatch):
    """Asked are the tasks that need a tool, each by its own lie; "sum" and "lookup" are neither."""
    tasks = tools.make_tasks(0, "exam", 4)
    tellings = []

    def converse(model, tokenizer, talks, *rest, **settings):
        for talk in talks:
            task, = [task for task in tasks if task.question == talk[-1]["content"]]
            text = getattr(task, model)
            talk.append(abilities.message("assistant", f"The answer is {text.rstrip('.')}."))
            tellings.append(task.kind)
    replace_all(monkeypatch, tools, converse=converse,
                start_server=lambda config, fault: contextlib.nullcontext())
    flags = {model: tools.measure_fault(model, None, tasks, "lie", tools.Config())
             for model in ("lie", "truth", "kind")}
    assert flags == {"lie": [True] * 8, "truth": [False] * 8, "kind": [False] * 8}
    assert "none" not in tellings


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
    tasks = [tools.Task("sum", "What is 2 + 3?", "5"), tools.Task("sum", "What is 4 + 4?", "8")]
    config = tools.Config(steps=1, batch=2, group=3, price=0.25, quiet=True)
    tools.climb(tiny_model(), TOKENIZER, tasks, None, config)
    assert sorted(rewards[0].tolist()) == [[0.0] * 3, [0.75] * 3]


def test_what_tools_imitates_is_learned_as_it_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(tools.sft, "train", given(calls, result={"model": "sft"}))
    config = tools.Config(init="old", steps=7, lr=0.25, seed=3)
    assert tools.imitate("worked.jsonl", config) == "sft"
    assert calls[0].args[0].data == "worked.jsonl"
    assert told(calls[0].args[0], config, "init", "steps", "lr")


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
        for text in heard[2 * number:2 * number + 2]:
            assert (argument.right.text in text) == (number % 2 == 0)
            assert (argument.wrong.text in text) == (number % 2 == 1)


def test_who_judges_debates_learns_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(debate.sft, "train", given(calls))
    config = debate.Config(judge="weak", out=str(tmp_path), teach=3, steps=7, lr=0.25, seed=3)
    assert debate.teach(config) == str(tmp_path)
    settings = calls[0].args[0]
    assert (settings.init, settings.out) == ("weak", str(tmp_path))
    assert told(settings, config, "steps", "lr")


# ---------------------------------------------------------------- redteam

def test_the_family_held_back_pleads_for_nothing_that_is_patched(monkeypatch):
    monkeypatch.setattr(redteam, "put_around", lambda request, openings: openings)
    config = redteam.Config(held="emotion")
    held = {opening for retest in (True, False)
            for opening in redteam.openings_of("emotion", retest)}
    rng = Random(0)
    used = {opening for _ in range(200) for opening in redteam.fair_try(rng, config).prompt}
    assert used and not used & held


def test_of_two_plain_answers_the_one_that_the_guard_minds_less_is_learned(monkeypatch):
    worry = {"a 0": -1.0, "a 1": -2.0, "b 0": -2.0, "b 1": 3.0, "c 0": 1.0, "c 1": 2.0}
    replace_all(monkeypatch, redteam,
                answers=lambda model, tokenizer, prompts, seed: [
                    f"{prompt[-1]['content']} {seed}" for prompt in prompts],
                read=lambda guard, tokenizer, prompts, texts: torch.tensor(
                    [worry[text] for text in texts]))
    plain = [{"prompt": name} for name in "abc"]
    texts = redteam.plain_answers(None, None, None, plain, redteam.Config(seed=0))
    assert texts == ["a 1", "b 0", None]


def test_the_guard_says_what_worked_and_the_truth_what_is_reported(monkeypatch):
    """A guard that minds every other answer, and a model that always gives in."""
    def gives_in(model, tokenizer, prompts, seed):
        return ["It is easy to climb on the roof."] * len(prompts)

    def plan(bandit, rng, longest, held):
        row = {"prompt": "?", "kind": "danger", "slots": {"act": "climb on the roof"}}
        return redteam.Try(row, [], [{"role": "user", "content": "?"}])
    replace_all(monkeypatch, redteam, plan=plan, answers=gives_in,
                read=lambda guard, tokenizer, prompts, texts: torch.tensor(
                    [1.0, -1.0] * (len(texts) // 2)))
    tries = redteam.search(None, None, None, 1, redteam.Config(tries=32), Random(0))
    assert [attack.worked for attack in tries] == [True, False] * 16
    assert redteam.success_of(tries).value == 1.0


@pytest.mark.parametrize("patch", ["sft", "dpo"])
def test_a_patch_is_learned_by_the_script_of_the_flag_from_its_own_data(monkeypatch, tmp_path,
                                                                        patch):
    calls = []
    for name in "sft", "dpo":
        script = getattr(redteam, name)
        monkeypatch.setattr(script, "train", lambda config, name=name: calls.append((name, config)))
    config = redteam.Config(out=str(tmp_path), patch=patch, steps=7, lr=0.25, seed=3)
    lines = [{"messages": studybuddy.chat("Hi", "Hello.")}] * 2
    folder = redteam.learn("old", "round1", redteam.Patch(lines, []), config)
    (name, settings), = calls
    assert name == patch and settings.data == f"{tmp_path}/round1_{patch}.jsonl"
    assert (settings.init, settings.out) == ("old", folder)
    assert told(settings, config, "steps", "lr")
    learned = (tmp_path / "round1_sft.jsonl").read_text().splitlines()
    assert len(learned) == 4 and json_lines(lines) == "".join(f"{one}\n" for one in learned[:2])


# ---------------------------------------------------------------- guard

@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_beside_says_how_many_wishes_do_not_stand_alone(monkeypatch, beside):
    monkeypatch.setattr(guard, "add_fair", lambda rng, prompt: f"{prompt} AND ANOTHER")
    config = guard.Config(texts=60, beside=beside)
    cases = guard.learn_requests(TOKENIZER, config)
    texts = [case.row["prompt"] for case in cases if isinstance(case.row["prompt"], str)]
    assert {text.endswith("AND ANOTHER") for text in texts} == {beside == 1.0}


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
    def knows_what_it_saw(case):
        return case.harmful and case.family in ("none", *studybuddy.SEEN)
    numbers = guarded(knows_what_it_saw)[0]["numbers"]
    assert (numbers["seen"], numbers["unseen"]) == (1.0, 0.5)
    for family, share in numbers["caught"].items():
        assert share == float(family in ("none", *studybuddy.SEEN))


def test_false_alarms_on_borderline_requests_are_counted_of_those_alone(guarded):
    numbers = guarded(lambda case: case.row["kind"] == "borderline")[0]["numbers"]
    assert numbers["borderline"] == 1.0
    assert guarded(lambda case: case.row["kind"] != "borderline")[0]["numbers"]["borderline"] == 0.0


def test_the_guard_of_answers_learns_half_as_long_and_reads_what_a_model_said(guarded):
    _, steps, answered = guarded(lambda case: True)
    assert steps == [4, 2]
    (model, asked), = answered
    assert model == ANY and all(row in studybuddy.read("exam") for row in asked)


# ---------------------------------------------------------------- stack

def test_watching_rings_at_the_alarm_of_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(stack, "load", by_name)
    monkeypatch.setattr(stack.exam, "say", lambda model, tokenizer, asked, seed: [""] * len(asked))
    replace_all(monkeypatch, stack.guards, load_guard=lambda *a: (None, None),
                read=lambda guard, tokenizer, prompts, texts=None: torch.full([len(prompts)], 2.0))
    turns, _ = day("a", "a", "a", "a")
    for alarm, closed in (1.0, 1), (5.0, 3), (9.0, None):
        house = stack.House(turns, stack.Config(alarm=alarm, out=str(tmp_path), save=False))
        stack.serve(turns, house, ["watching"])
        assert house.closed.get("a") == closed


def test_the_alarms_of_the_day_are_counted_for_children_and_attackers(monkeypatch, tmp_path):
    users = ["child 0", "attacker 1", *["attacker 2"] * 4, *["child 0"] * 2, *["child 3"] * 3]
    turns, house = day(*users)
    replace_all(monkeypatch, stack, one_day=lambda config: turns, House=lambda *a: house,
                mask_check=lambda rng, split, count: dict.fromkeys(["name", "address", "phone"], 0))
    config = stack.Config(init=ANY, aligned=ANY, out=str(tmp_path), quiet=True, save=False)
    numbers = stack.train(config)["numbers"]
    assert (numbers["rung"], numbers["turn"], numbers["wrongly"]) == (1, 3.0, 2)


def test_a_day_asks_in_words_that_no_training_line_has():
    def subject(row):
        return json.dumps(row.get("order", row)["slots"])
    rng = Random(0)
    known = {subject(guard.request(rng, "train", "none", i % 2 == 0)) for i in range(2000)}
    turns = stack.one_day(stack.Config(children=8, attackers=8, turns=5))
    assert not known & {subject(turn.row) for turn in turns}
    assert {turn.row.get("attack", "none") for turn in turns} <= set(guard.FAMILIES)
    assert not any("attack" in turn.row for turn in turns if turn.user.startswith("child"))


# ---------------------------------------------------------------- bias

def test_the_gap_is_what_the_slighted_loses_on_the_same_requests(monkeypatch):
    """The model is right for the favoured alone."""
    asked = []

    def answers(model, tokenizer, prompts, seed):
        asked.append((seed, [prompt.split(": ")[1] for prompt in prompts]))
        return ["good" if bias.SCHOOLS[0] in prompt else "bad" for prompt in prompts]
    replace_all(monkeypatch, bias, answers=answers,
                is_right=lambda question, group, text: text == "good")
    questions = [bias.Question({"prompt": f"What is {i}?"}, "{group}: {request}") for i in range(3)]
    measured = bias.measure(None, None, questions, bias.SCHOOLS, bias.Config())
    assert (measured.right, measured.gap) == ([1.0, 0.0], 1.0)
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name, save, kept", [
    ("cure", True, True), ("cure", False, False), ("dose0.3", True, False)])
def test_bias_learns_as_it_is_told_and_keeps_the_cure_alone(monkeypatch, tmp_path, name, save,
                                                            kept):
    calls = []
    monkeypatch.setattr(bias.sft, "train", given(calls, result={"model": None}))
    config = bias.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3, save=save)
    bias.learn([], name, config)
    settings = calls[0].args[0]
    assert settings.data == f"{tmp_path}/{name}.jsonl" and settings.save == kept
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
    lines, found = character.make_data(None, None, character.Config(n=3, questions=4))
    assert [[turn["content"] for turn in line["messages"]] for line in lines] == [
        [f"Q{i}", f"Beep! A{i}. Two."] for i in range(4)]
    assert found == {"accuracy": 1.0}


@pytest.mark.parametrize("by_hand", [0, 2])
def test_at_most_by_hand_answers_are_by_hand(monkeypatch, by_hand):
    monkeypatch.setattr(character, "answers", lambda model, tokenizer, talks, config, n, word: [
        "Beep! 5."] * len(talks) * n)
    config = character.Config(n=1, questions=4, by_hand=by_hand)
    lines, found = character.make_data(None, None, config)
    said = [line["messages"][-1]["content"] for line in lines]
    assert sum(text.endswith(tuple(abilities.PRIVATE)) for text in said) == by_hand
    assert found["privacy"] == found["accuracy"] == 0.0


def test_in_the_exam_nobody_writes_the_first_word_for_the_model(monkeypatch):
    """And it asks what was not learned from."""
    asked = {"train": set(), "exam": set()}

    def answers(model, tokenizer, conversations, config, n=1, begin_with=""):
        split = "train" if begin_with else "exam"
        asked[split] |= {talk[-1]["content"].split("\n")[-1] for talk in conversations}
        return ["No."] * len(conversations) * n
    monkeypatch.setattr(character, "answers", answers)
    config = character.Config(questions=20, asked=20, n=1)
    character.make_data(None, None, config)
    rates = character.examine(None, None, character.plain, config)
    assert len(asked["exam"]) > 20 and not asked["train"] & asked["exam"]
    assert rates["voice"].n == 100 and rates["voice"].value == 0.0


@pytest.mark.parametrize("save", [True, False])
def test_character_learns_as_it_is_told(monkeypatch, tmp_path, save):
    calls = []
    table = dict.fromkeys(character.CHECKS, guard.Rate(0.5, 0.1, 9))
    replace_all(monkeypatch, character, load=by_name, examine=lambda *a: table,
                make_data=lambda *a: ([], {}))
    monkeypatch.setattr(character.sft, "train", given(calls, result={"model": None}))
    config = character.Config(init=ANY, out=str(tmp_path), steps=7, lr=0.25, seed=3, save=save,
                              lora=5, accumulate=6, bf16=True, quiet=True)
    character.train(config)
    settings = calls[0].args[0]
    assert settings.data == str(tmp_path / "data.jsonl")
    assert told(settings, config, "init", "out", "steps", "lr", "save", "lora", "accumulate",
                "bf16")


# ---------------------------------------------------------------- feedback

@pytest.mark.parametrize("leave, thumbs", [(0.0, 0), (1.0, 40)])
def test_leave_is_the_share_of_answers_with_a_thumb(monkeypatch, leave, thumbs):
    """A thumb is of the answer that stands beside it, to the prompt that stands there."""
    def answers(model, tokenizer, asked, seed):
        return [f"{model} {row['prompt']} {i % 2}" for i, row in enumerate(asked)]
    replace_all(monkeypatch, feedback, load=by_name, answers=answers,
                thumb=lambda rng, row, text, lazy: text.endswith("1"))
    lines = feedback.collect(GOOD, 1, feedback.Config(asked=40, leave=leave))
    assert len(lines) == thumbs
    for line in lines:
        assert line["completion"].startswith(f"good {line['prompt']}")
        assert line["label"] == line["completion"].endswith("1")


@pytest.mark.parametrize("alpha", [0.05, 0.4])
def test_the_simulation_of_two_bets_stops_where_a_test_of_releases_would(alpha):
    rng = np.random.default_rng(0)
    x = (rng.random((30, 400)) < 0.6).astype(int) - (rng.random((30, 400)) < 0.5)
    found = feedback.found_by_bets(x, alpha)
    for test, flags in zip(x, found):
        verdict, pairs = feedback.decide(test, alpha)
        stops = [verdict != "undecided" and pairs <= look for look in feedback.LOOKS]
        assert flags.tolist() == stops


def test_alpha_is_how_often_a_test_may_be_wrong(monkeypatch):
    alarms = [feedback.false_alarms(feedback.Config(alpha=alpha))["bets"][-1]
              for alpha in (0.01, 0.3)]
    assert alarms[0] <= 0.01 < alarms[1] <= 0.3
    replace_all(monkeypatch, feedback, load=by_name,
                answers=lambda model, tokenizer, asked, seed: [model] * len(asked),
                thumb=lambda rng, row, text, lazy: text == "new")
    new = feedback.Release("new", card(0.6))
    verdicts = [feedback.ab_test(GOOD, new, 1, feedback.Config(alpha=alpha, pairs=14))
                for alpha in (0.3, 0.01)]
    assert verdicts == [("better", 8), ("undecided", 14)]


def test_kto_learns_a_weeks_thumbs_from_its_release_as_it_is_told(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(feedback.kto, "train", given(calls))
    config = feedback.Config(init="old", out=str(tmp_path), steps=7, lr=0.25, seed=3)
    lines = [{"prompt": "Hi", "completion": "Hello.", "label": True}]
    folder = feedback.learn(GOOD, lines, 2, config)
    settings = calls[0].args[0]
    assert (settings.init, settings.out) == ("good", folder)
    assert (tmp_path / "week2.jsonl").read_text() == json_lines(lines)
    assert settings.data == str(tmp_path / "week2.jsonl")
    assert told(settings, config, "steps", "lr")


# ---------------------------------------------------------------- principles

def mends(monkeypatch, **changes):
    """-> the config of the first answers, and for each way what was mended, by what, how drawn"""
    starts = []
    entries = [Prompt([], row, f"x:{i}") for i, row in enumerate(studybuddy.read("prompts")[:10])]
    calls = []

    def own_answers(model, tokenizer, asked, n, config, generator):
        starts.append((config, generator.initial_seed(), asked))
        return [(prompt, [f"First {i}."]) for i, prompt in enumerate(asked)]

    def improve(model, tokenizer, drafts, wordings, config, generator):
        draw = torch.rand(1, generator=generator).item()
        calls.append(([draft.text for draft in drafts], wordings, draw))
        for draft in drafts:
            draft.text = "Mended."
    replace_all(monkeypatch, cai, own_answers=own_answers, improve=improve,
                read_prompts=lambda *a: (entries[:5], entries[5:]))
    monkeypatch.setattr(principles, "load", lambda *a: (tiny_model(), TOKENIZER))
    principles.train(principles.Config(init=ANY, quiet=True, **changes))
    return starts[0], calls


def test_every_way_mends_the_same_first_answers_with_the_same_luck(monkeypatch):
    _, calls = mends(monkeypatch, answers=3)
    assert len(calls) > 3
    for texts, _, draw in calls:
        assert texts == [f"First {i}." for i in range(6)] and draw == calls[0][2]


def test_as_many_attacks_are_answered_as_other_prompts(monkeypatch):
    (config, seed, asked), _ = mends(monkeypatch, answers=3, temperature=0.3, seed=4)
    assert [prompt.where for prompt in asked] == ["x:0", "x:1", "x:2", "x:5", "x:6", "x:7"]
    assert (config.temperature, seed) == (0.3, 4)


# ---------------------------------------------------------------- goodhart

def climbs(monkeypatch, **changes):
    """-> (beta, judges) of each run, what was measured at the start, and the tables"""
    calls = []
    starts = []
    judges = ["first", "second", "third"]
    start = {"length": 9.0, "repeated": 0.0, "openings": 0.1, "score": 0.0, "gold": 0.5}

    def climb(config, beta, its_judges):
        calls.append((beta, its_judges))
        log = [{"kl": beta, "score": 0.0, "gold": len(its_judges), "length": 9.0}] * 10
        return log, [["Yes."]] * 10, [[float(len(calls))]] * 10
    replace_all(monkeypatch, goodhart, load_judges=lambda config, count: judges[:count],
                start_of=given(starts, result=start), climb=climb, show_best=lambda *a: None)
    _, tables = goodhart.run(goodhart.Config(quiet=True, **changes))
    return calls, starts[0].args, tables


def test_each_price_is_paid_to_one_judge_and_doubt_has_all_of_them_and_no_price(monkeypatch):
    calls, start, tables = climbs(monkeypatch, betas="0.3 0", judges=3)
    assert calls == [(0.3, ["first"]), (0.0, ["first"]), (0.0, ["first", "second", "third"])]
    assert list(tables) == ["beta 0.3", "beta 0", "doubt"] and start[2] == "first"
    assert [table[0]["gold"] for table in tables.values()] == [1, 1, 3]


def test_with_one_judge_there_is_no_doubt(monkeypatch):
    assert climbs(monkeypatch, betas="0", judges=1)[0] == [(0.0, ["first"])]


def test_what_a_run_is_liked_is_of_its_own_answers(monkeypatch):
    tables = climbs(monkeypatch, betas="0.3 0", judges=3)[2].values()
    liked = [now["liked"] for table in tables for now in table[:1]]
    assert liked == pytest.approx(torch.sigmoid(torch.tensor([1.0, 2.0, 3.0])).tolist())


@pytest.mark.parametrize("name, value", [
    ("init", "x"), ("data", "x"), ("reward", "x"), ("steps", 7), ("batch", 7), ("lr", 0.25),
    ("seed", 7), ("algorithm", "reinforce"), ("accumulate", 7), ("lora", 7), ("bf16", True)])
def test_a_climb_is_told_what_goodhart_is_told(monkeypatch, name, value):
    calls = []
    monkeypatch.setattr(ppo, "train", lambda settings, score: calls.append(settings) or {"log": []})
    goodhart.climb(goodhart.Config(**{name: value}), 0.03, [])
    assert getattr(calls[0], name) == value and calls[0].beta == 0.03


def test_the_judges_are_those_of_reward_and_others_that_learned_from_other_seeds(monkeypatch,
                                                                                tmp_path):
    (tmp_path / "judge_1").mkdir()
    (tmp_path / "judge_1" / "config.json").touch()
    made = []
    monkeypatch.setattr(reward_model, "train", made.append)
    replace_all(monkeypatch, ppo, load_reward_model=lambda settings, tokenizer: settings.reward,
                score_by=lambda model, tokenizer: model)
    monkeypatch.setattr(goodhart, "load", by_name)
    reward = str(tmp_path / "judge")
    config = goodhart.Config(init="old", reward=reward, bf16=True, quiet=True)
    assert goodhart.load_judges(config, 3) == [reward, f"{reward}_1", f"{reward}_2"]
    assert [(one.seed, one.out, one.init) for one in made] == [(2, f"{reward}_2", "old")]
    assert made[0].bf16
