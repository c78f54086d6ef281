"""Supervised fine-tuning (SFT): from a model that continues text to one that answers.

A base model has read questions followed by good answers, by bad ones and by more questions, and imitates them
all. SFT shows it a few hundred demonstrations in a chat template and makes the demonstrator's tokens likelier. It
is pretraining's own loss with two changes: the data, and a mask m that leaves out what the assistant did not
write. It gives the model a voice; which of two answers is better it cannot say (reward_model.py, dpo.py can).

    L(theta) = - sum_it m_it log pi_theta(y_it | y_i,<t) / sum_it m_it      rows i, positions t of a batch

    python sft.py                      data/base -> out/sft: learn the demonstrations
    python sft.py --lora 8             the same with rank-8 adapters on frozen weights -> out/lora
    python sft.py --best_of 8          rejection sampling: learn the best of 8 own answers -> out/best_of
    python sft.py --teacher out/dpo    distillation: learn another model's answers -> out/distill
    python sft.py --pretrain           web.txt -> out/base, as data/base was made: 10 minutes
    python sft.py --init SmolLM2-135M --data my.jsonl --lr 2e-5 --device cuda --out out/mine

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155) and Llama 2 (Touvron et al. 2023, 2307.09288): one
short run, no dropout, one round of rejection sampling.
Try next: train on the prompt too (a mask of ones); --steps 400, and watch the held-out loss.
"""
import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import studybuddy
from model import (EOT, PAD, Diverged, Log, ModelConfig, Transformer, UserError, add_lora, load, load_ranks,
                   load_scalar, main, merge_lora, need, optimizer, pad, read_jsonl, render, sample, save,
                   schedule, special, to_messages, token_logps, write_results)


@dataclass(frozen=True)
class Config:
    init: str = ""            # start from this model folder (default: see MODES)
    data: str = ""            # train on these JSON lines (default: see MODES)
    out: str = ""             # write here (default: see MODES)
    steps: int = 0            # optimiser steps (0: see MODES)
    lr: float = 0.0           # peak learning rate (0: see MODES)
    batch: int = 4096         # tokens a batch, padding included
    accumulate: int = 1       # batches a step
    seed: int = 0             # same seed, same machine: same numbers
    device: str = "cpu"       # cpu, cuda or mps
    cut: bool = False         # cut rows longer than the model's context (without it they are an error)
    lora: int = 0             # train adapters of this rank instead of the weights
    best_of: int = 0          # answers to sample to each prompt, to learn the best one
    reward: str = ""          # folder of the reward model that picks the best (default: the world's judge)
    teacher: str = ""         # folder of the model to learn from
    distill: str = "samples"  # what it gives: "samples", or "logits" for its whole distribution on them
    prompts: int = 512        # prompts to sample answers to, for best_of and teacher
    max_new: int = 96         # longest answer in tokens, for best_of and teacher
    pretrain: bool = False    # make the base model from data/web.txt
    minutes: float = 12.0     # time limit of pretraining: a slow machine skips ahead on the schedule
    save: bool = True         # write the checkpoint and the results
    quiet: bool = False       # print nothing


MODES = {  #    init         data                  out            steps lr    optimiser target
    "sft":      ("data/base", "data/sft.jsonl",     "out/sft",     80,   1e-3, "adamw", 0.65),  # gold
    "lora":     ("data/base", "data/sft.jsonl",     "out/lora",    80,   1e-2, "adamw", 0.62),  # gold
    "best_of":  ("out/sft",   "data/prompts.jsonl", "out/best_of", 60,   5e-4, "adamw", 0.05),  # gold - control's
    "distill":  ("data/base", "data/prompts.jsonl", "out/distill", 100,  1e-3, "adamw", -.05),  # gold - teacher's
    "pretrain": ("",          "data/web.txt",       "out/base",    1800, 2e-2, "muon",  2.00),  # held-out loss
}


# --- Data: JSON lines -> rows of (token ids, mask of the trained ones) -> batches ------------------------------

def conversation(row):
    """SEAM: your own format goes here. One row of JSON -> messages, the last one the assistant's."""
    if "messages" in row:
        return row["messages"]
    reply = row["completion"] if "completion" in row else row["response"]
    if isinstance(reply, str):
        reply = [{"role": "assistant", "content": reply}]
    return to_messages(row["prompt"]) + reply


def read_conversations(path):
    found = []
    for line, row in enumerate(read_jsonl(path, need=()), 1):
        try:
            found.append(conversation(row))
            if found[-1][-1]["role"] != "assistant" or not all(m["content"].strip() for m in found[-1]):
                raise ValueError
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            raise UserError(f'{path}:{line}: want "messages", or "prompt" and "completion" (or "response"): no '
                            "text empty, and the last message the assistant's") from None
    return found


def examples(conversations, tokenizer, context, source, cut=False):
    """Messages -> rows. The mask is 1 on what the assistant wrote, its end token included: a model that is never
    taught <|im_end|> never stops."""
    rows = [render(tokenizer, messages) for messages in conversations]
    long = [i for i, (ids, _) in enumerate(rows) if len(ids) > context]
    if long and not cut:
        raise UserError(f"{source}: {len(long)} of {len(rows)} rows are longer than the model's {context} tokens "
                        f"(the first is number {long[0] + 1}, {len(rows[long[0]][0])}): shorten them, or --cut")
    rows = [(ids[:context], mask[:context]) for ids, mask in rows]
    empty = [i for i, (_, mask) in enumerate(rows) if not any(mask)]
    if empty:
        raise UserError(f"{source}: in {len(empty)} of {len(rows)} rows (the first is number {empty[0] + 1}) the "
                        f"prompt alone fills the model's {context} tokens: shorten or remove them")
    if long:
        print(f"{len(long)} of {len(rows)} rows cut to {context} tokens")
    return rows


def documents(texts, tokenizer, context):
    """Pretraining text -> rows: every token is trained on, and each document ends with <|endoftext|>."""
    rows = []
    for text in texts:  # special tokens are parsed here only: this file is ours, and the chats in it are chats
        ids = tokenizer.encode(text, allowed_special="all") + [special(tokenizer, EOT)]
        rows += [ids[i:i + context] for i in range(0, len(ids), context)]
    return [(ids, [0] + [1] * (len(ids) - 1)) for ids in rows if len(ids) > 1]    # the first has no context


def batches(rows, tokens, generator):
    """Endless batches of at most `tokens` tokens, padding included. Rows of similar length go together, so that
    little is padding; noise in the sort key keeps a batch from being all of one kind."""
    while True:
        noise = 1 + 0.2 * torch.rand(len(rows), generator=generator)
        groups, widest = [[]], 0
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0]) * noise[i].item()):
            widest = max(widest, len(rows[i][0]))
            if groups[-1] and widest * (len(groups[-1]) + 1) > tokens:
                groups.append([])
                widest = len(rows[i][0])
            groups[-1].append(i)
        for g in torch.randperm(len(groups), generator=generator).tolist():
            yield [rows[i] for i in groups[g]]


def collate(rows, tokenizer, device):
    """Rows -> ids, real, trained, each (B, T), padded on the right."""
    ids = pad([ids for ids, _ in rows], special(tokenizer, PAD))
    real = pad([[1] * len(ids) for ids, _ in rows], 0).bool()          # False at padding
    trained = pad([mask for _, mask in rows], 0).bool()                # m: True at the tokens the loss looks at
    return ids.to(device), real.to(device), trained.to(device)


# --- The maths --------------------------------------------------------------------------------------------------

# L = - sum_it m_it log pi(y_it | y_i,<t) / sum_it m_it
def sft_loss(logps, mask, count=None):
    """logps, mask (B, T) -> scalar. The mean is over tokens, not over each row and then over rows: so the pull of a
    token does not depend on the length of the answer it stands in, nor on the rows it shares a batch with. `count`
    is the denominator of a step of several batches: if each had its own, row lengths would come back in."""
    return -logps.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)


# L = 1/N sum_n KL(p_T || p_S) = 1/N sum_n sum_v p_T(v) [log p_T(v) - log p_S(v)]
def distill_loss(student, teacher, count=None):
    """Logits (N, V), one row for each trained token -> scalar. Hinton et al. 2015 (1503.02531), temperature 1, on the
    teacher's own answers. sft_loss on those answers is the same in expectation, but for the teacher's entropy (a
    constant): there one draw from p_T stands for the sum over v."""
    log_t, log_s = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)                # (N, V)
    return (log_t.exp() * (log_t - log_s)).sum() / (len(student) if count is None else count)


# k* = argmax_k r(x, y_k)          Llama 2, section 3.2.3
def pick_best(scores, generator):
    """scores (B, K) -> (B,)"""
    return scores.argmax(1)


# k* ~ uniform{1..K}: what this control gains is more training; what pick_best gains beyond it is selection
def pick_random(scores, generator):
    """scores (B, K) -> (B,)"""
    return torch.randint(scores.shape[1], (len(scores),), generator=generator)


# --- Answers of a model as data ---------------------------------------------------------------------------------

def reward(row, response):
    """SEAM: your own reward for a response to row["prompt"]. The default is the world's judge: the truth itself."""
    if "kind" not in row:
        raise UserError("the judge knows only StudyBuddy's prompts: name a reward model's folder with --reward")
    return studybuddy.judge(row, response)["gold"]


def chats(rows, texts):
    return [to_messages(row["prompt"]) + [{"role": "assistant", "content": text}] for row, text in zip(rows, texts)]


@torch.no_grad()
def rewards(rows, texts, config):
    """One reward for each of texts, which answer rows: by reward(), or by the reward model in config.reward."""
    if not config.reward:
        return torch.tensor([reward(row, text) for row, text in zip(rows, texts)])
    judge, tokenizer = load_scalar(config.reward, config.device)
    judged = examples(chats(rows, texts), tokenizer, judge.config.max_len, config.data)
    scores = []
    for start in range(0, len(judged), 256):
        ids, real, trained = collate(judged[start:start + 256], tokenizer, config.device)
        end = trained.int().cumsum(1).argmax(1)                        # (B,): the last answer token, <|im_end|>
        scores.append(judge(ids, real).gather(1, end[:, None])[:, 0])                          # (B, T) -> (B,)
    return torch.cat(scores).cpu()


def ask(model, tokenizer, rows, n, config, generator):
    """n answers to each prompt -> texts (B * n), ended (B * n)."""
    prompts = [render(tokenizer, to_messages(row["prompt"]), reply=True)[0] for row in rows]
    drawn = sample(model, tokenizer, prompts, n=n, max_new=config.max_new, generator=generator)
    return drawn.texts, drawn.ended.cpu()


def rejection_sample(model, tokenizer, config, generator, say):
    """The model's own answers -> two runs: the best of each K, and a random one of each K."""
    prompts, K = some_prompts(config, generator), config.best_of
    texts, ended = ask(model, tokenizer, prompts, K, config, generator)
    scores = rewards([row for row in prompts for _ in range(K)], texts, config)
    scores = scores.masked_fill(~ended, -torch.inf).view(-1, K)        # (B, K); an endless answer is never the best
    runs = {}
    for name, pick in (("best", pick_best), ("random", pick_random)):
        k = pick(scores, generator)                                    # (B,)
        kept = [(b, int(k[b])) for b in range(len(prompts)) if scores[b, k[b]] > -torch.inf]
        say(f"{name:>6} of {K}: mean reward {sum(scores[b, j] for b, j in kept) / len(kept):.3f}, {len(kept)} answers "
            f"({len(prompts) - len(kept)} never ended and are left out)")
        own = chats([prompts[b] for b, _ in kept], [texts[b * K + j] for b, j in kept])
        runs[name] = examples(own, tokenizer, model.config.max_len, config.data)
    return runs


def teacher_answers(teacher, teachers_tokenizer, tokenizer, context, config, generator, say):
    """The teacher's answers -> one run. They pass as text, so the two may have different tokenizers."""
    prompts = some_prompts(config, generator)
    texts, ended = ask(teacher, teachers_tokenizer, prompts, 1, config, generator)
    kept = [b for b in range(len(prompts)) if ended[b]]
    say(f"{len(kept)} answers of the teacher ({len(prompts) - len(kept)} never ended and are left out)")
    own = chats([prompts[b] for b in kept], [texts[b] for b in kept])
    return {"student": examples(own, tokenizer, context, config.data)}


def some_prompts(config, generator):
    rows = read_jsonl(config.data, need=("prompt",))
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:config.prompts].tolist()]


# --- Training ---------------------------------------------------------------------------------------------------

def fit(model, tokenizer, rows, config, kind, teacher=None, quiet=False):
    """The loop of every mode, on rows of (ids, mask); with a teacher, towards its distribution."""
    optim = optimizer(model, config.lr, kind)
    peaks = [group["lr"] for group in optim.param_groups]
    stream = batches(rows, config.batch, torch.Generator().manual_seed(config.seed))
    log, start, step, tokens = Log(config.steps, quiet), time.time(), 0, 0
    try:
        while step < config.steps:
            for group, peak in zip(optim.param_groups, peaks):
                group["lr"] = peak * schedule(step, config.steps)

            # 1 batch: all the rows of this step, and how many of their tokens are trained on
            micro = [collate(next(stream), tokenizer, config.device) for _ in range(config.accumulate)]
            count = sum(trained[:, 1:].sum() for _, _, trained in micro)

            total = 0.0
            for ids, real, trained in micro:                           # (B, T)
                with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
                    # 2 score: log pi(y_t | y_<t) of the trained tokens; 3 loss
                    if teacher is None:
                        loss = sft_loss(token_logps(model, ids, real, trained), trained, count)
                    else:
                        at = trained[:, 1:]                            # (B, T-1): position t predicts token t+1
                        with torch.no_grad():
                            target = teacher.head(teacher.hidden(ids, real)[:, :-1][at])                 # (N, V)
                        loss = distill_loss(model.head(model.hidden(ids, real)[:, :-1][at]), target, count)
                loss.backward()
                total, tokens = total + loss.item(), tokens + int(real.sum())
            if not math.isfinite(total):
                raise Diverged(f"step {step + 1}: the loss is {total}. Nothing was written; try a smaller --lr")

            # 4 step
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optim.step()
            optim.zero_grad()

            # 5 log
            step, seconds = step + 1, time.time() - start
            if config.pretrain:  # behind the clock: skip ahead, so that the learning rate still ends at 0
                step = max(step, int(config.steps * seconds / (60 * config.minutes)))
            log(step, loss=total, trained=int(count), tok_s=round(tokens / seconds))
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")
    return log


def show_example(rows, tokenizer, say):
    ids, mask = rows[0]
    text = ""
    for i, before, now in zip(ids, [0] + mask, mask):
        text += ("«" if now > before else "»" if now < before else "") + tokenizer.decode([i])
    say("one row; the loss looks at what stands between « and »")
    say("    " + (text + "»" * mask[-1]).rstrip("\n").replace("\n", "\n    "))


@torch.no_grad()
def held_out_loss(model, tokenizer, rows, config):
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        ids, real, trained = collate(rows[start:start + 32], tokenizer, config.device)
        total -= token_logps(model, ids, real, trained).sum().item()
        count += trained[:, 1:].sum().item()
    return total / count


def evaluate(model, tokenizer, held, world, config, reference=None):
    """-> report card, [(row, answer)]. The world's exam knows what is right; for your data there is held-out loss."""
    card = {"held_out": held_out_loss(model, tokenizer, held, config)}
    if world:
        exam, answers = studybuddy.exam(model, tokenizer, reference=reference, seed=config.seed)
        return {**exam, **card}, answers
    prompts = [ids[:mask.index(1)] for ids, mask in held[:4]]
    drawn = sample(model, tokenizer, prompts, max_new=config.max_new, temperature=0.0)
    return card, [({"prompt": tokenizer.decode(p), "kind": i}, t) for i, (p, t) in enumerate(zip(prompts, drawn.texts))]


def show_answers(before, after, say):
    """Both answers to the first prompt of each of four kinds."""
    first = {}
    for (row, old), (_, new) in zip(before, after):
        first.setdefault(row["kind"], (to_messages(row["prompt"])[-1]["content"], old, new))
    for three in list(first.values())[:4]:
        for name, text in zip(("prompt", "before", "after"), three):
            text = " ".join(text.split())
            say(f"{name:>8}  {text if len(text) <= 70 else text[:67] + '...'}")


def train(config):
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    mode = ("pretrain" if config.pretrain else "distill" if config.teacher else "best_of" if config.best_of else
            "lora" if config.lora else "sft")
    init, data, out, steps, lr, kind, target = MODES[mode]
    world = config.data in ("", data)          # on your own data the exam would make no sense
    config = replace(config, init=config.init or init, data=config.data or data, out=config.out or out,
                     steps=config.steps or steps, lr=config.lr or lr)
    if config.distill not in ("samples", "logits"):
        raise UserError(f"--distill {config.distill}: want samples or logits")
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)

    if mode == "pretrain":
        tokenizer = load_ranks(studybuddy.HERE / "studybuddy.tiktoken")
        model = Transformer(ModelConfig(vocab_size=tokenizer.n_vocab)).to(config.device)
    else:
        if config.init == "out/sft":
            need("out/sft", "python sft.py", 25)
        model, tokenizer = load(config.init, config.device)
    say(f"{mode}: {config.init or 'a fresh model'}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config.device}; about {'10 minutes' if mode == 'pretrain' else '30 seconds'} on two cores")

    # What to train on: rows by run. The first run is the one to keep.
    context, teacher = model.config.max_len, None
    if mode == "pretrain":
        texts = studybuddy.web() if world else Path(config.data).read_text().split("\n\n")
        runs = {"base": documents(texts, tokenizer, context)}
    elif mode == "best_of":
        runs = rejection_sample(model, tokenizer, config, generator, say)
    elif mode == "distill":
        teacher, teachers_tokenizer = load(config.teacher, config.device)
        if config.distill == "logits" and teachers_tokenizer._mergeable_ranks != tokenizer._mergeable_ranks:
            raise UserError(f"--distill logits: {config.teacher} has another vocabulary than {config.init}")
        runs = teacher_answers(teacher, teachers_tokenizer, tokenizer, context, config, generator, say)
    else:
        runs = {mode: examples(read_conversations(config.data), tokenizer, context, config.data, config.cut)}
    keep = next(iter(runs))
    if len(runs[keep]) < 2:
        raise UserError(f"{config.data}: want at least 2 rows, one to train on and one to hold out")
    every = max(20, len(runs[keep]) // 256)
    held = runs[keep][::every]
    runs = {name: [row for i, row in enumerate(rows) if i % every] for name, rows in runs.items()}

    # BEFORE
    show_example(runs[keep], tokenizer, say)
    reference = model if mode == "best_of" else None
    before, old = evaluate(model, tokenizer, held, world, config, reference) if mode != "pretrain" else (
        {"held_out": held_out_loss(model, tokenizer, held, config)}, None)
    fresh = f" (knows nothing yet: ln {tokenizer.n_vocab} = {math.log(tokenizer.n_vocab):.3f})" * (mode == "pretrain")
    say(f"{len(runs[keep]):,} rows, {len(held)} more held out, their loss {before['held_out']:.3f}{fresh}")
    cards, results = {"before": before}, {}
    if teacher:
        cards["teacher"], _ = evaluate(teacher, teachers_tokenizer, held, world, config)

    # Each run from the same start
    for name in runs:
        pupil = copy.deepcopy(model)
        if config.lora:
            say(f"trained parameters: {add_lora(pupil, config.lora):,}")
        log = fit(pupil, tokenizer, runs[name], config, kind, teacher if config.distill == "logits" else None,
                  config.quiet or name != keep)
        if config.lora:
            merge_lora(pupil)
        cards[name], answers = evaluate(pupil, tokenizer, held, world, config, reference)
        if name == keep:
            kept, kept_log, new = pupil, log, answers

    # AFTER
    show_answers(old or new, new, say)
    if world and not config.quiet:
        studybuddy.show({name: card for name, card in cards.items() if "gold" in card})
    key = "gold" if world and mode != "pretrain" else "held_out"
    a, b = before[key], cards[keep][key]
    if mode == "best_of" and world:
        target += cards["random"][key]
    elif mode == "distill" and world:
        target += cards["teacher"][key]
    elif not world:
        target = a
    passed = b <= target if key == "held_out" else b >= target
    seconds = time.time() - started
    say(f"{'PASS' if passed else 'FAIL'} {key} {a:.2f} -> {b:.2f} (target {target:.2f}) in {seconds:.0f} s")
    results = dict(stage=mode, config=asdict(config), seconds=seconds, before=before, after=cards[keep],
                   passed=passed, cards=cards)
    if config.save:
        save(config.out, kept, tokenizer, torch.float16 if mode == "pretrain" else torch.float32)
        write_results(config.out, kept_log, **results)
    return {**results, "model": kept, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
