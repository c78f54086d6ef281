"""Supervised fine-tuning (SFT): from a model that continues text to one that answers.

A base model has read questions followed by good answers, by bad ones and by more questions, and it
imitates them all. SFT shows it some hundreds of conversations and makes the assistant's words
likelier. The loss is that of pretraining, with two changes: the data, which stands in a chat
template, and a mask m, which leaves out what the assistant did not write. SFT gives the model a
voice. It cannot teach that one answer is better than another; dpo.py can.

    L(theta) = - sum_it m_it log pi_theta(y_it | y_i,<t) / sum_it m_it

Here y_i is a whole row, prompt and answer, and t a position in it. By hand: two tokens of an answer
and its <|im_end|> get 0.5, 0.25 and 0.8. Their product is 0.1, so L = - ln(0.1) / 3 = 0.768. How
likely the question is does not count: its m is 0. (Of several turns all of the assistant's count.)

    python sft.py                            data/base -> out/sft, 10 s: gold 0.28 -> 0.56
    python sft.py --lora 8 --steps 110 --out out/lora      by adapters of rank 8, on frozen weights
    python sft.py --data mine.jsonl --init SmolLM2-135M --lr 2e-5 --out out/mine

A line of mine.jsonl is {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}]}. `gold` is the true quality of
answers, which is known on our toy data alone; on yours there is the loss of held-out rows.

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155): one short run, and no dropout.
Answers of a model make data, too: its own best of N (lessons.best_of), a teacher's
(lessons.distill). Try next: a mask of ones in to_examples(), then talk to it (python model.py
out/sft); --steps 400, and compare held_out on the two cards. """
from dataclasses import dataclass, replace

import torch

from data import exam, rows
from data.checkpoints import load, save
from data.run import (Log, Settings, adamw, add_lora, as_in_training, average, batches, begin,
                      clip_gradients, hold_out, main, merge_lora, parts, steps)
from model import Example, UserError, collate, render


@dataclass(frozen=True)
class Config(Settings):
    init: str = "data/base"   # start from this model folder
    data: str = "data/sft.jsonl"  # JSON lines with "messages", or with "prompt" and "completion"
    out: str = "out/sft"      # write here
    steps: int = 40           # optimiser steps
    batch: int = 54           # conversations a step
    lr: float = None          # peak learning rate (default: 1.7e-3, or 1e-2 with --lora)
    cut: bool = False         # cut rows longer than the context (otherwise they are an error)


# ---------------------------------------------------------------- data

def to_examples(lines, tokenizer, context, config):
    """SEAM: your own format goes here. rows.read_conversations reads the usual ones; all that is
    needed of a line is its messages. Whatever the assistant says in them is trained on."""
    examples = []
    long = []
    for line in lines:
        # template: messages become one row of tokens
        ids, answer = render(tokenizer, line.messages)
        # mask: 1 at the assistant's words and at the <|im_end|> after them, so that it learns to
        # stop
        m = answer                  # try m = [1] * len(ids): it learns to write the questions, too
        targets_m = m[1:context]    # nothing predicts the first token of a row
        if 1 not in targets_m:
            raise UserError(f"{line.where}: no answer begins within the model's {context} tokens")
        if len(ids) > context:
            long.append(line.where)
        examples.append(Example(ids[:context], m[:context]))
    if long and not config.cut:
        raise UserError(f"{long[0]}: longer than the model's {context} tokens, as {len(long) - 1} "
                        f"others are: shorten them, or cut them with --cut")
    if long:
        config.say(f"{len(long)} rows are cut to the model's {context} tokens")
    return examples


HELD_OUT = 40                   # rows, roughly


def read_examples(config, tokenizer, context):
    """-> examples to learn from, examples held out, whose prompts are not learned from"""
    lines = rows.read_conversations(config.data)
    examples = to_examples(lines, tokenizer, context, config)
    prompts = [line.messages[:-1] for line in lines]
    return hold_out(examples, prompts, HELD_OUT)


# ---------------------------------------------------------------- the maths

def logits_and_targets(model, examples, tokenizer):
    """Runs the model; what it knows at t predicts the token at t + 1, its target:

        token     assistant  \\n     Hello  .
        target    \\n         Hello  .      <|im_end|>
        m         0          1      1      1

    -> logits (N, V) and targets (N,), at the N positions with m = 1 (`mask` tells padding apart)"""
    ids, mask, answer = collate(examples, tokenizer, model.embed.weight.device)  # (B, T) each
    targets = ids[:, 1:]                                        # (B, T-1), the token at t + 1
    m = answer[:, 1:]                                           # (B, T-1), is it trained on?
    hidden = model.hidden(ids[:, :-1], mask[:, :-1], at=m)      # (N, C), one before each target
    return model.head(hidden), targets[m]


# log pi(y_it | y_i,<t)
def target_logps(logits, targets):
    logps = logits.log_softmax(-1)                              # (N, V)
    return logps.gather(1, targets[:, None])[:, 0]              # (N,)


# L = - sum_it m_it log pi(y_it | y_i,<t) / sum_it m_it
def sft_loss(logps, count):
    """logps (N,), where m = 1. `count` is the sum of m over the whole batch, not over this part or
    this row: so every token weighs the same. With the function above it is what others call
    F.cross_entropy(logits, targets, reduction="sum") / count."""
    return -logps.sum() / count


# sum_it m_it
def tokens_in(examples):
    """Nothing predicts the first token of a row, so it is nobody's target."""
    return sum(sum(example.answer[1:]) for example in examples)


# ---------------------------------------------------------------- before and after

@torch.no_grad()
def evaluate(model, held, tokenizer, config, against=None):
    """-> report card, answers. Held-out conversations have a loss; where the data is the world's
    own, its exam says whether answers are good."""
    total = 0.0
    for part in as_in_training(held, config):
        logits, targets = logits_and_targets(model, part, tokenizer)
        total -= target_logps(logits, targets).sum().item()
    card = {"held_out": total / tokens_in(held)}
    answers = None
    if config.data == Config.data:
        world, answers = exam.exam(model, tokenizer, against=against, seed=config.seed)
        card = world | card
    return card, answers


@torch.no_grad()
def show_example(model, example, tokenizer, config, before):
    """What the loss sees of a row, from `before` tokens before the answer on: below each token its
    target, the target's mask, and how likely the model takes it to be."""
    logits, targets = logits_and_targets(model, [example], tokenizer)  # (N, V), (N,)
    logps = target_logps(logits, targets)                       # (N,)
    probs = logps.exp().tolist()                                # one for each m = 1
    texts = [repr(tokenizer.decode([token]))[1:-1] for token in example.ids]
    columns = []
    for t in range(len(texts) - 1):
        m = example.answer[t + 1]
        pi = f"{probs.pop(0):.2f}" if m else ""
        columns.append([texts[t], texts[t + 1], str(m), pi])
    start = max(example.answer.index(1) - before, 0)
    shown = columns[start:start + 28]                           # four blocks of seven
    show_columns(["token", "target", "m", "pi"], shown, config)
    config.say(f"L = {sft_loss(logps, len(logps)):.3f}, the mean of - log pi over all "
               f"{len(logps)} targets with m = 1")


def show_columns(names, columns, config):
    """Seven columns side by side, and the next seven below them."""
    for block in range(0, len(columns), 7):
        for i, name in enumerate(names):
            line = f"{name:>6}"
            for column in columns[block:block + 7]:
                width = max(len(cell) for cell in column) + 2
                line += column[i].rjust(width)
            config.say(line.rstrip())


# ---------------------------------------------------------------- training

def train(config):
    started = begin(config)
    if config.lr is None:
        config = replace(config, lr=1e-2 if config.lora else 1.7e-3)
    model, tokenizer = load(config.init, config.device)
    examples, held = read_examples(config, tokenizer, model.config.max_len)
    # coarse lengths: batches of short answers alone would give their tokens too much weight
    lengths = [1 + len(example.ids) // 40 for example in examples]
    stream = batches(examples, lengths, config.batch, torch.Generator().manual_seed(config.seed))
    add_lora(model, config.lora)
    optimizer = adamw(model, config.lr)

    # BEFORE
    config.say(f"sft: from {config.init}, on {config.device}; {len(examples):,} conversations, "
               f"{len(held)} more are held out")
    shortest = min(examples, key=lambda example: len(example.ids))
    show_example(model, shortest, tokenizer, config, before=20)
    before, old_answers = evaluate(model, held, tokenizer, config)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch, and how many targets it has
        batch = next(stream)
        count = average(float(tokens_in(batch)))                # (the mean over processes)
        total = 0.0
        for part in parts(batch, config.accumulate):
            # 2 run the model, score the targets
            logits, targets = logits_and_targets(model, part, tokenizer)  # (N, V), (N,)
            logps = target_logps(logits, targets)               # (N,) log pi(y_t | y_<t)
            # 3 loss
            loss = sft_loss(logps, count)
            loss.backward()
            total += loss.item()
        # 4 step
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log: batches differ, so the loss is jumpy; held_out has the same rows each time
        log(step, loss=total, targets=count)
    merge_lora(model)
    if config.save:
        save(config.out, model, tokenizer)

    # AFTER
    after, answers = evaluate(model, held, tokenizer, config, old_answers)
    config.say("the answer from above")
    show_example(model, shortest, tokenizer, config, before=1)
    target = exam.Target("held_out", before["held_out"], at_most=True)
    if answers:
        exam.show_answers(old_answers, answers, config)
        target = exam.Target("gold", 0.50)
    results = exam.finish("sft", config, started, log, before, after, [target])
    return results | {"model": model, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
