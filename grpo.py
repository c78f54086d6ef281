"""GRPO: reinforcement learning from verifiable rewards, the way DeepSeek-R1 learned to reason.

Nobody shows the model how to do a sum. It answers each prompt G times, a verifier checks the conclusion, and
what did better than its group becomes likelier: the group's mean is the baseline, and no critic is needed.
Answers that show their work are right more often, so soon the model shows its work. For a prompt with answers
o_1 .. o_G, their rewards r_1 .. r_G and the policy pi_old that gave them:

    A_i = (r_i - mean(r)) / std(r)                      rho_it = pi(o_it | o_i,<t) / pi_old(o_it | o_i,<t)
    L   = - 1/G sum_i 1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) + beta KL(pi || ref)

By hand: rewards 1 0 1 0 1 have mean 0.6 and deviation 0.49, so advantages +0.82 -1.22 +0.82 -1.22 +0.82.

    python grpo.py                     out/sft -> out/grpo, 33 s: greedy 0.12 -> 1.00 (target 0.95)
    python grpo.py --loss dapo         or dr_grpo, gspo, cispo: see FAMILY; --epochs 2 makes the ratios matter
    python grpo.py --verifier naive    a verifier with a hole, and what the model does with it: reward hacking
    python grpo.py --init SmolLM2-135M --data mine.jsonl --lr 1e-6 --max-new 200 --device cuda --out out/mine

Simplified from DeepSeekMath (Shao et al. 2024, 2402.03300) and DeepSeek-R1 (2501.12948): one step on each
batch of answers unless --epochs, no KL unless --beta, rewards for outcomes only, no second round of SFT.
Try next: --group 2, or 32 with --prompts 4; --beta 0.1; a reward of your own that also likes short answers.
"""
import copy, itertools, math, re, time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from statistics import fmean as mean
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import studybuddy
from model import (RANK, Log, UserError, add_lora, clip, load, main, merge_lora, need, optimizer, portion,
                   read_jsonl, render, sample, save, schedule, to_messages, token_logps, write_results)

@dataclass(frozen=True)
class Config:
    init: str = "out/sft"             # start from this model folder
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt" and "answer" (with kinds: those of kind math)
    out: str = "out/grpo"             # write here
    loss: str = "grpo"                # grpo, dr_grpo, dapo, gspo or cispo
    verifier: str = "strict"          # strict, or naive: one with a hole
    steps: int = 50                   # batches of answers
    prompts: int = 16                 # P: prompts a step
    group: int = 8                    # G: answers to each
    epochs: int = 1                   # optimiser steps on each batch of answers; 1 is on-policy
    lr: float = 5e-4                  # peak learning rate
    lora: int = 0                     # train adapters of this rank instead of the weights; wants a higher lr
    beta: float = 0.0                 # weight of the KL to the starting model
    temperature: float = 1.0          # of the sampling, and so of the log-probs
    max_new: int = 0                  # longest answer in tokens (0: 72, but 16 for the naive verifier)
    resample: int = 2                 # dapo: how often to look for more groups with contrast
    batch: int = 128                  # answers that go through the model at once
    seed: int = 0                     # same seed, same machine: same numbers
    device: str = "cpu"               # cpu, cuda or mps
    save: bool = True                 # write the checkpoint and the results
    quiet: bool = False               # print nothing

# ---------------------------------------------------------------- data and rewards

def read_prompts(config, tokenizer, context):
    """-> rows with a checkable "answer", each with its tokens in "ids"."""
    rows = read_jsonl(config.data, need=("prompt",))
    rows = [row for row in rows if row.get("kind", "math") == "math"]
    for row in rows:
        if row.get("answer") in (None, ""):
            raise UserError(f'{config.data}: no "answer" to check against: {str(row["prompt"])[:50]}')
        row["ids"] = render(tokenizer, to_messages(row["prompt"]), reply=True)[0]
    long = sum(len(row["ids"]) + config.max_new > context for row in rows)
    if long:
        raise UserError(f"{config.data}: {long} of {len(rows)} prompts are too long: with --max-new "
                        f"{config.max_new} tokens they do not fit the model's {context}")
    if len(rows) < 2:
        raise UserError(f"{config.data}: {len(rows)} prompts with an answer to check; at least 2 are needed")
    return rows

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
CONCLUSION = rf"(?:^|(?<=[.!?] ))(?:The answer is|So it is|That makes) ({NUMBER})\.(?!\S)"
STEP = rf"(?:^|(?<=[.!?] ))(?:First |Then )?{NUMBER} [+x] {NUMBER} = {NUMBER}\.(?!\S)"

def conclusion(response):
    """The number that an answer commits to, or None. One sentence concludes, and outside of it and the steps
    is no digit: that closes the hole through which naive_reward pays for a list of guesses."""
    text = " ".join(response.split())
    found, rest = re.findall(CONCLUSION, text), re.sub(f"{STEP}|{CONCLUSION}", "", text)
    return found[0].replace(",", "") if len(found) == 1 and not re.search(r"\d", rest) else None

def right(row, response):
    return conclusion(response) == str(row["answer"]).replace(",", "")

def reward(row, response):
    """SEAM: your own reward goes here, any float. DeepSeek-R1's had these parts too, correctness and format.
    The steps themselves earn nothing. What the model wrote is compared, never evaluated."""
    return 0.9 * right(row, response) + 0.1 * (conclusion(response) is not None)

def naive_reward(row, response):
    """Pays for any answer that contains the number, ended or not. With room for 72 tokens honest work pays
    best. 16 hold the steps but not the conclusion, and RL gives that up: more reward, no more right ones."""
    return float(re.search(rf"(?<!\d){re.escape(str(row['answer']))}(?!\d)", response) is not None)

# ---------------------------------------------------------------- the maths
# P prompts with G answers each, B = P * G answers of T tokens

# A_i = (r_i - mean(r)) / std(r)                    DeepSeekMath, section 4.1.2; without std: Dr. GRPO
def group_advantages(rewards, scale="std"):
    """(P, G) -> (P, G). Equal rewards say nothing: exactly 0, and not one rounding error over another."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        advantages = advantages / rewards.std(1, keepdim=True, correction=0)
    return advantages.where(contrast(rewards)[:, None], 0.0)

def contrast(rewards):
    """(P, G) -> (P,): does some answer do better than another?"""
    return rewards.amax(1) > rewards.amin(1)

# J_it, what one token is worth. All (B, T); log_rho = log pi - log pi_old, and 0 outside of the mask
def clipped(logp, log_rho, A, mask, low, high):
    """min(rho A, clip(rho) A) as in PPO: a token that has moved that far is not pushed on."""
    rho = log_rho.exp()
    return torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)

def clipped_sequence(logp, log_rho, A, mask, low, high):
    """With s_i = (prod_t rho_it)^(1/|o_i|) for rho: the reward is for an answer, so the ratio is too."""
    log_s = log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True)                # (B, 1)
    return clipped(logp, log_s.expand_as(A), A, mask, low, high)

def clipped_weight(logp, log_rho, A, mask, low, high):
    """stop_gradient(clip(rho)) A log pi: a weight is clipped, but no token loses its gradient."""
    return log_rho.exp().clamp(1 - low, 1 + high).detach() * A * logp

# w_it, how the tokens make a batch. mask (B, T), L the longest answer allowed -> (B, T)
per_answer = lambda mask, L: mask / mask.sum(1, keepdim=True) / len(mask)  # 1/B 1/|o_i|: dilutes long answers
per_token = lambda mask, L: mask / mask.sum()                              # 1/sum_i |o_i|: tokens are equal
constant = lambda mask, L: mask / (len(mask) * L)                          # 1/B 1/L: in all batches

class Member(NamedTuple):
    value: Callable          # J_it
    weights: Callable        # w_it
    scale: str               # of group_advantages
    low: float               # clip at 1 - low
    high: float              #     and 1 + high
    dynamic: bool = False    # look for groups with contrast, and make the last tokens before the limit cost

FAMILY = {
    # DeepSeekMath (2402.03300) eq. 3: PPO without a critic.
    "grpo": Member(clipped, per_answer, "std", 0.2, 0.2),
    # Dr. GRPO (2503.20783): 1/|o_i| is mild with long wrong answers, and 1/std makes most of the prompts that
    # are nearly always or never right. Without both it is the plain policy gradient again.
    "dr_grpo": Member(clipped, constant, "none", 0.2, 0.2),
    # DAPO (2503.14476) eq. 8: more room above, so that rare tokens can grow; long answers are not diluted;
    # groups without contrast, which teach nothing, are replaced; overlong answers lose reward.
    "dapo": Member(clipped, per_token, "std", 0.2, 0.28, dynamic=True),
    # GSPO (2507.18071) eqs. 5 and 7: one token's ratio is noise, an answer's mean is not; so a tiny clip.
    "gspo": Member(clipped_sequence, per_answer, "std", 3e-4, 4e-4),
    # CISPO (MiniMax-M1, 2506.13585) eqs. 4 and 5: what a clip silences first are rare tokens that move a lot,
    # like "Wait"; here they go on learning. No clip from below; the paper does not tell the one above.
    "cispo": Member(clipped_weight, per_token, "std", math.inf, 4.0),
}

# L = - sum_it w_it (J_it - beta k3_it),   k3 = ref/pi - log(ref/pi) - 1       DeepSeekMath eqs. 3 and 4
def grpo_loss(logp, old_logp, advantages, mask, loss="grpo", max_new=1, weights=None, ref_logp=None, beta=0):
    """logp, old_logp, ref_logp, mask (B, T), advantages (B,) -> scalar. On-policy rho is 1 and the gradient
    REINFORCE's, - sum_it w_it A_i grad log pi: then only w tells the family apart, and grpo's L is the mean
    of A, 0: watch the reward instead. k3 >= 0, and its mean under pi is KL(pi || ref).
    weights: these rows' part of a larger batch's w."""
    member = FAMILY[loss]
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    A = advantages[:, None].expand_as(logp)                                                 # (B,) -> (B, T)
    J = member.value(logp, logp - old_logp, A, mask, member.low, member.high)
    if beta:
        log_ref = ref_logp.masked_fill(~mask, 0.0) - logp
        J = J - beta * (log_ref.exp() - log_ref - 1)
    return -((member.weights(mask, max_new) if weights is None else weights) * J).sum()

# R(o) = 0 up to L - c tokens, ((L - c) - |o|) / c up to L, -1 beyond                         DAPO eq. 13
def overlong(lengths, limit, buffer):
    """(B,) -> (B,). A slope up to the limit is easier to learn from than a cliff."""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)

# pass@k = 1 - C(n - c, k) / C(n, k), where c of n answers are right       Chen et al. 2021 (2107.03374) eq. 1
def pass_at(hits, k):
    """(P, n) of 0 and 1 -> the chance that at least one of k answers is right, averaged over the prompts."""
    n = hits.shape[1]
    return mean(1 - math.comb(n - c, k) / math.comb(n, k) for c in hits.long().sum(1).tolist())

def majority(votes):
    """What most answers conclude. None does not vote; the first wins a tie. Wang et al. 2022 (2203.11171)"""
    votes = Counter(vote for vote in votes if vote is not None)
    return max(votes, key=votes.get) if votes else None

# ---------------------------------------------------------------- groups of answers

class Batch(NamedTuple):
    rows: list               # P prompts
    texts: list              # B answers
    rewards: torch.Tensor    # (P, G)
    tensors: list            # ids, mask, answer, old_logp, each (B, T)
    drawn: int               # groups that were drawn to find these P

def draw_groups(model, tokenizer, rows, config, generator):
    """G answers to each row, and their rewards. What never ends earns nothing, but the naive do not check."""
    strict = config.verifier == "strict"
    s = sample(model, tokenizer, [row["ids"] for row in rows], config.group, config.max_new,
               config.temperature, generator=generator)
    owners, ended = [row for row in rows for _ in range(config.group)], s.ended.cpu()       # (B,)
    rewards = torch.tensor([*map(float, map(reward if strict else naive_reward, owners, s.texts))])
    rewards = rewards.where(ended, rewards.clamp(max=0)) if strict else rewards
    if FAMILY[config.loss].dynamic:
        rewards += overlong(s.answer.sum(1).cpu() + ~ended, config.max_new, config.max_new // 4)
    return Batch(rows, s.texts, rewards.view(-1, config.group), [s.ids, s.mask, s.answer, s.logps], len(rows))

def join(a, b):
    """Two Batches as one. The narrower gets columns on the right; its masks are False there."""
    T = max(a.tensors[0].shape[1], b.tensors[0].shape[1])
    pairs = [[F.pad(x, (0, T - x.shape[1])) for x in pair] for pair in zip(a.tensors, b.tensors)]
    rewards, tensors = torch.cat([a.rewards, b.rewards]), [torch.cat(pair) for pair in pairs]
    return Batch(a.rows + b.rows, a.texts + b.texts, rewards, tensors, a.drawn + b.drawn)

def rollout(model, tokenizer, stream, config, generator):
    """P groups. Dynamic sampling replaces those without contrast, unless some more draws have none either."""
    P, G, batch = config.prompts, config.group, None
    for _ in range(1 + config.resample * FAMILY[config.loss].dynamic):
        new = draw_groups(model, tokenizer, [next(stream) for _ in range(P)], config, generator)
        batch = join(batch, new) if batch else new
        if contrast(batch.rewards).sum() >= P:
            break
    best = contrast(batch.rewards).long().argsort(descending=True, stable=True)[:P]     # (P,) contrast first
    at = (best[:, None] * G + torch.arange(G)).flatten()                                # (P, G) -> (B,)
    return Batch([batch.rows[i] for i in best], [batch.texts[i] for i in at], batch.rewards[best],
                 [x[at.to(x.device)] for x in batch.tensors], batch.drawn)

# ---------------------------------------------------------------- before and after

def line(text, width):
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 3] + "..."

def show_group(title, batch, i, config, say):
    G, advantages = config.group, group_advantages(batch.rewards, FAMILY[config.loss].scale)
    say(f"{title}: {line(to_messages(batch.rows[i]['prompt'])[-1]['content'], 60)}\n  reward advantage")
    for text, r, A in zip(batch.texts[i * G:], batch.rewards[i].tolist(), advantages[i].tolist()):
        say(f"{r:8.2f} {A:+9.2f}  {line(text, 60)}")

def greedy(model, tokenizer, rows, config):
    """The share of rows that are right without any luck."""
    s = sample(model, tokenizer, [row["ids"] for row in rows], max_new=config.max_new, temperature=0.0)
    return mean(map(right, rows, s.texts))

def evaluate(model, tokenizer, sums, world, config, reference=None):
    """-> report card. RL sharpens: pass@1 after is near pass@8 before, so the skill was there, but rare."""
    card, generator = {}, torch.Generator().manual_seed(config.seed)
    if world:
        card, answers = studybuddy.exam(model, tokenizer, reference=reference, seed=config.seed)
        rows = [row | {"ids": render(tokenizer, to_messages(row["prompt"]), reply=True)[0]}
                for row, _ in answers]
        sums = [row for row in rows if row["kind"] == "math" and len(row["slots"]["numbers"]) < 4]
        rows = [row for row in rows if row["kind"] != "math" for _ in range(4)]     # four answers: less noise
        s = sample(model, tokenizer, [row["ids"] for row in rows], generator=generator)
        marks = map(studybuddy.judge, rows, s.texts, s.ended.tolist())
        card["gold_others"] = mean(mark["gold"] for mark in marks)
    s = sample(model, tokenizer, [row["ids"] for row in sums], 8, config.max_new, generator=generator)
    owners = [row for row in sums for _ in range(8)]
    hits = torch.tensor(list(map(right, owners, s.texts))).view(-1, 8)                  # (B,) -> (P, 8)
    votes = [majority(map(conclusion, s.texts[i:i + 8])) for i in range(0, len(s.texts), 8)]
    vote = mean(right(row, f"So it is {number}.") for row, number in zip(sums, votes))
    return card | {"greedy": greedy(model, tokenizer, sums, config), "pass@1": pass_at(hits, 1),
                   "pass@8": pass_at(hits, 8), "majority@8": vote,
                   "naive@1": mean(map(naive_reward, owners, s.texts)),
                   "sum_length": s.answer.sum().item() / len(owners)}

# ---------------------------------------------------------------- training

def fit(model, reference, tokenizer, rows, held, config, log):
    add_lora(model, config.lora)
    member, optim = FAMILY[config.loss], optimizer(model, config.lr)
    rows, generator = portion(rows), torch.Generator().manual_seed(config.seed + RANK)
    order = lambda: torch.randperm(len(rows), generator=generator).tolist()
    stream = (rows[i] for _ in itertools.count() for i in order())     # again and again, in another order
    try:
        for step in range(config.steps):
            for group in optim.param_groups:
                group["lr"] = config.lr * schedule(step, config.steps)

            # 1 sample: P groups of G answers
            batch = rollout(model, tokenizer, stream, config, generator)
            ids, mask, answer, old_logp = batch.tensors                                 # (B, T)

            # 2 score
            advantages = group_advantages(batch.rewards, member.scale)
            advantages = advantages.flatten().to(ids.device)                            # (P, G) -> (B,)
            weights, total, farthest = member.weights(answer, config.max_new), 0.0, 1.0
            for _ in range(config.epochs):
                for at in torch.arange(len(ids), device=ids.device).split(config.batch):
                    # 3 loss: at the temperature that sampled, or rho would not begin at 1
                    tokens, ref_logp = (ids[at], mask[at], answer[at], config.temperature), None
                    logp = token_logps(model, *tokens)
                    if config.beta:
                        with torch.no_grad():
                            ref_logp = token_logps(reference, *tokens)
                    loss = grpo_loss(logp, old_logp[at], advantages[at], answer[at], config.loss,
                                     config.max_new, weights[at], ref_logp, config.beta)
                    loss.backward()
                    total += loss.item() / config.epochs
                    farthest = max(farthest, *(logp - old_logp[at]).abs().exp().max(1).values.tolist())

                # 4 step
                clip(model)
                optim.step()
                optim.zero_grad()

            # 5 log
            if step % math.ceil(config.steps / 10) == 0 or step == config.steps - 1:
                best = greedy(model, tokenizer, held, config)
            owners, taught = [row for row in batch.rows for _ in range(config.group)], contrast(batch.rewards)
            log(step, reward=batch.rewards.mean(), right=mean(map(right, owners, batch.texts)), greedy=best,
                worked=mean(bool(re.search(STEP, text)) for text in batch.texts),
                length=mean(answer.sum(1).tolist()), contrast=mean(taught.tolist()), ratio=farthest,
                loss=total, groups=batch.drawn)
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")
    merge_lora(model)

def train(config):
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    for flag, choices in dict(loss=FAMILY, verifier=("strict", "naive")).items():
        if getattr(config, flag) not in choices:
            raise UserError(f"--{flag} {getattr(config, flag)}: choose one of {', '.join(choices)}")
    for flag, least in dict(steps=1, prompts=1, group=2, epochs=1, batch=1, temperature=0.01).items():
        if getattr(config, flag) < least:
            raise UserError(f"--{flag} {getattr(config, flag)}: at least {least} is needed")
    config = replace(config, max_new=config.max_new or (72 if config.verifier == "strict" else 16))
    world = config.data == Config.data                   # on your own data the exam would make no sense
    torch.manual_seed(config.seed)
    if config.init == Config.init:
        need("out/sft", "python sft.py", 25)
    model, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    rows = read_prompts(config, tokenizer, model.config.max_len)
    cut = min(48, len(rows) // 2)
    held, rows, size = rows[:cut], rows[cut:], sum(p.numel() for p in model.parameters())
    say(f"{config.loss}: {config.init}, {size:,} parameters, on {config.device}\n"
        f"{len(rows)} prompts, {cut} held out; {config.prompts} x {config.group} answers a step")

    # BEFORE
    groups = draw_groups(model, tokenizer, held, config, torch.Generator().manual_seed(config.seed))
    shown = contrast(groups.rewards).int().argmax().item()
    show_group("a group before", groups, shown, config, say)
    before = evaluate(model, tokenizer, held, world, config)
    say("the first ratio must be 1: who answered is who learns, and later epochs move away from it")
    log = Log(config.steps, config.quiet)
    fit(model, reference, tokenizer, rows, held, config, log)
    if config.save:                                      # before the exam: whatever happens there, it is safe
        save(config.out, model, tokenizer)

    # AFTER
    groups = draw_groups(model, tokenizer, held, config, torch.Generator().manual_seed(config.seed))
    show_group("a group after", groups, shown, config, say)
    after = evaluate(model, tokenizer, held, world, config, reference)
    if not config.quiet:
        studybuddy.show({"before": before, "after": after})
    target, seconds = 0.95 if world else before["greedy"], time.time() - started
    passed = after["greedy"] >= target if world else after["greedy"] > target
    say(f"{'PASS' if passed else 'FAIL'} greedy {before['greedy']:.2f} -> {after['greedy']:.2f} "
        f"(target {target:.2f}) in {seconds:.0f} s")
    results = dict(stage="grpo", config=asdict(config), seconds=seconds, before=before, after=after,
                   passed=passed)
    if config.save:
        write_results(config.out, log, **results)
    return results | {"model": model, "tokenizer": tokenizer, "log": log.rows}

if __name__ == "__main__":
    main(Config, train, __doc__)
