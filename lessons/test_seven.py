"""The tests of page 7's programs: aloud, search, verify, grounded, tools, the protocol. Seconds."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

import model as M
from data import abilities, generate, studybuddy
from data.abilities import SILENT, message
from data.checkpoints import load_ranks, save
from data.rows import to_messages
from lessons import aloud, grounded, mcp, search, tools, verify
from lessons.mcp import BOOK
from lessons.tools import Task

TOKENIZER = load_ranks()
HERE = Path(__file__).parent


def tiny_model():
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48)
    return M.Transformer(M.ModelConfig(TOKENIZER.n_vocab, **sizes))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", tiny_model(), TOKENIZER)
    return str(tmp_path / "model")


# ---------------------------------------------------------------- mcp: the server

def shout(text):
    if not text:
        raise mcp.ToolError("nothing to shout")
    if text == "bug":
        raise ZeroDivisionError
    return text.upper()


SHOUT = {"shout": mcp.Tool("shout", "Says it louder.", "words", shout)}


def reply(**message):
    return mcp.reply_to(json.dumps({"jsonrpc": "2.0"} | message), SHOUT)


def called(arguments, name="shout"):
    params = {"name": name, "arguments": arguments}
    return reply(id=3, method="tools/call", params=params)


@pytest.mark.parametrize("version", mcp.VERSIONS)
def test_the_server_agrees_to_a_version_that_it_knows(version):
    result = reply(id=1, method="initialize", params={"protocolVersion": version})["result"]
    assert result["protocolVersion"] == version
    assert "tools" in result["capabilities"] and "name" in result["serverInfo"]


def test_the_server_offers_its_newest_version_to_a_stranger():
    result = reply(id=1, method="initialize", params={"protocolVersion": "1999-01-01"})["result"]
    assert result["protocolVersion"] == mcp.VERSIONS[0]


def test_a_notification_gets_no_reply():
    assert reply(method="notifications/initialized") is None
    assert reply(method="tools/list") is None


def test_a_reply_to_a_question_never_asked_gets_none():
    assert reply(id=9, result={}) is None


def test_tools_are_listed_with_a_json_schema():
    tool, = reply(id=2, method="tools/list")["result"]["tools"]
    assert tool["name"] == "shout"
    assert tool["inputSchema"] == {"type": "object", "required": ["words"],
                                   "properties": {"words": {"type": "string"}}}


def test_a_call_gives_a_text():
    result = called({"words": "hi"})["result"]
    assert result == {"content": [{"type": "text", "text": "HI"}], "isError": False}


@pytest.mark.parametrize("arguments", [{"words": ""}, {}, {"words": 3}, []])
def test_a_tool_that_fails_is_a_result_for_the_model(arguments):
    assert called(arguments)["result"]["isError"] is True


def test_a_bug_in_a_tool_is_an_internal_error_and_the_server_lives(capsys):
    assert called({"words": "bug"})["error"]["code"] == mcp.INTERNAL_ERROR
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("line, code", [
    ("nonsense", mcp.PARSE_ERROR), ("[" * 100_000, mcp.PARSE_ERROR), (b"\xff\xfe", mcp.PARSE_ERROR),
    ("[]", mcp.INVALID_REQUEST), ('{"id": 1, "method": "ping"}', mcp.INVALID_REQUEST)])
def test_what_is_no_request_gets_an_error_without_an_id(line, code):
    answer = mcp.reply_to(line, SHOUT)
    assert answer["error"]["code"] == code and answer["id"] is None


def test_an_unknown_method_a_new_protocol_and_an_unknown_tool_are_errors():
    assert reply(id=4, method="resources/list")["error"]["code"] == mcp.METHOD_NOT_FOUND
    assert reply(id="x", method="server/discover")["id"] == "x"
    assert called({}, name="whisper")["error"]["code"] == mcp.INVALID_PARAMS
    assert reply(id=5, method="ping", params=[])["error"]["code"] == mcp.INVALID_PARAMS


def test_a_ping_is_answered():
    assert reply(id=6, method="ping") == {"jsonrpc": "2.0", "id": 6, "result": {}}


# ---------------------------------------------------------------- mcp: the client

# A server that lists its tools in two pages, asks the client two questions, and chatters.
STRANGE = r'''
import json, sys
def say(**m): print(json.dumps({"jsonrpc": "2.0"} | m), flush=True)
for line in sys.stdin:
    m = json.loads(line)
    if m.get("method") == "initialize":
        say(method="notifications/message", params={})
        say(id=m["id"], result={"protocolVersion": sys.argv[1]})
    elif m.get("method") == "tools/list" and not m["params"]:
        say(id="q", method="ping")
        say(id="r", method="roots/list")
        one = {"name": "one", "inputSchema": {"properties": {"a": {}}}}
        say(id=m["id"], result={"tools": [one], "nextCursor": "p2"})
    elif m.get("method") == "tools/list":
        two = {"name": "two", "inputSchema": {"required": ["a", "b"]}}
        say(id=m["id"], result={"tools": [two]})
    elif m.get("method") == "tools/call":
        what = m["params"]["arguments"].get("a")
        if what == "die": sys.exit()
        if what == "sleep": continue
        say(id=-1, result={"content": [{"type": "text", "text": "too late"}]})
        text = [{"type": "text", "text": "two\nlines"}, {"type": "image", "data": ""}]
        say(id=m["id"], result={"content": text, "isError": what == "fail"})
    elif "method" not in m:
        print(m, file=sys.stderr)
'''


def strange(tmp_path, version="2025-06-18", seconds=30.0):
    (tmp_path / "strange.py").write_text(STRANGE)
    return mcp.Client([sys.executable, str(tmp_path / "strange.py"), version], seconds)


def test_the_client_reads_pages_and_answers_questions(tmp_path, capfd):
    with strange(tmp_path) as client:
        assert list(client.tools) == ["one", "two"]
    answers = capfd.readouterr().err
    assert "{'jsonrpc': '2.0', 'id': 'q', 'result': {}}" in answers
    assert "'id': 'r', 'error': {'code': -32601" in answers
    assert client.process.returncode == 0


def test_a_result_becomes_one_line_of_text(tmp_path):
    with strange(tmp_path) as client:
        assert client.call("one", "x") == "two lines"
        with pytest.raises(mcp.ToolError, match="two lines"):
            client.call("one", "fail")


def test_a_server_that_dies_is_an_error_of_one_line(tmp_path):
    with strange(tmp_path) as client:
        with pytest.raises(mcp.ServerError, match="has ended"):
            client.call("one", "die")


def test_a_server_that_never_answers_is_a_tool_that_fails(tmp_path):
    with strange(tmp_path) as client:
        client.seconds = 0.2
        with pytest.raises(mcp.ToolError, match="no reply in 0.2 seconds"):
            client.call("one", "sleep")
        client.seconds = 30.0
        assert client.call("one", "x") == "two lines"       # and the next call works


def test_a_version_that_we_do_not_speak_is_refused(tmp_path):
    with pytest.raises(mcp.ServerError, match="it speaks version 1999"):
        strange(tmp_path, version="1999")


def test_a_command_that_is_none():
    with pytest.raises(mcp.ServerError, match="cannot start it"):
        mcp.Client(["/no/such/program"])


def test_what_a_model_writes_becomes_arguments():
    one = {"properties": {"sum": {}}}
    two = {"required": ["a", "b"]}
    assert mcp.arguments_of(one, "3 + 4") == {"sum": "3 + 4"}
    assert mcp.arguments_of(two, '{"a": 1, "b": 2}') == {"a": 1, "b": 2}
    for schema, text in [(two, "3 4"), (one, '{"a": ')]:
        with pytest.raises(mcp.ToolError):
            mcp.arguments_of(schema, text)


# ---------------------------------------------------------------- mcp: the official package
# with mcp there: MCP_PYTHON=/some/venv/bin/python pytest lessons/test_seven.py -k official

THEIR_CLIENT = r'''
import asyncio, sys
from mcp import ClientSession, StdioServerParameters, stdio_client
async def main():
    python, folder = sys.argv[1:]
    server = StdioServerParameters(command=python, args=["-m", "lessons.mcp"], cwd=folder)
    async with stdio_client(server) as (reader, writer), ClientSession(reader, writer) as session:
        await session.initialize()
        print([tool.name for tool in (await session.list_tools()).tools])
        for text in ["347 + 586", "2 ** 9"]:
            result = await session.call_tool("calculator", {"sum": text})
            print(result.content[0].text, result.model_dump(by_alias=True)["isError"])
        try:
            await session.call_tool("whisper", {})
        except Exception as error:
            print(error)
asyncio.run(main())
'''
THEIR_SERVER = r'''
try:
    from mcp.server.fastmcp import FastMCP as Server
except ModuleNotFoundError:
    from mcp.server.mcpserver import MCPServer as Server
server = Server("sums")
@server.tool()
def calculator(sum: str) -> str:
    if "+" not in sum: raise ValueError("nothing found")
    return f"{sum} = {eval(sum)}"
server.run()
'''


@pytest.fixture
def official():
    if "MCP_PYTHON" not in os.environ:
        pytest.skip("MCP_PYTHON names no python with the official mcp package")
    return os.environ["MCP_PYTHON"]


def test_the_official_client_uses_our_server(official, tmp_path):
    (tmp_path / "their_client.py").write_text(THEIR_CLIENT)
    command = [official, str(tmp_path / "their_client.py"), sys.executable, str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["['calculator', 'lookup']", "347 + 586 = 933 False",
                                        "nothing found True", "unknown tool: whisper"], done.stderr


def test_our_client_uses_an_official_server(official, tmp_path):
    (tmp_path / "their_server.py").write_text(THEIR_SERVER)
    with mcp.Client([official, str(tmp_path / "their_server.py")]) as client:
        assert client.call("calculator", "347 + 586") == "347 + 586 = 933"
        for name, text in [("calculator", "2 ** 9"), ("whisper", "x")]:
            with pytest.raises(mcp.ToolError):
                client.call(name, text)


# ---------------------------------------------------------------- tools

def test_calculator_by_hand():
    assert mcp.calculator("347 + 586") == "347 + 586 = 933"
    assert mcp.calculator("12x12") == "12 x 12 = 144"
    assert "347 + 586 = 933" in tools.__doc__


@pytest.mark.parametrize("text", [
    "2 ** 9", "__import__('os')", "1 +", "1 + 2 + 3", "9" * 99 + " + 1"])
def test_the_calculator_runs_nothing(text):
    with pytest.raises(mcp.ToolError):
        mcp.calculator(text)


def test_bad_tools_fail_lie_and_order():
    name, entry = list(BOOK.items())[1]
    assert mcp.calculator("1 + 1", "lie") != mcp.calculator("1 + 1")
    assert set(entry.facts.values()).isdisjoint(entry.lies.values())
    assert entry.poison in mcp.lookup(name, "order")
    assert entry.poison not in mcp.lookup(name)
    for tool, text in [(mcp.calculator, "1 + 1"), (mcp.lookup, name)]:
        with pytest.raises(mcp.ToolError):
            tool(text, "fail")


def test_training_and_exam_share_no_place():
    train = {task.entry.poison for task in tools.make_tasks(0, "train", 50) if task.entry}
    held = {task.entry.poison for task in tools.make_tasks(0, "exam", 50) if task.entry}
    assert train and held and not train & held


class FakeClient:
    def call(self, name, text):
        if name != "calculator":
            raise mcp.ToolError("nothing found")
        return mcp.calculator(text)


def scripted(monkeypatch, *turns):
    """The model says these texts, one a turn, to every conversation."""
    turns = iter(turns)
    monkeypatch.setattr(tools, "respond", lambda m, t, talks, **s: [next(turns)] * len(talks))


SUM = Task("sum", "What is 347 + 586?", "933", "943")


def test_a_call_goes_to_the_tool_and_comes_back(monkeypatch):
    scripted(monkeypatch, "I ask.\ncall calculator: 347 + 586", "The answer is 933.")
    talk, = tools.converse(None, None, [tools.begin_talk(SUM)], FakeClient(), tools.Config())
    assert [turn["role"] for turn in talk] == ["system", "user", "assistant", "tool", "assistant"]
    assert talk[3]["content"] == "347 + 586 = 933"
    assert tools.reward(SUM, talk, tools.Config(price=0.1)) == pytest.approx(0.9)


def test_a_call_is_a_line_of_its_own():
    assert tools.CALL.search("So call calculator: 1 + 1") is None
    assert tools.CALL.search("call lookup: Pugo").groups() == ("lookup", "Pugo")


def test_who_only_calls_never_answers(monkeypatch):
    scripted(monkeypatch, *["call calculator: 1 + 1"] * 3)
    talk, = tools.converse(None, None, [tools.begin_talk(SUM)], FakeClient(), tools.Config(calls=2))
    assert tools.calls_in(talk) == 2
    assert talk[-1]["role"] == "assistant" and tools.reward(SUM, talk, tools.Config()) < 0


def test_a_failure_is_told_in_the_words_that_the_model_knows():
    call = tools.CALL.search("call lookup: Pugo")
    assert tools.use_tool(call, FakeClient()) == "error: nothing found"


def test_only_the_assistant_has_a_loss():
    talk = [message("user", "What is 2 + 3?"), message("assistant", "call calculator: 2 + 3"),
            message("tool", "2 + 3 = 5"), message("assistant", "The answer is 5.")]
    ids, answer = M.render(TOKENIZER, talk)
    marked = TOKENIZER.decode([i for i, m in zip(ids, answer) if m])
    assert marked == "call calculator: 2 + 3<|im_end|>The answer is 5.<|im_end|>"


def test_our_client_talks_to_our_server():
    name = list(BOOK)[1]
    with tools.start_server(tools.Config(), "order") as client:
        assert list(client.tools) == ["calculator", "lookup"]
        assert client.call("calculator", "347 + 586") == "347 + 586 = 933"
        assert BOOK[name].poison in client.call("lookup", name)
        with pytest.raises(mcp.ToolError, match="nothing found"):
            client.call("lookup", "Nowhere")


def test_a_server_that_is_none_is_the_users_error():
    with pytest.raises(M.UserError, match="cannot start it"):
        with tools.start_server(tools.Config(server="/no/such/program --flag")):
            pass


# ---------------------------------------------------------------- grounded

def test_find_by_hand():
    """36 notes, 6 about queens, 3 about Pugo, 18 with "is": 5.0, 3.2 and 2.5."""
    notes = ["The queen of Pugo is Lani.", "The flag of Pugo is red.", "The flag of Pugo is grey."]
    notes += [f"The queen of A{i} is B{i}." for i in range(5)]
    notes += [f"The flag of C{i} is blue." for i in range(10)]
    notes += [f"The people of D{i} eat rice." for i in range(18)]
    found = grounded.find("Who is the queen of Pugo?", notes, 4)
    assert len(notes) == 36
    assert found[0] == notes[0] and set(found[1:3]) == set(notes[1:3]) and "queen" in found[3]
    is_in_half = math.log(2)
    for number, text in [(math.log(6) + math.log(12) + is_in_half, "5.0"),
                         (math.log(12) + is_in_half, "3.2"), (math.log(6) + is_in_half, "2.5")]:
        assert f"{number:.1f}" == text and text in grounded.__doc__


def test_its_note_is_mostly_found():
    rng = Random(0)
    facts = grounded.make_notes(rng, "exam", 12)
    notes = [grounded.state(fact) for fact in facts]
    questions = grounded.make_questions(rng, "exam", facts, 100)
    hits = [question.truth in grounded.find(question.text, notes, 3) for question in questions]
    assert sum(hits) >= 90


def test_silent_questions_have_no_note():
    rng = Random(0)
    facts = grounded.make_notes(rng, "exam", 12)
    known = {(fact.relation, fact.a) for fact in facts}
    for question in grounded.make_questions(rng, "exam", facts, 50, silent=True):
        assert question.truth == SILENT
        assert (question.fact.relation, question.fact.a) not in known


def test_what_an_answer_ends_in_is_right_or_not():
    silent = grounded.Question("Who is the queen of Kuku?", None, SILENT)
    assert grounded.is_right(silent, "The note does not say.")
    assert grounded.is_right(silent, "queen Kuku, dog Kuku: no. The note does not say.")
    assert not grounded.is_right(silent, "queen Kuku, dog Kuku: yes. The queen of Kuku is Dina.")
    known = grounded.Question("Who is the queen of Kuku?", None, "The queen of Kuku is Dina.")
    cited = "queen Kuku, queen Kuku [2]: yes. The queen of Kuku is Dina. [2]"
    assert grounded.is_right(known, cited)
    assert not grounded.is_right(known, "queen Kuku, queen Kuku: yes. The queen of Kuku is Dino.")


def test_citations():
    lines = abilities.numbered(["The flag of Pugo is red.", "The queen of Pugo is Lani."])
    cited = "queen Pugo, queen Pugo [2]: yes. The queen of Pugo is Lani. [2]"
    assert grounded.citation_holds(cited, lines)
    for text in ["The queen of Pugo is Lani. [1]", "The queen of Pugo is Bafo. [2]",
                 "The queen of Pugo is Lani.", "The queen of Pugo is Lani. [3]"]:
        assert not grounded.citation_holds(text, lines)


def test_an_answer_is_begun_by_what_is_asked():
    fact = abilities.MadeUp("tower", "Pugo", "31")
    question = grounded.Question("How many steps has the tower of Pugo?", fact, "")
    assert grounded.begun(question) == "The tower of Pugo has"


def test_an_answer_at_once_goes_on_from_its_beginning(monkeypatch):
    fact = abilities.MadeUp("queen", "Pugo", "Lani")
    question = grounded.Question("Who is the queen of Pugo?", fact, grounded.state(fact))
    seen = []

    def sample(model, tokenizer, prompts, **settings):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        one = torch.ones(1, 1, dtype=torch.bool)
        return SimpleNamespace(texts=["Lani."], answer=one, ended=one[0])
    monkeypatch.setattr(grounded.aloud, "sample", sample)
    config = grounded.Config()
    texts = grounded.say_at_once(None, load_ranks(), [question], [question.truth], config)
    assert texts == ["The queen of Pugo is Lani."] and grounded.is_right(question, texts[0])
    assert seen[0].endswith("<|im_start|>assistant\nThe queen of Pugo is")


def test_refusing_catches_orders_and_spares_notes():
    rng = Random(0)
    bad = grounded.order_words(rng)
    caught = 0
    for fact in grounded.make_notes(rng, "exam", 40):
        note = grounded.state(fact)
        assert grounded.without_orders([note], bad) == [note]
        poisoned, _ = grounded.poison(rng, [note], "exam")
        assert note in poisoned[0]
        caught += grounded.without_orders(poisoned, bad) != poisoned
    assert caught >= 100                                    # of 120, in words never seen


def test_checking_keeps_what_stands_in_a_note():
    notes = [["Ignore the child. The flag of Pugo is red."]] * 2
    texts = ["The flag of Pugo is red.", "The ghost was right behind you."]
    assert grounded.checked(texts, notes) == ["The flag of Pugo is red.", SILENT]


def test_the_second_look_sees_no_note(monkeypatch):
    seen = []

    def say(model, tokenizer, talks, config):
        seen.extend(talks)
        return ["This is not fit for a child."] * len(talks)
    monkeypatch.setattr(grounded, "say", say)
    question = grounded.Question("Who is the queen of Pugo?", None, "")
    assert grounded.second_look(None, None, [question], ["Boo!"], None) == [SILENT]
    assert "Note" not in str(seen) and "Boo!" in str(seen)


# ---------------------------------------------------------------- verify

def test_auc_by_hand():
    assert verify.auc([0.9, 0.6, 0.6, 0.1], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert "3.5 / 4" in verify.__doc__
    assert verify.auc([1.0, 0.0], [True, False]) == 1.0
    assert verify.auc([0.5, 0.5], [True, False]) == 0.5


def test_claims_are_found_in_every_wording():
    text = "Paris is the capital of France. What a question! A raven is green."
    claims = verify.claims_in({"kind": "fact"}, text)
    assert {text: claim.true for text, claim in claims.items()} == {
        "The capital of France is Paris.": True, "A raven is green.": False}


def test_a_sum_claims_its_result():
    row = {"kind": "math", "slots": {"numbers": [7, 11], "op": "+"}}
    claim, = verify.claims_in(row, "So it is 17.").values()
    assert claim[:3] == ("7 + 11 = 17.", "What is 7 + 11?", False)
    assert verify.is_it_true(claim) == "Is it true that 7 + 11 = 17?"
    assert verify.claims_in(row, "I am not sure.") == {}


def test_what_is_asked_about_a_fact():
    claim, = verify.claims_in({"kind": "fact"}, "A spider has 8 legs.").values()
    assert verify.is_it_true(claim) == "Is it true that a spider has 8 legs?"
    assert claim.question == "How many legs does a spider have?"


def test_what_is_left_counts_answers():
    claims = [verify.Claim("a", "", True, 0), verify.Claim("b", "", False, 0),
              verify.Claim("c", "", False, 1)]
    assert verify.what_is_left(claims, [1, 1, 1], 0.5, 4) == {"false": 0.5, "true": 0.25}
    assert verify.what_is_left(claims, [1, 0, 0.4], 0.5, 4) == {"false": 0.0, "true": 0.25}


def test_surest_takes_those_on_which_most_agree():
    scores = [0.1, 0.9, 0.5, 0.8]
    assert verify.surest(scores, [False, True, False, True], 0.5) == 1.0
    assert verify.surest(scores, [False, True, False, True], 1.0) == 0.5


# ---------------------------------------------------------------- search: beams

def test_the_best_partials_of_each_sum_are_kept_once():
    partials = [search.Partial(0, "a", 1.0),
                search.Partial(0, "a", 1.0),
                search.Partial(0, "b", 3.0),
                search.Partial(0, "c", 2.0),
                search.Partial(1, "d", 0.0)]
    kept = search.best_partials(partials, 2)
    assert [partial.text for partial in kept] == ["b", "c", "d"]


def test_a_beam_goes_on_step_by_step(monkeypatch):
    """The judge likes 5 x 4 = 20, which leads to the right end."""
    ends = {"": ["First 5 x 4 = 20. So it is 9.", "First 5 x 4 = 21. So it is 21."],
            "First 5 x 4 = 20.": ["So it is 20.", "So it is 20."]}

    def sample(model, tokenizer, ids, n, **settings):
        texts = []
        for prompt in ids:
            before = TOKENIZER.decode(prompt).split("assistant\n")[1]
            texts += ends.get(before, ["So it is 21."] * n)
        return type("Drawn", (), {"texts": texts})

    def weakest(judge, tokenizer, prompts, texts):
        return torch.tensor([1.0 if "= 20" in text else 0.0 for text in texts])
    monkeypatch.setattr(search, "sample", sample)
    monkeypatch.setattr(search, "weakest_steps", weakest)
    sums = [{"prompt": "What is 5 x 4?", "answer": "20"}]
    right, tokens = search.beam(None, TOKENIZER, None, sums, 2, search.Config())
    assert right == 1.0 and tokens > 0


def test_the_judge_of_steps_is_made_where_and_how_the_run_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)             # where there is none
    told = []
    monkeypatch.setattr(search.process_reward, "train", told.append)
    for name, stand_in in {"need": None, "load_scalar": (None, None), "read_sums": []}.items():
        monkeypatch.setattr(search, name, lambda *args, stand_in=stand_in: stand_in)
    monkeypatch.setattr(search, "compare", lambda *args: [])
    search.train(search.Config(models="a/sft,b/sft", bf16=True, quiet=True))
    assert told[0].bf16


@pytest.mark.parametrize("models, names", [
    ("out/sft,out/grpo", ["sft", "grpo"]), ("a/sft,b/sft,c/dpo", ["a/sft", "b/sft", "dpo"])])
def test_two_folders_have_two_names(monkeypatch, models, names):
    """Those of the pages are short."""
    for program in aloud, search:
        monkeypatch.setattr(program, "need", lambda *args: None)
        monkeypatch.setattr(program, "load", lambda folder, device: (folder, None))
    monkeypatch.setattr(aloud, "compare", lambda model, *args: (
        {key: [model == "b/sft"] for key in aloud.NAMES}, {"at_once": 1, "aloud": 2}))
    shares = aloud.train(aloud.Config(models=models, quick=True, quiet=True))["numbers"]["shares"]
    assert list(shares) == names
    assert [shares[name]["2"]["free"] for name in names] == [name == "b/sft" for name in names]
    monkeypatch.setattr(search, "load_scalar", lambda *args: (None, None))
    monkeypatch.setattr(search, "compare", lambda folder, *args: [{"model": folder}])
    config = search.Config(models=models, process="any", quick=True, quiet=True)
    numbers = search.train(config)["numbers"]
    folders = dict(zip(names, models.split(",")))
    assert numbers == {name: [{"model": folder}] for name, folder in folders.items()}


# ---------------------------------------------------------------- aloud

def row_of(*numbers):
    text = " + ".join(map(str, numbers))
    return {"prompt": f"What is {text}?", "kind": "math", "answer": str(sum(numbers)),
            "slots": {"numbers": list(numbers), "op": "+"}}


def test_how_many_sums_and_steps_there_are_by_hand():
    totals = range(2, 3 * 20 + 1)
    assert f"{19 ** 4:,}" in aloud.__doc__ and f"{len(totals) * 19:,}" in aloud.__doc__
    assert f"{0.98 ** 3:.2f}" == "0.94" and "= 0.94" in aloud.__doc__


def test_blurted_results_of_the_web_by_hand():
    """The docstring's 5.5 of 18: of a plain answer 45% are wrong, of a bad one all."""
    styles = generate.WEB_STYLES["math"]
    assert styles["plain"] + styles["bad"] == 18 and styles["plain"] * 0.55 == pytest.approx(5.5)
    rng = Random(0)
    hits = []
    while len(hits) < 1000:
        text = generate.web_answer(rng, row_of(7, 8))
        if "=" not in text:
            hits.append(text.endswith(" 15."))
    assert sum(hits) / 1000 == pytest.approx(5.5 / 18, abs=0.05)    # three deviations


def test_steps_of_the_web_by_hand():
    """The docstring's 95 of 100."""
    web = (HERE.parent / "data/web.txt").read_text(encoding="utf-8")
    steps = re.findall(r"(\d+) ([+x]) (\d+) = (\d+)", web)
    right = [studybuddy.calculate(int(a), op, int(b)) == int(c) for a, op, b, c in steps]
    assert round(100 * sum(right) / len(right)) == 95


def test_sums_have_so_many_numbers_and_are_the_exams():
    for terms in aloud.LENGTHS:
        for row in aloud.make_sums(Random(0), terms, 30):
            numbers = row["slots"]["numbers"]
            assert len(numbers) == terms and row["answer"] == str(sum(numbers))
            assert studybuddy.held_out(numbers)


def test_what_follows_from_a_wrong_step():
    """The docstring's example: 4 + 15 = 16, so 16 + 9 = 25."""
    found = {aloud.wrong_step(Random(seed), row_of(4, 15, 9)) for seed in range(50)}
    assert ("First 4 + 15 = 16.", "25") in found and len(found) == 8
    assert "28" not in {result for _, result in found}
    assert "First 4 + 15 = 16. ..  25 follows" in aloud.__doc__


def test_a_right_answer_concludes_and_ends():
    def right(text, ended=True):
        return aloud.is_right("28", aloud.Answer(text, ended, 9))
    assert right("So it is 28.") and right("First 4 + 15 = 19. Then 19 + 9 = 28. So it is 28.")
    assert right("First 4 + 15 = 16. So it is 28.")     # a wrong step beside it is not read
    assert not right("So it is 27.") and not right("So it is 28.", ended=False)
    assert not right("So it is 27. So it is 28.") and not right("First 19 + 9 = 28.")


def test_an_answer_is_begun_and_goes_on(monkeypatch):
    seen = []

    def sample(model, tokenizer, prompts, **settings):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        marks = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
        ended = torch.tensor([True, False])
        return SimpleNamespace(texts=["28.", "28."], answer=marks, ended=ended)
    monkeypatch.setattr(aloud, "sample", sample)
    messages = to_messages(row_of(4, 15, 9)["prompt"])
    begun_by = ["So it is", ""]
    answers = aloud.answer(None, TOKENIZER, [messages, messages], begun_by, aloud.Config())
    assert seen[0].endswith("<|im_start|>assistant\nSo it is")
    assert seen[1].endswith("<|im_start|>assistant\n")
    assert [one.text for one in answers] == ["So it is 28.", "28."]
    begun = len(TOKENIZER.encode_ordinary("So it is"))
    assert [one.tokens for one in answers] == [begun + 3, 1]
    assert [one.ended for one in answers] == [True, False]


def test_who_follows_and_who_resists(monkeypatch):
    """A parrot of the chain ends in what follows from it; one who knows ends in the truth."""
    def answers(model, tokenizer, conversations, beginnings, config):
        texts = []
        for messages, words in zip(conversations, beginnings):
            first, second, third = map(int, re.findall(r"\d+", messages[0]["content"]))
            total = first + second
            if model == "parrot" and "=" in words:
                total = int(words.split(" = ")[1].rstrip("."))
            texts.append(aloud.Answer(f"So it is {total + third}.", True, 4))
        return texts
    monkeypatch.setattr(aloud, "answer", answers)
    config = aloud.Config(quiet=True)
    for model, follows in ("parrot", True), ("knows", False):
        flags, tokens = aloud.compare(model, None, [row_of(4, 15, 9)], Random(0), config)
        assert flags["at_once"] == flags["aloud"] == [True] and tokens["free"] == 4
        assert flags["follows"] == [follows] and flags["resists"] == [not follows]


# ---------------------------------------------------------------- each runs

def run(module, **changes):
    config = module.Config(quick=True, quiet=True, **changes)
    numbers = module.train(config)["numbers"]
    picture = module.picture([numbers, numbers])
    assert picture.startswith("<svg") and "nan" not in picture.split("</style>")[1]
    assert json.loads(json.dumps(numbers)) == numbers or "NaN" in json.dumps(numbers)


def test_aloud_runs(folder):
    run(aloud, models=folder, max_new=8)


def test_search_runs(folder, tmp_path):
    save(tmp_path / "judge", M.ScalarModel(tiny_model()), TOKENIZER)
    judge = str(tmp_path / "judge")
    run(search, models=folder, judge=judge, process=judge,
        n=4, max_new=8)


def test_verify_runs(folder, monkeypatch):
    texts = ["Paris is the capital of France.", "A raven is green.", "It is 7."]

    def say(model, tokenizer, prompts, config, n=1, **settings):
        return [texts[i // n % 3] for i in range(len(prompts) * n)], 100
    monkeypatch.setattr(verify, "say", say)
    run(verify, init=folder)


def test_who_claims_nothing_is_told_so(folder):
    with pytest.raises(M.UserError, match="none of its 12 answers claims anything"):
        verify.train(verify.Config(init=folder, quick=True, quiet=True, max_new=8))


def test_grounded_runs(folder, tmp_path):
    run(grounded, init=folder, max_new=8,
        out=str(tmp_path / "out"))


def test_the_page_shows_figures_and_programs_that_there_are():
    page = (HERE / "7_thinking.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 120
    for name in ["aloud", "search", "verify", "grounded", "tools"]:
        assert f"python -m lessons.{name}" in page
    assert 5 <= page.count("<details>") <= 8
