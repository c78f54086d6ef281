"""Constitutional AI (CAI): a model that improves itself by a few written principles.

RLHF needs thousands of human verdicts about harm. Here people write principles, and nothing else.
First the model answers attacks, criticises its answers by a principle, mends them, and learns the
mended ones (SL-CAI). Then the first model compares two answers of this one by a principle, and it
learns from the verdicts (RLAIF: RL from AI feedback). A judge tends to favour one of the letters A
and B, so it is asked in both orders, and its label p for two answers a and b is a probability:

    p = P(a is better) = 1/2 [ P("A" | a at A, b at B) + P("B" | b at A, a at B) ]
    L = - p log sigma(h) - (1 - p) log sigma(-h)
    h = beta [ log pi(a|x)/pi_ref(a|x)  -  log pi(b|x)/pi_ref(b|x) ]

By hand: with a at A the judge says "A" with 0.9, with a at B it says "B" with 0.5, so p = 0.7.
pi starts as pi_ref, the SL-CAI model: h = 0, and L = ln 2 = 0.693. L is least, 0.611, where
sigma(h) = 0.7: a judge that is unsure wants a small h. (A hard label would pull as hard at 0.51 as
at 0.99, and never end.)

    python cai.py                             out/sft -> out/cai, by data/constitution.json
    python cai.py --constitution mine.json    by yours, a list of {"id": ..., "principle": ...}
    python cai.py --data mine.jsonl --init SmolLM2-135M-Instruct --lr 1e-5 --sl-lr 1e-5 --out mine
    python -m lessons.constitution            what each principle buys, and who judges the judge

A line of mine.jsonl is {"prompt": "..."}, and {"prompt": "...", "attack": true} where it is an
attack; both kinds are needed. Put your model's words for "no flaw" into NOTHING first, else every
answer is mended in every round. What it learned from stands in out/cai/revisions.jsonl and
out/cai/verdicts.jsonl: sft.py, dpo.py and reward_model.py read them, the last two without p: they
learn who won, not by how much. Apart from that, the paper's own RLAIF is

    python reward_model.py --data out/cai/verdicts.jsonl --init out/cai/sl --out out/cai/judge
    python ppo.py --init out/cai/sl --reward out/cai/judge --out out/cai/ppo

Simplified from Bai et al. 2022 (2212.08073): the SFT model stands for a helpful-only RLHF model,
there are no human labels of helpfulness, no chain of thought, and DPO takes the place of PPO.
Try next: a principle of your own; --revisions 1; --order first.
"""
import copy
import itertools
import json
import math
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import exam, rows
from data.checkpoints import load, save, write_files
from data.studybuddy import COMPARE, CRITIQUE, CRITIQUES, REVISE, flat
from data.run import (Log, Settings, adamw, add_lora, average, batches, begin, clip_gradients, main,
                      merge_lora, need, parts, steps)
from model import (Example, UserError, collate, render_answer, render_prompt, respond, sample,
                   token_logps)


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt", some of them with "attack"
    out: str = "out/cai"      # write here
    steps: int = 45           # optimiser steps on the verdicts
    lr: float = 3e-4          # peak learning rate on the verdicts
    constitution: str = "data/constitution.json"  # a list of {"id", "principle"}
    order: str = "draw"       # of the principles: draw (by lot), or first (as in the file)
    answers: int = 2          # first answers to each red-team prompt
    revisions: int = 4        # rounds of critique and revision, at most
    sl_steps: int = 60        # optimiser steps on the mended answers
    sl_lr: float = 5e-4       # peak learning rate on the mended answers
    pairs: int = 768          # pairs of answers to judge, at most: equal ones are left out
    beta: float = 0.1         # the larger, the closer it stays to the SL-CAI model
    temperature: float = 0.7  # of sampling: at 1 a tiny model makes typos, which then decide
    max_new: int = 48         # longest sampled answer in tokens

    limits = Settings.limits | {"answers": (1, 100), "revisions": (1, 100), "sl_steps": (1, 10**6),
                                "pairs": (2, 10**6), "temperature": (0.01, 100),
                                "max_new": (1, 10**4)}


# ---------------------------------------------------------------- the maths

# p = 1/2 [P("A" | a at A) + P("B" | a at B)], and P("B") is 1 - P("A"): see judge
def preference(a_first, b_first):
    """P("A") when a stands at A, and when b does, (N,) each -> P(a is better) (N,). A judge that
    always says A gets 1/2."""
    return (a_first + 1 - b_first) / 2


# L = - p log sigma(h) - (1 - p) log sigma(-h)
# DPO (Rafailov et al. 2023, 2305.18290, eq. 7) for labels that are probabilities
def soft_label_loss(h, p):
    """h, p (B,) -> (B,)"""
    return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)


# ---------------------------------------------------------------- critique, revise, judge
# SEAM: how to ask depends on the model. Ours has read people argue on the web in the words of
# CRITIQUE, REVISE and COMPARE (data/studybuddy.py). A critique that begins with one of NOTHING
# finds no flaw; a model that says it otherwise needs other words here: ("No changes", "This is
# fine"). With longer questions of your own, count `between` in read_prompts() anew.

NOTHING = tuple(CRITIQUES[None])


@dataclass
class Draft:
    """An answer and its history."""
    prompt: rows.Prompt
    first: str               # what the model said at first
    text: str                # what it is now
    # of each round that mended it: (principle, critique, revision)
    flaws: list = field(default_factory=list)
    order: list = None       # the principles, as they are tried on it


def turns(prompt, *texts):
    """A prompt, then answer, request, answer, ... -> messages"""
    messages = list(prompt)
    for i, text in enumerate(texts):
        messages.append({"role": "user" if i % 2 else "assistant", "content": text})
    return messages


def critique(model, tokenizer, drafts, principles):
    """What is wrong with each draft by its principle, in the model's likeliest words. -> texts
    One that is cut off at 24 tokens counts as a flaw, too, unless it begins with NOTHING."""
    chats = []
    for draft, principle in zip(drafts, principles):
        chats.append(turns(draft.prompt.messages, draft.text, CRITIQUE.format(principle=principle)))
    return respond(model, tokenizer, chats, max_new=24, temperature=0.0)


def revise(model, tokenizer, flawed, max_new):
    """[(draft, principle, critique)] -> the same conversation goes on: mend it. -> texts, empty
    where the revision did not come to an end"""
    prompts = []
    for draft, principle, complaint in flawed:
        request = CRITIQUE.format(principle=principle)
        chat = turns(draft.prompt.messages, draft.text, request, complaint, REVISE)
        prompts.append(render_prompt(tokenizer, chat))
    drawn = sample(model, tokenizer, prompts, max_new=max_new, temperature=0.0)
    return [text if ended else "" for text, ended in zip(drawn.texts, drawn.ended)]


def improve(model, tokenizer, drafts, principles, config, generator):
    """Critique and revision, round by round. A draft without a flaw is finished."""
    for _ in range(config.revisions):
        flawed = first_flaws(model, tokenizer, drafts, principles, config, generator)
        if not flawed:
            return
        texts = revise(model, tokenizer, flawed, config.max_new)
        for (draft, principle, complaint), text in zip(flawed, texts):
            if text:
                draft.flaws.append((principle, complaint, text))
                draft.text = text
        drafts = [draft for draft, _, _ in flawed]


def first_flaws(model, tokenizer, drafts, principles, config, generator):
    """The principles are tried in turn until the critic finds a flaw, for each draft in an order of
    its own, drawn anew in each round. -> [(draft, principle, critique)] of those with a flaw"""
    for draft in drafts:
        draft.order = in_order(principles, config, generator)
    waiting = drafts
    flawed = []
    for k in range(len(principles)):
        if not waiting:
            break
        asked = [draft.order[k] for draft in waiting]
        complaints = critique(model, tokenizer, waiting, asked)
        fine = []
        for draft, principle, complaint in zip(waiting, asked, complaints):
            if complaint.startswith(NOTHING):
                fine.append(draft)
            else:
                flawed.append((draft, principle, complaint))
        waiting = fine
    return flawed


def in_order(principles, config, generator):
    """Which principle comes first? In the paper each answer, and each pair, draws one."""
    if config.order == "first":
        return list(principles)
    return [principles[i] for i in torch.randperm(len(principles), generator=generator)]


@torch.no_grad()
def judge(model, tokenizer, conversations, firsts, seconds, principles):
    """P("A") for two answers to each conversation, the first of them at A. -> (N,)
    The reply is one token, and its probability says more than a sample. All tokens but A and B are
    left out, so that P("B") is 1 - P("A")."""
    questions = []
    for messages, first, second, principle in zip(conversations, firsts, seconds, principles):
        text = COMPARE.format(prompt=flat(messages), a=first, b=second, principle=principle)
        ids = render_prompt(tokenizer, [{"role": "user", "content": text}])
        marks = [0] * (len(ids) - 1) + [1]      # no answer: where to read, just before the letter
        questions.append(Example(ids, marks))
    letters = [tokenizer.encode_ordinary(letter)[0] for letter in "AB"]
    p = []
    for part in parts(questions, math.ceil(len(questions) / 128)):  # about 128 at a time
        ids, mask, last = collate(part, tokenizer, model.embed.weight.device)  # (B, T) each
        logits = model.head(model.hidden(ids, mask, at=last))   # (B, V)
        letter = logits[:, letters].float().softmax(-1)         # (B, 2), of A and B
        p.append(letter[:, 0])                                  # (B,)
    return torch.cat(p)


def both_orders(model, tokenizer, conversations, a, b, principles, config):
    """Each pair of answers is judged twice, under the same principle. -> P(a is better), (N,)"""
    a_first = judge(model, tokenizer, conversations, a, b, principles)  # (N,) a stands at A
    b_first = judge(model, tokenizer, conversations, b, a, principles)  # (N,) b stands at A
    config.say(f"{len(a)} pairs: P(a is better) is {a_first.mean():.2f} with a at A, "
               f"{1 - b_first.mean():.2f} with a at B")
    return preference(a_first, b_first)


# ---------------------------------------------------------------- data

class Verdict(NamedTuple):
    a: Example               # tokens of a prompt and of one answer
    b: Example               # tokens of the prompt and of another answer
    p: float                 # how probable the judge finds it that a is better
    line: dict               # the same as JSON; there "p" is the winner's, so 1/2 or more


def longest(verdict):
    return max(len(verdict.a.ids), len(verdict.b.ids))


def read_prompts(config, tokenizer, context, principles):
    """-> red-team prompts, those with "attack" in their line, and all others"""
    most = max(len(tokenizer.encode_ordinary(principle)) for principle in principles)
    between = 70        # tokens of a critique, CRITIQUE and REVISE (or COMPARE), and of their turns
    room = context - 2 * config.max_new - most - between
    red, plain = [], []
    for prompt in rows.read_prompts(config.data):
        if len(render_prompt(tokenizer, prompt.messages)) > room:
            raise UserError(f"{prompt.where}: want at most {room} tokens, or the model's {context} "
                            "leave no room to criticise and mend the answer")
        if prompt.row.get("attack"):
            red.append(prompt)
        else:
            plain.append(prompt)
    if not red or not plain:
        raise UserError(f'{config.data}: want prompts with "attack" (red-teaming), others without')
    return red, plain


def own_answers(model, tokenizer, prompts, n, config, generator):
    """n answers to each prompt -> [(prompt, [texts])]. Where one is empty or did not end, the
    prompt is left out."""
    ids = [render_prompt(tokenizer, prompt.messages) for prompt in prompts]
    drawn = sample(model, tokenizer, ids, n, config.max_new, config.temperature,
                   generator=generator)
    answered = []
    for i, prompt in enumerate(prompts):
        texts = drawn.texts[i * n:(i + 1) * n]
        ended = drawn.ended[i * n:(i + 1) * n]
        if all(texts) and ended.all():
            answered.append((prompt, texts))
    if not answered:
        raise UserError(f"no answer of the model ends within --max-new {config.max_new} tokens")
    return answered


def compare(model, tokenizer, pairs, principles, config, generator):
    """[(prompt, [a, b])] -> Verdicts, each under one principle. Equal answers teach nothing."""
    prompts = []
    firsts = []
    seconds = []
    for prompt, (a, b) in pairs:
        if a != b:
            prompts.append(prompt)
            firsts.append(a)
            seconds.append(b)
    if not prompts:
        raise UserError("the model always gives the same answer twice: there is nothing to compare")
    conversations = [prompt.messages for prompt in prompts]
    one_each = [in_order(principles, config, generator)[0] for _ in prompts]
    p = both_orders(model, tokenizer, conversations, firsts, seconds, one_each, config)
    verdicts = []
    for prompt, a, b, p_a in zip(prompts, firsts, seconds, p.tolist()):
        line = prompt.row | {"chosen": a, "rejected": b, "p": p_a}
        if p_a < 0.5:
            line |= {"chosen": b, "rejected": a, "p": 1 - p_a}
        example_a = render_answer(tokenizer, prompt.messages, a)
        example_b = render_answer(tokenizer, prompt.messages, b)
        verdicts.append(Verdict(example_a, example_b, p_a, line))
    return verdicts


def answer_logps(model, verdicts, tokenizer):
    """log pi(y|x) of both answers, summed over their tokens; one pass for both, so that the prompt
    they share is computed once. DPO asks how likely they are, not how they were drawn, so the
    temperature is 1. -> two of (B,)"""
    examples = []
    for verdict in verdicts:
        examples.append(verdict.a)
        examples.append(verdict.b)
    ids, mask, answer = collate(examples, tokenizer, model.embed.weight.device)  # (2B, T) each
    logps = token_logps(model, ids, mask, answer).sum(1)        # (2B,)
    return logps[0::2], logps[1::2]


def log_ratios(policy, reference, verdicts, tokenizer):
    """log pi(y|x) / pi_ref(y|x) of both answers. -> two of (B,)"""
    a, b = answer_logps(policy, verdicts, tokenizer)
    with torch.no_grad():
        ref_a, ref_b = answer_logps(reference, verdicts, tokenizer)
    return a - ref_a, b - ref_b


def save_lines(config, name, lines):
    if config.save:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_files(config.out, {name: text})


# ---------------------------------------------------------------- what a run shows

def show_draft(draft, config):
    """An answer, and each critique that led to a revision. A round that found nothing, or whose
    revision was cut off, is not kept."""
    lines = [("prompt", flat(draft.prompt.messages)), ("answer", draft.first)]
    for principle, complaint, revision in draft.flaws:
        lines += [("principle", principle), ("critique", complaint), ("revision", revision)]
    for name, text in lines:
        config.say(textwrap.fill(f"{name:>9}  {text}", 79, subsequent_indent=" " * 11))


@torch.no_grad()
def show_loss(policy, reference, verdict, tokenizer, config):
    """The equation with the numbers of one verdict."""
    a, b = log_ratios(policy, reference, [verdict], tokenizer)  # (1,), (1,)
    h = config.beta * (a - b)
    p = torch.tensor([verdict.p], device=h.device)
    loss = soft_label_loss(h, p)
    numbers = f"{config.beta:g} x ({a.item():.2f} - {b.item():.2f}) = {h.item():.3f}"
    config.say(f"one verdict: p = {verdict.p:.2f}, h = {numbers}, loss {loss.item():.3f}")


def judged_better(teacher, policy, tokenizer, drafts, principles, config, generator):
    """Of prompts that are not of our world no truth is known. How probable does the teacher find it
    that the new answer is better than the first one? 1/2: no difference. These are the attacks that
    it learned from: nothing is held out."""
    conversations = [draft.prompt.messages for draft in drafts]
    new = respond(policy, tokenizer, conversations, max_new=config.max_new,
                  temperature=config.temperature, generator=generator)
    one_each = [in_order(principles, config, generator)[0] for _ in drafts]
    old = [draft.first for draft in drafts]
    p = both_orders(teacher, tokenizer, conversations, new, old, one_each, config)
    return p.mean().item()


# ---------------------------------------------------------------- training

def train(config):
    started = begin(config)
    if config.order not in ("draw", "first"):
        raise UserError(f"--order {config.order}: choose draw or first")
    constitution = rows.read_constitution(config.constitution)
    principles = [entry["principle"] for entry in constitution]
    need(config.init)

    # One model answers, criticises, mends and judges: the teacher. A copy of it learns.
    teacher, tokenizer = load(config.init, config.device)
    policy = copy.deepcopy(teacher)
    red, plain = read_prompts(config, tokenizer, teacher.config.max_len, principles)
    world = exam.knows([prompt.row for prompt in red + plain])
    generator = torch.Generator().manual_seed(config.seed)
    config.say(f"cai: from {config.init}, on {config.device}; {len(principles)} principles, "
               f"{len(red)} red-team prompts,\n{len(plain)} others")

    # BEFORE
    before = {"judge": 0.5}                         # a model is as good as itself
    if world:
        before, old_answers = exam.exam(teacher, tokenizer, reference=teacher, seed=config.seed)

    # ---- SL-CAI: answer attacks, criticise, mend
    drafts = []
    # Each prompt stands here `answers` times, with one answer each: an answer that does not end
    # drops out without its siblings.
    red_again = red * config.answers
    for prompt, texts in own_answers(teacher, tokenizer, red_again, 1, config, generator):
        drafts.append(Draft(prompt, first=texts[0], text=texts[0]))
    improve(teacher, tokenizer, drafts, principles, config, generator)
    mended = [draft for draft in drafts if draft.flaws]
    for draft in mended[:1]:
        show_draft(draft, config)

    # Learn the drafts as they are now. Some are as they were: without a flaw, or without a revision
    # that came to an end. To stay helpful, learn its own unmended answers to other prompts as well,
    # at most as many.
    others = own_answers(teacher, tokenizer, plain[:len(drafts)], 1, config, generator)
    taught = [(draft.prompt, draft.text) for draft in drafts]
    taught += [(prompt, texts[0]) for prompt, texts in others]
    lines = []
    examples = []
    for prompt, text in taught:
        lines.append({"messages": turns(prompt.messages, text)})
        examples.append(render_answer(tokenizer, prompt.messages, text))
    save_lines(config, "revisions.jsonl", lines)
    lengths = [len(example.ids) for example in examples]
    stream = batches(examples, lengths, config.batch, generator)
    config.say(f"SL-CAI: {len(drafts)} answers to attacks, {len(mended)} of them mended, and "
               f"{len(others)} to other prompts")

    sl_config = replace(config, steps=config.sl_steps)          # for steps() and Log
    sl_log = Log(sl_config)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.sl_lr)
    for step in steps(sl_config, optimizer):
        # 1 batch
        batch = next(stream)
        tokens = sum(sum(example.answer) for example in batch)
        tokens = average(float(tokens))                         # over processes
        total = 0.0
        for part in parts(batch, config.accumulate):
            # 2 score the answers
            ids, mask, answer = collate(part, tokenizer, config.device)  # (B, T) each
            logps = token_logps(policy, ids, mask, answer)      # (B, T)
            # 3 loss: the mean over all their tokens
            loss = -logps.sum() / tokens
            loss.backward()
            total += loss.item()
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        sl_log(step, loss=total)
    merge_lora(policy)
    reference = copy.deepcopy(policy).requires_grad_(False)     # the SL-CAI model is pi_ref
    if config.save:                                 # it stays if what follows is broken off
        save(Path(config.out, "sl"), reference, tokenizer)

    # ---- RLAIF: two answers of the policy, half of them to attacks; the teacher compares them.
    # Where a kind has fewer prompts than half, they are asked again.
    half = config.pairs // 2
    asked = list(itertools.islice(itertools.cycle(red), half))
    asked += list(itertools.islice(itertools.cycle(plain), half))
    pairs = own_answers(policy, tokenizer, asked, 2, config, generator)
    config.say("RLAIF: the teacher compares answers of the SL-CAI model")
    verdicts = compare(teacher, tokenizer, pairs, principles, config, generator)
    save_lines(config, "verdicts.jsonl", [verdict.line for verdict in verdicts])
    lengths = [longest(verdict) for verdict in verdicts]
    stream = batches(verdicts, lengths, config.batch, generator)
    show_loss(policy, reference, verdicts[0], tokenizer, config)

    log = Log(config)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):            # B: the verdicts of this part
            # 2 score both answers under both models
            a, b = log_ratios(policy, reference, part, tokenizer)  # (B,), (B,)
            h = config.beta * (a - b)                           # (B,)
            p = torch.tensor([verdict.p for verdict in part], device=h.device)  # (B,)
            # 3 loss
            loss = soft_label_loss(h, p)                        # (B,)
            (loss.sum() / len(batch)).backward()
            seen.append(torch.stack([loss, h, p]).detach())     # (3, B)
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log: the first loss is ln 2 = 0.6931; the judge's own doubt keeps it from 0.
        # agree: does the policy prefer what the judge prefers? At first it prefers nothing.
        loss, h, p = torch.cat(seen, dim=1)                     # (B,) each
        agree = (h > 0) == (p > 0.5)
        log(step, loss=loss.mean(), agree=agree.float().mean(), size_of_h=h.abs().mean())
    merge_lora(policy)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER
    show_loss(policy, reference, verdicts[0], tokenizer, config)
    # one log of both: the steps on the verdicts come after those on the mended answers
    log.rows = sl_log.rows + [row | {"step": row["step"] + config.sl_steps} for row in log.rows]
    if world:
        after, answers = exam.exam(policy, tokenizer, teacher, old_answers, config.seed)
        exam.show_answers(old_answers, answers, config)
        # known families have a fixed bar; of those that no training saw, half of what worked before
        # may work still
        targets = [exam.Target("attack_seen", 0.12, at_most=True),
                   exam.Target("attack_unseen", before["attack_unseen"] / 2, at_most=True),
                   exam.Target("helpful", before["helpful"] - 0.03),
                   exam.Target("over_refusal", before["over_refusal"] + 0.05, at_most=True)]
    else:
        share = judged_better(teacher, policy, tokenizer, drafts, principles, config, generator)
        after = {"judge": share}
        targets = [exam.Target("judge", 0.5)]
    results = exam.finish("cai", config, started, log, before, after, targets)
    return results | {"model": policy, "sl": reference, "tokenizer": tokenizer, "drafts": drafts,
                      "verdicts": verdicts}


if __name__ == "__main__":
    main(Config, train, __doc__)
