"""What does a constitution buy? The critic, the reviser and the judge, held against the truth.

cai.py never sees a human label, nor the truth. Here we look behind its back, with the gold judge of
our world, and ask of a run:

    the critic     Of the flaws that are there, how many does it see (recall)? Of those that it
                   sees, how many are there (precision)? Each principle is asked about each answer.
    the reviser    Of the flaws that it was asked to mend, how many are gone? How many good answers
                   did it make bad?
    the rounds     After 1, 2, .. mendings: how many bad answers are good now, how many good ones
                   are spoiled, and how many attacks still succeed?
    the verdicts   How often is the judge's label true, in one order and in both? And annotators'?
                   How often is it the label that the run learned from ("as the run")? And how sure
                   is the judge: how far is p from 1/2?

The first three are about answers to attacks. These ask for no fact, so hardly anything false
is stated and there is nothing to be unsure of: all that the critics of "true" and "unsure" see is
false alarm. The verdicts are about answers to other prompts, too.

    python -m lessons.constitution                       by data/constitution.json
    python -m lessons.constitution --constitution data/constitution_vague.json --out out/vague
        and so with data/constitution_conflict.json --order first --out out/conflict,
        and with data/constitution_gap.json --out out/gap

Three constitutions may fail in ways worth seeing. "Be good." says little: is the judge still sure,
and are its labels true? Two principles that contradict each other: does one undo the other's work?
One with a gap: what becomes of that which it does not name? The truth knows a principle by its id,
one of those in these files; one with another id counts as never broken.
Try next: drop one of the five, and see which numbers move.
"""
import math
from dataclasses import dataclass, replace
from random import Random

import torch

import cai
from data import exam, rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import load
from data.exam import mean
from lessons import figures
from model import UserError


@dataclass(frozen=True)
class Config(cai.Config, figures.Lesson):
    out: str = "out/constitution"     # write here


KEYS = ("gold", "attack_seen", "attack_unseen")     # of the cards before and after the run


# ---------------------------------------------------------------- against the truth

def share(flags, of):
    """How many flags are true, of those whose flag in `of` is true?"""
    return mean([flag for flag, counts in zip(flags, of) if counts])


def gold(row, text):
    return studybuddy.judge(row, text)["gold"]


def is_good(draft, text):
    return gold(draft.prompt.row, text) >= 0.5


def breaks(draft, text, rule):
    return rule["id"] in studybuddy.broken(draft.prompt.row, text)


def text_after(draft, rounds):
    """The answer as it stood after so many rounds that mended it."""
    text = draft.first
    for principle, complaint, revision in draft.flaws[:rounds]:
        text = revision
    return text


def critic_table(critic, tokenizer, drafts, constitution):
    """By principle, about the first answers. In a run a critic stops at the first flaw; here it is
    asked about all."""
    first = [replace(draft, text=draft.first) for draft in drafts]
    table = {}
    for rule in constitution:
        principles = [rule["principle"]] * len(drafts)
        complaints = cai.critique(critic, tokenizer, first, principles)
        seen = [not complaint.startswith(cai.NOTHING) for complaint in complaints]
        there = [breaks(draft, draft.first, rule) for draft in drafts]
        table[rule["id"]] = {"there": mean(there), "seen": mean(seen),
                             "precision": share(there, of=seen), "recall": share(seen, of=there)}
    return table


def reviser_table(drafts, constitution):
    """By principle, about each revision that the critic asked for by it."""
    table = {}
    for rule in constitution:
        there = []
        gone = []
        good = []
        bad = []
        for draft in drafts:
            for r, (principle, complaint, revision) in enumerate(draft.flaws):
                if principle == rule["principle"]:
                    old = text_after(draft, r)
                    new = text_after(draft, r + 1)
                    there.append(breaks(draft, old, rule))
                    gone.append(not breaks(draft, new, rule))
                    good.append(is_good(draft, old))
                    bad.append(not is_good(draft, new))
        table[rule["id"]] = {"revisions": len(there), "there": mean(there),
                             "gone": share(gone, of=there), "harmed": share(bad, of=good)}
    return table


def round_table(drafts, rounds):
    """Round r: each answer after r mendings, or as many as it has had. Of the answers that were bad
    at first, how many are good (mended), and of the good ones, how many are bad (spoiled)?"""
    table = {}
    was_good = [is_good(draft, draft.first) for draft in drafts]
    was_bad = [not good for good in was_good]
    for r in range(rounds + 1):
        good = []
        attacked = []
        for draft in drafts:
            text = text_after(draft, r)
            good.append(is_good(draft, text))
            attacked.append(studybuddy.attacked(draft.prompt.row, text))
        bad = [not flag for flag in good]
        table[f"round {r}"] = {"mended": share(good, of=was_bad),
                               "spoiled": share(bad, of=was_good), "attacked": mean(attacked)}
    return table


def asked_once(critic, tokenizer, verdicts, rules, config, rng):
    """The judge's label if it is asked in one order alone, drawn by lot: does it like the answer
    that the run chose? -> flags"""
    generator = torch.Generator().manual_seed(config.seed)
    prompts, firsts, seconds, spoken = [], [], [], []
    for verdict in verdicts:
        answers = [verdict.line["chosen"], verdict.line["rejected"]]
        rng.shuffle(answers)
        prompts.append(rows.to_messages(verdict.line["prompt"]))
        firsts.append(answers[0])
        seconds.append(answers[1])
        spoken.append(cai.in_order(rules, config, generator)[0])
    p = cai.judge(critic, tokenizer, prompts, firsts, seconds, spoken)      # (N,) P("A")
    labels = []
    for verdict, first, says_first in zip(verdicts, firsts, (p > 0.5).tolist()):
        chosen_is_first = first == verdict.line["chosen"]
        labels.append(says_first == chosen_is_first)
    return labels


def label_table(verdicts, once, rng):
    """How often does a label agree with the truth, where the answers' gold differs, and with the
    run's? once: what the judge says in one order. People are simulated annotators."""
    people, better, differ = [], [], []
    for verdict in verdicts:
        row = verdict.line
        rise = gold(row, row["chosen"]) - gold(row, row["rejected"])
        better.append(rise > 0)
        differ.append(rise != 0)
        people.append(studybuddy.prefers(rng, row, row["chosen"], row["rejected"]))
    table = {}
    run = [True] * len(verdicts)                    # its label is that the chosen answer is better
    for name, labels in ("both orders", run), ("one order", once), ("people", people):
        right = [label == truth for label, truth in zip(labels, better)]
        table[name] = {"labels": len(labels), "gold differs": sum(differ),
                       "true": share(right, of=differ), "as the run": mean(labels)}
    return table


def sureness(verdicts):
    """The mean of |p - 1/2|: 0 for a coin, 1/2 for a judge that has no doubt. (The mean of p itself
    is near 1/2 for a perfect judge, too, as the better answer is a as often as b.)"""
    return mean([abs(verdict.p - 0.5) for verdict in verdicts])


# ---------------------------------------------------------------- on the screen

def show_table(title, table, config):
    columns = next(iter(table.values()))
    config.say("\n" + line(title, columns))
    for name, numbers in table.items():
        config.say(line(name, map(cell, numbers.values())))


def line(name, words):
    return f"{name[:13]:14}" + "".join(f"{word:>13}" for word in words)


def cell(x):
    """A count, or a share of 1; - where there was nothing to count."""
    if isinstance(x, int):
        return str(x)
    return "-" if math.isnan(x) else f"{x:.2f}"


def numbers_of(tables):
    """The tables without their empty cells."""
    numbers = {}
    for title, table in tables.items():
        numbers[title] = {}
        for name, cells in table.items():
            numbers[title][name] = {key: x for key, x in cells.items() if not math.isnan(x)}
    return numbers


def picture(runs):
    rounds = list(runs[0]["the rounds"])
    places = list(range(len(rounds)))
    lines = []
    for name in ("mended", "spoiled", "attacked"):
        curves = []
        for run in runs:
            curves.append([run["the rounds"][r].get(name, math.nan) for r in rounds])
        lines.append(figures.line(name, places, curves))
    bars = []
    for who in runs[0]["the verdicts"]:
        values = [run["the verdicts"][who]["true"] for run in runs]
        bars.append(figures.bar(who, {"true": values}))
    return chart([Panel("Answers to attacks, round by round", "rounds of critique and revision",
                        "share of bad ones, of good ones, of attacks", lines, limits=(0, 1)),
                  Panel("Whose label is true?", "share of pairs", bars=bars, limits=(0, 1))])


def train(config):
    if config.quick:
        config = replace(config, steps=3, sl_steps=3, answers=1, pairs=32, revisions=1)
    if not exam.knows([prompt.row for prompt in rows.read_prompts(config.data)]):
        raise UserError(f"--data {config.data}: of prompts that are not of our world the truth is "
                        "not known; want data/prompts.jsonl")
    constitution = rows.read_constitution(config.constitution)
    rules = [rule["principle"] for rule in constitution]
    results = cai.train(config)
    drafts = results["drafts"]
    verdicts = results["verdicts"]
    critic, tokenizer = load(config.init, config.device)
    rng = Random(config.seed)
    once = asked_once(critic, tokenizer, verdicts, rules, config, rng)
    tables = {"the critic": critic_table(critic, tokenizer, drafts, constitution),
              "the reviser": reviser_table(drafts, constitution),
              "the rounds": round_table(drafts, config.revisions),
              "the verdicts": label_table(verdicts, once, rng)}
    sure = sureness(verdicts)
    config.say(f"\np is {sure:.2f} away from 1/2 on average (a coin: 0.00, no doubt at all: 0.50)")
    for title, table in tables.items():
        show_table(title, table, config)
    numbers = numbers_of(tables) | {"sureness": sure}
    for when in ("before", "after"):
        numbers[when] = {key: results[when][key] for key in KEYS}
    return results | {"tables": tables, "sureness": sure, "numbers": numbers}


if __name__ == "__main__":
    figures.main("constitution", Config, train, picture, __doc__)
