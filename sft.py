"""Supervised fine-tuning (SFT): from a model that continues text to one that answers.

A base model has read questions followed by good answers, by bad ones and by more questions, and imitates all.
SFT shows it some hundreds of demonstrations in a chat template and makes the demonstrator's tokens likelier.
It is pretraining's own loss with two changes: the data, and a mask m that leaves out what the assistant did
not write. It gives the model a voice; that one answer is better than another it cannot say (dpo.py can).

    L(theta) = - sum_it m_it log pi_theta(y_it | y_i,<t) / sum_it m_it      rows i, positions t of a batch

    python sft.py                      data/base -> out/sft: learn the demonstrations, 17 s: gold 0.42 -> 0.66
    python sft.py --lora 8             the same with rank-8 adapters on frozen weights -> out/lora
    python sft.py --best_of 8          rejection sampling: learn the best of 8 own answers -> out/best_of
    python sft.py --teacher out/dpo    distillation: learn another model's answers -> out/distill
    python sft.py --pretrain           data/web.txt -> out/base: how data/base was made, 12 minutes
    python sft.py --init SmolLM2-135M --data mine.jsonl --lr 2e-5 --device cuda --out out/mine

Simplified from InstructGPT (Ouyang et al. 2022, 2203.02155) and Llama 2 (Touvron et al. 2023, 2307.09288):
one short run, no dropout, one round of rejection sampling.
Try next: train on the prompt too (a mask of ones); --steps 400, and watch the held-out loss.
"""
import copy, math, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import studybuddy
from model import (EOT, PAD, PROCESSES, RANK, Log, ModelConfig, Transformer, UserError, add_lora,
                   average, clip, load, load_scalar, main, merge_lora, need, optimizer, pad, read_jsonl,
                   render, sample, save, schedule, special, split_pair, to_messages, token_logps,
                   write_results)

@dataclass(frozen=True)
class Config:
    init: str = ""            # start from this model folder (default: see MODES)
    data: str = ""            # train on these JSON lines (default: see MODES)
    out: str = ""             # write here (default: see MODES)
    steps: int = 0            # optimiser steps (0: see MODES)
    lr: float = 0.0           # peak learning rate (0: see MODES)
    batch: int = 0            # tokens a batch, padding included (0: see MODES)
    accumulate: int = 1       # batches a step
    seed: int = 0             # same seed, same machine: same numbers
    device: str = "cpu"       # cpu, cuda or mps
    cut: bool = False         # cut rows longer than the model's context (without it they are an error)
    lora: int = 0             # train adapters of this rank instead of the weights
    best_of: int = 0          # sample this many answers to each prompt and learn the best one
    reward: str = ""          # folder of the reward model that picks the best (default: the world's judge)
    teacher: str = ""         # folder of the model to learn from
    distill: str = "samples"  # what it gives: its samples, or its logits (its whole distribution) on them
    prompts: int = 512        # prompts to sample answers to, for best_of and teacher
    max_new: int = 72         # longest sampled answer in tokens
    pretrain: bool = False    # make the base model from data/web.txt
    documents: int = 150000   # pretraining reads so many: web.txt, and on from there
    minutes: float = 11.0     # time limit of pretraining: a slow machine skips ahead on the schedule
    save: bool = True         # write the checkpoint and the results
    quiet: bool = False       # print nothing

# target: gold; for best_of and distill, what to add to the rival's gold; for pretrain, held-out loss
MODES = {  #    init         data                  out            steps batch lr    optimiser target
    "sft":      ("data/base", "data/sft.jsonl",     "out/sft",     80,   3072, 6.5e-4, "adamw", 0.65),
    "lora":     ("data/base", "data/sft.jsonl",     "out/lora",    110,  3072, 1e-2, "adamw", 0.62),
    "best_of":  ("out/sft",   "data/prompts.jsonl", "out/best_of", 60,   4096, 5e-4, "adamw", 0.05),
    "distill":  ("data/base", "data/prompts.jsonl", "out/distill", 100,  4096, 1e-3, "adamw", -.05),
    "pretrain": ("",          "data/web.txt",       "out/base",    8800, 1024, 5e-3, "muon",  0.50),
}

# ---------------------------------------------------------------- data
# JSON lines -> conversations (lists of messages) -> rows (ids, mask of the trained ones) -> batches

def conversation(row):
    """SEAM: your own format goes here. One row of JSON -> messages, the last one the assistant's."""
    if "messages" in row:
        return row["messages"]
    if "chosen" in row:
        prompt, reply, _ = split_pair(row)
    else:
        prompt, reply = row["prompt"], row["completion"] if "completion" in row else row["response"]
    reply = [{"role": "assistant", "content": reply.strip()}] if isinstance(reply, str) else reply
    return to_messages(prompt) + reply

def read_conversations(path):
    """-> {"path:line": messages}"""
    found, rows = {}, iter(read_jsonl(path))
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            if text.strip():
                found[f"{path}:{line}"] = messages = conversation(next(rows))
                if messages[-1]["role"] != "assistant" or not all(m["content"].strip() for m in messages):
                    raise ValueError
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            raise UserError(f'{path}:{line}: want "messages", or "prompt" with "completion", "response" or '
                            '"chosen"; no text may be empty, and the assistant comes last') from None
    return found

def examples(conversations, tokenizer, context, cut=False):
    """{where: messages} -> rows. The mask is 1 on what the assistant wrote and on its end token: a model that
    is never taught <|im_end|> never stops."""
    rows = {where: render(tokenizer, messages) for where, messages in conversations.items()}
    long = [where for where, (ids, _) in rows.items() if len(ids) > context]
    mute = [where for where, (_, mask) in rows.items() if not any(mask[:context])]
    if mute or long and not cut:
        raise UserError(f"{(mute or long)[0]}: the {'prompt' if mute else 'row'} is longer than the model's "
                        f"{context} tokens, like {len(mute or long) - 1} others of {len(rows)}: shorten them"
                        + ", or use --cut" * (not mute))
    if long:
        print(f"{len(long)} of {len(rows)} rows are cut to the model's {context} tokens")
    return [(ids[:context], mask[:context]) for ids, mask in rows.values()]

def documents(texts, tokenizer, context):
    """Pretraining text -> rows: every token is trained on, and each document ends with <|endoftext|>."""
    rows = []
    for text in texts:  # special tokens are parsed here only: the file is ours, the chats in it are chats
        ids = tokenizer.encode(text, allowed_special="all") + [special(tokenizer, EOT)]
        rows += [ids[i:i + context] for i in range(0, len(ids), context)]
    return [(ids, [0] + [1] * (len(ids) - 1)) for ids in rows if len(ids) > 1]    # nothing predicts the first

def batches(rows, tokens, generator):
    """Endless batches of at most `tokens` tokens, padding included. Rows of similar length go together, so
    that little is padding; noise in the sort key keeps a batch from being all of one kind."""
    while True:
        noise = 1 + 0.2 * torch.rand(len(rows), generator=generator)
        groups, widest = [[]], 0
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0]) * noise[i].item()):
            widest = max(widest, len(rows[i][0]))
            if groups[-1] and widest * (len(groups[-1]) + 1) > tokens:
                groups.append([])
                widest = len(rows[i][0])
            groups[-1].append(rows[i])
        for g in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[g]

def collate(rows, tokenizer, device):
    """Rows -> ids, real, trained, each (B, T), padded on the right."""
    ids = pad([ids for ids, _ in rows], special(tokenizer, PAD))
    real = pad([[1] * len(ids) for ids, _ in rows], 0).bool()        # False at padding
    trained = pad([mask for _, mask in rows], 0).bool()              # m: True at the tokens the loss looks at
    return ids.to(device), real.to(device), trained.to(device)

# ---------------------------------------------------------------- the maths

# L = - sum_it m_it log pi(y_it | y_i,<t) / sum_it m_it
def sft_loss(logps, mask, count=None):
    """logps, mask (B, T) -> scalar. The mean is over tokens, not over rows of means: so the pull of a token
    does not depend on the length of the answer it stands in, nor on the rows it shares a batch with. `count`:
    the denominator of a step of several batches; were each divided by its own, lengths would come back in."""
    return -logps.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)

# L = 1/N sum_n KL(p_T || p_S) = 1/N sum_n sum_v p_T(v) [log p_T(v) - log p_S(v)]
def distill_loss(student, teacher, count=None):
    """Logits (N, V), one row a trained token -> scalar. Hinton et al. 2015 (1503.02531), temperature 1,
    on answers of the teacher. There sft_loss has the same gradient in expectation but more noise, as one draw
    from p_T stands for the sum over v."""
    log_t, log_s = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)     # (N, V)
    return (log_t.exp() * (log_t - log_s)).sum() / (len(student) if count is None else count)

# k* = argmax_k r(x, y_k)          (B, K) -> (B,)          Llama 2, section 3.2.3
def pick_best(scores, generator=None):
    return scores.argmax(1)

# k* ~ uniform{1..K}               (B, K) -> (B,)          the control: more training, but no selection
def pick_random(scores, generator=None):
    return torch.randint(scores.shape[1], (len(scores),), generator=generator)

# ---------------------------------------------------------------- answers of a model as data

def reward(row, response):
    """SEAM of rejection sampling: your own reward goes here. The default is the world's judge, the truth."""
    if "kind" not in row:
        raise UserError("the judge knows only StudyBuddy's prompts: use --reward with a folder")
    return studybuddy.judge(row, response)["gold"]

@torch.no_grad()
def rewards(rows, chats, config):
    """The rewards of chats that answer rows: by reward(), or by the model in config.reward. -> (N,)"""
    if not config.reward:
        return torch.tensor([float(reward(row, chat[-1]["content"])) for row, chat in zip(rows, chats)])
    judge, tokenizer = load_scalar(config.reward, config.device)
    scores, judged = [], examples(dict(enumerate(chats)), tokenizer, judge.config.max_len)
    for first in range(0, len(judged), 256):
        ids, real, trained = collate(judged[first:first + 256], tokenizer, config.device)
        end = trained.int().cumsum(1).argmax(1)                      # (B,) the last answer token, <|im_end|>
        scores.append(judge(ids, real).gather(1, end[:, None])[:, 0].cpu())              # (B, T) -> (B,)
    return torch.cat(scores)

def answers_of(author, tokenizer, picks, config, generator, say):
    """The author answers each prompt K times; each of `picks` chooses one. -> {name: conversations}"""
    K, rows = max(config.best_of, 1), read_jsonl(config.data, need=("prompt",))
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:config.prompts].tolist()]
    prompts = [render(tokenizer, to_messages(row["prompt"]), reply=True)[0] for row in rows]
    drawn = sample(author, tokenizer, prompts, n=K, max_new=config.max_new, generator=generator)
    rows, ended = [row for row in rows for _ in range(K)], drawn.ended.cpu()   # now one an answer: B * K
    chats = [to_messages(row["prompt"]) + [{"role": "assistant", "content": text}]
             for row, text in zip(rows, drawn.texts)]
    scores = rewards(rows, chats, config) if K > 1 else torch.zeros(len(chats))
    scores = scores.masked_fill(~ended, -torch.inf).view(-1, K)   # (B, K) an endless answer is never the best
    runs = {}
    for name, pick in picks.items():
        chosen = (torch.arange(len(scores)) * K + pick(scores, generator)).tolist()    # (B,) places in B * K
        runs[name] = {f"answer {i}": chats[i] for i in chosen if ended[i]}
        mean, lost = scores.flatten()[[i for i in chosen if ended[i]]].mean(), len(chosen) - len(runs[name])
        say(f"{name}: 1 of {K} answers to each of {len(scores)} prompts; {lost} left out, as they never ended"
            + f"; mean reward {mean:.3f}" * (K > 1))
    return runs

# ---------------------------------------------------------------- before and after

def show_example(rows, tokenizer, say):
    ids, mask = rows[0]
    marks = ["«" if b > a else "»" if b < a else "" for a, b in zip([0] + mask, mask + [0])]
    text = "".join(m + tokenizer.decode([i]) for m, i in zip(marks, ids)) + marks[-1]
    say("one row; the loss looks at what stands between « and »")
    say("    " + text.rstrip("\n").replace("\n", "\n    "))

@torch.no_grad()
def held_out_loss(model, tokenizer, rows, config):
    total, count = 0.0, 0
    for first in range(0, len(rows), 32):
        ids, real, trained = collate(rows[first:first + 32], tokenizer, config.device)
        total -= token_logps(model, ids, real, trained).sum().item()
        count += trained[:, 1:].sum().item()
    return total / count

def evaluate(model, tokenizer, held, world, config, **versus):
    """-> report card, [(row, answer)]. The world's exam knows what is right; your data has a loss."""
    card = {"held_out": held_out_loss(model, tokenizer, held, config)}
    if world:
        exam, answers = studybuddy.exam(model, tokenizer, seed=config.seed, **versus)
        return exam | card, answers
    prompts = [ids[:mask.index(1)] for ids, mask in held[:4]]
    texts = sample(model, tokenizer, prompts, max_new=config.max_new, temperature=0.0).texts
    rows = [{"prompt": tokenizer.decode(ids), "kind": i} for i, ids in enumerate(prompts)]
    return card, list(zip(rows, texts))

def show_answers(before, after, say):
    """Both answers to the first prompt of each of four kinds."""
    firsts = {}
    for (row, old), (_, new) in zip(before, after):
        firsts.setdefault(row["kind"], (to_messages(row["prompt"])[-1]["content"], old, new))
    for three in list(firsts.values())[:4]:
        for name, text in zip(("prompt", "before", "after"), three):
            text = " ".join(text.split())
            say(f"{name:>8}  {text if len(text) <= 70 else text[:67] + '...'}")

# ---------------------------------------------------------------- training

def fit(model, tokenizer, rows, config, kind, log, teacher=None):
    """The loop of every mode, on rows of (ids, mask). With a teacher: towards its distribution on them."""
    optim = optimizer(model, config.lr, kind)
    stream = batches(rows, config.batch * PROCESSES, torch.Generator().manual_seed(config.seed))
    start, step, tokens = time.time(), 0, 0
    try:
        while step < config.steps:
            for group in optim.param_groups:
                group["lr"] = config.lr * schedule(step, config.steps)

            # 1 batch: all rows of the step (of a small one perhaps none), and how many of their tokens train
            parts = [next(stream)[RANK::PROCESSES] for _ in range(config.accumulate)]
            micro = [collate(part, tokenizer, config.device) for part in parts if part]
            count, total = average(float(sum(trained[:, 1:].sum() for _, _, trained in micro))), 0.0
            for ids, real, trained in micro:                         # (B, T)
                # 2 score: log pi(y_t | y_<t) at the trained tokens, 3 loss
                if teacher is None:
                    loss = sft_loss(token_logps(model, ids, real, trained), trained, count)
                else:
                    at = trained[:, 1:]                          # (B, T-1) position t predicts token t+1
                    with torch.no_grad():
                        target = teacher.head(teacher.hidden(ids, real)[:, :-1][at])      # (N, V)
                    loss = distill_loss(model.head(model.hidden(ids, real)[:, :-1][at]), target, count)
                loss.backward()
                total, tokens = total + loss.item(), tokens + int(real.sum())

            # 4 step
            clip(model)
            optim.step()
            optim.zero_grad()

            # 5 log
            seconds = average(time.time() - start).item()
            log(step, loss=total, trained=int(count), tok_s=round(tokens / seconds))
            step += 1
            if config.pretrain:  # behind the clock: skip ahead, so that the learning rate still ends at 0
                step = max(step, int(config.steps * seconds / (60 * config.minutes)))
    except KeyboardInterrupt:
        print(f"\nstopped at step {step} of {config.steps}: going on with what there is")

def train(config):
    started, say = time.time(), (lambda *_: None) if config.quiet else print
    mode = ("pretrain" if config.pretrain else "distill" if config.teacher else
            "best_of" if config.best_of else "lora" if config.lora else "sft")
    init, data, out, steps, batch, lr, kind, target = MODES[mode]
    world = config.data in ("", data)                    # on your own data the exam would make no sense
    config = replace(config, init=config.init or init, data=config.data or data, out=config.out or out,
                     steps=config.steps or steps, batch=config.batch or batch, lr=config.lr or lr)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    teacher = None
    if mode == "pretrain":
        tokenizer = studybuddy.load_ranks()
        model = Transformer(ModelConfig(vocab_size=tokenizer.n_vocab)).to(config.device)
    else:
        if config.init == "out/sft":
            need("out/sft", "python sft.py", 25)
        model, tokenizer = load(config.init, config.device)
    if mode == "distill":
        teacher, teachers = load(config.teacher, config.device)
        if config.distill not in ("samples", "logits"):
            raise UserError(f"--distill {config.distill}: choose samples or logits")
        if config.distill == "logits" and teachers._mergeable_ranks != tokenizer._mergeable_ranks:
            raise UserError(f"--distill logits: {config.teacher} has another vocabulary than {config.init}")
    size = sum(p.numel() for p in model.parameters())
    say(f"{mode}: {config.init or 'a fresh model'}, {size:,} parameters, on {config.device}")

    # What to train on. The last run is the one to keep; rejection sampling has its control before it.
    if mode == "pretrain":
        if not Path(config.data).is_file():
            raise UserError(f"{config.data}: no such file")
        texts = studybuddy.web_stream(config.documents) if world else \
            Path(config.data).read_text(encoding="utf-8").strip().split("\n\n")
        runs = {"base": documents(texts, tokenizer, model.config.max_len)}
    else:
        if mode == "best_of":
            picks = {"random": pick_random, "best": pick_best}
            runs = answers_of(model, tokenizer, picks, config, generator, say)
        elif mode == "distill":
            runs = answers_of(teacher, teachers, {"student": pick_best}, config, generator, say)
        else:
            runs = {mode: read_conversations(config.data)}
        runs = {k: examples(chats, tokenizer, model.config.max_len, config.cut) for k, chats in runs.items()}
    keep = list(runs)[-1]
    every = max(20, len(runs[keep]) // 256)
    held = runs[keep][::every]
    runs = {name: [row for i, row in enumerate(rows) if i % every] for name, rows in runs.items()}
    if not runs[keep]:
        raise UserError(f"{config.data}: one row is held out, so at least 2 are needed")

    # BEFORE
    show_example(runs[keep], tokenizer, say)
    fresh, versus = mode == "pretrain", {}
    before, old = evaluate(model, tokenizer, held, world and not fresh, config)
    if mode == "best_of" and world:                   # how far from the SFT model, and how often better?
        versus = {"reference": model, "against": old}
    say(f"{len(runs[keep]):,} rows; loss on {len(held)} held-out ones {before['held_out']:.3f}"
        + f" (a fresh model guesses: ln {tokenizer.n_vocab} = {math.log(tokenizer.n_vocab):.3f})" * fresh)
    cards = {"before": before}
    if teacher:
        cards["teacher"], _ = evaluate(teacher, teachers, held, world, config)

    for name, rows in runs.items():
        pupil, log = copy.deepcopy(model), Log(config.steps, config.quiet or name != keep)
        if config.lora:
            say(f"trained parameters: {add_lora(pupil, config.lora):,}")
        fit(pupil, tokenizer, rows, config, kind, log, teacher if config.distill == "logits" else None)
        if config.lora:
            merge_lora(pupil)
        if name == keep and config.save:              # before the exam: whatever happens there, this is safe
            save(config.out, pupil, tokenizer, torch.float16 if fresh else torch.float32)
        cards[name], new = evaluate(pupil, tokenizer, held, world, config, **versus)

    # AFTER
    show_answers(new if fresh else old, new, say)
    if not config.quiet:
        studybuddy.show(cards)
    after, key = cards[keep], "gold" if world and not fresh else "held_out"
    if not world:
        target = before[key]
    elif mode in ("best_of", "distill"):
        target += cards["random" if mode == "best_of" else "teacher"][key]
    passed = after[key] <= target if key == "held_out" else after[key] >= target
    seconds = time.time() - started
    say(f"{'PASS' if passed else 'FAIL'} {key} {before[key]:.2f} -> {after[key]:.2f} (target {target:.2f}) "
        f"in {seconds:.0f} s")
    results = dict(stage=mode, config=asdict(config), seconds=seconds, before=before, after=after,
                   passed=passed, cards=cards)
    if config.save:
        write_results(config.out, log, **results)
    return results | {"model": pupil, "tokenizer": tokenizer, "log": log.rows}

if __name__ == "__main__":
    main(Config, train, __doc__)
