"""The network that all scripts share, and, below a line, how a script runs.

It is Llama's network, and so SmolLM2's, Qwen2.5's and TinyLlama's. Tokens become vectors x. Each
layer adds to them what attention gathers from earlier tokens, then what an MLP computes from each
token. The last vectors are turned into a score for every token of the vocabulary:

    x = x + Attention(RMSNorm(x))                  softmax(q k^T / sqrt(D)) v
    x = x + MLP(RMSNorm(x))                        W_down (silu(W_gate x) * W_up x)
    logits = W_vocab RMSNorm(x)

One class runs the toy of 0.9M parameters in data/base and the real models that people align today.
Left out: dropout (an answer must be as likely in training as it was when sampled), and every other
architecture.

    python model.py out/sft out/dpo          talk to trained models, side by side

The first half, the network, is meant to be read through. The second, from "how a script runs" on,
is for whoever changes that.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

# ---------------------------------------------------------------- the network
# B batch, T time, C channels, V vocabulary; H query heads, K key heads, D channels of a head;
# S tokens so far: the T new ones and those in the cache, if there is one


@dataclasses.dataclass
class ModelConfig:
    vocab_size: int
    d_model: int = 128              # C
    n_layers: int = 4
    n_heads: int = 4                # H
    n_kv_heads: int = 2             # K: each serves H / K query heads
    d_ff: int = 352                 # width inside the MLP
    head_dim: int = None            # D, where it is not C / H
    max_len: int = 256              # the longest text that fits
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # Llama 3's longer context
    norm_eps: float = 1e-5
    tie: bool = True                # embedding and output projection are one matrix
    qkv_bias: bool = False          # Qwen2 has one

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim = self.d_model // self.n_heads


def rotary_speeds(config):
    """How far channel pair i turns from one position to the next: theta^(-2i/D). -> (D/2,)"""
    i = torch.arange(0, config.head_dim, 2, device="cpu")
    speed = config.rope_theta ** -(i / config.head_dim)
    scaling = config.rope_scaling
    if scaling:                     # Llama 3: only the slow pairs become slower still
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        rounds = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        keep = ((rounds - low) / (high - low)).clamp(0, 1)
        speed = speed * (keep + (1 - keep) / scaling["factor"])
    return speed


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by the angle of its position. x (B, heads, T, D)"""
    a, b = x.chunk(2, dim=-1)                                   # (B, heads, T, D/2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attention_mask(mask, T):
    """Which of S tokens may each of the newest T look at? At itself and at the real ones before
    it. mask (B, S), True at real tokens -> (B, 1, T, S), or None where no mask is needed: with
    nothing padded on the left, and all tokens new (plain causal attention) or just one (it sees
    them all)."""
    S = mask.shape[1]
    if mask[:, 0].all() and T in (1, S):
        return None     # padding on the right comes later than any real token
    key = torch.arange(S, device=mask.device)                   # (S,) positions
    query = key[S - T:, None]                                   # (T, 1)
    earlier = key <= query                                      # (T, S)
    itself = key == query
    # padding on the left sees nothing, and a softmax over nothing is nan; so it sees itself
    return (mask[:, None, None, :] & earlier) | itself          # (B, 1, T, S)


def attend(q, k, v, allowed):
    """softmax(q k^T / sqrt(D)) v.   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)"""
    B, H, T, D = q.shape
    if T > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                              enable_gqa=H != k.shape[1])
    # One token, as in sampling: two plain products are faster. The query heads of a group stand
    # where time was, and share their keys.
    q = q.reshape(B, k.shape[1], -1, D)                         # (B, K, H/K, D)
    scores = q @ k.mT * D ** -0.5                               # (B, K, H/K, S)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).view(B, H, 1, D)


class Cache:
    """The keys and values of the tokens so far: only what is new has to be computed.
    For each layer a tensor (2, B, K, room, D), of which `length` places are filled."""

    def __init__(self, room):
        self.room = room
        self.length = 0
        self.layers = {}

    def add(self, layer, k, v):
        """k, v (B, K, T, D) of T new tokens -> (B, K, S, D) of all S"""
        B, K, T, D = k.shape
        if self.length == 0:
            self.layers[layer] = k.new_empty(2, B, K, self.room, D)
        S = self.length + T
        filled = self.layers[layer][:, :, :, :S]                # (2, B, K, S, D)
        filled[0, :, :, self.length:] = k
        filled[1, :, :, self.length:] = v
        return filled[0], filled[1]

    def select(self, rows):
        """Keep, repeat or reorder rows: their numbers, or True at those to keep."""
        for layer, tensor in self.layers.items():
            self.layers[layer] = tensor[:, rows]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.d_model, config.head_dim
        self.layer = layer
        self.head_dim = D
        self.q = nn.Linear(C, config.n_heads * D, bias=config.qkv_bias)
        self.k = nn.Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.v = nn.Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_heads * D, C, bias=False)

    def forward(self, x, cos, sin, allowed, cache):
        B, T, _ = x.shape
        D = self.head_dim
        q = self.q(x).view(B, T, -1, D).transpose(1, 2)         # (B, H, T, D)
        k = self.k(x).view(B, T, -1, D).transpose(1, 2)         # (B, K, T, D)
        v = self.v(x).view(B, T, -1, D).transpose(1, 2)         # (B, K, T, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)                  # (B, K, S, D), of all tokens so far
        y = attend(q, k, v, allowed)                            # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)                 # (B, T, H * D)
        return self.out(y)                                      # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))     # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, allowed, cache):
        x = x + self.attention(self.norm1(x), cos, sin, allowed, cache)
        x = x + self.mlp(self.norm2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.speeds = rotary_speeds(config)
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembed = None
        if not config.tie:
            self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            if name.endswith(("out.weight", "down.weight")):
                # what is added to x in every layer starts smaller, as in GPT-2
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, ids, mask=None):
        """ids (B, T) -> logits (B, T, V): at each position, of the token that comes next."""
        return self.head(self.hidden(ids, mask))

    def hidden(self, ids, mask=None, cache=None):
        """ids (B, T) -> (B, T, C). mask (B, T) is True at real tokens; padding may be on either
        side. With a cache, ids are the newest T of S tokens, and mask (B, S) covers all S."""
        B, T = ids.shape
        S = T if cache is None else cache.length + T
        if S > self.config.max_len:
            raise UserError(f"{S} tokens do not fit the model's context of {self.config.max_len}")
        if mask is None:
            mask = torch.ones(B, S, dtype=torch.bool, device=ids.device)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, S - T:]  # (B, T), 0 at the first real token
        angle = position[:, :, None] * self.speeds.to(ids.device)  # (B, T, D/2)
        angle = torch.cat([angle, angle], dim=-1)[:, None]      # (B, 1, T, D), for all heads
        x = self.embed(ids)                                     # (B, T, C)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        allowed = attention_mask(mask, T)
        with low_precision(ids.device):
            for block in self.blocks:
                x = block(x, cos, sin, allowed, cache)
        if cache is not None:
            cache.length = S        # now that every layer has added its own
        return self.norm(x)

    def head(self, hidden):
        """(.., C) -> logits (.., V)"""
        matrix = self.embed if self.unembed is None else self.unembed
        return F.linear(hidden, matrix.weight)


class ScalarModel(nn.Module):
    """The same network with one number, or k, at every position: reward models, critics."""

    def __init__(self, transformer, k=1):
        super().__init__()
        self.config = transformer.config
        self.transformer = transformer
        self.score = nn.Linear(self.config.d_model, k, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.config.d_model + 1))
        self.register_buffer("mean", torch.zeros(k))    # subtracted: an average answer scores 0

    def forward(self, ids, mask=None):
        scores = self.score(self.transformer.hidden(ids, mask)) - self.mean  # (B, T, k)
        return scores[..., 0] if len(self.mean) == 1 else scores


def end_scores(model, ids, mask):
    """What a ScalarModel says of a text: its number at the last real token. -> (B,) or (B, k)"""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # (B,)
    rows = torch.arange(len(ids), device=ids.device)
    return model(ids, mask)[rows, last]                         # (B, T) -> (B,)


# ---------------------------------------------------------------- chat format
# ChatML, as in SmolLM2 and Qwen (a tokenizer is a tiktoken.Encoding everywhere):
#     <|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n

EOT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"


class Example(NamedTuple):
    ids: list                # the tokens of a prompt and of an answer
    answer: list             # 1 at the answer's tokens and at its <|im_end|>, 0 elsewhere


def special(tokenizer, token):
    """A special token's id. <|endoftext|> stands in for <|pad|>, which most vocabularies lack."""
    ids = tokenizer._special_tokens
    if token == PAD and PAD not in ids and EOT in ids:
        token = EOT
    if token not in ids:
        raise UserError(f"{tokenizer.name}: no {token} in its vocabulary; the chat format needs it")
    return ids[token]


def render(tokenizer, messages):
    """A conversation -> Example. Marked are the assistant's words and the <|im_end|> that closes
    them. A message is ordinary text: who types <|im_end|> gets plain characters, never the
    token."""
    encode = tokenizer.encode_ordinary
    ids, marks = [], []
    for message in messages:
        is_answer = message["role"] == "assistant"
        before = message["role"] + "\n"
        words = message["content"]
        if not is_answer:
            before = before + words
            words = ""
        # an answer is encoded apart from what is before it, as in sampling, so no token spans both
        head = [special(tokenizer, START)] + encode(before)
        body = encode(words) + [special(tokenizer, END)]
        newline = encode("\n")
        ids += head + body + newline
        marks += [0] * len(head) + [int(is_answer)] * len(body) + [0] * len(newline)
    return Example(ids, marks)


def render_prompt(tokenizer, messages):
    """A conversation -> ids that end where the assistant's answer begins."""
    start = [special(tokenizer, START)] + tokenizer.encode_ordinary("assistant\n")
    return render(tokenizer, messages).ids + start


def render_answer(tokenizer, messages, text):
    """A conversation and one answer to it -> Example, in which that answer alone is marked."""
    prompt = render_prompt(tokenizer, messages)
    body = tokenizer.encode_ordinary(text) + [special(tokenizer, END)]
    return Example(prompt + body, [0] * len(prompt) + [1] * len(body))


def pad(rows, value, left=False):
    """Lists of unequal length -> (B, T)"""
    T = max(len(row) for row in rows)
    padded = []
    for row in rows:
        fill = [value] * (T - len(row))
        padded.append(fill + row if left else row + fill)
    return torch.tensor(padded)


def collate(examples, tokenizer, device):
    """Examples -> ids, mask, answer, each (B, T), padded on the right. mask is True at real tokens,
    answer at those that the loss looks at."""
    rows, real, marks = [], [], []
    for example in examples:
        rows.append(example.ids)
        real.append([1] * len(example.ids))
        marks.append(example.answer)
    ids = pad(rows, special(tokenizer, PAD)).to(device)
    mask = pad(real, 0).bool().to(device)
    answer = pad(marks, 0).bool().to(device)
    return ids, mask, answer


# ---------------------------------------------------------------- log-probs

def token_logps(model, ids, mask, answer, temperature=1.0):
    """log pi(y_t | x, y_<t) at the answers' tokens, exactly 0 elsewhere. All (B, T).

    The logits at t - 1 are about the token at t, so one is shifted against the other. In plain
    words:

        logps = (model(ids, mask)[:, :-1] / temperature).log_softmax(-1)            (B, T-1, V)
        logps = logps.gather(2, ids[:, 1:, None])[..., 0]                           (B, T-1)
        logps = F.pad(logps, (1, 0)).masked_fill(~answer, 0)                        (B, T)

    The code does the same with less work: only positions that are needed meet the vocabulary, and
    a prompt that several rows share goes through the network once (states_before). Give it the
    temperature that sampled the answers, or it scores another policy than the one that acted.
    """
    states = states_before(model, ids, mask, answer)            # (N, C), of N answer tokens
    logps = (model.head(states) / temperature).log_softmax(-1)  # (N, V)
    logps = logps.gather(1, ids[answer][:, None])[:, 0]         # (N,)
    return logps.new_zeros(ids.shape).masked_scatter(answer, logps)  # (B, T)


def states_before(model, ids, mask, answer):
    """The hidden state that predicts each answer token, at the token before it. -> (N, C)
    In plain words: model.hidden(ids, mask)[:, :-1][answer[:, 1:]]"""
    P = int(answer.any(0).int().argmax())       # the first column in which any answer has a token
    prompts = ids.where(mask, -1)[:, :P]                        # (B, P), -1 at padding
    if P == 0 or 2 * len(prompts.unique(dim=0)) > len(ids):
        hidden = model.hidden(ids, mask)        # sharing pays from two rows a prompt on
        return hidden[:, :-1][answer[:, 1:]]
    prompts, owner = prompts.unique(dim=0, return_inverse=True)     # (U, P), (B,) whose is which
    cache = Cache(ids.shape[1])
    shared = model.hidden(prompts.clamp(min=0), prompts >= 0, cache)  # (U, P, C)
    cache.select(owner)         # a copy for each row; gradients flow back through it
    own = model.hidden(ids[:, P:], mask, cache)                 # (B, T-P, C)
    last = shared[owner, -1:]                                   # (B, 1, C)
    hidden = torch.cat([last, own[:, :-1]], dim=1)              # (B, T-P, C), t - 1 for t
    return hidden[answer[:, P:]]


# ---------------------------------------------------------------- sampling

class Samples(NamedTuple):
    ids: torch.Tensor        # (B, T) prompts padded on the left, answers on the right
    mask: torch.Tensor       # (B, T) True at real tokens
    answer: torch.Tensor     # (B, T) True at an answer's tokens and its <|im_end|>
    logps: torch.Tensor      # (B, T) their log-probs at this temperature, 0 elsewhere
    ended: torch.Tensor      # (B,) False where an answer ran out of room
    texts: list              # B answers


@torch.no_grad()
@parametrize.cached()        # adapters are added to their matrices once, not at every token
def sample(model, tokenizer, prompts, n=1, max_new=64, temperature=1.0, top_k=0, top_p=1.0,
           generator=None, batch=256):
    """n answers to each prompt (ids), in the order p0 a0, p0 a1, .. p1 a0, .. With temperature 0
    each token is the likeliest."""
    P = max(len(prompt) for prompt in prompts)
    if P + max_new > model.config.max_len:
        raise UserError(f"a prompt of {P} tokens and {max_new} new ones do not fit the context of "
                        f"{model.config.max_len}")
    device = model.embed.weight.device
    end = special(tokenizer, END)
    blank = special(tokenizer, PAD)
    ids = pad(prompts, blank, left=True).to(device)             # (prompts, P)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True)
    mask = mask.bool().to(device)                               # (prompts, P)
    ids = ids.repeat_interleave(n, 0)                           # (B, P)
    mask = mask.repeat_interleave(n, 0)
    drawn = []
    for rows in torch.arange(len(ids), device=device).split(batch):
        drawn.append(continue_rows(model, ids[rows], mask[rows], max_new, end, temperature, top_k,
                                   top_p, generator))
    tokens = torch.cat([tokens for tokens, _ in drawn])         # (B, max_new)
    logps = torch.cat([logps for _, logps in drawn])            # (B, max_new)
    stops = tokens == end
    answer = stops.cumsum(1) - stops.long() == 0    # True up to and including the first end token
    T = int(answer.sum(1).max())
    tokens = tokens[:, :T]
    answer = answer[:, :T]
    logps = logps[:, :T].masked_fill(~answer, 0.0)
    words = answer & (tokens != end)
    texts = []
    for row, keep in zip(tokens.cpu(), words.cpu()):
        text = tokenizer.decode(row[keep].tolist())
        texts.append(text.strip())
    tokens = tokens.masked_fill(~answer, blank)
    ids = torch.cat([ids, tokens], 1)                                       # (B, P+T)
    mask = torch.cat([mask, answer], 1)
    answer = F.pad(answer, (P, 0))
    logps = F.pad(logps, (P, 0))
    return Samples(ids, mask, answer, logps, ended=stops.any(1), texts=texts)


def continue_rows(model, ids, mask, max_new, end, temperature, top_k, top_p, generator):
    """Token by token. ids, mask (B, P) -> tokens, log-probs, (B, max_new) each."""
    B, P = ids.shape
    tokens = torch.full((B, max_new), end, device=ids.device)
    logps = torch.zeros(B, max_new, device=ids.device)
    hidden = torch.inference_mode()(model.hidden)               # quicker than no_grad
    prompts, owner = ids.where(mask, -1).unique(dim=0, return_inverse=True)
    cache = Cache(P + max_new)
    state = hidden(prompts.clamp(min=0), prompts >= 0, cache)[owner, -1]  # (B, C)
    cache.select(owner)                             # a prompt goes through once, whoever shares it
    mask = F.pad(mask, (0, max_new), value=True)                # (B, P + max_new)
    rows = torch.arange(B, device=ids.device)       # those still going
    for t in range(max_new):
        logits = model.head(state)                              # (rows, V)
        if temperature == 0:
            token = logits.argmax(-1)                           # (rows,)
            probs = logits.softmax(-1)
        else:
            probs = (logits / temperature).softmax(-1)
            token = draw(probs, top_k, top_p, generator)
        tokens[rows, t] = token
        logps[rows, t] = probs.gather(1, token[:, None])[:, 0].log()
        going = (tokens[rows, :t + 1] != end).all(1)            # (rows,)
        if t + 1 == max_new or not going.any():
            break
        if going.float().mean() < 0.7:              # drop those that have ended, not one by one
            rows = rows[going]
            token = token[going]
            cache.select(going)
        state = hidden(token[:, None], mask[rows, :P + t + 1], cache)[:, 0]  # (rows, C)
    return tokens, logps


def draw(probs, top_k, top_p, generator):
    """A token a row: a dart thrown at the probabilities laid end to end. (B, V) -> (B,)"""
    if top_k or top_p < 1:
        sorted_probs, order = probs.sort(descending=True)       # (B, V), likeliest first
        before = sorted_probs.cumsum(-1) - sorted_probs         # (B, V), of all likelier ones
        keep = before < top_p
        if top_k:
            keep[:, top_k:] = False
        probs = torch.zeros_like(probs).scatter(1, order, sorted_probs * keep)
    line = probs.cumsum(-1)
    dart = torch.rand(len(line), 1, generator=generator).to(line.device) * line[:, -1:]
    token = torch.searchsorted(line, dart, right=True)[:, 0]    # never one of probability 0
    return token.clamp(max=line.shape[1] - 1)                   # rounding may land behind the end


def respond(model, tokenizer, conversations, **settings):
    """Answers to conversations (lists of messages) -> texts"""
    prompts = [render_prompt(tokenizer, messages) for messages in conversations]
    return sample(model, tokenizer, prompts, **settings).texts


# ================================================================ how a script runs
#
#     @dataclass(frozen=True)
#     class Config(Settings):
#         beta: float = 0.1                           # what --help says of it
#
#     def train(config):
#         started = begin(config)
#         model, tokenizer = load(config.init)        # data/checkpoints.py
#         optimizer = adamw(model, config.lr)
#         stream = batches(rows, lengths, config.batch, generator)
#         log = Log(config)
#         for step in steps(config, optimizer):
#             batch = next(stream)
#             for part in parts(batch, config.accumulate):
#                 (loss_of(part).sum() / len(batch)).backward()
#             clip_gradients(model)
#             optimizer.step()
#             optimizer.zero_grad()
#             log(step, loss=...)
#         save(config.out, model, tokenizer)
#
#     if __name__ == "__main__":
#         main(Config, train, __doc__)

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc gives large tensors back to the kernel, and the next one pays a page fault every 4 kB
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 30)


class UserError(Exception):
    """Bad input: main() prints its one line and exits 2."""


class Diverged(Exception):
    """Training had to stop, for instance at a loss of nan: main() exits 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every script can be told. A script's Config adds its own, and changes some defaults."""
    init: str = "out/sft"        # start from this model folder
    data: str = ""               # learn from these JSON lines
    out: str = ""                # write here
    steps: int = 100             # optimiser steps
    batch: int = 32              # rows a step
    accumulate: int = 1          # pieces that a batch is cut into, to save memory
    lr: float = 1e-3             # peak learning rate
    lora: int = 0                # train adapters of this rank (0: train the weights)
    seed: int = 0                # same seed, same machine: same numbers
    device: str = "cpu"          # cpu, cuda or mps
    bf16: bool = False           # products in bfloat16, as on any GPU; some processors have it
    save: bool = True            # write the checkpoint and the results
    quiet: bool = False          # print nothing

    # allowed ranges; any other number is at least 0. A Config adds: limits = Settings.limits | {..}
    limits = {"steps": (1, 10**9), "batch": (1, 10**6), "accumulate": (1, 10**6),
              "seed": (0, 2**63 - 1), "lora": (0, 10**4)}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least, most = self.limits.get(field.name, (0, math.inf))
            if isinstance(value, str) or value is None:
                continue
            if not (least <= value <= most and math.isfinite(value)):
                upto = "" if most == math.inf else f" and at most {most}"
                flag = field.name.replace("_", "-")
                raise UserError(f"--{flag} {value}: want a number of at least {least}{upto}")

    def say(self, text=""):
        if not self.quiet:
            print(text, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(Config, doc, argv=None):
    """Command-line flags -> a Config. The comment behind each field is its help."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):         # all that it inherits from, but object
        comments |= dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(cls), re.M))
    shared = {field.name for field in dataclasses.fields(Settings)}
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False, usage="%(prog)s [settings]")
    own = parser.add_argument_group("its own settings")
    common = parser.add_argument_group("settings of every script")
    for field in dataclasses.fields(Config):
        group = common if field.name in shared else own
        text = comments.get(field.name, "")
        if field.default not in (None, ""):
            text += f" ({field.default})"
        names = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*names, default=field.default, help=text.replace("%", "%%"), **kind)
    return Config(**vars(parser.parse_args(argv)))


def main(Config, train, doc):
    with exit_codes():
        config = parse(Config, doc)
        if PROCESSES > 1:
            config = meet(config)
        train(config)
        if PROCESSES > 1:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def exit_codes():
    """2 for bad input, 1 for a run that had to stop, 130 for Ctrl-C outside of a loop."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, EOFError):
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # python dpo.py | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def begin(config):
    """The first line of every train(): seeds, and makes sure that --out can be written, before any
    work is done. -> the time, to tell later how long it took"""
    torch.manual_seed(config.seed)
    BF16.discard("cpu")
    if config.bf16:
        BF16.add("cpu")
        if config.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            config.say("--bf16: this processor has no instructions for it, so it will be slow")
    if config.save:
        try:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            with open(Path(config.out, ".can-be-written"), "w"):
                pass
            os.remove(Path(config.out, ".can-be-written"))
        except OSError as error:
            raise UserError(f"--out {config.out}: cannot write there ({error.strerror})") from None
    return time.time()


BF16 = {"cuda"}              # devices whose products are in bfloat16


def low_precision(device):
    """Only the blocks compute in bfloat16. Weights, gradients, logits and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16)


def need(folder, command, seconds):
    """Where the default checkpoint of an earlier stage is missing, run that stage as a program."""
    script, *flags = shlex.split(command)[1:]
    is_default = Path(folder) == Path("out", Path(script).stem)  # else load() will complain
    is_there = Path(folder, "config.json").exists()
    if is_default and not is_there and RANK == 0:
        print(f'{folder} not found: running "{command}" first, about {seconds} seconds', flush=True)
        alone = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
        program = [sys.executable, Path(__file__).parent / script, *flags]
        if subprocess.run(program, env=alone).returncode != 0:
            raise UserError(f'"{command}" failed')
    average(0.0)                                  # other processes wait here for the first


# ---------------------------------------------------------------- the parts of a loop

def batches(rows, lengths, size, generator):
    """Endless batches of `size` rows. Rows of similar length go together, so that little is
    padding, and noise mixes them a little; without lengths all are mixed. What fills no batch is
    left out of this round."""
    size = min(size * PROCESSES, len(rows) // PROCESSES * PROCESSES)  # of all processes together
    if size == 0:
        raise UserError(f"{len(rows)} rows are too few for {PROCESSES} processes")
    while True:
        order = torch.randperm(len(rows), generator=generator)
        order = order[:len(rows) // size * size]
        if lengths is not None:
            noise = 1 + 0.1 * torch.rand(len(order), generator=generator)
            order = order[(torch.tensor(lengths)[order] * noise).argsort()]
        groups = order.view(-1, size)                           # (batches, size)
        for g in torch.randperm(len(groups), generator=generator):
            yield [rows[i] for i in groups[g][RANK::PROCESSES]]


def hold_out(rows, most=128):
    """Every k-th row is held out: a quarter of few rows, about `most` of many. -> rows to learn
    from, rows held out"""
    if len(rows) < 2:
        raise UserError(f"{len(rows)} rows: want at least 2, as one is held out")
    every = max(2, min(len(rows), max(4, len(rows) // most)))
    train = [row for i, row in enumerate(rows) if i % every != 0]
    return train, rows[::every]


def parts(rows, n):
    """Rows in at most n lists, to go through the network one after the other. Divide each part's
    summed loss by the number of all rows: then the gradients add up to those of the batch."""
    size = math.ceil(len(rows) / n)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def adamw(model, lr):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def schedule(step, steps, warmup=10):
    """The learning rate's factor: up in a few steps, then down to 0 in a straight line."""
    return min((step + 1) / warmup, 1 - step / steps)


def steps(config, *optimizers):
    """for step in steps(config, optimizer): sets the learning rate and shows the time left.
    Ctrl-C finishes this step and ends the loop, so that the script goes on to save; a second one
    aborts."""
    start = time.time()
    stop = []
    old = signal.getsignal(signal.SIGINT)

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, old)
        stop.append(True)

    with contextlib.suppress(ValueError):         # only the main thread may listen
        signal.signal(signal.SIGINT, interrupt)
    try:
        for step in range(config.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * schedule(step, config.steps)
            yield step
            if average(float(len(stop))) > 0:     # all processes leave together
                config.say(f"\nstopped at step {step + 1} of {config.steps}; going on with it")
                return
            left = (time.time() - start) / (step + 1) * (config.steps - step - 1)
            if sys.stdout.isatty() and not config.quiet:
                print(f"\r{step + 1:5} of {config.steps}, {left:.0f} s left ", end="", flush=True)
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, old)
        if sys.stdout.isatty() and not config.quiet:
            print("\r\x1b[K", end="", flush=True)


def clip_gradients(model):
    """Gradients become their mean over all processes, and no longer than 1. -> their length"""
    for p in model.parameters():
        if PROCESSES > 1 and p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = average(gradient)
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class Log:
    """Keeps every step's numbers in rows, and prints at most 20 lines of the first 7. A loss that
    is not finite stops the run."""

    def __init__(self, config):
        self.config = config
        self.rows = []

    def __call__(self, step, **numbers):
        values = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
        values = average(values).tolist()
        row = {"step": step}
        row |= dict(zip(numbers, values))
        if not math.isfinite(row.get("loss", 0.0)):
            raise Diverged(f"step {step}: the loss is {row['loss']}")
        self.rows.append(row)
        every = math.ceil(self.config.steps / 19)
        is_last = step == self.config.steps - 1
        if not self.config.quiet and (step % every == 0 or is_last):
            self.show(row)

    def show(self, row):
        names = list(row)[1:8]
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        if len(self.rows) == 1:
            print(f"{clear} step" + "".join(f"{name[:9]:>10}" for name in names))
        line = f"{clear}{row['step']:5}"
        for name in names:
            decimals = 4 if abs(row[name]) < 100 else 1
            line += f"{row[name]:10.{decimals}f}"
        print(line, flush=True)


# ---------------------------------------------------------------- adapters

class LoRA(nn.Module):
    """Hu et al. 2021 (2106.09685): W + 2 B A. W is frozen, A (rank, in) random, B (out, rank) 0, so
    that nothing changes before the first step."""

    def __init__(self, W, rank):
        super().__init__()
        rows, columns = W.shape
        self.A = nn.Parameter(W.new_empty(rank, columns).normal_() / math.sqrt(columns))
        self.B = nn.Parameter(W.new_zeros(rows, rank))

    def forward(self, W):
        return W + 2 * self.B @ self.A


def add_lora(model, rank):
    """Freeze all but a new scalar head, and give every matrix of the blocks an adapter."""
    if rank == 0:
        return
    if rank > model.config.d_model:
        raise UserError(f"--lora {rank}: want at most the model's width, {model.config.d_model}")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name:
            parametrize.register_parametrization(module, "weight", LoRA(module.weight, rank))


def merge_lora(model):
    """W becomes W + 2 B A: an ordinary model again, which can be saved."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    model.requires_grad_(True)


# ---------------------------------------------------------------- more processes
#     torchrun --nproc_per_node=2 dpo.py
# Each process takes --batch rows of its own, and all learn from the
# mean of their gradients, so two with --batch 32 are one with --batch 64. In RL each has its own
# prompts and random numbers, and means over a batch (whitening, baselines) are over its own. Only
# the first one prints and writes.

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def meet(config):
    """Join the other processes. -> a Config with which only the first one prints and writes"""
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend)
    if RANK == 0:
        return config
    sys.stdout = open(os.devnull, "w")
    return dataclasses.replace(config, save=False)


def portion(rows):
    """This process's share of the rows."""
    if len(rows) < PROCESSES:
        raise UserError(f"{len(rows)} rows are too few for {PROCESSES} processes")
    return rows[RANK::PROCESSES]


def average(x):
    """A number or a tensor of floats -> its mean over all processes (a tensor changes in place)."""
    x = torch.as_tensor(x)
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
        x /= PROCESSES
    return x


# ---------------------------------------------------------------- the chat

def chat(folders):
    from data.checkpoints import load
    models = {folder: load(folder) for folder in folders}
    histories = {folder: [] for folder in folders}
    while text := input("you> "):                 # an empty line ends it
        for folder, (model, tokenizer) in models.items():
            history = histories[folder]
            history.append({"role": "user", "content": text})
            reply = respond(model, tokenizer, [history], temperature=0.7)[0]
            history.append({"role": "assistant", "content": reply})
            print(f"{folder}> {reply}")


if __name__ == "__main__":
    import model        # data/ raises model.UserError; that of __main__ would be another class
    with model.exit_codes():
        if len(sys.argv) == 1 or "--help" in sys.argv:
            print(__doc__)
        else:
            model.chat(sys.argv[1:])
