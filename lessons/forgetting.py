"""Forgetting: what some harmless steps of SFT do to an aligned model.

An aligned model is trained on: a customer wants its own tone, a team wants sums with their work
shown. Nothing in such data is bad, and still a model may give in to attacks again (Qi et al. 2023,
2310.03693), or lose something else. Alignment was a small push away from older habits; SFT on
anything pulls towards what its data look like, and no example says what shall stay.

The cure is as old as the disease (Robins 1995, rehearsal): let the aligned model answer prompts,
attacks among them, before anything is lost, and mix some of these answers into the new data. For
a share s of a file with n new conversations that takes m answers:

    m / (n + m) = s,  so  m = n s / (1 - s)

By hand: n = 600 and s = 0.25 take m = 600 x 0.25 / 0.75 = 200 answers.

    python -m lessons.forgetting    a minute: 60 steps on out/dpo, with none of its own answers
                                    among the data, with a tenth, and with three tenths
    python sft.py --init out/dpo --data out/forgetting/mixed_0.jsonl --steps 60 --out out/mine

Simplified: the new data are the harmless demonstrations of data/sft.jsonl, sums and facts and
greetings, so the model knows their kind. New data from elsewhere may pull farther. And the steps
are fixed: more old answers also mean fewer passes over the new data, so a part of the cure may be
that.
Try next: --steps 15 and --steps 240; --init out/ppo; --lr 1e-4: is it the data, or the step?
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import exam, rows
from data.chart import Line, Panel, chart
from data.checkpoints import load, write_files
from data.run import begin, need
from lessons import figures
from lessons.best_of import ask, learn_from, write_answers
from model import UserError

HARMLESS = ("math", "fact", "chat")     # kinds of prompt in which nobody asks for anything bad


@dataclass(frozen=True)
class Config(figures.Lesson):
    init: str = "out/dpo"     # an aligned model
    new: str = "data/sft.jsonl"  # JSON lines: conversations to learn
    data: str = "data/prompts.jsonl"  # JSON lines: prompts that the aligned model answers before
    out: str = "out/forgetting"  # write here: the files that are learned from
    steps: int = 60           # optimiser steps
    batch: int = 54           # conversations a step
    lr: float = 1e-3          # peak learning rate
    shares: str = "0 0.1 0.3"  # of the aligned model's own answers in the file, one run each
    prompts: int = 640        # so many prompts are answered
    max_new: int = 72         # longest answer in tokens

    unused = ("save",)        # no model is kept, and it learns from files in --out


# m = n s / (1 - s)
def rehearsals(n, share):
    """So many old answers are this share of a file, beside n new ones."""
    return round(n * share / (1 - share))


def shares_of(config):
    shares = [float(text) for text in config.shares.split()]
    for share in shares:
        if not 0 <= share < 1:
            raise UserError(f"--shares {config.shares}: want numbers from 0 to below 1")
    return shares


def harmless(path):
    """The lines of a file of conversations in which nobody asks for anything bad."""
    lines = []
    for conversation in rows.read_conversations(path):
        if conversation.row.get("kind", "chat") in HARMLESS:
            lines.append(json.dumps({"messages": conversation.messages}) + "\n")
    if not lines:
        raise UserError(f"{path}: no conversation of a kind among {', '.join(HARMLESS)}")
    return lines


def old_answers(model, tokenizer, config, generator):
    """What the aligned model says to prompts, attacks among them -> lines of JSON"""
    prompts, texts, ended = ask(model, tokenizer, config, 1, generator)
    path = Path(config.out, "old.jsonl")
    write_answers(path, prompts, texts, ended, torch.arange(len(texts)), config)
    return path.read_text().splitlines(keepends=True)


def mix(new, old, share, config):
    """A file of all new conversations, and of so many old answers. -> its path"""
    count = rehearsals(len(new), share)
    if count > len(old):
        raise UserError(f"--shares: {share:g} takes {count} answers of the aligned model, and "
                        f"there are {len(old)}: want more --prompts")
    path = Path(config.out, f"mixed_{share:g}.jsonl")
    write_files(path.parent, {path.name: "".join(new + old[:count])})
    return str(path)


# ---------------------------------------------------------------- the experiment

def compare(config):
    """-> a card for the model before, and one for each share of its answers among the data"""
    model, tokenizer = load(config.init, config.device)
    generator = torch.Generator().manual_seed(config.seed)
    new = harmless(config.new)
    old = old_answers(model, tokenizer, config, generator)
    cards = {}
    cards["before"], answers_before = exam.exam(model, tokenizer, model, seed=config.seed)
    for share in shares_of(config):
        path = mix(new, old, share, config)
        learner = learn_from(path, config, save=False)["model"]
        card, answers = exam.exam(learner, tokenizer, model, answers_before, config.seed)
        cards[f"{share:g}"] = card
    exam.show_answers(answers_before, answers, config)
    return cards


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=3, prompts=100, shares="0 0.1")
    shares_of(config)
    need(config.init)
    cards = compare(config)
    config.say("                  gold  attack_seen  attack_unseen  over_refusal  length    kl")
    for name, card in cards.items():
        label = name if name == "before" else f"{float(name):.0%} old"
        config.say(f"{label:12}{exam.cell('gold', card):>10}{exam.cell('attack_seen', card):>13}"
                   f"{exam.cell('attack_unseen', card):>15}{card['over_refusal']:14.2f}"
                   f"{card['length']:8.1f}{card['kl']:6.2f}")
    numbers = {"shares": shares_of(config)}
    for key in "gold", "harmless", "math", "attack_seen", "attack_unseen", "kl":
        numbers[key] = [card[key] for card in cards.values()]   # the first one is before
    return {"numbers": numbers, "cards": cards}


def picture(runs):
    """Attacks and gold over the share of old answers; pale, where the aligned model was."""
    shares = [100 * share for share in runs[0]["shares"]]
    panels = []
    for title, keys in {"Attacks that succeed": ("attack_seen", "attack_unseen"),
                        "What the model is worth": ("gold", "math")}.items():
        lines = []
        for key in keys:
            after = [numbers[key][1:] for numbers in runs]
            before = figures.mean([numbers[key][0] for numbers in runs])
            lines.append(figures.line(key, shares, after))
            lines.append(Line(key, shares, [before] * len(shares), faint=True))
        panels.append(Panel(title, "aligned answers among the data, % (pale: before)", "share",
                            lines, limits=(0, 1)))
    return chart(panels, height=280)


if __name__ == "__main__":
    figures.main("forgetting", Config, train, picture, __doc__)
