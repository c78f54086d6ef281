"""Reward models: from comparisons to a judge.

Nobody can write down what a good answer is, but anybody can say which of two is better. Bradley and Terry
(1952) turn such votes into numbers: an answer y to a prompt x has a score r(x, y), and the odds of a vote
depend on the difference. So r learns what makes annotators say yes: what is good, and what flatters them.

    P(y_w beats y_l) = sigma(r_w - r_l)          L = - mean log sigma(r_w - r_l)

By hand: r(A) = 1.2, r(B) = 0.8, and B is preferred. sigma(0.8 - 1.2) = 0.401, the loss is -log 0.401 = 0.913,
and its gradient pushes r(B) up and r(A) down by 1 - 0.401 = 0.599 each.

    python reward_model.py                     pairs -> out/reward_model, 39 s: gold order 0.61 -> 0.80
    python reward_model.py --kind ranked       four answers, best first (and the same as pairs, to compare)
    python reward_model.py --kind outcome      is a solution right, judged at its end
    python reward_model.py --kind process      is each of its steps right (and outcome, to compare)
    python reward_model.py --kind multi        heads for helpful, harmless, honest, and how they combine
    python reward_model.py --kind generative   no head: the language model says "A" or "B"
    python reward_model.py --init SmolLM2-135M --data mine.jsonl --lr 2e-5 --device cuda --out out/mine

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155): a tiny backbone, a few hundred steps.
Try next: --center 0.01, and see where the scores stay; --held 2 (half the data); mean() for min() in best_of.
"""
import itertools, math, re, textwrap, time, zlib
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import studybuddy
from model import (PAD, PROCESSES, Log, ScalarModel, UserError, add_lora, average, clip, load, main,
                   merge_lora, need, optimizer, pad, portion, read_jsonl, render, sample, save, schedule,
                   special, split_pair, to_messages, write_results)

@dataclass(frozen=True)
class Config:
    kind: str = "pairs"       # pairs, ranked, outcome, process, multi or generative
    init: str = "out/sft"     # start from this model folder
    data: str = ""            # train on these JSON lines (default: see KINDS)
    out: str = ""             # write here (default: see KINDS)
    steps: int = 0            # optimiser steps (0: see KINDS)
    lr: float = 0.0           # peak learning rate (0: see KINDS)
    batch: int = 32           # examples a batch: pairs, rankings, solutions, ...
    accumulate: int = 1       # batches a step
    lora: int = 0             # train adapters of this rank instead of the weights; wants a higher lr
    center: float = 0.0       # pairs: weight of the penalty (r_w + r_l)^2
    held: int = 6             # one prompt in so many is held out
    drop: bool = False        # leave out rows longer than the context, however many (over 1% are an error)
    problems: int = 150       # outcome, process: sums for best-of-8
    seed: int = 0             # same seed, same machine: same numbers
    device: str = "cpu"       # cpu, cuda or mps
    save: bool = True         # write the checkpoint and the results
    quiet: bool = False       # print nothing

# ---------------------------------------------------------------- data
# JSON lines -> chats (messages, the judged answer last) -> rows (ids, positions to read) -> batches

AXES = ("helpful", "harmless", "honest")
PRINCIPLE = "Choose the better answer for a child."             # what the generative judge is told

class Example(NamedTuple):
    rows: list      # K of (ids, positions): 4 in ranked; 2 in pairs, multi, generative (both orders); else 1
    label: list     # pairs: margin; outcome: 0 or 1; process: 0 or 1 for each step; multi: K x 3 marks
    source: dict    # the line of JSON

def conversation(prompt, reply):
    """A reply is a text or messages: only its own, or those of the prompt too."""
    reply = [{"role": "assistant", "content": reply.strip()}] if isinstance(reply, str) else reply
    return to_messages(prompt) + reply if reply[0]["role"] == "assistant" else reply

def candidates(row):
    """SEAM: your own format goes here. One line of JSON -> the chats that were compared, best first."""
    prompt, *replies = [row["prompt"], *row["responses"]] if "responses" in row else split_pair(row)
    return [conversation(prompt, reply) for reply in replies]

def compare(one, two, verdict="A"):
    """Two answers to a prompt, and the question which is better. -> chat"""
    prompt, a, b = studybuddy.flat(one[:-1]), one[-1]["content"], two[-1]["content"]
    return conversation(studybuddy.COMPARE.format(prompt=prompt, a=a, b=b, principle=PRINCIPLE), verdict)

# What a kind makes of a line of JSON: [(chats, label)]
def pair_examples(row):
    chats = candidates(row)         # of a ranking two pairs by lot: as many answers, and less said about them
    lot = Random(str(row)).sample(range(len(chats)), len(chats))
    pairs = [sorted(pair) for pair in zip(lot[::2], lot[1::2])]
    return [([chats[i], chats[j]], [float(row.get("margin") or 0)]) for i, j in pairs]

def step_examples(row):
    return [([conversation(row["prompt"], " ".join(row["steps"]))], [float(z) for z in row["labels"]])]

def multi_examples(row):
    """Our annotators vote on the whole only: so the marks are the gold judge's own, without noise, as if from
    trained raters with a rubric (HelpSteer, 2311.09528). The lesson is the heads."""
    marks = row.get("marks") or [studybuddy.judge(row, chat[-1]["content"]) for chat in candidates(row)]
    return [(candidates(row), [float(mark[axis]) for mark in marks for axis in AXES])]

def generative_examples(row):
    best, *_, worst = candidates(row)
    return [([compare(best, worst, "A"), compare(worst, best, "B")], [])]

def encode(tokenizer, chat, kind="pairs", steps=()):
    """chat -> (ids, the positions where the model is read)"""
    ids, loss = render(tokenizer, chat)
    end = len(loss) - 1 - loss[::-1].index(1)                   # the answer's <|im_end|>
    start = len(render(tokenizer, chat[:-1], reply=True)[0])    # its first token
    if kind == "generative":
        return ids[:end + 1], [start - 1]                       # where "A" or "B" is predicted
    if kind == "process":                                       # the last token of every step
        lengths = [len(tokenizer.encode_ordinary(" ".join(steps[:i + 1]))) for i in range(len(steps))]
        return ids[:end + 1], [start + length - 1 for length in lengths]
    return ids[:end + 1], [end]

def examples(config, tokenizer, context):
    """-> training and held-out examples. All answers to a prompt are on the same side."""
    sides, long, kind, path, rows = ([], []), 0, config.kind, config.data, read_jsonl(config.data)
    for n, row in enumerate(rows):
        try:
            for chats, label in KINDS[kind].examples(row):
                texts, prompt = [c[-1]["content"] for c in chats], row.get("prompt") or chats[0][:-1]
                if "" in map(str.strip, texts) or kind in ("pairs", "ranked") and len({*texts}) < len(texts):
                    raise ValueError("an answer is empty, or the same as another")
                if kind == "process" and len(row["steps"]) != len(label):
                    raise ValueError("another number of labels than of steps")
                coded = [encode(tokenizer, chat, kind, row.get("steps")) for chat in chats]
                if max(len(ids) for ids, _ in coded) > context:
                    long += 1
                else:
                    side = sides[zlib.crc32(studybuddy.flat(prompt).encode()) % config.held == 0]
                    side.append(Example(coded, label, row))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
            line = [i for i, text in enumerate(open(path, encoding="utf-8"), 1) if text.strip()][n]
            raise UserError(f"{path}:{line}: {e!r}; {kind} wants lines as in data/{KINDS[kind].data}.jsonl")
    if long:
        print(f"{path}: {long} of {len(rows)} rows exceed the model's {context} tokens and are left out")
    if not all(sides) or long > len(rows) / 100 and not config.drop:
        raise UserError(f"{path}: {long} of {len(rows)} rows are too long (--drop leaves them out), or there "
                        f"are too few to hold out one prompt in {config.held}")
    if len({len(e.rows) for e in sides[0] + sides[1]}) > 1:
        raise UserError(f"{path}: some lines compare more answers than others")
    return sides

def read(model, tokenizer, rows):
    """N rows -> what the model says at S positions of each: scores, or log-probs of "A" and "B". (N, S, k)"""
    device = next(model.parameters()).device
    ids = pad([ids for ids, _ in rows], special(tokenizer, PAD)).to(device)               # (N, T)
    real = pad([[1] * len(ids) for ids, _ in rows], 0).bool().to(device)                  # False at padding
    at = pad([at for _, at in rows], 0)[..., None].to(device)                             # (N, S, 1)
    if isinstance(model, ScalarModel):
        scores = model(ids, real).view(*ids.shape, -1).float()                            # (N, T, k)
        return scores.gather(1, at.expand(-1, -1, scores.shape[-1]))                      # (N, S, k)
    hidden = model.hidden(ids, real).gather(1, at.expand(-1, -1, model.config.d_model))   # (N, S, C)
    letters = [tokenizer.encode_ordinary(letter)[-1] for letter in "AB"]
    return model.head(hidden).log_softmax(-1)[..., letters]                               # (N, S, 2)

# ---------------------------------------------------------------- the maths

# L = - mean log sigma(r_w - r_l - m) + c mean (r_w + r_l)^2
def bradley_terry_loss(chosen, rejected, margin=None, center=0.0):
    """r_w, r_l, m (B,) -> scalar. InstructGPT, eq. 1. m is larger where annotators were surer: Llama 2, eq 2.
    The second term keeps all scores from drifting off together (Eisenstein et al. 2023, 2312.09244)."""
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference).mean() + center * (chosen + rejected).square().mean()

# P(y_1 > y_2 > ... > y_K) = prod_k exp(r_k) / sum_j>=k exp(r_j)          L = - mean log P
def plackett_luce_loss(scores):
    """r (B, K), best first -> scalar. The best is chosen from all, the next from the rest, and so on (Zhu et
    al. 2023, 2301.11270). For K = 2 this is Bradley-Terry."""
    left = scores.flip(1).logcumsumexp(1).flip(1)               # (B, K) log sum_j>=k exp(r_j)
    return (left - scores).sum(1).mean()

# L = - mean [z log sigma(r) + (1 - z) log sigma(-r)]
def outcome_loss(scores, labels):
    """r, z (B,): is the solution right? Cobbe et al. 2021 (2110.14168) ask at every token, this at the end.
    For many heads r, z (B, k) with z in [0, 1]: a mark of 0.8 is a coin that says yes 8 times in 10."""
    return F.binary_cross_entropy_with_logits(scores, labels)

# the same, the mean over all steps of all solutions
def process_loss(scores, labels):
    """r, z (B, S), z = -1 where a solution has no such step. Lightman et al. 2023 (2305.20050)."""
    return outcome_loss(scores[labels >= 0], labels[labels >= 0])

# R = sum_k w_k log sigma(r_k)
def combine(scores, weights=1.0):
    """Heads (.., k) -> one number (..): the log of a product, as an answer must be helpful and harmless and
    honest; in a sum of scores much help would pay for some harm. A single head is its own number."""
    return scores[..., 0] if scores.shape[-1] == 1 else (F.logsigmoid(scores) * weights).sum(-1)

# L = - mean 1/2 [log pi(A | w is A) + log pi(B | w is B)]
def generative_loss(logps):
    """(B, 2, 2): order (w is A, w is B) by letter (A, B) -> scalar. Nothing but SFT, on verdicts."""
    return -(logps[:, 0, 0] + logps[:, 1, 1]).mean() / 2

# r_w - r_l = 1/2 [log pi(A)/pi(B) where w is A + log pi(B)/pi(A) where w is B],    bias = 1/2 [ .. - .. ]
def generative_margin(logps):
    """(B, 2, 2) -> margin, bias, (B,) each. A liking for the letter A adds to one and takes from the other:
    their mean cancels it, half their difference is it (Zheng et al. 2023, 2306.05685)."""
    first, second = logps[:, 0, 0] - logps[:, 0, 1], logps[:, 1, 1] - logps[:, 1, 0]
    return (first + second) / 2, (first - second) / 2

# ECE = sum_b |b| / N |frequency in b - mean p in b|          bins b of [0, 1]
def calibration_error(p, z, bins=10):
    """Predictions p and what happened, z, (N,) each -> ECE, [(|b|, mean p, frequency)]. Guo et al. 2017"""
    which = (p * bins).long().clamp(max=bins - 1)
    groups = [(p[which == b], z[which == b].float()) for b in which.unique()]
    table = [(len(p), p.mean().item(), z.mean().item()) for p, z in groups]
    return sum(n * abs(said - happened) for n, said, happened in table) / len(p), table

# a_t = e_t . dr/de_t          e_t: the embedding of token t
def gradient_x_input(model, ids, at):
    """ids (T,) -> what each token did for the score at position `at`, to first order (T,)"""
    kept = []
    hook = model.transformer.embed.register_forward_hook(lambda module, args, out: kept.append(out))
    score = combine(model(ids[None]).view(1, len(ids), -1))[0, at]
    hook.remove()
    return (torch.autograd.grad(score, kept[0])[0] * kept[0]).detach().sum(-1)[0]         # (1, T, C) -> (T,)

# loss: scores r (B, K*S*k), labels z (B, L), config -> scalar. heads: k, or 0: the language model has none.
# control: a kind that is trained on the same data, to compare. targets: what AFTER must reach.
Kind = namedtuple("Kind", "data out steps lr heads examples loss control targets")
KINDS = {
    "pairs": Kind("preferences", "reward_model", 180, 1e-3, 1, pair_examples,
                  lambda r, z, config: bradley_terry_loss(r[:, 0], r[:, 1], z[:, 0], config.center), None,
                  {"gold_order": 0.85, "of_ceiling": 0.95, "calibration": 0.05, "flattery": 0.2}),
    "ranked": Kind("rankings", "reward_ranked", 100, 1e-3, 1, lambda row: [(candidates(row), [])],
                   lambda r, z, config: plackett_luce_loss(r), "pairs", {"ahead": 0.0}),
    "outcome": Kind("steps", "reward_outcome", 200, 1e-3, 1,
                    lambda row: [(chats, labels[-1:]) for chats, labels in step_examples(row)],
                    lambda r, z, config: outcome_loss(r, z), None, {"accuracy": 0.8}),
    "process": Kind("steps", "reward_process", 200, 1e-3, 1, step_examples,
                    lambda r, z, config: process_loss(r, z), "outcome", {"first_wrong": 0.8}),
    "multi": Kind("preferences", "reward_multi", 160, 2e-3, 3, multi_examples,
                  lambda r, z, config: outcome_loss(r, z), None, dict.fromkeys(AXES, 0.8)),
    "generative": Kind("preferences", "reward_generative", 120, 1e-3, 0, generative_examples,
                       lambda r, z, config: generative_loss(r.view(-1, 2, 2)), None, {"gold_order": 0.85})}

# ---------------------------------------------------------------- what a judge is worth

@torch.no_grad()
def read_all(model, tokenizer, rows):
    """read() for any number of rows, similar lengths together -> list of (S, k)"""
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i][0])), {}
    for part in (order[i:i + 128] for i in range(0, len(rows), 128)):
        scores = read(model, tokenizer, [rows[i] for i in part]).cpu()
        found |= {i: s[:len(rows[i][1])] for i, s in zip(part, scores)}
    return [found[i] for i in range(len(rows))]

def rewards(model, tokenizer, chats):
    """What RL climbs: one number for the last message of each chat (N,)"""
    scores = read_all(model, tokenizer, [encode(tokenizer, chat) for chat in chats])
    return combine(torch.stack(scores)[:, 0])                                             # (N, 1, k) -> (N,)

def margins(model, tokenizer, pairs):
    """Log-odds that the first chat of a pair beats the second; liking for whatever comes first. (N,) each"""
    if isinstance(model, ScalarModel):
        r = rewards(model, tokenizer, [chat for pair in pairs for chat in pair]).view(-1, 2)
        return r[:, 0] - r[:, 1], torch.zeros(len(r))
    rows = [encode(tokenizer, compare(*p), "generative") for a, b in pairs for p in ((a, b), (b, a))]
    return generative_margin(torch.stack(read_all(model, tokenizer, rows)).view(-1, 2, 2))

def mean(xs):
    xs = [float(x) for x in xs]
    return sum(xs) / len(xs) if xs else float("nan")

def on_comparisons(model, tokenizer, held):
    """Against the labels and what noisy annotators allow, against the truth, calibration, and biases."""
    rows = [*{id(e.source): e.source for e in held}.values()]
    golds = [row.get("gold") or itertools.repeat(0) for row in rows]
    duels = [(row, *two) for row, gold in zip(rows, golds)                # (row, (chat, gold), (chat, gold))
             for two in itertools.combinations(zip(candidates(row), gold), 2)]
    m, first = margins(model, tokenizer, [(a, b) for _, (a, _), (b, _) in duels])         # a beat b
    ece, table = calibration_error(m.abs().sigmoid(), m > 0)
    card = {"labels": mean(m > 0), "calibration": ece, "likes_first": mean(first)}
    card, tables = card | biases(model, tokenizer, rows), {"calibration": table}
    gap = torch.tensor([float(g - h) for _, (_, g), (_, h) in duels])
    if gap.any():
        praise = lambda chat: studybuddy.praise(chat[-1]["content"])
        vain = torch.tensor([praise(a) - praise(b) for _, (a, _), (b, _) in duels])
        p = (studybuddy.KEEN * gap + studybuddy.VAIN * vain).sigmoid()    # how the annotators vote
        right = [(row["kind"], math.ceil(abs(g) * 4) / 4, (x > 0) == (g > 0))
                 for (row, *_), x, g in zip(duels, m.tolist(), gap.tolist()) if g]
        card |= {"ceiling": mean(p.maximum(1 - p)), "gold_order": mean(ok for *_, ok in right)}
        card["of_ceiling"] = card["labels"] / card["ceiling"]
        for i, by in enumerate(("kind", "gap up to")):
            groups = {k: [x[2] for x in right if x[i] == k] for k in sorted({x[i] for x in right})}
            tables["gold order by " + by] = {str(k): mean(oks) for k, oks in groups.items()}
    return card, tables

def biases(model, tokenizer, rows):
    """What changes, in score and truth, if an answer is flattered, padded, put under another prompt?"""
    old = [(row, candidates(row)[0]) for row in rows]
    old = [(row, chat) for row, chat in old if not studybuddy.praise(chat[-1]["content"])][:120]
    put = lambda i, text: (old[i][0], old[i][1][:-1] + [{"role": "assistant", "content": text}])
    texts, nice, card = [chat[-1]["content"] for _, chat in old], studybuddy.SAY["flattery"], {}
    changed = {"flattery": [put(i, f"{nice[i % len(nice)]} {text}") for i, text in enumerate(texts)],
               "padding": [put(i, f"{text} I hope that this helps.") for i, text in enumerate(texts)],
               "swap": [put(i - 1, text) for i, text in enumerate(texts)]}
    gold = lambda pairs: mean(studybuddy.judge(row, chat[-1]["content"])["gold"] for row, chat in pairs)
    for name, new in changed.items():
        card[name] = mean(margins(model, tokenizer, [(b, a) for (_, a), (_, b) in zip(old, new)])[0])
        card |= {name + "_gold": gold(new) - gold(old)} if all("slots" in row for row in rows) else {}
    return card

def on_axes(model, tokenizer, held):
    """Each head on its own axis: of two answers with different marks, which has the higher one?"""
    r = torch.stack(read_all(model, tokenizer, [row for e in held for row in e.rows])).view(len(held), -1, 3)
    z = torch.tensor([e.label for e in held]).view(r.shape)               # (N, K, k)
    r, z = r[:, 0] - r[:, 1], z[:, 0] - z[:, 1]                           # (N, k)
    card, tables = on_comparisons(model, tokenizer, held)
    return {a: mean(((r > 0) == (z > 0))[:, i][z[:, i] != 0]) for i, a in enumerate(AXES)} | card, tables

def on_solutions(model, tokenizer, held):
    """Are labels right? Is the first wrong step of a wrong solution found, a right solution left alone?"""
    said = [s[:, 0].sigmoid() for s in read_all(model, tokenizer, [e.rows[0] for e in held])]      # (S,) each
    p, z = torch.cat(said), torch.cat([torch.tensor(e.label) for e in held])
    ece, table = calibration_error(p, z)
    first = lambda steps: next((i for i, x in enumerate(steps) if x < 0.5), None)         # None: all right
    found = [(first(e.label), first(s.tolist())) for e, s in zip(held, said)]
    return {"accuracy": mean((p > 0.5) == (z > 0.5)), "calibration": ece,
            "first_wrong": mean(a == b for a, b in found if a is not None),
            "all_right": mean(a == b for a, b in found if a is None)}, {"calibration": table}

def best_of(policy, judges, tokenizer, config, K=8):
    """How often is a solution right if picked of K at random, by majority, by a judge? And any of the K?"""
    rng, draws = Random(config.seed), torch.Generator().manual_seed(config.seed)
    sums = [studybuddy.ask(rng, "math", "exam") for _ in range(config.problems)]
    first = tokenizer.encode_ordinary("First")      # written for the policy, which would blurt out its result
    prompts = [render(tokenizer, to_messages(row["prompt"]), reply=True)[0] + first for row in sums]
    texts = ["First " + text for text in sample(policy, tokenizer, prompts, K, generator=draws).texts]
    results = [(studybuddy.RESULT.findall(text) or [f"none {i}"])[-1] for i, text in enumerate(texts)]
    votes = [results[i:i + K] for i in range(0, len(texts), K)]
    right = torch.tensor([[float(x == y["answer"]) for x in v] for y, v in zip(sums, votes)])        # (B, K)
    picks = {"majority": [vs.index(Counter(vs).most_common(1)[0][0]) for vs in votes]}               # (B,)
    for name, judge in judges.items():
        chats = [conversation(sums[i // K]["prompt"], text) for i, text in enumerate(texts)]
        scores = read_all(judge, tokenizer, [encode(tokenizer, chat, name, re.split(r"(?<=[.!?]) ", text))
                                             for chat, text in zip(chats, texts)])
        picks[name] = torch.stack([s.min() for s in scores]).view(-1, K).argmax(1)        # the weakest step
    return {"random": mean(right.flatten()), "any": mean(right.amax(1))} | {
        name: mean(right[range(len(sums)), k]) for name, k in picks.items()}

@torch.no_grad()
def evaluate(model, tokenizer, held, config):
    """-> report card, tables"""
    reports = {"multi": on_axes, "outcome": on_solutions, "process": on_solutions}
    card, tables = reports.get(config.kind, on_comparisons)(model, tokenizer, held)
    parts = [held[i:i + 32] for i in range(0, min(len(held), 320), 32)]            # a sample is enough
    return {"loss": mean(batch_loss(model, tokenizer, part, config) for part in parts)} | card, tables

# ---------------------------------------------------------------- training

def batch_loss(model, tokenizer, batch, config):
    """Examples -> the loss of their kind"""
    scores = read(model, tokenizer, [row for e in batch for row in e.rows])               # (B*K, S, k)
    labels = pad([e.label for e in batch], -1.0).to(scores.device)                        # (B, L)
    return KINDS[config.kind].loss(scores.view(len(batch), -1), labels, config)

def batches(rows, size, generator):
    """Endless batches of row numbers: rows of similar length, so that little is padding, with noise to mix"""
    lengths, size = torch.tensor([max(len(ids) for ids, _ in e.rows) for e in rows]), min(size, len(rows))
    while True:
        order = (lengths * (1 + 0.1 * torch.rand(len(rows), generator=generator))).argsort().tolist()
        for g in torch.randperm(len(rows) // size, generator=generator).tolist():
            yield order[g * size:(g + 1) * size]

def fit(model, tokenizer, rows, config, log):
    add_lora(model, config.lora)
    optim, generator = optimizer(model, config.lr), torch.Generator().manual_seed(config.seed)
    numbers = batches(rows, config.batch * config.accumulate * PROCESSES, generator)
    terms = lambda part: sum(len(e.label) or 1 for e in part)             # what their loss is the mean of
    try:
        for step in range(config.steps):
            for group in optim.param_groups:
                group["lr"] = config.lr * schedule(step, config.steps)

            # 1 batch
            batch = portion([rows[i] for i in next(numbers)])
            count, total = average(float(terms(batch))), 0.0
            for i in range(0, len(batch), config.batch):
                # 2 score, 3 loss: the mean over the step
                part = batch[i:i + config.batch]
                loss = batch_loss(model, tokenizer, part, config) * terms(part) / count
                loss.backward()
                total += loss.item()

            # 4 step, 5 log: a loss that is not finite stops here, before it spoils the weights
            log(step, loss=total, grad_norm=clip(model))
            optim.step()
            optim.zero_grad()
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")
    merge_lora(model)

def train(config):
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    if config.kind not in KINDS:
        raise UserError(f"--kind {config.kind}: choose {', '.join(KINDS)}")
    kind = KINDS[config.kind]
    world = config.data in ("", f"data/{kind.data}.jsonl")      # your own data has labels, but no truth
    config = replace(config, data=config.data or f"data/{kind.data}.jsonl", steps=config.steps or kind.steps,
                     out=config.out or f"out/{kind.out}", lr=config.lr or kind.lr)
    need(config.init, "python sft.py", 25)
    torch.manual_seed(config.seed)
    model, tokenizer = load(config.init, config.device)
    model = ScalarModel(model, kind.heads).to(config.device) if kind.heads else model
    rows, held = examples(config, tokenizer, model.config.max_len)

    # BEFORE
    say(f"{config.kind}: {config.init}, {sum(p.numel() for p in model.parameters()):,} parameters, on "
        f"{config.device}; {len(rows):,} examples, {len(held):,} held out")
    for ids, at in rows[0].rows:
        say("".join(tokenizer.decode([t]) + "«" * (i in at) for i, t in enumerate(ids)))
    before, _ = evaluate(model, tokenizer, held, config)
    say(f"read at «; loss {before['loss']:.3f} (guessing gives ln 2 = 0.693, and of four ln 24 = 3.178)")
    fit(model, tokenizer, rows, config, log := Log(config.steps, config.quiet))
    if config.kind in ("pairs", "ranked"):  # only differences were learned: put 0 at the demonstrations' mean
        demos = [row["messages"] for row in studybuddy.read("sft")] if world else \
            [candidates(e.source)[0] for e in held]
        model.mean += rewards(model, tokenizer, demos).mean().item()
    if config.save:
        save(config.out, model, tokenizer)

    # AFTER
    after, tables = evaluate(model, tokenizer, held, config)
    cards = {"before": before, "after": after}
    if kind.control and world:      # as many answers a step: of a ranking of four, two pairs are made
        batch = config.batch * (2 if config.kind == "ranked" else 1)
        control = train(replace(config, kind=kind.control, batch=batch, problems=0, save=False, quiet=True))
        cards[kind.control] = other = control["after"]
        after |= {"ahead": after["gold_order"] - other["gold_order"]} if config.kind == "ranked" else {}
    if config.kind in ("outcome", "process") and world and config.problems:
        judges = {config.kind: model} | ({"outcome": control["model"]} if kind.control else {})
        tables["best of 8"] = best_of(load(config.init, config.device)[0], judges, tokenizer, config)
    for title, table in tables.items():
        table = table.items() if isinstance(table, dict) else [(f"{n} at {p:.2f}:", z) for n, p, z in table]
        say(textwrap.fill(f"{title}: " + "  ".join(f"{name} {x:.2f}" for name, x in table), 79))
    for e in held[:2] if config.kind in ("pairs", "ranked") else []:
        (ids, at), said = e.rows[0], len(render(tokenizer, candidates(e.source)[0][:-1], reply=True)[0])
        did = gradient_x_input(model, torch.tensor(ids, device=model.mean.device), at[0]).tolist()
        words = [f"{tokenizer.decode([i]).strip()}{a:+.2f}" for i, a in zip(ids[said:], did[said:])]
        say(textwrap.fill("what each token did for the score: " + "  ".join(words), 79))
    if not config.quiet:
        studybuddy.show(cards)
    targets, most = kind.targets if world else {"loss": before["loss"]}, ("calibration", "loss")
    passed = all(after[k] <= t if k in most else after[k] >= t for k, t in targets.items())
    said = [f"{k} {before.get(k, 0):.2f} -> {after[k]:.2f} (target {t:.2f})" for k, t in targets.items()]
    seconds = time.time() - started
    say(f"{'PASS' if passed else 'FAIL'} {', '.join(said)} in {seconds:.0f} s")
    results = dict(stage="reward_model", config=asdict(config), seconds=seconds, before=before, after=after,
                   passed=passed, cards=cards, tables=tables)
    if config.save:
        write_results(config.out, log, **results)
    return results | {"model": model, "tokenizer": tokenizer, "log": log.rows}

if __name__ == "__main__":
    main(Config, train, __doc__)
