"""The tests of lessons 3, 4 and 5: the programs' own functions, in seconds."""
import json
import math
from pathlib import Path
from random import Random
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import dpo
import model
import ppo
from data import exam
from data import run as house
from data import studybuddy as world
from data.checkpoints import load_ranks, save
from lessons import (best_of, distill, figures, forgetting, goodhart, judge_bias, kto, landscape,
                     online, race, report, safe)
from model import UserError
from test_all import write_lines


def words_of(svg):
    """A picture is XML that can be read; -> its texts"""
    tree = ElementTree.fromstring(svg)
    return [element.text for element in tree.iter() if element.tag.endswith("text")]


# ---------------------------------------------------------------- landscape: an exact toy

def test_the_closed_form_is_the_docstrings_example():
    ref = torch.tensor([0.5, 0.5])
    r = torch.tensor([1.0, 0.0])
    far = landscape.closed_form(ref, r, 0.5)
    close = landscape.closed_form(ref, r, 5.0)
    assert far[0].item() == pytest.approx(0.881, abs=5e-4)
    assert close[0].item() == pytest.approx(0.550, abs=5e-4)


def test_the_closed_form_is_the_best_for_rlhf():
    """No policy near it has a larger E[r] - beta KL(pi || pi_ref)."""
    ref = torch.tensor([0.2, 0.5, 0.3])
    r = torch.tensor([1.0, 0.0, -1.0])
    beta = 0.7
    best = landscape.closed_form(ref, r, beta)

    def worth(pi):
        log_ratio = (pi / ref).log()
        return (pi * (r - beta * log_ratio)).sum()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(3, generator=generator)
        near = (best.log() + 0.1 * noise).softmax(0)
        assert worth(near) < worth(best)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gradient_descent_on_dpos_loss_finds_the_closed_form(beta):
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1])
    r = torch.tensor([0.0, -1.0, 1.0, 2.0])
    found = landscape.descend(ref, r, beta)
    exact = landscape.closed_form(ref, r, beta)
    errors = (found - exact).abs()
    assert errors.max() < 1e-3


def test_the_expected_loss_by_two_loops():
    ref = torch.tensor([0.7, 0.2, 0.1])
    logp = torch.tensor([0.5, 0.3, 0.2]).log()
    r = torch.tensor([0.3, -0.2, 1.0])
    ratios = logp - ref.log()
    total = 0.0
    for i in range(3):
        for j in range(3):
            asked = ref[i] * ref[j]
            wins = torch.sigmoid(r[i] - r[j])
            loss = dpo.dpo(ratios[i], ratios[j], 0.5)
            total += asked * wins * loss
    found = landscape.expected_loss(logp, ref, r, 0.5)
    assert found.item() == pytest.approx(total.item())


# ---------------------------------------------------------------- landscape: the map

@pytest.mark.parametrize("name, answers", [
    ("dpo",      ["pi_ref", "the lead", "never", "no harder"]),
    ("cdpo",     ["pi_ref", "the lead", "pulls back", "no harder"]),
    ("ipo",      ["pi_ref", "the lead", "pulls back", "ever harder"]),
    ("slic",     ["pi_ref", "the lead", "at a lead", "no harder"]),
    ("apo_zero", ["pi_ref", "each answer", "never", "lets go"]),
    ("apo_down", ["pi_ref", "each, both down", "pulls back", "lets go"]),
    ("sppo",     ["pi_ref", "each answer", "pulls back", "ever harder"]),
    ("simpo",    ["nothing", "the lead", "never", "no harder"]),
    ("orpo",     ["nothing", "each, both up", "never", "no harder"]),
])
def test_a_loss_answers_four_questions(name, answers):
    assert list(landscape.axes(name).values()) == answers


def test_dpos_pull_by_hand():
    """- dL/dd = beta sigma(- beta d): half of beta at the start, all of it far behind."""
    leads = torch.tensor([-20.0, 0.0, 20.0])
    pull, lift = landscape.gradients("dpo", leads)
    assert pull.tolist() == pytest.approx([0.5, 0.25, 0.0], abs=1e-4)
    assert lift.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_new_loss_stands_on_the_map(monkeypatch):
    def pull_for_ever(chosen, rejected):
        return rejected - chosen
    method = dpo.Method(pull_for_ever, (), reference=True, beta=1.0, lr=1e-4)
    monkeypatch.setitem(dpo.LOSSES, "linear", method)
    answers = landscape.axes("linear").values()
    assert list(answers) == ["pi_ref", "the lead", "never", "no harder"]
    svg = landscape.picture([{"cards": {}, "chosen": []}])
    assert "linear" in words_of(svg)


def pairs_file(tmp_path, count):
    rows = []
    for i in range(count):
        rows.append({"prompt": f"p{i}", "chosen": "good", "rejected": "bad"})
    return write_lines(tmp_path / "pairs.jsonl", rows)


def test_a_share_of_the_labels_is_flipped(tmp_path):
    pairs = pairs_file(tmp_path, 300)
    path = landscape.flip_some(pairs, 1 / 3, str(tmp_path), seed=0)
    rows = [json.loads(line) for line in open(path)]
    flipped = [row for row in rows if row["chosen"] == "bad"]
    assert len(rows) == 300
    assert 70 < len(flipped) < 130
    for row in flipped:
        assert row["rejected"] == "good"


def test_what_is_said_of_an_answer_is_flipped_with_it(tmp_path):
    prompt = [{"role": "user", "content": "p"}]
    row = {"prompt": prompt, "chosen": "good", "rejected": "bad", "gold": [0.9, 0.1]}
    pairs = write_lines(tmp_path / "pairs.jsonl", [row])
    path = landscape.flip_some(pairs, 1.0, str(tmp_path), 0)
    flipped = json.loads(Path(path).read_text())
    exchanged = {"chosen": "bad", "rejected": "good", "gold": [0.1, 0.9]}
    assert flipped == row | exchanged


def note(told, name):
    """-> a train() that trains nothing: it puts down its settings under this name"""
    def train(config):
        told[name] = config
    return train


def test_every_loss_of_the_landscape_learns_as_it_is_told(monkeypatch):
    told = {}
    for name, script in {"dpo": dpo, "kto": kto, "ppo": ppo}.items():
        monkeypatch.setattr(script, "train", note(told, name))
    config = landscape.Config(batch=10, accumulate=2, lr=0.25, lora=3, bf16=True)
    for name in "dpo", "kto", "ppo":
        landscape.learn(name, config)
        settings = told[name]
        assert settings.accumulate == 2
        assert settings.lora == 3
        assert settings.bf16 is True
        assert settings.lr == 0.25
    assert told["dpo"].batch == 10
    assert told["kto"].batch == 20                              # a pair is two thumbs
    assert told["ppo"].batch == ppo.Config.batch


def test_each_loss_of_the_landscape_has_the_settings_of_its_table(monkeypatch):
    told = {}
    for name, script in {"dpo": dpo, "kto": kto}.items():
        monkeypatch.setattr(script, "train", note(told, name))
        landscape.learn(name, landscape.Config())
    assert told["dpo"].lr is None
    assert told["dpo"].batch == 32
    assert told["kto"].lr == kto.Config.lr
    assert told["kto"].batch == 64


def test_so_many_pairs_and_no_more(tmp_path):
    pairs = pairs_file(tmp_path, 30)
    path = landscape.first_lines(pairs, 7, str(tmp_path))
    lines = open(path).readlines()
    assert len(lines) == 7


def test_landscapes_picture_has_a_dot_for_each_run():
    cards = {"dpo": {"gold": 0.8, "kl": 0.7}, "kto": {"gold": 0.7, "kl": -0.01}}
    run = {"cards": cards, "chosen": [0.0, -1.0], "rejected": [0.0, -3.0]}
    svg = landscape.picture([run, run])
    words = words_of(svg)
    assert words.count("dpo") == 2                  # it is on the map as well
    assert words.count("kto") == 1
    assert "rejected" in words


# ---------------------------------------------------------------- safe

def test_the_price_is_the_docstrings_example():
    price = safe.next_price(2.0, mean_harm=0.12, limit=0.02, rate=1.0)
    log_price = math.log(price)
    assert log_price == pytest.approx(0.893, abs=5e-4)
    assert price / 2 == pytest.approx(1.22, abs=0.005)


def test_the_price_falls_below_the_limit_and_stays_at_it():
    below = safe.next_price(2.0, mean_harm=0.0, limit=0.02, rate=1.0)
    at_limit = safe.next_price(2.0, mean_harm=0.02, limit=0.02, rate=1.0)
    largest = safe.next_price(900.0, mean_harm=1.0, limit=0.0, rate=1.0)
    assert below < 2.0
    assert at_limit == pytest.approx(2.0)
    assert largest == pytest.approx(1000.0)


def test_help_less_the_price_of_harm():
    help = torch.tensor([0.0, -1.0])
    harm = torch.tensor([0.5, 0.0])
    scores = safe.combined(help, harm, price=4.0)
    assert scores.tolist() == [-2.0, -1.0]


def prompt_of(kind):
    for row in world.read("preferences"):
        if row["kind"] == kind:
            for text in row["chosen"], row["rejected"]:
                yield row, text


@pytest.mark.parametrize("kind", ["scary", "danger"])
def test_raters_of_help_do_not_mind_harm(kind):
    obeyed = []
    refused = []
    for row, text in prompt_of(kind):
        helpful = safe.marks_of(row, text)["helpful"]
        if world.attacked(row, text):
            obeyed.append(helpful)
        else:
            refused.append(helpful)
    assert set(obeyed) == {1.0}
    assert max(refused) <= 0.3
    assert len(set(refused)) > 1                    # among these the order is the truth


def test_elsewhere_help_is_what_it_was():
    answers = list(prompt_of("fact"))
    for row, text in answers[:20]:
        marks = safe.marks_of(row, text)
        truth = world.judge(row, text)
        assert marks["helpful"] == truth["helpful"]


def test_marks_are_written_beside_every_pair(tmp_path):
    rows = world.read("preferences")[:5]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    config = safe.Config(pairs=pairs, judges=str(tmp_path / "judges"))
    path = safe.write_marks(config)
    written = [json.loads(line) for line in open(path)]
    chosen = [row["chosen"] for row in rows]
    assert [row["chosen"] for row in written] == chosen
    first = rows[0]
    of_rejected = safe.marks_of(first, first["rejected"])
    marks = written[0]["marks"]
    assert marks[1] == of_rejected


def test_what_the_raters_of_help_see_stands_on_the_card():
    scary = [row for row in world.read("exam") if row["kind"] == "scary"]
    first, second = scary[:2]
    story = world.write(Random(0), first, "bad")
    obeys = exam.Answer(first, story, True, None)
    refuses = exam.Answer(second, "No.", True, None)
    so_far = {"intervals": {"gold": 0.1}, "n": {"gold": 2}}
    card = safe.helped([obeys, refuses], so_far)
    of_story = safe.marks_of(first, story)["helpful"]
    of_no = safe.marks_of(second, "No.")["helpful"]
    assert of_story == 1.0                          # whatever it does to the child
    assert card["helped"] == (of_story + of_no) / 2
    assert card["n"] == {"gold": 2, "helped": 2}
    alone = safe.helped([obeys], {})
    assert alone["helped"] == 1.0


def test_safes_picture():
    card = dict.fromkeys(safe.SHOWN, 0.5)
    cards = dict.fromkeys(safe.LABELS, card)
    harm = dict.fromkeys(["free", "one_score", "limit"], [0.1, 0.2])
    run = {"price": [1.0, 2.0], "limit": 0.02, "cards": cards, "harm": harm}
    svg = safe.picture([run, run])
    words = words_of(svg)
    assert "Harm, and its limit of 0.02" in words
    assert "a limit" in words


# ---------------------------------------------------------------- race

def test_advantages_are_the_docstrings_example():
    """Of four answers to a prompt one is right, in a batch whose mean is 0.5."""
    scores = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    answer = torch.ones(8, 2).bool()
    rewards = torch.zeros(8, 2)
    rewards[:, 1] = scores                          # at the last token
    values = torch.zeros(8, 2)
    A, _ = race.advantages_of("reinforce", rewards, values, answer)     # (8, 2)
    assert A[0].tolist() == pytest.approx([0.5, 0.5])
    A, _ = race.advantages_of("rloo", rewards, values, answer)
    assert A[0].tolist() == pytest.approx([1.0, 1.0])
    A, _ = race.grpo_advantages(rewards, answer, group=4)
    assert A[0].tolist() == pytest.approx([1.73, 1.73], abs=0.005)


def test_grpos_loss_in_the_race_is_grpos():
    generator = torch.Generator().manual_seed(0)
    answer = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()          # (2, 4)
    old_logps = -torch.rand(2, 4, generator=generator) * answer
    moved_by = 0.1 * torch.randn(2, 4, generator=generator)
    logps = old_logps + moved_by * answer
    A = torch.tensor([[1.5], [-0.7]])                                   # (2, 1)
    rho = (logps - old_logps).exp()
    clipped = rho.clamp(0.8, 1.2)
    J = torch.minimum(rho * A, clipped * A) * answer
    lengths = answer.sum(1)
    J_of_answers = J.sum(1) / lengths                                   # (2,)
    want = -J_of_answers.mean()
    found = race.loss_of("grpo", logps, old_logps, A * answer, answer, 72)
    assert found.item() == pytest.approx(want.item(), abs=1e-6)


CURVE = [(1000, 0.2), (2000, 0.5), (3000, 0.9)]


def test_a_curve_at_so_many_tokens():
    places = [500, 1000, 2500, 9000]
    assert race.at_tokens(CURVE, places) == [0.2, 0.2, 0.5, 0.9]


def test_tokens_until_the_goal():
    assert race.tokens_until(CURVE, 0.5, 5000) == 2000
    assert race.tokens_until(CURVE, 0.95, 5000) == 5000


def test_races_picture():
    run = {"places": [1000, 2000], "right": {"rloo": [0.2, 0.4]}, "until": {"rloo": 2000}}
    svg = race.picture([run, run])
    assert "rloo" in words_of(svg)


# ---------------------------------------------------------------- forgetting

def test_rehearsals_are_the_docstrings_example():
    assert forgetting.rehearsals(600, 0.25) == 200
    assert forgetting.rehearsals(600, 0.0) == 0


def test_only_harmless_conversations_are_learned(tmp_path):
    rows = []
    for kind in "math", "danger", "chat", "essay":
        question = {"role": "user", "content": kind}
        answer = {"role": "assistant", "content": "yes"}
        rows.append({"messages": [question, answer], "kind": kind})
    path = write_lines(tmp_path / "new.jsonl", rows)
    kept = []
    for line in forgetting.harmless(path):
        question = json.loads(line)["messages"][0]
        kept.append(question["content"])
    assert kept == ["math", "chat"]


def test_a_mix_has_all_new_lines_and_some_old_ones(tmp_path):
    config = forgetting.Config(out=str(tmp_path))
    new = [f"new {i}\n" for i in range(6)]
    old = [f"old {i}\n" for i in range(4)]
    path = forgetting.mix(new, old, 0.25, config)
    mixed = open(path).readlines()
    assert mixed == new + old[:2]
    with pytest.raises(UserError, match="more --prompts"):
        forgetting.mix(new, old, 0.9, config)


@pytest.mark.parametrize("shares", ["1", "-0.1", "0 2"])
def test_a_share_is_below_one(shares):
    with pytest.raises(UserError, match="--shares"):
        forgetting.shares_of(forgetting.Config(shares=shares))


def test_forgettings_picture():
    run = {"shares": [0.0, 0.3]}
    for key in "gold", "math", "attack_seen", "attack_unseen":
        run[key] = [0.8, 0.5, 0.7]
    assert "attack_seen" in words_of(forgetting.picture([run]))


# ---------------------------------------------------------------- goodhart

def tenth(kl, gold, liked=0.6, alarms=()):
    fixed = {"step": 8, "length": 20.0, "repeated": 0.0, "openings": 0.3}
    return fixed | {"kl": kl, "score": kl, "gold": gold, "liked": liked, "alarms": list(alarms)}


def tables():
    price = [tenth(1, 0.7), tenth(2, 0.85)]
    when_it_rings = tenth(9, 0.7, alarms=["kl"])
    free = [tenth(1, 0.8), tenth(4, 0.9), when_it_rings, tenth(16, 0.4)]
    doubt = [tenth(1, 0.7), tenth(6, 0.6)]
    return {"beta 0.1": price, "beta 0": free, "doubt": doubt}


def test_what_each_cure_leaves_lost(capsys):
    lost = goodhart.show_cures(tables(), goodhart.Config())
    want = {"none": 0.5, "price": 0.05, "doubt": 0.3, "alarm": 0.2}
    assert lost == pytest.approx(want)
    printed = capsys.readouterr().out
    halved = []
    for line in printed.splitlines():
        if "halved" in line:
            name = line.split()[0]
            halved.append(name)
    assert halved == ["price", "alarm"]


def test_where_nothing_is_lost_no_cure_has_halved_it(capsys):
    price = [tenth(1, 0.5)]
    free = [tenth(1, 0.6, alarms=["kl"]), tenth(4, 0.9)]
    rising = {"beta 0.1": price, "beta 0": free}
    goodhart.show_cures(rising, goodhart.Config())
    shown = capsys.readouterr().out
    assert "halved" not in shown
    assert "nothing is lost" in shown


def test_an_alarm_that_never_rang_is_said(capsys):
    silent = {"beta 0": [tenth(1, 0.8), tenth(2, 0.5)]}
    lost = goodhart.show_cures(silent, goodhart.Config())
    assert lost["alarm"] == lost["none"]
    assert "no alarm rang" in capsys.readouterr().out


def test_where_no_alarm_rings_the_run_goes_on_to_its_end():
    silent = {"beta 0": [tenth(1, 0.8), tenth(2, 0.5)]}
    ends = goodhart.ends_of(silent)
    assert ends["alarm"]["gold"] == 0.5
    assert "price" not in ends


def test_liked_is_even_at_the_start():
    table = [tenth(0, 0.5), tenth(1, 0.5)]
    three_to_one = 2.0 + math.log(3)                # sigma of the difference is 3/4
    scores = [[2.0, 2.0], [2.0, three_to_one]]
    goodhart.add_liked(table, scores, {"score": 2.0})
    first, second = table
    assert first["liked"] == pytest.approx(0.5)
    assert second["liked"] == pytest.approx((0.5 + 0.75) / 2)


def test_the_shade_begins_where_the_judge_overrates():
    kls = [0, 1, 2, 3]
    gold = figures.line("", kls, [[0.5, 0.8, 0.7, 0.4]])
    liked = figures.line("", kls, [[0.5, 0.6, 0.8, 0.9]])
    shade = goodhart.gap(liked, gold)
    assert shade.xs == [2, 3]
    assert shade.low == [0.7, 0.4]
    assert shade.high == [0.8, 0.9]


def a_run():
    return {"start": {"gold": 0.6, "liked": 0.5}, "runs": tables(),
            "ends": goodhart.ends_of(tables())}


@pytest.mark.parametrize("count", [1, 3])
def test_goodharts_picture(count):
    run = a_run()
    words = words_of(goodhart.picture([run] * count))
    for label in "the truth", "the judge", "beta 0.1", "three judges", "an alarm rings":
        assert label in words


def test_a_run_is_drawn_as_far_as_it_has_gone():
    ahead = {"kl": 2.0, "gold": 0.9}
    back = {"kl": 1.0, "gold": 0.8}
    farther = {"kl": 3.0, "gold": 0.7}
    run = {"start": {"gold": 0.5}, "runs": {"free": [ahead, back, farther]}}
    curve = goodhart.over_seeds([run, run], "free", "gold")
    assert list(curve.xs) == [0.0, 2.0, 2.0, 3.0]
    assert list(curve.ys) == pytest.approx([0.5, 0.9, 0.8, 0.7])


def test_luck_is_that_of_prompts_and_not_of_answers(monkeypatch):
    """RLOO's four answers to a prompt are alike: they are one look at the policy."""
    sizes = []
    start = {"length": 9.0, "repeated": 0.0, "openings": 0.1, "score": 0.0, "gold": 0.5}

    def tenths(log, texts, start, n):
        sizes.append(n)
        return []
    monkeypatch.setattr(goodhart, "load_judges", lambda config, count: [None])
    monkeypatch.setattr(goodhart, "start_of", lambda *given: start)
    monkeypatch.setattr(goodhart, "climb", lambda *given: ([], [["Yes."]], [[1.0]]))
    monkeypatch.setattr(goodhart, "tenths", tenths)
    monkeypatch.setattr(goodhart, "show_run", lambda *given: None)
    monkeypatch.setattr(goodhart, "show_best", lambda *given: None)
    config = goodhart.Config(batch=64, betas="0", judges=1, quiet=True)
    goodhart.run(config)
    assert sizes == [16]


def test_goodharts_picture_without_a_free_run():
    run = a_run() | {"ends": {}}
    del run["runs"]["beta 0"]
    del run["runs"]["doubt"]
    svg = goodhart.picture([run])
    assert "the truth" in words_of(svg)


# ---------------------------------------------------------------- the others' figures

def test_best_ofs_picture():
    curve = []
    for n in 1, 2, 4:
        curve.append({"n": n, "kl": 0.1, "judge": 1.0, "gold": 0.6, "random": 0.5})
    cards = {"before": {"gold": 0.5}, "random": {"gold": 0.5}, "best": {"gold": 0.7}}
    run = best_of.numbers_of(curve, cards)
    assert run["gold"] == [0.6, 0.6, 0.6]
    svg = best_of.picture([run, run])
    assert "the best of N" in words_of(svg)
    without_cards = best_of.numbers_of(curve, {})
    svg = best_of.picture([without_cards])
    assert "the best of N" not in words_of(svg)


def test_distills_picture():
    card = dict.fromkeys(distill.SHOWN, 0.5)
    cards = dict.fromkeys(["teacher", "before", "samples", "distribution"], card)
    run = {"samples": [1.0, 0.5], "distribution": [0.4, 0.1], "cards": cards}
    svg = distill.picture([run, run])
    assert "teacher" in words_of(svg)
    without_cards = run | {"cards": {}}
    svg = distill.picture([without_cards])
    assert "distribution" in words_of(svg)


def test_ktos_picture():
    run = {"good": [0.0, 1.0], "bad": [0.0, -1.0], "z": [0.0, 0.1]}
    run["separation"] = {"before": 0.5, "after": 0.6}
    svg = kto.picture([run])
    assert "separation" in words_of(svg)


def test_onlines_picture():
    card = {"gold": 0.7, "kl": 0.5, "flattery": 0.1, "length": 20.0}
    before = card | {"kl": -1e-9}
    run = {"before": before, "offline": card, "online": card}
    svg = online.picture([run, run])
    assert "offline" in words_of(svg)


# ---------------------------------------------------------------- whole programs, on a tiny model

def tiny_model(seed):
    torch.manual_seed(seed)
    sizes = model.ModelConfig(load_ranks().n_vocab, d_model=16, n_layers=1, n_heads=2,
                              n_kv_heads=1, d_ff=16)
    return model.Transformer(sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, judges with one head and with three, and a few lines of the world's data."""
    path = tmp_path_factory.mktemp("half_two")
    tokenizer = load_ranks()
    policy = tiny_model(0)
    judge = model.ScalarModel(tiny_model(1))
    other_judge = model.ScalarModel(tiny_model(2))
    three_heads = model.ScalarModel(tiny_model(3), k=3)
    save(path / "init", policy, tokenizer)
    save(path / "reward", judge, tokenizer)
    save(path / "reward_1", other_judge, tokenizer)
    save(path / "judges", three_heads, tokenizer)
    for name in "prompts", "sft":
        rows = world.read(name)
        sums = [row for row in rows if row["kind"] == "math"]
        write_lines(path / f"{name}.jsonl", sums[:12] + rows[:12])
    return path


@pytest.fixture
def small_exam(monkeypatch):
    """Two answers, and 0.5 for everything."""
    def answer_two(policy, tokenizer, *args, **settings):
        card = dict.fromkeys([*exam.CARD, "gold"], 0.5)
        answers = []
        for row in world.read("exam")[:2]:
            answers.append(exam.Answer(row, "Hello.", True, world.judge(row, "Hello.")))
        return card, answers
    monkeypatch.setattr(exam, "exam", answer_two)


def config_of(Config, folders, **changes):
    settings = {"init": str(folders / "init"), "data": str(folders / "prompts.jsonl"),
                "batch": 8, "save": False}
    settings |= changes
    return Config(**settings)


def short_lines(capsys, folder):
    """-> what was printed, of which no line is longer than 80 columns"""
    printed = capsys.readouterr().out
    lines = printed.split("\n")
    for line in lines:
        if str(folder) not in line:
            assert len(line) <= 80
    return lines


def test_safe_runs(folders, small_exam, capsys):
    judges = str(folders / "judges")
    config = config_of(safe.Config, folders, steps=2, judges=judges)
    numbers = safe.train(config)["numbers"]
    prices = numbers["price"]
    assert len(prices) == 2
    assert prices[0] != 1.0
    svg = safe.picture([numbers])
    assert "a limit" in words_of(svg)
    lines = short_lines(capsys, folders)
    assert any(line.startswith("FAIL harmless") for line in lines)


def test_goodhart_runs(folders, small_exam, capsys):
    reward = str(folders / "reward")
    config = config_of(goodhart.Config, folders, steps=2, betas="0.1 0", judges=2, reward=reward)
    numbers = goodhart.train(config)["numbers"]
    assert list(numbers["runs"]) == ["beta 0.1", "beta 0", "doubt"]
    assert list(numbers["lost"]) == ["none", "price", "doubt", "alarm"]
    svg = goodhart.picture([numbers, numbers])
    assert "the truth" in words_of(svg)
    json.dumps(numbers)


def test_doubt_is_the_least_of_the_judges_scores(folders, small_exam, monkeypatch):
    def likes_all(prompts, texts):
        return torch.full([len(texts)], 1.0)

    def likes_none(prompts, texts):
        return torch.full([len(texts)], -1.0)
    config = config_of(goodhart.Config, folders, steps=2)
    log, texts, scores = goodhart.climb(config, 0.0, [likes_all, likes_none])
    assert len(texts) == 2
    assert len(scores) == 2
    assert scores[0] == [1.0] * 8                   # what the first judge says
    for row in log:
        assert row["score"] <= -1.0                 # an endless answer has even less


def test_race_runs(folders, small_exam, capsys):
    config = config_of(race.Config, folders, tokens=1000)
    numbers = race.train(config)["numbers"]
    right = numbers["right"]
    assert list(right) == ["reinforce", "rloo", "grpo", "ppo"]
    assert len(right["ppo"]) == 20
    assert len(numbers["places"]) == 20
    short_lines(capsys, folders)


def test_forgetting_runs(folders, small_exam, tmp_path, capsys):
    new = str(folders / "sft.jsonl")
    config = config_of(forgetting.Config, folders, steps=1, out=str(tmp_path), prompts=4, new=new,
                       shares="0")
    numbers = forgetting.train(config)["numbers"]
    assert numbers["gold"] == [0.5, 0.5]            # before, and for each share
    svg = forgetting.picture([numbers])
    assert "gold" in words_of(svg)


def test_landscape_runs(folders, monkeypatch, capsys):
    def learn(name, config, **changes):
        card = {"gold": 0.7, "kl": 0.5, "length": 20.0, "flattery": 0.1}
        row = {"chosen": 0.0, "rejected": -1.0}
        return {"after": card, "log": [row, row, row]}
    monkeypatch.setattr(landscape, "learn", learn)
    config = config_of(landscape.Config, folders, runs="dpo kto")
    numbers = landscape.train(config)["numbers"]
    assert numbers["error"] < 1e-3
    assert list(numbers["cards"]) == ["dpo", "kto"]
    assert len(numbers["chosen"]) == 3
    short_lines(capsys, folders)
    no_runs = config_of(landscape.Config, folders, runs="", quiet=True)
    landscape.train(no_runs)


@pytest.mark.parametrize("changes", [{"runs": "dpo ppppo"}, {"scenario": "rain"}])
def test_landscape_names_what_it_does_not_know(folders, changes):
    config = config_of(landscape.Config, folders, quiet=True, **changes)
    with pytest.raises(UserError, match="choose"):
        landscape.train(config)


def test_the_map_alone_needs_no_run(monkeypatch, tmp_path):
    """The command of page 5: --runs "" makes the toy and the map, and no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(landscape, "need", None)
    config = house.parse(landscape.Config, "doc", ["--runs", "", "--quiet"])
    numbers = landscape.train(config)["numbers"]
    assert numbers["error"] < 1e-3 and numbers["cards"] == {}
    assert "svg" in landscape.picture([numbers])


@pytest.mark.parametrize("program, flags", [
    (judge_bias, "--lora 4"),
    (race, "--steps 5"),
    (report, "--lr 0.1"),
    (safe, "--accumulate 2")])
def test_a_setting_that_would_change_nothing_is_no_flag(program, flags, capsys):
    Config = program.Config
    of_all_scripts = vars(house.Settings)["__annotations__"]
    for name in Config.unused:
        assert name in of_all_scripts
    with pytest.raises(UserError, match="unrecognized"):
        house.parse(Config, program.__doc__, flags.split())
    with pytest.raises(SystemExit):
        house.parse(Config, program.__doc__, ["--help"])
    shown = capsys.readouterr().out
    for name in Config.unused:
        assert f"--{name} " not in shown


def test_the_judges_of_safe_are_made_in_the_numbers_of_the_run(folders, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(safe.reward_model, "train", told.append)
    monkeypatch.setattr(safe, "load_scalar", lambda *args: (None, None))
    config = safe.Config(judges=str(tmp_path / "judges"), bf16=True, quiet=True)
    safe.load_judges(config)
    assert told[0].bf16


def test_both_students_see_the_same_batches(folders, tmp_path):
    """Answers of many lengths: how many tokens each batch has tells which one it is."""
    rows = []
    for i in range(60):
        text = "YES! " * (1 + i % 23)
        rows.append({"prompt": f"What about {i}?", "completion": text})
    path = write_lines(tmp_path / "teacher.jsonl", rows)
    config = distill.Config(init=str(folders / "init"), out=str(tmp_path), steps=10, batch=8,
                            quiet=True)
    log = distill.learn_from(path, config, save=False)["log"]
    of_samples = [row["targets"] for row in log]
    tokenizer = load_ranks()
    student = tiny_model(0)
    teacher = tiny_model(1)
    log = distill.learn_distribution(student, teacher, path, tokenizer, config)
    of_distribution = [row["targets"] for row in log.rows]
    assert of_distribution == of_samples
