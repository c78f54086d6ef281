"""Reinforcement learning from a reward model (RLHF): REINFORCE, RLOO and PPO.

Four models. The policy pi answers. A reward model scores the whole answer. A frozen copy of where
pi began, the reference, is the leash: to move away from it costs reward. A critic V guesses, before
each token is drawn, what is still to come, so that a token is credited with the surprise that it
brought and not with all that happened. For an answer y_1 .. y_n to a prompt x:

    r_t     = - beta [log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)],  and r(x, y) on top at y_n
    delta_t = r_t + gamma V_t+1 - V_t
    A_t     = sum_k (gamma lambda)^k delta_t+k,  then whitened: mean 0 and deviation 1 in a batch
    rho_t   = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    L       = - mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
    L_V     = mean_t 1/2 (V_t - R_t)^2,  R_t = A_t + V_t before whitening: what V should have said;
              V's move is clipped as well, see value_loss

Where it all stands: tensors are (B, T), and what is about y_t is in y_t's column. In this row of a
batch the prompt has two tokens and the answer three; other prompts and answers are longer.

    column     0     1     2     3         4          5          6
    ids       x_1   x_2   y_1   y_2   <|im_end|>   <|pad|>    <|pad|>
    mask       1     1     1     1         1          .          .     real tokens
    answer     .     .     1     1         1          .          .     what pi drew, its end too
    log pi     .     .    l_1   l_2       l_3         .          .     l_1: the logits of column 1
    V          .     .    V_1   V_2       V_3         .          .     V_1: the critic at column 1
    r          .     .    r_1   r_2       r_3         .          .     r_3 holds the score r(x, y)
    A          .     .    A_1   A_2       A_3         .          .     V_4 = 0, so A_3 = r_3 - V_3

By hand, where pi is the reference: V = 0.5 0.6 0.8 and a reward of 1 at the end give delta = 0.1
0.2 0.2. With gamma 1 and lambda 0.95, A_3 = 0.2, A_2 = 0.2 + 0.95 A_3 = 0.39, A_1 = 0.1 + 0.95
A_2 = 0.47.

    python ppo.py                        out/sft and out/reward_model -> out/ppo. The last line:
                                         PASS gold 0.56 -> 0.88 (target 0.68)
    python ppo.py --algorithm rloo       or reinforce: the same loop with less in it, see ALGORITHMS
    python ppo.py --beta 0 --steps 80    no leash: the score rises on and on; gold peaks, then falls
    python ppo.py --data mine.jsonl --init SmolLM2-135M --reward JUDGE --lr 1e-6 --out out/mine

A line of mine.jsonl is {"prompt": "..."}, and JUDGE a folder that reward_model.py wrote. Give the
critic of a real model a smaller rate, too: --critic-lr 1e-5. `score` is what the reward model says.
`gold` is the truth, which our toy world knows: it is watched, and never trained on. On your prompts
there is the score alone, or a score of your own (see SEAM).

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155): no pretraining loss mixed in, and a
critic of the policy's size. When to stop: python -m lessons.goodhart.
Try next: --lam 1; --epochs 8; --eps 10, which clips nothing; --critic-lr 0; --target-kl 4.
"""
import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import exam, rows
from data.checkpoints import load, load_scalar, save
from data.studybuddy import judge
from data.run import (RANK, Log, Settings, adamw, add_lora, average, batches, begin, clip_gradients,
                      hold_out, main, merge_lora, need, parts, steps)
from model import (ScalarModel, UserError, collate, end_scores, render_answer, render_prompt,
                   sample, token_logps)


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt"
    out: str = "out/ppo"      # write here
    steps: int = 24           # batches of answers
    batch: int = 64           # B: answers a step
    lr: float = None          # peak learning rate (default: see ALGORITHMS)
    algorithm: str = "ppo"    # reinforce, rloo or ppo
    reward: str = "out/reward_model"  # reward model; the critic's start
    group: int = None         # G: answers to each prompt (default: see ALGORITHMS)
    epochs: int = None        # passes over the answers (default: see ALGORITHMS)
    minibatch: int = 32       # answers an update
    critic_lr: float = 1e-3   # peak learning rate of the critic
    beta: float = 0.1         # what a nat of distance from the reference costs
    target_kl: float = None   # adapt beta, to keep the KL near so many nats an answer
    gamma: float = 1.0        # discount of a reward one token later
    lam: float = 0.95         # GAE's lambda: 0 trusts the critic alone
    eps: float = 0.2          # how far a ratio, or V, may move before it stops paying
    penalty: float = 1.0      # how far below the worst an endless answer scores
    temperature: float = 1.0  # of the sampling, and so of the log-probs
    max_new: int = 72         # longest answer in tokens

    limits = Settings.limits | {"group": (1, 10**6), "epochs": (1, 10**6), "minibatch": (1, 10**6),
                                "max_new": (1, 10**6), "target_kl": (0.01, 10**6),
                                "temperature": (0.01, 100)}


# ---------------------------------------------------------------- the maths
# B answers in T columns, as drawn above. answer (B, T) is True at y_1 .. y_n, without a gap.
# Log-probs are 0 where no answer is.

# k1 = log pi/ref,   k2 = (log pi/ref)^2 / 2,   k3 = ref/pi - 1 - log ref/pi          Schulman 2020
def kl_estimates(logps, ref_logps):
    """Of tokens drawn from pi -> k1, k2, k3, three estimates of KL(pi || ref).
    k1: right on average, but noisy and often below 0. As a loss its gradient is 0 on average, and
        teaches nothing. As a reward, as here, its policy gradient is that of KL(pi || ref)
    k2: biased, but as a loss its gradient is that of KL(pi || ref) on average
    k3: right on average, never below 0, and less noisy where pi is near ref; but as a loss its
        gradient is that of the other KL, KL(ref || pi)"""
    k1 = logps - ref_logps
    k2 = k1 ** 2 / 2
    k3 = torch.expm1(-k1) + k1                                  # expm1(-k1) = ref/pi - 1
    return k1, k2, k3


# r_t = - beta k1_t, and r(x, y) on top at y_n           Ziegler et al. 2019 (1909.08593), eq. 2
def token_rewards(scores, logps, ref_logps, answer, beta):
    """scores (B,), the rest (B, T) -> (B, T)"""
    k1, _, _ = kl_estimates(logps, ref_logps)
    rewards = -beta * k1.masked_fill(~answer, 0.0)
    last = answer.cumsum(1).argmax(1)   # (B,), the column of y_n: there the count is full
    rewards[torch.arange(len(last), device=last.device), last] += scores
    return rewards


# L = - mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
def policy_loss(logps, old_logps, advantages, answer, eps):     # Schulman 2017 (1707.06347), eq. 7
    """(B, T) -> a number. A token with A > 0 that is 1 + eps times as likely as when it was drawn
    has moved far enough: its gradient is 0. So is that of one with A < 0 below 1 - eps. Before the
    first step rho is 1 everywhere, and the gradient is REINFORCE's, - A grad log pi. Why the min: a
    bad token that became likelier than 1 + eps must still be pushed back."""
    rho = (logps - old_logps)[answer].exp()                     # (N,), of all N answer tokens
    A = advantages[answer]                                      # (N,)
    clipped = rho.clamp(1 - eps, 1 + eps)
    return -torch.minimum(rho * A, clipped * A).mean()


# L = mean_t 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)
def value_loss(values, old_values, returns, answer, eps):
    """(B, T) -> a number. Not in PPO's paper, but in OpenAI's code: the critic's move is clipped,
    too. Here eps is in units of reward."""
    V = values[answer]                                          # (N,)
    V_old = old_values[answer]
    R = returns[answer]
    clipped = V_old + (V - V_old).clamp(-eps, eps)
    larger = torch.maximum((V - R) ** 2, (clipped - R) ** 2)
    return larger.mean() / 2


# 1 - Var(R - V) / Var(R)
def explained_variance(values, returns, answer):
    """1: the critic foresees everything. 0: it is no better than a constant. Below: it is worse."""
    V = values[answer]                                          # (N,)
    R = returns[answer]
    return 1 - (R - V).var() / R.var()


# beta <- beta (1 + 0.1 clip((KL - target) / target, -0.2, 0.2))      Ziegler et al. 2019, sec. 2.2
def adapt_beta(beta, kl, target):
    """A thermostat: too far from the reference and the leash gets shorter, by 2% a step at most."""
    error = (kl - target) / target
    return beta * (1 + 0.1 * min(max(error, -0.2), 0.2))


# ---- the ladder: what did a token do for its answer?
# rewards, values (B, T) -> advantages, returns (B, T). Only ppo has a critic, and so values

# A = R_i - mean_j R_j,   R_i = sum_t r_it                                            Williams 1992
def reinforce(rewards, values, answer):
    """All tokens of an answer share what it earned, less what this batch earned on average."""
    R = rewards.sum(1, keepdim=True)                            # (B, 1)
    A = R - R.mean()
    return A * answer, R * answer                               # (B, T)


# A = R_i - 1/(G - 1) sum_j!=i R_j                         Ahmadian et al. 2024 (2402.14740), sec. 2
def rloo(rewards, values, answer, group):
    """An answer is held against the G - 1 others to the same prompt. They do not know answer i, so
    they take noise away and add no bias."""
    R = rewards.sum(1, keepdim=True)                            # (B, 1)
    groups = R.view(-1, group)                                  # (P, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group - 1)
    A = R - others.view(-1, 1)                                  # (B, 1)
    return A * answer, R * answer                               # (B, T)


def ppo(rewards, values, answer, gamma, lam):
    """A token is held against what the critic expected before it."""
    advantages, returns = gae(rewards, values, answer, gamma, lam)
    return whiten(advantages, answer), returns


# A_t = sum_k (gamma lambda)^k delta_t+k,   delta_t = r_t + gamma V_t+1 - V_t
def gae(rewards, values, answer, gamma, lam):            # Schulman et al. 2015 (1506.02438), eq. 16
    """From the last column to the first. lambda 1: what came, less what was expected. lambda 0: the
    next surprise alone. R_t = A_t + V_t is what the critic should have said."""
    rewards = rewards.masked_fill(~answer, 0.0)
    values = values.masked_fill(~answer, 0.0)
    advantages = torch.zeros_like(values)
    next_V = 0.0                                                # after the end nothing comes
    next_A = 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_V - values[:, t]   # (B,)
        advantages[:, t] = delta + gamma * lam * next_A
        next_V = values[:, t]
        next_A = advantages[:, t]
    advantages = advantages.masked_fill(~answer, 0.0)
    return advantages, advantages + values


# (A_t - mean(A)) / std(A), over all answers' tokens of the batch
def whiten(advantages, answer):
    A = advantages[answer]                                      # (N,)
    std = (A.var(correction=0) + 1e-8).sqrt()                   # never 0
    advantages = (advantages - A.mean()) / std
    return advantages.masked_fill(~answer, 0.0)


class Algorithm(NamedTuple):
    critic: bool
    group: int               # what works in this world
    epochs: int
    lr: float


# All go through the same clipped loss. With --minibatch 64 a batch is one update, in which rho is
# 1: then reinforce and rloo are what their papers say, but for the mean over all tokens.
ALGORITHMS = {
    "reinforce": Algorithm(critic=False, group=1, epochs=1, lr=5e-4),
    "rloo":      Algorithm(critic=False, group=4, epochs=1, lr=5e-4),
    "ppo":       Algorithm(critic=True,  group=1, epochs=2, lr=4e-4),
}


def advantages_of(rewards, values, answer, config):
    if config.algorithm == "reinforce":
        return reinforce(rewards, values, answer)
    if config.algorithm == "rloo":
        return rloo(rewards, values, answer, config.group)
    return ppo(rewards, values, answer, config.gamma, config.lam)


# ---------------------------------------------------------------- data

class Prompt(NamedTuple):
    ids: list                # its tokens, up to where the answer begins
    messages: list
    row: dict                # its line of JSON


def read_prompts(config, tokenizer, context):
    """-> prompts to learn from, prompts held out"""
    prompts = []
    for line in rows.read_prompts(config.data):
        ids = render_prompt(tokenizer, line.messages)
        room = context - len(ids) - 1           # 1: the <|im_end|> that ends what the judge reads
        if room < config.max_new:
            raise UserError(f"{line.where}: the prompt leaves {room} of the models' {context} "
                            f"tokens; --max-new wants {config.max_new}")
        prompts.append(Prompt(ids, line.messages, line.row))
    return hold_out(prompts, [prompt.messages for prompt in prompts], most=64)


def score_by(reward_model, tokenizer):
    """SEAM: score(prompts, texts) -> numbers. A prompt is a list of messages, a text its answer.
    Yours goes to train(config, score=yours); best with a deviation near 1, as eps, beta and penalty
    are in its units. This one reads a reward model at the end token."""
    @torch.no_grad()
    def score(prompts, texts):
        examples = []
        for messages, text in zip(prompts, texts):
            examples.append(render_answer(tokenizer, messages, text))
        device = reward_model.score.weight.device
        ids, mask, answer = collate(examples, tokenizer, device)  # (B, T) each
        return end_scores(reward_model, ids, mask)              # (B,)
    return score


def load_reward_model(config, tokenizer):
    """It has to read what the policy writes, and to give one number for it."""
    need(config.reward)
    reward_model, its_tokenizer = load_scalar(config.reward, config.device)
    if its_tokenizer._mergeable_ranks != tokenizer._mergeable_ranks:    # token -> id
        raise UserError(f"--reward {config.reward}: want the vocabulary of --init {config.init}")
    count = reward_model.score.out_features
    if count > 1:
        raise UserError(f"--reward {config.reward}: {count} scores; want one")
    return reward_model


def draw_answers(policy, prompts, tokenizer, config, generator):
    """One answer to each prompt -> Samples"""
    ids = [prompt.ids for prompt in prompts]
    return sample(policy, tokenizer, ids, max_new=config.max_new, temperature=config.temperature,
                  generator=generator)


def state_values(critic, ids, mask, answer):
    """V_t, what the critic says at the token before y_t: it must not see what is drawn. (B, T)"""
    values = critic(ids, mask)[:, :-1]                          # (B, T-1)
    values = F.pad(values, (1, 0))                              # (B, T): column t - 1 moves to t
    return values.masked_fill(~answer, 0.0)


# ---------------------------------------------------------------- before and after

def evaluate(policy, reference, score, prompts, world, tokenizer, config, against=None):
    """-> report card, answers. Our toy world has an exam; elsewhere held-out prompts are asked."""
    if world:
        card, answers = exam.exam(policy, tokenizer, reference, against, config.seed)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        samples = draw_answers(policy, prompts, tokenizer, config, generator)
        card = {"ended": samples.ended.float().mean().item()}
        answers = []
        for prompt, text, ended in zip(prompts, samples.texts, samples.ended.tolist()):
            answers.append(exam.Answer(prompt.row, text, ended, mark=None))
    messages = [rows.to_messages(answer.row["prompt"]) for answer in answers]
    texts = [answer.text for answer in answers]
    scores = torch.as_tensor(score(messages, texts), dtype=torch.float32)  # (B,)
    card = {"score": scores.mean().item()} | card
    return card, answers


def gold_of(prompts, samples):
    """What the world's own judge thinks of the answers. It is watched, and never trained on."""
    total = 0.0
    for prompt, text, ended in zip(prompts, samples.texts, samples.ended):
        total += judge(prompt.row, text, bool(ended))["gold"]
    return total / len(prompts)


def show_shortest(samples, rewards, values, returns, advantages, tokenizer, config):
    """The shortest answer of a batch: from the score at its end to the push of each token."""
    i = samples.answer.sum(1).argmin()
    answer = samples.answer[i]                                  # (T,)
    prompt = samples.ids[i][samples.mask[i] & ~answer]
    config.say(tokenizer.decode(prompt.tolist()))
    config.say("           y_t       r_t       V_t   R_t-V_t       A_t")
    for t in answer.nonzero()[:, 0]:
        token = samples.ids[i, t].item()
        line = f"{tokenizer.decode([token]):>14}"
        for numbers in (rewards, values, returns - values, advantages):
            number = round(numbers[i, t].item(), 2) + 0.0       # + 0.0 makes 0.00 of -0.00
            line += f"{number:10.2f}"
        config.say(line)


# ---------------------------------------------------------------- training

def train(config, score=None):
    started = begin(config)
    if config.algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    algorithm = ALGORITHMS[config.algorithm]
    for name in ("group", "epochs", "lr"):
        if getattr(config, name) is None:
            config = replace(config, **{name: getattr(algorithm, name)})
    if config.batch % config.group != 0:
        raise UserError(f"--batch {config.batch}: want a multiple of --group, {config.group}")
    if config.algorithm == "rloo" and config.group == 1:
        raise UserError("--group 1: rloo holds an answer against others; want at least 2")
    if config.target_kl is not None and config.beta == 0:
        raise UserError("--beta 0: --target-kl makes beta larger or smaller, and 0 stays 0")

    # Policy and critic learn. Reference and reward model stay what they are.
    need(config.init)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if score is None:
        reward_model = load_reward_model(config, tokenizer)
        score = score_by(reward_model, tokenizer)
        critic = copy.deepcopy(reward_model)    # knows what an end is worth, and learns the rest
    else:
        critic = ScalarModel(copy.deepcopy(policy)).to(config.device)
    add_lora(policy, config.lora)
    add_lora(critic, config.lora)
    optimizer = adamw(policy, config.lr)
    critic_optimizer = adamw(critic, config.critic_lr)

    context = min(policy.config.max_len, critic.config.max_len)
    prompts, held = read_prompts(config, tokenizer, context)
    world = exam.knows([prompt.row for prompt in prompts + held])
    # up to 47 tokens, up to 95, ..: the few that are long go together
    lengths = [len(prompt.ids) // 48 for prompt in prompts]
    shuffle = torch.Generator().manual_seed(config.seed)
    stream = batches(prompts, lengths, config.batch // config.group, shuffle)
    generator = torch.Generator().manual_seed(config.seed + RANK)

    # BEFORE
    config.say(f"ppo: {config.algorithm} on {config.init}, on {config.device}; {len(prompts):,} "
               f"prompts to learn from, {len(held)} held out")
    before, old_answers = evaluate(policy, reference, score, held, world, tokenizer, config)

    log = Log(config)
    beta = config.beta
    for step in steps(config, optimizer, critic_optimizer):
        # 1 sample B answers, G to each prompt
        batch = []
        for prompt in next(stream):
            batch += [prompt] * config.group
        samples = draw_answers(policy, batch, tokenizer, config, generator)
        ids = samples.ids                                       # (B, T), as all that follows
        mask = samples.mask
        answer = samples.answer
        old_logps = samples.logps

        # 2 score: what do the other models say of them?
        scores = score([prompt.messages for prompt in batch], samples.texts)
        scores = torch.as_tensor(scores, dtype=torch.float32, device=ids.device)  # (B,)
        # a text that was cut off is read as if it ended there, so its score means nothing
        scores = scores.where(samples.ended, scores.min() - config.penalty)
        ref_logps = torch.zeros_like(old_logps)
        values = torch.zeros_like(old_logps)
        with torch.no_grad():
            for at in parts(torch.arange(len(ids)), config.accumulate):
                drawn = answer[at]                              # (b, T), b answers of the B
                ref_logps[at] = token_logps(reference, ids[at], mask[at], drawn, config.temperature)
                if algorithm.critic:
                    values[at] = state_values(critic, ids[at], mask[at], drawn)
        rewards = token_rewards(scores, old_logps, ref_logps, answer, beta)
        advantages, returns = advantages_of(rewards, values, answer, config)

        losses = []
        ratios = []
        updates = 0
        for epoch in range(config.epochs):
            order = torch.randperm(len(ids), generator=generator)
            for minibatch in order.split(config.minibatch):
                for at in parts(minibatch, config.accumulate):
                    # 3 loss, of policy and critic together, as they share no weights
                    drawn = answer[at]                          # (b, T), b answers of the B
                    logps = token_logps(policy, ids[at], mask[at], drawn, config.temperature)
                    loss = policy_loss(logps, old_logps[at], advantages[at], drawn, config.eps)
                    if algorithm.critic:
                        V = state_values(critic, ids[at], mask[at], drawn)
                        loss = loss + value_loss(V, values[at], returns[at], drawn, config.eps)
                    share = drawn.sum() / answer[minibatch].sum()  # of the minibatch's tokens
                    loss = share * loss
                    loss.backward()
                    losses.append(loss.item())
                    log_rho = (logps - old_logps[at])[drawn].detach()
                    ratios.append(log_rho.exp())
                # 4 step
                clip_gradients(policy)
                optimizer.step()
                optimizer.zero_grad()
                if algorithm.critic:
                    clip_gradients(critic)
                    critic_optimizer.step()
                    critic_optimizer.zero_grad()
                updates += 1

        # 5 log: KL and k3 are in nats an answer, entropy (of what was drawn) in nats a token; ratio
        # is the mean of rho, which leaves 1 only if pi ran away
        k1, k2, k3 = kl_estimates(old_logps, ref_logps)         # (B, T) each
        kl = average(k1.sum(1).mean()).item()
        rho = torch.cat(ratios)                                 # of every token in every update
        outside = (rho - 1).abs() > config.eps                  # the clip may act on these
        if step == 0:
            show_shortest(samples, rewards, values, returns, advantages, tokenizer, config)
            # the largest: over tokens drawn from pi_old the mean of rho is 1, whatever pi is
            largest = (ratios[0] - 1).abs().max()
            config.say(f"first ratios 1 +- {largest:.3f}, KL {abs(kl):.3f}: nothing moved yet")
        watched = {}
        if world:
            watched["gold"] = gold_of(batch, samples)
        explained = explained_variance(values, returns, answer)
        length = answer.sum(1).float().mean()
        ended = samples.ended.float().mean()
        log(step, score=scores.mean(), **watched, kl=kl, entropy=-old_logps[answer].mean(),
            ratio=rho.mean(), clipped=outside.float().mean(), explained=explained,
            k3=k3.sum(1).mean(), beta=beta, length=length, ended=ended, loss=sum(losses) / updates)
        if config.target_kl is not None:
            beta = adapt_beta(beta, kl, config.target_kl)
    merge_lora(policy)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER: first an answer of the last batch
    show_shortest(samples, rewards, values, returns, advantages, tokenizer, config)
    after, answers = evaluate(policy, reference, score, held, world, tokenizer, config, old_answers)
    exam.show_answers(old_answers, answers, config)
    target = exam.Target("score", before["score"] + 0.05)
    if world and config.data == Config.data:
        target = exam.Target("gold", before["gold"] + 0.12)
    results = exam.finish("ppo", config, started, log, before, after, [target])
    return results | {"model": policy, "tokenizer": tokenizer, "log": log.rows}


if __name__ == "__main__":
    main(Config, train, __doc__)
