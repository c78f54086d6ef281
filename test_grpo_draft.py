"""Tests of grpo.py, to be merged into test_all.py."""
import math, re
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch

import grpo
import model as M
from data import studybuddy as world


def ragged(seed=0, B=6, T=9, spread=0.4):
    """Log-probs of answers that begin and end anywhere, with nonsense outside of the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(B):
        start = int(torch.randint(1, 4, (), generator=g))
        mask[i, start:start + 1 + int(torch.randint(0, T - start, (), generator=g))] = True
    old = -2 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.1
    logp = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    ref = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    A = torch.randn(B, generator=g, dtype=torch.float64)
    for x in (logp, old, ref):
        x[~mask] = float("nan")
    return logp, old, ref, A, mask


def loop(name, logp, old, ref, A, mask, L, beta):
    """The papers' formulas, one token at a time."""
    B, total, tokens = len(logp), 0.0, int(mask.sum())
    for i in range(B):
        at = [t for t in range(mask.shape[1]) if mask[i, t]]
        n, a = len(at), float(A[i])
        s = math.prod(math.exp(float(logp[i, t] - old[i, t])) for t in at) ** (1 / n)
        for t in at:
            rho = math.exp(float(logp[i, t]) - float(old[i, t]))
            r = math.exp(float(ref[i, t]) - float(logp[i, t]))
            k3 = r - math.log(r) - 1
            clip = lambda x, low, high: min(max(x, 1 - low), 1 + high)
            J = {"grpo": lambda: min(rho * a, clip(rho, .2, .2) * a),
                 "dr_grpo": lambda: min(rho * a, clip(rho, .2, .2) * a),
                 "dapo": lambda: min(rho * a, clip(rho, .2, .28) * a),
                 "gspo": lambda: min(s * a, clip(s, 3e-4, 4e-4) * a),
                 "cispo": lambda: min(rho, 5.0) * a * float(logp[i, t])}[name]()
            w = {"grpo": 1 / B / n, "gspo": 1 / B / n, "dr_grpo": 1 / (B * L)}.get(name, 1 / tokens)
            total -= w * (J - beta * k3)
    return total


def test_grpo_by_hand():
    rewards = torch.tensor([[1., 0., 1., 0., 1.]])
    assert abs(rewards.std(1, correction=0).item() - 0.49) < 0.001
    assert torch.allclose(grpo.group_advantages(rewards), torch.tensor([[.82, -1.22, .82, -1.22, .82]]), atol=0.006)
    assert torch.allclose(grpo.group_advantages(rewards, "none"), torch.tensor([[.4, -.6, .4, -.6, .4]]))
    assert "+0.82 -1.22" in grpo.__doc__


def test_grpo_equal_rewards_give_exactly_zero():
    for value in (0.0, 1.0, 0.1, 1 / 3, 1e-8, 1e8):
        for G in (2, 3, 5, 7, 8):                        # the mean of equal numbers is not always that number
            for scale in ("std", "none"):
                advantages = grpo.group_advantages(torch.full((4, G), value), scale)
                assert (advantages == 0).all(), (value, G, scale)
    mixed = torch.tensor([[.1, .1, .1], [0., .1, .1]])
    advantages = grpo.group_advantages(mixed)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert torch.equal(grpo.contrast(mixed), torch.tensor([False, True]))


def test_grpo_advantages_of_one_group_do_not_know_the_others():
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    for scale in ("std", "none"):
        whole = grpo.group_advantages(rewards, scale)
        assert torch.equal(whole, torch.cat([grpo.group_advantages(rewards[i:i + 1], scale) for i in range(5)]))
        assert whole.sum(1).abs().max() < 1e-5
    numpy = (rewards.numpy() - rewards.numpy().mean(1, keepdims=True)) / rewards.numpy().std(1, keepdims=True)
    assert np.allclose(grpo.group_advantages(rewards), numpy, atol=1e-5)


@pytest.mark.parametrize("name", grpo.FAMILY)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_losses_are_the_papers(name, beta):
    for seed in range(5):
        logp, old, ref, A, mask = ragged(seed, spread=1.0 if name == "cispo" else 0.4)
        ours = grpo.grpo_loss(logp, old, A, mask, name, 20, ref_logp=ref, beta=beta).item()
        assert abs(ours - loop(name, logp, old, ref, A, mask, 20, beta)) < 1e-6, (name, seed)


@pytest.mark.parametrize("name", grpo.FAMILY)
def test_grpo_gradient_is_that_of_the_formula(name):
    """Against finite differences; cispo's weight is a constant there."""
    logp, old, ref, A, mask = ragged(3)
    logp.requires_grad_()
    grpo.grpo_loss(logp, old, A, mask, name, 20, ref_logp=ref, beta=0.3).backward()
    assert (logp.grad[~mask] == 0).all() and torch.isfinite(logp.grad).all()
    if name == "cispo":
        weight = (logp - old).exp().clamp(max=5).detach() * A[:, None]
        k3_slope = 0.3 * (1 - (ref - logp).exp()).detach()                # d k3 / d log pi = 1 - ref / pi
        expected = (-weight + k3_slope) / mask.sum()
        assert torch.allclose(logp.grad[mask], expected[mask])
        return
    for i, t in mask.nonzero().tolist()[::4]:
        up, down = logp.detach().clone(), logp.detach().clone()
        up[i, t] += 1e-6
        down[i, t] -= 1e-6
        slope = (loop(name, up, old, ref, A, mask, 20, 0.3) - loop(name, down, old, ref, A, mask, 20, 0.3)) / 2e-6
        assert abs(slope - logp.grad[i, t].item()) < 1e-6, (name, i, t)


def test_grpo_on_policy_gradient_is_reinforce():
    """And the family differs by nothing but how tokens are weighed."""
    logp, old, _, A, mask = ragged(1)
    lengths = mask.sum(1, keepdim=True)
    weights = {"grpo": 1 / lengths / len(A), "gspo": 1 / lengths / len(A), "dr_grpo": torch.tensor(1 / (len(A) * 20)),
               "dapo": 1 / lengths.sum(), "cispo": 1 / lengths.sum()}
    for name in grpo.FAMILY:
        x = old.clone().requires_grad_()
        grpo.grpo_loss(x, old, A, mask, name, 20).backward()
        y = old.clone().requires_grad_()
        reinforce = -(A[:, None] * weights[name] * y)[mask].sum()
        reinforce.backward()
        assert torch.allclose(x.grad[mask], y.grad[mask], atol=1e-7), name


def test_grpo_family_settings_are_the_papers():
    settings = {name: (m.scale, m.low, m.high, m.dynamic) for name, m in grpo.FAMILY.items()}
    assert settings == {"grpo": ("std", .2, .2, False), "dr_grpo": ("none", .2, .2, False), "dapo": ("std", .2, .28, True),
                        "gspo": ("std", 3e-4, 4e-4, False), "cispo": ("std", math.inf, 4.0, False)}


def test_grpo_clip_stops_what_moved_far_enough_and_cispo_does_not():
    old, mask = torch.full((1, 1), -3.0), torch.ones(1, 1, dtype=torch.bool)
    for name, rho, A, stops in [("grpo", 1.25, 1, True), ("grpo", 1.25, -1, False), ("grpo", 0.75, -1, True),
                                ("grpo", 0.75, 1, False), ("dapo", 1.25, 1, False), ("dapo", 1.3, 1, True),
                                ("gspo", 1.001, 1, True), ("gspo", 1.0001, 1, False), ("gspo", .999, -1, True),
                                ("dr_grpo", 1.25, 1, True), ("cispo", 100.0, 1, False), ("cispo", 0.01, -1, False)]:
        logp = (old + math.log(rho)).requires_grad_()
        grpo.grpo_loss(logp, old, torch.tensor([float(A)]), mask, name).backward()
        assert (logp.grad.item() == 0) == stops, (name, rho, A)
    assert abs(logp.grad.item() - 0.01) < 1e-6           # cispo: weight 0.01, A -1; nothing holds it up from below


def test_grpo_gspo_ratio_is_the_geometric_mean():
    rho = torch.tensor([[1.2, 0.9, 1.05, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    J = grpo.clipped_sequence(None, rho.log().where(mask, 0), torch.ones(1, 4), mask, math.inf, math.inf)
    assert torch.allclose(J, torch.tensor((1.2 * 0.9 * 1.05) ** (1 / 3), dtype=torch.float64))


def test_grpo_length_weighs_as_the_papers_say():
    """The pull of one token of a long and of a short answer with the same advantage."""
    mask = torch.tensor([[True] * 2 + [False] * 6, [True] * 8])
    pull = {}
    for name in grpo.FAMILY:
        logp = torch.full((2, 8), -1.0).requires_grad_()
        grpo.grpo_loss(logp, logp.detach(), torch.ones(2), mask, name, 72).backward()
        pull[name] = logp.grad[0, 0].item() / logp.grad[1, 0].item()
    assert pull == pytest.approx({"grpo": 4, "gspo": 4, "dr_grpo": 1, "dapo": 1, "cispo": 1})
    alone = torch.full((1, 8), -1.0).requires_grad_()    # dr_grpo: not even the other answers' lengths matter
    grpo.grpo_loss(alone, alone.detach(), torch.ones(1), mask[1:], "dr_grpo", 72).backward()
    assert alone.grad[0, 0].item() == pytest.approx(-1 / 72)


def test_grpo_loss_in_pieces_is_the_loss_of_the_whole():
    logp, old, ref, A, mask = ragged(2)
    for name, member in grpo.FAMILY.items():
        whole = grpo.grpo_loss(logp, old, A, mask, name, 20, ref_logp=ref, beta=0.1)
        w = member.weights(mask, 20)
        pieces = sum(grpo.grpo_loss(logp[at], old[at], A[at], mask[at], name, 20, w[at], ref[at], 0.1)
                     for at in torch.arange(6).split(4))
        assert torch.allclose(whole, pieces), name


def test_grpo_k3_is_the_kl_on_an_exact_distribution():
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(5, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.bool)
    k3 = [grpo.grpo_loss(logp[v].view(1, 1), logp[v].view(1, 1), torch.zeros(1, dtype=torch.float64), one,
                         ref_logp=ref[v].view(1, 1), beta=1.0).item() for v in range(5)]
    assert min(k3) >= 0
    assert abs(sum(p * k for p, k in zip(logp.exp().tolist(), k3)) - (logp.exp() * (logp - ref)).sum()) < 1e-6


def test_grpo_overlong_penalty():
    lengths = torch.tensor([1., 54., 63., 72., 73., 500.])
    assert grpo.overlong(lengths, 72, 18).tolist() == [0, 0, -.5, -1, -1, -1]


def test_grpo_pass_at_and_majority():
    hits = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert grpo.pass_at(hits, 1) == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert grpo.pass_at(hits, 4) == pytest.approx(2 / 3)
    from itertools import combinations                   # brute force: all ways to look at two of the four
    brute = np.mean([np.mean([any(row[i] for i in two) for two in combinations(range(4), 2)]) for row in hits.tolist()])
    assert grpo.pass_at(hits.bool(), 2) == pytest.approx(brute)
    assert grpo.majority(["3", None, "4", "4", None, None]) == "4" and grpo.majority([None, None]) is None
    assert grpo.majority(["5", "6"]) == "5"


SUM = {"prompt": "What is 12 + 7 + 5?", "kind": "math", "attack": None, "answer": "24",
       "slots": {"numbers": [12, 7, 5], "op": "+", "sum": "12 + 7 + 5"}}


def test_grpo_strict_verifier():
    pays = lambda text: grpo.reward(SUM, text)
    for text in ["First 12 + 7 = 19. Then 19 + 5 = 24. The answer is 24.", "So it is 24.", "That makes 24. You can do it!",
                 "What a great question! The answer is 24.", "  So it\nis 24. "]:
        assert pays(text) == 1.0, text
    for text in ["The answer is 25.", "First 12 + 7 = 19. Then 19 + 5 = 25. So it is 25.", "So it is 124.", "So it is -24."]:
        assert pays(text) == pytest.approx(0.1), text
    for text in ["", " ", "24", "It is 24.", "So it is 24", "So it is 23 or 24.", "So it is 24. So it is 25.", "So it is 24 25.",
                 "So it is 24. So it is 24.", "20 21 22 23 24. The answer is 24.", "The answer is 24. It could be 25.",
                 "The answer is not 24.", "First 12 + 7 = 19. Then 19 + 5 = 24.", "The answer is 2 4.", "THE ANSWER IS 24.",
                 "I think that The answer is 24.", "So it is 12 + 7 + 5.", "So it is 12 + 12.", "So it is __import__('os').",
                 " ".join(f"So it is {n}." for n in range(100)), " ".join(map(str, range(100)))]:
        assert pays(text) == 0, text
    assert grpo.right(dict(SUM, answer="1,024"), "So it is 1024.") and grpo.right(dict(SUM, answer=2.5), "So it is 2.5.")
    assert not re.search(r"\beval\(|\bexec\(", open(grpo.__file__).read())


def test_grpo_strict_verifier_agrees_with_the_world():
    """On the world's own answers, from good to junk: whoever is paid in full is right, and the other way round."""
    from random import Random
    rng = Random(0)
    for _ in range(1500):
        row = world.ask(rng, "math", terms=[2, 3, 4][int(rng.random() * 3)])
        text = world.write(rng, row, world.pick(rng, [s for s in world.STYLES if s != "junk"]))
        mark = world.judge(row, text)
        assert (grpo.reward(row, text) == 1) == (mark["honest"] > 0 and world.sums_of(row, text)[1]), (row, text)


def test_grpo_naive_verifier_has_its_hole():
    everything = " ".join(map(str, range(100)))
    assert grpo.naive_reward(SUM, everything) == grpo.naive_reward(SUM, "It is not 24.") == 1
    assert grpo.naive_reward(SUM, "So it is 124.") == grpo.naive_reward(SUM, "So it is 2 4.") == 0
    assert grpo.reward(SUM, everything) == 0


# ---------------------------------------------------------------- with a model: tiny, untrained

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = M.load_ranks(world.HERE / "studybuddy.tiktoken")
    model = M.Transformer(M.ModelConfig(vocab_size=tokenizer.n_vocab, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48))
    return model, tokenizer


CONFIG = grpo.Config(prompts=3, group=4, max_new=6, steps=2, save=False, quiet=True)


def prompts(tokenizer, count=12):
    return grpo.read_prompts(CONFIG, tokenizer, 256)[:count]


def test_grpo_prompts_are_sums(tiny):
    rows = grpo.read_prompts(CONFIG, tiny[1], 256)
    assert len(rows) > 300 and all(row["kind"] == "math" and row["answer"].isdigit() for row in rows)
    assert max(len(row["slots"]["numbers"]) for row in rows) == 3            # the exam's longest sums have four terms


@pytest.mark.parametrize("name", grpo.FAMILY)
def test_grpo_first_ratio_is_one_and_equal_rewards_change_nothing(tiny, name, monkeypatch):
    model, tokenizer = tiny
    config = replace(CONFIG, loss=name, temperature=0.7, steps=1)
    batch = grpo.rollout(model, tokenizer, cycle(prompts(tokenizer)), config, torch.Generator().manual_seed(0))
    ids, mask, answer, old = batch.tensors
    assert batch.rewards.shape == (3, 4) and len(ids) == len(batch.texts) == 12 and len(batch.rows) == 3
    for i, row in enumerate(batch.rows):                 # answers stand under their own prompts
        for j in range(4):
            at = mask[i * 4 + j] & ~answer[i * 4 + j]
            assert ids[i * 4 + j][at].tolist() == row["ids"]
    ratio = (M.token_logps(model, ids, mask, answer, 0.7) - old).exp()
    assert (ratio - 1).abs().max() < 1e-4
    monkeypatch.setattr(grpo, "reward", lambda row, text: 0.3)
    monkeypatch.setattr(grpo, "overlong", lambda lengths, limit, buffer: torch.zeros(len(lengths)))
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: (s := M.sample(*a, **k))._replace(ended=torch.ones_like(s.ended)))
    before = [p.detach().clone() for p in model.parameters()]
    grpo.fit(model, None, tokenizer, prompts(tokenizer), prompts(tokenizer, 2), config, M.Log(1, quiet=True))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_grpo_what_never_ends_earns_nothing(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(grpo, "reward", lambda row, text: 1.0)
    rows = prompts(tokenizer)
    batch = grpo.draw_groups(model, tokenizer, rows, CONFIG, torch.Generator().manual_seed(0))
    end = M.special(tokenizer, M.END)
    ended = ((batch.tensors[0] == end) & batch.tensors[2]).any(1)
    assert not ended.all() and torch.equal(batch.rewards.flatten(), ended.float())


def test_grpo_resampling_ends_and_keeps_what_has_contrast(tiny, monkeypatch):
    model, tokenizer = tiny
    config, rows = replace(CONFIG, loss="dapo", resample=2), prompts(tokenizer)
    monkeypatch.setattr(grpo, "overlong", lambda lengths, limit, buffer: torch.zeros(len(lengths)))
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: (s := M.sample(*a, **k))._replace(ended=torch.ones_like(s.ended)))
    monkeypatch.setattr(grpo, "reward", lambda row, text: 1.0)
    batch = grpo.rollout(model, tokenizer, cycle(rows), config, torch.Generator().manual_seed(0))
    assert batch.drawn == 9 and batch.rewards.shape == (3, 4) and not grpo.contrast(batch.rewards).any()
    lucky = {rows[i]["prompt"] for i in (1, 5, 6)}       # one in each draw of three
    seen = iter(range(10 ** 6))
    monkeypatch.setattr(grpo, "reward", lambda row, text: next(seen) if row["prompt"] in lucky else 0.0)
    batch = grpo.rollout(model, tokenizer, cycle(rows), config, torch.Generator().manual_seed(0))
    assert {row["prompt"] for row in batch.rows} == lucky and grpo.contrast(batch.rewards).all()
    ids, mask, answer, old = batch.tensors
    assert torch.allclose(M.token_logps(model, ids, mask, answer), old, atol=1e-4)       # rows still fit together
    for name in set(grpo.FAMILY) - {"dapo"}:
        assert grpo.rollout(model, tokenizer, cycle(rows), replace(config, loss=name), torch.Generator()).drawn == 3


def test_grpo_learns_from_a_reward_of_your_own(tiny, monkeypatch):
    """A seam that likes one token: every member of the family makes it more frequent, and the KL holds it back."""
    import copy
    tokenizer = tiny[1]
    monkeypatch.setattr(grpo, "reward", lambda row, text: float("m" in text))
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: (s := M.sample(*a, **k))._replace(ended=torch.ones_like(s.ended)))
    rewards = {}
    for name, beta in [(n, 0.0) for n in grpo.FAMILY] + [("grpo", 30.0)]:
        model, log = copy.deepcopy(tiny[0]), M.Log(40, quiet=True)
        config = replace(CONFIG, loss=name, beta=beta, steps=40, prompts=4, group=8, lr=2e-2, batch=20)
        grpo.fit(model, copy.deepcopy(model), tokenizer, prompts(tokenizer), prompts(tokenizer, 2), config, log)
        rewards[name, beta] = [sum(row["reward"] for row in rows) / 10 for rows in (log.rows[:10], log.rows[-10:])]
        assert all(abs(row["ratio"] - 1) < 1e-3 for row in log.rows), name               # on-policy
    for (name, beta), (first, last) in rewards.items():
        assert beta or last > first + 0.2, (name, first, last)
    assert rewards["grpo", 30.0][1] < rewards["grpo", 0.0][1] - 0.15, rewards


def test_grpo_ratios_move_in_later_epochs(tiny, monkeypatch):
    import copy
    monkeypatch.setattr(grpo, "reward", lambda row, text: float(len(text)))
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: (s := M.sample(*a, **k))._replace(ended=torch.ones_like(s.ended)))
    model, log = copy.deepcopy(tiny[0]), M.Log(2, quiet=True)
    config = replace(CONFIG, epochs=3, lr=1e-2, group=8)
    grpo.fit(model, None, tiny[1], prompts(tiny[1]), prompts(tiny[1], 2), config, log)
    assert all(row["ratio"] > 1.001 for row in log.rows)


def test_grpo_bad_input(tiny, tmp_path):
    tokenizer = tiny[1]
    M.save(tmp_path / "m", *tiny)
    good = {"init": str(tmp_path / "m"), "save": False, "quiet": True}
    for changes, word in [({"loss": "gpo"}, "--loss gpo"), ({"verifier": "x"}, "--verifier x"), ({"group": 1}, "--group 1"),
                          ({"steps": 0}, "--steps 0"), ({"temperature": 0.0}, "--temperature"), ({"init": "nowhere"}, "nowhere"),
                          ({"max_new": 250}, "--max-new 250"), ({"data": "nowhere.jsonl"}, "nowhere.jsonl")]:
        with pytest.raises(M.UserError, match=re.escape(word)):
            grpo.train(grpo.Config(**good | changes))
    for text, word in [('{"prompt": "a"}\n', "answer"), ('{"prompt": "a", "answer": "1"}\n', "at least 2"), ("{\n", ":1"),
                       ('{"answer": "1"}\n', "prompt"), ("", "no rows")]:
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(M.UserError, match=word):
            grpo.train(grpo.Config(**good | {"data": str(tmp_path / "d.jsonl")}))


def test_grpo_runs_on_your_own_data_twice_the_same(tiny, tmp_path):
    M.save(tmp_path / "m", *tiny)
    lines = [f'{{"prompt": "What is {i} + {i}?", "answer": {2 * i}}}\n' for i in range(1, 9)]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    config = replace(CONFIG, init=str(tmp_path / "m"), data=str(tmp_path / "mine.jsonl"), out=str(tmp_path / "out"), save=True)
    results = [grpo.train(config) for _ in range(2)]
    assert results[0]["log"] == results[1]["log"] and results[0]["after"] == results[1]["after"]
    assert {"config.json", "model.safetensors", "results.json", "metrics.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "pass@8" in results[0]["before"] and "gold" not in results[0]["before"]
