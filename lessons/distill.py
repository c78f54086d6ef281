"""Distillation: learn a teacher's answers, or all that it might have answered.

A teacher p_T answers prompts. A student p_S that learns them by SFT sees one token at each place,
drawn from what the teacher expected there. With the teacher at hand it can learn the expectation
itself, all V numbers of it: the KL from teacher to student at every token of the same answers
(Hinton et al. 2015, 1503.02531, at temperature 1; for text Kim and Rush 2016, 1606.07947).

    samples         L = - 1/N sum_n log p_S(y_n)           y_n ~ p_T
    distribution    L = 1/N sum_n sum_v p_T(v) [log p_T(v) - log p_S(v)]

In the mean both have the same gradient. The first is noisier, as one draw stands for the sum over
v; but text is all that it needs, so that any model can teach any other.

By hand: the teacher says (0.8, 0.2), the student (0.5, 0.5). KL = 0.8 ln 1.6 + 0.2 ln 0.4 = 0.193.

    python -m lessons.distill                      90 seconds; out/dpo teaches data/base, both ways
    python -m lessons.distill --prompts 64         few answers: what is a distribution worth?
    python sft.py --data out/distill/teacher.jsonl --out out/mine      learn its answers again

Simplified: the answers are the teacher's. On-policy distillation takes the student's own, so that
it also learns what to do after its own mistakes.
Try next: --teacher out/grpo, and look at math; --init out/sft.
"""
from dataclasses import dataclass, replace

import torch

import sft
from data import exam
from data.chart import Panel, chart
from data.checkpoints import load, save
from data.run import (Log, adamw, add_lora, batches, begin, clip_gradients, merge_lora, need, parts,
                      steps)
from lessons import figures
from lessons.best_of import ask, learn_from, show_models, write_answers
from model import UserError


@dataclass(frozen=True)
class Config(figures.Lesson):
    init: str = "data/base"   # the student starts from this model folder
    teacher: str = "out/dpo"  # folder of the model to learn from
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt"
    out: str = "out/distill"  # write here: the answers, and the student of the distribution
    steps: int = 100          # optimiser steps
    batch: int = 64           # conversations a step
    prompts: int = 512        # so many prompts
    max_new: int = 72         # longest answer in tokens

    limits = figures.Lesson.limits | {"prompts": (4, 100_000)}


# L = 1/N sum_n KL(p_T || p_S) = 1/N sum_n sum_v p_T(v) [log p_T(v) - log p_S(v)]
def distill_loss(student, teacher, count):
    """Logits (N, V) of the tokens with m = 1; `count` is their number in the whole batch."""
    log_s = student.log_softmax(-1)                             # (N, V)
    log_t = teacher.log_softmax(-1)                             # (N, V)
    return (log_t.exp() * (log_t - log_s)).sum() / count


def learn_distribution(student, teacher, path, tokenizer, config):
    """sft.py's loop with another loss: a target is all that the teacher expects there. -> log"""
    settings = sft.Config(data=path, cut=True, quiet=True)
    examples, _ = sft.read_examples(settings, tokenizer, student.config.max_len)
    # coarse lengths, as in sft.py: both students see the same batches in the same order
    lengths = [1 + len(example.ids) // 40 for example in examples]
    stream = batches(examples, lengths, config.batch, torch.Generator().manual_seed(config.seed))
    add_lora(student, config.lora)
    optimizer = adamw(student, config.lr)
    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch, and how many targets it has
        batch = next(stream)
        count = sft.tokens_in(batch)
        total = 0.0
        for part in parts(batch, config.accumulate):
            # 2 score: what teacher and student expect at each token of the teacher's answers
            with torch.no_grad():
                expected, _ = sft.logits_and_targets(teacher, part, tokenizer)  # (N, V)
            logits, _ = sft.logits_and_targets(student, part, tokenizer)  # (N, V)
            # 3 loss
            loss = distill_loss(logits, expected, count)
            loss.backward()
            total += loss.item()
        # 4 step
        clip_gradients(student)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        log(step, loss=total, targets=count)
    merge_lora(student)
    return log


# ---------------------------------------------------------------- training

def train(config):
    started = begin(config)
    if config.quick:
        config = replace(config, prompts=24, steps=4)
    need(config.teacher)
    teacher, teacher_tokenizer = load(config.teacher, config.device)
    student, tokenizer = load(config.init, config.device)
    if teacher_tokenizer._mergeable_ranks != tokenizer._mergeable_ranks:
        raise UserError(f"--teacher {config.teacher}: want the vocabulary of {config.init}; what "
                        f"any other model wrote can be learned by sft.py --data")

    # the teacher answers
    generator = torch.Generator().manual_seed(config.seed)
    prompts, texts, ended = ask(teacher, tokenizer, config, 1, generator)
    path = f"{config.out}/teacher.jsonl"
    write_answers(path, prompts, texts, ended, torch.arange(len(texts)), config)

    # one student learns the samples, another one the distribution
    run = learn_from(path, config, save=False)
    log = learn_distribution(student, teacher, path, tokenizer, config)
    if config.save:
        save(config.out, student, tokenizer)
    numbers = {"cards": {}}
    for name, rows_of_log in {"samples": run["log"], "distribution": log.rows}.items():
        numbers[name] = exam.running_mean([row["loss"] for row in rows_of_log])
    learned = {"model": student, "tokenizer": tokenizer, "log": log.rows, "numbers": numbers}
    if not exam.knows([prompt.row for prompt in prompts]):
        return learned

    # AFTER
    cards = {}
    cards["teacher"], answers = exam.exam(teacher, tokenizer, seed=config.seed)
    before, tokenizer = load(config.init, config.device)
    models = {"before": before, "samples": run["model"], "distribution": student}
    taken = {}
    for name, model in models.items():
        cards[name], taken[name] = exam.exam(model, tokenizer, teacher, seed=config.seed)
    exam.show_answers(taken["before"], taken["distribution"], config)
    show_models(cards, config)
    for name, card in cards.items():
        numbers["cards"][name] = {key: card[key] for key in SHOWN}
    targets = [exam.Target("gold", cards["teacher"]["gold"] - 0.05)]
    results = exam.finish("distill", config, started, log, cards["before"], cards["distribution"],
                          targets, cards=cards)
    return results | learned


# ---------------------------------------------------------------- the figure

SHOWN = ("gold", "math", "fact", "harmless")


def picture(runs):
    """The two losses, which have different lowest values; then what teacher and students can do."""
    lines = []
    for name in "samples", "distribution":
        curves = [numbers[name] for numbers in runs]
        lines.append(figures.line(name, range(len(curves[0])), curves))
    panels = [Panel("A sample, or all that was expected", "step", "loss, nats a token", lines)]
    if runs[0]["cards"]:
        bars = []
        for key in SHOWN:
            values = {}
            for name in runs[0]["cards"]:
                values[name] = [numbers["cards"][name][key] for numbers in runs]
            bars.append(figures.bar(key, values))
        panels.append(Panel("Teacher and students", "", bars=bars, limits=(0, 1)))
    return chart(panels, height=280)


if __name__ == "__main__":
    figures.main("distill", Config, train, picture, __doc__)
