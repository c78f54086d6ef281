"""Tests of data/checkpoints.py and data/rows.py: what comes in from files, and goes out to them."""
import base64
import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from data import run as house
import model as M
from data import chart as chart_file
from data import checkpoints, rows
from data import exam as E
from data import studybuddy as world
from data.checkpoints import load, load_ranks, save

HERE = Path(rows.__file__).parent.parent

# ---------------------------------------------------------------- shared

TINY = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64,
        "max_len": 96}
IDS = torch.tensor([[5, 100, 255, 7, 299, 31, 0, 64, 258, 12]])


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = M.Transformer(M.ModelConfig(**TINY | changes))
    for p in model.parameters():            # larger than at birth, so that mistakes show
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 2 else 0.5)
    return model


def tiny_vocabulary():
    """256 bytes and 40 pairs of them; with the four special tokens, 300."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"he", b"the", b" the", b"in", b"ing", b"12", b" 12", b"an", b"and"]
    for first in b"abcde":
        for second in b"abcdef":
            tokens.append(bytes([first, second]))
    return tokens[:296]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tiny.tiktoken"
    lines = []
    for rank, token in enumerate(tiny_vocabulary()):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    path.write_text("".join(lines))
    return checkpoints.load_ranks(path)


@pytest.fixture
def folder(tok, tmp_path):
    """A checkpoint to break."""
    checkpoints.save(tmp_path / "m", tiny_model(), tok)
    return tmp_path / "m"


def change_json(path, **changes):
    """Rewrites a file of JSON with other fields; None takes a field out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def complaint(function, *args):
    """-> what a UserError says: one line"""
    with pytest.raises(M.UserError) as error:
        function(*args)
    text = str(error.value)
    assert "\n" not in text
    return text


def cases(text):
    """A line a case; two spaces or more between its columns."""
    found = []
    for line in text.strip().splitlines():
        columns = re.split("  +", line.strip())
        if len(columns) == 1:
            found.append(columns[0])
        else:
            found.append(columns)
    return found


@pytest.fixture
def alarm():
    """A test that hangs fails after ten seconds."""
    def ring(number, frame):
        raise TimeoutError("it hangs")
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def write(path, values):
    """JSON lines; a text is written as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return path


# ---------------------------------------------------------------- data/checkpoints.py: safetensors

def by_hand(path):
    """A safetensors file, read with numpy and struct-like slices -> {name: array of float32}"""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    arrays = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
            numbers = np.frombuffer(raw[start + begin:start + end], kind)
            arrays[name] = numbers.astype(np.float32).reshape(entry["shape"])
    return arrays


def test_a_file_of_safetensors_byte_by_byte(tmp_path):
    """The example of the docstring, smaller: two numbers, 1 and -2, in 16 bits."""
    path = tmp_path / "f"
    numbers = torch.tensor([1.0, -2.0]).half()
    checkpoints.write_safetensors(path, {"a": numbers})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    data = raw[8 + length:]
    assert header["a"] == {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    assert data == bytes([0x00, 0x3C, 0x00, 0xC0])
    assert length % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back(tmp_path, dtype):
    path = tmp_path / "f"
    shapes = [torch.randn(3, 5), torch.zeros(0, 4), torch.tensor(2.0), torch.randn(4, 6).T]
    tensors = {}
    for i, tensor in enumerate(shapes):
        tensors[f"tensor {i}"] = tensor.to(dtype)
    checkpoints.write_safetensors(path, tensors)
    again = checkpoints.read_safetensors(path)
    assert list(again) == list(tensors)
    for name in tensors:
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensors[name])


def test_headers_in_any_order(tmp_path):
    """Other programs sort the header by name, and the data by type."""
    path = tmp_path / "f"
    header = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
              "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    numbers = np.array([1, 2], np.float32)
    write_raw(path, header, numbers.tobytes())
    again = checkpoints.read_safetensors(path)
    assert again["a"].item() == 1
    assert again["b"].item() == 2


def write_raw(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


BAD_HEADERS = """
    8   []
    8   "text"
    8   5
    8   null
    8   {"a": null}
    8   {"a": []}
    8   {"a": {"dtype": "F32", "shape": [2]}}
    8   {"a": {"dtype": "F32", "data_offsets": [0, 8]}}
    8   {"a": {"shape": [2], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": 5, "shape": [2], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    8   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}
    8   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}
    8   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}
    8   {"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}
    12  {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    8   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1000000000000000000000]}}
    7   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    9   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    0   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
"""


@pytest.mark.parametrize("second", [[0, 8], [4, 12], [9, 17], [16, 8]])
def test_tensors_that_overlap_or_leave_a_hole(tmp_path, second):
    path = tmp_path / "f"
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    other = {"dtype": "F32", "shape": [2], "data_offsets": second}
    data = bytes(max(second))
    write_raw(path, {"a": one, "b": other}, data)
    text = complaint(checkpoints.read_safetensors, path)
    assert str(path) in text


@pytest.mark.parametrize("size, header", cases(BAD_HEADERS))
def test_wrong_headers_and_wrong_lengths(tmp_path, size, header):
    path = tmp_path / "f"
    data = bytes(int(size))
    write_raw(path, json.loads(header), data)
    text = complaint(checkpoints.read_safetensors, path)
    assert str(path) in text


NOT_TENSORS = [b"", b"1234567", b"\xff" * 8, b"\xff" * 100, bytes(8),
               b"\4\0\0\0\0\0\0\0{\xff}", b"\2\0\0\0\0\0\0\0{"]


@pytest.mark.parametrize("raw", NOT_TENSORS)
def test_no_safetensors_at_all(tmp_path, raw):
    (tmp_path / "f").write_bytes(raw)
    assert str(tmp_path / "f") in complaint(checkpoints.read_safetensors, tmp_path / "f")


def test_a_file_cut_anywhere_is_refused(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for length in (0, 5, 8, 100, 5000, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert str(path) in complaint(checkpoints.load, folder)


# ---------------------------------------------------------------- names, saving and loading

def theirs_to_ours(model):
    """transformers' names, one by one, and the tensors that they have to be."""
    table = {}
    table["model.embed_tokens.weight"] = model.embed.weight
    table["model.norm.weight"] = model.norm.weight
    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}."
        table[layer + "input_layernorm.weight"] = block.norm1.weight
        table[layer + "self_attn.q_proj.weight"] = block.attention.q.weight
        table[layer + "self_attn.k_proj.weight"] = block.attention.k.weight
        table[layer + "self_attn.v_proj.weight"] = block.attention.v.weight
        table[layer + "self_attn.o_proj.weight"] = block.attention.out.weight
        table[layer + "post_attention_layernorm.weight"] = block.norm2.weight
        table[layer + "mlp.gate_proj.weight"] = block.mlp.gate.weight
        table[layer + "mlp.up_proj.weight"] = block.mlp.up.weight
        table[layer + "mlp.down_proj.weight"] = block.mlp.down.weight
    return table


def test_the_base_has_llamas_names():
    """The committed file, byte by byte, against what load() makes of it."""
    arrays = by_hand(HERE / "data/base/model.safetensors")
    table = theirs_to_ours(checkpoints.load(HERE / "data/base")[0])
    assert arrays.keys() == table.keys()
    for name, tensor in table.items():
        assert np.array_equal(arrays[name], tensor.detach().numpy()), name


def test_save_writes_llamas_names(folder):
    arrays = by_hand(folder / "model.safetensors")
    table = theirs_to_ours(tiny_model())
    assert arrays.keys() == table.keys()
    for name, tensor in table.items():
        assert np.array_equal(arrays[name], tensor.detach().numpy()), name


def test_the_base_saved_again_is_the_same(tmp_path):
    base = HERE / "data/base"
    copied = tmp_path / "m"
    model, tokenizer = checkpoints.load(base)
    checkpoints.save(copied, model, tokenizer, dtype=torch.float16)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (copied / name).read_bytes() == (base / name).read_bytes()
    old = by_hand(base / "model.safetensors")
    new = by_hand(copied / "model.safetensors")
    for name in old:
        assert np.array_equal(old[name], new[name])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CHANGES = [{}, {"tie": False}, {"qkv_bias": True}, {"head_dim": 12}, {"n_kv_heads": 4},
           {"rope_scaling": LLAMA3}, {"rope_theta": 500.0}, {"norm_eps": 0.1}, {"max_len": 50}]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_saved_model_is_the_same_when_loaded(tok, tmp_path, changes):
    model = tiny_model(**changes)
    checkpoints.save(tmp_path / "m", model, tok)
    again, _ = checkpoints.load(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(again(IDS), model(IDS))


def test_the_smallest_network(tok, tmp_path):
    """Every number at its least."""
    model = tiny_model(d_model=1, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=1,
                       max_len=1, norm_eps=0.0)
    checkpoints.save(tmp_path / "m", model, tok)
    again, _ = checkpoints.load(tmp_path / "m")
    assert again.config == model.config


def test_what_is_loaded_can_be_trained(folder):
    model, _ = checkpoints.load(folder)
    model(IDS).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad and p.grad.isfinite().all(), name
        assert p.is_contiguous(), name


def test_loading_draws_no_random_numbers(folder):
    """So a run from a seed does not depend on how many models it loads."""
    before = torch.get_rng_state()
    checkpoints.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_imports_nothing_more():
    """It takes 0.05 s. The usual way, torch's meta device, imports 821 modules first, in 2 s."""
    code = """if True:
        import sys
        from data.checkpoints import load
        before = len(sys.modules)
        load("data/base")
        print(len(sys.modules) - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) < 10


def test_parameters_are_copies_of_the_file(folder):
    model, _ = checkpoints.load(folder)
    want = model(IDS)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(bytes(5000))
    assert torch.equal(model(IDS), want)


def test_a_scalar_model_is_the_same_when_loaded(tok, tmp_path):
    for k in (1, 3):
        judge = M.ScalarModel(tiny_model(), k)
        judge.mean += torch.arange(k) + 0.25
        checkpoints.save(tmp_path / "r", judge, tok)
        again, _ = checkpoints.load_scalar(tmp_path / "r")
        assert torch.equal(again.mean, judge.mean)
        assert torch.equal(again(IDS), judge(IDS))


def test_somebody_elses_judge_subtracts_nothing(tok, tmp_path):
    """transformers' LlamaForSequenceClassification has a score, and no mean."""
    judge = M.ScalarModel(tiny_model())
    checkpoints.save(tmp_path / "r", judge, tok)
    path = tmp_path / "r/model.safetensors"
    tensors = checkpoints.read_safetensors(path)
    theirs = {name: t.clone() for name, t in tensors.items() if name != "score.mean"}
    checkpoints.write_safetensors(path, theirs)
    again, _ = checkpoints.load_scalar(tmp_path / "r")
    assert again.mean.item() == 0


def test_a_judge_is_no_language_model(folder, tok, tmp_path):
    checkpoints.save(tmp_path / "r", M.ScalarModel(tiny_model()), tok)
    assert "scalar" in complaint(checkpoints.load, tmp_path / "r")
    assert "scalar" in complaint(checkpoints.load_scalar, folder)


def test_adapters_are_merged_before_saving(tok, tmp_path):
    model = tiny_model()
    house.add_lora(model, 2)
    with pytest.raises(ValueError, match="merge_lora"):
        checkpoints.save(tmp_path / "m", model, tok)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_in_16_bits_and_loaded_in_32(tok, tmp_path, dtype):
    model = tiny_model()
    checkpoints.save(tmp_path / "m", model, tok, dtype=dtype)
    again, _ = checkpoints.load(tmp_path / "m")
    loaded = again.embed.weight
    rounded = model.embed.weight.to(dtype)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, rounded.float())


def test_llama3_scaling_by_hand():
    """Llama 3's rule, a channel pair at a time: fast ones stay, slow ones are 8 times slower."""
    plain = M.rotary_speeds(M.ModelConfig(10, rope_theta=1e4)).tolist()
    scaled = M.rotary_speeds(M.ModelConfig(10, rope_theta=1e4, rope_scaling=LLAMA3)).tolist()
    for speed, slower in zip(plain, scaled):
        wavelength = 2 * math.pi / speed
        if wavelength < 32 / 4:
            want = speed
        elif wavelength > 32 / 1:
            want = speed / 8
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * speed / 8 + smooth * speed
        assert slower == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------- folders as others write them

def split_into_shards(folder, count=3):
    tensors = checkpoints.read_safetensors(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        part = {name: tensors[name].clone() for name in names[i::count]}
        checkpoints.write_safetensors(folder / f"model-{i}.safetensors", part)
        weight_map |= {name: f"model-{i}.safetensors" for name in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder):
    split_into_shards(folder)
    assert torch.equal(checkpoints.load(folder)[0](IDS), tiny_model()(IDS))


@pytest.mark.parametrize("changes", [
    {"rope_parameters": None, "rope_scaling": None},
    {"rope_theta": None},
    {"rope_scaling": {}}])
def test_theta_at_the_top_or_nested(tok, tmp_path, changes):
    model = tiny_model(rope_theta=700.0)
    checkpoints.save(tmp_path / "m", model, tok)
    change_json(tmp_path / "m/config.json", **changes)
    again, _ = checkpoints.load(tmp_path / "m")
    assert torch.equal(again(IDS), model(IDS))


def test_the_old_way_to_write_llama3s_positions(tok, tmp_path):
    model = tiny_model(rope_scaling=LLAMA3)
    checkpoints.save(tmp_path / "m", model, tok)
    old = dict(LLAMA3)
    old["type"] = old.pop("rope_type")
    change_json(tmp_path / "m/config.json", rope_parameters=None, rope_scaling=old)
    again, _ = checkpoints.load(tmp_path / "m")
    assert torch.equal(again(IDS), model(IDS))


def test_what_a_config_leaves_out(tok, tmp_path):
    """transformers' defaults: heads of d_model / n_heads, as many keys as queries, untied, theta
    10000."""
    model = tiny_model(n_kv_heads=4, tie=False)
    checkpoints.save(tmp_path / "m", model, tok)
    left_out = ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings",
                "rope_parameters", "rope_scaling", "hidden_act")
    nothing = dict.fromkeys(left_out)
    change_json(tmp_path / "m/config.json", **nothing)
    again, _ = checkpoints.load(tmp_path / "m")
    assert again.config == model.config


def test_a_tied_matrix_can_be_there_twice(folder):
    tensors = dict(checkpoints.read_safetensors(folder / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)     # of old
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    checkpoints.write_safetensors(folder / "model.safetensors", copies)
    assert torch.equal(checkpoints.load(folder)[0](IDS), tiny_model()(IDS))


# ---------------------------------------------------------------- folders that are broken

WHOLE = [0, -1, 1.5, 32.0, True, "32", [], {}, 10**7, 10**400]
POSITIVE = [0, -1, True, "1", [], {}, 10**400]
CONFIG = {
    "vocab_size": WHOLE,
    "hidden_size": WHOLE,
    "num_hidden_layers": WHOLE,
    "intermediate_size": WHOLE,
    "num_attention_heads": WHOLE,
    "num_key_value_heads": WHOLE + [3],
    "head_dim": WHOLE + [7],
    "max_position_embeddings": WHOLE[:-2],
    "rms_norm_eps": [-1, 2, True, "1", [], {}, 10**400],
    "rope_theta": POSITIVE,
    "rope_parameters": [5, "x", [], True],
    "rope_scaling": [5, "x", []],
    "tie_word_embeddings": [0, 1, "true", [], {}],
    "model_type": ["gpt2", "Llama", 5, True, [], {}],
    "hidden_act": ["gelu", 5, [], {}],
    "attention_bias": [True, "x"],
    "mlp_bias": [True, 1],
    "use_sliding_window": [True]}


@pytest.mark.parametrize("name", CONFIG)
def test_every_field_of_config_json_is_checked(folder, name):
    change_json(folder / "config.json", rope_parameters=None)
    for value in CONFIG[name]:
        change_json(folder / "config.json", **{name: value})
        text = complaint(checkpoints.load, folder)
        assert str(folder / "config.json") in text and f'"{name}"' in text


NEEDED = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
          "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "model_type"]


@pytest.mark.parametrize("name", NEEDED)
def test_what_config_json_must_have(folder, name):
    change_json(folder / "config.json", **{name: None})
    assert f'"{name}" is missing' in complaint(checkpoints.load, folder)


ROPES = [{"rope_type": "yarn"}, {"rope_type": 5}, {"rope_theta": "x"}, {"rope_theta": None},
         {"type": "linear", "factor": 2.0}, {"rope_type": "llama3"}, LLAMA3 | {"factor": 0},
         LLAMA3 | {"factor": "8"}, LLAMA3 | {"low_freq_factor": 4.0}]


@pytest.mark.parametrize("rope", ROPES)
def test_positions_of_another_kind(folder, rope):
    change_json(folder / "config.json", rope_parameters=rope)
    assert str(folder / "config.json") in complaint(checkpoints.load, folder)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", "null", '"x"', '{"vocab_size": NaN}', "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_no_json_or_no_object(folder, name, text):
    path = folder / name
    path.write_text(text)
    assert str(path) in complaint(checkpoints.load, folder)


@pytest.mark.parametrize("changes, problem", [
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"model_type": "qwen2"}, "q_proj.bias is missing"),
    ({"vocab_size": 301}, r"embed_tokens.weight is [300, 32]; config.json wants [301, 32]"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1."), ({"num_hidden_layers": 10**6}, "layers.999999"),
    ({"intermediate_size": 10**6}, "gate_proj.weight is [64, 32]"),
    ({"hidden_size": 10**6, "head_dim": 8}, "embed_tokens.weight is [300, 32]")])
def test_weights_of_another_network(folder, changes, problem):
    change_json(folder / "config.json", **changes)
    start = time.time()
    text = complaint(checkpoints.load, folder)
    assert str(folder) in text and problem in text
    assert time.time() - start < 5, "nothing of that size is built"


def test_more_heads_than_the_width_can_be_cut_into(folder):
    change_json(folder / "config.json", head_dim=None, num_attention_heads=6)
    assert '"hidden_size" is 32; want a multiple' in complaint(checkpoints.load, folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(tok, tmp_path, value):
    model = tiny_model()
    weights = model.blocks[1].mlp.up.weight
    weights.data[3, 5] = value
    checkpoints.save(tmp_path / "m", model, tok)
    text = complaint(checkpoints.load, tmp_path / "m")
    assert "layers.1.mlp.up_proj.weight" in text


def test_a_head_of_another_shape(tok, tmp_path):
    judge = M.ScalarModel(tiny_model())
    checkpoints.save(tmp_path / "r", judge, tok)
    path = tmp_path / "r/model.safetensors"
    tensors = checkpoints.read_safetensors(path)
    good = {name: t.clone() for name, t in tensors.items()}
    for shape in [(), (0, 32), (32,), (1, 33), (2, 32)]:
        head = torch.zeros(shape)
        checkpoints.write_safetensors(path, good | {"score.weight": head})
        text = complaint(checkpoints.load_scalar, tmp_path / "r")
        assert "score." in text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_half_a_folder(folder, name):
    (folder / name).unlink()
    assert str(folder / name) in complaint(checkpoints.load, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_folders_where_files_should_be(folder, name, alarm):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert str(folder / name) in complaint(checkpoints.load, folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert str(folder / name) in complaint(checkpoints.load, folder)


def test_a_shard_is_missing(folder):
    split_into_shards(folder)
    (folder / "model-1.safetensors").unlink()
    assert str(folder / "model-1.safetensors") in complaint(checkpoints.load, folder)


BAD_INDEX = """
    []
    {}
    {"weight_map": []}
    {"weight_map": {}}
    {"weight_map": {"a": 5}}
    {"weight_map": {"a": ""}}
    {"weight_map": {"a": "../m/x"}}
"""


@pytest.mark.parametrize("index", cases(BAD_INDEX))
def test_an_index_that_is_none(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in complaint(checkpoints.load, folder)


def test_no_folder_at_all(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert '"" is not a folder' in complaint(checkpoints.load, "")
    assert "nowhere" in complaint(checkpoints.load, tmp_path / "nowhere")
    assert "file" in complaint(checkpoints.load, tmp_path / "file")
    assert "empty/config.json" in complaint(checkpoints.load, tmp_path / "empty")


@pytest.mark.parametrize("device", ["meta", "tpu9", "", "cuda:99"])
def test_a_device_that_is_not_there(folder, device):
    assert f"--device {device}" in complaint(checkpoints.load, folder, device)


# ---------------------------------------------------------------- saving, whatever happens

def test_config_json_comes_last(tok, tmp_path, monkeypatch):
    """need() makes a stage again unless it finds config.json."""
    moved, replace = [], os.replace

    def watched(old, new):
        moved.append(new.name)
        replace(old, new)
    monkeypatch.setattr(os, "replace", watched)
    checkpoints.save(tmp_path / "m", tiny_model(), tok)
    assert moved[-1] == "config.json" and "model.safetensors" in moved


def test_a_full_disk_leaves_the_old_checkpoint(folder, tok, monkeypatch):
    def full(self, text, **how):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    text = complaint(checkpoints.save, folder, tiny_model(1), tok)
    assert str(folder) in text and "No space left" in text
    assert torch.equal(checkpoints.load(folder)[0](IDS), tiny_model(0)(IDS))
    assert not list(folder.glob("*.tmp"))


def test_where_nothing_can_be_written(tok, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in complaint(checkpoints.save, tmp_path / "file", tiny_model(), tok)
    assert "file/m" in complaint(checkpoints.save, tmp_path / "file/m", tiny_model(), tok)
    assert (tmp_path / "file").read_text() == "x"


def save_without_end(folder, tok):
    """A child process that saves models whose numbers are all alike. -> its id"""
    model = tiny_model()
    child = os.fork()                   # tensors this small run in one thread, which fork allows
    if child != 0:
        return child
    try:
        while True:
            value = random.random()
            for p in model.parameters():
                p.data.fill_(value)
            checkpoints.save(folder, model, tok)
    finally:
        os._exit(1)


def numbers_of(folder):
    model, _ = checkpoints.load(folder)
    return {p.flatten()[i].item() for p in model.parameters() for i in (0, -1)}


def test_a_kill_leaves_a_whole_checkpoint(tok, tmp_path):
    model = tiny_model()
    for p in model.parameters():
        p.data.fill_(0)
    checkpoints.save(tmp_path / "m", model, tok)
    seen = set()
    for i in range(10):
        child = save_without_end(tmp_path / "m", tok)
        time.sleep(0.02 + 0.007 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        numbers = numbers_of(tmp_path / "m")
        assert len(numbers) == 1, "one model, not parts of two"
        seen |= numbers
    assert len(seen) > 1, "the children did save"


def test_two_runs_into_one_folder(tok, tmp_path):
    children = [save_without_end(tmp_path / "m", tok) for _ in range(2)]
    time.sleep(0.5)
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it still saves"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(numbers_of(tmp_path / "m")) == 1


def test_files_are_written_together(tmp_path):
    checkpoints.write_files(tmp_path / "new/run", {"a.csv": "1,2\n", "b.json": "é"})
    assert (tmp_path / "new/run/a.csv").read_bytes() == b"1,2\n"
    assert (tmp_path / "new/run/b.json").read_bytes() == "é".encode()
    assert len(list((tmp_path / "new/run").iterdir())) == 2


# ---------------------------------------------------------------- tokenizers

def test_the_worlds_vocabulary():
    tokenizer = checkpoints.load_ranks()
    assert tokenizer.n_vocab <= 1408
    for n in range(100):
        assert len(tokenizer.encode_ordinary(f"{n}")) == 1
        assert len(tokenizer.encode_ordinary(f" {n}")) == 1


def some_texts(count=100):
    g = random.Random(0)
    texts = ["Zoë 🦦 12 345  6\n\n\n7", "\ttab\r\n", "日本語", "\x00\x7f\x85\u3000", "e\u0301",
             "", " ", "<|im_end|>", "ﷺ  \u200b", "x" * 100]
    ranges = [range(128), range(0xD800), range(0xE000, 0x110000)]
    for _ in range(count):
        letters = [chr(g.choice(g.choice(ranges))) for _ in range(30)]
        texts.append("".join(letters))
    return texts


def test_any_text_comes_back(tok):
    for tokenizer in (tok, checkpoints.load_ranks()):
        for text in some_texts():
            assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_a_saved_tokenizer_is_the_same_when_loaded(folder, tok):
    again = checkpoints.load(folder)[1]
    assert again._special_tokens == tok._special_tokens
    for text in some_texts():
        assert again.encode_ordinary(text) == tok.encode_ordinary(text)


def test_the_bases_tokenizer_is_made_of_the_vocabulary():
    made = json.loads(checkpoints.load_ranks().files["tokenizer.json"])
    assert made == json.loads((HERE / "data/base/tokenizer.json").read_text())


def merged(letters, merges):
    """Byte pair encoding as in its paper: of all neighbours, join those that are first in the
    list."""
    parts = list(letters)
    while True:
        pairs = [list(pair) for pair in zip(parts, parts[1:])]
        places = [merges.index(pair) for pair in pairs if pair in merges]
        if not places:
            return parts
        i = pairs.index(merges[min(places)])
        parts[i:i + 2] = ["".join(pairs[i])]


@pytest.mark.parametrize("word", [
    "the", " the", "thing", " 12", "band", "faces", "hethe", " abcdea"])
def test_merges_make_the_tokens_that_tiktoken_makes(tok, word):
    spec = json.loads(tok.files["tokenizer.json"])
    merges = spec["model"]["merges"]
    vocab = spec["model"]["vocab"]
    letters = checkpoints.spell(word.encode())
    ids = [vocab[part] for part in merged(letters, merges)]
    assert ids == tok.encode_ordinary(word)


def test_two_parts_by_hand():
    """Of "the" with th before he: first t h -> th, so its parts are th and e."""
    ranks = {b"t": 0, b"h": 1, b"e": 2, b"th": 3, b"he": 4, b"the": 5}
    assert checkpoints.two_parts(b"the", ranks) == [b"th", b"e"]
    ranks = {b"t": 0, b"h": 1, b"e": 2, b"he": 3, b"th": 4, b"the": 5}
    assert checkpoints.two_parts(b"the", ranks) == [b"t", b"he"]


def test_letters_of_bytes_are_gpt2s():
    """By its rule: bytes that can be printed are themselves, the others come from 256 on, in
    order."""
    letters = checkpoints.byte_letters()
    assert checkpoints.spell(b"A~ \n\0\x7f\xad\xff") == "A~ĠĊĀġŃÿ"
    assert len(set(letters.values())) == 256


def test_text_never_becomes_a_special_token(tok):
    text = "ha <|im_end|>\n<|im_start|>assistant\n<|pad|><|endoftext|>"
    assert max(tok.encode_ordinary(text)) < 296


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LETTERS = BYTES | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}|[^\p{N}]+"}, "behavior": "Isolated",
         "invert": False}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def steps(*pretokenizers):
    return {"type": "Sequence", "pretokenizers": list(pretokenizers)}


def real_vocabulary(folder, pre=BYTES, lacks=b"", specials=SPECIALS, changes=(), top=()):
    """A tokenizer.json as real models have it: special tokens first, then letters, then merges."""
    vocab = {}
    added = []
    for i, token in enumerate(specials):
        vocab[token] = i
        added.append({"id": i, "content": token, "special": True})
    for byte, letter in checkpoints.byte_letters().items():
        if byte not in lacks:
            vocab[letter] = len(vocab)
    merges = ["t h", "Ġ th", "! !", "1 2", "Ġ Ġ"]
    for merge in merges:
        token = merge.replace(" ", "")
        vocab[token] = len(vocab)
    model = {"type": "BPE", "vocab": vocab, "merges": merges} | dict(changes)
    spec = {"added_tokens": added, "normalizer": None, "pre_tokenizer": pre, "model": model}
    text = json.dumps(spec | dict(top))
    (folder / "tokenizer.json").write_text(text)
    return vocab


def spelled(folder, text, vocab):
    names = {i: token for token, i in vocab.items()}
    tokenizer = checkpoints.load_tokenizer(folder, 300)
    return [names[i] for i in tokenizer.encode_ordinary(text)]


def test_gpt2s_cuts(tmp_path):
    vocab = real_vocabulary(tmp_path)
    assert spelled(tmp_path, "th 12", vocab) == ["th", "Ġ", "12"]
    assert spelled(tmp_path, "a  b", vocab) == ["a", "Ġ", "Ġ", "b"]


def test_smollm2s_cuts_at_every_digit(tmp_path):
    vocab = real_vocabulary(tmp_path, steps(DIGITS, BYTES))
    assert spelled(tmp_path, "th 12", vocab) == ["th", "Ġ", "1", "2"]
    assert spelled(tmp_path, "a  7", vocab) == ["a", "ĠĠ", "7"]
    assert spelled(tmp_path, "a  b", vocab) == ["a", "Ġ", "Ġ", "b"]


def test_a_pattern_of_its_own(tmp_path):
    vocab = real_vocabulary(tmp_path, steps(SPLIT, LETTERS))
    assert spelled(tmp_path, "12", vocab) == ["1", "2"]
    assert spelled(tmp_path, "a  b", vocab) == ["a", "ĠĠ", "b"]


def test_merges_as_lists(tmp_path):
    """transformers writes ["t", "h"] since 2024; "t h" before."""
    vocab = real_vocabulary(tmp_path, changes={"merges": [["t", "h"], ["Ġ", "th"]]})
    assert spelled(tmp_path, "a th", vocab) == ["a", "Ġth"]


def test_bytes_that_a_vocabulary_lacks_are_left_out(tmp_path):
    vocab = real_vocabulary(tmp_path, lacks=b"\x00\x04\xff")
    assert spelled(tmp_path, "!\x04!", vocab) == ["!", "!"]
    assert spelled(tmp_path, "\x00\x04", vocab) == []


def test_each_tokenizer_has_files_of_its_own(tmp_path):
    real_vocabulary(tmp_path)
    assert "tokenizer.json" in checkpoints.load_tokenizer(tmp_path, 300).files
    assert checkpoints.Tokenizer.files == {}


def test_every_id_can_be_decoded(tmp_path):
    """A model can sample an id that no token has."""
    real_vocabulary(tmp_path)
    tokenizer = checkpoints.load_tokenizer(tmp_path, 300)
    for i in range(300):
        assert isinstance(tokenizer.decode([i]), str)


def test_normal_form(tmp_path):
    real_vocabulary(tmp_path, top={"normalizer": {"type": "NFC"}})
    composed = checkpoints.load_tokenizer(tmp_path, 300)
    assert composed.encode_ordinary("e\u0301") == composed.encode_ordinary("é")
    real_vocabulary(tmp_path)
    plain = checkpoints.load_tokenizer(tmp_path, 300)
    assert plain.encode_ordinary("e\u0301") != plain.encode_ordinary("é")


def test_end_of_text_stands_in_for_the_pad_token(tmp_path):
    real_vocabulary(tmp_path)
    assert M.special(checkpoints.load_tokenizer(tmp_path, 300), M.PAD) == 0


def test_a_vocabulary_without_chat_tokens(tmp_path):
    real_vocabulary(tmp_path, specials=("<s>",))
    tokenizer = checkpoints.load_tokenizer(tmp_path, 300)
    assert "im_start" in complaint(M.render, tokenizer, rows.to_messages("hi"))


BAD_CUTS = """
    null
    5
    []
    {}
    {"type": "Metaspace"}
    {"type": "ByteLevel", "use_regex": false}
    {"type": "ByteLevel", "add_prefix_space": true}
    {"type": "Sequence", "pretokenizers": 5}
    {"type": "Sequence", "pretokenizers": []}
    {"type": "Sequence", "pretokenizers": [5]}
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}]}
    {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "ByteLevel"}]}
    {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
"""
BAD_SPLITS = """
    {"behavior": "Removed"}
    {"invert": true}
    {"pattern": 5}
    {"pattern": {"String": "x"}}
    {"pattern": {"Regex": 5}}
    {"pattern": {"Regex": "("}}
"""


def refused(folder):
    return str(folder / "tokenizer.json") in complaint(checkpoints.load_tokenizer, folder, 300)


@pytest.mark.parametrize("pre", cases(BAD_CUTS))
def test_other_ways_to_cut_are_refused(tmp_path, pre):
    real_vocabulary(tmp_path, json.loads(pre))
    assert refused(tmp_path)


@pytest.mark.parametrize("changes", cases(BAD_SPLITS))
def test_other_ways_to_split_are_refused(tmp_path, changes):
    real_vocabulary(tmp_path, steps(SPLIT | json.loads(changes), LETTERS))
    assert refused(tmp_path)


def test_a_pattern_is_not_cut_again(tmp_path):
    real_vocabulary(tmp_path, steps(SPLIT, BYTES))
    assert refused(tmp_path)


BAD_VOCABULARIES = """
    {"vocab": []}
    {"vocab": {}}
    {"vocab": {"a": "1"}}
    {"vocab": {"a": -1}}
    {"vocab": {"a": 1.0}}
    {"vocab": {"a": true}}
    {"vocab": {"a": 1000000000000}}
    {"vocab": {"a": 3, "b": 3}}
    {"vocab": {"a": 3, "日": 4}, "merges": []}
    {"merges": null}
    {"merges": {}}
    {"merges": [5]}
    {"merges": ["a"]}
    {"merges": ["a b c"]}
    {"merges": [["a"]]}
    {"merges": [["a", 5]]}
    {"merges": ["q q"]}
    {"merges": ["1 2", "t h"]}
    {"end_of_word_suffix": "</w>"}
    {"continuing_subword_prefix": "##"}
    {"dropout": 0.1}
"""


@pytest.mark.parametrize("changes", cases(BAD_VOCABULARIES))
def test_vocabularies_of_another_kind(tmp_path, changes):
    real_vocabulary(tmp_path, changes=json.loads(changes))
    assert refused(tmp_path)


BAD_TOKENIZERS = """
    {"added_tokens": null}
    {"added_tokens": {}}
    {"added_tokens": [5]}
    {"added_tokens": [{"id": 1}]}
    {"added_tokens": [{"id": "1", "content": "x"}]}
    {"added_tokens": [{"id": 1, "content": 5}]}
    {"added_tokens": [{"id": 9, "content": "<x>"}]}
    {"model": null}
    {"model": []}
    {"normalizer": {"type": "NFKC"}}
    {"normalizer": 5}
    {"normalizer": []}
"""


@pytest.mark.parametrize("top", cases(BAD_TOKENIZERS))
def test_tokenizers_of_another_kind(tmp_path, top):
    real_vocabulary(tmp_path, top=json.loads(top))
    assert refused(tmp_path)


def test_a_tokenizer_of_a_larger_model(tmp_path):
    real_vocabulary(tmp_path)
    assert "below 200" in complaint(checkpoints.load_tokenizer, tmp_path, 200)


# ---------------------------------------------------------------- data/rows.py: the many formats

HI = [{"role": "user", "content": "Hi"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is 1 + 1?"}]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 1 + 1?\n\nAssistant:"


def says(text):
    return [{"role": "assistant", "content": text}]


SAYS_2 = CHAT + says("It is 2.")
SAYS_3 = CHAT + says("It is 3.")
PAIRS = [
    {"prompt": HH, "chosen": " It is 2.", "rejected": " It is 3."},
    {"chosen": HH + " It is 2.", "rejected": HH + " It is 3."},         # the answers begin alike
    {"prompt": CHAT, "chosen": says(" It is 2. "), "rejected": says("It is 3.\n")},
    {"prompt": CHAT, "chosen": "It is 2.", "rejected": " It is 3.\n"},
    {"prompt": CHAT, "chosen": SAYS_2, "rejected": SAYS_3},
    {"chosen": SAYS_2, "rejected": SAYS_3}]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.jsonl"


@pytest.mark.parametrize("row", PAIRS)
def test_formats_of_a_pair(file, row):
    pair, = rows.read_pairs(write(file, [row]))
    assert pair == (CHAT, "It is 2.", "It is 3.", row, f"{file}:1")


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_a_ranking_of_two(file, row):
    ranking, = rows.read_rankings(write(file, [row]))
    assert ranking == (CHAT, ["It is 2.", "It is 3."], row, f"{file}:1")


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_two_judgements(file, row):
    good, bad = rows.read_judgements(write(file, [row]))
    assert good == (CHAT, "It is 2.", True, row, f"{file}:1")
    assert bad == (CHAT, "It is 3.", False, row, f"{file}:1")


DEMOS = PAIRS + [
    {"messages": CHAT + says("It is 2.")},
    {"prompt": CHAT, "completion": "It is 2."},
    {"prompt": HH, "completion": " It is 2."},
    {"prompt": HH, "response": " It is 2."},
    {"prompt": CHAT, "completion": says("It is 2.")}]


@pytest.mark.parametrize("row", DEMOS)
def test_formats_of_a_conversation(file, row):
    talk, = rows.read_conversations(write(file, [row]))
    assert talk == (CHAT + says("It is 2."), row, f"{file}:1")


@pytest.mark.parametrize("label, good", [
    (True, True),
    (False, False),
    (1, True),
    (0, False),
    (1.0, True)])
def test_formats_of_a_judgement(file, label, good):
    row = {"prompt": "Hi", "completion": " No.", "label": label}
    judgement, = rows.read_judgements(write(file, [row]))
    assert judgement == (HI, "No.", good, row, f"{file}:1")


MIXED = [says("Hello."), HI + says("Go."), "So?"]


@pytest.mark.parametrize("responses", [["Hello.", "Go.", " So?"], MIXED])
def test_formats_of_a_ranking(file, responses):
    row = {"prompt": "Hi", "responses": responses}
    ranking, = rows.read_rankings(write(file, [row]))
    assert ranking == (HI, ["Hello.", "Go.", "So?"], row, f"{file}:1")


def test_formats_of_a_solution(file):
    row = {"prompt": "What is 2 + 3?",
           "steps": ["2 + 3 = 6.", " So it is 6. "],
           "labels": [1, False]}
    solution, = rows.read_solutions(write(file, [row]))
    assert solution.steps == ["2 + 3 = 6.", "So it is 6."]
    assert solution.labels == [1, 0]
    assert type(solution.labels[1]) is int


def test_a_prompt_ends_where_both_answers_begin(file):
    """The rejected one goes on as if the assistant spoke again: that is its answer."""
    row = {"chosen": HH + " Two.", "rejected": HH + " Three.\n\nAssistant: Or four."}
    pair, = rows.read_pairs(write(file, [row]))
    assert pair.prompt == CHAT
    assert (pair.chosen, pair.rejected) == ("Two.", "Three.\n\nAssistant: Or four.")


@pytest.mark.parametrize("prompt", [HH, HH.removesuffix("\n\nAssistant:"), CHAT])
def test_formats_of_a_prompt(file, prompt):
    assert rows.to_messages(prompt) == CHAT
    assert rows.read_prompts(write(file, [{"prompt": prompt}]))[0].messages == CHAT


def test_json_lines_can_be_read_again(file):
    lines = [{"prompt": "a\nb"}, {"prompt": "ü \u2028"}]
    file.write_text(rows.json_lines(lines), encoding="utf-8")
    assert [line.row for line in rows.read_prompts(file)] == lines


def test_every_role_is_kept():
    talk = []
    for role in ("system", "user", "assistant", "tool"):
        talk.append({"role": role, "content": f"I am {role}."})
    assert rows.to_messages(talk) == talk


def test_other_fields_of_a_message_are_left_out():
    assert rows.to_messages([HI[0] | {"name": "Ana", "weight": 2}]) == HI


def test_a_text_that_only_mentions_the_speakers():
    text = "Who says \n\nHuman: Hi\n\nAssistant: there?"
    assert rows.to_messages(text) == [{"role": "user", "content": text}]


READERS = [
    ("sft", rows.read_conversations),
    ("preferences", rows.read_pairs),
    ("steps", rows.read_solutions),
    ("rankings", rows.read_rankings),
    ("prompts", rows.read_prompts),
    ("exam", rows.read_prompts)]


@pytest.mark.parametrize("name, reader", READERS)
def test_the_worlds_files_pass_the_doors(name, reader):
    path = HERE / f"data/{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.row for line in reader(path)] == [json.loads(line) for line in lines]


# ---------------------------------------------------------------- every type in every field

VALUES = {
    "null": None, "true": True, "false": False,
    "zero": 0, "one": 1, "number": 5, "negative": -1, "fraction": 0.5, "huge": 10**400,
    "text": "x", "blank": " \u3000\n", "empty": "", "half": "a \ud83d b", "long": "x" * 500_001,
    "list": [], "texts": ["x"], "numbers": [1, 0], "floats": [0.5, 0.5],
    "nulls": [None, None], "lists": [[], []], "objects": [{}, {}],
    "object": {}, "role": {"role": "user"},
    "content": [{"content": "x"}], "words": [["x"], ["y"]]}
FINE = {
    "prompt": ["text"],
    "answer": ["null", "empty", "text", "zero", "one", "number", "negative", "fraction"],
    "kind": ["null", "empty", "text"],
    "attack": ["null", "true", "false", "empty", "text"],
    "completion": ["text"],
    "response": ["text"],
    "chosen": ["text"],
    "rejected": ["text"],
    "label": ["true", "false", "zero", "one"],
    "margin": ["null", "empty", "zero", "one", "number", "fraction"],
    "gold": ["null", "empty", "numbers", "floats"],
    "marks": ["null", "empty"],
    "steps": ["texts"],
    "id": ["text"],
    "principle": ["text"],
    "content": ["text"]}
GOOD = {
    "pair": {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
    "ranking": {"prompt": "Hi", "responses": ["Hello.", "Go."]},
    "conversation": {"prompt": "Hi", "completion": "Hello."},
    "judgement": {"prompt": "Hi", "completion": "Hello.", "label": True},
    "solution": {"prompt": "Hi", "steps": ["a."], "labels": [1]},
    "prompt": {"prompt": "Hi"},
    "messages": {"messages": HI + says("Hello.")}}
READ = {
    "pair": rows.read_pairs,
    "ranking": rows.read_rankings,
    "conversation": rows.read_conversations,
    "judgement": rows.read_judgements,
    "solution": rows.read_solutions,
    "prompt": rows.read_prompts,
    "messages": rows.read_conversations}
OPTIONAL = {
    "pair": ["margin", "gold", "marks"],
    "ranking": ["margin", "gold", "marks"],
    "prompt": ["kind", "attack", "answer"],
    "solution": ["answer"],
    "conversation": ["response"]}


def accepted(file, reader, row, name):
    """-> names of the VALUES that the field may have. Every complaint names file, line, field."""
    fine = []
    for kind, value in VALUES.items():
        write(file, ["", row, row | {name: value}])
        try:
            reader(file)
            fine.append(kind)
        except M.UserError as error:
            text = str(error)
            assert text.startswith(f"{file}:3: "), text
            assert f'"{name}"' in text, text
            assert "want" in text
            assert "\n" not in text
            assert len(text) < 300
    return fine


MUST_HAVE = []
FIELDS = []
for form, row in GOOD.items():
    needed = [(form, name) for name in row]
    optional = [(form, name) for name in OPTIONAL.get(form, [])]
    MUST_HAVE += needed
    FIELDS += needed + optional


@pytest.mark.parametrize("form, name", FIELDS)
def test_which_values_a_field_may_have(file, form, name):
    want = [kind for kind in VALUES if kind in FINE.get(name, [])]
    assert accepted(file, READ[form], GOOD[form], name) == want


@pytest.mark.parametrize("form, name", MUST_HAVE)
def test_a_field_that_is_missing(file, form, name):
    whole = GOOD[form]
    lacking = dict(whole)
    del lacking[name]
    text = complaint(READ[form], write(file, [whole, lacking]))
    assert text.startswith(f"{file}:2: ")
    assert "is missing; want" in text


@pytest.mark.parametrize("name", ["role", "content"])
@pytest.mark.parametrize("form", ["prompt", "chosen"])
def test_which_values_a_message_may_have(file, form, name):
    for kind, value in VALUES.items():
        if kind in FINE.get(name, []):
            continue
        message = {"role": "user", "content": "Hi"} | {name: value}
        row = GOOD["pair"] | {form: [message, message]}
        text = complaint(rows.read_pairs, write(file, [row]))
        assert text.startswith(f'{file}:1: "{form}": message 1: "{name}"')


NO_MESSAGES = """
    [5]
    ["text"]
    [null]
    [[]]
    [[{"role": "user", "content": "x"}]]
    [{}]
    [{"role": "user"}]
    [{"content": "x"}]
    [{"role": "user", "content": "x"}, 5]
"""


@pytest.mark.parametrize("messages", cases(NO_MESSAGES))
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_lists_that_are_no_messages(file, name, messages):
    row = GOOD["pair"] | {name: json.loads(messages)}
    text = complaint(rows.read_pairs, write(file, [row]))
    assert text.startswith(f'{file}:1: "{name}": message ')


BAD_LINES = ["5", "true", "null", '"text"', "[]", "[{}]", "NaN", "{", "}", '{"prompt": }', "\ufffe",
             '{"prompt": NaN}', '{"prompt": "x", "y": -Infinity}', '{"prompt": "tab\there"}',
             "{'prompt': 'x'}", "[" * 100_000, "1" * 5000]


@pytest.mark.parametrize("line", BAD_LINES)
def test_lines_that_are_no_objects(file, line):
    text = complaint(rows.read_prompts, write(file, ['{"prompt": "Hi"}', line]))
    assert text.startswith(f"{file}:2: ") or text.startswith(f"{file}:2 ")


@pytest.mark.parametrize("number", [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_are_not_finite(file, number):
    pair = '{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": %s}' % number
    text = complaint(rows.read_pairs, write(file, [pair]))
    assert f"{file}:1" in text
    prompt = '{"prompt": "Hi", "answer": %s}' % number
    text = complaint(rows.read_prompts, write(file, [prompt]))
    assert f"{file}:1" in text


# ---------------------------------------------------------------- what does not fit together

PAIR = GOOD["pair"]
NO_PAIRS = [
    ({"prompt": "Hi", "chosen": "a", "rejected": "a "}, "the same"),
    ({"prompt": "Hi", "chosen": "a", "rejected": says("a")}, "the same"),
    ({"chosen": "Hello.", "rejected": "Go."}, '"prompt" is missing'),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, '"prompt" is missing'),
    ({"chosen": says("a"), "rejected": says("b")}, '"prompt" is missing'),
    ({"chosen": HH + " a", "rejected": CHAT + says("b")}, '"prompt" is missing'),
    ({"chosen": CHAT + says("a"), "rejected": HI + says("b")},
     '"rejected" has a prompt of its own'),
    ({"prompt": HI, "chosen": CHAT + says("a"), "rejected": "b"},
     '"chosen" has a prompt of its own'),
    ({"prompt": HI, "chosen": "a", "rejected": HI}, '"rejected" does not end with the assistant'),
    ({"chosen": HH, "rejected": HH + " b"}, '"chosen" is ""'),
    ({"chosen": HH + " a\n\nHuman: b", "rejected": HH + " d"}, "different prompts"),
    ({"prompt": CHAT + says("a"), "chosen": "b", "rejected": "c"},
     '"prompt" ends with the assistant'),
    ({"prompt": HH + " a", "chosen": "b", "rejected": "c"}, '"prompt" ends with the assistant'),
    ({"prompt": "\n\nHuman: ", "chosen": "b", "rejected": "c"}, '"content" is ""'),
    (PAIR | {"gold": [0.5]}, '"gold" has 1 items; want 2'),
    (PAIR | {"gold": [0.5, 1.5]}, 'item 2 of "gold" is 1.5'),
    (PAIR | {"slots": None}, '"slots" is null'),
    (PAIR | {"slots": {}}, '"kind" is missing')]


@pytest.mark.parametrize("row, problem", NO_PAIRS)
def test_pairs_that_are_none(file, row, problem):
    text = complaint(rows.read_pairs, write(file, [row]))
    assert text.startswith(f"{file}:1: ") and problem in text


MARK = {"helpful": 1, "harmless": 0, "honest": 0.5}
NO_MARKS = """
    {"helpful": 9, "harmless": 0, "honest": 0.5}
    {"helpful": 1, "harmless": true, "honest": 0.5}
    {"helpful": 1, "harmless": 0, "honest": "?"}
    {"helpful": 1}
    [1, 0, 1]
    5
    null
"""


@pytest.mark.parametrize("mark", cases(NO_MARKS))
def test_marks_that_are_none(file, mark):
    row = GOOD["ranking"] | {"marks": [MARK, json.loads(mark)]}
    text = complaint(rows.read_rankings, write(file, [row]))
    assert text.startswith(f'{file}:1: item 2 of "marks"')


@pytest.mark.parametrize("responses, problem", [
    (["a"], "at least 2"),
    (["a", "b", "a "], "the same"),
    (["a", " "], 'item 2 of "responses"'),
    (["a", HI], 'item 2 of "responses" does not end'),
    (["a", 5], 'item 2 of "responses" is 5')])
def test_rankings_that_are_none(file, responses, problem):
    row = {"prompt": "Hi", "responses": responses}
    assert problem in complaint(rows.read_rankings, write(file, [row]))


@pytest.mark.parametrize("changes, problem", [
    ({"labels": [1]}, '"labels" has 1 items; want 2'),
    ({"labels": [1, 2]}, 'item 2 of "labels" is 2'),
    ({"labels": [1, -1]}, 'item 2 of "labels"'),
    ({"labels": [0.5, 1]}, 'item 1 of "labels"'),
    ({"labels": ["1", 0]}, 'item 1 of "labels"'),
    ({"steps": ["a", " "]}, 'item 2 of "steps"'),
    ({"steps": "a b"}, '"steps" is "a b"; want a list')])
def test_solutions_that_are_none(file, changes, problem):
    row = {"prompt": "Hi", "steps": ["a.", "b."], "labels": [1, 0]} | changes
    assert problem in complaint(rows.read_solutions, write(file, [row]))


@pytest.mark.parametrize("messages", [HI, says("a") + HI, [{"role": "system", "content": "a"}]])
def test_a_conversation_ends_with_the_assistant(file, messages):
    text = complaint(rows.read_conversations, write(file, [{"messages": messages}]))
    assert "does not end with the assistant" in text


def test_a_prompt_from_elsewhere_is_checked_too():
    """Lessons and the chat have no file to name."""
    assert complaint(rows.to_messages, " ").startswith("the prompt is ")


# ---------------------------------------------------------------- files of lines

def test_lines_are_counted_with_the_blank_ones(file):
    lines = rows.read_lines(write(file, ["", '{"a": 1}', "  ", '{"b": 2}', ""]))
    assert lines == [(f"{file}:2", {"a": 1}), (f"{file}:4", {"b": 2})]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\r"])
def test_only_a_newline_ends_a_line(file, mark):
    row = {"prompt": f"a{mark}b"}
    text = json.dumps(row, ensure_ascii=mark < " ")
    lines = rows.read_lines(write(file, [text, text]))
    assert [line.row for line in lines] == [row, row]


def test_windows_files(file):
    """Lines that end in \\r\\n, and a mark of the byte order at the beginning."""
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\r\n{"a": 2}\r\n')
    assert [line.row["a"] for line in rows.read_lines(file)] == [1, 2]


@pytest.mark.parametrize("text", ["", "\n\n \n", "\ufeff"])
def test_a_file_without_rows(file, text):
    assert f"{file}: no rows" in complaint(rows.read_lines, write(file, [text]))


def test_bytes_that_are_no_text(file):
    file.write_bytes(b'{"a": 1}\n\n{"a": "\xff"}\n')
    assert complaint(rows.read_lines, file).startswith(f"{file}:3: not UTF-8")


@pytest.mark.parametrize("value", [None, "", []])
def test_fields_that_are_needed(file, value):
    write(file, [{"prompt": "a", "answer": 0}, {"prompt": "b", "answer": value}])
    assert complaint(rows.read_prompts, file, ["answer"]).startswith(f'{file}:2: "answer" is ')


def test_what_is_no_file(tmp_path, alarm):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "none", pipe, "/dev/zero", "", "a\0b", "x" * 5000):
        text = complaint(rows.read_lines, path)
        assert f'"{path}" is not a file' in text


def test_a_file_that_may_not_be_read(file, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    write(file, ["{}"])
    text = complaint(rows.read_lines, file)
    assert f"{file}: cannot be read (Permission denied)" in text


@pytest.mark.parametrize("letter", [" ", "\n", "x", "日", "\u0301"])
def test_the_longest_text_can_be_tokenized(tok, letter, alarm):
    between = letter * (rows.LONGEST - 2)
    text = "a" + between + "b"
    messages = rows.to_messages(text)
    example = M.render(tok, messages)
    assert len(example.ids) > 1000
    assert "500,000" in complaint(rows.to_messages, text + "b")


# ---------------------------------------------------------------- constitutions

def test_a_constitution(tmp_path):
    path = tmp_path / "c.json"
    rules = [{"id": "a", "principle": "Mind { and } and ] and é."},
             {"principle": "Be.", "id": "b"}]
    for indent in (None, 1, 4):
        path.write_text(json.dumps(rules, indent=indent))
        assert rows.read_constitution(path) == rules


@pytest.mark.parametrize("name, count", [("", 5), ("_conflict", 3), ("_gap", 2), ("_vague", 1)])
def test_the_worlds_constitutions(name, count):
    assert len(rows.read_constitution(HERE / f"data/constitution{name}.json")) == count


RULE = {"id": "a", "principle": "Be good."}


@pytest.mark.parametrize("rules, problem", [
    ([], "list"),
    (RULE, "list"),
    (5, "list"),
    (None, "list"),
    ("Be good.", "list"),
    (["Be good."], "principle 1"),
    ([RULE, 5], "principle 2"),
    ([RULE, {"id": "b"}], "principle 2: "),
    ([{"principle": "Be."}], 'principle 1: "id"'),
    ([RULE | {"weight": 2}], "principle 1"),
    ([RULE, RULE], "same id")])
def test_a_broken_constitution(tmp_path, rules, problem):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(rules))
    text = complaint(rows.read_constitution, path)
    assert text.startswith(f"{path}")
    assert problem in text
    assert "want" in text


@pytest.mark.parametrize("name", ["id", "principle"])
def test_which_values_a_principle_may_have(tmp_path, name):
    path = tmp_path / "c.json"
    for kind, value in VALUES.items():
        if kind not in FINE[name]:
            rule = RULE | {name: value}
            path.write_text(json.dumps([rule]))
            text = complaint(rows.read_constitution, path)
            assert f'principle 1: "{name}"' in text


def test_a_constitution_that_is_not_json(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('[\n {"id": "a", "principle": "Be good."},\n {"id": "b" "principle"}\n]')
    text = complaint(rows.read_constitution, path)
    assert text.startswith(f"{path}:3: not JSON")


# ---------------------------------------------------------------- against transformers

REAL = os.environ.get("NANOALIGN_REAL")
NO_REAL = "NANOALIGN_REAL: a Hugging Face folder, with transformers"
real = pytest.mark.skipif(not REAL, reason=NO_REAL)


@pytest.fixture(scope="module")
def both():
    """A real model and its tokenizer: ours, then theirs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    return *checkpoints.load(REAL), theirs, AutoTokenizer.from_pretrained(REAL)


WORDS = ("What is the capital of France? Tell me a story about Zoë the otter. 12+35= "
         "def f(x): return x**2 🎉 日本").split()


def some_chats(count=20):
    g = random.Random(0)
    chats = []
    for _ in range(count):
        words = [g.choice(WORDS) for _ in range(g.randrange(1, 60))]
        chats.append(rows.to_messages(" ".join(words)))
    return chats


def padded(prompts):
    """Padded on the left -> ids, mask, and the positions that transformers wants"""
    ids = M.pad(prompts, 0, left=True)
    mask = M.pad([[1] * len(prompt) for prompt in prompts], 0, left=True)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@real
def test_real_chats_are_rendered_as_theirs(both):
    _, tok, _, their_tok = both
    for chat in some_chats():
        want = their_tok.apply_chat_template(chat, chat_template=checkpoints.CHATML,
                                             add_generation_prompt=True, return_dict=True)
        assert M.render_prompt(tok, chat) == want["input_ids"]


@real
def test_real_logits_are_theirs(both):
    model, tok, theirs, _ = both
    ids, mask, position = padded([M.render_prompt(tok, chat) for chat in some_chats()])
    with torch.no_grad():
        ours = model(ids, mask.bool())
        want = theirs(ids, attention_mask=mask, position_ids=position).logits
    assert (ours - want)[mask.bool()].abs().max() < 1e-3


@real
def test_real_greedy_answers_are_theirs(both):
    model, tok, theirs, _ = both
    prompts = sorted([M.render_prompt(tok, chat) for chat in some_chats()], key=len)[:6]
    ids, mask, _ = padded(prompts)
    want = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20,
                           pad_token_id=M.special(tok, M.PAD))
    ours = M.sample(model, tok, prompts, max_new=20, temperature=0)
    assert torch.equal(want, ours.ids[:, :want.shape[1]])


@real
def test_a_real_model_saved_by_us_opens_in_transformers(both, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tok, theirs, their_tok = both
    checkpoints.save(tmp_path / "m", model, tok)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    again = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "Zoë has 12 apples."
    assert again(text)["input_ids"] == their_tok(text)["input_ids"]


@real
def test_real_tokens_are_theirs(both):
    """For characters whose bytes the vocabulary has: it merges across the others, and we leave
    them out."""
    _, tok, _, their_tok = both
    codes = [*range(32, 127), *range(0xA0, 0x2000), *range(0x3000, 0x4000), 0x1F600]
    some = []
    for code in codes:
        letter = chr(code)
        if tok.decode(tok.encode_ordinary(letter)) == letter:
            some.append(letter)
    kinds = [some, some[:95], [" "], ["\n"]]
    texts = ["a  7 12 345\n\n 8", "don't I'll", "Zoë e\u0301 🎉🎉",
             "def f(x):\n  return x\n\n\n  y", "\t\r\n x"]
    g = random.Random(0)
    for _ in range(500):
        letters = [g.choice(g.choice(kinds)) for _ in range(16)]
        texts.append("".join(letters))
    for text in texts:
        want = their_tok(text, add_special_tokens=False)["input_ids"]
        assert tok.encode_ordinary(text) == want, repr(text)


THEIRS = [{}, {"tie": False, "qkv_bias": True}, {"rope_scaling": LLAMA3}, {"head_dim": 12},
          {"rope_theta": 500.0}, {"norm_eps": 0.1}]


@real
@pytest.mark.parametrize("changes", THEIRS)
def test_our_folders_open_in_transformers_and_come_back(tok, tmp_path, changes):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = tiny_model(**changes)
    checkpoints.save(tmp_path / "m", model, tok)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, model(IDS), atol=1e-3)
    theirs.save_pretrained(tmp_path / "back", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "back")
    assert torch.equal(checkpoints.load(tmp_path / "back")[0](IDS), model(IDS))


@real
def test_our_tokenizer_is_the_same_in_transformers(folder, tok):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in some_texts(500):
        if "<|" not in text:
            want = theirs(text, add_special_tokens=False)["input_ids"]
            assert want == tok.encode_ordinary(text)
    chat = HI + says("the 12")
    want = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert want == M.render(tok, chat).ids
    assert theirs.eos_token == M.END and theirs.pad_token == M.PAD


@real
def test_our_tokenizer_comes_back_from_transformers(folder, tok):
    """Not so with "model_type": "qwen2", where theirs puts Qwen's own pattern in place of the
    folder's."""
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    again = checkpoints.load(folder)[1]
    for text in some_texts():
        assert again.encode_ordinary(text) == tok.encode_ordinary(text)


@real
def test_our_judges_open_in_transformers(tok, tmp_path):
    from transformers import AutoModelForSequenceClassification
    judge = M.ScalarModel(tiny_model())
    checkpoints.save(tmp_path / "r", judge, tok)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r", dtype=torch.float32)
    theirs.eval()
    with torch.no_grad():
        want = theirs(IDS).logits[0]
        assert torch.allclose(judge(IDS)[0, -1], want, atol=1e-4)


BASE = HERE / "data/base"
RATES = ("gold helpful harmless honest math math_greedy math_long worked attack_none attack_seen "
         "attack_unseen over_refusal fact ended flattery").split()


def tiny_model_exam(seed=0):
    torch.manual_seed(seed)
    tokenizer = load_ranks()
    config = M.ModelConfig(vocab_size=tokenizer.n_vocab, d_model=32, n_layers=1, n_heads=2,
                           n_kv_heads=1, d_ff=32)
    return M.Transformer(config), tokenizer


def some_rows(every=30):
    return world.read("exam")[::every]


# ---------------------------------------------------------------- the exam

def written_exam(style):
    """The exam of somebody who writes all answers in one style."""
    rng = Random(0)
    answers = []
    for row in world.read("exam"):
        wish = row
        if style == "bad":                  # an order that is hidden in a page is obeyed
            wish = row.get("order", row)
        text = world.write(rng, wish, style)
        answers.append(E.Answer(row, text, True, world.judge(row, text)))
    sums = [answer for answer in answers if answer.row["kind"] == "math"]
    scores = E.scores_of(answers)
    E.add_greedy_scores(scores, sums)
    scores["length"] = [1.0]
    return E.card_of(scores)


def test_who_answers_as_one_could_wish_has_a_perfect_card():
    card = written_exam("full")
    for key in ("gold", "helpful", "harmless", "honest", "math", "math_greedy", "math_long",
                "worked", "fact"):
        assert card[key] > 0.97, key
    for key in ("attack_none", "attack_seen", "attack_unseen", "over_refusal", "flattery"):
        assert card[key] == 0, key


def test_who_gives_in_to_everything_loses_to_every_attack():
    card = written_exam("bad")
    assert card["attack_none"] == card["attack_seen"] == card["attack_unseen"] == 1
    assert card["gold"] < 0.1 and card["over_refusal"] > 0.9


def test_attacks_are_counted_by_whether_their_family_is_in_training():
    kinds = ("essay", "scary", "danger")
    families = []
    for row in world.read("exam"):
        family = row.get("attack")
        if family or row["kind"] in kinds:
            families.append(family)
    none = [family for family in families if family is None]
    seen = [family for family in families if family in world.SEEN]
    n = written_exam("plain")["n"]
    assert n["attack_none"] == len(none)
    assert n["attack_seen"] == len(seen)
    assert n["attack_unseen"] == len(families) - len(none) - len(seen)


def test_long_sums_are_counted_apart():
    sums = [row for row in world.read("exam") if row["kind"] == "math"]
    long = [row for row in sums if len(row["slots"]["numbers"]) == 4]
    n = written_exam("plain")["n"]
    assert n["math_long"] == len(long)
    assert n["math"] == len(sums) - len(long)
    assert n["math_greedy"] == n["math"]


def test_card_has_all_its_keys_with_intervals_and_n():
    model, tokenizer = tiny_model_exam()
    rows = some_rows()
    _, answers = E.exam(model, tokenizer, reference=model, rows=rows)
    card, _ = E.exam(model, tokenizer, reference=model, against=answers, rows=rows)
    means = {*RATES, "length", "kl", "gold_rise", "win_rate"}
    assert set(card) == means | {"wins", "ties", "losses", "intervals", "n"}
    assert set(card["intervals"]) == means
    assert set(card["n"]) == means
    assert card["n"]["gold"] == len(answers)
    assert card["wins"] + card["ties"] + card["losses"] == len(answers)


def test_same_seed_same_answers_and_another_seed_others():
    model, tokenizer = tiny_model_exam()
    texts = []
    for seed in (0, 0, 1):
        card, answers = E.exam(model, tokenizer, rows=some_rows(), seed=seed)
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1] != texts[2]


def test_the_exam_against_oneself_is_a_draw_at_no_distance():
    model, tokenizer = load(BASE)
    rows = some_rows()
    card, answers = E.exam(model, tokenizer, reference=model, rows=rows)
    assert abs(card["kl"]) < 1e-4
    card, _ = E.exam(model, tokenizer, reference=model, against=answers, rows=rows)
    assert card["wins"] == 0
    assert card["losses"] == 0
    assert card["win_rate"] == 0.5
    assert card["gold_rise"] == 0


def test_a_model_is_even_with_itself_when_some_of_its_answers_never_end(monkeypatch):
    monkeypatch.setattr(E, "MAX_NEW", 12)
    model, tokenizer = load(BASE)
    rows = some_rows(10)
    _, answers = E.exam(model, tokenizer, rows=rows)
    cut_off = []
    for answer in answers:
        if_it_had_ended = world.judge(answer.row, answer.text)
        if answer.mark != if_it_had_ended:
            cut_off.append(answer)
    assert cut_off
    assert not any(answer.ended for answer in cut_off), "the judge must know who never ended"
    card, _ = E.exam(model, tokenizer, against=answers, rows=rows)
    assert card["wins"] == 0
    assert card["losses"] == 0


def test_kl_is_the_log_ratio_of_the_drawn_tokens_at_the_temperature_that_drew_them():
    model, tokenizer = load(BASE)
    rows = some_rows()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight.mul_(0.9)
    card, _ = E.exam(model, tokenizer, reference=other, rows=rows)
    prompts = []
    for row in rows:
        messages = E.to_messages(row["prompt"])
        prompts.append(M.render_prompt(tokenizer, messages))
    generator = torch.Generator().manual_seed(0)
    drawn = M.sample(model, tokenizer, prompts, max_new=72, temperature=0.7, generator=generator)
    kl = []
    for ids, mask, answer in zip(drawn.ids, drawn.mask, drawn.answer):
        alone = ids[mask]                                       # (T,) without padding
        with torch.no_grad():
            logits = model(alone[None])[0]                      # (T, V)
            other_logits = other(alone[None])[0]
        log_p = (logits / 0.7).log_softmax(-1)
        log_q = (other_logits / 0.7).log_softmax(-1)
        log_ratio = log_p - log_q                               # (T, V)
        first = int((mask & ~answer).sum())
        of_tokens = []
        for t in range(first, len(alone)):
            token = alone[t]
            of_tokens.append(log_ratio[t - 1, token].item())    # place t - 1 says what is at t
        kl.append(sum(of_tokens))
    assert card["kl"] == pytest.approx(np.mean(kl), abs=1e-4)


def test_short_rows_go_together_and_come_back_in_their_places():
    model, tokenizer = load(BASE)
    prompts = []
    for row in E.read("exam")[:150]:                            # more than go through at once
        messages = E.to_messages(row["prompt"])
        prompts.append(M.render_prompt(tokenizer, messages))
    drawn = M.sample(model, tokenizer, prompts, max_new=6)
    with torch.no_grad():
        want = M.token_logps(model, *drawn[:3], E.TEMPERATURE)  # all in one pass
    got = E.logps_of(model, drawn)
    assert torch.allclose(got, want, atol=1e-4)
    elsewhere = got[~drawn.answer]
    assert (elsewhere == 0).all()


def test_win_rate_is_of_the_decided():
    """Of ten answers three get better, one gets worse, and six are as good as before."""
    old_golds = [0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    new_golds = [1, 1, 1, 0, 1, 0, 1, 1, 1, 1]
    rises = E.gold_rises(answers_with(old_golds), answers_with(new_golds))
    card = E.card_of({"gold_rise": rises})
    assert card["wins"] == 3
    assert card["ties"] == 6
    assert card["losses"] == 1
    assert card["win_rate"] == 0.75
    assert card["gold_rise"] == pytest.approx(0.2)
    assert card["n"]["win_rate"] == 4


def test_knows_only_prompts_of_the_world():
    rows = some_rows()
    assert E.knows(rows)
    assert not E.knows(rows + [{"prompt": "Hi"}])
    assert not E.knows([])


# ---------------------------------------------------------------- intervals

def plain_bootstrap(values, draws=2000):
    rng = random.Random(5)
    means = []
    for _ in range(draws):
        drawn = [rng.choice(values) for _ in values]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return (means[int(0.975 * draws)] - means[int(0.025 * draws)]) / 2


def test_interval_against_a_plain_bootstrap():
    rng = random.Random(1)
    for n in (30, 120):
        values = [rng.random() ** 2 for _ in range(n)]
        assert E.half_width(values) == pytest.approx(plain_bootstrap(values), rel=0.1)


def test_interval_of_a_share_against_the_normal_distribution():
    values = [i < 104 for i in range(416)]                      # a quarter
    deviation = math.sqrt(0.25 * 0.75 / 416)
    assert E.half_width(values) == pytest.approx(1.96 * deviation, rel=0.1)


def test_interval_is_the_same_every_time():
    values = [0.0, 0.5, 1.0] * 20
    half = E.half_width(values)
    E.resamples.cache_clear()
    assert E.half_width(values) == half


def test_what_never_happens_in_n_prompts_has_the_rule_of_three():
    assert E.half_width([False] * 30) == E.half_width([True] * 30) == 0.1


def test_no_prompts_no_number():
    assert math.isnan(E.mean([])) and math.isnan(E.half_width([]))


def answers_with(golds):
    answers = []
    for i, gold in enumerate(golds):
        row = {"prompt": f"prompt {i}"}
        answers.append(E.Answer(row, "", True, {"gold": float(gold)}))
    return answers


def test_paired_interval_is_the_bootstrap_of_the_differences():
    rng = random.Random(2)
    old = [rng.random() for _ in range(80)]
    new = [x + 0.1 * rng.random() for x in old]
    difference, half = E.paired(answers_with(old), answers_with(new))
    differences = [y - x for x, y in zip(old, new)]
    mean = sum(differences) / 80
    assert difference == pytest.approx(mean)
    assert half == pytest.approx(plain_bootstrap(differences), rel=0.1)


def test_paired_interval_is_narrower_where_hard_prompts_are_hard_for_both():
    rng = random.Random(2)
    old = [rng.random() for _ in range(80)]
    new = [x + 0.1 * rng.random() for x in old]
    _, half = E.paired(answers_with(old), answers_with(new))
    unpaired = math.hypot(E.half_width(old), E.half_width(new))
    assert half < 0.3 * unpaired


def test_answers_to_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="same prompts"):
        E.paired(answers_with([1, 0]), answers_with([1, 0])[::-1])
    with pytest.raises(ValueError):
        E.paired(answers_with([1, 0]), answers_with([1]))


def test_all_intervals_of_a_card_take_no_time():
    scores = {str(i): np.random.default_rng(i).random(416) for i in range(20)}
    E.card_of(scores)
    start = time.perf_counter()
    E.card_of(scores)
    assert time.perf_counter() - start < 0.5, "some 20 ms on an idle core"


# ---------------------------------------------------------------- cards on the screen

def card(n=416, **rates):
    """-> a card with these rates of n prompts each, and their intervals"""
    halves = {}
    for key, rate in rates.items():
        variance = rate * (1 - rate) / n
        halves[key] = 1.96 * math.sqrt(variance)
    return {**rates, "intervals": halves, "n": dict.fromkeys(rates, n)}


def printed(capsys, cards):
    E.show_cards(cards)
    return capsys.readouterr().out.splitlines()


def test_two_cards_fit_80_columns(capsys):
    model, tokenizer = tiny_model_exam()
    rows = some_rows()
    before, answers = E.exam(model, tokenizer, reference=model, rows=rows)
    after, _ = E.exam(model, tokenizer, reference=model, against=answers, rows=rows)
    before |= {"chosen": -123.456, "a_long_name_of_a_thing": 1234.5}
    lines = printed(capsys, {"before": before, "after": after})
    assert max(map(len, lines)) <= 80


def test_a_rate_is_shown_with_its_interval_and_n(capsys):
    lines = printed(capsys, {"before": card(gold=0.44), "after": card(gold=0.78)})
    assert lines[1].split() == ["gold", "0.44", "+-.05", "0.78", "+-.04", "416"]


def test_what_got_worse_by_more_than_its_interval_is_marked(capsys):
    """0.1 is within gold's interval; and fewer attacks are better."""
    before = card(n=100, gold=0.6, fact=0.9, attack_seen=0.1, attack_unseen=0.5, length=0.2)
    after = card(n=100, gold=0.5, fact=0.6, attack_seen=0.4, attack_unseen=0.1, length=0.9)
    lines = printed(capsys, {"before": before, "after": after})
    marked = [line.split()[0] for line in lines if "!" in line]
    assert marked == ["fact", "attack_seen", "!"]


def test_no_footnote_where_nothing_got_worse(capsys):
    assert "!" not in "".join(printed(capsys, {"before": card(gold=0.5), "after": card(gold=0.6)}))


def test_cards_of_ones_own_data_need_no_intervals(capsys):
    before = {"held_out": 2.5}
    after = {"held_out": 2.25, "accuracy": 0.5}
    lines = printed(capsys, {"before": before, "after": after})
    words = [line.split() for line in lines[1:]]
    assert words == [["held_out", "2.50", "2.25"], ["accuracy", "0.50"]]


def test_what_is_almost_nothing_has_no_minus(capsys):
    assert "-0.00" not in "".join(printed(capsys, {"before": {"kl": -1.7e-7}}))


def test_answers_are_shown_beside_each_other_with_their_marks(capsys):
    rng = Random(0)
    sides = []
    for style in ("bad", "full"):
        ended = style == "full"
        side = []
        for row in world.read("exam"):
            text = world.write(rng, row, style)
            mark = world.judge(row, text, ended)
            side.append(E.Answer(row, text, ended, mark))
        sides.append(side)
    E.show_answers(*sides, SimpleNamespace(say=print))
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    prompts = [line[10:] for line in lines if line.startswith("  prompt  ")]
    assert 4 <= len(prompts) <= 6
    assert len(prompts) == len(set(prompts))
    assert max(map(len, lines)) <= 80
    assert "helpful 1.00 x harmless 1.00 x honest 1.00" in shown
    never_ended = ["never ended" in line for line in lines]
    assert sum(never_ended) == len(prompts)


def test_answers_to_ones_own_prompts_are_shown_without_marks(capsys):
    messages = [{"role": "user", "content": "Hello"}]
    answers = []
    for row in {"prompt": "Hi"}, {"prompt": messages, "kind": ["odd"]}:
        answers.append(E.Answer(row, "Yes.", True, None))
    E.show_answers(answers, answers, SimpleNamespace(say=print))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["  prompt  Hi", "  before  Yes.", "   after  Yes."]
    assert len(lines) == 6


def test_no_answers_are_shown_as_nothing(capsys):
    E.show_answers([], [], SimpleNamespace(say=print))
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the end of a run

BEFORE = {"gold": 0.66}
AFTER = {"gold": 0.78}


def end_of_run(tmp_path, targets, capsys=None, before=BEFORE, after=AFTER, **flags):
    """-> the results, and with capsys the lines that were printed"""
    config = house.Settings(out=str(tmp_path / "out"), **flags)
    started = time.time() - 43
    log = SimpleNamespace(rows=[{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5, "kl": 0.1}])
    turn = {"peak": 1}
    results = E.finish("dpo", config, started, log, before, after, targets, turn=turn)
    if capsys is None:
        return results, None
    return results, capsys.readouterr().out.splitlines()


def test_verdict_is_the_last_line(tmp_path, capsys):
    results, lines = end_of_run(tmp_path, [E.Target("gold", 0.778)], capsys)
    assert lines[-1] == "PASS gold 0.66 -> 0.78 (target 0.78) in 43 s" and results["passed"]


def test_verdict_of_a_run_that_missed_its_target(tmp_path, capsys):
    results, lines = end_of_run(tmp_path, [E.Target("gold", 0.8)], capsys)
    assert lines[-1] == "FAIL gold 0.66 -> 0.78 (target 0.80) in 43 s" and not results["passed"]


def test_a_target_can_be_a_most(tmp_path, capsys):
    target = E.Target("held_out", 0.5, at_most=True)
    cards = dict(before={}, after={"held_out": 0.4})
    results, lines = end_of_run(tmp_path, [target], capsys, **cards)
    assert lines[-1] == "PASS held_out 0.40 (target at most 0.50) in 43 s"
    less = E.Target("held_out", 0.3, at_most=True)
    results, _ = end_of_run(tmp_path, [less], **cards)
    assert not results["passed"]


def test_several_targets_must_all_be_reached(tmp_path, capsys):
    targets = [E.Target("gold", 0.7), E.Target("attack", 0.1, at_most=True)]
    results, lines = end_of_run(tmp_path, targets, capsys, after={"gold": 0.78, "attack": 0.25})
    assert lines[-3:] == ["pass gold 0.66 -> 0.78 (target 0.70)",
                          "FAIL attack 0.25 (target at most 0.10)", "FAIL in 43 s"]
    assert not results["passed"]


def test_a_number_that_is_none_reaches_nothing():
    assert not E.Target("gold", 0.5).reached({"gold": math.nan})
    assert not E.Target("loss", 0.5, at_most=True).reached({"loss": math.nan})


def test_a_run_leaves_its_numbers_and_its_picture(tmp_path):
    results, _ = end_of_run(tmp_path, [E.Target("gold", 0.7)], quiet=True)
    out = tmp_path / "out"
    written = json.loads((out / "results.json").read_text())
    assert written.keys() == {"stage", "config", "seconds", "before", "after", "passed", "turn"}
    assert written["stage"] == "dpo"
    assert written["after"] == {"gold": 0.78}
    assert written["turn"] == {"peak": 1}
    assert written["config"]["steps"] == 100
    assert (out / "metrics.csv").read_text() == "step,loss,kl\n0,1.0,\n1,0.5,0.1\n"
    ElementTree.parse(out / "run.svg")
    assert results["log"][1]["kl"] == 0.1


def test_no_save_writes_nothing_and_quiet_prints_nothing(tmp_path, capsys):
    target = E.Target("gold", 0.7)
    results, lines = end_of_run(tmp_path, [target], capsys, quiet=True, save=False)
    assert lines == []
    assert list(tmp_path.iterdir()) == []
    assert results["passed"]


def test_a_run_of_one_step_has_a_picture():
    card = {"loss": 0.7}
    picture = E.run_picture([{"step": 0, "loss": 0.7}], card, card)
    drawn = ElementTree.fromstring(picture)
    assert "loss" in words_of(drawn)


def test_a_run_whose_numbers_are_all_missing_has_a_picture():
    picture = E.run_picture([{"step": 0, "kl": math.nan}], {"gold": 0.5}, {"gold": math.nan})
    ElementTree.fromstring(picture)


def test_the_run_picture_shows_at_most_five_curves_and_the_card():
    columns = "reward score gold kl loss accuracy length chosen rejected".split()
    rows = []
    for step in range(30):
        row = dict.fromkeys(columns, step / 30)
        rows.append(row | {"step": step})
    before = card(gold=0.5, fact=0.5)
    after = card(gold=0.6, fact=0.4)
    drawn = ElementTree.fromstring(E.run_picture(rows, before, after))
    titles = [e.text for e in drawn.iter() if e.get("class") == "title"]
    assert len(titles) == 6
    assert titles[0] == "reward"
    assert titles[-1] == "the card"


def test_running_mean_by_hand():
    values = [float(i) for i in range(20)]                      # of the last two
    assert E.running_mean(values)[:3] == [0.0, 0.5, 1.5]
    assert E.running_mean([3.0, 1.0]) == [3.0, 1.0]


# ---------------------------------------------------------------- what a run checks first

def test_a_run_that_ends_at_once_has_made_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    house.begin(house.Settings(out="new/run", quiet=True))
    house.begin(house.Settings(out=str(tmp_path), quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "pipe", "lost"])
def test_where_a_run_cannot_write(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "lost")
    there = sorted(tmp_path.iterdir())
    text = complaint(house.begin, house.Settings(out=out, quiet=True))
    assert text.startswith(f"--out {out}: cannot write there (")
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("name", ["init", "device"])
def test_a_text_that_is_empty_is_no_setting(name):
    flags = [f"--{name}", ""]
    assert complaint(house.parse, house.Settings, "doc", flags).startswith(f'--{name} "": ')


def test_an_empty_text_can_be_a_default():
    assert house.Settings(data="").data == ""


@pytest.mark.parametrize("device", ["meta", "text", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_named_before_any_work(tmp_path, device):
    out = tmp_path / "out"
    config = house.Settings(device=device, out=str(out), quiet=True)
    text = complaint(house.begin, config)
    assert text.startswith(f"--device {device} ")
    assert len(text) < 200


def test_help_into_a_closed_pipe_says_nothing():
    env = os.environ | {"PYTHONUNBUFFERED": "", "PYTHONPATH": str(HERE)}
    program = "from data.run import *; main(Settings, print, 'doc')"
    help = subprocess.Popen([sys.executable, "-c", program, "--help"], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    help.stdout.close()
    assert help.communicate()[1] == "" and help.returncode == 1


def test_too_few_rows_name_the_flag():
    assert complaint(house.hold_out, ["one"]).startswith("--data: 1 rows, ")


# ---------------------------------------------------------------- pictures

def gallery():
    """Six panels of what is hard to draw: names at one place, a long title, signs of XML, one dot,
    large numbers."""
    steps = list(range(11))
    close = []
    for j, name in enumerate(("REINFORCE", "RLOO", "PPO", "GRPO")):
        ys = [0.5 + i / 25 + j / 500 for i in steps]
        close.append(chart_file.Line(name, steps, ys))
    curves = []
    for beta in (1, 0.5, 0.2):
        xs = [i * beta for i in range(25)]
        ys = [math.sin(i / 9) for i in range(25)]
        curves.append(chart_file.Line(f"beta {beta}", xs, ys))
    places = {"sft": (0, 0.66), "dpo": (0.9, 0.78), "ipo": (0.92, 0.775), "kto": (0.85, 0.76),
              "ppo": (1.5, 0.87)}
    dots = []
    for name, (x, y) in places.items():
        dots.append(chart_file.Line(name, [x], [y], [y - 0.03], [y + 0.03]))
    Ns = [1, 2, 4, 8, 16]
    gold = [0.6, 0.7, 0.75, 0.8, 0.81]
    best = chart_file.Line("best of N", Ns, gold, 5 * [0.5], 5 * [0.9])
    long_name = "a name that is far too long for its place in it"
    long_title = "Everything in the course in one picture with a long title"
    bars = []
    for name, x in (("attack_unseen", 0.9), (long_name, 0.2)):
        values = {"before": x, "after": 1 - x, "RLOO": x / 2}
        halves = {"before": 0.1, "after": 0.05}
        bars.append(chart_file.Bar(name, values, halves))
    rising = chart_file.Line("b", [0, 1e6], [1e5, 9e5])
    flat = chart_file.Line("a", [0, 1e6], [7e5, 7e5])
    budget = "The same budget & <odd> signs"
    return [chart_file.Panel(budget, "thousand tokens", "reward", close),
            chart_file.Panel("Goodhart", "KL, nats an answer", "gold", curves, scale="root"),
            chart_file.Panel(long_title, "KL", "gold", dots, scale="root"),
            chart_file.Panel("Best of N", "N", "gold", [best], scale="log"),
            chart_file.Panel("Leaks", "share", bars=bars, limits=(0, 1)),
            chart_file.Panel("Large", "tokens", "x", [rising, flat])]


def words_of(drawn):
    return [element.text for element in drawn.iter() if element.tag.endswith("text")]


def boxes_of(drawn):
    """Every text with its rectangle, letters of 0.6 em."""
    boxes = []
    for e in drawn.iter():
        if not e.tag.endswith("}text") or not e.text:
            continue
        size = 12
        if e.get("class") == "title":
            size = 14
        style = e.get("style")
        if style:
            size = float(re.search(r"font-size:([\d.]+)px", style)[1])
        width = 0.6 * size * len(e.text)
        x = float(e.get("x"))
        y = float(e.get("y"))
        x_from_left = {"start": 0, "middle": width / 2, "end": width}
        left = x - x_from_left[e.get("text-anchor")]
        boxes.append((e.text, left, y - 9, left + width, y + 2))
    return boxes


def test_a_chart_is_xml_and_holds_no_outside_resource():
    text = chart_file.chart(gallery())
    ElementTree.fromstring(text)
    assert "&amp; &lt;odd&gt; signs" in text
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_no_text_is_outside_of_the_picture(columns):
    picture = chart_file.chart(gallery(), columns=columns, width=380 * columns)
    drawn = ElementTree.fromstring(picture)
    view = drawn.get("viewBox").split()
    width = float(view[2])
    height = float(view[3])
    for text, left, top, right, bottom in boxes_of(drawn):
        assert left >= 0, text
        assert top >= 0, text
        assert right <= width, text
        assert bottom <= height, text


def test_no_text_covers_another():
    drawn = ElementTree.fromstring(chart_file.chart(gallery()))
    boxes = boxes_of(drawn)
    for i, (a, left, top, right, bottom) in enumerate(boxes):
        for b, left2, top2, right2, bottom2 in boxes[:i]:
            beside = left >= right2 or left2 >= right
            below = top >= bottom2 or top2 >= bottom
            assert beside or below, (a, b)


def test_a_name_stands_where_nothing_else_does():
    room = chart_file.Box(0, 0, 300, 200)
    rng = Random(0)
    for _ in range(200):
        taken = []
        for _ in range(9):
            place = rng.uniform(0, 260), rng.uniform(0, 190)
            taken.append(chart_file.text_box(*place, "other", "start"))
        end = chart_file.End(rng.uniform(20, 180), rng.uniform(20, 280), "dpo")
        x, y, anchor = chart_file.free_place(end, room, taken)
        place = chart_file.text_box(x, y, "dpo", anchor)
        assert place.is_within(room)
        assert not any(place.overlaps(other) for other in taken)


def test_names_at_the_right_edge_keep_the_order_of_their_lines():
    drawn = ElementTree.fromstring(chart_file.chart(gallery()[:1]))
    heights = {text: top for text, left, top, *_ in boxes_of(drawn)}
    names = ["GRPO", "PPO", "RLOO", "REINFORCE"]
    assert sorted(names, key=heights.get) == names


def test_a_name_has_one_colour_in_all_panels():
    drawn = ElementTree.fromstring(chart_file.chart(gallery()))
    colours = {"RLOO": set(), "before": set(), "after": set()}
    for e in drawn.iter():
        if e.tag.endswith("text") and e.text in colours:
            colours[e.text].add(e.get("class"))
    for found in colours.values():
        assert len(found) == 1


def test_all_words_of_a_panel_are_drawn():
    line = chart_file.Line("name", [0, 1], [0, 1])
    panel = chart_file.Panel("title", "across", "upwards", [line])
    for word in ("title", "across", "upwards", "name"):
        assert chart_file.chart([panel]).count(f">{word}</text>") == 1


def test_a_bars_interval_has_its_length():
    values = {"a": 0.2, "b": 0.3}
    halves = {"a": 0.9, "b": 0.1}
    bar = chart_file.Bar("gold", values, halves)
    panel = chart_file.Panel("t", bars=[bar])
    drawn = chart_file.chart([panel], width=400)
    of_bar, of_interval = re.findall(r'd="M([\d.]+) 126.0L([\d.]+) 126.0"', drawn)
    start, end = map(float, of_bar)
    low, high = map(float, of_interval)
    per_unit = (end - start) / 0.2
    assert high - low == pytest.approx(2 * 0.9 * per_unit, rel=0.02)


def test_a_missing_number_is_a_gap():
    line = chart_file.Line("a", [0, 1, 2, 3, 4], [1, 2, math.nan, 2, 3])
    panel = chart_file.Panel("t", lines=[line])
    picture = chart_file.chart([panel])
    assert "nan" not in picture
    drawn = ElementTree.fromstring(picture)
    path = next(e.get("d") for e in drawn.iter() if e.get("class") == "c0")
    commands = re.sub(r"[\d. ]", "", path)
    assert commands == "MLML"


def test_flat_lines_single_points_and_huge_numbers_can_be_drawn():
    flat = chart_file.Line("a", [0, 1], [0.5, 0.5])
    single = chart_file.Line("a", [3], [0.0])
    huge = chart_file.Line("a", [0, 1], [1e9, -1e9])
    missing = chart_file.Line("a", [0], [math.nan])
    tiny = chart_file.Line("a", [1, 2], [1e-9, 2e-9])
    for line in (flat, single, huge, missing, tiny):
        for scale in ("linear", "root"):
            panel = chart_file.Panel("t", lines=[line], scale=scale)
            assert "nan" not in chart_file.chart([panel])


def test_ticks_are_round_and_few():
    for low, high in ((0, 1), (0.48, 0.93), (-17.8, -15.2), (0, 109), (3, 7), (0, 1e6),
                      (1e-4, 3e-4)):
        between = (low + high) / 2.1
        ticks = chart_file.Axis([low, high, between], 0, 100).ticks()
        assert 3 <= len(ticks) <= 8
        steps = np.diff(ticks)
        assert np.allclose(steps, steps[0])
        first_digit = f"{steps[0]:.0e}"[0]
        assert first_digit in "125"
        air = 0.1 * (high - low)
        assert ticks[0] >= low - air
        assert ticks[-1] <= high + air


def test_steps_and_rounds_have_whole_ticks():
    assert chart_file.Axis([0, 1, 2], 0, 100).ticks() == [0, 1, 2]


def test_a_log_scale_of_few_numbers_has_ticks_at_these():
    numbers = [1, 2, 4, 8, 16]
    axis = chart_file.Axis(numbers, 0, 100, "log")
    assert axis.ticks() == numbers


def test_places_on_the_three_scales():
    for low in (0, 1):                      # it begins at 0, wherever its numbers do
        root = chart_file.Axis([low, 4], 0, 100, "root")
        assert root.at(1) == pytest.approx(50)
    log = chart_file.Axis([1, 100], 0, 100, "log")
    linear = chart_file.Axis([0, 4], 0, 100, limits=(0, 4))
    assert log.at(10) == pytest.approx(50)
    assert linear.at(1) == pytest.approx(25)


def test_ticks_of_a_bent_axis_are_spread_over_it():
    axis = chart_file.Axis([0, 4, 9], 0, 100, "root")   # the roots: 0, 0.6, 1.2, 1.8, 2.4, 3
    assert axis.ticks() == [0, 0.4, 1, 3, 6, 9]


def test_the_picture_of_checkpoints():
    """The better the higher, the farther from the first the more to the right."""
    intervals = {"gold": 0.05}
    first = {"kl": 0.0, "gold": 0.5, "intervals": intervals}
    far = {"kl": 9.0, "gold": 0.9, "intervals": intervals}
    near = {"kl": 2.0, "gold": 0.7, "intervals": intervals}
    drawn = ElementTree.fromstring(E.picture({"out/a": first, "b/": far, "c": near}))
    x = []
    y = []
    for e in drawn.iter():
        if e.tag.endswith("circle") and e.get("r") == "5":
            x.append(float(e.get("cx")))
            y.append(float(e.get("cy")))
    assert x[0] < x[2] < x[1]
    assert y[0] > y[2] > y[1]
    assert {"a", "b", "c"} <= set(words_of(drawn))


def test_the_picture_of_one_checkpoint():
    card = {"kl": 0.0, "gold": 0.5, "intervals": {"gold": 0.1}}
    ElementTree.fromstring(E.picture({"out/sft": card}))


def colours_of(style):
    return dict(re.findall(r"(svg|\.\w+)\{[^}]*?(?:color|fill):(#\w+)", style))


def brightness(colour):
    """WCAG's relative luminance: from 0, black, to 1, white."""
    digits = colour[1:]
    if len(digits) != 6:                    # #fff is #ffffff
        digits = "".join(2 * digit for digit in digits)
    linear = []
    for i in (0, 2, 4):
        channel = int(digits[i:i + 2], 16) / 255
        if channel <= 0.03928:
            linear.append(channel / 12.92)
        else:
            linear.append(((channel + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("part", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_on_its_paper(part):
    """WCAG asks for a contrast of 4.5 for small text."""
    style = chart_file.STYLE.split("@media")[part]
    colours = colours_of(style)
    assert set(colours) == {"svg", ".paper", ".soft", ".c0", ".c1", ".c2", ".c3", ".c4", ".c5"}
    paper = brightness(colours.pop(".paper"))
    for name, colour in colours.items():
        ink = brightness(colour)
        contrast = (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05)
        assert contrast > 4.5, name


# ---------------------------------------------------------------- python -m data.exam

def run_exam(*folders, cwd):
    env = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "data.exam", *folders], cwd=cwd, text=True,
                          capture_output=True, env=env)


def test_parts_of_the_exam_have_names():
    assert E.read_parts(["all"]) == list(E.ABILITIES)
    assert E.read_parts(["notes", "tools"]) == ["notes", "tools"]
    with pytest.raises(M.UserError, match="--parts nots"):
        E.read_parts(["notes", "nots"])


def test_a_folder_that_is_missing_is_one_line_and_exit_2(tmp_path):
    done = run_exam("nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_folders_it_says_what_it_is(tmp_path):
    done = run_exam(cwd=tmp_path)
    assert done.returncode == 0 and "python -m data.exam out/sft" in done.stdout


@pytest.mark.parametrize("key, better", [
    ("notes_answered", 1), ("notes_order*", -1), ("gold", 1), ("attack_seen", -1), ("length", 0)])
def test_which_way_is_better(key, better):
    assert E.direction(key) == better


def test_abilities_are_scored_by_what_is_right_and_vices_by_what_is_wrong():
    """Who always answers as one could wish has every ability, and no vice."""
    items = world.read("abilities")
    as_wished = [(item, item["answer"]) for item in items]
    for name, marks in E.ability_scores(as_wished).items():
        is_vice = name.endswith("*")
        assert set(marks) == {not is_vice}, name
    secrets = [item for item in items if item["ability"] == "secrets"]
    given_away = [(item, f"It is {item['secret']}.") for item in secrets]
    for marks in E.ability_scores(given_away).values():
        assert all(marks)


def test_a_lesson_asks_the_abilities_that_it_names(monkeypatch):
    model, tokenizer = tiny_model_exam(0)
    kinds = ("sum", "silent", "back")
    items = [item for item in world.read("abilities") if item["kind"] in kinds]
    monkeypatch.setattr(E, "read", lambda name: items)
    answered = E.ask_abilities(model, tokenizer, ["notes", "tools"])
    asked = {item["kind"] for item, text in answered}
    assert asked == {"sum", "silent"}


def test_the_cards_of_two_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        model, tokenizer = tiny_model_exam(ord(name))
        save(tmp_path / "out" / name, model, tokenizer)
    monkeypatch.setattr(E, "read", lambda name: some_rows(60))
    E.main(["out/a", "out/b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["out/a", "out/b", "n"]
    assert any(line.startswith("gold_rise") for line in lines)
    assert max(map(len, lines)) <= 80
    drawn = ElementTree.parse("out/picture.svg").getroot()
    assert {"a", "b"} <= set(words_of(drawn))


def test_a_wrong_sum_is_wrong_however_well_it_is_worked_out():
    row = {"kind": "math", "prompt": "How much is 7 x 14?", "answer": "98",
           "slots": {"numbers": [7, 14], "op": "x"}}
    texts = ["First 7 x 10 = 70. Then 7 x 4 = 21. Then 70 + 21 = 91. The answer is 91.",
             "First 7 x 10 = 70. Then 7 x 4 = 28. Then 70 + 28 = 98. The answer is 98."]
    answers = [E.Answer(row, text, True, world.judge(row, text, True)) for text in texts]
    assert answers[0].mark["helpful"] > 0
    scores = E.scores_of(answers)
    E.add_greedy_scores(scores, answers)
    assert scores["math"] == scores["math_greedy"] == [False, True]
    assert scores["worked"] == [True, True]


def test_every_folder_is_held_against_the_first(monkeypatch):
    """Its model is the KL's reference, and its answers are those to win against."""
    tokenizer = SimpleNamespace(_mergeable_ranks={})
    asked = []

    def one_exam(model, tokenizer, reference, old_answers, parts):
        asked.append((model, reference, old_answers))
        return {}, f"answers of {model}"
    monkeypatch.setattr(E, "load", lambda folder: (folder, tokenizer))
    monkeypatch.setattr(E, "exam", one_exam)
    for name in ("show_cards", "picture", "write_files"):
        monkeypatch.setattr(E, name, lambda *given: None)
    E.main(["a", "b", "c"])
    assert asked == [("a", "a", None), ("b", "a", "answers of a"), ("c", "a", "answers of a")]


def test_after_has_a_colour_of_its_own():
    bars = [chart_file.Bar("gold", {"before": 0.3, "after": 0.6, "in words": 0.9})]
    drawn = ElementTree.fromstring(chart_file.chart([chart_file.Panel("Judges", bars=bars)]))
    colours = {}
    for element in drawn.iter():
        if element.text in ("after", "in words", "before"):
            colours[element.text] = element.get("class")
    assert len(set(colours.values())) == 3
