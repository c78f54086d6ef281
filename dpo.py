"""Direct preference optimisation (DPO): alignment from pairs of answers, without a reward model.

Of two answers to a prompt x, y_w won and y_l lost. RLHF fits a reward to many such verdicts and maximises it
on a leash to a frozen reference pi_ref. The best policy on that leash is known in closed form, so a policy
tells its reward: r(x, y) = beta log pi(y|x)/pi_ref(y|x), up to a term in x alone. Put that into the verdicts'
likelihood, and two stages become one loss (Rafailov et al. 2023, 2305.18290, equation 7):

    L = - log sigma( beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ] )

By hand: pi gives y_w 0.03 where pi_ref gives 0.02, and y_l 0.15 where it gives 0.12. The log-ratios are 0.405
and 0.223, their difference 0.182; at beta 0.1 the loss is 0.684, below ln 2 = 0.693, where each run starts.

    python dpo.py                   out/sft -> out/dpo on data/preferences.jsonl, 43 s: gold 0.66 -> 0.78
    python dpo.py --loss kto        another loss: the table LOSSES is a map of the family, not a ladder
    python dpo.py --rounds 3        thrice: answer twice, out/reward_model judges, learn; --online: every step
    python dpo.py --data data/style.jsonl --steps 30 --lr 2e-4 --out out/style    style; --flip: the other
    python dpo.py --init SmolLM2-135M --data mine.jsonl --lr 5e-6 --device cuda --out out/mine

Simplified: one short run; the reference stays what we started from, in --rounds too (iterative DPO and SPPO
move it). Try next: --beta 0.01 and 1, and compare kl; your own loss as one more line of LOSSES.
"""
import copy, time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from data import studybuddy
from model import (END, PAD, PROCESSES, RANK, Log, UserError, add_lora, average, clip, load, load_scalar,
                   main, merge_lora, need, optimizer, pad, portion, read_jsonl, render, sample, save,
                   schedule, special, split_pair, to_messages, token_logps, write_results)

@dataclass(frozen=True)
class Config:
    loss: str = "dpo"         # one of the table LOSSES
    init: str = "out/sft"     # start from this model folder; it is the reference, too
    data: str = "data/preferences.jsonl"  # JSON lines: pairs of answers, or single ones with a label
    out: str = "out/dpo"      # write here
    steps: int = 110          # optimiser steps
    batch: int = 32           # rows a batch: pairs, or single answers for kto
    accumulate: int = 1       # batches a step
    lr: float = 0.0           # peak learning rate (0: see LOSSES)
    lora: int = 0             # train adapters of this rank instead of the weights; wants a higher lr
    beta: float = 0.0         # strength of the leash to the reference (0: see LOSSES)
    noise: float = 0.1        # cdpo, robust: the share e of labels thought to be wrong
    gamma: float = 0.5        # simpo: the margin that the winner's reward should have
    odds: float = 60.0        # orpo: weight lambda of the odds ratio
    aversion: float = 1.0     # kto: weight of bad answers over good ones, lambda_U / lambda_D
    flip: bool = False        # prefer the rejected answers
    drop: bool = False        # leave out rows longer than the context (without it they are an error)
    rounds: int = 0           # learn from own answers, generated and judged in this many rounds
    online: bool = False      # the same with a round for every step
    judge: str = "out/reward_model"  # who judges them: a reward model, or gold for the world's truth
    max_new: int = 72         # longest sampled answer in tokens
    seed: int = 0             # same seed, same machine: same numbers
    device: str = "cpu"       # cpu, cuda or mps
    save: bool = True         # write the checkpoint and the results
    quiet: bool = False       # print nothing

# ---------------------------------------------------------------- the maths
# w and l are what a loss sees of winners and losers, (B,) each -> (B,). With a reference they are log-ratios
# log pi(y|x) - log pi_ref(y|x), summed over the tokens of y; without one, mean log-probs log pi(y|x) / |y|.

# L = -log sigma(beta (w - l))                                Rafailov et al. 2023 (2305.18290), eq. 7
def dpo(w, l, beta):
    return -F.logsigmoid(beta * (w - l))
# L = (1 - e) dpo(w, l) + e dpo(l, w)                         Mitchell 2023, a note on DPO with noisy labels
def cdpo(w, l, beta, noise):
    """Conservative: a share e of labels is wrong, so stop at the margin where sigma(beta (w - l)) = 1 - e."""
    return (1 - noise) * dpo(w, l, beta) + noise * dpo(l, w, beta)
# L = [(1 - e) dpo(w, l) - e dpo(l, w)] / (1 - 2 e)           Chowdhury et al. 2024 (2403.00409)
def robust(w, l, beta, noise):
    """Unbiased: its mean over labels flipped with probability e is the loss on the true labels."""
    return ((1 - noise) * dpo(w, l, beta) - noise * dpo(l, w, beta)) / (1 - 2 * noise)
# L = (w - l - 1 / (2 beta))^2                                Azar et al. 2023 (2310.12036), eq. 17
def ipo(w, l, beta):
    """A margin to reach and not to exceed, where DPO has no end. Sums, as in the paper; TRL averages w and l
    over the tokens of the answer, so that its beta has another scale."""
    return (w - l - 1 / (2 * beta)) ** 2
# L = max(0, 1 - beta (w - l))                                SLiC: Zhao et al. 2023 (2305.10425); the form
def slic(w, l, beta):                                       # with a reference: Liu et al. 2023 (2309.06657)
    return F.relu(1 - beta * (w - l))
# L = 1 - sigma(beta w) + sigma(beta l)                       D'Oosterlinck et al. 2024 (2408.06266), eq. 7
def apo_zero(w, l, beta):       # winners up, losers down, each by itself: for winners better than the model
    return 1 - torch.sigmoid(beta * w) + torch.sigmoid(beta * l)
# L = sigma(beta w) + 1 - sigma(beta (w - l))                 the same, eq. 8
def apo_down(w, l, beta):       # both down, losers more: for a model better than the winners
    return torch.sigmoid(beta * w) + 1 - torch.sigmoid(beta * (w - l))
# L = (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2             SPPO, Wu et al. 2024 (2405.00675), eq. 4.7, with
def sppo(w, l, beta):                                     # eta = 1 / beta, P = 1 for winners and 0 for losers
    return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
# L = -log sigma(beta (w - l) - gamma)                        Meng et al. 2024 (2405.14734), eq. 6
def simpo(w, l, beta, gamma):
    """The reward is the mean log-prob, which sampling follows: no reference, and no bias to length."""
    return -F.logsigmoid(beta * (w - l) - gamma)
# L = -w - lambda log sigma(log odds(w) - log odds(l))        Hong et al. 2024 (2403.07691), eqs. 4, 6, 7
def orpo(w, l, odds):                                       # odds(w) = e^w / (1 - e^w)
    """SFT on the winner, and odds against the loser. A certain answer (w = 0) would have infinite odds, so
    they end 1e-6 nats below that, at a million to one."""
    log_odds = [p - torch.log(-torch.expm1(p)) for p in (w.clamp(max=-1e-6), l.clamp(max=-1e-6))]
    return -w - odds * F.logsigmoid(log_odds[0] - log_odds[1])
# L = 1 - sigma(beta (r - z)) if y is good, else lambda [1 - sigma(beta (z - r))]
# z = max(0, mean_i log pi(y_j|x_i)/pi_ref(y_j|x_i)), j != i  Ethayarajh et al. 2024 (2402.01306), eq. 8
def kto(r, mismatched, good, beta, aversion):
    """For single answers, good or bad; r are their log-ratios. z is the point of reference: KL(pi || pi_ref),
    estimated on answers to other prompts and not trained, or a batch could win by moving it."""
    z = mismatched.mean().clamp(min=0).detach()
    return torch.where(good, 1 - torch.sigmoid(beta * (r - z)), aversion * torch.sigmoid(beta * (r - z)))

# A loss, the numbers of Config it uses, defaults for this world, and its place on the four axes of the map:
# pairs or single judgements; with a reference or without; in its paper, on the policy's own answers or on
# fixed data; with a reward model or without. --online and --rounds move each of them along the last two.
Method = namedtuple("Method", "loss uses beta lr pairs reference online reward_model")
LOSSES = {  #                     uses                  beta lr    pairs  refer. online reward model
    "dpo":      Method(dpo,      ("beta",),            0.5, 5e-4, True,  True,  False, False),
    "cdpo":     Method(cdpo,     ("beta", "noise"),    0.5, 5e-4, True,  True,  False, False),
    "robust":   Method(robust,   ("beta", "noise"),    0.5, 5e-4, True,  True,  False, False),
    "ipo":      Method(ipo,      ("beta",),            0.1, 5e-4, True,  True,  False, False),
    "slic":     Method(slic,     ("beta",),            0.4, 5e-4, True,  True,  False, False),
    "kto":      Method(kto,      ("beta", "aversion"), 0.5, 2e-4, False, True,  False, False),
    "orpo":     Method(orpo,     ("odds",),            1.0, 1e-4, True,  False, False, False),
    "simpo":    Method(simpo,    ("beta", "gamma"),    2.0, 1e-4, True,  False, False, False),
    "apo_zero": Method(apo_zero, ("beta",),            0.5, 2e-4, True,  True,  False, False),
    "apo_down": Method(apo_down, ("beta",),            0.5, 1e-4, True,  True,  False, False),
    "sppo":     Method(sppo,     ("beta",),            0.1, 3e-4, True,  True,  True,  True),
}

# ---------------------------------------------------------------- data
# JSON lines -> rows: a prompt and two answers in token ids. Of a pair, the winner and the loser; of a single
# judgement (good or not), the answer and, for KTO's z, one to another prompt. raw is the line of the file.
Row = namedtuple("Row", "prompt first second good raw")

def length(row):
    return len(row.prompt) + max(len(row.first), len(row.second))

def judgements(row):
    """SEAM: your own format goes here. A row of JSON -> messages of the prompt, {True: liked, False: not}"""
    if "label" in row:
        prompt, answers = row["prompt"], {{True: True, False: False}[row["label"]]: row["completion"]}
    else:
        prompt, *both = split_pair(row)
        answers = dict(zip((True, False), both))
    for good, answer in answers.items():                        # text, or one message of the assistant
        text = answer if isinstance(answer, str) else {m["role"]: m["content"] for m in answer}["assistant"]
        answers[good] = text.strip()
    return to_messages(prompt), answers

def read_rows(config, tokenizer, context):
    """A file -> rows; `second` is empty where an answer stands alone."""
    raws, rows, end = read_jsonl(config.data), {}, [special(tokenizer, END)]
    lines = open(config.data, encoding="utf-8").read().split("\n")
    for line, raw in zip((i for i, text in enumerate(lines, 1) if text.strip()), raws):
        where = f"{config.data}:{line}"
        try:
            messages, answers = judgements(raw)
            if not messages or not all([*answers.values(), *(m["content"].strip() for m in messages)]):
                raise ValueError
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            raise UserError(f'{where}: want "prompt", "chosen" and "rejected", or only the latter two, which '
                            'begin alike; or "prompt", "completion" and "label"; no empty text') from None
        if len(answers) == 1 and LOSSES[config.loss].pairs:
            raise UserError(f"{where}: --loss {config.loss} needs pairs; --loss kto takes single answers")
        if answers.get(True) == answers.get(False):
            raise UserError(f"{where}: chosen and rejected are the same")
        y = {good != config.flip: tokenizer.encode_ordinary(text) + end for good, text in answers.items()}
        x, best = render(tokenizer, messages, reply=True)[0], max(y)
        rows[where] = Row(x, y[best], y.get(False, []) if best else [], best, raw)
    long = [where for where, row in rows.items() if length(row) > context]
    if long and not config.drop:
        raise UserError(f"{long[0]}: longer than the model's {context} tokens, like {len(long) - 1} others "
                        f"of {len(rows)} rows: shorten them, or leave them out with --drop")
    if long and not config.quiet:
        print(f"{len(long)} of {len(rows)} rows are left out, as they exceed the model's {context} tokens")
    return [row for row in rows.values() if length(row) <= context]

def singles(rows, context):
    """Pairs -> single judgements. Each gets the next answer that belongs to another prompt."""
    rows = [one for row in rows for one in (row, row._replace(first=row.second, good=False)) if one.first]
    for i, row in enumerate(rows):
        others = (rows[j - len(rows)] for j in range(i + 1, i + len(rows)))
        fits = (o.first for o in others if o.prompt != row.prompt and len(row.prompt + o.first) <= context)
        rows[i] = row._replace(second=next(fits, None))
        if not rows[i].second:
            raise UserError("--loss kto needs answers to several prompts")
    return rows

def batches(rows, size, generator):
    """Endless batches of row numbers: rows of similar length, so that little is padding, with noise to mix"""
    lengths, size = torch.tensor([length(row) for row in rows]), min(size, len(rows))
    while True:
        order = (lengths * (1 + 0.1 * torch.rand(len(rows), generator=generator))).argsort().tolist()
        for g in torch.randperm(len(rows) // size, generator=generator).tolist():
            yield order[g * size:(g + 1) * size]

def answer_logps(model, tokenizer, rows):
    """Both answers of each row in one pass. -> (B, 2) log pi(y|x), summed over tokens; (B, 2) their number"""
    device, both = model.embed.weight.device, [(row.prompt, y) for row in rows for y in row[1:3]]
    ids = pad([x + y for x, y in both], special(tokenizer, PAD))            # (2B, T) x y_w, x y_l, x y_w, ...
    real = pad([[1] * len(x + y) for x, y in both], 0).bool()               # False at padding
    answer = pad([[0] * len(x) + [1] * len(y) for x, y in both], 0).bool()  # True at y and its end token
    logps = token_logps(model, ids.to(device), real.to(device), answer.to(device))          # (2B, T)
    return logps.sum(1).view(-1, 2), answer.sum(1).view(-1, 2).to(device)

@torch.no_grad()
def fixed_logps(model, tokenizer, rows, size=32):
    """The sums alone, for any number of rows and without gradient. -> (N, 2)"""
    parts = [rows[i:i + size] for i in range(0, len(rows), size)]
    return torch.cat([answer_logps(model, tokenizer, part)[0] for part in parts])

# ---------------------------------------------------------------- own answers as data

def load_judge(config):
    """SEAM of --rounds and --online: who says how good an answer is. -> (raw rows, texts) -> scores"""
    if config.judge == "gold":
        return lambda raws, texts: [studybuddy.judge(raw, text)["gold"] for raw, text in zip(raws, texts)]
    need(config.judge, "python reward_model.py", 60)
    model, tokenizer = load_scalar(config.judge, config.device)

    @torch.no_grad()
    def judge(raws, texts):
        chats = [judgements(raw)[0] + [dict(role="assistant", content=x)] for raw, x in zip(raws, texts)]
        ids = [ids[:len(ids) - loss[::-1].index(1)] for ids, loss in (render(tokenizer, c) for c in chats)]
        real = pad([[1] * len(row) for row in ids], 0).bool().to(config.device)
        scores = model(pad(ids, special(tokenizer, PAD)).to(config.device), real)       # (B, T)
        return scores.gather(1, real.sum(1, keepdim=True) - 1)[:, 0].tolist()           # (B,) at <|im_end|>
    return judge

def own_pairs(model, tokenizer, rows, judge, config, generator):
    """Two answers of the model to each prompt; the judge says which won. Equals have nothing to teach."""
    drawn = sample(model, tokenizer, [row.prompt for row in rows], 2, config.max_new, generator=generator)
    verdicts = judge([row.raw for row in rows for _ in "ab"], drawn.texts)              # 2B, endless is worst
    scores = [score if ended else -torch.inf for score, ended in zip(verdicts, drawn.ended)]
    y, pairs = [ids[mine].tolist() for ids, mine in zip(drawn.ids, drawn.answer)], []
    for row, a, b in zip(rows, range(0, len(y), 2), range(1, len(y), 2)):
        if scores[a] != scores[b] and y[a] != y[b]:
            won, lost = (a, b) if (scores[a] > scores[b]) != config.flip else (b, a)
            pairs.append(Row(row.prompt, y[won], y[lost], True, row.raw))
    return pairs

def stream(model, reference, tokenizer, rows, judge, config):
    """For each batch its rows and log pi_ref of their answers. Offline is one round, on the file's rows."""
    # more processes share each batch of a file; own answers are each one's own, to its share of the prompts
    generator = torch.Generator().manual_seed(config.seed + RANK * bool(judge))
    rows, size = (portion(rows), config.batch) if judge else (rows, config.batch * PROCESSES)
    method, needed = LOSSES[config.loss], config.steps * config.accumulate
    rounds = needed if config.online else config.rounds or 1
    for r in range(rounds):
        fresh, count = rows, needed * (r + 1) // rounds - needed * r // rounds          # batches this round
        if judge:
            picks = torch.randint(len(rows), (count * config.batch,), generator=generator)
            fresh = own_pairs(model, tokenizer, [rows[i] for i in picks], judge, config, generator)
            if not fresh:
                raise UserError(f"--judge {config.judge} finds no answer better than another")
            fresh = fresh if method.pairs else singles(fresh, model.config.max_len)
        numbers, ref = batches(fresh, size, generator), torch.zeros(len(fresh), 2, device=config.device)
        plan = [next(numbers) if judge else portion(next(numbers)) for _ in range(count)]
        if method.reference:                                    # it never changes, so once is enough
            used = list(dict.fromkeys(i for batch in plan for i in batch))
            ref[used] = fixed_logps(reference, tokenizer, [fresh[i] for i in used], config.batch)
        for batch in plan:
            yield [fresh[i] for i in batch], ref[batch]

# ---------------------------------------------------------------- before and after

def standing(values, good, pairs):
    """(B, 2) -> means of winners and losers, and how often they are the right way round (ties count half)"""
    w, l = values.unbind(1) if pairs else (values[good, 0], values[~good, 0])
    lead = w - l if pairs else torch.cat([w, -l])
    return w.mean().item(), l.mean().item(), ((lead > 0).float() + (lead == 0).float() / 2).mean().item()

@torch.no_grad()
def probe(model, reference, tokenizer, held, config):
    """Of held-out rows: log-probs of both sides, accuracy; of sampled answers: kl and, in our world, gold"""
    pairs, good = LOSSES[config.loss].pairs, torch.tensor([row.good for row in held])
    pi, ref = (fixed_logps(m, tokenizer, held).cpu() for m in (model, reference))
    drawn = sample(model, tokenizer, [row.prompt for row in held[:48]], 1, config.max_new,
                   generator=torch.Generator().manual_seed(config.seed))
    kl = (drawn.logps - token_logps(reference, *drawn[:3])).sum(1).mean().item()        # nats an answer
    chosen, rejected, _ = standing(pi, good, pairs)
    found = dict(chosen=chosen, rejected=rejected, accuracy=standing(pi - ref, good, pairs)[2], kl=kl)
    if all("slots" in row.raw for row in held):
        gold = [studybuddy.judge(row.raw, *x)["gold"] for row, *x in zip(held, drawn.texts, drawn.ended)]
        found["gold"] = sum(gold) / len(gold)
    return found

# ---------------------------------------------------------------- training

def losses_of(values, good, config):
    """(B, 2), (B,) -> (B,): the loss of this run, with its numbers."""
    method = LOSSES[config.loss]
    labels = [] if method.pairs else [good]
    return method.loss(*values.unbind(1), *labels, *(getattr(config, name) for name in method.uses))

def fit(model, reference, tokenizer, rows, held, judge, config, log):
    add_lora(model, config.lora)
    method, optim, device = LOSSES[config.loss], optimizer(model, config.lr), model.embed.weight.device
    feed = stream(model, reference, tokenizer, rows, judge, config)
    try:
        for step in range(config.steps):
            for group in optim.param_groups:
                group["lr"] = config.lr * schedule(step, config.steps)
            if step % -(-config.steps // 6) == 0:
                found = probe(model, reference, tokenizer, held, config)
            for _ in range(config.accumulate):
                # 1 batch
                batch, ref = next(feed)
                good = torch.tensor([row.good for row in batch], device=device)         # (B,)
                # 2 score: w and l of each pair (r and z of each single answer)
                logps, tokens = answer_logps(model, tokenizer, batch)                   # (B, 2)
                values = logps - ref if method.reference else logps / tokens            # (B, 2)
                # 3 loss
                loss = losses_of(values, good, config).sum() / average(float(len(batch)))
                (loss / config.accumulate).backward()
            # 4 step
            clip(model)
            optim.step()
            optim.zero_grad()
            # 5 log: the batch, then the last look at held-out rows
            w, l, _ = standing(values.detach(), good, method.pairs)
            log(step, loss=loss.item(), margin=config.beta * (w - l), **found)
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")
    merge_lora(model)

def train(config, judge=None):
    """judge: your own function (raw rows, texts) -> scores for --rounds and --online."""
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss}: choose one of {', '.join(LOSSES)}")
    method = LOSSES[config.loss]
    config = replace(config, beta=config.beta or method.beta, lr=config.lr or method.lr)
    if not 0 <= config.noise < 0.5:
        raise UserError(f"--noise {config.noise}: wrong labels are a share of 0 or more, and below 0.5")
    if config.rounds > config.steps:
        raise UserError(f"--rounds {config.rounds}: more than the {config.steps} steps")
    need(config.init, "python sft.py", 25)
    torch.manual_seed(config.seed)
    model, tokenizer = load(config.init, config.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    judge = (judge or load_judge(config)) if config.online or config.rounds else None
    say(f"dpo: {config.loss} on {config.init}, {sum(p.numel() for p in model.parameters()):,} parameters, on "
        f"{config.device}")
    rows = read_rows(config, tokenizer, model.config.max_len)
    every = max(10, len(rows) // 128)
    held, rows = rows[::every], [row for i, row in enumerate(rows) if i % every]
    if not rows:
        raise UserError(f"{config.data}: one row is held out, so at least 2 are needed")
    if not method.pairs:
        held, rows = (singles(part, model.config.max_len) for part in (held, rows))
    world = all("slots" in row.raw for row in held)    # on your own data the exam makes no sense
    if config.judge == "gold" and not world:
        raise UserError(f"--judge gold knows only StudyBuddy's prompts, not those of {config.data}")

    # BEFORE
    say("one row; the loss looks at what stands between « and »")
    for y in (rows[0].first, rows[0].second):
        say("    " + f"{tokenizer.decode(rows[0].prompt)}«{tokenizer.decode(y)}»".replace("\n", "\n    "))
    start = losses_of(torch.zeros(2, 2), torch.tensor([True, False]), config).mean()
    say(f"{len(rows):,} rows" + f"; the loss starts at {start:.4f}, for log-ratios of 0" * method.reference)
    before, old = probe(model, reference, tokenizer, held, config), []
    if world:
        card, old = studybuddy.exam(model, tokenizer, reference=reference, seed=config.seed)
        before |= card
    log = Log(config.steps, config.quiet)
    fit(model, reference, tokenizer, rows, held, judge, config, log)
    if config.save:                                    # before the exam: whatever happens there, this is safe
        save(config.out, model, tokenizer)

    # AFTER
    after = probe(model, reference, tokenizer, held, config)
    if after["chosen"] < before["chosen"]:
        say(f"log-prob of chosen answers: {before['chosen']:.1f} -> {after['chosen']:.1f}. It often falls: "
            "the loss sees\nonly w - l, and what both answers share sinks with the loser (Razin et al. 2024)")
    if world:
        card, new = studybuddy.exam(model, tokenizer, reference=reference, against=old, seed=config.seed)
        after |= card
        for (row, was), (_, now) in [*zip(old, new)][::110]:
            for name, text in ("prompt", studybuddy.flat(row["prompt"])), ("before", was), ("after", now):
                say(f"{name:>8}  {' '.join(text.split())[:70]}")
    if not config.quiet:
        studybuddy.show({"before": before, "after": after})
    key = "gold" if world and config.data == Config.data and not config.flip else "accuracy"
    target = before["gold"] + 0.12 if key == "gold" else 0.55
    passed, seconds = after[key] >= target, time.time() - started
    say(f"{'PASS' if passed else 'FAIL'} {key} {before[key]:.2f} -> {after[key]:.2f} (target {target:.2f}) "
        f"in {seconds:.0f} s")
    results = dict(stage="dpo", config=asdict(config), seconds=seconds, before=before, after=after,
                   passed=passed)
    if config.save:
        write_results(config.out, log, **results)
    return results | {"model": model, "tokenizer": tokenizer, "log": log.rows}

if __name__ == "__main__":
    main(Config, train, __doc__)
