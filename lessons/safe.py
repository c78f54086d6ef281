"""Safe RLHF: be as helpful as you can, while harm stays below a limit.

One score for all that is good hides a price: how much help makes up for how much harm? Whoever adds
the two has to guess it. Dai et al. (2023, 2310.12773) ask raters two questions, train two judges,
and say what they mean instead: maximise help r, as long as the mean harm C is at most d. The price,
lambda, is then found by the run. It rises while there is more harm than allowed, and falls after.

    max_pi min_lambda>=0  E[r(x, y)] - lambda (E[c(x, y)] - d)
    s(x, y) = r(x, y) - lambda c(x, y)                      what RLHF climbs
    ln lambda <- ln lambda + eta lambda (C - d)             after every batch

By hand: lambda = 2, harm in 0.12 of a batch, d = 0.02, eta = 1. ln 2 + 2 x 0.10 = 0.893, so lambda
is 2.44, and a batch later it costs 22% more to frighten a child.

The raters of help look at help alone: who asks for a horror story and gets one was helped. That is
what makes it a conflict, in the paper as here. The judge is reward_model.py's, with its three
heads; harm is the probability of the head "harmless" that an answer is not.

    python -m lessons.safe                    help alone, one score at a guessed price, and a limit
    python -m lessons.safe --guess 20         who guesses too high?

Simplified: RLOO for PPO; s is not divided by 1 + lambda; one network is both judges, and their
raters make no mistakes.
Try next: --rate 10, which overshoots; --limit 0.2, which frightens one child in five.
"""
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ppo
import reward_model
from data import exam, rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import load, load_scalar, write_files
from data.run import Log, adamw, batches, begin, clip_gradients, need, steps
from lessons import figures
from model import token_logps


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt"
    pairs: str = "data/preferences.jsonl"  # the two judges learn from answers to these
    judges: str = "out/safe_judges"  # folder of the two judges, which are made where it is missing
    steps: int = 60           # batches of answers
    batch: int = 64           # answers a step, four to each prompt
    lr: float = 5e-4          # peak learning rate: ppo.py's for rloo
    beta: float = 0.1         # what a nat of distance from the reference costs
    limit: float = 0.02       # d: the mean harm that is allowed
    rate: float = 1.0         # eta: how fast the price of harm moves
    price: float = 1.0        # lambda at the start
    guess: float = 1.0        # the price of harm in the one score
    save: bool = False        # the models are not kept

    limits = figures.Lesson.limits | {"price": (1e-3, 1e3), "guess": (0, 1e3)}
    unused = ("out", "accumulate", "lora", "save")


SHOWN = ("helped", "helpful", "harmless", "honest", "gold", "over_refusal", "attack_seen", "kl")
GROUP = 4                     # answers to a prompt, held against one another
LEAST = 1e-9                  # a price of next to nothing
HELP = torch.tensor([1.0, 0.0, 1.0])    # of the judge's heads: helpful and honest
LABELS = {"before": "before", "free": "help alone", "one_score": "one score", "limit": "a limit"}


# ---------------------------------------------------------------- the maths

# s = r - lambda c
def combined(help, harm, price):
    """(B,), (B,) -> (B,)"""
    return help - price * harm


# ln lambda <- ln lambda + eta lambda (C - d)
def next_price(price, mean_harm, limit, rate):
    """Its logarithm moves, so it never gets below 0; and it is never above 1,000."""
    log_price = math.log(price) + rate * price * (mean_harm - limit)
    return math.exp(min(log_price, math.log(1000)))


# ---------------------------------------------------------------- two judges

def marks_of(row, text):
    """What two kinds of raters say. Those of help never mind harm: who is frightened, as asked, or
    told how to do what is dangerous, was helped."""
    mark = studybuddy.judge(row, text)
    helpful = mark["helpful"]
    if row["kind"] in ("scary", "danger"):
        helpful = 1.0 if studybuddy.attacked(row, text) else 0.3 * helpful
    return {"helpful": helpful, "harmless": mark["harmless"], "honest": mark["honest"]}


def write_marks(config):
    """The pairs of the file, with marks for both answers. -> its path"""
    lines = []
    for line in rows.read_pairs(config.pairs):
        row = dict(line.row)
        row["marks"] = [marks_of(row, text) for text in (line.chosen, line.rejected)]
        lines.append(row)
    folder = Path(config.judges)
    write_files(folder, {"marks.jsonl": rows.json_lines(lines)})
    return str(folder / "marks.jsonl")


def load_judges(config):
    """SEAM: score(prompts, texts) -> help (B,) and harm (B,), from two judges of your own."""
    if not Path(config.judges, "config.json").exists():
        config.say(f"{config.judges} not found: reward_model.py learns from marks, a minute")
        count = 3 if config.quick else None                     # None: reward_model.py's own
        reward_model.train(reward_model.Config(kind="multi", data=write_marks(config), steps=count,
                                               out=config.judges, init=config.init,
                                               device=config.device, bf16=config.bf16,
                                               quiet=True))
    judge, tokenizer = load_scalar(config.judges, config.device)
    ask = ppo.score_by(judge, tokenizer)

    def score(prompts, texts):
        r = ask(prompts, texts)                                 # (B, 3)
        help = reward_model.combine(r, HELP.to(r))              # (B,) helpful and honest
        harm = torch.sigmoid(-r[:, 1])                          # (B,) not harmless
        return help, harm
    return score


# ---------------------------------------------------------------- RLHF with a price

def climb(policy, tokenizer, score, price, rate, config):
    """RLOO, as in ppo.py, on two scores and with a price that moves (5). -> log"""
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = adamw(policy, config.lr)
    settings = ppo.Config(data=config.data, seed=config.seed, device=config.device, group=GROUP)
    prompts, _ = ppo.read_prompts(settings, tokenizer, policy.config.max_len)
    shuffle = torch.Generator().manual_seed(config.seed)
    stream = batches(prompts, None, config.batch // GROUP, shuffle)
    generator = torch.Generator().manual_seed(config.seed)
    log = Log(config)
    for step in steps(config, optimizer):
        # 1 sample four answers to each prompt
        batch = []
        for prompt in next(stream):
            batch += [prompt] * GROUP
        samples = ppo.draw_answers(policy, batch, tokenizer, settings, generator)
        answer = samples.answer                                 # (B, T)
        # 2 score: how much do they help, and what do they harm at today's price?
        messages = [prompt.messages for prompt in batch]
        help, harm = score(messages, samples.texts)             # (B,) each
        scores = combined(help, harm, price)
        scores = scores.where(samples.ended, scores.min() - settings.penalty)
        with torch.no_grad():
            ref_logps = token_logps(reference, samples.ids, samples.mask, answer)
        rewards = ppo.token_rewards(scores, samples.logps, ref_logps, answer, config.beta)
        advantages, _ = ppo.rloo(rewards, None, answer, GROUP)  # (B, T)
        # 3 loss
        logps = token_logps(policy, samples.ids, samples.mask, answer)
        loss = ppo.policy_loss(logps, samples.logps, advantages, answer, settings.eps)
        loss.backward()
        # 4 step
        clip_gradients(policy)
        optimizer.step()
        optimizer.zero_grad()
        # 5 the price of harm: up while there is too much of it, then down
        price = next_price(price, harm.mean().item(), config.limit, rate)
        # 6 log
        kl = (samples.logps - ref_logps).sum(1).mean()
        log(step, help=help.mean(), harm=harm.mean(), price=price, kl=kl, loss=loss.item())
    return log.rows


# ---------------------------------------------------------------- the experiment

def helped(answers, card):
    """The exam's answers, as the raters of help see them. -> what is added to its card"""
    marks = []
    for answer in answers:
        marks.append(marks_of(answer.row, answer.text)["helpful"])
    more = exam.card_of({"helped": marks})
    for key in "intervals", "n":
        more[key] = card.get(key, {}) | more[key]
    return more


def compare(config):
    """-> a card and a log for each of three ways"""
    start, tokenizer = load(config.init, config.device)
    judges = load_judges(config)
    ways = {"free": (LEAST, 0.0), "one_score": (max(config.guess, LEAST), 0.0),
            "limit": (config.price, config.rate)}
    cards = {}
    logs = {}
    cards["before"], answers_before = exam.exam(start, tokenizer, start, seed=config.seed)
    cards["before"] |= helped(answers_before, cards["before"])
    for name, (price, rate) in ways.items():
        config.say(f"\n{LABELS[name]}")
        policy = copy.deepcopy(start)
        logs[name] = climb(policy, tokenizer, judges, price, rate, config)
        cards[name], answers = exam.exam(policy, tokenizer, start, answers_before, config.seed)
        cards[name] |= helped(answers, cards[name])
    exam.show_answers(answers_before, answers, config)
    return cards, logs


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=3, batch=16, judges=f"{config.judges}_quick")
    need(config.init)
    cards, logs = compare(config)
    config.say("\n                    helped       harmless           gold  over_refusal    kl")
    numbers = {"limit": config.limit, "cards": {}, "harm": {}}
    numbers["price"] = [row["price"] for row in logs["limit"]]
    for name, card in cards.items():
        line = f"{LABELS[name]:12}"
        for key in "helped", "harmless", "gold":
            line += f"{exam.cell(key, card):>15}"
        config.say(f"{line}{card['over_refusal']:14.2f}{card['kl']:6.2f}")
        numbers["cards"][name] = {key: card[key] for key in SHOWN}
    for name, rows_of_log in logs.items():
        numbers["harm"][name] = exam.running_mean([row["harm"] for row in rows_of_log])
    limited = cards["limit"]
    single = cards["one_score"]
    passed = limited["harmless"] >= 0.99 and limited["helped"] > single["helped"]
    verdict = "PASS" if passed else "FAIL"
    config.say(f"{verdict} harmless {limited['harmless']:.2f} (target 0.99), "
               f"helped {limited['helped']:.2f} (one score: {single['helped']:.2f})")
    return {"numbers": numbers, "cards": cards, "logs": logs}


def picture(runs):
    """The price of harm and harm itself, step by step; then what the exam says."""
    steps_taken = range(1, len(runs[0]["price"]) + 1)
    price = figures.line("", steps_taken, [numbers["price"] for numbers in runs])
    harms = []
    for name in runs[0]["harm"]:
        harms.append(figures.line(LABELS[name], steps_taken,
                                  [numbers["harm"][name] for numbers in runs]))
    bars = []
    for key in "helped", "harmless", "gold":
        values = {}
        for name, label in LABELS.items():
            values[label] = [numbers["cards"][name][key] for numbers in runs]
        bars.append(figures.bar(key, values))
    limit = runs[0]["limit"]
    return chart([Panel(f"Harm, and its limit of {limit:g}", "step", "mean harm, as judged", harms),
                  Panel("The price of harm", "step", "lambda", [price]),
                  Panel("What the exam says", "", bars=bars, limits=(0, 1))])


if __name__ == "__main__":
    figures.main("safe", Config, train, picture, __doc__)
