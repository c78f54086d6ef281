"""Find the bug: a copy of the repository with one line changed, as people change them by mistake.

Every bug below runs without an error, and changes what is learned or what is reported. A run with a
bug looks like a run that needs other settings, so finding one by reading is worth practice.

    python -m lessons.bugs --plant 17 FOLDER      a copy with bug 17 in it, and without this list
    python -m lessons.bugs --sabotage             do the tests notice? Plants each in its own copy
    python -m lessons.bugs --sabotage ppo.py 17   only those of a file, or with a number

A hint, once you have looked for ten minutes: run test_all.py in the copy. Which test is red?
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent.parent
WORLD = ("data/studybuddy.py", "data/abilities.py", "data/generate.py")     # they write the data

# file, what stands there (once), what the bug makes of it, and what that is
BUGS = [

    ('model.py', 'torch.cat([-b, a], dim=-1)', 'torch.cat([b, -a], dim=-1)',
     'rotary positions turn backwards'),
    ('model.py', '& (key <= query)', '& (key <= query + 1)',
     'beside padding, tokens see the next one'),
    ('model.py', '(mask.cumsum(1) - 1)', '(torch.ones_like(mask).cumsum(1) - 1)',
     'positions count left padding'),
    ('model.py', 'k.mT) * D ** -0.5', 'k.mT) * D ** -1.0', 'cached attention is scaled by 1/D'),
    ('model.py', 'if self.config.tie:\n', 'if True:\n',
     'untied models project by embedding'),
    ('model.py', '(hidden) - self.mean', '(hidden) + self.mean', "the reward's mean is added"),
    ('model.py', 'states = states / temperature', 'states = states',
     'log-probs without the sampling temperature'),
    ('model.py', 'model.hidden(ids[:, :-1], mask[:, :-1], at=before)',
     'model.hidden(ids[:, 1:], mask[:, 1:], at=before)', 'each token is predicted from itself'),
    ('model.py', 'Layout(number[which], ', 'Layout(number[which.sort()[0]], ',
     "rows read another row's tokens"),
    ('model.py', '(texts[1:] != texts[:-1]).cummax(1).values', 'texts[1:] != texts[:-1]',
     'two rows that have parted share tokens again'),
    ('model.py', 'keep = before < top_p', 'keep = sorted_probs.cumsum(-1) < top_p',
     'top-p leaves out its last token'),
    ('model.py', 'ends_before = stops.cumsum(1) - stops.long()', 'ends_before = stops.cumsum(1)',
     'sampled end tokens are not trained'),
    ('model.py', 'marks += [0] * len(head)\n', 'marks += [1] * len(head)\n',
     "loss on the user's tokens, too"),
    ('model.py', '[int(is_answer)] * len(body)', '[int(is_answer)] * (len(body) - 1) + [0]',
     'the end token is not supervised'),
    ('data/run.py', 'return W + 2 * self.B @ self.A', 'return W + self.B @ self.A',
     "LoRA's scale is forgotten"),
    ('model.py', 'if no_left_padding and T == S:', 'if T == S:',
     'padding on the left is looked at'),
    ('model.py', 'y = self.attention(self.norm1(x),', 'y = self.attention(self.norm2(x),',
     'attention reads the other norm'),
    ('model.py', 'at.int().argmax(1)  ', 'at.int().argmax(1) + 1  ',
     'where one token of a row asks, it sees the next one'),
    ('model.py', 'return before | (key == query)', 'return before',
     'one text without tokens makes nan of all that is learned'),
    ('model.py', 'query = in_cache + at.int()', 'query = at.int()',
     'behind a cache one token of a row sees too little'),
    ('model.py', 'last = (mask * column).argmax(1)', 'last = mask.sum(1) - 1',
     'left padding: the score is read too early'),
    ('model.py', 'marks += [1] * len(body)\n',
     'marks += [1] * (len(body) - 1) + [0]\n', "an answer's end token is not scored"),
    ('model.py', '        if S == T:\n            layout', '        if True:\n            layout',
     'behind a cache equal tokens of two rows count as one'),
    ('model.py', 'new = texts >= 0  ', 'new = texts >= -1  ', 'padding is computed'),
    ('model.py', 'position[:, S - T:]', 'position[:, :T]',
     'cached tokens begin at position 0'),
    ('model.py', 'logps[:, :longest].masked_fill(~answer, 0.0)', 'logps[:, :longest]',
     'log-probs behind the end are kept'),
    ('model.py', 'torch.cat([mask, answer], 1)', 'torch.cat([mask, torch.ones_like(answer)], 1)',
     'padding behind the end counts as real'),
    ('model.py', 'ended=stops.any(1)', 'ended=answer.any(1)', 'endless answers count as ended'),
    ('model.py', 'row[keep].tolist()', 'row.tolist()', 'texts go on behind their end'),
    ('model.py', 'probs = (logits / temperature).softmax(-1)', 'probs = logits.softmax(-1)',
     'the temperature does nothing'),
    ('model.py', 'keep[:, top_k:] = False', 'keep[:, top_k + 1:] = False',
     'top-k keeps one token more'),
    ('model.py', 'dart = dart.to(line.device) * line[:, -1:]',
     'dart = dart.to(line.device)', 'top-k: darts miss the line'),
    ('model.py', 'torch.rand(len(line), 1, generator=generator)', 'torch.rand(len(line), 1)',
     'sampling ignores its generator'),
    ('data/run.py', 'order = torch.randperm(len(rows), generator=generator)',
     'order = torch.arange(len(rows))', 'some rows are never in a batch'),
    ('data/run.py', 'groups[g][RANK::PROCESSES]', 'groups[g]', 'each process learns from all rows'),
    ('data/run.py', 'if name not in apart]', 'if name not in different[:1]]',
     'held-out rows are trained on'),
    ('data/run.py', 'for i in range(0, len(rows), size)]',
     'for i in range(0, len(rows) - size + 1, size)]', 'the last part is left out'),
    ('data/run.py', 'beta2=0.95', 'beta2=0.999', "Adam's second beta"),
    ('data/run.py', 'weight_decay=0.0', 'weight_decay=0.1', 'weights decay'),
    ('data/run.py', 'optimizer.defaults["lr"] * schedule', 'group["lr"] * schedule',
     'schedules multiply from step to step'),
    ('data/run.py', '1 - step / steps)', '1.0)', 'the learning rate never falls'),
    ('data/run.py', 'return min((step + 1) / warmup,', 'return min(1.0,', 'there is no warm-up'),
    ('data/run.py', 'clip_grad_norm_(model.parameters(), 1.0)',
     'clip_grad_norm_(model.parameters(), 1e9)', 'gradients are never clipped'),
    ('data/run.py', 'p.grad = average(gradient)', 'p.grad = gradient',
     'processes keep their own gradients'),
    ('data/run.py', 'x /= PROCESSES', 'x /= 1', 'a sum over processes, not their mean'),
    ('data/run.py', 'return rows[RANK::PROCESSES]', 'return rows', 'processes share no work'),
    ('data/run.py', 'values = average(values).tolist()', 'values = values.tolist()',
     'the log is about one process alone'),
    ('data/run.py', 'p.requires_grad_(name == "score.weight")', 'p.requires_grad_(True)',
     'with adapters all weights learn, too'),
    ('data/run.py', 'W.new_zeros(rows, rank)', 'W.new_ones(rows, rank)',
     'adapters change the model before they learn'),
    ('data/run.py', 'torch.manual_seed(config.seed)', 'torch.manual_seed(0)',
     'begin forgets the seed'),
    ('data/run.py', 'self.rows.append(row)', 'self.rows = [row]',
     'the log keeps its last row alone'),
    ('data/run.py', 'BF16.discard("cpu")', 'pass', 'bfloat16 stays on in later runs'),
    ('data/run.py', 'held = [row for row, name in zip(rows, names) if name in apart]',
     'held = rows[::every]', 'rows stand on both sides'),
    ('model.py', 'last = (mask * column).argmax(1)', 'last = mask.sum(1) - 2',
     'the score is read one token early'),

    ('sft.py', 'hidden(ids[:, :-1], mask[:, :-1]', 'hidden(ids[:, 1:], mask[:, 1:]',
     'each token is predicted from itself'),
    ('sft.py', 'm = answer[:, 1:]', 'm = answer[:, :-1]', 'the mask is not shifted'),
    ('sft.py', 'm = answer[:, 1:]', 'm = mask[:, 1:]', 'loss on the questions, too'),
    ('sft.py', 'hidden(ids[:, :-1], mask[:, :-1]', 'hidden(ids[:, :-1], answer[:, :-1]',
     'the answer does not see its question'),
    ('sft.py', 'return -logps.sum() / count', 'return -logps.mean()',
     'accumulation: each part has its own denominator'),
    ('sft.py', 'average(float(tokens_in(batch)))', 'average(float(len(batch)))',
     'mean over rows, not tokens'),
    ('sft.py', 'average(float(tokens_in(batch)))', 'float(tokens_in(batch))',
     'each process divides by its own count'),
    ('sft.py', 'total += loss.item()', 'total = loss.item()',
     'the log is about the last part of a batch'),
    ('sft.py', 'total / tokens_in(held)', 'total / len(held)',
     "held-out loss is a row's, not a token's"),
    ('sft.py', 'return hold_out(examples, prompts, HELD_OUT)',
     'return examples, hold_out(examples, prompts, HELD_OUT)[1]', 'held-out rows are learned from'),
    ('sft.py', 'hold_out(examples, prompts, HELD_OUT)', 'hold_out(examples, most=HELD_OUT)',
     'prompts of held-out rows are learned from'),
    ('sft.py', '        clip_gradients(model)\n', '', 'gradients are neither averaged nor clipped'),
    ('sft.py', '        optimizer.zero_grad()\n', '', 'gradients pile up over the steps'),
    ('sft.py', '    add_lora(model, config.lora)\n    optimizer = adamw(model, config.lr)\n',
     '    optimizer = adamw(model, config.lr)\n    add_lora(model, config.lora)\n',
     'the optimiser does not know the adapters'),
    ('sft.py', '    merge_lora(model)\n', '', 'adapters are not merged'),
    ('sft.py', 'Example(ids[:context], m[:context])', 'Example(ids[-context:], m[-context:])',
     'a long row loses its beginning'),
    ('sft.py', 'exam.Target("held_out", before["held_out"]',
     'exam.Target("held_out", after["held_out"]', 'the target is what came out'),

    ('reward_model.py', 'vote = -F.logsigmoid(r_chosen - r_rejected - margin)',
     'vote = -F.logsigmoid(r_rejected - r_chosen - margin)', 'chosen and rejected are swapped'),
    ('reward_model.py', 'r_chosen - r_rejected - margin)', 'r_chosen - r_rejected + margin)',
     'the margin has the wrong sign'),
    ('reward_model.py', 'r.flip(1).logcumsumexp(1).flip(1)', 'r.logcumsumexp(1)',
     'Plackett-Luce from the wrong end'),
    ('reward_model.py', 'zlib.crc32(studybuddy.flat(comparison.prompt).encode())',
     'zlib.crc32(str(comparison.answers).encode())', 'held-out prompts are trained on'),
    ('reward_model.py', 'return combine(r) if r.dim() == 3 else r',
     'return r.sum(-1) if r.dim() == 3 else r', 'much help pays for some harm'),
    ('reward_model.py', '[order.argsort()]', '[order]', 'scores come back in another order'),
    ('reward_model.py', 'comparison.examples\n    ids, mask, _',
     'comparison.examples[:1] * 2\n    ids, mask, _', 'the rejected answer is never read'),
    ('reward_model.py', '(loss.sum() / len(batch)).backward()',
     '(loss.sum() / len(part)).backward()', 'accumulation: each part has its own denominator'),
    ('reward_model.py', '        clip_gradients(model)\n', '', 'gradients are not clipped'),
    ('reward_model.py', '        optimizer.zero_grad()\n', '',
     'gradients pile up from step to step'),
    ('reward_model.py', 'stream = batches(comparisons, lengths',
     'stream = batches(comparisons + held, [*lengths] + [9] * len(held)',
     'the loop learns from held-out rows, too'),
    ('reward_model.py', 'held[:200], tokenizer)[:, 0]', 'held[:200], tokenizer)[:, -1]',
     'an average loser scores 0'),
    ('reward_model.py', 'right[first != second]', 'right', 'ties of the truth are counted'),
    ('reward_model.py', 'p.maximum(1 - p)', 'p',
     'the ceiling of a judge that always trusts the vote'),
    ('reward_model.py', 'outcome_loss(r, z.to(r))', 'outcome_loss(r, 1 - z.to(r))',
     'heads learn the opposite of their marks'),
    ('reward_model.py', 'config.batch, torch.Generator().manual_seed(config.seed))',
     'config.batch, torch.Generator())', 'the seed does not order the batches'),

    ('ppo.py', '-torch.minimum(rho * A, clipped * A)', '-torch.maximum(rho * A, clipped * A)',
     'max for min in the clipped loss'),
    ('ppo.py', 'rho.clamp(1 - eps, 1 + eps)', 'rho.clamp(-eps, eps)',
     'ratios are clipped around 0'),
    ('ppo.py', '    values = values.masked_fill(~answer, 0.0)\n    advantages = torch',
     '    advantages = torch', "GAE's recursion without the mask"),
    ('ppo.py', 'A = advantages[answer]                                      # (N,)\n    std',
     'A = advantages.masked_fill(~answer, 0.0)\n    std', 'whitening counts padding'),
    ('ppo.py', '(A.var(correction=0) + 1e-8)', '(A.var(correction=1) + 1e-8)',
     "whitening by the sample's deviation"),
    ('ppo.py', 'torch.expm1(-k1) + k1', 'torch.expm1(k1) - k1', 'k3 with the ratio upside down'),
    ('ppo.py', 'k1, _, _ = kl_estimates(', '_, k1, _ = kl_estimates(', 'the reward pays k2 for k1'),
    ('ppo.py', 'F.pad(values, (1, 0)) ', 'F.pad(values, (0, 1)) ',
     'V knows the token it waits for'),
    ('ppo.py', 'torch.maximum((V - R)', 'torch.minimum((V - R)', "the critic's clip is optimistic"),
    ('ppo.py', 'logps = token_logps(policy, ids[at], mask[at], drawn, config.temperature)',
     'logps = token_logps(policy, ids[at], mask[at], drawn)', 'the loss forgets the temperature'),
    ('ppo.py', 'critic_optimizer.step()', 'optimizer.step()', 'the critic never learns'),
    ('ppo.py', '                optimizer.zero_grad()\n', '', 'gradients of all updates add up'),
    ('ppo.py', 'clip_gradients(critic)', 'clip_gradients(policy)',
     "the critic's gradient is not clipped"),
    ('ppo.py', 'old_logps[at], advantages[at], drawn', 'old_logps[at], returns[at], drawn',
     'the policy learns from returns, without a baseline'),
    ('ppo.py', 'values[at], returns[at], drawn', 'values[at], advantages[at], drawn',
     'the critic learns advantages for returns'),
    ('ppo.py', 'scores.min() - config.penalty', 'scores.min() + config.penalty',
     'an endless answer is rewarded'),
    ('ppo.py', 'scores.where(samples.ended,', 'scores.where(~samples.ended,',
     'the answers that end are punished'),
    ('ppo.py',
     '        batch = []\n        for prompt in next(stream):\n'
     '            batch += [prompt] * config.group\n',
     '        batch = next(stream) * config.group\n',
     "a group's answers are to different prompts"),
    ('ppo.py', 'reference = copy.deepcopy(policy).requires_grad_(False)', 'reference = policy',
     'the reference moves with the policy'),
    ('ppo.py', 'critic = copy.deepcopy(reward_model)', 'critic = reward_model',
     'the critic learns inside of the reward model'),
    ('ppo.py', 'drawn.sum() / answer[minibatch].sum()', 'drawn.sum() / answer.sum()',
     "a minibatch is divided by the batch's tokens"),
    ('ppo.py', 'drawn.sum() / answer[minibatch].sum()', '1',
     'parts are added up without their shares'),
    ('ppo.py', 'order = torch.randperm(len(ids), generator=generator)',
     'order = torch.randint(len(ids), (len(ids),), generator=generator)',
     'some answers are learned from twice, some never'),
    ('ppo.py', '- groups) / (group - 1)', '- groups) / group', "the others' sum is divided by all"),
    ('ppo.py', 'token_logps(reference, ids[at], mask[at], drawn, config.temperature)',
     'token_logps(reference, ids[at], mask[at], drawn)', 'the reference forgets the temperature'),
    ('ppo.py', 'token_rewards(scores, old_logps, ref_logps, answer, beta)',
     'token_rewards(scores, ref_logps, old_logps, answer, beta)', 'distance is rewarded'),
    ('ppo.py', 'token_rewards(scores, old_logps, ref_logps, answer, beta)',
     'token_rewards(scores, old_logps, ref_logps, answer, config.beta)',
     'the adapted beta is not used'),
    ('ppo.py', 'adapt_beta(beta, kl, config.target_kl)',
     'adapt_beta(config.beta, kl, config.target_kl)', 'beta is adapted only once'),
    ('ppo.py', 'values[:, t]   # (B,)\n        advantages[:, t] = delta + gamma * lam * next_A',
     'values[:, t]   # (B,)\n        advantages[:, t] = delta + lam * next_A',
     'GAE forgets gamma'),
    ('ppo.py', 'next_V = 0.0 ', 'next_V = values[:, -1]',
     'V of the last token comes again after it'),
    ('ppo.py', 'answer.cumsum(1).argmax(1) ', 'answer.int().argmax(1) ',
     'the score is paid at the first token'),
    ('ppo.py', 'prompts, held = read_prompts(', 'held, prompts = read_prompts(',
     'it learns from the rows that are held out'),
    ('ppo.py', 'kl = average(k1.sum(1).mean()).item()',
     'kl = average(k1[answer].mean()).item()', 'the KL is of a token, not of an answer'),
    ('ppo.py', 'hold_out(prompts, [prompt.messages for prompt in prompts], most=64)',
     'hold_out(prompts, most=64)', 'held-out prompts are learned from where they come twice'),
    ('ppo.py', 'loss = loss + value_loss(V, values[at], returns[at], drawn, config.eps)',
     'loss = loss + value_loss(V, V.detach(), returns[at], drawn, config.eps)',
     "the critic's clip holds it against itself"),

    ('grpo.py', 'rewards - rewards.mean(1, keepdim=True)',
     'rewards - rewards.mean(0, keepdim=True)',
     'the baseline is a mean over prompts, not over the group'),
    ('grpo.py', 'std(1, keepdim=True, correction=0)', 'std(1, keepdim=True)',
     'the deviation of a sample, not of the group'),
    ('grpo.py', '    mean = total / answer.sum(1, keepdim=True) ', '    mean = total ',
     'GSPO: a sum for a mean'),
    ('grpo.py', 'clamp(1 - low, 1 + high).detach()', 'clamp(1 - low, 1 + high)',
     "CISPO's weight is not detached"),
    ('grpo.py', '(log_ref.exp() - log_ref - 1)', 'log_ref.square() / 2',
     'the penalty is k2, not k3'),
    ('grpo.py', 'log_ref = ref_logps - logps ', 'log_ref = logps - ref_logps ',
     "the KL's ratio is upside down"),
    ('grpo.py', 'return torch.minimum(rho * A,', 'return torch.maximum(rho * A,',
     'the clip is optimistic'),
    ('grpo.py', 'return answer / answer.sum(1, keepdim=True) / len(answer)',
     'return answer / answer.sum()', 'GRPO weighs tokens as DAPO does'),
    ('grpo.py', 'prompts[i // G]', 'prompts[i % len(prompts)]',
     'answers are checked against other prompts'),
    ('grpo.py', 'if number is None or not ended:', 'if number is None:',
     'what never ends may earn its reward'),
    ('grpo.py', 'samples.answer[at], config.temperature)', 'samples.answer[at])',
     'the loss forgets the temperature'),
    ('grpo.py', 'ref_logps = logps_at(reference,', 'ref_logps = logps_at(policy,',
     'the policy is its own reference'),
    ('grpo.py', 'advantages[at], answer, weights[at], method,',
     'advantages[at], answer, method.weights(answer, config.max_new), method,',
     'each part of a batch is weighed as if it were the whole'),
    ('grpo.py', '                old_logps = samples.logps[at] ',
     '                old_logps = samples.logps[:len(at)] ',
     "every part is held against the first part's old log-probs"),
    ('grpo.py', '            # 4 step\n            clip_gradients(policy)\n',
     '            # 4 step\n', 'gradients are not clipped'),
    ('grpo.py', '            optimizer.step()\n            optimizer.zero_grad()\n',
     '            optimizer.step()\n', 'gradients are never zeroed'),
    ('grpo.py', 'reference = copy.deepcopy(policy).requires_grad_(False)', 'reference = policy',
     'the reference learns, too'),
    ('grpo.py', 'prompts[str(line.messages)] = ', 'prompts[line.where] = ',
     'prompts that are there twice are learned from and held out'),
    ('grpo.py', 'loss=sum(losses) / config.epochs)', 'loss=losses[-1])',
     'the log knows the last part only'),
    ('grpo.py', 'rewards.append(reward(prompt.truth, text, bool(samples.ended[i])))',
     'rewards.append(reward(prompt.truth, text, bool(samples.ended[i // G])))',
     "paid for another answer's end"),

    ('dpo.py', 'return -F.logsigmoid(beta * (chosen - rejected))',
     'return -F.logsigmoid(beta * (rejected - chosen))', 'the loser wins'),
    ('dpo.py', 'return (1 - noise) * right + noise * wrong',
     'return (1 - noise) * right - noise * wrong', 'label smoothing has the wrong sign'),
    ('dpo.py', 'return (chosen - rejected - 1 / (2 * beta)) ** 2',
     'return (chosen - rejected - 1 / beta) ** 2', "IPO's constant"),
    ('dpo.py', '-F.logsigmoid(beta * (chosen - rejected) - gamma)',
     '-F.logsigmoid(beta * (chosen - rejected) + gamma)', "SimPO's margin has the wrong sign"),
    ('dpo.py', 'return logp - torch.log(', 'return logp + torch.log(',
     'ORPO: odds turned into something else'),
    ('dpo.py', 'z = mismatched.mean().detach()', 'z = mismatched.mean()',
     'KTO trains its reference point'),
    ('dpo.py', 'logps = logps.sum(1) ', 'logps = logps.mean(1) ',
     'log-probs averaged, padding included'),
    ('dpo.py', 'if config.flip:', 'if False:', 'flip does nothing'),
    ('dpo.py', 'return hold_out(pairs, prompts)', 'return pairs, hold_out(pairs, prompts)[1]',
     'held-out pairs are trained on'),
    ('dpo.py', 'return hold_out(pairs, prompts)', 'return hold_out(pairs)',
     'prompts of held-out pairs are trained on'),
    ('dpo.py', 'logps = logps / answer.sum(1)', 'logps = logps / mask.sum(1)',
     "means count the prompt's tokens"),
    ('dpo.py', 'return logps[0::2], logps[1::2]', 'return logps[1::2], logps[0::2]',
     'chosen and rejected are swapped'),
    ('dpo.py', 'reference = copy.deepcopy(policy).requires_grad_(False)', 'reference = policy',
     'the reference moves along'),
    ('dpo.py', '    if LOSSES[config.loss].reference:', '    if True:',
     'SimPO and ORPO get a reference'),
    ('dpo.py', '(losses.sum() / len(batch)).backward()', 'losses.mean().backward()',
     'parts: each has its own mean'),
    ('dpo.py', 'clip_gradients(policy)', 'clip_gradients(reference)', 'gradients are not clipped'),
    ('dpo.py', 'optimizer.zero_grad()', 'optimizer.zero_grad',
     'gradients pile up from step to step'),
    ('dpo.py', 'if config.lr is None:', 'if True:', '--lr does nothing'),
    ('dpo.py', 'if config.beta is None:', 'if True:', '--beta does nothing'),
    ('dpo.py', 'add_lora(policy, config.lora)', 'add_lora(policy, 0)', '--lora does nothing'),
    ('dpo.py', 'shuffle = torch.Generator().manual_seed(config.seed)',
     'shuffle = torch.Generator().manual_seed(0)', '--seed does nothing'),
    ('dpo.py', 'before, old_answers = evaluate(policy, reference, held,',
     'before, old_answers = evaluate(policy, reference, pairs,',
     'before is measured on training pairs'),
    ('dpo.py', 'after, answers = evaluate(policy, reference, held,',
     'after, answers = evaluate(policy, reference, pairs,',
     'after is measured on training pairs'),
    ('dpo.py', 'return chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps',
     'return chosen_logps - ref_chosen_logps, rejected_logps',
     'losers are held against no reference'),
    ('dpo.py', 'exam.exam(policy, tokenizer, reference, against, config.seed)',
     'exam.exam(policy, tokenizer, policy, against, config.seed)',
     "the exam's KL is from itself"),
    ('dpo.py', 'as_in_training(pairs, config):', 'as_in_training(pairs, config)[:1]:',
     'accuracy of the first held-out pairs alone'),
    ('dpo.py', '(ahead + even / 2)', '(ahead + even)', 'ties count as right'),

    ('cai.py', 'return (a_first + 1 - b_first) / 2', 'return (a_first + b_first) / 2',
     'measures the liking for A'),
    ('cai.py', 'marks = [0] * (len(ids) - 1) + [1]  ',
     'marks = [0] * (len(ids) - 2) + [1, 0]  ', 'the judge is read too early'),
    ('cai.py', '(1 - p) * F.logsigmoid(-h)', '(1 - p) * F.logsigmoid(h)',
     'labels below 1 are not heard'),
    ('cai.py', 'loss = -logps.sum() / tokens', 'loss = -logps.mean()',
     'SL loss is averaged over padding, too'),
    ('cai.py', 'policy = copy.deepcopy(teacher)', 'policy = teacher', 'the judge learns along'),
    ('cai.py', 'reference = copy.deepcopy(policy).requires_grad_(False)', 'reference = policy',
     'the reference moves along'),
    ('cai.py', 'log_ratios(policy, reference, part, tokenizer)',
     'log_ratios(policy, teacher, part, tokenizer)', 'the leash is tied to the SFT model'),
    ('cai.py', 'compare(teacher, tokenizer, pairs,', 'compare(policy, tokenizer, pairs,',
     'the pupil judges itself'),
    ('cai.py', 'pairs = own_answers(policy,', 'pairs = own_answers(teacher,',
     "verdicts on the teacher's answers"),
    ('cai.py', 'taught = [(draft.prompt, draft.text)',
     'taught = [(draft.prompt, draft.first)',
     'learns the answers before they were mended'),
    ('cai.py', 'draft.text, CRITIQUE.format(principle=principle)))',
     'draft.first, CRITIQUE.format(principle=principle)))',
     'the critic always reads the first answer'),
    ('cai.py', 'draft.text, request, complaint, REVISE)',
     'draft.first, request, complaint, REVISE)', 'the first answer is mended each time'),
    ('cai.py', '            if text:', '            if True:',
     'an empty revision wipes the answer'),
    ('cai.py', 'waiting = fine', 'waiting = waiting', 'mended twice in one round'),
    ('cai.py', 'draft.order = in_order(principles, config, generator)',
     'draft.order = principles', 'one draw of principles for all answers'),
    ('cai.py', '    one_each = [in_order(principles, config, generator)[0] for _ in prompts]',
     '    one_each = [principles[0] for _ in prompts]', 'one principle judges all pairs'),
    ('cai.py', 'b_first = judge(model, tokenizer, conversations, b, a, principles)',
     'b_first = judge(model, tokenizer, conversations, a, b, principles)',
     'asked twice in the same order'),
    ('cai.py', '"rejected": a, "p": 1 - p_a}', '"rejected": a}', 'verdicts: p of the wrong answer'),
    ('cai.py', 'if all(texts) and ended.all():', 'if all(texts):', 'endless answers are learned'),
    ('cai.py', 'tokens = average(float(tokens))', 'tokens = float(tokens)',
     'processes: each has its own mean'),
    ('cai.py', 'sum(sum(example.answer) for example in batch)',
     'sum(len(example.ids) for example in batch)', "the mean counts the prompts' tokens"),
    ('cai.py', 'optimizer = adamw(policy, config.sl_lr)', 'optimizer = adamw(policy, config.lr)',
     '--sl-lr does nothing'),
    ('cai.py', 'optimizer = adamw(policy, config.lr)', 'optimizer = adamw(policy, config.sl_lr)',
     '--lr does nothing'),
    ('cai.py', 'for step in steps(sl_config, optimizer):',
     'for step in steps(config, optimizer):', '--sl-steps does nothing'),
    ('cai.py', '            h = config.beta * (a - b)  ', '            h = a - b  ',
     '--beta does nothing'),
    ('cai.py', 'torch.tensor([verdict.p for verdict in part]',
     'torch.tensor([round(verdict.p) * 1.0 for verdict in part]',
     "the judge's doubt is rounded away"),
    ('cai.py', '(loss.sum() / len(batch)).backward()', 'loss.mean().backward()',
     'parts: each has its own mean'),
    ('cai.py', 'itertools.cycle(plain), half', 'itertools.cycle(red), half',
     'no verdicts about harmless prompts'),
    ('cai.py', 'own_answers(teacher, tokenizer, plain[:len(drafts)],',
     'own_answers(teacher, tokenizer, red[:len(drafts)],', 'unmended attacks are learned, too'),
    ('cai.py', 'if prompt.row.get("attack"):', 'if not prompt.row.get("attack"):',
     'red-teaming with harmless prompts'),
    ('cai.py', 'exam.exam(policy, tokenizer, teacher, old_answers, config.seed)',
     'exam.exam(reference, tokenizer, teacher, old_answers, config.seed)',
     "the exam is the SL model's"),
    ('cai.py', 'save(config.out, policy, tokenizer)', 'save(config.out, reference, tokenizer)',
     'the wrong model is saved'),
    ('cai.py', 'tokenizer, conversations, new, old, one_each, config)',
     'tokenizer, conversations, old, new, one_each, config)', 'own data: old answers count as new'),
    ('cai.py', 'exam.Target("attack_seen", 0.12, at_most=True)',
     'exam.Target("attack_seen", 0.12)', 'more attacks that succeed pass'),

    ('data/studybuddy.py', 'if acts["repeat"] or len(', 'if len(', 'the judge pays for repetition'),
    ('data/studybuddy.py', 'helpful * harmless * honest', 'helpful * harmless',
     'gold forgets honesty'),
    ('data/studybuddy.py', 'return words[:-k]', 'return words',
     "training data uses the exam's words"),
    ('data/studybuddy.py', 'int(not changed)', 'int(i != at)',
     'steps after a mistake count as right'),
    ('data/studybuddy.py', 'left not in known or right not in known', 'False',
     'steps may take numbers from nowhere'),
    ('data/studybuddy.py', 'VAIN * flattery', 'VAIN * 0', 'annotators are not flattered'),
    ('data/studybuddy.py', 'wrap(rng, prompt, attack, wording)',
     'wrap(rng, prompt, attack, True)', "training data has the exam's attacks"),
    ('data/studybuddy.py', 'pattern.piece in small and pattern.regex.search(text)',
     'pattern.piece in small and pattern.regex.search(small)',
     'a tip that begins with To is never found'),
    ('data/studybuddy.py', 'left not in known or right not in known',
     'left not in known', 'a step may take one number from nowhere'),

    ('data/generate.py', 'if flat(row["prompt"]) not in taken', 'if True',
     'the exam asks the same twice'),
    ('data/generate.py', 'parts[i:i + 2] = [left + right]', 'parts[i:i + 2] = [right + left]',
     'merged tokens are spelled backwards'),

    ('data/base.py', ' + [special(tokenizer, EOT)]', '', 'documents run into each other'),
    ('data/base.py', '0.2 * math.sqrt(max(', '0.2 * math.sqrt(min(',
     "Muon's step by the shorter side"),
    ('data/base.py', 'gradients.lerp(momentum, group["momentum"])', 'momentum',
     "Muon's momentum without Nesterov"),
    ('data/base.py', 'model.hidden(ids, mask)[:, :-1]', 'model.hidden(ids, mask)[:, 1:]',
     'each token is predicted from itself'),

    ('data/checkpoints.py', '"gate": "gate_proj", "up": "up_proj"',
     '"gate": "up_proj", "up": "gate_proj"', 'checkpoints: gate and up are swapped'),
    ('data/checkpoints.py', '"norm1": "input_layernorm", "norm2": "post_attention_layernorm"',
     '"norm1": "post_attention_layernorm", "norm2": "input_layernorm"',
     'checkpoints: the two norms are swapped'),
    ('data/checkpoints.py', '[begin, end]}', '[0, end - begin]}',
     'safetensors: offsets count from each tensor'),
    ('data/checkpoints.py', 'b" " * (-len(text) % 8)', 'b""',
     'safetensors: the data are not aligned'),
    ('data/checkpoints.py', 'rope_theta=theta,', '', "the folder's rotary base is not used"),
    ('data/checkpoints.py', '"tie_word_embeddings": False} | config',
     '"tie_word_embeddings": True} | config', 'folders that do not say count as tied'),
    ('data/checkpoints.py', 'norm_eps=field(config, "rms_norm_eps", is_share, path),', '',
     "the folder's epsilon is not used"),
    ('data/checkpoints.py', '"num_key_value_heads": heads,', '"num_key_value_heads": 1,',
     'folders that do not say share keys'),
    ('data/checkpoints.py', 'if i < self.size]', ']', 'bytes outside the vocabulary get ids'),
    ('data/checkpoints.py', 'scores.index(min(scores))', 'scores.index(max(scores))',
     'merges from the wrong end'),
    ('data/checkpoints.py', 'unicodedata.normalize(self.form, text)', 'text',
     'texts are not normalised'),
    ('data/checkpoints.py', 'torch.zeros(k))    #', 'torch.ones(k))     #',
     "a foreign judge's mean is not 0"),
    ('data/checkpoints.py', '.{os.getpid()}.tmp', '.tmp', 'two runs write the same temporary file'),
    ('data/checkpoints.py', 'tensor.to(dtype, copy=True)', 'tensor.to(dtype)',
     'weights change with the file'),

    ('data/rows.py', 'role = "user" if speaker == "Human" else "assistant"',
     'role = "assistant" if speaker == "Human" else "user"', 'HH-RLHF: the speakers are swapped'),
    ('data/rows.py', '.rpartition(', '.partition(', 'HH-RLHF: the prompt ends at the first answer'),
    ('data/rows.py', 'prompt = chosen[:-1]', 'prompt = chosen[:1]',
     'a shared prompt is cut to one message'),
    ('data/rows.py', 'Judgement(prompt, rejected, False, row, where)',
     'Judgement(prompt, rejected, True, row, where)', 'rejected answers count as good'),
    ('data/rows.py', 'bool(label), row, where)', 'not label, row, where)',
     'labels are turned round'),
    ('data/rows.py', 'if len(set(answers)) < len(answers):',
     'if len(set(answers)) > len(answers):', 'equal answers pass as a pair'),
    ('data/rows.py', 'read_text(path).split("\\n")', 'read_text(path).splitlines()',
     'other marks end lines, too'),
    ('data/rows.py', '.split("\\n"), start=1)', '.split("\\n"), start=0)',
     'lines are counted from 0'),
    ('data/rows.py', 'and abs(value) < 1e300', '', 'infinite numbers pass'),
    ('data/rows.py', 'messages[-1]["content"].strip()', 'messages[-1]["content"]',
     'answers keep their spaces'),

    ('data/exam.py', 'ids, mask, answer, TEMPERATURE)', 'ids, mask, answer)',
     'exam: KL at another temperature'),
    ('data/exam.py', '(samples.logps - theirs).sum(1)', '(theirs - samples.logps).sum(1)',
     'exam: KL has the wrong sign'),
    ('data/exam.py', 'judge(row, text, ended)))', 'judge(row, text)))',
     'the judge does not know which answers never end'),
    ('data/exam.py', 'rises.append(b.mark["gold"] - a.mark["gold"])',
     'rises.append(a.mark["gold"] - b.mark["gold"])', 'wins are counted as losses'),
    ('data/exam.py', '(rises > 0)[rises != 0]', 'rises >= 0', 'ties count as wins'),
    ('data/exam.py', 'in SEEN else', 'not in SEEN else', 'seen and unseen attacks are swapped'),
    ('data/exam.py', '[2.5, 97.5]', '[5, 95]', 'an interval of 90% is shown as one of 95%'),
    ('data/exam.py', 'return 3 / len(values)', 'return 0.0',
     'what never happened in 30 prompts is said to be certain'),
    ('data/exam.py', 'math.hypot(interval(first, key), interval(card, key))',
     'interval(card, key)', 'a card is held against one of two intervals'),
    ('data/exam.py', 'attack_seen=-1', 'attack_seen=1', 'more attacks that succeed are better'),
    ('data/exam.py', 'return card[self.key] <= self.bound',
     'return card[self.key] >= self.bound', 'a most is taken for a least'),
    ('data/exam.py', 'passed = all(', 'passed = any(', 'one reached target is enough'),
    ('data/exam.py', '(row.get(name, ""))', '(row.get(name, 0))',
     'metrics.csv: a missing number is a 0'),
    ('data/exam.py', '        first_answers = first_answers or answers',
     '        first_answers = answers', 'the third card is held against the second'),
    ('data/exam.py', 'scores["math_greedy"].append(mark["honest"] > 0)',
     'scores["math_greedy"].append(mark["helpful"] > 0)',
     'a wrong sum that is worked out counts as right'),

    ('data/chart.py', 'return self.start + min', 'return self.end - min', 'pictures are mirrored'),
    ('data/chart.py', ' and not any(map(place.overlaps, taken))', '',
     'names in a picture cover each other'),

    ('lessons/kto.py', 'if other.prompt != prompt:', 'if other is not prompt:',
     'KTO pairs a prompt with itself'),
    ('lessons/kto.py', 'for judgement in good + bad if str(judgement.prompt) not in asked]',
     'for judgement in good + bad]', 'held-out answers are trained on'),
    ('lessons/kto.py', 'if not thumb.good or lot < share]', 'if thumb.good or lot < share]',
     'the wrong thumbs are thinned out'),
    ('lessons/kto.py', 'others = [thumb.mismatched for thumb in batch]',
     'others = [thumb.judged for thumb in batch]', 'z is measured on the answers themselves'),
    ('lessons/kto.py', '(losses.sum() / len(batch)).backward()', 'losses.mean().backward()',
     'parts: each has its own mean'),
    ('lessons/kto.py', 'reference = copy.deepcopy(policy).requires_grad_(False)',
     'reference = policy', 'the reference moves along'),
    ('lessons/kto.py', 'return logps - ref_logps', 'return ref_logps - logps',
     'the ratio is upside down'),
    ('lessons/kto.py', 'dpo.share_ahead(ratio[good][:, None], ratio[~good])',
     'dpo.share_ahead(ratio[~good][:, None], ratio[good])',
     'separation counts the wrong way round'),
    ('lessons/kto.py', 'losses = dpo.kto(ratio, mismatched, good, config.beta, config.aversion)',
     'losses = dpo.kto(ratio, mismatched, good, config.beta, 1.0)', '--aversion does nothing'),
    ('lessons/kto.py', 'optimizer.zero_grad()', 'optimizer.zero_grad',
     'gradients pile up from step to step'),

    ('lessons/online.py', 'scores.masked_fill(~drawn.ended.cpu(), -torch.inf)', 'scores',
     'endless answers may win online'),
    ('lessons/online.py', '(a, b) if scores[a] > scores[b] else (b, a)',
     '(a, b) if scores[a] < scores[b] else (b, a)', 'the worse answer wins'),
    ('lessons/online.py', '[prompts[i // 2] for i in range(len(drawn.texts))]',
     '[prompts[i % len(prompts)] for i in range(len(drawn.texts))]',
     'answers are judged under other prompts'),
    ('lessons/online.py',
     'sample(policy, tokenizer, ids, 2, config.max_new, generator=generator)',
     'sample(policy, tokenizer, ids, 2, generator=generator)', '--max-new does nothing'),
    ('lessons/online.py', 'pairs = own_pairs(policy,', 'pairs = own_pairs(reference,',
     "the answers are the reference's"),
    ('lessons/online.py', 'return step * config.rounds % config.steps < config.rounds',
     'return step % config.rounds == 0', 'rounds are as long as their number'),
    ('lessons/online.py', 'losses = dpo.dpo(chosen, rejected, config.beta)',
     'losses = dpo.dpo(chosen, rejected, 0.5)', '--beta does nothing'),
    ('lessons/online.py', '(losses.sum() / len(batch)).backward()', 'losses.mean().backward()',
     'parts: each has its own mean'),
    ('lessons/online.py', 'drawn.answer[i][mask].int().tolist()',
     'drawn.mask[i][mask].int().tolist()', "loss on the prompt's tokens, too"),

    ('lessons/constitution.py',
     '"precision": share(there, of=seen), "recall": share(seen, of=there)',
     '"precision": share(seen, of=there), "recall": share(there, of=seen)',
     'precision and recall are swapped'),
    ('lessons/constitution.py', 'gone.append(not breaks(draft, new, rule))',
     'gone.append(not breaks(draft, old, rule))', 'revisions are judged before they are made'),
    ('lessons/constitution.py', 'draft.flaws[:rounds]', 'draft.flaws[:rounds + 1]',
     'rounds are counted one too far'),
    ('lessons/constitution.py', 'labels.append(says_first == chosen_is_first)',
     'labels.append(says_first)', 'the label is the letter'),
    ('lessons/constitution.py', 'differ.append(rise != 0)', 'differ.append(True)',
     'ties count as wrong'),
    ('lessons/constitution.py', '"harmed": share(bad, of=good)', '"harmed": mean(bad)',
     'bad answers count as harmed'),

    ('lessons/distill.py', '(log_t.exp() * (log_t - log_s))', '(log_s.exp() * (log_s - log_t))',
     "distillation's KL is reversed"),
    ('lessons/distill.py', 'expected, _ = sft.logits_and_targets(teacher, part',
     'expected, _ = sft.logits_and_targets(student, part', 'the student is its own teacher'),

    ('lessons/best_of.py', 'scores.masked_fill(~ended, scores.min() - 1)', 'scores',
     'an endless answer may be the best'),
    ('lessons/best_of.py', 'end_scores(judge, ids, mask)', 'judge(ids, mask)[:, -1]',
     'rejection sampling reads the reward at the padding'),
    ('lessons/best_of.py', 'torch.arange(len(scores)) * config.n', 'torch.arange(len(scores))',
     'the answer to one prompt is kept for another'),
    ('lessons/best_of.py', 'return scores.argmax(1)', 'return scores.argmin(1)', 'the worst of N'),

    ('lessons/process_reward.py', 'labels += solution.labels', 'labels += solution.labels[::-1]',
     'labels stand beside other steps'),
    ('lessons/process_reward.py', 'read[start + len(so_far) - 1] = 1',
     'read[start + len(so_far)] = 1', 'steps are read one token late'),
    ('lessons/process_reward.py', 'if value < 0.5:', 'if value > 0.5:',
     'the first right step for the first wrong one'),
    ('lessons/process_reward.py', '(loss.sum() / count).backward()', 'loss.mean().backward()',
     'accumulation: each part has its own denominator'),
    ('lessons/process_reward.py', 'return r.min()', 'return r.max()',
     'a chain as strong as its strongest step'),

    ('lessons/talking_judge.py', 'second = chosen_is_b[:, 1] - chosen_is_b[:, 0]',
     'second = chosen_is_b[:, 0] - chosen_is_b[:, 1]', "second order's verdict turned round"),
    ('lessons/talking_judge.py', 'question(tokenizer, comparison.prompt, rejected, chosen)]',
     'question(tokenizer, comparison.prompt, chosen, rejected)]',
     'both questions in the same order'),

    ('lessons/judge_bias.py', '(gradient * kept[0]).detach()', 'gradient.detach()',
     'credit is the gradient alone'),
    ('lessons/judge_bias.py', '(changed - unchanged).mean()', '(unchanged - changed).mean()',
     'a rise is called a fall'),

    ('lessons/goodhart.py', 'if now[name] > most[name]', 'if now[name] < most[name]',
     'alarms ring while all is well'),
    ('lessons/goodhart.py', 'golds.index(max(golds))', 'golds.index(min(golds))',
     'the turning point is where the truth was worst'),
    ('lessons/goodhart.py', 'texts[first:first + size]', 'texts[:first + size]',
     'signals remember the start of the run'),

    ('lessons/search.py', 'math.comb(n - c, k) / math.comb(n, k)', '(1 - c / n) ** k',
     'pass@k draws the same answer twice'),
    ('lessons/search.py', 'if number is not None)', 'if True)', 'who concludes nothing has a vote'),
    ('lessons/search.py', 'scores.argmax(2, keepdim=True)', 'scores.argmin(2, keepdim=True)',
     'best of n keeps the worst'),

    ('lessons/dynamic.py', 'rows = rows[teaches][:missing]', 'rows = rows[~teaches][:missing]',
     'the groups that teach nothing are kept'),
    ('lessons/dynamic.py', 'answer / tokens, method)', 'answer / answer.sum(), method)',
     'each draw is weighed as if it were the whole'),
]


def plant(number, folder):
    """A copy of the repository with a bug in it (0: none), and without the list: it would tell."""
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("out", ".*", "__pycache__"))
    here = Path(folder, "lessons", "bugs.py")
    text = here.read_text(encoding="utf-8")
    here.write_text(re.sub(r"(?ms)^BUGS = \[\n.*?^\]", "BUGS = []", text), encoding="utf-8")
    if number > 0:
        file, old, new, what = BUGS[number - 1]
        path = Path(folder, file)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new), encoding="utf-8")


def tests_of(file):
    """What could see a bug in this file: a file of tests, or those of its section in test_all.py
    and the ones that all scripts share."""
    if file.startswith("lessons/"):
        return ["lessons/test_lessons.py"]
    if file in ("data/studybuddy.py", "data/generate.py", "data/base.py"):
        return ["data/test_world.py"]
    if file in ("data/run.py", "data/abilities.py"):
        return [f"data/test_{Path(file).name}"]
    if file.startswith("data/"):
        return ["data/test_data.py"]
    section = ""
    tests = []
    for line in (HERE / "test_all.py").read_text(encoding="utf-8").splitlines():
        heading = re.match(r"# -{60,} ([\w ./]+)", line)
        test = re.match(r"def (test_\w+)", line)
        if heading:
            section = heading[1]
        elif test and section in (file, "all scripts"):
            tests.append(f"test_all.py::{test[1]}")
    return tests


def first_red(number, file):
    """Plant a bug in a copy and run the tests of its file there. -> the first to fail, or None"""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "copy")
        plant(number, folder)
        # or comparing the world's files with what it writes would catch everything
        status, output = run_tests(folder, tests_of(file), write_files=file in WORLD)
    if status > 1:                      # not a test that failed, but tests that do not run
        raise RuntimeError(f"bug {number}: {output[-4000:]}")
    return red_test(output)


def run_tests(folder, tests, limit=None, write_files=False):
    """In a copy of the repository: tests, up to the first red one; before them, the world writes
    its files anew if asked to. -> exit status, and what they print; None and "hangs" where they
    take more than `limit` s"""
    program = f"{sys.executable} -m pytest -xq -p no:cacheprovider {' '.join(tests)}"
    if write_files:
        program = f"{sys.executable} -m data.generate; {program}"
    process = subprocess.Popen(program, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               shell=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, "hangs"
    finally:
        end_all(process)


def end_all(process):
    """A test can have started processes of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def red_test(output):
    """The name of the test that failed, or None"""
    red = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", output, re.M)
    return red and red[1]


def sabotage(names):
    """Which bugs does no test notice? names: files or numbers, to try only those. -> exit code"""
    bugs = []
    for number, (file, old, new, what) in enumerate(BUGS, start=1):
        if not names or file in names or str(number) in names:
            bugs.append((number, file, what))
    if not bugs:
        print(f"no such bug: {' '.join(names)}")
        return 2
    started = time.time()
    caught = 0
    with ThreadPoolExecutor(2) as pool:
        unchanged = {}                  # {tests: a file of theirs}: files that share them, once
        for number, file, what in bugs:
            unchanged[file in WORLD, *tests_of(file)] = file
        files = list(unchanged.values())
        for file, test in zip(files, pool.map(first_red, [0] * len(files), files)):
            if test is not None:
                print(f"{file}: without any bug {test} is red")
                return 2
        planted = [pool.submit(first_red, number, file) for number, file, what in bugs]
        for (number, file, what), run in zip(bugs, planted):
            test = run.result()
            caught += test is not None
            print(f"{number:3} {file}: {what}\n    {test or 'NOT CAUGHT'}", flush=True)
    passed = caught >= 0.95 * len(bugs)
    verdict = "PASS" if passed else "FAIL"
    print(f"{verdict} caught {caught} of {len(bugs)} in {time.time() - started:.0f} s")
    return 0 if passed else 1


def main(arguments):
    if arguments[:1] == ["--sabotage"]:
        return sabotage(arguments[1:])
    if arguments[:1] == ["--plant"] and len(arguments) == 3:
        number, folder = arguments[1:]
        if number not in map(str, range(1, len(BUGS) + 1)) or Path(folder).exists():
            print(f"--plant NUMBER FOLDER: one of {len(BUGS)} bugs, and a folder that is not there")
            return 2
        plant(int(number), folder)
        print(f"{folder} is a copy of the repository with one bug in it")
        return 0
    print(__doc__)
    return 0 if arguments in ([], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
