"""The network that all scripts share, the chat format, log-probs and sampling.

It is Llama's network, and so SmolLM2's, Qwen2.5's and TinyLlama's. Tokens become vectors x. Each
layer adds to them what attention gathers from earlier tokens, then what an MLP computes from each
token. The last vectors are turned into a score for every token of the vocabulary:

    x = x + Attention(RMSNorm(x))                  softmax(q k^T / sqrt(D)) v
    x = x + MLP(RMSNorm(x))                        W_down (silu(W_gate x) * W_up x)
    logits = W_vocab RMSNorm(x)

Before their product q and k are turned, each by an angle that grows with its position; so attention
sees how far apart two tokens are. One class runs the toy of 0.9M parameters in data/base and the
real models that people align today. Left out: dropout (an answer must be as likely in training as
it was when sampled), and every other architecture.

    python model.py out/sft out/dpo          talk to trained models, side by side
"""
import dataclasses
import math
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize


class UserError(Exception):
    """Bad input: data/run.py prints its one line and exits 2."""


# ---------------------------------------------------------------- the network
# B batch, T time, C channels, V vocabulary; H query heads, K key heads, D channels of a head;
# S tokens so far: the T new ones and those in the cache, if there is one
# U of the B * T tokens are computed: one that rows share once, padding not at all (Layout)
# cos, sin (U, 1, D): of the angle of each position; allowed (B, 1, T, S): who may look at whom
# ask, in the last layer: q may be of one token of each row alone; then its U is B, and its T is 1


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
    i = torch.arange(config.head_dim // 2)
    speed = config.rope_theta ** (-2 * i / config.head_dim)
    scaling = config.rope_scaling
    if scaling:                     # Llama 3: only the slow pairs become slower still
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        rounds = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        keep = ((rounds - low) / (high - low)).clamp(0, 1)
        speed = speed * (keep + (1 - keep) / scaling["factor"])
    return speed


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by the angle of its position. x (U, heads, D)"""
    a, b = x.chunk(2, dim=-1)                                   # (U, heads, D/2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Layout(NamedTuple):
    """What becomes of a token depends on itself and on those before it. So as long as rows are
    alike from their start, like answers to one prompt, their tokens are computed once; and padding
    never. After rows have parted equal words are different tokens, for they have different pasts.
    (Here the words' ids are in the order of the alphabet.)

        The sky is blue             number  0 1 2 3             place of 0 to 5: 0 1 2 3 7 9
        The sky is wide                     0 1 2 4
        The sun                             0 5 . .

    Attention alone looks at other tokens, and so needs rows, (B, T). All else is done to each
    token by itself: x (U, C)."""
    number: torch.Tensor     # (B, T) which row of x is this place's token? (at padding any)
    place: torch.Tensor      # (U,) one of the B * T places where this row of x stands


def to_rows(x, layout):
    """x (U, ..) -> (B, T, ..). At padding stands some other token; nobody looks there."""
    places = layout.number.numel()
    if len(x) < places:
        x = x.index_select(0, layout.number.flatten())  # the gradients of a token's places add up
    return x.unflatten(0, layout.number.shape)


def from_rows(x, layout):
    """x (B, T, ..) -> (U, ..)"""
    x = x.flatten(0, 1)                                         # (B * T, ..)
    if len(layout.place) < len(x):
        x = x.index_select(0, layout.place)
    return x


def attention_mask(mask, T):
    """Which of S tokens may each of the newest T look at? At itself and at the real ones before
    it. mask (B, S), True at real tokens -> (B, 1, T, S), or None where no mask is needed."""
    S = mask.shape[1]
    no_left_padding = mask[:, 0].all()
    if no_left_padding and T == S:
        return None     # plain causal attention: padding on the right comes later than real tokens
    if no_left_padding and T == 1:
        return None     # the newest token sees them all
    query = torch.arange(S - T, S, device=mask.device)          # (T,) positions
    return itself_and_before(mask, query[:, None])


def one_query_mask(mask, at):
    """at (B, T), True at the only query of each row: which of S tokens may it see? -> (B, 1, 1, S).
    Never None: that would show it all S."""
    in_cache = mask.shape[1] - at.shape[1]                      # S - T tokens
    query = in_cache + at.int().argmax(1)                       # (B,) positions
    return itself_and_before(mask, query[:, None, None, None])


def itself_and_before(mask, query):
    """query, positions: (T, 1) of all rows, or (B, 1, 1, 1) -> (B, 1, T, S)"""
    key = torch.arange(mask.shape[1], device=mask.device)       # (S,) positions
    before = mask[:, None, None, :] & (key <= query)            # (B, 1, T, S)
    # padding on the left sees nothing, and a softmax over nothing is nan; so it sees itself
    return before | (key == query)


def attend(q, k, v, allowed):
    """softmax(q k^T / sqrt(D)) v.   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)"""
    if q.shape[2] == 1:
        return attend_one(q, k, v, allowed)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


def attend_one(q, k, v, allowed):
    """The same for one token, as in sampling: two plain products are faster."""
    B, H, _, D = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K, D)          # the heads that share keys stand where time was
    scores = (q @ k.mT) * D ** -0.5                             # (B, K, H/K, S)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    y = scores.softmax(-1) @ v                                  # (B, K, H/K, D)
    return y.view(B, H, 1, D)


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


def product(x, W, bias=None):
    """x W^T + bias.   x (.., in), W (out, in) -> (.., out)"""
    rows = len(x)
    few = x.dim() == 2 and rows <= 16
    large = W.numel() > 200_000
    if not (few and large and x.device.type == "cpu"):
        return F.linear(x, W, bias)
    # Sampling from a real model (the toy's matrices are smaller): what takes time is to read W, and
    # W x^T reads it twice as fast. With a single column it is slow again, so that row comes twice.
    if rows == 1:
        x = x.repeat(2, 1)
    y = (W @ x.T).T[:rows].contiguous()
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """The same, by product()."""

    def forward(self, x):
        return product(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.d_model
        D = config.head_dim
        self.layer = layer
        self.head_dim = D
        self.q = Linear(C, config.n_heads * D, bias=config.qkv_bias)
        self.k = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.v = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * D, C, bias=False)

    def forward(self, x, layout, cos, sin, allowed, cache, ask=None):
        """ask (B,): which row of x is the only query of each row of ids; None: all U are. Keys and
        values are always of all U."""
        if ask is None:
            ask = slice(None)                                   # all U
            layout_of_q = layout
        else:
            layout_of_q = every_token(ask[:, None])             # only ask's shape counts: (B, 1)
        q = self.q(x[ask]).unflatten(1, (-1, self.head_dim))    # (U, H, D)
        k = self.k(x).unflatten(1, (-1, self.head_dim))         # (U, K, D)
        v = self.v(x).unflatten(1, (-1, self.head_dim))         # (U, K, D)
        q = rotate(q, cos[ask], sin[ask])
        k = rotate(k, cos, sin)
        q = to_rows(q, layout_of_q).transpose(1, 2)             # (B, H, T, D)
        k = to_rows(k, layout).transpose(1, 2)                  # (B, K, T, D)
        v = to_rows(v, layout).transpose(1, 2)                  # (B, K, T, D)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)                  # (B, K, S, D), of all tokens so far
        y = attend(q, k, v, allowed)                            # (B, H, T, D)
        y = from_rows(y.transpose(1, 2), layout_of_q)           # (U, H, D)
        return self.out(y.flatten(1))                           # (U, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False)
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))     # (U, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layout, cos, sin, allowed, cache, wanted=None, ask=None):
        """-> (U, C); of those rows of x alone that are wanted (N, C), or that ask (B, C)"""
        y = self.attention(self.norm1(x), layout, cos, sin, allowed, cache, ask)
        if ask is not None:
            x = x[ask]                                          # (B, C)
        x = x + y
        if wanted is not None:
            x = x.index_select(0, wanted)                       # (N, C)
        return x + self.mlp(self.norm2(x))


BF16 = {"cuda"}              # devices whose products are in bfloat16


def low_precision(device):
    """Only the blocks compute in bfloat16. Weights, gradients, logits and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.speeds = rotary_speeds(config)                     # (D/2,), no weights: not saved
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layers):
            self.blocks.append(Block(config, layer))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        if not config.tie:
            self.unembed = Linear(config.d_model, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            if name.endswith(("out.weight", "down.weight")):
                # what is added to x in every layer starts smaller, as in GPT-2
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, ids, mask=None):
        """ids (B, T) -> logits (B, T, V): at each position, of the token that comes next."""
        return self.head(self.hidden(ids, mask))

    def hidden(self, ids, mask=None, cache=None, at=None):
        """ids (B, T) -> (B, T, C). mask (B, T) is True at real tokens; padding may stand on
        either side of them, not in between. With a cache, ids are the newest T of S tokens, and
        mask (B, S) covers all S. at (B, T) is True at the N real tokens whose vectors are wanted,
        if not all are -> (N, C)."""
        B, T = ids.shape
        S = T if cache is None else cache.length + T
        if S > self.config.max_len:
            raise UserError(f"{S} tokens do not fit the model's context of {self.config.max_len}")
        if mask is None:
            mask = torch.ones(B, S, dtype=torch.bool, device=ids.device)
        position = (mask.cumsum(1) - 1).clamp(min=0)            # (B, S), 0 at the first real token
        if S == T:
            layout = different_tokens(ids, mask)
        else:
            layout = every_token(ids)       # behind a cache equal ids may have different pasts
        position = from_rows(position[:, S - T:], layout)       # (U,)
        angle = position[:, None] * self.speeds.to(ids.device)  # (U, D/2)
        angle = torch.cat([angle, angle], dim=-1)[:, None]      # (U, 1, D), for all heads
        x = self.embed(from_rows(ids, layout))                  # (U, C)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        allowed = attention_mask(mask, T)
        with low_precision(ids.device):
            for block in self.blocks[:-1]:
                x = block(x, layout, cos, sin, allowed, cache)
            last = self.blocks[-1]      # no attention follows it, so only what is wanted goes on
            if at is None:
                x = last(x, layout, cos, sin, allowed, cache)
            elif (at.sum(1) == 1).all():
                # one of each row, for a judge or a sampler: it alone needs a query
                allowed = one_query_mask(mask, at)
                x = last(x, layout, cos, sin, allowed, cache, ask=layout.number[at])
            else:
                x = last(x, layout, cos, sin, allowed, cache, wanted=layout.number[at])
        if cache is not None:
            cache.length = S        # now that every layer has added its own
        x = self.norm(x)
        return to_rows(x, layout) if at is None else x

    def head(self, hidden):
        """(.., C) -> logits (.., V)"""
        if self.config.tie:
            return product(hidden, self.embed.weight)
        return self.unembed(hidden)


def every_token(ids):
    """A token of its own at each place: U = B * T."""
    place = torch.arange(ids.numel(), device=ids.device)
    return Layout(place.view(ids.shape), place)


def different_tokens(ids, mask):
    """ids, mask (B, T) -> Layout. In order, rows that begin alike are neighbours; so a token is a
    new one where its row has parted from the row above. R rows are different."""
    B, T = ids.shape
    texts = ids.where(mask, -1)                                 # (B, T), no id is -1
    texts, which = texts.unique(dim=0, return_inverse=True)     # (R, T) in order; (B,), 0 to R - 1
    parted = (texts[1:] != texts[:-1]).cummax(1).values         # (R-1, T), True from where they do
    new = texts >= 0                                            # (R, T)
    new[1:] &= parted
    U = int(new.sum())
    if U == B * T or U == 0:            # nothing to save, or nothing at all
        return every_token(ids)         # to_rows and from_rows leave B * T tokens in their places
    number = new.flatten().cumsum(0).view(new.shape) - 1        # (R, T), true where it is new
    # elsewhere it is that of the text above. Numbers grow downwards, so the largest is the nearest
    number = number.where(new, 0).cummax(0).values
    places = torch.arange(B * T, device=ids.device).view(B, T)
    place = torch.empty_like(texts)                             # (R, T)
    place[which] = places               # of equal rows any one will do: they hold the same
    return Layout(number[which], place[new])


class ScalarModel(nn.Module):
    """The same network with one number, or k, at every position: reward models, critics."""

    def __init__(self, transformer, k=1):
        super().__init__()
        self.config = transformer.config
        self.transformer = transformer
        self.score = nn.Linear(self.config.d_model, k, bias=False)
        std = 1 / math.sqrt(self.config.d_model + 1)
        nn.init.normal_(self.score.weight, std=std)
        self.register_buffer("mean", torch.zeros(k))    # subtracted: an average winner scores 0

    def forward(self, ids, mask=None):
        return self.head(self.transformer.hidden(ids, mask))    # (B, T) or (B, T, k)

    def head(self, hidden):
        """(.., C) -> a number (..), or k of them (.., k)"""
        scores = self.score(hidden) - self.mean                 # (.., k)
        return scores[..., 0] if len(self.mean) == 1 else scores


def end_scores(model, ids, mask):
    """What a ScalarModel says of a text: its number at the last real token. -> (B,) or (B, k)"""
    column = torch.arange(mask.shape[1], device=mask.device)    # (T,)
    last = (mask * column).argmax(1)                            # (B,), wherever padding is
    at = column == last[:, None]                                # (B, T), one place in each row
    return model.head(model.transformer.hidden(ids, mask, at=at))


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
    ids = []
    marks = []
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
        marks += [0] * len(head)
        marks += [int(is_answer)] * len(body)
        marks += [0] * len(newline)
    return Example(ids, marks)


def render_prompt(tokenizer, messages):
    """A conversation -> ids that end where the assistant's answer begins."""
    start = [special(tokenizer, START)] + tokenizer.encode_ordinary("assistant\n")
    return render(tokenizer, messages).ids + start


def render_answer(tokenizer, messages, text):
    """A conversation and one answer to it -> Example, in which that answer alone is marked."""
    prompt = render_prompt(tokenizer, messages)
    body = tokenizer.encode_ordinary(text) + [special(tokenizer, END)]
    marks = [0] * len(prompt)
    marks += [1] * len(body)
    return Example(prompt + body, marks)


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
    rows = []
    real = []
    marks = []
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
    """log pi(y_t | x, y_<t) at answers' tokens, 0 elsewhere: their sum is log pi(y|x). All (B, T).

    The logits at t - 1 are about the token at t, so one is shifted against the other. In plain
    words:

        logps = (model(ids, mask)[:, :-1] / temperature).log_softmax(-1)            (B, T-1, V)
        logps = logps.gather(2, ids[:, 1:, None])[..., 0]                           (B, T-1)
        logps = F.pad(logps, (1, 0)).masked_fill(~answer, 0)                        (B, T)

    The code does the same with less work: only positions that are needed meet the vocabulary, and
    hidden() computes tokens that rows share once. answer is False in column 0, which nothing
    predicts. In RL, give it the temperature that sampled the answers, or it scores another policy
    than the one that acted.
    """
    before = answer[:, 1:]              # (B, T-1), True where the next token is one of N to score
    states = model.hidden(ids[:, :-1], mask[:, :-1], at=before)  # (N, C)
    states = states / temperature       # and so the logits, of which there are more: head is linear
    logps = model.head(states).log_softmax(-1)                  # (N, V)
    logps = logps.gather(1, ids[answer][:, None])[:, 0]         # (N,)
    return logps.new_zeros(ids.shape).masked_scatter(answer, logps)  # (B, T)


# ---------------------------------------------------------------- sampling

class Samples(NamedTuple):
    ids: torch.Tensor        # (B, T) a prompt, its answer, then padding
    mask: torch.Tensor       # (B, T) True at real tokens
    answer: torch.Tensor     # (B, T) True at an answer's tokens and its <|im_end|>
    logps: torch.Tensor      # (B, T) their log-probs at this temperature (at 1 where it is 0),
                             # before top-k and top-p
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
    real = [[1] * len(prompt) for prompt in prompts]
    ids = pad(prompts, blank, left=True).to(device)             # (prompts, P)
    mask = pad(real, 0, left=True).bool().to(device)            # (prompts, P)
    ids = ids.repeat_interleave(n, 0)                           # (B, P)
    mask = mask.repeat_interleave(n, 0)
    tokens = []
    logps = []
    for some_ids, some_mask in zip(ids.split(batch), mask.split(batch)):
        new, new_logps = continue_rows(model, some_ids, some_mask, max_new, end, temperature,
                                       top_k, top_p, generator)
        tokens.append(new)
        logps.append(new_logps)
    tokens = torch.cat(tokens)                                  # (B, max_new)
    logps = torch.cat(logps)                                    # (B, max_new)
    stops = tokens == end
    ends_before = stops.cumsum(1) - stops.long()
    answer = ends_before == 0                       # True up to and including the first end token
    longest = int(answer.sum(1).max())
    tokens = tokens[:, :longest]
    answer = answer[:, :longest]
    logps = logps[:, :longest].masked_fill(~answer, 0.0)
    words = answer & (tokens != end)
    texts = []
    for row, keep in zip(tokens.cpu(), words.cpu()):
        text = tokenizer.decode(row[keep].tolist())
        texts.append(text.strip())
    tokens = tokens.masked_fill(~answer, blank)
    ids = torch.cat([ids, tokens], 1)                                       # (B, P + longest)
    mask = torch.cat([mask, answer], 1)
    answer = F.pad(answer, (P, 0))
    logps = F.pad(logps, (P, 0))
    # the padding in front of short prompts goes behind their answers: fewer columns to learn from
    order = (~mask).int().argsort(dim=1, stable=True)           # real tokens first
    order = order[:, :mask.sum(1).max()]                        # (B, T), as wide as the fullest row
    columns = [x.gather(1, order) for x in (ids, mask, answer, logps)]
    return Samples(*columns, ended=stops.any(1), texts=texts)


def continue_rows(model, ids, mask, max_new, end, temperature, top_k, top_p, generator):
    """Token by token. ids, mask (B, P) -> tokens, log-probs, (B, max_new) each. What stands behind
    a first end token means nothing."""
    B, P = ids.shape
    tokens = torch.full((B, max_new), end, device=ids.device)   # any filler would do
    logps = torch.zeros(B, max_new, device=ids.device)
    hidden = torch.inference_mode()(model.hidden)               # quicker than no_grad
    cache = Cache(P + max_new)
    newest = torch.arange(P, device=ids.device) == P - 1        # (P,)
    state = hidden(ids, mask, cache, at=newest.expand(B, P))    # (B, C)
    mask = F.pad(mask, (0, max_new), value=True)                # (B, P + max_new)
    rows = torch.arange(B, device=ids.device)       # (R,) rows of the cache
    for t in range(max_new):
        logits = model.head(state)                              # (R, V)
        if temperature == 0:
            token = logits.argmax(-1)                           # (R,)
            probs = logits.softmax(-1)
        else:
            probs = (logits / temperature).softmax(-1)
            token = draw(probs, top_k, top_p, generator)
        tokens[rows, t] = token
        p = probs.gather(1, token[:, None])[:, 0]               # (R,)
        logps[rows, t] = p.log()
        going = (tokens[rows, :t + 1] != end).all(1)            # (R,)
        if t + 1 == max_new or not going.any():
            break
        # drop those that have ended, but seldom: it copies the whole cache
        if going.float().mean() < 0.7:
            rows = rows[going]
            token = token[going]
            cache.select(going)
        seen = mask[rows, :P + t + 1]
        state = hidden(token[:, None], seen, cache)[:, 0]       # (R, C)
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
    dart = torch.rand(len(line), 1, generator=generator)        # (B, 1), in [0, 1)
    dart = dart.to(line.device) * line[:, -1:]
    token = torch.searchsorted(line, dart, right=True)[:, 0]    # never one of probability 0
    return token.clamp(max=line.shape[1] - 1)                   # only nan lands behind the end


def respond(model, tokenizer, conversations, **settings):
    """Answers to conversations (lists of messages) -> texts"""
    prompts = [render_prompt(tokenizer, messages) for messages in conversations]
    return sample(model, tokenizer, prompts, **settings).texts


# ---------------------------------------------------------------- the chat

def too_long(model, tokenizer, history):
    ids = render_prompt(tokenizer, history)
    return len(ids) + 64 > model.config.max_len


def chat(folders):
    from data.checkpoints import load             # which imports this file
    models = {folder: load(folder) for folder in folders}
    histories = {folder: [] for folder in folders}
    while text := input("you> "):                 # an empty line ends it
        for folder, (model, tokenizer) in models.items():
            history = histories[folder]
            history.append({"role": "user", "content": text})
            while len(history) > 1 and too_long(model, tokenizer, history):
                del history[:2]                     # the oldest question and its answer
            reply = respond(model, tokenizer, [history], temperature=0.7)[0]
            history.append({"role": "assistant", "content": reply})
            print(f"{folder}> {reply}")


if __name__ == "__main__":
    # this file once more, as data/ imports it: the UserError of __main__ would be another class
    from data.run import exit_codes
    from model import chat
    with exit_codes():
        if len(sys.argv) == 1 or "--help" in sys.argv:
            print(__doc__)
        else:
            chat(sys.argv[1:])
