"""What does a judge like that it should not?

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

    python -m lessons.judge_bias                        looks at out/reward_model
    python -m lessons.judge_bias --init out/reward_multi

Simplified: gradient x input is the cheapest of its kind; integrated gradients add up to the score.
Try next: a probe of your own as one more function in PROBES; a judge trained with --center 0.01.
"""
import json
import textwrap
import time
from dataclasses import dataclass, replace

import torch

from data import exam
from data.checkpoints import load_scalar, write_files
from data.studybuddy import praise
from data.run import Settings, begin, main, need
from reward_model import (all_scores, calibration_error, duels, flattered, overall,
                          read_comparisons, report, right_order, truth, with_answers)


@dataclass(frozen=True)
class Config(Settings):
    init: str = "out/reward_model"        # the judge
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/judge_bias"           # write here
    held: int = 6             # look at one prompt in so many: those it has not learned from
    drop: bool = False        # leave out answers longer than the context (otherwise an error)
    most: int = 120           # answers that are changed
    shown: int = 2            # answers whose tokens are shown
    quick: bool = False       # few of all, to see that it runs

    limits = Settings.limits | {"held": (2, 10**9), "most": (1, 10**6)}


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
    gradient, = torch.autograd.grad(score.sum(), kept[0])        # (1, T, C)
    return (gradient * kept[0]).detach().sum(-1)[0]              # (T,)


# ---------------------------------------------------------------- probes
# Each gives comparisons of two answers to a prompt: the changed one, and the one that it was.

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


PROBES = {"flattery": flattered, "padding": padded, "swap": swapped}


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


def show_credit(model, comparison, tokenizer, config):
    """An answer, each of its tokens with what it did for the score."""
    ids, answer = comparison.examples[0]
    credit = gradient_x_input(model, torch.tensor(ids, device=model.mean.device)).tolist()
    words = []
    for t in range(answer.index(1), len(ids)):
        words.append(f"{tokenizer.decode([ids[t]]).strip()}{credit[t]:+.2f}")
    config.say(textwrap.fill("  ".join(words), 79))


def show_table(title, table, config):
    config.say(title)
    for name, value in table.items():
        config.say(f"    {name:12} {value:6.2f}")


def train(config):
    """Nothing is trained here: the name is that of all programs."""
    if config.quick:
        config = replace(config, most=8, shown=1)
    started = begin(config)
    need(config.init, "python reward_model.py", 60)
    model, tokenizer = load_scalar(config.init, config.device)
    _, held = read_comparisons(config, tokenizer, model.config.max_len)
    r = overall(all_scores(model, held, tokenizer))              # (N, K)
    results = {"report": report(r, held), "sureness": sureness(r)}

    config.say(f"{config.init} on {len(held)} held-out lines of {config.data}")
    show_table("report", results["report"], config)
    config.say("how sure it is, and how often right")
    for size, predicted, frequency in results["sureness"]:
        config.say(f"    {predicted:.2f}  {frequency:.2f}  in {size} duels")
    if exam.knows([comparison.row for comparison in held]):
        results["by_kind"] = order_by_kind(r, held)
        results["by_gap"] = order_by_gap(r, held)
        show_table("gold order, by kind of prompt", results["by_kind"], config)
        show_table("gold order, by the gap in gold", results["by_gap"], config)
    config.say("what each token did for the score")
    for comparison in held[:config.shown]:
        show_credit(model, comparison, tokenizer, config)
    plain = [comparison for comparison in held if praise(comparison.answers[0]) == 0]
    results["probes"] = rises(model, plain[:config.most], tokenizer)
    config.say(f"probe           score    gold   of {len(plain[:config.most])} answers")
    for name, effect in results["probes"].items():
        gold = "" if effect["gold"] is None else f"{effect['gold']:+.2f}"
        config.say(f"    {name:9} {effect['score']:+7.2f} {gold:>7}")
    if config.save:
        write_files(config.out, {"results.json": json.dumps(results, indent=1)})
    config.say(f"in {time.time() - started:.0f} s")
    return results


if __name__ == "__main__":
    main(Config, train, __doc__)
