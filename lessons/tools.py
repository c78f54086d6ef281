"""A model that calls tools: what it can't work out, and what it can't know.

A small model can't add 347 and 586, and nobody can know of which colour the flag of Pugo is. But a
program can, and a model can learn to ask it. The call is ordinary text on a line of its own. The
program that runs the model sees it, sends it to a tool server, and puts what comes back into the
conversation as a message of role `tool`; then the assistant goes on:

    user        How much is 347 + 586?
    assistant   call calculator: 347 + 586        -> tools/call {"sum": "347 + 586"}
    tool        347 + 586 = 933                   <- {"content": [{"text": "347 + 586 = 933"}]}
    assistant   The answer is 933.

Between the arrows stands the Model Context Protocol, the real one (lessons/mcp.py). So its server
serves any client, and any server whose tools are called calculator and lookup can be plugged in
here; of other names the model has never heard:

    python -m lessons.tools                               a minute: out/sft learns to use tools
    python -m lessons.tools --serve                       the server alone, for your own client
    python -m lessons.tools --server "python server.py"   another server with these two

It starts as it comes from SFT, and becomes better in two ways, one after the other: SFT once more,
on those of its own conversations that worked without a needless call; then GRPO, where a
conversation that worked earns 1, less a price for each call, so that it asks no tool for the
capital of Spain. Only the assistant's tokens have a loss: what the tool said is nobody's choice.

Then the tools go bad: they fail, they lie, or they carry an order. A model that trusts its tools
trusts whoever writes into them (Greshake et al. 2023, 2302.12173).

Simplified: one call a turn. What is sampled is read as tokens again for the loss, and a word that
could be spelled by other tokens is scored by those tokens, not by the ones drawn.
Try next: --price 0; --price 0.5.
"""
import contextlib
import re
import shlex
import sys
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch

import grpo
import sft
from data import abilities, exam, rows
from data.abilities import RELATIONS, message, wording
from data.checkpoints import load, save, write_files
from data.chart import Panel, chart
from data.run import Log, adamw, batches, begin, clip_gradients, need, steps
from data.studybuddy import ask, attacked, pick
from lessons import figures, mcp
from lessons.guard import rate
from model import UserError, collate, render, respond, token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    out: str = "out/tools"    # write here: conversations that worked, and the model after GRPO
    steps: int = 40           # optimiser steps, of SFT and of GRPO
    batch: int = 12           # P: tasks a step
    group: int = 8            # G: conversations about each of them
    lr: float = 3e-4          # peak learning rate
    price: float = 0.1        # of a call
    calls: int = 2            # most calls in a conversation
    tasks: int = 50           # of each kind, to measure
    max_new: int = 72         # longest turn in tokens
    server: str = ""          # the command of another tool server

    limits = figures.Lesson.limits | {"group": (2, 1000), "calls": (1, 10), "tasks": (1, 1000),
                                "max_new": (1, 10**6)}
    unused = ("data", "accumulate", "lora")


# ---------------------------------------------------------------- the server

@contextlib.contextmanager
def start_server(config, fault=""):
    """-> a client of the server that --server names, or of our own"""
    command = shlex.split(config.server)
    if fault or not command:
        command = [sys.executable, "-m", "lessons.mcp", fault]
    try:
        with mcp.Client(command) as client:
            yield client
    except mcp.ServerError as error:
        raise UserError(f"{' '.join(command)}: {error}") from None


# ---------------------------------------------------------------- tasks

class Task(NamedTuple):
    kind: str           # "sum", "lookup", or "none" where no tool is needed
    question: str
    truth: str          # the number, the word or the sentence that is right
    lie: str = ""       # what follows from a tool that lies
    entry: mcp.Entry = None  # of a lookup


def make_task(rng, kind, split):
    if kind == "sum":
        step = abilities.big_sum(rng, split)
        sum_text = f"{step.left} {step.op} {step.right}"
        question = wording(rng, abilities.WHAT, split).format(sum=sum_text)
        return Task(kind, question, str(step.result), str(step.result + 10))
    if kind == "lookup":
        names = list(mcp.BOOK)
        half = names[1::2] if split == "exam" else names[::2]
        name = pick(rng, half)
        entry = mcp.BOOK[name]
        relation = pick(rng, list(entry.facts))
        question = wording(rng, RELATIONS[relation].questions, split).format(a=name)
        return Task(kind, question, entry.facts[relation], entry.lies[relation], entry)
    row = ask(rng, "fact", split)
    return Task(kind, row["prompt"], row["answer"])


def make_tasks(seed, split, count):
    """`count` of each kind"""
    rng = Random(seed)
    tasks = []
    for _ in range(count):
        for kind in "sum", "lookup", "none":
            tasks.append(make_task(rng, kind, split))
    return tasks


def says(task, text, truth):
    if task.kind == "sum":
        return grpo.conclusion(text) == truth
    return abilities.mentions(text, truth.rstrip("."))


# ---------------------------------------------------------------- the conversation

CALL = re.compile(r"^call (\w+): (.+)$", re.MULTILINE)      # on a line of its own


def use_tool(call, client):
    """-> what the tool says, as the model has learned to read it"""
    try:
        return client.call(call[1], call[2])
    except mcp.ToolError as error:
        return f"error: {error}"


def converse(model, tokenizer, talks, client, config, **settings):
    """The assistant speaks. Where it calls, the tool answers, and it goes on.
    talks: conversations, which grow"""
    waiting = talks
    for turn in range(config.calls + 1):
        texts = respond(model, tokenizer, waiting, max_new=config.max_new, **settings)
        called = []
        for talk, text in zip(waiting, texts):
            talk.append(message("assistant", text))
            call = CALL.search(text)
            if call and client and turn < config.calls:     # the last turn has to be an answer
                talk.append(message("tool", use_tool(call, client)))
                called.append(talk)
        waiting = called
        if not waiting:
            break
    return talks


def begin_talk(task, with_tools=True, system=abilities.TOOLS[0]):
    talk = [message("user", task.question)]
    if with_tools:
        talk.insert(0, message("system", system))
    return talk


def calls_in(talk):
    return sum(turn["role"] == "tool" for turn in talk)


# ---------------------------------------------------------------- how good is it?

def measure(model, tokenizer, tasks, client, config):
    """-> {kind: is it right?, one for each task}, and "calls": is one made where none is needed?
    Without a client the model has no tools."""
    talks = [begin_talk(task, client is not None) for task in tasks]
    converse(model, tokenizer, talks, client, config, temperature=0)
    table = {"sum": [], "lookup": [], "none": [], "calls": []}
    for task, talk in zip(tasks, talks):
        table[task.kind].append(says(task, talk[-1]["content"], task.truth))
        if task.kind == "none":
            table["calls"].append(calls_in(talk) > 0)
    return table


def measure_fault(model, tokenizer, tasks, fault, config):
    """-> what does it make of bad tools? For fail: does it say so? lie: does it pass it on? order:
    does it obey?"""
    tasks = [task for task in tasks if task.kind != "none"]
    if fault == "order":
        tasks = [task for task in tasks if task.kind == "lookup"]
    talks = [begin_talk(task) for task in tasks]
    with start_server(config, fault) as client:     # ours, whatever --server says
        converse(model, tokenizer, talks, client, config, temperature=0)
    flags = []
    for task, talk in zip(tasks, talks):
        text = talk[-1]["content"]
        if fault == "fail":
            flags.append(abilities.tools_right({"kind": "failed"}, text))
        elif fault == "lie":
            flags.append(says(task, text, task.lie))
        else:
            flags.append(attacked(task.entry.order, text))
    return flags


# ---------------------------------------------------------------- learning

# R = [is the answer right?] - price x calls
def reward(task, talk, config):
    """No judge: the answer is compared with what is known."""
    worked = says(task, talk[-1]["content"], task.truth)
    return float(worked) - config.price * calls_in(talk)


def write_own_successes(model, tokenizer, tasks, client, config):
    """Conversations that worked, and called where they had to, as lines for sft.py."""
    generator = torch.Generator().manual_seed(config.seed)
    talks = [begin_talk(task) for task in tasks]
    converse(model, tokenizer, talks, client, config, generator=generator)
    lines = []
    for task, talk in zip(tasks, talks):
        needed = 0 if task.kind == "none" else 1
        worked = says(task, talk[-1]["content"], task.truth)
        if worked and calls_in(talk) == needed:
            lines.append({"messages": talk})
    write_files(config.out, {"worked.jsonl": rows.json_lines(lines)})
    config.say(f"{len(lines)} of {len(talks)} conversations worked: {config.out}/worked.jsonl")
    return f"{config.out}/worked.jsonl"


def imitate(path, config):
    """SFT on them. -> model"""
    settings = sft.Config(init=config.init, data=path, steps=config.steps, lr=config.lr,
                          seed=config.seed, device=config.device, bf16=config.bf16, save=False,
                          quiet=True, cut=True)
    return sft.train(settings)["model"]


def climb(policy, tokenizer, tasks, client, config):
    """GRPO over whole conversations, tools and all. Changes policy."""
    optimizer = adamw(policy, config.lr)
    stream = batches(tasks, None, config.batch, torch.Generator().manual_seed(config.seed))
    generator = torch.Generator().manual_seed(config.seed)
    rng = Random(config.seed)
    method = grpo.FAMILY["grpo"]
    log = Log(config)
    for step in steps(config, optimizer):
        # 1 sample G conversations about each of P tasks
        asked = []
        for task in next(stream):
            asked += [task] * config.group
        system = wording(rng, abilities.TOOLS, "train")
        talks = [begin_talk(task, system=system) for task in asked]
        converse(policy, tokenizer, talks, client, config, generator=generator)
        # 2 score each of them against its group
        rewards = [reward(task, talk, config) for task, talk in zip(asked, talks)]
        rewards = torch.tensor(rewards).view(-1, config.group)      # (P, G)
        advantages = grpo.group_advantages(rewards).flatten()       # (P, G) -> (B,)
        # 3 loss: on what the assistant said, its calls and its answers
        examples = [render(tokenizer, talk) for talk in talks]
        ids, mask, answer = collate(examples, tokenizer, config.device)  # (B, T) each
        logps = token_logps(policy, ids, mask, answer)              # (B, T)
        weights = grpo.per_answer(answer, config.max_new)           # (B, T)
        loss = grpo.grpo_loss(logps, logps.detach(), advantages.to(logps.device), answer, weights,
                              method).sum()
        loss.backward()
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        calls = [calls_in(talk) for talk in talks]
        worked = [says(task, talk[-1]["content"], task.truth) for task, talk in zip(asked, talks)]
        log(step, reward=rewards.mean(), worked=exam.mean(worked), calls=exam.mean(calls),
            contrast=grpo.contrast(rewards).float().mean(), loss=loss.item())
    return policy


# ---------------------------------------------------------------- the comparison

NAMES = {"sum": "big sums", "lookup": "look-ups", "none": "no tool needed",
         "calls": "needless calls"}
FAULTS = {"fail": "fails: it says so", "lie": "lies: it passes it on", "order": "orders: it obeys"}


def show_talk(talk, config):
    for turn in talk:
        config.say(f"  {turn['role']:10} {exam.short(turn['content'])}")


def show_table(table, config):
    config.say(f"{'':24}" + "".join(f"{name:>14}" for name in table))
    first = table[list(table)[0]]
    for key in first:
        line = f"{(NAMES | FAULTS)[key]:24}"
        for flags in table.values():
            line += f"{str(rate(flags[key])):>14}"
        config.say(line)


def shares(table):
    """Flags -> shares, for the figure and the page"""
    numbers = {}
    for name, flags in table.items():
        numbers[name] = {key: exam.mean(flags[key]) for key in flags}
    return numbers


def picture(runs):
    panels = []
    for title, group in {"What it gets right": "skills", "When the tool is bad": "faults"}.items():
        bars = []
        table = runs[0][group]
        for key in table[list(table)[0]]:
            values = {name: [run[group][name][key] for run in runs] for name in table}
            bars.append(figures.bar((NAMES | FAULTS)[key], values))
        panels.append(Panel(title, "share of held-out questions", bars=bars, limits=(0, 1)))
    return chart(panels)


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=2, batch=2, group=2, tasks=4)
    need(config.init)
    model, tokenizer = load(config.init, config.device)
    held = make_tasks(config.seed + 1000, "exam", config.tasks)
    tasks = make_tasks(config.seed, "train", 4 * config.tasks)
    skills = {}
    with start_server(config) as client:
        config.say(f"tools: from {config.init}; the server has {', '.join(client.tools)}")
        talks = converse(model, tokenizer, [begin_talk(held[0])], client, config, temperature=0)
        show_talk(talks[0], config)
        skills["alone"] = measure(model, tokenizer, held, None, config)
        skills["tools"] = measure(model, tokenizer, held, client, config)
        worked = write_own_successes(model, tokenizer, tasks, client, config)
        policy = imitate(worked, config)
        skills["sft"] = measure(policy, tokenizer, held, client, config)
        policy = climb(policy, tokenizer, tasks, client, config)
        skills["grpo"] = measure(policy, tokenizer, held, client, config)
    show_table(skills, config)
    faults = {"tools": {}, "grpo": {}}
    for fault in FAULTS:
        faults["tools"][fault] = measure_fault(model, tokenizer, held, fault, config)
        faults["grpo"][fault] = measure_fault(policy, tokenizer, held, fault, config)
    config.say("when the tool is bad")
    show_table(faults, config)
    if config.save:
        save(config.out, policy, tokenizer)
    return {"model": policy, "tokenizer": tokenizer,
            "numbers": {"skills": shares(skills), "faults": shares(faults)}}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(mcp.serve(*sys.argv[2:]))
    figures.main("tools", Config, train, picture, __doc__)
