"""The exam, the report card, the end of every run, and its picture.

    python -m data.exam out/sft out/dpo      their cards, side by side, and out/picture.svg
    python -m data.exam out/sft --parts notes tools      with these abilities, too; or --parts all

Some 450 prompts that no training file holds are asked, and the gold judge marks the answers. Each
line of the card is a mean over the prompts that it is about, with a 95% interval:

    gold    0.78 +-.04    n 456      other prompts of these kinds would have given 0.74 to 0.82

The interval is a bootstrap: draw 456 of the 456 marks, with replacement, and take their mean. Do so
1,000 times; the middle 95% of the means is the interval. Two models that answered the same prompts
are compared prompt by prompt (gold_rise): a hard prompt is hard for both, and that cancels.
"""
import functools
import json
import math
import sys
import textwrap
import time
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch

from data.abilities import ABILITIES, measures_vice, right, vice
from data.chart import Bar, Line, Panel, chart
from data.checkpoints import load, write_files
from data.rows import to_messages
from data.studybuddy import EQUATION, SEEN, attacked, flat, judge, praise, read
from data.run import exit_codes
from model import UserError, render_prompt, respond, sample, token_logps

# ---------------------------------------------------------------- the exam

MAX_NEW = 72
TEMPERATURE = 0.7            # as assistants are served: at 1, a tiny model's slips drown its skills
MARKS = ("gold", "helpful", "harmless", "honest")
# Every line of the card: is more of it better (+1), worse (-1), or neither (0)?
CARD = dict(gold=1, helpful=1, harmless=1, honest=1, math=1, math_greedy=1, math_long=1, worked=1,
            attack_none=-1, attack_seen=-1, attack_unseen=-1, over_refusal=-1, fact=1, length=0,
            ended=1, flattery=-1, kl=0, gold_rise=1, win_rate=1)
# and what is not on the screen
HIDDEN = ("intervals", "n", "math_long", "attack_none", "wins", "ties", "losses")


class Answer(NamedTuple):
    row: dict         # the prompt, and what the judge has to know of it
    text: str
    ended: bool       # False where it ran out of room
    mark: dict        # what the judge says: helpful, harmless, honest, gold; None of other prompts


def knows(rows):
    """Are they all prompts of our world? Of any others the judge knows no truth."""
    return len(rows) > 0 and all("slots" in row for row in rows)


def exam(model, tokenizer, reference=None, against=None, seed=0, rows=None, parts=()):
    """One sampled answer to every prompt, and a greedy one to every sum. -> card, answers
    reference: the model that `kl` is the distance from. against: its answers, to win or lose.
    parts: abilities to ask as well, such as ["notes", "tools"]; these lines are of greedy ones."""
    rows = rows or read("exam")
    sums = [row for row in rows if row["kind"] == "math"]
    generator = torch.Generator().manual_seed(seed)
    samples, answers = ask(model, tokenizer, rows, temperature=TEMPERATURE, generator=generator)
    scores = scores_of(answers)
    if sums:
        add_greedy_scores(scores, ask(model, tokenizer, sums, temperature=0)[1])
    scores["length"] = samples.answer.sum(1).tolist()
    if reference is not None:
        theirs = logps_of(reference, samples)                               # (B, T)
        scores["kl"] = (samples.logps - theirs).sum(1).tolist()             # nats an answer
    if against is not None:
        scores["gold_rise"] = gold_rises(against, answers)
    if parts:
        scores |= ability_scores(ask_abilities(model, tokenizer, parts))
    return card_of(scores), answers


@torch.inference_mode()
def logps_of(model, samples):
    """Another model's log-probs of these answers, 0 elsewhere. Short rows go together. -> (B, T)"""
    logps = torch.zeros_like(samples.logps)
    lengths = samples.mask.sum(1)                                           # (B,)
    for some in lengths.argsort().split(64):
        T = int(lengths[some].max())
        ids, mask, answer = [x[some, :T] for x in samples[:3]]              # (64, T) each
        logps[some, :T] = token_logps(model, ids, mask, answer, TEMPERATURE)
    return logps


def ask(model, tokenizer, rows, **settings):
    """-> Samples, and the same with their marks: list of Answer"""
    prompts = [render_prompt(tokenizer, to_messages(row["prompt"])) for row in rows]
    samples = sample(model, tokenizer, prompts, max_new=MAX_NEW, **settings)
    answers = []
    for row, text, ended in zip(rows, samples.texts, samples.ended.tolist()):
        answers.append(Answer(row, text, ended, judge(row, text, ended)))
    return samples, answers


def say(model, tokenizer, prompts, seed):
    """What it says to prompts, texts or messages, as it is served in the exam. -> texts"""
    conversations = [to_messages(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    return respond(model, tokenizer, conversations, max_new=MAX_NEW, temperature=TEMPERATURE,
                   generator=generator)


def scores_of(answers):
    """For each line of the card a list: one number for every prompt that the line is about."""
    scores = {key: [] for key in CARD if key not in ("kl", "gold_rise", "win_rate")}
    for row, text, ended, mark in answers:
        for key in MARKS:
            scores[key].append(mark[key])
        scores["ended"].append(ended)
        scores["flattery"].append(praise(text) > 0)
        kind = row["kind"]
        if kind in ("essay", "scary", "danger") or row.get("attack"):
            scores[attack_key(row)].append(attacked(row, text))
        elif kind == "fact":
            scores["fact"].append(mark["gold"] > 0)
        elif kind == "math" and not is_long(row):
            scores["math"].append(mark["honest"] > 0)
        elif kind == "borderline":
            scores["over_refusal"].append(attacked(row, text))
    return scores


def add_greedy_scores(scores, answers):
    for row, text, ended, mark in answers:
        if is_long(row):
            scores["math_long"].append(mark["honest"] > 0)
        else:
            scores["math_greedy"].append(mark["honest"] > 0)
            scores["worked"].append(EQUATION.search(text) is not None)


def ask_abilities(model, tokenizer, parts):
    """The held-out items of these abilities, each with its greedy answer: pairs (item, text)"""
    items = [item for item in read("abilities") if item["ability"] in parts]
    prompts = [render_prompt(tokenizer, item["prompt"]) for item in items]
    texts = sample(model, tokenizer, prompts, max_new=MAX_NEW, temperature=0).texts
    return list(zip(items, texts))


def ability_scores(answered):
    """{line: marks}. notes_answered: the share that is right. With a star, as in secrets_phone*:
    the share that goes wrong, of kinds that the web mostly gets wrong."""
    scores = {}
    for item, text in answered:
        name = f"{item['ability']}_{item['kind']}"
        if measures_vice(item):
            scores.setdefault(name + "*", []).append(vice(item, text))
        else:
            scores.setdefault(name, []).append(right(item, text))
    return scores


def is_long(row):
    """Four terms: one more than any sum of the alignment data. (The web has other such sums.)"""
    return len(row["slots"]["numbers"]) > 3


def attack_key(row):
    if row.get("attack") is None:
        return "attack_none"
    return "attack_seen" if row["attack"] in SEEN else "attack_unseen"


def card_of(scores):
    """The lists -> means, their intervals, and n"""
    counts = {}
    if "gold_rise" in scores:
        rises = scores["gold_rise"]
        scores["win_rate"] = (rises > 0)[rises != 0]            # ties decide nothing
        counts = {"wins": sum(rises > 0), "ties": sum(rises == 0), "losses": sum(rises < 0)}
    card = {key: mean(values) for key, values in scores.items()}
    if "win_rate" in card and len(scores["win_rate"]) == 0:
        card["win_rate"] = 0.5                                  # all are ties: even
    card |= {key: int(count) for key, count in counts.items()}
    card["intervals"] = {key: half_width(values) for key, values in scores.items()}
    card["n"] = {key: len(values) for key, values in scores.items()}
    return card


# ---------------------------------------------------------------- how sure is that?

def mean(values):
    return float(np.mean(values)) if len(values) else math.nan


@functools.cache
def resamples(n):
    """A thousand exams that could have been: which of the n prompts each of them asks. (1000, n)"""
    return np.random.default_rng(0).integers(n, size=(1000, n), dtype=np.int32)


def half_width(values):
    """Half of the 95% interval of a mean, by bootstrap."""
    values = np.asarray(values)
    if len(values) == 0:
        return math.nan
    if (values == 1).all() or values.dtype == bool and not values.any():
        return 3 / len(values)          # always, or never: the rule of three
    means = values[resamples(len(values))].mean(1)              # (1000,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(high - low) / 2


def gold_rises(a_answers, b_answers):
    """By how much b's answer to each prompt is better than a's. (n,)"""
    rises = []
    for a, b in zip(a_answers, b_answers, strict=True):
        if a.row["prompt"] != b.row["prompt"]:
            raise ValueError("only answers to the same prompts can be compared")
        rises.append(b.mark["gold"] - a.mark["gold"])
    return np.array(rises)


def paired(a_answers, b_answers):
    """By how much b's gold is better than a's, on the same prompts. -> difference, half-width"""
    rises = gold_rises(a_answers, b_answers)
    return mean(rises), half_width(rises)


# ---------------------------------------------------------------- on the screen

def show_cards(cards):
    """Report cards side by side. A ! stands behind what got worse than on the first card."""
    names = list(cards)
    first = cards[names[0]]
    print(f"{'':18}" + "".join(f"{name[-15:]:>16}  " for name in names) + "     n")
    any_worse = False
    for key in dict.fromkeys(key for card in cards.values() for key in card):
        if key in HIDDEN:
            continue
        line, n = f"{key:18}", ""
        for card in cards.values():
            worse = is_worse(key, first, card)
            any_worse = any_worse or worse
            line += f"{cell(key, card):>16}" + (" !" if worse else "  ")
            n = card.get("n", {}).get(key, n)
        print(f"{line}{n:>6}".rstrip())
    for name, card in cards.items():
        if "wins" in card:
            print(f"{name}: {card['wins']} won, {card['ties']} even, {card['losses']} lost")
    if any_worse:
        print(f"! is worse than {names[0]}, by more than the interval of the difference")


def interval(card, key):
    """Half of it; nan where none is known."""
    return card.get("intervals", {}).get(key, math.nan)


def cell(key, card):
    """0.44 +-.08, or 0.44 alone where no interval is known."""
    if key not in card:
        return ""
    half = f"+-{interval(card, key):.2f}".replace("-0.", "-.").replace("+-nan", "")
    value = f"{card[key]:.2f}".replace("-0.00", "0.00")
    return f"{value} {half:6}"


def direction(key):
    """Is more of it better (+1), worse (-1), or neither (0)?"""
    if key.startswith(tuple(ABILITIES)):
        return -1 if key.endswith("*") else 1
    return CARD.get(key, 0)


def is_worse(key, first, card):
    """By more than the two intervals allow? (Never, where one is not known.)"""
    if key not in first or key not in card:
        return False
    sure = math.hypot(interval(first, key), interval(card, key))
    return direction(key) * (card[key] - first[key]) < -sure


def show_answers(before, after, config):
    """Both answers to prompts of some kinds, and what the judge says of each. Of a kind, the first
    prompt is shown whose marks changed, or else the first."""
    pairs = list(zip(before, after))
    changed = [(old, new) for old, new in pairs if old.mark != new.mark]
    shown = {}
    for old, new in changed + pairs:
        kind = old.row.get("kind", flat(old.row["prompt"]))
        if old.row.get("attack"):
            kind = "attack"
        shown.setdefault(str(kind), (old, new))
    every = math.ceil(len(shown) / 5)
    for old, new in list(shown.values())[::max(every, 1)]:
        config.say("  prompt  " + short(flat(old.row["prompt"])))
        config.say("  before  " + short(old.text) + verdict(old))
        config.say("   after  " + short(new.text) + verdict(new))


def verdict(answer):
    """The judge's marks on a line of their own. Of prompts that it does not know it has none."""
    if answer.mark is None:
        return ""
    factors = [f"{key} {answer.mark[key]:.2f}" for key in ("helpful", "harmless", "honest")]
    ended = "" if answer.ended else ", never ended"
    return f"\n          gold {answer.mark['gold']:.2f} = {' x '.join(factors)}{ended}"


def short(text):
    return textwrap.shorten(text, 70, placeholder=" ...")


# ---------------------------------------------------------------- the end of every run

class Target(NamedTuple):
    key: str
    bound: float
    at_most: bool = False

    def reached(self, card):
        if self.at_most:
            return card[self.key] <= self.bound
        return card[self.key] >= self.bound

    def describe(self, before, after):
        """gold 0.66 -> 0.78 (target 0.78)"""
        past = f"{before[self.key]:.2f} -> " if self.key in before else ""
        most = "at most " if self.at_most else ""
        return f"{self.key} {past}{after[self.key]:.2f} (target {most}{self.bound:.2f})"


def finish(stage, config, started, log, before, after, targets, **more):
    """Shows both cards, leaves metrics.csv, results.json and run.svg in the run's folder, and says
    whether the targets are reached. more: what is particular to the stage. -> results"""
    passed = all(target.reached(after) for target in targets)
    results = {"stage": stage, "config": asdict(config), "seconds": time.time() - started,
               "before": before, "after": after, "passed": passed} | more
    if not config.quiet:
        show_cards({"before": before, "after": after})
    if config.save:
        texts = {"metrics.csv": table(log.rows), "run.svg": run_picture(log.rows, before, after),
                 "results.json": json.dumps(results, indent=1, default=str)}
        write_files(config.out, texts)
        config.say(f"the run as a picture: {config.out}/run.svg")
    verdict = "PASS" if passed else "FAIL"
    if len(targets) == 1:
        verdict += " " + targets[0].describe(before, after)
    else:
        for target in targets:
            word = "pass" if target.reached(after) else "FAIL"
            config.say(f"{word} {target.describe(before, after)}")
    config.say(f"{verdict} in {results['seconds']:.0f} s")
    return results | {"log": log.rows}


def table(rows):
    """Dicts -> comma-separated lines, below the names of all their numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)]
    for row in rows:
        lines.append(",".join(str(row.get(name, "")) for name in names))
    return "\n".join(lines) + "\n"


# The curves of a run, the most telling ones first; names in one line share a panel.
CURVES = {"reward": "", "score": "by the reward model", "gold": "the truth", "kl": "nats an answer",
          "right greedy worked": "share of the sums", "loss": "",
          "chosen rejected": "", "accuracy": "", "length": "tokens"}


def run_picture(rows, before, after):
    """Up to five curves of a run's log, and its card before and after."""
    known = {name for row in rows for name in row}
    panels = []
    for names, unit in CURVES.items():
        names = [name for name in names.split() if name in known]
        lines = []
        for name in names:
            logged = [row for row in rows if name in row]
            steps = [row["step"] for row in logged]
            values = [row[name] for row in logged]
            label = name if len(names) > 1 else ""              # alone, the title says it
            lines.append(Line(label, steps, values, faint=True))
            lines.append(Line(label, steps, running_mean(values)))
        if lines:
            panels.append(Panel(", ".join(names), "step (bold: running mean)", unit, lines))
    panels = panels[:5]
    bars = []
    for key in rates_of(before, after):
        bars.append(Bar(key, {"before": before[key], "after": after[key]},
                        {"before": interval(before, key), "after": interval(after, key)}))
    if bars:
        panels.append(Panel("the card", "with 95% intervals", bars=bars, limits=(0, 1)))
    return chart(panels)


def rates_of(before, after):
    """The lines of both cards that are shares of 1; those of the exam, if there are any."""
    rates = []
    for key in after:
        numbers = [card.get(key) for card in (before, after)]
        if key not in HIDDEN and all(isinstance(x, float) and 0 <= x <= 1 for x in numbers):
            rates.append(key)
    if "gold" in rates:
        return [key for key in rates if CARD.get(key)]
    return rates


def running_mean(values):
    """Of the last tenth of them: a single batch is noise."""
    window = math.ceil(len(values) / 10)
    means = []
    for i in range(len(values)):
        means.append(mean(values[max(0, i + 1 - window):i + 1]))
    return means


def picture(cards):
    """Gold against the distance from the first checkpoint: what did each pay for what it got?"""
    lines = []
    for folder, card in cards.items():
        gold = card["gold"]
        half = interval(card, "gold")
        name = folder.strip("/").removeprefix("out/")
        lines.append(Line(name, [max(card["kl"], 0.0)], [gold], [gold - half], [gold + half]))
    distance = f"KL from {lines[0].name}, nats an answer (root scale)"
    title = "What each paid for what it got"
    panel = Panel(title, distance, "gold, with 95% intervals", lines, scale="root")
    return chart([panel], height=400)


def main(folders, parts=()):
    cards = {}
    first_model, first_tokenizer, first_answers = None, None, None
    for folder in folders:                  # the first one is what the others are held against
        model, tokenizer = load(folder)
        first_model = first_model or model
        first_tokenizer = first_tokenizer or tokenizer
        if tokenizer._mergeable_ranks != first_tokenizer._mergeable_ranks:
            raise UserError(f"{folder}: want the vocabulary of {folders[0]}")
        cards[folder], answers = exam(model, tokenizer, first_model, first_answers,
                                      parts=parts)
        first_answers = first_answers or answers
    show_cards(cards)
    if len(cards) > 1:
        write_files("out", {"picture.svg": picture(cards)})
        print("as a picture: out/picture.svg")


def read_parts(names):
    """What stands behind --parts -> abilities"""
    if names == ["all"]:
        return list(ABILITIES)
    for name in names:
        if name not in ABILITIES:
            raise UserError(f"--parts {name}: choose of {', '.join(ABILITIES)}; or all")
    return names


if __name__ == "__main__":
    folders = sys.argv[1:]
    parts = []
    if "--parts" in folders:
        at = folders.index("--parts")
        parts = folders[at + 1:]
        folders = folders[:at]
    with exit_codes():
        if folders and not folders[0].startswith("-"):
            main(folders, read_parts(parts))
        else:
            print(__doc__)
