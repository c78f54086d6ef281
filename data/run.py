"""How a script runs: its settings, its steps, its log, adapters, and more processes.

Every script looks like this, and this file holds what all of them share:

    @dataclass(frozen=True)
    class Config(Settings):
        beta: float = 0.1                           # what --help says of it

    def train(config):
        started = begin(config)
        model, tokenizer = load(config.init)        # data/checkpoints.py
        optimizer = adamw(model, config.lr)
        stream = batches(rows, lengths, config.batch, generator)
        log = Log(config)
        for step in steps(config, optimizer):
            batch = next(stream)
            for part in parts(batch, config.accumulate):
                (loss_of(part).sum() / len(batch)).backward()
            clip_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            log(step, loss=...)
        save(config.out, model, tokenizer)

    if __name__ == "__main__":
        main(Config, train, __doc__)
"""
import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from data.checkpoints import check_device
from model import BF16, UserError

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc gives large tensors back to the kernel, and the next one pays a page fault every 4 kB
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 30)


class Diverged(Exception):
    """Training had to stop, for instance at a loss of nan: main() exits 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every script can be told. A script's Config adds its own, and changes some defaults."""
    init: str = "out/sft"        # start from this model folder
    data: str = ""               # learn from these JSON lines
    out: str = ""                # write here
    steps: int = 100             # optimiser steps
    batch: int = 32              # rows a step
    accumulate: int = 1          # pieces that a batch is cut into, to save memory
    lr: float = 1e-3             # peak learning rate
    lora: int = 0                # train adapters of this rank (0: train the weights)
    seed: int = 0                # same seed, same machine: same numbers (but for a GPU)
    device: str = "cpu"          # cpu, cuda or mps
    bf16: bool = False           # products in bfloat16 on a CPU, as always on cuda
    save: bool = True            # write the checkpoint and the results
    quiet: bool = False          # print nothing

    # allowed ranges; any other number is at least 0. A Config adds: limits = Settings.limits | {..}
    limits = {"steps": (1, 10**9), "batch": (1, 10**6), "accumulate": (1, 10**6),
              "seed": (0, 2**63 - 1), "lora": (0, 10**4)}
    may_be_empty = ()           # texts with a default that can be switched off: --runs ""
    unused = ()                 # settings of every script that would change nothing: no such flag

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least, most = self.limits.get(field.name, (0, math.inf))
            if isinstance(value, str) or value is None:
                continue
            if not (least <= value <= most and math.isfinite(value)):
                flag = field.name.replace("_", "-")
                upto = "" if most == math.inf else f" and at most {most}"
                raise UserError(f"--{flag} {value}: want a number of at least {least}{upto}")

    def say(self, text=""):
        if not self.quiet:
            print(text, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def exit(self, status=0, message=None):
        sys.stdout.flush()              # --help | head -1: exit_codes() hears of a closed pipe
        super().exit(status, message)


def parse(Config, doc, argv=None):
    """Command-line flags -> a Config. The comment behind each field is its help."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):         # all that it inherits from, but object
        comments |= dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(cls), re.M))
    shared = {field.name for field in dataclasses.fields(Settings)}
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False, usage="%(prog)s [settings]")
    own = parser.add_argument_group("its own settings")
    common = parser.add_argument_group("settings of every script")
    for field in dataclasses.fields(Config):
        if field.name in Config.unused:
            continue
        group = common if field.name in shared else own
        text = comments.get(field.name, "")
        if field.default not in (None, ""):
            text += f" ({field.default})"
        names = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*names, default=field.default, help=text.replace("%", "%%"), **kind)
    config = Config(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Config):
        can_be = field.default == "" or field.name in Config.may_be_empty
        if getattr(config, field.name) == "" and not can_be:
            raise UserError(f'--{field.name} "": want a text that is not empty')
    return config


def main(Config, train, doc):
    with exit_codes():
        config = parse(Config, doc)
        if PROCESSES > 1:
            config = meet(config)
        train(config)
        if PROCESSES > 1:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def exit_codes():
    """2 for bad input, 1 for a run that had to stop, 130 for Ctrl-C outside of a loop."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, EOFError):
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # python dpo.py | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def begin(config):
    """The first line of every train(): seeds, and makes sure of --device and --out before any work
    is done. -> the time, to tell later how long it took"""
    check_device(config.device)
    torch.manual_seed(config.seed)
    BF16.discard("cpu")
    if config.bf16:
        BF16.add("cpu")
        if config.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            config.say("--bf16: this processor has no instructions for it, so it will be slow")
    if config.save:
        check_out(config.out)
    return time.time()


def check_out(out):
    """Could the folder be made, and be written? It is tried beside it, and nothing is left behind:
    a run that ends at once, at a typo in its data, has made no folder."""
    folder = Path(out)
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(dir=there) as beside:
            Path(beside, folder.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None


# what each script takes on two cores, in seconds
STAGES = {"sft": 10, "reward_model": 30, "ppo": 35, "grpo": 15, "dpo": 25, "cai": 35}


def need(folder):
    """Where the checkpoint that a script writes by default is missing, the script runs first, as a
    program of its own. Any other folder is the user's: there, load() will complain."""
    stage = Path(folder).name
    is_default = Path(folder) == Path("out", stage) and stage in STAGES
    is_there = Path(folder, "config.json").exists()
    if is_default and not is_there and RANK == 0:
        script = f"{stage}.py"
        print(f'{folder} not found: running "python {script}" first, about {STAGES[stage]} seconds',
              flush=True)
        alone = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
        program = [sys.executable, Path(__file__).parent.parent / script]
        if subprocess.run(program, env=alone).returncode != 0:
            raise UserError(f'"python {script}" failed')
    average(0.0)                        # a mean over all processes, so each waits for the first


# ---------------------------------------------------------------- the parts of a loop

def batches(rows, lengths, size, generator):
    """Endless batches of `size` rows. Rows of similar length go together, so that little is
    padding, and noise mixes them a little; without lengths all are mixed. What fills no batch is
    left out of this round. Fewer rows than `size` are one batch."""
    size = min(size * PROCESSES, len(rows) // PROCESSES * PROCESSES)  # of all processes together
    if size == 0:
        raise UserError(f"{len(rows)} rows are too few for {PROCESSES} processes")
    while True:
        order = torch.randperm(len(rows), generator=generator)
        order = order[:len(rows) // size * size]
        if lengths is not None:
            noise = 1 + 0.1 * torch.rand(len(order), generator=generator)
            order = order[(torch.tensor(lengths)[order] * noise).argsort()]
        groups = order.view(-1, size)                           # (batches, size)
        for g in torch.randperm(len(groups), generator=generator):
            yield [rows[i] for i in groups[g][RANK::PROCESSES]]


def hold_out(rows, prompts=None, most=128):
    """Every k-th prompt is held out with all rows that answer it, or what is measured on them would
    be memory in part: a quarter of few rows, about `most` of many. Without prompts each row stands
    for itself. -> rows to learn from, rows held out"""
    if prompts is None:
        prompts = range(len(rows))
    names = [str(prompt) for prompt in prompts]
    different = list(dict.fromkeys(names))                      # each once, in their order
    if len(different) < 2:
        raise UserError(f"--data: {len(rows)} rows, {len(different)} different prompts; want at "
                        "least 2, as one is held out")
    every = max(2, min(len(different), max(4, len(rows) // most)))
    apart = set(different[::every])
    train = [row for row, name in zip(rows, names) if name not in apart]
    held = [row for row, name in zip(rows, names) if name in apart]
    return train, held


def parts(rows, n):
    """Rows in at most n lists, to go through the network one after the other. Divide each part's
    summed loss by the number of all rows: then the gradients add up to those of the batch."""
    size = math.ceil(len(rows) / n)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def as_in_training(rows, config):
    """Rows in lists no longer than the parts of a batch: measuring wants no more memory."""
    size = math.ceil(config.batch / config.accumulate)
    return parts(rows, math.ceil(len(rows) / size))


class AdamW:
    """Loshchilov and Hutter 2017 (1711.05101), here without decay, and so Kingma and Ba's Adam. The
    kernel is PyTorch's, the names are those of torch.optim, and steps() sets the rate in both; but
    whoever makes one of torch.optim waits 1.4 s for a compiler that is not used.

        m = b1 m + (1 - b1) g        m' = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2      v' = v / (1 - b2^t)      p = p - lr m' / (sqrt(v') + eps)
    """

    def __init__(self, parameters, lr):
        self.defaults = {"lr": lr}
        self.param_groups = [{"params": parameters, "lr": lr}]
        self.m = {p: torch.zeros_like(p) for p in parameters}
        self.v = {p: torch.zeros_like(p) for p in parameters}
        self.t = torch.zeros((), device=parameters[0].device)

    @torch.no_grad()
    def step(self):
        self.t += 1
        [group] = self.param_groups
        moved = [p for p in group["params"] if p.grad is not None]
        if not moved:
            return
        gradients = [p.grad for p in moved]
        m = [self.m[p] for p in moved]
        v = [self.v[p] for p in moved]
        torch._fused_adamw_(moved, gradients, m, v, [], [self.t] * len(moved), lr=group["lr"],
                            beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, amsgrad=False,
                            maximize=False)

    def zero_grad(self):
        for p in self.m:
            p.grad = None


def adamw(model, lr):
    return AdamW([p for p in model.parameters() if p.requires_grad], lr)


def schedule(step, steps, warmup=10):
    """The learning rate's factor: the smaller of two lines, up by a tenth a step and down from 1 to
    0. So no run sees all of --lr: 24 steps get 0.71 of it at most, 180 get 0.95."""
    return min((step + 1) / warmup, 1 - step / steps)


def steps(config, *optimizers):
    """for step in steps(config, optimizer): sets the learning rate and shows the time left.
    Ctrl-C finishes this step and ends the loop, so that the script goes on to save; a second one
    aborts."""
    start = time.time()
    stop = []
    old = signal.getsignal(signal.SIGINT)

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, old)
        stop.append(True)

    with contextlib.suppress(ValueError):         # only the main thread may listen
        signal.signal(signal.SIGINT, interrupt)
    try:
        for step in range(config.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * schedule(step, config.steps)
            yield step
            if average(float(len(stop))) > 0:     # all processes leave together
                config.say(f"\nstopped at step {step + 1} of {config.steps}; going on with what it "
                           "has learned")
                return
            left = (time.time() - start) / (step + 1) * (config.steps - step - 1)
            if sys.stdout.isatty() and not config.quiet:
                print(f"\r{step + 1:5} of {config.steps}, {left:.0f} s left ", end="", flush=True)
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, old)
        if sys.stdout.isatty() and not config.quiet:
            print("\r\x1b[K", end="", flush=True)


def clip_gradients(model):
    """Gradients become their mean over all processes, and no longer than 1. -> their length"""
    for p in model.parameters():
        if PROCESSES > 1 and p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = average(gradient)
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class Log:
    """Keeps every step's numbers in rows, and prints 20 of them at most, the first 7 numbers of
    each. A loss that is not finite stops the run."""

    def __init__(self, config):
        self.config = config
        self.rows = []
        self.next = 0                   # the step of the next line; base.py leaves out steps

    def __call__(self, step, **numbers):
        values = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
        values = average(values).tolist()
        row = {"step": step}
        row |= dict(zip(numbers, values))
        if not math.isfinite(row.get("loss", 0.0)):
            raise Diverged(f"step {step}: the loss is {row['loss']}")
        self.rows.append(row)
        every = math.ceil(self.config.steps / 19)
        is_last = step == self.config.steps - 1
        if not self.config.quiet and (step >= self.next or is_last):
            self.next = step - step % every + every
            self.show(row)

    def show(self, row):
        names = list(row)[1:8]
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        if len(self.rows) == 1:
            print(f"{clear} step" + "".join(f"{name[:9]:>10}" for name in names))
        line = f"{clear}{row['step']:5}"
        for name in names:
            decimals = 4 if abs(row[name]) < 100 else 1
            line += f"{row[name]:10.{decimals}f}"
        print(line, flush=True)


# ---------------------------------------------------------------- adapters

class LoRA(nn.Module):
    """Hu et al. 2021 (2106.09685): W + 2 B A. W is frozen, A (rank, in) random, B (out, rank) 0, so
    that nothing changes before the first step."""

    def __init__(self, W, rank):
        super().__init__()
        rows, columns = W.shape
        self.A = nn.Parameter(W.new_empty(rank, columns).normal_() / math.sqrt(columns))
        self.B = nn.Parameter(W.new_zeros(rows, rank))

    def forward(self, W):
        return W + 2 * self.B @ self.A


def add_lora(model, rank):
    """Freeze all but a new scalar head, and give every matrix of the blocks an adapter."""
    if rank == 0:
        return
    if rank > model.config.d_model:
        raise UserError(f"--lora {rank}: want at most the model's width, {model.config.d_model}")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name:
            parametrize.register_parametrization(module, "weight", LoRA(module.weight, rank))


def merge_lora(model):
    """W becomes W + 2 B A: an ordinary model again, which can be saved."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    model.requires_grad_(True)


# ---------------------------------------------------------------- more processes
#     torchrun --nproc_per_node=2 dpo.py
# Each process takes --batch rows of its own, and all learn from the
# mean of their gradients, so two with --batch 32 are one with --batch 64. In RL each has its own
# prompts and random numbers, and means over a batch (whitening, baselines) are over its own. Only
# the first one prints and writes.

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def meet(config):
    """Join the other processes. -> a Config with which only the first one prints and writes"""
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend)
    if RANK == 0:
        return config
    sys.stdout = open(os.devnull, "w")
    return dataclasses.replace(config, save=False)


def portion(rows):
    """This process's share of the rows."""
    if len(rows) < PROCESSES:
        raise UserError(f"{len(rows)} rows are too few for {PROCESSES} processes")
    return rows[RANK::PROCESSES]


def average(x):
    """A number or a tensor of floats -> its mean over all processes (a tensor changes in place)."""
    x = torch.as_tensor(x)
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
        x /= PROCESSES
    return x
