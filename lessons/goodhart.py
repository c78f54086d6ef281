"""Goodhart's law: a score that is climbed no longer means what it meant.

A reward model knows which answers annotators preferred, among answers that nobody had tuned to
please it. A policy that climbs its score leaves these behind and finds others: those that the
reward model overrates. So the score rises on, and the truth turns. What holds the policy back is
beta, the price of distance, and how far it went is the KL (Gao et al. 2023, 2210.10760).

In this world the truth is known, so one can watch it turn. Elsewhere it is not. So there are
alarms, which look at the answers alone, and the question is how good these were when one rang:

    kl         to choose the best of n answers takes log n - (n - 1)/n nats (Stiennon et al. 2020,
               2009.01325): beyond n = 100 these are answers that the reference hardly ever gives
    length     half as long again is another kind of answer
    repeated   in more answers than luck explains, three words in a row come twice
    openings   the five commonest beginnings begin more answers than luck explains

By hand: the best of 100 takes log 100 - 0.99 = 3.62 nats. A share of 64 prompts moves by luck, one
deviation, by 0.5 / sqrt(64) = 0.06 at most. An alarm wants five of them.

    python -m lessons.goodhart                           on a leash, and without one
    python -m lessons.goodhart --betas "0.3 0.1 0.03 0"  more prices of distance

Simplified: RLOO in place of PPO, as it is faster and falls for the same things (--algorithm ppo).
Try next: --steps 160; --lr 5e-4; --reward with another reward model, whose weak spots are others.
"""
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

import ppo
from data import exam
from data.checkpoints import load
from data.run import Settings, begin, main, need
from model import UserError


@dataclass(frozen=True)
class Config(Settings):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt", of our world
    steps: int = 80           # batches of answers, for each beta
    batch: int = 64           # answers a step
    lr: float = 1e-3          # peak learning rate: twice ppo.py's, to see sooner what comes
    algorithm: str = "rloo"   # or reinforce, or ppo
    reward: str = "out/reward_model"  # the proxy
    betas: str = "0.1 0"      # prices of a nat of distance, one run each
    quick: bool = False       # 10 steps, to see that it runs
    save: bool = False        # the models are not kept


# ---------------------------------------------------------------- what needs no truth

def signals(texts):
    """Who has a trick repeats it, within an answer and from answer to answer. -> shares of texts"""
    repeated = 0
    openings = Counter()
    for text in texts:
        words = text.split()
        threes = list(zip(words, words[1:], words[2:]))
        if len(set(threes)) < len(threes):
            repeated += 1
        openings[tuple(words[:3])] += 1
    common = sum(count for _, count in openings.most_common(5))
    return {"repeated": repeated / len(texts), "openings": common / len(texts)}


# KL(best of n || one of them) = log n - (n - 1)/n               Stiennon et al. 2020 (2009.01325)
def best_of(n):
    return math.log(n) - (n - 1) / n


def alarms(now, start, n):
    """Signals now, and at the start, of answers to n prompts -> names of those that are too high"""
    luck = 5 * 0.5 / math.sqrt(n)
    most = {"kl": best_of(100), "length": 1.5 * start["length"],
            "repeated": start["repeated"] + luck, "openings": start["openings"] + luck}
    return [name for name in most if now[name] > most[name]]


# ---------------------------------------------------------------- a run, a tenth at a time

def tenths(rows, texts, start, n):
    """What was logged and what was answered, step by step; n: prompts a step. One step is noisy.
    -> for each tenth of the run its means, its signals and its alarms"""
    size = max(1, len(rows) // 10)
    table = []
    for first in range(0, len(rows) - size + 1, size):
        now = {"step": first + size}
        for name in "kl", "score", "gold", "length":
            now[name] = sum(row[name] for row in rows[first:first + size]) / size
        answers = []
        for batch in texts[first:first + size]:
            answers += batch
        now |= signals(answers)
        now["alarms"] = alarms(now, start, n * size)
        table.append(now)
    return table


def turning_point(table):
    """-> when the truth was best, and what has become of it and of the score since"""
    golds = [now["gold"] for now in table]
    peak = table[golds.index(max(golds))]
    last = table[-1]
    return {"step": peak["step"], "peak": peak["gold"], "last": last["gold"],
            "rise": last["score"] - peak["score"]}


def first_alarm(table):
    """-> the tenth in which one rang, or None"""
    for now in table:
        if now["alarms"]:
            return now
    return None


# ---------------------------------------------------------------- the experiment

def settings_of(config, beta):
    return ppo.Config(init=config.init, data=config.data, reward=config.reward, steps=config.steps,
                      batch=config.batch, lr=config.lr, seed=config.seed, device=config.device,
                      algorithm=config.algorithm, beta=beta, save=False, quiet=True)


def start_of(config, count):
    """Signals of what the reference answers, before anything is climbed"""
    settings = settings_of(config, beta=0.0)
    policy, tokenizer = load(config.init, config.device)
    prompts, _ = ppo.read_prompts(settings, tokenizer, policy.config.max_len)
    if not exam.knows([prompt.row for prompt in prompts]):
        raise UserError(f"{config.data}: not of our world, so nobody knows the truth")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(prompts), generator=generator)
    asked = [prompts[i] for i in order[:count]]
    samples = ppo.draw_answers(policy, asked, tokenizer, settings, generator)
    length = samples.answer.sum(1).float().mean().item()
    return {"length": length} | signals(samples.texts)


def climb(config, beta):
    """A run of ppo.py, with its own score to listen in. -> log, texts, scores, step by step"""
    settings = settings_of(config, beta)
    _, tokenizer = load(config.init)
    judge = ppo.score_by(ppo.load_reward_model(settings, tokenizer), tokenizer)
    all_texts = []
    all_scores = []

    def score(prompts, texts):
        scores = judge(prompts, texts)
        all_texts.append(texts)
        all_scores.append(scores.tolist())
        return scores
    log = ppo.train(settings, score)["log"]
    return log, all_texts[1:-1], all_scores[1:-1]       # the first and the last are the exam's


def show_run(table, config):
    config.say(" step        kl     score      gold    length  repeated  openings  alarms")
    for now in table:
        line = f"{now['step']:5}"
        for name in "kl", "score", "gold", "length", "repeated", "openings":
            line += f"{now[name]:10.2f}"
        config.say(f"{line}  {' '.join(now['alarms'])}")
    turn = turning_point(table)
    if turn["rise"] > 0 and turn["last"] < turn["peak"] - 0.05:
        config.say(f"GOODHART: since step {turn['step']} the score rose by {turn['rise']:.2f}, and "
                   f"gold fell from {turn['peak']:.2f} to {turn['last']:.2f}")


def show_best(texts, scores, config):
    config.say("what the reward model likes best at the end")
    best = sorted(zip(scores, texts), reverse=True)
    for score, text in best[:3]:
        config.say(f"{score:15.2f}  {exam.short(text)}")


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=10)
    need(config.init, "python sft.py", 25)
    need(config.reward, "python reward_model.py", 60)
    start = start_of(config, 512)
    config.say("at the start: length {length:.2f}, repeated {repeated:.2f}, openings {openings:.2f}"
               .format(**start))
    prompts = config.batch // ppo.ALGORITHMS[config.algorithm].group
    runs = {}
    for beta in config.betas.split():
        log, texts, scores = climb(config, float(beta))
        runs[beta] = tenths(log, texts, start, prompts)
        config.say(f"\nbeta {beta}")
        show_run(runs[beta], config)
        show_best(texts[-1], scores[-1], config)
    config.say("\n        at the end                         at its best   at the first alarm\n"
               "  beta        kl     score      gold           gold                 gold")
    for beta, table in runs.items():
        last = table[-1]
        alarm = first_alarm(table)
        stop = "none rang"
        if alarm:
            stop = f"{alarm['gold']:.2f}, step {alarm['step']}"
        config.say(f"{beta:>6}{last['kl']:10.2f}{last['score']:10.2f}{last['gold']:10.2f}"
                   f"{turning_point(table)['peak']:15.2f}{stop:>21}")
    return {"start": start, "runs": runs}


if __name__ == "__main__":
    main(Config, train, __doc__)
