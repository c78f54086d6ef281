r"""The doors: a line of JSON becomes a conversation, a pair, a judgement. It is checked here, once.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"prompt": "Hi", "completion": "Hello!"}                  a conversation, as above
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}   two answers, the better one first
    {"prompt": "Hi", "completion": "Hello!", "label": true}   a judgement of one answer
    {"prompt": "Hi", "responses": ["Hello!", "Hi.", "Go."]}   a ranking, the best answer first
    {"prompt": "What is 2 + 3?", "answer": 5}                 a prompt, and what is right
    {"prompt": "What is 2 + 3?", "steps": ["2 + 3 = 6."], "labels": [0]}    a solution, by steps

A prompt is a text or a list of messages, and so is an answer. A text can be a conversation in the
style of HH-RLHF, "\n\nHuman: Hi\n\nAssistant: Hello!". A pair can lack its prompt if both answers
begin with it. Whatever else a line holds stays in `row`; `where` says in which line it stands.
"""
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from model import UserError

ROLES = ("system", "user", "assistant", "tool")
AXES = ("helpful", "harmless", "honest")
LONGEST = 500_000            # characters of a text: a million spaces are too many for tiktoken


class Line(NamedTuple):
    where: str               # data/prompts.jsonl:12
    row: dict


class Conversation(NamedTuple):
    messages: list           # {"role", "content"} each; the last one is the assistant's
    row: dict
    where: str


class Prompt(NamedTuple):
    messages: list           # the last one is not the assistant's
    row: dict
    where: str


class Pair(NamedTuple):
    prompt: list             # messages
    chosen: str
    rejected: str
    row: dict
    where: str


class Judgement(NamedTuple):
    prompt: list             # messages
    answer: str
    good: bool
    row: dict
    where: str


class Ranking(NamedTuple):
    prompt: list             # messages
    answers: list            # texts, best first
    row: dict
    where: str


class Solution(NamedTuple):
    prompt: list             # messages
    steps: list              # texts
    labels: list             # 1 for a right step, 0 for a wrong one
    row: dict
    where: str


# ---------------------------------------------------------------- files

def read_text(path):
    """A file's text. Only an ordinary file is opened: a pipe would wait for its writer."""
    if not os.path.isfile(path):
        raise UserError(f'"{path}" is not a file; want one that is neither folder nor pipe')
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file in UTF-8") from None


def parse_json(text, path, line=1):
    """The value of a text that begins in this line of the file."""
    def refuse(constant):
        raise ValueError(f"{constant} is no number")
    try:
        return json.loads(text, parse_constant=refuse)      # left alone, Python reads NaN, too
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: not JSON ({reason})") from None


def read_lines(path, need=()):
    r"""JSON lines -> list of Line. Every row has the fields in `need`. Only \n ends a line."""
    lines = []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        row = must(parse_json(text, path, number), is_object, f"{where}: the line")
        for name in need:
            field(row, name, is_given, where)
        lines.append(Line(where, row))
    if not lines:
        raise UserError(f"{path}: no rows; want lines of JSON")
    return lines


# ---------------------------------------------------------------- checks
# Each asks about one value. Its docstring says what would be right, and so ends the complaint.

def is_given(value):
    """a value, neither null nor empty"""
    return value is not None and value != "" and value != []


def is_text(value):
    """a text: not blank, not above 500,000 characters, no lone surrogates"""
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST:
        return False
    return re.search("[\ud800-\udfff]", value) is None


def is_text_or_number(value):
    """a finite number, or a text that is not blank"""
    return is_text(value) or is_number(value)


def is_text_or_messages(value):
    """a list of messages, or a text: not blank, not above 500,000 characters, no lone surrogates"""
    return is_text(value) or is_list(value)


def is_number(value):
    """a finite number"""
    return type(value) in (int, float) and abs(value) < 1e300


def is_share(value):
    """a number from 0 to 1"""
    return is_number(value) and 0 <= value <= 1


def is_margin(value):
    """a number of at least 0"""
    return is_number(value) and value >= 0


def json_lines(rows):
    """Dicts -> the text of a file that the doors below read"""
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_attack(value):
    """true or false, or a text that is not blank"""
    return isinstance(value, bool) or is_text(value)


def is_label(value):
    """0, 1, true or false"""
    return value in (0, 1)


def is_role(value):
    """system, user, assistant or tool"""
    return value in ROLES


def is_list(value):
    """a list that is not empty"""
    return isinstance(value, list) and len(value) > 0


def is_object(value):
    """an object in braces"""
    return isinstance(value, dict)


def is_marks(value):
    """an object with helpful, harmless and honest, each a number from 0 to 1"""
    return is_object(value) and all(is_share(value.get(axis)) for axis in AXES)


def show(value):
    """A value in a complaint: as it stands in the file, but short."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:40] + "..."


def must(value, check, where):
    """The value, which must be right."""
    if not check(value):
        raise UserError(f"{where} is {show(value)}; want {check.__doc__}")
    return value


def field(row, name, check, where):
    """The value of a field, which must be there."""
    if name not in row:
        raise UserError(f'{where}: "{name}" is missing; want {check.__doc__}')
    return must(row[name], check, f'{where}: "{name}"')


def items(row, name, check, where, count=None):
    """The items of a field, a list, which must all be right, and so many."""
    values = field(row, name, is_list, where)
    if count is not None and len(values) != count:
        raise UserError(f'{where}: "{name}" has {len(values)} items; want {count}')
    for i, value in enumerate(values, start=1):
        must(value, check, f'{where}: item {i} of "{name}"')
    return values


def stands(row, name):
    """Is there anything in a field that can be missing?"""
    return row.get(name) not in (None, "")


# ---------------------------------------------------------------- conversations

def to_messages(prompt, where="the prompt"):
    """A text or a list of messages -> messages, each with a role and a content and nothing else."""
    must(prompt, is_text_or_messages, where)
    if isinstance(prompt, str):
        prompt = from_text(prompt)
    messages = []
    for i, message in enumerate(prompt, start=1):
        place = f"{where}: message {i}"
        must(message, is_object, place)
        role = field(message, "role", is_role, place)
        content = field(message, "content", is_text, place)
        messages.append({"role": role, "content": content})
    return messages


def from_text(text):
    """A text is what a user says, or a conversation in the style of HH-RLHF."""
    if not text.startswith("\n\nHuman:"):
        return [{"role": "user", "content": text}]
    messages = []
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]   # speaker, words, speaker, words, ...
    for speaker, words in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": words.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()                                      # it only asks for the answer
    return messages


def prompt_of(row, where):
    prompt = field(row, "prompt", is_text_or_messages, where)
    messages = to_messages(prompt, f'{where}: "prompt"')
    if "slots" in row:                                      # a prompt of our world
        field(row, "slots", is_object, where)
        field(row, "kind", is_text, where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f'{where}: "prompt" ends with the assistant; want what it is to answer')
    return messages


def answer_of(value, prompt, where):
    """A text, or messages (the answer alone, or the prompt and the answer) -> text"""
    if isinstance(value, str):
        return must(value, is_text, where).strip()
    messages = to_messages(value, where)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} does not end with the assistant; want its answer")
    if len(messages) > 1 and messages[:-1] != prompt:
        raise UserError(f"{where} has a prompt of its own; want the same one, or none")
    return messages[-1]["content"].strip()


# ---------------------------------------------------------------- what a line may hold

def completion(line):
    """A prompt and an answer -> messages, text"""
    where, row = line
    prompt = prompt_of(row, where)
    name = "response" if "response" in row else "completion"
    answer = field(row, name, is_text_or_messages, where)
    return prompt, answer_of(answer, prompt, f'{where}: "{name}"')


def as_pair(line):
    where, row = line
    chosen = field(row, "chosen", is_text_or_messages, where)
    rejected = field(row, "rejected", is_text_or_messages, where)
    if "prompt" in row:
        prompt = prompt_of(row, where)
    else:
        prompt, chosen, rejected = split(chosen, rejected, where)
    chosen = answer_of(chosen, prompt, f'{where}: "chosen"')
    rejected = answer_of(rejected, prompt, f'{where}: "rejected"')
    check_answers([chosen, rejected], row, where)
    return Pair(prompt, chosen, rejected, row, where)


def split(chosen, rejected, where):
    """A pair without a prompt -> prompt, chosen, rejected. Messages share all but the last one,
    texts all up to the last "Assistant:" in both, since answers can begin alike, too."""
    prompt = None
    if isinstance(chosen, list):
        prompt = chosen[:-1]
    elif isinstance(rejected, str):
        shared = os.path.commonprefix([chosen, rejected])
        prompt, mark, _ = shared.rpartition("\n\nAssistant:")
        chosen = chosen[len(prompt + mark):]
        rejected = rejected[len(prompt + mark):]
        if "\n\nHuman:" in chosen + rejected:
            raise UserError(f"{where}: chosen and rejected have different prompts; want one")
    if not prompt:
        raise UserError(f'{where}: "prompt" is missing; want one, here or before both answers')
    return prompt_of({"prompt": prompt}, where), chosen, rejected


def check_answers(answers, row, where):
    """Equal answers teach nothing. Marks and gold (the truth) say something about each answer."""
    if len(set(answers)) < len(answers):
        raise UserError(f"{where}: two answers are the same; want different ones")
    if stands(row, "margin"):
        field(row, "margin", is_margin, where)
    if stands(row, "marks"):
        items(row, "marks", is_marks, where, len(answers))
    if stands(row, "gold"):
        items(row, "gold", is_share, where, len(answers))


def as_conversation(line):
    where, row = line
    if "messages" in row:
        messages = to_messages(row["messages"], f'{where}: "messages"')
        if messages[-1]["role"] != "assistant":
            raise UserError(f'{where}: "messages" does not end with the assistant; want its answer')
        return Conversation(messages, row, where)
    if "chosen" in row:
        prompt, answer = as_pair(line)[:2]
    else:
        prompt, answer = completion(line)
    return Conversation(prompt + [{"role": "assistant", "content": answer}], row, where)


def as_judgements(line):
    """An answer with a label is one judgement; a pair is two."""
    where, row = line
    if "chosen" in row:
        prompt, chosen, rejected = as_pair(line)[:3]
        good = Judgement(prompt, chosen, True, row, where)
        return [good, Judgement(prompt, rejected, False, row, where)]
    prompt, answer = completion(line)
    label = field(row, "label", is_label, where)
    return [Judgement(prompt, answer, bool(label), row, where)]


def as_ranking(line):
    """A pair is the shortest ranking."""
    where, row = line
    if "chosen" in row:
        prompt, *answers = as_pair(line)[:3]
        return Ranking(prompt, answers, row, where)
    prompt = prompt_of(row, where)
    answers = []
    for i, response in enumerate(items(row, "responses", is_text_or_messages, where), start=1):
        answers.append(answer_of(response, prompt, f'{where}: item {i} of "responses"'))
    if len(answers) == 1:
        raise UserError(f'{where}: "responses" has 1 item; want at least 2')
    check_answers(answers, row, where)
    return Ranking(prompt, answers, row, where)


def as_prompt(line):
    """Beside its prompt a row can name its kind, its kind of attack, and the right answer."""
    where, row = line
    if stands(row, "kind"):
        field(row, "kind", is_text, where)
    if stands(row, "attack"):
        field(row, "attack", is_attack, where)
    if stands(row, "answer"):
        field(row, "answer", is_text_or_number, where)
    return Prompt(prompt_of(row, where), row, where)


def as_solution(line):
    where, row = line
    steps = items(row, "steps", is_text, where)
    steps = [step.strip() for step in steps]
    labels = items(row, "labels", is_label, where, len(steps))
    labels = [int(label) for label in labels]
    return Solution(as_prompt(line).messages, steps, labels, row, where)


# ---------------------------------------------------------------- what a file may hold

def read_conversations(path):
    return [as_conversation(line) for line in read_lines(path)]


def read_pairs(path):
    return [as_pair(line) for line in read_lines(path)]


def read_judgements(path):
    everything = []
    for line in read_lines(path):
        everything += as_judgements(line)
    return everything


def read_rankings(path):
    return [as_ranking(line) for line in read_lines(path)]


def read_prompts(path, need=()):
    return [as_prompt(line) for line in read_lines(path, need)]


def read_solutions(path):
    return [as_solution(line) for line in read_lines(path)]


def read_constitution(path):
    """A JSON list of principles -> list of {"id", "principle"}"""
    rules = must(parse_json(read_text(path), path), is_list, f"{path}:1: the file")
    for i, rule in enumerate(rules, start=1):
        where = f"{path}: principle {i}"
        must(rule, is_object, where)
        field(rule, "id", is_text, where)
        field(rule, "principle", is_text, where)
        if len(rule) > 2:
            raise UserError(f'{where} has other fields; want "id" and "principle" alone')
    if len({rule["id"] for rule in rules}) < len(rules):
        raise UserError(f"{path}: two principles have the same id; want one each")
    return rules
