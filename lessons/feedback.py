"""The loop from users back into training: thumbs, a candidate, a gate, an A/B test, a release.

Each week children use the model that is released, and some leave a thumb. KTO (lessons.kto) learns
from the thumbs and makes a candidate. Before any child sees it, a gate compares its report card
with that of the release: what is worse by more than the intervals allow is not released. What
passes meets the release in an A/B test: pairs of children, of whom one gets A, the other B, and
x = thumb of B - thumb of A, which is -1, 0 or 1. When may one stop? Who looks at a p-value again
and again until it is below 0.05 will find it there, sooner or later. A bet may be looked at always:

    E_t = E_t-1 (1 + lambda x_t),  E_0 = 1          P(E ever reaches 1/alpha) <= alpha, if B = A

That is Ville's inequality (1939): with x fair, E is a fair game, and nobody gets 20 times as rich
in a fair game more often than 1 time in 20 (Waudby-Smith and Ramdas 2020, 2010.09686). One bet is
on B, with lambda 0.3, and one against it, with -0.3; each may be wrong half as often, so each waits
for 2/alpha = 40. By hand: three pairs in a row for B make 1.3^3 = 2.2, and 15 make 51: stop.

In one week the thumbs are those of a class that wants its homework written. Their candidate may
please such children, and then an A/B test among them lets it pass. The gate does not ask them. A
candidate is released if the test says "better"; one that is undecided after all pairs is dropped.

    python -m lessons.feedback                 four weeks, the third one bad
    python -m lessons.feedback --gate after    the gate looks after the release, and rolls it back
    python -m lessons.kto --init out/sft --data out/feedback/week1.jsonl    a week's thumbs, by hand

The course has a rule: the truth may report, and never decide. This gate is the exception, and says
so: it decides by the exam's card, which the gold judge marks. A lab decides by its own held-out
exam, with labels of its own; ours stands for that. The A/B test knows the thumbs alone.
Simplified: but for the bad week all weeks are alike, and nobody comes back for a good answer.
Try next: --leave 0.1, few thumbs; --gate never; BET = 0.1, slow and patient.
"""
import math
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import numpy as np

from data import exam, rows, studybuddy
from data.chart import Line, Panel, chart
from data.checkpoints import load, write_files
from data.run import begin, need
from lessons import figures, kto
from model import UserError


@dataclass(frozen=True)
class Config(figures.Lesson):
    out: str = "out/feedback"  # write here: the thumbs of each week, the candidates
    steps: int = 40           # optimiser steps of KTO, each week
    lr: float = 2e-4          # its peak learning rate
    weeks: int = 4            # weeks
    bad: int = 3              # the week with thumbs of a class that wants its homework written
    asked: int = 512          # questions a week
    leave: float = 0.5        # so many of the answers get a thumb
    pairs: int = 400          # at most so many pairs of children in an A/B test
    alpha: float = 0.05       # so often may a test find a difference where there is none
    gate: str = "before"      # before the release, after it (and rolled back), or never

    limits = figures.Lesson.limits | {"leave": (0, 1), "alpha": (0.0001, 1)}
    unused = ("data", "save")       # a week goes on from the files of the week before


# ---------------------------------------------------------------- when may a test stop?

BET = 0.3                    # lambda


# E_t = E_t-1 (1 + lambda x_t)
def wealth(x, bet):
    """x (.., T) of -1, 0 and 1 -> E after each pair (.., T)"""
    return np.cumprod(1 + bet * x, axis=-1)


def decide(x, alpha):
    """-> "better", "worse" or "undecided", and after how many pairs"""
    better = wealth(x, BET) >= 2 / alpha                        # (T,)
    worse = wealth(x, -BET) >= 2 / alpha
    for t in range(len(x)):
        if better[t]:
            return "better", t + 1
        if worse[t]:
            return "worse", t + 1
    return "undecided", len(x)


LOOKS = range(20, 401, 20)   # after so many pairs one looks


def found_by_peeking(x):
    """The wrong way: a z-test at each look, as if it were the only one. x (tests, 400)
    -> has it stopped by then? (tests, looks)"""
    found = []
    for n in LOOKS:
        mean = x[:, :n].mean(1)                                 # (tests,)
        error = x[:, :n].std(1) / math.sqrt(n)
        found.append(np.abs(mean) > 1.96 * error)
    return np.logical_or.accumulate(found).T                    # (looks, tests) -> (tests, looks)


def found_by_bets(x, alpha):
    richest = np.maximum(wealth(x, BET), wealth(x, -BET))       # (tests, 400)
    found = np.logical_or.accumulate(richest >= 2 / alpha, axis=1)
    return found[:, LOOKS.start - 1::LOOKS.step]                # (tests, looks)


def false_alarms(config, tests=2000):
    """A against A: the share of tests that have found a difference, look by look"""
    rng = np.random.default_rng(config.seed)
    first = rng.random((tests, LOOKS[-1])) < 0.6
    second = rng.random((tests, LOOKS[-1])) < 0.6
    x = first.astype(int) - second                              # (tests, 400)
    peeking = found_by_peeking(x).mean(0)                       # (looks,)
    bets = found_by_bets(x, config.alpha).mean(0)
    return {"peeking": peeking.tolist(), "bets": bets.tolist()}


# ---------------------------------------------------------------- children

def questions(rng, count, lazy):
    """What is asked in a week; of what one should not get, four times in ten in a pleading way. The
    lazy ones mostly ask for that."""
    asked = []
    for _ in range(count):
        kind = studybuddy.any_kind(rng)
        if lazy and rng.random() < 0.7:
            kind = studybuddy.pick(rng, studybuddy.ATTACKED)
        attack = None
        if kind in studybuddy.ATTACKED and rng.random() < 0.4:
            attack = studybuddy.pick(rng, studybuddy.SEEN)
        asked.append(studybuddy.ask(rng, kind, "train", attack))
    return asked


def answers(model, tokenizer, asked, seed):
    return exam.say(model, tokenizer, [row["prompt"] for row in asked], seed)


# P(up) = sigma(KEEN (worth - 1/2) + VAIN praise)
def thumb(rng, row, text, lazy):
    """Is the thumb up? Most children see the worth of an answer through noise, and like flattery.
    The lazy ones like what they should not get."""
    worth = studybuddy.judge(row, text)["gold"]
    if lazy and row["kind"] in studybuddy.ATTACKED:
        worth = float(studybuddy.attacked(row, text))
    score = studybuddy.KEEN * (worth - 0.5)
    score += studybuddy.VAIN * studybuddy.praise(text)
    return rng.random() < 1 / (1 + math.exp(-score))


def collect(release, week, config):
    """A week's thumbs -> lines for `python -m lessons.kto --data`"""
    rng = Random(1000 * config.seed + week)
    lazy = week == config.bad
    model, tokenizer = load(release.folder, config.device)
    asked = questions(rng, config.asked, lazy)
    texts = answers(model, tokenizer, asked, config.seed + week)
    lines = []
    for row, text in zip(asked, texts):
        up = thumb(rng, row, text, lazy)
        if text and rng.random() < config.leave:
            lines.append({"prompt": row["prompt"], "completion": text, "label": up})
    return lines


def ab_test(release, candidate, week, config):
    """Pairs of children ask the same; one gets A, the other B. -> verdict, pairs"""
    rng = Random(1000 * config.seed + 100 + week)
    lazy = week == config.bad
    asked = questions(rng, config.pairs, lazy)
    thumbs = []
    for side in (release, candidate):
        model, tokenizer = load(side.folder, config.device)
        texts = answers(model, tokenizer, asked, config.seed + week)
        up = [thumb(rng, row, text, lazy) for row, text in zip(asked, texts)]
        thumbs.append(np.array(up, dtype=int))
    return decide(thumbs[1] - thumbs[0], config.alpha)


# ---------------------------------------------------------------- releases

class Release(NamedTuple):
    folder: str
    card: dict               # its report card


# lines of the exam's card, marked by the gold judge in place of a lab's held-out labels
FLOORS = ("gold", "harmless", "honest", "attack_seen", "attack_unseen", "over_refusal", "ended",
          "flattery")


def examine(folder, config):
    model, tokenizer = load(folder, config.device)
    asked = studybuddy.read("exam")
    if config.quick:
        asked = asked[::20]
    card, _ = exam.exam(model, tokenizer, seed=config.seed, rows=asked)
    return Release(folder, card)


def below_floor(release, candidate):
    """The lines of the card on which a candidate is worse than the release, by more than both
    intervals allow."""
    return [key for key in FLOORS if exam.is_worse(key, release.card, candidate.card)]


def learn(release, lines, week, config):
    """KTO on the thumbs -> the folder of a candidate"""
    name = f"{config.out}/week{week}"
    write_files(config.out, {f"week{week}.jsonl": rows.json_lines(lines)})
    kto.train(kto.Config(init=release.folder, data=f"{name}.jsonl", out=name, steps=config.steps,
                         batch=config.batch, accumulate=config.accumulate, lr=config.lr,
                         lora=config.lora, seed=config.seed, device=config.device,
                         bf16=config.bf16, quiet=True))
    return name


def live_through(week, releases, config):
    """One week. It may add a release, and take it back. -> the candidate, and what happened"""
    release = releases[-1]
    lines = collect(release, week, config)
    candidate = examine(learn(release, lines, week, config), config)
    below = below_floor(release, candidate)
    ups = [line["label"] for line in lines]
    event = {"thumbs": len(lines), "up": exam.mean(ups), "below": below}
    if below and config.gate == "before":
        return candidate, event | {"what": "blocked"}
    what, pairs = ab_test(release, candidate, week, config)
    if what == "better":
        what = "released"
        releases.append(candidate)
        if below and config.gate == "after":
            what = "rolled back"
            releases.pop()      # the folder before it is still there
    return candidate, event | {"what": what, "pairs": pairs}


HEAD = "week  thumbs    up      gold  harmless  attacks  flattery  of the candidate"
LINE = "{gold:10.2f}{harmless:10.2f}{attack_seen:9.2f}{flattery:10.2f}  "


def show_week(week, candidate, event, config):
    line = f"{week:4}{event['thumbs']:8}{event['up']:6.2f}"
    line += LINE.format(**candidate.card) + event["what"]
    if "pairs" in event:
        line += f", {event['pairs']} pairs"
    config.say(line)
    if event["below"]:
        config.say(f"      worse than the release: {', '.join(event['below'])}")


def picture(runs):
    def curve(name, key, xs):
        return figures.line(name, xs, [run[key] for run in runs])

    weeks = range(len(runs[0]["released"]))
    gold = [curve("released", "released", weeks), curve("candidate", "candidates", weeks)]
    alpha = runs[0]["alpha"]
    promised = Line("", [LOOKS[0], LOOKS[-1]], [alpha, alpha], faint=True)
    stops = [curve("peeking at p", "peeking", LOOKS), curve("two bets", "bets", LOOKS), promised]
    return chart([Panel("Week by week", "week", "gold", gold),
                  Panel("A against A: a difference is found", "pairs so far", "share of tests",
                        stops)])


def train(config):
    begin(config)
    if config.gate not in ("before", "after", "never"):
        raise UserError(f"--gate {config.gate}: choose before, after or never")
    need(config.init)
    if config.quick:
        config = replace(config, weeks=2, bad=2, asked=48, pairs=8, steps=2)
    alarms = false_alarms(config)
    config.say("A against A: the share of tests that find a difference in 400 pairs")
    config.say(f"    by peeking {alarms['peeking'][-1]:.3f}, by two bets {alarms['bets'][-1]:.3f}")
    first = examine(config.init, config)
    releases = [first]
    released = [first.card["gold"]]
    candidates = [first.card["gold"]]
    ends = {}
    config.say(f"\n{HEAD}")
    for week in range(1, config.weeks + 1):
        candidate, event = live_through(week, releases, config)
        show_week(week, candidate, event, config)
        candidates.append(candidate.card["gold"])
        released.append(releases[-1].card["gold"])
        ends[week] = event["what"]
    bad = ends.get(config.bad, "not there")
    passed = released[-1] > released[0] and bad in ("blocked", "rolled back")
    verdict = "PASS" if passed else "FAIL"
    config.say(f"{verdict} gold {released[0]:.2f} -> {released[-1]:.2f}; the bad week: {bad}")
    numbers = alarms | {"released": released, "candidates": candidates,
                        "blocked": float(bad == "blocked"), "alpha": config.alpha}
    return {"numbers": numbers, "ends": ends, "releases": releases}


if __name__ == "__main__":
    figures.main("feedback", Config, train, picture, __doc__)
