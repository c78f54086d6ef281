"""Every figure of the course: how a program makes one, and whether the pages still tell the truth.

    python -m lessons.figures                all of them again: each program with --seeds 0 1 2
    python -m lessons.figures judge_bias     this one alone
    python -m lessons.figures --check        which numbers on the pages are no longer true?
    python -m lessons.figures --fill         put the numbers of the results in their place
    python -m lessons.figures --course       all that the nine pages tell you to run, in their order

A program ends in one call, and main() below does the rest:

    def train(config):
        ...
        return {"numbers": {"order": 0.78, "by_n": [0.6, 0.7, 0.8]}, ...}

    def picture(runs):                       # one dict of numbers for each seed
        curve = figures.line("order", [1, 2, 4], [run["by_n"] for run in runs])
        return chart([Panel("More pairs", "pairs", "gold order", [curve])])

    if __name__ == "__main__":
        figures.main("judge_bias", Config, train, picture, __doc__)

One run leaves its figure in out/lessons/figures. With --seeds 0 1 2, and no other flag, the figure
and the numbers are those of the page: lessons/figures/judge_bias.svg and
lessons/results/judge_bias.json. Only the program's own randomness differs between seeds; the
checkpoints that it starts from are the same. Of three seeds a page says the mean, from the lowest
to the highest. A program with several figures, or with a table over its runs, loops over
seeds_of(config) itself and ends in publish().

A number on a page carries its source in a comment that no reader sees:

    the order is 0.78<!-- judge_bias.order -->, from 0.77<!-- judge_bias.order:low --> to
    0.79<!-- judge_bias.order:high -->; with four times the pairs 80%<!-- judge_bias.by_n.2 -->

[?] in place of a number is one that nobody has put in yet.
"""
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data.chart import Bar, Line
from data.checkpoints import write_files
from data.run import Settings, exit_codes, parse
from model import UserError

HERE = Path(__file__).parent
# a number as a page writes it, or [?]; then the comment: program.path, and maybe :low or :high
NUMBER = r"(\[\?\]|[+-]?\d[\d,]*(?:\.\d+)?)(%?)"
SOURCE = r"<!-- *(\w+)\.(.+?)(?::(low|high))? *-->"
CLAIM = re.compile(NUMBER + SOURCE)


@dataclass(frozen=True)
class Lesson(Settings):
    """What every program of the course can be told, besides what all scripts can."""
    seeds: str = ""           # one run for each, as in --seeds 0 1 2: this makes the page's figure
    quick: bool = False       # little of everything, to see that it runs

    def __post_init__(self):
        super().__post_init__()
        seeds_of(self)            # complains where they are no numbers


# ---------------------------------------------------------------- a program's end

def main(name, Config, train, picture, doc):
    """Runs train once, or once for each of --seeds, and writes the figure and its numbers.
    -> the runs' numbers"""
    with exit_codes():
        config = parse(Config, doc, seeds_in_one(sys.argv[1:]))
        started = time.time()
        runs = []
        for seed in seeds_of(config):
            runs.append(train(config_of_run(config, seed))["numbers"])
        results = {"command": f"python -m lessons.{name} --seeds {config.seeds or config.seed}",
                   "seconds": round(time.time() - started), "mean": over(runs, mean),
                   "low": over(runs, min), "high": over(runs, max), "runs": runs}
        if config != Config(seeds=config.seeds):    # other settings make another figure
            config = replace(config, seeds="")
        publish(name, {name: picture(runs)}, results, config)
        return runs


def seeds_in_one(arguments):
    """["--seeds", "0", "1", "2"] -> ["--seeds", "0 1 2"], as a flag takes one text"""
    together = []
    after_seeds = False
    for argument in arguments:
        is_number = argument.isdigit()
        if after_seeds and is_number and together[-1] != "--seeds":
            together[-1] += " " + argument
        else:
            together.append(argument)
            after_seeds = argument == "--seeds" or after_seeds and is_number
    return together


def config_of_run(config, seed):
    """The settings of one run. Of several, each has a folder of its own."""
    if not config.seeds:
        return config
    config.say(f"\nseed {seed}")
    out = config.out and f"{config.out}/seed{seed}"
    return replace(config, seed=seed, seeds="", out=out)


def names_of(folders):
    """What a figure and its numbers call each of some folders: out/sft is sft. Of a/sft and b/sft
    both would be, so these two keep their whole path."""
    last = [Path(folder).name for folder in folders]
    names = {}
    for folder, name in zip(folders, last):
        names[folder] = name if last.count(name) == 1 else folder
    return names


def publish(name, figures, results, config):
    """figures: {title: SVG}. With --seeds those that the pages show, in lessons/figures and
    lessons/results; else those of this run alone, in out/lessons."""
    folder = HERE if config.seeds else Path("out/lessons")
    for title, svg in figures.items():
        write_files(folder / "figures", {f"{title}.svg": svg})
        config.say(f"as a picture: {os.path.relpath(folder)}/figures/{title}.svg")
    write_files(folder / "results", {f"{name}.json": json.dumps(results, indent=1) + "\n"})


def seeds_of(config):
    """The seeds of all runs: those of --seeds, or the one of --seed."""
    seeds = config.seeds.split() or [str(config.seed)]
    if not all(seed.isdigit() for seed in seeds):
        raise UserError(f"--seeds {config.seeds}: want whole numbers, as in --seeds 0 1 2")
    return [int(seed) for seed in seeds]


def mean(values):
    return sum(values) / len(values)


def over(runs, fold):
    """Numbers in dicts, lists and tuples, the same in every run -> the same dicts and lists of one
    run, in which each number is the fold (mean, min, max) of all. A text is that of the first run,
    and so is a list that is longer in one run than in another: what stands at the same place need
    not be the same thing (the bins of lessons.guard that nothing falls into are left out)."""
    first = runs[0]
    if isinstance(first, dict):
        folded = {}
        for key in first:
            folded[key] = over([run[key] for run in runs if key in run], fold)
        return folded
    if isinstance(first, (list, tuple)):
        if len({len(run) for run in runs}) > 1:
            return first
        folded = []
        for values in zip(*runs):
            folded.append(over(values, fold))
        return folded
    if isinstance(first, (int, float)):
        return fold([run for run in runs if run is not None])
    return first


# ---------------------------------------------------------------- several seeds in a picture

def spread(values):
    """Over seeds: mean, least and most."""
    return mean(values), min(values), max(values)


def line(name, xs, curves):
    """One curve for each seed -> their mean, and a band from the lowest to the highest."""
    lows, means, highs = [], [], []
    for values in zip(*curves):
        middle, low, high = spread(values)
        lows.append(low)
        means.append(middle)
        highs.append(high)
    return Line(name, list(xs), means, lows, highs)


def bar(name, values):
    """values: {"before": one number for each seed, "after": ...} -> their means, and how far the
    farthest seed is from it"""
    means, halves = {}, {}
    for label, numbers in values.items():
        means[label] = mean(numbers)
        halves[label] = max(abs(number - means[label]) for number in numbers)
    return Bar(name, means, halves)


# ---------------------------------------------------------------- what the pages say

def pages():
    return [HERE.parent / "README.md", *sorted(HERE.glob("*.md"))]


def result(name, path, bound):
    """The number behind a claim: from NAME.json, its mean, low or high, then key by key."""
    value = json.loads((HERE / "results" / f"{name}.json").read_text())
    return float(reach(value.get(bound or "mean", value), path))


def reach(value, path):
    """by_n.2 -> value["by_n"][2]; a key may have dots in it, too"""
    if path == "":
        return value
    if isinstance(value, list):
        place, _, rest = path.partition(".")
        return reach(value[int(place)], rest)
    for key in value:
        if path == key or path.startswith(key + "."):
            return reach(value[key], path[len(key) + 1:])
    raise KeyError(path)


def as_written(number, like, percent):
    """A number with as many digits as the page gives it; in place of [?] with two."""
    decimals = 0 if percent else 2
    if like != "[?]":
        decimals = len(like.partition(".")[2])
    text = f"{100 * number if percent else number:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return "+" + text if like.startswith("+") and number > 0 else text


def checked(text):
    """-> the text with true numbers in it, and what was wrong: a list of (line, complaint)"""
    wrong = []

    def mend(match):
        like, percent, name, path, bound = match.groups()
        place = text.count("\n", 0, match.start()) + 1
        source = f"{name}.{path}" + (f":{bound}" if bound else "")
        try:
            true = as_written(result(name, path, bound), like, percent)
        except (OSError, KeyError, IndexError, ValueError, TypeError):
            wrong.append((place, f"{source}: lessons/results/{name}.json has no such number"))
            return match.group()
        if true == like:
            return match.group()
        wrong.append((place, f"{source} is {true}{percent}, the page says {like}{percent}"))
        return match.group().replace(like, true, 1)

    return CLAIM.sub(mend, text), wrong


def check(fill):
    """Every complaint about every page, on a line; with fill they are mended. -> how many"""
    count, claims = 0, 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        mended, wrong = checked(text)
        for place, complaint in wrong:
            print(f"{page.relative_to(HERE.parent)}:{place}: {complaint}")
        if fill and mended != text:
            write_files(page.parent, {page.name: mended})
        count += len(wrong)
        claims += len(CLAIM.findall(text))
    print(f"{claims} numbers on the pages, {count} of them " + ("mended" if fill else "stale"))
    return count


ENDING = re.compile(r"^ +(figures\.main|(figures\.)?publish)\(", re.M)


def programs():
    """All that have a figure: they end in figures.main(), or call publish()."""
    names = []
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        is_program = path.stem != "figures" and not path.stem.startswith("test_")
        if is_program and ENDING.search(text):
            names.append(path.stem)
    return names


# a line of a page's code: the program, its flags; behind two spaces what it does
COMMAND = re.compile(r"^(?:    )?python -m lessons\.(\S+(?: \S+)*)", re.M)


def course():
    """The commands of the pages, one after the other: ["debate", "--teach", "200"]. (A page in the
    browser waits for somebody who votes: it is left out.)"""
    commands = []
    for page in sorted(HERE.glob("[1-9]_*.md")):
        for command in COMMAND.findall(page.read_text(encoding="utf-8")):
            if command != "annotate":
                commands.append(shlex.split(command))
    return commands


def run(name, *flags):
    started = time.time()
    print("\n" + shlex.join(["python", "-m", f"lessons.{name}", *flags]), flush=True)
    program = [sys.executable, "-m", f"lessons.{name}", *flags]
    if subprocess.run(program, cwd=HERE.parent).returncode != 0:
        raise UserError(f"lessons.{name} failed")
    print(f"{name}: {(time.time() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    with exit_codes():
        wanted = sys.argv[1:]
        if wanted == ["--check"]:
            sys.exit(1 if check(fill=False) else 0)
        elif wanted == ["--fill"]:
            check(fill=True)
        elif wanted == ["--course"]:
            for command in course():
                run(*command)
        elif any(name not in programs() for name in wanted):
            raise UserError(f"want --check, --fill, --course, or of: {', '.join(programs())}")
        else:
            for name in wanted or programs():
                run(name, "--seeds", "0 1 2")
