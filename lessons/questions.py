"""The questions that people ask with a log in their hand, each answered by a command.

The trackers of all alignment libraries hold the same questions: why does the chosen reward fall,
why is the KL negative, why is the loss 0? Here each one is made to happen. You see the log as it
stands in front of whoever asks, with a mark below what is strange; because of what; the line in
which the right way stands; the log after the cure; and a sentence to remember. Some symptoms are
harmless. Then it says so, and how to tell.

    python -m lessons.questions                 the list
    python -m lessons.questions 7               one of them, in seconds
    python -m lessons.questions all             all of them, in some minutes
    python -m lessons.questions all --page      writes what they print into lessons/questions.md

A question is a function. It returns two logs, before and after; its docstring is the `because`.
Where a mistake is needed, it is planted in a copy of a script's text. Most run on a toy: a model
of a few thousand weights, or one distribution over a few tokens, on which everything is exact.
--init names the model that the others start from.
"""
import argparse
import copy
import functools
import inspect
import json
import math
import re
import sys
import tempfile
import textwrap
import types
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import dpo
import grpo
import model as network
import ppo
import reward_model
import sft
from data import exam
from data.checkpoints import load, load_ranks
from data.rows import read_conversations
from data.run import adamw, add_lora, exit_codes, merge_lora, need, parts
from model import (END, START, ModelConfig, Transformer, UserError, render, render_answer,
                   render_prompt, sample, special, token_logps)

HERE = Path(__file__).parent.parent
PAGE = HERE / "lessons/questions.md"
SCRATCH = tempfile.TemporaryDirectory()         # gone when the program ends


# ---------------------------------------------------------------- what all questions share

def planted(file, *changes):
    """A module from a copy of a file's text, in which each (old, new) is changed: a mistake, or
    one number more in the log."""
    text = (HERE / file).read_text(encoding="utf-8")
    for old, new in changes:
        if text.count(old) != 1:
            raise UserError(f"{file}: want {old!r} once, found it {text.count(old)} times")
        text = text.replace(old, new)
    module = types.ModuleType("planted")
    exec(compile(text, file, "exec"), module.__dict__)
    return module


@functools.cache
def plain(name, fields, kind=None, most=400):
    """Some fields of data/<name>.jsonl, as somebody's own data: no exam is asked. -> path"""
    lines = []
    for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if kind is None or row["kind"] == kind:
            row = {field: row[field] for field in fields.split()}
            lines.append(json.dumps(row) + "\n")
    path = Path(SCRATCH.name, f"{name}-{kind}-{most}.jsonl")
    path.write_text("".join(lines[:most]), encoding="utf-8")
    return str(path)


def tiny(width=32):
    """A random model that knows nothing, with our vocabulary."""
    torch.manual_seed(0)
    tokenizer = load_ranks()
    sizes = ModelConfig(tokenizer.n_vocab, d_model=width, n_layers=2, n_heads=2, n_kv_heads=1,
                        d_ff=2 * width)
    return Transformer(sizes), tokenizer


TALK = [("Hi!", "Hello."), ("How are you?", "Well, thanks."), ("Who are you?", "A helper."),
        ("What is 2 + 3?", "It is 5."), ("And 3 + 4?", "It is 7."), ("Bye!", "See you.")]


def conversation(first, second):
    """Two turns of user and assistant."""
    messages = []
    for question, answer in (first, second):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def imitate(render, steps=60):
    """SFT of a tiny model on some conversations. -> model, tokenizer, log"""
    model, tokenizer = tiny()
    optimizer = adamw(model, 1e-2)
    examples = []
    for i, turn in enumerate(TALK):
        examples.append(render(tokenizer, conversation(turn, TALK[i - 1])))
    log = []
    for step in range(steps):
        logits, targets = sft.logits_and_targets(model, examples, tokenizer)  # (N, V), (N,)
        loss = sft.sft_loss(sft.target_logps(logits, targets), len(targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
    return model, tokenizer, log


@torch.no_grad()
def write_on(model, tokenizer, question, count):
    """The likeliest tokens, whatever they are: nobody stops it. -> text"""
    ids = render_prompt(tokenizer, [{"role": "user", "content": question}])
    start = len(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids]))                     # (1, T, V)
        ids = ids + [logits[0, -1].argmax().item()]
    return tokenizer.decode(ids[start:]).replace("\n", "\\n")


def brevity(prompts, texts):
    """A score that is easily climbed: words cost."""
    return [-len(text.split()) / 10 for text in texts]


# ---------------------------------------------------------------- tables

def cut(text, width):
    """The beginning of a text, on one line."""
    return " ".join(text.split())[:width] or "-"


def few(log, names, count=5):
    """Some rows of a log, from the first to the last, and some of its numbers."""
    count = min(count, len(log))
    rows = []
    for i in range(count):
        row = log[round(i * (len(log) - 1) / max(count - 1, 1))]
        rows.append({name: row[name] for name in names.split()})
    return rows


def shown(value):
    if isinstance(value, float):
        decimals = 4 if abs(value) < 100 else 1
        return f"{value + 0.0:.{decimals}f}".replace("-0.0000", "0.0000")
    return str(value)


def table(rows, *strange):
    """Rows of a log as text. ^ stands below the columns that are strange."""
    lines = ["" for _ in range(len(rows) + 2)]
    for name in rows[0]:
        cells = [name] + [shown(row[name]) for row in rows]
        width = max(len(cell) for cell in cells)
        mark = "^" * len(name) if name in strange else ""
        for i, cell in enumerate(cells + [mark]):
            words = isinstance(rows[0][name], str)
            lines[i] += "  " + (cell.ljust(width) if words else cell.rjust(width))
    return "\n".join(line.rstrip() for line in lines if line.strip())


# ---------------------------------------------------------------- pairs

def chosen_falls(init):
    """The loss knows only the lead of the chosen answer over the rejected one. Here SFT has learned
    the chosen answers, so they are about as likely as they can be; they share most of their words
    with the rejected ones, and what pushes these down takes them along. A nat is a factor of 2.7: a
    fall by one or two is harmless while rejected falls much faster. A short answer that has lost
    ten nats is never given again, and something else is: ask the model."""
    before = prefer("dpo")
    after = prefer("sppo")
    names = "step loss accuracy chosen rejected"
    return table(few(before, names), "chosen"), table(few(after, names))


NEARLY = ["Hello!", "Well, thank you.", "A helper!", "It is 7.", "It is 5.", "See you!"]


def prefer(loss, steps=30):
    """DPO of a tiny model that SFT has taught what is chosen now; rejected is nearly the same."""
    policy, tokenizer, _ = imitate(render)
    reference = copy.deepcopy(policy).requires_grad_(False)
    pairs = []
    for (question, answer), other in zip(TALK, NEARLY):
        messages = [{"role": "user", "content": question}]
        chosen = render_answer(tokenizer, messages, answer)
        rejected = render_answer(tokenizer, messages, other)
        pairs.append(dpo.Pair(chosen, rejected, {}))
    config = dpo.Config(loss=loss, beta=0.1)
    optimizer = adamw(policy, 5e-4)
    log = []
    for step in range(steps):
        chosen, rejected = dpo.log_ratios(policy, reference, pairs, tokenizer)      # (6,) each
        losses = dpo.loss_of(chosen, rejected, config)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": losses.mean().item(), "chosen": chosen.mean().item(),
                    "rejected": rejected.mean().item(),
                    "accuracy": dpo.share_ahead(chosen, rejected)})
    return log


def loss_stays(init):
    """At step 0 it must be so: policy and reference are one, and ln 2 = 0.6931. If it stays, no
    token of an answer is compared: here a limit of 8 tokens cuts all answers off, since the prompt
    comes first. Then log pi of an answer is a sum over nothing. Other causes: a reference that is
    the policy itself and not a copy; a learning rate of 0; adapters that nobody trains."""
    data = plain("preferences", "prompt chosen rejected")
    line = "    logps = token_logps(model, ids, mask, answer)  "
    limit = "    answer = answer & (mask.cumsum(1) <= 8)\n"
    limited = planted("dpo.py", (line, limit + line))
    names = "step loss accuracy chosen rejected"
    logs = []
    for script in (limited, dpo):
        config = script.Config(init=init, data=data, steps=20, batch=16, save=False, quiet=True)
        logs.append(few(script.train(config)["log"], names))
    return table(logs[0], "loss", "chosen", "rejected"), table(logs[1])


def accuracy_jumps(init):
    """The column is the share of one batch, and the batch is one pair: it is right or wrong. Of n
    pairs the share is known to about 1/sqrt(n): +-1 for one, +-0.18 for 32. Harmless, but it says
    nothing."""
    data = plain("preferences", "prompt chosen rejected")
    config = dpo.Config(init=init, data=data, steps=8, batch=1, save=False, quiet=True)
    logs = []
    for batch in (1, 32):
        log = dpo.train(replace(config, batch=batch))["log"]
        rows = few(log, "step loss accuracy", 6)
        for row in rows:
            row["+-"] = 1 / math.sqrt(batch)
        logs.append(rows)
    return table(logs[0], "accuracy"), table(logs[1])


def judge_is_a_coin(init):
    """Something keeps the judge from what the annotators saw. Here rows are cut to a length that
    holds the prompt and two tokens of the answer; then most pairs look alike. Others: the score is
    read at padding; half of the pairs have chosen and rejected swapped; a base that cannot read.
    And annotators disagree: where they agree 75 times in 100, no judge gets more than 75%."""
    data = plain("preferences", "prompt chosen rejected", most=1500)
    line = "        comparison = Comparison("
    limit = ("        examples = [example._replace(ids=example.ids[:example.answer.index(1) + 2])\n"
             "                    for example in examples]\n")
    short = planted("reward_model.py", (line, limit + line))
    logs = []
    for script in (short, reward_model):
        config = script.Config(init=init, data=data, steps=40, save=False, quiet=True)
        results = script.train(config)
        rows = few(results["log"], "step loss accuracy lead", 4)
        held_out = results["after"]["accuracy"]
        logs.append((rows, f"  held-out pairs: accuracy {held_out:.2f}"))
    before, after = logs
    return (table(before[0], "loss", "accuracy") + "\n" + before[1],
            table(after[0]) + "\n" + after[1])


# ---------------------------------------------------------------- imitation

def never_stops(init):
    """The token that ends an answer was not trained on. Often because padding is set to the same
    token and is masked by its id, or because the template adds it after the mask was made. The loss
    looks as good as ever: the one token that matters is not in it."""
    line = "[int(is_answer)] * len(body)"
    endless = planted("model.py", (line, "[int(is_answer)] * (len(body) - 1) + [0]"))
    tables = []
    for render_with in (endless.render, render):
        model, tokenizer, log = imitate(render_with)
        prompts = []
        for question, _ in TALK:
            prompts.append(render_prompt(tokenizer, [{"role": "user", "content": question}]))
        answers = sample(model, tokenizer, prompts, max_new=24, temperature=0)
        rows = []
        for i in (0, 3, 4):
            rows.append({"loss": log[-1]["loss"], "ended": str(bool(answers.ended[i])),
                         "asked": TALK[i][0], "answer": cut(answers.texts[i], 40)})
        tables.append(rows)
    return table(tables[0], "ended"), table(tables[1])


def speaks_for_the_user(init):
    """The loss was on the whole text, so it learned to write questions, too; and whoever samples
    waits for another end token than the template's. Where an answer is over, it goes on with the
    likeliest next thing, and that is the user's next turn."""
    whole = planted("model.py", ("marks += [0] * len(head)", "marks += [1] * len(head)"),
                    ("marks += [0] * len(newline)", "marks += [1] * len(newline)"))
    rows = []
    for render_with in (whole.render, render):
        model, tokenizer, _ = imitate(render_with, steps=120)
        row = whole.render(tokenizer, conversation(TALK[1], TALK[0]))
        logits, targets = sft.logits_and_targets(model, [row], tokenizer)
        on_all = -sft.target_logps(logits, targets).mean().item()
        text = write_on(model, tokenizer, "How are you?", 30)
        rows.append({"loss on all": on_all, "writes": text[:60]})
    rows[1]["writes"] = rows[1]["writes"].split(END)[0]         # and a sampler that stops there
    return table(rows[:1], "writes"), table(rows[1:])


def accumulation_differs(init):
    """Each part of the batch is averaged over its own tokens, and then the parts are averaged. So a
    token of a part with few tokens weighs more than one of a part with many. It is not rounding: it
    is another loss."""
    model, tokenizer, _ = imitate(render, steps=10)
    examples = []
    for length in (1, 1, 2, 3, 5, 8, 13, 21):
        answer = " ".join(["six"] * length)
        examples.append(render(tokenizer, conversation(("Hi!", answer), ("Hi!", answer))))
    line = "return -logps.sum() / count"
    own_mean = planted("sft.py", (line, "return -logps.mean() / count"))
    tables = []
    for script in (own_mean, sft):
        whole = None
        rows = []
        for pieces in (1, 2, 4, 8):
            count = pieces if script is own_mean else sft.tokens_in(examples)
            loss, gradient = loss_in_parts(model, tokenizer, examples, pieces, script, count)
            whole = gradient if whole is None else whole
            apart = (gradient - whole).norm() / whole.norm()
            rows.append({"accumulate": pieces, "loss": loss, "gradient off by": apart.item()})
        tables.append(rows)
    return table(tables[0], "loss"), table(tables[1])


def loss_in_parts(model, tokenizer, examples, pieces, script, count):
    """-> the loss of a batch cut into pieces, and its gradient as one long vector"""
    model.zero_grad()
    total = 0.0
    for part in parts(examples, pieces):
        logits, targets = sft.logits_and_targets(model, part, tokenizer)
        loss = script.sft_loss(sft.target_logps(logits, targets), count)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def stairs(init):
    """At each stair all rows come again, and it has learned some of them by heart. The training
    loss now measures memory. Whether it still learns what it should, only rows that it never sees
    can tell: there the loss turns, long before the other one stops falling."""
    again = memorise("data/base", rows=96, epochs=5)
    once = memorise("data/base", rows=480, epochs=1)
    return table(again, "first steps", "held_out"), table(once)


def memorise(folder, rows, epochs):
    """SFT on so many conversations, again and again, 8 a step. -> log: the mean loss of the first 4
    steps of an epoch and of its last 4, and the loss of rows that are held out"""
    model, tokenizer = load(folder)
    config = sft.Config(data="", quiet=True)
    lines = read_conversations(HERE / sft.Config.data)
    train = sft.to_examples(lines[:rows], tokenizer, model.config.max_len, config)
    held = sft.to_examples(lines[-64:], tokenizer, model.config.max_len, config)
    optimizer = adamw(model, 2e-3)
    log = []
    for epoch in range(epochs):
        losses = []
        for part in parts(train, rows // 8):
            logits, targets = sft.logits_and_targets(model, part, tokenizer)
            loss = sft.sft_loss(sft.target_logps(logits, targets), len(targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        card, _ = sft.evaluate(model, held, tokenizer, config)
        log.append({"epoch": epoch, "steps": len(losses), "first steps": sum(losses[:4]) / 4,
                    "last steps": sum(losses[-4:]) / 4, "held_out": card["held_out"]})
    return log


def other_template(init):
    """In use the prompt is not built as it was in training: a token at its start is doubled, since
    the template writes it and the tokenizer adds it; a newline is missing; or the special tokens
    are spelled out as ordinary text. Nothing fails. Answers are just less good, some a little and
    some entirely: compare log pi of a known answer under both prompts."""
    model, tokenizer, _ = imitate(render)
    question, answer = TALK[3]
    messages = [{"role": "user", "content": question}]
    right = render_prompt(tokenizer, messages)
    start = special(tokenizer, START)
    spelled = tokenizer.encode_ordinary(tokenizer.decode(right))
    prompts = {"the start token twice": [start] + right, "no newline at the end": right[:-1],
               "special tokens as text": spelled, "as in training": right}
    rows = []
    for name, ids in prompts.items():
        body = render_answer(tokenizer, messages, answer).ids[len(right):]
        row = torch.tensor([ids + body])
        marks = torch.tensor([[0] * len(ids) + [1] * len(body)]).bool()
        logp = token_logps(model, row, torch.ones_like(marks), marks).sum()
        greedy = sample(model, tokenizer, [ids], max_new=12, temperature=0).texts[0]
        rows.append({"prompt": name, "log pi(answer)": logp.item(), "says": cut(greedy, 24)})
    return table(rows[:3], "log pi(answer)"), table(rows[3:])


# ---------------------------------------------------------------- groups

def loss_is_zero(init, reward=grpo.strict):
    """The advantages of a group add up to 0, and while pi is pi_old every ratio is 1; so the loss
    is 0 in each batch, by construction. Its gradient is not: it pulls the better answers up and the
    worse ones down. Harmless, then, if the gradient has a length and some groups have contrast.
    Where all answers earn the same, loss and gradient are both 0, and it does not learn."""
    listening = planted("grpo.py", ("clip_gradients(policy)", "gradient = clip_gradients(policy)"),
                        ("log(step, reward", "log(step, gradient=gradient, reward"))

    def equal(truth, text, ended):
        return 1.0
    data = plain("prompts", "prompt answer", "math", 200)
    tables = []
    for steps, pays in ((12, reward), (3, equal)):
        config = listening.Config(init=init, data=data, steps=steps, batch=8, save=False,
                                  quiet=True)
        log = listening.train(config, pays)["log"]
        tables.append(few(log, "step loss gradient reward contrast", 4))
    return table(tables[0], "loss"), table(tables[1])


def no_contrast(init):
    """A group whose answers all earn the same has advantages of 0 and teaches nothing. Here three
    prompts in four are too hard: nobody's answer is right, with work or without. With a KL term
    these teach something after all: to go back to the reference, with nothing to hold against it.
    What the fourth one taught is unlearned. The same happens where all prompts have become easy."""
    names = "step worked contrast loss"
    before = few(three_too_hard(keep_all=True), names)
    after = few(three_too_hard(keep_all=False), names)
    return table(before, "worked", "contrast"), table(after)


def three_too_hard(keep_all, beta=0.2, steps=400):
    """GRPO where an answer is one token: it shows its work or not. The reference does half of the
    time; pi, a log-odds, has learned to. keep_all: groups without contrast feel the KL, too"""
    generator = torch.Generator().manual_seed(0)
    odds = torch.tensor(3.0, requires_grad=True)
    easy = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None]          # (4, 1): work pays on one prompt
    answer = torch.ones(32, 1)                                  # 4 groups of 8, one token each
    log = []
    for step in range(steps):
        worked = torch.rand(4, 8, generator=generator) < odds.sigmoid()
        rewards = easy * worked                                 # (4, 8)
        A = grpo.group_advantages(rewards, by_std=False).flatten()              # (32,)
        contrast = grpo.contrast(rewards).float()               # (4,)
        weights = grpo.per_answer(answer, 1)                    # (32, 1)
        if not keep_all:
            weights = weights * contrast.repeat_interleave(8)[:, None]
        logps = F.logsigmoid(torch.where(worked, odds, -odds)).view(-1, 1)      # (32, 1)
        loss = grpo.grpo_loss(logps, logps.detach(), A, answer, weights, grpo.FAMILY["dr_grpo"],
                              torch.full_like(logps, 0.5).log(), beta).sum()
        gradient = torch.autograd.grad(loss, odds)[0]
        log.append({"step": step, "worked": odds.sigmoid().item(), "loss": loss.item(),
                    "contrast": contrast.mean().item()})
        odds.data -= gradient
    return log


def form_without_truth(init):
    """The form is easy and pays as much as the truth. Here the form is a conclusion and nothing
    else, so work, which makes answers right, costs what the form pays: a guess earns more on
    average. It is learned first; then the answers of a group are alike, and accuracy stays where
    guessing is. Any form that is easier without the work does this."""
    data = plain("prompts", "prompt answer", "math", 200)
    tables = []
    for pays in (form_and_truth, grpo.strict):
        config = grpo.Config(init=init, data=data, steps=20, batch=8, save=False, quiet=True)
        log = grpo.train(config, pays)["log"]
        tables.append(few(log, "step reward right worked contrast"))
    return table(tables[0], "reward", "right"), table(tables[1])


def form_and_truth(truth, text, ended):
    """1 for a conclusion and nothing else, and 1 for a right one."""
    form = re.fullmatch(grpo.CONCLUSION, text) is not None and ended
    return float(form) + float(grpo.conclusion(text) == truth)


def longer_and_longer(init):
    """1/|o| divides what a wrong answer loses by its length: each token of a long one is hardly
    pushed down. So of the wrong answers the long ones survive, and the mean length rises, though
    length earns nothing here. (Later, when the right answer has won, it falls.) In DPO a sum over
    tokens does it: a longer answer has more of them to gain a lead with."""
    tables = []
    for weights in (grpo.per_answer, grpo.constant):
        log = guess_or_ramble(weights)
        tables.append(few(log[:15], "step length right guess ramble"))
    return table(tables[0], "length", "ramble"), table(tables[1])


def guess_or_ramble(weights_of, steps=60):
    """The first token decides what follows: a right answer of 10 tokens, a wrong guess of 4, or 40
    of rambling, as wrong. The gradient is exact: the mean over the three. -> log"""
    lengths = torch.tensor([10.0, 4.0, 40.0])
    answer = torch.arange(40) < lengths[:, None]                # (3, 40)
    weights = 3 * weights_of(answer.float(), 40)[:, 0]          # (3,) of the first token
    weights = weights / weights[0]                              # a right one moves equally in both
    theta = torch.tensor([-2.0, 0.0, -1.0], requires_grad=True)
    log = []
    for step in range(steps):
        pi = theta.softmax(0)                                   # (3,)
        A = torch.tensor([1.0, 0.0, 0.0]) - pi[0].detach()      # what each earns, less the mean
        loss = -(pi.detach() * weights * A * pi.log()).sum()
        gradient = torch.autograd.grad(loss, theta)[0]
        right, guess, ramble = pi.tolist()
        length = (pi * lengths).sum().item()
        log.append({"step": step, "length": length, "right": right, "guess": guess,
                    "ramble": ramble})
        theta.data -= 0.5 * gradient
    return log


# ---------------------------------------------------------------- distance

def kl_is_negative(init):
    """The true KL cannot be. What is logged is an estimate, the mean of log pi/ref over what was
    drawn. In a batch it may fall just below 0: harmless. If it stays there, what is drawn does not
    come from pi. Here the sampler forbids the end (a least length), and pi has learned to end
    sooner: every token that is still drawn is less likely under pi than under the reference."""
    generator = torch.Generator().manual_seed(0)
    before = []
    after = []
    for step, end in enumerate((0.10, 0.12, 0.2, 0.3, 0.4)):
        ref = torch.tensor([0.1, 0.3, 0.3, 0.3])                # the first token ends the answer
        pi = torch.tensor([end] + 3 * [(1 - end) / 3])
        forced = pi * torch.tensor([0.0, 1.0, 1.0, 1.0])
        for probs, rows in ((forced, before), (pi, after)):
            drawn = torch.multinomial(probs, 256, replacement=True, generator=generator)
            k1, k2, k3 = ppo.kl_estimates(pi.log()[drawn], ref.log()[drawn])   # (256,)
            exact = (pi * (pi / ref).log()).sum()
            rows.append({"step": step, "kl": k1.mean().item(), "k3": k3.mean().item(),
                         "true KL": exact.item()})
    return table(before, "kl"), table(after)


def which_kl(init):
    """As a loss, k1 = log pi/ref has the gradient of log pi, since ref is a constant; and the mean
    of that over pi's own draws is 0 whatever ref is. It is noise. k2 as a loss has the gradient of
    KL(pi || ref), k3 that of the other direction. k1 belongs in the reward: there its policy
    gradient is the right one."""
    columns = {name: pull_back(name) for name in ("k1", "k2", "k3", "reward")}
    before = []
    after = []
    for step in (0, 25, 50, 100, 199):
        before.append({"step": step, "KL, k1 as loss": columns["k1"][step]})
        after.append({"step": step, "k2 as loss": columns["k2"][step],
                      "k3 as loss": columns["k3"][step],
                      "k1 in the reward": columns["reward"][step]})
    return table(before, "KL, k1 as loss"), table(after)


def pull_back(estimator, steps=200):
    """pi over 8 tokens begins far from ref, and is pulled back by one estimator of the KL, on 64
    draws a step. -> the true KL, step by step"""
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.linspace(0, 1, 8).log_softmax(0)
    theta = torch.linspace(2, -1, 8).requires_grad_()
    kls = []
    for step in range(steps):
        log_pi = theta.log_softmax(0)                           # (8,)
        kls.append((log_pi.exp() * (log_pi - log_ref)).sum().item())
        drawn = torch.multinomial(log_pi.exp(), 64, replacement=True, generator=generator)
        logps = log_pi[drawn]                                   # (64,)
        k1, k2, k3 = ppo.kl_estimates(logps, log_ref[drawn])
        rewards = -k1.detach()
        losses = {"k1": k1, "k2": k2, "k3": k3, "reward": -(rewards - rewards.mean()) * logps}
        gradient = torch.autograd.grad(losses[estimator].mean(), theta)[0]
        theta.data -= 0.1 * gradient
    return kls


def kl_has_the_wrong_sign(init):
    """The penalty is added where it should be taken away (or the two log-probs are swapped): to be
    far from the reference now pays, and the KL runs away. A test: score every answer 0, and start
    from a model that has already moved; the KL must fall. (From the reference itself nothing
    moves: there k1 is 0, whatever its sign.) Take both log-probs at the sampling temperature and of
    the tokens drawn, else a KL is there before the first step."""
    flipped = planted("ppo.py", ("-beta * k1.masked_fill", "beta * k1.masked_fill"))
    tables = []
    for script in (flipped, ppo):
        log = climb(script, init, beta=0.5, steps=16)
        tables.append(few(log, "step score kl length"))
    return table(tables[0], "kl"), table(tables[1])


def climb(script, init, **settings):
    """Some steps of RLHF against a score that is easily climbed. -> log"""
    return script.train(climber(script, init, **settings), brevity)["log"]


def climber(script, init, **settings):
    """Settings of a short run on prompts of which nothing is known but their text."""
    config = script.Config(init=init, data=plain("prompts", "prompt", most=200), batch=32,
                           minibatch=32, algorithm="reinforce", max_new=32, lr=1e-3, penalty=0.0,
                           save=False, quiet=True)
    return replace(config, **settings)


def all_the_same(init):
    """Nothing but the score is paid for, here 1 for whatever begins with "I can't": the best policy
    says that always, to everybody. It is no failure of the optimiser: it is what was asked for.
    With a price on distance the best policy is ref exp(score / beta), which keeps what ref can say.
    `openings` counts different first words, three of each answer, as a share."""
    tables = []
    for beta in (0.0, 0.3):
        openings = []

        def score(prompts, answers):
            begun = {" ".join(answer.split()[:3]) for answer in answers}
            openings.append(len(begun) / len(answers))
            return [float(answer.startswith("I can't")) for answer in answers]
        log = ppo.train(climber(ppo, init, beta=beta, steps=30), score)["log"]
        for row, different in zip(log, openings[1:]):           # the first were the held-out ones
            row["openings"] = different
        tables.append(few(log, "step score kl openings"))
    return table(tables[0], "openings"), table(tables[1])


def entropy_runs(init):
    """It collapses: each step makes likelier what was drawn and paid, so luck decides which of four
    equally good tokens remains. It explodes: a bonus for entropy, or for anything that spreads,
    outweighs a reward that has no contrast left. With a price on distance both ends are closed: the
    best policy is known, and its entropy too. Here that is 1.42; four equals alone have ln 4 =
    1.39."""
    collapse = four_of_sixteen(bonus=0.0, beta=0.0)
    explode = four_of_sixteen(bonus=1.0, beta=0.0)
    leashed = four_of_sixteen(bonus=0.0, beta=0.15)
    before = []
    for row, other in zip(few(collapse, "step entropy"), few(explode, "step entropy reward")):
        before.append(row | {"with a bonus": other["entropy"], "its reward": other["reward"]})
    return table(before, "entropy", "with a bonus"), table(few(leashed, "step entropy reward"))


def four_of_sixteen(bonus, beta, steps=400):
    """REINFORCE over 16 tokens, the first 4 of which are right; the reference takes all alike, pi
    begins as one that has learned a little. -> log"""
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.zeros(16).log_softmax(0)
    theta = torch.zeros(16)
    theta[:4] = 2.0
    theta.requires_grad_()
    log = []
    for step in range(steps):
        log_pi = theta.log_softmax(0)
        entropy = -(log_pi.exp() * log_pi).sum()
        drawn = torch.multinomial(log_pi.exp(), 16, replacement=True, generator=generator)
        score = (drawn < 4).float()
        rewards = score - beta * (log_pi[drawn] - log_ref[drawn]).detach()     # (16,)
        A, _ = ppo.reinforce(rewards[:, None], None, torch.ones(16, 1))         # (16, 1)
        loss = -(A[:, 0] * log_pi[drawn]).mean() - bonus * entropy
        gradient = torch.autograd.grad(loss, theta)[0]
        log.append({"step": step, "entropy": entropy.item(), "reward": score.mean().item()})
        theta.data -= 2 * gradient
    return log


# ---------------------------------------------------------------- ratios, clips, critics

def first_ratio(init):
    """The answers were drawn from another distribution than the one that scores them: here at
    temperature 0.7, and scored at 1. Before the first step pi is pi_old, so what is off by more
    than rounding is a mistake, and the clip then cuts tokens that have not moved. The mean does not
    show it: at another temperature it still is 1 on average. Look at the largest. Other causes:
    top-p and top-k, another engine, dropout, a token lost or won when an answer was decoded."""
    policy, tokenizer = load(init)
    generator = torch.Generator().manual_seed(0)
    before = []
    after = []
    for step, (question, _) in enumerate(TALK[:4]):
        prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
        drawn = sample(policy, tokenizer, [prompt], 16, max_new=32, temperature=0.7,
                       generator=generator)
        for temperature, rows in ((1.0, before), (0.7, after)):
            with torch.no_grad():
                logps = token_logps(policy, *drawn[:3], temperature)            # (16, T)
            ratio = (logps - drawn.logps)[drawn.answer].exp()                   # (N,)
            clipped = ((ratio - 1).abs() > 0.2).float().mean()
            rows.append({"batch": step, "ratio": ratio.mean().item(), "least": ratio.min().item(),
                         "most": ratio.max().item(), "clipped": clipped.item()})
    return table(before, "most", "clipped"), table(after)


def never_clipped(init):
    """Each batch of answers makes one step, and in that step pi is pi_old: all ratios are 1, and
    there is nothing to clip. Harmless: the clip is for the second step on the same answers. If you
    take several and it is still 0, the log-probs that you call old are the new ones."""
    tables = []
    for epochs in (1, 4):
        log = climb(ppo, init, steps=8, epochs=epochs)
        tables.append(few(log, "step score ratio clipped"))
    return table(tables[0], "clipped"), table(tables[1])


def critic_is_lost(init):
    """The returns are large, and a critic moves little in a batch: its learning rate and its clip
    see to that. Scores near 20 then take a hundred batches to reach, and until then the advantages
    are returns in disguise. A loss that rises with the scores is no alarm by itself. Explained
    variance is the number: 1 is foresight, 0 a constant, below 0 is worse than a constant."""
    before = follow(scale=20.0)
    after = follow(scale=1.0)
    names = "batch critic_loss V return explained"
    return table(few(before, names), "critic_loss", "explained"), table(few(after, names))


def follow(scale, batches=30):
    """A critic of two weights learns returns of which it could foresee 8/9; scale 1 is what is left
    when scores are divided by their deviation and their mean is taken away. -> log"""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(2, requires_grad=True)
    answer = torch.ones(64, 1).bool()
    log = []
    for batch in range(batches):
        seen = torch.randn(64, generator=generator)             # what the critic can know
        luck = torch.randn(64, generator=generator)
        returns = scale * (seen + 0.35 * luck + (scale > 1))[:, None]          # (64, 1)
        inputs = torch.stack([seen, torch.ones(64)], dim=1)     # (64, 2)
        old_values = (inputs @ weights).detach()[:, None]
        for epoch in range(4):
            values = (inputs @ weights)[:, None]
            loss = ppo.value_loss(values, old_values, returns, answer, 0.2)
            gradient = torch.autograd.grad(loss, weights)[0]
            weights.data -= 0.05 * gradient.sign()              # Adam's first step, and no more
        explained = ppo.explained_variance(old_values, returns, answer)
        log.append({"batch": batch, "critic_loss": loss.item(), "V": old_values.mean().item(),
                    "return": returns.mean().item(), "explained": explained.item()})
    return log


# ---------------------------------------------------------------- models and measures

def batch_differs(init):
    """Prompts in a batch are padded on the left, and here the padding is looked at as if it were
    text. Others: padding on the right, so that the answer begins behind a hole; positions that
    count it. Answers that differ in the sixth digit of a log-prob (in bfloat16 in the third) are
    rounding, and harmless: now and then a greedy answer turns at such a tie."""
    policy, tokenizer = load(init)
    looks = planted("model.py", ("= mask[:, 0].all()", "= True"))
    wrong = looks.Transformer(policy.config)
    wrong.load_state_dict(policy.state_dict())
    questions = ["Hi!", "What is 2 + 3?", "Can you tell me a nice story about a dog, please?"]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    settings = {"max_new": 16, "temperature": 0}
    tables = []
    for module, model in ((looks, wrong), (network, policy)):
        together = module.sample(model, tokenizer, prompts, **settings)
        rows = []
        for i, prompt in enumerate(prompts):
            alone = module.sample(model, tokenizer, [prompt], **settings)
            first = together.logps[i][together.answer[i]][0] - alone.logps[alone.answer][0]
            rows.append({"asked": cut(questions[i], 14),
                         "first log pi off by": first.abs().item(),
                         "alone": cut(alone.texts[0], 20),
                         "in a batch": cut(together.texts[i], 20)})
        tables.append(rows)
    return table(tables[0], "first log pi off by"), table(tables[1])


def who_is_the_reference(init):
    """With adapters there is no second model: the reference is the same one with its adapters off.
    That is what lies below them. If SFT was an adapter, too, and was not merged, then it is the
    base and not your SFT model, and DPO begins with log-ratios that are not 0. And merging into
    weights of few bits rounds: what was added may be smaller than a step between two numbers."""
    base, tokenizer = load(init)
    config = dpo.Config(data=plain("preferences", "prompt chosen rejected"))
    pairs, _ = dpo.read_pairs(config, tokenizer, base.config.max_len)
    policy = with_adapter(base)                                 # SFT trained it
    merged = with_adapter(base)
    merge_lora(merged)
    rounded = copy.deepcopy(merged)
    for p in rounded.parameters():
        p.data = p.data.bfloat16().float()
    ids = torch.tensor([pairs[0].chosen.ids])
    rows = []
    for name, reference, bits, stored in (("adapters off", base, "16 bits", rounded),
                                          ("merged", merged, "32 bits", merged)):
        with torch.no_grad():
            chosen, rejected = dpo.log_ratios(policy, reference, pairs[:32], tokenizer)
            off = (stored(ids) - policy(ids)).abs().max().item()
        rows.append({"reference": name, "first loss": dpo.dpo(chosen, rejected, 0.5).mean().item(),
                     "chosen": chosen.mean().item(), "rejected": rejected.mean().item(),
                     "merged in": bits, "logits off by": f"{off:.6f}"})
    return table(rows[:1], "first loss", "logits off by"), table(rows[1:])


def with_adapter(base):
    """A copy of a model with an adapter that was trained; the same one each time."""
    policy = copy.deepcopy(base)
    torch.manual_seed(0)
    add_lora(policy, 4)
    for name, p in policy.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.02)
    return policy


def better_before(init):
    """Ten checkpoints that are all as good as each other are asked 64 questions. By luck one comes
    out ahead and one behind. Of n questions a rate is known to within 1/sqrt(n). So: intervals,
    more questions, the same ones for all (a difference on the same prompts is surer), and whichever
    wins is asked new ones before anybody believes it."""
    random_numbers = np.random.default_rng(0)
    tables = []
    for n in (64, 2000):
        right = random_numbers.random((11, n)) < 0.8            # the truth is 0.80 for all
        rates = right[:10].mean(1)                              # (10,)
        exams = {"best of ten": right[rates.argmax()], "worst of ten": right[rates.argmin()],
                 "the best, asked anew": right[10]}
        rows = []
        for name, answers in exams.items():
            rows.append({"checkpoint": name, "asked": n, "right": float(answers.mean()),
                         "+-": exam.half_width(answers)})
        tables.append(rows)
    return table(tables[0], "right"), table(tables[1])


def not_a_number(init):
    """A mean over nothing, a division by a deviation of 0, or a softmax in which all is forbidden.
    One such row is enough: nan times 0 is nan, so no mask takes it away afterwards, and the next
    step writes it into every weight."""
    nobody = torch.zeros(0)                                     # log-probs of no token
    equal = torch.full((1, 4), 0.3)                             # rewards of a group
    deviation = equal.std(1, keepdim=True, correction=0)
    forbidden = torch.full((1, 3), -torch.inf)                  # scores of attention
    padding = torch.tensor([[False, True]])                     # a row that begins with padding
    allowed = network.attention_mask(padding, 2)[0, 0]          # (2, 2)
    mended = torch.zeros(2, 2).masked_fill(~allowed, -torch.inf)
    before = [
        {"where": "the mean loss of a row without an answer", "value": (-nobody).mean().item()},
        {"where": "(r - mean) / std of equal rewards",
         "value": ((equal - equal) / deviation)[0, 0].item()},
        {"where": "softmax over a row of padding", "value": forbidden.softmax(-1)[0, 0].item()}]
    after = [
        {"where": "a sum, divided by the batch's count of tokens",
         "value": sft.sft_loss(nobody, count=5).item()},
        {"where": "advantages of equals are exactly 0",
         "value": grpo.group_advantages(equal)[0, 0].item()},
        {"where": "padding looks at itself", "value": mended.softmax(-1)[0, 0].item()}]
    return table(before, "value"), table(after)


# ---------------------------------------------------------------- the list

class Question(NamedTuple):
    title: str               # what they see
    answer: Callable         # init -> the log before, and after; its docstring: because
    file: str                # where the right way stands
    text: str                # in the line that has this text
    remember: str
    after: str = "after the cure"


QUESTIONS = [
    Question("DPO: rewards/chosen is negative and falls", chosen_falls,
             "dpo.py", "return -F.logsigmoid(beta * (chosen - rejected))\n",
             "DPO promises a lead, not a level; watch chosen beside rejected.",
             "if the level matters to you: a loss that has one (--loss sppo)"),
    Question("after fine-tuning the model never stops", never_stops,
             "model.py", "marks += [int(is_answer)] * len(body)",
             "The end token is a word of the answer: train it, and pad with another one."),
    Question("the KL is negative", kl_is_negative,
             "ppo.py", "k1 = logps - ref_logps",
             "Below 0 for a batch is luck; below 0 for long is another sampler.",
             "drawn from pi itself"),
    Question("GRPO's loss is 0, and yet it learns (or not)", loss_is_zero,
             "grpo.py", "advantages = rewards - rewards.mean(1, keepdim=True)",
             "Not the loss: watch reward, contrast and the gradient's length.",
             "the same with equal rewards: now it does not learn"),
    Question("reward_std is 0: groups without contrast", no_contrast,
             "grpo.py", "return rewards.amax(1) > rewards.amin(1)",
             "A group of equals has no signal: leave it out, its KL too, and draw another.",
             "groups without contrast are left out, their KL too"),
    Question("which KL estimator? k1 as a loss does nothing", which_kl,
             "ppo.py", "rewards = -beta * k1.masked_fill(~answer, 0.0)",
             "k1 in the reward, k2 in the loss; k1 as it is never in the loss."),
    Question("the first ratio is not 1", first_ratio,
             "model.py", "states = states / temperature",
             "Score the distribution that was sampled; then the first ratio is 1 exactly."),
    Question("gradient accumulation gives another loss than a large batch", accumulation_differs,
             "sft.py", "return -logps.sum() / count",
             "Sum over the part, divide by the tokens of the whole batch."),
    Question("the reward model stays at 50-60%", judge_is_a_coin,
             "reward_model.py", "if longest(comparison) <= context:",
             "Read one pair as the judge sees it, before you touch the learning rate."),
    Question("the reward rises, and every answer becomes the same", all_the_same,
             "ppo.py", "rewards = token_rewards(scores, old_logps, ref_logps, answer, beta)",
             "The best policy for a score alone says one thing; distance must cost.",
             "with a price on distance (beta 0.3)"),
    Question("entropy collapses, or explodes", entropy_runs,
             "ppo.py", "rewards = -beta * k1.masked_fill(~answer, 0.0)",
             "Do not steer entropy: give the policy an aim whose entropy you want.",
             "with a price on distance"),
    Question("the sign of the KL in the reward; whose log-probs?", kl_has_the_wrong_sign,
             "ppo.py", "rewards = -beta * k1.masked_fill(~answer, 0.0)",
             "Reward minus beta times (log pi - log ref), both of the tokens pi drew."),
    Question("DPO's loss stays at 0.6931, all rewards are 0.0", loss_stays,
             "dpo.py", "if longest(pair) <= context:",
             "At step 0 it is right; at step 1 ask what log pi of an answer is a sum of."),
    Question("answers in a batch differ from answers alone", batch_differs,
             "model.py", "before = mask[:, None, None, :] & (key <= query)",
             "Padding on the left, masked, and not counted: then a batch rounds, no more."),
    Question("the format reward rises, accuracy does not", form_without_truth,
             "grpo.py", "return 0.1                     # wrong, but in a form",
             "Form may pay a little, and the truth must pay for itself."),
    Question("answers grow longer and longer", longer_and_longer,
             "grpo.py", "return answer / (len(answer) * most)",
             "Divide by a constant: then a wrong token costs the same in any answer."),
    Question("the loss is nan", not_a_number,
             "model.py", "return before | (key == query)",
             "Mask before arithmetic, never after: nan times 0 is nan."),
    Question("the model answers for the user, too", speaks_for_the_user,
             "model.py", "marks += [0] * len(head)",
             "Loss on answers alone, and stop at the end token of your template."),
    Question("LoRA: who is the reference; merging changes the answers", who_is_the_reference,
             "data/run.py", 'parametrize.remove_parametrizations(module, "weight")',
             "Merge the first adapter, in full precision, before the second one begins."),
    Question("it was better before: which checkpoint do I keep?", better_before,
             "data/exam.py", "return mean(rises), half_width(rises)",
             "64 questions know a rate to +-0.10: the best of ten is mostly luck.",
             "the same with more questions"),
    Question("the training loss falls in stairs, one an epoch", stairs,
             "data/run.py", "train = [row for row, name in zip(rows, names) if name not in apart]",
             "Stairs are memory: keep the checkpoint at which held-out loss is lowest.",
             "as many steps on five times the rows, each seen once"),
    Question("answers are worse in use than in training (BOS twice)", other_template,
             "model.py", 'start = [special(tokenizer, START)] + tokenizer.encode_ordinary("assist',
             "One function writes the prompt, in training and in use; compare the ids."),
    Question("the critic's loss rises; explained variance is 0", critic_is_lost,
             "ppo.py", "clipped = V_old + (V - V_old).clamp(-eps, eps)",
             "Scale the scores to deviation 1; judge a critic by explained variance.",
             "scores with mean 0 and deviation 1"),
    Question("clip_ratio is always 0", never_clipped,
             "ppo.py", "clipped = rho.clamp(1 - eps, 1 + eps)",
             "One step a batch: nothing to clip. It begins with the second.",
             "four steps on each batch"),
    Question("DPO's accuracy is only ever 0 or 1", accuracy_jumps,
             "dpo.py", "return (ahead + even / 2).mean().item()",
             "The share of one pair is 0 or 1; ask held-out pairs, with an interval.",
             "batches of 32"),
]


def line_of(file, text):
    """Where the text stands, once. -> file:line, and the line"""
    found = []
    whole = (HERE / file).read_text(encoding="utf-8")
    for number, line in enumerate(whole.splitlines(keepends=True), start=1):
        if text in line:
            found.append((f"{file}:{number}", line.strip()))
    if len(found) != 1:
        raise UserError(f"{file}: want {text!r} in one line, found it in {len(found)}")
    return found[0]


def answer_to(number, init):
    """All that is printed of a question. -> text of at most 80 columns"""
    question = QUESTIONS[number - 1]
    before, after = question.answer(init)
    because = " ".join(inspect.getdoc(question.answer).split())
    place, line = line_of(question.file, question.text)
    lines = [f"{number}. {question.title}", "", before, ""]
    lines += textwrap.wrap(because, 78, initial_indent="because  ", subsequent_indent="  ")
    code = line.split("  #")[0].rstrip()
    lines += ["", f"{place}  {code}"[:80], "", question.after, after, ""]
    lines += textwrap.wrap(question.remember, 78, initial_indent="remember  ",
                           subsequent_indent="  ")
    return "\n".join(lines)


def put(number, text, page):
    """The page with this text in the block between <!-- output 7 --> and <!-- end -->."""
    start = f"<!-- output {number} -->"
    before, mark, rest = page.partition(start)
    old, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise UserError(f"{PAGE.name}: want {start} and <!-- end --> behind it")
    return f"{before}{start}\n```\n{text}\n```\n{end}{after}"


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m lessons.questions", allow_abbrev=False)
    parser.add_argument("which", nargs="?", default="", help="a number, or all (none: the list)")
    parser.add_argument("--init", default="out/sft", help="the model that most start from")
    parser.add_argument("--page", action="store_true", help="write it into the page, too")
    options = parser.parse_args(arguments)
    numbers = range(1, len(QUESTIONS) + 1)
    if options.which == "":
        for number in numbers:
            print(f"{number:>3}  {QUESTIONS[number - 1].title}")
        return
    if options.which != "all":
        if options.which not in map(str, numbers):
            raise UserError(f"{options.which}: want a number from 1 to {len(QUESTIONS)}, or all")
        numbers = [int(options.which)]
    need(options.init)
    for number in numbers:
        text = answer_to(number, options.init)
        print(text + "\n", flush=True)
        if options.page:
            page = put(number, text, PAGE.read_text(encoding="utf-8"))
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    with exit_codes():
        main(sys.argv[1:])
