"""A reward at every step, or one at the end?

A solution is a chain: one slip, and all that is built on it is wrong. An outcome judge reads the
solution at its end and says whether it is right (Cobbe et al. 2021, 2110.14168). A process judge is
asked at the last token of every step (Lightman et al. 2023, 2305.20050). Both learn from the same
solutions by the same loss, the mean over all places « where they are read:

    L = - mean [ z log sigma(r) + (1 - z) log sigma(-r) ]             z = 1: right so far

    First 5 x 10 = 50.«  Then 5 x 4 = 17.«  Then 50 + 17 = 67.«  The answer is 67.«     process
               z = 1             z = 0                z = 0               z = 0
    First 5 x 10 = 50.   Then 5 x 4 = 17.   Then 50 + 17 = 67.   The answer is 67.«     outcome

Labels for steps cost more than labels for results. Are they worth it? The table says whether the
first wrong step is found (says_the_first: by who always names step 1), and which of 8 sampled
solutions each judge picks (random: any one of them). A third judge learns nothing here: it is
data/base, a language model, asked for each step in words whether it is right. It works the step out
once more before it says so.

    python -m lessons.process_reward         data/steps.jsonl -> out/process_reward, a minute

A line of --data is a solution, right so far or not at each of its steps:

    {"prompt": "2 + 3 + 4?", "steps": ["First 2 + 3 = 5.", "Then 5 + 4 = 8."], "labels": [1, 0]}

Whatever --data holds, the 8 solutions are to sums of this course's own world: so are random, any,
and all numbers whose names begin with by_.

Simplified: labels of steps are the world's own, not people's. Whoever samples until a judge is
pleased must not ask it too often: the best of 1,000 finds its blind spots (lessons.goodhart).
Try next: r.mean() for r.min() in strength(); --data with solutions of your own.
"""
import re
from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch

from data import exam, rows
from data.chart import Panel, chart
from data.checkpoints import load, save
from data.studybuddy import RESULT, ask, flat
from data.run import (Log, adamw, add_lora, batches, begin, clip_gradients, merge_lora, need, parts,
                      steps)
from lessons import figures
from model import (Example, ScalarModel, UserError, collate, render_answer, render_prompt, respond,
                   sample)
from reward_model import calibration_error, hold_out_prompts, outcome_loss

K = 8                         # solutions that are sampled to a sum


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/steps.jsonl"   # JSON lines with "prompt", "steps" and "labels"
    out: str = "out/process_reward"  # write here
    critic: str = "data/base"        # who marks steps in words
    steps: int = 200          # optimiser steps, for each of the two judges
    held: int = 6             # one prompt in so many is held out
    problems: int = 150       # sums of which 8 solutions are sampled
    temperature: float = 1.3  # of these: at 1 nearly all are right, and there is nothing to pick

    limits = figures.Lesson.limits | {"held": (2, 10**9), "problems": (1, 10**6),
                                      "temperature": (0.01, 100)}


class Solution(NamedTuple):
    prompt: list             # messages
    steps: list              # its sentences
    example: Example         # its tokens; .answer has a 1 at each token where the judge is read
    labels: list             # is it right there? 1 or 0


def encode(tokenizer, prompt, sentences, judge):
    """-> Example, marked at the last token of every step, or at the <|im_end|> alone. (Elsewhere an
    Example's marks are 1 at every token of the answer. Here they say where the judge is read.)"""
    ids, answer = render_answer(tokenizer, prompt, " ".join(sentences))
    start = answer.index(1)          # the first token of the solution
    read = [0] * len(ids)
    if judge == "outcome":
        read[-1] = 1
        return Example(ids, read)
    for i in range(len(sentences)):
        so_far = tokenizer.encode_ordinary(" ".join(sentences[:i + 1]))
        read[start + len(so_far) - 1] = 1       # the last of the tokens so far
    return Example(ids, read)


def read_solutions(config, tokenizer, context, judge):
    """-> solutions to learn from, held out"""
    solutions = []
    for line in rows.read_solutions(config.data):
        example = encode(tokenizer, line.prompt, line.steps, judge)
        if len(example.ids) > context:
            raise UserError(f"{line.where}: longer than the model's {context} tokens")
        labels = line.labels
        if judge == "outcome":
            labels = labels[-1:]
        solutions.append(Solution(line.prompt, line.steps, example, labels))
    return hold_out_prompts(solutions, config.held)


def scores(model, examples, tokenizer):
    """What the judge says at the N marked tokens of all examples, in their order. -> r (N,)"""
    ids, mask, read = collate(examples, tokenizer, model.mean.device)  # (B, T) each
    return model(ids, mask)[read]                                # (B, T) -> (N,)


def labels_of(solutions):
    """-> z (N,), in the order of scores()"""
    labels = []
    for solution in solutions:
        labels += solution.labels
    return torch.tensor(labels, dtype=torch.float)


# ---------------------------------------------------------------- what a judge is worth

@torch.no_grad()
def score_lists(model, examples, tokenizer):
    """-> for each example its own r (S,), one number for each marked token"""
    lists = []
    for i in range(0, len(examples), 64):
        part = examples[i:i + 64]
        r = scores(model, part, tokenizer).cpu()
        lists += r.split([sum(example.answer) for example in part])
    return lists


def first_wrong(values):
    """Which is the first wrong step, by labels or by probabilities? None: all are right."""
    for i, value in enumerate(values):
        if value < 0.5:
            return i
    return None


def evaluate(model, held, tokenizer):
    """-> report card. first_wrong: the share of wrong solutions in which it finds the first wrong
    step, none too early and none too late. all_right: of right solutions, those it leaves alone."""
    lists = score_lists(model, [solution.example for solution in held], tokenizer)
    card = slips_found(held, [r.sigmoid().tolist() for r in lists])
    p = torch.cat(lists).sigmoid()                               # (N,)
    z = labels_of(held)                                          # (N,)
    right = (p > 0.5) == (z > 0.5)
    error, _ = calibration_error(p, z)
    return {"accuracy": right.float().mean().item(), "calibration": error} | card


def slips_found(held, lists):
    """lists: for each solution a number for each place. -> the two shares of evaluate()"""
    found = []
    left_alone = []
    for solution, values in zip(held, lists):
        true = first_wrong(solution.labels)
        guess = first_wrong(values)
        if true is None:
            left_alone.append(guess is None)
        else:
            found.append(guess == true)
    return {"first_wrong": exam.mean(found), "all_right": exam.mean(left_alone)}


def says_the_first(held):
    """first_wrong of who can't judge at all, and calls the first step wrong in every solution"""
    return slips_found(held, [[0.0]] * len(held))["first_wrong"]


def marks_in_words(critic, tokenizer, solved):
    """[(prompt, sentences)] -> for each a list of marks, 1 or 0. It is asked about every step but
    the last sentence, which says what came out and counts as right."""
    asked = []
    for prompt, sentences in solved:
        for i in range(1, len(sentences)):
            so_far = " ".join(sentences[:i])
            text = f"{flat(prompt)} {so_far} Is the last step right?"
            asked.append([{"role": "user", "content": text}])
    said = respond(critic, tokenizer, asked, max_new=28, temperature=0.0)
    lists = []
    first = 0                        # where in `said` this solution begins
    for prompt, sentences in solved:
        after = first + len(sentences) - 1
        marks = [float(not text.endswith("Wrong.")) for text in said[first:after]]
        lists.append(marks + [1.0])
        first = after
    return lists


def strength(r):
    """A chain is as strong as its weakest step. r (S,), or marks -> a number for all of it"""
    return r.min()


def majority(results):
    """-> the number of a solution with the commonest result"""
    commonest, _ = Counter(results).most_common(1)[0]
    return results.index(commonest)


def result_of(text):
    """What a solution says at its end. Without a result it is alone with what it says."""
    results = RESULT.findall(text)
    return results[-1] if results else text


class Attempt(NamedTuple):
    prompt: list             # messages
    steps: list              # its sentences
    result: str              # what it says at its end
    right: bool


def attempts_at_sums(policy, tokenizer, config):
    """-> attempts at P sums of this world: K at the first one, K at the second ..."""
    rng = Random(config.seed)
    sums = [ask(rng, "math", "exam") for _ in range(config.problems)]
    starts = []
    for row in sums:
        # The first word is given: after "First" it works in steps. Left alone, it may blurt out a
        # result, and there would be no step to judge.
        start = render_prompt(tokenizer, rows.to_messages(row["prompt"]))
        starts.append(start + tokenizer.encode_ordinary("First"))
    generator = torch.Generator().manual_seed(config.seed)
    texts = sample(policy, tokenizer, starts, n=K, temperature=config.temperature,
                   generator=generator).texts                    # P * K
    attempts = []
    for i, text in enumerate(texts):
        row = sums[i // K]
        solution = "First " + text
        result = result_of(solution)
        sentences = re.split(r"(?<=[.!?]) ", solution)  # at each space behind a . or ! or ?
        attempts.append(Attempt(rows.to_messages(row["prompt"]), sentences, result,
                                result == row["answer"]))
    return attempts


def best_of(attempts, judges, critic, tokenizer):
    """Of the K attempts at a sum everybody picks one. -> how often it is right"""
    picks = {}                       # who: numbers from 0 to K - 1, (P,)
    results = [attempt.result for attempt in attempts]
    commonest = [majority(results[i:i + K]) for i in range(0, len(results), K)]
    picks["majority"] = torch.tensor(commonest)
    for name, model in judges.items():
        examples = [encode(tokenizer, one.prompt, one.steps, name) for one in attempts]
        lists = score_lists(model, examples, tokenizer)
        picks[name] = strongest(lists)
    marks = marks_in_words(critic, tokenizer, [(one.prompt, one.steps) for one in attempts])
    picks["words"] = strongest([torch.tensor(values) for values in marks])

    right = torch.tensor([float(attempt.right) for attempt in attempts]).view(-1, K)  # (P, K)
    card = {"random": right.mean().item(), "any": right.amax(1).mean().item()}
    for name, pick in picks.items():
        card["by_" + name] = right.gather(1, pick[:, None]).mean().item()  # (P, K) -> (P, 1)
    return card


def strongest(lists):
    """lists: for each of P * K solutions r (S,) -> which of the K is the strongest, the first one
    where several are (P,)"""
    strengths = torch.stack([strength(r) for r in lists])        # (P * K,)
    return strengths.view(-1, K).argmax(1)                       # (P, K) -> (P,)


# ---------------------------------------------------------------- training

def train_judge(config, judge):
    """The loop of reward_model.py, for a judge that is read anywhere.
    -> the judge, its log, its report card before and after, the held-out solutions"""
    torch.manual_seed(config.seed)
    transformer, tokenizer = load(config.init, config.device)
    model = ScalarModel(transformer).to(config.device)
    add_lora(model, config.lora)
    optimizer = adamw(model, config.lr)
    solutions, held = read_solutions(config, tokenizer, model.config.max_len, judge)
    lengths = [len(solution.example.ids) for solution in solutions]
    stream = batches(solutions, lengths, config.batch, torch.Generator().manual_seed(config.seed))
    config.say(f"{judge}: {len(solutions):,} solutions to learn from, {len(held)} held out")
    before = evaluate(model, held, tokenizer)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        count = len(labels_of(batch))
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 score
            r = scores(model, [solution.example for solution in part], tokenizer)  # (N,)
            # 3 loss: is it right so far?
            z = labels_of(part).to(r.device)                     # (N,)
            loss = outcome_loss(r, z)                            # (N,)
            (loss.sum() / count).backward()
            right = (r > 0) == (z > 0.5)
            seen.append(torch.stack([loss, right]).detach())     # (2, N)
        # 4 step
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        loss, right = torch.cat(seen, dim=1)                     # (N,) each
        log(step, loss=loss.mean(), accuracy=right.mean())
    merge_lora(model)
    return model, log, before, evaluate(model, held, tokenizer), held


def train(config):
    if config.quick:
        config = replace(config, steps=3, problems=4)
    started = begin(config)
    need(config.init)
    policy, tokenizer = load(config.init, config.device)
    critic, _ = load(config.critic, config.device)
    outcome, _, _, outcome_card, _ = train_judge(config, "outcome")
    process, log, before, after, held = train_judge(config, "process")
    after["outcome_accuracy"] = outcome_card["accuracy"]
    after["says_the_first"] = says_the_first(held)
    solved = [(solution.prompt, solution.steps) for solution in held]
    words = slips_found(held, marks_in_words(critic, tokenizer, solved))
    judges = {"outcome": outcome, "process": process}
    after |= best_of(attempts_at_sums(policy, tokenizer, config), judges, critic, tokenizer)
    after |= {f"{name}_in_words": value for name, value in words.items()}
    if config.save:
        save(config.out, process, tokenizer)
    targets = [exam.Target("first_wrong", 0.8), exam.Target("first_wrong_in_words", 0.8),
               exam.Target("by_process", after["by_majority"])]
    results = exam.finish("process_reward", config, started, log, before, after, targets)
    numbers = {"before": before, "after": after}
    return results | {"model": process, "tokenizer": tokenizer, "numbers": numbers}


NAMES = {"random": "any one of 8", "by_majority": "the commonest result",
         "by_outcome": "the outcome judge's best", "by_process": "the process judge's best",
         "by_words": "the best in words", "any": "a right one is there"}


def picture(runs):
    finds, picks = [], []
    for key, name in {"first_wrong": "finds the first slip", "all_right": "leaves right ones",
                      "accuracy": "steps it is right about"}.items():
        values = {}
        for when in ("before", "after"):
            values[when] = [run[when][key] for run in runs]
        if f"{key}_in_words" in runs[0]["after"]:
            values["in words"] = [run["after"][f"{key}_in_words"] for run in runs]
        finds.append(figures.bar(name, values))
    for key, name in NAMES.items():
        picks.append(figures.bar(name, {"after": [run["after"][key] for run in runs]}))
    return chart([Panel("A judge at every step", "share, before and after training", bars=finds,
                        limits=(0, 1)),
                  Panel("Of 8 solutions, which?", "how often it is right", bars=picks,
                        limits=(0, 1))])


if __name__ == "__main__":
    figures.main("process_reward", Config, train, picture, __doc__)
