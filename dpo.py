"""Direct preference optimisation (DPO): alignment from pairs of answers, without a reward model.

Of two answers to a prompt x, y_w won and y_l lost. RLHF fits a reward model r to such verdicts,
P(y_w beats y_l) = sigma(r_w - r_l), then maximises r minus beta KL(pi || pi_ref), which keeps the
policy pi near a frozen reference. The best policy for that is known: pi_ref(y|x) exp(r(x, y)/beta),
divided by a number Z(x). So r(x, y) = beta log pi(y|x)/pi_ref(y|x) + beta log Z(x), and in the
difference r_w - r_l the last term cancels. What remains is one loss instead of two stages (Rafailov
et al. 2023, 2305.18290, equation 7):

    L = - log sigma( beta [ log pi(y_w|x)/pi_ref(y_w|x)  -  log pi(y_l|x)/pi_ref(y_l|x) ] )

By hand: pi gives y_w 0.03 where pi_ref gives 0.02, and y_l 0.15 where pi_ref gives 0.12. The
log-ratios are log 1.5 = 0.405 and log 1.25 = 0.223; at beta 0.1 the loss is - log sigma(0.0182) =
0.684. That is a little below ln 2 = 0.693, where DPO starts: pi is pi_ref, and both ratios are 1.

    python dpo.py                    out/sft -> out/dpo on data/preferences.jsonl
    python dpo.py --loss ipo         another loss; LOSSES is a map of the family
    python dpo.py --data mine.jsonl --init SmolLM2-135M --lr 5e-6 --out out/mine

A line of mine.jsonl is {"prompt": "...", "chosen": "...", "rejected": "..."}, and SmolLM2-135M is a
folder with a model. On our toy data the true quality of an answer is known, `gold`, and an exam of
held-out prompts measures it before and after. On yours, the card says in what share of held-out
pairs the chosen answer is ahead.

What needs another loop has another file: single judgements (python -m lessons.kto), the model's own
answers (python -m lessons.online).
Try next: --beta 0.05 and --beta 5, and compare kl on the card; --flip, and gold falls.
"""
import copy
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import exam, rows
from data.checkpoints import load, save
from data.run import (Log, Settings, adamw, add_lora, as_in_training, batches, begin,
                      clip_gradients, hold_out, main, merge_lora, need, parts, steps)
from model import Example, UserError, collate, render_answer, token_logps


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/dpo"      # write here
    steps: int = 95           # optimiser steps
    batch: int = 32           # pairs a step
    lr: float = None          # peak learning rate (default: the loss's own, see LOSSES)
    loss: str = "dpo"         # one of the table LOSSES: dpo, ipo, simpo, ...
    beta: float = None        # the larger, the closer it stays to the reference (see LOSSES)
    noise: float = 0.1        # cdpo, robust: the share e of labels thought to be wrong
    gamma: float = 0.5        # simpo: what beta times the lead should be at least
    odds: float = 60.0        # orpo: weight lambda of the odds ratio (large, for this toy)
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
    """With a small beta it takes a large difference to make L small: the policy moves further."""
    return -F.logsigmoid(beta * (chosen - rejected))


# L = (1 - e) dpo(chosen, rejected) + e dpo(rejected, chosen)
# Mitchell 2023, a note on DPO with noisy preferences
def cdpo(chosen, rejected, beta, noise):
    """Conservative: if a share e of labels is wrong, stop where sigma(beta (..)) is 1 - e."""
    right = dpo(chosen, rejected, beta)
    wrong = dpo(rejected, chosen, beta)
    return (1 - noise) * right + noise * wrong


# L = [(1 - e) dpo(chosen, rejected) - e dpo(rejected, chosen)] / (1 - 2 e)
# Chowdhury et al. 2024 (2403.00409)
def robust(chosen, rejected, beta, noise):
    """Unbiased: if labels are wrong with probability e, it is dpo on the true ones on average."""
    right = dpo(chosen, rejected, beta)
    wrong = dpo(rejected, chosen, beta)
    return ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)


# L = (chosen - rejected - 1 / (2 beta))^2
# Azar et al. 2023 (2310.12036), eq. 17; sums over tokens, as in the paper
def ipo(chosen, rejected, beta):
    """A lead to reach and not to exceed, where DPO has no end."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


# L = max(0, 1 - beta (chosen - rejected))
# SLiC: Zhao et al. 2023 (2305.10425); with a reference: Liu et al. 2023 (2309.06657)
def slic(chosen, rejected, beta):
    """A hinge: a pair whose lead is large enough teaches nothing more."""
    return F.relu(1 - beta * (chosen - rejected))


# L = 1 - sigma(beta chosen) + sigma(beta rejected)
# D'Oosterlinck et al. 2024 (2408.06266), eq. 7
def apo_zero(chosen, rejected, beta):
    """Winners up, losers down, each by itself: for winners that are better than the model."""
    up = torch.sigmoid(beta * chosen)
    down = torch.sigmoid(beta * rejected)
    return 1 - up + down


# L = sigma(beta chosen) + 1 - sigma(beta (chosen - rejected))
# the same paper, eq. 8
def apo_down(chosen, rejected, beta):
    """Both down, losers further: for a model that is better than the winners."""
    down = torch.sigmoid(beta * chosen)
    apart = torch.sigmoid(beta * (chosen - rejected))
    return down + 1 - apart


# L = (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2
# SPPO: Wu et al. 2024 (2405.00675), eq. 4.7, with eta = 1 / beta, P = 1 for winners, 0 for losers
def sppo(chosen, rejected, beta):
    """Chosen answers go to +1/(2 beta), rejected ones to -1/(2 beta)."""
    goal = 1 / (2 * beta)
    return (chosen - goal) ** 2 + (rejected + goal) ** 2


# L = - log sigma(beta (chosen - rejected) - gamma)
# Meng et al. 2024 (2405.14734), eq. 6; no reference
def simpo(chosen, rejected, beta, gamma):
    """The reward is the mean log-prob of a token: length earns nothing."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# L = - chosen - lambda log sigma(log odds(chosen) - log odds(rejected)),   odds(p) = p / (1 - p)
# Hong et al. 2024 (2403.07691), eqs. 4, 6, 7, with p = exp(mean log-prob); no reference
def orpo(chosen, rejected, odds):
    """SFT on the winner, and its odds against the loser's. `odds` is lambda, their weight."""
    log_ratio = log_odds(chosen) - log_odds(rejected)
    return -chosen - odds * F.logsigmoid(log_ratio)


def log_odds(logp):
    """A certain answer has infinite odds; log p is capped at -1e-6, odds of a million to one."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


# L = 1 - sigma(beta (r - z)) for a good answer, else lambda sigma(beta (r - z))
# z = max(0, mean_i log pi(y_j|x_i)/pi_ref(y_j|x_i)), j != i
# Ethayarajh et al. 2024 (2402.01306), eq. 8
def kto(ratio, mismatched, good, beta, aversion):
    """For single answers, good or bad, of log-ratios r (B,). z is what they are compared with, the
    KL of pi and pi_ref, measured on answers to other prompts. It is not trained, or a batch could
    win by moving it. This loss has a loop of its own: lessons/kto.py."""
    z = mismatched.mean().detach()
    z = z.clamp(min=0)
    sigma = torch.sigmoid(beta * (ratio - z))                   # (B,)
    return torch.where(good, 1 - sigma, aversion * sigma)


# To add a loss: a function above and a line here. A new number is a field of Config, too; it has
# the same name there, in `uses` and among the function's arguments.

class Method(NamedTuple):
    function: Callable
    uses: tuple              # the numbers of Config that it takes
    reference: bool          # does it see log-ratios, or mean log-probs without a reference?
    beta: float              # defaults that work on the toy data
    lr: float


LOSSES = {
    "dpo":      Method(dpo,      ("beta",),         reference=True,  beta=0.5, lr=7e-4),
    "cdpo":     Method(cdpo,     ("beta", "noise"), reference=True,  beta=0.5, lr=7e-4),
    "robust":   Method(robust,   ("beta", "noise"), reference=True,  beta=0.5, lr=7e-4),
    "ipo":      Method(ipo,      ("beta",),         reference=True,  beta=0.1, lr=7e-4),
    "slic":     Method(slic,     ("beta",),         reference=True,  beta=0.4, lr=7e-4),
    "apo_zero": Method(apo_zero, ("beta",),         reference=True,  beta=0.5, lr=3e-4),
    "apo_down": Method(apo_down, ("beta",),         reference=True,  beta=0.5, lr=1.4e-4),
    "sppo":     Method(sppo,     ("beta",),         reference=True,  beta=0.1, lr=4e-4),
    "simpo":    Method(simpo,    ("beta", "gamma"), reference=False, beta=2.0, lr=1.4e-4),
    "orpo":     Method(orpo,     ("odds",),         reference=False, beta=1.0, lr=1.4e-4),
}


def loss_of(chosen, rejected, config):
    """The loss of this run, with the numbers that it takes: for dpo it is
    dpo(chosen, rejected, beta=config.beta)."""
    method = LOSSES[config.loss]
    numbers = {name: getattr(config, name) for name in method.uses}
    return method.function(chosen, rejected, **numbers)


# ---------------------------------------------------------------- data

class Pair(NamedTuple):
    chosen: Example          # tokens of the prompt and of the answer that won
    rejected: Example        # tokens of the prompt and of the answer that lost
    row: dict                # its line of JSON


def longest(pair):
    return max(len(pair.chosen.ids), len(pair.rejected.ids))


def read_pairs(config, tokenizer, context):
    """SEAM: your own format goes here. rows.read_pairs reads the usual ones, texts or messages; all
    that is needed of a line is a prompt and two texts. -> pairs to learn from, pairs held out"""
    pairs, prompts, long = [], [], []
    for line in rows.read_pairs(config.data):
        chosen = render_answer(tokenizer, line.prompt, line.chosen)
        rejected = render_answer(tokenizer, line.prompt, line.rejected)
        if config.flip:
            chosen, rejected = rejected, chosen
        pair = Pair(chosen, rejected, line.row)
        if longest(pair) <= context:
            pairs.append(pair)
            prompts.append(line.prompt)
        else:
            long.append(line.where)
    if long and not config.drop:
        raise UserError(f"{long[0]}: longer than the model's {context} tokens, like "
                        f"{len(long) - 1} others: shorten them, or leave them out with --drop")
    if long:
        config.say(f"{len(long)} pairs are left out: longer than the model's {context} tokens")
    return hold_out(pairs, prompts)


def answer_logps(model, pairs, tokenizer, mean=False):
    """log pi(y|x) of the chosen and of the rejected answers: the sum over the tokens of y, its end
    token included, or their mean. One pass for both. -> two of (B,)"""
    examples = []
    for pair in pairs:
        examples.append(pair.chosen)
        examples.append(pair.rejected)
    ids, mask, answer = collate(examples, tokenizer, model.embed.weight.device)  # (2B, T) each
    # log-softmax and gather: the logits at t - 1 score the token at t (see model.token_logps)
    logps = token_logps(model, ids, mask, answer)               # (2B, T), 0 outside the answers
    logps = logps.sum(1)                                        # (2B,)
    if mean:
        logps = logps / answer.sum(1)
    return logps[0::2], logps[1::2]


def log_ratios(policy, reference, pairs, tokenizer):
    """log pi(y|x) / pi_ref(y|x) of the chosen and of the rejected answers. -> two of (B,)"""
    chosen_logps, rejected_logps = answer_logps(policy, pairs, tokenizer)
    with torch.no_grad():
        ref_chosen_logps, ref_rejected_logps = answer_logps(reference, pairs, tokenizer)
    return chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps


def score_pairs(policy, reference, pairs, tokenizer, config):
    """Log-ratios, or mean log-probs where the loss has no reference. -> two of (B,)"""
    if LOSSES[config.loss].reference:
        return log_ratios(policy, reference, pairs, tokenizer)
    return answer_logps(policy, pairs, tokenizer, mean=True)


# ---------------------------------------------------------------- before and after

def share_ahead(chosen, rejected):
    """How often is the winner ahead? A tie is half."""
    ahead = (chosen > rejected).float()
    even = (chosen == rejected).float()
    return (ahead + even / 2).mean().item()


@torch.no_grad()
def evaluate(policy, reference, pairs, tokenizer, config, against=None):
    """-> report card, answers. On held-out pairs: how often is the winner's log-ratio ahead? On our
    toy data also the exam. against: the answers before training, to count who wins."""
    chosen, rejected = [], []
    for part in as_in_training(pairs, config):
        won, lost = log_ratios(policy, reference, part, tokenizer)  # (B,) each
        chosen.append(won)
        rejected.append(lost)
    card = {"accuracy": share_ahead(torch.cat(chosen), torch.cat(rejected))}
    answers = None
    if exam.knows([pair.row for pair in pairs]):
        marks, answers = exam.exam(policy, tokenizer, reference, against, config.seed)
        card = marks | card
    return card, answers


def show_pair(pair, tokenizer, config):
    config.say("one pair, chosen and rejected; the loss looks at what stands between « and »")
    for example in (pair.chosen, pair.rejected):
        start = example.answer.index(1)
        prompt = tokenizer.decode(example.ids[:start])
        answer = tokenizer.decode(example.ids[start:])
        config.say("    " + f"{prompt}«{answer}»".replace("\n", "\n    "))


@torch.no_grad()
def show_loss(policy, reference, pair, tokenizer, config):
    """The equation with the numbers of one pair; the last column is what the loss is given."""
    method = LOSSES[config.loss]
    logps = answer_logps(policy, [pair], tokenizer)             # chosen and rejected, (1,) each
    ref_logps = answer_logps(reference, [pair], tokenizer)
    given = score_pairs(policy, reference, [pair], tokenizer, config)
    what = "log-ratio" if method.reference else "mean log pi"
    config.say(f"             log pi   log pi_ref   {what}")
    for i, name in enumerate(("chosen", "rejected")):
        config.say(f"{name:>8}  {logps[i].item():9.2f}   {ref_logps[i].item():10.2f}   "
                   f"{given[i].item():{len(what)}.2f}")
    numbers = [f"{name} {getattr(config, name):g}" for name in method.uses]
    loss = loss_of(*given, config)
    config.say(f"    loss  {loss.item():9.4f}   with {', '.join(numbers)}")


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
    if config.beta == 0 and config.loss in ("ipo", "sppo"):
        raise UserError(f"--beta 0: {config.loss} divides by it")

    # One model learns. A frozen copy remembers where it began.
    need(config.init)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)

    pairs, held = read_pairs(config, tokenizer, policy.config.max_len)
    held.sort(key=longest)                      # evaluate() takes parts: like lengths, less padding
    lengths = [longest(pair) for pair in pairs]
    shuffle = torch.Generator().manual_seed(config.seed)
    stream = batches(pairs, lengths, config.batch, shuffle)

    # BEFORE
    config.say(f"dpo: loss {config.loss}, from {config.init}, on {config.device}; "
               f"{len(pairs):,} pairs, {len(held)} more are held out")
    show_pair(pairs[0], tokenizer, config)
    show_loss(policy, reference, pairs[0], tokenizer, config)
    before, old_answers = evaluate(policy, reference, held, tokenizer, config)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch: B pairs
        batch = next(stream)
        seen = []
        for part in parts(batch, config.accumulate):            # b pairs
            # 2 score: how much likelier has each answer become than it was under the reference?
            # (for simpo and orpo: how likely is it, a token?)
            chosen, rejected = score_pairs(policy, reference, part, tokenizer, config)
            # 3 loss: is the winner further ahead of the loser?
            losses = loss_of(chosen, rejected, config)          # (b,)
            (losses.sum() / len(batch)).backward()
            seen.append(torch.stack([losses, chosen, rejected]).detach())  # (3, b)
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log, in nats. DPO's first loss is ln 2 = 0.6931; chosen often falls, rejected further.
        # (For simpo and orpo these are of mean log-probs; the card's accuracy is of log-ratios.)
        losses, chosen, rejected = torch.cat(seen, dim=1)       # (B,) each, the whole batch
        accuracy = share_ahead(chosen, rejected)
        lead = (chosen - rejected).mean()
        log(step, loss=losses.mean(), accuracy=accuracy, lead=lead, chosen=chosen.mean(),
            rejected=rejected.mean())
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
    return results | {"model": policy, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
