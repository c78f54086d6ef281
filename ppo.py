"""RLHF: reinforcement learning from a reward model, from REINFORCE to PPO, and how it breaks: Goodhart's law.

Four models. The policy pi answers, the reward model scores the whole answer, a frozen copy of where pi began
(ref) is the leash, and a critic V guesses at every token what is still to come, so that a token is credited
with the surprise that it brought and not with all that happened. For an answer y_1 .. y_T to a prompt x:

    r_t = - beta [log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)],     and r(x, y) on top at the last token
    A_t = sum_k (gamma lambda)^k delta_t+k                             delta_t = r_t + gamma V_t+1 - V_t
    L   = - mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)   rho_t = pi(y_t | ..) / pi_old(y_t | ..)

By hand: three tokens, V = 0.5 0.6 0.8, reward 1 at the end. delta = 0.1 0.2 0.2; with gamma 1 and lambda 0.95
A_3 = 0.2, A_2 = 0.2 + 0.95 A_3 = 0.39, A_1 = 0.1 + 0.95 A_2 = 0.47.

    python ppo.py                       out/sft and out/reward_model -> out/ppo, in 82 s:
                                        PASS gold 0.66 -> 0.88 (target 0.78)
    python ppo.py --algorithm rloo      or reinforce: the same loop with less in it, see ALGORITHMS
    python ppo.py --beta 0 --steps 80   no leash: the score rises on and on, and gold turns over
    python ppo.py --target_kl 4         beta is adapted, to hold the KL near 4 nats an answer
    python ppo.py --init SmolLM2-135M --reward JUDGE --data mine.jsonl --lr 1e-6 --device cuda --out out/mine

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155): no pretraining loss mixed in, no early stop of
the epochs, critic and policy of one size. Try next: --lam 1, --epochs 8, --clip 10 (none), --critic_lr 0.
"""
import copy, itertools, math, textwrap, time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, replace
from statistics import fmean as mean

import torch

from data import studybuddy
from model import (PAD, RANK, Log, ScalarModel, UserError, add_lora, average, clip, load, load_scalar, main,
                   merge_lora, need, optimizer, pad, portion, read_jsonl, render, sample, save, schedule,
                   special, to_messages, token_logps, write_results)

@dataclass(frozen=True)
class Config:
    algorithm: str = "ppo"            # ppo, rloo or reinforce
    init: str = "out/sft"             # start from this model folder; it is the reference, too
    reward: str = "out/reward_model"  # the reward model; the critic starts from it
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt"
    out: str = "out/ppo"              # write here
    steps: int = 40                   # batches of answers
    answers: int = 64                 # B: answers a step
    group: int = 0                    # G: answers to each prompt (0: see ALGORITHMS)
    epochs: int = 0                   # times that each answer is learned from (0: see ALGORITHMS)
    batch: int = 0                    # answers a batch (0: see ALGORITHMS)
    accumulate: int = 1               # batches an optimiser step
    lr: float = 0.0                   # peak learning rate of the policy (0: see ALGORITHMS)
    critic_lr: float = 1e-3           # and of the critic
    lora: int = 0                     # train adapters of this rank on the policy; wants a higher lr
    beta: float = 0.1                 # weight of the KL to the reference in the reward
    target_kl: float = 0.0            # adapt beta to keep the KL at so many nats an answer (0: beta is fixed)
    gamma: float = 1.0                # discount of a reward one token later
    lam: float = 0.95                 # GAE's lambda: 1 trusts what happened, 0 trusts the critic
    clip: float = 0.2                 # eps: how far a ratio may move before it stops paying
    penalty: float = 1.0              # an answer that never ends scores so much below the worst of its batch
    whiten: bool = False              # scale the rewards to a deviation of 1
    temperature: float = 1.0          # of the sampling, and so of the log-probs
    max_new: int = 72                 # longest answer in tokens
    seed: int = 0                     # same seed, same machine: same numbers
    device: str = "cpu"               # cpu, cuda or mps
    save: bool = True                 # write the checkpoint and the results
    quiet: bool = False               # print nothing

# ---------------------------------------------------------------- data and rewards

def read_prompts(config, tokenizer, context):
    """-> rows, each with its tokens in "ids"."""
    rows = [row | {"ids": render(tokenizer, to_messages(row["prompt"]), reply=True)[0]}
            for row in read_jsonl(config.data, need=("prompt",))]
    long = sum(len(row["ids"]) + config.max_new + 1 > context for row in rows)    # 1: the judge's <|im_end|>
    if long:
        raise UserError(f"{config.data}: {long} of {len(rows)} prompts are too long: with --max-new "
                        f"{config.max_new} tokens they do not fit the models' {context}")
    return rows

def score_by(model, tokenizer):
    """SEAM: score(prompts, responses) -> a number each; prompts are texts or messages, responses texts. Your
    own judge goes to train(config, score). This one reads a reward model at the answer's end token."""
    @torch.no_grad()
    def score(prompts, responses):
        chats = [to_messages(x) + [dict(role="assistant", content=y)] for x, y in zip(prompts, responses)]
        ids = [ids[:len(ids) - loss[::-1].index(1)] for ids, loss in (render(tokenizer, c) for c in chats)]
        real = pad([[1] * len(row) for row in ids], 0).bool().to(model.mean.device)         # (B, T)
        scores = model(pad(ids, special(tokenizer, PAD)).to(real.device), real)             # (B, T)
        return scores.gather(1, real.sum(1, keepdim=True) - 1)[:, 0].tolist()               # (B,) at the end
    return score

# ---------------------------------------------------------------- the maths
# B answers of T tokens. mask (B, T) is True at an answer's tokens, an unbroken run that ends with <|im_end|>

# k1 = log pi/ref,   k2 = (log pi/ref)^2 / 2,   k3 = ref/pi - 1 - log ref/pi              Schulman 2020
def kl_estimates(logp, ref_logp):
    """Of tokens drawn from pi -> k1, k2, k3, what each tells of KL(pi || ref). As a loss, backpropagated:
    k1: right on average, noisy, often below 0. The mean of its gradient is 0, so it teaches nothing; but as a
        *reward*, as here, the policy gradient of its mean is exactly the gradient of KL(pi || ref)
    k2: biased, but the mean of its gradient is exactly the gradient of KL(pi || ref)
    k3: right on average, never below 0, less noise if pi is near ref; but its gradient is KL(ref || pi)'s"""
    k1 = logp - ref_logp
    return k1, k1.square() / 2, torch.expm1(-k1) + k1

# r_t = - beta k1_t, and r(x, y) on top at the last token          Ziegler et al. 2019 (1909.08593), eq. 2
def token_rewards(scores, logp, ref_logp, mask, beta):
    """scores (B,), the rest (B, T) -> (B, T)"""
    rewards = -beta * kl_estimates(logp, ref_logp)[0].masked_fill(~mask, 0.0)
    last = mask.int().cumsum(1).argmax(1, keepdim=True)                                     # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None])

# A_t = sum_k (gamma lambda)^k delta_t+k,   delta_t = r_t + gamma V_t+1 - V_t      Schulman et al. 2015
def gae(rewards, values, mask, gamma, lam):
    """All (B, T); values[:, t] is V before token t is drawn -> advantages, returns. After the end comes
    nothing: V and A are 0. lambda 1: A is what came minus what was expected; lambda 0: the next surprise."""
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages, A, V = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * V - values[:, t]                                    # (B,)
        A = (delta + gamma * lam * A).masked_fill(~mask[:, t], 0.0)
        advantages[:, t], V = A, values[:, t]
    return advantages, advantages + values

# A_i = R_i - 1/(G - 1) sum_j!=i R_j                               Ahmadian et al. 2024 (2402.14740), sec. 2
def rloo_advantages(rewards):
    """(B, G) -> (B, G). The other answers to the prompt are the baseline: it does not know answer i, so it
    takes noise away and adds no bias."""
    G = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (G - 1)

# (x - mean) / std, and + mean where that is to stay
def whiten(x, mask, shift_mean=True):
    """(B, T) over all tokens of the mask -> (B, T), 0 outside. Advantages are shifted. Rewards are not: to
    take their mean away is to tell a model that does well that it does badly."""
    average = x[mask].mean()
    x = (x - average) * (x[mask].var(correction=0) + 1e-8).rsqrt() + (0.0 if shift_mean else average)
    return x.masked_fill(~mask, 0.0)

# L = - mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)         PPO (1707.06347), eq. 7
def policy_loss(logp, old_logp, advantages, mask, clip):
    """(B, T) -> scalar. Once a token with A > 0 is 1 + eps times as likely as when it was drawn, or one with
    A < 0 1 - eps times, it has no gradient. Before the first step rho is 1 and the gradient REINFORCE's."""
    logp, old_logp, A = (x[mask] for x in (logp, old_logp, advantages))                     # (N,)
    rho = (logp - old_logp).exp()
    return -torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A).mean()

# L = mean_t 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)
def value_loss(values, old_values, returns, mask, clip):
    """(B, T) -> scalar. Not in the paper, but in its code: the critic, too, moves little at a time."""
    values, old_values, returns = (x[mask] for x in (values, old_values, returns))          # (N,)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2

# beta <- beta (1 + 0.1 clip((KL - target) / target, -0.2, 0.2))   Ziegler et al. 2019, sec. 2.2
def adapt_beta(beta, kl, target):
    """A thermostat: too far from the reference and the leash gets shorter, by 2% a step at most."""
    return beta * (1 + 0.1 * min(max((kl - target) / target, -0.2), 0.2))

# 1 - Var(R - V) / Var(R)           1: the critic foresees all. 0: no better than a constant. Below: worse
def explained_variance(values, returns, mask):
    return (1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0)).item()

# An algorithm: rewards, values (0 without a critic), (B, T) -> advantages, returns; memory lives on
def ppo(rewards, values, mask, config, memory):
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    return whiten(advantages, mask), returns

def rloo(rewards, values, mask, config, memory):
    """An answer is one action, and all of its tokens share what it earned."""
    A = rloo_advantages(rewards.sum(1).view(-1, config.group))                              # (B,) -> (P, G)
    return A.view(-1, 1).expand_as(rewards), rewards                                        # (B, T)

def reinforce(rewards, values, mask, config, memory):
    """Williams 1992: what an answer earned, minus what answers have earned of late."""
    R = rewards.sum(1)                                                                      # (B,)
    baseline = memory.get("baseline", R.mean())
    memory["baseline"] = 0.9 * baseline + 0.1 * R.mean()
    return (R - baseline)[:, None].expand_as(rewards), rewards                              # (B, T)

Algorithm = namedtuple("Algorithm", "advantages critic group epochs batch lr")
ALGORITHMS = {  #                    critic group epochs batch lr
    "ppo":       Algorithm(ppo,       True,  1,   2,  32, 3e-4),
    "rloo":      Algorithm(rloo,      False, 4,   1,  32, 5e-4),
    "reinforce": Algorithm(reinforce, False, 1,   1,  32, 5e-4)}

# ---------------------------------------------------------------- rollouts

def state_values(critic, ids, mask, answer):
    """V before each answer token is drawn: what the critic says at the token before it. (B, T)"""
    return critic(ids, mask).roll(1, 1).masked_fill(~answer, 0.0)                           # (B, T) t-1 for t

# B answers: their prompts, texts, whether they ended, scores; tokens = ids, mask, answer, (B, T) each; and of
# the answers' tokens (B, T): log pi_old, log ref, V_old (0 without a critic)
Rollout = namedtuple("Rollout", "rows texts ended scores tokens logp ref_logp values")

@torch.no_grad()
def rollout(policy, reference, critic, score, tokenizer, rows, config, generator):
    """G answers to each row, and all that the four models say about them."""
    s = sample(policy, tokenizer, [row["ids"] for row in rows], config.group, config.max_new,
               config.temperature, generator=generator)
    rows = [row for row in rows for _ in range(config.group)]
    scores = torch.as_tensor(score([row["prompt"] for row in rows], s.texts)).to(s.logps)   # (B,)
    scores = scores.where(s.ended, scores.min() - config.penalty)
    # prompts were padded on the left, answers on the right: all on the right it takes fewer columns
    cut = lambda xs, blank: pad([x[real].tolist() for x, real in zip(xs, s.mask)], blank).to(xs)
    tokens = cut(s.ids, special(tokenizer, PAD)), cut(s.mask, False), cut(s.answer, False)  # (B, T) each
    # log pi again, computed as ref's and as in training: so the first KL is exactly 0 and the first ratio 1
    logp, ref_logp = (token_logps(model, *tokens, config.temperature) for model in (policy, reference))
    values = state_values(critic, *tokens) if critic else torch.zeros_like(logp)
    return Rollout(rows, s.texts, s.ended, scores, tokens, logp, ref_logp, values)

# ---------------------------------------------------------------- what to watch

def signals(texts):
    """Of B answers. Whoever has found a trick repeats it, within an answer and from answer to answer."""
    words = [text.split() for text in texts]
    threes, openings = [[*zip(w, w[1:], w[2:])] for w in words], Counter(tuple(w[:3]) for w in words)
    return {"repeated": mean(len({*t}) < len(t) for t in threes),
            "openings": sum(count for _, count in openings.most_common(5)) / len(texts)}

def alarms(now, start, B):
    """Signals now, and at the start, of ref's answers -> {signal: message}, of those beyond their threshold.
    kl: to choose the best of n answers takes log n - (n-1)/n nats (Stiennon et al. 2020, 2009.01325). Beyond
        n = 100 these are answers that ref hardly ever gives, and the reward model may not know such
    length: half as long again is another kind of answer
    repeated, openings: luck moves a share of B answers by 0.5 / sqrt(B) at most; 5 times that is no luck"""
    luck = 5 * 0.5 / math.sqrt(B)
    most = {"kl": math.log(100) - 0.99, "length": 1.5 * start["length"],
              "repeated": start["repeated"] + luck, "openings": start["openings"] + luck}
    return {k: f"{k} {now[k]:.2f}, first {start[k]:.2f}, max {x:.2f}" for k, x in most.items() if now[k] > x}

def turning_point(rows):
    """Goodhart's law, for whoever knows the truth. Means over a tenth of the run, as one batch is noisy."""
    w = max(1, len(rows) // 10)
    gold, score = ([mean(row[key] for row in rows[i:i + w]) for i in range(len(rows) - w + 1)]
                   for key in ("gold", "score"))
    i = gold.index(max(gold))
    return {"peak_step": i + w // 2, "peak": gold[i], "last": gold[-1], "rise": score[-1] - score[i]}

def show_tokens(r, rewards, advantages, tokenizer, say):
    """A short answer, token by token: from the score to the push that each token gets."""
    i = min(range(len(r.rows)), key=lambda i: abs(len(r.texts[i].split()) - 6))
    at, numbers = r.tokens[2][i], (r.logp - r.ref_logp, rewards, r.values, advantages)      # (T,), (B, T)
    say(f"{textwrap.shorten(studybuddy.flat(r.rows[i]['prompt']), 50)} Its score: {r.scores[i]:.2f}\n"
        "              log pi/ref    reward         V         A")
    for token, *row in zip(r.tokens[0][i][at].tolist(), *((x[i][at] + 0.0).tolist() for x in numbers)):
        say(f"{tokenizer.decode([token]):>14}" + "".join(f"{x:10.2f}" for x in row))

def truth(rows, texts, ended):
    """Gold, where it is known: watched, never trained on."""
    marks = map(studybuddy.judge, rows, texts, ended) if all("slots" in row for row in rows) else ()
    return {"gold": mean(mark["gold"] for mark in marks)} if marks else {}

@torch.no_grad()
def evaluate(policy, reference, score, tokenizer, held, config, against=None):
    """-> report card, [(row, answer, score)]. The world has an exam; your data has its judge."""
    if all("slots" in row for row in held):
        old = against and [(row, text) for row, text, _ in against]
        card, answers = studybuddy.exam(policy, tokenizer, reference, old, config.seed)
        rows, texts = zip(*answers)
        scores = [float(x) for x in score([row["prompt"] for row in rows], texts)]
        return {"score": mean(scores)} | card, [*zip(rows, texts, scores)]
    r = rollout(policy, reference, None, score, tokenizer, held, replace(config, group=1),
                torch.Generator().manual_seed(config.seed))
    card = dict(score=r.scores, kl=(r.logp - r.ref_logp).sum(1), length=r.tokens[2].sum(1), ended=r.ended)
    return {k: x.float().mean().item() for k, x in card.items()}, [*zip(held, r.texts, r.scores.tolist())]

def show_answers(before, after, say):
    for (row, *old), (_, *new) in [*zip(before, after)][::max(1, len(before) // 5)]:
        say(f"  prompt  {textwrap.shorten(studybuddy.flat(row['prompt']), 70)}")
        for name, (text, score) in ("before", old), ("after", new):
            gold = "".join(f", gold {x:.1f}" for x in truth([row], [text], [True]).values())
            say(f"{name:>8}  {textwrap.shorten(text, 70)}\n          score {score:+.1f}{gold}")

# ---------------------------------------------------------------- training

def fit(policy, reference, critic, score, tokenizer, rows, config, log, say):
    advantages_of, beta = ALGORITHMS[config.algorithm].advantages, config.beta
    memory, start, heard = {}, {}, {}
    add_lora(policy, config.lora)
    learners = [(m, optimizer(m, lr)) for m, lr in ((policy, config.lr), (critic, config.critic_lr)) if m]
    rows, generator = portion(rows), torch.Generator().manual_seed(config.seed + RANK)
    order = lambda size: torch.randperm(size, generator=generator)
    stream = (rows[i] for _ in itertools.count() for i in order(len(rows)).tolist())   # again and again
    try:
        for step in range(config.steps):
            for _, optim in learners:
                for group in optim.param_groups:
                    group["lr"] = optim.defaults["lr"] * schedule(step, config.steps)

            # 1 sample, 2 score
            batch = [next(stream) for _ in range(config.answers // config.group)]
            r = rollout(policy, reference, critic, score, tokenizer, batch, config, generator)
            ids, mask, answer = r.tokens                                                    # (B, T)
            rewards = token_rewards(r.scores, r.logp, r.ref_logp, answer, beta)
            rewards = whiten(rewards, answer, shift_mean=False) if config.whiten else rewards
            advantages, returns = advantages_of(rewards, r.values, answer, config, memory)

            rhos, losses, value_losses = [], [], []
            parts = [at for _ in range(config.epochs) for at in order(len(ids)).split(config.batch)]
            for n, at in enumerate(parts, 1):
                T = mask[at].sum(1).max()
                *tokens, old_logp, old_values, A, R = (x[at, :T] for x in (                 # (batch, T) each
                    ids, mask, answer, r.logp, r.values, advantages, returns))
                # 3 loss: at the temperature that sampled, or rho would not begin at 1
                logp = token_logps(policy, *tokens, config.temperature)
                loss = policy_loss(logp, old_logp, A, tokens[2], config.clip)
                (loss / config.accumulate).backward()
                losses.append(loss.item())
                rhos.append((logp.detach() - old_logp)[tokens[2]].exp())                    # (N,)
                if critic:
                    loss = value_loss(state_values(critic, *tokens), old_values, R, tokens[2], config.clip)
                    (loss / config.accumulate).backward()
                    value_losses.append(loss.item())

                # 4 step
                if n % config.accumulate:
                    continue                             # more batches to come for this update
                for model, optim in learners:
                    clip(model)
                    optim.step()
                    optim.zero_grad()

            # 5 log: KL in nats an answer
            k1, k2, k3 = (average(k.sum(1).mean()).item() for k in kl_estimates(r.logp, r.ref_logp))
            now = {"kl": k1, "length": answer.sum(1).float().mean().item(), **signals(r.texts)}
            start, rho, first = start or now, torch.cat(rhos), rhos[0].mean()
            found = alarms(now, start, len(ids))
            if step == 0:
                show_tokens(r, rewards, advantages, tokenizer, say)
                say(f"first ratio {first:.3f}, KL {k1:.3f}: they must be 1 and 0, as nothing has moved yet")
            log(step, score=r.scores.mean(), **truth(r.rows, r.texts, r.ended.tolist()), **dict(
                kl=k1, entropy=-r.logp[answer].mean(),  # - log pi, averaged over tokens that pi drew
                ratio=rho.mean(), clipped=((rho - 1).abs() > config.clip).float().mean(),
                explained=explained_variance(r.values, returns, answer), ended=r.ended.float().mean(),
                beta=beta, kl_k2=k2, kl_k3=k3, first_ratio=first, alarms=len(found), loss=mean(losses),
                value_loss=mean(value_losses or [0.0])) | now)
            for name in found.keys() - heard.keys():
                say(f"WARNING: {found[name]}")
            heard |= found
            beta = adapt_beta(beta, k1, config.target_kl) if config.target_kl else beta
        show_tokens(r, rewards, advantages, tokenizer, say)
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")
    merge_lora(policy)

def train(config, score=None):
    """score: your own judge, (prompts, responses) -> numbers, in place of the reward model."""
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    if config.algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    for flag in ("group", "epochs", "batch", "lr"):
        value = getattr(config, flag) or getattr(ALGORITHMS[config.algorithm], flag)
        config = replace(config, **{flag: value})
    for flag, least in dict(steps=1, group=1 + (config.algorithm == "rloo"), epochs=1, batch=1, accumulate=1,
                            beta=0, temperature=0.01).items():
        if getattr(config, flag) < least:
            raise UserError(f"--{flag} {getattr(config, flag)}: at least {least} is needed")
    updated = config.batch * config.accumulate           # answers an update
    for flag, size in {"--group": config.group, "--batch times --accumulate": updated}.items():
        if config.answers % size or config.answers < size:
            raise UserError(f"--answers {config.answers}: not a multiple of {flag}, {size}")
    torch.manual_seed(config.seed)
    need(config.init, "python sft.py", 25)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge, judges = ScalarModel(copy.deepcopy(policy)).to(config.device), tokenizer # if yours is no network
    if score is None:
        need(config.reward, "python reward_model.py", 60)
        judge, judges = load_scalar(config.reward, config.device)
        score = score_by(judge, judges)
    if len(judge.mean) > 1 or judges._mergeable_ranks != tokenizer._mergeable_ranks:
        raise UserError(f"{config.reward}: it must have one score and the vocabulary of {config.init}")
    critic = copy.deepcopy(judge) if ALGORITHMS[config.algorithm].critic else None
    rows = read_prompts(config, tokenizer, min(policy.config.max_len, judge.config.max_len))
    cut, size = min(64, len(rows) // 2), sum(p.numel() for p in policy.parameters())
    held, rows = rows[:cut] or rows, rows[cut:]
    say(f"{config.algorithm}: {config.init}, {size:,} parameters, on {config.device}; {len(rows):,} prompts\n"
        f"a step: {config.answers} answers, {config.epochs * config.answers // updated} updates")

    # BEFORE
    before, old = evaluate(policy, reference, score, tokenizer, held, config)
    log = Log(config.steps, config.quiet)
    fit(policy, reference, critic, score, tokenizer, rows, config, log, say)
    if config.save:                                      # before the exam: whatever happens there, it is safe
        save(config.out, policy, tokenizer)

    # AFTER
    after, new = evaluate(policy, reference, score, tokenizer, held, config, old)
    show_answers(old, new, say)
    if not config.quiet:
        studybuddy.show({"before": before, "after": after})
    key, target, turn = "score", before["score"], {}
    if "gold" in after and log.rows:
        key, target, turn = "gold", before["gold"] + 0.12, turning_point(log.rows)
        say(f"alignment tax: math {before['math']:.2f} -> {after['math']:.2f}")
        if turn["rise"] > 0 and turn["last"] < turn["peak"] - 0.1:
            say("GOODHART: since step {peak_step} the reward model's score rose by {rise:.2f}, and gold fell "
                "from {peak:.2f} to {last:.2f}".format(**turn))
    passed, seconds = after[key] >= target, time.time() - started
    say(f"{'PASS' if passed else 'FAIL'} {key} {before[key]:.2f} -> {after[key]:.2f} (target {target:.2f}) "
        f"in {seconds:.0f} s")
    results = dict(stage="ppo", config=asdict(config), seconds=seconds, before=before, after=after,
                   passed=passed, turn=turn)
    if config.save:
        write_results(config.out, log, **results)
    return results | {"model": policy, "tokenizer": tokenizer, "log": log.rows}

if __name__ == "__main__":
    main(Config, train, __doc__)
