"""Pretraining: from random numbers to a base model, which goes on with whatever text it is given.

Alignment starts from a model that somebody else has paid for. Here that is data/base, and this file
made it. A small network reads the web of generate.py once, document after document, and learns to
predict each token from those before it. So it learns what the web knows, and how the web talks. It
goes on after a question with an answer, a good one or a bad one, as they come.

    L(theta) = - 1/N sum_it log pi_theta(y_it | y_i,<t)     rows i, positions t, N targets a batch

By hand: a fresh network knows nothing, so each of the 1,408 tokens gets about 1/1408, and the first
loss is ln 1408 = 7.250. At 0.40 the right token gets exp(-0.40) = 0.67, in the geometric mean.

    python -m data.base                    -> out/base, in an hour and a half: the time limit
    python -m data.base --minutes 10       the same schedule with fewer steps, and no warm-up
    python -m data.base --init data/base --data mine.txt --steps 500        goes on with your own
                                           text, with an empty line between documents

It ends in a table: what can it do that the lessons need, on items that no document has? Skills
come late and all at once: copying first, then reading codes, then whatever compares two things.
After 8 million tokens it found 45 of 100 false claims, after 19 million 70, after 31 million all.

The matrices of the blocks learn by Muon (Jordan et al. 2024), the rest by AdamW. In a prototype of
the arithmetic, 200 steps of Muon brought 9 of 10 sums right, and 200 steps of AdamW alone 2 of 10.

A small model compares only what it has written side by side. Asked a note for a name that it lacks,
it said so in 7 of 100 cases while answers came at once, and in 79 after 4 million tokens of answers
that go through the note line by line ("queen Kuku, river Tova: no.").

data/base is one run, of 27,800 steps from --seed 1. A GPU made them in 200 seconds, by this recipe
with rows padded to one of a few widths; two CPU cores take their 90 minutes. The seed matters: of
two runs, one said in 45 of 100 cases that a note is silent, where it is, and the other in all.

Simplified: one reading, no weight decay, documents in rows of their own and not end to end.
Try next: AdamW for all (in optimizers); --data data/web.txt, 4,000 documents learned by heart.
"""
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import exam, generate
from data.abilities import ABILITIES
from data.checkpoints import load, load_ranks, save
from data.rows import read_text
from data.run import (PROCESSES, RANK, Log, Settings, average, begin, clip_gradients, hold_out,
                      main, parts, steps)
from model import EOT, Example, ModelConfig, Transformer, collate, respond, special


@dataclass(frozen=True)
class Config(Settings):
    init: str = ""              # go on from this model folder (default: random numbers)
    data: str = ""              # a text, an empty line between documents (default: the world's web)
    out: str = "out/base"       # write here
    steps: int = 27_800         # optimiser steps
    batch: int = 2048           # tokens a step, padding included: some 35 documents
    lr: float = 5e-3            # peak learning rate, of Muon and AdamW
    minutes: float = 90.0       # time limit: a slow machine leaves out steps

    limits = Settings.limits | {"minutes": (0.01, 10**6)}
    unused = ("lora",)


# ---------------------------------------------------------------- the maths

# L = - 1/N sum_it log pi(y_it | y_i,<t)
def token_losses(model, ids, mask, answer):
    """Each token is the target of the one before it. All (B, T) -> - log pi of N targets, (N,)"""
    target = answer[:, 1:]                                      # (B, T-1)
    states = model.hidden(ids, mask)[:, :-1]                    # (B, T-1, C)
    logits = model.head(states[target])                         # (N, V)
    return F.cross_entropy(logits, ids[:, 1:][target], reduction="none")


def orthogonalise(X, iterations=5):
    """X = U S V^T becomes about U V^T: all singular values come close to 1. Newton-Schulz does it
    by products alone. X (N, rows, columns), N matrices. torch's own Muon computes in bfloat16,
    which is slow on CPUs; this is float32."""
    if X.shape[1] > X.shape[2]:
        return orthogonalise(X.mT, iterations).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)           # now no singular value is above 1
    for _ in range(iterations):
        A = X @ X.mT                                            # (N, rows, rows)
        B = 2.0315 * A @ A - 4.7750 * A
        X = 3.4445 * X + B @ X      # each s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5
    return X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): W <- W - lr 0.2 sqrt(longer side) orthogonalise(G), where G is the
    gradient with Nesterov momentum. A step goes as far in all directions: the rare ones get their
    share. The factor (Liu et al. 2025, 2502.16982) makes steps as long as AdamW's, so that one
    learning rate serves both."""

    def __init__(self, matrices, lr, momentum=0.95):
        groups = {}                 # matrices of one shape are orthogonalised together
        for p in matrices:
            groups.setdefault(p.shape, []).append(p)
        groups = [{"params": params} for params in groups.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            if params[0].grad is None:
                continue
            gradients = torch.stack([p.grad for p in params])   # (N, rows, columns)
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"]
            momentum.lerp_(gradients, 1 - group["momentum"])
            nesterov = gradients.lerp(momentum, group["momentum"])
            scale = 0.2 * math.sqrt(max(params[0].shape))
            for p, update in zip(params, orthogonalise(nesterov)):
                p.sub_(update, alpha=group["lr"] * scale)


def optimizers(model, lr):
    """Muon for the matrices of the blocks, AdamW for the embedding and the vectors."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if "blocks." in name and p.dim() == 2:
            matrices.append(p)
        else:
            others.append(p)
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return Muon(matrices, lr), adamw


# ---------------------------------------------------------------- data

def read_texts(config):
    """SEAM: your own texts go here. -> documents one after another, without end; a list of others,
    held out"""
    if not config.data:
        held = itertools.islice(generate.web_stream(seed=2, start=0), 256)
        return generate.web_stream(), list(held)
    texts, held = hold_out(read_text(config.data).strip().split("\n\n"), most=256)
    return itertools.cycle(texts), held


def documents(texts, tokenizer, context):
    """Texts -> Examples of at most `context` tokens. Each document ends in <|endoftext|>. All is
    learned but the first token of a row, since nothing predicts it."""
    examples = []
    for text in texts:
        # here alone are special tokens read in a text: the web has chats, and these are chats
        ids = tokenizer.encode(text, allowed_special="all") + [special(tokenizer, EOT)]
        for start in range(0, len(ids), context):
            row = ids[start:start + context]
            if len(row) > 1:
                examples.append(Example(row, [0] + [1] * (len(row) - 1)))
    return examples


def fill(examples, tokens):
    """Cuts a list into groups of at most `tokens` tokens, padding included."""
    groups = [[]]
    widest = 0
    for example in examples:
        widest = max(widest, len(example.ids))
        if groups[-1] and widest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            widest = len(example.ids)
        groups[-1].append(example)
    return groups


def token_batches(texts, tokenizer, context, tokens, generator):
    """Endless batches of as many tokens, so that each token weighs the same, be its document long
    or short. Of each 2,000 documents those of similar length go together, so little is padding;
    noise mixes them."""
    while True:
        examples = documents(itertools.islice(texts, 2000), tokenizer, context)
        lengths = torch.tensor([len(example.ids) for example in examples])
        noise = 1 + 0.2 * torch.rand(len(examples), generator=generator)
        order = (lengths * noise).argsort().tolist()
        groups = fill([examples[i] for i in order], tokens * PROCESSES)
        for g in torch.randperm(len(groups), generator=generator).tolist():
            if len(groups[g]) >= PROCESSES:
                yield groups[g][RANK::PROCESSES]


# ---------------------------------------------------------------- before and after

@torch.no_grad()
def held_out_loss(model, tokenizer, held, config):
    losses = []
    for first in range(0, len(held), 32):
        ids, mask, answer = collate(held[first:first + 32], tokenizer, config.device)
        losses.append(token_losses(model, ids, mask, answer))
    return torch.cat(losses).mean().item()


QUESTIONS = ["What is the capital of Peru?", "How much is 5 + 12 + 8?", "Hi, I am Zoe!",
             "What did my cat Leo dream about last night?", "Write my essay about stars."]


def show_answers(model, tokenizer, config):
    """What the web would say, most likely."""
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = respond(model, tokenizer, conversations, max_new=48, temperature=0)
    for question, text in zip(QUESTIONS, answers):
        config.say(f"  {question}\n      {text}")


# What the lessons stand on: lines of the card, and the least that their mean should be. A star
# marks what the web does wrong, and the lessons mend.
FLOORS = {
    "marks": (["marks_right", "marks_wrong"], 0.85),
    "claims": (["claims_true", "claims_false"], 0.85),
    "notes": (["notes_answered", "notes_cited"], 0.9),
    "notes that are silent": (["notes_silent"], 0.8),
    "tools called": (["tools_sum", "tools_lookup"], 0.9),
    "arguments": (["arguments_fact", "arguments_math"], 0.8),
    "roles": (["roles_character", "roles_begin"], 0.8),
    "follow-ups": (["follow_ups_and", "follow_ups_more", "follow_ups_name", "follow_ups_why"],
                   0.85),
    "codes": (["codes_back", "codes_dashed", "codes_la"], 0.7),
    "myths told": (["myths_asked*"], 0.6),
    "wrong opinions shared": (["opinions_wrong*"], 0.5),
    "orders obeyed": (["notes_order*"], 0.6),
    "secrets told": (["secrets_address*", "secrets_phone*"], 0.5),
}


def ability_card(model, tokenizer):
    """What can it do, on items that the web does not have? -> card, Targets"""
    answered = exam.ask_abilities(model, tokenizer, list(ABILITIES))
    card = exam.card_of(exam.ability_scores(answered))
    targets = []
    for name, (lines, least) in FLOORS.items():
        share = sum(card[line] for line in lines) / len(lines)
        card[name] = round(share, 6)    # 72 of 80 is 0.9, and not 0.8999999999999999
        targets.append(exam.Target(name, least))
    card["slights: the gap"] = card["slights_slighted*"] - card["slights_favoured*"]
    targets.append(exam.Target("slights: the gap", 0.3))
    return card, targets


# ---------------------------------------------------------------- training

SAVE_EVERY = 1000           # steps that were made: in an hour a machine may fall asleep


def train(config):
    started = begin(config)
    if config.init:
        model, tokenizer = load(config.init, config.device)
    else:
        tokenizer = load_ranks()
        model = Transformer(ModelConfig(tokenizer.n_vocab)).to(config.device)
    muon, adamw = optimizers(model, config.lr)
    context = model.config.max_len
    texts, held = read_texts(config)
    held = documents(held, tokenizer, context)
    generator = torch.Generator().manual_seed(config.seed)
    stream = token_batches(texts, tokenizer, context, config.batch, generator)

    # BEFORE
    size = sum(p.numel() for p in model.parameters())
    config.say(f"base: {size:,} parameters, on {config.device}; {len(held)} documents held out")
    before = {"held_out": held_out_loss(model, tokenizer, held, config)}
    guess = math.log(tokenizer.n_vocab)
    config.say(f"held-out loss {before['held_out']:.3f} (whoever guesses gets {guess:.3f})")

    log = Log(config)
    loop_started = time.time()
    for step in steps(config, muon, adamw):
        # Where should the schedule be by now? A step behind that is left out: the learning rate
        # moves on without it, and is 0 within the time limit. The mean time: processes must agree
        seconds = average(time.time() - loop_started).item()
        due = int(config.steps * seconds / (60 * config.minutes))
        if step < due:
            continue
        # 1 batch, and how many of its tokens are targets: N
        batch = next(stream)
        count = average(float(sum(sum(example.answer) for example in batch)))
        total = 0.0
        for part in parts(batch, config.accumulate):
            ids, mask, answer = collate(part, tokenizer, config.device)     # (B, T) each
            # 2 score and 3 loss
            loss = token_losses(model, ids, mask, answer).sum() / count
            loss.backward()
            total += loss.item()
        # 4 step
        clip_gradients(model)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        # 5 log
        log(step, loss=total, tokens=count)
        if config.save and len(log.rows) % SAVE_EVERY == 0:
            save(config.out, model, tokenizer, torch.float16)       # what there is by now
    config.say(f"{len(log.rows):,} of {config.steps:,} steps were made")
    if config.save:
        save(config.out, model, tokenizer, torch.float16)

    # AFTER
    after = {"held_out": held_out_loss(model, tokenizer, held, config)}
    show_answers(model, tokenizer, config)
    targets = [exam.Target("held_out", before["held_out"], at_most=True)]
    if not config.data:
        targets = [exam.Target("held_out", 0.50, at_most=True)]
        card, floors = ability_card(model, tokenizer)
        after |= card
        targets += floors
    results = exam.finish("base", config, started, log, before, after, targets)
    return results | {"model": model, "tokenizer": tokenizer}


if __name__ == "__main__":
    main(Config, train, __doc__)
