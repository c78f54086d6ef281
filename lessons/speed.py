"""How fast is it, on this machine?

For each weight and each token, training makes three multiplications: one forward, and two backward,
for the gradient of what came in and for that of the weight. Each comes with an addition, and 3 x 2
is 6. So N weights in matrices and n tokens want

    operations = 6 N n

By hand: data/base has 917,504 weights in its matrices. A step of sft.py has some 2,250 tokens that
are different (model.different_tokens), and wants 6 x 917,504 x 2,250 = 12.4 billion operations. A
machine that makes 100 billion a second would need 0.12 s, if it did nothing else. (Where the
course was measured each of two cores makes about 100 billion; a step took 0.2 s on one of them and
0.11 s on both.)

What the machine makes is measured first, in products of large matrices. Then sampling, then the
gradient of one step, then some steps of each script as it stands. What is left of a script's time
is loading, exams, and the answers that it shows: it is part of what one waits for.

    python -m lessons.speed                   1-2 minutes; sampling by --init, steps of six scripts
    python -m lessons.speed --init FOLDER     sampling and training by a model of your own, alone

Simplified: attention's products, which grow with the square of the length, are left out. And of
those 2,250 tokens only the 1,240 before an answer's token meet the last MLP and the vocabulary: in
truth 10.5 billion operations, not 12.4. (In the gradient measured here all tokens meet them.)
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
from model import continue_rows, low_precision, token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    init: str = "data/base"   # the model that samples
    steps: int = 12           # optimiser steps of each script
    tokens: int = 64          # new tokens of each answer: none ends before
    save: bool = False        # nothing is kept

    unused = ("data", "out", "batch", "accumulate", "lr", "lora", "save")   # scripts as they stand


SCRIPTS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "grpo": grpo, "ppo": ppo,
           "cai": cai}


# ---------------------------------------------------------------- the machine

def products_a_second(size, device):
    """Operations a second in products of two size x size matrices, the best of 5."""
    A = torch.randn(size, size, device=device)
    best = 0.0
    with low_precision(A.device):       # as in the network's blocks
        A = A @ A                       # a warm-up; from here on A has that precision, too
        for _ in range(5):
            started = time.time()
            (A @ A)[0, 0].item()        # .item() waits for a GPU, too
            best = max(best, 2 * size**3 / (time.time() - started))
    return best


# operations = 6 N n
def operations(model, tokens):
    """Of one step that trains on so many tokens."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if not model.config.tie:
        weights -= model.embed.weight.numel()       # here rows of it are looked up, no more
    return 6 * weights * tokens


# ---------------------------------------------------------------- sampling, and one plain step

@torch.no_grad()
def sampling(model, rows, config):
    """Tokens a second of so many answers at once, to the same random prompt."""
    prompt = torch.randint(model.config.vocab_size, (1, 16), device=model.embed.weight.device)
    ids = prompt.repeat(rows, 1)                                # (rows, 16)
    mask = torch.ones_like(ids, dtype=torch.bool)
    generator = torch.Generator().manual_seed(config.seed)      # darts are thrown on the processor
    for _ in range(2):                  # the first one is a warm-up
        started = time.time()
        # no token is -1, so no answer ends early, and models can be compared
        tokens, _ = continue_rows(model, ids, mask, config.tokens, end=-1, temperature=1.0,
                                  top_k=0, top_p=1.0, generator=generator)
        rate = (tokens != -1).sum().item() / (time.time() - started)
    return rate


def forward_and_backward(model, rows, length):
    """One step's gradient on random tokens. -> seconds, the median of 5, and tokens learned from"""
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
        loss.item()                     # waits for a GPU
        seconds.append(time.time() - started)
        model.zero_grad()
    return statistics.median(seconds), int(answer.sum())


# ---------------------------------------------------------------- the scripts

def timed(steps, loops):
    """The scripts' loop over steps, with a clock: each loop adds to `loops` a list of what its body
    took, in seconds."""
    def loop(config, *optimizers):
        seconds = []
        loops.append(seconds)
        for step in steps(config, *optimizers):
            started = time.time()
            yield step
            seconds.append(time.time() - started)
    return loop


def time_script(script, config):
    """Some steps of a script. -> seconds of a step, of a default run's steps, and of the rest"""
    counts = {"steps": config.steps}
    defaults = [script.Config.steps or reward_model.KINDS["pairs"].steps]
    if script is cai:                   # two loops, whose steps do not cost the same
        counts["sl_steps"] = config.steps
        defaults = [cai.Config.sl_steps, cai.Config.steps]
    settings = script.Config(**counts, seed=config.seed, device=config.device, bf16=config.bf16,
                             save=False, quiet=True)
    loops = []
    plain = script.steps
    script.steps = timed(plain, loops)
    started = time.time()
    try:
        script.train(settings)
    finally:
        script.steps = plain
    rest = time.time() - started
    training = 0.0
    for seconds, default in zip(loops, defaults, strict=True):
        rest -= sum(seconds)
        training += statistics.mean(seconds) * default
    return {"step": training / sum(defaults), "training": training, "rest": rest}


# ---------------------------------------------------------------- the numbers

def picture(runs):
    bars = []
    for rows in runs[0]["sampling"]:
        values = {"": [run["sampling"][rows] for run in runs]}
        bars.append(figures.bar(f"{rows} at once", values))
    panels = [Panel("Sampling", "tokens a second", bars=bars)]
    bars = []
    for name in runs[0]["scripts"]:
        values = {}
        for part in ("training", "rest"):
            values[part] = [run["scripts"][name][part] for run in runs]
        bars.append(figures.bar(name, values))
    if bars:                            # none by a model of your own
        panels.append(Panel("What one waits for", "seconds of a whole run", bars=bars))
    return chart(panels)


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=2, tokens=4)
    model, _ = load(config.init, config.device)
    size = 2048 if config.device == "cpu" else 8192             # less does not fill a GPU
    rate = products_a_second(256 if config.quick else size, config.device)
    config.say(f"speed: {torch.get_num_threads()} threads on {config.device}, "
               f"{rate / 1e9:,.0f} billion operations a second")
    numbers = {"products": rate, "sampling": {}, "gradient": {}, "scripts": {}}

    config.say("\nsampling       tokens a second")
    for rows in 1, 64, 256:
        numbers["sampling"][str(rows)] = sampling(model, rows, config)
        config.say(f"{rows:4} answers {numbers['sampling'][str(rows)]:15,.0f}")

    config.say("\na gradient          seconds   of the products' rate")
    for rows, length in (64, 64), (4, 128):
        seconds, tokens = forward_and_backward(model, rows, length)
        share = operations(model, tokens) / seconds / rate
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
