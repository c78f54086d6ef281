"""The shared machine: one small transformer, its tokenizer, sampling, checkpoints and command line.

The network is Llama's (and so SmolLM2's, Qwen2.5's, TinyLlama's ...): token embedding, then n_layers times

    x = x + Attention(RMSNorm(x));    x = x + W_down (silu(W_gate RMSNorm(x)) * W_up RMSNorm(x))

and logits = W_vocab RMSNorm(x). A checkpoint is an ordinary Hugging Face folder, so the same file runs the toy of
0.9M parameters and the real models. Every script imports this file, and no other.

    python model.py out/sft out/dpo          chat with trained models, side by side (--temperature 0 is greedy)

Left out for the reader's sake: dropout (it would make PPO's first ratio differ from 1), tensor parallelism, and
architectures with other blocks. Next: read sft.py, which teaches this network to follow instructions.
"""
import argparse, base64, csv, dataclasses, functools, inspect, json, math, os, re, shlex, subprocess, sys, time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """Bad input: main() prints its one line and exits 2."""


class Diverged(Exception):
    """Training had to stop, for instance at a loss that is not finite: main() exits 1."""


# ---------------------------------------------------------------- the transformer
# B batch, T time, C channels (d_model), V vocabulary; H query heads share K key/value heads; D channels a head

@dataclasses.dataclass
class ModelConfig:
    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2          # grouped-query attention: H / K query heads read the same keys and values
    d_ff: int = 352
    head_dim: int = None         # d_model // n_heads where not given
    max_len: int = 256
    rope_theta: float = 10000.0
    rope_scaling: dict = None    # Llama 3.1's or linear stretching of the positions
    norm_eps: float = 1e-5
    tie: bool = True             # input embedding and output projection are one matrix
    qkv_bias: bool = False       # Qwen2

    def __post_init__(self):
        self.head_dim = self.head_dim or self.d_model // self.n_heads


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config):
    """Rotary positions: channel pair i of a head turns by theta^(-2i/D) radians a token. -> (D/2,)"""
    D, scaling = config.head_dim, config.rope_scaling or {}
    turn = config.rope_theta ** -(torch.arange(0, D, 2).float() / D)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return turn / scaling["factor"]
    if kind == "llama3":                                    # slow turns are stretched, fast ones kept, blended between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * turn / (2 * math.pi)     # full turns in the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return turn * (keep + (1 - keep) / scaling["factor"])
    return turn


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) by its position's angle. x (B, T, heads, D); cos, sin (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """Keys and values of the tokens so far: for each layer two tensors (B, K, room, D), `length` of them filled."""

    def __init__(self, config, rows, room, like):
        shape = (2, rows, config.n_kv_heads, room, config.head_dim)
        self.layers, self.length = [like.new_zeros(shape) for _ in range(config.n_layers)], 0

    def select(self, rows):
        """Keeps these rows, in this order (a row may be asked for many times)."""
        self.layers = [layer[:, rows] for layer in self.layers]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.D = c.n_heads, c.n_kv_heads, c.head_dim
        self.norm1, self.norm2 = RMSNorm(c.d_model, c.norm_eps), RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, (self.H + 2 * self.K) * self.D, bias=c.qkv_bias)   # three matrices in one
        self.out = nn.Linear(self.H * self.D, c.d_model, bias=False)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)                         # two in one
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x, cos, sin, allowed, cache=None, layer=0):
        x = x + self.attend(self.norm1(x), cos, sin, allowed, cache, layer)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, x, cos, sin, allowed, cache, layer):
        B, T, _ = x.shape
        H, K, D = self.H, self.K, self.D
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        qk = rotate(qkv[:, :, :H + K], cos, sin)
        q = qk[:, :, :H].transpose(1, 2)                                                    # (B, H, T, D)
        k, v = qk[:, :, H:].transpose(1, 2), qkv[:, :, H + K:].transpose(1, 2)              # (B, K, T, D)
        if cache is not None:
            past, filled = cache.layers[layer], cache.length + T
            past[0, :, :, cache.length:filled], past[1, :, :, cache.length:filled] = k, v
            k, v = past[0, :, :, :filled], past[1, :, :, :filled]                           # (B, K, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None and T > 1,
                                           enable_gqa=H != K)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie:
            self.unembed.weight = self.embed.weight
        self.register_buffer("turn", rope_frequencies(config), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:                     # matrices that write into the residual stream start smaller
                into = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if into else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids, mask=None, cache=None):
        """ids (B, T) -> (B, T, C). mask (B, T) is True at real tokens; with a cache it covers the cached tokens too."""
        B, T = ids.shape
        start = cache.length if cache else 0
        S = start + T                                                           # keys that a query could look at
        if S > self.config.max_len:
            raise UserError(f"{S} tokens do not fit the model's context of {self.config.max_len}")
        allowed = None
        if mask is None:
            positions = torch.arange(start, S, device=ids.device)[None]                            # (1, T)
            padded = False
        else:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]                        # (B, T)
            # padding on the right needs no mask: a causal query never sees what comes after it
            padded = not bool((mask[:, 1:] <= mask[:, :-1]).all())
        if padded or (start and T > 1):
            causal = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(start)             # (T, S)
            keys = causal[None] if mask is None else causal & mask[:, None, :]                     # (B, T, S)
            # a padding query sees itself: a row with nothing to look at would be softmax of -inf, NaN
            allowed = (keys | torch.eye(T, S, dtype=torch.bool, device=ids.device).roll(start, 1))[:, None]
        angle = positions[:, :, None, None].float() * self.turn                                    # (B, T, 1, D/2)
        x = self.embed(ids)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, allowed, cache, i)
        if cache:
            cache.length = S
        return self.norm(x)

    def head(self, hidden):
        return self.unembed(hidden)

    def forward(self, ids, mask=None):
        return self.head(self.hidden(ids, mask))


class ScalarModel(nn.Module):
    """The same backbone with k numbers at every position: reward models, critics, process reward models."""

    def __init__(self, transformer, k=1):
        super().__init__()
        self.transformer, self.config = transformer, transformer.config
        C = transformer.config.d_model
        self.score = nn.Linear(C, k, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (C + 1))      # starts small: all answers score nearly the same
        self.register_buffer("mean", torch.zeros(k))             # subtracted, so that an average answer scores 0

    def forward(self, ids, mask=None):
        score = self.score(self.transformer.hidden(ids, mask)) - self.mean                         # (B, T, k)
        return score.squeeze(-1) if score.shape[-1] == 1 else score


# ---------------------------------------------------------------- tokenizer and chat format

END, START, PAD, EOT = "<|im_end|>", "<|im_start|>", "<|pad|>", "<|endoftext|>"
# words with their space, numbers of one or two digits, punctuation, spaces (all but the last go together)
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same after single digits were cut out: a digit stands alone, and spaces before it stay together
DIGITS_PATTERN = r"'(?:s|t|re|ve|m|ll|d)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding that also knows what some real vocabularies need: unicode normalisation and missing bytes."""
    normal_form, lacking, files = None, frozenset(), None

    def encode_ordinary(self, text):
        ids = super().encode_ordinary(unicodedata.normalize(self.normal_form, text) if self.normal_form else text)
        return [i for i in ids if i not in self.lacking] if self.lacking else ids


@functools.cache
def byte_letters():
    """Hugging Face writes the bytes of a token as printable letters (GPT-2's table): byte -> letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def load_ranks(path):
    """A vocabulary in tiktoken's format: a line a token, base64 of its bytes and its rank. Special tokens follow."""
    ranks = {}
    for n, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{n}: expected base64 and a rank, found {line[:40]!r}")
    specials = {token: len(ranks) + i for i, token in enumerate([EOT, START, END, PAD])}
    tokenizer = Tokenizer("studybuddy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    tokenizer.files = tokenizer_files(ranks, specials)
    return tokenizer


def tokenizer_files(ranks, specials):
    """The same vocabulary for Hugging Face, which wants the merges: the two parts that made each token."""
    letters = byte_letters()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                               # byte-pair encoding with the ranks below this one
            low, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([spell(p) for p in parts])
    added = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for s, i in specials.items()]
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytelevel]},
                 "post_processor": None, "decoder": bytelevel,
                 "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                           "ignore_merges": False, "merges": merges,
                           "vocab": {spell(t): r for t, r in ranks.items()} | specials}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
              "clean_up_tokenization_spaces": False, "chat_template": CHATML}
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False), "tokenizer_config.json": json.dumps(config)}


def load_tokenizer(folder, vocab_size):
    """A folder's tokenizer.json (byte-level BPE) -> Tokenizer."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder}: no tokenizer.json")
    spec = json.loads(path.read_text(encoding="utf-8"))
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [s.get("type") for s in steps]
    normal = (spec.get("normalizer") or {}).get("type")
    splits = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    if kinds == ["Split", "ByteLevel"] and splits[0] and not steps[1].get("use_regex", True):
        pattern = splits[0]
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        pattern = DIGITS_PATTERN
    elif kinds == ["ByteLevel"]:
        pattern = GPT2_PATTERN
    else:
        raise UserError(f"{path}: splits text by {kinds}, which is not byte-level BPE as in GPT-2, Llama 3 or Qwen2")
    if spec["model"].get("type") != "BPE" or normal not in (None, "NFC"):
        raise UserError(f"{path}: only byte-level BPE is known here, not {spec['model'].get('type')} with {normal}")
    byte = {letter: b for b, letter in byte_letters().items()}
    specials = {t["content"]: t["id"] for t in spec["added_tokens"]}
    ranks = {bytes(byte[c] for c in t): i for t, i in spec["model"]["vocab"].items() if t not in specials}
    free = max([vocab_size - 1, *ranks.values(), *specials.values()]) + 1
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]     # ids past the vocabulary, dropped again
    lacking = {b: free + i for i, b in enumerate(missing)}
    used = {*ranks.values(), *specials.values()}
    specials |= {f"<|unused_{i}|>": i for i in range(vocab_size) if i not in used}        # so that any id decodes
    tokenizer = Tokenizer(str(folder), pat_str=pattern, mergeable_ranks=ranks | lacking, special_tokens=specials)
    tokenizer.normal_form, tokenizer.lacking = normal, frozenset(lacking.values())
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    tokenizer.files = {name: (path.parent / name).read_text(encoding="utf-8")
                       for name in names if (path.parent / name).exists()}
    return tokenizer


def special(tokenizer, token):
    """The id of a special token. Most real vocabularies have no <|pad|>: there <|endoftext|> stands in."""
    known = tokenizer._special_tokens
    if token == PAD and PAD not in known:
        token = EOT
    if token not in known:
        raise UserError(f"the vocabulary {tokenizer.name} has no {token}: this chat format needs it")
    return known[token]


def to_messages(prompt):
    """A prompt is a text or a conversation: a list of {"role", "content"}."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(tokenizer, messages, reply=False):
    """ChatML -> (ids, loss mask), two lists. Loss on what the assistant says and on its <|im_end|>, on nothing else.

    Message text is encoded as ordinary text: a user who types <|im_end|> gets its letters, never the token.
    """
    encode, start, end = tokenizer.encode_ordinary, special(tokenizer, START), special(tokenizer, END)
    newline, ids, loss = encode("\n"), [], []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":         # cut where sampling begins, so that training sees the tokens sampling gives
            head, body = [start] + encode("assistant\n"), encode(content) + [end]
        else:
            head, body = [start] + encode(f"{role}\n{content}") + [end], []
        ids += head + body + newline
        loss += [0] * len(head) + [1] * len(body) + [0] * len(newline)
    if reply:
        head = [start] + encode("assistant\n")
        ids, loss = ids + head, loss + [0] * len(head)
    return ids, loss


def pad(rows, value, left=False):
    """Lists of unequal length -> (B, T)."""
    T = max(map(len, rows))
    fill = lambda row: [value] * (T - len(row))
    return torch.tensor([fill(row) + list(row) if left else list(row) + fill(row) for row in rows], dtype=torch.long)


# ---------------------------------------------------------------- sampling and log-probs

class Samples(NamedTuple):
    ids: torch.Tensor        # (B, P+T) prompts, padded on the left, and answers, padded on the right
    mask: torch.Tensor       # (B, P+T) True at real tokens
    answer: torch.Tensor     # (B, P+T) True at answer tokens, the end token included: what is trained on
    logps: torch.Tensor      # (B, P+T) log-prob of each answer token at the sampling temperature, 0 elsewhere
    ended: torch.Tensor      # (B,) False where the answer ran out of room
    texts: list              # B answers without the end token


def truncate(logits, top_k, top_p):
    """Sets all but the k likeliest tokens, or all but the smallest set with probability top_p, to -inf. (B, V)"""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        probs = sorted_logits.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p            # the mass before a token already suffices
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits


@torch.no_grad()
def sample(model, tokenizer, prompts, n=1, max_new=64, temperature=1.0, top_k=0, top_p=1.0, generator=None, batch=256):
    """n answers to each prompt (a list of ids), in the order p0 a0, p0 a1, ..., p1 a0. Temperature 0 is greedy."""
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("sample: every prompt needs at least one token")
    device, P = model.embed.weight.device, max(map(len, prompts))
    end, blank = special(tokenizer, END), special(tokenizer, PAD)
    if P + max_new > model.config.max_len:
        raise UserError(f"a prompt of {P} tokens and {max_new} new ones do not fit the model's context of "
                        f"{model.config.max_len}")
    rows = [i for i in range(len(prompts)) for _ in range(n)]
    ids = torch.full((len(rows), P + max_new), blank, device=device)
    ids[:, :P] = pad(prompts, blank, left=True).to(device)[rows]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    logps = torch.zeros(ids.shape, device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    real = torch.arange(P + max_new, device=device) >= P - lengths[:, None]          # (prompts, P+T) no left padding
    for first in range(0, len(rows), batch):
        group = rows[first:first + batch]
        lead, last = group[0], group[-1] + 1                                         # prefill each prompt once
        alive = torch.arange(first, first + len(group), device=device)               # rows still being written
        cache = Cache(model.config, last - lead, P + max_new, model.embed.weight)
        mask, shared = real[lead:last], torch.tensor(group, device=device) - lead
        h = model.hidden(ids[::n][lead:last, :P], mask[:, :P], cache)[:, -1]         # (prompts, C)
        cache.select(shared)
        h, mask = h[shared], mask[shared]                                            # (rows, ...)
        for t in range(P, P + max_new):
            logits = model.head(h).float()                                           # (rows, V)
            logp = (logits / (temperature or 1)).log_softmax(-1)
            if temperature == 0:
                token = logits.argmax(-1)                                            # (rows,)
            else:
                token = draw(truncate(logp, top_k, top_p), generator)
            ids[alive, t], answer[alive, t] = token, True
            logps[alive, t] = logp.gather(1, token[:, None])[:, 0]
            going = token != end
            if t + 1 == P + max_new or not going.any():
                break
            if going.sum() <= 0.75 * len(alive):                                     # drop finished rows
                pass
            h = model.hidden(token[:, None], mask[:, :t + 1], cache)[:, 0]
    return finish(tokenizer, ids, answer, logps, real[rows], P, end, blank)


def draw(logits, generator):
    """One token a row, by throwing a dart at the stacked probabilities. (B, V) -> (B,)"""
    stack = logits.softmax(-1).cumsum(-1)
    dart = torch.rand(len(logits), 1, generator=generator).to(logits.device) * stack[:, -1:]
    return torch.searchsorted(stack, dart, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def finish(tokenizer, ids, answer, logps, real, P, end, blank):
    """Cuts every answer after its first end token."""
    is_end = (ids == end) & answer                                                   # (B, P+T)
    answer = answer & (is_end.long().cumsum(1) - is_end.long() == 0)
    longest = max(int(answer.sum(1).max()), 1)
    ids, answer, logps, real = (x[:, :P + longest] for x in (ids, answer, logps, real))
    mask = real & (answer | (torch.arange(P + longest, device=ids.device) < P))
    ended = (is_end[:, :P + longest] & answer).any(1)
    texts = [tokenizer.decode(row[keep & (row != end)].tolist()).strip() for row, keep in zip(ids, answer)]
    return Samples(torch.where(mask, ids, blank), mask, answer, torch.where(answer, logps, 0.0), ended, texts)


def answer(model, tokenizer, prompts, **settings):
    """Answers to prompts given as text or messages -> list of str. Takes sample()'s settings."""
    ids = [render(tokenizer, to_messages(p), reply=True)[0] for p in prompts]
    return sample(model, tokenizer, ids, **settings).texts


def token_logps(model, ids, mask, answer, temperature=1.0):
    """log p(ids[:, t] | ids[:, :t]) where answer[:, t], and exactly 0 elsewhere. All (B, T).

    Give it the temperature that sampled the tokens, or the probabilities are those of another policy.
    """
    wanted = answer[:, 1:]                                   # (B, T-1) the token at t is predicted at t-1
    h = model.hidden(ids, mask)[:, :-1][wanted]              # (N, C) only these meet the vocabulary
    logits = model.head(h).float() / temperature             # (N, V)
    logps = -F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")                          # (N,)
    return F.pad(torch.zeros(wanted.shape, device=ids.device).masked_scatter(wanted, logps), (1, 0))


# ---------------------------------------------------------------- checkpoints: Hugging Face folders

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """A length (8 bytes), a JSON header {name: {dtype, shape, data_offsets}}, raw bytes. -> {name: tensor}"""
    try:
        size = int.from_bytes(open(path, "rb").read(8), "little")
        raw = np.memmap(path, np.uint8, mode="c")
        header = json.loads(raw[8:8 + size].tobytes())
        header.pop("__metadata__", None)
        return {name: torch.from_numpy(raw[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]])
                .view(DTYPES[t["dtype"]]).view(t["shape"]) for name, t in header.items()}
    except (ValueError, KeyError, RuntimeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({type(e).__name__}: {e})")


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                          # the format asks for tensors that start at 8 bytes
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.contiguous().reshape(-1).view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


def tensor_names(config):
    """Our parameter -> the Hugging Face tensors that are stacked in it, each with its number of rows (None: all)."""
    H, K, D, F_ = config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff
    names = {"embed.weight": [("model.embed_tokens.weight", None)], "norm.weight": [("model.norm.weight", None)]}
    if not config.tie:
        names["unembed.weight"] = [("lm_head.weight", None)]
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for kind in ["weight", "bias"] if config.qkv_bias else ["weight"]:
            names[f"{ours}qkv.{kind}"] = [(f"{theirs}self_attn.{x}_proj.{kind}", heads * D)
                                          for x, heads in (("q", H), ("k", K), ("v", K))]
        names[ours + "out.weight"] = [(theirs + "self_attn.o_proj.weight", None)]
        names[ours + "gate_up.weight"] = [(theirs + "mlp.gate_proj.weight", F_), (theirs + "mlp.up_proj.weight", F_)]
        names[ours + "down.weight"] = [(theirs + "mlp.down_proj.weight", None)]
        names[ours + "norm1.weight"] = [(theirs + "input_layernorm.weight", None)]
        names[ours + "norm2.weight"] = [(theirs + "post_attention_layernorm.weight", None)]
    return names


def read_config(folder):
    """A folder's config.json -> (ModelConfig, the whole of it)."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    if not path.exists():
        raise UserError(f"{folder}: not a model, it has no config.json")
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        kind = c.get("model_type")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        rope_kind = rope.get("rope_type", rope.get("type", "default"))
        odd = (kind not in ("llama", "qwen2") and f"model_type {kind}" or c.get("attention_bias") and "attention_bias"
               or c.get("mlp_bias") and "mlp_bias" or c.get("use_sliding_window") and "use_sliding_window"
               or c.get("hidden_act", "silu") != "silu" and f"hidden_act {c['hidden_act']}"
               or rope_kind not in ("default", "linear", "llama3") and f"rope {rope_kind}")
        if odd:
            raise UserError(f"{path}: {odd} is another architecture; known are Llama and Qwen2")
        return ModelConfig(
            vocab_size=c["vocab_size"], d_model=c["hidden_size"], n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"], n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            d_ff=c["intermediate_size"], head_dim=c.get("head_dim"), max_len=c.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
            rope_scaling=None if rope_kind == "default" else rope, norm_eps=c.get("rms_norm_eps", 1e-6),
            tie=c.get("tie_word_embeddings", False), qkv_bias=kind == "qwen2"), c
    except (KeyError, ValueError) as e:
        raise UserError(f"{path}: not a model's config ({type(e).__name__}: {e})")


def load(folder, device="cpu", dtype=None):
    """A Hugging Face folder -> (Transformer, tokenizer)."""
    return load_any(folder, device, dtype, scalar=False)


def load_scalar(folder, device="cpu", dtype=None):
    """A folder that save() wrote for a ScalarModel -> (ScalarModel, tokenizer)."""
    return load_any(folder, device, dtype, scalar=True)


def load_any(folder, device, dtype, scalar):
    config, raw = read_config(folder)
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    elif index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        raise UserError(f"{folder}: not a model, it has no model.safetensors")
    tensors = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(f"{folder}: {shard} is missing")
        tensors |= read_safetensors(folder / shard)
    if scalar != ("score.weight" in tensors):
        raise UserError(f"{folder}: a scalar model is {'expected' if scalar else 'not expected'} here")
    with torch.device("meta"):                               # no memory, no time for random numbers
        model = Transformer(config)
    def take(name, shape):
        if name not in tensors:
            raise UserError(f"{folder}: tensor {name} is missing")
        if list(tensors[name].shape) != list(shape):
            raise UserError(f"{folder}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
        return tensors[name].to(dtype or torch.float32)
    state, shapes = {}, model.state_dict()
    for ours, theirs in tensor_names(config).items():
        shape = shapes[ours].shape
        state[ours] = torch.cat([take(name, (rows or shape[0], *shape[1:])) for name, rows in theirs])
    if config.tie:
        state["unembed.weight"] = state["embed.weight"]
    model = Transformer(config) if False else model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.turn = rope_frequencies(config)
    if config.tie:
        model.unembed.weight = model.embed.weight
    if scalar:
        k = tensors["score.weight"].shape[0]
        model = ScalarModel(model, k).to(dtype or torch.float32)
        mean = tensors.get("score.mean", torch.zeros(k))
        model.load_state_dict({"score.weight": take("score.weight", (k, config.d_model)), "mean": mean}, strict=False)
    try:
        return model.to(device), load_tokenizer(folder, config.vocab_size)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {device}: {str(e).splitlines()[0]}")


def save(folder, model, tokenizer, dtype=torch.float32):
    """Writes a folder that load() and transformers open. A kill at any moment leaves what was there loadable."""
    scalar = isinstance(model, ScalarModel)
    transformer = model.transformer if scalar else model
    c, state, tensors = model.config, transformer.state_dict(), {}
    for ours, theirs in tensor_names(c).items():
        parts = state[ours].detach().to("cpu", dtype).split([rows or len(state[ours]) for _, rows in theirs])
        tensors |= {name: part for (name, _), part in zip(theirs, parts)}
    if scalar:
        tensors["score.weight"] = model.score.weight.detach().to("cpu", dtype)
        tensors["score.mean"] = model.mean.detach().to("cpu", torch.float32)
    rope = dict(c.rope_scaling or {"rope_type": "default"}, rope_theta=c.rope_theta)
    family, task = "Qwen2" if c.qkv_bias else "Llama", "SequenceClassification" if scalar else "CausalLM"
    config = {"architectures": [f"{family}For{task}"], "model_type": family.lower(), "vocab_size": c.vocab_size,
              "hidden_size": c.d_model, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
              "num_key_value_heads": c.n_kv_heads, "intermediate_size": c.d_ff, "head_dim": c.head_dim,
              "max_position_embeddings": c.max_len, "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling,
              "rope_parameters": rope, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie, "hidden_act": "silu",
              "eos_token_id": special(tokenizer, END), "pad_token_id": special(tokenizer, PAD), "bos_token_id": None,
              "torch_dtype": str(dtype).removeprefix("torch.")}
    if scalar:
        config["id2label"] = {str(i): f"score_{i}" for i in range(len(model.mean))}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors.tmp", tensors)
    for name, text in (tokenizer.files | {"config.json": json.dumps(config, indent=1)}).items():
        write_text(folder / name, text)
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")


def write_text(path, text):
    """All or nothing: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_name(path.name + ".tmp"), path)


# ---------------------------------------------------------------- training

def orthogonalise(G, steps=5):
    """Newton-Schulz: the nearest matrix with all singular values about 1, by products alone. G (N, rows, columns)

    In float32: torch's own Muon does this in bfloat16, which CPUs have no fast products for.
    """
    flip = G.shape[1] > G.shape[2]
    X = G.mT if flip else G
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if flip else X


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for groups marked muon=True, AdamW for the others."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}                                       # matrices of one shape go through together
            for p in group["params"] if group["muon"] else []:
                if p.grad is not None:
                    same.setdefault(p.shape, []).append(p)
            for shape, params in same.items():
                grads = torch.stack([p.grad for p in params])                                # (N, rows, columns)
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grads)
                momentum = state["momentum"].lerp_(grads, 0.05)
                # the factor gives the update AdamW's usual size, so that one learning rate serves both (Liu 2025)
                update = orthogonalise(grads.lerp(momentum, 0.95)) * 0.2 * max(shape) ** 0.5
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"])
                    p.grad = None                           # done: AdamW below passes over it
        super().step()


def optimizer(model, lr, kind="adamw", weight_decay=0.0):
    """AdamW, or Muon on the matrices of the blocks and AdamW on the rest."""
    if kind not in ("adamw", "muon"):
        raise UserError(f"optimizer {kind!r}: choose adamw or muon")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if "blocks." in name and p.dim() == 2]
    matrices = [p for name, p in named if "blocks." not in name and p.dim() == 2]
    rest = [p for name, p in named if p.dim() < 2]          # norms and biases are not pulled towards zero
    groups = [{"params": hidden, "muon": kind == "muon", "weight_decay": weight_decay},
              {"params": matrices, "muon": False, "weight_decay": weight_decay},
              {"params": rest, "muon": False, "weight_decay": 0.0}]
    return Muon([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def schedule(step, steps, warmup=10):
    """The learning rate's factor: up in a few steps, then down to 0 in a straight line."""
    return min((step + 1) / max(min(warmup, steps), 1), (steps - step) / steps)


class LoRA(nn.Module):
    """Hu et al. 2021: y = W x + 2 B A x, with W frozen, A (rank, in) random and B (out, rank) zero at the start."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn_like(linear.weight[:rank]) / linear.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros_like(linear.weight[:, :rank]))

    def forward(self, x):
        return self.linear(x) + 2 * (x @ self.A.T) @ self.B.T


def add_lora(model, rank):
    """Freezes the model and puts a LoRA on every matrix of its blocks -> the number of parameters that train."""
    model.requires_grad_(False)
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, LoRA(child, rank))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge_lora(model):
    """Adds 2 B A to each W and takes the LoRAs away: an ordinary model again, to save or to train on."""
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        for name, child in list(block.named_children()):
            if isinstance(child, LoRA):
                child.linear.weight.data += 2 * child.B.data @ child.A.data
                setattr(block, name, child.linear)
    model.requires_grad_(True)


# ---------------------------------------------------------------- files, flags, logs

def read_jsonl(path, need=()):
    """JSON lines -> list of dicts, each with every field in `need`, or an error that names the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{n}: not JSON ({e.msg} at column {e.colno})")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{n}: expected an object in braces, found {type(row).__name__}")
        for field in need:
            if row.get(field) in (None, "", []):
                raise UserError(f"{path}:{n}: the field {field!r} is {'empty' if field in row else 'missing'}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def parse(Config, doc, argv=None):
    """A dataclass -> command-line flags -> a Config. Each field's trailing comment is its help text."""
    try:
        comments = dict(re.findall(r"^    (\w+)\s*:.*?#\s*(.*)$", inspect.getsource(Config), re.M))
    except OSError:
        comments = {}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind = str if field.default is None else type(field.default)
        flag = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=field.default, help=text, **flag)
    return Config(**vars(parser.parse_args(argv)))


def main(Config, train, doc):
    """What every script does when it is run."""
    config = parse(Config, doc)
    try:
        train(config)
    except UserError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except Diverged as e:
        sys.exit(print(f"stopped: {e}", file=sys.stderr) or 1)


class Log:
    """Numbers of every step: at most 20 rows on the screen, all of them for metrics.csv."""

    def __init__(self, steps, quiet=False):
        self.steps, self.quiet, self.rows, self.begin = steps, quiet, [], time.time()
        self.every = max(1, math.ceil(steps / 19))           # and the first and the last: 20 at most

    def __call__(self, step, **numbers):
        row = {"step": step, **{name: float(x) for name, x in numbers.items()}}
        if not math.isfinite(row.get("loss", 0.0)):
            raise Diverged(f"step {step}: the loss is {row['loss']}")
        self.rows.append(row)
        if self.quiet:
            return
        live, shown = sys.stdout.isatty(), list(row.items())[:8]         # 8 columns of 9 fit 80
        if len(self.rows) == 1:
            print("".join(f"{name[:9]:>10}" if i else f"{name:>5}" for i, (name, _) in enumerate(shown)))
        if step % self.every == 0 or step == self.steps - 1:
            print("\r" * live + "".join(f"{x:>10.4g}" if i else f"{x:>5}" for i, (_, x) in enumerate(shown)), flush=True)
        elif live:
            left = (time.time() - self.begin) / len(self.rows) * (self.steps - step - 1)
            print(f"\r{step:>5}  {left:.0f} s left ", end="", flush=True)


def write_results(folder, log, **results):
    """results.json and metrics.csv, beside the checkpoint."""
    write_text(Path(folder) / "results.json", json.dumps(results, indent=1, default=str))
    names = list(dict.fromkeys(name for row in log.rows for name in row))
    lines = [names] + [[row.get(name, "") for name in names] for row in log.rows]
    write_text(Path(folder) / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))


def need(folder, command, seconds):
    """Makes a missing default checkpoint by running the script before this one, as a program."""
    program, script, *flags = shlex.split(command)
    if (Path(folder) / "config.json").exists():
        return
    if Path(folder) != Path("out") / Path(script).stem:
        raise UserError(f"{folder}: no such model folder")
    print(f'{folder} not found: running "{command}" first, about {seconds} seconds', flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).parent / script), *flags]).returncode
    if code:
        raise UserError(f'"{command}" ended with code {code}')


def chat(folders, temperature):
    """A line from the keyboard, an answer from each model, and so on; an empty line starts a new conversation."""
    models = {folder: load(folder) for folder in folders}
    histories = {folder: [] for folder in folders}
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text:
            histories = {folder: [] for folder in folders}
        for folder, (model, tokenizer) in models.items() if text else ():
            histories[folder].append({"role": "user", "content": text})
            try:
                reply, = answer(model, tokenizer, [histories[folder]], temperature=temperature)
            except UserError as e:
                reply = f"({e})"
            histories[folder].append({"role": "assistant", "content": reply})
            print(f"{folder}> {reply}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="model folders")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    arguments = parser.parse_args()
    try:
        chat(arguments.folders, arguments.temperature)
    except UserError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
