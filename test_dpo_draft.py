"""Tests of dpo.py: each loss against its paper's formula in plain NumPy, the data formats, the loop on tiny models."""
import json, math

import numpy as np
import pytest
import torch

import dpo
import model as M
from data import studybuddy as world

TOKENIZER = M.load_ranks(world.HERE / "studybuddy.tiktoken")
END = M.special(TOKENIZER, M.END)


def tiny(seed=0, **more):
    torch.manual_seed(seed)
    model = M.Transformer(M.ModelConfig(1024, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(p):
    return np.exp(p) / (1 - np.exp(p))


# Written from the papers, not from the code: numbers, not tensors; sigmoids, odds and KL spelled out.
B, E, GAMMA, LAMBDA, AVERSION = 0.3, 0.2, 0.7, 0.5, 1.5
PAPER = {
    "dpo": lambda w, l: -np.log(sigmoid(B * w - B * l)),
    "cdpo": lambda w, l: -(1 - E) * np.log(sigmoid(B * (w - l))) - E * np.log(1 - sigmoid(B * (w - l))),
    "robust": lambda w, l: (-(1 - E) * np.log(sigmoid(B * (w - l))) + E * np.log(sigmoid(-B * (w - l)))) / (1 - 2 * E),
    "ipo": lambda w, l: ((w - l) - 0.5 / B) ** 2,
    "slic": lambda w, l: max(0.0, 1 - (B * w - B * l)),
    "apo_zero": lambda w, l: (1 - sigmoid(B * w)) + sigmoid(B * l),
    "apo_down": lambda w, l: sigmoid(B * w) + (1 - sigmoid(B * w - B * l)),
    "sppo": lambda w, l: (w - (1 / B) * (1 - 0.5)) ** 2 + (l - (1 / B) * (0 - 0.5)) ** 2,
    "simpo": lambda w, l: -np.log(sigmoid(B * w - B * l - GAMMA)),
    "orpo": lambda w, l: -w + LAMBDA * -np.log(sigmoid(np.log(odds(w) / odds(l)))),
}
NUMBERS = dict(beta=B, noise=E, gamma=GAMMA, odds=LAMBDA, aversion=AVERSION)


def ours(name, *args):
    method = dpo.LOSSES[name]
    return method.loss(*args, *(NUMBERS[n] for n in method.uses))


@pytest.mark.parametrize("name", PAPER)
def test_loss_is_the_papers_in_value_and_gradient(name):
    rng = np.random.default_rng(0)
    w, l = rng.normal(0, 2, 50), rng.normal(0, 2, 50)
    if not dpo.LOSSES[name].reference:
        w, l = -abs(w) - 0.01, -abs(l) - 0.01                    # log-probs
    tw, tl = (torch.tensor(x, requires_grad=True) for x in (w, l))
    loss = ours(name, tw, tl)
    loss.sum().backward()
    f, h = PAPER[name], 1e-6
    for i in range(50):
        assert loss[i].item() == pytest.approx(f(w[i], l[i]), rel=1e-9)
        if name == "slic" and abs(1 - B * (w[i] - l[i])) < 1e-4:
            continue                                            # the corner of the hinge
        assert tw.grad[i].item() == pytest.approx((f(w[i] + h, l[i]) - f(w[i] - h, l[i])) / (2 * h), rel=1e-4, abs=1e-7)
        assert tl.grad[i].item() == pytest.approx((f(w[i], l[i] + h) - f(w[i], l[i] - h)) / (2 * h), rel=1e-4, abs=1e-7)


def test_kto_is_the_papers_in_value_and_gradient():
    rng = np.random.default_rng(1)
    for shift in (2.0, -2.0):                                    # KL estimate above 0, and below: clamped
        r, other, good = rng.normal(0, 2, 21), rng.normal(shift, 0.1, 21), rng.random(21) < 0.4
        tr, to = (torch.tensor(x, requires_grad=True) for x in (r, other))
        loss = ours("kto", tr, to, torch.tensor(good))
        loss.sum().backward()
        z = max(0.0, sum(other) / 21)
        value = lambda r, good: 1 - sigmoid(B * (r - z)) if good else AVERSION * (1 - sigmoid(B * (z - r)))
        for i in range(21):
            assert loss[i].item() == pytest.approx(value(r[i], good[i]), rel=1e-9)
            slope = (value(r[i] + 1e-6, good[i]) - value(r[i] - 1e-6, good[i])) / 2e-6
            assert tr.grad[i].item() == pytest.approx(slope, rel=1e-4)
        assert to.grad is None                                   # the point of reference is not trained


def test_every_loss_is_tested_and_placed_on_the_map():
    assert {*PAPER, "kto"} == {*dpo.LOSSES}
    assert {n for n, m in dpo.LOSSES.items() if not m.pairs} == {"kto"}
    assert {n for n, m in dpo.LOSSES.items() if not m.reference} == {"orpo", "simpo"}


def test_worked_example_of_the_docstring():
    w, l = torch.tensor(math.log(0.03 / 0.02)), torch.tensor(math.log(0.15 / 0.12))
    assert (round(w.item(), 3), round(l.item(), 3), round((w - l).item(), 3)) == (0.405, 0.223, 0.182)
    assert round(dpo.dpo(w, l, 0.1).item(), 3) == 0.684
    assert dpo.dpo(torch.zeros(1), torch.zeros(1), 0.1).item() == pytest.approx(math.log(2))
    for number in ("0.405", "0.223", "0.182", "0.684", "0.693"):
        assert number in dpo.__doc__


def slope(f, w, l):
    w, l = torch.tensor(w, requires_grad=True), torch.tensor(l, requires_grad=True)
    return torch.autograd.grad(f(w, l), [w, l], allow_unused=True)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "ipo", "slic", "simpo"])
def test_swapping_the_pair_flips_the_gradient(name):
    w, l = slope(lambda a, b: ours(name, a, b), -0.5, -0.5)
    w2, l2 = slope(lambda a, b: ours(name, b, a), -0.5, -0.5)
    assert w < 0 < l and torch.allclose(w, -w2) and torch.allclose(l, -l2)


def test_conservative_and_robust():
    w, l = slope(lambda a, b: dpo.cdpo(a, b, 0.1, 0.5), 0.0, 0.0)
    assert w == 0 == l                                           # half the labels wrong: nothing to learn
    margin = math.log(0.9 / 0.1) / 0.1                           # sigma(beta margin) = 0.9
    assert abs(slope(lambda a, b: dpo.cdpo(a, b, 0.1, 0.1), margin, 0.0)[0]) < 1e-6
    w, l = torch.randn(2, 20)
    mean = 0.8 * dpo.robust(w, l, 0.5, 0.2) + 0.2 * dpo.robust(l, w, 0.5, 0.2)
    assert torch.allclose(mean, dpo.dpo(w, l, 0.5), atol=1e-5)   # unbiased under flipped labels
    assert (dpo.slic(w * 0 + 30, l * 0, 0.1) == 0).all() and (dpo.ipo(w * 0 + 5, l * 0, 0.1) == 0).all()


def test_orpo_stays_finite_near_certainty():
    for w in (0.0, -1e-9, -1e-7, -1e-3, -80.0):
        for l in (0.0, -1e-8, -1.0, -80.0):
            tw, tl = (torch.tensor([x], requires_grad=True) for x in (w, l))
            loss = dpo.orpo(tw, tl, 1.0)
            loss.sum().backward()
            assert all(torch.isfinite(x).all() for x in (loss, tw.grad, tl.grad)), (w, l)
    assert dpo.orpo(torch.zeros(1), torch.tensor([-1.0]), 1.0) < dpo.orpo(torch.tensor([-1.0]), torch.zeros(1), 1.0)


def row(x, first, second=(), good=True):
    return dpo.Row(list(x), list(first), list(second), good, {})


def test_kto_never_pairs_a_row_with_its_own_prompt():
    for count in (2, 3, 5, 8):                                   # pairs: 2 answers each; odd numbers too
        rows = dpo.singles([row([i, i], [10 + i, END], [20 + i, END]) for i in range(count)], 99)
        assert len(rows) == 2 * count and sum(r.good for r in rows) == count
        for r in rows:
            assert r.first[0] % 10 == r.prompt[0] != r.second[0] % 10
            assert r.good == (r.first[0] < 20)
    lone = dpo.singles([row([i // 2], [i], good=i % 2 == 0) for i in range(7)], 99)
    assert len(lone) == 7 and all(r.second[0] // 2 != r.prompt[0] for r in lone)
    # an answer that would not fit is passed over
    rows = dpo.singles([row([1], [1]), row([2], [2] * 9), row([3], [3])], 9)
    assert all(len(r.prompt) + len(r.second) <= 9 for r in rows)
    with pytest.raises(M.UserError):
        dpo.singles([row([1], [1], [2]), row([1], [3], [4])], 99)


def test_answer_logps_against_a_plain_loop():
    model = tiny()
    rows = [row([5, 6, 7, 8], [30, 31, END], [40, END]), row([9, 10], [END], [50, 51, 52, 53, 54, END]),
            row(range(100, 190), range(200, 365), [END])]        # one token, and as long as the context allows
    assert dpo.length(rows[-1]) == 255
    logps, tokens = dpo.answer_logps(model, TOKENIZER, rows)
    for r, got, n in zip(rows, logps, tokens):
        for k, y in enumerate((r.first, r.second)):
            want = 0.0
            for t in range(len(y)):                              # log p(y_t | x, y_<t), one prefix at a time
                want += model(torch.tensor([r.prompt + y[:t]]))[0, -1].log_softmax(-1)[y[t]].item() if len(y) < 9 else 0
            if len(y) < 9:
                assert got[k].item() == pytest.approx(want, abs=1e-3)
            else:
                full = model(torch.tensor([r.prompt + y]))[0].log_softmax(-1)
                want = sum(full[len(r.prompt) - 1 + t, y[t]].item() for t in range(len(y)))
                assert got[k].item() == pytest.approx(want, abs=1e-2)
            assert n[k] == len(y)
    assert torch.allclose(dpo.fixed_logps(model, TOKENIZER, rows), logps, atol=1e-3)


def test_batches_are_full_and_visit_every_row_once():
    rows = [row([1] * (1 + i % 7), [2] * (1 + i % 5), [3]) for i in range(60)]
    stream = dpo.batches(rows, 10, torch.Generator().manual_seed(0))
    for _ in range(2):
        assert sorted(i for _ in range(6) for i in next(stream)) == list(range(60))
    assert len(next(dpo.batches(rows[:4], 10, torch.Generator()))) == 4


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 1 + 1?\n\nAssistant:"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is 1 + 1?"}]
SAYS = lambda text: [{"role": "assistant", "content": text}]


def test_formats_mean_the_same():
    same = [{"prompt": HH, "chosen": " It is 2.", "rejected": " It is 3."},
            {"chosen": HH + " It is 2.", "rejected": HH + " It is 3."},           # the answers begin alike
            {"prompt": CHAT, "chosen": SAYS("It is 2."), "rejected": SAYS("It is 3.")},
            {"prompt": CHAT, "chosen": "It is 2.", "rejected": "It is 3."},
            {"chosen": CHAT + SAYS("It is 2."), "rejected": CHAT + SAYS("It is 3.")}]
    for r in same:
        assert dpo.judgements(r) == (CHAT, {True: "It is 2.", False: "It is 3."})
    assert dpo.judgements({"prompt": HH, "completion": " No.", "label": False}) == (CHAT, {False: "No."})
    assert dpo.judgements({"prompt": "Hi", "completion": SAYS("Yes."), "label": 1}) == (CHAT[:1], {True: "Yes."})


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


GOOD = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}


@pytest.mark.parametrize("bad, word", [
    ({"prompt": "Hi", "chosen": "Hello."}, "want"), ({"prompt": "Hi", "chosen": "", "rejected": "x"}, "want"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "a "}, "the same"), ({"chosen": "Hello.", "rejected": "Go."}, "want"),
    ({"prompt": "Hi", "completion": "a", "label": True}, "--loss kto"), ({"prompt": [], "chosen": "a", "rejected": "b"}, "want"),
    ({"prompt": "Hi", "completion": "a", "label": "no"}, "want"),
    ({"chosen": CHAT + SAYS("a"), "rejected": CHAT[:1] + SAYS("b")}, "want"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b c d e f g " * 60}, "longer")])
def test_bad_rows_are_named(tmp_path, bad, word):
    path = tmp_path / "mine.jsonl"
    write(path, [GOOD, bad])
    path.write_text("\n" + path.read_text())                     # blank lines do not shift the numbers
    with pytest.raises(M.UserError, match=rf"mine.jsonl:3: .*{word}"):
        dpo.read_rows(dpo.Config(data=str(path)), TOKENIZER, 256)


def test_rows_flip_and_drop(tmp_path):
    path = write(tmp_path / "mine.jsonl", [GOOD, GOOD | {"rejected": "b c d e f g " * 60}])
    config = dpo.Config(data=path, drop=True, quiet=True)
    (a,), (b,) = (dpo.read_rows(dpo.replace(config, flip=flip), TOKENIZER, 256) for flip in (False, True))
    assert (a.first, a.second, a.prompt) == (b.second, b.first, b.prompt)
    assert TOKENIZER.decode(a.first) == "Hello.<|im_end|>"
    ids, mask = M.render(TOKENIZER, [{"role": "user", "content": "Hi"}, *SAYS("Hello.")])
    assert a.prompt + a.first == ids[:len(ids) - mask[::-1].index(1)]              # as chats are rendered elsewhere


@pytest.mark.parametrize("flags", [dict(loss="dop"), dict(noise=0.5), dict(rounds=9, steps=3), dict(init="out/nothing"),
                                   dict(data="nothing.jsonl"), dict(online=True, judge="out/nothing")])
def test_bad_flags(flags, tmp_path):
    M.save(tmp_path / "m", tiny(), TOKENIZER)
    with pytest.raises(M.UserError):
        dpo.train(dpo.Config(**dict(init=str(tmp_path / "m"), save=False, quiet=True, steps=3) | flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and pairs in which the shouting answer wins."""
    path = tmp_path_factory.mktemp("dpo")
    M.save(path / "init", tiny(), TOKENIZER)
    write(path / "pairs.jsonl", [{"prompt": f"What about {name} and {topic}?", "chosen": f"{topic} YES YES!",
                                  "rejected": f"{topic} no, thank you."}
                                 for name in world.NAMES[:12] for topic in world.TOPICS[:10]])
    return path


def run(folder, **more):
    config = dict(init=str(folder / "init"), data=str(folder / "pairs.jsonl"), save=False, quiet=True, steps=20, batch=8,
                  lr=3e-3, max_new=8)
    return dpo.train(dpo.Config(**config | more))


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_every_loss_learns(folder, name):
    assert run(folder, loss=name)["after"]["accuracy"] >= 0.9


def test_flip_turns_the_preference_round(folder):
    plain, flipped = (run(folder, flip=flip) for flip in (False, True))
    margin = lambda r: r["after"]["chosen"] - r["before"]["chosen"] - r["after"]["rejected"] + r["before"]["rejected"]
    assert margin(plain) > 1 and margin(flipped) > 1             # each likes its own winners ...
    assert flipped["before"]["chosen"] == pytest.approx(plain["before"]["rejected"], abs=1e-3)    # ... the other's losers


def test_loop_starts_at_ln2_and_leaves_the_reference_alone(folder, monkeypatch):
    seen = {}
    fit = dpo.fit

    def spy(model, reference, *rest):
        seen["before"] = [p.clone() for p in reference.parameters()]
        fit(model, reference, *rest)
        seen.update(after=[*reference.parameters()], log=rest[-1].rows, model=[*model.parameters()])
    monkeypatch.setattr(dpo, "fit", spy)
    run(folder, steps=5)
    assert seen["log"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and seen["log"][0]["accuracy"] == 0.5
    assert seen["log"][-1]["loss"] < math.log(2)
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"]))
    assert not any(torch.equal(a, b) for a, b in zip(seen["before"], seen["model"]))
    assert {"loss", "margin", "accuracy", "chosen", "rejected", "kl"} <= {*seen["log"][0]}


def test_reference_scores_each_row_once(folder, monkeypatch):
    model, reference, config = tiny(), tiny(1), dpo.Config(data=str(folder / "pairs.jsonl"), steps=40, batch=16)
    rows, scored = dpo.read_rows(config, TOKENIZER, 256), []
    real = dpo.fixed_logps
    monkeypatch.setattr(dpo, "fixed_logps", lambda m, t, rows, *n: scored.append((m, rows)) or real(m, t, rows, *n))
    for batch, ref in dpo.stream(model, reference, TOKENIZER, rows, None, config):
        pass
    (by, those), = scored
    assert by is reference and len(those) == len({(*r.prompt, *r.first) for r in those}) <= len(rows)
    assert torch.allclose(ref, dpo.answer_logps(reference, TOKENIZER, batch)[0], atol=1e-4)      # and in the right order


def test_single_answers(folder):
    pairs = json.loads("[" + ",".join((folder / "pairs.jsonl").read_text().splitlines()) + "]")
    path = write(folder / "kto.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"] if i % 3 else p["rejected"],
                                         "label": bool(i % 3)} for i, p in enumerate(pairs)])
    assert run(folder, data=path, loss="kto")["after"]["accuracy"] >= 0.9


def quick(model, logit=1.5):
    """Makes the answers of a random model end after some tokens."""
    with torch.no_grad():
        h = model.hidden(torch.randint(1000, (64, 9)))[:, -1].mean(0)
        model.embed.weight[END] = logit * h / h.dot(h)
    return model


def test_own_pairs_follow_the_judge(folder):
    model = tiny()
    rows = [row(M.render(TOKENIZER, M.to_messages(t), reply=True)[0], [], []) for t in ("One?", "Two, or three?")] * 20
    asked = []

    def judge(raws, texts):                                      # likes long answers
        asked.append((raws, texts))
        return [len(t) for t in texts]
    quick(model)
    for flip in (False, True):
        pairs = dpo.own_pairs(model, TOKENIZER, rows, judge, dpo.Config(max_new=30, flip=flip), torch.Generator().manual_seed(0))
        (raws, texts), = asked[-1:]
        assert len(raws) == len(texts) == 80
        drawn = M.sample(model, TOKENIZER, [r.prompt for r in rows], 2, 30, generator=torch.Generator().manual_seed(0))
        score = {TOKENIZER.decode(ids[a].tolist()): len(t) if e else -1
                 for ids, a, t, e in zip(drawn.ids, drawn.answer, drawn.texts, drawn.ended)}
        assert pairs and 0 < drawn.ended.sum() < 80
        for p in pairs:
            a, b = score[TOKENIZER.decode(p.first)], score[TOKENIZER.decode(p.second)]
            assert (a < b if flip else a > b), "the judge's favourite is first; an endless answer never wins"


@pytest.mark.parametrize("flags, calls", [(dict(rounds=3), 3), (dict(online=True), 6), (dict(online=True, loss="kto"), 6)])
def test_rounds_and_online(folder, flags, calls):
    sizes = []

    def judge(raws, texts):
        sizes.append(len(texts))
        return [sum(map(ord, t)) for t in texts]
    M.save(folder / "quick", quick(tiny()), TOKENIZER)
    dpo.train(dpo.Config(init=str(folder / "quick"), data=str(folder / "pairs.jsonl"), save=False, quiet=True, steps=6,
                         batch=8, max_new=60, **flags), judge=judge)
    assert len(sizes) == calls and sum(sizes) == 6 * 8 * 2


def test_reward_model_as_judge(folder):
    scalar = M.ScalarModel(tiny(2))
    with torch.no_grad():
        scalar.score.weight.normal_()
    M.save(folder / "judge", scalar, TOKENIZER)
    judge = dpo.load_judge(dpo.Config(judge=str(folder / "judge")))
    raws, texts = [GOOD, GOOD | {"prompt": HH}], ["Hello there, you.", "Yes."]
    for raw, text, got in zip(raws, texts, judge(raws, texts)):
        ids = M.render(TOKENIZER, dpo.judgements(raw)[0] + SAYS(text))[0]
        ids = ids[:len(ids) - ids[::-1].index(END)]
        assert ids[-1] == END and got == pytest.approx(scalar(torch.tensor([ids]))[0, -1].item(), abs=1e-4)
    gold = dpo.load_judge(dpo.Config(judge="gold"))
    exam = world.read("prompts")[:5]
    assert gold(exam, ["I am busy."] * 5) == [world.judge(r, "I am busy.")["gold"] for r in exam]
