"""A judge that answers with a word: "A" or "B".

A language model needs no new head to judge. Show it a question and two answers, ask which is
better, and compare the log-probs of two letters (Zheng et al. 2023, 2306.05685; as a reward model:
Zhang et al. 2024, 2408.15240). It learns from verdicts as in SFT. Such judges like one letter more
than the other, whatever it stands for, so each pair is asked in both orders:

    L = - 1/2 [ log pi(A | chosen is A) + log pi(B | chosen is B) ]

    first  = log pi(A)/pi(B) where chosen is A         margin = (first + second) / 2
    second = log pi(B)/pi(A) where chosen is B         bias   = (first - second) / 2

The margin stands where a reward model has r_chosen - r_rejected, and a liking for A cancels in it;
the bias is that liking. The report card is that of reward_model.py, to compare.

    python -m lessons.talking_judge          data/preferences.jsonl -> out/talking_judge

Try next: another PRINCIPLE, before and after training; batch for batch against reward_model.py.
"""
from dataclasses import dataclass, replace

import torch

from data import exam
from data.checkpoints import load, save
from data.studybuddy import COMPARE, flat
from data.run import (Log, Settings, adamw, add_lora, batches, begin, clip_gradients, main,
                      merge_lora, need, parts, steps)
from model import Example, UserError, collate, render_prompt
from reward_model import flattered, longest, read_comparisons, report

PRINCIPLE = "Choose the better answer for a child."


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/talking_judge"  # write here
    steps: int = 120          # optimiser steps
    held: int = 6             # one prompt in so many is held out
    drop: bool = False        # leave out answers longer than the context (otherwise an error)
    quick: bool = False       # 3 steps, to see that it runs

    limits = Settings.limits | {"held": (2, 10**9)}


# L = - 1/2 [log pi(A | chosen is A) + log pi(B | chosen is B)]
def generative_loss(logps):
    """logps (B, 2, 2): order (chosen is A, chosen is B) by letter (A, B) -> (B,)"""
    chosen_is_a, chosen_is_b = logps.unbind(1)                   # (B, 2) each
    return -(chosen_is_a[:, 0] + chosen_is_b[:, 1]) / 2


# margin = (first + second) / 2          bias = (first - second) / 2
def generative_margin(logps):
    """logps (B, 2, 2), as above -> margin, bias, (B,) each"""
    chosen_is_a, chosen_is_b = logps.unbind(1)                   # (B, 2) each
    first = chosen_is_a[:, 0] - chosen_is_a[:, 1]                # log pi(A)/pi(B)
    second = chosen_is_b[:, 1] - chosen_is_b[:, 0]               # log pi(B)/pi(A)
    return (first + second) / 2, (first - second) / 2


def question(tokenizer, prompt, a, b):
    """Which is better? -> Example, marked at its last token, after which the letter comes."""
    text = COMPARE.format(prompt=flat(prompt), a=a, b=b, principle=PRINCIPLE)
    ids = render_prompt(tokenizer, [{"role": "user", "content": text}])
    return Example(ids, [0] * (len(ids) - 1) + [1])


def in_both_orders(comparisons, tokenizer):
    """Comparisons whose examples are two questions: the chosen answer is A, and it is B."""
    asked = []
    for comparison in comparisons:
        if len(comparison.answers) != 2:
            raise UserError(f"{comparison.where}: want two answers, for an A and a B")
        chosen, rejected = comparison.answers
        examples = [question(tokenizer, comparison.prompt, chosen, rejected),
                    question(tokenizer, comparison.prompt, rejected, chosen)]
        asked.append(comparison._replace(examples=examples))
    return asked


def read_questions(config, tokenizer, context):
    """-> comparisons to learn from, held out. With both answers, some questions are too long."""
    train, held = read_comparisons(config, tokenizer, context)
    count = len(train) + len(held)
    train = [one for one in in_both_orders(train, tokenizer) if longest(one) <= context]
    held = [one for one in in_both_orders(held, tokenizer) if longest(one) <= context]
    left_out = count - len(train) - len(held)
    if left_out > count / 10:
        raise UserError(f"{config.data}: {left_out} of {count} questions with both answers are "
                        f"longer than the model's {context} tokens; want shorter answers")
    if left_out:
        config.say(f"{left_out} pairs are left out: with both answers, they are longer than the "
                   f"model's {context} tokens")
    return train, held


def verdicts(model, comparisons, tokenizer):
    """The log-probs of both letters, in both orders. -> (B, 2, 2)"""
    examples = []
    for comparison in comparisons:
        examples += comparison.examples
    ids, mask, read = collate(examples, tokenizer, model.embed.weight.device)  # (2B, T) each
    state = model.hidden(ids, mask)[read]                        # (2B, C)
    letters = [tokenizer.encode_ordinary(letter)[0] for letter in "AB"]
    logps = model.head(state).log_softmax(-1)[:, letters]        # (2B, 2)
    return logps.view(-1, 2, 2)


@torch.no_grad()
def all_verdicts(model, comparisons, tokenizer):
    """verdicts() of any number of comparisons -> (N, 2, 2)"""
    logps = []
    for i in range(0, len(comparisons), 64):
        logps.append(verdicts(model, comparisons[i:i + 64], tokenizer).cpu())
    return torch.cat(logps)


def evaluate(model, held, tokenizer):
    """-> report card. A duel has a margin only, so the rejected answer's r is set to 0."""
    logps = all_verdicts(model, held, tokenizer)                 # (N, 2, 2)
    margin, bias = generative_margin(logps)                      # (N,) each
    r = torch.stack([margin, torch.zeros_like(margin)], dim=1)   # (N, 2)
    card = {"loss": generative_loss(logps).mean().item(), "likes_a": bias.mean().item()}
    card |= report(r, held)
    if exam.knows([comparison.row for comparison in held]):
        probes = in_both_orders(flattered(held, tokenizer), tokenizer)
        margin, _ = generative_margin(all_verdicts(model, probes, tokenizer))
        card["flattery"] = margin.mean().item()
    return card


def train(config):
    if config.quick:
        config = replace(config, steps=3)
    started = begin(config)
    need(config.init, "python sft.py", 25)
    model, tokenizer = load(config.init, config.device)
    add_lora(model, config.lora)
    optimizer = adamw(model, config.lr)
    comparisons, held = read_questions(config, tokenizer, model.config.max_len)
    lengths = [longest(comparison) for comparison in comparisons]
    stream = batches(comparisons, lengths, config.batch, torch.Generator().manual_seed(config.seed))

    # BEFORE
    config.say(f"talking_judge: from {config.init}; {len(comparisons):,} pairs to learn from, "
               f"{len(held)} held out. One of them, with the chosen answer as A:")
    text = tokenizer.decode(held[0].examples[0].ids) + "« A"
    config.say("    " + text.replace("\n", "\n    "))
    before = evaluate(model, held, tokenizer)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 ask in both orders
            logps = verdicts(model, part, tokenizer)             # (B, 2, 2)
            # 3 loss
            loss = generative_loss(logps)                        # (B,)
            (loss.sum() / len(batch)).backward()
            margin, bias = generative_margin(logps)
            seen.append(torch.stack([loss, margin, bias]).detach())  # (3, B)
        # 4 step
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        loss, margin, bias = torch.cat(seen, dim=1)
        log(step, loss=loss.mean(), accuracy=(margin > 0).float().mean(), margin=margin.mean(),
            likes_a=bias.mean())
    merge_lora(model)
    if config.save:
        save(config.out, model, tokenizer)

    # AFTER
    after = evaluate(model, held, tokenizer)
    targets = [exam.Target("loss", before["loss"], at_most=True)]
    if config.data == Config.data:
        targets = [exam.Target("gold_order", 0.85)]
    results = exam.finish("talking_judge", config, started, log, before, after, targets)
    return results | {"model": model, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
