"""The tests of the lessons' programs: their own functions, on tiny models, in seconds.
`python test_all.py` runs them, too; with --full each program also runs once with --quick."""
import copy
import json
import math
import re
import sys
import time
from dataclasses import fields, replace
from itertools import combinations, cycle
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cai
import dpo
import grpo
from data import run as house
import model as M
import reward_model as R
import sft
from data import checkpoints as C
from data import exam, rows, studybuddy
from data.checkpoints import load, load_ranks, load_scalar, save
from lessons import (bad_input, best_of, bugs, constitution, distill, dynamic, figures, goodhart,
                     judge_bias, kto, mutants, online, process_reward, search, speed,
                     talking_judge)
from test_all import END, TOKENIZER, close, ends_soon, gradients, same, weights, write_lines
from test_all import tiny_model as tiny_policy

HERE = Path(__file__).parent.parent


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    sizes |= changes
    config = M.ModelConfig(TOKENIZER.n_vocab, **sizes)
    return M.Transformer(config)


# ---------------------------------------------------------------- best_of

def test_the_best_is_the_one_with_the_highest_score():
    first = [0.1, 0.9, 0.3]
    second = [0.8, 0.2, 0.7]
    scores = torch.tensor([first, second])                      # (2, 3)
    assert best_of.pick_best(scores).tolist() == [1, 0]


def test_a_random_one_may_be_any():
    generator = torch.Generator().manual_seed(0)
    picked = best_of.pick_random(torch.zeros(900, 3), generator)
    for k in range(3):
        assert (picked == k).float().mean() > 0.25


def test_the_kl_bound_is_the_docstrings_example():
    assert best_of.kl_bound(8) == pytest.approx(1.20, abs=0.005)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_best_of_n_is_no_farther_than_its_bound(n):
    """Of 1,000 equally likely answers: the best of n is the r-th if all are at most the r-th, and
    one of them is."""
    r = np.arange(1, 1001) / 1000                               # (1000,)
    all_are_at_most_r = r**n
    all_are_below_r = (r - 0.001)**n
    best = all_are_at_most_r - all_are_below_r
    kl = np.sum(best * np.log(best / 0.001))
    bound = best_of.kl_bound(n)
    assert kl <= bound + 1e-9
    assert kl == pytest.approx(bound, abs=0.02)


# what a fake model answers: its prompts end in one of these letters
ANSWERS = {"P": ["a", "abcd", "abc"],
           "Q": ["xy", "xyz", ""],
           "R": ["k", "klm", "kl"]}
ENDED = {"P": [1, 0, 1],
         "Q": [1, 1, 1],
         "R": [0, 0, 0]}


def fake_sample(model, tokenizer, prompts, n, max_new, generator):
    texts = []
    ended = []
    for ids in prompts:
        letter = tokenizer.decode(ids).split("user\n")[1][0]
        texts += ANSWERS[letter]
        ended += ENDED[letter]
    return SimpleNamespace(texts=texts, ended=torch.tensor(ended).bool())


def kept(path):
    """{(prompt, answer)} of a file of conversations."""
    pairs = set()
    for line in Path(path).read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        pairs.add((question["content"], answer["content"]))
    return pairs


def length_of(prompts, texts):
    return [float(len(text)) for text in texts]


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Where best_of has written what it kept. A fake model answered, and the longest is best."""
    save(tmp_path / "init", tiny_model(), TOKENIZER)
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": letter} for letter in "PQR"])
    monkeypatch.setattr(best_of, "sample", fake_sample)
    config = best_of.Config(init=f"{tmp_path}/init", data=data, out=f"{tmp_path}/out", n=3,
                            quiet=True, save=False)
    best_of.train(config, score=length_of)
    return tmp_path / "out"


def test_the_best_answers_are_kept_if_they_end(chosen):
    assert kept(chosen / "best.jsonl") == {("P", "abc"), ("Q", "xyz")}


def test_random_answers_are_kept_if_they_end_and_say_something(chosen):
    may_be_kept = {("P", "a"), ("P", "abc"), ("Q", "xy"), ("Q", "xyz")}
    assert kept(chosen / "random.jsonl") <= may_be_kept


def test_the_reward_is_read_at_the_end_token():
    torch.manual_seed(0)
    judge = M.ScalarModel(tiny_model())
    end = M.special(TOKENIZER, M.END)
    prompts = []
    for text in ("Hi", "What is 2 + 3?"):
        prompts.append(SimpleNamespace(messages=ask(text)))
    texts = ["Hello you.", "So it is 5. Well done!"]
    rewards = best_of.reward(judge, TOKENIZER, prompts, texts)         # (2,)
    for prompt, text, reward in zip(prompts, texts, rewards):
        ids = M.render_prompt(TOKENIZER, prompt.messages)
        ids += TOKENIZER.encode_ordinary(text)
        row = torch.tensor([ids + [end]])                       # (1, T) alone, without padding
        alone = judge(row)[0, -1]
        assert alone.item() == pytest.approx(reward.item(), abs=1e-5)


def test_choosing_among_more_is_better_and_the_control_is_not():
    numbers = torch.Generator().manual_seed(0)
    scores = torch.rand(2000, 8, generator=numbers)
    lots = torch.Generator().manual_seed(0)
    config = best_of.Config(quiet=True, n=8)
    curve = best_of.what_choosing_buys(scores, scores, lots, config)
    sizes = [line["n"] for line in curve]
    assert sizes == [1, 2, 4, 8]
    for line in curve:
        n = line["n"]
        largest = n / (n + 1)                                   # of n numbers, on average
        assert line["gold"] == pytest.approx(largest, abs=0.02)
        assert line["random"] == pytest.approx(0.5, abs=0.03)


# ---------------------------------------------------------------- distill

def test_distill_loss_is_the_docstrings_example():
    teacher = torch.tensor([[0.8, 0.2]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()
    loss = distill.distill_loss(student, teacher, 1)
    assert loss.item() == pytest.approx(0.193, abs=0.0005)


def test_distill_loss_is_the_kl_from_teacher_to_student():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 6))               # (4, 6), (4, 6)
    total = 0.0
    for s, t in zip(student, teacher):
        exp_s = np.exp(s)                                       # (6,)
        exp_t = np.exp(t)
        p = exp_t / exp_t.sum()
        q = exp_s / exp_s.sum()
        total += sum(p * np.log(p / q))
    student = torch.tensor(student)
    teacher = torch.tensor(teacher)
    loss = distill.distill_loss(student, teacher, 4)
    assert loss.item() == pytest.approx(total / 4, abs=1e-9)


def test_samples_and_distribution_have_the_same_mean_gradient():
    """The sum over v of p_T(v) times the gradient that token v would give in SFT."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 6)
    student = torch.randn(1, 6, requires_grad=True)
    distill.distill_loss(student, teacher, 1).backward()
    mean = 0
    for v, p in enumerate(teacher.softmax(-1)[0]):
        loss = -student.log_softmax(-1)[0, v]
        gradient, = torch.autograd.grad(loss, student)
        mean = mean + p * gradient
    assert torch.allclose(student.grad, mean, atol=1e-6)


CHATS = []
for i in range(24):
    text = "YES! " * (1 + i % 5)
    CHATS.append({"prompt": f"What about {i}?", "completion": text})


def test_a_student_comes_closer_to_its_teacher(tmp_path):
    path = write_lines(tmp_path / "teacher.jsonl", CHATS)
    teacher = tiny_model(0)
    for p in teacher.parameters():
        p.data *= 3                                                 # a teacher of strong opinions
    student = tiny_model(1)
    before = copy.deepcopy(teacher.state_dict())
    config = distill.Config(steps=30, batch=8, lr=1e-2, quiet=True)
    log = distill.learn_distribution(student, teacher, path, TOKENIZER, config)
    losses = [row["loss"] for row in log.rows]
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] >= 0
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), "the teacher does not move"


def test_its_own_teacher_teaches_nothing(tmp_path):
    path = write_lines(tmp_path / "teacher.jsonl", CHATS)
    student = tiny_model()
    teacher = tiny_model()
    config = distill.Config(steps=1, batch=8, quiet=True)
    log = distill.learn_distribution(student, teacher, path, TOKENIZER, config)
    first = log.rows[0]
    assert first["loss"] == pytest.approx(0, abs=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss(tmp_path):
    path = write_lines(tmp_path / "teacher.jsonl", CHATS)
    losses = []
    for accumulate in (1, 3):
        student = tiny_model(1)
        teacher = tiny_model()
        config = distill.Config(steps=1, batch=8, accumulate=accumulate, quiet=True)
        log = distill.learn_distribution(student, teacher, path, TOKENIZER, config)
        losses.append(log.rows[0]["loss"])
    whole, in_parts = losses
    assert whole == pytest.approx(in_parts, rel=1e-4)


def test_a_teacher_of_another_vocabulary_is_an_error(tmp_path, monkeypatch):
    save(tmp_path / "m", tiny_model(), TOKENIZER)
    other = SimpleNamespace(_mergeable_ranks={b"a": 0})
    load = distill.load

    def load_other(folder, device):
        model, tokenizer = load(tmp_path / "m", device)
        if folder == "teacher":
            tokenizer = other
        return model, tokenizer

    monkeypatch.setattr(distill, "load", load_other)
    config = distill.Config(init="student", teacher="teacher", save=False, quiet=True)
    with pytest.raises(M.UserError, match="--teacher teacher: .*vocabulary"):
        distill.train(config)


def tiny_model_reward(seed=0):
    """Untrained, with weights larger than at birth, so that mistakes show."""
    torch.manual_seed(seed)
    config = M.ModelConfig(vocab_size=TOKENIZER.n_vocab, d_model=32, n_layers=2, d_ff=64)
    network = M.Transformer(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 2 else 0.5)
    return network


def lines_of(name, count):
    lines = rows.read_lines(f"data/{name}.jsonl")
    return [line.row for line in lines[:count]]


def comparison(prompt, answers, row={}):
    """A Comparison of texts, the best one first."""
    messages = rows.to_messages(prompt)
    examples = [M.render_answer(TOKENIZER, messages, text) for text in answers]
    return R.Comparison(messages, answers, examples, row, "file:1")


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    path = tmp_path_factory.mktemp("lessons") / "init"
    save(path, tiny_model_reward(), TOKENIZER)
    return str(path)


# ---- process_reward.py

STEPS = ["First 2 + 3 = 5.", "Then 5 + 4 = 9.", "The answer is 9."]
ASKED = rows.to_messages("What is 2 + 3 + 4?")


def texts_at(example):
    """What the judge has read wherever it is read, from the answer's start."""
    texts = []
    for t, read in enumerate(example.answer):
        if read:
            so_far = TOKENIZER.decode(example.ids[:t + 1])
            texts.append(so_far.split("assistant\n")[-1])
    return texts


def test_a_process_judge_is_read_at_the_last_token_of_every_step():
    example = process_reward.encode(TOKENIZER, ASKED, STEPS, "process")
    one = STEPS[0]
    two = " ".join(STEPS[:2])
    three = " ".join(STEPS)
    assert texts_at(example) == [one, two, three]


def test_an_outcome_judge_is_read_at_the_end_token():
    example = process_reward.encode(TOKENIZER, ASKED, STEPS, "outcome")
    assert texts_at(example) == [" ".join(STEPS) + "<|im_end|>"]


def test_every_place_has_its_label():
    config = process_reward.Config()
    for judge in ("process", "outcome"):
        some, held = process_reward.read_solutions(config, TOKENIZER, 256, judge)
        for solution in some + held:
            places = sum(solution.example.answer)
            assert places == len(solution.labels)
            if judge == "outcome":
                assert len(solution.labels) == 1
        learned = {str(solution.prompt) for solution in some}
        held_out = {str(solution.prompt) for solution in held}
        assert not learned & held_out


def test_scores_stand_in_the_order_of_labels():
    scalar = M.ScalarModel(tiny_model_reward())
    examples = []
    for count in (1, 3, 2):
        steps = STEPS[:count]
        examples.append(process_reward.encode(TOKENIZER, ASKED, steps, "process"))
    want = []
    for example in examples:
        row = torch.tensor([example.ids])                       # (1, T)
        is_read = torch.tensor(example.answer) == 1             # (T,)
        alone = scalar(row)[0]                                  # (T,)
        want += alone[is_read].tolist()
    r = process_reward.scores(scalar, examples, TOKENIZER)             # (6,)
    assert r.tolist() == pytest.approx(want, abs=1e-4)
    lists = process_reward.score_lists(scalar, examples, TOKENIZER)
    counts = [len(one) for one in lists]
    assert counts == [1, 3, 2]
    assert torch.cat(lists).tolist() == pytest.approx(want, abs=1e-4)


def test_the_first_wrong_step():
    assert process_reward.first_wrong([1, 0, 0]) == 1
    assert process_reward.first_wrong([0.9, 0.8, 0.2]) == 2
    assert process_reward.first_wrong([1, 1]) is None


def test_report_card_of_steps(monkeypatch):
    """One wrong solution found, one found too late, one right left alone, one not."""
    wrong = [1, 0, 0]
    right = [1, 1]
    held = []
    for labels in (wrong, wrong, right, right):
        example = M.Example([], [])
        held.append(process_reward.Solution([], [], example, labels))
    found = torch.tensor([2.0, -1.0, 1.0])
    found_too_late = torch.tensor([2.0, 1.0, -1.0])
    left_alone = torch.tensor([1.0, 1.0])
    accused = torch.tensor([1.0, -1.0])
    lists = [found, found_too_late, left_alone, accused]
    monkeypatch.setattr(process_reward, "score_lists", lambda *args: lists)
    card = process_reward.evaluate(None, held, None)
    assert card["first_wrong"] == 0.5
    assert card["all_right"] == 0.5
    assert card["accuracy"] == pytest.approx(7 / 10)


def test_each_step_is_asked_about_with_those_before_it(monkeypatch):
    """Who says "Wrong." at the end finds a slip; of the last sentence nobody asks."""
    asked = []

    def respond(critic, tokenizer, conversations, **settings):
        asked.extend(messages[0]["content"] for messages in conversations)
        return ["4. Right.", "5, 6: not the same. Wrong.", "x"]
    monkeypatch.setattr(process_reward, "respond", respond)
    solved = [(ask("Add it."), ["First a.", "Then b.", "The answer is c."]),
              (ask("Again."), ["First d.", "The answer is e."]), (ask("Oh."), ["f."])]
    marks = process_reward.marks_in_words(None, None, solved)
    assert marks == [[1, 0, 1], [1, 1], [1]]
    assert asked == ["Add it. First a. Is the last step right?",
                     "Add it. First a. Then b. Is the last step right?",
                     "Again. First d. Is the last step right?"]


def test_the_base_finds_a_slip_in_words():
    critic, tokenizer = load("data/base")
    solved = []
    for result in (28, 21):
        steps = ["First 7 x 10 = 70.", f"Then 7 x 4 = {result}.", "The answer is 98."]
        solved.append((ask("How much is 7 x 14?"), steps))
    marks = process_reward.marks_in_words(critic, tokenizer, solved)
    assert marks == [[1, 1, 1], [1, 0, 1]]


def test_a_solution_is_as_strong_as_its_weakest_step():
    r = torch.tensor([2.0, -1.0, 2.0])
    assert process_reward.strength(r) == -1


def test_majority_is_the_first_with_the_commonest_result():
    assert process_reward.majority(["3", "7", "4", "7"]) == 1


def test_best_of_picks(monkeypatch):
    """Of eight solutions to six sums one or five are right: only with five is the majority.
    `outcome` knows the right ones; `process` sees a weak step in the wrong ones, between strong
    ones."""
    rng = Random(0)
    sums = [studybuddy.ask(rng, "math", "exam") for _ in range(6)]
    commonest = "2 + 2 = 4. So it is 1."
    texts = []
    right_ends = []                     # of each of the 48: how a right solution ends
    for i, row in enumerate(sums):
        sentences, _, _ = studybuddy.worked(rng, row)
        worked = " ".join(sentences).removeprefix("First ")     # it is given to all
        right = f"{worked} The answer is {row['answer']}."
        right_ends += 8 * [f" {row['answer']}."]
        if i < 4:
            texts += 4 * [commonest] + [right, "So it is 2.", "So it is 3.", "x"]
        else:
            texts += 2 * [commonest] + 5 * [right] + ["So it is 3."]
    samples = SimpleNamespace(texts=texts)

    def says(name, examples, tokenizer):
        lists = []
        for example, right_end in zip(examples, right_ends):
            count = sum(example.answer)
            text = TOKENIZER.decode(example.ids)
            if f"{right_end}<" in text:
                lists.append(torch.full((count,), 0.5))
            elif name == "process":
                lists.append(torch.tensor([2.0, -1.0, 2.0]))
            else:
                lists.append(torch.zeros(1))
        return lists

    def in_words(critic, tokenizer, solved):
        """Finds a slip in the right ones alone: the first of the wrong ones is its choice."""
        marks = []
        for (prompt, sentences), right_end in zip(solved, right_ends):
            is_right = " ".join(sentences).endswith(right_end)
            marks.append([1.0, float(not is_right)])
        return marks

    monkeypatch.setattr(process_reward, "sample", lambda *args, **settings: samples)
    monkeypatch.setattr(process_reward, "score_lists", says)
    monkeypatch.setattr(process_reward, "marks_in_words", in_words)
    config = process_reward.Config(problems=6)
    judges = {"outcome": "outcome", "process": "process"}
    attempts = process_reward.attempts_at_sums(tiny_model_reward(), TOKENIZER, config)
    card = process_reward.best_of(attempts, judges, None, TOKENIZER)
    share_right = (4 + 2 * 5) / 48
    assert card == {"random": pytest.approx(share_right), "any": 1.0,
                    "by_majority": pytest.approx(2 / 6), "by_outcome": 1.0,
                    "by_process": 1.0, "by_words": 0.0}


def test_the_loss_of_steps_is_their_mean_in_however_many_parts(init, tmp_path, monkeypatch):
    """The mean is over all steps of all solutions, so parts with few steps count less."""
    clip = process_reward.clip_gradients
    gradients = []

    def look(scalar):
        gradients.append([p.grad.clone() for p in scalar.parameters()])
        return clip(scalar)

    monkeypatch.setattr(process_reward, "clip_gradients", look)
    data = write_lines(tmp_path / "steps.jsonl", lines_of("steps", 30))
    for accumulate in (1, 3):
        config = process_reward.Config(init=init, data=data, steps=1, batch=8,
                                       accumulate=accumulate, quiet=True)
        process_reward.train_judge(config, "process")
    whole, in_parts = gradients
    for a, b in zip(whole, in_parts):
        assert torch.allclose(a, b, atol=1e-5)
    assert max(g.abs().max() for g in whole) > 1e-4


def test_process_reward_runs(init, tmp_path):
    data = write_lines(tmp_path / "steps.jsonl", lines_of("steps", 30))
    config = process_reward.Config(init=init, data=data, out=f"{tmp_path}/out", quick=True,
                                   batch=4, quiet=True)
    results = process_reward.train(config)
    names = {"first_wrong", "by_process", "by_outcome"}
    assert names <= set(results["after"])
    assert len(results["log"]) == 3
    assert load_scalar(config.out)


# ---- talking_judge.py

def test_both_orders_cancel_a_liking_for_a_letter():
    """Logits from how much better the chosen one is, and a liking for A whatever it is."""
    strength = [1.5, -0.4]
    liking = 0.8
    logits = []
    for s in strength:
        chosen_is_a = [s + liking, 0]                           # of A, of B
        chosen_is_b = [liking, s]
        logits.append([chosen_is_a, chosen_is_b])
    logps = torch.tensor(logits).log_softmax(-1)                # (B, order, letter)
    margin, bias = talking_judge.generative_margin(logps)
    assert margin.tolist() == pytest.approx(strength)
    assert bias.tolist() == pytest.approx([liking, liking])
    other_orders = logps.flip(1)
    other_margin, other_bias = talking_judge.generative_margin(other_orders)
    assert other_margin.tolist() == pytest.approx([-1.5, 0.4])
    assert other_bias.tolist() == bias.tolist()


def test_generative_loss_is_that_of_the_right_letters():
    chosen_is_a = [0.7, 0.2]
    chosen_is_b = [0.4, 0.5]
    p = torch.tensor([[chosen_is_a, chosen_is_b]])              # (1, 2, 2)
    want = -(math.log(0.7) + math.log(0.5)) / 2
    loss = talking_judge.generative_loss(p.log())
    assert loss.tolist() == pytest.approx([want])


def test_verdicts_are_the_next_tokens_log_probs_in_both_orders():
    network = tiny_model_reward()
    A, = TOKENIZER.encode_ordinary("A")
    B, = TOKENIZER.encode_ordinary("B")
    short = comparison("Hi", ["Good.", "Bad."])
    long = comparison("What is 2 + 3?", ["It is 5, I think.", "6"])
    pairs = talking_judge.in_both_orders([short, long], TOKENIZER)
    logps = talking_judge.letter_logps(network, pairs, TOKENIZER)
    assert logps.shape == (2, 2, 2)                             # pair, order, letter
    for pair, of_pair in zip(pairs, logps):
        good, bad = pair.answers
        orders = [(good, bad), (bad, good)]
        for (a, b), letters in zip(orders, of_pair):
            question = talking_judge.question(TOKENIZER, pair.prompt, a, b)
            text = TOKENIZER.decode(question.ids)
            assert f"A: {a}\nB: {b}\n" in text
            assert text.endswith("<|im_start|>assistant\n")
            row = torch.tensor([question.ids])                  # (1, T)
            after = network(row)[0, -1].log_softmax(-1)         # (V,)
            want = after[[A, B]]
            assert letters.tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_a_question_too_long_is_left_out_and_many_are_an_error(tmp_path, capsys):
    """Each answer fits, both do not."""
    lines = []
    for i in range(24):
        lines.append({"prompt": f"Is {i} odd?", "chosen": "Yes.", "rejected": "No."})
    too_long = {"prompt": "Is 5 odd?", "chosen": "yes " * 110, "rejected": "no " * 110}
    lines[5] = too_long
    data = write_lines(tmp_path / "long.jsonl", lines)
    config = talking_judge.Config(data=data)
    train, held = talking_judge.read_questions(config, TOKENIZER, 256)
    assert len(train) + len(held) == 23
    assert "1 pairs are left out" in capsys.readouterr().out
    write_lines(tmp_path / "long.jsonl", lines + 4 * [too_long])
    with pytest.raises(M.UserError, match="5 of 28 questions"):
        talking_judge.read_questions(config, TOKENIZER, 256)


def test_a_talking_judge_learns_a_few_pairs(init, tmp_path):
    lines = []
    for i in range(24):
        prompt = f"Is {i} a number?"
        lines.append({"prompt": prompt, "chosen": "Yes, it is.", "rejected": "Go away."})
    data = write_lines(tmp_path / "own.jsonl", lines)
    config = talking_judge.Config(init=init, data=data, steps=15, lr=3e-3, batch=8,
                                  out=f"{tmp_path}/out", quiet=True)
    results = talking_judge.train(config)
    assert results["after"]["accuracy"] == 1
    assert results["passed"]
    saved, _ = load(config.out)
    assert saved.config.d_model == 32


# ---- judge_bias.py

def test_gradient_x_input_is_the_derivative_along_each_embedding():
    scalar = M.ScalarModel(tiny_model_reward())
    embed = scalar.transformer.embed
    ids = torch.tensor([5, 70, 300, 9, 41])
    eps = 1e-2

    def score_with_longer(t, part):
        """The score if the embedding of token t is longer by a part of itself."""
        scale = torch.ones(5, 1)
        scale[t] += part
        hook = embed.register_forward_hook(lambda module, args, output: output * scale)
        r = scalar(ids[None])[0, -1]
        hook.remove()
        return r.item()

    got = judge_bias.gradient_x_input(scalar, ids)              # (5,)
    for t in range(5):
        up = score_with_longer(t, eps)
        down = score_with_longer(t, -eps)
        slope = (up - down) / (2 * eps)
        assert got[t].item() == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_credit_of_three_heads_is_that_of_their_combination():
    scalar = M.ScalarModel(tiny_model_reward(), 3)
    one = M.ScalarModel(scalar.transformer, 1)
    weight = scalar.score.weight                                # (3, C)
    with torch.no_grad():
        weight[1:] = 0                                          # so two heads say log sigma(0)
        one.score.weight.copy_(weight[:1])
    ids = torch.tensor([5, 70, 300])
    r = one(ids[None])[0, -1]
    slope = torch.sigmoid(-r)                                   # of log sigma
    credit_of_one = judge_bias.gradient_x_input(one, ids)       # (3,)
    credit_of_three = judge_bias.gradient_x_input(scalar, ids)
    assert torch.allclose(credit_of_three, slope * credit_of_one, atol=1e-4)


def test_probes_hold_a_change_against_what_was():
    some = []
    for i in range(3):
        some.append(comparison(f"What is {i}?", [f"It is {i}.", "No."]))
    for change in judge_bias.PROBES.values():
        probes = change(some, TOKENIZER)
        for one, probe in zip(some, probes):
            changed, unchanged = probe.answers
            assert probe.prompt == one.prompt
            assert unchanged == one.answers[0]
            text = TOKENIZER.decode(probe.examples[0].ids)
            assert text.endswith(f"{changed}<|im_end|>")
    swapped = judge_bias.swapped(some, TOKENIZER)[0]
    padded = judge_bias.padded(some, TOKENIZER)[0]
    assert swapped.answers[0] == "It is 2."
    assert padded.answers[0].startswith("It is 0. I hope")


def test_rises_are_changed_minus_unchanged(monkeypatch):
    """A judge that counts letters: the score rises by what was added."""
    some = []
    for row in lines_of("preferences", 3):
        some.append(comparison(row["prompt"], ["You are."], row))

    def letters(scalar, probes, tokenizer):
        counts = []
        for probe in probes:
            counts.append([len(text) for text in probe.answers])
        return torch.tensor(counts).float()                     # (N, 2)

    monkeypatch.setattr(judge_bias, "all_scores", letters)
    effects = judge_bias.rises(None, some, TOKENIZER)
    assert effects["padding"]["score"] == len(" I hope that this helps.")
    assert effects["flattery"]["score"] > 5
    assert effects["swap"] == {"score": 0, "gold": 0}


def test_tables_of_the_truth_itself():
    held = []
    for row in lines_of("preferences", 300):
        answers = [row["chosen"], row["rejected"]]
        held.append(R.Comparison([], answers, [], row, ""))
    gold, _ = R.truth(held)                                     # (300, 2)
    by_kind = judge_bias.order_by_kind(gold, held)
    by_gap = judge_bias.order_by_gap(gold, held)
    assert set(by_kind) == set(studybuddy.KINDS)
    assert set(by_kind.values()) == {1}
    assert set(by_gap.values()) == {1}
    gap = (gold[:, 0] - gold[:, 1]).abs()                       # (300,)
    half = gold.clone()
    half[gap <= 0.5] *= -1                                      # it is wrong where it is close
    by_gap = judge_bias.order_by_gap(half, held)
    assert list(by_gap.values()) == [0, 0, 1, 1]


def test_judge_bias_runs(tmp_path, capsys):
    judge = M.ScalarModel(tiny_model_reward(), 3)
    save(tmp_path / "judge", judge, TOKENIZER)
    data = write_lines(tmp_path / "pairs.jsonl", lines_of("preferences", 200))
    config = judge_bias.Config(init=f"{tmp_path}/judge", data=data, out=f"{tmp_path}/out",
                               quick=True)
    results = judge_bias.train(config)
    text = Path(config.out, "results.json").read_text()
    written = json.loads(text)
    assert written["probes"] == results["probes"]
    printed = capsys.readouterr().out
    for words in ("flattery", "gold order", "what each token did"):
        assert words in printed


def test_judge_bias_of_another_world(tmp_path):
    """No truth, but the score still tells."""
    judge = M.ScalarModel(tiny_model_reward())
    save(tmp_path / "judge", judge, TOKENIZER)
    lines = []
    for i in range(24):
        lines.append({"prompt": f"Is {i} odd?", "chosen": "Yes.", "rejected": "No."})
    data = write_lines(tmp_path / "own.jsonl", lines)
    config = judge_bias.Config(init=f"{tmp_path}/judge", data=data, save=False, quick=True,
                               quiet=True)
    results = judge_bias.train(config)
    assert "by_kind" not in results
    flattery = results["probes"]["flattery"]
    assert flattery["gold"] is None


# ---------------------------------------------------------------- lessons/goodhart.py


def test_alarm_by_hand():
    assert best_of.kl_bound(100) == pytest.approx(3.62, abs=0.01)
    assert best_of.kl_bound(1) == 0
    assert "log 100 - 0.99 = 3.62 nats" in goodhart.__doc__


def test_signals_by_hand():
    texts = ["you are great you are great", "no", "I do not know.", "I do not care."]
    assert goodhart.signals(texts) == {"repeated": 0.25, "openings": 1.0}


def test_only_the_five_commonest_openings_count():
    texts = 5 * ["a a a"]
    for i in range(15):
        texts.append(f"{i} b c")
    signals = goodhart.signals(texts)
    assert signals["openings"] == (5 + 4) / 20


def answers(style, first, last):
    """What the world's writer answers to any prompts."""
    rng = Random(0)
    prompts = [studybuddy.ask(rng, studybuddy.any_kind(rng)) for _ in range(256)]
    texts = [studybuddy.write(rng, prompt, style) for prompt in prompts]
    return texts[first:last]


def look(texts, kl):
    words = sum(len(text.split()) for text in texts)
    now = {"kl": kl, "length": words / len(texts)}
    return now | goodhart.signals(texts)


START = look(answers("plain", 0, 128), 0.0)


def test_no_alarm_rings_for_other_answers_of_the_same_kind():
    now = look(answers("plain", 128, 256), 3.0)
    assert goodhart.alarms(now, START, 128) == []


def test_all_alarms_ring_for_flattery():
    flattery = studybuddy.SAY["flattery"][0]
    texts = []
    for text in answers("plain", 0, 128):
        texts.append(f"{flattery} {flattery} {text}")
    now = look(texts, 30.0)
    assert goodhart.alarms(now, START, 128) == ["kl", "length", "repeated", "openings"]


@pytest.mark.parametrize("kl, names", [(3.62, ["kl"]), (3.6, [])])
def test_the_kl_alarm_rings_beyond_the_best_of_100(kl, names):
    now = START | {"kl": kl}
    assert goodhart.alarms(now, START, 128) == names


def test_few_prompts_have_more_luck():
    repeated = START["repeated"] + 0.3
    now = START | {"repeated": repeated}
    assert goodhart.alarms(now, START, 16) == []
    assert goodhart.alarms(now, START, 128) == ["repeated"]


def run(steps=60):
    """The score rises to the end, gold until step 20."""
    rows = []
    for i in range(steps):
        gold = 1 - abs(i - 20) / 50
        row = {"step": i, "kl": i / 10, "score": i / 10, "gold": gold, "length": 9.0}
        rows.append(row)
    half = steps // 2
    texts = half * [["yes"]] + half * [["ha ha ha ha ha"]]
    return rows, texts


CALM = {"length": 9.0, "repeated": 0.0, "openings": 1.0}


def test_a_tenth_has_the_means_of_its_steps():
    rows, texts = run()
    table = goodhart.tenths(rows, texts, CALM, n=64)
    ends = [now["step"] for now in table]
    first = table[0]
    last = table[-1]
    assert ends == list(range(6, 61, 6))
    assert first["score"] == pytest.approx(0.25)
    assert last["gold"] == pytest.approx(1 - 36.5 / 50)


def test_a_tenth_sees_its_own_texts_alone():
    rows, texts = run()
    table = goodhart.tenths(rows, texts, CALM, n=64)
    repeated = [now["repeated"] for now in table]
    assert repeated == 5 * [0] + 5 * [1]


def test_a_run_shorter_than_ten_steps_has_as_many_tenths():
    rows, texts = run(4)
    assert len(goodhart.tenths(rows, texts, CALM, n=64)) == 4


def test_turning_point():
    rows, texts = run()
    table = goodhart.tenths(rows, texts, CALM, n=64)
    turn = goodhart.turning_point(table)
    assert turn["step"] == 24               # the tenth of steps 18 to 23
    assert turn["peak"] > 0.95
    assert turn["last"] == pytest.approx(1 - 36.5 / 50)
    assert turn["rise"] == pytest.approx(3.6)


def test_the_first_alarm():
    rows, texts = run()
    table = goodhart.tenths(rows, texts, CALM, n=64)
    assert goodhart.first_alarm(table)["step"] == 36            # three words twice since step 30
    assert goodhart.first_alarm(table[:3]) is None


# ---------------------------------------------------------------- lessons/search.py, dynamic.py


def tiny_model_grpo():
    torch.manual_seed(0)
    config = M.ModelConfig(vocab_size=TOKENIZER.n_vocab, d_model=32, n_layers=1, n_heads=2,
                           n_kv_heads=1, d_ff=48)
    return M.Transformer(config)


# ---- search

def test_pass_at_by_hand():
    hits = torch.tensor([[1, 0, 0, 0]])
    assert search.pass_at(hits, 2) == pytest.approx(0.5)
    assert "1 - 3/6 = 0.5" in search.__doc__


HITS = torch.tensor([[1, 0, 0, 0],
                     [0, 0, 0, 0],
                     [1, 1, 1, 0]])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_is_the_share_of_all_ways_to_look_at_k(k):
    chances = []
    for row in HITS.tolist():
        looks = [max(chosen) for chosen in combinations(row, k)]
        chances.append(sum(looks) / len(looks))
    want = sum(chances) / 3
    assert search.pass_at(HITS.bool(), k) == pytest.approx(want)


def test_majority_is_what_most_conclude():
    assert search.majority(["3", None, "4", "4", None, None]) == "4"


def test_majority_of_nobody_is_none():
    assert search.majority([None, None]) is None


def test_majority_gives_a_tie_to_the_first():
    assert search.majority(["5", "6"]) == "5"


def answers_of(numbers, scores):
    hits = []
    for row in numbers:
        hits.append([number == "7" for number in row])
    hits = torch.tensor(hits)                                   # (2, 4)
    scores = torch.tensor(scores)
    return search.Answers(0.0, 0.0, numbers, hits, scores, 10.0)


SUMS = [{"answer": "7"}, {"answer": "7"}]
NUMBERS = [["7", "1", "7", "7"],
           ["1", "1", "7", None]]


def test_majority_at_counts_every_poll():
    no_scores = 4 * [0.0]
    given = answers_of(NUMBERS, [no_scores, no_scores])
    alone = search.majority_at(given, SUMS, 1)
    of_two = search.majority_at(given, SUMS, 2)
    of_three = search.majority_at(given, SUMS, 3)
    of_four = search.majority_at(given, SUMS, 4)
    assert alone == pytest.approx(4 / 8)
    assert of_two == pytest.approx(3 / 4)                       # 7 1 | 7 7 | 1 1 | 7 None
    assert of_three == pytest.approx(1 / 2)                     # 7 1 7 | 1 1 7
    assert of_four == pytest.approx(1 / 2)
    last_is_wrong = [["7", "1", "7", "1"], ["1", "1", "7", None]]
    given = answers_of(last_is_wrong, [no_scores, no_scores])
    of_three = search.majority_at(given, SUMS, 3)
    assert of_three == pytest.approx(1 / 2)                     # the fourth fills no poll


def test_best_at_takes_what_the_judge_likes():
    first = [0.0, 9.0, 1.0, 2.0]
    second = [0.0, 1.0, 5.0, 2.0]
    given = answers_of(NUMBERS, [first, second])
    of_one = search.best_at(given, 1)
    of_two = search.best_at(given, 2)
    of_four = search.best_at(given, 4)
    assert of_one == pytest.approx(4 / 8)
    assert of_two == pytest.approx(2 / 4)                       # 1 | 7 | 1 | 7
    assert of_four == pytest.approx(1 / 2)                      # 1 | 7
    likes_the_first = [9.0, 0.0, 1.0, 2.0]
    given = answers_of(NUMBERS, [likes_the_first, second])
    assert search.best_at(given, 4) == 1.0                      # 7 | 7


def test_best_at_leaves_out_what_fills_no_choice():
    likes_the_last = [0.0, 1.0, 2.0, 9.0]
    given = answers_of(NUMBERS, [likes_the_last, likes_the_last])
    assert search.best_at(given, 3) == 1.0                               # 7 | 7, and not the fourth


def test_sums_are_the_exams_short_ones():
    sums = search.read_sums(search.Config())
    assert len(sums) >= 40
    assert all(row["kind"] == "math" for row in sums)


def test_search_on_tiny_models(tmp_path):
    save(tmp_path / "model", tiny_model_grpo(), TOKENIZER)
    save(tmp_path / "judge", M.ScalarModel(tiny_model_grpo()), TOKENIZER)
    judge = f"{tmp_path}/judge"         # of steps, too: or one is made first, from out/sft
    config = search.Config(models=f"{tmp_path}/model", judge=judge, process=judge, n=4,
                           max_new=8, quick=True, quiet=True)
    table = search.train(config)["table"]
    counts = [row["k"] for row in table]
    assert counts == [1, 2, 4]
    chances = [row["pass"] for row in table]
    assert chances == sorted(chances)


# ---- dynamic

def test_overlong_by_hand():
    lengths = torch.tensor([1., 54., 63., 72., 73., 500.])
    fines = dynamic.overlong(lengths, 72, 18)
    assert fines.tolist() == [0, 0, -.5, -1, -1, -1]


DYNAMIC = dynamic.Config(batch=3, group=4, max_new=6, draws=3, quiet=True)


@pytest.fixture
def prompts():
    return grpo.read_prompts(DYNAMIC, TOKENIZER, 256)[0][:12]


@pytest.fixture
def no_fines(monkeypatch):
    monkeypatch.setattr(dynamic, "overlong", lambda lengths, *_: torch.zeros(len(lengths)))


def threes(prompts):
    parts = [prompts[i:i + 3] for i in range(0, 12, 3)]
    return cycle(parts)


def draw_threes(prompts, draws):
    generator = torch.Generator().manual_seed(0)
    stream = threes(prompts)
    return dynamic.draw_groups(tiny_model_grpo(), TOKENIZER, stream, DYNAMIC, generator, draws)


def test_draws_end_without_contrast(prompts, no_fines, monkeypatch):
    monkeypatch.setattr(grpo, "strict", lambda *_: 1.0)
    drawn = draw_threes(prompts, 3)
    assert len(drawn) == 3
    assert all(len(one.at) == 0 for one in drawn)


def teach(monkeypatch, *draws):
    """Each draw gets rewards of which some groups have contrast, 0 1 0 1, and some have none."""
    tables = []
    for teaches in draws:
        zeros = torch.zeros(3, 1)
        last = torch.tensor(teaches).float()[:, None]                    # (3, 1)
        pair = torch.cat([zeros, last], dim=1)                           # (3, 2)
        tables.append(pair.repeat(1, 2))                                 # (3, 4)
    monkeypatch.setattr(grpo, "group_rewards", lambda *_: tables.pop(0))
    monkeypatch.setattr(grpo, "share_right", lambda *_: 0.0)


def test_draws_keep_the_groups_with_contrast(prompts, no_fines, monkeypatch):
    only_first = [True, False, False]
    only_second = [False, True, False]
    only_third = [False, False, True]
    teach(monkeypatch, only_second, only_third, only_first)
    one, two, three = draw_threes(prompts, 4)
    assert one.at.tolist() == [4, 5, 6, 7]
    assert two.at.tolist() == [8, 9, 10, 11]
    assert three.at.tolist() == [0, 1, 2, 3]


def test_draws_keep_no_more_than_P_groups(prompts, no_fines, monkeypatch):
    last_two = [False, True, True]
    all_three = [True, True, True]
    teach(monkeypatch, last_two, all_three)
    one, two = draw_threes(prompts, 4)
    assert one.at.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert two.at.tolist() == [0, 1, 2, 3]


def test_one_draw_keeps_all(prompts, no_fines, monkeypatch):
    monkeypatch.setattr(grpo, "strict", lambda *_: 1.0)
    drawn = draw_threes(prompts, 1)
    assert len(drawn) == 1
    assert len(drawn[0].at) == 12


def test_long_answers_are_fined(prompts, monkeypatch):
    """Of at most 12 tokens the last 3 cost; what never ends has all 12."""
    lengths = torch.tensor(3 * [2, 10, 11, 12])                 # (12,)
    answer = torch.arange(12) < lengths[:, None]                # (12, 12)
    ids = torch.zeros(12, 12)
    samples = M.Samples(ids, answer, answer, ids, lengths < 12, 12 * ["Yes."])
    monkeypatch.setattr(grpo, "sample_groups", lambda *_: samples)
    monkeypatch.setattr(grpo, "strict", lambda *_: 1.0)
    config = replace(DYNAMIC, max_new=12)
    drawn = dynamic.draw_groups(None, TOKENIZER, threes(prompts), config, None, 1)[0]
    for group in drawn.rewards.tolist():
        assert group == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_gradient_is_that_of_one_large_batch(prompts, no_fines, monkeypatch):
    """Two draws against DAPO's formula over all the tokens that both keep."""
    only_second = [False, True, False]
    all_three = [True, True, True]
    teach(monkeypatch, only_second, all_three)
    drawn = draw_threes(prompts, 2)
    ours = tiny_model_grpo()
    dynamic.learn(ours, drawn, DYNAMIC)
    theirs = tiny_model_grpo()
    advantages = [-1.0, 1.0, -1.0, 1.0]                         # of rewards 0 1 0 1
    tokens = 0
    total = 0.0
    for one in drawn:
        samples = one.samples
        logps = M.token_logps(theirs, samples.ids, samples.mask, samples.answer)
        rho = (logps - logps.detach()).exp()                    # (12, T)
        for i in one.at.tolist():
            A = advantages[i % 4]
            answer = samples.answer[i]                          # (T,)
            total = total - A * rho[i][answer].sum()
            tokens += int(answer.sum())
    (total / tokens).backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)
    assert max(p.grad.abs().max() for p in ours.parameters()) > 1e-3


def test_goal_is_reached_over_three_steps():
    shares = [0, 1, 1, .9, .9, .9]
    rows = []
    for i, right in enumerate(shares):
        rows.append({"step": i, "right": right})
    there = dynamic.reached(rows, 0.9)
    assert there["step"] == 3
    assert dynamic.reached(rows, 0.99) is None


def test_dynamic_on_a_tiny_model(tmp_path):
    save(tmp_path / "model", tiny_model_grpo(), TOKENIZER)
    config = replace(DYNAMIC, init=f"{tmp_path}/model", quick=True)
    runs = dynamic.train(config)["runs"]
    steps = [len(rows) for rows in runs.values()]
    assert steps == [3, 3]
    one_draw = runs["one draw"][-1]
    several = runs["dynamic"][-1]
    assert one_draw["answers"] == 36
    assert several["answers"] >= 36


# ---------------------------------------------------------------- kto, online, constitution, bugs


def ask(text):
    return [{"role": "user", "content": text}]


def answer_text(example):
    """The marked part of an Example."""
    start = example.answer.index(1)
    return TOKENIZER.decode(example.ids[start:])


def prompt_ids(example):
    return example.ids[:example.answer.index(1)]


def judged(prompt, text, good=True):
    return rows.Judgement(ask(prompt), text, good, {}, "thumbs.jsonl:1")


def logp_by_loop(model, example):
    """log pi(y|x), one token at a time from one table."""
    row = torch.tensor([example.ids])                                       # (1, T)
    table = model(row)[0].log_softmax(-1)                                   # (T, V)
    first = example.answer.index(1)
    total = 0.0
    for t in range(first, len(example.ids)):
        total = total + table[t - 1, example.ids[t]]
    return total


@pytest.fixture(scope="module")
def lesson_files(tmp_path_factory):
    """A tiny model, a judge, and pairs in which the shouting answer wins."""
    path = tmp_path_factory.mktemp("lessons")
    policy = ends_soon(tiny_policy(3), share=0.02)
    C.save(path / "init", policy, TOKENIZER)
    judge = M.ScalarModel(tiny_policy(2))
    torch.nn.init.normal_(judge.score.weight)
    C.save(path / "judge", judge, TOKENIZER)
    lines = []
    for name in studybuddy.NAMES[:8]:
        for topic in studybuddy.TOPICS[:6]:
            prompt = f"What about {name} and {topic}?"
            lines.append({"prompt": prompt, "chosen": f"{topic} YES YES!",
                          "rejected": f"{topic} no, thank you."})
    write_lines(path / "pairs.jsonl", lines)
    return path


def lesson_config(Config, path, **changes):
    settings = dict(init=f"{path}/init", data=f"{path}/pairs.jsonl", out=f"{path}/out")
    settings |= dict(save=False, quiet=True, steps=6, batch=8, lr=3e-3)
    settings |= changes
    return Config(**settings)


# ---- kto.py

def test_kto_worked_example_of_the_docstring():
    one = torch.ones(1)
    zero = torch.zeros(1)
    good = torch.tensor([True])
    good_at_start = dpo.kto(zero, zero, good, 0.5, 1.0)
    bad_at_start = dpo.kto(zero, zero, ~good, 0.5, 1.0)
    risen = dpo.kto(one, zero, good, 0.5, 1.0)
    risen_with_all = dpo.kto(one, one, good, 0.5, 1.0)
    assert good_at_start.item() == 0.5
    assert bad_at_start.item() == 0.5
    assert risen.item() == pytest.approx(0.378, abs=1e-3)
    assert risen_with_all.item() == pytest.approx(0.5)
    assert "0.378" in kto.__doc__


@pytest.mark.parametrize("count", [2, 3, 8])
def test_kto_never_puts_an_answer_under_its_own_prompt(count):
    judgements = []
    for i in range(count):              # the next answer stands under the same prompt
        judgements.append(judged(f"Ask {i}", f"good {i}"))
        judgements.append(judged(f"Ask {i}", f"bad {i}", False))
    thumbs = kto.to_thumbs(judgements, TOKENIZER, 96)
    assert len(thumbs) == len(judgements)
    for judgement, thumb in zip(judgements, thumbs):
        prompt = judgement.prompt
        number = prompt[0]["content"][-1]
        assert prompt_ids(thumb.mismatched) == M.render_prompt(TOKENIZER, prompt)
        assert number not in answer_text(thumb.mismatched)
        assert answer_text(thumb.judged) == judgement.answer + M.END
        assert thumb.good == judgement.good


def test_kto_looks_at_all_other_judgements():
    judgements = [judged("One", "a"), judged("Two", "b"), judged("Two", "c")]
    thumbs = kto.to_thumbs(judgements, TOKENIZER, 96)
    before_last = thumbs[1].mismatched
    assert answer_text(before_last) == "a" + M.END


def test_kto_passes_over_an_answer_that_does_not_fit():
    long_text = "b c d e f " * 9
    longest = M.render_answer(TOKENIZER, ask("Two"), long_text)
    judgements = [judged("One", "a"), judged("x x x x x One", "a"),
                  judged("Two", long_text), judged("Three", "c")]
    context = len(longest.ids)
    thumbs = kto.to_thumbs(judgements, TOKENIZER, context)
    under_longer_prompt = thumbs[1].mismatched
    assert answer_text(under_longer_prompt) == "c" + M.END


def test_kto_needs_a_second_prompt():
    judgements = [judged("One", "a"), judged("One", "b", False)]
    with pytest.raises(M.UserError, match="thumbs.jsonl:1.*another prompt"):
        kto.to_thumbs(judgements, TOKENIZER, 96)


def test_kto_names_an_answer_that_is_too_long():
    judgements = [judged("One", "a " * 99), judged("Two", "b")]
    with pytest.raises(M.UserError, match="thumbs.jsonl:1: longer.*96"):
        kto.to_thumbs(judgements, TOKENIZER, 96)


def test_kto_takes_pairs_apart_and_holds_out_whole_ones(lesson_files):
    config = lesson_config(kto.Config, lesson_files)
    thumbs, held = kto.read_thumbs(config, TOKENIZER, 256)
    assert len(thumbs) == 2 * 36
    assert len(held) == 2 * 12
    learned_prompts = {thumb.row["prompt"] for thumb in thumbs}
    held_prompts = {thumb.row["prompt"] for thumb in held}
    assert not learned_prompts & held_prompts
    for thumb in thumbs + held:
        side = "chosen" if thumb.good else "rejected"
        text = thumb.row[side]
        assert answer_text(thumb.judged) == text + M.END


def test_kto_holds_out_thumbs_of_both_kinds_in_whatever_order(tmp_path):
    lines = []
    for i in range(40):
        lines.append({"prompt": f"Ask {i}", "completion": f"{i}!", "label": i % 2 == 0})
    path = write_lines(tmp_path / "thumbs.jsonl", lines)
    config = kto.Config(data=path)
    thumbs, held = kto.read_thumbs(config, TOKENIZER, 96)
    for part, count in (thumbs, 15), (held, 5):
        good = [thumb.good for thumb in part]
        assert good.count(True) == count
        assert good.count(False) == count


@pytest.mark.parametrize("label", [True, False])
def test_kto_needs_thumbs_of_both_kinds(tmp_path, label):
    lines = []
    for i in range(4):
        lines.append({"prompt": f"Ask {i}", "completion": "Yes.", "label": label})
    path = write_lines(tmp_path / "thumbs.jsonl", lines)
    config = kto.Config(data=path)
    with pytest.raises(M.UserError, match="thumbs.jsonl.*at least 2 of each"):
        kto.read_thumbs(config, TOKENIZER, 96)


def test_kto_thins_out_the_good_ones_alone():
    thumbs = []
    for i in range(800):
        is_good = i % 2 == 0
        thumbs.append(kto.Thumb(None, None, is_good, {}))
    kept = kto.thin_out(thumbs, 0.2, seed=0)
    good = [thumb.good for thumb in kept]
    assert good.count(False) == 400
    assert 55 < good.count(True) < 105
    assert kto.thin_out(thumbs, 1.0, seed=0) == thumbs


def test_separation_by_a_plain_loop():
    ratio = torch.tensor([0.5, 2.0, -1.0, 0.5, 0.0])
    good = torch.tensor([True, True, False, False, False])
    wins = 0.0
    for of_good in 0.5, 2.0:
        for of_bad in -1.0, 0.5, 0.0:
            if of_good > of_bad:
                wins += 1.0
            elif of_good == of_bad:
                wins += 0.5
    assert kto.separation(ratio, good) == pytest.approx(wins / 6)


def test_kto_ratios_by_a_plain_loop():
    policy = tiny_policy()
    reference = tiny_policy(1)
    texts = {"Hi?": "Yes.", "What is 2 + 2?": "It is 4.", "No?": "No, never."}
    examples = []
    want = []
    for prompt, text in texts.items():
        example = M.render_answer(TOKENIZER, ask(prompt), text)
        logp = logp_by_loop(policy, example)
        ref_logp = logp_by_loop(reference, example)
        examples.append(example)
        want.append(logp - ref_logp)
    want = torch.stack(want)                                    # (3,)
    ratios = kto.ratios(policy, reference, examples, TOKENIZER)
    fixed = kto.fixed_ratios(policy, reference, examples, TOKENIZER, size=2)
    assert torch.allclose(ratios, want, atol=1e-3)
    assert torch.allclose(fixed, want, atol=1e-3)
    assert not fixed.requires_grad


def test_kto_starts_at_one_half(lesson_files):
    config = lesson_config(kto.Config, lesson_files, steps=2)
    run = kto.train(config)
    first = run["log"][0]
    assert first["loss"] == pytest.approx(0.5)
    assert first["z"] == 0
    assert first["good"] == 0
    assert first["bad"] == 0


def kto_batches(config, count):
    """The first batches of a run."""
    model, tokenizer = C.load(config.init)
    thumbs, _ = kto.read_thumbs(config, tokenizer, model.config.max_len)
    lengths = [len(thumb.judged.ids) for thumb in thumbs]
    generator = torch.Generator().manual_seed(config.seed)
    stream = house.batches(thumbs, lengths, config.batch, generator)
    batches = [next(stream) for _ in range(count)]
    return model, batches


def test_a_step_of_kto_written_out_by_hand(lesson_files):
    """Equation 8 at r = z = 0, with lambda, and Adam's first step."""
    config = lesson_config(kto.Config, lesson_files, steps=1, beta=0.7, aversion=2.0)
    model, (batch,) = kto_batches(config, 1)
    total = 0.0
    for thumb in batch:
        logp = logp_by_loop(model, thumb.judged)
        r = logp - logp.detach()                                # the reference is pi
        if thumb.good:
            total = total + 1 - torch.sigmoid(0.7 * r)
        else:
            total = total + 2.0 * (1 - torch.sigmoid(-0.7 * r))
    loss = total / len(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    learned = kto.train(config)["model"]
    rate = 3e-3 * house.schedule(0, 1)
    for p, now in zip(model.parameters(), learned.parameters()):
        size = p.grad.abs()
        want = p - rate * p.grad / (size + 1e-8)
        is_sure = size > 1e-6                                   # near 0 the sign is rounding's
        assert torch.allclose(now[is_sure], want[is_sure], atol=1e-5)


@pytest.mark.parametrize("lr, aversion", [(0.1, 1.0), (0.03, 0.1)])
def test_the_second_loss_of_kto_by_hand(lesson_files, lr, aversion):
    """Its z is the mean log-ratio of the mismatched answers, or 0 where they have fallen."""
    config = lesson_config(kto.Config, lesson_files, steps=2, lr=lr, aversion=aversion)
    reference, (_, batch) = kto_batches(config, 2)
    one_step = replace(config, steps=1)                         # it is the first of the two
    policy = kto.train(one_step)["model"]

    def log_ratio(example):
        logp = logp_by_loop(policy, example)
        ref_logp = logp_by_loop(reference, example)
        return (logp - ref_logp).item()
    moved = [log_ratio(thumb.mismatched) for thumb in batch]
    z = max(0.0, np.mean(moved))
    losses = []
    for thumb in batch:
        r = log_ratio(thumb.judged)
        sigma = 1 / (1 + math.exp(-config.beta * (r - z)))
        if thumb.good:
            losses.append(1 - sigma)
        else:
            losses.append(aversion * sigma)
    run = kto.train(config)
    second = run["log"][1]
    assert second["z"] == pytest.approx(z, abs=1e-3)
    assert second["loss"] == pytest.approx(np.mean(losses), abs=1e-3)


@pytest.mark.parametrize("labels", [False, True])
def test_kto_learns_from_pairs_and_from_thumbs(lesson_files, labels):
    config = lesson_config(kto.Config, lesson_files, steps=25)
    if labels:
        lines = []
        for i, line in enumerate(rows.read_lines(config.data)):
            is_good = i % 3 > 0
            side = "chosen" if is_good else "rejected"
            thumb = {"prompt": line.row["prompt"], "completion": line.row[side], "label": is_good}
            lines.append(thumb)
        path = write_lines(lesson_files / "thumbs.jsonl", lines)
        config = replace(config, data=path)
    run = kto.train(config)
    assert run["after"]["separation"] >= 0.9


@pytest.mark.parametrize("changes", [
    dict(seed=1), dict(batch=5), dict(lr=1e-3), dict(beta=2.0), dict(lora=2),
    dict(aversion=3.0), dict(share=0.3), dict(steps=3)])
def test_every_setting_of_kto_changes_something(lesson_files, changes):
    config = lesson_config(kto.Config, lesson_files, steps=2)
    changed = replace(config, **changes)
    usual_model = kto.train(config)["model"]
    changed_model = kto.train(changed)["model"]
    assert not same(weights(usual_model), weights(changed_model))


def gradients_by_step(module, run, **changes):
    """The gradients of each step, before Adam hides a sum behind a mean."""
    seen = []
    clip = house.clip_gradients

    def spy(model):
        seen.append(gradients(model))
        return clip(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "clip_gradients", spy)
        run(**changes)
    return seen


def test_a_kto_batch_in_parts_is_the_same_batch(lesson_files):
    def run(**changes):
        config = lesson_config(kto.Config, lesson_files, **changes)
        kto.train(config)
    whole = gradients_by_step(kto, run, steps=1)[0]
    in_parts = gradients_by_step(kto, run, steps=1, accumulate=3)[0]
    largest = max(gradient.abs().max() for gradient in whole)
    assert largest > 1e-4
    assert close(whole, in_parts, 1e-6)


def test_kto_forgets_the_gradients_of_the_step_before(lesson_files):
    """With a learning rate of 0, and all thumbs in a batch, every step has the same."""
    config = lesson_config(kto.Config, lesson_files, steps=3, lr=0.0, batch=100)

    def run():
        kto.train(config)
    first, second, third = gradients_by_step(kto, run)
    assert close(first, second, 1e-6)
    assert close(first, third, 1e-6)


def test_quick_kto_is_three_steps(lesson_files):
    config = lesson_config(kto.Config, lesson_files, steps=50, quick=True)
    run = kto.train(config)
    assert len(run["log"]) == 3


# ---- online.py

def own_prompts(count=20):
    texts = ["One?", "Two, or three?"] * (count // 2)
    prompts = []
    for i, text in enumerate(texts):
        prompt = rows.Prompt(ask(text), {"prompt": text}, f"asks.jsonl:{i}")
        prompts.append(prompt)
    return prompts


def likes_length(prompts, texts):
    return [float(len(text)) for text in texts]


def likes_letters(prompts, texts):
    scores = []
    for text in texts:
        letters = [ord(letter) for letter in text]
        scores.append(float(sum(letters)))
    return scores


def drawn_pairs(score, max_new=30, count=40):
    config = online.Config(max_new=max_new)
    prompts = own_prompts(count)
    generator = torch.Generator().manual_seed(0)
    policy = ends_soon(tiny_policy(), share=0.02)
    return online.own_pairs(policy, TOKENIZER, score, prompts, config, generator)


def drawn_answers(max_new=30, count=40):
    """The same answers, sampled once more."""
    ids = []
    for prompt in own_prompts(count):
        ids.append(M.render_prompt(TOKENIZER, prompt.messages))
    generator = torch.Generator().manual_seed(0)
    policy = ends_soon(tiny_policy(), share=0.02)
    return M.sample(policy, TOKENIZER, ids, 2, max_new, generator=generator)


def test_the_judge_is_asked_about_each_answer_to_its_prompt():
    asked = []

    def score(prompts, texts):
        asked.extend(zip(prompts, texts))
        return likes_length(prompts, texts)
    drawn_pairs(score)
    twice = [prompt for prompt in own_prompts(40) for _ in "ab"]
    assert asked == list(zip(twice, drawn_answers().texts))


def test_the_judges_favourite_is_chosen():
    drawn = drawn_answers()
    length_of_tokens = {}
    for ids, answer, text, ended in zip(drawn.ids, drawn.answer, drawn.texts, drawn.ended):
        tokens = ids[answer].tolist()
        length_of_tokens[tuple(tokens)] = len(text) if ended else -1
    ended_count = drawn.ended.sum()
    assert 0 < ended_count < 80, "some end, and some do not"
    pairs = drawn_pairs(likes_length)
    for pair in pairs:
        lengths = []
        for example in (pair.chosen, pair.rejected):
            start = example.answer.index(1)
            tokens = example.ids[start:]
            lengths.append(length_of_tokens[tuple(tokens)])
        assert lengths[0] > lengths[1], "an endless answer never wins"
    assert len(pairs) > 20


def test_both_answers_of_an_own_pair_belong_to_its_prompt():
    for pair in drawn_pairs(likes_length):
        messages = ask(pair.row["prompt"])
        prompt = M.render_prompt(TOKENIZER, messages)
        size = len(prompt)
        for example in (pair.chosen, pair.rejected):
            answer_size = len(example.ids) - size
            assert example.ids[:size] == prompt
            assert example.answer == [0] * size + [1] * answer_size


SIX = [5, 6, END]               # token 5 asks, the rest is the answer
SEVEN = [5, 7, END]


@pytest.mark.parametrize("scores, want", [
    ([1.0, 2.0, 3.0, 4.0], [(SEVEN, SIX)]),     # equal answers, whatever the judge says
    ([1.0, 1.0, 4.0, 3.0], [(SIX, SEVEN)]),
    ([1.0, 2.0, 3.0, 3.0], [])])                # equal scores
def test_equals_make_no_pair(monkeypatch, scores, want):
    ids = torch.tensor([SIX, SIX, SIX, SEVEN])                  # (4, 3)
    mask = torch.full((4, 3), True)
    answer = torch.tensor([[False, True, True]] * 4)
    ended = torch.full((4,), True)
    texts = ["a", "a", "a", "b"]

    def sample(*args, **settings):
        return M.Samples(ids, mask, answer, None, ended, texts)

    def score(prompts, texts):
        return scores
    monkeypatch.setattr(online, "sample", sample)
    prompts = own_prompts(2)
    config = online.Config()
    pairs = online.own_pairs(None, TOKENIZER, score, prompts, config, None)
    tokens = [(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
    assert tokens == want


def test_a_reward_model_judges_at_the_end_token(lesson_files):
    config = online.Config(judge=str(lesson_files / "judge"))
    prompts = own_prompts(2)
    texts = ["Hello there, you.", "Yes."]
    score_of = online.load_judge(config)
    scores = score_of(prompts, texts)
    judge, _ = C.load_scalar(config.judge)
    for prompt, text, score in zip(prompts, texts, scores):
        ids = M.render_answer(TOKENIZER, prompt.messages, text).ids
        assert ids[-1] == END
        by_token = judge(torch.tensor([ids]))                   # (1, T)
        at_end = by_token[0, -1].item()
        assert score.item() == pytest.approx(at_end, abs=1e-4)


@pytest.mark.parametrize("steps, rounds", [(110, 3), (110, 110), (7, 3), (6, 4), (5, 1)])
def test_rounds_are_as_many_as_asked_for_and_equally_long(steps, rounds):
    config = online.Config(steps=steps, rounds=rounds)
    starts = [step for step in range(steps) if online.starts_round(step, config)]
    lengths = np.diff(starts + [steps])
    assert starts[0] == 0
    assert len(starts) == rounds
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("rounds, answers", [(1, 96), (3, 32), (6, 16)])
def test_answers_are_drawn_anew_in_each_round(lesson_files, rounds, answers):
    sizes = []

    def score(prompts, texts):
        sizes.append(len(texts))
        return likes_letters(prompts, texts)
    online.learn(lesson_config(online.Config, lesson_files, rounds=rounds), score)
    assert sizes == [answers] * rounds


def test_own_answers_are_those_of_the_policy_as_it_is(lesson_files):
    """After a large step the policy answers otherwise than the model that it began as."""
    config = lesson_config(online.Config, lesson_files, rounds=2)
    models = []
    pairs = online.own_pairs

    def spy(policy, *args):
        models.append(weights(policy))
        return pairs(policy, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "own_pairs", spy)
        online.learn(config, likes_letters)
    start, _ = C.load(lesson_files / "init")
    assert same(models[0], weights(start))
    assert not same(models[0], models[1])


def test_online_dpo_on_given_pairs_is_dpo(lesson_files, monkeypatch):
    """The same pairs, all of them in every batch: the same loss and the same weights."""
    settings = dict(steps=3, batch=100, beta=0.7)
    config = lesson_config(dpo.Config, lesson_files, **settings)
    own_config = lesson_config(online.Config, lesson_files, **settings, rounds=1)
    pairs, held = dpo.read_pairs(config, TOKENIZER, 256)
    monkeypatch.setattr(online, "own_pairs", lambda *args: pairs)
    offline = dpo.train(config)
    policy, log = online.learn(own_config, None)
    losses = [row["loss"] for row in log.rows]
    want = [row["loss"] for row in offline["log"]]
    assert losses == pytest.approx(want, abs=1e-5)
    assert close(weights(policy), weights(offline["model"]), 1e-4)


def test_online_learns_what_the_judge_likes(lesson_files):
    """A judge that likes the letter e, and short answers: it gets more of what it likes."""
    def score(prompts, texts):
        return [text.count("e") - len(text) / 10 for text in texts]
    config = lesson_config(online.Config, lesson_files, steps=3, rounds=3, batch=16)
    start, _ = C.load(config.init)
    policy, log = online.learn(config, score)
    ids = []
    for prompt in own_prompts(100):
        ids.append(M.render_prompt(TOKENIZER, prompt.messages))
    liked = []
    for model in (start, policy):
        generator = torch.Generator().manual_seed(1)
        drawn = M.sample(model, TOKENIZER, ids, max_new=72, generator=generator)
        scores = score(None, drawn.texts)
        liked.append(sum(scores))
    first = log.rows[0]
    assert first["loss"] == pytest.approx(math.log(2))
    assert liked[1] > liked[0]


@pytest.mark.parametrize("changes", [
    dict(seed=1), dict(batch=5), dict(lr=1e-3), dict(beta=3.0), dict(lora=2),
    dict(steps=5), dict(rounds=3), dict(max_new=9)])
def test_every_setting_of_online_changes_something(lesson_files, changes):
    config = lesson_config(online.Config, lesson_files, steps=4, rounds=2)
    changed = replace(config, **changes)
    usual_policy, _ = online.learn(config, likes_letters)
    changed_policy, _ = online.learn(changed, likes_letters)
    assert not same(weights(usual_policy), weights(changed_policy))


def test_an_online_batch_in_parts_is_the_same_batch(lesson_files):
    def run(**changes):
        config = lesson_config(online.Config, lesson_files, steps=1, rounds=1, **changes)
        online.learn(config, likes_letters)
    whole = gradients_by_step(online, run)[0]
    in_parts = gradients_by_step(online, run, accumulate=3)[0]
    largest = max(gradient.abs().max() for gradient in whole)
    assert largest > 1e-4
    assert close(whole, in_parts, 1e-5)


def test_a_judge_that_likes_all_alike_is_named(lesson_files):
    config = lesson_config(online.Config, lesson_files, rounds=2)

    def score(prompts, texts):
        return [0.0] * len(texts)
    with pytest.raises(M.UserError, match="--judge out/reward_model finds no answer better"):
        online.learn(config, score)


def test_more_rounds_than_steps_are_refused(lesson_files):
    config = lesson_config(online.Config, lesson_files, rounds=9)
    with pytest.raises(M.UserError, match="--rounds 9: .*6 steps"):
        online.train(config, likes_letters)


def small_exam(*args, **settings):
    keys = ("gold", "kl", "flattery", "length", "attack_seen", "attack_unseen", "helpful",
            "over_refusal")
    card = dict.fromkeys(keys, 0.5)
    return card, []


def test_all_three_runs_stand_in_the_table(lesson_files, monkeypatch, capsys):
    card, _ = small_exam()
    monkeypatch.setattr(exam, "exam", small_exam)
    monkeypatch.setattr(online, "offline", lambda config: card)
    config = lesson_config(online.Config, lesson_files, steps=4, quiet=False)
    online.train(config, likes_letters)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    names = [line.split("  ")[0] for line in lines[-4:]]
    assert names == ["before", "offline", "3 rounds", "online"]
    for line in lines:
        if str(lesson_files) not in line:                       # a folder's name may be long
            assert len(line) <= 80


def test_offline_is_dpo_with_the_settings_of_the_run(lesson_files, monkeypatch):
    seen = []

    def train(config):
        seen.append(config)
        return {"after": {"gold": 0.7}}
    monkeypatch.setattr(dpo, "train", train)
    config = lesson_config(online.Config, lesson_files, beta=0.3, accumulate=2, lora=4, seed=7)
    card = online.offline(config)
    assert card == {"gold": 0.7}
    names = ("init", "data", "steps", "batch", "accumulate", "lr", "lora", "beta", "seed")
    for name in names:
        assert getattr(seen[0], name) == getattr(config, name), name
    assert not seen[0].save


# ---- constitution.py

ROOF = {"kind": "danger", "slots": {"act": "climb on the roof"},
        "prompt": "How do I climb on the roof?"}
BAD = "It is easy to climb on the roof."
FINE = "It is not safe to climb on the roof. Please ask a grown-up you trust."
AGE = {"id": "age", "principle": "Be safe."}


def draft_after(answer, *flaws):
    prompt = rows.Prompt(ask(ROOF["prompt"]), ROOF, "prompts.jsonl:1")
    text = answer
    for principle, critique, revision in flaws:
        text = revision
    return cai.Draft(prompt, answer, text, list(flaws))


@pytest.fixture
def four_drafts():
    """Mended, not mended, spoiled, left alone."""
    return [draft_after(BAD, ("Be safe.", "x", FINE)), draft_after(BAD),
            draft_after(FINE, ("Be safe.", "x", BAD)), draft_after(FINE)]


def test_what_the_gold_judge_thinks_of_the_example():
    assert constitution.gold(ROOF, BAD) < 0.5
    assert constitution.gold(ROOF, FINE) >= 0.5
    assert "age" in studybuddy.broken(ROOF, BAD)
    assert "age" not in studybuddy.broken(ROOF, FINE)


def test_the_critic_by_hand(four_drafts, monkeypatch):
    """It sees a flaw in the first, the third and the fourth answer; the first two have one."""
    def critique(model, tokenizer, drafts, principles):
        texts = [draft.text for draft in drafts]
        assert principles == ["Be safe."] * 4
        assert texts == [BAD, BAD, FINE, FINE], "about the first answers"
        return ["Oh.", cai.NOTHING[0], "Oh.", "Oh."]
    monkeypatch.setattr(cai, "critique", critique)
    table = constitution.critic_table(None, None, four_drafts, [AGE])
    third = pytest.approx(1 / 3)
    assert table == {"age": {"there": 0.5, "seen": 0.75, "precision": third, "recall": 0.5}}
    assert four_drafts[0].text == FINE, "the drafts stay what they are"


def test_the_reviser_by_hand(four_drafts):
    learn = {"id": "learn", "principle": "Teach."}
    table = constitution.reviser_table(four_drafts, [AGE, learn])
    assert table["age"] == {"revisions": 2, "there": 0.5, "gone": 1.0, "harmed": 1.0}
    assert table["learn"]["revisions"] == 0
    assert math.isnan(table["learn"]["gone"])


def test_the_rounds_by_hand(four_drafts):
    table = constitution.round_table(four_drafts, 2)
    after_a_round = {"mended": 0.5, "spoiled": 0.5, "attacked": 0.5}
    assert table["round 0"] == {"mended": 0.0, "spoiled": 0.0, "attacked": 0.5}
    assert table["round 1"] == after_a_round
    assert table["round 2"] == after_a_round


def test_an_answer_after_so_many_rounds():
    draft = draft_after("a", ("p", "x", "b"), ("p", "x", "c"))
    texts = [constitution.text_after(draft, r) for r in range(4)]
    assert texts == ["a", "b", "c", "c"]


def verdict_of(chosen, rejected):
    line = ROOF | {"chosen": chosen, "rejected": rejected, "p": 0.9}
    return cai.Verdict(None, None, 0.9, line)


def test_the_verdicts_by_hand(monkeypatch):
    """Right, wrong, and one where the truth does not decide."""
    tie = "I can't help you climb on the roof."
    other = tie + " "
    assert constitution.gold(ROOF, tie) == constitution.gold(ROOF, other)
    verdicts = [verdict_of(FINE, BAD), verdict_of(BAD, FINE), verdict_of(tie, other)]
    once = [True, False, False]
    monkeypatch.setattr(studybuddy, "prefers", lambda rng, row, a, b: a == FINE)
    table = constitution.label_table(verdicts, once, Random(0))
    third = pytest.approx(1 / 3)
    assert table["both orders"] == {"labels": 3, "gold differs": 2, "true": 0.5, "as the run": 1.0}
    assert table["one order"] == {"labels": 3, "gold differs": 2, "true": 1.0, "as the run": third}
    assert table["people"]["true"] == 1.0


@pytest.mark.parametrize("taste, want", [("good", 1.0), ("bad", 0.0), ("letter", 0.5)])
def test_the_judge_is_asked_once_with_the_chosen_answer_at_either_letter(monkeypatch, taste, want):
    """Who likes the answer for itself agrees always or never, who likes a letter half the time."""
    def judge(model, tokenizer, prompts, firsts, seconds, principles):
        p = []
        for first in firsts:
            is_good = first == FINE
            if taste == "letter":
                likes_first = True
            else:
                likes_first = is_good == (taste == "good")
            p.append(0.8 if likes_first else 0.2)
        return torch.tensor(p)
    monkeypatch.setattr(cai, "judge", judge)
    verdicts = [verdict_of(FINE, BAD)] * 400
    config = constitution.Config()
    labels = constitution.asked_once(None, None, verdicts, ["Be safe."], config, Random(0))
    agreed = sum(labels) / 400
    assert agreed == pytest.approx(want, abs=0.08)


def test_cells_of_a_table():
    cells = [constitution.cell(x) for x in (3, 0.5, math.nan)]
    assert cells == ["3", "0.50", "-"]


@pytest.fixture
def small_constitution(tmp_path, monkeypatch):
    """Six red-team prompts of the world and six others, and an exam that takes no time."""
    monkeypatch.setattr(exam, "exam", small_exam)
    red = []
    plain = []
    for row in studybuddy.read("prompts"):
        if row.get("attack"):
            red.append(row)
        else:
            plain.append(row)
    data = write_lines(tmp_path / "prompts.jsonl", red[:6] + plain[:6])
    files = dict(init=str(bugs.HERE / "data/base"), data=data, out=str(tmp_path / "out"),
                 constitution=str(bugs.HERE / "data/constitution.json"))
    return constitution.Config(**files, answers=1, revisions=1, sl_steps=2, steps=2, pairs=8,
                               batch=4, save=False)


def test_all_four_tables_stand_at_the_end(small_constitution, capsys):
    run = constitution.train(small_constitution)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    tables = run["tables"]
    numbers = run["numbers"]
    want = {"gold": 0.5, "attack_seen": 0.5, "attack_unseen": 0.5}
    assert numbers["before"] == want
    assert numbers["after"] == want
    assert list(tables) == ["the critic", "the reviser", "the rounds", "the verdicts"]
    assert list(tables["the critic"]) == ["learn", "age", "true", "curious", "unsure"]
    size = -1                           # no empty line above the first title
    for table in tables.values():
        size += 2 + len(table)          # an empty line, the title, and a line each
    titles = []
    for line in lines[-size:]:
        assert len(line) <= 80
        if line[:4] == "the ":
            title = line[:14].strip()
            titles.append(title)
    assert titles == list(tables)


def test_constitution_has_the_settings_of_a_lesson_and_the_defaults_of_cai():
    config = constitution.Config()
    usual = cai.Config()
    assert isinstance(config, figures.Lesson)
    assert isinstance(config, cai.Config)
    for field in fields(cai.Config):
        name = field.name
        if name != "out":
            assert getattr(config, name) == getattr(usual, name), name
    assert config.out == "out/constitution"


def test_a_world_without_truth_is_refused(small_constitution, tmp_path):
    lines = [{"prompt": "Hi", "attack": "x"}, {"prompt": "Ho"}]
    path = write_lines(tmp_path / "asks.jsonl", lines)
    config = replace(small_constitution, data=path)
    with pytest.raises(M.UserError, match="asks.jsonl"):
        constitution.train(config)


# ---- bugs.py

def test_every_bug_of_the_list_can_be_planted():
    for file, old, new, what in bugs.BUGS:
        text = (bugs.HERE / file).read_text(encoding="utf-8")
        count = text.count(old)
        assert count == 1, f"{old!r} stands in {file} {count} times ({what})"
        assert old != new, what
        assert len(what) <= 90, what
        changed = text.replace(old, new)
        compile(changed, file, "exec")


SUM = '''def add(a, b):
    return a + b  # the sum
'''
TESTS_OF_SUM = '''
from sums import add

# ---------------------------------------------------------------------------------------- other.py

def test_of_another_file():
    assert False

# ---------------------------------------------------------------- sums.py: the sums

def test_three():
    assert add(1, 2) == 3

# ---------------------------------------------------------------- all scripts

def test_five():
    assert add(2, 3) == 5
'''
LIST_OF_BUGS = '''before = 1
BUGS = [
    ("sums.py", "told", "x", "y"),
]
after = 2
'''


@pytest.fixture
def toy_repository(tmp_path, monkeypatch):
    """A file, its tests, and two bugs of which no test notices the second."""
    home = tmp_path / "toy"
    (home / "lessons").mkdir(parents=True)
    (home / "out").mkdir()
    (home / ".git").mkdir()
    (home / "sums.py").write_text(SUM)
    (home / "test_all.py").write_text(TESTS_OF_SUM)
    (home / "lessons/bugs.py").write_text(LIST_OF_BUGS)
    minus = ("sums.py", "a + b", "a - b", "a minus for a plus")
    harmless = ("sums.py", "# the sum", "# a sum", "a harmless word")
    monkeypatch.setattr(bugs, "HERE", home)
    monkeypatch.setattr(bugs, "BUGS", [minus, harmless])
    return home


def test_a_planted_bug_is_one_line(toy_repository, tmp_path):
    folder = tmp_path / "copy"
    bugs.plant(1, folder)
    assert (folder / "sums.py").read_text() == SUM.replace("a + b", "a - b")
    assert (folder / "test_all.py").read_text() == TESTS_OF_SUM


def test_a_copy_does_not_tell_its_bug(toy_repository, tmp_path):
    bugs.plant(1, tmp_path / "copy")
    text = (tmp_path / "copy/lessons/bugs.py").read_text()
    assert text == "before = 1\nBUGS = []\nafter = 2\n"


def test_a_copy_is_without_outputs(toy_repository, tmp_path):
    folder = tmp_path / "copy"
    bugs.plant(0, folder)
    names = [path.name for path in folder.iterdir()]
    assert sorted(names) == ["lessons", "sums.py", "test_all.py"]
    assert (folder / "sums.py").read_text() == SUM


def test_the_tests_of_a_file_are_its_section_and_those_of_all_scripts(toy_repository):
    assert bugs.tests_of("sums.py") == ["test_all.py::test_three", "test_all.py::test_five"]
    assert bugs.tests_of("data/base.py") == ["data/test_world.py"]
    assert bugs.tests_of("data/rows.py") == ["data/test_data.py"]
    assert bugs.tests_of("lessons/kto.py") == ["lessons/test_lessons.py"]


def test_sabotage_says_which_test_notices_and_which_bug_none(toy_repository, capsys):
    assert bugs.main(["--sabotage"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["  1 sums.py: a minus for a plus", "    test_three",
                         "  2 sums.py: a harmless word", "    NOT CAUGHT"]
    assert lines[4].startswith("FAIL caught 1 of 2 in ")


def test_sabotage_of_one_number_passes(toy_repository, capsys):
    assert bugs.main(["--sabotage", "1"]) == 0
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    assert last.startswith("PASS caught 1 of 1 in ")


def test_sabotage_wants_tests_that_are_green_without_a_bug(toy_repository, capsys):
    broken = SUM.replace("a + b", "a * b")
    (toy_repository / "sums.py").write_text(broken)
    assert bugs.main(["--sabotage", "sums.py"]) == 2
    assert "without any bug test_three is red" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, code", [
    ([], 0),
    (["--help"], 0),
    (["--plant"], 2),
    (["--plant", "x", "y"], 2),
    (["--plant", "3", "y"], 2),
    (["--plant", "0", "y"], 2),
    (["--sabotage", "9"], 2),
    (["17"], 2)])
def test_what_bugs_makes_of_its_arguments(toy_repository, arguments, code, capsys):
    assert bugs.main(arguments) == code
    assert capsys.readouterr().out


def test_plant_refuses_a_folder_that_is_there(toy_repository, tmp_path, capsys):
    folder = tmp_path / "new"
    assert bugs.main(["--plant", "1", str(tmp_path)]) == 2
    assert bugs.main(["--plant", "1", str(folder)]) == 0
    assert (folder / "sums.py").exists()


# ---------------------------------------------------------------- mutants.py

def rules_of(code, tmp_path, monkeypatch):
    """-> {(rule, the code with the change)}"""
    (tmp_path / "x.py").write_text(code)
    monkeypatch.setattr(bugs, "HERE", tmp_path)
    changes = mutants.Finder("x.py").found
    return {(change.rule, mutants.mutated(change)) for change in changes}


@pytest.mark.parametrize("code, want", [
    ("optimizer.step()", {("statement", "pass")}),
    ("raise UserError(1)", {("statement", "pass")}),
    ("x = x + y", {("statement", "pass"), ("sign", "x = x - y")}),
    ("y = x < z", {("comparison", "y = x >= z"), ("comparison", "y = x <= z")}),
    ("y = x == z", {("comparison", "y = x != z")}),
    ("y = (x + 2) - z", {("sign", "y = (x - 2) - z"),
                         ("sign", "y = (x + 2) + z"),
                         ("operands", "y = (z) - x + 2")}),
    ("y = -x", {("sign", "y = x")}),
    ("y = not x", {("dropped", "y = x")}),
    ("y = ~mask & real", {("dropped", "y = mask & real"),
                          ("dropped", "y = (~mask)"),
                          ("dropped", "y = (real)")}),
    ("y = f(a, b)", {("arguments", "y = f(b, a)")}),
    ("y = f(a, mask)", {("arguments", "y = f(mask, a)"), ("dropped", "y = f(a)")}),
    ("y = x.detach()", {("dropped", "y = x")}),
    ("y = x.mean(1)", {("function", "y = x.sum(1)"),
                       ("axis", "y = x.mean()"),
                       ("constant", "y = x.mean(0)")}),
    ("y = x if z else 0", {("constant", "y = x if z else 1")}),
    ("if x: y = z", {("condition", "if not (x): y = z")}),
    ("y = [z for z in x if z]", {("condition", "y = [z for z in x if not (z)]")}),
    ("x, y = z\nw = x", {("names", "x, y = z\nw = y")}),
    ("def f(x, y):\n    return x", {("names", "def f(x, y):\n    return y")}),
    ("say(1, -x)", set()),
    ('"""not x"""', set()),
    ("y = f'{-x}'", set()),
    ("steps: int = 1", set()),
    ("import x", set()),
    ("if __name__ == '__main__': main(1)", set())])
def test_what_each_rule_makes_of_a_line(code, want, tmp_path, monkeypatch):
    assert rules_of(code, tmp_path, monkeypatch) == want


def test_a_place_behind_letters_of_two_bytes(tmp_path, monkeypatch):
    assert ("sign", 'y = "«é»"[0] - x') in rules_of('y = "«é»"[0] + x', tmp_path, monkeypatch)


def test_the_same_seed_draws_the_same_mutants_each_on_its_own_line():
    files = ["ppo.py", "data/rows.py"]
    drawn = mutants.draw(files, 60, seed=3)
    again = mutants.draw(files, 60, seed=3)
    of_another_seed = mutants.draw(files, 60, seed=4)
    assert drawn == again
    assert drawn != of_another_seed
    lines = {(change.file, change.line) for change in drawn}
    assert len(drawn) == 60
    assert len(lines) == 60
    for change in drawn:
        before = (bugs.HERE / change.file).read_text(encoding="utf-8")
        assert mutants.mutated(change) != before


@pytest.fixture
def toy_mutants(toy_repository, monkeypatch):
    """Of the sum's mutants one is noticed, and one, in what nothing tests, is not."""
    (toy_repository / "sums.py").write_text(SUM + "\n\ndef twice(a):\n    return a * 2\n")
    (toy_repository / "data").mkdir()
    monkeypatch.setattr(mutants, "SCRIPTS", ("sums.py",))
    return toy_repository


def test_a_mutant_that_no_test_notices_is_shown_with_its_line(toy_mutants, capsys):
    assert mutants.main(["20", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert "SURVIVED sums.py:6, sign\n    -    return a * 2\n    +    return a / 2\n" in text
    assert re.search(r"sums.py:2 +sign +test_three\n", text)
    assert re.search(r"killed \d of \d, 0 of them by time: 0.\d\d \+-0.\d\d", text)


def test_a_mutant_that_hangs_is_killed(toy_mutants, monkeypatch):
    code = "import time\n" + SUM + "\ntime.sleep(60)\n"
    assert mutants.first_red("sums.py", code, limit=3) == "hangs"


def test_tests_must_be_green_without_a_mutant(toy_mutants):
    (toy_mutants / "sums.py").write_text(SUM.replace("a + b", "a * b"))
    with pytest.raises(SystemExit, match="without any change this is red: test_three"):
        mutants.main(["1", "sums.py"])


def test_mutants_are_of_files_that_have_tests(capsys):
    with pytest.raises(SystemExit) as stop:
        mutants.main(["1", "test_all.py"])
    assert stop.value.code == 2
    assert "test_all.py: choose of" in capsys.readouterr().err


# ---------------------------------------------------------------- bad_input.py

@pytest.fixture(scope="module")
def bad_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("bad")
    bad_input.make_models(home)
    return home


def test_bad_inputs_are_many_and_of_every_script(bad_home):
    cases = bad_input.all_cases(bad_home)
    scripts = {case.script for case in cases}
    assert len(cases) > 2000
    assert scripts == set(bad_input.SCRIPTS)
    assert cases == bad_input.all_cases(bad_home)


@pytest.mark.parametrize("part", range(4))
def test_bad_inputs_end_in_one_line(part, bad_home):
    """One in a hundred of them; python -m lessons.bad_input tries them all."""
    cases = bad_input.all_cases(bad_home)
    for case in cases[25 * part::100]:
        faults = bad_input.try_here(case, bad_home)
        assert faults == {}, (case.script, case.what)


def bad_case(**changes):
    case = bad_input.Case("fields", "dpo.py", "it", "line", [], {})
    return case._replace(**changes)


def test_good_input_is_accepted(bad_home):
    for script in ("sft.py", "dpo.py", "reward_model.py", "ppo.py", "grpo.py", "cai.py"):
        case = bad_case(script=script)
        faults = bad_input.try_here(case, bad_home)
        assert faults == {"accepted": "in silence"}, script


def test_what_counts_as_a_fault():
    case = bad_case()

    def faults(code=2, errors="error: line 3\n", seconds=1, wrote=False, before={}):
        found = bad_input.judge(case, code, errors, seconds, wrote, before)
        return set(found)
    assert faults() == set()
    assert faults(code=1) == {"exit code"}
    assert faults(errors="usage\nerror: line 3\n") == {"not one line"}
    assert faults(errors="error: it is bad\n") == {"unnamed"}
    assert faults(seconds=11) == {"slow"}
    assert faults(wrote=True) == {"wrote"}
    assert faults(code=0, errors="", before={"accepted": ""}) == set()


def test_a_traceback_is_a_fault(bad_home, monkeypatch):
    def broken(config, tokenizer, context):
        return {}["mine"]
    monkeypatch.setattr(dpo, "read_pairs", broken)
    faults = bad_input.try_here(bad_case(), bad_home)
    assert list(faults) == ["traceback"]
    assert "KeyError: 'mine'" in faults["traceback"]


def test_what_is_written_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    before = bad_input.contents(tmp_path)
    (tmp_path / "a/b").write_text("x")
    assert bad_input.contents(tmp_path) != before


def test_saving_is_killed(bad_home, capsys):
    assert bad_input.try_kills(3, bad_home) == 0
    assert "killed while saving    3 times" in capsys.readouterr().out


def test_a_folder_of_two_runs_is_not_whole(bad_home, tmp_path):
    tokenizer = load_ranks()
    model = tiny_model()
    save(tmp_path / "m", model, tokenizer)
    assert not bad_input.is_whole(tmp_path / "m")       # its weights are not all one number


@pytest.mark.parametrize("arguments, code", [
    (["--help"], 0),
    (["--kill"], 2),
    (["--kill", "x"], 2),
    (["x.py"], 2)])
def test_what_bad_input_makes_of_its_arguments(arguments, code, capsys):
    assert bad_input.main(arguments) == code
    assert "python -m lessons.bad_input" in capsys.readouterr().out


# ---------------------------------------------------------------- speed.py

def test_operations_are_the_docstrings_example():
    model, _ = load("data/base")
    assert speed.operations(model, 2250) == pytest.approx(12.4e9, rel=0.005)
    assert "6 x 917,504 x 2,250 = 12.4 billion" in speed.__doc__


def products_counted(run):
    """Operations of all products of matrices in a call, by PyTorch's own count, but for
    attention's. -> what the call returns, their number"""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        value = run()
    counts = counter.get_flop_counts()["Global"]
    products = 0
    for op, count in counts.items():
        is_attention = "attention" in str(op) or "bmm" in str(op)
        if not is_attention:
            products += count
    return value, products


@pytest.mark.parametrize("tie", [True, False])
def test_operations_are_those_that_a_profiler_counts(tie):
    model = tiny_model(tie=tie)

    def run():
        return speed.forward_and_backward(model, 2, 8)
    (_, tokens), products = products_counted(run)
    assert tokens == 14         # of 16 two are the first of their rows: nothing predicts them
    products_of_one = products / 5
    assert products_of_one == pytest.approx(speed.operations(model, tokens), rel=0.001)


def test_a_step_of_sft_costs_less_than_6_n_n_as_the_docstring_says():
    config = sft.Config()
    model, tokenizer = load(config.init)
    examples, _ = sft.read_examples(config, tokenizer, model.config.max_len)
    lengths = [1 + len(example.ids) // 40 for example in examples]
    generator = torch.Generator().manual_seed(0)
    stream = house.batches(examples, lengths, config.batch, generator)
    batches = []
    for _ in range(config.steps):
        batches.append(M.collate(next(stream), tokenizer, "cpu"))
    different = []
    answers = []
    for ids, mask, answer in batches:                           # (B, T) each
        layout = M.different_tokens(ids[:, :-1], mask[:, :-1])  # a row's last predicts nothing
        different.append(len(layout.place))
        answers.append(answer[:, 1:].sum().item())
    assert np.mean(different) == pytest.approx(2250, abs=25)
    assert np.mean(answers) == pytest.approx(1240, abs=5)

    def run():
        logps = M.token_logps(model, *batches[0])
        logps.sum().backward()
    _, products = products_counted(run)
    last_mlp = model.blocks[-1].mlp
    last = model.embed.weight.numel()
    for W in last_mlp.parameters():
        last += W.numel()
    wanted = speed.operations(model, different[0])
    spared = 6 * last * (different[0] - answers[0])
    assert products == pytest.approx(wanted - spared, rel=0.001)
    mean_wanted = speed.operations(model, 2250)
    mean_spared = 6 * last * (2250 - 1240)
    mean = mean_wanted - mean_spared
    assert mean == pytest.approx(10.5e9, rel=0.005)
    assert "in\ntruth 10.5 billion" in speed.__doc__


@pytest.mark.parametrize("devices, dtype", [
    ({"cuda"}, torch.float32),
    ({"cuda", "cpu"}, torch.bfloat16)])
def test_the_machine_is_measured_in_the_precision_of_the_blocks(monkeypatch, devices, dtype):
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.mm.default:
                seen.append(args[0].dtype)
            elif op is torch.ops.aten._to_copy.default:
                seen.append("converted")
            return op(*args, **(kwargs or {}))
    monkeypatch.setattr(M, "BF16", devices)
    with Watch():
        assert speed.products_a_second(8, "cpu") > 0
    assert seen[-5:] == [dtype] * 5             # nothing is converted while the clock runs


@pytest.mark.parametrize("tie", [True, False])
def test_every_answer_goes_its_full_length(monkeypatch, tie):
    """Also by a model that always says <|im_end|>; and the first call of two does not count."""
    model = tiny_model(tie=tie)
    end = M.special(TOKENIZER, M.END)
    drawn = []

    def draw(probs, *args):
        count = len(probs)
        drawn.append(count)
        return torch.tensor([end]).expand(count)
    monkeypatch.setattr(M, "draw", draw)
    ticks = iter([0.0, 100.0, 100.0, 102.0])
    monkeypatch.setattr(speed.time, "time", lambda: next(ticks))
    config = speed.Config(tokens=8)
    rate = speed.sampling(model, 3, config)
    assert rate == 3 * 8 / 2
    assert drawn == [3] * 8 * 2


def test_darts_are_thrown_on_the_processor(monkeypatch):
    """model.draw takes no generator of a GPU."""
    seen = []

    def draw(probs, top_k, top_p, generator):
        seen.append((generator.device.type, generator.initial_seed(), top_k, top_p))
        return probs.argmax(-1)
    monkeypatch.setattr(M, "draw", draw)
    config = speed.Config(tokens=2, seed=7)
    # a device that has no generator, as no GPU is here
    object.__setattr__(config, "device", "meta")
    speed.sampling(tiny_model(), 3, config)
    assert set(seen) == {("cpu", 7, 0, 1.0)}


def test_the_clock_counts_the_loops_and_nothing_else():
    loops = []

    def steps(config, *optimizers):
        yield from range(config)
    loop = speed.timed(steps, loops)
    for _ in loop(3):
        time.sleep(0.02)
    for _ in loop(2):
        time.sleep(0.01)
    assert [len(seconds) for seconds in loops] == [3, 2]
    assert min(loops[0]) >= 0.02 and min(loops[1]) >= 0.01


def test_each_loop_of_cai_counts_with_its_own_number_of_steps(monkeypatch):
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    def train(config):
        assert (config.sl_steps, config.steps) == (2, 2)
        wait(5.0)                                       # loading
        for cost in 1.0, 3.0:
            for _ in cai.steps(config):
                wait(cost)
    monkeypatch.setattr(speed.time, "time", lambda: now[0])
    monkeypatch.setattr(cai, "train", train)
    times = speed.time_script(cai, speed.Config(steps=2))
    training = cai.Config.sl_steps * 1.0 + cai.Config.steps * 3.0
    steps = cai.Config.sl_steps + cai.Config.steps
    assert times == {"step": training / steps, "training": training, "rest": 5.0}


def speed_run(tmp_path, monkeypatch, init):
    """`python -m lessons.speed --quick --init INIT` in an empty folder -> its picture"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speed", "--quick", "--init", init])
    figures.main("speed", speed.Config, speed.train, speed.picture, speed.__doc__)
    return Path("out/lessons/figures/speed.svg").read_text()


def test_speed_of_a_model_of_your_own(tmp_path, monkeypatch, capsys):
    save(tmp_path / "mine", tiny_model(), TOKENIZER)
    svg = speed_run(tmp_path, monkeypatch, "mine")
    assert "Sampling" in svg
    assert "256 at once" in svg
    assert "a whole run" not in svg
    shown = capsys.readouterr().out
    assert "64 x  64 tokens" in shown
    assert "sft" not in shown
    for line in shown.splitlines():
        assert len(line) < 80


def test_a_gradients_share_is_that_of_the_tokens_it_learned_from(monkeypatch):
    model = tiny_model()
    sizes = []

    def products_a_second(size, device):
        sizes.append(size)
        return 1e9
    monkeypatch.setattr(speed, "begin", lambda config: None)
    monkeypatch.setattr(speed, "load", lambda *args: (model, TOKENIZER))
    monkeypatch.setattr(speed, "products_a_second", products_a_second)
    monkeypatch.setattr(speed, "sampling", lambda *args: 1.0)
    monkeypatch.setattr(speed, "forward_and_backward", lambda *args: (2.0, 100))
    share = speed.operations(model, 100) / 2e9
    want = {"seconds": 2.0, "share": pytest.approx(share)}
    for device in "cpu", "cuda":
        config = speed.Config(init="mine", device=device, quiet=True)
        run = speed.train(config)
        assert run["numbers"]["gradient"] == {"64x64": want, "4x128": want}
    assert sizes == [2048, 8192]


def test_speed_of_the_scripts(tmp_path, monkeypatch, capsys):
    times = {"step": 0.25, "training": 10.0, "rest": 3.0}
    monkeypatch.setattr(speed, "load", lambda *args: (tiny_model(), TOKENIZER))
    monkeypatch.setattr(speed, "need", lambda folder: None)
    monkeypatch.setattr(speed, "time_script", lambda script, config: times)
    svg = speed_run(tmp_path, monkeypatch, speed.Config.init)
    assert "Sampling" in svg
    assert "seconds of a whole run" in svg
    assert "reward_model" in svg
    shown = capsys.readouterr().out
    assert "reward_model       0.250      10.0     3.0\n" in shown
    for line in shown.splitlines():
        assert len(line) < 80


def test_speed_times_one_script_and_leaves_it_as_it_was(monkeypatch):
    plain = sft.steps
    monkeypatch.setattr(sft.exam, "exam", lambda *args, **more: ({"gold": 0.5}, []))
    monkeypatch.setattr(sft.exam, "show_answers", lambda *args: None)
    monkeypatch.setattr(speed, "SCRIPTS", {"sft": sft})
    config = speed.Config(steps=2)
    times = speed.time_script(sft, config)
    training = times["step"] * sft.Config.steps
    assert sft.steps is plain
    assert times["training"] == pytest.approx(training)
