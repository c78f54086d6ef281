"""The shared machine: a small transformer, its tokenizer, sampling, checkpoints, optimiser and command line.

The network is Llama's, and so SmolLM2's, Qwen2.5's and TinyLlama's. Tokens are embedded, and then each layer does

    x = x + Attention(RMSNorm(x))
    x = x + W_down (silu(W_gate RMSNorm(x)) * W_up RMSNorm(x))

until logits = W_vocab RMSNorm(x). Checkpoints are ordinary Hugging Face folders, so one class runs the toy of 0.9M
parameters and the real models. Every script imports this file and no other.

    python model.py out/sft out/dpo               a chat with trained models, side by side

Left out: dropout (PPO's first ratio would not be 1), other architectures. Next: sft.py trains this network.
"""
import argparse, base64, ctypes, dataclasses, functools, inspect, json, math, os, re, shlex, subprocess, sys, time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken, tiktoken._educational
import torch
import torch.nn as nn
import torch.nn.functional as F

class UserError(Exception):
    """Bad input. main() prints its one line and exits 2."""

class Diverged(Exception):
    """Training had to stop, for instance at a loss of nan. main() exits 1."""

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc returns big tensors to the kernel at once, and the next one pays a page fault every 4 kB: let it keep them
    ctypes.CDLL(None).mallopt(-3, 32 << 20), ctypes.CDLL(None).mallopt(-1, 1 << 30)

# ---- the transformer. B batch, T time, C channels, V vocabulary; H query heads share K key heads; D channels a head

@dataclasses.dataclass
class ModelConfig:
    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2             # grouped-query attention: every H / K query heads read the same keys and values
    d_ff: int = 352
    head_dim: int = None            # d_model // n_heads where not given
    max_len: int = 256
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # {"rope_type": "linear" or "llama3", "factor": ...}: stretched positions
    norm_eps: float = 1e-5
    tie: bool = True                # embedding and output projection are one matrix
    qkv_bias: bool = False          # Qwen2

    def __post_init__(self):
        self.head_dim = self.head_dim or self.d_model // self.n_heads

def rope_turns(config):
    """Radians by which channel pair i of a head turns from one position to the next: theta^(-2i/D). -> (D/2,)"""
    turn, scaling = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim), config.rope_scaling
    if not scaling:
        return turn
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return turn / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]         # Llama 3: only slow turns are stretched
    rounds = scaling["original_max_position_embeddings"] * turn / (2 * math.pi)
    keep = ((rounds - low) / (high - low)).clamp(0, 1)
    return turn * (keep + (1 - keep) / scaling["factor"])

def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) by its angle: (a cos - b sin, b cos + a sin). x (B, T, heads, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)               # the minus sign is in sin

class Cache:
    """The keys and values of the tokens so far, `length` of them: a tensor (2, B, K, room, D) for each layer."""

    def __init__(self, room):
        self.room, self.length, self.layers = room, 0, {}

    def add(self, layer, k, v):
        B, K, T, D = k.shape
        past = self.layers.setdefault(layer, k.new_empty(2, B, K, self.room, D) if not self.length else None)
        S = self.length + T
        past[0, :, :, self.length:S], past[1, :, :, self.length:S] = k, v
        return past[0, :, :, :S], past[1, :, :, :S]                             # (B, K, S, D)

    def select(self, rows):
        """Keeps these rows in this order; a row may come several times."""
        self.layers = {layer: past[:, rows] for layer, past in self.layers.items()}

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.D = c.n_heads, c.n_kv_heads, c.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(c.d_model, c.norm_eps), nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, (self.H + 2 * self.K) * self.D, bias=c.qkv_bias)    # one product for three
        self.out = nn.Linear(self.H * self.D, c.d_model, bias=False)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)                         # one product for two
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x, cos, sin, allowed, cache, layer):
        x = x + self.out(self.attend(self.norm1(x), cos, sin, allowed, cache, layer))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)                             # (B, T, d_ff) each
        return x + self.down(F.silu(gate) * up)

    def attend(self, x, cos, sin, allowed, cache, layer):
        B, T, H, K, D = *x.shape[:2], self.H, self.K, self.D
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        qk = rotate(qkv[:, :, :H + K], cos, sin)
        q = qk[:, :, :H].transpose(1, 2)                                                    # (B, H, T, D)
        k, v = qk[:, :, H:].transpose(1, 2), qkv[:, :, H + K:].transpose(1, 2)              # (B, K, T, D)
        if cache:
            k, v = cache.add(layer, k, v)                                                   # (B, K, S, D)
        if cache and T == 1:                      # two plain products are faster than torch's attention for one query
            scores = q.reshape(B, K, H // K, D) * D ** -0.5 @ k.mT                          # (B, K, H/K, S)
            weights = (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)
            return (weights @ v).reshape(B, 1, H * D)
        y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None, enable_gqa=H != K)
        return y.transpose(1, 2).reshape(B, T, H * D)

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, C, V = config, config.d_model, config.vocab_size
        self.embed = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(C, config.norm_eps)
        self.unembed = None if config.tie else nn.Linear(C, V, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:                      # what adds to the residual stream starts smaller, as in GPT-2
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids, mask=None, cache=None):
        """ids (B, T) -> (B, T, C). mask is True at real tokens, which are contiguous in a row; padding may be on
        either side. With a cache, ids are the newest T of S tokens and the mask (B, S) covers them all."""
        past, S = (cache.length, cache.length + ids.shape[1]) if cache else (0, ids.shape[1])
        if S > self.config.max_len:
            raise UserError(f"{S} tokens do not fit into the model's context of {self.config.max_len}")
        mask = torch.ones(len(ids), S, dtype=torch.bool, device=ids.device) if mask is None else mask
        allowed = None              # causal is enough without padding, and with padding on the right: it comes later
        if not mask[:, 0].all() or 1 < S - past < S:
            allowed = mask[:, None, None] & torch.ones(S, S, device=ids.device).tril()[past:].bool()     # (B, 1, T, S)
            # padding sees itself: a softmax over nothing would be nan, and nan times 0 is nan
            allowed = allowed | torch.eye(S, dtype=torch.bool, device=ids.device)[past:]
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]                  # (B, T) the first real token is at 0
        angle = position[:, :, None, None] * rope_turns(self.config).to(ids.device)                     # (B, T, 1, D/2)
        x = self.embed(ids)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)                                # (B, T, 1, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, allowed, cache, layer)
        if cache:
            cache.length = S
        return self.norm(x)

    def head(self, hidden):
        return F.linear(hidden, self.embed.weight if self.unembed is None else self.unembed.weight)

    def forward(self, ids, mask=None):
        return self.head(self.hidden(ids, mask))

class ScalarModel(nn.Module):
    """The same network with k numbers at every position: reward models, critics, classifiers."""

    def __init__(self, transformer, k=1):
        super().__init__()
        self.transformer, self.config = transformer, transformer.config
        self.score = nn.Linear(self.config.d_model, k, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (self.config.d_model + 1))   # starts small: everything scores about 0
        self.register_buffer("mean", torch.zeros(k))             # subtracted, so that an average answer scores 0

    def forward(self, ids, mask=None):
        scores = self.score(self.transformer.hidden(ids, mask)) - self.mean     # (B, T, k)
        return scores[..., 0] if len(self.mean) == 1 else scores

# ---- tokenizer and chat format

EOT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
# A text is first cut into pieces that tokens never cross: words and numbers with the space before them, and so on
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"       # ours
GPT2 = PIECES.replace("{1,2}", "+")
DIGITS = r"\p{N}|" + GPT2.replace(r"| ?\p{N}+", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")        # SmolLM2, digit by digit
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding and what some real vocabularies need: a Unicode normal form, and bytes that they lack."""
    form, lacks, files = None, b"", {}

    def encode_ordinary(self, text):
        text = unicodedata.normalize(self.form, text) if self.form else text
        raw = text.encode(errors="replace")
        if len(raw) == len(raw.translate(None, self.lacks)):
            return super().encode_ordinary(text)
        pieces = tiktoken._educational.regex.findall(self._pat_str, text)               # missing bytes leave their piece
        return [i for p in pieces for i in self._encode_single_piece(p.encode().translate(None, self.lacks))]

@functools.cache
def byte_letters():
    """Hugging Face spells the bytes of a token in printable letters, with GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*plain}))}

def load_ranks(path):
    """A vocabulary in tiktoken's format, a line a token: its bytes in base64 and its rank. Special tokens follow."""
    try:
        ranks = {base64.b64decode(t): int(rank) for t, rank in map(str.split, Path(path).read_text().splitlines())}
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not a file of base64 tokens and ranks ({e})")
    specials = {token: len(ranks) + i for i, token in enumerate([EOT, START, END, PAD])}
    tokenizer = Tokenizer(Path(path).stem, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=specials)
    tokenizer.files = huggingface_files(ranks, specials)
    return tokenizer

def huggingface_files(ranks, specials):
    """The same vocabulary as a tokenizer.json, which wants to know from which two parts each token was merged."""
    spell, merges = lambda token: "".join(byte_letters()[b] for b in token), []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                     # merge the lowest rank first, as the encoder does
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [[spell(part) for part in parts]] if len(parts) == 2 else []
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    tokenizer = {"version": "1.0", "added_tokens": [{"id": i, "content": token, "special": True} | flags
                                                    for token, i in specials.items()],
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, step]}, "decoder": step,
                 "model": {"type": "BPE", "vocab": {spell(t): i for t, i in ranks.items()} | specials, "merges": merges}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "chat_template": CHATML,
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False), "tokenizer_config.json": json.dumps(config)}

def load_tokenizer(folder, vocab_size):
    """A folder's tokenizer.json -> Tokenizer, if it is byte-level BPE."""
    path = Path(folder) / "tokenizer.json"
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        steps, form = spec.get("pre_tokenizer") or {}, (spec.get("normalizer") or {}).get("type")
        steps = steps.get("pretokenizers", [steps])
        kinds, cut = [step.get("type") for step in steps], steps[0].get("pattern", {}).get("Regex")
        pattern = {("Split", "ByteLevel"): cut, ("Digits", "ByteLevel"): DIGITS, ("ByteLevel",): GPT2}.get(tuple(kinds))
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        made = [vocab["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in merges]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: no tokenizer that can be read ({type(e).__name__}: {e})")
    if not pattern or form not in (None, "NFC") or (made := list(dict.fromkeys(made))) != sorted(made):
        raise UserError(f"{path}: not byte-level BPE as in GPT-2, Llama 3, Qwen2 or SmolLM2 ({kinds}, {form})")
    byte = {letter: b for b, letter in byte_letters().items()}
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ranks = {bytes(byte[letter] for letter in t): i for t, i in vocab.items() if t not in specials}  # ids follow merges
    lacks = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    taken = {*ranks.values(), *specials.values()}
    unused = [i for i in range(max(vocab_size, max(taken) + 1) + len(lacks)) if i not in taken]
    # tiktoken wants all bytes, so those missing get ids past the vocabulary; other gaps get a name, so that they decode
    for token in reversed(lacks):
        ranks[token] = unused.pop()
    specials |= {f"<|unused_{i}|>": i for i in unused}
    tokenizer = Tokenizer(str(folder), pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    tokenizer.form, tokenizer.lacks = form, b"".join(lacks)
    tokenizer.files = {n: (path.parent / n).read_text(encoding="utf-8") for n in names if (path.parent / n).exists()}
    return tokenizer

def special(tokenizer, token):
    """The id of a special token. <|endoftext|> stands in for <|pad|>, which most real vocabularies lack."""
    known = tokenizer._special_tokens
    token = EOT if token == PAD and PAD not in known else token
    if token not in known:
        raise UserError(f"the vocabulary of {tokenizer.name} has no {token}, which the chat format needs")
    return known[token]

def to_messages(prompt):
    """A prompt is a text or a conversation, a list of {"role", "content"}."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

def render(tokenizer, messages, reply=False):
    """ChatML -> (ids, loss mask), two lists. What the assistant says and its <|im_end|> carry loss, nothing else does.
    A message is ordinary text: whoever types <|im_end|> gets its letters, never the token."""
    encode, ids, loss = tokenizer.encode_ordinary, [], []
    for message in [*messages, {"role": "assistant", "content": None}] if reply else messages:
        role, content = message["role"], message["content"]
        if role == "assistant":                   # cut where sampling starts, so that training sees what sampling gives
            head, body = encode("assistant\n"), [] if content is None else encode(content) + [special(tokenizer, END)]
        else:
            head, body = encode(f"{role}\n{content}") + [special(tokenizer, END)], []
        tail = [] if content is None else encode("\n")
        ids += [special(tokenizer, START), *head, *body, *tail]
        loss += [0] * (1 + len(head)) + [1] * len(body) + [0] * len(tail)
    return ids, loss

def pad(rows, value, left=False):
    """Lists of unequal length -> (B, T)"""
    T = max(map(len, rows))
    return torch.tensor([[value] * (T - len(r)) * left + list(r) + [value] * (T - len(r)) * (not left) for r in rows])

# ---- sampling and log-probs

class Samples(NamedTuple):
    ids: torch.Tensor        # (B, P+T) prompts padded on the left, answers padded on the right
    mask: torch.Tensor       # (B, P+T) True at real tokens
    answer: torch.Tensor     # (B, P+T) True at the answer's tokens and its <|im_end|>: what is trained on
    logps: torch.Tensor      # (B, P+T) log-prob of the answer's tokens at the sampling temperature, 0 elsewhere
    ended: torch.Tensor      # (B,) False where an answer ran out of room
    texts: list              # B answers

def draw(probs, top_k, top_p, generator):
    """A token a row: a dart thrown at the probabilities laid end to end. (B, V) -> (B,)"""
    if top_k or top_p < 1:
        p, order = probs.sort(descending=True)                                  # (B, V) likeliest first
        rank, before = torch.arange(p.shape[1], device=p.device), p.cumsum(-1) - p
        p = p * ((rank < (top_k or p.shape[1])) & (before < top_p))
        probs = torch.zeros_like(p).scatter(1, order, p)
    line = probs.cumsum(-1)
    dart = torch.rand(len(line), 1, generator=generator).to(line.device) * line[:, -1:]
    return torch.searchsorted(line, dart, right=True)[:, 0].clamp(max=line.shape[1] - 1)

@torch.no_grad()
def sample(model, tokenizer, prompts, n=1, max_new=64, temperature=1.0, top_k=0, top_p=1.0, generator=None, batch=256):
    """n answers to each prompt (a list of ids), in the order p0 a0, p0 a1, ... p1 a0. Temperature 0 is greedy."""
    device, end, blank = model.embed.weight.device, special(tokenizer, END), special(tokenizer, PAD)
    owner, P = torch.arange(len(prompts)).repeat_interleave(n), max(map(len, prompts))             # (B,) its prompt
    if P + max_new > model.config.max_len:
        raise UserError(f"a prompt of {P} tokens and {max_new} new ones exceed the context of {model.config.max_len}")
    ids = F.pad(pad(prompts, blank, left=True), (0, max_new), value=blank)[owner].to(device)       # (B, P+T)
    mask = F.pad(pad([[1] * len(p) for p in prompts], 0, left=True), (0, max_new), value=1)[owner].bool().to(device)
    logps = torch.zeros(ids.shape, device=device)
    for rows in torch.arange(len(ids)).split(batch):
        mine, copy = owner[rows].unique(return_inverse=True)                    # each prompt goes through once
        cache, first = Cache(P + max_new), mine * n
        h = model.hidden(ids[first, :P], mask[first, :P], cache)[copy, -1]      # (rows, C)
        cache.select(copy)
        going = torch.ones(len(rows), dtype=torch.bool)
        for t in range(P, P + max_new):
            logits = model.head(h).float()                                      # (rows, V)
            probs = (logits / (temperature or 1)).softmax(-1)
            token = logits.argmax(-1) if temperature == 0 else draw(probs, top_k, top_p, generator)
            ids[rows, t], logps[rows, t] = token, probs.gather(1, token[:, None])[:, 0].log()
            going &= (token != end).cpu()
            if not going.any() or t + 1 == P + max_new:
                break
            if going.sum() < 0.7 * len(going):                                  # drop the rows that have ended
                rows, token = rows[going], token[going]
                cache.select(going), (going := going[going])
            h = model.hidden(token[:, None], mask[rows, :t + 1], cache)[:, 0]
    answer = torch.arange(P + max_new, device=device) >= P                      # (P+T,)
    stop = (ids == end) & answer                                                # (B, P+T)
    answer = answer & (stop.cumsum(1) - stop.long() == 0)                       # up to the first end token
    mask = mask & (answer | (torch.arange(P + max_new, device=device) < P))
    T = P + int(answer.sum(1).max())
    ids, mask, answer, logps = ids.where(mask, blank)[:, :T], mask[:, :T], answer[:, :T], logps.where(answer, 0)[:, :T]
    texts = [tokenizer.decode(r[a & (r != end)].tolist()).strip() for r, a in zip(ids.cpu(), answer.cpu())]
    return Samples(ids, mask, answer, logps, stop.any(1), texts)

def answer(model, tokenizer, prompts, **settings):
    """Answers to prompts, each a text or messages. -> list of str"""
    return sample(model, tokenizer, [render(tokenizer, to_messages(p), reply=True)[0] for p in prompts], **settings).texts

def token_logps(model, ids, mask, answer, temperature=1.0):
    """log p(ids[:, t] | ids[:, :t]) where answer[:, t] is True, exactly 0 elsewhere. All (B, T). Give it the temperature
    that drew the tokens, or it scores another policy than the one that acted."""
    wanted = answer[:, 1:]                                                      # (B, T-1) t - 1 predicts t
    logits = model.head(model.hidden(ids, mask)[:, :-1][wanted]).float() / temperature             # (N, V) no others
    logps = -F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")      # (N,)
    return F.pad(logps.new_zeros(wanted.shape).masked_scatter(wanted, logps), (1, 0))

# ---- checkpoints: Hugging Face folders

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIELDS = dict(vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers", d_ff="intermediate_size",
              n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
              max_len="max_position_embeddings", norm_eps="rms_norm_eps", tie="tie_word_embeddings")

def read_safetensors(path):
    """The format: a length in 8 bytes, a JSON header of that length {name: {dtype, shape, data_offsets}}, raw bytes."""
    try:
        raw = np.memmap(path, np.uint8, mode="c")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        cut = lambda begin, end: torch.from_numpy(raw[start + begin:start + end])
        return {n: cut(*t["data_offsets"]).view(DTYPES[t["dtype"]]).view(t["shape"]) for n, t in header.items()}
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise UserError(f"{path}: not a safetensors file that can be read ({type(e).__name__}: {e})")

def write_safetensors(path, tensors):
    header, offset, names = {"__metadata__": {"format": "pt"}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + t.nbytes])
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)               # so that the tensors start at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
        f.flush(), os.fsync(f.fileno())

def tensor_names(c):
    """Our parameter -> the Hugging Face tensors stacked in it, each with its rows (None: all of them)."""
    yield "embed.weight", [("model.embed_tokens.weight", None)]
    yield "norm.weight", [("model.norm.weight", None)]
    if not c.tie:
        yield "unembed.weight", [("lm_head.weight", None)]
    for i in range(c.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for kind in ["weight", "bias"][:1 + c.qkv_bias]:
            yield f"{ours}qkv.{kind}", [(f"{theirs}self_attn.{x}_proj.{kind}", heads * c.head_dim)
                                        for x, heads in zip("qkv", (c.n_heads, c.n_kv_heads, c.n_kv_heads))]
        yield ours + "gate_up.weight", [(f"{theirs}mlp.{x}_proj.weight", c.d_ff) for x in ("gate", "up")]
        for a, b in dict(out="self_attn.o_proj", down="mlp.down_proj", norm1="input_layernorm",
                         norm2="post_attention_layernorm").items():
            yield f"{ours}{a}.weight", [(f"{theirs}{b}.weight", None)]

def read_config(folder):
    path = Path(folder) / "config.json"
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        found = [c.get("model_type"), c.get("hidden_act", "silu"), kind] + [
            bool(c.get(x)) for x in ("attention_bias", "mlp_bias", "use_sliding_window")]
        if found[0] not in ("llama", "qwen2") or kind not in ("default", "linear", "llama3") or any(found[3:]):
            raise UserError(f"{path}: another architecture than Llama's or Qwen2's {found}")
        known = {ours: c[theirs] for ours, theirs in FIELDS.items() if c.get(theirs) is not None}
        return ModelConfig(**{"n_kv_heads": known["n_heads"], "tie": False} | known, qkv_bias=found[0] == "qwen2",
                           rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000),
                           rope_scaling=None if kind == "default" else rope)
    except OSError:
        raise UserError(f"{folder}: " + ("no config.json, so not a model" if Path(folder).is_dir() else "no such folder"))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not the config of a model ({type(e).__name__}: {e})")

def load(folder, device="cpu", dtype=torch.float32, scalar=False):
    """A Hugging Face folder -> (Transformer, tokenizer)"""
    config, folder, tensors = read_config(folder), Path(folder), {}
    index = folder / "model.safetensors.index.json"
    sharded = index.exists() and not (folder / "model.safetensors").exists()
    for shard in {*json.loads(index.read_text())["weight_map"].values()} if sharded else ["model.safetensors"]:
        tensors |= read_safetensors(folder / shard)
    if scalar != ("score.weight" in tensors):
        raise UserError(f"{folder}: {'not a' if scalar else 'a'} scalar model (reward model, critic)")
    def take(name, shape):
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != list(shape):
            raise UserError(f"{folder}: tensor {name} is {found} and should be {list(shape)}")
        return tensors[name].to(dtype or torch.float32)
    with torch.device("meta"):                    # no memory and no time for random numbers
        model = Transformer(config)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict({ours: torch.cat([take(name, [rows or shapes[ours][0], *shapes[ours][1:]])
                                            for name, rows in theirs]) for ours, theirs in tensor_names(config)}, assign=True)
    if scalar:
        k = len(tensors["score.weight"])
        model = ScalarModel(model, k).to(dtype or torch.float32)
        model.score.weight.data, model.mean = take("score.weight", [k, config.d_model]), take("score.mean", [k])
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {device}: {str(e).splitlines()[0]}")
    return model, load_tokenizer(folder, config.vocab_size)

load_scalar = functools.partial(load, scalar=True)     # a folder that save() wrote for a ScalarModel

def save(folder, model, tokenizer, dtype=torch.float32):
    """Writes a folder that load() and transformers open. All of it is first written beside what is there, and then
    renamed: killed at any moment, the old checkpoint or the new one is there to load."""
    scalar, c, tensors = isinstance(model, ScalarModel), model.config, {}
    state = {n.removeprefix("transformer."): p.detach().to("cpu", dtype) for n, p in model.state_dict().items()}
    for ours, theirs in tensor_names(c):
        tensors |= zip([name for name, _ in theirs], state[ours].split([rows or len(state[ours]) for _, rows in theirs]))
    tensors |= {"score.weight": state["score.weight"], "score.mean": state["mean"]} if scalar else {}
    kind, task = "Qwen2" if c.qkv_bias else "Llama", "SequenceClassification" if scalar else "CausalLM"
    rope = {"rope_type": "default", "rope_theta": c.rope_theta} | (c.rope_scaling or {})
    config = {theirs: getattr(c, ours) for ours, theirs in FIELDS.items()} | dict(
        architectures=[f"{kind}For{task}"], model_type=kind.lower(), hidden_act="silu", rope_theta=c.rope_theta,
        rope_scaling=c.rope_scaling, rope_parameters=rope, torch_dtype=str(dtype).split(".")[1], bos_token_id=None,
        eos_token_id=special(tokenizer, END), pad_token_id=special(tokenizer, PAD))
    config |= {"id2label": {i: f"score {i}" for i in range(len(model.mean))}} if scalar else {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(folder) / "model.safetensors.tmp", tensors)
    write_files(folder, tokenizer.files | {"config.json": json.dumps(config, indent=1)}, ["model.safetensors"])

def write_files(folder, texts, also=()):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (Path(folder) / (name + ".tmp")).write_text(text, encoding="utf-8")
    for name in [*texts, *also]:
        os.replace(Path(folder) / (name + ".tmp"), Path(folder) / name)

# ---- training

def orthogonalise(X, steps=5):
    """Newton-Schulz: sets all singular values to about 1 by products alone. X (N, rows, columns)
    In float32, unlike torch's Muon: CPUs have no fast bfloat16 products."""
    if X.shape[1] > X.shape[2]:
        return orthogonalise(X.mT, steps).mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X

class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for groups with muon=True, AdamW for the others."""

    @torch.no_grad()
    def step(self):
        shapes = {}                               # matrices of one shape go through together
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else []:
                shapes.setdefault(p.shape, []).append((p, group))
        for shape, members in shapes.items():
            grads = torch.stack([p.grad for p, _ in members])                   # (N, rows, columns)
            momentum = self.state[members[0][0]].setdefault("momentum", torch.zeros_like(grads)).lerp_(grads, 0.05)
            # scaled to the size of AdamW's updates, so that one learning rate serves both (Liu 2025)
            updates = orthogonalise(grads.lerp(momentum, 0.95)) * 0.2 * max(shape) ** 0.5
            for (p, group), update in zip(members, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                p.grad = None                     # done: AdamW passes over it
        super().step()

def optimizer(model, lr, kind="adamw", weight_decay=0.0):
    """AdamW; or Muon for the matrices of the blocks, and AdamW for the embedding and the vectors."""
    if kind not in ("adamw", "muon"):
        raise UserError(f"optimizer {kind!r}: choose adamw or muon")
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((kind == "muon" and "blocks." in name and p.dim() == 2, p.dim() == 2), []).append(p)
    return Muon([dict(params=params, muon=muon, weight_decay=weight_decay * matrix)
                 for (muon, matrix), params in groups.items()], lr=lr, betas=(0.9, 0.95), fused=True)

def schedule(step, steps, warmup=10):
    """The learning rate's factor: up in a few steps, then down to 0 in a straight line."""
    return min((step + 1) / warmup, 1 - step / steps)

class LoRA(nn.Module):
    """Hu et al. 2021: y = W x + 2 B A x with W frozen, A (rank, in) random, B (out, rank) 0 at the start."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, W = linear, linear.weight
        self.A = nn.Parameter(torch.randn(rank, W.shape[1], dtype=W.dtype, device=W.device) / W.shape[1] ** 0.5)
        self.B = nn.Parameter(W.new_zeros(len(W), rank))

    def forward(self, x):
        return self.linear(x) + 2 * x @ self.A.T @ self.B.T

def swap(model, kind, change):
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        for name, child in list(block.named_children()):
            if isinstance(child, kind):
                setattr(block, name, change(child))

def add_lora(model, rank):
    """Freezes the model and adds a LoRA to every matrix of its blocks. -> how many parameters train"""
    model.requires_grad_(False)
    swap(model, nn.Linear, lambda linear: LoRA(linear, rank))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

@torch.no_grad()
def merge_lora(model):
    """W + 2 B A -> W: an ordinary model again."""
    def merged(lora):
        lora.linear.weight += 2 * lora.B @ lora.A
        return lora.linear
    swap(model, LoRA, merged)
    model.requires_grad_(True)

# ---- files, flags and logs

def read_jsonl(path, need=()):
    """JSON lines -> list of dicts with all the fields in `need`, or an error that names the line."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})")
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "null")
        except ValueError as e:
            raise UserError(f"{path}:{i}: not JSON ({e})")
        if line.strip() and not isinstance(row, dict):
            raise UserError(f"{path}:{i}: {line[:40]} is not an object in braces")
        for field in need if line.strip() else ():
            if row.get(field) in (None, "", []):
                raise UserError(f"{path}:{i}: field {field!r} is {'empty' if field in row else 'missing'}")
        rows += [row] if line.strip() else []
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows

def parse(Config, doc, argv=None):
    """A dataclass -> command-line flags -> a Config. The comment behind each field is its help."""
    try:
        comments = dict(re.findall(r"^ +(\w+):.*?# *(.*)$", inspect.getsource(Config), re.M))
    except OSError:                               # defined in a terminal: no source to read
        comments = {}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind, text = type(field.default), f"{comments.get(field.name, '')} ({field.default})".replace("%", "%%")
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=str if field.default is None else kind)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=text, **how)
    return Config(**vars(parser.parse_args(argv)))

def main(Config, train, doc):
    try:
        train(parse(Config, doc))
    except (UserError, Diverged) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)

class Log:
    """The numbers of every step: all for metrics.csv, at most 20 rows on the screen."""

    def __init__(self, steps, quiet=False):
        self.steps, self.quiet, self.rows, self.begin = steps, quiet, [], time.time()

    def __call__(self, step, **numbers):
        self.rows.append({"step": step} | {name: float(x) for name, x in numbers.items()})
        if not math.isfinite(self.rows[-1].get("loss", 0)):
            raise Diverged(f"step {step}: the loss is {self.rows[-1]['loss']}")
        line, live = list(self.rows[-1].items())[1:8], sys.stdout.isatty()      # 5 + 7 * 10 columns
        if len(self.rows) == 1 and not self.quiet:
            print(" step" + "".join(f"{name[:9]:>10}" for name, _ in line))
        if not self.quiet and (step % math.ceil(self.steps / 19) == 0 or step == self.steps - 1):
            print("\r" * live + f"{step:5}" + "".join(f"{x:10.4g}" for _, x in line), flush=True)
        elif not self.quiet and live:
            left = (time.time() - self.begin) / len(self.rows) * (self.steps - len(self.rows))
            print(f"\r{step:5}  {left:.0f} s left ", end="", flush=True)

def write_results(folder, log, **results):
    """results.json and metrics.csv"""
    names = list(dict.fromkeys(name for row in log.rows for name in row))
    lines = [names] + [[row.get(name, "") for name in names] for row in log.rows]
    write_files(folder, {"results.json": json.dumps(results, indent=1, default=str),
                         "metrics.csv": "".join(",".join(map(str, line)) + "\n" for line in lines)})

def need(folder, command, seconds):
    """Where the default checkpoint of the stage before is missing, runs that stage as a program."""
    script, *flags = shlex.split(command)[1:]
    if Path(folder) != Path("out", Path(script).stem) or (Path(folder) / "config.json").exists():
        return                                    # there, or not a default: load() says what is wrong with it
    print(f'{folder} not found: running "{command}" first, about {seconds} seconds', flush=True)
    if subprocess.run([sys.executable, Path(__file__).parent / script, *flags]).returncode:
        raise UserError(f'"{command}" failed')

@dataclasses.dataclass(frozen=True)
class Chat:
    temperature: float = 0.7        # 0 is greedy
    max_new: int = 64               # tokens an answer

def chat(config, folders):
    models, histories = [load(folder) for folder in folders], [[] for _ in folders]
    while text := input("you> "):
        for folder, (model, tokenizer), history in zip(folders, models, histories):
            history += to_messages(text)
            reply, = answer(model, tokenizer, [history], temperature=config.temperature, max_new=config.max_new)
            history.append({"role": "assistant", "content": reply})
            print(f"{folder}> {reply}")

if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if not a.startswith("-")]
    main(Chat, lambda config: chat(config, names), __doc__)
