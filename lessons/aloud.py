"""The same sum, blurted and worked out: is it the tokens that buy the truth?

A model has the same few layers for its next token whether a question is easy or hard. Only what it
has written goes through all of them again. So one model gets one sum three times, and only the
first words of its answer are written for it:

    at once     What is 4 + 15 + 9?   So it is ..            the result is next
    aloud       What is 4 + 15 + 9?   First ..               step by step (Wei et al. 2022,
    free        What is 4 + 15 + 9?   ..                     2201.11903), or as it likes

With k numbers there are k - 1 steps. If a step is right with probability p, whatever was before,

    P(right aloud) = p^(k-1)

By hand: a sum of four numbers from 2 to 20 is one of 19^4 = 130,321. A step is one of 59 x 19 =
1,121, as a total is 2 to 60. At p = 0.98 three steps are right in 0.98^3 = 0.94 of the cases.

Does the result depend on the chain, or is the chain decoration? A control writes a wrong step:

    wrong       What is 4 + 15 + 9?   First 4 + 15 = 16. ..  25 follows from it

Whoever has the sum in mind, and writes steps for show, still ends in 28.

    python -m lessons.aloud                      data/base, out/sft and out/grpo, some seconds
    python -m lessons.aloud --models out/dpo     one model alone

What to look at: two numbers. There is nothing to take apart there, so a gap has other causes. The
numbers stand right before the result once they are written again. And this web blurts badly: of 18
blurted results 5.5 are right, of 100 steps 95. The others spread over eight wrong results, so the
likeliest one is right all the same, but it is hard to learn from. How much each cause weighs, and
whether a model with better reading could add four numbers at once, is not answered here.

Simplified: sums only, as products have steps of another kind.
Try next: --max-new 8, where no chain has room; a wrong last step in wrong_step.
"""
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import grpo
from data import exam
from data.chart import Panel, chart
from data.checkpoints import load
from data.rows import to_messages
from data.run import begin, need
from data.studybuddy import ask, slip, solution
from lessons import figures
from lessons.guard import rate
from model import render_prompt, sample


@dataclass(frozen=True)
class Config(figures.Lesson):
    models: str = "data/base,out/sft,out/grpo"  # the folders to compare
    sums: int = 100           # of each length
    max_new: int = 72         # longest answer in tokens
    save: bool = False        # there is nothing to save

    limits = figures.Lesson.limits | {"sums": (1, 10_000), "max_new": (1, 10**6)}
    unused = ("init", "data", "out", "steps", "batch", "accumulate", "lr", "lora", "save")


LENGTHS = [2, 3, 4]           # numbers in a sum
BEGINNINGS = {"at_once": "So it is", "aloud": "First", "free": ""}


# ---------------------------------------------------------------- sums

def make_sums(rng, terms, count):
    """Sums of the exam with so many numbers, without products."""
    sums = []
    while len(sums) < count:
        row = ask(rng, "math", "exam", terms=terms)
        if row["slots"]["op"] == "+":
            sums.append(row)
    return sums


def wrong_step(rng, row):
    """ "First 4 + 15 = 16.", and what follows from it if all other steps are right: "25" """
    step = solution(row)[0]
    wrong = slip(rng, step.result)
    result = int(row["answer"]) + wrong - step.result
    return f"First {step.left} {step.op} {step.right} = {wrong}.", str(result)


# ---------------------------------------------------------------- answers

class Answer(NamedTuple):
    text: str           # all of it, the words that were written for the model included
    ended: bool
    tokens: int


def answer(model, tokenizer, conversations, beginnings, config):
    """The likeliest answer to each conversation that begins like this. -> list of Answer"""
    starts = [tokenizer.encode_ordinary(words) for words in beginnings]
    prompts = []
    for messages, start in zip(conversations, starts):
        prompts.append(render_prompt(tokenizer, messages) + start)
    drawn = sample(model, tokenizer, prompts, max_new=config.max_new, temperature=0)
    new = drawn.answer.sum(1).tolist()
    answers = []
    for i, words in enumerate(beginnings):
        text = f"{words} {drawn.texts[i]}".strip()
        answers.append(Answer(text, drawn.ended[i].item(), len(starts[i]) + new[i]))
    return answers


def is_right(truth, reply):
    """It commits itself to this number, and to no other. Steps may be shown, and aren't read."""
    return grpo.strict(truth, reply.text, reply.ended) == 1.0


def compare(model, tokenizer, sums, rng, config):
    """-> {what: flags}, and the mean tokens of each way"""
    truths = [row["answer"] for row in sums]
    conversations = [to_messages(row["prompt"]) for row in sums]
    flags = {}
    tokens = {}
    for way, words in BEGINNINGS.items():
        answers = answer(model, tokenizer, conversations, [words] * len(sums), config)
        flags[way] = list(map(is_right, truths, answers))
        tokens[way] = exam.mean([one.tokens for one in answers])
        config.say(f"    {way:8}{answers[0].text}")
    flags["steps"] = [" = " in one.text for one in answers]     # of the free ones
    texts, results = zip(*[wrong_step(rng, row) for row in sums])
    answers = answer(model, tokenizer, conversations, texts, config)
    flags["follows"] = list(map(is_right, results, answers))
    flags["resists"] = list(map(is_right, truths, answers))
    config.say(f"    wrong   {answers[0].text}")
    return flags, tokens


# ---------------------------------------------------------------- the numbers

NAMES = {"at_once": "at once", "aloud": "aloud", "free": "free", "steps": "shows steps",
         "follows": "wrong: follows", "resists": "wrong: right"}


def picture(runs):
    panels = []
    for name in runs[0]["shares"]:
        curves = []
        for way in [*BEGINNINGS, "follows"]:
            values = []
            for run in runs:
                values.append([run["shares"][name][str(terms)][way] for terms in LENGTHS])
            curves.append(figures.line(NAMES[way], LENGTHS, values))
        panels.append(Panel(name, "numbers in the sum", "share right", curves, limits=(0, 1)))
    return chart(panels)


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, sums=4)
    shares = {}
    tokens = {}
    names = figures.names_of(config.models.split(","))
    for folder, name in names.items():
        need(folder)
        model, tokenizer = load(folder, config.device)
        rng = Random(config.seed)                   # every model gets the same sums
        shares[name] = {}
        tokens[name] = {}
        lines = []
        for terms in LENGTHS:
            sums = make_sums(rng, terms, config.sums)
            config.say(f"{folder}: {sums[0]['prompt']}")
            flags, spent = compare(model, tokenizer, sums, rng, config)
            shares[name][str(terms)] = {key: exam.mean(flags[key]) for key in NAMES}
            tokens[name][str(terms)] = spent
            cost = f"{spent['at_once']:.0f} / {spent['aloud']:.0f}"
            line = f"{terms:7}{cost:>10}"
            for key in NAMES:
                line += f"{str(rate(flags[key])):>16}"
            lines.append(line)
        titles = "".join(f"{title:>16}" for title in NAMES.values())
        config.say(f"\nnumbers    tokens{titles}")
        config.say("\n".join(lines) + "\n")
    return {"numbers": {"shares": shares, "tokens": tokens}}


if __name__ == "__main__":
    figures.main("aloud", Config, train, picture, __doc__)
