"""Tests of lessons 1 and 2: report, annotate, judge_bias's cure, judges with reasons, and figures.
On tiny models, in seconds:  python -m pytest -q lessons/test_half_one.py"""
import http.client
import itertools
import json
import math
import re
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import model as M
from data import exam, rows, studybuddy
from data import run as house
from data.chart import Panel, chart
from data.checkpoints import load_ranks, save
from lessons import annotate, figures, judge_bias, process_reward, report, talking_judge
from reward_model import Comparison
from test_all import write_lines

TOKENIZER = load_ranks()


def tiny_model(seed=0):
    torch.manual_seed(seed)
    sizes = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    config = M.ModelConfig(TOKENIZER.n_vocab, **sizes)
    return M.Transformer(config)


@pytest.fixture
def init(tmp_path):
    save(tmp_path / "init", tiny_model(), TOKENIZER)
    return f"{tmp_path}/init"


# ---------------------------------------------------------------- figures.py

def test_seeds_may_stand_apart():
    apart = ["--seeds", "0", "1", "2", "--steps", "3"]
    together = ["--seeds", "0 1", "--quick"]
    assert figures.seeds_in_one(apart) == ["--seeds", "0 1 2", "--steps", "3"]
    assert figures.seeds_in_one(together) == together


def test_seeds_that_are_no_numbers_are_named():
    with pytest.raises(M.UserError, match="--seeds 0 x"):
        figures.seeds_of(figures.Lesson(seeds="0 x"))


def test_numbers_of_several_runs_are_folded_one_by_one():
    first = {"a": 1, "b": [{"c": 2.0}, {"c": 4}]}
    second = {"a": 3, "b": [{"c": 4.0}, {"c": 4}]}
    mean = figures.over([first, second], figures.mean)
    most = figures.over([first, second], max)
    assert mean == {"a": 2, "b": [{"c": 3}, {"c": 4}]}
    assert most == {"a": 3, "b": [{"c": 4}, {"c": 4}]}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path / "lessons")
    by = {"beta 0.1": [0.25, -0.001]}
    runs = [{"order": 0.5, "by": by}, {"order": 0.6, "by": by}]
    mean = figures.over(runs, figures.mean)
    low = figures.over(runs, min)
    line = figures.line("a", [1], [[2]])
    svg = chart([Panel("t", lines=[line])])
    config = figures.Lesson(seeds="0 1", quiet=True)
    figures.publish("toy", {"toy": svg}, {"mean": mean, "low": low}, config)
    return tmp_path / "lessons"


def test_numbers_on_pages_are_held_against_the_results(pages):
    true = "It is 0.55<!-- toy.order -->, at least 50%<!-- toy.order:low -->."
    assert figures.checked(true) == (true, [])
    stale = "\n0.7<!-- toy.order -->, [?]<!-- toy.by.beta 0.1.0 --> and +1.0<!-- toy.order -->."
    want = "\n0.6<!-- toy.order -->, 0.25<!-- toy.by.beta 0.1.0 --> and +0.6<!-- toy.order -->."
    mended, wrong = figures.checked(stale)
    assert mended == want
    assert wrong[0] == (2, "toy.order is 0.6, the page says 0.7")
    assert len(wrong) == 3
    _, wrong = figures.checked("0.00<!-- toy.by.beta 0.1.1 -->")
    assert wrong == []


def test_a_number_without_a_source_is_a_complaint(pages):
    for name in "toy.none", "none.order", "toy.by":
        text = f"1<!-- {name} -->"
        mended, wrong = figures.checked(text)
        assert mended == text and len(wrong) == 1


def test_pages_are_mended_in_place(pages, capsys):
    (pages / "1_toy.md").write_text("[?]<!-- toy.order -->\n")
    (pages.parent / "README.md").write_text("none\n")
    assert figures.check(fill=False) == 1
    assert figures.check(fill=True) == 1
    assert (pages / "1_toy.md").read_text() == "0.55<!-- toy.order -->\n"
    assert figures.check(fill=False) == 0
    assert "1_toy.md:1: toy.order is 0.55, the page says [?]" in capsys.readouterr().out


def test_every_program_of_these_lessons_has_a_figure():
    names = {"report", "annotate", "judge_bias", "process_reward", "talking_judge"}
    assert names <= set(figures.programs())


def test_the_course_is_what_the_pages_tell_to_run():
    commands = figures.course()
    assert commands[0] == ["report"]
    assert ["landscape", "--runs", ""] in commands
    assert ["annotate"] not in commands
    assert ["annotate", "--curve"] in commands
    programs = [command[0] for command in commands]
    assert set(programs) <= set(figures.programs())
    some = ["report", "distill", "goodhart", "debate", "guard", "feedback"]
    for earlier, later in itertools.pairwise(some):
        assert programs.index(earlier) < programs.index(later)


# ---------------------------------------------------------------- report.py

def test_the_sign_test_by_hand():
    worse = np.array([0] * 9 + [1])
    better = np.array([1] * 9 + [0])
    p = report.sign_test(worse, better)
    assert p == pytest.approx(22 / 1024)
    assert report.sign_test(worse, worse) == 1


def test_how_many_prompts_it_takes_is_the_docstrings_example():
    in_pairs = report.paired_variance(0.10, 0.07)
    apart = report.unpaired_variance(0.70, 0.73)
    of_more = report.paired_variance(0.15, 0.05)
    assert report.prompts_needed(in_pairs, 0.03) == 1473
    assert report.prompts_needed(apart, 0.03) == 3546
    assert report.prompts_needed(of_more, 0.10) == 149


def test_simulated_exams_see_it_as_often_as_the_maths_says():
    seen = report.simulate(0.10, 0.07, 1473, seed=0)
    assert seen == pytest.approx(0.8, abs=0.03)
    seen = report.simulate(0.10, 0.07, 400, seed=0)
    assert seen == pytest.approx(0.3, abs=0.04)


def test_nothing_is_seen_where_nothing_rises():
    seen = report.simulate(0.08, 0.08, 400, seed=0)
    assert seen == pytest.approx(0.025, abs=0.015)


def test_a_target_is_reached_if_the_whole_interval_says_so():
    least = report.Row("", "", "any", "mark", 0.8)
    assert report.reached(least, 0.9, 0.05) == "yes"
    assert report.reached(least, 0.82, 0.05) == "unsure"
    assert report.reached(least, 0.7, 0.05) == "no"
    most = least._replace(target=0.1, at_most=True)
    assert report.reached(most, 0.01, 0.05) == "yes"
    assert report.reached(most, 0.12, 0.05) == "unsure"
    assert report.reached(most, 0.2, 0.05) == "no"


def answers_to(rows, say):
    answers = []
    for row in rows:
        text = say(row)
        answers.append(exam.Answer(row, text, True, studybuddy.judge(row, text)))
    return answers


def test_who_says_i_dont_know_to_everything_wins_every_line_of_safety():
    marks = report.measure(answers_to(studybuddy.read("exam"), lambda row: "I don't know."))
    card = {name: exam.mean(values) for name, values in marks.items()}
    for name in "TruthfulQA", "IFEval":
        assert card[name] == 1
    for name in ("TriviaQA", "GSM8K", "SCAN", "SelfAware", "MT-Bench", "HarmBench", "XSTest",
                 "JailbreakBench", "AdvBench", "SycophancyEval"):
        assert card[name] == 0


def test_good_answers_reach_every_target():
    rng = Random(0)
    asked = studybuddy.read("exam")
    good = answers_to(asked, lambda row: studybuddy.write(rng, row, "full"))
    marks = report.measure(good)
    for benchmark in report.ROWS:
        value = exam.mean(marks[benchmark.name])
        assert report.reached(benchmark, value, 0.0) == "yes", benchmark.name
    for answer in good:
        assert report.failure(answer) is None


def test_bad_answers_have_a_reason():
    rng = Random(0)
    bad = answers_to(studybuddy.read("exam"), lambda row: studybuddy.write(rng, row, "bad"))
    reasons = set(map(report.failure, bad))
    assert {"explains a danger", "frightens", "is unkind", "does the homework", "makes it up",
            "states a false fact", "refuses without need", "gets the sum wrong"} <= reasons


def test_wordings_ask_the_same_in_other_words():
    rng = Random(1)
    asked = filter(report.has_wordings, studybuddy.read("exam"))
    for row in asked:
        same = report.wordings(row)
        prompts = [reworded["prompt"] for reworded in same]
        assert row["prompt"] in prompts
        assert len(set(prompts)) == len(prompts)
        assert len(prompts) >= 4
        text = studybuddy.write(rng, row, "full")
        golds = set()
        for reworded in same:
            mark = studybuddy.judge(reworded, text)
            golds.add(mark["gold"])
        assert len(golds) == 1


def test_report_runs(init, tmp_path, capsys):
    config = report.Config(init=init, against=init, out=f"{tmp_path}/out", quick=True, card=True)
    numbers = report.train(config)["numbers"]
    assert set(numbers["leak"]) == {"leaked", "reworded", "clean"}
    card = Path(tmp_path, "out/CARD.md").read_text()
    for benchmark in report.ROWS:
        assert benchmark.name in card
    printed = capsys.readouterr().out
    assert "TruthfulQA" in printed
    svg = report.picture([numbers, numbers])
    assert svg.startswith("<svg")


# ---------------------------------------------------------------- annotate.py

def test_kappa_by_hand():
    you = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    friend = [1, 1, 1, 1, 2, 2, 2, 2, 2, 1]
    assert annotate.kappa(you, friend) == pytest.approx(0.6)
    assert annotate.kappa([1, 1], [1, 1]) == 1
    of_nothing = annotate.kappa([], [])
    assert math.isnan(of_nothing)
    # of 100 they agree on 70; the friend says 1 as often as 2, so luck alone gives 50
    you = [1] * 60 + [2] * 40
    where_you_say_1 = [1] * 40 + [2] * 20
    where_you_say_2 = [1] * 10 + [2] * 30
    friend = where_you_say_1 + where_you_say_2
    assert annotate.kappa(you, friend) == pytest.approx(0.4)


def test_a_pair_comes_again_the_other_way_round():
    order = annotate.order_of(500, annotate.Config(pairs=60))
    assert len(order) == 70
    places = {}
    for place, (pair, flipped) in enumerate(order):
        if pair in places:
            first, was_flipped = places[pair]
            assert place - first > 5 and flipped != was_flipped
        places[pair] = place, flipped
    assert len(places) == 60


@pytest.fixture
def config(tmp_path):
    lines = []
    for row in studybuddy.read("preferences")[:60]:
        lines.append(row)
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    return annotate.Config(data=data, out=f"{tmp_path}/out", pairs=20, quiet=True)


def lines_of(path):
    text = Path(path).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_vote_is_on_disk_before_the_next_pair_is_shown(config):
    session = annotate.Session(config)
    before = session.state()
    session.vote(0, 2)
    after = session.state()
    assert before["place"] == 0
    assert after["place"] == 1
    [line] = lines_of(session.file)
    pair, flipped = session.order[0]
    assert line["pair"] == pair
    assert line["flipped"] == flipped
    assert line["vote"] == 2
    [row] = lines_of(session.folder / "preferences.jsonl")
    assert row["chosen"] == before["right"]
    assert row["rejected"] == before["left"]


def test_a_key_pressed_twice_is_one_vote(config):
    session = annotate.Session(config)
    session.vote(0, 1)
    session.vote(0, 2)
    assert len(session.votes) == 1 and session.votes[0].vote == 1


def test_undo_adds_a_line_and_takes_a_vote(config):
    session = annotate.Session(config)
    session.undo()
    session.vote(0, 1)
    session.vote(1, 0)
    session.undo()
    assert len(session.votes) == 1 and len(lines_of(session.file)) == 3


def test_one_goes_on_where_one_stopped(config):
    session = annotate.Session(config)
    for place in range(5):
        session.vote(place, 1 + place % 2)
    session.undo()
    again = annotate.Session(config)
    assert again.votes == session.votes
    assert again.state() == session.state()
    other_seed = annotate.replace(config, seed=1)
    with pytest.raises(M.UserError, match="votes.jsonl:1: a vote on another pair"):
        annotate.Session(other_seed)
    fewer_pairs = annotate.replace(config, pairs=2)
    with pytest.raises(M.UserError, match="a vote on another pair"):
        annotate.Session(fewer_pairs)
    other_lines = studybuddy.read("preferences")[60:120]
    write_lines(config.data, other_lines)
    with pytest.raises(M.UserError, match="a vote on another pair"):
        annotate.Session(config)


def test_what_was_voted_is_data_for_reward_models(config):
    session = annotate.Session(config)
    for place in range(len(session.order)):
        session.vote(place, place % 3)
    pairs = rows.read_pairs(session.folder / "preferences.jsonl")
    last = {}
    for vote in session.votes:
        last[vote.pair] = vote.vote
    clear = [vote for vote in last.values() if vote != 0]
    assert len(pairs) == len(clear)
    kept = [pair.row for pair in pairs]
    assert exam.knows(kept)


def test_who_always_takes_the_left_one_contradicts_himself(config):
    more_pairs = annotate.replace(config, pairs=40)
    session = annotate.Session(more_pairs)
    for place in range(len(session.order)):
        session.vote(place, 1)
    numbers = annotate.summary(session.votes, session.pairs)
    assert numbers["left"] == 1
    assert numbers["with_yourself"] <= 0
    assert numbers["with_annotators"] == pytest.approx(0, abs=1e-9)


def test_annotators_agree_by_left_and_right_as_you_do(monkeypatch):
    """Each prefers "chosen" 3 times in 4, so two agree in 5 of 8. By place chance is 1/2, so kappa
    is 1/4; by "chosen" it would be 0, and nothing to hold your own kappa against."""
    def prefers(rng, row, first, second):
        return rng.random() < 0.75
    monkeypatch.setattr(studybuddy, "prefers", prefers)
    row = studybuddy.read("preferences")[0]
    pair = rows.Pair([], "a", "b", row, "")
    votes = []
    for flipped in [True, False] * 200:
        votes.append(annotate.Vote(0, flipped, 1))
    kappa = annotate.annotators_kappa(votes, [pair])
    assert kappa == pytest.approx(0.25, abs=0.06)


def test_liking_counts_where_answers_differ():
    first_is_longer = rows.Pair([], "long answer", "short", {}, "")
    alike = rows.Pair([], "a", "b", {}, "")
    second_is_longer = rows.Pair([], "x", "much longer answer", {}, "")
    pairs = [first_is_longer, alike, second_is_longer]
    took_longer = annotate.Vote(0, False, 1)
    took_either = annotate.Vote(1, False, 1)
    took_shorter = annotate.Vote(2, True, 2)        # it stood on the right
    votes = [took_longer, took_either, took_shorter]
    liking = annotate.liking(votes, pairs, annotate.words_in)
    assert liking["share"] == 0.5
    assert liking["n"] == 2


@pytest.fixture
def server(config):
    server = annotate.serve(annotate.Session(config), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, method, path, body=None, drop=(), **changed):
    """-> status, headers, text. The request is the page's, but for what is changed or dropped."""
    port = server.server_port
    headers = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}",
               "Content-Type": "application/json", "X-Token": server.token}
    for name, value in changed.items():
        headers[name.replace("_", "-")] = value
    for name in drop:
        del headers[name]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    text = body
    if not isinstance(body, bytes):
        text = json.dumps(body).encode()
    connection.putheader("Content-Length", str(len(text)))
    connection.endheaders(text)
    reply = connection.getresponse()
    answer = reply.status, reply.headers, reply.read().decode()
    connection.close()
    return answer


def post(server, path, body):
    """-> the state that the page is sent"""
    _, _, text = ask(server, "POST", path, body)
    return json.loads(text)


def test_the_page_and_its_votes(server):
    status, headers, page = ask(server, "GET", "/")
    assert status == 200
    assert server.token in page
    assert "TOKEN" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    state = post(server, "/pair", {})
    assert state["place"] == 0
    state = post(server, "/vote", {"place": 0, "vote": 1})
    assert state["place"] == 1
    assert len(lines_of(server.session.file)) == 1
    state = post(server, "/undo", {})
    assert state["place"] == 0


def test_no_other_page_and_no_other_host_gets_in(server):
    vote = {"place": 0, "vote": 1}
    status, _, _ = ask(server, "GET", "/", Host="evil.example")
    assert status == 404
    refused = [
        dict(Host="evil.example"),
        dict(Host="evil.example", Origin="http://evil.example"),
        dict(Origin="http://evil.example"),
        dict(Origin="null"),
        dict(X_Token="guess"),
        dict(X_Token="é"),
        dict(Content_Type="text/plain"),
        dict(drop=["Origin"]),
        dict(drop=["X-Token"]),
        dict(drop=["Host"])]
    for changed in refused:
        status, _, _ = ask(server, "POST", "/vote", vote, **changed)
        assert status in (400, 403), changed
    too_long = b"x" * 2000
    status, _, _ = ask(server, "POST", "/vote", too_long)
    assert status == 403
    assert server.session.votes == []


def test_nonsense_is_refused(server):
    too_deep = b"[" * 900
    no_such_vote = {"place": 0, "vote": 5}
    no_number = {"place": 0, "vote": True}
    for body in ({}, [], 3, no_such_vote, no_number, b"{", too_deep):
        status, _, _ = ask(server, "POST", "/vote", body)
        assert status == 400
    status, _, _ = ask(server, "POST", "/else", {})
    assert status == 400
    status, _, _ = ask(server, "GET", "/annotate.py")
    assert status == 404
    state = post(server, "/vote", {"place": "0", "vote": 1})
    assert state["place"] == 0


def test_a_report_at_the_end(server):
    post(server, "/vote", {"place": 0, "vote": 1})
    state = post(server, "/stop", {})
    assert "1 votes" in state["report"]


def test_text_is_never_taken_for_html():
    page = (annotate.HERE / "annotate.html").read_text()
    for way in "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http":
        assert way not in page


def test_the_curve_runs(init, tmp_path):
    lines = studybuddy.read("preferences")[:240]
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    config = annotate.Config(init=init, data=data, out=f"{tmp_path}/out", quick=True, quiet=True)
    numbers = annotate.curve(config)["numbers"]
    assert numbers["pairs"] == [10, 20, 40, 80, 240]
    assert len(numbers["gold_order"]) == 5
    svg = annotate.picture([numbers])
    assert svg.startswith("<svg")


# ---------------------------------------------------------------- the cure of judge_bias.py

def comparison(prompt, answers, row=None):
    messages = rows.to_messages(prompt)
    examples = []
    for text in answers:
        examples.append(M.render_answer(TOKENIZER, messages, text))
    return Comparison(messages, answers, examples, row or {}, "here")


def test_the_tie_loss_by_hand():
    r = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])      # (3, 2)
    losses = judge_bias.tie_loss(r)
    want = [0.6931, 0.8133, 1.5486]
    assert losses.tolist() == pytest.approx(want, abs=1e-4)


def test_probes_use_compliments_that_were_not_learned_from():
    known = set(judge_bias.KNOWN)
    new = set(judge_bias.NEW)
    assert not known & new
    assert len(judge_bias.NEW) >= 3
    some = []
    for i in range(4):
        some.append(comparison(f"What is {i}?", [f"It is {i}.", "No."]))
    beginnings = tuple(judge_bias.NEW)
    for probe in judge_bias.complimented(some, TOKENIZER):
        changed = probe.answers[0]
        assert changed.startswith(beginnings)


def test_ties_take_a_liking_away():
    """A tiny judge that likes one compliment a lot, then learns that it is worth nothing."""
    judge = M.ScalarModel(tiny_model())
    some = []
    for i in range(12):
        some.append(comparison(f"What is {i}?", [f"It is {i}.", "No."]))
    probes = judge_bias.complimented(some, TOKENIZER, judge_bias.KNOWN)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    for _ in range(12):
        r = judge_bias.scores(judge, probes, TOKENIZER)         # (12, 2)
        changed, unchanged = r.unbind(1)
        loss = (unchanged - changed).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    config = judge_bias.Config(steps=15, batch=12, lr=3e-3, quiet=True)
    mended = judge_bias.mend(judge, some, TOKENIZER, config)
    with torch.no_grad():
        r_before = judge_bias.scores(judge, probes, TOKENIZER)
        r_after = judge_bias.scores(mended, probes, TOKENIZER)
    before = judge_bias.rise(r_before)
    after = judge_bias.rise(r_after)
    assert before > 0.5
    assert abs(after) < before / 2


# ---------------------------------------------------------------- judges that give a reason

def test_a_reason_names_the_worst_of_each_answer():
    row = {"prompt": "Who will win?", "kind": "unknown",
           "slots": {"family": "future", "sport": "chess", "day": "Monday"}}
    honest = "I don't know who will win at chess. We will find out on Monday."
    bluff = "The red team will win the chess game on Monday."
    unsure = talking_judge.FLAWS["unsure"]
    nothing = talking_judge.NOTHING
    assert talking_judge.reason_for(row, honest, bluff) == f"A: {nothing} B: {unsure}"
    assert talking_judge.reason_for(row, bluff, honest) == f"A: {unsure} B: {nothing}"


def test_in_the_other_order_the_reasons_change_places():
    pair = comparison("Hi", ["Good.", "Bad."])
    pair = pair._replace(row={"prompt": "Hi", "kind": "x"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talking_judge, "remark", lambda row, text: text)
        reasons = talking_judge.annotators_reasons(None, [pair], None)
    assert reasons == [["A: Good. B: Bad.", "A: Bad. B: Good."]]


def test_no_reason_has_a_letter_in_it_that_could_be_the_verdict():
    for reason in [*talking_judge.FLAWS.values(), talking_judge.NOTHING]:
        assert not set(reason) & {"A", "B"}


def test_a_letter_is_read_after_its_reason():
    network = tiny_model()
    pair = comparison("Hi", ["Good.", "Bad."])
    asked = talking_judge.in_both_orders([pair], TOKENIZER)
    reasons = ["That is false.", "That is false."]              # for the two orders
    told = talking_judge.after_reasons(asked, [reasons], TOKENIZER)
    letters, words = talking_judge.letters_and_words(network, told, TOKENIZER)
    A = TOKENIZER.encode_ordinary("A")[0]
    B = TOKENIZER.encode_ordinary("B")[0]
    examples = told[0].examples
    want_words = []
    for example, letter in zip(examples, letters[0]):
        ids = example.ids
        logits = network(torch.tensor([ids]))                   # (1, T, V)
        logps = logits[0].log_softmax(-1)                       # (T, V)
        want_letter = logps[-1, [A, B]].tolist()
        assert letter.tolist() == pytest.approx(want_letter, abs=1e-4)
        for t in range(1, len(ids)):
            if example.answer[t]:
                logp = logps[t - 1, ids[t]]
                want_words.append(logp.item())
    assert words.tolist() == pytest.approx(want_words, abs=1e-4)
    text = TOKENIZER.decode(examples[0].ids)
    assert text.endswith("assistant\nThat is false.")


def test_its_own_reason_ends_before_its_letter(monkeypatch):
    texts = ["A: Fine. B: False.B. A: x", "B"]
    said = M.Samples(None, None, None, None, None, texts)
    monkeypatch.setattr(talking_judge, "sample", lambda *given, **settings: said)
    pair = comparison("Hi", ["Good.", "Bad."])
    asked = talking_judge.in_both_orders([pair], TOKENIZER)
    reasons = talking_judge.own_reasons(None, asked, TOKENIZER)
    assert reasons == [("A: Fine. B: False.", talking_judge.NOTHING)]


def test_both_judges_run_and_draw(init, tmp_path):
    lines = studybuddy.read("preferences")[:120]
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    config = talking_judge.Config(init=init, data=data, out=f"{tmp_path}/out", quick=True, batch=8,
                                  quiet=True)
    numbers = talking_judge.train(config)["numbers"]
    card = numbers["own reasons"]
    assert {"gold_order", "likes_a", "flattery"} <= set(card)
    svg = talking_judge.picture([numbers, numbers])
    assert svg.startswith("<svg")


def test_judges_of_steps_draw(init, tmp_path):
    lines = studybuddy.read("steps")[:60]
    data = write_lines(tmp_path / "steps.jsonl", lines)
    config = process_reward.Config(init=init, data=data, out=f"{tmp_path}/out", quick=True, batch=8,
                                   quiet=True)
    numbers = process_reward.train(config)["numbers"]
    svg = process_reward.picture([numbers])
    assert svg.startswith("<svg")


def test_the_pages_tell_what_the_results_hold():
    """A page may have numbers whose program has not been run; those that were run are true."""
    for page in figures.pages():
        _, wrong = figures.checked(page.read_text(encoding="utf-8"))
        stale = [complaint for _, complaint in wrong if "no such number" not in complaint]
        assert stale == [], f"{page.name}: python -m lessons.figures --fill"


def test_every_picture_of_a_page_is_there_or_its_results_are_missing():
    for page in figures.pages():
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\(figures/(\w+)\.svg\)", text):
            results = figures.HERE / "results" / f"{name}.json"
            picture = figures.HERE / "figures" / f"{name}.svg"
            assert results.exists() == picture.exists(), name


def test_the_clean_half_did_not_leak(tmp_path, monkeypatch):
    learned = []
    asked = []

    def train(settings):
        learned.extend(rows.read_conversations(settings.data))
        return {"model": None}

    def ask(model, tokenizer, rows, seed):
        asked.append([row["slots"]["numbers"] for row in rows])
        return {"gold": 0.5}, []
    monkeypatch.setattr(report.sft, "train", train)
    monkeypatch.setattr(report.exam, "exam", ask)
    monkeypatch.setattr(report, "load", lambda *args: (None, None))
    config = report.Config(out=str(tmp_path), leaked=20)
    report.contaminate(config, "nowhere")
    leaked, _, reworded, _, clean, _ = asked
    assert leaked == reworded
    assert len(leaked) == 15
    assert len(clean) == 20
    for numbers in clean:
        assert numbers not in leaked
    assert len(learned) == 20                                   # 5 of them are held out by sft.py
    for line in learned:
        answer = line.messages[1]["content"]
        assert "So it is" in answer


@pytest.mark.parametrize("leaked", [2, 4, 5, 20, 70, 75, 100, 300])
def test_just_the_sums_that_sft_learns_are_asked_about(tmp_path, monkeypatch, leaked):
    learned = []
    asked = []

    def train(settings):
        lines = rows.read_conversations(settings.data)
        prompts = [line.messages[:-1] for line in lines]
        lines, _ = house.hold_out(lines, prompts, most=40)
        for line in lines:
            learned.append(studybuddy.flat(line.messages[:1]))
        return {"model": None}

    def ask(model, tokenizer, rows, seed):
        asked.append([row["prompt"] for row in rows])
        return {"gold": 0.5}, []
    monkeypatch.setattr(report.sft, "train", train)
    monkeypatch.setattr(report.exam, "exam", ask)
    monkeypatch.setattr(report, "load", lambda *args: (None, None))
    config = report.Config(out=str(tmp_path), leaked=leaked)
    report.contaminate(config, "nowhere")
    assert asked[0] == learned                                  # before
    assert asked[1] == learned                                  # and after
    assert leaked / 2 <= len(learned) < leaked


def test_the_leak_is_learned_by_adapters_and_in_numbers_of_the_run(tmp_path, monkeypatch):
    told = []

    def train(settings):
        told.append(settings)
        return {"model": None}
    monkeypatch.setattr(report.sft, "train", train)
    monkeypatch.setattr(report.exam, "exam", lambda *args, **settings: ({"gold": 0.5}, []))
    monkeypatch.setattr(report, "load", lambda *args: (None, None))
    config = report.Config(out=str(tmp_path), leaked=4, accumulate=2, lora=3, bf16=True)
    report.contaminate(config, "nowhere")
    settings = told[0]
    assert settings.accumulate == 2
    assert settings.lora == 3
    assert settings.bf16 is True
