"""KTO: thumbs up, thumbs down. Alignment from single judgements instead of pairs.

Pairs have to be asked for; thumbs come by themselves. KTO (Ethayarajh et al. 2024, 2402.01306,
eq. 8) raises good answers and lowers bad ones. Each is held against z, how far the policy has moved
on the whole: the KL of pi and pi_ref, measured on answers that are put under other prompts.

    L = 1 - sigma(beta (r - z)) for a good answer, lambda sigma(beta (r - z)) for a bad one
    r = log pi(y|x)/pi_ref(y|x)          z = max(0, mean_i log pi(y_j|x_i)/pi_ref(y_j|x_i)), j != i

By hand: every run starts at r = z = 0, where both losses are 1/2. A good answer that is e times as
likely as it was (r = 1) has, at beta 0.5, a loss of 1 - sigma(0.5) = 0.378. Where all answers have
risen as much, z is 1 as well, and the loss is 1/2 again.

    python -m lessons.kto                       out/sft -> out/kto, in a minute: pairs taken apart
    python -m lessons.kto --data thumbs.jsonl   {"prompt": ..., "completion": ..., "label": true}

The loss stands in dpo.py. This is its loop, which differs from DPO's in what a batch is.
Try next: --aversion 2 (bad answers count twice); --share 0.2 (few thumbs go up, as in products).
"""
import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import dpo
from data import exam, rows
from data.chart import Panel, chart
from data.checkpoints import load, save
from data.run import (Log, adamw, add_lora, batches, begin, clip_gradients, hold_out, merge_lora,
                      need, parts, steps)
from lessons import figures
from model import Example, UserError, collate, render_answer, token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/preferences.jsonl"  # JSON lines: pairs, or answers with a "label"
    out: str = "out/kto"      # write here
    steps: int = 110          # optimiser steps
    batch: int = 32           # judgements a step
    lr: float = 2e-4          # peak learning rate
    beta: float = 0.5         # the larger, the closer it stays to the reference
    aversion: float = 1.0     # weight of bad answers over good ones, lambda
    share: float = 1.0        # of the good answers, learn from so many

    limits = figures.Lesson.limits | {"share": (0.01, 1)}


# ---------------------------------------------------------------- data

class Thumb(NamedTuple):
    judged: Example          # a prompt and an answer
    mismatched: Example      # the prompt and an answer to another one, for z
    good: bool
    row: dict                # its line of JSON


def read_thumbs(config, tokenizer, context):
    """-> thumbs to learn from, thumbs held out. Of those up and of those down every k-th prompt is
    held out, and what else answers such a prompt is not learned from."""
    good, bad = [], []
    for judgement in rows.read_judgements(config.data):
        (good if judgement.good else bad).append(judgement)
    if len(good) < 2 or len(bad) < 2:
        raise UserError(f"{config.data}: {len(good)} thumbs up and {len(bad)} down; want at least "
                        "2 of each, as one is held out")
    held = []
    for kind in good, bad:
        held += hold_out(kind, [judgement.prompt for judgement in kind])[1]
    asked = {str(judgement.prompt) for judgement in held}
    learned = [judgement for judgement in good + bad if str(judgement.prompt) not in asked]
    if not learned:
        raise UserError(f"{config.data}: too few different prompts to hold one out")
    held = to_thumbs(held, tokenizer, context)
    return thin_out(to_thumbs(learned, tokenizer, context), config.share, config.seed), held


def to_thumbs(judgements, tokenizer, context):
    thumbs = []
    for i, judgement in enumerate(judgements):
        judged = render_answer(tokenizer, judgement.prompt, judgement.answer)
        if len(judged.ids) > context:
            raise UserError(f"{judgement.where}: longer than the model's {context} tokens; shorten "
                            "it, or leave it out")
        mismatched = mismatch(judgements, i, tokenizer, context)
        thumbs.append(Thumb(judged, mismatched, judgement.good, judgement.row))
    return thumbs


def mismatch(judgements, i, tokenizer, context):
    """The prompt of judgement i, and the next answer to another prompt that fits. -> Example"""
    prompt = judgements[i].prompt
    for j in range(i + 1, i + len(judgements)):
        other = judgements[j % len(judgements)]
        if other.prompt != prompt:
            example = render_answer(tokenizer, prompt, other.answer)
            if len(example.ids) <= context:
                return example
    raise UserError(f"{judgements[i].where}: want an answer to another prompt beside it, for z, "
                    f"that fits the model's {context} tokens")


def thin_out(thumbs, share, seed):
    """Keep a share of the good ones: real thumbs are rarely balanced."""
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(len(thumbs), generator=generator).tolist()
    return [thumb for thumb, lot in zip(thumbs, lots) if not thumb.good or lot < share]


# ---------------------------------------------------------------- log-ratios

def ratios(policy, reference, examples, tokenizer):
    """r = log pi(y|x) - log pi_ref(y|x), summed over the tokens of y. -> (B,)"""
    ids, mask, answer = collate(examples, tokenizer, policy.embed.weight.device)    # (B, T) each
    logps = token_logps(policy, ids, mask, answer).sum(1)                           # (B,)
    with torch.no_grad():
        ref_logps = token_logps(reference, ids, mask, answer).sum(1)                # (B,)
    return logps - ref_logps


@torch.no_grad()
def fixed_ratios(policy, reference, examples, tokenizer, size=32):
    """The same without a gradient, for any number of examples. -> (N,)"""
    values = []
    for first in range(0, len(examples), size):
        part = examples[first:first + size]
        values.append(ratios(policy, reference, part, tokenizer))
    return torch.cat(values)


def separation(ratio, good):
    """How often is a good answer's log-ratio above a bad one's? A tie is half right. (N,), (N,)"""
    return dpo.share_ahead(ratio[good][:, None], ratio[~good])  # (good, 1) against (bad,)


def evaluate(policy, reference, thumbs, tokenizer, config, against=None):
    """-> report card, answers. Held-out thumbs say how well good and bad are told apart; where the
    world is ours, its exam says whether the answers are better."""
    ratio = fixed_ratios(policy, reference, [thumb.judged for thumb in thumbs], tokenizer)
    good = torch.tensor([thumb.good for thumb in thumbs], device=ratio.device)
    card = {"separation": separation(ratio, good)}
    answers = None
    if exam.knows([thumb.row for thumb in thumbs]):
        world, answers = exam.exam(policy, tokenizer, reference, against, config.seed)
        card = world | card
    return card, answers


# ---------------------------------------------------------------- training

def train(config):
    started = begin(config)
    if config.quick:
        config = replace(config, steps=3)
    need(config.init)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)

    thumbs, held = read_thumbs(config, tokenizer, policy.config.max_len)
    lengths = [len(thumb.judged.ids) for thumb in thumbs]
    stream = batches(thumbs, lengths, config.batch, torch.Generator().manual_seed(config.seed))

    # BEFORE
    up = sum(thumb.good for thumb in thumbs)
    config.say(f"kto: from {config.init}, on {config.device}; {up:,} thumbs up, "
               f"{len(thumbs) - up:,} down, {len(held)} more are held out")
    before, old_answers = evaluate(policy, reference, held, tokenizer, config)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        # 2 score: z first, which belongs to the whole batch and is not trained
        others = [thumb.mismatched for thumb in batch]
        mismatched = fixed_ratios(policy, reference, others, tokenizer)             # (B,)
        seen = []
        for part in parts(batch, config.accumulate):
            ratio = ratios(policy, reference, [thumb.judged for thumb in part], tokenizer)  # (B,)
            good = torch.tensor([thumb.good for thumb in part], device=ratio.device)        # (B,)
            # 3 loss
            losses = dpo.kto(ratio, mismatched, good, config.beta, config.aversion)         # (B,)
            (losses.sum() / len(batch)).backward()
            seen.append(torch.stack([losses, ratio, good]).detach())                # (3, B)
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log: the first loss is 1/2 (for aversion 1). `good` and `bad` are mean log-ratios; a
        # batch may lack one kind, and then it is 0
        losses, ratio, good = torch.cat(seen, dim=1)                                # (B,) each
        bad = 1 - good
        log(step, loss=losses.mean(), z=mismatched.mean().clamp(min=0),
            good=(ratio * good).sum() / good.sum().clamp(min=1),
            bad=(ratio * bad).sum() / bad.sum().clamp(min=1))
    merge_lora(policy)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER
    after, answers = evaluate(policy, reference, held, tokenizer, config, old_answers)
    target = exam.Target("separation", 0.55)
    if answers:
        exam.show_answers(old_answers, answers, config)
        target = exam.Target("gold", before["gold"] + 0.03)
    results = exam.finish("kto", config, started, log, before, after, [target])
    numbers = {}
    for key in "good", "bad", "z":
        numbers[key] = exam.running_mean([row[key] for row in log.rows])
    for key in "separation", "gold", "kl":
        if key in after:
            numbers[key] = {"before": before[key], "after": after[key]}
    return results | {"model": policy, "tokenizer": tokenizer, "log": log.rows, "numbers": numbers}


# ---------------------------------------------------------------- the figure

def picture(runs):
    """Good and bad answers part, on both sides of z; then what it was good for."""
    lines = []
    for key in "good", "bad", "z":
        curves = [numbers[key] for numbers in runs]
        lines.append(figures.line(key, range(len(curves[0])), curves))
    bars = []
    for key in "separation", "gold":
        if key in runs[0]:
            values = {name: [numbers[key][name] for numbers in runs] for name in runs[0][key]}
            bars.append(figures.bar(key, values))
    return chart([Panel("Thumbs part the answers", "step (running mean)",
                        "log pi / pi_ref, nats an answer", lines),
                  Panel("Before and after", "", bars=bars, limits=(0, 1))], height=280)


if __name__ == "__main__":
    figures.main("kto", Config, train, picture, __doc__)
