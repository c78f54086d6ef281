"""Dynamic sampling: draw until every group has something to teach.

A group whose answers are all right, or all wrong, has advantages of 0. At the end of a GRPO run
that is most of them: of 16 prompts two or three still teach, and a step is mostly noise. DAPO
(Yu et al. 2025, 2503.14476) draws on, until P groups have contrast (equation 11), and fines the
last tokens before the limit, as a slope is easier to learn from than a cliff (equation 13):

    0 < number of right answers < G
    R(o) = 0 up to L - c tokens,  ((L - c) - |o|) / c up to L,  -1 beyond

By hand: with L = 72 and c = 18 an answer of 63 tokens is halfway down the slope: R = -0.5.

    python -m lessons.dynamic       one draw a step, then up to four

What to see: when most answers are right, a step needs three or four draws to find 16 groups that
teach. It is a better step, so fewer are needed, but drawing is what costs: the last lines count
the steps and the answers to the same goal. Try next: --draws 8; --batch 4; --goal 0.95.
"""
import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import grpo
from data.checkpoints import load
from data.run import RANK, Log, Settings, adamw, batches, begin, clip_gradients, main, need, steps
from model import Samples


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt" and "answer"
    steps: int = 30           # batches of groups
    batch: int = 16           # P: groups a step
    group: int = 8            # G: answers to each prompt
    lr: float = 5e-4          # peak learning rate
    draws: int = 4            # at most so many draws of P prompts for a step
    goal: float = 0.9         # count until so many answers are right
    temperature: float = 1.0  # of the sampling, and so of the log-probs
    max_new: int = 72         # longest answer in tokens
    quick: bool = False       # 3 steps, to see that it runs
    save: bool = False        # the models are not kept

    limits = grpo.Config.limits | {"draws": (1, 1000), "goal": (0, 1)}
    unused = ("out", "accumulate", "lora", "save")


# R(o) = 0 up to L - c tokens, ((L - c) - |o|) / c up to L, -1 beyond
# Yu et al. 2025 (2503.14476), eq. 13
def overlong(lengths, limit, buffer):
    """(B,) -> (B,)"""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


class Draw(NamedTuple):
    samples: Samples         # of P prompts
    rewards: torch.Tensor    # (P, G)
    right: float             # share of right answers
    at: torch.Tensor         # (B,) the rows of the groups to learn from


def draw_groups(policy, tokenizer, stream, config, generator, draws):
    """-> Draws of P prompts each, until P groups have contrast, but at most so many. Where one draw
    is all there may be, every group of it is kept, as in grpo.py."""
    drawn = []
    missing = config.batch
    while missing > 0 and len(drawn) < draws:
        prompts = next(stream)
        samples = grpo.sample_groups(policy, tokenizer, prompts, config, generator)
        rewards = grpo.group_rewards(grpo.strict, prompts, samples)  # (P, G)
        lengths = samples.answer.sum(1)                         # (B,), L where it goes on
        fines = overlong(lengths, config.max_new, config.max_new // 4)
        rewards = rewards + fines.view(rewards.shape)
        rows = torch.arange(len(samples.ids)).view(rewards.shape)  # (P, G)
        if draws > 1:
            teaches = grpo.contrast(rewards).cpu()              # (P,)
            rows = rows[teaches][:missing]
        drawn.append(Draw(samples, rewards, grpo.share_right(prompts, samples), rows.flatten()))
        missing -= len(rows)
    return drawn


def learn(policy, drawn, config):
    """DAPO's gradient. All tokens of all groups that are kept count the same."""
    method = grpo.FAMILY["dapo"]
    tokens = sum(draw.samples.answer[draw.at].sum() for draw in drawn)
    for draw in drawn:
        at = draw.at
        if len(at) == 0:
            continue
        advantages = grpo.group_advantages(draw.rewards, method.by_std).flatten()  # (B,)
        answer = draw.samples.answer[at]
        logps = grpo.logps_at(policy, draw.samples, at, config)
        loss = grpo.grpo_loss(logps, draw.samples.logps[at], advantages[at], answer,
                              answer / tokens, method)
        loss.sum().backward()


def fit(policy, tokenizer, prompts, config, draws):
    """-> one row a step: answers drawn so far, the share of right ones, how many groups taught"""
    optimizer = adamw(policy, config.lr)
    stream = batches(prompts, None, config.batch, torch.Generator().manual_seed(config.seed))
    generator = torch.Generator().manual_seed(config.seed + RANK)
    answers = 0
    log = Log(config)
    for step in steps(config, optimizer):
        drawn = draw_groups(policy, tokenizer, stream, config, generator, draws)
        learn(policy, drawn, config)
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        answers += sum(len(draw.samples.texts) for draw in drawn)
        taught = sum(grpo.contrast(draw.rewards).sum().item() for draw in drawn)
        right = sum(draw.right for draw in drawn) / len(drawn)
        log(step, answers=answers, right=right, taught=min(taught, config.batch), draws=len(drawn))
    return log.rows


def reached(rows, goal):
    """The first step at which, over three steps, so many answers are right. -> its row, or None"""
    for i in range(2, len(rows)):
        right = [row["right"] for row in rows[i - 2:i + 1]]
        if sum(right) / 3 >= goal:
            return rows[i]
    return None


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=3)
    need(config.init)
    start, tokenizer = load(config.init, config.device)
    prompts, _ = grpo.read_prompts(config, tokenizer, start.config.max_len)
    runs = {}
    for name, draws in ("one draw", 1), ("dynamic", config.draws):
        config.say(f"{name}: at most {draws} draws of {config.batch} prompts a step")
        runs[name] = fit(copy.deepcopy(start), tokenizer, prompts, config, draws)
    config.say(f"\nuntil {config.goal:.0%} of the answers are right\n"
               f"               steps   answers   groups that teach, a step")
    for name, rows in runs.items():
        taught = sum(row["taught"] for row in rows) / len(rows)
        row = reached(rows, config.goal)
        if row is None:
            config.say(f"{name:10} {'never':>9} {rows[-1]['answers']:9.0f} {taught:9.1f}")
        else:
            config.say(f"{name:10} {row['step'] + 1:9} {row['answers']:9.0f} {taught:9.1f}")
    return {"runs": runs}


if __name__ == "__main__":
    main(Config, train, __doc__)
