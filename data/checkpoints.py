r"""Checkpoints: ordinary Hugging Face folders, which transformers opens and writes as well.

    config.json          the sizes of the network    read_config       -> ModelConfig
    model.safetensors    its weights                 read_safetensors  -> {name: tensor}
    tokenizer.json       its vocabulary              load_tokenizer    -> Tokenizer

    model, tokenizer = load("out/sft")
    save("out/mine", model, tokenizer)

A safetensors file has three parts. Unlike a pickle, it holds no program that runs when it is read:

    8 bytes       how long the header is, a little-endian number
    the header    JSON, {"lm_head.weight": {"dtype": "F16", "shape": [1024, 128],
                                            "data_offsets": [0, 262144]}, ...}
    the data      the numbers of each tensor, from its first offset to its second

Large models have several such files, and model.safetensors.index.json says what is in which.
"""
import base64
import contextlib
import functools
import json
import math
import os
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from data.rows import (field, is_list, is_number, is_object, is_share, is_text, must, parse_json,
                       read_text, show)
from model import END, EOT, PAD, START, ModelConfig, ScalarModel, Transformer, UserError, special

HERE = Path(__file__).parent

# ---------------------------------------------------------------- model.safetensors
# A check is a function of one value; its docstring says what would be right (see data/rows.py).

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """-> {name: tensor}: windows on the file, from which only what is used is read."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = parse_json(data[8:start].tobytes(), path)
    check_header(header, len(data) - start, path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = torch.from_numpy(data[start + begin:start + end])     # bytes as yet
            tensors[name] = numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    letters = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": letters[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the data begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def map_file(path):
    if not os.path.isfile(path) or os.path.getsize(path) < 8:
        raise UserError(f"{path} is missing or empty; want a safetensors file")
    try:
        return np.memmap(path, np.uint8, mode="c")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def check_header(header, size, path):
    """Each tensor is as long as its shape says, and begins where another ends, up to the end."""
    must(header, is_object, f"{path}: its header")
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            where = f"{path}: {name}"
            must(entry, is_object, where)
            dtype = DTYPES[field(entry, "dtype", is_dtype, where)]
            shape = field(entry, "shape", is_shape, where)
            begin, end = field(entry, "data_offsets", is_span, where)
            spans.append((begin, end, math.prod(shape) * dtype.itemsize, where))
    place = 0
    for begin, end, length, where in sorted(spans):
        if begin != place or end != place + length:
            raise UserError(f"{where} lies from {begin} to {end}; want {place} to {place + length}")
        place = end
    if place != size:
        raise UserError(f"{path}: {size} bytes of data; want the {place} of its header")


def is_dtype(value):
    """F32, F16 or BF16"""
    return isinstance(value, str) and value in DTYPES


def is_whole(value):
    """a whole number of at least 0"""
    return type(value) is int and value >= 0


def is_shape(value):
    """a list of whole numbers"""
    return isinstance(value, list) and all(is_whole(size) for size in value)


def is_span(value):
    """two whole numbers, begin and end"""
    return is_shape(value) and len(value) == 2


# ---------------------------------------------------------------- a folder -> a model

PARTS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
         "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "unembed": "lm_head",
         "attention": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
         "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "mean": "score.mean"}


def their_name(name):
    """blocks.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(PARTS.get(part, part) for part in parts)


def load(folder, device="cpu", dtype=torch.float32, scalar=False):
    """-> Transformer (ScalarModel if scalar), Tokenizer"""
    if not os.path.isdir(folder):
        raise UserError(f'"{folder}" is not a folder; want one with a model')
    check_device(device)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    tensors = read_tensors(folder)
    if scalar and "score.weight" not in tensors:
        raise UserError(f"{folder} is no scalar model; want a reward model or a critic")
    if not scalar and "score.weight" in tensors:
        raise UserError(f"{folder} is a scalar model (reward model, critic); want one that writes")
    last = their_name(f"blocks.{config.n_layers - 1}.norm1.weight")
    if last not in tensors:
        raise UserError(f"{folder}: tensor {last} is missing; config.json wants {config.n_layers} "
                        f"layers")
    with ShapesOnly():
        model = Transformer(config)
        if scalar:
            k = max(1, tensors["score.weight"].numel() // config.d_model)
            tensors.setdefault("score.mean", torch.zeros(k))    # other people's subtract nothing
            model = ScalarModel(model, k)
    fill(model, tensors, dtype, folder)
    return model.to(device), tokenizer


def load_scalar(folder, device="cpu"):
    return load(folder, device, scalar=True)


class ShapesOnly(TorchFunctionMode):
    """In here new tensors take no time and no memory: they hold one number, and none is drawn."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name == "empty":
            return torch.zeros(()).expand(args[0])
        if name.endswith("_") and not name.endswith("__"):
            return None                         # normal_, fill_, ...: in place
        return function(*args, **(kwargs or {}))


def fill(model, tensors, dtype, folder):
    """Each tensor of the folder gets its place in the model, and each place its tensor."""
    state = {}
    for name, blank in model.state_dict().items():
        theirs = their_name(name)
        where = f"{folder}: tensor {theirs}"
        if theirs not in tensors:
            raise UserError(f"{where} is missing; config.json wants {list(blank.shape)}")
        tensor = tensors.pop(theirs)
        if tensor.shape != blank.shape:
            raise UserError(f"{where} is {list(tensor.shape)}; config.json wants "
                            f"{list(blank.shape)}")
        state[name] = tensor.to(dtype, copy=True)       # the file can change, and is not aligned
        if not state[name].sum(dtype=torch.float32).isfinite():
            raise UserError(f"{where} holds nan or infinity; want finite numbers")
    tensors.pop("lm_head.weight", None)                 # where it is tied, it can be there twice
    for name in tensors:
        if not name.endswith("rotary_emb.inv_freq"):    # written by transformers of old
            raise UserError(f"{folder}: tensor {name} is none of the network in config.json")
    model.load_state_dict(state, assign=True)


def read_tensors(folder):
    """-> {name: tensor} of the one file, or of all that the index names"""
    files = ["model.safetensors"]
    index = Path(folder) / "model.safetensors.index.json"
    if index.exists() and not os.path.exists(Path(folder) / files[0]):
        weights = must(parse_json(read_text(index), index), is_object, index)
        files = sorted(set(field(weights, "weight_map", is_weight_map, index).values()))
    tensors = {}
    for file in files:
        tensors |= read_safetensors(Path(folder) / file)
    return tensors


def is_weight_map(value):
    """an object of tensors, and of names of files in the folder"""
    if not is_object(value) or not value:
        return False
    return all(is_text(name) and os.path.basename(name) == name for name in value.values())


def check_device(device):
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise UserError(f"--device {device} cannot be used ({reason})") from None


# ---------------------------------------------------------------- a model -> a folder

def save(folder, model, tokenizer, dtype=torch.float32):
    """Writes what load() and transformers open."""
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError("merge_lora(model) comes before save()")
    config = describe(model, dtype)
    config["eos_token_id"] = special(tokenizer, END)
    config["pad_token_id"] = special(tokenizer, PAD)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[their_name(name)] = tensor.to("cpu", dtype)
    write_files(folder, {"model.safetensors": tensors, **tokenizer.files,
                         "config.json": json.dumps(config, indent=1)})


def write_files(folder, contents):
    """{name: text or tensors} -> files. They are written beside what is there, then renamed in this
    order. So whenever a run is killed, what the folder holds is whole."""
    folder = Path(folder)
    beside = {name: folder / f"{name}.{os.getpid()}.tmp" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if isinstance(content, dict):
                write_safetensors(beside[name], content)
            else:
                beside[name].write_text(content, encoding="utf-8")
        for name in contents:
            os.replace(beside[name], folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        for path in beside.values():
            with contextlib.suppress(OSError):
                path.unlink()


# ---------------------------------------------------------------- config.json

# what transformers calls the sizes -> what ModelConfig calls them
SIZES = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
         "intermediate_size": "d_ff", "num_attention_heads": "n_heads",
         "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}
# what can be otherwise in a Llama or Qwen2, but not in our network
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "use_sliding_window": False}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder):
    """-> ModelConfig"""
    path = Path(folder) / "config.json"
    config = must(parse_json(read_text(path), path), is_object, path)
    config = {name: value for name, value in config.items() if value is not None}
    family = field(config, "model_type", is_family, path)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f'{path}: "{name}" is {show(config[name])}; want {show(value)}')
    width = field(config, "hidden_size", is_size, path)
    heads = field(config, "num_attention_heads", is_size, path)
    if width % heads != 0 and "head_dim" not in config:
        raise UserError(f'{path}: "hidden_size" is {width}; want a multiple of '
                        f'"num_attention_heads", {heads}')
    config = {"num_key_value_heads": heads, "head_dim": width // heads,
              "tie_word_embeddings": False} | config
    sizes = {}
    for theirs, ours in SIZES.items():
        sizes[ours] = field(config, theirs, is_size, path)
    if heads % sizes["n_kv_heads"] != 0:
        raise UserError(f'{path}: "num_key_value_heads" is {sizes["n_kv_heads"]}; want a divisor '
                        f'of "num_attention_heads", {heads}')
    if sizes["head_dim"] % 2 != 0:
        raise UserError(f'{path}: "head_dim" is {sizes["head_dim"]}; want an even number')
    theta, scaling = read_rope(config, path)
    return ModelConfig(**sizes, rope_theta=theta, rope_scaling=scaling, qkv_bias=family == "qwen2",
                       max_len=field(config, "max_position_embeddings", is_count, path),
                       norm_eps=field(config, "rms_norm_eps", is_share, path),
                       tie=field(config, "tie_word_embeddings", is_flag, path))


def read_rope(config, path):
    """Rotary positions -> theta, and Llama 3's scaling or None. Theta used to stand at the top."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= must(config.get(name, {}), is_object, f'{path}: "{name}"')
    theta = float(field(rope, "rope_theta", is_positive, path))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f'{path}: "rope_type" is {show(kind)}; want "default" or "llama3"')
    scaling = {"rope_type": kind}
    for name in LLAMA3:
        scaling[name] = field(rope, name, is_positive, path)
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f'{path}: "low_freq_factor" is too large; want it below "high_freq_factor"')
    return theta, scaling


def describe(model, dtype):
    """-> what config.json says"""
    sizes = model.config
    family = "Qwen2" if sizes.qkv_bias else "Llama"
    scalar = isinstance(model, ScalarModel)
    task = "SequenceClassification" if scalar else "CausalLM"
    config = {theirs: getattr(sizes, ours) for theirs, ours in SIZES.items()}
    config["max_position_embeddings"] = sizes.max_len
    config["rms_norm_eps"] = sizes.norm_eps
    config["tie_word_embeddings"] = sizes.tie
    config["architectures"] = [f"{family}For{task}"]
    config["model_type"] = family.lower()
    config["hidden_act"] = "silu"
    config["rope_theta"] = sizes.rope_theta
    config["rope_scaling"] = sizes.rope_scaling
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["bos_token_id"] = None
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    config["rope_parameters"] = rope | (sizes.rope_scaling or {})
    if scalar:
        config["id2label"] = {i: f"score {i}" for i in range(len(model.mean))}
    return config


def is_family(value):
    """llama or qwen2"""
    return value in ("llama", "qwen2")


def is_size(value):
    """a whole number from 1 to 1,000,000"""
    return type(value) is int and 1 <= value <= 1_000_000


def is_count(value):
    """a whole number of at least 1"""
    return type(value) is int and value >= 1


def is_positive(value):
    """a number above 0"""
    return is_number(value) and value > 0


def is_flag(value):
    """true or false"""
    return isinstance(value, bool)


# ---------------------------------------------------------------- tokenizer.json

# A text is cut into pieces first, and no token crosses a cut: a word with the space before it, a
# number, punctuation, white space. This is how GPT-2 does it.
GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit before that, so the spaces before a digit end their piece
DIGITS = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# in ours, a piece has at most two digits
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(tiktoken.Encoding):
    """tiktoken's, and what some vocabularies need: a Unicode normal form, bytes that they lack."""
    form = None              # NFC or None
    size = math.inf          # ids from here on stand for bytes that the vocabulary lacks
    files = {}               # what save() writes: {name: text}

    def encode_ordinary(self, text):
        return self.known(super().encode_ordinary(self.normal(text)))

    def encode(self, text, **settings):
        return self.known(super().encode(self.normal(text), **settings))

    def normal(self, text):
        if self.form is not None:
            text = unicodedata.normalize(self.form, text)
        return text

    def known(self, ids):
        return [i for i in ids if i < self.size]


@functools.cache
def byte_letters():
    """{byte: letter}. Hugging Face spells tokens in letters that can be printed, as GPT-2 did."""
    letters = {}
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(spare)
            spare += 1
    return letters


def load_tokenizer(folder, vocab_size):
    """A folder's tokenizer.json, if it is byte-level BPE -> Tokenizer"""
    path = Path(folder) / "tokenizer.json"
    spec = must(parse_json(read_text(path), path), is_object, path)
    vocab, specials = read_vocabulary(spec, vocab_size, path)
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {}
    for token, i in vocab.items():
        if not set(token) <= byte_of.keys():
            raise UserError(f"{path}: {show(token)} is not spelled in bytes; want byte-level BPE")
        ranks[bytes(byte_of[letter] for letter in token)] = i
    # tiktoken wants every byte, so those that are missing get ids that encode_ordinary leaves out
    for byte in range(256):
        ranks.setdefault(bytes([byte]), vocab_size + byte)
    # and every id, so those that are free get a name
    for i in set(range(vocab_size)) - {*vocab.values(), *specials.values()}:
        specials[f"<|unused_{i}|>"] = i
    try:
        tokenizer = Tokenizer(str(folder), pat_str=read_pattern(spec, path), mergeable_ranks=ranks,
                              special_tokens=specials)
    except ValueError as error:
        raise UserError(f'{path}: "Regex" cannot be used ({error})') from None
    tokenizer.size = vocab_size
    if must(spec.get("normalizer"), is_normalizer, f'{path}: "normalizer"') is not None:
        tokenizer.form = "NFC"
    tokenizer.files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if os.path.exists(path.parent / name):
            tokenizer.files[name] = read_text(path.parent / name)
    return tokenizer


def read_vocabulary(spec, vocab_size, path):
    """-> {token: id} of the ordinary tokens, {token: id} of the special ones"""
    model = field(spec, "model", is_object, path)
    vocab = field(model, "vocab", is_vocabulary, path)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f'{path}: "{name}" is {show(model[name])}; want none')
    specials = {}
    for token in field(spec, "added_tokens", is_added, path):
        specials[token["content"]] = token["id"]
    ids = sorted((vocab | specials).values())
    if ids[-1] >= vocab_size:
        raise UserError(f"{path}: a token has the id {ids[-1]}; want ids below {vocab_size}, the "
                        f"vocab_size of config.json")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two tokens have the same id; want one for each")
    made = []
    for merge in field(model, "merges", is_merges, path):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        made.append(vocab.get("".join(parts), -1))
    made = list(dict.fromkeys(made))
    if -1 in made or made != sorted(made):      # otherwise ids can be tiktoken's ranks
        raise UserError(f"{path}: the merges are not in the order of the ids; want that order")
    return {token: i for token, i in vocab.items() if token not in specials}, specials


def read_pattern(spec, path):
    """How a text is cut: by a pattern that stands there (Llama 3, Qwen2), or in one of two ways."""
    where = f'{path}: "pre_tokenizer"'
    step = must(spec.get("pre_tokenizer"), is_object, where)
    steps = must(step.get("pretokenizers", [step]), is_list, where)
    for step in steps:
        must(step, is_object, where)
    kinds = [step.get("type") for step in steps]
    cut = steps[0]
    letters = steps[-1]
    gpt2 = letters.get("use_regex", True)       # it spells bytes, and can also cut
    if letters.get("add_prefix_space"):
        raise UserError(f'{path}: "add_prefix_space" is true; want false')
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and gpt2 and cut.get("individual_digits"):
        return DIGITS
    isolated = cut.get("behavior") == "Isolated" and not cut.get("invert")
    if kinds == ["Split", "ByteLevel"] and not gpt2 and isolated:
        pattern = field(cut, "pattern", is_object, where)
        return field(pattern, "Regex", is_text, where)
    raise UserError(f"{where} is {kinds}; want byte-level BPE as in GPT-2, Llama 3 or SmolLM2")


def is_vocabulary(value):
    """an object of tokens, and of ids that are whole numbers"""
    return is_object(value) and len(value) > 0 and all(is_whole(i) for i in value.values())


def is_added(value):
    """a list of objects, each with a content and an id"""
    return isinstance(value, list) and all(is_special(token) for token in value)


def is_special(value):
    """an object with a content and an id"""
    return is_object(value) and is_text(value.get("content")) and is_whole(value.get("id"))


def is_merges(value):
    """a list of pairs of tokens"""
    return isinstance(value, list) and all(is_pair(merge) for merge in value)


def is_pair(value):
    """two tokens, as "a b" or as a list"""
    parts = value.split(" ") if isinstance(value, str) else value
    return isinstance(parts, list) and [type(part) for part in parts] == [str, str]


def is_normalizer(value):
    """null or NFC"""
    return value is None or value == {"type": "NFC"}


# ---------------------------------------------------------------- our own vocabulary

# the chat format as transformers wants it, a template in Jinja
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def load_ranks(path=HERE / "studybuddy.tiktoken"):
    """tiktoken's format: a line a token, its bytes in base64 and its rank -> Tokenizer"""
    ranks = {}
    for line in read_text(path).splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    specials = {}
    for token in (EOT, START, END, PAD):
        specials[token] = len(ranks) + len(specials)
    tokenizer = Tokenizer(Path(path).stem, pat_str=PIECES, mergeable_ranks=ranks,
                          special_tokens=specials)
    tokenizer.files = huggingface_files(ranks, specials)
    return tokenizer


def huggingface_files(ranks, specials):
    """The same as a tokenizer.json, which also lists the two parts that make a token."""
    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.get):
        vocab[spell(token)] = ranks[token]
        if len(token) > 1:
            merges.append([spell(part) for part in two_parts(token, ranks)])
    added = []
    for token, i in specials.items():
        added.append({"id": i, "content": token, "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False})
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    tokenizer = {"version": "1.0", "added_tokens": added, "decoder": letters,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, letters]},
                 "model": {"type": "BPE", "vocab": vocab | specials, "merges": merges}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
              "chat_template": CHATML}
    return {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps(config)}


def spell(token):
    return "".join(byte_letters()[byte] for byte in token)


def two_parts(token, ranks):
    """Bytes grow together, the pair of the lowest rank first, until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:])]
        scores = [ranks.get(pair, math.inf) for pair in pairs]
        i = scores.index(min(scores))
        parts[i:i + 2] = [pairs[i]]
    return parts
