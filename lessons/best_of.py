"""Rejection sampling: learn from the best of N own answers.

To choose a good answer is easier than to write one. So the model answers each prompt N times, a
judge keeps the best, and SFT on what was kept makes such answers likelier (Llama 2, Touvron et al.
2023, 2307.09288, section 3.2.3): reinforcement learning without ratios, critics or a gradient of
the reward.

    k* = argmax_k r(x, y_k)         y_1, .., y_N ~ pi(.|x)

To give the best of N is a policy, too, and one that stays close to pi (Beirami et al. 2024,
2401.01879, theorem 1). By hand, for N = 8: 2.08 - 0.88 = 1.20 nats.

    KL(best of N || pi) <= ln N - (N - 1)/N

A first table shows what choosing buys before any training: the judge's score, and the truth
(gold), which the judge never sees. Then two models learn: one from the best answers and, as a
control, one from random ones. The control trains as long, on words of the same model, but nobody
has chosen them.

    python -m lessons.best_of     a minute; 16 answers to 256 prompts, chosen by out/reward_model
    python sft.py --init out/sft --data out/best_of/best.jsonl --out out/mine      learn from them

Simplified: one round. Llama 2 went through several and kept the best of them all.
Try next: --n 2 and --n 64; train(config, score=...) with a function that counts words.
"""
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import sft
from data import exam, rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import load, load_scalar, write_files
from data.run import Log, Settings, begin, need, parts
from lessons import figures
from model import collate, end_scores, render_answer, render_prompt, sample


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt"
    out: str = "out/best_of"  # write here: the answers that were kept, and the model of the best
    steps: int = 60           # optimiser steps
    batch: int = 64           # conversations a step
    lr: float = 5e-4          # peak learning rate
    judge: str = "out/reward_model"  # folder of the reward model that chooses
    n: int = 16               # answers to each prompt
    prompts: int = 256        # so many prompts
    max_new: int = 72         # longest answer in tokens

    limits = figures.Lesson.limits | {"n": (1, 1000), "prompts": (4, 100_000)}


# ---------------------------------------------------------------- the maths

# k* = argmax_k r(x, y_k)           (P, N) -> (P,)
def pick_best(scores):
    return scores.argmax(1)


# k* ~ uniform{1..N}                (P, N) -> (P,)
def pick_random(scores, generator):
    return torch.randint(scores.shape[1], (len(scores),), generator=generator)


# KL(best of N || pi) <= ln N - (N - 1)/N
def kl_bound(n):
    return math.log(n) - (n - 1) / n


# ---------------------------------------------------------------- answers as data

def ask(model, tokenizer, config, n, generator):
    """n answers to each of some prompts, in the order p0 a0, p0 a1, .. p1 a0, ..
    -> prompts, texts, ended, P times n of each"""
    prompts = rows.read_prompts(config.data)
    order = torch.randperm(len(prompts), generator=generator)
    prompts = [prompts[i] for i in order[:config.prompts]]
    ids = [render_prompt(tokenizer, prompt.messages) for prompt in prompts]
    drawn = sample(model, tokenizer, ids, n, config.max_new, generator=generator)
    asked = [prompts[i // n] for i in range(len(drawn.texts))]
    return asked, drawn.texts, drawn.ended.cpu()


@torch.no_grad()
def scores_at_the_end(judge, tokenizer, examples):
    """What a ScalarModel says of each of any number of texts. -> (N,)"""
    scores = []
    for part in parts(examples, math.ceil(len(examples) / 256)):
        ids, mask, _ = collate(part, tokenizer, judge.mean.device)          # (256, T) each
        scores.append(end_scores(judge, ids, mask).cpu())
    return torch.cat(scores)


def reward(judge, tokenizer, prompts, texts):
    """What a reward model says of each answer to its prompt, at its <|im_end|>. -> (B,)"""
    examples = []
    for prompt, text in zip(prompts, texts):
        examples.append(render_answer(tokenizer, prompt.messages, text))
    return scores_at_the_end(judge, tokenizer, examples)


def truth(prompts, texts, ended):
    """The gold judge's marks: for the tables, never to choose. -> (B,)"""
    marks = []
    for prompt, text, end in zip(prompts, texts, ended.tolist()):
        marks.append(studybuddy.judge(prompt.row, text, end)["gold"])
    return torch.tensor(marks)


def write_answers(path, prompts, texts, ended, places, config):
    """The answers at these places become conversations, as in data/sft.jsonl. Endless or empty ones
    are left out."""
    lines = []
    for i in places.tolist():
        if ended[i] and texts[i]:
            answer = {"role": "assistant", "content": texts[i]}
            lines.append({"messages": prompts[i].messages + [answer]})
    path = Path(path)
    write_files(path.parent, {path.name: rows.json_lines(lines)})
    config.say(f"{len(lines)} answers are in {path}")


def learn_from(path, config, **changes):
    """sft.py on a file of answers, with the settings of this run."""
    settings = {field.name: getattr(config, field.name) for field in fields(Settings)}
    changes = {"data": path, "quiet": True, "cut": True} | changes
    return sft.train(sft.Config(**settings | changes))


# ---------------------------------------------------------------- before and after

def mean_of(values, k):
    """values (P, N), of which k (P,) were kept"""
    return values.gather(1, k[:, None]).mean().item()           # (P, 1) -> ()


def what_choosing_buys(scores, gold, generator, config):
    """The best and a random one of the first n answers to each prompt. scores, gold (P, N)"""
    config.say("   n  KL at most     judge      gold    random")
    curve = []
    n = 1
    while n <= config.n:
        best = pick_best(scores[:, :n])                         # (P,)
        control = pick_random(scores[:, :n], generator)         # (P,)
        line = {"n": n, "kl": kl_bound(n)}
        line["judge"] = mean_of(scores, best)
        line["gold"] = mean_of(gold, best)
        line["random"] = mean_of(gold, control)
        config.say("{n:4}{kl:12.2f}{judge:10.2f}{gold:10.2f}{random:10.2f}".format(**line))
        curve.append(line)
        n *= 2
    return curve


def show_models(cards, config):
    config.say("                  gold        kl    length")
    for name, card in cards.items():
        kl = card.get("kl", 0.0)
        config.say(f"{name:12}{card['gold']:10.2f}{kl:10.2f}{card['length']:10.2f}")


# ---------------------------------------------------------------- training

def train(config, score=None):
    """SEAM: score(prompts, texts) -> a number for each answer, in place of the reward model."""
    started = begin(config)
    if config.quick:
        config = replace(config, prompts=24, steps=4)
    need(config.init)
    model, tokenizer = load(config.init, config.device)
    generator = torch.Generator().manual_seed(config.seed)

    # 1 sample
    prompts, texts, ended = ask(model, tokenizer, config, config.n, generator)
    # 2 score: an answer that never ends is never the best
    if score is None:
        need(config.judge)
        judge, judge_tokenizer = load_scalar(config.judge, config.device)
        scores = reward(judge, judge_tokenizer, prompts, texts)
    else:
        scores = torch.tensor(score(prompts, texts))
    scores = scores.masked_fill(~ended, scores.min() - 1).view(-1, config.n)  # (P, N)
    world = exam.knows([prompt.row for prompt in prompts])
    gold = torch.full(scores.shape, math.nan)                   # (P, N)
    if world:
        gold = truth(prompts, texts, ended).view(scores.shape)
    curve = what_choosing_buys(scores, gold, generator, config)

    # 3 keep the best answer to each prompt; as a control, a random one
    first = torch.arange(len(scores)) * config.n                # (P,) where its answers begin
    kept = {"best": first + pick_best(scores), "random": first + pick_random(scores, generator)}
    for name, places in kept.items():
        write_answers(f"{config.out}/{name}.jsonl", prompts, texts, ended, places, config)
    if not world:
        # python sft.py --data learns from them; here is no exam for it
        return {"curve": curve, "numbers": numbers_of(curve, {})}

    # 4 learn
    control = learn_from(f"{config.out}/random.jsonl", config, save=False)
    run = learn_from(f"{config.out}/best.jsonl", config)

    # AFTER
    cards = {}
    cards["before"], old_answers = exam.exam(model, tokenizer, seed=config.seed)
    for name, learner in {"random": control, "best": run}.items():
        card, answers = exam.exam(learner["model"], tokenizer, model, old_answers, config.seed)
        cards[name] = card
    exam.show_answers(old_answers, answers, config)
    show_models(cards, config)
    log = Log(config)
    log.rows = run["log"]
    targets = [exam.Target("gold", cards["random"]["gold"] + 0.08)]
    results = exam.finish("best_of", config, started, log, cards["before"], cards["best"], targets,
                          cards=cards, curve=curve)
    return run | results | {"numbers": numbers_of(curve, cards)}


# ---------------------------------------------------------------- the figure

def numbers_of(curve, cards):
    """What choosing buys, a list over N for each column; and gold of the models."""
    numbers = {}
    for key in curve[0]:
        numbers[key] = [line[key] for line in curve]
    numbers["models"] = {}
    for name, card in cards.items():
        numbers["models"][name] = card["gold"]
    return numbers


def picture(runs):
    """Gold over N, of the best answers and of random ones; then of the models that learned from
    them."""
    lines = []
    for name, key in {"the best": "gold", "a random one": "random"}.items():
        lines.append(figures.line(name, runs[0]["n"], [numbers[key] for numbers in runs]))
    panels = [Panel("To choose is to improve", "N answers to choose from (log scale)",
                    "gold of what is kept", lines, scale="log")]
    if runs[0]["models"]:
        bars = []
        for name in runs[0]["models"]:
            golds = [numbers["models"][name] for numbers in runs]
            bars.append(figures.bar(LABELS[name], {"gold": golds}))
        panels.append(Panel("To learn what was chosen", "after SFT on the answers kept", bars=bars,
                            limits=(0, 1)))
    return chart(panels, height=280)


LABELS = {"before": "before", "random": "random answers", "best": "the best of N"}


if __name__ == "__main__":
    figures.main("best_of", Config, train, picture, __doc__)
