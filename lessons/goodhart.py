"""Goodhart's law: a score that is climbed no longer means what it meant.

A reward model knows which answers annotators preferred, among answers that nobody had tuned to
please it. A policy that climbs its score leaves these behind and finds others: those that the
reward model overrates. So the score rises on, and the truth turns. How far the policy went is the
KL from where it began (Gao et al. 2023, 2210.10760). Three cures, none of which knows the truth:

    a price    beta, what a nat of distance costs (ppo.py's leash)
    doubt      three judges, each from another seed; the least of their scores counts (Coste et al.
               2023, 2310.02743): where they disagree, somebody has been fooled
    an alarm   stop when the answers look strange, in one of four ways:

    kl         to choose the best of n answers takes log n - (n - 1)/n nats (Stiennon et al. 2020,
               2009.01325): beyond n = 100 these are answers that the reference hardly ever gives
    length     half as long again as at the start is another kind of answer
    repeated   in more answers than luck explains, three words in a row come twice
    openings   the five commonest beginnings begin more answers than luck explains

By hand: the best of 100 takes log 100 - 0.99 = 3.62 nats. A tenth of the run is 8 steps of 64 / 4 =
16 prompts, 128 together, so a share moves by luck, one deviation, by 0.5 / sqrt(128) = 0.044 at
most. An alarm wants five of them, 0.22. (Gold here is of answers to these prompts at temperature 1,
and not the exam's.)

    python -m lessons.goodhart      six runs, eight minutes of a busy core: five prices, and
                                    three judges at beta 0; one minute more, the first time,
                                    to make two of the judges
    python -m lessons.goodhart --betas "0.1 0" --judges 1      the leash of ppo.py, and none

The picture has judge and truth in it: `liked` is how often the judge would prefer an answer to an
average one of the start, sigma(score - score at the start), and gold is a mark. Even a perfect
judge's curve would not lie on gold's; what counts is that one goes up where the other goes down. In
the run with doubt `score` is the least of three judges', and `liked` is the first one's.

Simplified: RLOO in place of PPO, as it is faster and falls for the same things (--algorithm ppo).
Try next: --steps 160; --lr 5e-4; --reward with another reward model, whose weak spots are others.
"""
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ppo
import reward_model
from data import exam
from data.chart import Line, Panel, chart
from data.checkpoints import load
from data.run import begin, need
from lessons import figures
from lessons.best_of import kl_bound
from model import UserError


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt", of our world
    steps: int = 80           # batches of answers, for each beta
    batch: int = 64           # answers a step
    lr: float = 1e-3          # peak learning rate: twice ppo.py's, to see sooner what comes
    algorithm: str = "rloo"   # or reinforce, or ppo
    reward: str = "out/reward_model"  # the proxy
    betas: str = "0.3 0.1 0.03 0.01 0"  # prices of a nat of distance, one run each
    judges: int = 3           # of the run with doubt (1: no such run)
    quick: bool = False       # as --steps 10 --betas "0.1 0" --judges 1, to see that it runs
    save: bool = False        # the models are not kept

    unused = ("out", "save")


SHARED = ("init", "data", "reward", "steps", "batch", "accumulate", "lr", "lora", "seed", "device",
          "bf16", "algorithm")
# three runs, by name
FREE = "beta 0"                         # no leash
PRICE = f"beta {ppo.Config.beta:g}"     # ppo.py's leash
DOUBT = "doubt"                         # no leash, but three judges


# ---------------------------------------------------------------- what needs no truth

def signals(texts):
    """A policy with a trick repeats it, within an answer and from one to the next. -> shares"""
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


def alarms(now, start, n):
    """Signals now, and at the start, of answers to n prompts -> names of those that are too high.
    The start is 512 prompts with one answer each; a tenth of a run of rloo has fewer prompts, with
    four answers each, which begin alike more often. So `openings` rings a little early."""
    luck = 5 * 0.5 / math.sqrt(n)
    most = {"kl": kl_bound(100), "length": 1.5 * start["length"],
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
    settings = {}
    for name in SHARED:
        settings[name] = getattr(config, name)
    return ppo.Config(**settings, beta=beta, save=False, quiet=True)


def load_judges(config, count):
    """The reward model, and others that learned the same pairs from another seed. -> scores of
    texts, one function for each"""
    _, tokenizer = load(config.init)
    folders = [config.reward]
    for seed in range(1, count):
        folder = f"{config.reward}_{seed}"
        if not Path(folder, "config.json").exists():
            config.say(f"{folder} not found: reward_model.py from seed {seed} makes it first")
            reward_model.train(reward_model.Config(init=config.init, seed=seed, out=folder,
                                                   device=config.device, bf16=config.bf16,
                                                   quiet=True))
        folders.append(folder)
    judges = []
    for folder in folders:
        settings = replace(settings_of(config, beta=0.0), reward=folder)
        judges.append(ppo.score_by(ppo.load_reward_model(settings, tokenizer), tokenizer))
    return judges


def start_of(config, count, judge):
    """What the reference answers, before anything is climbed: its signals, score and gold"""
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
    score = judge([prompt.messages for prompt in asked], samples.texts).mean().item()
    gold = ppo.gold_of(asked, samples)
    return {"length": length, "score": score, "gold": gold} | signals(samples.texts)


def climb(config, beta, judges):
    """A run of ppo.py whose score is the least of the judges', with ears in it. -> its log, the
    texts of each step, and what the first judge said of them"""
    all_texts = []
    all_scores = []

    def score(prompts, texts):
        scores = torch.stack([judge(prompts, texts) for judge in judges])   # (judges, B)
        all_texts.append(texts)
        all_scores.append(scores[0].tolist())
        return scores.amin(0)
    log = ppo.train(settings_of(config, beta), score)["log"]
    return log, all_texts[1:-1], all_scores[1:-1]       # the first and the last are the exam's


def add_liked(table, scores, start):
    """liked = mean sigma(score - score at the start), for each tenth of a run"""
    size = max(1, len(scores) // 10)
    for i, now in enumerate(table):
        step_scores = torch.tensor(scores[i * size:(i + 1) * size])     # (size, B)
        now["liked"] = torch.sigmoid(step_scores - start["score"]).mean().item()


def run(config):
    """One seed -> what the start was, and a table for each run"""
    judges = load_judges(config, config.judges)
    start = start_of(config, 512, judges[0])
    config.say("at the start: score {score:.2f}, gold {gold:.2f}, length {length:.2f}, "
               "repeated {repeated:.2f},\nopenings {openings:.2f}".format(**start))
    prompts = config.batch // ppo.ALGORITHMS[config.algorithm].group
    runs = {}
    for beta in map(float, config.betas.split()):
        runs[f"beta {beta:g}"] = (beta, judges[:1])
    if len(judges) > 1:
        runs[DOUBT] = (0.0, judges)
    tables = {}
    for name, (beta, its_judges) in runs.items():
        log, texts, scores = climb(config, beta, its_judges)
        tables[name] = tenths(log, texts, start, prompts)
        add_liked(tables[name], scores, start)
        config.say(f"\n{name}")
        show_run(tables[name], config)
        show_best(texts[-1], scores[-1], config)
    return start, tables


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


# ---------------------------------------------------------------- what the cures save

def ends_of(tables):
    """The tenth in which each way ends: with no cure, and with each of them."""
    free = tables[FREE]
    ends = {"none": free[-1]}
    if PRICE in tables:
        ends["price"] = tables[PRICE][-1]
    if DOUBT in tables:
        ends["doubt"] = tables[DOUBT][-1]
    ends["alarm"] = first_alarm(free) or free[-1]
    return ends


def show_cures(tables, config):
    """How far gold ends below the free run's peak (minus: above it). A cure should save half of
    what is lost with none, if that is more than noise. -> lost, by name"""
    peak = turning_point(tables[FREE])["peak"]
    lost = {}
    config.say("\ncure             kl     liked      gold  below the free run's peak")
    for name, end in ends_of(tables).items():
        lost[name] = peak - end["gold"]
        line = f"{name:9}"
        for key in "kl", "liked", "gold":
            line += f"{end[key]:10.2f}"
        line += f"{lost[name]:10.2f}"
        if lost["none"] > 0.05 and lost[name] <= lost["none"] / 2:
            line += "  halved"
        config.say(line)
    if lost["none"] <= 0.05:
        config.say("nothing is lost with no cure, so there is nothing to save")
    if first_alarm(tables[FREE]) is None:
        config.say("no alarm rang: `alarm` is the end of the free run, as `none` is")
    return lost


# ---------------------------------------------------------------- the picture

def brief(now):
    """What the picture needs of a tenth."""
    return {key: now[key] for key in ("step", "kl", "score", "liked", "gold")}


def path_of(numbers, name, key):
    """A run of one seed from its start on -> KLs, values of `key`"""
    kls = [0.0]
    values = [numbers["start"][key]]
    for now in numbers["runs"][name]:
        kls.append(max(now["kl"], 0.0))
        values.append(now[key])
    return kls, values


def over_seeds(runs, name, key):
    """A Line: over the mean KL, the mean, the lowest and the highest of `key`"""
    paths = [path_of(numbers, name, key) for numbers in runs]
    all_kls = [kls for kls, values in paths]
    all_values = [values for kls, values in paths]
    mean_kls = figures.line(name, all_kls[0], all_kls).ys
    # as far as it has gone by then: small steps at the end lead a little back
    farthest = list(itertools.accumulate(mean_kls, max))
    return figures.line(name, farthest, all_values)


def picture(runs):
    """What the judge says of a policy that climbs, what is true, and where each cure would have
    ended. The curves have different units: what to see is where they part."""
    name = FREE if FREE in runs[0]["runs"] else list(runs[0]["runs"])[-1]
    liked = over_seeds(runs, name, "liked")
    gold = over_seeds(runs, name, "gold")
    lines = [gold._replace(name="the truth"), liked._replace(name="the judge"), gap(liked, gold)]
    for other in runs[0]["runs"]:
        if other not in (name, DOUBT):
            ends = [numbers["runs"][other][-1] for numbers in runs]
            lines.append(dot(other, ends))
    for cure, label in {"doubt": "three judges", "alarm": "an alarm rings"}.items():
        if cure in runs[0]["ends"]:
            lines.append(dot(label, [numbers["ends"][cure] for numbers in runs]))
    title = "The score climbs. The truth turns."
    x = "how far the policy has gone: KL in nats an answer (root scale)"
    y = "the judge: how often it likes an answer better than one of the start; the truth: gold"
    return chart([Panel(title, x, y, lines, scale="root", limits=(0, 1))], height=430)


def gap(liked, gold):
    """A shade from the point on where the judge's curve stays above the truth's. It shows that they
    part, not by how much: one is a chance, the other a mark."""
    first = 0
    for i in range(len(gold.xs)):
        if liked.ys[i] < gold.ys[i]:
            first = i + 1
    nothing = [math.nan] * len(gold.xs[first:])                 # a shade without a line in it
    return Line("the judge", gold.xs[first:], nothing, gold.ys[first:], liked.ys[first:],
                faint=True)


def dot(label, ends):
    """Where a way ends, in the mean over seeds."""
    kl = max(figures.mean([end["kl"] for end in ends]), 0.0)
    return figures.line(label, [kl], [[end["gold"]] for end in ends])


# ---------------------------------------------------------------- all of it

def train(config):
    begin(config)
    if config.quick:
        config = replace(config, steps=10, betas="0.1 0", judges=1)
    need(config.init)
    need(config.reward)
    start, tables = run(config)
    numbers = {"start": start | {"liked": 0.5}, "runs": {}, "ends": {}}
    for name, table in tables.items():
        numbers["runs"][name] = [brief(now) for now in table]
    if FREE in tables:
        turn = turning_point(tables[FREE])
        numbers |= {"peak": turn["peak"], "end": turn["last"], "rise": turn["rise"]}
        numbers["lost"] = show_cures(tables, config)
        for name, end in ends_of(tables).items():
            numbers["ends"][name] = brief(end)
    return {"numbers": numbers}


if __name__ == "__main__":
    figures.main("goodhart", Config, train, picture, __doc__)
