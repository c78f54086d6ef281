"""Reward models: from comparisons of answers to a judge.

Nobody can write down what a good answer is, but anybody can say which of two is better. Bradley
and Terry (1952) turn such votes into numbers: an answer y to a prompt x has a score r(x, y), and
the odds of a vote depend on the difference of two scores. So r learns whatever makes annotators
say yes: what is good, and what flatters them. The judge is the language model, with one number in
place of the vocabulary. Its score is taken at the answer's last token, <|im_end|>: the network
looks only back, so no earlier token has seen the whole answer.

    P(chosen beats rejected) = sigma(r_chosen - r_rejected)
    L = - log sigma(r_chosen - r_rejected)

By hand: r(A) = 1.2, r(B) = 0.8, and B is chosen. sigma(0.8 - 1.2) = 0.401, the loss is -log 0.401 =
0.913, and its gradient pushes r(B) up and r(A) down by 1 - 0.401 = 0.599 each.

    python reward_model.py                  pairs: out/sft -> out/reward_model, 26 s on two cores
    python reward_model.py --kind ranked    four answers, from best to worst; KINDS is the table
    python reward_model.py --kind multi     three heads: helpful, harmless, honest
    python reward_model.py --data mine.jsonl --init SmolLM2-135M --lr 2e-5 --out out/mine

A line of mine.jsonl is {"prompt": "...", "chosen": "...", "rejected": "..."}; for --kind ranked
{"prompt": "...", "responses": ["the best", "...", "the worst"]}. multi wants "marks" beside, for
each answer {"helpful": 0.9, "harmless": 1, "honest": 1}.

Of two answers this judge prefers the better one 80 times in 100; who knew just how the annotators
vote would do so 90 times. A compliment before an answer raises its score by about 0.6, which moves
a vote from 50 to 65%: it has learned its annotators' weakness.

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155): a tiny network, a few hundred steps.
Judges that are read elsewhere have files of their own: at every step of a solution (python -m
lessons.process_reward), or at the word "A" or "B" (python -m lessons.talking_judge).
Try next: --center 0.01, and see where the scores stay; --held 2, which learns from half of the
prompts; then ask what else your judge likes, with python -m lessons.judge_bias.
"""
import zlib
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import exam, rows, studybuddy
from data.checkpoints import load, save
from data.run import (Log, Settings, adamw, add_lora, batches, begin, clip_gradients, main,
                      merge_lora, need, parts, steps)
from model import ScalarModel, UserError, collate, end_scores, render_answer


@dataclass(frozen=True)
class Config(Settings):
    kind: str = "pairs"       # pairs, ranked or multi
    data: str = None          # JSON lines of comparisons (default: the kind's own, see KINDS)
    out: str = None           # write here (default: see KINDS)
    steps: int = None         # optimiser steps (default: see KINDS)
    batch: int = 32           # comparisons a step
    lr: float = None          # peak learning rate (default: see KINDS)
    center: float = 0.0       # pairs: weight of the penalty (r_chosen + r_rejected)^2
    held: int = 6             # hold out one prompt in this many
    drop: bool = False        # leave out rows longer than the context (otherwise an error)

    limits = Settings.limits | {"held": (2, 10**9)}


# ---------------------------------------------------------------- the maths

# L = - log sigma(r_chosen - r_rejected - m) + c (r_chosen + r_rejected)^2
def bradley_terry_loss(r_chosen, r_rejected, margin=0.0, center=0.0):
    """r_chosen, r_rejected (B, M) -> (B, M). InstructGPT, equation 1. The margin m is larger where
    annotators were surer: Llama 2 (2307.09288), equation 2. Only differences are learned, so all
    scores may drift off together; the last term holds them (Eisenstein et al. 2023, 2312.09244)."""
    vote = -F.logsigmoid(r_chosen - r_rejected - margin)
    drift = (r_chosen + r_rejected) ** 2
    return vote + center * drift


# P(y_1 > y_2 > ... > y_K) = prod_k exp(r_k) / sum_j>=k exp(r_j)          L = - log P
def plackett_luce_loss(r):
    """r (B, K), the best answer first -> (B,). The best is chosen from all, the next from the rest,
    and so on (Zhu et al. 2023, 2301.11270). Of two answers this is Bradley-Terry."""
    from_k_on = r.flip(1).logcumsumexp(1).flip(1)               # (B, K) log sum_j>=k exp(r_j)
    return (from_k_on - r).sum(1)


# L = - [z log sigma(r) + (1 - z) log sigma(-r)]
def outcome_loss(r, z):
    """Is it right? z is 1 or 0 (Cobbe et al. 2021, 2110.14168), or a mark between: a mark of 0.8 is
    a coin that says yes 8 times in 10. r, z of any shape -> the same shape"""
    return F.binary_cross_entropy_with_logits(r, z, reduction="none")


# R = sum_k w_k log sigma(r_k)
def combine(r, weights=1.0):
    """Heads (.., k) -> one number (..): the log of a product, since an answer must be helpful and
    harmless and honest. In a sum of scores, much help would pay for some harm."""
    return (F.logsigmoid(r) * weights).sum(-1)


# ECE = sum_b |b| / N |frequency in b - mean p in b|         bins b of [0, 1]
def calibration_error(p, happened, bins=10):
    """Predictions p and what happened, (N,) each -> ECE, [(|b|, mean p, frequency)]. Guo et al.
    2017 (1706.04599). Who is 80% sure, and right 8 times in 10, is calibrated."""
    bin_of = (p * bins).long().clamp(max=bins - 1)              # (N,)
    table = []
    error = 0.0
    for b in bin_of.unique():
        inside = bin_of == b
        predicted = p[inside].mean().item()
        frequency = happened[inside].float().mean().item()
        size = int(inside.sum())
        table.append((size, predicted, frequency))
        error += size / len(p) * abs(frequency - predicted)
    return error, table


# ---------------------------------------------------------------- data

class Comparison(NamedTuple):
    prompt: list             # messages
    answers: list            # K texts, the best one first
    examples: list           # their tokens: K Examples of the prompt and an answer
    row: dict                # its line of JSON
    where: str               # file and line


def longest(comparison):
    return max(len(example.ids) for example in comparison.examples)


def read_comparisons(config, tokenizer, context):
    """SEAM: your own format goes here. rows.read_rankings reads the usual ones; all that is
    needed of a line is a prompt and its answers, the best one first."""
    comparisons, long = [], []
    for line in rows.read_rankings(config.data):
        examples = [render_answer(tokenizer, line.prompt, text) for text in line.answers]
        comparison = Comparison(line.prompt, line.answers, examples, line.row, line.where)
        if longest(comparison) <= context:
            comparisons.append(comparison)
        else:
            long.append(line.where)
    if long and not config.drop:
        raise UserError(f"{long[0]}: longer than the model's {context} tokens, one of {len(long)} "
                        f"such lines: shorten them, or leave them out with --drop")
    if long:
        config.say(f"{len(long)} lines are left out: longer than the model's {context} tokens")
    for comparison in comparisons:
        K = len(comparisons[0].answers)
        if len(comparison.answers) != K:
            raise UserError(f"{comparison.where}: want {K} answers, as in the lines before")
    return hold_out_prompts(comparisons, config.held)


def hold_out_prompts(comparisons, every):
    """-> to learn from, held out. By prompt, never by row: several rows share a prompt, and if
    one of them were learned from, the others would measure memory. A number made from a prompt's
    text decides on which side it is, whatever file it stands in."""
    train, held = [], []
    for comparison in comparisons:
        number = zlib.crc32(studybuddy.flat(comparison.prompt).encode())
        if number % every == 0:
            held.append(comparison)
        else:
            train.append(comparison)
    if not train or not held:
        raise UserError(f"--data: {len(comparisons)} rows have too few prompts to hold out one in "
                        f"{every} (--held)")
    return train, held


def marks(comparison):
    """How helpful, harmless and honest each answer is, as trained raters say (HelpSteer,
    2311.09528). In our world the marks are the gold judge's, without noise; on your data they are
    "marks", one object for each answer, in the order of the answers. -> K lists of 3"""
    given = comparison.row.get("marks")
    if given is None and exam.knows([comparison.row]):
        given = [studybuddy.judge(comparison.row, text) for text in comparison.answers]
    if given is None:
        raise UserError(f'{comparison.where}: "marks" is missing: multi wants helpful, harmless '
                        f'and honest, from 0 to 1, for each answer')
    return [[mark["helpful"], mark["harmless"], mark["honest"]] for mark in given]


# ---------------------------------------------------------------- score and loss

def scores(model, comparisons, tokenizer):
    """What the judge says of every answer, read at its end. -> r (B, K), or (B, K, 3)"""
    examples = []
    for comparison in comparisons:
        examples += comparison.examples
    ids, mask, _ = collate(examples, tokenizer, model.mean.device)  # (B * K, T) each
    r = end_scores(model, ids, mask)                            # (B * K,) or (B * K, 3)
    return r.unflatten(0, (len(comparisons), -1))               # (B, K) or (B, K, 3)


def overall(r):
    """One number for every answer: (B, K), or the heads (B, K, 3) combined -> (B, K)"""
    return combine(r) if r.dim() == 3 else r


def duels(r):
    """Every two of K answers, the better one first: two make one duel, four make six.
    (B, K) -> r_chosen, r_rejected (B, K (K - 1) / 2)"""
    first, second = torch.combinations(torch.arange(r.shape[1])).unbind(1)
    return r[:, first], r[:, second]


def pairs_loss(r, batch, center):
    r_chosen, r_rejected = duels(r)                             # (B, 1) each, of two answers
    margin = [comparison.row.get("margin") or 0.0 for comparison in batch]
    margin = torch.tensor(margin, device=r.device)[:, None]     # (B, 1)
    return bradley_terry_loss(r_chosen, r_rejected, margin, center).mean(1)  # (B,)


def ranked_loss(r, batch, center):
    return plackett_luce_loss(r)                                # (B,)


def multi_loss(r, batch, center):
    z = torch.tensor([marks(comparison) for comparison in batch])  # (B, K, 3)
    return outcome_loss(r, z.to(r)).mean((1, 2))                # (B,)


class Kind(NamedTuple):
    loss: Callable           # of scores, their comparisons, center
    heads: int               # numbers that the judge gives an answer
    data: str
    out: str
    steps: int
    lr: float


KINDS = {
    "pairs":  Kind(pairs_loss, heads=1, data="data/preferences.jsonl", out="out/reward_model",
                   steps=180, lr=1e-3),
    "ranked": Kind(ranked_loss, heads=1, data="data/rankings.jsonl", out="out/reward_ranked",
                   steps=100, lr=1e-3),
    "multi":  Kind(multi_loss, heads=3, data="data/preferences.jsonl", out="out/reward_multi",
                   steps=160, lr=2e-3),
}


# ---------------------------------------------------------------- before and after

TARGETS = {
    # Who knew how these annotators vote would order 0.90 of the answers as the truth does: 0.77 is
    # 85 in 100 of that. And an accuracy of 986 votes is known to +-.03.
    "pairs": [exam.Target("gold_order", 0.77), exam.Target("of_ceiling", 0.91),
              exam.Target("calibration", 0.05, at_most=True),
              exam.Target("flattery", 0.2)],        # the world's lesson: a judge learns its people
    "ranked": [exam.Target("gold_order", 0.75)],
    "multi": [exam.Target(axis, 0.8) for axis in rows.AXES],
}


def evaluate(model, held, tokenizer, config):
    """-> report card from held-out comparisons: the loss, what report() says, and for three heads
    the order of answers on each one's axis. flattery is what a compliment before an answer adds to
    its score, on average; in truth it is worth nothing."""
    kind = KINDS[config.kind]
    r = all_scores(model, held, tokenizer)                      # (N, K) or (N, K, 3)
    card = {"loss": kind.loss(r, held, config.center).mean().item()}
    if kind.heads == 3:
        z = torch.tensor([marks(comparison) for comparison in held])  # (N, K, 3)
        for i, axis in enumerate(rows.AXES):
            card[axis] = right_order(r[..., i], z[..., i])
    card |= report(overall(r), held)
    if exam.knows([comparison.row for comparison in held]):
        r = overall(all_scores(model, flattered(held, tokenizer), tokenizer))  # (N, 2)
        card["flattery"] = (r[:, 0] - r[:, 1]).mean().item()
    return card


def report(r, held):
    """r (N, K) -> what the duels between answers to the same prompt say of a judge.

    accuracy     how often it prefers the answer that annotators preferred
    calibration  how far its sureness is from how often it is right
    ceiling      accuracy of a judge that knows how our annotators vote; the rest is their noise
    gold_order   how often it prefers the answer that is better in truth
    """
    r_chosen, r_rejected = duels(r)
    right = (r_chosen > r_rejected).flatten()
    sure = (r_chosen - r_rejected).abs().sigmoid().flatten()
    card = {"accuracy": right.float().mean().item()}
    card["calibration"], _ = calibration_error(sure, right)
    if exam.knows([comparison.row for comparison in held]):
        gold, compliments = truth(held)                         # (N, K) each
        card["ceiling"] = ceiling(gold, compliments)
        card["of_ceiling"] = card["accuracy"] / card["ceiling"]
        card["gold_order"] = right_order(r, gold)
    return card


@torch.no_grad()
def all_scores(model, comparisons, tokenizer):
    """scores() of any number of comparisons, similar lengths together."""
    order = torch.tensor([longest(comparison) for comparison in comparisons]).argsort()
    r = []
    for part in order.split(64):
        r.append(scores(model, [comparisons[i] for i in part], tokenizer).cpu())
    return torch.cat(r)[order.argsort()]                        # back in the order given


def right_order(r, worth):
    """Of the duels whose answers differ in worth, what share does the judge decide rightly?"""
    r_first, r_second = duels(r)
    first, second = duels(worth)
    right = (r_first > r_second) == (first > second)
    return right[first != second].float().mean().item()


def truth(comparisons):
    """How good each answer is, and how many compliments it makes. (N, K) each"""
    gold, compliments = [], []
    for comparison in comparisons:
        gold.append([studybuddy.judge(comparison.row, text)["gold"] for text in comparison.answers])
        compliments.append([studybuddy.praise(text) for text in comparison.answers])
    return torch.tensor(gold), torch.tensor(compliments)


def ceiling(gold, compliments):
    """The annotators are simulated. Their score of an answer is KEEN times its gold mark plus
    VAIN times its compliments, and they vote as Bradley and Terry say. A judge that knew that
    score would agree with them this often; the rest is noise."""
    first, second = duels(studybuddy.KEEN * gold + studybuddy.VAIN * compliments)
    p = torch.sigmoid(first - second)
    return p.maximum(1 - p).mean().item()


def flattered(comparisons, tokenizer, most=120):
    """Answers with a compliment before them, against the same answers without."""
    compliments = studybuddy.SAY["flattery"]
    probes = []
    for comparison in comparisons:
        text = comparison.answers[0]
        if studybuddy.praise(text) == 0 and len(probes) < most:
            compliment = compliments[len(probes) % len(compliments)]
            probes.append(with_answers(comparison, [f"{compliment} {text}", text], tokenizer))
    return probes


def with_answers(comparison, answers, tokenizer):
    """The same prompt with other answers."""
    examples = [render_answer(tokenizer, comparison.prompt, text) for text in answers]
    return comparison._replace(answers=answers, examples=examples)


@torch.no_grad()
def show_comparison(model, comparison, tokenizer, config):
    """The equation with the numbers of one comparison. « is where the judge is read."""
    kind = KINDS[config.kind]
    r = scores(model, [comparison], tokenizer)                  # (1, K) or (1, K, 3)
    loss = kind.loss(r, [comparison], config.center)
    for example, numbers in zip(comparison.examples, r[0].view(-1, kind.heads).tolist()):
        text = tokenizer.decode(example.ids).replace("\n", "\n    ")
        shown = ", ".join(f"{number:.2f}" for number in numbers)
        config.say(f"    {text}« r = {shown}")
    config.say(f"    loss {loss.item():.4f}")


# ---------------------------------------------------------------- training

def train(config):
    if config.kind not in KINDS:
        raise UserError(f"--kind {config.kind}: choose one of {', '.join(KINDS)}")
    kind = KINDS[config.kind]           # it fills in what the command line leaves open
    for name in ("data", "out", "steps", "lr"):
        if getattr(config, name) is None:
            config = replace(config, **{name: getattr(kind, name)})
    started = begin(config)

    # The language model's network, with one number, or three, in place of the vocabulary.
    need(config.init)
    transformer, tokenizer = load(config.init, config.device)
    model = ScalarModel(transformer, kind.heads).to(config.device)
    add_lora(model, config.lora)
    optimizer = adamw(model, config.lr)

    comparisons, held = read_comparisons(config, tokenizer, model.config.max_len)
    if config.kind == "multi":
        for comparison in comparisons:
            marks(comparison)               # complains where there are none
    lengths = [longest(comparison) for comparison in comparisons]
    stream = batches(comparisons, lengths, config.batch, torch.Generator().manual_seed(config.seed))

    # BEFORE
    config.say(f"reward_model: {config.kind} on {config.init}, on {config.device}; "
               f"{len(comparisons):,} comparisons to learn from, {len(held):,} held out")
    config.say("one comparison, the best answer first; the judge is read at «")
    show_comparison(model, comparisons[0], tokenizer, config)
    before = evaluate(model, held, tokenizer, config)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 score: a number for every answer, read at its end
            # (b, K), b of the B comparisons, the best answer first; (b, K, 3) if multi
            r = scores(model, part, tokenizer)
            # 3 loss: how surprising are the votes (or marks), if these are the scores?
            loss = kind.loss(r, part, config.center)            # (b,)
            (loss.sum() / len(batch)).backward()
            r = overall(r)                                      # (b, K)
            seen.append(torch.stack([loss, r[:, 0], r[:, -1]]).detach())  # (3, b)
        # 4 step
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log: scores of 0 give ln 2 = 0.69 (four answers: ln 24 = 3.18). The head starts at
        # random, so the first loss is near that; votes are noisy, so the last one is not near 0.
        # Of four answers, chosen is the best one and rejected the worst.
        loss, r_chosen, r_rejected = torch.cat(seen, dim=1)     # (B,) each
        log(step, loss=loss.mean(), accuracy=(r_chosen > r_rejected).float().mean(),
            lead=(r_chosen - r_rejected).mean(), chosen=r_chosen.mean(),
            rejected=r_rejected.mean())
    merge_lora(model)
    if kind.heads == 1 and (config.center == 0 or config.kind == "ranked"):
        # only differences were learned: move all scores; a winner then scores 0 on average
        winners = all_scores(model, held[:200], tokenizer)[:, 0]
        model.mean += winners.mean()
    if config.save:
        save(config.out, model, tokenizer)

    # AFTER
    after = evaluate(model, held, tokenizer, config)
    config.say("the comparison from above")
    show_comparison(model, comparisons[0], tokenizer, config)
    targets = [exam.Target("loss", before["loss"], at_most=True)]
    if config.data == kind.data:
        targets = TARGETS[config.kind]
    results = exam.finish("reward_model", config, started, log, before, after, targets)
    return results | {"model": model, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
