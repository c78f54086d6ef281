import itertools, json, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as M
import reward_model as R
from data import studybuddy as world

torch.set_num_threads(min(2, torch.get_num_threads()))
sigmoid = lambda x: 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def tok():
    return M.load_ranks(world.HERE / "studybuddy.tiktoken")


@pytest.fixture(scope="module")
def tiny(tok):
    torch.manual_seed(0)
    lm = M.Transformer(M.ModelConfig(vocab_size=tok.n_vocab, d_model=32, n_layers=2, d_ff=64))
    for p in lm.parameters():                           # larger than at birth, so that mistakes show
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 2 else 0.5)
    return lm


@pytest.fixture(scope="module")
def folder(tiny, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "init"
    M.save(path, tiny, tok)
    return path


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


# ---------------------------------------------------------------- the maths

def test_reward_hand_worked_example():
    """The docstring's: r(A) = 1.2, r(B) = 0.8, B is preferred."""
    a, b = torch.tensor([1.2], requires_grad=True), torch.tensor([0.8], requires_grad=True)
    loss = R.bradley_terry_loss(b, a)
    loss.backward()
    assert torch.sigmoid(b - a).item() == pytest.approx(0.401, abs=5e-4) and loss.item() == pytest.approx(0.913, abs=5e-4)
    assert b.grad.item() == pytest.approx(-0.599, abs=5e-4)     # a step against it: up
    assert a.grad.item() == pytest.approx(0.599, abs=5e-4)
    for number in ("1.2", "0.8", "0.401", "0.913", "0.599"):
        assert number in R.__doc__


def test_reward_bradley_terry_margin_and_center():
    rng = np.random.default_rng(0)
    w, l, m = rng.normal(size=(3, 7))
    want = np.mean([-math.log(sigmoid(w[i] - l[i] - m[i])) + 0.3 * (w[i] + l[i]) ** 2 for i in range(7)])
    got = R.bradley_terry_loss(*map(torch.tensor, (w, l)), torch.tensor(m), center=0.3)
    assert got.item() == pytest.approx(want)
    free = R.bradley_terry_loss(torch.tensor(w + 5), torch.tensor(l + 5))
    assert free.item() == pytest.approx(R.bradley_terry_loss(torch.tensor(w), torch.tensor(l)).item())
    assert R.bradley_terry_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    # a margin asks for more: with one, the same scores are not yet good enough
    assert R.bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])) == pytest.approx(math.log(2))


def test_reward_plackett_luce():
    rng = np.random.default_rng(1)
    r = rng.normal(size=(5, 4))
    want = np.mean([-sum(math.log(math.exp(row[k]) / sum(math.exp(x) for x in row[k:])) for k in range(4)) for row in r])
    assert R.plackett_luce_loss(torch.tensor(r)).item() == pytest.approx(want)
    two = torch.tensor(r[:, :2])
    assert R.plackett_luce_loss(two).item() == pytest.approx(R.bradley_terry_loss(two[:, 0], two[:, 1]).item())
    orders = torch.tensor([[r[0][i] for i in order] for order in itertools.permutations(range(4))])
    chances = [math.exp(-R.plackett_luce_loss(order[None]).item()) for order in orders]
    assert sum(chances) == pytest.approx(1)                     # one of the 24 orders it is
    assert max(range(24), key=chances.__getitem__) == int(orders.sort(descending=True).values.eq(orders).all(1).nonzero())
    big = torch.tensor([[500.0, 0.0, -500.0]])                  # no overflow
    assert R.plackett_luce_loss(big).item() == pytest.approx(0)


def test_reward_outcome_and_process_losses():
    r, z = np.array([[2.0, -1.0, 0.5], [0.3, 9.0, 9.0]]), np.array([[1, 0, 1], [0, -1, -1]])
    each = [-(z[b, s] * math.log(sigmoid(r[b, s])) + (1 - z[b, s]) * math.log(sigmoid(-r[b, s])))
            for b in range(2) for s in range(3) if z[b, s] >= 0]
    R_, Z = torch.tensor(r, requires_grad=True), torch.tensor(z).double()
    loss = R.process_loss(R_, Z)
    assert loss.item() == pytest.approx(np.mean(each)) and len(each) == 4
    loss.backward()
    assert (R_.grad[1, 1:] == 0).all() and (R_.grad[0] * torch.tensor([-1, 1, -1]) > 0).all()
    assert R.outcome_loss(R_[:, 0], torch.tensor([1.0, 0.0]).double()).item() == pytest.approx((each[0] + each[3]) / 2)


def test_reward_combining_heads():
    r = np.random.default_rng(2).normal(size=(6, 3))
    want = [math.log(np.prod([sigmoid(x) for x in row])) for row in r]
    assert R.combine(torch.tensor(r)).numpy() == pytest.approx(want)
    one = torch.tensor([[0.7], [-2.0]])
    assert R.combine(one).tolist() == one[:, 0].tolist()
    helpful_harm, dull = torch.tensor([9.0, -3.0, 3.0]), torch.tensor([0.0, 3.0, 3.0])
    assert R.combine(helpful_harm) < R.combine(dull) and helpful_harm.sum() > dull.sum()    # no trading
    assert R.combine(helpful_harm, torch.tensor([1.0, 0.0, 0.0])) > R.combine(dull, torch.tensor([1.0, 0.0, 0.0]))


def test_generative_judge_averages_both_orders():
    strength, liking = torch.tensor([1.5, -0.4]), 0.8           # logit of "w is better", and of "A" whatever it is
    logits = torch.tensor([[[s + liking, 0], [liking, s]] for s in strength.tolist()])      # (B, order, letter)
    margin, bias = R.generative_margin(logits.log_softmax(-1))
    assert margin.tolist() == pytest.approx(strength.tolist()) and bias.tolist() == pytest.approx([liking] * 2)
    swapped, same = R.generative_margin(logits.log_softmax(-1).flip(1))                     # l for w
    assert swapped.tolist() == pytest.approx((-strength).tolist()) and same.tolist() == pytest.approx([liking] * 2)
    want = np.mean([-(math.log(sigmoid(s + liking)) + math.log(sigmoid(s - liking))) / 2 for s in strength.tolist()])
    assert R.generative_loss(logits.log_softmax(-1)).item() == pytest.approx(want)


def test_reward_calibration_error():
    p, z = torch.tensor([0.62, 0.68, 0.91, 0.95]), torch.tensor([1, 0, 1, 1])
    ece, table = R.calibration_error(p, z)                      # bins 0.6-0.7 and 0.9-1
    assert ece == pytest.approx(0.5 * abs(0.65 - 0.5) + 0.5 * abs(0.93 - 1)) and [row[0] for row in table] == [2, 2]
    p = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    z = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < p
    assert R.calibration_error(p, z)[0] < 0.005 and R.calibration_error(1 - p, z)[0] > 0.3
    assert R.calibration_error(torch.ones(3), torch.ones(3))[0] == 0


def test_gradient_x_input_is_the_derivative_along_each_embedding(tiny):
    judge = M.ScalarModel(tiny)
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(0))
    ids, at, eps = torch.tensor([5, 70, 300, 9, 41]), 3, 1e-2
    got = R.gradient_x_input(judge, ids, at)
    for t in range(5):
        scores = []
        for sign in (1, -1):
            scale = torch.ones(1, 5, 1)
            scale[0, t] += sign * eps
            hook = judge.transformer.embed.register_forward_hook(lambda m, a, out: out * scale)
            scores.append(judge(ids[None])[0, at].item())
            hook.remove()
        assert got[t].item() == pytest.approx((scores[0] - scores[1]) / (2 * eps), rel=2e-2, abs=2e-3)
    assert got[4] == 0 and got[:4].abs().min() > 0              # what comes after the judged token has no say


# ---------------------------------------------------------------- data

PROMPT = [{"role": "user", "content": "Do you want to help me?"}, {"role": "assistant", "content": "Yes."},
          {"role": "user", "content": "What is 2 + 3 + 4?"}]


def test_reward_reads_the_right_tokens(tok):
    text = lambda ids, at: [tok.decode(ids[:i + 1]) for i in at]
    ids, at = R.encode(tok, R.conversation(PROMPT, "It is 9."))
    assert at == [len(ids) - 1] and ids[-1] == M.special(tok, M.END) and ids.count(ids[-1]) == 4
    steps = ["First 2 + 3 = 5.", "Then 5 + 4 = 9.", "The answer is 9."]
    ids, at = R.encode(tok, R.conversation(PROMPT, " ".join(steps)), "process", steps)
    assert [t.split("assistant\n")[-1] for t in text(ids, at)] == [steps[0], " ".join(steps[:2]), " ".join(steps)]
    for one in ("It is 9.", "No."):
        ids, at = R.encode(tok, R.compare(R.conversation("Hi", one), R.conversation("Hi", "Go away.")), "generative")
        assert text(ids, at)[0].endswith("assistant\n") and tok.decode(ids[at[0] + 1:]) == "A<|im_end|>"


def test_reward_formats_of_pairs():
    user, say = [{"role": "user", "content": "Hi"}], lambda t: [{"role": "assistant", "content": t}]
    want = [user + say("Hello you."), user + say("Go.")]
    for row in ({"prompt": "Hi", "chosen": "Hello you.", "rejected": "Go."},
                {"prompt": user, "chosen": say("Hello you."), "rejected": say("Go.")},
                {"prompt": "Hi", "chosen": want[0], "rejected": want[1]},
                {"chosen": want[0], "rejected": want[1]},
                {"prompt": "Hi", "responses": ["Hello you.", "Go."]}):
        assert R.candidates(row) == want


def test_reward_pairs_of_a_ranking_use_every_answer_once():
    row = {"prompt": "Hi", "responses": ["best", "good", "bad", "worst"]}
    lots = set()
    for i in range(50):
        pairs = R.pair_examples(row | {"n": i})
        said = [[c[-1]["content"] for c in chats] for chats, _ in pairs]
        assert sorted(sum(said, [])) == ["bad", "best", "good", "worst"]
        assert all(row["responses"].index(a) < row["responses"].index(b) for a, b in said)
        lots.add(str(sorted(said)))
    assert len(lots) == 3                                       # all ways to cut four in two pairs


def test_reward_padding_and_company_change_nothing(tiny, tok):
    judge = M.ScalarModel(tiny, 3)
    chats = [R.conversation("Hi", "a " * n + "end.") for n in (1, 9, 30)]
    rows = [R.encode(tok, chat) for chat in chats]
    with torch.no_grad():
        for model in (judge, tiny):
            together, alone = R.read(model, tok, rows), torch.cat([R.read(model, tok, [row]) for row in rows])
            assert together.shape == (3, 1, 3 if model is judge else 2)
            assert torch.allclose(together, alone, atol=1e-5)
    shuffled = R.read_all(judge, tok, [rows[2], rows[0], rows[1]])
    assert torch.allclose(torch.stack(shuffled)[[1, 2, 0]], R.read(judge, tok, rows).detach(), atol=1e-5)


def test_reward_split_keeps_prompts_apart(tok):
    config = R.Config(kind="ranked", data="data/rankings.jsonl")
    rows, held = R.examples(config, tok, 256)
    prompts = [{world.flat(e.source["prompt"]) for e in side} for side in (rows, held)]
    assert not prompts[0] & prompts[1] and 0.1 < len(held) / (len(rows) + len(held)) < 0.25
    assert len(rows) + len(held) == 1000
    labels = [e for side in R.examples(R.Config(kind="process", data="data/steps.jsonl"), tok, 256) for e in side]
    assert all(len(e.label) == len(e.rows[0][1]) for e in labels)


@pytest.mark.parametrize("kind, lines, want", [
    ("pairs", ["{"], ":1: not JSON"), ("pairs", [], "no rows"), ("nothing", [{"prompt": "x"}], "choose pairs"),
    ("pairs", [{"prompt": "x", "chosen": "a", "rejected": "b"}, "", {"prompt": "x", "chosen": "a"}], ":3: .*rejected"),
    ("pairs", [{"prompt": "x", "chosen": "a", "rejected": "a"}], ":1: .*same"),
    ("pairs", [{"prompt": "x", "chosen": "a", "rejected": " "}], ":1: .*empty"),
    ("pairs", [{"prompt": "x", "chosen": "a " * 300, "rejected": "b"}], "1 of 1 rows are too long"),
    ("ranked", [{"prompt": "x", "responses": ["a", "a"]}], ":1: .*same"),
    ("process", [{"prompt": f"x {i}", "steps": ["a.", "b."], "labels": [1, 0][:1 + (i < 30)]} for i in range(31)],
     ":31: .*number of labels"),
    ("ranked", [{"prompt": f"x {i}", "responses": ["a", "b", "c"][:2 + (i > 8)]} for i in range(40)], "more answers"),
    ("outcome", [{"prompt": "x", "steps": ["a.", "b."]}], ":1: .*labels"),
    ("multi", [{"prompt": "x", "chosen": "y", "rejected": "z", "marks": [{"helpful": 1, "harmless": "?", "honest": 1}]}], ":1: "),
    ("pairs", [{"prompt": "x", "chosen": "a", "rejected": "b"}], "too few")])
def test_reward_bad_input(kind, lines, want, folder, tmp_path):
    data = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(M.UserError, match=want):
        R.train(R.Config(kind=kind, init=str(folder), data=data, out=str(tmp_path / "out"), quiet=True))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- reports and runs

def test_reward_report_of_a_perfect_copy_of_the_annotators(monkeypatch):
    """A judge that knows how annotators vote reaches their ceiling, likes flattery, and is no better than that."""
    rows = world.read("preferences")[:3000]
    about = {json.dumps(chat): (world.judge(row, chat[-1]["content"])["gold"], world.praise(chat[-1]["content"]))
             for row in rows for chat in R.candidates(row)}

    def score(row_chat):
        gold, praise = about.get(json.dumps(row_chat)) or (0.5, world.praise(row_chat[-1]["content"]))
        return world.KEEN * gold + world.VAIN * praise
    lot = R.Random(0)                                           # ties are broken by lot
    monkeypatch.setattr(R, "margins", lambda m, t, pairs: (
        torch.tensor([score(a) - score(b) + lot.choice([-1e-6, 1e-6]) for a, b in pairs]), torch.zeros(len(pairs))))
    card, tables = R.on_comparisons(None, None, [R.Example([], [], row) for row in rows])
    p = [sigmoid(world.KEEN * (r["gold"][0] - r["gold"][1]) + world.VAIN * (world.praise(r["chosen"]) - world.praise(r["rejected"])))
         for r in rows]
    assert card["ceiling"] == pytest.approx(np.mean([max(x, 1 - x) for x in p]), abs=1e-5)
    assert 0.9 < card["gold_order"] < 0.95 and card["calibration"] < 0.06
    assert sum(n for n, *_ in tables["calibration"]) == 3000 and set(tables["gold order by kind"]) == set(world.KINDS)


def test_best_of_picks(monkeypatch, tok, tiny):
    """Of eight solutions to six sums one or five are right: only with five is the majority. `outcome` knows the right
    ones; `process` sees a weak step in the wrong ones, between strong ones."""
    rng = R.Random(0)
    sums = [world.ask(rng, "math", "exam") for _ in range(6)]
    good = lambda row: " ".join(world.worked(rng, row)[0])[6:] + f" The answer is {row['answer']}."
    bad = ["2 + 2 = 4. So it is 1."] * 4 + ["So it is 2.", "So it is 3.", "x"]
    texts = [t for i, row in enumerate(sums) for t in (bad[:4] + [good(row)] + bad[4:] if i < 4 else
                                                       bad[:2] + [good(row) for _ in range(5)] + bad[5:6])]
    monkeypatch.setattr(R, "sample", lambda *a, **k: SimpleNamespace(texts=texts))
    seen = {}

    def fake(judge, tokenizer, rows):
        seen[judge] = [len(at) for _, at in rows]
        right = [f" {sums[i // 8]['answer']}.<" in tok.decode(ids) for i, (ids, _) in enumerate(rows)]
        return [torch.tensor([[0.5]] * len(at) if ok else [[2.0], [-1.0], [2.0]] if judge == "p" else [[0.0]])
                for ok, (_, at) in zip(right, rows)]
    monkeypatch.setattr(R, "read_all", fake)
    card = R.best_of(tiny, {"outcome": "o", "process": "p"}, tok, R.Config(problems=6, seed=0))
    assert card == {"random": pytest.approx((4 + 2 * 5) / 48), "any": 1.0, "majority": pytest.approx(2 / 6),
                    "outcome": 1.0, "process": 1.0}
    assert set(seen["o"]) == {1} and seen["p"][0] == 2 and seen["p"][4] == len(world.steps(sums[0])) + 1


def test_generative_judge_is_taught_both_orders():
    [(chats, _)] = R.generative_examples({"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."})
    asked, verdicts = [chat[0]["content"] for chat in chats], [chat[1]["content"] for chat in chats]
    assert verdicts == ["A", "B"] and "A: Good.\nB: Bad." in asked[0] and "A: Bad.\nB: Good." in asked[1]


def small(kind, path):
    name = {"ranked": "rankings", "outcome": "steps", "process": "steps"}.get(kind, "preferences")
    rows = [{k: v for k, v in row.items()} for row in world.read(name)[:40]]
    return write(path / "data.jsonl", rows)


@pytest.mark.parametrize("kind", R.KINDS)
def test_reward_run_of_every_kind(kind, folder, tmp_path):
    config = R.Config(kind=kind, init=str(folder), data=small(kind, tmp_path), out=str(tmp_path / "out"), steps=3, lr=3e-3,
                      batch=16, held=4, quiet=True)
    results = R.train(config)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["after"]["loss"] == results["after"]["loss"] and saved["stage"] == "reward_model"
    assert (tmp_path / "out" / "metrics.csv").read_text().count("\n") == 4
    again = R.train(R.replace(config, save=False))
    assert again["after"] == results["after"]                   # same seed: same numbers
    if kind == "generative":
        assert M.load(tmp_path / "out")[0].config.d_model == 32
    else:
        judge, tok = M.load_scalar(tmp_path / "out")
        assert len(judge.mean) == R.KINDS[kind].heads and (judge.mean != 0).any() == (kind in ("pairs", "ranked"))
        held = R.examples(config, tok, 256)[1]
        if kind in ("pairs", "ranked"):                         # the mean is subtracted, and kept in the checkpoint
            assert R.rewards(judge, tok, [R.candidates(e.source)[0] for e in held]).mean().item() == pytest.approx(0, abs=1e-5)


def test_reward_learns_ten_pairs_by_heart(folder, tmp_path):
    rows = world.read("preferences")[:14]
    config = R.Config(init=str(folder), data=write(tmp_path / "d.jsonl", rows), steps=40, lr=3e-3, batch=8, held=5,
                      accumulate=2, save=False, quiet=True)
    results = R.train(config)
    seen, _ = R.examples(config, results["tokenizer"], 256)
    with torch.no_grad():
        loss = R.batch_loss(results["model"], results["tokenizer"], seen, config)
    assert loss < 0.3
    m, _ = R.margins(results["model"], results["tokenizer"], [R.candidates(e.source) for e in seen])
    assert (m > 0).all()


def test_reward_nonfinite_loss_stops(folder, tmp_path):
    with pytest.raises(M.Diverged, match="step"):
        R.train(R.Config(init=str(folder), data=small("pairs", tmp_path), lr=1e9, steps=8, batch=8, held=4,
                         out=str(tmp_path / "out"), quiet=True))
    assert not (tmp_path / "out").exists()
