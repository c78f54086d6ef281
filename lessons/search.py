"""Thinking longer: how many right answers do more tokens buy?

A model that is right once in five tries holds more than its first answer shows. Ways to spend
tokens on it: pass@k, where somebody who can tell picks the right one of k, if there is one.
Majority (Wang et al. 2022, 2203.11171): nobody can tell, so the k answers vote. Best of k: a reward
model reads each answer at its end (outcome), or a process reward model reads each step, and an
answer is as good as its weakest one (step; Lightman et al. 2023, 2305.20050). Beam: nothing is
finished before it is judged. Of b half-done answers each is continued by b steps, and the best b of
these b^2 go on. n answers to a prompt, c of them right, say how often k would do (Chen et al. 2021,
2107.03374, equation 1):

    pass@k = 1 - C(n - c, k) / C(n, k)

By hand: of 4 answers 1 is right. Of the 6 ways to look at 2 of them, 3 hold it: 1 - C(3, 2)/C(4, 2)
= 1 - 3/6 = 0.5.

Tokens are those of the answers: the prompts and what the judges read are not counted.

    python -m lessons.search                      out/sft before RL, out/grpo after; a minute
    python -m lessons.search --models out/grpo    one model alone

What to look at: is pass@1 after RL near pass@8 before it? Then the skill was there, but rare, and
RL has sharpened it. Which judge is still ahead of the vote at k = 16? The more answers a judge may
choose from, the likelier one of them is its blind spot.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
from data import rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import load, load_scalar
from data.run import begin, need
from lessons import figures, process_reward
from model import collate, end_scores, render_answer, render_prompt, sample


@dataclass(frozen=True)
class Config(figures.Lesson):
    models: str = "out/sft,out/grpo"  # the folders to compare
    judge: str = "out/reward_model"   # picks by what it reads at the end
    process: str = "out/process_reward"  # picks by every step
    n: int = 16               # answers to each sum
    temperature: float = 1.0  # of the sampling
    max_new: int = 72         # longest answer in tokens
    save: bool = False        # there is nothing to save

    limits = figures.Lesson.limits | {"n": (1, 1024), "temperature": (0.01, 100),
                                      "max_new": (1, 10**6)}
    unused = ("init", "data", "out", "steps", "batch", "accumulate", "lr", "lora", "save")


QUICK_JUDGE = "out/quick/process_reward"


# ---------------------------------------------------------------- the maths

# pass@k = 1 - C(n - c, k) / C(n, k)
# Chen et al. 2021 (2107.03374), eq. 1
def pass_at(hits, k):
    """hits (P, n), which answers are right -> the chance that one of k is, a mean over prompts."""
    n = hits.shape[1]
    chances = []
    for c in hits.long().sum(1).tolist():
        chances.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return sum(chances) / len(chances)


def majority(numbers):
    """What most answers conclude. Who concludes nothing has no vote, and the first wins a tie."""
    votes = Counter(number for number in numbers if number is not None)
    if not votes:
        return None
    return votes.most_common(1)[0][0]


# ---------------------------------------------------------------- one model

class Answers(NamedTuple):
    greedy: float            # how many sums the likeliest answers get right
    greedy_tokens: float     # their mean length
    numbers: list            # for each sum, what its n answers conclude
    hits: torch.Tensor       # (P, n) is that right?
    scores: torch.Tensor     # (P, n) what the reward model says of them
    tokens: float            # their mean length
    weakest: torch.Tensor = None  # (P, n) what the process reward model says of their weakest step


def read_sums(config):
    """The exam's sums, but not those with four numbers, which no training file has."""
    sums = []
    for row in studybuddy.read("exam"):
        if row["kind"] == "math" and len(row["slots"]["numbers"]) < 4:
            sums.append(row)
    return sums[:8] if config.quick else sums


@torch.no_grad()
def ask(model, tokenizer, judges, sums, config):
    """The likeliest answer to each sum, and n answers with what the judges think of them."""
    prompts = [rows.to_messages(row["prompt"]) for row in sums]
    ids = [render_prompt(tokenizer, messages) for messages in prompts]
    best = sample(model, tokenizer, ids, max_new=config.max_new, temperature=0)
    drawn = sample(model, tokenizer, ids, n=config.n, max_new=config.max_new,
                   temperature=config.temperature,
                   generator=torch.Generator().manual_seed(config.seed))
    numbers, hits, scores, weakest = [], [], [], []
    greedy = 0
    for p, row in enumerate(sums):
        texts = drawn.texts[p * config.n:(p + 1) * config.n]
        concluded = [grpo.conclusion(text) for text in texts]
        numbers.append(concluded)
        hits.append([number == row["answer"] for number in concluded])
        examples = [render_answer(tokenizer, prompts[p], text) for text in texts]
        answer_ids, mask, _ = collate(examples, tokenizer, config.device)
        scores.append(end_scores(judges["outcome"], answer_ids, mask).cpu())  # (n,)
        weakest.append(weakest_steps(judges["step"], tokenizer, [prompts[p]] * config.n, texts))
        greedy += grpo.conclusion(best.texts[p]) == row["answer"]
    return Answers(greedy / len(sums), mean_length(best), numbers, torch.tensor(hits),
                   torch.stack(scores), mean_length(drawn), torch.stack(weakest))


def steps_of(text):
    return re.split(r"(?<=[.!?]) ", text)


def weakest_steps(judge, tokenizer, prompts, texts):
    """An answer is as good as its weakest step. -> (B,)"""
    examples = []
    for prompt, text in zip(prompts, texts):
        examples.append(process_reward.encode(tokenizer, prompt, steps_of(text), "process"))
    lists = process_reward.score_lists(judge, examples, tokenizer)
    return torch.stack([process_reward.strength(r) for r in lists])


def mean_length(samples):
    return samples.answer.sum(1).float().mean().item()


def majority_at(answers, sums, k):
    """The n answers are n / k polls of k voters: how many elect what is right?"""
    right = 0
    polls = 0
    for row, numbers in zip(sums, answers.numbers):
        for first in range(0, len(numbers) - k + 1, k):
            right += majority(numbers[first:first + k]) == row["answer"]
            polls += 1
    return right / polls


def best_at(answers, k):
    """Of k answers the judge takes the one that it likes most: how many are right?"""
    P, n = answers.hits.shape
    whole = n // k * k
    scores = answers.scores[:, :whole].view(P, -1, k)           # (P, n / k, k)
    hits = answers.hits[:, :whole].view(P, -1, k)
    picked = hits.gather(2, scores.argmax(2, keepdim=True))     # (P, n / k, 1)
    return picked.float().mean().item()


# ---------------------------------------------------------------- beam over steps

class Partial(NamedTuple):
    sum: int            # which of the sums
    text: str           # the steps so far
    score: float        # of the weakest of them
    done: bool = False


@torch.no_grad()
def beam(model, tokenizer, judge, sums, width, config, most_steps=6):
    """-> the share of sums that the best one's conclusion gets right, and tokens a sum"""
    generator = torch.Generator().manual_seed(config.seed)
    prompts = [rows.to_messages(row["prompt"]) for row in sums]
    partials = [Partial(p, "", math.inf) for p in range(len(sums))]
    spent = 0
    for _ in range(most_steps):
        going = [partial for partial in partials if not partial.done]
        if not going:
            break
        longer, tokens = add_step(model, tokenizer, prompts, going, width, generator, config)
        owners = [prompts[partial.sum] for partial in longer]
        texts = [partial.text for partial in longer]
        scores = weakest_steps(judge, tokenizer, owners, texts).tolist()
        candidates = [partial for partial in partials if partial.done]
        for partial, score in zip(longer, scores):
            candidates.append(partial._replace(score=score))
        partials = best_partials(candidates, width)
        spent += tokens
    right = 0
    for partial in best_partials(partials, 1):
        right += grpo.conclusion(partial.text) == sums[partial.sum]["answer"]
    return right / len(sums), spent / len(sums)


def add_step(model, tokenizer, prompts, going, width, generator, config):
    """Each half-done answer goes on in `width` ways, by a step -> Partials, how many tokens"""
    ids = []
    for partial in going:
        prompt = render_prompt(tokenizer, prompts[partial.sum])
        ids.append(prompt + tokenizer.encode_ordinary(partial.text))
    drawn = sample(model, tokenizer, ids, n=width, max_new=config.max_new,
                   temperature=config.temperature, generator=generator)
    longer = []
    tokens = 0
    for i, text in enumerate(drawn.texts):
        before = going[i // width]
        step = steps_of(text)[0]    # what was sampled behind it is thrown away, and not counted
        so_far = f"{before.text} {step}".strip()
        longer.append(Partial(before.sum, so_far, 0.0, done=step == text))
        tokens += len(tokenizer.encode_ordinary(step))
    return longer, tokens


def best_partials(partials, width):
    """Of each sum the best ones, each text once."""
    counts = Counter()
    kept = {}
    for partial in sorted(partials, key=score_of, reverse=True):
        key = (partial.sum, partial.text)
        if key not in kept and counts[partial.sum] < width:
            kept[key] = partial
            counts[partial.sum] += 1
    return list(kept.values())


def score_of(partial):
    return partial.score


WAYS = {"pass": "somebody who knows", "majority": "majority", "best": "best by outcome",
        "by_step": "best by step", "beam": "beam over steps"}


def picture(runs):
    panels = []
    for name, table in runs[0].items():
        curves = []
        for key, label in WAYS.items():
            at = [i for i, row in enumerate(table) if key in row]
            spent = "beam_tokens" if key == "beam" else "tokens"
            tokens = [round(table[i][spent]) for i in at]
            values = []
            for run in runs:
                values.append([run[name][i][key] for i in at])
            curves.append(figures.line(label, tokens, values))
        panels.append(Panel(name, "tokens a sum (log scale)", "share right", curves, scale="log"))
    return chart(panels, columns=1, height=300)


def compare(folder, judges, sums, config):
    """-> a row for each k"""
    model, tokenizer = load(folder, config.device)
    answers = ask(model, tokenizer, judges, sums, config)
    by_steps = answers._replace(scores=answers.weakest)
    config.say(f"\n{folder}\n answers  tokens  pass@k  majority  best of  by step    beam  tokens")
    config.say(f"  greedy{answers.greedy_tokens:8.0f}{answers.greedy:8.2f}")
    table = []
    k = 1
    while k <= config.n:
        row = {"model": folder, "k": k, "tokens": k * answers.tokens,
               "pass": pass_at(answers.hits, k), "majority": majority_at(answers, sums, k),
               "best": best_at(answers, k), "by_step": best_at(by_steps, k)}
        line = (f"{k:8}{row['tokens']:8.0f}{row['pass']:8.2f}{row['majority']:10.2f}"
                f"{row['best']:9.2f}{row['by_step']:9.2f}")
        width = math.isqrt(k)
        if width ** 2 == k:         # a beam as wide as each of its steps is branched
            found = beam(model, tokenizer, judges["step"], sums, width, config)
            row["beam"], row["beam_tokens"] = found
            line += f"{row['beam']:8.2f}{row['beam_tokens']:8.0f}"
        config.say(line)
        table.append(row)
        k *= 2
    return table


def train(config):
    begin(config)
    need(config.judge)
    process = config.process
    if process == Config.process and not Path(process, "config.json").exists():
        settings = process_reward.Config(device=config.device, bf16=config.bf16)
        if config.quick:            # in a folder where no full run will find it
            settings = replace(settings, quick=True, quiet=config.quiet, out=QUICK_JUDGE)
            process = QUICK_JUDGE
        process_reward.train(settings)
    judges = {"outcome": load_scalar(config.judge, config.device)[0],
              "step": load_scalar(process, config.device)[0]}
    sums = read_sums(config)
    config.say(f"{len(sums)} sums, {config.n} answers to each; a beam of b tries b x b steps")
    numbers = {}
    table = []
    names = figures.names_of(config.models.split(","))
    for folder, name in names.items():
        need(folder)
        numbers[name] = compare(folder, judges, sums, config)
        table += numbers[name]
    return {"table": table, "numbers": numbers}


if __name__ == "__main__":
    figures.main("search", Config, train, picture, __doc__)
