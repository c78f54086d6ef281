"""How fast is it, on this machine?

A step that trains makes three products for each weight and each token: one forward, and two
backward, for the gradient of what came in and that of the weight. A product is a multiplication
and an addition. So N weights in matrices and n tokens want

    operations = 6 N n

By hand: data/base has 917,504 weights in its matrices. A step of sft.py has some 2,200 tokens that
are different (model.different_tokens), and wants 6 x 917,504 x 2,200 = 12 billion operations. A
machine that makes 100 billion a second would need 0.12 s, if it did nothing else.

What it makes is measured first, in products of large matrices. Then sampling, then some steps of
each script as it stands. What is left of a script's time is loading, exams, and the answers that
it shows: it is part of what one waits for.

    python -m lessons.speed                   two minutes; sampling by --init, steps of six scripts
    python -m lessons.speed --init FOLDER     sampling and training by a model of your own, alone

Simplified: attention's products, which grow with the square of the length, are left out. And all
tokens are counted for the last MLP and the vocabulary, though only those before an answer's token
go there.
Try next: OMP_NUM_THREADS=1 python -m lessons.speed
"""
import statistics
import time
from dataclasses import dataclass, replace

import torch

import cai
import dpo
import grpo
import ppo
import reward_model
import sft
from data.chart import Panel, chart
from data.checkpoints import load
from data.run import begin, need
from lessons import figures
from model import render_prompt, sample, token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    init: str = "data/base"   # the model that samples
    steps: int = 12           # optimiser steps of each script
    tokens: int = 64          # new tokens of each answer, whatever it says
    save: bool = False        # nothing is kept

    unused = ("data", "out", "batch", "accumulate", "lr", "lora", "save")   # scripts as they stand


SCRIPTS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "grpo": grpo, "ppo": ppo,
           "cai": cai}


# ---------------------------------------------------------------- the machine

def products_a_second(size, device):
    """Operations a second in products of two size x size matrices, the best of 5."""
    A = torch.randn(size, size, device=device)
    best = 0.0
    for _ in range(5):
        started = time.time()
        (A @ A).sum().item()            # .item() waits for a GPU, too
        best = max(best, 2 * size**3 / (time.time() - started))
    return best


# operations = 6 N n
def operations(model, tokens):
    """Of one step that trains on so many tokens."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return 6 * weights * tokens


# ---------------------------------------------------------------- sampling, and one plain step

def sampling(model, tokenizer, rows, config):
    """Tokens a second of so many answers at once."""
    talk = [{"role": "user", "content": "How many legs does a spider have?"}]
    prompts = [render_prompt(tokenizer, talk)] * rows
    generator = torch.Generator(config.device).manual_seed(config.seed)
    started = time.time()
    samples = sample(model, tokenizer, prompts, max_new=config.tokens, generator=generator)
    return samples.answer.sum().item() / (time.time() - started)


def forward_and_backward(model, rows, length):
    """Seconds of one step's gradient on random tokens, the median of 5."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (rows, length), device=model.embed.weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    answer = mask.clone()
    answer[:, 0] = False                # nothing predicts the first token
    seconds = []
    for _ in range(5):
        started = time.time()
        loss = -token_logps(model, ids, mask, answer).mean()
        loss.backward()
        model.zero_grad()
        seconds.append(time.time() - started)
    return statistics.median(seconds)


# ---------------------------------------------------------------- the scripts

def timed(steps, seconds):
    """The scripts' loop over steps, with a clock: what the body takes is added to `seconds`."""
    def loop(config, *optimizers):
        for step in steps(config, *optimizers):
            started = time.time()
            yield step
            seconds.append(time.time() - started)
    return loop


def time_script(script, config):
    """Some steps of a script. -> seconds of a step, of a default run's steps, and of the rest"""
    counts = {"steps": config.steps}
    default = script.Config.steps or reward_model.KINDS["pairs"].steps
    if script is cai:                   # it trains twice
        counts["sl_steps"] = config.steps
        default += script.Config.sl_steps
    settings = script.Config(**counts, seed=config.seed, device=config.device, bf16=config.bf16,
                             save=False, quiet=True)
    seconds = []
    plain = script.steps
    script.steps = timed(plain, seconds)
    started = time.time()
    try:
        script.train(settings)
    finally:
        script.steps = plain
    step = statistics.mean(seconds)
    return {"step": step, "training": step * default,
            "rest": time.time() - started - sum(seconds)}


# ---------------------------------------------------------------- the numbers

def picture(runs):
    bars = []
    for name in runs[0]["scripts"]:
        values = {}
        for part in ("training", "rest"):
            values[part] = [run["scripts"][name][part] for run in runs]
        bars.append(figures.bar(name, values))
    return chart([Panel("What one waits for", "seconds of a whole run", bars=bars)])


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=2, tokens=4)
    model, tokenizer = load(config.init, config.device)
    rate = products_a_second(256 if config.quick else 2048, config.device)
    config.say(f"speed: {torch.get_num_threads()} threads on {config.device}, "
               f"{rate / 1e9:.0f} billion operations a second in products of matrices")
    numbers = {"products": rate, "sampling": {}, "gradient": {}, "scripts": {}}

    config.say("\nsampling       tokens a second")
    for rows in 1, 64, 256:
        numbers["sampling"][str(rows)] = sampling(model, tokenizer, rows, config)
        config.say(f"{rows:4} answers {numbers['sampling'][str(rows)]:15,.0f}")

    config.say("\na gradient          seconds   of the products' rate")
    for rows, length in (64, 64), (4, 128):
        seconds = forward_and_backward(model, rows, length)
        share = operations(model, rows * length) / seconds / rate
        numbers["gradient"][f"{rows}x{length}"] = {"seconds": seconds, "share": share}
        config.say(f"{rows:3} x {length:3} tokens{seconds:13.3f}{share:24.0%}")
    if config.init != Config.init:
        return {"numbers": numbers}

    need("out/sft")
    need("out/reward_model")
    config.say("\nscript            a step  training    rest: seconds of a default run")
    for name, script in SCRIPTS.items():
        times = time_script(script, config)
        numbers["scripts"][name] = times
        config.say(f"{name:14}{times['step']:10.3f}{times['training']:10.1f}{times['rest']:8.1f}")
    return {"numbers": numbers}


if __name__ == "__main__":
    figures.main("speed", Config, train, picture, __doc__)
