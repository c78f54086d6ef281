"""Tests of ppo.py, to be merged into test_all.py."""
import copy, json, math, random, re
from dataclasses import replace

import numpy as np
import pytest
import torch

import model as M
import ppo
from data import studybuddy as world

# ---------------------------------------------------------------------------------- ppo.py: the maths

def rollout_like(seed=0, B=7, T=11, spread=0.3):
    """Answers that begin and end anywhere, with nan outside of the mask. One is a single token."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(B):
        start = 1 + i % 3
        mask[i, start:start + 1 + int(torch.randint(0, T - start, (), generator=g)) * (i > 0)] = True
    make = lambda: torch.randn(B, T, generator=g, dtype=torch.float64).where(mask, torch.nan)
    logp = -2 * make().abs() - 0.1
    return mask, logp, logp + spread * make(), make(), make(), make()


def test_gae_equals_the_brute_force_double_sum():
    mask, _, _, rewards, values, _ = rollout_like()
    for gamma, lam in [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0)]:
        advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
        for i in range(len(mask)):
            at = [t for t in range(mask.shape[1]) if mask[i, t]]
            r, V = [rewards[i, t].item() for t in at], [values[i, t].item() for t in at] + [0.0]
            for n, t in enumerate(at):
                want = sum((gamma * lam) ** k * (r[n + k] + gamma * V[n + k + 1] - V[n + k])
                           for k in range(len(at) - n))
                assert abs(advantages[i, t].item() - want) < 1e-12
                assert abs(returns[i, t].item() - want - V[n]) < 1e-12
        assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_with_gamma_and_lambda_1_is_return_minus_value():
    mask, _, _, rewards, values, _ = rollout_like(1)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    togo = rewards.masked_fill(~mask, 0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns[mask], togo[mask])
    assert torch.allclose(advantages[mask], (togo - values)[mask])


def test_gae_of_the_docstring():
    rewards, values = torch.tensor([[0., 0, 1]]), torch.tensor([[.5, .6, .8]])
    A, _ = ppo.gae(rewards, values, torch.ones(1, 3).bool(), 1.0, 0.95)
    assert torch.allclose(A, torch.tensor([[0.4705, 0.39, 0.2]]))
    assert all(x in ppo.__doc__ for x in ("A_3 = 0.2,", "0.95 A_3 = 0.39", "0.95 A_2 = 0.47"))


def exact(seed=0, V=5):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(V, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))


def test_kl_estimates_on_an_exact_distribution():
    """What the comment claims of k1, k2, k3, in value and in gradient, by summing over all V outcomes."""
    theta, phi = exact()
    ref = phi.detach().log_softmax(0)
    logp = lambda: theta.log_softmax(0)
    pi = logp().detach().exp()
    kl, reverse = (pi * (pi.log() - ref)).sum(), (ref.exp() * (ref - pi.log())).sum()
    mean_grad = lambda loss: torch.autograd.grad((pi * loss).sum(), theta)[0]   # of a loss on drawn tokens
    k1, k2, k3 = ppo.kl_estimates(logp(), ref)
    assert torch.allclose((pi * k1).sum(), kl) and torch.allclose((pi * k3).sum(), kl)
    assert not torch.allclose((pi * k2).sum(), kl) and (k3 >= 0).all() and (k2 >= 0).all() and (k1 < 0).any()
    noise = lambda k, p: (p * (k - (p * k).sum()) ** 2).sum()
    near = ppo.kl_estimates(logp(), (pi.log() + 0.1 * ref).log_softmax(0))
    assert noise(near[2], pi) < noise(near[0], pi) and noise(k3, pi) > noise(k1, pi), "only near ref"
    full = torch.autograd.grad((logp().exp() * (logp() - ref)).sum(), theta)[0]     # of KL(pi || ref)
    other = torch.autograd.grad((ref.exp() * (ref - logp())).sum(), theta)[0]       # of KL(ref || pi)
    assert mean_grad(k1).abs().max() < 1e-12
    k1, k2, k3 = ppo.kl_estimates(logp(), ref)
    assert torch.allclose(mean_grad(k2), full)
    assert torch.allclose(mean_grad(ppo.kl_estimates(logp(), ref)[2]), other)
    assert not torch.allclose(full, other)
    # k1 as a reward, -beta k1 in the policy gradient: descends beta KL(pi || ref)
    reward = -0.3 * ppo.kl_estimates(logp(), ref)[0].detach()
    assert torch.allclose(mean_grad(-reward * logp()), 0.3 * full)
    assert [x.item() for x in ppo.kl_estimates(ref, ref)[2]] == [0.0] * 5 and kl > 0 and reverse > 0


def test_rewards_of_tokens_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    logp, ref = torch.full((2, 5), -1.0), torch.full((2, 5), -1.5)
    logp[~mask] = torch.nan
    rewards = ppo.token_rewards(torch.tensor([2.0, -3.0]), logp, ref, mask, 0.1)
    want = torch.tensor([[0, -.05, -.05, 1.95, 0], [0, 0, -3.05, 0, 0]])
    assert torch.allclose(rewards, want), "the score is paid at the end token, the KL at every token"


def test_policy_loss_is_the_papers_and_its_gradient_is_0_exactly_where_it_is_clipped():
    mask, logp, old, A, _, _ = rollout_like(2, B=40)
    logp = logp.clone().requires_grad_()
    loss = ppo.policy_loss(logp, old, A, mask, 0.2)
    grad, = torch.autograd.grad(loss, logp)
    total, N, seen = 0.0, int(mask.sum()), set()
    for i, t in mask.nonzero().tolist():
        rho, a = math.exp(logp[i, t].item() - old[i, t].item()), A[i, t].item()
        total -= min(rho * a, min(max(rho, 0.8), 1.2) * a) / N
        flat = a > 0 and rho > 1.2 or a < 0 and rho < 0.8
        assert (grad[i, t] == 0) == flat and (flat or abs(grad[i, t].item() + rho * a / N) < 1e-12)
        seen.add((a > 0, 0 if rho < 0.8 else 2 if rho > 1.2 else 1))
    assert len(seen) == 6, "both signs, below, within and above the clip"
    assert abs(loss.item() - total) < 1e-12 and (grad[~mask] == 0).all()


def test_policy_gradient_before_the_first_step_is_reinforces():
    mask, logp, _, A, _, _ = rollout_like(3)
    x = logp.clone().requires_grad_()
    grad, = torch.autograd.grad(ppo.policy_loss(x, logp, A, mask, 0.2), x)
    assert torch.allclose(grad[mask], -A[mask] / mask.sum())


def test_value_loss_by_hand_and_its_gradient():
    mask, values, old, returns, _, _ = rollout_like(4, B=40)
    values = values.clone().requires_grad_()
    loss = ppo.value_loss(values, old, returns, mask, 0.2)
    grad, = torch.autograd.grad(loss, values)
    total, N, flats = 0.0, int(mask.sum()), 0
    for i, t in mask.nonzero().tolist():
        v, o, R = (x[i, t].item() for x in (values, old, returns))
        near = min(max(v, o - 0.2), o + 0.2)
        total += max((v - R) ** 2, (near - R) ** 2) / 2 / N
        flat = (near - R) ** 2 > (v - R) ** 2                     # moved far enough towards R
        flats += flat
        assert abs(grad[i, t].item() - (0 if flat else v - R) / N) < 1e-12
    assert abs(loss.item() - total) < 1e-12 and 0 < flats < N


def test_whitening_is_masked_and_rewards_keep_their_mean():
    mask, _, _, x, _, _ = rollout_like(5)
    real = x[mask].numpy()
    white, scaled = ppo.whiten(x, mask), ppo.whiten(x, mask, shift_mean=False)
    assert np.allclose(white[mask].numpy(), (real - real.mean()) / real.std(), atol=1e-6)
    assert np.allclose(scaled[mask].numpy(), (real - real.mean()) / real.std() + real.mean(), atol=1e-6)
    assert (white[~mask] == 0).all() and (scaled[~mask] == 0).all()
    assert (ppo.whiten(torch.ones(2, 3), torch.ones(2, 3).bool()) == 0).all(), "no spread: 0, and not nan"


def test_leave_one_out():
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = ppo.rloo_advantages(rewards)
    for i in range(5):
        for j in range(4):
            others = [rewards[i, k].item() for k in range(4) if k != j]
            assert abs(A[i, j].item() - (rewards[i, j].item() - sum(others) / 3)) < 1e-12
    assert torch.allclose(ppo.rloo_advantages(torch.tensor([[1., 3.]])), torch.tensor([[-2., 2.]]))


def test_each_algorithm_makes_advantages_of_rewards():
    mask, _, _, rewards, values, _ = rollout_like(6, B=8)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    config, memory, R = ppo.Config(group=4), {}, rewards.sum(1)
    A, returns = ppo.ppo(rewards, values, mask, config, memory)
    assert abs(A[mask].mean()) < 1e-9 and abs(A[mask].std(correction=0) - 1) < 1e-6, "over the whole rollout"
    assert torch.equal(returns, ppo.gae(rewards, values, mask, config.gamma, config.lam)[1])
    A, _ = ppo.rloo(rewards, values, mask, config, memory)
    assert torch.allclose(A[:, 0], ppo.rloo_advantages(R.view(2, 4)).flatten()) and (A == A[:, :1]).all()
    assert torch.allclose(ppo.reinforce(rewards, values, mask, config, memory)[0], (R - R.mean())[:, None])
    A, _ = ppo.reinforce(rewards + 1, values, mask, config, memory)         # now with the past for a baseline
    assert torch.allclose(A[:, 5], (rewards + 1).sum(1) - R.mean())
    assert abs(memory["baseline"] - (0.9 * R.mean() + 0.1 * (rewards + 1).sum(1).mean())) < 1e-9


def test_the_leash_is_a_thermostat():
    assert ppo.adapt_beta(0.1, 4.4, 4.0) == pytest.approx(0.1 * 1.01)
    assert ppo.adapt_beta(0.1, 3.6, 4.0) == pytest.approx(0.1 * 0.99)
    assert ppo.adapt_beta(0.1, 100, 4.0) == pytest.approx(0.102)
    assert ppo.adapt_beta(0.1, 0, 4.0) == pytest.approx(0.098)
    beta, kl = 0.5, 0.0
    for _ in range(1000):                                                   # a policy that follows its leash
        kl += 0.1 * (1 / beta - kl)
        beta = ppo.adapt_beta(beta, kl, 4.0)
    assert abs(kl - 4) < 0.1 and abs(beta - 0.25) < 0.02


def test_explained_variance():
    mask, _, _, _, R, noise = rollout_like(7)
    assert ppo.explained_variance(R, R, mask) == 1 and abs(ppo.explained_variance(0 * R + 3, R, mask)) < 1e-9
    assert ppo.explained_variance(-R, R, mask) == pytest.approx(-3)


# ---------------------------------------------------------------- ppo.py: with a model, untrained

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = world.load_ranks()
    make = lambda: M.Transformer(M.ModelConfig(vocab_size=tokenizer.n_vocab, d_model=32, n_layers=1,
                                               n_heads=2, n_kv_heads=1, d_ff=48))
    policy, judge = make(), M.ScalarModel(make())
    torch.nn.init.normal_(judge.score.weight)
    judge.mean += 0.3
    with torch.no_grad():                                # so that about one answer in two ends
        h = policy.hidden(torch.tensor([row["ids"][-10:] for row in some_rows(tokenizer)]))[:, -1].mean(0)
        policy.embed.weight[M.special(tokenizer, M.END)] += 4.5 * h / h.square().sum()
    return policy, judge, tokenizer


CONFIG = ppo.Config(answers=8, group=2, epochs=1, batch=4, lr=1e-3, max_new=6, steps=2, temperature=0.7,
                    save=False, quiet=True)


def some_rows(tokenizer, count=4):
    return ppo.read_prompts(CONFIG, tokenizer, 256)[:count]


def roll(tiny, reference=None, score=None, config=CONFIG):
    policy, judge, tokenizer = tiny
    return ppo.rollout(policy, reference or policy, judge, score or ppo.score_by(judge, tokenizer), tokenizer,
                       some_rows(tokenizer), config, torch.Generator().manual_seed(0))


def test_reward_model_is_read_at_the_end_token_of_each_answer(tiny):
    _, judge, tokenizer = tiny
    rows = world.read("prompts")
    rows = [row for row in rows if not isinstance(row["prompt"], str)][:2] + rows[:3]
    texts = ["Yes.", "First 3 + 4 = 7. The answer is 7.", "", "I can't know.", "A<|im_end|>b"]
    scores = ppo.score_by(judge, tokenizer)([row["prompt"] for row in rows], texts)
    for row, text, score in zip(rows, texts, scores):
        ids = M.render(tokenizer, M.to_messages(row["prompt"]), reply=True)[0]
        ids = torch.tensor([ids + tokenizer.encode_ordinary(text) + [M.special(tokenizer, M.END)]])
        assert abs(judge(ids)[0, -1].item() - score) < 1e-5, "alone and without padding"
        want = judge.score(judge.transformer.hidden(ids))[0, -1, 0] - 0.3
        assert abs(want.item() - score) < 1e-5, "the mean is subtracted"


def test_sampled_and_scored_are_the_same_distribution(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(ppo, "sample", lambda *a, **k: drawn.append(M.sample(*a, **k)) or drawn[-1])
    r = roll(tiny)
    assert (r.logp[r.tokens[2]] - drawn[0].logps[drawn[0].answer]).abs().max() < 1e-5
    assert torch.equal(r.logp, r.ref_logp) and (r.logp[r.tokens[2]] < 0).all()
    for i, row in enumerate(r.rows):                     # answers stand under their own prompts
        ids, mask, answer = (x[i] for x in r.tokens)
        assert ids[mask & ~answer].tolist() == row["ids"]
    assert [row["prompt"] for row in r.rows[::2]] == [row["prompt"] for row in some_rows(tiny[2])]


def test_what_never_ends_scores_below_the_worst(tiny):
    judge = lambda prompts, texts: [float(i) for i in range(len(texts))]
    r = roll(tiny, score=judge, config=replace(CONFIG, group=4, penalty=2.5))
    end = M.special(tiny[2], M.END)
    ended = ((r.tokens[0] == end) & r.tokens[2]).any(1)
    assert ended.any() and not ended.all() and torch.equal(ended, r.ended)
    assert (r.scores[~ended] == -2.5).all() and torch.equal(r.scores[ended], torch.arange(16.)[ended])
    rewards = ppo.token_rewards(r.scores, r.logp, r.ref_logp, r.tokens[2], 0.1)
    paid = (r.tokens[0] == end) & r.tokens[2]
    assert torch.equal(rewards[paid], r.scores[ended]), "at the end token"
    assert torch.allclose(rewards.sum(1), r.scores)


def test_value_of_a_state_does_not_know_the_token_drawn_in_it(tiny):
    r, critic = roll(tiny), tiny[1]
    ids, mask, answer = r.tokens
    first = answer.int().argmax(1)                       # (B,)
    other = ids.clone()
    other[torch.arange(len(ids)), first] = 7
    V, W = (ppo.state_values(critic, x, mask, answer) for x in (ids, other))
    at = torch.arange(ids.shape[1]) == first[:, None]
    assert torch.equal(V[at], W[at]) and (V[~answer] == 0).all()
    later = answer & ~at & (ids != other).any(1)[:, None]
    assert later.any() and (V[later] != W[later]).all()
    i = int(mask.sum(1).argmax())                        # the critic at the token before, unpadded
    alone = critic(ids[i][mask[i]][None])[0]
    assert torch.allclose(V[i][answer[i]], alone[int((mask & ~answer)[i].sum()) - 1:-1], atol=1e-5)


def test_pad_ids_change_nothing(tiny):
    r, (policy, critic, tokenizer) = roll(tiny), tiny
    ids, mask, answer = r.tokens
    assert mask[:, 0].all() and not mask[:, -1].all()
    results = []
    for blank in (M.special(tokenizer, M.PAD), 5):
        tokens = ids.where(mask, blank), mask, answer
        logp, values = M.token_logps(policy, *tokens, 0.7), ppo.state_values(critic, *tokens)
        rewards = ppo.token_rewards(r.scores, logp.detach(), r.ref_logp, answer, 0.1)
        A, returns = ppo.ppo(rewards, values.detach(), answer, CONFIG, {})
        loss = ppo.policy_loss(logp, r.logp, A, answer, 0.2)
        loss = loss + ppo.value_loss(values, r.values, returns, answer, 0.2)
        weights = [*policy.blocks.parameters(), *critic.parameters()]
        results.append([loss, *torch.autograd.grad(loss, weights)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results)) and results[0][0] != 0


def run(tiny, score=None, **changes):
    policy, judge, tokenizer = (copy.deepcopy(x) if isinstance(x, torch.nn.Module) else x for x in tiny)
    config = replace(CONFIG, **changes)
    reference, log = copy.deepcopy(policy), M.Log(config.steps, quiet=True)
    critic = copy.deepcopy(judge) if config.algorithm == "ppo" else None
    said = []
    ppo.fit(policy, reference, critic, score or ppo.score_by(judge, tokenizer), tokenizer,
            ppo.read_prompts(config, tokenizer, 256), config, log, said.append)
    return log.rows, policy, reference, critic, judge, said


@pytest.mark.parametrize("algorithm", ppo.ALGORITHMS)
def test_ppo_starts_at_ratio_1_and_kl_0_and_only_learners_move(tiny, algorithm):
    rows, policy, reference, critic, judge, said = run(tiny, algorithm=algorithm, epochs=2)
    assert rows[0]["kl"] == 0 and rows[0]["kl_k3"] == 0 and abs(rows[0]["first_ratio"] - 1) < 1e-5
    assert abs(rows[1]["first_ratio"] - 1) < 1e-5 and rows[1]["kl"] != 0 and abs(rows[0]["ratio"] - 1) > 1e-5
    assert "first ratio 1.000, KL 0.000" in "\n".join(said)
    weights = lambda model: torch.cat([p.flatten() for p in model.state_dict().values()])
    same = lambda a, b: torch.equal(weights(a), weights(b))
    assert same(reference, tiny[0]) and not same(policy, tiny[0]) and same(judge, tiny[1])
    assert critic is None or not same(critic, tiny[1])


@pytest.mark.parametrize("algorithm", ppo.ALGORITHMS)
def test_ppo_learns_from_a_judge_of_your_own(tiny, algorithm, monkeypatch):
    """The seam likes one letter: it becomes more frequent, and the KL holds it back."""
    ends = lambda s: s._replace(ended=s.ended | True)
    monkeypatch.setattr(ppo, "sample", lambda *a, **k: ends(M.sample(*a, **k)))
    likes = lambda prompts, texts: [float("m" in text) for text in texts]
    settings = dict(algorithm=algorithm, steps=40, answers=32, group=4, batch=32, lr=2e-2, temperature=1.0)
    free, held = (run(tiny, likes, beta=beta, **settings)[0] for beta in (0.0, 3.0))
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)
    assert mean(free[-10:], "score") > mean(free[:5], "score") + 0.1
    assert mean(held[-10:], "kl") < mean(free[-10:], "kl") / 2
    assert mean(held[-10:], "score") < mean(free[-10:], "score")


def test_each_epoch_learns_from_every_answer_once(tiny, monkeypatch):
    seen, loss = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *args: seen.append(args) or loss(*args))
    run(tiny, epochs=3, steps=1)
    tokens = [torch.cat([old[mask] for _, old, _, mask, _ in seen[i:i + 2]]).sort().values for i in (0, 2, 4)]
    assert len(seen) == 6 and torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert not torch.equal(seen[0][1], seen[2][1]), "in another order"


def test_beta_follows_the_target(tiny):
    rows = run(tiny, steps=4, target_kl=5.0, beta=0.1)[0]
    assert [row["beta"] for row in rows] == pytest.approx([0.1 * 0.98 ** i for i in range(4)])
    assert {row["beta"] for row in run(tiny, beta=0.1)[0]} == {0.1}


def test_alarms_need_no_truth_and_are_silent_at_the_start():
    rng = random.Random(0)
    rows = [world.ask(rng, world.any_kind(rng)) for _ in range(256)]
    good, fine = ([world.write(rng, row, style) for row in rows] for style in ("plain", "full"))
    length = lambda texts: sum(len(text.split()) for text in texts) / len(texts)
    look = lambda texts, kl: {"kl": kl, "length": length(texts), **ppo.signals(texts)}
    start = look(good[:128], 0.0)
    assert not ppo.alarms(look(good[128:], 3.0), start, 128)
    praise = [" ".join([world.SAY["flattery"][0]] * 2 + [text]) for text in good[:128]]
    found = ppo.alarms(look(praise, 30.0), start, 128)
    assert {"repeated", "openings", "length", "kl"} == found.keys()
    assert ppo.alarms(start | {"kl": 3.62}, start, 128).keys() == {"kl"}
    assert not ppo.alarms(start | {"kl": 3.6}, start, 128)


def test_turning_point():
    rows = [dict(step=i, score=i / 10, gold=1 - abs(i - 20) / 50) for i in range(60)]
    turn = ppo.turning_point(rows)
    assert abs(turn["peak_step"] - 20) <= 1 and turn["rise"] == pytest.approx(3.7, abs=0.2)
    assert turn["last"] == pytest.approx(1 - 36.5 / 50) and turn["peak"] > 0.95


def test_ppo_bad_input(tiny, tmp_path):
    policy, judge, tokenizer = tiny
    M.save(tmp_path / "m", policy, tokenizer), M.save(tmp_path / "rm", judge, tokenizer)
    M.save(tmp_path / "rm3", M.ScalarModel(copy.deepcopy(policy), 3), tokenizer)
    good = {"init": str(tmp_path / "m"), "reward": str(tmp_path / "rm"), "save": False, "quiet": True}
    for changes, word in [({"algorithm": "trpo"}, "--algorithm trpo"), ({"steps": 0}, "--steps 0"),
                          ({"algorithm": "rloo", "group": 1}, "--group 1"),
                          ({"answers": 100, "batch": 64}, "--batch 64"), ({"answers": 0}, "--answers 0"),
                          ({"temperature": 0.0}, "--temperature"), ({"init": "nowhere"}, "nowhere"),
                          ({"max_new": 250}, "--max-new 250"), ({"reward": "nowhere"}, "nowhere"),
                          ({"reward": str(tmp_path / "m")}, "scalar"),
                          ({"reward": str(tmp_path / "rm3")}, "one score"),
                          ({"beta": -1.0}, "--beta"), ({"data": "nowhere.jsonl"}, "nowhere.jsonl")]:
        with pytest.raises(M.UserError, match=re.escape(word)):
            ppo.train(ppo.Config(**good | changes))
    for text, word in [("{\n", ":1"), ('{"answer": "1"}\n', "prompt"), ("", "no rows")]:
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(M.UserError, match=word):
            ppo.train(ppo.Config(**good | {"data": str(tmp_path / "d.jsonl")}))


@pytest.mark.parametrize("algorithm", ppo.ALGORITHMS)
def test_ppo_runs_on_your_own_data_twice_the_same(tiny, tmp_path, algorithm):
    M.save(tmp_path / "m", tiny[0], tiny[2]), M.save(tmp_path / "rm", tiny[1], tiny[2])
    lines = [json.dumps({"prompt": f"What is {i}?"}) for i in range(6)]
    lines += [json.dumps({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                     {"role": "user", "content": "c"}]})]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    config = replace(CONFIG, algorithm=algorithm, init=str(tmp_path / "m"), reward=str(tmp_path / "rm"),
                     data=str(tmp_path / "mine.jsonl"), out=str(tmp_path / "out"), save=True)
    results = [ppo.train(config) for _ in range(2)]
    assert results[0]["log"] == results[1]["log"] and results[0]["after"] == results[1]["after"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "metrics.csv"} <= names
    assert "score" in results[0]["before"] and "gold" not in results[0]["before"]
    assert results[0]["before"]["kl"] == 0 != results[0]["after"]["kl"], "the reference stays where it began"
    still = ppo.train(replace(config, save=False, lr=1e-12, critic_lr=0.1))
    assert abs(still["before"]["score"] - still["after"]["score"]) < 1e-3, "the critic is a copy of the judge"
    result = ppo.train(replace(config, save=False, penalty=0.5), lambda prompts, texts: [7 for _ in texts])
    assert 6.5 <= result["before"]["score"] <= 7, "a judge of your own needs no network"
