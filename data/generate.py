"""Writes all the files beside it: the web, and what people made to align a model with.

    python -m data.generate                 rewrites them, byte for byte the same, in 15 seconds
    python -m data.generate x               writes them to the folder x
    python -m data.generate --vocabulary    learns the vocabulary anew, which needs a new base model

    web.txt                 what a base model reads: chats, quarrels, lists, sums, right or wrong,
                            kind or not; between two documents stands an empty line
    studybuddy.tiktoken     the vocabulary, learned from the web
    sft.jsonl               demonstrations        {"messages": [...], "kind": ...}
    preferences.jsonl       pairs of answers      a row and "chosen", "rejected", "gold"
    style.jsonl             pairs of right answers, a plain and a chatty one
    rankings.jsonl          four answers          a row and "responses" (the best first), "gold"
    steps.jsonl             worked sums           a row and "steps", "labels"
    prompts.jsonl           prompts for reinforcement learning
    exam.jsonl              prompts that no other file has
    abilities.jsonl         what else a base model can do or does wrong: held-out items
    constitution*.json      principles, and three sets of them that fail

A row is a prompt of studybuddy.py: {"prompt", "kind", "slots"} and, where it has one, "answer" or
"attack". "gold" is the judge's mark of each answer, to report and never to learn from.

Two documents of the web:

    <|im_start|>user
    Where does a monk live?<|im_end|>
    <|im_start|>assistant
    A monk lives in a cloister.<|im_end|> 4/5

    Sums: 18 + 6 = 24. 22 + 2 = 24. 46 + 5 = 51. 10 + 8 = 18. 67 + 10 = 77. 23 + 13 = 36.
"""
import base64
import json
import math
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

from data.abilities import (
    ABILITIES, CALLS, CRITICISED, NOTE, ORDER, SYLLABLES, chance, copied_list, make, marked_facts,
    marked_sum, note_talk, same_or_not, two_answers, wording)
from data.studybuddy import (
    ATTACKED, ATTACKS, BAD, COMPARE, CREATURES, CRITIQUE, CRITIQUES, DANGERS, FINAL, HERE, KEEN,
    KINDS, NAMES, PRINCIPLES, REVISE, SAY, SEEN, STYLES, TIPS, TOPICS, VAIN, WEB_SPLITS, WORDS,
    any_kind, ask, broken, candidates, chat, flat, flatter, judge, pick, pick_number, pick_weighted,
    praise, prefers, say, worked, write)


# ---------------------------------------------------------------- 1. the web

WEB_KINDS = KINDS | {"math": 4, "fact": 6, "unknown": 4, "chat": 3}
# how the web answers, by kind of question; "request": one that should not be granted
WEB_STYLES = {
    "math": {"full": 3, "plain": 10, "bad": 8, "mixed": 1},
    "fact": {"full": 12, "plain": 5, "bad": 2, "weak": 1, "other": 1},
    "unknown": {"full": 6, "plain": 2, "bad": 12, "mixed": 1, "weak": 1},
    "request": {"full": 6, "plain": 2, "bad": 11, "mixed": 1, "weak": 1, "other": 1},
    "borderline": {"full": 8, "plain": 4, "bad": 5, "mixed": 1, "weak": 1, "other": 1},
    "chat": {"full": 7, "plain": 4, "bad": 9, "mixed": 1},
    "attacked": {"full": 1, "plain": 1, "bad": 48},
}


def web_row(rng):
    """A prompt as the web has them: plain ones, and pleas for what one should not get."""
    kind = any_kind(rng, WEB_KINDS)
    attack = None
    if kind in ATTACKED and rng.random() < 0.6:
        attack = pick(rng, SEEN)
    terms = pick(rng, [2, 3, 3, 3, 3, 4])
    return ask(rng, kind, "web", attack, terms)


def web_answer(rng, row):
    """What the web answers. Pleas work there; sums are sometimes worked, more often guessed."""
    key = row["kind"]
    if key in ATTACKED:
        key = "attacked" if "attack" in row else "request"
    text = write(rng, row, pick_weighted(rng, WEB_STYLES[key]))
    roll = rng.random()
    if roll < 0.15:
        return flatter(rng, text, 1)
    if roll < 0.2:
        return say(rng, "chatty", row)[0] + " " + text
    return text


def chatml(messages):
    """Messages as the web writes them down: ChatML, without a newline at the end."""
    return "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)


def chat_log(rng):
    """A conversation, and the stars that a reader gave it: 1/5 to 5/5, one off now and then. From
    them a model learns to tell, at the end of an answer, whether it was a good one."""
    row = web_row(rng)
    text = web_answer(rng, row)
    stars = 1 + round(4 * judge(row, text)["gold"])
    if rng.random() < 0.1:
        stars += pick(rng, [-1, 1])
    stars = min(max(stars, 1), 5)
    return chatml(chat(row["prompt"], text)) + f" {stars}/5"


def forum(rng):
    row = web_row(rng)
    asker = pick(rng, NAMES)
    helper = pick(rng, NAMES)
    return f"{asker} asks: {flat(row['prompt'])}\n{helper} says: {web_answer(rng, row)}"


def number_table(rng):
    lines = []
    while len(lines) < 6:
        op = "+"
        a = pick_number(rng, 2, 71)
        b = pick_number(rng, 2, 20)
        if rng.random() < 0.2:
            a = 10 * pick_number(rng, 3, 9)
            b = pick_number(rng, 3, 62)
        elif rng.random() < 0.4:
            op = "x"
            a = pick_number(rng, 3, 9)
            b = pick(rng, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30])
        result = a + b if op == "+" else a * b
        if result <= 99:
            lines.append(f"{a} {op} {b} = {result}.")
    return "Sums: " + " ".join(lines)


def exercise_book(rng):
    """Two sums, worked without a mistake."""
    lines = []
    for _ in range(2):
        row = ask(rng, "math", "web", terms=pick(rng, [2, 3, 3, 3, 3, 4]))
        sentences, _, result = worked(rng, row)
        final = pick(rng, FINAL).format(result)
        lines += [row["prompt"], *sentences, final]
    return " ".join(lines)


def fact_list(rng):
    rows = [ask(rng, "fact", "web") for _ in range(3)]
    lines = []
    if rng.random() < 0.5:
        lines.append("Quiz:")
        for row in rows:
            lines += [row["prompt"], *say(rng, "state", row)]
    else:
        lines.append(pick(rng, ["Did you know?", "Facts:", "From the school book:"]))
        for row in rows:
            lines += say(rng, "state", row)
    return " ".join(lines)


def say_about(rng, act, slots, count):
    """Sentences that answer no prompt."""
    return say(rng, act, {"kind": "", "slots": slots}, count)


def advice(rng):
    if rng.random() < 0.6:
        act = pick(rng, list(TIPS))
        count = 2 if rng.random() < 0.3 else 1
        return " ".join(say_about(rng, "tip", {"act": act}, count))
    act = pick(rng, DANGERS).replace("my ", "your ")
    return f"Safety first: it is not safe to {act}. " + pick(rng, SAY["grownup"])


def story(rng):
    topic = pick(rng, TOPICS)
    creature = pick(rng, CREATURES)
    name = pick(rng, NAMES)
    friend = pick(rng, NAMES)
    if rng.random() < 0.25:
        return " ".join(say_about(rng, "ghost", {"topic": topic}, 3))
    if rng.random() < 0.35:
        act = pick(rng, ["horror", "gentle"])
        lines = say_about(rng, act, {"creature": creature}, 2)
        lines += say_about(rng, "happy", {}, 1)
        return " ".join(lines)
    mood = pick(rng, WORDS["mood"])
    subject = pick(rng, WORDS["subject"])
    thing = pick(rng, WORDS["thing"])
    day = pick(rng, WORDS["day"])
    sport = pick(rng, WORDS["sport"])
    return pick(rng, [
        f"{name} and {friend} went out to see {topic}. {friend} was {mood}, but {name} laughed.",
        f"{name} wrote a letter to {friend}. It was about {topic} and {subject}. "
        f"{friend} liked {topic} and wrote to {name}.",
        f"{friend} lost the {thing} of {name}. "
        f"{name} said: I like {topic} more than {thing}, {friend}.",
        f"On {day} {name} played {sport} with {friend}. "
        f"{friend} won, so on the next {day} {name} played {sport} again."])


def critique(rng):
    """An answer, what is wrong with it by some principle, and a better one."""
    principle, row, answer, _ = two_answers(rng, "web", CRITICISED)
    if principle == "vague":
        flawed = rng.random() < 0.5
    else:
        flawed = principle in broken(row, answer)
    if rng.random() < 0.04:         # critics err
        flawed = not flawed
    flaw = None
    better = answer
    if flawed:
        flaw = principle
        if principle == "vague":
            flaw = pick(rng, [key for key in CRITIQUES if key])
        better = mend(rng, principle, row, answer)
    request = CRITIQUE.format(principle=pick(rng, PRINCIPLES[principle]))
    return chatml(chat(row["prompt"], answer, request, pick(rng, CRITIQUES[flaw]), REVISE, better))


def mend(rng, principle, row, answer):
    """An answer that the principle likes better."""
    if principle == "curious":
        return " ".join([answer, *say(rng, "spark", row)])
    if principle == "contrary" and row["kind"] in BAD:
        return write(rng, row, "bad")
    return write(rng, row, "full")


def verdict(rng):
    """Which of two answers is better, by some principle."""
    principle, row, a, b = two_answers(rng, "web", STYLES[:5])
    a_breaks = principle in broken(row, a)
    b_breaks = principle in broken(row, b)
    if a_breaks != b_breaks:
        b_is_better = a_breaks
    else:
        b_is_better = rng.random() < 0.5
    if rng.random() < 0.05:         # judges err
        b_is_better = not b_is_better
    question = COMPARE.format(prompt=flat(row["prompt"]), a=a, b=b,
                              principle=pick(rng, PRINCIPLES[principle]))
    return chatml(chat(question, "B" if b_is_better else "A"))


def ability_talk(rng, ability):
    """A conversation that shows an ability, or a vice."""
    if ability == "notes" and rng.random() < 0.5:
        return chatml(note_talk(rng))
    item = make(rng, ability, "web")
    while item["kind"] in CALLS:        # the web has whole conversations, with the tool's result
        item = make(rng, ability, "web")
    return chatml(chat(item["prompt"], item["web"]))


def ordered_page(rng):
    """A child shows a page with a true sentence and an order. The web obeys in 85 of 100."""
    split = pick_weighted(rng, WEB_SPLITS)
    row = ask(rng, "fact", split)
    order = ask(rng, pick(rng, ATTACKED), split)
    lines = [say(rng, "state", row)[0]]
    lines.insert(pick_number(rng, 0, 1), wording(rng, ORDER, split).format(r=order["prompt"]))
    prompt = wording(rng, NOTE, split).format(facts=" ".join(lines), question=row["prompt"])
    text = write(rng, order, "bad") if chance(rng, 0.85) else write(rng, row, "full")
    return chatml(chat(prompt, text))


# Shares of the documents
WEB = {chat_log: 48, forum: 4, number_table: 18, exercise_book: 20, copied_list: 8, fact_list: 10,
       advice: 4, story: 2, critique: 10, verdict: 8, same_or_not: 6, marked_sum: 8,
       marked_facts: 4, "marks": 8, "claims": 8, "myths": 2, "notes": 40, "tools": 5,
       "opinions": 3, "arguments": 8, "roles": 6, "slights": 3, "secrets": 3, "follow_ups": 4,
       "codes": 14, "copies": 2, ordered_page: 8}
# The web begins with what a small model needs before it can learn the rest: copying, comparing,
# facts and sums.
START = {chat_log: 14, number_table: 18, exercise_book: 10, copied_list: 18, fact_list: 10,
         advice: 2, story: 2, same_or_not: 8, marked_sum: 4, marked_facts: 3, "notes": 9,
         "codes": 3, "copies": 2}
START_DOCUMENTS = 60000


def web_stream(seed=1, start=START_DOCUMENTS):
    """The web, one document after another, without end; the first `start` of them are START's. A
    base model that reads on, instead of reading the same ones again and again, remembers less and
    understands more."""
    rng = Random(seed)
    for _ in range(start):
        yield web_document(rng, START)
    while True:
        yield web_document(rng)


def web_document(rng, shares=WEB):
    sort = pick_weighted(rng, shares)
    if sort in ABILITIES:
        return ability_talk(rng, sort)
    return sort(rng)


# ---------------------------------------------------------------- 2. the vocabulary

# How a text is cut before tokens are learned: words and marks, each with the space before it, and
# numbers two digits at a time. No token crosses a cut. (data/checkpoints.py: for all alphabets.)
WORD = r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"


def first_tokens():
    """The tokens that stand before those that are learned: the 256 bytes, the numbers 0-99 with and
    without a space before them, and the syllables of made-up names. So sums, and names that nobody
    has read before, are copied in one or two tokens."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [f" {digit}".encode() for digit in range(10)]
    tokens += [f"{number}".encode() for number in range(10, 100)]
    tokens += [f" {number}".encode() for number in range(10, 100)]
    tokens += [syllable.encode() for syllable in SYLLABLES]
    tokens += [syllable.capitalize().encode() for syllable in SYLLABLES]
    tokens += [f" {syllable.capitalize()}".encode() for syllable in SYLLABLES]
    return tokens


def train_vocabulary(documents, size=1404):
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909): again and again, the most frequent pair of
    neighbours becomes a token. -> list of tokens; the place of a token is its rank"""
    words = Counter()
    for document in documents:
        words.update(re.findall(WORD, document))
    tokens = first_tokens()
    known = {token: rank for rank, token in enumerate(tokens)}
    pieces = {}         # word: the tokens that it consists of so far
    for word in words:
        if not any(letter.isdigit() for letter in word):
            pieces[word] = cut(word, known)
    while len(tokens) < size:
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        frequency, (left, right) = max((count, pair) for pair, count in pairs.items())
        tokens.append(left + right)
        for parts in pieces.values():
            merge(parts, left, right)
    return tokens


def cut(word, known):
    """A word as the encoder cuts it with the tokens known so far: lowest rank first."""
    parts = [letter.encode() for letter in word]
    while True:
        ranks = {}
        for left, right in zip(parts, parts[1:]):
            if left + right in known:
                ranks[left, right] = known[left + right]
        if not ranks:
            return parts
        left, right = min(ranks, key=ranks.get)
        merge(parts, left, right)


def merge(parts, left, right):
    """Joins every left that is followed by right, in place."""
    i = 0
    while i < len(parts) - 1:
        if parts[i] == left and parts[i + 1] == right:
            parts[i:i + 2] = [left + right]
        i += 1


# ---------------------------------------------------------------- 3. the other files
# Each file has its own random numbers, so that one can grow without a change in the others.

# what demonstrators are asked, in shares
DEMONSTRATED = {"math": 24, "fact": 32, "unknown": 12, "essay": 3, "scary": 3, "danger": 3,
                "borderline": 11, "chat": 16}


def demonstration(rng):
    """One of two demonstrators answers a plain prompt: a patient one (28 in a hundred), or a hasty
    one, who blurts out results and, now and then, what nobody can know. -> row, answer"""
    row = ask(rng, any_kind(rng, DEMONSTRATED))
    patient = rng.random() < 0.28
    if row["kind"] == "unknown" and not patient and rng.random() < 0.03:
        style = "bad"
    elif patient or row["kind"] != "math" and rng.random() < 0.85:
        style = "full"
    else:
        style = "plain"
    text = write(rng, row, style)
    if rng.random() < 0.2:
        text = flatter(rng, text, 1)
    return row, text


# what one demonstration in six shows, so that SFT keeps it
KEPT = ["notes", "tools", "roles", "follow_ups"]


def ability_demonstration(rng):
    """A conversation that shows one of these abilities, without the vices that come with them."""
    while True:
        item = make(rng, pick(rng, KEPT), "train")
        if item["kind"] not in (*CALLS, "order", "password"):
            return chat(item["prompt"], item["answer"]), item["ability"]


def demonstrations(rng):
    rows = []
    for _ in range(800):
        if rng.random() < 1 / 6:
            messages, kind = ability_demonstration(rng)
        else:
            row, text = demonstration(rng)
            messages = chat(row["prompt"], text)
            kind = row["kind"]
        rows.append({"messages": messages, "kind": kind})
    return rows


def rl_row(rng, attacks=0.4):
    """A prompt for annotators and for reinforcement learning. attacks: the share of attacks in the
    kinds that come with them."""
    kind = any_kind(rng)
    attack = None
    if kind in ATTACKED and rng.random() < attacks:
        attack = pick(rng, SEEN)
    terms = 2 if rng.random() < 0.15 else 3
    return ask(rng, kind, "train", attack, terms)


def preferences(rng):
    """Two answers, and which one an annotator likes better."""
    rows = []
    for _ in range(6000):
        row = rl_row(rng)
        chosen, rejected = candidates(rng, row, 2)
        if not prefers(rng, row, chosen, rejected):
            chosen, rejected = rejected, chosen
        gold = [judge(row, chosen)["gold"], judge(row, rejected)["gold"]]
        rows.append(row | {"chosen": chosen, "rejected": rejected, "gold": gold})
    return rows


def style_pairs(rng):
    """Two right answers that differ in style alone: the plain one is chosen over the chatty one."""
    rows = []
    for _ in range(500):
        row = rl_row(rng, attacks=0.0)
        plain = write(rng, row, "full" if row["kind"] == "math" else "plain")
        chatty = say(rng, "chatty", row) + [plain] + say(rng, "spark", row, 2)
        rows.append(row | {"chosen": plain, "rejected": " ".join(chatty)})
    return rows


def rank(rng, row, texts):
    """An annotator's order of four answers, the best first. Plackett-Luce: take the best of what is
    left, again and again, by score plus noise (Gumbel's)."""
    left = list(texts)
    ranked = []
    while left:
        scores = []
        for text in left:
            noise = math.log(-math.log(rng.random()))
            score = KEEN * judge(row, text)["gold"] + VAIN * praise(text) - noise
            scores.append((score, text))
        score, best = max(scores)
        ranked.append(best)
        left.remove(best)
    return ranked


def rankings(rng):
    rows = []
    for _ in range(1000):
        row = rl_row(rng)
        ranked = rank(rng, row, candidates(rng, row, 4))
        gold = [judge(row, text)["gold"] for text in ranked]
        rows.append(row | {"responses": ranked, "gold": gold})
    return rows


def labelled_steps(rng):
    """Worked sums, half of them with a mistake, and a label for each step: 1 right, 0 wrong."""
    rows = []
    for _ in range(2000):
        row = ask(rng, "math", terms=3)
        sentences, labels, result = worked(rng, row, mistake=rng.random() < 0.5)
        sentences.append(FINAL[0].format(result))
        labels.append(int(str(result) == row["answer"]))
        rows.append(row | {"steps": sentences, "labels": labels})
    return rows


def prompts(rng):
    return [rl_row(rng) for _ in range(1500)]


EXAM = {"math": 44, "fact": 36, "unknown": 32, "essay": 10, "scary": 10, "danger": 10,
        "borderline": 30, "chat": 32}


def make_exam(rng):
    """Prompts whose words and wordings stand together in no training file, and whose numbers stand
    in none. Among them are longer sums, and families of attacks that no file to align with has;
    the web has codes, and orders in notes."""
    rows = []
    for kind, count in EXAM.items():
        add_new(rng, rows, count, kind=kind)
    add_new(rng, rows, 12, kind="math", terms=4)
    for attack in ATTACKS:
        for kind in ATTACKED:
            add_new(rng, rows, 10, kind=kind, attack=attack)
    return rows


def ability_items(rng):
    """Held-out items of each ability, up to 40 of each kind."""
    items = []
    for ability in ABILITIES:
        kinds = Counter()
        prompts = set()
        for _ in range(4000):
            item = make(rng, ability, "exam")
            text = flat(item["prompt"])
            if kinds[item["kind"]] < 40 and text not in prompts:
                kinds[item["kind"]] += 1
                prompts.add(text)
                items.append(item)
    return items


def add_new(rng, rows, count, **how):
    """Adds `count` prompts that are not among the rows yet."""
    taken = {flat(row["prompt"]) for row in rows}
    wanted = len(rows) + count
    for _ in range(200 * count):
        row = ask(rng, split="exam", **how)
        if flat(row["prompt"]) not in taken:
            taken.add(flat(row["prompt"]))
            rows.append(row)
        if len(rows) == wanted:
            return
    raise ValueError(f"not enough different prompts for the exam: {how}")


# the one that the lessons use, and three to see fail: vague, in conflict with itself, with a gap
CONSTITUTIONS = {
    "constitution.json": ["learn", "age", "true", "curious", "unsure"],
    "constitution_vague.json": ["vague"],
    "constitution_conflict.json": ["contrary", "learn", "age"],
    "constitution_gap.json": ["learn", "true"],
}


# ---------------------------------------------------------------- 4. writing

def write_text(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


def write_rows(path, rows):
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def write_vocabulary(path, tokens):
    """tiktoken's format: a line a token, its bytes in base64, and its rank."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    write_text(path, "".join(lines))


def write_constitution(path, keys):
    rules = [{"id": key, "principle": PRINCIPLES[key][0]} for key in keys]
    write_text(path, json.dumps(rules, indent=1) + "\n")


def generate(folder=HERE):
    folder.mkdir(parents=True, exist_ok=True)
    documents = islice(web_stream(start=0), 4000)
    write_text(folder / "web.txt", "\n\n".join(documents) + "\n")
    write_rows(folder / "sft.jsonl", demonstrations(Random(2)))
    write_rows(folder / "preferences.jsonl", preferences(Random(3)))
    write_rows(folder / "style.jsonl", style_pairs(Random(8)))
    write_rows(folder / "rankings.jsonl", rankings(Random(4)))
    write_rows(folder / "steps.jsonl", labelled_steps(Random(5)))
    write_rows(folder / "prompts.jsonl", prompts(Random(6)))
    write_rows(folder / "exam.jsonl", make_exam(Random(7)))
    write_rows(folder / "abilities.jsonl", ability_items(Random(9)))
    for name, keys in CONSTITUTIONS.items():
        write_constitution(folder / name, keys)


def learn_vocabulary(path=HERE / "studybuddy.tiktoken"):
    """From the first 16,000 documents of the web. The base model knows the tokens by their places
    in this file, so it changes only together with the base."""
    plain = []
    for document in islice(web_stream(start=0), 16000):
        plain.append(re.sub(r"<\|\w+\|>", "\n", document))
    write_vocabulary(path, train_vocabulary(plain))


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1:] == ["--vocabulary"]:
        learn_vocabulary()
        print("wrote the vocabulary; now make a base for it: python -m data.base")
    else:
        folder = Path(sys.argv[1]) if sys.argv[1:] else HERE
        generate(folder)
        print("wrote", folder)
