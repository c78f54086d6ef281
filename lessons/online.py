"""Online DPO: answer, judge, learn, and answer again.

A file of pairs was made by somebody else, some time ago. As a policy moves away from it, the
pairs talk about answers that it no longer gives. Online, the policy answers each prompt twice, a
reward model says which answer is better, and DPO's loss learns from that pair: fresh ones at every
step, or in a few rounds, between which they grow stale. Offline, online, and what lies between:

    pairs from             learned from for     who says what is better
    the file               all steps            annotators, long ago
    own answers, 3 rounds  a third of them      out/reward_model
    own answers, online    one step             out/reward_model

The loss is dpo.py's, and so is the loop. What differs is where a batch comes from.

    python -m lessons.online                 all three: gold, and what it cost in KL; four minutes
    python -m lessons.online --rounds 3      only so many rounds (110: one a step)

What to see: gold, and flattery beside it. The reward model has learned from annotators who like
compliments, and the policy now asks that judge instead of a file.
Simplified: the reference stays where it began (iterative DPO and SPPO move it).
Try next: --judge with a judge that likes flattery, and read the answers.
"""
import copy
import math
from dataclasses import dataclass, replace

import torch

import dpo
from data import exam, rows
from data.chart import Panel, chart
from data.checkpoints import load, load_scalar, save
from data.run import (RANK, Log, adamw, add_lora, batches, begin, clip_gradients, merge_lora, need,
                      parts, steps)
from lessons import figures
from lessons.best_of import reward
from model import Example, UserError, render_prompt, sample


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/preferences.jsonl"  # JSON lines: offline learns pairs, online asks prompts
    out: str = "out/online"   # write here
    steps: int = 110          # optimiser steps
    batch: int = 32           # prompts a step, two answers to each
    lr: float = 5e-4          # peak learning rate
    beta: float = 0.5         # the larger, the closer it stays to the reference
    judge: str = "out/reward_model"  # folder of the reward model that says what is better
    rounds: int = 0           # answer anew in so many rounds (0: run and compare all)
    max_new: int = 72         # longest answer in tokens

    limits = figures.Lesson.limits | {"max_new": (1, 10**6)}


# ---------------------------------------------------------------- own answers as data

def load_judge(config):
    """SEAM: score(prompts, texts) -> a number for each answer. Yours: train(config, score)."""
    need(config.judge)
    judge, tokenizer = load_scalar(config.judge, config.device)

    def score(prompts, texts):
        return reward(judge, tokenizer, prompts, texts)
    return score


def own_pairs(policy, tokenizer, score, prompts, config, generator):
    """Two answers to each prompt, the better one first. Equal ones teach nothing."""
    ids = [render_prompt(tokenizer, prompt.messages) for prompt in prompts]
    drawn = sample(policy, tokenizer, ids, 2, config.max_new, generator=generator)
    asked = [prompts[i // 2] for i in range(len(drawn.texts))]              # (2B,)
    scores = torch.as_tensor(score(asked, drawn.texts), dtype=torch.float32)
    scores = scores.masked_fill(~drawn.ended.cpu(), -torch.inf)     # an endless answer loses
    pairs = []
    for a in range(0, len(asked), 2):
        b = a + 1
        if scores[a] == scores[b] or drawn.texts[a] == drawn.texts[b]:
            continue
        won, lost = (a, b) if scores[a] > scores[b] else (b, a)
        pairs.append(dpo.Pair(example_of(drawn, won), example_of(drawn, lost), asked[a].row))
    return pairs


def example_of(drawn, i):
    """Row i of what was sampled, without its padding."""
    mask = drawn.mask[i]                                                    # (T,)
    return Example(drawn.ids[i][mask].tolist(), drawn.answer[i][mask].int().tolist())


def starts_round(step, config):
    """Does a round begin here? They are as equally long as whole steps allow."""
    return step * config.rounds % config.steps < config.rounds


# ---------------------------------------------------------------- training

def learn(config, score):
    """DPO's loop on own answers. -> policy, log"""
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)
    prompts = rows.read_prompts(config.data)
    generator = torch.Generator().manual_seed(config.seed + RANK)
    size = config.batch * math.ceil(config.steps / config.rounds)           # prompts a round
    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch: where a round begins, answer the prompts of all its steps
        if starts_round(step, config):
            chosen = torch.randint(len(prompts), (size,), generator=generator)
            asked = [prompts[i] for i in chosen]
            pairs = own_pairs(policy, tokenizer, score, asked, config, generator)
            if not pairs:
                raise UserError(f"--judge {config.judge} finds no answer better than another")
            lengths = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
            stream = batches(pairs, lengths, config.batch, generator)
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 score: how much likelier has each answer become than it was under the reference?
            chosen, rejected = dpo.log_ratios(policy, reference, part, tokenizer)
            # 3 loss: has the winner gained more than the loser?
            losses = dpo.dpo(chosen, rejected, config.beta)                 # (B,)
            (losses.sum() / len(batch)).backward()
            seen.append(torch.stack([losses, chosen, rejected]).detach())   # (3, B)
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log, in nats. The first loss is ln 2 = 0.6931
        losses, chosen, rejected = torch.cat(seen, dim=1)                   # of the whole batch
        log(step, loss=losses.mean(), accuracy=dpo.share_ahead(chosen, rejected),
            lead=(chosen - rejected).mean(), chosen=chosen.mean(), rejected=rejected.mean())
    merge_lora(policy)
    return policy, log


def offline(config):
    """dpo.py on the pairs of the file, with the settings of this run. -> report card"""
    settings = {}
    for name in ("init", "data", "steps", "batch", "accumulate", "lr", "lora", "beta", "seed",
                 "device", "bf16"):
        settings[name] = getattr(config, name)
    result = dpo.train(dpo.Config(**settings, save=False, quiet=True))
    return result["after"]


def train(config, score=None):
    begin(config)
    if config.quick:
        config = replace(config, steps=3)
    if config.rounds > config.steps:
        raise UserError(f"--rounds {config.rounds}: want at most the {config.steps} steps")
    need(config.init)
    if score is None:
        score = load_judge(config)
    start, tokenizer = load(config.init, config.device)

    # BEFORE
    before, old_answers = exam.exam(start, tokenizer, start, seed=config.seed)
    cards = {"before": before}
    runs = {"3 rounds": min(3, config.steps), "online": config.steps}
    if config.rounds > 0:
        runs = {f"{config.rounds} rounds": config.rounds}
    else:
        config.say(f"offline: dpo.py on the pairs of {config.data}, in silence")
        cards["offline"] = offline(config)
    for name, rounds in runs.items():
        config.say(f"{name}: own answers, judged by {config.judge}")
        policy, log = learn(replace(config, rounds=rounds), score)
        cards[name], answers = exam.exam(policy, tokenizer, start, old_answers, config.seed)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER
    exam.show_answers(old_answers, answers, config)
    config.say("                  gold        kl  flattery    length")
    for name, card in cards.items():
        numbers = "{gold:10.2f}{kl:10.2f}{flattery:10.2f}{length:10.2f}".format(**card)
        config.say(f"{name:12}{numbers}".replace("-0.00", " 0.00"))
    numbers = {}
    for name, card in cards.items():
        numbers[name] = {key: card[key] for key in ("gold", "kl", "flattery", "length")}
    return {"cards": cards, "before": before, "after": card, "model": policy,
            "tokenizer": tokenizer, "log": log.rows, "numbers": numbers}


# ---------------------------------------------------------------- the figure

def picture(runs):
    """The same number of pairs, ever fresher: the truth, and the flattery that comes with it."""
    panels = []
    for key, title in {"gold": "Fresher pairs: the truth", "flattery": "and the flattery"}.items():
        dots = []
        for name in runs[0]:
            kl = figures.mean([numbers[name]["kl"] for numbers in runs])
            values = [[numbers[name][key]] for numbers in runs]
            dots.append(figures.line(name, [max(kl, 0.0)], values))
        panels.append(Panel(title, "KL, nats an answer (root scale)", key, dots, scale="root"))
    return chart(panels, height=300)


if __name__ == "__main__":
    figures.main("online", Config, train, picture, __doc__)
