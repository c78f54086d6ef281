"""A race: REINFORCE, RLOO, PPO and GRPO, on one task and one budget of sampled tokens.

All four make likelier what earned more than expected. They differ in who expects: the batch, the
other answers to the same prompt, a critic that looks at every token, or the group's mean and
deviation. Steps are no fair measure, as one takes two passes over its answers, and answers grow
longer. What costs most in practice is sampling, so here each may draw so many tokens and no more.

    reinforce   A_i = R_i - mean of the batch
    rloo        A_i = R_i - mean of the others to its prompt
    grpo        A_i = (R_i - mean of its group) / deviation; an answer's tokens share its weight
    ppo         A_it = sum_k (gamma lambda)^k delta_t+k; a critic V, two passes with a clip

By hand: of four answers to a prompt one is right, R = 1 0 0 0, in a batch whose mean is 0.5. The
right one has A = 0.5 for reinforce, 1 for rloo, and (1 - 0.25) / 0.433 = 1.73 for grpo.

The task is grpo.py's, sums that a verifier checks: no judge that one could fool. The maths is that
of ppo.py and grpo.py, and the loop is one for all. What differs besides the advantage is what each
file came with: its learning rate, its group, and ppo's two passes in small batches. (The small
batches are ppo.py's for all three of its methods; here reinforce and rloo take a batch as one
update.)

    python -m lessons.race                            a minute: 30,000 tokens each
    python -m lessons.race --runs "rloo grpo" --tokens 100000

Simplified: one learning rate schedule, over tokens; each method's own peak rate, group and epochs.
Tune one of them alone, and it may win: published races are often run so.
Try next: --lr 1e-3 for all; --batch 32 and 128; --runs "ppo" with --critic-lr 0.
"""
import copy
from dataclasses import dataclass, replace

import torch

import grpo
import ppo
from data import exam
from data.chart import Panel, chart
from data.checkpoints import load
from data.run import adamw, batches, begin, clip_gradients, need
from lessons import figures
from data.studybuddy import read
from model import ScalarModel, UserError, sample, token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt" and "answer"
    tokens: int = 30_000      # so many may each method sample
    batch: int = 64           # answers that are drawn at a time
    lr: float = None          # peak learning rate (default: each method's own)
    critic_lr: float = 1e-3   # peak learning rate of ppo's critic
    runs: str = "reinforce rloo grpo ppo"  # who takes part
    goal: float = 0.8         # share of right answers that somebody reaches first
    save: bool = False        # the models are not kept

    limits = figures.Lesson.limits | {"tokens": (1000, 10**9), "batch": (8, 10**6)}
    unused = ("out", "steps", "accumulate", "lora", "save")     # it ends with its tokens


# ---------------------------------------------------------------- who expects what?
# rewards, values (B, T) -> advantages, returns (B, T), as in ppo.py

# A = (R_i - mean_j R_j) / std_j R_j                 Shao et al. 2024 (2402.03300), sec. 4.1.2
def grpo_advantages(rewards, answer, group):
    R = rewards.sum(1, keepdim=True)                            # (B, 1)
    A = grpo.group_advantages(R.view(-1, group))                # (P, G)
    return A.view(-1, 1) * answer, R * answer


RACERS = dict(ppo.ALGORITHMS)
RACERS["grpo"] = ppo.Algorithm(critic=False, group=grpo.Config.group, epochs=grpo.Config.epochs,
                               lr=grpo.Config.lr)


def advantages_of(name, rewards, values, answer):
    if name == "grpo":
        return grpo_advantages(rewards, answer, RACERS[name].group)
    settings = ppo.Config(algorithm=name, group=RACERS[name].group)
    return ppo.advantages_of(rewards, values, answer, settings)


def loss_of(name, logps, old_logps, advantages, answer, max_new):
    """The clipped loss: PPO's for all, as a mean over tokens, and GRPO's as one over answers."""
    if name == "grpo":
        method = grpo.FAMILY["grpo"]
        weights = method.weights(answer, max_new)               # (b, T)
        A = advantages.sum(1) / answer.sum(1)                   # (b,) all of a row are the same
        return grpo.grpo_loss(logps, old_logps, A, answer, weights, method).sum()
    return ppo.policy_loss(logps, old_logps, advantages, answer, ppo.Config.eps)


# ---------------------------------------------------------------- a run

def draw(policy, tokenizer, stream, group, generator):
    """-> Samples of B answers, `group` to each prompt, and what the verifier gives them (B,)"""
    prompts = next(stream)
    ids = [prompt.ids for prompt in prompts]
    samples = sample(policy, tokenizer, ids, group, grpo.Config.max_new, generator=generator)
    rewards = grpo.group_rewards(grpo.strict, prompts, samples)  # (P, G)
    return samples, rewards.flatten()


def climb(name, config):
    """-> the policy, and a curve: tokens drawn so far, and the share of these answers right"""
    racer = RACERS[name]
    policy, tokenizer = load(config.init, config.device)
    critic = ScalarModel(copy.deepcopy(policy)).to(config.device)
    optimizers = {policy: adamw(policy, config.lr or racer.lr)}
    if racer.critic:
        optimizers[critic] = adamw(critic, config.critic_lr)
    settings = grpo.Config(data=config.data)
    prompts, _ = grpo.read_prompts(settings, tokenizer, policy.config.max_len)
    shuffle = torch.Generator().manual_seed(config.seed)
    stream = batches(prompts, None, config.batch // racer.group, shuffle)
    generator = torch.Generator().manual_seed(config.seed)
    spent = 0
    curve = []
    while spent < config.tokens:
        # 1 sample, 2 score
        samples, scores = draw(policy, tokenizer, stream, racer.group, generator)
        ids, mask, answer, old_logps = samples[:4]              # (B, T) each
        rewards = ppo.token_rewards(scores, old_logps, old_logps, answer, beta=0.0)
        values = torch.zeros_like(old_logps)
        if racer.critic:
            with torch.no_grad():
                values = ppo.state_values(critic, ids, mask, answer)
        advantages, returns = advantages_of(name, rewards, values, answer)
        # the learning rate goes up over ten batches, and down to 0 with the budget
        warm = min((len(curve) + 1) / 10, 1 - spent / config.tokens)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * warm
        for epoch in range(racer.epochs):
            size = config.batch // racer.epochs                 # so ppo has minibatches, too
            for at in torch.randperm(len(ids), generator=generator).split(size):
                # 3 loss
                y = answer[at]                                  # (b, T)
                logps = token_logps(policy, ids[at], mask[at], y)
                loss = loss_of(name, logps, old_logps[at], advantages[at], y, settings.max_new)
                if racer.critic:
                    V = ppo.state_values(critic, ids[at], mask[at], y)
                    loss = loss + ppo.value_loss(V, values[at], returns[at], y, ppo.Config.eps)
                loss.backward()
                # 4 step
                for model, optimizer in optimizers.items():
                    clip_gradients(model)
                    optimizer.step()
                    optimizer.zero_grad()
        # 5 log
        spent += int(answer.sum())
        curve.append((spent, (scores == 1).float().mean().item()))
    return policy, tokenizer, curve


# ---------------------------------------------------------------- who is ahead?

def smooth(curve):
    """Single batches are noise: a running mean of the share right. -> [(tokens, right)]"""
    means = exam.running_mean([right for tokens, right in curve])
    return [(tokens, right) for (tokens, _), right in zip(curve, means)]


def at_tokens(curve, places):
    """What a curve was at so many tokens: in its last batch before. -> list"""
    values = []
    for place in places:
        before = [right for tokens, right in curve if tokens <= place]
        values.append(before[-1] if before else curve[0][1])
    return values


def tokens_until(curve, goal, most):
    """Sampled tokens until so many answers were right; `most` for one that never came there."""
    for tokens, right in curve:
        if right >= goal:
            return tokens
    return most


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, tokens=4000)
    names = config.runs.split()
    for name in names:
        if name not in RACERS:
            raise UserError(f"--runs {name}: choose some of {', '.join(RACERS)}")
    need(config.init)
    sums = [row for row in read("exam") if row["kind"] == "math"]
    places = list(range(config.tokens // 20, config.tokens + 1, config.tokens // 20))
    quarter = config.tokens // 4
    half = config.tokens // 2
    whole = config.tokens
    numbers = {"places": places, "right": {}, "greedy": {}, "until": {}}
    config.say("share right, after so many tokens; tokens until the goal; the exam, greedy\n"
               f"            {quarter:>10,}{half:>10,}{whole:>10,}{config.goal:>12g}")
    for name in names:
        policy, tokenizer, curve = climb(name, config)
        curve = smooth(curve)
        card, _ = exam.exam(policy, tokenizer, seed=config.seed, rows=sums)
        numbers["right"][name] = at_tokens(curve, places)
        numbers["greedy"][name] = card["math_greedy"]
        numbers["until"][name] = tokens_until(curve, config.goal, config.tokens)
        line = f"{name:12}"
        for right in at_tokens(curve, [quarter, half, whole]):
            line += f"{right:10.2f}"
        config.say(f"{line}{numbers['until'][name]:>12,}   {exam.cell('math_greedy', card)}")
    return {"numbers": numbers}


def picture(runs):
    """Right answers over sampled tokens, and how many tokens it took."""
    lines = []
    bars = []
    thousands = [tokens / 1000 for tokens in runs[0]["places"]]
    for name in runs[0]["right"]:
        lines.append(figures.line(name, thousands, [numbers["right"][name] for numbers in runs]))
        needed = [numbers["until"][name] / 1000 for numbers in runs]
        bars.append(figures.bar(name, {"thousand tokens": needed}))
    return chart([Panel("One budget of tokens", "sampled tokens, thousands",
                        "share of sums right (sampled answers, running mean)", lines),
                  Panel("Tokens to the goal", "sampled tokens, thousands", bars=bars)], height=300)


if __name__ == "__main__":
    figures.main("race", Config, train, picture, __doc__)
