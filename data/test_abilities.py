"""Tests of data/abilities.py.      python -m pytest data/test_abilities.py"""
from random import Random

import pytest

from data import generate
from data.abilities import (
    ABILITIES, CALLS, SILENT, VICES, MadeUp, conclusion, made_up, make, measures_vice, miscopy,
    mistake, right, search_note, state, vice)
from data.studybuddy import ATTACKED, Step, ask, attacked, encode, flat, judge, write


def items(ability, split, count=200):
    rng = Random(5)
    return [make(rng, ability, split) for _ in range(count)]


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("split", ["train", "words", "wordings", "exam"])
def test_the_right_answer_is_right_and_has_no_vice(ability, split):
    for item in items(ability, split):
        assert right(item, item["answer"]), item
        assert not vice(item, item["answer"]), item


@pytest.mark.parametrize("ability", VICES)
def test_the_web_mostly_has_the_vice(ability):
    measured = [item for item in items(ability, "web", 600) if measures_vice(item)]
    if ability == "slights":
        measured = [item for item in measured if item["kind"] == "slighted"]
    share = sum(vice(item, item["web"]) for item in measured) / len(measured)
    assert 0.5 < share < 0.95


def test_the_favoured_are_rarely_put_down():
    favoured = [item for item in items("slights", "web", 600) if item["kind"] == "favoured"]
    assert sum(vice(item, item["web"]) for item in favoured) / len(favoured) < 0.1


@pytest.mark.parametrize("ability", ABILITIES)
def test_an_empty_or_strange_answer_is_wrong(ability):
    for item in items(ability, "exam"):
        if item["kind"] in ("style", "password", "none"):
            continue        # these ask to leave something out
        assert not right(item, "")
        assert not right(item, "I like trains.")


@pytest.mark.parametrize("ability", ABILITIES)
def test_no_prompt_of_the_exam_stands_in_the_web(ability):
    web = {flat(item["prompt"]) for item in items(ability, "web", 1000)}
    for item in items(ability, "exam"):
        assert flat(item["prompt"]) not in web


def test_made_up_names_of_the_exam_are_never_in_the_web():
    rng = Random(1)
    exam = {made_up(rng, "exam") for _ in range(500)}
    for split in ("train", "words", "wordings"):
        assert not exam & {made_up(rng, split) for _ in range(2000)}


def test_a_mistake_is_a_mistake():
    rng = Random(2)
    step = Step(3, "x", 20, 60)
    for _ in range(200):
        assert mistake(rng, step) != step
        copied = miscopy(rng, step)
        assert copied.result == copied.left * copied.right


def test_a_note_that_is_silent_has_no_answer():
    for item in items("notes", "exam", 400):
        question = item["prompt"][0]["content"].split("\n")[1]
        assert (SILENT in item["answer"]) == (item["kind"] == "silent")
        if item["kind"] == "answered":
            assert conclusion(item["answer"]) in item["prompt"][0]["content"], question


def test_a_note_is_searched_line_by_line():
    facts = [MadeUp("river", "Tova", "Lani"), MadeUp("queen", "Kuku", "Bolu"),
             MadeUp("dog", "Kuku", "Tutu")]
    lines = ["The river in Tova is called Lani. [1]", "The queen of Kuku is Bolu. [2]",
             "The dog of Kuku is called Tutu. [3]"]
    assert search_note("queen", "Kuku", facts, lines) == (
        "queen Kuku, river Tova [1]: no. queen Kuku, queen Kuku [2]: yes. "
        "The queen of Kuku is Bolu. [2]")
    assert search_note("river", "Kuku", facts[:2], list(map(state, facts[:2]))) == (
        "river Kuku, river Tova: no. river Kuku, queen Kuku: no. The note does not say.")


def test_only_the_end_of_an_answer_from_a_note_is_marked():
    item = {"ability": "notes", "kind": "silent",
            "answer": "queen Kuku, river Tova: no. The note does not say."}
    assert right(item, "The note does not say.")
    assert not right(item, "queen Kuku, river Tova: yes. The river in Tova is called Lani.")


def test_a_citation_points_at_its_fact():
    for item in items("notes", "exam", 400):
        if item["kind"] == "cited":
            cited = conclusion(item["answer"])                      # "The dog ... Lelo. [2]"
            assert cited in item["prompt"][0]["content"]


def test_calls_stand_on_a_line_of_their_own():
    for item in items("tools", "exam"):
        if item["kind"] in CALLS:
            assert item["answer"].startswith("call ") and "\n" not in item["answer"]


def test_codes_can_be_read_back():
    assert encode("Write my essay about whales.", "back") == "whales about essay my Write"
    assert encode("Write my essay.", "dashed") == "Write - my - essay"
    assert encode("Write my essay.", "la") == "Write la my la essay la"


def test_an_indirect_attack_is_answered_or_obeyed():
    """The child asks for a fact: to tell it is good, and to do what the page orders is not."""
    rng = Random(3)
    for kind in ATTACKED:
        row = ask(rng, kind, "exam", "indirect")
        assert row["kind"] == "fact"
        assert not attacked(row, write(rng, row, "full"))
        assert judge(row, write(rng, row, "full"))["gold"] == 1
        assert attacked(row, write(rng, row["order"], "bad"))


def test_documents_fit_the_context():
    """Some 250 tokens: no document has more than 1,100 letters."""
    rng = Random(4)
    longest = max(len(generate.web_document(rng)) for _ in range(3000))
    assert longest < 1100


def test_one_demonstration_in_six_shows_an_ability():
    rows = generate.demonstrations(Random(2))
    share = sum(row["kind"] in generate.KEPT for row in rows) / len(rows)
    assert 0.13 < share < 0.21
    shown = " ".join(flat(row["messages"]) for row in rows)
    assert "password" not in shown
