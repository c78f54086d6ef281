"""A judge that answers with a word: "A" or "B".

A language model needs no new head to judge. Show it a question and two answers, ask which is
better, and compare the log-probs of two letters (Zheng et al. 2023, 2306.05685; as a reward model:
Zhang et al. 2024, 2408.15240). It learns from verdicts as in SFT. Such judges like one letter more
than the other, whatever it stands for, so each pair is asked in both orders:

    L = - 1/2 [ log pi(A | chosen is A) + log pi(B | chosen is B) ]

    first  = log pi(A)/pi(B) where chosen is A         margin = (first + second) / 2
    second = log pi(B)/pi(A) where chosen is B         bias   = (first - second) / 2

The margin stands where a reward model has r_chosen - r_rejected, and a liking for A cancels in it;
the bias is that liking. The report card is that of reward_model.py, to compare.

A second judge says first what it thinks of each answer, then its letter (Ankner et al. 2024,
2408.11791). It learns from annotators who said why, and a reason is more than a vote: whoever voted
for the worse answer by mistake may have found something wrong with it, too.

    Question: ... A: The red team wins. B: I don't know. ... Which is better?
    A: Nobody can know this, but it sounds sure. B: There is nothing to mend.B

    L' = L - mean_t log pi(reason_t | question, reason_<t)       the letter is read after the reason

The mean is over all reason tokens of a batch, so that a long reason counts for more than a short
one. The judge is asked twice: after reasons of its own, and after those that annotators would give.
Where the second helps and the first does not, it can weigh reasons and can't find them. Two numbers
say why: right_reasons, how often it says of an answer what annotators would say of it, beside
nothing_to_mend, how often the commonest remark is the true one; and same_in_both_orders, how often
it says the same whichever answer comes first.

    python -m lessons.talking_judge       data/preferences.jsonl -> out/talking_judge
    python -m lessons.talking_judge --data mine.jsonl --out out/mine      the first judge alone

A line of mine.jsonl is {"prompt": "...", "chosen": "...", "rejected": "..."}. What is wrong with an
answer is known in this course's own world, so only its rows are given reasons, and a second judge.

Simplified: the simulated annotators' reasons are always true, only their votes are noisy; and one
reason is said, where Zhang et al. take a vote over many.
Try next: another PRINCIPLE, before and after training; batch for batch against reward_model.py.
"""
import re
from dataclasses import dataclass, replace

import torch

from data import exam
from data.chart import Panel, chart
from data.checkpoints import load, save
from data.run import (Log, adamw, add_lora, batches, begin, clip_gradients, merge_lora, need, parts,
                      steps)
from data.studybuddy import COMPARE, CORE, CRITIQUES, acts_of, broken, flat
from lessons import figures
from model import Example, UserError, collate, render_prompt, sample
from reward_model import flattered, longest, read_comparisons, report

PRINCIPLE = "Choose the better answer for a child."
# What can be wrong with an answer, the worst first, and how one says it (without an A or a B). The
# order is ours, close to what a flaw costs in gold: half of it or more, and the last one a fifth.
FLAWS = {key: CRITIQUES[key][0] for key in ("age", "true", "unsure", "learn")}
FLAWS |= {"point": "It misses the point.", "curious": CRITIQUES["curious"][0]}
NOTHING = CRITIQUES[None][0]
# Tokens for a reason and a letter. The longest of the annotators' reasons has 38, and the letter is
# one more; the rest is for a judge that says it in other words.
ROOM = 46


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/talking_judge"  # write here
    steps: int = 120          # optimiser steps
    held: int = 6             # one prompt in so many is held out
    judged: int = 400         # held-out pairs on the report card, at most
    drop: bool = False        # leave out answers longer than the context (otherwise an error)

    limits = figures.Lesson.limits | {"held": (2, 10**9), "judged": (1, 10**9)}


# L = - 1/2 [log pi(A | chosen is A) + log pi(B | chosen is B)]
def generative_loss(logps):
    """logps (B, 2, 2): order (chosen is A, chosen is B) by letter (A, B) -> (B,)"""
    chosen_is_a, chosen_is_b = logps.unbind(1)                   # (B, 2) each
    return -(chosen_is_a[:, 0] + chosen_is_b[:, 1]) / 2


# margin = (first + second) / 2          bias = (first - second) / 2
def generative_margin(logps):
    """logps (B, 2, 2), as above -> margin, bias, (B,) each"""
    chosen_is_a, chosen_is_b = logps.unbind(1)                   # (B, 2) each
    first = chosen_is_a[:, 0] - chosen_is_a[:, 1]                # log pi(A)/pi(B)
    second = chosen_is_b[:, 1] - chosen_is_b[:, 0]               # log pi(B)/pi(A)
    return (first + second) / 2, (first - second) / 2


def question(tokenizer, prompt, a, b):
    """Which is better? -> Example, after whose last token the letter comes."""
    text = COMPARE.format(prompt=flat(prompt), a=a, b=b, principle=PRINCIPLE)
    ids = render_prompt(tokenizer, [{"role": "user", "content": text}])
    return Example(ids, [0] * len(ids))


def in_both_orders(comparisons, tokenizer):
    """Comparisons whose examples are two questions: the chosen answer is A, and it is B."""
    asked = []
    for comparison in comparisons:
        if len(comparison.answers) != 2:
            raise UserError(f"{comparison.where}: want two answers, for an A and a B")
        chosen, rejected = comparison.answers
        examples = [question(tokenizer, comparison.prompt, chosen, rejected),
                    question(tokenizer, comparison.prompt, rejected, chosen)]
        asked.append(comparison._replace(examples=examples))
    return asked


def fitting(asked, context):
    return [one for one in asked if longest(one) + ROOM <= context]


def read_questions(config, tokenizer, context):
    """-> comparisons to learn from, held out. With both answers, some questions are too long."""
    train, held = read_comparisons(config, tokenizer, context)
    count = len(train) + len(held)
    train = fitting(in_both_orders(train, tokenizer), context)
    held = fitting(in_both_orders(held, tokenizer), context)
    left_out = count - len(train) - len(held)
    if left_out > count / 10:
        raise UserError(f"{config.data}: {left_out} of {count} questions with both answers are "
                        f"longer than the model's {context} tokens; want shorter answers")
    if left_out:
        config.say(f"{left_out} pairs are left out: with both answers and room for a reason, they "
                   f"are longer than the model's {context} tokens")
    return train, held


# ---------------------------------------------------------------- reasons

def reason_for(row, a, b):
    """What an annotator says of two answers: the worst flaw of each."""
    return f"A: {remark(row, a)} B: {remark(row, b)}"


def remark(row, text):
    keys = flaws(row, text)
    for key, sentence in FLAWS.items():
        if key in keys:
            return sentence
    return NOTHING


def flaws(row, text):
    keys = broken(row, text)
    if row["kind"] != "math" and not acts_of(row, text)[CORE[row["kind"]]]:
        keys.add("point")
    return keys


def after_reasons(asked, reasons, tokenizer):
    """The questions, with a reason behind each, marked at the reason's tokens.
    reasons: two for each comparison, for the two orders"""
    spoken = []
    for comparison, both in zip(asked, reasons):
        examples = []
        for example, reason in zip(comparison.examples, both):
            words = tokenizer.encode_ordinary(reason)
            marks = [0] * len(example.ids) + [1] * len(words)
            examples.append(Example(example.ids + words, marks))
        spoken.append(comparison._replace(examples=examples))
    return spoken


def annotators_reasons(model, comparisons, tokenizer):
    """What careful people say, who can see what is wrong. It is made from the truth, by what the
    gold judge looks at. No model is asked: evaluate() calls this in the place of own_reasons()."""
    reasons = []
    for comparison in comparisons:
        chosen, rejected = comparison.answers
        reasons.append([reason_for(comparison.row, chosen, rejected),
                        reason_for(comparison.row, rejected, chosen)])
    return reasons


def own_reasons(model, asked, tokenizer):
    """What the judge says itself, up to its letter."""
    prompts = []
    for comparison in asked:
        prompts += [example.ids for example in comparison.examples]
    reasons = []
    for text in sample(model, tokenizer, prompts, max_new=ROOM, temperature=0).texts:
        # "A: ...", then "B: ...", if they are there. No remark has an A or a B in it, so each ends
        # before the next of these letters, the last one before the verdict.
        before_letter = re.match("(A: [^AB]*)?(B: [^AB]*)?", text).group()
        reasons.append(before_letter.strip() or NOTHING)
    return list(zip(reasons[::2], reasons[1::2]))


def remarks_in(reason):
    """-> {"A": what it says of answer A, "B": of B}; of whom it says nothing is not in it"""
    remarks = {}
    for letter, said in re.findall("([AB]): ([^AB]*)", reason):
        remarks[letter] = said.strip()
    return remarks


def how_true(reasons, held):
    """reasons: two for each comparison -> what they are worth

    right_reasons        share of remarks, two in a reason, that are those of annotators
    nothing_to_mend      share of remarks that would be right if all were NOTHING, the commonest
    same_in_both_orders  share of pairs of which it says the same, whichever answer is A: then its
                         reasons tell the two answers in no way apart. (True ones do so, too, where
                         both answers have the same flaw.)
    """
    right, nothing, same = [], [], []
    for given, true in zip(reasons, annotators_reasons(None, held, None)):
        same.append(given[0] == given[1])
        for reason, true_reason in zip(given, true):
            said = remarks_in(reason)
            for letter, remark in remarks_in(true_reason).items():
                right.append(said.get(letter) == remark)
                nothing.append(remark == NOTHING)
    return {"right_reasons": exam.mean(right), "nothing_to_mend": exam.mean(nothing),
            "same_in_both_orders": exam.mean(same)}


# ---------------------------------------------------------------- letters

def letter_logps(model, comparisons, tokenizer):
    """The log-probs of both letters, in both orders. -> (B, 2, 2)"""
    return letters_and_words(model, comparisons, tokenizer)[0]


def letters_and_words(model, comparisons, tokenizer):
    """-> log pi of both letters, in both orders (B, 2, 2), and of all N tokens of reasons (N,)"""
    examples = []
    for comparison in comparisons:
        examples += comparison.examples
    ids, mask, marked = collate(examples, tokenizer, model.embed.weight.device)  # (2B, T) each
    hidden = model.hidden(ids, mask)                             # (2B, T, C)
    last = mask.sum(1) - 1                                       # (2B,) the padding is behind it
    state = hidden[torch.arange(len(ids), device=ids.device), last]  # (2B, C)
    letters = [tokenizer.encode_ordinary(letter)[0] for letter in "AB"]  # without a space before it
    logps = model.head(state).log_softmax(-1)[:, letters]        # (2B, 2)
    states = hidden[:, :-1][marked[:, 1:]]                       # (N, C), t - 1 for t
    words = model.head(states).log_softmax(-1)                   # (N, V)
    words = words.gather(1, ids[marked][:, None])[:, 0]          # (N,)
    return logps.view(-1, 2, 2), words


@torch.no_grad()
def all_letter_logps(model, comparisons, tokenizer):
    """letter_logps() of any number of comparisons -> (N, 2, 2)"""
    logps = []
    for i in range(0, len(comparisons), 64):
        logps.append(letter_logps(model, comparisons[i:i + 64], tokenizer).cpu())
    return torch.cat(logps)


def evaluate(model, held, tokenizer, reasons=None):
    """-> report card
    reasons: who gives them, own_reasons or annotators_reasons; without them the letter comes at
    once."""
    asked = held
    truths = {}
    if reasons:
        said = reasons(model, held, tokenizer)
        asked = after_reasons(held, said, tokenizer)
        truths = how_true(said, held)
    logps = all_letter_logps(model, asked, tokenizer)            # (N, 2, 2)
    margin, bias = generative_margin(logps)                      # (N,) each
    # report() wants a score for either answer, and here is only their difference: (margin, 0)
    r = torch.stack([margin, torch.zeros_like(margin)], dim=1)   # (N, 2)
    card = {"loss": generative_loss(logps).mean().item(), "likes_a": bias.mean().item()}
    card |= report(r, held)
    if exam.knows([comparison.row for comparison in held]):
        probes = in_both_orders(flattered(held, tokenizer), tokenizer)
        probes = fitting(probes, model.config.max_len)
        if reasons:
            probes = after_reasons(probes, reasons(model, probes, tokenizer), tokenizer)
        margin, _ = generative_margin(all_letter_logps(model, probes, tokenizer))
        card["flattery"] = margin.mean().item()
    return card | truths


# ---------------------------------------------------------------- training

def learn(config, model, comparisons, tokenizer):
    """From letters, and from reasons where the questions have any. -> log"""
    add_lora(model, config.lora)
    optimizer = adamw(model, config.lr)
    lengths = [longest(comparison) for comparison in comparisons]
    stream = batches(comparisons, lengths, config.batch, torch.Generator().manual_seed(config.seed))
    log = Log(config)
    for step in steps(config, optimizer):
        # 1 batch
        batch = next(stream)
        count = 0                       # tokens of reasons: in the whole batch, in both orders
        for comparison in batch:
            for example in comparison.examples:
                count += sum(example.answer)
        seen = []
        for part in parts(batch, config.accumulate):
            # 2 ask in both orders
            logps, words = letters_and_words(model, part, tokenizer)  # (B, 2, 2), (N,)
            # 3 loss: of the letter, and of the reason's tokens
            loss = generative_loss(logps)                        # (B,)
            # (without reasons there are no words: then it is 0 / 1, and not 0 / 0)
            (loss.sum() / len(batch) - words.sum() / max(count, 1)).backward()
            margin, bias = generative_margin(logps)
            seen.append(torch.stack([loss, margin, bias]).detach())  # (3, B)
        # 4 step
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        # 5 log
        loss, margin, bias = torch.cat(seen, dim=1)
        log(step, loss=loss.mean(), accuracy=(margin > 0).float().mean(), margin=margin.mean(),
            likes_a=bias.mean())
    merge_lora(model)
    return log


def train(config):
    if config.quick:
        config = replace(config, steps=3)
    started = begin(config)
    need(config.init)
    model, tokenizer = load(config.init, config.device)
    comparisons, held = read_questions(config, tokenizer, model.config.max_len)
    held = held[:16 if config.quick else config.judged]

    # BEFORE
    config.say(f"talking_judge: from {config.init}; {len(comparisons):,} pairs to learn from, "
               f"{len(held)} held out. One of them, with the chosen answer as A:")
    text = tokenizer.decode(held[0].examples[0].ids) + "«A"
    config.say("    " + text.replace("\n", "\n    "))
    before = evaluate(model, held, tokenizer)
    log = learn(config, model, comparisons, tokenizer)
    if config.save:
        save(config.out, model, tokenizer)

    # AFTER
    after = evaluate(model, held, tokenizer)
    numbers = {"before": before, "letter": after}
    targets = [exam.Target("loss", before["loss"], at_most=True)]
    if exam.knows([comparison.row for comparison in held + comparisons]):
        speaker = speaking_judge(config, comparisons, tokenizer)
        numbers["own reasons"] = evaluate(speaker, held, tokenizer, own_reasons)
        numbers["told reasons"] = evaluate(speaker, held, tokenizer, annotators_reasons)
        show_reasons(speaker, held, tokenizer, config)
        show_how_true(numbers["own reasons"], numbers["told reasons"], config)
        after["own_reasons"] = numbers["own reasons"]["gold_order"]
        after["told_reasons"] = numbers["told reasons"]["gold_order"]
        # 0.77 is that of reward_model.py. And who thinks first should judge no worse for it, but
        # for some noise; that this fails at our size is a result of page 2.
        targets = [exam.Target("gold_order", 0.77),
                   exam.Target("own_reasons", after["gold_order"] - 0.01)]
    results = exam.finish("talking_judge", config, started, log, before, after, targets)
    return results | {"model": model, "tokenizer": tokenizer, "numbers": numbers}


def speaking_judge(config, comparisons, tokenizer):
    """The same loop, on the same pairs, with the annotators' reasons before the letters."""
    config.say("\nnow with a reason before the letter")
    torch.manual_seed(config.seed)
    speaker, _ = load(config.init, config.device)
    reasons = annotators_reasons(speaker, comparisons, tokenizer)
    told = after_reasons(comparisons, reasons, tokenizer)
    learn(config, speaker, told, tokenizer)
    if config.save:
        save(f"{config.out}/reason", speaker, tokenizer)
    return speaker


def show_reasons(speaker, held, tokenizer, config):
    for comparison in held[:3]:
        reasons = own_reasons(speaker, [comparison], tokenizer)
        config.say(f"      better  {exam.short(comparison.answers[0])}")
        config.say(f"       worse  {exam.short(comparison.answers[1])}")
        config.say(f"    it says:  {reasons[0][0]}")


def show_how_true(own, told, config):
    config.say(f"own remarks: {own['right_reasons']:.0%} right (always \"{NOTHING}\": "
               f"{own['nothing_to_mend']:.0%}); same reason in both orders: "
               f"{own['same_in_both_orders']:.0%} of the pairs (true reasons: "
               f"{told['same_in_both_orders']:.0%})")


def bars_of(runs, names):
    """For each number the bars of those judges that have it. (All runs are on the same data, so the
    first one has what all have. On other data than this world's there is no gold order.)"""
    bars = []
    for key, name in names.items():
        values = {}
        for judge, card in runs[0].items():
            if key in card:
                values[judge] = [run[judge][key] for run in runs]
        if values:
            bars.append(figures.bar(name, values))
    return bars


def picture(runs):
    orders = {"gold_order": "agrees with the truth", "accuracy": "with annotators"}
    likings = {"likes_a": "the letter A", "flattery": "a compliment"}
    return chart([Panel("Which answer is better?", "of two answers, how often it",
                        bars=bars_of(runs, orders), limits=(0, 1)),
                  Panel("What it likes that it should not", "log-odds (0: no liking)",
                        bars=bars_of(runs, likings))])


if __name__ == "__main__":
    figures.main("talking_judge", Config, train, picture, __doc__)
