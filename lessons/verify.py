"""Can a model tell when it is wrong? Three ways to ask it, and what each costs in tokens.

What a model knows it says again if asked again; what it makes up comes out differently each time.
So agreement finds what is made up, and needs no truth (Manakul et al. 2023, 2303.08896). It is no
lie detector: who lies knows better, and can say the same lie each time. A claim c that stands in
the likeliest answer is also looked for in K sampled ones, y_1 .. y_K:

    agreement(c) = 1/K sum_k [c stands in y_k]

How good a detector is says its AUC: a true claim and a false one are drawn, and the AUC is how
often the true one agrees more (ties count half). 0.5 is a coin. By hand: true claims at 0.9 and
0.6, false ones at 0.6 and 0.1. Of the four pairs three are in order and one is a tie: 3.5 / 4.

    agreement   claims on which fewer than half of the samples agree are dropped
    claims      the answer is taken apart, and of each claim the model is asked "Is it true that
                ..?". It sees the claim alone
    chain       of each claim it is asked the question to which it is the answer, without the
                draft; what comes out otherwise is dropped (chain of verification: Dhuliawala et
                al. 2023, 2309.11495)

    python -m lessons.verify                       out/sft, facts and sums, some seconds
    python -m lessons.verify --init out/grpo       does a model that shows its work know better?

Dropping is cheap: who says nothing claims nothing false. So the table also counts the true claims
that are lost. Simplified: claims are found by the forms in which this world states things. Real
systems ask a model to take the answer apart, and ask "which" rather than "whether".
Try next: --samples 2; --keep 0.9.
"""
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch

from data import abilities
from data.chart import Line, Panel, chart
from data.checkpoints import load
from data.rows import to_messages
from data.run import begin, need
from data.studybuddy import FACTS, RESULT, ask, statement_pattern
from lessons import figures
from model import UserError, render_prompt, sample


@dataclass(frozen=True)
class Config(figures.Lesson):
    questions: int = 150      # facts and sums, half of each
    samples: int = 8          # K: answers besides the likeliest
    temperature: float = 1.0  # of the sampling
    keep: float = 0.5         # least agreement of a claim that is kept
    max_new: int = 72         # longest answer in tokens
    save: bool = False        # there is nothing to save

    limits = figures.Lesson.limits | {"questions": (4, 10_000), "samples": (1, 1000),
                                      "temperature": (0.01, 100), "keep": (0, 1)}
    unused = ("data", "out", "steps", "batch", "accumulate", "lr", "lora", "save")


# ---------------------------------------------------------------- the maths

# AUC = P(s_true > s_false) + P(s_true = s_false) / 2
def auc(scores, truths):
    """How well do scores tell what is true? nan where all is true, or nothing."""
    scores = torch.tensor(scores)                               # (N,)
    truths = torch.tensor(truths)                               # (N,)
    gap = scores[truths][:, None] - scores[~truths]             # (true, false)
    higher = (gap > 0).float()
    equal = (gap == 0).float()
    return (higher + equal / 2).mean().item()


def surest(scores, truths, share):
    """Of this share of the claims, those on which most agree: how many are true?"""
    order = torch.tensor(scores).argsort(descending=True, stable=True)  # (N,)
    best = order[:max(1, round(share * len(order)))]
    return torch.tensor(truths)[best].float().mean().item()


# ---------------------------------------------------------------- claims

class Claim(NamedTuple):
    text: str           # "The capital of Peru is Lima.", whatever the wording was
    question: str       # to which it is the answer
    true: bool          # for the tables, never to decide
    answer: int = 0     # which answer it stands in


def fact_claims(text):
    """Statements of facts, in all their wordings."""
    claims = []
    for fact in FACTS.values():
        for statement in fact.statements:
            for match in statement_pattern(statement, fact.table).regex.finditer(text):
                x = match["x"]
                y = match["y"]
                unit = fact.table[x].split()[-1]                # of "8 legs"; elsewhere unused
                claims.append(Claim(fact.statements[0].format(x=x, y=y),
                                    fact.questions[0].format(x=x, u=unit),
                                    y == fact.table[x]))
    return claims


def sum_claims(row, text):
    """What an answer to a sum of two numbers concludes."""
    a, b = row["slots"]["numbers"]
    claims = []
    for result in RESULT.findall(text):
        claim = f"{a} + {b} = {result}."
        true = int(result) == a + b
        claims.append(Claim(claim, f"What is {a} + {b}?", true))
    return claims


def claims_in(row, text):
    """An answer taken apart. -> {text: Claim}"""
    text = " ".join(text.split())
    claims = sum_claims(row, text) if row["kind"] == "math" else fact_claims(text)
    return {claim.text: claim for claim in claims}


def is_it_true(claim):
    """ "Is it true that the capital of Peru is Lima?" """
    return abilities.CLAIM[0].format(claim=abilities.in_a_sentence(claim.text))


# ---------------------------------------------------------------- three checks
# rows: the questions, in the order of their answers. -> a score for each claim, 1 where it is
# surely true, and the tokens that this took

def say(model, tokenizer, prompts, config, **settings):
    """-> texts, and how many tokens they took"""
    ids = [render_prompt(tokenizer, to_messages(prompt)) for prompt in prompts]
    drawn = sample(model, tokenizer, ids, max_new=config.max_new, **settings)
    return drawn.texts, drawn.answer.sum().item()


def prompts_of(rows):
    return [row["prompt"] for row in rows]


# agreement(c) = 1/K sum_k [c stands in y_k]
def agreement(model, tokenizer, rows, claims, config):
    K = config.samples
    generator = torch.Generator().manual_seed(config.seed)
    texts, tokens = say(model, tokenizer, prompts_of(rows), config, n=K,
                        temperature=config.temperature, generator=generator)
    scores = []
    for claim in claims:
        agree = 0
        for text in texts[claim.answer * K:(claim.answer + 1) * K]:
            agree += claim.text in claims_in(rows[claim.answer], text)
        scores.append(agree / K)
    return scores, tokens


def ask_whether(model, tokenizer, rows, claims, config):
    """Is it true that ..?"""
    prompts = [is_it_true(claim) for claim in claims]
    texts, tokens = say(model, tokenizer, prompts, config, temperature=0)
    return [float(text.endswith("So yes.")) for text in texts], tokens


def ask_again(model, tokenizer, rows, claims, config):
    """The question to which the claim is the answer, without the draft."""
    prompts = [claim.question for claim in claims]
    texts, tokens = say(model, tokenizer, prompts, config, temperature=0)
    scores = []
    for claim, text in zip(claims, texts):
        scores.append(float(claim.text in claims_in(rows[claim.answer], text)))
    return scores, tokens


CHECKS = {"agreement": agreement, "claims": ask_whether, "chain": ask_again}


def what_is_left(claims, scores, keep, count):
    """Claims below `keep` are dropped -> the shares of all answers that still claim something
    false, and something true"""
    false = set()
    true = set()
    for claim, score in zip(claims, scores):
        if score < keep:
            continue
        if claim.true:
            true.add(claim.answer)
        else:
            false.add(claim.answer)
    return {"false": len(false) / count, "true": len(true) / count}


# ---------------------------------------------------------------- the comparison

SHARES = [0.2, 0.4, 0.6, 0.8, 1.0]


def picture(runs):
    curves = [figures.line("", SHARES, [run["surest"] for run in runs])]
    points = []
    for name in runs[0]["ways"]:
        x = round(figures.mean([run["ways"][name]["tokens"] for run in runs]))
        y, low, high = figures.spread([run["ways"][name]["false"] for run in runs])
        points.append(Line(name, [x], [y], [low], [high]))
    return chart([Panel("What is made up does not agree", "share of the claims, most agreed first",
                        "how many of them are true", curves),
                  Panel("What a check costs, and what it finds", "tokens a question (log scale)",
                        "answers with a false claim", points, scale="log")])


def read_questions(config):
    """Facts and sums of two numbers, from the exam's half of the world."""
    rng = Random(config.seed)
    rows = []
    for i in range(config.questions):
        kind = "fact" if i % 2 == 0 else "math"
        rows.append(ask(rng, kind, "exam", terms=2))
    return rows


def train(config):
    begin(config)
    if config.quick:
        config = replace(config, questions=12, samples=2)
    need(config.init)
    model, tokenizer = load(config.init, config.device)
    rows = read_questions(config)
    drafts, spent = say(model, tokenizer, prompts_of(rows), config, temperature=0)
    claims = []
    for i, draft in enumerate(drafts):
        for claim in claims_in(rows[i], draft).values():
            claims.append(claim._replace(answer=i))
    if not claims:
        raise UserError(f"{config.init}: none of its {len(rows)} answers claims anything")
    truths = [claim.true for claim in claims]
    count = len(rows)
    config.say(f"verify: {config.init} claims {len(claims)} things in {count} answers")

    scores = {"draft": [1.0] * len(claims)}
    tokens = {"draft": spent}
    for name, check in CHECKS.items():
        scores[name], cost = check(model, tokenizer, rows, claims, config)
        tokens[name] = spent + cost
    for i, claim in enumerate(claims[:6]):
        line = f"  {claim.text:32}{str(claim.true):5}"
        for name in CHECKS:
            line += f"  {name} {scores[name][i]:.2f}"
        config.say(line)

    config.say(f"\n{'':12}{'AUC':>8}{'false claims':>16}{'true ones':>12}{'tokens':>10}")
    ways = {}
    for name in scores:
        way = what_is_left(claims, scores[name], config.keep, count)
        way["auc"] = auc(scores[name], truths)
        way["tokens"] = tokens[name] / count
        ways[name] = way
        config.say(f"{name:12}{way['auc']:8.2f}{way['false']:16.2f}{way['true']:12.2f}"
                   f"{way['tokens']:10.0f}")
    curve = [surest(scores["agreement"], truths, share) for share in SHARES]
    return {"numbers": {"ways": ways, "surest": curve}}


if __name__ == "__main__":
    figures.main("verify", Config, train, picture, __doc__)
