"""The shared machine: a small transformer, its tokenizer, sampling, checkpoints, optimiser, command line.

The network is Llama's, and so SmolLM2's, Qwen2.5's and TinyLlama's: an embedding, then in each layer

    x = x + Attention(RMSNorm(x))
    x = x + W_down (silu(W_gate RMSNorm(x)) * W_up RMSNorm(x))

and at last logits = W_vocab RMSNorm(x). A checkpoint is an ordinary Hugging Face folder, so this one class
runs the toy of 0.9M parameters and the real models. Every script imports this file and no other.

    python model.py out/sft out/dpo          a chat with trained models, side by side

Left out: dropout (PPO's first ratio would not be 1), other architectures. Next: sft.py trains this network.
"""
import argparse, contextlib, ctypes, dataclasses, functools, inspect, json, math, os, re, shlex, subprocess
import sys, time, unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc gives big tensors back to the kernel, and each next one pays a page fault every 4 kB: keep them
    ctypes.CDLL(None).mallopt(-3, 32 << 20), ctypes.CDLL(None).mallopt(-1, 1 << 30)

class UserError(Exception):
    """Bad input: main() prints its one line and exits 2."""

class Diverged(Exception):
    """Training had to stop, for instance at a loss of nan: main() exits 1."""

@contextlib.contextmanager
def blame(what, problem="cannot be read"):
    """Whatever goes wrong inside becomes a UserError of one line that names the file or flag."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"{what}: {problem} ({reason})")

# ---- the transformer: B batch, T time, C channels, V vocabulary, H query heads, K key heads, D head size

@dataclasses.dataclass
class ModelConfig:
    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2             # grouped-query attention: H / K query heads read the same keys and values
    d_ff: int = 352
    head_dim: int = None            # d_model // n_heads where not given
    max_len: int = 256
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # Llama 3's positions beyond those of its pretraining
    norm_eps: float = 1e-5
    tie: bool = True                # embedding and output projection are one matrix
    qkv_bias: bool = False          # Qwen2

    def __post_init__(self):
        self.head_dim = self.head_dim or self.d_model // self.n_heads

BF16 = ["cuda"]     # where products are taken in bfloat16; weights, sums, gradients and losses stay float32

def mixed(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16)

def rope_turns(c):
    """Radians that channel pair i of a head turns from one position to the next: theta^(-2i/D). -> (D/2,)"""
    turn = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device="cpu") / c.head_dim)
    scaling = c.rope_scaling
    if scaling:                     # Llama 3: only the slow turns become slower
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rounds = scaling["original_max_position_embeddings"] * turn / (2 * math.pi)
        keep = ((rounds - low) / (high - low)).clamp(0, 1)
        turn = turn * (keep + (1 - keep) / scaling["factor"])
    return turn

def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]): (a cos - b sin, b cos + a sin). x (B, T, heads, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)           # sin holds the minus sign

class Cache:
    """The keys and values of `length` tokens: for each layer a tensor (2, B, K, room, D)."""
    def __init__(self, room):
        self.room, self.length, self.layers = room, 0, {}

    def add(self, layer, k, v):
        (B, K, T, D), start = k.shape, self.length
        if start == 0:
            self.layers[layer] = k.new_empty(2, B, K, self.room, D)
        past = self.layers[layer][:, :, :, :start + T]                      # (2, B, K, S, D)
        past[0, :, :, start:], past[1, :, :, start:] = k, v
        return past

    def select(self, rows):
        self.layers = {layer: kv[:, rows] for layer, kv in self.layers.items()}

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, queries, keys = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.D = c.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(C, c.norm_eps), nn.RMSNorm(C, c.norm_eps)
        self.q = nn.Linear(C, queries, bias=c.qkv_bias)
        self.k, self.v = nn.Linear(C, keys, bias=c.qkv_bias), nn.Linear(C, keys, bias=c.qkv_bias)
        self.out = nn.Linear(queries, C, bias=False)
        self.gate, self.up = nn.Linear(C, c.d_ff, bias=False), nn.Linear(C, c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, C, bias=False)

    def forward(self, x, cos, sin, allowed, cache, layer):
        x = x + self.out(self.attend(self.norm1(x), cos, sin, allowed, cache, layer))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def attend(self, x, cos, sin, allowed, cache, layer):
        B, T, D = *x.shape[:2], self.D
        q, k, v = (linear(x).view(B, T, -1, D) for linear in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H, T, D), twice (B, K, T, D)
        if cache:
            k, v = cache.add(layer, k, v)                                   # (B, K, S, D)
        if cache and T == 1:        # for one query, two plain products are faster than torch's attention
            scores = q.reshape(B, k.shape[1], -1, D) * D ** -0.5 @ k.mT     # (B, K, H/K, S)
            scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
            return (scores.softmax(-1) @ v).reshape(B, 1, -1)
        groups = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None, enable_gqa=groups)
        return y.transpose(1, 2).reshape(B, T, -1)                          # (B, T, H * D)

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, C, V = config, config.d_model, config.vocab_size
        self.turns = rope_turns(config)
        self.embed = nn.Embedding(V, C)
        self.unembed = None if config.tie else nn.Linear(C, V, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(C, config.norm_eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:        # what adds to the residual stream starts smaller, as in GPT-2
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if adds else 0.02)

    def hidden(self, ids, mask=None, cache=None):
        """ids (B, T) -> (B, T, C). mask is True at real tokens, an unbroken run in each row: padding is on
        either side. With a cache, ids are the newest T of S tokens, and mask (B, S) covers them all."""
        past, S = (cache.length, cache.length + ids.shape[1]) if cache else (0, ids.shape[1])
        if S > self.config.max_len:
            raise UserError(f"{S} tokens do not fit the model's context of {self.config.max_len}")
        mask = ids.new_ones(len(ids), S, dtype=torch.bool) if mask is None else mask
        allowed = None              # padding on the right comes later than any real token: causal is enough
        if not mask[:, 0].all() or 1 < S - past < S:
            square = ids.new_ones(S, S, dtype=torch.bool)
            # padding sees itself, since a softmax over nothing is nan
            allowed = mask[:, None, None] & square.tril()[past:] | square.diag().diag()[past:]  # (B, 1, T, S)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]              # (B, T) 0 at the first real token
        angle = position[:, :, None, None] * self.turns.to(ids.device)         # (B, T, 1, D/2)
        x, cos, sin = self.embed(ids), angle.cos(), angle.sin()
        cos, sin = (torch.cat(pair, -1).to(x.dtype) for pair in ([cos, cos], [-sin, sin]))  # (B, T, 1, D)
        with mixed(ids.device):
            for layer, block in enumerate(self.blocks):
                x = block(x, cos, sin, allowed, cache, layer)
        if cache:
            cache.length = S
        return self.norm(x)

    def head(self, hidden):
        return F.linear(hidden, (self.unembed or self.embed).weight)

    def forward(self, ids, mask=None):
        return self.head(self.hidden(ids, mask))

class ScalarModel(nn.Module):
    """The same network with k numbers at every position: reward models, critics, classifiers."""
    def __init__(self, transformer, k=1):
        super().__init__()
        self.transformer, self.config = transformer, transformer.config
        self.score = nn.Linear(self.config.d_model, k, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (self.config.d_model + 1))   # all scores start near 0
        self.register_buffer("mean", torch.zeros(k))        # subtracted, so that an average answer scores 0

    def forward(self, ids, mask=None):
        scores = self.score(self.transformer.hidden(ids, mask)) - self.mean         # (B, T, k)
        return scores[..., 0] if len(self.mean) == 1 else scores

# ---- tokenizer and chat format

EOT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
# Text is first cut into pieces that no token crosses: a word or number with the space before it, and so on.
GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first cuts out every digit, so that spaces before a digit end their piece
DIGITS = r"\p{N}|" + GPT2.replace(r"| ?\p{N}+", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")

class Tokenizer(tiktoken.Encoding):
    """tiktoken's, and what some real vocabularies need: a Unicode normal form, bytes that they lack."""
    form, size, files = None, math.inf, {}

    def encode_ordinary(self, text):
        text = unicodedata.normalize(self.form, text) if self.form else text
        return [i for i in super().encode_ordinary(text) if i < self.size]      # see load_tokenizer

@functools.cache
def byte_letters():
    """Hugging Face spells a token's bytes in printable letters: GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return dict(zip(plain + [b for b in range(256) if b not in plain], map(chr, plain + [*range(256, 324)])))

def load_tokenizer(folder, vocab_size):
    """A folder's tokenizer.json, if it is byte-level BPE. -> Tokenizer"""
    path = Path(folder) / "tokenizer.json"
    with blame(path):
        spec = json.loads(path.read_text(encoding="utf-8"))
        steps, form = spec.get("pre_tokenizer") or {}, (spec.get("normalizer") or {}).get("type")
        steps = steps.get("pretokenizers", [steps])
        kinds, cut = tuple(step.get("type") for step in steps), steps[0].get("pattern", {}).get("Regex")
        known = {("Split", "ByteLevel"): cut, ("Digits", "ByteLevel"): DIGITS, ("ByteLevel",): GPT2}
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        made = [vocab["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in merges]
    in_order = [*dict.fromkeys(made)] == sorted({*made})        # then ids can be tiktoken's ranks
    if not known.get(kinds) or form not in (None, "NFC") or not in_order:
        raise UserError(f"{path}: not byte-level BPE as in GPT-2, Llama 3, Qwen2, SmolLM2 ({kinds}, {form})")
    byte = {letter: b for b, letter in byte_letters().items()}
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ranks = {bytes(byte[x] for x in token): i for token, i in vocab.items() if token not in specials}
    # tiktoken wants every byte and every id: a byte that is missing gets an id past the vocabulary, which
    # encode_ordinary leaves out; an id that is free gets a name
    size = max(vocab_size, *(i + 1 for i in (*vocab.values(), *specials.values())))
    specials |= {f"<|unused_{i}|>": i for i in {*range(size)} - {*ranks.values()} - {*specials.values()}}
    ranks = {bytes([b]): size + b for b in range(256)} | ranks
    tokenizer = Tokenizer(str(folder), pat_str=known[kinds], mergeable_ranks=ranks, special_tokens=specials)
    files = [path.parent / x for x in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    tokenizer.files = {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}
    tokenizer.form, tokenizer.size = form, size
    return tokenizer

def special(tokenizer, token):
    """A special token's id. <|endoftext|> stands in for <|pad|>, which most real vocabularies lack."""
    ids = tokenizer._special_tokens
    if token not in ids and not (token == PAD and EOT in ids):
        raise UserError(f"{tokenizer.name}: the vocabulary has no {token}, which the chat format needs")
    return ids[token if token in ids else EOT]

def to_messages(prompt):
    """A prompt is a conversation, a list of {"role", "content"}, or a text, where HH-RLHF's way of writing,
    "\\n\\nHuman: ...\\n\\nAssistant: ...", is several turns, and a last "Assistant:" asks for the answer."""
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    parts, roles = re.split(r"\n\n(Human|Assistant):", prompt)[1:], dict(Human="user", Assistant="assistant")
    said = [dict(role=roles[who], content=what.strip()) for who, what in zip(parts[::2], parts[1::2])]
    return said if said[-1]["content"] else said[:-1]

def split_pair(row):
    """A row with "chosen" and "rejected" -> prompt, chosen, rejected. A prompt that is not given is what both
    begin with, in HH-RLHF up to the last "Assistant:" that they share: answers can begin alike, too."""
    a, b, mark = row["chosen"], row["rejected"], "\n\nAssistant:"
    if "prompt" in row:
        return row["prompt"], a, b
    n = os.path.commonprefix([a, b]).rindex(mark) + len(mark) if isinstance(a, str) else len(a) - 1
    return a[:n], a[n:], b[n:] if b[:n] == a[:n] else ""

def render(tokenizer, messages, reply=False):
    """ChatML -> (ids, loss mask), two lists. Loss is on what the assistant says and its <|im_end|> alone.
    A message is ordinary text: whoever types <|im_end|> gets its letters, never the token."""
    encode, ids, loss = tokenizer.encode_ordinary, [], []
    start, end = special(tokenizer, START), special(tokenizer, END)
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":     # cut where sampling begins, so that training sees what sampling gives
            head, body = [start, *encode("assistant\n")], [*encode(content), end]
        else:
            head, body = [start, *encode(f"{role}\n{content}"), end], []
        ids += head + body + encode("\n")
        loss += [0] * len(head) + [1] * len(body) + [0] * len(encode("\n"))
    ids += [start, *encode("assistant\n")] if reply else []
    return ids, loss + [0] * (len(ids) - len(loss))

def pad(rows, value, left=False):
    """Lists of unequal length -> (B, T)"""
    fill = [[value] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows)])

# ---- sampling and log-probs

class Samples(NamedTuple):
    ids: torch.Tensor        # (B, P+T) prompts padded on the left, answers padded on the right
    mask: torch.Tensor       # (B, P+T) True at real tokens
    answer: torch.Tensor     # (B, P+T) True at the answer's tokens and its <|im_end|>: what is trained on
    logps: torch.Tensor      # (B, P+T) their log-probs at the sampling temperature, 0 elsewhere
    ended: torch.Tensor      # (B,) False where an answer ran out of room
    texts: list              # B answers

def draw(probs, top_k, top_p, generator):
    """A token a row: a dart thrown at the probabilities laid end to end. (B, V) -> (B,)"""
    if top_k or top_p < 1:
        p, order = probs.sort(descending=True)                              # (B, V) likeliest first
        rank, before = torch.arange(p.shape[1], device=p.device), p.cumsum(-1) - p
        probs = torch.zeros_like(p).scatter(1, order, p * ((rank < (top_k or p.shape[1])) & (before < top_p)))
    line = probs.cumsum(-1)
    dart = torch.rand(len(line), 1, generator=generator).to(line.device) * line[:, -1:]
    return torch.searchsorted(line, dart, right=True)[:, 0].clamp(max=line.shape[1] - 1)

@torch.no_grad()
@parametrize.cached()        # adapters are added to their matrices once, and not at every token
def sample(model, tokenizer, prompts, n=1, max_new=64, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           batch=256):
    """n answers to each prompt (a list of ids), p0 a0, p0 a1, ... p1 a0, ... Temperature 0 is greedy."""
    device, end, blank = model.embed.weight.device, special(tokenizer, END), special(tokenizer, PAD)
    P, room = max(map(len, prompts)), model.config.max_len
    if P + max_new > room:
        raise UserError(f"a prompt of {P} tokens and {max_new} new ones do not fit the context of {room}")
    owner = torch.arange(len(prompts)).repeat_interleave(n)                 # (B,) whose answer a row is
    ids = F.pad(pad(prompts, blank, left=True), (0, max_new), value=blank)[owner].to(device)        # (B, P+T)
    at, length = torch.arange(P + max_new, device=device), torch.tensor([len(p) for p in prompts])
    new, mask = at >= P, at >= (P - length[owner, None]).to(device)         # (B, P+T) what will come counts
    logps = torch.zeros(ids.shape, device=device)
    hidden = torch.inference_mode()(model.hidden)                           # quicker than no_grad
    for rows in torch.arange(len(ids)).split(batch):
        shared, copy = owner[rows].unique(return_inverse=True)              # each prompt goes through once
        cache = Cache(P + max_new)
        h = hidden(ids[shared * n, :P], mask[shared * n, :P], cache)[copy, -1]              # (rows, C)
        if n > 1:
            cache.select(copy)
        going = torch.ones(len(rows), dtype=torch.bool)
        for t in range(P, P + max_new):
            logits = model.head(h)                                          # (rows, V)
            probs = (logits / (temperature or 1)).softmax(-1)
            token = draw(probs, top_k, top_p, generator) if temperature else logits.argmax(-1)
            ids[rows, t], logps[rows, t] = token, probs.gather(1, token[:, None])[:, 0].log()
            going &= (token != end).cpu()
            if not going.any() or t + 1 == P + max_new:
                break
            if going.float().mean() < 0.7:                                  # drop the rows that have ended
                rows, token = rows[going], token[going]
                cache.select(going)
                going = going[going]
            h = hidden(token[:, None], mask[rows, :t + 1], cache)[:, 0]
    stop = (ids == end) & new                                               # (B, P+T)
    answer = new & (stop.cumsum(1) - stop.long() == 0)                      # up to the first end token
    mask &= answer | ~new
    T = P + int(answer.sum(1).max())
    said = answer & (ids != end)
    texts = [tokenizer.decode(row[keep].tolist()).strip() for row, keep in zip(ids.cpu(), said.cpu())]
    return Samples(ids.where(mask, blank)[:, :T], mask[:, :T], answer[:, :T], logps.where(answer, 0)[:, :T],
                   stop.any(1), texts)

def answer(model, tokenizer, prompts, **settings):
    """Answers to prompts that are texts or messages -> list of str"""
    ids = [render(tokenizer, to_messages(prompt), reply=True)[0] for prompt in prompts]
    return sample(model, tokenizer, ids, **settings).texts

def hidden_after(model, ids, mask, P):
    """hidden(ids, mask)[:, P - 1:], for rows whose first P columns hold prompts that several of them share:
    those go through the network once, and each answer sees their keys and values. -> (B, T - P + 1, C)"""
    prompts, copy = ids.where(mask, -1)[:, :P].unique(dim=0, return_inverse=True)   # (N, P), (B,) which of N
    if 2 * len(prompts) > len(ids):
        return model.hidden(ids, mask)[:, P - 1:]
    cache = Cache(ids.shape[1])
    last = model.hidden(prompts.clamp(min=0), prompts >= 0, cache)[copy, -1:]       # (B, 1, C)
    cache.select(copy)
    return torch.cat([last, model.hidden(ids[:, P:], mask, cache)], 1)

def token_logps(model, ids, mask, answer, temperature=1.0):
    """log p(ids[:, t] | ids[:, :t]) where answer[:, t] is True, exactly 0 elsewhere. All (B, T).
    Give it the temperature that drew the tokens, or it scores another policy than the one that acted."""
    P = int(answer.any(0).int().argmax().clamp(min=1))                      # the first answers begin here
    wanted = answer[:, P:]                                                  # (B, T-P) t - 1 predicts t
    logits = model.head(hidden_after(model, ids, mask, P)[:, :-1][wanted]) / temperature            # (N, V)
    logps = -F.cross_entropy(logits, ids[:, P:][wanted], reduction="none")                          # (N,)
    return F.pad(logps.new_zeros(wanted.shape).masked_scatter(wanted, logps), (P, 0))

# ---- checkpoints: Hugging Face folders

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIELDS = dict(vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers",
              d_ff="intermediate_size", n_heads="num_attention_heads", n_kv_heads="num_key_value_heads",
              head_dim="head_dim", max_len="max_position_embeddings", norm_eps="rms_norm_eps",
              tie="tie_word_embeddings")
PARTS = dict(embed="model.embed_tokens", blocks="model.layers", norm="model.norm", unembed="lm_head",
             q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.o_proj",
             gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", norm1="input_layernorm",
             norm2="post_attention_layernorm", mean="score.mean")

def their_name(name):
    """blocks.0.q.weight -> model.layers.0.self_attn.q_proj.weight"""
    return ".".join(PARTS.get(part, part) for part in name.removeprefix("transformer.").split("."))

def read_safetensors(path):
    """The format: 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, raw bytes."""
    with blame(path):
        raw = np.memmap(path, np.uint8, mode="c")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        cut = lambda begin, end, dtype: torch.from_numpy(raw[start + begin:start + end]).view(DTYPES[dtype])
        return {name: cut(*t["data_offsets"], t["dtype"]).view(t["shape"]) for name, t in header.items()}

def write_safetensors(path, tensors):
    header, offset, kinds = {"__metadata__": {"format": "pt"}}, 0, {v: k for k, v in DTYPES.items()}
    for name, t in tensors.items():
        header[name] = dict(dtype=kinds[t.dtype], shape=[*t.shape], data_offsets=[offset, offset + t.nbytes])
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)               # the tensors start at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.contiguous().view(-1).view(torch.uint8).numpy())

def read_config(folder):
    path = Path(folder) / "config.json"
    with blame(path):
        c = json.loads(path.read_text(encoding="utf-8"))
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        family, kind = c.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
        odd = [x for x in ("attention_bias", "mlp_bias", "use_sliding_window") if c.get(x)]
        if family not in ("llama", "qwen2") or kind not in ("default", "llama3") or odd:
            odd = " ".join([f"model_type {family}, rope {kind}", *odd])
            raise UserError(f"{path}: {odd} is another architecture than Llama's or Qwen2's")
        c = dict(num_key_value_heads=c["num_attention_heads"], head_dim=None, tie_word_embeddings=False) | c
        theta = rope.pop("rope_theta", None) or c.get("rope_theta") or 10000
        return ModelConfig(**{ours: c[theirs] for ours, theirs in FIELDS.items()}, qkv_bias=family == "qwen2",
                           rope_theta=float(theta), rope_scaling=None if kind == "default" else rope)

def load(folder, device="cpu", dtype=torch.float32, scalar=False):
    """A Hugging Face folder -> (Transformer, tokenizer)"""
    folder, config, tensors, state = Path(folder), read_config(folder), {}, {}
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / shards[0]).exists():
        shards = {*json.loads(index.read_text())["weight_map"].values()}
    for shard in shards:
        tensors |= read_safetensors(folder / shard)
    if scalar != ("score.weight" in tensors):
        raise UserError(f"{folder}: {'not a' if scalar else 'a'} scalar model (reward model, critic)")
    with torch.device("meta"):                    # no memory and no time for random numbers
        model = Transformer(config)
        model = ScalarModel(model, len(tensors["score.weight"])) if scalar else model
    for ours, blank in model.state_dict().items():
        name, found = their_name(ours), tensors.get(their_name(ours))
        if found is None or found.shape != blank.shape:
            found = "missing" if found is None else [*found.shape]
            raise UserError(f"{folder}: tensor {name} is {found}, expected {[*blank.shape]}")
        state[ours] = found.to(dtype, copy=True)  # the file could change, and is not aligned
    model.load_state_dict(state, assign=True)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    with blame(f"device {device}", "cannot be used"):
        return model.to(device), tokenizer

load_scalar = functools.partial(load, scalar=True)      # a folder that save() wrote for a ScalarModel

def save(folder, model, tokenizer, dtype=torch.float32):
    """Writes a folder that load() and transformers open. All is written beside what is there, then renamed:
    killed at any moment, a whole checkpoint is there to load."""
    if any(map(parametrize.is_parametrized, model.modules())):
        raise ValueError("merge_lora(model) comes before save()")
    scalar, c = isinstance(model, ScalarModel), model.config
    family, task = "Qwen2" if c.qkv_bias else "Llama", "SequenceClassification" if scalar else "CausalLM"
    config = {theirs: getattr(c, ours) for ours, theirs in FIELDS.items()} | dict(
        architectures=[f"{family}For{task}"], model_type=family.lower(), hidden_act="silu",
        rope_theta=c.rope_theta, rope_scaling=c.rope_scaling, torch_dtype=str(dtype)[6:], bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta} | (c.rope_scaling or {}),
        eos_token_id=special(tokenizer, END), pad_token_id=special(tokenizer, PAD))
    config |= {"id2label": {i: f"score {i}" for i in range(len(model.mean))}} if scalar else {}
    tensors = {their_name(name): t.to("cpu", dtype) for name, t in model.state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(folder) / "model.safetensors.tmp", tensors)
    texts = tokenizer.files | {"config.json": json.dumps(config, indent=1)}
    write_files(folder, texts, ["model.safetensors"])

def write_files(folder, texts, also=()):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        Path(folder, name + ".tmp").write_text(text, encoding="utf-8")
    for name in [*also, *texts]:                  # config.json last: without it need() sees no checkpoint
        os.replace(Path(folder, name + ".tmp"), Path(folder, name))

# ---- training

def orthogonalise(X, steps=5):
    """Newton-Schulz: products alone set all singular values to about 1. X (N, rows, columns). In float32:
    torch's own Muon works in bfloat16, which is slow on CPUs."""
    if X.shape[1] > X.shape[2]:
        return orthogonalise(X.mT, steps).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X

class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) in groups with muon=True, each of matrices of one shape; AdamW in the others."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if group["muon"] and p.grad is not None]
            if params:
                grads = torch.stack([p.grad for p in params])               # (N, rows, columns)
                state = self.state[params[0]]
                if not state:                     # AdamW expects a "step" in any state that it loads
                    state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(grads)}
                updates = orthogonalise(grads.lerp(state["momentum"].lerp_(grads, 0.05), 0.95))
                for p, update in zip(params, updates):
                    # scaled to the size of AdamW's updates, so that one learning rate serves both (Liu 2025)
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)
                    p.grad = None                 # done: AdamW passes over it
        super().step()

def optimizer(model, lr, kind="adamw"):
    """AdamW; or Muon for the matrices of the blocks and AdamW for embedding and vectors."""
    groups = {}
    for name, p in model.named_parameters():
        muon = {"adamw": False, "muon": True}[kind] and "blocks." in name and p.dim() == 2
        if p.requires_grad:
            groups.setdefault((muon, p.shape if muon else None), []).append(p)
    return Muon([dict(params=params, muon=muon) for (muon, _), params in groups.items()],
                lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

def schedule(step, steps, warmup=10):
    """The learning rate's factor: up in a few steps, then down to 0 in a straight line."""
    return min((step + 1) / warmup, 1 - step / steps)

class LoRA(nn.Module):
    """Hu et al. 2021: W + 2 B A with W frozen, A (rank, in) random, B (out, rank) 0 at the start."""
    def __init__(self, W, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn_like(W[:rank]) / W.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros_like(W[:, :rank]))

    def forward(self, W):
        return W + 2 * self.B @ self.A

def add_lora(model, rank):
    """Freezes the model, but for a scalar head, which is new, and adds a LoRA to every matrix of its blocks;
    a rank of 0 leaves all as it is. -> how many parameters train"""
    for name, p in model.named_parameters():
        p.requires_grad_(rank == 0 or name == "score.weight")
    for name, m in [*model.named_modules()]:
        if rank and isinstance(m, nn.Linear) and "blocks." in name:
            parametrize.register_parametrization(m, "weight", LoRA(m.weight, rank))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

def merge_lora(model):
    """W becomes W + 2 B A: an ordinary model again, which can be saved."""
    for m in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        parametrize.remove_parametrizations(m, "weight")
    model.requires_grad_(True)

# ---- more processes: torchrun --nproc_per_node=2 dpo.py
# Each does what one would do alone, on its share of the rows, and learns from the mean of all gradients: two
# with --batch 32 are one with --batch 64. In RL each has its own prompts and random numbers, and means over a
# batch (whitening, baselines; KTO's z, too) are over its own. Only the first one prints, and writes files.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def meet(config):
    """All processes find each other. -> a Config with which only the first one writes"""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    return dataclasses.replace(config, save=config.save and RANK == 0)

def portion(rows):
    if len(rows) < PROCESSES:
        raise UserError(f"{len(rows)} rows are too few for {PROCESSES} processes")
    return rows[RANK::PROCESSES]

def average(x):
    """A number or a tensor of floats -> its mean over all processes, in place."""
    x = torch.as_tensor(x)
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
        x /= PROCESSES
    return x

def clip(model):
    """Gradients become their mean over all processes, and no longer than 1. -> how long they were"""
    for p in model.parameters():
        if PROCESSES > 1 and p.requires_grad:     # no gradient: a small batch had no row for this process
            p.grad = average(torch.zeros_like(p) if p.grad is None else p.grad)
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)

# ---- files, flags and logs

def read_jsonl(path, need=()):
    """JSON lines -> list of dicts with all the fields in `need`, or an error that names the line."""
    rows = []
    with blame(path):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines, 1):
        if line.strip():
            with blame(f"{path}:{i}", "not JSON"):
                rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}:{i}: expected an object in braces, found {line[:40]}")
            for field in need:
                if rows[-1].get(field) in (None, "", []):
                    raise UserError(f"{path}:{i}: {field!r} is {'empty' if field in rows[-1] else 'missing'}")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows

def parse(Config, doc, argv=None):
    """A dataclass -> command-line flags -> a Config. The comment behind each field is its help."""
    comments = dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind, text = type(field.default), f"{comments.get(field.name, '')} ({field.default})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        names = {"--" + field.name: 0, "--" + field.name.replace("_", "-"): 0}        # --best_of, --best-of
        parser.add_argument(*names, default=field.default, help=text.replace("%", "%%"), **how)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, as on any GPU: twice as "
                        "fast for real models on a CPU that has instructions for it (avx512_bf16, amx)")
    flags = vars(parser.parse_args(argv))
    if flags.pop("bf16"):
        BF16.append("cpu")
    for name, value in flags.items():
        least = 1 if name == "accumulate" else 0
        if name != "seed" and not isinstance(value, str) and value < least:
            raise UserError(f"--{name} {value}: at least {least} is needed")
    return Config(**flags)

@contextlib.contextmanager
def exit_codes():
    try:
        yield
    except (UserError, Diverged) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
    except (KeyboardInterrupt, EOFError):         # outside of the loop, which saves what there is
        sys.exit("\ninterrupted")

def main(Config, train, doc):
    with exit_codes():
        config = parse(Config, doc)
        train(config if PROCESSES == 1 else meet(config))
        if PROCESSES > 1:
            torch.distributed.destroy_process_group()

class Log:
    """The numbers of every step: all of them for metrics.csv, at most 20 rows on the screen."""
    def __init__(self, steps, quiet=False):
        self.steps, self.quiet, self.rows, self.begin = steps, quiet, [], time.time()

    def __call__(self, step, **numbers):
        means = average(torch.tensor([float(x) for x in numbers.values()], dtype=torch.float64)).tolist()
        self.rows.append({"step": step} | dict(zip(numbers, means)))
        if not math.isfinite(self.rows[-1].get("loss", 0)):
            raise Diverged(f"step {step}: the loss is {self.rows[-1]['loss']}")
        if self.quiet:
            return
        names, live = [*numbers][:7], "\r" if sys.stdout.isatty() else ""   # 5 + 7 * 10 columns
        if len(self.rows) == 1:
            print(" step" + "".join(f"{name[:9]:>10}" for name in names))
        if step % math.ceil(self.steps / 19) == 0 or step == self.steps - 1:
            shown = (self.rows[-1][name] for name in names)
            shown = "".join(f"{x:10.4f}" if abs(x) < 100 else f"{x:10.1f}" for x in shown)
            print(f"{live}{step:5}{shown}", flush=True)
        elif live:
            left = (time.time() - self.begin) / len(self.rows) * (self.steps - step - 1)
            print(f"{live}{step:5}  {left:.0f} s left ", end="", flush=True)

def write_results(folder, log, **results):
    names = list(dict.fromkeys(name for row in log.rows for name in row))
    lines = [names] + [[row.get(name, "") for name in names] for row in log.rows]
    write_files(folder, {"results.json": json.dumps(results, indent=1, default=str),
                         "metrics.csv": "".join(",".join(map(str, line)) + "\n" for line in lines)})

def need(folder, command, seconds):
    """Where the default checkpoint of an earlier stage is missing, runs that stage as a program."""
    script, *flags = shlex.split(command)[1:]
    default = Path(folder) == Path("out", Path(script).stem)    # else load() will say what is wrong with it
    if default and not RANK and not Path(folder, "config.json").exists():
        print(f'{folder} not found: running "{command}" first, about {seconds} seconds', flush=True)
        alone = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
        if subprocess.run([sys.executable, Path(__file__).parent / script, *flags], env=alone).returncode:
            raise UserError(f'"{command}" failed')
    average(0.0)                                  # other processes wait here for the first

def chat(folders):
    models, histories = [load(folder) for folder in folders], [[] for _ in folders]
    while text := input("you> "):                 # an empty line ends it
        for folder, (model, tokenizer), history in zip(folders, models, histories):
            history += to_messages(text)
            reply, = answer(model, tokenizer, [history], temperature=0.7)
            history.append({"role": "assistant", "content": reply})
            print(f"{folder}> {reply}")

if __name__ == "__main__":
    with exit_codes():
        chat(sys.argv[1:]) if sys.argv[1:] and "--help" not in sys.argv else print(__doc__)
