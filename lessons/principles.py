"""What does each principle buy? Leave one out and see what comes back; use one alone.

A constitution is a list of sentences, and what a sentence does is seen when it is gone. A model
answers attacks and ordinary prompts. Then it criticises and mends these answers as in cai.py: by
all principles, by all but one, by one alone. Our world knows which principles an answer breaks:

    bought(k) = share that breaks k, mended by all but k  -  share that breaks k, mended by all

By hand: of 100 answers 20 break "age". Mended by all, 1 does; by all but "age", 11 do. So "age"
bought 0.10. The other 0.09 were mended by the way: after most complaints the whole answer is
written anew, whatever they were about. A principle can cost, too (bad: gold is below 1/2):

    price(k) = share that is bad, mended by all  -  share that is bad, mended by all but k

"curious" may cost: its revision often keeps the text and adds "What do you think?", and in such a
text the other critics may see less. So the last table asks each critic about the flaws that are
there: how many does it see in the first answers, and how many in what one principle has mended?

    python -m lessons.principles                            out/sft, by data/constitution.json
    python -m lessons.principles --constitution mine.json   by yours; see data/constitution.json

Nothing is trained here. What is counted are the answers that SL-CAI would go on to learn.
Try next: --revisions 1, or another order: is the first principle the one that mends most?
"""
from dataclasses import dataclass, replace

import torch

import cai
from data import exam, rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import load
from data.exam import mean
from data.run import begin, need
from lessons import figures
from model import UserError


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/prompts.jsonl"  # JSON lines with "prompt", some of them with "attack"
    constitution: str = "data/constitution.json"  # a list of {"id", "principle"}
    answers: int = 190        # to attacks (the file has 194), and as many to other prompts
    order: str = "draw"       # of the principles: draw (by lot), or first (as in the file)
    revisions: int = 4        # rounds of critique and revision, at most
    temperature: float = 0.7  # of the first answers
    max_new: int = 48         # longest answer in tokens
    save: bool = False        # there is nothing to save

    limits = figures.Lesson.limits | {"answers": (1, 10**5), "revisions": (1, 100)}
    unused = ("out", "steps", "batch", "accumulate", "lr", "lora", "save")


def ways(ids):
    """Which principles are used? -> {name of the way: list of ids}"""
    lists = {"first answers": [], "all": list(ids)}
    for left_out in ids:
        lists[f"all but {left_out}"] = [id for id in ids if id != left_out]
    for id in ids:
        lists[f"{id} alone"] = [id]
    return lists


def first_answers(model, tokenizer, config, principles):
    """To attacks and to as many ordinary prompts -> [(prompt, [text])]"""
    red, plain = cai.read_prompts(config, tokenizer, model.config.max_len, principles)
    if not exam.knows([prompt.row for prompt in red + plain]):
        raise UserError(f"--data {config.data}: of prompts that are not of our world the truth is "
                        "not known; want data/prompts.jsonl")
    asked = red[:config.answers] + plain[:config.answers]
    generator = torch.Generator().manual_seed(config.seed)
    return cai.own_answers(model, tokenizer, asked, 1, config, generator)


def mended(model, tokenizer, answers, principles, config):
    """The same answers, criticised and mended by these principles alone. -> Drafts"""
    drafts = []
    for prompt, (text,) in answers:
        drafts.append(cai.Draft(prompt, first=text, text=text))
    if principles:
        generator = torch.Generator().manual_seed(config.seed)
        cai.improve(model, tokenizer, drafts, principles, config, generator)
    return drafts


def broken_shares(drafts, ids):
    """The truth about the answers: how many break each principle, how many are bad, and of those
    to attacks: how many grant the wish? -> {name: share}"""
    broken = []
    bad = []
    attack = []
    for draft in drafts:
        row = draft.prompt.row
        broken.append(studybuddy.broken(row, draft.text))
        bad.append(studybuddy.judge(row, draft.text)["gold"] < 0.5)
        if row.get("attack"):
            attack.append(studybuddy.attacked(row, draft.text))
    shares = {}
    for id in ids:
        shares[id] = mean([id in keys for keys in broken])
    return shares | {"bad": mean(bad), "attack": mean(attack)}


def seen_shares(model, tokenizer, drafts, wordings):
    """Of the answers that break a principle, in how many does its critic see a flaw?
    -> {id: share}, without those that no answer breaks"""
    shares = {}
    for id, wording in wordings.items():
        flawed = []
        for draft in drafts:
            if id in studybuddy.broken(draft.prompt.row, draft.text):
                flawed.append(draft)
        if flawed:
            complaints = cai.critique(model, tokenizer, flawed, [wording] * len(flawed))
            shares[id] = mean([not text.startswith(cai.NOTHING) for text in complaints])
    return shares


def line(name, shares):
    return f"{name[:18]:18}" + "".join(f"{share:8.2f}" for share in shares.values())


def seen_line(name, shares, ids):
    """- stands where no answer breaks the principle"""
    cells = [f"{shares[id]:.2f}" if id in shares else "-" for id in ids]
    return f"{name[:18]:18}" + "".join(f"{cell:>8}" for cell in cells)


def picture(runs):
    own = []
    bad = []
    for id in runs[0]["bought"]:
        own.append(group(runs, id, of=id))
        bad.append(group(runs, id, of="bad"))
    return chart([Panel("Answers that break this principle", "share", bars=own, limits=(0, 0.5)),
                  Panel("Answers that are bad", "share", bars=bad, limits=(0, 0.5))])


def group(runs, id, of):
    """One principle: a share before and after mending by all, all but it, and it alone."""
    bars = {"before": "first answers", "it alone": f"{id} alone", "all but it": f"all but {id}",
            "all": "all"}
    values = {}
    for name, way in bars.items():
        values[name] = [run["ways"][way][of] for run in runs]
    return figures.bar(id, values)


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, answers=3)
    need(config.init)
    entries = rows.read_constitution(config.constitution)
    wordings = {entry["id"]: entry["principle"] for entry in entries}
    ids = list(wordings)
    model, tokenizer = load(config.init, config.device)
    answers = first_answers(model, tokenizer, config, list(wordings.values()))
    config.say(f"{config.init} has given {len(answers)} answers, which it now mends\n")
    columns = "".join(f"{column:>8}" for column in [*ids, "bad", "attack"])
    config.say(f"{'share that breaks':18}" + columns)
    numbers = {}
    seen = {}
    for name, used in ways(ids).items():
        principles = [wordings[id] for id in used]
        drafts = mended(model, tokenizer, answers, principles, config)
        numbers[name] = broken_shares(drafts, ids)
        config.say(line(name, numbers[name]))
        if name == "first answers":
            seen[name] = seen_shares(model, tokenizer, drafts, wordings)
        if len(used) == 1:
            changed = [draft for draft in drafts if draft.flaws]
            seen[f"after {used[0]}"] = seen_shares(model, tokenizer, changed, wordings)
    bought = {}
    price = {}
    for id in ids:
        without = numbers[f"all but {id}"]
        bought[id] = without[id] - numbers["all"][id]
        price[id] = numbers["all"]["bad"] - without["bad"]
    config.say("\n" + line("bought", bought))
    config.say(line("price", price))
    config.say("\n" + f"{'flaws seen in':18}" + "".join(f"{id:>8}" for id in ids))
    for name, shares in seen.items():
        config.say(seen_line(name, shares, ids))
    return {"numbers": {"ways": numbers, "bought": bought, "price": price, "seen": seen}}


if __name__ == "__main__":
    figures.main("principles", Config, train, picture, __doc__)
