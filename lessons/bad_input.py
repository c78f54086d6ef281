r"""Bad input: what does a script say to a typo, a broken file, a number that is none?

A good answer is one line that names what is wrong, within seconds, and nothing is written:

    $ python dpo.py --data mine.jsonl
    error: mine.jsonl:3: "rejected" is 5; want a list of messages, or a text: not blank, ...

A traceback sends a reader to code that is not theirs to mend. An input that is taken in silence
costs more: an hour later the numbers are wrong. So this program makes bad inputs by rule: every
flag times what no flag may be, every field of every line of JSON, every number of config.json,
files that are folders, pipes or garbage, checkpoints of which one part is missing.

    python -m lessons.bad_input               all of them, in one process; and 40 as programs
    python -m lessons.bad_input dpo.py 16     of one script, the case of this number alone
    python -m lessons.bad_input --kill 100    saving, killed 100 times; full disks, closed pipes

Most are tried in this process, with a tiny untrained model: a script's train() runs until it has
read all that it was given. What gets that far was accepted.
"""
import builtins
import contextlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import cai
import dpo
import grpo
import model
import ppo
import reward_model
import sft
from data import base, exam
from data.checkpoints import load, load_ranks, save
from data.run import exit_codes, main as run_main
from lessons import kto, process_reward
from model import ModelConfig, ScalarModel, Transformer, UserError

HERE = Path(__file__).parent.parent
SECONDS = 10                 # that a complaint may take
FOLDER, PIPE = "a folder", "a pipe"         # instead of a file's bytes

# a script, and what it calls first once it has read all that it was given
SCRIPTS = {"sft.py": (sft, "evaluate"), "reward_model.py": (reward_model, "show_comparison"),
           "ppo.py": (ppo, "evaluate"), "grpo.py": (grpo, "sample_groups"),
           "dpo.py": (dpo, "show_pair"), "cai.py": (cai, "own_answers"),
           "data.base": (base, "held_out_loss"), "lessons.kto": (kto, "evaluate"),
           "lessons.process_reward": (process_reward, "evaluate"), "data.exam": (exam, "exam"),
           "model.py": (model, "respond")}


class Case(NamedTuple):
    group: str               # a line of the table
    script: str
    what: str                # in words
    named: str               # what the complaint must name: a pattern
    flags: list
    files: dict              # {name in the folder where it runs: bytes, FOLDER or PIPE}


# in no answer of one token is there room for an end: seen only once the model has answered
LATE = Case("late", "cai.py", "--max-new 1", "--max-new", ["--max-new", "1"], {})


class Accepted(Exception):
    """The script has read all that it was given, and found nothing wrong."""


# ---------------------------------------------------------------- good input, to be broken

def chat(text):
    return [{"role": "user", "content": text}]


SAID = chat("Hi") + [{"role": "assistant", "content": "Hello."}]
PROMPT = {"prompt": "Hi"}
PAIR = PROMPT | {"chosen": "Hello.", "rejected": "Go."}
MARKS = {"helpful": 1, "harmless": 1, "honest": 0.5}

# script, flags, a good line, and the fields of it that are broken one by one
FORMS = [
    ("sft.py", [], {"messages": SAID}, ["messages"]),
    ("sft.py", [], PROMPT | {"completion": "Hello."}, ["prompt", "completion"]),
    ("dpo.py", [], PAIR | {"margin": 1}, ["prompt", "chosen", "rejected", "margin"]),
    ("reward_model.py", [], PAIR | {"margin": 1}, ["prompt", "chosen", "rejected", "margin"]),
    ("reward_model.py", ["--kind", "ranked"], PROMPT | {"responses": ["Hello.", "Hi.", "Go."]},
     ["prompt", "responses"]),
    ("reward_model.py", ["--kind", "multi"], PAIR | {"marks": [MARKS, MARKS]}, ["marks"]),
    ("ppo.py", [], PROMPT | {"kind": "math"}, ["prompt", "kind"]),
    ("grpo.py", [], PROMPT | {"answer": 5}, ["prompt", "answer"]),
    ("cai.py", [], PROMPT | {"attack": "x"}, ["prompt", "attack"]),
    ("lessons.kto", [], PROMPT | {"completion": "Hello.", "label": True}, ["prompt", "label"]),
    ("lessons.process_reward", [], PROMPT | {"steps": ["2 + 3 = 5.", "So it is 5."],
                                             "labels": [1, 0]}, ["prompt", "steps", "labels"]),
]

# ---------------------------------------------------------------- what no field may be

NUMBERS = [5, -1, 0.5, True, False, math.nan, math.inf, 10**400]
STRANGE = ["", " \n", "\u2028\u0085 ", "half \ud83d", " " * 10**6, "x" * 10**6]
LISTS = [[], ["x"], [None], [[]], [{}], [5], [SAID], {}, {"0": "x"}]
MESSAGES = [[{"role": "user"}], [{"content": "x"}], [{"role": "teacher", "content": "x"}]]
for bad in [None, 5, True, [], {}, ""]:
    MESSAGES.append([{"role": bad, "content": "x"}])
    MESSAGES.append([{"role": "user", "content": bad}])
NO_TEXT = [None, *NUMBERS, *STRANGE, *LISTS, *MESSAGES]

BAD = {
    "prompt": NO_TEXT + [SAID], "messages": ["Hi", chat("Hi"), SAID + [5], *NO_TEXT],
    "completion": NO_TEXT + [chat("Hi"), chat("Ho") + SAID[1:]],
    "chosen": NO_TEXT + ["Go.", chat("Hi")], "rejected": NO_TEXT + ["Hello.", " Hello. "],
    "margin": [-1, True, False, math.nan, math.inf, 10**400, "1", "x", " ", *LISTS],
    "marks": [5, 0.5, True, "x", *LISTS, [MARKS], [MARKS] * 3, [MARKS, MARKS | {"honest": 9}],
              [MARKS, {"helpful": 1}], [MARKS, MARKS | {"honest": None}],
              [MARKS, MARKS | {"honest": True}], [MARKS, MARKS | {"harmless": math.nan}]],
    "responses": [None, *NUMBERS, "Hello.", *STRANGE, *LISTS, ["Hello."], ["a.", "a."],
                  ["a.", 5, "c."], ["a.", "", "c."], ["a.", "b."]],
    "kind": [5, True, math.nan, " ", "half \ud83d", *LISTS],
    "attack": [5, 0.5, math.nan, " ", "half \ud83d", *LISTS],
    "answer": [None, "", True, False, math.nan, math.inf, 10**400, " ", "half \ud83d",
               "no number", *LISTS],
    "label": [None, 5, -1, 0.5, math.nan, "", "true", "x", *LISTS],
    "labels": [None, 1, "10", "", *LISTS, [1], [1, 0, 1], [1, 2], [1, -1], [0.5, 1],
               [1, math.nan], [1, "x"], [1, None], [[1], [0]]],
    "steps": [None, *NUMBERS, "2 + 3 = 5. So it is 5.", *LISTS, ["x", 5], ["x", ""], ["x", None]],
    "config.json": [-1, 0, 1.5, 7, "x", "", True, [], {}, math.nan, 10**400, 2**40],
}

BAD_LINES = ["5", "true", "null", '"text"', "[]", "[{}]", "NaN", "{", "}", '{"prompt": }', "\ufffe",
             "{}", '{"prompt": NaN}', '{"prompt": "x", "y": -Infinity}', '{"prompt": "tab\there"}',
             "{'prompt': 'x'}", "[" * 100_000, "1" * 5000, "{}\u2028{}", "{}\u0085{}", "x" * 10**6,
             '{"prompt": "a"} {"prompt": "b"}', "prompt,chosen,rejected", "\x00", "\u00a0\ufeff{}"]
LINE = json.dumps(PAIR).encode() + b"\n"
BAD_FILES = {"no bytes": b"", "a mark and nothing": b"\xef\xbb\xbf", "blank": b" \r\n\n\t\n",
             "a megabyte of spaces": b" " * 10**6, "UTF-16": LINE.decode().encode("utf-16"),
             "Latin-1": LINE + b'{"prompt": "caf\xe9"}\n', "zeros": bytes(1000),
             "garbage": random.Random(0).randbytes(1000), "one list": b"[" + LINE + b"]",
             "cut off": LINE + LINE[:20], FOLDER: FOLDER, PIPE: PIPE}

BAD_FLAGS = {
    float: ["nan", "inf", "-inf", "1e400", "-1", "text", "", "1,5", "0x1"],
    int: ["nan", "inf", "1e30", str(2**64), "-1", "1.5", "text", "", " ", "1e3"],
    bool: ["=yes", "=1", "=false", "="],
}
BAD_TEXTS = {
    "data": ["nowhere.jsonl", "folder", "pipe", "", "/dev/zero"],
    "init": ["nowhere", "data.jsonl", "pipe", "folder", ""],
    "out": ["", "data.jsonl", "data.jsonl/below", "x" * 300, "/proc/out", "pipe"],
    "device": ["", "text", "meta", "cuda:99", "cpu:x", "mps"],
}
BAD_TEXTS["constitution"] = BAD_TEXTS["data"]
BAD_TEXTS["critic"] = BAD_TEXTS["init"]
BAD_TEXTS["seeds"] = ["text", "0 1 x", "-1", "0,1", "1.5"]
BAD_TEXTS["reward"] = [*BAD_TEXTS["init"], "JUDGE_OF_THREE"]
OF_TABLES = ["text", "", " ", "DPO", "0"]

RULE = {"id": "kind", "principle": "Be kind."}
CONSTITUTIONS = [5, None, True, "x", [], {}, RULE, [5], [None], [[]], [{}], [RULE, {"id": "b"}],
                 [RULE, {"principle": "b"}], [RULE, RULE], [RULE | {"x": 1}]]
for bad in [None, *NUMBERS, *STRANGE, [], {}, ["x"]]:
    CONSTITUTIONS.append([RULE, {"id": "b", "principle": bad}])
    CONSTITUTIONS.append([RULE, {"id": bad, "principle": "b"}])


# ---------------------------------------------------------------- the cases

def good_file(line):
    """Twelve lines, so that some can be held out."""
    lines = []
    for i in range(12):
        row = dict(line)
        if "prompt" in row:
            row["prompt"] = f"{row['prompt']} {i}"
        if "attack" in row and i % 2:
            del row["attack"]
        if "label" in row and i % 2:
            row["label"] = False
        lines.append(json.dumps(row))
    return lines


def with_line(line, bad):
    """A bad line in the third place of a good file."""
    lines = good_file(line)
    lines[2] = bad
    return "\n".join(lines).encode()


def text_cases():
    """Each field of each kind of line, times what it may not be; then lines and files."""
    for script, flags, line, names in FORMS:
        for name in names:
            for value in BAD[name]:
                data = with_line(line, json.dumps(line | {name: value}))
                yield Case("fields", script, f"{name} is {short(value)}",
                           rf"data\.jsonl:3.*({name}|answers|labels|not JSON)", flags,
                           {"data.jsonl": data})
            missing = {key: value for key, value in line.items() if key != name}
            if name not in ("margin", "kind", "attack"):
                yield Case("fields", script, f"{name} is missing", r"data\.jsonl:3.*missing", flags,
                           {"data.jsonl": with_line(line, json.dumps(missing))})
        for where in ("prompt", "completion", "chosen", "messages"):
            if where in line:
                words = json.dumps(line | {where: "word " * 2000})
                if where == "messages":
                    words = json.dumps({"messages": chat("word " * 2000) + SAID[1:]})
                yield Case("fields", script, f"{where} is too long for the model",
                           r"data\.jsonl:3", flags, {"data.jsonl": with_line(line, words)})
    for script in dict.fromkeys(form[0] for form in FORMS):
        flags, line = [form[1:3] for form in FORMS if form[0] == script][0]
        for bad in BAD_LINES:
            data = with_line(line, bad).replace(b"\\udc", b"")
            yield Case("lines", script, short(bad), r"data\.jsonl:3", flags, {"data.jsonl": data})
        for what, data in BAD_FILES.items():
            yield Case("files", script, what, r"data\.jsonl", flags, {"data.jsonl": data})
        one = good_file(line)[0].encode()
        yield Case("files", script, "one line", r"data\.jsonl|--data|--held", flags,
                   {"data.jsonl": one})
    for rules in CONSTITUTIONS:
        yield Case("constitutions", "cai.py", short(rules), r"rules\.json",
                   ["--constitution", "rules.json"], {"rules.json": json.dumps(rules).encode()})
    for what, data in BAD_FILES.items():
        yield Case("constitutions", "cai.py", what, r"rules\.json",
                   ["--constitution", "rules.json"], {"rules.json": data})
        if what != "zeros":                 # which are text, if an odd one
            yield Case("files", "data.base", what, r"mine\.txt|--data", ["--data", "mine.txt"],
                       {"mine.txt": data})


def flag_cases():
    """Each flag of each script, times what it may not be."""
    for script, (module, seam) in SCRIPTS.items():
        if not hasattr(module, "Config"):
            continue
        for field in fields(module.Config):
            flag = "--" + field.name.replace("_", "-")
            for value in bad_values(module.Config, field):
                flags = [flag, value]
                if field.type is bool:
                    flags = [flag + value]
                named = f"{flag}|{re.escape(value)}" if value else flag
                yield Case("flags", script, f"{flag} {short(value)}", named, flags,
                           {"folder": FOLDER, "pipe": PIPE})
            if field.type is not bool:
                yield Case("flags", script, f"{flag} alone", flag, [flag], {})
        for flags in (["--nosuch", "1"], ["--see", "3"], ["file"], ["-x"], ["--no-steps"]):
            yield Case("flags", script, " ".join(flags), re.escape(flags[0]), flags, {})


def bad_values(Config, field):
    least, most = Config.limits.get(field.name, (0, math.inf))
    values = list(BAD_FLAGS.get(field.type, BAD_TEXTS.get(field.name, OF_TABLES)))
    if field.type in (int, float) and least > 0:
        values.append("0")
    if field.type in (int, float) and most < math.inf:
        values.append(str(10 * most + 1))
    if Config is base.Config and field.name in ("init", "data"):
        values.remove("")                   # there it means: from the start, of the world's web
    return values


def folder_cases(good):
    """A checkpoint with one number wrong, or one file, for whoever reads it."""
    readers = [("sft.py", ["--init", "m"]), ("ppo.py", ["--reward", "m"]), ("data.exam", ["m"]),
               ("model.py", ["m"]), ("data.base", ["--init", "m"])]
    config = json.loads(good["config.json"])
    numbers = [name for name, value in config.items() if type(value) in (int, float)]
    numbers = [name for name in numbers if not name.endswith("token_id")]
    for i, name in enumerate(numbers + ["model_type", "tie_word_embeddings"]):
        for j, value in enumerate(BAD["config.json"]):
            if fits(name, value):
                continue
            script, flags = readers[(i + j) % len(readers)]
            changed = config | {name: value}
            if name == "rope_theta":        # what is nested goes before what stands at the top
                changed["rope_parameters"] = config["rope_parameters"] | {name: value}
            files = good | {"config.json": json.dumps(changed).encode()}
            yield Case("checkpoints", script, f"{name} is {short(value)}", r"\bm\b",
                       flags, inside("m", files))
    for name, content in good.items():
        broken = {"missing": None, "half": content[:len(content) // 2], **BAD_FILES}
        for what, data in broken.items():
            if name == "tokenizer_config.json" and what not in ("garbage", "Latin-1", FOLDER, PIPE):
                continue                    # it is only handed on
            for script, flags in readers[:4]:
                files = {key: value for key, value in good.items() if key != name}
                if data is not None:
                    files[name] = data
                yield Case("checkpoints", script, f"{name}: {what}", r"\bm\b", flags,
                           inside("m", files))


def fits(name, value):
    """Some numbers can be otherwise, and the network is the same."""
    if name == "max_position_embeddings":
        return value in (7, 2**40, 10**400)
    if name == "rope_theta":
        return value in (1.5, 7, 2**40)
    if name == "tie_word_embeddings":
        return value is True
    return name == "rms_norm_eps" and value == 0


def inside(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


def short(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return ascii(text[:40])[1:-1] + ("..." if len(text) > 40 else "")


def all_cases(home):
    """-> list of Case, in the same order every time"""
    good = {path.name: path.read_bytes() for path in sorted((home / "init").iterdir())}
    return [*flag_cases(), *text_cases(), *folder_cases(good)]


# ---------------------------------------------------------------- trying one

def make_models(home):
    """A tiny language model, a tiny judge, and one of three heads."""
    tokenizer = load_ranks()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16}
    transformer = Transformer(ModelConfig(tokenizer.n_vocab, **sizes))
    save(home / "init", transformer, tokenizer)
    save(home / "JUDGE", ScalarModel(transformer), tokenizer)
    save(home / "JUDGE_OF_THREE", ScalarModel(transformer, 3), tokenizer)


def prepare(case, home, folder):
    """Writes the files of a case. -> the arguments of its script"""
    flags = []
    files = case.files
    module = SCRIPTS[case.script][0]
    if hasattr(module, "Config"):
        good = [form[2] for form in FORMS if form[0] == case.script] or [PROMPT]
        data = "\n".join(good_file(good[-1])).encode()
        if module is base:
            data = data.replace(b"\n", b"\n\n")
        files = {"data.jsonl": data, **case.files}
        flags = ["--init", f"{home}/init", "--data", "data.jsonl", "--out", "out", "--steps", "1"]
    if module is ppo:
        flags += ["--reward", f"{home}/JUDGE"]
    if module is process_reward:
        flags += ["--critic", f"{home}/init"]
    if module is cai:
        flags += ["--constitution", f"{HERE}/data/constitution.json"]
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is FOLDER:
            path.mkdir()
        elif content is PIPE:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
    for flag in case.flags:
        flags.append(f"{home}/{flag}" if flag == "JUDGE_OF_THREE" else flag)
    return flags


def contents(folder):
    """What lies there, and since when."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path)] = (state.st_size, state.st_mtime_ns if path.is_file() else 0)
    return found


def call(script, arguments):
    """What `python script arguments` does, up to where all is read."""
    module, seam = SCRIPTS[script]

    def accept(*anything, **settings):
        raise Accepted

    def ask(question):
        return "Hi"
    if module is model:
        module.load = load
    changes = [(module, seam, accept), (exam, "exam", accept), (builtins, "input", ask),
               (sys, "argv", [script, *arguments])]
    before = [getattr(where, name) for where, name, new in changes]
    for where, name, new in changes:
        setattr(where, name, new)
    try:
        if hasattr(module, "Config"):
            run_main(module.Config, module.train, module.__doc__)
        else:
            with exit_codes():
                (model.chat if module is model else exam.main)(arguments)
    finally:
        for (where, name, new), old in zip(changes, before):
            setattr(where, name, old)


def ring(number, frame):
    raise TimeoutError("it hangs")


def try_here(case, home):
    """-> {what went wrong: detail}, empty if all is well"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = prepare(case, home, folder)
        there = contents(folder)
        errors = io.StringIO()
        started = time.process_time()
        code = 0
        faults = {}
        was = os.getcwd()
        os.chdir(folder)
        signal.signal(signal.SIGALRM, ring)
        signal.alarm(10 * SECONDS)          # by the clock, as a pipe takes no processor time
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                call(case.script, arguments)
        except SystemExit as error:
            code = error.code
        except Accepted:
            faults["accepted"] = "in silence"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults["traceback"] = f"{type(error).__name__}: {error} ({place.name})"
        finally:
            signal.alarm(0)
            os.chdir(was)
        seconds = time.process_time() - started
        faults |= judge(case, code, errors.getvalue(), seconds, contents(folder) != there, faults)
    return faults


def children_seconds():
    """Processor time of all programs that have ended: a busy machine makes nobody slow."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def try_as_program(case, home):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = script_of(case.script) + prepare(case, home, folder)
        there = contents(folder)
        started = children_seconds()
        try:
            done = subprocess.run(program, cwd=folder, env=environment(), capture_output=True,
                                  input="Hi\n\n", text=True, timeout=30 * SECONDS)
        except subprocess.TimeoutExpired:
            return {"accepted": "or hangs"}
        seconds = children_seconds() - started
        faults = {}
        if "Traceback" in done.stderr:
            faults["traceback"] = done.stderr.strip().split("\n")[-1]
        wrote = contents(folder) != there
        return faults | judge(case, done.returncode, done.stderr, seconds, wrote, faults)


def script_of(script):
    """-> the beginning of a command"""
    if script.endswith(".py"):
        return [sys.executable, str(HERE / script)]
    return [sys.executable, "-m", script]


def environment():
    return os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1",
                         "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": ""}


def judge(case, code, errors, seconds, wrote, faults):
    """-> {what went wrong: detail}"""
    found = {}
    if seconds > SECONDS:
        found["slow"] = f"{seconds:.0f} s"
    if wrote:
        found["wrote"] = "something"
    if faults:
        return found
    if code != 2:
        found["exit code"] = str(code)
    if errors.count("\n") != 1 or len(errors) > 500:
        found["not one line"] = short(errors)
    elif not re.search(case.named, errors):
        found["unnamed"] = errors.strip()
    return found


# ---------------------------------------------------------------- the table

FAULTS = ("traceback", "accepted", "slow", "wrote", "exit code", "not one line", "unnamed")


def show_table(results):
    """results: {group: list of (number, case, faults)}"""
    print(f"\n{'':14}{'tried':>6}" + "".join(f"{name:>{len(name) + 2}}" for name in FAULTS))
    for group, tried in results.items():
        line = f"{group:14}{len(tried):6}"
        for name in FAULTS:
            count = sum(name in faults for i, case, faults in tried)
            line += f"{count:>{len(name) + 2}}"
        print(line)
    for group, tried in results.items():
        for i, case, faults in tried:
            for name, detail in faults.items():
                print(f"{name.upper()} {i} {case.script} {case.what} ({group})\n    {detail[:200]}")


def progress(done, count, bad):
    if sys.stdout.isatty() or done % 200 == 0 or done == count:
        end = "" if sys.stdout.isatty() else "\n"
        print(f"\r{done:5} of {count} tried, {bad} with a fault ", end=end, flush=True)


def try_all(words, programs=40):
    """-> exit code"""
    started = time.time()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        make_models(home)
        cases = list(enumerate(all_cases(home)))
        late = [(len(cases), LATE)] if not words else []
        numbers = [int(word) for word in words if word.isdigit()]
        scripts = [word for word in words if not word.isdigit()]
        cases = [(i, case) for i, case in cases if not scripts or case.script in scripts]
        cases = [(i, case) for i, case in cases if not numbers or i in numbers]
        bad = 0
        for done, (i, case) in enumerate(cases, start=1):
            faults = try_here(case, home)
            bad += bool(faults)
            results.setdefault(case.group, []).append((i, case, faults))
            progress(done, len(cases), bad)
        for i, case in late + random.Random(0).sample(cases, min(programs, len(cases))):
            faults = try_as_program(case, home)
            bad += bool(faults)
            results.setdefault("as programs", []).append((i, case, faults))
    show_table(results)
    tried = sum(map(len, results.values()))
    verdict = "PASS" if bad == 0 else "FAIL"
    print(f"\n{verdict} {tried - bad} of {tried} bad inputs end in one line, "
          f"in {time.time() - started:.0f} s")
    return int(bad > 0)


# ---------------------------------------------------------------- what runs meet on the way

def save_again_and_again(folder, home):
    """A child that ends run after run in one folder. All weights of a run are one number, which
    also stands in its results. -> its process id"""
    transformer, tokenizer = load(home / "init")
    config = exam_config(folder)
    child = os.fork()           # tensors this small run in one thread, which fork allows
    if child != 0:
        return child
    try:
        os.setpgid(0, 0)
        while True:
            number = random.random()
            for p in transformer.parameters():
                p.data.fill_(number)
            rows = [{"step": step, "loss": number} for step in range(20)]
            save(folder, transformer, tokenizer)
            exam.finish("sft", config, 0.0, SimpleNamespace(rows=rows), {}, {"gold": number}, [])
    finally:
        os._exit(1)             # nothing of the parent's is to run in here


def exam_config(folder):
    return sft.Config(out=str(folder), quiet=True)


def is_whole(folder):
    """Does it load, as one model and not parts of two? Are the other files whole?"""
    try:
        transformer, tokenizer = load(folder)
        if len({p.flatten()[i].item() for p in transformer.parameters() for i in (0, -1)}) > 1:
            return False
        json.loads((folder / "results.json").read_text())
    except (UserError, OSError, ValueError):
        return False
    rows = (folder / "metrics.csv").read_text()
    drawing = (folder / "run.svg").read_text().rstrip()
    return rows.count("\n") == 21 and drawing.endswith("</svg>")


def wait_for(path, seconds=60):
    end = time.time() + seconds
    while not path.exists() and time.time() < end:
        time.sleep(0.001)


def kill_one(folder, home, lots):
    """-> did it happen while a file was half written? is the folder whole?"""
    child = save_again_and_again(folder, home)
    wait_for(folder / "run.svg")            # of this run or of the one before
    time.sleep(lots.uniform(0.005, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    halves = list(folder.glob("*.tmp"))
    for path in halves:
        path.unlink()
    return len(halves) > 0, is_whole(folder)


def try_kills(count, home):
    lots = random.Random(0)
    between = 0
    broken = 0
    for _ in range(count):
        is_half, whole = kill_one(home / "killed", home, lots)
        between += is_half
        broken += not whole
    print(f"killed while saving    {count} times, {between} of them with a file half written: "
          f"{broken} broken")
    return broken


def try_two_runs(home, seconds=3):
    """Two runs save into one folder, and a third one reads it."""
    folder = home / "shared"
    children = [save_again_and_again(folder, home) for _ in range(2)]
    wait_for(folder / "run.svg")
    end = time.time() + seconds
    broken, reads = 0, 0
    while time.time() < end:
        reads += 1
        broken += not is_whole(folder)
    dead = [os.waitpid(child, os.WNOHANG) != (0, 0) for child in children]
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for child, is_dead in zip(children, dead):
        if not is_dead:
            os.waitpid(child, 0)
    print(f"two runs, one folder   read {reads} times: {broken} broken, {sum(dead)} runs died")
    return broken + sum(dead)


@contextlib.contextmanager
def mounted(folder, options):
    """A small disk of its own, where this user may mount one. -> may they?"""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        yes = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        yes = False
    try:
        yield yes
    finally:
        if yes:
            subprocess.run(["umount", str(folder)], check=True)


def small_files():
    """Where no disk can be mounted: no file above 50 kB, which fails like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def show_run(what, arguments, home, want, preexec_fn=None):
    """A whole run of sft.py on twelve lines. -> 1 if it ends otherwise than it should"""
    lines = good_file(FORMS[1][2])
    (home / "data.jsonl").write_text("\n".join(lines))
    program = [*script_of("sft.py"), "--init", str(home / "init"), "--data", "data.jsonl",
               "--steps", "2", *arguments]
    done = subprocess.run(program, cwd=home, env=environment(), capture_output=True, text=True,
                          timeout=300, preexec_fn=preexec_fn)
    fine = done.returncode == 2 and done.stderr.count("\n") == 1 and want in done.stderr
    print(f"{what:23}exit {done.returncode}, {done.stderr.strip() or 'nothing said'}"
          f"{'' if fine else '   WRONG'}")
    return int(not fine)


def try_disks(home):
    wrong = 0
    (home / "file").write_text("")
    wrong += show_run("--out is a file", ["--out", "file"], home, "--out file")
    with mounted(home / "read_only", "ro") as yes:
        if not yes:
            (home / "read_only").chmod(0o555)
        if yes or not os.access(home / "read_only", os.W_OK):
            wrong += show_run("a read-only folder", ["--out", "read_only/run"], home, "--out")
        else:
            print("a read-only folder     not tried: this user may write anywhere")
    with mounted(home / "full", "size=100k") as yes:
        cap = None if yes else small_files
        wrong += show_run("a full disk", ["--out", "full/run"], home, "full/run: cannot be", cap)
        left = list((home / "full").rglob("*.tmp"))
        wrong += len(left)
    return wrong


def try_closed_pipes(home):
    """python sft.py | head -3: who reads no more has seen enough, and that is no error."""
    wrong = 0
    sft_run = [*script_of("sft.py"), "--init", str(home / "init"), "--data", "data.jsonl",
               "--steps", "2", "--out", "piped"]
    for shown, program in {"sft.py": sft_run, "sft.py --help": [*sft_run, "--help"]}.items():
        first = subprocess.Popen(program, cwd=home, env=environment(), stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
        first.stdout.close()                # before the first line is there
        errors = first.stderr.read()
        first.wait()
        said = errors.strip() or "nothing said"
        print(f"{shown + ' | head':23}exit {first.returncode}, {said}")
        wrong += errors != ""
    return wrong


def try_accidents(count):
    """-> exit code"""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        make_models(home)
        wrong = try_kills(count, home)
        wrong += try_two_runs(home)
        wrong += try_disks(home)
        wrong += try_closed_pipes(home)
    print(f"{'PASS' if wrong == 0 else 'FAIL'} {wrong} accidents end badly")
    return int(wrong > 0)


def main(arguments):
    if arguments[:1] == ["--kill"] and len(arguments) == 2 and arguments[1].isdigit():
        return try_accidents(int(arguments[1]))
    known = [word for word in arguments if word in SCRIPTS or word.isdigit()]
    if arguments != known:
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    return try_all(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
