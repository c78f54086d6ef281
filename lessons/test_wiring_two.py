"""Is it wired up as the page says? What is compared with what, in the programs of pages 7 to 9.

The other tests look at functions. These look at what train() makes of them: who is asked what, in
which wording, and whose numbers stand in which column. A model is a name here, or a few lines of
python that know when to be wrong.
"""
import contextlib
import json
import re
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import abilities, studybuddy
from data.checkpoints import load_ranks
from data.rows import to_messages
from lessons import (aloud, bias, character, debate, feedback, grounded, guard, redteam, search,
                     stack, tools, verify)
from lessons.test_eight import card, day

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
    judged = debate.judge(None, None, arguments, debate.WAYS[way])
    assert judged.right == [1.0, 0.5, 1.0, 0.5]


@pytest.fixture
def debated(monkeypatch):
    """A run with so much teaching -> the folders that judged, the arguments that they heard"""
    heard = []

    def judge(model, tokenizer, arguments, way):
        heard.append((model, arguments))
        return debate.Judged([0.5] * 4, 0.5, 1.0)
    replace_all(monkeypatch, debate, judge=judge, load=lambda folder, device: (folder, None),
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
