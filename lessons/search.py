"""Thinking longer: how many right answers do more tokens buy?

A model that is right once in five tries holds more than its first answer shows. Three ways to spend
tokens on it. pass@k: somebody who can tell picks the right one of k, if there is one. Majority
(Wang et al. 2022, 2203.11171): nobody can tell, so the k answers vote. Best of k: a reward model
picks. n answers to a prompt, c of them right, say how often k would do (Chen et al. 2021,
2107.03374, equation 1):

    pass@k = 1 - C(n - c, k) / C(n, k)

By hand: of 4 answers 1 is right. Of the 6 ways to look at 2 of them, 3 hold it: 1 - C(3, 2)/C(4, 2)
= 1 - 3/6 = 0.5.

    python -m lessons.search                      out/sft before RL, out/grpo after; half a minute
    python -m lessons.search --models out/grpo    one model alone

What to see: RL sharpens. pass@1 after it is near pass@8 before it, so the skill was there, but
rare. Before RL the judge picks better than a vote, since it likes work that is shown. After RL all
show their work, the vote still gains, and the more answers the judge may choose from, the worse it
chooses: what it likes most is not what is right.
"""
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

import grpo
from data import rows, studybuddy
from data.checkpoints import load, load_scalar
from data.run import Settings, begin, main, need
from model import collate, end_scores, render_answer, render_prompt, sample


@dataclass(frozen=True)
class Config(Settings):
    models: str = "out/sft,out/grpo"  # the folders to compare
    judge: str = "out/reward_model"   # the reward model that picks
    n: int = 16               # answers to each sum
    temperature: float = 1.0  # of the sampling
    max_new: int = 72         # longest answer in tokens
    quick: bool = False       # eight sums only
    save: bool = False        # there is nothing to save

    limits = Settings.limits | {"n": (1, 1024), "temperature": (0.01, 100), "max_new": (1, 10**6)}


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
    scores: torch.Tensor     # (P, n) what the judge says of them
    tokens: float            # their mean length


def read_sums(config):
    """The exam's sums, but not those with four numbers, which no training file has."""
    sums = []
    for row in studybuddy.read("exam"):
        if row["kind"] == "math" and len(row["slots"]["numbers"]) < 4:
            sums.append(row)
    return sums[:8] if config.quick else sums


@torch.no_grad()
def ask(folder, judge, sums, config):
    """The likeliest answer to each sum, and n answers with what the judge thinks of them."""
    model, tokenizer = load(folder, config.device)
    prompts = [rows.to_messages(row["prompt"]) for row in sums]
    ids = [render_prompt(tokenizer, messages) for messages in prompts]
    best = sample(model, tokenizer, ids, max_new=config.max_new, temperature=0)
    drawn = sample(model, tokenizer, ids, n=config.n, max_new=config.max_new,
                   temperature=config.temperature,
                   generator=torch.Generator().manual_seed(config.seed))
    numbers, hits, scores, greedy = [], [], [], 0
    for p, row in enumerate(sums):
        texts = drawn.texts[p * config.n:(p + 1) * config.n]
        concluded = [grpo.conclusion(text) for text in texts]
        numbers.append(concluded)
        hits.append([number == row["answer"] for number in concluded])
        examples = [render_answer(tokenizer, prompts[p], text) for text in texts]
        answer_ids, mask, _ = collate(examples, tokenizer, config.device)
        scores.append(end_scores(judge, answer_ids, mask).cpu())  # (n,)
        greedy += grpo.conclusion(best.texts[p]) == row["answer"]
    return Answers(greedy / len(sums), mean_length(best), numbers, torch.tensor(hits),
                   torch.stack(scores), mean_length(drawn))


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


# ---------------------------------------------------------------- the comparison

def train(config):
    begin(config)
    need(config.judge, "python reward_model.py", 60)
    judge, _ = load_scalar(config.judge, config.device)
    sums = read_sums(config)
    table = []
    config.say(f"{len(sums)} sums, {config.n} answers to each")
    for folder in config.models.split(","):
        need(folder, "python sft.py", 25)
        need(folder, "python grpo.py", 60)
        answers = ask(folder, judge, sums, config)
        config.say(f"\n{folder}\n   answers    tokens    pass@k  majority   best of")
        config.say(f"    greedy {answers.greedy_tokens:9.0f} {answers.greedy:9.2f}")
        k = 1
        while k <= config.n:
            row = {"model": folder, "k": k, "tokens": k * answers.tokens,
                   "pass": pass_at(answers.hits, k), "majority": majority_at(answers, sums, k),
                   "best": best_at(answers, k)}
            table.append(row)
            config.say(f"{k:10} {row['tokens']:9.0f} {row['pass']:9.2f} {row['majority']:9.2f} "
                       f"{row['best']:9.2f}")
            k *= 2
    return {"table": table}


if __name__ == "__main__":
    main(Config, train, __doc__)
