"""The tests of lessons/questions.py: of each question the mechanism, on a tiny model or an exact
toy. The symptom is there before, and gone after. With NANOALIGN_FULL=1 the questions themselves
run.

    python -m pytest -q lessons/test_questions.py
"""
import inspect
import json
import os
import re

import pytest
import torch

import dpo
import grpo
import model as M
import ppo
import reward_model
from data.checkpoints import load, save
from data.run import UserError
from lessons import questions as Q

FULL = os.environ.get("NANOALIGN_FULL") == "1"
slow = pytest.mark.skipif(not FULL, reason="slow: NANOALIGN_FULL=1")
NUMBERS = range(1, len(Q.QUESTIONS) + 1)
TOYS = ["kl_is_negative", "no_contrast", "which_kl", "entropy_runs", "longer_and_longer",
        "not_a_number", "better_before", "critic_is_lost"]          # run without any checkpoint


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A folder with a tiny random model that has opinions: larger weights than at birth."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = Q.tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    save(folder, model, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def taught():
    """A tiny model that has learned a few answers."""
    return Q.imitate(M.render)


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def read(text):
    """A table -> rows, {name: number or text}. Columns stand two spaces apart."""
    lines = [line for line in text.splitlines() if line.strip(" ^")]
    rows = []
    for line in lines[1:]:
        row = {}
        for name, cell in zip(cells(lines[0]), cells(line)):
            row[name] = float(cell) if re.fullmatch(r"-?\d+\.?\d*|nan", cell) else cell
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the program

def test_there_are_twenty_five():
    assert len(Q.QUESTIONS) == 25


@pytest.mark.parametrize("number", NUMBERS)
def test_the_right_line_is_found(number):
    question = Q.QUESTIONS[number - 1]
    place, line = Q.line_of(question.file, question.text)
    file = re.escape(question.file)
    assert re.fullmatch(file + r":\d+", place)
    assert question.text.strip() in line


@pytest.mark.parametrize("number", NUMBERS)
def test_a_question_is_a_short_function_that_says_because(number):
    function = Q.QUESTIONS[number - 1].answer
    assert len(inspect.getsource(function).splitlines()) <= 25
    assert len(inspect.getdoc(function)) > 100


def test_a_line_that_is_gone_or_there_twice_is_said():
    with pytest.raises(UserError, match="found it in 0"):
        Q.line_of("ppo.py", "no such line")
    with pytest.raises(UserError, match="in one line"):
        Q.line_of("ppo.py", "return")


def test_a_planted_script_is_another_and_the_script_stays_as_it_is():
    flipped = Q.planted("ppo.py", ("-beta * k1.masked_fill", "beta * k1.masked_fill"))
    scores = torch.zeros(1)
    logps = torch.tensor([[-1.0]])
    ref_logps = torch.tensor([[-3.0]])
    answer = torch.ones(1, 1).bool()
    turned = flipped.token_rewards(scores, logps, ref_logps, answer, 0.5)
    straight = ppo.token_rewards(scores, logps, ref_logps, answer, 0.5)
    assert turned.item() == 1.0
    assert straight.item() == -1.0


def test_a_mistake_that_cannot_be_planted_is_said():
    with pytest.raises(UserError, match="found it 0 times"):
        Q.planted("ppo.py", ("no such line", ""))


def test_a_table_by_hand():
    first = {"step": 0, "loss": 0.5, "says": "yes"}
    second = {"step": 10, "loss": 123.45, "says": "no"}
    text = Q.table([first, second], "loss")
    assert text.splitlines() == [
        "  step    loss  says",
        "     0  0.5000  yes",
        "    10   123.5  no",
        "          ^^^^"]


def test_few_rows_are_the_first_the_last_and_some_between():
    log = []
    for step in range(21):
        log.append({"step": step, "loss": 0.0})
    five = Q.few(log, "step", 5)
    assert [row["step"] for row in five] == [0, 5, 10, 15, 20]
    of_two = Q.few(log[:2], "step")
    assert of_two == [{"step": 0}, {"step": 1}]


def test_plain_data_has_the_fields_and_no_more():
    path = Q.plain("prompts", "prompt answer", "math", 3)
    lines = open(path).readlines()
    assert len(lines) == 3
    row = json.loads(lines[0])
    assert set(row) == {"prompt", "answer"}


def test_a_block_of_the_page_is_replaced_and_nothing_else():
    page = "a\n<!-- output 1 -->\nold\n<!-- end -->\nb\n<!-- output 11 -->\nkept\n<!-- end -->\n"
    new = Q.put(1, "new", page)
    assert new == page.replace("\nold\n", "\n```\nnew\n```\n")
    assert Q.put(1, "new", new) == new
    with pytest.raises(UserError, match="output 7"):
        Q.put(7, "new", page)


def test_the_page_has_a_block_for_each_question():
    page = Q.PAGE.read_text(encoding="utf-8")
    for number in NUMBERS:
        assert page.count(f"<!-- output {number} -->") == 1
        assert page.count(f"\n## {number}. ") == 1
        assert page.count(f"`python -m lessons.questions {number}`") == 1


def test_without_a_number_it_lists_them(capsys):
    Q.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25
    assert lines[6] == "  7  the first ratio is not 1"


@pytest.mark.parametrize("which", ["0", "26", "seven"])
def test_a_wrong_number_is_said(which):
    with pytest.raises(UserError, match="from 1 to 25"):
        Q.main([which])


@pytest.mark.parametrize("name", TOYS)
def test_an_answer_fits_a_screen(name):
    functions = [question.answer.__name__ for question in Q.QUESTIONS]
    number = functions.index(name) + 1
    lines = Q.answer_to(number, init="").splitlines()
    assert max(len(line) for line in lines) <= 80
    assert len(lines) <= 36
    marks = []
    for line in lines:
        if "^" in line and line.strip(" ^") == "":
            marks.append(line)
    assert len(marks) > 0


# ---------------------------------------------------------------- the mechanisms

def test_1_chosen_falls_while_its_lead_grows():
    log = Q.prefer("dpo", steps=20)
    first = log[0]
    last = log[-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["chosen"] < -0.1
    assert last["rejected"] < last["chosen"] - 1
    assert last["accuracy"] == 1


def test_1_dpo_knows_the_lead_alone_and_sppo_the_level():
    chosen = torch.tensor([0.3])
    rejected = torch.tensor([-0.2])
    here = dpo.dpo(chosen, rejected, 0.5)
    lower = dpo.dpo(chosen - 5, rejected - 5, 0.5)
    assert torch.allclose(lower, here)
    here = dpo.sppo(chosen, rejected, 0.5)
    lower = dpo.sppo(chosen - 5, rejected - 5, 0.5)
    assert lower > 2 * here


def test_2_without_its_end_token_an_answer_never_ends(taught):
    line = "[int(is_answer)] * len(body)"
    without_end = "[int(is_answer)] * (len(body) - 1) + [0]"
    endless = Q.planted("model.py", (line, without_end))
    question, _ = Q.TALK[3]
    messages = [{"role": "user", "content": question}]
    for model, tokenizer, log in (Q.imitate(endless.render), taught):
        prompt = M.render_prompt(tokenizer, messages)
        answer = M.sample(model, tokenizer, [prompt], max_new=24, temperature=0)
        ended = bool(answer.ended[0])
        assert ended == (model is taught[0])
        last = log[-1]
        assert last["loss"] < 0.5               # and the loss does not tell


def test_3_a_sampler_that_forbids_the_end_makes_the_kl_negative():
    before, after = map(read, Q.kl_is_negative(""))
    for row in before[2:]:
        assert row["kl"] < -0.05
    for row in after[2:]:
        assert row["kl"] > 0
        assert row["k3"] == pytest.approx(row["true KL"], rel=0.5)


def test_4_the_loss_is_0_and_the_gradient_is_not():
    answer = torch.ones(4, 2)
    weights = grpo.per_answer(answer, 2)
    method = grpo.FAMILY["grpo"]
    some_right = [1.0, 0.0, 0.0, 1.0]
    all_right = [1.0, 1.0, 1.0, 1.0]
    for rewards, learns in ((some_right, True), (all_right, False)):
        logps = torch.full((4, 2), -1.0, requires_grad=True)
        old_logps = logps.detach()
        A = grpo.group_advantages(torch.tensor([rewards]))          # (1, 4)
        losses = grpo.grpo_loss(logps, old_logps, A.flatten(), answer, weights, method)
        loss = losses.sum()
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        size = logps.grad.norm()
        assert (size > 0.1) == learns


def test_5_the_kl_of_groups_without_contrast_unlearns():
    before = Q.three_too_hard(keep_all=True)
    after = Q.three_too_hard(keep_all=False)
    assert before[0]["worked"] > 0.9
    before_ends = [row["worked"] for row in before[-100:]]
    after_ends = [row["worked"] for row in after[-100:]]
    assert sum(before_ends) / 100 < 0.8
    assert sum(after_ends) / 100 > 0.85


def test_6_k1_as_a_loss_teaches_nothing():
    start = Q.pull_back("k1", steps=1)[0]
    end = Q.pull_back("k1")[-1]
    assert end > 0.7 * start
    for estimator in ("k2", "k3", "reward"):
        end = Q.pull_back(estimator)[-1]
        assert end < 0.2 * start


def test_7_the_temperature_that_sampled_makes_the_first_ratio_1(init):
    before, after = map(read, Q.first_ratio(init))
    errors = [abs(row["most"] - 1) for row in before]
    assert max(errors) > 0.1
    for row in after:
        assert row["least"] == pytest.approx(1, abs=1e-3)
        assert row["most"] == pytest.approx(1, abs=1e-3)
        assert row["clipped"] == 0


def test_8_a_mean_of_means_is_another_gradient():
    before, after = map(read, Q.accumulation_differs(""))
    in_one = after[0]
    in_parts = after[-1]
    assert before[-1]["gradient off by"] > 0.05
    assert in_parts["gradient off by"] < 1e-3
    assert in_parts["loss"] == pytest.approx(in_one["loss"], abs=2e-4)


def test_9_a_judge_that_reads_cut_answers_cannot_tell_them_apart(init, tmp_path):
    line = "        comparison = Comparison("
    cut = "        examples = [e._replace(ids=e.ids[:e.answer.index(1) + 2]) for e in examples]\n"
    short = Q.planted("reward_model.py", (line, cut + line))
    lines = []
    for i in range(40):
        row = {"prompt": f"Hi {i}!", "chosen": "It is so good.", "rejected": "It is so bad."}
        lines.append(json.dumps(row) + "\n")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(lines))
    transformer, tokenizer = load(init)
    judge = M.ScalarModel(transformer)
    for script in (short, reward_model):
        config = script.Config(data=str(path), kind="pairs")
        comparisons, _ = script.read_comparisons(config, tokenizer, 256)
        r = script.scores(judge, comparisons, tokenizer)            # (B, 2)
        chosen, rejected = r.unbind(1)
        apart = (chosen - rejected).abs().max()
        assert (apart > 1e-3) == (script is reward_model)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_10_the_best_policy_says_one_thing_unless_distance_costs(beta):
    log_ref = torch.tensor([0.2, 0.3, 0.5]).log()
    ref_logps = log_ref[:, None]                                    # (3, 1)
    scores = torch.tensor([1.0, 0.5, 0.0])
    one_token = torch.ones(3, 1).bool()
    theta = log_ref.clone().requires_grad_()
    for _ in range(600):
        log_pi = theta.log_softmax(0)
        logps = log_pi.detach()[:, None]                            # (3, 1)
        rewards = ppo.token_rewards(scores, logps, ref_logps, one_token, beta)
        expected = (log_pi.exp() * rewards[:, 0]).sum()             # its gradient is exact
        gradient, = torch.autograd.grad(expected, theta)
        theta.data += gradient
    pi = theta.softmax(0)
    if beta == 0:
        assert pi[0] > 0.98
    else:
        best = (log_ref + scores / beta).softmax(0)
        assert torch.allclose(pi, best, atol=1e-3)


def test_11_entropy_has_two_ends_and_a_leash_between():
    collapse = Q.four_of_sixteen(bonus=0.0, beta=0.0)[-1]["entropy"]
    explode = Q.four_of_sixteen(bonus=1.0, beta=0.0)[-1]["entropy"]
    leashed = Q.four_of_sixteen(bonus=0.0, beta=0.15)[-1]["entropy"]
    assert collapse < 1.1
    assert explode > 2.4
    assert 1.25 < leashed < 1.7


def test_12_with_the_sign_turned_distance_pays():
    """One token of two, all scores 0: pi that began a little off goes back, or runs away."""
    flipped = Q.planted("ppo.py", ("-beta * k1.masked_fill", "beta * k1.masked_fill"))
    log_ref = torch.tensor([0.5, 0.5]).log()
    ref_logps = log_ref[:, None]                                    # (2, 1)
    scores = torch.zeros(2)
    one_token = torch.ones(2, 1).bool()
    kls = {}
    for script in (flipped, ppo):
        theta = torch.tensor([0.5, 0.0], requires_grad=True)
        for _ in range(300):
            log_pi = theta.log_softmax(0)
            logps = log_pi.detach()[:, None]                        # (2, 1)
            rewards = script.token_rewards(scores, logps, ref_logps, one_token, 1.0)
            expected = (log_pi.exp() * rewards[:, 0]).sum()
            gradient, = torch.autograd.grad(expected, theta)
            theta.data += gradient
        log_ratio = log_pi - log_ref
        kl = (log_pi.exp() * log_ratio).sum()
        kls[script] = kl.item()
    assert kls[flipped] > 0.5
    assert kls[ppo] < 1e-3


def test_13_log_pi_of_an_answer_that_was_cut_off_is_0(init):
    line = "    logps = token_logps(model, ids, mask, answer)  "
    limit = "    answer = answer & (mask.cumsum(1) <= 8)\n"
    cut = Q.planted("dpo.py", (line, limit + line))
    policy, tokenizer = load(init)
    messages = [{"role": "user", "content": "Hi! How are you?"}]
    good = M.render_answer(tokenizer, messages, "Good.")
    bad = M.render_answer(tokenizer, messages, "Bad.")
    pair = dpo.Pair(good, bad, {})
    chosen, rejected = cut.answer_logps(policy, [pair], tokenizer)  # (1,) each
    assert chosen.item() == 0.0
    assert rejected.item() == 0.0
    chosen, rejected = dpo.answer_logps(policy, [pair], tokenizer)
    assert chosen.item() < 0
    assert rejected.item() < 0


def test_14_padding_that_is_looked_at_changes_answers(init):
    before, after = map(read, Q.batch_differs(init))
    before_errors = [row["first log pi off by"] for row in before]
    after_errors = [row["first log pi off by"] for row in after]
    assert max(before_errors) > 1e-2
    assert max(after_errors) < 1e-3


def test_15_a_guess_in_form_earns_as_much_as_honest_work():
    """and strict pays for the truth, whatever it looks like."""
    worked = "First 3 + 4 = 7. The answer is 7."
    assert Q.form_and_truth("7", worked, True) == 1
    assert Q.form_and_truth("7", "The answer is 9.", True) == 1
    assert grpo.strict("7", worked, True) == 1
    assert grpo.strict("7", "The answer is 9.", True) == 0.1


def test_16_long_wrong_answers_survive_a_division_by_their_length():
    by_length = Q.guess_or_ramble(grpo.per_answer)
    by_constant = Q.guess_or_ramble(grpo.constant)
    divided = [row["ramble"] for row in by_length]
    undivided = [row["ramble"] for row in by_constant]
    start = divided[0]
    assert max(divided) > start + 0.05
    assert max(undivided) < start + 0.05
    assert divided[-1] > 1.5 * undivided[-1]


def test_17_before_it_is_nan_and_after_it_is_a_number():
    before, after = Q.not_a_number("")
    values = [row["value"] for row in read(before)]
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert values == [nan, nan, nan]
    assert "nan" not in after


def test_18_who_learned_the_questions_writes_them():
    before, after = Q.speaks_for_the_user("")
    assert "<|im_start|>user" in before
    assert "<|im_start|>" not in after


def test_19_adapters_off_is_not_the_sft_model(init):
    before, after = map(read, Q.who_is_the_reference(init))
    off = before[0]
    merged = after[0]
    assert abs(off["first loss"] - 0.6931) > 1e-3
    assert abs(off["chosen"]) > 1e-2
    assert merged["first loss"] == pytest.approx(0.6931, abs=1e-3)
    assert merged["chosen"] == pytest.approx(0, abs=1e-3)
    assert off["logits off by"] > 10 * merged["logits off by"]


def test_20_the_best_of_ten_equals_is_luck():
    few, many = map(read, Q.better_before(""))
    best, worst, _ = few
    assert best["right"] - worst["right"] > 0.1
    best, worst, _ = many
    assert best["right"] - worst["right"] < 0.06


def test_21_rows_that_come_again_are_known_by_heart(init):
    log = Q.memorise(init, rows=32, epochs=8)
    first = log[0]
    last = log[-1]
    assert last["last steps"] < first["first steps"] - 1
    assert last["last steps"] < last["held_out"] - 0.3


def test_22_a_prompt_built_in_another_way_costs_log_pi():
    before, after = map(read, Q.other_template(""))
    in_other_ways = [row["log pi(answer)"] for row in before]
    as_in_training = after[0]["log pi(answer)"]
    assert min(in_other_ways) < as_in_training - 1


def test_23_large_returns_are_out_of_the_critics_reach():
    before = Q.follow(scale=20.0)[-1]
    after = Q.follow(scale=1.0)[-1]
    assert before["explained"] < 0.6
    assert after["explained"] > 0.6
    assert before["V"] < 0.5 * before["return"]


def test_24_one_step_a_batch_clips_nothing(init):
    sizes = dict(steps=2, batch=8, minibatch=8, max_new=8)
    log = Q.climb(ppo, init, epochs=1, **sizes)
    clipped = [row["clipped"] for row in log]
    assert clipped == [0.0, 0.0]
    assert log[0]["ratio"] == pytest.approx(1, abs=1e-4)
    log = Q.climb(ppo, init, epochs=4, lr=1e-2, **sizes)
    assert log[1]["clipped"] > 0


def test_25_the_share_of_one_pair_is_0_or_1():
    less = torch.tensor([0.1])
    more = torch.tensor([0.2])
    assert dpo.share_ahead(less, more) == 0
    assert dpo.share_ahead(more, less) == 1


# ---------------------------------------------------------------- the questions themselves

@slow
@pytest.mark.parametrize("number", NUMBERS)
def test_each_question_runs_from_out_sft_and_fits_a_screen(number):
    lines = Q.answer_to(number, "out/sft").splitlines()
    assert max(len(line) for line in lines) <= 80
    assert len(lines) <= 36
