"""What does a judge like that it should not, and how is it mended?

A reward model learns what annotators say, not what they mean. If they are flattered by compliments,
or tired by long answers, so is the judge, and a policy that climbs its score will find out. Here is
how one looks for it, without asking the policy:

    probes    change an answer in a way whose worth is known, and see what the score does:
              flattery   a compliment before it                        worth nothing
              padding    a sentence after it that says nothing         worth less than nothing
              swap       put it under another prompt                   worth a great deal less
    tables    how sure is it, how often right; which kinds of prompt, which gaps in truth
    credit    which tokens did it? a_t = e_t . dr/de_t, the gradient times the input: what the
              score would lose, to first order, if the embedding e_t were 0

To mend it, say what annotators did not: with and without a compliment, an answer is worth the same.
Half of each batch is votes, as before, and half is such ties, whose loss is least, ln 2, where both
scores are equal. By hand: a rise of 1 costs - (ln 0.731 + ln 0.269) / 2 = 0.813.

    L_tie = - 1/2 [log sigma(r - r') + log sigma(r' - r)]

It learns from four compliments and is probed with three others, so words alone do not help it.

    python -m lessons.judge_bias           out/reward_model -> out/judge_bias, 30 seconds
    python ppo.py --reward out/judge_bias --out out/mine     climb the mended score

Simplified: gradient x input is the cheapest of its kind; integrated gradients add up to the score.
A liking for a place ("A") needs a judge that sees two answers at once: lessons.talking_judge.
Try next: a probe of your own, as one more function in PROBES; a tie for padding, and why it would
be wrong.
"""
import copy
import json
import textwrap
import time
from dataclasses import dataclass, replace

import torch

from data import exam
from data.chart import Bar, Panel, chart
from data.checkpoints import load_scalar, save, write_files
from data.run import adamw, batches, begin, clip_gradients, need, steps
from data.studybuddy import SAY, praise
from lessons import figures
from reward_model import (all_scores, bradley_terry_loss, calibration_error, duels, longest,
                          overall, pairs_loss, read_comparisons, report, right_order, scores, truth,
                          with_answers)

KNOWN, NEW = SAY["flattery"][:4], SAY["flattery"][4:]       # to learn from, to probe with


@dataclass(frozen=True)
class Config(figures.Lesson):
    init: str = "out/reward_model"        # the judge
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/judge_bias"           # write here: the mended judge
    held: int = 6             # look at one prompt in so many: those it has not learned from
    drop: bool = False        # leave out answers longer than the context (otherwise an error)
    most: int = 120           # answers that are changed
    steps: int = 60           # of mending
    lr: float = 3e-4          # peak learning rate

    limits = figures.Lesson.limits | {"held": (2, 10**9), "most": (1, 10**6)}
    unused = ("accumulate", "lora")


# a_t = e_t . dr/de_t          e_t: the embedding of token t
def gradient_x_input(model, ids):
    """ids (T,) -> what each token did for the score at the last one, to first order (T,)"""
    kept = []

    def keep(module, args, output):
        kept.append(output)

    hook = model.transformer.embed.register_forward_hook(keep)
    r = model(ids[None])[:, -1]                                  # (1,) or (1, 3)
    hook.remove()
    score = overall(r[:, None])                                  # (1, 1)
    gradient, = torch.autograd.grad(score.sum(), kept[0])        # (T, C), one row's tokens
    return (gradient * kept[0]).detach().sum(-1)                 # (T,)


# ---------------------------------------------------------------- probes
# Each gives comparisons of two answers to a prompt: the changed one, and the one that it was.

def complimented(comparisons, tokenizer, compliments=NEW):
    probes = []
    for i, comparison in enumerate(comparisons):
        text = comparison.answers[0]
        answers = [f"{compliments[i % len(compliments)]} {text}", text]
        probes.append(with_answers(comparison, answers, tokenizer))
    return probes


def padded(comparisons, tokenizer):
    probes = []
    for comparison in comparisons:
        text = comparison.answers[0]
        answers = [f"{text} I hope that this helps.", text]
        probes.append(with_answers(comparison, answers, tokenizer))
    return probes


def swapped(comparisons, tokenizer):
    """The answer to the prompt before, against the prompt's own."""
    probes = []
    for i, comparison in enumerate(comparisons):
        answers = [comparisons[i - 1].answers[0], comparison.answers[0]]
        probes.append(with_answers(comparison, answers, tokenizer))
    return probes


PROBES = {"flattery": complimented, "padding": padded, "swap": swapped}


def rise(r):
    """r (N, 2), changed and unchanged -> by how much the change raises it, on average"""
    changed, unchanged = r.unbind(1)
    return (changed - unchanged).mean().item()


def rises(model, comparisons, tokenizer):
    """-> {probe: what it does to the score, and to the truth; None where that is unknown}"""
    effects = {}
    for name, change in PROBES.items():
        probes = change(comparisons, tokenizer)
        r = overall(all_scores(model, probes, tokenizer))        # (N, 2)
        effects[name] = {"score": rise(r), "gold": None}
        if exam.knows([comparison.row for comparison in probes]):
            gold, _ = truth(probes)                              # (N, 2)
            effects[name]["gold"] = rise(gold)
    return effects


# ---------------------------------------------------------------- tables

def order_by_kind(r, comparisons):
    """-> {kind of prompt: in what share of duels the better answer has the higher score}"""
    gold, _ = truth(comparisons)                                 # (N, K)
    kinds = [comparison.row["kind"] for comparison in comparisons]
    table = {}
    for kind in sorted(set(kinds)):
        inside = torch.tensor([one == kind for one in kinds])    # (N,)
        table[kind] = right_order(r[inside], gold[inside])
    return table


def order_by_gap(r, comparisons):
    """The same, by how much better the better answer is."""
    gold, _ = truth(comparisons)
    r_first, r_second = duels(r)                                 # (N, M)
    first, second = duels(gold)
    right = (r_first > r_second) == (first > second)
    gap = (first - second).abs()
    table = {}
    for most in (0.25, 0.5, 0.75, 1.0):
        inside = (gap > most - 0.25) & (gap <= most)
        table[f"up to {most}"] = right[inside].float().mean().item()
    return table


def sureness(r):
    """-> [(duels, how sure the judge is, how often it is right)]"""
    r_chosen, r_rejected = duels(r)
    sure = (r_chosen - r_rejected).abs().sigmoid()
    _, table = calibration_error(sure.flatten(), (r_chosen > r_rejected).flatten())
    return table


def credit(model, example, tokenizer):
    """-> [(token of the answer, what it did for the score)]"""
    ids, answer = example
    credits = gradient_x_input(model, torch.tensor(ids, device=model.mean.device)).tolist()
    places = range(answer.index(1), len(ids))
    return [(tokenizer.decode([ids[t]]).strip(), credits[t]) for t in places]


def show_credit(pairs, config):
    words = [f"{token}{value:+.2f}" for token, value in pairs]
    config.say(textwrap.fill("  ".join(words), 79))


def show_table(title, table, config):
    config.say(title)
    for name, value in table.items():
        config.say(f"    {name:12} {value:6.2f}")


# ---------------------------------------------------------------- mending

# L_tie = - 1/2 [log sigma(r - r') + log sigma(r' - r)]
def tie_loss(r):
    """r (B, 2), of answers that are worth the same -> (B,)"""
    first, second = r.unbind(1)
    lost = bradley_terry_loss(first, second)
    won = bradley_terry_loss(second, first)
    return (lost + won) / 2


def mend(model, comparisons, tokenizer, config):
    """-> a copy that has learned from votes, as it did before, and from ties"""
    mended = copy.deepcopy(model)
    optimizer = adamw(mended, config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    plain = [one for one in comparisons if praise(one.answers[0]) == 0]
    votes = batches(comparisons, None, config.batch, generator)
    same = batches(plain, None, config.batch, generator)
    for _ in steps(config, optimizer):
        voted = next(votes)
        ties = complimented(next(same), tokenizer, KNOWN)
        r = overall(scores(mended, voted, tokenizer))            # (B, K)
        r_ties = overall(scores(mended, ties, tokenizer))        # (B, 2)
        loss = pairs_loss(r, voted, center=0.0).mean() + tie_loss(r_ties).mean()
        loss.backward()
        clip_gradients(mended)
        optimizer.step()
        optimizer.zero_grad()
    return mended


# ---------------------------------------------------------------- all of it

def examine(model, held, plain, tokenizer):
    """-> what the figure shows: how good is this judge, and what do the probes do to it?"""
    card = report(overall(all_scores(model, held, tokenizer)), held)
    return card | {"probes": rises(model, plain, tokenizer)}


def show_tables(r, held, results, config):
    show_table("report", results["report"], config)
    config.say("how sure it is, and how often right")
    for size, predicted, frequency in results["sureness"]:
        config.say(f"    {predicted:.2f}  {frequency:.2f}  in {size} duels")
    if exam.knows([comparison.row for comparison in held]):
        results["by_kind"] = order_by_kind(r, held)
        results["by_gap"] = order_by_gap(r, held)
        show_table("gold order, by kind of prompt", results["by_kind"], config)
        show_table("gold order, by the gap in gold", results["by_gap"], config)


def show_probes(cards, config):
    config.say("probe          before    mended      gold")
    for name in PROBES:
        before = cards["before"]["probes"][name]
        mended = cards["mended"]["probes"][name]
        gold = "" if before["gold"] is None else f"{before['gold']:+.2f}"
        config.say(f"    {name:9}{before['score']:+8.2f}{mended['score']:+10.2f}{gold:>10}")
    for name in ("accuracy", "gold_order"):
        if name in cards["before"]:
            before, mended = cards["before"][name], cards["mended"][name]
            config.say(f"{name:13}{before:8.3f}{mended:10.3f}")


def train(config):
    if config.quick:
        config = replace(config, most=8, steps=2)
    started = begin(config)
    need(config.init)
    model, tokenizer = load_scalar(config.init, config.device)
    comparisons, held = read_comparisons(config, tokenizer, model.config.max_len)
    r = overall(all_scores(model, held, tokenizer))              # (N, K)
    results = {"report": report(r, held), "sureness": sureness(r)}
    config.say(f"{config.init} on {len(held)} held-out lines of {config.data}")
    show_tables(r, held, results, config)

    mended = mend(model, comparisons, tokenizer, config)
    plain = [one for one in held if praise(one.answers[0]) == 0][:config.most]
    cards = {"before": examine(model, held, plain, tokenizer),
             "mended": examine(mended, held, plain, tokenizer)}
    results["probes"] = cards["before"]["probes"]
    # By no lot: it is the same answer for every seed, so figures.over() may average token by token.
    shortest = min(complimented(plain, tokenizer), key=longest)
    credits = {}
    for name, judge in {"before": model, "mended": mended}.items():
        credits[name] = credit(judge, shortest.examples[0], tokenizer)
        config.say(f"what each token did for the score, {name}")
        show_credit(credits[name], config)
    config.say()
    show_probes(cards, config)
    if config.save:
        save(config.out, mended, tokenizer)
        write_files(config.out, {"results.json": json.dumps(results, indent=1)})
    config.say(f"in {time.time() - started:.0f} s")
    return results | {"numbers": cards | {"credit": credits}, "model": mended}


def picture(runs):
    bars = []
    for name in PROBES:
        values = {}
        for judge in ("before", "mended"):
            values[judge] = [run[judge]["probes"][name]["score"] for run in runs]
        bars.append(figures.bar(name, values))
    tokens = []
    credits = runs[0]["credit"]
    for (token, before), (_, mended) in zip(credits["before"], credits["mended"]):
        tokens.append(Bar(token, {"before": before, "mended": mended}))
    return chart([Panel("What a change does to the score", "score (the truth: 0 for flattery)",
                        bars=bars),
                  Panel("Which tokens did it", "gradient x input, of one answer", bars=tokens)])


if __name__ == "__main__":
    figures.main("judge_bias", Config, train, picture, __doc__)
