"""Be an annotator: two answers, one vote, and what the votes say about you.

    python -m lessons.annotate              a page for your browser; keys 1 2 0 u q
    python reward_model.py --data out/annotate/preferences.jsonl --out out/mine      learn from it
    python -m lessons.annotate --curve      how many pairs does a judge need?

The answers stand in random places, and some pairs come a second time, the other way round. When you
stop, a report says how you voted:

    with yourself      on the pairs that came twice
    with annotators    the simulated ones whose votes are in the file; are you closer to them than
                       they are to one another?
    long, flattering   which of two answers did you take, and which was better in truth?

    kappa = (agreement - chance) / (1 - chance)                 Cohen 1960

By hand: two people agree on 8 of 10 pairs. Both say "left" half of the time, so luck alone gives
0.5, and kappa is (0.8 - 0.5) / 0.5 = 0.6.

The page is served on 127.0.0.1 alone. Every vote is on disk before the next pair is shown, in
votes.jsonl, and Ctrl-C loses nothing: the same command goes on where you stopped.

Simplified: one annotator and no guidelines; real teams write pages of them, and revise them weekly.
Try next: annotate 40 pairs tired, and 40 rested (--out out/tired); --data with answers of your own.
"""
import hmac
import json
import os
import secrets
import sys
import threading
import zlib
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import NamedTuple

import reward_model
from data import exam, rows, studybuddy
from data.chart import Panel, chart
from data.checkpoints import write_files
from data.run import begin, main, need
from lessons import figures
from model import UserError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config(figures.Lesson):
    data: str = "data/preferences.jsonl"  # JSON lines with "prompt", "chosen" and "rejected"
    out: str = "out/annotate"  # write here; what is there is gone on with
    pairs: int = 60           # so many; after ten, every fifth shows an earlier one again
    port: int = 8000          # of the page (0: any that is free)
    curve: bool = False       # gold order against the number of pairs, and no page
    steps: int = 150          # of each judge of the curve; fewer where pairs are few

    limits = figures.Lesson.limits | {"pairs": (1, 10**6), "port": (0, 65535)}


# ---------------------------------------------------------------- what the votes say

# kappa = (agreement - chance) / (1 - chance)
def kappa(first, second):
    """Two lists of what two people said of the same things"""
    n = len(first)
    if n == 0:
        return float("nan")
    agreement = sum(a == b for a, b in zip(first, second)) / n
    chance = 0.0
    for label in set(first):
        chance += first.count(label) / n * second.count(label) / n
    return 1.0 if chance == 1 else (agreement - chance) / (1 - chance)


class Vote(NamedTuple):
    pair: int                # its number in the file
    flipped: bool            # "chosen" was on the right
    vote: int                # 1 left, 2 right, 0 equal

    def picked(self):
        """1: what the annotators had chosen, 2: the other one, 0: neither"""
        if self.flipped and self.vote != 0:
            return 3 - self.vote            # the other side: 1 for 2, 2 for 1
        return self.vote                    # 0, neither, is neither on both sides


def twice(votes):
    """-> what was said of the same pairs at first, and the second time"""
    first, second = [], []
    seen = {}
    for vote in votes:
        if vote.pair in seen:
            first.append(seen[vote.pair])
            second.append(vote.picked())
        seen.setdefault(vote.pair, vote.picked())
    return first, second


def liking(votes, pairs, amount):
    """Where two answers differ in some amount, how often was it the one with more? And how often
    was that one better in truth? -> shares, n"""
    taken, better = [], []
    for vote in votes:
        pair = pairs[vote.pair]
        more = amount(pair.chosen) - amount(pair.rejected)
        if more != 0 and vote.vote != 0:
            taken.append((more > 0) == (vote.picked() == 1))
            if exam.knows([pair.row]):
                worth = [studybuddy.judge(pair.row, text)["gold"]
                         for text in (pair.chosen, pair.rejected)]
                if worth[0] != worth[1]:
                    better.append((more > 0) == (worth[0] > worth[1]))
    return {"share": exam.mean(taken), "truth": exam.mean(better), "n": len(taken)}


def words_in(text):
    return len(text.split())


def annotators_kappa(votes, pairs, seed=0):
    """How far two simulated annotators agree, by left and right as you see the pairs, asked ten
    times each."""
    rng = Random(seed)
    first, second = [], []
    for vote in votes:
        pair = pairs[vote.pair]
        if exam.knows([pair.row]):
            for said in [first, second] * 10:   # ten votes of each of two annotators on this pair
                prefers = studybuddy.prefers(rng, pair.row, pair.chosen, pair.rejected)
                said.append(prefers != vote.flipped)            # True: the left one
    return kappa(first, second)


def summary(votes, pairs):
    """-> the numbers of the report"""
    first, second = twice(votes)
    clear = [vote for vote in votes if vote.vote != 0]
    said = [vote.vote for vote in clear]
    theirs = [2 if vote.flipped else 1 for vote in clear]       # where their choice stood
    return {"votes": len(votes), "ties": len(votes) - len(clear), "twice": len(first),
            "with_yourself": kappa(first, second), "with_annotators": kappa(said, theirs),
            "annotators": annotators_kappa(clear, pairs),
            "left": exam.mean([vote == 1 for vote in said]),
            "longer": liking(votes, pairs, words_in),
            "flattering": liking(votes, pairs, studybuddy.praise)}


def report(votes, pairs, folder):
    numbers = summary(votes, pairs)
    lines = [f"{numbers['votes']} votes, {numbers['ties']} of them ties; in {folder}", "",
             f"kappa with yourself        {numbers['with_yourself']:5.2f}   on {numbers['twice']} "
             "pairs that came twice",
             f"kappa with the annotators  {numbers['with_annotators']:5.2f}   among themselves "
             f"{numbers['annotators']:.2f}", "",
             f"took the left one          {numbers['left']:5.2f}   of the votes that are no ties"]
    for name in "longer", "flattering":
        one = numbers[name]
        lines.append(f"took the {name:17} {one['share']:5.2f}   of {one['n']} votes; in truth it "
                     f"was better in {one['truth']:.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- votes, on disk

class Session:
    """The pairs to show, and the votes. A vote is a line of votes.jsonl, and so is an undo: lines
    are only ever added. preferences.jsonl is what follows from them."""

    def __init__(self, config):
        self.pairs = rows.read_pairs(config.data)
        self.folder = Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.order = order_of(len(self.pairs), config)
        self.votes = []
        self.stopped = False
        self.file = self.folder / "votes.jsonl"
        if self.file.exists():
            for line in rows.read_lines(self.file):
                if not self.is_next(line.row):
                    raise UserError(f"{line.where}: a vote on another pair (another --data, --seed "
                                    "or --pairs?); give another --out")
                self.take(line.row)

    def is_next(self, line):
        """Can this line have been written after those before it?"""
        if "undo" in line:
            return len(self.votes) > 0
        return len(self.votes) < len(self.order) and line == self.line(line.get("vote"))

    def line(self, vote):
        """A vote on the pair that comes next, as it stands in the file; with a number made of what
        was shown, in case that --data becomes another file."""
        pair, flipped = self.order[len(self.votes)]
        shown = self.pairs[pair].chosen + "\n" + self.pairs[pair].rejected
        return {"pair": pair, "flipped": flipped, "vote": vote, "text": zlib.crc32(shown.encode())}

    def take(self, line):
        if "undo" in line:
            self.votes.pop()
        else:
            self.votes.append(Vote(line["pair"], line["flipped"], line["vote"]))

    def write(self, line):
        """Into the file, and on the disk, before anything else happens."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.take(line)
        write_files(self.folder, {"preferences.jsonl": self.preferences()})

    def vote(self, place, vote):
        """A vote on the pair that is on the screen; on any other it is a key pressed twice."""
        if place == len(self.votes) < len(self.order):
            self.write(self.line(vote))

    def undo(self):
        if self.votes:
            self.write({"undo": True})

    def preferences(self):
        """What reward_model.py and dpo.py learn from: each pair's last vote, and no ties."""
        lines = ""
        for vote in {vote.pair: vote for vote in self.votes}.values():
            pair = self.pairs[vote.pair]
            winner, loser = pair.chosen, pair.rejected
            if vote.picked() == 2:
                winner, loser = loser, winner
            row = pair.row | {"prompt": pair.prompt, "chosen": winner, "rejected": loser}
            row.pop("gold", None)           # it has the marks in the old order
            if vote.picked() != 0:
                lines += json.dumps(row) + "\n"
        return lines

    def state(self):
        """What the page has to know."""
        place = len(self.votes)
        state = {"place": place, "total": len(self.order)}
        if self.stopped or place == len(self.order):
            return state | {"report": report(self.votes, self.pairs, self.folder)}
        number, flipped = self.order[place]
        pair = self.pairs[number]
        left, right = pair.chosen, pair.rejected
        if flipped:
            left, right = right, left
        return state | {"prompt": pair.prompt, "left": left, "right": right}


def order_of(count, config):
    """-> [(pair, flipped)]: random pairs in random places. One in five comes again, ten pairs
    later, the other way round."""
    rng = Random(config.seed)
    order = []
    for i, pair in enumerate(rng.sample(range(count), min(config.pairs, count))):
        order.append((pair, rng.random() < 0.5))
        if i >= 10 and i % 5 == 0:
            again, flipped = order[-11]
            order.append((again, not flipped))
    return order


# ---------------------------------------------------------------- the page

class Handler(BaseHTTPRequestHandler):
    """Answers this computer's own browser. Another page that is open in it may send requests, too,
    or have its own name point to 127.0.0.1; so it is checked for whom a request is (Host), which
    page it comes from (Origin), and that it carries the token that only our page was given."""

    def do_GET(self):
        if self.path != "/" or not self.is_for_us():
            return self.reply(404, "text/plain", "not here")
        nonce = secrets.token_urlsafe(16)
        page = (HERE / "annotate.html").read_text(encoding="utf-8")
        page = page.replace("TOKEN", self.server.token).replace("NONCE", nonce)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                  "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'")
        self.reply(200, "text/html; charset=utf-8", page, policy)

    def do_POST(self):
        try:
            size = int(self.headers.get("Content-Length", "-"))
            if not self.is_allowed() or not 0 <= size <= 1000:
                return self.answer(403, {"error": "not allowed"})
            wish = json.loads(self.rfile.read(size))
            with self.server.lock:
                self.act(wish)
                state = self.server.session.state()
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.answer(400, {"error": "not understood"})
        self.answer(200, state)
        if "report" in state:
            threading.Thread(target=self.server.shutdown).start()

    def is_for_us(self):
        port = self.server.server_port
        return self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")

    def is_allowed(self):
        ours = "http://" + self.headers.get("Host", "")
        token = self.headers.get("X-Token", "").encode()
        return (self.is_for_us() and self.headers.get("Origin") == ours
                and self.headers.get("Content-Type") == "application/json"
                and hmac.compare_digest(token, self.server.token.encode()))

    def act(self, wish):
        session = self.server.session
        if self.path == "/vote":
            if wish["vote"] not in (0, 1, 2) or type(wish["vote"]) is not int:
                raise ValueError("want 0, 1 or 2")
            session.vote(wish["place"], wish["vote"])
        elif self.path == "/undo":
            session.undo()
        elif self.path == "/stop":
            session.stopped = True
        elif self.path != "/pair":
            raise ValueError("not here")

    def answer(self, code, state):
        self.reply(code, "application/json", json.dumps(state))

    def reply(self, code, kind, text, policy="default-src 'none'"):
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing: the page shows how far one is."""


def serve(session, port):
    """-> a server that is ready for serve_forever()"""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; try another, or 0") from None
    server.daemon_threads = True
    server.session = session
    server.token = secrets.token_urlsafe(24)
    server.lock = threading.Lock()          # one vote at a time
    return server


def train(config):
    """Nothing is trained here: the name is that of all programs."""
    begin(config)
    session = Session(config)
    if len(session.votes) == len(session.order):
        config.say(f"{session.file} has a vote on every pair; for more, give another --out")
    else:
        server = serve(session, config.port)
        config.say(f"{len(session.votes)} of {len(session.order)} pairs have a vote. Open\n\n"
                   f"    http://127.0.0.1:{server.server_port}/\n\nStop there with q, or here with "
                   "Ctrl-C.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            config.say()
        server.server_close()
    config.say(report(session.votes, session.pairs, session.folder))
    data = f"{session.folder}/preferences.jsonl"
    config.say(f"\nwhat learns from it: python reward_model.py --data {data} --out out/mine")
    return {"numbers": summary(session.votes, session.pairs)}


# ---------------------------------------------------------------- how many pairs?

def curve(config):
    """Judges that learn from more and more pairs, asked the same held-out ones."""
    begin(config)
    need(config.init)
    lines = rows.read_text(config.data).splitlines(keepends=True)
    Random(config.seed).shuffle(lines)
    numbers = {"pairs": [], "gold_order": [], "accuracy": []}
    config.say("   pairs  gold order   agrees with annotators")
    for share in (1 / 24, 1 / 12, 1 / 6, 1 / 3, 1):
        count = round(share * len(lines))
        path = f"{config.out}/some.jsonl"
        write_files(config.out, {"some.jsonl": "".join(lines[:count])})
        # 32 pairs a step: so few pairs are gone through some five times, and all 6,000 once
        steps = min(config.steps, max(1, count // 8))
        settings = reward_model.Config(init=config.init, data=path, steps=steps, seed=config.seed,
                                       device=config.device, save=False, quiet=True)
        if config.quick:
            settings = replace(settings, steps=2)
        judge = reward_model.train(settings)
        everything = replace(settings, data=config.data)        # its held-out prompts are those of
        _, held = reward_model.read_comparisons(                # every part of it, too
            everything, judge["tokenizer"], judge["model"].config.max_len)
        r = reward_model.all_scores(judge["model"], held, judge["tokenizer"])
        card = reward_model.report(r, held)
        numbers["pairs"].append(count)
        numbers["gold_order"].append(card["gold_order"])
        numbers["accuracy"].append(card["accuracy"])
        config.say(f"{count:8,}{card['gold_order']:12.3f}{card['accuracy']:25.3f}")
    return {"numbers": numbers}


def picture(runs):
    lines = []
    for key, name in (("gold_order", "the truth"), ("accuracy", "annotators")):
        lines.append(figures.line(name, runs[0]["pairs"], [run[key] for run in runs]))
    panel = Panel("How many pairs does a judge need?", "pairs in the file (log scale)",
                  "share of held-out pairs on which it agrees with", lines, scale="log")
    return chart([panel], height=400)


if __name__ == "__main__":
    if "--curve" in sys.argv or "--seeds" in sys.argv:
        figures.main("annotate", Config, curve, picture, __doc__)
    else:
        main(Config, train, __doc__)
