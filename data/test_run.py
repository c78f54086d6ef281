"""The tests of data/run.py: how a script runs.      python -m pytest data/test_run.py"""
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import model as M
from data import checkpoints as C
from data import run as house
from test_all import SCRIPTS, TOKENIZER, near, rows_of, sgd, tiny_judge, tiny_model

HERE = Path(__file__).parent.parent

# flags, and how a run begins

@dataclass(frozen=True)
class Config(house.Settings):
    steps: int = 80             # optimiser steps
    lr: float = None            # peak learning rate (default: by lot)
    beta: float = 0.1           # strength of the KL penalty, 50% of it
    max_new: int = 8            # longest answer
    out: str = "out/x"          # write here

    limits = house.Settings.limits | {"beta": (0, 0.5)}


def test_flags_become_a_config():
    assert house.parse(Config, "doc", []) == Config()
    flags = "--beta 0.05 --no-save --steps 3 --max-new 4".split()
    assert house.parse(Config, "doc", flags) == Config(beta=0.05, save=False, steps=3, max_new=4)
    assert house.parse(Config, "doc", ["--max_new", "4"]) == Config(max_new=4)


@pytest.mark.parametrize("flags", [
    "--bet 1", "--beta x", "--steps 1.5", "--steps", "--loss dpo", "file", "--steps 0", "--lr nan",
    "--lr inf", "--lr -1", "--seed -1", f"--seed {2**64}", "--batch 0", "--accumulate 0",
    "--beta 0.6", "--max-new -1", "--lora -1"])
def test_a_wrong_flag_is_named_in_one_line(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        house.main(Config, dict, "doc")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert all(word in printed.err for word in flags.split())
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("config", [Config, *[script.Config for script in SCRIPTS.values()]])
def test_help_fits_a_screen_and_shows_own_settings_first(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        house.parse(config, "the doc\nand more", ["--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 45 and "(None)" not in text and "the doc" in text
    assert text.index("--steps") < text.index("--quiet")
    if config is Config:
        assert "strength of the KL penalty, 50% of it (0.1)" in text
        assert text.index("--beta") < text.index("--init")


@pytest.mark.parametrize("error, code", [
    (M.UserError("data.jsonl:3: bad"), 2), (house.Diverged("step 3: loss is nan"), 1),
    (KeyboardInterrupt("interrupted"), 130)])
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        with house.exit_codes():
            raise error
    assert stop.value.code == code
    assert capsys.readouterr().err.endswith(f"{error}\n")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_begin_wants_to_be_able_to_write(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(M.UserError, match="--out .*file"):
        house.begin(Config(out=f"{tmp_path}/{out}", quiet=True))


def test_begin_seeds():
    numbers = []
    for seed in 3, 3, 4:
        house.begin(Config(seed=seed, save=False))
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[1] != numbers[2]


def test_bf16_changes_little_and_ends_with_the_run():
    model = tiny_model()
    ids = torch.arange(200, 240).view(4, 10)
    logits = []
    for bf16 in False, True, False:
        house.begin(Config(save=False, quiet=True, bf16=bf16))
        logits.append(model(ids))
    exact, rough, again = logits
    assert 0 < (rough - exact).abs().max() < 0.2
    assert rough.dtype == torch.float32
    assert torch.equal(exact, again)


def test_need_makes_a_default_that_is_missing(tmp_path, monkeypatch):
    ran = []

    def run(argv, env):
        ran.append([str(word) for word in argv[1:]])
        return subprocess.CompletedProcess(argv, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(house.subprocess, "run", run)
    house.need("mine")
    house.need("out/mine")
    house.need("elsewhere/sft")
    assert ran == []                                            # load() will complain
    for stage in house.STAGES:
        house.need(f"out/{stage}")
    assert ran == [[str(HERE / f"{stage}.py")] for stage in house.STAGES]
    C.save("out/sft", tiny_model(), TOKENIZER)
    house.need("out/sft")
    assert len(ran) == len(house.STAGES)


def test_need_complains_where_the_stage_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(house.subprocess, "run", lambda argv, env: failed)
    with pytest.raises(M.UserError, match="python dpo.py"):
        house.need("out/dpo")


# batches

def stream_of(lengths, size):
    rows = list(range(len(lengths)))
    return house.batches(rows, lengths, size, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count, size", [(60, 10), (3, 10)])
def test_batches_visit_every_row_once_a_round(count, size):
    stream = stream_of([1 + i % 7 for i in range(count)], size)
    for _ in range(2):
        rows = []
        while len(rows) < count:
            rows += next(stream)
        assert sorted(rows) == list(range(count))


def test_what_fills_no_batch_has_its_turn():
    """60 rows in batches of 32: the longest ones come as often as the others."""
    stream = stream_of(list(range(1, 61)), 32)
    counts = torch.zeros(60)
    for _ in range(200):
        counts[next(stream)] += 1
    assert counts.min() > 80 and counts.max() < 135             # 107 each, if all are equal


def test_batches_hold_rows_of_similar_length():
    stream = stream_of([1 + i % 50 for i in range(400)], 20)
    spreads = []
    for _ in range(20):
        lengths = [row % 50 for row in next(stream)]
        spreads.append(max(lengths) - min(lengths))
    assert np.mean(spreads) < 12                                # 48 without sorting


def test_parts_are_the_whole_in_order():
    assert house.parts([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert house.parts([1, 2], 5) == [[1], [2]]


@pytest.mark.parametrize("count, held_out", [(2, 1), (3, 1), (90, 23), (512, 128), (6000, 131)])
def test_hold_out(count, held_out):
    learned, held = house.hold_out(list(range(count)))
    assert len(held) == held_out
    assert sorted(learned + held) == list(range(count))


def test_a_prompt_is_held_out_with_all_that_answers_it():
    """Of a b c d e f, each asked twice, every fourth: a and e."""
    prompts = [{"ask": name} for name in "abcdefabcdef"]
    learned, held = house.hold_out(list(range(12)), prompts)
    assert held == [0, 4, 6, 10] and learned == [1, 2, 3, 5, 7, 8, 9, 11]
    with pytest.raises(M.UserError, match="3 rows, 1 different prompts"):
        house.hold_out([1, 2, 3], ["same", "same", "same"])


# steps

def test_steps_set_the_learning_rate_of_every_optimizer():
    """Up in ten steps, then down to 0 in a straight line."""
    optimizers = [sgd(tiny_model(), lr) for lr in (1.0, 0.5)]
    for step in house.steps(Config(steps=20, quiet=True), *optimizers):
        factor = min((step + 1) / 10, 1 - step / 20)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        near(rates, [factor, factor / 2])
    assert step == 19


def test_ctrl_c_ends_the_loop_after_this_step(capsys):
    before = signal.getsignal(signal.SIGINT)
    for step in house.steps(Config(steps=9)):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
    assert step == 3
    assert "stopped at step 4 of 9" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_stops_at_once():
    # a shell that starts the tests behind its back, with "&", lets them ignore Ctrl-C
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        for step in house.steps(Config(steps=9, quiet=True)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, old)
    assert step == 0


def test_adamw_by_hand():
    """Kingma and Ba's Adam with betas 0.9 and 0.95; without decay."""
    layer = torch.nn.Linear(5, 4, bias=False)
    p = layer.weight
    want = p.detach().clone()
    m = v = torch.zeros_like(p)
    optimizer = house.adamw(layer, 0.01)
    for step in range(1, 4):
        p.grad = torch.randn_like(p)
        m = 0.9 * m + 0.1 * p.grad
        v = 0.95 * v + 0.05 * p.grad ** 2
        root = (v / (1 - 0.95 ** step)).sqrt()
        want -= 0.01 * m / (1 - 0.9 ** step) / (root + 1e-8)
        optimizer.step()
        near(p, want, 1e-6)
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()                    # without gradients nothing moves
    near(p, want, 1e-6)


def test_adamw_loads_no_compiler():
    code = """if True:
        import sys
        import torch
        from data.run import adamw
        layer = torch.nn.Linear(2, 2)
        optimizer = adamw(layer, 0.1)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print("torch._dynamo" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("gradient, want", [([0.3, 0.4], [0.3, 0.4]), ([3.0, 4.0], [0.6, 0.8])])
def test_only_long_gradients_are_shortened(gradient, want):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([gradient])
    near(house.clip_gradients(layer), math.hypot(*gradient))
    near(layer.weight.grad, [want])


@pytest.mark.parametrize("steps", [1, 7, 20, 80, 500])
def test_the_log_keeps_all_and_shows_at_most_20_rows_of_80_columns(steps, capsys):
    log = house.Log(Config(steps=steps))
    for step in range(steps):
        numbers = {f"x{i}": i for i in range(9)}
        log(step, loss=torch.tensor(1 / (step + 1)), a_very_long_name=-123456.789, **numbers)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 21
    assert max(len(line) for line in lines) <= 80
    assert lines[-1].split()[0] == str(steps - 1)
    assert len(log.rows) == steps and log.rows[-1]["x8"] == 8.0


def test_large_numbers_are_shown_with_fewer_digits(capsys):
    log = house.Log(Config(steps=1))
    log(0, small=99.99, large=100.0, below=-1234.56)
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "99.9900", "100.0", "-1234.6"]


# adapters

def test_lora_by_hand():
    """W + 2 B A, one number at a time; at first B is 0."""
    W = torch.randn(5, 7)
    lora = house.LoRA(W, 4)
    assert torch.equal(lora(W), W)
    torch.nn.init.normal_(lora.B)
    for i in range(5):
        for j in range(7):
            product = sum(lora.B[i, r].item() * lora.A[r, j].item() for r in range(4))
            near(lora(W)[i, j], W[i, j] + 2 * product)


def test_lora_trains_its_own_parameters_and_a_new_head_alone():
    model = tiny_judge()
    house.add_lora(model, 4)
    *adapters, head = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.endswith((".A", ".B")) for name in adapters)
    assert len(adapters) == 2 * 7 * 2                           # of 7 matrices in 2 layers
    assert head == "score.weight"


def test_lora_is_merged_into_an_ordinary_model():
    model = tiny_model()
    ids = torch.tensor(rows_of(12))
    names = list(model.state_dict())
    house.add_lora(model, 4)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    learned = model(ids)
    house.merge_lora(model)
    near(model(ids), learned, 1e-4)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(M.UserError, match="--lora 33"):
        house.add_lora(tiny_model(), 33)


# two processes, though these tests start none (those of all scripts do)

def test_two_processes_share_the_rows(monkeypatch):
    monkeypatch.setattr(house, "PROCESSES", 2)
    own = []
    for rank in 0, 1:
        monkeypatch.setattr(house, "RANK", rank)
        own += next(stream_of([5] * 24, 6))
        assert house.portion(["a", "b", "c"]) == [["a", "c"], ["b"]][rank]
    assert len(own) == len(set(own)) == 12


def test_numbers_and_gradients_become_their_mean(monkeypatch):
    """The other process has three times as much."""
    def all_reduce(x):
        x *= 4
    monkeypatch.setattr(house, "PROCESSES", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    log = house.Log(Config(quiet=True))
    log(0, loss=1.5)
    assert log.rows[0]["loss"] == 3.0
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[0.1, 0.2]])
    house.clip_gradients(layer)
    near(layer.weight.grad, [[0.2, 0.4]])
