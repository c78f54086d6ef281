"""Group relative policy optimisation (GRPO): learning to reason from answers that can be checked.

Its prompts do not show how a sum is done; the base has read that on the web. The model answers each
prompt G times, a verifier checks that, and what did better than its group becomes likelier. Answers
that show their work are right more often, so soon the model shows its work. For a prompt, its
answers o_1 .. o_G, rewards r_1 .. r_G and the policy pi_old that wrote them (Shao et al. 2024,
2402.03300, equation 3):

    A_i    = (r_i - mean(r)) / std(r)
    rho_it = pi(o_it | o_i,<t) / pi_old(o_it | o_i,<t)
    L      = - 1/G sum_i 1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)

For a batch of P prompts 1/G becomes 1/B, B = P G. With --beta, beta k3_it is taken off each min;
its mean is KL(pi || ref). By hand: rewards 1 0 1 0 1 have mean 0.6 and deviation 0.49 (over G, not
G - 1), so the advantages are +0.82 -1.22 +0.82 -1.22 +0.82. While pi is pi_old, rho is 1 and L =
- mean(A) = 0. Its gradient is not 0: watch the reward, not the loss. Once a token of the first
answer is at rho 1.5, it counts for min(1.5 x 0.82, 1.2 x 0.82) = 0.98, a constant, whose gradient
is 0.

    python grpo.py                   out/sft -> out/grpo on sums. The last line:
                                     PASS math_greedy 0.18 -> 1.00 (target 0.95)
    python grpo.py --loss gspo --epochs 2      another method; FAMILY is a map of them. (With one
                                     epoch rho is 1: only std and weights tell them apart.)
    python grpo.py --verifier naive --max-new 16      a verifier with a hole: reward without truth
    python grpo.py --data mine.jsonl --init SmolLM2-135M --lr 1e-6 --max-new 200 --out out/mine

A line of mine.jsonl is {"prompt": "What is 2 + 3?", "answer": 5}. `strict` pays for one sentence
that concludes, "The answer is 5.", "So it is 5." or "That makes 5.", in an answer without any other
digit but in steps like "Then 50 + 30 = 80." (+ and x alone). For other data give train(config,
reward) a function of your own (see SEAM); the column `right` is `strict`'s all the same.

Not here, and why:
    the critic            the mean of a group does its work, which is GRPO's own idea
    the KL to a reference off unless --beta: it guards a judge that can be fooled; strict cannot
    old answers           one epoch unless --epochs: while pi is pi_old, the clip never acts
    DAPO's new draws      and its penalty for length: another loop, python -m lessons.dynamic
    rewards for steps     only the conclusion is checked, as in DeepSeek-R1 (2501.12948)
Try next: --group 2; --batch 4 --group 32; --beta 0.1; a verifier that likes short answers.
"""
import copy
import math
import re
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

from data import exam, rows
from data.checkpoints import load, save
from data.run import (RANK, Log, Settings, adamw, add_lora, batches, begin, clip_gradients,
                      hold_out, main, merge_lora, need, parts, steps)
from model import UserError, render_prompt, sample, token_logps


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt" and "answer"
    out: str = "out/grpo"     # write here
    steps: int = 30           # batches of answers
    batch: int = 16           # P: prompts a step
    group: int = 8            # G: answers to each of them
    lr: float = 5e-4          # peak learning rate
    loss: str = "grpo"        # one of the table FAMILY: grpo, dr_grpo, dapo, gspo, cispo
    verifier: str = "strict"  # strict, or naive: one with a hole
    epochs: int = 1           # optimiser steps on each batch of answers
    beta: float = 0.0         # weight of the KL to the starting model
    temperature: float = 1.0  # of the sampling, and so of the log-probs
    max_new: int = 72         # longest answer in tokens

    limits = Settings.limits | {"group": (2, 10**6), "epochs": (1, 10**6), "max_new": (1, 10**6),
                                "temperature": (0.01, 100)}


# ---------------------------------------------------------------- the maths
# P prompts with G answers each: B = P x G answers of at most T tokens. `answer` (B, T) is True at
# their tokens. Log-probs are (B, T), and 0 where no answer is.

# A_i = (r_i - mean(r)) / std(r)
# Shao et al. 2024 (2402.03300), section 4.1.2
def group_advantages(rewards, by_std=True):
    """(P, G) -> (P, G). How much better is each answer than its group?"""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if by_std:
        advantages = advantages / rewards.std(1, keepdim=True, correction=0)    # 0 / 0 for equals
    return advantages.masked_fill(~contrast(rewards)[:, None], 0.0)


def contrast(rewards):
    """(P, G) -> (P,). Is any answer better than another? Equals teach nothing: their advantage is
    exactly 0, and not one rounding error divided by another."""
    return rewards.amax(1) > rewards.amin(1)


# L_i = - sum_t w_it [min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) - beta k3_it]
# rho = pi / pi_old,   k3 = pi_ref / pi - log(pi_ref / pi) - 1
# Shao et al. 2024, equations 3 and 4
def grpo_loss(logps, old_logps, advantages, answer, weights, method, ref_logps=None, beta=0.0):
    """log pi and log pi_old (B, T), advantages (B,), weights (B, T) -> (B,), what each answer adds
    to the loss. In plain words, for GRPO itself:

        A = advantages[:, None]                                             (B, 1)
        rho = (logps - old_logps).exp()                                     (B, T)
        J = torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)                 (B, T)
        loss = -(J * answer).sum(1) / answer.sum(1) / len(answer)           (B,)

    Each other method has another ratio, clip or weight; w_it already holds 1/B. While rho is 1
    nothing is clipped, and the gradient is REINFORCE's: - sum_it w_it A_i grad log pi.
    """
    A = advantages[:, None]                                     # (B, 1), for all of its tokens
    rho = method.ratio(logps - old_logps, answer)               # (B, T)
    J = method.clip(rho, A, logps, method.low, method.high)     # (B, T) what each token is worth
    if beta > 0:
        log_ref = ref_logps - logps                             # (B, T) log pi_ref / pi
        # k3 is never negative, and over what pi writes its mean is KL(pi || pi_ref); its gradient
        # is that of KL(pi_ref || pi), see ppo.kl_estimates
        J = J - beta * (log_ref.exp() - log_ref - 1)
    return -(weights * J).sum(1)


# Whose likelihood is compared, a token's or its answer's?
# rho_it = pi(o_it) / pi_old(o_it)
def token_ratio(log_rho, answer):
    """Each token has a ratio of its own. (B, T) -> (B, T)"""
    return log_rho.exp()


# s_i = [pi(o_i) / pi_old(o_i)]^(1/|o_i|)
# Zheng et al. 2025 (2507.18071), eq. 7
def answer_ratio(log_rho, answer):
    """The reward is for an answer, so the ratio is too. One token's is mostly noise, their mean is
    less so."""
    total = (log_rho * answer).sum(1, keepdim=True)             # (B, 1)
    mean = total / answer.sum(1, keepdim=True)                  # (B, 1)
    return mean.exp().expand_as(log_rho)                        # (B, T)


# What becomes of a token that has moved far?
# J_it = min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
# PPO: Schulman et al. 2017 (1707.06347), eq. 7
def clipped(rho, A, logps, low, high):
    """A token that moved far is not pushed on. A (B, 1), the rest (B, T) -> (B, T)"""
    return torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)


# J_it = stop_gradient(clip(rho_it, 1 - low, 1 + high)) A_i log pi(o_it)
# MiniMax 2025 (2506.13585), eqs. 4 and 5
def clipped_weight(rho, A, logps, low, high):
    """A token that moved far learns on, with a bounded weight: it may be a rare one that matters,
    like "Wait"."""
    return rho.clamp(1 - low, 1 + high).detach() * A * logps


# How do tokens make a batch? answer (B, T), most: the tokens that an answer may have -> (B, T)
# w_it = 1/B 1/|o_i|
def per_answer(answer, most):
    """All answers count the same, so a token of a long one counts less."""
    return answer / answer.sum(1, keepdim=True) / len(answer)


# w_it = 1 / sum_i |o_i|
def per_token(answer, most):
    """All tokens of a batch count the same, so a long answer counts more."""
    return answer / answer.sum()


# w_it = 1/B 1/most
def constant(answer, most):
    """All tokens of all batches count the same, however long this answer and the others are."""
    return answer / (len(answer) * most)


class Method(NamedTuple):
    ratio: Callable          # rho_it (`answer` is for gspo)
    clip: Callable           # J_it (`logps` is for cispo)
    weights: Callable        # w_it (`most` is for dr_grpo)
    by_std: bool             # are advantages divided by the deviation of their group?
    low: float               # the clip is at 1 - low
    high: float              # and at 1 + high


FAMILY = {
    # DeepSeekMath (2402.03300): PPO without a critic.
    "grpo": Method(token_ratio, clipped, per_answer, by_std=True, low=0.2, high=0.2),
    # Dr. GRPO (2503.20783): 1/|o_i| lets long wrong answers off lightly, and 1/std makes much of
    # prompts that are nearly always, or nearly never, answered rightly. So it has neither.
    "dr_grpo": Method(token_ratio, clipped, constant, by_std=False, low=0.2, high=0.2),
    # DAPO (2503.14476), eq. 8: more room above, in which rare tokens can grow.
    "dapo": Method(token_ratio, clipped, per_token, by_std=True, low=0.2, high=0.28),
    # GSPO (2507.18071), eq. 5: a mean moves less than a token does, so the clip is tiny.
    "gspo": Method(answer_ratio, clipped, per_answer, by_std=True, low=3e-4, high=4e-4),
    # CISPO (2506.13585): no clip from below. The paper has no number for the one above: rho counts
    # for 5 at most here.
    "cispo": Method(token_ratio, clipped_weight, per_token, by_std=True, low=math.inf, high=4.0),
}


# ---------------------------------------------------------------- rewards

NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
BEGIN = r"(?:^|(?<=[.!?] ))"           # of a sentence
# "First 5 x 10 = 50." and "The answer is 80."
STEP = rf"{BEGIN}(?:First |Then )?{NUMBER} [+x] {NUMBER} = {NUMBER}\.(?!\S)"
CONCLUSION = rf"{BEGIN}(?:The answer is|So it is|That makes) ({NUMBER})\.(?!\S)"


def conclusion(text):
    """The number to which an answer commits itself, or None. One sentence concludes, and beside it
    and the steps there is no digit: a list of guesses is no commitment."""
    text = " ".join(text.split())
    numbers = re.findall(CONCLUSION, text)
    rest = re.sub(f"{STEP}|{CONCLUSION}", "", text)
    if len(numbers) != 1 or re.search(r"\d", rest):
        return None
    return numbers[0].replace(",", "")


def strict(truth, text, ended):
    """SEAM: your own reward goes here, or to train(config, reward); any number. It sees what is
    right, what the model wrote, which is never run, and whether that came to an end. Numbers are
    compared as texts, so 5.0 is not 5.

        First 5 x 10 = 50. Then 5 x 6 = 30. Then 50 + 30 = 80. The answer is 80.     1.0
        So it is 70.                                                                 0.1
        It is 70, 80 or 90.                                                          0.0
    """
    number = conclusion(text)
    if number is None or not ended:
        return 0.0
    if number != truth.replace(",", ""):
        return 0.1                     # wrong, but in a form that can be checked
    return 1.0


def naive(truth, text, ended):
    """Pays if the right number stands anywhere. With room for 72 tokens honest work still pays
    best; 16 hold the steps of most sums of three numbers, but no conclusion: little is right."""
    found = [number.replace(",", "") for number in re.findall(NUMBER, text)]
    return float(truth in found)


VERIFIERS = {"strict": strict, "naive": naive}


# ---------------------------------------------------------------- data

class Prompt(NamedTuple):
    ids: list                # its tokens, up to where the answer begins
    text: str                # what is asked
    truth: str               # what is right
    row: dict                # its line of JSON


def read_prompts(config, tokenizer, context, want_numbers=True):
    """Prompts with an answer to check; where lines have a kind, those of kind math. Of equal
    prompts the last one counts. -> to learn from, held out"""
    prompts = {}
    for line in rows.read_prompts(config.data):
        if line.row.get("kind") not in (None, "math"):
            continue
        if line.row.get("answer") in (None, ""):
            raise UserError(f'{line.where}: "answer" is missing: what would be right?')
        ids = render_prompt(tokenizer, line.messages)
        if len(ids) + config.max_new > context:
            raise UserError(f"{line.where}: a prompt of {len(ids)} tokens; with --max-new "
                            f"{config.max_new} it does not fit the model's {context}")
        text = line.messages[-1]["content"]
        truth = str(line.row["answer"])
        if want_numbers:
            truth = truth.replace(",", "")                      # 1,000 is 1000
            if re.fullmatch(NUMBER, truth) is None:
                raise UserError(f'{line.where}: "answer" is {rows.show(truth)}; want a number')
        prompts[str(line.messages)] = Prompt(ids, text, truth, line.row)
    if not prompts:
        raise UserError(f'{config.data}: no line is of kind math; "kind" may be left out')
    return hold_out(list(prompts.values()), most=48)


def sample_groups(policy, tokenizer, prompts, config, generator):
    """G answers to each of P prompts -> Samples, B = P x G, those to the first prompt first"""
    ids = [prompt.ids for prompt in prompts]
    return sample(policy, tokenizer, ids, n=config.group, max_new=config.max_new,
                  temperature=config.temperature, generator=generator)


def group_rewards(reward, prompts, samples):
    """What each answer earns with its own prompt. -> (P, G)"""
    G = len(samples.texts) // len(prompts)
    rewards = []
    for i, text in enumerate(samples.texts):
        prompt = prompts[i // G]
        rewards.append(reward(prompt.truth, text, bool(samples.ended[i])))
    rewards = torch.tensor(rewards, dtype=torch.float32, device=samples.ids.device)  # (B,)
    return rewards.view(-1, G)


def logps_at(model, samples, at, config):
    """log pi of the tokens of the answers `at`, at the temperature that drew them. -> (B, T)"""
    ids = samples.ids[at]
    mask = samples.mask[at]
    return token_logps(model, ids, mask, samples.answer[at], config.temperature)


# ---------------------------------------------------------------- before and after

def share_right(prompts, samples):
    """Whatever the reward is: how many answers conclude rightly?"""
    rewards = group_rewards(strict, prompts, samples)
    return (rewards == 1).float().mean().item()


def share_worked(samples):
    """How many answers show a step of their work?"""
    shown = [re.search(STEP, text) is not None for text in samples.texts]
    return sum(shown) / len(shown)


def evaluate(policy, reference, prompts, tokenizer, config, reward, against=None):
    """-> report card, answers. The likeliest answers to held-out prompts: what do they earn, how
    many are right? Where the world is ours, its exam says what became of everything else."""
    ids = [prompt.ids for prompt in prompts]
    samples = sample(policy, tokenizer, ids, max_new=config.max_new, temperature=0)
    rewards = group_rewards(reward, prompts, samples)           # (P, 1)
    card = {"reward": rewards.mean().item(), "right": share_right(prompts, samples)}
    answers = None
    if exam.knows([prompt.row for prompt in prompts]):
        world, answers = exam.exam(policy, tokenizer, reference, against, config.seed)
        card = world | card
    return card, answers


@torch.no_grad()
def show_group(policy, prompt, samples, rewards, config):
    """One group of answers, from text to reward to advantage to loss."""
    method = FAMILY[config.loss]
    advantages = group_advantages(rewards, method.by_std).flatten()  # (1, G) -> (G,)
    weights = method.weights(samples.answer, config.max_new)    # (G, T)
    logps = logps_at(policy, samples, slice(None), config)      # (G, T)
    loss = grpo_loss(logps, samples.logps, advantages, samples.answer, weights, method)  # (G,)
    columns = [rewards[0], advantages, samples.answer.sum(1), logps.sum(1), loss]  # (G,) each
    config.say(f"  {exam.short(prompt.text)}")
    config.say("  reward      A  tokens  log pi     loss")
    for numbers, text in zip(torch.stack(columns, dim=1).tolist(), samples.texts):
        line = "{:8.2f} {:+6.2f} {:7.0f} {:7.2f} {:+8.4f}  ".format(*numbers)
        config.say(line + exam.short(text))
    config.say(f"{loss.sum():+40.4f}  L")


# ---------------------------------------------------------------- training

def train(config, reward=None):
    started = begin(config)
    if config.loss not in FAMILY:
        raise UserError(f"--loss {config.loss}: choose one of {', '.join(FAMILY)}")
    if config.verifier not in VERIFIERS:
        raise UserError(f"--verifier {config.verifier}: choose one of {', '.join(VERIFIERS)}")
    method = FAMILY[config.loss]
    if reward is None:
        reward = VERIFIERS[config.verifier]

    # One model writes and learns. A frozen copy remembers where it began.
    need(config.init)
    policy, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    add_lora(policy, config.lora)
    optimizer = adamw(policy, config.lr)

    context = policy.config.max_len
    want_numbers = reward in VERIFIERS.values()     # a reward of your own may read anything
    prompts, held = read_prompts(config, tokenizer, context, want_numbers)
    stream = batches(prompts, None, config.batch, torch.Generator().manual_seed(config.seed))
    generator = torch.Generator().manual_seed(config.seed + RANK)  # of the answers

    # BEFORE
    config.say(f"grpo: loss {config.loss}, from {config.init}, on {config.device}; "
               f"{len(prompts)} prompts, {len(held)} more are held out")
    group = sample_groups(policy, tokenizer, held[:1], config, generator)
    earned = group_rewards(reward, held[:1], group)             # (1, G)
    config.say("one group of answers; pi is pi_old, so GRPO's L is 0")
    show_group(policy, held[0], group, earned, config)
    before, old_answers = evaluate(policy, reference, held, tokenizer, config, reward)

    log = Log(config)
    for step in steps(config, optimizer):
        # 1 sample G answers to each of P prompts
        batch = next(stream)
        samples = sample_groups(policy, tokenizer, batch, config, generator)
        # 2 score each answer against its group
        rewards = group_rewards(reward, batch, samples)         # (P, G)
        advantages = group_advantages(rewards, method.by_std).flatten()  # (P, G) -> (B,)
        weights = method.weights(samples.answer, config.max_new)  # (B, T)
        # row g: where prompt g's answers stand among the B
        groups = torch.arange(len(samples.ids)).view(rewards.shape)  # (P, G)
        losses = []
        ratios = []
        for epoch in range(config.epochs):
            for part in parts(groups, config.accumulate):
                # 3 loss: what did better than its group becomes likelier
                at = part.flatten()                             # whole groups: they share a prompt
                answer = samples.answer[at]                     # (b, T), b answers of the B
                old_logps = samples.logps[at]                   # (b, T)
                logps = logps_at(policy, samples, at, config)   # (b, T)
                ref_logps = None
                if config.beta > 0:
                    with torch.no_grad():
                        ref_logps = logps_at(reference, samples, at, config)
                loss = grpo_loss(logps, old_logps, advantages[at], answer, weights[at], method,
                                 ref_logps, config.beta).sum()
                loss.backward()
                losses.append(loss.item())
                furthest = (logps - old_logps).abs().max()
                ratios.append(furthest.exp().item())            # the largest of all rho and 1/rho
            # 4 step
            clip_gradients(policy)
            optimizer.step()
            optimizer.zero_grad()
        # 5 log, of sampled answers to training prompts. ratio is 1 in the first epoch, when pi is
        # pi_old. worked: how many show a step; contrast: how many groups teach anything
        length = samples.answer.sum(1).float().mean()
        log(step, reward=rewards.mean(), right=share_right(batch, samples),
            worked=share_worked(samples), length=length, contrast=contrast(rewards).float().mean(),
            ratio=max(ratios), loss=sum(losses) / config.epochs)
    merge_lora(policy)
    if config.save:
        save(config.out, policy, tokenizer)

    # AFTER
    after, answers = evaluate(policy, reference, held, tokenizer, config, reward, old_answers)
    config.say("the group from above: log pi should be up where A > 0, and down where A < 0")
    show_group(policy, held[0], group, earned, config)
    config.say("a new group")
    group = sample_groups(policy, tokenizer, held[:1], config, generator)
    earned = group_rewards(reward, held[:1], group)
    show_group(policy, held[0], group, earned, config)
    if answers:
        exam.show_answers(old_answers, answers, config)
    target = exam.Target("reward", before["reward"] + 0.05)
    if answers and config.data == Config.data:
        target = exam.Target("math_greedy", 0.95)
    results = exam.finish("grpo", config, started, log, before, after, [target])
    return results | {"model": policy, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
