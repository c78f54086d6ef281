"""Direct preference optimisation (DPO): alignment from pairs of answers, without a reward model.

Of two answers to a prompt x, y_w won and y_l lost. RLHF fits a reward to many such verdicts, then
maximises it on a leash to a frozen reference model pi_ref. The best policy on that leash has a
closed form, so a policy tells its reward: r(x, y) = beta log pi(y|x)/pi_ref(y|x), up to a term in
x alone. Put that into the likelihood of the verdicts, and two stages become one loss (Rafailov et
al. 2023, 2305.18290, equation 7):

    L = - log sigma( beta [ log pi(y_w|x)/pi_ref(y_w|x)  -  log pi(y_l|x)/pi_ref(y_l|x) ] )

By hand: pi gives y_w 0.03 where pi_ref gives 0.02, and y_l 0.15 where pi_ref gives 0.12. The
log-ratios are log 1.5 = 0.405 and log 1.25 = 0.223; at beta 0.1 the loss is - log sigma(0.0182) =
0.684. That is a little below ln 2 = 0.693, where every run starts, since pi is pi_ref.

    python dpo.py                    out/sft -> out/dpo on data/preferences.jsonl
    python dpo.py --loss ipo         another loss; LOSSES is a map of the family
    python dpo.py --data mine.jsonl --init SmolLM2-135M --lr 5e-6 --out out/mine

Simplified: one short run, and the reference never moves. What needs another loop has another file:
single judgements (python -m lessons.kto), the model's own answers (python -m lessons.online).
Try next: --beta 0.05 and --beta 5, and compare kl; --flip; your own loss as one more line of LOSSES.
"""
import copy
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import exam, rows
from data.checkpoints import load, save
from model import (Example, Log, Settings, UserError, adamw, add_lora, batches, begin,
                   clip_gradients, collate, hold_out, main, merge_lora, need, parts, render_answer,
                   steps, token_logps)


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/dpo"      # write here
    steps: int = 110          # optimiser steps
    batch: int = 32           # pairs a step
    lr: float = None          # peak learning rate (default: the loss's own, see LOSSES)
    loss: str = "dpo"         # one of the table LOSSES: dpo, ipo, simpo, ...
    beta: float = None        # how short the leash to the reference is (default: see LOSSES)
    noise: float = 0.1        # cdpo, robust: the share e of labels thought to be wrong
    gamma: float = 0.5        # simpo: the margin that the winner should have
    odds: float = 60.0        # orpo: weight lambda of the odds ratio
    flip: bool = False        # learn to prefer the rejected answers
    drop: bool = False        # leave out pairs that are longer than the model's context

    limits = Settings.limits | {"noise": (0, 0.49)}


# ---------------------------------------------------------------- the maths
# `chosen` and `rejected` are what a loss sees of a pair, (B,) each, and every loss gives (B,).
# With a reference they are log-ratios: log pi(y|x) - log pi_ref(y|x), summed over the tokens of y.
# Without one they are mean log-probs a token: log pi(y|x) / |y|.

# L = - log sigma(beta (chosen - rejected))
# Rafailov et al. 2023 (2305.18290), eq. 7
def dpo(chosen, rejected, beta):
    """The smaller beta, the longer the leash: it takes a larger difference to satisfy the loss."""
    return -F.logsigmoid(beta * (chosen - rejected))


# L = (1 - e) dpo(chosen, rejected) + e dpo(rejected, chosen)
# Mitchell 2023, a note on DPO with noisy preferences
def cdpo(chosen, rejected, beta, noise):
    """Conservative: if a share e of labels is wrong, stop where sigma(beta (..)) is 1 - e."""
    return (1 - noise) * dpo(chosen, rejected, beta) + noise * dpo(rejected, chosen, beta)


# L = [(1 - e) dpo(chosen, rejected) - e dpo(rejected, chosen)] / (1 - 2 e)
# Chowdhury et al. 2024 (2403.00409)
def robust(chosen, rejected, beta, noise):
    """Unbiased: if labels are wrong with probability e, its mean is the loss on the true ones."""
    right = dpo(chosen, rejected, beta)
    wrong = dpo(rejected, chosen, beta)
    return ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)


# L = (chosen - rejected - 1 / (2 beta))^2
# Azar et al. 2023 (2310.12036), eq. 17; sums over tokens, as there
def ipo(chosen, rejected, beta):
    """A margin to reach and not to exceed, where DPO has no end."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


# L = max(0, 1 - beta (chosen - rejected))
# SLiC: Zhao et al. 2023 (2305.10425); with a reference: Liu et al. 2023 (2309.06657)
def slic(chosen, rejected, beta):
    """A hinge: a pair whose margin is large enough teaches nothing more."""
    return F.relu(1 - beta * (chosen - rejected))


# L = 1 - sigma(beta chosen) + sigma(beta rejected)
# D'Oosterlinck et al. 2024 (2408.06266), eq. 7
def apo_zero(chosen, rejected, beta):
    """Winners up, losers down, each by itself: for winners that are better than the model."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


# L = sigma(beta chosen) + 1 - sigma(beta (chosen - rejected))
# the same, eq. 8
def apo_down(chosen, rejected, beta):
    """Both down, losers further: for a model that is better than the winners."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


# L = (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2
# SPPO: Wu et al. 2024 (2405.00675), eq. 4.7, with eta = 1 / beta, P = 1 for winners, 0 for losers
def sppo(chosen, rejected, beta):
    """Each answer has a place to reach, as far up or down as the other."""
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


# L = - log sigma(beta (chosen - rejected) - gamma)
# Meng et al. 2024 (2405.14734), eq. 6; no reference
def simpo(chosen, rejected, beta, gamma):
    """The reward is the mean log-prob of a token, which sampling follows: length earns nothing."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# L = - chosen - lambda log sigma(log odds(chosen) - log odds(rejected)),   odds(p) = p / (1 - p)
# Hong et al. 2024 (2403.07691), eqs. 4, 6, 7, with p = exp(mean log-prob); no reference
def orpo(chosen, rejected, odds):
    """SFT on the winner, and its odds against the loser's."""
    return -chosen - odds * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logp):
    """A certain answer has infinite odds. They end 1e-6 nats below that, at a million to one."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


# L = 1 - sigma(beta (r - z)) for a good answer, else lambda [1 - sigma(beta (z - r))]
# z = max(0, mean_i log pi(y_j|x_i)/pi_ref(y_j|x_i)), j != i
# Ethayarajh et al. 2024 (2402.01306), eq. 8
def kto(ratio, mismatched, good, beta, aversion):
    """For single answers, good or bad, with log-ratios r (B,). z is the point that they are held
    against, the KL of pi and pi_ref, measured on answers to other prompts. It is not trained, or a
    batch could win by moving it. This loss has a loop of its own: lessons/kto.py."""
    z = mismatched.mean().clamp(min=0).detach()
    up = 1 - torch.sigmoid(beta * (ratio - z))
    down = aversion * torch.sigmoid(beta * (ratio - z))
    return torch.where(good, up, down)


class Method(NamedTuple):
    loss: Callable
    uses: tuple              # the numbers of Config that it takes
    reference: bool          # on log-ratios to a reference, or on mean log-probs without one
    beta: float              # what works in this world
    lr: float


LOSSES = {
    "dpo":      Method(dpo,      ("beta",),         reference=True,  beta=0.5, lr=5e-4),
    "cdpo":     Method(cdpo,     ("beta", "noise"), reference=True,  beta=0.5, lr=5e-4),
    "robust":   Method(robust,   ("beta", "noise"), reference=True,  beta=0.5, lr=5e-4),
    "ipo":      Method(ipo,      ("beta",),         reference=True,  beta=0.1, lr=5e-4),
    "slic":     Method(slic,     ("beta",),         reference=True,  beta=0.4, lr=5e-4),
    "apo_zero": Method(apo_zero, ("beta",),         reference=True,  beta=0.5, lr=2e-4),
    "apo_down": Method(apo_down, ("beta",),         reference=True,  beta=0.5, lr=1e-4),
    "sppo":     Method(sppo,     ("beta",),         reference=True,  beta=0.1, lr=3e-4),
    "simpo":    Method(simpo,    ("beta", "gamma"), reference=False, beta=2.0, lr=1e-4),
    "orpo":     Method(orpo,     ("odds",),         reference=False, beta=1.0, lr=1e-4),
}


def loss_of(chosen, rejected, config):
    """The loss of this run, with the numbers that it takes."""
    method = LOSSES[config.loss]
    numbers = {name: getattr(config, name) for name in method.uses}
    return method.loss(chosen, rejected, **numbers)


# ---------------------------------------------------------------- data

class Pair(NamedTuple):
    chosen: Example          # tokens of the prompt and of the answer that won
    rejected: Example        # tokens of the prompt and of the answer that lost
    row: dict                # its line of JSON


def read_pairs(config, tokenizer, context):
    """SEAM: your own format goes here. All that is needed of a line of JSON is a prompt and two
    answers; rows.read_pairs knows the formats that the field uses."""
    pairs, long = [], []
    for line in rows.read_pairs(config.data):
        chosen = render_answer(tokenizer, line.prompt, line.chosen)
        rejected = render_answer(tokenizer, line.prompt, line.rejected)
        if config.flip:
            chosen, rejected = rejected, chosen
        if max(len(chosen.ids), len(rejected.ids)) <= context:
            pairs.append(Pair(chosen, rejected, line.row))
        else:
            long.append(line.where)
    if long and not config.drop:
        raise UserError(f"{long[0]}: longer than the model's {context} tokens, like "
                        f"{len(long) - 1} others: shorten them, or leave them out with --drop")
    if long:
        config.say(f"{len(long)} pairs are left out: longer than the model's {context} tokens")
    return hold_out(pairs)


def answer_logps(model, pairs, tokenizer, mean=False):
    """log pi(y|x) of the chosen and of the rejected answers, summed over the tokens of y, or
    their mean. Both go through the network in one pass, as they share their prompt. -> (B,),
    (B,)"""
    examples = []
    for pair in pairs:
        examples.append(pair.chosen)
        examples.append(pair.rejected)
    ids, mask, answer = collate(examples, tokenizer, model.embed.weight.device)  # (2B, T) each
    logps = token_logps(model, ids, mask, answer).sum(1)        # (2B,)
    if mean:
        logps = logps / answer.sum(1)
    return logps[0::2], logps[1::2]


# ---------------------------------------------------------------- before and after

@torch.no_grad()
def evaluate(policy, reference, pairs, tokenizer, config, against=None):
    """-> report card, answers. Held-out pairs say how often the winner's log-ratio is larger;
    where the world is ours, its exam says whether the answers are better."""
    leads = []
    for first in range(0, len(pairs), 32):
        part = pairs[first:first + 32]
        chosen, rejected = answer_logps(policy, part, tokenizer)
        ref_chosen, ref_rejected = answer_logps(reference, part, tokenizer)
        leads.append((chosen - ref_chosen) - (rejected - ref_rejected))  # (B,)
    leads = torch.cat(leads)
    card = {"accuracy": (leads.sign() + 1).mean().item() / 2}   # a tie is half right
    answers = None
    if exam.knows([pair.row for pair in pairs]):
        world, answers = exam.exam(policy, tokenizer, reference, against, config.seed)
        card = world | card
    return card, answers


def show_pair(pair, tokenizer, config):
    config.say("one pair; the loss looks at what stands between « and »")
    for example in (pair.chosen, pair.rejected):
        start = example.answer.index(1)
        prompt = tokenizer.decode(example.ids[:start])
        answer = tokenizer.decode(example.ids[start:])
        config.say("    " + f"{prompt}«{answer}»".replace("\n", "\n    "))


@torch.no_grad()
def show_loss(policy, reference, pair, tokenizer, config):
    """The equation with the numbers of one pair."""
    mean = not LOSSES[config.loss].reference
    chosen, rejected = answer_logps(policy, [pair], tokenizer, mean)  # (1,), (1,)
    ref_chosen, ref_rejected = answer_logps(reference, [pair], tokenizer, mean)
    config.say("             log pi   log pi_ref   log-ratio")
    for name, logp, ref in ("chosen", chosen, ref_chosen), ("rejected", rejected, ref_rejected):
        ratio = logp - ref
        config.say(f"{name:>8}  {logp.item():9.2f}   {ref.item():10.2f}   {ratio.item():9.2f}")
    if not mean:
        chosen = chosen - ref_chosen
        rejected = rejected - ref_rejected
    config.say(f"    loss  {loss_of(chosen, rejected, config).item():9.4f}")


# ---------------------------------------------------------------- training

def train(config):
    started = begin(config)
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss}: choose one of {', '.join(LOSSES)}")
    method = LOSSES[config.loss]
    if config.beta is None:
        config = replace(config, beta=method.beta)
    if config.lr is None:
        config = replace(config, lr=method.lr)

    # One model learns. A frozen copy remembers where it began.
    need(config.init, "python sft.py", 25)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)

    pairs, held = read_pairs(config, tokenizer, policy.config.max_len)
    lengths = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
    stream = batches(pairs, lengths, config.batch, torch.Generator().manual_seed(config.seed))

    # BEFORE
    config.say(f"dpo: loss {config.loss}, from {config.init}, on {config.device}; "
               f"{len(pairs):,} pairs, {len(held)} more are held out")
    show_pair(pairs[0], tokenizer, config)
    show_loss(policy, reference, pairs[0], tokenizer, config)
    before, old_answers = evaluate(policy, reference, held, tokenizer, config)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 score both answers under both models
            chosen, rejected = answer_logps(policy, part, tokenizer, mean=not method.reference)
            if method.reference:
                with torch.no_grad():
                    ref_chosen, ref_rejected = answer_logps(reference, part, tokenizer)
                chosen = chosen - ref_chosen                    # (B,) log pi(y_w|x) / pi_ref(y_w|x)
                rejected = rejected - ref_rejected              # (B,) log pi(y_l|x) / pi_ref(y_l|x)
            # 3 loss: how much likelier has each answer become?
            loss = loss_of(chosen, rejected, config)            # (B,)
            (loss.sum() / len(batch)).backward()
            seen.append(torch.stack([loss, chosen, rejected]).detach())  # (3, B)
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log: the first loss is ln 2 = 0.6931. chosen often falls, and rejected falls further
        loss, chosen, rejected = torch.cat(seen, dim=1)         # (B,) each
        lead = chosen - rejected
        log(step, loss=loss.mean(), accuracy=(lead.sign().mean() + 1) / 2, margin=lead.mean(),
            chosen=chosen.mean(), rejected=rejected.mean())
    merge_lora(policy)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER
    after, answers = evaluate(policy, reference, held, tokenizer, config, old_answers)
    config.say("the pair from above")
    show_loss(policy, reference, pairs[0], tokenizer, config)
    if answers:
        exam.show_answers(old_answers, answers, config)
    target = exam.Target("accuracy", 0.55)
    if answers and not config.flip and config.data == Config.data:
        target = exam.Target("gold", before["gold"] + 0.12)
    results = exam.finish("dpo", config, started, log, before, after, [target])
    return results | {"model": policy, "tokenizer": tokenizer, "log": log.rows}


if __name__ == "__main__":
    main(Config, train, __doc__)
