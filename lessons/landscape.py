"""A map of direct alignment: what DPO solves, and four questions that tell its family apart.

DPO claims to end where RLHF would. That can be checked to the last digit where there is one prompt
with a handful of answers and nothing else: no network, no sampling, no noise. There the policy that
RLHF looks for has a closed form, and gradient descent on DPO's loss, in the mean over all votes,
has to find it (Rafailov et al. 2023, 2305.18290, eq. 4):

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z

By hand: two answers, each half of pi_ref, with r = 1 and 0. At beta 0.5, pi* = e^2 / (e^2 + 1) =
0.881; at beta 5 it is e^0.2 / (e^0.2 + 1) = 0.550, so a large beta stays close.

Every loss of dpo.py pulls a pair apart. Four questions, asked of the function itself, say how:

    held against    pi_ref, or nothing: is there a second model in memory?
    sees            the lead alone, chosen - rejected, or each answer by itself?
    has enough      never, at some lead, or does it pull back beyond one?
    a lost pair     far behind, as a wrong label is: does it pull ever harder, or let go?

    python -m lessons.landscape --runs ""                the toy and the map alone, in seconds
    python -m lessons.landscape --runs "dpo ipo kto"     and these three, in a minute and a half
    python -m lessons.landscape                          ten losses, thumbs and PPO: six minutes
    python -m lessons.landscape --scenario noisy         a third of the labels is wrong, or another
                                                         of four: see scenario()

Simplified: each loss with the beta and the learning rate of its table. A loss that is tuned better
stands elsewhere on the picture.
Try next: --runs "dpo" and --beta 0.05; a loss of your own in dpo.LOSSES, and where it stands.
"""
import random
from dataclasses import dataclass, replace

import torch

import dpo
import ppo
from data import exam, rows
from data.chart import STYLE, Box, Panel, Paper, draw_panel
from data.checkpoints import write_files
from data.run import begin, need
from lessons import figures, kto
from model import UserError


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/preferences.jsonl"  # JSON lines: pairs
    out: str = "out/landscape"  # write here
    steps: int = 48           # optimiser steps of each run: half of dpo.py's, as there are many
    batch: int = 32           # pairs a step, or twice as many thumbs; PPO has a batch of its own
    lr: float = None          # peak learning rate of all (default: each its own, see dpo.LOSSES)
    beta: float = None        # of all losses (default: each its own, see dpo.LOSSES)
    runs: str = f"{' '.join(dpo.LOSSES)} kto ppo"  # losses of dpo.py, thumbs, and RLHF
    scenario: str = ""        # one of SCENARIOS, instead of these runs

    may_be_empty = ("runs",)
    unused = ("save",)        # no model is kept, and a scenario learns from a file in --out


# ---------------------------------------------------------------- an exact toy
# One prompt with K answers; ref, r and log pi are (K,)

# pi*(y) = pi_ref(y) exp(r(y) / beta) / Z
def closed_form(ref, r, beta):
    return (ref.log() + r / beta).softmax(0)


# E L = sum_ij pi_ref(i) pi_ref(j) sigma(r_i - r_j) L(i chosen, j rejected)
def expected_loss(logp, ref, r, beta):
    """DPO's loss in the mean over all pairs that pi_ref answers and all votes on them."""
    ratio = logp - ref.log()                                    # (K,) log pi / pi_ref
    asked = ref[:, None] * ref                                  # (K, K) how often is it i and j?
    votes = torch.sigmoid(r[:, None] - r)                       # (K, K) how often does i win?
    losses = dpo.dpo(ratio[:, None], ratio, beta)               # (K, K)
    return (asked * votes * losses).sum()


def descend(ref, r, beta, steps=2000):
    """Gradient descent from pi_ref. -> pi (K,)"""
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        expected_loss(logits.log_softmax(0), ref, r, beta).backward()
        optimizer.step()
    return logits.detach().softmax(0)


def exact_toy(config):
    """-> the largest error of any probability, for some betas"""
    ref = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05])
    r = torch.tensor([0.0, -1.0, 1.0, 0.5, 2.0])
    config.say("one prompt, five answers: where does DPO's loss end?")
    config.say("  beta                            pi(y)     error")
    config.say(f"   ref    {digits(ref)}")
    errors = {}
    for beta in 2.0, 1.0, 0.5:
        found = descend(ref, r, beta)
        exact = closed_form(ref, r, beta)
        errors[beta] = (found - exact).abs().max().item()
        config.say(f"{beta:6.1f}    {digits(found)}{errors[beta]:10.1e}")
        config.say(f"   pi*    {digits(exact)}")
    return errors


def digits(values):
    return " ".join(f"{value:.3f}" for value in values.tolist())


# ---------------------------------------------------------------- four questions
# A pair has a lead d = chosen - rejected, of a middle m. How hard does a loss pull?

FAR = 6.0                     # a long lead, in units of 1 / beta


def gradients(name, leads, middle=0.0):
    """- dL/dd and - dL/dm at these leads: what the loss wants of the lead, and of both answers
    together. Leads and middle in units of 1 / beta. (N,) each"""
    method = dpo.LOSSES[name]
    if not method.reference:
        middle = middle - 8.0                   # mean log-probs are below 0
    d = (leads / method.beta).requires_grad_()
    m = torch.full_like(leads, middle / method.beta).requires_grad_()
    settings = dpo.Config(loss=name, beta=method.beta)
    dpo.loss_of(m + d / 2, m - d / 2, settings).sum().backward()
    return -d.grad, -m.grad


def has_enough(even, ahead):
    """How hard does it pull a pair at lead 0, and one that is far ahead?"""
    if ahead < -1e-4 * even:
        return "pulls back"
    if ahead < 1e-4 * even:
        return "at a lead"
    return "never"


def when_lost(even, behind, farther):
    """A pair at lead 0, one that is far behind, and one twice as far."""
    if behind < 0.5 * even:
        return "lets go"
    if farther > 1.2 * behind:
        return "ever harder"
    return "no harder"


def sees(name, even):
    """Does it matter where the middle of a pair is, or its lead alone?"""
    leads = torch.tensor([0.0, 2.0])
    _, lift = gradients(name, leads)                            # (2,)
    _, elsewhere = gradients(name, leads, middle=1.0)
    if max(lift.abs().max(), elsewhere.abs().max()) < 1e-4 * even:
        return "the lead"
    start = lift[0].item()
    if abs(start) < 1e-4 * even:
        return "each answer"
    return "each, both up" if start > 0 else "each, both down"


def axes(name):
    """The four answers of a loss, from its gradient."""
    leads = torch.tensor([-2 * FAR, -FAR, 0.0, FAR])
    twice, behind, even, ahead = gradients(name, leads)[0].tolist()
    against = "pi_ref" if dpo.LOSSES[name].reference else "nothing"
    return {"held against": against, "sees": sees(name, even),
            "has enough": has_enough(even, ahead), "a lost pair": when_lost(even, behind, twice)}


def ask_all(config):
    """-> the map: a loss's name, and its four answers"""
    table = {}
    config.say("\nfour questions to each loss of dpo.py, answered by its gradient")
    config.say("            held against  sees             has enough  a lost pair")
    for name in dpo.LOSSES:
        table[name] = axes(name)
        against, sight, enough, lost = table[name].values()
        config.say(f"{name:10}  {against:12}  {sight:15}  {enough:10}  {lost}")
    return table


# ---------------------------------------------------------------- runs on the toy world

def learn(name, config, **changes):
    """dpo.py with one of its losses; or kto.py on the same answers, one by one; or ppo.py."""
    settings = dict(init=config.init, data=config.data, steps=config.steps, batch=config.batch,
                    accumulate=config.accumulate, lora=config.lora, seed=config.seed,
                    device=config.device, bf16=config.bf16, save=False, quiet=True)
    if config.lr is not None:
        settings["lr"] = config.lr
    if config.beta is not None:
        settings["beta"] = config.beta
    settings |= changes
    if name == "kto":
        settings["batch"] = 2 * config.batch                    # 32 pairs are 64 thumbs
        return kto.train(kto.Config(**settings))
    if name == "ppo":
        settings["data"] = ppo.Config.data
        settings["batch"] = ppo.Config.batch                    # answers, which it draws itself
        settings["steps"] = min(config.steps, ppo.Config.steps)
        return ppo.train(ppo.Config(**settings))
    return dpo.train(dpo.Config(loss=name, **settings))


def flip_some(path, share, folder, seed):
    """Pairs of which a share has its answers exchanged, with all that is said of each. -> the new
    file"""
    rng = random.Random(seed)
    lines = []
    for pair in rows.read_pairs(path):
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        if rng.random() < share:
            row |= {"chosen": pair.rejected, "rejected": pair.chosen}
            for name in ("gold", "marks"):                      # one for each answer, in order
                if pair.row.get(name):
                    row[name] = pair.row[name][::-1]
        lines.append(pair.row | row)
    write_files(folder, {"noisy.jsonl": rows.json_lines(lines)})
    return f"{folder}/noisy.jsonl"


def first_lines(path, count, folder):
    """So many pairs and no more. -> the new file"""
    lines = [pair.row for pair in rows.read_pairs(path)[:count]]
    write_files(folder, {"few.jsonl": rows.json_lines(lines)})
    return f"{folder}/few.jsonl"


SCENARIOS = ("noisy", "few", "ahead", "small")


def scenario(config):
    """What is the case, and what is tried -> names of losses, and what is changed for each.

    noisy    a third of the labels is wrong: a loss that knows it, or one that has enough
    few      200 pairs, of which 150 are seen ten times: one that never has enough, or that does
    ahead    the model is better than the winners: push them up, or both down
    small    no memory for a second model: a loss without a reference
    """
    if config.scenario == "noisy":
        data = flip_some(config.data, 1 / 3, config.out, config.seed)
        return {"dpo": {"data": data}, "robust": {"data": data, "noise": 1 / 3},
                "ipo": {"data": data}}
    if config.scenario == "few":
        data = first_lines(config.data, 200, config.out)
        return {"dpo": {"data": data}, "ipo": {"data": data}}
    if config.scenario == "ahead":
        need("out/ppo")
        return {"apo_zero": {"init": "out/ppo"}, "apo_down": {"init": "out/ppo"}}
    return {"dpo": {}, "simpo": {}, "orpo": {}}


def compare(runs, config):
    """runs: by name, what is changed for it. -> a card for each, and DPO's log"""
    cards = {}
    log = []
    config.say("\n                   gold       kl  length  flattery")
    for name, changes in runs.items():
        run = learn(name, config, **changes)
        card = run["after"]
        config.say(f"{name:10}{exam.cell('gold', card):>13}{card['kl']:9.2f}{card['length']:8.1f}"
                   f"{card['flattery']:10.2f}")
        cards[name] = {key: card[key] for key in ("gold", "kl", "length", "flattery")}
        if name == "dpo":
            log = run["log"]
    return cards, log


# ---------------------------------------------------------------- the picture

def picture(runs):
    """The map, and below it where the losses end up and what DPO does to its answers."""
    paper = Paper()
    bottom = draw_map(paper)
    colours = {"chosen": "c2", "rejected": "c4", "": "c0"}
    panels = panels_of(runs)
    for panel in panels:
        for line in panel.lines:
            colours.setdefault(line.name, f"c{len(colours) % 6}")
    left = 16
    right = 460                                 # a dozen names need room: the first panel is wider
    for panel in panels:
        draw_panel(paper, panel, Box(left, bottom, right - 16, bottom + 440), colours)
        left = right
        right = 744
    height = bottom + (440 if panels else 0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img">'
    background = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, STYLE, background, *paper.marks, "</svg>\n"])


def panels_of(runs):
    panels = []
    dots = []
    for name in runs[0]["cards"]:
        kl = figures.mean([numbers["cards"][name]["kl"] for numbers in runs])
        golds = [[numbers["cards"][name]["gold"]] for numbers in runs]
        dots.append(figures.line(name, [max(kl, 0.0)], golds))
    if dots:
        panels.append(Panel("What each paid for what it got", "KL, nats an answer (root scale)",
                            "gold", dots, scale="root"))
    if runs[0]["chosen"]:
        lines = []
        for name in "chosen", "rejected":
            curves = [numbers[name] for numbers in runs]
            lines.append(figures.line(name, range(len(curves[0])), curves))
        panels.append(Panel("Both of DPO's answers may fall", "step",
                            "log pi / pi_ref, nats an answer (running mean)", lines))
    return panels


def draw_map(paper):
    """A row for each loss: its four answers, and how hard it pulls over the lead. -> the height"""
    paper.text(16, 30, f"Four questions to {len(dpo.LOSSES)} losses", "title")
    columns = [16, 110, 215, 345, 450, 560]
    questions = list(axes("dpo"))
    for x, question in zip(columns, ["loss", *questions, "its pull over the lead"]):
        paper.text(x, 58, question, "soft")
    leads = torch.linspace(-FAR, FAR, 61)
    known = []                                  # an answer has one colour everywhere
    y = 84
    for name in dpo.LOSSES:
        paper.text(columns[0], y + 4, name, "")
        for x, answer in zip(columns[1:], axes(name).values()):
            if answer not in known:
                known.append(answer)
            paper.text(x, y + 4, answer, f"c{known.index(answer) % 6}")
        pull, _ = gradients(name, leads)                        # (61,)
        pull = pull / pull.abs().max()
        middle = 652
        paper.path([(middle - 92, y), (middle + 92, y)], "grid")
        paper.path([(middle, y - 13), (middle, y + 13)], "grid")  # where the lead is 0
        places = []
        for lead, force in zip(leads.tolist(), pull.tolist()):
            places.append((middle + 92 * lead / FAR, y - 12 * force))
        paper.path(places, "c0")
        y += 32
    paper.text(columns[5], y, f"lead -{FAR:g} to {FAR:g}, in 1/beta", "soft")
    return y + 20


# ---------------------------------------------------------------- all of it

def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=3, runs="dpo")
    runs = {name: {} for name in config.runs.split()}
    for name in runs:
        if name not in (*dpo.LOSSES, "kto", "ppo"):
            raise UserError(f"--runs {name}: choose some of {', '.join(dpo.LOSSES)}, kto, ppo")
    if config.scenario and config.scenario not in SCENARIOS:
        raise UserError(f"--scenario {config.scenario}: choose one of {', '.join(SCENARIOS)}")
    errors = exact_toy(config)
    table = ask_all(config)
    if config.scenario:
        runs = scenario(config)
    cards, log = {}, []
    if runs:
        need(config.init)
        cards, log = compare(runs, config)
    numbers = {"error": max(errors.values()), "axes": table, "cards": cards}
    for name in "chosen", "rejected":
        numbers[name] = exam.running_mean([row[name] for row in log])
    return {"numbers": numbers}


if __name__ == "__main__":
    figures.main("landscape", Config, train, picture, __doc__)
